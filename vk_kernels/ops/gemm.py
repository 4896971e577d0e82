"""Plans of matrix products: C = epilogue(op(A) op(B)), for one matrix or a batch of them. Knows no JAX.

Three families of kernels make the product; `plan_gemm` picks one by what the device can do:
  coop2   VK_NV_cooperative_matrix2: a workgroup multiplies whole tiles of bf16 that the driver loads
  coop1   VK_KHR_cooperative_matrix: a subgroup multiplies 16 x 16 x 16 blocks of bf16
  plain   any device: f32 arithmetic on blocks of registers
Where C has too few tiles to fill the device, k is split: each slice makes its partial sums and `matmul_finish` adds
them up, always in the same order, so that a product is the same bit for bit every time.
"""

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vk_kernels.device import DeviceInfo
from vk_kernels.errors import FeatureError
from vk_kernels.features import Features
from vk_kernels.kernel import manifest
from vk_kernels.plan import Dispatch, Plan

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
SHORT = {F32: "f32", BF16: "bf16"}  # as in the names of the variants

VARIANTS = ("coop2", "coop1", "plain")  # in order of preference
BUSY = {"cpu": 4}  # workgroups that keep a device of that kind busy
BUSY_GPU = 128
MIN_SPLIT_K = 256  # the shortest slice of k that is worth its partial sums
MAX_SPLITS = 32
FINISH_THREADS = 256
STRIP_ROWS, STRIP_COLUMNS = 256, 128  # what one workgroup sums in `plan_column_sums`
MAX_GROUPS = 65535  # along either axis; every device takes that many


@dataclass(frozen=True)
class Matrix:
    """Where a kernel finds a matrix (or a batch of them), row-major, in one of its operands.

    operand: index into (*inputs, *outputs, *scratch) of the plan. stride: elements between rows. offset: elements
    before the first matrix. batch_stride: elements between the matrices of a batch; 0 has them share one.
    """

    operand: int
    dtype: np.dtype
    rows: int
    columns: int
    stride: int
    offset: int = 0
    batch_stride: int = 0

    def aligned(self, count: int) -> bool:
        """Whether every row starts and ends at a multiple of `count` elements."""
        return not any(n % count for n in (self.columns, self.stride, self.offset, self.batch_stride))


def matrix(operand: int, dtype: np.dtype, rows: int, columns: int) -> Matrix:
    """Dense matrices, one behind the other."""
    return Matrix(operand, np.dtype(dtype), rows, columns, columns, batch_stride=rows * columns)


@dataclass(frozen=True)
class Epilogue:
    """What happens to the sums before they are stored, in this order, in f32. The indices are operands of the plan.

    bias: (columns of C,) to add. save_pre_activation: where to store the sums as they are then. gelu: apply GELU.
    gelu_slope_of: multiply by GELU's slope at these values. rng, threshold, scale, stream: dropout (see
    `dropout_threshold`, `dropout_scale`); rng is uint32 (2,), None for no dropout. residual: to add.
    accumulate: add what C holds. All but rng have C's dtype, and residual, save_pre_activation and gelu_slope_of its
    layout. Dropout and bias take no batch, and residual and gelu_slope_of exclude one another.
    """

    bias: int | None = None
    save_pre_activation: int | None = None
    gelu: bool = False
    gelu_slope_of: int | None = None
    rng: int | None = None
    threshold: int = 0
    scale: float = 1.0
    stream: int = 0
    residual: int | None = None
    accumulate: bool = False


NOTHING = Epilogue()


class Tile(NamedTuple):
    """What a workgroup makes: m x n of C, k at a time; in `plain` a thread makes block_m x block_n of it."""

    m: int
    n: int
    k: int
    block_m: int = 0
    block_n: int = 0
    threads: int = 256


# Best first for products that fill the device.
TILES = {
    "plain": (Tile(128, 128, 16, 8, 8), Tile(64, 64, 16, 4, 4), Tile(32, 32, 16, 4, 4, threads=64)),
    "coop1": (Tile(128, 128, 32), Tile(64, 64, 32, threads=128)),
    "coop2": (Tile(128, 256, 32), Tile(128, 128, 32), Tile(64, 128, 64), Tile(64, 64, 64, threads=128)),
}


def choose_tile(variant: str, m: int, n: int, k: int, batch: int = 1, busy: int = BUSY_GPU) -> tuple[Tile, int]:
    """The tile and the number of slices of k for a product: a pure table, so that it can be tuned.

    The largest tile of which C has enough, with k split if need be, to keep `busy` workgroups at work; else whatever
    makes the most of them.
    """
    best, most = (TILES[variant][-1], 1), 0
    for tile in TILES[variant]:
        tiles = batch * -(-m // tile.m) * -(-n // tile.n)
        splits = max(1, min(-(-busy // tiles), k // MIN_SPLIT_K, MAX_SPLITS))
        if tiles * splits >= busy:
            return tile, splits
        if tiles * splits > most:
            best, most = (tile, splits), tiles * splits
    return best


def _lacking(info: DeviceInfo, variant: str) -> str:
    """What `info` lacks for a product of bf16 by `variant`; empty where it lacks nothing."""
    if variant == "plain":
        return ""
    features: Features = info.features
    needed = {"shaderBFloat16CooperativeMatrix", "cooperativeMatrix"}
    needed |= {"cooperativeMatrixWorkgroupScope", "cooperativeMatrixFlexibleDimensions"} if variant == "coop2" else set()
    for record in manifest().values():
        if record["entry"] == f"matmul_{variant}":
            needed |= set(record["features"])
    missing = sorted(needed - features.names)
    if missing:
        return ", ".join(missing)
    types = ("bf16", "bf16", "f32", "f32")
    if variant == "coop1":
        found = any(
            (row.m, row.n, row.k) == (16, 16, 16) and (row.a, row.b, row.c, row.result) == types
            for row in features.cooperative_matrices
            if row.scope == "subgroup"
        )
        return "" if found else "cooperative matrices of 16x16x16 bf16"
    found = {
        row.workgroup_invocations
        for row in features.cooperative_matrices2
        if row.scope == "workgroup" and (row.a, row.b, row.c, row.result) == types
    }
    return "" if {tile.threads for tile in TILES["coop2"]} <= found else "workgroup cooperative matrices of bf16"


def choose_variant(info: DeviceInfo, dtype: np.dtype, variant: str | None = None) -> str:
    """The family of kernels for operands of `dtype`; `variant` demands one.

    Raises FeatureError where the device lacks what `variant` needs, ValueError for an unknown one or one that does not
    take the dtype.
    """
    if variant is None:
        if dtype != BF16:
            return "plain"
        return next(name for name in VARIANTS if not _lacking(info, name))
    if variant not in VARIANTS:
        raise ValueError(f"matmul variant must be one of {', '.join(VARIANTS)}, found {variant!r}")
    if variant != "plain" and dtype != BF16:
        raise ValueError(f"matmul variant {variant!r} multiplies bfloat16, found {dtype.name}")
    lacking = _lacking(info, variant)
    if lacking:
        raise FeatureError(f"matmul variant {variant!r}: {info.name} lacks {lacking}")
    return variant


def plan_gemm(
    info: DeviceInfo,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    batch: int = 1,
    epilogue: Epilogue = NOTHING,
    scratch: int,
    variant: str | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Plan:
    """C = epilogue(op(A) op(B)), op being the transpose where asked; accumulated in f32.

    Args:
      a, b, c: f32 or bf16; a and b of one dtype; c f32, or of that dtype.
      batch: matrices; `batch_stride` says where each stands.
      scratch: index of the first operand that the plan may use for scratch: len(inputs) + len(outputs), and the
        scratch of the plans before it. The plan's own `scratch` lists what it needs from there.
      variant, tile, splits: demand a family of kernels, a tile of it, a number of slices of k.

    Raises:
      ValueError: shapes, dtypes or demands that do not fit; FeatureError: the device lacks `variant`.
    """
    m, k = (a.columns, a.rows) if transpose_a else (a.rows, a.columns)
    k_of_b, n = (b.columns, b.rows) if transpose_b else (b.rows, b.columns)
    if (m, n) != (c.rows, c.columns) or k != k_of_b:
        raise ValueError(f"no product of {m}x{k} and {k_of_b}x{n} is {c.rows}x{c.columns}")
    if a.dtype != b.dtype or a.dtype not in SHORT or c.dtype not in (F32, a.dtype):
        raise ValueError(f"no product of {a.dtype.name} and {b.dtype.name} gives {c.dtype.name}")
    if batch > 1 and (epilogue.rng is not None or epilogue.bias is not None):
        raise ValueError("bias and dropout are for one matrix, not for a batch")
    if epilogue.gelu_slope_of is not None and epilogue.residual is not None:
        raise ValueError("an epilogue has gelu_slope_of or residual, not both")
    if epilogue.rng is not None and epilogue.accumulate:
        raise ValueError("an epilogue has dropout or accumulate, not both")
    if 0 in (m, n, batch):
        return Plan(())

    chosen = choose_variant(info, a.dtype, variant)
    if chosen != "plain" and not all(x.offset % 8 == x.batch_stride % 8 == 0 for x in (a, b, c)):
        if variant is not None:
            raise ValueError(f"matmul variant {variant!r} takes matrices that start at multiples of 8 elements")
        chosen = "plain"
    found = choose_tile(chosen, m, n, k, batch, BUSY.get(info.kind, BUSY_GPU))
    tile, splits = tile or found[0], splits or (found[1] if tile is None else 1)
    slice_k = max(1, -(-k // (splits * tile.k))) * tile.k  # whole tiles, so that only the last slice is ragged
    splits = max(1, -(-k // slice_k))

    work = _Work(m, n, k, batch, splits, slice_k)
    spec = {"TRANSPOSE_A": transpose_a, "TRANSPOSE_B": transpose_b}
    if splits > 1:
        partial = matrix(scratch, F32, m, n)
        multiply = _multiply(chosen, tile, spec, work, a, b, partial, NOTHING)
        return Plan((multiply, _finish(work, partial, c, epilogue)), (4 * batch * splits * m * n,))
    if chosen == "coop2" and epilogue.rng is not None:
        # coop2 applies functions to an element at a time, and each would draw the bits of all eight of its block.
        before = replace(epilogue, rng=None, residual=None)
        after = replace(NOTHING, **{name: getattr(epilogue, name) for name in _DROPOUT}, residual=epilogue.residual)
        return Plan((_multiply(chosen, tile, spec, work, a, b, c, before), _finish(work, c, c, after)))
    return Plan((_multiply(chosen, tile, spec, work, a, b, c, epilogue),))


_DROPOUT = ("rng", "threshold", "scale", "stream")


class _Work(NamedTuple):
    """The sizes that open every kernel's push constants."""

    m: int
    n: int
    k: int
    batch: int = 1
    splits: int = 1
    slice_k: int = 0


def _dispatch(
    kernel: str,
    variant: str,
    spec: dict[str, int | bool],
    work: _Work,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    epilogue: Epilogue,
    workgroups: int,
    threads: int,
) -> Dispatch:
    groups_x = min(workgroups, MAX_GROUPS)
    push_constants = struct.pack(
        "<18If",
        *(*work, groups_x),
        *(a.stride, b.stride, c.stride),
        *(a.offset, b.offset, c.offset),
        *(a.batch_stride, b.batch_stride, c.batch_stride),
        *(epilogue.stream, epilogue.threshold, epilogue.scale),
    )
    # What a kernel does not use must be bound all the same: to anything.
    residual = epilogue.residual if epilogue.gelu_slope_of is None else epilogue.gelu_slope_of
    reads = (a.operand if operand is None else operand for operand in (epilogue.bias, residual, epilogue.rng))
    saved = c.operand if epilogue.save_pre_activation is None else epilogue.save_pre_activation
    operands = (a.operand, b.operand, *reads, c.operand, saved)
    groups = (groups_x, -(-workgroups // groups_x), 1)
    spec = {"THREADS": threads, **spec}
    return Dispatch(kernel, variant, tuple(sorted(spec.items())), operands, push_constants, groups)


def _epilogue_spec(c: Matrix, epilogue: Epilogue) -> dict[str, bool]:
    return {
        "ALIGNED_C": c.aligned(4),
        "BIAS": epilogue.bias is not None,
        "SAVE_PRE_ACTIVATION": epilogue.save_pre_activation is not None,
        "GELU": epilogue.gelu,
        "GELU_SLOPE": epilogue.gelu_slope_of is not None,
        "DROPOUT": epilogue.rng is not None,
        "RESIDUAL": epilogue.residual is not None,
        "ACCUMULATE": epilogue.accumulate,
    }


def _multiply(
    variant: str,
    tile: Tile,
    transposes: dict[str, bool],
    work: _Work,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    epilogue: Epilogue,
) -> Dispatch:
    workgroups = work.batch * work.splits * -(-work.m // tile.m) * -(-work.n // tile.n)
    types = SHORT[a.dtype] if a.dtype == c.dtype else f"{SHORT[a.dtype]}_{SHORT[c.dtype]}"
    spec = {**transposes, **_epilogue_spec(c, epilogue), "ALIGNED_A": a.aligned(4), "ALIGNED_B": b.aligned(4)}
    spec |= {"TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return _dispatch("matmul", types, spec, work, a, b, c, epilogue, workgroups, tile.threads)


def _finish(work: _Work, a: Matrix, c: Matrix, epilogue: Epilogue) -> Dispatch:
    """C = epilogue(the sum over splits of A)."""
    quads = work.batch * work.m * -(-work.n // 4)
    types = SHORT[a.dtype] if a.dtype == c.dtype else f"{SHORT[a.dtype]}_{SHORT[c.dtype]}"
    spec = {**_epilogue_spec(c, epilogue), "ALIGNED_A": a.aligned(4)}
    workgroups = -(-quads // FINISH_THREADS)
    return _dispatch("matmul_finish", types, spec, work, a, a, c, epilogue, workgroups, FINISH_THREADS)


def plan_epilogue(a: Matrix, c: Matrix, epilogue: Epilogue) -> Plan:
    """C = epilogue(A), element by element; A and C may be one buffer."""
    if 0 in (c.rows, c.columns):
        return Plan(())
    return Plan((_finish(_Work(c.rows, c.columns, 0), a, c, epilogue),))


def plan_column_sums(a: Matrix, c: Matrix, *, scratch: int) -> Plan:
    """C (1 x n) = the sums of A's columns, in f32; `scratch` as for `plan_gemm`."""
    if a.columns == 0:
        return Plan(())
    strips = max(1, -(-a.rows // STRIP_ROWS))
    partial = matrix(scratch, F32, 1, a.columns)
    spec = {"ALIGNED_A": a.aligned(4), "ALIGNED_C": partial.aligned(4)}
    work = _Work(a.rows, a.columns, 0, splits=strips, slice_k=STRIP_ROWS)
    workgroups = strips * -(-a.columns // STRIP_COLUMNS)
    first = _dispatch("matmul_column_sums", SHORT[a.dtype], spec, work, a, a, partial, NOTHING, workgroups, 256)
    first = replace(first, operands=first.operands[:6])
    last = _finish(_Work(1, a.columns, 0, splits=strips), partial, c, NOTHING)
    return Plan((first, last), (4 * strips * a.columns,))
