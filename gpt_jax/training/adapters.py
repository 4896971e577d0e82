"""A run of adapters: what of its state checkpoints hold, and how that becomes a whole state again.

The parameters beside which adapters stand change in no step. They are saved once, in the run's own folder and as this
run reads them (with the rows of the tokens where its tokenizer has them), so that it needs its donor no more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt_jax.checkpoint import ADAPTS, BASE, read_base, save_base
from gpt_jax.errors import UserError
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.lora import LoraConfig, is_adapter
from gpt_jax.model.parameters import MergeReport, check_parameters, listing
from gpt_jax.training.steps import TrainState
from gpt_jax.training.trainable import partition


def saved_part(state: TrainState, config: ConfigDict) -> TrainState:
    """The part of a state that its run's checkpoints hold: of its parameters, if it has any, the adapters alone."""
    if LoraConfig.from_config(config) is None:
        return state
    return state.replace(params=partition(state.params, is_adapter)[0])


def whole_state(saved: TrainState, position: Mapping[str, Any], params: Any, run: Path) -> TrainState:
    """The state of which `saved_part` made a part.

    Args:
      position: what was saved with it.
      params: the shapes of all parameters.
      run: the folder in which the base is.

    Raises:
      UserError: the base is missing, damaged or another one.
      StorageError: it cannot be read.
    """
    if ADAPTS not in position:
        return saved
    base = read_base(run, position[ADAPTS][BASE])
    check_parameters(base, partition(params, is_adapter)[1], str(run / BASE))
    leaves = named_leaves(base) | named_leaves(saved.params)
    whole = [jnp.asarray(leaves[name]) for name in named_leaves(params)]
    return saved.replace(params=jax.tree.unflatten(jax.tree.structure(params), whole))


def position_of_adapters(
    config: ConfigDict, state: TrainState, position: Mapping[str, Any] | None, run: Path
) -> dict[str, Any]:
    """The entry of adapters in the positions of a run's checkpoints, {} without any. Saves their base if it is new."""
    lora = LoraConfig.from_config(config)
    if lora is None:
        return {}
    saved = (position or {}).get(ADAPTS)
    base = saved[BASE] if saved else save_base(run, partition(state.params, is_adapter)[1])
    return {ADAPTS: {BASE: base, "scale": lora.scale}}


def check_donor_is_whole(report: MergeReport, positions: int, known: int) -> None:
    """Raises UserError if what adapters stand beside is not all of the donor: the rest would stay random.

    positions, known: how many the model has, and how many the donor.
    """
    if positions > known:
        raise UserError(
            f"config.model.block_size is {positions} and the donor's {known}: adapters (config.lora) leave embeddings "
            f"as they are, and new positions would stay random; give --config.model.block_size={known}"
        )
    lacking = [*report.mismatched, *(name for name in report.new if not is_adapter(name))]
    if lacking:
        raise UserError(
            f"config.lora trains adapters beside a whole model, and the donor has not all of it: {listing(lacking)} "
            "would stay random; give config.model the donor's shape, or train all parameters with --config.lora.rank=0"
        )
