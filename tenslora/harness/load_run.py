"""Loads a finished run: its backbone with the weights that the run trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenslora.attachment import load
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors
from tenslora.harness.backbones import Backbone, load_backbone, load_tokenizer
from tenslora.harness.config import RunConfig, validate
from tenslora.harness.data import load_dataset
from tenslora.harness.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to use.

    Args:
        run: the run's settings.
        record: the run's result.json.
        backbone: the backbone with the trained head, and with the adapter attached if the run had one.
        tokenizer: the tokenizer of a text model; None for an image model.
    """

    run: RunConfig
    record: dict[str, Any]
    backbone: Backbone
    tokenizer: Any


def load_run(folder: Path, checkpoint: str | None = None) -> LoadedRun:
    """Load the backbone as the run did, and then the weights that the run trained.

    Args:
        folder: the run's folder.
        checkpoint: the backbone's weights, a file or folder, if they have moved since the run.

    Returns:
        The run, ready to use.

    Raises:
        TensLoRAError: if there is no completed run in the folder, or if its backbone cannot be loaded.
    """
    files = RunFolder(folder)
    record = files.read_record()
    if record["status"] != "completed":
        raise TensLoRAError(f"{folder}: the run has {record['status']}; it left no weights")
    run = validate(record["config"])
    if checkpoint is not None:
        run = replace(run, model=replace(run.model, checkpoint=checkpoint))
    tokenizer = None
    if run.model.modality == "text":
        # A run with random weights trained a tokenizer on its own sentences. That tokenizer has to be trained again.
        sentences = [] if run.model.pretrained else load_dataset(run.dataset, run.seed).train.inputs
        tokenizer = load_tokenizer(run.model, sentences)
    backbone = load_backbone(run.model, len(record["classes"]) or 1, run.seed, tokenizer)
    if run.adapter:
        load(backbone.model, files.adapter)
    _, weights = read_safetensors(files.weights(run.tensor_mode))
    backbone.model.load_state_dict(weights, strict=False)
    return LoadedRun(run, record, backbone, tokenizer)
