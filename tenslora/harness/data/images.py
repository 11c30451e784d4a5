"""Image datasets: the embedded digits, and torchvision's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import ImageDatasetConfig
from tenslora.harness.data import Dataset, Examples, check_size, draw

if TYPE_CHECKING:
    from PIL.Image import Image

DOWNLOADS = Path("data")


class ImageFiles(Sequence["Image"]):
    """Images on disk, decoded to RGB when asked for. Raises TensLoRAError that names a file it cannot read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            # PIL names the file in some of these and calls it broken in others.
            raise TensLoRAError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error


class ImageArrays(Sequence["Image"]):
    """Images held as one uint8 array, (count, height, width) or (count, height, width, 3)."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[index])


@dataclass(frozen=True)
class Source:
    """Where a torchvision dataset comes from.

    open: (root, split, download) to the torchvision dataset. layout: what must lie under a local root.
    sizes: examples per split, as published; the one key None where there are no splits.
    """

    open: Callable[[Path, str | None, bool], Any]
    layout: str
    sizes: dict[str | None, int]


def _dtd(root: Path, split: str | None, download: bool) -> Any:
    from torchvision.datasets import DTD

    return DTD(root, split=split or "", download=download)


def _eurosat(root: Path, _: str | None, download: bool) -> Any:
    from torchvision.datasets import EuroSAT

    return EuroSAT(root, download=download)


def _cifar10(root: Path, split: str | None, download: bool) -> Any:
    from torchvision.datasets import CIFAR10

    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split}")
    return CIFAR10(root, train=split == "train", download=download)


def _fgvc_aircraft(root: Path, split: str | None, download: bool) -> Any:
    from torchvision.datasets import FGVCAircraft

    return FGVCAircraft(root, split=split or "", annotation_level="variant", download=download)


SOURCES = {
    "dtd": Source(_dtd, "dtd/dtd/images and dtd/dtd/labels", {"train": 1880, "val": 1880, "test": 1880}),
    "eurosat": Source(_eurosat, "eurosat/2750/<class>", {None: 27000}),
    "cifar10": Source(_cifar10, "cifar-10-batches-py", {"train": 50000, "test": 10000}),
    "fgvc_aircraft": Source(
        _fgvc_aircraft, "fgvc-aircraft-2013b/data", {"train": 3334, "val": 3333, "trainval": 6667, "test": 3333}
    ),
}


def load_images(config: ImageDatasetConfig, seed: int) -> Dataset:
    """The examples of an image dataset; see `tenslora.harness.data.load_dataset`."""
    if config.name == "digits":
        for setting, value, only in (
            ("root", config.root, None),
            ("train_splits", config.train_splits and list(config.train_splits), ["train"]),
            ("test_split", config.test_split, "test"),
        ):
            if value != only:
                raise TensLoRAError(f"dataset.{setting}={value}: the digits are embedded; it can only be {only}")
        return digits(range(5, 10))
    if config.name not in SOURCES:
        raise TensLoRAError(f"dataset.name={config.name}: must be one of digits, {', '.join(SOURCES)}")
    source = SOURCES[config.name]
    if config.train_fraction is not None and None not in source.sizes:
        raise TensLoRAError(
            f"dataset.train_fraction={config.train_fraction}: {config.name} has published splits; use null"
        )
    if None in source.sizes:
        return _split(config, seed)
    for split in [*(config.train_splits or []), config.test_split]:
        if split not in source.sizes:
            raise TensLoRAError(
                f"dataset={config.name}: no split {split}; there are {', '.join(map(str, source.sizes))}"
            )
    from torch.utils.data import ConcatDataset

    if not config.train_splits:
        raise TensLoRAError(
            f"dataset.train_splits={config.train_splits}: needs at least one of {', '.join(map(str, source.sizes))}"
        )
    read = [_read(config.name, config.root, split) for split in config.train_splits]
    test, classes = _read(config.name, config.root, config.test_split)
    for split, (_, others) in zip(config.train_splits, read, strict=True):
        if others != classes:  # torchvision numbers the classes of each split by themselves
            raise TensLoRAError(f"dataset={config.name}: the classes of {split} and {config.test_split} differ")
    parts = [part for part, _ in read]
    inputs: ConcatDataset[Any] = ConcatDataset([part.inputs for part in parts])
    return Dataset(Examples(inputs, [label for part in parts for label in part.labels]), test, classes)


def _split(config: ImageDatasetConfig, seed: int) -> Dataset:
    if config.train_fraction is None:
        raise TensLoRAError(f"dataset.train_fraction=None: {config.name} has no published split; give 0.8, say")
    examples, classes = _read(config.name, config.root, None)
    train = draw(len(examples), int(config.train_fraction * len(examples)), seed)
    test = sorted(set(range(len(examples))).difference(train))
    return Dataset(examples.select(train), examples.select(test), classes)


@cache_latest(1)
def digits(wanted: Sequence[int]) -> Dataset:
    """scikit-learn's UCI digits of the `wanted` classes: 8 x 8 grey images, every third of a class for testing."""
    import numpy as np

    pixels, targets = _uci_digits()
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train: list[int] = []
    test: list[int] = []
    for digit in wanted:
        of_class = np.flatnonzero(targets == digit)
        test += of_class[2::3].tolist()
        train += np.delete(of_class, np.s_[2::3]).tolist()
    number = {digit: index for index, digit in enumerate(wanted)}
    everything = Examples(ImageArrays(images), [number.get(int(t), -1) for t in targets])
    return Dataset(everything.select(sorted(train)), everything.select(sorted(test)), tuple(map(str, wanted)))


def _uci_digits() -> tuple[Any, Any]:
    """What sklearn.datasets.load_digits(return_X_y=True) gives: (1797, 64) values of 0 to 16, and the digits."""
    import numpy as np

    # Importing scikit-learn takes seconds, reading its file a moment.
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)  # type: ignore[no-any-return]


@cache_latest(4)
def _read(name: str, local: str | None, split: str | None) -> tuple[Examples, tuple[str, ...]]:
    source, root = SOURCES[name], Path(local or DOWNLOADS)
    if local is not None and not root.is_dir():
        raise TensLoRAError(f"dataset.root={local}: no such folder; it should hold {source.layout}")
    try:
        data = source.open(root, split, local is None)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if local is None:
            raise TensLoRAError(
                f"dataset={name}: cannot be downloaded ({_first_line(error)}); put a copy in torchvision's "
                f"layout ({source.layout}) into a folder and set dataset.root to it"
            ) from error
        raise TensLoRAError(
            f"dataset.root={local}: no {name} in torchvision's layout there, which is {source.layout} "
            f"({_first_line(error)})"
        ) from error
    inputs: Sequence[Any]
    if hasattr(data, "data"):  # CIFAR-10, one array
        inputs, labels = ImageArrays(data.data), list(data.targets)
    elif hasattr(data, "samples"):  # a folder per class
        inputs, labels = ImageFiles([Path(path) for path, _ in data.samples]), [label for _, label in data.samples]
    else:
        inputs, labels = ImageFiles([Path(path) for path in data._image_files]), list(data._labels)
    check_size(name, split or "whole", len(labels), source.sizes[split])
    return Examples(inputs, labels), tuple(map(str, data.classes))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
