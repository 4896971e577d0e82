"""Writes the report of a run, or of several beside each other: `python -m gpt_jax.report RUN...`

Of one run `report.html`, `report.md` and `report.json` in its folder; of several `comparison.html` and so on in the
current one. `--out=FOLDER` has them elsewhere. `runs/find.py` says what RUN may be.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from gpt_jax.cli import run_main
from gpt_jax.config import text_problem
from gpt_jax.errors import UserError
from gpt_jax.runs.comparison import compare_runs
from gpt_jax.runs.find import find_run
from gpt_jax.runs.folder import REPORT
from gpt_jax.runs.load import load_run
from gpt_jax.runs.report import make_report, write_files
from gpt_jax.storage.files import writing


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    text = "Folder to write to. Default: the run's own; of several runs the current one."
    flags.DEFINE_string("out", None, text, flag_values=flag_values)


def main(argv: Sequence[str]) -> None:
    folders = [find_run(name, saved=False).workdir for name in argv[1:]]
    runs = [load_run(folder) for folder in folders]
    out = flags.FLAGS.out
    if out is not None and (problem := text_problem(out)):
        raise UserError(f"--out {problem}")
    if out == "":
        raise UserError("--out is empty: name a folder, or leave it out")
    if out is not None and not Path(out).is_dir():
        raise UserError(f"--out={out} is no folder: make it first, or name another")
    if len(runs) == 1:
        stem, report = Path(out or folders[0]) / REPORT, make_report(runs[0])
    else:
        stem, report = Path(out or ".") / "comparison", compare_runs(runs)
    with writing(stem.with_suffix(".html")):
        print(write_files(report, stem))


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], more="RUN", define=define_flags)
