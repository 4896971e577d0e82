"""Whole runs that go well, are killed, or are interrupted."""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from whole_run import (
    ROOT,
    assert_same_results,
    configuration,
    environment,
    flatten,
    paused_command,
    results,
    run,
    train_lines,
    wait_until,
)

from gpt_jax.checkpoint import restore_parameters
from gpt_jax.data import batches, token_cache
from gpt_jax.errors import UserError
from gpt_jax.runs.load import load_run
from gpt_jax.runs.metrics import read_lines
from gpt_jax.runs.report import write_report
from gpt_jax.runs.status import read_status
from gpt_jax.runs.wall_time import wall_time
from gpt_jax.storage.checkpoint_files import saved_steps
from gpt_jax.storage.checksum import crc32_of_json
from gpt_jax.training.train import train_and_evaluate
from gpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_run_leaves_all_that_it_should(straight):
    names = {path.name for path in straight.iterdir()}
    assert names == {
        *("run.json", "config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl"),
        *("checkpoints", "log.txt", "report.md", "report.json", "report.html"),
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
    assert "h_0/qkv/kernel" in log
    assert f"{info['parameters']:,}" in log
    assert log.endswith(f"talk to it: python -m gpt_jax.chat {straight}\n")
    samples = list(read_lines(straight / "samples.jsonl"))
    assert {sample["step"] for sample in samples} == {60}


def test_a_finished_run_started_again_does_nothing_more(straight, corpus, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    assert train_and_evaluate(configuration(corpus), workdir) is None
    files = [folder / name for name in ("metrics.jsonl", "samples.jsonl") for folder in (straight, workdir)]
    before, after, *samples = [
        [line for line in file.read_text().splitlines() if '"event"' not in line] for file in files
    ]
    assert after == before
    assert samples[0] == samples[1]
    assert saved_steps(workdir / "checkpoints") == saved_steps(straight / "checkpoints")


def start(corpus: Path, workdir: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(paused_command(15, corpus, workdir), cwd=ROOT, env=environment(), text=True, **pipes)


def trains_again(workdir: Path) -> bool:
    """Whether a run has made a step since it was resumed."""
    lines = list(read_lines(workdir / "metrics.jsonl"))
    resumed = any(line.get("text", "").startswith("resumed") for line in lines)
    return resumed and lines[-1]["split"] == "train"


def test_killed_and_stopped_by_signals_and_resumed_it_is_bit_identical(straight, corpus, tmp_path):
    """One run that is killed, and stopped by SIGTERM when it goes on; test_run_folder.py has the other signals."""
    workdir = tmp_path / "run"
    process = start(corpus, workdir)
    wait_until((workdir / "checkpoints" / "10").is_dir, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = train_lines(workdir)[-1]["step"]
    assert read_status(workdir)[0] == "crashed"
    assert "The run crashed" in write_report(workdir).read_text()
    process = start(corpus, workdir)
    wait_until(functools.partial(trains_again, workdir), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "initialised from this run's checkpoint at step" in out
    assert "stopped by SIGTERM at step" in out
    assert json.loads((workdir / "run.json").read_text())["status"] == "interrupted"
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    assert_same_results(straight, workdir)
    saved = json.loads((workdir / "checkpoints" / "60" / "position.json").read_text())["position"]
    assert json.loads((workdir / "run.json").read_text())["elapsed_seconds"] >= saved["elapsed_seconds"]
    events = [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == "event"]
    started, killed, *_, last = events
    assert (started["text"], last["text"]) == ("started", "completed")
    assert killed["text"].startswith("resumed from")
    assert all(event["start_seconds"] > 1 for event in (started, killed))  # jax's import alone takes longer
    assert killed.get("lost_steps", 0) == max(reached - killed["step"], 0)
    assert ("lost_seconds" in killed) == (reached > killed["step"])
    assert [line["step"] for line in train_lines(workdir)] == [*range(1, 61)]  # one curve
    parts = dict(wall_time(load_run(workdir)))
    assert parts.get("lost to restarts", 0.0) == killed.get("lost_seconds", 0.0)
    assert last["checkpoint_ms"] > 0
    assert not any("lost_steps" in event for event in events[2:])  # a signal saves first


def test_a_signal_while_samples_are_drawn_saves_too(corpus, tmp_path, monkeypatch):
    """With one step more: what is due is done once a step."""
    monkeypatch.setattr(Trainer, "sample", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    config = configuration(corpus, "--config.sample.every=10", "--config.checkpoint.every=60")
    assert train_and_evaluate(config, tmp_path) == signal.SIGTERM
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["11"]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


class Recorded:
    """A loader that keeps what the loop took from it."""

    def __init__(self, batches, taken):
        self.batches, self.taken = batches, taken

    def __next__(self):
        self.taken.append(next(self.batches))
        return self.taken[-1]

    def close(self):
        self.batches.close()


@pytest.fixture
def losses(monkeypatch):
    """Validation losses to come; steps that compute nothing, so that a run of a few costs little."""
    losses, initialise = [], Trainer.__init__

    def initialise_without_steps(self, *args, **options):
        initialise(self, *args, **options)
        names = ["loss", "grad_norm", "learning_rate", "finite"]

        def step(leaves, batch):
            state = jax.tree.unflatten(self.structure, leaves)
            return jax.tree.leaves(state.replace(step=state.step + 1)), {name: jnp.float32(1) for name in names}

        self.train_step = step
        self.eval_step = lambda params, batch: (losses.pop(0) if losses else 1.0, 1.0)

    monkeypatch.setattr(Trainer, "__init__", initialise_without_steps)
    monkeypatch.setattr(Trainer, "sample", lambda self: None)
    monkeypatch.setattr(Trainer, "diagnose", lambda self: None)
    return losses


def test_another_batch_size_goes_on_with_the_next_window(corpus, tmp_path, monkeypatch, losses):
    taken, load = [], batches.loader
    monkeypatch.setattr(batches, "loader", lambda *args, **options: Recorded(load(*args, **options), taken))
    for number, (size, steps) in enumerate(((4, 3), (8, 5), (2, 6))):
        changes = [f"--config.batch_size={size}", f"--config.num_steps={steps}", "--config.model.num_layers=1"]
        train_and_evaluate(configuration(corpus, *changes), tmp_path)
        if not number:  # as a checkpoint of before said its place, by batches
            position_file = tmp_path / "checkpoints" / "3" / "position.json"
            record = json.loads(position_file.read_text())
            del record["crc32"], record["position"]["next_window"], record["position"]["order"]
            position_file.write_text(json.dumps(record | {"crc32": crc32_of_json(record)}))
    assert [len(batch["inputs"]) for batch in taken] == [4, 4, 4, 8, 8, 2]
    assert "config.batch_size was 8, now 2" in (tmp_path / "log.txt").read_text()
    config = configuration(corpus)
    tokens = token_cache.prepare(config.data, 300, log=lambda line: None).train
    [straight] = batches.windows(tokens, block_size=24, batch_size=30, seed=config.seed).slice(slice(0, 1))
    np.testing.assert_array_equal(np.concatenate([batch["inputs"] for batch in taken]), straight["inputs"])

    train_and_evaluate(configuration(corpus, *changes, "--config.num_steps=7", "--config.seed=1"), tmp_path)
    assert "another seed, weights or targets than before: windows are drawn anew" in (tmp_path / "log.txt").read_text()
    with pytest.raises(UserError, match=r"does not fit this config: model.block_size was 24, now 12"):
        train_and_evaluate(configuration(corpus, *changes, "--config.model.block_size=12"), tmp_path)


def test_a_mixture_goes_on_with_the_next_window_and_its_loss_is_said_by_source(corpus, tmp_path, monkeypatch, losses):
    book = tmp_path / "book.txt"
    book.write_text("<|end_of_text|>".join(f"Chapter {n}. It has a text of its own." for n in range(90)))
    taken, load = [], batches.loader
    monkeypatch.setattr(batches, "loader", lambda *args, **options: Recorded(load(*args, **options), taken))
    changes = ["--config.data.source=default", f"--config.data.mixture=('{corpus}','{book}')"]
    changes += ["--config.data.weights=(3,1)", "--config.data.validation_fraction=0.2", "--config.eval.batches=1"]
    changes += ["--config.model.num_layers=1"]
    losses += [2.0, 4.0]
    for size, steps in ((4, 3), (8, 5)):
        config = configuration(corpus, *changes, f"--config.batch_size={size}", f"--config.num_steps={steps}")
        train_and_evaluate(config, tmp_path / "run")
    assert [len(batch["inputs"]) for batch in taken] == [4, 4, 4, 8, 8]
    tokens = token_cache.prepare(config.data, 300, log=lambda line: None).train
    [straight] = batches.windows(tokens, block_size=24, batch_size=28, seed=config.seed).slice(slice(0, 1))
    np.testing.assert_array_equal(np.concatenate([batch["inputs"] for batch in taken]), straight["inputs"])
    first = next(line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["split"] == "validation")
    assert (first["loss"], first[f"loss of {corpus}"], first[f"loss of {book}"]) == (2.5, 2.0, 4.0)
    assert f"4.0000 on {book}" in (tmp_path / "run" / "log.txt").read_text()
    assert f"last validation loss on {book}" in (tmp_path / "run" / "report.md").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data_by_source"][str(book)]["train"]["tokens"] > 0

    config.data.weights = (1, 1)
    with pytest.raises(UserError, match=r"does not fit this config: data.weights was \[3, 1\], now \[1, 1\]"):
        train_and_evaluate(config, tmp_path / "run")


def test_a_validation_loss_that_is_not_finite_is_never_the_best(corpus, tmp_path, losses):
    losses += [math.nan, -math.inf, 2.0, 3.0, math.inf, 1.5]
    changes = ["--config.eval.batches=1", "--config.eval.every=1", "--config.checkpoint.every=1"]
    for steps in (3, 5):
        train_and_evaluate(configuration(corpus, *changes, f"--config.num_steps={steps}"), tmp_path)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "validation"]
    assert [line["step"] for line in lines if line["best"]] == [2, 5]
    assert "best validation loss 1.5000" in restore_parameters(tmp_path)[1]


@pytest.mark.parametrize(
    ("start", "end", "traced"), [(0, 9, [3, 4, 5, 6]), (4, 9, [5, 6]), (0, 4, [3, 4]), (6, 9, []), (7, 9, [])]
)
def test_a_profile_is_of_the_steps_in_its_window_that_a_start_makes(start, end, traced, tmp_path, monkeypatch):
    running, seen = [], []

    @contextlib.contextmanager
    def trace(folder):
        running.append(folder)
        yield
        running.pop()

    monkeypatch.setattr("jax.profiler.trace", trace)
    run = object.__new__(Trainer)
    run.config = ConfigDict({"log": {"profile_step": 3, "profile_steps": 4}})
    run.workdir, run.backend, run.leaves, run.log = tmp_path, types.SimpleNamespace(name="xla"), (), lambda line: None
    run.trace, run.tracing = contextlib.ExitStack(), False
    with run.trace:
        for run.step in range(start, end):
            run.profile({})
            if running:
                seen.append(run.step + 1)
    assert seen == traced
    assert not running


def test_the_best_evaluation_has_a_checkpoint_whenever_checkpoints_are_due(corpus, tmp_path, losses):
    """The evaluation of step 0 aside: then nothing was learnt that another folder does not hold."""
    losses += [0.5, 3.0, 2.0, 2.5, math.nan, 2.2]
    changes = ["--config.eval.batches=1", "--config.eval.every=1", "--config.checkpoint.every=0"]
    train_and_evaluate(
        configuration(corpus, *changes, "--config.num_steps=5", "--config.checkpoint.keep_last=1"), tmp_path
    )
    assert saved_steps(tmp_path / "checkpoints") == [2, 5]
    assert f"{tmp_path}/checkpoints/2 (best validation loss 2.0000)" in restore_parameters(tmp_path)[1]
    losses += [1.0]
    train_and_evaluate(
        configuration(corpus, *changes, "--config.num_steps=6", "--config.checkpoint.keep_last=1"), tmp_path
    )
    assert saved_steps(tmp_path / "checkpoints") == [6]
