"""Pages name what is there: links, files, tests, settings, rooms; and README has a link to every page."""

import re
import runpy
from pathlib import Path

import pytest

from gpt_jax.config import FIELDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name for name in ("vk_kernels/README.md", "vk_kernels/shaders/README.md", "findings/README.md")]
HISTORY = [ROOT / "LOG.md", *sorted((ROOT / "docs" / "reports").glob("*/*.md"))]  # which names what was there
FOLDERS = "gpt_jax|vk_kernels|tests|docs|scripts|benchmarks|configs|examples|notebooks|findings"
FILE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\.\w+)(?:::(\w+))?")
SHORT_FILE = re.compile(r"(?:[\w-]+/)*[\w-]+\.(?:py|sh|slang|ipynb)")  # as in `runtime/hazards.py`, `emit_program.py`
SETTING = re.compile(r"\bconfig\.(?!py|json|x=)([a-z_]+(?:\.[a-z_0-9]+)?)\b")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```[\s\S]*?^```$|^(?: {4}|\t).*$", "", page.read_text(), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_sources() -> set[str]:
    """The paths of all files of the repository that a page may call by the end of their path."""
    folders = [ROOT / name for name in FOLDERS.split("|")]
    return {f"/{file.relative_to(ROOT)}" for folder in folders for file in folder.rglob("*.*")}


@pytest.mark.parametrize("page", PAGES + HISTORY, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not re.match(r"https?:", link) and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page):
    text, sources = page.read_text(), named_sources()
    missing = [
        f"{path}::{test}" if test else path
        for path, test in FILE.findall(text)
        if not (ROOT / path).exists() or (test and f"def {test}(" not in (ROOT / path).read_text())
    ]
    words = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}
    short = [word for word in words if SHORT_FILE.fullmatch(word)]
    missing += [word for word in short if not any(file.endswith(f"/{word}") for file in sources)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_is_one(page):
    rooms = {name.partition(".")[0] for name in FIELDS if "." in name}
    assert [name for name in SETTING.findall(page.read_text()) if name not in FIELDS and name not in rooms] == []


def test_every_page_is_linked():
    pages = sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
    assert [page for page in pages if f"({page})" not in README] == []


def test_every_finding_is_in_their_table():
    scripts = [file.name for file in (ROOT / "findings").glob("*.sh")]
    table = (ROOT / "findings" / "README.md").read_text()
    assert [name for name in scripts if f"| `{name}` |" not in table] == []


def test_the_maps_are_as_the_files_say():
    """If not: `python scripts/draw_map.py`."""
    assert runpy.run_path(str(ROOT / "scripts" / "draw_map.py"))["drawn"](README) == README
    assert README.count("\ngpt_jax/ ") == 2
