"""Ranks over epochs, read back from what matplotlib drew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tenslora.harness.results.figures import figures_of
from tenslora.harness.results.figures.ranks_by_epoch import ranks_by_epoch
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run
from tests.drawn import only_axes, texts, xy
from tests.tables import make_run, make_table

GEOMETRY = {"d_in": 64, "heads": 4, "d_head": 16, "layers": 4}


def pruned(seed: int, ranks: list[list[int]]) -> Run:
    run = make_run("qkv", "isorank", seed=seed, epochs=[0.5, 0.6])
    of_ranks: dict[str, Any] = {"geometry": GEOMETRY, "factorization": "tucker", "ranks_by_epoch": ranks}
    return replace(run, record={**(run.record or {}), "tensor_mode": "qkv", **of_ranks})


def test_ranks_are_means_over_the_runs_that_cut_them() -> None:
    runs = [
        pruned(0, [[9, 8, 3], [5, 8, 3]]),
        pruned(1, [[9, 8, 3], [7, 4, 3]]),
        make_run("lora", seed=0, epochs=[0.5, 0.6]),
    ]
    (figure,) = [figure for figure in figures_of(summarize(make_table(runs))) if figure.name == "ranks_by_epoch"]
    axes = only_axes(ranks_by_epoch(figure.panels))
    assert [xy(line) for line in axes.lines] == [[[1, 9], [2, 6]], [[1, 8], [2, 6]], [[1, 3], [2, 3]]]
    assert [text.rpartition(" ")[2] for text in texts(axes)] == ["d_in", "d_out", "projection"]


def test_a_table_of_fixed_ranks_has_no_such_figure() -> None:
    names = [
        figure.name for figure in figures_of(summarize(make_table([make_run("qkv", "isorank", epochs=[0.5, 0.6])])))
    ]
    assert "ranks_by_epoch" not in names
