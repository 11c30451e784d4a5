"""Scores by a setting, read back from what matplotlib drew."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tenslora.harness.results.figures.by_setting import score_by_setting
from tests.drawn import axes_by_title, bar_lines, only_axes, panels, texts, xy
from tests.tables import make_run, make_table, swept_table


@pytest.mark.parametrize(
    ("values", "connected"), [(("1", "2", "4", "8"), 2), (("orthogonal", "normal"), 0)], ids=["numbers", "names"]
)
def test_means_stand_over_their_values_and_are_connected_if_these_are_numbers(
    values: tuple[str, ...], connected: int
) -> None:
    axes = only_axes(score_by_setting(panels(swept_table("optimizer.core_lr_ratio", values))))
    assert [label.get_text() for label in axes.get_xticklabels()] == list(values)
    assert axes.get_xlabel() == "optimizer.core_lr_ratio"
    lines = bar_lines(axes)
    assert len(lines) == 2
    assert sum(line.get_linestyle() == "-" for line in lines) == connected
    for number, line in enumerate(lines, start=1):
        x, y = np.array(xy(line)).T
        assert y == pytest.approx([50 + 5 * number + 2 * k for k in range(len(values))])
        assert np.abs(x - np.arange(len(values))).max() < 0.5  # beside its value, and nearer to it than to the next
    across = [xy(line)[0][1] for line in axes.lines if line.get_linestyle() == "--"]
    assert across == pytest.approx([50, 65])
    assert {*texts(axes)} >= {"lora", "qkv", "depth", "head_only"}


def test_a_panel_that_the_setting_does_not_change_is_drawn_all_the_same() -> None:
    runs = [*swept_table("adapter.alpha", "12", ["qkv"]).runs, make_run("att", "isoparameters", epochs=[0.5])]
    axes = axes_by_title(score_by_setting(panels(make_table(runs))))
    assert sorted(axes) == ["dtd · vit_base · isoparameters", "dtd · vit_base · isorank"]
    assert not bar_lines(axes["dtd · vit_base · isoparameters"])


def test_a_row_with_and_without_a_value_is_drawn_both_ways() -> None:
    runs = [*swept_table("adapter.alpha", "12", ["qkv"]).runs, make_run("qkv", "isorank", epochs=[0.7])]
    axes = only_axes(score_by_setting(panels(make_table(runs))))
    (line,) = bar_lines(axes)
    assert [y for _, y in xy(line)] == pytest.approx([50, 52])
    assert [xy(line)[0][1] for line in axes.lines if line.get_linestyle() == "--"] == pytest.approx([70])


def test_long_values_leave_each_other_room() -> None:
    values = [f"[0.9,0.999{'0' * 40}{end}]" for end in range(4)]
    figure = score_by_setting(panels(swept_table("optimizer.betas", values)))
    figure.canvas.draw()
    labels = only_axes(figure).get_xticklabels()
    assert all(left.get_window_extent().x1 < right.get_window_extent().x0 for left, right in pairwise(labels))
    assert len({label.get_text() for label in labels}) == 4
