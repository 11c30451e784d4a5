"""result.json: the one thing that tables are built from."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.files import write_json

SCHEMA = 1
NAME = "result.json"
_VERSIONED = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "hydra-core",
    "numpy",
    "scikit-learn",
)


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write `record` as the folder's result.json, atomically, and return its path.

    Raises TensLoRAError if it cannot be written.
    """
    path = folder / NAME
    write_json(path, {"schema": SCHEMA, **record})
    return path


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a run's folder. Raises TensLoRAError if there is none, or one of another schema."""
    path = folder / NAME
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TensLoRAError(f"{path}: not a readable record ({error})") from error
    if record.get("schema") != SCHEMA:
        raise TensLoRAError(f"{path}: schema {record.get('schema')}, this version reads {SCHEMA}")
    return record


def metrics_of(history: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The scores of a run: name of the headline metric, last (the headline) and best over epochs, and all epochs."""
    headline = names[0]
    best = max(history, key=lambda entry: entry[headline], default=None)
    return {
        "name": headline,
        "last": history[-1][headline] if history else None,
        "best": best and best[headline],
        "best_epoch": best and best["epoch"],
        "others_last": {name: history[-1][name] for name in names[1:]} if history else {},
        "history": history,
    }


def environment() -> dict[str, Any]:
    """What the run ran on: versions, platform, and the commit of the code, with whether it was changed since."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "platform": platform.platform(), "git": _git(), "argv": sys.argv}


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(record: dict[str, Any]) -> str:
    """A few lines for a person: construction, ranks, parameters, scores."""
    mode, metrics = record["tensor_mode"], record["metrics"]
    lines = [f"{mode} on {record['dataset']} with {record['model']}, seed {record['seed']}: {record['status']}"]
    if record["ranks"]:
        from tenslora.constructions import Geometry
        from tenslora.ranks import rank_limits

        tensors = "tucker" if record["factorization"] == "matrix" else record["factorization"]
        names = rank_limits(mode, Geometry(**record["geometry"]), tensors)
        ranks = ", ".join(f"{name} {rank}" for name, rank in zip(names, record["ranks"], strict=True))
        share = 100 * record["adapter_parameters"] / record["lora_parameters"]
        lora = record["lora_parameters"]
        lines.append(f"ranks ({record['rank_strategy']}): {ranks}")
        lines.append(f"adapter: {record['adapter_parameters']:,} parameters, {share:.1f} % of LoRA's {lora:,}")
    lines.append(f"head: {record['head_parameters']:,} parameters; trained in all: {record['trained_parameters']:,}")
    if metrics["last"] is not None:
        others = "".join(f", {name} {value:.4f}" for name, value in metrics["others_last"].items())
        best = f"best {metrics['best']:.4f} (epoch {metrics['best_epoch']})"
        lines.append(f"{metrics['name']}: last {metrics['last']:.4f}, {best}{others}")
    return "\n".join(lines)
