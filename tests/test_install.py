"""A missing driver is a notice on a user's machine and an error where VK_KERNELS_REQUIRE is set, as in CI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("required", "code"), [("", 0), ("1", 1)])
@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_what_cannot_be_installed_is_an_error_only_where_it_is_required(required, code, tmp_path):
    """On a machine whose loader is gone, and which has no apt."""
    for name in ("uname", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "ldconfig").write_text("#!/bin/sh\n")
    (tmp_path / "ldconfig").chmod(0o755)
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "VK_KERNELS_REQUIRE": required}
    script = [shutil.which("bash"), str(ROOT / "scripts" / "install_vulkan.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert "NOT INSTALLED: this machine lacks the Vulkan loader (libvulkan1)" in done.stdout


def test_tests_that_would_be_skipped_for_want_of_a_driver_are_an_error_where_it_is_required(tmp_path):
    nothing = str(tmp_path / "none.json")
    environment = {**os.environ, "VK_ICD_FILENAMES": nothing, "VK_DRIVER_FILES": nothing, "VK_KERNELS_REQUIRE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_install.py", "-k", "nothing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "VK_KERNELS_REQUIRE is set: no Vulkan" in done.stderr


def test_ci_requires_a_driver():
    assert "export VK_KERNELS_REQUIRE=1\nexec bash scripts/test.sh\n" in (ROOT / ".ci" / "run").read_text()
