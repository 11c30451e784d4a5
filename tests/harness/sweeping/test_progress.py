"""What a sweep shows while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.sweeping import progress as module
from tenslora.harness.sweeping.jobs import Job, Look
from tenslora.harness.sweeping.progress import Progress
from tests.sweeps import claimed, complete, diverge, planned


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [planned(tmp_path, "tensor_mode=lora", f"seed={seed}") for seed in range(4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the test sets it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def fail(job: Job) -> None:
    job.folder.write_failure(TensLoRAError("no room"))


def progress_of(jobs: list[Job]) -> Progress:
    return Progress(jobs, {job: job.look() for job in jobs})


def test_each_job_that_ends_is_a_line_with_the_time_left(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    complete(jobs[0])
    progress = progress_of(jobs)
    progress.update()
    assert capsys.readouterr().out == "", "it was done before"
    clock[0] += 45
    complete(jobs[2], 0.75)
    progress.update()
    # 45 seconds for one job, two are left
    assert capsys.readouterr().out == "[2/4] digits lora seed 2: accuracy 0.7500, 1:30 left\n"
    clock[0] += 5
    fail(jobs[1])
    diverge(jobs[3])
    progress.update()
    assert capsys.readouterr().out.splitlines() == [
        "[3/4] digits lora seed 1: failed (no room), 0:25 left",
        "[4/4] digits lora seed 3: failed (the training loss is nan), 0:00 left",
    ]
    assert progress.failed == 2
    progress.update()
    assert capsys.readouterr().out == ""


def test_while_no_job_ends_a_line_says_now_and_then_how_many_are_running(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = progress_of(jobs)
    fail(jobs[0])
    progress.update()
    assert capsys.readouterr().out.startswith("[1/4] digits lora seed 0: failed")
    with claimed(jobs[1].folder):
        clock[0] += module.PLAIN_LINE_SECONDS
        progress.update()
        assert capsys.readouterr().out == ""
        clock[0] += 1
        progress.update()
        assert capsys.readouterr().out == "[1/4] 1 running, 1 failed, 3:03 left\n"
        clock[0] += 1
        progress.update()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seen_running", [True, False])
@pytest.mark.parametrize("fail_in_its_way", [fail, diverge])
def test_a_job_that_failed_before_counts_when_it_has_failed_anew(
    fail_in_its_way: Callable[[Job], None], seen_running: bool, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    fail_in_its_way(jobs[0])
    fail(jobs[1])
    time.sleep(0.02)  # the clock of some file systems is coarse
    progress = progress_of(jobs)
    progress.update()
    assert (progress.failed, capsys.readouterr().out) == (0, "")
    jobs[0].folder.begin_anew()
    if seen_running:
        with claimed(jobs[0].folder):
            progress.update()
        assert progress.failed == 0
    fail_in_its_way(jobs[0])
    complete(jobs[1])
    progress.update()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/4] digits lora seed 0: failed (")
    assert second.startswith("[2/4] digits lora seed 1: accuracy 0.5000")
    assert progress.failed == 1


def test_it_watches_in_the_background_and_looks_once_more_at_the_end(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    with progress_of(jobs) as progress:
        complete(jobs[0])
        deadline = time.monotonic() + 30
        while not progress.settled:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert capsys.readouterr().out.startswith("[1/4] digits lora seed 0: accuracy 0.5000")
        monkeypatch.setattr(module, "LOOK_SECONDS", 1000.0)
        time.sleep(0.05)  # from here on it sleeps longer than the test takes
        complete(jobs[1])
    assert capsys.readouterr().out.startswith("[2/4] digits lora seed 1: accuracy 0.5000")


def test_a_report_is_written_when_something_is_new_but_only_now_and_then(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    fail(jobs[3])
    reports: list[tuple[list[str], bool]] = []

    def report(looks: Mapping[Job, Look], goes_on: bool) -> None:
        reports.append(([looks[job].state.value for job in jobs], goes_on))
        clock[0] += 1

    progress = Progress(jobs, {job: job.look() for job in jobs}, report)

    def states_after(seconds: float) -> list[str] | None:
        before = len(reports)
        clock[0] += seconds
        progress.update()
        progress.report_if_due()
        return reports[-1][0] if len(reports) > before else None

    assert states_after(0) == ["to run"] * 4, "a job that failed before is about to run again"
    # Writing took a second, which may be a twentieth of the time.
    complete(jobs[0])
    assert states_after(module.REPORT_SECONDS) is None
    assert states_after(1 / module.REPORT_SHARE) == ["done", "to run", "to run", "to run"]
    assert states_after(1 / module.REPORT_SHARE) is None, "nothing is new"
    assert states_after(module.IDLE_REPORT_SECONDS) is not None
    with claimed(jobs[1].folder):
        assert states_after(60) == ["done", "running", "to run", "to run"]
    assert all(goes_on for _, goes_on in reports)
    assert "report" not in capsys.readouterr().out


def test_a_sweep_that_breaks_off_leaves_a_report_that_says_so(jobs: list[Job]) -> None:
    ends: list[bool] = []
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(jobs, {job: job.look() for job in jobs}, lambda _, on: ends.append(on)),
    ):
        raise KeyboardInterrupt
    assert ends[-1] is False
    with Progress(jobs, {job: job.look() for job in jobs}, lambda _, on: ends.append(on)):
        ends.clear()
    assert False not in ends, "the results are written next"


def test_a_report_that_cannot_be_written_is_said_once_and_ends_nothing(
    jobs: list[Job], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*_: object) -> None:
        raise TensLoRAError("report.html: cannot be written (No space left on device)")

    progress = Progress(jobs, {job: job.look() for job in jobs}, report)
    for _ in range(3):
        clock[0] += 100
        progress.report_if_due()
    assert capsys.readouterr().out == "no new report: report.html: cannot be written (No space left on device)\n"


def test_on_a_terminal_there_is_a_bar_with_the_lines_above_it(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(jobs[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_of(jobs) as progress:
        assert progress.bar is not None
        assert (progress.bar.n, progress.bar.total) == (1, 4)
        complete(jobs[1])
        fail(jobs[2])
    assert progress.bar.n == 3
    shown = capsys.readouterr()
    assert "[2/4] digits lora seed 1: accuracy 0.5000\n" in shown.out
    assert "0 running, 1 failed" in shown.err
