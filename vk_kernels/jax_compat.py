"""All that is taken of JAX beyond its public API, and all that differs between its versions: here and nowhere else.

Written for jax 0.10.2, 0.11 and 0.12. A version that has moved one of these names fails here, at import, by name.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jax._src.clusters import ClusterEnv
from jax._src.config import (
    debug_infs,
    debug_nans,
    disable_jit,
    trace_context,  # all of the configuration that changes what is traced
)
from jax._src.core import pytype_aval_mappings
from jax._src.dtypes import register_canonicalize_value_handler
from jax._src.literals import TypedNdArray  # a host array with an aval of one's own
from jax.extend.core import JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = [
    "TypedNdArray",
    "dce_jaxpr",
    "debug_infs",
    "debug_nans",
    "disable_jit",
    "in_other_primitives",
    "place_in_cluster",
    "register_array_type",
    "scan_operands",
    "trace_context",
]


def register_array_type(kind: type, aval: Callable[[Any], Any], on_host: Callable[[Any], Any]) -> None:
    """Has JAX take instances of `kind` wherever it takes an array: as `aval(x)`, by the copy `on_host(x)`.

    JAX has no public registry for types of arrays; these two are what its own types are entered in.
    """
    pytype_aval_mappings[kind] = aval
    register_canonicalize_value_handler(kind, on_host)


def in_other_primitives(equation: JaxprEqn) -> Callable[..., Any]:
    """The definition, as a function of the operands, of an operation that JAX or a user made as a `HiPrim`."""
    return partial(equation.primitive.to_lojax, **equation.params)


def scan_operands(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of a scan's operands that are constants, and that are carried; the rest are rows."""
    if "ft_in" in params:  # jax 0.11: trees of constants, what is carried, and rows
        consts, carried, _ = (len(list(part)) for part in params["ft_in"].unpack())
        return consts, carried
    return params["num_consts"], params["num_carry"]


def place_in_cluster() -> tuple[str, int, int] | None:
    """(HOST:PORT of process 0, number of processes, index of this one), as SLURM, Open MPI and others say by variables.

    `jax.distributed.initialize` reads them so; None: there are none.
    """
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, None)
    return None if None in (address, count, index) else (address, count, index)
