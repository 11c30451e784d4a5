"""Tables of finished runs, and their files: Markdown, LaTeX, CSV, figures and a report. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.harness.results.table import Table

_FILES = (
    "table.md", "table.tex", "table.csv", "against_lora.csv", "claims.csv", "trials.csv", "report.html"
)  # fmt: skip


def check_places(folder: Path) -> None:
    """Check that `write_results` finds no folder in the place of one of its files, and no file in that of its figures.

    Args:
        folder: the folder to write to, which need not exist.

    Raises:
        TensLoRAError: if it does.
    """
    for name in _FILES:
        if (folder / name).is_dir():
            raise TensLoRAError(f"{folder / name}: cannot be written (Is a directory)")
    if (folder / "figures").is_file():
        raise TensLoRAError(f"{folder / 'figures'}: cannot be written (is a file; must be a folder, or absent)")


def write_results(table: Table, folder: Path) -> list[Path]:
    """Write a table as Markdown, LaTeX, CSV, figures and a report.

    The files are table.md, table.tex, table.csv, against_lora.csv, claims.csv, report.html and, once a run has a score,
    figures/*.png and figures/*.svg; of a tuned table also trials.csv, with a line for each trial. The report shows the
    whole table and the figures on one page. If a file cannot be written, its earlier version stays.

    Args:
        table: the table, finished or not.
        folder: the folder to write to.

    Returns:
        The files written.

    Raises:
        TensLoRAError: if a file cannot be written.
    """
    # Imported here, because matplotlib and jinja2 take seconds to import and every command imports this package.
    from tenslora.files import write_bytes
    from tenslora.harness.results.csv import claims_to_csv, comparison_to_csv, to_csv
    from tenslora.harness.results.figures import write_figures
    from tenslora.harness.results.latex import to_latex
    from tenslora.harness.results.markdown import to_markdown
    from tenslora.harness.results.report import to_html
    from tenslora.harness.results.summary import summarize

    check_places(folder)
    summary = summarize(table)
    paths = []
    forms = {
        "table.md": to_markdown,
        "table.tex": to_latex,
        "table.csv": to_csv,
        "against_lora.csv": comparison_to_csv,
        "claims.csv": claims_to_csv,
    }
    for name, form in forms.items():
        write_bytes(folder / name, form(summary).encode())
        paths.append(folder / name)
    if summary.trials:
        write_bytes(folder / "trials.csv", to_csv(summary.trials).encode())
        paths.append(folder / "trials.csv")
    paths += write_figures(summary, folder / "figures")
    write_bytes(folder / "report.html", to_html(summary).encode())
    return [*paths, folder / "report.html"]
