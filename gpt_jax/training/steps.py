"""The pure functions of a run: loss; train step, which skips an update that is not finite; evaluation; diagnostics.

They know nothing of files, clocks or devices; `programs.py` jits them, `trainer.py` runs the loop.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from gpt_jax.distributed.placement import OneDevice
from gpt_jax.model.gpt import DIAGNOSTICS, GPT
from gpt_jax.training.trainable import IsTrained, all_trained, by_layer, combine, partition

Batch = dict[str, jax.Array]  # 'inputs' and 'targets', int32 (B, T); a negative target counts for nothing
Metrics = dict[str, jax.Array]
Leaves = tuple[Any, ...]  # of a state
ONE_DEVICE = OneDevice()


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes."""

    step: jax.Array  # int32 (): steps done
    skipped: jax.Array  # int32 (): of those, how many changed nothing: not finite, or without a target
    skipped_in_a_row: jax.Array  # int32 (): since the last finite step that had a target
    params: Any
    opt_state: Any  # of the parameters that are trained


def init_state(params: Any, optimizer: optax.GradientTransformation, is_trained: IsTrained = all_trained) -> TrainState:
    """State before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(partition(params, is_trained)[0]),
    )


def target_count(batch: Batch) -> jax.Array:
    """The number of targets of a batch that count, f32 ()."""
    return (batch["targets"] >= 0).sum().astype(jnp.float32)


def loss_fn(params: Any, batch: Batch, count: jax.Array, rng: jax.Array | None, *, model: GPT) -> jax.Array:
    """Sum of the cross entropies of a batch, over `count`: the mean, where that is the batch's own count.

    Args:
      rng: uint32 (2,): seed and step of the dropout; None: no dropout.
    """
    losses = model.apply({"params": params}, batch["inputs"], batch["targets"], rng, method="losses")
    return losses.sum() / count


def loss_and_gradient(
    params: Any,
    batch: Batch,
    step: jax.Array,
    count: jax.Array,
    *,
    model: GPT,
    seed: int,
    accumulate_steps: int = 1,
    frozen: Any = None,
) -> tuple[jax.Array, Any]:
    """Loss of the batch, the sum over `count`, and its gradient, computed in `accumulate_steps` equal parts, one after
    another.

    Both are 0 for a batch without a target.

    Args:
      params: those that the gradient is of.
      count: f32 (): the batch's own number of targets gives the mean, 1 the sum.
      frozen: the others, as `partition` gives both; None: there are none.
    """
    parts = jax.tree.map(lambda x: x.reshape(accumulate_steps, -1, x.shape[-1]), batch)
    seed = jnp.uint32(seed)

    def part_loss(params: Any, *operands: Any) -> jax.Array:
        return loss_fn(params if frozen is None else combine(params, frozen), *operands, model=model)

    def part_gradient(index: jax.Array, part: Batch) -> tuple[jax.Array, Any]:
        # Each part is one draw of the dropout's clock, so that no two share their bits.
        clock = step.astype(jnp.uint32) * jnp.uint32(accumulate_steps) + index
        return jax.value_and_grad(part_loss)(params, part, count, jnp.stack([seed, clock]))

    def add_part(total: Any, indexed_part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part_gradient(*indexed_part)), None

    if accumulate_steps == 1:
        return part_gradient(jnp.uint32(0), batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    indices = jnp.arange(accumulate_steps, dtype=jnp.uint32)
    return jax.lax.scan(add_part, zeros, (indices, parts))[0]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    accumulate_steps: int = 1,
    is_trained: IsTrained = all_trained,
    placement: OneDevice = ONE_DEVICE,
) -> tuple[TrainState, Metrics]:
    """One update, or none, by the mean loss of a batch and its gradient; see `apply_gradient`.

    A batch on several devices comes in its parts, (accumulate_steps, B / accumulate_steps, T), if there are several.
    """
    trained, frozen = partition(placement.gather(state.params), is_trained)
    count = target_count(batch)
    loss, grads = loss_and_gradient(
        trained,
        batch,
        state.step,
        jnp.maximum(count, 1),
        model=model,
        seed=seed,
        accumulate_steps=accumulate_steps,
        frozen=frozen,
    )
    grads = placement.scatter(grads)
    return apply_gradient(state, loss, grads, count > 0, optimizer=optimizer, schedule=schedule, is_trained=is_trained)


def apply_gradient(
    state: TrainState,
    loss: jax.Array,
    grads: Any,
    counted: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    is_trained: IsTrained = all_trained,
) -> tuple[TrainState, Metrics]:
    """One update, or none: a non-finite loss or gradient, or a batch without a target, leaves parameters, optimizer and
    schedule as they were, and is counted in `skipped`.

    Without a target there is no gradient, so decay and momentum would move the parameters for no reason in the data.
    Parameters that are not trained have no gradient, no state of the optimizer and no decay, and all norms are of the
    others.

    Args:
      loss, grads: the mean over the targets of the step's batch, and its gradient by the trained parameters.
      counted: bool (): whether the batch had a target.

    Returns:
      The next state, and scalars: loss (NaN without a target: a mean over nothing), learning_rate, grad_norm (in total
      and, as grad_norm/LAYER, by layer that is trained), param_norm, update_norm, finite, skipped_in_a_row.
    """
    trained, frozen = partition(state.params, is_trained)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite & counted, n, o), new, old)

    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = optax.apply_updates(trained, updates)
        skipped_in_a_row = jnp.where(finite, jnp.where(counted, 0, state.skipped_in_a_row), state.skipped_in_a_row + 1)
        next_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + 1 - (finite & counted).astype(jnp.int32),
            skipped_in_a_row=skipped_in_a_row,
            params=combine(keep(params, trained), frozen),
            opt_state=keep(opt_state, state.opt_state),
        )
    with jax.named_scope("metrics"):
        metrics = {
            "loss": jnp.where(counted, loss, jnp.nan),
            "learning_rate": schedule(state.step - state.skipped),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(trained),
            "update_norm": jnp.where(counted, optax.tree.norm(updates), 0),
            "finite": finite,
            "skipped_in_a_row": skipped_in_a_row,
        }
        metrics |= {f"grad_norm/{layer}": optax.tree.norm(group) for layer, group in by_layer(grads).items()}
    return next_state, metrics


def on_leaves(step: Callable[..., tuple[Any, Any]], structure: Any) -> Callable[[Leaves, Batch], tuple[Leaves, Any]]:
    """`step` with its state as the leaves of a `structure`: a tuple, which jit takes apart and puts together at each
    call several times faster than modules in modules."""

    def step_on_leaves(leaves: Leaves, batch: Batch) -> tuple[Leaves, Any]:
        state, metrics = step(jax.tree.unflatten(structure, leaves), batch)
        return tuple(jax.tree.leaves(state)), metrics

    return step_on_leaves


def eval_step(params: Any, batch: Batch, *, model: GPT) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of a batch without dropout, and how many targets it has: f32 () each."""
    return loss_fn(params, batch, jnp.float32(1), None, model=model), target_count(batch)


def diagnostics_step(params: Any, batch: Batch, *, model: GPT) -> Metrics:
    """Attention statistics by layer and head: attention_max/LAYER, attention_entropy/LAYER, f32 (H,) each."""
    _, sown = model.apply({"params": params}, batch["inputs"], mutable=[DIAGNOSTICS])
    return {
        f"{name}/{layer}": value[0]
        for layer, statistics in sown[DIAGNOSTICS].items()
        for name, value in statistics.items()
    }


def nonfinite_places(params: Any, batch: Batch, *, model: GPT) -> dict[str, jax.Array]:
    """Whether parameters and, without dropout, outputs are non-finite, by layer in forward order; bool () each."""
    _, captured = model.apply(
        {"params": params},
        batch["inputs"],
        capture_intermediates=lambda module, _: len(module.path) == 1,
    )
    layers = model.config.layer_names
    places = {f"parameters of {name}": _any_nonfinite(params[name]) for name in layers}
    outputs = captured["intermediates"]
    return places | {f"output of {name}": _any_nonfinite(outputs[name]) for name in layers if name in outputs}


def _any_nonfinite(tree: Any) -> jax.Array:
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).any()
