from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tenslora.errors import TensLoRAError
from tenslora.harness.sweeping import progress as module
from tenslora.harness.sweeping.jobs import Job, note_failure
from tenslora.harness.sweeping.progress import Progress
from tests.sweeps import complete, diverge, planned


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [planned(tmp_path, "tensor_mode=lora", f"seed={seed}") for seed in range(4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the test sets it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_each_job_that_settles_with_the_time_left(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    complete(jobs[0])
    progress = Progress(jobs)
    progress._look()
    assert capsys.readouterr().out == "", "what was done before is no news"
    clock[0] += 45
    complete(jobs[2], 0.75)
    progress._look()
    # 45 seconds for one job, two are left
    assert capsys.readouterr().out == "[2/4] digits lora seed 2: accuracy 0.7500, 1:30 left\n"
    clock[0] += 5
    note_failure(jobs[1].folder, TensLoRAError("no room"))
    diverge(jobs[3])
    progress._look()
    assert capsys.readouterr().out.splitlines() == [
        "[3/4] digits lora seed 1: failed (no room), 0:25 left",
        "[4/4] digits lora seed 3: failed (the training loss is nan), 0:00 left",
    ]
    assert progress.failed == 2
    progress._look()
    assert capsys.readouterr().out == ""


def test_where_nothing_settles_a_line_tells_now_and_then_that_it_is_still_running(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(jobs)
    note_failure(jobs[0].folder, TensLoRAError("no room"))
    progress._look()
    assert capsys.readouterr().out.startswith("[1/4] digits lora seed 0: failed")
    jobs[1].folder.mkdir(parents=True)
    with FileLock(jobs[1].folder / ".lock"):
        clock[0] += module.PLAIN_LINE_SECONDS
        progress._look()
        assert capsys.readouterr().out == ""
        clock[0] += 1
        progress._look()
        assert capsys.readouterr().out == "[1/4] 1 running, 1 failed, 3:03 left\n"
        clock[0] += 1
        progress._look()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seen_running", [True, False], ids=["slowly", "at once"])
@pytest.mark.parametrize("fails", [lambda job: note_failure(job.folder, TensLoRAError("again")), diverge])
def test_an_old_failure_counts_when_the_job_has_failed_anew(
    fails: object, seen_running: bool, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(fails)
    fails(jobs[0])
    note_failure(jobs[1].folder, TensLoRAError("older"))
    time.sleep(0.02)  # the clock of some file systems is coarse
    progress = Progress(jobs)
    progress._look()
    assert (progress.failed, capsys.readouterr().out) == (0, "")
    for name in ("failure.json", "result.json"):
        (jobs[0].folder / name).unlink(missing_ok=True)
    if seen_running:
        with FileLock(jobs[0].folder / ".lock"):
            progress._look()
        assert progress.failed == 0
    fails(jobs[0])
    complete(jobs[1])
    progress._look()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/4] digits lora seed 0: failed (")
    assert second.startswith("[2/4] digits lora seed 1: accuracy 0.5000")
    assert progress.failed == 1


def test_it_watches_while_something_else_runs_and_has_the_last_word(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    with Progress(jobs) as progress:
        complete(jobs[0])
        deadline = time.monotonic() + 30
        while not progress.settled:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert capsys.readouterr().out.startswith("[1/4] digits lora seed 0: accuracy 0.5000")
        monkeypatch.setattr(module, "LOOK_SECONDS", 1000.0)
        time.sleep(0.05)  # the watch now sleeps longer than the test
        complete(jobs[1])
    assert capsys.readouterr().out.startswith("[2/4] digits lora seed 1: accuracy 0.5000")


def test_on_a_terminal_it_is_a_bar_and_the_lines_stand_above_it(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(jobs[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(jobs) as progress:
        assert progress.bar is not None
        assert (progress.bar.n, progress.bar.total) == (1, 4)
        complete(jobs[1])
        note_failure(jobs[2].folder, TensLoRAError("no room"))
    assert progress.bar.n == 3
    shown = capsys.readouterr()
    assert "[2/4] digits lora seed 1: accuracy 0.5000\n" in shown.out
    assert "0 running, 1 failed" in shown.err
