from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from tenslora.errors import TensLoRAError
from tenslora.harness.config import settings
from tenslora.harness.results.table import Column, Row
from tenslora.harness.sweeping.jobs import ELSEWHERE, FAILURE, Job, State, carry_out, note_failure, plan_jobs
from tests.conftest import ROOT
from tests.sweeps import complete, diverge, held_elsewhere, planned, swept

STRATEGIES = ("rank_strategy=isoparameters", "rank_strategy=isorank")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank")


@pytest.fixture
def config() -> DictConfig:
    return swept("tensor_mode=qkv", "rank_strategy=isorank")[1]


def never(*_: Any) -> None:
    raise AssertionError("nothing was to be trained")


def test_what_is_the_same_run_is_one_job(tmp_path: Path) -> None:
    modes = ("lora", "qkv", "head_only", "full")
    jobs = plan_jobs([swept(f"tensor_mode={mode}", strategy) for mode in modes for strategy in STRATEGIES], tmp_path)
    assert [(job.row.tensor_mode, job.row.strategy) for job in jobs] == [
        ("lora", ""), ("qkv", "isoparameters"), ("qkv", "isorank"), ("head_only", ""), ("full", ""),
    ]  # fmt: skip
    assert len({job.folder for job in jobs}) == len({job.digest for job in jobs}) == 5
    assert all(job.folder.parts[-3:-1] == ("digits", "vit_digits") for job in jobs)
    assert all(job.folder.name.endswith(job.digest) for job in jobs)
    assert [job.overrides for job in jobs[:2]] == [
        ("tensor_mode=lora", STRATEGIES[0]),
        ("tensor_mode=qkv", STRATEGIES[0]),
    ]
    assert not list(tmp_path.iterdir())


def test_loras_rank_sets_it_apart(tmp_path: Path) -> None:
    composed = [swept("tensor_mode=lora", f"rank_strategy.rank={rank}", s) for rank in (2, 4) for s in STRATEGIES]
    jobs = plan_jobs(composed, tmp_path)
    assert [job.row.label for job in jobs] == ["lora rank_strategy.rank=2", "lora rank_strategy.rank=4"]
    assert [job.run().parameters for job in jobs] == [12 * 2 * 128, 12 * 4 * 128]


def test_whatever_else_is_swept_makes_rows_of_its_own(tmp_path: Path) -> None:
    composed = [
        swept("trainer.epochs=3", f"optimizer.lr={rate}", f"dataset={dataset}", "rank_strategy=isorank", f"seed={seed}")
        for rate in ("1e-3", "2e-3")
        for dataset in ("digits", "dtd")
        for seed in (0, 1)
    ]
    jobs = plan_jobs(composed, tmp_path)
    assert len(jobs) == 8
    variants = [("optimizer.lr=1e-3",), ("optimizer.lr=2e-3",)]
    assert list(dict.fromkeys(job.row for job in jobs)) == [Row("qkv_depth", "isorank", v) for v in variants]
    columns = [Column("digits", "vit_digits"), Column("dtd", "vit_base")]
    assert list(dict.fromkeys(job.column for job in jobs)) == columns
    assert [job.settings.seed for job in jobs] == [0, 1] * 4
    assert [job.settings.optimizer.lr for job in jobs] == [1e-3] * 4 + [2e-3] * 4
    assert jobs[5].label == "digits qkv_depth isorank optimizer.lr=2e-3 seed 1"


def test_what_does_not_make_a_run_another_one_is_not_in_its_name(tmp_path: Path) -> None:
    modes, alphas = ("qkv", "head_only"), ("adapter.alpha=1", "adapter.alpha=2")
    composed = [swept(f"tensor_mode={mode}", STRATEGIES[0], alpha) for mode in modes for alpha in alphas]
    labels = [job.row.label for job in plan_jobs(composed, tmp_path)]
    assert labels == [f"qkv isoparameters {alphas[0]}", f"qkv isoparameters {alphas[1]}", "head_only"]


@pytest.mark.parametrize(("key", "first", "second"), [("table", "digits", "isorank"), ("dry_run", "true", "false")])
def test_a_sweep_is_of_one_table(key: str, first: str, second: str, tmp_path: Path) -> None:
    composed = [swept(f"{key}={value}", f"seed={seed}") for value in (first, second) for seed in (0, 1)]
    with pytest.raises(TensLoRAError, match=f"{key}={first},{second}: one value for the whole sweep"):
        plan_jobs(composed, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("seed=-1", "seed=-1: must be at least 0"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0: must be at least 0 and at most 0.001"),
        ("rank_strategy.rank=65", "rank_strategy.rank=65: must be from 1 to 64"),
    ],
)
def test_a_setting_that_is_wrong_in_one_job_ends_it_before_the_first(wrong: str, message: str, tmp_path: Path) -> None:
    # All but the last are fine, and the last differs from them in the wrong setting alone.
    composed = [swept("rank_strategy=isorank"), swept("rank_strategy=isorank", wrong)]
    with pytest.raises(TensLoRAError, match=message):
        plan_jobs(composed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_job_is_new_begun_running_failed_or_done_as_its_folder_tells(job: Job) -> None:
    assert (job.state(), job.problem(), job.run().problem) == (State.NEW, None, "missing")
    job.folder.mkdir(parents=True)
    (job.folder / ".lock").touch()  # left by whoever has had it
    assert job.state() is State.NEW
    (job.folder / "checkpoint.safetensors").touch()
    assert job.state() is State.BEGUN
    with held_elsewhere(job.folder):
        assert job.state() is State.RUNNING
        complete(job)
        assert job.state() is State.DONE
        (job.folder / "result.json").unlink()
    assert job.state() is State.BEGUN
    note_failure(job.folder, TensLoRAError("the disk\nis full"))
    assert (job.state(), job.problem(), job.run().problem) == (State.FAILED, *["the disk is full"] * 2)
    diverge(job)
    assert (job.state(), job.problem(), job.run().problem) == (State.FAILED, *["the training loss is nan"] * 2)
    complete(job, 0.25)
    assert (job.state(), job.problem(), job.run().problem) == (State.DONE, None, "")
    assert job.run().score("last") == 0.25


def test_looking_at_a_job_does_not_take_it_nor_write_anything(job: Job, tmp_path: Path) -> None:
    job.state(), job.problem(), job.run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"schema": 1, "half', '{"schema": 99, "status": "completed"}'])
def test_a_record_that_cannot_be_read_does_not_count(content: str, job: Job) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(content)
    assert (job.state(), job.record()) == (State.NEW, None)


def test_a_record_of_other_settings_does_not_count(job: Job, config: DictConfig) -> None:
    complete(job, digest="0123456789ab")
    assert (job.state(), job.record(), job.run().problem) == (State.NEW, None, "missing")
    trained = []
    carry_out(config, job.folder, lambda _, folder: trained.append(folder))
    assert trained == [job.folder]


def test_what_the_table_shows_before_a_run_is_counted_from_the_declared_geometry(tmp_path: Path) -> None:
    # (64, 64, 3) at rank 4 for each of 4 layers; LoRA has 12 projections.
    job = planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank")
    run = job.run()
    assert (run.ranks, run.parameters, run.lora_parameters) == ((4, 4, 4), 4 * (4 * 131 + 64), 12 * 4 * 128)
    head_only = planned(tmp_path, "tensor_mode=head_only").run()
    assert (head_only.ranks, head_only.parameters) == (None, 0)
    undeclared = planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank", "model.geometry=null")
    assert (undeclared.run().ranks, undeclared.run().parameters) == (None, None)
    complete(undeclared, ranks=[3, 2, 1], adapter_parameters=7, lora_parameters=70)
    run = undeclared.run()
    assert (run.ranks, run.parameters, run.lora_parameters) == ((3, 2, 1), 7, 70)


def test_a_finished_job_is_not_carried_out_again(job: Job, config: DictConfig) -> None:
    complete(job)
    before = (job.folder / "result.json").read_bytes()
    assert carry_out(config, job.folder, never) is None
    assert (job.folder / "result.json").read_bytes() == before


def test_a_job_in_other_hands_is_left_to_them_until_they_die(job: Job, config: DictConfig) -> None:
    note_failure(job.folder, TensLoRAError("theirs"))
    with held_elsewhere(job.folder) as holder:
        assert carry_out(config, job.folder, never) == ELSEWHERE
        assert job.problem() == "theirs"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        trained = []
        assert carry_out(config, job.folder, lambda *_: trained.append(job.state())) is None
        assert trained == [State.RUNNING]


def test_who_merely_looks_at_a_job_keeps_nobody_from_it(job: Job, config: DictConfig) -> None:
    job.folder.mkdir(parents=True)
    lock = FileLock(job.folder / ".lock", thread_local=False)
    lock.acquire()
    looking = threading.Timer(0.2, lock.release)
    looking.start()
    trained = []
    assert carry_out(config, job.folder, lambda *_: trained.append(1)) is None
    looking.join()
    assert trained


def test_what_an_earlier_attempt_left_is_gone_while_the_next_one_runs(job: Job, config: DictConfig) -> None:
    diverge(job)
    note_failure(job.folder, TensLoRAError("older"))
    (job.folder / "checkpoint.safetensors").touch()

    def train(_: DictConfig, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {".lock", "checkpoint.safetensors"}
        complete(job)

    assert carry_out(config, job.folder, train) is None
    assert job.state() is State.DONE


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TensLoRAError("dataset.root=x: no such\n  folder"), "dataset.root=x: no such folder"),
        (KeyError("blocks"), "KeyError: 'blocks'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_job_that_fails_leaves_the_reason_and_the_error_goes_on(
    error: Exception, reason: str, job: Job, config: DictConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def train(*_: Any) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        carry_out(config, job.folder, train)
    assert raised.value is error
    assert json.loads((job.folder / FAILURE).read_text()) == {"error": reason}
    assert (job.state(), job.problem()) == (State.FAILED, reason)
    # Where it is no mistake of the user's, the log says where it happened.
    assert ("Traceback" in caplog.text) is not isinstance(error, TensLoRAError)


def test_a_run_that_diverged_has_said_so_in_its_record(job: Job, config: DictConfig) -> None:
    def train(*_: Any) -> None:
        diverge(job)
        raise TensLoRAError("the same, longer")

    with pytest.raises(TensLoRAError, match="the same, longer"):
        carry_out(config, job.folder, train)
    assert not (job.folder / FAILURE).exists()
    assert job.problem() == "the training loss is nan"


def test_an_interrupted_job_has_not_failed(job: Job, config: DictConfig) -> None:
    def train(_: DictConfig, folder: Path) -> None:
        (folder / "checkpoint.safetensors").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, job.folder, train)
    assert (job.state(), job.problem()) == (State.BEGUN, None)


WANDB = ("logger=wandb", "table=isorank", "dataset=digits", "tensor_mode=qkv", "rank_strategy=isorank", "seed=3")


@pytest.mark.parametrize(
    ("overrides", "group", "tags"),
    [
        (WANDB, "isorank", ["isorank", "digits", "qkv", "seed3"]),
        ((*WANDB, "logger.group=g", "logger.tags=[mine,digits]"), "g", ["mine", "digits", "isorank", "qkv", "seed3"]),
        ((*WANDB, "table=digits", "tensor_mode=head_only"), "digits", ["digits", "head_only", "seed3"]),
    ],
)
def test_a_job_resumes_and_tells_wandb_which_sweep_it_belongs_to(
    overrides: tuple[str, ...], group: str, tags: list[str], tmp_path: Path
) -> None:
    _, composed = swept(*overrides)
    before = OmegaConf.to_yaml(composed)
    given: list[DictConfig] = []
    carry_out(composed, tmp_path, lambda config, _: given.append(config))
    (job,) = given
    assert job.resume is True
    assert job.logger.group == group
    assert list(job.logger.tags) == tags
    assert OmegaConf.to_yaml(composed) == before
    assert {k: v for k, v in settings(job).items() if k not in ("logger", "resume")} == {
        k: v for k, v in settings(composed).items() if k not in ("logger", "resume")
    }


def test_without_a_logger_nothing_but_resume_is_set(config: DictConfig, tmp_path: Path) -> None:
    given: list[DictConfig] = []
    carry_out(config, tmp_path, lambda job, _: given.append(job))
    assert settings(given[0]) == {**settings(config), "resume": True}


# Whoever gets the job writes its process id into a file and holds on to the job until it is told to finish.
WORKER = """
import os, sys, time
from pathlib import Path
from omegaconf import OmegaConf
from tenslora.harness.results.record import write_record
from tenslora.harness.config import digest
from tenslora.harness.sweeping.jobs import carry_out
folder = Path(sys.argv[1])
def train(config, _):
    with open(folder / "trained", "a") as file:
        print(os.getpid(), file=file)
    while not (folder / "finish").exists():
        time.sleep(0.02)
    write_record(folder, {"status": "completed", "digest": digest(config)})
print("ready", flush=True)
sys.stdin.readline()
print(carry_out(OmegaConf.load(folder / "config.yaml"), folder, train))
"""


def test_of_processes_that_take_a_job_at_once_one_trains_it(config: DictConfig, tmp_path: Path) -> None:
    OmegaConf.save(config, tmp_path / "config.yaml")
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout and worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        deadline = time.monotonic() + 60
        while all(worker.poll() is None for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (tmp_path / "finish").touch()
        said = {worker.pid: worker.communicate(timeout=60)[0].strip() for worker in workers}
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    (trained,) = (int(line) for line in (tmp_path / "trained").read_text().split())
    assert said.pop(trained) == "None"
    assert list(said.values()) == [ELSEWHERE]
