"""What a function of a user's own hands over as a dataset."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from tenslora.errors import TensLoRAError
from tenslora.harness.data import Dataset, Examples
from tenslora.harness.data.dataset_form import checked
from tenslora.harness.data.examples import NO_EXAMPLES

IMAGES = Dataset(Examples(["x", "y", "z"], [0, 1, 1]), Examples(["v"], [0]), ("a", "b"))
TEXTS = replace(
    IMAGES,
    train=Examples([("One.",), ("Two.",), ("Three.",)], [0, 1, 1]),
    test=Examples([("Four.",)], [0]),
    text_columns=("text",),
)
PLAIN = Enum("PLAIN", "a b")


def with_text(*example: Any) -> Examples:
    return Examples([("One.",), example], [0, 1])


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        (
            (IMAGES.train, IMAGES.test, ("a", "b")),
            "what loads it returns: must be of type Dataset, and is of type",
        ),
        ({"task": "binary"}, "its task=binary: must be one of classification, regression"),
        ({"classes": None}, "the name of a class must be in a tuple, and not of type NoneType"),
        ({"classes": "ab"}, "the name of a class must be in a tuple, and not of type str"),
        ({"classes": {"a": 0, "b": 1}}, "the name of a class must be in a tuple, and not of type dict"),
        ({"classes": (0, 1)}, "the name of a class must be text in UTF-8, not empty, and one is 0"),
        ({"classes": tuple(PLAIN)}, 'the name of a class must be text in UTF-8, not empty, and one is "<PLAIN.a: 1>"'),
        ({"classes": ("a", "")}, 'the name of a class must be text in UTF-8, not empty, and one is ""'),
        ({"classes": ("a",)}, 'must have at least two classes, and has ["a"]'),
        ({"task": "regression"}, 'a regression must have no classes, and has ["a", "b"]'),
        ({"text_columns": ("text",)}, 'its text_columns must be empty for images, and are ["text"]'),
        ({"validation": IMAGES.test}, "its validation split must be None; dataset.validation draws one"),
        ({"train": [("x", 0)]}, "the training split: must be of type Examples, and is of type list"),
        (
            {"train": Examples((n for n in "xy"), [0, 1])},
            "the training split has inputs of type generator; must be a seq",
        ),
        ({"train": Examples({0: "x", 1: "y"}, [0, 1])}, "the training split has inputs of type dict; must be a seq"),
        (
            {"train": Examples(pandas.DataFrame({"x": [0]}), [0])},
            "the training split has inputs of type DataFrame; must ",
        ),
        ({"train": Examples(np.array(1), [0])}, "the training split has inputs of type ndarray; must be a sequence"),
        ({"more_tests": [("hard", IMAGES.test)]}, "more_tests: must be of type Mapping, and is of type list"),
        ({"more_tests": {"": IMAGES.test}}, "the name of a further test split must be text in UTF-8, not empty, and"),
        ({"more_tests": {"test": IMAGES.test}}, "a further test split must have a name of its own, not test"),
        ({"more_tests": {"hard": Examples("x", [2])}}, "the labels must be whole numbers from 0 to 1, one for each"),
        (
            {"task": "regression", "classes": (), "train": Examples("xy", [0, Fraction(10**400)])},
            "the labels must be finite numbers, and that of input 1 of the training split is",
        ),
    ],
)
def test_the_form_of_a_dataset_of_images(dataset: Any, line: str) -> None:
    given = replace(IMAGES, **dataset) if isinstance(dataset, dict) else dataset
    with pytest.raises(TensLoRAError) as raised:
        checked("dataset=own", given, holds_texts=False)
    assert str(raised.value).startswith(f"dataset=own: {line}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"text_columns": None}, "the name of a column of texts must be in a tuple, and not of type NoneType"),
        ({"text_columns": "text"}, "the name of a column of texts must be in a tuple, and not of type"),
        ({"text_columns": (0,)}, "the name of a column of texts must be text in UTF-8, not empty, and one is 0"),
        ({"text_columns": ()}, "its text_columns must be one or two names, one for each sentence of an example, and"),
        (
            {"text_columns": ("a", "b")},
            "input 0 of the training split must have a sentence for each of its 2 text_columns, not 1",
        ),
        (
            {"test": with_text("a", "b")},
            "input 1 of the test split must have a sentence for each of its 1 text_columns, not 2",
        ),
        (
            {"more_tests": {"hard": with_text("a", "b")}},
            "input 1 of the hard split must have a sentence for each of its 1 text_columns, not",
        ),
        ({"train": Examples(["One."], [0])}, 'input 0 of the training split is "One."; must be a tuple of one sent'),
        ({"train": with_text(1)}, "input 1 of the training split is [1]; must be a tuple of one sentence, or of two"),
        ({"train": with_text(" ")}, "input 1 of the training split has no text"),
        ({"train": with_text("a\ud800")}, "input 1 of the training split is "),
    ],
)
def test_the_form_of_a_dataset_of_texts(changes: Any, line: str) -> None:
    with pytest.raises(TensLoRAError) as raised:
        checked("dataset=own", replace(TEXTS, **changes), holds_texts=True)
    assert str(raised.value).startswith(f"dataset=own: {line}")


@pytest.mark.parametrize("labels", [pandas.Series([0, 0, 1], index=[2, 1, 0]), torch.tensor([0, 0, 1])])
def test_labels_are_in_their_order(labels: Any) -> None:
    train = checked("dataset=own", replace(IMAGES, train=Examples(["x", "y", "z"], labels)), False).train
    assert [train.labels[number] for number in range(3)] == [0, 0, 1]


def test_texts_of_a_series_are_in_their_order() -> None:
    texts = pandas.Series(TEXTS.train.inputs, index=[2, 1, 7])
    given = checked("dataset=own", replace(TEXTS, train=Examples(texts, [0, 1, 1])), holds_texts=True)
    assert [given.train.inputs[number] for number in range(3)] == TEXTS.train.inputs


@pytest.mark.parametrize("labels", [torch.zeros(2, dtype=torch.long, device="meta"), torch.tensor([0, 1]).to_sparse()])
def test_labels_that_another_library_cannot_read_are_refused(labels: Any) -> None:
    with pytest.raises(
        TensLoRAError, match=r"^dataset=own: the labels of the training split cannot be read \(\w+Error: "
    ):
        checked("dataset=own", replace(IMAGES, train=Examples(["x", "y"], labels)), False)


def test_names_and_labels_become_pythons_own() -> None:
    given = replace(TEXTS, classes=tuple(np.array(["a", "b"])), text_columns=["text"])  # type: ignore[arg-type]
    assert repr(checked("dataset=own", given, holds_texts=True)) == repr(TEXTS)
    values = Dataset(Examples("xy", [Fraction(1, 2), np.float32(1)]), NO_EXAMPLES, (), "regression")
    assert repr(checked("dataset=own", values, holds_texts=False).train.labels) == "[0.5, 1.0]"
