"""The interface between a run and a logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self


class Tracker:
    """Reports a run to a logger. This base class reports nothing; each logger's tracker extends it.

    A tracker is a context: if an exception leaves the context, the tracker abandons the run.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def epoch(self, entry: dict[str, Any]) -> None:
        """Report one epoch.

        Args:
            entry: the epoch's entry in the history: epoch, step, losses, learning rate and every metric.
        """

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        """Report the end of the run.

        Args:
            record: the record of the run, which is completed or diverged.
            files: the files of the trained weights.
        """

    def abandon(self) -> None:
        """Report that the run was interrupted or failed, and will leave no record."""
