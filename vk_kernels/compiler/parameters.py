"""Which parameters of each primitive the compiler reads, and which it may leave alone.

A primitive with any other parameter, or with a value that no rule is made for, is refused: to look at its name alone
would be to compute something else.
"""

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.extend.core import JaxprEqn


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


_REDUCTION, _RUNNING, _ARG = _named("axes"), _named("axis", "reverse"), _named("axes", "index_dtype")
_WINDOW = _named("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
_SCATTER = _named("dimension_numbers", "mode", "update_jaxpr", "update_consts")
_CONVOLUTION = _named(
    *("dimension_numbers", "feature_group_count", "batch_group_count", "window_strides", "padding", "lhs_dilation"),
    *("rhs_dilation", "precision", "preferred_element_type"),
)
_BODY = _named("jaxpr", "call_jaxpr")  # by JAX's version

# What rules read, or what is seen of it in the shape and the dtype of the results. Others read no parameter.
_READ: dict[str, frozenset[str]] = {
    "approx_top_k": _named("k", "reduction_dimension", "is_max_k", "aggregate_to_topk"),
    **dict.fromkeys(("argmax", "argmin"), _ARG),
    "bitcast_convert_type": _named("new_dtype"),
    "broadcast_in_dim": _named("shape", "broadcast_dimensions"),
    "call_hi_primitive": _named("_prim"),
    "concatenate": _named("dimension"),
    "cond": _named("branches"),
    "conv_general_dilated": _CONVOLUTION,
    "convert_element_type": _named("new_dtype"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _RUNNING),
    "dot_general": _named("dimension_numbers", "precision", "preferred_element_type"),
    "dynamic_slice": _named("slice_sizes"),
    **dict.fromkeys(("empty", "empty2"), _named("shape", "dtype")),
    "expand_dims": _named("dimensions"),
    "gather": _named("dimension_numbers", "slice_sizes", "mode", "fill_value"),
    "integer_pow": _named("y"),
    "iota": _named("dtype", "shape", "dimension"),
    "iota_2x32_shape": _named("shape"),
    "mul": _named("out_dtype"),
    "pad": _named("padding_config"),
    "platform_index": _named("platforms"),
    "polynomial": _named("unroll"),
    **dict.fromkeys(("pmax", "pmin", "psum"), _named("axes", "axis_index_groups")),
    "random_bits": _named("bit_width", "shape"),
    "random_seed": _named("impl"),
    "random_split": _named("shape"),
    "random_wrap": _named("impl"),
    "reduce": _named("jaxpr", "consts", "dimensions"),
    **dict.fromkeys((f"reduce_{op}" for op in ("sum", "prod", "max", "min", "and", "or", "xor")), _REDUCTION),
    "reduce_precision": _named("exponent_bits", "mantissa_bits"),
    "reduce_window": _WINDOW | {"jaxpr", "consts"},
    **dict.fromkeys((f"reduce_window_{op}" for op in ("sum", "max", "min")), _WINDOW),
    "reshape": _named("new_sizes", "dimensions"),
    "rev": _named("dimensions"),
    "round": _named("rounding_method"),
    "scan": _named("jaxpr", "length", "reverse", "num_consts", "num_carry", "ft_in"),
    **dict.fromkeys((f"scatter-{op}" for op in ("add", "sub", "mul", "min", "max")), _SCATTER),
    **dict.fromkeys((f"scatter_{op}" for op in ("add", "sub", "mul", "min", "max")), _SCATTER),
    "scatter": _SCATTER,
    "select_and_gather_add": _WINDOW | {"select_prim"},
    "select_and_scatter_add": _WINDOW | {"select_prim"},
    "slice": _named("start_indices", "limit_indices", "strides"),
    "sort": _named("dimension", "num_keys"),
    "split": _named("sizes", "axis"),
    "squeeze": _named("dimensions"),
    **dict.fromkeys(("stack", "unstack"), _named("axis")),
    "tile": _named("reps"),
    "top_k": _named("k", "axis"),
    "transpose": _named("permutation"),
    "while": _named("cond_nconsts", "cond_jaxpr", "body_nconsts", "body_jaxpr"),
    # Calls.
    **dict.fromkeys(("call", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"), _BODY),
    **dict.fromkeys(("composite", "eval_jaxpr"), _BODY),
    **dict.fromkeys(("checkpoint", "remat2"), _named("jaxpr", "prevent_cse", "differentiated")),
    "custom_vmap_call": _named("call"),
    "linear_call": _named("callee"),
}

# Hints, promises, and where arrays are to lie: they change nothing about a result on one device.
_EVERYWHERE = _named("accuracy", "sharding", "out_sharding", "weak_type")
_PROMISES = _named("indices_are_sorted", "unique_indices")
_DERIVATIVES = _named("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "num_consts", "symbolic_zeros")
_JIT = (
    *("in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars", "ctx_mesh", "name"),
    *("keep_unused", "inline", "compiler_options_kvs", "resource_env"),
)
_LEFT: dict[str, frozenset[str]] = {
    "approx_top_k": _named("recall_target", "reduction_input_size_override"),
    **dict.fromkeys(("call", "closed_call"), _named("name")),
    "composite": _named("name", "attributes", "version"),
    "cond": _named("branches_platforms"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _DERIVATIVES),
    "custom_vmap_call": _named("rule", "in_tree", "out_tree"),
    "device_put": _named("devices", "srcs", "copy_semantics"),
    "empty2": _named("memory_space"),
    "eval_jaxpr": _named("name"),
    "gather": _PROMISES,
    **dict.fromkeys(("jit", "pjit"), _named(*_JIT)),
    "layout_constraint": _named("layout"),
    "linear_call": _named("transpose_thunk", "num_callee_consts", "num_res"),
    "mesh_cast": _named("dst_sharding"),
    "name": _named("name"),
    "pcast": _named("axes", "to"),
    "pvary": _named("axes", "axis_index_groups"),
    "reduce": _named("computation"),  # of which jaxpr is made
    **dict.fromkeys(("checkpoint", "remat2"), _named("policy")),
    "reshard": _named("dst_sharding", "concrete_mesh"),
    "scan": _named("unroll", "linear", "_split_transpose", "ft_out"),
    "sharding_constraint": _named("layout", "context_mesh", "unconstrained_dims"),
    **dict.fromkeys(("sort", "top_k"), _named("is_stable")),  # ours are, asked to or not
    **{name: _PROMISES for name in _READ if name.startswith("scatter")},
}


def read(equation: JaxprEqn) -> dict[str, Any]:
    """The parameters of an equation that are not left alone. Raises ValueError for one that no rule knows."""
    name, left = equation.primitive.name, _LEFT.get(equation.primitive.name, frozenset()) | _EVERYWHERE
    found = {key: value for key, value in equation.params.items() if key not in left}
    for key, value in found.items():
        if key not in _READ.get(name, ()):
            raise ValueError(f"{name} with {key}={_shown(value)}, a parameter that no kernel is made for")
        fits = _VALUES.get(key)
        if fits and not fits(value, equation):
            raise ValueError(f"{name} with {key}={_shown(value)}, which no kernel is made for")
    return {key: value for key, value in found.items() if key not in _CHECKED}


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# Values that rules are made for, where others would be another function.


def _is_mode(mode: Any, _: JaxprEqn) -> bool:
    modes = lax.GatherScatterMode
    return mode in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)


def _is_precision(precision: Any, equation: JaxprEqn) -> bool:
    """Whether products of the operands as they are, added up in f32, are as precise as asked for."""
    if isinstance(precision, tuple):
        return all(x is None or isinstance(x, lax.Precision) for x in precision)
    if precision is None or isinstance(precision, lax.Precision):
        return True
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    given = {short.get(x.aval.dtype.name) for x in equation.invars}
    plain = {f"{x}_{x}_F32" for x in given} if len(given) == 1 else set()
    return getattr(precision, "name", "") in {"DEFAULT", *plain}


_VALUES: dict[str, Callable[[Any, JaxprEqn], bool]] = {
    "mode": _is_mode,
    "precision": _is_precision,
    "out_dtype": lambda dtype, equation: dtype in (None, equation.invars[0].aval.dtype),
}
_CHECKED = _named("precision", "out_dtype")  # nothing is left to read of those that are right
