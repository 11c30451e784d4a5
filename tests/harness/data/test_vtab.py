"""VTAB-1k, from small files in its layout: the published ones were not at hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tenslora.errors import TensLoRAError
from tenslora.harness.config import ImageDatasetConfig, validate
from tenslora.harness.data import Dataset
from tenslora.harness.data.vtab import CLASSES
from tests.harness.data.image_folders import load, paint, reds
from tests.running import CONF, composed, configured

TASKS = sorted(path.stem for path in (CONF / "dataset" / "vtab").glob("*.yaml"))

LISTS = {
    "train800.txt": "images/train800/1.jpg 3\nimages/train800/2.jpg 0\n",
    "val200.txt": "images/val200/3.jpg 3\n",
    "train800val200.txt": "images/train800/1.jpg 3\nimages/train800/2.jpg 0\nimages/val200/3.jpg 3\n",
    "test.txt": "images/test/4.jpg 1\nimages/test/5.jpg 2\n",
}


def write_task(root: Path, task: str, lists: Mapping[str, str] = LISTS) -> Path:
    """Write a task of five images, which are red by the numbers of their files."""
    for red, split in enumerate(("train800", "train800", "val200", "test", "test"), start=1):
        paint(root / task / "images" / split / f"{red}.jpg", red)
    for name, content in lists.items():
        (root / task / name).write_text(content)
    return root


def load_task(root: Path | None, name: str = "vtab_kitti", **changes: Any) -> Dataset:
    return load(name, root, **{"source": "vtab", "train_splits": ("train800val200",), **changes})


def test_a_task_is_trained_on_a_thousand_images_and_tested_on_the_others(tmp_path: Path) -> None:
    dataset = load_task(write_task(tmp_path, "kitti"))
    assert (reds(dataset.train), list(dataset.train.labels)) == ([1, 2, 3], [3, 0, 3])
    assert (reds(dataset.test), list(dataset.test.labels)) == ([4, 5], [1, 2])
    assert dataset.classes == ("0", "1", "2", "3")


def test_a_fraction_for_validation_leaves_the_test_list_unread(tmp_path: Path) -> None:
    root = write_task(tmp_path, "kitti")
    (root / "kitti" / "test.txt").unlink()
    dataset = load_task(root, validation=0.5)
    assert dataset.validation is not None and len(dataset.test) == 0


def test_hyperparameters_are_chosen_on_val200(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_task(tmp_path, "kitti")
    with caplog.at_level(logging.WARNING):
        dataset = load_task(tmp_path, train_splits=("train800",), test_split="val200")
    assert (reds(dataset.train), reds(dataset.test)) == ([1, 2], [3])
    assert "vtab_kitti: the train800 split has 2 examples here, 800 as published" in caplog.text
    both = load_task(tmp_path, train_splits=("train800", "val200"))
    assert reds(both.train) == reds(load_task(tmp_path).train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "kitti"}, r"dataset\.name=kitti: must be one of vtab_cifar, .*vtab_smallnorb_ele"),
        ({"name": "vtab_mnist"}, r"dataset\.name=vtab_mnist: must be one of"),
        ({"root": None}, r"dataset\.root=null: must be the folder of VTAB-1k's tasks, with kitti/images, "),
        ({"name": "vtab_dtd"}, r"dataset\.root=\S+: must be the folder of VTAB-1k's tasks, with dtd/images, "),
        ({"train_splits": ("train",)}, r"dataset\.train_splits=train: must be one of train800, val200, "),
        ({"train_splits": None}, r"dataset\.train_splits=\[\]: must have at least one of train800"),
        ({"test_split": None}, r"dataset\.test_split=null: must be one of train800"),
        ({"test_split": "val200"}, r"dataset\.test_split=val200: must be test, because train800val200 includes it"),
        ({"train_fraction": 0.5}, r"dataset\.train_fraction=0\.5: must be null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_task(tmp_path, "kitti")
    with pytest.raises(TensLoRAError, match=message):
        load_task(**{"root": tmp_path, **changes})


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"test.txt": "images/test/4.jpg 4\n"}, r"line 1 of \S*test\.txt: the label must be a .* 0 to 3, but is 4"),
        ({"test.txt": "images/test/4.jpg -1\n"}, r"line 1 of \S*test\.txt: the label must be .* but is -1"),
        ({"test.txt": f"images/test/4.jpg {'9' * 5001}\n"}, r"line 1 of \S*test\.txt: the label 9+\.\.\. is too long "),
        ({"test.txt": "images/test/4.jpg car\n"}, r"line 1 of \S*test\.txt: the label must be .* but is car"),
        ({"test.txt": "images/test/9.jpg 1\n"}, r"line 1 of \S*test\.txt: neither \S*/kitti/images/test/9\.jpg nor "),
        ({"test.txt": "images/test/4.jpg\n"}, r"line 1 of \S*test\.txt must be 'path label'"),
    ],
)
def test_lists_that_are_wrong_are_refused(lists: dict[str, str], message: str, tmp_path: Path) -> None:
    write_task(tmp_path, "kitti", {**LISTS, **lists})
    with pytest.raises(TensLoRAError, match=rf"dataset\.root=\S+: {message}"):
        load_task(tmp_path)


def test_a_list_that_is_missing_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "kitti", {"test.txt": LISTS["test.txt"]})
    with pytest.raises(TensLoRAError, match=r"dataset\.root=\S+: \S*kitti/train800val200\.txt: no such file"):
        load_task(tmp_path)


def test_the_tasks_differ_in_their_names_alone() -> None:
    assert sorted(CLASSES) == TASKS
    files = [(CONF / "dataset" / "vtab" / f"{task}.yaml").read_text() for task in TASKS]
    assert {file.replace(f"vtab_{task}\n", "") for file, task in zip(files, TASKS, strict=True)} == {
        files[0].replace(f"vtab_{TASKS[0]}\n", "")
    }


def test_a_task_has_the_settings_of_the_literature() -> None:
    run = configured("dataset=vtab/caltech101")
    dataset = run.dataset
    assert isinstance(dataset, ImageDatasetConfig)
    assert (dataset.name, dataset.source, run.model.name) == ("vtab_caltech101", "vtab", "vit_base_in21k")
    assert (dataset.train_splits, dataset.test_split) == (("train800val200",), "test")
    transform = dataset.transform
    assert (transform.squash, transform.interpolation, transform.normalize) == (True, "bicubic", "imagenet")
    assert run.folder().startswith("vtab_caltech101/vit_base_in21k/qkv_depth-")
    settings = run.settings()
    assert validate(settings) == run
    expected: Any = OmegaConf.to_container(composed("dataset=vtab/caltech101"), resolve=True)
    assert settings["dataset"] == expected["dataset"]


def test_a_grey_model_is_not_normalised_with_imagenets_colours() -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.transform\.normalize=imagenet: must be .*vit_digits"):
        configured("dataset=vtab/kitti", "model=vit_digits")
    assert configured("dataset=vtab/kitti", "model=vit_digits", "dataset.transform.normalize=true")
