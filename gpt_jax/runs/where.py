"""Conditions on runs, as `validation_loss < 4 and status == 'completed'`: parsed and computed here, never executed.

Names are the fields of a summary and, as `config.model.num_layers`, settings of the config. There are comparisons,
`in`, `and`, `or`, `not`, brackets, numbers, texts, True, False and None. A comparison with what a run does not have is
false, but for `==` and `!=`.
"""

import ast
import dataclasses
import difflib
import operator
import warnings
from collections.abc import Callable
from typing import Any

from gpt_jax.config import FIELDS
from gpt_jax.errors import UserError
from gpt_jax.runs.summary import Summary

LONGEST = 1000  # characters
NAMES = tuple(field.name for field in dataclasses.fields(Summary) if field.name != "config")
_CONFIG = "config."
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}

Condition = Callable[[Summary], Any]


def parse_condition(text: str) -> Condition:
    """The condition that a text says; a run for which it cannot be computed, as a text below a number, fails it.

    Raises:
      UserError: it is no condition, or has an unknown name.
    """
    if len(text) > LONGEST:
        raise UserError(f"--where is {len(text)} characters long, and {LONGEST} are read: use several")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about Python
            tree = ast.parse(text.strip(), mode="eval")
        return _condition(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise UserError(f"--where={text!a}: {error}") from None
        hint = "; two are equal by ==" if "=" in text and "==" not in text else ""
        raise UserError(f"--where={text!a} is no condition, as validation_loss < 4 is one{hint}") from None


def value_of(summary: Summary, name: str) -> Any:
    """A field of a run, or a setting of its config; None if it has none. `name` is one that `check_name` took."""
    if not name.startswith(_CONFIG):
        return getattr(summary, name)
    value: Any = summary.config
    for part in name.removeprefix(_CONFIG).split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_name(name: str) -> None:
    """Raises UserError for what is neither a field of a run nor a setting of a config, with the nearest one."""
    if name in NAMES or (name.startswith(_CONFIG) and name.removeprefix(_CONFIG) in FIELDS):
        return
    known = [*NAMES, *(f"{_CONFIG}{setting}" for setting in FIELDS)]
    near = difflib.get_close_matches(name, known, n=1) or [
        other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    there = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)} and config.NAME"
    raise UserError(f"a run has no {name[:80]!a}: {there}")


def _condition(node: ast.expr) -> Condition:
    if isinstance(node, ast.BoolOp):
        parts = [_condition(part) for part in node.values]
        every = all if isinstance(node.op, ast.And) else any
        return lambda summary: every(part(summary) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        part = _condition(node.operand)
        return lambda summary: not part(summary)
    if isinstance(node, ast.Compare):
        values = [_value(part) for part in (node.left, *node.comparators)]
        steps = [(_comparison(op), values[i], values[i + 1]) for i, op in enumerate(node.ops)]
        return lambda summary: all(compare(one(summary), other(summary)) for compare, one, other in steps)
    return _value(node)


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    found = _COMPARISONS.get(type(op))
    if found is None:
        raise UserError("is and is not compare nothing here: write == or !=")
    either_way = isinstance(op, ast.Eq | ast.NotEq)

    def compare(one: Any, other: Any) -> bool:
        if not either_way and (one is None or other is None):
            return False
        try:
            return found(one, other)
        except TypeError:  # a text and a number
            return False

    return compare


def _value(node: ast.expr) -> Callable[[Summary], Any]:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        constant = node.value
        return lambda _: constant
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float):
            return lambda _: -number
    if isinstance(node, ast.Tuple | ast.List):
        parts = [_value(part) for part in node.elts]
        return lambda summary: [part(summary) for part in parts]
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        check_name(name)
        return lambda summary: value_of(summary, name)
    raise UserError(f"{ast.unparse(node)[:80]!a} is neither a name, a number nor a text")
