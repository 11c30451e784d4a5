"""What the paper reports, where we hold a source for it, and what our runs say to its claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results.statistics import paired_difference
from tenslora.harness.results.table import Column, Row, Table


@dataclass(frozen=True)
class Verdict:
    """One claim of the paper and what the runs of a table say to it.

    table: isorank, isoparameters or both. verdict: "holds", "does not hold" or "not decided by these runs".
    because: the numbers behind it, in a sentence.
    """

    claim: str
    table: str
    verdict: str
    because: str


@cache
def paper() -> dict[str, Any]:
    """paper.yaml: scores, claims and settings of arXiv 2509.19391. A cell that is absent there is unknown."""
    import yaml

    content: dict[str, Any] = yaml.safe_load((files("tenslora.harness.results") / "paper.yaml").read_text())
    return content


def is_of_paper(column: Column) -> bool:
    """Whether the paper adapts this backbone to this dataset."""
    return column.dataset in paper()["datasets"] and column.model in paper()["models"].values()


def paper_value(row: Row, column: Column) -> float | None:
    """The paper's score for a cell, in per cent; None where the cell is not the paper's or we hold no source."""
    if not is_of_paper(column) or row.variant:
        return None
    for entry in paper()["scores"]:
        # LoRA is one row under both strategies, and stands in both of the paper's tables.
        strategy = "" if entry["tensor_mode"] == "lora" else entry["table"]
        if (row.tensor_mode, row.strategy, column.dataset) == (entry["tensor_mode"], strategy, entry["dataset"]):
            return float(entry["value"])
    return None


def stand_in(table: Table) -> str | None:
    """A sentence that says so where none of a table's columns is the paper's own experiment."""
    if any(map(is_of_paper, table.columns)):
        return None
    return "A stand-in for the paper's experiments: the backbone and the data are smaller, or others, than the paper's."


def verdicts(table: Table) -> list[Verdict]:
    """What the runs of `table` say to each of the paper's claims about its strategies.

    A row beats another on a dataset if the 95 % interval of their paired difference lies above 0, does not beat it
    if no part of the interval does, and is undecided in between (`Difference.above`). A claim about several rows
    or datasets holds if it holds for each, does not hold if it fails for one, and is not decided otherwise. Claims
    about parameter counts need no runs.
    """
    strategies = [s for s in ("isorank", "isoparameters") if any(row.strategy == s for row in _plain(table))]
    found = []
    for entry in paper()["claims"]:
        about = [s for s in strategies if entry["table"] in (s, "both")]
        if about:
            truth, because = _RULES[entry["claim"]](table, about)
            words = {True: "holds", False: "does not hold", None: "not decided by these runs"}
            found.append(Verdict(entry["claim"], entry["table"], words[truth], because))
    return found


def _plain(table: Table) -> list[Row]:
    # The paper varies nothing but construction and strategy.
    return [
        row for row in table.rows if row.is_construction and row.tensor_mode in PAPER_CONSTRUCTIONS and not row.variant
    ]


# A rule gives (True, False or None for undecided; the numbers behind it).
_Judged = tuple[bool | None, str]


def _no_construction_beats_lora(table: Table, strategies: list[str]) -> _Judged:
    rows = [row for row in _plain(table) if row.strategy in strategies]
    beaten = _compare(table, [(row, table.reference(row)) for row in rows])
    truths = [None if truth is None else not truth for truth in beaten.values()]
    complete = len(rows) == 7 * len(strategies)
    return _all([*truths, *([] if complete else [None])]), _tell(beaten, "above LoRA")


def _few_parameters(table: Table, strategies: list[str]) -> _Judged:
    truths: list[bool | None] = []
    words = []
    for column in table.columns:
        shares = {}
        for row in _plain(table):
            run = next(iter(table.cell(row, column)), None)
            if row.strategy in strategies and run and run.parameters and run.lora_parameters:
                shares[row.tensor_mode] = 100 * run.parameters / run.lora_parameters
        below = [mode for mode, share in shares.items() if share < 10]
        truths.append(len(below) >= 4 if len(shares) == 7 else None)
        listed = ", ".join(f"{mode} {share:.1f} %" for mode, share in shares.items())
        words.append(f"{len(below)} of {len(shares)} on {column.model} ({listed})")
    return _all(truths), "; ".join(dict.fromkeys(words))


def _two_beat_lora_everywhere(table: Table, strategies: list[str]) -> _Judged:
    wanted = ("qkv_depth", "att_qkv_depth")
    rows = [row for row in _plain(table) if row.tensor_mode in wanted and row.strategy in strategies]
    beaten = _compare(table, [(row, table.reference(row)) for row in rows])
    truth = _all(beaten.values()) if len(rows) == len(wanted) else None
    return truth, f"{_tell(beaten, 'above LoRA')} ({_datasets(table)})"


def _att_is_the_weakest(table: Table, strategies: list[str]) -> _Judged:
    pairs = [
        (row, att)
        for row in _plain(table)
        for att in _plain(table)
        if att.tensor_mode == "att" != row.tensor_mode and att.strategy == row.strategy in strategies
    ]
    beaten = _compare(table, pairs)
    complete = len(pairs) == 6 * len(strategies)
    return _all([*beaten.values(), *([] if complete else [None])]), _tell(beaten, "above att")


_RULES = {
    "no construction beats LoRA": _no_construction_beats_lora,
    "four of the seven constructions use less than 10 % of LoRA's parameters": _few_parameters,
    "qkv_depth and att_qkv_depth beat LoRA on 4 of 4 datasets": _two_beat_lora_everywhere,
    "att is the least effective construction": _att_is_the_weakest,
}


def _compare(table: Table, pairs: Sequence[tuple[Row, Row | None]]) -> dict[str, bool | None]:
    """Whether the first of each pair beats the second on each dataset, by a name for the comparison."""
    found: dict[str, bool | None] = {}
    for row, other in pairs:
        for column in table.columns:
            difference = other and paired_difference(table.scores(row, column), table.scores(other, column))
            where = f" on {column.dataset} with {column.model}" if len(table.columns) > 1 else ""
            found[f"{row.label}{where}"] = difference.above if difference else None
    return found


def _all(truths: Iterable[bool | None]) -> bool | None:
    known = list(truths)
    return False if False in known else True if known and None not in known else None


def _tell(beaten: dict[str, bool | None], what: str) -> str:
    def some(truth: bool | None) -> str:
        return ", ".join(name for name, found in beaten.items() if found is truth) or "none"

    return f"{what}: {some(True)}; not {what}: {some(False)}; undecided: {some(None)}"


def _datasets(table: Table) -> str:
    return f"{len(table.columns)} dataset{'s' if len(table.columns) > 1 else ''} here"
