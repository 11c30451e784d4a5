"""Datasets: raw examples with labels, and the names of the classes."""

from __future__ import annotations

import logging
from dataclasses import replace

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, TextDatasetConfig
from tenslora.harness.data.examples import Dataset, Examples, draw
from tenslora.harness.data.images import load_images
from tenslora.harness.data.texts import load_texts

__all__ = ["Dataset", "Examples", "load_dataset"]

log = logging.getLogger(__name__)


@cache_latest(1)
def load_dataset(config: DatasetConfig, seed: int) -> Dataset:
    """Load the training and test examples that a config asks for.

    Args:
        config: the dataset's settings.
        seed: the seed of the random choice of `config.train_size` examples, and of a random split.

    Returns:
        The dataset.

    Raises:
        TensLoRAError: if the data is missing or damaged, or if it cannot be downloaded; the message says where the data
            was looked for.
    """
    if isinstance(config, TextDatasetConfig):
        dataset = load_texts(config)
    else:
        assert isinstance(config, ImageDatasetConfig)
        dataset = load_images(config, seed)
    available = len(dataset.train)
    if config.train_size is not None and config.train_size < available:
        dataset = replace(dataset, train=dataset.train.select(draw(available, config.train_size, seed)))
    for split, examples in (("training", dataset.train), ("test", dataset.test), *dataset.more_tests.items()):
        if not len(examples):
            raise TensLoRAError(f"dataset={config.name}: it has no {split} examples")
    log.info(
        "%s: %d of %d training examples, %d test examples, %s",
        config.name, len(dataset.train), available, len(dataset.test) + sum(map(len, dataset.more_tests.values())),
        dataset.task if dataset.task == "regression" else f"{len(dataset.classes)} classes",
    )  # fmt: skip
    return dataset
