"""Which parameters are trained, and at what share of the learning rate, by their names.

A name is the path that the parameter table prints, such as `h_0/qkv/kernel`. A pattern is a glob (`*`, `?`, `[0-3]`)
for a name or for a group of names: `h_0` and `h_[0-3]` are all that layers have, `*/bias` every bias. Of several
patterns the last that matches counts, and one with `!` before it takes back what others matched: `*`, `!head`, `!h_5`
is all but the output layer and layer 5.

Every name is looked at alone, so that a tree of parameters and a part of it have the same answers.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from gpt_jax.errors import UserError
from gpt_jax.leaf_names import name_of, named_leaves
from gpt_jax.model.lora import LoraConfig, is_adapter
from gpt_jax.model.parameters import listing

IsTrained = Callable[[str], bool]  # takes a parameter's name
RateOf = Callable[[str], float]  # the factor of the learning rate, by a parameter's name


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, without its `!`, is one of a parameter, or of a group that the parameter is in."""
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def is_selected(patterns: Iterable[str], name: str) -> bool:
    """Whether the last of the patterns that match a name selects it."""
    selected = False
    for pattern in patterns:
        if matches(pattern.removeprefix("!"), name):
            selected = not pattern.startswith("!")
    return selected


def all_trained(_: str) -> bool:
    """An `IsTrained`: every parameter is."""
    return True


def trained_parameters(config: ConfigDict) -> IsTrained:
    """The one place that says which parameters of a run are trained: of those with adapters, the adapters alone."""
    frozen, has_adapters = tuple(config.optimizer.frozen), LoraConfig.from_config(config) is not None
    return lambda name: not is_selected(frozen, name) and (is_adapter(name) or not has_adapters)


def rates_of_parameters(config: ConfigDict) -> RateOf:
    """The factor of the learning rate by name: the layer's share, times that of the last pattern that matches.

    Layer-wise decay counts from the output: `ln_f` and `head` have 1, the last block `layer_decay`, the one before it
    the square of that, and the embeddings one power more than the first block.

    Source: Clark et al., "ELECTRA" (ICLR 2020), appendix; Bao et al., "BEiT" (ICLR 2022).
    """
    decay, layers = config.optimizer.layer_decay, config.model.num_layers
    factors = rate_factors(config)

    def rate(name: str) -> float:
        factor = next((factors[pattern] for pattern in reversed(factors) if matches(pattern, name)), 1.0)
        return factor * decay ** _layers_above(name, layers)

    return rate


def rate_factors(config: ConfigDict) -> dict[str, float]:
    """The factors of `optimizer.rates` by pattern. Raises UserError for a text that is not PATTERN=FACTOR."""
    factors = {}
    for text in config.optimizer.rates:
        pattern, _, factor = text.rpartition("=")
        try:
            factors[pattern] = float(factor)
        except ValueError:
            factors[pattern] = -1.0
        if not pattern or not 0 < factors[pattern] < float("inf"):
            raise UserError(
                f"config.optimizer.rates: {text!r} is not PATTERN=FACTOR with a factor above 0, such as 'wte=0.1'; "
                "what is not to be trained goes into optimizer.frozen"
            )
    return factors


def check_patterns(config: ConfigDict, params: Any) -> None:
    """Raises UserError for a pattern that matches no parameter, or if no parameter is left to be trained."""
    names = list(named_leaves(params))
    patterns = {"frozen": [pattern.removeprefix("!") for pattern in config.optimizer.frozen]}
    patterns["rates"] = list(rate_factors(config))
    for setting, given in patterns.items():
        for pattern in given:
            if not any(matches(pattern, name) for name in names):
                raise UserError(
                    f"config.optimizer.{setting}: {pattern!r} matches no parameter: there are {_summary(names)}"
                )
    if not any(map(trained_parameters(config), names)):
        raise UserError(f"config.optimizer.frozen={tuple(config.optimizer.frozen)} leaves no parameter to be trained")


def partition(params: Any, is_trained: IsTrained) -> tuple[Any, Any]:
    """The parameters that are trained and those that are not: trees like `params`, with None for what the other has.

    JAX takes None for a tree without leaves, so that a gradient or an optimizer of the first knows nothing of the rest.
    """

    def keep(path: Any, leaf: Any, *, trained: bool) -> Any:
        return leaf if is_trained(name_of(path)) == trained else None

    by_name = jax.tree_util.tree_map_with_path
    trained, frozen = (by_name(functools.partial(keep, trained=choice), params) for choice in (True, False))
    return trained, frozen


def combine(trained: Any, frozen: Any) -> Any:
    """The parameters of which `partition` made two trees."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def by_layer(params: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level groups of parameters that have any: a group that is frozen is empty."""
    return {layer: group for layer, group in params.items() if jax.tree.leaves(group)}


def _summary(names: Iterable[str]) -> str:
    """The names outside the blocks, and those of one block for all."""
    names = list(names)
    blocks = sorted(
        {name.partition("/")[0] for name in names if name.startswith("h_")}, key=lambda block: int(block[2:])
    )
    shown = ", ".join(name for name in names if name.partition("/")[0] not in blocks[1:])
    return f"{shown}, and in {listing(blocks[1:])} as in {blocks[0]}" if blocks[1:] else shown


def _layers_above(name: str, layers: int) -> int:
    """How far below the output layer a parameter is: 0 for `ln_f` and `head`, `layers` + 1 for the embeddings."""
    group = name.partition("/")[0]
    if group.startswith("h_"):
        return layers - int(group[2:])
    return layers + 1 if group in ("wte", "wpe") else 0
