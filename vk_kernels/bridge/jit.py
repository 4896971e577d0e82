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
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, overload

import jax

from vk_kernels.bridge.debug_nans import are_looked_for, call_and_look
from vk_kernels.bridge.leaves import described, host_array, is_traced, type_of
from vk_kernels.bridge.options import Options, check_hashable, check_options, match_static
from vk_kernels.bridge.profile import Cost, Profile
from vk_kernels.bridge.stages import Compiled, Lowered, Traced
from vk_kernels.bridge.use import target_of, use
from vk_kernels.compiler.avals import on_host
from vk_kernels.jax_compat import disable_jit, trace_context
from vk_kernels.runtime.array import Array, ArrayType
from vk_kernels.runtime.open_devices import open_device

_NOT_GIVEN: Any = object()


@overload
def jit(fn: Callable[..., Any], /, **options: Any) -> "Jitted": ...


@overload
def jit(**options: Any) -> Callable[[Callable[..., Any]], "Jitted"]: ...


def jit(
    fn: Callable[..., Any] = _NOT_GIVEN,
    /,
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    keep_unused: bool = False,
    device: int | str | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Any:
    """`fn` as one submission to a Vulkan device; without `fn`, a decorator with these options.

    Operations of `vk_kernels.ops` run as their own kernels, everything else as kernels generated for it.

    Args:
      fn: a pure function of pytrees of arrays to a pytree of arrays.
      static_argnums, static_argnames: arguments that are constants, as for `jax.jit`.
      donate_argnums, donate_argnames: arguments whose memory the results may take; they must not be used again.
      keep_unused: whether arguments that the function does not read go to the device all the same, and are gone where
        they are donated.
      device: as for `vk_kernels.use`.
      compiler_options: a dict of this compiler's options. output_groups: sequences of numbers of leaves of the result;
        each group is done with a submission of its own, as soon as it can be. None: the fewest submissions.
      others: the other options of `jax.jit`, in_shardings and the like; any but their default is a TypeError.

    Returns:
      A `Jitted`, a function of the same arguments, which may be of `vk_kernels.Array`, numpy or JAX. Its results are
      `vk_kernels.Array`; PRNG keys and float0 are JAX's own. Called with tracers, inside jax.jit, jax.grad or jax.vmap,
      it is part of what is traced. Under jax.disable_jit it is `fn` itself.

    Raises TypeError or ValueError for options that are not taken, or that do not fit `fn`. When called:
      UnsupportedError: what no kernel is there for, with the primitive, its shapes and the line.
      ValueError: a static argument that is not hashable; an array that is donated and passed a second time; arguments
        that an operation refuses, with the line.
      RuntimeError: an array that was donated or deleted.
      FloatingPointError: under jax_debug_nans or jax_debug_infs, a result that has one.
      NoDeviceError: no loader, no driver, or no such device.
      FeatureError, BufferSizeError, OutOfMemoryError: what the device lacks, or has no room for.
    """
    options = check_options(
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
        donate_argnames=donate_argnames,
        keep_unused=keep_unused,
        device=device,
        compiler_options=compiler_options,
        others=others,
    )
    return functools.partial(Jitted, options=options) if fn is _NOT_GIVEN else Jitted(fn, options)


def device_put(tree: Any, device: int | str | None = None) -> Any:
    """A pytree of host arrays as one of `vk_kernels.Array`; PRNG keys and float0 stay JAX's own.

    Raises NoDeviceError, BufferSizeError over a limit of the device, OutOfMemoryError where it has no room.
    """
    opened = open_device("" if device is None else str(device))

    def put(x: Any) -> Any:
        if isinstance(x, Array) or on_host(jax.typeof(x)):
            return x
        return Array(opened.upload(host_array(x)), type_of(x))

    return jax.tree.map(put, tree)


def device_get(tree: Any) -> Any:
    """A pytree with numpy arrays for `vk_kernels.Array`s."""
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, Array) else x, tree)


class Jitted:
    """A jitted function, compiled once for each set of shapes, dtypes and static arguments, on each device."""

    __wrapped__: Callable[..., Any]

    def __init__(self, fn: Callable[..., Any], options: Options):
        functools.update_wrapper(self, fn)  # first: it may bring attributes like those below, of a jitted function
        self._options = options
        self._static_numbers, self._static_names = match_static(fn, options)
        self._jitted: Any = jax.jit(  # which checks the rest of the options
            fn,
            static_argnums=self._static_numbers,
            static_argnames=self._static_names,
            donate_argnums=options.donate_argnums,
            donate_argnames=options.donate_argnames,
            keep_unused=options.keep_unused,
        )
        self._compiled: dict[Any, Compiled] = {}
        self._last: tuple[Any, Compiled | None] = ((None, None, None), None)  # the last call's key, see `_key`
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if are_looked_for() and not disable_jit.value:
            return self._without_special_values(args, kwargs)
        dynamic, static = self._split(args, kwargs)
        with self._lock:
            last_key, compiled = self._last
            if compiled is not None and compiled.device.closed:
                compiled = None
            if compiled is not None and static == last_key[1]:
                rest = compiled.caller.match_carry(dynamic)
                if rest is not None:
                    with compiled.device.program_lock:
                        return compiled.caller.call_with_carry(rest)
        if disable_jit.value:
            return self._by_operation(*args, **kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        if any(map(is_traced, leaves)):
            return self._in_trace(args, kwargs)
        with self._lock:
            key = tree, static, self._types(leaves, args, kwargs)
            if compiled is None or key != last_key:  # quicker than to hash it
                compiled = self._find(key, lambda: self._trace(args, kwargs))
                if compiled is None:
                    return self._in_trace(args, kwargs)
                self._last = key, compiled
            with compiled.device.program_lock:
                return compiled.caller.call(leaves)

    def _in_trace(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call inside of a function that JAX traces."""
        with self._using():
            return self._jitted(*args, **kwargs)

    def _without_special_values(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call under jax_debug_nans or jax_debug_infs."""
        if any(map(is_traced, jax.tree.leaves((args, kwargs)))):
            return self._in_trace(args, kwargs)  # whoever traces looks
        return call_and_look(self, self._by_operation, args, kwargs, self._name)

    def _by_operation(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the function as it is, one operation after another through JAX."""
        with self._using():
            return self.__wrapped__(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Binds it to an instance, which is then the first argument."""
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> Any:
        """Pickled by name where its module has it by that name (decorated), else as the function and the options."""
        found = sys.modules.get(getattr(self, "__module__", ""))
        name = getattr(self, "__qualname__", "")
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (Jitted, (self.__wrapped__, self._options))

    def __copy__(self) -> "Jitted":
        """Itself, as of every function."""
        return self

    def __deepcopy__(self, memo: Any) -> "Jitted":
        return self

    def __repr__(self) -> str:
        return f"<vk_kernels.jit of {self._name}>"

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """The traced function, with the operations of `vk_kernels.ops` as they run here; lowered, it is as by `lower`.

        Arguments may be jax.ShapeDtypeStruct here, in `eval_shape`, `lower` and `cost`.
        """
        key, _ = self._key(args, kwargs)
        traced, device = self._trace(args, kwargs)
        return Traced(traced, lambda: Lowered(self._lower(key, lambda: (traced, device))))

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes and the dtypes of the results for such arguments."""
        return self.trace(*args, **kwargs).out_info

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The program that a call with such arguments runs."""
        key, _ = self._key(args, kwargs)
        return Lowered(self._lower(key, lambda: self._trace(args, kwargs)))

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """The cost of a call with such arguments."""
        return self.lower(*args, **kwargs).cost()

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Runs a call's dispatches one at a time and times them; the arguments stay, also donated ones."""
        key, leaves = self._key(args, kwargs)
        return self._lower(key, lambda: self._trace(args, kwargs)).profile(leaves)

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        with self._lock:
            self._last = (None, None, None), None
            self._compiled.clear()
            self._jitted.clear_cache()

    @property
    def _name(self) -> str:
        return getattr(self, "__qualname__", type(self.__wrapped__).__name__)

    def _using(self) -> Any:
        return use("vulkan", device=self._options.device, variant=target_of("vulkan").variant)

    def _static_positions(self, count: int) -> set[int]:
        """The numbers of the static ones among `count` arguments by position."""
        return {n % count for n in self._static_numbers if -count <= n < count}

    def _split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The dynamic arguments of a call; and the static ones, with JAX's configuration and the target of `use`."""
        static: tuple = ()
        if self._static_numbers or self._static_names:
            numbers = self._static_positions(len(args))
            # JAX, too, tells 1, 1.0 and True apart.
            static = (
                *((n, type(args[n]), args[n]) for n in sorted(numbers)),
                *((name, type(kwargs[name]), kwargs[name]) for name in self._static_names if name in kwargs),
            )
            for name, kind, x in static:
                check_hashable(name, kind, x)
            args = tuple(x for n, x in enumerate(args) if n not in numbers)
            kwargs = {name: x for name, x in kwargs.items() if name not in self._static_names}
        return (args, kwargs), (static, trace_context())  # the target of `use` is in it

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        """(structure, static arguments with JAX's configuration, types), the key of what is compiled; the leaves."""
        dynamic, static = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        return (tree, static, self._types(leaves, args, kwargs)), leaves

    def _types(self, leaves: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> tuple[ArrayType, ...]:
        """The types of a call's leaves. Raises TypeError, naming the argument, for one that is no array."""
        try:
            return tuple(map(type_of, leaves))
        except TypeError:
            self._trace(args, kwargs)  # JAX knows the argument's name
            raise

    def _trace(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str]:
        """JAX's trace for such arguments, and the device that it is for, as for `open_device`."""
        numbers = self._static_positions(len(args))  # static arguments go in as they are
        args = tuple(x if n in numbers else jax.tree.map(described, x) for n, x in enumerate(args))
        kwargs = {k: x if k in self._static_names else jax.tree.map(described, x) for k, x in kwargs.items()}
        with self._using():
            return self._jitted.trace(*args, **kwargs), target_of("vulkan").device

    def _lower(self, key: Any, trace: Callable[[], tuple[Any, str]]) -> Compiled:
        """Raises ValueError where the function reads tracers: there is nothing to lower it with."""
        with self._lock:
            compiled = self._find(key, trace)
        if compiled is None:
            raise ValueError(
                f"{self._name} reads values that are being traced around it: make them arguments to lower it"
            )
        return compiled

    def _find(self, key: Any, trace: Callable[[], tuple[Any, str]]) -> Compiled | None:
        """The compiled function; None where it closes over values that are being traced around it, no arguments."""
        found = self._compiled.get(key)
        if found is not None and not found.device.closed:
            return found
        with self._using(), _no_collection():
            traced, device = trace()
            closed = traced.jaxpr
            if len(closed.in_avals) > len(jax.tree.leaves(traced.args_info)) or any(map(is_traced, closed.consts)):
                return None
            found = Compiled(
                traced, key[0], open_device(device), self._options.keep_unused, self._options.output_groups
            )
        self._compiled[key], found.lock = found, self._lock
        return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Puts garbage collection off: a trace sets off several, a tenth of a second each, and finds nearly nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
