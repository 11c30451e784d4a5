"""Shows how far a training run has come."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0
"""The least number of seconds between two lines of one epoch, where there is no terminal."""


class ProgressBar:
    """A progress bar over the optimizer steps of a run. Without a terminal it logs a line now and then.

    Args:
        steps: the number of steps of the whole run.
        done: the number of steps taken before the run was resumed.
        shown: whether to show anything.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        has_terminal = shown and sys.stderr.isatty()
        self._steps, self._done, self._done_before = steps, done, done
        self._logs_lines = shown and not has_terminal
        self._started = self._last_line = time.monotonic()
        self._latest: dict[str, str] = {}
        self._bar: tqdm[Any] | None = None
        if has_terminal:
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
        # Lines that are logged to the console have to go above the bar. If the console has no handler, as in a sweep,
        # they must not be redirected, because redirecting would send them to the console.
        to_console = any(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers)
        self._redirect = logging_redirect_tqdm() if to_console and self._bar is not None else contextlib.nullcontext()

    def __enter__(self) -> Self:
        self._redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._redirect.__exit__(None, None, None)
        if self._bar is not None:
            self._bar.close()

    def step(self, loss: float) -> None:
        """Count one more optimizer step, and show its loss.

        Args:
            loss: the step's loss.
        """
        self._done += 1
        self._latest["loss"] = f"{loss:.4f}"
        if self._bar is not None:
            self._bar.set_postfix(self._latest, refresh=False)
            self._bar.update()
        elif self._logs_lines and time.monotonic() - self._last_line > LINE_SECONDS:
            self._log_line()

    def epoch(self, entry: Mapping[str, Any], metric: str) -> None:
        """Show an epoch's mean loss and its score.

        Args:
            entry: the epoch's entry in the history, see `loop.fit`.
            metric: the name of the score to show.
        """
        self._latest = {
            "epoch": str(entry["epoch"]),
            "loss": f"{entry['train_loss']:.4f}",
            metric: f"{entry[metric]:.4f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(self._latest)
        elif self._logs_lines:
            self._log_line()

    def _log_line(self) -> None:
        self._last_line = time.monotonic()
        speed = (self._done - self._done_before) / max(1e-9, self._last_line - self._started)
        seconds_left = int((self._steps - self._done) / max(1e-9, speed))
        latest = "  ".join(f"{name} {value}" for name, value in self._latest.items())
        log.info(
            "step %d of %d  %s  %.1f steps/s  %d:%02d left",
            self._done,
            self._steps,
            latest,
            speed,
            *divmod(seconds_left, 60),
        )
