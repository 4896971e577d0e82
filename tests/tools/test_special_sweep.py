"""The sweep over special values: some of it, what it finds, and that nothing is left out."""

from pathlib import Path

import numpy as np
import pytest
from jax import lax
from profiles import NIGHT
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.compiler.codegen import scalars
from vk_kernels.tools.conformance import special
from vk_kernels.tools.conformance.exceptions import ALLOWED
from vk_kernels.tools.conformance.registry import BF16, F32, INTEGERS
from vk_kernels.tools.conformance.special_values import ELEMENTWISE, Item, constants, items, values

DOCS = Path(__file__).parents[2] / "docs" / "numbers.md"
# Of no computation, or of JAX versions that have other primitives for it.
IDENTITIES = {"copy_p", "name", "pcast", "pvary"}
# By day XLA makes infinity of a NaN that keeps no mantissa, see compilers.py; test_special_values.py knows of it.
OF_BITS = "reduce_precision" if NIGHT else "floor"


def test_every_elementwise_primitive_is_swept():
    swept = {name.split()[0] for name in ELEMENTWISE}
    assert scalars.ELEMENTWISE - IDENTITIES - swept == set()
    for name in ("div", "lt", "clamp"):
        arity = ELEMENTWISE[name][1]
        assert len(items(name, F32)) == 1 + arity * len(constants(F32))
    assert {str(x) for x in constants(F32)} >= {"0.0", "-0.0", "1.0", "-1.0", "inf", "-inf", "nan"}
    assert np.isin(np.array(constants(INTEGERS[0])), values(INTEGERS[0])).all()


def test_every_difference_that_is_allowed_is_told():
    text = DOCS.read_text()
    for row in ALLOWED[:-1]:
        assert f"\n| {row.name} |" in text


@needs_vulkan
@pytest.mark.parametrize(
    ("names", "dtype"), [(("mul", "div", "sub"), F32), (("max", OF_BITS), BF16), (("rem",), INTEGERS[1])]
)
def test_some_of_the_sweep(names, dtype):
    tallies = special.run(names, (dtype,), SELECTOR)
    assert sorted(tallies) == sorted(names)
    assert all(tally.items > 4 and not tally.wrong for tally in tallies.values()), tallies


@needs_vulkan
def test_what_differs_is_found():
    def negative(x):
        return lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: -x)

    x = np.array([0, 1, np.nan], np.float32)
    zeros = lax.platform_dependent
    found = special.check(
        [
            Item("copy", "a sign", lambda x: zeros(x, cpu=lambda x: x * 0, default=lambda x: -(x * 0)), (x[:2],)),
            Item("copy", "a number", negative, (x,)),
            Item("copy", "nothing", lambda x: x, (x,)),
            Item("add", "allowed", lambda x: x + 0.0, (-x,), lax.add, (-x, np.zeros_like(x))),
        ],
        SELECTOR,
    )
    assert found["copy"].items == 3
    signs, numbers = found["copy"].wrong
    assert signs == "float32 a sign [0]: 2 of 2, first at [0]: -0.0, and XLA has 0.0"
    assert numbers.startswith("float32 a number [0]: 2 of 3")
    assert not found["add"].wrong
    assert dict(found["add"].allowed) == {"x + 0": 1}
