"""What a record says of a run's scores and circumstances, and a record in a few lines for people."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tenslora.constructions import Geometry
from tenslora.harness.results.table import percent_of_lora
from tenslora.harness.training.metrics import METRICS
from tenslora.ranks import rank_limits

_PACKAGES = (
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


def summarize_history(history: list[dict[str, Any]], metrics: list[str]) -> dict[str, Any]:
    """The scores of a run, as its record holds them under "metrics".

    Args:
        history: one entry per finished epoch, with every metric's score.
        metrics: the names of the metrics, the headline metric first.

    Returns:
        name: of the headline metric; last, best, best_epoch: its scores; others_last: of the other metrics; history.
        Without a finished epoch the scores are None.
    """
    headline = metrics[0]
    better = max if METRICS[headline].larger_is_better else min
    best = better(history, key=lambda entry: entry[headline], default=None)
    return {
        "name": headline,
        "last": history[-1][headline] if history else None,
        "best": best and best[headline],
        "best_epoch": best and best["epoch"],
        "others_last": {name: history[-1][name] for name in metrics[1:]} if history else {},
        "history": history,
    }


def describe_environment() -> dict[str, Any]:
    """What this process runs on: versions, platform, command line, and the code's commit.

    git: the commit, and whether the code has been changed since; None outside a clone.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "platform": platform.platform(), "git": _git(), "argv": sys.argv}


def describe_run(record: dict[str, Any]) -> str:
    """A run in a few lines for people: construction, ranks, parameters, scores."""
    mode, metrics = record["tensor_mode"], record["metrics"]
    lines = [f"{mode} on {record['dataset']} with {record['model']}, seed {record['seed']}: {record['status']}"]
    if record["ranks"]:
        factorization = "tucker" if record["factorization"] == "matrix" else record["factorization"]
        names = rank_limits(mode, Geometry(**record["geometry"]), factorization)
        ranks = ", ".join(f"{name} {rank}" for name, rank in zip(names, record["ranks"], strict=True))
        parameters, lora_parameters = record["adapter_parameters"], record["lora_parameters"]
        percent = percent_of_lora(parameters, lora_parameters)
        lines.append(f"ranks ({record['rank_strategy']}): {ranks}")
        lines.append(f"adapter: {parameters:,} parameters, {percent:.1f} % of LoRA's {lora_parameters:,}")
    lines.append(f"head: {record['head_parameters']:,} parameters; trained in all: {record['trained_parameters']:,}")
    if metrics["last"] is not None:
        others = "".join(f", {name} {value:.4f}" for name, value in metrics["others_last"].items())
        best = f"best {metrics['best']:.4f} (epoch {metrics['best_epoch']})"
        lines.append(f"{metrics['name']}: last {metrics['last']:.4f}, {best}{others}")
    return "\n".join(lines)


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
