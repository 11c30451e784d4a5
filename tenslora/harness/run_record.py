"""The record of a run: the facts known before training, the record after it, and a description for people."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.constructions import Geometry
from tenslora.files import sha256_of
from tenslora.harness.forms import check_score_names
from tenslora.harness.results.table import percent_of_lora
from tenslora.harness.stages import adapter_parameters, as_in_files, lora_first_step_of, lora_parameters, stages_in_file
from tenslora.harness.training.metrics import METRICS, score_names
from tenslora.ranks import rank_limits

if TYPE_CHECKING:
    from torch.nn import Parameter

    from tenslora.harness.adapted_model import AdaptedModel
    from tenslora.harness.config import RunConfig
    from tenslora.harness.data import Dataset
    from tenslora.harness.data.encoding import EncodedDataset
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.training.checkpoint import TrainingState
    from tenslora.harness.training.loop import Diverged
    from tenslora.harness.training.processes import Processes

log = logging.getLogger("train")

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


def facts_of(
    run: RunConfig, dataset: Dataset, data: EncodedDataset, adapted: AdaptedModel, processes: Processes
) -> dict[str, Any]:
    """The facts known before a run trains: names, ranks, exact parameter counts, sizes of the data, the device.

    Args:
        run: the run's settings.
        dataset: the dataset that was loaded.
        data: the same, encoded for the model.
        adapted: the model, ready to train.
        processes: the processes that train.

    Returns:
        The facts, under the names that they have in the record.

    Raises:
        TensLoRAError: for a metric whose name the record uses for something else.
    """
    scores = score_names(data.metrics, dataset.more_tests)
    check_score_names(scores, run.dataset.scored_on)
    model, adapter, warm_start = adapted.model, adapted.adapter, adapted.warm_start
    factorization = None
    if run.adapter:
        factorization = "matrix" if run.tensor_mode == "lora" else run.adapter.factorization
    return {
        "digest": run.digest(),
        "model": run.model.name,
        "dataset": run.dataset.name,
        "tensor_mode": run.tensor_mode,
        "factorization": factorization,
        "rank_strategy": run.rank_strategy.name if adapter else None,
        "ranks": as_in_files(list(stage.ranks) for stage in adapter.stages) if adapter else None,
        "warm_start": asdict(warm_start) if warm_start else None,
        "seed": run.seed,
        "geometry": as_in_files(vars(geometry) for geometry in adapted.geometries),
        "image_input": asdict(data.image_input) if data.image_input else None,
        "adapter_parameters": _count(adapter.parameters()) if adapter else 0,
        "lora_parameters": lora_parameters(adapted.geometries, run.rank_strategy.rank),
        "first_step": adapter.first_step if adapter else None,
        "lora_first_step": abs(run.adapter.alpha) * lora_first_step_of(adapted.geometries, run.rank_strategy.rank)
        if run.adapter
        else None,
        "head_parameters": _count(adapted.head.values()),
        "trained_parameters": _count(p for p in model.parameters() if p.requires_grad),
        "total_parameters": _count(model.parameters()),
        "train_examples": len(dataset.train),
        "scored_on": run.dataset.scored_on,
        "test_examples": len(dataset.scored) if run.dataset.scored_on == "test" else 0,
        "validation_examples": len(dataset.scored) if run.dataset.scored_on == "validation" else 0,
        "more_test_examples": {split: len(examples) for split, examples in dataset.more_tests.items()},
        "data_digest": data.digest_in_any_order(),
        "task": dataset.task,
        "scores": scores,
        "classes": list(dataset.classes),
        "text_columns": list(dataset.text_columns),
        "processes": processes.count,
        "device": processes.name,
    }


def record_of(
    run: RunConfig,
    facts: Mapping[str, Any],
    state: TrainingState,
    failure: Diverged | None,
    seconds: Mapping[str, float],
    processes: Processes,
) -> dict[str, Any]:
    """The record of a run that has trained, for result.json.

    Args:
        run: the run's settings.
        facts: the result of `facts_of`.
        state: how far the run came, with every epoch's scores.
        failure: the error by which the run diverged; None for a completed run.
        seconds: the seconds spent before training, by activity.
        processes: the processes that trained.

    Returns:
        The record, for `RunFolder.write_record`.
    """
    return {
        "status": "diverged" if failure else "completed",
        "failure": {"message": str(failure), "step": failure.step, "lr": failure.rate} if failure else None,
        **facts,
        **_ranks_at_the_end(run, facts, state),
        "metrics": summarize_history(state.history, facts["scores"]),
        "seconds": {**seconds, **state.seconds},
        "steps_per_second": state.steps / state.seconds["train"] if state.steps else None,
        "peak_memory_bytes": processes.peak_memory_bytes(),
        "environment": describe_environment(),
        "identity": run.identity(),
        "config": run.settings(),
    }


def _ranks_at_the_end(run: RunConfig, facts: Mapping[str, Any], state: TrainingState) -> dict[str, Any]:
    # What cutting the ranks changes in a record: it is of the adapter that is saved. The first step stays the start's.
    if state.ranks is None:
        return {}
    if not state.ranks or run.adapter is None:
        return {"ranks_by_epoch": state.ranks}
    ranks = state.ranks[-1]
    geometries = [Geometry(**stage) for stage in stages_in_file(facts["geometry"])]
    count = adapter_parameters(run.adapter, geometries, tuple(stages_in_file(ranks)))
    less = facts["adapter_parameters"] - count
    return {
        "ranks": ranks,
        "ranks_by_epoch": state.ranks,
        "adapter_parameters": count,
        "trained_parameters": facts["trained_parameters"] - less,
        "total_parameters": facts["total_parameters"] - less,
    }


def record_before(run: RunConfig, facts: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """The record of a run that has not taken a step, by which its form can be checked before it trains.

    Args:
        run: the run's settings.
        facts: the result of `facts_of`.
        processes: the processes that are to train.
    """
    from tenslora.harness.training.checkpoint import TrainingState
    from tenslora.harness.training.loop import Diverged

    state = TrainingState()
    return record_of(run, facts, state, Diverged(state, 1, 0.0, "training loss", 0.0), {}, processes)


def write_results(folder: RunFolder, record: dict[str, Any], adapted: AdaptedModel, state: TrainingState) -> list[Path]:
    """Write what a run leaves: of a completed run its weights and predictions, and last its record, which is logged.

    Args:
        folder: the run's folder, from which the results of an earlier run are removed first.
        record: the result of `record_of`. It gets the SHA-256 of the weights.
        adapted: the trained model.
        state: what the training loop returned.

    Returns:
        The files of the weights; empty for a run that has diverged.

    Raises:
        TensLoRAError: if a file cannot be written.
    """
    folder.remove_results()
    files = []
    if record["status"] == "completed":
        files = adapted.save(folder, record["tensor_mode"])
        record["sha256"] = {file.name: sha256_of(file) for file in files}
        folder.write_predictions(state.predictions)
    folder.write_record(record)
    log.info("%s\nrecord: %s", describe_run(record), folder.result)
    return files


def summarize_history(history: list[dict[str, Any]], scores: list[str]) -> dict[str, Any]:
    """The scores of a run, as its record holds them under "metrics".

    Args:
        history: one entry per finished epoch, with every score.
        scores: the names of the scores, the headline metric first; see `loop.fit` for those of further test splits.

    Returns:
        A dict with the headline metric's name ("name"), its last and its best score ("last", "best"), the epoch of the
        best score ("best_epoch"), the other last scores ("others_last") and the history ("history").
        Without a finished epoch the scores are None.
    """
    headline, *others = scores
    better = max if METRICS[headline].larger_is_better else min
    best = better(history, key=lambda entry: entry[headline], default=None)
    return {
        "name": headline,
        "last": history[-1][headline] if history else None,
        "best": best and best[headline],
        "best_epoch": best and best["epoch"],
        "others_last": {name: history[-1][name] for name in others} if history else {},
        "history": history,
    }


def describe_environment() -> dict[str, Any]:
    """What this process runs on.

    Returns:
        "versions" of packages, "platform", "argv" and "git". The latter holds the code's commit and whether the code
        has been changed since; it is None outside a clone.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "platform": platform.platform(), "git": _git(), "argv": sys.argv}


def describe_run(record: dict[str, Any]) -> str:
    """Describe a run in a few lines: construction, ranks, parameters, scores.

    Args:
        record: the run's record.
    """
    mode, metrics = record["tensor_mode"], record["metrics"]
    lines = [f"{mode} on {record['dataset']} with {record['model']}, seed {record['seed']}: {record['status']}"]
    if record["ranks"]:
        factorization = "tucker" if record["factorization"] == "matrix" else record["factorization"]
        stages = []
        for geometry, ranks in zip(stages_in_file(record["geometry"]), stages_in_file(record["ranks"]), strict=True):
            names = rank_limits(mode, Geometry(**geometry), factorization)
            stages.append(", ".join(f"{name} {rank}" for name, rank in zip(names, ranks, strict=True)))
        parameters, of_lora = record["adapter_parameters"], record["lora_parameters"]
        percent = percent_of_lora(parameters, of_lora)
        lines.append(f"ranks ({record['rank_strategy']}): {'; '.join(stages)}")
        lines.append(f"adapter: {parameters:,} parameters, {percent:.1f} % of LoRA's {of_lora:,}")
    lines.append(f"head: {record['head_parameters']:,} parameters; trained in all: {record['trained_parameters']:,}")
    if metrics["last"] is not None:
        others = "".join(f", {name} {value:.4f}" for name, value in metrics["others_last"].items())
        best = f"best {metrics['best']:.4f} (epoch {metrics['best_epoch']})"
        split = "validation " if record.get("scored_on") == "validation" else ""
        lines.append(f"{split}{metrics['name']}: last {metrics['last']:.4f}, {best}{others}")
        if "f1" in (metrics["name"], *metrics["others_last"]) and len(record.get("classes") or ()) == 2:
            lines.append(f"f1 is that of the class {record['classes'][1]}, the second of the two")
    return "\n".join(lines)


@cache  # the code that a process runs is the code of its start
def _git() -> dict[str, Any] | None:
    # In a hook, or with dotfiles in git, GIT_DIR names another repository.
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
    own = {name: value for name, value in os.environ.items() if name not in others}

    def ask(*words: str) -> str:
        here = Path(__file__).parent
        asked = subprocess.run(
            ["git", "-c", "safe.directory=*", *words], cwd=here, env=own, capture_output=True, text=True, check=True
        )
        return asked.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)  # a copy of the code may lie in another repository
        commit = ask("rev-parse", "HEAD")
        if not re.fullmatch("[0-9a-f]{40,64}", commit):  # a wrapper of a site's own may print more
            return None
        return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
