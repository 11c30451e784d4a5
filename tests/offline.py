"""What W&B's offline files hold, as W&B's own reader tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tenslora.harness.config import LoggerConfig
from tenslora.harness.results.table import Column, Row, Run, Table
from tenslora.harness.tracking import track_table
from tests.running import SHORT, run

OFFLINE = LoggerConfig(wandb=True, mode="offline", project="p")


@dataclass(frozen=True)
class OfflineRun:
    """A W&B run as its offline files have it.

    Args:
        folder: of its files.
        started: what it was started with.
        history: what each step logged.
        summary: its last values.
        artifacts: the names of its artifacts' files, by the artifact's type.
        exit_code: 0 for a run that has succeeded.
    """

    folder: Path
    started: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    artifacts: dict[str, list[str]]
    exit_code: int

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.started["config"]["update"]
        return config

    def config_value(self, name: str) -> Any:
        """The value at a dotted name, in which W&B's own reports write "value" after the first key."""
        value: Any = self.config
        for key in name.split("."):
            value = value if key == "value" else value[key]
        return value


@dataclass(frozen=True)
class Tracked:
    """A run as recorded and as W&B holds it, and a table that has it among its runs as W&B holds it."""

    result: dict[str, Any]
    run: OfflineRun
    table: OfflineRun


def hide_wandb_keys(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make W&B find no key, as on a machine where no one has ever logged in, and keep its own files below `folder`."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        patch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        patch.setenv(name, str(folder / name))


def read_offline_run(folder: Path) -> OfflineRun:
    """Read the only offline run below `folder` by `wandb leet inspect`, which waits for its end."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--follow", "--idle-timeout", "60s"]
    printed = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
    records: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, printed.splitlines()):
        records.setdefault(record["type"], []).append(record[record["type"]])
    summary: dict[str, Any] = {}
    for record in records["summary"]:
        summary.update(record["update"])
    return OfflineRun(
        folder=file.parent,
        started=records["run"][0],
        history=[record["item"] for record in records.get("history", [])],
        summary=summary,
        artifacts={
            record["type"]: [entry["path"] for entry in record["manifest"]["contents"]]
            for record in records.get("artifact", [])
        },
        exit_code=records["exit"][0]["exit_code"],
    )


def track_run_and_table(folder: Path) -> Tracked:
    """Train a short run with W&B, and upload a table of it, its second seed, a failed run, and LoRA on two seeds."""
    result = run(
        folder / "run", *SHORT, "tensor_mode=qkv", "rank_strategy=isorank", "logger=wandb",
        "logger.project=p", "logger.group=g", "logger.tags=[mine,digits,mine]",
    )  # fmt: skip
    column = Column("digits", "vit_digits")

    def completed(row: Row, seed: int, last: float) -> Run:
        metrics = {"name": "accuracy", "last": last, "best": last, "history": []}
        record = {"ranks": [4], "adapter_parameters": 500, "lora_parameters": 1000, "metrics": metrics}
        return Run(row, column, seed, f"{row.label}{seed}", record=record, problem="")

    lora, qkv, alpha = Row("lora"), Row("qkv", "isorank"), Row("qkv", "isorank", ("adapter.alpha=1",))
    runs = (
        completed(lora, 0, 0.5),
        completed(lora, 1, 0.6),
        Run(qkv, column, 0, result["digest"], record=result, problem=""),
        completed(qkv, 1, 0.7),
        Run(alpha, column, 0, "x", problem="out of memory"),
    )
    files = [folder / name for name in ("table.csv", "scores.png", "against.png", "report.html")]
    for file in files:
        if file.suffix == ".png":
            Image.new("RGB", (8, 8)).save(file)
        else:
            file.write_text(f"<p>{file.name}</p>")
    track_table(OFFLINE, folder, Table("isorank", "Title", runs), files)
    return Tracked(result, read_offline_run(folder / "run"), read_offline_run(folder))
