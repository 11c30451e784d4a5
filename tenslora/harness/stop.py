"""How Ctrl-C and SIGTERM end a command: both raise KeyboardInterrupt, so that it can end what it began."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Stop:
    """A context in which SIGTERM stops a command as Ctrl-C does. Afterwards the signals are handled as before.

    Attributes:
        asked: whether one of the signals has come. Some libraries catch KeyboardInterrupt while they are imported, and
            fail later in another way.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self, *_: object) -> None:
        """Handle a signal."""
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

    def __reduce__(self) -> Any:
        return Stop, ()  # in another process it handles nothing
