"""Which tracker a run gets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tenslora.harness.config import LoggerConfig
from tenslora.harness.results.table import Table
from tenslora.harness.tracking import start_tracker, track_table
from tenslora.harness.tracking.tracker import Tracker
from tests.running import configured


@pytest.fixture
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where W&B is not installed."""
    monkeypatch.delitem(sys.modules, "tenslora.harness.tracking.wandb_tracker", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)


@pytest.mark.usefixtures("_without_wandb")
@pytest.mark.parametrize(
    ("logger", "watch"),
    [
        (LoggerConfig(name="none"), True),
        (LoggerConfig(name="wandb", mode="disabled"), True),
        (LoggerConfig(name="wandb", mode="offline"), False),
    ],
    ids=["no logger", "disabled", "another process watches"],
)
def test_a_run_without_a_logger_needs_no_wandb(logger: LoggerConfig, watch: bool, tmp_path: Path) -> None:
    run = replace(configured(), logger=logger)
    assert type(start_tracker(run, tmp_path, {}, watch)) is Tracker
    if watch:
        track_table(logger, tmp_path, Table("t", "T", ()), [tmp_path / "none.png"])
    assert not list(tmp_path.iterdir())
