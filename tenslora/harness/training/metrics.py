"""Scores of predicted class numbers against the true ones, as fractions."""

from __future__ import annotations

from collections.abc import Sequence


def score(metric: str, labels: Sequence[int], predictions: Sequence[int]) -> float:
    """One metric of a whole test split.

    accuracy: share of right answers. matthews: Matthews correlation (CoLA's; -1 to 1). f1: of class 1, as GLUE
    reports MRPC.
    """
    from sklearn import metrics

    if metric == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    if metric == "f1":
        return float(metrics.f1_score(labels, predictions, zero_division=0))
    raise ValueError(f"unknown metric {metric}")
