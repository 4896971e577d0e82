"""Settings that make quiet mistakes loud, for every test."""

import compilers  # noqa: F401 first of all: it sets variables that jax and lavapipe read

# isort: split
import gc
import os
from collections.abc import Iterator

import pytest
from vulkan_devices import SELECTOR, layer_skip_reason, skip_reason

from vk_kernels.errors import NoDeviceError
from vk_kernels.runtime import device
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.instance import layer_installed

gc.disable()  # until all is imported: a quarter of the time goes by looking for garbage that there is not


def _validate() -> bool:
    """The validation layer watches all that runs on the CPU device, where the layer is installed."""
    try:
        return os.environ.get("VK_KERNELS_DEVICE", "cpu") in ("", "cpu") and layer_installed()
    except NoDeviceError:
        return False


if _validate():
    os.environ.setdefault("VK_KERNELS_VALIDATION", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also what takes seconds, where no file or test is named")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vulkan: needs a Vulkan device")
    config.addinivalue_line("markers", "slow: takes seconds; all tests of the files in LONGEST do. See --slow")
    config.addinivalue_line("markers", "validation_layer: needs a Vulkan device and the Khronos validation layer")


def pytest_sessionstart(session: pytest.Session) -> None:
    """VK_KERNELS_REQUIRE=1, as in CI: no driver or no validation layer ends the tests, which would be skipped else."""
    if os.environ.get("VK_KERNELS_REQUIRE") and layer_skip_reason():
        raise pytest.UsageError(f"VK_KERNELS_REQUIRE is set: {layer_skip_reason()}")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Workers begin with one stretch of the tests each, where not told otherwise: a module's fixtures are made once."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection() -> None:
    """JAX is for what collects tests: xdist's own process only hands them out, and is spared the import."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
    gc.freeze()  # a million objects that stay, in which no collection looks for garbage again
    gc.enable()


# Files that take long: scripts/test.sh hands out files in this order, and one that began last would run alone.
LONGEST = (
    *("test_train_device", "test_campaign", "test_rowwise", "test_reductions", "test_attention", "test_matmul"),
    *("test_api", "test_jit_train", "test_train", "test_run_folder", "test_decoder", "test_steps"),
    "test_train_mistakes",
    # Their kernels are those of the first: by now the driver's cache has them.
    *("test_lora_run", "test_jit", "test_decoding_ops", "test_notebooks", "test_train_vulkan", "test_cut_step"),
    "test_ops_in_training",
    *("test_default_corpus", "test_cached", "test_op_properties", "test_model", "test_references", "test_optimizer"),
    *("test_train_early", "test_checkpoint_damage", "test_corpus", "test_sample", "test_checkpoint"),
    "test_open_settings",
)
# Handed out behind those: what takes long only where the driver has compiled none of their kernels before.
LONG_WHEN_COLD = (
    *("test_conformance", "test_cross_entropy", "test_placement", "test_semantics", "test_special_values"),
    *("test_codegen", "test_extend_texts", "test_trainable", "test_jit_properties", "test_dropin", "test_code_size"),
)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate((*LONGEST, *LONG_WHEN_COLD))}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable: the others stay as they are
    for item in items:
        if item.path.stem in LONGEST:
            item.add_marker("slow")
        needs_layer = item.get_closest_marker("validation_layer") is not None
        if needs_layer or not {"device", "opened"}.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("vulkan")
        reason = layer_skip_reason() if needs_layer else skip_reason()
        if reason and item.get_closest_marker("vulkan"):
            item.add_marker(pytest.mark.skip(reason=reason))
    if not config.getoption("--slow") and config.args_source != pytest.Config.ArgsSource.ARGS:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="module", name="device")
def vulkan_device() -> Iterator[Device]:
    """An open device for a test module; every one of its tests must leave it usable."""
    with Device.open(SELECTOR) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_validation_messages():
    """A test fails for what the validation layer says of devices that it leaves open; of others their `close` tells."""
    yield
    for opened in device._open_devices.copy():
        opened.check_validation("at the end of the test")


@pytest.fixture(scope="module")
def traced_once() -> Iterator[dict]:
    """Runs of the module share their programs, see `shared_programs`: gives those traced so far."""
    from traced_once import shared_programs  # here: it imports jax

    with pytest.MonkeyPatch.context() as patch:
        yield shared_programs(patch)


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Not for tests that call optax, which promotes."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
