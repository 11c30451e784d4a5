"""Jobs of a sweep as the command line would compose them, and what they leave behind in their folders."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from tenslora.harness.config import validate
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.sweeping.jobs import Composed, Job, plan_jobs
from tests import records
from tests.conftest import ROOT
from tests.running import composed


def swept(*overrides: str) -> Composed:
    """One job of a sweep."""
    config = composed(*overrides, config_name="sweep")
    return Composed(overrides, validate(config), lambda: config)


def planned(outputs: Path, *overrides: str) -> Job:
    """The one job that these overrides make."""
    (job,) = plan_jobs([swept(*overrides)], outputs)
    return job


def complete(job: Job, last: float = 0.5, **changes: Any) -> None:
    """Leave what a finished run leaves, as far as a sweep looks at it."""
    records.complete(job.folder, job.run, last, **changes)


def diverge(job: Job) -> None:
    """Leave what a run leaves whose loss is no longer a number."""
    records.diverged(job.folder, job.run)


@contextlib.contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
    """While somebody else carries out the run in `folder`."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        yield


@contextlib.contextmanager
def claimed_by_a_process(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """While another process, which can be killed, carries out the run in `folder`."""
    command = [sys.executable, "-m", "tests.harness.claim_run_folder", str(folder.path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "claimed\n"
        yield holder
