"""Checks a config before any work is done, so that a mistake costs one line and not an hour."""

import math

from ml_collections import ConfigDict

BACKENDS = ("auto", "xla", "vulkan")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("highest", "high", "default")
TARGETS = ("all", "assistant")


class UserError(ValueError):
    """Something the user can mend; its message is one line that says how."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(config: ConfigDict, minimum: int, *names: str) -> None:
    for name in names:
        value = config
        for part in name.split("."):
            value = value[part]
        _require(
            math.isfinite(value) and value >= minimum,
            f"config.{name} must be at least {minimum}, found {value}",
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"config.{name} must be one of {', '.join(choices)}; found {value!r}")


def validate(config: ConfigDict) -> None:
    """Raises UserError, in one line, for a value that is impossible by itself or contradicts another."""
    _one_of("backend", config.backend, BACKENDS)
    _one_of("matmul_precision", config.matmul_precision, PRECISIONS)
    _one_of("model.dtype", config.model.dtype, DTYPES)
    _one_of("data.targets", config.data.targets, TARGETS)
    positive = [
        *("num_steps", "batch_size", "accumulate_steps", "max_skipped_steps"),
        *(f"model.{name}" for name in ("vocab_size", "block_size", "num_layers", "num_heads", "embed_dim")),
        *("optimizer.decay_steps", "data.prefetch", "eval.every", "eval.batches"),
        *("sample.every", "sample.max_tokens", "checkpoint.every", "checkpoint.keep_last"),
        *("log.every", "log.diagnostics_every", "log.profile_steps"),
    ]
    _at_least(config, 1, *positive)
    _at_least(config, 0, "seed", "model.soft_cap", "optimizer.warmup_steps", "optimizer.weight_decay")
    _at_least(config, 0, "optimizer.min_learning_rate", "sample.temperature", "sample.top_k")
    _at_least(config, 0, "checkpoint.keep_every", "log.profile_step")
    _require(config.seed < 2**32, f"config.seed must be below 2**32, found {config.seed}")

    model, optimizer = config.model, config.optimizer
    _require(
        model.embed_dim % model.num_heads == 0,
        f"config.model.embed_dim must be a multiple of num_heads, found {model.embed_dim} and {model.num_heads}",
    )
    _require(
        0 <= model.dropout_rate < 1,
        f"config.model.dropout_rate must be in [0, 1), found {model.dropout_rate}",
    )
    _require(
        config.batch_size % config.accumulate_steps == 0,
        f"config.batch_size must be a multiple of accumulate_steps, "
        f"found {config.batch_size} and {config.accumulate_steps}",
    )
    _require(
        0 < optimizer.learning_rate < math.inf,
        f"config.optimizer.learning_rate must be positive, found {optimizer.learning_rate}",
    )
    _require(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        f"config.optimizer.min_learning_rate must not exceed learning_rate, "
        f"found {optimizer.min_learning_rate} and {optimizer.learning_rate}",
    )
    for name in ("b1", "b2"):
        _require(0 <= optimizer[name] < 1, f"config.optimizer.{name} must be in [0, 1), found {optimizer[name]}")
    for name in ("epsilon", "clip_norm"):
        _require(optimizer[name] > 0, f"config.optimizer.{name} must be positive, found {optimizer[name]}")
    _require(
        optimizer.warmup_steps < optimizer.decay_steps,
        f"config.optimizer.warmup_steps must be below decay_steps, where the schedule ends, "
        f"found {optimizer.warmup_steps} and {optimizer.decay_steps}",
    )
    _require(
        0 < config.data.validation_fraction < 1,
        f"config.data.validation_fraction must be in (0, 1), found {config.data.validation_fraction}",
    )
