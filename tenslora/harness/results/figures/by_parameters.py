"""Scores against parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tenslora.harness.results.figures.labels import Box, leader_of, overlap, place_labels
from tenslora.harness.results.figures.panels import (
    Panel,
    Point,
    axes_in,
    draw_leader,
    figure_of,
    limits_of,
    lora_of,
    size_in_points,
)
from tenslora.harness.results.figures.style import FONT_SIZE, GREY, INK, text_width

_EQUAL = 1.10  # counts within this ratio are shown as equal: on a logarithmic axis all points would lie on one spot


def score_by_parameters(panels: Sequence[Panel]) -> Figure:
    """Draw scores over the number of adapter parameters: means over seeds with their standard deviations.

    LoRA's mean is also a line with a band. If all counts of a panel are equal within 10 %, the panel lists its rows one
    below the other instead, with every seed as a dot.

    Args:
        panels: the panels of one table.
    """
    return figure_of(
        panels, lambda place, panel: (_draw_list if _has_equal_counts(panel) else _draw_scatter)(place, panel)
    )


def _has_equal_counts(panel: Panel) -> bool:
    counts = [point.parameters for point in panel.points if point.row.has_adapter]
    return not counts or max(counts) <= _EQUAL * min(counts)


def _draw_list(place: SubFigure, panel: Panel) -> None:
    points = panel.points
    lora = lora_of(points)
    note = panel.note("mean ± standard deviation; dots: seeds" + ("; band: lora" if lora else ""))
    axes = axes_in(place, panel, left=0.3 + text_width(max(len(p.name) for p in points)), right=0.75, note=note)
    low, high = limits_of(points)
    axes.set_xlim(low, high)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(panel.axis_label)
    axes.set_yticks(range(len(points)), [point.name for point in points])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    small: dict[str, Any] = {"color": GREY, "size": FONT_SIZE - 1}
    axes.text(1.02, 1.0, "parameters", transform=axes.transAxes, va="bottom", ha="left", **small)
    if lora:
        axes.axvspan(lora.mean - lora.deviation, lora.mean + lora.deviation, color=INK, alpha=0.08, linewidth=0)
        axes.axvline(lora.mean, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    beside = axes.get_yaxis_transform()
    for height, point in enumerate(points):
        if point.row.has_adapter:
            axes.text(1.02, height, f"{point.parameters:,}", transform=beside, va="center_baseline", **small)
        if not low <= point.mean <= high:
            side, ha, text = (0.0, "left", "← {:.1f}") if point.mean < low else (1.0, "right", "{:.1f} →")
            axes.text(side, height, text.format(point.mean), transform=beside, ha=ha, va="center_baseline", color=GREY)
            continue
        if len(point.scores) > 1:
            seeds = [height + 0.3] * len(point.scores)  # below the error bar, which would hide them
            axes.scatter(point.scores, seeds, s=6, color=point.colour, alpha=0.6, linewidth=0)
        axes.errorbar(
            point.mean, height, xerr=point.deviation or None, fmt=point.marker, color=point.colour, markersize=5.5,
            elinewidth=1.3, capsize=0,
        )  # fmt: skip


def _draw_scatter(place: SubFigure, panel: Panel) -> None:
    points = panel.points
    adapters = [point for point in points if point.row.has_adapter]
    lora = lora_of(points)
    note = panel.note("mean ± standard deviation over seeds" + ("; band: lora" if lora else ""))
    axes = axes_in(place, panel, left=0.6, right=0.15, top=0.6, note=note)
    low, high = limits_of(points)
    counts = [point.parameters for point in adapters]
    span = math.log(max(counts) / min(counts))
    left, right = min(counts) * math.exp(-0.18 * span), max(counts) * math.exp(0.08 * span)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_xlabel("adapter parameters")
    axes.set_ylabel(panel.axis_label)
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    axes.xaxis.set_major_locator(LogLocator(subs=_steps(left, right, size_in_points(axes)[0] / 72)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

    width, height = size_in_points(axes)

    def position(parameters: float, score: float) -> tuple[float, float]:
        x = math.log(parameters / left) / math.log(right / left)
        return x * width, (score - low) / (high - low) * height

    lines: list[Box] = []  # boxes that a label should avoid, but may cover
    if lora:
        _add_percent_axis(axes, lora.parameters)
        axes.axhspan(lora.mean - lora.deviation, lora.mean + lora.deviation, color=INK, alpha=0.08, linewidth=0)
        axes.axhline(lora.mean, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        y = position(left, lora.mean)[1]
        lines.append((0, y - 1, width, y + 1))

    marks, bars = [], []
    for point in adapters:
        axes.errorbar(
            point.parameters, point.mean, yerr=point.deviation or None, fmt=point.marker, color=point.colour,
            markersize=6, elinewidth=1.3, capsize=0, zorder=3,
        )  # fmt: skip
        x, y = position(point.parameters, point.mean)
        reach = point.deviation / (high - low) * height
        marks.append((x, y))
        bars.append((x - 1.5, y - reach, x + 1.5, y + reach))
    occupied = [*bars, *((x - 4, y - 4, x + 4, y + 4) for x, y in marks)]

    for point in points:
        if not point.row.has_adapter:
            y = position(left, point.mean)[1]
            occupied.append(_draw_reference(axes, point, y, [*occupied, *lines]))
            lines.append((0, y - 1, width, y + 1))

    sizes = [(72 * text_width(len(point.name)), FONT_SIZE * 1.1) for point in adapters]
    boxes = place_labels(bars, sizes, (width, height), occupied, lines)
    for point, mark, bar, box in zip(adapters, marks, bars, boxes, strict=True):
        if leader := leader_of(mark, bar, box):
            draw_leader(axes, *leader, point.colour)
        axes.annotate(
            point.name, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), xycoords="axes points", ha="center",
            va="center_baseline", zorder=4,
        )  # fmt: skip


def _steps(left: float, right: float, width: float) -> tuple[float, ...]:
    """The multiples of each power of ten that a logarithmic axis has room to name."""
    room = width / text_width(len(f"{right:,.0f}") + 1)
    decades = math.log10(right / left)
    return next((steps for steps in ((1.0, 2.0, 5.0), (1.0, 3.0)) if len(steps) * decades < room), (1.0,))


def _draw_reference(axes: Axes, point: Point, y: float, occupied: Sequence[Box]) -> Box:
    """Draw a reference row as a dotted line, or write its score if that lies beyond the axis; return its name's box."""
    (width, height), line = size_in_points(axes), FONT_SIZE * 1.25
    text = point.name
    if 0 <= y <= height:
        axes.axhline(point.mean, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
        y += 2
    else:
        text = f"{text} {point.mean:.1f} {'↓' if y < 0 else '↑'}"
        y = 2 if y < 0 else height - line
    length = 72 * text_width(len(text))
    candidates = [(x, y, x + length, y + line) for x in (2.0, (width - length) / 2, width - length)]
    box = min(candidates, key=lambda candidate: sum(overlap(candidate, other) for other in occupied))
    axes.annotate(text, box[:2], xycoords="axes points", color=GREY, va="bottom", ha="left")
    return box


def _add_percent_axis(axes: Axes, lora_parameters: int) -> None:
    """Add a scale above `axes` that gives the parameters in per cent of LoRA's."""
    to_percent = (lambda x: 100 * np.asarray(x) / lora_parameters, lambda x: np.asarray(x) * lora_parameters / 100)
    percent = axes.secondary_xaxis("top", functions=to_percent)
    percent.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    percent.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    percent.xaxis.set_minor_formatter(NullFormatter())
    percent.spines["top"].set_visible(False)
    percent.tick_params(which="both", length=0, pad=1, colors=GREY, labelsize=FONT_SIZE - 1)
    percent.set_xlabel("of LoRA's parameters", color=GREY, size=FONT_SIZE - 1, labelpad=3)
