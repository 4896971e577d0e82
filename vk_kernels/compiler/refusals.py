"""Primitives that are more than a function of arrays on one device, and what to do instead."""

from jax.extend.core import JaxprEqn

STATE = frozenset(
    (
        *("new_ref", "empty_ref", "get", "swap", "addupdate", "freeze", "free_ref", "accum_grad_in_ref", "run_state"),
        *("new_box", "box_get", "box_set", "after_all", "create_token"),
    )
)
HOST = frozenset(("pure_callback", "io_callback", "debug_callback", "debug_print", "ffi_call"))
ERRORS = frozenset(("check",))
DEVICES = frozenset(
    (
        *("shard_map", "axis_index", "psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather"),
        *("all_gather_invariant", "all_to_all", "ragged_all_to_all", "reduce_scatter", "pbroadcast"),
    )
)
GENERATORS = frozenset(("rng_bit_generator", "rng_uniform"))

_ADVICE = {
    **dict.fromkeys(STATE, "no state on Vulkan, where functions are pure: take the value, and give the new one back"),
    **dict.fromkeys(HOST, "no side effects on Vulkan, and no calls of the host: leave callbacks and debug prints out"),
    **dict.fromkeys(ERRORS, "no side effects on Vulkan: jit checkify.checkify(fn), which gives errors as results"),
    **dict.fromkeys(DEVICES, "no axis of devices on Vulkan: a function runs on one"),
    **dict.fromkeys(GENERATORS, "no kernel draws the bits of rbg keys: make them with impl='threefry2x32'"),
}


def advice(equation: JaxprEqn) -> str:
    """Why an equation can be no part of a function on Vulkan; empty if it can."""
    found = _ADVICE.get(equation.primitive.name, "")
    if equation.effects and not found:
        found = "no side effects on Vulkan, found " + ", ".join(sorted({type(x).__name__ for x in equation.effects}))
    return found
