"""Tunes one setting of each row of a table: the runs that choose its value, and the runs that then have it.

The runs that choose (trials) train on a part of the training split and are scored on the rest of it, after their last
epoch. They do not read the test split. The row's own runs then train with the chosen value on the whole training split,
and read the test split once. Everything follows from the records of the trials alone, so that a sweep that is started
again, or another sweep, makes the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tenslora.errors import TensLoRAError
from tenslora.harness.config import SWEEP_KEYS, ImageDatasetConfig, RunConfig, TuneConfig, tune_config
from tenslora.harness.config.checks import no_such_setting, shown
from tenslora.harness.config.tuning import Value
from tenslora.harness.results.table import Run, Table
from tenslora.harness.results.tuning import Tuning
from tenslora.harness.sweeping.jobs import Job, Look, State
from tenslora.harness.training.metrics import METRICS

MOST_EXTENSIONS = 3
"""How often the grid of a row is extended by one value."""

_LAST_EPOCH = {"trainer.evaluate": "last"}
_NOT_TUNED: dict[str, Any] = {"tune.setting": None, "tune.values": []}
_TABLE = "table.name"


@dataclass(frozen=True)
class Choice:
    """What the trials of a search have shown so far.

    Args:
        grid: the values, with those by which the grid has been extended.
        value: the chosen value, in a list of one; an empty list while it is not decided.
        at_edge: whether the chosen value is the smallest or the largest, and the grid is not extended any more.
        problem: why no value can be chosen; empty otherwise.
    """

    grid: tuple[Value, ...]
    value: tuple[Value, ...] = ()
    at_edge: bool = False
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Search:
    """The search for the best value of a setting, for one row of a table in one column.

    Args:
        jobs: the row's jobs in this column as they are without tuning, one for each seed.
        tune: what is tuned, and how.
    """

    jobs: tuple[Job, ...]
    tune: TuneConfig
    _jobs: dict[Any, list[Job]] = field(default_factory=dict)

    @property
    def is_of_use(self) -> bool:
        """Whether the row is tuned: head_only is not, nor a row whose runs do not depend on the setting."""
        job = self.jobs[0]
        if job.run.tensor_mode == "head_only" or not _has(job.composed, self.tune.setting):
            return False
        return len({self.trials(value)[0].digest for value in self.tune.values}) > 1

    def trials(self, value: Value) -> list[Job]:
        """The jobs that say how good a value is, one for each seed of `tune.seeds`.

        Args:
            value: the value.

        Raises:
            TensLoRAError: if the setting cannot have this value.
        """
        key = ("trials", value)
        if key not in self._jobs:
            job, setting = self.jobs[0], self.tune.setting
            settings = {setting: value, **_LAST_EPOCH, **_held_out(job.run, self.tune), **_NOT_TUNED}
            settings[_TABLE] = trials_of(name_of(job.composed))
            row = replace(job.row, variant=(*job.row.variant, f"{setting}={shown(value)}"))
            self._jobs[key] = [replace(trial, row=row) for trial in job.changed(settings, self.tune.seeds)]
        return self._jobs[key]

    def finals(self, choice: Choice) -> list[Job]:
        """The row's own jobs, with the chosen value.

        Args:
            choice: a choice that is decided.
        """
        key = ("finals", choice)
        if key not in self._jobs:
            job, seeds = self.jobs[0], [job.run.seed for job in self.jobs]
            settings = {self.tune.setting: choice.value[0], **_LAST_EPOCH, "tune.values": list(choice.grid)}
            self._jobs[key] = job.changed({**settings, _TABLE: name_of(job.composed)}, seeds)
        return self._jobs[key]

    def choice(self, looks: dict[Job, Look]) -> Choice:
        """Choose a value, as far as the trials allow it.

        The best mean score wins. Of equal ones it is the value that the row has without tuning, or else the first that
        is not at an edge. A value with which a run diverged is the worst. While the first or the last number alone is
        the best, the grid is extended beyond it by the factor between the two outermost.

        Args:
            looks: the states of trials. The states of all trials that the choice depends on are added.
        """
        grid, setting = list(self.tune.values), self.tune.setting
        own = OmegaConf.select(self.jobs[0].composed, setting)
        for extensions in range(MOST_EXTENSIONS + 1):
            scores = [self._mean_score(value, looks) for value in grid]
            known = [score for score in scores if score is not None]
            if len(known) < len(scores):
                return Choice(tuple(grid))
            if max(known) == -math.inf:
                return Choice(tuple(grid), problem=f"every value of {setting} diverged: {shown(grid)}")
            best = [place for place, score in enumerate(known) if score == max(known)]
            place = min(best, key=lambda place: (grid[place] != own, place in (0, len(grid) - 1), place))
            at_edge = self.tune.is_numeric and len(best) == 1 and place in (0, len(grid) - 1)
            further = self._beyond(grid, place) if at_edge and extensions < MOST_EXTENSIONS else None
            if further is None:
                return Choice(tuple(grid), (grid[place],), at_edge)
            grid.insert(len(grid) if place else 0, further)
        raise AssertionError("the last round always decides")

    def _mean_score(self, value: Value, looks: dict[Job, Look]) -> float | None:
        """The mean score of a value, the larger the better; minus infinity if it diverged, None if it is not known."""
        trials = self.trials(value)
        looks |= {trial: trial.look() for trial in trials if trial not in looks}
        if any(has_diverged(looks[trial]) for trial in trials):
            return -math.inf
        scores = [_score(record) for trial in trials if (record := looks[trial].record)]
        return math.fsum(scores) / len(scores) if len(scores) == len(trials) else None

    def _beyond(self, grid: Sequence[Any], place: int) -> Value:
        """The value by which a grid is extended beyond an edge; None if it cannot be extended there."""
        edge, neighbour = (grid[-1], grid[-2]) if place else (grid[0], grid[1])
        if edge * neighbour <= 0:
            return None
        further = float(f"{edge * edge / neighbour:.6g}")
        value = int(further) if further.is_integer() else further
        try:
            self.trials(value)
        except TensLoRAError:  # such as a probability above 1
            return None
        return value


@dataclass(frozen=True)
class Known:
    """The jobs of a sweep, as far as they are known at one moment.

    Args:
        looks: the states of all jobs whose settings are known: trials first.
        choices: the choice of each search.
        jobs: the jobs of the table; those that are not in `looks` wait for a value to be chosen.
    """

    looks: dict[Job, Look]
    choices: dict[Search, Choice]
    jobs: tuple[Job, ...]

    @property
    def open(self) -> list[Job]:
        """The jobs that are to be carried out. The divergence of a trial is an answer, and is not repeated."""
        return [
            job
            for job, look in self.looks.items()
            if look.state is not State.DONE and not (job in self.trials and has_diverged(look))
        ]

    @property
    def failed(self) -> dict[Job, str]:
        """Why jobs have left no record, apart from trials that diverged."""
        return {
            job: look.problem
            for job, look in self.looks.items()
            if look.problem and not (job in self.trials and has_diverged(look))
        }

    @cached_property
    def trials(self) -> set[Job]:
        """The jobs that choose values."""
        return {
            trial for search, choice in self.choices.items() for value in choice.grid for trial in search.trials(value)
        }


class Stages:
    """The jobs of a sweep in their order: those that choose values, and those that need the chosen values.

    Without tuning, all jobs are known from the start.

    Args:
        jobs: the jobs of the table, without tuning.
        tune: what is tuned, and how; None for nothing.

    Raises:
        TensLoRAError: if the setting cannot be tuned in this table.
    """

    def __init__(self, jobs: Sequence[Job], tune: TuneConfig | None) -> None:
        self.tune = tune
        self.jobs = list(jobs)
        self.searches: list[Search] = []
        if tune is None:
            return
        _check(jobs, tune)
        cells: dict[Any, list[Job]] = {}
        for job in jobs:
            cells.setdefault((job.row, job.column), []).append(job)
        searches = {cell: Search(tuple(members), tune) for cell, members in cells.items()}
        self.searches = [search for search in searches.values() if search.is_of_use]
        if not self.searches:
            raise TensLoRAError(f"tune.setting={tune.setting}: must be a setting that changes runs of this table")
        tuned = {job for search in self.searches for job in search.jobs}
        self.jobs = [
            job
            if job in tuned
            else job.changed({**_LAST_EPOCH, **_NOT_TUNED, _TABLE: name_of(job.composed)}, [job.run.seed])[0]
            for job in jobs
        ]

    def look(self) -> Known:
        """Read the folders of all jobs that are known by now."""
        looks: dict[Job, Look] = {}
        choices = {search: search.choice(looks) for search in self.searches}
        finals: dict[Job, Job] = {}
        for search, choice in choices.items():
            if choice.value:
                finals |= dict(zip(search.jobs, search.finals(choice), strict=True))
        undecided = {job for search in self.searches for job in search.jobs}.difference(finals)
        jobs = tuple(finals.get(job, job) for job in self.jobs)
        looks |= {job: job.look() for job in jobs if job not in undecided}
        return Known(looks, choices, jobs)

    def runs(self, known: Known) -> tuple[Run, ...]:
        """The runs of the table. Those whose settings are not known yet are missing.

        Args:
            known: the jobs that are known.
        """
        problems = {job: choice.problem for search, choice in known.choices.items() for job in search.jobs}
        runs = []
        for job in known.jobs:
            if job in known.looks:
                runs.append(job.in_table(known.looks[job]))
            else:
                run = job.in_table(Look(State.NEW, None, None))
                runs.append(replace(run, digest="", folder=None, problem=problems[job] or "missing"))
        return tuple(runs)

    def tuning(self, known: Known, name: str, title: str) -> Tuning | None:
        """What the trials have shown, for the table; None if nothing is tuned.

        Args:
            known: the jobs that are known.
            name: the name of the table.
            title: the title of the table.
        """
        if self.tune is None:
            return None
        setting, chosen, at_edge = self.tune.setting, {}, set()
        # Rows of the trials' table are in the order of the values, which are numbers for most settings.
        values = {value: None for choice in known.choices.values() for value in choice.grid}
        ordered = sorted(values, key=float) if self.tune.is_numeric else list(values)  # type: ignore[arg-type]
        runs = []
        for value in ordered:
            for search, choice in known.choices.items():
                if value in choice.grid:
                    runs += [trial.in_table(known.looks[trial]) for trial in search.trials(value)]
        for search, choice in known.choices.items():
            place = search.jobs[0].row, search.jobs[0].column
            if choice.value:
                chosen[place] = search.trials(choice.value[0])[0].row
                at_edge |= {place} if choice.at_edge else set()
        trials = Table(trials_of(name), f"{title}: trials", tuple(runs), by=setting)
        return Tuning(setting, trials, chosen, frozenset(at_edge))


def _score(record: dict[str, Any]) -> float:
    metrics = record["metrics"]
    score: float = metrics["last"]
    return score if METRICS[metrics["name"]].larger_is_better else -score


def has_diverged(look: Look) -> bool:
    """Whether a job has left the record of a run whose loss was no longer a finite number."""
    return look.record is not None and look.record["status"] == "diverged"


def tune_of(config: DictConfig) -> TuneConfig | None:
    """What a sweep tunes, and how; None for nothing.

    Args:
        config: the composed config of the sweep or of one of its jobs.

    Raises:
        TensLoRAError: for a wrong setting.
    """
    group = config.get("tune")
    return tune_config(OmegaConf.to_container(group, resolve=True) if group else {})  # type: ignore[arg-type]


def name_of(config: DictConfig) -> str:
    """The name of a sweep's table, which its folder has; it says whether the table is tuned.

    Args:
        config: the composed config of the sweep.
    """
    setting = (config.get("tune") or {}).get("setting")
    return f"{config.table.name}-tuned-{setting.rpartition('.')[2]}" if setting else str(config.table.name)


def trials_of(name: str) -> str:
    """The name of the table of a tuned table's trials.

    Args:
        name: the name of the tuned table.
    """
    return f"{name}-trials"


def _held_out(run: RunConfig, tune: TuneConfig) -> dict[str, Any]:
    """The settings by which a run is scored on a part of its training split, and does not read the test split."""
    dataset = run.dataset
    if (
        isinstance(dataset, ImageDatasetConfig)
        and dataset.source == "vtab"
        and dataset.train_splits == ("train800val200",)
    ):
        return {"dataset.train_splits": ["train800"], "dataset.test_split": "val200"}
    return {"dataset.validation": tune.validation}


def _check(jobs: Sequence[Job], tune: TuneConfig) -> None:
    if jobs[0].composed.table.score != "last":
        raise TensLoRAError("table.score=best: must be last with tune, because the test split is read only once")
    for key, _, value in (word.partition("=") for job in jobs for word in job.overrides):
        if key == tune.setting:
            raise TensLoRAError(f"{key}={value}: must not be given, because tune.setting={tune.setting} chooses it")
        if key in _LAST_EPOCH and value != "last":
            raise TensLoRAError(f"{key}={value}: must be last with tune, because the test split is read only once")
    configs = {id(job.composed): job.composed for job in jobs}.values()
    names = dict.fromkeys(setting for config in configs for setting in _settings(config))
    settings = [name for name in names if name.partition(".")[0] not in ("hydra", *SWEEP_KEYS)]
    if tune.setting not in settings:
        if any(tune.setting in config for config in configs):
            raise TensLoRAError(
                f"tune.setting={tune.setting}: must be a single setting, such as optimizer.lr, not a group"
            )
        raise TensLoRAError(f"tune.setting={no_such_setting(tune.setting, settings)}")
    for job in jobs:
        if job.run.dataset.scored_on != "test":
            held_out = job.run.dataset.validation
            setting = (
                f"validation={held_out}" if held_out else f"test_split={getattr(job.run.dataset, 'test_split', None)}"
            )
            raise TensLoRAError(f"dataset.{setting}: must be left out with tune, which holds out a part itself")
    seeds = {job.run.seed for job in jobs}
    if both := [seed for seed in tune.seeds if seed in seeds]:
        raise TensLoRAError(
            f"tune.seeds={shown(tune.seeds)}: must be other seeds than the table's, which has {shown(both)} too"
        )


def _has(config: DictConfig, setting: str) -> bool:
    return setting in _settings(config)


def _settings(config: DictConfig, group: str = "") -> Iterator[str]:
    """The names of the settings that are not groups."""
    for name in config:
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _settings(node, f"{group}{name!s}.")
        else:
            yield f"{group}{name!s}"
