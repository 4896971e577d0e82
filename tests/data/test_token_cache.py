"""The token cache: what it is named after, what it survives, and what is said of it."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from small_cache import folder_of, prepare

from gpt_jax.config import TARGETS
from gpt_jax.data import cache_folder, token_cache
from gpt_jax.data import tokenizer as tk
from gpt_jax.data.batches import MASKED, windows
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError
from gpt_jax.storage.files import StorageError
from gpt_jax.storage.lock import lock


def test_fingerprint_follows_source_tokenizer_and_split(chats):
    first = prepare(chats)
    assert prepare(chats).fingerprint == first.fingerprint
    assert prepare(chats, validation_fraction=0.3).fingerprint != first.fingerprint
    assert prepare(chats, vocab_size=301).fingerprint != first.fingerprint
    chats.write_text(chats.read_text().replace("answer 7<", "answer VII<"))
    changed = prepare(chats)
    assert changed.fingerprint != first.fingerprint
    assert "VII" in tk.decode(changed.tokenizer, [*changed.train[0].ids, *changed.validation[0].ids])


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
    ids = np.array(first.train[0].ids)
    path = folder_of(first) / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(whole[: len(whole) // 2])
    lines = []
    again = prepare(chats, lines.append)
    assert "warning: the token cache" in lines[0]
    assert "is damaged" in lines[0]
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(again.train[0].ids, ids)


@pytest.mark.parametrize(
    "name", ["train.tokens", "train.assistant", "validation.tokens", "validation.assistant", "tokenizer.json"]
)
def test_a_flipped_bit_in_the_cache_is_noticed_and_built_again(chats, name):
    first = prepare(chats)
    path = folder_of(first) / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    lines = []
    prepare(chats, lines.append)
    assert lines[0].endswith(f"is damaged ({name} fails its checksum): building it again")
    assert path.read_bytes() == whole


def test_a_cache_is_verified_where_no_thread_can_start(chats, monkeypatch):
    """A thread takes 8 MB of what a process may allocate."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    folder = folder_of(prepare(chats))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert cache_folder.read_facts(folder, token_cache.FORMAT_VERSION, {}, ["train.tokens"])["checksums"]


def test_changed_facts_of_the_cache_are_noticed(chats):
    path = folder_of(prepare(chats)) / "stats.json"
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
    run = subprocess.run([sys.executable, "-c", KILLED, str(chats), str(cache)], timeout=300)
    assert run.returncode == -9
    (partial,) = cache.glob("*.partial")
    assert len(list(cache.iterdir())) == 2  # and the tokenizer
    lines = []
    prepared = prepare(chats, lines.append)
    assert "preparing" in lines[0]
    assert sum(counts["dialogues"] for counts in prepared.stats.values()) == 200
    assert partial.exists()  # it might belong to a run that is still at work

    for path in [*partial.iterdir(), partial]:
        os.utime(path, (0, 0))
    (folder_of(prepared) / "stats.json").unlink()
    prepare(chats)
    assert not list(cache.glob("*.partial"))


def test_a_second_run_waits_for_the_one_that_builds_and_uses_its_cache(chats):
    folder = folder_of(prepare(chats))
    aside = folder.rename(chats.parent / "aside")
    building = lock(cache_folder.build_lock(folder), print)
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
    folder = folder_of(prepare(chats))
    shutil.rmtree(folder)
    folder.write_text("")
    abandoned = folder.with_name(f"{folder.name}.0.partial")
    abandoned.write_text("")
    os.utime(abandoned, (0, 0))
    lines = []
    prepare(chats, lines.append)
    assert "is damaged" in lines[0]
    assert not list(folder.parent.glob("*.partial"))
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
    assert folder_of(first).parent == home / "xdg" / "gpt_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder_of(prepare(chats, cache_dir="")).parent == home / ".cache" / "gpt_jax"


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
    assert prepared.train[0].ids.dtype == np.uint32
    assert tk.decode(prepared.tokenizer, prepared.train[0].ids).count("<|end_of_text|>") > 100


def test_empty_splits_and_sources(chats):
    with pytest.raises(
        UserError,
        match=r"none of the 200 dialogues falls in the validation split .*0.0001: raise it, give data",
    ):
        prepare(chats, validation_fraction=0.0001)
    with pytest.raises(UserError, match=r"in the training split at data.validation_fraction=0.9999: lower it"):
        prepare(chats, validation_fraction=0.9999)
    for fraction in (0.0, 1.0):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            prepare(chats, validation_fraction=fraction)
    chats.write_text("\n")
    with pytest.raises(UserError, match="holds no dialogue and no text"):
        prepare(chats)
    assert not [path for path in (chats.parent / "cache").rglob("*") if path.is_file()]  # no tokenizer of nothing


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
    assert "data: 2 bad rows, dialogues or files skipped (data.on_error=skip):" in lines
    assert f"data:   {source}:22: the dialogue has no turn: an assistant turn must come last" in lines
    assert "data: 10 turns of weight 0 are context, never targets" in lines
    prepare(source, again.append, on_error="skip")
    assert again[1:] == [line for line in lines if "prepar" not in line and "training a tokenizer" not in line]
    assert sum(counts["dialogues"] for counts in prepared.stats.values()) == 20
    moved, there = tmp_path / "moved.jsonl", []
    shutil.copy(source, moved)
    prepare(str(moved), there.append, on_error="skip")
    assert there[1:] == [line.replace(str(source), str(moved)) for line in again[1:]] != again[1:]
    with pytest.raises(
        UserError, match=r"holds no dialogue and no text: 1 were skipped, first .*:1: the dialogue has no"
    ):
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
    [train] = prepared.train
    context = train.ids[train.assistant == tk.UNCOUNTED]
    assert tk.decode(prepared.tokenizer, context) == "WRONG<|user|>" * prepared.stats["train"]["dialogues"]


PEAK = """
import re, sys
from ml_collections import ConfigDict
from gpt_jax.data import cache_folder, token_cache
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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_source(tmp_path):
    """It grew by 4 to 5 MB; holding the ids of the larger source takes 33 MB more (tried)."""
    paths = []
    for name, dialogues in (("small.txt", 250), ("large.txt", 1_500)):
        paths.append(tmp_path / name)
        with paths[-1].open("w") as file:
            for number in range(dialogues):
                file.write(f"<|user|>word {number}<|assistant|>{' answers' * 500}<|end_of_text|>\n")
    assert paths[1].stat().st_size > 6e6
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), *map(str, paths)],
        capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "RAYON_NUM_THREADS": "1"},  # each of the tokenizer's threads holds texts
    )  # fmt: skip
    small, large = map(int, run.stdout.split())
    assert large - small < 16_000  # KiB
