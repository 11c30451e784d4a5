from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.training.metrics import METRICS, Metric, metric_of
from tests.conftest import ROOT

LABELS = np.array([1, 1, 1, 0, 0, 1, 0, 1])
GUESSES = np.array([1, 0, 1, 0, 1, 1, 0, 0])  # 3 true and 1 false positive, 2 true and 2 false negatives


def score(metric: str, guesses: np.ndarray) -> float:
    logits = np.eye(2, dtype=np.float32)[guesses] - 0.5
    return METRICS[metric].function(LABELS, logits)


def test_scores_are_those_of_the_confusion_matrix() -> None:
    tp, fp, tn, fn = 3, 1, 2, 2
    assert score("accuracy", GUESSES) == pytest.approx((tp + tn) / 8)
    assert score("f1", GUESSES) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("matthews", GUESSES) == pytest.approx(matthews)


CORRELATIONS = ("pearson", "spearman")


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in CORRELATIONS])
def test_scores_span_the_range_of_their_metric(metric: str) -> None:
    assert METRICS[metric].larger_is_better
    assert score(metric, LABELS) == METRICS[metric].highest
    assert score(metric, 1 - LABELS) == METRICS[metric].lowest


def test_a_constant_guess_scores_zero() -> None:
    assert score("matthews", np.ones(8, int)) == 0
    assert score("f1", np.zeros(8, int)) == 0


def test_correlations_are_those_of_numpy_on_values_and_on_ranks() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=30)
    outputs = (np.exp(labels) + rng.normal(size=30)).astype(np.float32)
    assert METRICS["pearson"].function(labels, outputs[:, None]) == pytest.approx(np.corrcoef(labels, outputs)[0, 1])
    ranks = np.corrcoef(labels.argsort().argsort(), outputs.argsort().argsort())
    assert METRICS["spearman"].function(labels, outputs[:, None]) == pytest.approx(ranks[0, 1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", CORRELATIONS)
def test_correlations_span_their_range_and_a_constant_scores_zero(metric: str) -> None:
    labels, function = np.arange(5.0), METRICS[metric].function
    assert function(labels, labels[:, None]) == pytest.approx(METRICS[metric].highest)
    assert function(labels, -labels[:, None]) == pytest.approx(METRICS[metric].lowest)
    assert function(labels, np.ones((5, 1))) == function(np.ones(5), labels[:, None]) == 0


def test_a_metric_of_probabilities_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def auroc(labels: np.ndarray, logits: np.ndarray) -> float:
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))

    monkeypatch.setitem(METRICS, "auroc", Metric("auroc", auroc, classes=2))
    # By its definition: the share of pairs of a positive and a negative example that are ranked rightly.
    logits = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    margins = logits[:, 1] - logits[:, 0]
    pairs = margins[LABELS == 1][:, None] > margins[LABELS == 0]
    assert METRICS["auroc"].function(LABELS, logits) == pytest.approx(pairs.mean())


def test_the_registry_is_read_without_torch_or_scikit_learn() -> None:
    program = "import sys, tenslora.harness.training.metrics; print({'torch', 'sklearn', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_metric_of_ones_own_may_write_into_its_arrays() -> None:
    def accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
        labels -= logits.argmax(-1)
        logits -= logits.max(-1, keepdims=True)  # as a softmax begins
        return float((labels == 0).mean())

    labels, logits = np.array([0, 1]), np.array([[1.0, 2.0], [3.0, 4.0]])
    assert Metric("own", accuracy).score(labels, logits) == 0.5
    assert (labels.tolist(), logits.tolist()) == ([0, 1], [[1.0, 2.0], [3.0, 4.0]])


def test_a_metric_of_ones_own_returns_a_number_in_its_range() -> None:
    def score(value: object, outputs: float = 0.0, highest: float = 1.0) -> float:
        metric = Metric("own", lambda *_: value, highest=highest)  # type: ignore[arg-type]
        return metric.score(np.zeros(1), np.full((1, 2), outputs))

    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        assert (type(score(number)), score(number)) == (float, 0.5)
    assert score(1) == 1.0
    assert score(95.0, highest=math.inf) == 95.0
    for wrong in (math.nan, None, np.array([0.5, 0.6]), 95.0, -0.1, "0.5"):
        with pytest.raises(
            TensLoRAError, match=r"^dataset\.metrics=own: the metric must return a finite number from 0 "
        ):
            score(wrong)
    with pytest.raises(TensLoRAError):
        score(math.inf, highest=math.inf)
    assert math.isnan(score(math.nan, outputs=math.nan)), "of a run that has diverged"


def test_the_metric_of_a_score_may_have_an_underscore_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "top_5", Metric("top_5", METRICS["accuracy"].function))
    assert [metric_of(name).name for name in ("top_5", "top_5_hard_ones", "accuracy_5")] == ["top_5"] * 2 + ["accuracy"]
    with pytest.raises(ValueError, match=r"^top_4_hard: there is no such metric"):
        metric_of("top_4_hard")
