"""The loss and the metrics of a model on a whole test split."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tenslora.harness.config import TrainerConfig
from tenslora.harness.data.batches import test_batches
from tenslora.harness.data.encoding import Collate, Encoded
from tenslora.harness.training.metrics import METRICS
from tenslora.harness.training.precision import autocast
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.tasks import Task, outputs_of

log = logging.getLogger(__name__)

BATCH_SIZES = {"cpu": 128, "cuda": 512}
"""The examples per batch to try first on each kind of device, where `trainer.eval_batch_size` is not set."""

_BatchResults = tuple[Tensor, Tensor, Tensor]


def evaluate(
    model: nn.Module,
    test: Encoded,
    collate: Collate,
    metrics: Sequence[str],
    *,
    task: Task,
    trainer: TrainerConfig,
    processes: Processes,
) -> tuple[float, dict[str, float]]:
    """Score a model on the whole test split, each process taking its share of the examples.

    If a batch does not fit into memory, smaller batches are tried. The scores do not depend on the batch size.

    Args:
        model: a model on the processes' device. It is left in evaluation mode.
        test: the examples.
        collate: makes a batch of some examples.
        metrics: the names of the metrics, which are keys of `METRICS`.
        task: the task, whose loss is computed.
        trainer: the settings that hold the batch size, the precision and the number of workers.
        processes: the processes that share the work.

    Returns:
        (the mean loss, the score of each metric), the same on every process.

    Raises:
        torch.OutOfMemoryError: if not even a single example fits into memory.
    """
    model.eval()
    batch_size = trainer.eval_batch_size or BATCH_SIZES[processes.device.type]
    while (share := _evaluate_share(model, test, collate, batch_size, task, trainer, processes)) is None:
        batch_size //= 2
        log.warning("evaluation does not fit into memory: going on with trainer.eval_batch_size=%d", batch_size)
    losses, labels, outputs = map(torch.cat, zip(*processes.gather(share), strict=True))
    scores = {name: METRICS[name].function(labels.numpy(), outputs.numpy()) for name in metrics}
    return math.fsum(losses.tolist()) / len(losses), scores


def _evaluate_share(
    model: nn.Module,
    test: Encoded,
    collate: Collate,
    batch_size: int,
    task: Task,
    trainer: TrainerConfig,
    processes: Processes,
) -> list[_BatchResults] | None:
    """(losses, labels, outputs) of each batch of this process's share, on the CPU; None if memory did not suffice."""
    batches = test_batches(
        test,
        collate,
        batch_size=batch_size,
        process=processes.index,
        processes=processes.count,
        workers=trainer.workers,
        pin_memory=processes.device.type == "cuda",
    )
    results: list[_BatchResults] = []
    try:
        with torch.inference_mode():
            for inputs, labels in batches:
                inputs = {name: tensor.to(processes.device, non_blocking=True) for name, tensor in inputs.items()}
                with autocast(trainer.precision, processes.device):
                    outputs = outputs_of(model, inputs)
                outputs = outputs.float()
                losses = task.loss(outputs, labels.to(processes.device), "none")
                # The labels are copied, because a tensor from a worker process keeps a file open while it lives.
                results.append((losses.cpu(), labels.clone(), outputs.cpu()))
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
        # The exception keeps the tensors in memory. Returning ends the exception and frees them.
        return None
    return results
