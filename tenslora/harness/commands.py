"""The code that the commands ``python -m tenslora.harness.<name>`` share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator

from tenslora.errors import TensLoRAError


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


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A context in which a user's mistake ends the process with status 1 and one line on standard error."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
