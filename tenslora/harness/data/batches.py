"""The batches of an epoch. Their order is a function of the seed and the epoch, and all processes share each batch."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.data.encoding import Collate, Encoded

POOL_BATCHES = 50
"""The largest number of batches among which examples are sorted by length."""


SHARED_MEMORY = "/dev/shm"
"""Where worker processes leave their batches."""

LONGEST_TEMPORARY_FOLDER = 75
"""In bytes. multiprocessing makes a socket in it whose path is 32 bytes longer, and Linux allows 107."""


@dataclass(frozen=True)
class Batch:
    """One process's share of one forward pass.

    Args:
        inputs: the model's inputs, by keyword.
        labels: the labels, of shape (examples,).
        weight: multiplies the mean loss over `labels`. Summed over the batches of a step and averaged over the
            processes, the weighted losses are the mean loss over all examples of the step, even if shares differ in
            size.
        closes_step: whether the optimizer steps after this batch.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: float
    closes_step: bool


class TrainBatches:
    """The training batches of every epoch.

    Args:
        data: the training examples. If they have lengths, examples of similar length share a batch, so that the batch
            has little padding.
        collate: makes a batch of some examples.
        batch_size: the number of examples per forward pass, over all processes.
        accumulation: the number of forward passes per optimizer step.
        seed: the seed. The order depends on the seed and the epoch.
        process: the index of this process, from 0.
        processes: the number of processes that share each batch.
        workers: the number of worker processes that read and encode examples ahead of the training.
        pin_memory: whether batches are in page-locked memory, from which a copy to a GPU is faster.
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
        """The batches of an epoch, over all processes. Only the last batch may be smaller than the others.

        Args:
            epoch: the number of the epoch.

        Returns:
            The indices of the examples of each batch.
        """
        random = np.random.default_rng([self.seed, epoch, 0x0D3])
        order = random.permutation(len(self.data)).tolist()
        if self.data.lengths is None:
            return _cut(order, self.batch_size)
        # Examples are grouped by length as in transformers: they are sorted within random pools of batches. There are
        # few enough pools to make padding rare, and enough to make the batches of two epochs differ. The batches are
        # then put in random order.
        pool = self.batch_size * min(POOL_BATCHES, max(1, self.batches_per_epoch // 4))
        length = self.data.lengths.__getitem__
        by_length = [i for part in _cut(order, pool) for i in sorted(part, key=length, reverse=True)]
        *batches, last = _cut(by_length, self.batch_size)
        return [*(batches[i] for i in random.permutation(len(batches))), last]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's shares of the batches of one epoch, in order.

        Args:
            epoch: the number of the epoch.
        """
        batches = self.order(epoch)
        self.data.stream = (self.seed, epoch)
        shares = [batch[self.process :: self.processes] for batch in batches]
        loader = _loader(
            self.data,
            # All processes must take part in each exchange of gradients. A process without a share of the last batch
            # runs one example, with a weight of 0.
            [share or batch[:1] for share, batch in zip(shares, batches, strict=True)],
            self.collate,
            self.workers,
            self.pin_memory,
        )
        for index, (inputs, labels) in enumerate(loader):
            first = index - index % self.accumulation
            examples_of_step = sum(map(len, batches[first : first + self.accumulation]))
            yield Batch(
                inputs,
                labels,
                weight=len(shares[index]) * self.processes / examples_of_step,
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
    """The batches of this process's share of the test examples.

    The examples come in the order of `data`. If they have lengths, the longest examples come first: there is then
    little padding, and a batch size that does not fit into memory fails at once. Nothing is drawn from torch's random
    numbers.

    Args:
        data: the test examples.
        collate: makes a batch of some examples.
        batch_size: the number of examples per batch.
        process: the index of this process, from 0.
        processes: the number of processes that share the examples. Each takes every `processes`-th example.
        workers: the number of worker processes that read and encode examples ahead of the evaluation.
        pin_memory: whether batches are in page-locked memory, from which a copy to a GPU is faster.

    Returns:
        (inputs, labels) of each batch.
    """
    share = _test_order(data)[process::processes]
    # torch draws a number for its workers, which must not be one of the program's.
    own = torch.Generator(torch.get_default_device())
    return _loader(data, _cut(share, batch_size), collate, workers, pin_memory, own)


def order_of_results(data: Encoded, processes: int) -> list[int]:
    """The index of each test example, in the order in which the processes' shares hold them one after another.

    Args:
        data: the test examples.
        processes: the number of processes that share the examples.
    """
    order = _test_order(data)
    return [index for process in range(processes) for index in order[process::processes]]


@contextlib.contextmanager
def workers_explained(workers: int) -> Iterator[None]:
    """A context in which worker processes read examples. If one of them is killed, a line says so.

    torch raises its error wherever the program is at that moment.

    Args:
        workers: their number.

    Raises:
        TensLoRAError: if one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        method = _start_method()
        guard = ""
        if method != "fork":  # the process has begun with the program's main file
            guard = f'; or, with the start method {method}, the program has no `if __name__ == "__main__":`'
        raise TensLoRAError(
            f"trainer.workers={workers}: a process that reads examples was killed, as where memory is short"
            f"{guard} ({first_line(error)}); resume=true goes on with a run that has a checkpoint"
        ) from error


def _test_order(data: Encoded) -> list[int]:
    order = list(range(len(data)))
    if data.lengths is not None:
        order.sort(key=data.lengths.__getitem__, reverse=True)
    return order


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _loader(
    data: Encoded,
    batches: list[list[int]],
    collate: Collate,
    workers: int,
    pin_memory: bool,
    generator: torch.Generator | None = None,
) -> DataLoader[tuple[dict[str, Tensor], Tensor]]:
    if workers and batches:
        if multiprocessing.current_process().daemon:
            raise TensLoRAError(
                f"trainer.workers={workers}: must be 0 in a daemonic process, such as one of multiprocessing.Pool"
            )
        _require_short_addresses(workers)
        _require_shared_memory(data, batches, collate, workers)
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=generator,
        multiprocessing_context=_start_method() if workers else None,
    )
    return loader


def _start_method() -> str:
    """How processes that read examples are started: the program's way."""
    own, methods = multiprocessing.get_start_method(), multiprocessing.get_all_start_methods()
    # In joblib's processes it is a way of joblib's, which starts none but joblib's. The system's own comes first.
    return own if own in methods else methods[0]


def _require_short_addresses(workers: int) -> None:
    # A worker that cannot make its socket prints tracebacks, and torch waits for the batch without an end.
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_TEMPORARY_FOLDER:
        raise TensLoRAError(
            f"trainer.workers={workers}: the folder for temporary files, {folder}, must have at most "
            f"{LONGEST_TEMPORARY_FOLDER} bytes in its path; set TMPDIR to a shorter one, or 0 workers, which need none"
        )


def _require_shared_memory(data: Encoded, batches: list[list[int]], collate: Collate, workers: int) -> None:
    # A worker whose batch does not fit there prints a traceback, and torch waits for the batch without an end.
    if not os.path.isdir(SHARED_MEMORY):
        return
    inputs, labels = collate([data[batches[0][0]]])
    size = max(map(len, batches))
    needed = size * sum(tensor.nbytes for tensor in (*inputs.values(), labels)) * min(workers, len(batches))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise TensLoRAError(
            f"trainer.workers={workers}: needs {needed:,} bytes of shared memory for batches of {size}, and "
            f"{SHARED_MEMORY} has {free:,}; 0 needs none, and docker run --shm-size gives a container more"
        )
