"""A kernel's bindings are given by name, and what does not fit is an error that names kernel and argument."""

import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from vk_kernels.ops.planning import dispatch, operands_of, planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan, check_operands
from vk_kernels.runtime.kernel import manifest
from vk_kernels.runtime.kernel_signature import KernelSignature, signature, snake_case
from vk_kernels.spirv.reflect import Reflection

F32, BF16, INT32 = (np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.int32))
UINT32 = np.dtype(np.uint32)

DROPOUT = {"stream": 7, "first": 9, "threshold": 6554, "scale": 1.1}
CONSTANTS = {"rows": 3, "columns": 5, "dropout": DROPOUT}
BUFFERS = {"x": 0, "rng": 1, "y": 2}


def dropout(constants=CONSTANTS, **buffers: int | None):
    return dispatch("dropout", "f32", 1, constants=constants, spec={"ALIGNED": False}, **(buffers or BUFFERS))


def test_buffers_and_constants_lie_where_the_shader_has_them():
    made = dropout()
    assert made.operands == (0, 1, 2)
    assert made.push_constants == struct.pack("<IIIIIf", 3, 5, 7, 9, 6554, 1.1)
    assert dropout(y=2, x=0, rng=1) == made  # by name, in whatever order


def test_a_struct_of_constants_may_be_a_named_tuple_and_an_array_a_sequence():
    class Dropout(NamedTuple):
        stream: int
        first: int
        threshold: int
        scale: float

    assert dropout({**CONSTANTS, "dropout": Dropout(**DROPOUT)}) == dropout()
    found = signature("global_norm", "f32").pack({"counts": list(range(8)), "groups": 9})
    assert found == struct.pack("<9I", *range(8), 9)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"x": 0, "y": 2}, r"kernel dropout.f32 is not given buffer rng; it takes x, rng, y"),
        ({**BUFFERS, "dy": 3}, r"kernel dropout.f32 has no buffer dy; it takes x, rng, y"),
        ({"x": None, "rng": None, "y": None}, r"kernel dropout.f32: no buffer is given"),
    ],
)
def test_a_missing_or_unknown_buffer_is_named(buffers, message):
    with pytest.raises(TypeError, match=message):
        dropout(**buffers)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        (
            {"rows": 3, "dropout": DROPOUT},
            r"dropout.f32 is not given push constant columns; it takes rows, c",
        ),
        ({**CONSTANTS, "epsilon": 1.0}, r"dropout.f32 has no push constant epsilon; it takes rows, columns, dropout"),
        (
            {**CONSTANTS, "dropout": {"stream": 7, "first": 0, "threshold": 1}},
            r"is not given push constant dropout.scale",
        ),
        ({**CONSTANTS, "rows": 3.0}, r"kernel dropout.f32: push constant rows is uint32, found 3.0"),
        ({**CONSTANTS, "rows": -1}, r"push constant rows is uint32, found -1"),
        ({**CONSTANTS, "rows": 2**32}, r"push constant rows is uint32, found 4294967296"),
        ({**CONSTANTS, "dropout": {**DROPOUT, "scale": "1"}}, r"push constant dropout.scale is float32, found '1'"),
        ({**CONSTANTS, "rows": (1, 2)}, r"push constant rows holds 1 numbers, found 2"),
    ],
)
def test_a_push_constant_that_is_missing_unknown_or_of_another_type_is_named(constants, message):
    with pytest.raises(TypeError, match=message):
        dropout(constants)


def test_what_a_kernel_does_not_use_is_bound_to_what_is_there():
    product = signature("matmul_coop2", "bf16_64x64x64")  # which has no binding 4
    given = {"a": 5, "b": 6, "bias": None, "residual": None, "c": 7, "pre_activation": None}
    assert product.operands(given) == (5, 6, 5, 5, 5, 7, 7)  # what is written, to what is written anyway


ARRAYS = [ArraySpec((3, 5), F32), ArraySpec((2,), UINT32)], [ArraySpec((3, 5), F32)]


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"x": 1, "rng": 0, "y": 2}, r"kernel dropout.f32: buffer x holds float32, found uint32"),
        ({"x": 2, "rng": 1, "y": 0}, r"kernel dropout.f32: buffer y is written, and bound to an input of the plan"),
        ({"x": 0, "rng": 2, "y": 3}, r"kernel dropout.f32: buffer rng holds uint32, found float32"),
    ],
)
def test_buffers_that_are_exchanged_are_named(buffers, message):
    check_operands(Plan((dropout(),)), *ARRAYS)
    with pytest.raises(TypeError, match=message):
        check_operands(Plan((dropout(**buffers),)), *ARRAYS)


def test_a_planner_checks_what_it_has_bound():
    @planner
    def plan(info, inputs, outputs):
        (x, rng), (y,), _ = operands_of(inputs, outputs)
        return Plan((dropout(x=rng, rng=x, y=y),))

    with pytest.raises(TypeError, match=r"kernel dropout.f32: buffer x holds float32, found uint32"):
        plan(None, *ARRAYS)


@pytest.mark.parametrize(
    ("kernel", "variant", "buffer", "takes", "refuses"),
    [
        ("layer_norm", "bf16", "input", [BF16], [F32, INT32]),
        ("layer_norm", "bf16", "mean", [F32], [BF16, UINT32]),
        ("embedding", "f32", "ids", [INT32, UINT32], [F32, BF16]),
        ("matmul", "bf16_32x32x16", "bias", [BF16, F32], []),  # f32 as words: the log normalizers of a loss
        ("matmul_coop2", "bf16_64x64x64", "a", [BF16], [F32]),
    ],
)
def test_what_an_array_may_be_read_as(kernel, variant, buffer, takes, refuses):
    found = signature(kernel, variant)
    names = {name: i for i, name in enumerate(found.buffers)}
    operands = found.operands(names)
    for dtype in (*takes, *refuses):
        arrays = [dtype]  # the others are scratch
        places = tuple(0 if operand == names[buffer] else 1 + operand for operand in operands)
        if dtype in takes:
            found.check_operands(places, arrays, inputs=0)
        else:
            with pytest.raises(TypeError, match=f"buffer {buffer} holds .*, found {dtype.name}"):
                found.check_operands(places, arrays, inputs=0)


def test_every_kernel_that_ships_names_all_that_it_binds():
    for name, record in manifest().items():
        found = KernelSignature(name, Reflection.from_json(record))
        assert len(found.buffers) == len(record["bindings"])
        assert len(found.constants) == len(record["push_constants"])
        assert all(name.replace(".", "_").isidentifier() for name in (*found.buffers, *found.constants))
        assert all(constant.type in ("uint32", "int32", "float32") for constant in found.constants.values())
        ends = [constant.offset + 4 * constant.count for constant in found.constants.values()]
        assert (
            max(ends) == record["push_constant_bytes"] == sum(4 * c.count for c in found.constants.values())
        )  # no gaps


def test_names_are_in_snake_case():
    names = ("dOut", "restOfB1", "strideA", "groupsX", "array0", "dropout.keptScale", "logB2")
    assert [*map(snake_case, names)] == [
        *("d_out", "rest_of_b1", "stride_a", "groups_x", "array0", "dropout.kept_scale", "log_b2")
    ]
