"""The interface between a run and its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

SCORE = "score"
"""A second name under which the headline metric is logged, so that one chart can show all datasets."""

LONGEST_TAG = 64
"""The largest number of characters of a tag of W&B."""


class Tracker:
    """Reports a run to a logger. Each logger's tracker extends this class.

    A tracker is a context: if an exception leaves the context, the tracker abandons the run.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def step(self, step: int, rate: float, loss: float) -> None:
        """Report one optimizer step. The steps before a checkpoint are not reported again.

        Args:
            step: the number of the step, from 1.
            rate: its learning rate.
            loss: its loss, before the step.
        """

    def epoch(self, entry: dict[str, Any]) -> None:
        """Report one epoch.

        A run that is resumed first reports the epochs before its checkpoint again, so a tracker always sees the whole
        history.

        Args:
            entry: the epoch's entry in the history: epoch, step, losses, learning rate and every metric.

        Raises:
            TensLoRAError: if the epoch cannot be written.
        """

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        """Report the end of the run.

        Args:
            record: the record of the run, which is completed or diverged.
            files: the files of the trained weights.
        """

    def abandon(self) -> None:
        """Report that the run was interrupted or failed, and will leave no record."""


class Trackers(Tracker):
    """Reports a run to several loggers, or to none.

    Args:
        trackers: the loggers' trackers.
    """

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def step(self, step: int, rate: float, loss: float) -> None:
        for tracker in self.trackers:
            tracker.step(step, rate, loss)

    def epoch(self, entry: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.epoch(entry)

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        for tracker in self.trackers:
            tracker.finish(record, files)

    def abandon(self) -> None:
        for tracker in self.trackers:
            tracker.abandon()
