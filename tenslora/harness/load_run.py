"""A finished run's model, put together again from what the run left."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tenslora.attachment import load
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors
from tenslora.harness.backbones import Backbone, load_backbone, load_tokenizer
from tenslora.harness.config import RunConfig, validate
from tenslora.harness.data import load_dataset
from tenslora.harness.results.record import read_record


@dataclass(frozen=True)
class LoadedRun:
    """run: its settings. record: its result.json. backbone: with the trained head, and the adapter attached if the run
    had one. tokenizer: of a text model, else None."""

    run: RunConfig
    record: dict[str, Any]
    backbone: Backbone
    tokenizer: Any


def load_run(folder: Path, checkpoint: str | None = None) -> LoadedRun:
    """Load the backbone as the run in `folder` did, and put the weights on it that the run trained.

    checkpoint: where the backbone lies now, if not where it lay then. Raises TensLoRAError if there is no completed
    run, or as loading its backbone does.
    """
    record = read_record(folder)
    if record["status"] != "completed":
        raise TensLoRAError(f"{folder}: the run has {record['status']}; it left no weights")
    run = validate(OmegaConf.create(record["config"]))
    if checkpoint is not None:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, checkpoint=checkpoint))
    tokenizer = None
    if run.model.modality == "text":
        # One that a run with random weights trained on its own sentences is trained again.
        sentences = [] if run.model.pretrained else load_dataset(run.dataset, run.seed).train.inputs
        tokenizer = load_tokenizer(run.model, sentences)
    backbone = load_backbone(run.model, len(record["classes"]), run.seed, tokenizer)
    if run.has_adapter:
        load(backbone.model, folder / "adapter.safetensors")
    _, weights = read_safetensors(folder / f"{'model' if run.mode == 'full' else 'head'}.safetensors")
    backbone.model.load_state_dict(weights, strict=False)
    return LoadedRun(run, record, backbone, tokenizer)
