"""What a run leaves behind: its metrics, its samples and the facts of where and how it ran.

`metrics.jsonl` has one JSON object a line: {"step", "split", "time" in unix seconds, and scalars}. The splits are

- train, every step: loss, grad_norm, grad_norm/LAYER, param_norm, update_norm, learning_rate, finite. At logging steps
  also step_ms and data_ms (wall time a step; the data wait is part of it), tokens_per_second, eta_seconds, mfu, and
  PHASE_ms: the whole time spent in another phase (eval, sample, checkpoint, ...) since the logging step before.
- validation: loss, best, seconds.
- diagnostics: attention_max/LAYER/HEAD and attention_entropy/LAYER/HEAD (nats).
- event: text.

`samples.jsonl` has {"step", "prompt", "text", "tokens", "seconds", "ended"} a line. JSON knows no NaN and no infinity:
on disk they are the strings "NaN", "Infinity" and "-Infinity", which `float` reads back. Both files may end in half a
line, of a write that a crash or kill cut short; readers leave it out.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from gpt_jax.config import UserError, types_of_fields
from gpt_jax.storage.files import StorageError, sync_folder, writing
from gpt_jax.storage.json_file import NUMBER, VERSION, Types, read_object

METRICS_FILE, SAMPLES_FILE, INFO_FILE = "metrics.jsonl", "samples.jsonl", "run.json"
CONFIG_FILE, TENSORBOARD = "config.json", "tensorboard"
FORMAT_VERSION = 1  # of run.json and config.json; raise it when an older program would misread them
_INFO_TYPES: Types = {
    **dict.fromkeys(("run_id", "name", "domain", "status", "command", "backend", "started", "ended"), str),
    **dict.fromkeys(("elapsed_seconds", "peak_flops", "starts", "parameters", "vocabulary", "last_checkpoint"), NUMBER),
    **dict.fromkeys(("versions", "git", "data"), dict),
    "device": {"platform": str, "kind": str, "count": int},
    "host": {"platform": str, "cpu_count": int, "memory_bytes": NUMBER},
    "peak_memory_bytes": {"host": NUMBER, "device": NUMBER},
}
_CONFIG_TYPES: Types = types_of_fields()
STATUSES = ("running", "completed", "interrupted", "failed")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class MetricsWriter:
    """Appends the metrics and samples of a run to its folder, as JSON lines and for TensorBoard.

    Every line reaches the operating system before the call returns, so a killed process loses nothing but the line
    it was writing. TensorBoard gets everything but the train lines between logging steps (those without step_ms),
    which would cost more than the training step of a small model.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None = None, tensorboard: bool = True) -> None:
        """Opens the files, and drops from them what a run that stood at `resume_step` has not seen yet.

        Args:
          workdir: run folder; made if it is not there.
          resume_step: the last step whose lines stay; None: the run starts afresh and no line stays.
          tensorboard: whether to write event files as well.

        Raises:
          UserError: a line other than the last of an existing file is damaged.
          StorageError: a file cannot be written.
        """
        self._folder = Path(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        last_kept = -1 if resume_step is None else resume_step
        self._metrics = _open_after(self._folder / METRICS_FILE, last_kept)
        self._samples = _open_after(self._folder / SAMPLES_FILE, last_kept)
        self._events = None
        if tensorboard:
            from gpt_jax.runs.tensorboard import EventFile

            with self._writing_events():
                self._events = EventFile(self._folder / TENSORBOARD, purge_step=last_kept + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, split: str, scalars: Mapping[str, Any]) -> None:
        """Appends one line. Values are numbers or bools, Python's or NumPy's 0-d; `text` alone is a string."""
        now = time.time()
        values = {name: value.item() if hasattr(value, "item") else value for name, value in scalars.items()}
        _write_line(self._metrics, {"step": step, "split": split, "time": now, **values})
        if self._events is None or (split == "train" and "step_ms" not in values):
            return
        with self._writing_events():
            for name, value in values.items():
                add = self._events.add_text if name == "text" else self._events.add_scalar
                add(f"{split}/{name}", value, step, now)

    def sample(
        self, step: int, prompt: str, text: str, *, tokens: int, seconds: float, ended: bool | None = None
    ) -> None:
        """Appends one generated answer.

        Args:
          tokens: how many were generated.
          seconds: that it took.
          ended: whether the model ended it by itself, not the limit; None: not known.
        """
        sample = {"prompt": prompt, "text": text, "tokens": tokens, "seconds": seconds, "ended": ended}
        _write_line(self._samples, {"step": step, **sample})
        if self._events is not None:
            with self._writing_events():
                self._events.add_text(f"sample/{prompt}", text, step, time.time())

    def flush(self) -> None:
        """Has the operating system put every line written so far on the disk."""
        self.check_in_place()
        for file in (self._metrics, self._samples):
            with writing(file.name):
                os.fsync(file.fileno())
        if self._events is not None:
            with self._writing_events():
                self._events.flush()

    def check_in_place(self) -> None:
        """Raises StorageError if the files are no longer where they were opened: what is written then is lost."""
        for file in (self._metrics, self._samples):
            with writing(file.name):
                if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                    raise StorageError(f"cannot write {file.name}: another file stands there now")

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if self._metrics.closed:
            return
        with contextlib.ExitStack() as stack:  # all of it, even if one fails
            if self._events is not None:
                stack.enter_context(self._writing_events())
                stack.callback(self._events.close)
            stack.callback(_close, self._metrics)
            stack.callback(_close, self._samples)
            self.flush()

    def _writing_events(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._folder / TENSORBOARD)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A damaged last line is left out.

    Raises:
      UserError: another line is damaged.
    """
    return (record for _, record in _whole_lines(path))


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
    with _replacing(path) as file:
        json.dump({VERSION: FORMAT_VERSION, **value}, file, indent=2)
        file.write("\n")


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line as it stands and as an object."""
    if not path.exists():
        return
    damaged = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if damaged is not None:
                raise UserError(f"{path}: line {damaged} is no JSON object; remove the line")
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
                if not 0 <= record["step"] < 2**63:
                    raise ValueError
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged = number
                continue
            if line.endswith("\n"):
                yield line, record


def _write_line(file: TextIO, record: dict[str, Any]) -> None:
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:
        line = json.dumps({name: _spell_nonfinite(value) for name, value in record.items()}, allow_nan=False)
    with writing(file.name):
        file.write(line + "\n")


def _close(file: TextIO) -> None:
    with writing(file.name):  # what a full disk did not take yet
        file.close()


def _spell_nonfinite(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_after(path: Path, last_kept: int) -> TextIO:
    """Opens a JSON-lines file to append to, without its lines of later steps than `last_kept`."""
    if path.exists():
        with _replacing(path) as kept:
            kept.writelines(line for line, record in _whole_lines(path) if record["step"] <= last_kept)
    with writing(path):
        return open(path, "a", buffering=1, encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` at the end, in one go, if all went well."""
    temporary = path.with_name(f"{path.name}.tmp")  # a kill may leave it, and the next time takes its place
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # its folder may be gone or read-only
                temporary.unlink(missing_ok=True)


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
        **facts: Any,
    ) -> None:
        """Begins the run of the folder, or goes on with it: then its id, start and time spent stay.

        Args:
          command: what was typed; None: the command line of this process.
          device: platform, kind and count of the devices; None: those that JAX sees.
          peak_bytes: gives the most memory used so far on one of them; None: as JAX knows it.
          spent_seconds: by this run before, as its checkpoint says: a part that was killed has not told the file.
          **facts: more to save, as JSON values: parameters, tokenizer, data, ...
        """
        self._path = Path(workdir) / INFO_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_info(self._path.parent)
        self._peak_bytes = peak_bytes or device_peak_bytes
        self._begun = time.monotonic()
        self._spent_before = max(earlier.get("elapsed_seconds", 0.0), spent_seconds)
        self.fields: dict[str, Any] = {
            "run_id": earlier.get("run_id") or new_run_id(),
            "name": name,
            "domain": domain,
            "status": "running",
            "command": shlex.join(sys.orig_argv) if command is None else command,
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
    def run_id(self) -> str:
        return self.fields["run_id"]

    def update(self, **facts: Any) -> None:
        """Adds or changes facts, brings the time and memory used up to date, and saves."""
        self.fields |= facts
        self.fields["elapsed_seconds"] = self._spent_before + time.monotonic() - self._begun
        self.fields["peak_memory_bytes"] = {"host": _host_peak_bytes(), "device": self._peak_bytes()}
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


def new_run_id(now: datetime | None = None) -> str:
    """YYYYMMDDHHMMSS_xxxx: the time (UTC now, if not given) and four random letters or digits."""
    now = now or datetime.now(UTC)
    letters = "".join(secrets.choice("0123456789abcdefghijklmnopqrstuvwxyz") for _ in range(4))
    return f"{now:%Y%m%d%H%M%S}_{letters}"


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
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


def _host_peak_bytes() -> int | None:
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


# Dense peaks in TFLOP/s (bfloat16 with f32 accumulation, tf32, float32 without tensor cores), by the whole name that
# JAX gives a device: a slice of a GPU (MIG), a laptop's or an unlisted variant has none rather than a wrong one.
# Sources: NVIDIA's data sheets of A100, H100, H200, L4, L40S, T4 and V100 (figures "with sparsity" halved) and its
# GA102 and Ada papers; Google Cloud's TPU system architecture pages. T4 and V100 have no bf16; a TPU's f32
# is made of several bf16 passes, and has no published peak.
PEAK_TFLOPS: tuple[tuple[str, float | None, float | None, float | None], ...] = (
    (r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312, 156, 19.5),
    (r"NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
    (r"NVIDIA H100 PCIe", 756, 378, 51.2),
    (r"NVIDIA H100 NVL", 835, 417, 60),
    (r"NVIDIA H200", 989.4, 494.7, 66.9),
    (r"NVIDIA H200 NVL", 835, 417, 60),
    (r"NVIDIA L4", 121, 60, 30.3),
    (r"NVIDIA L40S", 362, 183, 91.6),
    (r"Tesla T4", None, None, 8.1),
    (r"Tesla V100-SXM2-(16|32)GB", None, None, 15.7),
    (r"Tesla V100-PCIE-(16|32)GB", None, None, 14.0),
    (r"NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
    (r"TPU v4", 275, None, None),
    (r"TPU v5( lite|e)", 197, None, None),
    (r"TPU v5p?", 459, None, None),
    (r"TPU v6( lite|e)", 918, None, None),
)


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most in dense matrix products; None if that is not known.

    Args:
      device_kind: as `jax.Device.device_kind` says it.
      dtype: bfloat16, tf32 (f32 operands, rounded inside the product) or float32.
    """
    column = {"bfloat16": 0, "tf32": 1, "float32": 2}[dtype]
    for pattern, *peaks in PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return peaks[column] and peaks[column] * 1e12
    return None


def model_flops_per_token(matrix_parameters: int, layers: int, width: int, block: int) -> int:
    """FLOPs of forward and backward pass, a token: 6 N + 12 layers width block.

    6 N is a multiply and an add, once forward and twice backward, with each parameter; the rest is the attention's two
    products, the causal mask's saving not counted. Source: Chowdhery et al., "PaLM" (2022), appendix B.

    Args:
      matrix_parameters: N, without the embeddings, which are looked up; the output layer counts, tied or not.
      layers: of the transformer.
      width: of the residual stream, heads * head size.
      block: tokens that attention sees.
    """
    return 6 * matrix_parameters + 12 * layers * width * block
