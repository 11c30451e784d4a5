"""Scores against parameters, read back from what matplotlib drew."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from matplotlib.colors import same_color

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results.figures.by_parameters import score_by_parameters
from tenslora.harness.results.figures.style import COLOURS
from tests.drawn import bar_lines, error_bars, only_axes, panels, texts, xy
from tests.tables import DTD, make_run, make_table, sample_table


def test_unequal_counts_are_drawn_over_parameters() -> None:
    table = sample_table((DTD,), ("isorank",))
    axes = only_axes(score_by_parameters(panels(table)))
    assert axes.get_xscale() == "log"
    expected = {}
    for row in table.rows:
        if row.tensor_mode != "head_only":
            runs = table.cell(row, DTD)
            scores = [100 * run.record["metrics"]["last"] for run in runs if run.record and not run.problem]
            expected[runs[0].parameters] = statistics.fmean(scores)
    drawn = {parameters: score for line in bar_lines(axes) for parameters, score in xy(line)}
    assert drawn == pytest.approx(expected)
    across = [xy(line)[0][1] for line in axes.lines if xy(line)[0][0] == 0]
    lora_parameters = table.cell(table.rows[0], DTD)[0].parameters
    assert pytest.approx(expected[lora_parameters]) in across


def test_equal_counts_are_listed_by_name() -> None:
    table = sample_table((DTD,), ("isoparameters",))
    axes = only_axes(score_by_parameters(panels(table)))
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.get_yticklabels()] == [*PAPER_CONSTRUCTIONS, "head_only"]
    means = [statistics.fmean(100 * score for score in table.scores(row, DTD).values()) for row in table.rows]
    drawn = {height: score for line in bar_lines(axes) for score, height in xy(line)}
    assert drawn == pytest.approx(dict(enumerate(means[:-1])))
    # head_only is far below: its score is written, and does not stretch the axis.
    assert f"← {means[-1]:.1f}" in texts(axes)
    assert axes.get_xlim()[0] > means[-1]
    for mode, line in list(zip(PAPER_CONSTRUCTIONS, bar_lines(axes), strict=True))[1:]:
        assert same_color(line.get_color(), COLOURS[mode])


def test_error_bars_are_one_standard_deviation() -> None:
    runs = [make_run("lora", seed=seed, epochs=[score]) for seed, score in enumerate((0.5, 0.6, 0.7))]
    (container,) = error_bars(only_axes(score_by_parameters(panels(make_table(runs)))))
    (segments,) = container.lines[2]
    assert np.asarray(segments.get_segments()[0])[:, 0] == pytest.approx([50.0, 70.0])
