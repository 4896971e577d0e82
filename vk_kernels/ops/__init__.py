"""The kernel ops of a transformer, each with its reference in plain JAX and its Vulkan kernels (see `public`)."""

from vk_kernels.ops.adamw import adamw
from vk_kernels.ops.attention.api import attention, packed_attention
from vk_kernels.ops.attention.decode import decode_attention
from vk_kernels.ops.attention.dot_product_attention import dot_product_attention
from vk_kernels.ops.attention.fill_cache import fill_cache
from vk_kernels.ops.attention.reference import attention_scores
from vk_kernels.ops.cross_entropy.api import linear_cross_entropy
from vk_kernels.ops.cross_entropy.reference import IGNORED
from vk_kernels.ops.draw_tokens import Controls, Drawn, draw_tokens
from vk_kernels.ops.dropout import dropout
from vk_kernels.ops.embedding import embedding
from vk_kernels.ops.extend_texts import Texts, extend_texts
from vk_kernels.ops.gelu import gelu
from vk_kernels.ops.global_norm import global_norm
from vk_kernels.ops.layer_norm.api import layer_norm, residual_layer_norm
from vk_kernels.ops.matmul.api import matmul
from vk_kernels.ops.matmul.norm_matmul import norm_matmul

__all__ = [
    "IGNORED",
    "Controls",
    "Drawn",
    "Texts",
    "adamw",
    "attention",
    "attention_scores",
    "decode_attention",
    "dot_product_attention",
    "draw_tokens",
    "dropout",
    "embedding",
    "extend_texts",
    "fill_cache",
    "gelu",
    "global_norm",
    "layer_norm",
    "linear_cross_entropy",
    "matmul",
    "norm_matmul",
    "packed_attention",
    "residual_layer_norm",
]


def __dir__() -> list[str]:
    return __all__
