"""Shows how far a sweep has come while it runs: on the terminal, and in the report that is written again and again."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tenslora.harness.sweeping.jobs import Job, Look, State

LOOK_SECONDS = 1.0
PLAIN_LINE_SECONDS = 60.0  # without a terminal: how often a line says that the sweep is still running
REPORT_SECONDS = 5.0  # at least this long from one report to the next
IDLE_REPORT_SECONDS = 60.0  # a report is written even if nothing is new, so that a reader sees that the sweep lives
REPORT_SHARE = 0.05  # of the time may be spent on reports, which take it from jobs in this process

_WAITING = Look(State.NEW, None, None)


class Progress:
    """A progress bar over the jobs, with the numbers of running and of failed jobs. Without a terminal it prints lines.

    The bar reads the jobs' folders. It therefore works with every launcher, and it sees jobs that another sweep carries
    out. Whenever a job has started or ended, but only every few seconds, a report is written.

    Args:
        jobs: the jobs of the sweep.
        looks: the state of each job's folder before anything is started.
        report: a function that writes a report. It is given the state of each job, and whether the sweep goes on; after
            the jobs it is called once more only if an error ends the sweep. If the function fails, a line says so and
            the sweep goes on.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        looks: Mapping[Job, Look],
        report: Callable[[Mapping[Job, Look], bool], object] | None = None,
    ) -> None:
        self.jobs = list(jobs)
        # Until a job has ended anew, its earlier failure is no news.
        self.looks = {job: _WAITING if look.state is State.FAILED else look for job, look in looks.items()}
        self.report = report
        self.report_at, self.is_news = 0.0, True  # when the next report may be written, and whether it has news
        self.report_error: str | None = None
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
        if error is not None and self.report is not None:
            self._write_report(self.report, goes_on=False)
        if self.bar is not None:
            self.bar.close()

    def _follow(self) -> None:
        self.report_if_due()
        while not self._end.wait(LOOK_SECONDS):
            self.update()
            self.report_if_due()

    def update(self) -> None:
        """Look at every job that has not ended, and print what is new."""
        running = 0
        for job in self.jobs:
            if job in self.settled:
                continue
            look = job.look()
            running += look.state is State.RUNNING
            failed_anew = look.state is State.FAILED and _failed_at(job) != self.failures[job]
            if look.state is State.FAILED and not failed_anew:
                look = _WAITING
            self.is_news |= look.state is not self.looks[job].state
            self.looks[job] = look
            if look.state is State.DONE or failed_anew:
                self.settled.add(job)
                self.failed += failed_anew
                self._say(f"{self._count()} {job.label}: {_outcome(look)}{self._left()}")
        if self.bar is not None:
            self.bar.n = len(self.settled)
            self.bar.set_postfix_str(f"{running} running, {self.failed} failed")
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self._say(f"{self._count()} {running} running, {self.failed} failed{self._left()}")

    def report_if_due(self) -> None:
        """Write a report if a job has started or ended since the last one and enough time has passed, or much time."""
        due = self.report_at + IDLE_REPORT_SECONDS * (not self.is_news)
        if self.report is not None and time.monotonic() >= due:
            self._write_report(self.report, goes_on=True)

    def _write_report(self, report: Callable[[Mapping[Job, Look], bool], object], goes_on: bool) -> None:
        self.is_news, started, error = False, time.monotonic(), None
        try:
            report(self.looks, goes_on)
        except Exception as failure:  # the report is only for watching, and whatever is wrong with it may pass
            error = str(failure)
        if error and error != self.report_error:
            self._say(f"no new report: {error}")
        self.report_error = error
        ended = time.monotonic()
        self.report_at = ended + max(REPORT_SECONDS, (ended - started) / REPORT_SHARE)

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
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime_ns)
    return times


def _outcome(look: Look) -> str:
    if look.record is None or look.state is not State.DONE:
        return f"failed ({look.problem})"
    metrics = look.record["metrics"]
    return f"{metrics['name']} {metrics['last']:.4f}"
