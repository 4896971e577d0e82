"""Plans of matrix products, C = epilogue(op(A) op(B)): which family of kernels a device has, which tile. Knows no JAX.

Three families of kernels make the product; `plan_gemm` takes the first that the device can run:
  coop1   VK_KHR_cooperative_matrix: a subgroup multiplies 16 x 16 x 16 blocks of bf16
  coop2   VK_NV_cooperative_matrix2: a workgroup multiplies whole tiles of bf16 that the driver loads; as fast where all
          sizes are large, slower where they are not
  plain   any device: f32 arithmetic on blocks of registers; a kernel of its own where subgroups are vectors of a CPU
Where C has too few tiles to fill the device, k is split: each slice makes its partial sums and `matmul_finish` adds
them up, always in the same order, so that a product is the same bit for bit every time.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vk_kernels.errors import FeatureError
from vk_kernels.ops.matmul.tile_table import Product, choice_for
from vk_kernels.ops.philox import SITES
from vk_kernels.ops.planning import MAX_GROUPS, THREADS, ceil_divide, dispatch, has_lanes
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan
from vk_kernels.runtime.kernel import manifest
from vk_kernels.runtime.physical_device import DeviceInfo

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)

VARIANTS = ("coop1", "coop2", "plain")  # in order of preference

_SHORT = {F32: "f32", BF16: "bf16"}  # as in the variants' names
_MIN_SPLIT_K = 256  # the shortest slice of k that is worth its partial sums
_MAX_SPLITS = 32
_LONG_ROW, _CACHE_LINE = 16384, 64  # elements: rows that no cache holds should be read by whole lines of it
_STRIP_ROWS, _STRIP_COLUMNS = 256, 128  # what a workgroup of matmul_column_sums takes
_ALIGNMENT = 16  # bytes at which the cooperative kernels want a matrix to start
_COOP1_LANES = 32  # of the subgroups of matmul_coop1


@dataclass(frozen=True)
class Matrix:
    """A matrix (or a batch of them), row-major, in an operand of the plan.

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
        """Whether every row starts at a multiple of `count` elements."""
        return not any(n % count for n in (self.stride, self.offset, self.batch_stride))

    def whole(self, count: int) -> bool:
        """Whether every row starts and ends at a multiple of `count` elements."""
        return self.columns % count == 0 and self.aligned(count)


def matrix(operand: int, dtype: np.dtype, rows: int, columns: int) -> Matrix:
    """Dense matrices, one behind the other."""
    return Matrix(operand, np.dtype(dtype), rows, columns, columns, batch_stride=rows * columns)


@dataclass(frozen=True)
class SoftmaxGradient:
    """Rows of C are logits, to become the gradient of their cross entropy: (softmax - one at the target) dloss.

    targets (int32), log_normalizers, dlosses (f32): operands with an element for each row, from the `first` on.
    columns: from there on, and where a target is negative, the gradient is 0.
    """

    targets: int
    log_normalizers: int
    dlosses: int
    first: int
    columns: int


@dataclass(frozen=True)
class Epilogue:
    """Steps between the sums and their store, in this order, in f32. The indices are operands of the plan.

    bias: (columns of C,) to add. save_pre_activation: where to store the sums as they are then. gelu: apply GELU.
    gelu_slope_of: multiply by GELU's slope at these values. rng, threshold, scale, site: dropout (see
    `dropout_threshold`, `dropout_scale`); rng is uint32 (2,), None for no dropout. residual: to add.
    accumulate: add what C holds. All but rng have C's dtype; residual, save_pre_activation and gelu_slope_of have its
    layout too. Bias and dropout take no batch; dropout and accumulate exclude one another, as residual and
    gelu_slope_of do. softmax_gradient stands alone.
    """

    bias: int | None = None
    save_pre_activation: int | None = None
    gelu: bool = False
    gelu_slope_of: int | None = None
    rng: int | None = None
    threshold: int = 0
    scale: float = 1.0
    site: int = 0
    residual: int | None = None
    accumulate: bool = False
    softmax_gradient: SoftmaxGradient | None = None

    def check(self, batch: int) -> None:
        """Raises ValueError for steps that exclude one another."""
        if self.softmax_gradient and (batch > 1 or replace(self, softmax_gradient=None) != NOTHING):
            raise ValueError("an epilogue has softmax_gradient alone, and for one matrix")
        if batch > 1 and (self.rng is not None or self.bias is not None):
            raise ValueError("an epilogue has bias and dropout for one matrix, not for a batch")
        if self.gelu_slope_of is not None and self.residual is not None:
            raise ValueError("an epilogue has gelu_slope_of or residual, not both")
        if self.rng is not None and self.accumulate:
            raise ValueError("an epilogue has dropout or accumulate, not both")

    def before_dropout(self) -> "Epilogue":
        return replace(self, rng=None, threshold=0, scale=1.0, site=0, residual=None)

    def from_dropout(self) -> "Epilogue":
        return replace(self, bias=None, save_pre_activation=None, gelu=False, gelu_slope_of=None)


NOTHING = Epilogue()


class Tile(NamedTuple):
    """A variant of a kernel: a workgroup makes m x n of C, k at a time.

    What `choose_tile` reads, from rate to ragged, is measured on an H100, or on lavapipe for the tiles of CPUs; coop1's
    is fitted, so that it makes the best choices for the products of GPT-2 on an H200.
    """

    m: int  # rows of C
    n: int  # columns of C
    k: int  # columns of op(A), and rows of op(B), that a turn of its loop takes
    threads: int  # of the workgroup
    rate: float  # TFLOP/s of a product that fills the device with such tiles
    resident: int  # workgroups that share a core
    overhead: int  # fixed cost of a workgroup, as the elements of k that it could have done meanwhile
    ragged: float = 1.0  # share of the rate that is left where tiles stick out of the matrix
    unbounded: bool = False  # whether to load without bounds where rows start aligned and k is whole tiles
    lanes: int = 0  # threads that its subgroups must have; 0: any number
    transposes_b: bool = True  # whether it takes a B whose rows run along k


# Each is a variant of its family's kernel.
TILES = {
    "plain": (
        Tile(128, 128, 8, 256, 52, 2, 92, unbounded=True),
        Tile(128, 64, 16, 128, 52, 3, 96, unbounded=True),
        Tile(64, 64, 16, 128, 48, 5, 108),
        Tile(32, 32, 16, 64, 31, 7, 120),
    ),
    "coop1": (
        Tile(128, 192, 128, 256, 420, 1, 580, 0.5, unbounded=True, lanes=_COOP1_LANES, transposes_b=False),
        Tile(192, 128, 64, 256, 380, 1, 516, unbounded=True, lanes=_COOP1_LANES),
        Tile(128, 192, 64, 256, 378, 1, 533, unbounded=True, lanes=_COOP1_LANES),
        Tile(128, 128, 32, 128, 395, 2, 690, unbounded=True, lanes=_COOP1_LANES),
        Tile(128, 128, 64, 256, 348, 2, 431, unbounded=True, lanes=_COOP1_LANES),
        Tile(64, 64, 64, 128, 237, 4, 530, unbounded=True, lanes=_COOP1_LANES),
    ),
    "coop2": (
        Tile(128, 256, 64, 256, 313, 1, 310, ragged=0.51),
        Tile(128, 128, 32, 128, 311, 2, 290, ragged=0.48),
        Tile(128, 128, 64, 256, 271, 1, 214, ragged=0.48),
        Tile(64, 128, 32, 128, 246, 4, 230, ragged=0.54),
        Tile(64, 64, 64, 128, 187, 2, 261, ragged=0.5),
    ),
}
CPU_TILES = (
    Tile(16, 32, 2, 8, 0.08, 1, 16, unbounded=True, lanes=8),  # of matmul_lanes
    Tile(64, 64, 8, 64, 0.02, 1, 16),
    Tile(32, 32, 8, 64, 0.014, 1, 16),
)


class _Speed(NamedTuple):
    """Speed of a device, beside that of its tiles; seconds, bytes a second."""

    cores: int
    launch: float  # of one more dispatch
    bandwidth: float  # of partial sums, most of which are still cached when they are read


GPU_CORES = 132  # an H100's and an H200's
_CPU, _GPU = _Speed(8, 2e-5, 1e10), _Speed(GPU_CORES, 5e-6, 5e12)


def choose(info: DeviceInfo, product: Product) -> tuple[Tile, int]:
    """The tile of a product and its number of slices of k: what the device's table says, else what is estimated."""
    tiles = tiles_for(info, product)
    measured = choice_for(info, product)
    if measured is not None and measured.splits > 0:
        for tile in tiles:
            if (tile.m, tile.n, tile.k) == measured[:3]:
                return tile, measured.splits
    return choose_tile(tiles, product.m, product.n, product.k, product.batch, product.k_inner, info.kind == "cpu")


@functools.lru_cache(maxsize=4096)
def choose_tile(
    tiles: tuple[Tile, ...], m: int, n: int, k: int, batch: int = 1, k_inner: bool = False, on_cpu: bool = False
) -> tuple[Tile, int]:
    """The tile, out of `tiles`, and the number of slices of k that should make a product in the least time.

    k_inner: whether the rows of both operands run along k.
    """
    most = max(1, min(k // _MIN_SPLIT_K, _MAX_SPLITS))
    choices = [(tile, splits) for tile in tiles for splits in range(1, most + 1)]
    return min(choices, key=lambda choice: _estimate(*choice, m, n, k, batch, k_inner, _CPU if on_cpu else _GPU))


def _estimate(tile: Tile, splits: int, m: int, n: int, k: int, batch: int, k_inner: bool, speed: _Speed) -> float:
    """Seconds that a product takes, about."""
    slice_k = ceil_divide(k, splits * tile.k) * tile.k
    splits = max(1, ceil_divide(k, max(slice_k, 1)))
    count = batch * splits * ceil_divide(m, tile.m) * ceil_divide(n, tile.n)
    rate = tile.rate * 1e12 / speed.cores
    if _sticks_out(tile, m, n, k):
        rate *= tile.ragged
    if k_inner and k >= _LONG_ROW and tile.k < _CACHE_LINE:
        rate *= 0.6
    alone = 2 * tile.m * tile.n * (slice_k + tile.overhead) / rate
    # Cores with all their residents work at full rate; the last ones, i of r on a core, at the rate of sqrt(i / r).
    rounds, left = divmod(count, speed.cores * tile.resident)
    seconds = alone * (rounds * tile.resident + math.sqrt(ceil_divide(left, speed.cores) * tile.resident))
    if splits > 1:  # the partial sums are written and read, by one more dispatch
        seconds += speed.launch + 8 * splits * batch * m * n / speed.bandwidth
    return seconds


def _sticks_out(tile: Tile, m: int, n: int, k: int) -> bool:
    return any((m % tile.m, n % tile.n, k % tile.k))


def choose_variant(info: DeviceInfo, dtype: np.dtype, variant: str | None = None) -> str:
    """The family of kernels for operands of `dtype`; `variant` demands one.

    Raises FeatureError where the device lacks what `variant` needs, ValueError for an unknown one or one that does not
    take the dtype.
    """
    if variant is None:
        return next(name for name in VARIANTS if name == "plain" or (dtype == BF16 and not _lacking(info, name)))
    if variant not in VARIANTS:
        raise ValueError(f"matmul variant must be one of {', '.join(VARIANTS)}, found {variant!r}")
    if variant != "plain":
        if dtype != BF16:
            raise ValueError(f"matmul variant {variant!r} multiplies bfloat16, found {dtype.name}")
        lacking = _lacking(info, variant)
        if lacking:
            raise FeatureError(f"matmul variant {variant!r}: {info.name} lacks {lacking}")
    return variant


def _lacking(info: DeviceInfo, variant: str) -> str:
    """Names what `info` lacks for products of bf16 by cooperative matrices; empty where it lacks nothing."""
    records = [record for record in manifest().values() if record["entry"] == f"matmul_{variant}"]
    needed = {feature for record in records for feature in record["features"]}
    if variant == "coop2":
        needed |= {"cooperativeMatrixWorkgroupScope", "cooperativeMatrixFlexibleDimensions"}
    missing = needed - info.features.names
    if missing:
        return ", ".join(sorted(missing))
    types = ("bf16", "bf16", "f32", "f32")
    if variant == "coop1":
        if not has_lanes(info, _COOP1_LANES):
            return f"subgroups of {_COOP1_LANES}"
        rows = [row for row in info.features.cooperative_matrices if row.scope == "subgroup"]
        fits = any((row.m, row.n, row.k, row.a, row.b, row.c, row.result) == (16, 16, 16, *types) for row in rows)
        return "" if fits else "cooperative matrices of 16x16x16 bf16"
    rows = [row for row in info.features.cooperative_matrices2 if row.scope == "workgroup"]
    for tile in TILES["coop2"]:
        if not any(
            row.workgroup_invocations == tile.threads
            and (row.a, row.b, row.c, row.result) == types
            and tile.m % row.m == tile.n % row.n == tile.k % row.k == 0
            for row in rows
        ):
            return f"workgroup cooperative matrices of {tile.m}x{tile.n}x{tile.k} bf16"
    return ""


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
    beside: int = 1,
) -> Plan:
    """C = epilogue(op(A) op(B)), op being the transpose where asked; accumulated in f32.

    Args:
      a, b, c: f32 or bf16; a and b of one dtype; c f32, or of that dtype.
      batch: matrices; `batch_stride` says where each stands.
      scratch: index of the first operand that the plan may use for scratch: len(inputs) + len(outputs), and the
        scratch of the plans before it. The plan's own `scratch` lists what it needs from there.
      variant, tile, splits: demand a family of kernels, a tile of it, a number of slices of k.
      beside: products of this size that run side by side, this one among them.

    Raises:
      ValueError: shapes, dtypes or demands that do not fit; FeatureError: the device lacks `variant`.
    """
    m, n, k = _sizes(a, b, c, transpose_a, transpose_b)
    epilogue.check(batch)
    if 0 in (m, n, batch):
        return Plan(())
    chosen = _variant_for(info, (a, b, c), batch, variant)
    if tile is None:
        product = Product(chosen, _types(a, c), m, n, k, batch * beside, transpose_a, transpose_b)
        tile, found = choose(info, product)
        splits = found if splits is None else splits
    elif transpose_b and not tile.transposes_b:
        raise ValueError(f"matmul tile {tile.m}x{tile.n}x{tile.k} takes no transposed b")
    slice_k = max(1, ceil_divide(k, (splits or 1) * tile.k)) * tile.k  # whole tiles: only the last slice is ragged
    splits = max(1, ceil_divide(k, slice_k))

    size = _ProblemSize(m, n, k, batch, splits, slice_k)
    multiply = _Multiply(chosen, tile, size, a, b, transpose_a, transpose_b)
    # coop2 applies functions to an element at a time, each of which would read its row's target and normalizer.
    if splits > 1 or (chosen == "coop2" and epilogue.softmax_gradient):
        partial = replace(matrix(scratch, F32, m, n), batch_stride=ceil_divide(m * n, 4) * 4)
        nbytes = 4 * batch * splits * partial.batch_stride
        return Plan((multiply.dispatch(partial, NOTHING), _finish(size, partial, c, epilogue)), (nbytes,))
    if chosen == "coop2" and epilogue.rng is not None:
        # coop2 applies functions to an element at a time, and each would draw the bits of all eight of its block.
        first = multiply.dispatch(c, epilogue.before_dropout())
        return Plan((first, _finish(size, c, c, epilogue.from_dropout())))
    return Plan((multiply.dispatch(c, epilogue),))


def _sizes(a: Matrix, b: Matrix, c: Matrix, transpose_a: bool, transpose_b: bool) -> tuple[int, int, int]:
    """m, n and k of a product. Raises ValueError for matrices that make none."""
    m, k = (a.columns, a.rows) if transpose_a else (a.rows, a.columns)
    k_of_b, n = (b.columns, b.rows) if transpose_b else (b.rows, b.columns)
    if (m, n) != (c.rows, c.columns) or k != k_of_b:
        raise ValueError(f"no product of {m}x{k} and {k_of_b}x{n} is {c.rows}x{c.columns}")
    if a.dtype != b.dtype or a.dtype not in _SHORT or c.dtype not in (F32, a.dtype):
        raise ValueError(f"no product of {a.dtype.name} and {b.dtype.name} gives {c.dtype.name}")
    return m, n, k


def _variant_for(info: DeviceInfo, matrices: Sequence[Matrix], batch: int, variant: str | None) -> str:
    """The family of kernels that multiplies matrices; `variant` demands one. Raises as `choose_variant`."""
    chosen = choose_variant(info, matrices[0].dtype, variant)
    if chosen == "plain" or all(_starts_aligned(x, batch) for x in matrices):
        return chosen
    if variant is not None:
        raise ValueError(f"matmul variant {variant!r} takes matrices that start at multiples of {_ALIGNMENT} bytes")
    return "plain"


def tiles_for(info: DeviceInfo, product: Product) -> tuple[Tile, ...]:
    """The tiles that make a product on the device."""
    family, types = product.family, product.types
    tiles = CPU_TILES if info.kind == "cpu" and family == "plain" else TILES[family]
    tiles = (tile for tile in tiles if tile.transposes_b or not product.transpose_b)
    return tuple(tile for tile in tiles if _fits(info, *_kernel(family, types, tile), tile))


def plan_epilogue(a: Matrix, c: Matrix, epilogue: Epilogue) -> Plan:
    """C = epilogue(A), element by element, f32 or bf16 each but not bf16 to f32; A and C may be one operand.

    Columns that A lacks are taken for zeros.
    """
    epilogue.check(1)
    if 0 in (c.rows, c.columns):
        return Plan(())
    return Plan((_finish(_ProblemSize(c.rows, c.columns), a, c, epilogue),))


def plan_column_sums(a: Matrix, c: Matrix, *, scratch: int) -> Plan:
    """C (1 x n) = the sums of A's columns, added in f32; `scratch` as for `plan_gemm`."""
    if a.columns == 0:
        return Plan(())
    strips = max(1, ceil_divide(a.rows, _STRIP_ROWS))
    partial = matrix(scratch, F32, 1, a.columns)
    size = _ProblemSize(a.rows, a.columns, splits=strips, split_k=_STRIP_ROWS)
    groups = strips * ceil_divide(a.columns, _STRIP_COLUMNS)
    first = dispatch(
        "matmul_column_sums",
        _SHORT[a.dtype],
        groups,
        constants=_constants(size, a, a, partial, NOTHING, groups),
        spec={"ALIGNED_A": a.whole(4), "ALIGNED_C": partial.whole(4)},
        a=a.operand,
        c=partial.operand,
    )
    last = _finish(_ProblemSize(1, a.columns, splits=strips), partial, c, NOTHING)
    return Plan((first, last), (4 * strips * a.columns,))


class _ProblemSize(NamedTuple):
    """The sizes that open the push constants of every kernel here, under their names there."""

    m: int
    n: int
    k: int = 0
    batches: int = 1
    splits: int = 1
    split_k: int = 0


@dataclass(frozen=True)
class _Multiply:
    """A product that waits to be told where it goes."""

    variant: str
    tile: Tile
    size: _ProblemSize
    a: Matrix
    b: Matrix
    transpose_a: bool
    transpose_b: bool

    def dispatch(self, c: Matrix, epilogue: Epilogue) -> Dispatch:
        """C = the epilogue of the product, or of each of its partial sums."""
        tile, size, a, b = self.tile, self.size, self.a, self.b
        spec = {"TRANSPOSE_A": self.transpose_a} | ({"TRANSPOSE_B": self.transpose_b} if tile.transposes_b else {})
        buffers = {"a": a.operand, "b": b.operand, **_epilogue_buffers(epilogue), "c": c.operand}
        if self.variant == "coop2":
            edges = _sticks_out(tile, size.m, size.n, size.k)
            spec |= {"EDGES": edges, "ALIGNED_A": a.aligned(8), "ALIGNED_B": b.aligned(8)}
            spec |= _epilogue_spec(epilogue, c.aligned(8))
            del spec["DROPOUT"], spec["SOFTMAX_GRADIENT"], buffers["rng"]
        else:
            at_once = 8 if self.variant == "coop1" else 4  # elements of an operand
            if self.variant == "coop1" or not tile.lanes:  # matmul_lanes reads by element where it is not WHOLE
                spec |= {"ALIGNED_A": a.whole(at_once), "ALIGNED_B": b.whole(at_once)}
            whole_k = size.k > 0 and size.k % tile.k == 0  # of each slice, then
            spec["WHOLE"] = tile.unbounded and whole_k and a.aligned(at_once) and b.aligned(at_once)
            spec |= _epilogue_spec(epilogue, c.whole(at_once))
        groups = size.batches * size.splits * ceil_divide(size.m, tile.m) * ceil_divide(size.n, tile.n)
        constants = _constants(size, a, b, c, epilogue, groups)
        kernel, kind = _kernel(self.variant, _types(a, c), tile)
        lanes = tile.lanes or None
        return dispatch(kernel, kind, groups, constants=constants, spec=spec, subgroup_size=lanes, **buffers)


def _kernel(family: str, types: str, tile: Tile) -> tuple[str, str]:
    """The name of a kernel and of its variant."""
    plain = "matmul_lanes" if tile.lanes else "matmul"
    return plain if family == "plain" else f"matmul_{family}", f"{types}_{tile.m}x{tile.n}x{tile.k}"


def _fits(info: DeviceInfo, kernel: str, kind: str, tile: Tile) -> bool:
    """Whether the device has what a tile takes: threads, shared memory, and subgroups that suit it."""
    needs = manifest()[f"{kernel}.{kind}"]
    suits = not tile.lanes or (has_lanes(info, tile.lanes) and info.features.names >= set(needs["features"]))
    enough = tile.threads <= info.limits.workgroup_invocations and needs["shared_bytes"] <= info.limits.shared_memory
    return suits and enough


def _finish(size: _ProblemSize, a: Matrix, c: Matrix, epilogue: Epilogue) -> Dispatch:
    """C = epilogue(the sum of A over splits)."""
    groups = ceil_divide(size.batches * size.m * ceil_divide(size.n, 4), THREADS)
    spec = {"ALIGNED_A": a.whole(4), **_epilogue_spec(epilogue, c.whole(4))}
    constants = _constants(size._replace(k=a.columns), a, a, c, epilogue, groups)
    buffers = {"a": a.operand, **_epilogue_buffers(epilogue), "c": c.operand}
    return dispatch("matmul_finish", _types(a, c), groups, constants=constants, spec=spec, **buffers)


def _types(a: Matrix, c: Matrix) -> str:
    return _SHORT[a.dtype] if a.dtype == c.dtype else f"{_SHORT[a.dtype]}_{_SHORT[c.dtype]}"


def _epilogue_buffers(epilogue: Epilogue) -> dict[str, int | None]:
    buffers = {
        "bias": epilogue.bias,
        "residual": epilogue.residual if epilogue.gelu_slope_of is None else epilogue.gelu_slope_of,
        "rng": epilogue.rng,
        "pre_activation": epilogue.save_pre_activation,
    }
    if (loss := epilogue.softmax_gradient) is not None:  # takes the places of what it excludes
        buffers |= {"bias": loss.log_normalizers, "residual": loss.dlosses, "rng": loss.targets}
    return buffers


def _constants(
    size: _ProblemSize, a: Matrix, b: Matrix, c: Matrix, epilogue: Epilogue, workgroups: int
) -> dict[str, int | float]:
    """The push constants of every kernel here: Params of shaders/matmul/matmul_common.slang."""
    loss = epilogue.softmax_gradient
    return {
        **size._asdict(),
        "groups_x": min(workgroups, MAX_GROUPS),
        **{f"stride_{name}": x.stride for name, x in (("a", a), ("b", b), ("c", c))},
        **{f"offset_{name}": x.offset for name, x in (("a", a), ("b", b), ("c", c))},
        **{f"batch_{name}": x.batch_stride for name, x in (("a", a), ("b", b), ("c", c))},
        "stream": epilogue.site % SITES if loss is None else loss.first,
        "first": epilogue.site // SITES,
        "threshold": epilogue.threshold if loss is None else loss.columns,
        "scale": epilogue.scale if loss is None else 1.0,
    }


def _epilogue_spec(epilogue: Epilogue, aligned: bool) -> dict[str, int | bool]:
    return {
        "ALIGNED_C": aligned,
        "BIAS": epilogue.bias is not None,
        "SAVE_PRE_ACTIVATION": epilogue.save_pre_activation is not None,
        "GELU": epilogue.gelu,
        "GELU_SLOPE": epilogue.gelu_slope_of is not None,
        "DROPOUT": epilogue.rng is not None,
        "RESIDUAL": epilogue.residual is not None,
        "ACCUMULATE": epilogue.accumulate,
        "SOFTMAX_GRADIENT": epilogue.softmax_gradient is not None,
    }


def _starts_aligned(x: Matrix, batch: int) -> bool:
    starts = (x.offset, x.batch_stride) if batch > 1 else (x.offset,)
    return not any(start * x.dtype.itemsize % _ALIGNMENT for start in starts)
