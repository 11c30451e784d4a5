"""The training loop: AdamW under a cosine schedule, evaluated and checkpointed after every epoch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tenslora.attachment import SUBMODULE
from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import logits_of
from tenslora.harness.config import OptimizerConfig, TrainerConfig
from tenslora.harness.data.batches import Batch, TrainBatches, test_batches
from tenslora.harness.data.encoding import Collate, Encoded
from tenslora.harness.training.checkpoint import State, load_checkpoint, save_checkpoint
from tenslora.harness.training.groups import RATIO, parameter_groups
from tenslora.harness.training.metrics import score
from tenslora.harness.training.precision import round_frozen_weights
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.schedule import cosine_rate
from tenslora.random_streams import stream_seed

log = logging.getLogger(__name__)

EVAL_BATCH_SIZES = {"cpu": 128, "cuda": 512}  # to begin with, where none is set
PLAIN_LINE_SECONDS = 30  # how often a run without a terminal says where it is


class Diverged(TensLoRAError):
    """A loss is no longer a finite number. state: how far the run came. step, rate: where it happened."""

    def __init__(self, state: State, step: int, rate: float, which: str, loss: float) -> None:
        super().__init__(
            f"the {which} loss is {loss} at step {step}, learning rate {rate:.3g}: the run has diverged; try a smaller "
            f"optimizer.lr, a warm-up (optimizer.warmup_steps) or trainer.clip_norm"
        )
        self.state, self.step, self.rate = state, step, rate


def fit(
    model: nn.Module,
    data: tuple[Encoded, Encoded, Collate],
    metrics: list[str],
    *,
    trainer: TrainerConfig,
    optimizer: OptimizerConfig,
    seed: int,
    processes: Processes,
    checkpoint: Path,
    digest: str,
    resume: bool,
    shown: bool,
    on_epoch: Callable[[dict[str, Any]], None],
) -> State:
    """Train every parameter of `model` that requires a gradient, and return how it went.

    Args:
        model: on the processes' device, already adapted. In bf16 its frozen weights become bf16.
        data: (train, test, collate) as `tenslora.harness.data.encoding.encode` gives them.
        metrics: computed on the whole test split after each epoch; the first is the headline.
        trainer, optimizer, seed: settings; see conf/.
        processes: who shares the work.
        checkpoint: written after every epoch. digest: of the run, kept in it. resume: go on from it if it is there.
        shown: whether to draw a bar, or where there is no terminal to log a line now and then.
        on_epoch: called on the main process with each entry of the history as it arises, and on resuming with those
            of the checkpoint.

    Each entry of the history holds epoch, step, train_loss, test_loss, lr and the metrics. On a CPU the history
    and the final parameters are a function of the settings alone, however often the run was killed and resumed.

    Raises Diverged when the loss is not finite, after which the checkpoint still holds the last whole epoch, and
    TensLoRAError if a checkpoint cannot be read or written.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(
        parameter_groups(parameters, getattr(model, SUBMODULE, None), optimizer),
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        fused=True,
    )
    state = State()
    if resume and checkpoint.is_file():
        state = load_checkpoint(checkpoint, digest, parameters, adamw)
        log.info("resuming after epoch %d of %d", state.epochs, trainer.epochs)
        if processes.is_main:
            for entry in state.history:
                on_epoch(entry)

    train, test, collate = data
    batches = TrainBatches(
        train,
        collate,
        batch_size=trainer.batch_size,
        accumulation=trainer.accumulation,
        seed=seed,
        process=processes.index,
        processes=processes.count,
        workers=trainer.workers,
        pin_memory=processes.device.type == "cuda",
    )
    steps = min(trainer.epochs * batches.steps_per_epoch, trainer.max_steps or sys.maxsize)
    if trainer.precision == "bf16":
        round_frozen_weights(model)
    wrapped = processes.wrap(model)
    device = processes.device
    forward = wrapped
    if trainer.compile:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise TensLoRAError(f"trainer.compile=true: needs a C++ compiler, and {compiler} (or CXX) is not there")
        forward = cast(nn.Module, torch.compile(wrapped))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.precision == "bf16")

    with _Progress(steps, state.steps, shown) as progress:
        while state.steps < steps:
            started = time.perf_counter()
            epoch = state.epochs + 1
            torch.manual_seed(stream_seed("epoch", seed, epoch, processes.index))
            wrapped.train()
            losses: list[float] = []
            rate, step_loss = 0.0, torch.zeros((), device=device)
            for batch in _waited_for(batches.epoch(epoch), state.seconds):
                inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
                labels = batch.labels.to(device, non_blocking=True)
                if trainer.compile:
                    _mark_sizes(inputs)
                exchange = contextlib.nullcontext() if batch.closes_step else processes.local_gradients(wrapped)
                with exchange:
                    with autocast:
                        logits = logits_of(forward, inputs)
                    loss = F.cross_entropy(logits.float(), labels) * batch.weight
                    loss.backward()  # type: ignore[no-untyped-call]
                step_loss += loss.detach()
                if not batch.closes_step:
                    continue
                rate = cosine_rate(state.steps, steps, optimizer.lr, optimizer.min_lr, optimizer.warmup_steps)
                losses.append(processes.mean(step_loss).item())
                step_loss.zero_()
                if state.steps == 0:
                    _check_adapter_is_used(model)
                if not math.isfinite(losses[-1]):
                    state.seconds["train"] += time.perf_counter() - started
                    raise Diverged(state, state.steps + 1, rate, "training", losses[-1])
                if trainer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters.values(), trainer.clip_norm)
                for group in adamw.param_groups:
                    group["lr"] = rate * group[RATIO]
                adamw.step()
                adamw.zero_grad()
                state.steps += 1
                progress.step(losses[-1])
                if state.steps == steps:
                    break
            state.seconds["train"] += time.perf_counter() - started

            started = time.perf_counter()
            test_loss, scores = evaluate(wrapped, test, collate, metrics, trainer, processes, autocast)
            state.seconds["evaluate"] += time.perf_counter() - started
            if not math.isfinite(test_loss):
                raise Diverged(state, state.steps, rate, "test", test_loss)
            state.epochs = epoch
            entry = {
                "epoch": epoch,
                "step": state.steps,
                "lr": rate,
                "train_loss": math.fsum(losses) / len(losses),
                "test_loss": test_loss,
                **scores,
            }
            state.history.append(entry)
            if processes.is_main:
                save_checkpoint(checkpoint, digest, state, parameters, adamw)
                on_epoch(entry)
            progress.epoch(entry, metrics[0])
    return state


def _waited_for(batches: Iterable[Batch], seconds: dict[str, float]) -> Iterator[Batch]:
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(iterator, None)
        seconds["wait"] += time.perf_counter() - started
        if batch is None:
            return
        yield batch


def _mark_sizes(inputs: dict[str, Tensor]) -> None:
    # The last batch is shorter, and texts are of all lengths; torch.compile would find out one by one, and compile
    # anew each time.
    for tensor in inputs.values():
        for dimension in range(1 if tensor.is_floating_point() else tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _check_adapter_is_used(model: nn.Module) -> None:
    # A backbone may have weights that a classifier does not use; an adapter without gradients sits on Linear layers
    # that are never called, and the run would be head_only under another name.
    for name, parameter in model.named_parameters():
        if name.startswith(f"{SUBMODULE}.") and parameter.grad is None:
            raise TensLoRAError(f"{type(model).__name__}: {name} has no part in the loss; is it ever called?")


def evaluate(
    model: nn.Module,
    test: Encoded,
    collate: Collate,
    metrics: list[str],
    trainer: TrainerConfig,
    processes: Processes,
    autocast: torch.autocast,
) -> tuple[float, dict[str, float]]:
    """(mean loss, metrics) over the whole test split; every process gets the same.

    What does not fit into memory is tried again with half the batch; the scores do not depend on it. Raises
    torch.OutOfMemoryError if not even single examples fit.
    """
    model.eval()
    size = trainer.eval_batch_size or EVAL_BATCH_SIZES[processes.device.type]
    while (results := _predict(model, test, collate, size, trainer.workers, processes, autocast)) is None:
        size //= 2
        log.warning("evaluation does not fit into memory: going on with trainer.eval_batch_size=%d", size)
    everyone = processes.gather(results)
    labels_, predictions = [label for _, label, _ in everyone], [guess for _, _, guess in everyone]
    mean_loss = math.fsum(loss for loss, _, _ in everyone) / len(everyone)
    return mean_loss, {metric: score(metric, labels_, predictions) for metric in metrics}


def _predict(
    model: nn.Module,
    test: Encoded,
    collate: Collate,
    batch_size: int,
    workers: int,
    processes: Processes,
    autocast: torch.autocast,
) -> list[tuple[float, int, int]] | None:
    # (loss, label, prediction) of this process's share of the examples; None if memory did not suffice. It is the
    # return that lets go of what is in memory: the exception holds on to it.
    loader = test_batches(
        test,
        collate,
        batch_size=batch_size,
        process=processes.index,
        processes=processes.count,
        workers=workers,
        pin_memory=processes.device.type == "cuda",
    )
    results: list[tuple[float, int, int]] = []
    try:
        with torch.inference_mode():
            for inputs, labels in loader:
                inputs = {name: tensor.to(processes.device, non_blocking=True) for name, tensor in inputs.items()}
                with autocast:
                    logits = logits_of(model, inputs)
                losses = F.cross_entropy(logits.float(), labels.to(processes.device), reduction="none")
                results += zip(losses.tolist(), labels.tolist(), logits.argmax(-1).tolist(), strict=True)
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
        return None
    return results


class _Progress:
    """A bar over all steps of the run, or plain lines where there is no terminal."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        terminal = shown and sys.stderr.isatty()
        self.steps, self.done, self.first = steps, done, done
        self.lines = shown and not terminal
        self.started = self.last_line = time.monotonic()
        self.bar: tqdm[Any] | None = None
        if terminal:
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
        self.latest: dict[str, str] = {}
        # Lines for the console go above the bar; where the console gets none, as in a sweep, redirecting would
        # send them there.
        to_console = any(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers)
        self.redirect = logging_redirect_tqdm() if to_console and self.bar is not None else contextlib.nullcontext()

    def __enter__(self) -> _Progress:
        self.redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.redirect.__exit__(None, None, None)
        if self.bar is not None:
            self.bar.close()

    def step(self, loss: float) -> None:
        self.done += 1
        self.latest["loss"] = f"{loss:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(self.latest, refresh=False)
            self.bar.update()
        elif self.lines and time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self._line()

    def epoch(self, entry: dict[str, Any], metric: str) -> None:
        self.latest = {
            "epoch": str(entry["epoch"]),
            "loss": f"{entry['train_loss']:.4f}",
            metric: f"{entry[metric]:.4f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(self.latest)
        elif self.lines:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        speed = (self.done - self.first) / max(1e-9, self.last_line - self.started)
        left = (self.steps - self.done) / max(1e-9, speed)
        what = "  ".join(f"{name} {value}" for name, value in self.latest.items())
        log.info(
            "step %d of %d  %s  %.1f steps/s  %d:%02d left", self.done, self.steps, what, speed, *divmod(int(left), 60)
        )
