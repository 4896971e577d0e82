"""Settings that make quiet mistakes loud, for every test."""

import os

# Before jax is imported: the processor only, in two pieces, so that code which assumes one device shows.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
# Programs run once or twice here: what compiles them, XLA and lavapipe, is not to polish them, in subprocesses either.
# At night it is: XLA's own errors, which ours are measured by, are then those that users get.
if os.environ.get("HYPOTHESIS_PROFILE") != "night":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("GALLIVM_PERF", "nopt")

import jax
import pytest

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime import device
from vk_kernels.runtime.instance import layer_installed

jax.config.update("jax_numpy_rank_promotion", "raise")


def _validate() -> bool:
    """The validation layer watches all that runs on the CPU device, where the layer is installed."""
    try:
        return os.environ.get("VK_KERNELS_DEVICE", "cpu") in ("", "cpu") and layer_installed()
    except NoDeviceError:
        return False


if _validate():
    os.environ.setdefault("VK_KERNELS_VALIDATION", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """VK_KERNELS_REQUIRE=1, as in CI: no driver or no validation layer ends the tests, which would be skipped else."""
    if os.environ.get("VK_KERNELS_REQUIRE"):
        import vk_fixtures

        missing = vk_fixtures.skip_reason() or ("" if layer_installed() else "no Khronos validation layer is installed")
        if missing:
            raise pytest.UsageError(f"VK_KERNELS_REQUIRE is set: {missing}")


@pytest.fixture(autouse=True)
def no_validation_messages():
    """A test fails for what the validation layer says of devices that it leaves open; of others their `close` tells."""
    yield
    for opened in device._open_devices.copy():
        opened.check_validation("at the end of the test")


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Not for tests that call optax, which promotes."""
    with jax.numpy_dtype_promotion("strict"):
        yield
