"""AdamW behind a global-norm clip, with warm-up and cosine decay, as an optax chain."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate of the update with the given count (0 for the first).

    Rises linearly from `min_learning_rate`, reached one step before the first update, to `learning_rate` at step
    `warmup_steps`, then falls along a half cosine to the minimum at step `decay_steps`, where it stays.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.min_learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=config.min_learning_rate,
    )
    return lambda count: schedule(count + 1)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for matrices, embeddings among them; False for biases and the scales of layer norms."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The chain of `config.optimizer`.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask if config.decay_matrices_only else None,
        ),
    )
