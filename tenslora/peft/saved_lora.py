"""Reads a LoRA that PEFT saved, without PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors
from tenslora.projections import TargetLinear, features

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files in the folder that PEFT's `save_pretrained` writes."""

_PREFIX = "base_model.model."
# The values of PEFT's init_lora_weights that leave the backbone's own weights as they are.
_INITS_OF_LORA_ALONE = (True, False, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings of a saved LoRA.

    Args:
        folder: a folder that PEFT's `save_pretrained` wrote.

    Returns:
        The contents of its adapter_config.json.

    Raises:
        TensLoRAError: if there are no settings, or if the adapter does more than add a product of two matrices to each
            weight, as DoRA, biases and some initialisations do.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TensLoRAError(f"{path}: cannot be read as the settings of a PEFT adapter ({error})") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise TensLoRAError(f"{path}: must be a plain LoRA, whose updates are products of two matrices, not {kind}")
    if config.get("lora_bias"):
        raise TensLoRAError(f"{path}: lora_bias=true: must be false, because a tensor of updates cannot hold biases")
    if (init := config.get("init_lora_weights", True)) not in _INITS_OF_LORA_ALONE:
        raise TensLoRAError(
            f"{path}: init_lora_weights={init}: changes the backbone's weights too; save the adapter again with PEFT's "
            f"path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    return config


def read_updates(folder: Path, geometry: Geometry, targets: list[TargetLinear]) -> list[list[Tensor]]:
    """Read the updates that a saved LoRA makes, PEFT's scaling included.

    Args:
        folder: a folder that PEFT's `save_pretrained` wrote.
        geometry: the dimensions of the model that the LoRA is for, from `find_projections`.
        targets: that model's Linear layers, from `find_projections`.

    Returns:
        ``updates[layer][m]``, the update of the m-th of `Geometry.matrices` in that layer, with shape (d_in, width). It
        is zero if the LoRA does not adapt that matrix.

    Raises:
        TensLoRAError: if the LoRA adapts anything beside the geometry's matrices, if its sizes are not the model's, or
            if all of its updates are zero.
    """
    config = read_config(folder)
    _, weights = read_safetensors(folder / WEIGHTS)
    updates = [[torch.zeros(geometry.d_in, width) for width in geometry.widths] for _ in range(geometry.layers)]
    saved = {re.sub(r"\.lora_[^.]+(\.weight)?$", "", key.removeprefix(_PREFIX)) for key in weights if ".lora_" in key}
    left_out: list[str] = []
    any_matches = False
    for target in targets:
        # A model with a head has a prefix in front of the backbone's paths. Either model may have a head: the LoRA's
        # own model, or the one that is adapted.
        name = next((name for name in saved if _ends_with(name, target.path) or _ends_with(target.path, name)), None)
        if name is None:
            continue
        saved.remove(name)
        any_matches = True
        a, b = (weights[f"{_PREFIX}{name}.lora_{which}.weight"].float() for which in "AB")
        update = (b @ a).T * _scaling(config, name)  # (inputs, outputs)
        if update.shape != features(target.linear):
            raise TensLoRAError(
                f"{folder}: its update of {name} has the shape {tuple(update.shape)}, but the model's Linear has "
                f"{features(target.linear)}"
            )
        remainder = update.clone()
        for index, start in target.columns:
            matrix = target.group[index]
            width = update.shape[1] if target.writes_to_stream else geometry.widths[matrix]
            columns = slice(start, start + width)
            updates[target.layer][matrix] = update[:, columns].T if target.writes_to_stream else update[:, columns]
            remainder[:, columns] = 0
        if remainder.any():  # the Linear holds other matrices too, which the geometry leaves out
            left_out.append(name)
    left_out += saved
    if left_out and not any_matches:
        raise TensLoRAError(f"{folder}: adapts {min(left_out)} and others; this model has none of them")
    if left_out:
        raise TensLoRAError(
            f"{folder}: adapts {min(left_out)}, which adapt={geometry.adapt} leaves out; choose more matrices"
        )
    if not any(update.any() for layer in updates for update in layer):
        raise TensLoRAError(f"{folder}: its updates are all zero, as before any training")
    return updates


def _ends_with(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _scaling(config: dict[str, Any], name: str) -> float:
    # PEFT's lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; patterns give some modules values of their own.
    def value_of(setting: str, patterns: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT matches them
                return float(value)
        return float(config[setting])

    rank = value_of("r", "rank_pattern")
    return value_of("lora_alpha", "alpha_pattern") / (rank**0.5 if config.get("use_rslora") else rank)
