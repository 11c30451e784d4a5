"""The embedded dataset: the UCI digits, which come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

from tenslora.harness.cache import cache_latest
from tenslora.harness.data.examples import Dataset, Examples, ImageArrays
from tenslora.harness.quick_start import read_uci_digits


@cache_latest(1)
def load_digits(wanted: Sequence[int]) -> Dataset:
    """Load grey images of 8 x 8 pixels. Every third image of each class is for testing.

    Args:
        wanted: the digits to load, which are the classes in this order. `vit_digits` was pretrained on 0 to 4.

    Returns:
        The dataset.
    """
    import numpy as np

    pixels, digits = read_uci_digits()
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
