"""A table as Markdown, to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tenslora.harness.results.ordering import Ordering, ordering_heads, ordering_note, orderings
from tenslora.harness.results.paper import VERDICTS_NOTE
from tenslora.harness.results.summary import (
    ADAPTER_HEADS,
    COMPARISON_HEADS,
    COMPARISON_NOTE,
    Cell,
    Grid,
    Summary,
    one_line,
)


def to_markdown(summary: Summary) -> str:
    """The table as GitHub-flavoured Markdown, with failed runs, the comparison with LoRA and the paper's claims.

    Args:
        summary: the summary of the table.
    """
    blocks = [f"# {_escaped(summary.table.title)}", *map(_escaped, summary.table.notes), summary.caption]
    blocks.append(_main_table(summary))
    for others in summary.other_scores:
        heading = f"## Other scores on {others.column.dataset} ({others.column.model})"
        heads = ["construction", *map(_escaped, others.names)]
        of_rows = [[_escaped(row.label), *texts] for row, texts in others.rows]
        blocks += [
            _escaped(heading),
            "After the last epoch, in the units of the table above.",
            _table(heads, ["---", *["---:"] * len(others.names)], of_rows),
        ]
    for grid in summary.grids:
        heading = f"## {grid.column.dataset} ({grid.column.model}) by {grid.setting}"
        blocks += [_escaped(heading), _grid_table(grid)]
    if summary.trials and summary.trials.has_scores:
        blocks += [_escaped(f"## The choice of {summary.trials.table.by}"), _escaped(summary.trials_caption)]
        for grid in summary.trials.grids:
            blocks += [_escaped(f"{grid.column.dataset} ({grid.column.model}):"), _grid_table(grid)]
    if found := orderings(summary):
        blocks += ["## What orders the rows", *_orderings(found)]
    if summary.failures:
        lines = [f"{run.row.label}, {run.column.label}, seed {run.seed}: {run.problem}" for run in summary.failures]
        blocks.append("Failed:\n\n" + "\n".join(f"- {_escaped(line)}" for line in lines))
    if summary.comparisons:
        several = len(summary.columns) > 1
        rows = [
            [_escaped(against.row.label), *[_escaped(against.column.label)] * several, *against.texts]
            for against in summary.comparisons
        ]
        heads = ["construction", *["dataset"] * several, *COMPARISON_HEADS]
        alignments = ["---"] * (1 + several) + ["---:"] * len(COMPARISON_HEADS)
        blocks += ["## Against LoRA", COMPARISON_NOTE, _table(heads, alignments, rows)]
    if summary.verdicts:
        blocks += ["## The paper's claims", VERDICTS_NOTE, *_claims(summary)]
    return "\n\n".join(blocks) + "\n"


def _orderings(found: Sequence[Ordering]) -> list[str]:
    heads, several = ordering_heads(found), len({one.protocol for one in found}) > 1
    rows = [[_escaped(one.column.label), *[_escaped(one.protocol)] * several, *one.texts] for one in found]
    heads = ["dataset", *["protocol"] * several, *map(_escaped, heads)]
    alignments = ["---"] * (1 + several) + ["---:"] * (len(heads) - 1 - several)
    return [ordering_note(found), _table(heads, alignments, [row[: len(heads)] for row in rows])]


def _claims(summary: Summary) -> list[str]:
    """The verdicts with their reasons; with several protocols, the verdicts side by side and then the reasons."""
    several = len(summary.protocols) > 1
    reasons = [
        [_escaped(text) for text in (v.claim, *[v.protocol] * several, v.table, v.verdict, v.because)]
        for v in summary.verdicts
    ]
    heads = ["claim", *["protocol"] * several, "table", "verdict", "because"]
    tables = [_table(heads, ["---"] * len(heads), reasons)]
    if several:
        rows = []
        for of_claim in summary.verdicts_by_claim:
            words = {verdict.protocol: verdict.verdict for verdict in of_claim}
            texts = (of_claim[0].claim, of_claim[0].table, *(words.get(name, "-") for name in summary.protocols))
            rows.append([_escaped(text) for text in texts])
        heads = ["claim", "table", *map(_escaped, summary.protocols)]
        tables.insert(0, _table(heads, ["---"] * len(heads), rows))
    return tables


def _main_table(summary: Summary) -> str:
    heads, alignments = list(ADAPTER_HEADS), ["---", "---", "---:", "---:", "---:"]
    for column in summary.columns:
        metric = f"{column.metric}, " if column.metric else ""
        heads.append(_escaped(f"{column.column.dataset} ({metric}{column.column.model})"))
        beside = ["paper"] * column.has_paper + [_escaped(column.tuned)] * bool(column.tuned)
        heads += beside
        alignments += ["---:"] * (1 + len(beside))
    rows = []
    for row in summary.rows:
        texts = [_escaped(row.row.label), *row.adapter_texts]
        for column, cell in zip(summary.columns, row.cells, strict=True):
            texts += [_score(cell), *[cell.paper_number] * column.has_paper, *[cell.tuned] * bool(column.tuned)]
        rows.append(texts)
    return _table(heads, alignments, rows)


def _grid_table(grid: Grid) -> str:
    heads = ["construction", *map(_escaped, grid.values)]
    rows = [[_escaped(row.label), *(_score(cell) if cell else "" for cell in cells)] for row, cells in grid.rows]
    return _table(heads, ["---", *["---:"] * len(grid.values)], rows)


def _score(cell: Cell) -> str:
    return cell.text("**{}**", "±")


def _table(heads: list[str], alignments: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (heads, alignments, *rows))


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*<`])", r"\\\1", one_line(text))
