"""A small part of the campaign; `make campaign` is the whole."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PART = ["--seed=1", "--kills=1", "--inputs=4", "--damage=1", "--full-disk=1", "--folder-pairs=1", "--minutes=1"]
KINDS = ("bad input", "kill -9", "damage", "two processes")  # a disk is filled only where one can be mounted


def test_a_small_part_of_the_campaign_is_survived():
    command = [sys.executable, "tests/campaign/campaign.py", "--only", *PART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    survived = re.findall(r"^\| (.+) \| ([1-9]\d*) \| 0 \|$", done.stdout, re.MULTILINE)
    for kind in KINDS:
        assert any(name.startswith(kind) for name, _ in survived), f"no {kind} among {survived}"
