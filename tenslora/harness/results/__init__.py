"""Tables of finished runs, and their files: Markdown, LaTeX, CSV, figures and a report. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from tenslora.harness.results.table import Table


def write_results(table: Table, folder: Path) -> list[Path]:
    """Write a table in every form it has.

    These are table.md, table.tex, table.csv, figures/ with each figure as PNG and SVG once a run has a score, and
    report.html, which holds all of it in one page. Each file is complete or as it was before.

    Args:
        table: finished or not.
        folder: where to write.

    Returns:
        The files.

    Raises:
        TensLoRAError: if a file cannot be written.
    """
    # Here, because matplotlib and jinja2 take seconds to import and every command reads this package.
    from tenslora.files import write_bytes
    from tenslora.harness.results.csv import to_csv
    from tenslora.harness.results.figures import write_figures
    from tenslora.harness.results.latex import to_latex
    from tenslora.harness.results.markdown import to_markdown
    from tenslora.harness.results.report import to_html
    from tenslora.harness.results.summary import summarize

    summary = summarize(table)
    paths = []
    for name, form in (("table.md", to_markdown), ("table.tex", to_latex), ("table.csv", to_csv)):
        write_bytes(folder / name, form(summary).encode())
        paths.append(folder / name)
    paths += write_figures(summary, folder / "figures")
    write_bytes(folder / "report.html", to_html(summary).encode())
    return [*paths, folder / "report.html"]
