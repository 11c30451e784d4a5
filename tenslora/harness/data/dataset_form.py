"""The form of a dataset, which is checked once for whoever's function has loaded it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from tenslora.errors import TensLoRAError, line_with_kind, require_one_of, require_type
from tenslora.forms import shown
from tenslora.harness.commands import is_text
from tenslora.harness.data.examples import Dataset, Examples, as_list, by_position, is_sequence, require_sequences


def checked(setting: str, dataset: Any, holds_texts: bool) -> Dataset:
    """Check what a function that loads a dataset has handed over, which may be anybody's own.

    Images are not read yet, and their form is checked when they are.

    Args:
        setting: the setting that names the dataset, with its value, for messages.
        dataset: what the function has returned.
        holds_texts: whether its examples must be texts, and not images.

    Returns:
        The dataset, whose names and labels are Python's own texts and numbers.

    Raises:
        TensLoRAError: for the first part that does not have the form that `Dataset` describes.
    """
    try:
        return _checked(dataset, holds_texts)
    except TensLoRAError as error:
        raise TensLoRAError(f"{setting}: {error}") from error


def _checked(dataset: Dataset, holds_texts: bool) -> Dataset:
    from tenslora.harness.training.tasks import REGRESSION, TASKS  # torch takes a second

    require_type("what loads it returns", dataset, Dataset)
    require_one_of("its task", dataset.task, TASKS)
    classes = _names("the name of a class", dataset.classes)
    is_regression = dataset.task == REGRESSION.name
    if is_regression and classes:
        raise TensLoRAError(f"a regression must have no classes, and has {shown(classes)}")
    if not is_regression and len(classes) < 2:
        raise TensLoRAError(f"must have at least two classes, and has {shown(classes)}")
    columns = _names("the name of a column of texts", dataset.text_columns)
    if len(columns) not in ((1, 2) if holds_texts else (0,)):
        must = "one or two names, one for each sentence of an example" if holds_texts else "empty for images"
        raise TensLoRAError(f"its text_columns must be {must}, and are {shown(columns)}")
    if dataset.validation is not None:
        raise TensLoRAError("its validation split must be None; dataset.validation draws one")
    require_type("more_tests", dataset.more_tests, Mapping)
    further = _names("the name of a further test split", list(dataset.more_tests))
    more = dict(zip(further, dataset.more_tests.values(), strict=True))
    if taken := {"training", "test", "validation"} & more.keys():
        raise TensLoRAError(f"a further test split must have a name of its own, not {min(taken)}")
    count = None if is_regression else len(classes)
    parts = {"training": dataset.train, "test": dataset.test, **more}
    train, test, *others = (_split(f"the {name} split", part, count, columns) for name, part in parts.items())
    return replace(
        dataset,
        train=train,
        test=test,
        classes=classes,
        more_tests=dict(zip(more, others, strict=True)),
        text_columns=columns,
    )


def _names(what: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, (str, bytes)) or not is_sequence(given):
        raise TensLoRAError(f"{what} must be in a tuple, and not of type {type(given).__name__}")
    for name in given:
        if not isinstance(name, str) or not name.strip() or not is_text(name):  # no record could hold it
            raise TensLoRAError(f"{what} must be text in UTF-8, not empty, and one is {shown(name)}")
    names = tuple(str.__str__(name) for name in given)  # as without numpy
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise TensLoRAError(f"{what} must be given once, and {twice[0]} is given twice")
    return names


def _split(where: str, examples: Examples, classes: int | None, columns: Sequence[str]) -> Examples:
    require_type(where, examples, Examples)
    require_sequences(where, inputs=examples.inputs, labels=examples.labels)
    labels = _labels(where, examples.labels, classes)
    if len(examples.inputs) != len(labels):
        raise TensLoRAError(f"{where} has {len(examples.inputs)} inputs and {len(labels)} labels")
    inputs = by_position(examples.inputs)
    if columns:
        _check_texts(where, inputs, len(columns))
    return replace(examples, inputs=inputs, labels=labels)


def _labels(where: str, given: Any, classes: int | None) -> list[Any]:
    # A tensor has no whole numbers, and a pandas Series an index of its own by which it answers for labels[0].
    try:
        labels = as_list(given)
    except Exception as error:  # of another library, as torch at a tensor on the device meta
        raise TensLoRAError(f"the labels of {where} cannot be read ({line_with_kind(error)})") from error
    for number, label in enumerate(labels):
        if classes is None:
            is_valid, must = isinstance(label, Real) and _is_finite(label), "finite numbers"
        else:
            is_valid = isinstance(label, Integral) and 0 <= int(label) < classes
            must = f"whole numbers from 0 to {classes - 1}, one for each class"
        if not is_valid:
            raise TensLoRAError(f"the labels must be {must}, and that of input {number} of {where} is {shown(label)}")
    return list(map(float if classes is None else int, labels))


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # of a number beyond the range of a float
        return False


def _check_texts(where: str, inputs: Any, count: int) -> None:
    for number in range(len(inputs)):
        example = inputs[number]
        what = f"input {number} of {where}"
        if not isinstance(example, tuple) or not all(isinstance(sentence, str) for sentence in example):
            raise TensLoRAError(f"{what} is {shown(example)}; must be a tuple of one sentence, or of two")
        if len(example) != count:
            raise TensLoRAError(f"{what} must have a sentence for each of its {count} text_columns, not {len(example)}")
        if not any(map(str.strip, example)):
            raise TensLoRAError(f"{what} has no text")
        if not all(map(is_text, example)):
            raise TensLoRAError(f"{what} is {shown(example)}; must be text in UTF-8")
