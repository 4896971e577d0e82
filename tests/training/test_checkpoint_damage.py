"""Checkpoints that are damaged, unreadable, cut short by kill -9, or of another config."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import State, abstract, assert_identical, files, flip, largest, make_state, open_, restored_step

from gpt_jax import checkpoint
from gpt_jax.checkpoint import restore_parameters
from gpt_jax.errors import UserError
from gpt_jax.storage.files import StorageError


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
    for _ in range(12):
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
        if interrupted == 3:
            break
    assert interrupted > 0  # else this test never cut a save short
