"""What a table says, cell by cell, before it takes the form of a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from tenslora.constructions import CONSTRUCTIONS
from tenslora.harness.results.paper import paper_value
from tenslora.harness.results.statistics import Difference, paired_difference
from tenslora.harness.results.table import Column, Row, Run, Table, mean_and_deviation

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """A row's runs in one column.

    mean, deviation: of the scores over seeds, in per cent; None where there is none to give. scored, failed, planned:
    how many of its runs have a score, have failed, and there are. best: whether no other row of the column shows a
    higher mean. paper: the score of the paper in per cent, where we hold one.
    """

    mean: float | None
    deviation: float | None
    scored: int
    failed: int
    planned: int
    best: bool
    paper: float | None

    @property
    def number(self) -> str:
        """The mean; empty without a score."""
        return "" if self.mean is None else f"{round(self.mean, 1) + 0.0:.1f}".replace("-", MINUS)

    @property
    def spread(self) -> str:
        """The standard deviation; empty with fewer than two scores."""
        return "" if self.deviation is None else f"{self.deviation:.1f}"

    @property
    def remark(self) -> str:
        """What there is to say beside the numbers: "missing", "failed", "(3 of 5 seeds, 1 failed)" or nothing."""
        if not self.scored:
            return "failed" if self.failed else "missing" if self.planned else ""
        if self.scored == self.planned:
            return ""
        return f"({self.scored} of {self.planned} seeds{f', {self.failed} failed' if self.failed else ''})"


@dataclass(frozen=True)
class Line:
    """One row of the main table as text: its label, what its adapter has, and a cell per column.

    ranks, parameters, percent: joined by " / ", one per backbone, where they differ between backbones; a dash where
    unknown. starts_group: whether a rule sets it off from the line above.
    """

    row: Row
    ranks: str
    parameters: str
    percent: str
    cells: tuple[Cell, ...]
    starts_group: bool


@dataclass(frozen=True)
class Grid:
    """A column of the main table, spread out over the values of the setting that is swept.

    rows: (row without the setting, a cell per value); None where there is no such run.
    """

    column: Column
    setting: str
    values: tuple[str, ...]
    rows: tuple[tuple[Row, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Comparison:
    """A row against LoRA in one column, in points (per cent of the metric); None if no seed is finished for both."""

    row: Row
    column: Column
    points: Difference | None

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """(difference, 95 % interval, p-value, seeds); a dash where unknown."""
        if self.points is None:
            return "-", "-", "-", "0"
        low, high, p = self.points.low, self.points.high, self.points.p
        interval = "-" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"
        chance = "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
        return signed(self.points.mean), interval, chance, str(self.points.seeds)


def signed(value: float) -> str:
    """A difference in points: two decimals, always a sign, a true minus.

    >>> signed(1.234), signed(-0.001)
    ('+1.23', '−0.00')
    """
    return f"{value:+.2f}".replace("-", MINUS)


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def adapter_of(run: Run) -> tuple[tuple[int, ...] | None, int | None, int | None]:
    """(ranks, adapter parameters, LoRA's parameters) as recorded, else as planned.

    The first two are None without an adapter, and each is where it is unknown.
    """
    if run.record is None:
        return run.ranks, run.parameters, run.lora_parameters
    record = run.record
    if run.row.tensor_mode not in CONSTRUCTIONS:
        return None, None, record["lora_parameters"]
    return tuple(record["ranks"]), record["adapter_parameters"], record["lora_parameters"]


def lines(table: Table) -> list[Line]:
    """The main table, LoRA first."""
    means = {
        (row, column): mean_and_deviation(100 * score for score in scores.values())
        for row in table.rows
        for column in table.columns
        if (scores := table.scores(row, column))
    }
    best: dict[Column, float] = {}
    for (row, column), (mean, _) in means.items():
        if row.tensor_mode in CONSTRUCTIONS:
            best[column] = max(best.get(column, mean), mean)

    def cell(row: Row, column: Column) -> Cell:
        runs = table.cell(row, column)
        mean, deviation = means.get((row, column), (None, None))
        return Cell(
            mean=mean,
            deviation=deviation,
            scored=len(table.scores(row, column)),
            failed=sum(run.problem not in ("", "missing") for run in runs),
            planned=len(runs),
            # Compared as shown: two rows that both say 84.5 are both best.
            best=mean is not None and row.tensor_mode in CONSTRUCTIONS and f"{mean:.1f}" == f"{best[column]:.1f}",
            paper=paper_value(row, column),
        )

    groups = [(_group(row), row.strategy) for row in table.rows]
    starts = [False, *(above != below for above, below in pairwise(groups))]
    return [
        Line(row, *_adapter_texts(table, row), tuple(cell(row, column) for column in table.columns), start)
        for row, start in zip(table.rows, starts, strict=True)
    ]


def grids(table: Table) -> list[Grid]:
    """The main table's scores once more, by column, with the setting that is swept across; empty without one."""
    if table.swept is None:
        return []
    each = lines(table)
    values = list(dict.fromkeys(value for line in each for value in line.row.values))
    found = []
    for place, column in enumerate(table.columns):
        cells = {(line.row.plain, *line.row.values): line.cells[place] for line in each}
        rows = tuple(
            # A row that the setting does not change has no value of it, and one score for all.
            (row, tuple(cells.get((row, value), cells.get((row,))) for value in values))
            for row in table.plain_rows
        )
        found.append(Grid(column, table.swept, tuple(values), rows))
    return found


def _group(row: Row) -> str:
    return "lora" if row.tensor_mode == "lora" else "construction" if row.is_construction else "reference"


def _adapter_texts(table: Table, row: Row) -> tuple[str, str, str]:
    found: dict[str, tuple[str, str, str]] = {}
    for column in table.columns:
        for run in table.cell(row, column)[:1]:
            ranks, parameters, lora = adapter_of(run)
            found[column.model] = (
                ", ".join(map(str, ranks)) if ranks else "-",
                f"{parameters:,}" if parameters is not None else "-",
                f"{100 * parameters / lora:.1f}" if parameters is not None and lora else "-",
            )
    ranks_, parameters_, percent = (
        texts[0] if len(set(texts)) == 1 else " / ".join(texts) for texts in zip(*found.values(), strict=True)
    )
    return ranks_, parameters_, percent


def has_paper(table: Table) -> list[bool]:
    """For each column, whether we hold any score of the paper for it."""
    return [any(paper_value(row, column) is not None for row in table.rows) for column in table.columns]


def caption(table: Table) -> str:
    """What the numbers of the main table are, in a few sentences."""
    seeds = sorted({len(runs) for row in table.rows for column in table.columns if (runs := table.cell(row, column))})
    over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
    which = {"last": "after the last epoch", "best": "of the best epoch"}[table.score]
    shown = "one seed" if seeds == [1] else f"mean ± standard deviation over {over}"
    text = f"Test score {which} in per cent, {shown}. Bold: the best mean of a column among LoRA and the constructions."
    models = list(dict.fromkeys(column.model for column in table.columns))
    if any("/" in line.parameters + line.ranks for line in lines(table)):
        text += f" Ranks and parameters that differ between backbones: {' / '.join(models)}."
    return text


def comparisons(table: Table) -> list[Comparison]:
    """Each row but LoRA's against LoRA in each column, by column; empty if no row has a LoRA row to compare with."""
    found = []
    for column in table.columns:
        for row in table.rows:
            reference = table.reference(row)
            if row.tensor_mode == "lora" or reference is None or not table.cell(row, column):
                continue
            difference = paired_difference(table.scores(row, column), table.scores(reference, column))
            found.append(Comparison(row, column, difference and _in_points(difference)))
    return found if any(comparison.points for comparison in found) else []


def _in_points(difference: Difference) -> Difference:
    low, high = difference.low, difference.high
    return replace(
        difference,
        mean=100 * difference.mean,
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
    )


def ordered_runs(table: Table) -> list[Run]:
    """All runs, by column, row and seed."""
    return [run for column in table.columns for row in table.rows for run in table.cell(row, column)]


def failures(table: Table) -> list[Run]:
    """The runs that have failed, by column, row and seed; those that are only missing are not among them."""
    return [run for run in ordered_runs(table) if status(run) == "failed"]


def status(run: Run) -> str:
    """completed, failed or missing."""
    return {"": "completed", "missing": "missing"}.get(run.problem, "failed")
