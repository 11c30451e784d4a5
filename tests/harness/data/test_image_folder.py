from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import forget_all
from tenslora.harness.config import ImageDatasetConfig
from tenslora.harness.data import Dataset
from tests.harness.data.image_folders import load, paint, reds
from tests.running import configured


def load_own(root: Path, seed: int = 0, **changes: Any) -> Dataset:
    return load("own", root, seed, **{"source": "image_folder", "train_splits": None, "test_split": None, **changes})


def write_split(folder: Path, classes: dict[str, list[int]]) -> Path:
    """Write the images of each class, which are as red as given."""
    for name, colours in classes.items():
        for red in colours:
            paint(folder / name / f"{red:03d}.png", red)
    return folder


def write_train_and_test(root: Path, test: str = "test") -> Path:
    write_split(root / "train", {"cat": [1, 2], "ant": [3]})
    write_split(root / test, {"cat": [4], "ant": [5, 6]})
    return root


@pytest.mark.parametrize("test", ["test", "val", "validation", "valid"])
def test_folders_of_classes(test: str, tmp_path: Path) -> None:
    dataset = load_own(write_train_and_test(tmp_path, test))
    assert dataset.classes == ("ant", "cat")
    assert (reds(dataset.train), list(dataset.train.labels)) == ([3, 1, 2], [0, 1, 1])
    assert (reds(dataset.test), list(dataset.test.labels)) == ([5, 6, 4], [0, 0, 1])
    reference = ImageFolder(str(tmp_path / "train"))
    assert [
        (str(path), label) for path, label in zip(dataset.train.inputs.paths, dataset.train.labels, strict=True)
    ] == (reference.samples)


def test_the_test_folder_is_preferred_to_val(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_split(write_train_and_test(tmp_path) / "val", {"cat": [7], "ant": [8]})
    with caplog.at_level(logging.INFO):
        assert reds(load_own(tmp_path).test) == [5, 6, 4]
    assert "tested on test/; val/ is not used" in caplog.text
    joined = load_own(tmp_path, train_splits=("train", "val"), test_split="test")
    assert reds(joined.train) == [3, 1, 2, 8, 7]
    assert reds(load_own(tmp_path, test_split="val").test) == [8, 7]


def test_a_fraction_divides_one_tree_by_the_seed(tmp_path: Path) -> None:
    write_split(tmp_path, {"b": list(range(20)), "a": list(range(100, 120))})

    def divided(seed: int) -> Dataset:
        return load_own(tmp_path, seed, train_fraction=0.75)

    dataset = divided(0)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (30, 10, ("a", "b"))
    assert sorted(reds(dataset.train) + reds(dataset.test)) == [*range(20), *range(100, 120)]
    for examples in (dataset.train, dataset.test):
        assert [int(red < 100) for red in reds(examples)] == list(examples.labels)
    assert reds(divided(0).test) == reds(dataset.test) != reds(divided(1).test)


def test_hidden_files_and_files_of_other_kinds_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_train_and_test(tmp_path)
    paint(tmp_path / "train" / ".ipynb_checkpoints" / "1.png", 9)
    paint(tmp_path / "train" / "ant" / ".cache" / "1.png", 9)
    paint(tmp_path / "train" / "$RECYCLE.BIN" / "1.png", 9)
    paint(tmp_path / "train" / "ant" / "@eaDir" / "1.png" / "SYNOPHOTO_THUMB_M.jpg", 9)
    (tmp_path / "train" / "ant" / "._003.png").write_bytes(b"a resource fork")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    paint(tmp_path / "train" / "loose.png", 9)
    dataset = load_own(tmp_path)
    assert (reds(dataset.train), dataset.classes) == ([3, 1, 2], ("ant", "cat"))
    assert "2 files that are no images are left out (.txt, a named pipe)" in caplog.text
    assert f"{tmp_path}/train: left out, because they are in no class's folder: 1 images" in caplog.text


def write_lists(root: Path, train: str, test: str) -> Path:
    for red in (1, 2, 3):
        paint(root / f"{red}.png", red)
    for red in (4, 5):
        paint(root / "images" / f"of {red}.png", red)
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)
    return root


LISTS: dict[str, Any] = {"train_list": "train.txt", "test_list": "test.txt"}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(("dog", "cat"), ("cat", "dog")), (("10", "9"), ("9", "10")), (("1", "0"), ("0", "1")), (("x", "1"), ("1", "x"))],
)
def test_lists(labels: tuple[str, str], classes: tuple[str, ...], tmp_path: Path) -> None:
    first, second = labels
    write_lists(tmp_path, f"1.png {first}\n\n3.png\t{second}\n", f"of 4.png  {first}\nof 5.png {second}\n")
    dataset = load_own(tmp_path, **LISTS)
    assert dataset.classes == classes
    assert (reds(dataset.train), reds(dataset.test)) == ([1, 3], [4, 5])
    assert list(dataset.train.labels) == list(dataset.test.labels) == [1, 0]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0c"])
def test_only_ends_of_lines_end_a_line_of_a_list(odd: str, tmp_path: Path) -> None:
    write_lists(tmp_path, f"a{odd}b.png x\r2.png y\r\n", "1.png x\n3.png y")
    paint(tmp_path / f"a{odd}b.png", 9)
    assert reds(load_own(tmp_path, **LISTS).train) == [9, 2]


def test_an_image_in_both_lists_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_own(write_lists(tmp_path, "1.png a\n2.png b\n", "3.png a\n1.png b\n"), **LISTS)
    assert "1 images are in both train.txt and test.txt" in caplog.text


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "1.png a\nalone\n",
            "2.png a\n",
            r"dataset\.train_list=train\.txt: line 2 of .* must be 'path label', .*alone",
        ),
        (
            f"1.png 1\n2.png {'7' * 5001}\n",
            "3.png 1\n",
            r"line 2 of .*: the label 7{20}\.\.\. is too long for a number \(5,001 digits\); must be a shorter one",
        ),
        ("1.png a\n2.png b\n", "\n\n", r"dataset\.test_list=test\.txt: .*test\.txt is empty"),
        (f"1.png a\n{'9.png,' * 99} b\n", "2.png a\n", r"line 2 of .*train\.txt: neither \S*9\.png,9\.png,"),
        ("1.png a\n9.png b\n", "2.png a\n", r"line 2 of .*train\.txt: neither \S*9\.png nor \S*images/9\.png exists"),
        ("1.png a\n2.png b\n", "3.png a\n2.png c\n", "same classes; b only in train.txt; c only in test.txt"),
        (
            "1.png a\n2.png b\n1.png b\n",
            "3.png a\n",
            r"line 3 of .*train\.txt: gives \S*1\.png the label b, .* line a$",
        ),
        (
            "1.png a\n2.png b\nimages/../1.png b\n",
            "3.png a\n",
            r"line 3 of .*train\.txt: gives \S*images/\.\./1\.png, which is \S*1\.png, the label b, .* line a$",
        ),
        ("1.png a\n", "2.png a\n", "at least two classes, but has only a"),
        ("\x80", "2.png a\n", r"dataset\.train_list=train\.txt: .*not a readable text file"),
    ],
)
def test_lists_that_are_wrong_are_refused(train: str, test: str, message: str, tmp_path: Path) -> None:
    write_lists(tmp_path, "", test)
    (tmp_path / "train.txt").write_bytes(train.encode("latin-1"))
    with pytest.raises(TensLoRAError, match=message):
        load_own(tmp_path, **LISTS)


def test_a_list_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(TensLoRAError, match=r"train_list=train\.txt: \S*train\.txt: must be a file, not a pipe"):
        load_own(tmp_path, **LISTS)


def test_a_list_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.train_list=train\.txt: \S*train\.txt: no such file"):
        load_own(tmp_path, **LISTS)


@pytest.mark.parametrize(
    ("folders", "changes", "message"),
    [
        ({"a": [1], "b": [2]}, {}, r"dataset\.root=\S+: there is no folder \S+/train; .*train_fraction.* there: a, b"),
        ({"train/a": [1]}, {}, r"dataset\.root=\S+: there is no folder \S+/test; "),
        (
            {"train/a": [1]},
            {"train_splits": ("./train",)},
            r"train_splits=\./train: must be .*, without a slash; there",
        ),
        ({"train/a": [1]}, {"train_splits": ("more",)}, r"dataset\.train_splits=more: there is no folder \S+/more"),
        ({"train": [1], "test/a": [1]}, {}, r"\S+/train has no folders, but must have one for each class"),
        ({"train/a": [1], "train/b": [], "test/a": [1]}, {}, r"dataset\.root=.*\(\.jpg.*but there are none in b"),
        ({"train/a\udcff": [1], "test/a": [1]}, {}, r"dataset\.root: \S*a\\udcff must have a name in utf-8, "),
        (
            {"train/a": [1], "test/a": [2]},
            {"train_splits": ("test",)},
            r"test_split=null: .* not trained on, and test is one",
        ),
        ({"train/a": [1]}, {"test_split": "train"}, r"test_split=train: .* not trained on, and train is one"),
        ({"train/a": [1], "test/a": [2]}, {}, "at least two classes, but has only a"),
        (
            {"train/a": [1], "train/b": [1], "test/a": [2]},
            {},
            "train and test must have the same classes; b only in tra",
        ),
        ({"train/a": [1], "test/a": [2]}, {"train_fraction": 0.5}, r"train_fraction=0\.5: must be null, .*test, train"),
        (
            {"a": [1, 2, 3], "b": [4]},
            {"train_fraction": 0.25},
            r"train_fraction=0\.25: .* no image of (a|b) is for train",
        ),
        ({"a": [1], "b": [4]}, {"train_fraction": 0.1}, "no training examples"),
        ({"a": [1], "outputs/run/.hydra": [1]}, {"train_fraction": 0.5}, r"\S+/outputs holds runs of train\.py"),
    ],
)
def test_folders_that_are_wrong_are_refused(
    folders: dict[str, list[int]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, colours in folders.items():
        (tmp_path / name).mkdir(parents=True)
        write_split(tmp_path, {name: colours})
    with pytest.raises(TensLoRAError, match=message) as error:
        load_own(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("link", "to", "again"),
    [("train/cat/x", ".", "train/cat"), ("train/cat/x", "..", "train/ant"), ("train/dog", "cat", "train/cat")],
)
def test_a_folder_that_is_reached_twice_is_refused(link: str, to: str, again: str, tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    (tmp_path / link).symlink_to(to)
    (tmp_path / "train/cat/y").symlink_to(".")  # with a second loop, the number of paths has no end
    with pytest.raises(TensLoRAError, match=rf"dataset\.root=\S+: \S+ and \S+/{again} are the same folder"):
        load_own(tmp_path)


@pytest.mark.parametrize("target", ["../ant/003.png", "../../elsewhere.png", None])
def test_an_image_of_two_classes_is_refused(target: str | None, tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    paint(tmp_path / "elsewhere.png", 9)
    (tmp_path / "train/ant/9.png").symlink_to("../../elsewhere.png")
    if target:
        (tmp_path / "train/cat/9.png").symlink_to(target)
    else:
        (tmp_path / "train/ant/hard.png").hardlink_to(tmp_path / "train/ant/003.png")
        load_own(tmp_path)
        forget_all()
        (tmp_path / "train/cat/9.png").hardlink_to(tmp_path / "train/ant/003.png")
    with pytest.raises(TensLoRAError, match=r"/train/cat/9\.png is an image of the class cat and, as \S+, of ant"):
        load_own(tmp_path)


def test_a_link_to_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    (tmp_path / "train/cat/.#1.png").symlink_to("nowhere")  # as editors leave them
    load_own(tmp_path)
    (tmp_path / "train/cat/9.png").symlink_to("../store/9.png")
    forget_all()
    line = r"^dataset\.root=\S+: \S+/train/cat/9\.png is a link to \.\./store/9\.png, which does not exist$"
    with pytest.raises(TensLoRAError, match=line):
        load_own(tmp_path)


def test_images_behind_a_link_are_taken(tmp_path: Path) -> None:
    write_train_and_test(tmp_path / "data")
    paint(tmp_path / "elsewhere" / "9.png", 9)
    (tmp_path / "data/train/cat/more").symlink_to(tmp_path / "elsewhere")
    assert reds(load_own(tmp_path / "data").train) == [3, 1, 2, 9]


def test_a_test_folder_that_is_the_training_folder_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_split(tmp_path / "train", {"cat": [1], "ant": [3]})
    (tmp_path / "test").symlink_to("train")
    load_own(tmp_path)
    assert "train/ and test/ are the same folder" in caplog.text


def test_the_home_of_nobody_is_a_missing_folder() -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.root=~nobody-here/x: no such folder"):
        load_own(Path("~nobody-here/x"))


def test_a_root_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.root=\S*nothing: no such folder"):
        load_own(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"dataset\.root=null: must be the folder of the images"),
        (
            ["dataset.root=x", "dataset.train_list=a"],
            r"dataset\.test_list=null: must be a file, because train_list is a",
        ),
        (["dataset.root=x", "dataset.test_list=a"], r"dataset\.train_list=null: must be a file"),
        (
            ["dataset.root=x", "dataset.train_list=a", "dataset.test_list=b", "dataset.train_fraction=0.5"],
            r"dataset\.train_fraction=0\.5: must be null, because train_list is a",
        ),
        (
            ["dataset.root=x", "dataset.train_fraction=0.5", "dataset.test_split=test"],
            r"dataset\.test_split=test: must be null, because train_fraction is 0\.5",
        ),
        (["dataset.root=x", "dataset.train_splits=[]"], r"dataset\.train_splits=\[\]: must be null for the usual one"),
        (["dataset.root=x", "dataset.train_splits=[a]", "dataset.test_split=a"], r"dataset\.test_split=a: must not be"),
        (["dataset.root=x", "dataset.name=a/b"], r"dataset\.name=a/b: must be a name of at most 100 letters"),
        (["dataset.root=x/tables"], r"dataset\.name=tables: .* and not tables"),
        (["dataset.root=/"], r"dataset\.root=/: its last part has no letter or digit of ASCII to make a name of"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        configured("dataset=image_folder", *words)


def test_another_dataset_has_no_lists() -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.train_list=a: must be null, because only dataset=image_folder"):
        configured("dataset=dtd", "+dataset.train_list=a")


def test_the_folders_name_is_the_datasets() -> None:
    run = configured("dataset=image_folder", "dataset.root=my/Pet photos/")
    assert isinstance(run.dataset, ImageDatasetConfig)
    assert (run.dataset.name, run.model.name) == ("Pet-photos", "vit_base")
    assert run.folder().startswith("Pet-photos/vit_base/")
    assert configured("dataset=image_folder", "dataset.root=my/pets", "dataset.name=ours").dataset.name == "ours"


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    for mode, colour in (("L", 7), ("RGBA", (7, 7, 7, 0)), ("P", 7), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("LA", (7, 9))):
        Image.new(mode, (5, 4), colour).save(tmp_path / "test" / "ant" / f"{mode}.tif")
    images = load_own(tmp_path).test.inputs
    assert Counter(images[index].mode for index in range(len(images))) == {"RGB": 9}


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(np.full((4, 4), 40000, np.uint16), "more than 8 bits"), (np.ones((4, 4), np.float32), "more than 8 bits")],
)
def test_pixels_that_would_be_clipped_are_refused(pixels: Any, message: str, tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "test" / "ant" / "deep.tif")
    with pytest.raises(TensLoRAError, match=rf"deep\.tif: has pixels of {message}"):
        reds(load_own(tmp_path).test)


def test_a_program_in_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: ran.append(1))
    write_train_and_test(tmp_path)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "train" / "cat" / "picture.png").write_bytes(program)
    with pytest.raises(TensLoRAError, match=r"picture\.png: must be an image, not a program in PostScript$"):
        reds(load_own(tmp_path).train)
    assert not ran


def test_an_enormous_image_is_refused_in_one_line(tmp_path: Path) -> None:
    write_train_and_test(tmp_path)
    (tmp_path / "train" / "cat" / "huge.pgm").write_bytes(b"P5 30000 30000 255\n")
    with pytest.raises(TensLoRAError, match=r"huge\.pgm: the image is too large") as error:
        reds(load_own(tmp_path).train)
    assert "\n" not in str(error.value)
