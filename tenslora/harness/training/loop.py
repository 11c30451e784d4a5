"""The training loop: AdamW under a cosine schedule, evaluated and checkpointed after every epoch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tenslora.adapter import Adapter, StagedAdapter
from tenslora.attachment import SUBMODULE, adapter_of
from tenslora.errors import TensLoRAError
from tenslora.harness.config import RankScheduleConfig, RunConfig
from tenslora.harness.data.batches import Batch, TrainBatches, workers_explained
from tenslora.harness.data.encoding import EncodedDataset
from tenslora.harness.quick_start import resume_garbage_collection
from tenslora.harness.stages import as_in_files
from tenslora.harness.training.checkpoint import Course, Start, TrainingState, load_checkpoint, save_checkpoint
from tenslora.harness.training.evaluation import Evaluation, evaluate
from tenslora.harness.training.metrics import score_names
from tenslora.harness.training.parameter_groups import RATE_RATIO, parameter_groups
from tenslora.harness.training.precision import autocast, round_frozen_weights
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.progress import ProgressBar
from tenslora.harness.training.schedule import cosine_rate
from tenslora.harness.training.tasks import TASKS, outputs_of
from tenslora.pretrained import running_statistics
from tenslora.random_streams import stream_seed
from tenslora.rank_pruning import prune
from tenslora.ranks import parameter_count

log = logging.getLogger(__name__)


class Diverged(TensLoRAError):
    """The error for a loss that is no longer a finite number.

    Args:
        state: how far the run came.
        step: the number of the optimizer step, from 1.
        rate: the learning rate of that step.
        which: "training loss", "test loss", or the name of the score that is no finite number.
        value: its value.
    """

    def __init__(self, state: TrainingState, step: int, rate: float, which: str, value: float) -> None:
        super().__init__(
            f"the {which} is {value} at step {step}, learning rate {rate:.3g}: the run has diverged; try a smaller "
            f"optimizer.lr, a warm-up (optimizer.warmup_steps) or trainer.clip_norm"
        )
        self.state, self.step, self.rate = state, step, rate


def fit(
    model: nn.Module,
    data: EncodedDataset,
    run: RunConfig,
    *,
    processes: Processes,
    checkpoint: Path,
    show_progress: bool,
    on_epoch: Callable[[dict[str, Any]], None],
    on_step: Callable[[int, float, float], None] | None = None,
    backbone_answer: Sequence[float] | None = None,
) -> TrainingState:
    """Train every parameter that requires a gradient.

    On a CPU the history and the final parameters are a function of the settings alone, however often the run is killed
    and resumed.

    Args:
        model: the adapted model, on the processes' device. In bf16 its frozen weights become bf16.
        data: the encoded examples. The loss is that of their task.
        run: the settings. The progress bar shows the first metric.
        processes: the processes that share the work.
        checkpoint: the file that is written after every epoch. A run with `run.resume` starts from it if it exists.
        show_progress: whether to draw a progress bar, or to log a line now and then if there is no terminal.
        on_epoch: called on the main process with each new entry of the history. A run that is resumed first calls it
            with the entries in the checkpoint.
        on_step: called on the main process with the number of each optimizer step, its learning rate and its loss.
        backbone_answer: what the backbone answers to one fixed input (`backbones.answer`); None if that is not known.

    Returns:
        How far the run has come. Its history has an entry for each epoch that `run.trainer.evaluate` asks to score:
        epoch, step, lr, train_loss, test_loss and the metrics. The latter two are computed on all examples to score
        after the epoch. If these are a validation split, their loss is called validation_loss. The scores of a further
        test split, such as "mismatched", are named accuracy_mismatched and the like. The predictions are the last
        epoch's.

    Raises:
        Diverged: when a loss is not finite. The checkpoint still holds the last epoch that was completed.
        TensLoRAError: if a metric does not apply to the task, if training does not fit into memory, or if a checkpoint
            cannot be read or written.
    """
    resume_garbage_collection()
    optimization = _Optimization(model, data, run, processes)
    batches = TrainBatches(
        data.train,
        data.collate,
        batch_size=run.trainer.batch_size,
        accumulation=run.trainer.accumulation,
        seed=run.seed,
        process=processes.index,
        processes=processes.count,
        workers=run.trainer.workers,
        pin_memory=processes.device.type == "cuda",
    )
    steps = min(run.trainer.epochs * batches.steps_per_epoch, run.trainer.max_steps or sys.maxsize)
    scores = tuple(score_names(data.metrics, data.more_tests))
    norms = [float(parameter.detach().norm()) for parameter in optimization.parameters.values()]
    start = Start(data.digest(), norms, None if backbone_answer is None else list(backbone_answer))
    course = Course(batches.steps_per_epoch, steps, run.trainer.evaluate_every, scores, data.scored_on, start)
    pruning = _pruning(model, run, processes, last_epoch=math.ceil(steps / batches.steps_per_epoch))
    state = TrainingState(ranks=None if pruning is None else [], start=start)
    if run.resume and checkpoint.is_file():
        state = load_checkpoint(
            checkpoint,
            run.digest(),
            course,
            optimization.parameters,
            optimization.adamw,
            pruning.adapter if pruning else None,
            running_statistics(model),
        )
        log.info("resuming after epoch %d of %d", state.epochs, run.trainer.epochs)
        if processes.is_main:
            for entry in state.history:
                on_epoch(entry)

    def evaluate_epoch() -> Evaluation:
        # The wrapped model would exchange its buffers in each forward pass, of which one process may need more than
        # another. The main process's statistics are those that are saved.
        processes.take_from_main(running_statistics(model).values())
        return evaluate(model, data, trainer=run.trainer, processes=processes)

    with (
        ProgressBar(steps, state.steps, show_progress) as bar,
        _memory_error_explained(run, processes),
        workers_explained(run.trainer.workers),
    ):

        def report(step: int, rate: float, loss: float) -> None:
            bar.step(loss)
            if on_step is not None and processes.is_main:
                on_step(step, rate, loss)

        while state.steps < steps:
            epoch = state.epochs + 1
            torch.manual_seed(stream_seed("epoch", run.seed, epoch, processes.index))
            with state.timed("train"):
                train_loss, rate = optimization.epoch(batches.epoch(epoch), steps, state, report)
                if pruning is not None and state.ranks is not None:
                    state.ranks.append(pruning.after(epoch, optimization.adamw))
            is_scored = course.is_scored(epoch)
            if is_scored:
                with state.timed("evaluate"):
                    evaluation = evaluate_epoch()
                values = {f"{data.scored_on} loss": evaluation.loss, **evaluation.scores}
                for name, value in values.items():
                    if not math.isfinite(value):
                        raise Diverged(state, state.steps, rate, name, value)
                state.predictions = evaluation.predictions
                entry = {
                    "epoch": epoch,
                    "step": state.steps,
                    "lr": rate,
                    "train_loss": train_loss,
                    f"{data.scored_on}_loss": evaluation.loss,
                    **evaluation.scores,
                }
                state.history.append(entry)
            state.epochs = epoch
            if processes.is_main:
                save_checkpoint(
                    checkpoint,
                    run.digest(),
                    state,
                    optimization.parameters,
                    optimization.adamw,
                    running_statistics(model),
                )
            if is_scored:
                if processes.is_main:
                    on_epoch(entry)
                bar.epoch(entry, data.metrics[0])
        if not state.predictions:  # the checkpoint is of the last epoch, so no epoch was left to evaluate
            state.predictions = evaluate_epoch().predictions
    return state


@dataclass(frozen=True)
class _Pruning:
    """Cuts the ranks of each stage after the epochs that the schedule names, within the stage's own budget."""

    adapter: Adapter | StagedAdapter
    schedule: RankScheduleConfig
    starts: Sequence[int]
    ends: Sequence[int]

    def after(self, epoch: int, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Cut the ranks if the schedule says so, and return them as files hold them."""
        stages = self.adapter.stages
        for number, (stage, start, end) in enumerate(zip(stages, self.starts, self.ends, strict=True)):
            budget = self.schedule.budget(epoch, start, end)
            if budget is not None:
                prune(stage, budget, optimizer)
                where = f"epoch {epoch}, stage {number}" if len(stages) > 1 else f"epoch {epoch}"
                log.info("%s: cut to %s parameters at most, ranks %s", where, f"{budget:,}", list(stage.ranks))
        return as_in_files(list(stage.ranks) for stage in self.adapter.stages)


def _pruning(model: nn.Module, run: RunConfig, processes: Processes, last_epoch: int) -> _Pruning | None:
    schedule = run.rank_schedule
    if schedule.name == "fixed" or run.adapter is None:
        return None
    if processes.count > 1:
        raise TensLoRAError(f"rank_schedule=prune: must be fixed for {processes.count} processes")
    if schedule.epochs[-1] >= last_epoch:
        raise TensLoRAError(f"rank_schedule.epochs={list(schedule.epochs)}: must be below {last_epoch}, the last epoch")
    adapter, chosen = adapter_of(model), (run.tensor_mode, run.adapter.factorization)
    starts, ends = [], []
    for geometry in (stage.geometry for stage in adapter.stages):
        end = run.rank_strategy.resolve(chosen[0], geometry, chosen[1])
        starts.append(parameter_count(chosen[0], geometry, run.start_ranks(geometry), chosen[1]))
        ends.append(parameter_count(chosen[0], geometry, end, chosen[1]))
    return _Pruning(adapter, schedule, starts, ends)


class _Optimization:
    """Takes the optimizer steps of a run. The arguments are those of `fit`."""

    def __init__(self, model: nn.Module, data: EncodedDataset, run: RunConfig, processes: Processes) -> None:
        self.model, self.run, self.processes = model, run, processes
        self.task, self.metrics = TASKS[data.task], data.metrics
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(
            parameter_groups(self.parameters, getattr(model, SUBMODULE, None), run.optimizer),
            lr=run.optimizer.lr,
            betas=(run.optimizer.betas[0], run.optimizer.betas[1]),
            eps=run.optimizer.eps,
            fused=True,
        )
        if run.trainer.precision == "bf16":
            round_frozen_weights(model)
        self.wrapped = processes.wrap(model)
        self.forward = _compiled(self.wrapped) if run.trainer.compile else self.wrapped

    def epoch(
        self, batches: Iterable[Batch], steps: int, state: TrainingState, report: Callable[[int, float, float], None]
    ) -> tuple[float, float]:
        """Take the steps of an epoch, or as many as the run has left.

        Args:
            batches: the batches of the epoch.
            steps: the number of steps of the whole run.
            state: how far the run has come; its number of steps is counted up.
            report: called with the number of each step, its learning rate and its loss.

        Returns:
            (the mean loss of the steps, the learning rate of the last step).

        Raises:
            Diverged: when a loss is not finite.
        """
        self.wrapped.train()
        schedule = self.run.optimizer
        losses: list[float] = []
        rate, step_loss = 0.0, torch.zeros((), device=self.processes.device)
        for batch in _waiting_timed(batches, state):
            step_loss += self._backward(batch, is_first_step=state.steps == 0)
            if not batch.closes_step:
                continue
            loss = self.processes.mean(step_loss).item()
            step_loss.zero_()
            rate = cosine_rate(state.steps, steps, schedule.lr, schedule.min_lr, schedule.warmup_steps)
            if state.steps == 0:
                _check_adapter_is_used(self.model)
            if not math.isfinite(loss):
                raise Diverged(state, state.steps + 1, rate, "training loss", loss)
            self._step(rate)
            state.steps += 1
            losses.append(loss)
            report(state.steps, rate, loss)
            if state.steps == steps:
                break
        return math.fsum(losses) / len(losses), rate

    def _backward(self, batch: Batch, is_first_step: bool) -> Tensor:
        """Add a batch's part to the gradients of its step, and return the batch's part of the loss."""
        device = self.processes.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
        labels = batch.labels.to(device, non_blocking=True)
        if self.run.trainer.compile:
            _mark_sizes(inputs)
        # The processes exchange their gradients once per step, with its last batch.
        exchange = contextlib.nullcontext() if batch.closes_step else self.processes.local_gradients(self.wrapped)
        with exchange, self.processes.answered():
            with autocast(self.run.trainer.precision, device):
                outputs = outputs_of(self.forward, inputs)
            if is_first_step:
                self.task.check_metrics(self.metrics, outputs.shape[-1])
            loss = self.task.loss(outputs.float(), labels, "mean") * batch.weight
            torch.autograd.backward(loss)
        return loss.detach()

    def _step(self, rate: float) -> None:
        """Step along the gradients at a learning rate, and reset them."""
        if self.run.trainer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.run.trainer.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group[RATE_RATIO]
        self.adamw.step()
        self.adamw.zero_grad()


def _compiled(model: nn.Module) -> nn.Module:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TensLoRAError(f"trainer.compile=true: needs a C++ compiler, but {compiler} is not installed; set CXX")
    return cast(nn.Module, torch.compile(model))


def _mark_sizes(inputs: dict[str, Tensor]) -> None:
    # The last batch of an epoch is smaller than the others, and texts differ in length. Unless torch.compile is told
    # that these dimensions vary, it compiles anew for each size that it meets.
    for tensor in inputs.values():
        for dimension in range(1 if tensor.is_floating_point() else tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _check_adapter_is_used(model: nn.Module) -> None:
    # If the adapted Linear layers are never called, the adapter has no gradients: the run would train the head alone.
    # A weight of the backbone may be unused, as DINOv2's mask token is.
    for name, parameter in model.named_parameters():
        if name.startswith(f"{SUBMODULE}.") and parameter.grad is None:
            raise TensLoRAError(f"{type(model).__name__}: {name} has no part in the loss; is it ever called?")


def _waiting_timed(batches: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
    iterator = iter(batches)
    while True:
        with state.timed("wait"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _memory_error_explained(run: RunConfig, processes: Processes) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TensLoRAError(
            f"trainer.batch_size={run.trainer.batch_size}: does not fit into the memory of {processes.name}; lower it "
            f"and raise trainer.accumulation in proportion, which keeps the examples per optimizer step"
        ) from error
