"""Image datasets that torchvision reads, and downloads if there is no local copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.cache import cache_latest
from tenslora.harness.data.examples import (
    Examples,
    ImageArrays,
    ImageFiles,
    as_list,
    by_position,
    require_sequences,
    warn_of_another_size,
)

DOWNLOADS = Path("data")


Split = tuple[Sequence[Any], Sequence[int], Sequence[str]]
"""The images of a split, their labels and the names of the classes."""


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    Args:
        open: a function from (root, split, whether to download) to the images, their labels and the names of the
            classes.
        layout: the files and folders of a local copy, for messages.
        sizes: the published number of examples of each split. The only key is None if there are no splits.
    """

    open: Callable[[Path, str | None, bool], Split]
    layout: str
    sizes: dict[str | None, int]

    @property
    def splits(self) -> str:
        """The names of the splits, for messages."""
        return ", ".join(map(str, self.sizes))


def _dtd(root: Path, split: str | None, download: bool) -> Split:
    from torchvision.datasets import DTD

    data = DTD(root, split=split or "", download=download)
    return ImageFiles(data._image_files), data._labels, data.classes


def _eurosat(root: Path, _: str | None, download: bool) -> Split:
    from torchvision.datasets import EuroSAT

    data = EuroSAT(root, download=download)
    return ImageFiles([Path(path) for path, _ in data.samples]), data.targets, data.classes


def _cifar10(root: Path, split: str | None, download: bool) -> Split:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(root, train=split == "train", download=download)
    return ImageArrays(data.data), data.targets, data.classes


def _fgvc_aircraft(root: Path, split: str | None, download: bool) -> Split:
    from torchvision.datasets import FGVCAircraft

    data = FGVCAircraft(root, split=split or "", annotation_level="variant", download=download)
    return ImageFiles([Path(path) for path in data._image_files]), data._labels, data.classes


SOURCES = {
    "dtd": Source(_dtd, "dtd/dtd/images and dtd/dtd/labels", {"train": 1880, "val": 1880, "test": 1880}),
    "eurosat": Source(_eurosat, "eurosat/2750/<class>", {None: 27000}),
    "cifar10": Source(_cifar10, "cifar-10-batches-py", {"train": 50000, "test": 10000}),
    "fgvc_aircraft": Source(
        _fgvc_aircraft, "fgvc-aircraft-2013b/data", {"train": 3334, "val": 3333, "trainval": 6667, "test": 3333}
    ),
}
"""All datasets of this kind, by name."""


@cache_latest(4)
def read_split(name: str, root: str | None, split: str | None) -> tuple[Examples, tuple[str, ...]]:
    """Read one split.

    Args:
        name: one of `SOURCES`.
        root: the folder of a local copy; None to download to `DOWNLOADS`.
        split: a key of the source's `sizes`.

    Returns:
        The examples of the split, and the names of the classes.

    Raises:
        TensLoRAError: if the copy is missing or incomplete, or if it cannot be downloaded.
    """
    source = SOURCES[name]
    if root is not None and not Path(root).is_dir():
        raise TensLoRAError(f"dataset.root={root}: no such folder; the folder should hold {source.layout}")
    try:
        images, labels, classes = source.open(Path(root or DOWNLOADS), split, root is None)
    except TensLoRAError as error:
        raise TensLoRAError(f"dataset={name}: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if root is None:
            raise TensLoRAError(
                f"dataset={name}: cannot be downloaded ({first_line(error)}); put a copy in torchvision's layout "
                f"({source.layout}) into a folder and set dataset.root to it"
            ) from error
        raise TensLoRAError(
            f"dataset.root={root}: no {name} in torchvision's layout there, which is {source.layout} "
            f"({first_line(error)})"
        ) from error
    require_sequences(f"dataset={name}: the {split or 'only'} split", images=images, labels=labels, classes=classes)
    warn_of_another_size(name, split or "only", len(labels), source.sizes[split])
    if len(images) != len(labels):
        raise TensLoRAError(
            f"dataset={name}: the {split or 'only'} split has {len(images)} images, {len(labels)} labels"
        )
    return Examples(by_position(images), as_list(labels)), tuple(map(str, classes))
