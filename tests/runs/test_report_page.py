"""The page of a report, and runs beside each other: what stands in it. It is drawn in no browser here."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from synthetic_run import SPIKE_STEP, write_run

from gpt_jax.errors import UserError
from gpt_jax.runs import charts, comparison, kernel_floors, load, page, report, sections, wall_time
from gpt_jax.runs.content import Figure, Table, Timeline, TokenizedSentence
from gpt_jax.runs.info import write_json
from gpt_jax.runs.metrics import MetricsWriter


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load.load_run(write_run(tmp_path_factory.mktemp("runs") / "other", steps=200, seed=1))


class Outline(html.parser.HTMLParser):
    """The tags of a page that must be closed, and what it would ask a network for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.ids, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_the_three_forms_say_the_same(workdir, run):
    path = report.write_report(workdir)
    text = path.read_text()
    assert len(text) < 2_000_000
    outline = Outline(text)
    assert (outline.open, outline.asked) == ([], [])
    assert len(set(outline.ids)) == len(outline.ids)
    said = json.loads(path.with_suffix(".json").read_text())
    shown, markdown = set(outline.text), path.with_suffix(".md").read_text()
    assert [section["title"] for section in said["sections"]] == list(sections.SECTIONS)
    for section in said["sections"]:
        for block in section["blocks"]:
            table = block["table"] if block["kind"] == "figure" else block if block["kind"] == "table" else {"rows": []}
            for cell in {cell for row in table["rows"] for cell in row} - {""}:
                written = f"{cell:,}" if isinstance(cell, int) else cell
                assert written in shown
                assert written in markdown
    drawn = [block for section in said["sections"] for block in section["blocks"] if block["kind"] == "figure"]
    assert json.loads(re.search(r'id="charts">(.*?)</script>', text)[1]) == [figure["chart"] for figure in drawn]
    assert {figure["chart"]["kind"] for figure in drawn} == {"lines", "heatmap", "bars"}


def test_no_text_of_a_run_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!-- {{library}} & \ud800"
    write_json(tmp_path / "run.json", {"run_id": evil, "command": evil})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 1.0, f"grad_norm/{evil}": 1.0})
        writer.sample(1, evil, evil, tokens=1, seconds=0.1)
    text = report.write_report(tmp_path).read_text()
    assert text.count("<script") == 3
    assert "<script>alert" not in text
    assert Outline(text).open == []


def test_a_thinned_line_keeps_its_spikes_and_ends():
    x, y = np.arange(50_000), np.sin(np.arange(50_000) / 1e4)
    y[31_415], y[27_182] = 100, -100
    at, kept = charts.thin(x, y)
    assert len(at) <= charts.MOST_POINTS + 2
    assert (kept.max(), kept.min(), at[0], at[-1]) == (100, -100, 0, 49_999)
    np.testing.assert_array_equal(kept, y[at])


def test_a_mean_stands_in_the_middle_of_its_window(tmp_path):
    """The smoothed line of a straight loss lies on it, and does not trail behind."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 121):
            writer.write(step, "train", {"loss": 9.0 - step / 100})
    [figure] = charts.loss(load.load_run(tmp_path))
    mean = next(line for line in figure.chart.lines if "mean" in line.name)
    np.testing.assert_allclose(mean.y, 9.0 - (np.array(mean.x[0]) - 0.5) / 100, atol=1e-3)
    assert (mean.x[0][0], mean.x[0][-1]) == (26, 96)


def test_the_map_of_layers_shows_the_spike(run):
    [figure] = charts.layer_norms(run)
    values = np.array(figure.chart.values)
    layer, column = np.unravel_index(values.argmax(), values.shape)
    assert figure.chart.y[layer] == "h_1"
    assert int(figure.chart.x[column - 1]) < SPIKE_STEP <= int(figure.chart.x[column])


def killed_run(folder):
    """Two parts: 100 steps of 1 s, of which a kill cost the last 20; an hour later, from step 80 to 160.

    Each part starts in 10 s and compiles for 4; an evaluation and a checkpoint are in the first, a save in the last.
    """
    lines = [{"step": 0, "split": "event", "text": "started", "time": 1010.0, "start_seconds": 10.0}]
    for step in range(1, 81):
        now = 1014.0 + step + (3 if step > 50 else 0)
        logged = {"step_ms": 5000.0 if step == 1 else 1000.0, "data_ms": 100.0} if step == 1 or step % 20 == 0 else {}
        logged |= {"eval_ms": 2000.0, "checkpoint_ms": 1000.0} if step == 60 else {}
        lines.append({"step": step, "split": "train", "time": now, "loss": 5.0, **logged})
    lost = {"start_seconds": 10.0, "lost_steps": 20, "lost_seconds": 20.0}
    lines.append({"step": 80, "split": "event", "text": "resumed from 80", "time": 4800.0, **lost})
    for step in range(81, 161):
        logged = {"step_ms": 5000.0 if step == 81 else 1000.0, "data_ms": 0.0} if step == 81 or step % 20 == 0 else {}
        lines.append({"step": step, "split": "train", "time": 4804.0 + step - 80, "loss": 5.0, **logged})
    lines.append({"step": 160, "split": "event", "text": "completed", "time": 4886.0, "checkpoint_ms": 2000.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load.load_run(folder)


def test_the_bar_adds_up_to_the_time_in_which_a_process_ran(tmp_path):
    parts = dict(wall_time.wall_time(killed_run(tmp_path)))
    assert parts == {
        "start": 20.0,
        "compilation": 8.0,
        "steps": pytest.approx(160 - 8.0),
        "waiting for data": pytest.approx(8.0),
        "evaluation": 2.0,
        "checkpoints": 3.0,
        "lost to restarts": 20.0,
    }
    assert sum(parts.values()) == pytest.approx((10 + 87) + 20 + (10 + 86))


def test_a_run_whose_only_line_of_progress_is_of_its_first_step_has_the_time_of_its_steps(tmp_path):
    lines = [{"step": 0, "split": "event", "text": "started", "time": 1010.0, "start_seconds": 10.0}]
    for step in range(1, 7):
        logged = {"step_ms": 14_000.0, "data_ms": 0.0} if step == 1 else {}
        lines.append({"step": step, "split": "train", "time": 1023.4 + 0.6 * step, "loss": 5.0, **logged})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load.load_run(tmp_path)
    parts = {name: seconds for name, seconds in wall_time.wall_time(run) if seconds > 1e-6}
    assert parts == pytest.approx({"start": 10.0, "compilation": 13.4, "steps": 6 * 0.6})
    assert wall_time.step_times(run) == pytest.approx([600.0] * 5)


def test_a_resumed_run_is_one_curve_over_the_time_that_it_ran(tmp_path):
    elapsed = wall_time.running_seconds(killed_run(tmp_path))
    assert (np.diff(elapsed) > 0).all()
    assert elapsed[79] == pytest.approx(10 + 87)
    assert elapsed[80] == pytest.approx(10 + 87 + 20 + 10 + 5)


def test_an_old_run_has_a_bar_of_what_it_recorded(run):
    parts = dict(wall_time.wall_time(run))
    assert set(parts) == {"compilation", "steps", "waiting for data", "evaluation", "samples", "checkpoints"}
    assert math.fsum(parts.values()) == pytest.approx(0.9 + 599 * 0.01 + 6 * 0.5 + 6 * 0.2 + 13 * 0.03)


def test_a_comparison_has_samples_of_every_run(run):
    def sampled(*steps: int) -> load.RunData:
        samples = [{"prompt": "moon?", "step": step, "text": f"at {step}"} for step in steps]
        return load.dataclasses.replace(run, samples=samples)

    [_, table] = comparison.samples([("a", sampled(60, 75)), ("b", sampled(20)), ("c", sampled(6))])
    assert [list(row) for row in table.rows] == [
        [6, "-", "-", "at 6"],
        [20, "-", "at 20", "-"],
        [60, "at 60", "-", "-"],
        [75, "at 75", "-", "-"],
    ]


def test_a_tokenizer_is_shown_by_what_it_does(tmp_path):
    from fake_decoder import make_tokenizer

    from gpt_jax.data.tokenizer import save

    write_run(tmp_path, steps=1)
    save(make_tokenizer(), tmp_path / "tokenizer.json")
    blocks = sections.tokens(load.load_run(tmp_path))
    [shown] = [block for block in blocks if isinstance(block, TokenizedSentence)]
    assert "".join(piece for piece, _ in shown.pieces).replace("\ufffd", "") == sections.SENTENCE.replace("ï", "")
    (tmp_path / "tokenizer.json").write_text("{")
    [said] = sections.tokens(load.load_run(tmp_path))
    assert "is damaged" in said.text


def test_a_config_is_told_from_its_file(tmp_path):
    write_run(tmp_path, steps=1)
    info = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "run.json", info | {"config_file": {"path": "configs/x.py", "values": {"batch_size": 16}}})
    first, changed, every = sections.configuration(load.load_run(tmp_path))
    assert "configs/x.py" in first.text
    assert changed.rows == (("batch_size", "16", "4"),)
    assert len(every.rows) > 5


def test_samples_are_a_timeline_a_prompt(run):
    [timeline] = sections.samples(run)
    assert isinstance(timeline, Timeline)
    assert [said for said, _ in timeline.answers] == ["Step 100", "Step 300", "Step 600"]


def test_runs_beside_each_other(run, other):
    made = comparison.compare_runs([run, other])
    by_title = {section.title: section.blocks for section in made.sections}
    [loss] = [block for block in by_title["Loss"] if isinstance(block, Figure)]
    assert loss.chart.x_names == ("step", "tokens", "minutes")
    assert [line.name for line in loss.chart.lines] == [
        f"{name}: {what}" for name in ("plain", "other") for what in ("training", "validation")
    ]
    for line in loss.chart.lines:
        assert line.x[1] == [step * 4 * 32 for step in line.x[0]]
    assert by_title["What differs in the configs"][0].text == "All settings are the same."
    [table] = [block for block in by_title["Figures"] if isinstance(block, Table)]
    assert ("steps", "600", "200") in table.rows
    answers = next(block for block in by_title["Samples"] if isinstance(block, Table))
    assert answers.columns == ("step", "plain", "other")
    assert answers.rows[-1] == (600, "Live each day as if it were whole.", "-")
    assert Outline(page.render(made)).asked == []


def test_only_what_differs_is_compared(run, other):
    changed = {**other.config, "batch_size": 8, "extra": 1}
    [table] = comparison.differences([("a", run), ("b", load.dataclasses.replace(other, config=changed))])
    assert table.rows == (("batch_size", "4", "8"), ("extra", "-", "1"))


PROFILE = {
    "step": 100,
    "device": "a GPU",
    "bytes_per_second": 1e12,
    "flops_per_second": 1e14,
    "dispatches": [
        {"label": label, "scope": "", "phase": phase, "layer": layer, "seconds": s, "bytes": b, "flops": f}
        for label, phase, layer, s, b, f in (
            ("matmul of 8x8", "forward", "h_0", 3e-3, 1e8, 1e11),
            ("matmul of 16x8", "backward", "h_0", 5e-3, 1e8, 3e11),
            ("add,2 of 64", "backward", "", 2e-3, 1.5e9, 0),
        )
    ],
}


def test_kernels_stand_beside_their_floors(tmp_path):
    write_run(tmp_path, steps=1)
    (tmp_path / "profile").mkdir()
    write_json(tmp_path / kernel_floors.PROFILE_FILE, PROFILE)
    figure, phases, layers = kernel_floors.section(load.load_run(tmp_path))
    assert "one dispatch at a time: 10.000 ms, of which the floor is 5.500; as the run does it, " in figure.description
    assert figure.chart.categories == ("matmul", "add")
    assert figure.chart.series == (("time", [8.0, 2.0]), ("floor", [4.0, 1.5]))
    assert figure.table.rows == (
        ("matmul", 2, "8.000", "4.000", "4.000", "FLOPs"),
        ("add", 1, "2.000", "1.500", "0.500", "bytes"),
        ("all", 3, "10.000", "5.500", "4.500", ""),
    )
    assert phases.rows == (("backward", 2, "7.000", "70.0%"), ("forward", 1, "3.000", "30.0%"))
    assert layers.rows[0] == ("h_0", 2, "8.000", "80.0%")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispatches": [{"label": "x"}]}, r"dispatches\[0\] has no label, seconds, bytes and flops"),
        ({"bytes_per_second": 0}, "lacks bytes_per_second"),
        ({"flops_per_second": "fast"}, "flops_per_second cannot be text"),
    ],
)
def test_a_damaged_profile_is_named(change, message, tmp_path):
    write_json(tmp_path / "kernels.json", PROFILE | change)
    with pytest.raises(UserError, match=message):
        kernel_floors.read_profile(tmp_path / "kernels.json")
