"""How Ctrl-C, SIGTERM and a scheduler's notice end a command: by KeyboardInterrupt, so that it ends what it began."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from typing import Any

NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""The signals by which a terminal or a scheduler, such as Slurm, SGE or LSF, gives notice of the end."""


class Stop:
    """A context in which SIGTERM and the signals in `NOTICES` stop a command as Ctrl-C does.

    A signal of `NOTICES` for which the program has another handler, or which it ignores, is left alone. Afterwards the
    signals are handled as before.

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
            defaults = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(NOTICES, signal.SIG_DFL)}
            for number, default in defaults.items():
                own = signal.getsignal(number)
                if own == default or isinstance(own, Stop):  # a shell's background job ignores Ctrl-C
                    self._before[number] = signal.signal(number, self)
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
    """Ignore Ctrl-C, SIGTERM and the signals in `NOTICES` for the rest of the process."""
    for number in (signal.SIGINT, signal.SIGTERM, *NOTICES):
        signal.signal(number, signal.SIG_IGN)


def _is_ending() -> bool:
    # A library may have caught an earlier KeyboardInterrupt and gone on. Then no block that handles it is running.
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
