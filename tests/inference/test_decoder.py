"""Cached decoding: the tokens of a model without a cache, whatever the chunk, the slot and the texts beside it."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import NIGHT, PROFILE
from vulkan_devices import SELECTOR, needs_vulkan

from gpt_jax.backend import Backend, enter_backend
from gpt_jax.inference.decoder import Decoder, batch_sizes
from gpt_jax.inference.generate import generate
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from vk_kernels.bridge import jit
from vk_kernels.runtime.executable import Executable
from vk_kernels.runtime.open_devices import open_device

CONFIG = ModelConfig(vocab_size=61, block_size=24, num_layers=2, num_heads=2, embed_dim=16, soft_cap=30.0)
MODEL = GPT(CONFIG)
PROMPTS = ([5, 6, 7], [9] * 14, [3], [8] * 24)


@functools.cache  # not when the file is imported, which every selection of tests does
def parameters():
    params = jax.jit(init_params, static_argnums=(0, 1))(MODEL, 0)
    return jax.tree.map(lambda x: 4 * x, params)  # not all but uniform


@pytest.fixture(scope="module", params=["xla", pytest.param("vulkan", marks=needs_vulkan)])
def backend(request) -> Iterator[Backend]:
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VK_KERNELS_DEVICE", SELECTOR)
        yield enter_backend(request.param, "highest", stack)


@pytest.fixture(scope="module")
def greedy_decoder(backend) -> Decoder:
    return Decoder(MODEL, backend.put(parameters()), backend, slots=4)


@jax.jit
def uncached_logits(params, tokens, last):
    return MODEL.apply({"params": params}, tokens, last, method="next_token_logits")[0]


def uncached_greedy(prompt, count):
    text = list(prompt)
    while len(text) < len(prompt) + count and len(text) <= CONFIG.block_size:
        tokens = np.zeros((1, CONFIG.block_size), np.int32)
        tokens[0, : len(text)] = text
        text.append(int(uncached_logits(parameters(), tokens, np.array([len(text) - 1])).argmax()))
    return text[len(prompt) :]


def decode_all(decoder, prompts, options, **limits):
    """Each prompt's new tokens and why they ended, all prompts side by side."""
    for slot, prompt in enumerate(prompts):
        decoder.insert(slot, prompt, options[slot], **limits)
    texts, reasons = [[] for _ in prompts], {}
    while len(reasons) < len(prompts):
        for slot, piece in decoder.decode().items():
            texts[slot] += piece.tokens
            if piece.reason:
                reasons[slot] = piece.reason
    for slot in range(len(prompts)):
        decoder.release(slot)
    return texts, [reasons[slot] for slot in range(len(prompts))]


def test_greedy_texts_of_mixed_lengths_are_those_without_a_cache_until_the_block_is_full(backend):
    decoder = Decoder(MODEL, backend.put(parameters()), backend, slots=4, chunk=4)
    texts, reasons = decode_all(decoder, PROMPTS, [SamplingOptions(temperature=0)] * 4, max_tokens=40)
    assert texts == [uncached_greedy(prompt, 40) for prompt in PROMPTS]
    assert [len(text) for text in texts] == [25 - len(prompt) for prompt in PROMPTS]
    assert reasons == ["length"] * 4


def test_a_text_ends_at_its_own_end_token_and_its_slot_takes_another(backend):
    decoder = Decoder(MODEL, backend.put(parameters()), backend, slots=1, chunk=4)
    greedy = SamplingOptions(temperature=0)
    free = uncached_greedy([5, 6, 7], 12)
    stop = free.index(free[5])
    texts, reasons = decode_all(decoder, [[5, 6, 7]], [greedy], max_tokens=12, end_tokens=(free[5], 60))
    assert (texts, reasons) == ([free[: stop + 1]], ["stop"])
    assert decode_all(decoder, [[5, 6, 7]], [greedy], max_tokens=12) == ([free], ["length"])


def test_a_seed_gives_one_text_whatever_the_chunk_the_slot_and_the_texts_beside_it(backend):
    def texts(chunk, prompts, seeds):
        decoder = Decoder(MODEL, backend.put(parameters()), backend, slots=len(prompts), chunk=chunk)
        options = [SamplingOptions(1.0, 40, seed=seed) for seed in seeds]
        return decode_all(decoder, prompts, options, max_tokens=9)[0]

    alone = texts(1, [[5, 6, 7]], [3])[0]
    beside = texts(8, [[9] * 14, [5, 6, 7], [3]], [1, 3, 5])
    assert alone == beside[1]
    assert texts(16, [[5, 6, 7]], [4])[0] != alone


@pytest.mark.timeout(7200 if NIGHT else 300)
@PROFILE
@given(
    prompts=st.lists(st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=24), min_size=4, max_size=4),
    counts=st.lists(st.integers(1, 24), min_size=4, max_size=4),
)
def test_drawn_prompts_side_by_side_go_on_as_without_a_cache(greedy_decoder, prompts, counts):
    found = []
    for _ in range(2):
        for slot, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            greedy_decoder.insert(slot, prompt, SamplingOptions(temperature=0), max_tokens=count)
        texts, logprobs = [[] for _ in prompts], [[] for _ in prompts]
        while any(not text.has_ended for text in greedy_decoder._texts.values()):
            for slot, piece in greedy_decoder.decode().items():
                texts[slot] += piece.tokens
                logprobs[slot] += piece.logprobs
        for slot in range(4):
            greedy_decoder.release(slot)
        assert texts == [uncached_greedy(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        found.append(logprobs)
    assert found[0] == found[1]  # to the bit


def test_in_bf16_each_token_is_the_likeliest_without_a_cache_too(backend):
    """But for rounding: below the largest logit by no more than twice what the uncached logits of bf16 are off."""
    if backend.name == "vulkan" and open_device().info.kind == "cpu":
        pytest.skip("takes a processor's driver a minute to compile; test_kv_cache.py has the logits")
    half = GPT(dataclasses.replace(CONFIG, dtype="bfloat16"))
    decoder = Decoder(half, backend.put(parameters()), backend, slots=4, chunk=4)
    texts, _ = decode_all(decoder, PROMPTS, [SamplingOptions(temperature=0)] * 4, max_tokens=40)
    assert [len(text) for text in texts] == [25 - len(prompt) for prompt in PROMPTS]
    rows = [(prompt, text[:count]) for prompt, text in zip(PROMPTS, texts, strict=True) for count in range(len(text))]
    whole = np.zeros((len(rows), CONFIG.block_size), np.int32)
    for place, (prompt, before) in zip(whole, rows, strict=True):
        place[: len(prompt) + len(before)] = [*prompt, *before]
    last = np.array([len(prompt) + len(before) - 1 for prompt, before in rows])

    def logits(model):
        apply = jax.jit(functools.partial(model.apply, method="next_token_logits"))
        return np.asarray(apply({"params": parameters()}, whole, last), np.float32)

    rounded, exact = logits(half), logits(MODEL)
    chosen = rounded[np.arange(len(rows)), [token for text in texts for token in text]]
    assert (rounded.max(axis=1) - chosen).max() <= 2 * np.abs(rounded - exact).max() + 1e-5


def texts_of(decoder, prompts, ends=(), ahead=True):
    """Texts that prompts become, and how many chunks began until all of them had ended."""
    begun, begin = [], decoder._begin
    decoder._begin = lambda: begun.append(1) or begin()
    for slot, prompt in enumerate(prompts):
        decoder.insert(slot, prompt, SamplingOptions(1.0, seed=slot), max_tokens=20, end_tokens=ends)
    texts, open_slots = [[] for _ in prompts], set(range(len(prompts)))
    while open_slots:
        for slot, piece in decoder.decode(ahead=ahead).items():
            texts[slot] += piece.tokens
            open_slots -= {slot} if piece.reason else set()
    for slot in range(len(prompts)):
        decoder.release(slot)
    decoder._begin = begin
    return texts, len(begun)


def test_the_next_chunk_begins_before_one_is_read_and_at_most_one_is_idle(backend, greedy_decoder):
    prompts = [[5, 6, 7], [9] * 4]
    plain, count = texts_of(greedy_decoder, prompts, ahead=False)
    assert count == 3  # of 20 tokens, 8 each; none is idle where the end is known beforehand
    begun_at_reads, read = [], greedy_decoder._read
    greedy_decoder._read = lambda chunk: begun_at_reads.append(len(greedy_decoder._begun)) or read(chunk)
    assert texts_of(greedy_decoder, prompts)[0] == plain
    assert begun_at_reads == [1, 1, 0]  # beside the one that is read
    ended, count = texts_of(greedy_decoder, prompts[:1], ends=(plain[0][4],))
    assert ended == [plain[0][: plain[0].index(plain[0][4]) + 1]]
    assert count == 2
    assert len(greedy_decoder._begun) == 1
    # The idle chunk is nobody's: a text that takes the slot meanwhile has its own tokens alone.
    assert texts_of(greedy_decoder, prompts)[0] == plain
    greedy_decoder._read = read


def test_few_texts_are_a_small_batch_and_the_same(backend, greedy_decoder):
    """One or two texts of four slots take the program of two rows, whatever was in the others before."""
    prompts = [[5, 6, 7], [9] * 4]
    assert greedy_decoder.batches == [2, 4]
    few, _ = texts_of(greedy_decoder, prompts)
    many, _ = texts_of(greedy_decoder, [*prompts, [3], [8] * 9])
    assert many[:2] == few == texts_of(greedy_decoder, prompts)[0]
    assert [batch_sizes(slots) for slots in (1, 2, 3, 32)] == [[1], [2], [2, 3], [2, 8, 32]]


def test_a_text_that_joins_while_a_chunk_is_ahead_is_as_it_is_alone(greedy_decoder):
    alone = texts_of(greedy_decoder, [[9] * 4, [5, 6, 7]])[0]
    greedy_decoder.insert(0, [9] * 4, SamplingOptions(1.0, seed=0), max_tokens=20)
    first = greedy_decoder.decode()
    greedy_decoder.insert(1, [5, 6, 7], SamplingOptions(1.0, seed=1), max_tokens=20)
    pieces = [first, *(greedy_decoder.decode() for _ in range(4))]
    texts = [[token for piece in pieces if slot in piece for token in piece[slot].tokens] for slot in (0, 1)]
    assert texts == alone
    assert [sorted(piece) for piece in pieces] == [[0], [0], [0, 1], [1], [1]]
    for slot in (0, 1):
        greedy_decoder.release(slot)


def test_no_sample_but_the_first_compiles_anything(backend, greedy_decoder, monkeypatch, caplog):
    """As a run makes them, be they few or many: parameters that change, prompts and options that one prefill takes."""
    made, compiled = [], jit.Compiled.__init__
    monkeypatch.setattr(jit.Compiled, "__init__", lambda self, *args: made.append(self) or compiled(self, *args))

    def sample(factor, prompts, **options):
        params = backend.put(jax.tree.map(lambda x: factor * np.asarray(x), parameters()))
        greedy_decoder.load(params)
        return generate(greedy_decoder, prompts, [SamplingOptions(max_tokens=9, **options)] * len(prompts))

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for prompts in ([[1, 2], [3]], [[1]] * 3):  # few, and more: a decoder has a program for each
            sample(1, prompts, seed=1)
        made.clear()
        caplog.clear()
        hot = sample(2, [[7] * 16, [1], [2, 3], [4], [5, 5], [6]], temperature=0)
        assert sample(1, [[4] * 9], seed=3, top_k=4, top_p=0.5) != hot
        assert not made
        assert "Compiling" not in caplog.text
        backend.jit(lambda x: x + 1)(np.ones(3, np.float32))
        assert made or "Compiling" in caplog.text


@needs_vulkan
def test_texts_that_take_turns_in_the_slots_record_nothing_anew(backend, greedy_decoder, monkeypatch):
    if backend.name != "vulkan":
        pytest.skip("XLA records nothing")
    options = [SamplingOptions(1.0, seed=seed, max_tokens=9) for seed in range(6)]
    prompts = [[5, 6, 7], [9] * 4, [3], [8] * 9, [1], [2]]
    once = generate(greedy_decoder, prompts, options)
    made, record = [], Executable._record

    def record_and_tell(self, bound):
        # One more for the same buffers, where a call comes before the device is done with the last, lets calls overlap.
        if all(recording.inputs != bound for recording in self._recordings):
            made.append(self)
        return record(self, bound)

    monkeypatch.setattr(Executable, "_record", record_and_tell)
    assert generate(greedy_decoder, prompts, options) == once
    assert not made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot": 3}, "slot 3 is not one of the free slots"),
        ({"tokens": []}, "a prompt has 1 to 24 tokens, found 0"),
        ({"tokens": [1] * 25}, "a prompt has 1 to 24 tokens, found 25"),
        ({"max_tokens": 0}, "max_tokens=0 must be 1 or more"),
    ],
)
def test_what_no_slot_takes_is_refused(backend, changes, message):
    decoder = Decoder(MODEL, backend.put(parameters()), backend, slots=2)
    with pytest.raises(ValueError, match=message):
        decoder.insert(**({"slot": 0, "tokens": [1], "options": SamplingOptions(), "max_tokens": 5} | changes))
