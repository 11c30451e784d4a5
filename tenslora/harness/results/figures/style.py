"""The style that all figures share: colours, fonts, and the files that figures are written to."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure

from tenslora.files import write_bytes

# Okabe and Ito's palette. Its yellow cannot be seen on white; Tol's purple takes its place.
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
"""The colour of each construction."""

INK = "#010203"
"""A black that nothing else has, so that an SVG can replace it by the colour of the text around the figure."""

GREY = "#767676"
"""The lightest grey that can be read on white. An HTML page replaces it by the page's own muted colour."""

FONT_SIZE = 8.5
"""The size of text, in points."""

WIDTH, HEIGHT = 4.4, 3.3
"""The size of a panel, in inches."""

_FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
_PAGE_FONTS = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": list(_FONTS),
    "font.size": FONT_SIZE,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelsize": FONT_SIZE,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
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


@contextmanager
def styled() -> Iterator[None]:
    """A context in which matplotlib draws in this style, whatever a matplotlibrc of the user's says."""
    with rc_context():
        rcdefaults()
        rcParams.update(_SETTINGS)
        yield


def text_width(characters: int) -> float:
    """The width of a text in inches, estimated from its length, because an SVG is shown in its reader's font.

    Args:
        characters: the length of the text.
    """
    return characters * 0.55 * FONT_SIZE / 72


def shortened(text: str, longest: int) -> str:
    """Shorten a text to at most `longest` characters. Its beginning and its end stay, because they tell most.

    >>> shortened("optimizer.betas", 9)
    'opti…etas'

    Args:
        text: the text.
        longest: the largest number of characters.
    """
    return text if len(text) <= longest else f"{text[: (longest - 1) // 2]}…{text[-(longest // 2) :]}"


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG (200 dpi, on white) and as SVG (in the colour of the text around it).

    Equal figures give equal SVGs.

    Args:
        figure: a figure that was drawn within `styled`.
        folder: the folder to write to.
        name: the name of the files, without suffix.

    Returns:
        The files.

    Raises:
        TensLoRAError: if a file cannot be written.
    """
    contents = {folder / f"{name}.png": _png(figure), folder / f"{name}.svg": svg(figure).encode()}
    for path, content in contents.items():
        write_bytes(path, content)
    return list(contents)


def svg(figure: Figure) -> str:
    """A figure as an SVG document in the colour and the font of the page that contains it.

    Args:
        figure: a figure that was drawn within `styled`.
    """
    content = io.BytesIO()
    without_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(content, format="svg", transparent=True, metadata=without_metadata)
    text = content.getvalue().decode()
    # matplotlib's style sheet would apply to the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    text = text.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    text = text.replace(INK, "currentColor")
    fonts = ", ".join(f"'{font}'" for font in _FONTS)
    return text.replace(f"{fonts}, sans-serif", _PAGE_FONTS)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return content.getvalue()
