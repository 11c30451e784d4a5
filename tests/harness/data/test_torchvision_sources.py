from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

from tenslora.errors import TensLoRAError
from tenslora.harness.data.examples import ImageArrays
from tenslora.harness.data.torchvision_sources import SOURCES, Source
from tests.harness.data.image_folders import TINY_DTD, load, paint, reds, write_dtd


def test_dtd_from_shared(shared: Path) -> None:
    dataset = load("dtd", shared / "data")
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (400, 400, 10)
    assert set(Counter(dataset.train.labels).values()) == set(Counter(dataset.test.labels).values()) == {40}
    folder = shared / "data" / "dtd" / "dtd"
    name = (folder / "labels" / "test1.txt").read_text().split()[7]
    image = dataset.test.inputs[7]
    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(folder / "images" / name).convert("RGB").tobytes()
    assert dataset.classes[dataset.test.labels[7]] == name.split("/")[0]


def test_dtd(tmp_path: Path) -> None:
    dataset = load("dtd", write_dtd(tmp_path, TINY_DTD))
    assert dataset.classes == ("dotted", "woven")
    assert (reds(dataset.train), list(dataset.train.labels)) == ([1, 2, 3], [0, 0, 1])
    assert (reds(dataset.test), list(dataset.test.labels)) == ([6, 7, 8], [1, 0, 1])


def test_variants_of_fgvc_aircraft(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    for red in range(4):
        paint(folder / "images" / f"00{red}.jpg", red)
    (folder / "variants.txt").write_text("707-320\nDC-10 series\n")
    (folder / "images_variant_trainval.txt").write_text("000 707-320\n001 DC-10 series\n003 707-320\n")
    (folder / "images_variant_test.txt").write_text("002 DC-10 series\n")
    dataset = load("fgvc_aircraft", tmp_path, train_splits=("trainval",))
    assert (reds(dataset.train), list(dataset.train.labels)) == ([0, 1, 3], [0, 1, 0])
    assert (reds(dataset.test), list(dataset.test.labels)) == ([2], [1])
    assert dataset.classes == ("707-320", "DC-10 series")


def test_pixels_of_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i].reshape(1, -1), "labels": [i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(6)]}))
    dataset = load("cifar10", tmp_path)
    assert list(dataset.train.labels) == [0, 1, 2, 3, 4]
    assert list(dataset.test.labels) == [5]
    np.testing.assert_array_equal(np.asarray(dataset.train.inputs[3]), pixels[3].transpose(1, 2, 0))
    np.testing.assert_array_equal(np.asarray(dataset.test.inputs[0]), pixels[5].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dtd", "dtd/dtd/images"),
        ("eurosat", "eurosat/2750"),
        ("cifar10", "cifar-10-batches-py"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
    ],
)
@pytest.mark.parametrize("exists", [False, True], ids=["no folder", "empty folder"])
def test_a_missing_copy_is_refused_with_the_layout_it_should_have(
    name: str, layout: str, exists: bool, tmp_path: Path
) -> None:
    root = tmp_path / "here"
    if exists:
        root.mkdir()
    with pytest.raises(TensLoRAError, match=rf"dataset\.root=\S*here: .*{layout}"):
        load(name, root, train_fraction=0.8 if name == "eurosat" else None)
    assert not exists or not list(root.iterdir())


def test_a_missing_label_file_is_refused(tmp_path: Path) -> None:
    splits = {split: names for split, names in TINY_DTD.items() if split != "test"}
    with pytest.raises(TensLoRAError, match=r"dataset\.root=.*test1\.txt"):
        load("dtd", write_dtd(tmp_path, splits))


def test_a_label_that_is_no_variant_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\n")
    for split in ("trainval", "test"):
        (folder / f"images_variant_{split}.txt").write_text("000 A380\n")
    with pytest.raises(TensLoRAError, match=r"dataset\.root=.*A380"):
        load("fgvc_aircraft", tmp_path, train_splits=("trainval",))


@pytest.mark.parametrize(
    ("labels", "classes", "line"),
    [
        ([0, 1], "ab", "the train split has 3 images, 2 labels"),
        (
            [1, 2, 3],
            "abc",
            "the labels must be whole numbers from 0 to 2, one for each class, and that of input 2 of the ",
        ),
        (
            [0, -1, 1],
            "ab",
            "the labels must be whole numbers from 0 to 1, one for each class, and that of input 1 of the ",
        ),
        ([0.0, 1.0, 0.0], "ab", "split is 0.0"),
        (["a", "b", "a"], "ab", 'split is "a"'),
        ([0, 1, 2], "abb", "the name of a class must be given once, and b is given twice"),
        (iter([0, 1, 2]), "abc", "the train split has labels of type list_iterator; must be a sequence, such as a"),
    ],
)
def test_what_a_source_of_ones_own_hands_over_is_checked(
    labels: Any, classes: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    source = Source(lambda *_: (ImageArrays(pixels), labels, [*classes]), "", {"train": 3, "test": 3})
    monkeypatch.setitem(SOURCES, "dtd", source)
    with pytest.raises(TensLoRAError, match=r"^dataset=dtd: ") as raised:
        load("dtd", tmp_path, train_splits=("train",))
    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("pixels", "given"),
    [
        (np.zeros((3, 8, 8, 3), np.float32), r"float32 of shape \(3, 8, 8, 3\)"),
        (np.zeros((3, 3, 8, 8), np.uint8), r"uint8 of shape \(3, 3, 8, 8\)"),
        ([np.zeros((8, 8, 3), np.uint8)] * 3, "of type list"),
    ],
)
def test_an_array_that_holds_no_images_is_refused(
    pixels: Any, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Source(lambda *_: (ImageArrays(pixels), [0, 1, 0], "ab"), "", {"train": 3, "test": 3})
    monkeypatch.setitem(SOURCES, "dtd", source)
    with pytest.raises(
        TensLoRAError, match=rf"^dataset=dtd: the images must be bytes \(uint8\) of.*, and are {given}$"
    ):
        load("dtd", tmp_path, train_splits=("train",))


def test_images_may_be_a_tensor_and_a_series_of_any_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrays = ImageArrays(torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1))
    series: Any = pandas.Series([*arrays], index=[7, 0, 1])
    source = Source(lambda *_: (series, [0, 1, 0], "ab"), "", {"train": 3, "test": 3})
    monkeypatch.setitem(SOURCES, "dtd", source)
    inputs = load("dtd", tmp_path, train_splits=("train",)).train.inputs
    assert [inputs[number].getpixel((0, 0)) for number in range(3)] == [0, 1, 2]


def test_labels_may_be_a_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    numbers: Any = torch.tensor([0, 1, 0])
    source = Source(lambda *_: (ImageArrays(pixels), numbers, "ab"), "", {"train": 3, "test": 3})
    monkeypatch.setitem(SOURCES, "dtd", source)
    assert list(load("dtd", tmp_path, train_splits=("train",)).train.labels) == [0, 1, 0]
