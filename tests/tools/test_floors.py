"""The ceilings that a profile is compared with: what they are rates of."""

import numpy as np
from vulkan_devices import needs_vulkan

from vk_kernels.tools import floors

pytestmark = needs_vulkan


def test_the_ceiling_of_products_is_that_of_the_kernels_of_products(device):
    """Not of the generated kernel that a function's own `x @ w` becomes, at a fiftieth of their rate on a GPU."""
    product, operands = floors.large_product(device, "float32")
    [line] = [line for line in product.lower(*operands).as_text().splitlines() if line.startswith("dispatch")]
    assert " of matmul(" in line
    x, w = map(np.asarray, operands)
    np.testing.assert_allclose(np.asarray(product(*operands)), x @ w, rtol=1e-4, atol=1e-3)


def test_ceilings_are_rates(device):
    copied, multiplied = floors.ceiling_rates(device, "float32", repeats=1)
    assert copied > 0
    assert multiplied > 0
