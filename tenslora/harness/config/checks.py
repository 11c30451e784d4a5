"""The ranges of settings, as types, and the one line that tells a user what is wrong with a setting."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, ValidationError

from tenslora.errors import TensLoRAError


def within(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> AfterValidator:
    """The finite numbers from `low` to `high`.

    Args:
        low: the smallest valid number.
        high: the largest valid number.
        above: whether `low` itself is invalid.
        below: whether `high` itself is invalid.
    """
    words = [f"{'above' if above else 'at least'} {low:g}"] if math.isfinite(low) else []
    words += [f"{'below' if below else 'at most'} {high:g}"] if math.isfinite(high) else ["finite"]

    def check(value: float | None) -> float | None:
        if value is None:
            return value
        inside = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not inside or not math.isfinite(value):
            raise ValueError(f"must be {' and '.join(words)}")
        return value

    return AfterValidator(check)


def one_of(valid: Sequence[str]) -> AfterValidator:
    """A name, or a list of names, of those given."""

    def check(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in [value] if isinstance(value, str) else value:
            if name not in valid:
                subject = "" if name == value else f"{name} "
                raise ValueError(f"{subject}must be one of {', '.join(valid)}")
        return value

    return AfterValidator(check)


def at_least_one(valid: Sequence[str]) -> AfterValidator:
    """A list that is not empty; `valid` tells the user what may stand in it."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"needs at least one of {', '.join(valid)}")
        return value

    return AfterValidator(check)


Count = Annotated[int, within(1)]
NonNegativeInt = Annotated[int, within(0)]
NonNegative = Annotated[float, within(0)]
BelowOne = Annotated[float, within(0, 1, below=True)]

_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "tuple": "must be a list, such as [4,4]",
    "dict": "must be a group of settings",
    "dataclass": "must be a group of settings",
    "too": "has the wrong number of items",
}
"""What a value has to be, by the first word of pydantic's name for the error."""


def in_one_line(error: ValidationError, schema: type) -> TensLoRAError:
    """The first thing that pydantic found as one line that names the setting, its value and what would be valid.

    Args:
        error: what pydantic raised.
        schema: the dataclass that was validated against.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if path[:1] == ["dataset"] and path[1:2] in (["image"], ["text"]):  # pydantic's tag for the kind of dataset
        del path[1]
    while path and path[-1].isdigit():  # an item of a list
        path.pop()
    setting, kind = ".".join(path), str(first["type"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, TensLoRAError):  # from one of the library's types; it begins with the name of its field
        return TensLoRAError(_as_typed(".".join(filter(None, (setting, str(cause))))))
    if kind == "unexpected_keyword_argument":
        [near] = difflib.get_close_matches(setting, list(_settings_of(schema)), n=1, cutoff=0.0)
        return TensLoRAError(_as_typed(f"{setting}: there is no such setting; did you mean {_as_typed(near)}?"))
    if kind == "missing":
        return TensLoRAError(_as_typed(f"{setting}: is missing"))
    reason = str(cause) if cause else _TYPES.get(kind.partition("_")[0], str(first["msg"]))
    return TensLoRAError(_as_typed(f"{setting}={_shown(first['input'])}: {reason}"))


def _as_typed(line: str) -> str:
    # What the library's AdapterConfig holds is in part a group of its own on the command line, and a group's option is
    # chosen by the group's name.
    line = re.sub(r"^adapter\.(?=(tensor_mode|factorization|rank_strategy|seed)\b)", "", line)
    return re.sub(r"^(rank_strategy|optimizer|logger|preset)\.name\b", r"\1", line)


def _settings_of(schema: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        groups = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(kind)]
        if groups:
            for group in groups:
                yield from _settings_of(group, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _shown(value: Any) -> str:
    # As it is written on the command line.
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(list(value) if isinstance(value, tuple) else value)
