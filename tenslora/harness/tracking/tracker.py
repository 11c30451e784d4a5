"""What a logger does with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self


class Tracker:
    """Reports a run to a logger. This one reports nothing; a logger's own tracker extends it.

    It is a context: a run that breaks off within it is abandoned.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def epoch(self, entry: dict[str, Any]) -> None:
        """Report one epoch.

        Args:
            entry: of the record's history: epoch, step, losses, learning rate and every metric.
        """

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        """Report the end of the run.

        Args:
            record: of the run, completed or diverged.
            files: the trained weights.
        """

    def abandon(self) -> None:
        """Report that the run broke off and will leave no record."""
