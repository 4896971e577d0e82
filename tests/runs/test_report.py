import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from synthetic_run import CONFIG, SPIKE_LAYER, SPIKE_STEP, loss_at, write_run
from waiting import PATIENCE

from gpt_jax import report as report_command
from gpt_jax.errors import UserError
from gpt_jax.runs import comparison, load, markdown, plots, report, sections
from gpt_jax.runs.analysis import text_statistics
from gpt_jax.runs.content import NO_DATA, Table
from gpt_jax.runs.follow import FollowedRun
from gpt_jax.runs.info import write_json
from gpt_jax.runs.metrics import MetricsWriter
from gpt_jax.runs.summary import summarise

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def df(workdir, tmp_path_factory):
    return load.load_metrics(workdir, write_run(tmp_path_factory.mktemp("runs") / "other", steps=200, seed=1))


def rows(blocks):
    """The cells of the first table of a section, written out, by the first cell of their row."""
    table = next(block for block in blocks if isinstance(block, Table))
    written = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in table.rows]
    return {first: rest for first, *rest in written}


def text_of(blocks):
    return markdown.render_blocks(blocks)


def empty_run(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    return load.load_run(tmp_path)


def test_a_report_has_every_section(workdir):
    path = report.write_report(workdir)
    text = path.with_suffix(".md").read_text()
    assert path == workdir / "report.html"
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(sections.SECTIONS)
    assert [part.partition("\n")[0] for part in text.split("\n## ") if NO_DATA in part] == ["Tokenizer"]
    assert "- status: completed\n" in text
    assert "- parameters: 6,838,784\n" in text


def test_a_run_without_data_says_so_in_each_section(tmp_path):
    run = empty_run(tmp_path)
    for name, section in sections.SECTIONS.items():
        if name not in ("Summary", "Events", "Kernels"):
            assert NO_DATA in text_of(section(run)), name


@pytest.mark.parametrize("lines", [1, 2, 30, 101, 160])
def test_a_run_is_reported_at_any_moment(workdir, tmp_path, lines):
    text = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(text[:lines]) + text[lines][:40])
    written = report.write_report(tmp_path).with_suffix(".md").read_text()
    assert f"- steps: {load.load_run(tmp_path).last_step}\n" in written


def test_loss_by_range(run):
    steps, loss = run.series("train", "loss")
    table = rows(sections.loss_by_range(run))
    assert list(table) == ["1-500", "501-600"]
    second = loss[500:]
    expected = [second[0], second[-1], second.mean(), second.min()]
    np.testing.assert_allclose([float(cell) for cell in table["501-600"]], expected, atol=5e-5)
    assert len(steps) == 600


def test_milestones(run):
    _, loss = run.series("train", "loss")
    table = rows(sections.loss_milestones(run))
    assert list(table)[:2] == ["<= 8", "<= 7"]
    assert table["<= 6"][0] == str(1 + np.argmax(loss <= 6))
    means = np.convolve(loss, np.ones(50) / 50, mode="valid")
    assert table["<= 6"][1] == str(50 + np.argmax(means <= 6))
    assert table["<= 4"] == ["not reached", "not reached"]
    assert "<= 3.5" not in table


def test_evaluation_and_checkpoints(run):
    _, loss = run.series("train", "loss")
    train, validation, gap = map(float, rows(sections.evaluation(run))["300"])
    assert train == pytest.approx(loss[250:300].mean(), abs=5e-5)
    assert validation == pytest.approx(loss_at(300) + 0.05, abs=5e-5)
    assert gap == pytest.approx(validation - train, abs=1e-4)
    assert rows(sections.checkpoints(run))["600"] == ["600", "2.5 MB", f"{loss_at(600) + 0.05:.4f} (best)"]


def test_gradient_norms_and_the_layer_of_a_spike(run):
    blocks = sections.gradient_norms(run)
    text = text_of(blocks)
    assert rows(blocks)["all"][3] == "150.0"
    assert "| > 100 | 1 | 0.2% |" in text
    assert f"| {SPIKE_STEP} | 150.0 | {SPIKE_LAYER} | 150.0 |" in text


def test_learning_rate_and_phases(run):
    assert rows(sections.learning_rate(run))["250"] == ["0.00025"]
    table = rows(sections.timing(run))
    assert table["step"] == ["13", "10.0000", "10.0000", "900.0", "6.9 s"]  # 1 step of 900 ms, 599 of 10
    assert table["evaluation"][-1] == "3.0 s"
    assert "first step, compilation included, took 900.0 ms" in text_of(sections.timing(run))
    assert "- tokens trained on: 76,800" in text_of(sections.throughput(run))


def test_peak_and_utilisation(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 8.0, "tokens_per_second": 5.0, "mfu": 0.25})
    assert "- peak of the device: not known" in text_of(sections.throughput(load.load_run(tmp_path)))
    write_json(tmp_path / "run.json", {"peak_flops": 989.4e12})
    text = text_of(sections.throughput(load.load_run(tmp_path)))
    assert "- utilisation of the device (MFU), median: 25.0%" in text_of(
        sections.infrastructure(load.load_run(tmp_path))
    )
    assert "- peak of the device: 989.4 TFLOP/s\n- model FLOPs utilisation (MFU), median: 25.0%" in text


def test_sample_statistics():
    sample = {"text": "a b a b a b", "tokens": 7, "ended": True}
    quality = text_statistics([sample, {"text": "c", "tokens": 1, "ended": None}])
    assert quality == {"tokens": 4.0, "distinct_2": 2 / 5, "repetition": 1 - 2 / 4, "ended": 1.0}
    assert text_statistics([{"text": "", "tokens": 0}])["ended"] is None


def test_sample_text_cannot_leave_its_fence(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.sample(1, "a | b\nc", "```\n# Title", tokens=3, seconds=0.1)
    text = text_of(sections.samples(load.load_run(tmp_path)))
    assert text == "**Step 1**, a \\| b c\n\n````text\n```\n# Title\n````"


def test_notes_of_a_healthy_run(run):
    notes = text_of(sections.notes(run))
    for phrase in (
        "The first loss is 8.294; guessing over 4,000 tokens has 8.294: as it should be.",
        "Every loss and gradient was finite.",
        "Gradient norms above 10: 1 (0.2% of the steps), most often from h_1 (1).",
        "Still improving",
        "No overfitting",
        "below the soft cap of 30",
        "the input pipeline keeps up",
    ):
        assert phrase in notes


def test_notes_of_a_sick_run(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    write_json(tmp_path / "run.json", {"status": "failed"})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 301):
            bad = step > 295
            values = {"loss": float("nan") if bad else 2.0 + step / 100, "finite": not bad}
            values |= {"grad_norm": float("inf") if bad else 0.5}
            if step % 10 == 0:
                values |= {"step_ms": 100.0 if step == 200 else 10.0, "data_ms": 5.0}
            writer.write(step, "train", values)
            if step % 100 == 0:
                writer.write(step, "validation", {"loss": 2 + step / 50})
        writer.write(300, "diagnostics", {"attention_max/h_0/head_0": 45.0, "attention_max/h_1/head_3": 50.0})
    notes = text_of(sections.notes(load.load_run(tmp_path)))
    for phrase in (
        "did not reach its end: failed",
        "The first loss is 2.010; guessing over 4,000 tokens has 8.294: far from it",
        "5 updates were skipped for a non-finite loss or gradient, the first at step 296",
        "No gradient norm was above 10; the largest is 0.50",
        "Getting worse",
        "Overfitting: validation loss was best at step 100 (4.0000), now 8.0000",
        "50.0 (h_1/head_3), beyond the soft cap of 30",
        "Waiting for data is 50.0% of a step: raise config.data.prefetch",
        "1 of 29 logging intervals took over twice the median step (at steps 200)",
    ):
        assert phrase in notes


@pytest.mark.slow
def test_command_line(workdir, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "gpt_jax.report", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    printed = command(workdir, workdir, f"--out={tmp_path}")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout == f"{tmp_path}/comparison.html\n"
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".md", ".json"}
    failed = command(tmp_path / "absent")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(
        f"error: there is no run {tmp_path / 'absent'}: give the folder of a run, latest or b"
    )
    assert failed.stderr.count("\n") == 1
    bare = command()
    assert (bare.returncode, bare.stderr) == (2, "error: missing argument: RUN\n")


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has neither run.json nor metrics.jsonl"):
        load.load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": "high"}\n')
    with pytest.raises(UserError, match="step 1: loss is no number: 'high'"):
        load.load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": {}, "loss": 1}\n')
    with pytest.raises(UserError, match=r"step 1: split is no text: \{\}; remove the line"):
        load.load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "samples.jsonl").write_text('{"step": 7, "prompt": "a", "tokens": 3, "seconds": 1}\n')
    with pytest.raises(UserError, match="step 7: text is no text: None; remove the line"):
        load.load_run(tmp_path)


def test_numbers_that_no_float_holds_and_settings_that_are_null_are_reported(workdir, tmp_path):
    """And listed, and watched."""
    config = {**CONFIG, "batch_size": None, "model": {"block_size": None}, "optimizer": None}
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "run.json", {"peak_flops": 10**400, "starts": None, "versions": None})
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[:200]
    huge = {"step": 999, "split": "train", "loss": 10**400, "grad_norm/wte": 10**30, "tokens_per_second": 10**400}
    lines += [json.dumps(huge | {"start_seconds": 10**30})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "- steps: 999 of 600" in report.write_report(tmp_path).with_suffix(".md").read_text()
    comparison.compare_runs([load.load_run(tmp_path), load.load_run(workdir)])
    assert summarise(tmp_path).step == 999
    followed = FollowedRun(tmp_path)
    followed.read()
    assert followed.step == 999


def test_absent_values_and_nonfinite_ones(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write(2, "train", {"loss": float("inf"), "step_ms": 3.0})
        writer.write(3, "train", {"loss": 2.0, "finite": True})
    run = load.load_run(tmp_path)
    np.testing.assert_equal(run.tables["train"]["loss"], [1, np.inf, 2])
    np.testing.assert_equal(run.tables["train"]["step_ms"], [np.nan, 3, np.nan])
    np.testing.assert_equal(run.series("train", "loss"), ([1, 3], [1, 2]))
    assert run.last_step == 3


def test_unfinished_checkpoints_are_not_listed(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for name in ("100", "step_000200", "300.orbax-checkpoint-tmp-17", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [c.step for c in load.load_run(tmp_path).checkpoints] == [100, 200]


def test_layers_stand_in_forward_order():
    ordered = ["wte", "wpe", "h_0", "h_2", "h_10", "ln_f", "head"]
    assert load.forward_order([*sorted(ordered), "h_2"]) == ordered


def test_find_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("GPT_JAX_RUNS", raising=False)
    with pytest.raises(UserError, match="train one first, or set GPT_JAX_RUNS"):
        load.find_runs(tmp_path)
    for age, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        os.utime(tmp_path / name / "metrics.jsonl", (1000 - age, 1000 - age))
    assert load.find_runs(tmp_path, newest=2) == [tmp_path / "b", tmp_path / "a"]
    monkeypatch.setenv("GPT_JAX_RUNS", os.pathsep.join(["x", "y/z"]))
    assert load.find_runs(tmp_path) == [Path("x"), Path("y/z")]


def test_metrics_frame(df, run):
    assert list(df.columns[:4]) == ["run", "split", "step", "time"]
    assert df.groupby(["run", "split"], sort=False).size().to_dict() == {
        ("plain", "train"): 600,
        ("plain", "validation"): 6,
        ("plain", "diagnostics"): 6,
        ("other", "train"): 200,
        ("other", "validation"): 2,
        ("other", "diagnostics"): 2,
    }
    plain = df[(df["run"] == "plain") & (df["split"] == "train")]
    np.testing.assert_array_equal(plain["loss"], run.series("train", "loss")[1])


def test_runs_of_one_name_are_told_apart(workdir, tmp_path):
    twin = write_run(tmp_path / "plain", steps=100)
    assert set(load.load_metrics(workdir, twin)["run"]) == {str(workdir), str(twin)}
    assert len(load.load_samples(workdir, twin)) == 7


def test_smoothing_halves_a_value_in_a_half_life():
    pd = pytest.importorskip("pandas")
    step = pd.Series([0.0] * 500 + [1.0] * 10)
    assert plots.smooth(step, half_life=10).iloc[-1] == pytest.approx(0.5, abs=1e-6)
    constant = plots.smooth(pd.Series([3.0, np.nan, np.inf, 3.0]), half_life=2)
    np.testing.assert_allclose(constant, 3.0)
    assert plots.smooth(step, half_life=0) is step


def test_a_mean_of_both_sides_does_not_lag_behind_a_loss_that_falls():
    """A trailing one would show a straight line some 29 steps late, half-lives of 20 steps as they are."""
    pd = pytest.importorskip("pandas")
    straight = pd.Series(9.0 - np.arange(200) / 100, index=range(1, 201))
    np.testing.assert_allclose(plots.smooth_around(straight, 20), straight)
    step = pd.Series([0.0] * 100 + [np.nan] + [1.0] * 100)
    smoothed = plots.smooth_around(step, 5)
    assert (smoothed.iloc[0], smoothed.iloc[100], smoothed.iloc[-1]) == (0.0, 0.5, 1.0)
    np.testing.assert_allclose(smoothed + smoothed[::-1].to_numpy(), 1.0)
    assert plots.smooth_around(pd.Series([np.inf, 2.0]), 3).tolist()[1] == 2.0
    assert plots.smooth_around(step, 0) is step


def test_a_short_run_is_smoothed_over_a_fiftieth_of_it(tmp_path):
    """Half-lives of 20 steps would show the first loss at the end of a run of 30."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 31):
            writer.write(step, "train", {"loss": 9.0 - step / 10, "grad_norm": 1.0})
    short = load.load_metrics(tmp_path)
    assert plots.default_half_life(short) == 30 / 50
    assert plots.compare(short).loc["last loss"].item() == pytest.approx(6.0, abs=0.1)


def test_spikes(df):
    found = plots.spikes(df, threshold=10)
    assert found["run"].tolist() == ["plain", "other"]
    assert set(found["step"]) == {SPIKE_STEP}
    assert set(found["layer"]) == {SPIKE_LAYER}
    assert plots.spikes(df, threshold=1e4).empty
    df.loc[5, "grad_norm"] = np.nan
    worst = plots.spikes(df).iloc[0]
    df.loc[5, "grad_norm"] = 1.0
    assert worst["step"] == 6


def test_a_spike_is_in_a_layer_that_its_run_has(workdir, tmp_path):
    """Beside a deeper run, whose further layers are columns of both."""
    shallow = tmp_path / "shallow"
    with MetricsWriter(shallow, tensorboard=False) as writer:
        for step, norm in ((1, 0.5), (2, 80.0), (3, math.nan)):
            layers = {"grad_norm/wte": 0.1, "grad_norm/h_0": norm}
            writer.write(step, "train", {"loss": 1.0, "grad_norm": norm, **layers})
    found = plots.spikes(load.load_metrics(workdir, shallow))
    mine = found[found["run"] == "shallow"]
    assert mine["step"].tolist() == [3, 2]
    assert mine["layer"].tolist() == ["h_0", "h_0"]
    assert mine["layer_norm"].tolist() == [math.inf, 80.0]


def test_compare(df):
    table = plots.compare(df, steps=(1, 500))
    assert list(table.columns) == ["plain", "other"]
    assert table.loc["loss at 1", "plain"] == pytest.approx(loss_at(1))
    assert np.isnan(table.loc["loss at 500", "other"])
    assert table.loc["at step"].tolist() == [600, 200]
    assert table.loc["largest gradient norm", "other"] == pytest.approx(150, abs=0.1)


def test_a_validation_loss_that_is_not_finite_is_never_the_best_of_a_comparison(df):
    df = df.copy()
    rows = df.index[df["split"] == "validation"]
    df.loc[rows[:2], "loss"] = [np.nan, -np.inf]
    df.loc[df["run"] == "other", "loss"] = np.nan
    table = plots.compare(df, steps=(1,))
    assert table.loc["at step", "plain"] == 600
    assert np.isfinite(table.loc["best validation loss", "plain"])
    assert np.isnan(table.loc["best validation loss", "other"])


def test_last_samples_stand_side_by_side(workdir, tmp_path):
    answers = load.last_samples(workdir, write_run(tmp_path / "other", steps=100))
    assert answers.loc["How to live?"].tolist() == [
        "Live each day as if it were whole.",
        "Be well , be well , be well .",
    ]


def test_validation_gap(df):
    gap = plots.validation_gap(df)
    assert gap[["run", "step"]].to_numpy().tolist()[-2:] == [["other", 100], ["other", 200]]
    np.testing.assert_allclose(gap["gap"], gap["validation"] - gap["train"])


@pytest.mark.parametrize(
    "plot",
    [
        plots.plot_loss,
        plots.plot_validation_gap,
        plots.plot_learning_rate,
        plots.plot_grad_norm,
        plots.plot_layer_grad_norms,
        plots.plot_attention,
    ],
)
def test_every_figure_draws(df, plot, tmp_path):
    figure = plot(df)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    shown = [ax for ax in figure.axes if ax.lines or ax.images]
    assert shown
    assert all(np.isfinite(line.get_ydata()).any() for ax in shown for line in ax.lines if len(line.get_ydata()))


def test_layer_map_shows_the_spike(df):
    image = plots.plot_layer_grad_norms(df, bins=100).axes[0].images[0].get_array()
    layer, stretch = np.unravel_index(image.argmax(), image.shape)
    assert (layer, stretch) == (3, (SPIKE_STEP - 1) * 100 // 600)


def test_a_figure_without_its_data_says_so(df):
    with pytest.raises(UserError, match="run 'absent' has no diagnostics metrics; there are plain, other"):
        plots.plot_attention(df, run="absent")


def test_a_missing_notebook_package_names_the_extra(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="uv sync --extra notebook"):
        load.load_metrics(workdir)


def test_a_growing_run_can_be_read(workdir, tmp_path):
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(MetricsWriter(tmp_path, tensorboard=False))
        writer.write(1, "train", {"loss": 8.0, "grad_norm": 1.0})
        assert len(load.load_metrics(tmp_path)) == 1
        writer.write(2, "train", {"loss": 7.0, "grad_norm": 1.0})
        assert len(load.load_metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    ("out", "message"),
    [("", "--out is empty"), ("nowhere", "--out=nowhere is no folder"), ("a\0b", r"--out must be text in UTF-8")],
)
def test_a_folder_that_cannot_be_written_to_is_refused(workdir, out, message, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_string("out", out, "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(UserError, match=message):
        report_command.main(["report", str(workdir)])
