"""A donor's parameters keep their words: its tokenizer by default, rows by their bytes under another one."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import chat_tiny, finetune
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.config import validate
from gpt_jax.data import token_cache
from gpt_jax.data import tokenizer as tk
from gpt_jax.data.dialogue import MARKERS
from gpt_jax.errors import UserError
from gpt_jax.training import train
from gpt_jax.training.donor import find_donor, forget_donor
from gpt_jax.training.finetune import (
    FROM_DONOR,
    check_new_tokens,
    check_same_tokenizer,
    fit_positions,
    map_token_rows,
    tokenizer_to_keep,
)
from gpt_jax.training.fresh_state import fresh_state
from gpt_jax.training.open_settings import fill_in
from gpt_jax.training.preflight import check_tokenizer
from gpt_jax.training.train import initial_state

WIDTH, SIZE = 8, 300
MODELS = Path(__file__).parents[1] / "huggingface" / "models"


def make_config(**changes):
    config = chat_tiny.get_config()
    config.model.update(vocab_size=SIZE, embed_dim=WIDTH, num_heads=2, num_layers=1, block_size=8)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def parameters(size, seed, width=WIDTH):
    rng = np.random.default_rng(seed)
    return {"wte": rng.random((size, width), np.float32), "head": rng.random((width, size), np.float32)}


@pytest.fixture(scope="module")
def words():
    return tk.train_tokenizer(["kettle lamp river bridge kettle lamp"] * 3, 280)


@pytest.fixture(scope="module")
def others():
    return tk.train_tokenizer(["lamp ladder river lamp window"] * 3, 290)


@pytest.fixture
def donor(tmp_path, words):
    """A run folder with one checkpoint."""
    folder = tmp_path / "donor"
    with Checkpointer(folder / "checkpoints", keep_last=1, keep_every=None) as checkpointer:
        checkpointer.save(1, {"params": parameters(SIZE, 1)}, {})
    tk.save(words, folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/1"])
def test_the_donors_tokenizer_is_taken_wherever_in_the_run_is_pointed_to(donor, tmp_path, place):
    config = make_config(init_from=str(donor / place))
    assert tokenizer_to_keep(config, tmp_path / "new") == donor / "tokenizer.json"
    for tokenizer in ("new", str(donor / "tokenizer.json")):
        assert tokenizer_to_keep(make_config(init_from=str(donor), data__tokenizer=tokenizer), tmp_path) is None
    assert tokenizer_to_keep(make_config(), tmp_path) is None


def test_a_donor_without_a_tokenizer_is_refused(donor, tmp_path):
    (donor / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json does not exist, .*data.tokenizer=PATH .*data.tokenizer=new"):
        tokenizer_to_keep(make_config(init_from=str(donor)), tmp_path / "new")


@pytest.mark.parametrize("init_from", ["", "elsewhere"])
def test_a_resumed_run_keeps_the_tokenizer_of_a_donor_that_is_gone(tmp_path, init_from):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    config = make_config(init_from=init_from)
    assert tokenizer_to_keep(config, tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"tokenizer": FROM_DONOR}))
    assert tokenizer_to_keep(config, tmp_path) == tmp_path / "tokenizer.json"


def test_a_run_that_goes_on_reads_its_rows_by_its_own_words(donor, words, others):
    check_same_tokenizer(donor, words)
    with pytest.raises(UserError, match="is not the one that the run was trained with"):
        check_same_tokenizer(donor, others)
    (donor / "tokenizer.json").unlink()
    check_same_tokenizer(donor, others)


def test_rows_go_where_the_same_bytes_go(donor, words, others):
    fresh, saved = parameters(310, 2), parameters(SIZE, 1)
    moved, line = map_token_rows(saved, fresh, make_config(init_from=str(donor)), others)
    known = words.get_vocab()
    same = 0
    for text, new in others.get_vocab().items():
        if text in known:
            same += 1
            np.testing.assert_array_equal(moved["wte"][new], saved["wte"][known[text]])
            np.testing.assert_array_equal(moved["head"][:, new], saved["head"][:, known[text]])
        else:
            np.testing.assert_array_equal(moved["wte"][new], fresh["wte"][new])
            np.testing.assert_array_equal(moved["head"][:, new], fresh["head"][:, new])
    assert 260 <= same < others.get_vocab_size()  # bytes, markers and a few words
    size = others.get_vocab_size()
    assert line == f"tokens: {same} of {size} are the donor's too and take its rows, {size - same} are new"
    np.testing.assert_array_equal(moved["wte"][size:], fresh["wte"][size:])


def test_the_same_words_in_a_larger_vocabulary_keep_their_rows(donor, words):
    config = make_config(init_from=str(donor))
    saved, fresh = parameters(SIZE, 1), parameters(SIZE, 2)
    assert map_token_rows(saved, fresh, config, words) == (saved, "")
    count = words.get_vocab_size()
    moved, line = map_token_rows(saved, parameters(SIZE + 100, 2), config, words)
    np.testing.assert_array_equal(moved["wte"][:count], saved["wte"][:count])
    np.testing.assert_array_equal(moved["head"][:, :count], saved["head"][:, :count])
    assert line.startswith(f"tokens: {count} of {count} are the donor's too")
    moved, _ = map_token_rows(saved, parameters(SIZE, 2, width=16), config, words)  # of another width: not its rows
    assert moved["wte"] is saved["wte"]


def test_a_bare_checkpoint_is_taken_at_the_users_word(donor, words):
    (donor / "tokenizer.json").unlink()
    saved, fresh = parameters(SIZE, 1), parameters(SIZE, 2)
    given = make_config(init_from=str(donor), data__tokenizer="words.json")
    moved, line = map_token_rows(saved, fresh, given, words)
    assert moved is saved
    assert line.endswith("words.json is taken to be the donor's tokenizer")
    moved, line = map_token_rows(saved, fresh, make_config(init_from=str(donor), data__tokenizer="new"), words)
    assert moved == {}
    assert "no row of a token is taken" in line


def test_tokens_that_are_new_need_rows_that_are_trained(donor, words, others, tmp_path):
    tk.save(others, tmp_path / "others.json")
    tied = {"wte": parameters(SIZE, 0)["wte"]}
    new, rest = f"{len(others.get_vocab().keys() - words.get_vocab().keys())} tokens", "leave data.tokenizer empty"
    adapters, frozen = {"lora__rank": 2}, {"optimizer__frozen": ("wte",)}
    for changes, why in ((adapters, "adapters (config.lora.rank) leave"), (frozen, "config.optimizer.frozen leaves")):
        for file, told in ((str(tmp_path / "others.json"), new), ("new", "tokens")):
            config = make_config(init_from=str(donor), data__tokenizer=file, **changes)
            with pytest.raises(UserError) as caught:
                check_new_tokens(config, words, tied)
            expected = f"config.data.tokenizer is {file}, with {told} that are not the donor's, and {why} wte as begun"
            assert str(caught.value).startswith(expected)
            assert rest in str(caught.value)
        for file in ("", str(donor / "tokenizer.json")):
            check_new_tokens(make_config(init_from=str(donor), data__tokenizer=file, **changes), words, tied)
        taken = make_config(init_from=str(donor), data__tokenizer=str(tmp_path / "others.json"), **changes)
        check_new_tokens(taken, tmp_path / "missing.json", tied)  # it is taken to be the donor's
        new_tokenizer = make_config(init_from=str(donor), data__tokenizer="new", **changes)
        with pytest.raises(
            UserError, match=r"missing.json, does not exist: give it as data.tokenizer=PATH, or have these"
        ):
            check_new_tokens(new_tokenizer, tmp_path / "missing.json", tied)
    check_new_tokens(make_config(init_from=str(donor), data__tokenizer="new"), words, tied)
    both = make_config(data__tokenizer="new", optimizer__frozen=("wte", "head"))
    with pytest.raises(UserError, match="leaves wte and head as begun"):
        check_new_tokens(both, words, parameters(SIZE, 0))


def test_adapters_with_other_words_are_refused_before_any_work(donor, others, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "prepare", lambda *_: pytest.fail("the data is read"))
    monkeypatch.setattr("gpt_jax.training.preflight.check_donor", lambda *_: None)
    tk.save(others, tmp_path / "others.json")
    config = make_config(
        init_from=str(donor), data__tokenizer=str(tmp_path / "others.json"), lora__rank=2, backend="xla"
    )
    with pytest.raises(UserError, match="so that their rows would never be trained"):
        train.train_and_evaluate(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_on_other_data_starts_from_the_donors_words(donor, words, tmp_path, monkeypatch):
    source = tmp_path / "chats.txt"
    source.write_text("".join(f"<|user|>ladder {n}<|assistant|>window {n}<|end_of_text|>" for n in range(40)))
    lines = []
    for tokenizer, kept in (("", True), ("new", False)):
        config = make_config(init_from=str(donor), data__source=str(source), data__tokenizer=tokenizer)
        config.data.update(cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
        corpus = token_cache.prepare(config.data, SIZE, lines.append, tokenizer_to_keep(config, tmp_path / "run"))
        assert (corpus.tokenizer.to_str() == words.to_str()) == kept
    drawn = []
    monkeypatch.setattr(train, "fresh_state", lambda config: drawn.append(fresh_state(config)) or drawn[-1])
    with Checkpointer(tmp_path / "run" / "checkpoints", keep_last=1, keep_every=None) as checkpointer:
        state, _ = initial_state(config, checkpointer, corpus.tokenizer, lines.append)
    assert state.opt_state is drawn[0].opt_state  # made once
    assert "are the donor's too and take its rows" in lines[-1]
    lamp, ladder = words.get_vocab(), corpus.tokenizer.get_vocab()
    saved = parameters(SIZE, 1)["wte"]
    np.testing.assert_array_equal(state.params["wte"][ladder["l"]], saved[lamp["l"]])


def test_positions_that_both_models_have_are_the_donors():
    rng = np.random.default_rng(0)
    donor = {"wpe": rng.random((8, WIDTH), np.float32)}
    shorter, longer = ({"wpe": rng.random((size, WIDTH), np.float32)} for size in (5, 11))
    taken, line = fit_positions(donor, shorter)
    np.testing.assert_array_equal(taken["wpe"], donor["wpe"][:5])
    assert line == "positions: 5 of 5 are the first of the donor's 8"
    taken, line = fit_positions(donor, longer)
    np.testing.assert_array_equal(taken["wpe"], np.concatenate([donor["wpe"], longer["wpe"][8:]]))
    assert line == "positions: 8 of 11 are the first of the donor's 8, 3 are new"
    assert fit_positions(donor, {"wpe": np.zeros((8, WIDTH))}) == (donor, "")
    assert fit_positions(donor, {"wpe": np.zeros((8, 2 * WIDTH))}) == (donor, "")
    assert fit_positions({}, shorter) == ({}, "")


def test_a_gpt2_of_hugging_face_is_a_donor_with_its_words_and_the_markers(tmp_path):
    config = finetune.get_config()
    config.init_from = f"hf:{MODELS / 'old'}"
    filled = fill_in(config, tmp_path / "new")
    validate(filled)
    saved = json.loads((MODELS / "old" / "config.json").read_text())
    assert (filled.model.num_layers, filled.model.embed_dim) == (saved["n_layer"], saved["n_embd"])
    assert (filled.model.dtype, filled.model.tie_head) == ("float32", True)
    kept = tokenizer_to_keep(filled, tmp_path / "new")
    assert all(kept.token_to_id(marker) is not None for marker in MARKERS)
    check_tokenizer(filled, kept)
    donor = find_donor(filled.init_from)
    params, description = donor.read_parameters()
    assert params["wte"].shape == (filled.model.vocab_size, filled.model.embed_dim)
    assert "a GPT-2 of transformers" in description
    assert map_token_rows(params, params, filled, kept) == (params, "")
    forget_donor()
    config.model.num_layers = 9
    with pytest.raises(UserError, match=r"config.model.num_layers is 9, and \d in the donor hf:"):
        fill_in(config, tmp_path / "new")
