"""Prepares a backbone for training: attaches the run's adapter and chooses the parameters that are trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tenslora.adapter import Adapter, StagedAdapter, make_adapter
from tenslora.attachment import attach
from tenslora.constructions import Geometry
from tenslora.decomposition import Approximation, approximate
from tenslora.errors import TensLoRAError
from tenslora.files import sha256_of
from tenslora.forward_pass import listed
from tenslora.harness.backbones import Backbone
from tenslora.harness.backbones.hub import source_setting
from tenslora.harness.config import RunConfig, check_ranks
from tenslora.harness.run_folder import RunFolder
from tenslora.pretrained import running_statistics
from tenslora.projections import find_projections

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """A model that is ready to train.

    Args:
        model: the backbone with its head, and with the adapter if there is one. The parameters to train require
            gradients.
        geometries: the dimensions found in the backbone, of each stage.
        adapter: the attached adapter; None for a run without an adapter.
        warm_start: how closely the adapter approximates the LoRA that it starts from; None without a warm start.
        head: the parameters of the head, under their names in the model.
    """

    model: nn.Module
    geometries: tuple[Geometry, ...]
    adapter: Adapter | StagedAdapter | None
    warm_start: Approximation | None
    head: dict[str, nn.Parameter]

    def save(self, folder: RunFolder, tensor_mode: str) -> list[Path]:
        """Write what the run changed: the adapter, the head (or after full fine-tuning all weights), and statistics.

        Args:
            folder: the run's folder.
            tensor_mode: the run's tensor_mode.

        Returns:
            The files.

        Raises:
            TensLoRAError: if a file cannot be written.
        """
        kept = dict(self.model.named_parameters()) if tensor_mode == "full" else self.head
        weights = {**kept, **running_statistics(self.model)}
        file = folder.write_weights(tensor_mode, weights)
        if self.adapter is None:
            return [file]
        return [self.adapter.save(folder.adapter, beside=sorted(weights), beside_sha256=sha256_of(file)), file]


def adapted_model(run: RunConfig, backbone: Backbone, device: torch.device) -> AdaptedModel:
    """Move a backbone to its device, attach the run's adapter, and freeze every parameter that the run does not train.

    Args:
        run: the settings.
        backbone: a backbone with a fresh head. Its model is changed in place.
        device: the device to train on.

    Returns:
        The model, ready to train.

    Raises:
        TensLoRAError: if the backbone has other dimensions than its config file declares, if the matrices to adapt are
            not found in it, if the ranks do not fit its dimensions, or if the LoRA of a warm start does not fit.
    """
    model = backbone.model.to(device)
    try:
        stages = find_projections(model, run.adapter.adapt if run.adapter else "qkv")
    except TensLoRAError as error:
        raise TensLoRAError(f"{source_setting(run.model)}: cannot be adapted: {error}") from error
    geometries = tuple(stage.geometry for stage in stages)
    check_geometries(run.geometries, geometries)
    check_ranks(run, geometries)
    adapter = warm_start = None
    if run.adapter:
        adapter = attach(model, make_adapter(run.adapter, geometries, [run.start_ranks(each) for each in geometries]))
        if run.warm_start is not None:
            from tenslora.peft.saved_lora import CONFIG, read_others, read_updates  # imports PEFT, which takes seconds

            _require_no_run(run.warm_start, CONFIG)
            warm_start = approximate(adapter, read_updates(Path(run.warm_start), stages, model=model))
            log.info("warm start from %s: relative error %.4f", run.warm_start, warm_start.error)
            if others := sorted(read_others(Path(run.warm_start))):
                log.warning(
                    "warm start from %s: %s was trained beside it and is not taken", run.warm_start, listed(others)
                )
    else:
        if run.warm_start is not None:  # a sweep over tensor_mode may have one for all its runs
            log.warning(
                "warm_start=%s: has no effect, because tensor_mode=%s has no adapter", run.warm_start, run.tensor_mode
            )
        model.requires_grad_(run.tensor_mode == "full")
    head = backbone.head_parameters()
    for parameter in head.values():
        parameter.requires_grad_(True)
    return AdaptedModel(model, geometries, adapter, warm_start, head)


def check_geometries(declared: Sequence[Geometry] | None, actual: Sequence[Geometry]) -> None:
    """Check that a backbone has the dimensions that its config file declares.

    Args:
        declared: the dimensions of each stage in the config file; None if the file does not declare them.
        actual: those of the backbone's stages.

    Raises:
        TensLoRAError: if a dimension differs; the message names the first one.
    """
    if declared is None:
        return
    advice = "check that model.checkpoint belongs to this model, or set model.geometry=null"
    if len(declared) != len(actual):
        raise TensLoRAError(
            f"model.geometry: has {len(declared)} stages, and the backbone that was loaded has {len(actual)}; {advice}"
        )
    for index, (stage, loaded) in enumerate(zip(declared, actual, strict=True)):
        place = f"{index}." if len(declared) > 1 else ""
        for name, value in vars(stage).items():
            if name in ("d_ff", "gated") and loaded.d_ff is None:  # the feed-forward block is not adapted
                continue
            if value != getattr(loaded, name):
                raise TensLoRAError(
                    f"model.geometry.{place}{name}={value}: the backbone that was loaded has {getattr(loaded, name)}; "
                    f"{advice}"
                )


def _require_no_run(warm_start: str, config_of_lora: str) -> None:
    # os.path, for which a name that is too long is simply that of no file
    if os.path.isfile(RunFolder(Path(warm_start)).result) and not os.path.isfile(Path(warm_start, config_of_lora)):
        raise TensLoRAError(
            f"warm_start={warm_start}: must be the folder of a LoRA that PEFT saved, and is that of a run; python -m "
            f"tenslora.harness.export {warm_start} --format peft makes one of it"
        )
