"""One step of AdamW behind a global-norm clip, for all parameters; none where loss or gradient is not finite.

The same maths as optax.chain(clip_by_global_norm(clip_norm), adamw(learning_rate, b1, b2, eps, weight_decay, mask)).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive, vary_alike
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.global_norm import global_norm_reference, plan_norm_of
from vk_kernels.ops.planning import THREADS, ceil_divide, dispatch, dtype_suffix, planner, require_plain
from vk_kernels.ops.public import check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

_SCALARS_BYTES = 20  # of shaders/adamw/adamw_common.slang's Scalars


def adamw_reference(
    *operands: jax.Array,
    decay: tuple[bool, ...],
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float | None = None,
    shadow: bool = False,
) -> tuple[jax.Array, ...]:
    """Updates P = len(decay) parameters.

    Args:
      operands: P parameters, P gradients, P first moments, P second moments, then scalars: the count of updates so far
        (int32), the learning rate and the loss (f32). Parameters and moments are f32, gradients f32 or bf16.
      decay: which parameters decay.
      b1, b2: decay rates of the moments, in (0, 1).
      epsilon: added to the root of the second moment.
      weight_decay: per unit of learning rate.
      clip_norm: largest norm of the whole gradient, or None.
      shadow: also give the new parameters in bf16.

    Returns:
      P parameters, P first moments, P second moments, then the count, the gradient's norm (f32) before the clip, and
      whether loss and norm were finite (int32 0 or 1), and with `shadow` P bf16 parameters. If they were not,
      parameters, moments and count are what they were.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), algorithm 2; optax.adamw.
    """
    params, grads, mus, nus, (count, learning_rate, loss) = _split(operands, len(decay))
    norm = global_norm_reference(*grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    gradient_scale = 1.0 if clip_norm is None else jnp.where(norm < clip_norm, 1.0, clip_norm / norm)
    next_count = jnp.where(count < jnp.iinfo(jnp.int32).max, count + 1, count)
    # 1 - b^t without cancellation where t is small.
    mu_rest, nu_rest = (-jnp.expm1(next_count.astype(jnp.float32) * math.log(b)) for b in (b1, b2))

    def update(p, g, mu, nu, decays):
        g = g.astype(jnp.float32) * gradient_scale
        new_mu = (1 - b1) * g + b1 * mu
        new_nu = (1 - b2) * jnp.square(g) + b2 * nu
        step = new_mu / mu_rest / (jnp.sqrt(new_nu / nu_rest) + epsilon) + (weight_decay if decays else 0.0) * p
        new_p = p - learning_rate * step
        return tuple(jnp.where(finite, new, old) for new, old in ((new_p, p), (new_mu, mu), (new_nu, nu)))

    updated = [update(*each) for each in zip(params, grads, mus, nus, decay, strict=True)]
    params, mus, nus = ([each[i] for each in updated] for i in range(3))
    shadows = [p.astype(jnp.bfloat16) for p in params] if shadow else []
    return *params, *mus, *nus, jnp.where(finite, next_count, count), norm, finite.astype(jnp.int32), *shadows


@planner
def plan_adamw(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    decay: tuple[bool, ...],
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float | None = None,
    shadow: bool = False,
    variant: str | None = None,
) -> Plan:
    """Operands and results of `adamw_reference`. A new parameter, moment or count may be in the buffer of the old one.

    The norm of the gradient, then one thread for what all parameters share, then an update for each parameter, none of
    which waits for another: three steps with a wait between them for up to 64 parameters, and a fourth beyond.

    Raises:
      ValueError: a dtype without kernels.
    """
    require_plain(variant)
    size, first_output = len(decay), len(inputs)
    indices = range(len(inputs) + len(outputs))
    params, grads, mus, nus, (count, learning_rate, loss) = _split(indices[:first_output], size)
    for i in (*params, *mus, *nus):
        if dtype_suffix(inputs[i]) != "f32":
            raise ValueError(f"AdamW keeps parameters and moments in float32, found {inputs[i]}")
    new_params, new_mus, new_nus = (indices[first_output + i * size :][:size] for i in range(3))
    new_count, norm, finite, *shadows = indices[first_output + 3 * size :]

    measure = plan_norm_of([(i, inputs[i]) for i in grads], output=norm, scratch=len(indices))
    scalars = len(indices) + len(measure.scratch)
    clip_norm = math.inf if clip_norm is None else clip_norm
    share = dispatch(
        "adamw_scalars",
        "",
        1,
        constants={"clip_norm": clip_norm, "log_b1": math.log(b1), "log_b2": math.log(b2)},
        norm=norm,
        loss=loss,
        count=count,
        learning_rate=learning_rate,
        next_count=new_count,
        finite=finite,
        scalars=scalars,
    )
    rates = {"b1": b1, "rest_of_b1": 1 - b1, "b2": b2, "rest_of_b2": 1 - b2, "epsilon": epsilon}
    dispatches = [*measure.dispatches, share]
    for i, decays in enumerate(decay):
        elements = inputs[params[i]].size
        if elements == 0:
            continue
        update = dispatch(
            "adamw",
            dtype_suffix(inputs[grads[i]]) + ("_shadow" if shadow else ""),
            ceil_divide(elements, 4 * THREADS),
            constants={"count": elements, **rates, "weight_decay": weight_decay if decays else 0.0},
            scalars=scalars,
            gradient=grads[i],
            parameter=params[i],
            mu=mus[i],
            nu=nus[i],
            new_parameter=new_params[i],
            new_mu=new_mus[i],
            new_nu=new_nus[i],
            **({"shadow": shadows[i]} if shadow else {}),
        )
        dispatches.append(update)
    return Plan(tuple(dispatches), (*measure.scratch, _SCALARS_BYTES))


def _split(operands: Sequence, size: int) -> tuple[Sequence, Sequence, Sequence, Sequence, Sequence]:
    """(parameters, gradients, first moments, second moments, scalars), `size` of each of the first four."""
    parts = (operands[i * size : (i + 1) * size] for i in range(4))
    return (*parts, operands[4 * size :])


_adamw_primitive = make_primitive("adamw", adamw_reference, KernelOp(plan_adamw))


@public(adamw_reference)
def adamw(target, *operands, decay, **parameters):
    size = len(decay)
    if len(operands) != 4 * size + 3:
        raise ValueError(f"adamw: {size} parameters need {4 * size + 3} operands, found {len(operands)}")
    for i in range(size):
        x, gradient, mu, nu = operands[i : 4 * size : size]
        shape = jnp.shape(x)
        state = {f"parameter {i}": x, f"first moment {i}": mu, f"second moment {i}": nu}
        check_arrays("adamw", **{name: (array, shape, jnp.float32) for name, array in state.items()})
        check_arrays("adamw", **{f"gradient {i}": (gradient, shape, jnp.result_type(gradient))})
    count, learning_rate, loss = operands[4 * size :]
    scalars = {"count": (count, (), jnp.int32), "learning_rate": (learning_rate, (), jnp.float32)}
    check_arrays("adamw", **scalars, loss=(loss, (), jnp.float32))
    parameters["decay"] = tuple(map(bool, decay))
    return tuple(_adamw_primitive.bind(*vary_alike(*operands), target=target, **parameters))
