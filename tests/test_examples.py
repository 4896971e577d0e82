"""The README and docs/compiler.md show examples as they are, and what they print."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from vulkan_devices import SELECTOR, needs_vulkan

from vk_kernels.runtime.physical_device import choose, list_devices

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_function.py"


def blocks_of_readme() -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_shows_the_example():
    code = EXAMPLE.read_text().split('"""\n', 2)[-1].strip()
    assert code in [block.strip() for block in blocks_of_readme()]


@needs_vulkan
def test_the_readme_shows_what_the_example_prints():
    environment = {**os.environ, "VK_KERNELS_DEVICE": SELECTOR, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if choose(list_devices(), SELECTOR).kind == "cpu":
        assert done.stdout in blocks_of_readme()
    else:  # the second line is the program of the software driver
        assert any(block.startswith(done.stdout.splitlines(keepends=True)[0]) for block in blocks_of_readme())


def as_the_page_shows(printed: str) -> list[str]:
    """The lines of examples/compiler.py without what docs/compiler.md leaves out."""
    off = r"\w+=(?:0\.0|0|False|None)"
    printed = re.sub(r"  # .*$", "", printed, flags=re.MULTILINE)  # scopes
    printed = re.sub(rf"\[{off}(?:, {off})*\]|(?<=[\[ ]){off}, |, {off}(?=[\],])", "", printed)
    return re.sub(r"^(dispatch [^(:]*)\(.*?\):", r"\1:", printed, flags=re.MULTILINE).splitlines()


@needs_vulkan
def test_the_page_of_the_compiler_shows_what_its_example_prints(monkeypatch, capsys):
    if choose(list_devices(), SELECTOR).kind != "cpu":
        pytest.skip("the page has the kernels of the software driver")
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    runpy.run_path(str(ROOT / "examples" / "compiler.py"))
    printed = as_the_page_shows(capsys.readouterr().out)
    shown = re.findall(r"^```text\n(.*?)^```$", (ROOT / "docs" / "compiler.md").read_text(), re.MULTILINE | re.DOTALL)
    cut = [line.removesuffix("...") for block in shown for line in block.splitlines() if line.endswith("...")]
    whole = [line for block in shown for line in block.splitlines() if not line.endswith("...")]
    assert len(whole) > 40
    assert [line for line in whole if line not in printed] == []
    assert [line for line in cut if not any(one.startswith(line) for one in printed)] == []
