"""LoRA: a linear layer that stays as it is, and beside it a product of two thin matrices that is trained.

    y = x W + b + (alpha / rank) dropout(x) A B        A: (K, rank), B: (rank, N), both f32

B begins as zero, so that the model is at first the one that it adapts. A run holds its base once and saves adapters
alone; whoever else reads its parameters gets `merge_adapters`: W + (alpha / rank) A B, and no adapters.

Source: Hu et al., "LoRA: Low-rank adaptation of large language models" (ICLR 2022); initial values as in the library
`peft`.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gpt_jax.config import FIELDS
from gpt_jax.errors import UserError

LINEAR_LAYERS = ("qkv", "projection", "mlp_in", "mlp_out")  # of a block, in the order of the forward pass
ALL = "all"  # a target: every one of these, in every block
A, B = "lora_a", "lora_b"  # parameters of a linear layer, beside its kernel

# Uniform in +-1 / sqrt(K), as torch initialises a linear layer: Kaiming's bound with a slope of sqrt(5).
init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class LoraConfig:
    """The adapters of a model. targets: patterns of linear layers, see `is_adapted`."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @classmethod
    def from_config(cls, config: ConfigDict) -> "LoraConfig | None":
        """Makes it from `config.lora`; None where the rank is 0, as in a config that was saved before there was one."""
        settings = config.get("lora")
        if settings is None or not settings.rank:
            return None
        return cls(settings.rank, float(settings.alpha), float(settings.dropout), tuple(settings.targets))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def is_adapted(self, block: int, layer: str) -> bool:
        """Whether a linear layer has adapters: a target is `all`, or a glob for its name (`qkv`, `mlp_*`), for its
        block (`h_[0-3]`) or for both (`h_5/mlp_in`)."""
        names = (layer, f"h_{block}", f"h_{block}/{layer}")
        return any(target == ALL or fnmatch.filter(names, target) for target in self.targets)


def check_targets(lora: LoraConfig, num_layers: int) -> None:
    """Raises UserError for a target that is no linear layer's, or if there is none at all."""
    there_are = (
        f"there are {', '.join(LINEAR_LAYERS)} in the blocks h_0 to h_{num_layers - 1} (one is called "
        f"h_0/{LINEAR_LAYERS[0]}), and {ALL}"
    )
    if not lora.targets:
        raise UserError(f"config.lora.targets names no linear layer: {there_are}")
    for target in lora.targets:
        alone = LoraConfig(lora.rank, lora.alpha, lora.dropout, (target,))
        if not any(alone.is_adapted(block, layer) for block in range(num_layers) for layer in LINEAR_LAYERS):
            raise UserError(f"config.lora.targets: {target!r} is no linear layer: {there_are}")


def unused_settings(config: ConfigDict) -> list[str]:
    """The settings of adapters that a run without any was given, and that do nothing."""
    if config.lora.rank:
        return []
    given = {name: FIELDS[f"lora.{name}"] for name in config.lora}
    return [f"lora.{name}" for name, field in given.items() if config.lora[name] != field.default]


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its path, is one of an adapter."""
    return name.rpartition("/")[2] in (A, B)


def merge_adapters(params: Any, scale: float) -> Any:
    """Parameters without adapters: each adapted kernel is W + scale A B, in f32; all others are as they are.

    params: a nested dict of JAX or of numpy arrays, f32.
    """
    if not isinstance(params, Mapping):
        return params
    merged = {name: merge_adapters(x, scale) for name, x in params.items() if name not in (A, B)}
    if A in params:
        merged["kernel"] = params["kernel"] + np.float32(scale) * (params[A] @ params[B])
    return merged


def adapted_layers(names: Iterable[str]) -> list[str]:
    """The linear layers that have adapters, such as `h_0/qkv`, by the names of all parameters."""
    return [name.removesuffix(f"/{A}") for name in names if name.endswith(f"/{A}")]
