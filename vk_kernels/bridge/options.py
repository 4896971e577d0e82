"""Options of `vk_kernels.jit`: those of `jax.jit` that mean something here, checked in one line each."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Options of jax.jit that are not taken, but for the value that asks for nothing: why not.
_NOT_TAKEN = {
    "in_shardings": (None, "a function runs on one Vulkan device, which device= names"),
    "out_shardings": (None, "results lie on the one Vulkan device that the function runs on"),
    "backend": (None, "device= names a Vulkan device"),
    "inline": (False, "under jax.jit a function stays a call of its own"),
    "abstracted_axes": (None, "a function is compiled for each shape"),
}


@dataclass(frozen=True)
class Options:
    """Options as they were given, numbers and names as tuples. None and () differ: see `match_static`."""

    static_argnums: tuple[int, ...] | None
    static_argnames: tuple[str, ...] | None
    donate_argnums: tuple[int, ...] | None
    donate_argnames: tuple[str, ...] | None
    keep_unused: bool
    device: int | str | None
    output_groups: tuple[tuple[int, ...], ...]


def check_options(
    *,
    static_argnums: Any,
    static_argnames: Any,
    donate_argnums: Any,
    donate_argnames: Any,
    keep_unused: Any,
    device: Any,
    compiler_options: Any,
    others: Mapping[str, Any],
) -> Options:
    """The options. Raises TypeError for one that `jit` does not take, or a value that means nothing."""
    for name, value in others.items():
        if name not in _NOT_TAKEN:
            raise TypeError(f"vk_kernels.jit() got an unexpected keyword argument {name!r}")
        nothing, reason = _NOT_TAKEN[name]
        if value is not nothing:
            raise TypeError(f"vk_kernels.jit does not take {name}={value!r}: {reason}")
    if not isinstance(keep_unused, bool):
        raise TypeError(f"keep_unused is True or False, not {keep_unused!r}")
    if not isinstance(device, str | None):
        device = _index(device, f"device is a Vulkan device's index, 'gpu', 'cpu' or part of its name, not {device!r}")
    return Options(
        static_argnums=_numbers("static_argnums", static_argnums),
        static_argnames=_names("static_argnames", static_argnames),
        donate_argnums=_numbers("donate_argnums", donate_argnums),
        donate_argnames=_names("donate_argnames", donate_argnames),
        keep_unused=keep_unused,
        device=device,
        output_groups=_output_groups(compiler_options),
    )


def _output_groups(given: Any) -> tuple[tuple[int, ...], ...]:
    """The groups of outputs that compiler options name; none: ()."""
    options = {} if given is None else given
    if not isinstance(options, Mapping):
        raise TypeError(f"compiler_options is a dict of options of this compiler, not {given!r}")
    for name in options:
        if name != "output_groups":
            raise TypeError(f"vk_kernels.jit does not take {name!r} in compiler_options: it has output_groups alone")
    message = "output_groups is a sequence of sequences of numbers of leaves of the result"
    found = options.get("output_groups", ())
    try:
        groups = tuple(tuple(operator.index(j) for j in group) for group in found)
    except TypeError:
        raise TypeError(f"{message}, not {found!r}") from None
    numbers = [j for group in groups for j in group]
    if any(j < 0 for j in numbers):
        raise TypeError(f"{message}, from 0, not {found!r}")
    return groups


def _index(x: Any, message: str) -> int:
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(message) from None


def _numbers(option: str, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    message = f"{option} is an argument's number, or several, not {given!r}"
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        return (_index(given, message),)
    return tuple(_index(x, message) for x in given)


def _names(option: str, given: Any) -> tuple[str, ...] | None:
    if given is None or isinstance(given, str):
        return None if given is None else (given,)
    names = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} is an argument's name, or several, not {given!r}")
    return names


def match_static(fn: Callable[..., Any], options: Options) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers and names of the static arguments. As for jax.jit, either is found by the other unless both are given."""
    numbers, names = options.static_argnums or (), options.static_argnames or ()
    if options.static_argnums is not None and options.static_argnames is not None:
        return numbers, names
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


def check_hashable(name: int | str, kind: type, x: Any) -> None:
    """Raises ValueError, in one line, for a static argument that is not hashable."""
    try:
        hash(x)
    except TypeError as error:
        what = f"number {name}" if isinstance(name, int) else repr(name)
        raise ValueError(f"static argument {what} must be hashable, found a {kind.__name__}: {error}") from None
