from __future__ import annotations

from typing import Any

import datasets
import pyarrow
import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.data.text_columns import choose_columns, classes_of, labels_of, numbers_of, sentences_of


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        ("text label", "text", "label"),
        ("idx Sentence Labels", "Sentence", "Labels"),
        ("sentence1 sentence2 score", "sentence1 sentence2", "score"),
        ("hypothesis premise id target", "premise hypothesis", "target"),
        ("question sentence label", "question sentence", "label"),
        ("question label", "question", "label"),
        ("title text category", "text", "category"),
        ("body label", "body", "label"),  # what is left over
        ("text emotion", "text", "emotion"),
        ("sentence1 sentence2 similarity prediction", "sentence1 sentence2", "similarity"),  # written by predict
        ("text topic prediction probability_good probability_not_so_good", "text", "topic"),
    ],
)
def test_columns_are_known_by_their_names_or_left_over(columns: str, texts: str, label: str) -> None:
    assert choose_columns(columns.split(), None, None) == (tuple(texts.split()), label)


def test_given_columns_are_taken() -> None:
    columns = ["text", "sentence", "label", "score"]
    assert choose_columns(columns, ["sentence"], "score") == (("sentence",), "score")
    assert choose_columns(columns, ["label", "sentence"], None) == (("label", "sentence"), "score")
    assert choose_columns(["text", "label"], None, "text") == (("label",), "text")
    assert choose_columns(["text", "label", "prediction"], None, "prediction") == (("text",), "prediction")


@pytest.mark.parametrize(
    ("columns", "texts", "label", "message"),
    [
        ("a b c", None, None, r"dataset\.text_columns=null: must be .* such as \[a\]; there are a, b, c$"),
        ("id note mood", None, None, r"dataset\.text_columns=null: .* such as \[note\]; there are id, note, mood$"),
        ("text sentence label", None, None, r"dataset\.text_columns=null: .* there are text, sentence, label$"),
        (
            "text label score",
            None,
            None,
            r"dataset\.label_column=null: .*besides the texts \(text\) there are label, sc",
        ),
        ("text a b", None, None, r"dataset\.label_column=null: .*there are a, b$"),
        (
            "text id prediction probability_a",
            None,
            None,
            r"besides the texts \(text\) there are only a model's answers; dataset\.label_column=prediction takes them",
        ),
        ("text id", None, None, r"dataset\.label_column=null: .*there are no columns$"),
        ("text label", ["txt"], None, r"dataset\.text_columns=txt: must be one of the columns text, label$"),
        ("text label", None, "lab", r"dataset\.label_column=lab: must be one of the columns text, label$"),
        ("Text text label", None, None, r"dataset\.text_columns=null: .* there are Text, text, label$"),
        ("text\tlabel", None, None, r"dataset\.text_columns=null: "),
        ("a" * 99 + " b", None, None, r" such as \[a{57}\.\.\.\]; there are a{57}\.\.\., b$"),
        (
            "gj04 1 * sailed",
            None,
            None,
            r"there are gj04, 1, \*, sailed; the first line of a table must name its columns$",
        ),
    ],
)
def test_an_unclear_choice_lists_the_columns(columns: str, texts: Any, label: Any, message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        choose_columns(columns.split(" "), texts, label)


def classes(values: list[Any], task: str | None = None, are_strings: bool = False) -> tuple[str, ...]:
    """The classes of a column named y, as they are for training."""
    rows = datasets.Dataset.from_dict({"y": values})
    return classes_of(labels_of(rows, "y", "here", are_strings=are_strings), "y", task, are_strings=are_strings)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 10, -1], "-1 9 10"),
        (["b", "a", "b"], "a b"),
        ([True, False], "false true"),
        (["1.5", "x"], "1.5 x"),
        ([0.5, 2.0], ""),
    ],
)
def test_labels_of_one_type_say_what_the_task_is(values: list[Any], names: str) -> None:
    assert classes(values) == tuple(names.split())


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["10", " 9", "1"], "1 9 10"),
        (["0", "1.5", "-2e3"], ""),
        (["1", "1" * 400], "1 " + "1" * 400),
        (["no", "nan"], "nan no"),
    ],
)
def test_strings_of_a_file_that_look_like_numbers_are_numbers(values: list[str], names: str) -> None:
    assert classes(values, are_strings=True) == tuple(names.split())


def test_the_task_can_be_given() -> None:
    assert classes([1, 2, 3], "regression") == ()
    assert classes([1.0, 3.0, 1.0], "classification") == ("1", "3")
    assert classes(["1", "x"], "classification", are_strings=True) == ("1", "x")
    with pytest.raises(TensLoRAError, match=r"dataset\.task=regression: needs numbers, but the column y holds 'x'"):
        classes(["1", "x", "z"], "regression", are_strings=True)
    with pytest.raises(TensLoRAError, match=r"dataset\.task=classification: .* the column y holds 1\.5"):
        classes([1.5, 2.0], "classification")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "2", "high"], r"must hold either numbers or names, but holds '1' and 'high'; .*task=classification"),
        (["x", "x"], "must hold at least two different labels, but holds only 'x'"),
        (
            [1.2e19, 1.2e19],
            r"holds 1\.2e\+19, a whole number beyond 64 bits, .*; must hold such numbers as texts, in quotes$",
        ),
        ([1.5, 1.5], "must hold at least two different labels, but holds only 1.5"),
        (["1", "7" * 5001], r"holds '7+\.\.\. in row 2, which is too long for a number .5,001 characters.; "),
        (
            [1.0, float("inf")],
            "holds inf in row 2, or a number too large to be read; must hold finite numbers or names",
        ),
        ([[1, 2], [3]], r"must hold numbers or names, but holds \[1, 2\] in row 1"),
    ],
)
def test_labels_that_are_no_labels_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(TensLoRAError, match=rf"^dataset\.label_column=y: {message}"):
        classes(values, are_strings=isinstance(values[0], str))


@pytest.mark.parametrize("values", [["a", None, "b", None], ["a", "", "b", " "], [1.0, float("nan"), 2.0, None]])
def test_rows_without_a_label_are_counted(values: list[Any]) -> None:
    with pytest.raises(TensLoRAError, match=r"^here: row 2 and 1 more rows have no label in the column y; "):
        classes(values)


@pytest.mark.parametrize("value", [1e308, -1e20, 10**400, float("inf")])
def test_a_value_whose_square_float32_cannot_hold_is_refused(value: float) -> None:
    assert numbers_of([1e18, -3], (), "here") == [1e18, -3]
    with pytest.raises(TensLoRAError, match=r"^here: has the label \S+, but a label must be from -1e\+18 to 1e\+18"):
        numbers_of([0.5, value], (), "here")


def test_rows_without_a_text_are_refused() -> None:
    rows = datasets.Dataset.from_dict({"a": ["x", "y", "z"], "b": ["x", " ", None], "c": [1, 2, 3]})
    assert sentences_of(rows, ["a"], "here") == [("x",), ("y",), ("z",)]
    with pytest.raises(TensLoRAError, match=r"^here: row 2 and 1 more rows have no text in the column b; "):
        sentences_of(rows, ["a", "b"], "here")
    with pytest.raises(TensLoRAError, match=r"^dataset\.text_columns=\[a,c\]: must hold texts, but c holds 1 in row 1"):
        sentences_of(rows, ["a", "c"], "here")


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        (b"caf\xe9", pyarrow.string(), "must be text in UTF-8"),
        (0, pyarrow.timestamp("s", "Foo/Bar"), r"timestamp\[s, tz=Foo/Bar\]: .+"),
        (2**40, pyarrow.timestamp("s"), r"timestamp\[s\]: .+"),  # after the year 9999
        (2**31 - 1, pyarrow.date32(), r"date32\[day\]: .+"),
    ],
    ids=["bytes", "time zone", "year", "day"],
)
def test_a_value_that_arrow_holds_and_python_does_not_names_its_row(value: Any, kind: Any, why: str) -> None:
    plain = pyarrow.binary() if isinstance(value, bytes) else pyarrow.int32() if kind.bit_width == 32 else "int64"
    good = b"tea" if isinstance(value, bytes) else 0
    values = pyarrow.array([good, good, value], plain).view(kind)
    rows = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"y": values})))
    row = 1 if "Foo" in why else 3
    for read in (lambda: sentences_of(rows, ["y"], "here"), lambda: labels_of(rows, "y", "here", are_strings=False)):
        with pytest.raises(TensLoRAError, match=rf"^here: row {row} of the column y cannot be read \({why}\)$"):
            read()


def test_a_class_label_keeps_its_names_and_their_order() -> None:
    features = datasets.Features({"y": datasets.ClassLabel(names=["z", "a", "m"])})
    rows = datasets.Dataset.from_dict({"y": [1, 0, 1]}, features=features)
    assert labels_of(rows, "y", "here", are_strings=False) == ["a", "z", "a"]
    unlabelled = datasets.Dataset.from_dict({"y": [1, -1]}, features=features)
    with pytest.raises(TensLoRAError, match="here: row 2 has no label in the column y"):
        labels_of(unlabelled, "y", "here", are_strings=False)


def test_labels_become_numbers() -> None:
    assert numbers_of([3, 1.0, "1"], ["1", "3"], "here") == [1, 0, 0]
    assert numbers_of([True, False], ["false", "true"], "here") == [1, 0]
    assert numbers_of([3, 0.5, "-2.5"], [], "here") == [3.0, 0.5, -2.5]
    with pytest.raises(TensLoRAError, match=r"^here: has labels that the training split does not have: c, d; .* a, b$"):
        numbers_of(["a", "d", "c"], ["a", "b"], "here")
    with pytest.raises(TensLoRAError, match=r"has 900, 950; if they are numbers to predict, set dataset\.task"):
        numbers_of([900, 1000], ["900", "950"], "here")
    with pytest.raises(TensLoRAError, match=r"^here: must have numbers as labels, as for training, but has 'high'"):
        numbers_of([1.0, "high"], [], "here")


def test_columns_are_read_at_once_and_not_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 1, 2]}).select([2, 1])
    monkeypatch.setattr(datasets.Dataset, "__iter__", None)  # cannot be iterated over
    assert sentences_of(rows, ["text"], "here") == [("c",), ("b",)]
    assert labels_of(rows, "label", "here", are_strings=False) == [2, 1]
