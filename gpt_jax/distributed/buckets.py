"""Buckets: gradients as a few flat arrays of one size, in the order in which the backward pass finishes them.

What is exchanged in a few large pieces uses all of a bus, and the first of them is on its way while the last is not
computed yet.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BUCKET_BYTES = 32 << 20
FEWEST = 4  # buckets: what of a small model is exchanged behind its gradient, and not after it


class ArrayPiece(NamedTuple):
    """The elements from `start` to `stop` of the flat leaf number `leaf`."""

    leaf: int
    start: int
    stop: int


class Buckets:
    """The division of a tree of parameters into buckets. pieces: of each bucket, the parts of leaves in it, in order.

    All buckets but the last have the same size; a leaf may lie in several.
    """

    def __init__(self, tree: dict[str, Any], layers: Sequence[str], dtype: Any, nbytes: int | None = None):
        """tree: by layer, arrays or their shapes. layers: all, in the order of the forward pass. dtype: of the
        buckets. nbytes: of each; None: BUCKET_BYTES, or less where that makes too few."""
        places = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
        order = [leaf for layer in reversed(layers) for leaf in reversed(jax.tree.leaves(places.get(layer)))]
        leaves = jax.tree.leaves(tree)
        if len(order) != len(leaves):
            raise ValueError(f"the layers {sorted(tree)} are not among {list(layers)}")
        self.dtype, self._structure = jnp.dtype(dtype), jax.tree.structure(tree)
        self._leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        if nbytes is None:
            nbytes = min(BUCKET_BYTES, -(-sum(leaf.size for leaf in leaves) // FEWEST) * self.dtype.itemsize)
        most = max(1, nbytes // self.dtype.itemsize)
        self.pieces: list[list[ArrayPiece]] = [[]]
        room = most
        for number in order:
            start = 0
            while start < leaves[number].size:
                if not room:
                    self.pieces.append([])
                    room = most
                stop = min(leaves[number].size, start + room)
                self.pieces[-1].append(ArrayPiece(number, start, stop))
                room, start = room - (stop - start), stop

    @property
    def sizes(self) -> list[int]:
        """The elements of each bucket."""
        return [sum(piece.stop - piece.start for piece in bucket) for bucket in self.pieces]

    def pack(self, tree: Any) -> list[jax.Array]:
        """The buckets of such a tree, flat."""
        flat = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
        parts = [[flat[leaf][start:stop] for leaf, start, stop in pieces] for pieces in self.pieces]
        return [jnp.concatenate(part).astype(self.dtype) for part in parts]

    def unpack(self, buckets: Sequence[jax.Array]) -> Any:
        """The tree of such buckets, in the dtypes of its leaves."""
        parts: list[list[jax.Array]] = [[] for _ in self._leaves]
        for bucket, pieces in zip(buckets, self.pieces, strict=True):
            first = 0
            for leaf, start, stop in pieces:
                parts[leaf].append(bucket[first : first + stop - start])
                first += stop - start
        leaves = [
            jnp.concatenate(part).reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, self._leaves, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)
