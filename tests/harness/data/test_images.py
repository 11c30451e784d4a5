from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets.cifar
from PIL import Image
from sklearn.datasets import load_digits

from tenslora.errors import TensLoRAError
from tenslora.harness.config import ImageDatasetConfig, TransformConfig
from tenslora.harness.data import Dataset, Examples, load_dataset
from tenslora.harness.data.images import _uci_digits, digits


def load(name: str, root: Path | None, seed: int = 0, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "metrics": ["accuracy"],
        "train_splits": ["train"],
        "test_split": "test",
        "train_size": None,
        "train_fraction": None,
        **changes,
    }
    transform = TransformConfig(1.0, True, "bilinear", 0.0, False, True)
    where = None if root is None else str(root)
    config = ImageDatasetConfig(name=name, modality="image", root=where, transform=transform, **settings)
    return load_dataset(config, seed)


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (number, 0, 0)).save(path, format="PNG")


def numbers(examples: Examples) -> list[int]:
    return [examples.inputs[i].getpixel((0, 0))[0] for i in range(len(examples))]


def grey(examples: Examples) -> list[tuple[bytes, int]]:
    return [(np.asarray(examples.inputs[i]).tobytes(), label) for i, label in enumerate(examples.labels)]


def test_digits_are_read_wherever_scikit_learn_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [_uci_digits()]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for pixels, targets in [*read, _uci_digits()]:
        expected = load_digits(return_X_y=True)
        np.testing.assert_array_equal(pixels, expected[0])
        np.testing.assert_array_equal(targets, expected[1])


@pytest.mark.parametrize("wanted", [range(5, 10), range(5)])
def test_digits_are_scikit_learns_each_once_in_train_or_test(wanted: range) -> None:
    dataset = digits(wanted)
    pixels, targets = load_digits(return_X_y=True)
    expected = Counter(
        (np.round(image / 16 * 255).astype(np.uint8).tobytes(), str(target))
        for image, target in zip(pixels, targets, strict=True)
        if target in wanted
    )
    found = Counter((image, dataset.classes[label]) for image, label in grey(dataset.train) + grey(dataset.test))
    assert found == expected
    of_class = np.bincount(targets, minlength=10)
    for label, digit in enumerate(wanted):
        assert list(dataset.test.labels).count(label) == of_class[digit] // 3
        assert list(dataset.train.labels).count(label) == of_class[digit] - of_class[digit] // 3


def test_digits_dataset_is_the_five_that_the_backbone_never_saw() -> None:
    dataset = load("digits", None)
    assert dataset.classes == ("5", "6", "7", "8", "9")
    assert (len(dataset.train), len(dataset.test)) == (599, 297)
    assert dataset.train.inputs[0].size == (8, 8)


def dtd(root: Path, labels: dict[str, list[str]]) -> Path:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    number = 0
    for split, names in labels.items():
        (folder / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            number += 1
            paint(folder / "images" / name, number)
    return root


TINY_DTD = {
    "train": ["dotted/d1.jpg", "dotted/d2.jpg", "woven/w1.jpg"],
    "val": ["woven/w2.jpg", "dotted/d3.jpg"],
    "test": ["woven/w3.jpg", "dotted/d4.jpg", "woven/w4.jpg"],
}


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


def test_tiny_dtd(tmp_path: Path) -> None:
    dataset = load("dtd", dtd(tmp_path, TINY_DTD))
    assert dataset.classes == ("dotted", "woven")
    assert (numbers(dataset.train), list(dataset.train.labels)) == ([1, 2, 3], [0, 0, 1])
    assert (numbers(dataset.test), list(dataset.test.labels)) == ([6, 7, 8], [1, 0, 1])


def test_train_splits_are_joined_in_order(tmp_path: Path) -> None:
    train = load("dtd", dtd(tmp_path, TINY_DTD), train_splits=["train", "val"]).train
    assert (numbers(train), list(train.labels)) == ([1, 2, 3, 4, 5], [0, 0, 1, 1, 0])


def test_a_class_that_one_split_lacks_does_not_shift_the_labels_of_the_others(tmp_path: Path) -> None:
    root = dtd(tmp_path, {"train": ["a/1.jpg", "b/1.jpg", "c/1.jpg"], "test": ["c/2.jpg", "b/2.jpg"]})
    with pytest.raises(TensLoRAError, match="class"):
        load("dtd", root)


def test_train_size_draws_a_subset_from_the_seed(shared: Path) -> None:
    whole = load("dtd", shared / "data").train

    def paths(examples: Examples) -> list[Path]:
        return [examples.inputs.items.datasets[0].paths[i] for i in examples.inputs.indices]

    def drawn(seed: int) -> Examples:
        return load("dtd", shared / "data", seed=seed, train_size=100).train

    of_path = dict(zip(whole.inputs.datasets[0].paths, whole.labels, strict=True))
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert len(first) == len(set(paths(first))) == 100
    assert [of_path[path] for path in paths(first)] == list(first.labels)
    assert paths(first) == paths(again) != paths(other)
    assert len(set(first.labels)) == 10  # at random, not the first hundred
    assert first.inputs[3].tobytes() == Image.open(paths(first)[3]).convert("RGB").tobytes()


@pytest.mark.parametrize("size", [3, 1000])
def test_train_size_beyond_the_split_is_all_of_it(size: int, tmp_path: Path) -> None:
    assert numbers(load("dtd", dtd(tmp_path, TINY_DTD), train_size=size).train) == [1, 2, 3]


def eurosat(root: Path) -> Path:
    for number in range(30):
        paint(root / "eurosat" / "2750" / ["Forest", "River", "SeaLake"][number % 3] / f"{number}.jpg", number)
    return root


def test_eurosat_is_split_by_the_seed(tmp_path: Path) -> None:
    root = eurosat(tmp_path)

    def split(seed: int, fraction: float = 0.8) -> Dataset:
        return load("eurosat", root, seed, train_splits=None, test_split=None, train_fraction=fraction)

    dataset = split(0)
    train, test = numbers(dataset.train), numbers(dataset.test)
    assert (len(train), len(test)) == (24, 6)
    assert sorted(train + test) == list(range(30))
    for examples in (dataset.train, dataset.test):
        assert [number % 3 for number in numbers(examples)] == list(examples.labels)
    assert dataset.classes == ("Forest", "River", "SeaLake")
    assert numbers(split(0).train) == train
    assert numbers(split(1).train) != train
    assert len(split(0, 0.5).train) == 15
    assert len({tuple(numbers(split(seed).test)) for seed in range(5)}) == 5


def test_eurosat_without_a_fraction_says_so(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.train_fraction=None"):
        load("eurosat", eurosat(tmp_path))


def test_fgvc_aircraft_variants(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    for number in range(4):
        paint(folder / "images" / f"00{number}.jpg", number)
    (folder / "variants.txt").write_text("707-320\nDC-10 series\n")
    (folder / "images_variant_trainval.txt").write_text("000 707-320\n001 DC-10 series\n003 707-320\n")
    (folder / "images_variant_test.txt").write_text("002 DC-10 series\n")
    dataset = load("fgvc_aircraft", tmp_path, train_splits=["trainval"])
    assert (numbers(dataset.train), list(dataset.train.labels)) == ([0, 1, 3], [0, 1, 0])
    assert (numbers(dataset.test), list(dataset.test.labels)) == ([2], [1])
    assert dataset.classes == ("707-320", "DC-10 series")


def test_cifar10_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i].reshape(1, -1), "labels": [i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(6)]}))
    dataset = load("cifar10", tmp_path)
    assert list(dataset.train.labels) == [0, 1, 2, 3, 4]
    assert list(dataset.test.labels) == [5]
    np.testing.assert_array_equal(np.asarray(dataset.train.inputs[3]), pixels[3].transpose(1, 2, 0))
    np.testing.assert_array_equal(np.asarray(dataset.test.inputs[0]), pixels[5].transpose(1, 2, 0))


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_an_unreadable_image_is_named_when_it_is_read(damage: str, tmp_path: Path) -> None:
    root = dtd(tmp_path, TINY_DTD)
    path = root / "dtd" / "dtd" / "images" / "dotted" / "d2.jpg"
    Image.effect_noise((64, 64), 50).save(path, format="JPEG")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"this is no image", "cut": content[: len(content) // 2]}[damage])
    train = load("dtd", root).train
    assert train.inputs[0].size == (6, 4)
    with pytest.raises(TensLoRAError, match=r"dotted/d2\.jpg: not a readable image") as caught:
        train.inputs[1]
    assert "\n" not in str(caught.value)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    root = dtd(tmp_path, TINY_DTD)
    (root / "dtd" / "dtd" / "images" / "dotted" / "d1.jpg").unlink()
    with pytest.raises(TensLoRAError, match=r"dotted/d1\.jpg"):
        load("dtd", root).train.inputs[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_splits": ["train", "dev"]}, "no split dev; there are train, val, test"),
        ({"test_split": "dev"}, "no split dev; there are train, val, test"),
        ({"test_split": None}, "no split None; there are train, val, test"),
        ({"train_splits": None}, "train_splits|no training examples"),
        ({"train_splits": []}, "train_splits|no training examples"),
    ],
)
def test_unknown_splits_are_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=complaint):
        load("dtd", dtd(tmp_path, TINY_DTD), **changes)


@pytest.mark.parametrize("name", ["dtd", "eurosat", "cifar10", "fgvc_aircraft"])
@pytest.mark.parametrize("there", [False, True], ids=["no folder", "empty folder"])
def test_missing_data_says_where_it_looked_and_for_what(name: str, there: bool, tmp_path: Path) -> None:
    root = tmp_path / "here"
    if there:
        root.mkdir()
    layout = {"dtd": "dtd/dtd/images", "eurosat": "eurosat/2750", "cifar10": "cifar-10-batches-py"}
    expected = layout.get(name, "fgvc-aircraft-2013b/data")
    with pytest.raises(TensLoRAError, match=rf"dataset\.root=\S*here: .*{expected}"):
        load(name, root, train_fraction=0.8 if name == "eurosat" else None)
    assert not there or not list(root.iterdir())


def test_a_missing_label_file_is_refused(tmp_path: Path) -> None:
    labels = {split: names for split, names in TINY_DTD.items() if split != "test"}
    with pytest.raises(TensLoRAError, match=r"dataset\.root=.*test1\.txt"):
        load("dtd", dtd(tmp_path, labels))


def test_an_fgvc_label_outside_the_variants_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\n")
    for split in ("trainval", "test"):
        (folder / f"images_variant_{split}.txt").write_text("000 A380\n")
    with pytest.raises(TensLoRAError, match=r"dataset\.root=.*A380"):
        load("fgvc_aircraft", tmp_path, train_splits=["trainval"])


def test_an_empty_test_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"no test examples|class"):
        load("dtd", dtd(tmp_path, {"train": ["a/1.jpg"], "test": []}))


def test_unknown_dataset_names_the_known_ones() -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.name=mnist: .*digits, dtd, eurosat, cifar10, fgvc_aircraft"):
        load("mnist", None)


@pytest.mark.parametrize("changes", [{"train_splits": ["val"]}, {"test_split": "train"}])
def test_settings_that_the_embedded_digits_have_no_use_for_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.(train_splits|test_split)=.*the digits are embedded"):
        load("digits", None, **changes)


def test_a_share_of_a_dataset_with_published_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.train_fraction=0\.5: dtd has published splits"):
        load("dtd", tmp_path, train_fraction=0.5)
