"""Whole runs that go well, are killed, or are interrupted."""

import json
import os
import signal
import subprocess

import pytest
from whole_run import (  # noqa: F401
    ROOT,
    assert_same_results,
    chats,
    command,
    configuration,
    environment,
    flatten,
    results,
    run,
    straight_run,
    train_lines,
    wait_until,
)

from gpt_jax.metrics import read_lines
from gpt_jax.train import Run, train_and_evaluate


def test_a_run_leaves_all_that_it_should(straight):
    names = {path.name for path in straight.iterdir()}
    assert names == {
        *("run.json", "config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl"),
        *("checkpoints", "log.txt", "report.md"),
    }
    lines = train_lines(straight)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["loss"] < lines[0]["loss"]
    validation = [line for line in read_lines(straight / "metrics.jsonl") if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [0, 20, 40, 60]
    assert validation[-1]["loss"] < validation[0]["loss"]
    info = json.loads((straight / "run.json").read_text())
    assert info["status"] == "completed"
    assert info["parameters"] == sum(leaf.size for _, leaf in flatten(results(straight)[1]))
    log = (straight / "log.txt").read_text()
    assert "h_1/qkv/kernel" in log
    assert f"{info['parameters']:,}" in log
    samples = list(read_lines(straight / "samples.jsonl"))
    assert {sample["step"] for sample in samples} == {60}


def test_a_finished_run_started_again_does_nothing_more(straight, corpus):
    before = (straight / "metrics.jsonl").read_text()
    done = run(corpus, straight)
    assert done.returncode == 0, done.stderr
    after = [line for line in (straight / "metrics.jsonl").read_text().splitlines() if '"event"' not in line]
    assert after == [line for line in before.splitlines() if '"event"' not in line]


def test_killed_and_resumed_is_bit_identical(straight, corpus, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, workdir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until((workdir / "checkpoints" / "10").is_dir, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    assert "initialised from this run's checkpoint at step" in done.stdout
    assert_same_results(straight, workdir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_saves_and_goes_on_bit_identically(straight, corpus, tmp_path, number, code):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, workdir), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(train_lines(workdir)) >= 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"stopped by {number.name} at step" in out
    assert json.loads((workdir / "run.json").read_text())["status"] == "interrupted"
    assert run(corpus, workdir).returncode == 0
    assert_same_results(straight, workdir)


def test_a_signal_while_samples_are_drawn_saves_too(corpus, tmp_path, monkeypatch):
    """With one step more: what is due is done once a step."""
    monkeypatch.setattr(Run, "sample", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    config = configuration(corpus, "--config.sample.every=10", "--config.checkpoint.every=60")
    assert train_and_evaluate(config, tmp_path) == signal.SIGTERM
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["11"]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
