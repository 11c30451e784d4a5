"""The ranks of runs that cut them, over epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import chain, cycle

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from tenslora.constructions import Geometry
from tenslora.harness.results.figures.labels import spread
from tenslora.harness.results.figures.panels import (
    Panel,
    axes_in,
    colour_of,
    draw_leader,
    figure_of,
    name_of,
    size_in_points,
)
from tenslora.harness.results.figures.style import FONT_SIZE, INK, text_width
from tenslora.harness.results.summary import Cell
from tenslora.harness.results.table import Row
from tenslora.harness.stages import stages_in_file
from tenslora.ranks import rank_limits

_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))  # one per rank of a tensor


def cuts_ranks(cell: Cell) -> bool:
    """Whether a run of the cell has cut its ranks.

    Args:
        cell: a cell of a table.
    """
    return bool(_ranks(cell))


def ranks_by_epoch(panels: Sequence[Panel]) -> Figure:
    """Draw each rank after every epoch, on a logarithmic axis: the mean over the runs that cut their ranks.

    Args:
        panels: the panels of one table.
    """
    return figure_of(panels, _draw)


def _ranks(cell: Cell) -> dict[str, list[float]]:
    # The mean ranks after each epoch that all runs have, by the rank's name.
    records = [run.record for run in cell.runs if run.metrics and run.record and run.record.get("ranks_by_epoch")]
    if not records:
        return {}
    factorization = "tucker" if records[0]["factorization"] == "matrix" else records[0]["factorization"]
    stages = stages_in_file(records[0]["geometry"])
    names = [
        name if len(stages) == 1 else f"{name} of stage {number}"
        for number, geometry in enumerate(stages)
        for name in rank_limits(records[0]["tensor_mode"], Geometry(**geometry), factorization)
    ]
    by_epoch = [[list(chain(*stages_in_file(ranks))) for ranks in record["ranks_by_epoch"]] for record in records]
    epochs = list(zip(*by_epoch, strict=False))
    return {
        name: [statistics.fmean(ranks[position] for ranks in runs) for runs in epochs]
        for position, name in enumerate(names)
    }


def _draw(place: SubFigure, panel: Panel) -> None:
    curves: list[tuple[Row, str, list[float]]] = [
        (row, name, values) for row, cell in panel.cells.items() for name, values in _ranks(cell).items()
    ]
    labels = [f"{name_of(row, panel.width)} {name}" for row, name, _ in curves]
    axes = axes_in(
        place, panel, left=0.5, right=0.4 + text_width(max(map(len, labels))), note=panel.note("mean over seeds")
    )
    last = max(len(values) for *_, values in curves)
    low, high = min(min(values) for *_, values in curves) / 1.15, max(max(values) for *_, values in curves) * 1.15
    axes.set_xlabel("epoch")
    axes.set_ylabel("rank")
    axes.set_yscale("log")
    axes.set_xlim(min(1, last - 1), last)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    dashes = dict(zip(dict.fromkeys(name for _, name, _ in curves), cycle(_DASHES)))
    for row, name, values in curves:
        axes.plot(
            range(1, len(values) + 1), values, color=colour_of(row), linewidth=1.2, linestyle=dashes[name],
            drawstyle="steps-post", zorder=3,
        )  # fmt: skip
    width, height = size_in_points(axes)
    ends = [float(axes.transAxes.inverted().transform(axes.transData.transform((last, v[-1])))[1]) for *_, v in curves]
    heights = [end * height for end in ends]
    places = spread(heights, FONT_SIZE * 1.2, (FONT_SIZE / 2, height))
    for (row, _, _), label, end, y in zip(curves, labels, heights, places, strict=True):
        draw_leader(axes, (width + 2, end), (width + 18, y), colour_of(row))
        axes.annotate(
            label, (width + 20, y), xycoords="axes points", va="center_baseline", annotation_clip=False, color=INK
        )
