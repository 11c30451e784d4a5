"""Ctrl-C while a command still imports its libraries: one line and status 130, as later. To be imported first.

What is imported here takes time in which Ctrl-C would print a traceback, so it is only what Python itself has loaded.
"""

from __future__ import annotations

import os
import sys


def _end(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python would end with the signal's own status


sys.excepthook = _end
