"""A table of runs. A row is a choice of adapter, a column is a dataset and a backbone, a cell has one run per seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.constructions import CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.harness.config.schema import TENSOR_MODES
from tenslora.harness.stages import Ranks, ranks_text, stages_in_file
from tenslora.harness.training.metrics import METRICS, Metric

if TYPE_CHECKING:
    from tenslora.harness.results.tuning import Tuning

ROW_ORDER = TENSOR_MODES
"""The order of the rows: LoRA, the paper's constructions in the paper's order, the others, and the reference rows."""


MEAN_OF_GROUPS = "mean of groups"
"""The name of the column that shows the mean over the means of a table's groups."""


@dataclass(frozen=True)
class Row:
    """A row of a table: a construction, a rank strategy, and any further setting that is swept.

    Args:
        tensor_mode: the construction, "head_only" or "full".
        strategy: the rank strategy; empty where it does not change the run, as for LoRA or without an adapter.
        variant: "setting=value" for each further setting that differs from row to row.
    """

    tensor_mode: str
    strategy: str = ""
    variant: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The row's name, such as "qkv isorank adapter.alpha=8"."""
        return " ".join(filter(None, (self.tensor_mode, self.strategy, *self.variant)))

    def value_of(self, setting: str | None) -> str | None:
        """The value of one of the variant's settings; None if the row does not depend on this setting."""
        values = [value for key, _, value in (word.partition("=") for word in self.variant) if key == setting]
        return values[0] if values else None

    def without(self, setting: str | None) -> Row:
        """The same row without one of the variant's settings."""
        return replace(self, variant=tuple(word for word in self.variant if word.partition("=")[0] != setting))

    @property
    def has_adapter(self) -> bool:
        """Whether the row's runs train an adapter; those of head_only and full do not."""
        return self.tensor_mode in CONSTRUCTIONS

    @property
    def is_lora(self) -> bool:
        """Whether the row's adapter is LoRA."""
        return self.tensor_mode == "lora"

    @property
    def is_construction(self) -> bool:
        """Whether the row's adapter stacks updates into tensors."""
        return self.has_adapter and not self.is_lora


@dataclass(frozen=True)
class Column:
    """A dataset, and the backbone that is adapted to it."""

    dataset: str
    model: str

    @property
    def label(self) -> str:
        """The column's name, such as "dtd with vit_base"."""
        return f"{self.dataset} with {self.model}"


@dataclass(frozen=True)
class AdapterSize:
    """The size of an adapter, beside LoRA's on the same matrices.

    Args:
        ranks: the ranks of each stage; None without an adapter or where they are unknown.
        parameters: the adapter's number of parameters; None without an adapter or where it is unknown.
        lora_parameters: the number of parameters of LoRA at the run's rank; None where it is unknown.
        relative_step: the adapter's first step as a multiple of LoRA's; None without an adapter or where it is unknown.
    """

    ranks: Ranks | None
    parameters: int | None
    lora_parameters: int | None
    relative_step: float | None = None

    @property
    def percent_of_lora(self) -> float | None:
        """The parameters in per cent of LoRA's; None where either count is unknown."""
        return percent_of_lora(self.parameters, self.lora_parameters)

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Ranks, number of parameters, per cent of LoRA's, first step as a multiple of LoRA's; a dash where unknown."""
        percent = self.percent_of_lora
        return (
            ranks_text(self.ranks) if self.ranks else "-",
            "-" if self.parameters is None else f"{self.parameters:,}",
            "-" if percent is None else f"{percent:.1f}",
            "-" if self.relative_step is None else f"{self.relative_step:.2f}",
        )


@dataclass(frozen=True)
class Run:
    """One run of a table, finished or not.

    Args:
        row: the run's row.
        column: the run's column.
        seed: the run's seed.
        digest: the digest of the run's settings.
        ranks: the ranks of each stage, from the backbone's declared geometry; None without an adapter or a declared
            geometry.
        parameters: the adapter's number of parameters, from the same; None likewise.
        lora_parameters: LoRA's number of parameters, from the same; None without a declared geometry.
        record: the run's result.json; None if there is none yet.
        problem: why there is no score: "missing", "running", or what went wrong; empty for a completed run.
        folder: the run's folder; None if it is unknown.
        relative_step: the adapter's first step as a multiple of LoRA's, from the declared geometry; None likewise.
        tuned: of a run that is read back from a tuned table, the value that was chosen for its row, such as
            "adapter.alpha=16"; empty for any other run.
        at_edge: whether this value is the smallest or the largest that was tried.
        shown: of a run that is read back, the score that its table shows, "last" or "best".
    """

    row: Row
    column: Column
    seed: int
    digest: str
    ranks: Ranks | None = None
    parameters: int | None = None
    lora_parameters: int | None = None
    record: dict[str, Any] | None = None
    problem: str = "missing"
    folder: Path | None = None
    relative_step: float | None = None
    tuned: str = ""
    at_edge: bool = False
    shown: str = "last"

    @property
    def tuned_text(self) -> str:
        """The chosen value as a joint table shows it, such as "alpha=16 (edge)"; empty if the run is not tuned."""
        setting, is_tuned, value = self.tuned.partition("=")
        return f"{setting.rpartition('.')[2]}{is_tuned}{value}" + " (edge)" * self.at_edge

    @property
    def status(self) -> str:
        """One of "completed", "failed", "running" and "missing"."""
        return {"": "completed", "missing": "missing", "running": "running"}.get(self.problem, "failed")

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores in the record of a completed run; empty for any other."""
        metrics: dict[str, Any] = self.record["metrics"] if self.record and self.status == "completed" else {}
        return metrics

    @property
    def other_scores(self) -> dict[str, float]:
        """The last scores of all metrics but the headline one, in their units, those of further test splits included.

        The score of a further test split is named after both, such as accuracy_mismatched.
        """
        scores: dict[str, float] = self.metrics.get("others_last", {})
        metrics = {name: METRICS.get(name) or METRICS.get(name.partition("_")[0]) for name in scores}
        return {name: score * (metric.factor if (metric := metrics[name]) else 1) for name, score in scores.items()}

    @property
    def scored_on(self) -> str | None:
        """The split that the scores are of, "test" or "validation"; None without a record."""
        # Records of earlier versions do not name the split; it is the test split.
        return self.record.get("scored_on", "test") if self.record else None

    @property
    def zero_rate(self) -> float | None:
        """The highest learning rate of the parameter that starts at zero; None without a record of it."""
        optimizer: dict[str, Any] = (self.record or {}).get("config", {}).get("optimizer", {})
        rate = optimizer.get("lr")
        return None if rate is None else float(rate * optimizer.get("core_lr_ratio", 1.0))

    @property
    def first_step(self) -> float | None:
        """How far the first step moves the matrices with the run's own alpha and rate; None where it is unknown."""
        step, rate = (self.record or {}).get("first_step"), self.zero_rate
        return None if step is None or rate is None else float(step * rate)

    @property
    def step_scale(self) -> float | None:
        """Alpha times `zero_rate`; None without a record of both.

        `AdapterSize.relative_step` is relative to a LoRA with the same scale.
        """
        alpha, rate = (self.record or {}).get("config", {}).get("adapter", {}).get("alpha"), self.zero_rate
        return None if alpha is None or rate is None else float(alpha * rate)

    @property
    def size(self) -> AdapterSize:
        """The adapter's size from the record, or from the declared geometry if there is no record."""
        lora_parameters = self.record["lora_parameters"] if self.record else self.lora_parameters
        if not self.row.has_adapter:
            return AdapterSize(None, None, lora_parameters)
        if self.record is None:
            return AdapterSize(self.ranks, self.parameters, lora_parameters, self.relative_step)
        step = self.relative_step  # records of earlier versions do not hold the first step
        if "first_step" in self.record:
            step = multiple_of_lora(self.record["first_step"], self.record["lora_first_step"])
        ranks = tuple(map(tuple, stages_in_file(self.record["ranks"])))
        return AdapterSize(ranks, self.record["adapter_parameters"], lora_parameters, step)

    def score(self, which: str) -> float | None:
        """The headline metric of a completed run, as a fraction; None for any other run.

        Args:
            which: "last" for the score after the last epoch, "best" for the best over all epochs.
        """
        score: float | None = self.metrics.get(which)
        return score


@dataclass(frozen=True)
class Table:
    """Runs by row, column and seed.

    Args:
        name: the table's name in conf/table.
        title: the table's title.
        runs: the runs, in any order. Where nothing else orders them, rows and columns are in the order of their first
            runs.
        score: the score that the table shows, "last" or "best", see `Run.score`.
        notes: sentences below the title.
        groups: the datasets of each group whose mean the table shows.
        command: the command that makes the table; empty if it is unknown.
        settings: the settings of the runs, see `settings_of`; empty if they are unknown.
        by: the setting by whose values the scores are shown, if several vary beside construction, strategy and seed.
        tuning: how one setting was chosen for each row; None if nothing was tuned.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    score: str = "last"
    notes: tuple[str, ...] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    command: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    by: str | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if taken := sorted(self.groups.keys() & {run.column.dataset for run in self.runs}):
            raise TensLoRAError(f"table.groups.{taken[0]}: is the name of a dataset of the table; choose another")

    @cached_property
    def rows(self) -> list[Row]:
        """The rows: LoRA, then the constructions by variant, strategy and paper's order, then the reference rows."""
        rows = dict.fromkeys(run.row for run in self.runs)
        strategies = list(dict.fromkeys(row.strategy for row in rows))
        variants = list(dict.fromkeys(row.variant for row in rows))

        def position(row: Row) -> tuple[int, ...]:
            group = 0 if row.is_lora else 1 if row.is_construction else 2
            mode = ROW_ORDER.index(row.tensor_mode)
            return group, variants.index(row.variant), strategies.index(row.strategy), mode

        return sorted(rows, key=position)

    @cached_property
    def rows_without_setting(self) -> list[Row]:
        """The rows without the setting that is swept, each once, in the order of `rows`."""
        setting = self.swept_setting
        return replace(self, runs=tuple(replace(run, row=run.row.without(setting)) for run in self.runs)).rows

    def at(self, setting: str, value: str) -> Table:
        """The part of the table with one value of a setting, which its rows then no longer name.

        Rows that do not depend on the setting are part of it.

        Args:
            setting: the setting.
            value: its value, as text.
        """
        runs = [run for run in self.runs if run.row.value_of(setting) in (value, None)]
        return replace(self, runs=tuple(replace(run, row=run.row.without(setting)) for run in runs), by=None)

    @cached_property
    def columns(self) -> list[Column]:
        """The columns, in the order in which they were swept."""
        return list(dict.fromkeys(run.column for run in self.runs))

    @cached_property
    def group_columns(self) -> dict[Column, list[Column]]:
        """A column for the mean over each group of datasets, and one for the mean of these means, by backbone.

        A column maps to the columns that it is the mean of. There is none if a dataset of a group is not in the table.
        """
        means: dict[Column, list[Column]] = {}
        for model in dict.fromkeys(column.model for column in self.columns):
            members = {
                Column(name, model): [Column(dataset, model) for dataset in datasets]
                for name, datasets in self.groups.items()
            }
            complete = {mean: of for mean, of in members.items() if set(of) <= set(self.columns)}
            means |= complete
            if complete.keys() == members.keys() and len(members) > 1:
                means[Column(MEAN_OF_GROUPS, model)] = list(members)
        return means

    @cached_property
    def swept_setting(self) -> str | None:
        """The setting that is swept beside construction, strategy and seed; None if there is none, or several.

        Of several it is `by`.
        """
        if self.by is not None:
            return self.by
        settings = {assignment.partition("=")[0] for row in self.rows for assignment in row.variant}
        return settings.pop() if len(settings) == 1 else None

    def cell(self, row: Row, column: Column) -> list[Run]:
        """The runs of a cell by rising seed; empty if the table has no runs there."""
        return self._cells.get((row, column), [])

    @cached_property
    def _cells(self) -> dict[tuple[Row, Column], list[Run]]:
        cells: dict[tuple[Row, Column], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            cells.setdefault((run.row, run.column), []).append(run)
        return cells

    def seeds(self, row: Row, column: Column) -> set[int]:
        """The seeds of a cell's runs, finished or not; of a column of means, those of all its parts."""
        if column in self.group_columns:
            return set[int].union(*(self.seeds(row, part) for part in self.group_columns[column]))
        return {run.seed for run in self.cell(row, column)}

    def scores(self, row: Row, column: Column) -> dict[int, float]:
        """The scores of a cell's completed runs by seed, as fractions.

        In a column of means, a seed has a score if it has one in each part.
        """
        if column in self.group_columns:
            parts = [self.scores(row, part) for part in self.group_columns[column]]
            seeds = sorted(set[int].intersection(*map(set, parts)))
            return {seed: statistics.fmean(part[seed] for part in parts) for seed in seeds}
        scores = {run.seed: run.score(self.score) for run in self.cell(row, column)}
        return {seed: score for seed, score in scores.items() if score is not None}

    def reference(self, row: Row) -> Row | None:
        """The LoRA row that a row is compared with: that of the same variant, or else the table's only LoRA row."""
        lora_rows = [other for other in self.rows if other.is_lora and other != row]
        candidates = [other for other in lora_rows if other.variant == row.variant] or lora_rows
        return candidates[0] if len(candidates) == 1 else None

    def compared_with(self, lora: Row) -> list[Row]:
        """The rows that a LoRA row is the reference of, without other LoRA rows."""
        return [row for row in self.rows if not row.is_lora and self.reference(row) == lora]

    def metric(self, column: Column) -> str | None:
        """The name of a column's headline metric, as recorded by its runs; None before the first record."""
        if column in self.group_columns:
            names = {self.metric(part) for part in self.group_columns[column]} - {None}
            return names.pop() if len(names) == 1 else None
        for run in self.runs:
            if run.column == column and run.record:
                name: str = run.record["metrics"]["name"]
                return name
        return None

    def scale(self, column: Column) -> Metric:
        """A column's headline metric, whose unit and direction say how to show it; accuracy before the first record."""
        return METRICS.get(self.metric(column) or "", METRICS["accuracy"])


def changed_data(table: Table) -> str | None:
    """A note on runs of a column that have the same settings and other data, because files have changed between them.

    Args:
        table: the table.

    Returns:
        The note on the first such column; None if there is none.
    """
    for column in table.columns:
        sizes: dict[str, tuple[Any, ...]] = {}
        digests: dict[tuple[str, int | None], str] = {}  # by the seed too where it chooses among the examples
        for run in table.runs:
            if run.column != column or not run.record or not run.metrics:
                continue
            dataset = run.record.get("config", {}).get("dataset") or {}
            settings = json.dumps(dataset, sort_keys=True)
            size = run.record.get("train_examples"), run.record.get("test_examples")
            digest = run.record.get("data_digest")  # which records of earlier versions do not have
            differ = ""
            if (other := sizes.setdefault(settings, size)) != size:
                differ = f"one had {other[0]} training and {other[1]} test examples, another {size[0]} and {size[1]}"
            elif digest:
                key = settings, run.seed if dataset.get("train_size") or dataset.get("validation") else None
                differ = "their labels or texts differ" if digests.setdefault(key, digest) != digest else ""
            if differ:
                return (
                    f"Not all runs on {column.label} had the same data: {differ}. Files have changed between them; "
                    f"overwrite=true trains all of them anew."
                )
    return None


def percent_of_lora(parameters: int | None, lora_parameters: int | None) -> float | None:
    """An adapter's number of parameters in per cent of LoRA's; None where a count is unknown or LoRA's is 0.

    >>> percent_of_lora(1536, 6144)
    25.0
    """
    return 100 * parameters / lora_parameters if parameters is not None and lora_parameters else None


def multiple_of_lora(first_step: float | None, lora_first_step: float | None) -> float | None:
    """An adapter's first step as a multiple of LoRA's; None where either is unknown or LoRA's is 0.

    >>> multiple_of_lora(8.0, 32.0)
    0.25
    """
    return first_step / lora_first_step if first_step is not None and lora_first_step else None


def mean_and_deviation(scores: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (with n - 1) of at least one score; a single score has no deviation."""
    values = list(scores)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
