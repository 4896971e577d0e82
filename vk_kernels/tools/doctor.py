"""Says what of Vulkan this machine has, which kernels will run and why, and whether they give the right results.

    python -m vk_kernels.tools.doctor [--device cpu] [--no-test]

Exit code: 0 if a device is usable and its kernels pass, 2 if the arguments are wrong, else 1.
"""

import functools
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from vk_kernels.bridge.use import use
from vk_kernels.errors import FeatureError, NoDeviceError
from vk_kernels.runtime.physical_device import DeviceInfo, DevicePlace, choose, list_devices, list_places
from vk_kernels.tools import check_ops
from vk_kernels.tools.arguments import BAD_INPUT, ArgumentParser, run_tool
from vk_kernels.tools.op_cases import BF16, CASES, F32, SIZES, OpCase

# How a driver is installed, by the ID of /etc/os-release. NVIDIA's own driver package includes one everywhere.
INSTALL = {
    "debian": "sudo apt install libvulkan1 mesa-vulkan-drivers",
    "fedora": "sudo dnf install vulkan-loader mesa-vulkan-drivers",
    "arch": "sudo pacman -S vulkan-icd-loader, and vulkan-radeon, vulkan-intel, nvidia-utils or vulkan-swrast",
    "suse": "sudo zypper install libvulkan1, and libvulkan_radeon, libvulkan_intel or libvulkan_lvp",
    "alpine": "sudo apk add vulkan-loader, and mesa-vulkan-ati, mesa-vulkan-intel or mesa-vulkan-swrast",
    "nixos": "hardware.graphics.enable = true;",
}
INSTALL["ubuntu"] = INSTALL["debian"]
INSTALL["rhel"] = INSTALL["fedora"]

MANIFESTS = ("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")  # of drivers

# What changes the choice or the speed of kernels.
FEATURES = (
    "shaderBFloat16CooperativeMatrix",
    "cooperativeMatrix",
    "cooperativeMatrixWorkgroupScope",
    "storageBuffer16BitAccess",
    "shaderFloat16",
    "subgroupSizeControl",
    "VK_EXT_external_memory_host",
    "VK_KHR_push_descriptor",
)

VENDORS = ("nvidia", "amd", "radeon", "intel", "apple")

VARIANT_SIZE = "chat"  # the sizes that kernels are chosen for here


def how_to_install(system: str = platform.system(), release: dict[str, str] | None = None) -> list[str]:
    """Lines that say how a Vulkan driver comes onto this machine; `release` is its /etc/os-release."""
    if system == "Darwin":
        return ["macOS: brew install vulkan-loader molten-vk"]
    if system == "Windows":
        return ["Windows: install the graphics driver of your GPU's vendor; it includes Vulkan"]
    if release is None:
        try:
            release = platform.freedesktop_os_release()
        except OSError:
            release = {}
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    command = next((INSTALL[name] for name in names if name in INSTALL), None)
    lines = [f"{release.get('PRETTY_NAME', 'Linux')}: {command}"] if command else list(INSTALL.values())
    return [
        *lines,
        "that is for AMD and Intel GPUs, and for a Vulkan device on the CPU (lavapipe), to try things without a GPU",
        "NVIDIA: the driver from nvidia.com or your distribution; in a container, run it with "
        "NVIDIA_DRIVER_CAPABILITIES=all",
    ]


def hindrances() -> Iterator[str]:
    """Names what in this machine's set-up may hide a device."""
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        if variable in os.environ:
            yield f"{variable}={os.environ[variable]} hides every driver that is not in it"
    nodes = sorted(Path("/dev/dri").glob("renderD*"))
    for node in nodes:
        if not os.access(node, os.R_OK | os.W_OK):
            yield f"you may not use {node}: add yourself to its group ({_group(node)}) and log in again"
    if platform.system() == "Linux" and not nodes and not Path("/dev/nvidiactl").exists():
        yield "no GPU in /dev/dri, and no NVIDIA GPU in /dev: none is here, or the kernel or the container hides it"
    found = [str(path) for folder in MANIFESTS for path in sorted(Path(folder).glob("*.json"))]
    if platform.system() == "Linux" and not found:
        yield f"no driver is registered in {', '.join(MANIFESTS)}"


def _group(path: Path) -> str:
    try:
        return path.group()
    except KeyError:  # a container has no names for the groups of its host
        return str(path.stat().st_gid)


def describe(info: DeviceInfo, place: DevicePlace) -> Iterator[str]:
    """A device, line by line."""
    limits = info.limits
    yield f"{info}"
    if info.unusable:
        yield f"  not usable: {info.unusable}"
        return
    others = [str(index) for index in place.group if index != info.index]
    linked = f"a device group with {', '.join(others)}: they read each other's memory" if others else ""
    if place.pci or linked:
        yield f"  {'; '.join(filter(None, (place.pci and f'PCI {place.pci}', linked)))}"
    smallest, largest = limits.subgroup_size_range
    sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    largest_buffer = f"{limits.storage_buffer_range / 2**20:,.0f} MiB"
    yield f"  {info.memory / 2**30:.1f} GiB of memory; a buffer of at most {largest_buffer}"
    yield (
        f"  {limits.shared_memory // 1024} KiB of shared memory, {limits.workgroup_invocations} threads a workgroup, "
        f"subgroups of {sizes}"
    )
    for has, names in (
        ("has", [name for name in FEATURES if name in info.features]),
        ("lacks", [name for name in FEATURES if name not in info.features]),
    ):
        if names:
            yield f"  {has} {', '.join(names)}"


def variants(case: OpCase, dtype: np.dtype, device: str) -> tuple[str, list[str]]:
    """(the best variant that a device has for a case's shapes, what it lacks for each better one)."""
    operands = case.operands(SIZES[VARIANT_SIZE], dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    lacking = []
    for variant in check_ops.VARIANTS:
        with use("vulkan", device=device, variant=variant):
            try:
                jax.jit(functools.partial(_run, case)).lower(*shapes)
            except FeatureError as error:
                lacking.append(f"{variant}: the device lacks {str(error).rpartition('lacks ')[2]}")
            except ValueError:  # no such variant of the operation, or none for the dtype
                if variant == check_ops.VARIANTS[-1]:
                    raise
            else:
                return variant, lacking
    return "none", lacking


def _run(case: OpCase, *operands: jax.Array) -> tuple[jax.Array, ...]:
    return case.run(operands)


def one_case_each() -> list[OpCase]:
    """The most demanding case of each operation."""
    return list({case.op: case for case in CASES}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m vk_kernels.tools.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="index, 'gpu', 'cpu' or part of a name; default: VK_KERNELS_DEVICE, or a GPU")
    parser.add_argument("--no-test", action="store_true", help="do not run the kernels")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # which the kernels are called from
    print(f"Python {platform.python_version()}, jax {jax.__version__}, {platform.platform()}")
    try:
        devices = list_devices()
    except NoDeviceError as error:
        print(error)
        _print_cure()
        return 1

    print("\nDevices, best first")
    for info, place in zip(devices, list_places(), strict=True):
        print("\n".join(describe(info, place)))
    try:
        chosen = choose(devices, options.device)
        print(f"\nUsed: {chosen.name}")
    except NoDeviceError as error:
        print(f"\n{error}")
        cpus = [info for info in devices if info.kind == "cpu" and not info.unusable]
        asked = options.device or os.environ.get("VK_KERNELS_DEVICE")
        if asked and not _may_lack_a_driver(asked, devices):
            return BAD_INPUT
        if asked or not cpus:
            _print_cure()
            return BAD_INPUT if options.device else 1
        chosen = cpus[0]
        print("For a GPU:")
        _print_cure()
        print(f"Tested here all the same: {chosen.name}")
    device = str(chosen.index)

    print(f"\nVariants, for the shapes of the {VARIANT_SIZE} model")
    for case in one_case_each():
        for dtype in (F32, BF16):
            variant, lacking = variants(case, dtype, device)
            why = f"not {'; not '.join(lacking)}" if lacking else "the best there is for this dtype"
            print(f"  {case.op:<22} {dtype.name:<9} {variant:<6} {why}")
    if options.no_test:
        return 0
    print("\nSelf-test (python -m vk_kernels.tools.check_ops tests more)")
    return 0 if check_ops.report(one_case_each(), ("tiny",), device) else 1


def _may_lack_a_driver(asked: str, devices: Sequence[DeviceInfo]) -> bool:
    """Whether a driver may mend that no device is called so; else the name is a mistake."""
    if any(info.unusable for info in devices) or asked.lower() in ("gpu", "cpu"):
        return True
    named = {vendor for vendor in VENDORS if vendor in asked.lower()}
    return bool(named) and not any(vendor in info.name.lower() for vendor in named for info in devices)


def _print_cure() -> None:
    for line in (*hindrances(), *how_to_install()):
        print(f"  {line}")


if __name__ == "__main__":
    run_tool(main)
