"""The public operations: each runs as its reference, compiled by XLA with all around it, or as its Vulkan kernels.

On Vulkan an operation is a primitive for its forward and one for its backward pass (`bridge.make_primitive`), tied by
`bridge.make_operation`; optional operands stand last, and are left out where absent. What is done here is what
kernels leave to their caller: to check shapes and dtypes, and to bring the operands into the form that kernels take.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vk_kernels.bridge.differentiable import make_operation
from vk_kernels.bridge.primitive import make_primitive, vary_alike
from vk_kernels.bridge.use import target_of
from vk_kernels.compiler.op_registry import ForwardBackward, KernelOp, register_op
from vk_kernels.compiler.passes.fuse_epilogue import with_operands
from vk_kernels.ops import adamw as _adamw
from vk_kernels.ops import attention as _attention
from vk_kernels.ops import cross_entropy as _cross_entropy
from vk_kernels.ops import dropout as _dropout
from vk_kernels.ops import embedding as _embedding
from vk_kernels.ops import gelu as _gelu
from vk_kernels.ops import global_norm as _global_norm
from vk_kernels.ops import layer_norm as _layer_norm
from vk_kernels.ops import matmul as _matmul
from vk_kernels.ops import packed_attention as _packed_attention

R = TypeVar("R")

_IMPLEMENTATION = """

implementation: 'xla', 'vulkan', or None for what `vk_kernels.use` says, else 'xla'. 'vulkan' raises NoDeviceError
without a device, ValueError or FeatureError for what the kernels or the device cannot do.
"""


def _public(reference: Callable[..., R]) -> Callable[[Callable[..., Any]], Callable[..., R]]:
    """Makes a reference, and a function `kernels(target, ...)` of the same arguments, one public operation."""

    def decorate(kernels: Callable[..., Any]) -> Any:
        @functools.wraps(reference)
        def operation(*arguments: Any, implementation: str | None = None, **options: Any) -> Any:
            target = target_of(implementation)
            if target is None:
                return reference(*arguments, **options)
            return kernels(target, *arguments, **options)

        signature = inspect.signature(reference)
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = inspect.Parameter("implementation", keyword, default=None, annotation=str | None)
        parameters = [*signature.parameters.values()]
        keywords_end = next((i for i, p in enumerate(parameters) if p.kind == p.VAR_KEYWORD), len(parameters))
        parameters.insert(keywords_end, added)
        operation.__name__ = operation.__qualname__ = kernels.__name__
        operation.__signature__ = signature.replace(parameters=parameters)
        operation.__doc__ = inspect.cleandoc(reference.__doc__) + _IMPLEMENTATION
        return operation

    return decorate


def _check(operation: str, **arrays: tuple[Any, tuple[int, ...], Any]) -> None:
    """Raises ValueError for an array, given as (array, shape, dtype), that is not of that shape and dtype."""
    for name, (array, shape, dtype) in arrays.items():
        if array is not None and (jnp.shape(array) != shape or jnp.result_type(array) != dtype):
            wanted, found = (
                f"{jnp.dtype(kind).name}[{','.join(map(str, sizes))}]"
                for sizes, kind in ((shape, dtype), (jnp.shape(array), jnp.result_type(array)))
            )
            raise ValueError(f"{operation}: {name} must be {wanted}, found {found}")


def _rows(x: jax.Array) -> jax.Array:
    """(..., D) as (rows, D)."""
    return x.reshape(math.prod(x.shape[:-1]), *x.shape[-1:])


def _drawing(rng: jax.Array | None, rate: float, stream: int) -> tuple[jax.Array | None, float, int]:
    """(rng, rate, stream) of a dropout; without one, the same three whatever was given.

    Raises ValueError for a rate outside [0, 1) or a stream that is no 32-bit number.
    """
    if rng is None or _dropout.dropout_threshold(rate) == 0:
        return None, 0.0, 0
    if not 0 <= stream < 2**32:
        raise ValueError(f"dropout stream must be in [0, 2**32), found {stream}")
    return rng, float(rate), int(stream)


def _present(*operands: jax.Array | None) -> list[jax.Array]:
    return [x for x in operands if x is not None]


# Matrix product.


def _slope_into_product(before, after):
    """The gradient through GELU as the last step of the product that makes it."""
    if after.params["activation"] != "gelu" or after.params["dropout_rate"] or "input_activation" in after.params:
        return None  # the pre-activation is not the last operand
    *reads, pre_activation = after.inputs
    before = with_operands(before, (*before.inputs, pre_activation), input_activation="gelu")
    return before, with_operands(after, reads, activation=None)


_matmul_backward = make_primitive(
    "matmul_backward",
    _matmul.matmul_backward_reference,
    KernelOp(
        _matmul.plan_matmul_backward,
        epilogues={"matmul_backward": _slope_into_product},
        flops=lambda node: 2 * _matmul.product_flops(node),
        shapeless=("stream",),
    ),
)


def _matmul_batch_axes(has_bias, has_residual, dropout_rate, **_):
    if dropout_rate:
        return None
    return True, False, *((False,) if has_bias else ()), *((True,) if has_residual else ())


def _matmul_gradients(target, operands, results, cotangents, has_residual, **parameters):
    x, w, _, _, rng = operands
    (dy,), saved = cotangents, results[1:]
    gradients = _matmul_backward.bind(*_present(dy, x, w, *saved, rng), target=target, **parameters)
    dx, dw, *dbias = gradients
    return dx, dw, dbias[0] if dbias else None, dy if has_residual else None, None


_matmul_operation = make_operation(
    make_primitive(
        "matmul",
        _matmul.matmul_forward_reference,
        KernelOp(
            _matmul.plan_matmul_forward,
            batch_axes=_matmul_batch_axes,
            rematerialize=_matmul.matmul_rule,
            flops=_matmul.product_flops,
            shapeless=("stream",),
        ),
    ),
    _matmul_gradients,
)


@_public(_matmul.matmul)
def matmul(
    target,
    x,
    w,
    bias=None,
    *,
    activation=None,
    residual=None,
    rng=None,
    dropout_rate=0.0,
    stream=0,
):
    if w.ndim != 2 or x.ndim == 0:
        raise ValueError(f"matmul: x must be (..., K) and w (K, N), found {x.shape} and {w.shape}")
    rng, dropout_rate, stream = _drawing(rng, dropout_rate, stream)
    bias = None if bias is None else jnp.asarray(bias, x.dtype)
    shape, columns = (*x.shape[:-1], w.shape[1]), w.shape[1:]
    _check(
        "matmul",
        w=(w, (x.shape[-1], *columns), x.dtype),
        bias=(bias, columns, x.dtype),
        residual=(residual, shape, x.dtype),
        rng=(rng, (2,), jnp.uint32),
    )
    (y,) = _matmul_operation(
        target,
        *(_rows(x), w, bias, None if residual is None else _rows(residual), rng),
        activation=activation,
        has_bias=bias is not None,
        has_residual=residual is not None,
        dropout_rate=dropout_rate,
        stream=stream,
    )
    return y.reshape(shape)


# Layer norm.

_layer_norm_backward = make_primitive(
    "layer_norm_backward", _layer_norm.layer_norm_backward_reference, KernelOp(_layer_norm.plan_layer_norm_backward)
)


def _layer_norm_gradients(target, operands, results, cotangents, epsilon):
    x, scale, _ = operands
    _, mean, rstd = results
    return _layer_norm_backward.bind(x, scale, mean, rstd, *cotangents, target=target)


_layer_norm_operation = make_operation(
    make_primitive(
        "layer_norm",
        _layer_norm.layer_norm_forward_reference,
        KernelOp(
            _layer_norm.plan_layer_norm_forward,
            batch_axes=lambda epsilon: (True, False, False),
            rematerialize=_layer_norm.layer_norm_rule,
        ),
    ),
    _layer_norm_gradients,
)


@_public(_layer_norm.layer_norm)
def layer_norm(target, x, scale, bias, *, epsilon=_layer_norm.EPSILON):
    scale, bias = _scale_and_bias("layer_norm", x, scale, bias)
    (y,) = _layer_norm_operation(target, _rows(x), scale, bias, epsilon=float(epsilon))
    return y.reshape(x.shape)


def _scale_and_bias(operation, x, scale, bias):
    scale, bias = (jnp.asarray(p, jnp.float32) for p in (scale, bias))
    columns = x.shape[-1:]
    _check(operation, scale=(scale, columns, jnp.float32), bias=(bias, columns, jnp.float32))
    return scale, bias


_residual_layer_norm_backward = make_primitive(
    "residual_layer_norm_backward",
    _layer_norm.residual_layer_norm_backward_reference,
    KernelOp(_layer_norm.plan_residual_layer_norm_backward, shapeless=("stream",)),
)


def _residual_layer_norm_gradients(target, operands, results, cotangents, epsilon, **drawing):
    _, _, scale, _, rng = operands
    total, _, mean, rstd = results
    reads = _present(total, scale, mean, rstd, *cotangents, rng)
    return *_residual_layer_norm_backward.bind(*reads, target=target, **drawing), None


_residual_layer_norm_operation = make_operation(
    make_primitive(
        "residual_layer_norm",
        _layer_norm.residual_layer_norm_forward_reference,
        KernelOp(
            _layer_norm.plan_residual_layer_norm_forward,
            batch_axes=lambda epsilon, dropout_rate, stream: None if dropout_rate else (True, True, False, False),
            rematerialize=_layer_norm.residual_layer_norm_rule,
            shapeless=("stream",),
        ),
    ),
    _residual_layer_norm_gradients,
    outputs=2,
)


@_public(_layer_norm.residual_layer_norm)
def residual_layer_norm(
    target, x, branch, scale, bias, rng=None, *, dropout_rate=0.0, stream=0, epsilon=_layer_norm.EPSILON
):
    scale, bias = _scale_and_bias("residual_layer_norm", x, scale, bias)
    rng, dropout_rate, stream = _drawing(rng, dropout_rate, stream)
    _check("residual_layer_norm", branch=(branch, x.shape, x.dtype), rng=(rng, (2,), jnp.uint32))
    total, y = _residual_layer_norm_operation(
        target,
        *(_rows(x), _rows(branch), scale, bias, rng),
        dropout_rate=dropout_rate,
        stream=stream,
        epsilon=float(epsilon),
    )
    return total.reshape(x.shape), y.reshape(x.shape)


# Element by element.

_gelu_backward = make_primitive(
    "gelu_backward",
    _gelu.gelu_backward_reference,
    KernelOp(_gelu.plan_gelu_backward, batch_axes=lambda: (True, True)),
)
_gelu_operation = make_operation(
    make_primitive("gelu", _gelu.gelu, KernelOp(_gelu.plan_gelu_forward, batch_axes=lambda: (True,))),
    lambda target, operands, results, cotangents: _gelu_backward.bind(*operands, *cotangents, target=target),
)


@_public(_gelu.gelu)
def gelu(target, x):
    (y,) = _gelu_operation(target, x.reshape(-1))
    return y.reshape(x.shape)


_dropout_backward = make_primitive(
    "dropout_backward",
    _dropout.dropout_backward_reference,
    KernelOp(_dropout.plan_dropout_backward, shapeless=("stream",)),
)


def _dropout_gradients(target, operands, results, cotangents, **drawing):
    _, rng = operands
    return *_dropout_backward.bind(*cotangents, rng, target=target, **drawing), None


_dropout_operation = make_operation(
    make_primitive("dropout", _dropout.dropout, KernelOp(_dropout.plan_dropout_forward, shapeless=("stream",))),
    _dropout_gradients,
)


@_public(_dropout.dropout)
def dropout(target, x, rng, *, rate, stream):
    rng, rate, stream = _drawing(rng, rate, stream)
    if rng is None:
        return x
    _check("dropout", rng=(rng, (2,), jnp.uint32))
    rows = _rows(x) if x.ndim else x.reshape(1, 1)
    (y,) = _dropout_operation(target, rows, rng, rate=rate, stream=stream)
    return y.reshape(x.shape)


# Embedding.

_embedding_backward = make_primitive(
    "embedding_backward", _embedding.embedding_backward_reference, KernelOp(_embedding.plan_embedding_backward)
)


def _embedding_gradients(target, operands, results, cotangents):
    table, ids = operands
    return *_embedding_backward.bind(ids, *cotangents, target=target, table_rows=table.shape[0]), None


_embedding_operation = make_operation(
    make_primitive(
        "embedding",
        _embedding.embedding,
        KernelOp(_embedding.plan_embedding_forward, batch_axes=lambda: (False, True)),
    ),
    _embedding_gradients,
)


@_public(_embedding.embedding)
def embedding(target, table, ids):
    if table.ndim != 2:
        raise ValueError(f"embedding: table must be (V, D), found {table.shape}")
    (rows,) = _embedding_operation(target, table, ids.reshape(-1))
    return rows.reshape(*ids.shape, table.shape[1])


# Attention.

_attention_backward = make_primitive(
    "attention_backward",
    _attention.attention_backward_reference,
    KernelOp(
        _attention.plan_attention_backward,
        batch_axes=lambda dropout_rate, **_: None if dropout_rate else (True,) * 6,
        flops=lambda node: _attention.backward_flops(node.inputs[0].shape),
        shapeless=("stream",),
    ),
)


def _attention_gradients(target, operands, results, cotangents, **parameters):
    *qkv, rng = operands
    reads = _present(*qkv, *results, *cotangents, rng)
    return *_attention_backward.bind(*reads, target=target, **parameters), None


_attention_operation = make_operation(
    make_primitive(
        "attention",
        _attention.attention_forward_reference,
        KernelOp(
            _attention.plan_attention_forward,
            batch_axes=lambda dropout_rate, **_: None if dropout_rate else (True,) * 3,
            flops=lambda node: _attention.forward_flops(node.inputs[0].shape),
            shapeless=("stream",),
        ),
    ),
    _attention_gradients,
)


def _scoring(head_dim, scale, cap, rng, dropout_rate, stream):
    """(rng, the parameters of the primitives)."""
    rng, dropout_rate, stream = _drawing(rng, dropout_rate, stream)
    scale = _attention.default_scale(head_dim) if scale is None else float(scale)
    cap = None if cap is None else float(cap)
    return rng, {"scale": scale, "cap": cap, "dropout_rate": dropout_rate, "stream": stream}


@_public(_attention.attention)
def attention(target, q, k, v, rng=None, *, scale=None, cap=None, dropout_rate=0.0, stream=0):
    if q.ndim != 4:
        raise ValueError(f"attention: q must be (B, T, H, D), found {q.shape}")
    rng, parameters = _scoring(q.shape[-1], scale, cap, rng, dropout_rate, stream)
    _check("attention", k=(k, q.shape, q.dtype), v=(v, q.shape, q.dtype), rng=(rng, (2,), jnp.uint32))
    return _attention_operation(target, q, k, v, rng, **parameters)[0]


_packed_attention_backward = make_primitive(
    "packed_attention_backward",
    _packed_attention.packed_attention_backward_reference,
    KernelOp(
        _packed_attention.plan_packed_attention_backward,
        batch_axes=lambda dropout_rate, **_: None if dropout_rate else (True,) * 4,
        flops=lambda node: _attention.backward_flops(node.inputs[0].shape),
        shapeless=("stream",),
    ),
)


def _packed_attention_gradients(target, operands, results, cotangents, **parameters):
    qkv, rng = operands
    return *_packed_attention_backward.bind(
        *_present(qkv, *results, *cotangents, rng), target=target, **parameters
    ), None


_packed_attention_operation = make_operation(
    make_primitive(
        "packed_attention",
        _packed_attention.packed_attention_forward_reference,
        KernelOp(
            _packed_attention.plan_packed_attention_forward,
            batch_axes=lambda dropout_rate, **_: None if dropout_rate else (True,),
            flops=lambda node: _attention.forward_flops(node.inputs[0].shape),
            shapeless=("stream",),
        ),
    ),
    _packed_attention_gradients,
)


@_public(_packed_attention.packed_attention)
def packed_attention(target, qkv, rng=None, *, scale=None, cap=None, dropout_rate=0.0, stream=0):
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"packed_attention: qkv must be (B, T, 3, H, D), found {qkv.shape}")
    rng, parameters = _scoring(qkv.shape[-1], scale, cap, rng, dropout_rate, stream)
    _check("packed_attention", rng=(rng, (2,), jnp.uint32))
    return _packed_attention_operation(target, qkv, rng, **parameters)[0]


# Output layer and loss.

_linear_cross_entropy_backward = make_primitive(
    "linear_cross_entropy_backward",
    _cross_entropy.linear_cross_entropy_backward_reference,
    KernelOp(
        _cross_entropy.plan_linear_cross_entropy_backward,
        forward_backward=ForwardBackward(
            "linear_cross_entropy",
            results=(1,),  # the log normalizers
            fused="linear_cross_entropy_both_passes",
        ),
        flops=lambda node: 2 * _cross_entropy.logits_flops(node),
    ),
)


def _linear_cross_entropy_gradients(target, operands, results, cotangents, **parameters):
    operands = *operands, results[1], *cotangents
    return *_linear_cross_entropy_backward.bind(*operands, target=target, **parameters), None


_linear_cross_entropy_operation = make_operation(
    make_primitive(
        "linear_cross_entropy",
        _cross_entropy.linear_cross_entropy_forward_reference,
        KernelOp(
            _cross_entropy.plan_linear_cross_entropy_forward,
            batch_axes=lambda **_: (True, False, True),
            flops=_cross_entropy.logits_flops,
        ),
    ),
    _linear_cross_entropy_gradients,
)


register_op(
    "linear_cross_entropy_both_passes",
    KernelOp(
        _cross_entropy.plan_linear_cross_entropy_both_passes, flops=lambda node: 3 * _cross_entropy.logits_flops(node)
    ),
)


@_public(_cross_entropy.linear_cross_entropy)
def linear_cross_entropy(target, x, w, targets, *, transposed=False):
    if x.ndim != 2 or w.ndim != 2:
        layout = "(V, D)" if transposed else "(D, V)"
        raise ValueError(f"linear_cross_entropy: x must be (N, D) and w {layout}, found {x.shape} and {w.shape}")
    w_shape = (w.shape[0], x.shape[1]) if transposed else (x.shape[1], w.shape[1])
    _check("linear_cross_entropy", w=(w, w_shape, x.dtype), targets=(targets, (x.shape[0],), jnp.int32))
    return _linear_cross_entropy_operation(target, x, w, targets, transposed=bool(transposed))[0]


# Optimizer.

_global_norm_primitive = make_primitive(
    "global_norm", _global_norm.global_norm_reference, KernelOp(_global_norm.plan_global_norm)
)


@_public(_global_norm.global_norm_reference)
def global_norm(target, *arrays):
    return _global_norm_primitive.bind(*vary_alike(*arrays), target=target)[0]


_adamw_primitive = make_primitive("adamw", _adamw.adamw_reference, KernelOp(_adamw.plan_adamw))


@_public(_adamw.adamw_reference)
def adamw(target, *operands, decay, **parameters):
    size = len(decay)
    if len(operands) != 4 * size + 3:
        raise ValueError(f"adamw: {size} parameters need {4 * size + 3} operands, found {len(operands)}")
    for i in range(size):
        x, gradient, mu, nu = operands[i : 4 * size : size]
        shape = jnp.shape(x)
        state = {f"parameter {i}": x, f"first moment {i}": mu, f"second moment {i}": nu}
        _check("adamw", **{name: (array, shape, jnp.float32) for name, array in state.items()})
        _check("adamw", **{f"gradient {i}": (gradient, shape, jnp.result_type(gradient))})
    count, learning_rate, loss = operands[4 * size :]
    scalars = {"count": (count, (), jnp.int32), "learning_rate": (learning_rate, (), jnp.float32)}
    _check("adamw", **scalars, loss=(loss, (), jnp.float32))
    parameters["decay"] = tuple(map(bool, decay))
    return tuple(_adamw_primitive.bind(*vary_alike(*operands), target=target, **parameters))
