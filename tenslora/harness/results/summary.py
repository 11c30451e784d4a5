"""The summary of a table: every number and sentence that its files, its figures and Weights & Biases show.

`summarize` computes the summary once, and each format only lays it out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from tenslora.harness.results.paper import Verdict, paper_value, verdicts
from tenslora.harness.results.statistics import Difference, paired_differences
from tenslora.harness.results.table import AdapterSize, Column, Row, Run, Table, mean_and_deviation
from tenslora.harness.training.metrics import HUNDREDFOLD

MINUS = "\N{MINUS SIGN}"

ADAPTER_HEADS = ("construction", "ranks", "parameters", "% of LoRA", "first step")
"""The main table's columns that come before the scores."""

COMPARISON_HEADS = ("difference", "95 % interval", "p", "Holm's p", "permutation p", "detectable", "seeds")
"""The columns of `Comparison.texts`."""

COMPARISON_NOTE = (
    "Difference: of the means over the seeds that both have, in points, with its 95 % confidence interval. p: of a "
    "two-sided paired t-test. Holm's p: the same after Holm's correction for all rows of a dataset; a row is better or "
    "worse than LoRA if it is at most 0.05. Permutation p: of the exact test that flips the signs of the seeds' "
    "differences, and in brackets the smallest that so many seeds allow. Detectable: the smallest true difference that "
    "so many seeds show with a probability of 80 % (paired t-test at 0.05, uncorrected), if the seeds differ as much "
    "as here."
)


@dataclass(frozen=True)
class Cell:
    """A row's runs in one column. There are no runs if the table does not combine this row with this column.

    Args:
        runs: the runs by rising seed; none in a column that shows the mean of others.
        seeds: the number of seeds that the cell is for.
        scores: the scores of the completed runs by seed, as fractions.
        mean: the mean of the scores, in the metric's unit; None without a score.
        deviation: the scores' standard deviation in this unit; None with fewer than two scores.
        best: whether no other row with an adapter shows a better mean in this column.
        paper: the paper's score in per cent; None where we have no source for it.
        difference: the difference from LoRA in the metric's unit; None for LoRA itself, or if no seed is finished for
            both.
        tuned: the value of the tuned setting with which the runs trained, as text; empty if the row is not tuned.
    """

    runs: tuple[Run, ...]
    seeds: int
    scores: dict[int, float]
    mean: float | None
    deviation: float | None
    best: bool
    paper: float | None
    difference: Difference | None
    tuned: str = ""

    @property
    def size(self) -> AdapterSize:
        """The size of the runs' adapters."""
        return _of_known_size(self.runs).size if self.runs else AdapterSize(None, None, None)

    @property
    def failed(self) -> int:
        """How many of the runs have failed."""
        return sum(run.status == "failed" for run in self.runs)

    @property
    def problems(self) -> list[str]:
        """Why runs have no score, each reason once."""
        return list(dict.fromkeys(run.problem for run in self.runs if run.problem))

    @property
    def number(self) -> str:
        """The mean as text; empty without a score."""
        return "" if self.mean is None else f"{round(self.mean, 1) + 0.0:.1f}".replace("-", MINUS)

    @property
    def spread(self) -> str:
        """The standard deviation as text; empty with fewer than two scores."""
        return "" if self.deviation is None else f"{self.deviation:.1f}"

    @property
    def paper_number(self) -> str:
        """The paper's score as text; empty where there is none."""
        return "" if self.paper is None else f"{self.paper:.2f}"

    @property
    def remark(self) -> str:
        """A remark on runs without a score: "missing", "running", "failed", "(3 of 5 seeds, 1 failed)" or nothing."""
        if not self.scores:
            statuses = {run.status for run in self.runs} or {"missing"} if self.seeds else set()
            return next((status for status in ("failed", "running", "missing") if status in statuses), "")
        if len(self.scores) == self.seeds:
            return ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"({len(self.scores)} of {self.seeds} seeds{failed})"

    def text(self, bold: str, plus_minus: str) -> str:
        """Mean, standard deviation and remark.

        Args:
            bold: a format string that marks the best mean; {} stands for the mean.
            plus_minus: the sign between mean and deviation.
        """
        number = bold.format(self.number) if self.best else self.number
        return " ".join(filter(None, (number, plus_minus if self.spread else "", self.spread, self.remark)))


@dataclass(frozen=True)
class OtherScores:
    """The scores of a column by metrics other than the headline one, after the last epoch.

    Args:
        column: the column of the table.
        names: the names of the metrics.
        rows: the rows that have a score, each with its texts by name: the mean, and the standard deviation over seeds.
    """

    column: Column
    names: tuple[str, ...]
    rows: tuple[tuple[Row, tuple[str, ...]], ...]


@dataclass(frozen=True)
class SummaryRow:
    """A row of the main table.

    Args:
        row: the row of the table.
        sizes: the sizes of the row's adapters, one per backbone.
        cells: the cells, one per column of the table.
        starts_group: whether a rule separates this row from the row above.
    """

    row: Row
    sizes: tuple[AdapterSize, ...]
    cells: tuple[Cell, ...]
    starts_group: bool

    @property
    def ranks(self) -> str:
        """The ranks as text; a dash if unknown. If backbones differ, their ranks are joined by " / "."""
        return _joined([size.texts[0] for size in self.sizes])

    @property
    def parameters(self) -> str:
        """The adapter's number of parameters as text, joined as in `ranks`."""
        return _joined([size.texts[1] for size in self.sizes])

    @property
    def percent_of_lora(self) -> str:
        """The number of parameters in per cent of LoRA's as text, joined as in `ranks`."""
        return _joined([size.texts[2] for size in self.sizes])

    @property
    def first_step(self) -> str:
        """The first step as a multiple of LoRA's as text, joined as in `ranks`."""
        return _joined([size.texts[3] for size in self.sizes])

    @property
    def adapter_texts(self) -> tuple[str, str, str, str]:
        """What `ADAPTER_HEADS` has after the construction: ranks, parameters, per cent of LoRA, and first step."""
        return self.ranks, self.parameters, self.percent_of_lora, self.first_step


@dataclass(frozen=True)
class SummaryColumn:
    """A column of the main table.

    Args:
        column: dataset and backbone.
        metric: the name of the headline metric; None before the first record.
        unit: the metric's unit, see `Metric.unit`.
        factor: what a score is multiplied by to be in this unit.
        larger_is_better: whether a larger score of this metric is a better one.
        has_paper: whether we have any score of the paper for this column.
        tuned: the head of the column of chosen values: the tuned setting without its group, or "tuned" if the table
            joins tables of which several settings may be tuned; empty if nothing is tuned.
    """

    column: Column
    metric: str | None
    unit: str
    factor: int
    larger_is_better: bool
    has_paper: bool
    tuned: str = ""


@dataclass(frozen=True)
class Grid:
    """One column of the main table, with a column of its own for each value of the setting that is swept.

    Args:
        column: dataset and backbone.
        setting: the setting that is swept.
        values: the values of the setting.
        rows: each row without the setting, with a cell per value; a cell is None where the table has no run.
    """

    column: Column
    setting: str
    values: tuple[str, ...]
    rows: tuple[tuple[Row, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Comparison:
    """The comparison of a row with LoRA in one column.

    Args:
        row: the row that is compared.
        column: dataset and backbone.
        difference: the difference from LoRA in the metric's unit; None if no seed is finished for both.
    """

    row: Row
    column: Column
    difference: Difference | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The values of `COMPARISON_HEADS`; a dash where unknown."""
        one = self.difference
        if one is None:
            return *["-"] * (len(COMPARISON_HEADS) - 1), "0"
        interval = "-" if one.low is None or one.high is None else f"[{signed(one.low)}, {signed(one.high)}]"
        permutation = "-"
        if one.permutation_p is not None and one.smallest_permutation_p is not None:
            permutation = f"{one.permutation_p:.4f} ({one.smallest_permutation_p:.4f})"
        detectable = "-" if one.detectable is None else f"{one.detectable:.2f}"
        p_values = _p_value(one.p), _p_value(one.holm_p)
        return signed(one.mean), interval, *p_values, permutation, detectable, str(one.seeds)


@dataclass(frozen=True)
class Summary:
    """The summary of a table.

    Args:
        table: the table, with its name, title and notes.
        columns: the columns of the main table.
        rows: the rows of the main table.
        comparisons: the comparison of each other row with LoRA, by column; empty if there is no difference to show.
        verdicts: the runs' verdicts on the paper's claims, by claim and protocol.
    """

    table: Table
    columns: tuple[SummaryColumn, ...]
    rows: tuple[SummaryRow, ...]
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def protocols(self) -> list[str]:
        """The protocols under which the paper's claims are judged; a single empty name for a table of one."""
        return list(dict.fromkeys(verdict.protocol for verdict in self.verdicts))

    @property
    def verdicts_by_claim(self) -> list[list[Verdict]]:
        """The verdicts on each claim, one for each protocol."""
        by_claim: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts:
            by_claim.setdefault(verdict.claim, []).append(verdict)
        return list(by_claim.values())

    @cached_property
    def runs(self) -> list[Run]:
        """All runs by column, row and seed."""
        return [run for number in range(len(self.columns)) for row in self.rows for run in row.cells[number].runs]

    @property
    def failures(self) -> list[Run]:
        """The runs that have failed, in the order of `runs`. A missing run has not failed."""
        return [run for run in self.runs if run.status == "failed"]

    @property
    def has_scores(self) -> bool:
        """Whether any run has a score."""
        return any(cell.scores for row in self.rows for cell in row.cells)

    @property
    def score_name(self) -> str:
        """What the scores are: "Test score", "Validation score", or "Score" if the runs differ in this."""
        splits = {run.scored_on for run in self.runs if run.scored_on} or {"test"}
        return f"{splits.pop()} score".capitalize() if len(splits) == 1 else "Score"

    @cached_property
    def trials(self) -> Summary | None:
        """The summary of a tuned table's trials, in which the chosen values are the best; None for any other table."""
        tuning = self.table.tuning
        if tuning is None:
            return None
        chosen = {(row, column) for (_, column), row in tuning.chosen.items()}
        summary = summarize(tuning.trials, compare=False)
        rows = tuple(
            replace(
                row,
                cells=tuple(
                    replace(cell, best=(row.row, column.column) in chosen)
                    for cell, column in zip(row.cells, summary.columns, strict=True)
                ),
            )
            for row in summary.rows
        )
        return replace(summary, rows=rows)

    @property
    def trials_caption(self) -> str:
        """A few sentences that explain the scores of a tuned table's trials; empty for any other table."""
        if self.trials is None or self.table.tuning is None:
            return ""
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in self.trials.runs}))
        sentences = [
            f"{self.trials.score_name} after the last epoch with each value of {self.table.tuning.setting}. The runs "
            f"have the seeds {seeds} and train on a part of the training split; the best mean decides.",
            "Bold: the chosen value.",
            self.table.tuning.edge_note,
            *[
                _one_value_for_all(grid, column.larger_is_better)
                for grid, column in zip(self.trials.grids, self.trials.columns, strict=True)
            ],
        ]
        return " ".join(filter(None, sentences))

    def _other_data(self, column: Column) -> str:
        """A warning if a column's runs were scored on different numbers of examples; empty if no setting changed it."""
        counts = {
            run.record.get("test_examples", 0) + run.record.get("validation_examples", 0)
            for run in self.table.runs
            if run.record and run.column == column and not any(word.startswith("dataset.") for word in run.row.variant)
        }
        if len(counts) < 2:
            return ""
        numbers = " and ".join(f"{count:,}" for count in sorted(counts))
        return f"The runs on {column.label} were scored on {numbers} examples: the data has changed between them."

    @property
    def caption(self) -> str:
        """A few sentences that explain the numbers of the main table."""
        counts = sorted({len(cell.runs) for row in self.rows for cell in row.cells if cell.runs})
        seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"
        numbers = "one seed" if counts == [1] else f"mean ± standard deviation over {seeds}"
        epoch = {"last": "after the last epoch", "best": "of the best epoch"}[self.table.score]
        sentences = [
            f"{self.score_name} {epoch}{self._units}, {numbers}.",
            "Bold: the best mean of a column among LoRA and the constructions.",
        ]
        if any(size.relative_step is not None for row in self.rows for size in row.sizes):
            at_equal = f" at equal {self.table.tuning.name}" if self.table.tuning else ""
            sentences.append(
                f"First step: how far AdamW's first step moves the adapted matrices, as a multiple of LoRA's{at_equal}."
            )
        if self.table.tuning:
            name, setting = self.table.tuning.name, self.table.tuning.setting
            sentences.append(f"{name}: the row's {setting}, chosen on other seeds by its validation score.")
        elif any(column.tuned for column in self.columns):
            sentences.append("Tuned: the value that was chosen for the row on other seeds, by its validation score.")
        if lower := dict.fromkeys(column.metric for column in self.columns if not column.larger_is_better):
            sentences.append(f"A lower {' or '.join(map(str, lower))} is better.")
        if any("/" in row.parameters + row.ranks for row in self.rows):
            models = dict.fromkeys(column.model for column in self.table.columns)
            sentences.append(f"Ranks, parameters and first steps that differ between backbones: {' / '.join(models)}.")
        sentences += filter(None, map(self._other_data, self.table.columns))
        if means := {mean.dataset: len(of) for mean, of in self.table.group_columns.items()}:
            counts_of = ", ".join(f"{name} ({count})" for name, count in means.items())
            sentences.append(f"Means over several columns, and their number: {counts_of}.")
        return " ".join(sentences)

    @property
    def _units(self) -> str:
        units = {"%": " in per cent", HUNDREDFOLD: " times 100", "": ""}
        known: dict[str, dict[str, None]] = {}
        for column in self.columns:
            if column.metric:
                known.setdefault(column.unit, {})[column.metric] = None
        if len(known) < 2:
            return units[next(iter(known), "%")]
        by_unit = [" and ".join(metrics) + (units[unit] or " as it is") for unit, metrics in known.items()]
        return f" ({', '.join(by_unit)})"

    @cached_property
    def other_scores(self) -> list[OtherScores]:
        """The scores of each column by metrics other than the headline one; without the columns that have none."""
        tables = []
        for number, column in enumerate(self.table.columns):
            of_rows = {row.row: [run.other_scores for run in row.cells[number].runs] for row in self.rows}
            names = list(dict.fromkeys(name for runs in of_rows.values() for scores in runs for name in scores))
            if names:
                rows = tuple(
                    (row, tuple(_mean_text([scores[name] for scores in runs if name in scores]) for name in names))
                    for row, runs in of_rows.items()
                    if any(runs)
                )
                tables.append(OtherScores(column, tuple(names), rows))
        return tables

    @cached_property
    def grids(self) -> list[Grid]:
        """The scores of each column by the setting that is swept; empty unless exactly one setting is swept."""
        setting = self.table.swept_setting
        if setting is None:
            return []
        values = tuple(dict.fromkeys(value for row in self.rows if (value := row.row.value_of(setting)) is not None))
        grids = []
        for number, column in enumerate(self.table.columns):
            cells = {(row.row.without(setting), row.row.value_of(setting)): row.cells[number] for row in self.rows}
            rows = tuple(
                # A row that the setting does not change has no value of it, and the same score under each.
                (row, tuple(cells.get((row, value), cells.get((row, None))) for value in values))
                for row in self.table.rows_without_setting
            )
            grids.append(Grid(column, setting, values, rows))
        return grids


def summarize(table: Table, compare: bool = True) -> Summary:
    """Compute the summary of a table.

    Args:
        table: the table, finished or not.
        compare: whether the rows are compared with LoRA, and with the paper's claims.
    """
    columns_shown = [*table.columns, *table.group_columns]
    differences = _differences(table, columns_shown) if compare else {}
    means = {
        (row, column): mean_and_deviation(table.scale(column).factor * score for score in scores.values())
        for row in table.rows
        for column in columns_shown
        if (scores := table.scores(row, column))
    }
    best: dict[Column, float] = {}
    for (row, column), (mean, _) in means.items():
        if row.has_adapter:
            better = max if table.scale(column).larger_is_better else min
            best[column] = better(best.get(column, mean), mean)

    def cell(row: Row, column: Column) -> Cell:
        mean, deviation = means.get((row, column), (None, None))
        return Cell(
            runs=tuple(table.cell(row, column)),
            seeds=len(table.seeds(row, column)),
            scores=table.scores(row, column),
            mean=mean,
            deviation=deviation,
            # The rounded means are compared: two rows that both show 84.5 are both best.
            best=mean is not None and row.has_adapter and f"{mean:.1f}" == f"{best[column]:.1f}",
            paper=paper_value(row, column),
            difference=differences.get((row, column)),
            tuned=table.tuning.text(row, column) if table.tuning else _tuned_text(table.cell(row, column)),
        )

    groups = [(row.is_lora, row.is_construction, row.strategy) for row in table.rows]
    starts = [False, *(above != below for above, below in pairwise(groups))]
    rows = tuple(
        SummaryRow(row, _sizes(table, row), tuple(cell(row, column) for column in columns_shown), starts_group)
        for row, starts_group in zip(table.rows, starts, strict=True)
    )
    columns = tuple(
        SummaryColumn(
            column=column,
            metric=table.metric(column),
            unit=table.scale(column).unit,
            factor=table.scale(column).factor,
            larger_is_better=table.scale(column).larger_is_better,
            has_paper=any(row.cells[number].paper is not None for row in rows),
            tuned=_tuned_head(table, column),
        )
        for number, column in enumerate(columns_shown)
    )
    comparisons = tuple(Comparison(row, column, difference) for (row, column), difference in differences.items())
    if not any(comparison.difference for comparison in comparisons):
        comparisons = ()
    return Summary(table, columns, rows, comparisons, tuple(verdicts(table)) if compare else ())


def signed(value: float) -> str:
    """A difference in points: two decimals, always a sign, a true minus.

    >>> signed(1.234), signed(-0.001)
    ('+1.23', '−0.00')
    """
    return f"{value:+.2f}".replace("-", MINUS)


def one_line(text: str) -> str:
    """`text` with each stretch of white space, line breaks included, as one space."""
    return " ".join(text.split())


def _one_value_for_all(grid: Grid, larger_is_better: bool) -> str:
    """A sentence on what the rows of a grid lose if all get one value; empty with fewer than two rows or values."""
    complete = [
        number
        for number in range(len(grid.values))
        if all((cell := cells[number]) is not None and cell.mean is not None for _, cells in grid.rows)
    ]
    if len(grid.rows) < 2 or len(complete) < 2:
        return ""
    sign = 1 if larger_is_better else -1
    scores = {
        row: [sign * cell.mean if cell and cell.mean is not None else -math.inf for cell in cells]
        for row, cells in grid.rows
    }
    shared = max(complete, key=lambda number: statistics.fmean(of_row[number] for of_row in scores.values()))
    lost = {row: max(of_row) - of_row[shared] for row, of_row in scores.items()}
    most = max(lost, key=lambda row: lost[row])
    return (
        f"If all rows of {grid.column.label} get the same value, {grid.values[shared]} is the best; it costs a row "
        f"{statistics.fmean(lost.values()):.1f} on average, and {most.label} the most, {lost[most]:.1f}."
    )


def _tuned_head(table: Table, column: Column) -> str:
    if table.tuning:
        return table.tuning.name if column in table.columns else ""
    return "tuned" if any(run.tuned for run in table.runs if run.column == column) else ""


def _tuned_text(runs: Sequence[Run]) -> str:
    return runs[0].tuned_text if runs else ""


def _differences(table: Table, columns: list[Column]) -> dict[tuple[Row, Column], Difference | None]:
    """The difference of each row from its LoRA row in points, by column. Rows without a LoRA row are left out."""
    known: dict[tuple[Row, Column], Difference | None] = {}
    for column in columns:
        for lora in (row for row in table.rows if row.is_lora):
            rows = [row for row in table.compared_with(lora) if table.seeds(row, column)]
            scores = {row: table.scores(row, column) for row in rows}
            for row, difference in paired_differences(scores, table.scores(lora, column)).items():
                known[row, column] = difference.times(table.scale(column).factor) if difference else None
    places = [(row, column) for column in columns for row in table.rows]
    return {place: known[place] for place in places if place in known}


def _mean_text(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    mean, deviation = mean_and_deviation(scores)
    return f"{round(mean, 1) + 0.0:.1f}".replace("-", MINUS) + ("" if deviation is None else f" ± {deviation:.1f}")


def _p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _sizes(table: Table, row: Row) -> tuple[AdapterSize, ...]:
    cells = [(column.model, table.cell(row, column)) for column in table.columns]
    runs = {model: _of_known_size(cell) for model, cell in cells if cell}
    return tuple(run.size for run in runs.values())


def _of_known_size(runs: Sequence[Run]) -> Run:
    # Without a record the size of a backbone that declares no geometry is not known.
    return next((run for run in runs if run.record), runs[0])


def _joined(texts: list[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)
