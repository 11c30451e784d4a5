"""How well the first steps and the numbers of parameters order the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenslora.harness.results.paper import PROTOCOL
from tenslora.harness.results.summary import MINUS, Cell, Summary
from tenslora.harness.results.table import Column, Row

LEAST_ROWS = 4
"""The least number of rows with an adapter for which a rank correlation says anything."""

LEAST_SPAN = 1.2
"""The least ratio of the largest first step to the smallest for which they order anything."""


@dataclass(frozen=True)
class Ordering:
    """How well the first steps and the numbers of parameters order the rows of one column under one protocol.

    Args:
        column: dataset and backbone.
        protocol: the protocol; empty for a table of one.
        rows: the number of rows with an adapter and a score.
        span: the difference between their best and their worst mean, in the metric's unit.
        first_step: the rank correlation of the means with the first steps; None if these are about equal or unknown.
        parameters: the same with the numbers of parameters.
        first_step_under_first: the same with the first steps under the table's first protocol; None for that protocol.
        scores_under_first: the same with the means under the first protocol; None likewise.
    """

    column: Column
    protocol: str
    rows: int
    span: float
    first_step: float | None
    parameters: float | None
    first_step_under_first: float | None = None
    scores_under_first: float | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The values of `ordering_heads` of several protocols."""
        correlations = self.first_step, self.parameters, self.first_step_under_first, self.scores_under_first
        return str(self.rows), f"{self.span:.1f}", *map(correlation_text, correlations)


def ordering_heads(found: Sequence[Ordering]) -> list[str]:
    """The heads of the columns of `Ordering.texts`. The last two are for several protocols only.

    Args:
        found: the result of `orderings`, which is not empty.
    """
    first, *others = dict.fromkeys(one.protocol for one in found)
    return [
        *("rows", "span", "first step", "parameters"),
        *((f"first step under {first}", f"score under {first}") if others else ()),
    ]


def ordering_note(found: Sequence[Ordering]) -> str:
    """A few sentences that explain the numbers.

    Args:
        found: the result of `orderings`.
    """
    several = len({one.protocol for one in found}) > 1
    return (
        "Rows: those with an adapter and a score. Span: between their best and their worst mean. The other numbers are "
        "Spearman's rank correlations of the rows' means with their first steps and their numbers of parameters"
        + ("; and with their first steps and their means under the first protocol." if several else ".")
    )


def _protocols(summary: Summary) -> list[str]:
    # In order; a single empty name for a table of one.
    if summary.table.swept_setting != PROTOCOL:
        return [""]
    return list(dict.fromkeys(row.value_of(PROTOCOL) or "" for row in summary.table.rows))


def cells_by_protocol(summary: Summary, number: int) -> dict[str, dict[Row, Cell]]:
    """The cells of one column that have runs, by protocol and by row without its protocol.

    Args:
        summary: the summary of the table.
        number: the column's number.
    """
    cells: dict[str, dict[Row, Cell]] = {protocol: {} for protocol in _protocols(summary)}
    for row in summary.rows:
        protocol, cell = row.row.value_of(PROTOCOL) or "", row.cells[number]
        if protocol in cells and cell.runs:
            cells[protocol][row.row.without(PROTOCOL)] = cell
    return cells


def first_steps(cells: Mapping[Row, Cell]) -> dict[Row, float]:
    """The first step of each row that has a score and an adapter, as a multiple of LoRA's.

    Rows may have an alpha or a learning rate of their own, as tuned ones do. Their first steps are in proportion to it.

    Args:
        cells: the rows' cells in one column.
    """
    scales = {row: next(filter(None, (run.step_scale for run in cell.runs)), None) for row, cell in cells.items()}
    lora = next((scale for row, scale in scales.items() if row.is_lora), None)
    steps = {}
    for row, cell in cells.items():
        if cell.mean is not None and cell.size.relative_step:
            scale = scales[row]
            steps[row] = cell.size.relative_step * (scale / lora if scale and lora else 1.0)
    return steps


def orderings(summary: Summary) -> list[Ordering]:
    """What orders the rows of a table, for each column and protocol with at least four rows.

    A table that sweeps a setting has none.

    Args:
        summary: the summary of the table.
    """
    found = []
    for number, column in enumerate(summary.columns[: len(summary.table.columns)]):
        first: tuple[dict[Row, float], dict[Row, float]] | None = None
        for protocol, cells in cells_by_protocol(summary, number).items():
            if any(row.variant for row in cells):
                continue
            means = {row: cell.mean for row, cell in cells.items() if row.has_adapter and cell.mean is not None}
            steps = first_steps(cells)
            counts = {row: cells[row].size.parameters for row in means}
            if len(means) < LEAST_ROWS:
                continue
            found.append(
                Ordering(
                    column.column,
                    protocol,
                    len(means),
                    max(means.values()) - min(means.values()),
                    _correlation(steps, means, LEAST_SPAN),
                    _correlation({row: float(count) for row, count in counts.items() if count}, means),
                    *((_correlation(first[0], means, LEAST_SPAN), _correlation(first[1], means)) if first else ()),
                )
            )
            first = first or (steps, means)
    return found


def spearman(steps: Sequence[float], scores: Sequence[float]) -> float:
    """The Spearman correlation of two lists of numbers; NaN if the numbers of a list are all equal."""
    from scipy import stats  # imported here, because scipy takes a second

    return (
        math.nan if len(set(steps)) == 1 or len(set(scores)) == 1 else float(stats.spearmanr(steps, scores).statistic)
    )


def correlation_text(value: float | None) -> str:
    """A correlation with two decimals and a true minus; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}".replace("-", MINUS)


def _correlation(one: Mapping[Row, float], other: Mapping[Row, float], span: float = 1.0) -> float | None:
    both = [row for row in one if row in other]
    values = [one[row] for row in both]
    if len(both) < LEAST_ROWS or (span > 1 and max(values) < span * min(values)):
        return None
    found = spearman(values, [other[row] for row in both])
    return None if math.isnan(found) else found
