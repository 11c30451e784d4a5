"""One HTML page for a table: numbers, claims, figures, runs, and how they were made, without anything from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

from tenslora.constructions import CONSTRUCTIONS
from tenslora.harness.results.cells import (
    Comparison,
    adapter_of,
    caption,
    comparisons,
    failures,
    grids,
    has_paper,
    lines,
    ordered_runs,
    status,
)
from tenslora.harness.results.figures import drawings, inline_svgs
from tenslora.harness.results.formats import AGAINST
from tenslora.harness.results.paper import verdicts
from tenslora.harness.results.table import ORDER, Run, Table


def report(table: Table) -> str:
    """The report on `table` as one self-contained HTML document: it asks nothing of the network."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tenslora.harness.results") / "report.html").read_text(encoding="utf-8"))
    runs = ordered_runs(table)
    compared = comparisons(table)
    figures = [
        {"title": each.title, "what": each.what, "panels": [Markup(svg) for svg in inline_svgs(table, each)]}
        for each in drawings(table)
    ]
    return template.render(
        table=table,
        lines=lines(table),
        grids=grids(table),
        papers=has_paper(table),
        caption=caption(table),
        rank_of=lambda row: ORDER.index(row.tensor_mode),
        compared=[(each, _bar(each, _reach(compared))) for each in compared],
        against=AGAINST,
        verdicts=verdicts(table),
        figures=[figure for figure in figures if figure["panels"]],
        failures=failures(table),
        runs=[_run(run) for run in runs],
        counts={name: sum(status(run) == name for run in runs) for name in ("completed", "failed", "missing")},
        made=_made(runs),
    )


def _run(run: Run) -> dict[str, Any]:
    ranks, parameters, _ = adapter_of(run)
    done = run.record if run.record and not run.problem else None
    return {
        "run": run,
        "status": status(run),
        "metrics": done["metrics"] if done else None,
        "seconds": done["seconds"].get("train") if done else None,
        "ranks": ", ".join(map(str, ranks)) if ranks else "",
        "parameters": parameters,
    }


def _reach(compared: Iterable[Comparison]) -> float:
    """The largest end of an interval, in points; reference rows, often far off, do not count."""
    ends = [
        abs(end)
        for each in compared
        if each.points and each.row.tensor_mode in CONSTRUCTIONS
        for end in (each.points.mean, each.points.low, each.points.high)
        if end is not None
    ]
    return max(ends, default=1.0) or 1.0


def _bar(each: Comparison, reach: float) -> dict[str, Any] | None:
    """Where mean and interval lie between -100 and 100; None where there is nothing to draw within that."""
    if each.points is None or abs(each.points.mean) > reach:
        return None

    def place(value: float | None) -> float | None:
        return None if value is None else round(max(-100.0, min(100.0, 100 * value / reach)), 1)

    verdict = {True: "above", False: "below", None: "open"}[each.points.above]
    return {
        "mean": place(each.points.mean),
        "low": place(each.points.low),
        "high": place(each.points.high),
        "verdict": verdict,
    }


def _made(runs: Iterable[Run]) -> dict[str, list[str]]:
    """What the runs were made with and on: for each kind of thing, every distinct value once."""
    made: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in _facts(run.record or {}):
            made.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in made.items()}


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if device := record.get("device"):
        processes = record.get("processes", 1)
        yield "device", device if processes == 1 else f"{device}, {processes} processes"
    environment = record.get("environment", {})
    if platform := environment.get("platform"):
        yield "platform", platform
    if git := environment.get("git"):
        yield "commit", git["commit"] + (", changed since" if git["changed"] else "")
    yield from environment.get("versions", {}).items()
