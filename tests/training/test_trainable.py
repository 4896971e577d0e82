"""Parameters that are not trained, and rates by parameter: chosen by name, the same on both backends."""

import functools

import jax
import numpy as np
import pytest
from vulkan_devices import SELECTOR

import vk_kernels
from configs import chat_tiny
from gpt_jax.errors import UserError
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import init_state, train_step
from gpt_jax.training.trainable import (
    check_patterns,
    combine,
    is_selected,
    matches,
    partition,
    rates_of_parameters,
    trained_parameters,
)


def make_config(**optimizer):
    config = chat_tiny.get_config()
    config.model.update(vocab_size=40, block_size=8, num_layers=2, num_heads=2, embed_dim=16)
    config.optimizer.update(warmup_steps=2, decay_steps=10, clip_norm=0.1, **optimizer)
    return config


@functools.cache
def shapes_of_params():
    return jax.eval_shape(lambda: init_params(model_of(make_config()), 0))


@functools.cache
def make_params():
    return jax.tree.map(np.asarray, jax.jit(init_params, static_argnums=(0, 1))(model_of(make_config()), 0))


def model_of(config):
    return GPT(ModelConfig.from_config(config.model))


def make_step(config):
    optimizer, is_trained = make_optimizer(config), trained_parameters(config)
    step = functools.partial(
        train_step,
        model=model_of(config),
        optimizer=optimizer,
        schedule=learning_rate_schedule(config),
        seed=1,
        is_trained=is_trained,
    )
    return step, jax.tree.map(np.asarray, init_state(make_params(), optimizer, is_trained))


def make_batch():
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("wte", {"wte"}),
        ("h_1", {"h_1/qkv/kernel", "h_1/qkv/bias"}),
        ("h_[0-1]", {"h_1/qkv/kernel", "h_1/qkv/bias"}),
        ("h_*/qkv", {"h_1/qkv/kernel", "h_1/qkv/bias", "h_10/qkv/kernel"}),
        ("*/bias", {"h_1/qkv/bias"}),
        ("qkv", set()),
        ("H_1", set()),
    ],
)
def test_a_pattern_is_of_a_name_or_a_group(pattern, matched):
    names = ("wte", "h_1/qkv/kernel", "h_1/qkv/bias", "h_10/qkv/kernel")
    assert {name for name in names if matches(pattern, name)} == matched


def test_the_last_pattern_counts():
    assert not is_selected(("*", "!h_1", "!head"), "h_1/qkv/kernel")
    assert is_selected(("*", "!h_1", "h_1/qkv"), "h_1/qkv/kernel")
    assert not is_selected((), "wte")


@pytest.mark.parametrize(
    ("setting", "patterns", "message"),
    [
        (
            "frozen",
            ("wte", "h_7"),
            r"optimizer.frozen: 'h_7' matches no parameter: there are h_0/ln_1/bias, .* in h_1 as in h_0",
        ),
        ("frozen", ("*",), r"optimizer.frozen=\('\*',\) leaves no parameter to be trained"),
        ("rates", ("head=0.5", "hed=0.1"), r"optimizer.rates: 'hed' matches no parameter: there are"),
        ("rates", ("head",), r"'head' is not PATTERN=FACTOR with a factor above 0"),
        ("rates", ("head=0",), r"'head=0' is not PATTERN=FACTOR .* goes into optimizer.frozen"),
        ("rates", ("head=x",), r"'head=x' is not PATTERN=FACTOR"),
    ],
)
def test_a_pattern_that_means_nothing_is_an_error(setting, patterns, message):
    with pytest.raises(UserError, match=message):
        check_patterns(make_config(**{setting: patterns}), shapes_of_params())


def test_rates_fall_from_the_output_to_the_embeddings():
    rate = rates_of_parameters(make_config(layer_decay=0.5, rates=("*/bias=3", "h_0/qkv=2")))
    found = {name: rate(name) for name in ("head", "ln_f/scale", "ln_f/bias", "h_1/qkv/kernel", "h_0/qkv/bias", "wte")}
    # The embeddings are one below the first of two blocks; of two patterns the last one counts.
    assert list(found.values()) == [1, 1, 3, 0.5, 2 * 0.25, 0.125]


def test_two_parts_of_the_parameters_are_the_whole():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape), shapes_of_params())
    trained, frozen = partition(params, trained_parameters(make_config(frozen=("*", "!h_1/qkv"))))
    assert set(named_leaves(trained)) == {"h_1/qkv/kernel"}
    whole = combine(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def optimizer_state(config, params, gradients):
    optimizer = make_optimizer(config)
    update = jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params))
    updates, state = update(gradients, params)
    return named_leaves(updates), named_leaves(state)


def test_rates_scale_the_update_and_the_decay():
    params = {"wte": np.ones((2, 3), np.float32), "h_1": {"qkv": {"kernel": np.full((3, 2), 2, np.float32)}}}
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    config = make_config(weight_decay=0.5, layer_decay=0.5, rates=("wte=0.1",))
    scaled, _ = optimizer_state(config, params, gradients)
    plain, _ = optimizer_state(make_config(weight_decay=0.5), params, gradients)
    for name, factor in {"wte": 0.1 * 0.125, "h_1/qkv/kernel": 0.5}.items():
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-6)


FROZEN = ("wte", "wpe", "h_0", "!h_0/ln_2", "ln_f")  # a layer norm between matrices that stay


@functools.cache
def one_step():
    """(state before, state after, metrics) of a step on XLA."""
    step, state = make_step(make_config(frozen=FROZEN, layer_decay=0.5, weight_decay=0.5))
    return state, *jax.tree.map(np.asarray, jax.jit(step)(state, make_batch()))


@pytest.mark.slow
def test_what_is_frozen_stays_to_the_bit_and_costs_no_state():
    before, after, metrics = one_step()
    is_frozen = functools.partial(is_selected, FROZEN)
    for name, leaf in named_leaves(after.params).items():
        assert np.array_equal(leaf, named_leaves(before.params)[name]) == is_frozen(name), name
    first_moments = {
        name.split("/mu/")[1]: leaf for name, leaf in named_leaves(after.opt_state).items() if "/mu/" in name
    }
    assert set(first_moments) == {name for name in named_leaves(before.params) if not is_frozen(name)}
    layers = ("h_0", "h_1", "head")
    assert {f"grad_norm/{layer}" for layer in layers} == {name for name in metrics if name.startswith("grad_norm/")}
    norm = np.sqrt(sum(float(metrics[f"grad_norm/{layer}"]) ** 2 for layer in layers))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    # The clip is by the norm of what is trained: together the clipped gradients have the norm of the clip, 0.1.
    clipped = np.sqrt(sum(np.square(leaf).sum() for leaf in first_moments.values())) / (1 - 0.9)
    np.testing.assert_allclose(clipped, 0.1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.vulkan
def test_vulkan_trains_the_same_part_alike(device):
    before, expected, metrics = one_step()
    step, _ = make_step(make_config(frozen=FROZEN, layer_decay=0.5, weight_decay=0.5))
    found, found_metrics = vk_kernels.jit(step, device=SELECTOR)(before, make_batch())
    assert found_metrics.keys() == metrics.keys()
    np.testing.assert_allclose(found_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_allclose(np.asarray(named_leaves(found)[name]), leaf, rtol=1e-4, atol=1e-6, err_msg=name)
