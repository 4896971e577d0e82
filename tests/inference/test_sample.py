"""Continuations and answers by a decoder, and what each command says when the device fails."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest
from absl import flags

from gpt_jax import chat, sample, serve
from gpt_jax.backend import Backend, enter_backend
from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import encode_prompt, marker_ids, train_tokenizer
from gpt_jax.inference.decoder import Decoder, Piece
from gpt_jax.inference.generate import answer, generate, stream
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from vk_kernels.errors import DeviceLostError

MODEL = GPT(ModelConfig(vocab_size=270, block_size=10, num_layers=1, num_heads=2, embed_dim=16))


@functools.cache  # not when the file is imported, which every selection of tests does
def parameters(seed=3):
    params = jax.jit(init_params, static_argnums=(0, 1))(MODEL, seed)
    return jax.tree.map(lambda x: 20 * x, params)  # not all but uniform


PROMPTS = [[5, 6, 7], [9] * 8, [1, 2]]
OPTIONS = [SamplingOptions(seed=seed, max_tokens=5) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with contextlib.ExitStack() as stack:
        yield enter_backend("xla", "highest", stack)


@pytest.fixture(scope="module")
def decoder(backend) -> Decoder:
    return Decoder(MODEL, parameters(), backend, slots=2, chunk=4)


def test_more_prompts_than_slots_wait_for_a_free_one(decoder):
    texts = generate(decoder, PROMPTS, OPTIONS)
    assert [len(text) for text in texts] == [5, 3, 5]  # the second one's block is full
    assert generate(decoder, PROMPTS, OPTIONS) == texts
    assert [generate(decoder, [prompt], [one])[0] for prompt, one in zip(PROMPTS, OPTIONS, strict=True)] == texts
    others = [SamplingOptions(seed=9, max_tokens=5)] * 3
    assert generate(decoder, PROMPTS, others) != texts


def test_a_stream_that_is_left_frees_its_slots(decoder):
    pieces = stream(decoder, PROMPTS, OPTIONS)
    number, piece = next(pieces)
    assert (number, len(piece.tokens), piece.reason) == (0, 4, None)
    assert decoder.free_slots == []
    pieces.close()
    assert decoder.free_slots == [0, 1]


def test_another_model_in_the_same_decoder(backend, decoder):
    fresh = generate(Decoder(MODEL, parameters(4), backend, slots=2, chunk=4), PROMPTS, OPTIONS)
    before = generate(decoder, PROMPTS, OPTIONS)
    decoder.load(parameters(4))
    assert generate(decoder, PROMPTS, OPTIONS) == fresh != before
    decoder.load(parameters())
    assert generate(decoder, PROMPTS, OPTIONS) == before


class Scripted:
    """A decoder of which the tokens are known."""

    config = MODEL.config
    free_slots = (0,)

    def __init__(self, tokens: list[int], end: int):
        self.tokens, self.end, self.released = tokens, end, []

    def insert(self, slot, tokens, options, *, end_tokens, width):
        assert self.end in end_tokens
        self.prompt = list(tokens)

    def decode(self, *, ahead):
        new, self.tokens = self.tokens[:2], self.tokens[2:]
        return {0: Piece(new, [0.0] * len(new), [], "stop" if self.end in new else None)}

    def release(self, slot):
        self.released.append(slot)


def test_answers_are_decoded_without_the_marker_that_ends_them_and_end_before_a_stop_string():
    tokenizer = train_tokenizer(["a question and an answer"], 262)
    _, _, end = marker_ids(tokenizer)
    reply = tokenizer.encode("an answer", add_special_tokens=False).ids
    turns = [Turn("user", "why?")]

    def ask(**options):
        decoder = Scripted([*reply, end], end)
        [found] = answer(decoder, tokenizer, [turns], [SamplingOptions(**options)])
        return decoder, found

    decoder, whole = ask(max_tokens=50)
    assert whole == ("an answer", len(reply) + 1, True)
    assert decoder.prompt == encode_prompt(tokenizer, turns)
    decoder, short = ask(max_tokens=50, stop=("ans",))
    assert (short.text, short.ended, decoder.released) == ("an ", True, [0])
    assert short.tokens < whole.tokens


@pytest.mark.parametrize("command", [chat, sample, serve])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DeviceLostError("the device was lost"), "error: the device was lost; --backend=xla answers without Vulkan\n"),
        (MemoryError(), "error: out of memory\n"),
    ],
)
def test_a_device_that_fails_costs_one_line(error, line, command, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    values = flags.FlagValues()
    command.define_flags(values)
    values(["", *(["--workdir=run"] if command is sample else []), *(["--port=0"] if command is serve else [])])
    monkeypatch.setattr(command, "FLAGS", values)
    monkeypatch.setattr(command, "open_run", fail)
    assert command.main(["", "a run, or a question"]) == 1
    assert capsys.readouterr().err == line
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        command.main(["", "a run, or a question"])
