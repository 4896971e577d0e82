"""The default corpus, prepared: its size, its split, and that it is the same each time."""

import os
import subprocess
import sys

import numpy as np
import pytest
from small_cache import config, folder_of

from gpt_jax.data import corpus, token_cache
from gpt_jax.data import tokenizer as tk

VOCABULARY = 4000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache):
    """The whole default corpus, prepared once."""
    return token_cache.prepare(config(cache), VOCABULARY, log=lambda line: None)


def test_default_corpus_has_the_size_it_is_documented_with(prepared):
    assert sum(prepared.stats[split]["dialogues"] for split in prepared.stats) == 24_067
    assert prepared.tokenizer.get_vocab_size() == VOCABULARY
    assert len(prepared.train[0]) == prepared.stats["train"]["tokens"] == pytest.approx(3.71e6, rel=0.01)
    assert len(prepared.validation[0]) == prepared.stats["validation"]["tokens"] == pytest.approx(2.16e5, rel=0.01)
    assert prepared.train[0].ids.dtype == np.uint16
    assert isinstance(prepared.train[0].ids, np.memmap)


def test_tokens_are_the_dialogues_split_by_source(prepared):
    """Every dialogue is decoded from its split, whole and in order; no source is in both."""
    texts = {"train": [], "validation": []}
    sources = {"train": set(), "validation": set()}
    for dialogue in corpus.read_corpus("default"):
        split = "validation" if corpus.is_validation(dialogue.source, 0.05) else "train"
        texts[split].append(corpus.render(dialogue))
        sources[split].add(dialogue.source)
    assert sources["train"].isdisjoint(sources["validation"])
    assert tk.decode(prepared.tokenizer, prepared.validation[0].ids) == "".join(texts["validation"])
    assert (
        tk.decode(prepared.tokenizer, prepared.train[0].ids[:200_000])
        == "".join(texts["train"])[: len(tk.decode(prepared.tokenizer, prepared.train[0].ids[:200_000]))]
    )
    assert (prepared.train[0].ids == 2).sum() == len(texts["train"])


def test_who_says_a_token_agrees_with_the_markers(prepared):
    """Recomputed from the ids alone: a token is the assistant's if the last marker before it is <|assistant|>."""
    for tokens in (*prepared.train, *prepared.validation):
        ids = np.asarray(tokens.ids)
        markers = np.flatnonzero(ids < 3)
        last = markers[np.searchsorted(markers, np.arange(1, len(ids))) - 1]
        np.testing.assert_array_equal(tokens.assistant[1:], ids[last] == 1)


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory):
    """A sixteenth of the default corpus as marked text: large enough for ties and threads, small enough to repeat."""
    path = tmp_path_factory.mktemp("excerpt") / "excerpt.txt"
    path.write_text("".join(corpus.render(dialogue) for dialogue in [*corpus.read_corpus("default")][::16]))
    return path


BUILD = """
import sys
from ml_collections import ConfigDict
from gpt_jax.data import token_cache
fields = {"source": sys.argv[1], "validation_fraction": 0.2, "tokenizer": "", "cache_dir": sys.argv[2]}
token_cache.prepare(ConfigDict(fields), 1500, log=lambda line: None)
"""


def test_two_fresh_builds_are_identical(excerpt, tmp_path):
    """The second in another process, with other hash seeds and one thread."""
    fields = {"source": str(excerpt), "validation_fraction": 0.2}
    prepared = token_cache.prepare(config(tmp_path / "one", **fields), 1500, log=lambda line: None)
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILD, str(excerpt), str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    one, two = tmp_path / "one", tmp_path / "two"
    built = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert built == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    in_tokens = {path.name for path in built if path.parent.name == folder_of(prepared).name}
    assert in_tokens == {"stats.json", "tokenizer.json"} | {
        f"{split}.{kind}" for split in ("train", "validation") for kind in ("tokens", "assistant", "texts")
    }
    assert len(built) == len(in_tokens) + 2  # stats.json and tokenizer.json in the tokenizer's own folder
    for path in built:
        assert (two / path).read_bytes() == (one / path).read_bytes(), path


def test_tokenizer_is_trained_on_the_training_split_alone(excerpt, tmp_path):
    fields = {"source": str(excerpt), "validation_fraction": 0.2}
    prepared = token_cache.prepare(config(tmp_path, **fields), 1500, log=lambda line: None)
    texts = [
        turn.text
        for dialogue in corpus.read_corpus(str(excerpt))
        if not corpus.is_validation(dialogue.source, 0.2)
        for turn in dialogue.turns
    ]
    assert tk.train_tokenizer(texts, 1500).to_str() == prepared.tokenizer.to_str()


def test_second_call_uses_the_cache_at_once(prepared, cache, monkeypatch):
    monkeypatch.setattr(token_cache.corpus, "read_corpus", pytest.fail)  # no text is read, or made tokens of
    lines = []
    again = token_cache.prepare(config(cache), VOCABULARY, lines.append)
    assert f"using the token cache {folder_of(prepared)}" in lines[0]
    np.testing.assert_array_equal(again.train[0].ids, prepared.train[0].ids)
