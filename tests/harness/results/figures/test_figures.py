"""Which figures a table has, and that their labels can be read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results.figures import figures_of, inline_svgs, write_figures
from tenslora.harness.results.figures.by_parameters import score_by_parameters
from tenslora.harness.results.figures.learning_curves import learning_curves
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Table
from tests.drawn import bar_lines, only_axes, panels, xy
from tests.tables import COLA, DIGITS, DTD, crowded_table, make_run, make_table, sample_table, swept_table

FEW, MANY = (swept_table("adapter.alpha", [str(k) for k in range(count)], epochs=(0.1, 0.0)) for count in (3, 8))
"""Tables of 8 rows, of which all figures can be read, and of 18."""


@pytest.mark.parametrize(
    "table",
    [
        crowded_table(),
        *(sample_table((column,), ["isorank"], random_seed=seed) for column in (DTD, DIGITS) for seed in (0, 1)),
    ],
    ids=["crowded", "dtd 0", "dtd 1", "digits 0", "digits 1"],
)
def test_names_cover_neither_each_other_nor_points(table: Table) -> None:
    for draw in (score_by_parameters, learning_curves):
        figure = draw(panels(table))
        axes, page = only_axes(figure), figure.bbox
        boxes = {
            text.get_text(): text.get_window_extent()
            for text in axes.texts
            if text.get_text().split(" ")[0] in (*PAPER_CONSTRUCTIONS, "head_only")
        }
        assert set(PAPER_CONSTRUCTIONS) <= set(boxes)
        for box in boxes.values():
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for (name, first), (other, second) in itertools.combinations(boxes.items(), 2):
            # A font's box has room above and below its letters.
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            assert width <= 0 or height <= 0.25 * first.height, (name, other)
        for line in bar_lines(axes):
            x, y = axes.transData.transform(xy(line)[0])
            assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes.values())


def test_a_figure_that_could_not_be_read_is_not_drawn() -> None:
    names = [[figure.name for figure in figures_of(summarize(table))] for table in (sample_table(), FEW, MANY)]
    assert names == [
        ["score_vs_parameters", "learning_curves", "score_vs_first_step"],
        ["score_by_setting", "score_vs_parameters", "learning_curves"],
        ["score_by_setting"],
    ]


def test_without_a_score_there_is_no_figure(tmp_path: Path) -> None:
    runs = [make_run("lora"), make_run("att", "isorank", epochs=[0.5], problem="diverged")]
    assert write_figures(summarize(make_table(runs)), tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_figures_that_this_table_does_not_have_are_removed(tmp_path: Path) -> None:
    for name in ("other.png", "learning_curves.svg", "score_vs_parameters.png"):
        (tmp_path / name).touch()
    written = write_figures(summarize(MANY), tmp_path)
    assert [path.name for path in written] == ["score_by_setting.png", "score_by_setting.svg"]
    assert {*tmp_path.iterdir()} == {tmp_path / "other.png", *written}
    assert write_figures(summarize(make_table([make_run("lora")])), tmp_path) == []
    assert [*tmp_path.iterdir()] == [tmp_path / "other.png"]


def test_a_page_has_a_picture_of_every_panel_with_a_score_and_its_label_is_escaped() -> None:
    runs = [make_run("lora", epochs=[0.5], variant=("a<b=1",)), make_run("lora", column=COLA)]
    summary = summarize(make_table(runs))
    (svg,) = inline_svgs(figures_of(summary)[0])
    assert 'aria-label="Score by a&lt;b: dtd · vit_base"' in svg
