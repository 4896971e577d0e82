"""Batches: deterministic, resumable, every target once an epoch."""

import threading

import numpy as np
import pytest
from small_cache import prepare
from waiting import PATIENCE

from gpt_jax.data import token_cache
from gpt_jax.data.batches import MASKED, evaluation_batches, loader, windows
from gpt_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two thousand dialogues of the user's own, of a few lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.txt"
    lines = (
        f"<|user|>{'word ' * (n % 7)}{n}<|assistant|>{'answer ' * (n % 11)}{n}<|end_of_text|>\n" for n in range(2000)
    )
    path.write_text("".join(lines))
    return prepare(path)


def stream(count, assistant=None):
    """Tokens 0, 1, 2, ..., so that a batch shows where it comes from."""
    assistant = np.zeros(count) if assistant is None else assistant
    return token_cache.Tokens(np.arange(count, dtype=np.uint16), np.asarray(assistant, np.uint8))


def assert_same(one, two):
    np.testing.assert_array_equal(one["inputs"], two["inputs"])
    np.testing.assert_array_equal(one["targets"], two["targets"])


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
    thread.join(timeout=PATIENCE)
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
    all_ids = np.asarray(prepared.validation[0].ids).astype(np.int32)
    # Positions instead of ids, so that each target is found again in the stream.
    positions = token_cache.Tokens(np.arange(len(all_ids), dtype=np.uint32), prepared.validation[0].assistant)
    where = windows(positions, targets="assistant", **shape)
    masked = windows(prepared.validation[0], targets="assistant", **shape)
    starts_inside = 0
    for number in range(50):
        position = where[number]["inputs"] + 1
        expected = np.where(prepared.validation[0].assistant[position], all_ids[position], MASKED)
        np.testing.assert_array_equal(masked[number]["targets"], expected)
        starts_inside += (prepared.validation[0].assistant[position[:, 0]] & (all_ids[position[:, 0]] > 2)).sum()
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
    one, two = (evaluation_batches(prepared.validation[0], **shape) for _ in range(2))
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
