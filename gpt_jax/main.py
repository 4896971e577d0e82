"""Trains a model: `python -m gpt_jax.main --config=configs/chat.py [--workdir=RUN] [--config.x.y=VALUE ...]`."""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from gpt_jax import BEGAN
from gpt_jax.cli import require_jax, run_main
from gpt_jax.config import validate
from gpt_jax.config_file import define_config_flag, describe_changes
from gpt_jax.errors import UserError


def define_flags() -> None:
    define_config_flag()
    flags.DEFINE_string(
        "workdir", None, "Run folder; one that exists goes on where it stopped. Default: a new one in runs/."
    )


def main(argv: Sequence[str]) -> int:
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if config is None:
        raise UserError("no config: give --config=configs/chat.py, or another file of configs/")
    if workdir == "":
        raise UserError("--workdir is empty: name a folder, or leave it out for a new one in runs/")
    validate(config)
    exit_on_interrupt()
    require_jax()
    from gpt_jax.training.failures import TrainingFailed  # after the config: a typo need not wait for jax
    from gpt_jax.training.train import train_and_evaluate

    try:
        stopped_by = train_and_evaluate(
            config,
            None if workdir is None else Path(workdir),
            began=BEGAN,
            config_file=describe_changes(config),
        )
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    run_main(main, define=define_flags)
