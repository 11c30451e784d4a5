"""From raw examples to what a model takes: image transforms, tokenisation, collation."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, ModelConfig, TextDatasetConfig, TransformConfig
from tenslora.harness.data import Examples
from tenslora.random_streams import stream_seed

Item = tuple[Any, int]
KEEP_BYTES = 2**32  # how much of one split's images may be kept in memory
Collate = Callable[[list[Item]], tuple[dict[str, Tensor], Tensor]]


class Pixels(Sequence[Any]):
    """Images decoded, resized and cut to one size, each of them once: arrays of bytes, (height, width, channels).

    They stay in memory that worker processes share where they are forked, so that the work of one epoch's workers
    serves the next epoch's. Where all of them would take more than KEEP_BYTES, none is kept.
    """

    def __init__(self, images: Sequence[Any], prepare: Callable[[Any], Any], size: int, channels: int) -> None:
        self.images, self.prepare, self.shape = images, prepare, (size, size, channels)
        self.kept: Any = None
        self._is_kept: Any = None
        count, bytes_ = len(images), len(images) * math.prod(self.shape)
        if 0 < bytes_ <= KEEP_BYTES:
            # Shared, and no file; the system finds room for a page when it is first written to.
            memory = np.frombuffer(mmap.mmap(-1, bytes_ + count), np.uint8)
            self.kept, self._is_kept = memory[:bytes_].reshape(count, *self.shape), memory[bytes_:]

    def __reduce__(self) -> tuple[Any, ...]:  # a process that is not forked starts with none
        return type(self), (self.images, self.prepare, self.shape[0], self.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if self.kept is None:
            return self._read(index)
        if not self._is_kept[index]:
            self.kept[index] = self._read(index)
            self._is_kept[index] = 1  # last, for whoever looks at the same time
        return self.kept[index]

    def _read(self, index: int) -> Any:
        return np.asarray(self.prepare(self.images[index])).reshape(self.shape)


class Encoded(TorchDataset[Item]):
    """Examples with an encoding applied when one is fetched.

    encode: what a model is given of an example; None: the example itself.
    augmented: the encoding draws random numbers. Each example then has a random stream of its own, a function of
    `stream` and its index, whichever process or worker it falls to.
    lengths: of each example, where batches are to hold examples of like length.
    """

    def __init__(
        self,
        inputs: Any,
        labels: Sequence[int],
        encode: Callable[[Any], Any] | None = None,
        augmented: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.inputs, self.labels, self.encode, self.augmented = inputs, labels, encode, augmented
        self.lengths = lengths
        self.stream: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        example, label = self.inputs[index], self.labels[index]
        if self.encode is None:
            return example, label
        if not self.augmented:
            return self.encode(example), label
        with torch.random.fork_rng(devices=[]):
            # This generator alone: torch.manual_seed would set the GPUs' too, where dropout draws.
            torch.default_generator.manual_seed(stream_seed("augmentation", *self.stream, index))
            return self.encode(example), label


# Classes and not closures, so that a worker process can be handed one however it was started.


@dataclass(frozen=True)
class Augmentation:
    """Random changes to an image, made by PIL: (height, width, channels) bytes to the same."""

    transform: Callable[[Any], Any]

    def __call__(self, pixels: Any) -> Any:
        from PIL import Image

        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return np.asarray(self.transform(image)).reshape(pixels.shape)


@dataclass(frozen=True)
class ImageCollate:
    """A batch of images, (examples, channels, height, width) floats under the model's name for them, and the labels.

    mean, std: of each channel, to normalise by; without them pixels stay in [0, 1].
    """

    input_name: str
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        from torchvision.transforms.v2 import functional as F

        pixels = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).contiguous()
        batch = F.to_dtype(pixels, torch.float32, scale=True)
        if self.mean is not None and self.std is not None:
            F.normalize(batch, list(self.mean), list(self.std), inplace=True)
        return {self.input_name: batch}, torch.tensor([label for _, label in items])


@dataclass(frozen=True)
class TextCollate:
    """A batch of token rows, padded to its longest or to `pad_to` tokens, and the labels."""

    tokenizer: Any
    pad_to: int | None

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.tokenizer.pad(
            [row for row, _ in items],
            padding=True if self.pad_to is None else "max_length",
            max_length=self.pad_to,
            return_tensors="pt",
        )
        return dict(batch), torch.tensor([label for _, label in items])


@dataclass(frozen=True)
class TokenRow:
    """One example's row of what the tokenizer gave for all."""

    columns: dict[str, list[list[int]]]

    def __call__(self, index: int) -> dict[str, list[int]]:
        return {name: column[index] for name, column in self.columns.items()}


def encode_images(
    train: Examples, test: Examples, config: ImageDatasetConfig, model: ModelConfig, input_name: str
) -> tuple[Encoded, Encoded, Collate]:
    """(train, test, collate) for images: (channels, image_size, image_size) floats, normalised as the backbone was.

    Training images are augmented as `config.transform` says, test images never.
    """

    def encoded(examples: Examples, augmented: bool) -> Encoded:
        settings = config.transform
        if not augmented:
            settings = replace(settings, color_jitter=0.0, flip=False)
        return _transformed(examples, settings, model)

    mean, std = (model.mean, model.std) if config.transform.normalize else (None, None)
    return encoded(train, True), encoded(test, False), ImageCollate(input_name, mean, std)


@cache_latest(2)  # the two splits of a dataset
def _transformed(examples: Examples, settings: TransformConfig, model: ModelConfig) -> Encoded:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import v2 as T

    size = round(model.image_size / settings.crop_ratio)
    prepare = T.Compose(
        [
            T.Grayscale(num_output_channels=model.channels) if model.channels == 1 else T.RGB(),
            T.Resize(
                [size, size] if settings.squash else [size], InterpolationMode(settings.interpolation), antialias=True
            ),
            T.CenterCrop(model.image_size),
        ]
    )
    augment: list[Any] = []
    if settings.color_jitter:
        jitter = [settings.color_jitter] * 4
        augment.append(T.RandomApply([T.ColorJitter(*jitter[:3], hue=min(jitter[3], 0.5))], p=0.5))
    if settings.flip:
        augment.append(T.RandomHorizontalFlip())
    return Encoded(
        Pixels(examples.inputs, prepare, model.image_size, model.channels),
        examples.labels,
        Augmentation(T.Compose(augment)) if augment else None,
        augmented=bool(augment),
    )


def encode_texts(
    train: Examples, test: Examples, config: TextDatasetConfig, tokenizer: Any
) -> tuple[Encoded, Encoded, Collate]:
    """(train, test, collate) for one or two sentences: token ids, padded per batch or to max_length.

    Pairs are encoded as pairs, with the model's own separators and, where it has them, segment ids.
    """
    longest = min(config.max_length, tokenizer.model_max_length)

    def encoded(examples: Examples) -> Encoded:
        rows = _tokenize(examples, tokenizer, longest)
        lengths = [len(row) for row in rows.columns["input_ids"]] if config.group_by_length else None
        return Encoded(range(len(examples)), examples.labels, rows, lengths=lengths)

    pad_to = None if config.padding == "longest" else longest
    return encoded(train), encoded(test), TextCollate(tokenizer, pad_to)


@cache_latest(2)  # the two splits of a dataset
def _tokenize(examples: Examples, tokenizer: Any, longest: int) -> TokenRow:
    sentences = [list(column) for column in zip(*examples.inputs, strict=True)]
    return TokenRow(dict(tokenizer(*sentences, truncation=True, max_length=longest)))


def encode(
    train: Examples, test: Examples, config: DatasetConfig, model: ModelConfig, input_name: str, tokenizer: Any
) -> tuple[Encoded, Encoded, Collate]:
    """(train, test, collate) as the dataset's modality asks."""
    if isinstance(config, TextDatasetConfig):
        return encode_texts(train, test, config, tokenizer)
    assert isinstance(config, ImageDatasetConfig)
    return encode_images(train, test, config, model, input_name)
