"""Prints the report of a run: `python -m gpt_jax.report RUN`; `runs/find.py` says what RUN may be."""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from collections.abc import Sequence

from gpt_jax.cli import run_main
from gpt_jax.runs.find import find_run
from gpt_jax.runs.load import load_run
from gpt_jax.runs.report import make_report


def main(argv: Sequence[str]) -> None:
    print(make_report(load_run(find_run(argv[1]).workdir)), end="")


if __name__ == "__main__":
    run_main(main, arguments=["RUN"])
