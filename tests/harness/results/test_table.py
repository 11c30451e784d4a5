from __future__ import annotations

import math
import random

import pytest

from tenslora.constructions import CONSTRUCTIONS
from tenslora.harness.results.table import Row, mean_and_deviation
from tests.tables import COLA, DTD, made, table


def test_lora_stands_first_then_the_constructions_by_strategy_in_the_papers_order_then_the_references() -> None:
    modes = list(CONSTRUCTIONS)[1:]
    runs = [made(mode, strategy) for strategy in ("isoparameters", "isorank") for mode in reversed(modes)]
    runs += [made("full"), made("head_only"), made("lora")]
    assert [row.label for row in table(runs).rows] == [
        "lora",
        *(f"{mode} {strategy}" for strategy in ("isoparameters", "isorank") for mode in modes),
        "head_only",
        "full",
    ]
    assert modes == ["att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth", "site", "att_site"]


def test_variants_and_strategies_stand_in_the_order_in_which_they_were_swept() -> None:
    variants = [("lr=2",), ("lr=1",)]
    runs = [
        made(mode, strategy, variant=v)
        for v in variants
        for mode, strategy in (("qkv", "isorank"), ("att", "isorank"), ("qkv", "isoparameters"), ("lora", ""))
    ]
    assert [row.label for row in table(runs).rows] == [
        "lora lr=2", "lora lr=1",
        "att isorank lr=2", "qkv isorank lr=2", "qkv isoparameters lr=2",
        "att isorank lr=1", "qkv isorank lr=1", "qkv isoparameters lr=1",
    ]  # fmt: skip


def test_a_row_is_a_construction_unless_it_is_lora_or_a_reference() -> None:
    assert Row("att", "isorank").is_construction
    assert not any(Row(mode).is_construction for mode in ("lora", "head_only", "full"))
    assert Row("lora", "explicit", ("a=1", "b=2")).label == "lora explicit a=1 b=2"


def test_one_setting_beside_the_construction_is_the_one_that_is_swept() -> None:
    assert table([made("lora"), made("att", variant=("lr=1",)), made("att", variant=("lr=2",))]).swept == "lr"
    assert table([made("lora"), made("att")]).swept is None
    assert table([made("att", variant=("lr=1", "alpha=4"))]).swept is None


def test_columns_stand_as_swept_and_a_cell_has_its_runs_by_seed() -> None:
    runs = [made("lora", seed=seed, column=column, epochs=[0.5]) for column in (COLA, DTD) for seed in (3, 0, 11, 2)]
    random.Random(0).shuffle(runs)
    runs.insert(0, made("qkv", "isorank", column=COLA))
    made_table = table(runs)
    assert made_table.columns == [COLA, DTD]
    assert [run.seed for run in made_table.cell(Row("lora"), DTD)] == [0, 2, 3, 11]
    assert made_table.cell(Row("qkv", "isorank"), DTD) == []


def test_scores_are_the_last_or_the_best_of_completed_runs_by_seed() -> None:
    runs = [
        made("lora", seed=2, epochs=[0.9, 0.6]),
        made("lora", seed=0, epochs=[0.5, 0.0]),
        made("lora", seed=1),
        made("lora", seed=3, epochs=[0.7], problem="the loss is nan"),
        made("lora", seed=4, problem="no such folder"),
    ]
    assert table(runs).scores(Row("lora"), DTD) == {0: 0.0, 2: 0.6}
    assert table(runs, score="best").scores(Row("lora"), DTD) == {0: 0.5, 2: 0.9}
    assert table(runs).scores(Row("lora"), COLA) == {}
    assert table(runs).problems(Row("lora"), DTD) == ["missing", "the loss is nan", "no such folder"]


def test_each_reason_is_told_once() -> None:
    runs = [made("lora", seed=seed, problem="no room" if seed % 2 else "") for seed in range(5)]
    assert table(runs).problems(Row("lora"), DTD) == ["missing", "no room"]
    assert table([made("lora", epochs=[0.5])]).problems(Row("lora"), DTD) == []


def test_the_metric_is_what_the_columns_runs_say() -> None:
    runs = [made("lora", column=DTD), made("lora", column=COLA), made("qkv", "isorank", column=COLA, epochs=[0.5])]
    assert (table(runs).metric(COLA), table(runs).metric(DTD)) == ("matthews", None)


def test_a_row_is_compared_with_the_lora_of_its_variant_else_with_the_only_one() -> None:
    low, high = ("lr=1",), ("lr=2",)
    rows = {v: Row("qkv", "isorank", v) for v in (low, high, ())}

    def of(*loras: tuple[str, ...], row: Row) -> Row | None:
        runs = [made("lora", variant=v) for v in loras]
        return table([*runs, made(row.tensor_mode, row.strategy, variant=row.variant)]).reference(row)

    assert of(low, high, row=rows[high]) == Row("lora", "", high)
    assert of(low, high, row=rows[low]) == Row("lora", "", low)
    assert of(low, row=rows[high]) == Row("lora", "", low)
    assert of(low, high, row=rows[()]) is None
    assert of(row=rows[low]) is None
    assert of((), row=Row("head_only")) == Row("lora")


def test_lora_is_not_compared_with_itself() -> None:
    assert table([made("lora")]).reference(Row("lora")) is None
    other = Row("lora", "", ("rank=8",))
    assert table([made("lora"), made("lora", variant=other.variant)]).reference(other) == Row("lora")


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
    found = mean_and_deviation(iter(scores))
    assert math.isclose(found[0], mean)
    assert found[1] == deviation if deviation is None else math.isclose(found[1] or 0.0, deviation, abs_tol=1e-12)
