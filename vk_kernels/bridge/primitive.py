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
from vk_kernels.compiler.op_call import CallSite, encode_call, make_plan
from vk_kernels.compiler.op_registry import KernelOp, register_op
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
    rules = _Rules(primitive, reference, op)
    primitive.def_abstract_eval(rules.abstract_eval)  # shapes and dtypes, when a function is traced
    primitive.def_impl(rules.impl)  # a call outside of any jit
    mlir.register_lowering(primitive, rules.lower)  # XLA, any platform
    mlir.register_lowering(primitive, rules.lower_on_cpu, platform="cpu")
    ad.primitive_jvps[primitive] = rules.jvp
    batching.primitive_batchers[primitive] = rules.batch  # vmap
    return primitive


class _Rules:
    """The rules of one primitive: what JAX asks of it, a method each."""

    def __init__(self, primitive: Primitive, reference: Callable[..., Any], op: KernelOp):
        self._primitive, self._reference, self._op = primitive, reference, op
        self._lower_reference = mlir.lower_fun(self._results, multiple_results=True)
        self._result_avals = functools.lru_cache(maxsize=4096)(self._trace_reference)
        self._compiled = functools.lru_cache(maxsize=4096)(self._compile)

    def _results(self, *operands: Any, **parameters: Any) -> list[Any]:
        found = self._reference(*operands, **parameters)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def _trace_reference(self, operands: tuple, parameters: tuple) -> list[Any]:
        traced = jax.make_jaxpr(functools.partial(self._results, **dict(parameters)))(*operands)
        return [aval.update(weak_type=False) for aval in traced.out_avals]

    def _compile(self, parameters: tuple) -> Callable[..., Any]:
        return jax.jit(functools.partial(self._primitive.bind, **dict(parameters)))

    def abstract_eval(self, *operands: Any, target: CallSite | None, **parameters: Any) -> list[Any]:
        shaping = parameters | dict.fromkeys(self._op.shapeless, 0)  # traced once for all their values
        return self._result_avals(operands, tuple(sorted(shaping.items())))

    def impl(self, *operands: Any, **parameters: Any) -> list[Any]:
        with jax.disable_jit(False):  # without it, this would call itself for ever
            return self._compiled(tuple(sorted(parameters.items())))(*operands)

    def lower(self, context: Any, *operands: Any, target: CallSite | None, **parameters: Any) -> Any:
        if target is not None:
            raise NotImplementedError(
                f"{self._primitive}: the Vulkan kernels are called from JAX's CPU backend, and this program is "
                f"compiled for {'/'.join(context.module_context.platforms)}; set JAX_PLATFORMS=cpu, or take "
                "implementation='xla'"
            )
        return self._lower_reference(context, *operands, **parameters)

    def lower_on_cpu(self, context: Any, *operands: Any, target: CallSite | None, **parameters: Any) -> Any:
        if target is None:
            return self._lower_reference(context, *operands, **parameters)
        call = encode_call(self._primitive.name, parameters, target)
        _lowered.set()
        # Made now for its errors, which belong to the line that traces the call.
        device = open_device(target.device)
        make_plan(device, call.encode(), _arrays(context.avals_in), _arrays(context.avals_out))
        return jax.ffi.ffi_lowering(custom_call.CUSTOM_CALL)(context, *operands, **{CALL_ATTRIBUTE: call})

    def jvp(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{self._primitive}: the Vulkan kernels have a gradient, but no forward-mode (jvp) and no second "
            "derivative; take implementation='xla' for these"
        )

    def batch(self, operands: Sequence[Any], axes: Sequence[int | None], **parameters: Any) -> tuple[list, list[int]]:
        """One call for all where the operation has a batch axis for each batched operand, else one after another."""
        moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
        batched = [axis is not None for axis in axes]
        static = {name: value for name, value in parameters.items() if name != "target"}
        carriers = self._op.batch_axes(**static) if self._op.batch_axes else None
        call = functools.partial(self._primitive.bind, **parameters)
        if carriers is None or any(b and not c for b, c in zip(batched, carriers, strict=True)):
            results = _in_turn(call, moved, batched)
        else:
            results = _at_once(call, moved, batched, carriers)
        return results, [0] * len(results)


def _arrays(avals: Sequence[Any]) -> tuple[ArraySpec, ...]:
    return tuple(ArraySpec(tuple(aval.shape), np.dtype(aval.dtype)) for aval in avals)


def _at_once(
    call: Callable[..., list], operands: Sequence[Any], batched: Sequence[bool], carriers: Sequence[bool]
) -> list:
    """One call for a batch, along the first axis of `operands` where `batched`. It becomes part of the operation's own
    batch axis, which the `carriers` have."""
    size = next(x.shape[0] for x, is_batched in zip(operands, batched, strict=True) if is_batched)
    folded = [
        _fold(x if is_batched else jnp.broadcast_to(x, (size, *x.shape))) if carries else x
        for x, is_batched, carries in zip(operands, batched, carriers, strict=True)
    ]
    return [_unfold(y, size) for y in call(*folded)]


def _in_turn(call: Callable[..., list], operands: Sequence[Any], batched: Sequence[bool]) -> list:
    """A call for each element of a batch, along the first axis of `operands` where `batched`."""

    def element(mapped: list) -> list:
        of_batch = iter(mapped)
        return call(*(next(of_batch) if b else x for x, b in zip(operands, batched, strict=True)))

    return jax.lax.map(element, [x for x, is_batched in zip(operands, batched, strict=True) if is_batched])


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
