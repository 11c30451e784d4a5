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
        # The speed is that of this process, without its first step.
        "step 108 of 200  loss 1.5000  4.0 s/step  6:08 left",
        "step 110 of 200  epoch 3  loss 0.2500  accuracy 0.5000  4.0 s/step  6:00 left",
    ]


def test_start_up_does_not_count_for_the_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar(steps=100, done=0, shown=True) as bar:
        for seconds in (600, 2, 2, 30):
            clock[0] += seconds
            bar.step(1.5)
    assert caplog.messages == [
        "step 1 of 100  loss 1.5000",  # nothing is known about the speed yet
        "step 4 of 100  loss 1.5000  11.3 s/step  18:08 left",  # 3 steps in 34 seconds
    ]


def test_on_a_terminal_it_draws_a_bar_below_a_line_for_each_epoch(
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    console = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger(), "handlers", [console])
    with ProgressBar(steps=10, done=4, shown=True) as bar:
        for seconds in (600, 5, 5):
            clock[0] += seconds
            bar.step(1.5)
        bar.epoch(ENTRY, "accuracy")
    printed = capsys.readouterr()
    assert printed.out == "epoch 3  loss 0.2500  accuracy 0.5000\n"
    last = printed.err.rpartition("\r")[2]
    assert "7/10 [00:10<00:15," in last
    assert "epoch=3, loss=0.2500, accuracy=0.5000" in last


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
