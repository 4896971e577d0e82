"""Checkpoints: one directory a step holds the train state and the position in the run, committed together.

Orbax's `Checkpointer` writes the arrays; what stands here is what a run needs around that. Not
`CheckpointManager`, which counts a damaged directory as a step and refuses to save over it, and not the v1 API,
which is experimental still and renamed its functions between 0.11 and 0.12; neither notices a flipped bit.

    DIRECTORY/STEP/state/         the leaves of the train state: a nested dict of arrays, for any orbax reader
    DIRECTORY/STEP/position.json  position, validation loss, CRC-32 of every file of `state` and of itself

All is written under DIRECTORY/STEP.new, and one rename commits it.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax.config import UserError
from gpt_jax.storage.files import StorageError, explain, is_absent, os_error_of, sync_folder, unreadable
from gpt_jax.storage.json_file import VERSION, DamagedError, check_version, read_object

CHECKPOINTS = "checkpoints"  # the folder of a run that holds its checkpoints

FORMAT_VERSION = 1  # of position.json; raise it when an older program would misread it

_STATE, _POSITION = "state", "position.json"
_STEP = re.compile(r"0|[1-9][0-9]*")
_NEW, _OLD = ".new", ".old"  # endings of a step being written, and of one being removed
_LEFTOVER = re.compile(r"[0-9]+(\.new|\.old|\.orbax-checkpoint-tmp.*)")

logger = logging.getLogger(__name__)


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


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found."""

    state: Any  # pytree like the abstract state, of jax arrays
    position: dict
    step: int


class _Damaged(Exception):
    """A checkpoint whose content is not what was saved; the message says why in one line.

    A disk that does not let it be read just now is another thing, a StorageError: the checkpoint may be whole, so no
    older one takes its place and nothing is removed.
    """


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
        self._losses = _read_losses(self._directory)  # first: where one cannot be read, nothing is removed
        for path in sorted(self._directory.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                logger.warning("removed %s: an interrupted run left it unfinished", path)
                _delete(path)
            elif not _STEP.fullmatch(path.name) and not path.name.startswith("."):
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
        leaves = {name: np.array(leaf) for name, leaf in _named_leaves(state).items()}
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
        steps = _step_directories(self._directory)
        for step in sorted(steps, reverse=True):
            try:
                record = _read_record(steps[step])
                _check_fits(steps[step], record, abstract_state)
                leaves = _read_leaves(steps[step], record)
            except _Damaged as error:
                logger.warning("skipped the checkpoint %s: %s", steps[step], error)
                self._losses = {good: loss for good, loss in self._losses.items() if good != step}
                continue
            placed = [
                jax.device_put(leaves[name], getattr(leaf, "sharding", None))
                for name, leaf in _named_leaves(abstract_state).items()
            ]
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), placed)
            return Restored(state, record["position"], step)
        if steps:
            raise UserError(
                f"every checkpoint in {self._directory} is damaged (steps {_listing(sorted(steps))}); "
                "put back a good copy of one, or start afresh with another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """The committed good steps, in order."""
        return sorted(self._losses)

    @property
    def newest(self) -> int | None:
        """The newest committed good step."""
        return max(self._losses, default=None)

    def best_step(self) -> int | None:
        """The committed good step with the lowest validation loss; None if none has one."""
        return _best(self._losses)

    def would_be_best(self, validation_loss: float) -> bool:
        """Whether a checkpoint of this loss would be the best one."""
        self.wait()  # for the loss that the newest is being marked with
        best = self.best_step()
        return math.isfinite(validation_loss) and (best is None or validation_loss < self._losses[best])

    def wait(self) -> None:
        """Waits until what is pending is committed; raises its error."""
        wait_for(self._pending)  # a KeyboardInterrupt here leaves it pending, for the next call
        self.check()

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
        path = self._directory / str(step)
        new = path.with_name(path.name + _NEW)
        with self._writing(path):
            if new.exists():  # what a save that failed left
                _delete(new)
            new.mkdir()  # not its parents: a folder that was removed is not made again
            tree = unflatten_dict(leaves, sep="/")
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(new / _STATE, args=ocp.args.PyTreeSave(tree))
            if not self._is_in_place():  # orbax makes the parents of what it writes
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._directory))
            files = sorted(file for file in new.rglob("*") if file.is_file())
            record = {
                VERSION: FORMAT_VERSION,
                "position": position,
                "validation_loss": validation_loss,
                "leaves": {name: _spec(leaf) for name, leaf in leaves.items()},
                "files": {str(file.relative_to(new)): _crc32_of_file(file) for file in files},
            }
            _write_record(new, record)
            if path.exists():
                _remove(path)
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
                record = _read_record(path)
            except _Damaged:
                return  # told by whoever goes on to restore it
            _write_record(path, record | {"validation_loss": validation_loss})
            self._keep({**self._losses, step: validation_loss})

    def _is_in_place(self) -> bool:
        """Whether the directory is the one that was opened, and not one made in its place."""
        return os.path.samestat(os.stat(self._directory), self._opened)

    def _keep(self, losses: dict[int, float | None]) -> None:
        """Removes the steps that are not kept."""
        kept = _kept(losses, self._keep_last, self._keep_every)
        for step, directory in _step_directories(self._directory).items():
            if step not in kept:  # too old, or damaged
                _remove(directory)
        self._losses = {step: losses[step] for step in kept}

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns what a failing disk raises into a StorageError, and leaves no half of a checkpoint on it."""
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else os_error_of(error)
            with contextlib.suppress(OSError):
                _delete(path.with_name(path.name + _NEW))
            with contextlib.suppress(OSError):
                if not self._is_in_place():
                    self._directory.rmdir()
                    self._directory.parent.rmdir()
            if cause is None:
                raise
            raise StorageError(f"could not write the checkpoint {path}: {explain(cause)}") from error


def saved_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in a directory, damaged ones too; none if there is no such directory."""
    return sorted(_step_directories(directory)) if directory.is_dir() else []


def restore_parameters(path: str | os.PathLike) -> tuple[dict, str]:
    """Reads the parameters of a checkpoint of any architecture.

    Args:
      path: the directory of one checkpoint; or a run's directory or its `checkpoints` directory, which stand
        for the checkpoint with the best validation loss, or the latest if that is damaged or there is none.

    Returns:
      The parameters, a nested dict of numpy arrays, and one line that says which checkpoint they are from.

    Raises:
      UserError: `path` is none of these, or holds no good checkpoint.
      StorageError: a checkpoint cannot be read.
    """
    return _read_first_good(path, _read_parameters)


def check_newest(directory: Path, abstract_state: Any) -> dict | None:
    """The position in the newest good checkpoint of a directory, known from its JSON alone; None if there is none.

    Raises:
      UserError: the newest good one does not fit `abstract_state`, or a newer program wrote it.
    """
    steps = _step_directories(directory) if directory.is_dir() else {}
    for step in sorted(steps, reverse=True):
        try:
            record = _read_record(steps[step])
        except _Damaged:
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
        leaves = _read_record(step)["leaves"]
        return {name.removeprefix("params/"): spec for name, spec in leaves.items() if name.startswith("params/")}

    saved, _ = _read_first_good(path, read_shapes)
    model = {name: _spec(leaf) for name, leaf in _named_leaves(fresh).items()}
    if not any(_shape(saved[name]) == _shape(model[name]) for name in model if name in saved):
        raise UserError(_nothing_fits((f"{name}: {spec}" for name, spec in saved.items()), _rows(_named_leaves(fresh))))


def _read_first_good(path: str | os.PathLike, read: Callable[[Path], Any]) -> tuple[Any, str]:
    """Reads the checkpoint that `path` stands for by `read`, and says which that is; see `restore_parameters`."""
    path = Path(path).resolve()
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give that of a run or of a checkpoint")
    if (path / _STATE).exists() or (path / _POSITION).exists():
        try:
            return read(path), f"the checkpoint {path}"
        except _Damaged as error:
            raise UserError(f"the checkpoint {path} is damaged: {error}; take another one") from error

    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = _step_directories(directory)
    if not steps:
        found = _listing(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise UserError(f"{path} is neither a run nor a checkpoint: no step directory, found {found}")
    losses = _read_losses(directory)
    best = _best(losses)
    latest_first = sorted(steps, reverse=True)
    for step in latest_first if best is None else [best, *(step for step in latest_first if step != best)]:
        try:
            found_there = read(steps[step])
        except _Damaged as error:
            logger.warning("skipped the checkpoint %s: %s", steps[step], error)
            continue
        why = f"best validation loss {losses[step]:.4f}" if step == best else "the latest good one"
        return found_there, f"the checkpoint {steps[step]} ({why})"
    raise UserError(f"every checkpoint in {directory} is damaged (steps {_listing(sorted(steps))})")


@dataclass(frozen=True)
class MergeReport:
    """What `merge_parameters` did, by path."""

    taken: tuple[str, ...]  # from the checkpoint
    dropped: Mapping[str, str]  # in the checkpoint only: dtype and shape
    mismatched: Mapping[str, tuple[str, str]]  # kept fresh: dtype and shape in checkpoint and model
    new: Mapping[str, str]  # in the model only, kept fresh: dtype and shape

    def __str__(self) -> str:
        lines = [
            f"parameters: {len(self.taken)} taken, {len(self.dropped)} dropped, "
            f"{len(self.mismatched)} mismatched and kept fresh, {len(self.new)} new"
        ]
        groups = {
            "dropped": [f"{name}: {spec}" for name, spec in self.dropped.items()],
            "mismatched": [
                f"{name}: {saved} in the checkpoint, {wanted} in the model"
                for name, (saved, wanted) in self.mismatched.items()
            ],
            "new": [f"{name}: {spec}" for name, spec in self.new.items()],
        }
        for group, rows in groups.items():
            lines += [f"  {group} {row}" for row in rows[:10]]
            if len(rows) > 10:
                lines.append(f"  {group} {len(rows) - 10} more")
        return "\n".join(lines)


def check_parameters(parameters: Any, wanted: Any, where: str) -> None:
    """Raises UserError, naming the first difference, for parameters of other names or shapes than `wanted` has."""
    found = {name: leaf.shape for name, leaf in _named_leaves(parameters).items()}
    expected = {name: leaf.shape for name, leaf in _named_leaves(wanted).items()}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{where}: the parameter {name} has the shape {found.get(name, '(it is absent)')}, and the config says "
                f"{expected.get(name, 'that there is none')}: put back the config of the run"
            )


def merge_parameters(fresh: Any, restored: Any) -> tuple[Any, MergeReport]:
    """Takes from `restored` every leaf that `fresh` has at the same path with the same shape.

    A leaf of another floating dtype is cast to that of `fresh`; any other difference of dtype is a mismatch.

    Args:
      fresh: pytree of arrays, the model's own parameters.
      restored: pytree of arrays, for example from `restore_parameters`.

    Returns:
      A tree like `fresh` of jax arrays, and what became of each leaf.

    Raises:
      UserError: nothing at all could be taken.
    """
    model, saved = _named_leaves(fresh), _named_leaves(restored)

    def fits(name: str) -> bool:
        a, b = model[name], saved[name]
        floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (a, b))
        return a.shape == b.shape and (a.dtype == b.dtype or floating)

    taken = tuple(name for name in model if name in saved and fits(name))
    report = MergeReport(
        taken=taken,
        dropped={name: _spec(leaf) for name, leaf in saved.items() if name not in model},
        mismatched={
            name: (_spec(saved[name]), _spec(model[name])) for name in model if name in saved and name not in taken
        },
        new={name: _spec(leaf) for name, leaf in model.items() if name not in saved},
    )
    if not taken:
        raise UserError(_nothing_fits(_rows(saved), _rows(model)))
    merged = [jnp.array(saved[name], leaf.dtype) if name in taken else leaf for name, leaf in model.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), merged), report


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path, such as 'params/h_0/qkv/kernel', in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}"


def _shape(spec: str) -> str:
    return spec.partition(" ")[2]


def _nothing_fits(saved: Iterable[str], model: Iterable[str]) -> str:
    return f"no parameter of the checkpoint fits the model: it has {_listing(saved)}, the model has {_listing(model)}"


def _crc32_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_of_json(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _rows(leaves: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {_spec(leaf)}" for name, leaf in leaves.items()]


def _listing(items: Iterable) -> str:
    """The first items, for a message of one line."""
    items = [str(item) for item in items]
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _step_directories(directory: Path) -> dict[int, Path]:
    return {int(path.name): path for path in directory.iterdir() if _STEP.fullmatch(path.name)}


def _best(losses: Mapping[int, float | None]) -> int | None:
    return min((s for s in losses if losses[s] is not None), key=lambda s: (losses[s], s), default=None)


def _kept(losses: Mapping[int, float | None], keep_last: int, keep_every: int | None) -> set[int]:
    steps = sorted(losses)
    best = _best(losses)
    return (
        set(steps[-keep_last:])
        | {step for step in steps if keep_every and step % keep_every == 0}
        | (set() if best is None else {best})
    )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove(path: Path) -> None:
    """Deletes what stands at a step's place; if that is cut short, no half of it stands there."""
    old = path.rename(path.with_name(path.name + _OLD))
    _delete(old)


def _read_record(path: Path) -> dict:
    """The JSON of a checkpoint: position, validation_loss, leaves {name: spec}, files {name: CRC-32}."""
    try:
        record = read_object(path / _POSITION, known=None)
    except DamagedError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise _Damaged(f"it has no {_POSITION}") from error
        raise _Damaged(f"its {str(error).removeprefix(f'{path}{os.sep}')}") from error
    if record.pop("crc32", None) != _crc32_of_json(record):  # first: a flipped bit must not pass for a newer version
        raise _Damaged(f"its {_POSITION} fails its checksum")
    check_version(path / _POSITION, record, FORMAT_VERSION)
    return record


def _write_record(path: Path, record: dict) -> None:
    """Writes what `_read_record` reads: whole, or the one before stays."""
    new = path / (_POSITION + _NEW)
    with new.open("w") as file:
        file.write(json.dumps(record | {"crc32": _crc32_of_json(record)}))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / _POSITION)
    sync_folder(path)


def _read_losses(directory: Path) -> dict[int, float | None]:
    """The validation losses of the steps whose JSON is good."""
    losses = {}
    for step, path in _step_directories(directory).items():
        try:
            losses[step] = _read_record(path)["validation_loss"]
        except _Damaged:
            continue  # told by whoever goes on to restore it
    return losses


def _read_leaves(path: Path, record: dict) -> dict[str, np.ndarray]:
    for name, crc in record["files"].items():
        try:
            good = _crc32_of_file(path / name) == crc
        except OSError as error:
            if not is_absent(error):
                raise unreadable(path / name, error) from error
            raise _Damaged(f"its {name} cannot be read ({error.strerror})") from error
        if not good:
            raise _Damaged(f"its {name} fails its checksum")
    # In a thread of its own: orbax runs an event loop, and a notebook's thread is inside one already.
    with (
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        try:
            return flatten_dict(thread.submit(reader.restore, path / _STATE).result(), sep="/")
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else os_error_of(error)
            if cause is None:
                raise
            raise unreadable(path / _STATE, cause) from error


def _read_parameters(path: Path) -> dict:
    leaves = _read_leaves(path, _read_record(path))
    prefix = "params/"
    parameters = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    if not parameters:
        raise UserError(f"the checkpoint {path} has no params: found {_listing(leaves)}")
    return unflatten_dict(parameters, sep="/")


def _check_fits(path: Path, record: dict, abstract_state: Any) -> None:
    saved = record["leaves"]
    wanted = {name: _spec(leaf) for name, leaf in _named_leaves(abstract_state).items()}
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"the checkpoint {path} does not fit this config: {name} is {saved.get(name, 'absent')} "
                f"there and {wanted.get(name, 'absent')} here; use the run's own config, or start afresh with "
                "another --workdir"
            )
