"""How far a sweep has come, while it runs."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tenslora.harness.results.record import NAME
from tenslora.harness.sweeping.jobs import FAILURE, Job, State

LOOK_SECONDS = 1.0
PLAIN_LINE_SECONDS = 60.0  # where there is no terminal: how often a line tells that it is still running


class Progress:
    """A bar over the jobs, with how many run and have failed and the time left; plain lines without a terminal.

    It reads the jobs' folders, so that it shows the same whatever launcher carries them out, and whoever does.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        # What has failed before is about to be run again, and settled once it has failed anew.
        self.settled = {job.digest for job in jobs if job.state() is State.DONE}
        self.failures = {job.digest: _failed_at(job) for job in jobs}
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
        self._look()
        if self.bar is not None:
            self.bar.close()

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        running = 0
        for job in self.jobs:
            if job.digest in self.settled:
                continue
            now = job.state()
            running += now is State.RUNNING
            if now is State.DONE or (now is State.FAILED and _failed_at(job) != self.failures[job.digest]):
                self.settled.add(job.digest)
                self.failed += now is State.FAILED
                self._say(f"{self._count()} {job.label}: {_outcome(job)}{self._left()}")
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
    # When the files that tell of a failure were written. A job may fail faster than it can be seen running.
    found = []
    for name in (FAILURE, NAME):
        with contextlib.suppress(FileNotFoundError):
            found.append((job.folder / name).stat().st_mtime_ns)
    return found


def _outcome(job: Job) -> str:
    record = job.record()
    if record is None or record["status"] != "completed":
        return f"failed ({job.problem()})"
    return f"{record['metrics']['name']} {record['metrics']['last']:.4f}"
