"""The state of a run between two epochs, as one safetensors file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.predictions import Predictions

FORMAT = "tenslora-checkpoint-1"


@dataclass
class TrainingState:
    """How far a run has come.

    The order of the examples and every random draw of an epoch are functions of the seed and the epoch's number, and
    the learning rate is a function of the step. To go on, a run needs nothing else but its parameters and the
    optimizer's moments.

    Args:
        epochs: the number of complete epochs.
        steps: the number of optimizer steps taken.
        history: one entry per complete epoch, see `loop.fit`.
        seconds: the seconds spent in training ("train") and in evaluation ("evaluate"). Those spent in waiting for
            training batches ("wait") are a part of "train".
        predictions: those of the last evaluation, for each split. A checkpoint does not hold them.
    """

    epochs: int = 0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "wait": 0.0, "evaluate": 0.0})
    predictions: dict[str, Predictions] = field(default_factory=dict)

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """A context whose time is added to the seconds of an activity.

        Args:
            activity: a key of `seconds`.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - started


def save_checkpoint(
    path: Path,
    digest: str,
    state: TrainingState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state, the trained parameters and the optimizer's moments, atomically.

    Args:
        path: the file.
        digest: the digest of the run's settings.
        state: how far the run has come.
        parameters: the trained parameters, by name.
        optimizer: the optimizer of these parameters.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    tensors = {f"parameters/{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
    kept = {name: value for name, value in vars(state).items() if name != "predictions"}
    write_safetensors(path, tensors, {"format": FORMAT, "digest": digest, **kept})


def load_checkpoint(
    path: Path, digest: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Read a checkpoint into the parameters and the optimizer.

    Args:
        path: a file that `save_checkpoint` wrote.
        digest: the digest of the settings of the run that is to go on.
        parameters: the parameters to train, by name. Their values are replaced.
        optimizer: the optimizer of these parameters. Its moments are replaced.

    Returns:
        How far the run had come.

    Raises:
        TensLoRAError: if the file is damaged or belongs to a run with other settings.
    """
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise TensLoRAError(f"{path}: not a checkpoint of this version; delete it or start without resume")
    if header["digest"] != digest:
        raise TensLoRAError(
            f"{path}: is of a run with other settings (its digest is {header['digest']}, this run's {digest}); "
            f"start without resume, or in another folder"
        )
    expected = {f"parameters/{name}": parameter.shape for name, parameter in parameters.items()}
    stored = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameters/")}
    if stored != expected:
        different = sorted(set(stored.items()) ^ set(expected.items()))[0][0]
        raise TensLoRAError(
            f"{path}: does not hold this model's parameters (first difference: {different}); start without resume"
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
    return TrainingState(
        header["epochs"], header["steps"], header["history"], {**TrainingState().seconds, **header["seconds"]}
    )
