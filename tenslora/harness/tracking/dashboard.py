"""Builds a W&B report that compares the runs of sweeps.

    python -m tenslora.harness.tracking.dashboard --project tenslora

The report shows scores over steps, last scores and parameters, by dataset and grouped by construction and strategy, and
the finished tables. It also shows runs that finish later, so it has to be built only once.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.tracking.dashboard")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tenslora.errors import TensLoRAError
from tenslora.harness.commands import command_parser, mistakes_in_one_line
from tenslora.harness.config import RunConfig
from tenslora.harness.config.checks import (
    FolderName,
    in_one_line,
    names_of_settings,
    no_such_setting,
    require_plain_values,
)
from tenslora.harness.config.schema import GroupName, ProjectName
from tenslora.harness.results.paper import paper
from tenslora.harness.results.summary import one_line
from tenslora.harness.tracking.tracker import SCORE
from tenslora.harness.tracking.wandb_tracker import TABLE, TRAIN

_MOST_ROWS = 100  # in a panel; W&B's own limit is ten
_UNSET: tuple[Any, ...] = (None, "", [], {}, (None, None))


def build_report(
    project: str, entity: str, groups: Sequence[str], datasets: Sequence[str], by: Sequence[str] = ()
) -> Any:
    """Build the comparison without contacting W&B.

    Args:
        project: the W&B project of the runs.
        entity: the user or team that owns the project; empty for the owner of the API key.
        groups: the W&B groups of the runs to compare; empty for all runs of the project.
        datasets: the names of the datasets, each of which gets a section.
        by: settings that tell rows apart beside construction and strategy, such as adapter.alpha.

    Returns:
        A `wandb_workspaces.reports.v2.Report` that is not saved yet.

    Raises:
        TensLoRAError: if wandb_workspaces is not installed.
    """
    try:  # by name, because it is optional and does not declare its exports to type checkers
        wr = import_module("wandb_workspaces.reports.v2")
        ws = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise TensLoRAError(f"{error}; to install it: pip install -e '.[dashboard]'") from error

    def runs_of(job_type: str, *further: Any) -> Any:
        of_groups = [ws.Metric("Group").isin(list(groups))] if groups else []
        return ws.And(ws.Metric("JobType") == job_type, *of_groups, *further)

    def trained_on(dataset: str, groupby: list[str]) -> Any:
        # A failed attempt is left out, because the run that repeats it counts already. W&B stores a setting's value
        # under "value", which a filter has to spell out.
        not_failed = ws.Metric("State").isin(["finished", "running"])
        return wr.Runset(
            name=dataset,
            filters=runs_of(TRAIN, ws.Config("dataset.value.name") == dataset, not_failed),
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
        return {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_runs_to_show": _MOST_ROWS, **panel}

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
                            title="last score",
                            metrics=[SCORE],
                            max_bars_to_show=_MOST_ROWS,
                            layout=wr.Layout(w=12, h=12),
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
    """Turn a report, or a part of a report, into plain data for ``--dry-run``.

    Args:
        part: a report, a part of a report, a list of parts, or a value.

    Returns:
        For a part, the name of its class as "type", and every attribute that is set.
    """
    if dataclasses.is_dataclass(part):
        names = [field.name for field in dataclasses.fields(part) if not field.name.startswith("_")]
        values = {name: value for name in names if (value := getattr(part, name)) not in _UNSET}
        return {"type": type(part).__name__, **{name: specification(value) for name, value in values.items()}}
    if isinstance(part, list | tuple):
        return [specification(item) for item in part]
    return part


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake, or an error of W&B, ends the process with status 1 and one line."""
    parser = command_parser("tenslora.harness.tracking.dashboard", __doc__)
    parser.add_argument("--project", required=True, help="the runs' W&B project (logger.project)")
    parser.add_argument("--entity", help="the user or team that owns the project; default: the API key's")
    parser.add_argument("--group", nargs="+", default=[], help="groups to compare; a sweep's is its table's name")
    parser.add_argument("--dataset", nargs="+", default=paper()["datasets"], help="default: the paper's four")
    parser.add_argument("--by", nargs="+", default=[], help="settings that tell rows apart, such as adapter.alpha")
    parser.add_argument("--dry-run", action="store_true", help="print the report's specification and send nothing")
    given = parser.parse_args(arguments)
    with mistakes_in_one_line():
        _check(given)
        report = build_report(given.project, given.entity or "", given.group, given.dataset, given.by)
        if given.dry_run:
            print(json.dumps(specification(report), indent=2))
        else:
            print(_save(report))


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options that name something, each with the type of the setting that it stands for."""

    project: ProjectName
    entity: ProjectName | None
    group: tuple[GroupName, ...]
    dataset: tuple[FolderName, ...]
    by: tuple[str, ...]


def _check(given: argparse.Namespace) -> None:
    options = {field.name: getattr(given, field.name) for field in dataclasses.fields(_Options)}
    try:
        require_plain_values(options, ())
        TypeAdapter(_Options).validate_python(options)
    except ValidationError as error:
        raise TensLoRAError(f"--{in_one_line(error, _Options)}") from error
    except TensLoRAError as error:
        raise TensLoRAError(f"--{error}") from error
    settings = names_of_settings(RunConfig)
    for name in given.by:  # a setting's own parts, such as tensor_mode.name, are logged too
        if not any(f"{name}.".startswith(f"{setting}.") for setting in settings):
            raise TensLoRAError(f"--by {no_such_setting(name, settings)}")


def _save(report: Any) -> str:
    import wandb

    try:
        report.entity = report.entity or str(wandb.Api().default_entity)
        report.save()
        return str(report.url)
    except Exception as error:  # wandb_workspaces raises bare exceptions, and its transport others
        raise TensLoRAError(
            f"project {report.project}: Weights & Biases did not accept the report ({one_line(str(error))}); "
            f"--dry-run prints it without the service"
        ) from error


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
