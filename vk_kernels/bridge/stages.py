"""A function on its way to the device, as in `jax.stages`: lowered, then compiled; its text, cost and profile.

lowered = vk_kernels.jit(fn).lower(x)  # x may be a jax.ShapeDtypeStruct
print(lowered.as_text(), lowered.cost())
y = lowered.compile()(x)
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vk_kernels.bridge.debug_nans import are_looked_for, find_special_value
from vk_kernels.bridge.donation import DonatingCaller, Signature
from vk_kernels.bridge.leaves import is_traced, type_of, type_of_aval
from vk_kernels.bridge.profile import Cost, Profile
from vk_kernels.compiler.avals import on_host
from vk_kernels.compiler.ir import Graph
from vk_kernels.compiler.pipeline import compile_graph, optimize
from vk_kernels.runtime.array import ArrayType
from vk_kernels.runtime.device import Device
from vk_kernels.runtime.executable import Executable
from vk_kernels.runtime.program import Program


class Compiled:
    """A function for arguments of given types: its graph and its program on a device.

    Called with such arguments, without static ones, it gives the results; it raises TypeError for any others, and
    FloatingPointError under jax_debug_nans or jax_debug_infs for a result that has one.
    """

    def __init__(
        self,
        traced: Any,
        tree: Any,
        device: Device,
        keep_unused: bool = False,
        output_groups: Sequence[Sequence[int]] = (),
    ):
        """traced: a `jax.stages.Traced`. tree: the structure of (args, kwargs). output_groups: see `jit`."""
        self.device, self.in_tree = device, tree
        self.lock = threading.RLock()  # held by whoever runs it
        self._name, self.args_info, self.out_info = traced.fun_name, traced.args_info, traced.out_info
        closed = traced.jaxpr
        self.graph: Graph = optimize(closed)
        self.in_types = list(map(type_of_aval, closed.in_avals))
        infos = zip(jax.tree.leaves(traced.args_info), self.in_types, strict=True)
        is_donated = [info.donated and not on_host(kind) for info, kind in infos]
        self.donated = [i for i, given in enumerate(is_donated) if given]
        self.out_tree = jax.tree.structure(traced.out_info)
        self.out_types = list(map(type_of_aval, closed.out_avals))
        if any(j >= len(self.out_types) for group in output_groups for j in group):
            raise ValueError(f"output_groups {output_groups}: the result has {len(self.out_types)} leaves")
        self.program: Program = compile_graph(self.graph, device, is_donated, output_groups)
        made = [kind for j, kind in enumerate(self.out_types) if j not in self.program.aliases]
        unused = frozenset() if keep_unused else self.program.unused_inputs()
        self.executable = Executable(device, self.program, made, unused)
        if output_groups:
            self.executable.cut_after(output_groups)
        signature = Signature(
            in_tree=tree,
            in_types=self.in_types,
            out_tree=self.out_tree,
            out_types=self.out_types,
            out_avals=closed.out_avals,
            donated=[i for i in self.donated if i not in unused],
            aliases=self.program.aliases,
            unused=unused,
        )
        self.caller = DonatingCaller(signature, self.executable, device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if any(map(is_traced, leaves)):
            raise TypeError("compiled for arrays, called in what JAX traces: call the function of vk_kernels.jit there")
        _check_arguments(self.in_tree, self.in_types, (args, kwargs), list(map(type_of, leaves)))
        if self.device.closed:
            raise RuntimeError(f"compiled for {self.device.info.name}, which was closed since: lower it again")
        with self.lock, self.device.program_lock:
            results = self.caller.call(leaves)
        found = find_special_value(results) if are_looked_for() else ""
        if found:
            raise FloatingPointError(
                f"{found} of {self._name}: call the function of vk_kernels.jit, which finds the operation that made it"
            )
        return results

    def as_text(self) -> str:
        """The program in words: each dispatch with the memory that it reads and writes, and each barrier."""
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
        """The cost of a call, as planned."""
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
        """Device time of each dispatch for the leaves of a call, which stay, also donated ones."""
        timings = self.executable.time({i: self.caller.argument(i, leaves[i]) for i in self.caller.used})
        timed = [command for command in self.program.commands if 0 not in command.groups]
        return Profile(
            tuple((label, command.scope, seconds) for command, (label, seconds) in zip(timed, timings, strict=True))
        )


class Lowered:
    """A function lowered for arguments of given types. It is not callable: `compile` returns the callable."""

    def __init__(self, compiled: Compiled):
        self._compiled = compiled

    def compile(self) -> Compiled:
        return self._compiled

    def as_text(self) -> str:
        """The program in words: each dispatch with the memory that it reads and writes, and each barrier."""
        return self._compiled.as_text()

    def cost(self) -> Cost:
        """The cost of a call, as planned."""
        return self._compiled.cost()

    @property
    def device(self) -> Device:
        return self._compiled.device

    @property
    def graph(self) -> Graph:
        return self._compiled.graph

    @property
    def program(self) -> Program:
        return self._compiled.program

    @property
    def donated(self) -> list[int]:
        """The numbers of the arguments' leaves that are donated."""
        return self._compiled.donated

    @property
    def args_info(self) -> Any:
        """The arguments' types and whether they are donated, as `jax.stages.ArgInfo`, without static arguments."""
        return self._compiled.args_info

    @property
    def out_info(self) -> Any:
        """The results' shapes and dtypes, as `out_info` of `jax.stages.Lowered`."""
        return self._compiled.out_info

    @property
    def in_tree(self) -> Any:
        """The structure of (args, kwargs), without static arguments."""
        return self._compiled.in_tree

    @property
    def out_tree(self) -> Any:
        return self._compiled.out_tree


class Traced:
    """A traced function, as `jax.stages.Traced`; `lower` lowers it for a Vulkan device."""

    def __init__(self, traced: Any, lower: Callable[[], Lowered]):
        """traced: a `jax.stages.Traced`, which would be lowered for XLA."""
        self._traced, self._lower = traced, lower

    @property
    def jaxpr(self) -> Any:
        return self._traced.jaxpr

    @property
    def fun_name(self) -> str:
        return self._traced.fun_name

    @property
    def args_info(self) -> Any:
        return self._traced.args_info

    @property
    def out_info(self) -> Any:
        return self._traced.out_info

    def lower(self) -> Lowered:
        return self._lower()


def _check_arguments(tree: Any, types: Sequence[ArrayType], given: Any, given_types: Sequence[ArrayType]) -> None:
    """Raises TypeError, in one line, for arguments of another structure or of other types than those compiled for.

    tree, given: of (args, kwargs), the structure and the arguments.
    """
    paths, found = jax.tree_util.tree_flatten_with_path(given)
    if found != tree:
        raise TypeError(
            f"compiled for arguments of the structure {tree}, called with {found}; static arguments are left out"
        )
    for (path, _), wanted, kind in zip(paths, types, given_types, strict=True):
        if (kind.shape, kind.dtype) != (wanted.shape, wanted.dtype):
            place, rest = path[:2], path[2:]
            keyword = getattr(place[1], "key", None)
            name = f"args[{place[1].idx}]" if keyword is None else str(keyword)
            raise TypeError(
                f"compiled with {name}{jax.tree_util.keystr(rest)} of {wanted}, called with {kind}: "
                "lower it for that, or call the function of vk_kernels.jit, which does"
            )
