"""A table as one HTML page: scores, claims, figures, runs and their environment. The page loads no other files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

# Imported here, although only figures and intervals need them: a running sweep writes reports in a thread, and two
# threads that import at once can see each other's half-imported modules.
import matplotlib.backends.backend_svg  # noqa: F401
import scipy.stats  # noqa: F401
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tenslora.files import write_bytes
from tenslora.harness.results.by_class import by_class
from tenslora.harness.results.figures import figures_of, inline_svgs
from tenslora.harness.results.ordering import ordering_heads, ordering_note, orderings
from tenslora.harness.results.paper import VERDICTS_NOTE
from tenslora.harness.results.statistics import Difference
from tenslora.harness.results.summary import COMPARISON_NOTE, Comparison, Summary, summarize
from tenslora.harness.results.table import ROW_ORDER, Column, Row, Run, Table


def write_report(table: Table, folder: Path, goes_on: bool) -> Path:
    """Write a table's report.html alone, while its sweep runs.

    Args:
        table: the table, finished or not.
        folder: the folder to write to.
        goes_on: whether the sweep goes on. If so, the page says when it was written, and reloads itself.

    Returns:
        The file.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    html = to_html(summarize(table), datetime.now().astimezone() if goes_on else None)
    write_bytes(folder / "report.html", html.encode())
    return folder / "report.html"


def to_html(summary: Summary, written: datetime | None = None) -> str:
    """The report on a table as a self-contained HTML document.

    Args:
        summary: the summary of the table.
        written: the present time, if the table's sweep runs: the document then shows it and reloads itself. None for
            any other table.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tenslora.harness.results") / "report.html").read_text(encoding="utf-8"))
    figures = [(figure, [Markup(svg) for svg in inline_svgs(figure)]) for figure in figures_of(summary)]
    statuses = [run.status for run in summary.runs]
    reach = _reach(summary.comparisons)
    columns = {column.column: column for column in summary.columns}
    return template.render(
        summary=summary,
        table=summary.table,
        position_of=lambda row: ROW_ORDER.index(row.tensor_mode),
        written=written,
        word=lambda status: "waiting" if written and status == "missing" else status,
        unfinished=_unfinished(summary.runs),
        trials_ended=sum(run.record is not None for run in summary.trials.runs) if summary.trials else 0,
        comparisons=[
            (column, [(one, _interval(one.difference, reach, columns[column].larger_is_better)) for one in compared])
            for column, compared in groupby(
                filter(_is_known, summary.comparisons), lambda comparison: comparison.column
            )
        ],
        comparison_note=COMPARISON_NOTE,
        orderings=orderings(summary),
        ordering_heads=ordering_heads,
        ordering_note=ordering_note,
        verdicts_note=VERDICTS_NOTE,
        by_class=by_class(summary),
        figures=[(figure, svgs) for figure, svgs in figures if svgs],
        counts={status: statuses.count(status) for status in ("completed", "failed", "running", "missing")},
        runs=[(columns[column], list(runs)) for column, runs in groupby(summary.runs, lambda run: run.column)],
        others={run.digest: text for run in summary.runs if (text := _other_scores(run))},
        provenance=_provenance(summary.runs),
    )


def _is_known(comparison: Comparison) -> bool:
    return comparison.difference is not None


def _reach(comparisons: Iterable[Comparison]) -> float:
    """The largest absolute value in any interval, in points. Reference rows are left out, as they are often far off."""
    ends = [
        abs(end)
        for against in comparisons
        if against.difference and against.row.has_adapter
        for end in (against.difference.mean, against.difference.low, against.difference.high)
        if end is not None
    ]
    return max(ends, default=1.0) or 1.0


def _interval(difference: Difference | None, reach: float, larger_is_better: bool) -> dict[str, Any] | None:
    """Where mean and interval lie on a scale from -100 to 100; None if the mean is off the scale or unknown.

    Args:
        difference: the difference, in points.
        reach: the difference that is at 100 on the scale, in points.
        larger_is_better: whether a positive difference is good.
    """
    if difference is None or abs(difference.mean) > reach:
        return None

    def position(value: float | None) -> float | None:
        return None if value is None else round(max(-100.0, min(100.0, 100 * value / reach)), 1)

    return {
        "mean": position(difference.mean),
        "low": position(difference.low),
        "high": position(difference.high),
        # Whether the row is better than LoRA, which colours the interval.
        "verdict": "open" if difference.above is None else "above" if difference.above is larger_is_better else "below",
    }


def _unfinished(runs: Iterable[Run]) -> dict[str, list[tuple[Row, Column, list[int]]]]:
    """The rows, columns and seeds of the runs that are running, and of those that are missing."""
    unfinished: dict[str, list[tuple[Row, Column, list[int]]]] = {}
    for (status, row, column), cell in groupby(runs, lambda run: (run.status, run.row, run.column)):
        if status in ("running", "missing"):
            unfinished.setdefault(status, []).append((row, column, [run.seed for run in cell]))
    return dict(sorted(unfinished.items(), reverse=True))


def _other_scores(run: Run) -> str:
    """The last scores of a run other than that of the headline metric, those of further test splits included."""
    return ", ".join(f"{name} {score:.2f}" for name, score in run.other_scores.items())


def _provenance(runs: Iterable[Run]) -> dict[str, list[str]]:
    """The devices, platforms, commits and package versions of the runs: for each name, every distinct value once."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in _circumstances(run.record or {}):
            values.setdefault(name, {})[value] = None
    return {name: list(distinct) for name, distinct in values.items()}


def _circumstances(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if device := record.get("device"):
        processes = record.get("processes", 1)
        yield "device", device if processes == 1 else f"{device}, {processes} processes"
    environment = record.get("environment", {})
    if platform := environment.get("platform"):
        yield "platform", platform
    if git := environment.get("git"):
        yield "commit", git["commit"] + (", changed since" if git["changed"] else "")
    yield from environment.get("versions", {}).items()
