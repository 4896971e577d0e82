"""The plan of a product of few rows with a transposed matrix, which reads each weight once. Knows no JAX."""

from typing import TYPE_CHECKING, NamedTuple

from vk_kernels.ops.planning import ceil_divide, dispatch, dtype_suffix, has_teams
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan
from vk_kernels.runtime.kernel import manifest

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

MOST_ROWS = 32
# Rows and columns of a team's tile: variants of the kernel. CPUs have few registers, and compilers slow to unroll.
_TILES = ((1, 1), (2, 2), (4, 4), (8, 4), (16, 4))
_CPU_TILES = _TILES[:3]
_THREADS = 64  # of a workgroup
_LANES = 8, 16, 32  # of a team
_BYTES = 16  # that a lane reads at once
_NORM_STEPS = 4  # how often it does so, of a row that it also normalises
_MANY_COLUMNS = 16384  # from which on four columns a team fill any device


class FewRows(NamedTuple):
    """A product y = x w^T and the operands of its epilogue, by number; see `gemm.Epilogue`."""

    x: int
    w: int
    y: int
    bias: int | None
    residual: int | None
    pre_activation: int | None
    gelu: bool


def plan_few_rows(info: "DeviceInfo", x: ArraySpec, w: ArraySpec, product: FewRows) -> Plan | None:
    """The plan for x (m, k) and w (n, k) of one dtype; None where m is more than MOST_ROWS, or no kernel takes it."""
    (m, k), (n, _) = x.shape, w.shape
    if m > MOST_ROWS or 0 in (m, n, k):
        return None
    tiles = _CPU_TILES if info.kind == "cpu" else _TILES
    rows, columns = next((tile for tile in tiles if tile[0] >= m), tiles[-1])
    kind = f"{dtype_suffix(x)}_{rows}x{columns}"
    if not has_teams(info, _LANES[0], manifest()[f"matmul_few.{kind}"]):
        return None
    team = _team(info)
    groups = ceil_divide(m, rows) * ceil_divide(n, _THREADS // team * columns)
    spec = {
        "TEAM": team,
        "ALIGNED": k * x.dtype.itemsize % _BYTES == 0,
        "BIAS": product.bias is not None,
        "SAVE_PRE_ACTIVATION": product.pre_activation is not None,
        "GELU": product.gelu,
        "RESIDUAL": product.residual is not None,
    }
    run = dispatch(
        "matmul_few",
        kind,
        groups,
        constants={"m": m, "n": n, "k": k, "epsilon": 0.0},
        spec=spec,
        a=product.x,
        b=product.w,
        bias=product.bias,
        residual=product.residual,
        c=product.y,
        pre_activation=product.pre_activation,
    )
    return Plan((run,))


def plan_norm_and_row(
    info: "DeviceInfo",
    x: ArraySpec,
    w: ArraySpec,
    buffers: dict[str, int | None],
    gelu: bool,
    epsilon: float,
) -> Plan | None:
    """The plan of a layer norm and the product that reads it, for one row; None where no kernel takes it.

    buffers: those of `norm_matmul_few`, by name.
    """
    n, k = w.shape
    columns = 4 if n >= _MANY_COLUMNS else 2
    kind = f"{dtype_suffix(x)}_{columns}"
    team = _team(info)
    if x.size != k or n == 0 or not has_teams(info, _LANES[0], manifest()[f"norm_matmul_few.{kind}"]):
        return None
    if k * x.dtype.itemsize > team * _BYTES * _NORM_STEPS:
        return None
    spec = {
        "TEAM": team,
        "ALIGNED": k * x.dtype.itemsize % _BYTES == 0,
        "BIAS": buffers["bias"] is not None,
        "GELU": gelu,
        "BRANCH": buffers["branch"] is not None,
    }
    groups = ceil_divide(n, _THREADS // team * columns)
    constants = {"m": 1, "n": n, "k": k, "epsilon": epsilon}
    unused = {"residual": None, "pre_activation": None}
    run = dispatch("norm_matmul_few", kind, groups, constants=constants, spec=spec, **buffers, **unused)
    return Plan((run,))


def _team(info: "DeviceInfo") -> int:
    """Lanes of a team, no more than a subgroup has."""
    return max((lanes for lanes in _LANES if lanes <= info.limits.subgroup_size_range[0]), default=_LANES[0])
