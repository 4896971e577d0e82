"""Trains a model: `python -m gpt_jax.main --config=configs/chat.py [--workdir=RUN] [--config.x.y=VALUE ...]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt_jax.cli import run_main
from gpt_jax.config import UserError, validate

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder; one that exists goes on where it stopped. Default: a new one in runs/."
)


def _load_config() -> ConfigDict:
    if _CONFIG.value is None:
        raise UserError("no config: give --config=configs/chat.py, or another file of configs/")
    try:
        config = _CONFIG.value
        validate(config)  # an unreadable file shows at its first use
    except OSError as error:
        raise UserError(f"cannot read the config: {error}") from None
    return config


def main(argv: Sequence[str]) -> int:
    config = _load_config()
    from gpt_jax.train import TrainingFailed, train_and_evaluate  # after the config: a typo need not wait for jax

    try:
        stopped_by = train_and_evaluate(config, None if _WORKDIR.value is None else Path(_WORKDIR.value))
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    run_main(main)
