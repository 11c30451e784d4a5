"""The loss, the metrics and the predictions of a model on whole test splits."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tenslora.errors import TensLoRAError
from tenslora.harness.config import TrainerConfig
from tenslora.harness.data.batches import order_of_results, test_batches, workers_explained
from tenslora.harness.data.encoding import Collate, Encoded, EncodedDataset
from tenslora.harness.predictions import Predictions
from tenslora.harness.training.metrics import METRICS
from tenslora.harness.training.precision import autocast
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.tasks import TASKS, Task, evaluation_mode, outputs_of

log = logging.getLogger(__name__)

BATCH_SIZES = {"cpu": 128, "cuda": 512}
"""The examples per batch to try first on each kind of device, where `trainer.eval_batch_size` is not set."""

_BatchResults = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the examples that it is scored on, the same on every process.

    Args:
        loss: the mean loss on the test split or validation split.
        scores: the score of each metric on that split; for a further test split, such as "mismatched", the scores are
            named accuracy_mismatched and the like.
        predictions: the predictions for that split, named "test" or "validation", and for each further test split.
    """

    loss: float
    scores: dict[str, float]
    predictions: dict[str, Predictions]


def evaluate(
    model: nn.Module,
    data: EncodedDataset,
    *,
    trainer: TrainerConfig,
    processes: Processes,
    count: int | None = None,
) -> Evaluation:
    """Score a model on all of a dataset's examples for that, each process taking its share of the examples.

    If a batch does not fit into memory, smaller batches are tried. The scores do not depend on the batch size.

    Args:
        model: a model on the processes' device. Its modules stay in the modes that they are in.
        data: the dataset.
        trainer: the settings that hold the batch size, the precision and the number of workers.
        processes: the processes that share the work.
        count: the number of outputs that the model must have for an example; None for any.

    Returns:
        The loss, the scores and the predictions.

    Raises:
        TensLoRAError: for a model with another number of outputs.
        torch.OutOfMemoryError: if not even a single example fits into memory.
    """
    task, tests = TASKS[data.task], {data.scored_on: data.scored, **data.more_tests}
    losses: dict[str, NDArray[Any]] = {}
    predictions: dict[str, Predictions] = {}
    for split, examples in tests.items():
        losses[split], predictions[split] = predict(model, examples, data.collate, task, trainer, processes, count)
    with np.errstate(all="ignore"):  # whatever the program that calls this has set
        scores = {
            metric if split == data.scored_on else f"{metric}_{split}": METRICS[metric].score(
                of_split.labels, of_split.outputs
            )
            for split, of_split in predictions.items()
            for metric in data.metrics
        }
    return Evaluation(math.fsum(losses[data.scored_on].tolist()) / len(data.scored), scores, predictions)


def predict(
    model: nn.Module,
    examples: Encoded,
    collate: Collate,
    task: Task,
    trainer: TrainerConfig,
    processes: Processes,
    count: int | None = None,
) -> tuple[NDArray[Any], Predictions]:
    """A model's outputs for examples, computed in batches as `evaluate` computes them.

    Args:
        model: a model on the processes' device. Its modules stay in the modes that they are in.
        examples: the examples.
        collate: makes a batch of some examples.
        task: the task, whose loss is computed.
        trainer: the settings that hold the batch size, the precision and the number of workers.
        processes: the processes that share the work.
        count: the number of outputs that the model must have for an example; None for any.

    Returns:
        (the loss of each example, the predictions), in the order of the examples and the same on every process.

    Raises:
        TensLoRAError: for a model with another number of outputs.
        torch.OutOfMemoryError: if not even a single example fits into memory.
    """
    batch_size = trainer.eval_batch_size or BATCH_SIZES[processes.device.type]
    with evaluation_mode(model):
        while (share := _predict_share(model, examples, collate, batch_size, task, trainer, processes, count)) is None:
            batch_size //= 2
            log.warning("evaluation does not fit into memory: going on with trainer.eval_batch_size=%d", batch_size)
    in_order = np.argsort(order_of_results(examples, processes.count))
    losses, labels, outputs = (
        torch.cat(parts).numpy()[in_order] for parts in zip(*processes.gather(share), strict=True)
    )
    return losses, Predictions(labels, outputs)


def _predict_share(
    model: nn.Module,
    examples: Encoded,
    collate: Collate,
    batch_size: int,
    task: Task,
    trainer: TrainerConfig,
    processes: Processes,
    count: int | None,
) -> list[_BatchResults] | None:
    """(losses, labels, outputs) of each batch of this process's share, on the CPU; None if memory did not suffice."""
    batches = test_batches(
        examples,
        collate,
        batch_size=batch_size,
        process=processes.index,
        processes=processes.count,
        workers=trainer.workers,
        pin_memory=processes.device.type == "cuda",
    )
    results: list[_BatchResults] = []
    try:
        with torch.inference_mode(), workers_explained(trainer.workers):
            for inputs, labels in batches:
                inputs = {name: tensor.to(processes.device, non_blocking=True) for name, tensor in inputs.items()}
                with autocast(trainer.precision, processes.device):
                    outputs = outputs_of(model, inputs)
                if count is not None and outputs.shape[1:] != (count,):
                    found = " x ".join(map(str, outputs.shape[1:]))
                    raise TensLoRAError(
                        f"{type(model).__name__}: must have {count} output{'s' * (count > 1)} for an example, as in "
                        f"the run, and has {found or 'no axis for them'}; load the run again"
                    )
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
