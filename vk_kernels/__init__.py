"""The hot operations of a transformer, for JAX, with kernels for any Vulkan GPU."""

from typing import Any

__all__ = ["use"]


def __getattr__(name: str) -> Any:
    """`use` is imported when it is asked for: the Vulkan runtime below it must not need jax."""
    if name == "use":
        from vk_kernels.lowering import use

        return use
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
