"""The embedded dataset: the UCI digits, which come with scikit-learn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.harness.cache import cache_latest
from tenslora.harness.data.examples import Dataset, Examples, ImageArrays

if TYPE_CHECKING:
    from numpy.typing import NDArray


@cache_latest(1)
def load_digits(wanted: Sequence[int]) -> Dataset:
    """Grey images of 8 x 8 pixels; of each class, every third one is for testing.

    Args:
        wanted: the digits that are the classes, in this order. `vit_digits` was pretrained on 0 to 4.
    """
    import numpy as np

    pixels, digits = _read_uci_digits()
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train: list[int] = []
    test: list[int] = []
    for digit in wanted:
        of_class = np.flatnonzero(digits == digit)
        test += of_class[2::3].tolist()
        train += np.delete(of_class, np.s_[2::3]).tolist()
    label = {digit: index for index, digit in enumerate(wanted)}
    examples = Examples(ImageArrays(images), [label.get(int(digit), -1) for digit in digits])
    return Dataset(examples.select(sorted(train)), examples.select(sorted(test)), tuple(map(str, wanted)))


def _read_uci_digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """The 1,797 images as rows of 64 values from 0 to 16, and their digits, as sklearn.datasets.load_digits has them.

    The file is read without scikit-learn if it is where it was when this was written: importing scikit-learn takes
    1.7 s of the processor, and reading the file 0.02 s (medians of 5).
    """
    import numpy as np

    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    import sklearn.datasets

    pixels, digits = sklearn.datasets.load_digits(return_X_y=True)
    return pixels, digits
