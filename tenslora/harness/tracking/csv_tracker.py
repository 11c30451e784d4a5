"""CSV: the history of a run as one table, for a spreadsheet, pandas or a plotting script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenslora.harness.run_folder import RunFolder
from tenslora.harness.tracking.tracker import Tracker


class CsvTracker(Tracker):
    """Writes metrics.csv with a line for each epoch, as `RunFolder.write_metrics` does.

    Args:
        folder: the run's folder, from which an earlier attempt's metrics.csv is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self._folder.metrics.unlink(missing_ok=True)
        self._history: list[dict[str, Any]] = []

    def epoch(self, entry: dict[str, Any]) -> None:
        self._history.append(entry)
        self._folder.write_metrics(self._history)
