"""Types for the ranges of settings, and the line that tells a user what is wrong with a setting."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, ValidationError

from tenslora.errors import TensLoRAError

LARGEST = 1e9
"""The largest number that a setting can have where its meaning sets no bound. Products of four fit into a float32."""


def within(
    low: float = -LARGEST,
    high: float = LARGEST,
    *,
    above: bool = False,
    below: bool = False,
    or_null: bool = False,
) -> AfterValidator:
    """A validator that accepts the finite numbers from `low` to `high`.

    Args:
        low: the smallest valid number.
        high: the largest valid number.
        above: whether `low` itself is invalid.
        below: whether `high` itself is invalid.
        or_null: whether None is valid too.
    """
    lower, upper = f"{'above' if above else 'at least'} {low}", f"{'below' if below else 'at most'} {high}"
    ending = ", or null" if or_null else ""
    # A bound that is only there for safety is not told to somebody who is far from it.
    bounds = " and ".join([*([lower] if low > -LARGEST else []), *([upper] if high < LARGEST else [])])

    def check(value: float | None) -> float | None:
        if value is None:
            return value
        if isinstance(value, float) and not math.isfinite(value):  # an int may be too large for a float
            raise ValueError(f"must be {', '.join(filter(None, ['a finite number', bounds]))}{ending}")
        if not (low < value if above else low <= value):
            raise ValueError(f"must be {bounds or lower}{ending}")
        if not (value < high if below else value <= high):
            raise ValueError(f"must be {bounds if high < LARGEST else upper}{ending}")
        return value

    return AfterValidator(check)


def one_of(valid: Collection[str | bool]) -> AfterValidator:
    """A validator that accepts a valid name, or a list of valid names. It accepts None where the field's type does.

    Args:
        valid: the valid names.
    """

    def check(value: str | bool | tuple[str, ...] | None) -> str | bool | tuple[str, ...] | None:
        for name in value if isinstance(value, tuple) else [value]:
            if name is not None and name not in valid:
                subject = "" if name == value else f"{name} "
                raise ValueError(f"{subject}must be one of {', '.join(map(shown, valid))}")
        return value

    return AfterValidator(check)


def at_least_one(valid: Collection[str]) -> AfterValidator:
    """A validator that accepts a list that is not empty. It accepts None where the field's type does.

    Args:
        valid: the possible items, for the message.
    """

    def check(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value == ():
            raise ValueError(f"needs at least one of {', '.join(valid)}")
        return value

    return AfterValidator(check)


def matching(pattern: str, reason: str) -> AfterValidator:
    """A validator that accepts text that matches a pattern. It accepts None where the field's type does.

    Args:
        pattern: a regular expression for the whole text.
        reason: the message for any other text, such as "must be a name".
    """
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str | None) -> str | None:
        if value is not None and not compiled.fullmatch(value):
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def all_different() -> AfterValidator:
    """A validator that accepts a list without a repeated item. It accepts None where the field's type does."""

    def check(value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("must be a list of different items")
        return value

    return AfterValidator(check)


Count = Annotated[int, within(1)]
CountOrNull = Annotated[int | None, within(1, or_null=True)]
NonNegativeInt = Annotated[int, within(0)]
NonNegative = Annotated[float, within(0)]
BelowOne = Annotated[float, within(0, 1, below=True)]
FolderName = Annotated[
    str,
    matching(
        r"(?!tables$)[\w-][\w.-]{0,99}",
        "must be a name of at most 100 letters, digits, '.', '_' and '-' that does not begin with '.', and not tables",
    ),
]
"""A name of which a folder is made."""

LONGEST = 4096
"""How many characters a text in the settings can have, which is what Linux allows a path."""

DEEPEST = 16
"""How deep lists and groups in the settings can be nested."""

LONGEST_SHOWN = 200
"""How many characters of a value a message shows."""

LIKENESS = 0.65
"""How similar two names must be, from 0 to 1, for one to be suggested instead of the other."""

_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "adapt",
    "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "clip_norm",
    "score_every": "evaluate",
    "seeds": "seed",
}
"""What people, PEFT's LoraConfig, transformers' TrainingArguments and earlier versions here call some settings."""

_TYPES = {
    "int": "must be a whole number",
    "finite": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "tuple": "must be a list, written [a,b]",
    "dict": "must be a group of settings",
}
"""The message for a value of a wrong type, by the first word of pydantic's name for the error."""


def require_plain_values(settings: Any, numbers: Collection[str], setting: str = "", depth: int = 0) -> None:
    """Check what holds for the values of all settings, whatever each of them means.

    Args:
        settings: the settings, nested.
        numbers: the names of the settings that hold numbers. pydantic would take a truth value for one.
        setting: the setting whose value `settings` is.
        depth: how deep that value is nested.

    Raises:
        TensLoRAError: for a value of which no file of a run could be written, and for a truth value as a number.
    """
    reason = ""
    is_number = setting in numbers or setting.rpartition(".")[0] in numbers
    if isinstance(settings, bool):
        reason = "must be a number" if is_number else ""
    elif isinstance(settings, int):
        reason = "" if -(2**63) <= settings < 2**63 else "must be a number of at most 18 digits"
    elif isinstance(settings, str):
        if not settings:
            reason = "must not be an empty text"
        elif len(settings) > LONGEST:
            reason = f"must be a text of at most {LONGEST} characters"
        elif not settings.isprintable():
            reason = "must be a text of one line, of characters that can be printed"
    elif isinstance(settings, (dict, list, tuple)):
        if depth > DEEPEST:
            raise TensLoRAError(f"{as_typed(setting)}: must not be nested more than {DEEPEST} levels deep")
        if not isinstance(settings, dict):
            for item in settings:
                require_plain_values(item, numbers, setting, depth + 1)
            return
        for name, item in settings.items():
            if not (isinstance(name, str) and 0 < len(name) <= LONGEST_SHOWN and name.isprintable()):
                raise TensLoRAError(f"{setting and as_typed(setting) + ': '}{shown(name)}: is not a name")
            require_plain_values(item, numbers, f"{setting}.{name}" if setting else name, depth + 1)
        return
    elif isinstance(settings, float):
        # A setting that holds numbers has a range of its own.
        reason = "" if is_number or math.isfinite(settings) else "must be a finite number"
    elif settings is not None:
        reason = "must be a number, a text, true, false, null, or a list or a group of these"
    if reason:
        raise TensLoRAError(as_typed(f"{setting}={shown(settings)}: {reason}"))


def settings_with_numbers(schema: Any) -> frozenset[str]:
    """The names of a dataclass's settings that hold numbers and no truth values.

    Args:
        schema: the dataclass.
    """
    return frozenset(
        name for name, hint in _settings_of(schema) if {int, float} & {*(kinds := _kinds(hint))} and bool not in kinds
    )


def _kinds(hint: Any) -> list[Any]:
    return list(dict.fromkeys([hint, *(kind for part in get_args(hint) for kind in _kinds(part))]))


def in_one_line(error: ValidationError, schema: type) -> TensLoRAError:
    """Turn pydantic's first complaint into one line that names the setting, its value and what would be valid.

    Args:
        error: pydantic's error.
        schema: the dataclass that pydantic was to create.

    Returns:
        The error to raise.
    """
    groups = {name.partition(".")[0] for name, _ in _settings_of(schema) if "." in name}
    for each in error.errors():  # a group within a group is also why settings are missing there
        path = [str(part) for part in each["loc"] if part not in ("image", "text")]
        if each["type"] == "unexpected_keyword_argument" and isinstance(each["input"], dict) and groups & {*path[1:2]}:
            return TensLoRAError(f"{path[0]}.{path[1]}: there is no such setting; {needs_global(path[0])}")
    first = error.errors()[0]
    kind, value, details = str(first["type"]), first["input"], first.get("ctx", {})
    path = [str(part) for part in first["loc"]]
    modality = path.pop(1) if path[:1] == ["dataset"] and path[1:2] in (["image"], ["text"]) else ""
    if kind.startswith("union_tag"):  # pydantic blames the group for the setting that says which kind it is
        path, value = [*path, "modality"], details.get("tag")
    path = [part for part in path if not part.isdigit()] or path  # without the place in a list
    setting, cause = ".".join(path), details.get("error")
    if isinstance(cause, TensLoRAError):  # from one of the dataclasses; it begins with the name of its field
        return TensLoRAError(as_typed(".".join([*path, str(cause)])))
    if kind == "unexpected_keyword_argument":
        group, dot, rest = path[-1].partition(".")
        if dot:  # of a config file
            return TensLoRAError(f"{path[-1]}: must be written as {group}: and below it {rest}:")
        # A sweep sets how a run was tuned, not the user.
        settings = [name for name, _ in _settings_of(schema) if not name.startswith("tuned.")]
        if setting in settings:
            return TensLoRAError(as_typed(f"{setting}: there is no such setting for a dataset of {modality}s"))
        return TensLoRAError(as_typed(no_such_setting(setting, [as_typed(known) for known in settings])))
    if kind in ("missing", "union_tag_not_found"):
        return TensLoRAError(as_typed(f"{setting}: is missing"))
    if kind == "union_tag_invalid":
        reason = f"must be one of {details['expected_tags']}".replace("'", "")
    elif kind.startswith(("dataclass", "model_attributes")):
        reason = f"must be a group of settings: {_members(setting, names_of_settings(schema))}"
    else:
        reason = str(cause) if cause else _TYPES.get(kind.partition("_")[0], str(first["msg"]))
        if kind == "tuple_type" and isinstance(value, (str, int, float)):
            reason = f"must be a list, written [{shown(value)}]"
    if value == "None":  # Python's word, which Hydra takes for a text
        return TensLoRAError(f"{as_typed(setting)}=None: {reason}; the word for no value is null")
    return TensLoRAError(as_typed(f"{setting}={shown(value)}: {reason}"))


def as_typed(line: str) -> str:
    """Write the setting and the value at the beginning of a message as on the command line.

    On the command line, some settings of the library's AdapterConfig are groups of their own, the option of a group is
    chosen by the group's name, and None is null.

    >>> as_typed("adapter.rank_strategy.ranks=None: must be ..."), as_typed("optimizer.name=sgd: must be ...")
    ('rank_strategy.ranks=null: must be ...', 'optimizer=sgd: must be ...')

    Args:
        line: a message that begins with the setting, as the types name it.
    """
    line = re.sub(r"^adapter\.(?=(tensor_mode|factorization|rank_strategy|seed)\b)", "", line)
    line = re.sub(r"^(rank_strategy|optimizer|preset)\.name\b", r"\1", line)
    return re.sub(r"^([\w.]+)=None:", r"\1=null:", line)


def names_of_settings(schema: type) -> list[str]:
    """The names of all settings, as on the command line.

    Args:
        schema: the dataclass of the settings.
    """
    return [as_typed(name) for name, _ in _settings_of(schema)]


def no_such_setting(setting: str, settings: Sequence[str]) -> str:
    """The line for a setting that does not exist, with the nearest one that does.

    >>> no_such_setting("lr", ["optimizer.name", "optimizer.lr"])
    'lr: there is no such setting; did you mean optimizer.lr?'

    Args:
        setting: the setting as it was given.
        settings: the settings that exist, with their groups.
    """
    group, _, name = setting.rpartition(".")
    if setting in ("experiment", "debug"):
        return f"{setting}: is no setting; {needs_global(setting)}"
    if (dotted := setting.replace("/", ".")) != setting and dotted in settings:
        return f"{setting}: there is no such setting; did you mean {dotted}?"
    wanted = _NAMES_ELSEWHERE.get(name, name)

    def likeness(other: str) -> tuple[float, float]:
        # The last part decides, because the group is what users leave out.
        return _ratio(wanted, other.rpartition(".")[2]), _ratio(f"{group}.{wanted}", other)

    # Where the group exists, another group's setting is meant only if it has the very name.
    own = [other for other in settings if group and other.startswith(f"{group}.")]
    own += [other for other in settings if own and other.rpartition(".")[2] == wanted]
    nearest = max(own or settings, key=likeness)
    if likeness(nearest)[0] >= LIKENESS:
        return f"{setting}: there is no such setting; did you mean {nearest}?"
    if group and (members := _members(group, settings)):
        return f"{setting}: there is no such setting; {group} has {members}"
    return f"{setting}: there is no such setting; --help lists all settings"


def needs_global(group: str) -> str:
    """The end of a line on settings that lie in a group to which they do not belong, because Hydra puts them there.

    Args:
        group: the group.
    """
    return f"a file in {group}/ with groups of settings must begin with the line # @package _global_"


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of a line that names the nearest of the valid names; empty if none is near.

    Args:
        name: a name that is not valid.
        names: the valid names.
    """
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, names, 1, LIKENESS))


def _members(group: str, settings: Sequence[str]) -> str:
    names = (setting.removeprefix(f"{group}.") for setting in settings if setting.startswith(f"{group}."))
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _settings_of(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    # Yields the names of all settings, with the groups that they are in, and their types.
    hints = get_type_hints(schema)
    for field in fields(schema):
        groups = [kind for kind in _kinds(hints[field.name]) if is_dataclass(kind)]
        if groups:
            for group in groups:
                yield from _settings_of(group, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def shown(value: Any) -> str:
    """A value as it is written on the command line, shortened to one line of moderate length."""
    text = _written(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, int) and abs(value) >= 10**LONGEST_SHOWN:
        return "(a number of many digits)"  # Python refuses to write out more than 4300
    return str(value)
