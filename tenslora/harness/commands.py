"""The code that the commands ``python -m tenslora.harness.<name>`` share."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tenslora.errors import TensLoRAError

QUIET = ("transformers", "torch.utils._pytree", "bitsandbytes")
"""Loggers whose warnings do not help a user of the commands. transformers warns of a new head, torch of its next
release when torchao is imported, and bitsandbytes of kernels that are not installed."""

OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""The numbers of the system's errors for a path that a user may not use, has no space for, or that is too long."""


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for the command line of a module.

    Args:
        module: the module's name, as in ``python -m <module>``.
        description: the module's docstring, which ``--help`` shows without changing its line breaks.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that compute with a finished run's model.

    Args:
        parser: the command's parser.
    """
    parser.add_argument("run", type=Path, help="the folder of a finished run, with its result.json")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:<index>; default: the run's own")
    parser.add_argument("--checkpoint", help="where the backbone's weights are now, if they have moved since the run")


def open_missing_streams() -> None:
    """Give a process whose standard output or error the shell has closed one that drops everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def is_text(word: str) -> bool:
    """Whether a word of the command line is text in UTF-8. The bytes of another encoding no file of a run could hold.

    Args:
        word: the word, as Python gives it.
    """
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A context in which a user's mistake ends the process with status 1, and Ctrl-C with 130, with one line each.

    What the context prints belongs to it: characters that the terminal's encoding lacks are printed as in Python, and a
    reader that has gone, as of ``| head``, ends the process without a word.
    """
    open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for chatty in QUIET:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        _require_current_folder()
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in OUT_OF_REACH:
            raise
        if error.filename is None:
            _drop_output()
        place = error.filename or "the output"
        sys.exit(f"error: {TensLoRAError(f'{place}: cannot be used ({error.strerror})')}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _require_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise TensLoRAError(f"the current folder: cannot be used ({error.strerror}); change to another") from error


def _drop_output() -> None:
    # Python flushes what is left when it ends, and would complain a second time.
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
