"""Which trackers a run gets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.config import LoggerConfig
from tenslora.harness.results.table import Table
from tenslora.harness.tracking import start_tracker, track_table
from tenslora.harness.tracking.tracker import Trackers
from tests.events import FACTS, read_events
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
        (LoggerConfig(), True),
        (LoggerConfig(wandb=True, mode="disabled"), True),
        (LoggerConfig(csv=True, tensorboard=True, wandb=True, mode="offline"), False),
    ],
    ids=["no logger", "disabled", "another process watches"],
)
def test_a_run_without_a_logger_needs_no_wandb(logger: LoggerConfig, watch: bool, tmp_path: Path) -> None:
    run = replace(configured(), logger=logger)
    tracker = start_tracker(run, tmp_path, {}, watch)
    assert isinstance(tracker, Trackers)
    assert tracker.trackers == []
    if watch:
        assert track_table(logger, tmp_path, Table("t", "T", ()), [tmp_path / "none.png"]) == ""
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_trained_anew_leaves_nothing_of_the_earlier_runs_logs(tmp_path: Path) -> None:
    names = {"metrics.csv", "steps.csv", "profile.txt", "profile.json.gz", "events.out.tfevents.1.host.2.0"}

    def left(*words: str) -> set[str]:
        for name in names:
            (tmp_path / name).write_text("of an earlier run")
        start_tracker(configured("resume=true", *words), tmp_path, FACTS).abandon()
        return {path.name for path in tmp_path.iterdir()} & names

    assert left() == set()
    assert left("logger=tensorboard") == {"events.out.tfevents.1.host.2.0"}
    (tmp_path / "checkpoint.safetensors").touch()
    assert left() == names


def test_if_one_logger_refuses_the_run_the_others_learn_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(*_: object, **__: object) -> None:
        raise wandb.errors.UsageError("no more runs")

    run = configured("logger=[tensorboard,wandb]", "logger.mode=offline")
    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(TensLoRAError, match="no more runs"):
        start_tracker(run, tmp_path, FACTS)
    assert read_events(tmp_path).status == "STATUS_FAILURE"
