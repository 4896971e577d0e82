"""The token cache and the batches: by source, deterministic, resumable, exact."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from gpt_jax.config import TARGETS
from gpt_jax.data import corpus, token_cache
from gpt_jax.data import tokenizer as tk
from gpt_jax.data.batches import MASKED, evaluation_batches, loader, windows
from gpt_jax.data.rows import Reading
from gpt_jax.errors import UserError
from gpt_jax.storage.files import StorageError
from gpt_jax.storage.lock import lock

VOCABULARY = 4000


def config(cache, **changes):
    fields = {"source": "default", "validation_fraction": 0.05, "tokenizer": "", "cache_dir": str(cache)}
    return ConfigDict(fields | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache):
    """The whole default corpus, prepared once."""
    return token_cache.prepare(config(cache), VOCABULARY, log=lambda line: None)


@pytest.fixture
def chats(tmp_path):
    """A small file of the user's own: 200 dialogues."""
    path = tmp_path / "chats.txt"
    path.write_text("".join(f"<|user|>word {n}<|assistant|>answer {n}<|end_of_text|>\n" for n in range(200)))
    return path


def prepare(chats, log=lambda line: None, vocab_size=300, **changes):
    fields = {"source": str(chats), "validation_fraction": 0.2} | changes
    return token_cache.prepare(config(chats.parent / "cache", **fields), vocab_size, log)


def stream(count, assistant=None):
    """Tokens 0, 1, 2, ..., so that a batch shows where it comes from."""
    assistant = np.zeros(count) if assistant is None else assistant
    return token_cache.Tokens(np.arange(count, dtype=np.uint16), np.asarray(assistant, np.uint8))


def assert_same(one, two):
    np.testing.assert_array_equal(one["inputs"], two["inputs"])
    np.testing.assert_array_equal(one["targets"], two["targets"])


# ---- the default corpus, prepared


def test_default_corpus_has_the_size_it_is_documented_with(prepared):
    assert sum(prepared.stats[split]["dialogues"] for split in prepared.stats) == 24_067
    assert prepared.tokenizer.get_vocab_size() == VOCABULARY
    assert len(prepared.train) == prepared.stats["train"]["tokens"] == pytest.approx(3.71e6, rel=0.01)
    assert len(prepared.validation) == prepared.stats["validation"]["tokens"] == pytest.approx(2.16e5, rel=0.01)
    assert prepared.train.ids.dtype == np.uint16
    assert isinstance(prepared.train.ids, np.memmap)


def test_tokens_are_the_dialogues_split_by_source(prepared):
    """Every dialogue is decoded from its split, whole and in order; no source is in both."""
    texts = {"train": [], "validation": []}
    sources = {"train": set(), "validation": set()}
    for dialogue in corpus.read_corpus("default"):
        split = "validation" if corpus.is_validation(dialogue.source, 0.05) else "train"
        texts[split].append(corpus.render(dialogue))
        sources[split].add(dialogue.source)
    assert sources["train"].isdisjoint(sources["validation"])
    assert tk.decode(prepared.tokenizer, prepared.validation.ids) == "".join(texts["validation"])
    assert (
        tk.decode(prepared.tokenizer, prepared.train.ids[:200_000])
        == "".join(texts["train"])[: len(tk.decode(prepared.tokenizer, prepared.train.ids[:200_000]))]
    )
    assert (prepared.train.ids == 2).sum() == len(texts["train"])


def test_who_says_a_token_agrees_with_the_markers(prepared):
    """Recomputed from the ids alone: a token is the assistant's if the last marker before it is <|assistant|>."""
    for tokens in (prepared.train, prepared.validation):
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
    subprocess.run(command, env=environment, check=True, timeout=120)
    (two,) = (tmp_path / "two").iterdir()
    assert two.name == prepared.fingerprint
    names = {path.name for path in two.iterdir()}
    assert names == {"stats.json", "tokenizer.json"} | {
        f"{split}.{kind}" for split in ("train", "validation") for kind in ("tokens", "assistant")
    }
    for name in names:
        assert (two / name).read_bytes() == (tmp_path / "one" / two.name / name).read_bytes(), name


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


def test_second_call_uses_the_cache_at_once(prepared, cache):
    lines = []
    start = time.monotonic()
    again = token_cache.prepare(config(cache), VOCABULARY, lines.append)
    assert time.monotonic() - start < 2
    assert f"using the token cache {cache / prepared.fingerprint}" in lines[0]
    np.testing.assert_array_equal(again.train.ids, prepared.train.ids)


# ---- the cache


def test_fingerprint_follows_source_tokenizer_and_split(chats):
    first = prepare(chats)
    assert prepare(chats).fingerprint == first.fingerprint
    assert prepare(chats, validation_fraction=0.3).fingerprint != first.fingerprint
    assert prepare(chats, vocab_size=301).fingerprint != first.fingerprint
    chats.write_text(chats.read_text().replace("answer 7<", "answer VII<"))
    changed = prepare(chats)
    assert changed.fingerprint != first.fingerprint
    assert "VII" in tk.decode(changed.tokenizer, [*changed.train.ids, *changed.validation.ids])


def test_format_version_is_part_of_the_fingerprint(chats, monkeypatch):
    first = prepare(chats)
    monkeypatch.setattr(token_cache, "FORMAT_VERSION", token_cache.FORMAT_VERSION + 1)
    assert prepare(chats).fingerprint != first.fingerprint


def test_a_given_tokenizer_is_used(chats, tmp_path):
    own = tmp_path / "own" / "tokenizer.json"
    own.parent.mkdir()
    tk.save(tk.train_tokenizer(["word answer"] * 9, 270), own)
    lines = []
    prepared = prepare(chats, lines.append, tokenizer=str(own))
    assert prepared.tokenizer.to_str() == tk.load(own).to_str()
    assert f"the tokenizer has {prepared.tokenizer.get_vocab_size()} ids, the model 300" in lines[-1]
    with pytest.raises(UserError, match=r"has 2\d\d ids but the model's vocab_size is 260: raise vocab_size"):
        prepare(chats, tokenizer=str(own), vocab_size=260)
    with pytest.raises(UserError, match="does not exist"):
        prepare(chats, tokenizer=str(own) + "x")


@pytest.mark.parametrize("name", ["train.tokens", "validation.assistant", "tokenizer.json", "stats.json"])
@pytest.mark.parametrize("damage", ["short", "missing"])
def test_a_damaged_cache_is_built_again_with_a_warning(chats, name, damage):
    first = prepare(chats)
    ids = np.array(first.train.ids)
    path = chats.parent / "cache" / first.fingerprint / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(whole[: len(whole) // 2])
    lines = []
    again = prepare(chats, lines.append)
    assert "warning: the token cache" in lines[0]
    assert "is damaged" in lines[0]
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(again.train.ids, ids)


@pytest.mark.parametrize(
    "name", ["train.tokens", "train.assistant", "validation.tokens", "validation.assistant", "tokenizer.json"]
)
def test_a_flipped_bit_in_the_cache_is_noticed_and_built_again(chats, name):
    first = prepare(chats)
    path = chats.parent / "cache" / first.fingerprint / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    lines = []
    prepare(chats, lines.append)
    assert lines[0].endswith(f"is damaged ({name} fails its checksum): building it again")
    assert path.read_bytes() == whole


def test_changed_facts_of_the_cache_are_noticed(chats):
    path = chats.parent / "cache" / prepare(chats).fingerprint / "stats.json"
    whole = path.read_text()
    path.write_text(whole.replace('"dialogues": 1', '"dialogues": 2'))
    lines = []
    prepare(chats, lines.append)
    assert "is damaged (stats.json fails its checksum): building it again" in lines[0]
    assert path.read_text() == whole


KILLED = """
import os, signal, sys
from ml_collections import ConfigDict
from gpt_jax.data import corpus, token_cache
read, passes = corpus.read_corpus, []
def killing(source, reading):  # the first pass trains the tokenizer, the second writes the tokens
    passes.append(source)
    for number, dialogue in enumerate(read(source, reading)):
        if len(passes) == 2 and number == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        yield dialogue
corpus.read_corpus = killing
token_cache._BATCH_CHARACTERS = 100
fields = {"source": sys.argv[1], "validation_fraction": 0.2, "tokenizer": "", "cache_dir": sys.argv[2]}
token_cache.prepare(ConfigDict(fields), 300, log=lambda line: None)
"""


def test_a_killed_run_leaves_no_half_cache(chats):
    cache = chats.parent / "cache"
    run = subprocess.run([sys.executable, "-c", KILLED, str(chats), str(cache)], timeout=120)
    assert run.returncode == -9
    (partial,) = cache.iterdir()
    assert partial.name.endswith(".partial")
    lines = []
    prepared = prepare(chats, lines.append)
    assert "preparing" in lines[0]
    assert sum(counts["dialogues"] for counts in prepared.stats.values()) == 200
    assert partial.exists()  # it might belong to a run that is still at work

    for path in [*partial.iterdir(), partial]:
        os.utime(path, (0, 0))
    (cache / prepared.fingerprint / "stats.json").unlink()
    prepare(chats)
    assert [path.name for path in cache.iterdir()] == [prepared.fingerprint]


def test_a_second_run_waits_for_the_one_that_builds_and_uses_its_cache(chats):
    folder = chats.parent / "cache" / prepare(chats).fingerprint
    aside = folder.rename(chats.parent / "aside")
    building = lock(token_cache._build_lock(folder), print)
    building.__enter__()
    said = []

    def log(line: str) -> None:
        said.append(line)
        if line.startswith("waiting for"):
            aside.rename(folder)
            building.__exit__(None, None, None)

    prepare(chats, log)
    assert f"held by process {os.getpid()} on " in said[0]
    assert said[1] == f"data: using the token cache {folder}"


def test_a_file_in_the_place_of_a_cache_or_of_an_abandoned_build_is_replaced(chats):
    folder = chats.parent / "cache" / prepare(chats).fingerprint
    shutil.rmtree(folder)
    folder.write_text("")
    abandoned = folder.with_name(f"{folder.name}.0.partial")
    abandoned.write_text("")
    os.utime(abandoned, (0, 0))
    lines = []
    prepare(chats, lines.append)
    assert "is damaged" in lines[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert folder.is_dir()


def test_the_fingerprint_is_of_how_a_source_is_read_and_not_of_what_is_counted_then(chats, monkeypatch):
    @dataclasses.dataclass
    class CountsMore(Reading):
        jokes: int = 0

    before = prepare(chats).fingerprint
    monkeypatch.setattr(token_cache, "Reading", CountsMore)
    assert prepare(chats).fingerprint == before


def test_a_failed_build_leaves_nothing(chats):
    chats.write_text(chats.read_text() + "<|user|>")
    with pytest.raises(UserError, match=r"chats.txt:201: the user turn is empty"):
        prepare(chats)
    assert list((chats.parent / "cache").iterdir()) == []


def test_cache_folder_by_default(chats, monkeypatch):
    home = chats.parent / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    first = prepare(chats, cache_dir="")
    assert (home / "xdg" / "gpt_jax" / first.fingerprint).is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    prepare(chats, cache_dir="")
    assert (home / ".cache" / "gpt_jax" / first.fingerprint).is_dir()


def test_cache_folder_that_cannot_be_written(chats):
    (chats.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache: .*set data.cache_dir"):
        prepare(chats, cache_dir=str(chats.parent / "file" / "cache"))


def test_a_disk_that_fails_without_a_name_may_be_that_of_the_source(chats, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(token_cache.corpus, "read_corpus", failing)
    with pytest.raises(StorageError) as caught:
        prepare(chats)
    assert str(caught.value).startswith(f"cannot read the data source {str(chats)!r} or write the token cache ")
    assert ": Input/output error; " in str(caught.value)


def test_more_than_65536_ids_take_four_bytes(chats):
    layout = json.loads(tk.train_tokenizer(["word answer"] * 9, 259).to_str())
    layout["model"]["vocab"] |= {f"unused {n}": n for n in range(259, 70_000)}
    path = chats.parent / "tokenizer.json"
    path.write_text(json.dumps(layout))
    prepared = prepare(chats, tokenizer=str(path), vocab_size=70_000)
    assert prepared.train.ids.dtype == np.uint32
    assert tk.decode(prepared.tokenizer, prepared.train.ids).count("<|end_of_text|>") > 100


def test_empty_splits_and_sources(chats):
    with pytest.raises(
        UserError,
        match=r"none of the 200 dialogues falls in the validation split .*0.0001: raise it, or give",
    ):
        prepare(chats, validation_fraction=0.0001)
    with pytest.raises(UserError, match=r"in the training split at data.validation_fraction=0.9999: lower it"):
        prepare(chats, validation_fraction=0.9999)
    for fraction in (0.0, 1.0):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            prepare(chats, validation_fraction=fraction)
    chats.write_text("\n")
    with pytest.raises(UserError, match="holds no dialogue"):
        prepare(chats)


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def messages(number, **more):
    answer = {"role": "assistant", "content": f"answer {number}"}
    return {"messages": [{"role": "user", "content": f"word {number}"}, answer | more]}


def test_one_id_on_all_rows_is_said(tmp_path):
    same = jsonl(tmp_path / "same.jsonl", [messages(n) | {"id": "task"} for n in range(20)])
    with pytest.raises(UserError, match=r"all 20 dialogues have one source, 'id task', which is never split, so the"):
        prepare(same)
    two = jsonl(tmp_path / "two.jsonl", [messages(n) | {"id": n % 2} for n in range(20)])
    with pytest.raises(UserError, match=r"none of the 20 dialogues of 2 sources falls in the validation split"):
        prepare(two, validation_fraction=0.01)


def test_what_was_read_otherwise_is_said_at_every_start(tmp_path):
    rows = [messages(n, weight=n % 2) for n in range(20)] + [{"messages": []}] * 2
    source = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl:21: the dialogue has no turn"):
        prepare(source)
    lines, again = [], []
    prepared = prepare(source, lines.append, on_error="skip")
    assert "data: 2 bad rows or dialogues skipped (data.on_error=skip):" in lines
    assert f"data:   {source}:22: the dialogue has no turn: an assistant turn must come last" in lines
    assert "data: 10 turns of weight 0 are context, never targets" in lines
    prepare(source, again.append, on_error="skip")
    assert again[1:] == [line for line in lines if "prepar" not in line]
    assert sum(counts["dialogues"] for counts in prepared.stats.values()) == 20
    with pytest.raises(UserError, match=r"holds no dialogue: 1 were skipped, first .*:1: the dialogue has no turn"):
        prepare(jsonl(tmp_path / "bad.jsonl", [{"messages": []}]), on_error="skip")


@pytest.mark.parametrize("targets", TARGETS)
def test_turns_of_weight_0_are_never_targets(tmp_path, targets):
    """Whatever else counts: their text, and the marker that closes them."""
    wrong = {"role": "assistant", "content": "WRONG", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "q"}, wrong, *messages(n)["messages"]]} for n in range(20)]
    prepared = prepare(jsonl(tmp_path / "rows.jsonl", rows))
    batches = windows(prepared.train, block_size=8, batch_size=4, seed=0, targets=targets)
    counted = np.concatenate([batches[n]["targets"].ravel() for n in range(20)])
    text = tk.decode(prepared.tokenizer, counted[counted != MASKED])
    assert "answer" in text
    assert "WRONG" not in text
    assert ("word" in text) == (targets == "all")
    context = prepared.train.ids[prepared.train.assistant == tk.UNCOUNTED]
    assert tk.decode(prepared.tokenizer, context) == "WRONG<|user|>" * prepared.stats["train"]["dialogues"]


PEAK = """
import re, sys
from ml_collections import ConfigDict
from gpt_jax.data import token_cache
token_cache._BATCH_CHARACTERS = 100_000
def peak():  # KiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
peaks = []
for source in sys.argv[2:]:
    fields = {"source": source, "validation_fraction": 0.2, "tokenizer": "", "cache_dir": sys.argv[1]}
    token_cache.prepare(ConfigDict(fields), 259, log=lambda line: None)  # a token a character
    peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_source(tmp_path):
    """Holding the ids of the larger source takes 33 MB more (tried)."""
    paths = []
    for name, dialogues in (("small.txt", 250), ("large.txt", 1_500)):
        paths.append(tmp_path / name)
        with paths[-1].open("w") as file:
            for number in range(dialogues):
                file.write(f"<|user|>word {number}<|assistant|>{' answers' * 500}<|end_of_text|>\n")
    assert paths[1].stat().st_size > 6e6
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), *map(str, paths)],
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    small, large = map(int, run.stdout.split())
    assert large - small < 8_000  # KiB


# ---- batches


def test_windows_cover_every_target_once_an_epoch():
    batches = windows(stream(1 + 7 * 10 + 4), block_size=10, batch_size=7, seed=3)
    batch = batches[0]
    assert batch["inputs"].shape == batch["targets"].shape == (7, 10)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    np.testing.assert_array_equal(np.sort(batch["targets"].ravel()), np.arange(1, 71))


def test_every_epoch_has_its_own_order_and_batches_span_epochs():
    batches = windows(stream(101), block_size=10, batch_size=4, seed=3)  # 10 windows: 2.5 batches an epoch
    starts = np.concatenate([batches[n]["inputs"][:, 0] for n in range(50)]).reshape(20, 10)
    assert len({tuple(epoch) for epoch in starts}) == 20
    np.testing.assert_array_equal(np.sort(starts, axis=1), np.tile(np.arange(0, 100, 10), (20, 1)))


def test_a_batch_is_a_pure_function_of_seed_and_number():
    shape = {"block_size": 10, "batch_size": 4}
    one, two = (windows(stream(5001), seed=3, **shape) for _ in range(2))
    for number in (1000, 0, 7, 10**9):
        assert_same(one[number], two[number])
    other = windows(stream(5001), seed=4, **shape)
    assert (one[0]["inputs"] != other[0]["inputs"]).any()


@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_loader_starts_anywhere_and_agrees_with_random_access(prepared, prefetch):
    batches = windows(prepared.train, block_size=64, batch_size=3, seed=42)
    for start in (0, 5, 10**8):
        iterator = loader(batches, start=start, prefetch=prefetch)
        for number in range(start, start + 4):
            assert_same(next(iterator), batches[number])
        iterator.close()


def test_closed_loader_leaves_no_thread_and_no_process():
    before = set(threading.enumerate())
    iterator = loader(windows(stream(5001), block_size=10, batch_size=4, seed=0), prefetch=4)
    next(iterator)
    (thread,) = set(threading.enumerate()) - before
    iterator.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_assistant_targets_are_masked_by_hand():
    #             u  q  a  r  s  E  u  q  q  a  r     tokens 1..10 are targets
    said = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1])
    batches = windows(stream(11, said), block_size=5, batch_size=2, seed=0, targets="assistant")
    batch = {int(inputs[0]): targets for inputs, targets in zip(*batches[0].values(), strict=True)}
    assert batch[0].tolist() == [-1, -1, 3, 4, 5]
    assert batch[5].tolist() == [-1, -1, -1, -1, 10]
    everything = windows(stream(11, said), block_size=5, batch_size=2, seed=0)[0]
    np.testing.assert_array_equal(everything["inputs"], batches[0]["inputs"])


def test_assistant_targets_are_exact_in_windows_that_start_mid_turn(prepared):
    shape = {"block_size": 32, "batch_size": 8, "seed": 1}
    all_ids = np.asarray(prepared.validation.ids).astype(np.int32)
    # Positions instead of ids, so that each target is found again in the stream.
    positions = token_cache.Tokens(np.arange(len(all_ids), dtype=np.uint32), prepared.validation.assistant)
    where = windows(positions, targets="assistant", **shape)
    masked = windows(prepared.validation, targets="assistant", **shape)
    starts_inside = 0
    for number in range(50):
        position = where[number]["inputs"] + 1
        expected = np.where(prepared.validation.assistant[position], all_ids[position], MASKED)
        np.testing.assert_array_equal(masked[number]["targets"], expected)
        starts_inside += (prepared.validation.assistant[position[:, 0]] & (all_ids[position[:, 0]] > 2)).sum()
    assert starts_inside > 100


def test_windows_without_a_counted_target_are_left_out_and_said():
    said = np.zeros(101)
    said[[7, 42, 50, 51]] = 1  # as targets: of the windows from 0, 40 and 50 on; 50 is the last of the fifth
    lines = []
    options = {"block_size": 10, "batch_size": 2, "targets": "assistant", "log": lines.append}
    batches = windows(stream(101, said), seed=5, **options)
    epoch = np.concatenate([batches[n]["inputs"][:, 0] for n in range(3)])  # two epochs of three windows
    assert sorted(epoch[:3]) == sorted(epoch[3:]) == [0, 40, 50]
    assert all((batches[n]["targets"] != MASKED).any() for n in range(30))
    assert lines == ["data: 7 of 10 training windows have no counted target; they are left out"]
    evaluation = evaluation_batches(stream(101, said), batches=9, **options)
    targets = np.concatenate([batch["targets"].ravel() for batch in evaluation])
    assert sorted(targets[targets != MASKED]) == [7, 42, 50, 51]
    assert lines[1] == "data: 7 of 10 validation windows have no counted target; they are left out"
    with pytest.raises(UserError, match="none of the 10 windows of the training data has a target that"):
        windows(stream(101), seed=5, **options)
    with pytest.raises(UserError, match=r"none of the 10 windows of the validation data .* raise data.validation_frac"):
        evaluation_batches(stream(101), batches=9, **options)


def test_every_window_once_an_epoch_whatever_the_sizes_of_the_batches():
    tokens, seen, starts = stream(1 + 10 * 30), 0, []
    for size, steps in ((4, 5), (8, 4), (1, 3), (7, 2), (3, 7)):  # 90 windows: three epochs
        batches = windows(tokens, block_size=10, batch_size=size, seed=3, seen=seen)
        starts += [batches[n]["inputs"][:, 0] for n in range(steps)]
        seen += size * steps
    epochs = np.concatenate(starts).reshape(3, 30)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(0, 300, 10), (3, 1)))
    straight = windows(tokens, block_size=10, batch_size=90, seed=3)
    np.testing.assert_array_equal(epochs.ravel(), straight[0]["inputs"][:, 0])


def test_evaluation_sees_each_window_once_and_pads_with_masked_targets():
    batches = evaluation_batches(stream(1 + 10 * 10), block_size=10, batch_size=4, batches=99)
    assert len(batches) == 3
    assert {batch["inputs"].shape for batch in batches} == {(4, 10)}
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    np.testing.assert_array_equal(np.sort(targets[targets != MASKED]), np.arange(1, 101))
    assert (targets == MASKED).sum() == 20


def test_evaluation_is_the_same_every_time_and_drawn_from_everywhere(prepared):
    shape = {"block_size": 64, "batch_size": 4, "batches": 5}
    one, two = (evaluation_batches(prepared.validation, **shape) for _ in range(2))
    assert len(one) == 5
    for first, second in zip(one, two, strict=True):
        assert_same(first, second)
    first = evaluation_batches(stream(6401), **shape)
    starts = np.concatenate([batch["inputs"][:, 0] for batch in first])
    assert starts.min() < 1600
    assert starts.max() > 4800


def test_block_longer_than_the_data():
    message = "block_size is 10 but the training data has 10 tokens, and a window needs 11: lower block_size"
    with pytest.raises(UserError, match=message):
        windows(stream(10), block_size=10, batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"the validation data has 3 tokens.*raise data.validation_fraction"):
        evaluation_batches(stream(3), block_size=10, batch_size=1, batches=1)
    assert windows(stream(11), block_size=10, batch_size=2, seed=0)[5]["inputs"].tolist() == [[*range(10)]] * 2


def test_unknown_targets():
    with pytest.raises(UserError, match=r"data.targets is 'user': it must be 'all' or 'assistant'"):
        windows(stream(11), block_size=10, batch_size=1, seed=0, targets="user")
