"""One run: fine-tune a frozen Transformer with one TensLoRA adapter.

    python train.py tensor_mode=qkv_depth dataset=dtd

The settings come from conf/ and the command line. The run writes result.json, adapter.safetensors and head.safetensors
to outputs/<dataset>/<model>/<run>.
"""

from __future__ import annotations

import os
import sys

if sys.flags.safe_path:  # python -P does not look beside this file
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tenslora.harness.early  # isort: skip  # noqa: F401  catches Ctrl-C from here on
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.harness.app import run_app

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from tenslora.harness.config import RunConfig


def train(run: RunConfig, path: Path, show_progress: bool = True) -> dict[str, Any]:
    """Carry out one run.

    Args:
        run: the settings.
        path: the run's folder.
        show_progress: whether to draw a progress bar, or to log a line now and then if there is no terminal.

    Returns:
        The run's record.

    Raises:
        TensLoRAError: for a mistake that the user can put right, or once a diverged run has written its record.
    """
    from tenslora.harness.adapted_model import adapted_model  # imported here: wrong settings are reported sooner
    from tenslora.harness.backbones import load_backbone, load_tokenizer, recorded_answer
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.encoding import encode
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.run_record import facts_of, record_before, record_of, write_results
    from tenslora.harness.tracking import start_tracker
    from tenslora.harness.training.loop import Diverged, fit
    from tenslora.harness.training.processes import Processes

    folder, processes = RunFolder(path), Processes(run.trainer.device, run.trainer.threads)

    # The data, and a pretrained backbone with a fresh head for its classes.
    started = time.perf_counter()
    with processes.main_first():
        dataset = load_dataset(run.dataset, run.seed)
        tokenizer = load_tokenizer(run.model, dataset.train.inputs) if run.model.modality == "text" else None
        data_loaded = time.perf_counter()
        backbone = load_backbone(run.model, dataset.outputs, run.seed, tokenizer)
    answer = recorded_answer(run.model, backbone, tokenizer)  # by which `load_run` knows the backbone again
    data = encode(dataset, run.dataset, backbone, tokenizer)

    # The adapted model.
    adapted = adapted_model(run, backbone, processes.device)
    seconds = {"data": data_loaded - started, "backbone": time.perf_counter() - data_loaded}

    # Training. The record is written last: where there is a record, all other files are complete.
    facts = facts_of(run, dataset, data, adapted, processes)
    recorded = {**facts, "backbone_answer": answer}
    folder.check_record(record_before(run, recorded, processes))
    with start_tracker(run, path, facts, watch=processes.is_main) as tracker:
        failure = None
        try:
            state = fit(
                adapted.model, data, run, processes=processes, checkpoint=folder.checkpoint,
                show_progress=show_progress and processes.is_main, on_epoch=tracker.epoch, on_step=tracker.step,
                backbone_answer=answer,
            )  # fmt: skip
        except Diverged as error:
            state, failure = error.state, error
        record = record_of(run, recorded, state, failure, seconds, processes)
        if processes.is_main:
            tracker.finish(record, write_results(folder, record, adapted, state))
    if failure:
        raise failure
    return record


def main(composed: DictConfig) -> float:
    from tenslora.harness.one_run import carry_out_once

    return carry_out_once(composed, train)


if __name__ == "__main__":
    run_app(main, config_name="config")
