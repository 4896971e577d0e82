"""How tokens are drawn: the options of one text, their checks, and the draw of a batch from arrays of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import FIELDS, Field
from gpt_jax.errors import UserError
from vk_kernels.ops import Controls, Texts, extend_texts
from vk_kernels.ops.draw_tokens import IN_PROMPT, log_probabilities

MOST_ALTERNATIVES = 20  # of a token, as in OpenAI's API
IMPOSSIBLE = -9999.0  # the log-probability of a token that cannot be, as OpenAI has it: JSON knows no infinity

_CHOICE = 0x9E3779B9  # between the seeds of one request's texts: odd, so that none is met twice

_IN_CONFIG = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "stop"),
)
OPTION_FIELDS: dict[str, Field] = {
    **{name: FIELDS[f"sample.{name}"] for name in _IN_CONFIG},
    "seed": FIELDS["seed"],
    "logprobs": Field(int, "likeliest tokens to tell the log-probabilities of, at each place", 0, MOST_ALTERNATIVES),
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Settings of how one text is drawn and where it ends. The defaults draw from the model's own distribution.

    What each is, and may be, is said once, in `OPTION_FIELDS`. seed: None draws another text each time.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int = 0

    def check(self, called: str = "{}") -> None:
        """Raises UserError, in one line, for a value that is impossible.

        called: the name of an option as the user knows it, from its name here: '--{}', say.
        """
        for name, value in vars(self).items():
            if name == "seed" and value is None:
                continue
            if problem := OPTION_FIELDS[name].problem(value):
                space = "" if problem.startswith("[") else " "
                raise UserError(f"{called.format(name)}{space}{problem}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SamplingOptions":
        """The options of `config.sample`; those that an older run does not know have their defaults."""
        sample = config["sample"]
        found = {name: sample[name] for name in _IN_CONFIG if name in sample}
        return cls(**found | {"stop": tuple(found.get("stop", ()))})


class Draw(NamedTuple):
    """A token of each text.

    tokens: int32 (B,). logprobs: f32 (B,). top_tokens: int32 (B, K), likeliest first. top_logprobs: f32 (B, K).
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def make_controls(options: Sequence[SamplingOptions]) -> Controls:
    """The arrays, (B,), that `draw_next` takes, of a text each."""
    kinds = {name: np.int32 if name == "top_k" else np.float32 for name in Controls._fields}
    return Controls(*(np.array([getattr(each, name) for each in options], kinds[name]) for name in kinds))


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several texts for one prompt; that of choice 0 is the seed itself."""
    return (seed + choice * _CHOICE) % 2**32


def finite(logprob: float) -> float:
    """A log-probability as a number of JSON."""
    return max(float(logprob), IMPOSSIBLE)


def seen_in_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """`seen`, int32 (B, vocab_size), of `Texts`, before the first token is drawn."""
    seen = np.zeros((len(prompts), vocab_size), np.int32)
    for row, prompt in zip(seen, prompts, strict=True):
        row[np.asarray(prompt, np.int64)] = IN_PROMPT
    return seen


def draw_next(
    logits: jax.Array,
    texts: Texts,
    ends: jax.Array,
    seeds: jax.Array,
    controls: Controls,
    alternatives: int = 0,
) -> tuple[Draw, Texts]:
    """Draws the token behind each text's last one, and takes it in: see `ops.extend_texts`.

    Args:
      logits: (B, V), of the model, in its dtype.
      seeds: uint32 (B,). The random bits are a function of the seed, the token's place in its text and its id alone.
      controls: of `make_controls`.
      alternatives: K, how many of the likeliest tokens to give; it decides the shapes of the results.

    The log-probabilities are of the model's own distribution, the softmax of the logits before penalties, temperature
    and cuts: vLLM's default (logprobs_mode 'raw_logprobs'), and what clients of OpenAI's API use them for. So the
    token drawn need not be among the likeliest ones.
    """
    drawn, texts = extend_texts(logits, texts, ends, seeds, controls)
    if not alternatives:
        none = (drawn.tokens.shape[0], 0)
        return Draw(*drawn, jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32)), texts
    top_logprobs, top_tokens = jax.lax.top_k(log_probabilities(logits.astype(jnp.float32)), alternatives)
    return Draw(*drawn, top_tokens, top_logprobs), texts
