"""A run that answers without a model: its tokenizer is real, its texts are written beforehand."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fake_decoder import BLOCK, FakeDecoder, make_tokenizer

from gpt_jax.data.tokenizer import vocabulary_bytes
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.served_run import ServedRun
from gpt_jax.inference.text_stream import TextStream

TOKENIZER = make_tokenizer()
VOCABULARY = vocabulary_bytes(TOKENIZER, TOKENIZER.get_vocab_size())
DEFAULTS = SamplingOptions(temperature=0.5, max_tokens=60)


@contextlib.contextmanager
def stub_run(say: Callable[[str, Any], str], max_waiting: int = 100, **options: Any) -> Iterator[tuple]:
    made: list[FakeDecoder] = []

    def open_decoder(stack):
        made.append(FakeDecoder(TOKENIZER, say, **options))
        return made[0]

    with Engine(open_decoder, lambda stop: TextStream(VOCABULARY, stop), max_waiting=max_waiting) as engine:
        yield (
            ServedRun(
                name="tiny",
                description="a stub",
                workdir=Path("nowhere"),
                backend="none",
                tokenizer=TOKENIZER,
                vocabulary=VOCABULARY,
                block_size=BLOCK,
                defaults=DEFAULTS,
                engine=engine,
                put=lambda params: params,
            ),
            made[0],
        )
