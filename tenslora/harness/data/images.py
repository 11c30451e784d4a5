"""Image datasets, divided into training and test examples."""

from __future__ import annotations

from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.config import ImageDatasetConfig
from tenslora.harness.data.digits import load_digits
from tenslora.harness.data.examples import NO_EXAMPLES, Dataset, Examples, divided
from tenslora.harness.data.image_folder import load_image_folder
from tenslora.harness.data.torchvision_sources import SOURCES, read_split
from tenslora.harness.data.vtab import load_vtab


def load_images(config: ImageDatasetConfig, seed: int) -> Dataset:
    """Load the examples of an image dataset; see `tenslora.harness.data.load_dataset`."""
    if config.source == "image_folder":
        return load_image_folder(config, seed)
    if config.source == "vtab":
        return load_vtab(config)
    if config.name == "digits":
        return _embedded_digits(config)
    if config.name not in SOURCES:
        raise TensLoRAError(f"dataset.name={config.name}: must be one of digits, {', '.join(SOURCES)}")
    if None in SOURCES[config.name].sizes:
        return _random_split(config, seed)
    return _published_splits(config)


def _embedded_digits(config: ImageDatasetConfig) -> Dataset:
    for setting, value, only in (
        ("root", config.root or "null", "null"),
        ("train_splits", _shown(config.train_splits), "[train]"),
        ("test_split", config.test_split or "null", "test"),
        ("train_fraction", config.train_fraction or "null", "null"),
    ):
        if value != only:
            raise TensLoRAError(f"dataset.{setting}={value}: must be {only}, because the digits are embedded")
    return load_digits(range(5, 10))


def _random_split(config: ImageDatasetConfig, seed: int) -> Dataset:
    if config.train_fraction is None:
        raise TensLoRAError(
            f"dataset.train_fraction=null: must be a number, such as 0.8, because {config.name} has no published splits"
        )
    examples, classes = read_split(config.name, config.root, None)
    train, test = divided(examples, config.train_fraction, seed)
    return Dataset(train, test, classes)


def _published_splits(config: ImageDatasetConfig) -> Dataset:
    source = SOURCES[config.name]
    if config.train_fraction is not None:
        raise TensLoRAError(
            f"dataset.train_fraction={config.train_fraction}: must be null, because {config.name} has published splits"
        )
    if not config.train_splits:
        raise TensLoRAError(
            f"dataset.train_splits={_shown(config.train_splits)}: must have at least one of {source.splits}"
        )
    for setting, split in [
        *(("train_splits", split) for split in config.train_splits),
        ("test_split", config.test_split),
    ]:
        if split not in source.sizes:
            raise TensLoRAError(f"dataset.{setting}={split or 'null'}: {config.name} has the splits {source.splits}")
    from torch.utils.data import ConcatDataset

    read = [read_split(config.name, config.root, split) for split in config.train_splits]
    test = NO_EXAMPLES
    splits = dict(zip(config.train_splits, (classes for _, classes in read), strict=True))
    if config.validation is None:
        test, splits[str(config.test_split)] = read_split(config.name, config.root, config.test_split)
    *others, (reference, classes) = splits.items()
    for split, own_classes in others:
        if own_classes != classes:  # torchvision numbers the classes of each split separately
            raise TensLoRAError(
                f"dataset={config.name}: the splits {split} and {reference} do not have the same classes"
            )
    parts = [examples for examples, _ in read]
    inputs: ConcatDataset[Any] = ConcatDataset([part.inputs for part in parts])
    return Dataset(Examples(inputs, [label for part in parts for label in part.labels]), test, classes)


def _shown(splits: tuple[str, ...] | None) -> str:
    return "null" if splits is None else f"[{','.join(splits)}]"
