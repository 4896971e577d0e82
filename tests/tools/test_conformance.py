"""Every JAX primitive that vk_kernels.jit supports, against XLA; and that docs/primitives.md says which those are."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.extend
import numpy as np
import pytest
from profiles import NIGHT
from run_graph import primitives_of
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels.errors import UnsupportedError
from vk_kernels.tools.conformance import table
from vk_kernels.tools.conformance.compare import check, results
from vk_kernels.tools.conformance.suite import PrimitiveCase, cases, names
from vk_kernels.tools.conformance.unsupported import UNSUPPORTED

PAGE = Path(__file__).parents[2] / "docs" / "primitives.md"


@needs_vulkan
@pytest.mark.parametrize("name", names())
def test_a_primitive_gives_what_xla_gives(name):
    wrong = check(cases(name, full=NIGHT), SELECTOR)
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())


@pytest.mark.parametrize("name", names())
def test_the_cases_call_their_primitive(name):
    """Most of them: under vmap or for a static index JAX takes others."""
    found = [name in primitives_of(jax.make_jaxpr(case.fn)(*case.args).jaxpr) for case in cases(name)]
    assert sum(found) > len(found) / 2


def test_every_public_primitive_has_cases_or_a_reason_not_to():
    public = jax.extend.core.primitives
    known = {getattr(public, name).name for name in dir(public) if name.endswith("_p")}
    assert sorted(known - set(names()) - set(UNSUPPORTED)) == []
    assert sorted(set(names()) & set(UNSUPPORTED)) == []


@needs_vulkan
def test_what_differs_is_found():
    def other(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x + 2), x.sum()

    differs = PrimitiveCase("add", "", other, (np.ones(3, np.float32),))
    assert "output 0: an error of" in check([differs], SELECTOR)[differs]
    assert "output 0: 3 of 3, first at [0]: 3" in check([exact := replace(differs, exact=True)], SELECTOR)[exact]
    refused = PrimitiveCase("svd", "", jax.numpy.linalg.svd, (np.ones((3, 3), np.float32),))
    fine = PrimitiveCase("add", "", lambda x: x + 1, (np.ones(3, np.float32),), gradient=True)
    assert list(check([refused, fine], SELECTOR)) == [refused]
    outputs, gradients = results(fine, *fine.args)
    np.testing.assert_array_equal(outputs[0], [2, 2, 2])
    np.testing.assert_allclose(gradients[0], [-0.75, -0.5, -0.25])


@needs_vulkan
@pytest.mark.parametrize(
    "fn",
    [
        jax.numpy.linalg.svd,
        jax.numpy.linalg.cholesky,
        jax.numpy.fft.fft,
        lambda x: jax.lax.bessel_i0e(x),
        lambda x: jax.lax.igamma(x, x),
        lambda x: jax.lax.complex(x, x),
    ],
)
def test_what_is_unsupported_is_an_error_in_words(fn):
    with pytest.raises(UnsupportedError, match=r"\(.*float32\[.*3,3\].*\) at .*test_conformance.py:\d+"):
        vk_kernels.jit(lambda x: fn(x), device=SELECTOR)(np.eye(3, dtype=np.float32))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the table counts the primitives of Python 3.11's jax")
def test_the_table_of_primitives_is_up_to_date():
    page = PAGE.read_text()
    assert page == table.with_table(page), "run python -m vk_kernels.tools.conformance --table docs/primitives.md"


def test_a_page_without_marks_is_an_error():
    with pytest.raises(ValueError, match="no <!-- primitives -->"):
        table.with_table("# A project")
