"""Exports a run for transformers: `python -m gpt_jax.export RUN --to FOLDER`, or `--to s3://BUCKET/FOLDER`.

RUN is a run's folder, latest or best, and RUN@STEP another of its checkpoints; see `gpt_jax.runs.find`. The folder is
there whole or not at all; what a URL gets is whole when its last file is there, SHA256SUMS.

Adapters (LoRA) are merged; `--adapter` writes them alone, for the library `peft`, and RUN/base is what they stand
beside.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import functools
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from gpt_jax.checkpoint import restore_adapters
from gpt_jax.config import check_saved, text_problem, with_defaults
from gpt_jax.errors import UserError
from gpt_jax.huggingface.adapter import ADAPTER_FILES, write_adapter
from gpt_jax.huggingface.export import MODEL_FILES, check_exportable, parse_size, write_model
from gpt_jax.huggingface.model_card import Exported
from gpt_jax.huggingface.tensors import DTYPES
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.runs.find import FoundRun, find_run
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE, read_config
from gpt_jax.runs.load import RunData, load_run
from gpt_jax.runs.metrics import METRICS_FILE
from gpt_jax.storage.checkpoint_files import BASE
from gpt_jax.storage.new_folder import check_target, new_folder
from gpt_jax.storage.upload import is_url, open_target

FLAGS = flags.FLAGS
DEFAULT_SHARD_SIZE = "5GB"


def main(argv: Sequence[str]) -> None:
    most = None if FLAGS.max_shard_size is None else parse_size(FLAGS.max_shard_size)
    export(find_run(argv[1]), FLAGS.to, dtype=FLAGS.dtype, most=most, force=FLAGS.force, adapter=FLAGS.adapter)


def export(found: FoundRun, to: str, *, dtype: str, most: int | None, force: bool, adapter: bool = False) -> None:
    """Writes a checkpoint, or its adapters alone, to a folder or a URL, and says so.

    most: bytes of a file of weights; None: DEFAULT_SHARD_SIZE.

    Raises:
      UserError: it cannot be exported, or files are there that are not to be replaced.
      StorageError: it could not be written; nothing of it is there.
    """
    if problem := text_problem(to):
        raise UserError(f"--to {problem}")
    if not to:
        raise UserError("--to is empty: name a folder, or a URL such as s3://BUCKET/FOLDER")
    saved = read_config(found.workdir)
    if saved:  # what can be refused is, before the parameters are read
        check_saved(saved, found.workdir / CONFIG_FILE)
        if adapter and not with_defaults(saved)["lora.rank"]:
            raise UserError(f"{found.workdir} has no adapters, since its config.lora.rank is 0: leave out --adapter")
        check_exportable(ConfigDict(saved))
    if adapter and dtype != "float32":
        raise UserError(f"--adapter writes adapters as they were trained, in float32: leave out --dtype={dtype}")
    if adapter and most is not None:
        raise UserError("--adapter writes one file, which is small: leave out --max_shard_size")
    most = parse_size(DEFAULT_SHARD_SIZE) if most is None else most
    ours: Collection[str] = ADAPTER_FILES if adapter else MODEL_FILES
    target = open_target(to, replace=force, ours=ours) if is_url(to) else None
    if target is None:
        check_target(Path(to), replace=force, ours=ours)
    write, description = _read_adapter(found) if adapter else _read_model(found, dtype, most)
    if target is None:
        with new_folder(Path(to), replace=force, ours=ours) as folder:
            write(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="gpt_jax_export_") as folder:
            write(Path(folder))
            target.upload(Path(folder))
    print(f"exported {'the adapters of ' if adapter else ''}{description} to {to}, in {dtype}")


def _read_model(found: FoundRun, dtype: str, most: int) -> tuple[Callable[[Path], None], str]:
    """Reads a checkpoint; returns the function that writes it as a model, and which checkpoint it is."""
    checkpoint = None if found.checkpoint == found.workdir else found.checkpoint
    is_base = found.checkpoint.name == BASE
    exported = Exported(*load_for_sampling(found.workdir, checkpoint), _told_of(found.workdir), trained=not is_base)
    return functools.partial(write_model, exported=exported, dtype=dtype, most=most), exported.description


def _read_adapter(found: FoundRun) -> tuple[Callable[[Path], None], str]:
    """Reads adapters; returns the function that writes them, and which checkpoint they are of."""
    (adapters, scale), description = restore_adapters(found.checkpoint)
    config = ConfigDict(read_config(found.workdir))
    return functools.partial(write_adapter, adapters=adapters, scale=scale, config=config), description


def _told_of(workdir: Path) -> RunData:
    """The facts that a run has written down; a folder with nothing but what answers need has few."""
    if any((workdir / name).exists() for name in (INFO_FILE, METRICS_FILE)):
        return load_run(workdir)
    return RunData(workdir, {}, read_config(workdir), {}, [], [], [])


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE_string("to", None, "Folder, or URL of a store: gs://, s3://, file://.", required=True, **here)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the weights.", **here)
    largest = f"Size of a file of weights at most. Default: {DEFAULT_SHARD_SIZE}."
    flags.DEFINE_string("max_shard_size", None, largest, **here)
    flags.DEFINE_bool("adapter", False, "Whether of a run of adapters these alone are written, for peft.", **here)
    flags.DEFINE_bool("force", False, "Whether a model that is there already is replaced.", **here)


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], define=define_flags)
