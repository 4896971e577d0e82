"""Plans of attention: which kernels run, on what.

Packed q, k and v are not taken apart: the kernels read them, and write their gradients, in place.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from vk_kernels.errors import FeatureError
from vk_kernels.ops.attention.reference import scale_of
from vk_kernels.ops.dropout import dropout_scale, dropout_threshold
from vk_kernels.ops.philox import SITES
from vk_kernels.ops.planning import aligned, ceil_divide, dispatch, dtype_suffix, has_lanes, operands_of, planner
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan
from vk_kernels.runtime.kernel import manifest

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

MAX_HEAD_DIM = 128  # of the kernels: a query's sums must fit in registers

# The variants on cooperative matrices, in order of preference, and their largest head dims. coop2, on those of
# VK_NV_cooperative_matrix2, keeps scores in registers, where more sums would leave no room; coop1 in shared memory.
_COOPERATIVE = {"coop2": 64, "coop1": MAX_HEAD_DIM}

VARIANTS = (*_COOPERATIVE, "plain")
_BOUNDED_CAP = 50.0  # of scores, up to which softmax needs no largest one: attention_bf16.slang says why
_MATRIX = 16  # rows of a cooperative matrix
_LANES = 32  # of the subgroups that work on them
_SUBGROUPS = 4  # of a workgroup that works on them, where its variant does not say it
_BF16 = np.dtype(ml_dtypes.bfloat16)
_TILED = ("attention_forward", "attention_dkv", "attention_dq")  # kernels that work on tiles of the scores
_TILE = 64  # keys of a plain workgroup's tile
_THREAD_ROWS = 16  # of threads in the plain kernels' workgroups, each with its queries
_EIGHT = 8  # neighbouring threads of a plain kernel that share queries
_DOT_ROWS = 16  # that a workgroup of attention_dots takes


class View(NamedTuple):
    """Strides, in elements: (b, t, h, d) of a (B, T, H, D) array is at offset + b batch + t row + h head + d."""

    offset: int
    batch: int
    row: int
    head: int


def dense(shape: tuple[int, int, int, int]) -> View:
    """The view of an array that has a buffer to itself, in row-major order."""
    _, length, heads, head_dim = shape
    return View(0, length * heads * head_dim, heads * head_dim, head_dim)


def packed(shape: tuple[int, int, int, int]) -> tuple[View, View, View]:
    """The views of q, k and v in one buffer (B, T, 3, H, D); `shape` is that of one of them."""
    _, length, heads, head_dim = shape
    width = heads * head_dim
    q, k, v = (View(i * width, length * 3 * width, 3 * width, head_dim) for i in range(3))
    return q, k, v


@planner
def plan_attention_forward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
    views: tuple[View, View, View] | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: q, k, v and, for dropout, rng; outputs: out, lse. See `attention_forward_reference`.

    views: where q, k and v are in their buffers, which may then be one; dense if None. out is dense.
    variant: of VARIANTS; None has the device and the dtype decide.
    Raises ValueError for a dtype, head dim or variant that there are no kernels for, FeatureError for a variant
    that the device cannot run.
    """
    (q, k, v, *rng), (out, lse), _ = operands_of(inputs, outputs)
    rng = rng[0] if rng else None
    launch = _Launch.of(info, inputs[q], outputs[0].shape, rng, scale, cap, dropout_rate, site, views, variant)
    if launch.empty:
        return Plan(())
    run = launch.dispatch("attention_forward", launch.softmax, q=q, k=k, v=v, rng=rng, result=out, log_sums=lse)
    return Plan((run,))


@planner
def plan_attention_backward(
    info: "DeviceInfo",
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    *,
    scale: float | None = None,
    cap: float | None = None,
    dropout_rate: float = 0.0,
    site: int = 0,
    views: tuple[View, View, View] | None = None,
    variant: str | None = None,
) -> Plan:
    """inputs: q, k, v, out, lse, d_out and, for dropout, rng; outputs: dq, dk, dv. See `attention_backward_reference`.

    views: where q, k and v are in their buffers, and dq, dk and dv likewise in theirs; dense if None. out and d_out
    are dense. Otherwise as `plan_attention_forward`.
    """
    (q, k, v, out, lse, d_out, *rng), (dq, dk, dv), dots = operands_of(inputs, outputs)
    rng = rng[0] if rng else None
    launch = _Launch.of(info, inputs[q], inputs[out].shape, rng, scale, cap, dropout_rate, site, views, variant)
    if launch.empty:
        return Plan(())
    read = {"q": q, "k": k, "v": v, "rng": rng, "d_out": d_out, "log_sums": lse}
    rows = launch.matrices * launch.length
    own_dots = "OWN_DOTS" in _defines("attention_dkv", launch.kernels["attention_dkv"][0])
    if launch.family == "coop2" and not own_dots:  # its first kernel makes the dots for the other
        dots_and_dq = launch.dispatch("attention_dq", **read, result=out, dq=dq, dots=dots)
        dk_and_dv = launch.dispatch("attention_dkv", **read, dots=dots, dk=dk, dv=dv)
        return Plan((dots_and_dq, dk_and_dv), scratch=(4 * rows,))
    if own_dots:  # kernels that make the dots of their own rows, out of out
        dots = out
    # Side by side, also where the three gradients are one array.
    by_keys = launch.dispatch("attention_dkv", disjoint_writes=("dk", "dv"), **read, dots=dots, dk=dk, dv=dv)
    dots_or_out = {"result": out} if own_dots else {"dots": dots}
    by_queries = launch.dispatch("attention_dq", disjoint_writes=("dq",), **read, **dots_or_out, dq=dq)
    if own_dots:
        return Plan((by_keys, by_queries))
    make_dots = dispatch(
        "attention_dots",
        launch.suffix,
        ceil_divide(rows, _DOT_ROWS),
        constants={"rows": rows, "heads": launch.heads, "length": launch.length, "head_dim": launch.head_dim},
        spec={"ALIGNED": aligned(launch.head_dim)},
        result=out,
        d_result=d_out,
        dots=dots,
    )
    return Plan((make_dots, by_keys, by_queries), scratch=(4 * rows,))


@planner
def plan_packed_attention_forward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], **options: Any
) -> Plan:
    """inputs: qkv and, for dropout, rng; outputs: out, lse. options and what is raised: as `plan_attention_forward`."""
    qkv, *rest = inputs
    single = _single_spec(qkv)
    plan = plan_attention_forward(info, [single] * 3 + rest, outputs, views=packed(single.shape), **options)
    return _with_operands(plan, (0, 0, 0, *range(1, len(inputs) + len(outputs))))


@planner
def plan_packed_attention_backward(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], **options: Any
) -> Plan:
    """inputs: qkv, out, lse, d_out and, for dropout, rng; outputs: dqkv. Otherwise as `plan_attention_backward`."""
    qkv, *rest = inputs
    single, dqkv = _single_spec(qkv), len(inputs)
    plan = plan_attention_backward(info, [single] * 3 + rest, [single] * 3, views=packed(single.shape), **options)
    return _with_operands(plan, (0, 0, 0, *range(1, len(inputs)), dqkv, dqkv, dqkv))


def _single_spec(qkv: ArraySpec) -> ArraySpec:
    """Like q, k or v."""
    batch, length, _, heads, head_dim = qkv.shape
    return ArraySpec((batch, length, heads, head_dim), qkv.dtype)


def _with_operands(plan: Plan, places: Sequence[int]) -> Plan:
    """The plan with the operands' other places; scratch follows the last of them."""
    gone = len(places) - 1 - max(places)

    def place(i: int) -> int:
        return places[i] if i < len(places) else i - gone

    return replace(
        plan,
        dispatches=tuple(replace(one, operands=tuple(map(place, one.operands))) for one in plan.dispatches),
    )


def choose_variant(info: "DeviceInfo", dtype: np.dtype, length: int, head_dim: int, variant: str | None = None) -> str:
    """The family of kernels for q, k and v of `dtype`; `variant` demands one.

    A text shorter than a cooperative matrix goes to 'plain': most of the matrix would be empty.

    Raises FeatureError where the device lacks what `variant` needs, ValueError for an unknown one or one that does not
    take the dtype, the length or the head dim.
    """
    if variant is None:
        if dtype != _BF16 or length < _MATRIX:
            return "plain"
        families = [family for family, largest in _COOPERATIVE.items() if head_dim <= largest]
        return next((family for family in families if not _lacking(info, family, head_dim)), "plain")
    if variant not in VARIANTS:
        raise ValueError(f"attention variant must be one of {', '.join(VARIANTS)}, found {variant!r}")
    if variant != "plain":
        if dtype != _BF16:
            raise ValueError(f"attention variant {variant!r} multiplies bfloat16, found {dtype.name}")
        if length < _MATRIX:
            raise ValueError(f"attention variant {variant!r} takes {_MATRIX} tokens or more, found {length}")
        largest = _COOPERATIVE[variant]
        if head_dim > largest:
            raise ValueError(f"attention variant {variant!r} takes a head dim of up to {largest}, found {head_dim}")
        lacking = _lacking(info, variant, head_dim)
        if lacking:
            raise FeatureError(f"attention variant {variant!r}: {info.name} lacks {lacking}")
    return variant


def _lacking(info: "DeviceInfo", variant: str, head_dim: int) -> str:
    """Names what `info` lacks for attention by cooperative matrices of a subgroup; empty where it lacks nothing."""
    records = [manifest()[f"{kernel}.{variant}_{_padded(head_dim)}"] for kernel in _TILED]
    needed = {feature for record in records for feature in record["features"]}
    if variant == "coop2":
        needed.add("cooperativeMatrixFlexibleDimensions")
    missing = needed - info.features.names
    if missing:
        return ", ".join(sorted(missing))
    shared = max(record["shared_bytes"] for record in records)
    if shared > info.limits.shared_memory:
        return f"{shared} bytes of shared memory"
    if variant == "coop2":  # its matrices are multiples of a row's
        matrices = info.features.cooperative_matrices2
        rows = [row for row in matrices if _MATRIX % row.m == _MATRIX % row.n == _MATRIX % row.k == 0]
    else:
        rows = [row for row in info.features.cooperative_matrices if {row.m, row.n, row.k} == {_MATRIX}]
    types = ("bf16", "bf16", "f32", "f32")
    if not any(row.scope == "subgroup" and (row.a, row.b, row.c, row.result) == types for row in rows):
        return f"cooperative matrices of {_MATRIX}x{_MATRIX}x{_MATRIX} bf16"
    return "" if has_lanes(info, _LANES) else f"subgroups of {_LANES}"


def _has_vectors(info: "DeviceInfo", suffix: str, head_dim: int) -> bool:
    """Whether the device is a CPU for whose vectors of eight there are kernels."""
    record = manifest().get(f"attention_forward.{suffix}_{_padded(head_dim)}_lanes")
    suits = info.kind == "cpu" and has_lanes(info, _EIGHT)
    return record is not None and suits and set(record["features"]) <= info.features.names


def _plain_kernel(info: "DeviceInfo", kernel: str, suffix: str, head_dim: int) -> tuple[str, int]:
    """The variant of a plain kernel that the device runs, and how many rows its tiles have, queries or keys.

    The small tiles are for CPUs, with their few registers and compilers that are slow to unroll, and for devices that
    lack the shared memory or the subgroups of the large ones. They need neither subgroups nor more than 32 KiB.
    """
    variant = f"{suffix}_{_padded(head_dim)}"
    if info.kind == "cpu" or not _runs(info, manifest()[f"{kernel}.{variant}"]):
        variant += "_small"
    if kernel == "attention_dkv":
        return variant, _TILE
    return variant, _THREAD_ROWS * int(_defines(kernel, variant)["ROWS"])


def _defines(kernel: str, variant: str) -> dict[str, str]:
    """The macros that a variant's source is compiled with."""
    pairs = (define.partition("=") for define in manifest()[f"{kernel}.{variant}"]["defines"])
    return {name: value for name, _, value in pairs}


def _strip_rows(kernel: str, variant: str) -> int:
    """Rows of the strips of a workgroup on cooperative matrices, queries or keys."""
    return _MATRIX * int(_defines(kernel, variant).get("SUBGROUPS", _SUBGROUPS))


def _runs(info: "DeviceInfo", record: dict[str, Any]) -> bool:
    """Whether the device has what a plain kernel takes. Shuffles among eight threads want them in one full subgroup."""
    features, (smallest, largest) = set(record["features"]), info.limits.subgroup_size_range
    if "subgroupShuffle" in features:
        features.add("computeFullSubgroups")
        if smallest < _EIGHT or largest > _EIGHT * _THREAD_ROWS:
            return False
    return features <= info.features.names and record["shared_bytes"] <= info.limits.shared_memory


def _padded(head_dim: int) -> int:
    """The head dim of the kernel that takes `head_dim`."""
    return next(padded for padded in (32, 64, MAX_HEAD_DIM) if head_dim <= padded)


class _Launch(NamedTuple):
    """Launch parameters that the kernels of one call share."""

    suffix: str
    family: str  # of VARIANTS
    kernels: dict[str, tuple[str, int]]  # those of _TILED: variant, and rows of a workgroup's tile, queries or keys
    matrices: int  # B H
    heads: int
    length: int
    head_dim: int
    spec: dict[str, int | bool]
    softmax: dict[str, bool]  # more of it, for attention_forward
    subgroup_size: int | None
    constants: dict[str, Any]  # Params of shaders/attention/attention_common.slang

    @classmethod
    def of(
        cls,
        info: "DeviceInfo",
        q: ArraySpec,
        shape: tuple[int, ...],
        rng: int | None,
        scale: float | None,
        cap: float | None,
        dropout_rate: float,
        site: int,
        views: tuple[View, View, View] | None,
        variant: str | None,
    ) -> "_Launch":
        """`shape` is that of out, (B, T, H, D)."""
        batch, length, heads, head_dim = shape
        kind = dtype_suffix(q)
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"the head dim of attention must be from 1 to {MAX_HEAD_DIM}, found {head_dim}")
        chosen = choose_variant(info, q.dtype, length, head_dim, variant)
        views = views or (dense(shape),) * 3
        threshold = dropout_threshold(dropout_rate) if rng is not None else 0
        spec, softmax = {"SOFT_CAP": cap is not None, "DROPOUT": threshold > 0}, {}
        if chosen == "plain" and _has_vectors(info, kind, head_dim):
            kernels = dict.fromkeys(_TILED, (f"{kind}_{_padded(head_dim)}_lanes", _EIGHT))
            subgroup_size, eights = _EIGHT, 4
        elif chosen == "plain":
            kernels = {kernel: _plain_kernel(info, kernel, kind, head_dim) for kernel in _TILED}
            subgroup_size, eights = None, 4
        else:
            cooperative = f"{chosen}_{_padded(head_dim)}"
            kernels = {kernel: (cooperative, _strip_rows(kernel, cooperative)) for kernel in _TILED}
            softmax = {"BOUNDED": cap is not None and abs(cap) <= _BOUNDED_CAP}
            subgroup_size, eights = _LANES, 8
        spec["ALIGNED"] = all(n % eights == 0 for n in (head_dim, *itertools.chain(*views)))
        sizes = {"matrices": batch * heads, "heads": heads, "length": length, "head_dim": head_dim}
        constants = {
            **dict(zip("qkv", views, strict=True)),
            **sizes,
            "stream": site % SITES,
            "first": site // SITES,
            "threshold": threshold,
            "kept_scale": dropout_scale(dropout_rate),
            "scale": scale_of(scale, head_dim),
            "cap": cap or 0.0,
        }
        return cls(kind, chosen, kernels, *sizes.values(), spec, softmax, subgroup_size, constants)

    @property
    def empty(self) -> bool:
        return self.matrices * self.length == 0

    def dispatch(
        self,
        kernel: str,
        spec: Mapping[str, bool] | None = None,
        disjoint_writes: Sequence[str] = (),
        **buffers: int | None,
    ) -> Dispatch:
        """`spec`: constants beside those of all."""
        variant, rows = self.kernels[kernel]
        spec = {**self.spec, **(spec or {})}
        if self.family != "coop1":  # whether no tile has a row or a column outside of the matrix
            defines = _defines(kernel, variant)
            inside = self.length % int(defines.get("STEP", _TILE)) == 0 and self.head_dim == int(defines["HEAD"])
            spec["WHOLE"] = inside and bool(self.spec["ALIGNED"])
        return dispatch(
            kernel,
            variant,
            self.matrices * ceil_divide(self.length, rows),
            constants=self.constants,
            spec=spec,
            subgroup_size=self.subgroup_size,
            disjoint_writes=disjoint_writes,
            **buffers,
        )


def forward_flops(shape: Sequence[int]) -> int:
    """Useful floating-point operations of causal attention for q (B, T, H, D) or qkv (B, T, 3, H, D): two products
    over the lower half of (T, T), that of the queries with the keys and that of the weights with the values."""
    batch, length, *_, heads, head_dim = shape
    return 2 * batch * length * length * heads * head_dim


def backward_flops(shape: Sequence[int]) -> int:
    """Useful floating-point operations of its gradient: four such products, dV, dP, dQ and dK; kernels that make the
    weights again do a fifth, which does not count."""
    return 2 * forward_flops(shape)
