"""Primitives: operations that XLA compiles as their reference, and that can be one custom call to a Vulkan device."""

import atexit
import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from vk_kernels.bridge import custom_call
from vk_kernels.bridge.xla_ffi import CALL_ATTRIBUTE
from vk_kernels.compiler.op_call import encode_call, make_plan
from vk_kernels.compiler.op_registry import BatchAxes, KernelOp, register_op
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.open_devices import open_device

_lowered = threading.Event()  # whether any program has a custom call


@atexit.register
def _settle() -> None:
    """Lets what still runs, and is held by someone, finish before the process ends and calls are refused."""
    if _lowered.is_set():
        for array in jax.live_arrays("cpu"):
            with contextlib.suppress(Exception):  # of the computation, or because the array was donated
                array.block_until_ready()


def make_primitive(name: str, reference: Callable[..., Any], op: KernelOp) -> Primitive:
    """A primitive with a list of results, and the kernel op of its name.

    Args:
      name: of the primitive.
      reference: `reference(*operands, **parameters)`, in JAX: the results, one array or a tuple.
      op: the same as kernels, for the compiler; it is registered.

    Its parameters are those of the reference, which are numbers, strings, None, and tuples of these; and `target`:
    where to run it on Vulkan, or None for the reference on whatever platform a program is compiled for.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    register_op(name, op)

    def results(*operands, **parameters):
        found = reference(*operands, **parameters)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    @functools.lru_cache(maxsize=4096)
    def result_avals(operands, parameters):
        traced = jax.make_jaxpr(functools.partial(results, **dict(parameters)))(*operands)
        return [aval.update(weak_type=False) for aval in traced.out_avals]

    @primitive.def_abstract_eval
    def abstract(*operands, target, **parameters):
        shaping = parameters | dict.fromkeys(op.shapeless, 0)  # traced once for all their values
        return result_avals(operands, tuple(sorted(shaping.items())))

    @functools.lru_cache(maxsize=4096)
    def compiled(parameters):
        return jax.jit(functools.partial(primitive.bind, **dict(parameters)))

    @primitive.def_impl
    def run(*operands, **parameters):
        with jax.disable_jit(False):  # without it, this would call itself for ever
            return compiled(tuple(sorted(parameters.items())))(*operands)

    as_reference = mlir.lower_fun(results, multiple_results=True)

    def lower(context, *operands, target, **parameters):
        if target is not None:
            raise NotImplementedError(
                f"{name}: the Vulkan kernels are called from JAX's CPU backend, and this program is compiled for "
                f"{'/'.join(context.module_context.platforms)}; set JAX_PLATFORMS=cpu, or take implementation='xla'"
            )
        return as_reference(context, *operands, **parameters)

    def lower_on_cpu(context, *operands, target, **parameters):
        if target is None:
            return as_reference(context, *operands, **parameters)
        what = encode_call(name, parameters, target)
        _lowered.set()
        # Made now for its errors, which belong to the line that traces the call.
        device = open_device(target.device)
        make_plan(device, what.encode(), _arrays(context.avals_in), _arrays(context.avals_out))
        return jax.ffi.ffi_lowering(custom_call.CUSTOM_CALL)(context, *operands, **{CALL_ATTRIBUTE: what})

    mlir.register_lowering(primitive, lower)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")

    def refuse(*_, **__):
        raise TypeError(
            f"{name}: the Vulkan kernels have a gradient, but no forward-mode (jvp) and no second derivative; "
            "take implementation='xla' for these"
        )

    ad.primitive_jvps[primitive] = refuse
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive, op.batch_axes)
    return primitive


def _arrays(avals: Sequence[Any]) -> tuple[ArraySpec, ...]:
    return tuple(ArraySpec(tuple(aval.shape), np.dtype(aval.dtype)) for aval in avals)


def _batch(primitive: Primitive, batch_axes: BatchAxes | None, operands, axes, **parameters):
    """vmap: one call for all where the operation has a batch axis for it, else one call after another."""
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    batched = [axis is not None for axis in axes]
    size = next(x.shape[0] for x, is_batched in zip(moved, batched, strict=True) if is_batched)
    static = {name: value for name, value in parameters.items() if name != "target"}
    carriers = batch_axes(**static) if batch_axes else None
    if carriers is not None and not any(b and not c for b, c in zip(batched, carriers, strict=True)):
        folded = [
            _fold(x if is_batched else jnp.broadcast_to(x, (size, *x.shape))) if carries else x
            for x, is_batched, carries in zip(moved, batched, carriers, strict=True)
        ]
        results = [_unfold(y, size) for y in primitive.bind(*folded, **parameters)]
        return results, [0] * len(results)

    def element(mapped):
        mapped = iter(mapped)
        return primitive.bind(*(next(mapped) if b else x for x, b in zip(moved, batched, strict=True)), **parameters)

    results = jax.lax.map(element, [x for x, is_batched in zip(moved, batched, strict=True) if is_batched])
    return results, [0] * len(results)


def _fold(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unfold(y: jax.Array, size: int) -> jax.Array:
    return y.reshape(size, y.shape[0] // size if size else 0, *y.shape[1:])


def vary_alike(*operands: jax.Array | None) -> list[jax.Array | None]:
    """Inside shard_map, casts the operands to vary over the same mesh axes, as one call's operands must.

    It comes before the operation's own derivative: the cast's derivative sums a replicated operand's gradient over the
    mesh.
    """
    varying = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in operands]
    axes = frozenset().union(*varying)
    return [
        x if x is None or own == axes else jax.lax.pcast(x, tuple(sorted(axes - own)), to="varying")
        for x, own in zip(operands, varying, strict=True)
    ]
