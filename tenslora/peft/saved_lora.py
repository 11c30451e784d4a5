"""Reads a LoRA that PEFT has saved."""

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
_PREFIX = "base_model.model."


_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""PEFT's init_lora_weights that leave the backbone's own weights as they are."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the LoRA in `folder`.

    Raises TensLoRAError if there is none, or one that is more than a product of two matrices on the backbone's weights.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TensLoRAError(f"{path}: not a PEFT adapter's settings ({error})") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise TensLoRAError(f"{path}: is a {kind} adapter; only a plain LoRA's update is a product of two matrices")
    if config.get("lora_bias"):
        raise TensLoRAError(f"{path}: lora_bias=true: it has biases of its own, which a tensor of updates cannot hold")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise TensLoRAError(
            f"{path}: init_lora_weights={start}: it changes the backbone's weights too; save it with PEFT's "
            f"path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    return config


def read_updates(folder: Path, geometry: Geometry, targets: list[TargetLinear]) -> list[list[Tensor]]:
    """dW of each layer, and in it of each of the geometry's matrices, shape (d_in, width), PEFT's scaling included.

    geometry, targets: as `find_projections` gives them for the model that the LoRA is for. A matrix that it does not
    adapt has zeros. Raises TensLoRAError if it adapts others than the geometry's, or other sizes, or nothing at all.
    """
    config = read_config(folder)
    _, weights = read_safetensors(folder / WEIGHTS)
    updates = [[torch.zeros(geometry.d_in, width) for width in geometry.widths] for _ in range(geometry.layers)]
    left = {re.sub(r"\.lora_[^.]+(\.weight)?$", "", name.removeprefix(_PREFIX)) for name in weights if ".lora_" in name}
    known = False
    for target in targets:
        # With or without a head the names differ in front.
        name = next((path for path in left if _ends(path, target.path) or _ends(target.path, path)), None)
        if name is None:
            continue
        left.remove(name)
        known = True
        a, b = (weights[f"{_PREFIX}{name}.lora_{which}.weight"].float() for which in "AB")
        update = (b @ a).T * _scaling(config, name)  # (inputs, outputs)
        if update.shape != features(target.linear):
            raise TensLoRAError(
                f"{folder}: its update of {name} is {tuple(update.shape)}, the model's Linear {features(target.linear)}"
            )
        rest = update.clone()
        for index, column in target.columns:
            matrix = target.group[index]
            columns = slice(column, column + (update.shape[1] if target.writes_to_stream else geometry.widths[matrix]))
            updates[target.layer][matrix] = update[:, columns].T if target.writes_to_stream else update[:, columns]
            rest[:, columns] = 0
        if rest.any():  # of a Linear that holds several
            left.add(name)
    if left and not known:
        raise TensLoRAError(f"{folder}: adapts {min(left)} and others, none of which this model has; whose LoRA is it?")
    if left:
        raise TensLoRAError(
            f"{folder}: adapts {min(left)}, which adapter.adapt={geometry.adapt} leaves out; choose more matrices"
        )
    if not any(update.any() for layer in updates for update in layer):
        raise TensLoRAError(f"{folder}: its updates are all zero, as before any training")
    return updates


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _scaling(config: dict[str, Any], name: str) -> float:
    def of(pattern: str, default: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):  # as PEFT matches them
                return float(value)
        return float(config[default])

    rank = of("rank_pattern", "r")
    return of("alpha_pattern", "lora_alpha") / (rank**0.5 if config.get("use_rslora") else rank)
