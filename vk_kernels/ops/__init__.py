"""The hot operations of a transformer, each with its pure-XLA reference and its Vulkan kernels (see `api`)."""

from vk_kernels.ops.api import (
    adamw,
    attention,
    dropout,
    embedding,
    gelu,
    global_norm,
    layer_norm,
    linear_cross_entropy,
    matmul,
    packed_attention,
    residual_layer_norm,
)
from vk_kernels.ops.attention import attention_scores
from vk_kernels.ops.cross_entropy import IGNORED

__all__ = [
    "IGNORED",
    "adamw",
    "attention",
    "attention_scores",
    "dropout",
    "embedding",
    "gelu",
    "global_norm",
    "layer_norm",
    "linear_cross_entropy",
    "matmul",
    "packed_attention",
    "residual_layer_norm",
]
