"""The paper's values and claims, with verdicts on runs whose outcome was made to order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results import paper as module
from tenslora.harness.results.paper import is_of_paper, paper, paper_value, verdicts
from tenslora.harness.results.table import Column, Row, Run
from tenslora.harness.training.metrics import METRICS
from tests.conftest import ROOT
from tests.tables import COLA, DIGITS, DTD, make_run, make_table

MODES = [mode for mode in PAPER_CONSTRUCTIONS if mode != "lora"]
NO_BETTER, FEW, TWO_BETTER, ATT = (
    "no construction beats LoRA",
    "four of the seven constructions use less than 10 % of LoRA's parameters",
    "qkv_depth and att_qkv_depth beat LoRA on 4 of 4 datasets",
    "att is the least effective construction",
)
HOLDS, DOES_NOT, OPEN = "holds", "does not hold", "not decided by these runs"


def test_the_papers_file_is_the_reference_and_every_claim_in_it_has_a_rule() -> None:
    assert {entry["claim"] for entry in paper()["claims"]} == set(module._RULES) == {NO_BETTER, FEW, TWO_BETTER, ATT}
    assert {entry["table"] for entry in paper()["scores"]} == {"isorank", "isoparameters"}
    assert {entry["tensor_mode"] for entry in paper()["scores"]} <= set(PAPER_CONSTRUCTIONS)


def test_the_papers_file_is_the_shared_one(shared: Path) -> None:
    ours, theirs = ROOT / "tenslora" / "harness" / "results" / "paper.yaml", shared / "reference" / "paper.yaml"
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_cell_of_the_paper_has_its_value() -> None:
    values = {("lora", ""): 73.13, ("qkv_depth", "isorank"): 71.59, ("qkv_depth", "isoparameters"): 74.13}
    scores = {
        (mode, strategy): paper_value(Row(mode, strategy), DTD)
        for mode in (*PAPER_CONSTRUCTIONS, "head_only", "full")
        for strategy in (["isorank", "isoparameters"] if mode in MODES else [""])
    }
    assert {key: value for key, value in scores.items() if value is not None} == values


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (Row("lora"), Column("dtd", "vit_small_timm")),
        (Row("lora"), Column("digits", "vit_digits")),
        (Row("lora"), Column("cifar10", "vit_base")),
        (Row("lora"), Column("cola", "roberta_base")),
        (Row("lora", "explicit"), DTD),
        (Row("lora", "", ("rank_strategy.rank=8",)), DTD),
        (Row("qkv_depth", "explicit"), DTD),
        (Row("qkv_depth", "isorank", ("optimizer.lr=1e-4",)), DTD),
    ],
)
def test_a_cell_that_the_paper_does_not_have_stays_empty(row: Row, column: Column) -> None:
    assert paper_value(row, column) is None


def test_what_the_paper_adapts_is_known_even_where_its_score_is_not() -> None:
    assert is_of_paper(Column("cola", "roberta_base"))
    assert not is_of_paper(COLA)


# Over three seeds, row number i has a wobble of i * 0.0001 * (1, -1, 0). The difference of two rows then has a standard
# deviation of 0.0001 to 0.0007, a standard error of 0.00006 to 0.0004, and an interval (Student's t with 2 degrees of
# freedom: 4.303) of 0.00025 to 0.0017 to both sides: rows 0.02 apart differ, rows 0.0001 apart are undecided.
CLOSE = 0.0001
WOBBLE = {mode: (number * 1e-4, number * -1e-4, 0.0) for number, mode in enumerate(PAPER_CONSTRUCTIONS)}


def runs_of(
    above_lora: Mapping[str, float], strategy: str, columns: Sequence[Column] = (DTD,), seeds: int = 3
) -> list[Run]:
    """LoRA at 0.7, and constructions by how far they are above it."""
    return [
        make_run(mode, "" if mode == "lora" else strategy, seed=seed, column=column, epochs=[0.7 + gain + wobble])
        for column in columns
        for mode, gain in {"lora": 0.0, **above_lora}.items()
        for seed, wobble in enumerate(WOBBLE[mode][:seeds])
    ]


def verdict(runs: Iterable[Run], claim: str) -> tuple[str, str]:
    """The verdict on one claim, and the numbers behind it."""
    (answer,) = (answer for answer in verdicts(make_table(runs)) if answer.claim == claim)
    return answer.verdict, answer.because


BELOW = dict.fromkeys(MODES, -0.02)
ABOVE = dict.fromkeys(MODES, 0.02)


@pytest.mark.parametrize(
    ("gains", "expected", "numbers"),
    [
        (BELOW, HOLDS, "not above LoRA: att isorank, qkv isorank"),
        ({**BELOW, "depth": 0.02}, DOES_NOT, "above LoRA: depth isorank;"),
        ({**BELOW, "depth": CLOSE}, OPEN, "undecided: depth isorank"),
        ({**BELOW, "depth": CLOSE, "att": 0.02}, DOES_NOT, "above LoRA: att isorank;"),
    ],
)
def test_no_construction_beats_lora(gains: dict[str, float], expected: str, numbers: str) -> None:
    answer, because = verdict(runs_of(gains, "isorank"), NO_BETTER)
    assert answer == expected
    assert numbers in because


def test_the_numbers_name_what_is_there_and_what_is_not() -> None:
    few = {mode: gain for mode, gain in BELOW.items() if mode in ("att", "depth")}
    _, because = verdict(runs_of(few, "isorank", (DTD, COLA)), NO_BETTER)
    assert because == (
        "not above LoRA: att isorank on dtd, att isorank on cola, depth isorank on dtd, depth isorank on cola; "
        "not in this table: qkv isorank, att_qkv isorank, att_depth isorank, qkv_depth isorank, att_qkv_depth isorank"
    )


def test_where_a_lower_score_is_better_a_row_beats_lora_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], larger_is_better=False))
    assert verdict(runs_of(ABOVE, "isorank"), NO_BETTER)[0] == HOLDS
    assert verdict(runs_of(BELOW, "isoparameters"), TWO_BETTER)[0] == HOLDS


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (ABOVE, HOLDS),
        ({**BELOW, "qkv_depth": 0.02, "att_qkv_depth": 0.02}, HOLDS),
        ({**ABOVE, "qkv_depth": -0.02}, DOES_NOT),
        ({**ABOVE, "att_qkv_depth": CLOSE}, OPEN),
        ({**ABOVE, "att_qkv_depth": CLOSE, "qkv_depth": -0.02}, DOES_NOT),
    ],
)
def test_two_constructions_beat_lora(gains: dict[str, float], expected: str) -> None:
    assert verdict(runs_of(gains, "isoparameters"), TWO_BETTER)[0] == expected


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({**ABOVE, "att": 0.0}, HOLDS),
        ({**ABOVE, "att": 0.04}, DOES_NOT),
        ({**ABOVE, "att": 0.0, "qkv": -0.02}, DOES_NOT),
        ({**ABOVE, "att": 0.0, "qkv": CLOSE}, OPEN),
    ],
)
@pytest.mark.parametrize("strategy", ["isorank", "isoparameters"])
def test_att_is_the_least_effective(gains: dict[str, float], expected: str, strategy: str) -> None:
    assert verdict(runs_of(gains, strategy), ATT)[0] == expected


def test_att_is_judged_under_every_strategy_that_there_is() -> None:
    weakest, strongest = {**ABOVE, "att": 0.0}, {**ABOVE, "att": 0.04}
    isorank, lora = runs_of(weakest, "isorank"), 3  # LoRA's runs stand in both, and once in the table
    assert verdict([*isorank, *runs_of(weakest, "isoparameters")[lora:]], ATT)[0] == HOLDS
    assert verdict([*isorank, *runs_of(strongest, "isoparameters")[lora:]], ATT)[0] == DOES_NOT


def test_a_row_that_is_ahead_by_chance_alone_does_not_decide_a_claim() -> None:
    # Each difference has p = 0.0194: it would decide alone, and does not beside six others like it.
    above, wobble = 0.0124, (0.003, -0.003, 0.0)
    for modes, expected in ((["qkv"], DOES_NOT), (MODES, OPEN)):
        runs = [make_run("lora", seed=seed, epochs=[0.7]) for seed in range(3)]
        runs += [
            make_run(mode, "isorank", seed=seed, epochs=[0.7 + above + shift])
            for mode in modes
            for seed, shift in enumerate(wobble)
        ]
        assert verdict(runs, NO_BETTER)[0] == expected


def test_few_parameters_is_decided_by_counting_alone() -> None:
    # Of ViT-B's LoRA: att_qkv_depth 2.0 %, qkv_depth 2.9, att_depth 5.0, depth 8.5, att_qkv 19.8, qkv 33.7, att 56.0.
    runs = [make_run(mode, "" if mode == "lora" else "isorank") for mode in PAPER_CONSTRUCTIONS]
    answer, because = verdict(runs, FEW)
    assert answer == HOLDS
    assert because.startswith("4 of 7 on vit_base (att 56.0 %, qkv 33.7 %, depth 8.5 %, att_qkv 19.8 %")
    # Of the digits' LoRA at this size not one: the smallest, qkv_depth, has 13.0 %.
    digits = [make_run(run.row.tensor_mode, run.row.strategy, column=DIGITS) for run in runs]
    answer, because = verdict(digits, FEW)
    assert answer == DOES_NOT
    assert because.startswith("0 of 7 on vit_digits")
    assert verdict([*runs, *digits], FEW)[0] == DOES_NOT
    assert verdict(runs[:-1], FEW)[0] == OPEN
    assert verdict([*runs, make_run("qkv", "isorank", column=COLA)], FEW)[0] == OPEN
    unknown = [replace(run, parameters=None) if run.row.tensor_mode == "att" else run for run in runs]
    assert verdict(unknown, FEW)[0] == OPEN


# What would make each claim about scores hold.
HOLDING = [
    (NO_BETTER, "isorank", BELOW),
    (TWO_BETTER, "isoparameters", ABOVE),
    (ATT, "isorank", {**ABOVE, "att": 0.0}),
    (ATT, "isoparameters", {**ABOVE, "att": 0.0}),
]


@pytest.mark.parametrize(("claim", "strategy", "gains"), HOLDING)
def test_one_seed_decides_nothing(claim: str, strategy: str, gains: dict[str, float]) -> None:
    assert verdict(runs_of(gains, strategy), claim)[0] == HOLDS
    assert verdict(runs_of(gains, strategy, seeds=1), claim)[0] == OPEN


@pytest.mark.parametrize(("claim", "strategy", "gains"), HOLDING)
@pytest.mark.parametrize("missing", ["row", "runs", "lora", "column"])
def test_what_is_missing_decides_no_claim(claim: str, strategy: str, gains: dict[str, float], missing: str) -> None:
    runs = runs_of(gains, strategy, columns=(DTD, COLA))
    assert verdict(runs, claim)[0] == HOLDS
    if missing == "row":  # narrowed: tensor_mode=lora,att,...
        runs = [run for run in runs if run.row.tensor_mode != "qkv_depth"]
    elif missing == "runs":  # planned, and not there yet on one dataset
        runs = [
            replace(run, record=None, problem="missing")
            if (run.row.tensor_mode, run.column) == ("qkv_depth", COLA)
            else run
            for run in runs
        ]
    elif missing == "lora":
        runs = [run for run in runs if run.row.tensor_mode != "lora"]
    else:
        runs = [run for run in runs if run.column == DTD or run.row.tensor_mode != "qkv_depth"]
    # Whether att is the weakest is decided without LoRA.
    assert verdict(runs, claim)[0] == (HOLDS if missing == "lora" and claim == ATT else OPEN)


COLUMNS = [DTD, Column("dtd", "vit_small_timm"), Column("eurosat", "vit_base")]


@pytest.mark.parametrize("failing", COLUMNS)
def test_one_column_is_enough_for_a_claim_to_fail(failing: Column) -> None:
    runs = [
        replace(run, column=column)
        for column in COLUMNS
        for run in runs_of(BELOW if column != failing else {**BELOW, "qkv": 0.02}, "isorank")
    ]
    assert verdict(runs, NO_BETTER)[0] == DOES_NOT


def test_a_claim_whose_rows_are_not_in_the_table_is_left_out() -> None:
    lora = [make_run("lora", seed=seed, epochs=[0.7]) for seed in range(3)]
    of = {
        mode: [make_run(mode, "isoparameters", seed=seed, epochs=[0.8]) for seed in range(3)]
        for mode in ("att", "qkv", "qkv_depth")
    }
    claims = {
        modes: [
            verdict.claim for verdict in verdicts(make_table([*lora, *(run for mode in modes for run in of[mode])]))
        ]
        for modes in (("qkv",), ("qkv_depth",), ("att", "qkv"), ("att",))
    }
    assert claims == {("qkv",): [], ("qkv_depth",): [TWO_BETTER], ("att", "qkv"): [ATT], ("att",): []}


def test_variants_are_not_the_papers_rows() -> None:
    variant = [make_run("qkv", "isorank", seed=s, epochs=[0.9 + s / 1000], variant=("alpha=8",)) for s in range(3)]
    assert verdict([*runs_of(BELOW, "isorank"), *variant], NO_BETTER)[0] == HOLDS


def test_only_claims_about_the_tables_strategies_are_judged() -> None:
    claims = {s: [v.claim for v in verdicts(make_table(runs_of(BELOW, s)))] for s in ("isorank", "isoparameters")}
    assert claims == {"isorank": [NO_BETTER, FEW, ATT], "isoparameters": [TWO_BETTER, ATT]}
    assert verdicts(make_table([make_run("lora", epochs=[0.5]), make_run("head_only", epochs=[0.5])])) == []
    assert {v.table for v in verdicts(make_table(runs_of(BELOW, "isorank")))} == {"isorank", "both"}
