"""Scores over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from tenslora.harness.results.figures.labels import spread
from tenslora.harness.results.figures.panels import (
    Panel,
    axes_in,
    colour_of,
    draw_leader,
    draw_nothing,
    figure_of,
    name_of,
    score_limits,
    size_in_points,
)
from tenslora.harness.results.figures.style import FONT_SIZE, GREY, INK, text_width
from tenslora.harness.results.summary import Cell
from tenslora.harness.results.table import Row, mean_and_deviation

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))  # one per variant of a construction


def learning_curves(panels: Sequence[Panel]) -> Figure:
    """Draw scores over epochs: means over the completed runs, with a band of one standard deviation to either side.

    Args:
        panels: the panels of one table.
    """
    return figure_of(panels, _draw)


@dataclass(frozen=True)
class _Curve:
    """A row's scores over the epochs that all its completed runs have; means and deviations in the metric's unit."""

    row: Row
    epochs: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]

    def span(self, start: float) -> tuple[Row, float, float]:
        """The row with the lowest and the highest value of its band from an epoch on."""
        first = min(start, self.epochs[-1])
        lows = [low for epoch, low in zip(self.epochs, self.lows, strict=True) if epoch >= first]
        highs = [high for epoch, high in zip(self.epochs, self.highs, strict=True) if epoch >= first]
        return self.row, min(lows), max(highs)


def _curve(row: Row, cell: Cell, factor: int) -> _Curve | None:
    histories: list[dict[int, float]] = []
    for run in cell.runs:
        if run.seed in cell.scores:
            name = run.metrics["name"]
            histories.append({entry["epoch"]: factor * entry[name] for entry in run.metrics["history"]})
    epochs = sorted(set[int].intersection(*map(set, histories))) if histories else []
    if not epochs:
        return None
    statistics = [mean_and_deviation(history[epoch] for history in histories) for epoch in epochs]
    return _Curve(
        row=row,
        epochs=epochs,
        means=[mean for mean, _ in statistics],
        lows=[mean - (deviation or 0.0) for mean, deviation in statistics],
        highs=[mean + (deviation or 0.0) for mean, deviation in statistics],
    )


def _draw(place: SubFigure, panel: Panel) -> None:
    curves = [curve for row, cell in panel.cells.items() if (curve := _curve(row, cell, panel.factor))]
    if not curves:
        draw_nothing(place, panel)
        return
    last = max(curve.epochs[-1] for curve in curves)
    # The steep rise of the first epochs is alike in all rows. To show all of it would leave no room for what sets
    # them apart.
    low, high = score_limits([curve.span(last / 4) for curve in curves])
    note = panel.note("mean and standard deviation over seeds")
    names = text_width(max(len(name_of(curve.row, panel.width)) for curve in curves))
    axes = axes_in(place, panel, left=0.6, right=0.4 + names, note=note)
    axes.set_xlabel("epoch")
    axes.set_ylabel(panel.with_unit(str(panel.metric)))
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    first = min(1, last - 1)  # a single epoch stands at the right, beside the names
    axes.set_xlim(first, last)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    dashes = dict(zip(dict.fromkeys(curve.row.variant for curve in curves), cycle(_DASHES)))
    for curve in curves:
        colour, single = colour_of(curve.row), len(curve.epochs) == 1
        axes.plot(
            curve.epochs, curve.means, color=colour, linewidth=1.7 if curve.row.is_lora else 1.2,
            linestyle=dashes[curve.row.variant] if curve.row.has_adapter else (0, (1, 1.5)),
            marker="o" if single else None, markersize=4, zorder=3, clip_on=not single,
        )  # fmt: skip
        axes.fill_between(curve.epochs, curve.lows, curve.highs, color=colour, alpha=0.1, linewidth=0)

    width, height = size_in_points(axes)
    ends = [(curve.means[-1] - low) / (high - low) * height for curve in curves]
    for curve, end, y in zip(curves, ends, spread(ends, FONT_SIZE * 1.2, (FONT_SIZE / 2, height)), strict=True):
        name, beyond = name_of(curve.row, panel.width), "↓" if end < 0 else "↑" if end > height else ""
        if not beyond:
            start = (curve.epochs[-1] - first) / (last - first) * width
            draw_leader(axes, (start + 2, end), (width + 18, y), colour_of(curve.row))
        axes.annotate(
            f"{name} {beyond}" if beyond else name, (width + 20, y), xycoords="axes points", va="center_baseline",
            annotation_clip=False, weight="bold" if name == "lora" else "normal", color=GREY if beyond else INK,
        )  # fmt: skip
