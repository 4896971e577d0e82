"""vk_kernels.jit: a whole JAX function as one recorded Vulkan submission.

    step = vk_kernels.jit(train_step, donate_argnums=0)
    state, metrics = step(state, batch)  # arrays of the result stay on the device

The first call with arguments of new shapes traces and compiles; every later one is a queue submit. Several steps go
into one submission as a scan over their batches, which is unrolled:

    steps = vk_kernels.jit(lambda state, batches: jax.lax.scan(train_step, state, batches), donate_argnums=0)
    state, metrics = steps(state, batches)  # each array of both with one more axis, first: the step
"""

import contextlib
import functools
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from operator import is_
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import source_info_util
from jax.tree_util import treedef_tuple

from vk_kernels.bridge.array_methods import to_jax
from vk_kernels.bridge.profile import Cost, Profile
from vk_kernels.bridge.stages import Lowered, check_arguments
from vk_kernels.bridge.static import check_hashable, matched
from vk_kernels.bridge.use import target_of, use
from vk_kernels.compiler.avals import is_array, on_device, on_host, to_device, to_host
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.pipeline import compile_graph, optimize
from vk_kernels.errors import UnsupportedError
from vk_kernels.jax_compat import debug_infs, debug_nans, disable_jit, trace_context
from vk_kernels.runtime.array import Array, ArrayType, array_type
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.executable import Executable
from vk_kernels.runtime.lifetime import DonationState, referenced_elsewhere
from vk_kernels.runtime.memory import Buffer
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.runtime.program import Program


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    device: int | str | None = None,
) -> Any:
    """`fn` as one submission to a Vulkan device; without `fn`, a decorator with these options.

    Its hot operations (`vk_kernels.ops`) run as their kernels; everything else as kernels generated for it.

    Args:
      fn: of pytrees of arrays to a pytree of arrays; pure.
      static_argnums, static_argnames: arguments that are constants, as for `jax.jit`.
      donate_argnums, donate_argnames: arguments whose memory the results may take; they must not be used again.
      device: as for `vk_kernels.use`.

    Returns:
      A `Jitted`, a function of the same arguments, which may be of `vk_kernels.Array`, numpy or JAX. Its results are
      `vk_kernels.Array`; PRNG keys and float0 are JAX's own. Called with tracers, inside jax.jit, jax.grad or jax.vmap,
      it is part of what is traced. Under jax.disable_jit it is `fn` itself.

    Raises, when called:
      UnsupportedError: what no kernel is there for, with the primitive, its shapes and the line.
      ValueError: a static argument that is not hashable; an array that is donated and passed a second time; what a hot
        operation refuses, with the line.
      RuntimeError: an array that was donated or deleted.
      FloatingPointError: under jax_debug_nans or jax_debug_infs, a result that has one.
      NoDeviceError: no loader, no driver, or no such device.
      FeatureError, BufferSizeError, OutOfMemoryError: what the device lacks, or has no room for.
    """
    options = {"static_argnums": static_argnums, "static_argnames": static_argnames, "device": device}
    options |= {"donate_argnums": donate_argnums, "donate_argnames": donate_argnames}
    return functools.partial(jit, **options) if fn is None else Jitted(fn, options)


def device_put(tree: Any, device: int | str | None = None) -> Any:
    """A pytree of host arrays as one of `vk_kernels.Array`; PRNG keys and float0 stay JAX's own.

    Raises NoDeviceError, BufferSizeError over a limit of the device, OutOfMemoryError where it has no room.
    """
    opened = open_device("" if device is None else str(device))

    def put(x: Any) -> Any:
        if isinstance(x, Array) or on_host(jax.typeof(x)):
            return x
        return Array(opened.upload(_host(x)), _type_of(x))

    return jax.tree.map(put, tree)


def device_get(tree: Any) -> Any:
    """A pytree with numpy arrays for `vk_kernels.Array`s."""
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, Array) else x, tree)


def _type_of(x: Any) -> ArrayType:
    """What JAX takes an argument for."""
    if isinstance(x, Array):
        return x.type
    if type(x) is np.ndarray and x.dtype.kind in "biuf":
        return array_type(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), False)
    return _array_type(jax.typeof(x))


def _array_type(aval: Any) -> ArrayType:
    """Raises UnsupportedError for what is no array: a ref, a token."""
    if not is_array(aval):
        line = source_info_util.summarize(source_info_util.current())
        raise UnsupportedError(
            f"a function on Vulkan takes and gives arrays, not {aval}: pass what it holds, at {line}"
        )
    return array_type(aval.shape, aval.dtype, aval.weak_type)


def _host(x: Any) -> np.ndarray:
    """An argument as the array that JAX takes it for."""
    return to_device(x, _type_of(x))


_TRACED = jax.core.Tracer, jax.ShapeDtypeStruct
_OWNED = Array, jax.Array  # what donation deletes


def _is_traced(x: Any) -> bool:
    """Whether an argument stands for an array."""
    kind = type(x)  # to ask for Tracer is slow
    return kind is not Array and kind is not np.ndarray and isinstance(x, _TRACED)


def _is_leaf_of(x: Any, kind: ArrayType) -> bool:
    """Whether an argument, of which it is not known that it is a leaf, is an array of a type."""
    if type(x) is np.ndarray and x.dtype == kind.dtype:
        return x.shape == kind.shape and not kind.weak_type
    is_leaf = type(x) is Array or jax.tree_util.all_leaves([x])
    return is_leaf and not _is_traced(x) and _type_of(x) == kind


class _CarriedOutputs:
    """Arrays that a call gave in the memory that it was donated."""

    def __init__(self, arrays: Iterable[Array], donation: DonationState):
        self._only_reference, self.donation = [tuple(arrays)], donation

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self._only_reference[0]

    @property
    def held(self) -> bool:
        """Whether anybody still has one of them."""
        return bool(referenced_elsewhere(self._only_reference) or referenced_elsewhere(self.arrays))

    def try_reuse(self) -> bool:
        """Takes donated arrays that nobody holds any more for new ones, where that can be: all of them."""
        possible = self.donation.all_alive and not self.held
        self.donation.donated = not possible
        return possible


class _Carry(NamedTuple):
    """Where a function (..., state, ...) -> (..., state, ...) takes and gives its state: a tuple of the arrays that
    results take the memory of, all of them, in order. That the last call's tuple comes back is seen at a glance.

    argument, result: their numbers. arguments, results: the structures of the others, as tuples.
    """

    argument: int
    result: int
    arguments: Any
    results: Any

    @classmethod
    def of(cls, in_tree: Any, out_tree: Any, aliases: dict[int, int]) -> "_Carry | None":
        (arguments, keywords), results = (tree.children() for tree in (in_tree, out_tree))
        arguments = arguments.children()
        if keywords.num_leaves or out_tree != treedef_tuple(results):
            return None
        for (i, argument), (j, result) in itertools.product(enumerate(arguments), enumerate(results)):
            count = argument.num_leaves
            first, first_out = (sum(tree.num_leaves for tree in before) for before in (arguments[:i], results[:j]))
            carried = {first_out + k: first + k for k in range(count)}
            if count and argument == result == jax.tree.structure((0,) * count) and aliases == carried:
                others = (treedef_tuple([*trees[:k], *trees[k + 1 :]]) for k, trees in ((i, arguments), (j, results)))
                return cls(i, j, *others)
        return None


class Compiled:
    """A function for arguments of given types: its graph and its program on a device.

    Called with such arguments, without static ones, it gives the results; it raises TypeError for any others.
    """

    def __init__(self, traced: Any, tree: Any, device: Device):
        """tree: the structure of (args, kwargs)."""
        self.device, self.in_tree = device, tree
        self.lock = threading.RLock()  # held by whoever runs it
        closed = traced.jaxpr
        self.graph: Graph = optimize(closed)
        self.in_types = list(map(_array_type, closed.in_avals))
        self._dtypes = [on_device(kind).dtype for kind in self.in_types]
        infos = zip(jax.tree.leaves(traced.args_info), self.in_types, strict=True)
        donated = [info.donated and not on_host(kind) for info, kind in infos]
        self.donated = [i for i, given in enumerate(donated) if given]
        self.out_tree = jax.tree.structure(traced.out_info)
        self.out_types = list(map(_array_type, closed.out_avals))
        self._to_host = [(j, aval) for j, aval in enumerate(closed.out_avals) if on_host(aval)]
        self.program: Program = compile_graph(self.graph, device, donated)
        made = [kind for j, kind in enumerate(self.out_types) if j not in self.program.aliases]
        self.executable = Executable(device, self.program, made)
        self._plan_results()

    def _plan_results(self) -> None:
        aliases = dict(sorted(self.program.aliases.items()))  # in the order of the outputs
        self._carried = list(aliases.values())  # inputs whose memory comes back as an output
        self._dropped = [i for i in self.donated if i not in aliases.values()]
        self._rest = [i for i in range(len(self.in_types)) if i not in aliases.values()]
        made = [j for j in range(len(self.out_types)) if j not in aliases]
        self._rest_types = [self.in_types[i] for i in self._rest]
        self._carried_types = [self.out_types[j] for j in aliases]
        places = {j: k for k, j in enumerate((*aliases, *made))}
        self._order = [places[j] for j in range(len(self.out_types))]
        self._loop = None if self._to_host else _Carry.of(self.in_tree, self.out_tree, aliases)
        # What the last call gave in donated memory, and the buffers; and what the one before it gave there.
        self._given, self._before, self._buffers = _CarriedOutputs((), DonationState(donated=True)), None, []

    def match_carry(self, arguments: tuple[tuple, dict[str, Any]]) -> Sequence[Any] | None:
        """The leaves beside the carried ones if this call is the next in a loop over a state: what the last call gave
        in donated memory comes back in the same places, and all else is of its types. Quicker than to look at all."""
        (args, kwargs), loop, given = arguments, self._loop, self._given
        if given.donation.donated or not given.donation.all_alive:
            return None
        if loop and not kwargs and len(args) > loop.argument and args[loop.argument] is given.arrays:
            rest = _leaves_of(loop.arguments, (*args[: loop.argument], *args[loop.argument + 1 :]))
        else:
            leaves = _leaves_of(self.in_tree, arguments)
            if leaves is None or not all(map(is_, map(leaves.__getitem__, self._carried), given.arrays)):
                return None
            rest = [leaves[i] for i in self._rest]
        return rest if rest is not None and all(map(_is_leaf_of, rest, self._rest_types)) else None

    def argument(self, i: int, x: Any) -> Buffer | np.ndarray:
        """What the executable takes for the i-th leaf of a call."""
        if type(x) is np.ndarray:
            return x.astype(self._dtypes[i], copy=False)
        if type(x) is not Array:
            return _host(x)
        buffer = x.buffer
        return buffer if buffer.device is self.device else x.numpy()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(map(_is_traced, leaves)):
            raise TypeError("compiled for arrays, called in what JAX traces: call the function of vk_kernels.jit there")
        check_arguments(self.in_tree, self.in_types, (args, kwargs), list(map(_type_of, leaves)))
        if self.device.closed:
            raise RuntimeError(f"compiled for {self.device.info.name}, which was closed since: lower it again")
        with self.lock, self.device.calls:
            return self.run(leaves)

    def run(self, leaves: Sequence[Any]) -> Any:
        """The results for the leaves of a call, which are of its types."""
        if not self._given.held:  # the state that it worked on is no more
            self.executable.release_donated()
            self._buffers = []
        carried = [self.argument(i, leaves[i]) for i in self._carried]
        buffers = [x if isinstance(x, Buffer) else self.device.upload(x) for x in carried]
        made = self._run([leaves[i] for i in self._rest], dict(zip(self._carried, buffers, strict=True)))
        self._buffers = buffers  # not before: what raises leaves a loop over another state as it was
        for i in self.donated:
            if isinstance(leaves[i], _OWNED):
                leaves[i].delete()
        self._before = None
        return self._results(made)

    def call_with_carry(self, rest: Sequence[Any]) -> Any:
        """Runs it on what `match_carry` gave of a call."""
        made = self._run(rest, {})
        self._given.donation.donated = True
        for i in self._dropped:
            x = rest[self._rest.index(i)]
            if isinstance(x, _OWNED):
                x.delete()
        before, self._before = self._before, self._given
        return self._results(made, before)

    def _run(self, rest: Sequence[Any], carried: dict[int, Buffer]) -> list[Array]:
        """What it makes beside the carried arrays."""
        return self.executable(carried | {i: self.argument(i, x) for i, x in zip(self._rest, rest, strict=True)})

    def _results(self, made: list[Array], before: _CarriedOutputs | None = None) -> Any:
        """What the function gives. before: objects to take for the carried arrays, if nobody holds them any more."""
        if before is not None and before.try_reuse():
            self._given = before
        else:
            donation = DonationState()
            self._given = _CarriedOutputs(map(Array, self._buffers, self._carried_types, repeat(donation)), donation)
        if self._loop:
            results = self._loop.results.unflatten(made)
            return (*results[: self._loop.result], self._given.arrays, *results[self._loop.result :])
        results = list(map([*self._given.arrays, *made].__getitem__, self._order))
        for j, aval in self._to_host:
            struct = on_device(aval)
            results[j] = to_host(results[j].buffer.read(struct.dtype, struct.shape), aval)
        return self.out_tree.unflatten(results)

    def as_text(self) -> str:
        """The program: every dispatch with what it reads and writes, and where a barrier is."""
        cost = self.cost()
        lines = [
            f"{cost.dispatches} dispatches, {cost.barriers} barriers, {cost.bytes:,} bytes moved, "
            f"arena of {cost.arena_bytes:,} bytes, constants of {cost.constant_bytes:,}"
        ]
        lines += [f"input[{i}]: {array}" for i, array in enumerate(self.program.inputs)]
        lines += [
            f"output[{j}]: {array}" + (f" in input[{aliases[j]}]" if j in aliases else "")
            for aliases in [self.program.aliases]
            for j, array in enumerate(self.program.outputs)
        ]
        for command, barrier in zip(self.program.commands, self.executable.barriers, strict=True):
            if barrier:
                lines.append("barrier")
            operands = ", ".join(f"{place} ({place.nbytes:,})" for place in command.operands)
            scope = f"  # {command.scope}" if command.scope else ""
            lines.append(f"dispatch {'x'.join(map(str, command.groups))} {command.label}: {operands}{scope}")
        return "\n".join(lines)

    def cost(self) -> Cost:
        commands = self.program.commands
        return Cost(
            flops=sum(command.flops for command in commands),
            bytes=sum(place.nbytes for command in commands for place in set(command.operands)),
            dispatches=len(commands),
            barriers=sum(self.executable.barriers),
            arena_bytes=self.program.arena_bytes,
            constant_bytes=sum(array.nbytes for array in self.program.constants),
        )

    def profile(self, leaves: Sequence[Any]) -> Profile:
        timings = self.executable.time(list(map(self.argument, range(len(leaves)), leaves)))
        timed = [command for command in self.program.commands if 0 not in command.groups]
        return Profile(
            tuple((label, command.scope, seconds) for command, (label, seconds) in zip(timed, timings, strict=True))
        )


class Jitted:
    """What `jit` gives. Compiled once for each set of shapes, dtypes and static arguments, on each device."""

    def __init__(self, fn: Any, options: dict[str, Any]):
        """options: as of `jit`."""
        functools.update_wrapper(self, fn)
        self._options, self._device = options, options["device"]
        numbers, names = options["static_argnums"], options["static_argnames"]
        both = numbers is not None and names is not None  # then each is what it says
        numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers or ())
        names = (names,) if isinstance(names, str) else tuple(names or ())
        self._static_numbers, self._static_names = (numbers, names) if both else matched(fn, numbers, names)
        donated = {name: options[name] for name in ("donate_argnums", "donate_argnames")}
        numbers, names = self._static_numbers, self._static_names
        self._jitted = jax.jit(fn, static_argnums=numbers, static_argnames=names, **donated)
        self._compiled: dict[Any, Compiled] = {}
        # Of the last call: structure, static arguments and JAX's configuration, types, what is compiled.
        self._last: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (debug_nans.value or debug_infs.value) and not disable_jit.value:
            return self._without_special_values(args, kwargs)
        dynamic, static = self._split(args, kwargs)
        with self._lock:
            last_tree, last_static, last_types, compiled = self._last
            if compiled is not None and compiled.device.closed:
                compiled = None
            if compiled is not None and static == last_static:
                rest = compiled.match_carry(dynamic)
                if rest is not None:
                    with compiled.device.calls:
                        return compiled.call_with_carry(rest)
        if disable_jit.value:
            with self._using():
                return self.__wrapped__(*args, **kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        if any(map(_is_traced, leaves)):
            return self._in_trace(args, kwargs)
        with self._lock:
            try:
                types = list(map(_type_of, leaves))
            except TypeError:
                self.trace(*args, **kwargs)  # JAX knows the argument's name
                raise
            last = last_tree, last_static, last_types
            if compiled is None or (tree, static, types) != last:  # quicker than to hash them
                compiled = self._find(tree, static, types, args, kwargs)
                if compiled is None:
                    return self._in_trace(args, kwargs)
                self._last = tree, static, types, compiled
            with compiled.device.calls:
                return compiled.run(leaves)

    def _in_trace(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call that is part of what JAX traces."""
        with self._using():
            return self._jitted(*args, **kwargs)

    def _without_special_values(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call under jax_debug_nans or jax_debug_infs. Where a result has one, the function runs a second time, one
        operation after another through JAX, which raises FloatingPointError at the one that made it."""
        if any(map(_is_traced, jax.tree.leaves((args, kwargs)))):
            return self._in_trace(args, kwargs)  # whoever traces looks
        nans, infs = debug_nans.value, debug_infs.value
        with jax.debug_nans(False), jax.debug_infs(False):
            kept = jax.tree.map(_kept, (args, kwargs))  # before the call: some may be donated
            results = self(*args, **kwargs)
            found = _special_value(results, nans, infs)
        if found:
            try:
                with self._using():
                    self.__wrapped__(*kept[0], **kept[1])
            except FloatingPointError as error:
                error.add_note(f"vk_kernels.jit: {found} of {self._name}, called again operation by operation")
                raise
            raise FloatingPointError(f"{found} of {self._name} on Vulkan, but not operation by operation through JAX")
        return results

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method, its first argument is the instance."""
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> Any:
        """Pickled by name where its module has it by that name (decorated), else as the function and the options."""
        found = sys.modules.get(getattr(self, "__module__", None))
        name = getattr(self, "__qualname__", "")
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (functools.partial(jit, **self._options), (self.__wrapped__,))

    def __copy__(self) -> "Jitted":
        """Itself, as of every function."""
        return self

    def __deepcopy__(self, memo: Any) -> "Jitted":
        return self

    def __repr__(self) -> str:
        return f"<vk_kernels.jit of {self._name}>"

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Traces as jax.jit does for such arguments, with the operations of `vk_kernels.ops` as they run here."""
        args, kwargs = jax.tree.map(_described, (args, kwargs))
        with self._using():
            return self._jitted.trace(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes and the dtypes of the results for such arguments."""
        return self.trace(*args, **kwargs).out_info

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """What a call with such arguments runs; arguments may be jax.ShapeDtypeStruct."""
        return Lowered(self._lowered(args, kwargs))

    def _lowered(self, args: tuple, kwargs: dict[str, Any]) -> Compiled:
        dynamic, static = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        with self._lock:
            compiled = self._find(tree, static, map(_type_of, leaves), args, kwargs)
        if compiled is None:
            raise ValueError(
                f"{self._name} reads values that are being traced around it: make them arguments to lower it"
            )
        return compiled

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """Of a call with such arguments."""
        return self.lower(*args, **kwargs).cost()

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Runs a call's dispatches one at a time and times them; the arguments stay, also donated ones."""
        compiled = self._lowered(args, kwargs)
        dynamic, _ = self._split(args, kwargs)
        return compiled.profile(jax.tree.leaves(dynamic))

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        with self._lock:
            self._last = None, None, None, None
            self._compiled.clear()
            self._jitted.clear_cache()

    @property
    def _name(self) -> str:
        return getattr(self, "__qualname__", type(self.__wrapped__).__name__)

    def _using(self) -> Any:
        return use("vulkan", device=self._device, variant=target_of("vulkan").variant)

    def _split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a call that are arrays, and what else it is compiled for."""
        static: tuple = ()
        if self._static_numbers or self._static_names:
            numbers = {n % len(args) for n in self._static_numbers if -len(args) <= n < len(args)}
            # JAX, too, tells 1, 1.0 and True apart.
            static = (
                *((n, type(args[n]), args[n]) for n in sorted(numbers)),
                *((name, type(kwargs[name]), kwargs[name]) for name in self._static_names if name in kwargs),
            )
            for name, kind, x in static:
                check_hashable(name, kind, x)
            args = tuple(x for n, x in enumerate(args) if n not in numbers)
            kwargs = {name: x for name, x in kwargs.items() if name not in self._static_names}
        return (args, kwargs), (static, trace_context())  # which has the target of `use`, too

    def _find(self, tree: Any, static: Any, types: Iterable[ArrayType], args: tuple, kwargs: dict) -> Compiled | None:
        key = tree, static, tuple(types)
        found = self._compiled.get(key)
        if found is None or found.device.closed:
            found = self._compile(tree, args, kwargs)
            if found is not None:
                self._compiled[key], found.lock = found, self._lock
        return found

    def _compile(self, tree: Any, args: tuple, kwargs: dict[str, Any]) -> Compiled | None:
        """None where the function closes over values that are being traced around it: they are no arguments."""
        with self._using(), _no_collection():
            traced = self.trace(*args, **kwargs)
            closed = traced.jaxpr
            if len(closed.in_avals) > len(jax.tree.leaves(traced.args_info)) or any(map(_is_traced, closed.consts)):
                return None
            return Compiled(traced, tree, open_device(target_of("vulkan").device))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Puts garbage collection off: one looks at all that JAX is made of, for a tenth of a second, and a trace with what
    is made of it sets off several, while nearly all that it makes is kept."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _special_value(tree: Any, nans: bool, infs: bool) -> str:
    """The first NaN or infinity in our arrays of a tree, in words; empty where there is none."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, Array) and jax.numpy.issubdtype(x.dtype, np.inexact):
            values = x.numpy()
            for name, wanted, has in (("nan", nans, np.isnan), ("inf", infs, np.isinf)):
                if wanted and has(values).any():
                    return f"{name} in result{jax.tree_util.keystr(path)}, {x.type},"
    return ""


def _leaves_of(tree: Any, x: Any) -> list[Any] | None:
    """What stands where a structure has its leaves, if `x` has that structure at least; quicker than to flatten it."""
    try:
        return tree.flatten_up_to(x)
    except ValueError:
        return None


def _kept(x: Any) -> Any:
    """An array that JAX can compute with when a call has taken the one that it was given; all else as it is."""
    if isinstance(x, Array):
        return to_jax(x)
    if _is_traced(x) or not isinstance(x, np.ndarray | jax.Array) or on_host(x):
        return x
    return jax.numpy.array(x)


def _described(x: Any) -> Any:
    """What JAX traces an array of ours as."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) if isinstance(x, Array) else x
