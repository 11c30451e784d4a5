"""What matplotlib figures show, for the tests of figures."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tenslora.harness.results.figures.panels import Panel, panels_of
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Table


def panels(table: Table) -> list[Panel]:
    """The panels of a table's figures."""
    return panels_of(summarize(table))


def axes_by_title(figure: Figure) -> dict[str, Axes]:
    """The axes of each panel by its title."""
    return {place.texts[0].get_text(): place.axes[0] for place in figure.subfigs if place.axes and place.texts}


def only_axes(figure: Figure) -> Axes:
    """The axes of a figure's only panel."""
    (axes,) = axes_by_title(figure).values()
    return axes


def texts(axes: Axes) -> list[str]:
    """The texts in the axes that are not empty."""
    return [text.get_text() for text in axes.texts if text.get_text()]


def error_bars(axes: Axes) -> list[ErrorbarContainer]:
    """What `errorbar` drew."""
    return [container for container in axes.containers if isinstance(container, ErrorbarContainer)]


def bar_lines(axes: Axes) -> list[Line2D]:
    """The lines or marks through the middles of the error bars."""
    return [container.lines[0] for container in error_bars(axes)]


def xy(line: Line2D) -> list[list[float]]:
    """The points of a line."""
    points: list[list[float]] = np.asarray(line.get_xydata()).tolist()
    return points
