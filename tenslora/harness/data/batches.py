"""The order of examples: a function of the seed and the epoch alone, shared out over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from tenslora.harness.data.encoding import Collate, Encoded

POOL_BATCHES = 50


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
        data, collate: as `encode` gives them. Where the data has lengths, examples of like length share a batch, so
            that little is padding.
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

    def order(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch; all batches but the last are full."""
        random = np.random.default_rng([self.seed, epoch, 0x0D3])
        order = random.permutation(len(self.data)).tolist()
        if self.data.lengths is None:
            return _cut(order, self.batch_size)
        # As transformers groups by length: sorted within pools of batches drawn at random, few pools enough that
        # an epoch mixes, many enough that batches differ from epoch to epoch. The batches come in random order.
        pool = self.batch_size * min(POOL_BATCHES, max(1, self.batches_per_epoch // 4))
        length = self.data.lengths.__getitem__
        by_length = [i for part in _cut(order, pool) for i in sorted(part, key=length, reverse=True)]
        *batches, last = _cut(by_length, self.batch_size)
        return [*(batches[i] for i in random.permutation(len(batches))), last]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in order."""
        batches = self.order(epoch)
        self.data.stream = (self.seed, epoch)
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
    """This process's share of the test examples, every `processes`-th, in order, or longest first."""
    order = list(range(len(data)))
    if data.lengths is not None:
        order.sort(key=data.lengths.__getitem__, reverse=True)
    return _loader(data, _cut(order[process::processes], batch_size), collate, workers, pin_memory)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


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
