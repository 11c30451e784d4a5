"""The figures of a table: score by a setting, score against parameters, and learning curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from tenslora.harness.results.figures.by_first_step import (
    panels_by_first_step,
    panels_of_trials,
    score_by_first_step,
    trials_by_first_step,
)
from tenslora.harness.results.figures.by_parameters import score_by_parameters
from tenslora.harness.results.figures.by_setting import score_by_setting
from tenslora.harness.results.figures.learning_curves import learning_curves
from tenslora.harness.results.figures.panels import Panel, panels_of
from tenslora.harness.results.figures.ranks_by_epoch import cuts_ranks, ranks_by_epoch
from tenslora.harness.results.figures.style import GREY, svg, write_figure
from tenslora.harness.results.paper import PROTOCOL
from tenslora.harness.results.summary import Summary

FIGURE_NAMES = (
    "trials",
    "trials_by_first_step",
    "score_by_setting",
    "score_vs_parameters",
    "learning_curves",
    "ranks_by_epoch",
    "score_vs_first_step",
)
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
        panels: the figure's panels.
    """

    name: str
    title: str
    remark: str
    draw: Callable[[Sequence[Panel]], Figure]
    panels: Sequence[Panel]


def figures_of(summary: Summary) -> list[TableFigure]:
    """The figures that suit a table. Figures with too many rows to be read are left out.

    Args:
        summary: the summary of the table.
    """
    setting, panels, trials = summary.table.swept_setting, panels_of(summary), summary.trials
    of_trials = _figures_of_trials(trials) if trials and trials.has_scores else []
    by_setting = TableFigure(
        "score_by_setting",
        f"Score by {setting}",
        "A row that the setting does not change is drawn across.",
        score_by_setting,
        panels,
    )
    by_parameters = TableFigure(
        "score_vs_parameters",
        "Score against parameters",
        "Where all rows of a panel have nearly the same count, they are listed below each other.",
        score_by_parameters,
        panels,
    )
    over_epochs = TableFigure(
        "learning_curves",
        "Learning curves",
        "The steep first epochs may lie below the axis.",
        learning_curves,
        panels,
    )
    pruned_panels = [
        replace(panel, cells=cells)
        for panel in panels
        if (cells := {row: cell for row, cell in panel.cells.items() if cuts_ranks(cell)})
    ]
    pruned = TableFigure(
        "ranks_by_epoch",
        "Ranks by epoch",
        "The ranks of the runs that start with more parameters than their budget and cut them.",
        ranks_by_epoch,
        pruned_panels,
    )
    step_panels = panels_by_first_step(summary)
    by_first_step = TableFigure(
        "score_vs_first_step",
        "Score against the first step",
        "How far AdamW's first step moves the adapted matrices, with each row's own alpha and learning rate.",
        score_by_first_step,
        step_panels,
    )
    most_rows = max((len(panel.cells) for panel in panels), default=0)
    are_readable = most_rows <= _MOST_ROWS and setting != PROTOCOL
    has_curves = any(len(run.metrics["history"]) > 1 for run in summary.runs if run.metrics)
    readable = [by_parameters, *[over_epochs] * has_curves] if are_readable else []
    of_ranks = [pruned] * bool(pruned_panels and most_rows <= _MOST_ROWS)
    by_step = [by_first_step] * bool(step_panels)
    return [*of_trials, *[by_setting] * (setting is not None), *readable, *of_ranks, *by_step]


def _figures_of_trials(trials: Summary) -> list[TableFigure]:
    by_value = TableFigure(
        "trials",
        f"Validation score by {trials.table.by}",
        "A ring marks the value that was chosen for a row.",
        partial(score_by_setting, ring_best=True),
        panels_of(trials),
    )
    step_panels = panels_of_trials(trials)
    by_step = TableFigure(
        "trials_by_first_step",
        "Validation score against the first step",
        "The same scores over how far AdamW's first step moves the adapted matrices.",
        trials_by_first_step,
        step_panels,
    )
    return [by_value, *[by_step] * bool(step_panels)]


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
    figures = [figure for figure in figures_of(summary) if any(panel.has_scores for panel in figure.panels)]
    for name in set(FIGURE_NAMES) - {figure.name for figure in figures}:
        for suffix in ("png", "svg"):
            with suppress(OSError):
                (folder / f"{name}.{suffix}").unlink()
    return [path for figure in figures for path in write_figure(figure.draw(figure.panels), folder, figure.name)]


def inline_svgs(figure: TableFigure) -> list[str]:
    """A figure as <svg> elements for an HTML page, one for each panel that has a score.

    The elements fill the width that the page gives them. Their ids begin with the figure's name, so that several
    figures can be on one page. Each element has a label for screen readers.

    Args:
        figure: a figure of the table.

    Returns:
        The elements, as HTML.
    """
    elements = []
    for number, panel in enumerate(figure.panels):
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
