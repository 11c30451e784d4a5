"""Ctrl-C while a command still imports its libraries: one line and status 130, as later. To be imported first.

Without a folder for temporary files torch cannot be imported, which is one line too.

What is imported here takes time in which Ctrl-C would print a traceback, so it is only what Python itself has loaded.
"""

from __future__ import annotations

import os
import sys


def _end(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if isinstance(error, FileNotFoundError) and os.environ.get("HYDRA_FULL_ERROR") != "1":
        from tenslora.harness.commands import line_without_temporary_folder

        if line := line_without_temporary_folder(error):
            print(f"error: {line}", file=sys.stderr)
            return
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python would end with the signal's own status


sys.excepthook = _end
