"""Names of the leaves of a tree: parameters, a state."""

from typing import Any

import jax


def name_of(path: jax.tree_util.KeyPath) -> str:
    """The path of a leaf as one text, such as 'params/h_0/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by `name_of` their path, in the order of `jax.tree.leaves`."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
