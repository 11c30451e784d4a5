"""Scores by the setting that is swept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure, SubFigure

from tenslora.harness.results.figures.panels import (
    Panel,
    axes_in,
    figure_of,
    limits_of,
    name_of,
    name_rows,
    size_in_points,
)
from tenslora.harness.results.figures.style import INK, shortened, text_width


def score_by_setting(panels: Sequence[Panel], ring_best: bool = False) -> Figure:
    """Draw scores over the values of the setting that is swept: means over seeds with their standard deviations.

    A construction's means are connected if the values are numbers. A row that the setting does not change is a line
    across all values.

    Args:
        panels: the panels of one table.
        ring_best: whether a ring marks the best cells.
    """
    return figure_of(panels, partial(_draw, ring_best=ring_best), lines=lambda panel: len(panel.constructions))


def _draw(place: SubFigure, panel: Panel, ring_best: bool) -> None:
    points = panel.points
    # A panel of rows that the setting does not change has no value to name.
    setting = panel.setting
    values = list(dict.fromkeys(v for row in panel.cells if (v := row.value_of(setting)) is not None)) or [""]
    numbers = all(map(_is_number, values))
    rows = [row for row in panel.constructions if any(point.row.without(setting) == row for point in points)]
    names = text_width(max(len(name_of(row, panel.width)) for row in rows))
    note = panel.note("mean ± standard deviation over seeds" + ("; ring: chosen" if ring_best else ""))
    axes = axes_in(place, panel, left=0.6, right=0.4 + names, note=note)
    low, high = limits_of(points)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylim(low, high)
    width, height = size_in_points(axes)
    characters = int(width / 72 / len(values) / text_width(1))  # the number of characters that fit below a value
    axes.set_xticks(range(len(values)), [shortened(value, max(3, characters - 1)) for value in values])
    axes.set_xlabel(panel.setting or "")
    axes.set_ylabel(panel.axis_label)
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)

    ends: list[tuple[float, float]] = []  # (x, score) where each row ends and the line to the row's name begins
    for number, row in enumerate(rows):
        of_row = [point for point in points if point.row.without(setting) == row]
        for point in (point for point in of_row if point.row.value_of(setting) is None):
            axes.axhspan(point.mean - point.deviation, point.mean + point.deviation, color=INK, alpha=0.08, lw=0)
            axes.axhline(point.mean, color=point.colour, linewidth=0.8, linestyle=(0, (4, 2)))
        own = [point for point in of_row if point.row.value_of(setting) is not None]
        if not own:
            ends.append((len(values) - 0.5, of_row[0].mean))
            continue
        shift = 0.5 * ((number + 0.5) / len(rows) - 0.5)  # so that error bars do not hide each other
        x = [values.index(point.row.value_of(setting) or "") + shift for point in own]
        axes.errorbar(
            x, [point.mean for point in own], yerr=[point.deviation for point in own], fmt=own[0].marker,
            color=own[0].colour, markersize=4.5, elinewidth=1.1, capsize=0, linestyle="-" if numbers else "none",
            linewidth=1.1, zorder=3,
        )  # fmt: skip
        for at, point in zip(x, own, strict=True):
            if ring_best and panel.cells[point.row].best:
                axes.scatter([at], [point.mean], s=70, facecolors="none", edgecolors=point.colour, zorder=4)
        ends.append((x[-1], own[-1].mean))

    marks = [((x + 0.5) / len(values) * width, (score - low) / (high - low) * height) for x, score in ends]
    name_rows(axes, panel, rows, marks)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
