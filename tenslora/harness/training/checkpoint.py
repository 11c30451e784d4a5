"""The state of a run between two epochs, as one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors

FORMAT = "tenslora-checkpoint-1"


@dataclass
class State:
    """How far a run has come.

    epochs, steps: finished so far. history: one entry per epoch, see `loop.fit`. seconds: spent in training, of these
    in waiting for training batches, and in evaluation so far.

    The order of the data and every random draw of an epoch are functions of the seed and the epoch's number, so
    `epochs` says where each of their streams stands; the schedule is a function of `steps`.
    """

    epochs: int = 0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "wait": 0.0, "evaluate": 0.0})


def save_checkpoint(
    path: Path, digest: str, state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write the trained parameters, the optimizer's moments and `state`, atomically.

    digest: of the run that this is a checkpoint of. Raises TensLoRAError if the file cannot be written.
    """
    tensors = {f"parameters/{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
    write_safetensors(path, tensors, {"format": FORMAT, "digest": digest, **vars(state)})


def load_checkpoint(
    path: Path, digest: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> State:
    """Put a checkpoint's values into `parameters` and `optimizer` and return how far it had come.

    Raises TensLoRAError if the file is damaged or belongs to a run with other settings.
    """
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise TensLoRAError(f"{path}: not a checkpoint of this version; delete it or start without resume")
    if header["digest"] != digest:
        raise TensLoRAError(
            f"{path}: is of a run with other settings (digest {header['digest']}, this run {digest}); "
            f"start without resume, or in another folder"
        )
    expected = {f"parameters/{name}": parameter.shape for name, parameter in parameters.items()}
    stored = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameters/")}
    if stored != expected:
        odd = sorted(set(stored.items()) ^ set(expected.items()))[0][0]
        raise TensLoRAError(
            f"{path}: does not hold this model's parameters (first difference: {odd}); start without resume"
        )
    moments: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            moments.setdefault(int(index), {})[key] = value
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameters/{name}"])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return State(header["epochs"], header["steps"], header["history"], {**State().seconds, **header["seconds"]})
