"""Checkpoints: round trips, what is kept, damage of every kind, kill -9, and parameters for finetuning."""

import asyncio
import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait as wait_for
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absl.logging
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from gpt_jax import checkpoint
from gpt_jax.checkpoint import Checkpointer, restore_parameters
from gpt_jax.config import UserError
from gpt_jax.model.parameters import merge_parameters
from gpt_jax.storage.files import StorageError

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50), mask={"w": True, "half": True, "bits": False}),
)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any


def make_state(seed: int, width: int = 64) -> State:
    """A state whose every leaf depends on the seed; odd shapes, a scalar, bf16 and uint32 among them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (37, width)),
        "half": jax.random.normal(keys[1], (5, 3), jnp.bfloat16),
        "bits": jax.random.bits(keys[2], (7,)),
    }
    opt_state = jax.tree.map(lambda leaf: jnp.full_like(leaf, seed + leaf.size), OPTIMIZER.init(params))
    return State(jnp.asarray(seed, jnp.int32), params, opt_state)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_(directory: Path, keep_last: int = 3, keep_every: int | None = None, **options) -> Checkpointer:
    return Checkpointer(directory, keep_last=keep_last, keep_every=keep_every, **options)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with the checkpoints 100 and 200: states of seed 100 and 200."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with open_(directory) as checkpointer:
        for step in (100, 200):
            checkpointer.save(step, make_state(step), {"next_batch": step})
    return directory


@pytest.fixture
def copy(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run" / "checkpoints"))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory: Path) -> Path:
    return max(files(directory), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# Round trips


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_and_position_come_back_bit_for_bit(tmp_path, asynchronous):
    state = make_state(7)
    position = {
        "next_batch": 2**40,
        "elapsed_seconds": 0.1 + 0.2,
        "tokens_seen": 0,
        "data": {"fingerprint": "é1f", "files": ["a", None, True]},
    }
    with open_(tmp_path, asynchronous=asynchronous) as checkpointer:
        assert checkpointer.restore_latest(abstract(state)) is None
        checkpointer.save(7, state, position, 2.5)
    with open_(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(abstract(state))
        assert checkpointer.steps() == [7]
        assert checkpointer.best_step() == 7
    assert_identical(restored.state, state)
    assert isinstance(restored.state, State)
    assert restored.position == position
    assert restored.step == 7
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.state))


def test_training_goes_on_from_a_restored_optimizer_as_if_never_stopped(tmp_path):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 20))
    )

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # optax relies on it
    def step(state: State) -> State:
        gradients = jax.grad(lambda params: jnp.sum(jnp.sin(params["w"]) ** 2))(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    params = {"w": jnp.linspace(-1.0, 1.0, 33)}
    state = State(jnp.int32(0), params, optimizer.init(params))
    for _ in range(4):
        state = step(state)
    with open_(tmp_path) as checkpointer:
        checkpointer.save(4, state, {})
        resumed = checkpointer.restore_latest(abstract(state)).state
    assert isinstance(resumed.opt_state[1][0], optax.ScaleByAdamState)
    assert int(resumed.opt_state[1][0].count) == 4
    for _ in range(4):
        state, resumed = step(state), step(resumed)
    assert_identical(resumed, state)


def test_the_bytes_saved_are_those_at_the_call(tmp_path):
    """The writer is held back until the caller has donated and overwritten all that it passed."""
    overwritten = threading.Event()
    state = {"donated": jnp.arange(100_000.0), "numpy": np.arange(1000, dtype=np.float32)}
    expected = jax.tree.map(np.array, state)
    position = {"next_batch": [1]}
    with open_(tmp_path) as checkpointer:
        checkpointer._writer.submit(overwritten.wait)
        buffer = state["donated"].unsafe_buffer_pointer()
        checkpointer.save(1, state, position)
        overwriting = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["donated"])
        assert overwriting.unsafe_buffer_pointer() == buffer
        state["numpy"][:] = -1
        position["next_batch"][0] = -1
        assert checkpointer.steps() == []
        overwritten.set()
        restored = checkpointer.restore_latest(abstract(expected))
    assert_identical(jax.tree.map(np.asarray, restored.state), expected)
    assert restored.position == {"next_batch": [1]}


def test_restored_arrays_have_the_sharding_asked_for(copy):
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    target = abstract(make_state(0))
    target.params["w"] = jax.ShapeDtypeStruct((37, 64), jnp.float32, sharding=sharding)
    with open_(copy) as checkpointer:
        state = checkpointer.restore_latest(target).state
    assert state.params["w"].sharding == sharding
    assert state.params["half"].devices() == {jax.devices()[0]}


def test_where_an_event_loop_runs_as_in_a_notebook(tmp_path):
    async def cell():
        with open_(tmp_path) as checkpointer:
            checkpointer.save(1, {"params": {"w": jnp.ones(3)}}, {})
            checkpointer.restore_latest({"params": {"w": jnp.zeros(3)}})
        return restore_parameters(tmp_path)[0]

    assert asyncio.run(cell())["w"].tolist() == [1, 1, 1]


def test_position_must_be_json(tmp_path):
    with open_(tmp_path) as checkpointer, pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, {"w": jnp.zeros(3)}, {"rng": np.zeros(2)})


# What is kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "losses", "expected", "best"),
    [
        (1, None, {}, [20], None),
        (3, None, {}, [18, 19, 20], None),
        (2, 6, {}, [6, 12, 18, 19, 20], None),
        (2, 0, {5: 3.0, 9: 1.0, 15: 2.0}, [9, 19, 20], 9),
        (2, None, {5: 1.0, 9: 1.0, 15: float("nan"), 16: float("-inf")}, [5, 19, 20], 5),
    ],
)
def test_kept_over_20_saves(tmp_path, keep_last, keep_every, losses, expected, best):
    with open_(tmp_path, keep_last, keep_every) as checkpointer:
        for step in range(1, 21):
            checkpointer.save(step, {"w": jnp.full(3, step)}, {}, losses.get(step))
        checkpointer.wait()
        assert checkpointer.steps() == expected
        assert checkpointer.best_step() == best
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == expected
    with open_(tmp_path, keep_last, keep_every) as checkpointer:  # the same is read back from disk
        assert checkpointer.steps() == expected
        assert checkpointer.best_step() == best


def test_the_same_step_twice(tmp_path):
    target = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with open_(tmp_path) as checkpointer:
        checkpointer.save(5, {"w": jnp.zeros(3)}, {"next_batch": 5})
        checkpointer.save(5, {"w": jnp.ones(3)}, {"next_batch": 5})  # left as it is
        assert checkpointer.restore_latest(target).state["w"][0] == 0
        checkpointer.save(5, {"w": jnp.ones(3)}, {"next_batch": 5}, 1.5)  # replaced
        assert checkpointer.restore_latest(target).state["w"][0] == 1
        assert checkpointer.best_step() == 5
    with open_(tmp_path) as checkpointer:
        checkpointer.save(5, {"w": jnp.zeros(3)}, {"next_batch": 5})
        assert checkpointer.restore_latest(target).state["w"][0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_an_error_of_the_writer_is_raised_by_the_next_call(tmp_path):
    directory = tmp_path / "checkpoints"
    with open_(directory) as checkpointer:
        directory.rmdir()
        directory.write_text("in the way")
        checkpointer.save(1, {"w": jnp.zeros(3)}, {})
        with pytest.raises(UserError, match=r"could not write the checkpoint .*checkpoints/1: "):
            checkpointer.wait()
    with pytest.raises(UserError, match=r"cannot keep checkpoints in .*checkpoints: File exists"):
        open_(directory)


def test_an_error_of_the_writer_is_known_without_waiting(tmp_path):
    directory = tmp_path / "checkpoints"
    with open_(directory) as checkpointer:
        directory.rmdir()
        checkpointer.save(1, {"w": jnp.zeros(3)}, {})
        wait_for(checkpointer._pending)
        with pytest.raises(StorageError, match=r"checkpoints/1: No such file or directory; the folder was removed"):
            checkpointer.check()
        checkpointer.check()  # it is said once
    assert not directory.exists()


def test_a_folder_that_goes_in_the_middle_of_a_save_is_not_made_again(tmp_path, monkeypatch):
    save, run = ocp.Checkpointer.save, tmp_path / "run"

    def moved_meanwhile(self: ocp.Checkpointer, path: Path, **options: Any) -> None:
        run.rename(tmp_path / "moved")
        save(self, path, **options)

    monkeypatch.setattr(ocp.Checkpointer, "save", moved_meanwhile)
    with open_(run / "checkpoints") as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(3)}, {})
        with pytest.raises(StorageError, match=r"checkpoints/1: No such file or directory"):
            checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_loss_that_comes_after_the_save_is_marked(tmp_path):
    target = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with open_(tmp_path, keep_last=1) as checkpointer:
        for step, loss in ((1, 3.0), (2, 4.0), (3, 2.0), (4, float("nan"))):
            checkpointer.save(step, {"w": jnp.full(3, float(step))}, {"next_batch": step})
            checkpointer.mark(step, loss)
            checkpointer.wait()
        assert checkpointer.steps() == [3, 4]  # 1 was the best, until 3 was marked
        assert checkpointer.best_step() == 3
        assert checkpointer.newest == 4
        checkpointer.mark(77, 1.0)  # there is none
    with open_(tmp_path, keep_last=1) as checkpointer:
        assert checkpointer.best_step() == 3
        assert checkpointer.restore_latest(target).position == {"next_batch": 4}


def test_a_late_word_to_a_closed_event_loop_is_not_printed(monkeypatch):
    """tensorstore's threads have it printed, after a save of several files in which one failed."""
    printed = []
    monkeypatch.setattr(checkpoint, "_print_unraisable", printed.append)
    errors = [RuntimeError("Event loop is closed"), RuntimeError("something else"), OSError("Event loop is closed")]
    for error in errors:
        checkpoint._print_unless_late(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [ignored.exc_value for ignored in printed] == errors[1:]


TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "x" in OCDBT database: Failed to write 9 bytes to file 32: No space left on '
    "device [os_error_code='28']",
    'RESOURCE_EXHAUSTED: Error writing "x": [OS error 28: ENOSPC No space left on device]',
)


@pytest.mark.parametrize("message", TENSORSTORE)
def test_what_tensorstore_says_of_a_full_disk_is_a_line_and_leaves_room(tmp_path, monkeypatch, message):
    def full(self: object, path: Path, **_: object) -> None:
        path.mkdir(parents=True)
        (path / "half").write_bytes(bytes(1000))
        raise ValueError(message)

    with open_(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(3)}, {})
        checkpointer.wait()
        monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
        checkpointer.save(2, {"w": jnp.zeros(3)}, {})
        with pytest.raises(StorageError, match=r"^could not write the checkpoint .*/2: No space left on device; free"):
            checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_keep_last_below_one(tmp_path):
    with pytest.raises(UserError, match="keep_last must be at least 1, found 0"):
        open_(tmp_path, keep_last=0)


# Damage


def test_every_kind_of_damage_to_every_file_of_the_newest(copy, two_steps, caplog, capfd):
    target = abstract(make_state(0))
    damages = {
        "deleted": Path.unlink,
        "emptied": lambda path: path.write_bytes(b""),
        "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
        "flipped at the start": lambda path: flip(path, 0),
        "flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
        "flipped at the end": lambda path: flip(path, -1),
    }
    with open_(copy) as checkpointer:
        for path in files(copy / "200"):
            name = path.relative_to(copy / "200")
            for damage in damages.values():
                damage(path)
                caplog.clear()
                restored = checkpointer.restore_latest(target)
                assert restored.step == 100
                assert restored.position == {"next_batch": 100}
                assert_identical(restored.state, make_state(100))
                [warning] = [record.getMessage() for record in caplog.records]
                assert warning.startswith(f"skipped the checkpoint {copy / '200'}: it")
                assert str(name) in warning
                assert "\n" not in warning
                shutil.copy(two_steps / "200" / name, path)
        assert checkpointer.restore_latest(target).step == 200
    assert capfd.readouterr().err == ""  # nothing but the warnings


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("position", errno.EACCES),
        ("position", errno.EIO),
        ("position", errno.EMFILE),
        ("leaves", errno.ESTALE),
        ("orbax", errno.EMFILE),
    ],
)
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_damaged(copy, monkeypatch, what, code):
    (copy / "300.new").mkdir()
    before, target = files(copy), abstract(make_state(0))
    unread = {"position": copy / "200" / "position.json", "leaves": largest(copy / "200"), "orbax": copy / "200/state"}

    def failing(whole: Callable) -> Callable:
        def read(path: Path, *arguments: Any, **more: Any) -> Any:
            if path == unread[what]:
                raise OSError(code, os.strerror(code), str(path))
            return whole(path, *arguments, **more)

        return read

    def restore(*_: Any) -> None:
        raise ValueError(f"UNAVAILABLE: Error opening file [os_error_code='{code}']")

    def train() -> None:
        with open_(copy, keep_last=1) as checkpointer:
            checkpointer.restore_latest(target)
            checkpointer.save(150, make_state(150), {})

    if what == "orbax":
        monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", restore)
    for name in ("open", "read_bytes"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    for call in (train, lambda: restore_parameters(copy), lambda: restore_parameters(copy / "200")):
        with pytest.raises(StorageError) as caught:
            call()
        assert str(caught.value).startswith(f"{unread[what]} cannot be read: {os.strerror(code)}; mend that")
        assert "\n" not in str(caught.value)
    if what == "position":
        with pytest.raises(StorageError, match="cannot be read"):
            checkpoint.check_newest(copy, target)
        assert (copy / "300.new").exists()
    assert files(copy) == before
    monkeypatch.undo()
    assert restored_step(copy, target) == 200


def restored_step(directory: Path, target: Any) -> int:
    with open_(directory) as checkpointer:
        return checkpointer.restore_latest(target).step


def test_a_changed_position_is_noticed(copy):
    path = copy / "200" / "position.json"
    record = json.loads(path.read_text())
    record["position"]["next_batch"] = 201
    path.write_text(json.dumps(record))
    with open_(copy) as checkpointer:
        assert checkpointer.steps() == [100]
        assert checkpointer.restore_latest(abstract(make_state(0))).step == 100


def test_what_is_not_a_checkpoint_is_told_and_passed_over(copy, caplog):
    (copy / "300").mkdir()
    (copy / "400").write_text("a file named like a step")
    (copy / "notes.txt").write_text("mine")
    (copy / "500.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(copy / "200", copy / "200.new")
    (copy / "150.old").mkdir()
    with open_(copy) as checkpointer:
        assert checkpointer.steps() == [100, 200]
        assert checkpointer.restore_latest(abstract(make_state(0))).step == 200
    assert [record.getMessage() for record in caplog.records] == [
        f"removed {copy}/150.old: an interrupted run left it unfinished",
        f"removed {copy}/200.new: an interrupted run left it unfinished",
        f"removed {copy}/500.orbax-checkpoint-tmp: an interrupted run left it unfinished",
        f"ignored {copy}/notes.txt: its name is not a step number",
        f"skipped the checkpoint {copy}/400: it has no position.json",
        f"skipped the checkpoint {copy}/300: it has no position.json",
    ]
    assert (copy / "notes.txt").exists()


def test_a_damaged_newest_can_be_saved_again(copy, tmp_path):
    flip(largest(copy / "200"), 4000)
    target = abstract(make_state(0))
    with open_(copy) as checkpointer:
        assert checkpointer.restore_latest(target).step == 100
        assert checkpointer.steps() == [100]
        checkpointer.save(200, make_state(222), {"next_batch": 200})
        assert_identical(checkpointer.restore_latest(target).state, make_state(222))
    assert sorted(path.name for path in copy.iterdir()) == ["100", "200"]


def test_a_damaged_newest_goes_when_an_earlier_step_is_saved(copy):
    largest(copy / "200").unlink()
    with open_(copy, keep_last=1) as checkpointer:
        checkpointer.restore_latest(abstract(make_state(0)))
        checkpointer.save(150, make_state(150), {})
    assert [path.name for path in copy.iterdir()] == ["150"]


def test_all_damaged_is_an_error_and_not_a_fresh_start(copy):
    for step in ("100", "200"):
        largest(copy / step).unlink()
    with (
        open_(copy) as checkpointer,
        pytest.raises(UserError, match=r"every checkpoint in .* \(steps 100, 200\)"),
    ):
        checkpointer.restore_latest(abstract(make_state(0)))


def test_a_first_save_cut_short_is_a_fresh_start(tmp_path, caplog):
    (tmp_path / "100.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with open_(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state(0))) is None
    assert "removed" in caplog.text


def test_another_config_is_no_damage(copy, caplog):
    def message(state: State) -> str:
        with open_(copy) as checkpointer, pytest.raises(UserError) as error:
            checkpointer.restore_latest(abstract(state))
        return str(error.value)

    shape = message(make_state(0, width=32))
    assert f"{copy}/200 does not fit this config: params/w is float32 (37, 64) there and float32 (37, 32)" in shape
    assert "use the run's own config, or start afresh with another --workdir" in shape
    state = make_state(0)
    state.params["v"] = jnp.zeros(2)
    assert "params/v is absent there and float32 (2,) here" in message(state)
    state = make_state(0)
    del state.params["bits"]
    assert "params/bits is uint32 (7,) there and absent here" in message(state)
    state = make_state(0)
    state.params["half"] = jnp.zeros((5, 3))
    assert "params/half is bfloat16 (5, 3) there and float32 (5, 3) here" in message(state)
    assert caplog.records == []
    assert sorted(path.name for path in copy.iterdir()) == ["100", "200"]


LARGE = {"w": jax.ShapeDtypeStruct((300_000,), jnp.float32)}


def save_for_ever(directory: Path, progress: Connection) -> None:
    with open_(directory, keep_last=1) as checkpointer:
        restored = checkpointer.restore_latest(LARGE)
        for step in itertools.count(0 if restored is None else restored.step + 1):
            checkpointer.save(step, {"w": jnp.full(300_000, step, jnp.float32)}, {"next_batch": step})
            progress.send(step)


def test_kill_9_in_the_middle_of_a_save_leaves_a_restorable_directory(tmp_path):
    rng = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt_jax.checkpoint", "optax"])  # imported once, not in every child
    directory = tmp_path / "checkpoints"
    interrupted = 0
    for _ in range(6):
        progress, sender = context.Pipe(duplex=False)
        child = context.Process(target=save_for_ever, args=(directory, sender))
        child.start()
        begun = [progress.recv() for _ in range(2)][-1]  # so the one before is committed
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        while progress.poll():
            begun = progress.recv()
        interrupted += any(not path.name.isdigit() for path in directory.iterdir())
        with open_(directory, keep_last=1) as checkpointer:
            restored = checkpointer.restore_latest(LARGE)
        assert restored.step in (begun - 1, begun, begun + 1)
        assert restored.position == {"next_batch": restored.step}
        np.testing.assert_array_equal(restored.state["w"], restored.step)
    assert interrupted > 0  # else this test never cut a save short


# Parameters for finetuning


def test_parameters_of_a_run_its_checkpoints_or_one_step(copy, caplog):
    run = copy.parent
    for path in (run, copy, copy / "200"):
        params, description = restore_parameters(path)
        assert_identical(params, jax.tree.map(np.asarray, make_state(200).params))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
        assert str(copy / "200") in description
    assert restore_parameters(str(run))[1].endswith("(the latest good one)")
    with open_(copy) as checkpointer:
        checkpointer.save(150, make_state(150), {}, 1.25)
    params, description = restore_parameters(run)
    assert_identical(params, jax.tree.map(np.asarray, make_state(150).params))
    assert description == f"the checkpoint {copy / '150'} (best validation loss 1.2500)"
    flip(largest(copy / "150"), 4000)
    assert restore_parameters(run)[1] == f"the checkpoint {copy / '200'} (the latest good one)"
    assert f"skipped the checkpoint {copy / '150'}" in caplog.text


def test_parameters_from_what_is_no_checkpoint(copy, tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            restore_parameters(path)
        return str(error.value)

    assert message(tmp_path / "absent").endswith("absent is not a directory; give that of a run or of a checkpoint")
    other = tmp_path / "other"
    other.mkdir()
    assert message(other).endswith("is neither a run nor a checkpoint: no step directory, found nothing")
    for name in "abcdefg":
        (other / name).touch()
    assert message(other).endswith("found a, b, c, d, e and 2 more")
    (copy / "200" / "position.json").unlink()
    assert message(copy / "200").endswith("is damaged: it has no position.json; take another one")
    shutil.rmtree(copy / "100" / "state")
    assert message(copy.parent).endswith("is damaged (steps 100, 200)")
    with open_(other) as checkpointer:
        checkpointer.save(1, {"weights": jnp.zeros(3)}, {})
    assert message(other / "1").endswith("has no params: found weights")


def test_a_checkpoint_gives_its_parameters_to_a_larger_model(copy):
    fresh = make_state(0, width=32).params
    merged, report = merge_parameters(fresh, restore_parameters(copy)[0])
    assert report.taken == ("bits", "half")
    assert list(report.mismatched) == ["w"]
    assert_identical(merged["half"], make_state(200).params["half"])
    assert_identical(merged["w"], fresh["w"])


# Noise


def test_orbax_is_quiet_and_others_are_heard(tmp_path, monkeypatch):
    logger = absl.logging.get_absl_logger()
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    logger.addHandler(handler)
    try:
        with open_(tmp_path) as checkpointer:
            checkpointer.save(1, {"w": jnp.zeros(3)}, {})
            checkpointer.restore_latest({"w": jnp.zeros(3)})
        absl.logging.info("mine")
    finally:
        logger.removeHandler(handler)
        absl.logging.set_verbosity(verbosity)
    assert [record.getMessage() for record in heard] == ["mine"]
