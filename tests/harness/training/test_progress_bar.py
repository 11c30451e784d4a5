from __future__ import annotations

import logging
import sys
import time

import pytest

from tenslora.harness.training.progress import ProgressBar

ENTRY = {"epoch": 3, "train_loss": 0.25, "accuracy": 0.5}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_it_logs_a_line_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar(steps=200, done=100, shown=True) as bar:
        for _ in range(10):
            clock[0] += 4
            bar.step(1.5)
        bar.epoch(ENTRY, "accuracy")
    assert caplog.messages == [
        # The speed is that of this process, and not of the steps made before.
        "step 108 of 200  loss 1.5000  0.2 steps/s  6:08 left",
        "step 110 of 200  epoch 3  loss 0.2500  accuracy 0.5000  0.2 steps/s  6:00 left",
    ]


def test_on_a_terminal_it_draws_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(steps=10, done=4, shown=True) as bar:
        bar.step(1.5)
        bar.epoch(ENTRY, "accuracy")
    drawn = capsys.readouterr().err
    assert "5/10" in drawn
    assert "epoch=3, loss=0.2500, accuracy=0.5000" in drawn


def test_it_shows_nothing_unless_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(steps=10, done=4, shown=False) as bar:
        bar.step(1.5)
        bar.epoch(ENTRY, "accuracy")
    assert capsys.readouterr().err == ""
    assert caplog.messages == []
