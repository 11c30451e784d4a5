"""From raw examples to what a model takes: image transforms, tokenisation, collation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from tenslora.config import DatasetConfig, ImageDatasetConfig, ModelConfig, TextDatasetConfig, TransformConfig
from tenslora.data import Examples
from tenslora.kept import kept
from tenslora.streams import stream_seed

Item = tuple[Any, int]
KEEP_BYTES = 2**31  # how much of one split may be kept in memory
Collate = Callable[[list[Item]], tuple[dict[str, Tensor], Tensor]]


class Encoded(TorchDataset[Item]):
    """Examples with an encoding applied when one is fetched.

    keep: hold on to what was encoded, so that an example is read and transformed once and not once an epoch (with
    workers, which live for an epoch, it is once an epoch all the same).
    augmented: the encoding draws random numbers, so that nothing is kept. Each example then has a random stream of
    its own, a function of `stream` and its index, whichever process or worker it falls to.
    lengths: of each example, where batches are to hold examples of like length.
    """

    def __init__(
        self,
        inputs: Any,
        labels: Sequence[int],
        encode: Callable[[Any], Any],
        keep: bool = False,
        augmented: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.inputs, self.labels, self.encode, self.augmented = inputs, labels, encode, augmented
        self.lengths = lengths
        self.kept: dict[int, Any] | None = {} if keep and not augmented else None
        self.stream: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        if self.augmented:
            with torch.random.fork_rng(devices=[]):
                # This generator alone: torch.manual_seed would set the GPUs' too, where dropout draws.
                torch.default_generator.manual_seed(stream_seed("augmentation", *self.stream, index))
                return self.encode(self.inputs[index]), self.labels[index]
        if self.kept is None:
            return self.encode(self.inputs[index]), self.labels[index]
        if index not in self.kept:
            self.kept[index] = self.encode(self.inputs[index])
        return self.kept[index], self.labels[index]


# Classes and not closures, so that a worker process can be handed one however it was started.


@dataclass(frozen=True)
class ImageCollate:
    """A batch of image tensors under the model's own name for them, and the labels."""

    input_name: str

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        pixels = torch.stack([torch.as_tensor(image) for image, _ in items])
        return {self.input_name: pixels}, torch.tensor([label for _, label in items])


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

    return encoded(train, True), encoded(test, False), ImageCollate(input_name)


@kept(2)  # the two splits of a dataset
def _transformed(examples: Examples, settings: TransformConfig, model: ModelConfig) -> Encoded:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import v2 as T

    size = round(model.image_size / settings.crop_ratio)
    resize = T.Resize(
        [size, size] if settings.squash else [size],
        InterpolationMode(settings.interpolation),
        antialias=True,
    )
    jitter = [settings.color_jitter] * 4
    augment = [
        *(
            [T.RandomApply([T.ColorJitter(*jitter[:3], hue=min(jitter[3], 0.5))], p=0.5)]
            if settings.color_jitter
            else []
        ),
        *([T.RandomHorizontalFlip()] if settings.flip else []),
    ]
    finish = [
        T.Grayscale(num_output_channels=model.channels) if model.channels == 1 else T.RGB(),
        T.ToImage(),
        T.ToDtype(torch.float32, scale=True),
        *([T.Normalize(model.mean, model.std)] if settings.normalize else []),
    ]
    transform = T.Compose([resize, T.CenterCrop(model.image_size), *augment, *finish])
    bytes_ = len(examples) * model.channels * model.image_size**2 * 4
    return Encoded(examples.inputs, examples.labels, transform, bytes_ <= KEEP_BYTES, augmented=bool(augment))


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


@kept(2)  # the two splits of a dataset
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
