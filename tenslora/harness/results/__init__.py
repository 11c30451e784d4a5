"""What a run leaves behind, and what is made of it. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenslora.harness.results.table import Table


def write_results(table: Table, folder: Path) -> list[Path]:
    """Write `table` to `folder` in every form it takes, and return the files.

    table.md, table.tex and table.csv; figures/ with each figure as PNG and SVG, as soon as a run has a score; and
    report.html, which holds all of it in one page. Each file is whole or as it was before. Raises TensLoRAError if
    one cannot be written.
    """
    from tenslora.files import write_bytes
    from tenslora.harness.results.figures import write_figures
    from tenslora.harness.results.formats import csv, latex, markdown
    from tenslora.harness.results.report import report

    paths = []
    for name, form in (("table.md", markdown), ("table.tex", latex), ("table.csv", csv)):
        write_bytes(folder / name, form(table).encode())
        paths.append(folder / name)
    paths += write_figures(table, folder / "figures")
    write_bytes(folder / "report.html", report(table).encode())
    return [*paths, folder / "report.html"]
