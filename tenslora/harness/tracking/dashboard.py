"""Builds a W&B report that compares the runs of sweeps: python -m tenslora.harness.tracking.dashboard --project tenslora

Scores over steps, last scores and parameters, per dataset and grouped by construction and strategy, and the finished
tables. The report shows the runs as they come in: it needs building once, not once per run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.results.paper import paper
from tenslora.harness.tracking import SCORE, TABLE, TRAIN

_LIMIT = 100  # W&B shows ten rows in a panel where nothing else is said
_NOTHING: tuple[Any, ...] = (None, "", [], {}, (None, None))


def build_report(
    project: str, entity: str, groups: Sequence[str], datasets: Sequence[str], by: Sequence[str] = ()
) -> Any:
    """The comparison as a W&B report that is not saved yet; talks to no service.

    groups: of the runs to compare, all of the project's if empty. datasets: one section each. by: settings, such as
    adapter.alpha, that tell runs apart beside construction and strategy.

    Raises TensLoRAError if wandb_workspaces is not installed.
    """
    try:  # by name: it is optional, and tells type checkers nothing of what it exports
        wr = import_module("wandb_workspaces.reports.v2")
        ws = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise TensLoRAError(f"{error}: pip install tenslora[dashboard]") from error

    def runs_of(job_type: str, *further: Any) -> Any:
        of_groups = [ws.Metric("Group").isin(list(groups))] if groups else []
        return ws.And(ws.Metric("JobType") == job_type, *of_groups, *further)

    def trained_on(dataset: str, groupby: list[str]) -> Any:
        # Attempts that broke off would count beside the run that took their place. W&B keeps a setting's value under
        # "value", and a filter wants to be told so.
        going_well = ws.Metric("State").isin(["finished", "running"])
        return wr.Runset(
            name=dataset,
            filters=runs_of(TRAIN, ws.Config("dataset.value.name") == dataset, going_well),
            groupby=groupby,
            pinned_columns=[
                "run:displayName",
                f"summary:{SCORE}",
                "summary:best",
                "config:adapter_parameters.value",
                "config:percent_of_lora.value",
            ],
        )

    def over_seeds(**panel: Any) -> dict[str, Any]:
        return {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_runs_to_show": _LIMIT, **panel}

    blocks: list[Any] = [
        wr.P(
            "One line, bar or point per construction and rank strategy: the mean over seeds, lines and bars with the "
            "standard deviation. The score is each dataset's headline metric on its test data, after every epoch."
        ),
        wr.H2("Tables"),
        wr.PanelGrid(
            runsets=[wr.Runset(name="tables", filters=runs_of(TABLE))],
            panels=[
                wr.WeavePanelSummaryTable(table_name="results", layout=wr.Layout(w=24, h=12)),
                wr.MediaBrowser(media_keys=["figures"], num_columns=2, layout=wr.Layout(w=24, h=12)),
            ],
        ),
    ]
    groupby = [f"config.{key}" for key in ("row", *by)]
    for dataset in datasets:
        blocks += [
            wr.H2(dataset),
            wr.PanelGrid(
                runsets=[trained_on(dataset, groupby)],
                panels=[
                    wr.LinePlot(
                        **over_seeds(title="score over steps", x="step", y=[SCORE], layout=wr.Layout(w=24, h=10))
                    ),
                    wr.BarPlot(
                        **over_seeds(
                            title="last score", metrics=[SCORE], max_bars_to_show=_LIMIT, layout=wr.Layout(w=12, h=12)
                        )
                    ),
                    wr.ScatterPlot(
                        title="last score against parameters",
                        x=wr.Config("adapter_parameters"),
                        y=wr.SummaryMetric(SCORE),
                        log_x=True,
                        layout=wr.Layout(w=12, h=12),
                    ),
                ],
            ),
        ]
    blocks += [
        wr.H2("Settings that differ"),
        wr.PanelGrid(
            runsets=[trained_on(dataset, groupby=[]) for dataset in datasets],
            panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=16))],
        ),
    ]
    title = f"TensLoRA: {', '.join(groups)}" if groups else "TensLoRA"
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")


def specification(part: Any) -> Any:
    """What a report holds, as plain data: every part by the name of its class, with what was said of it."""
    if dataclasses.is_dataclass(part):
        named = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if not f.name.startswith("_")}
        said = {name: specification(value) for name, value in named.items() if value not in _NOTHING}
        return {"type": type(part).__name__, **said}
    if isinstance(part, list | tuple):
        return [specification(item) for item in part]
    return part


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake or a service out of reach ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(prog="python -m tenslora.harness.tracking.dashboard", description=__doc__)
    parser.add_argument("--project", required=True, help="the runs' W&B project (logger.project)")
    parser.add_argument("--entity", help="the user or team that owns it; default: the key's own")
    parser.add_argument("--group", nargs="+", default=[], help="groups to compare; a sweep's is its table's name")
    parser.add_argument("--dataset", nargs="+", default=paper()["datasets"], help="default: the paper's four")
    parser.add_argument("--by", nargs="+", default=[], help="settings that tell rows apart, such as adapter.alpha")
    parser.add_argument("--dry-run", action="store_true", help="print the report's specification and send nothing")
    given = parser.parse_args(arguments)
    try:
        report = build_report(given.project, given.entity or "", given.group, given.dataset, given.by)
        if given.dry_run:
            print(json.dumps(specification(report), indent=2))
        else:
            print(_save(report))
    except TensLoRAError as error:
        sys.exit(f"error: {error}")


def _save(report: Any) -> str:
    import wandb

    try:
        report.entity = report.entity or str(wandb.Api().default_entity)
        report.save()
        return str(report.url)
    except Exception as error:  # wandb_workspaces raises bare exceptions, and the transport its own
        raise TensLoRAError(
            f"project {report.project}: Weights & Biases did not take the report ({' '.join(str(error).split())}); "
            f"--dry-run prints it without the service"
        ) from error


if __name__ == "__main__":
    main()
