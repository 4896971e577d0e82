"""Adapters beside linear layers: their maths, the model that they begin as, what is merged, and names of targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from configs import chat
from gpt_jax.errors import UserError
from gpt_jax.leaf_names import name_of, named_leaves
from gpt_jax.model.gpt import GPT, Linear, ModelConfig, init_params
from gpt_jax.model.kv_cache import decoding_weights
from gpt_jax.model.lora import (
    LINEAR_LAYERS,
    LoraConfig,
    check_targets,
    init_a,
    is_adapter,
    merge_adapters,
    unused_settings,
)
from vk_kernels.ops.dropout import dropout_mask, dropout_scale

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BASE = ModelConfig(vocab_size=31, block_size=12, num_layers=1, num_heads=2, embed_dim=16, use_bias=True)
TWO_BLOCKS = dataclasses.replace(BASE, num_layers=2)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=("all",))
RNG = np.array([1, 2], np.uint32)
BACKENDS = ("xla", pytest.param("vulkan", marks=needs_vulkan))


def with_lora(config: ModelConfig = BASE, **changes) -> ModelConfig:
    return dataclasses.replace(config, lora=dataclasses.replace(LORA, **changes))


def jit(backend: str, fn):
    return vk_kernels.jit(fn, device=SELECTOR) if backend == "vulkan" else jax.jit(fn)


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (3, BASE.block_size)).astype(np.int32)


def losses(params, config: ModelConfig):
    return GPT(config).apply({"params": params}, tokens(0), tokens(1), method="losses")


@functools.cache
def losses_of(backend: str, config: ModelConfig):
    """`losses` of parameters, compiled once for all tests."""
    return jit(backend, lambda params: losses(params, config))


@functools.cache
def parameters(config: ModelConfig):
    """Random numbers of the model's shapes; B of adapters is zero, as at first."""
    shapes = jax.eval_shape(lambda: init_params(GPT(config), 0))

    def fresh(path, leaf):
        name = name_of(path)
        if name.endswith(("lora_b", "/scale")):
            return np.full(leaf.shape, name.endswith("/scale"), np.float32)
        return (0.1 * np.random.default_rng(list(name.encode())).normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fresh, shapes)


def trained(params):
    """As after some steps: no adapter is zero."""

    def changed(path, leaf):
        moved = np.random.default_rng(len(str(path))).normal(size=leaf.shape).astype(np.float32)
        return 0.3 * moved if is_adapter(name_of(path)) else leaf

    return jax.tree_util.tree_map_with_path(changed, params)


def test_each_linear_layer_has_two_more_parameters():
    plain, adapted = (named_leaves(parameters(config)) for config in (BASE, with_lora()))
    added = [name for name in adapted if name not in plain]
    assert set(added) == {f"h_0/{layer}/{name}" for layer in LINEAR_LAYERS for name in ("lora_a", "lora_b")}
    assert all(map(is_adapter, added))
    assert not any(map(is_adapter, plain))


def test_a_layer_is_initialised_as_without_adapters():
    x = np.zeros((1, 16), np.float32)

    @jax.jit
    def both():
        layers = (Linear(24, config, 0, name="qkv") for config in (BASE, with_lora()))
        return [layer.init(jax.random.key(0), x, None)["params"] for layer in layers]

    plain, adapted = both()
    np.testing.assert_array_equal(adapted["kernel"], plain["kernel"])
    assert adapted["lora_a"].any()
    assert not adapted["lora_b"].any()


def test_a_is_drawn_as_in_peft():
    a = np.asarray(init_a(jax.random.key(0), (64, 512), jnp.float32))
    assert np.abs(a).max() == pytest.approx(1 / 8, rel=1e-3)  # uniform within 1 / sqrt(64)
    assert a.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("xla", "float32", marks=pytest.mark.slow),
        pytest.param("xla", "bfloat16", marks=pytest.mark.slow),
        pytest.param("vulkan", "float32", marks=needs_vulkan),
    ],
)
def test_the_first_step_is_the_donors(backend, dtype):
    """The same bits in f32; in bfloat16 GELU may read what is rounded once more than where there is no adapter."""
    plain = dataclasses.replace(BASE, dtype=dtype)
    params = parameters(with_lora())
    expected = losses_of(backend, plain)(merge_adapters(params, 1.0))
    found = losses_of(backend, with_lora(plain))(params)
    if dtype == "float32":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=0.01)


def formula(kernel, bias, a, b, x, mask):
    """x W + b + (alpha / rank) dropout(x) A B, with none of our operations."""
    dropped = jnp.where(mask, x * dropout_scale(0.25), 0)
    return x @ kernel + bias[None, None] + LORA.alpha / LORA.rank * dropped @ a @ b


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_are_those_of_the_formula(backend):
    config = with_lora(TWO_BLOCKS, dropout=0.25)
    layer = Linear(24, config, 1, name="qkv")
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 24), "bias": (24,), "lora_a": (16, 4), "lora_b": (4, 24)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x, slope = (rng.normal(size=(3, 5, n)).astype(np.float32) for n in (16, 24))
    site = 3 * config.num_layers + 4  # the first layer of block 1, after the sites of the model itself
    mask = dropout_mask(RNG, site, 0.25, (15, 16)).reshape(x.shape)
    assert 0.6 < mask.mean() < 0.9

    def ours(params, x):
        return (layer.apply({"params": params}, x, RNG) * slope).sum()

    def plain(params, x):
        return (formula(params["kernel"], params["bias"], params["lora_a"], params["lora_b"], x, mask) * slope).sum()

    found = jit(backend, jax.value_and_grad(ours, argnums=(0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize(("backend", "remat"), [("xla", True), pytest.param("vulkan", False, marks=needs_vulkan)])
def test_merged_is_unmerged_within_rounding(backend, remat):
    config = dataclasses.replace(with_lora(), remat=remat)
    params = trained(parameters(with_lora()))
    merged = merge_adapters(params, LORA.scale)
    assert not any(map(is_adapter, named_leaves(merged)))
    found = losses_of(backend, config)(params)
    plain = losses_of(backend, BASE)
    expected, base = np.asarray(plain(merged)), np.asarray(plain(merge_adapters(params, 0.0)))
    assert np.abs(expected - base).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_reads_what_is_merged(backend):
    params = trained(parameters(with_lora()))
    found = jit(backend, lambda p: decoding_weights(p, with_lora()))(params)
    expected = jax.jit(lambda p: decoding_weights(p, BASE))(merge_adapters(params, LORA.scale))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("all",), 8), (("qkv", "projection"), 4), (("mlp_*",), 4), (("h_1",), 4), (("h_[0-1]/qkv", "h_0/mlp_in"), 3)],
)
def test_targets_are_linear_layers_by_name_block_or_both(targets, count):
    lora = dataclasses.replace(LORA, targets=targets)
    check_targets(lora, TWO_BLOCKS.num_layers)
    adapted = [(block, layer) for block in (0, 1) for layer in LINEAR_LAYERS if lora.is_adapted(block, layer)]
    assert len(adapted) == count


@pytest.mark.parametrize("target", ["c_attn", "h_2", "head", "wte", "", "h_0/qkv/kernel"])
def test_a_target_that_is_none_is_named_with_those_that_there_are(target):
    with pytest.raises(UserError) as caught:
        check_targets(dataclasses.replace(LORA, targets=("qkv", target)), TWO_BLOCKS.num_layers)
    assert str(caught.value) == (
        f"config.lora.targets: {target!r} is no linear layer: there are qkv, projection, mlp_in, mlp_out in the "
        "blocks h_0 to h_1 (one is called h_0/qkv), and all"
    )
    with pytest.raises(UserError, match=r"config.lora.targets names no linear layer: there are qkv"):
        check_targets(dataclasses.replace(LORA, targets=()), TWO_BLOCKS.num_layers)


def test_settings_without_a_rank_are_named():
    config = chat.get_config()
    assert unused_settings(config) == []
    config.lora.dropout, config.lora.targets = 0.1, ("qkv",)
    assert unused_settings(config) == ["lora.dropout", "lora.targets"]
    config.lora.rank = 4
    assert unused_settings(config) == []
