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

OFFLINE = LoggerConfig(name="wandb", mode="offline", project="p")


@dataclass(frozen=True)
class Offline:
    """One offline run: what it was started with, each step's metrics, the summary, and files by artifact type."""

    folder: Path
    started: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    artifacts: dict[str, list[str]]
    exit_code: int

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.started["config"]["update"]
        return found


@dataclass(frozen=True)
class Tracked:
    """A run as recorded and as W&B holds it, and a table that has it among its runs."""

    result: dict[str, Any]
    run: Offline
    table: Offline


def no_wandb_key(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """W&B as on a machine where no one has ever logged in, with its own files below `folder`."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        patch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        patch.setenv(name, str(folder / name))


def read(folder: Path) -> Offline:
    """The one offline run below `folder`, read by `wandb leet inspect`, which waits for its end."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--follow", "--idle-timeout", "60s"]
    printed = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
    records = [(record["type"], record[record["type"]]) for record in map(json.loads, printed.splitlines())]

    def of(kind: str) -> list[dict[str, Any]]:
        return [content for found, content in records if found == kind]

    summary: dict[str, Any] = {}
    for record in of("summary"):
        summary.update(record["update"])
    return Offline(
        folder=file.parent,
        started=of("run")[0],
        history=[record["item"] for record in of("history")],
        summary=summary,
        artifacts={a["type"]: [entry["path"] for entry in a["manifest"]["contents"]] for a in of("artifact")},
        exit_code=of("exit")[0]["exit_code"],
    )


def track(folder: Path) -> Tracked:
    """Carry out a short run and track it, and a table of it, a second seed, and LoRA on two seeds."""
    result = run(
        folder / "run", *SHORT, "tensor_mode=qkv", "rank_strategy=isorank", "logger=wandb",
        "logger.project=p", "logger.group=g", "logger.tags=[mine,digits,mine]",
    )  # fmt: skip
    column = Column("digits", "vit_digits")

    def made(row: Row, seed: int, last: float) -> Run:
        metrics = {"name": "accuracy", "last": last, "best": last, "history": []}
        recorded = {"ranks": [4], "adapter_parameters": 500, "lora_parameters": 1000, "metrics": metrics}
        return Run(row, column, seed, f"{row.label}{seed}", record=recorded, problem="")

    lora, qkv, alpha = Row("lora"), Row("qkv", "isorank"), Row("qkv", "isorank", ("adapter.alpha=1",))
    runs = (
        made(lora, 0, 0.5),
        made(lora, 1, 0.6),
        Run(qkv, column, 0, result["digest"], record=result, problem=""),
        made(qkv, 1, 0.7),
        Run(alpha, column, 0, "x", problem="it burnt"),
    )
    files = [folder / name for name in ("table.csv", "scores.png", "against.png", "report.html")]
    for file in files:
        if file.suffix == ".png":
            Image.new("RGB", (8, 8)).save(file)
        else:
            file.write_text(f"<p>{file.name}</p>")
    track_table(OFFLINE, folder, Table("isorank", "Title", runs), files)
    return Tracked(result, read(folder / "run"), read(folder))
