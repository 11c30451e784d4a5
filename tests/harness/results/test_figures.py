from __future__ import annotations

import io
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from tenslora.constructions import CONSTRUCTIONS, PAPER_CONSTRUCTIONS
from tenslora.harness.results.figures import (
    COLOURS,
    NAMES,
    Drawing,
    drawings,
    inline_svgs,
    learning_curves,
    score_against_parameters,
    score_by_setting,
    write_figures,
)
from tenslora.harness.results.table import Column, Table
from tests.conftest import ROOT
from tests.tables import COLA, DTD, made, table, whole

SVG = "{http://www.w3.org/2000/svg}"
DIGITS = Column("digits", "vit_digits")


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes of each panel by its title."""
    return {place.texts[0].get_text(): place.axes[0] for place in figure.subfigs if place.axes and place.texts}


def bars(axes: Axes) -> list[Line2D]:
    return [container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer)]


def place(line: Line2D) -> tuple[float, float]:
    """Where a line begins, or its one point is."""
    x, y = np.asarray(line.get_xydata())[0]
    return float(x), float(y)


def test_a_panel_for_every_column_and_strategy() -> None:
    titles = [f"{c} · {s}" for s in ("isoparameters", "isorank") for c in ("dtd · vit_base", "cola · minilm")]
    for draw in (score_against_parameters, learning_curves):
        assert list(panels(draw(whole()))) == titles
    assert list(panels(score_against_parameters(whole((DTD,), ("isorank",))))) == ["dtd · vit_base · isorank"]


def test_unequal_counts_are_drawn_over_parameters() -> None:
    sample = whole((DTD,), ("isorank",))
    (axes,) = panels(score_against_parameters(sample)).values()
    assert axes.get_xscale() == "log"
    drawn = dict(place(bar) for bar in bars(axes))
    expected = {}
    for row in sample.rows:
        if row.tensor_mode != "head_only":
            run = sample.cell(row, DTD)[0]
            scores = [100 * r.record["metrics"]["last"] for r in sample.cell(row, DTD) if r.record and not r.problem]
            assert run.parameters is not None
            expected[float(run.parameters)] = statistics.fmean(scores)
    assert drawn == pytest.approx(expected)
    lora = [100 * score for score in sample.scores(sample.rows[0], DTD).values()]
    assert statistics.fmean(lora) in [pytest.approx(place(line)[1]) for line in axes.lines if place(line)[0] == 0]


def test_equal_counts_are_listed_by_name() -> None:
    sample = whole((DTD,), ("isoparameters",))
    (axes,) = panels(score_against_parameters(sample)).values()
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.get_yticklabels()] == [*PAPER_CONSTRUCTIONS, "head_only"]
    means = [statistics.fmean(100 * s for s in sample.scores(row, DTD).values()) for row in sample.rows]
    drawn = {height: score for score, height in map(place, bars(axes))}
    assert drawn == pytest.approx(dict(enumerate(means[:-1])))
    # head_only is far below: it is told, and does not stretch the axis.
    assert f"← {means[-1]:.1f}" in [text.get_text() for text in axes.texts]
    assert axes.get_xlim()[0] > means[-1]


def test_error_bars_are_one_standard_deviation() -> None:
    runs = [made("lora", seed=seed, epochs=[score]) for seed, score in enumerate((0.5, 0.6, 0.7))]
    (axes,) = panels(score_against_parameters(table(runs))).values()
    (container,) = (c for c in axes.containers if isinstance(c, ErrorbarContainer))
    (segments,) = container.lines[2]
    assert segments.get_segments()[0][:, 0] == pytest.approx([50.0, 70.0])


def test_curves_are_means_over_the_completed_runs_at_their_common_epochs() -> None:
    runs = [
        made("lora", seed=0, epochs=[0.2, 0.4, 0.6]),
        made("lora", seed=1, epochs=[0.4, 0.6]),
        made("lora", seed=2, epochs=[0.0], problem="diverged"),
        made("att", "isorank", seed=0),
    ]
    (axes,) = panels(learning_curves(table(runs))).values()
    (line,) = axes.lines
    assert np.asarray(line.get_xydata()).tolist() == pytest.approx(np.array([[1, 30.0], [2, 50.0]]))
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["lora"]


def test_a_construction_has_one_colour_everywhere_and_lora_has_the_inks() -> None:
    assert set(COLOURS) == set(CONSTRUCTIONS) - {"lora"}
    assert len(set(COLOURS.values())) == len(COLOURS)
    sample = whole((DTD,), ("isoparameters",))
    (listed,) = panels(score_against_parameters(sample)).values()
    (curves,) = panels(learning_curves(sample)).values()
    for mode, bar, line in zip(PAPER_CONSTRUCTIONS, bars(listed), curves.lines, strict=False):
        assert same_color(bar.get_color(), line.get_color())
        assert same_color(bar.get_color(), COLOURS.get(mode, listed.spines["bottom"].get_edgecolor()))


def crowded() -> Table:
    """Rows of nearly one score, two pairs of them of nearly one count too."""
    draw = random.Random(0)
    scores = {mode: [0.7 + draw.uniform(-0.002, 0.002) for _ in range(2)] for mode in PAPER_CONSTRUCTIONS}
    return table(
        made(mode, "" if mode == "lora" else "isorank", seed=seed, epochs=[score], column=DIGITS)
        for mode in PAPER_CONSTRUCTIONS
        for seed, score in enumerate(scores[mode])
    )


@pytest.mark.parametrize(
    "sample",
    [crowded(), *(whole((column,), ["isorank"], random_seed=seed) for column in (DTD, DIGITS) for seed in (0, 1))],
    ids=["crowded", "dtd 0", "dtd 1", "digits 0", "digits 1"],
)
def test_names_cover_neither_each_other_nor_points(sample: Table) -> None:
    for draw in (score_against_parameters, learning_curves):
        figure = draw(sample)
        renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        (axes,) = panels(figure).values()
        boxes = {
            t.get_text(): t.get_window_extent(renderer)
            for t in axes.texts
            if t.get_text().split(" ")[0] in (*PAPER_CONSTRUCTIONS, "head_only")
        }
        assert set(PAPER_CONSTRUCTIONS) <= set(boxes)
        page = figure.get_window_extent(renderer)
        for box in boxes.values():
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for (a, first), (b, second) in itertools.combinations(boxes.items(), 2):
            # A font's box has room above and below its letters.
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            assert width <= 0 or height <= 0.25 * first.height, (a, b)
        for bar in bars(axes):
            x, y = axes.transData.transform(place(bar))
            assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes.values())


@pytest.mark.parametrize("modes", [("qkv", "depth"), ("lora",)])
def test_a_name_of_any_length_leaves_room_for_the_scores(modes: tuple[str, ...]) -> None:
    variants = [(f"optimizer.betas=[0.9,0.999{'0' * 60}{end}]",) for end in (1, 2)]
    sample = table(made(mode, "isorank", epochs=[0.5, 0.6], variant=variant) for mode in modes for variant in variants)
    for draw in (score_against_parameters, learning_curves):
        (axes,) = panels(draw(sample)).values()
        assert axes.get_position().width > 0.2
        names = [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]
        for mode in modes:
            assert len({name for name in names if name.startswith(f"{mode} optimizer") and "…" in name}) == 2


def swept(setting: str, values: Sequence[str], modes: Sequence[str] = ("lora", "qkv", "depth", "head_only")) -> Table:
    """Three seeds of each construction at each value; lora and head_only do not depend on it."""
    runs = []
    for number, mode in enumerate(modes):
        alone = mode in ("lora", "head_only")
        for k, value in enumerate(values[:1] if alone else values):
            scores = [0.5 + 0.05 * number + 0.02 * k + shift for shift in (-0.01, 0.0, 0.01)]
            variant = () if alone else (f"{setting}={value}",)
            strategy = "" if alone else "isorank"
            runs += [made(mode, strategy, seed=s, epochs=[x], variant=variant) for s, x in enumerate(scores)]
    return table(runs)


def test_a_setting_that_is_swept_is_drawn_across_with_lines_between_numbers_only() -> None:
    for values, lines in (("1", "2", "4", "8"), 2), (("orthogonal", "normal"), 0):
        (axes,) = panels(score_by_setting(swept("optimizer.core_lr_ratio", values))).values()
        assert [label.get_text() for label in axes.get_xticklabels()] == list(values)
        assert axes.get_xlabel() == "optimizer.core_lr_ratio"
        drawn = bars(axes)
        assert len(drawn) == 2
        assert sum(line.get_linestyle() == "-" for line in drawn) == lines
        for number, line in enumerate(drawn, start=1):
            x, y = np.asarray(line.get_xydata()).T
            assert y == pytest.approx([50 + 5 * number + 2 * k for k in range(len(values))])
            assert np.abs(x - np.arange(len(values))).max() < 0.5  # beside its value, and nearer to it than to the next
        across = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]  # type: ignore[index]
        assert across == pytest.approx([50, 65])
        assert {text.get_text() for text in axes.texts} >= {"lora", "qkv", "depth", "head_only"}


def test_a_panel_that_the_setting_does_not_change_is_drawn_all_the_same() -> None:
    runs = [*swept("adapter.alpha", "12", ["qkv"]).runs, made("att", "isoparameters", epochs=[0.5])]
    drawn = panels(score_by_setting(table(runs)))
    assert sorted(drawn) == ["dtd · vit_base · isoparameters", "dtd · vit_base · isorank"]
    assert not bars(drawn["dtd · vit_base · isoparameters"])


def test_long_values_leave_each_other_room() -> None:
    values = [f"[0.9,0.999{'0' * 40}{end}]" for end in range(4)]
    figure = score_by_setting(swept("optimizer.betas", values))
    figure.canvas.draw()
    (axes,) = panels(figure).values()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert len({label.get_text() for label in axes.get_xticklabels()}) == 4


def test_a_figure_that_could_not_be_read_is_not_drawn() -> None:
    assert [each.name for each in drawings(whole())] == ["score_vs_parameters", "learning_curves"]
    few, many = (swept("adapter.alpha", [str(k) for k in range(count)]) for count in (3, 8))
    assert tuple(each.name for each in drawings(few)) == NAMES
    assert [each.name for each in drawings(many)] == ["score_by_setting"]


def test_files_are_written_and_pngs_are_white_at_200_dpi(tmp_path: Path) -> None:
    paths = write_figures(whole((DTD,), ["isorank"], seeds=2), tmp_path)
    names = ["score_vs_parameters.png", "score_vs_parameters.svg", "learning_curves.png", "learning_curves.svg"]
    assert paths == [tmp_path / name for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for path in paths[::2]:
        image = Image.open(path)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50, "there is something to see"


def test_without_a_score_there_is_no_figure(tmp_path: Path) -> None:
    runs = [made("lora"), made("att", "isorank", epochs=[0.5], problem="diverged")]
    assert write_figures(table(runs), tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_figures_of_the_table_before_that_are_not_drawn_any_more_go(tmp_path: Path) -> None:
    other = tmp_path / "mine.png"
    other.touch()
    few, many = (swept("adapter.alpha", [str(k) for k in range(count)]) for count in (3, 8))
    assert len(write_figures(few, tmp_path)) == 6
    written = write_figures(many, tmp_path)
    assert len(written) == 2
    assert {*tmp_path.iterdir()} == {other, *written}
    assert write_figures(table([made("lora")]), tmp_path) == []
    assert [*tmp_path.iterdir()] == [other]


def test_a_column_without_a_score_does_not_hinder_the_others(tmp_path: Path) -> None:
    runs = [made("lora", epochs=[0.5]), made("lora", column=COLA)]
    assert len(write_figures(table(runs), tmp_path)) == 4
    assert len(inline_svgs(table(runs), Drawing("a", "what", "", score_against_parameters))) == 1


def test_svgs_are_equal_to_the_byte_from_process_to_process() -> None:
    asked = (
        "from tests.tables import DTD, whole; from tenslora.harness.results.figures import *;"
        "print(inline_svgs(whole((DTD,), ['isorank']), Drawing('a', 'b', '', score_against_parameters)))"
    )
    ours = inline_svgs(whole((DTD,), ["isorank"]), Drawing("a", "b", "", score_against_parameters))
    command, environment = [sys.executable, "-c", asked], {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{ours}\n"


def test_svgs_take_the_colour_and_font_of_the_page(tmp_path: Path) -> None:
    text = write_figures(whole((DTD,), ["isoparameters"], seeds=2), tmp_path)[1].read_text()
    root = ET.fromstring(text)
    assert {text_ for element in root.iter(f"{SVG}text") if (text_ := element.text)} >= set(PAPER_CONSTRUCTIONS)
    assert not list(root.iter(f"{SVG}image")) and not list(root.iter(f"{SVG}style"))
    inks = set(re.findall(r"(?:fill|stroke): (#\w+)", text)) - {colour.lower() for colour in COLOURS.values()}
    assert inks <= {"#767676"}
    assert "currentColor" in text
    assert "date" not in text


def test_several_svgs_can_stand_in_one_page() -> None:
    pictures = Drawing("a", "x < y", "", score_against_parameters), Drawing("b", "c", "", learning_curves)
    svgs = [svg for each in pictures for svg in inline_svgs(whole(), each)]
    assert len(svgs) == 8
    ids: list[str] = []
    for svg in svgs:
        root: Any = ET.parse(io.StringIO(svg)).getroot()
        own = [element.get("id") for element in root.iter() if element.get("id")]
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
        assert used and set(used) <= set(own)
        ids += own
        assert root.get("viewBox") and not root.get("width") and not root.get("height")
    assert len(ids) == len(set(ids))
    assert 'aria-label="x &lt; y: dtd · vit_base · isoparameters"' in svgs[0]
