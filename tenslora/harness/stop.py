"""How Ctrl-C and SIGTERM end a command: both raise KeyboardInterrupt, so that it can end what it began."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from typing import Any


class Stop:
    """A context in which SIGTERM stops a command as Ctrl-C does. Afterwards the signals are handled as before.

    Once a command has begun to end, further signals change nothing, so that an impatient user's second Ctrl-C does not
    break off what the first one tidies up.

    Attributes:
        asked: whether one of the signals has come. Some libraries catch KeyboardInterrupt while they are imported, and
            fail later in another way.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self, *_: object) -> None:
        """Handle a signal."""
        if not _is_ending():
            self.asked = True
            raise KeyboardInterrupt

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set a handler
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self)
            own = signal.getsignal(signal.SIGINT)
            if own is signal.default_int_handler or isinstance(own, Stop):  # a shell's background job ignores it
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # of a library in another language
                signal.signal(number, handler)
        self._before.clear()
        if _is_ending():  # a notebook goes on and takes signals again, a program comes to its atexit callbacks
            atexit.register(ignore_signals)

    def __reduce__(self) -> Any:
        return Stop, ()  # in another process it handles nothing


def ignore_signals() -> None:
    """Ignore Ctrl-C and SIGTERM for the rest of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _is_ending() -> bool:
    # A library may have caught an earlier KeyboardInterrupt and gone on. Then no block that handles it is running.
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
