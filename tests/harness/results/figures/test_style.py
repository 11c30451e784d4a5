"""The files of a figure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from tenslora.constructions import CONSTRUCTIONS, PAPER_CONSTRUCTIONS
from tenslora.harness.results.figures.style import COLOURS, GREY, styled, svg


def test_every_construction_but_lora_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(CONSTRUCTIONS) - {"lora"}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_pngs_are_white_at_200_dpi(small_results: list[Path]) -> None:
    for path in small_results:
        if path.suffix == ".png":
            image = Image.open(path)
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50, "there is something to see"


def test_a_matplotlibrc_changes_no_figure() -> None:
    def drawn() -> str:
        with styled():
            figure, axes = plt.subplots()
            axes.plot([1, 2], [3, 4])
            axes.set_xlabel("lr $10")
            plt.close(figure)
        return svg(figure)

    expected = drawn()
    with plt.rc_context({"text.usetex": True, "lines.linewidth": 9, "figure.autolayout": True}):
        assert drawn() == expected
        assert plt.rcParams["text.usetex"]


def test_svgs_take_the_colour_and_font_of_the_page(small_results: list[Path]) -> None:
    (text,) = (path.read_text() for path in small_results if path.name == "score_vs_parameters.svg")
    root = ET.fromstring(text)
    assert {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")} >= set(PAPER_CONSTRUCTIONS)
    assert "<style" not in text
    assert "<image" not in text
    inks = set(re.findall(r"(?:fill|stroke): (#\w+)", text)) - {colour.lower() for colour in COLOURS.values()}
    assert inks <= {GREY}
    assert "currentColor" in text
    assert "system-ui" in text
    assert "date" not in text
