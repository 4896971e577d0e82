"""FLOPs of a model, the peaks of devices, and the one by the other: MFU."""

import re

from ml_collections import ConfigDict

from gpt_jax.model.gpt import ModelConfig
from vk_kernels.ops.attention.planner import backward_flops, forward_flops

# Dense peaks in TFLOP/s (bfloat16 with f32 accumulation, tf32, float32 without tensor cores), by the whole name that
# JAX gives a device: a slice of a GPU (MIG), a laptop's or an unlisted variant has none rather than a wrong one.
# Sources: NVIDIA's data sheets of A100, H100, H200, L4, L40S, T4 and V100 (figures "with sparsity" halved) and its
# GA102 and Ada papers; Google Cloud's TPU system architecture pages. T4 and V100 have no bf16; a TPU's f32
# is made of several bf16 passes, and has no published peak.
PEAK_TFLOPS: tuple[tuple[str, float | None, float | None, float | None], ...] = (
    (r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312, 156, 19.5),
    (r"NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
    (r"NVIDIA H100 PCIe", 756, 378, 51.2),
    (r"NVIDIA H100 NVL", 835, 417, 60),
    (r"NVIDIA H200", 989.4, 494.7, 66.9),
    (r"NVIDIA H200 NVL", 835, 417, 60),
    (r"NVIDIA L4", 121, 60, 30.3),
    (r"NVIDIA L40S", 362, 183, 91.6),
    (r"Tesla T4", None, None, 8.1),
    (r"Tesla V100-SXM2-(16|32)GB", None, None, 15.7),
    (r"Tesla V100-PCIE-(16|32)GB", None, None, 14.0),
    (r"NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
    (r"TPU v4", 275, None, None),
    (r"TPU v5( lite|e)", 197, None, None),
    (r"TPU v5p?", 459, None, None),
    (r"TPU v6( lite|e)", 918, None, None),
)


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most in dense matrix products; None if that is not known.

    Args:
      device_kind: as `jax.Device.device_kind` says it.
      dtype: bfloat16, tf32 (f32 operands, rounded inside the product) or float32.
    """
    column = {"bfloat16": 0, "tf32": 1, "float32": 2}[dtype]
    for pattern, *peaks in PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return peaks[column] and peaks[column] * 1e12
    return None


def model_flops_per_token(model: ConfigDict, adapters: int = 0) -> int:
    """FLOPs of the forward and the backward pass, a token: 6 N + 6 L T D.

    N weights stand in matrix products, the output layer's among them, and the embeddings not, which are looked up: a
    multiplication and an addition each, once forward and twice backward. Attention's two products forward and four
    backward take T D each over the keys that a causal mask lets a token see, T / 2 on average. What a kernel computes
    again, and what the mask hides, is no work of the model and does not count.

    Sources: Chowdhery et al., "PaLM" (2022), appendix B, for 6 N and the attention of an unmasked model, 12 L T D; Dao,
    "FlashAttention-2" (2023), section 4.1, for the half under a causal mask.

    Where adapters alone are trained, N weights have no gradient of their own: 4 N, and 6 for each number in adapters.

    Args:
      model: `config.model`: L num_layers, T block_size, D embed_dim; a block has 4 D^2 weights in attention, and 2 D
        times its MLP's width.
      adapters: numbers in adapters; 0: there are none, and all else is trained.
    """
    shape = (1, model.block_size, model.num_heads, model.embed_dim // model.num_heads)  # (B, T, H, D)
    attention = model.num_layers * (forward_flops(shape) + backward_flops(shape)) // model.block_size
    block = (4 * model.embed_dim + 2 * ModelConfig.from_config(model).mlp_width) * model.embed_dim
    weights = model.num_layers * block + model.vocab_size * model.embed_dim
    return (4 if adapters else 6) * weights + 6 * adapters + attention


def model_flops_utilisation(
    model: ConfigDict, tokens_per_second: float, peak_flops: float | None, adapters: int = 0
) -> float | None:
    """MFU: the share that the model's FLOPs are of what the device could do at most; None where that is not known."""
    return None if peak_flops is None else tokens_per_second * model_flops_per_token(model, adapters) / peak_flops
