"""The whole of training as Vulkan programs: step, evaluation, diagnostics and sampling, against XLA."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profiles import NIGHT, night
from vulkan_devices import SELECTOR, needs_vulkan
from whole_run import configuration

import vk_kernels
from gpt_jax.inference.decoder import decode_chunk, empty_state
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.model.kv_cache import decoding_weights
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import diagnostics_step, eval_step, init_state, nonfinite_places, train_step

pytestmark = needs_vulkan

STEPS, REPLAYS = 8, 100 if NIGHT else 12
# Those of whole runs, whose kernels these are then: each more takes a CPU device a second to compile.
CONFIG = configuration(Path("nowhere"))
MODEL = ModelConfig.from_config(CONFIG.model)


def make_batch(i: int, rows: int = 4) -> dict[str, np.ndarray]:
    shape = rows, MODEL.block_size + 1
    stream = np.random.default_rng(i).integers(0, MODEL.vocab_size, shape).astype(np.int32)
    targets = stream[:, 1:].copy()
    targets[0, :3] = -1
    return {"inputs": stream[:, :-1].copy(), "targets": targets}


@functools.cache
def make_step(config: ModelConfig = MODEL, **options):
    """(state on the host, step)."""
    model, optimizer = GPT(config), make_optimizer(CONFIG)
    options |= {"schedule": learning_rate_schedule(CONFIG), "seed": CONFIG.seed}
    step = functools.partial(train_step, model=model, optimizer=optimizer, **options)
    state = jax.jit(lambda: init_state(init_params(model, CONFIG.seed), optimizer))()
    return jax.tree.map(np.asarray, state), step


@functools.cache
def vulkan_step():
    return vk_kernels.jit(make_step()[1], donate_argnames="state", device=SELECTOR)


def run(step, state, steps: int = STEPS):
    metrics = []
    for i in range(steps):
        state, found = step(state, make_batch(i))
        metrics.append(found)
    return jax.tree.map(np.asarray, (state, metrics))


def start():
    return vk_kernels.device_put(make_step()[0], SELECTOR)


@functools.cache
def vulkan_run():
    return run(vulkan_step(), start())


def close(found, expected, rtol: float, atol: float = 0) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(found), paths, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_losses_and_norms_are_those_of_xla():
    state, step = make_step()
    xla_state, expected = run(jax.jit(step), state)
    found_state, found = vulkan_run()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        close(ours, theirs, rtol=2e-4)
    close(found_state.params, xla_state.params, rtol=1e-3, atol=2e-5)
    for name in ("step", "skipped", "skipped_in_a_row"):
        assert getattr(found_state, name) == getattr(xla_state, name)


def same_bits(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())


def test_replays_are_fresh_recordings_in_an_arena_of_nan_bit_for_bit():
    step, compiled = vulkan_step(), vulkan_step().lower(make_step()[0], make_batch(0))
    assert compiled.cost().arena_bytes > 0

    def fresh(state, batch):
        executable = compiled.compile().executable
        executable._recordings.clear()
        with compiled.device.pooled_recorder() as recorder:
            for block in executable.arena:
                recorder.fill(block, 0xFFFFFFFF)
            recorder.submit()
        return step(state, batch)

    replayed = run(step, start(), REPLAYS)
    same_bits(run(fresh, start(), REPLAYS), replayed)
    same_bits(run(step, start(), REPLAYS), replayed)


def test_steps_chained_in_one_submission_are_those_steps_bit_for_bit():
    step = make_step()[1]
    chained = vk_kernels.jit(lambda *args: jax.lax.scan(step, *args), donate_argnums=0, device=SELECTOR)
    batches = jax.tree.map(lambda *xs: np.stack(xs), *map(make_batch, range(2)))
    state, metrics = jax.tree.map(np.asarray, chained(start(), batches))
    expected_state, expected = run(vulkan_step(), start(), 2)
    same_bits(state, expected_state)
    same_bits(metrics, jax.tree.map(lambda *xs: np.stack(xs), *expected))


def test_the_state_stays_in_its_memory():
    state = start()
    before = [leaf.buffer.offset for leaf in jax.tree.leaves(state)]
    state, _ = vulkan_step()(state, make_batch(0))
    assert [leaf.buffer.offset for leaf in jax.tree.leaves(state)] == before


def test_a_loss_that_is_not_finite_changes_nothing():
    state = jax.tree.map(np.array, make_step()[0])
    state.params["wte"][make_batch(0)["inputs"][1, 0]] = np.nan
    after, metrics = vulkan_step()(vk_kernels.device_put(state, SELECTOR), make_batch(0))
    after = jax.tree.map(np.asarray, after)
    assert not metrics["finite"]
    assert (after.step, after.skipped, after.skipped_in_a_row) == (1, 1, 1)
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_batch_without_a_target_changes_nothing():
    state, batch = jax.tree.map(np.array, make_step()[0]), make_batch(0)
    batch = batch | {"targets": np.full_like(batch["targets"], -1)}
    after, metrics = vulkan_step()(vk_kernels.device_put(state, SELECTOR), batch)
    after = jax.tree.map(np.asarray, after)
    assert metrics["finite"]
    assert np.isnan(metrics["loss"])
    assert (after.step, after.skipped, after.skipped_in_a_row) == (1, 1, 0)
    same_bits((after.params, after.opt_state), (state.params, state.opt_state))


@night
@pytest.mark.parametrize(
    ("changes", "options", "rtol"),
    [
        ({"tie_head": True, "use_bias": True, "remat": True}, {"accumulate_steps": 2}, 1e-5),
        ({"dtype": "bfloat16"}, {}, 3e-3),
    ],
)
def test_every_kind_of_model_trains(changes, options, rtol):
    config = ModelConfig(**{**MODEL.__dict__, **changes})
    state, step = make_step(config, **options)
    _, expected = run(jax.jit(step), state, 3)
    _, found = run(vk_kernels.jit(step, donate_argnums=0, device=SELECTOR), state, 3)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=rtol)


def test_evaluation_and_diagnostics():
    params = make_step()[0].params

    def all_of_them(*args):
        return [function(*args, model=GPT(MODEL)) for function in (eval_step, diagnostics_step, nonfinite_places)]

    found = jax.tree.map(np.asarray, vk_kernels.jit(all_of_them, device=SELECTOR)(params, make_batch(0)))
    close(found, jax.tree.map(np.asarray, jax.jit(all_of_them)(params, make_batch(0))), rtol=1e-5, atol=1e-6)


def make_decoding(alternatives: int = 0):
    """A function that draws four tokens of four texts, and its arguments: a greedy text, and three that are drawn."""
    state = empty_state(MODEL, 4)
    controls = state.controls._replace(temperature=jnp.array([0, 1, 0.8, 1.5]), top_k=jnp.array([0, 0, 5, 40]))
    state = state._replace(
        texts=state.texts._replace(tokens=jnp.arange(4, dtype=jnp.int32), left=jnp.array([9, 3, 9, 9], jnp.int32)),
        seeds=jnp.arange(4, dtype=jnp.uint32),
        controls=controls,
    )
    draw = functools.partial(decode_chunk, config=MODEL, rows=4, chunk=4, alternatives=alternatives)
    return draw, (decoding_weights(make_step()[0].params, MODEL), state)


def test_tokens_drawn_are_those_of_xla():
    draw, args = make_decoding()
    _, ours, left = vk_kernels.jit(draw, device=SELECTOR)(*args)
    _, theirs, expected = jax.jit(draw)(*args)
    np.testing.assert_array_equal(np.asarray(ours.tokens), theirs.tokens)
    np.testing.assert_allclose(np.asarray(ours.logprobs), theirs.logprobs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(left), expected)
    assert (np.asarray(theirs.tokens) == -1).sum(axis=0).tolist() == [0, 1, 0, 0]  # the second had three left
