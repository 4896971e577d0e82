"""Whole runs, as a user starts them: complete, resumed, killed, interrupted, damaged, broken and finetuned."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.checkpoint import restore_parameters
from gpt_jax.metrics import read_lines

ROOT = Path(__file__).parent.parent

# Seconds on a processor: what is tested is the loop, not the model.
SMALL = [
    *("--config=configs/chat_tiny.py", "--config.num_steps=60", "--config.batch_size=4"),
    *(
        "--config.model.vocab_size=300",
        "--config.model.dropout_rate=0.1",
        "--config.model.block_size=24",
        "--config.model.num_layers=2",
    ),
    *("--config.model.num_heads=2", "--config.model.embed_dim=16", "--config.optimizer.warmup_steps=5"),
    *("--config.optimizer.decay_steps=60", "--config.eval.every=20", "--config.eval.batches=2"),
    *("--config.sample.every=60", "--config.sample.max_tokens=4", "--config.checkpoint.every=10"),
    *("--config.log.every=5", "--config.log.diagnostics_every=60", "--config.log.tensorboard=False"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A few hundred small dialogues."""
    file = tmp_path_factory.mktemp("corpus") / "chats.jsonl"
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "star", "sea", "hill", "tree", "bird", "stone", "wind", "rain"]
    with file.open("w") as out:
        for _ in range(300):
            question, reply = (" ".join(rng.choice(words, 8)) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def command(corpus: Path, workdir: Path, *changes: str) -> list[str]:
    data = [f"--config.data.source={corpus}", f"--config.data.cache_dir={corpus.parent / 'cache'}"]
    return [sys.executable, "-m", "gpt_jax.main", *SMALL, *data, f"--workdir={workdir}", *changes]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def train_lines(workdir: Path) -> list[dict]:
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == "train"]


def results(workdir: Path) -> tuple[list[tuple], dict]:
    """What must be the same bits in two runs: loss and norms by step, and the last parameters."""
    numbers = [(line["step"], line["loss"], line["grad_norm"], line["update_norm"]) for line in train_lines(workdir)]
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return numbers, restore_parameters(last)[0]


def assert_same_results(one: Path, other: Path) -> None:
    (numbers, params), (other_numbers, other_params) = results(one), results(other)
    assert numbers == other_numbers
    flat, other_flat = (dict(_flatten(tree)) for tree in (params, other_params))
    assert flat.keys() == other_flat.keys()
    for name in flat:
        np.testing.assert_array_equal(flat[name], other_flat[name], err_msg=name)


def _flatten(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """A run from start to end, without incident."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "the run took too long"
        time.sleep(0.01)


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
    assert info["parameters"] == sum(leaf.size for _, leaf in _flatten(results(straight)[1]))
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


def test_a_damaged_newest_checkpoint_is_skipped_and_named(straight, corpus, tmp_path):
    workdir = tmp_path / "run"
    assert run(corpus, workdir, "--config.num_steps=20").returncode == 0
    newest = workdir / "checkpoints" / "20"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = run(corpus, workdir)
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr
    assert "initialised from this run's checkpoint at step 10" in done.stdout
    assert "config.num_steps was 20, now 60" in done.stdout
    assert_same_results(straight, workdir)


def test_nonfinite_steps_are_named_and_end_the_run(corpus, tmp_path):
    done = run(corpus, tmp_path / "run", "--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_steps=1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step ")
    assert "is not finite" in last
    assert "5 in a row, so the run stops" in last
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    events = [line["text"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["split"] == "event"]
    assert len(events) == 5
    assert all("update skipped" in event for event in events)


def test_finetuning_says_what_it_took(straight, corpus, tmp_path):
    done = run(
        corpus,
        tmp_path / "run",
        f"--config.init_from={straight}",
        "--config.num_steps=6",
        "--config.model.num_layers=3",
    )
    assert done.returncode == 0, done.stderr
    assert f"{straight}/checkpoints/" in done.stdout
    assert "0 dropped, 0 mismatched and kept fresh, 8 new" in done.stdout
    assert "new h_2/qkv/kernel" in done.stdout
    first = train_lines(tmp_path / "run")[0]
    assert first["step"] == 1
    assert first["loss"] < train_lines(straight)[0]["loss"] - 0.2


def test_mistakes_about_runs_and_data_cost_one_line(straight, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(corpus.read_text().splitlines()[:250]))
    (tmp_path / "file").write_text("")
    cases = [
        ((corpus, straight, "--config.model.embed_dim=32"), "does not fit this config"),
        ((other, straight), "the data of"),
        ((corpus, tmp_path / "a", "--config.model.block_size=100000"), "block_size is 100000 but the training"),
        ((tmp_path / "none.jsonl", tmp_path / "b"), "does not exist"),
        ((corpus, tmp_path / "c", f"--config.init_from={tmp_path}"), "is neither a run nor a checkpoint"),
        ((corpus, tmp_path / "file"), "cannot write to the run folder"),
    ]
    before = {path.name: path.read_bytes() for path in straight.iterdir() if path.suffix == ".json"}
    for arguments, expected in cases:
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert expected in errors[0]
        assert "Traceback" not in done.stderr
    assert before == {path.name: path.read_bytes() for path in straight.iterdir() if path.suffix == ".json"}


def test_sampling_from_a_run_on_the_command_line(straight):
    ask = [sys.executable, "-m", "gpt_jax.sample", f"--workdir={straight}", "--seed=1", "--max_tokens=5"]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 120, "check": False}
    one, again = (subprocess.run([*ask, "--prompt=moon?"], **options) for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == again.stdout
    chat = subprocess.run(ask, input="sun?\n\nrain?\n", **options)
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.count("gpt> ") == 2
    missing = subprocess.run([*ask[:3], "--workdir=nowhere"], **options)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: nowhere is no run folder")
