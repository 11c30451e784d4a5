"""Rows, columns and cells of a table."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from tenslora.constructions import CONSTRUCTIONS
from tenslora.harness.results.table import AdapterSize, Row, changed_data, mean_and_deviation
from tests.tables import COLA, DTD, make_run, make_table


def test_lora_stands_first_then_the_constructions_by_strategy_in_the_papers_order_then_the_references() -> None:
    modes = list(CONSTRUCTIONS)[1:]
    runs = [make_run(mode, strategy) for strategy in ("isoparameters", "isorank") for mode in reversed(modes)]
    runs += [make_run("full"), make_run("head_only"), make_run("lora")]
    assert [row.label for row in make_table(runs).rows] == [
        "lora",
        *(f"{mode} {strategy}" for strategy in ("isoparameters", "isorank") for mode in modes),
        "head_only",
        "full",
    ]
    assert modes == ["att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth", "site", "att_site"]


def test_variants_and_strategies_stand_in_the_order_in_which_they_were_swept() -> None:
    variants = [("lr=2",), ("lr=1",)]
    runs = [
        make_run(mode, strategy, variant=v)
        for v in variants
        for mode, strategy in (("qkv", "isorank"), ("att", "isorank"), ("qkv", "isoparameters"), ("lora", ""))
    ]
    assert [row.label for row in make_table(runs).rows] == [
        "lora lr=2", "lora lr=1",
        "att isorank lr=2", "qkv isorank lr=2", "qkv isoparameters lr=2",
        "att isorank lr=1", "qkv isorank lr=1", "qkv isoparameters lr=1",
    ]  # fmt: skip


def test_a_row_is_lora_a_construction_or_a_reference() -> None:
    rows = [Row("lora"), Row("att", "isorank"), Row("head_only"), Row("full")]
    assert [row.is_lora for row in rows] == [True, False, False, False]
    assert [row.is_construction for row in rows] == [False, True, False, False]
    assert [row.has_adapter for row in rows] == [True, True, False, False]


def test_a_rows_label_has_what_sets_it_apart() -> None:
    row = Row("lora", "explicit", ("a=1", "b=2"))
    assert row.label == "lora explicit a=1 b=2"
    assert (row.value_of("b"), row.value_of("c")) == ("2", None)
    assert row.without("a").variant == ("b=2",)


def test_an_adapters_size_is_as_recorded_or_else_as_planned() -> None:
    planned, recorded = make_run("qkv", "isorank"), make_run("qkv", "isorank", epochs=[0.5])
    planned = replace(planned, relative_step=0.125)
    assert planned.size == recorded.size == AdapterSize(((4, 4, 4),), 74640, 221184, 0.125)
    assert replace(recorded, ranks=None, parameters=None, lora_parameters=None).size == recorded.size
    for head_only in (make_run("head_only", epochs=[0.5]), replace(make_run("head_only"), parameters=0)):
        assert head_only.size == AdapterSize(None, None, 221184)
    assert replace(planned, parameters=None).size.percent_of_lora is None


def test_a_run_is_completed_failed_or_missing() -> None:
    runs = [make_run("lora", epochs=[0.5]), make_run("lora"), make_run("lora", epochs=[0.5], problem="diverged")]
    assert [run.status for run in runs] == ["completed", "missing", "failed"]
    assert [run.score("last") for run in runs] == [0.5, None, None]


def test_one_setting_beside_the_construction_is_the_one_that_is_swept() -> None:
    assert (
        make_table(
            [make_run("lora"), make_run("att", variant=("lr=1",)), make_run("att", variant=("lr=2",))]
        ).swept_setting
        == "lr"
    )
    assert make_table([make_run("lora"), make_run("att")]).swept_setting is None
    assert make_table([make_run("att", variant=("lr=1", "alpha=4"))]).swept_setting is None


def test_columns_stand_as_swept_and_a_cell_has_its_runs_by_seed() -> None:
    runs = [
        make_run("lora", seed=seed, column=column, epochs=[0.5]) for column in (COLA, DTD) for seed in (3, 0, 11, 2)
    ]
    random.Random(0).shuffle(runs)
    runs.insert(0, make_run("qkv", "isorank", column=COLA))
    table = make_table(runs)
    assert table.columns == [COLA, DTD]
    assert [run.seed for run in table.cell(Row("lora"), DTD)] == [0, 2, 3, 11]
    assert table.cell(Row("qkv", "isorank"), DTD) == []


def test_scores_are_the_last_or_the_best_of_completed_runs_by_seed() -> None:
    runs = [
        make_run("lora", seed=2, epochs=[0.9, 0.6]),
        make_run("lora", seed=0, epochs=[0.5, 0.0]),
        make_run("lora", seed=1),
        make_run("lora", seed=3, epochs=[0.7], problem="the loss is nan"),
        make_run("lora", seed=4, problem="no such folder"),
    ]
    assert make_table(runs).scores(Row("lora"), DTD) == {0: 0.0, 2: 0.6}
    assert make_table(runs, score="best").scores(Row("lora"), DTD) == {0: 0.5, 2: 0.9}
    assert make_table(runs).scores(Row("lora"), COLA) == {}


def test_the_metric_is_what_the_columns_runs_say() -> None:
    runs = [
        make_run("lora", column=DTD),
        make_run("lora", column=COLA),
        make_run("qkv", "isorank", column=COLA, epochs=[0.5]),
    ]
    assert (make_table(runs).metric(COLA), make_table(runs).metric(DTD)) == ("matthews", None)


def test_a_row_is_compared_with_the_lora_of_its_variant_else_with_the_only_one() -> None:
    low, high = ("lr=1",), ("lr=2",)
    rows = {v: Row("qkv", "isorank", v) for v in (low, high, ())}

    def of(*loras: tuple[str, ...], row: Row) -> Row | None:
        runs = [make_run("lora", variant=v) for v in loras]
        return make_table([*runs, make_run(row.tensor_mode, row.strategy, variant=row.variant)]).reference(row)

    assert of(low, high, row=rows[high]) == Row("lora", "", high)
    assert of(low, high, row=rows[low]) == Row("lora", "", low)
    assert of(low, row=rows[high]) == Row("lora", "", low)
    assert of(low, high, row=rows[()]) is None
    assert of(row=rows[low]) is None
    assert of((), row=Row("head_only")) == Row("lora")


def test_lora_is_not_compared_with_itself() -> None:
    assert make_table([make_run("lora")]).reference(Row("lora")) is None
    other = Row("lora", "", ("rank=8",))
    assert make_table([make_run("lora"), make_run("lora", variant=other.variant)]).reference(other) == Row("lora")


@pytest.mark.parametrize(
    ("scores", "mean", "deviation"),
    [
        ([0.25], 0.25, None),
        ([0.5, 0.5], 0.5, 0.0),
        ([0.1, 0.3], 0.2, math.sqrt(0.02)),  # n - 1: 2 * 0.1^2 / 1
        ([0.5, 0.7, 0.6], 0.6, 0.1),
    ],
)
def test_mean_and_deviation(scores: list[float], mean: float, deviation: float | None) -> None:
    assert mean_and_deviation(iter(scores)) == pytest.approx((mean, deviation), abs=1e-12)


def test_runs_whose_data_has_changed_between_them_are_noted() -> None:
    runs = [make_run("lora", seed=seed, epochs=[0.5]) for seed in range(2)] + [make_run("att", "isorank")]
    assert changed_data(make_table(runs)) is None
    fewer = replace(runs[1], record={**(runs[1].record or {}), "train_examples": 900})
    assert str(changed_data(make_table([runs[0], fewer]))).startswith(
        f"Not all runs on {DTD.label} had the same data: one had 1000 training and 400 test examples, another 900 and"
    )
    first, edited = (
        replace(run, record={**(run.record or {}), "data_digest": run.row.tensor_mode})
        for run in (runs[0], make_run("att", "isorank", seed=1, epochs=[0.5]))
    )
    assert "same data: their labels or texts differ. Files have" in str(changed_data(make_table([first, edited])))
    few = {"config": {"dataset": {"train_size": 900}}}  # which the seed chooses
    first, edited = (replace(run, record={**(run.record or {}), **few}) for run in (first, edited))
    assert changed_data(make_table([first, edited])) is None
    other = {**(fewer.record or {}), "config": {"dataset": {"train_size": 900}}}
    assert changed_data(make_table([runs[0], replace(fewer, record=other)])) is None
