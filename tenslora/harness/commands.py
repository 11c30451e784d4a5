"""The code that the commands ``python -m tenslora.harness.<name>`` share with the benchmarks, scripts and examples."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import io
import logging
import os
import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tenslora.errors import TensLoRAError, first_line, line_with_kind, require_path
from tenslora.files import require_no_device
from tenslora.harness.stop import Stop

CONF = Path(__file__).resolve().parents[2] / "conf"
"""The folder of the project's config files."""

FULL_ERROR = "HYDRA_FULL_ERROR"
"""The environment variable that asks for the traceback of an error, as in every application of Hydra: 1 for yes."""

CARRIAGE_RETURN = "ends in a carriage return, as every line of a file from Windows does; take it out (dos2unix)"
"""What is wrong with a word of the command line whose last character nobody sees."""

QUIET = ("torch.utils._pytree", "bitsandbytes")
"""Loggers whose warnings help nobody here: torch's of its next release when torchao is imported, and bitsandbytes' of
kernels that are not installed."""

OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""The numbers of the system's errors for a path that a user may not use, has no space for, or that is too long."""


NO_MORE_PROCESSES = ("can't start new thread", os.strerror(errno.EAGAIN))
"""What Python says where the system allows no more threads, and no more processes."""


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for the command line of a module.

    Args:
        module: the module's name, as in ``python -m <module>``, or its file, as in ``python <file>``.
        description: the module's docstring, which ``--help`` shows without changing its line breaks.
    """
    return _Parser(
        prog=f"python {module}" if module.endswith(".py") else f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        for word in sys.argv[1:] if args is None else args:
            if word.endswith("\r"):
                self.error(str(TensLoRAError(f"{word}: {CARRIAGE_RETURN}")))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if option := re.search(r"(--\w+): expected one argument$", message):
            message += f"; a value that begins with - is written {option[1]}=-..."
        super().error(message)


def whole_number(text: str) -> int:
    """The value of an option that counts something, for argparse.

    Args:
        text: the value, as the command line has it.

    Raises:
        ArgumentTypeError: if it is not a whole number of at least 1.
    """
    if not re.fullmatch("0*[1-9][0-9]{0,14}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{TensLoRAError(text)}: must be a whole number of at least 1")
    return int(text)


def thread_count(text: str) -> int:
    """The value of an option that says how many CPU threads torch may use, for argparse.

    Args:
        text: the value, as the command line has it.

    Raises:
        ArgumentTypeError: if it is not a whole number of at least 1, or far more than this machine has processors.
    """
    from tenslora.harness.training.processes import most_threads

    count, most = whole_number(text), most_threads()
    if count > most:
        raise argparse.ArgumentTypeError(f"{count}: must be at most {most}, four times the processors here")
    return count


def file_to_write(text: str) -> Path:
    """The value of an option that names a file to write at the end of a long computation, for argparse.

    Args:
        text: the value, as the command line has it. The folder that the file is to lie in is made.

    Raises:
        ArgumentTypeError: if such a file cannot be written.
    """
    from tenslora.harness.run_folder import check_writable

    path = Path(text)
    try:
        if not path.name or os.path.isdir(path):
            raise TensLoRAError(f"{text}: cannot be written (is a folder; must be the name of a file)")
        require_no_device(path)
        check_writable(path.parent)
    except TensLoRAError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that compute with a finished run's model.

    Args:
        parser: the command's parser.
    """
    parser.add_argument("run", type=path_argument, help="the folder of a finished run, with its result.json")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:<index>; default: the run's own")
    parser.add_argument("--checkpoint", help="where the backbone's weights are now, if they have moved since the run")


def path_argument(word: str) -> Path:
    """A path on a command line, for argparse. A shell puts the home in place of ~ only where the word begins with it.

    Args:
        word: the word, as it was typed.

    Raises:
        ArgumentTypeError: for an address such as s3://bucket, which would become a folder of that name, and for an
            empty word, as of a variable that is not set.
    """
    if not word:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return require_path("", os.path.expanduser(word))
    except TensLoRAError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from error


def prepare_process() -> None:
    """Put right how this process was started, or end it in one line where that cannot be.

    A standard output or error that the shell has closed becomes one that drops everything. Characters that the output's
    encoding lacks are printed as in Python. The loggers in `QUIET` are
    silenced. The backend of matplotlib that a notebook sets for all that it starts is taken away if it is not installed
    here: the commands write files alone. Python must not leave out assert statements or docstrings: Hydra's parser
    reads words inside its assert statements, and transformers builds docstrings from other docstrings.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.flags.optimize:
        sys.exit("error: python -O and PYTHONOPTIMIZE: must be left out; Hydra and transformers need what they remove")
    kind, _, module = os.environ.get("MPLBACKEND", "").partition("://")
    if kind == "module" and importlib.util.find_spec(module.partition(".")[0]) is None:
        del os.environ["MPLBACKEND"]
    for chatty in QUIET:
        logging.getLogger(chatty).setLevel(logging.ERROR)


def takes_one(group: str) -> bool:
    """Whether a group of conf/ takes a single option. Of the other groups, such as logger, Hydra merges several.

    Args:
        group: the name of the group; of another name it is False.
    """
    return (CONF / group).is_dir() and group not in ("logger", "experiment", "debug")


def several_settings(word: str) -> str | None:
    """The line for a word of the command line that holds several settings, as zsh passes the variable in `$S`.

    >>> several_settings("seed=1 trainer.epochs=2").endswith("write ${=S} in zsh, where bash takes $S")
    True
    >>> [several_settings(word) for word in ('dataset.name="a b=c"', '+hydra.job.env_set={A: "b=c"}', "a=b -c d")]
    [None, None, None]

    Args:
        word: the word, as Python gives it.
    """
    try:
        parts = shlex.split(word)
    except ValueError:  # a quotation mark without its other one
        return None
    options = [part for part in parts if re.fullmatch(r"-[a-z]|--[a-z-]+(=[\w./]*)?", part)]
    settings = [part for part in parts if re.match(r"[+~]*[A-Za-z_][\w./@]*=|~\w", part)]
    if len(parts) < 2 or not settings or len(options) + len(settings) < len(parts):
        return None
    from tenslora.harness.config.spelling import parsed  # Hydra is imported where it is used

    if not options and parsed(word):  # one value with braces, such as {A: "b=c"}
        return None
    return (
        f"{word}: is several settings in one word; each must be a word of its own; write ${{=S}} in zsh, where bash "
        f"takes $S"
    )


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


def line_of_the_environment(error: BaseException) -> str | None:
    """The line for an error in how Python was started; None for any other error.

    Args:
        error: the error, such as torch's import raises where no folder for temporary files can be written, where
            every warning is to be an error, or where there is no torch or an older one.
    """
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return "TMPDIR: must be a folder that can be written; there is no other for temporary files"
    if isinstance(error, (OSError, RuntimeError)) and any(words in str(error) for words in NO_MORE_PROCESSES):
        return "the system allows no more threads or processes (ulimit -u, or the limit of a container)"
    # Of a package that is missing, or whose version has other names. Of this project's own names, the place matters.
    if isinstance(error, ImportError) and error.name and error.name.partition(".")[0] != "tenslora":
        remedy = "sh run.sh python uses an environment that has every package in its version"
        return f"{sys.executable}: {first_line(error)}; {remedy}"
    if isinstance(error, Warning) and sys.warnoptions:
        said = line_with_kind(error)
        return f"PYTHONWARNINGS and python -W: must not make errors of the libraries' warnings ({said})"
    return None


def unforeseen(error: BaseException) -> str:
    """The line for an error that is no mistake that the harness knows: its type, its message, and where it arose.

    Where is the last place outside of Python's own modules and the installed packages, in this project or in code of
    the user's.

    Args:
        error: the error, as it was caught.
    """
    if line := line_of_the_environment(error):
        return line
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not os.path.abspath(frame.filename).startswith(installed) and not frame.filename.startswith("<")
    ]
    place = f"in {ours[-1].filename}, line {ours[-1].lineno}; " if ours else ""
    return str(TensLoRAError(f"{line_with_kind(error)} (unforeseen, {place}{FULL_ERROR}=1 shows the traceback)"))


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A context in which an error ends the process with status 1, and Ctrl-C or SIGTERM with 130, with one line each.

    HYDRA_FULL_ERROR=1 in the environment adds the traceback of an error.

    What the context prints belongs to it: a reader that has gone, as of ``| head``, ends the process without a word.
    """
    prepare_process()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # which warns of a new head
    with Stop() as stop:
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
            sys.exit(1)
        except (KeyboardInterrupt, Exception) as error:
            if stop.asked or isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            if os.environ.get(FULL_ERROR) == "1":
                raise
            sys.exit(f"error: {_line(error)}")


def _line(error: BaseException) -> str:
    if isinstance(error, TensLoRAError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OUT_OF_REACH:
        if error.filename is None:
            _drop_output()
        return str(TensLoRAError(f"{error.filename or 'the output'}: cannot be used ({error.strerror})"))
    return unforeseen(error)


def _drop_output() -> None:
    # Python flushes what is left when it ends, and would complain a second time.
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
