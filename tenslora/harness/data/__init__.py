"""A dataset, loaded: raw examples with labels, a metric and class names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, TextDatasetConfig
from tenslora.random_streams import stream_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Inputs (PIL images, or tuples of one or two sentences) with their class numbers."""

    inputs: Any  # a sequence: fetched by index, one at a time
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> Examples:
        return Examples(Selected(self.inputs, indices), [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Selected(Sequence[Any]):
    """Some of a sequence's items, fetched when asked for."""

    items: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.indices[index]]


@dataclass(frozen=True)
class Dataset:
    train: Examples
    test: Examples
    classes: tuple[str, ...]


@cache_latest(1)
def load_dataset(config: DatasetConfig, seed: int) -> Dataset:
    """Load the train and test examples that a dataset config asks for; random choices are drawn from `seed`.

    Raises TensLoRAError if the data is missing, damaged or cannot be downloaded: the message says where it was
    looked for.
    """
    if isinstance(config, TextDatasetConfig):
        from tenslora.harness.data.texts import load_texts

        dataset = load_texts(config)
    else:
        from tenslora.harness.data.images import load_images

        assert isinstance(config, ImageDatasetConfig)
        dataset = load_images(config, seed)
    available = len(dataset.train)
    if config.train_size is not None and config.train_size < available:
        dataset = replace(dataset, train=dataset.train.select(draw(available, config.train_size, seed)))
    if "f1" in config.metrics and len(dataset.classes) != 2:
        raise TensLoRAError(
            f"dataset.metrics={config.metrics}: f1 is for 2 classes, {config.name} has {len(dataset.classes)}"
        )
    for split, examples in (("training", dataset.train), ("test", dataset.test)):
        if not len(examples):
            raise TensLoRAError(f"dataset={config.name}: no {split} examples found")
    log.info(
        "%s: %d of %d training examples, %d test examples, %d classes",
        config.name, len(dataset.train), available, len(dataset.test), len(dataset.classes),
    )  # fmt: skip
    return dataset


def draw(count: int, size: int, seed: int) -> list[int]:
    """`size` of the numbers 0 to count - 1, drawn without replacement by a stream of their own, in rising order."""
    import numpy as np

    return sorted(np.random.default_rng(stream_seed("split", seed)).permutation(count)[:size].tolist())


def check_size(name: str, split: str, found: int, published: int | None) -> None:
    """Say so where a copy does not hold what was published under its name."""
    if published is not None and found != published:
        log.warning("%s: the %s split has %d examples here, %d as published", name, split, found, published)
