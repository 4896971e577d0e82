"""Calls of kernel ops, as text. Needs no device."""

import numpy as np

from vk_kernels.compiler.op_call import CallSite, decode_call, describe_call, encode_call, with_op, with_parameters
from vk_kernels.runtime.array_spec import ArraySpec


def test_a_call_comes_back_as_it_was_encoded():
    call = encode_call("adamw", {"decay": (True, (False, 2)), "clip": None}, CallSite("cpu", "plain")).encode()
    assert decode_call(call) == ("adamw", {"decay": (True, (False, 2)), "clip": None}, CallSite("cpu", "plain"))
    assert decode_call(with_op(call, "other"))[0] == "other"
    assert decode_call(with_parameters(call, {"clip": 1.0})) == ("adamw", {"clip": 1.0}, CallSite("cpu", "plain"))


def test_a_call_of_hundreds_of_arrays_has_a_short_text():
    """It is the label of each of an optimizer's dispatches."""
    x = ArraySpec((2, 3), np.dtype(np.float32))
    assert describe_call("adamw", [x, x]) == "adamw(float32[2,3], float32[2,3])"
    assert describe_call("adamw", [x] * 595) == f"adamw({', '.join(['float32[2,3]'] * 8)} and 587 more)"
    assert describe_call("iota", []) == "iota()"
