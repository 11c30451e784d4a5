"""Loggers: Weights & Biases, or none. A logger's library is imported only for a run that asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenslora.harness.config import LoggerConfig, RunConfig
from tenslora.harness.results.table import Table
from tenslora.harness.tracking.tracker import Tracker


def start_tracker(run: RunConfig, folder: Path, facts: dict[str, Any], watch: bool = True) -> Tracker:
    """Start the tracker that a run's logger asks for.

    Args:
        run: the settings.
        folder: the run's folder.
        facts: the facts known before the run trains: names, ranks and parameter counts.
        watch: whether this process reports; true on one of the processes that share a run.

    Returns:
        The tracker. It reports nothing if the run has no logger.

    Raises:
        TensLoRAError: if the logger refuses the run.
    """
    if not watch or not _is_wanted(run.logger):
        return Tracker()
    from tenslora.harness.tracking.wandb_tracker import WandbTracker

    return WandbTracker(run, folder, facts)


def track_table(config: LoggerConfig, folder: Path, table: Table, files: list[Path]) -> None:
    """Report a finished table to the logger, if there is one.

    Args:
        config: the logger's settings.
        folder: the folder for the logger's own files.
        table: the table.
        files: the files that `write_results` wrote.

    Raises:
        TensLoRAError: if the logger refuses the table.
    """
    if not _is_wanted(config):
        return
    from tenslora.harness.tracking.wandb_tracker import upload_table

    upload_table(config, folder, table, files)


def _is_wanted(config: LoggerConfig) -> bool:
    return config.name != "none" and config.mode != "disabled"
