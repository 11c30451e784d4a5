from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import sklearn.datasets

from tenslora.harness.data import Examples
from tenslora.harness.data.digits import load_digits
from tenslora.harness.quick_start import read_uci_digits
from tests.harness.data.image_folders import load


def images_and_digits(examples: Examples, classes: tuple[str, ...]) -> list[tuple[bytes, str]]:
    return [(examples.inputs[i].tobytes(), classes[label]) for i, label in enumerate(examples.labels)]


def test_the_digits_are_read_as_scikit_learn_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = read_uci_digits()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    from_scikit_learn = read_uci_digits()
    for pixels, digits in (from_file, from_scikit_learn):
        expected_pixels, expected_digits = sklearn.datasets.load_digits(return_X_y=True)
        np.testing.assert_array_equal(pixels, expected_pixels)
        np.testing.assert_array_equal(digits, expected_digits)


@pytest.mark.parametrize("wanted", [range(5, 10), range(5)])
def test_each_image_is_either_in_train_or_in_test(wanted: range) -> None:
    dataset = load_digits(wanted)
    pixels, digits = sklearn.datasets.load_digits(return_X_y=True)
    expected = Counter(
        (np.round(image / 16 * 255).astype(np.uint8).tobytes(), str(digit))
        for image, digit in zip(pixels, digits, strict=True)
        if digit in wanted
    )
    train, test = (images_and_digits(examples, dataset.classes) for examples in (dataset.train, dataset.test))
    assert Counter(train + test) == expected
    count = np.bincount(digits, minlength=10)
    for label, digit in enumerate(wanted):
        assert list(dataset.test.labels).count(label) == count[digit] // 3
        assert list(dataset.train.labels).count(label) == count[digit] - count[digit] // 3


def test_the_dataset_is_the_five_digits_that_the_backbone_never_saw() -> None:
    dataset = load("digits", None)
    assert dataset.classes == ("5", "6", "7", "8", "9")
    assert (len(dataset.train), len(dataset.test)) == (599, 297)
    assert dataset.train.inputs[0].size == (8, 8)
