"""The facts of a run: `run.json`, which says what it is, where it ran and how it stands, and `config.json`."""

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt_jax.config import types_of_fields
from gpt_jax.runs.webhook import SETTING, public_url
from gpt_jax.storage.files import replacing, writing
from gpt_jax.storage.json_file import NUMBER, VERSION, Types, read_object

INFO_FILE, CONFIG_FILE = "run.json", "config.json"
FORMAT_VERSION = 1  # of run.json and config.json; raise it when an older program would misread them
_INFO_TYPES: Types = {
    **dict.fromkeys(
        ("run_id", "name", "domain", "status", "command", "backend", "started", "ended", "stopped_early"), str
    ),
    **dict.fromkeys(
        (
            "elapsed_seconds",
            "peak_flops",
            "starts",
            "parameters",
            "trained_parameters",
            "vocabulary",
            "last_checkpoint",
        ),
        NUMBER,
    ),
    **dict.fromkeys(("versions", "git", "data"), dict),
    "device": {"platform": str, "kind": str, "count": int},
    "host": {"platform": str, "cpu_count": int, "memory_bytes": NUMBER},
    "peak_memory_bytes": {"host": NUMBER, "device": NUMBER},
    "config_file": {"path": str, "values": dict},
    "processes": {"count": int, "hosts": list, "shard": str},
    "operations": {"dispatches": NUMBER, "barriers": NUMBER, "flops": NUMBER, "bytes": NUMBER},
}
_CONFIG_TYPES: Types = types_of_fields()
STATUSES = ("running", "completed", "interrupted", "failed")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read_json(path: Path, types: Types | None = None) -> dict[str, Any]:
    """The object in a JSON file of a run, without its version; an empty one if there is no file.

    Raises:
      UserError: the file is damaged, a field is not of its type, or a newer program wrote it.
    """
    if not path.exists():
        return {}
    value = read_object(path, FORMAT_VERSION, types)
    value.pop(VERSION, None)
    return value


def read_info(workdir: Path) -> dict[str, Any]:
    """The facts of `run.json`; none if there is no such file. Raises as `read_json`."""
    return read_json(workdir / INFO_FILE, _INFO_TYPES)


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run as `config.json` has it; empty if there is no such file. Raises as `read_json`.

    Values are of the kind that the table of settings says, but may be out of range; settings may be missing.
    """
    return read_json(workdir / CONFIG_FILE, _CONFIG_TYPES)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file so that, whatever happens, either the old or the new one is there, whole."""
    with writing(path), replacing(path) as file:
        json.dump({VERSION: FORMAT_VERSION, **value}, file, indent=2)
        file.write("\n")


class RunInfo:
    """`run.json`: what the run is, where it ran and how it stands. Whole on disk at all times."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        name: str,
        domain: str,
        backend: str,
        command: str | None = None,
        device: dict[str, Any] | None = None,
        peak_bytes: Callable[[], int | None] | None = None,
        spent_seconds: float = 0.0,
        began: float | None = None,
        **facts: Any,
    ) -> None:
        """Begins the run of the folder, or goes on with it: then its id, start and time spent stay.

        Args:
          command: what was typed; None: the command line of this process.
          device: platform, kind and count of the devices; None: those that JAX sees.
          peak_bytes: gives the most memory used so far on one of them; None: as JAX knows it.
          spent_seconds: by this run before, as its checkpoint says: a part that was killed has not told the file.
          began: when this part of the run did, of `time.perf_counter`; None: now.
          **facts: more to save, as JSON values: parameters, tokenizer, data, ...
        """
        self._path = Path(workdir) / INFO_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_info(self._path.parent)
        self._peak_bytes = peak_bytes or device_peak_bytes
        self._begun = time.perf_counter() if began is None else began
        self._spent_before = max(earlier.get("elapsed_seconds", 0.0), spent_seconds)
        self.fields: dict[str, Any] = {
            "run_id": earlier.get("run_id") or new_run_id(),
            "name": name,
            "domain": domain,
            "status": "running",
            "command": shlex.join(command_line()) if command is None else command,
            "backend": backend,
            "versions": versions(),
            "device": device_facts() if device is None else device,
            "host": host_facts(),
            "git": git_facts(Path(__file__).parent),
            "starts": earlier.get("starts", 0) + 1,
            "started": earlier.get("started") or _now(),
            "ended": None,
        }
        self.update(**facts)

    @property
    def folder(self) -> Path:
        return self._path.parent

    @property
    def run_id(self) -> str:
        return self.fields["run_id"]

    def update(self, **facts: Any) -> None:
        """Adds or changes facts, brings the time and memory used up to date, and saves."""
        self.fields |= facts
        self.fields["elapsed_seconds"] = self._spent_before + time.perf_counter() - self._begun
        self.fields["peak_memory_bytes"] = {"host": host_peak_bytes(), "device": self._peak_bytes()}
        write_json(self._path, self.fields)

    def finish(self, status: str, **facts: Any) -> None:
        """Saves how the run ended: one of `STATUSES`."""
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}; found {status!r}")
        self.update(status=status, ended=_now(), **facts)


def mark_failed(workdir: Path, **facts: Any) -> None:
    """Saves that a run failed, also one that never began; facts: as for RunInfo, for a folder that has none."""
    earlier = read_info(workdir)
    if earlier:
        write_json(workdir / INFO_FILE, {**earlier, "status": "failed", "ended": _now()})
    else:
        RunInfo(workdir, **facts).finish("failed")


def command_line() -> list[str]:
    """The words that started this process, without what may be a secret in them."""
    words = list(sys.orig_argv)
    for i, word in enumerate(words):
        flag, given, value = word.partition("=")
        if flag.lstrip("-") != f"config.{SETTING}":
            continue
        if given:
            words[i] = f"{flag}={public_url(value)}"
        elif i + 1 < len(words):
            words[i + 1] = public_url(words[i + 1])
    return words


def new_run_id(now: datetime | None = None) -> str:
    """YYYYMMDDHHMMSS_xxxx: the time (UTC now, if not given) and four random letters or digits."""
    now = now or datetime.now(UTC)
    letters = "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(4))
    return f"{now:%Y%m%d%H%M%S}_{letters}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {package.removesuffix("-checkpoint"): importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}


def device_facts() -> dict[str, Any]:
    """Platform, kind and number of the devices that JAX sees."""
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}


def host_facts() -> dict[str, Any]:
    """Operating system, processors and bytes of memory; the latter None where the system does not tell."""
    memory = None
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system knows these names
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"platform": platform.platform(), "cpu_count": os.cpu_count(), "memory_bytes": memory}


def git_facts(folder: Path) -> dict[str, Any]:
    """Commit that the tracked files of a folder are at, and whether they were changed since; None if unknown."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # a package installed below a stranger's repository is not its
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_peak_bytes() -> int | None:
    """Most memory that this process had at one time; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_peak_bytes() -> int | None:
    """Most bytes in use at one time on JAX's first device; None where it does not tell."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
