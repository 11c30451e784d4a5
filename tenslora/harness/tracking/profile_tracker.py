"""torch.profiler: where the time of a run's first epoch goes, by operation."""

from __future__ import annotations

import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tenslora.files import write_bytes
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.tracking.tracker import Tracker

_ROWS = 40


class ProfileTracker(Tracker):
    """Writes profile.txt, the costliest operations, and profile.json.gz, a trace, of the first epoch with its score.

    chrome://tracing and ui.perfetto.dev show the trace.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "5"
        )  # it logs when it starts, when it stops, and that there is no GPU
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(activities=activities)
        self._profile.start()

    def epoch(self, entry: dict[str, Any]) -> None:  # noqa: ARG002
        if self._profile is None:
            return
        done = self._profile
        self.abandon()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
        write_bytes(self._folder.profile_table, table.encode())
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            done.export_chrome_trace(str(trace))
            write_bytes(self._folder.profile_trace, gzip.compress(trace.read_bytes()))

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:  # noqa: ARG002
        self.abandon()  # a run that diverged has no complete epoch

    def abandon(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
