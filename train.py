"""One run: fine-tune a frozen Transformer with one TensLoRA adapter.

    python train.py tensor_mode=qkv_depth dataset=dtd

composes the settings from conf/ and the command line, trains, and leaves result.json, adapter.safetensors and
head.safetensors in outputs/<dataset>/<model>/<what was run>.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.harness.app import run_app
from tenslora.harness.config import RunConfig, validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("train")


def train(run: RunConfig, path: Path, show_progress: bool = True) -> dict[str, Any]:
    """Carry out one run and return its record.

    Args:
        run: the settings.
        path: the run's folder.
        show_progress: whether to draw a progress bar, or without a terminal to log a line now and then.

    Raises:
        TensLoRAError: for whatever the user can put right. A run that diverged leaves its record first.
    """
    from tenslora.attachment import attach  # the imports take seconds, and a mistake in the settings shows before them
    from tenslora.decomposition import approximate
    from tenslora.harness.backbones import load_backbone, load_tokenizer
    from tenslora.harness.backbones.declared_geometry import check_geometry
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.encoding import encode
    from tenslora.harness.results.record import describe_run
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.run_record import facts_of, record_of
    from tenslora.harness.tracking import start_tracker
    from tenslora.harness.training.loop import Diverged, fit
    from tenslora.harness.training.processes import Processes
    from tenslora.peft.saved_lora import read_updates
    from tenslora.projections import find_projections

    folder, processes = RunFolder(path), Processes(run.trainer.device, run.trainer.threads)

    # The data, and a pretrained backbone with a fresh head for its classes.
    started = time.perf_counter()
    with processes.main_first():
        dataset = load_dataset(run.dataset, run.seed)
        tokenizer = load_tokenizer(run.model, dataset.train.inputs) if run.model.modality == "text" else None
        data_loaded = time.perf_counter()
        backbone = load_backbone(run.model, len(dataset.classes), run.seed, tokenizer)
    data = encode(dataset.train, dataset.test, run.dataset, run.model, backbone.input_name, tokenizer)

    # The adapted model: the adapter and the head are trained, everything else is frozen.
    model = backbone.model.to(processes.device)
    geometry, targets = find_projections(model, run.adapter.adapt if run.adapter else "qkv")
    check_geometry(run.geometry, geometry)
    adapter = warm_start = None
    if run.adapter:
        adapter = attach(model, run.adapter)
        if run.warm_start is not None:
            warm_start = approximate(adapter, read_updates(Path(run.warm_start), geometry, targets))
            log.info("warm start from %s: relative error %.4f", run.warm_start, warm_start.error)
    else:
        model.requires_grad_(run.tensor_mode == "full")
    for parameter in backbone.head_parameters().values():
        parameter.requires_grad_(True)
    seconds = {"data": data_loaded - started, "backbone": time.perf_counter() - data_loaded}

    # Training, under the eyes of a logger. The record is written last: where there is one, everything is there.
    facts = facts_of(run, dataset, backbone, geometry, adapter, warm_start, processes)
    with start_tracker(run, path, facts, watch=processes.is_main) as tracker:
        failure = None
        try:
            state = fit(
                model,
                data,
                run,
                processes=processes,
                checkpoint=folder.checkpoint,
                show_progress=show_progress and processes.is_main,
                on_epoch=tracker.epoch,
            )
        except Diverged as error:
            state, failure = error.state, error
        record = record_of(run, facts, state, failure, seconds, processes)
        if processes.is_main:
            files = []
            if not failure:
                files += [adapter.save(folder.adapter)] if adapter else []
                weights = model.named_parameters() if run.tensor_mode == "full" else backbone.head_parameters()
                files.append(folder.write_weights(run.tensor_mode, dict(weights)))
            folder.write_record(record)
            tracker.finish(record, files)
            log.info("%s\nrecord: %s", describe_run(record), folder.result)
    if failure:
        raise failure
    return record


def main(composed: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    train(validate(composed), Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    run_app(main, config_name="config")
