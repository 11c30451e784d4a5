"""The jobs of a sweep: their settings, the state of their folders, and how one of them is carried out."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from tenslora.errors import TensLoRAError
from tenslora.harness.config import SWEEP_KEYS, RunConfig, validate
from tenslora.harness.config.checks import shown
from tenslora.harness.results.table import Column, Row, Run
from tenslora.harness.run_folder import RunFolder, UnusableCheckpoint
from tenslora.harness.stages import adapter_parameters, lora_parameters, relative_first_step_of, stages_in_file
from tenslora.harness.tracking.tracker import LONGEST_TAG

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

log = logging.getLogger(__name__)

ELSEWHERE = "carried out elsewhere"
"""What `carry_out` returns for a job that another process is carrying out."""

_SHOWN: dict[str, Callable[[RunConfig], str]] = {
    "dataset": lambda run: run.dataset.name,
    "model": lambda run: run.model.name,
    "model.architecture": lambda run: run.model.name,
    "model.checkpoint": lambda run: run.model.name,
    "tensor_mode": lambda run: run.tensor_mode,
    "rank_strategy": lambda run: run.row_strategy,
}
"""The name under which a table shows the value of a setting."""


class State(Enum):
    """How far a job has come."""

    NEW = "to run"
    BEGUN = "begun"
    RUNNING = "running"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True)
class Look:
    """The state of a job's folder at one moment.

    Args:
        state: how far the job has come.
        record: the run's record; None if there is no readable record with the run's digest.
        problem: the reason why the last attempt left no score, or what is wrong with the record; None if it did not
            fail.
    """

    state: State
    record: dict[str, Any] | None
    problem: str | None


@dataclass(frozen=True)
class Composed:
    """What the overrides of a job make.

    Args:
        words: the overrides.
        run: the settings.
        compose: gives the config that Hydra composes from the overrides; its seed is any of the sweep's.
    """

    words: tuple[str, ...]
    run: RunConfig
    compose: Callable[[], DictConfig]


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a table.

    Args:
        overrides: the overrides that the launcher gives the run.
        run: the run's settings.
        row: the run's row in the table.
        column: the run's column in the table.
        digest: the digest of the run's settings.
        folder: the run's folder.
        compose: gives the config that Hydra composes from the overrides; its seed is any of the sweep's.
    """

    overrides: tuple[str, ...]
    run: RunConfig
    row: Row
    column: Column
    digest: str
    folder: RunFolder
    compose: Callable[[], DictConfig]

    @property
    def composed(self) -> DictConfig:
        """The config that Hydra composes from the overrides; its seed is any of the sweep's."""
        return self.compose()

    @property
    def label(self) -> str:
        """The job in a few words, for people."""
        return f"{self.column.dataset} {self.row.label} seed {self.run.seed}"

    def changed(self, settings: Mapping[str, Any], seeds: Iterable[int]) -> list[Job]:
        """The same job with other settings, once for each seed, in the same row and column of the table.

        Args:
            settings: the settings to change and their values: numbers, texts, truth values, None, or lists of these.
            seeds: the seeds.

        Returns:
            The jobs.

        Raises:
            TensLoRAError: for a value that is not valid.
        """
        # Without Hydra's own settings, which would take most of the time to copy.
        own = self.composed
        composed = DictConfig({name: own._get_node(name) for name in own if name != "hydra"})
        for setting, value in settings.items():
            OmegaConf.update(composed, setting, value)
        run = validate(composed)
        kept = [word for word in self.overrides if word.partition("=")[0] not in {*settings, "seed"}]
        words = [f"{setting}={shown(value).replace(', ', ',')}" for setting, value in settings.items()]
        outputs = self.folder.path.parents[len(Path(self.run.folder()).parts) - 1]
        jobs = []
        for seed in seeds:
            seeded = run.with_seed(seed)
            jobs.append(
                replace(
                    self,
                    overrides=(*kept, *words, f"seed={seed}"),
                    run=seeded,
                    digest=seeded.digest(),
                    folder=RunFolder(outputs / seeded.folder()),
                    compose=lambda: composed,
                )
            )
        return jobs

    def look(self) -> Look:
        """Read the job's folder."""
        record, problem = None, self.folder.read_failure()
        try:
            record = self.folder.record_of(self.digest)
        except TensLoRAError as error:
            problem = str(error)
        if record is not None:
            if record["status"] == "completed":
                return Look(State.DONE, record, None)
            problem = str(record["failure"]["message"])
        if self.folder.is_claimed():
            return Look(State.RUNNING, record, problem)
        if problem is not None:
            return Look(State.FAILED, record, problem)
        return Look(State.BEGUN if self.folder.checkpoint.is_file() else State.NEW, record, None)

    def in_table(self, look: Look) -> Run:
        """The job as the table shows it.

        Args:
            look: the state of the job's folder.

        Returns:
            The run of the table.
        """
        run, record = self.run, look.record
        ranks = parameters = lora = step = None
        if geometries := run.geometries:
            lora = lora_parameters(geometries, run.rank_strategy.rank)
            if run.adapter:
                chosen = run.tensor_mode, run.adapter.factorization
                ranks = tuple(run.rank_strategy.resolve(chosen[0], each, chosen[1]) for each in geometries)
                parameters = adapter_parameters(run.adapter, geometries, ranks)
                step = relative_first_step_of(run.adapter, geometries, tuple(map(run.start_ranks, geometries)))
        elif record:
            ranks = record["ranks"] and tuple(map(tuple, stages_in_file(record["ranks"])))
            parameters, lora = record["adapter_parameters"], record["lora_parameters"]
        if run.tensor_mode == "head_only":
            parameters = 0
        without_record = "running" if look.state is State.RUNNING else "missing"
        problem = look.problem or ("" if record else without_record)
        return Run(
            self.row, self.column, run.seed, self.digest, ranks, parameters, lora, record, problem,
            self.folder.path, step,
        )  # fmt: skip


def plan_jobs(composed: Sequence[Composed], outputs: Path, written: str = "") -> list[Job]:
    """The jobs of a sweep, in the order in which they are given, each run once.

    Overrides that give the same run, such as those of LoRA under both strategies, are one job. Dataset and model are
    the column; construction and strategy are the row. Any other setting that varies becomes part of the row, unless it
    does not change the run. So does an option whose name another one has too.

    Args:
        composed: what each job's overrides make.
        outputs: the folder of all runs.
        written: how that folder is written in the settings, perhaps with references to other settings.

    Returns:
        The jobs.

    Raises:
        TensLoRAError: if a setting of the whole sweep or its folder has several values, or the headline metric of a
            column.
    """
    values: dict[str, dict[str, None]] = {}
    for each in composed:
        for key, _, value in (word.partition("=") for word in each.words):
            values.setdefault(key, {})[value] = None
    varied = [key for key, given in values.items() if len(given) > 1]
    for key in varied:
        # The last three do not make another run.
        if key.split(".")[0] in (*SWEEP_KEYS, "logger", "overwrite", "resume"):
            raise TensLoRAError(f"{key}={','.join(values[key])}: one value for the whole sweep, not several")
        if re.search(rf"\$\{{{re.escape(key.split('.')[0])}\b", written):
            raise TensLoRAError(f"hydra.sweep.dir={written}: must be one folder for the whole sweep, and {key} varies")

    headlines: dict[Column, str | None] = {}
    for run in (each.run for each in composed):
        task = getattr(run.dataset, "task", None)  # a classification has another metric than a regression
        headline = (run.dataset.metrics or (task and f"that of a {task}",))[0]
        column = Column(run.dataset.name, run.model.name)
        if headlines.setdefault(column, headline) != headline:
            raise TensLoRAError(
                f"dataset.metrics: must begin with one metric for all runs on {column.label}, not with "
                f"{headlines[column]} and {headline}, because a column of the table shows one"
            )

    shown_by: dict[tuple[str, str], set[str]] = {}
    for each in composed:
        for word in each.words:
            if (name := _name_shown(word, each.run)) is not None:
                shown_by.setdefault(name, set()).add(word)

    digests = [each.run.digest() for each in composed]
    spellings: dict[str, list[tuple[str, ...]]] = {}
    for digest, each in zip(digests, composed, strict=True):
        spellings.setdefault(digest, []).append(each.words)
    for key in varied:
        runs_of: dict[str | None, dict[tuple[str, ...], str]] = {value: {} for value in values[key]}
        for digest, each in zip(digests, composed, strict=True):
            others = tuple(word for word in each.words if word.partition("=")[0] != key)
            runs_of.setdefault(_value_of(key, each.words), {})[others] = digest
        equal: dict[frozenset[Any], list[str]] = {}
        for value in values[key]:
            equal.setdefault(frozenset(runs_of[value].items()), []).append(value)
        for same in equal.values():
            if len(same) > 1:
                log.warning("%s=%s: makes no other runs; the first value is taken", key, ",".join(same))
    jobs: dict[str, Job] = {}
    for digest, each in zip(digests, composed, strict=True):
        if digest in jobs:
            continue
        words, run = each.words, each.run
        variant = tuple(
            word
            for word in words
            if (key := word.partition("=")[0]) in varied
            and key != "seed"
            and ((name := _name_shown(word, run)) is None or len(shown_by[name]) > 1)
            # A run that two of the values share, and not all, has the first of them in its row's name.
            and {_value_of(key, same) for same in spellings[digest]} != values[key].keys()
        )
        jobs[digest] = Job(
            overrides=words,
            run=run,
            row=Row(run.tensor_mode, run.row_strategy, variant),
            column=Column(run.dataset.name, run.model.name),
            digest=digest,
            folder=RunFolder(outputs / run.folder()),
            compose=each.compose,
        )
    return list(jobs.values())


def _value_of(key: str, words: Iterable[str]) -> str | None:
    """The value that the overrides of a job give a setting; None if they do not name it."""
    return next((value for name, _, value in (word.partition("=") for word in words) if name == key), None)


def _name_shown(word: str, run: RunConfig) -> tuple[str, str] | None:
    """The setting of an override, and the name under which a table shows its value; None if it shows no name.

    The name alone does not always tell values apart: two files of options can have one.
    """
    key = word.partition("=")[0]
    return (key, _SHOWN[key](run)) if key in _SHOWN else None


def overwrite(jobs: Sequence[Job], *, collect_only: bool = False, dry_run: bool = False) -> None:
    """Remove what the jobs' earlier runs left, so that they are trained anew.

    A job that another process carries out is left alone. Everything is removed before the first job starts, so that
    a sweep that is stopped can be started again without `overwrite=true`, and then goes on.

    Args:
        jobs: the jobs.
        collect_only: whether the sweep is not to run anything.
        dry_run: whether nothing is to be removed, because the sweep ends with its plan.

    Raises:
        TensLoRAError: with `collect_only` or `resume`, or if a file cannot be removed.
    """
    if any(job.run.resume for job in jobs):
        raise TensLoRAError("overwrite=true: must be false with resume=true, which goes on where the runs stopped")
    if collect_only:
        raise TensLoRAError("overwrite=true: must be false with collect_only=true, which runs nothing")
    for job in () if dry_run else jobs:
        if job.folder.path.is_dir():
            with job.folder.claim() as ours:
                if ours:
                    job.folder.begin_anew(keep_checkpoint=False)


def launch_jobs(jobs: Sequence[Job], launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]]) -> None:
    """Carry out jobs through Hydra's launcher, and wait for those that another sweep carries out.

    A job that was killed before it could write a reason gets one, which its folder then says.

    Args:
        jobs: the jobs.
        launch: a function that runs jobs, each given by its overrides, and returns when all of them have ended.
    """
    from hydra.core.utils import JobStatus

    todo = list(jobs)
    while todo:
        elsewhere = []
        for job, outcome in zip(todo, launch([job.overrides for job in todo]), strict=True):
            if outcome.status is JobStatus.FAILED:
                if job.look().problem is None:
                    job.folder.write_failure(outcome._return_value)
            elif outcome.return_value == ELSEWHERE:
                elsewhere.append(job)
            elif outcome.return_value != job.digest:  # a job composes its settings anew
                job.folder.write_failure(
                    TensLoRAError(
                        "carried out another run: its settings are others than when the sweep began, as after an edit "
                        "in conf/ or with ${now:...}"
                    )
                )
        # Another sweep carries out these jobs. If that sweep stops, this sweep takes them over.
        while any(job.look().state is State.RUNNING for job in elsewhere):
            time.sleep(1)
        todo = [job for job in elsewhere if job.look().state is not State.DONE]


def carry_out(run: RunConfig, folder: RunFolder, table: str, train: Callable[[RunConfig, Path], Any]) -> str:
    """Carry out one job, unless it is done or another process is carrying it out.

    The job goes on from its checkpoint if there is one, and starts from the beginning if it cannot go on from there. An
    error of `train` is written to failure.json and raised again.

    Args:
        run: the job's settings.
        folder: the job's folder.
        table: the name of the table, which groups its runs in W&B.
        train: a function that carries out a run in a folder.

    Returns:
        `ELSEWHERE` if another process is carrying out the job, otherwise the digest of the run.
    """
    with folder.claim() as ours:
        if not ours:
            return ELSEWHERE
        with contextlib.suppress(TensLoRAError):  # what is no record of this run was said when the sweep was planned
            if folder.finished_record(run.digest()):
                return run.digest()
        folder.begin_anew()
        try:
            _train_as_far_as_possible(_as_job(run, table), folder, train)
            if not folder.result.is_file():
                raise TensLoRAError(f"{folder.result}: is not there, although the run has ended")
        except Exception as error:
            if not folder.result.is_file():  # a run that diverged has left a record, which says so
                folder.write_failure(error)
            raise
    return run.digest()


def _train_as_far_as_possible(run: RunConfig, folder: RunFolder, train: Callable[[RunConfig, Path], Any]) -> None:
    """Train from the checkpoint, or from the beginning if the run cannot go on from there."""
    try:
        train(run, folder.path)
        return
    except UnusableCheckpoint as error:
        log.warning("%s; the job starts from the beginning", error)
    # Not in the except block, which would keep the first model in memory.
    folder.begin_anew(keep_checkpoint=False)
    train(run, folder.path)


def _as_job(run: RunConfig, table: str) -> RunConfig:
    logger = run.logger
    if logger.wandb:
        tags = [table, run.dataset.name, run.tensor_mode, run.row_strategy, f"seed{run.seed}"]
        unique = tuple(dict.fromkeys([*logger.tags, *(tag[:LONGEST_TAG] for tag in tags if tag)]))
        logger = replace(logger, group=logger.group or table, tags=unique)
    return replace(run, resume=True, overwrite=False, logger=logger)
