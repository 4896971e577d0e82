"""Runs as a user starts them, in a process of their own, and what two of them are compared by."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt_jax.checkpoint import restore_parameters
from gpt_jax.runs.metrics import read_lines

ROOT = Path(__file__).parent.parent

# Seconds on a processor: what is tested is the loop, not the model.
SMALL = [
    *("--config=configs/chat_tiny.py", "--config.num_steps=60", "--config.batch_size=4"),
    *(
        "--config.model.vocab_size=300",
        "--config.model.dropout_rate=0.1",
        "--config.model.block_size=24",
        "--config.model.num_layers=1",
    ),
    *("--config.model.num_heads=2", "--config.model.embed_dim=48", "--config.optimizer.warmup_steps=5"),
    *("--config.optimizer.decay_steps=60", "--config.eval.every=20", "--config.eval.batches=2"),
    *(
        "--config.backend=xla",
        "--config.sample.every=60",
        "--config.sample.max_tokens=4",
        "--config.checkpoint.every=10",
    ),
    *("--config.log.every=5", "--config.log.diagnostics_every=60", "--config.log.tensorboard=False"),
]


def write_chats(file: Path) -> Path:
    """Writes a few hundred small dialogues."""
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "star", "sea", "hill", "tree", "bird", "stone", "wind", "rain"]
    with file.open("w") as out:
        for _ in range(300):
            question, reply = (" ".join(rng.choice(words, 8)) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def config_flags_of(corpus: Path, *changes: str) -> list[str]:
    data = [f"--config.data.source={corpus}", f"--config.data.cache_dir={corpus.parent / 'cache'}"]
    return [*SMALL, *data, *changes]


def command(corpus: Path, workdir: Path, *changes: str) -> list[str]:
    return [sys.executable, "-m", "gpt_jax.main", f"--workdir={workdir}", *config_flags_of(corpus, *changes)]


PAUSED = """
import runpy, sys, time
from gpt_jax.training.trainer import Trainer
requests, place = Trainer.requests, int(sys.argv.pop(1))
def wait_for_a_signal(self, stop):
    while self.step == place and stop.received is None:
        time.sleep(0.01)
    return requests(self, stop)
Trainer.requests = wait_for_a_signal
runpy.run_module("gpt_jax.main", run_name="__main__", alter_sys=True)
"""


def paused_command(step: int, corpus: Path, workdir: Path, *changes: str) -> list[str]:
    """As `command`, of a run that waits after so many steps until it is killed or told to stop: none comes too late."""
    arguments = [f"--workdir={workdir}", *config_flags_of(corpus, *changes)]
    return [sys.executable, "-c", PAUSED, str(step), *arguments]


def configuration(corpus: Path, *changes: str) -> ConfigDict:
    """The config that `command` runs."""
    values, arguments = flags.FlagValues(), ["main", *config_flags_of(corpus, *changes)]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    return holder.value


def environment(**more: str) -> dict[str, str]:
    """Variables of runs as users have them: the processor is one device, unlike in the tests' own processes."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), **more}


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_lines(workdir: Path) -> list[dict]:
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == "train"]


def results(workdir: Path) -> tuple[list[tuple], dict]:
    """The bits that must be the same in two runs: loss and norms by step, the samples, and the last parameters."""
    numbers = [(line["step"], line["loss"], line["grad_norm"], line["update_norm"]) for line in train_lines(workdir)]
    samples = list(read_lines(workdir / "samples.jsonl"))
    assert samples
    numbers += [tuple(value for name, value in line.items() if name != "seconds") for line in samples]
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return numbers, restore_parameters(last)[0]


def assert_same_results(one: Path, other: Path) -> None:
    (numbers, params), (other_numbers, other_params) = results(one), results(other)
    assert numbers == other_numbers
    flat, other_flat = (dict(flatten(tree)) for tree in (params, other_params))
    assert flat.keys() == other_flat.keys()
    for name in flat:
        np.testing.assert_array_equal(flat[name], other_flat[name], err_msg=name)


def flatten(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "the run took too long"
        time.sleep(0.01)
