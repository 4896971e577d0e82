"""Text from a trained model: continuations of prompts, and answers in conversations, by a `Decoder`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import encode_prompt, marker_ids, vocabulary_bytes
from gpt_jax.inference.conversation import room_for_answer
from gpt_jax.inference.decoder import Decoder, Piece
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.text_stream import TextStream


class Sample(NamedTuple):
    """The model's answer to one prompt."""

    text: str
    tokens: int  # generated, the end marker included
    ended: bool  # by the model itself or a stop string, not by the limit


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Sequence[SamplingOptions],
    *,
    end_tokens: Sequence[int] = (),
) -> Iterator[tuple[int, Piece]]:
    """Continues each prompt (token ids) as its options say, as many at a time as the decoder has free slots.

    Yields the number of a prompt and what its text has gained, whenever that is something, up to the piece with a
    reason. Closing the iterator frees the slots; so does sending True, for the text of the last piece.
    """
    width = max(map(len, prompts), default=0)
    waiting, running = list(range(len(prompts)))[::-1], {}
    try:
        while waiting or running:
            for slot in decoder.free_slots[: len(waiting)]:
                number = waiting.pop()
                decoder.insert(slot, prompts[number], options[number], end_tokens=end_tokens, width=width)
                running[slot] = number
            for slot, piece in decoder.decode(ahead=not waiting).items():
                stopped = yield running[slot], piece
                if piece.reason or stopped:
                    decoder.release(slot)
                    del running[slot]
    finally:
        for slot in running:
            decoder.release(slot)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Sequence[SamplingOptions],
    *,
    end_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """The new tokens of each prompt: see `stream`. A text that reaches the block ends there."""
    texts: list[list[int]] = [[] for _ in prompts]
    for number, piece in stream(decoder, prompts, options, end_tokens=end_tokens):
        texts[number] += piece.tokens
    return texts


def answer(
    decoder: Decoder,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Turn]],
    options: Sequence[SamplingOptions],
) -> list[Sample]:
    """The assistant's next turn in each conversation, whose last turn is the user's.

    Of one that is too long for the block, the last tokens are kept; `conversation.fit` does better with several turns.
    """
    block = decoder.config.block_size
    prompts = [
        encode_prompt(tokenizer, turns)[room_for_answer(each.max_tokens, block) - block :]
        for turns, each in zip(conversations, options, strict=True)
    ]
    vocabulary = vocabulary_bytes(tokenizer, decoder.config.vocab_size)
    texts = [TextStream(vocabulary, each.stop) for each in options]
    samples = [Sample("", 0, False)] * len(prompts)
    pieces = stream(decoder, prompts, options, end_tokens=marker_ids(tokenizer))  # any closes the assistant's turn
    stopped: bool | None = None
    while True:
        try:
            number, piece = pieces.send(stopped)
        except StopIteration:
            return samples
        text, so_far = texts[number], samples[number]
        ended = piece.reason == "stop"
        new = text.feed(piece.tokens[:-1] if ended else piece.tokens)
        new += text.finish() if piece.reason else ""
        stopped = text.stopped
        samples[number] = Sample(so_far.text + new, so_far.tokens + len(piece.tokens), ended or stopped)
