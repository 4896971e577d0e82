"""Names of runs: folders, latest, best, and a step of each."""

import os
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.runs.find import find_run
from gpt_jax.storage.checkpoint_files import write_record


def make_run(folder: Path, losses: dict[int, float | None], written: float) -> Path:
    for step, loss in losses.items():
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        write_record(folder / "checkpoints" / str(step), {"validation_loss": loss, "files": {}, "leaves": {}})
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (written, written))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "old", {10: 3.0, 20: 2.0, 30: 2.5}, 100)
    make_run(tmp_path / "runs" / "new", {10: 4.0, 40: None}, 300)
    (tmp_path / "runs" / "unsaved").mkdir()
    make_run(tmp_path / "runs" / "unsaved", {}, 900)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "workdir", "checkpoint"),
    [
        ("{runs}/old", "old", "old"),
        ("old", "old", "old"),
        ("latest", "new", "new"),
        ("best", "old", "old"),
        ("latest@best", "new", "new"),
        ("latest@10", "new", "new/checkpoints/10"),
        ("old@latest", "old", "old/checkpoints/30"),
        ("best@20", "old", "old/checkpoints/20"),
        ("{runs}/new@40", "new", "new/checkpoints/40"),
        ("{runs}/old/checkpoints", "old", "old"),
        ("{runs}/old/checkpoints/10", "old", "old/checkpoints/10"),
    ],
)
def test_a_name_stands_for_a_checkpoint(name, workdir, checkpoint, runs):
    assert find_run(name.format(runs=runs), runs) == (runs / workdir, runs / checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "RUN is empty"),
        ("nowhere", "there is no run nowhere: give the folder of a run, latest or best; below .* unsaved, new, old"),
        ("nowhere@10", "there is no run nowhere: "),
        ("old@11", "has no checkpoint '11': there are 10, 20, 30, best and latest"),
        ("old@", "has no checkpoint ''"),
        ("old@²", "has no checkpoint '²'"),
        ("old@" + "9" * 5000, "has no checkpoint '999"),
        ("unsaved@latest", "has no checkpoint"),
        ("a\0b", "RUN must be text in UTF-8"),
        ("{runs}/old/checkpoints/10@20", "there is no run"),
    ],
)
def test_a_name_of_nothing_says_what_there_is(name, message, runs):
    with pytest.raises(UserError, match=message):
        find_run(name.format(runs=runs), runs)


def test_without_need_of_a_model_the_latest_may_have_no_checkpoint(runs, tmp_path):
    assert find_run("latest", runs, saved=False).workdir == runs / "unsaved"
    with pytest.raises(UserError, match=r"there is no run below .*nowhere: train one first"):
        find_run("latest", tmp_path / "nowhere", saved=False)


@pytest.mark.parametrize("name", ["latest", "best"])
def test_without_a_run_that_is_said(name, tmp_path):
    with pytest.raises(UserError, match=r"no run below .* has a checkpoint: train one first"):
        find_run(name, tmp_path / "runs")


def test_a_folder_whose_name_has_a_sign_for_steps_is_that_folder(runs):
    folder = make_run(runs / "old@10", {1: 1.0}, 1)
    assert find_run("old@10", runs) == (folder, folder)
