"""The sweeper's batches, and what the launchers do when jobs vanish, on a Slurm made of shell scripts."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import submitit
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from submitit.core.utils import DelayedSubmission, cloudpickle_dump

from tenslora.errors import TensLoRAError
from tests.conftest import ROOT
from tests.running import composed

PLUGIN = "hydra_plugins.tenslora_sweeps"
SCRIPTS = Path(__file__).parent / "slurm"


class FakeSlurm:
    """The scripts of tests/harness/slurm in front of any real commands, and a launcher that uses them."""

    def __init__(self, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.sweep = tmp_path / "slurm", tmp_path / "sweep"
        self.results = self.sweep / ".submitit" / "all"
        self.bin = self.folder / "bin"
        for folder in (self.bin, self.folder / "queue"):
            folder.mkdir(parents=True)
        for name in ("sbatch", "squeue", "scontrol"):
            (self.bin / name).symlink_to(SCRIPTS / name)
        for name in ("srun", "sacct", "scancel"):
            (self.bin / name).symlink_to(SCRIPTS / "forbidden")
        patch.setenv("PATH", str(self.bin), prepend=os.pathsep)
        patch.setenv("FAKE_SLURM", str(self.folder))
        patch.setenv("FAKE_SLURM_RESULTS", str(self.results))
        self.patch = patch
        self.naps = 0
        self.sleep: Callable[[float], None] = self.nap

    def nap(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.naps += 1
        assert self.naps < 300, "the launcher waits for ever"
        sleep(seconds)

    def launch(self, jobs: int, *overrides: str) -> Sequence[JobReturn]:
        """Launch jobs as conf/hydra/launcher/slurm.yaml has it."""
        words = ["hydra/launcher=slurm", f"hydra.sweep.dir={self.sweep}", *overrides]
        config = composed(*words, config_name="sweep", with_hydra=True).hydra.launcher
        plugin: Any = importlib.import_module(PLUGIN)  # not above: composing makes Hydra import its plugins anew
        self.patch.setattr(plugin, "LOOK_SECONDS", 0.01)
        self.patch.setattr(plugin.time, "sleep", self.sleep)
        assert plugin.PATIENT[config._target_] is plugin.PatientSlurmLauncher
        # One folder for all jobs, so that squeue can put results there.
        params = {**config, "submitit_folder": str(self.results)}
        del params["_target_"]
        returned: Sequence[JobReturn] = plugin.PatientSlurmLauncher(**params).launch(
            [[f"seed={number}"] for number in range(jobs)], initial_job_idx=0
        )
        return returned

    def answers(self, *queued: str) -> None:
        """Let squeue answer these lists of jobs, one after the other; "!" is a failure, job:reason a pending job."""
        for number, answer in enumerate(queued, start=1):
            jobs = (job.partition(":") for job in answer.split())
            lines = (f"{job}|PENDING|{why}" if why else f"{job}|RUNNING|None" for job, _, why in jobs)
            (self.folder / "queue" / str(number)).write_text("\n".join([*lines, ""]))

    def arrives(self, number: int, job: str, outcome: tuple[str, Any]) -> None:
        """Let a job's result appear just before squeue's answer of this number."""
        folder = self.folder / "arriving" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        cloudpickle_dump(outcome, folder / f"{job}_0_result.pkl")

    @property
    def asked(self) -> int:
        """How often squeue was asked."""
        return int((self.folder / "asked").read_text())


def table_sweeper(most: int | None, batches: list[list[list[str]]], patch: pytest.MonkeyPatch) -> Any:
    """A sweeper of the values of `x` whose launcher notes what it is given."""

    class Launcher:
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            assert initial_job_idx == sum(map(len, batches))
            batches.append(job_overrides)
            return [completed(words[0]) for words in job_overrides]

    def run_all(_: Any, jobs: Sequence[Any], launch: Callable[..., Sequence[JobReturn]]) -> None:
        returned = launch(jobs)
        assert [outcome.return_value for outcome in returned] == [words[0] for words in jobs]

    plugin: Any = importlib.import_module(PLUGIN)
    patch.setattr(plugin, "Composer", lambda *_: SimpleNamespace(composed=lambda words: words))
    sweeper = plugin.TableSweeper(most)
    sweeper.hydra_context, sweeper.config = SimpleNamespace(config_loader=None), OmegaConf.create()
    sweeper.launcher, sweeper.task = Launcher(), SimpleNamespace(sweep=run_all)
    return sweeper


@pytest.mark.parametrize(("most", "sizes"), [(None, [5]), (5, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_the_launcher_gets_at_most_so_many_jobs_at_once(
    most: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[list[str]]] = []
    table_sweeper(most, batches, monkeypatch).sweep(["x=0,1,2,3,4"])
    assert [len(batch) for batch in batches] == sizes
    assert [job for batch in batches for job in batch] == [[f"x={number}"] for number in range(5)]


def test_only_a_launcher_whose_worker_was_lost_goes_on_with_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "abc")
    for error, message in (
        (ValueError("invalid literal: 'abc'"), r"LOKY_MAX_CPU_COUNT=abc: broke off \(invalid literal: 'abc'\)"),
        (ValueError("no such backend"), r"hydra\.launcher: broke off \(no such backend\)"),
        (BrokenExecutor("killed"), r"hydra\.launcher: broke off \(killed\); the same command goes on"),
    ):
        sweeper = table_sweeper(None, [], monkeypatch)
        sweeper.launcher.launch = Mock(side_effect=error)
        with pytest.raises(TensLoRAError, match=f"^{message}$"):
            sweeper.sweep(["x=0,1"])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


def completed(value: str) -> JobReturn:
    done = JobReturn(overrides=[value], status=JobStatus.COMPLETED)
    done.return_value = value
    return done


def test_a_job_that_vanishes_has_failed_and_the_others_are_waited_for(slurm: FakeSlurm, capfd: Any) -> None:
    slurm.answers("!", "7_0 7_1 7_2 7_3", "!", "7_2 7_3", "7_3", "!", "7_3", "")
    slurm.arrives(4, "7_0", ("success", completed("first")))
    slurm.arrives(5, "7_2", ("error", "Traceback: it burnt"))
    slurm.arrives(8, "7_3", ("success", completed("last")))
    overrides = ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2"]
    first, vanished, burnt, last = slurm.launch(4, *overrides)
    assert slurm.asked == 8
    assert (first.return_value, last.return_value) == ("first", "last")
    assert (vanished.status, burnt.status) == (JobStatus.FAILED, JobStatus.FAILED)
    error = slurm.results / "7_1_0_log.err"
    assert isinstance(vanished._return_value, TensLoRAError)
    assert str(vanished._return_value) == f"Slurm job 7_1 is out_of_memory without a result; see {error}"
    assert "it burnt" in str(burnt._return_value)
    assert capfd.readouterr().out == "submitted 4 jobs to slurm: 7\n"
    assert not (slurm.folder / "forbidden").exists(), "neither sacct nor scancel"
    assert (slurm.folder / "squeue-arguments").read_text().split()[:2] == ["--noheader", "--array"]

    lines = (slurm.folder / "submitted.sh").read_text().splitlines()
    wanted = {"array=0-3%4", "partition=gpu", "gpus-per-node=2", "time=240", "mem=12GB", "cpus-per-task=2"}
    assert {f"#SBATCH --{setting}" for setting in (*wanted, "signal=USR2@120")} <= set(lines)
    submitted = DelayedSubmission.load(slurm.results / "7_0_submitted.pkl")
    assert submitted._timeout_countdown == 20, "how often it may run out of time and is requeued"


def test_a_job_that_slurm_has_forgotten_is_gone(slurm: FakeSlurm) -> None:
    slurm.answers("7_1", "")
    (slurm.folder / "queue" / "1").write_text("NOTICE: maintenance on Monday\n7_1|RUNNING|None\n")
    slurm.arrives(2, "7_1", ("success", completed("there")))
    gone, there = slurm.launch(2)
    assert "Slurm job 7_0 is gone without a result" in str(gone._return_value)
    assert there.return_value == "there"


def test_a_sweep_says_why_its_jobs_wait_and_at_once_what_will_not_change(slurm: FakeSlurm, capfd: Any) -> None:
    reason = "ReqNodeNotAvail,UnavailableNodes:a1"
    slurm.answers(
        "7_0:None 7_1:None 7_2:None", "7_0 7_1:Priority 7_2:Priority", "7_0 7_2:Priority", "!",
        f"7_0:{reason} 7_2:PartitionTimeLimit", f"7_0:{reason} 7_2:PartitionTimeLimit", "",
    )  # fmt: skip
    for job in ("7_0", "7_1", "7_2"):
        slurm.arrives(7, job, ("success", completed(job)))
    slurm.launch(3)
    assert capfd.readouterr().out.splitlines() == [
        "submitted 3 jobs to slurm: 7",
        "pending in Slurm's queue: 3 None (not yet considered)",
        "pending in Slurm's queue: 2 Priority",
        f"pending in Slurm's queue: 1 {reason}, 1 PartitionTimeLimit",
        "PartitionTimeLimit does not clear by itself; see hydra.launcher.timeout_min; Ctrl-C and scancel end the wait",
    ]


# From https://slurm.schedmd.com/job_reason_codes.html
CLEARS = (
    "AssocGrpGRES AssocGrpCPUMinutesLimit AssocMaxJobsLimit BeginTime Dependency JobArrayTaskLimit Licenses None "
    "MaxCpuPerAccount NodeDown PartitionDown PartitionInactive Priority QOSGrpCpuLimit QOSMaxCpuPerUserLimit "
    "QOSMaxJobsPerUserLimit QOSMaxGRESPerUser Resources Reservation SystemFailure"
)
NEVER_CLEARS = {
    "AccountNotAllowed": "account",
    "AssocMaxMemPerJob": "mem_gb",
    "AssocMaxWallDurationPerJobLimit": "timeout_min",
    "BadConstraints": "partition",
    "InvalidQOS": "qos",
    "MaxMemPerLimit": "mem_gb",
    "PartitionConfig": "cpus_per_task",
    "PartitionNodeLimit": "partition",
    "PartitionTimeLimit": "timeout_min",
    "QOSMaxCpuMinutesPerJobLimit": "timeout_min",
    "QOSMaxCpuPerJobLimit": "cpus_per_task",
    "QOSMaxGRESPerJob": "gpus_per_node",
    "QOSMaxMemoryPerNode": "mem_gb",
    "QOSMaxWallDurationPerJobLimit": "timeout_min",
    "QOSMinCpuNotSatisfied": "cpus_per_task",
    "QOSMinGRES": "gpus_per_node",
    "QOSNotAllowed": "qos",
    "JobHeldUser": "scontrol release",
    "DependencyNeverSatisfied": "",
}


def test_slurms_reasons_are_told_apart() -> None:
    plugin: Any = importlib.import_module(PLUGIN)
    assert not any(map(plugin.is_permanent, [*CLEARS.split(), "ReqNodeNotAvail, May be reserved for other job"]))
    for reason, setting in NEVER_CLEARS.items():
        assert plugin.is_permanent(reason)
        assert setting in plugin.settings_for(reason)


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        ("Invalid generic resource (gres) specification", "; hydra.launcher.gpus_per_node=0 asks for no GPU"),
        ("invalid partition specified: nowhere", "; see hydra.launcher.partition"),
        ("Memory specification can not be satisfied", "; see hydra.launcher.mem_gb"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "; see hydra.launcher.timeout_min"),
        ("Requested node configuration is not available", "; see hydra.launcher.cpus_per_task, mem_gb"),
        ("Slurm controller not responding", ""),
    ],
)
def test_a_refusal_is_one_line_with_the_setting_that_mends_it(
    slurm: FakeSlurm, refusal: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm.folder / "refused").write_text(refusal)
    with pytest.raises(TensLoRAError) as refused:
        slurm.launch(1, "hydra.launcher.partition=nowhere")
    line = str(refused.value)
    assert refusal not in capsys.readouterr().err
    assert line.startswith("hydra/launcher: slurm takes no jobs (") and refusal in line
    assert line.rpartition(")")[2].startswith(advice) and bool(advice) == (not line.endswith(")"))


def test_a_single_job_is_no_array(slurm: FakeSlurm) -> None:
    slurm.answers("7", "")
    slurm.arrives(2, "7", ("success", completed("alone")))
    (alone,) = slurm.launch(1)
    assert alone.return_value == "alone"
    assert slurm.asked == 2


def test_a_result_may_appear_after_the_job_has_left_the_queue(slurm: FakeSlurm) -> None:
    slurm.answers("")
    slept = []

    def sleep(_: float) -> None:
        slept.append(1)
        if len(slept) == 3:
            cloudpickle_dump(("success", completed("late")), slurm.results / "7_0_result.pkl")

    slurm.sleep = sleep
    (late,) = slurm.launch(1)
    assert late.return_value == "late"


def test_a_machine_without_slurm_is_one_line(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TensLoRAError, match="hydra/launcher: slurm takes no jobs"):
        slurm.launch(1)


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_missing_command_of_slurms_is_one_line(slurm: FakeSlurm, command: str) -> None:
    slurm.answers("")
    (slurm.bin / command).unlink()
    for tool in ("sh", "mv", "cp", "cat", "ls", "sort", "tail", "grep"):  # but no Slurm that this machine may have
        (slurm.bin / tool).symlink_to(str(shutil.which(tool)))
    slurm.patch.setenv("PATH", str(slurm.bin))
    with pytest.raises(TensLoRAError, match=f"hydra/launcher: {command} cannot be run"):
        slurm.launch(2)


def test_an_interrupt_names_the_jobs_that_go_on(slurm: FakeSlurm, capfd: Any) -> None:
    slurm.answers("7_0 7_1")

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    slurm.sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        slurm.launch(2)
    assert capfd.readouterr().out.splitlines()[-1] == "submitted jobs go on: 7"
    assert not (slurm.folder / "forbidden").exists()


def test_a_killed_process_leaves_the_other_jobs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin: Any = importlib.import_module(PLUGIN)

    def carry_out(_: Any, sweep_overrides: list[str], *__: Any) -> JobReturn:
        if sweep_overrides == ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        done = JobReturn(status=JobStatus.COMPLETED)
        done.return_value = sweep_overrides[0]
        return done

    dying = type("Dying", (plugin.PatientLocalLauncher,), {"__call__": carry_out})
    monkeypatch.setattr(plugin, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    killed, alive = dying(submitit_folder=str(tmp_path / "%j"), timeout_min=1).launch([["die"], ["live"]], 0)
    assert killed.status is JobStatus.FAILED
    assert alive.return_value == "live"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "null"),
        ("0,1", "0,1"),
        ([None, "a,b", 1], "[null,'a,b',1]"),
        ({"core": 0.1}, "{core:0.1}"),
        (True, "True"),
    ],
)
def test_a_value_of_a_tables_file_is_what_it_is_on_the_command_line(value: Any, word: str) -> None:
    assert importlib.import_module("hydra_plugins.tenslora_sweeps").as_word(value) == word
    [override] = OverridesParser.create().parse_overrides([f"x={word}"])
    if not override.is_sweep_override():
        assert override.value() == value
