"""The wheels' contents; and a missing driver, which is an error where VK_KERNELS_REQUIRE is set, as in CI."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "NOT INSTALLED: this machine lacks the Vulkan loader (libvulkan1)" in done.stdout


def test_tests_that_would_be_skipped_for_want_of_a_driver_are_an_error_where_it_is_required(tmp_path):
    nothing = str(tmp_path / "none.json")
    environment = {**os.environ, "VK_ICD_FILENAMES": nothing, "VK_DRIVER_FILES": nothing, "VK_KERNELS_REQUIRE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_install.py", "-k", "nothing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "VK_KERNELS_REQUIRE is set: no Vulkan" in done.stderr


def test_ci_requires_a_driver():
    assert "export VK_KERNELS_REQUIRE=1\nexec bash scripts/test.sh\n" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """Both wheels, built from this checkout: the library's and the trainer's."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in (ROOT, ROOT / "vk_kernels"):
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return {file.name.split("-")[0]: zipfile.ZipFile(file) for file in folder.glob("*.whl")}


def requirements(wheel: zipfile.ZipFile) -> set[str]:
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    return {name for name, rest in required if "extra ==" not in rest}


def folders(wheel: zipfile.ZipFile) -> set[str]:
    return {name.split("/")[0] for name in wheel.namelist() if ".dist-info" not in name}


def test_the_library_installs_alone(wheels):
    """With all that it runs, and without what only this repository uses."""
    wheel = wheels["vk_kernels"]
    assert folders(wheel) == {"vk_kernels"}
    assert requirements(wheel) == {"jax", "ml-dtypes", "numpy", "vulkan"}
    held, package = set(wheel.namelist()), ROOT / "vk_kernels"
    wanted = {*package.rglob("*.py"), *package.glob("shaders/binaries/*"), package / "py.typed"}
    wanted.remove(package / "tools" / "build_shaders.py")
    assert {str(file.relative_to(ROOT)) for file in wanted} - held == set()
    assert [
        name for name in held if not name.endswith((".py", ".spv", "manifest.json", "py.typed")) and "-" not in name
    ] == []


def test_the_trainer_brings_its_configs_and_puts_no_package_of_that_name_beside_it(wheels):
    wheel = wheels["gpt_jax_vulkan"]
    assert folders(wheel) == {"gpt_jax"}
    assert "vk-kernels" in requirements(wheel)
    assert requirements(wheel).isdisjoint({"vulkan", "ml-dtypes"})
    shipped = {name for name in wheel.namelist() if name.startswith("gpt_jax/configs/")}
    assert shipped == {f"gpt_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    page = {str(file.relative_to(ROOT)) for file in (ROOT / "gpt_jax" / "runs" / "page_files").iterdir()}
    assert page <= set(wheel.namelist())
    assert "gpt_jax/runs/page_files/LICENSE-echarts.txt" in page


def test_an_installed_trainer_finds_its_configs_and_a_folder_of_ones_own(wheels, tmp_path):
    """`configs` of the current folder wins, file by file."""
    wheels["gpt_jax_vulkan"].extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    (own := tmp_path / "own" / "configs").mkdir(parents=True)
    (own / "mine.py").write_text("from configs import chat_tiny\n\nget_config = chat_tiny.get_config\n")
    (own / "chat.py").write_text("from gpt_jax.configs.chat import *\n\nprint('own')\n")
    code = (
        "import sys\n"
        f"sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]\n"  # of an editable installation
        "from gpt_jax.errors import UserError\n"
        "from gpt_jax.config_file import load_config\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        print(load_config(name).name)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def loaded(folder: Path, *names: str) -> list[str]:
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    installed = "configs/chat_tiny.py"
    missing = (
        "--config=configs/chat_tin.py does not exist here, nor in the configs installed with gpt_jax: did you mean "
    )
    assert loaded(tmp_path / "empty", installed, "configs/chat_tin.py") == [
        "chat_tiny",
        missing + "configs/chat_tiny.py?",
    ]
    assert loaded(own.parent, "configs/mine.py") == ["own", "chat_tiny"]
    (tmp_path / "empty" / "configs.py").write_text("X = 1\n")
    (line,) = loaded(tmp_path / "empty", installed)
    assert "cannot import name 'chat' from 'configs'" in line
    (own / "__init__.py").write_text("import no_such_module\n")
    (line,) = loaded(own.parent, "configs/mine.py")
    assert "no_such_module" in line
