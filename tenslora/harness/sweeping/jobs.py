"""One job of a sweep: what it is, where it stands, and who may carry it out."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf, open_dict

from tenslora.errors import TensLoRAError
from tenslora.files import write_json
from tenslora.harness.config import SWEEP_KEYS, RunConfig, check, digest, run_folder, strategy_of, validate
from tenslora.harness.config import settings as plain_settings
from tenslora.harness.results.record import NAME, read_record
from tenslora.harness.results.table import Column, Row, Run
from tenslora.ranks import parameter_count

log = logging.getLogger(__name__)

FAILURE = "failure.json"
CHECKPOINT = "checkpoint.safetensors"
ELSEWHERE = "carried out elsewhere"
"""What `carry_out` returns for a job that another sweep has in hand."""

_COLUMNS_AND_SEED = ("dataset", "model", "seed")
_ROW = ("tensor_mode", "rank_strategy")


class State(Enum):
    """Where a job stands, as the files in its folder tell."""

    NEW = "to run"
    BEGUN = "begun"
    RUNNING = "running"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True)
class Job:
    """One run of a table.

    overrides: what sets it apart, for the launcher. settings: validated. row, column: its place in the table.
    digest: of the settings that can change its result. folder: the run's.
    """

    overrides: tuple[str, ...]
    settings: RunConfig
    row: Row
    column: Column
    digest: str
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.column.dataset} {self.row.label} seed {self.settings.seed}"

    def record(self) -> dict[str, Any] | None:
        """The record of this very run, if it is there and readable."""
        try:
            record = read_record(self.folder)
        except TensLoRAError:
            return None
        return record if record["digest"] == self.digest else None

    def problem(self) -> str | None:
        """Why the last attempt left no score, if it failed."""
        record = self.record()
        if record is not None:
            return None if record["status"] == "completed" else str(record["failure"]["message"])
        try:
            return str(json.loads((self.folder / FAILURE).read_text())["error"])
        except (OSError, ValueError, KeyError):
            return None

    def state(self) -> State:
        record = self.record()
        if record is not None and record["status"] == "completed":
            return State.DONE
        if _taken(self.folder):
            return State.RUNNING
        if self.problem() is not None:
            return State.FAILED
        return State.BEGUN if (self.folder / CHECKPOINT).is_file() else State.NEW

    def run(self) -> Run:
        """What the table shows of it."""
        settings, record, problem = self.settings, self.record(), self.problem()
        ranks = parameters = lora = None
        if geometry := settings.geometry:
            lora = parameter_count("lora", geometry, [settings.strategy.rank])
            if settings.has_adapter:
                factorization = settings.factorization.name
                ranks = settings.strategy.resolve(settings.mode, geometry, factorization)
                parameters = parameter_count(settings.mode, geometry, ranks, factorization)
        elif record:
            ranks = record["ranks"] and tuple(record["ranks"])
            parameters, lora = record["adapter_parameters"], record["lora_parameters"]
        if settings.mode == "head_only":
            parameters = 0
        missing = "" if record else "missing"
        return Run(
            self.row, self.column, settings.seed, self.digest, ranks, parameters, lora, record, problem or missing
        )


def plan_jobs(composed: Sequence[tuple[tuple[str, ...], DictConfig]], folder: Path) -> list[Job]:
    """The jobs of a sweep, in the order in which they were composed, each run once.

    composed: pairs of overrides and the config that they make. folder: of all runs. Two sets of overrides that make
    the same run (LoRA under both strategies) are one job. What varies beside dataset, model, seed, construction and
    strategy becomes part of the row, where it makes a run another one.

    Raises TensLoRAError for the first job whose settings are at fault, and where a setting of the whole sweep has
    several values; before anything is run.
    """
    values: dict[str, dict[str, None]] = {}
    for words, _ in composed:
        for key, _, value in (word.partition("=") for word in words):
            values.setdefault(key, {})[value] = None
    varied = [key for key, found in values.items() if len(found) > 1]
    for key in varied:
        if key in SWEEP_KEYS or key.split(".")[0] in SWEEP_KEYS:
            raise TensLoRAError(f"{key}={','.join(values[key])}: one value for the whole sweep, not several")
    runs: dict[str, list[tuple[str, ...]]] = {}
    identifiers = [digest(config) for _, config in composed]
    for identifier, (words, _) in zip(identifiers, composed, strict=True):
        runs.setdefault(identifier, []).append(words)
    jobs: dict[str, Job] = {}
    validated: dict[str, RunConfig] = {}
    for identifier, (words, config) in zip(identifiers, composed, strict=True):
        if identifier in jobs:
            continue
        # Runs that differ in the seed alone share the slow part of validating.
        plain = json.dumps({**plain_settings(config), "seed": None}, sort_keys=True)
        if plain not in validated:
            validated[plain] = validate(config)
        settings = replace(validated[plain], seed=config.seed)
        check(settings)
        variant = tuple(
            word
            for word in words
            if (key := word.partition("=")[0]) in varied
            and key not in (*_COLUMNS_AND_SEED, *_ROW)
            and all(word in same for same in runs[identifier])
        )
        jobs[identifier] = Job(
            overrides=words,
            settings=settings,
            row=Row(settings.mode, strategy_of(config), variant),
            column=Column(settings.dataset.name, settings.model.name),
            digest=identifier,
            folder=folder / run_folder(config),
        )
    return list(jobs.values())


def carry_out(composed: DictConfig, folder: Path, train: Callable[[DictConfig, Path], Any]) -> str | None:
    """Carry out one job in `folder`, unless it is done or in someone else's hands.

    Goes on from the job's checkpoint if there is one. Returns ELSEWHERE if another process holds the job. Whatever
    `train` raises is left in failure.json and raised again.
    """
    with _claim(folder) as ours:
        if not ours:
            return ELSEWHERE
        with contextlib.suppress(TensLoRAError):
            record = read_record(folder)
            if record["status"] == "completed" and record["digest"] == digest(composed):
                return None
        for leftover in (FAILURE, NAME):
            (folder / leftover).unlink(missing_ok=True)
        try:
            train(_as_job(composed), folder)
        except Exception as error:
            if not isinstance(error, TensLoRAError):  # Hydra and the launchers keep its traceback to themselves
                log.exception("the job failed")
            if not (folder / NAME).is_file():  # a run that diverged has left a record of it
                note_failure(folder, error)
            raise
    return None


def note_failure(folder: Path, error: BaseException) -> None:
    """Leave the reason why a job has no record, for the table and the next sweep."""
    reason = " ".join(str(error).split())
    if not isinstance(error, TensLoRAError):
        reason = ": ".join(filter(None, (type(error).__name__, reason)))
    with contextlib.suppress(TensLoRAError):  # on a full disk the reason is on the console all the same
        write_json(folder / FAILURE, {"error": reason})


def _as_job(composed: DictConfig) -> DictConfig:
    job = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    assert isinstance(job, DictConfig)
    with open_dict(job):
        job.resume = True
        if job.logger.name != "none":
            tags = [job.table.name, job.dataset.name, job.tensor_mode.name, strategy_of(job), f"seed{job.seed}"]
            job.logger.group = job.logger.get("group") or job.table.name
            job.logger.tags = list(dict.fromkeys([*job.logger.get("tags", []), *filter(None, tags)]))
    return job


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether the job in `folder` is ours until the end of the context; no two processes hold it at once.

    The kernel lets go of the lock when its holder dies, however it dies. On a shared file system it has to support
    flock (NFS from version 4, Lustre, GPFS).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)  # not 0: who merely looks holds it for an instant
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _taken(folder: Path) -> bool:
    path = folder / ".lock"
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
