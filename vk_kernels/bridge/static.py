"""Static arguments of a jitted function: constants that it is compiled for."""

import inspect
from typing import Any


def check_hashable(name: int | str, kind: type, x: Any) -> None:
    """Raises ValueError, in one line, for a static argument that is not hashable."""
    try:
        hash(x)
    except TypeError as error:
        what = f"number {name}" if isinstance(name, int) else repr(name)
        raise ValueError(f"static argument {what} must be hashable, found a {kind.__name__}: {error}") from None


def matched(fn: Any, numbers: tuple[int, ...], names: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Static arguments both by position and by name, as jax.jit finds the one by the other."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return numbers, names
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = len(positional)
    if not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        numbers = tuple(n + count if -count <= n < 0 else n for n in numbers)  # jax.jit refuses what is out of bounds
    either = {p.name: n for n, p in enumerate(positional) if p.kind == p.POSITIONAL_OR_KEYWORD}
    found = [name for name, n in either.items() if n in numbers]
    places = [either[name] for name in names if name in either]
    return tuple(dict.fromkeys((*numbers, *places))), tuple(dict.fromkeys((*names, *found)))
