"""A train step of several processes: gradient of the own rows, exchange, update. Each process has a device of its own.

    gradient   one submission: sums of losses, their gradient and the number of targets, of this process's rows
    exchange   the sums over all processes, the same bits on all
    update     one submission: the mean's gradient, clipping, the optimizer

The mean is of all targets of the whole batch, however they are spread, so that N devices train as one with the whole
batch does, up to the order in which numbers are added up.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from gpt_jax.distributed.buckets import Buckets
from gpt_jax.model.gpt import GPT, make_model
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import (
    Batch,
    Leaves,
    Metrics,
    TrainState,
    apply_gradient,
    loss_and_gradient,
    target_count,
)
from gpt_jax.training.trainable import IsTrained, all_trained, partition, trained_parameters
from vk_kernels.bridge.profile import Cost, Profile
from vk_kernels.runtime.array_spec import ArraySpec


class Exchange(Protocol):
    """Sums of arrays over all processes. It is made for the types of the arrays, on the device that they are on."""

    def __call__(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The sums, computed or not: whatever is submitted from here on waits for them."""

    def finish(self) -> None:
        """Returns when the sums are computed."""


MakeExchange = Callable[[Any, Sequence[ArraySpec]], Exchange]  # device, types


def gradient_step(
    leaves: Leaves, batch: Batch, *, structure: Any, is_trained: IsTrained, buckets: Buckets, **options: Any
) -> tuple[jax.Array, ...]:
    """(the step's number, parameters), rows -> the gradient in buckets; (sum of losses, number of targets) in f32.

    structure: of the parameters. options: of `loss_and_gradient`.
    """
    step, *params = leaves
    trained, frozen = partition(jax.tree.unflatten(structure, params), is_trained)
    loss, grads = loss_and_gradient(trained, batch, step, jnp.float32(1), frozen=frozen, **options)
    # The loss and the number of targets come last, and never in fewer bits.
    return *buckets.pack(grads), jnp.stack([loss, target_count(batch)])


def update_step(
    leaves: Leaves, sums: tuple[jax.Array, ...], *, structure: Any, buckets: Buckets, **options: Any
) -> tuple[Leaves, Metrics]:
    """(state, what all processes' `gradient_step` add up to) -> (state, metrics).

    structure: of the state. options: of `apply_gradient`.
    """
    *packed, (loss, count) = sums
    targets = jnp.maximum(count, 1)
    grads = jax.tree.map(lambda leaf: leaf / targets, buckets.unpack(packed))
    state = jax.tree.unflatten(structure, leaves)
    next_state, metrics = apply_gradient(state, loss / targets, grads, count > 0, **options)
    return tuple(jax.tree.leaves(next_state)), metrics


class CutStep:
    """(leaves of the state, batch of this process) -> (leaves, metrics), as `steps.train_step` of the whole batch.

    The leaves are donated. exchange: None before the first call.
    """

    def __init__(
        self,
        state: TrainState,
        make_exchange: MakeExchange,
        jit: Callable[..., Any],
        *,
        model: GPT,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        seed: int,
        accumulate_steps: int = 1,
        is_trained: IsTrained = all_trained,
        dtype: str = "float32",
        bucket_bytes: int | None = None,
    ):
        """state: its shapes and dtypes. jit: of `vk_kernels`. dtype: of gradients on their way."""
        self.exchange: Exchange | None = None
        self.make_exchange = make_exchange
        trained, _ = partition(state.params, is_trained)
        buckets = Buckets(trained, model.config.layer_names, dtype, bucket_bytes)
        number = ArraySpec((2,), np.dtype(np.float32))
        self.specs = [*(ArraySpec((size,), np.dtype(buckets.dtype)) for size in buckets.sizes), number]
        structure = jax.tree.structure(state)
        places = jax.tree.unflatten(structure, range(structure.num_leaves))
        self._read = [places.step, *jax.tree.leaves(places.params)]  # leaves that the gradient needs
        gradient = functools.partial(
            gradient_step,
            structure=jax.tree.structure(state.params),
            is_trained=is_trained,
            buckets=buckets,
            model=model,
            seed=seed,
            accumulate_steps=accumulate_steps,
        )
        update = functools.partial(
            update_step,
            structure=structure,
            buckets=buckets,
            optimizer=optimizer,
            schedule=schedule,
            is_trained=is_trained,
        )
        # What is exchanged first need not wait for the rest.
        groups = [(k,) for k in range(len(self.specs))]
        self._gradient = jit(gradient, compiler_options={"output_groups": groups})
        self._update = jit(update, donate_argnums=0)

    def __call__(self, leaves: Leaves, batch: Batch) -> tuple[Leaves, Any]:
        read = self._inputs(leaves)
        if self.exchange is None:
            gradient = self._gradient.lower(read, batch)
            self.exchange = self.make_exchange(gradient.device, self.specs)
            self._update.lower(leaves, tuple(self._sums()))  # compiled before the first wait for the others
        updated = self._update(leaves, tuple(self.exchange(self._gradient(read, batch))))
        self.exchange.finish()
        return updated

    def _inputs(self, leaves: Leaves) -> Leaves:
        return tuple(leaves[number] for number in self._read)

    def _sums(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in self.specs]

    def lower(self, leaves: Leaves, batch: Batch) -> tuple[Any, Any]:
        """The programs of both submissions."""
        return self._gradient.lower(self._inputs(leaves), batch), self._update.lower(leaves, tuple(self._sums()))

    def cost(self, leaves: Leaves, batch: Batch) -> Cost:
        """The cost of both submissions; one's memory is there beside the other's."""
        gradient, update = (lowered.cost() for lowered in self.lower(leaves, batch))
        return Cost(*(getattr(gradient, name) + getattr(update, name) for name in Cost.__dataclass_fields__))

    def profile(self, leaves: Leaves, batch: Batch) -> Profile:
        """Device time of the dispatches of both; the arguments stay."""
        gradient = self._gradient.profile(self._inputs(leaves), batch)
        update = self._update.profile(leaves, tuple(jnp.zeros(x.shape, x.dtype) for x in self._sums()))
        return Profile((*gradient.rows, *update.rows))

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        self._gradient.clear_cache()
        self._update.clear_cache()


def make_cut_step(
    config: ConfigDict,
    state: TrainState,
    make_exchange: MakeExchange,
    jit: Callable[..., Any],
    *,
    first_text: int = 0,
    bucket_bytes: int | None = None,
) -> CutStep:
    """The step with what a config says. state: its shapes and dtypes. first_text: see `make_model`.
    bucket_bytes: see `Buckets`."""
    return CutStep(
        state,
        make_exchange,
        jit,
        model=make_model(config, first_text),
        optimizer=make_optimizer(config),
        schedule=learning_rate_schedule(config),
        seed=config.seed,
        accumulate_steps=config.accumulate_steps,
        is_trained=trained_parameters(config),
        dtype=config.exchange_dtype,
        bucket_bytes=bucket_bytes,
    )
