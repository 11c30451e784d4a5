"""A user's own images: folders named after the classes, or lists of paths with labels."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.commands import is_text
from tenslora.harness.config import ImageDatasetConfig
from tenslora.harness.data.examples import NO_EXAMPLES, Dataset, Examples, ImageFiles, divided, shortened, user_path
from tenslora.harness.data.image_lists import ImageList, read_image_list

log = logging.getLogger(__name__)

TEST_FOLDERS = ("test", "val", "validation", "valid")
"""Where test images are looked for, in this order."""

LAYOUT = (
    "it must hold train/<class>/ and test/<class>/ (or val/<class>/); for class folders without such a split, set "
    "dataset.train_fraction"
)


def load_image_folder(config: ImageDatasetConfig, seed: int) -> Dataset:
    """Load the images below `dataset.root`; docs/data.md describes the layouts.

    Args:
        config: the dataset's settings.
        seed: the seed of the split that `dataset.train_fraction` asks for.

    Returns:
        The dataset. Its classes are the folders' names in the order of `sorted`, or the labels of the lists.

    Raises:
        TensLoRAError: if images, folders or lists are missing or contradict each other.
    """
    root = _existing_root(config)
    if config.train_list is not None and config.test_list is not None:
        dataset = _listed(root, config.train_list, config.test_list)
    elif config.train_fraction is not None:
        dataset = _divided(root, config.train_fraction, seed)
    else:
        dataset = _in_split_folders(root, config)
    if len(dataset.classes) < 2:
        raise TensLoRAError(f"dataset.root={root}: must have at least two classes, but has only {dataset.classes[0]}")
    return dataset


def load_test_images(config: ImageDatasetConfig) -> tuple[Examples, tuple[str, ...]]:
    """Load the images below `dataset.root` to test on, without images to train on.

    Args:
        config: the dataset's settings.

    Returns:
        (the images of `dataset.test_list` or of the folder to test on, the names of their classes). If there is no such
        folder, all images are for testing.

    Raises:
        TensLoRAError: if images, folders or lists are missing.
    """
    root = _existing_root(config)
    if config.test_list is not None:
        images = read_image_list(root / config.test_list, root, f"dataset.test_list={config.test_list}")
        classes = sorted(set(images.labels))
        return Examples(ImageFiles(images.paths), list(map(classes.index, images.labels))), tuple(classes)
    present = _subfolders(root)
    if config.test_split is not None and config.test_split not in present:
        raise TensLoRAError(
            f"dataset.test_split={config.test_split}: there is no folder {root / config.test_split}; set it to null to "
            f"test on class folders that lie directly in {root}"
        )
    found = [config.test_split] if config.test_split else [name for name in TEST_FOLDERS if name in present]
    return _read_classes(root, root / found[0] if found else root)


def _existing_root(config: ImageDatasetConfig) -> Path:
    assert config.root is not None
    root = user_path(config.root)
    if not root.is_dir():
        raise TensLoRAError(f"dataset.root={config.root}: no such folder")
    return root


def _in_split_folders(root: Path, config: ImageDatasetConfig) -> Dataset:
    present = _subfolders(root)
    found = [name for name in TEST_FOLDERS if name in present]
    train_splits = config.train_splits or ("train",)
    test_split = config.test_split or (found[0] if found else "test")
    tested = config.validation is None
    needed = [("train_splits", split) for split in train_splits] + ([("test_split", test_split)] if tested else [])
    for setting, split in needed:
        if split not in present:
            listed = shortened(present) or "nothing"
            cause = "root" if getattr(config, setting) is None else setting
            value = root if cause == "root" else split
            if cause != "root" and "/" in split:
                raise TensLoRAError(
                    f"dataset.{cause}={value}: must be the name of a folder in {root}, without a slash; there are "
                    f"{listed}"
                )
            raise TensLoRAError(
                f"dataset.{cause}={value}: there is no folder {root / split}; {LAYOUT}. Folders there: {listed}"
            )
    if tested and test_split in train_splits:
        raise TensLoRAError(
            f"dataset.test_split={config.test_split or 'null'}: must be a folder that is not trained on, and "
            f"{test_split} is one of train_splits"
        )
    if tested and config.test_split is None and found[1:]:
        log.info("%s: tested on %s/; %s/ is not used", config.name, test_split, "/, ".join(found[1:]))
    if tested:
        for split in train_splits:
            if os.path.realpath(root / split) == os.path.realpath(root / test_split):
                log.warning("%s: %s/ and %s/ are the same folder", config.name, split, test_split)
    train = [_read_classes(root, root / split) for split in train_splits]
    test, classes = _read_classes(root, root / test_split) if tested else (NO_EXAMPLES, train[-1][1])
    for split, (_, own_classes) in zip(train_splits, train, strict=True):
        _check_same_classes(f"dataset.root={root}", (split, own_classes), (needed[-1][1], classes))
    paths = [path for examples, _ in train for path in examples.inputs.paths]
    labels = [label for examples, _ in train for label in examples.labels]
    return Dataset(Examples(ImageFiles(paths), labels), test, classes)


def _divided(root: Path, train_fraction: float, seed: int) -> Dataset:
    present = _subfolders(root)
    if "train" in present and set(present) <= {"train", *TEST_FOLDERS}:
        raise TensLoRAError(
            f"dataset.train_fraction={train_fraction}: must be null, because {root} is divided into "
            f"{', '.join(present)}; to divide one of these folders, set dataset.root to it"
        )
    examples, classes = _read_classes(root, root)
    train, test = divided(examples, train_fraction, seed)
    trained = set(train.labels)
    if train.labels and len(trained) < len(classes):
        left_out = shortened(name for number, name in enumerate(classes) if number not in trained)
        raise TensLoRAError(
            f"dataset.train_fraction={train_fraction}: with this seed, no image of {left_out} is for training; give a "
            f"larger fraction"
        )
    return Dataset(train, test, classes)


@cache_latest(4)
def _read_classes(root: Path, folder: Path) -> tuple[Examples, tuple[str, ...]]:
    """Read a folder of class folders: the images, by class and path, and the names of the classes."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = _subfolders(folder)
    if not classes:
        raise TensLoRAError(f"dataset.root={root}: {folder} has no folders, but must have one for each class")
    skipped: Counter[str] = Counter()
    hard_links: dict[tuple[int, int], tuple[str, str]] = {}  # by device and inode, the class and the path of an image

    def is_image(path: str) -> bool:
        parts = Path(path).relative_to(folder).parts
        if any(map(_is_of_a_system, parts)):
            return False
        suffix = Path(path).suffix.lower()
        status = _status(path)
        if status and stat.S_ISFIFO(status.st_mode):  # it would be read for ever
            suffix = "a named pipe"
        if suffix not in IMG_EXTENSIONS:
            skipped[suffix or "no suffix"] += 1
        elif status is None and os.path.islink(path):  # as of a store that has not been fetched
            raise TensLoRAError(f"dataset.root={root}: {path} is a link to {os.readlink(path)}, which does not exist")
        elif status and status.st_nlink > 1:
            other, first = hard_links.setdefault((status.st_dev, status.st_ino), (parts[0], path))
            if other != parts[0]:
                raise _of_two_classes(root, path, parts[0], first, other)
        return suffix in IMG_EXTENSIONS

    _refuse_runs_and_links_to_others(root, folder, classes)
    numbers = {name: number for number, name in enumerate(classes)}
    samples: list[tuple[str, int]] = make_dataset(str(folder), numbers, is_valid_file=is_image, allow_empty=True)
    labels = [label for _, label in samples]
    if empty := set(range(len(classes))).difference(labels):
        names = shortened(classes[number] for number in sorted(empty))
        raise TensLoRAError(
            f"dataset.root={root}: each folder in {folder} must have images ({', '.join(IMG_EXTENSIONS)}), but there "
            f"are none in {names}"
        )
    loose = [file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()]
    if loose := [file for file in loose if not file.name.startswith(".")]:
        log.warning("%s: left out, because they are in no class's folder: %d images", folder, len(loose))
    if skipped:
        suffixes = ", ".join(sorted(skipped))
        log.warning("%s: %d files that are no images are left out (%s)", folder, skipped.total(), suffixes)
    return Examples(ImageFiles([Path(path) for path, _ in samples]), labels), tuple(classes)


def _status(path: str) -> os.stat_result | None:
    """What the system says of a file, or of what a link leads to; None if that does not exist."""
    try:
        return os.stat(path)
    except PermissionError:
        raise
    except OSError:  # also for a link in a circle
        return None


def _refuse_runs_and_links_to_others(root: Path, folder: Path, classes: Iterable[str]) -> None:
    """Refuse links by which images would count twice, in two classes, or without an end, and the figures of runs."""
    found: dict[str, tuple[str, str]] = {}  # by the real path of a folder, the class and the path by which it is found
    links: list[tuple[str, str]] = []  # (class, path) of links to files

    to_visit = [(name, str(folder / name)) for name in reversed(list(classes))]
    while to_visit:
        name, place = to_visit.pop()
        _, first = found.setdefault(os.path.realpath(place), (name, place))
        if first != place:
            raise TensLoRAError(
                f"dataset.root={root}: {place} and {first} are the same folder, so that its images would count twice; "
                f"remove the link"
            )
        try:
            with os.scandir(place) as entries:
                here = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise TensLoRAError(f"dataset.root={root}: {place} cannot be read ({error.strerror})") from error
        if any(entry.name == ".hydra" for entry in here):
            raise TensLoRAError(
                f"dataset.root={root}: {folder / name} holds runs of train.py, and would be a class; move it, or the "
                f"classes' folders to a folder of their own"
            )
        to_visit += [(name, entry.path) for entry in here if entry.is_dir()]
        links += [(name, entry.path) for entry in here if entry.is_symlink() and not entry.is_dir()]
    labels: dict[str, str] = {}
    for name, link in links:
        target = os.path.realpath(link)
        other, _ = found.get(os.path.dirname(target), (labels.setdefault(target, name), ""))
        if other != name:
            raise _of_two_classes(root, link, name, target, other)


def _of_two_classes(root: Path, path: str, name: str, first: str, other: str) -> TensLoRAError:
    return TensLoRAError(
        f"dataset.root={root}: {path} is an image of the class {name} and, as {first}, of {other}; remove one"
    )


@cache_latest(1)
def _listed(root: Path, train_list: str, test_list: str) -> Dataset:
    train = read_image_list(root / train_list, root, f"dataset.train_list={train_list}")
    test = read_image_list(root / test_list, root, f"dataset.test_list={test_list}")
    _check_same_classes(f"dataset.train_list={train_list}", (train_list, train.labels), (test_list, test.labels))
    if both := set(train.paths) & set(test.paths):
        log.warning("%d images are in both %s and %s", len(both), train_list, test_list)
    are_numbers = all(label.isdecimal() for label in train.labels)
    classes = sorted(set(train.labels), key=(lambda label: (int(label), label)) if are_numbers else None)
    number = {name: index for index, name in enumerate(classes)}

    def examples(images: ImageList) -> Examples:
        return Examples(ImageFiles(images.paths), [number[label] for label in images.labels])

    return Dataset(examples(train), examples(test), tuple(classes))


def _check_same_classes(setting: str, one: tuple[str, Iterable[str]], other: tuple[str, Iterable[str]]) -> None:
    """Check that two parts of a dataset, each given by its name and its classes, have the same classes."""
    differences = [
        f"{shortened(sorted(only))} only in {name}"
        for (name, classes), (_, others) in ((one, other), (other, one))
        if (only := set(classes).difference(others))
    ]
    if differences:
        raise TensLoRAError(f"{setting}: {one[0]} and {other[0]} must have the same classes; {'; '.join(differences)}")


def _is_of_a_system(name: str) -> bool:
    """Whether a file or folder is hidden, or made by a system, as Synology's thumbnails and the bin of a disk are."""
    return name.startswith(".") or name in (
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "__MACOSX",
    )


def _subfolders(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_of_a_system(entry.name))
    except OSError as error:
        raise TensLoRAError(f"dataset.root: {folder} cannot be read ({error})") from error
    for name in names:
        if not is_text(name):  # the record of a run could not hold it
            encoding = sys.getfilesystemencoding()
            remedy = "rename the folder" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise TensLoRAError(
                f"dataset.root: {folder / name} must have a name in {encoding}, the encoding of this locale; {remedy}"
            )
    return names
