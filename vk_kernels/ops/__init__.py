"""The hot operations, one a module, each with its pure-XLA reference."""

from vk_kernels.ops.attention import attention, attention_scores
from vk_kernels.ops.cross_entropy import IGNORED, linear_cross_entropy
from vk_kernels.ops.dropout import dropout
from vk_kernels.ops.embedding import embedding
from vk_kernels.ops.gelu import gelu
from vk_kernels.ops.layer_norm import layer_norm
from vk_kernels.ops.matmul import matmul

__all__ = [
    "IGNORED",
    "attention",
    "attention_scores",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "matmul",
]
