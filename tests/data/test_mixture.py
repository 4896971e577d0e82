"""Several sources with weights, and a source of its own for validation."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from small_cache import config, folder_of, prepare

from gpt_jax.data import batches, token_cache
from gpt_jax.data import tokenizer as tk
from gpt_jax.data.batches import check_windows, windows
from gpt_jax.data.token_cache import Tokens
from gpt_jax.errors import UserError
from gpt_jax.evaluation.sources import validation_texts


def stream(name, first, count, weight):
    return Tokens(np.arange(first, first + count, dtype=np.uint32), np.zeros(count, np.uint8), name, weight)


STREAMS = (stream("one", 0, 1001, 0.75), stream("two", 50_000, 101, 0.25))
SHAPE = {"block_size": 10, "batch_size": 4, "seed": 3}


def test_each_source_has_its_share_and_its_own_epochs():
    dataset = windows(STREAMS, **SHAPE)
    starts = np.concatenate([dataset[n]["inputs"][:, 0] for n in range(100)])
    assert (starts >= 50_000).sum() == 100  # of 400
    large, small = starts[starts < 50_000], starts[starts >= 50_000]
    for epoch in large.reshape(3, 100):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(0, 1000, 10))
    epochs = small.reshape(10, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(50_000, 50_100, 10), (10, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 10
    first = dataset[7]
    np.testing.assert_array_equal(first["targets"], first["inputs"] + 1)
    assert first["inputs"].flags.c_contiguous


def test_shares_are_not_cut_off():
    """Grain would make 1,499 of 15 / 26 where the smallest, 1 / 26, is 100."""
    streams = [stream("", 0, 101, weight / 26) for weight in (1, 10, 15)]
    assert batches._shares(streams) == [100, 1000, 1500]


def test_a_batch_of_a_mixture_is_a_pure_function_of_seed_and_number():
    dataset = windows(STREAMS, **SHAPE)
    for number in (10**6, 0, 31):
        np.testing.assert_array_equal(windows(STREAMS, **SHAPE)[number]["inputs"], dataset[number]["inputs"])
    resumed = windows(STREAMS, **SHAPE | {"batch_size": 8}, seen=12)  # after three batches of 4, with another size
    straight = np.concatenate([dataset[number]["inputs"] for number in (3, 4)])
    np.testing.assert_array_equal(resumed[0]["inputs"], straight)


def chats(path, names, word="word"):
    rows = (f"<|user|>{word} {name}<|assistant|>answer {name}<|end_of_text|>\n" for name in names)
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("<|end_of_text|>".join(f"Chapter {n}. A text of its own." for n in range(60)))
    return chats(tmp_path / "chats.txt", range(200)), str(book)


def test_a_mixture_has_a_tokenizer_of_all_and_the_tokens_of_each(sources, tmp_path):
    lines = []
    mixed = prepare(tmp_path / "x", lines.append, source="default", mixture=sources, weights=(3, 1))
    assert [(tokens.name, tokens.weight) for tokens in mixed.train] == [(sources[0], 0.75), (sources[1], 0.25)]
    assert "Chapter" in tk.decode(mixed.tokenizer, mixed.train[1].ids)
    assert {"Ġanswer", "Chapter"} & set(mixed.tokenizer.get_vocab())
    assert any(line.startswith(f"data: 75.0% of the windows are of {sources[0]!r}, which has ") for line in lines)
    assert any(line.startswith(f"data: {sources[1]!r}: read 60 x document") for line in lines)
    assert mixed.stats["train"]["tokens"] == sum(map(len, mixed.train))
    assert mixed.by_source[sources[1]]["train"]["tokens"] == len(mixed.train[1])
    check_windows(mixed, 8, "all")

    lines.clear()
    again = prepare(tmp_path / "x", lines.append, source="default", mixture=sources)  # other weights, the same tokens
    assert [tokens.weight for tokens in again.train] == [0.5, 0.5]
    assert again.fingerprint == mixed.fingerprint
    assert not any("preparing" in line or "training a tokenizer" in line for line in lines)
    other = prepare(tmp_path / "x", mixture=sources[::-1])
    assert other.fingerprint != mixed.fingerprint


def test_a_source_that_is_in_a_mixture_twice_or_too_small_is_named(sources, tmp_path):
    copy = shutil.copy(sources[0], tmp_path / "copy.txt")
    with pytest.raises(
        UserError, match=r"data.mixture has '.*chats.txt' twice, then as '.*copy.txt': raise its weight"
    ):
        prepare(tmp_path / "x", mixture=(*sources, str(copy)))
    mixed = prepare(tmp_path / "x", mixture=sources)
    with pytest.raises(UserError, match=r"the validation data of '.*chats.txt' has \d+ tokens, and a window needs 501"):
        check_windows(mixed, 500, "all")
    with pytest.raises(UserError, match=r"windows of the training data of '.*book.txt' has a target that data"):
        check_windows(mixed, 8, "assistant")


def test_validation_has_a_file_of_its_own_of_any_format(sources, tmp_path):
    own = tmp_path / "own.json"
    rows = [{"prompt": f"word {n}", "completion": f"answer {n}"} for n in (7, 8, 1000, 1001)]
    own.write_text(json.dumps(rows, indent=1))
    lines = []
    prepared = prepare(sources[0], lines.append, validation=str(own))
    [train], [validation] = prepared.train, prepared.validation
    assert prepared.stats["train"]["dialogues"] == 200
    assert prepared.stats["validation"]["dialogues"] == 4
    assert (validation.name, validation.weight) == (str(own), 1.0)
    assert tk.decode(prepared.tokenizer, validation.ids).startswith(
        "<|user|>word 7<|assistant|>answer 7<|end_of_text|>"
    )
    assert tk.decode(prepared.tokenizer, train.ids).count("<|end_of_text|>") == 200
    assert any(
        line.startswith("warning: data: 2 of 4 validation texts stand in the training data too") for line in lines
    )
    assert prepare(sources[0]).fingerprint != prepared.fingerprint
    own.write_text(json.dumps(rows[2:]))
    lines.clear()
    assert prepare(sources[0], lines.append, validation=str(own)).fingerprint != prepared.fingerprint
    assert not any("warning" in line for line in lines)


def test_texts_of_two_ids_on_both_sides_are_warned_of(tmp_path):
    rows = [{"id": n, "prompt": "q", "completion": f"a {n % 30}"} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lines = []
    prepare(path, lines.append)
    assert any("validation texts stand in the training data too, word for word" in line for line in lines)


def test_the_tokens_of_a_corpus_are_known_by_the_tokenizer_and_not_by_where_it_comes_from(sources, tmp_path):
    """A run trains a tokenizer; finetuning takes it from the run's folder, and need not tokenise again."""
    first = prepare(sources[0])
    tk.save(first.tokenizer, tmp_path / "tokenizer.json")
    lines = []
    second = prepare(sources[0], lines.append, tokenizer=str(tmp_path / "tokenizer.json"))
    assert folder_of(second) == folder_of(first)
    assert not any("preparing" in line for line in lines)


def test_a_large_source_gives_the_tokenizer_a_sample_of_all_of_it(sources, monkeypatch):
    monkeypatch.setattr(token_cache, "TOKENIZER_CHARACTERS", 2000)
    taken, train = [], tk.train_tokenizer
    monkeypatch.setattr(tk, "train_tokenizer", lambda texts, *rest: train(taken.extend(texts) or taken, *rest))
    lines = []
    prepare(sources[0], lines.append)
    numbers = [int(text.split()[1]) for text in taken]
    assert 500 < sum(map(len, taken)) < 2500
    assert min(numbers) < 50 < 150 < max(numbers)
    assert any("characters, a sample from all over" in line for line in lines)


def test_what_is_evaluated_of_a_run_is_what_was_held_back(sources, tmp_path):
    lines = []
    for changes in ({"mixture": sources}, {"source": sources[0], "validation": sources[1]}):
        data = config(tmp_path / "cache", **{"validation_fraction": 0.2} | changes)
        held = token_cache.prepare(data, 300, lambda line: None).stats["validation"]
        found = list(validation_texts(ConfigDict({"data": data}), held, lines.append))
        assert len(found) == held["dialogues"]
        assert {source for source, _ in found} == set(sources if "mixture" in changes else sources[1:])
    assert not any("warning" in line for line in lines)
    data = config(tmp_path / "cache", source=sources[0], validation_fraction=1e-6)
    with pytest.raises(UserError, match=r"nothing of '.*' is validation data of the run now: give --data=FILE"):
        list(validation_texts(ConfigDict({"data": data}), {}, lines.append))
