"""Parameters, options and causality of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import chat, gpt2_124m
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.steps import diagnostics_step

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TINY = ModelConfig(vocab_size=31, block_size=12, num_layers=2, num_heads=2, embed_dim=8, soft_cap=30.0)
RNG = np.array([1, 2], np.uint32)

# Compiled: op by op, every one of them is a program of its own to XLA.
init = jax.jit(init_params, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model: GPT, params, *args, method: str | None = None):
    return model.apply({"params": params}, *args, method=method)


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab_size, shape), jnp.int32)


def build(**options):
    model = GPT(ModelConfig(**{**TINY.__dict__, **options}))
    return model, init(model, 0)


@pytest.mark.parametrize(("module", "expected"), [(chat, 6_838_784), (gpt2_124m, 124_439_808)])
def test_parameter_counts(module, expected):
    model = GPT(ModelConfig.from_config(module.get_config().model))
    params = jax.eval_shape(lambda: init_params(model, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_a_soft_cap_of_zero_in_the_config_is_off():
    assert ModelConfig.from_config(gpt2_124m.get_config().model).soft_cap is None
    assert ModelConfig.from_config(chat.get_config().model).soft_cap == 30.0


def test_layer_names_are_the_parameter_groups():
    for tie_head in (False, True):
        model = GPT(ModelConfig(**{**TINY.__dict__, "tie_head": tie_head}))
        assert set(model.config.layer_names) == set(jax.eval_shape(lambda model=model: init_params(model, 0)))


def test_first_loss_is_that_of_a_uniform_guess():
    model, params = build()
    losses = apply(model, params, tokens(4, 12), tokens(4, 12, seed=1), method="losses")
    assert losses.shape == (4, 12)
    assert float(losses.mean()) == pytest.approx(np.log(TINY.vocab_size), rel=0.02)


def test_no_position_sees_a_later_token():
    model, params = build()
    one = tokens(1, 12)
    other = one.at[0, 7].set((one[0, 7] + 1) % TINY.vocab_size)
    hidden_one, hidden_other = (apply(model, params, t) for t in (one, other))
    np.testing.assert_array_equal(hidden_one[:, :7], hidden_other[:, :7])
    assert (hidden_one[:, 7:] != hidden_other[:, 7:]).any(axis=-1).all()


def test_next_token_logits_are_those_of_the_position_and_ignore_padding():
    model, params = build()
    full = tokens(2, 12)
    last = jnp.array([3, 8])
    logits = apply(model, params, full, last, method="next_token_logits")
    for row, position in enumerate((3, 8)):
        short = apply(model, params, full[row : row + 1, : position + 1])[:, -1]
        np.testing.assert_allclose(logits[row], (short @ params["head"])[0], rtol=1e-4, atol=1e-5)


def test_dropout_acts_at_three_places_with_bits_of_their_own():
    model, params = build(dropout_rate=0.5)
    text = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, tokens(1, 4), jnp.asarray(RNG)))(params))
    assert text.count("optimization_barrier") == 3 * TINY.num_layers  # one draw of bits each
    quiet, loud = (apply(model, params, tokens(1, 12), rng) for rng in (None, jnp.asarray(RNG)))
    again = apply(model, params, tokens(1, 12), jnp.asarray(RNG))
    later = apply(model, params, tokens(1, 12), jnp.asarray(RNG + np.uint32([0, 1])))
    np.testing.assert_array_equal(loud, again)
    assert not np.array_equal(quiet, loud)
    assert not np.array_equal(loud, later)


def test_remat_changes_no_gradient():
    def gradient(remat):
        model, params = build(dropout_rate=0.1, remat=remat)

        def loss(params):
            losses = model.apply({"params": params}, tokens(2, 12), tokens(2, 12), jnp.asarray(RNG), method="losses")
            return losses.sum()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(False), gradient(True))


def test_bf16_computes_in_bf16_over_f32_parameters():
    model, params = build(dtype="bfloat16", use_bias=True, tie_head=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = apply(model, params, tokens(2, 12))
    assert hidden.dtype == jnp.bfloat16
    reference = GPT(ModelConfig(**{**TINY.__dict__, "use_bias": True, "tie_head": True}))
    np.testing.assert_allclose(hidden.astype(jnp.float32), apply(reference, params, tokens(2, 12)), atol=0.1)


def test_diagnostics_by_head():
    model, params = build()
    found = jax.jit(functools.partial(diagnostics_step, model=model))(params, {"inputs": tokens(3, 12)})
    assert set(found) == {f"{name}/h_{i}" for name in ("attention_max", "attention_entropy") for i in range(2)}
    uniform = np.mean([np.log(n) for n in range(1, 13)])  # each position spreads over those before it
    for name, heads in found.items():
        assert heads.shape == (TINY.num_heads,)
        if name.startswith("attention_entropy"):
            np.testing.assert_allclose(heads, uniform, rtol=0.05)
