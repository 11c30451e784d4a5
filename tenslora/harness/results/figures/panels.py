"""The panels of a figure: one for each column and rank strategy of a table, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from tenslora.harness.results.figures.labels import spread
from tenslora.harness.results.figures.style import (
    COLOURS,
    FONT_SIZE,
    GREY,
    HEIGHT,
    INK,
    WIDTH,
    shortened,
    styled,
    text_width,
)
from tenslora.harness.results.summary import Cell, Summary
from tenslora.harness.results.table import Column, Row

_LEAST_AXES = 2.15  # in inches: the axes with their margins, from which a long name takes nothing
_MARKERS = {"": "o", "isorank": "o", "isoparameters": "s", "explicit": "D"}


@dataclass(frozen=True)
class Panel:
    """One column of a table under one rank strategy or one protocol.

    Args:
        column: dataset and backbone.
        part: the rank strategy or the protocol of the rows; empty if they have none.
        metric: the name of the headline metric; None before the first record.
        unit: the metric's unit, see `Metric.unit`.
        factor: what a score is multiplied by to be in this unit.
        score: the number that the table shows, "last" or "best".
        setting: the setting that is swept beside construction, strategy and seed; None if there is none, or several.
        cells: the cells by row, in the order of the table's rows. Rows without a strategy are in the panels of all
            strategies.
        constructions: the rows without the setting that is swept, each once.
        width: the panel's width in inches.
    """

    column: Column
    part: str
    metric: str | None
    unit: str
    factor: int
    score: str
    setting: str | None
    cells: dict[Row, Cell]
    constructions: tuple[Row, ...]
    width: float = WIDTH

    @property
    def title(self) -> str:
        """The title above the panel."""
        return " · ".join(filter(None, (self.column.dataset, self.column.model, self.part)))

    @property
    def axis_label(self) -> str:
        """The name of the score's axis."""
        metric = self.metric or "score"
        if {run.scored_on for cell in self.cells.values() for run in cell.runs if run.record} == {"validation"}:
            metric = f"validation {metric}"
        name = f"best {metric}" if self.score == "best" else f"{metric} after the last epoch"
        return self.with_unit(name)

    def with_unit(self, name: str) -> str:
        """A name of the score with the metric's unit."""
        return f"{name} ({self.unit})" if self.unit else name

    @property
    def has_scores(self) -> bool:
        """Whether any run of the panel has a score."""
        return any(cell.scores for cell in self.cells.values())

    @property
    def points(self) -> list[Point]:
        """The rows that have a score."""
        return [
            Point(
                row=row,
                name=name_of(row, self.width),
                parameters=cell.size.parameters or 0,
                scores=tuple(self.factor * score for score in cell.scores.values()),
                mean=cell.mean,
                deviation=cell.deviation or 0.0,
            )
            for row, cell in self.cells.items()
            if cell.mean is not None
        ]

    def note(self, text: str) -> str:
        """The note `text`, which explains the deviation over seeds; empty if every row has a single seed."""
        return text if any(len(cell.runs) > 1 for cell in self.cells.values()) else ""


@dataclass(frozen=True)
class Point:
    """A row with a score.

    Args:
        row: the row.
        name: the row's name in the figure.
        parameters: the number of parameters of the row's adapter; 0 without an adapter.
        scores: the scores of the row's runs by seed, in the metric's unit.
        mean: the mean of the scores, in this unit.
        deviation: the scores' standard deviation, in this unit; 0 for a single seed.
    """

    row: Row
    name: str
    parameters: int
    scores: tuple[float, ...]
    mean: float
    deviation: float

    @property
    def colour(self) -> str:
        """The row's colour."""
        return colour_of(self.row)

    @property
    def marker(self) -> str:
        """The shape of the row's mark, which tells rank strategies apart."""
        return _MARKERS.get(self.row.strategy, "o")


def panels_of(summary: Summary) -> list[Panel]:
    """The panels of a table, by rank strategy and column."""
    panels = []
    for strategy in dict.fromkeys(row.row.strategy for row in summary.rows if row.row.strategy) or [""]:
        for number in range(len(summary.columns)):
            cells = {
                row.row: row.cells[number]
                for row in summary.rows
                if row.row.strategy in ("", strategy) and row.cells[number].runs
            }
            if cells:
                panels.append(panel_of(summary, number, cells, strategy if any(row.strategy for row in cells) else ""))
    return panels


def panel_of(summary: Summary, number: int, cells: dict[Row, Cell], part: str) -> Panel:
    """The panel of some rows of one column.

    Args:
        summary: the summary of the table.
        number: the number of the column.
        cells: the rows and their cells in this column, in the order of the table's rows.
        part: what the rows have in common, see `Panel`.
    """
    table, column = summary.table, summary.columns[number]
    setting = table.swept_setting if any(row.variant for row in cells) else None
    shown = {row.without(table.swept_setting) for row in cells}
    constructions = tuple(row for row in table.rows_without_setting if row in shown)
    return Panel(
        column.column, part, column.metric, column.unit, column.factor, table.score, setting, cells, constructions
    )


def figure_of(
    panels: Sequence[Panel],
    draw: Callable[[SubFigure, Panel], None],
    lines: Callable[[Panel], int] = lambda panel: len(panel.cells),
) -> Figure:
    """A figure of all panels.

    Args:
        panels: the panels of one table.
        draw: a function that draws one panel.
        lines: a function from a panel to the number of lines of text that it must have room for, one below the other.

    Returns:
        The figure.
    """
    columns = len({panel.column for panel in panels})
    across = 1 if len(panels) == 1 else 3 if columns == 3 else 2
    down = math.ceil(len(panels) / across)
    height = max(HEIGHT, 1.0 + 0.16 * max(map(lines, panels)))
    with styled():
        figure = Figure(figsize=(across * panels[0].width, down * height))
        places = figure.subfigures(down, across, squeeze=False)
        for place, panel in zip(places.flat, panels, strict=False):
            place.set_facecolor("none")
            if panel.has_scores:
                draw(place, panel)
            else:
                draw_nothing(place, panel)
    return figure


def axes_in(place: SubFigure, panel: Panel, left: float, right: float, top: float = 0.45, note: str = "") -> Axes:
    """Axes for a panel, with its title above and a note in small print below.

    Args:
        place: the part of the figure for this panel.
        panel: the panel that is drawn there.
        left: the left margin in inches.
        right: the right margin in inches.
        top: the top margin in inches.
        note: a note that explains the marks.

    Returns:
        The axes.
    """
    bottom = 0.62 if note else 0.5
    width, height = place.bbox.width / place.figure.dpi, place.bbox.height / place.figure.dpi
    axes = place.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height), facecolor="none"
    )
    place.text(0.1 / width, 1 - 0.17 / height, panel.title, weight="bold", va="center", ha="left")
    place.text(0.1 / width, 0.12 / height, note, color=GREY, size=FONT_SIZE - 1, va="center", ha="left")
    return axes


def score_limits(spans: Sequence[tuple[Row, float, float]]) -> tuple[float, float]:
    """The limits of a score axis that shows spans of scores.

    Reference rows that are far off do not stretch the axis, because they would flatten all other differences.

    Args:
        spans: for each row, the row, its lowest and its highest score in per cent.
    """
    main = [(low, high) for row, low, high in spans if row.has_adapter] or [(low, high) for _, low, high in spans]
    low, high = min(low for low, _ in main), max(high for _, high in main)
    reach = 1.5 * (high - low)
    for _, below, above in spans:
        if max(high, above) - min(low, below) <= reach:
            low, high = min(low, below), max(high, above)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def limits_of(points: Sequence[Point]) -> tuple[float, float]:
    """The limits of a score axis that shows means, their deviations and all seeds."""
    return score_limits(
        [(p.row, min(*p.scores, p.mean - p.deviation), max(*p.scores, p.mean + p.deviation)) for p in points]
    )


def lora_of(points: Sequence[Point]) -> Point | None:
    """LoRA's point, with which the other points are compared; None if there is none, or several."""
    lora = [point for point in points if point.row.is_lora]
    return lora[0] if len(lora) == 1 else None


def name_of(row: Row, width: float = WIDTH) -> str:
    """A row's name in a figure; the panel's title has its rank strategy.

    Args:
        row: the row.
        width: the panel's width in inches, which limits the length of the name.
    """
    return shortened(" ".join((row.tensor_mode, *row.variant)), int((width - _LEAST_AXES) / text_width(1)))


def colour_of(row: Row) -> str:
    """A row's colour: the construction's, black for LoRA, grey for reference rows."""
    return INK if row.is_lora else COLOURS.get(row.tensor_mode, GREY)


def size_in_points(axes: Axes) -> tuple[float, float]:
    """Width and height of axes in points."""
    dpi = axes.figure.dpi
    return 72 * axes.bbox.width / dpi, 72 * axes.bbox.height / dpi


def draw_leader(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw a thin line from a mark to its label.

    Args:
        axes: the axes to draw in.
        start: the start of the line, in typographic points from the axes' lower left corner.
        end: the end of the line, likewise.
        colour: the line's colour.
    """
    arrow: dict[str, Any] = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "", end, start, xycoords="axes points", textcoords="axes points", arrowprops=arrow, annotation_clip=False
    )


def name_rows(axes: Axes, panel: Panel, rows: Sequence[Row], ends: Sequence[tuple[float, float]]) -> None:
    """Write the rows' names to the right of the axes, each with a thin line from the end of the row's curve.

    Args:
        axes: the axes that the curves are drawn in.
        panel: the panel of these axes.
        rows: the rows.
        ends: for each row, the end of its curve in typographic points from the axes' lower left corner.
    """
    width, height = size_in_points(axes)
    heights = spread([y for _, y in ends], FONT_SIZE * 1.2, (FONT_SIZE / 2, height))
    for row, end, y in zip(rows, ends, heights, strict=True):
        if 0 <= end[1] <= height:
            draw_leader(axes, (end[0] + 4, end[1]), (width + 10, y), colour_of(row))
        axes.annotate(
            name_of(row, panel.width), (width + 12, y), xycoords="axes points", va="center_baseline",
            annotation_clip=False, weight="bold" if row.is_lora else "normal",
        )  # fmt: skip


def draw_nothing(place: SubFigure, panel: Panel) -> None:
    """Draw a panel that has nothing to show yet."""
    axes = axes_in(place, panel, left=0.6, right=0.15)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no finished run yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
