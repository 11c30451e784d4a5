"""Turns raw examples into a model's inputs: image transforms, tokenization, collation.

Everything that a loader's worker processes need is an instance of a class at module level. A worker that is not forked
receives these objects by pickle, which cannot send closures.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone
from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, TextDatasetConfig, TransformConfig
from tenslora.harness.config.checks import shown
from tenslora.harness.data.examples import Dataset, Examples, to_rgb
from tenslora.harness.training.tasks import TASKS
from tenslora.random_streams import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Item = tuple[Any, float]
"""An encoded example and its label."""

Collate = Callable[[list[Item]], tuple[dict[str, Tensor], Tensor]]
"""Turns the items of a batch into (the model's inputs by keyword, the labels)."""

CACHE_BYTES = 2**32
"""The largest number of bytes that the cached images of one split may take."""


class ResizedImages(Sequence[Any]):
    """Images that are decoded, resized and cropped only once: arrays of bytes of shape (height, width, channels).

    The results are cached in memory that forked worker processes share, so that the workers of later epochs find them
    there. If the results of all images would take more than `CACHE_BYTES`, nothing is cached.

    Args:
        images: PIL images.
        prepare: a function that gives a PIL image the size and the channels of the results.
        size: the height and the width of the results, in pixels.
        channels: the number of channels of the results.
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
            self._has_result[index] = 1  # set last, because another process may read the result at the same time
        return self._results[index]

    def _make(self, index: int) -> Any:
        from PIL import Image

        image = self.images[index]
        if not isinstance(image, Image.Image):  # what a data source of somebody's own returns
            raise TensLoRAError(f"input {index} of the data: is of type {type(image).__name__}; must be a PIL image")
        if 0 in image.size:  # torchvision would make a black one of it
            raise TensLoRAError(
                f"input {index} of the data: has a size of {image.width} x {image.height}; must have pixels"
            )
        return np.asarray(self.prepare(to_rgb(image, f"input {index} of the data"))).reshape(self.shape)


class Encoded(TorchDataset[Item]):
    """Examples that are encoded when they are asked for.

    Args:
        inputs: the inputs of the examples, by index.
        labels: the labels of the examples.
        encode: a function from an input to the form that `Collate` takes; None if the inputs have that form already.
        augmented: whether `encode` draws random numbers. Each example then has a random stream of its own, whose seed
            depends on `stream` and the example's index alone, and not on the process that encodes the example.
        lengths: the length of each example, in tokens, if batches should hold examples of similar length; otherwise
            None.
    """

    stream: tuple[int, ...] = ()
    """The seed and the epoch; set before each epoch."""

    def __init__(
        self,
        inputs: Any,
        labels: Sequence[float],
        encode: Callable[[Any], Any] | None = None,
        augmented: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.inputs, self.labels, self.encode, self.augmented = inputs, labels, encode, augmented
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        try:
            example, label = self.inputs[index], self.labels[index]
        except StopIteration as error:  # which would end the epoch
            raise TensLoRAError(
                f"input {index} of the data: its source raises StopIteration, as next does at an end, and gives none"
            ) from error
        if self.encode is None:
            return example, label
        if not self.augmented:
            return self.encode(example), label
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, where dropout draws its numbers.
            torch.default_generator.manual_seed(stream_seed("augmentation", *self.stream, index))
            return self.encode(example), label


@dataclass(frozen=True)
class Augmentation:
    """Random changes to an image, which is an array of bytes of shape (height, width, channels) before and after.

    Args:
        transform: a function that changes a PIL image.
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
        mean: the mean of each channel, which is subtracted.
        std: the standard deviation of each channel, by which pixels are divided.
    """

    input_name: str
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        from torchvision.transforms.v2 import functional as F

        pixels = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).contiguous()
        batch = F.to_dtype(pixels, torch.float32, scale=True)
        F.normalize(batch, list(self.mean), list(self.std), inplace=True)
        return {self.input_name: batch}, _labels(items)


@dataclass(frozen=True)
class TextCollate:
    """Makes a batch of tokenized examples, padded to one length, and the labels.

    Args:
        tokenizer: the tokenizer, which pads the examples.
        pad_to: the number of tokens to pad to; None for that of the longest example of the batch.
        side: "right" for a model of learned positions, which would number a text's tokens by the padding before them;
            None for the tokenizer's own side.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to: int | None
    side: str | None = None

    def __call__(self, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.tokenizer.pad(
            [tokens for tokens, _ in items],
            padding=True if self.pad_to is None else "max_length",
            max_length=self.pad_to,
            padding_side=self.side,
            return_tensors="pt",
        )
        return dict(batch), _labels(items)


def _labels(items: list[Item]) -> Tensor:
    """The labels of a batch: class numbers, or in a regression values in float32, whatever torch's default type is."""
    labels = [label for _, label in items]
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)


@dataclass(frozen=True)
class TokensOf:
    """A function from an example's index to the example's tokens.

    Args:
        columns: the tokenizer's output for all examples: token ids, attention mask, and perhaps segment ids.
    """

    columns: dict[str, list[list[int]]]

    def __call__(self, index: int) -> dict[str, list[int]]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True)
class EncodedDataset:
    """A dataset that is encoded for a model.

    Args:
        train: the training examples.
        scored: the examples that the run is scored on.
        more_tests: further examples that the run is scored on, by name.
        collate: makes a batch of some examples.
        task: the name of the task, see `training.tasks.TASKS`.
        metrics: the names of the metrics that score the run, the headline metric first.
        scored_on: the split of the examples in `scored`, "test" or "validation".
        image_input: how an image becomes the model's input, without augmentation; None for texts.
        classes: the names of the classes, by class number; () for a regression.
    """

    train: Encoded
    scored: Encoded
    more_tests: Mapping[str, Encoded]
    collate: Collate
    task: str
    metrics: tuple[str, ...]
    scored_on: str = "test"
    image_input: ImageInput | None = None
    classes: tuple[str, ...] = ()

    def digest(self) -> str:
        """A digest of the classes, of all labels and of the tokens of texts. That of images would take reading all."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for examples in self._parts():
            digest.update(np.asarray(list(examples.labels), dtype=np.float64).tobytes())
            if isinstance(examples.encode, TokensOf):
                for tokens in examples.encode.columns["input_ids"]:
                    digest.update(np.asarray([len(tokens), *tokens], dtype=np.int64).tobytes())
        return digest.hexdigest()[:12]

    def digest_in_any_order(self) -> str:
        """A digest of the same. It depends neither on the order of the examples nor on the split that each is in."""
        each = []
        for examples in self._parts():
            tokens = examples.encode.columns["input_ids"] if isinstance(examples.encode, TokensOf) else repeat(())
            for label, ids in zip(examples.labels, tokens):  # noqa: B905  repeat has no end
                each.append(hashlib.sha256(np.asarray([label, *ids], dtype=np.float64).tobytes()).digest())
        return hashlib.sha256(repr(self.classes).encode() + b"".join(sorted(each))).hexdigest()[:12]

    def _parts(self) -> tuple[Encoded, ...]:
        return (self.train, self.scored, *self.more_tests.values())


def encode(
    dataset: Dataset,
    config: DatasetConfig,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
) -> EncodedDataset:
    """Encode the examples of a dataset for a model.

    Images are resized, augmented if they are for training, and normalized. Sentences become token ids. Two sentences
    are encoded as a pair, with the model's own separators and, if the model has them, segment ids.

    Args:
        dataset: the dataset.
        config: the dataset's settings.
        backbone: the model, which says what images or how many tokens it takes.
        tokenizer: the tokenizer of a text model; None for an image model.

    Returns:
        The encoded dataset.

    Raises:
        TensLoRAError: if the tokenizer numbers a token or a segment beyond those that the model knows, or finds no
            token in a text.
    """
    metrics = config.metrics or TASKS[dataset.task].metrics
    if isinstance(config, TextDatasetConfig):
        assert tokenizer is not None
        return _encode_texts(dataset, config, metrics, tokenizer, backbone)
    assert isinstance(config, ImageDatasetConfig)
    image_input = backbone.image_input_on(config)
    assert image_input is not None
    for_scoring = replace(config.transform, color_jitter=0.0, flip=False)
    return EncodedDataset(
        _transformed(dataset.train, config.transform, image_input),
        _transformed(dataset.scored, for_scoring, image_input),
        {name: _transformed(examples, for_scoring, image_input) for name, examples in dataset.more_tests.items()},
        ImageCollate(backbone.input_name, image_input.mean, image_input.std),
        dataset.task,
        metrics,
        config.scored_on,
        image_input,
        dataset.classes,
    )


@cache_latest(2)  # the two splits of a dataset
def _transformed(examples: Examples, transform: TransformConfig, image_input: ImageInput) -> Encoded:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import v2 as T

    size = image_input.resized
    interpolation = InterpolationMode(image_input.interpolation)
    prepare = T.Compose(
        [
            T.Grayscale(num_output_channels=1) if image_input.channels == 1 else T.RGB(),
            T.Resize([size, size] if image_input.squash else [size], interpolation, antialias=True),
            T.CenterCrop(image_input.size),
        ]
    )
    augment: list[Any] = []
    if transform.color_jitter:
        strength = transform.color_jitter
        augment.append(T.RandomApply([T.ColorJitter(strength, strength, strength, hue=min(strength, 0.5))], p=0.5))
    if transform.flip:
        augment.append(T.RandomHorizontalFlip())
    return Encoded(
        ResizedImages(examples.inputs, prepare, image_input.size, image_input.channels),
        examples.labels,
        Augmentation(T.Compose(augment)) if augment else None,
        augmented=bool(augment),
    )


def _encode_texts(
    dataset: Dataset,
    config: TextDatasetConfig,
    metrics: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
) -> EncodedDataset:
    max_length = longest_text(config, tokenizer, backbone)

    def encoded(examples: Examples, split: str) -> Encoded:
        tokens = _tokenize(examples, tokenizer, max_length)
        _require_tokens(tokens, examples, split)
        _require_embedded(tokens, tokenizer, backbone.embedding_sizes)
        _require_equal_ends(tokens, tokenizer, backbone.model, split)
        lengths = [len(ids) for ids in tokens.columns["input_ids"]] if config.group_by_length else None
        return Encoded(range(len(examples)), examples.labels, tokens, lengths=lengths)

    # A run that is loaded again has no examples to train on, and has warned of cut texts before.
    is_loaded = dataset.train is dataset.scored
    train = encoded(dataset.train, "" if is_loaded else "training ")
    if max_length < min(config.max_length, backbone.max_tokens or math.inf) and not is_loaded:
        _warn_of_cut_texts(train, dataset.train, config, tokenizer, max_length)
    return EncodedDataset(
        train,
        encoded(dataset.scored, f"{config.scored_on} "),
        {name: encoded(examples, f"{name} ") for name, examples in dataset.more_tests.items()},
        TextCollate(
            tokenizer,
            max_length if config.padding == "max_length" else None,
            side=None if backbone.max_tokens is None else "right",
        ),
        dataset.task,
        metrics,
        config.scored_on,
        classes=dataset.classes,
    )


def longest_text(config: TextDatasetConfig, tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> int:
    """The number of tokens at which a run cuts its texts off.

    Args:
        config: the settings of the run's dataset.
        tokenizer: the run's tokenizer.
        backbone: the run's backbone.

    Raises:
        TensLoRAError: if the tokenizer's own number is not one.
    """
    longest = tokenizer.model_max_length  # as it is in a file; transformers checks nothing of it
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise TensLoRAError(f"the tokenizer's model_max_length={longest}: must be a number, at least 1")
    return int(min(config.max_length, longest, backbone.max_tokens or config.max_length))


@cache_latest(4)  # the splits of a dataset
def _tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokensOf:
    sentences = [list(column) for column in zip(*examples.inputs, strict=True)]
    return TokensOf(dict(tokenizer(*sentences, truncation=True, max_length=max_length)))


def _warn_of_cut_texts(
    encoded: Encoded,
    examples: Examples,
    config: TextDatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> None:
    """Say how many texts the tokenizer's own limit cuts, such as that of a short run whose merged export is trained."""
    assert isinstance(encoded.encode, TokensOf)
    full = [number for number, ids in enumerate(encoded.encode.columns["input_ids"]) if len(ids) == max_length]
    if not full:
        return
    whole = tokenizer(*map(list, zip(*(examples.inputs[number] for number in full), strict=True)), verbose=False)
    if cut := sum(len(ids) > max_length for ids in whole["input_ids"]):
        log.warning(
            "dataset.max_length=%d: the tokenizer's own model_max_length (tokenizer_config.json) is %d, after which %d "
            "of %d training texts are cut",
            config.max_length, max_length, cut, len(examples),
        )  # fmt: skip


def _require_tokens(tokens: TokensOf, examples: Examples, split: str) -> None:
    # Beside longer texts the model would answer for the padding, and alone it cannot compute.
    for number, ids in enumerate(tokens.columns["input_ids"]):
        if not ids:
            text = shown(" ".join(examples.inputs[number]))
            raise TensLoRAError(
                f"{split}example {number:,}, from 0 on: the model's tokenizer finds no token in its text, {text}; take "
                f"it out"
            )


def _require_equal_ends(tokens: TokensOf, tokenizer: PreTrainedTokenizerBase, model: nn.Module, split: str) -> None:
    # BART and T5 take their outputs from the last end token of a text, and want equally many in all texts of a batch.
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        own = getattr(config, "eos_token_id", None)
        end = own if isinstance(own, int) else tokenizer.eos_token_id
        counts = [ids.count(end) for ids in tokens.columns["input_ids"]]
        if 0 in counts and hasattr(model, "classification_head"):  # T5Gemma's has another name, and needs none
            raise TensLoRAError(
                f"{split}example {counts.index(0):,}, from 0 on: the tokenizer does not end it with token {end}, by "
                f"which the model knows the end of an example (config.json: eos_token_id); the folder of "
                f"model.checkpoint must hold the model's own tokenizer"
            )
        fewest = min(counts, default=0)
        if longer := [number for number, count in enumerate(counts) if count != fewest]:
            raise TensLoRAError(
                f"{split}example {longer[0]:,}, from 0 on, holds the text {tokenizer.convert_ids_to_tokens(end)}, "
                f"which the model takes for the end of an example; take it out"
            )


def _require_embedded(tokens: TokensOf, tokenizer: PreTrainedTokenizerBase, embedding_sizes: Mapping[str, int]) -> None:
    for name, count in embedding_sizes.items():
        largest = max((max(row, default=0) for row in tokens.columns.get(name, [])), default=0)
        if name == "input_ids":
            largest = max(largest, tokenizer.pad_token_id or 0)
        if largest >= count and name == "input_ids":
            token = tokenizer.convert_ids_to_tokens(largest)
            raise TensLoRAError(
                f"the tokenizer gives {token!r} the number {largest}, and the model knows the {count} tokens from 0 "
                f"on; the folder of model.checkpoint must hold the model's own tokenizer"
            )
        if largest >= count:
            raise TensLoRAError(
                f"the tokenizer numbers the two sentences of a pair up to {largest}, and the model knows {count} "
                f"segment; dataset.text_columns must be one column"
            )
