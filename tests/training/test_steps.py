"""The train step: accumulation, skipping, learning, and losses that must not move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import chat
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import (
    eval_step,
    init_state,
    loss_and_gradient,
    nonfinite_places,
    target_count,
    train_step,
)

SEED = 42
init = jax.jit(init_params, static_argnums=(0, 1))
gradient = jax.jit(loss_and_gradient, static_argnames=("model", "seed", "accumulate_steps"))
MODEL = ModelConfig(
    vocab_size=50, block_size=16, num_layers=2, num_heads=2, embed_dim=32, dropout_rate=0.1, soft_cap=30.0
)


def make_batch(seed: int = 0, rows: int = 8) -> dict[str, jax.Array]:
    stream = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, 17)).astype(np.int32)
    return {"inputs": jnp.asarray(stream[:, :-1]), "targets": jnp.asarray(stream[:, 1:])}


def untargeted(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return batch | {"targets": jnp.full_like(batch["targets"], -1)}


def make_run(model_config: ModelConfig = MODEL, learning_rate: float = 3e-3, accumulate_steps: int = 1):
    return _make_run(model_config, learning_rate, accumulate_steps)


@functools.cache
def _make_run(model_config: ModelConfig, learning_rate: float, accumulate_steps: int):
    config = chat.get_config()
    rates = {"learning_rate": learning_rate, "min_learning_rate": learning_rate / 10}
    config.optimizer.update(**rates, warmup_steps=5, decay_steps=200)
    model, optimizer = GPT(model_config), make_optimizer(config)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        schedule=learning_rate_schedule(config),
        seed=SEED,
        accumulate_steps=accumulate_steps,
    )
    return model, jax.jit(lambda: init_state(init_params(model, SEED), optimizer))(), jax.jit(step)


def test_ten_golden_losses():
    """Dropout bits, initialisation, optimizer and schedule together; a change of any of them moves these."""
    _, state, step = make_run()
    losses = []
    for i in range(10):
        state, metrics = step(state, make_batch(i % 2))
        losses.append(float(metrics["loss"]))
    golden = [3.91025, 3.91243, 3.80869, 3.82704, 3.69652, 3.71547, 3.60119, 3.62323, 3.51512, 3.53709]
    np.testing.assert_allclose(losses, golden, rtol=2e-5)


def test_overfits_one_batch():
    _, state, step = make_run(ModelConfig(**{**MODEL.__dict__, "dropout_rate": 0.0}), learning_rate=1e-2)
    first = None
    for _ in range(150):
        state, metrics = step(state, make_batch())
        first = first if first is not None else float(metrics["loss"])
    assert first > 3.8
    assert float(metrics["loss"]) < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_equals_the_big_batch(masked):
    model = GPT(ModelConfig(**{**MODEL.__dict__, "dropout_rate": 0.0}))
    params = init(model, SEED)
    batch = make_batch()
    if masked:  # parts with different numbers of targets
        batch["targets"] = batch["targets"].at[:3, :11].set(-1)
    count = target_count(batch)
    gradient_in = functools.partial(gradient, params, batch, jnp.int32(0), count, model=model, seed=SEED)
    whole_loss, whole = gradient_in()
    for parts in (2, 8):
        loss, accumulated = gradient_in(accumulate_steps=parts)
        np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), accumulated, whole)


def test_accumulated_parts_draw_their_own_dropout():
    model = GPT(MODEL)
    params = init(model, SEED)
    half = make_batch(rows=4)
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), half)
    options = {"model": model, "seed": SEED}
    loss, _ = gradient(params, doubled, jnp.int32(3), target_count(doubled), accumulate_steps=2, **options)
    count = target_count(half)
    parts = [gradient(params, half, jnp.int32(step), count, **options)[0] for step in (6, 7)]  # 3 * 2 and 3 * 2 + 1
    assert float(parts[0]) != float(parts[1])
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-6)


def test_metrics_are_the_norms_they_name():
    model, state, step = make_run()
    batch = make_batch()
    next_state, metrics = step(state, batch)
    loss, grads = gradient(state.params, batch, state.step, target_count(batch), model=model, seed=SEED)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    for layer in MODEL.layer_names:
        np.testing.assert_allclose(metrics[f"grad_norm/{layer}"], optax.tree.norm(grads[layer]), rtol=1e-4)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, next_state.params, state.params))
    np.testing.assert_allclose(metrics["update_norm"], moved, rtol=1e-3)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4 + 2.7e-3 / 5)


def test_a_nonfinite_step_changes_nothing_and_is_counted():
    model, state, step = make_run()
    state, _ = step(state, make_batch())
    good = state.params["h_1"]["mlp_in"]["kernel"]
    poisoned = state.replace(params=jax.tree.map(jnp.array, state.params))
    poisoned.params["h_1"]["mlp_in"]["kernel"] = good.at[0, 0].set(jnp.nan)
    after, metrics = step(poisoned, make_batch(1))
    assert not metrics["finite"]
    assert int(metrics["skipped_in_a_row"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, poisoned.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, poisoned.opt_state)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    twice, _ = step(after, make_batch(2))
    assert int(twice.skipped_in_a_row) == 2

    after.params["h_1"]["mlp_in"]["kernel"] = good
    recovered, metrics = step(after, make_batch(2))
    assert metrics["finite"]
    assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (1, 0)
    # The schedule counts the updates that were made: this was the second.
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4 + 2 * 2.7e-3 / 5)

    found = jax.jit(functools.partial(nonfinite_places, model=model))(poisoned.params, make_batch(1))
    assert {place for place, bad in found.items() if bad} == {"parameters of h_1", "output of h_1", "output of ln_f"}


def test_evaluation_counts_targets_and_drops_nothing_out():
    model, state, _ = make_run()
    batch = make_batch()
    batch["targets"] = batch["targets"].at[0].set(-1)
    evaluate = jax.jit(functools.partial(eval_step, model=model))
    total, count = evaluate(state.params, batch)
    assert float(count) == 7 * 16
    losses = jax.jit(functools.partial(model.apply, method="losses"))(
        {"params": state.params}, batch["inputs"], batch["targets"]
    )
    np.testing.assert_allclose(total, losses[1:].sum(), rtol=1e-6)
    assert evaluate(state.params, untargeted(batch)) == (0, 0)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_batch_without_a_target_changes_nothing_and_is_counted(accumulate_steps):
    _, state, step = make_run(accumulate_steps=accumulate_steps)
    state, _ = step(state, make_batch())  # so that there is momentum
    state = state.replace(skipped_in_a_row=jnp.int32(3))  # neither ends nor lengthens a row of non-finite steps
    after, metrics = step(state, untargeted(make_batch(1)))
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 3)
    assert metrics["finite"]
    assert np.isnan(metrics["loss"])
    assert (float(metrics["grad_norm"]), float(metrics["update_norm"])) == (0, 0)
    last, metrics = step(after, make_batch(1))  # the second update, of which the schedule knows
    assert (int(last.skipped), int(last.skipped_in_a_row)) == (1, 0)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4 + 2 * 2.7e-3 / 5)
