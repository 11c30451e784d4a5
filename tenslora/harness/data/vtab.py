"""VTAB-1k: 19 tasks of 1,000 training images each, in the files that NOAH's authors made and FacT and CaRA use.

Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", 2019
(arXiv 1910.04867). A task is a folder that holds images and the lists train800.txt, val200.txt, train800val200.txt and
test.txt, with lines "path label".
"""

from __future__ import annotations

from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import ImageDatasetConfig
from tenslora.harness.data.examples import (
    NO_EXAMPLES,
    Dataset,
    Examples,
    ImageFiles,
    user_path,
    warn_of_another_size,
)
from tenslora.harness.data.image_lists import read_image_list

CLASSES = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""The number of classes of each task, by the name of its folder."""

SPLITS = {"train800": 800, "val200": 200, "train800val200": 1000, "test": None}
"""The lists of a task, with the published number of images; None where it differs from task to task."""

PREFIX = "vtab_"
"""What a dataset's name has before the task's name, because some tasks are also datasets of their own."""


def load_vtab(config: ImageDatasetConfig) -> Dataset:
    """Load a task of VTAB-1k from `dataset.root`/<task>.

    Args:
        config: the dataset's settings; its name is `PREFIX` and one of `CLASSES`.

    Returns:
        The dataset. Its classes are named by their numbers.

    Raises:
        TensLoRAError: for settings that do not fit, or if a list or an image is missing, or a label is out of range.
    """
    task = config.name.removeprefix(PREFIX)
    if task not in CLASSES or task == config.name:
        names = ", ".join(PREFIX + name for name in CLASSES)
        raise TensLoRAError(f"dataset.name={config.name}: must be one of {names}")
    train_splits = config.train_splits or ()
    if not train_splits:
        raise TensLoRAError(f"dataset.train_splits=[]: must have at least one of {', '.join(SPLITS)}")
    for setting, split in [*(("train_splits", split) for split in train_splits), ("test_split", config.test_split)]:
        if split not in SPLITS:
            raise TensLoRAError(f"dataset.{setting}={split or 'null'}: must be one of {', '.join(SPLITS)}")
    if "train800val200" in train_splits and config.test_split in ("train800", "val200"):
        raise TensLoRAError(f"dataset.test_split={config.test_split}: must be test, because train800val200 includes it")
    if config.train_fraction is not None:
        raise TensLoRAError(f"dataset.train_fraction={config.train_fraction}: must be null, because VTAB-1k has lists")
    root = user_path(config.root or "")
    if config.root is None or not (root / task).is_dir():
        raise TensLoRAError(
            f"dataset.root={config.root or 'null'}: must be the folder of VTAB-1k's tasks, with {task}/images, "
            f"{task}/train800val200.txt, {task}/test.txt and so on"
        )
    parts = [_read_split(root, task, split) for split in train_splits]
    paths = [path for part in parts for path in part.inputs.paths]
    labels = [label for part in parts for label in part.labels]
    test = NO_EXAMPLES if config.validation is not None else _read_split(root, task, config.test_split or "")
    return Dataset(Examples(ImageFiles(paths), labels), test, tuple(map(str, range(CLASSES[task]))))


@cache_latest(4)
def _read_split(root: Path, task: str, split: str) -> Examples:
    images = read_image_list(root / task / f"{split}.txt", root / task, f"dataset.root={root}")
    last = CLASSES[task] - 1
    for line, label in zip(images.lines, images.labels, strict=True):
        if not (label.isdecimal() and int(label) <= last):
            raise TensLoRAError(
                f"dataset.root={root}: line {line} of {images.file}: the label must be a whole number from 0 to "
                f"{last}, but is {label}"
            )
    warn_of_another_size(f"{PREFIX}{task}", split, len(images.labels), SPLITS[split])
    return Examples(ImageFiles(images.paths), [int(label) for label in images.labels])
