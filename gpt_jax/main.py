"""Trains a model, in a new run or one that goes on by its own config:
`python -m gpt_jax.main --config=configs/chat.py [--workdir=RUN] [--config.x.y=VALUE ...]`.

Without `--config`, the run of `--workdir=RUN` goes on, by its own config and what the command line changes in it.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

import argparse
import functools
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import vk_kernels
from gpt_jax import BEGAN
from gpt_jax.cli import imports_done, require_jax, run_main
from gpt_jax.config import leaves, validate
from gpt_jax.config_file import define_config_flag, describe_changes
from gpt_jax.data.token_cache import check_sources
from gpt_jax.distributed.launch import end_with_launcher, launch
from gpt_jax.distributed.processes import join
from gpt_jax.errors import UserError
from gpt_jax.runs.find import find_run
from gpt_jax.runs.info import CONFIG_FILE, read_info, versions
from gpt_jax.training.history import why_complete
from gpt_jax.training.open_settings import fill_in, follow_num_steps, reads_hugging_face


def define_flags(flag_values: flags.FlagValues = flags.FLAGS, arguments: Sequence[str] | None = None) -> None:
    """Defines `--config` and `--workdir`. arguments: the command line; None: that of this process."""
    define_config_flag(flag_values, arguments, default=config_of_run)
    text = "Run folder; one that exists goes on where it stopped. Default: a new one in runs/."
    flags.DEFINE_string("workdir", None, text, flag_values=flag_values)


def config_of_run(arguments: Sequence[str]) -> Path | None:
    """The config of the run that a command line without `--config` goes on with; None if it names no run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--workdir", "-workdir")
    name = parser.parse_known_args([*arguments])[0].workdir
    if not name:
        return None
    file = Path(name) / CONFIG_FILE
    if os.path.isdir(name) and not file.exists():
        raise UserError(
            f"{name} has no {CONFIG_FILE}, so it is no run to go on with: give --config=configs/chat.py, or another"
        )
    try:
        found = find_run(name)
    except UserError as error:
        raise UserError(f"--workdir={name}: {error}; a new run needs --config=configs/chat.py, or another") from None
    if found.checkpoint != found.workdir:
        raise UserError(
            f"--workdir={name}: a run goes on from its newest checkpoint: give --workdir={found.workdir}, or begin "
            f"another with --config=configs/finetune.py --config.init_from={name}"
        )
    return found.workdir / CONFIG_FILE


def file_behind(config: ConfigDict, workdir: Path | None) -> dict[str, Any] | None:
    """The file that a run's config is of, and what was changed in it, as `describe_changes` says it.

    A run that goes on by its own config is of the file that it began with.
    """
    changes = describe_changes(config)
    if changes is None or workdir is None or not flags.FLAGS["config"].using_default_value:
        return changes
    began_with = read_info(workdir).get("config_file")
    return began_with and {**began_with, "values": changes["values"] | began_with["values"]}


def main(argv: Sequence[str]) -> int:
    end_with_launcher()
    flag, workdir = flags.FLAGS["config"], flags.FLAGS.workdir
    config = flag.value
    if config is None:
        raise UserError("no config: give --config=configs/chat.py, or another file of configs/")
    if workdir == "":
        raise UserError("--workdir is empty: name a folder, or leave it out for a new one in runs/")
    workdir = None if workdir is None else Path(workdir)
    if flag.using_default_value:
        workdir = Path(flag.config_filename).parent
        follow_num_steps(config, workdir, flag.override_values)
    if not reads_hugging_face(config, workdir):  # which needs jax
        config = fill_in(config, workdir)
        validate(config)
        if flag.using_default_value and (why := why_complete(config, workdir)) is not None:
            print(why)
            return 0
        if not config.distributed:  # else the other processes are to hear of it
            check_sources(config.data)
    exit_on_interrupt()
    require_jax()
    from gpt_jax.backend import processes_to_launch  # after the config: a typo need not wait for jax
    from gpt_jax.training.failures import TrainingFailed
    from gpt_jax.training.train import train_and_evaluate

    imports_done()
    if (count := processes_to_launch(config)) > 1:
        return launch(count)
    try:
        with join(config.distributed, config.devices) as processes:
            processes.agree(what_all_need(config))
            began_with = file_behind(config, workdir)
            stopped_by = train_and_evaluate(config, workdir, began=BEGAN, config_file=began_with, processes=processes)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if stopped_by is None else 128 + stopped_by


def what_all_need(config: ConfigDict) -> dict[str, Any]:
    """Values that must be the same on all processes of a run, by name: the config, the program and its libraries."""
    of_host = ("distributed", "devices", "data.cache_dir")
    settings = {f"config.{name}": value for name, value in leaves(config) if name not in of_host}
    found = {f"the version of {name}": version for name, version in versions().items()}
    return found | {"the checksum of the program": checksum_of_program()} | settings


def checksum_of_program() -> int:
    """CRC-32 of the sources of this program."""
    packages = [Path(__file__).parent, Path(vk_kernels.__file__).parent]
    sources = sorted(file for package in packages for file in package.rglob("*.py"))
    return functools.reduce(lambda crc, file: zlib.crc32(file.read_bytes(), crc), sources, 0)


if __name__ == "__main__":
    run_main(main, define=define_flags)
