"""Checkpoints: round trips, what is kept, and parameters for finetuning."""

import asyncio
import logging
import shutil
import threading
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import State, abstract, assert_identical, flip, largest, make_state, open_

from gpt_jax import checkpoint
from gpt_jax.checkpoint import restore_parameters
from gpt_jax.errors import UserError
from gpt_jax.model.parameters import merge_parameters
from gpt_jax.storage.files import StorageError

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
        with pytest.raises(StorageError, match=r"checkpoints/1: No such file or directory; check the path"):
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


def test_a_folder_that_goes_is_named_whatever_orbax_says(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def missed(self: ocp.Checkpointer, path: Path, **options: Any) -> None:
        run.rename(tmp_path / "moved")
        path.mkdir(parents=True)  # as orbax does
        raise ValueError("Save failed: 1/1 params are missing .zarray in checkpoint: w. Tensorstore KvStore: ...")

    monkeypatch.setattr(ocp.Checkpointer, "save", missed)
    with open_(run / "checkpoints") as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(3)}, {})
        with pytest.raises(StorageError, match=r"checkpoints/1: No such file or directory; check the path"):
            checkpointer.wait()
    assert not run.exists()


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
