"""What a table says, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tenslora.harness.results.summary import Summary, summarize
from tenslora.harness.results.table import AdapterSize, Column, Run
from tenslora.harness.training.metrics import METRICS, Metric
from tests.tables import COLA, DIGITS, DTD, STSB, make_run, make_table, sample_table

THREE_ROWS = make_table(
    [
        *(make_run("qkv", "isorank", seed=s, epochs=[0.9, score]) for s, score in enumerate((0.5, 0.6, 0.7))),
        *(make_run("lora", seed=s, epochs=[0.1, score]) for s, score in enumerate((0.4, 0.6, 0.5))),
        make_run("full", seed=0, epochs=[0.95]),
    ]
)


def texts(summary: Summary) -> list[str]:
    """The first column's cells, best ones between stars."""
    return [row.cells[0].text("*{}*", "±") for row in summary.rows]


def test_a_cell_has_mean_and_deviation_in_per_cent() -> None:
    lora, qkv, full = (row.cells[0] for row in summarize(THREE_ROWS).rows)
    assert (lora.mean, lora.deviation) == pytest.approx((50, 10))
    assert (qkv.mean, qkv.deviation) == pytest.approx((60, 10))
    assert (full.mean, full.deviation) == (95, None)
    assert qkv.scores == {0: 0.5, 1: 0.6, 2: 0.7}
    assert texts(summarize(THREE_ROWS)) == ["50.0 ± 10.0", "*60.0* ± 10.0", "95.0"]


def test_the_best_score_is_shown_where_the_table_asks_for_it() -> None:
    summary = summarize(replace(THREE_ROWS, score="best"))
    assert texts(summary) == ["50.0 ± 10.0", "*90.0* ± 0.0", "95.0"]
    assert "of the best epoch" in summary.caption


def test_a_negative_mean_has_a_true_minus_and_zero_has_none() -> None:
    runs = [make_run("lora", column=COLA, epochs=[-0.123]), make_run("att", "isorank", column=COLA, epochs=[-0.0001])]
    assert texts(summarize(make_table(runs))) == ["\N{MINUS SIGN}12.3", "*0.0*"]


def test_all_rows_that_show_the_best_mean_are_best() -> None:
    scores = {"att": 0.70012, "qkv": 0.69951, "depth": 0.6994}
    runs = [make_run(mode, "isorank", epochs=[score]) for mode, score in scores.items()]
    assert texts(summarize(make_table(runs))) == ["*70.0*", "*70.0*", "69.9"]


def test_the_lowest_mean_is_best_where_a_smaller_score_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], larger_is_better=False))
    summary = summarize(THREE_ROWS)
    assert texts(summary) == ["*50.0* ± 10.0", "60.0 ± 10.0", "95.0"]
    assert not summary.columns[0].larger_is_better


def test_a_row_has_its_adapters_ranks_and_parameters() -> None:
    lora, qkv, full = summarize(THREE_ROWS).rows
    assert (lora.ranks, lora.parameters, lora.percent_of_lora) == ("4", "221,184", "100.0")
    assert (qkv.ranks, qkv.parameters, qkv.percent_of_lora) == ("4, 4, 4", "74,640", "33.7")
    assert qkv.sizes == (AdapterSize(((4, 4, 4),), 74640, 221184, 0.125),)
    assert (full.ranks, full.parameters, full.percent_of_lora) == ("-", "-", "-")
    assert (lora.first_step, qkv.first_step, full.first_step) == ("1.00", "0.12", "-")


def test_counts_that_differ_between_backbones_stand_side_by_side() -> None:
    rows = (("lora", ""), ("att", "isorank"))
    runs = [make_run(mode, strategy, epochs=[0.5], column=column) for mode, strategy in rows for column in (DTD, COLA)]
    summary = summarize(make_table(runs))
    att = summary.rows[1]
    assert (att.ranks, att.parameters, att.percent_of_lora) == ("4, 4, 4", "123,840 / 31,968", "56.0 / 57.8")
    assert summary.caption.endswith("differ between backbones: vit_base / minilm.")


def test_a_rule_sets_lora_strategies_and_reference_rows_apart() -> None:
    starts = {row.row.label: row.starts_group for row in summarize(sample_table()).rows}
    assert [label for label, starts_group in starts.items() if starts_group] == [
        "att isoparameters",
        "att isorank",
        "head_only",
    ]


def test_the_caption_tells_which_score_is_shown_over_how_many_seeds() -> None:
    assert (
        "after the last epoch in per cent, mean ± standard deviation over 1 to 3 seeds" in summarize(THREE_ROWS).caption
    )
    assert "in per cent, one seed." in summarize(sample_table((DTD,), seeds=1)).caption


def test_the_caption_tells_the_unit_of_each_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def caption(*columns: Column) -> str:
        return summarize(sample_table(columns, ("isorank",), seeds=1, epochs=1)).caption

    assert "after the last epoch in per cent, one" in caption(DTD, DIGITS)
    assert "after the last epoch times 100, one" in caption(STSB, COLA)
    assert "epoch (accuracy in per cent, matthews and pearson times 100), one" in caption(DTD, COLA, STSB)
    error = Metric("pearson", METRICS["pearson"].function, highest=math.inf, larger_is_better=False, task="regression")
    monkeypatch.setitem(METRICS, "pearson", error)
    assert "epoch (accuracy in per cent, pearson as it is), one" in caption(DTD, STSB)
    assert "A lower pearson is better." in caption(STSB)
    runs = [make_run("lora", epochs=[2.5], column=STSB), make_run("att", "isorank", epochs=[2.25], column=STSB)]
    assert summarize(make_table(runs)).comparisons[0].texts[0] == "\N{MINUS SIGN}0.25"


def test_a_row_has_the_size_of_a_run_with_a_record_whichever_it_is() -> None:
    first, second = (make_run("qkv", "isorank", seed=seed, epochs=[0.5]) for seed in range(2))
    unknown = replace(first, record=None, ranks=None, parameters=None, problem="missing")
    (row,) = summarize(make_table([unknown, second])).rows
    assert (row.parameters, row.ranks) == (f"{second.parameters:,}", "4, 4, 4")


def test_the_caption_names_the_split_that_the_scores_are_of() -> None:
    def scored_on(*splits: str) -> list[Run]:
        runs = [make_run("lora", seed=seed, epochs=[0.5]) for seed in range(2)]
        return [
            replace(run, record={**(run.record or {}), "scored_on": split})
            for run, split in zip(runs, splits, strict=True)
        ]

    assert summarize(THREE_ROWS).caption.startswith("Test score after")  # records of earlier versions do not say
    assert summarize(make_table(scored_on("validation", "validation"))).caption.startswith("Validation score after")
    assert summarize(make_table(scored_on("validation", "test"))).caption.startswith("Score after")


def test_the_caption_tells_of_runs_that_were_scored_on_other_data() -> None:
    def caption(*variants: str) -> str:
        runs = [make_run("lora", seed=n, epochs=[0.5], variant=(word,)) for n, word in enumerate(variants)]
        assert runs[1].record
        runs[1].record["test_examples"] = 1500
        return summarize(make_table(runs)).caption

    assert "The runs on dtd with vit_base were scored on 400 and 1,500 examples: the data has" in caption("a=1", "a=2")
    assert "were scored on" not in caption("dataset.test_split=a", "dataset.test_split=b")


def test_a_cell_tells_what_it_lacks_and_why() -> None:
    def runs(mode: str, *problems: str) -> list[Run]:
        return [
            make_run(mode, "isorank", seed=seed, epochs=[] if problem else [0.5], problem=problem)
            for seed, problem in enumerate(problems)
        ]

    summary = summarize(
        make_table(
            [
                *runs("att", "", "", ""),
                *runs("qkv", "", "missing", ""),
                *runs("depth", "", "out of memory", "missing"),
                *runs("att_qkv", "missing", "missing", "missing"),
                *runs("att_depth", "missing", "diverged", "missing"),
                make_run("lora", column=COLA),
            ]
        )
    )
    lora, *others = summary.rows
    assert [row.cells[0].remark for row in others] == [
        "",
        "(2 of 3 seeds)",
        "(1 of 3 seeds, 1 failed)",
        "missing",
        "failed",
    ]
    assert [row.cells[0].problems for row in others[:3]] == [[], ["missing"], ["out of memory", "missing"]]
    assert [(run.row.tensor_mode, run.seed) for run in summary.failures] == [("depth", 1), ("att_depth", 1)]
    assert lora.cells[0].remark == "", "the table has no such runs"


def test_the_difference_from_lora_is_a_paired_t_test_in_points() -> None:
    # Differences 10, 0 and 20 points: 10 ± t(0.975; 2) 10 / sqrt 3, with t = 4.30265 from a printed table. Of
    # the 8 ways to flip their signs, 4 have a mean as far from 0. Three seeds show 3.26404 deviations (statsmodels).
    qkv, full = summarize(THREE_ROWS).comparisons
    assert (qkv.row.label, qkv.column) == ("qkv isorank", DTD)
    interval = "[\N{MINUS SIGN}14.84, +34.84]"
    assert qkv.texts == ("+10.00", interval, "0.225", "0.225", "0.5000 (0.2500)", "32.64", "3")
    assert full.texts == ("+55.00", "-", "-", "-", "-", "-", "1")
    lora_row, qkv_row, _ = summarize(THREE_ROWS).rows
    assert (lora_row.cells[0].difference, qkv_row.cells[0].difference) == (None, qkv.difference)


def test_there_is_no_comparison_without_lora_or_without_a_common_seed() -> None:
    runs = [run for run in THREE_ROWS.runs if run.row.tensor_mode != "lora"]
    assert summarize(make_table(runs)).comparisons == ()
    assert summarize(make_table([*runs, make_run("lora", seed=9, epochs=[0.5])])).comparisons == ()
    both = [*runs, make_run("lora", epochs=[0.5]), make_run("att", "isorank", seed=5, epochs=[0.5])]
    att = next(against for against in summarize(make_table(both)).comparisons if against.row.tensor_mode == "att")
    assert att.texts == ("-", "-", "-", "-", "-", "-", "0")


def test_the_differences_from_lora_are_corrected_together_in_each_column() -> None:
    def runs(mode: str, column: Column, scores: Sequence[float]) -> list[Run]:
        strategy = "" if mode == "lora" else "isorank"
        return [make_run(mode, strategy, seed=s, epochs=[score], column=column) for s, score in enumerate(scores)]

    wobbles = {"att": (0.62, 0.59, 0.66), "qkv": (0.55, 0.53, 0.58), "depth": (0.49, 0.52, 0.48)}
    rows = [run for mode, scores in wobbles.items() for run in runs(mode, DTD, scores)]
    rows += [run for column in (DTD, DIGITS) for run in runs("lora", column, (0.5, 0.5, 0.5))]
    rows += runs("att", DIGITS, wobbles["att"])
    compared = {(c.row.tensor_mode, c.column): c.difference for c in summarize(make_table(rows)).comparisons}
    p = {place: difference.p for place, difference in compared.items() if difference}
    corrected = {place: difference.holm_p for place, difference in compared.items() if difference}
    att, qkv, depth = (p[mode, DTD] or 0.0 for mode in wobbles)
    assert att < qkv < depth
    assert [corrected[mode, DTD] for mode in wobbles] == pytest.approx([3 * att, 2 * qkv, depth])
    assert corrected["att", DIGITS] == p["att", DIGITS] == att


def test_the_paper_stands_beside_only_the_columns_that_it_has() -> None:
    runs = [make_run("lora", column=column) for column in (DTD, COLA)]
    runs += [make_run("qkv_depth", strategy) for strategy in ("isorank", "isoparameters")]
    runs += [make_run("qkv_depth", "isorank", variant=("alpha=8",))]
    summary = summarize(make_table(runs))
    assert [column.has_paper for column in summary.columns] == [True, False]
    assert {row.row.label: row.cells[0].paper_number for row in summary.rows} == {
        "lora": "73.13", "qkv_depth isorank": "71.59", "qkv_depth isoparameters": "74.13",
        "qkv_depth isorank alpha=8": "",
    }  # fmt: skip


def test_a_swept_setting_stands_across() -> None:
    runs = [
        *(make_run("qkv", "isorank", seed=s, epochs=[0.4 + s / 10], variant=("init=normal",)) for s in range(2)),
        make_run("qkv", "isorank", epochs=[0.6], variant=("init=orthogonal",)),
        make_run("att", "isorank", epochs=[0.3], variant=("init=orthogonal",)),
        make_run("lora", epochs=[0.5]),  # which starts alike under both
    ]
    (grid,) = summarize(make_table(runs)).grids
    assert (grid.column, grid.setting, grid.values) == (DTD, "init", ("normal", "orthogonal"))
    assert [(row.label, *(cell and cell.text("*{}*", "±") for cell in cells)) for row, cells in grid.rows] == [
        ("lora", "50.0", "50.0"),
        ("att isorank", None, "30.0"),
        ("qkv isorank", "45.0 ± 7.1", "*60.0*"),
    ]
    assert summarize(THREE_ROWS).grids == []


def test_runs_stand_by_column_row_and_seed() -> None:
    sample = sample_table()
    shuffled = replace(sample, runs=tuple(sorted(sample.runs, key=lambda run: run.digest)))
    rows, columns = shuffled.rows, shuffled.columns
    runs = summarize(shuffled).runs
    keys = [(columns.index(run.column), rows.index(run.row), run.seed) for run in runs]
    assert keys == sorted(keys)
    assert len(runs) == len(sample.runs)
