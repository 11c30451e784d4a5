"""From raw examples to what a model takes: image transforms, tokenization, collation.

Everything that a loader's worker processes need is an instance of a class at module level, because a worker that is
not forked is sent it by pickle, which cannot send closures.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, ModelConfig, TextDatasetConfig, TransformConfig
from tenslora.harness.data.examples import Examples
from tenslora.random_streams import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = tuple[Any, int]
"""An encoded example and its label."""

Collate = Callable[[list[Item]], tuple[dict[str, Tensor], Tensor]]
"""Makes (the inputs by keyword, the labels) of a batch."""

CACHE_BYTES = 2**32
"""How much memory the images of one split may take."""


class ResizedImages(Sequence[Any]):
    """Images, each of them decoded, resized and cut only once: arrays of bytes of shape (height, width, channels).

    The results are kept in memory that forked worker processes share, so that the workers of one epoch spare those of
    the next the work. If the results of all images would take more than `CACHE_BYTES`, none is kept.

    Args:
        images: PIL images.
        prepare: gives all of them one size and the right channels.
        size: height and width of the results.
        channels: of the results.
    """

    def __init__(self, images: Sequence[Any], prepare: Callable[[Any], Any], size: int, channels: int) -> None:
        self.images, self.prepare, self.shape = images, prepare, (size, size, channels)
        self._results: Any = None
        self._has_result: Any = None
        count, byte_count = len(images), len(images) * math.prod(self.shape)
        if 0 < byte_count <= CACHE_BYTES:
            # Anonymous shared memory. The system provides a page of it only when something is written there.
            memory = np.frombuffer(mmap.mmap(-1, byte_count + count), np.uint8)
            self._results, self._has_result = memory[:byte_count].reshape(count, *self.shape), memory[byte_count:]

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not forked starts without results.
        return type(self), (self.images, self.prepare, self.shape[0], self.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if self._results is None:
            return self._make(index)
        if not self._has_result[index]:
            self._results[index] = self._make(index)
            self._has_result[index] = 1  # last, because another process may look at the same time
        return self._results[index]

    def _make(self, index: int) -> Any:
        return np.asarray(self.prepare(self.images[index])).reshape(self.shape)


class Encoded(TorchDataset[Item]):
    """Examples that are encoded when they are asked for.

    Args:
        inputs: of the examples, by index.
        labels: of the examples.
        encode: what makes of an input what `Collate` takes; None if the inputs are that already.
        augmented: whether `encode` draws random numbers. Each example then has a random stream of its own, whose seed
            is made of `stream` and the example's index, so that the process or worker that encodes it does not matter.
        lengths: of each example, if batches should hold examples of similar length.
    """

    stream: tuple[int, ...] = ()
    """The seed and the epoch; set before each epoch."""

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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        example, label = self.inputs[index], self.labels[index]
        if self.encode is None:
            return example, label
        if not self.augmented:
            return self.encode(example), label
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also seed the GPUs, where dropout draws.
            torch.default_generator.manual_seed(stream_seed("augmentation", *self.stream, index))
            return self.encode(example), label


@dataclass(frozen=True)
class Augmentation:
    """Random changes to an image: from bytes of shape (height, width, channels) to bytes of that shape.

    Args:
        transform: changes a PIL image.
    """

    transform: Callable[[Any], Any]

    def __call__(self, pixels: Any) -> Any:
        from PIL import Image

        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return np.asarray(self.transform(image)).reshape(pixels.shape)


@dataclass(frozen=True)
class ImageCollate:
    """Makes a batch of images: floats of shape (examples, channels, height, width), and the labels.

    Args:
        input_name: the keyword by which the model takes images.
        mean: of each channel, to subtract; None to leave pixels in [0, 1].
        std: of each channel, to divide by; None likewise.
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
    """Makes a batch of tokenized examples, padded to one length, and the labels.

    Args:
        tokenizer: pads.
        pad_to: this number of tokens; None for the longest example of the batch.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to: int | None

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.tokenizer.pad(
            [tokens for tokens, _ in items],
            padding=True if self.pad_to is None else "max_length",
            max_length=self.pad_to,
            return_tensors="pt",
        )
        return dict(batch), torch.tensor([label for _, label in items])


@dataclass(frozen=True)
class TokensOf:
    """What the tokenizer gave for one example, by its index.

    Args:
        columns: what the tokenizer gave for all examples: token ids, attention mask, and perhaps segment ids.
    """

    columns: dict[str, list[list[int]]]

    def __call__(self, index: int) -> dict[str, list[int]]:
        return {name: column[index] for name, column in self.columns.items()}


def encode(
    train: Examples,
    test: Examples,
    config: DatasetConfig,
    model: ModelConfig,
    input_name: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Encoded, Encoded, Collate]:
    """Encode the examples of a dataset as a model takes them.

    Images are resized, augmented if they are for training, and normalized. Sentences become token ids; two sentences
    are encoded as a pair, with the model's own separators and, if it has them, segment ids.

    Args:
        train: the training examples.
        test: the test examples.
        config: of the dataset.
        model: the config of the model.
        input_name: the keyword by which an image model takes images.
        tokenizer: of a text model.

    Returns:
        (train, test, collate).
    """
    if isinstance(config, TextDatasetConfig):
        assert tokenizer is not None
        return _encode_texts(train, test, config, tokenizer)
    assert isinstance(config, ImageDatasetConfig)
    return _encode_images(train, test, config, model, input_name)


def _encode_images(
    train: Examples, test: Examples, config: ImageDatasetConfig, model: ModelConfig, input_name: str
) -> tuple[Encoded, Encoded, Collate]:
    for_tests = replace(config.transform, color_jitter=0.0, flip=False)
    mean, std = (model.mean, model.std) if config.transform.normalize else (None, None)
    return (
        _transformed(train, config.transform, model),
        _transformed(test, for_tests, model),
        ImageCollate(input_name, mean, std),
    )


@cache_latest(2)  # the two splits of a dataset
def _transformed(examples: Examples, transform: TransformConfig, model: ModelConfig) -> Encoded:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import v2 as T

    size = round(model.image_size / transform.crop_ratio)
    interpolation = InterpolationMode(transform.interpolation)
    prepare = T.Compose(
        [
            T.Grayscale(num_output_channels=model.channels) if model.channels == 1 else T.RGB(),
            T.Resize([size, size] if transform.squash else [size], interpolation, antialias=True),
            T.CenterCrop(model.image_size),
        ]
    )
    augment: list[Any] = []
    if transform.color_jitter:
        strength = transform.color_jitter
        augment.append(T.RandomApply([T.ColorJitter(strength, strength, strength, hue=min(strength, 0.5))], p=0.5))
    if transform.flip:
        augment.append(T.RandomHorizontalFlip())
    return Encoded(
        ResizedImages(examples.inputs, prepare, model.image_size, model.channels),
        examples.labels,
        Augmentation(T.Compose(augment)) if augment else None,
        augmented=bool(augment),
    )


def _encode_texts(
    train: Examples, test: Examples, config: TextDatasetConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Encoded, Encoded, Collate]:
    max_length = min(config.max_length, tokenizer.model_max_length)

    def encoded(examples: Examples) -> Encoded:
        tokens = _tokenize(examples, tokenizer, max_length)
        lengths = [len(ids) for ids in tokens.columns["input_ids"]] if config.group_by_length else None
        return Encoded(range(len(examples)), examples.labels, tokens, lengths=lengths)

    return encoded(train), encoded(test), TextCollate(tokenizer, max_length if config.padding == "max_length" else None)


@cache_latest(2)  # the two splits of a dataset
def _tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokensOf:
    sentences = [list(column) for column in zip(*examples.inputs, strict=True)]
    return TokensOf(dict(tokenizer(*sentences, truncation=True, max_length=max_length)))
