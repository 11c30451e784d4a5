"""CSV: the history of a run and its losses as tables, for a spreadsheet, pandas or a plotting script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenslora.harness.run_folder import RunFolder
from tenslora.harness.tracking.tracker import Tracker


class CsvTracker(Tracker):
    """Writes metrics.csv with a line for each epoch, and steps.csv with a line for each optimizer step.

    Both are written after every epoch, and at the end of a run that diverged. A resumed run keeps the steps before its
    checkpoint.

    Args:
        folder: the run's folder, from which an earlier attempt's metrics.csv is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self._folder.remove_metrics()
        self._history: list[dict[str, Any]] = []
        self._steps: dict[int, tuple[float, float]] = {}

    def step(self, step: int, rate: float, loss: float) -> None:
        if not self._steps:
            self._steps = {number: line for number, line in self._folder.read_steps().items() if number < step}
        self._steps[step] = rate, loss

    def epoch(self, entry: dict[str, Any]) -> None:
        self._history.append(entry)
        self._folder.write_metrics(self._history)
        self._write_steps()

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        super().finish(record, files)
        self._write_steps()  # of the epoch in which a run diverged

    def _write_steps(self) -> None:
        if self._steps:  # a resumed run first reports the epochs before its checkpoint, without their steps
            self._folder.write_steps(self._steps)
