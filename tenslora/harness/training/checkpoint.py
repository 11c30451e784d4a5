"""The state of a run between two epochs, as one safetensors file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.adapter import Adapter, StagedAdapter
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, require_tensors, write_safetensors
from tenslora.forms import shown
from tenslora.harness.backbones.answer import is_same
from tenslora.harness.forms import CHECKPOINT_FORMAT, Checkpoint, Epoch, check_history, read_form
from tenslora.harness.predictions import Predictions
from tenslora.harness.run_folder import OtherRun, UnusableCheckpoint
from tenslora.harness.stages import as_in_files, stages_in_file
from tenslora.pretrained import require_statistics

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, for each parameter


@dataclass(frozen=True)
class Start:
    """What a run starts from. A run that is stopped goes on only if nothing of it has been replaced since.

    Args:
        data: a digest of what the run trains on and is scored on: the classes, the labels, and the tokens of texts.
        weights: the norm of each parameter to train before the first step.
        backbone: what the backbone answers to one fixed input (`backbones.answer`); None if that is not known.
    """

    data: str
    weights: list[float]
    backbone: list[float] | None = None

    def check(self, then: Mapping[str, Any]) -> None:
        """Check that a stopped run started from the same.

        Args:
            then: the fields of that run's start.

        Raises:
            TensLoRAError: if it did not.
        """
        replaced = None
        if then["data"] != self.data:
            replaced = "on other examples: the dataset has been edited since"
        elif self.backbone and then["backbone"] and not is_same(self.backbone, then["backbone"]):
            replaced = "on another backbone: its weights, its config.json or its tokenizer have been replaced since"
        elif not is_same(self.weights, then["weights"]):
            replaced = "from other weights: the files of model.checkpoint or of warm_start have been replaced since"
        if replaced:
            raise TensLoRAError(f"is of a run {replaced}; start without resume")


@dataclass(frozen=True)
class Course:
    """How a run goes from its first step to its last.

    Args:
        steps_per_epoch: the number of optimizer steps of an epoch.
        steps: the number of optimizer steps of the whole run.
        evaluate_every: the run is scored after every so many epochs, and after its last one; None for that one alone.
        scores: the names of the scores.
        scored_on: the split that the run is scored on, "test" or "validation".
        start: what the run starts from; None if that is not known.
    """

    steps_per_epoch: int
    steps: int
    evaluate_every: int | None
    scores: tuple[str, ...]
    scored_on: str
    start: Start | None = None

    def is_scored(self, epoch: int) -> bool:
        """Whether the run is scored after an epoch."""
        is_last = epoch * self.steps_per_epoch >= self.steps
        return is_last or (self.evaluate_every is not None and epoch % self.evaluate_every == 0)

    def check(self, epochs: int, steps: int, history: Sequence[Epoch]) -> None:
        """Check that the run can have come to a state.

        Args:
            epochs: the number of complete epochs.
            steps: the number of optimizer steps.
            history: the entries of the history.

        Raises:
            ValueError: if it cannot. The message names the first part that does not fit.
        """
        last = math.ceil(self.steps / self.steps_per_epoch)
        if epochs > last:
            raise TensLoRAError(f"epochs={epochs}: the run has {last}")
        if steps != self._steps_after(epochs):
            raise TensLoRAError(f"steps={steps}: after {epochs} epochs there are {self._steps_after(epochs)}")
        scored = [(epoch, self._steps_after(epoch)) for epoch in range(1, epochs + 1) if self.is_scored(epoch)]
        if [(entry.epoch, entry.step) for entry in history] != scored:
            raise TensLoRAError(f"history: must have the epochs and steps {shown(scored)}")
        check_history(history, self.scores, self.scored_on)

    def in_order(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of the history with its names in the order in which `loop.fit` writes them; a checkpoint sorts them.

        Args:
            entry: the entry.
        """
        names = ("epoch", "step", "lr", "train_loss", f"{self.scored_on}_loss", *self.scores)
        return {name: entry[name] for name in names}

    def _steps_after(self, epoch: int) -> int:
        return min(epoch * self.steps_per_epoch, self.steps)


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
        ranks: the adapter's ranks after each complete epoch, as files hold them (`stages.as_in_files`), of a run that
            cuts them; otherwise None.
        start: `Course.start`.
    """

    epochs: int = 0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "wait": 0.0, "evaluate": 0.0})
    predictions: dict[str, Predictions] = field(default_factory=dict)
    ranks: list[Any] | None = None
    start: Start | None = None

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
    statistics: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state, the trained parameters, the optimizer's moments and the running statistics, atomically.

    Args:
        path: the file.
        digest: the digest of the run's settings.
        state: how far the run has come.
        parameters: the trained parameters, by name.
        optimizer: the optimizer of these parameters.
        statistics: the model's running statistics, by name; None if it has none.

    Raises:
        TensLoRAError: if the file cannot be written.
    """
    tensors = {f"parameters/{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"statistics/{name}": statistic for name, statistic in (statistics or {}).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
    kept = {name: value for name, value in vars(state).items() if name != "predictions"}
    kept["start"] = state.start and vars(state.start)
    for name in ("ranks", "start"):  # which the checkpoints of earlier versions lack
        if kept[name] is None:
            del kept[name]
    write_safetensors(path, tensors, {"format": CHECKPOINT_FORMAT, "digest": digest, **kept})


def load_checkpoint(
    path: Path,
    digest: str,
    course: Course,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    pruned: Adapter | StagedAdapter | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> TrainingState:
    """Read a checkpoint into the parameters, the optimizer and the running statistics.

    Args:
        path: a file that `save_checkpoint` wrote.
        digest: the digest of the settings of the run that is to go on.
        course: how that run goes.
        parameters: the parameters to train, by name, as they are before the first step. Their values are replaced.
        optimizer: the optimizer of these parameters. Its moments are replaced.
        pruned: the adapter, if the run cuts its ranks; it gets those of the checkpoint.
        statistics: the model's running statistics, by name, whose values are replaced; None if it has none.

    Returns:
        How far the run had come.

    Raises:
        UnusableCheckpoint: if the file is damaged, belongs to a run with other settings, or holds a state that this run
            cannot have come to.
    """
    try:
        header, tensors = read_safetensors(path)
        if header.get("format") != CHECKPOINT_FORMAT:
            raise TensLoRAError(f"{path}: not a checkpoint of this version; delete it or start without resume")
        header = read_form(Checkpoint, header, path, "checkpoint")
        if header["digest"] != digest:
            raise OtherRun(path, header["digest"], digest)
        if course.start and header["start"]:
            try:
                course.start.check(header["start"])
            except TensLoRAError as error:
                raise TensLoRAError(f"{path}: {error}") from error
        try:
            course.check(header["epochs"], header["steps"], [Epoch.model_validate(each) for each in header["history"]])
            _take_ranks(header, pruned)
            expected = {f"statistics/{name}": statistic for name, statistic in (statistics or {}).items()}
            moments = _check_tensors(tensors, header["steps"], parameters, optimizer, expected)
        except ValueError as error:
            raise TensLoRAError(f"{path}: does not fit this run ({error}); start without resume") from error
    except TensLoRAError as error:
        raise UnusableCheckpoint(str(error)) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameters/{name}"])
        for name, statistic in expected.items():
            statistic.copy_(tensors[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainingState(
        header["epochs"],
        header["steps"],
        [course.in_order(entry) for entry in header["history"]],
        {**TrainingState().seconds, **header["seconds"]},
        ranks=header["ranks"],
        start=course.start,
    )


def _take_ranks(header: Mapping[str, Any], pruned: Adapter | StagedAdapter | None) -> None:
    ranks = header["ranks"]
    if (ranks is None) != (pruned is None):
        raise TensLoRAError(f"ranks={shown(ranks)}: does not fit rank_schedule")
    if pruned is None:
        return
    if len(ranks) != header["epochs"]:
        raise TensLoRAError(f"ranks: must have {header['epochs']} entries, one for each epoch")
    before = [list(stage.ranks) for stage in pruned.stages]
    for entry in ranks:  # ranks only fall, so that a damaged file cannot ask for more memory than the run itself
        stages = stages_in_file(entry)
        if len(stages) != len(before) or not all(map(_are_cut, stages, before)):
            raise TensLoRAError(f"ranks={shown(entry)}: must be as many as {shown(as_in_files(before))}, none above it")
        before = stages
    for stage, left in zip(pruned.stages, before, strict=True):
        stage.resize(left)


def _are_cut(now: Sequence[int], then: Sequence[int]) -> bool:
    return len(now) == len(then) and all(rank <= earlier for rank, earlier in zip(now, then, strict=True))


def _check_tensors(
    tensors: Mapping[str, Tensor],
    steps: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    statistics: Mapping[str, Tensor],
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's moments, by the parameter's number, after a check of all tensors of a checkpoint.

    torch checks neither the shapes nor the types of moments, and its fused AdamW would write out of bounds.
    """
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in parameters.items()}
    expected: dict[str, Tensor] = {f"parameters/{name}": parameter for name, parameter in parameters.items()}
    moments: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(in_order):
        keys = {key: f"optimizer/{number}/{key}" for key in _MOMENTS}
        stored = tensors.get(f"parameters/{names[parameter]}")
        # A parameter that has no part in the loss, as DINOv2's mask token, has no moments and keeps its first value.
        if not tensors.keys() & set(keys.values()) and stored is not None and _is_equal(stored, parameter):
            continue
        shapes = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        expected |= {name: shapes[key] for key, name in keys.items()}
        moments[number] = {key: tensors[name] for key, name in keys.items() if name in tensors}
    expected |= statistics
    # A count of batches is a whole number, and has to be finite as the others have.
    whole = {name for name, statistic in statistics.items() if not statistic.is_floating_point()}
    numbers = {n: t.double() if n in whole and not t.is_complex() else t for n, t in tensors.items()}
    require_tensors(numbers, {name: tensor.shape for name, tensor in expected.items()})
    for name, tensor in expected.items():
        if tensors[name].dtype != tensor.dtype:
            raise TensLoRAError(f"{name} has the type {tensors[name].dtype}, not {tensor.dtype}")
    for number, of_parameter in moments.items():
        if of_parameter["step"].item() != steps:
            raise TensLoRAError(f"optimizer/{number}/step is {of_parameter['step'].item():g}, not {steps}")
        if (of_parameter["exp_avg_sq"] < 0).any():
            raise TensLoRAError(f"optimizer/{number}/exp_avg_sq holds a negative number")
    require_statistics({name: tensors[name] for name in statistics})
    return moments


def _is_equal(stored: Tensor, parameter: nn.Parameter) -> bool:
    return stored.shape == parameter.shape and torch.equal(stored, parameter.detach().to(stored))
