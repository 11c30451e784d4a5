"""Datasets: raw examples with labels, and the names of the classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, TextDatasetConfig
from tenslora.harness.data.dataset_form import checked
from tenslora.harness.data.examples import NO_EXAMPLES, Dataset, Examples, draw, shortened, user_path
from tenslora.harness.data.image_folder import load_test_images
from tenslora.harness.data.images import load_images
from tenslora.harness.data.text_files import load_test_texts, load_text_files
from tenslora.harness.data.texts import load_texts

__all__ = ["OWN_FILES", "Dataset", "Examples", "load_dataset", "load_tests"]

OWN_FILES = ("image_folder", "text_files")
"""The sources of datasets that are a user's own files."""

log = logging.getLogger(__name__)


@contextmanager
def _permitted(config: DatasetConfig) -> Iterator[None]:
    """A context in which a file or folder of the data that the user may not read is named."""
    try:
        yield
    except PermissionError as error:
        root = config.root and os.path.abspath(user_path(config.root))
        if not root or not os.path.abspath(error.filename or "").startswith(root):
            raise
        raise TensLoRAError(
            f"dataset.root={config.root}: {error.filename} cannot be read ({error.strerror})"
        ) from error


@cache_latest(1)
def load_dataset(config: DatasetConfig, seed: int) -> Dataset:
    """Load the training and test examples that a config asks for.

    Args:
        config: the dataset's settings.
        seed: the seed of the random choice of `config.train_size` examples, of a random split, and of the validation
            split.

    Returns:
        The dataset. With `config.validation` that fraction of the training examples (those that `config.train_size`
        leaves) is the validation split, and the test split is not loaded.

    Raises:
        TensLoRAError: if the data is missing or damaged, or if it cannot be downloaded; the message says where the data
            was looked for. Also if there are too few training examples to hold some out.
    """
    with _permitted(config):
        if isinstance(config, TextDatasetConfig):
            dataset = load_text_files(config, seed) if config.source == "text_files" else load_texts(config)
        else:
            assert isinstance(config, ImageDatasetConfig)
            dataset = load_images(config, seed)
    dataset = checked(f"dataset={config.name}", dataset, isinstance(config, TextDatasetConfig))
    available = len(dataset.train)
    if config.train_size is not None and config.train_size > available:
        log.warning(
            "dataset.train_size=%d: %s has %d training examples; all are used",
            config.train_size,
            config.name,
            available,
        )
    if config.train_size is not None and config.train_size < available:
        dataset = replace(dataset, train=dataset.train.select(draw(available, config.train_size, seed)))
    if config.validation is not None:
        dataset = _with_validation(dataset, config, config.validation, seed)
    scored = {config.scored_on: dataset.scored, **dataset.more_tests}
    _require_examples(f"dataset={config.name}", {"training": dataset.train, **scored})
    _warn_of_equal_labels(dataset, config)
    if without := sorted(set(range(len(dataset.classes))).difference(dataset.train.labels)):
        names = shortened(dataset.classes[number] for number in without)
        log.warning("%s: no training example is of %s", config.name, names)
    log.info(
        "%s: %d of %d training examples, %d %s examples, %s",
        config.name, len(dataset.train), available, sum(map(len, scored.values())), config.scored_on,
        dataset.task if dataset.task == "regression" else f"{len(dataset.classes)} classes",
    )  # fmt: skip
    return dataset


def load_tests(config: DatasetConfig, seed: int, classes: tuple[str, ...]) -> Dataset:
    """Load examples to test a trained model on.

    Args:
        config: the dataset's settings.
        seed: the seed of a random split.
        classes: the names of the model's classes, by class number; () for a regression.

    Returns:
        The dataset. Of a user's own files only the examples to test on are read, or all if there is no split of them.

    Raises:
        TensLoRAError: if the data is missing or damaged, or if there are no examples.
    """
    if config.source not in OWN_FILES:
        return load_dataset(config, seed)
    with _permitted(config):
        if isinstance(config, TextDatasetConfig):
            dataset = load_test_texts(config, classes)
        else:
            assert isinstance(config, ImageDatasetConfig)
            test, own_classes = load_test_images(config)
            dataset = Dataset(NO_EXAMPLES, test, own_classes)
    setting = f"dataset={config.name}" if config.root is None else f"dataset.root={config.root}"
    _require_examples(setting, {config.scored_on: dataset.scored})
    _warn_of_equal_labels(dataset, config)
    return dataset


def _require_examples(setting: str, splits: Mapping[str, Examples]) -> None:
    for split, examples in splits.items():
        if not len(examples):
            raise TensLoRAError(f"{setting}: it has no {split} examples")


def _warn_of_equal_labels(dataset: Dataset, config: DatasetConfig) -> None:
    for split, examples in {config.scored_on: dataset.scored, **dataset.more_tests}.items():
        if dataset.task == "regression" and len(set(examples.labels)) == 1:
            log.warning(
                "%s: all %s labels are %g; a correlation with them counts as 0", config.name, split, examples.labels[0]
            )


def _with_validation(dataset: Dataset, config: DatasetConfig, fraction: float, seed: int) -> Dataset:
    count = len(dataset.train)
    if count == 1:
        raise TensLoRAError(
            f"dataset.validation={fraction:g}: {config.name} has 1 training example, and at least 2 are needed"
        )
    size = min(max(1, round(fraction * count)), count - 1)
    held_out = draw(count, size, seed, purpose="validation")
    kept = sorted(set(range(count)).difference(held_out))
    train, validation = dataset.train.select(kept), dataset.train.select(held_out)
    return replace(dataset, train=train, test=NO_EXAMPLES, more_tests={}, validation=validation, is_drawn=True)
