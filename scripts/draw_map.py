"""Draws the maps of the code in README.md: its rooms, and every file, each with the first sentence of its docstring.

python scripts/draw_map.py
"""

import ast
import itertools
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAP = re.compile(r"(?<=^```text\n)gpt_jax/.*?(?=^```)", re.MULTILINE | re.DOTALL)  # of the rooms, then of the files
PACKAGES = {  # rooms in their order, which in vk_kernels is that of imports, from above
    "gpt_jax": (
        *("model", "data", "training", "distributed", "inference", "serving", "evaluation", "runs", "huggingface"),
        "storage",
    ),
    "vk_kernels": ("tools", "ops", "bridge", "compiler", "runtime", "spirv"),
}
COLUMN, WIDTH = 32, 126


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, without the command that it names."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    sentence = re.split(r"\.(?: |$)", " ".join(text.split("\n\n")[0].split()))[0]
    return re.split(r":? `python|; `runs/|; docs/", sentence)[0]


def lines_of(folder: Path, indent: int = 0, *, with_files: bool) -> list[str]:
    """A folder's line, then those of its files and of the folders in it."""
    lines = [line(indent, f"{folder.name}/", first_sentence(folder / "__init__.py"))]
    files = (file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_"))
    lines += [line(indent + 1, file.name, first_sentence(file)) for file in files if with_files]
    if with_files or not indent:
        there = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
        for name in sorted(there, key=PACKAGES.get(folder.name, there).index):
            lines += lines_of(folder / name, indent + 1, with_files=with_files)
    return lines


def line(indent: int, name: str, about: str) -> str:
    """One line, or more where one is too long."""
    head = f"{'  ' * indent + name:<{COLUMN - 1}} "
    return textwrap.fill(about, WIDTH, initial_indent=head, subsequent_indent=" " * COLUMN)


def draw(*, with_files: bool) -> str:
    """One map."""
    lines = (lines_of(ROOT / name, with_files=with_files) for name in PACKAGES)
    return "".join(f"{one}\n" for one in itertools.chain.from_iterable(lines))


def drawn(page: str) -> str:
    """README's text with both maps as they are to be."""
    maps = iter((False, True))
    return MAP.sub(lambda _: draw(with_files=next(maps)), page)


if __name__ == "__main__":
    README.write_text(drawn(README.read_text()))
