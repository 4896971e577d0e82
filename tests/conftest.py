"""Settings that make quiet mistakes loud, for every test."""

import os

# Before jax is imported: the processor only, in two pieces, so that code which assumes one device shows.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Not for tests that call optax, which promotes."""
    with jax.numpy_dtype_promotion("strict"):
        yield
