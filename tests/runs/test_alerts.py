"""Alerts: each rule speaks at the step where its condition begins to hold, and no other does; and runs followed."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags

from gpt_jax import watch
from gpt_jax.cli import parse_flags
from gpt_jax.errors import UserError
from gpt_jax.runs import sections
from gpt_jax.runs.alerts import Alerts, alerts_of
from gpt_jax.runs.analysis import metric_lines
from gpt_jax.runs.follow import COMPILING, FollowedRun
from gpt_jax.runs.info import write_json
from gpt_jax.runs.load import load_run
from gpt_jax.runs.markdown import render_blocks
from gpt_jax.runs.metrics import MetricsWriter
from gpt_jax.storage.lock import lock


def run_of(steps: int, change: Callable[[int, dict[str, Any]], None] = lambda step, line: None) -> Iterator[dict]:
    """A healthy run's lines: a loss that falls, with noise, a norm near 1, an evaluation every 100 steps."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        loss = 4 + 4 * math.exp(-step / 800) + 0.1 * float(rng.normal())
        line = {
            "step": step,
            "split": "train",
            "loss": loss,
            "grad_norm": 1 + 0.1 * float(rng.random()),
            "finite": True,
        }
        if step == 1 or step % 50 == 0:
            line["tokens_per_second"] = 100.0 if step == 1 else 10_000.0  # the first has the compilation in it
        change(step, line)
        yield line
        if step % 100 == 0:
            evaluated = {"step": step, "split": "validation", "loss": 4.1 + 4 * math.exp(-step / 800)}
            change(step, evaluated)
            yield evaluated


def found(steps: int, change: Callable[[int, dict[str, Any]], None]) -> list[tuple[int, str]]:
    return [(alert.step, alert.rule) for alert in alerts_of(run_of(steps, change))]


def test_a_healthy_run_has_no_alert():
    assert list(alerts_of(run_of(3000))) == []


def test_of_several_skipped_updates_the_first_is_told():
    def change(step: int, line: dict[str, Any]) -> None:
        if step in (20, 21, 22, 30):
            line |= {"finite": False, "loss": "NaN", "grad_norm": "Infinity"}

    assert found(200, change) == [(20, "non-finite"), (30, "non-finite")]


@pytest.mark.parametrize(("name", "value"), [("grad_norm", 12.0), ("loss", 20.0)])
def test_a_spike_is_told_once_in_a_hundred_steps(name, value):
    def change(step: int, line: dict[str, Any]) -> None:
        if step in (50, 300, 302, 450) and line["split"] == "train":  # the first is before a mean of late is known
            line[name] = value

    assert found(600, change) == [(300, "spike"), (450, "spike")]


def test_a_loss_that_rises_is_told_when_the_rise_is_more_than_chance():
    def change(step: int, line: dict[str, Any]) -> None:
        line["loss"] += 0.002 * max(0, step - 2000) if line["split"] == "train" else 0

    assert found(4000, change) == [(2500, "loss up")]  # once, though it goes on


def test_a_gap_that_opens_is_told():
    def change(step: int, line: dict[str, Any]) -> None:
        if line["split"] == "validation" and step > 600:
            line["loss"] = {700: 6.0, 800: 6.6, 900: 6.7, 1000: 5.2, 1100: 6.1}.get(step, 6.2)

    assert found(1300, change) == [(800, "gap"), (1100, "gap")]


def test_a_throughput_that_falls_is_told_but_not_that_of_a_start():
    def change(step: int, line: dict[str, Any]) -> None:
        if "tokens_per_second" in line and step in (400, 700, 750, 900):
            line["tokens_per_second"] = 4000.0  # at 400 it is not known yet what is usual

    assert found(1000, change) == [(700, "throughput"), (900, "throughput")]
    resumed = [*run_of(500), {"step": 500, "split": "event", "text": "resumed from 500"}]
    resumed += [{"step": 501, "split": "train", "loss": 4.0, "tokens_per_second": 50.0}]
    assert list(alerts_of(resumed)) == []


def test_a_disk_that_fills_is_told_once():
    alerts = Alerts()
    assert alerts.see_disk(10, 5_000_000, 1_000_000) == []
    [alert] = alerts.see_disk(20, 1_500_000, 1_000_000)
    assert str(alert) == "alert at step 20, disk: 1.5 MB are free, and a checkpoint has 1.0 MB: free some space"
    assert alerts.see_disk(30, 1_400_000, 1_000_000) == []
    assert alerts.see_disk(40, 9_000_000, 1_000_000) == []
    assert len(alerts.see_disk(50, 1_000_000, 1_000_000)) == 1


def test_what_the_trainer_recorded_of_a_disk_is_an_alert_of_the_run(tmp_path):
    """It follows from no metric, so that a reader must find it written."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(1, "event", {"text": "1.5 MB are free", "rule": "disk"})
        writer.write(2, "event", {"text": "completed"})
    [alert] = alerts_of(metric_lines(load_run(tmp_path)))
    assert str(alert) == "alert at step 1, disk: 1.5 MB are free"
    followed = FollowedRun(tmp_path)
    followed.read()
    assert followed.alerts == [alert]
    assert "| 1 | disk | 1.5 MB are free |" in render_blocks(sections.alerts(load_run(tmp_path)))


# ---- a run that is followed


def write_lines(folder: Path, lines: list[dict[str, Any]], how: str = "a") -> None:
    with (folder / "metrics.jsonl").open(how) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "run.json", {"status": "running", "peak_memory_bytes": {"device": 3_000_000_000}})
    write_json(tmp_path / "config.json", {"num_steps": 1000})
    return tmp_path


def test_each_line_is_read_once_when_it_is_whole_and_again_where_the_file_was_replaced(folder):
    run = FollowedRun(folder)
    run.read()
    assert (run.step, run.status) == (0, "crashed")
    lines = list(run_of(120))
    write_lines(folder, lines[:100])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "split": "tr')
        file.flush()
        run.read()
        assert run.step == 100
        file.write('ain", "loss": "NaN"}\n')
    run.read()
    run.read()
    assert (run.step, len(run.losses)) == (101, 101)
    assert math.isnan(run.losses[-1])
    (folder / "new").mkdir()
    write_lines(folder / "new", lines[:40])
    (folder / "new" / "metrics.jsonl").replace(folder / "metrics.jsonl")  # as a resumed run does
    run.read()
    assert (run.step, len(run.losses)) == (40, 40)


def test_the_time_left_is_right_from_the_tenth_step_and_after_a_resume(folder):
    def at(step: int, time: float) -> dict[str, Any]:
        return {"step": step, "split": "train", "loss": 1.0, "time": time}

    run = FollowedRun(folder)
    with lock(folder / "run.lock", print):
        write_lines(folder, [at(step, 30.0 + (20.0 if step > 1 else 0) + 0.5 * step) for step in range(1, 11)])
        run.read()
        assert run.eta_seconds == pytest.approx(990 * 0.5)
        resumed = {"step": 10, "split": "event", "text": "resumed from 10"}
        write_lines(folder, [resumed, *(at(step, 9000.0 + step) for step in range(11, 11 + COMPILING))])
        run.read()
        assert run.eta_seconds is None
        write_lines(folder, [at(step, 9100.0 + 2 * step) for step in range(20, 30)])
        run.read()
        assert run.eta_seconds == pytest.approx(971 * 2)
    run.read()
    assert run.eta_seconds is None  # it is not running any more


def test_a_watch_shows_what_is_known_of_several_runs(folder, monkeypatch, capsys):
    (folder / "other").mkdir()
    write_json(folder / "other" / "config.json", {"num_steps": 5})
    write_lines(folder, [line | ({"grad_norm": 50.0} if line["step"] == 200 else {}) for line in run_of(300)])
    sample = {"step": 300, "prompt": "who\x1b[2J?", "text": "I\nam"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    values = flags.FlagValues()
    watch.define_flags(values)
    monkeypatch.setattr(watch, "FLAGS", values)
    watch.main(parse_flags(["watch", str(folder), str(folder / "other")], values))
    shown = capsys.readouterr().out
    assert f"{folder.name}: crashed, step 300 of 1,000" in shown
    assert "lowest 6.8492 at step 300" in shown
    assert "10,000 tokens/s" in shown
    assert "device 3.0 GB at most" in shown
    assert "step 300: who [2J? -> I am" in shown
    assert "at step 200, spike: gradient norm 50, and 1.0" in shown
    assert "other: unknown, step 0 of 5" in shown
    assert "\x1b" not in shown
    (folder / "nothing").mkdir()
    for arguments, message in (
        ([str(folder), "--every=0"], "--every must be a number from 0.1, found 0"),
        ([str(folder / "nothing")], "no run at .*nothing: the folder has neither run.json nor config.json"),
        ([str(folder), "--runs="], "--runs is empty: name the folder that runs are in"),
        ([str(folder), "--runs=a\0b"], r"--runs must be text in UTF-8, found '\\x00' in it"),
    ):
        values = flags.FlagValues()
        watch.define_flags(values)
        monkeypatch.setattr(watch, "FLAGS", values)
        with pytest.raises(UserError, match=message):
            watch.main(parse_flags(["watch", *arguments], values))
