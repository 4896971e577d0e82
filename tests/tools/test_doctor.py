"""The doctor and the check: what they report, and that they notice what is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from waiting import PATIENCE

from vk_kernels import ops
from vk_kernels.bridge.use import target_of
from vk_kernels.errors import FeatureError, NoDeviceError, SettingError
from vk_kernels.runtime.instance import NO_DRIVER
from vk_kernels.runtime.physical_device import DevicePlace, list_devices
from vk_kernels.tools import build_shaders, check_ops, doctor
from vk_kernels.tools.arguments import run_tool
from vk_kernels.tools.conformance.__main__ import main as conformance
from vk_kernels.tools.op_cases import CASES, F32, SIZES

GELU = next(case for case in CASES if case.op == "gelu")


def fail(error):
    def function(*_, **__):
        raise error

    return function


@needs_vulkan
def test_doctor_reports_devices_variants_and_the_test(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CASES", (GELU,))
    assert doctor.main(["--device", SELECTOR]) == 0
    out = capsys.readouterr().out
    for expected in (
        "Devices",
        "subgroups of",
        "gelu                   float32   plain",
        "Self-test",
        "all 4 passed",
    ):
        assert expected in out


@needs_vulkan
def test_doctor_tests_a_cpu_device_that_nobody_asked_for(capsys, monkeypatch):
    monkeypatch.delenv("VK_KERNELS_DEVICE", raising=False)
    if any(info.kind != "cpu" for info in list_devices()):
        pytest.skip("a GPU is here")
    monkeypatch.setattr(doctor, "CASES", (GELU,))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "VK_KERNELS_DEVICE=cpu" in out
    assert "Tested here all the same" in out


@needs_vulkan
def test_doctor_says_where_a_device_is_and_which_others_read_its_memory():
    info = dataclasses.replace(list_devices()[0], index=1)
    alone, linked = DevicePlace("", (1,)), DevicePlace("0000:17:00.0", (0, 1, 3))
    assert not any("PCI" in line or "device group" in line for line in doctor.describe(info, alone))
    said = "  PCI 0000:17:00.0; a device group with 0, 3: they read each other's memory"
    assert said in list(doctor.describe(info, linked))


@needs_vulkan
def test_doctor_fails_for_a_device_that_is_not_there(capsys):
    assert doctor.main(["--device", "absent"]) == 2
    said = capsys.readouterr().out
    assert "no Vulkan device is called 'absent'" in said
    assert "install" not in said  # a driver does not mend a name


@needs_vulkan
def test_doctor_says_what_to_install_for_a_vendor_without_a_driver(capsys):
    present = " ".join(info.name for info in doctor.list_devices()).lower()
    vendor = next(vendor for vendor in doctor.VENDORS if vendor not in present)
    assert doctor.main(["--device", vendor]) == 2
    said = capsys.readouterr().out
    assert f"no Vulkan device is called '{vendor}'" in said
    assert any(line.strip() in said for line in doctor.how_to_install())


def test_a_tool_whose_reader_is_gone_ends_quietly():
    code = "from vk_kernels.tools.arguments import run_tool; run_tool(lambda: print('line\\n' * 100_000) or 0)"
    command = f'set -o pipefail; {sys.executable} -c "{code}" | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


@needs_vulkan
def test_doctor_fails_if_a_kernel_is_wrong(capsys, monkeypatch):
    gelu = ops.gelu

    def wrong_on_vulkan(x, implementation=None):
        return gelu(x) * (1 if target_of(None) is None else 1.001)

    monkeypatch.setattr(ops, "gelu", wrong_on_vulkan)
    monkeypatch.setattr(doctor, "CASES", (GELU,))
    assert doctor.main(["--device", SELECTOR]) == 1
    assert "FAIL" in capsys.readouterr().out


@needs_vulkan
def test_a_wrong_truth_does_not_pass():
    """Its distance from XLA must not become what the kernels are allowed."""
    wrong = dataclasses.replace(GELU, truth=lambda x: (GELU.truth(x)[0] * 1.001,))
    assert not any(result.passed for result in check_ops.check(wrong, "tiny", F32, SELECTOR))


def test_doctor_without_a_driver_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "list_devices", fail(NoDeviceError(NO_DRIVER)))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert NO_DRIVER in out
    assert "NVIDIA" in out


@needs_vulkan
def test_variants_say_what_the_device_lacks(monkeypatch):
    """A device that refuses the first variant is asked for the next; what it lacks is told."""
    refusals = iter([FeatureError("gelu on X: X lacks cooperativeMatrix"), ValueError("no such variant")])

    def run(case, *operands):
        refusal = next(refusals, None)
        if refusal is not None:
            raise refusal
        return case.run(operands)

    monkeypatch.setattr(doctor, "_run", run)
    assert doctor.variants(GELU, F32, SELECTOR) == ("plain", ["coop2: the device lacks cooperativeMatrix"])


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "apt install"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "apt install"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "dnf install"),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, "pacman -S"),
        ({"ID": "opensuse-tumbleweed", "ID_LIKE": "opensuse suse"}, "zypper install"),
    ],
)
def test_how_to_install_by_distribution(release, command):
    first, *_ = doctor.how_to_install("Linux", release)
    assert command in first


def test_how_to_install_elsewhere():
    assert "molten-vk" in doctor.how_to_install("Darwin")[0]
    assert "vendor" in doctor.how_to_install("Windows")[0]
    unknown = doctor.how_to_install("Linux", {})
    assert all(command in unknown for command in doctor.INSTALL.values())


def test_hindrances_name_what_hides_drivers(monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    assert any("VK_ICD_FILENAMES=/nowhere.json" in line for line in doctor.hindrances())


def test_a_group_without_a_name_has_its_number(tmp_path, monkeypatch):
    def unknown(self):
        raise KeyError("getgrgid(): gid not found")

    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([tmp_path] if pattern == "renderD*" else []))
    monkeypatch.setattr(Path, "group", unknown)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert any(f"its group ({tmp_path.stat().st_gid})" in line for line in doctor.hindrances())


@needs_vulkan
def test_check_prints_a_row_for_each_output_and_gradient(capsys):
    assert check_ops.main(["--ops", "gelu", "--sizes", "tiny", "--device", SELECTOR]) == 0
    out = capsys.readouterr().out
    assert out.count(" pass\n") == 4  # output and gradient, in f32 and bf16
    assert "all 4 passed" in out


@needs_vulkan
def test_check_goes_on_after_an_error(capsys, monkeypatch):
    broken = dataclasses.replace(GELU, operands=lambda sizes, dtype: (np.zeros(3, np.float16),))
    assert not check_ops.report([broken, GELU], ("tiny",), SELECTOR)
    out = capsys.readouterr().out
    assert "found float16[3]" in out
    assert "4 of 6 passed" in out


@needs_vulkan
def test_check_notices_when_no_kernel_ran(monkeypatch):
    monkeypatch.setattr(ops, "gelu", lambda x, implementation=None: jax.nn.gelu(x))
    with pytest.raises(RuntimeError, match="no kernel ran"):
        list(check_ops.check(GELU, "tiny", F32, SELECTOR))


def test_check_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit):
        check_ops.main(["--ops", "gelu,matmull"])
    assert "unknown: matmull" in capsys.readouterr().err


ARGUMENTS = [
    (doctor.main, ["--nope"]),
    (doctor.main, ["x"]),
    (check_ops.main, ["--sizes"]),
    (check_ops.main, ["--sizes=huge"]),
    (build_shaders.main, ["--chek=1"]),
    (build_shaders.main, ["no_such_kernel"]),
    (conformance, ["--only=no_such_primitive"]),
    (conformance, ["--table=/none/such"]),
    (conformance, ["--table=LICENSE"]),
]


@pytest.mark.parametrize(("main", "arguments"), ARGUMENTS, ids=[arguments[0] for _, arguments in ARGUMENTS])
def test_a_mistake_in_the_arguments_costs_one_line(main, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: main(arguments))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code"), [(SettingError("a\nb"), 2), (NoDeviceError("a\nb"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_stops_a_tool_costs_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(fail(error))
    assert ended.value.code == code
    assert capsys.readouterr().err == ("" if code == 130 else "error: a b\n")


def test_nan_never_passes():
    result = check_ops.Result(GELU, "tiny", "float32", "plain", "output 0", float("nan"), 0.0, 1e-5)
    assert not result.passed
    assert check_ops._error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) != 0


def test_errors_are_in_units_of_the_largest_element():
    assert check_ops._error(np.array([0.0, 11.0]), np.array([0.0, 10.0])) == pytest.approx(0.1)
    assert check_ops._error(np.zeros(0), np.zeros(0)) == 0.0


def test_cases_cover_every_operation():
    of_others = {"dot_product_attention"}  # attention by another signature: tests/ops has its tests
    no_operations = {"IGNORED", "Controls", "Drawn", "Texts", "attention_scores"}
    assert {case.op for case in CASES} == set(ops.__all__) - no_operations - of_others
    assert set(SIZES) >= {"tiny", "chat", "124M"}
