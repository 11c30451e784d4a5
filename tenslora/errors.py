"""The error for everything that a user can put right."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

LARGEST_WHOLE = 2**53
"""A float holds every integer up to this one exactly. A number that counts something is far smaller."""

LONGEST_MESSAGE = 2000
"""The most characters of a message. What a message quotes may be an image or a whole text, which nobody would read."""


class TensLoRAError(ValueError):
    """Something the user asked for cannot be done.

    The message is one line that names the setting, its value and what would be valid.

    Args:
        message: the message. Line breaks and other characters that cannot be printed, which names in a file may have,
            are written as in Python: ``\\n``. Of more than `LONGEST_MESSAGE` characters, some in the middle are left
            out: the name is at the beginning, and what would be valid at the end.
    """

    def __init__(self, message: str) -> None:
        text = printable(str(message))
        super().__init__(text if len(text) <= LONGEST_MESSAGE else f"{text[:1500]}...{text[-400:]}")


def printable(text: str) -> str:
    """A text whose line breaks and other characters that cannot be printed are written as in Python.

    >>> printable("two\\nlines")
    'two\\\\nlines'

    Args:
        text: the text. It may hold what makes a terminal do something.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message.

    A first line that ends with a colon only announces the next one, which is then added. A line of more than 400
    characters, such as one that quotes a file, is cut. What makes a terminal write in bold or in colours is left out.

    >>> first_line(KeyError("swish"))  # whose message is the key alone
    "KeyError: 'swish'"
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    line = f"KeyError: {line}" if type(error) is KeyError and error.args else line
    return line if len(line) <= 400 else f"{line[:397]}..."


def line_with_kind(error: BaseException) -> str:
    """The type of an error and its `first_line`, which may begin with the type.

    >>> line_with_kind(KeyError("swish")), line_with_kind(OSError("no such file"))
    ("KeyError: 'swish'", 'OSError: no such file')
    """
    kind, line = type(error).__name__, first_line(error)
    return line if line.partition(":")[0] == kind else f"{kind}: {line}"


def os_reason(error: OSError) -> str:
    """Why a file or a folder could not be made, in a few words."""
    place = Path(str(error.filename))
    for link in (place, *place.parents) if error.errno in (errno.EEXIST, errno.ENOENT) else ():
        if link.is_symlink() and not link.exists():  # the system says only that it exists
            return f"{link} is a link to {link.readlink()}, which does not exist"
    if error.errno == errno.EEXIST and place.is_file():
        return "is a file; must be a folder"
    return str(error.strerror)


def require_one_of(setting: str, value: str, valid: Iterable[str]) -> None:
    """Check that a setting has one of its valid values. The message lists them, those that look like `value` first.

    Args:
        setting: the setting's name, for the message.
        value: the setting's value.
        valid: all valid values.

    Raises:
        TensLoRAError: if `value` is not a valid value.
    """
    names = list(valid)
    if not isinstance(value, str) or value not in names:
        alike = difflib.get_close_matches(str(value), names, n=len(names))
        ordered = dict.fromkeys([*alike, *names])
        raise TensLoRAError(f"{setting}={value}: must be one of {', '.join(ordered)}")


def require_type(name: str, value: Any, *kinds: type[Any]) -> None:
    """Check the type of an argument of a public function.

    Args:
        name: the argument's name, for the message.
        value: the argument.
        kinds: the types that it may have. An int is accepted for a float, and True or False only for a bool.

    Raises:
        TensLoRAError: if it has another type.
    """
    numbers: dict[type[Any], type[Any]] = {int: Integral, float: Real}  # numpy's numbers are numbers too
    is_bool = isinstance(value, bool)
    if not any(kind is bool if is_bool else isinstance(value, numbers.get(kind, kind)) for kind in kinds):
        names = ["None" if kind is type(None) else kind.__name__ for kind in kinds]
        again = " of another import of the package" if type(value).__name__ in names and not is_bool else ""
        raise TensLoRAError(f"{name}: must be of type {' or '.join(names)}, and is {_type_of(value)}{again}")


def require_path(name: str, value: Any) -> Path:
    """Turn an argument of a public function into a path.

    Args:
        name: the argument's name, for the message.
        value: the argument: text, or an object that stands for a path.

    Returns:
        The path.

    Raises:
        TensLoRAError: if it is neither, empty, or an address such as s3://bucket or a path from the home (~/), which
            would become a folder of that name, and for a character that no path has.
    """
    if isinstance(value, str) and not value:
        raise TensLoRAError(f"{name}='': must not be empty; the current folder is '.'")
    if isinstance(value, str) and "://" in value:
        raise TensLoRAError(f"{name}={value}: must be a path on disk, not an address")
    if isinstance(value, (str, Path)) and "\0" in str(value):
        raise TensLoRAError(f"{name}={value}: must be a path, which has no character NUL")
    if str(value).startswith("~/"):
        raise TensLoRAError(f"{name}={value}: must not begin with ~, which only a shell replaces by your home")
    try:
        os.fsencode(value)
        return Path(value)
    except TypeError as error:
        raise TensLoRAError(f"{name}: must be text or a Path, and is {_type_of(value)}") from error
    except UnicodeEncodeError as error:
        raise TensLoRAError(f"{name}={value!a}: must be a path, which has no such character") from error


def _type_of(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def require_numbers(settings: Any, *names: str, whole: bool = False) -> None:
    """Check that settings are numbers, before they are compared with their ranges.

    Numbers of other libraries, such as numpy's, become Python's own, because JSON can hold no others.

    Args:
        settings: the object that has the settings.
        names: the settings' names.
        whole: whether they must be whole numbers by their type.

    Raises:
        TensLoRAError: for a value of another type, truth values among them, for a number that no float can hold, and
            for a whole one beyond `LARGEST_WHOLE`, which no file is read with.
    """
    for name in names:
        value = getattr(settings, name)
        kind: type[Any] = type(value)
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise TensLoRAError(f"{name}={value!r}: must be a {'whole ' if whole else ''}number")
        try:
            as_float = float(value)
        except OverflowError as error:
            raise TensLoRAError(f"{name}: must be a number that a float can hold, below 1e308") from error
        if isinstance(value, Integral) and whole and abs(int(value)) > LARGEST_WHOLE:
            raise TensLoRAError(f"{name}={value}: must be from -{LARGEST_WHOLE:,} to {LARGEST_WHOLE:,}")
        own: int | float = int(value) if isinstance(value, Integral) else as_float
        if type(own) is not kind:
            object.__setattr__(settings, name, own)  # the settings are frozen
