"""The figures of a table: score by a setting, score against parameters, and learning curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from tenslora.harness.results.figures.by_parameters import score_by_parameters
from tenslora.harness.results.figures.by_setting import score_by_setting
from tenslora.harness.results.figures.learning_curves import learning_curves
from tenslora.harness.results.figures.panels import Panel, panels_of
from tenslora.harness.results.figures.style import GREY, svg, write_figure
from tenslora.harness.results.summary import Summary

FIGURE_NAMES = ("score_by_setting", "score_vs_parameters", "learning_curves")
"""The names of all figures that a table can have, and of their files."""

_MOST_ROWS = 16
"""The names of more rows in one panel would lie over each other and over the points."""


@dataclass(frozen=True)
class TableFigure:
    """A figure of a table.

    Args:
        name: of its files.
        title: for people.
        remark: a sentence that stands beside it.
        draw: draws the panels given.
    """

    name: str
    title: str
    remark: str
    draw: Callable[[Sequence[Panel]], Figure]


def figures_of(summary: Summary) -> list[TableFigure]:
    """The figures that show something of a table and can be read."""
    setting = summary.table.swept_setting
    by_setting = TableFigure(
        "score_by_setting",
        f"Score by {setting}",
        "A row that the setting does not change is drawn across.",
        score_by_setting,
    )
    by_parameters = TableFigure(
        "score_vs_parameters",
        "Score against parameters",
        "Where all rows of a panel have nearly the same count, they are listed below each other.",
        score_by_parameters,
    )
    over_epochs = TableFigure(
        "learning_curves",
        "Learning curves",
        "The steep first epochs may lie below the axis.",
        learning_curves,
    )
    most_rows = max((len(panel.cells) for panel in panels_of(summary)), default=0)
    return [by_setting] * (setting is not None) + [by_parameters, over_epochs] * (most_rows <= _MOST_ROWS)


def write_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write the table's figures as PNG and SVG, and remove those of an earlier table that this one does not have.

    Args:
        summary: of the table.
        folder: where to write.

    Returns:
        The files written; none if no run has a score.

    Raises:
        TensLoRAError: if a file cannot be written.
    """
    figures = figures_of(summary) if summary.has_scores else []
    for name in set(FIGURE_NAMES) - {figure.name for figure in figures}:
        for suffix in ("png", "svg"):
            with suppress(OSError):
                (folder / f"{name}.{suffix}").unlink()
    panels = panels_of(summary)
    return [path for figure in figures for path in write_figure(figure.draw(panels), folder, figure.name)]


def inline_svgs(summary: Summary, figure: TableFigure) -> list[str]:
    """A figure as <svg> elements for an HTML page, one for each panel that has a score.

    They fill the width that the page gives them. Their ids begin with the figure's name, so that several figures can
    stand in one page. A label says to those who do not see it what is drawn.

    Args:
        summary: of the table.
        figure: one of `figures_of(summary)`.
    """
    elements = []
    for number, panel in enumerate(panels_of(summary)):
        if not panel.has_scores:
            continue
        document = svg(figure.draw([panel]))
        text = document[document.index("<svg") :]
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}{number}-", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
        text = text.replace(GREY, f"var(--muted, {GREY})")
        label = escape(f"{figure.title}: {panel.title}")
        elements.append(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
    return elements
