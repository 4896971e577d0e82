"""Whole runs with `backend=vulkan`: every step one submission. The same as through XLA, and killed and resumed."""

import json
import signal
import subprocess

import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from whole_run import (
    ROOT,
    assert_same_results,
    environment,
    paused_command,
    run,
    train_lines,
    wait_until,
)

from gpt_jax.runs import kernel_floors
from gpt_jax.runs.load import load_run
from gpt_jax.runs.metrics import read_lines

pytestmark = needs_vulkan


@pytest.fixture(scope="module", name="vulkan")
def vulkan_run(corpus, tmp_path_factory):
    """A run as `straight`, with a profile, through Vulkan."""
    workdir = tmp_path_factory.mktemp("vulkan") / "run"
    done = run(corpus, workdir, "--config.backend=vulkan", "--config.log.profile_step=3", VK_KERNELS_DEVICE=SELECTOR)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_is_the_same_as_through_xla(straight, vulkan):
    lines, expected = train_lines(vulkan), train_lines(straight)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, 61))
    # The norm of the gradient magnifies roundings: from step 20 on, XLA's with and without its optimizations are as far
    # as 1.5e-4 apart.
    for name, rtol in {"loss": 1e-4, "grad_norm": 5e-4, "param_norm": 1e-4, "learning_rate": 1e-4}.items():
        found, wanted = (np.array([line[name] for line in part]) for part in (lines, expected))
        np.testing.assert_allclose(found[:20], wanted[:20], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=name)
    info = json.loads((vulkan / "run.json").read_text())
    assert info["backend"].startswith("vulkan (asked for) on 1 x ")
    assert info["device"]["platform"] == "vulkan"
    assert info["peak_memory_bytes"]["device"] > 12 * info["parameters"]  # f32 parameters and two moments
    answers, expected_answers = (
        [(line["step"], line["prompt"]) for line in read_lines(folder / "samples.jsonl")]
        for folder in (vulkan, straight)
    )
    assert answers == expected_answers


def test_a_profile_tells_device_time_by_dispatch(vulkan):
    events = json.loads((vulkan / "profile" / "trace.json").read_text())["traceEvents"]
    assert len(events) > 20
    assert any("attention_backward" in event["name"] for event in events)
    slices = {event["name"] for event in events if event["ph"] == "X"}
    assert {"forward", "backward", "optimizer", "GPT", "h_0"} <= slices
    profile = kernel_floors.read_profile(vulkan / kernel_floors.PROFILE_FILE)
    assert len(profile["dispatches"]) == json.loads((vulkan / "run.json").read_text())["operations"]["dispatches"]
    assert {dispatch["phase"] for dispatch in profile["dispatches"]} > {"forward", "backward", "optimizer"}
    kernels = kernel_floors.kernel_times(profile)
    assert any(kernel.by_flops > 0 for kernel in kernels if kernel.name.startswith("matmul"))
    assert all(kernel.by_bytes > 0 for kernel in kernels)
    [figure, phases, layers] = kernel_floors.section(load_run(vulkan))
    assert figure.chart.categories[0] == kernels[0].name
    assert {row[0] for row in phases.rows} >= {"forward", "backward", "optimizer"}
    assert {row[0] for row in layers.rows} >= {"GPT", "h_0"}
    assert "device time of step 3" in (vulkan / "log.txt").read_text()


def test_killed_and_resumed_is_bit_identical_also_when_its_steps_are_cut_from_then_on(vulkan, corpus, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        paused_command(15, corpus, workdir, "--config.backend=vulkan"),
        cwd=ROOT,
        env=environment(VK_KERNELS_DEVICE=SELECTOR),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((workdir / "checkpoints" / "10").is_dir, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = "--config.vulkan.submit_ms=0.001"
    done = run(corpus, workdir, "--config.backend=vulkan", cut, VK_KERNELS_DEVICE=SELECTOR)
    assert done.returncode == 0, done.stderr
    assert "config.vulkan.submit_ms was 0.0, now 0.001" in done.stdout
    assert "initialised from this run's checkpoint at step" in done.stdout
    assert_same_results(vulkan, workdir)
