"""How JAX reaches the Vulkan runtime: one operation under jax.jit on the CPU backend is one custom call."""

from vk_kernels.lowering import interop  # noqa: F401  (it tells JAX of our arrays)
from vk_kernels.lowering.absorb import changed, register_rule
from vk_kernels.lowering.call import Target, counts, open_device
from vk_kernels.lowering.context import target_of, use
from vk_kernels.lowering.join import register_joint
from vk_kernels.lowering.operation import make_operation
from vk_kernels.lowering.primitive import make_primitive, vary_alike

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
