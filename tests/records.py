"""Records of runs that nobody has carried out."""

from __future__ import annotations

from typing import Any

from tenslora.constructions import Geometry
from tenslora.harness.config import RunConfig
from tenslora.harness.run_folder import RunFolder
from tenslora.ranks import rank_limits


def finished(run: RunConfig, last: float = 0.5, **changes: Any) -> dict[str, Any]:
    """What the record of a completed run may hold.

    Args:
        run: the settings of the run.
        last: its score.
        changes: fields with another value.
    """
    (geometry,) = run.geometries or [Geometry(d_in=8, heads=2, d_head=4, layers=2)]
    metric = (run.dataset.metrics or ["accuracy"])[0]
    epoch = {"epoch": 1, "step": 2, "lr": 1e-6, "train_loss": 1.5, f"{run.dataset.scored_on}_loss": 1.25, metric: last}
    ranks = [4] * len(rank_limits(run.tensor_mode, geometry, run.adapter.factorization)) if run.adapter else None
    return {
        "status": "completed",
        "failure": None,
        "digest": run.digest(),
        "model": run.model.name,
        "dataset": run.dataset.name,
        "tensor_mode": run.tensor_mode,
        "factorization": run.adapter.factorization if run.adapter else None,
        "rank_strategy": run.rank_strategy.name if run.adapter else None,
        "ranks": ranks,
        "warm_start": None,
        "seed": run.seed,
        "geometry": vars(geometry),
        "adapter_parameters": 500 if run.adapter else 0,
        "lora_parameters": 1000,
        "head_parameters": 50,
        "trained_parameters": 550,
        "total_parameters": 5000,
        "train_examples": 100,
        "scored_on": run.dataset.scored_on,
        "test_examples": 20,
        "classes": ["cat", "dog"],
        "processes": 1,
        "device": "a CPU",
        "metrics": {
            "name": metric, "last": last, "best": last, "best_epoch": 1, "others_last": {}, "history": [epoch],
        },
        "seconds": {"train": 1.0},
        "steps_per_second": 2.0,
        "peak_memory_bytes": 1000,
        "environment": {"versions": {}, "platform": "Linux", "git": None, "argv": ["train.py"]},
        "identity": run.identity(),
        "config": run.settings(),
        **changes,
    }  # fmt: skip


def complete(folder: RunFolder, run: RunConfig, last: float = 0.5, **changes: Any) -> None:
    """Leave the record of a completed run, as `finished` has it, in a folder."""
    folder.write_record(finished(run, last, **changes))


def diverged(folder: RunFolder, run: RunConfig) -> None:
    """Leave the record of a run in a folder whose loss was no longer a number in its second epoch."""
    complete(folder, run, status="diverged", failure={"message": "the training loss is nan", "step": 3, "lr": 1.0})
