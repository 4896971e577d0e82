"""Continuous batching: places in the queue and the batch, readers that are slow or gone, a device that fails."""

import threading
import time
from concurrent.futures import Future
from queue import SimpleQueue

import pytest
from fake_decoder import FakeDecoder, make_tokenizer
from waiting import PATIENCE, wait_for

from gpt_jax.data.tokenizer import encode, vocabulary_bytes
from gpt_jax.errors import UserError
from gpt_jax.inference.engine import Engine, EngineFailed, QueueFull, Request
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.text_stream import TextStream
from vk_kernels.errors import DeviceLostError

TOKENIZER = make_tokenizer()
VOCABULARY = vocabulary_bytes(TOKENIZER, TOKENIZER.get_vocab_size())
ENDS = (0, 1, 2)


class Gate:
    """Lets a decoder decode so many chunks."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)

    def __call__(self, number: int) -> None:
        assert self.allowed.acquire(timeout=PATIENCE)

    def open(self, chunks: int = 1000) -> None:
        self.allowed.release(chunks)


def open_engine(say=lambda prompt, options: prompt.upper(), *, max_waiting=100, **options) -> tuple[Engine, list]:
    made = []

    def open_decoder(stack):
        made.append(FakeDecoder(TOKENIZER, say, **options))
        return made[0]

    return Engine(open_decoder, lambda stop: TextStream(VOCABULARY, stop), max_waiting=max_waiting), made


def ask(text: str, **options) -> Request:
    return Request(encode(TOKENIZER, text), SamplingOptions(**{"seed": 1} | options), ENDS)


def read(events: SimpleQueue) -> tuple[str, str | None]:
    """The text of a request's events, and why it ended."""
    text = ""
    while True:
        event = events.get(timeout=PATIENCE)
        text += event.text
        if event.is_last:
            return text, event.reason or event.error


def test_requests_share_the_batch_and_each_gets_its_own_text():
    engine, made = open_engine(slots=3)
    with engine:
        queues = [SimpleQueue() for _ in range(10)]
        for i, queue in enumerate(queues):
            engine.submit(ask(f"text number {i} " * (i + 1), max_tokens=500), queue.put)
        for i, queue in enumerate(queues):
            assert read(queue) == (f"TEXT NUMBER {i} " * (i + 1), "stop")
    assert made[0].most_at_once == 3


def test_a_text_that_comes_later_joins_those_that_run():
    gate = Gate()
    engine, made = open_engine(lambda prompt, options: "long " * 30, pace=gate)
    with engine:
        early, late = SimpleQueue(), SimpleQueue()
        engine.submit(ask("a", max_tokens=100), early.put)
        gate.open(2)
        wait_for(lambda: made[0].chunks == 2)
        engine.submit(ask("b", max_tokens=4), late.put)
        gate.open()
        assert read(late)[1] == "length"
        assert read(early)[0].startswith("long long")
        assert made[0].most_at_once == 2


def test_the_queue_is_bounded_and_first_come_is_first_served():
    gate, order = Gate(), []
    engine, _ = open_engine(slots=1, max_waiting=2, pace=gate)
    with engine:
        engine.submit(ask("a"), lambda event: order.append("a") if event.is_last else None)
        wait_for(lambda: engine.running == 1)
        for name in "bc":
            engine.submit(ask(name), lambda event, name=name: order.append(name) if event.is_last else None)
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit(ask("d"), print)
        gate.open()
        wait_for(lambda: len(order) == 3)
    assert order == ["a", "b", "c"]


def test_who_finds_a_free_slot_does_not_wait():
    gate, ended = Gate(), []
    engine, _ = open_engine(slots=2, max_waiting=0, pace=gate)
    with engine:
        for name in "ab":
            engine.submit(ask(name), lambda event: ended.append(event) if event.is_last else None)
        with pytest.raises(QueueFull, match="0 requests wait already"):
            engine.submit(ask("c"), print)
        gate.open()
        wait_for(lambda: len(ended) == 2)


def test_a_reader_that_reads_nothing_holds_nobody_up():
    engine, _ = open_engine(lambda prompt, options: "word " * 20, slots=2)
    with engine:
        idle = engine.stream(ask("x", max_tokens=100))
        next(idle)
        for _ in range(5):
            assert "".join(event.text for event in engine.stream(ask("y", max_tokens=100))) == "word " * 20
        assert "".join(event.text for event in idle).endswith("word ")


def test_who_leaves_frees_the_place_in_the_batch_and_in_the_queue():
    gate = Gate()
    engine, made = open_engine(lambda prompt, options: "long " * 30, slots=1, max_waiting=1, pace=gate)
    with engine:
        leaving, waiting, staying = SimpleQueue(), SimpleQueue(), SimpleQueue()
        first = engine.submit(ask("a", max_tokens=100), leaving.put)
        wait_for(lambda: engine.running == 1)
        second = engine.submit(ask("b"), waiting.put)
        second.cancel()
        assert read(waiting) == ("", "cancelled")
        engine.submit(ask("c", max_tokens=2), staying.put)
        first.cancel()
        first.cancel()
        gate.open()
        assert read(staying)[1] == "length"
        assert read(leaving)[1] == "cancelled"
    assert made[0].chunks <= 3


def test_a_stream_that_is_closed_is_cancelled():
    engine, made = open_engine(lambda prompt, options: "long " * 30)
    with engine:
        stream = engine.stream(ask("a", max_tokens=100))
        next(stream)
        stream.close()
        wait_for(lambda: engine.running == 0 and not made[0].texts)


def interrupt_the_next(engine: Engine, monkeypatch) -> None:
    """Ctrl-C just when something has come into the queue."""
    told = engine._changed.notify_all

    def tell_and_interrupt():
        monkeypatch.undo()
        told()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._changed, "notify_all", tell_and_interrupt)


def test_an_interrupt_as_a_stream_begins_leaves_no_text_behind(monkeypatch):
    gate = Gate()
    engine, _ = open_engine(lambda prompt, options: "long " * 60, pace=gate)
    with engine:
        interrupt_the_next(engine, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            next(engine.stream(ask("a", max_tokens=300)))
        gate.open(1)
        wait_for(lambda: not engine.waiting and not engine.running)
        gate.open()


def test_an_interrupt_as_a_task_begins_takes_it_back(monkeypatch):
    gate, done = Gate(), []
    engine, _ = open_engine(lambda prompt, options: "long " * 60, pace=gate)
    with engine:
        queue = SimpleQueue()
        engine.submit(ask("a", max_tokens=300), queue.put)
        wait_for(lambda: engine.running)
        interrupt_the_next(engine, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            engine.run(lambda decoder: done.append("first"))
        gate.open()
        engine.run(lambda decoder: done.append("second"))
    assert done == ["second"]


def test_a_stop_string_ends_the_text_and_frees_its_slot():
    engine, made = open_engine(lambda prompt, options: "one two three four five", chunk=3)
    with engine:
        events = list(engine.stream(ask("a", max_tokens=90, stop=("three",))))
        wait_for(lambda: not made[0].texts)
    assert ("".join(event.text for event in events), events[-1].reason) == ("one two ", "stop")


def test_log_probabilities_come_with_their_tokens():
    engine, _ = open_engine(lambda prompt, options: "an answer")
    with engine:
        events = list(engine.stream(ask("a", max_tokens=90, logprobs=2)))
    tokens = [drawn for event in events for drawn in event.tokens]
    assert [drawn.token for drawn in tokens] == encode(TOKENIZER, "an answer")
    assert all(drawn.logprob == pytest.approx(-0.6931, abs=1e-4) for drawn in tokens)
    assert all(len(drawn.alternatives) == 2 for drawn in tokens)


@pytest.mark.parametrize("number", [float("-inf"), float("nan")])
def test_a_token_that_cannot_be_is_a_line_and_no_text_and_costs_no_other_one(number):
    gate = Gate()
    engine, made = open_engine(lambda prompt, options: "long " * 30, pace=gate)
    with engine:
        overflown, sound = SimpleQueue(), SimpleQueue()
        engine.submit(ask("a", max_tokens=9), overflown.put)
        wait_for(lambda: made[0].texts)
        engine.submit(ask("b", max_tokens=9), sound.put)
        real = made[0].decode
        made[0].decode = lambda **options: {
            slot: piece if slot else piece._replace(logprobs=[number] * len(piece.tokens))
            for slot, piece in real(**options).items()
        }
        gate.open()
        _, error = read(overflown)
        assert "no token a probability" in error
        assert read(sound)[1] == "length"
        wait_for(lambda: not made[0].texts)


def test_a_device_that_fails_fails_the_requests_with_one_line(capsys):
    def fail(number):
        if number == 2:
            raise DeviceLostError("the device was lost")

    engine, _ = open_engine(lambda prompt, options: "long " * 30, slots=1, pace=fail)
    with engine:
        running, waiting = SimpleQueue(), SimpleQueue()
        engine.submit(ask("a", max_tokens=100), running.put)
        engine.submit(ask("b"), waiting.put)
        assert read(running)[1] == read(waiting)[1] == "the device was lost"
        wait_for(lambda: engine.failure == "the device was lost")
        for call in (lambda: engine.submit(ask("c"), print), lambda: engine.run(lambda decoder: None)):
            with pytest.raises(EngineFailed, match="the device was lost"):
                call()
    assert capsys.readouterr().err == ""


def test_a_mistake_of_ours_is_told_in_full_once(capsys):
    engine, _ = open_engine(lambda prompt, options: 1 / 0)
    with engine:
        [event] = engine.stream(ask("a"))
    assert event.error == "division by zero"
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1


def test_a_request_that_the_decoder_refuses_costs_no_other_one():
    engine, _ = open_engine()
    with engine:
        [event] = engine.stream(ask("z" * 500))
        assert event.error.startswith("a prompt has 1 to 400 tokens")
        assert "".join(event.text for event in engine.stream(ask("b"))) == "B"


def test_a_decoder_that_does_not_open_is_told_where_it_was_asked_for():
    def refuse(stack):
        raise UserError("there is no device")

    with pytest.raises(UserError, match="there is no device"):
        Engine(refuse, print, max_waiting=1)


def test_ctrl_c_while_a_decoder_opens_waits_for_it_and_gives_it_up(monkeypatch):
    """A process that ends while a thread of it compiles is aborted."""
    closed = []

    def open_slowly(stack):
        stack.callback(closed.append, True)
        time.sleep(0.05)
        return FakeDecoder(TOKENIZER, print)

    def interrupted(future, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(open_slowly, print, max_waiting=1)
    assert closed == [True]


def test_closing_fails_what_is_on_its_way():
    gate = Gate()
    engine, _ = open_engine(lambda prompt, options: "long " * 30, slots=1, pace=gate)
    running, waiting = SimpleQueue(), SimpleQueue()
    engine.submit(ask("a", max_tokens=100), running.put)
    engine.submit(ask("b"), waiting.put)
    gate.open(1)
    opening = threading.Thread(target=lambda: (wait_for(lambda: engine._closing), gate.open()))
    opening.start()
    engine.close()
    opening.join()
    assert read(running)[1] == read(waiting)[1] == "the server is stopping"


def test_a_task_waits_until_no_text_runs():
    gate = Gate()
    engine, made = open_engine(slots=2, pace=gate)
    with engine:
        events = SimpleQueue()
        engine.submit(ask("a" * 9, max_tokens=100), events.put)
        wait_for(lambda: engine.running == 1)
        gate.open()
        assert engine.run(lambda decoder: (decoder is made[0], len(decoder.texts))) == (True, 0)
        assert read(events)[1] == "stop"
