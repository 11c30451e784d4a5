from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.training.checkpoint import Course, Start, TrainingState, load_checkpoint, save_checkpoint

DIGEST, OTHER = "0123456789ab", "ba9876543210"
COURSE = Course(steps_per_epoch=2, steps=5, evaluate_every=2, scores=("accuracy",), scored_on="test")
AFTER_TWO = {"epoch": 2, "step": 4, "lr": 0.1, "train_loss": 2.0, "test_loss": 1.5, "accuracy": 0.1 + 0.2}


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


def _saved(folder: Path, steps: int = 4) -> Path:
    path = folder / "checkpoint.safetensors"
    seconds = {"train": 1.5, "wait": 0.25, "evaluate": 0.5}
    save_checkpoint(path, DIGEST, TrainingState(2, 4, [AFTER_TWO], seconds), *_trained(steps))
    return path


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    parameters, optimizer = _trained(4)
    restored, fresh = _trained(0, seed=9)
    state = load_checkpoint(path, DIGEST, COURSE, restored, fresh)
    assert state == TrainingState(2, 4, [AFTER_TWO], {"train": 1.5, "wait": 0.25, "evaluate": 0.5})
    for _ in range(3):
        _step(parameters, optimizer)
        _step(restored, fresh)
    assert all(torch.equal(parameters[name], restored[name]) for name in parameters)


STATISTICS = {"norm.running_var": torch.tensor([0.5, 2.0]), "norm.num_batches_tracked": torch.tensor(4)}


def _with_statistics(folder: Path, **changes: Tensor) -> dict[str, Tensor]:
    path = folder / "checkpoint.safetensors"
    saved = {**STATISTICS, **{f"norm.{name}": tensor for name, tensor in changes.items()}}
    save_checkpoint(path, DIGEST, TrainingState(2, 4, [AFTER_TWO]), *_trained(4), saved)
    restored = {"norm.running_var": torch.ones(2), "norm.num_batches_tracked": torch.tensor(0)}
    load_checkpoint(path, DIGEST, COURSE, *_trained(0), None, restored)
    return restored


def test_running_statistics_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    restored = _with_statistics(tmp_path)
    assert all(torch.equal(restored[name], statistic) for name, statistic in STATISTICS.items())
    with pytest.raises(TensLoRAError, match=r"lacks statistics/norm\.running_var"):
        load_checkpoint(_saved(tmp_path), DIGEST, COURSE, *_trained(0), None, restored)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("running_var", torch.tensor([0.5, -2.0]), "norm.running_var holds a negative number"),
        ("running_var", torch.tensor([0.5, math.inf]), "norm.running_var holds a NaN or an infinity"),
        ("num_batches_tracked", torch.tensor(-1), "norm.num_batches_tracked holds a negative number"),
        ("num_batches_tracked", torch.tensor(4.0), "norm.num_batches_tracked has the type torch.float32, not"),
        ("num_batches_tracked", torch.tensor(4j), "norm.num_batches_tracked has the type complex64"),
        ("num_batches_tracked", torch.tensor([4]), r"norm.num_batches_tracked has the shape \(1,\), not \(\)"),
    ],
)
def test_running_statistics_that_cannot_be_are_refused(name: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=f"does not fit this run .statistics/{message}"):
        _with_statistics(tmp_path, **{name: tensor})


def test_a_parameter_that_has_no_part_in_the_loss_has_no_moments(tmp_path: Path) -> None:
    parameters, optimizer = _trained(0)
    parameters["a"].requires_grad_(False)
    parameters["b"].grad = torch.ones(4)
    for _ in range(4):
        optimizer.step()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, DIGEST, TrainingState(2, 4, [AFTER_TWO]), parameters, optimizer)
    assert load_checkpoint(path, DIGEST, COURSE, *_trained(0)).steps == 4
    with pytest.raises(TensLoRAError, match="lacks optimizer/0/step"):
        load_checkpoint(path, DIGEST, COURSE, *_trained(0, seed=9))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    reason = rf"a run with other settings \(its digest is {DIGEST}, this run's {OTHER}\)"
    with pytest.raises(TensLoRAError, match=reason):
        load_checkpoint(_saved(tmp_path), OTHER, COURSE, *_trained(0))


def test_a_checkpoint_of_a_run_that_started_from_something_else_is_refused(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": "of now"}, "on other examples: the dataset has been edited since"),
        ({"backbone": [0.5, 0.5]}, "on another backbone: its weights, its config.json or its tokenizer"),
        ({"backbone": [0.5]}, "on another backbone"),
        ({"weights": [1.0, 2.1]}, "from other weights: the files of model.checkpoint or of warm_start"),
    ]
    path = tmp_path / "checkpoint.safetensors"
    then = Start("of then", [1.0, 2.0], [0.5, -0.5])
    save_checkpoint(path, DIGEST, TrainingState(2, 4, [AFTER_TWO], start=then), *_trained(4))
    up_to_rounding = replace(then, weights=[1.0, 2.00001])
    assert load_checkpoint(path, DIGEST, replace(COURSE, start=up_to_rounding), *_trained(0)).start == up_to_rounding
    assert load_checkpoint(path, DIGEST, replace(COURSE, start=replace(then, backbone=None)), *_trained(0))
    for change, message in changes:
        with pytest.raises(TensLoRAError, match=f"is of a run {message}.*; start without resume"):
            load_checkpoint(path, DIGEST, replace(COURSE, start=replace(then, **change)), *_trained(0))
    # Checkpoints of earlier versions do not say what their runs started from.
    assert load_checkpoint(_saved(tmp_path), DIGEST, replace(COURSE, start=then), *_trained(0)).start == then


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TensLoRAError, match="not a readable safetensors file"):
        load_checkpoint(path, DIGEST, COURSE, *_trained(0))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(TensLoRAError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors", DIGEST, COURSE, *_trained(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": 5}, r"not a readable checkpoint \(digest=5: "),
        ({"epochs": 0}, r"not a readable checkpoint \(epochs=0: "),
        ({"epochs": True}, r"not a readable checkpoint \(epochs=true: "),
        ({"epochs": 4}, "epochs=4: the run has 3"),
        ({"epochs": 1}, "steps=4: after 1 epochs there are 2"),
        ({"steps": 5}, "steps=5: after 2 epochs there are 4"),
        ({"steps": 4.0}, r"not a readable checkpoint \(steps=4.0: "),
        ({"history": {}}, r"not a readable checkpoint \(history="),
        ({"history": []}, r"history: must have the epochs and steps \[\[2, 4\]\]"),
        ({"history": [AFTER_TWO, AFTER_TWO]}, r"history: must have the epochs and steps \[\[2, 4\]\]"),
        ({"history": [{**AFTER_TWO, "step": 3}]}, r"history: must have the epochs and steps \[\[2, 4\]\]"),
        ({"history": [{**AFTER_TWO, "accuracy": 1.5}]}, "accuracy=1.5: must be from 0 to 1"),
        ({"history": [{**AFTER_TWO, "accuracy": "1"}]}, 'accuracy="1": must be a number'),
        ({"history": [{**AFTER_TWO, "f1": 0.5}]}, "must have the test loss and"),
        ({"history": [{**AFTER_TWO, "lr": -1.0}]}, r"not a readable checkpoint \(history.0.lr=-1.0"),
        ({"seconds": {"train": -1.0}}, r"not a readable checkpoint \(seconds.train=-1.0"),
        ({"seconds": {"sleep": 1.0}}, r"not a readable checkpoint \(seconds.sleep"),
    ],
)
def test_a_header_that_does_not_fit_the_run_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _saved(tmp_path)
    header, tensors = read_safetensors(path)
    write_safetensors(path, tensors, {**header, **changes})
    _is_refused(path, message)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("parameters/a", None, "lacks parameters/a"),
        ("parameters/c", torch.zeros(1), "has parameters/c, which does not belong there"),
        ("parameters/a", torch.zeros(2, 3), r"parameters/a has the shape \(2, 3\), not \(3, 2\)"),
        ("parameters/b", torch.full((4,), math.nan), "parameters/b holds a NaN or an infinity"),
        ("parameters/b", torch.zeros(4, dtype=torch.float16), "parameters/b has the type torch.float16, not"),
        ("parameters/b", torch.zeros(4, dtype=torch.complex64), "parameters/b has the type complex64"),
        ("optimizer/0/exp_avg", torch.zeros(1), r"optimizer/0/exp_avg has the shape \(1,\), not \(3, 2\)"),
        ("optimizer/0/exp_avg", torch.zeros(9, 9), r"optimizer/0/exp_avg has the shape \(9, 9\), not \(3, 2\)"),
        ("optimizer/1/exp_avg_sq", None, "lacks optimizer/1/exp_avg_sq"),
        ("optimizer/1/exp_avg_sq", -torch.ones(4), "optimizer/1/exp_avg_sq holds a negative number"),
        ("optimizer/1/exp_avg_sq", torch.full((4,), math.inf), "optimizer/1/exp_avg_sq holds a NaN or an infinity"),
        ("optimizer/1/step", torch.tensor(3.0), "optimizer/1/step is 3, not 4"),
        ("optimizer/1/step", torch.tensor([4.0]), r"optimizer/1/step has the shape \(1,\), not \(\)"),
        ("optimizer/2/step", torch.tensor(4.0), "has optimizer/2/step, which does not belong there"),
        ("optimizer/x", torch.tensor(4.0), "has optimizer/x, which does not belong there"),
    ],
)
def test_tensors_that_do_not_fit_the_run_are_refused(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    path = _saved(tmp_path)
    header, tensors = read_safetensors(path)
    changed = {**tensors, name: tensor}
    write_safetensors(path, {name: each for name, each in changed.items() if each is not None}, header)
    _is_refused(path, message)


def _is_refused(path: Path, message: str) -> None:
    restored, fresh = _trained(0, seed=9)
    before = {name: parameter.detach().clone() for name, parameter in restored.items()}
    with pytest.raises(TensLoRAError, match=message) as refused:
        load_checkpoint(path, DIGEST, COURSE, restored, fresh)
    assert str(refused.value).startswith(f"{path}: ")
    assert all(torch.equal(before[name], restored[name]) for name in restored), "nothing is half read"
    assert not fresh.state
