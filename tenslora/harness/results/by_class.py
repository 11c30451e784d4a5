"""How well each class is recognised, from the predictions that the runs of a classification keep."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tenslora.errors import TensLoRAError
from tenslora.harness.results.summary import Summary
from tenslora.harness.results.table import Column, Row, Run
from tenslora.harness.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_MOST_ROWS = 16
"""The largest number of rows that are shown. Of more rows, LoRA and the best row of the column are."""

_MOST_CLASSES = 100
"""The largest number of classes that are shown. Of more classes, those that are recognised worst are."""


@dataclass(frozen=True)
class ClassScore:
    """How well one class is recognised.

    Args:
        name: the class.
        share: how many of all examples are of the class, in per cent.
        accuracies: for each row, the share of these examples that are recognised, in per cent, over all seeds; None
            where a row has no predictions.
        taken_for: the class that these examples are most often taken for instead, over all rows with an adapter; None
            if they are always recognised.
        taken_share: how many of these examples are taken for that class, in per cent.
    """

    name: str
    share: float
    accuracies: tuple[float | None, ...]
    taken_for: str | None
    taken_share: float


@dataclass(frozen=True)
class ByClass:
    """How well the classes of a column are recognised.

    Args:
        column: dataset and backbone.
        rows: the rows that are compared.
        classes: the classes, those that the rows recognise worst first.
        left_out: how many further classes there are.
    """

    column: Column
    rows: tuple[Row, ...]
    classes: tuple[ClassScore, ...]
    left_out: int


def by_class(summary: Summary) -> list[ByClass]:
    """How well each class is recognised, for each column that is a classification and whose runs kept predictions.

    Args:
        summary: the summary of the table.
    """
    tables = []
    for number, column in enumerate(summary.columns):
        names = _classes(run for row in summary.rows for run in row.cells[number].runs)
        if not names:
            continue
        counts = {
            row.row: confusion
            for row in summary.rows
            if (confusion := _confusion(row.cells[number].runs, names)) is not None
        }
        if not counts:
            continue
        best = {row.row for row in summary.rows if row.cells[number].best}
        few = len(counts) <= _MOST_ROWS
        rows = tuple(row for row in counts if few or row.is_lora or row in best)
        adapted = [confusion for row, confusion in counts.items() if row.has_adapter]
        pooled = np.sum(adapted or list(counts.values()), axis=0)
        scores = _scores(names, [counts[row] for row in rows], pooled)
        tables.append(ByClass(column.column, rows, scores[:_MOST_CLASSES], max(0, len(scores) - _MOST_CLASSES)))
    return tables


def _classes(runs: Iterable[Run]) -> Sequence[str]:
    return next((run.record["classes"] for run in runs if run.record and run.record.get("classes")), ())


def _confusion(runs: Iterable[Run], names: Sequence[str]) -> NDArray[Any] | None:
    """How often each class (row) is taken for each class (column), summed over the completed runs."""
    total, classes = None, len(names)
    for run in runs:
        if run.status != "completed" or not run.folder:
            continue
        if run.record and run.record.get("classes", names) != names:
            log.warning("%s: has other classes; the report is without this run's accuracy by class", run.folder)
            continue
        if pairs := _predictions(run.folder, run.scored_on or "", classes):
            labels, predicted = pairs
            counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
            total = counts if total is None else total + counts
    return total


def _predictions(folder: Path, split: str, classes: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The labels and the predicted classes; None for a regression, or if the run has kept no readable predictions."""
    try:
        written = RunFolder(folder).predictions.stat().st_mtime_ns
    except OSError:
        return None
    return _read(folder, written, split, classes)


@lru_cache(maxsize=4096)  # a running sweep asks for the same files again and again
def _read(folder: Path, _written: int, split: str, classes: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    files = RunFolder(folder)
    try:
        predictions = files.read_predictions().get(split)
    except TensLoRAError as error:
        log.warning("%s; the report is without this run's accuracy by class", error)
        return None
    if predictions is None or predictions.is_regression:
        return None
    if predictions.outputs.shape[1] != classes:
        log.warning(
            "%s: has %d classes, and the run has %d; the report is without this run's accuracy by class",
            files.predictions, predictions.outputs.shape[1], classes,
        )  # fmt: skip
        return None
    return predictions.labels, predictions.predicted.astype(np.int32)


def _scores(names: Sequence[str], counts: Sequence[NDArray[Any]], pooled: NDArray[Any]) -> tuple[ClassScore, ...]:
    def score(number: int) -> ClassScore:
        mistakes = pooled[number].copy()
        mistakes[number] = 0
        taken_for = int(mistakes.argmax())
        return ClassScore(
            name=names[number],
            share=_percent(pooled[number].sum(), pooled.sum()) or 0.0,
            accuracies=tuple(_percent(confusion[number, number], confusion[number].sum()) for confusion in counts),
            taken_for=names[taken_for] if mistakes[taken_for] else None,
            taken_share=_percent(mistakes[taken_for], pooled[number].sum()) or 0.0,
        )

    recognised = [_percent(pooled[number, number], pooled[number].sum()) for number in range(len(names))]
    order = sorted(range(len(names)), key=lambda number: (recognised[number] is None, recognised[number] or 0.0))
    return tuple(score(number) for number in order)


def _percent(part: Any, whole: Any) -> float | None:
    return 100 * float(part) / float(whole) if whole else None
