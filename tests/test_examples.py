"""The README shows examples/own_function.py as it is, and what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

from vulkan_devices import SELECTOR, needs_vulkan

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
    assert done.stdout in blocks_of_readme()
