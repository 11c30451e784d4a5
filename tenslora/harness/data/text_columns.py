"""Which columns of a table hold the texts and the labels, and what the labels stand for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.data.examples import shortened

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "answer"),
)
"""Names of two columns that hold two texts each, in this order."""

TEXTS = ("text", "sentence", "question", "content", "review", "tweet", "comment", "document")
"""Names of a column that holds one text."""

LABELS = ("label", "labels", "target", "targets", "class", "category", "score", "rating", "sentiment")
"""Names of the column that holds the labels."""

INDICES = ("", "id", "idx", "index", "guid", "unnamed: 0", "__index_level_0__")
"""Names of a column that numbers the rows, and holds neither texts nor labels."""

ANSWERS = re.compile(r"prediction|probabilit(y_.*|ies)")
"""Names of the columns that tenslora.harness.predict adds to a table, which hold neither texts nor labels."""

LARGEST = 1e18
"""The largest label of a regression. float32 has to hold the mean of squared errors over a batch."""

_BEYOND_64_BITS = 2**63

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_WHOLE_NUMBER = re.compile(r"\s*[+-]?\d+\s*")


def choose_columns(
    columns: Sequence[str],
    text_columns: Sequence[str] | None,
    label_column: str | None,
    *,
    has_first_line: bool = True,
) -> tuple[tuple[str, ...], str]:
    """Choose the columns that are not given, by their names. Upper and lower case count as equal there.

    If no name is known, one column that is left over counts as the texts or as the labels.

    >>> choose_columns(["id", "Premise", "Hypothesis", "gold"], None, None)
    (('Premise', 'Hypothesis'), 'gold')

    Args:
        columns: the columns' names.
        text_columns: the one or two columns with the texts; None to choose them.
        label_column: the column with the labels; None to choose it.
        has_first_line: whether the first line of a file has named the columns, for the message.

    Returns:
        (the columns with the texts, the column with the labels).

    Raises:
        TensLoRAError: if a given column is not there, or if the choice is not clear; the message lists the columns.
    """
    listed = shortened(columns)
    if has_first_line and any(re.fullmatch(r"[\d.,+-]+|(\S+\s+){3,}\S+", name) for name in columns):
        listed += "; the first line of a table must name its columns"
    given = [("text_columns", name) for name in text_columns or ()]
    given += [("label_column", label_column)] if label_column is not None else []
    for setting, name in given:
        if name not in columns:
            raise TensLoRAError(f"dataset.{setting}={name}: must be one of the columns {listed}")
    by_name = {name.lower(): name for name in columns}
    taken = (*(text_columns or ()), label_column)
    left = [name for name in columns if name.lower() not in INDICES and name not in taken]
    left = [name for name in left if not ANSWERS.fullmatch(name)]
    if text_columns is None:
        # Of two columns that differ in their case alone, such as Text and text, none is clear.
        clear = {lower for lower, count in Counter(name.lower() for name in left).items() if count == 1}
        chosen = _texts_among(clear.difference(LABELS if label_column is None else ()))
        text_columns = [by_name[name] for name in chosen]
    if label_column is None:
        left = [name for name in left if name not in text_columns]
        known = [name for name in left if name.lower() in LABELS]
        candidates = known or (left if text_columns else [])
        if len(candidates) == 1:
            (label_column,) = candidates
    if not text_columns and label_column is not None:
        left = [name for name in left if name != label_column]
        text_columns = left if len(left) == 1 else []
    if not text_columns:
        raise TensLoRAError(
            f"dataset.text_columns=null: must be the one or two columns that hold the texts, such as "
            f"[{shortened((left or columns)[:1])}]; there are {listed}"
        )
    if label_column is None:
        there = shortened(left) or "no columns"
        if not left and (answers := [name for name in columns if ANSWERS.fullmatch(name) and name not in text_columns]):
            there = f"only a model's answers; dataset.label_column={answers[0]} takes them for labels"
        raise TensLoRAError(
            f"dataset.label_column=null: must be the column that holds the labels; besides the texts "
            f"({shortened(text_columns)}) there are {there}"
        )
    return tuple(text_columns), label_column


def _texts_among(names: set[str]) -> tuple[str, ...]:
    """The only pair or single column of texts that is known by name; () if there is none, or more than one."""
    found: list[tuple[str, ...]] = [pair for pair in PAIRS if names.issuperset(pair)]
    in_pairs = {name for pair in found for name in pair}
    found += [(name,) for name in TEXTS if name in names and name not in in_pairs]
    return found[0] if len(found) == 1 else ()


def values_of(rows: Dataset, column: str, where: str) -> list[Any]:
    """The values of a column in Python's types. Arrow holds some that Python does not, such as bytes that are no text.

    Args:
        rows: a split.
        column: the column.
        where: the split and where it comes from, for messages.

    Raises:
        TensLoRAError: for the first row whose value Python does not hold.
    """
    try:
        return list(rows[column][:])  # at once; iterated over, each row would be converted alone
    except Exception as error:  # UnicodeDecodeError, OverflowError, and the types of pyarrow and of time zones
        number = 1
        with suppress(Exception):
            for _ in rows[column]:
                number += 1
        why = f"{rows.data.schema.field(column).type}: {first_line(error)}"
        if isinstance(error, UnicodeDecodeError):
            why = "must be text in UTF-8"
        raise TensLoRAError(f"{where}: row {number} of the column {column} cannot be read ({why})") from error


def sentences_of(rows: Dataset, columns: Sequence[str], where: str) -> list[tuple[str, ...]]:
    """The texts of all rows.

    Args:
        rows: a split.
        columns: the one or two columns with the texts.
        where: the split and where it comes from, for messages.

    Raises:
        TensLoRAError: for a row without a text, or with one that cannot be read.
    """
    texts = [values_of(rows, column, where) for column in columns]
    for column, values in zip(columns, texts, strict=True):
        for number, value in enumerate(values, start=1):
            if value is not None and not isinstance(value, str):
                raise TensLoRAError(
                    f"dataset.text_columns=[{','.join(columns)}]: must hold texts, but {column} holds {_short(value)} "
                    f"in row {number}"
                )
        missing = [number for number, value in enumerate(values, start=1) if not value or value.isspace()]
        if missing:
            raise TensLoRAError(f"{where}: {_rows(missing)} no text in the column {column}; remove or complete them")
    return list(zip(*texts, strict=True))


def labels_of(rows: Dataset, column: str, where: str, *, are_strings: bool) -> list[Any]:
    """The labels of all rows: whole numbers, other numbers, names, or truth values.

    Args:
        rows: a split. Labels of the datasets library's ClassLabel are given by their names.
        column: the column with the labels.
        where: the split and where it comes from, for messages.
        are_strings: whether numbers are strings in `rows`, as in a CSV file. If all labels look like numbers, they are
            numbers.

    Raises:
        TensLoRAError: for a row without a label, and for labels that are neither numbers nor names, or cannot be read.
    """
    values = values_of(rows, column, where)
    if names := class_names(rows, column):
        values = [names[value] if value is not None and 0 <= value < len(names) else None for value in values]
    missing = []
    for number, value in enumerate(values, start=1):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            missing.append(number)
        elif isinstance(value, float) and math.isinf(value):
            raise TensLoRAError(
                f"dataset.label_column={column}: holds {value} in row {number}, or a number too large to be read; must "
                f"hold finite numbers or names"
            )
        elif isinstance(value, str):
            if not value or value.isspace():
                missing.append(number)
        elif not isinstance(value, (bool, int, float)):
            raise TensLoRAError(
                f"dataset.label_column={column}: must hold numbers or names, but holds {_short(value)} in row {number}"
            )
    if missing:
        raise TensLoRAError(
            f"{where}: {_rows(missing)} no label in the column {column}; remove or complete them, or choose other "
            f"splits with dataset.train_splits and dataset.test_split"
        )
    if are_strings:
        for pattern, number_of in ((_WHOLE_NUMBER, int), (_NUMBER, float)):
            if all(map(pattern.fullmatch, values)):
                try:
                    return list(map(number_of, values))
                except ValueError as error:  # Python's int has a limit of 4,300 digits
                    longest = max(values, key=len)
                    raise TensLoRAError(
                        f"dataset.label_column={column}: holds {_short(longest)} in row {values.index(longest) + 1}, "
                        f"which is too long for a number ({len(longest):,} characters); must hold shorter ones"
                    ) from error
    return values


def class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """The names of the classes, if the column is a ClassLabel of the datasets library; otherwise ()."""
    return tuple(getattr(rows.features[column], "names", None) or ())


def classes_of(values: Sequence[Any], column: str, task: str | None, *, are_strings: bool) -> tuple[str, ...]:
    """The names of the classes; () if the labels are the values of a regression.

    Args:
        values: the labels, as `labels_of` gives them.
        column: the column with the labels, for messages.
        task: "classification" or "regression"; None for what follows from the labels, which are the values of a
            regression if they are numbers and at least one is not whole by its type.
        are_strings: whether the labels were read as strings, as in a CSV file.

    Raises:
        TensLoRAError: if the labels are of several types or do not fit the task, or if all are equal.
    """
    setting, kinds = f"dataset.label_column={column}", set(map(type, values))
    are_numbers, is_constant = kinds <= {int, float}, len(set(values)) < 2
    if is_constant or task == "classification":
        for value in values:
            if type(value) is float and abs(value) >= _BEYOND_64_BITS:
                raise TensLoRAError(
                    f"{setting}: holds {value}, a whole number beyond 64 bits, which was rounded when it was read; "
                    f"must hold such numbers as texts, in quotes"
                )
    if is_constant:
        raise TensLoRAError(f"{setting}: must hold at least two different labels, but holds only {_short(values[0])}")
    if task == "regression" and not are_numbers:
        names = [value for value in values if type(value) not in (int, float)]
        # Among strings of a file, that which made them all strings.
        name = next((value for value in names if not (are_strings and _NUMBER.fullmatch(value))), names[0])
        raise TensLoRAError(f"dataset.task=regression: needs numbers, but the column {column} holds {_short(name)}")
    if task == "regression" or (task is None and are_numbers and float in kinds):
        return ()
    if task is None:
        _check_one_type(values, setting, are_strings)
    if not are_numbers:
        return tuple(sorted(set(map(class_name, values))))
    for value in values:
        if isinstance(value, float) and not value.is_integer():
            raise TensLoRAError(
                f"dataset.task=classification: needs names or whole numbers, but the column {column} holds {value}"
            )
    return tuple(map(str, sorted(set(map(int, values)))))


def _check_one_type(values: Sequence[Any], setting: str, are_strings: bool) -> None:
    # One example of each type. In a file that has only strings, a string that looks like a number counts as one.
    of_type: dict[str, Any] = {}
    for value in values:
        is_number = type(value) in (int, float) or (are_strings and _NUMBER.fullmatch(value) is not None)
        of_type.setdefault("a number" if is_number else type(value).__name__, value)
    if len(of_type) > 1:
        examples = " and ".join(_short(value) for value in of_type.values())
        raise TensLoRAError(
            f"{setting}: must hold either numbers or names, but holds {examples}; if all are names of classes, set "
            f"dataset.task=classification"
        )


def class_name(value: Any) -> str:
    """The name of the class that a label stands for: 1 and 1.0 are "1", and True is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether all classes, if there are any, are numbers. Otherwise each label of a file is a name, as it is written.

    >>> are_numbers(["1", "2"]), are_numbers(["1", "x"])
    (True, False)
    """
    return all(map(_NUMBER.fullmatch, classes))


def spelled_differently(tables: Sequence[Dataset], column: str, classes: Sequence[str]) -> list[str]:
    """The labels that are one class and are written in several ways, such as "01 and 1"; all those of a class in one.

    Args:
        tables: the splits of a file whose cells are all strings, and whose labels `labels_of` has taken.
        column: the column with the labels.
        classes: the names of the classes.
    """
    if not are_numbers(classes):
        return []
    of_class: dict[str, set[str]] = {}
    for text in {text.strip() for table in tables for text in table.unique(column)}:
        number = int(text) if _WHOLE_NUMBER.fullmatch(text) else float(text)
        of_class.setdefault(class_name(number), set()).add(text)
    return [" and ".join(sorted(of_class[name])) for name in classes if len(of_class.get(name, ())) > 1]


def numbers_of(values: Sequence[Any], classes: Sequence[str], where: str, of_run: bool = False) -> list[float]:
    """The numbers that a model is trained on: those of the classes, or the values of a regression.

    Args:
        values: the labels, as `labels_of` gives them.
        classes: the names of the classes; () for a regression.
        where: the split and where it comes from, for messages.
        of_run: whether `classes` are those of a finished run, and not of the training split, for messages.

    Raises:
        TensLoRAError: for labels that are not in `classes`, and for values beyond `LARGEST`.
    """
    if not classes:
        # A table that was CSV before it was JSON may hold its numbers as strings.
        values = [float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value for value in values]
        for value in values:
            if type(value) not in (int, float):
                raise TensLoRAError(f"{where}: must have numbers as labels, as for training, but has {_short(value)}")
            if not abs(value) <= LARGEST:
                raise TensLoRAError(
                    f"{where}: has the label {_short(value)}, but a label must be from -{LARGEST:g} to "
                    f"{LARGEST:g}; divide the labels so that they span a few units"
                )
        return list(map(float, values))
    number = {name: index for index, name in enumerate(classes)}
    names = list(map(class_name, values))
    if unseen := set(names).difference(number):
        known, hint = "the run" if of_run else "the training split", ""
        if not of_run and are_numbers((*classes, *unseen)):
            hint = "; if they are numbers to predict, set dataset.task=regression"
        raise TensLoRAError(
            f"{where}: has labels that {known} does not have: {shortened(sorted(unseen))}; {known} has "
            f"{shortened(classes)}{hint}"
        )
    return [number[name] for name in names]


def _rows(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 1} more rows have" if len(numbers) > 1 else " has"
    return f"row {numbers[0]}{more}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
