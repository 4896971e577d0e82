"""A run that answers: its tokenizer and defaults, and an engine with its parameters; for a chat or a server."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpt_jax.backend import Backend, check_heads, enter_backend, require_devices
from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import marker_ids, vocabulary_bytes
from gpt_jax.inference.conversation import Fitted, fit, room_for_answer
from gpt_jax.inference.decoder import Decoder
from gpt_jax.inference.engine import Engine, Request
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.inference.sampling import MOST_ALTERNATIVES, SamplingOptions
from gpt_jax.inference.text_stream import TextStream
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.runs.find import find_run, find_step


@dataclass
class ServedRun:
    """A run and the engine that answers for it.

    name: of its folder. description: which checkpoint answers. backend: what it runs on, as text. vocabulary: the bytes
    of each token that the model knows. block_size: tokens that the model sees at once. defaults: how the run's own
    samples are drawn. put: parameters to the device, in the engine's thread.
    """

    name: str
    description: str
    workdir: Path
    backend: str
    tokenizer: Tokenizer
    vocabulary: list[bytes]
    block_size: int
    defaults: SamplingOptions
    engine: Engine
    put: Callable[[Any], Any]

    def request(self, turns: Sequence[Turn], system: str, options: SamplingOptions) -> tuple[Request, Fitted]:
        """The request for the answer to a conversation, whose last turn is the user's, and what fitted of it.

        Raises:
          TooLong: its last turn does not fit into the block.
        """
        room = room_for_answer(options.max_tokens, self.block_size)
        fitted = fit(self.tokenizer, turns, system, block_size=self.block_size, room=room)
        return Request(fitted.tokens, options, marker_ids(self.tokenizer)), fitted

    def load_step(self, step: str) -> str:
        """Takes the parameters of another checkpoint of the run, 'best', 'latest' or a step; returns which that is.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        _, params, _, description = load_for_sampling(self.workdir, find_step(self.workdir, step))

        def load(decoder: Decoder) -> None:
            decoder.load(self.put(params))
            self.description = description  # here, so that it is right whatever interrupts the wait

        self.engine.run(load)
        return description

    def warm_up(self) -> None:
        """Compiles the programs that prompts of any length and any number of texts need, also with alternatives.

        One task each: an interrupt waits for the one that is being compiled.
        """
        decoder: Decoder = self.engine.run(lambda decoder: decoder)  # what is read of it here never changes

        def decode(slot: int, length: int, alternatives: int) -> None:
            def task(decoder: Decoder) -> None:
                decoder.insert(slot, [0] * length, SamplingOptions(seed=0, max_tokens=1, logprobs=alternatives))
                decoder.decode()
                decoder.release(slot)

            self.engine.run(task)

        for rows in decoder.batches:
            for alternatives in (0, MOST_ALTERNATIVES):
                decode(rows - 1, 1, alternatives)
        length = 1
        while length < self.block_size:
            length = min(decoder.prefill_width(length) + 2, self.block_size)  # the first that takes a longer prefill
            decode(0, length, 0)


def open_run(
    name: str,
    stack: contextlib.ExitStack,
    *,
    backend: str = "",
    slots: int = 1,
    max_waiting: int = 1,
) -> ServedRun:
    """Opens the run that a name stands for, see `find_run`, until `stack` is closed. Nothing of its folder is written.

    Args:
      backend: instead of the config's.
      slots: texts in one batch.
      max_waiting: requests that may wait for a slot.

    Raises:
      UserError: there is no such run, or no such backend.
    """
    require_devices()
    found = find_run(name)
    config, params, tokenizer, description = load_for_sampling(*found)
    vocabulary = vocabulary_bytes(tokenizer, config.model.vocab_size)
    opened: list[Backend] = []

    def open_decoder(inner: contextlib.ExitStack) -> Any:
        entered = enter_backend(backend or config.backend, config.matmul_precision, inner)
        check_heads(config.model, entered)
        opened.append(entered)
        model = GPT(ModelConfig.from_config(config.model))
        return Decoder(model, entered.put(params), entered, slots=slots)

    engine = Engine(open_decoder, lambda stop: TextStream(vocabulary, stop), max_waiting=max_waiting)
    stack.enter_context(engine)
    return ServedRun(
        name=found.workdir.resolve().name,
        description=description,
        workdir=found.workdir,
        backend=str(opened[0]),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        block_size=config.model.block_size,
        defaults=SamplingOptions.from_config(config),
        engine=engine,
        put=opened[0].put,
    )
