"""Runs as they go on, in the terminal: `python -m gpt_jax.watch RUN [RUN ...]`; `runs/find.py` says what RUN may be.

It only reads. Where standard output is no terminal, or with --once, it prints how the runs stand and ends.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take time

import itertools
import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from gpt_jax.cli import run_main
from gpt_jax.config_file import NUMBER
from gpt_jax.errors import UserError
from gpt_jax.runs.find import RUNS, find_run, runs_folder
from gpt_jax.runs.follow import FollowedRun
from gpt_jax.runs.formats import format_duration, format_number, format_size
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE
from gpt_jax.runs.status import RUNNING, UNKNOWN
from gpt_jax.runs.summary import is_run
from gpt_jax.tables import printable, render_panels

FLAGS = flags.FLAGS
SHORTEST = 0.1  # seconds between two looks
ALERTS_SHOWN = 3
_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 60  # characters
_MEAN = 50  # steps of the mean loss
_NORMS = ("grad", "param", "update")


def main(argv: Sequence[str]) -> None:
    if not SHORTEST <= FLAGS.every < math.inf:
        raise UserError(f"--every must be a number from {SHORTEST}, found {FLAGS.every}")
    folder = runs_folder(FLAGS.runs)
    runs = [FollowedRun(find_run(name, folder, saved=False).workdir) for name in argv[1:]]
    for run in runs:
        run.read()
        if run.status == UNKNOWN and not is_run(run.workdir) and not run.step:
            raise UserError(f"no run at {run.workdir}: the folder has neither {INFO_FILE} nor {CONFIG_FILE}")
    if FLAGS.once or not sys.stdout.isatty():
        print(render_panels([(title(run), rows(run)) for run in runs]))
        return
    try:
        watch(runs)
    except KeyboardInterrupt:
        return  # which is how one leaves it


def watch(runs: Sequence[FollowedRun]) -> None:
    """Shows runs until all have ended."""
    from rich.live import Live

    from gpt_jax.tables import panels

    with Live(auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(panels([(title(run), rows(run)) for run in runs]), refresh=True)
            if all(run.status != RUNNING for run in runs):
                return
            time.sleep(FLAGS.every)
            for run in runs:
                run.read()


def title(run: FollowedRun) -> str:
    """Name, status, and how far it is."""
    total = run.config.get("num_steps")
    step = f"step {run.step:,}" + (f" of {total:,}" if total else "")
    eta = run.eta_seconds
    left = "" if eta is None else f", {format_duration(eta)} to go"
    return f"{run.workdir.resolve().name}: {run.status}, {step}{left}"


def rows(run: FollowedRun) -> list[tuple[str, str]]:
    """Names and values to show of a run, those alone that are known."""
    found = [
        ("problem", run.problem),
        ("loss", _loss(run)),
        ("validation", _validation(run)),
        ("", curve([loss for loss in run.losses if math.isfinite(loss)])),
        ("norms", ", ".join(f"{norm} {value}" for norm in _NORMS if (value := _figure(run.train, f"{norm}_norm")))),
        ("rate", _figure(run.train, "learning_rate")),
        ("speed", _speed(run)),
        ("memory", _memory(run)),
        ("sample", _sample(run)),
        *(("alert", str(alert).removeprefix("alert ")) for alert in run.alerts[-ALERTS_SHOWN:]),
        ("disk", _disk(run)),
    ]
    return [(name, value) for name, value in found if value]


def curve(losses: Sequence[float]) -> str:
    """A line of blocks: the mean losses of equal parts of the steps, the highest as the tallest block."""
    if len(losses) < 2:
        return ""
    parts = min(_CURVE, len(losses))
    ends = [len(losses) * i // parts for i in range(parts + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    if high == low:
        return _BARS[0] * parts
    return "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / (high - low) * len(_BARS)))] for mean in means)


def _loss(run: FollowedRun) -> str:
    if not run.losses:
        return ""
    last = [loss for loss in run.losses[-_MEAN:] if math.isfinite(loss)]
    mean = f", mean of the last {len(last)} steps {sum(last) / len(last):.4f}" if len(last) > 1 else ""
    return f"{format_number(run.losses[-1])}{mean}"


def _validation(run: FollowedRun) -> str:
    if run.best is None:
        return ""
    last = f"{_figure(run.validation, 'loss')} at step {run.validation['step']:,}"
    return f"{last}, lowest {format_number(run.best[0])} at step {run.best[1]:,}"


def _speed(run: FollowedRun) -> str:
    measured = run.measured
    if not measured:
        return ""
    mfu = f", MFU {measured['mfu']:.1%}" if isinstance(measured.get("mfu"), float) else ""
    return f"{measured['tokens_per_second']:,.0f} tokens/s, {_figure(measured, 'step_ms')} ms a step{mfu}"


def _memory(run: FollowedRun) -> str:
    peak = run.info.get("peak_memory_bytes") or {}
    known = [(name, run.measured.get(f"{name}_peak_bytes") or peak.get(name)) for name in ("device", "host")]
    return ", ".join(f"{name} {format_size(size)} at most" for name, size in known if size)


def _sample(run: FollowedRun) -> str:
    if not run.sample:
        return ""
    return f"step {run.sample['step']:,}: {run.sample.get('prompt', '')} -> {run.sample.get('text', '')}"


def _disk(run: FollowedRun) -> str:
    try:
        usage = shutil.disk_usage(run.workdir)
    except OSError:
        return ""
    return f"{format_size(usage.free)} free of {format_size(usage.total)}"


def _figure(line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format_number(value)
    return printable(value) if isinstance(value, str) else ""  # "NaN"


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE(NUMBER, "every", 1.0, "Seconds between two looks.", **here)
    flags.DEFINE_bool("once", False, "Whether to print how the runs stand, and end.", **here)
    flags.DEFINE_string("runs", str(RUNS), "The folder that runs are in.", **here)


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], more="RUN", define=define_flags)
