"""A table of runs as text: Markdown and LaTeX to read, CSV to compute with."""

from __future__ import annotations

import csv as csv_module
import io
import re
from typing import Any

from tenslora.harness.results.cells import (
    MINUS,
    Cell,
    adapter_of,
    caption,
    comparisons,
    failures,
    grids,
    has_paper,
    lines,
    one_line,
    ordered_runs,
    status,
)
from tenslora.harness.results.paper import verdicts
from tenslora.harness.results.statistics import TEST
from tenslora.harness.results.table import Run, Table

ADAPTER = ("construction", "ranks", "parameters", "% of LoRA")
"""The main table's columns that come before the scores."""

AGAINST = (
    f"Difference of the means in points over the seeds that both have, its 95 % confidence interval, and the p-value "
    f"of a {TEST}. The p-values are not corrected for the number of comparisons."
)


def markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown, with the rows against LoRA, the paper's claims and what failed."""
    blocks = [f"# {_md(table.title)}", *map(_md, table.notes), caption(table)]

    heads, aligns = list(ADAPTER), ["---", "---", "---:", "---:"]
    papers = has_paper(table)
    for column, paper in zip(table.columns, papers, strict=True):
        metric = table.metric(column)
        heads.append(_md(f"{column.dataset} ({f'{metric}, ' if metric else ''}{column.model})"))
        heads += ["paper"] * paper
        aligns += ["---:"] * (1 + paper)
    rows = []
    for line in lines(table):
        texts = [_md(line.row.label), line.ranks, line.parameters, line.percent]
        for cell, paper in zip(line.cells, papers, strict=True):
            texts += [_score(cell, "**{}**", "±"), *[_paper(cell)] * paper]
        rows.append(texts)
    blocks.append(_md_table(heads, aligns, rows))

    for grid in grids(table):
        heads = ["construction", *map(_md, grid.values)]
        rows = [
            [_md(row.label), *(_score(cell, "**{}**", "±") if cell else "" for cell in cells)]
            for row, cells in grid.rows
        ]
        blocks += [
            _md(f"## {grid.column.dataset} ({grid.column.model}) by {grid.setting}"),
            _md_table(heads, ["---", *["---:"] * len(grid.values)], rows),
        ]

    if failed := failures(table):
        told = "\n".join(
            f"- {_md(f'{run.row.label}, {run.column.dataset} with {run.column.model}, seed {run.seed}: {run.problem}')}"
            for run in failed
        )
        blocks.append(f"Failed:\n\n{told}")

    if compared := comparisons(table):
        rows = [
            [_md(found.row.label), _md(found.column.dataset), _md(found.column.model), *found.texts]
            for found in compared
        ]
        heads = ["construction", "dataset", "model", "difference", "95 % interval", "p", "seeds"]
        blocks += [
            "## Against LoRA",
            AGAINST,
            _md_table(heads, ["---"] * 3 + ["---:"] * 4, rows),
        ]
    if said := verdicts(table):
        rows = [[_md(each.claim), _md(each.table), _md(each.verdict), _md(each.because)] for each in said]
        blocks += [
            "## The paper's claims",
            _md_table(["claim", "table", "verdict", "because"], ["---"] * 4, rows),
        ]
    return "\n\n".join(blocks) + "\n"


def _score(cell: Cell, bold: str, plus_minus: str) -> str:
    number = bold.format(cell.number) if cell.best else cell.number
    return " ".join(filter(None, (number, plus_minus if cell.spread else "", cell.spread, cell.remark)))


def _paper(cell: Cell) -> str:
    return "" if cell.paper is None else f"{cell.paper:.2f}"


def _md(text: str) -> str:
    return re.sub(r"([\\|*<`])", r"\\\1", one_line(text))


def _md_table(heads: list[str], aligns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (heads, aligns, *rows))


def latex(table: Table) -> str:
    """The table as LaTeX tables: the scores, and where there are any, by the setting that is swept and against LoRA.

    Each is a complete `table` environment with a caption and the label tab:<name>, tab:<name>-by-setting (with -1, -2,
    ... where there are several columns) or tab:<name>-against-lora; they need the package booktabs.
    """
    papers = has_paper(table)
    datasets, metrics, rules, at = ["", "", "", ""], [_tex(head) for head in ADAPTER], [], 5
    for column, paper in zip(table.columns, papers, strict=True):
        name = _tex(f"{column.dataset} ({column.model})")
        datasets.append(rf"\multicolumn{{{1 + paper}}}{{c}}{{{name}}}")
        metrics += [_tex(table.metric(column) or ""), *["paper"] * paper]
        rules.append(rf"\cmidrule(lr){{{at}-{at + paper}}}")
        at += 1 + paper
    body = [_tex_row(datasets), " ".join(rules), _tex_row(metrics), r"\midrule"]
    for line in lines(table):
        texts = [_tex(line.row.label), line.ranks, line.parameters, line.percent]
        for cell, paper in zip(line.cells, papers, strict=True):
            texts += [_tex_score(cell), *[_paper(cell)] * paper]
        body += [r"\midrule"] * line.starts_group + [_tex_row([text if text != "-" else "--" for text in texts])]
    told = [_tex(f"{table.title}."), *map(_tex, table.notes), _tex(caption(table))]
    parts = [
        "% Needs \\usepackage{booktabs}.",
        _tex_table("llrr" + "r" * (at - 5), body, " ".join(told), f"tab:{table.name}"),
        *(
            f"% failed: {one_line(f'{run.row.label}, {run.column.dataset}, seed {run.seed}: {run.problem}')}"
            for run in failures(table)
        ),
    ]
    for number, grid in enumerate(grids(table), start=1):
        head = [_tex_row(["construction", *map(_tex, grid.values)]), r"\midrule"]
        rows = [
            _tex_row([_tex(row.label), *(_tex_score(cell) if cell else "" for cell in cells)])
            for row, cells in grid.rows
        ]
        by = _tex(f"{table.title}: {grid.column.dataset} ({grid.column.model}) by {grid.setting}.")
        label = f"tab:{table.name}-by-setting" + f"-{number}" * (len(table.columns) > 1)
        parts += ["", _tex_table("l" + "r" * len(grid.values), [*head, *rows], by, label)]
    if against := _latex_against(table):
        parts += ["", against]
    return "\n".join(parts) + "\n"


def _tex_score(cell: Cell) -> str:
    return _score(cell, r"\textbf{{{}}}", r"$\pm$").replace(MINUS, "$-$")


def _latex_against(table: Table) -> str:
    found = comparisons(table)
    if not found:
        return ""
    body = [_tex_row(["construction", "difference", _tex("95 % interval"), "$p$", "seeds"])]
    for column in table.columns:
        name = _tex(f"{column.dataset} ({column.model})")
        body += [r"\midrule", rf"\multicolumn{{5}}{{l}}{{\emph{{{name}}}}} \\"]
        for each in found:
            if each.column == column:
                body.append(_tex_row([_tex(text) if text != "-" else "--" for text in (each.row.label, *each.texts)]))
    told = _tex(f"{table.title}: each row against LoRA. {AGAINST}")
    return _tex_table("lrrrr", body, told, f"tab:{table.name}-against-lora")


def _tex_table(alignment: str, body: list[str], told: str, label: str) -> str:
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\small",
            rf"\caption{{{told}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _tex_row(texts: list[str]) -> str:
    return " & ".join(texts) + r" \\"


def _tex(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$", MINUS: "$-$"}
    return "".join(special.get(character, character) for character in one_line(text))


def csv(table: Table) -> str:
    """One line per run, those without a score too, in the order of columns, rows and seeds.

    Nothing in it depends on when or where the runs were made. Scores are fractions, as recorded, at full precision,
    and empty for a run that is not completed.
    """
    content = io.StringIO()
    records = [_csv_record(table, run) for run in ordered_runs(table)]
    writer = csv_module.DictWriter(content, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return content.getvalue()


def _csv_record(table: Table, run: Run) -> dict[str, Any]:
    record: dict[str, Any] = run.record or {}
    metrics: dict[str, Any] = record.get("metrics", {})
    history: list[dict[str, Any]] = metrics.get("history", [])
    ranks, parameters, lora = adapter_of(run)
    completed = status(run) == "completed"
    return {
        "dataset": run.column.dataset,
        "model": run.column.model,
        "tensor_mode": run.row.tensor_mode,
        "rank_strategy": run.row.strategy,
        "variant": ";".join(run.row.variant),
        "seed": run.seed,
        "digest": run.digest,
        "status": status(run),
        "metric": table.metric(run.column),
        "last": metrics.get("last") if completed else None,
        "best": metrics.get("best") if completed else None,
        "best_epoch": metrics.get("best_epoch") if completed else None,
        "epochs": len(history) if record else None,
        "steps": (history[-1]["step"] if history else 0) if record else None,
        "ranks": " ".join(map(str, ranks)) if ranks else None,
        "adapter_parameters": parameters,
        "lora_parameters": lora,
        "percent_of_lora": 100 * parameters / lora if parameters is not None and lora else None,
        "head_parameters": record.get("head_parameters"),
        "train_examples": record.get("train_examples"),
        "test_examples": record.get("test_examples"),
        "problem": one_line(run.problem),
    }
