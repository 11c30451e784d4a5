"""Inputs without labels, as a user gives them to a finished run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError, require_path
from tenslora.files import require_file
from tenslora.harness.data.examples import Examples, ImageFiles, to_rgb

_INPUTS = {"image": "images", "text": "sentences or of pairs of sentences"}


def unlabelled(inputs: Sequence[Any], modality: str) -> Examples:
    """Turn a user's inputs into examples, whose labels are zeros.

    Args:
        inputs: for an image model paths, PIL images, or arrays of bytes of shape (height, width) or (height, width,
            channels); for a text model sentences, or pairs of sentences.
        modality: "image" or "text".

    Returns:
        The examples. Images are read when they are indexed.

    Raises:
        TensLoRAError: for something that is no list of such inputs, for a file that does not exist, for an image
            without a pixel, and for a sentence that is empty or not text in UTF-8.
    """
    if isinstance(inputs, (str, bytes, Path)) or not isinstance(inputs, Sequence):
        raise TensLoRAError(f"inputs of type {type(inputs).__name__}: must be a list of {_INPUTS[modality]}")
    if modality == "image":
        return Examples(GivenImages([_image(item) for item in inputs]), [0] * len(inputs))
    sentences = [_sentences(item) for item in inputs]
    if len({len(example) for example in sentences}) > 1:
        raise TensLoRAError("sentences: must be all single sentences, or all pairs")
    return Examples(sentences, [0] * len(inputs))


@dataclass(frozen=True, eq=False)
class GivenImages(Sequence[Any]):
    """Images that are on disk or in memory, as RGB.

    Args:
        items: paths or PIL images.
    """

    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        item = self.items[index]
        return ImageFiles([item])[0] if isinstance(item, Path) else to_rgb(item, f"image {index}")


def _image(item: Any) -> Any:
    from PIL import Image

    if isinstance(item, (str, Path)):
        path = require_path("image", item)
        if os.path.isdir(path):
            raise TensLoRAError(f"{path}: is a folder; must be an image, such as each of {path / '*'}")
        require_file(path)
        return path
    try:
        image = item if isinstance(item, Image.Image) else Image.fromarray(_squeezed(item))
    except Exception as error:  # an array of another library raises what it likes, such as one with a gradient
        raise TensLoRAError(
            f"an image of type {type(item).__name__}: must be a path, a PIL image, or an array of bytes of shape "
            f"(height, width) or (height, width, channels)"
        ) from error
    if 0 in image.size:
        raise TensLoRAError(f"an image of width {image.width} and height {image.height}: must have pixels")
    return image


def _squeezed(item: Any) -> Any:
    import numpy as np

    array = np.asarray(item)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):  # PIL takes a row for an image of one column
        raise TypeError
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


def _sentences(item: Any) -> tuple[str, ...]:
    sentences = (item,) if isinstance(item, str) else item
    if (
        not isinstance(sentences, (tuple, list))
        or len(sentences) not in (1, 2)
        or not all(isinstance(sentence, str) for sentence in sentences)
    ):
        raise TensLoRAError(f"{item!r}: must be a sentence, or a pair of sentences".replace("\n", " "))
    for sentence in sentences:
        if not sentence.strip():
            raise TensLoRAError("a sentence: must not be empty")
        try:
            sentence.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
            raise TensLoRAError(f"{sentence!r}: must be text in UTF-8") from error
    return tuple(sentences)
