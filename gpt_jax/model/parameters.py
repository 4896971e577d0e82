"""Trees of parameters by name: what two of them have in common, and one that takes what it can of another."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.leaf_names import named_leaves


@dataclass(frozen=True)
class MergeReport:
    """The outcome of `merge_parameters`, by path."""

    taken: tuple[str, ...]  # from the checkpoint
    dropped: Mapping[str, str]  # in the checkpoint only: dtype and shape
    mismatched: Mapping[str, tuple[str, str]]  # kept fresh: dtype and shape in checkpoint and model
    new: Mapping[str, str]  # in the model only, kept fresh: dtype and shape

    def __str__(self) -> str:
        lines = [
            f"parameters: {len(self.taken)} taken, {len(self.dropped)} dropped, "
            f"{len(self.mismatched)} mismatched and kept fresh, {len(self.new)} new"
        ]
        groups = {
            "dropped": [f"{name}: {spec}" for name, spec in self.dropped.items()],
            "mismatched": [
                f"{name}: {saved} in the checkpoint, {wanted} in the model"
                for name, (saved, wanted) in self.mismatched.items()
            ],
            "new": [f"{name}: {spec}" for name, spec in self.new.items()],
        }
        for group, rows in groups.items():
            lines += [f"  {group} {row}" for row in rows[:10]]
            if len(rows) > 10:
                lines.append(f"  {group} {len(rows) - 10} more")
        return "\n".join(lines)


def check_parameters(parameters: Any, wanted: Any, where: str) -> None:
    """Raises UserError, naming the first difference, for parameters of other names or shapes than `wanted` has."""
    found = {name: leaf.shape for name, leaf in named_leaves(parameters).items()}
    expected = {name: leaf.shape for name, leaf in named_leaves(wanted).items()}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{where}: the parameter {name} has the shape {found.get(name, '(it is absent)')}, and the config says "
                f"{expected.get(name, 'that there is none')}: put back the config of the run"
            )


def check_finite(parameters: Any, where: str) -> None:
    """Raises UserError, naming the first, for a parameter with NaN or an infinity in it: it would answer nonsense."""
    for name, leaf in named_leaves(parameters).items():
        if count := int((~jnp.isfinite(leaf)).sum()):
            raise UserError(
                f"{where}: {count:,} of the {leaf.size:,} numbers of the parameter {name} are NaN or infinite: take "
                "another checkpoint of the run"
            )


def merge_parameters(fresh: Any, restored: Any) -> tuple[Any, MergeReport]:
    """Takes from `restored` every leaf that `fresh` has at the same path with the same shape.

    A leaf of another floating dtype is cast to that of `fresh`; any other difference of dtype is a mismatch.

    Args:
      fresh: pytree of arrays, the model's own parameters.
      restored: pytree of arrays, for example from `restore_parameters`.

    Returns:
      A tree like `fresh` of jax arrays, and what became of each leaf.

    Raises:
      UserError: nothing at all could be taken.
    """
    model, saved = named_leaves(fresh), named_leaves(restored)

    def fits(name: str) -> bool:
        a, b = model[name], saved[name]
        floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (a, b))
        return a.shape == b.shape and (a.dtype == b.dtype or floating)

    taken = tuple(name for name in model if name in saved and fits(name))
    report = MergeReport(
        taken=taken,
        dropped={name: leaf_spec(leaf) for name, leaf in saved.items() if name not in model},
        mismatched={
            name: (leaf_spec(saved[name]), leaf_spec(model[name]))
            for name in model
            if name in saved and name not in taken
        },
        new={name: leaf_spec(leaf) for name, leaf in model.items() if name not in saved},
    )
    if not taken:
        raise UserError(nothing_fits(leaf_rows(saved), leaf_rows(model)))
    merged = [jnp.array(saved[name], leaf.dtype) if name in taken else leaf for name, leaf in model.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), merged), report


def hash_of_parameters(parameters: Any) -> str:
    """The SHA-256 of all names, types, shapes and bits; 64 hexadecimal digits."""
    found = hashlib.sha256()
    for name, leaf in sorted(named_leaves(parameters).items()):
        found.update(f"{name}: {leaf_spec(leaf)}\n".encode())
        found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return found.hexdigest()


def leaf_spec(leaf: Any) -> str:
    """Dtype and shape, such as 'float32 (4, 8)'."""
    return f"{leaf.dtype} {leaf.shape}"


def shape_of_spec(spec: str) -> str:
    """The shape in what `leaf_spec` gives."""
    return spec.partition(" ")[2]


def nothing_fits(saved: Iterable[str], model: Iterable[str]) -> str:
    """The error for a checkpoint of which a model can take nothing."""
    return f"no parameter of the checkpoint fits the model: it has {listing(saved)}, the model has {listing(model)}"


def leaf_rows(leaves: Mapping[str, Any]) -> list[str]:
    """A line for each leaf: its name, dtype and shape."""
    return [f"{name}: {leaf_spec(leaf)}" for name, leaf in leaves.items()]


def listing(items: Iterable, count: int = 5) -> str:
    """The first items, for a message of one line."""
    items = [str(item) for item in items]
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
