"""A small part of the campaign; `make campaign` is the whole."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PART = ["--kills=6", "--inputs=60", "--damage=2", "--full-disk=1", "--minutes=2"]


def test_a_small_part_of_the_campaign_is_survived():
    command = [sys.executable, "tests/campaign/campaign.py", "--only", *PART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | " in done.stdout
