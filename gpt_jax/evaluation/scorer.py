"""Losses of tokens under a model on its backend, in batches of one shape: a model is compiled once for all its data."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.backend import Backend
from gpt_jax.data.batches import MASKED
from gpt_jax.errors import UserError
from gpt_jax.evaluation.windows import Window
from gpt_jax.model.gpt import GPT
from vk_kernels import ops


def token_losses(params: Any, inputs: jax.Array, targets: jax.Array, *, model: GPT) -> jax.Array:
    """Cross entropy in nats of each target, f32 (B, T); 0 where it is masked."""
    return model.apply({"params": params}, inputs, targets, method="losses")


def losses_and_likeliest(
    params: Any, inputs: jax.Array, targets: jax.Array, places: jax.Array, *, model: GPT
) -> tuple[jax.Array, jax.Array]:
    """The losses, and at some places of each text, int32 (B, K), the likeliest token, int32 (B, K)."""

    def apply(gpt: GPT) -> tuple[jax.Array, jax.Array]:
        hidden, matrix = gpt(inputs), gpt.output_matrix()  # (B, T, D), (D, V)
        flat, tied = hidden.reshape(-1, hidden.shape[-1]), model.config.tie_head
        losses = ops.linear_cross_entropy(flat, matrix, targets.reshape(-1), transposed=tied)
        picked = jnp.take_along_axis(hidden, places[:, :, None], axis=1).reshape(-1, hidden.shape[-1])  # (B K, D)
        logits = ops.matmul(picked, matrix.T if tied else matrix).astype(jnp.float32)
        return losses.reshape(targets.shape), jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(places.shape)

    return model.apply({"params": params}, method=apply)


class Scorer:
    """A model's parameters on a device, and the two functions of them, compiled when they are first called.

    Args:
      params: host arrays.
      batch_size: windows computed together; those that a last batch lacks are masked.
    """

    def __init__(self, model: GPT, params: Any, backend: Backend, batch_size: int) -> None:
        self.block_size = model.config.block_size
        self._batch_size = batch_size
        self._params = backend.put(params)
        self._token_losses = backend.jit(functools.partial(token_losses, model=model))
        self._losses_and_likeliest = backend.jit(functools.partial(losses_and_likeliest, model=model))

    def losses(self, windows: Iterable[Window], width: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Each window, in their order, with its losses, f32 (n,). width: tokens of the longest."""

        def compute(batch: list[Window]) -> jax.Array:
            return self._token_losses(self._params, *self._as_arrays(batch, width))

        for batch, losses in self._in_batches(windows, compute):
            for row, window in zip(losses, batch, strict=False):
                yield window, row[: len(window.targets)]

    def losses_and_hits(self, windows: Iterable[Window], width: int, most: int) -> Iterator[tuple[np.ndarray, bool]]:
        """The losses of each window, and whether all of its targets, `most` or fewer, are the likeliest tokens."""

        def places(window: Window) -> np.ndarray:
            found = np.flatnonzero(window.targets != MASKED)
            return np.pad(found, (0, most - len(found)), mode="edge")

        def compute(batch: list[Window]) -> tuple[jax.Array, jax.Array]:
            rows = [places(window) for window in batch]
            rows += [np.zeros(most, int)] * (self._batch_size - len(batch))
            return self._losses_and_likeliest(self._params, *self._as_arrays(batch, width), np.array(rows, np.int32))

        for batch, (losses, likeliest) in self._in_batches(windows, compute):
            for row, best, window in zip(losses, likeliest, batch, strict=False):
                hit = bool((best == window.targets[places(window)]).all())
                yield row[: len(window.targets)], hit

    def _in_batches(
        self, windows: Iterable[Window], compute: Callable[[list[Window]], Any]
    ) -> Iterator[tuple[list[Window], Any]]:
        """Batches with what is computed of them, while the next one is under way."""
        windows, pending = iter(windows), None
        while batch := list(itertools.islice(windows, self._batch_size)):
            computed = compute(batch)
            if pending:
                yield _read_back(*pending)
            pending = batch, computed
        if pending:
            yield _read_back(*pending)

    def _as_arrays(self, batch: list[Window], width: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.zeros((self._batch_size, width), np.int32)
        targets = np.full((self._batch_size, width), MASKED, np.int32)
        for row, window in enumerate(batch):
            inputs[row, : len(window.inputs)] = window.inputs
            targets[row, : len(window.targets)] = window.targets
        return inputs, targets


def _read_back(batch: list[Window], computed: Any) -> tuple[list[Window], Any]:
    found = jax.device_get(computed)
    if not np.isfinite(jax.tree.leaves(found)[0]).all():
        raise UserError("the model gives losses that are not finite, from parameters that are: it cannot be evaluated")
    return batch, found
