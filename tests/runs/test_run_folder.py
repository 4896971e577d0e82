"""A run's folder: what it may lose, and what it may not."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import steps_saved, tiny, written

from gpt_jax.data import token_cache
from gpt_jax.data.tokenizer import save, train_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runs.folder import open_folder
from gpt_jax.runs.load import load_run
from gpt_jax.runs.metrics import read_lines
from gpt_jax.runs.wall_time import running_seconds, wall_time
from gpt_jax.storage.files import StorageError
from gpt_jax.storage.lock import lock
from gpt_jax.training import trainer
from gpt_jax.training.history import why_complete
from gpt_jax.training.train import train_and_evaluate
from gpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory, traced_once) -> Path:
    traced_once.clear()  # its first step compiles
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train_and_evaluate(tiny(corpus), workdir) is None
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def content(workdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def status(workdir: Path) -> str:
    return json.loads((workdir / "run.json").read_text())["status"]


def lose_checkpoints(workdir: Path, how: str) -> None:
    checkpoints = workdir / "checkpoints"
    if how == "damaged":
        for file in checkpoints.rglob("position.json"):
            file.write_bytes(b"")
        return
    shutil.rmtree(checkpoints)
    if how == "emptied":
        checkpoints.mkdir()
    if how == "unmounted":
        checkpoints.symlink_to(workdir.parent / "disk" / "checkpoints")
    if how == "unmounted, mount point there":
        (workdir.parent / "disk").mkdir()
        checkpoints.symlink_to(workdir.parent / "disk")
    if how == "metrics too":
        (workdir / "metrics.jsonl").unlink()
    if how == "facts too":
        (workdir / "run.json").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("removed", "checkpoints is not there"),
        ("emptied", "holds no checkpoint"),
        ("unmounted", "is its disk mounted"),
        ("unmounted, mount point there", "holds no checkpoint"),
        ("metrics too", "checkpoints is not there"),
        ("facts too", "checkpoints is not there"),
        ("damaged", "every checkpoint in"),
    ],
)
def test_lost_checkpoints_are_no_fresh_start(copy, corpus, how, said):
    lose_checkpoints(copy, how)
    before = content(copy)
    with pytest.raises(UserError, match=said) as caught:
        train_and_evaluate(tiny(corpus), copy)
    assert "another --workdir" in str(caught.value)
    assert "\n" not in str(caught.value)
    after = content(copy)
    assert after.pop("log.txt").startswith(before.pop("log.txt"))
    assert after == before
    assert not (copy.parent / "disk" / "checkpoints").exists()


def test_before_the_first_checkpoint_there_is_nothing_to_lose(copy, finished, corpus):
    lose_checkpoints(copy, "emptied")
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"last_checkpoint": None, "status": "running"}))
    assert train_and_evaluate(tiny(corpus), copy) is None
    assert "starts again from step 0" in (copy / "log.txt").read_text()
    assert written(copy) == written(finished)
    begun, ended = load_run(copy).events
    assert (begun["text"], begun["lost_steps"], ended["text"]) == ("started", 12, "completed")
    assert dict(wall_time(load_run(copy)))["lost to restarts"] == begun["lost_seconds"] > 0


@pytest.mark.parametrize(("every", "first"), [((4, 0), 4), ((20, 5), 5), ((0, 0), 12)])
def test_a_run_of_an_older_version_that_never_had_a_checkpoint_is_told_so(copy, corpus, every, first):
    """Its run.json does not say whether there ever was one: the steps that it made do."""
    lose_checkpoints(copy, "emptied")
    info = json.loads((copy / "run.json").read_text())
    del info["last_checkpoint"]
    (copy / "run.json").write_text(json.dumps(info | {"status": "running"}))
    saved = json.loads((copy / "config.json").read_text())
    saved["checkpoint"]["every"], saved["eval"]["every"] = every
    (copy / "config.json").write_text(json.dumps(saved))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (copy / "metrics.jsonl").write_text("".join(kept))
    before = content(copy)
    with pytest.raises(UserError) as caught:
        train_and_evaluate(tiny(corpus), copy)
    assert str(caught.value) == (
        f"the run in {copy} stopped at step 3, before its first checkpoint, which was due at step {first}: there is "
        "nothing to go on from, so start anew in another --workdir; nothing was changed"
    )
    assert {**content(copy), "log.txt": b""} == {**before, "log.txt": b""}
    (copy / "metrics.jsonl").write_text("".join(lines))  # to step 12
    with pytest.raises(UserError, match="holds no checkpoint: put it back to go on"):
        train_and_evaluate(tiny(corpus), copy)


def test_a_checkpoint_newer_than_the_metrics_is_told(copy, corpus):
    (copy / "metrics.jsonl").unlink()
    assert train_and_evaluate(tiny(corpus, num_steps=13), copy) is None
    assert "metrics.jsonl ends at step 0" in (copy / "log.txt").read_text()
    assert [line["step"] for line in read_lines(copy / "metrics.jsonl") if line["split"] == "train"] == [13]


def test_a_run_goes_on_by_no_other_tokenizer(copy, corpus):
    save(train_tokenizer(["other words than those"], 262), copy / "tokenizer.json")
    before = content(copy)
    with pytest.raises(UserError, match=r"not the one that the run was trained with, .*--config.init_from="):
        train_and_evaluate(tiny(corpus), copy)
    after = content(copy)
    assert after.pop("log.txt").startswith(before.pop("log.txt"))
    assert after == before


def test_a_validation_without_its_loss_is_a_line(copy, corpus):
    lines = [
        line | ({"loss": "?"} if (line["split"], line["step"]) == ("validation", 12) else {})
        for line in read_lines(copy / "metrics.jsonl")
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"metrics.jsonl: the validation of step 12 has no number as its loss"):
        train_and_evaluate(tiny(corpus), copy)


class Killed(Exception):
    """Stands for a kill: nothing after it is done."""


@pytest.mark.parametrize("place", ["evaluate", "diagnose", "sample"])
def test_what_is_due_is_saved_first_and_the_rest_made_up_for(finished, corpus, tmp_path, monkeypatch, place):
    whole = getattr(Trainer, place)

    def killed(self: Trainer) -> None:
        if self.step == 8:
            if place == "sample":  # between two samples
                monkeypatch.setattr(self.writer, "sample", self.writer.sample)
                first = self.writer.sample
                monkeypatch.setattr(self.writer, "sample", lambda *a, **k: (first(*a, **k), kill()))
                whole(self)
            kill()
        return whole(self)

    def kill() -> None:
        raise Killed

    monkeypatch.setattr(Trainer, place, killed)
    with pytest.raises(Killed):
        train_and_evaluate(tiny(corpus), tmp_path / "run")
    assert steps_saved(tmp_path / "run") == [4, 8]
    assert status(tmp_path / "run") == "failed"
    monkeypatch.undo()
    assert train_and_evaluate(tiny(corpus), tmp_path / "run") is None
    assert written(tmp_path / "run") == written(finished)
    best = {json.loads((path / "position.json").read_text())["validation_loss"] for path in checkpoints(tmp_path)}
    assert best == {
        json.loads((path / "position.json").read_text())["validation_loss"] for path in checkpoints(finished.parent)
    }


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").iterdir())


def test_signals_save_and_stop_or_go_on(finished, corpus, tmp_path, monkeypatch):
    sent = {2: signal.SIGUSR1, 5: signal.SIGHUP, 7: signal.SIGTERM, 9: signal.SIGINT}
    read_back = Trainer.read_back

    def send(self: Trainer, lag: int) -> None:
        if self.step in sent:
            os.kill(os.getpid(), sent.pop(self.step))
        read_back(self, lag)

    monkeypatch.setattr(Trainer, "read_back", send)
    stopped = [train_and_evaluate(tiny(corpus, checkpoint__keep_last=9), tmp_path) for _ in range(4)]
    assert stopped == [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, None]
    assert steps_saved(tmp_path) == [2, 4, 5, 7, 8, 9, 12]
    assert "saved, as SIGUSR1 asked" in (tmp_path / "log.txt").read_text()
    assert written(tmp_path) == written(finished)
    run = load_run(tmp_path)
    assert [event["text"] for event in run.events] == [
        *("started", "stopped by SIGHUP", "resumed from 5", "stopped by SIGTERM", "resumed from 7"),
        *("stopped by SIGINT", "resumed from 9", "completed"),
    ]
    parts = dict(wall_time(run))
    assert {"start", "steps", "evaluation", "samples", "checkpoints", "attention statistics"} <= parts.keys()
    assert "lost to restarts" not in parts
    assert (np.diff(running_seconds(run)) > 0).all()


def test_a_folder_in_use_is_refused_by_the_name_of_its_holder(corpus, tmp_path):
    with lock(tmp_path / "run.lock", print):
        with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {os.getpid()} on .* since 20"):
            train_and_evaluate(tiny(corpus), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_folder_that_cannot_be_made_is_named_with_the_cause():
    with pytest.raises(UserError) as caught, open_folder(Path("/proc/none/run")):
        pass
    wanted = "cannot write to the run folder: /proc/none: No such file or directory; choose another --workdir"
    assert str(caught.value) == wanted


def test_what_fails_before_the_run_begins_leaves_no_folder(corpus, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train_and_evaluate(tiny(tmp_path / "none.jsonl"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Disks that fail


class Disk:
    """Lets a step of a run meet a failing disk, and mends it at the end."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch, self.mend = monkeypatch, []

    def fail_at(self, step: int, failure) -> None:
        run_due_actions = Trainer.run_due_actions

        def hooked(run: Trainer, **due: bool) -> None:
            if run.step == step:
                run.checkpointer.wait()
                failure()
            run_due_actions(run, **due)

        self.monkeypatch.setattr(Trainer, "run_due_actions", hooked)

    def limit(self, what: int, value: int) -> None:
        soft, hard = resource.getrlimit(what)
        self.mend.append(lambda: resource.setrlimit(what, (soft, hard)))
        resource.setrlimit(what, (value, hard))


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    for mend in disk.mend:
        mend()


def test_a_file_over_the_limit_costs_no_checkpoint_and_a_line(finished, corpus, tmp_path, disk, monkeypatch, capfd):
    """Metrics first; then, at a checkpoint, what tensorstore writes in its threads: 100 KB in files of any size."""
    workdir = tmp_path / "run"
    disk.fail_at(6, lambda: disk.limit(resource.RLIMIT_FSIZE, 2000))
    with pytest.raises(
        StorageError,
        match=r"cannot write .*metrics.jsonl: File too large; .*ulimit -f.*; then .*main --workdir=.* goes on",
    ):
        train_and_evaluate(tiny(corpus), workdir)
    disk.mend.pop()()
    assert steps_saved(workdir) == [4]
    monkeypatch.undo()

    disk.fail_at(8, lambda: disk.limit(resource.RLIMIT_FSIZE, 20_000))
    with pytest.raises(StorageError, match=r"could not write the checkpoint .*/8: File too large; .*ulimit -f"):
        train_and_evaluate(tiny(corpus), workdir)
    disk.mend.pop()()
    assert steps_saved(workdir) == [4]
    assert status(workdir) == "failed"
    assert "error: could not write the checkpoint" in (workdir / "log.txt").read_text()
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()

    assert train_and_evaluate(tiny(corpus), workdir) is None
    assert written(workdir) == written(finished)


def test_a_folder_removed_or_replaced_meanwhile_ends_the_run(corpus, tmp_path, disk):
    workdir = tmp_path / "run"
    disk.fail_at(6, lambda: shutil.rmtree(workdir))
    with pytest.raises(
        StorageError, match=r"cannot write .*metrics.jsonl: No such file or directory; check the path: it is not there"
    ):
        train_and_evaluate(tiny(corpus), workdir)
    assert not workdir.exists()


def test_too_many_open_files_is_a_line(corpus, tmp_path, disk):
    workdir = tmp_path / "run"
    disk.fail_at(8, lambda: disk.limit(resource.RLIMIT_NOFILE, 3))
    with pytest.raises(StorageError, match=r"Too many open files; raise the limit of open files \(ulimit -n\)"):
        train_and_evaluate(tiny(corpus), workdir)
    disk.mend.pop()()
    assert 4 in steps_saved(workdir)


def test_a_token_cache_on_a_full_disk_is_a_line_and_nothing_is_left(corpus, tmp_path, disk):
    disk.limit(resource.RLIMIT_FSIZE, 1000)
    with pytest.raises(
        StorageError, match=r"^cannot read .* or write the token cache .*File too large; .*set data.cache_dir$"
    ) as error:
        token_cache.prepare(tiny(corpus, data__cache_dir=str(tmp_path / "cache")).data, 270, lambda line: None)
    assert error.value.exit_code == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_run_that_gets_no_better_ends_early_and_says_so(copy, corpus, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda self: None)
    lines = list(read_lines(copy / "metrics.jsonl"))
    for line in lines:
        if line["split"] == "validation":
            line["loss"] = 1.0 if line["step"] == 4 else 2.0
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny(corpus, num_steps=99, eval__patience=2)
    assert train_and_evaluate(config, copy) is None
    info, log = json.loads((copy / "run.json").read_text()), (copy / "log.txt").read_text()
    assert info["status"] == "completed"
    assert info["stopped_early"] == "2 evaluations brought no lower validation loss (the lowest is 1.0000, of step 4)"
    assert f"step 12: stopped early: {info['stopped_early']}; the best checkpoint is of step" in log
    assert "learning rate: " in log  # num_steps is another: the schedule ends with it
    assert "by the schedule of before; the minimum, 0.0004, comes at step 99, before it was step 12" in log
    assert max(line["step"] for line in read_lines(copy / "metrics.jsonl")) == 12
    assert "stopped early" in why_complete(config, copy)


def test_how_long_it_will_take_follows_from_steps_that_did_not_compile(finished, monkeypatch):
    lines = {line["step"]: line for line in read_lines(finished / "metrics.jsonl") if line["split"] == "train"}
    assert "step_ms" in lines[1]
    assert "eta_seconds" not in lines[1]
    assert lines[4]["eta_seconds"] == pytest.approx(8 * 1e-3 * lines[4]["step_ms"])
    assert "compiled in it" in (finished / "log.txt").read_text()

    clock = iter([100.0, 101.0, 105.0])  # when steps 1, 2 and 4 are done
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = object.__new__(Trainer)
    run.config, run.log = tiny(finished), lambda line: None
    run.writer = SimpleNamespace(check_in_place=lambda: None)
    run.clock = SimpleNamespace(take=dict)
    run.placement, run.backend = SimpleNamespace(measures=dict), SimpleNamespace(peak_bytes=lambda: None)
    run.peak_flops, run.adapter_size = None, None
    run.first_step, run.logged_step, run.logged_time = 0, 0, 0.0
    values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}
    found = [run.progress(step, values).get("eta_seconds") for step in (1, 2, 4)]
    assert found == [None, 10 * 1.0, 8 * 2.0]
