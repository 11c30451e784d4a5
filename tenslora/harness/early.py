"""Ctrl-C or SIGTERM while a command still imports its libraries: one line and status 130, as later. Imported first.

Where a library cannot be imported, such as torch without a folder for temporary files or in a folder that is gone, or
an older PEFT, one line says why.

What is imported before the hook is set takes time in which Ctrl-C would print a traceback, so it is only what Python
itself has loaded.
"""

from __future__ import annotations

import os
import sys


def _end(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt) or (_stop and _stop.asked):
        from tenslora.harness.stop import ignore_signals

        ignore_signals()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # Python would end with the signal's own status
    if (  # a TensLoRAError, which is not imported yet, is a ValueError
        isinstance(error, FileNotFoundError | ImportError | ValueError | Warning)
        and os.environ.get("HYDRA_FULL_ERROR") != "1"
    ):
        from tenslora.errors import TensLoRAError
        from tenslora.harness.commands import line_of_the_environment

        if line := str(error) if isinstance(error, TensLoRAError) else line_of_the_environment(error):
            print(f"error: {line}", file=sys.stderr)
            return
    sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


_stop: Stop | None = None
_taken_away: list[str] = []
_hook = sys.excepthook
sys.excepthook = _end

import contextlib  # noqa: E402  now that Ctrl-C is caught
from collections.abc import Iterator  # noqa: E402

from tenslora.harness.stop import Stop  # noqa: E402

try:
    os.getcwd()
except OSError as error:  # where torch cannot be imported
    sys.exit(f"error: the current folder: cannot be used ({error.strerror}); change to another")


def start_command() -> None:
    """Let SIGTERM do what Ctrl-C does from here on, and take no file of the current folder for a library.

    Only for a module that is run: a launcher ends its workers by SIGTERM. ``python -m`` looks for modules in the
    current folder first, where a user may have a datasets.py or a peft.py.
    """
    global _stop
    _stop = Stop().__enter__()
    with contextlib.suppress(OSError):  # of a current folder that is gone
        project = os.path.abspath(f"{__file__}/../../..")
        if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()) and os.getcwd() != project:
            _taken_away.append(sys.path.pop(0))


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """A context after which all is as before the import, for a program that has run the command as a module (runpy).

    A signal that a library has swallowed while it was imported ends the command here.
    """
    if _stop and _stop.asked:
        raise KeyboardInterrupt
    try:
        yield
    except KeyboardInterrupt:  # which is still to end the process
        raise
    except BaseException:
        _undo()
        raise
    _undo()


def _undo() -> None:
    if _stop:
        _stop.__exit__()
    sys.path[:0] = _taken_away
    _taken_away.clear()
    if sys.excepthook is _end:
        sys.excepthook = _hook
