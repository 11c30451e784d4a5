"""How log messages look on the console, as bare lines on a terminal, and the file that they go to with their origin."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tenslora.files import write_bytes


@contextmanager
def at_least(level: int, *loggers: str) -> Iterator[None]:
    """A context in which loggers pass on what has at least a level; afterwards they have the levels that they had.

    Args:
        level: the level.
        *loggers: the loggers' names.
    """
    before = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in before:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in before.items():
            logger.setLevel(own)


@contextmanager
def streams_that_are_open() -> Iterator[None]:
    """A context in which standard output and error are streams that drop everything, where a program has closed them.

    So is what is None, as in a program without a console.
    """
    with ExitStack() as stack:
        for name, redirected in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                stack.enter_context(redirected(io.StringIO()))
        yield


@contextmanager
def asking_nobody() -> Iterator[None]:
    """A context in which a library finds no terminal to ask at, as W&B does for a key.

    A sweep's progress bar would hide the question, and the sweep would wait without an end.
    """
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


class LogFile(logging.FileHandler):
    """A handler that writes to a file, in UTF-8. What is no text, as a folder's name may be, is written in escapes.

    A pipe of that name is refused, because to open it is to wait for a reader. A file that is also elsewhere, in a
    backup of hard links or in DVC's cache, becomes one of its own first. So do the files in .hydra, which Hydra writes
    once the log is open.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        if path.is_fifo():
            raise FileExistsError(errno.EEXIST, "Is a pipe", self.baseFilename)
        for file in (path, *path.parent.glob(".hydra/*.yaml")):
            if file.is_file() and (file.is_symlink() or file.stat().st_nlink > 1):
                write_bytes(file, file.read_bytes())
        return super()._open()


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
