"""Puts on a backbone what a run trains: its adapter and its head, or every weight."""

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
from tenslora.harness.config import RunConfig
from tenslora.peft.saved_lora import read_updates
from tenslora.projections import find_projections

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """A model that is ready to train.

    Args:
        model: the backbone with its head, and with the adapter if there is one; what is trained requires gradients.
        geometry: as found in the backbone.
        adapter: None for a run without one.
        warm_start: how near the adapter came to the LoRA that it starts from; None without a warm start.
        head: the parameters of the head, under their names in the model.
    """

    model: nn.Module
    geometry: Geometry
    adapter: Adapter | None
    warm_start: Approximation | None
    head: dict[str, nn.Parameter]

    def trained_weights(self, tensor_mode: str) -> dict[str, nn.Parameter]:
        """What a run leaves beside its adapter: the head, or after full fine-tuning every parameter."""
        return dict(self.model.named_parameters()) if tensor_mode == "full" else self.head


def adapted_model(run: RunConfig, backbone: Backbone, device: torch.device) -> AdaptedModel:
    """Move a backbone to its device and make trainable what the run trains; everything else is frozen.

    Args:
        run: the settings.
        backbone: with a fresh head. Its model is changed in place.
        device: to train on.

    Raises:
        TensLoRAError: if the backbone has other dimensions than its config file declares, if the matrices to adapt are
            not found in it, or if the LoRA of a warm start does not fit.
    """
    model = backbone.model.to(device)
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
    head = backbone.head_parameters()
    for parameter in head.values():
        parameter.requires_grad_(True)
    return AdaptedModel(model, geometry, adapter, warm_start, head)


def check_geometry(declared: Geometry | None, actual: Geometry) -> None:
    """Check that a backbone has the dimensions that its config file declares.

    Args:
        declared: what the config file says; None if it says nothing.
        actual: what the backbone has.

    Raises:
        TensLoRAError: names the first dimension that differs.
    """
    for name, value in vars(declared).items() if declared else ():
        if name in ("d_ff", "gated") and actual.d_ff is None:  # the feed-forward block is not adapted
            continue
        if value != getattr(actual, name):
            raise TensLoRAError(
                f"model.geometry.{name}={value}: the backbone that was loaded has {getattr(actual, name)}; is "
                f"model.checkpoint another model's? If it is meant, set model.geometry=null"
            )
