"""AdamW behind a global-norm clip, with warm-up and cosine decay, as an optax chain."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gpt_jax.leaf_names import name_of
from gpt_jax.training.trainable import RateOf, rates_of_parameters


def last_decay_step(config: ConfigDict) -> int:
    """The step at which the cosine reaches the minimum: by default that after which the run ends.

    A run that ends within its warm-up has no cosine.
    """
    return config.optimizer.decay_steps or max(config.num_steps, config.optimizer.warmup_steps + 1)


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate of the update with the given count (0 for the first).

    Rises linearly from `min_learning_rate`, reached one step before the first update, to `learning_rate` at step
    `warmup_steps`, then falls along a half cosine to the minimum at step `decay_steps`, where it stays.
    """
    settings = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=settings.min_learning_rate,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=last_decay_step(config),
        end_value=settings.min_learning_rate,
    )
    return lambda count: schedule(count + 1)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for matrices, embeddings among them; False for biases and the scales of layer norms."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The chain of `config.optimizer`, for the parameters that are trained.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019).
    """
    settings = config.optimizer
    chain = [
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=decay_mask if settings.decay_matrices_only else None,
        ),
    ]
    if settings.layer_decay != 1 or settings.rates:
        chain.append(scale_by_name(rates_of_parameters(config)))
    return optax.chain(*chain)


def scale_by_name(rate: RateOf) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by a factor that follows from its name."""

    def scale(path: jax.tree_util.KeyPath, update: jax.Array) -> jax.Array:
        return rate(name_of(path)) * update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
