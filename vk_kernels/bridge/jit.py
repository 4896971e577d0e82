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
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

import jax

from vk_kernels.bridge.leaves import described, host_array, is_traced, type_of
from vk_kernels.bridge.profile import Cost, Profile
from vk_kernels.bridge.special_values import are_looked_for, call_and_look
from vk_kernels.bridge.stages import Compiled, Lowered
from vk_kernels.bridge.static import check_hashable, matched
from vk_kernels.bridge.use import target_of, use
from vk_kernels.compiler.avals import on_host
from vk_kernels.jax_compat import disable_jit, trace_context
from vk_kernels.runtime.array import Array, ArrayType
from vk_kernels.runtime.open_devices import open_device


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
        return Array(opened.upload(host_array(x)), type_of(x))

    return jax.tree.map(put, tree)


def device_get(tree: Any) -> Any:
    """A pytree with numpy arrays for `vk_kernels.Array`s."""
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, Array) else x, tree)


class Jitted:
    """What `jit` gives. Compiled once for each set of shapes, dtypes and static arguments, on each device."""

    __wrapped__: Callable[..., Any]

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
        self._jitted: Any = jax.jit(fn, static_argnums=numbers, static_argnames=names, **donated)
        self._compiled: dict[Any, Compiled] = {}
        # Of the last call: structure, static arguments and JAX's configuration, types, what is compiled.
        self._last: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (are_looked_for()) and not disable_jit.value:
            return self._without_special_values(args, kwargs)
        dynamic, static = self._split(args, kwargs)
        with self._lock:
            last_tree, last_static, last_types, compiled = self._last
            if compiled is not None and compiled.device.closed:
                compiled = None
            if compiled is not None and static == last_static:
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
            try:
                types = list(map(type_of, leaves))
            except TypeError:
                self.trace(*args, **kwargs)  # JAX knows the argument's name
                raise
            last = last_tree, last_static, last_types
            if compiled is None or (tree, static, types) != last:  # quicker than to hash them
                compiled = self._find(tree, static, types, args, kwargs)
                if compiled is None:
                    return self._in_trace(args, kwargs)
                self._last = tree, static, types, compiled
            with compiled.device.program_lock:
                return compiled.caller.call(leaves)

    def _in_trace(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call that is part of what JAX traces."""
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
        """As a method, its first argument is the instance."""
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> Any:
        """Pickled by name where its module has it by that name (decorated), else as the function and the options."""
        found = sys.modules.get(getattr(self, "__module__", ""))
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
        args, kwargs = jax.tree.map(described, (args, kwargs))
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
            compiled = self._find(tree, static, map(type_of, leaves), args, kwargs)
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
            if len(closed.in_avals) > len(jax.tree.leaves(traced.args_info)) or any(map(is_traced, closed.consts)):
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
