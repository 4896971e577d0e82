"""The state of a run before its first step: traced once, and compiled by XLA beside what else a start does."""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from gpt_jax.model.gpt import init_params, make_model
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.steps import TrainState, init_state
from gpt_jax.training.trainable import trained_parameters
from vk_kernels.jax_compat import trace_context

_READ = ("seed", "num_steps", "model", "optimizer", "lora")  # all of a config that the state follows from


def abstract_state(config: ConfigDict) -> TrainState:
    """Shapes and dtypes of a run's state."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _traced(config).out_info)


def begin_compiling(config: ConfigDict) -> None:
    """Has what `fresh_state` calls compiled in a thread."""
    _compiled(_read(config), trace_context())


def fresh_state(config: ConfigDict) -> TrainState:
    """The state that a run from scratch begins with, a pure function of the config, on JAX's default device."""
    return _compiled(_read(config), trace_context()).result()()


def _read(config: ConfigDict) -> FrozenConfigDict:
    return FrozenConfigDict({name: config[name] for name in _READ})


def _traced(config: ConfigDict) -> jax.stages.Traced:
    return _trace(_read(config), trace_context())


@functools.lru_cache(maxsize=1)
def _trace(config: FrozenConfigDict, _: Any) -> jax.stages.Traced:
    model, optimizer, is_trained = make_model(config), make_optimizer(config), trained_parameters(config)
    return jax.jit(lambda: init_state(init_params(model, config.seed), optimizer, is_trained)).trace()


@functools.lru_cache(maxsize=1)
def _compiled(config: FrozenConfigDict, context: Any) -> "Future[jax.stages.Compiled]":
    lowered = _trace(config, context).lower()  # here: JAX's settings are those of this thread
    thread = ThreadPoolExecutor(1, thread_name_prefix="fresh_state")
    compiled = thread.submit(lowered.compile)
    thread.shutdown(wait=False)
    return compiled
