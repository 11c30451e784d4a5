"""Weights & Biases, or nothing."""

from __future__ import annotations

import netrc
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from tenslora.errors import TensLoRAError
from tenslora.harness.config import LoggerConfig, RunConfig
from tenslora.harness.results.cells import adapter_of, ordered_runs, status
from tenslora.harness.results.statistics import paired_difference
from tenslora.harness.results.table import Row, Run, Table, mean_and_deviation

if TYPE_CHECKING:
    import wandb

SCORE = "score"
"""What the headline metric is logged as beside its own name, so that one chart holds every dataset."""

TRAIN, TABLE = "train", "table"
"""What a W&B run in a sweep's group is: one of its jobs, or the finished table."""


class Tracker:
    """What watches a run; this one watches nothing. A context, so that it learns of a run that broke off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def epoch(self, entry: dict[str, Any]) -> None:
        """Take note of one epoch's entry of the history."""

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        """Take note of the finished record, and of the files with the trained weights."""

    def abandon(self) -> None:
        """The run broke off and will leave no record."""


class WandbTracker(Tracker):
    """One W&B run of job type train, its files in `folder`.

    Its config holds the resolved settings and the run's facts, `row` (construction and strategy, as in the run's
    folder) and `percent_of_lora`. Logs every metric of every epoch under its own name, the headline metric as `score`
    too, with the optimizer step as the x axis, and the trained weights (adapter and head) as one artifact of type
    model.
    """

    def __init__(self, run: RunConfig, folder: Path, facts: dict[str, Any]) -> None:
        row = _hyphenated(Row(run.tensor_mode, run.row_strategy))
        share = 100 * facts["adapter_parameters"] / facts["lora_parameters"]
        self._headline: str = run.dataset.metrics[0]
        self._run = _start(
            run.logger,
            folder,
            name=f"{facts['dataset']}-{facts['model']}-{row}-seed{facts['seed']}",
            job_type=TRAIN,
            settings={**facts, **run.settings(), "row": row, "percent_of_lora": share},
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def epoch(self, entry: dict[str, Any]) -> None:
        self._run.log({**entry, SCORE: entry[self._headline]})

    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        metrics = {key: record["metrics"][key] for key in ("last", "best", "best_epoch")}
        cost = {key: record[key] for key in ("seconds", "steps_per_second", "peak_memory_bytes")}
        self._run.summary.update({**metrics, **cost, "status": record["status"]})
        if files:
            _upload(self._run, f"adapter-{record['digest']}", "model", files, {"ranks": record["ranks"]})
        self._run.finish(exit_code=0 if record["status"] == "completed" else 1)

    def abandon(self) -> None:
        self._run.finish(exit_code=1)


def start_tracker(run: RunConfig, folder: Path, facts: dict[str, Any], watch: bool = True) -> Tracker:
    """The tracker that a logger config asks for; W&B is imported only for it.

    run: its settings. facts: names and parameter counts of the run. watch: false on all but one
    of the processes that share a run. Raises TensLoRAError if W&B refuses the run.
    """
    if not watch or not _is_wanted(run.logger):
        return Tracker()
    return WandbTracker(run, folder, facts)


def track_table(config: LoggerConfig, folder: Path, table: Table, files: list[Path]) -> None:
    """Upload a finished table as one W&B run of job type table, its files in `folder`; nothing without W&B.

    It is in the group of the table's runs (the table's name, unless config has another). `results` is a W&B Table
    with one line per row and column, `runs` one with a line per run; scores in both are fractions, as runs log them.
    PNG files among `files` become the images `figures`, an HTML file `report`, and all of them one artifact of type
    table. Raises TensLoRAError if W&B refuses the run.
    """
    if not _is_wanted(config):
        return
    config = replace(config, group=config.group or table.name, tags=(*config.tags, table.name))
    facts = {"table": {"name": table.name, "title": table.title, "score": table.score, "notes": list(table.notes)}}
    with _start(config, folder, name=table.name, job_type=TABLE, settings=facts) as run:
        import wandb

        content: dict[str, Any] = {}
        for name, lines in (("results", _result_lines(table)), ("runs", _run_lines(table))):
            data = [list(line.values()) for line in lines]
            content[name] = wandb.Table(columns=list(lines[0]), data=data)
        figures = [wandb.Image(str(file), caption=file.stem) for file in files if file.suffix == ".png"]
        if figures:
            content["figures"] = figures
        for file in files:
            if file.suffix == ".html":
                content["report"] = wandb.Html(file.read_text(), inject=False)
        run.log(content)
        if files:
            _upload(run, f"table-{table.name}", "table", files, {})


def _is_wanted(config: LoggerConfig) -> bool:
    return config.name != "none" and config.mode != "disabled"


def _start(config: LoggerConfig, folder: Path, name: str, job_type: str, settings: dict[str, Any]) -> wandb.Run:
    import wandb
    from pydantic import ValidationError

    mode = config.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb.setup().settings.base_url) else "offline")
    try:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(dict.fromkeys(config.tags)),
            name=name,
            job_type=job_type,
            config=settings,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True),
            reinit="finish_previous",
        )
    except ValidationError as error:  # a tag that is too long, and the like
        found = error.errors()[0]
        setting = str(found["loc"][0]).removeprefix("run_")
        raise TensLoRAError(f"logger.{setting}: {found['msg'].removeprefix('Value error, ')}") from error
    except wandb.errors.UsageError as error:
        raise TensLoRAError(f"logger: Weights & Biases takes no such run ({' '.join(str(error).split())})") from error
    except wandb.errors.Error as error:
        raise TensLoRAError(
            f"logger.mode={mode}: Weights & Biases refused the run ({' '.join(str(error).split())}); "
            f"logger.mode=offline needs no service, and `wandb sync` uploads later"
        ) from error


def _upload(run: wandb.Run, name: str, kind: str, files: list[Path], metadata: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata=metadata)
    for file in files:
        artifact.add_file(str(file))
    run.log_artifact(artifact)


def _result_lines(table: Table) -> list[dict[str, Any]]:
    lines = []
    for row in table.rows:
        reference = table.reference(row)
        for column in table.columns:
            runs = table.cell(row, column)
            if not runs:
                continue
            scores = table.scores(row, column)
            mean, deviation = mean_and_deviation(scores.values()) if scores else (None, None)
            against = paired_difference(scores, table.scores(reference, column)) if reference else None
            lines.append(
                {
                    **_place(runs[0]),
                    "metric": table.metric(column),
                    "mean": mean,
                    "sd": deviation,
                    "seeds": len(scores),
                    "difference": against and against.mean,
                    "low": against and against.low,
                    "high": against and against.high,
                    "p": against and against.p,
                    "problems": "; ".join(table.problems(row, column)),
                }
            )
    return lines


def _run_lines(table: Table) -> list[dict[str, Any]]:
    lines = []
    for run in ordered_runs(table):
        metrics = run.record["metrics"] if run.record and not run.problem else {}
        lines.append(
            {
                **_place(run),
                "seed": run.seed,
                "digest": run.digest,
                "status": status(run),
                "metric": table.metric(run.column),
                "last": metrics.get("last"),
                "best": metrics.get("best"),
                "problem": run.problem,
            }
        )
    return lines


def _place(run: Run) -> dict[str, Any]:
    # Under the names of the runs' own configs, where those have them.
    ranks, parameters, lora = adapter_of(run)
    return {
        "row": _hyphenated(run.row),
        "tensor_mode": run.row.tensor_mode,
        "rank_strategy": run.row.strategy,
        "variant": "; ".join(run.row.variant),
        "dataset": run.column.dataset,
        "model": run.column.model,
        "ranks": ", ".join(map(str, ranks)) if ranks else "",
        "adapter_parameters": parameters,
        "percent_of_lora": 100 * parameters / lora if parameters is not None and lora else None,
    }


def _hyphenated(row: Row) -> str:
    # W&B does not offer values with a space in them for grouping.
    return "-".join(row.label.split())


def _has_key(base_url: str) -> bool:
    # Where W&B itself looks: the environment, then the netrc file under the service's host, which has had two names.
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).hostname in known or "api.wandb.ai" in known
