"""Which runs a sweep has, what their folders say, and what carrying one out leaves there."""

from __future__ import annotations

import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus

from tenslora.errors import TensLoRAError
from tenslora.harness.config import RunConfig
from tenslora.harness.results.table import Column, Row, Run
from tenslora.harness.sweeping.jobs import (
    ELSEWHERE,
    Composed,
    Job,
    Look,
    State,
    carry_out,
    launch_jobs,
    overwrite,
    plan_jobs,
)
from tests.sweeps import claimed, complete, diverge, planned, swept

STRATEGIES = ("rank_strategy=isoparameters", "rank_strategy=isorank")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank")


def carry(job: Job, train: Any, table: str = "digits") -> str:
    return carry_out(job.run, job.folder, table, train)


def never(*_: Any) -> None:
    raise AssertionError("nothing was to be trained")


def in_table(job: Job) -> Run:
    return job.in_table(job.look())


# Planning


def test_overrides_that_make_the_same_run_make_one_job(tmp_path: Path) -> None:
    modes = ("lora", "qkv", "head_only", "full")
    jobs = plan_jobs([swept(f"tensor_mode={mode}", strategy) for mode in modes for strategy in STRATEGIES], tmp_path)
    assert [(job.row.tensor_mode, job.row.strategy) for job in jobs] == [
        ("lora", ""), ("qkv", "isoparameters"), ("qkv", "isorank"), ("head_only", ""), ("full", ""),
    ]  # fmt: skip
    assert len({job.folder for job in jobs}) == len({job.digest for job in jobs}) == 5
    assert [job.overrides for job in jobs[:2]] == [
        ("tensor_mode=lora", STRATEGIES[0]),
        ("tensor_mode=qkv", STRATEGIES[0]),
    ]
    assert not list(tmp_path.iterdir())


def test_loras_at_different_ranks_are_different_rows(tmp_path: Path) -> None:
    runs = [swept("tensor_mode=lora", f"rank_strategy.rank={rank}", s) for rank in (2, 4) for s in STRATEGIES]
    jobs = plan_jobs(runs, tmp_path)
    assert [job.row.label for job in jobs] == ["lora rank_strategy.rank=2", "lora rank_strategy.rank=4"]
    assert [in_table(job).parameters for job in jobs] == [12 * 2 * 128, 12 * 4 * 128]


def test_a_sweep_has_one_folder(tmp_path: Path) -> None:
    runs = [swept(f"tensor_mode={mode}", "seed=0", "dataset=digits") for mode in ("lora", "full")]
    assert len(plan_jobs(runs, tmp_path, "${oc.env:HOME}/${dataset.name}/${table.name}")) == 2
    for part in ("tensor_mode", "tensor_mode.name"):
        written = f"outputs/${{{part}}}"
        line = f"hydra.sweep.dir={written}: must be one folder for the whole sweep, and tensor_mode varies"
        with pytest.raises(TensLoRAError, match=re.escape(line)):
            plan_jobs(runs, tmp_path, written)


def test_a_further_setting_that_varies_becomes_part_of_the_row(tmp_path: Path) -> None:
    runs = [
        swept("trainer.epochs=3", f"optimizer.lr={rate}", f"dataset={dataset}", "rank_strategy=isorank", f"seed={seed}")
        for rate in ("1e-3", "2e-3")
        for dataset in ("digits", "dtd")
        for seed in (0, 1)
    ]
    jobs = plan_jobs(runs, tmp_path)
    assert len(jobs) == 8
    variants = [("optimizer.lr=1e-3",), ("optimizer.lr=2e-3",)]
    assert list(dict.fromkeys(job.row for job in jobs)) == [Row("qkv_depth", "isorank", v) for v in variants]
    columns = [Column("digits", "vit_digits"), Column("dtd", "vit_base")]
    assert list(dict.fromkeys(job.column for job in jobs)) == columns
    assert [job.run.seed for job in jobs] == [0, 1] * 4
    assert [job.run.optimizer.lr for job in jobs] == [1e-3] * 4 + [2e-3] * 4
    assert jobs[5].label == "digits qkv_depth isorank optimizer.lr=2e-3 seed 1"


def test_options_of_one_name_are_rows_of_their_own(tmp_path: Path) -> None:
    def options(group: str, **values: str) -> list[Composed]:  # two of one name, as files of one's own can be, and more
        given = [(mode, *item) for mode in ("lora", "att") for item in values.items()]
        each = [swept(f"tensor_mode={mode}", "rank_strategy=isoparameters", value) for mode, _, value in given]
        chosen = [(f"tensor_mode={mode}", f"{group}={name}") for mode, name, _ in given]
        return [replace(job, words=words) for job, words in zip(each, chosen, strict=True)]

    ranks = options("rank_strategy", small="rank_strategy.rank=2", half="rank_strategy.scale=0.5")
    jobs = plan_jobs([*ranks, swept("tensor_mode=att", "rank_strategy=isorank")], tmp_path)
    assert [job.row.label for job in jobs] == [
        "lora rank_strategy=small", "lora rank_strategy=half",
        "att isoparameters rank_strategy=small", "att isoparameters rank_strategy=half", "att isorank",
    ]  # fmt: skip
    for group, first, second in (
        ("dataset", "dataset.train_size=8", "dataset.train_size=16"),
        ("model", "model.mean=[0.4]", "model.mean=[0.6]"),
    ):
        jobs = plan_jobs(options(group, one=first, two=second, cola="dataset=cola"), tmp_path)
        cells = {(job.row, job.column, job.run.seed) for job in jobs}
        assert len(cells) == len(jobs) == 6
        assert [str(job.row.variant) for job in jobs[:3]] == [f"('{group}=one',)", f"('{group}=two',)", "()"]


def test_a_setting_that_makes_no_other_runs_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert (
        len(plan_jobs([swept(f"trainer.threads={n}", f"seed={seed}") for n in (1, 2) for seed in (0, 1)], tmp_path))
        == 2
    )
    assert caplog.messages == ["trainer.threads=1,2: makes no other runs; the first value is taken"]


def test_two_of_several_values_that_make_the_same_runs_are_a_row_called_by_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modes, rates = ("lora", "att", "head_only"), ("0.01", "1e-3", "0.001", "2e-3", "0.002")
    runs = [swept(f"tensor_mode={mode}", STRATEGIES[0], f"adapter.alpha={n}") for mode in modes for n in rates]
    jobs = plan_jobs(runs, tmp_path)
    variants = [(f"adapter.alpha={rates[n]}",) for n in (0, 1, 3)]
    assert [job.row.variant for job in jobs] == [*variants, *variants, ()]
    assert caplog.messages == [
        f"adapter.alpha={same}: makes no other runs; the first value is taken" for same in ("1e-3,0.001", "2e-3,0.002")
    ]


def test_a_setting_that_varies_without_effect_is_in_no_row(tmp_path: Path) -> None:
    modes, alphas = ("qkv", "head_only"), ("adapter.alpha=1", "adapter.alpha=2")
    runs = [swept(f"tensor_mode={mode}", STRATEGIES[0], alpha) for mode in modes for alpha in alphas]
    labels = [job.row.label for job in plan_jobs(runs, tmp_path)]
    assert labels == [f"qkv isoparameters {alphas[0]}", f"qkv isoparameters {alphas[1]}", "head_only"]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("table", "digits", "isorank"),
        ("dry_run", "true", "false"),
        ("logger", "csv", "none"),
        ("resume", "true", "false"),
    ],
)
def test_a_sweep_is_of_one_table_with_the_same_loggers(key: str, first: str, second: str, tmp_path: Path) -> None:
    runs = [swept(f"{key}={value}", f"seed={seed}") for value in (first, second) for seed in (0, 1)]
    with pytest.raises(TensLoRAError, match=f"{key}={first},{second}: one value for the whole sweep"):
        plan_jobs(runs, tmp_path)


# Looking


def test_a_column_of_a_table_has_one_headline_metric(tmp_path: Path) -> None:
    text = ("dataset=cola", "model=minilm")
    both = [swept(*text, f"dataset.metrics=[{names}]") for names in ("matthews,accuracy", "accuracy")]
    with pytest.raises(
        TensLoRAError, match=r"^dataset\.metrics: must begin with one metric .* matthews and accuracy, "
    ):
        plan_jobs(both, tmp_path)
    own = ("dataset=text", "dataset.root=stars.csv", "model=minilm")
    with pytest.raises(TensLoRAError, match=r"not with that of a classification and that of a regression, because"):
        plan_jobs([swept(*own, f"dataset.task={task}") for task in ("classification", "regression")], tmp_path)
    further = [swept(*text, f"dataset.metrics=[{names}]") for names in ("matthews,accuracy", "matthews")]
    assert len(plan_jobs([*further, swept("dataset=digits")], tmp_path)) == 3


def test_the_state_of_a_job_is_what_its_folder_says(job: Job) -> None:
    assert job.look() == Look(State.NEW, None, None)
    assert not job.folder.path.exists(), "looking leaves nothing behind"
    job.folder.path.mkdir(parents=True)
    job.folder.lock.touch()  # left by whoever held it last
    assert job.look() == Look(State.NEW, None, None)
    job.folder.checkpoint.touch()
    assert job.look() == Look(State.BEGUN, None, None)
    with claimed(job.folder):
        assert job.look() == Look(State.RUNNING, None, None)
        complete(job)
        assert job.look().state is State.DONE
        job.folder.result.unlink()
    assert job.look() == Look(State.BEGUN, None, None)
    job.folder.write_failure(TensLoRAError("the disk is full"))
    assert job.look() == Look(State.FAILED, None, "the disk is full")
    diverge(job)
    assert (job.look().state, job.look().problem) == (State.FAILED, "the training loss is nan")
    complete(job, 0.25)
    assert (job.look().state, job.look().problem) == (State.DONE, None)


def test_a_job_in_a_table_has_its_score_or_the_reason_why_there_is_none(job: Job) -> None:
    assert in_table(job).problem == "missing"
    job.folder.write_failure(TensLoRAError("the disk is full"))
    assert in_table(job).problem == "the disk is full"
    diverge(job)
    assert in_table(job).problem == "the training loss is nan"
    complete(job, 0.25)
    assert (in_table(job).problem, in_table(job).score("last")) == ("", 0.25)


@pytest.mark.parametrize("content", ['{"schema": 1, "half', '{"schema": 99, "status": "completed"}'])
def test_a_record_that_cannot_be_read_does_not_count(content: str, job: Job) -> None:
    job.folder.path.mkdir(parents=True)
    job.folder.result.write_text(content)
    look = job.look()
    assert (look.state, look.record) == (State.FAILED, None)
    assert str(look.problem).startswith(f"{job.folder.result}: not a readable record (")


def test_a_record_of_other_settings_does_not_count(job: Job, tmp_path: Path) -> None:
    complete(planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank", "seed=7"))
    shutil.copytree(next(tmp_path.rglob("*-seed7-*")), job.folder.path)
    look = job.look()
    assert (look.state, look.record) == (State.FAILED, None)
    assert f"{job.folder.result}: is of a run with other settings (its digest is" in str(look.problem)
    carry(job, lambda *_: complete(job))
    assert job.look().state is State.DONE


def test_sizes_are_counted_from_the_declared_geometry_before_there_is_a_record(tmp_path: Path) -> None:
    # (64, 64, 3) at rank 4 for each of 4 layers; LoRA has 12 projections.
    run = in_table(planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank"))
    assert (run.ranks, run.parameters, run.lora_parameters) == (((4, 4, 4),), 4 * (4 * 131 + 64), 12 * 4 * 128)
    head_only = in_table(planned(tmp_path, "tensor_mode=head_only"))
    assert (head_only.ranks, head_only.parameters) == (None, 0)
    undeclared = planned(tmp_path, "tensor_mode=qkv", "rank_strategy=isorank", "model.geometry=null")
    assert (in_table(undeclared).ranks, in_table(undeclared).parameters) == (None, None)
    complete(undeclared, ranks=[3, 2, 1], adapter_parameters=7, lora_parameters=70)
    run = in_table(undeclared)
    assert (run.ranks, run.parameters, run.lora_parameters) == (((3, 2, 1),), 7, 70)


# Carrying out


def test_a_finished_job_is_not_carried_out_again(job: Job) -> None:
    complete(job)
    before = job.folder.result.read_bytes()
    assert carry(job, never) == job.digest
    assert job.folder.result.read_bytes() == before


def test_a_claimed_job_is_left_alone(job: Job) -> None:
    job.folder.write_failure(TensLoRAError("theirs"))
    with claimed(job.folder):
        assert carry(job, never) == ELSEWHERE
    assert job.look().problem == "theirs"


def test_a_job_that_carries_out_another_run_has_failed(job: Job, tmp_path: Path) -> None:
    other = planned(tmp_path, "tensor_mode=lora")

    def launch(overrides: Any) -> list[JobReturn]:
        complete(other)  # as where conf/ was edited since the sweep was planned
        ends = [JobReturn(status=JobStatus.COMPLETED) for _ in overrides]
        for end in ends:
            end.return_value = other.digest
        return ends

    launch_jobs([job, other], launch)
    assert (job.look().state, other.look().state) == (State.FAILED, State.DONE)
    assert job.look().problem == (
        "carried out another run: its settings are others than when the sweep began, as after an edit in conf/ or with "
        "${now:...}"
    )


def test_a_job_that_is_carried_out_twice_at_once_is_trained_once(job: Job) -> None:
    trained: list[State] = []
    said: list[str] = []

    def train(*_: Any) -> None:
        trained.append(job.look().state)
        while not said:  # the other one has to have given up
            time.sleep(0.01)
        complete(job)

    threads = [threading.Thread(target=lambda: said.append(carry(job, train))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trained == [State.RUNNING]
    assert said == [ELSEWHERE, job.digest]


def test_overwritten_jobs_are_new_but_those_of_another_process_are_left_alone(tmp_path: Path) -> None:
    done, running, new = (planned(tmp_path, f"seed={seed}") for seed in range(3))
    for job in (done, running):
        complete(job)
        job.folder.checkpoint.touch()
    with claimed(running.folder):
        overwrite([done, running, new], dry_run=True)
        assert done.look().state is State.DONE
        overwrite([done, running, new])
    assert (done.look().state, running.look().state) == (State.NEW, State.DONE)
    assert not new.folder.path.exists()
    with pytest.raises(TensLoRAError, match="overwrite=true: must be false with collect_only=true"):
        overwrite([running], collect_only=True)
    with pytest.raises(TensLoRAError, match="overwrite=true: must be false with resume=true"):
        overwrite([planned(tmp_path, "seed=1", "resume=true")], dry_run=True)
    assert running.look().state is State.DONE


def test_a_new_attempt_begins_with_nothing_but_the_checkpoint(job: Job) -> None:
    diverge(job)
    job.folder.write_failure(TensLoRAError("older"))
    job.folder.checkpoint.touch()

    def train(_: RunConfig, path: Path) -> None:
        assert {file.name for file in path.iterdir()} == {".lock", "checkpoint.safetensors"}
        complete(job)

    assert carry(job, train) == job.digest
    assert job.look().state is State.DONE


@pytest.mark.parametrize("error", [TensLoRAError("dataset.root=x: no such folder"), KeyError("blocks")])
def test_a_job_that_fails_leaves_the_reason_and_raises_the_error(error: Exception, job: Job) -> None:
    def train(*_: Any) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        carry(job, train)
    assert raised.value is error
    assert job.look().state is State.FAILED
    assert str(error) in str(job.look().problem)


def test_a_job_whose_record_is_gone_has_failed(job: Job) -> None:
    with pytest.raises(TensLoRAError, match=r"result\.json: is not there, although the run has ended"):
        carry(job, lambda *_: None)
    assert job.look().state is State.FAILED


def test_a_diverged_run_leaves_no_failure_beside_its_record(job: Job) -> None:
    def train(*_: Any) -> None:
        diverge(job)
        raise TensLoRAError("the same, longer")

    with pytest.raises(TensLoRAError, match="the same, longer"):
        carry(job, train)
    assert not job.folder.failure.exists()
    assert job.look().problem == "the training loss is nan"


def test_an_interrupted_job_has_not_failed(job: Job) -> None:
    def train(*_: Any) -> None:
        job.folder.checkpoint.touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry(job, train)
    assert job.look() == Look(State.BEGUN, None, None)


WANDB = ("logger=wandb", "dataset=digits", "tensor_mode=qkv", "rank_strategy=isorank", "seed=3")


@pytest.mark.parametrize(
    ("overrides", "group", "tags"),
    [
        (WANDB, "sample", ("sample", "digits", "qkv", "isorank", "seed3")),
        (
            (*WANDB, "logger.group=g", "logger.tags=[mine,digits]"),
            "g",
            ("mine", "digits", "sample", "qkv", "isorank", "seed3"),
        ),
        ((*WANDB, "tensor_mode=head_only"), "sample", ("sample", "digits", "head_only", "seed3")),
    ],
)
def test_a_job_resumes_and_tells_wandb_which_sweep_it_belongs_to(
    overrides: tuple[str, ...], group: str, tags: tuple[str, ...], tmp_path: Path
) -> None:
    job = planned(tmp_path, *overrides)
    given: list[RunConfig] = []

    def train(run: RunConfig, _: Path) -> None:
        given.append(run)
        complete(job)

    carry(job, train, table="sample")
    logger = replace(job.run.logger, group=group, tags=tags)
    assert given == [replace(job.run, resume=True, logger=logger)]


def test_without_a_logger_nothing_but_resume_is_set(job: Job) -> None:
    given: list[RunConfig] = []

    def train(run: RunConfig, _: Path) -> None:
        given.append(run)
        complete(job)

    carry(job, train)
    assert given == [replace(job.run, resume=True)]
