"""The figures of a table: score by a setting, score against parameters, and learning curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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

_PAGE_WIDTH = 3.7
"""The width of a panel in a page, in inches: its text can be read where it fills a phone's screen."""

_MOST_ROWS = 16
"""The largest number of rows in a panel. The names of more rows would cover each other and the points."""


@dataclass(frozen=True)
class TableFigure:
    """A figure of a table.

    Args:
        name: the name of the figure's files, without a suffix.
        title: the figure's title in the report.
        remark: a sentence that the report prints beside the figure.
        draw: a function that draws the panels that it is given.
    """

    name: str
    title: str
    remark: str
    draw: Callable[[Sequence[Panel]], Figure]


def figures_of(summary: Summary) -> list[TableFigure]:
    """The figures that suit a table. Figures with too many rows to be read are left out.

    Args:
        summary: the summary of the table.
    """
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
    """Write the table's figures as PNG and SVG, and remove an earlier table's figures that this table does not have.

    Args:
        summary: the summary of the table.
        folder: the folder to write to.

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

    The elements fill the width that the page gives them. Their ids begin with the figure's name, so that several
    figures can be on one page. Each element has a label for screen readers.

    Args:
        summary: the summary of the table.
        figure: one of `figures_of(summary)`.

    Returns:
        The elements, as HTML.
    """
    elements = []
    for number, panel in enumerate(panels_of(summary)):
        if not panel.has_scores:
            continue
        document = svg(figure.draw([replace(panel, width=_PAGE_WIDTH)]))
        text = document[document.index("<svg") :]
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}{number}-", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
        text = text.replace(GREY, f"var(--muted, {GREY})")
        label = escape(f"{figure.title}: {panel.title}")
        elements.append(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
    return elements
