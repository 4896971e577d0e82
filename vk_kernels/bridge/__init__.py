"""How JAX reaches the Vulkan runtime: one operation under jax.jit is one custom call; a whole function, by
`vk_kernels.jit`, one submission."""

from pathlib import Path

from jax.extend import source_info_util

from vk_kernels.bridge import array_methods  # noqa: F401  (it tells JAX of our arrays)

for _folder in ("bridge", "compiler", "ops"):  # of what is called here, the line is the caller's
    source_info_util.register_exclusion(str(Path(__file__).parents[1] / _folder))
