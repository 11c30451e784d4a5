"""The figures of a table: scores by a setting, scores against parameters, and learning curves."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.constructions import CONSTRUCTIONS
from tenslora.files import write_bytes
from tenslora.harness.results.cells import adapter_of
from tenslora.harness.results.labels import Box, leader_of, overlap, place_labels, spread
from tenslora.harness.results.table import Row, Table, mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's palette; its yellow is not seen on white, so Tol's purple stands in for it.
COLOURS = {
    "att": "#E69F00",
    "qkv": "#56B4E9",
    "depth": "#CC79A7",
    "att_qkv": "#AA3377",
    "att_depth": "#D55E00",
    "qkv_depth": "#0072B2",
    "att_qkv_depth": "#009E73",
    "site": "#332288",
    "att_site": "#999933",
}
NAMES = ("score_by_setting", "score_vs_parameters", "learning_curves")  # of the figures that there may be of a table
_INK = "#010203"  # a black that nothing else has: SVGs have the text's colour in its place
_GREY = "#767676"  # the lightest that is read on white; in a page, its own muted colour
_MARKERS = {"": "o", "isorank": "o", "isoparameters": "s", "explicit": "D"}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))  # one per variant of a construction
_FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
_SIZE = 8.5  # of text, in points
_WIDTH, _HEIGHT = 4.4, 3.3  # of a panel, in inches
_READABLE = 16  # rows of a panel: the names of more would lie over each other, and over what they name
_LONGEST = 34  # of a name, in characters: more would leave a panel no room for what it shows

# Counts that differ by less are shown as equal: a logarithmic axis would put all points on one spot.
_EQUAL = 1.10

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": list(_FONTS),
    "font.size": _SIZE,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelsize": _SIZE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": _SIZE,
    "ytick.labelsize": _SIZE,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "tenslora",
}


@dataclass(frozen=True)
class _Point:
    row: Row
    name: str
    parameters: int
    scores: tuple[float, ...]  # per cent, by seed
    mean: float
    deviation: float  # 0 for a single seed

    @property
    def is_reference(self) -> bool:
        return self.row.tensor_mode not in CONSTRUCTIONS

    @property
    def colour(self) -> str:
        return _colour(self.row)

    @property
    def marker(self) -> str:
        return _MARKERS.get(self.row.strategy, "o")


@dataclass(frozen=True)
class Drawing:
    """A figure of a table. name: of its files. title, what: for people, beside it."""

    name: str
    title: str
    what: str
    draw: Callable[[Table], Figure]


def drawings(table: Table) -> list[Drawing]:
    """The figures that say something of `table`."""
    found = []
    if table.swept is not None:
        what = "A row that the setting does not change is drawn across."
        found.append(Drawing("score_by_setting", f"Score by {table.swept}", what, score_by_setting))
    if max((len(panel.rows) for panel in panels(table)), default=0) <= _READABLE:
        what = "Where all rows of a panel have nearly the same count, they are listed below each other."
        found.append(
            Drawing("score_vs_parameters", "Score against parameters", what, score_against_parameters),
        )
        what = "The steep first epochs may lie below the axis."
        found.append(Drawing("learning_curves", "Learning curves", what, learning_curves))
    return found


def score_by_setting(table: Table) -> Figure:
    """A panel per column, and per strategy where the table has several: score over the values of the swept setting.

    Mean over seeds with its standard deviation, a line per construction where the values are numbers.
    """
    return _figure(table, lambda _: _draw_by_setting, named=lambda row: row.plain)


def score_against_parameters(table: Table) -> Figure:
    """A panel per column, and per strategy where the table has several: score over adapter parameters.

    Mean over seeds with its standard deviation; LoRA's also as a line with a band. Where all counts of a panel are
    equal within 10 %, the rows are listed below each other instead, with every seed as a dot.
    """
    return _figure(table, lambda panel: _draw_list if _equal_counts(panel) else _draw_scatter)


def learning_curves(table: Table) -> Figure:
    """A panel per column, and per strategy where the table has several: score over epochs.

    Mean over the seeds of the completed runs, with a band of one standard deviation to either side.
    """
    return _figure(table, lambda _: _draw_curves)


def write_figures(table: Table, folder: Path) -> list[Path]:
    """Write `drawings` to `folder` as PNG (200 dpi, white) and SVG (in the colour of the text around it).

    Equal tables give equal SVGs. Returns the files; none if no run has a score. Figures of a table that was there
    before and that are not drawn of this one are removed. Raises TensLoRAError if one cannot be written.
    """
    has_scores = any(run.score(table.score) is not None for run in table.runs)
    drawn = {each.name: each for each in drawings(table)} if has_scores else {}
    paths = []
    for name in NAMES:
        if name in drawn:
            paths += write_figure(drawn[name].draw(table), folder, name)
            continue
        for suffix in ("png", "svg"):
            with suppress(OSError):
                (folder / f"{name}.{suffix}").unlink()
    return paths


def energy_by_rank(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """How much of the updates is left when one axis alone is cut to a rank: a line per axis, against rank over size.

    spectra: for each axis its singular values' shares of the energy, largest first. Along the dotted diagonal nothing
    can be compressed.
    """
    from matplotlib.figure import Figure

    with _styled():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        for (name, shares), colour in zip(spectra.items(), cycle(COLOURS.values()), strict=False):
            kept = [0.0, *accumulate(100 * share for share in shares)]
            ranks = [100 * rank / len(shares) for rank in range(len(kept))]
            marker = "o" if len(shares) <= 24 else None
            axes.plot(
                ranks, kept, color=colour, linewidth=1.4, marker=marker, markersize=3, label=f"{name} ({len(shares)})"
            )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 101)
        axes.set_xlabel("rank, % of the axis's size")
        axes.set_ylabel("energy of the updates that is left, %")
        axes.grid(color=_INK, alpha=0.1, linewidth=0.6)
        axes.legend(loc="lower right", frameon=False)
    return figure


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `figure` as PNG and SVG, as `write_figures` does, and return the files."""
    contents = {folder / f"{name}.png": _png(figure), folder / f"{name}.svg": _svg(figure).encode()}
    for path, content in contents.items():
        write_bytes(path, content)
    return list(contents)


def inline_svgs(table: Table, drawing: Drawing) -> list[str]:
    """`drawing` of each panel of `table` that has a score, as <svg> elements that scale with what they are put into.

    Their ids begin with its name, so that several can stand in one page; its title and the panel's say what is drawn to
    those who do not see it.
    """
    found = []
    for number, panel in enumerate(panels(table)):
        if not any(run.score(table.score) is not None for run in panel.runs):
            continue
        text = _svg(drawing.draw(panel))
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{drawing.name}{number}-", text[text.index("<svg") :])
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
        text = text.replace(_GREY, f"var(--muted, {_GREY})")
        label = _escaped(f"{drawing.title}: {_title(panel)}")
        found.append(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
    return found


def panels(table: Table) -> list[Table]:
    """`table` in parts of one column and one strategy each; rows that have no strategy are in every part."""
    strategies = list(dict.fromkeys(row.strategy for row in table.rows if row.strategy)) or [""]
    parts = [
        tuple(run for run in table.runs if run.column == column and run.row.strategy in ("", strategy))
        for strategy in strategies
        for column in table.columns
    ]
    return [replace(table, runs=runs) for runs in parts if runs]


@contextmanager
def _styled() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def _figure(
    table: Table,
    choose: Callable[[Table], Callable[[SubFigure, Table], None]],
    named: Callable[[Row], Row] = lambda row: row,
) -> Figure:
    from matplotlib.figure import Figure

    parts = panels(table)
    columns = len(table.columns)
    across = 1 if len(parts) == 1 else 3 if columns == 3 else 2
    down = math.ceil(len(parts) / across)
    # A line of text per row, where it is not drawn with others of its construction.
    height = max(_HEIGHT, 1.0 + 0.16 * max(len({named(row) for row in part.rows}) for part in parts))
    with _styled():
        figure = Figure(figsize=(across * _WIDTH, down * height))
        places = figure.subfigures(down, across, squeeze=False)
        for place, part in zip(places.flat, parts, strict=False):
            place.set_facecolor("none")
            choose(part)(place, part)
    return figure


def _axes(place: SubFigure, panel: Table, left: float, right: float, top: float = 0.45, note: str = "") -> Axes:
    """Axes with the given margins in inches, the panel's title above and a note in small print below."""
    bottom = 0.62 if note else 0.5
    width, height = place.bbox.width / place.figure.dpi, place.bbox.height / place.figure.dpi
    axes = place.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height), facecolor="none"
    )
    place.text(0.1 / width, 1 - 0.17 / height, _title(panel), weight="bold", va="center", ha="left")
    place.text(left / width, 0.12 / height, note, color=_GREY, size=_SIZE - 1.5, va="center", ha="left")
    return axes


def _note(panel: Table, text: str) -> str:
    # A single seed has no deviation to explain.
    return text if any(len(panel.cell(row, panel.columns[0])) > 1 for row in panel.rows) else ""


def _title(panel: Table) -> str:
    (column,) = panel.columns
    strategy = next((row.strategy for row in panel.rows if row.strategy), "")
    return " · ".join(filter(None, (column.dataset, column.model, strategy)))


def _points(panel: Table) -> list[_Point]:
    (column,) = panel.columns
    found = []
    for row in panel.rows:
        scores = tuple(100 * score for score in panel.scores(row, column).values())
        if scores:
            mean, deviation = mean_and_deviation(scores)
            parameters = adapter_of(panel.cell(row, column)[0])[1] or 0
            found.append(_Point(row, _name(row), parameters, scores, mean, deviation or 0.0))
    return found


def _colour(row: Row) -> str:
    return _INK if row.tensor_mode == "lora" else COLOURS.get(row.tensor_mode, _GREY)


def _name(row: Row) -> str:
    return _shortened(" ".join((row.tensor_mode, *row.variant)), _LONGEST)  # the panel's title has the strategy


def _shortened(text: str, longest: int) -> str:
    # Of a text that is too long, the ends tell most.
    return text if len(text) <= longest else f"{text[: (longest - 1) // 2]}…{text[-(longest // 2) :]}"


def _equal_counts(panel: Table) -> bool:
    counts = [point.parameters for point in _points(panel) if not point.is_reference]
    return not counts or max(counts) <= _EQUAL * min(counts)


def _what(panel: Table) -> str:
    metric = panel.metric(panel.columns[0]) or "score"
    return f"best {metric} (%)" if panel.score == "best" else f"{metric} after the last epoch (%)"


def _limits(spans: Sequence[tuple[bool, tuple[float, float]]]) -> tuple[float, float]:
    """Limits of a score axis for spans given as (is a reference row, (low, high)).

    Reference rows far off do not stretch it: they would flatten all differences.
    """
    main = [span for is_reference, span in spans if not is_reference] or [span for _, span in spans]
    low, high = min(low for low, _ in main), max(high for _, high in main)
    reach = 1.5 * (high - low)
    for _, (below, above) in spans:
        if max(high, above) - min(low, below) <= reach:
            low, high = min(low, below), max(high, above)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _range(points: Sequence[_Point]) -> tuple[float, float]:
    """Limits of the score axis for means, their bars and all seeds."""
    return _limits(
        [(p.is_reference, (min(*p.scores, p.mean - p.deviation), max(*p.scores, p.mean + p.deviation))) for p in points]
    )


def _lora(points: Sequence[_Point]) -> _Point | None:
    found = [point for point in points if point.row.tensor_mode == "lora"]
    return found[0] if len(found) == 1 else None


def _draw_list(place: SubFigure, panel: Table) -> None:
    points = _points(panel)
    if not points:
        _draw_nothing(place, panel)
        return
    note = _note(panel, "mean ± standard deviation; dots: seeds" + "; band: lora" * bool(_lora(points)))
    axes = _axes(place, panel, left=0.3 + _inches(max(len(p.name) for p in points)), right=0.75, note=note)
    low, high = _range(points)
    axes.set_xlim(low, high)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(_what(panel))
    axes.set_yticks(range(len(points)), [point.name for point in points])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    axes.text(1.02, 1.0, "parameters", transform=axes.transAxes, va="bottom", ha="left", color=_GREY, size=_SIZE - 1)
    if lora := _lora(points):
        axes.axvspan(lora.mean - lora.deviation, lora.mean + lora.deviation, color=_INK, alpha=0.08, linewidth=0)
        axes.axvline(lora.mean, color=_INK, linewidth=0.8, linestyle=(0, (4, 2)))
    beside = axes.get_yaxis_transform()
    for height, point in enumerate(points):
        if not point.is_reference:
            count = f"{point.parameters:,}"
            axes.text(1.02, height, count, transform=beside, va="center_baseline", color=_GREY, size=_SIZE - 1)
        if not low <= point.mean <= high:
            side, ha, text = (0.0, "left", "← {:.1f}") if point.mean < low else (1.0, "right", "{:.1f} →")
            axes.text(side, height, text.format(point.mean), transform=beside, ha=ha, va="center_baseline", color=_GREY)
            continue
        if len(point.scores) > 1:
            seeds = [height + 0.3] * len(point.scores)  # below the bar, which would hide them
            axes.scatter(point.scores, seeds, s=6, color=point.colour, alpha=0.6, linewidth=0)
        axes.errorbar(
            point.mean, height, xerr=point.deviation or None, fmt=point.marker, color=point.colour, markersize=5.5,
            elinewidth=1.3, capsize=0,
        )  # fmt: skip


def _draw_scatter(place: SubFigure, panel: Table) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = _points(panel)
    adapters = [point for point in points if not point.is_reference]
    note = _note(panel, "mean ± standard deviation over seeds" + "; band: lora" * bool(_lora(points)))
    axes = _axes(place, panel, left=0.6, right=0.15, top=0.6, note=note)
    low, high = _range(points)
    counts = [point.parameters for point in adapters]
    span = math.log(max(counts) / min(counts))
    left, right = min(counts) * math.exp(-0.18 * span), max(counts) * math.exp(0.08 * span)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_xlabel("adapter parameters")
    axes.set_ylabel(_what(panel))
    axes.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.6)
    decades = math.log10(right / left)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

    width, height = _size(axes)

    def at(parameters: float, score: float) -> tuple[float, float]:
        x = math.log(parameters / left) / math.log(right / left)
        return x * width, (score - low) / (high - low) * height

    soft: list[Box] = []
    if lora := _lora(points):
        _share_axis(axes, lora.parameters)
        axes.axhspan(lora.mean - lora.deviation, lora.mean + lora.deviation, color=_INK, alpha=0.08, linewidth=0)
        axes.axhline(lora.mean, color=_INK, linewidth=0.8, linestyle=(0, (4, 2)))
        soft.append((0, at(left, lora.mean)[1] - 1, width, at(left, lora.mean)[1] + 1))

    marks, bars = [], []
    for point in adapters:
        axes.errorbar(
            point.parameters, point.mean, yerr=point.deviation or None, fmt=point.marker, color=point.colour,
            markersize=6, elinewidth=1.3, capsize=0, zorder=3,
        )  # fmt: skip
        x, y = at(point.parameters, point.mean)
        reach = point.deviation / (high - low) * height
        marks.append((x, y))
        bars.append((x - 1.5, y - reach, x + 1.5, y + reach))
    hard = [*bars, *((x - 4, y - 4, x + 4, y + 4) for x, y in marks)]

    line = _SIZE * 1.25
    for point in points:
        if not point.is_reference:
            continue
        text, y = point.name, at(left, point.mean)[1]
        if 0 <= y <= height:
            axes.axhline(point.mean, color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
            y += 2
        else:  # beyond the axis: say where
            text = f"{point.name} {point.mean:.1f} {'↓' if y < 0 else '↑'}"
            y = 2 if y < 0 else height - line
        wide = 72 * _inches(len(text))
        places = [(x, y, x + wide, y + line) for x in (2.0, (width - wide) / 2, width - wide)]
        box = min(places, key=lambda place: sum(overlap(place, other) for other in hard))
        axes.annotate(text, box[:2], xycoords="axes points", color=_GREY, va="bottom", ha="left")
        hard.append(box)

    sizes = [(72 * _inches(len(point.name)), _SIZE * 1.1) for point in adapters]
    boxes = place_labels(bars, sizes, (width, height), hard, soft)
    for point, mark, bar, box in zip(adapters, marks, bars, boxes, strict=True):
        if leader := leader_of(mark, bar, box):
            _leader(axes, *leader, point.colour)
        axes.annotate(
            point.name, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), xycoords="axes points", ha="center",
            va="center_baseline", zorder=4,
        )  # fmt: skip


def _share_axis(axes: Axes, full: int) -> None:
    """A scale above `axes` that gives the parameters as a share of LoRA's."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    share = axes.secondary_xaxis(
        "top", functions=(lambda x: 100 * np.asarray(x) / full, lambda x: np.asarray(x) * full / 100)
    )
    share.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    share.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    share.xaxis.set_minor_formatter(NullFormatter())
    share.spines["top"].set_visible(False)
    share.tick_params(which="both", length=0, pad=1, colors=_GREY, labelsize=_SIZE - 1)
    share.set_xlabel("of LoRA's parameters", color=_GREY, size=_SIZE - 1, labelpad=3)


def _draw_nothing(place: SubFigure, panel: Table) -> None:
    axes = _axes(place, panel, left=0.6, right=0.15)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no finished run yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _draw_by_setting(place: SubFigure, panel: Table) -> None:
    points = _points(panel)
    if not points:
        _draw_nothing(place, panel)
        return
    # In a panel of rows that the setting does not change there is no value to name.
    values = list(dict.fromkeys(value for row in panel.rows for value in row.values)) or [""]
    ordered = all(map(_is_number, values))
    names = [row for row in panel.plain_rows if any(point.row.plain == row for point in points)]
    note = _note(panel, "mean ± standard deviation over seeds")
    axes = _axes(place, panel, left=0.6, right=0.4 + _inches(max(len(_name(row)) for row in names)), note=note)
    low, high = _range(points)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylim(low, high)
    room = _size(axes)[0] / 72 / len(values) / _inches(1)  # of a value, in characters
    axes.set_xticks(range(len(values)), [_shortened(value, max(3, int(room) - 1)) for value in values])
    axes.set_xlabel(panel.swept or "")
    axes.set_ylabel(_what(panel))
    axes.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.6)
    ends: list[tuple[float, float]] = []  # of each name's marks, where its leader starts
    for number, row in enumerate(names):
        own = [point for point in points if point.row.plain == row]
        if not own[0].row.variant:  # the same for all values
            axes.axhspan(own[0].mean - own[0].deviation, own[0].mean + own[0].deviation, color=_INK, alpha=0.08, lw=0)
            axes.axhline(own[0].mean, color=own[0].colour, linewidth=0.8, linestyle=(0, (4, 2)))
            ends.append((len(values) - 0.5, own[0].mean))
            continue
        beside = 0.5 * ((number + 0.5) / len(names) - 0.5)  # so that bars do not hide each other
        x = [values.index(point.row.values[0]) + beside for point in own]
        axes.errorbar(
            x, [point.mean for point in own], yerr=[point.deviation for point in own], fmt=own[0].marker,
            color=own[0].colour, markersize=4.5, elinewidth=1.1, capsize=0, linestyle="-" if ordered else "none",
            linewidth=1.1, zorder=3,
        )  # fmt: skip
        ends.append((x[-1], own[-1].mean))
    width, height = _size(axes)
    marks = [((x + 0.5) / len(values) * width, (y - low) / (high - low) * height) for x, y in ends]
    heights = spread([y for _, y in marks], _SIZE * 1.2, (_SIZE / 2, height))
    for row, mark, y in zip(names, marks, heights, strict=True):
        if 0 <= mark[1] <= height:
            _leader(axes, (mark[0] + 4, mark[1]), (width + 10, y), _colour(row))
        axes.annotate(
            _name(row), (width + 12, y), xycoords="axes points", va="center_baseline", annotation_clip=False,
            weight="bold" if row.tensor_mode == "lora" else "normal",
        )  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class _Curve:
    row: Row
    epochs: list[int]
    means: list[float]
    deviations: list[float]

    @property
    def is_reference(self) -> bool:
        return self.row.tensor_mode not in CONSTRUCTIONS

    @property
    def colour(self) -> str:
        return _colour(self.row)

    def ends(self, start: float) -> tuple[float, float]:
        """The lowest and the highest value of the band from epoch `start` on."""
        band = [
            (mean - deviation, mean + deviation)
            for epoch, mean, deviation in zip(self.epochs, self.means, self.deviations, strict=True)
            if epoch >= min(start, self.epochs[-1])
        ]
        return min(low for low, _ in band), max(high for _, high in band)


def _draw_curves(place: SubFigure, panel: Table) -> None:
    from matplotlib.ticker import MaxNLocator

    curves = [curve for row in panel.rows if (curve := _curve(panel, row))]
    if not curves:
        _draw_nothing(place, panel)
        return
    last = max(curve.epochs[-1] for curve in curves)
    # The rise of the first epochs is alike in all rows; showing it whole would leave no room for what sets them apart.
    low, high = _limits([(curve.is_reference, curve.ends(last / 4)) for curve in curves])
    note = _note(panel, "mean and standard deviation over seeds")
    names = _inches(max(len(_name(curve.row)) for curve in curves))
    axes = _axes(place, panel, left=0.6, right=0.4 + names, note=note)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{panel.metric(panel.columns[0])} (%)")
    axes.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.6)
    first = min(1, last - 1)  # a single epoch stands at the right, beside the names
    axes.set_xlim(first, last)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    dashes = dict(zip(dict.fromkeys(curve.row.variant for curve in curves), cycle(_DASHES)))
    for curve in curves:
        means, deviations = curve.means, curve.deviations
        axes.plot(
            curve.epochs, means, color=curve.colour, linewidth=1.7 if curve.row.tensor_mode == "lora" else 1.2,
            linestyle=(0, (1, 1.5)) if curve.is_reference else dashes[curve.row.variant],
            marker="o" if len(curve.epochs) == 1 else None, markersize=4, zorder=3,
            clip_on=len(curve.epochs) > 1,
        )  # fmt: skip
        axes.fill_between(
            curve.epochs,
            [mean - deviation for mean, deviation in zip(means, deviations, strict=True)],
            [mean + deviation for mean, deviation in zip(means, deviations, strict=True)],
            color=curve.colour, alpha=0.1, linewidth=0,
        )  # fmt: skip

    width, height = _size(axes)
    ends = [(curve.means[-1] - low) / (high - low) * height for curve in curves]
    for curve, end, y in zip(curves, ends, spread(ends, _SIZE * 1.2, (_SIZE / 2, height)), strict=True):
        name, away = _name(curve.row), "↓" if end < 0 else "↑" if end > height else ""
        if not away:
            start = (curve.epochs[-1] - first) / (last - first) * width
            _leader(axes, (start + 2, end), (width + 18, y), curve.colour)
        axes.annotate(
            f"{name} {away}" if away else name, (width + 20, y), xycoords="axes points", va="center_baseline",
            annotation_clip=False, weight="bold" if name == "lora" else "normal", color=_GREY if away else _INK,
        )  # fmt: skip


def _curve(panel: Table, row: Row) -> _Curve | None:
    """The completed runs of a row at the epochs that all of them have."""
    (column,) = panel.columns
    histories: list[dict[int, float]] = []
    for run in panel.cell(row, column):
        if run.record and run.score(panel.score) is not None:
            name = run.record["metrics"]["name"]
            histories.append({entry["epoch"]: 100 * entry[name] for entry in run.record["metrics"]["history"]})
    epochs = sorted(set[int].intersection(*map(set, histories))) if histories else []
    if not epochs:
        return None
    shown = [mean_and_deviation(history[epoch] for history in histories) for epoch in epochs]
    return _Curve(row, epochs, [mean for mean, _ in shown], [deviation or 0.0 for _, deviation in shown])


def _size(axes: Axes) -> tuple[float, float]:
    """Width and height of `axes` in points."""
    dpi = axes.figure.dpi
    return 72 * axes.bbox.width / dpi, 72 * axes.bbox.height / dpi


def _leader(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A thin line between two places in points."""
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "", end, start, xycoords="axes points", textcoords="axes points", arrowprops=arrow, annotation_clip=False
    )


def _inches(characters: int) -> float:
    """How wide a label is, reckoned rather than measured: an SVG is set in whatever font its reader has."""
    return characters * 0.55 * _SIZE / 72


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with _styled():
        figure.savefig(content, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return content.getvalue()


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _styled():
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    text = content.getvalue().decode()
    # matplotlib's style sheet would apply to the whole page that the picture is put into.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    text = text.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    text = text.replace(_INK, "currentColor")
    fonts = ", ".join(f"'{font}'" for font in _FONTS)
    return text.replace(f"{fonts}, sans-serif", "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
