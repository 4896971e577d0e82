"""Staging: copies between numpy and device memory that the host cannot map."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

from vk_kernels.runtime.command_buffer import CommandRecorder
from vk_kernels.runtime.memory import Buffer, Memory

STAGING_BYTES = 8 << 20  # each of the two slots


class Staging:
    """Copies between numpy and memory that the host cannot map, through two mapped slots in turn. Thread-safe."""

    def __init__(self, memory: Memory, recorder: Callable[[], contextlib.AbstractContextManager[CommandRecorder]]):
        """recorder: gives one for one submission."""
        self._memory, self._recorder = memory, recorder
        self._lock = threading.Lock()
        self._slots: list[Buffer] = []

    def _chunks(self, nbytes: int) -> Iterator[tuple[Buffer, int, int]]:
        """(slot, start, size) over `nbytes`; the slots exist from here on."""
        if not self._slots:
            self._slots = [self._memory.allocate(STAGING_BYTES, "host") for _ in range(2)]
        for i, start in enumerate(range(0, nbytes, STAGING_BYTES)):
            yield self._slots[i % 2], start, min(STAGING_BYTES, nbytes - start)

    def upload(self, buffer: Buffer, offset: int, source: np.ndarray) -> None:
        """Returns when `source` is in the slots, not when it is in `buffer`: later submissions come after that."""
        with self._lock:
            for slot, start, size in self._chunks(source.nbytes):
                slot.write(source[start : start + size])  # waits for the slot's last copy
                with self._recorder() as recorder:
                    recorder.copy(slot, buffer, size, 0, offset + start)
                    recorder.submit()

    def download(self, buffer: Buffer, offset: int, target: np.ndarray) -> None:
        """The copy of each chunk runs while the one before it is taken out of the other slot."""
        with self._lock:
            ready = None
            for slot, start, size in self._chunks(target.nbytes):
                with self._recorder() as recorder:
                    recorder.copy(buffer, slot, size, offset + start, 0)
                    recorder.submit()
                if ready:
                    self._take(*ready, target)
                ready = slot, start, size
            if ready:
                self._take(*ready, target)

    def _take(self, slot: Buffer, start: int, size: int, target: np.ndarray) -> None:
        self._memory.queue.wait(slot.last_use)
        target[start : start + size] = slot.block.bytes[slot.offset : slot.offset + size]
