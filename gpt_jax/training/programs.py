"""The functions that a run calls, compiled for its backend, and planned for it before there is any data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt_jax.backend import Backend, check_heads, describe, is_device_error
from gpt_jax.distributed.placement import OneDevice, Share
from gpt_jax.distributed.vulkan_devices import VulkanDevices
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import make_model
from gpt_jax.training.cut_step import make_cut_step
from gpt_jax.training.failures import remedies, remedies_of_model, smaller
from gpt_jax.training.fresh_state import abstract_state
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import (
    ONE_DEVICE,
    diagnostics_step,
    eval_step,
    nonfinite_places,
    on_leaves,
    train_step,
)
from gpt_jax.training.trainable import trained_parameters
from vk_kernels import FeatureError, VulkanError
from vk_kernels.runtime.open_devices import open_device


class Programs(NamedTuple):
    """A run's functions under the backend's jit; see `steps` for what they are."""

    train_step: Callable[..., Any]  # (leaves of the state, batch) -> (leaves, metrics); the leaves are donated
    eval_step: Callable[..., Any]  # (params, batch), as the next two
    diagnostics_step: Callable[..., Any]
    nonfinite_places: Callable[..., Any]


def make_train_step(config: ConfigDict, placement: OneDevice = ONE_DEVICE) -> Callable[..., Any]:
    """`steps.train_step` with what a config says: (state, batch) -> (state, metrics)."""
    return functools.partial(
        train_step,
        model=make_model(config),
        optimizer=make_optimizer(config),
        schedule=learning_rate_schedule(config),
        seed=config.seed,
        accumulate_steps=config.accumulate_steps,
        is_trained=trained_parameters(config),
        placement=placement,
    )


def make_programs(config: ConfigDict, backend: Backend) -> Programs:
    """Nothing is traced before the first call."""
    model = make_model(config)
    state, placement = abstract_state(config), backend.placement
    if isinstance(placement, VulkanDevices):
        first_text = int(placement.share.rows(config.batch_size, config.accumulate_steps)[0])
        step = make_cut_step(config, state, placement.make_exchange, backend.jit, first_text=first_text)
    else:
        step = on_leaves(make_train_step(config, placement), jax.tree.structure(state))
        step = backend.jit(step, donate_argnums=0, **placement.step_options(state))
    return Programs(
        train_step=step,
        eval_step=backend.jit(functools.partial(eval_step, model=model)),
        diagnostics_step=backend.jit(functools.partial(diagnostics_step, model=model)),
        nonfinite_places=backend.jit(functools.partial(nonfinite_places, model=model)),
    )


def plan_programs(config: ConfigDict, backend: Backend) -> tuple[Programs, str | None]:
    """Makes a run's functions and, for Vulkan, plans those that every run calls; the run's calls find them planned.

    Returns:
      The functions, and one line if the device has no room for them: what is short, and what would help.

    Raises:
      UserError: the kernels or the device cannot do what the config asks for, whatever its memory.
    """
    programs = make_programs(config, backend)
    if backend.name != "vulkan":
        return programs, None
    check_heads(config.model, backend)
    try:
        _plan(config, programs, backend.placement.share)
    except (VulkanError, MemoryError, ValueError) as error:
        for program in programs:
            program.clear_cache()  # gives their memory back
        line = f"{describe(error)}; {_way_out(error, config, backend)}"
        if isinstance(error, FeatureError) or not is_device_error(error):
            raise UserError(f"this config cannot run on the backend {backend}: {line}") from None
        return programs, line
    return programs, None


def _plan(config: ConfigDict, programs: Programs, share: Share) -> None:
    """Plans with all memory that a run holds: the state's, and each function's own."""
    state = abstract_state(config)
    leaves = tuple(jax.tree.leaves(state))
    reserved = [open_device().buffer(leaf.size * leaf.dtype.itemsize) for leaf in leaves]
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.model.block_size), jnp.int32)
    own = jax.ShapeDtypeStruct((config.batch_size // share.total, config.model.block_size), jnp.int32)
    programs.train_step.lower(leaves, {"inputs": own, "targets": own})
    programs.eval_step.lower(state.params, {"inputs": own, "targets": own})
    if share.first == 0:  # process 0 alone looks at a whole batch
        programs.diagnostics_step.lower(state.params, {"inputs": tokens, "targets": tokens})
    del reserved


def _way_out(error: Exception, config: ConfigDict, backend: Backend) -> str:
    """The changes that would help, by trying them: a dtype that needs no feature, or what needs less memory."""
    if isinstance(error, FeatureError):
        in_float32 = [{"model.dtype": "float32"}] if config.model.dtype != "float32" else []
        found = _first_possible(config, in_float32, backend)
    else:
        in_parts, smaller_batches = smaller(config)
        found = _first_possible(config, in_parts, backend) or _first_possible(config, smaller_batches, backend)
    if found is None:
        return remedies_of_model(error, config)
    values = " ".join(f"--config.{name}={value}" for name, value in found.items())
    enough = f"{values} was tried and is enough"
    return enough if isinstance(error, FeatureError) else f"{enough}; {remedies(error, config)}"


def _first_possible(config: ConfigDict, changes: list[dict[str, Any]], backend: Backend) -> dict[str, Any] | None:
    """The first of some changes with which a config can be planned, if the last one is such a change."""
    if not changes or not _is_possible(config, changes[-1], backend):
        return None
    return next(change for change in changes if _is_possible(config, change, backend))


def _is_possible(config: ConfigDict, change: dict[str, Any], backend: Backend) -> bool:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    programs = make_programs(changed, backend)
    try:
        _plan(changed, programs, backend.placement.share)
    except (VulkanError, ValueError, MemoryError):
        return False
    finally:
        for program in programs:
            program.clear_cache()
    return True
