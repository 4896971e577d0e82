"""A run in numbers, plain words and pictures: `report.html`, `report.md` and `report.json`, which say the same.

`python -m gpt_jax.report RUN` writes them, and training at its end.
"""

import json
from pathlib import Path

from gpt_jax.runs import markdown, page
from gpt_jax.runs.content import Report, Section, as_json
from gpt_jax.runs.folder import REPORT
from gpt_jax.runs.load import RunData, load_run
from gpt_jax.runs.sections import SECTIONS
from gpt_jax.storage.files import replacing


def write_report(workdir: str | Path) -> Path:
    """Writes the report of a run into its folder; returns the path of the page.

    Raises:
      UserError: there is no run, or a file of it is damaged.
    """
    return write_files(make_report(load_run(workdir)), Path(workdir) / REPORT)


def make_report(run: RunData) -> Report:
    title = f"Run {run.info.get('run_id', run.workdir.resolve().name)}"
    return Report(title, tuple(Section(name, tuple(make(run))) for name, make in SECTIONS.items()))


def write_files(report: Report, stem: Path) -> Path:
    """Writes STEM.md, STEM.json and, last, STEM.html, whose path is returned."""
    texts = {
        ".md": markdown.render(report),
        ".json": json.dumps(as_json(report), allow_nan=False, indent=1) + "\n",
        ".html": page.render(report),
    }
    for suffix, text in texts.items():
        with replacing(stem.with_name(stem.name + suffix)) as file:
            file.write(text.encode(errors="replace").decode())  # half a character, which no file takes
    return stem.with_name(stem.name + ".html")
