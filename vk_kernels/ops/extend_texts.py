"""The next token of each text, and the text with it: `draw_tokens` and all that has to be noted of a token, at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from vk_kernels.bridge.primitive import make_primitive, vary_alike
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.ops.draw_tokens import (
    CONTROL_TYPES,
    GENERATED,
    LANES,
    Controls,
    Drawn,
    draw_tokens_reference,
    takes_wide_kernel,
)
from vk_kernels.ops.planning import copy_dispatch, dispatch, dtype_suffix, operands_of, planner, require_plain
from vk_kernels.ops.public import check_arrays, public
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Plan, Update

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo

UNDRAWN = -1  # in the place of a token where a text had ended


class Texts(NamedTuple):
    """Texts that grow, a row each.

    tokens, positions: int32 (B,), the last token and its place. left: int32 (B,), tokens that are still to be drawn; 0
    where a text has ended. seen: int32 (B or more, V), as `draw_tokens` takes it; rows beyond are left alone.
    """

    tokens: jax.Array
    positions: jax.Array
    left: jax.Array
    seen: jax.Array


def extend_texts_reference(
    logits: jax.Array, texts: Texts, ends: jax.Array, seeds: jax.Array, controls: Controls
) -> tuple[Drawn, Texts]:
    """Draws the token behind each text's last one, and takes it in.

    Args:
      logits: f32 or bf16 (B, V). seeds: uint32 (B,). controls: as `draw_tokens` takes them.
      ends: int32 (B, E): tokens that end a text; what is no token ends none.

    Returns:
      What was drawn, with UNDRAWN for a token where the text had ended before; and the texts. One that ends keeps its
      last token and place. Under `vk_kernels.jit` `seen` is written where it lies, if it is donated, or made there.
    """
    rows, logits = len(logits), logits.astype(jnp.float32)
    tokens, logprobs = draw_tokens_reference(logits, texts.seen[:rows], seeds, texts.positions + 1, controls)
    is_end = (ends == tokens[:, None]).any(axis=1)
    left = jnp.where((texts.left > 0) & ~is_end, texts.left - 1, 0)
    goes_on = left > 0
    extended = Texts(
        tokens=jnp.where(goes_on, tokens, texts.tokens),
        positions=texts.positions + goes_on.astype(jnp.int32),
        left=left,
        seen=jnp.asarray(texts.seen).at[jnp.arange(rows, dtype=jnp.int32), tokens].add(GENERATED),
    )
    return Drawn(jnp.where(texts.left > 0, tokens, UNDRAWN), logprobs), extended


@planner
def plan_extend_texts(
    info: "DeviceInfo", inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec], *, variant: str | None = None
) -> Plan:
    """inputs: logits, those of Texts, ends, seeds, those of Controls; outputs: those of Drawn, then of Texts.

    Raises:
      ValueError: rows without a token.
    """
    require_plain(variant)
    (logits, last, positions, left, seen, ends, seeds, *controls), made, _ = operands_of(inputs, outputs)
    tokens, logprobs, new_last, new_positions, new_left, counted = made
    rows, columns = inputs[logits].shape
    if rows == 0:
        return Plan(())
    if columns == 0:
        raise ValueError(f"logits must be of a token or more, found {inputs[logits]}")
    kind = dtype_suffix(inputs[logits])
    is_wide = takes_wide_kernel(info, f"draw_tokens.extend_wide_{kind}")
    run = dispatch(
        "draw_tokens",
        f"extend_{'wide' if is_wide else 'small'}_{kind}",
        rows,
        constants={"rows": rows, "columns": columns, "most_ends": inputs[ends].shape[1]},
        subgroup_size=LANES if is_wide else None,
        logits=logits,
        seen=counted,
        seeds=seeds,
        positions=positions,
        **dict(zip(Controls._fields, controls, strict=True)),
        tokens=tokens,
        logprobs=logprobs,
        last=last,
        left=left,
        ends=ends,
        counted=counted,
        new_last=new_last,
        new_positions=new_positions,
        new_left=new_left,
    )
    copied = copy_dispatch(inputs[seen], seen, counted)
    return Plan((copied, run), updates=(Update(seen, counted - tokens, copy=0),))


def _reference_of_operands(logits, tokens, positions, left, seen, ends, seeds, *controls):
    texts = Texts(tokens, positions, left, seen)
    drawn, texts = extend_texts_reference(logits, texts, ends, seeds, Controls(*controls))
    return *drawn, *texts


_extend_texts_primitive = make_primitive("extend_texts", _reference_of_operands, KernelOp(plan_extend_texts))


@public(extend_texts_reference)
def extend_texts(target, logits, texts, ends, seeds, controls):
    if jnp.ndim(logits) != 2 or jnp.ndim(ends) != 2:
        raise ValueError(
            f"extend_texts: logits must be (B, V) and ends (B, E), found {jnp.shape(logits)} and {jnp.shape(ends)}"
        )
    rows = jnp.shape(logits)[:1]
    of_rows = {name: (value, rows, CONTROL_TYPES[name]) for name, value in controls._asdict().items()}
    of_texts = {name: (value, rows, jnp.int32) for name, value in texts._asdict().items() if name != "seen"}
    check_arrays(
        "extend_texts",
        logits=(logits, jnp.shape(logits), jnp.bfloat16 if logits.dtype == jnp.bfloat16 else jnp.float32),
        seen=(texts.seen, (max(len(texts.seen), *rows), *jnp.shape(logits)[1:]), jnp.int32),
        ends=(ends, (*rows, jnp.shape(ends)[1]), jnp.int32),
        seeds=(seeds, rows, jnp.uint32),
        **of_texts,
        **of_rows,
    )
    tokens, logprobs, *extended = _extend_texts_primitive.bind(
        *vary_alike(logits, *texts, ends, seeds, *controls), target=target
    )
    return Drawn(tokens, logprobs), Texts(*extended)
