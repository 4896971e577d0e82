"""The state that a run begins with: traced once for all that ask for its shapes, and compiled beside other work."""

import jax
import numpy as np
import pytest

from configs import chat_tiny
from gpt_jax.model.gpt import init_params, make_model
from gpt_jax.training import fresh_state as module
from gpt_jax.training.fresh_state import abstract_state, begin_compiling, fresh_state
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.steps import init_state


@pytest.fixture(scope="module")
def config():
    config = chat_tiny.get_config()
    config.model.update(vocab_size=40, block_size=8, num_layers=1, num_heads=2, embed_dim=16)
    return config


@pytest.mark.slow
def test_the_state_is_that_of_the_seed_bit_for_bit(config):
    begin_compiling(config)
    state = fresh_state(config)
    params = jax.jit(lambda: init_params(make_model(config), config.seed))()
    expected = init_state(params, make_optimizer(config))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted, strict=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract_state(config)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_the_model_is_traced_once_for_a_config_and_anew_for_another(config, monkeypatch):
    traced = []
    monkeypatch.setattr(module, "init_params", lambda model, seed: traced.append(seed) or {"w": jax.numpy.ones(seed)})
    first, second = config.copy_and_resolve_references(), config.copy_and_resolve_references()
    first.seed, second.seed = 2, 3
    assert [abstract_state(each).params["w"].shape for each in (first, first, second)] == [(2,), (2,), (3,)]
    assert traced == [2, 3]
