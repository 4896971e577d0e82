"""How a run stands: as `run.json` says, but that a process which died without a word is not running."""

import time
from pathlib import Path
from typing import Any

from gpt_jax.runs.folder import LOCK_FILE
from gpt_jax.runs.info import INFO_FILE, read_info
from gpt_jax.runs.metrics import METRICS_FILE
from gpt_jax.storage.lock import is_held

RUNNING, CRASHED, UNKNOWN = "running", "crashed", "unknown"
HEARTBEAT = 600.0  # seconds without a write after which a run counts as crashed, on a disk without locks


def read_status(workdir: Path) -> tuple[str, dict[str, Any]]:
    """A run's status and the facts of its run.json; nothing is written.

    The status is 'running' while a process has the folder, else that of run.json, where 'running' means 'crashed'; a
    folder without one is 'unknown'.

    Raises:
      UserError: run.json is damaged, or a newer program wrote it.
    """
    info = read_info(workdir)
    while True:
        held = is_held(workdir / LOCK_FILE)
        status = RUNNING if held else info.get("status") or UNKNOWN
        if held or status != RUNNING or (held is None and _beats(workdir)):
            return status, info
        # It may have ended, or begun, between the two looks.
        before, info = info, read_info(workdir)
        if info == before:
            return CRASHED, info


def _beats(workdir: Path) -> bool:
    """Whether the files of a run were written to lately."""
    times = [file.stat().st_mtime for name in (INFO_FILE, METRICS_FILE) if (file := workdir / name).exists()]
    return time.time() - max(times, default=0.0) < HEARTBEAT
