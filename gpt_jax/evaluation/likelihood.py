"""The likelihood of text: loss, perplexity and bits per byte, of all of it, by source."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_jax.data.batches import MASKED
from gpt_jax.data.dialogue import Dialogue, Part
from gpt_jax.evaluation.encoding import Encoding
from gpt_jax.evaluation.scorer import Scorer
from gpt_jax.evaluation.windows import Window, WindowCutter


def exponential(nats: float) -> float:
    """e to the power of a loss; infinity beyond every float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@dataclass
class Likelihood:
    """Sums over the targets of a source.

    documents: dialogues or texts. tokens: targets. nats: the sum of their losses. text_bytes, text_nats: of the targets
    that are text, no markers.
    """

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    text_bytes: int = 0
    text_nats: float = 0.0

    def add(self, window: Window, losses: np.ndarray, bytes_of: np.ndarray) -> None:
        """Adds the targets of a window; bytes_of: see `Encoding`."""
        counted = window.targets != MASKED
        nats, size = losses[counted].astype(np.float64), bytes_of[window.targets[counted]]
        self.tokens += int(counted.sum())
        self.nats += float(nats.sum())
        self.text_bytes += int(size.sum())
        self.text_nats += float(nats[size > 0].sum())

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def loss(self) -> float:
        """Nats a target; NaN where there is none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return exponential(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text; NaN where there is none."""
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        derived = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {**vars(self), **derived}


def measure(
    texts: Iterable[tuple[str, Dialogue]],
    encoding: Encoding,
    scorer: Scorer,
    *,
    stride: int,
    targets: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Likelihood]:
    """The likelihood of texts, (source, text) each, by source, in the order in which sources appear.

    The texts of a source are one stream, as in training, and a window may hold several; no window spans two sources.

    Args:
      stride: see `windows`.
      targets: what counts: 'all', or 'assistant'.
      progress: takes the number of tokens scored so far, after each window.
    """
    found: dict[str, Likelihood] = {}

    def windows() -> Iterator[Window]:
        cutters: dict[str, WindowCutter] = {}
        for source, text in texts:
            if source not in cutters:
                cutters[source] = WindowCutter(source, encoding.start, scorer.block_size, stride)
                found[source] = Likelihood()
            found[source].documents += not isinstance(text, Part)
            yield from cutters[source].add(*encoding.dialogue(text, targets))
        for cutter in cutters.values():
            yield from cutter.finish()

    scored = 0
    for window, losses in scorer.losses(windows(), scorer.block_size):
        found[window.source].add(window, losses, encoding.bytes_of)
        scored += len(losses)
        progress(scored)
    return found
