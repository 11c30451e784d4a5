"""Scores over the size of the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tenslora.harness.results.figures.labels import leader_of, place_labels
from tenslora.harness.results.figures.panels import (
    Panel,
    Point,
    axes_in,
    draw_leader,
    figure_of,
    limits_of,
    lora_of,
    name_of,
    name_rows,
    panel_of,
    panels_of,
    size_in_points,
)
from tenslora.harness.results.figures.style import FONT_SIZE, INK, text_width
from tenslora.harness.results.ordering import (
    LEAST_ROWS,
    LEAST_SPAN,
    cells_by_protocol,
    correlation_text,
    first_steps,
    spearman,
)
from tenslora.harness.results.summary import Summary
from tenslora.harness.results.table import Row

_SHAPES = {"isorank": "circle", "isoparameters": "square"}


def panels_by_first_step(summary: Summary) -> list[Panel]:
    """The panels of this figure: one for each column and protocol, with the rows of all rank strategies.

    Left out are panels with fewer than four rows that have a score and a first step, those whose first steps are all
    about equal, and everything in a table that sweeps a setting.

    Args:
        summary: the summary of the table.
    """
    panels = []
    for number in range(len(summary.table.columns)):
        for protocol, cells in cells_by_protocol(summary, number).items():
            steps = first_steps(cells).values()
            is_swept = any(row.variant for row in cells)
            if not is_swept and len(steps) >= LEAST_ROWS and max(steps) >= LEAST_SPAN * min(steps):
                panels.append(panel_of(summary, number, cells, protocol))
    return panels


def score_by_first_step(panels: Sequence[Panel]) -> Figure:
    """Draw scores over the first step as a multiple of LoRA's: means over seeds with their standard deviations.

    Below each panel stands the Spearman correlation of the means with the first steps, over all rows with an adapter.

    Args:
        panels: the result of `panels_by_first_step`.
    """
    return figure_of(panels, _draw, lines=lambda panel: 4 * len(panel.cells) // 3)


def panels_of_trials(trials: Summary) -> list[Panel]:
    """The panels of `trials_by_first_step`: one for each column and rank strategy.

    There are none unless the tuned setting changes the first steps of all rows.

    Args:
        trials: the summary of a tuned table's trials.
    """
    panels = panels_of(trials)
    curves = [curve for panel in panels for curve in _curves(panel).values()]
    changes = [max(steps) >= LEAST_SPAN * min(steps) for curve in curves if len(steps := [x for x, _ in curve]) > 1]
    return panels if changes and all(changes) else []


def trials_by_first_step(panels: Sequence[Panel]) -> Figure:
    """Draw the scores of a tuned table's trials over the size of their first step: one curve for each row.

    Where the rows' curves have their tops above one another, the same first step suits all of them.

    Args:
        panels: the result of `panels_of_trials`.
    """
    draw = partial(_draw_trials, panels=panels)
    return figure_of(panels, draw, lines=lambda panel: len(panel.constructions))


def _curves(panel: Panel) -> dict[Row, list[tuple[float, Point]]]:
    """The points of each row, without the swept setting, by rising first step; without those of an unknown step."""
    curves: dict[Row, list[tuple[float, Point]]] = {}
    for point in panel.points:
        step = next(filter(None, (run.first_step for run in panel.cells[point.row].runs)), None)
        if step:
            curves.setdefault(point.row.without(panel.setting), []).append((step, point))
    return {row: sorted(curve, key=lambda pair: pair[0]) for row, curve in curves.items()}


def _draw_trials(place: SubFigure, panel: Panel, panels: Sequence[Panel]) -> None:
    # All panels of a column have the same axes, so that the rank strategies can be compared.
    alike = [
        pair for each in panels if each.column == panel.column for curve in _curves(each).values() for pair in curve
    ]
    curves = _curves(panel)
    names = text_width(max(len(name_of(row, panel.width)) for row in curves))
    note = panel.note("mean ± standard deviation over seeds; ring: chosen")
    axes = axes_in(place, panel, left=0.6, right=0.4 + names, note=note)
    low, high = limits_of([point for _, point in alike])
    left, right = _log_axis(axes, [step for step, _ in alike], 0.04)
    axes.set_ylim(low, high)
    axes.set_xlabel("first step (Frobenius norm)")
    axes.set_ylabel(panel.axis_label)
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    width, height = size_in_points(axes)
    ends = []
    for curve in curves.values():
        steps, points = [step for step, _ in curve], [point for _, point in curve]
        axes.errorbar(
            steps, [point.mean for point in points], yerr=[point.deviation for point in points],
            fmt=points[0].marker, color=points[0].colour, markersize=4.5, elinewidth=0.8, capsize=0, linestyle="-",
            linewidth=1.1, zorder=3,
        )  # fmt: skip
        for step, point in curve:
            if panel.cells[point.row].best:
                axes.scatter([step], [point.mean], s=70, facecolors="none", edgecolors=point.colour, zorder=4)
        x = math.log(steps[-1] / left) / math.log(right / left) * width
        ends.append((x, (points[-1].mean - low) / (high - low) * height))
    name_rows(axes, panel, list(curves), ends)


def _log_axis(axes: Axes, steps: Sequence[float], margin: float) -> tuple[float, float]:
    """Give the axes a logarithmic x axis for these steps.

    Args:
        axes: the axes.
        steps: the first steps.
        margin: the room on either side, as a part of the logarithm of the steps' span.

    Returns:
        The limits of the axis.
    """
    span = math.log(max(steps) / min(steps))
    left, right = min(steps) * math.exp(-margin * span), max(steps) * math.exp(margin * span)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < math.log(100) else (1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return left, right


def _draw(place: SubFigure, panel: Panel) -> None:
    step_of = first_steps(panel.cells)
    points = [point for point in panel.points if point.row in step_of]
    steps = [step_of[point.row] for point in points]
    correlation = correlation_text(spearman(steps, [point.mean for point in points]))
    strategies = [name for name in dict.fromkeys(point.row.strategy for point in points) if name]
    shapes = ", ".join(f"{_SHAPES.get(name, 'diamond')}: {name}" for name in strategies)
    note = f"Spearman {correlation}, {len(points)} rows" + (f"; {shapes}" if len(strategies) > 1 else "")
    axes = axes_in(place, panel, left=0.6, right=0.15, note=note)
    low, high = limits_of(points)
    left, right = _log_axis(axes, steps, 0.12)
    axes.set_ylim(low, high)
    axes.set_xlabel("first step, as a multiple of LoRA's")
    axes.set_ylabel(panel.axis_label)
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    if lora := lora_of(points):
        axes.axhspan(lora.mean - lora.deviation, lora.mean + lora.deviation, color=INK, alpha=0.08, linewidth=0)

    width, height = size_in_points(axes)
    marks, bars = [], []
    for point, step in zip(points, steps, strict=True):
        axes.errorbar(
            step, point.mean, yerr=point.deviation or None, fmt=point.marker, color=point.colour,
            markersize=5.5, elinewidth=1.2, capsize=0, zorder=3,
        )  # fmt: skip
        x = math.log(step / left) / math.log(right / left) * width
        y, reach = (point.mean - low) / (high - low) * height, point.deviation / (high - low) * height
        marks.append((x, y))
        bars.append((x - 1.5, y - reach, x + 1.5, y + reach))
    occupied = [*bars, *((x - 4, y - 4, x + 4, y + 4) for x, y in marks)]
    sizes = [(72 * text_width(len(point.name)), FONT_SIZE * 1.1) for point in points]
    boxes = place_labels(bars, sizes, (width, height), occupied, [])
    for point, mark, bar, box in zip(points, marks, bars, boxes, strict=True):
        if leader := leader_of(mark, bar, box):
            draw_leader(axes, *leader, point.colour)
        axes.annotate(
            point.name, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), xycoords="axes points", ha="center",
            va="center_baseline", zorder=4, weight="bold" if point.row.is_lora else "normal",
        )  # fmt: skip
