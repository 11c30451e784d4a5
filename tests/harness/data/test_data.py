"""The validation split, on each kind of dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import reading_anew
from tenslora.harness.data import Examples, load_dataset, load_tests
from tests.harness.data.image_folders import load, paint, reds, write_eurosat
from tests.running import SHORT, configured, run


def digits(examples: Examples) -> list[tuple[bytes, int]]:
    """The images of a split and their labels; no two images of the digits are equal."""
    return [(examples.inputs[index].tobytes(), label) for index, label in enumerate(examples.labels)]


def test_the_validation_split_is_drawn_from_the_training_examples_by_the_seed() -> None:
    everything = digits(load("digits", None).train)
    split = load("digits", None, validation=0.2)
    assert split.validation is not None
    train, validation = digits(split.train), digits(split.validation)
    assert (len(train), len(validation)) == (479, 120)  # of 599
    assert sorted(train + validation) == sorted(everything)
    assert len({label for _, label in validation}) == 5
    other = load("digits", None, seed=1, validation=0.2).validation
    assert other is not None
    assert digits(other) != validation


def test_a_run_with_a_validation_split_has_no_test_examples() -> None:
    split = load("digits", None, validation=0.2)
    assert len(split.test) == 0
    assert split.scored is split.validation
    assert load("digits", None).scored is load("digits", None).test


def test_the_validation_split_is_a_part_of_the_examples_that_train_size_chooses(tmp_path: Path) -> None:
    root = write_eurosat(tmp_path)
    settings: dict[str, Any] = {"train_splits": None, "test_split": None, "train_fraction": 0.8, "train_size": 10}
    chosen = load("eurosat", root, **settings).train
    split = load("eurosat", root, **settings, validation=0.3)
    assert split.validation is not None
    assert (len(split.train), len(split.validation)) == (7, 3)
    assert sorted(reds(split.train) + reds(split.validation)) == sorted(reds(chosen))


def test_a_class_without_a_training_example_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(f"a {label},{label}\n" for label in "xxxxyyyyz"))
    for seed in range(4):  # the only example of z is for testing with one seed or another
        with caplog.at_level("WARNING"):
            dataset = load_dataset(configured("dataset=text", f"dataset.root={tmp_path / 'own.csv'}").dataset, seed)
        assert ("own: no training example is of z" in caplog.text) == (2 not in dataset.train.labels)
        caplog.clear()


def test_what_a_source_of_ones_own_returns_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenslora.harness.data.load_images", lambda *_: None)
    message = "^dataset=digits: what loads it returns: must be of type Dataset, and is None$"
    with reading_anew(), pytest.raises(TensLoRAError, match=message):
        load("digits", None)


def test_data_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"  # as root, to whom nothing is forbidden, the tests can only pretend

    def refuse(path: Path, **_: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    config = configured("dataset=image_folder", f"dataset.root={images}").dataset
    monkeypatch.setattr(Path, "stat", refuse)
    message = f"^dataset.root={images}: {images} cannot be read .Permission denied.$"
    with pytest.raises(TensLoRAError, match=message):
        load_dataset(config, 0)
    with pytest.raises(TensLoRAError, match=message):
        load_tests(config, 0, ("a", "b"))


def test_more_training_examples_than_there_are_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert len(load("digits", None, train_size=1000).train) == 599
    assert "dataset.train_size=1000: digits has 599 training examples; all are used" in caplog.text


def test_the_test_split_need_not_exist(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "train.tsv").write_text("x\t1\t\tA cat sat.\nx\t0\t*\tSat cat a.\nx\t1\t\tA dog ran.\n")
    split = load_dataset(configured("dataset=cola", f"dataset.root={tmp_path}", "dataset.validation=0.3").dataset, 0)
    assert (len(split.train), len(split.scored)) == (2, 1)

    labels = tmp_path / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    (labels / "train1.txt").write_text((shared / "data/dtd/dtd/labels/train1.txt").read_text())
    (labels.parent / "images").symlink_to(shared / "data/dtd/dtd/images")
    images = load("dtd", tmp_path, validation=0.25)
    assert (len(images.train), len(images.scored), len(images.classes)) == (300, 100, 10)


def test_a_folder_of_images_needs_no_test_images(tmp_path: Path) -> None:
    for number in range(4):
        for name in ("a", "b"):
            paint(tmp_path / "train" / name / f"{number}.png", number)
    settings: dict[str, Any] = {"source": "image_folder", "train_splits": None, "test_split": None}
    images = load("mine", tmp_path, **settings, validation=0.25)
    assert (len(images.train), len(images.scored), images.classes) == (6, 2, ("a", "b"))


def test_the_validation_split_of_vtab_is_called_one() -> None:
    tuned = configured("dataset=vtab/cifar", "dataset.train_splits=[train800]", "dataset.test_split=val200").dataset
    assert (tuned.scored_on, configured("dataset=vtab/cifar").dataset.scored_on) == ("validation", "test")


@pytest.mark.parametrize(("fraction", "held_out"), [(0.001, 1), (0.999, 2)])
def test_neither_part_is_empty(fraction: float, held_out: int, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("x\t1\t\tA cat sat.\nx\t0\t*\tSat cat a.\nx\t1\t\tA dog ran.\n")
    words = ("dataset=cola", f"dataset.root={tmp_path}", f"dataset.validation={fraction}")
    assert len(load_dataset(configured(*words).dataset, 0).scored) == held_out


def test_a_single_example_cannot_be_divided() -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.validation=0\.5: digits has 1 training example"):
        load("digits", None, train_size=1, validation=0.5)


@pytest.mark.parametrize("fraction", ["0", "1", "1.5"])
def test_the_fraction_is_between_0_and_1(fraction: str) -> None:
    with pytest.raises(TensLoRAError, match=rf"dataset\.validation={fraction}.*must be above 0 and below 1, or null"):
        configured(f"dataset.validation={fraction}")


def test_a_record_names_the_split_that_its_scores_are_of(tmp_path: Path) -> None:
    record = run(tmp_path, *SHORT, "dataset.validation=0.2", "trainer.epochs=1")
    assert record["scored_on"] == "validation"
    assert (record["train_examples"], record["validation_examples"], record["test_examples"]) == (40, 10, 0)
    (epoch,) = record["metrics"]["history"]
    assert "validation_loss" in epoch
    assert "test_loss" not in epoch
    assert epoch["accuracy"] * 10 == pytest.approx(round(epoch["accuracy"] * 10))


def test_a_table_without_rows_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    config = configured("dataset=text", f"dataset.root={tmp_path}/rows.csv", "model=minilm").dataset
    for classes in (("a", "b"), ()):
        with pytest.raises(TensLoRAError, match=rf"^dataset\.root={tmp_path}/rows\.csv: it has no test examples$"):
            load_tests(config, 0, classes)
