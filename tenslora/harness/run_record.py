"""What a run writes down: the facts known before it trains, and its record once it has trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tenslora.harness.results.record import describe_environment, summarize_history
from tenslora.ranks import parameter_count

if TYPE_CHECKING:
    from torch.nn import Parameter

    from tenslora.harness.adapted_model import AdaptedModel
    from tenslora.harness.config import RunConfig
    from tenslora.harness.data import Dataset
    from tenslora.harness.training.checkpoint import TrainingState
    from tenslora.harness.training.loop import Diverged
    from tenslora.harness.training.processes import Processes


def facts_of(run: RunConfig, dataset: Dataset, adapted: AdaptedModel, processes: Processes) -> dict[str, Any]:
    """What is known of a run before it trains: names, ranks, exact parameter counts, sizes of the data, the device.

    Args:
        run: its settings.
        dataset: as loaded.
        adapted: the model, ready to train.
        processes: that train.
    """
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
        "ranks": list(adapter.ranks) if adapter else None,
        "warm_start": asdict(warm_start) if warm_start else None,
        "seed": run.seed,
        "geometry": vars(adapted.geometry),
        "adapter_parameters": _count(adapter.parameters()) if adapter else 0,
        "lora_parameters": parameter_count("lora", adapted.geometry, [run.rank_strategy.rank]),
        "head_parameters": _count(adapted.head.values()),
        "trained_parameters": _count(p for p in model.parameters() if p.requires_grad),
        "total_parameters": _count(model.parameters()),
        "train_examples": len(dataset.train),
        "test_examples": len(dataset.test),
        "classes": list(dataset.classes),
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
        run: its settings.
        facts: as `facts_of` gave them.
        state: how far it came, with every epoch's scores.
        failure: where it diverged; None for a completed run.
        seconds: spent before training, by what on.
        processes: that trained.
    """
    return {
        "status": "diverged" if failure else "completed",
        "failure": {"message": str(failure), "step": failure.step, "lr": failure.rate} if failure else None,
        **facts,
        "metrics": summarize_history(state.history, list(run.dataset.metrics)),
        "seconds": {**seconds, **state.seconds},
        "steps_per_second": state.steps / state.seconds["train"] if state.steps else None,
        "peak_memory_bytes": processes.peak_memory_bytes(),
        "environment": describe_environment(),
        "identity": run.identity(),
        "config": run.settings(),
    }


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
