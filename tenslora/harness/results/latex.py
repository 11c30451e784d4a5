"""A table as LaTeX, to print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from tenslora.harness.results.paper import VERDICTS_NOTE
from tenslora.harness.results.summary import (
    COMPARISON_HEADS,
    COMPARISON_NOTE,
    MINUS,
    Cell,
    Grid,
    Summary,
    SummaryRow,
    one_line,
)
from tenslora.harness.results.table import AdapterSize

_MOST_COLUMNS = 10
"""A table with more columns of scores is divided, as scaling it down to the text's width would make it too small."""

_SIZE_HEADS = ["ranks", "parameters", r"\% of LoRA", "first step"]


def to_latex(summary: Summary) -> str:
    """The table as LaTeX: the scores, the scores by the swept setting, each row against LoRA, and the paper's claims.

    A tuned table has the scores of its trials too. What would be empty is left out. Each is a `table` environment with
    a caption, for the package booktabs. A table that is wider than the text is scaled down to its width, which needs
    graphicx. More than ten columns of scores are divided among several tables: one for each group of datasets and one
    for the groups' means, if the table has groups. Ranks, parameters and first steps then have a table of their own,
    and also if there are several backbones. The labels are tab:<name> (the second and later parts with -part2, -part3,
    ...), tab:<name>-sizes, tab:<name>-by-setting and tab:<name>-trials (with -1, -2, ... if there are several columns),
    tab:<name>-against-lora and tab:<name>-claims.

    Args:
        summary: the summary of the table.
    """
    parts = ["% Needs \\usepackage{booktabs,graphicx}.", "\n\n".join(_main_tables(summary))]
    for run in summary.failures:
        reason = one_line(f"{run.row.label}, {run.column.dataset}, seed {run.seed}: {run.problem}")
        parts.append(f"% failed: {reason}")
    for number, grid in enumerate(summary.grids, start=1):
        suffix = f"-{number}" if len(summary.columns) > 1 else ""
        parts += ["", _grid_table(grid, summary.table.title, f"tab:{summary.table.name}-by-setting{suffix}")]
    for number, grid in enumerate(summary.trials.grids if summary.trials and summary.trials.has_scores else []):
        suffix = f"-{number + 1}" if len(summary.columns) > 1 else ""
        label = f"tab:{summary.table.name}-trials{suffix}"
        parts += ["", _grid_table(grid, summary.table.title, label, summary.trials_caption)]
    if summary.comparisons:
        parts += ["", _comparison_table(summary)]
    if summary.verdicts:
        parts += ["", _claims_table(summary)]
    return "\n".join(parts) + "\n"


def _main_tables(summary: Summary) -> list[str]:
    """The scores with the sizes beside them, or in a table of their own if backbones differ or scores are divided."""
    models = list(dict.fromkeys(column.model for column in summary.table.columns))
    parts = _parts(summary)
    with_sizes = len(models) == 1 and len(parts) == 1
    tables = [_scores_table(summary, part, number, with_sizes) for number, part in enumerate(parts, start=1)]
    if not with_sizes:
        tables.append(_sizes_table(summary, models))
    return tables


def _parts(summary: Summary) -> list[list[int]]:
    """The numbers of the columns that stand together in one table."""
    columns = [each.column for each in summary.columns]
    if len(columns) <= _MOST_COLUMNS:
        return [list(range(len(columns)))]
    means = summary.table.group_columns
    part_of = {column: (mean.model, mean.dataset) for mean, of in means.items() for column in of if column not in means}
    parts: dict[tuple[str, str], list[int]] = {}
    for number, column in enumerate(columns):
        parts.setdefault(part_of.get(column, (column.model, "")), []).append(number)
    # A part without groups may still be too wide.
    starts = [(part, first) for part in parts.values() for first in range(0, len(part), _MOST_COLUMNS)]
    return [part[first : first + _MOST_COLUMNS] for part, first in starts]


def _scores_table(summary: Summary, part: list[int], number: int, with_sizes: bool) -> str:
    """The scores of some columns, with the sizes of the adapters beside them or without."""
    table, shown = summary.table, [summary.columns[index] for index in part]
    sizes = [""] * len(_SIZE_HEADS) if with_sizes else []
    first = len(sizes) + 2  # number of the LaTeX column in which a column of the table begins
    models = {column.model for column in table.columns}
    datasets, heads, rules = ["", *sizes], ["construction", *(_SIZE_HEADS if with_sizes else [])], []
    for column in shown:
        model = f" ({column.column.model})" if len(models) > 1 or len(part) == len(summary.columns) else ""
        name = _escaped(f"{column.column.dataset}{model}")
        beside_score = ["paper"] * column.has_paper + [_escaped(column.tuned)] * bool(column.tuned)
        datasets.append(rf"\multicolumn{{{1 + len(beside_score)}}}{{c}}{{{name}}}")
        heads += [_escaped(column.metric or ""), *beside_score]
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(beside_score)}}}")
        first += 1 + len(beside_score)

    def scores(row: SummaryRow) -> list[str]:
        texts = [*row.adapter_texts] if with_sizes else []
        for column, cell in zip(shown, [row.cells[index] for index in part], strict=True):
            tuned = [_escaped(cell.tuned)] * bool(column.tuned)
            texts += [_score(cell), *[cell.paper_number] * column.has_paper, *tuned]
        return texts

    notes = [summary.caption]
    if any(cell.scores and cell.remark for row in summary.rows for cell in row.cells):
        notes.append("A superscript counts the seeds that have a score where some have none.")
    alignment = ("llrrr" if with_sizes else "l") + "r" * (len(heads) - 1 - len(sizes))
    texts = (f"{table.title}.", *table.notes, *notes) if number == 1 else (f"{table.title}, continued.",)
    caption, label = " ".join(map(_escaped, texts)), f"tab:{table.name}" + (f"-part{number}" if number > 1 else "")
    top = [_row(datasets), " ".join(rules), _row(heads)]
    return _environment(alignment, [*top, *_grouped(summary, scores, len(heads))], caption, label)


def _sizes_table(summary: Summary, models: list[str]) -> str:
    """The sizes of the adapters on each backbone."""
    names = ["", *(rf"\multicolumn{{{len(_SIZE_HEADS)}}}{{c}}{{{_escaped(model)}}}" for model in models)]
    rules = [
        rf"\cmidrule(lr){{{first}-{first + len(_SIZE_HEADS) - 1}}}"
        for first in range(2, 2 + len(_SIZE_HEADS) * len(models), len(_SIZE_HEADS))
    ]
    top = [_row(names), " ".join(rules), _row(["construction", *_SIZE_HEADS * len(models)])]

    def sizes_of(row: SummaryRow) -> list[str]:
        by_model = {run.column.model: cell.size for cell in row.cells for run in cell.runs}
        return [text for model in models for text in by_model.get(model, AdapterSize(None, None, None)).texts]

    body = _grouped(summary, sizes_of, 1 + len(_SIZE_HEADS) * len(models))
    caption = _escaped(f"{summary.table.title}: ranks, parameters and first steps.")
    return _environment("l" + "lrrr" * len(models), [*top, *body], caption, f"tab:{summary.table.name}-sizes")


def _grouped(summary: Summary, texts: Callable[[SummaryRow], list[str]], width: int) -> list[str]:
    """The rows of a table, each rank strategy below its name."""
    lines = [r"\midrule"]
    strategy = ""
    for row in summary.rows:
        lines += [r"\midrule"] * row.starts_group
        if row.row.strategy and (row.starts_group or row.row.strategy != strategy):
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_escaped(row.row.strategy)}}}}} \\")
        strategy = row.row.strategy
        name = _escaped(replace(row.row, strategy="").label)
        lines.append(_row([name, *map(_with_dash, texts(row))]))
    return lines


def _grid_table(grid: Grid, title: str, label: str, note: str = "") -> str:
    body = [_row(["construction", *map(_escaped, grid.values)]), r"\midrule"]
    body += [_row([_escaped(row.label), *(_score(cell) if cell else "" for cell in cells)]) for row, cells in grid.rows]
    caption = _escaped(f"{title}: {grid.column.dataset} ({grid.column.model}) by {grid.setting}. {note}".strip())
    return _environment("l" + "r" * len(grid.values), body, caption, label)


def _comparison_table(summary: Summary) -> str:
    heads = [f"${head}$" if head == "p" else _escaped(head) for head in COMPARISON_HEADS]
    body = [_row(["construction", *heads])]
    for column in (each.column for each in summary.columns):
        name = _escaped(f"{column.dataset} ({column.model})")
        body += [r"\midrule", rf"\multicolumn{{{1 + len(heads)}}}{{l}}{{\emph{{{name}}}}} \\"]
        for against in summary.comparisons:
            if against.column == column:
                body.append(_row(_with_dash(_escaped(text)) for text in (against.row.label, *against.texts)))
    caption = _escaped(f"{summary.table.title}: each row against LoRA. {COMPARISON_NOTE}")
    return _environment("l" + "r" * len(heads), body, caption, f"tab:{summary.table.name}-against-lora")


def _claims_table(summary: Summary) -> str:
    protocols = summary.protocols
    heads = ["claim", "table", *(protocols if len(protocols) > 1 else ["verdict"])]
    body = [_row(map(_escaped, heads)), r"\midrule"]
    for of_claim in summary.verdicts_by_claim:
        words = {verdict.protocol: verdict.verdict for verdict in of_claim}
        texts = (of_claim[0].claim, of_claim[0].table, *(words.get(name, "-") for name in protocols))
        body.append(_row(_with_dash(_escaped(text)) for text in texts))
    caption = _escaped(f"{summary.table.title}: verdicts on the paper's claims. {VERDICTS_NOTE}")
    return _environment("l" * len(heads), body, caption, f"tab:{summary.table.name}-claims")


def _score(cell: Cell) -> str:
    text = cell.text(r"\textbf{{{}}}", r"$\pm$").replace(MINUS, "$-$")
    if cell.scores and cell.remark:
        text = text.replace(f" {cell.remark}", rf"$^{{{len(cell.scores)}/{cell.seeds}}}$")
    return text


def _environment(alignment: str, body: list[str], caption: str, label: str) -> str:
    readable = re.sub(r"[^\w.:-]", "-", label)  # the name of a comparison's folder may have a % or a }
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\small",
            r"\setlength{\belowcaptionskip}{6pt}",  # article leaves no room between a caption and the table below it
            rf"\caption{{{caption}}}",
            rf"\label{{{readable}}}",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def _row(texts: Iterable[str]) -> str:
    return " & ".join(texts) + r" \\"


def _with_dash(text: str) -> str:
    return "--" if text == "-" else text


def _escaped(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$", MINUS: "$-$"}
    return "".join(special.get(character, character) for character in one_line(text))
