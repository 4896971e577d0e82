"""Whole runs that meet damage, bad numbers and mistakes, and what else is started from a run."""

import gc
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from whole_run import (
    ROOT,
    assert_same_results,
    configuration,
    environment,
    run,
    train_lines,
)

from gpt_jax import main
from gpt_jax.errors import UserError
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.runs.metrics import read_lines
from gpt_jax.training.failures import TrainingFailed
from gpt_jax.training.train import train_and_evaluate

# Nothing but steps: no evaluation, sample or diagnostics to compile.
ONLY_STEPS = [f"--config.{name}=0" for name in ("eval.every", "sample.every", "log.diagnostics_every")]


def test_a_damaged_newest_checkpoint_is_skipped_and_named(straight, corpus, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    newest = workdir / "checkpoints" / "60"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr
    assert "initialised from this run's checkpoint at step 50" in done.stdout
    assert_same_results(straight, workdir)


def test_nonfinite_steps_are_named_and_end_the_run(corpus, tmp_path, monkeypatch, capsys):
    poison = ["--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_steps=1"]
    config = configuration(corpus, *poison, *ONLY_STEPS, "--config.model.num_layers=1")
    with pytest.raises(TrainingFailed, match=r"^step \d+: .*is not finite .*; 5 in a row, so the run stops$") as failed:
        train_and_evaluate(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    events = [line["text"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["split"] == "event"]
    assert events[0] == "started"
    assert len(events) == 6
    assert all("update skipped" in event for event in events[1:])

    def fail(*_, **__):
        assert gc.isenabled()  # again, after the imports
        raise failed.value

    monkeypatch.setattr("gpt_jax.training.train.train_and_evaluate", fail)
    flag = types.SimpleNamespace(value=config, using_default_value=False)
    given = type("Flags", (dict,), {"workdir": None})(config=flag)
    monkeypatch.setattr(main, "flags", types.SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(main, "exit_on_interrupt", lambda: None)
    assert main.main(["main"]) == 1
    assert capsys.readouterr().err == f"error: {failed.value}\n"


def test_finetuning_says_what_it_took(straight, corpus, tmp_path):
    changes = ["--config.num_steps=1", "--config.model.num_layers=2", *ONLY_STEPS]
    train_and_evaluate(configuration(corpus, f"--config.init_from={straight}", *changes), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{straight}/checkpoints/" in log
    assert "0 dropped, 0 mismatched and kept fresh, 8 new" in log
    assert "new h_1/qkv/kernel" in log
    first = train_lines(tmp_path / "run")[0]
    assert first["step"] == 1
    assert first["loss"] < train_lines(straight)[0]["loss"] - 0.2


def test_mistakes_about_runs_and_data_cost_one_line(straight, corpus, tmp_path):
    run_folder = Path(shutil.copytree(straight, tmp_path / "straight"))  # its log is written to
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(corpus.read_text().splitlines()[:250]))
    (tmp_path / "file").write_text("")
    before = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.suffix == ".json"}
    done = run(corpus, run_folder, "--config.model.embed_dim=16")
    assert done.returncode == 2, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not fit this config" in error
    assert "Traceback" not in done.stderr

    # Every UserError ends like that one: the others need no process of their own.
    cases = [
        ((other, run_folder), "is not what the run's checkpoint was trained on"),
        ((corpus, tmp_path / "a", "--config.model.block_size=100000"), "block_size is 100000 but the training"),
        ((tmp_path / "none.jsonl", tmp_path / "b"), "does not exist"),
        ((corpus, tmp_path / "c", f"--config.init_from={tmp_path}"), "is neither a run nor a checkpoint"),
        ((corpus, tmp_path / "file"), "cannot write to the run folder"),
    ]
    for (source, workdir, *changes), expected in cases:
        with pytest.raises(UserError, match=expected):
            train_and_evaluate(configuration(source, *changes), workdir)
    assert before == {path.name: path.read_bytes() for path in run_folder.iterdir() if path.suffix == ".json"}


def test_sampling_from_a_run_on_the_command_line(straight):
    """Prompts in a pipe; the same one by the same seed has the same answer."""
    ask = [sys.executable, "-m", "gpt_jax.sample", f"--workdir={straight}", "--seed=1", "--max_tokens=5", "--json"]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(ask, input="moon?\n\nmoon?\n", **options)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert (first["prompt"], first["seed"]) == ("moon?", 1)
    with pytest.raises(UserError, match="nowhere is no run folder"):
        load_for_sampling(Path("nowhere"))
