"""Attention by the signature of `jax.nn.dot_product_attention`, over the kernels of `attention`."""

import jax
import jax.numpy as jnp

from vk_kernels.bridge.use import target_of
from vk_kernels.ops.attention.api import attention


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale query key^T + bias, where the mask lets it) value, as `jax.nn.dot_product_attention`.

    Under 'vulkan' the kernels are those of `attention`: causal, of a query, key and value of one shape.

    Args:
      query: (B, T, N, H), or (T, N, H), a floating dtype.
      key, value: as query; under 'xla' of S rows, and of K heads that divide N, too.
      bias, mask, query_seq_lengths, key_value_seq_lengths, local_window_size: as JAX's, under 'xla' alone.
      scale: of the scores; 1 / sqrt(H) if None.
      is_causal: whether a query sees no key behind its own; must be True under 'vulkan'.
      implementation: 'xla', 'vulkan', or None for what `vk_kernels.use` says, else 'xla'. 'xla' is JAX's own; 'vulkan'
        raises NoDeviceError without a device.

    Returns:
      The shape and dtype of query.

    Raises:
      ValueError: under 'vulkan', what the kernels do not do.
    """
    only_xla = {
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
    }
    if target_of(implementation) is None:
        options = {"scale": scale, "is_causal": is_causal, "implementation": "xla"}
        return jax.nn.dot_product_attention(query, key, value, **only_xla, **options)
    given = [name for name, option in only_xla.items() if option is not None]
    if given or not is_causal:
        found = f"found {', '.join(given)}" if given else "found is_causal=False"
        raise ValueError(
            "dot_product_attention: the Vulkan kernels do causal attention (is_causal=True) without "
            f"{', '.join(only_xla)}; {found}: take implementation='xla'"
        )
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if query.ndim not in (3, 4) or not query.shape == key.shape == value.shape:
        raise ValueError(
            "dot_product_attention: the Vulkan kernels take query, key and value of one shape, (B, T, N, H) or "
            f"(T, N, H), found {query.shape}, {key.shape} and {value.shape}"
        )
    batched = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    return attention(*batched, scale=scale, implementation=implementation).reshape(query.shape)
