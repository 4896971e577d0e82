"""Checkpoints: one directory a step holds train state and position, committed together; damaged ones are passed over.

Orbax's `Checkpointer` writes the arrays; what a run needs around that stands here and in storage/checkpoint_files.py.
Not `CheckpointManager`, which counts a damaged directory as a step and refuses to save over it (the claim of
tests/training/test_checkpoint_damage.py::test_a_damaged_newest_can_be_saved_again), and not the v1 API, which is
experimental still and renamed its functions between 0.11 and 0.12; neither notices a flipped bit.

    DIRECTORY/STEP/state/         the leaves of the train state: a nested dict of arrays, for any orbax reader
    DIRECTORY/STEP/position.json  position, validation loss, CRC-32 of every file of `state` and of itself

All is written under DIRECTORY/STEP.new, and one rename commits it.

A run of adapters (`model.lora`) saves these alone, and once, in RUN/base, the parameters that they stand beside, which
no step changes: so a run is whole by itself, whatever becomes of its donor. Who reads its parameters gets both, merged.
"""

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax.errors import UserError
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.lora import merge_adapters
from gpt_jax.model.parameters import hash_of_parameters, leaf_rows, leaf_spec, listing, nothing_fits, shape_of_spec
from gpt_jax.storage.checkpoint_files import (
    BASE,
    CHECKPOINTS,
    FORMAT_VERSION,
    LEFTOVER,
    NEW,
    POSITION,
    STATE,
    STEP,
    DamagedCheckpoint,
    best_step,
    delete,
    read_losses,
    read_record,
    remove,
    step_directories,
    steps_to_keep,
    write_record,
)
from gpt_jax.storage.checksum import crc32_of_file
from gpt_jax.storage.files import StorageError, explain, is_absent, os_error_of, sync_folder, unreadable
from gpt_jax.storage.json_file import VERSION

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

ADAPTS = "adapts"  # in the position of a checkpoint of adapters: base, the SHA-256 of that; scale, of the adapters


def _is_not_orbax_chatter(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    return record.levelno >= logging.WARNING and record.exc_info is None


# Orbax writes dozens of INFO lines a save to absl's logger, and tracebacks of the threads of a save that failed, whose
# exception is raised as well; what others write there is left alone.
logging.getLogger("absl").addFilter(_is_not_orbax_chatter)


def _print_unless_late(ignored: "sys.UnraisableHookArgs") -> None:
    # When one file of a save fails, orbax raises that and ends its event loop; tensorstore's threads then have a
    # traceback printed for each other file that they come to tell the loop of.
    if ignored.exc_type is not RuntimeError or str(ignored.exc_value) != "Event loop is closed":
        _print_unraisable(ignored)


_print_unraisable, sys.unraisablehook = sys.unraisablehook, _print_unless_late


def _of_this_process() -> "ocp.Checkpointer":
    """Orbax without the other processes of JAX, which it would wait for: a run's checkpoints are process 0's alone.

    Imported when a checkpoint is written, beside the steps: no start waits for it.
    """
    import orbax.checkpoint as ocp

    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


class Restored(NamedTuple):
    """The checkpoint that `Checkpointer.restore_latest` found."""

    state: Any  # pytree like the abstract state, of jax arrays
    position: dict
    step: int


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Use it as a context manager, so that the last save completes. Only one process may have a directory open:
    what an interrupted run left half written there is removed, with a warning. Kept are the last `keep_last`
    checkpoints, those whose step is a multiple of `keep_every`, and the one with the lowest validation loss
    (the earliest of equals).

    Args:
      directory: where the steps stand; made if missing.
      keep_last: at least 1.
      keep_every: in steps; None or 0: none are kept for their step number.
      asynchronous: False makes `save` return only after the commit.

    Raises:
      UserError: keep_last below 1, or the directory cannot be made.
      StorageError: a checkpoint in it cannot be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int,
        keep_every: int | None,
        asynchronous: bool = True,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last must be at least 1, found {keep_last}")
        self._directory = Path(directory).resolve()  # orbax asks for absolute paths
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self._directory}: {error.strerror}") from error
        self._opened = os.stat(self._directory)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous = asynchronous
        # Validation losses of the steps not known to be damaged. The writer thread replaces the dict and
        # never changes it in place, so that it can be read meanwhile.
        self._losses = read_losses(self._directory)  # first: where one cannot be read, nothing is removed
        for path in sorted(self._directory.iterdir()):
            if LEFTOVER.fullmatch(path.name):
                logger.warning("removed %s: an interrupted run left it unfinished", path)
                delete(path)
            elif not STEP.fullmatch(path.name) and not path.name.startswith("."):
                logger.warning("ignored %s: its name is not a step number", path)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, position: dict, validation_loss: float | None = None) -> None:
        """Saves one checkpoint in the background, after waiting for the save before it.

        A step that is saved already stays as it is, unless it is damaged or a new `validation_loss` is given:
        then it is replaced.

        Args:
          step: the number of completed steps.
          state: pytree of arrays of any dtype. Copied before this returns: its buffers may then be donated.
          position: what JSON can hold; comes back equal from `restore_latest`.
          validation_loss: lower is better; None or not finite: never the best.

        Raises:
          StorageError: this save or, if asynchronous, the one before it could not be written.
          TypeError: `position` holds something that JSON cannot.
        """
        self.wait()
        step = int(step)
        position = json.loads(json.dumps(position))
        if validation_loss is not None:
            validation_loss = float(validation_loss) if math.isfinite(validation_loss) else None
        if step in self._losses and validation_loss in (None, self._losses[step]):
            return
        # np.array copies: on the CPU backend a plain view would share the buffer that the caller may donate.
        leaves = {name: np.array(leaf) for name, leaf in named_leaves(state).items()}
        self._submit(self._commit, step, leaves, position, validation_loss)

    def mark(self, step: int, validation_loss: float) -> None:
        """Adds its validation loss to a step that was saved before the loss was known, in the background.

        Does nothing for a step without a good checkpoint, or for a loss that is not finite.

        Raises:
          StorageError: if not asynchronous, it could not be written.
        """
        if math.isfinite(validation_loss):
            self._submit(self._mark, int(step), float(validation_loss))

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._writer.submit(task, *arguments))
        if not self._asynchronous:
            self.wait()

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restores the newest good checkpoint; newer ones that are damaged are skipped, with a warning each.

        Args:
          abstract_state: pytree of arrays or `jax.ShapeDtypeStruct`. A restored array has the sharding of its
            leaf; if that has none, it is on the default device.

        Returns:
          None if nothing was ever saved.

        Raises:
          UserError: every checkpoint is damaged, or the newest good one differs from `abstract_state` in its
            leaves, their shapes or their dtypes.
          StorageError: the newest that may be good cannot be read.
        """
        self.wait()
        steps = step_directories(self._directory)
        for step in sorted(steps, reverse=True):
            try:
                record = read_record(steps[step])
                _check_fits(steps[step], record, abstract_state)
                leaves = _read_leaves(steps[step], record)
            except DamagedCheckpoint as error:
                logger.warning("skipped the checkpoint %s: %s", steps[step], error)
                self._losses = {good: loss for good, loss in self._losses.items() if good != step}
                continue
            placed = [
                jax.device_put(leaves[name], getattr(leaf, "sharding", None))
                for name, leaf in named_leaves(abstract_state).items()
            ]
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), placed)
            return Restored(state, record["position"], step)
        if steps:
            raise UserError(
                f"every checkpoint in {self._directory} is damaged (steps {listing(sorted(steps))}); "
                "put back a good copy of one, or start afresh with another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """The committed good steps, in order."""
        return sorted(self._losses)

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self._directory.parent

    @property
    def newest(self) -> int | None:
        """The newest committed good step."""
        return max(self._losses, default=None)

    def best_step(self) -> int | None:
        """The committed good step with the lowest validation loss; None if none has one."""
        return best_step(self._losses)

    def would_be_best(self, validation_loss: float) -> bool:
        """Whether a checkpoint of this loss would be the best one."""
        self.wait()  # for the loss that the newest is being marked with
        best = self.best_step()
        return math.isfinite(validation_loss) and (best is None or validation_loss < self._losses[best])

    def wait(self) -> None:
        """Waits until what is pending is committed; raises its error."""
        wait_for(self._pending)  # a KeyboardInterrupt here leaves it pending, for the next call
        self.check()

    def settle(self, seconds: float) -> None:
        """Waits so long at most for what is pending; raises nothing."""
        wait_for(self._pending, timeout=seconds)

    def check(self) -> None:
        """Raises the error of a save that failed in the meantime, without waiting."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def close(self) -> None:
        """Waits, then ends the writer thread. May be called again."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _commit(self, step: int, leaves: dict[str, np.ndarray], position: dict, validation_loss: float | None) -> None:
        """Commits a checkpoint, then removes those that are not kept. Runs in the writer thread."""
        from orbax.checkpoint.args import PyTreeSave

        path = self._directory / str(step)
        new = path.with_name(path.name + NEW)
        with self._writing(path):
            if new.exists():  # what a save that failed left
                delete(new)
            new.mkdir()  # not its parents: a folder that was removed is not made again
            tree = unflatten_dict(leaves, sep="/")
            with _of_this_process() as writer:
                writer.save(new / STATE, args=PyTreeSave(tree))
            if not self._is_in_place():  # orbax makes the parents of what it writes
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._directory))
            files = sorted(file for file in new.rglob("*") if file.is_file())
            record = {
                VERSION: FORMAT_VERSION,
                "position": position,
                "validation_loss": validation_loss,
                "leaves": {name: leaf_spec(leaf) for name, leaf in leaves.items()},
                "files": {str(file.relative_to(new)): crc32_of_file(file) for file in files},
            }
            write_record(new, record)
            if path.exists():
                remove(path)
            new.rename(path)
            sync_folder(self._directory)
            self._keep({**self._losses, step: validation_loss})

    def _mark(self, step: int, validation_loss: float) -> None:
        """Rewrites the JSON of a checkpoint in one go. Runs in the writer thread."""
        path = self._directory / str(step)
        if self._losses.get(step, validation_loss) == validation_loss:  # no good checkpoint, or marked already
            return
        with self._writing(path):
            try:
                record = read_record(path)
            except DamagedCheckpoint:
                return  # told by whoever goes on to restore it
            write_record(path, record | {"validation_loss": validation_loss})
            self._keep({**self._losses, step: validation_loss})

    def _is_in_place(self) -> bool:
        """Whether the directory is the one that was opened, and not one made in its place."""
        try:
            return os.path.samestat(os.stat(self._directory), self._opened)
        except FileNotFoundError:
            return False

    def _keep(self, losses: dict[int, float | None]) -> None:
        """Removes the steps that are not kept."""
        kept = steps_to_keep(losses, self._keep_last, self._keep_every)
        for step, directory in step_directories(self._directory).items():
            if step not in kept:  # too old, or damaged
                remove(directory)
        self._losses = {step: losses[step] for step in kept}

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns what a failing disk raises into a StorageError, and leaves no half of a checkpoint on it."""
        try:
            yield
        except (OSError, ValueError) as error:
            new = path.with_name(path.name + NEW)
            cause = error if isinstance(error, OSError) else os_error_of(error)
            if cause is None and not (new.exists() and self._is_in_place()):  # orbax may miss parameters then, say
                cause = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(new))
            with contextlib.suppress(OSError):
                delete(new)
            if not self._is_in_place():
                self._remove_what_was_made_again(new)
            if cause is None:
                raise
            raise StorageError(f"could not write the checkpoint {path}: {explain(cause)}") from error

    def _remove_what_was_made_again(self, new: Path) -> None:
        """Removes the folders that orbax made where ours had been; its writes that are still under way make more."""
        for _ in range(10):
            with contextlib.suppress(OSError):
                delete(new)
            with contextlib.suppress(OSError):
                self._directory.rmdir()
            with contextlib.suppress(OSError):
                self._directory.parent.rmdir()
            time.sleep(0.05)


def restore_parameters(path: str | os.PathLike) -> tuple[dict, str]:
    """Reads the parameters of a checkpoint of any architecture.

    Args:
      path: the directory of one checkpoint; or a run's directory or its `checkpoints` directory, which stand
        for the checkpoint with the best validation loss, or the latest if that is damaged or there is none.

    Returns:
      The parameters, a nested dict of numpy arrays, and one line that says which checkpoint they are from. Adapters
      are merged into what they stand beside.

    Raises:
      UserError: `path` is none of these, or holds no good checkpoint.
      StorageError: a checkpoint cannot be read.
    """
    return _read_first_good(path, _read_merged)


def restore_adapters(path: str | os.PathLike) -> tuple[tuple[dict, float], str]:
    """Reads the adapters of a checkpoint, and the factor of their output: as `restore_parameters`, without the rest.

    Raises:
      UserError: as there, or the checkpoint has no adapters.
      StorageError: a checkpoint cannot be read.
    """

    def read(step: Path) -> tuple[dict, float]:
        adapts = read_record(step)["position"].get(ADAPTS)
        if adapts is None:
            raise UserError(f"the checkpoint {step} has no adapters: give one of a run with config.lora.rank above 0")
        return _read_parameters(step), adapts["scale"]

    return _read_first_good(path, read)


def save_base(run: Path, params: dict) -> str:
    """Saves the parameters that a run's adapters stand beside; returns their SHA-256, by which checkpoints know them.

    Raises:
      UserError, StorageError: they cannot be saved.
    """
    found = hash_of_parameters(params)
    if (run / BASE).exists():  # of a start that ended before the first checkpoint, maybe from another donor
        delete(run / BASE)
    with Checkpointer(run / BASE, keep_last=1, keep_every=None, asynchronous=False) as base:
        base.save(0, {"params": params}, {BASE: found})
    return found


def read_base(run: Path, wanted: str) -> dict:
    """Reads what `save_base` saved.

    Args:
      wanted: its SHA-256.

    Raises:
      UserError: it is missing, damaged or another one.
      StorageError: it cannot be read.
    """
    return _of_base(run, wanted, _read_parameters)


def _of_base(run: Path, wanted: str, read: Callable[[Path], Any]) -> Any:
    path = run.resolve() / BASE / "0"
    try:
        found = read_record(path)["position"].get(BASE)
        if found != wanted:
            raise DamagedCheckpoint(f"it is another one: its SHA-256 is {found}, not {wanted}")
        return read(path)
    except DamagedCheckpoint as error:
        raise UserError(
            f"{path}, the parameters that the adapters of {run} were trained beside: {error}; put them back, with "
            "which the run is whole again"
        ) from error


def check_newest(directory: Path, abstract_state: Any) -> dict | None:
    """The position in the newest good checkpoint of a directory, known from its JSON alone; None if there is none.

    Raises:
      UserError: the newest good one does not fit `abstract_state`, or a newer program wrote it.
    """
    steps = step_directories(directory) if directory.is_dir() else {}
    for step in sorted(steps, reverse=True):
        try:
            record = read_record(steps[step])
        except DamagedCheckpoint:
            continue  # told by whoever goes on to restore it
        _check_fits(steps[step], record, abstract_state)
        return record["position"]
    return None


def check_donor(path: str | os.PathLike, fresh: Any) -> None:
    """Raises UserError if `merge_parameters` would take nothing from the checkpoint that `path` stands for.

    Args:
      path: as for `restore_parameters`; only the JSON of its checkpoint is read.
      fresh: pytree of arrays or `jax.ShapeDtypeStruct`, the model's parameters.
    """

    def read_shapes(step: Path) -> dict[str, str]:
        record = read_record(step)
        if adapts := record["position"].get(ADAPTS):
            record = _of_base(_run_of_step(step), adapts[BASE], read_record)
        leaves = record["leaves"]
        return {name.removeprefix("params/"): spec for name, spec in leaves.items() if name.startswith("params/")}

    saved, _ = _read_first_good(path, read_shapes)
    model = {name: leaf_spec(leaf) for name, leaf in named_leaves(fresh).items()}
    if not any(shape_of_spec(saved[name]) == shape_of_spec(model[name]) for name in model if name in saved):
        raise UserError(
            nothing_fits((f"{name}: {spec}" for name, spec in saved.items()), leaf_rows(named_leaves(fresh)))
        )


def _read_first_good(path: str | os.PathLike, read: Callable[[Path], Any]) -> tuple[Any, str]:
    """Reads the checkpoint that `path` stands for by `read`, and says which that is; see `restore_parameters`."""
    path = Path(path).resolve()
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give that of a run or of a checkpoint")
    if (path / STATE).exists() or (path / POSITION).exists():
        try:
            return read(path), f"the checkpoint {path}"
        except DamagedCheckpoint as error:
            raise UserError(f"the checkpoint {path} is damaged: {error}; take another one") from error

    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = step_directories(directory)
    if not steps:
        found = listing(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise UserError(f"{path} is neither a run nor a checkpoint: no step directory, found {found}")
    losses = read_losses(directory)
    best = best_step(losses)
    latest_first = sorted(steps, reverse=True)
    for step in latest_first if best is None else [best, *(step for step in latest_first if step != best)]:
        try:
            found_there = read(steps[step])
        except DamagedCheckpoint as error:
            logger.warning("skipped the checkpoint %s: %s", steps[step], error)
            continue
        why = f"best validation loss {losses[step]:.4f}" if step == best else "the latest good one"
        return found_there, f"the checkpoint {steps[step]} ({why})"
    raise UserError(f"every checkpoint in {directory} is damaged (steps {listing(sorted(steps))})")


def _read_leaves(path: Path, record: dict) -> dict[str, np.ndarray]:
    for name, crc in record["files"].items():
        try:
            good = crc32_of_file(path / name) == crc
        except OSError as error:
            if not is_absent(error):
                raise unreadable(path / name, error) from error
            raise DamagedCheckpoint(f"its {name} cannot be read ({error.strerror})") from error
        if not good:
            raise DamagedCheckpoint(f"its {name} fails its checksum")
    # In a thread of its own: orbax runs an event loop, and a notebook's thread is inside one already.
    with (
        _of_this_process() as reader,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        try:
            return flatten_dict(thread.submit(reader.restore, path / STATE).result(), sep="/")
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else os_error_of(error)
            if cause is None:
                raise
            raise unreadable(path / STATE, cause) from error


def _run_of_step(path: Path) -> Path:
    return path.parent.parent


def _read_merged(path: Path) -> dict:
    params = _read_parameters(path)
    adapts = read_record(path)["position"].get(ADAPTS)
    if adapts is None:
        return params
    base = read_base(_run_of_step(path), adapts[BASE])
    together = flatten_dict(base, sep="/") | flatten_dict(params, sep="/")
    return merge_adapters(unflatten_dict(together, sep="/"), adapts["scale"])


def _read_parameters(path: Path) -> dict:
    leaves = _read_leaves(path, read_record(path))
    prefix = "params/"
    parameters = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    if not parameters:
        raise UserError(f"the checkpoint {path} has no params: found {listing(leaves)}")
    return unflatten_dict(parameters, sep="/")


def _check_fits(path: Path, record: dict, abstract_state: Any) -> None:
    saved = record["leaves"]
    wanted = {name: leaf_spec(leaf) for name, leaf in named_leaves(abstract_state).items()}
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"the checkpoint {path} does not fit this config: {name} is {saved.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here; use the run's own config, or start afresh with "
                "another --workdir"
            )
