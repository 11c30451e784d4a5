"""Prepares a backbone for training: attaches the run's adapter and chooses the parameters that are trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tenslora.adapter import Adapter
from tenslora.attachment import attach
from tenslora.constructions import Geometry
from tenslora.decomposition import Approximation, approximate
from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone
from tenslora.harness.backbones.hub import source_setting
from tenslora.harness.config import RunConfig, check_ranks
from tenslora.harness.run_folder import RunFolder
from tenslora.projections import find_projections

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """A model that is ready to train.

    Args:
        model: the backbone with its head, and with the adapter if there is one. The parameters to train require
            gradients.
        geometry: the dimensions found in the backbone.
        adapter: the attached adapter; None for a run without an adapter.
        warm_start: how closely the adapter approximates the LoRA that it starts from; None without a warm start.
        head: the parameters of the head, under their names in the model.
    """

    model: nn.Module
    geometry: Geometry
    adapter: Adapter | None
    warm_start: Approximation | None
    head: dict[str, nn.Parameter]

    def save(self, folder: RunFolder, tensor_mode: str) -> list[Path]:
        """Write what the run trained: the adapter, and the head or, after full fine-tuning, every parameter.

        Args:
            folder: the run's folder.
            tensor_mode: the run's tensor_mode.

        Returns:
            The files.

        Raises:
            TensLoRAError: if a file cannot be written.
        """
        files = [self.adapter.save(folder.adapter)] if self.adapter else []
        weights = dict(self.model.named_parameters()) if tensor_mode == "full" else self.head
        return [*files, folder.write_weights(tensor_mode, weights)]


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
        if len(stages) > 1:
            raise TensLoRAError(f"its layers come in {len(stages)} sizes, and a run needs layers of one size")
    except TensLoRAError as error:
        raise TensLoRAError(f"{source_setting(run.model)}: cannot be adapted: {error}") from error
    geometry = stages[0].geometry
    check_geometry(run.geometry, geometry)
    check_ranks(run, geometry)
    adapter = warm_start = None
    if run.adapter:
        (adapter,) = attach(model, Adapter(run.adapter, geometry, run.start_ranks(geometry))).stages
        if run.warm_start is not None:
            from tenslora.peft.saved_lora import read_updates  # imports PEFT, which takes seconds

            warm_start = approximate(adapter, read_updates(Path(run.warm_start), stages))
            log.info("warm start from %s: relative error %.4f", run.warm_start, warm_start.error)
    else:
        model.requires_grad_(run.tensor_mode == "full")
    head = backbone.head_parameters()
    for parameter in head.values():
        parameter.requires_grad_(True)
    return AdaptedModel(model, geometry, adapter, warm_start, head)


def check_geometry(declared: Geometry | None, actual: Geometry) -> None:
    """Check that a backbone has the dimensions that its config file declares.

    Args:
        declared: the dimensions in the config file; None if the file does not declare them.
        actual: the backbone's dimensions.

    Raises:
        TensLoRAError: if a dimension differs; the message names the first one.
    """
    for name, value in vars(declared).items() if declared else ():
        if name in ("d_ff", "gated") and actual.d_ff is None:  # the feed-forward block is not adapted
            continue
        if value != getattr(actual, name):
            raise TensLoRAError(
                f"model.geometry.{name}={value}: the backbone that was loaded has {getattr(actual, name)}; check that "
                f"model.checkpoint belongs to this model, or set model.geometry=null"
            )
