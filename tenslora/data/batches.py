"""The order of examples: a function of the seed and the epoch alone, shared out over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from tenslora.data.encoding import Collate, Encoded


@dataclass(frozen=True)
class Batch:
    """One process's part of one forward pass.

    weight: by which the mean loss over `labels` enters the step's gradient, so that the mean over processes and
    the sum over a step's batches is the mean over all examples of the step, however unevenly they fall.
    closes_step: whether the optimizer steps after this batch.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: float
    closes_step: bool


class TrainBatches:
    """The training batches of every epoch.

    Args:
        data, collate: as `encode` gives them.
        batch_size: examples per forward pass over all processes. accumulation: forward passes per optimizer step.
        seed: with the epoch it decides the order.
        process, processes: which share of each batch is this process's.
        workers: processes that prepare batches ahead. pin_memory: for a faster copy to a GPU.
    """

    def __init__(
        self,
        data: Encoded,
        collate: Collate,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.data, self.collate = data, collate
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.process, self.processes = process, processes
        self.workers, self.pin_memory = workers, pin_memory
        self.batches_per_epoch = math.ceil(len(data) / batch_size)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / accumulation)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of the examples in an epoch."""
        return np.random.default_rng([self.seed, epoch, 0x0D3]).permutation(len(self.data))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in order."""
        order = self.order(epoch).tolist()
        self.data.stream = (self.seed, epoch)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        mine = [batch[self.process :: self.processes] for batch in batches]
        loader = _loader(
            self.data,
            # A process with no share of the last batch runs an example at weight 0: all must join the exchange.
            [share or batch[:1] for share, batch in zip(mine, batches, strict=True)],
            self.collate,
            self.workers,
            self.pin_memory,
        )
        for index, (inputs, labels) in enumerate(loader):
            first = index - index % self.accumulation
            total = sum(map(len, batches[first : first + self.accumulation]))
            yield Batch(
                inputs,
                labels,
                weight=len(mine[index]) * self.processes / total,
                closes_step=(index + 1) % self.accumulation == 0 or index + 1 == len(batches),
            )


def test_batches(
    data: Encoded,
    collate: Collate,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[dict[str, Tensor], Tensor]]:
    """This process's share of the test examples, every `processes`-th, in order."""
    mine = list(range(process, len(data), processes))
    return _loader(
        data, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)], collate, workers, pin_memory
    )


def _loader(
    data: Encoded, batches: list[list[int]], collate: Collate, workers: int, pin_memory: bool
) -> DataLoader[tuple[dict[str, Tensor], Tensor]]:
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
    )
    return loader
