"""metrics.csv, read back by pandas."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.tracking.csv_tracker import CsvTracker
from tests.harness.tracking.conftest import Resumed

ENTRY = {"epoch": 1, "step": 19, "lr": 1e-3, "accuracy": 0.1 + 0.2}


def test_a_killed_run_has_a_line_for_each_epoch_that_it_completed(resumed: Resumed) -> None:
    table = pandas.read_csv(resumed.killed / "metrics.csv")
    assert table.to_dict("records") == resumed.history[:1]


def test_a_resumed_run_has_one_line_for_each_epoch_exactly_as_recorded(resumed: Resumed) -> None:
    table = pandas.read_csv(resumed.folder / "metrics.csv")
    assert table.to_dict("records") == resumed.history
    assert list(table["epoch"]) == [1, 2]


def test_an_earlier_attempts_file_is_removed_when_a_run_starts(tmp_path: Path) -> None:
    CsvTracker(tmp_path).epoch(ENTRY)
    assert (tmp_path / "metrics.csv").is_file()
    CsvTracker(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_files_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}/metrics\.csv: cannot be removed \("):
        CsvTracker(tmp_path)


def test_a_full_disk_is_one_line_and_the_file_stays_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = CsvTracker(tmp_path)
    tracker.epoch(ENTRY)
    before = (tmp_path / "metrics.csv").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TensLoRAError, match=r"metrics\.csv: cannot be written \(No space left on device\)"):
        tracker.epoch({**ENTRY, "epoch": 2})
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_every_step_has_a_line_also_of_a_run_that_was_killed_and_resumed(resumed: Resumed) -> None:
    table = pandas.read_csv(resumed.folder / "steps.csv")
    assert list(table) == ["step", "lr", "train_loss"]
    assert list(table["step"]) == list(range(1, resumed.history[-1]["step"] + 1))
    start = 0
    for entry in resumed.history:
        of_epoch = table[start : entry["step"]]
        assert of_epoch["train_loss"].mean() == pytest.approx(entry["train_loss"])
        assert of_epoch["lr"].iloc[-1] == entry["lr"]
        start = entry["step"]


def test_steps_that_a_resumed_run_takes_again_replace_the_old_ones(tmp_path: Path) -> None:
    first, second = CsvTracker(tmp_path), CsvTracker(tmp_path)
    for step in (1, 2, 3):
        first.step(step, 1e-3, float(step))
    first.epoch(ENTRY)
    second.epoch(ENTRY)
    assert list(pandas.read_csv(tmp_path / "steps.csv")["step"]) == [1, 2, 3]
    second.step(2, 1e-3, 0.5)
    second.finish({}, [])
    assert pandas.read_csv(tmp_path / "steps.csv")["train_loss"].tolist() == [1.0, 0.5]
    (tmp_path / "steps.csv").write_text("step\nmany\n")
    third = CsvTracker(tmp_path)
    third.step(3, 1e-3, 0.25)
    third.epoch(ENTRY)
    assert pandas.read_csv(tmp_path / "steps.csv").to_dict("records") == [{"step": 3, "lr": 1e-3, "train_loss": 0.25}]
