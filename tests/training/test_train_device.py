"""Runs whose device fails, is full or cannot do what they ask for: one line each, and nothing is lost."""

import contextlib
import json
import types

import jax
import jax.numpy as jnp
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from whole_run import configuration

from gpt_jax import backend
from gpt_jax.distributed.processes import ALONE
from gpt_jax.errors import UserError
from gpt_jax.runs.metrics import read_lines
from gpt_jax.training import programs
from gpt_jax.training.failures import TrainingFailed, remedies, smaller
from gpt_jax.training.train import DeviceFailure, train_and_evaluate
from gpt_jax.training.trainer import Trainer
from vk_kernels.bridge import jit
from vk_kernels.errors import BufferSizeError, DeviceLostError, FeatureError, OutOfMemoryError
from vk_kernels.runtime import physical_device
from vk_kernels.runtime.memory import Memory
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.runtime.queue import Queue

# The programs, and so their kernels, are those of test_train_vulkan.py.
SHORT = [f"--config.{change}" for change in ("num_steps=6", "sample.every=4", "checkpoint.every=2", "eval.every=6")]


def after(calls: int, original, error: Exception):
    """A method that raises from a number of calls on."""
    count = iter(range(calls))

    def call(*args, **kwargs):
        if next(count, None) is None:
            raise error
        return original(*args, **kwargs)

    return call


def last_checkpoint(workdir) -> int | None:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def assert_ended_whole(workdir, line: str) -> None:
    """A failed run: one line, also in its log, that names the last checkpoint on disk; the files as they must be."""
    assert "\n" not in line
    step = last_checkpoint(workdir)
    if step is None:
        assert "no checkpoint was written yet" in line
    else:
        assert f"the last checkpoint is of step {step}, --workdir={workdir} goes on from it" in line
    assert (workdir / "log.txt").read_text().endswith(f"error: {line}\n")
    assert json.loads((workdir / "run.json").read_text())["status"] == "failed"


@pytest.fixture
def vulkan(monkeypatch):
    """The flags of a run through Vulkan; the process's device is opened anew for it, and closed in the end."""
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    open_device().close()
    yield [*SHORT, "--config.backend=vulkan"]
    monkeypatch.undo()
    open_device(SELECTOR).close()


@needs_vulkan
@pytest.mark.parametrize("phase", ["evaluate", "sample", "save"])
def test_a_device_that_is_lost_costs_one_line_whatever_it_was_doing(phase, vulkan, corpus, tmp_path, monkeypatch):
    """As real drivers do, it answers every later call with the same error."""
    made, compiled = [], jit.Compiled.__init__
    monkeypatch.setattr(jit.Compiled, "__init__", lambda self, *args: made.append(self) or compiled(self, *args))
    lost = DeviceLostError("the device was lost while running attention; open it again to go on")
    original = getattr(Trainer, phase)

    def lose(self, *args):
        if self.step >= 4 or phase == "evaluate":
            for name in ("_await", "completed"):
                monkeypatch.setattr(Queue, name, after(0, None, lost))
        return original(self, *args)

    monkeypatch.setattr(Trainer, phase, lose)
    with pytest.raises(TrainingFailed) as failed:
        train_and_evaluate(configuration(corpus, *vulkan), tmp_path)
    line = str(failed.value)
    assert_ended_whole(tmp_path, line)
    assert "the device was lost while running attention" in line
    assert "--config.vulkan.submit_ms=500" in line
    assert "config.batch_size (now 4)" in line
    steps = [record["step"] for record in read_lines(tmp_path / "metrics.jsonl") if record["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    if phase == "sample":
        assert len(steps) == 4
        assert len(made) == 4  # train, evaluation and diagnostics, planned before the data, and the decoder's first one
    monkeypatch.undo()  # the device closes as it is


@needs_vulkan
def test_a_full_device_is_found_out_before_the_data(vulkan, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.data.token_cache.prepare", None)
    monkeypatch.setattr(Memory, "_allocated", after(0, None, OutOfMemoryError("no room for a buffer")))
    with pytest.raises(TrainingFailed, match="no room for a buffer") as failed:
        train_and_evaluate(configuration(corpus, *vulkan), tmp_path)
    assert_ended_whole(tmp_path, str(failed.value))
    for name in ("batch_size", "accumulate_steps", "model.block_size"):
        assert f"config.{name}" in str(failed.value)


@needs_vulkan
def test_a_device_that_fills_up_later_ends_the_run(vulkan, corpus, tmp_path, monkeypatch):
    original = Trainer.sample

    def fill(self):
        monkeypatch.setattr(Memory, "_allocated", after(0, None, OutOfMemoryError("no room for a buffer")))
        return original(self)

    monkeypatch.setattr(Trainer, "sample", fill)
    with pytest.raises(TrainingFailed, match=r"step 4: .*no room for a buffer; these take less memory: ") as failed:
        train_and_evaluate(configuration(corpus, *vulkan), tmp_path)
    assert_ended_whole(tmp_path, str(failed.value))


@needs_vulkan
def test_what_is_too_large_for_a_buffer_is_answered_with_values_that_were_tried(vulkan, corpus, monkeypatch, tmp_path):
    query = physical_device.query_limits

    def narrow(*args):
        found = query(*args)
        return type(found)(**{**vars(found), "storage_buffer_range": 60_000})

    monkeypatch.setattr(physical_device, "query_limits", narrow)
    config = configuration(corpus, *vulkan)
    with pytest.raises(TrainingFailed, match=r"takes at most 60,000|a buffer there at most 60,000") as failed:
        train_and_evaluate(config, tmp_path)
    assert_ended_whole(tmp_path, str(failed.value))
    assert "was tried and is enough" in str(failed.value)
    suggested = int(str(failed.value).split("--config.batch_size=")[1].split()[0])
    assert suggested in (1, 2)  # by how much scratch the device's products take
    with contextlib.ExitStack() as stack:
        entered = backend.enter_backend("vulkan", "highest", stack)
        for batch_size in (suggested, 2 * suggested):  # the largest that is enough, and no other than was said
            config.batch_size = batch_size
            assert (programs.plan_programs(config, entered)[1] is None) == (batch_size <= suggested)


def test_a_folder_that_was_removed_meanwhile_is_not_made_again(corpus, tmp_path):
    """A device that fails then still costs one line."""
    run = tmp_path / "run"
    named = types.SimpleNamespace(device={"platform": "cpu", "kind": "cpu", "count": 1}, peak_bytes=lambda: None)
    failed = DeviceFailure(configuration(corpus), run, named, ALONE).ended_by("the device was lost")
    assert str(failed) == f"the device was lost; {run} is gone, and what was saved in it"
    assert not run.exists()


def test_more_parts_are_tried_before_a_smaller_batch(corpus):
    config = configuration(corpus, "--config.batch_size=12", "--config.accumulate_steps=2")
    parts, batches = smaller(config)
    assert [change["accumulate_steps"] for change in parts] == [4, 12]
    assert [change["batch_size"] for change in batches] == [6, 3, 1]


def test_remedies_are_those_that_the_config_leaves(corpus):
    config = configuration(corpus)
    full = "these take less memory: a smaller config.batch_size (now 4) or config.model.block_size (24)"
    both = f"{full}, a larger config.accumulate_steps (1), config.model.dtype=bfloat16"
    assert remedies(OutOfMemoryError(), config) == remedies(MemoryError(), config) == both
    assert remedies(BufferSizeError(), config).startswith("these make arrays smaller: ")
    assert remedies(FeatureError(), config) == "--config.backend=xla trains without Vulkan"
    config.accumulate_steps, config.model.dtype = 4, "bfloat16"
    assert remedies(OutOfMemoryError(), config) == full
    assert "submit_ms=500 cuts it" in remedies(DeviceLostError(), config, 2.0)
    config.vulkan.submit_ms = 100.0
    assert "submit_ms=50 cuts it" in remedies(DeviceLostError(), config, 2.0)
    assert "(the last took 10 ms)" in remedies(DeviceLostError(), config, 0.01)


@pytest.mark.parametrize("chosen", ["vulkan", "auto"])
@needs_vulkan
def test_a_head_wider_than_the_kernels_take_is_said_before_any_work(chosen, vulkan, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_choose", lambda: ("vulkan", "auto: a GPU that JAX itself does not serve"))
    wide = ["--config.model.embed_dim=160", "--config.model.num_heads=1", f"--config.backend={chosen}"]
    expected = r"config.model.embed_dim=160 over config.model.num_heads=1 .* at most 128: num_heads of 2 or more"
    with pytest.raises(UserError, match=expected):
        train_and_evaluate(configuration(corpus, *vulkan, *wide), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_vulkan
def test_what_else_kernels_or_device_cannot_do_is_said_before_any_work(vulkan, corpus, tmp_path, monkeypatch):
    lacking, large = FeatureError("the device lacks 16-bit storage"), ValueError("takes 16,711,680 tokens at most")
    model = "a smaller config.model.block_size, embed_dim or vocab_size, or --config.backend=xla"
    for error, way_out in ((lacking, "--config.backend=xla"), (large, f"config.batch_size=1 and more .*: {model}")):
        monkeypatch.setattr(programs, "_plan", after(0, None, error))
        with pytest.raises(UserError, match=f"{error}; {way_out}"):
            train_and_evaluate(configuration(corpus, *vulkan), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "possible", "way_out"),
    [
        (OutOfMemoryError(), lambda config: config.accumulate_steps >= 2, "--config.accumulate_steps=2 was tried"),
        (OutOfMemoryError(), lambda config: config.batch_size <= 1, "--config.batch_size=1 was tried"),
        (FeatureError(), lambda config: config.model.dtype == "float32", "--config.model.dtype=float32 was tried"),
    ],
)
@needs_vulkan
def test_what_is_named_as_enough_is_the_least_change_that_is(error, possible, way_out, vulkan, corpus, monkeypatch):
    def plan(config, *_):
        if not possible(config):
            raise error

    monkeypatch.setattr(programs, "_plan", plan)
    config = configuration(corpus, *vulkan, "--config.model.dtype=bfloat16")
    with contextlib.ExitStack() as stack:
        entered = backend.enter_backend("vulkan", "highest", stack)
        assert programs._way_out(error, config, entered).startswith(f"{way_out} and is enough")


@pytest.mark.parametrize(
    ("where", "line"),
    [("gpt_jax.training.trainer.Trainer.evaluate", "step 0: "), ("gpt_jax.training.train.initial_state", "")],
)
def test_memory_that_xla_does_not_get_costs_one_line_too(where, line, corpus, tmp_path, monkeypatch):
    """Also before the run has begun."""
    monkeypatch.setattr(where, lambda *_: jax.jit(lambda: jnp.zeros(1 << 46))())
    with pytest.raises(TrainingFailed, match=f"^{line}RESOURCE_EXHAUSTED: .*config.batch_size") as failed:
        train_and_evaluate(configuration(corpus, *SHORT, "--config.backend=xla"), tmp_path / "run")
    assert_ended_whole(tmp_path / "run", str(failed.value))
