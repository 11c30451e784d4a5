"""Loggers: CSV, TensorBoard, W&B and a profiler. A logger's library is imported only for a run that asks for it.

Nothing else is imported here either: `python -m tenslora.harness.tracking.dashboard` imports this first, before it can
say in one line that a package is missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError

if TYPE_CHECKING:
    from tenslora.harness.config import LoggerConfig, RunConfig
    from tenslora.harness.results.table import Table
    from tenslora.harness.tracking.tracker import Tracker


def start_tracker(run: RunConfig, folder: Path, facts: dict[str, Any], watch: bool = True) -> Tracker:
    """Start the trackers that a run's loggers ask for.

    Args:
        run: the settings.
        folder: the run's folder.
        facts: the facts known before the run trains: names, ranks and parameter counts.
        watch: whether this process reports; true on one of the processes that share a run.

    Returns:
        One tracker for all loggers. It reports nothing if the run has none.

    Raises:
        TensLoRAError: if a logger refuses the run.
    """
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.tracking.tracker import Trackers

    started = Trackers([])
    if not watch:
        return started
    if not (run.resume and RunFolder(folder).checkpoint.is_file()):
        RunFolder(folder).remove_logs(events=not run.logger.tensorboard)
    try:
        if run.logger.csv:
            from tenslora.harness.tracking.csv_tracker import CsvTracker

            started.trackers.append(CsvTracker(folder))
        if run.logger.tensorboard:
            from tenslora.harness.tracking.tensorboard_tracker import TensorBoardTracker

            started.trackers.append(TensorBoardTracker(run, folder, facts))
        if _has_wandb(run.logger):
            from tenslora.harness.tracking.wandb_tracker import WandbTracker

            started.trackers.append(WandbTracker(run, folder, facts))
        if run.logger.profile:
            from tenslora.harness.tracking.profile_tracker import ProfileTracker

            started.trackers.append(ProfileTracker(folder))
    except BaseException:
        started.abandon()
        raise
    return started


def track_table(config: LoggerConfig, folder: Path, table: Table, files: list[Path]) -> str:
    """Report a finished table to W&B, if it is among the loggers.

    CSV and TensorBoard have no part in this: `files` holds the table as CSV and as a report already.

    Args:
        config: the loggers' settings.
        folder: the folder for W&B's own files.
        table: the table.
        files: the files that `write_results` wrote.

    Returns:
        Why the table is not uploaded, if W&B is offline; otherwise "".

    Raises:
        TensLoRAError: if W&B refuses the table.
    """
    if not _has_wandb(config):
        return ""
    from tenslora.harness.tracking.wandb_tracker import upload_table

    return upload_table(config, folder, table, files)


def check_for_sweep(config: LoggerConfig) -> None:
    """Check that the runs of a sweep will be runs of their own on W&B.

    Args:
        config: the loggers' settings.

    Raises:
        TensLoRAError: if the environment gives all of them the same id.
    """
    if _has_wandb(config) and (given := os.environ.get("WANDB_RUN_ID")):
        raise TensLoRAError(
            f"WANDB_RUN_ID={given}: must not be set for a sweep, because all its runs would be one run of W&B"
        )


def _has_wandb(config: LoggerConfig) -> bool:
    return config.wandb and config.mode != "disabled"
