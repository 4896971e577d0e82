"""How JAX reaches the Vulkan runtime: one operation under jax.jit is one custom call; a whole function, by
`vk_kernels.jit`, one submission."""

from pathlib import Path

from jax.extend import source_info_util

from vk_kernels.lowering import interop  # noqa: F401  (it tells JAX of our arrays)
from vk_kernels.lowering.absorb import changed, register_rule
from vk_kernels.lowering.call import Target, counts, open_device
from vk_kernels.lowering.context import target_of, use
from vk_kernels.lowering.join import register_joint
from vk_kernels.lowering.operation import make_operation
from vk_kernels.lowering.primitive import make_primitive, vary_alike

for _folder in ("lowering", "ops"):  # of what is called here, the line is the caller's
    source_info_util.register_exclusion(str(Path(__file__).parents[1] / _folder))

__all__ = [
    "Target",
    "changed",
    "counts",
    "make_operation",
    "make_primitive",
    "open_device",
    "register_joint",
    "register_rule",
    "target_of",
    "use",
    "vary_alike",
]
