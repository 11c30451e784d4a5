"""Scores over first steps, read back from what matplotlib drew."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tenslora.harness.results.figures import figures_of
from tenslora.harness.results.figures.by_first_step import panels_by_first_step, score_by_first_step
from tenslora.harness.results.ordering import spearman
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run, Table
from tests.drawn import axes_by_title, bar_lines, only_axes, texts, xy
from tests.tables import COLA, make_run, make_table, swept_table

ROWS = [("lora", ""), ("att", "isorank"), ("qkv", "isorank"), ("depth", "isoparameters")]
STEPS = {"lora": 32.0, "att": 8.0, "qkv": 4.0, "depth": 64.0}
SCORES = {"lora": 0.7, "att": 0.6, "qkv": 0.65, "depth": 0.75}


def runs_of(steps: Mapping[str, float] = STEPS, rates: Mapping[str, float] | None = None, **more: Any) -> list[Run]:
    """Two seeds of four rows with the first steps given, and of head_only, which has none."""
    runs = []
    for mode, strategy in [*ROWS, ("head_only", "")]:
        for seed in range(2):
            run = make_run(mode, strategy, seed=seed, epochs=[SCORES.get(mode, 0.5) + seed / 50], **more)
            record = {**(run.record or {}), "first_step": steps.get(mode), "lora_first_step": 32.0}
            if rates:
                optimizer = {"lr": rates.get(mode, 1e-3), "core_lr_ratio": 2.0}
                record["config"] = {"optimizer": optimizer, "adapter": {"alpha": 8 if mode == "depth" else 4}}
            runs.append(replace(run, record=record))
    return runs


def drawn(table: Table) -> dict[str, dict[float, float]]:
    """The mean score by first step in each panel."""
    figure = score_by_first_step(panels_by_first_step(summarize(table)))
    return {title: {x: y for line in bar_lines(axes) for x, y in xy(line)} for title, axes in
            axes_by_title(figure).items()}  # fmt: skip


def test_every_row_with_an_adapter_stands_at_its_first_step_beside_loras() -> None:
    table = make_table(runs_of())
    (title, points), = drawn(table).items()  # fmt: skip
    assert title == "dtd · vit_base"
    expected = {STEPS[mode] / 32: 100 * (SCORES[mode] + 0.01) for mode, _ in ROWS}
    assert points == pytest.approx(expected)
    figure = score_by_first_step(panels_by_first_step(summarize(table)))
    assert {mode for mode, _ in ROWS} <= set(texts(only_axes(figure)))
    # By step qkv, att, lora, depth have ranks 2, 1, 3, 4: 1 - 6 (1 + 1) / (4 (16 - 1)).
    notes = [text.get_text() for place in figure.subfigs for text in place.texts]
    assert notes[1] == "Spearman 0.80, 4 rows; circle: isorank, square: isoparameters"


def test_a_tuned_rate_or_alpha_is_part_of_the_step() -> None:
    (points,) = drawn(make_table(runs_of(rates={"lora": 5e-3, "qkv": 1e-3, "att": 48e-3}))).values()
    assert sorted(points) == pytest.approx([4 / 32 / 5, 2 * 64 / 32 / 5, 1.0, 8 / 32 * 48 / 5])


def test_each_column_and_each_protocol_has_a_panel() -> None:
    table = make_table([*runs_of(), *runs_of(column=COLA)])
    assert list(drawn(table)) == ["dtd · vit_base", "cola · minilm"]
    equal = dict.fromkeys(STEPS, 32.0)
    by_protocol = {"direct": runs_of(), "first_step": runs_of(equal), "tuned": runs_of(rates={"att": 4e-3})}
    runs = [
        replace(run, row=replace(run.row, variant=(f"protocol={name}",)))
        for name, of_protocol in by_protocol.items()
        for run in of_protocol
    ]
    panels = drawn(make_table(runs, by="protocol"))
    assert list(panels) == ["dtd · vit_base · direct", "dtd · vit_base · tuned"]
    assert panels["dtd · vit_base · direct"] == drawn(make_table(runs_of()))["dtd · vit_base"]


def test_what_says_nothing_is_not_drawn() -> None:
    def names(table: Table) -> list[str]:
        return [figure.name for figure in figures_of(summarize(table))]

    assert names(make_table(runs_of()))[-1] == "score_vs_first_step"
    assert names(make_table(runs_of()[:6])) == ["score_vs_parameters"], "three rows"
    assert names(make_table(runs_of(dict.fromkeys(STEPS, 32.0)))) == ["score_vs_parameters"], "equal first steps"
    assert "score_vs_first_step" not in names(swept_table("adapter.alpha", ["1", "4", "16"]))


def test_the_correlation_is_pearsons_of_the_ranks() -> None:
    steps, scores = [1.0, 5.0, 2.0, 9.0, 3.0], [0.3, 0.2, 0.5, 0.6, 0.1]
    ranks = [[sorted(of).index(value) for value in of] for of in (steps, scores)]
    assert spearman(steps, scores) == pytest.approx(statistics.correlation(*ranks))
    assert math.isnan(spearman([1.0, 1.0], [0.1, 0.2]))
    assert math.isnan(spearman([1.0, 2.0], [0.1, 0.1]))
