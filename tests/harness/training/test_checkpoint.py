from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.harness.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint


def _trained(steps: int, seed: int = 0) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(seed)
    parameters = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        _step(parameters, optimizer)
    return parameters, optimizer


def _step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    torch.autograd.backward([(p**3).sum() for p in parameters.values()])
    optimizer.step()


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    parameters, optimizer = _trained(5)
    state = TrainingState(2, 5, [{"epoch": 1, "accuracy": 0.1 + 0.2}], {"train": 1.5, "wait": 0.25, "evaluate": 0.5})
    save_checkpoint(path, "d1", state, parameters, optimizer)

    restored, fresh = _trained(0, seed=9)
    assert load_checkpoint(path, "d1", restored, fresh) == state
    for _ in range(3):
        _step(parameters, optimizer)
        _step(restored, fresh)
    assert all(torch.equal(parameters[name], restored[name]) for name in parameters)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, "d1", TrainingState(), *_trained(1))
    with pytest.raises(TensLoRAError, match=r"a run with other settings \(its digest is d1, this run's d2\)"):
        load_checkpoint(path, "d2", *_trained(0))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, "d1", TrainingState(), *_trained(1))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TensLoRAError, match="not a readable safetensors file"):
        load_checkpoint(path, "d1", *_trained(0))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(TensLoRAError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors", "d", *_trained(0))
