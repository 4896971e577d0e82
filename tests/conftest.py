"""Settings that make quiet mistakes loud, for every test."""

import os

# Before jax is imported: the processor only, in two pieces, so that code which assumes one device shows.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
