"""Each Vulkan kernel's time in a train step beside its floor, from the profile that a run stored.

A kernel's floor is the larger of two times: that of its bytes at the rate of a large copy, and that of its products at
the rate of a large product, both measured on the device when the profile was made.
"""

import collections
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt_jax.runs.content import Bars, Figure, ReportBlock, Text, make_table
from gpt_jax.runs.folder import PROFILE
from gpt_jax.runs.formats import format_number
from gpt_jax.runs.info import FORMAT_VERSION
from gpt_jax.runs.load import RunData, import_extra
from gpt_jax.storage.json_file import NUMBER, DamagedError, Types, read_object

if TYPE_CHECKING:
    import pandas as pd

PROFILE_FILE = Path(PROFILE) / "kernels.json"  # in a run's folder
_TYPES: Types = {
    "device": str,
    "step": NUMBER,
    "bytes_per_second": NUMBER,
    "flops_per_second": NUMBER,
    "dispatches": list,
}
SHOWN = 24  # kernels in the picture


class KernelTime(NamedTuple):
    """All dispatches of one kernel in a step."""

    name: str
    calls: int
    seconds: float
    by_bytes: float  # seconds at the rate of a copy
    by_flops: float  # seconds at the rate of a product

    @property
    def floor(self) -> float:
        return max(self.by_bytes, self.by_flops)

    @property
    def bound(self) -> str:
        return "FLOPs" if self.by_flops > self.by_bytes else "bytes"


def kernel_times(profile: dict[str, Any]) -> list[KernelTime]:
    """The kernels of a profile, those first that are furthest from their floor."""
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for dispatch in profile["dispatches"]:
        row = found[kernel_name(dispatch["label"])]
        for i, value in enumerate((1, dispatch["seconds"], dispatch["bytes"], dispatch["flops"])):
            row[i] += value
    bandwidth, rate = profile["bytes_per_second"], profile["flops_per_second"]
    times = [KernelTime(name, int(n), s, b / bandwidth, f / rate) for name, (n, s, b, f) in found.items()]
    return sorted(times, key=lambda kernel: kernel.floor - kernel.seconds)


def read_profile(path: Path) -> dict[str, Any]:
    """Reads what a run stored. Raises UserError if it is damaged."""
    profile = read_object(path, FORMAT_VERSION, _TYPES)
    for i, dispatch in enumerate(profile.get("dispatches") or ()):
        numbers = isinstance(dispatch, dict) and [dispatch.get(name) for name in ("seconds", "bytes", "flops")]
        if (
            not numbers
            or not all(isinstance(n, int | float) for n in numbers)
            or not isinstance(dispatch.get("label"), str)
        ):
            raise DamagedError(f"{path}: dispatches[{i}] has no label, seconds, bytes and flops: put back a good copy")
    missing = [name for name in _TYPES if not profile.get(name)]
    if missing:
        raise DamagedError(f"{path} lacks {missing[0]}: put back a good copy")
    return profile


def kernel_name(label: str) -> str:
    """The kernel of a dispatch's label, without its sizes."""
    return label.split(" of ")[0].split(",")[0]


def section(run: RunData) -> list[ReportBlock]:
    path = run.workdir / PROFILE_FILE
    if not path.exists():
        if not str(run.info.get("backend", "")).startswith("vulkan"):
            return [Text("Only Vulkan's kernels are timed one by one.")]
        return [Text("Not asked for: --config.log.profile_step=100 stores each kernel's time of that step.")]
    profile = read_profile(path)
    times = kernel_times(profile)
    whole, floor = sum(x.seconds for x in times), sum(x.floor for x in times)
    rows = [
        (x.name, x.calls, *(format_number(1e3 * y, ".3f") for y in (x.seconds, x.floor, x.seconds - x.floor)), x.bound)
        for x in times
    ]
    all_of_them = (
        "all",
        sum(x.calls for x in times),
        *(format_number(1e3 * y, ".3f") for y in (whole, floor, whole - floor)),
        "",
    )
    [table] = make_table(("kernel", "dispatches", "ms", "floor, ms", "above it", "bound by"), [*rows, all_of_them])
    shown = times[:SHOWN]
    chart = Bars(
        tuple(x.name for x in shown),
        (("time", [_ms(x.seconds) for x in shown]), ("floor", [_ms(x.floor) for x in shown])),
        "ms a step",
    )
    copied, multiplied = _rate(profile["bytes_per_second"] / 1e9), _rate(profile["flops_per_second"] / 1e12)
    about = (
        f"Step {profile['step']:,} on {profile['device']}, one dispatch at a time: {1e3 * whole:.3f} ms, of which the "
        f"floor is {1e3 * floor:.3f}{_overlapping(run)}. A copy runs at {copied} GB/s there, a product at {multiplied} "
        "TFLOP/s."
    )
    return [Figure("Each kernel beside its floor", about, chart, table), *_by(profile, "phase"), *_by(profile, "layer")]


def _overlapping(run: RunData) -> str:
    _, step_ms = run.series("train", "step_ms")
    return f"; as the run does it, side by side, a step takes {statistics.median(step_ms):.3f}" if len(step_ms) else ""


def times_table(profile: dict[str, Any]) -> "pd.DataFrame":
    """The kernels of a profile as a data frame: calls, ms, floor and what bounds it."""
    pd = import_extra("pandas")
    rows = [
        {"kernel": x.name, "calls": x.calls, "ms": 1e3 * x.seconds, "floor, ms": 1e3 * x.floor, "bound by": x.bound}
        for x in kernel_times(profile)
    ]
    return pd.DataFrame(rows).set_index("kernel")


def _by(profile: dict[str, Any], what: str) -> list[ReportBlock]:
    found: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for dispatch in profile["dispatches"]:
        name = dispatch.get(what) or "other"
        found[name] += dispatch["seconds"]
        calls[name] += 1
    whole = math.fsum(found.values())
    rows = [(name, calls[name], format_number(1e3 * s, ".3f"), f"{s / whole:.1%}") for name, s in found.most_common()]
    return make_table((what, "dispatches", "ms", "share"), rows)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")
