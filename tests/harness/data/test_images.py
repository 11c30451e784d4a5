"""Which images train and which test, by the settings of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tenslora.errors import TensLoRAError
from tenslora.harness.data import Dataset, Examples
from tests.harness.data.image_folders import TINY_DTD, load, reds, write_dtd, write_eurosat


def test_train_splits_are_joined_in_order(tmp_path: Path) -> None:
    train = load("dtd", write_dtd(tmp_path, TINY_DTD), train_splits=("train", "val")).train
    assert (reds(train), list(train.labels)) == ([1, 2, 3, 4, 5], [0, 0, 1, 1, 0])


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    # torchvision numbers b and c from 0 in the test split and from 1 in the train split.
    root = write_dtd(tmp_path, {"train": ["a/1.jpg", "b/1.jpg", "c/1.jpg"], "test": ["c/2.jpg", "b/2.jpg"]})
    with pytest.raises(TensLoRAError, match="train and test do not have the same classes"):
        load("dtd", root)


def test_train_size_draws_examples_from_the_seed(shared: Path) -> None:
    split = load("dtd", shared / "data").train

    def paths(examples: Examples) -> list[Path]:
        return [examples.inputs.items.datasets[0].paths[i] for i in examples.inputs.indices]

    def drawn(seed: int) -> Examples:
        return load("dtd", shared / "data", seed=seed, train_size=100).train

    label_of = dict(zip(split.inputs.datasets[0].paths, split.labels, strict=True))
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert len(first) == len(set(paths(first))) == 100
    assert [label_of[path] for path in paths(first)] == list(first.labels)
    assert paths(first) == paths(again) != paths(other)
    assert len(set(first.labels)) == 10  # not the first hundred, which have three classes
    assert first.inputs[3].tobytes() == Image.open(paths(first)[3]).convert("RGB").tobytes()


@pytest.mark.parametrize("size", [3, 1000])
def test_a_train_size_beyond_the_split_is_all_of_it(size: int, tmp_path: Path) -> None:
    assert reds(load("dtd", write_dtd(tmp_path, TINY_DTD), train_size=size).train) == [1, 2, 3]


def test_eurosat_is_split_by_the_seed(tmp_path: Path) -> None:
    root = write_eurosat(tmp_path)

    def split(seed: int, fraction: float = 0.8) -> Dataset:
        return load("eurosat", root, seed, train_splits=None, test_split=None, train_fraction=fraction)

    dataset = split(0)
    train, test = reds(dataset.train), reds(dataset.test)
    assert (len(train), len(test)) == (24, 6)
    assert sorted(train + test) == list(range(30))
    for examples in (dataset.train, dataset.test):
        assert [red % 3 for red in reds(examples)] == list(examples.labels)
    assert dataset.classes == ("Forest", "River", "SeaLake")
    assert reds(split(0).train) == train
    assert reds(split(1).train) != train
    assert len(split(0, 0.5).train) == 15
    assert len({tuple(reds(split(seed).test)) for seed in range(5)}) == 5


def test_an_empty_test_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"no test examples|classes"):
        load("dtd", write_dtd(tmp_path, {"train": ["a/1.jpg"], "test": []}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mnist", {}, r"dataset\.name=mnist: must be one of digits, dtd, eurosat, cifar10, fgvc_aircraft"),
        ("dtd", {"train_splits": ("train", "dev")}, r"dataset\.train_splits=dev: dtd has the splits train, val, test"),
        ("dtd", {"test_split": "dev"}, r"dataset\.test_split=dev: dtd has the splits train, val, test"),
        ("dtd", {"test_split": None}, r"dataset\.test_split=null: dtd has the splits train, val, test"),
        ("dtd", {"train_splits": None}, r"dataset\.train_splits=null: must have at least one of train, val, test"),
        ("dtd", {"train_splits": ()}, r"dataset\.train_splits=\[\]: must have at least one of train, val, test"),
        ("dtd", {"train_fraction": 0.5}, r"dataset\.train_fraction=0\.5: .* dtd has published splits"),
        ("eurosat", {}, r"dataset\.train_fraction=null: must be a number"),
    ],
)
def test_settings_that_do_not_fit_the_dataset_are_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TensLoRAError, match=message):
        load(name, tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"train_splits": ("val",)}, {"test_split": "train"}, {"train_fraction": 0.5}])
def test_the_embedded_digits_have_one_train_and_one_test_split(changes: dict[str, Any]) -> None:
    with pytest.raises(
        TensLoRAError, match=r"dataset\.(train_splits|test_split|train_fraction)=\S+: .*the digits are embedded"
    ):
        load("digits", None, **changes)
