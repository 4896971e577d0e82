"""Checks a config before any work is done: names of settings, where a typo is answered with a suggestion, their values,
and what goes with what.

`FIELDS` is the one table of all settings: kind, range and meaning. What a setting must be is said there and nowhere
else; `validate` adds what several settings must be to each other.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from gpt_jax.errors import UserError

BACKENDS = ("auto", "xla", "vulkan")
DTYPES = ("float32", "bfloat16")
SHARDS = ("replicated", "fsdp")
PRECISIONS = ("highest", "high", "default")
TARGETS = ("all", "assistant")
TOOL_CALLS = ("text", "refuse")
TRACKERS = ("none", "wandb", "trackio", "mlflow")
ON_ERROR = ("stop", "skip")

_INT32 = 2**31 - 1  # steps and sizes are int32 on every device
_UINT32 = 2**32 - 1  # what a seed of JAX and of Philox holds
_SMALLEST = float(np.finfo(np.float32).tiny)  # normal f32: a smaller number is 0 on devices that flush


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting of a config.

    kind: int, float, bool, str, or tuple for a sequence of texts. low, high: the ends of its range, both inside it
    but where `open_low` or `open_high` say otherwise; of texts, how many characters each has at least, and how many
    texts there are at most. choices: all texts that it can be; empty: any text. default: its value in a run that was
    saved before there was this setting; None: there always was. numbers: the sequence is of positive numbers.
    """

    kind: type
    meaning: str  # one line, with the unit
    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    default: Any = None
    numbers: bool = False

    def from_json(self, value: Any) -> Any:
        """The value of this setting's kind, of which JSON made a list (a tuple) or an int (a whole float)."""
        converts = {tuple: list, float: int}.get(self.kind)
        return self.kind(value) if type(value) is converts else value

    def problem(self, value: Any) -> str:
        """'must be ..., found ...' for a value that this setting cannot have, else nothing."""
        check = {int: self._whole, float: self._number, bool: self._flag, str: self._text, tuple: self._texts}
        return check[self.kind](value)

    def _whole(self, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high:
            return ""
        return f"must be a whole number from {self.low} to {self.high}, found {_show(value)}"

    def _number(self, value: Any) -> str:
        """Counts as the f32 that the device will see."""

        def inside(number: float) -> bool:
            above = number > self.low or (number == self.low and not self.open_low)
            return above and (number < self.high or (number == self.high and not self.open_high))

        interval = f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        wanted = f"must be a number in {interval}, found {_show(value)}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            return wanted
        seen = _as_float32(value)
        if inside(seen) and (seen != 0 or value == 0):
            return ""
        return f"{wanted}, which is {seen:g} in float32" if inside(value) else wanted

    def _flag(self, value: Any) -> str:
        return "" if isinstance(value, bool) else f"must be True or False, found {_show(value)}"

    def _text(self, value: Any) -> str:
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}; found {_show(value)}"
        return text_problem(value)

    def _texts(self, value: Any) -> str:
        if self.numbers:
            return self._numbers(value)
        if not isinstance(value, tuple | list):
            return f"must be a list of texts, found {_show(value)}"
        if len(value) > self.high:
            return f"must be {self.high} texts at most, found {len(value)}"
        short = f"must be text of {self.low} or more characters, found "
        problems = (text_problem(text) or (short + _show(text) if len(text) < self.low else "") for text in value)
        return next((f"[{i}] {problem}" for i, problem in enumerate(problems) if problem), "")

    def _numbers(self, value: Any) -> str:
        if not isinstance(value, tuple | list):
            return f"must be a list of numbers, found {_show(value)}"
        one = Field(float, "", open_low=True, open_high=True)
        return next((f"[{i}] {problem}" for i, number in enumerate(value) if (problem := one.problem(number))), "")


def text_problem(value: Any) -> str:
    """'must be ..., found ...' for what cannot be written as UTF-8 or handed to the system, else nothing."""
    if not isinstance(value, str):
        return f"must be text, found {_show(value)}"
    bad = next((character for character in value if character == "\0" or "\ud800" <= character <= "\udfff"), "")
    return f"must be text in UTF-8, found {bad!a} in it" if bad else ""


def _whole(meaning: str, low: int = 1, high: int = _INT32, **more: Any) -> Field:
    return Field(int, meaning, low, high, **more)


def _number(meaning: str, **ends: Any) -> Field:
    return Field(float, meaning, **{"open_high": True} | ends)


def _closed(meaning: str, **ends: Any) -> Field:
    return Field(float, meaning, **ends)


def _choice(meaning: str, choices: tuple[str, ...], **more: Any) -> Field:
    return Field(str, meaning, choices=choices, **more)


def _texts(meaning: str, **more: Any) -> Field:
    return Field(tuple, meaning, low=1, high=64, default=(), **more)


_EVERY = "steps between two, and once at the end; 0: never"

FIELDS: dict[str, Field] = {
    "name": Field(str, "what the run is called"),
    "domain": Field(str, "what its texts are about"),
    "seed": _whole("of every random choice", 0, _UINT32),
    "backend": _choice("what the steps run on", BACKENDS),
    "devices": Field(str, "devices of this host: empty: one; all, the first N, or their numbers as 0,1", default=""),
    "distributed": Field(str, "processes: empty: those of this host; auto, or HOST:PORT,PROCESSES,ID", default=""),
    "shard": _choice("how devices hold parameters and optimizer", SHARDS, default="replicated"),
    "exchange_dtype": _choice("of gradients between Vulkan devices, added up in float32", DTYPES, default="float32"),
    "matmul_precision": _choice("of f32 products on XLA", PRECISIONS),
    "num_steps": _whole("updates in all"),
    "batch_size": _whole("sequences a step"),
    "accumulate_steps": _whole("parts that a batch is computed in"),
    "max_skipped_steps": _whole("non-finite steps in a row before the run stops"),
    "init_from": Field(str, "run or checkpoint whose parameters to start from; empty: fresh ones"),
    "model.vocab_size": _whole("tokens that it knows"),
    "model.block_size": _whole("tokens that it sees at once"),
    "model.num_layers": _whole("transformer blocks"),
    "model.num_heads": _whole("attention heads of a block"),
    "model.embed_dim": _whole("width of the residual stream"),
    "model.mlp_dim": _whole("width of a block's MLP; 0: 4 embed_dim", 0, default=0),
    "model.norm_epsilon": _number("of layer norms, added to the variance", open_low=True, default=1e-5),
    "model.dropout_rate": _number("share of elements dropped", high=1),
    "model.soft_cap": _number("of attention scores; 0: off"),
    "model.use_bias": Field(bool, "whether linear layers have one"),
    "model.tie_head": Field(bool, "whether the output layer is the token embedding"),
    "model.dtype": _choice("of matrix products and activations", DTYPES),
    "model.remat": Field(bool, "whether layers are computed again in the backward pass"),
    "optimizer.learning_rate": _number("at the end of the warm-up", open_low=True),
    "optimizer.min_learning_rate": _number("at the start, and from decay_steps on"),
    "optimizer.warmup_steps": _whole("updates of the linear rise", 0),
    "optimizer.decay_steps": _whole("update at which the cosine reaches the minimum; 0: the last one", 0),
    "optimizer.b1": _number("decay of the mean of gradients, an update", high=1),
    "optimizer.b2": _number("decay of the mean of squared gradients, an update", high=1),
    "optimizer.epsilon": _number("added to the root of the mean square", open_low=True),
    "optimizer.weight_decay": _number("times the learning rate, an update"),
    "optimizer.decay_matrices_only": Field(bool, "whether biases and scales are left out of the decay"),
    "optimizer.clip_norm": _number("largest norm of the whole gradient", open_low=True),
    "optimizer.frozen": _texts("patterns of the parameters that are not trained"),
    "optimizer.layer_decay": _closed(
        "factor of the rate, a layer away from the output", high=1, open_low=True, default=1.0
    ),
    "optimizer.rates": _texts("PATTERN=FACTOR of the learning rate, by parameter"),
    "lora.rank": _whole("of the adapters beside the linear layers; 0: none, all parameters are trained", 0, default=0),
    "lora.alpha": _number("what an adapter's output is multiplied by, times the rank", open_low=True, default=16.0),
    "lora.dropout": _number("share of an adapter's input dropped", high=1, default=0.0),
    "lora.targets": Field(tuple, "all, or patterns of linear layers that get adapters", 1, 64, default=("all",)),
    "data.source": Field(str, "default, a file, a folder, or hf:NAME[:SPLIT]"),
    "data.mixture": Field(tuple, "sources in place of data.source", low=1, default=()),
    "data.weights": Field(tuple, "their shares in what is trained on; empty: equal ones", numbers=True, default=()),
    "data.validation": Field(str, "a source of its own to validate on; empty: a share of the others", default=""),
    "data.validation_fraction": _number("share of the sources kept for validation", high=1, open_low=True),
    "data.tokenizer": Field(str, "a tokenizer.json; empty: that of init_from, else train one; new: train one"),
    "data.tool_calls": _choice("whether calls of tools are read as text", TOOL_CALLS, default="text"),
    "data.on_error": _choice("what a bad row or dialogue is answered with", ON_ERROR, default="stop"),
    "data.targets": _choice("what the loss counts", TARGETS),
    "data.cache_dir": Field(str, "folder of the tokens; empty: ~/.cache/gpt_jax"),
    "data.prefetch": _whole("batches made ahead"),
    "eval.every": _whole(_EVERY, 0),
    "eval.batches": _whole("batches of an evaluation"),
    "eval.patience": _whole("evaluations without a lower loss before the run ends; 0: any number", 0, default=0),
    "sample.every": _whole(_EVERY, 0),
    "sample.temperature": _number("of the softmax; 0: the likeliest token"),
    "sample.top_k": _whole("likeliest tokens to draw from; 0: all", 0),
    "sample.top_p": _closed(
        "share of the probability to draw from, likeliest first; 1: all", high=1, open_low=True, default=1.0
    ),
    "sample.min_p": _closed("share of the largest probability that a token needs; 0: none", high=1, default=0.0),
    "sample.repetition_penalty": _number(
        "what tokens seen are made less likely by; 1: none", open_low=True, default=1.0
    ),
    "sample.presence_penalty": _closed(
        "taken off the logits of tokens generated; 0: none", low=-2, high=2, default=0.0
    ),
    "sample.frequency_penalty": _closed("the same, each time that they were; 0: none", low=-2, high=2, default=0.0),
    "sample.max_tokens": _whole("tokens of an answer at most"),
    "sample.stop": _texts("texts that end an answer, of which they are no part"),
    "sample.prompts": Field(tuple, "questions to answer"),
    "checkpoint.every": _whole("steps between two; 0: only at the end and when stopped", 0),
    "checkpoint.keep_last": _whole("newest checkpoints kept"),
    "checkpoint.keep_every": _whole("steps whose multiples are kept for good; 0: none", 0),
    "vulkan.submit_ms": _number(
        "most that a submission of a step may take, in ms; 0: a step is one submission", default=0.0
    ),
    "log.every": _whole("steps between two lines of progress; 0: none", 0),
    "log.diagnostics_every": _whole(_EVERY, 0),
    "log.tensorboard": Field(bool, "whether TensorBoard's files are written"),
    "log.tracker": _choice("service that shows the run too", TRACKERS, default="none"),
    "log.webhook": Field(str, "URL that alerts are posted to, or $NAME of a variable with it; empty: none", default=""),
    "log.profile_step": _whole("first step of the profile; 0: none", 0),
    "log.profile_steps": _whole("steps of the profile"),
}

GROUPS = tuple(dict.fromkeys(name.partition(".")[0] for name in FIELDS if "." in name))


def validate(config: Mapping[str, Any]) -> None:
    """Raises UserError, in one line, for a value that is impossible by itself or contradicts another."""
    values = check_names(config)
    for name, value in values.items():
        check(name, value)
    _check_pairs(values)
    _check_adapters(values)


def _check_pairs(values: Mapping[str, Any]) -> None:
    """Raises UserError for two values that contradict each other."""

    def require(condition: bool, message: str, *names: str) -> None:
        if not condition:
            raise UserError(f"config.{message}, found {' and '.join(str(values[name]) for name in names)}")

    require(
        values["model.embed_dim"] % values["model.num_heads"] == 0,
        "model.embed_dim must be a multiple of num_heads",
        *("model.embed_dim", "model.num_heads"),
    )
    require(
        values["batch_size"] % values["accumulate_steps"] == 0,
        "batch_size must be a multiple of accumulate_steps",
        *("batch_size", "accumulate_steps"),
    )
    mixture, weights = values["data.mixture"], values["data.weights"]
    require(
        len(weights) in (0, len(mixture)),
        "data.weights must be as many as data.mixture has sources, or none",
        *("data.mixture", "data.weights"),
    )
    require(
        not mixture or values["data.source"] in ("", "default"),
        "data.source must stay 'default' where data.mixture is given: put it into the mixture",
        *("data.source", "data.mixture"),
    )
    require(
        values["eval.patience"] == 0 or values["eval.every"] > 0,
        "eval.patience needs evaluations: config.eval.every must not be 0",
        *("eval.patience", "eval.every"),
    )
    require(
        values["optimizer.min_learning_rate"] <= values["optimizer.learning_rate"],
        "optimizer.min_learning_rate must not exceed learning_rate",
        *("optimizer.min_learning_rate", "optimizer.learning_rate"),
    )
    require(
        values["optimizer.decay_steps"] == 0 or values["optimizer.warmup_steps"] < values["optimizer.decay_steps"],
        "optimizer.warmup_steps must be below decay_steps, where the schedule ends",
        *("optimizer.warmup_steps", "optimizer.decay_steps"),
    )
    require(
        values["lora.rank"] <= values["model.embed_dim"],
        "lora.rank must not exceed model.embed_dim, the smaller side of the matrices that it adapts",
        *("lora.rank", "model.embed_dim"),
    )


def _check_adapters(values: Mapping[str, Any]) -> None:
    """Raises UserError where adapters have nothing that they could stand beside."""
    if values["lora.rank"] and not values["init_from"]:
        raise UserError(
            f"config.lora.rank is {values['lora.rank']}, and config.init_from is empty: adapters stand beside a model "
            "that was trained, so say which, --config.init_from=RUN"
        )


def check(name: str, value: Any, called: str = "") -> None:
    """Raises UserError for a value that the setting `name` cannot have; `called`: as the user knows it."""
    if problem := FIELDS[name].problem(value):
        called = called or f"config.{name}"
        raise UserError(f"{called}{problem}" if problem.startswith("[") else f"{called} {problem}")


def check_saved(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a config that a run saved and that no model can be made of.

    The settings of other versions of this program, more or fewer, are no mistake, but for the model's: each of those
    says how its parameters are to be used.
    """
    values = dict(leaves(config))
    for name in _NEEDED:
        if name not in values:
            raise UserError(f"{file} lacks {name}: put back a good copy")
    for name, value in values.items():
        if name in FIELDS:
            check(name, value, called=f"{file}: {name}")
        elif name.startswith("model."):
            raise UserError(f"{file}: this program knows no {name}: a newer one wrote it, use that one")
    width, heads = values["model.embed_dim"], values["model.num_heads"]
    if width % heads:
        raise UserError(f"{file}: model.embed_dim must be a multiple of num_heads, found {width} and {heads}")


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by dotted name, of a config that a run saved: what its version did not have yet is the default.

    A setting that every version has is None where it lacks it. What this version does not have is left out.
    """
    values = dict(leaves(saved))
    return {name: field.from_json(values.get(name, field.default)) for name, field in FIELDS.items()}


_NEEDED = (  # to sample from a run
    *("model.vocab_size", "model.block_size", "model.num_layers", "model.num_heads", "model.embed_dim"),
    *("sample.temperature", "sample.top_k", "sample.max_tokens", "backend", "matmul_precision"),
)


def check_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted name; raises UserError for a setting too many or too few."""
    values = dict(leaves(config))
    for name, value in values.items():
        if name in GROUPS:
            raise UserError(f"config.{name} must be a group of settings, found {_show(value)}")
        check_name(name)
    if missing := [name for name in FIELDS if name not in values]:
        names = ", ".join(f"config.{name}" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"the config lacks {names}: start from configs/chat.py, which has all settings")
    return values


def check_name(name: str) -> None:
    """Raises UserError, with the nearest name, for what is not a setting of a config."""
    if name in FIELDS:
        return
    if name in GROUPS:
        members = _some(other for other in FIELDS if other.startswith(f"{name}."))
        raise UserError(f"config.{name} is a group of settings: give one of it ({members})")
    ending = name.rpartition(".")[2]
    near = [other for other in FIELDS if other.rpartition(".")[2] == ending]
    near = near or difflib.get_close_matches(name, [*FIELDS, *GROUPS], n=1)
    near = near or [other for other in FIELDS if difflib.get_close_matches(ending, [other.rpartition(".")[2]])]
    group = [other for other in FIELDS if other.startswith(f"{name.partition('.')[0]}.")]
    listed = f"there are {_some(group or [*GROUPS, *(other for other in FIELDS if '.' not in other)], 20)}"
    raise UserError(f"there is no config.{name}: " + (f"did you mean config.{near[0]}?" if near else listed))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict by dotted name."""
    for name in tree:
        try:
            value = tree[name]
        except config_dict.RequiredValueError:
            raise UserError(f"config.{prefix}{name} has no value yet: give --config.{prefix}{name}=VALUE") from None
        if isinstance(value, Mapping | config_dict.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def types_of_fields() -> dict[str, Any]:
    """The types that JSON makes of the kinds of all settings, nested as a config is."""
    in_json = {int: (int, float), float: (int, float), bool: bool, str: str, tuple: list}
    types: dict[str, Any] = {group: {} for group in GROUPS}
    for name, field in FIELDS.items():
        group, _, last = name.rpartition(".")
        (types[group] if group else types)[last] = in_json[field.kind]
    return types


def _some(names: Iterable[str], count: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _show(value: Any) -> str:
    """A value in a message, short and in one line whatever it is."""
    try:
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception:  # an int of too many digits, or whatever a config file made
        shown = f"what cannot be shown, of type {type(value).__name__}"
    shown = " ".join(shown.split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _as_float32(value: float) -> float:
    """The f32 nearest to a number; 0 for one below the normal ones."""
    try:
        with np.errstate(all="ignore"):
            nearest = float(np.float32(value))
    except OverflowError:  # an int beyond every float
        return math.inf if value > 0 else -math.inf
    return 0.0 if abs(nearest) < _SMALLEST else nearest
