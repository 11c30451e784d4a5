"""One run: fine-tune a frozen Transformer with one TensLoRA adapter.

    python train.py tensor_mode=qkv_depth dataset=dtd

composes the settings from conf/ and the command line, trains, and leaves result.json, adapter.safetensors and
head.safetensors in outputs/<dataset>/<model>/<what was run>.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.harness.app import run_app

if TYPE_CHECKING:
    from collections.abc import Iterable

    from omegaconf import DictConfig
    from torch.nn import Parameter

log = logging.getLogger("train")


def train(composed: DictConfig, folder: Path, shown: bool = True) -> dict[str, Any]:
    """Carry out one run in `folder` and return its record; `shown` says whether it draws its progress.

    Raises TensLoRAError for whatever the user can put right; a run that diverged leaves its record first.
    """
    from tenslora.harness.config import digest, identity, settings, validate

    run = validate(composed)  # before the heavy imports: a slip in the settings shows at once

    import torch

    from tenslora.adapter import AdapterConfig
    from tenslora.attachment import attach
    from tenslora.decomposition import approximate
    from tenslora.errors import TensLoRAError
    from tenslora.files import write_safetensors
    from tenslora.harness.backbones import load_backbone, load_tokenizer
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.encoding import encode
    from tenslora.harness.results.record import environment, metrics_of, summary, write_record
    from tenslora.harness.tracking import start_tracker
    from tenslora.harness.training.loop import Diverged, fit
    from tenslora.harness.training.processes import Processes
    from tenslora.peft.saved_lora import read_updates
    from tenslora.projections import check_geometry, find_projections
    from tenslora.ranks import parameter_count

    clock = [time.perf_counter()]
    processes = Processes(run.trainer.device, run.trainer.threads)
    if not processes.is_main:
        logging.getLogger().setLevel(logging.WARNING)

    # The dataset, then a backbone with a fresh head for its classes, then the adapter.
    with processes.main_first():
        dataset = load_dataset(run.dataset, run.seed)
        tokenizer = load_tokenizer(run.model, dataset.train.inputs) if run.dataset.modality == "text" else None
        clock.append(time.perf_counter())
        backbone = load_backbone(run.model, len(dataset.classes), run.seed, tokenizer)
    model = backbone.model.to(processes.device)
    geometry, sites = find_projections(model, run.adapter.adapt if run.has_adapter else "qkv")
    check_geometry(run.geometry, geometry)
    adapter = start = None
    if run.has_adapter:
        adapter = attach(
            model,
            AdapterConfig(
                run.mode, run.strategy, factorization=run.factorization.name, seed=run.seed, **vars(run.adapter)
            ),
        )
        if run.warm_start is not None:
            start = approximate(adapter, read_updates(Path(run.warm_start), geometry, sites))
            log.info("warm start from %s: relative error %.4f", run.warm_start, start.error)
    else:
        model.requires_grad_(run.mode == "full")
    head = backbone.head_parameters()
    for parameter in head.values():
        parameter.requires_grad_(True)
    data = encode(dataset.train, dataset.test, run.dataset, run.model, backbone.input_name, tokenizer)
    clock.append(time.perf_counter())

    def count(parameters: Iterable[Parameter]) -> int:
        return sum(p.numel() for p in parameters)

    facts: dict[str, Any] = {
        "digest": digest(composed),
        "model": run.model.name,
        "dataset": run.dataset.name,
        "tensor_mode": run.mode,
        "factorization": None if adapter is None else "matrix" if run.mode == "lora" else run.factorization.name,
        "rank_strategy": run.strategy.name if adapter else None,
        "ranks": list(adapter.ranks) if adapter else None,
        "warm_start": start and vars(start),
        "seed": run.seed,
        "geometry": vars(geometry),
        "adapter_parameters": count(adapter.parameters()) if adapter else 0,
        "lora_parameters": parameter_count("lora", geometry, [run.strategy.rank]),
        "head_parameters": count(head.values()),
        "trained_parameters": count(p for p in model.parameters() if p.requires_grad),
        "total_parameters": count(model.parameters()),
        "train_examples": len(dataset.train),
        "test_examples": len(dataset.test),
        "classes": list(dataset.classes),
        "processes": processes.count,
        "device": processes.name,
    }
    gc.enable()  # see main
    # Train, and leave the record whatever comes of it: it is written last, so that where it is, all is.
    failure = None
    with start_tracker(run.logger, folder, settings(composed), facts, watch=processes.is_main) as tracker:
        try:
            state = fit(
                model,
                data,
                run.dataset.metrics,
                trainer=run.trainer,
                optimizer=run.optimizer,
                seed=run.seed,
                processes=processes,
                checkpoint=folder / "checkpoint.safetensors",
                digest=facts["digest"],
                resume=run.resume,
                shown=shown and processes.is_main,
                on_epoch=tracker.epoch,
            )
        except Diverged as error:
            state, failure = error.state, error
        except torch.OutOfMemoryError as error:
            raise TensLoRAError(
                f"trainer.batch_size={run.trainer.batch_size}: does not fit into the memory of {processes.name}; a "
                f"smaller one with trainer.accumulation in proportion trains the same"
            ) from error
        record = {
            "status": "diverged" if failure else "completed",
            "failure": failure and {"message": str(failure), "step": failure.step, "lr": failure.rate},
            **facts,
            "metrics": metrics_of(state.history, run.dataset.metrics),
            "seconds": {"data": clock[1] - clock[0], "backbone": clock[2] - clock[1], **state.seconds},
            "steps_per_second": state.steps / state.seconds["train"] if state.steps else None,
            "peak_memory_bytes": processes.peak_memory_bytes(),
            "environment": environment(),
            "identity": identity(composed),
            "config": settings(composed),
        }
        if processes.is_main:
            files = []
            if adapter and not failure:
                files.append(adapter.save(folder / "adapter.safetensors"))
            if not failure:
                name, rest = ("model", dict(model.named_parameters())) if run.mode == "full" else ("head", head)
                files.append(write_safetensors(folder / f"{name}.safetensors", rest, {}))
            path = write_record(folder, record)
            tracker.finish(record, files)
            log.info("%s\nrecord: %s", summary(record), path)
    if failure:
        raise failure
    return record


def main(composed: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    gc.disable()  # all that is imported and built stays: looking for garbage there takes a tenth of the start
    train(composed, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    run_app(main, config_name="config")
