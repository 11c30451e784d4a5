"""The paper's scores and claims, as far as we have a source for them, and our runs' verdicts on the claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tenslora.constructions import PAPER_CONSTRUCTIONS
from tenslora.harness.results.statistics import paired_differences
from tenslora.harness.results.table import Column, Row, Table, percent_of_lora

PROTOCOL = "protocol"
"""The setting of the rows of a table that shows several protocols side by side, see `protocols.side_by_side`."""

VERDICTS_NOTE = (
    "One row is above or below another where the paired t-test says so with Holm's p of at most 0.05; otherwise the "
    "comparison is undecided."
)


@dataclass(frozen=True)
class Verdict:
    """The verdict of a table's runs on one claim of the paper.

    Args:
        claim: the claim, in the words of paper.yaml.
        table: the table of the paper that the claim is about: isorank, isoparameters or both.
        verdict: "holds", "does not hold" or "not decided by these runs".
        because: the numbers behind the verdict, in a sentence.
        protocol: the protocol of the runs that are judged; empty for a table of one.
    """

    claim: str
    table: str
    verdict: str
    because: str
    protocol: str = ""


@cache
def paper() -> dict[str, Any]:
    """The content of paper.yaml: scores, claims and settings of arXiv 2509.19391. A score that is absent is unknown."""
    import yaml

    content: dict[str, Any] = yaml.safe_load((files("tenslora.harness.results") / "paper.yaml").read_text())
    return content


def is_of_paper(column: Column) -> bool:
    """Whether the paper adapts this backbone to this dataset."""
    return column.dataset in paper()["datasets"] and column.model in paper()["models"].values()


def paper_value(row: Row, column: Column) -> float | None:
    """The paper's score for a cell, in per cent; None if the paper has no such cell or we have no source for it."""
    if not is_of_paper(column) or row.variant:
        return None
    for entry in paper()["scores"]:
        # LoRA is the same run under both strategies, and is a row of both of the paper's tables.
        strategy = "" if entry["tensor_mode"] == "lora" else entry["table"]
        if (row.tensor_mode, row.strategy, column.dataset) == (entry["tensor_mode"], strategy, entry["dataset"]):
            return float(entry["value"])
    return None


def stand_in(table: Table) -> str | None:
    """A note for a table that has none of the paper's own experiments; None for other tables."""
    if any(map(is_of_paper, table.columns)):
        return None
    return "A stand-in for the paper's experiments, with another backbone or other data."


def verdicts(table: Table) -> list[Verdict]:
    """The verdicts of a table's runs on the paper's claims about the table's rank strategies, under each protocol.

    A row beats another on a dataset, or is beaten by it, if the paired t-test of their difference says so after Holm's
    correction for all rows of the dataset that are compared with the other row. Otherwise the comparison is undecided
    (`Difference.above`). A claim about several rows or datasets holds if it holds for each, does not hold if it fails
    for one, and is not decided otherwise. A claim of whose comparisons the table has none is left out. Claims about
    numbers of parameters need no runs.
    """
    tables = {"": table}
    if table.swept_setting == PROTOCOL:
        values = dict.fromkeys(row.value_of(PROTOCOL) for row in table.rows)
        tables = {value: table.at(PROTOCOL, value) for value in values if value is not None}
    answers = []
    for entry in paper()["claims"]:
        for protocol, judged in tables.items():
            strategies = [s for s in ("isorank", "isoparameters") if any(r.strategy == s for r in _paper_rows(judged))]
            of_claim = [strategy for strategy in strategies if entry["table"] in (strategy, "both")]
            if of_claim and (answer := _RULES[entry["claim"]](judged, of_claim)):
                truth, because = answer
                if absent := [column.label for column in table.columns if column not in judged.columns]:
                    truth = False if truth is False else None  # it would hold on fewer datasets than under others
                    because += f"; not in this table: {', '.join(absent)}"
                words = {True: "holds", False: "does not hold", None: "not decided by these runs"}
                answers.append(Verdict(entry["claim"], entry["table"], words[truth], because, protocol))
    return answers


def _paper_rows(table: Table) -> list[Row]:
    """The rows of the paper's seven constructions; the paper varies nothing but construction and strategy."""
    rows = [row for row in table.rows if row.is_construction and not row.variant]
    return [row for row in rows if row.tensor_mode in PAPER_CONSTRUCTIONS]


_SEVEN = tuple(mode for mode in PAPER_CONSTRUCTIONS if mode != "lora")

# A rule returns whether its claim holds (None if undecided), and the numbers behind that answer; or None if the table
# lacks all the rows that the claim compares.
_Answer = tuple[bool | None, str] | None


def _no_construction_beats_lora(table: Table, strategies: list[str]) -> _Answer:
    rows = [row for row in _paper_rows(table) if row.strategy in strategies]
    beats = _compare(table, [(row, table.reference(row)) for row in rows])
    if not beats:
        return None
    truths = [None if truth is None else not truth for truth in beats.values()]
    absent = _absent(table, _SEVEN, strategies)
    return _all([*truths, *([None] if absent else [])]), _listed(beats, "above LoRA", absent)


def _few_parameters(table: Table, strategies: list[str]) -> _Answer:
    truths: list[bool | None] = []
    sentences = []
    for column in table.columns:
        percents = {}
        for row in _paper_rows(table):
            run = next(iter(table.cell(row, column)), None)
            if run and row.strategy in strategies:
                percents[row.tensor_mode] = percent_of_lora(run.parameters, run.lora_parameters)
        known = {mode: percent for mode, percent in percents.items() if percent is not None}
        below = [mode for mode, percent in known.items() if percent < 10]
        truths.append(len(below) >= 4 if len(known) == 7 else None)
        listed = ", ".join(f"{mode} {percent:.1f} %" for mode, percent in known.items())
        sentences.append(f"{len(below)} of {len(known)} on {column.model}" + (f" ({listed})" if listed else ""))
    return _all(truths), "; ".join(dict.fromkeys(sentences))


def _two_beat_lora_everywhere(table: Table, strategies: list[str]) -> _Answer:
    modes = ("qkv_depth", "att_qkv_depth")
    rows = [row for row in _paper_rows(table) if row.tensor_mode in modes and row.strategy in strategies]
    beats = _compare(table, [(row, table.reference(row)) for row in rows])
    if not beats:
        return None
    absent = _absent(table, modes, strategies)
    datasets = f"{len(table.columns)} dataset{'s' if len(table.columns) > 1 else ''} here"
    return None if absent else _all(beats.values()), f"{_listed(beats, 'above LoRA', absent)} ({datasets})"


def _att_is_the_weakest(table: Table, strategies: list[str]) -> _Answer:
    pairs = [
        (row, att)
        for row in _paper_rows(table)
        for att in _paper_rows(table)
        if att.tensor_mode == "att" != row.tensor_mode and att.strategy == row.strategy in strategies
    ]
    beats = _compare(table, pairs)
    if not beats:
        return None
    absent = _absent(table, _SEVEN, strategies)
    return _all([*beats.values(), *([None] if absent else [])]), _listed(beats, "above att", absent)


_RULES = {
    "no construction beats LoRA": _no_construction_beats_lora,
    "four of the seven constructions use less than 10 % of LoRA's parameters": _few_parameters,
    "qkv_depth and att_qkv_depth beat LoRA on 4 of 4 datasets": _two_beat_lora_everywhere,
    "att is the least effective construction": _att_is_the_weakest,
}


def _compare(table: Table, pairs: Sequence[tuple[Row, Row | None]]) -> dict[str, bool | None]:
    """Whether the first row of each pair beats the second row on each dataset, by a name for the comparison."""
    above: dict[tuple[Row, Column], bool | None] = {}
    for other in dict.fromkeys(other for _, other in pairs if other):
        # The differences from LoRA are corrected for all of them, as in the comparison that the table shows.
        rows = table.compared_with(other) if other.is_lora else [row for row, of in pairs if of == other]
        for column in table.columns:
            scores = {row: table.scores(row, column) for row in rows}
            for row, difference in paired_differences(scores, table.scores(other, column)).items():
                above[row, column] = difference.above if difference else None
    beats: dict[str, bool | None] = {}
    for row, _ in pairs:
        for column in table.columns:
            same = [other for other in table.columns if other.dataset == column.dataset]
            where = f" on {column.dataset}" if len(table.columns) > 1 else ""
            where += f" with {column.model}" if len(same) > 1 else ""
            higher = above.get((row, column))
            beats[f"{row.label}{where}"] = higher if higher is None else higher is table.scale(column).larger_is_better
    return beats


def _all(truths: Iterable[bool | None]) -> bool | None:
    known = list(truths)
    return False if False in known else True if known and None not in known else None


def _absent(table: Table, modes: Iterable[str], strategies: Sequence[str]) -> str:
    """The rows that a claim is about and that the table does not have."""
    present = {(row.tensor_mode, row.strategy) for row in _paper_rows(table)}
    wanted = [(mode, strategy) for strategy in strategies for mode in modes]
    return ", ".join(" ".join(row) for row in wanted if row not in present)


def _listed(beats: dict[str, bool | None], what: str, absent: str) -> str:
    def names(truth: bool | None) -> str:
        return ", ".join(name for name, value in beats.items() if value is truth)

    parts = (
        (what, names(True)),
        (f"not {what}", names(False)),
        ("undecided", names(None)),
        ("not in this table", absent),
    )
    return "; ".join(f"{head}: {listed}" for head, listed in parts if listed)
