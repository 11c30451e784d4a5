"""The form that data from a JSON file must have, declared as a dataclass. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence, Set
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tenslora.errors import LARGEST_WHOLE, TensLoRAError

Form = TypeVar("Form")

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "null",
    tuple: "a list",
    list: "a list",
    Sequence: "a list",
    Set: "a list",
    dict: "an object",
}


def from_json(form: type[Form], data: Any, *, ignore_others: bool = False) -> Form:
    """Turn data that was read from JSON into an instance of a dataclass, after checking the type of every field.

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     alpha: float
    ...     ranks: tuple[int, ...] | None = None
    >>> from_json(Settings, {"alpha": 4, "ranks": [2, 3]})
    Settings(alpha=4.0, ranks=(2, 3))

    Args:
        form: a dataclass. A field may be declared as bool, int, float, str or None; as another such dataclass; as
            ``tuple[T, ...]``, ``list[T]``, ``Sequence[T]``, ``Set[T]`` or ``dict[str, T]`` of one of these; or
            as a union of them.
        data: what json.loads returned.
        ignore_others: whether `data` may have keys that are no fields of `form`. They are left out.

    Returns:
        The instance. All its numbers are finite.

    Raises:
        TensLoRAError: if `data` does not have that form, or for a value that the dataclass itself refuses. The message
            begins with the name of the field.
    """
    if not isinstance(data, dict):
        raise TensLoRAError(f"must be an object, not {shown(data)}")
    types, fields = get_type_hints(form), {field.name: field for field in dataclasses.fields(cast(Any, form))}
    for name in data:
        if name not in fields and not ignore_others:
            raise TensLoRAError(f"{shown(name)}: there is no such field")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = typed(types[name], data[name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TensLoRAError(f"{name}: is missing")
    return form(**values)


def shown(value: Any) -> str:
    """A value as a message quotes it: as JSON, and shortened if it is long.

    >>> shown([True, None, float("nan")]), shown("a" * 99)[-9:]
    ('[true, null, NaN]', 'aaaaaa...')

    Args:
        value: what json.loads returned.
    """
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return "lists within lists"
    return text if len(text) <= 80 else f"{text[:77]}..."


def typed(declared: Any, value: Any, name: str) -> Any:
    """Check the type of one value.

    Args:
        declared: its type, one of those that a field of `from_json` may have.
        value: what json.loads returned.
        name: what the value is called, for the message.

    Returns:
        The value, with lists as tuples where a tuple is declared, and dataclasses in place of objects.

    Raises:
        TensLoRAError: if it has another type.
    """
    options = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    for option in options:
        kind, parts = get_origin(option) or option, get_args(option)
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            try:
                return from_json(cast(type[Any], kind), value)
            except TensLoRAError as error:
                raise TensLoRAError(f"{name}.{error}") from error
        if kind in (tuple, list, Sequence, Set) and isinstance(value, list):
            items = [typed(parts[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
            return tuple(items) if kind is tuple else items
        if kind is dict and isinstance(value, dict):
            return {key: typed(parts[1], item, f"{name}[{shown(key)}]") for key, item in value.items()}
        if kind is float and isinstance(value, float) and math.isfinite(value):
            return float(value)
        if kind in (int, float) and type(value) is int and abs(value) <= LARGEST_WHOLE:
            return kind(value)
        if kind in (bool, str, type(None)) and type(value) is kind:
            return value
    if type(value) is int and int in options and abs(value) > LARGEST_WHOLE:
        raise TensLoRAError(f"{name}={shown(value)}: must be from -{LARGEST_WHOLE:,} to {LARGEST_WHOLE:,}")
    wanted = dict.fromkeys(_NAMES.get(get_origin(option) or option, "an object") for option in options)
    raise TensLoRAError(f"{name}={shown(value)}: must be {' or '.join(wanted)}")
