"""A queue for a receiver that may fail, be slow or hang: whoever puts something in never waits for it."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from gpt_jax.log import Log

T = TypeVar("T")
SIZE = 1000  # items that wait at most


class Outbox(Generic[T]):
    """Hands items to a receiver, in a thread of its own; what goes wrong is told once each, in the caller's thread."""

    def __init__(self, name: str, send: Callable[[T], None], log: Log, size: int = SIZE) -> None:
        """Starts the thread.

        Args:
          name: of the receiver, for messages.
          send: hands over one item; what it raises is told, and the next item is tried.
          log: is called in `put` and `close` only.
          size: items that wait at most; more are dropped.
        """
        self._name, self._send, self._log = name, send, log
        self._items: queue.Queue[T] = queue.Queue(size)
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._told: set[str] = set()
        self.dropped = 0
        threading.Thread(target=self._run, name=f"outbox of {name}", daemon=True).start()

    def put(self, item: T) -> None:
        """Queues an item, or drops it where too many wait."""
        self._tell()
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self.dropped += 1
            self.note("takes nothing at the moment: what does not fit into its queue is dropped")
            self._tell()

    def note(self, text: str) -> None:
        """Has something told, from any thread, if it was not told before."""
        self._notices.put(text)

    def close(self, patience: float) -> bool:
        """Waits until all is handed over, but not longer than `patience` seconds; whether it is."""
        end = time.monotonic() + patience
        with self._items.all_tasks_done:
            while self._items.unfinished_tasks and (left := end - time.monotonic()) > 0:
                self._items.all_tasks_done.wait(left)
        self._tell()
        return not self._items.unfinished_tasks

    def _tell(self) -> None:
        while not self._notices.empty():
            text = self._notices.get_nowait()
            if text not in self._told:
                self._told.add(text)
                self._log(f"{self._name} {text}")

    def _run(self) -> None:
        while True:
            item = self._items.get()
            try:
                self._send(item)
            except Exception as error:
                self.note(" ".join(f"failed: {error or type(error).__name__}".split()))
            finally:
                self._items.task_done()
