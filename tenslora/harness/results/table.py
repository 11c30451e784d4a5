"""A table of runs: rows are what was varied, columns where it was tried, a cell holds one run per seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tenslora.constructions import CONSTRUCTIONS

ORDER = (*CONSTRUCTIONS, "head_only", "full")
"""Rows in the paper's order, LoRA first; the reference rows stand below."""


@dataclass(frozen=True)
class Row:
    """What sets one row apart: the construction, the rank strategy, and whatever else was swept.

    strategy: empty for runs that it does not change: lora at a rank, and those without an adapter.
    variant: "key=value" for each further setting that differs from row to row.
    """

    tensor_mode: str
    strategy: str = ""
    variant: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.tensor_mode, self.strategy, *self.variant)))

    @property
    def values(self) -> tuple[str, ...]:
        """Of `variant`, what stands behind the equals signs."""
        return tuple(each.partition("=")[2] for each in self.variant)

    @property
    def plain(self) -> Row:
        """The row without what else was swept."""
        return replace(self, variant=())

    @property
    def is_construction(self) -> bool:
        """Whether it stacks updates into tensors, and is neither LoRA nor a reference row."""
        return self.tensor_mode in CONSTRUCTIONS and self.tensor_mode != "lora"


@dataclass(frozen=True)
class Column:
    """A dataset, and the backbone that is adapted to it."""

    dataset: str
    model: str


@dataclass(frozen=True)
class Run:
    """One run of a table, finished or not.

    digest: identifies its settings. ranks, parameters, lora_parameters: as planned from the backbone's declared
    geometry; None where that is left open or there is no adapter. record: its result.json once it is there.
    problem: why there is no score: "missing", or what went wrong; empty for a completed run.
    """

    row: Row
    column: Column
    seed: int
    digest: str
    ranks: tuple[int, ...] | None = None
    parameters: int | None = None
    lora_parameters: int | None = None
    record: dict[str, Any] | None = None
    problem: str = "missing"

    def score(self, which: str) -> float | None:
        """The headline metric after the last epoch (which = last) or the best of all; None without a score."""
        if self.record is None or self.problem:
            return None
        value: float | None = self.record["metrics"][which]
        return value


@dataclass(frozen=True)
class Table:
    """Runs by row, column and seed.

    name: of the table, as in conf/table. title: for people. score: last or best, the number that it shows.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    score: str = "last"
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def rows(self) -> list[Row]:
        found = dict.fromkeys(run.row for run in self.runs)
        strategies = list(dict.fromkeys(row.strategy for row in found))
        variants = list(dict.fromkeys(row.variant for row in found))

        def place(row: Row) -> tuple[int, ...]:
            mode = ORDER.index(row.tensor_mode)
            group = 0 if row.tensor_mode == "lora" else 1 if row.is_construction else 2
            return group, variants.index(row.variant), strategies.index(row.strategy), mode

        return sorted(found, key=place)

    @cached_property
    def plain_rows(self) -> list[Row]:
        """The rows without what else was swept, each once."""
        return replace(self, runs=tuple(replace(run, row=run.row.plain) for run in self.runs)).rows

    @cached_property
    def swept(self) -> str | None:
        """The one setting that is swept beside construction, strategy and seed; None where there is none, or more."""
        settings = {each.partition("=")[0] for row in self.rows for each in row.variant}
        return settings.pop() if len(settings) == 1 else None

    @cached_property
    def columns(self) -> list[Column]:
        return list(dict.fromkeys(run.column for run in self.runs))

    def cell(self, row: Row, column: Column) -> list[Run]:
        """The runs of a cell by rising seed; empty where the table has none there."""
        return self._cells.get((row, column), [])

    @cached_property
    def _cells(self) -> dict[tuple[Row, Column], list[Run]]:
        cells: dict[tuple[Row, Column], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            cells.setdefault((run.row, run.column), []).append(run)
        return cells

    def scores(self, row: Row, column: Column) -> dict[int, float]:
        """The scores of a cell by seed, of its completed runs."""
        found = {run.seed: run.score(self.score) for run in self.cell(row, column)}
        return {seed: score for seed, score in found.items() if score is not None}

    def reference(self, row: Row) -> Row | None:
        """The LoRA row that a row is compared with: that of the same variant, else the only one there is."""
        lora = [other for other in self.rows if other.tensor_mode == "lora" and other != row]
        same = [other for other in lora if other.variant == row.variant]
        found = same or lora
        return found[0] if len(found) == 1 else None

    def metric(self, column: Column) -> str | None:
        """The name of the column's headline metric, as its finished runs tell; None before the first."""
        for run in self.runs:
            if run.column == column and run.record:
                name: str = run.record["metrics"]["name"]
                return name
        return None

    def problems(self, row: Row, column: Column) -> list[str]:
        """Why seeds of a cell have no score, each reason once."""
        return list(dict.fromkeys(run.problem for run in self.cell(row, column) if run.problem))


def mean_and_deviation(scores: Iterable[float]) -> tuple[float, float | None]:
    """(mean, standard deviation with n - 1) of at least one score; no deviation for a single one."""
    values = list(scores)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
