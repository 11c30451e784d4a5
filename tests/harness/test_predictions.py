"""Predictions as a run's folder keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.predictions import Predictions, by_name
from tenslora.harness.run_folder import RunFolder


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


@pytest.mark.parametrize("size", [0.01, 3.0, 1e5])
def test_classes_and_probabilities_survive_the_rounding(size: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    logits = (size * random.standard_normal((500, 7))).astype(np.float32)
    logits[:, 1] = logits[:, 0] + np.float32(1e-4)  # closer than float16 resolves at 3, far below at 1e5
    predictions = Predictions(random.integers(0, 7, 500), logits)
    folder = RunFolder(tmp_path / "run")
    folder.write_predictions({"test": predictions})
    read = folder.read_predictions()["test"]
    assert not read.is_regression
    assert np.array_equal(read.labels, predictions.labels)
    assert np.array_equal(read.predicted, logits.argmax(-1))
    np.testing.assert_allclose(softmax(read.outputs), softmax(logits), atol=1e-3)
    assert np.isfinite(read.outputs).all()
    assert folder.predictions.stat().st_size < 500 * (4 + 7 * 2) + 500


def test_it_does_not_matter_what_numpy_makes_of_underflows(tmp_path: Path) -> None:
    logits = np.array([[800.0, 0.0, 800.0 - 1e-3], [3e38, -3e38, 0.0]], np.float32)
    predictions = {
        "test": Predictions(np.array([0, 1]), logits),
        "more": Predictions(np.array([1e-60]), logits[:1, :1]),
    }
    expected = by_name(logits, ["a", "b", "c"])
    RunFolder(tmp_path / "plain").write_predictions(predictions)
    with np.errstate(all="raise"):
        assert by_name(logits, ["a", "b", "c"]) == expected
        RunFolder(tmp_path / "strict").write_predictions(predictions)
    plain, strict = (RunFolder(tmp_path / name).predictions.read_bytes() for name in ("plain", "strict"))
    assert plain == strict


def test_values_and_further_splits_are_kept_too(tmp_path: Path) -> None:
    values = Predictions(np.array([250_000.0, -1.5]), np.array([[249_000.5], [0.25]], np.float32))
    classes = Predictions(np.array([1, 0]), np.array([[0.0, 1.0], [2.0, 0.0]], np.float32))
    folder = RunFolder(tmp_path)
    folder.write_predictions({"test": values, "mismatched": classes})
    read = folder.read_predictions()
    assert set(read) == {"test", "mismatched"}
    assert read["test"].is_regression
    assert read["test"].labels.tolist() == [250_000.0, -1.5]
    assert read["test"].predicted.tolist() == [249_000.5, 0.25]
    assert read["mismatched"].predicted.tolist() == [1, 0]


def test_a_run_of_an_earlier_version_has_none_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_predictions() == {}
    folder.predictions.write_bytes(b"half")
    with pytest.raises(TensLoRAError, match=rf"^{folder.predictions}: not a readable file of predictions"):
        folder.read_predictions()
