"""FLOPs of a model, and the peaks of devices that they are measured by."""

import re

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


def model_flops_per_token(matrix_parameters: int, layers: int, width: int, block: int) -> int:
    """FLOPs of forward and backward pass, a token: 6 N + 12 layers width block.

    6 N is a multiply and an add, once forward and twice backward, with each parameter; the rest is the attention's two
    products, the causal mask's saving not counted. Source: Chowdhery et al., "PaLM" (2022), appendix B.

    Args:
      matrix_parameters: N, without the embeddings, which are looked up; the output layer counts, tied or not.
      layers: of the transformer.
      width: of the residual stream, heads * head size.
      block: tokens that attention sees.
    """
    return 6 * matrix_parameters + 12 * layers * width * block
