"""A table, its comparison with LoRA and its verdicts as CSV, to compute with, and the way back to its runs."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.files import require_file
from tenslora.harness.data.text_files import require_separator
from tenslora.harness.results.paper import Verdict
from tenslora.harness.results.summary import Summary, one_line
from tenslora.harness.results.table import Column, Row, Run
from tenslora.harness.run_folder import RunFolder

_PLACE = ("dataset", "model", "tensor_mode", "rank_strategy", "variant")

_NUMBERS = (
    "seeds", "mean", "low", "high", "p", "holm_p", "permutation_p", "smallest_permutation_p", "detectable", "above",
)  # fmt: skip


_READ = (*_PLACE, "seed", "digest", "status", "ranks", "adapter_parameters", "lora_parameters", "problem")
"""The columns of a table that are read back."""

_WHOLE = ("seed", "adapter_parameters", "lora_parameters")
"""Those that hold whole numbers. pandas writes them as 4.0 if one of a column is missing."""


def to_csv(summary: Summary) -> str:
    """The table as CSV: one line per run, also for runs without a score, sorted by column, row and seed.

    The content does not depend on when or where the runs were carried out. Scores are fractions at full precision, as
    in the record, and empty for a run that is not completed. A table of the best scores says so in a column `score`.

    Args:
        summary: the summary of the table.
    """
    metrics = {column.column: column.metric for column in summary.columns}
    lines = [_line(run, metrics[run.column]) for run in summary.runs]
    if tuning := summary.table.tuning:
        for line, run in zip(lines, summary.runs, strict=True):
            value = tuning.value(run.row, run.column)
            line["tuned"] = f"{tuning.setting}={value}" if value else ""
            line["at_edge"] = (run.row, run.column) in tuning.at_edge
    elif any(run.tuned for run in summary.runs):
        for line, run in zip(lines, summary.runs, strict=True):
            line |= {"tuned": run.tuned, "at_edge": run.at_edge}
    if summary.table.score != "last":
        for line in lines:
            line["score"] = summary.table.score
    return _csv(list(lines[0]) if lines else [], lines)


def comparison_to_csv(summary: Summary) -> str:
    """The comparison with LoRA as CSV: one line per row and column that is compared.

    The numbers are those of `statistics.Difference` by their names, in the metric's unit: in points for an accuracy.

    Args:
        summary: the summary of the table.
    """
    lines = []
    for against in summary.comparisons:
        row, column = against.row, against.column
        place = (column.dataset, column.model, row.tensor_mode, row.strategy, ";".join(row.variant))
        numbers = [getattr(against.difference, name, None) for name in _NUMBERS]
        lines.append(dict(zip((*_PLACE, *_NUMBERS), (*place, *numbers), strict=True)))
    return _csv([*_PLACE, *_NUMBERS], lines)


def claims_to_csv(summary: Summary) -> str:
    """The verdicts on the paper's claims as CSV: one line per claim and protocol.

    Args:
        summary: the summary of the table.
    """
    names = [field.name for field in fields(Verdict)]
    return _csv(names, [dict(zip(names, astuple(verdict), strict=True)) for verdict in summary.verdicts])


def read_runs(folder: Path) -> list[Run]:
    """Read a table back: its runs from table.csv, and their records from the runs' folders.

    A run that was missing when the table was written, and is finished now, has its record.

    Args:
        folder: the folder of the table, which is outputs/tables/<name>; the runs' folders are below outputs.

    Returns:
        The runs, in the order of table.csv.

    Raises:
        TensLoRAError: if there is no table, if it has another form, if the record of a finished run is gone, or if a
            line is not of the run whose digest it has.
    """
    file = folder / "table.csv"
    try:
        require_file(file)
        require_separator(file, ",")
        lines = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, csv.Error) as error:
        raise TensLoRAError(f"{folder}: must be the folder of a table, with its table.csv ({error})") from error
    if not lines:
        raise TensLoRAError(f"{file}: holds no runs")
    for number, line in enumerate(lines, start=1):
        if None in line or None in line.values():  # csv's mark of a cell that is too much, and of one that is missing
            raise TensLoRAError(f"{file}: run {number} has not as many cells as the first line names")
    if lacking := [name for name in _READ if name not in lines[0]]:
        raise TensLoRAError(
            f"{file}: not a table that this version can read (its first line must name the columns, {lacking[0]} among "
            f"them)"
        )
    # A link may lead to the folder of the table, or be that folder or one above it.
    places = dict.fromkeys(path.parent.parent for path in (Path(os.path.abspath(folder)), folder.absolute().resolve()))
    folders = {
        (path.parent.parent.name, path.parent.name, path.name.rpartition("-")[2]): path
        for outputs in places
        for path in outputs.glob("*/*/*-*")
        if path.is_dir()  # a Mac leaves a file beside each folder that it copies
    }
    try:
        return [_read_run(line, folders, file) for line in lines]
    except TensLoRAError:  # a ValueError too, of a run whose record is gone
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise TensLoRAError(f"{file}: not a table that this version can read ({error!r})") from error


def _read_run(line: dict[str, str], folders: Mapping[tuple[str, str, str], Path], file: Path) -> Run:
    line |= {name: re.sub(r"\.0+$", "", line[name]) for name in _WHOLE}
    row = Row(line["tensor_mode"], line["rank_strategy"], tuple(filter(None, line["variant"].split(";"))))
    column, digest = Column(line["dataset"], line["model"]), line["digest"]
    place = f"{row.label}, {column.label}, seed {line['seed']}"
    if not re.fullmatch("[0-9a-f]{12}", digest):  # a spreadsheet takes 123456e78901 for a number
        raise TensLoRAError(f"{file}: {place}: digest={digest}: must be 12 hexadecimal digits, as the sweep wrote them")
    folder = folders.get((column.dataset, column.model, digest))
    record = RunFolder(folder).finished_record(digest) if folder else None
    if record is None and line["status"] == "completed":
        if folder and RunFolder(folder).record_of(digest):
            raise TensLoRAError(
                f"{file}: {place}: has diverged since the table was written; let the sweep write it again"
            )
        outputs = Path(os.path.abspath(file)).parents[2]
        raise TensLoRAError(f"{file}: {place}: its result.json ({digest}) is gone; it was looked for below {outputs}")
    for name in ("dataset", "model", "tensor_mode", "rank_strategy", "seed"):
        # LoRA and the reference rows have no strategy.
        if record and line[name] != str(record[name]) and (line[name] or name != "rank_strategy"):
            raise TensLoRAError(f"{file}: {place}: {name}={line[name]}: the run's is {record[name]}")
    for word in row.variant:
        setting, _, value = word.partition("=")
        if (own := _number(_setting(record and record["config"], setting))) is not None and _number(value) not in (
            own,
            None,
        ):
            raise TensLoRAError(f"{file}: {place}: {word}: the run's is {own:g}")
    if (at_edge := (line.get("at_edge") or "").lower()) not in ("", "true", "false"):
        raise ValueError(f"at_edge={line['at_edge']}")
    if (shown := line.get("score") or "last") not in ("last", "best"):
        raise ValueError(f"score={shown}")
    step = float(line.get("relative_first_step") or 0)  # tables of earlier versions do not have it
    if not math.isfinite(step) or step < 0:
        raise ValueError(f"relative_first_step={step}")
    return Run(
        row,
        column,
        int(line["seed"]),
        digest,
        ranks=tuple(tuple(map(int, stage.split())) for stage in filter(None, line["ranks"].split(";"))) or None,
        parameters=int(line["adapter_parameters"]) if line["adapter_parameters"] else None,
        lora_parameters=int(line["lora_parameters"]) if line["lora_parameters"] else None,
        record=record,
        problem="" if record else line["problem"] or line["status"],
        folder=folder,
        relative_step=step or None,
        tuned=line.get("tuned") or "",
        at_edge=at_edge == "true",  # a spreadsheet writes it in capitals
        shown=shown,
    )


def _setting(config: Any, setting: str) -> Any:
    """A setting's value in a record; None for one that is not there."""
    for name in setting.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _number(value: Any) -> float | None:
    """The number that a value is or spells; None for any other."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _csv(heads: list[str], lines: list[dict[str, Any]]) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return content.getvalue()


def _line(run: Run, metric: str | None) -> dict[str, Any]:
    record: dict[str, Any] = run.record or {}
    history: list[dict[str, Any]] = record.get("metrics", {}).get("history", [])
    size = run.size
    return {
        "dataset": run.column.dataset,
        "model": run.column.model,
        "tensor_mode": run.row.tensor_mode,
        "rank_strategy": run.row.strategy,
        "variant": ";".join(run.row.variant),
        "seed": run.seed,
        "digest": run.digest,
        "status": run.status,
        "metric": metric,
        "last": run.metrics.get("last"),
        "best": run.metrics.get("best"),
        "best_epoch": run.metrics.get("best_epoch"),
        "epochs": (history[-1]["epoch"] if history else 0) if record else None,
        "steps": (history[-1]["step"] if history else 0) if record else None,
        "ranks": "; ".join(" ".join(map(str, stage)) for stage in size.ranks) if size.ranks else None,
        "adapter_parameters": size.parameters,
        "lora_parameters": size.lora_parameters,
        "percent_of_lora": size.percent_of_lora,
        "first_step": record.get("first_step"),
        "lora_first_step": record.get("lora_first_step"),
        "relative_first_step": size.relative_step,
        "head_parameters": record.get("head_parameters"),
        "train_examples": record.get("train_examples"),
        "test_examples": record.get("test_examples"),
        "validation_examples": record.get("validation_examples"),
        "scored_on": run.scored_on,
        "problem": one_line(run.problem),
    }
