"""Donation: results in the memory of arguments, and the fast path of a loop over a state.

A call's results in donated memory are a generation: they share a `DonationState`. A caller keeps the last two. The last
one comes back in the next call of a loop (`match_carry`), which then looks at nothing else, and whose results take the
Python objects of the one before (`try_reuse`).

| a generation is | donated | all_alive | a caller has | what becomes of it                                            |
| --------------- | ------- | --------- | ------------ | ------------------------------------------------------------- |
| current         | no      | yes       | all of it    | passed whole, in its places: donated, without a look at more  |
|                 |         |           |              | passed otherwise: arguments like any; the next call is `call` |
| abandoned       | no      | any       | nothing      | the next `call` drops recordings bound to its memory          |
| broken          | no      | no        | any          | an array was deleted: never matches; use of that one raises   |
| donated, free   | yes     | yes       | nothing      | its objects are the results of the next call: current again   |
| donated, held   | yes     | any       | any of it    | stays donated for ever: every use raises RuntimeError         |
| none            | yes     | yes       | -            | before the first call: matches nothing                        |
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.tree_util import treedef_tuple

from vk_kernels.bridge.leaves import delete, host_array, is_leaf_of, leaves_at
from vk_kernels.compiler.avals import on_device, on_host, to_host
from vk_kernels.runtime.array import Array, ArrayType
from vk_kernels.runtime.lifetime import DonationState, referenced_elsewhere
from vk_kernels.runtime.memory import Buffer


@dataclass(frozen=True)
class Signature:
    """Arguments and results of a compiled function.

    in_tree: the structure of (args, kwargs). donated: numbers of leaves. unused: numbers of leaves that no command
    reads. aliases: output -> the donated input in whose memory it is. out_avals: as callers have the results.
    """

    in_tree: Any
    in_types: Sequence[ArrayType]
    out_tree: Any
    out_types: Sequence[ArrayType]
    out_avals: Sequence[Any]
    donated: Sequence[int]
    aliases: Mapping[int, int]
    unused: frozenset[int] = frozenset()


class _Executes(Protocol):
    """The part of `Executable` that a caller needs."""

    def __call__(self, arguments: Mapping[int, Buffer | np.ndarray]) -> list[Array]: ...

    def release_donated(self) -> None: ...


class _CarriedOutputs:
    """A generation: the Python objects that one call returned in donated memory, and the state that they share."""

    def __init__(self, arrays: Iterable[Array], donation: DonationState):
        self._only_reference, self.donation = [tuple(arrays)], donation

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self._only_reference[0]

    @property
    def is_referenced(self) -> bool:
        """Whether a caller has the tuple or any of the arrays."""
        return bool(referenced_elsewhere(self._only_reference) or referenced_elsewhere(self.arrays))

    def try_reuse(self) -> bool:
        """Makes a donated generation current again if that is safe: nobody has any of its arrays, none was deleted."""
        is_safe = self.donation.all_alive and not self.is_referenced
        self.donation.donated = not is_safe
        return is_safe


class _Carry(NamedTuple):
    """The place of a state in (..., state, ...) -> (..., state, ...), where it is a tuple of all carried arrays.

    That the last call's tuple comes back is seen by its identity.

    argument, result: its numbers. arguments, results: the structures of the others, as tuples.
    """

    argument: int
    result: int
    arguments: Any
    results: Any

    @classmethod
    def find(cls, in_tree: Any, out_tree: Any, aliases: Mapping[int, int]) -> "_Carry | None":
        """The first such state of a function, None if it has none."""
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


class DonatingCaller:
    """Calls an executable with a function's arguments, and knows which results it gave in donated memory last.

    `call` takes any arguments. `match_carry` tells whether those of a call are the last results again;
    `call_with_carry` goes on from there. Not for two threads at once.
    """

    def __init__(self, signature: Signature, execute: _Executes, device: Any):
        self._signature, self._execute, self._device = signature, execute, device
        aliases = dict(sorted(signature.aliases.items()))  # in the order of the outputs
        self.used = [i for i in range(len(signature.in_types)) if i not in signature.unused]
        self._in_dtypes = [on_device(kind).dtype for kind in signature.in_types]
        self._carried = list(aliases.values())  # inputs whose memory comes back as an output
        self._carried_types = [signature.out_types[j] for j in aliases]
        self._rest = [i for i in range(len(signature.in_types)) if i not in aliases.values()]
        self._rest_types = [signature.in_types[i] for i in self._rest]
        self._rest_used = [i not in signature.unused for i in self._rest]
        self._rest_donated = [k for k, i in enumerate(self._rest) if i in signature.donated]
        made = [j for j in range(len(signature.out_types)) if j not in aliases]
        places = {j: k for k, j in enumerate((*aliases, *made))}
        self._in_order = _items_at([places[j] for j in range(len(signature.out_types))])
        self._carried_items, self._rest_items = _items_at(self._carried), _items_at(self._rest)
        self._host_results = [(j, aval) for j, aval in enumerate(signature.out_avals) if on_host(aval)]
        found = _Carry.find(signature.in_tree, signature.out_tree, aliases)
        self._carry = None if self._host_results else found
        self._last = _CarriedOutputs((), DonationState(donated=True))  # the last call's generation
        self._before: _CarriedOutputs | None = None  # that of the call before, if the last was `call_with_carry`
        self._buffers: list[Buffer] = []  # the memory of both

    def match_carry(self, arguments: tuple[tuple, dict[str, Any]]) -> Sequence[Any] | None:
        """The other leaves, if the donated arguments are exactly the last call's results, in the same places.

        None if they are not, or another leaf is of another type. Of a function that carries nothing, the types decide.
        """
        (args, kwargs), carry, last = arguments, self._carry, self._last
        if last.donation.donated or not last.donation.all_alive:
            return None
        if carry and not kwargs and len(args) > carry.argument and args[carry.argument] is last.arrays:
            rest = leaves_at(carry.arguments, (*args[: carry.argument], *args[carry.argument + 1 :]))
        else:
            leaves = leaves_at(self._signature.in_tree, arguments)
            if leaves is None or not all(map(is_, self._carried_items(leaves), last.arrays)):
                return None
            rest = self._rest_items(leaves)
        return rest if rest is not None and all(map(is_leaf_of, rest, self._rest_types)) else None

    def call_with_carry(self, rest: Sequence[Any]) -> Any:
        """The results of a call whose other leaves `match_carry` returned."""
        made = self._run(rest, {})
        self._last.donation.donated = True
        for k in self._rest_donated:
            delete(rest[k])
        before, self._before = self._before, self._last
        return self._results(made, before)

    def call(self, leaves: Sequence[Any]) -> Any:
        """The results for the leaves of a call, which are of the function's types."""
        if not self._last.is_referenced:  # the loop's state was abandoned
            self._execute.release_donated()
            self._buffers = []
        carried = [self.argument(i, leaves[i]) for i in self._carried]
        buffers = [self._device.upload(x) if isinstance(x, np.ndarray) else x for x in carried]
        made = self._run(self._rest_items(leaves), dict(zip(self._carried, buffers, strict=True)))
        self._buffers = buffers  # only now: what raises leaves a loop over another state as it was
        for i in self._signature.donated:
            delete(leaves[i])
        self._before = None
        return self._results(made)

    def argument(self, i: int, x: Any) -> Buffer | np.ndarray:
        """The i-th leaf of a call as the executable takes it."""
        if type(x) is np.ndarray:
            dtype = self._in_dtypes[i]
            return x if x.dtype == dtype else x.astype(dtype)
        if type(x) is not Array:
            return host_array(x)
        buffer = x.buffer
        return buffer if buffer.device is self._device else x.numpy()

    def _run(self, rest: Sequence[Any], carried: dict[int, Buffer]) -> list[Array]:
        """Executes; returns the results that are in memory of their own."""
        used: Iterable[tuple[int, Any]] = zip(self._rest, rest, strict=True)
        if self._signature.unused:
            used = compress(used, self._rest_used)
        return self._execute(carried | {i: self.argument(i, x) for i, x in used})

    def _results(self, made: list[Array], before: _CarriedOutputs | None = None) -> Any:
        """The function's results. before: a donated generation, whose objects are taken again if they may be."""
        if before is not None and before.try_reuse():
            self._last = before
        else:
            donation = DonationState()
            arrays = map(Array, self._buffers, self._carried_types, repeat(donation))
            self._last = _CarriedOutputs(arrays, donation)
        if self._carry:
            results = self._carry.results.unflatten(made)
            return (*results[: self._carry.result], self._last.arrays, *results[self._carry.result :])
        results = list(self._in_order([*self._last.arrays, *made]))
        for j, aval in self._host_results:
            struct = on_device(aval)
            results[j] = to_host(results[j].buffer.read(struct.dtype, struct.shape), aval)
        return self._signature.out_tree.unflatten(results)


def _items_at(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that returns the items at some places of a sequence; quicker than a loop over them."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda items: [items[i] for i in places]  # of one place, itemgetter would return the bare item
