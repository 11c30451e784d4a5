"""How well each class is recognised, against scikit-learn's confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from tenslora.harness.predictions import Predictions
from tenslora.harness.results import by_class as module
from tenslora.harness.results.by_class import by_class
from tenslora.harness.results.report import to_html
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run
from tenslora.harness.run_folder import RunFolder
from tests.tables import STSB, make_run, make_table

NAMES = ["apple", "bread", "cheese"]


def with_predictions(
    run: Run, folder: Path, labels: Sequence[int], predicted: Sequence[int], split: str = "test"
) -> Run:
    """A run that has kept predictions, each with the logit 1 for what is predicted."""
    RunFolder(folder).write_predictions({split: Predictions(np.array(labels), np.eye(len(NAMES))[list(predicted)])})
    assert run.record
    return replace(run, folder=folder, record={**run.record, "classes": NAMES, "scored_on": split})


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two seeds of LoRA, one run of att and one of head_only, with random predictions."""
    draw = np.random.default_rng(0)
    made = [make_run("lora", epochs=[0.5]), make_run("lora", seed=1, epochs=[0.5])]
    made += [make_run("att", "isorank", epochs=[0.5]), make_run("head_only", epochs=[0.5])]
    return [
        with_predictions(
            run, tmp_path / str(number), draw.integers(0, 3, 60).tolist(), draw.integers(0, 3, 60).tolist()
        )
        for number, run in enumerate(made)
    ]


def confusion(runs: Sequence[Run]) -> np.ndarray:
    """scikit-learn's confusion matrix of all predictions of the runs together."""
    read = [RunFolder(run.folder).read_predictions()["test"] for run in runs if run.folder]
    labels, predicted = (np.concatenate(parts) for parts in zip(*((p.labels, p.predicted) for p in read), strict=True))
    return np.asarray(confusion_matrix(labels, predicted))


def test_accuracies_and_confusions_are_those_of_the_confusion_matrix(runs: list[Run]) -> None:
    (of,) = by_class(summarize(make_table(runs)))
    assert [row.label for row in of.rows] == ["lora", "att isorank", "head_only"]
    matrices = [confusion(runs[:2]), confusion(runs[2:3]), confusion(runs[3:])]
    pooled = matrices[0] + matrices[1]  # the rows with an adapter
    hardest_first = np.argsort(np.diag(pooled) / pooled.sum(1))
    assert [score.name for score in of.classes] == [NAMES[number] for number in hardest_first]
    for number, score in zip(hardest_first, of.classes, strict=True):
        assert score.accuracies == pytest.approx([100 * m[number, number] / m[number].sum() for m in matrices])
        others = [other for other in range(3) if other != number]
        most = max(others, key=lambda other: pooled[number, other])
        assert score.taken_for == NAMES[most]
        assert score.taken_share == pytest.approx(100 * pooled[number, most] / pooled[number].sum())
        assert score.share == pytest.approx(100 * pooled[number].sum() / pooled.sum())


def test_a_class_that_is_always_recognised_is_taken_for_no_other_and_one_without_examples_comes_last(
    tmp_path: Path,
) -> None:
    run = with_predictions(make_run("lora", epochs=[0.5]), tmp_path, [0, 0, 1, 1], [0, 0, 0, 1], split="validation")
    (of,) = by_class(summarize(make_table([run])))
    assert [(score.name, score.accuracies, score.taken_for) for score in of.classes] == [
        ("bread", (50.0,), "apple"),
        ("apple", (100.0,), None),
        ("cheese", (None,), None),
    ]


def test_runs_without_predictions_are_left_out(runs: list[Run], tmp_path: Path) -> None:
    assert runs[3].folder
    RunFolder(runs[3].folder).predictions.unlink()
    other = replace(runs[2], row=replace(runs[2].row, tensor_mode="qkv"), folder=None)
    renamed = replace(runs[0], seed=9, record={**(runs[0].record or {}), "classes": ["bread", "apple", "cheese"]})
    assert by_class(summarize(make_table([*runs[:3], renamed]))) == by_class(summarize(make_table(runs[:3])))
    (of,) = by_class(summarize(make_table([*runs, other])))
    assert [row.label for row in of.rows] == ["lora", "att isorank"]
    assert by_class(summarize(make_table([make_run("lora", epochs=[0.5]), make_run("att")]))) == []
    regression = Predictions(np.array([0.5, 1.0]), np.array([[0.5], [1.0]]))
    RunFolder(tmp_path / "regression").write_predictions({"test": regression})
    run = replace(make_run("lora", epochs=[0.5], column=STSB), folder=tmp_path / "regression")
    assert by_class(summarize(make_table([run]))) == []


def test_of_many_rows_lora_and_the_best_are_shown_and_of_many_classes_the_hardest(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 2)
    monkeypatch.setattr(module, "_MOST_CLASSES", 2)
    (of,) = by_class(summarize(make_table([*runs[:2], *runs[3:], make_run("qkv", "isorank", epochs=[0.1])])))
    assert [row.label for row in of.rows] == ["lora", "head_only"]
    (of,) = by_class(summarize(make_table(runs)))
    assert [row.label for row in of.rows] == ["lora", "att isorank"]
    assert (len(of.classes), of.left_out) == (2, 1)
    assert "the 2 hardest of 3 classes" in to_html(summarize(make_table(runs)))
