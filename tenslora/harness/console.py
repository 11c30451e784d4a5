"""How log messages look on the console: as bare lines on a terminal, with their origin where they go to a file."""

from __future__ import annotations

import logging
import sys


class ConsoleFormatter(logging.Formatter):
    """A formatter for a handler that writes to standard output.

    On a terminal a message stands alone, after its level if that is at least WARNING. Where standard output is a file
    or a pipe, the formatter does what `logging.Formatter` does.
    """

    def format(self, record: logging.LogRecord) -> str:
        if not sys.stdout.isatty():
            return super().format(record)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        traceback = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{level}{record.getMessage()}{traceback}"
