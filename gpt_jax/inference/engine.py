"""Continuous batching: many requests share one decoding batch, each in a slot from its turn until its end.

One thread owns the decoder. Between two chunks it frees the slots of texts that ended or were cancelled, fills them
from a bounded queue, first come first served, and hands each reader its piece. It waits for nobody: a piece is put into
its reader's own buffer, which holds at most what one block of text has, so a slow reader costs others nothing.
"""

import contextlib
import math
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from gpt_jax.backend import describe, is_device_error
from gpt_jax.inference.decoder import Piece
from gpt_jax.inference.sampling import SamplingOptions

NO_TOKEN = "the model gives no token a probability: its numbers overflow here; take another checkpoint of the run"
CANCELLED = "cancelled"  # a reason beside the decoder's 'stop' and 'length'


class Request(NamedTuple):
    """A prompt as token ids, how to continue it, and the tokens that end it."""

    tokens: Sequence[int]
    options: SamplingOptions
    end_tokens: Sequence[int] = ()


class DrawnToken(NamedTuple):
    """A token of an answer, its log-probability, and the likeliest ones at its place with theirs, if asked for."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """A piece of a text, as its reader gets it.

    text: new characters. tokens: drawn since the last event, without one that ends the text. reason: why the text has
    ended: stop, length or cancelled; None: it goes on. error: a line that says why it failed, and nothing more comes.
    """

    text: str = ""
    tokens: Sequence[DrawnToken] = ()
    reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.reason is not None or self.error is not None


class Detokenizer(Protocol):
    """Token ids to text, piece by piece; see `text_stream`."""

    stopped: bool

    def feed(self, tokens: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class QueueFull(Exception):
    """Raised where as many requests wait as may."""


class EngineFailed(Exception):
    """The device failed; the message is one line, and no request will be answered."""


class Generation:
    """A request on its way: waiting, in a slot, or ended."""

    def __init__(self, engine: "Engine", request: Request, deliver: Callable[[Event], None]) -> None:
        self._engine, self._deliver = engine, deliver
        self.request = request
        self.cancelled = self.ended = False
        self.text: Detokenizer | None = None

    def cancel(self) -> None:
        """Ends it as soon as may be, if it has not ended; its place is free then. From any thread, any number of times.

        What comes after may still be some events, the last of which has the reason `cancelled`.
        """
        self._engine._cancel(self)

    def deliver(self, event: Event) -> None:
        """Hands an event to the reader, none after the last. Of the engine's thread."""
        if not self.ended:
            self.ended = event.is_last
            self._deliver(event)


class Engine:
    """Answers requests with one decoder, in a thread that owns it. Use it as a context manager.

    Args:
      open_decoder: makes the decoder, in the thread: a backend's settings are of the thread that entered them. What the
        decoder needs until the end is registered with the stack that it is given.
      open_text: a `Detokenizer` that stops at the given strings.
      max_waiting: how many requests may wait for a slot, beside those for which one is free.

    Raises:
      What `open_decoder` raises.
    """

    def __init__(
        self,
        open_decoder: Callable[[contextlib.ExitStack], Any],
        open_text: Callable[[Sequence[str]], Detokenizer],
        *,
        max_waiting: int,
    ) -> None:
        self.max_waiting = max_waiting
        self.failure: str | None = None  # the line of a device that failed
        self._open_text = open_text
        # Guards all below. Callers take it by itself: a Condition that Ctrl-C meets once it has taken its lock, before
        # the block under it, would leave it taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}  # by slot
        self._tasks: deque[tuple[Callable[[Any], Any], Future]] = deque()
        self._closing = False
        self._slots = 0  # of the decoder
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._own_decoder, args=(open_decoder, opened), name="engine", daemon=True
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self.close()  # Ctrl-C: a process that ends while a thread of it compiles is aborted
            raise

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._running)

    @property
    def capacity(self) -> int:
        """The most requests that it has at a time, with a slot or without."""
        return self._slots + self.max_waiting

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Generation:
        """Puts a request into the queue.

        Args:
          deliver: takes each event, in the engine's thread, which it must not hold up.

        Raises:
          QueueFull: too many wait already.
          EngineFailed: the device has failed, or the engine is closed.
        """
        generation = Generation(self, request, deliver)
        self._submit(generation)
        return generation

    def _submit(self, generation: Generation) -> None:
        with self._lock:
            self._check()
            if len(self._waiting) + len(self._running) >= self.capacity:
                raise QueueFull(f"{self.max_waiting} requests wait already, which is the limit: try again later")
            self._waiting.append(generation)
            self._changed.notify_all()

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of a request; closing the iterator, or an exception while it waits, cancels it.

        Raises:
          QueueFull, EngineFailed: as `submit`.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        generation = Generation(self, request, events.put)
        try:  # from here on, not from its return: an interrupt in between would leave the request to itself
            self._submit(generation)
            while True:
                event = events.get()
                yield event
                if event.is_last:
                    return
        finally:
            generation.cancel()

    def run(self, task: Callable[[Any], Any]) -> Any:
        """The result of `task(decoder)`, called in the engine's thread between two chunks, when no text is in a slot.

        An exception while it waits, as that of Ctrl-C, takes the task back if it has not begun; else it is done all
        the same.

        Raises:
          EngineFailed: as `submit`. And what the task raises.
        """
        done: Future[Any] = Future()
        try:
            with self._lock:
                self._check()
                self._tasks.append((task, done))
                self._changed.notify_all()
            return done.result()
        finally:
            done.cancel()

    def close(self) -> None:
        """Fails what is on its way with a line, and gives the decoder up. May be called again."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self.failure is not None or self._closing:
            raise EngineFailed(self.failure or "the engine is closed")

    def _cancel(self, generation: Generation) -> None:
        with self._lock:
            generation.cancelled = True
            if generation in self._waiting:
                self._waiting.remove(generation)
                generation.deliver(Event(reason=CANCELLED))
            self._changed.notify_all()

    # From here on: the engine's thread.

    def _own_decoder(self, open_decoder: Callable[[contextlib.ExitStack], Any], opened: Future) -> None:
        with contextlib.ExitStack() as stack:
            try:
                decoder = open_decoder(stack)
            except BaseException as error:
                opened.set_exception(error)
                return
            self._slots = decoder.slots
            opened.set_result(None)
            failure = "the server is stopping"
            try:
                while self._await_work():
                    self._refill(decoder)
                    if self._running:
                        self._decode(decoder)
            except Exception as error:
                if not is_device_error(error):  # a mistake of ours, which is told in full once
                    traceback.print_exc(file=sys.stderr)
                failure = describe(error)
                self.failure = failure
            finally:
                self._end_all(failure)

    def _await_work(self) -> bool:
        """Waits until there is something to do; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._running or self._tasks)
            return not self._closing

    def _refill(self, decoder: Any) -> None:
        """Frees the slots of cancelled texts, does the tasks, and gives free slots to those that wait."""
        for slot, generation in list(self._running.items()):
            if generation.cancelled:
                self._release(decoder, slot, Event(reason=CANCELLED))
        while not self._running and self._tasks:
            task, done = self._tasks.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(task(decoder))
            except BaseException as error:
                done.set_exception(error)
        for slot in decoder.free_slots if not self._tasks else ():
            with self._changed:
                if not self._waiting:
                    return
                generation = self._waiting.popleft()
                self._running[slot] = generation
            request = generation.request
            generation.text = self._open_text(request.options.stop)
            try:
                decoder.insert(
                    slot,
                    request.tokens,
                    request.options,
                    max_tokens=request.options.max_tokens,
                    end_tokens=request.end_tokens,
                )
            except ValueError as error:  # a request that should not have come this far costs no other one
                with self._changed:
                    del self._running[slot]
                generation.deliver(Event(error=describe(error)))

    def _decode(self, decoder: Any) -> None:
        # Ahead of what is read, unless somebody waits for a slot: one that this chunk frees is idle in the next.
        for slot, piece in decoder.decode(ahead=not self._waiting).items():
            event = next_event(self._running[slot].text, piece)
            if event.is_last:
                self._release(decoder, slot, event)
            else:
                self._running[slot].deliver(event)

    def _release(self, decoder: Any, slot: int, last: Event) -> None:
        decoder.release(slot)
        with self._changed:
            generation = self._running.pop(slot)
        generation.deliver(last)

    def _end_all(self, failure: str) -> None:
        with self._changed:
            self._closing = True
            generations = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            tasks, self._tasks = list(self._tasks), deque()
        for generation in generations:
            generation.deliver(Event(error=failure))
        for _, done in tasks:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineFailed(failure))


def next_event(text: Detokenizer, piece: Piece) -> Event:
    """The event of what a chunk added to a text: characters that are sure, up to a stop string."""
    if not all(map(math.isfinite, piece.logprobs)):
        return Event(error=NO_TOKEN)
    drawn = zip(piece.tokens, piece.logprobs, piece.alternatives, strict=True)
    tokens = [DrawnToken(token, logprob, tuple(alternatives)) for token, logprob, alternatives in drawn]
    if piece.reason == "stop":  # its last token is the end's, which is no text
        tokens.pop()
    new = ""
    for i, token in enumerate(tokens):
        new += text.feed([token.token])
        if text.stopped:
            return Event(new, tokens[: i + 1], "stop")
    if piece.reason:
        new += text.finish()
    return Event(new, tokens, piece.reason)
