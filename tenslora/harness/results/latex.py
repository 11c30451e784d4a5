"""A table as LaTeX, to print."""

from __future__ import annotations

from collections.abc import Iterable

from tenslora.harness.results.summary import (
    ADAPTER_HEADS,
    COMPARISON_HEADS,
    COMPARISON_NOTE,
    MINUS,
    Cell,
    Grid,
    Summary,
    one_line,
)


def to_latex(summary: Summary) -> str:
    """The table as LaTeX: the scores, the scores by the swept setting, and the comparison of each row with LoRA.

    The last two are left out if they would be empty. Each is a `table` environment with a caption, for the package
    booktabs. The labels are tab:<name>, tab:<name>-by-setting (with -1, -2, ... if there are several columns) and
    tab:<name>-against-lora.

    Args:
        summary: the summary of the table.
    """
    parts = ["% Needs \\usepackage{booktabs}.", _main_table(summary)]
    for run in summary.failures:
        reason = one_line(f"{run.row.label}, {run.column.dataset}, seed {run.seed}: {run.problem}")
        parts.append(f"% failed: {reason}")
    for number, grid in enumerate(summary.grids, start=1):
        suffix = f"-{number}" if len(summary.columns) > 1 else ""
        parts += ["", _grid_table(grid, summary.table.title, f"tab:{summary.table.name}-by-setting{suffix}")]
    if summary.comparisons:
        parts += ["", _comparison_table(summary)]
    return "\n".join(parts) + "\n"


def _main_table(summary: Summary) -> str:
    first = len(ADAPTER_HEADS) + 1  # number of the LaTeX column in which a column of the table begins
    datasets, heads, rules = [""] * len(ADAPTER_HEADS), [_escaped(head) for head in ADAPTER_HEADS], []
    for column in summary.columns:
        name = _escaped(f"{column.column.dataset} ({column.column.model})")
        datasets.append(rf"\multicolumn{{{1 + column.has_paper}}}{{c}}{{{name}}}")
        heads += [_escaped(column.metric or ""), *["paper"] * column.has_paper]
        rules.append(rf"\cmidrule(lr){{{first}-{first + column.has_paper}}}")
        first += 1 + column.has_paper
    body = [_row(datasets), " ".join(rules), _row(heads), r"\midrule"]
    for row in summary.rows:
        texts = [_escaped(row.row.label), row.ranks, row.parameters, row.percent_of_lora]
        for column, cell in zip(summary.columns, row.cells, strict=True):
            texts += [_score(cell), *[cell.paper_number] * column.has_paper]
        body += [r"\midrule"] * row.starts_group + [_row(map(_with_dash, texts))]
    table = summary.table
    caption = " ".join(map(_escaped, (f"{table.title}.", *table.notes, summary.caption)))
    return _environment("llrr" + "r" * (len(heads) - len(ADAPTER_HEADS)), body, caption, f"tab:{table.name}")


def _grid_table(grid: Grid, title: str, label: str) -> str:
    body = [_row(["construction", *map(_escaped, grid.values)]), r"\midrule"]
    body += [_row([_escaped(row.label), *(_score(cell) if cell else "" for cell in cells)]) for row, cells in grid.rows]
    caption = _escaped(f"{title}: {grid.column.dataset} ({grid.column.model}) by {grid.setting}.")
    return _environment("l" + "r" * len(grid.values), body, caption, label)


def _comparison_table(summary: Summary) -> str:
    heads = [f"${head}$" if head == "p" else _escaped(head) for head in COMPARISON_HEADS]
    body = [_row(["construction", *heads])]
    for column in (each.column for each in summary.columns):
        name = _escaped(f"{column.dataset} ({column.model})")
        body += [r"\midrule", rf"\multicolumn{{5}}{{l}}{{\emph{{{name}}}}} \\"]
        for against in summary.comparisons:
            if against.column == column:
                body.append(_row(_with_dash(_escaped(text)) for text in (against.row.label, *against.texts)))
    caption = _escaped(f"{summary.table.title}: each row against LoRA. {COMPARISON_NOTE}")
    return _environment("lrrrr", body, caption, f"tab:{summary.table.name}-against-lora")


def _score(cell: Cell) -> str:
    return cell.text(r"\textbf{{{}}}", r"$\pm$").replace(MINUS, "$-$")


def _environment(alignment: str, body: list[str], caption: str, label: str) -> str:
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\small",
            rf"\caption{{{caption}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
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
