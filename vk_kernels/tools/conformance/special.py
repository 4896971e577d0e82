"""Runs the items of `special_values` through `vk_kernels.jit` and through XLA, and says how they differ."""

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np

import vk_kernels
from vk_kernels.tools.conformance.compare import QUICK_TO_COMPILE, described
from vk_kernels.tools.conformance.exceptions import ALLOWED, Difference
from vk_kernels.tools.conformance.registry import DTYPES
from vk_kernels.tools.conformance.special_values import ELEMENTWISE, SUBJECTS, Item, has_subnormal_literal, items

PROGRAM = 64  # items in one, of short code
_LONG = ("pow", "rem", "atan2", "lgamma", "digamma", "sin", "cos", "tan", "erf_inv", "asin", "acos", "gradient")


def names() -> list[str]:
    """The names that can be asked for: elementwise primitives, and the other subjects."""
    return [*dict.fromkeys(name.split()[0] for name in ELEMENTWISE), *SUBJECTS]


@dataclass
class Tally:
    """Counts for one primitive: items, differences by the name of what allows them, and what is wrong."""

    items: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@functools.cache
def programs(wanted: tuple[str, ...], dtypes: tuple[np.dtype, ...] = DTYPES) -> tuple[list[Item], ...]:
    """Items that are run together."""
    found = []
    chosen = [name for name in (*ELEMENTWISE, *SUBJECTS) if name.split()[0] in wanted]
    for dtype in dtypes:
        size, together = PROGRAM, [item for name in chosen for item in items(name, dtype)]
        # By themselves, as XLA takes a subnormal constant for a 0 of the same program.
        for item in sorted(together, key=has_subnormal_literal):
            if size >= PROGRAM or has_subnormal_literal(item) != has_subnormal_literal(found[-1][0]):
                found.append([])
                size = 0
            size += 4 if item.primitive in _LONG else 1
            found[-1].append(item)
    return tuple(found)


def run(
    wanted: tuple[str, ...], dtypes: tuple[np.dtype, ...] = DTYPES, device: str | None = None, workers: int = 1
) -> dict[str, Tally]:
    """The tallies of `wanted` names, by primitive. device: as for `vk_kernels.use`. workers: processes."""
    numbers = range(len(programs(wanted, dtypes)))
    check = functools.partial(_check_numbered, wanted, dtypes, device)
    if workers == 1:
        return _together(map(check, numbers))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return _together(pool.map(check, numbers))


def _check_numbered(wanted: tuple[str, ...], dtypes: tuple[np.dtype, ...], device: str | None, number: int) -> Any:
    return check(programs(wanted, dtypes)[number], device)


def _together(given: Iterable[dict[str, Tally]]) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for found in given:
        for name, tally in found.items():
            whole = tallies.setdefault(name, Tally())
            whole.items += tally.items
            whole.allowed += tally.allowed
            whole.wrong += tally.wrong
    return tallies


def report(wanted: tuple[str, ...], device: str | None = None) -> int:
    """Runs what is wanted and prints a table, and a line for each mismatch; gives 1 where there is one."""
    tallies = run(wanted, DTYPES, device, os.cpu_count() or 1)
    print(f"{'':<28} cases  wrong  allowed")
    for name, tally in sorted(tallies.items()):
        shown = "; ".join(f"{count} {row}" for row, count in tally.allowed.items())
        print(f"{name:<28} {tally.items:5}  {len(tally.wrong):5}  {shown}")
    for name, tally in sorted(tallies.items()):
        for message in tally.wrong:
            print(f"{name}: {message}")
    wrong = sum(len(tally.wrong) for tally in tallies.values())
    print(f"{sum(tally.items for tally in tallies.values()):,} cases, {wrong:,} mismatches")
    return 1 if wrong else 0


def check(some: Sequence[Item], device: str | None) -> dict[str, Tally]:
    """The tallies of items that are run as one program."""
    arrays = {id(x): x for item in some for x in item.args}
    places = {key: i for i, key in enumerate(arrays)}

    def program(*xs: Any) -> list[list[Any]]:
        return [jax.tree.leaves(item.fn(*(xs[places[id(x)]] for x in item.args))) for item in some]

    given = tuple(arrays.values())
    found = vk_kernels.jit(program, device=device)(*given)
    expected = jax.jit(program).lower(*given).compile(QUICK_TO_COMPILE)(*given)
    tallies: dict[str, Tally] = {}
    for item, ours, theirs in zip(some, found, expected, strict=True):
        tally = tallies.setdefault(item.primitive, Tally())
        tally.items += 1
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            if described(x) != described(y):
                tally.wrong.append(f"{item.dtype} {item.label}: it is {described(x)}, and XLA's is {described(y)}")
            else:
                _compare(tally, item, i, np.asarray(x), np.asarray(y))
    return tallies


def _compare(tally: Tally, item: Item, output: int, x: np.ndarray, y: np.ndarray) -> None:
    difference = Difference(item, output, x, y)
    left = difference.elements
    for row in ALLOWED:
        if not left.any():
            return
        if row.primitives and item.primitive not in row.primitives:
            continue
        allowed = left & row.holds(difference)
        if allowed.any():
            tally.allowed[row.name] += 1
        left = left & ~allowed
    if left.any():
        tally.wrong.append(difference.shown(left))
