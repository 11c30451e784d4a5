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
