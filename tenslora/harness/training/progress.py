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
        self._steps, self._done = steps, done
        self._logs_lines = shown and not has_terminal
        self._last_line = time.monotonic()
        # When the first step ended, and how many steps were done then. The first step is left out of the speed, because
        # it loads libraries and data, and compiles.
        self._started: tuple[float, int] | None = None
        self._latest: dict[str, str] = {}
        self._bar: tqdm[Any] | None = None
        if has_terminal:
            # Smoothing 0 is the mean speed, which includes the evaluations.
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0)
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
        is_first, self._started = self._started is None, self._started or (time.monotonic(), self._done)
        if self._bar is not None:
            self._bar.set_postfix(self._latest, refresh=False)
            if is_first:
                self._bar.n = self._bar.initial = self._bar.last_print_n = self._done
                self._bar.unpause()  # the time left counts from now
                self._bar.refresh()
            else:
                self._bar.update()
        elif self._logs_lines and time.monotonic() - self._last_line > LINE_SECONDS:
            self._log_line()

    def epoch(self, entry: Mapping[str, Any], metric: str) -> None:
        """Show an epoch's mean loss and its score, on a terminal in a line that stays above the bar.

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
            log.info("%s", self._shown())
        elif self._logs_lines:
            self._log_line()

    def _shown(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._latest.items())

    def _log_line(self) -> None:
        self._last_line = time.monotonic()
        line = f"step {self._done} of {self._steps}  {self._shown()}"
        started, done_then = self._started or (self._last_line, self._done)
        if self._done > done_then:
            speed = (self._done - done_then) / max(1e-9, self._last_line - started)
            minutes, seconds = divmod(int((self._steps - self._done) / speed), 60)
            pace = f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step"
            line += f"  {pace}  {minutes}:{seconds:02d} left"
        log.info("%s", line)
