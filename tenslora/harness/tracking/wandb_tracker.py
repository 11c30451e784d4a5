"""Weights & Biases: a run of a sweep, or its finished table, as one W&B run."""

from __future__ import annotations

import logging
import netrc
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import wandb
from pydantic import ValidationError

from tenslora.errors import TensLoRAError
from tenslora.harness.config import LoggerConfig, RunConfig
from tenslora.harness.results.summary import Summary, one_line, summarize
from tenslora.harness.results.table import Row, Run, Table, multiple_of_lora, percent_of_lora
from tenslora.harness.run_folder import check_writable
from tenslora.harness.stages import ranks_text
from tenslora.harness.tracking.tracker import LONGEST_TAG, SCORE, Tracker

log = logging.getLogger(__name__)

TRAIN, TABLE = "train", "table"
"""The job types of the W&B runs in a sweep's group: one run of the sweep, or the finished table."""


@contextmanager
def _while_wandb_answers() -> Iterator[None]:
    """A context in which W&B's own process is needed. If it has ended, a line says so."""
    try:
        yield
    except (OSError, wandb.errors.Error) as error:
        raise TensLoRAError(
            f"logger: Weights & Biases has broken off ({one_line(str(error))}), as when its process was killed; the "
            f"same command with resume=true goes on, and logger=csv needs no other process"
        ) from error


class WandbTracker(Tracker):
    """Reports a run as one W&B run of job type train.

    The W&B run's config holds the settings and the facts of the run, `row` (construction and strategy as one word),
    `percent_of_lora` and `relative_first_step`, which is a multiple of LoRA's. Every metric of every epoch is logged
    under its own name, and the headline metric also as `score`, with the optimizer step as the x axis. The trained
    weights become one artifact of type model.

    Args:
        run: the settings.
        folder: the run's folder, in which W&B writes its files.
        facts: names, ranks and parameter counts of the run.

    Raises:
        TensLoRAError: if W&B refuses the run.
    """

    def __init__(self, run: RunConfig, folder: Path, facts: dict[str, Any]) -> None:
        row = _one_word(Row(run.tensor_mode, run.row_strategy))
        percent = percent_of_lora(facts["adapter_parameters"], facts["lora_parameters"])
        step = multiple_of_lora(facts.get("first_step"), facts.get("lora_first_step"))
        self._headline = facts["scores"][0]
        self._wandb_run = _start(
            run.logger,
            folder,
            name=f"{run.dataset.name}-{run.model.name}-{row}-seed{run.seed}",
            job_type=TRAIN,
            config={**facts, **run.settings(), "row": row, "percent_of_lora": percent, "relative_first_step": step},
        )
        if how := _offline(self._wandb_run):
            log.info("%s; to upload the run: wandb sync %s", how, shlex.quote(str(Path(self._wandb_run.dir).parent)))
        try:
            with _while_wandb_answers():
                self._wandb_run.define_metric("step")
                self._wandb_run.define_metric("*", step_metric="step")
        except BaseException:
            self.abandon()
            raise

    def epoch(self, entry: dict[str, Any]) -> None:
        with _while_wandb_answers():
            self._wandb_run.log({**entry, SCORE: entry[self._headline]})

    @_while_wandb_answers()
    def finish(self, record: dict[str, Any], files: list[Path]) -> None:
        scores = {key: record["metrics"][key] for key in ("last", "best", "best_epoch")}
        cost = {key: record[key] for key in ("seconds", "steps_per_second", "peak_memory_bytes")}
        self._wandb_run.summary.update({**scores, **cost, "status": record["status"]})
        if files:
            _upload(self._wandb_run, f"adapter-{record['digest']}", "model", files, {"ranks": record["ranks"]})
        self._wandb_run.finish(exit_code=0 if record["status"] == "completed" else 1)

    def abandon(self) -> None:
        with suppress(OSError, wandb.errors.Error):  # what ended the run may be that W&B's process has gone
            self._wandb_run.finish(exit_code=1)


def upload_table(config: LoggerConfig, folder: Path, table: Table, files: list[Path]) -> str:
    """Report a finished table as one W&B run of job type table.

    The W&B run is in the group of the table's runs, which is the table's name unless the settings name another group.
    It logs a W&B Table `results` with a line for each row and column, and a W&B Table `runs` with a line for each run.
    A tuned table has its chosen values in `results`, and a W&B Table `trials` with a line for each value of a row.
    Scores in all of them are fractions, as runs log them. PNG files become the images `figures`, an HTML file becomes
    `report`, and all files together become one artifact of type table.

    Args:
        config: the logger's settings.
        folder: the folder in which W&B writes its files.
        table: the table.
        files: the table's files.

    Returns:
        Why the table is not uploaded, if W&B is offline; otherwise "".

    Raises:
        TensLoRAError: if W&B refuses the run.
    """
    summary = summarize(table)
    config = replace(config, group=config.group or table.name, tags=(*config.tags, table.name[:LONGEST_TAG]))
    about = {"table": {"name": table.name, "title": table.title, "score": table.score, "notes": list(table.notes)}}
    with _start(config, folder, name=table.name, job_type=TABLE, config=about) as wandb_run:
        content: dict[str, Any] = {}
        tables = {"results": _result_lines(summary), "runs": _run_lines(summary)}
        if summary.trials and summary.trials.runs:
            tables["trials"] = _result_lines(summary.trials)
        for name, lines in tables.items():
            data = [list(line.values()) for line in lines]
            content[name] = wandb.Table(columns=list(lines[0]), data=data)
        figures = [wandb.Image(str(file), caption=file.stem) for file in files if file.suffix == ".png"]
        if figures:
            content["figures"] = figures
        for file in files:
            if file.suffix == ".html":
                content["report"] = wandb.Html(file.read_text(encoding="utf-8"), inject=False)
        with _keeping_copies():
            wandb_run.log(content)
        if files:
            _upload(wandb_run, f"table-{table.name}", "table", files, {})
        return _offline(wandb_run)


def _start(logger: LoggerConfig, folder: Path, name: str, job_type: str, config: dict[str, Any]) -> wandb.Run:
    mode = logger.mode
    if "HOME" not in os.environ:  # W&B's other process knows of no home then, and prints its log
        os.environ.setdefault("WANDB_CACHE_DIR", str(wandb.env.get_cache_dir()))
    try:
        has_key = _has_key(wandb.setup().settings.base_url)
        if mode == "auto":
            own = wandb.setup().settings.mode  # `wandb offline` and `wandb disabled` leave one
            mode = os.environ.get("WANDB_MODE") or (own if own != "online" else "online" if has_key else "offline")
        if mode != "disabled":
            try:  # W&B looks at it when the run has trained
                check_writable(Path(wandb.env.get_data_dir()))
            except TensLoRAError as error:
                raise TensLoRAError(f"WANDB_DATA_DIR={error}") from error
        return wandb.init(
            project=logger.project,
            entity=logger.entity,
            group=logger.group,
            tags=list(dict.fromkeys(logger.tags)),
            name=name,
            job_type=job_type,
            config=config,
            dir=str(folder),
            mode=cast(Any, mode),  # one of W&B's own names
            settings=wandb.Settings(silent=True),
            reinit="create_new",  # a program may have a run of its own open
        )
    except ValidationError as error:  # such as a tag that is too long, or a mode that does not exist
        first = error.errors()[0]
        setting = str(first["loc"][0]).removeprefix("run_")
        given = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        refused = first["input"]
        # The name of a variable is not always that of the setting: WANDB_HTTP_TIMEOUT is x_graphql_timeout_seconds.
        variables = sorted(
            (name for name in given if refused in (given[name], given[name].split(","))),
            key=f"WANDB_{setting.upper()}".__ne__,
        )
        place = f"{variables[0]}={given[variables[0]]}" if variables else f"logger.{setting}"
        raise TensLoRAError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error
    except OSError as error:
        raise TensLoRAError(
            f"logger: Weights & Biases cannot write {error.filename or folder} ({error.strerror})"
        ) from error
    except (TypeError, AttributeError, KeyError) as error:  # of W&B's own code, at a file that is not as it writes it
        raise TensLoRAError(
            f"logger: Weights & Biases cannot use its own settings ({one_line(str(error))}); look at "
            f"config-defaults.yaml in {Path.cwd()}, and at the variables WANDB_..."
        ) from error
    except wandb.errors.UsageError as error:
        run_id = os.environ.get("WANDB_RUN_ID")
        place = f"WANDB_RUN_ID={run_id}" if run_id and "Run ID" in str(error) else "logger"
        raise TensLoRAError(f"{place}: Weights & Biases does not accept the run ({one_line(str(error))})") from error
    except wandb.errors.Error as error:
        raise TensLoRAError(
            f"logger.mode={mode}: Weights & Biases refused the run ({one_line(str(error))}); "
            f"logger.mode=offline needs no service, and `wandb sync` uploads later"
        ) from error
    except Exception as error:
        service = os.environ.get("WANDB_SERVICE")  # which a program that uses W&B leaves to those it starts
        if isinstance(error, TensLoRAError) or not service or "service" not in str(error).lower():
            raise
        raise TensLoRAError(
            f"WANDB_SERVICE={service}: Weights & Biases cannot use it ({one_line(str(error))}); unset it"
        ) from error


def _offline(wandb_run: wandb.Run) -> str:
    """Says that W&B is offline, and why; "" if it is not."""
    if not wandb_run.offline:
        return ""
    has_key = _has_key(wandb.setup().settings.base_url)
    return "Weights & Biases is offline" + (
        "" if has_key else ", because there is no API key (`wandb login` stores one)"
    )


def _upload(wandb_run: wandb.Run, name: str, kind: str, files: list[Path], metadata: dict[str, Any]) -> None:
    artifact = wandb.Artifact(name, type=kind, metadata=metadata)
    with _keeping_copies():
        for file in files:
            artifact.add_file(str(file))
        wandb_run.log_artifact(artifact)


@contextmanager
def _keeping_copies() -> Iterator[None]:
    # W&B's own error names the file that was to be copied, and not the folder that has no space.
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(str(error))
        raise TensLoRAError(
            f"logger: Weights & Biases cannot keep copies of files ({reason}); WANDB_DATA_DIR says where"
        ) from error


def _result_lines(summary: Summary) -> list[dict[str, Any]]:
    """A line per row and column."""
    lines = []
    for row in summary.rows:
        for column, cell in zip(summary.columns, row.cells, strict=True):
            if not cell.runs:
                continue
            difference = cell.difference
            lines.append(
                {
                    **_place(cell.runs[0]),
                    "metric": column.metric,
                    "mean": _fraction(cell.mean),
                    "sd": _fraction(cell.deviation),
                    "seeds": len(cell.scores),
                    "difference": _fraction(difference.mean if difference else None),
                    "low": _fraction(difference.low if difference else None),
                    "high": _fraction(difference.high if difference else None),
                    "p": difference.p if difference else None,
                    "holm_p": difference.holm_p if difference else None,
                    "permutation_p": difference.permutation_p if difference else None,
                    "detectable": _fraction(difference.detectable if difference else None),
                    "problems": "; ".join(cell.problems),
                    **({column.tuned: cell.tuned} if column.tuned else {}),
                }
            )
    return lines


def _run_lines(summary: Summary) -> list[dict[str, Any]]:
    """A line per run."""
    metrics = {column.column: column.metric for column in summary.columns}
    return [
        {
            **_place(run),
            "seed": run.seed,
            "digest": run.digest,
            "status": run.status,
            "metric": metrics[run.column],
            "last": run.metrics.get("last"),
            "best": run.metrics.get("best"),
            "problem": run.problem,
        }
        for run in summary.runs
    ]


def _place(run: Run) -> dict[str, Any]:
    """The run's row, column and size, under the names that they have in the configs of W&B runs."""
    return {
        "row": _one_word(run.row),
        "tensor_mode": run.row.tensor_mode,
        "rank_strategy": run.row.strategy,
        "variant": "; ".join(run.row.variant),
        "dataset": run.column.dataset,
        "model": run.column.model,
        "ranks": ranks_text(run.size.ranks or ()),
        "adapter_parameters": run.size.parameters,
        "percent_of_lora": run.size.percent_of_lora,
        "relative_first_step": run.size.relative_step,
    }


def _one_word(row: Row) -> str:
    """The row's label without spaces: W&B does not group by values with a space in them."""
    return "-".join(row.label.split())


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _has_key(base_url: str) -> bool:
    """Whether W&B will find a key for its service: in the environment or the netrc file.

    In the netrc file, W&B looks for the host of the service and for api.wandb.ai.

    Raises:
        TensLoRAError: if the netrc file is not text.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except UnicodeDecodeError as error:  # W&B's own HTTP library would end in this error
        raise TensLoRAError(
            f"{os.environ.get('NETRC', '~/.netrc')}: must be text in UTF-8, to be read by W&B"
        ) from error
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).hostname in hosts or "api.wandb.ai" in hosts
