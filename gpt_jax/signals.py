"""Signals to a run: Ctrl-C, SIGTERM and SIGHUP save and stop it, SIGUSR1 saves and lets it go on."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

# Windows knows the first two alone.
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SAVING = [getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal came before there was anything to save."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def interrupt(number: int, _: FrameType | None = None) -> NoReturn:
    """Raises Interrupted where the program stands: a handler that leaves by way of all that is open."""
    raise Interrupted(signal.Signals(number))


class StopSignal:
    """Turns signals into requests to the training loop, while it is entered.

    Until `defer`, a signal that stops raises Interrupted where the program stands, and again in `check` where a library
    swallowed that, or Python itself: what destructors and callbacks of its garbage collector raise (jax has one) goes
    no further, and only its traceback would be printed. From `defer` on the signal is noted in `received`, for the loop
    to save and stop; a second Ctrl-C then raises KeyboardInterrupt. SIGHUP stays ignored where it was, as under nohup.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = self._save_requested = False

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        for number in (*_STOPPING, *_SAVING):
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            handler = self._stop if number in _STOPPING else self._save
            self._previous[number] = signal.signal(number, handler)
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._previous_hook

    def check(self) -> None:
        """Raises Interrupted if a signal came before `defer`."""
        if self.received is not None and not self._deferred:
            raise Interrupted(self.received)

    def defer(self) -> None:
        """Notes signals from here on, where there is something to save."""
        self.check()
        self._deferred = True

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        taken, self._save_requested = self._save_requested, False
        return taken

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not self._deferred:
            raise Interrupted(self.received)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _swallowed(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            self._previous_hook(unraisable)

    def _save(self, *_: object) -> None:
        self._save_requested = True


def resend_swallowed() -> None:
    """Has a signal come again whose KeyboardInterrupt Python swallows, instead of its traceback being printed.

    Python does so in destructors and in callbacks of its garbage collector; jax has one.
    """
    print_unraisable = sys.unraisablehook

    def resend(number: int) -> None:
        if hasattr(signal, "pthread_kill"):  # to the thread that may be waiting, which a signal to another wakes not
            signal.pthread_kill(threading.main_thread().ident, number)
        else:
            signal.raise_signal(number)

    def look(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            print_unraisable(unraisable)
            return
        timer = threading.Timer(0.02, resend, (getattr(unraisable.exc_value, "number", signal.SIGINT),))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = look


def exit_on_interrupt() -> None:
    """Has Ctrl-C end the process at once, in one line: for the time of imports, which may swallow KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)
