"""TensorBoard's event files, read back by its own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tenslora.errors import TensLoRAError
from tenslora.harness.tracking import start_tracker
from tests.events import FACTS, read_events
from tests.harness.tracking.conftest import Resumed
from tests.running import configured

ENTRY = {"epoch": 1, "step": 5, "lr": 1e-3, "matthews": 0.25, "accuracy": 0.75}


def test_a_killed_run_shows_the_epochs_that_it_completed(resumed: Resumed) -> None:
    events = read_events(resumed.killed)
    assert events.status is None
    ((step, value),) = events.scalars["accuracy"]
    assert step == 2
    assert value == pytest.approx(resumed.history[0]["accuracy"])


def test_a_resumed_run_shows_every_epoch_once(resumed: Resumed) -> None:
    events = read_events(resumed.folder)
    names = set(resumed.history[0]) - {"epoch", "step"}
    assert set(events.scalars) == names | {"score"}
    for name in names:
        steps, values = zip(*events.scalars[name], strict=True)
        assert steps == tuple(entry["step"] for entry in resumed.history)
        assert values == pytest.approx([entry[name] for entry in resumed.history])
    assert events.scalars["score"] == events.scalars["accuracy"]
    assert events.status == "STATUS_SUCCESS"


def test_a_reader_that_is_open_while_a_run_starts_anew_forgets_the_earlier_attempt(tmp_path: Path) -> None:
    run = configured("dataset=cola", "logger=tensorboard")
    start_tracker(run, tmp_path, FACTS).epoch({**ENTRY, "step": 9})
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in reader.Scalars("score")] == [9]
    start_tracker(run, tmp_path, FACTS).epoch(ENTRY)
    reader.Reload()
    assert [event.step for event in reader.Scalars("score")] == [5]


def test_a_backup_by_hard_links_keeps_the_curves_of_the_earlier_attempt(tmp_path: Path) -> None:
    run, backup = configured("dataset=cola", "logger=tensorboard"), tmp_path / "backup"
    start_tracker(run, tmp_path, FACTS).epoch(ENTRY)
    (events,) = tmp_path.glob("events.*")
    backup.mkdir()
    (backup / events.name).hardlink_to(events)
    start_tracker(run, tmp_path, FACTS)
    assert events.stat().st_size == 0
    assert read_events(backup).scalars["score"] == [(5, 0.25)]


def test_settings_are_hyperparameters_by_their_names_on_the_command_line(tmp_path: Path) -> None:
    run = configured("dataset=cola", "rank_strategy=isorank", "optimizer.lr=0.01", "seed=3", "logger=tensorboard")
    with pytest.raises(KeyboardInterrupt), start_tracker(run, tmp_path, FACTS) as tracker:
        tracker.epoch(ENTRY)
        raise KeyboardInterrupt
    events = read_events(tmp_path)
    shown = events.hyperparameters
    assert (shown["row"], shown["seed"], shown["optimizer.lr"]) == ("qkv_depth isorank", 3, 0.01)
    assert (shown["adapter_parameters"], shown["percent_of_lora"]) == (100, 25)
    assert (shown["adapter.head_layout"], shown["trainer.compile"]) == ("aligned", False)
    assert shown["optimizer.betas"] == "[0.9, 0.999]"
    assert not any(name.startswith("logger") for name in shown)
    assert events.scalars["score"] == [(5, 0.25)]
    assert events.status == "STATUS_FAILURE"


def test_a_folder_that_is_moved_meanwhile_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        pytest.raises(TensLoRAError, match=rf"^{folder}: TensorBoard's file cannot be written \(No such file or dir"),
        start_tracker(configured("dataset=cola", "logger=tensorboard"), folder, FACTS) as tracker,
    ):
        folder.rename(tmp_path / "moved")
        tracker.epoch(ENTRY)
    assert not capfd.readouterr().err
