"""Examples before they are encoded: sequences of images or sentences, with a label each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError, first_line
from tenslora.random_streams import stream_seed

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Inputs and their labels.

    Args:
        inputs: PIL images, or tuples of one or two sentences. They are a sequence that needs no slices and may read an
            input only when it is indexed.
        labels: the class number of each input, or in a regression its value, a float.
    """

    inputs: Any
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> Examples:
        """Some of the examples, in the order of `indices`. No input is read yet.

        Args:
            indices: the indices of the wanted examples.

        Returns:
            The examples.
        """
        return Examples(Selected(self.inputs, indices), [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Dataset:
    """The examples that a run trains on and is scored on.

    Args:
        train: the training examples, without those of the validation split.
        test: the test examples. There are none if `dataset.validation` asks for a validation split, so that a run that
            chooses hyperparameters cannot see the test split.
        classes: the names of the classes, by class number; () for a regression.
        task: "classification" or "regression", a name in `training.tasks.TASKS`.
        more_tests: further examples that the run is scored on, by the name that is appended to their metrics' names;
            none where there is a validation split.
        validation: the examples that are held out from the training split; None for a run that is scored on the test
            split.
        text_columns: the names of the columns that hold the one or two sentences of an example; () for images.
        is_drawn: whether the scored examples were drawn at random from those for training.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...]
    task: str = "classification"
    more_tests: Mapping[str, Examples] = field(default_factory=dict)
    validation: Examples | None = None
    text_columns: tuple[str, ...] = ()
    is_drawn: bool = False

    @property
    def outputs(self) -> int:
        """The number of outputs of a model for this dataset: one for each class, or one value in a regression."""
        return 1 if self.task == "regression" else len(self.classes)

    @property
    def scored(self) -> Examples:
        """The examples that a run is scored on: the validation split if there is one, otherwise the test split."""
        return self.test if self.validation is None else self.validation


@dataclass(frozen=True)
class Selected(Sequence[Any]):
    """Some items of a sequence. Each item is read when it is indexed."""

    items: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.indices[index]]


@dataclass(frozen=True, eq=False)
class ImageFiles(Sequence["Image"]):
    """Images on disk. Each image is decoded to RGB when it is indexed.

    Raises:
        TensLoRAError: on access to a file that cannot be read; the message names the file.
    """

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if image.format == "EPS":  # PIL would hand it to Ghostscript, which runs it
                    raise TensLoRAError(f"{path}: must be an image, not a program in PostScript")
                return to_rgb(image, str(path))
        except TensLoRAError:
            raise
        except Image.DecompressionBombError as error:
            raise TensLoRAError(f"{path}: the image is too large ({error})") from error
        except Exception as error:  # the readers of the formats raise what they come upon
            # Not all of PIL's messages name the file.
            raise TensLoRAError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error


_SAMPLES_PER_PIXEL = 277
"""The tag of a TIFF file that holds its number of channels."""


def to_rgb(image: Image, name: str) -> Image:
    """Convert an image to RGB.

    Args:
        image: the image.
        name: what a message calls it.

    Raises:
        TensLoRAError: if it is grey and its pixels have more than 8 bits, if it has more than four channels, or if PIL
            cannot read or convert it.
    """
    if image.mode.startswith(("I", "F")):
        # PIL would clip these pixels at 255, which makes most of them white.
        raise TensLoRAError(f"{name}: has pixels of more than 8 bits ({image.mode}); save it with 8 bits")
    has_no_file = getattr(image, "fp", image) is None  # as behind `with Image.open(path) as image`
    try:
        image.load()
        channels = getattr(image, "tag_v2", {}).get(_SAMPLES_PER_PIXEL)
        if isinstance(channels, int) and channels > 4:  # of which PIL has read the first three
            raise ValueError(f"it has {channels} channels; must have at most 4")
        if isinstance(image.info.get("transparency"), bytes):  # which RGB has not: PIL drops it with a warning
            image = image.copy()
            del image.info["transparency"]
        return image.convert("RGB")
    except ValueError as error:  # also for an image that has been closed
        raise TensLoRAError(f"{name}: cannot be converted to RGB ({first_line(error)})") from error
    except Exception as error:  # PIL reads an image's file only now, and its readers raise what they come upon
        if has_no_file:
            raise TensLoRAError(f"{name}: has been closed before it was read; call its load() before") from error
        raise TensLoRAError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, eq=False)
class ImageArrays(Sequence["Image"]):
    """Images in one array of bytes, of shape (count, height, width) or (count, height, width, 3).

    A further channel, of how opaque each pixel is, does no harm.

    Raises:
        TensLoRAError: for an array of another type or shape.
    """

    pixels: Any

    def __post_init__(self) -> None:
        kind = str(getattr(self.pixels, "dtype", None)).removeprefix("torch.")
        shape = tuple(getattr(self.pixels, "shape", ()))
        if kind != "uint8" or len(shape) < 3 or shape[3:] not in ((), (2,), (3,), (4,)):
            given = f"{kind} of shape {shape}" if shape else f"of type {type(self.pixels).__name__}"
            raise TensLoRAError(
                f"the images must be bytes (uint8) of shape (count, height, width) or (count, height, width, 3), and "
                f"are {given}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> Any:
        import numpy as np
        from PIL import Image

        return Image.fromarray(np.asarray(self.pixels[index]))


NO_EXAMPLES = Examples((), ())
"""A split that is not loaded."""


def as_list(labels: Any) -> list[Any]:
    """Labels of any library, such as a tensor's, as a list of Python's own numbers."""
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def by_position(inputs: Any) -> Any:
    """The inputs of a split, as a list if they are a pandas Series, which would be read by an index of its own."""
    return inputs.tolist() if hasattr(inputs, "iloc") else inputs


def is_sequence(given: Any) -> bool:
    """Whether the parts of an object can be counted and read by number."""
    try:
        is_table = hasattr(given, "iloc") and given.ndim > 1  # of pandas, which is read by the names of its columns
        return hasattr(given, "__getitem__") and not (is_table or isinstance(given, Mapping)) and len(given) >= 0
    except TypeError:  # also of an array without dimensions
        return False


def require_sequences(where: str, **parts: Any) -> None:
    """Check that the parts of a split can be counted and read by number, which a generator or a dict cannot.

    Args:
        where: the split, for the message.
        **parts: each part, by its name.

    Raises:
        TensLoRAError: for a part that is no sequence.
    """
    for name, given in parts.items():
        if not is_sequence(given):
            raise TensLoRAError(
                f"{where} has {name} of type {type(given).__name__}; must be a sequence, such as a list"
            )


def user_path(given: str) -> Path:
    """A path in the settings, with the user's home in place of ~. That of a user who does not exist stays as it is.

    Args:
        given: the setting's value.
    """
    return Path(os.path.expanduser(given))  # unlike Path.expanduser, it raises no error


def draw(count: int, size: int, seed: int, purpose: str = "split") -> list[int]:
    """Draw numbers without replacement, from a random stream that nothing else draws from.

    Args:
        count: the numbers to draw from are 0 to count - 1.
        size: how many numbers to draw.
        seed: the seed of the stream.
        purpose: what is drawn; each purpose has a stream of its own.

    Returns:
        The numbers, in rising order.
    """
    import numpy as np

    return sorted(np.random.default_rng(stream_seed(purpose, seed)).permutation(count)[:size].tolist())


def shortened(names: Iterable[str], most: int = 12) -> str:
    """A list of names for a message, with the number of names that are left out."""
    listed = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def divided(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Divide examples at random.

    Args:
        examples: the examples.
        fraction: the share of the first part; its size is rounded down.
        seed: the seed of the choice.

    Returns:
        The first part and the rest, each in the order of `examples`.
    """
    count = len(examples)
    chosen = draw(count, int(fraction * count), seed)
    return examples.select(chosen), examples.select(sorted(set(range(count)).difference(chosen)))


def warn_of_another_size(name: str, split: str, size: int, published: int | None) -> None:
    """Log a warning if a copy of a split has another size than the split that was published.

    Args:
        name: the dataset's name.
        split: the split's name.
        size: the number of examples in the copy.
        published: the number of examples in the published split; None if that is unknown.
    """
    if published is not None and size != published:
        log.warning("%s: the %s split has %d examples here, %d as published", name, split, size, published)
