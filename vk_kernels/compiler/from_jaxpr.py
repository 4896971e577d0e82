"""From a traced JAX function to a graph: every call inlined, loops of known length unrolled.

Both branches of a cond are computed and one is selected: they are pure. A recomputation (`jax.checkpoint`) is kept
apart from what it recomputes by an optimization_barrier.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core import Literal as JaxLiteral

from vk_kernels.compiler import parameters
from vk_kernels.compiler.avals import check_dtype, is_array, is_key, on_device, to_device
from vk_kernels.compiler.codegen import primitives
from vk_kernels.compiler.decompositions import DECOMPOSITIONS
from vk_kernels.compiler.ir import Function, Graph, Literal, Node, Operand, Value
from vk_kernels.compiler.op_call import CallSite, describe_call, encode_call
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.compiler.refusals import advice
from vk_kernels.errors import UnsupportedError
from vk_kernels.jax_compat import dce_jaxpr, scan_operands

UNROLLED = 50_000  # nodes that all loops of a function together may unroll into

_JAX = str(Path(jax.__file__).parent)

# Inlined. Which parameter holds the body depends on the primitive, and of some on JAX's version.
_CALLS = frozenset(
    (
        *("jit", "pjit", "remat2", "checkpoint", "composite", "call", "closed_call", "eval_jaxpr"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "linear_call"),
    )
)
_BODIES = ("jaxpr", "call_jaxpr", "call", "callee")
_REMATERIALIZED = ("remat2", "checkpoint")
_IDENTITIES = frozenset(
    (
        *("copy", "copy_p", "device_put", "name", "stop_gradient", "sharding_constraint", "pvary", "pcast"),
        *("mesh_cast", "reshard", "layout_constraint", "random_wrap", "random_unwrap", "random_clone"),
    )
)


class Origin(NamedTuple):
    """An operation's origin: the stack of names around it, and the user's line."""

    scope: str = ""
    source: str = ""
    pinned: bool = False  # whether all that is called here is of this line

    @property
    def line(self) -> str:
        """The end of a message about it."""
        return f" at {self.source}" if self.source else ""

    def inner(self, equation: JaxprEqn) -> "Origin":
        """The origin of an equation of what was called here. Functions of JAX itself have no line of their own."""
        own = str(equation.source_info.name_stack)
        scope = f"{self.scope}/{own}" if self.scope and own else self.scope or own
        source = "" if self.pinned else source_info_util.summarize(equation.source_info)
        return self._replace(scope=scope, source=source or self.source)


def make_graph(closed: ClosedJaxpr) -> Graph:
    """The graph of a traced function; its inputs and outputs in order.

    Raises UnsupportedError for what no kernel is there for.
    """
    info = closed.jaxpr.debug_info
    name, _, line = info.func_src_info.rpartition(" at ")
    if name and not line.startswith(_JAX):
        at = Origin(source=f"{line} ({name})")
    else:  # a function of JAX itself: the line that calls it
        at = Origin(source=source_info_util.summarize(source_info_util.current()))
    inputs = tuple(
        _described(lambda aval=aval: _new_value(aval), f"argument {argument}, {aval}", at)
        for argument, aval in zip(_names(info.arg_names, closed.in_avals), closed.in_avals, strict=True)
    )
    if closed.effects:
        _refuse_effects(closed.jaxpr, at)
    inliner = _Inliner()
    outputs = inliner.inline(closed, inputs, at)
    for result, aval in zip(_names(info.result_paths, closed.out_avals), closed.out_avals, strict=True):
        _described(lambda aval=aval: _new_value(aval), f"{result}, {aval}", at)
    return Graph(inputs, inliner.constants, inliner.nodes, tuple(outputs))


def _names(found: Sequence[str] | None, avals: Sequence[Any]) -> Sequence[str]:
    """JAX's names of the arguments or the results of a function; their numbers where it has none."""
    return found if found is not None and len(found) == len(avals) else [f"number {i}" for i in range(len(avals))]


def _described(make: Callable[[], Any], what: str, at: Origin) -> Any:
    """Makes something; a ValueError of it then says of what it is, and the line."""
    try:
        return make()
    except ValueError as error:
        raise UnsupportedError(f"{error}: {what}{at.line}") from None


def _refuse_effects(jaxpr: Jaxpr, at: Origin) -> None:
    """Raises UnsupportedError that names the first operation which does more than to compute."""
    for equation in jaxpr.eqns:
        if not equation.effects:
            continue
        inner = at.inner(equation)
        for called in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if getattr(called, "effects", None):
                _refuse_effects(getattr(called, "jaxpr", called), inner)
        raise UnsupportedError(f"{advice(equation)}: {_where(equation, inner)}")


def trace(fn: Callable[..., Any], inputs: Sequence[Operand]) -> ClosedJaxpr:
    """The trace of a function of arrays of the inputs' shapes."""
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    return jax.make_jaxpr(lambda *xs: jax.tree.leaves(fn(*xs)))(*structs)


def inline(traced: ClosedJaxpr, inputs: Sequence[Operand], at: Node) -> tuple[list[Node], list[Operand]]:
    """The nodes of a traced function, and its results, for these inputs; they are where `at` is in the program."""
    inliner = _Inliner()
    results = inliner.inline(traced, list(inputs), Origin(at.scope, at.source, pinned=True))
    if inliner.constants:
        raise ValueError(f"constants of what is computed again for {at.op} must be scalars")
    return inliner.nodes, results


def _new_value(aval: Any) -> Value:
    if not is_array(aval):
        raise ValueError(f"a function on Vulkan takes and gives arrays, not {type(aval).__name__}")
    aval = on_device(aval)
    check_dtype(aval.dtype)
    return Value(tuple(aval.shape), np.dtype(aval.dtype))


class _Inliner:
    """Collects the nodes of a jaxpr and of all that it calls."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[Value, np.ndarray] = {}
        self._known: dict[int, tuple[Any, Operand]] = {}  # constants by id, kept alive with their operand
        self._unrolled = 0

    def inline(self, closed: ClosedJaxpr | Jaxpr, inputs: Sequence[Operand], at: Origin) -> list[Operand]:
        """The results of a jaxpr for these inputs."""
        jaxpr, consts = (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, ())
        env: dict[Any, Operand] = {
            var: _described(lambda found=found: self.constant(found), f"a constant, {var.aval}", at)
            for var, found in zip(jaxpr.constvars, consts, strict=True)
        }
        env |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> Operand:
            return Literal(to_device(atom.val, atom.aval)) if isinstance(atom, JaxLiteral) else env[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars], at)
            env |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def constant(self, found: Any) -> Operand:
        if id(found) not in self._known:
            aval = jax.typeof(found)
            _new_value(aval)  # refuses what is no array
            array = to_device(found, aval)
            operand = Literal(array) if array.ndim == 0 else Value(array.shape, array.dtype)
            if isinstance(operand, Value):
                self.constants[operand] = array
            self._known[id(found)] = found, operand
        return self._known[id(found)][1]

    def _equation(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        name = equation.primitive.name
        at = at.inner(equation)
        try:
            if kernel_op(name):
                return self._kernel_op(equation, inputs, at)
            if not _is_handled(name):
                raise ValueError(advice(equation) or f"no kernel is generated for the primitive {name}")
            params = parameters.read(equation)
            if name in _CALLS:
                if name in _REMATERIALIZED and params["prevent_cse"] and params["differentiated"]:
                    inputs = self._barrier(inputs, at)
                return self.inline(next(params[body] for body in _BODIES if body in params), inputs, at)
            if name in _IDENTITIES:
                return inputs
            if name in _STRUCTURES:
                return _STRUCTURES[name](self, equation, inputs, at)
            if name in DECOMPOSITIONS and (decomposition := DECOMPOSITIONS[name](equation)):
                return self.expand(decomposition, inputs, at)
            if refused := advice(equation):
                raise ValueError(refused)
            if any(is_key(x.aval) for x in (*equation.invars, *equation.outvars)):
                return self.expand(_on_words(equation), inputs, at)
            return self._node(equation, params, inputs, at)
        except UnsupportedError:
            raise
        except ValueError as error:
            raise UnsupportedError(f"{error}: {_where(equation, at)}") from None

    def _kernel_op(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        name, params = equation.primitive.name, dict(equation.params)
        outputs = tuple(_new_value(x.aval) for x in equation.outvars)
        site = params.pop("target") or CallSite()
        call = encode_call(name, params, site).encode()
        self.nodes.append(Node(name, tuple(inputs), outputs, params, at.source, at.scope, call))
        return list(outputs)

    def _node(self, equation: JaxprEqn, params: dict[str, Any], inputs: list[Operand], at: Origin) -> list[Operand]:
        outputs = tuple(_new_value(x.aval) for x in equation.outvars)
        if "update_jaxpr" in params:
            params = self._with_update(equation, params, at)
        for x in inputs:
            check_dtype(x.dtype)
        node = Node(equation.primitive.name, tuple(inputs), outputs, params, at.source, at.scope)
        primitives.check(node)
        self.nodes.append(node)
        return list(outputs)

    def _with_update(self, equation: JaxprEqn, params: dict[str, Any], at: Origin) -> dict[str, Any]:
        """The parameters of a scatter, with its function of an element and an update where its name does not say it."""
        params = dict(params)
        jaxpr, consts = params.pop("update_jaxpr"), params.pop("update_consts")
        if jaxpr is None or _is_named_update(equation.primitive.name, jaxpr):
            return params
        element = equation.invars[0].aval
        inner = _Inliner()
        inputs = (_new_value(element.update(shape=())), _new_value(element.update(shape=())))
        outputs = inner.inline(ClosedJaxpr(jaxpr, consts), inputs, at)
        graph = simplify(Graph(inputs, inner.constants, inner.nodes, tuple(outputs)))
        if graph.constants or not all(primitives.is_elementwise(node) for node in graph.nodes):
            raise ValueError("a scatter by a function that is not one of two numbers alone has no kernel")
        return params | {"update": Function(graph)}

    def expand(self, fn: Callable[..., Any], inputs: list[Operand], at: Origin) -> list[Operand]:
        """Traces a function of arrays of the inputs' shapes, and inlines it."""
        return self.inline(trace(fn, inputs), inputs, at._replace(pinned=True))

    def _barrier(self, inputs: Sequence[Operand], at: Origin) -> list[Operand]:
        values = [x for x in inputs if isinstance(x, Value)]
        outputs = {x: Value(x.shape, x.dtype) for x in values}
        gives = tuple(outputs.values())
        self.nodes.append(Node("optimization_barrier", tuple(outputs), gives, {}, at.source, at.scope))
        return [outputs[x] if isinstance(x, Value) else x for x in inputs]

    def add(self, op: str, inputs: Sequence[Operand], shape: Sequence[int], at: Origin, /, **params: Any) -> Value:
        """A node with one output, of the first input's dtype unless that is a condition."""
        output = Value(tuple(shape), inputs[-1].dtype)
        self.nodes.append(Node(op, tuple(inputs), (output,), params, at.source, at.scope))
        return output

    # Control flow.

    def cond(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        which, *operands = inputs
        branches = equation.params["branches"]
        if isinstance(which, Literal):
            return self.inline(branches[min(max(int(which.value), 0), len(branches) - 1)], operands, at)
        results = [self.inline(branch, operands, at) for branch in branches]
        if len(branches) == 2:  # select_n takes two cases by a bool only where it is one; an int32 is clamped here
            zero = Literal(np.zeros((), which.dtype))
            taken = Value(which.shape, np.dtype(bool))
            self.nodes.append(Node("gt", (which, zero), (taken,), {}, at.source, at.scope))
            which = taken
        return [
            cases[0]
            if all(case is cases[0] for case in cases)
            else self.add("select_n", (which, *cases), cases[0].shape, at)
            for cases in zip(*results, strict=True)
        ]

    def scan(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        params = equation.params
        body, length = params["jaxpr"], params["length"]
        consts, carried = scan_operands(params)
        fixed, carry, xs = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
        rows: list[list[Operand]] = [[] for _ in body.out_avals[carried:]]
        for i in reversed(range(length)) if params["reverse"] else range(length):
            results = self._turn(equation, body, [*fixed, *carry, *(self._row(x, i, at) for x in xs)], at)
            carry = results[:carried]
            for row, result in zip(rows, results[carried:], strict=True):
                row.append(result)
        stacked = []
        for row, out in zip(rows, equation.outvars[carried:], strict=True):
            whole = _new_value(out.aval)
            if length == 0:
                stacked.append(self._filled(whole, at))
                continue
            ordered = row[::-1] if params["reverse"] else row
            parts = [self._with_axis(x, at) for x in ordered]
            stacked.append(self.add("concatenate", parts, whole.shape, at, dimension=0))
        return [*carry, *stacked]

    def _row(self, x: Operand, i: int, at: Origin) -> Value:
        row = self.add(
            "slice",
            (x,),
            (1, *x.shape[1:]),
            at,
            start_indices=(i,) + (0,) * (len(x.shape) - 1),
            limit_indices=(i + 1, *x.shape[1:]),
            strides=None,
        )
        return self.add("reshape", (row,), x.shape[1:], at, new_sizes=x.shape[1:], dimensions=None)

    def _with_axis(self, x: Operand, at: Origin) -> Value:
        shape = (1, *x.shape)
        if isinstance(x, Literal):
            return self._broadcast(x, shape, at)
        return self.add("reshape", (x,), shape, at, new_sizes=shape, dimensions=None)

    def _broadcast(self, x: Literal, shape: tuple[int, ...], at: Origin) -> Value:
        return self.add("broadcast_in_dim", (x,), shape, at, shape=shape, broadcast_dimensions=())

    def _filled(self, like: Value, at: Origin) -> Value:
        return self._broadcast(Literal(np.zeros((), like.dtype)), like.shape, at)

    def while_loop(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        """Unrolled, where what it counts by is known now."""
        params = equation.params
        fixed, body = params["cond_nconsts"] + params["body_nconsts"], params["body_jaxpr"]
        of_body, carry = inputs[params["cond_nconsts"] : fixed], inputs[fixed:]
        counter = _Counter(equation)
        if not all(isinstance(inputs[i], Literal) for i in counter.needs):
            raise UnsupportedError(
                f"a loop whose length is known only on the device: {_where(equation, at)}; "
                "use jax.lax.scan, or jax.lax.fori_loop with Python numbers as bounds"
            )
        known = {i: inputs[i].value for i in counter.needs}
        while counter.goes_on(known):
            carry = self._turn(equation, body, [*of_body, *carry], at)
            known = counter.next(known)
            for i in counter.carried:
                carry[i - fixed] = Literal(known[i])
        return carry

    def _turn(self, equation: JaxprEqn, body: ClosedJaxpr, inputs: list[Operand], at: Origin) -> list[Operand]:
        """The results of one turn of a loop, which counts towards what may be unrolled."""
        before = len(self.nodes)
        results = self.inline(body, inputs, at)
        self._unrolled += len(self.nodes) - before + 1
        if self._unrolled > UNROLLED:
            raise UnsupportedError(
                f"loops of over {UNROLLED:,} operations in all, unrolled: {_where(equation, at)}; shorten this one"
            )
        return results

    def optimization_barrier(self, equation: JaxprEqn, inputs: list[Operand], at: Origin) -> list[Operand]:
        return self._barrier(inputs, at)


_STRUCTURES = {
    "cond": _Inliner.cond,
    "scan": _Inliner.scan,
    "while": _Inliner.while_loop,
    "optimization_barrier": _Inliner.optimization_barrier,
}


_COMPARISONS = {"eq": jnp.all, "ne": jnp.any}


def _is_handled(name: str) -> bool:
    named = name in primitives.SUPPORTED or name in DECOMPOSITIONS
    return named or name in _CALLS or name in _IDENTITIES or name in _STRUCTURES


def _is_named_update(name: str, jaxpr: Jaxpr) -> bool:
    """Whether a scatter's function of (element, update) is the one that it is named after."""
    combined = name.replace("_", "-").removeprefix("scatter").removeprefix("-")
    if not combined:
        return jaxpr.outvars[0] is jaxpr.invars[1]
    found = [(equation.primitive.name, equation.invars, equation.outvars) for equation in jaxpr.eqns]
    return found == [(combined, jaxpr.invars, jaxpr.outvars)]


class _Counter:
    """The part of a while loop that decides how often it turns, cut out of it.

    needs: the operands of the loop that it is made of. carried: those of them that every turn changes.
    """

    def __init__(self, equation: JaxprEqn):
        params = equation.params
        before, consts = params["cond_nconsts"], params["body_nconsts"]
        fixed, cond, body = before + consts, params["cond_jaxpr"], params["body_jaxpr"]
        test, used = dce_jaxpr(cond.jaxpr, [True])
        numbers = [*range(before), *range(fixed, len(equation.invars))]
        self._test_needs = {i for i, is_used in zip(numbers, used, strict=True) if is_used}
        self.needs = set(self._test_needs)
        numbers = range(before, len(equation.invars))
        while True:
            self.carried = sorted(i for i in self.needs if i >= fixed)
            step, used = dce_jaxpr(body.jaxpr, [fixed + i in self.needs for i in range(len(body.out_avals))])
            self._step_needs = [i for i, is_used in zip(numbers, used, strict=True) if is_used]
            if self.needs.issuperset(self._step_needs):
                break
            self.needs.update(self._step_needs)
        self._test = jaxpr_as_fun(ClosedJaxpr(test, cond.consts))
        self._step = jaxpr_as_fun(ClosedJaxpr(step, body.consts))

    def goes_on(self, known: dict[int, np.ndarray]) -> bool:
        with jax.ensure_compile_time_eval():
            return bool(self._test(*(known[i] for i in sorted(self._test_needs)))[0])

    def next(self, known: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        with jax.ensure_compile_time_eval():
            found = self._step(*(known[i] for i in self._step_needs))
        return known | {i: np.asarray(x) for i, x in zip(self.carried, found, strict=True)}


def _where(equation: JaxprEqn, at: Origin) -> str:
    call = describe_call(equation.primitive.name, [x.aval for x in equation.invars])
    gives = "" if equation.invars else " -> " + ", ".join(str(x.aval) for x in equation.outvars)
    return f"{call}{gives}{at.line}"


def _on_words(equation: JaxprEqn) -> Callable[..., Any]:
    """Applies an operation that moves PRNG keys to each of their words; keys are equal where all words are."""
    primitive, params = equation.primitive, equation.params
    key = next(x.aval for x in (*equation.invars, *equation.outvars) if is_key(x.aval))
    words = len(on_device(key).shape) - len(key.shape)  # axes of the words of one key
    if primitive.name in _COMPARISONS:
        joined, shape = _COMPARISONS[primitive.name], (*equation.outvars[0].aval.shape, *on_device(key).shape[-words:])
        compare = functools.partial(primitive.bind, **params)
        return lambda *xs: joined(compare(*(jnp.broadcast_to(x, shape) for x in xs)), axis=tuple(range(-words, 0)))
    if primitive.name.startswith("random_") or not all(is_key(x.aval) for x in equation.outvars):
        raise ValueError(f"no kernel is generated for PRNG keys in the primitive {primitive.name}")
    axes = tuple(-1 if is_key(x.aval) else None for x in equation.invars)
    moved = functools.partial(primitive.bind, **params)
    for _ in range(words):
        moved = jax.vmap(moved, in_axes=axes, out_axes=-1)
    return moved
