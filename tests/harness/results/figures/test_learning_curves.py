"""Learning curves, read back from what matplotlib drew."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import same_color

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results.figures.learning_curves import learning_curves
from tenslora.harness.results.figures.style import COLOURS
from tests.drawn import only_axes, panels, texts, xy
from tests.tables import DTD, make_run, make_table, sample_table


def test_curves_are_means_over_the_completed_runs_at_their_common_epochs() -> None:
    runs = [
        make_run("lora", seed=0, epochs=[0.2, 0.4, 0.6]),
        make_run("lora", seed=1, epochs=[0.4, 0.6]),
        make_run("lora", seed=2, epochs=[0.0], problem="diverged"),
        make_run("att", "isorank", seed=0),
    ]
    axes = only_axes(learning_curves(panels(make_table(runs))))
    (line,) = axes.lines
    assert xy(line) == [pytest.approx([1, 30.0]), pytest.approx([2, 50.0])]
    (band,) = axes.collections
    (outline,) = band.get_paths()
    deviation = 100 * np.std([0.2, 0.4], ddof=1)  # equal in both epochs
    for epoch, mean in ((1, 30.0), (2, 50.0)):
        heights = {round(y, 6) for x, y in np.asarray(outline.vertices) if x == epoch}
        assert (min(heights), max(heights)) == pytest.approx((mean - deviation, mean + deviation))
    assert texts(axes) == ["lora"]


def test_a_curve_has_the_colour_of_its_construction() -> None:
    axes = only_axes(learning_curves(panels(sample_table((DTD,), ("isoparameters",), seeds=1))))
    for mode, line in list(zip(PAPER_CONSTRUCTIONS, axes.lines, strict=False))[1:]:
        assert same_color(line.get_color(), COLOURS[mode])
