"""Operations with a gradient: a forward and a backward primitive, tied by jax.custom_vjp."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from vk_kernels.bridge.primitive import vary_alike
from vk_kernels.compiler.op_call import CallSite


def make_differentiable(
    forward: Primitive,
    backward: Callable[..., Sequence[jax.Array | None]],
    outputs: int = 1,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function `operation(target, *operands, **parameters) -> outputs` that jax.grad and jax.vjp take apart.

    Args:
      forward: gives the outputs, then what else the backward pass needs.
      backward: `backward(target, operands, results, cotangents, **parameters)`: the gradient of each operand, in
        order; None for one of integers or one that is absent. `results` are all those of `forward`, `cotangents` are
        of the outputs.
      outputs: how many of the results of `forward` are outputs.

    An operand may be None: absent, for the primitive as for the reference.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def apply(target, parameters, operands):
        return run(target, parameters, operands)[:outputs]

    def run(target, parameters, operands):
        present = [x for x in operands if x is not None]
        return tuple(forward.bind(*present, target=target, **dict(parameters)))

    def run_forward(target, parameters, operands):
        results = run(target, parameters, operands)
        return results[:outputs], (operands, results)

    def run_backward(target, parameters, saved, cotangents):
        return (tuple(backward(target, *saved, cotangents, **dict(parameters))),)

    apply.defvjp(run_forward, run_backward)

    def operation(target: CallSite | None, *operands: jax.Array | None, **parameters: Any) -> tuple[jax.Array, ...]:
        return apply(target, tuple(sorted(parameters.items())), tuple(vary_alike(*operands)))

    return operation
