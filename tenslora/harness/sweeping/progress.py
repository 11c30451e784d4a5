"""Shows how far a sweep has come while it runs."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tenslora.harness.sweeping.jobs import Job, Look, State

LOOK_SECONDS = 1.0
PLAIN_LINE_SECONDS = 60.0  # without a terminal: how often a line says that the sweep is still running


class Progress:
    """A progress bar over the jobs, with the numbers of running and of failed jobs. Without a terminal it prints lines.

    The bar reads the jobs' folders. It therefore works with every launcher, and it sees jobs that another sweep carries
    out.

    Args:
        jobs: the jobs of the sweep.
        looks: the state of each job's folder before anything is started.
    """

    def __init__(self, jobs: Sequence[Job], looks: Mapping[Job, Look]) -> None:
        self.jobs = list(jobs)
        # A job that failed before is about to run again. It has ended only when it is done or has failed anew.
        self.settled = {job for job in jobs if looks[job].state is State.DONE}
        self.failures = {job: _failed_at(job) for job in jobs}
        self.first, self.failed = len(self.settled), 0
        self.started = self.last_line = time.monotonic()
        self.bar: tqdm[Any] | None = None
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self.bar = tqdm(total=len(self.jobs), initial=self.first, unit="job", dynamic_ncols=True, desc="sweep")
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._watch.join()
        self.update()
        if self.bar is not None:
            self.bar.close()

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self.update()

    def update(self) -> None:
        """Look at every job that has not ended, and print what is new."""
        running = 0
        for job in self.jobs:
            if job in self.settled:
                continue
            look = job.look()
            running += look.state is State.RUNNING
            failed_anew = look.state is State.FAILED and _failed_at(job) != self.failures[job]
            if look.state is State.DONE or failed_anew:
                self.settled.add(job)
                self.failed += failed_anew
                self._say(f"{self._count()} {job.label}: {_outcome(look)}{self._left()}")
        if self.bar is not None:
            self.bar.n = len(self.settled)
            self.bar.set_postfix_str(f"{running} running, {self.failed} failed")
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self._say(f"{self._count()} {running} running, {self.failed} failed{self._left()}")

    def _count(self) -> str:
        return f"[{len(self.settled)}/{len(self.jobs)}]"

    def _left(self) -> str:
        done = len(self.settled) - self.first
        if self.bar is not None or not done:
            return ""
        seconds = (time.monotonic() - self.started) / done * (len(self.jobs) - len(self.settled))
        return f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def _say(self, line: str) -> None:
        self.last_line = time.monotonic()
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)


def _failed_at(job: Job) -> list[int]:
    # The times at which the files that report a failure were written. Their state alone does not show a new failure,
    # because a job may fail again before it was seen running.
    times = []
    for file in (job.folder.failure, job.folder.result):
        with contextlib.suppress(FileNotFoundError):
            times.append(file.stat().st_mtime_ns)
    return times


def _outcome(look: Look) -> str:
    if look.record is None or look.state is not State.DONE:
        return f"failed ({look.problem})"
    metrics = look.record["metrics"]
    return f"{metrics['name']} {metrics['last']:.4f}"
