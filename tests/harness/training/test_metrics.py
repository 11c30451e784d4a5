from __future__ import annotations

import math

import pytest

from tenslora.harness.training.metrics import score

LABELS = [1, 1, 1, 0, 0, 1, 0, 1]
GUESSES = [1, 0, 1, 0, 1, 1, 0, 0]  # 3 true and 1 false positive, 2 true and 2 false negatives


def test_scores_are_those_of_the_confusion_matrix() -> None:
    tp, fp, tn, fn = 3, 1, 2, 2
    assert score("accuracy", LABELS, GUESSES) == pytest.approx((tp + tn) / 8)
    assert score("f1", LABELS, GUESSES) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("matthews", LABELS, GUESSES) == pytest.approx(matthews)


def test_a_constant_guess_scores_zero_where_it_says_nothing() -> None:
    assert score("matthews", LABELS, [1] * 8) == 0
    assert score("f1", LABELS, [0] * 8) == 0
