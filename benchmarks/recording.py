"""Times the steps of a run while all of it is recorded and while nothing is, by turns in one run.

    python benchmarks/recording.py [--blocks 40] [--steps 100] [--set model.dtype=float32] [--set backend=xla]

A block is so many steps of configs/chat.py in bf16 through Vulkan, from a finished step to a finished one. Recorded are
a line of metrics a step and the alerts, a line of progress every log.every steps in log and TensorBoard and to a
tracker's process (one that reads and forgets). In the other blocks the loop reads each step's metrics from the device,
as it must to stop a run that only skips, and does nothing with them. Evaluations, samples, statistics of attention and
checkpoints are work of their own and left out. The first blocks, which compile and warm up, do not count.
"""

import argparse
import ast
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from configs import chat
from gpt_jax.runs import trackers
from gpt_jax.runs.tracker_process import TrackerProcess
from gpt_jax.training import preflight, train
from gpt_jax.training.trainer import Run, Start, Trainer

WARM = 4  # blocks
RECORDED = (True, False, False, True)  # blocks in turns, so that a drift falls on both
EARLY = {
    "backend": "vulkan",
    "model.dtype": "bfloat16",
    "log.tracker": "trackio",
    **dict.fromkeys(("eval.every", "sample.every", "checkpoint.every", "log.diagnostics_every"), 0),
}


class ForgetfulTrainer(Trainer):
    """A trainer that records every other block of steps."""

    steps_of_block: int

    def __init__(self, run: Run, start: Start) -> None:
        super().__init__(run, start)
        self.blocks: list[tuple[bool, float]] = []  # whether recorded, seconds a step
        self.began = time.perf_counter()
        instances.append(self)

    def read_back(self, lag: int) -> None:
        block, place = divmod(self.step - 1, self.steps_of_block)
        ends = place == self.steps_of_block - 1
        recorded = RECORDED[block % len(RECORDED)]
        if recorded:
            super().read_back(0 if ends else lag)
        else:
            while len(self.pending) > (0 if ends else lag):
                jax.device_get(self.pending.popleft()[1])
        if ends:
            jax.block_until_ready(self.leaves)
            now = time.perf_counter()
            self.blocks.append((recorded, (now - self.began) / self.steps_of_block))
            self.began = time.perf_counter()


instances: list[ForgetfulTrainer] = []


def forgetting_process(service: str, run: object, log: object) -> TrackerProcess:
    return TrackerProcess(service, run, log, ["sh", "-c", "cat > /dev/null"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    config = chat.get_config()
    changes = dict(change.split("=", 1) for change in arguments.set)
    config.update_from_flattened_dict(EARLY | {name: _value(text) for name, text in changes.items()})
    config.num_steps = (WARM + arguments.blocks) * arguments.steps
    ForgetfulTrainer.steps_of_block = arguments.steps
    train.Trainer = ForgetfulTrainer
    preflight.check_service = lambda name: None  # no library is needed
    trackers.TrackerProcess = forgetting_process
    with tempfile.TemporaryDirectory() as folder:
        train.train_and_evaluate(config, Path(folder) / "run")
    [trainer] = instances
    blocks = trainer.blocks[WARM : WARM + arguments.blocks]
    ms = {kind: [1e3 * seconds for recorded, seconds in blocks if recorded == kind] for kind in (True, False)}
    medians = {kind: statistics.median(each) for kind, each in ms.items()}
    for kind, name in ((True, "recorded"), (False, "not recorded")):
        low, _, high = statistics.quantiles(ms[kind], n=4)
        print(f"{name:<13} {len(ms[kind])} blocks: {medians[kind]:.4f} ms a step ({low:.4f} to {high:.4f})")
    pairs = statistics.median(a / b for a, b in zip(ms[True], ms[False], strict=False))
    print(f"ratio of medians {medians[True] / medians[False]:.4f}, median ratio of pairs {pairs:.4f}")
    print(json.dumps({"recorded": ms[True], "not_recorded": ms[False]}))


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
