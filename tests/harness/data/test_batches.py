from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from joblib.externals.loky.backend.context import LokyContext
from torch import Tensor

from tenslora.errors import TensLoRAError
from tenslora.harness.data import batches
from tenslora.harness.data.encoding import Encoded, Item

COUNT = 23


def collate(items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": torch.tensor([value for value, _ in items])}, torch.tensor([label for _, label in items])


def data(count: int = COUNT) -> Encoded:
    return Encoded(range(100, 100 + count), range(count), lambda value: value)


def train_batches(
    batch_size: int = 5,
    accumulation: int = 1,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    count: int = COUNT,
) -> batches.TrainBatches:
    return batches.TrainBatches(
        data(count),
        collate,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        process=process,
        processes=processes,
        workers=workers,
    )


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def labels(source: batches.TrainBatches, epoch: int = 1) -> list[list[int]]:
    return [batch.labels.tolist() for batch in source.epoch(epoch)]


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_an_epoch_has_every_example_once(batch_size: int) -> None:
    *full, last = labels(train_batches(batch_size))
    assert sorted([*flat(full), *last]) == list(range(COUNT))
    assert all(len(batch) == batch_size for batch in full)
    assert 0 < len(last) <= batch_size


def test_inputs_and_labels_stay_together() -> None:
    for batch in train_batches().epoch(3):
        assert torch.equal(batch.inputs["x"], batch.labels + 100)


def test_each_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(flat(labels(train_batches(seed=seed), epoch))) for seed in range(4) for epoch in range(1, 5)}
    assert len(orders) == 16
    assert tuple(range(COUNT)) not in orders


def test_the_order_depends_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = flat(labels(train_batches(), 2))
    torch.manual_seed(99)
    assert flat(labels(train_batches(batch_size=4, accumulation=3), 2)) == expected
    assert flat(labels(train_batches(workers=1), 2)) == expected
    monkeypatch.setattr("multiprocessing.context._default_context._actual_context", LokyContext())  # joblib's
    assert flat(labels(train_batches(workers=1), 2)) == expected
    source = train_batches()
    labels(source, 1)
    assert flat(labels(source, 2)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_test_batches_leave_the_random_numbers_of_the_program_alone(workers: int) -> None:
    before = torch.get_rng_state()
    assert sum(len(part) for _, part in batches.test_batches(data(), collate, batch_size=4, workers=workers)) == COUNT
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("batch_size", [5, 6, 7])
def test_processes_partition_each_batch(processes: int, batch_size: int) -> None:
    expected = labels(train_batches(batch_size))
    shares = [list(train_batches(batch_size, process=p, processes=processes).epoch(1)) for p in range(processes)]
    assert {len(share) for share in shares} == {len(expected)}  # all processes take part in every exchange
    for batch, parts in zip(expected, zip(*shares, strict=True), strict=True):
        real = [label for part in parts if part.weight for label in part.labels.tolist()]
        assert sorted(real) == sorted(batch)
        assert all(len(part.labels) for part in parts)
        sizes = [len(part.labels) for part in parts if part.weight]
        assert max(sizes) - min(sizes) <= 1
        assert len({part.closes_step for part in parts}) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 4, 100])
@pytest.mark.parametrize(("batch_size", "count"), [(5, 23), (7, 22), (6, 24), (2, 9), (64, 4), (1, 3)])
def test_weighted_losses_add_up_to_the_mean_over_the_step(
    processes: int, accumulation: int, batch_size: int, count: int
) -> None:
    losses = torch.linspace(-1, 3, count, dtype=torch.float64).exp()
    sources = [
        train_batches(batch_size, accumulation, process=p, processes=processes, count=count) for p in range(processes)
    ]
    batches_of_epoch = labels(train_batches(batch_size, count=count))
    expected = [flat(batches_of_epoch[i : i + accumulation]) for i in range(0, len(batches_of_epoch), accumulation)]
    steps: list[float] = []
    running = 0.0
    for parts in zip(*(source.epoch(1) for source in sources), strict=True):
        running += sum(part.weight * losses[part.labels].mean().item() for part in parts) / processes
        if parts[0].closes_step:
            steps.append(running)
            running = 0.0
    assert running == 0.0  # the last batch of an epoch closes its step
    assert steps == pytest.approx([losses[step].mean().item() for step in expected])
    assert {source.steps_per_epoch for source in sources} == {len(expected)}


def test_an_empty_share_has_no_weight() -> None:
    parts = [list(train_batches(7, process=p, processes=3, count=22).epoch(1))[-1] for p in range(3)]
    assert [part.weight for part in parts] == [3.0, 0.0, 0.0]
    assert [len(part.labels) for part in parts] == [1, 1, 1]


@pytest.mark.parametrize(
    ("accumulation", "closes"),
    [(1, [1, 1, 1, 1, 1]), (2, [0, 1, 0, 1, 1]), (3, [0, 0, 1, 0, 1]), (5, [0, 0, 0, 0, 1]), (9, [0, 0, 0, 0, 1])],
)
def test_accumulation_closes_steps(accumulation: int, closes: list[int]) -> None:
    source = train_batches(5, accumulation)
    assert [batch.closes_step for batch in source.epoch(1)] == [bool(c) for c in closes]
    assert source.steps_per_epoch == sum(closes)
    assert source.batches_per_epoch == math.ceil(COUNT / 5)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 9, 10])
def test_test_examples_are_shared_out_in_order(processes: int, count: int) -> None:
    shares = [
        [
            label
            for inputs, part in batches.test_batches(data(count), collate, batch_size=2, process=p, processes=processes)
            for label in part.tolist()
        ]
        for p in range(processes)
    ]
    assert sorted(flat(shares)) == list(range(count))
    assert all(share == sorted(share) for share in shares)


def grouped(count: int = 2000, batch_size: int = 16, process: int = 0, processes: int = 1) -> batches.TrainBatches:
    lengths = (torch.rand(count, generator=torch.Generator().manual_seed(1)).square() * 40 + 3).int().tolist()
    source = Encoded(lengths, range(count), lambda value: value, lengths=lengths)
    return batches.TrainBatches(source, collate, batch_size=batch_size, seed=0, process=process, processes=processes)


@pytest.mark.parametrize(("count", "batch_size"), [(2000, 16), (23, 5), (4, 5), (1, 1), (500, 1)])
def test_grouped_by_length_an_epoch_has_every_example_once(count: int, batch_size: int) -> None:
    *full, last = labels(grouped(count, batch_size))
    assert sorted([*flat(full), *last]) == list(range(count))
    assert all(len(batch) == batch_size for batch in full)


def test_little_is_padding_if_grouped_by_length() -> None:
    def waste(source: batches.TrainBatches) -> float:
        widths = [batch.inputs["x"].tolist() for batch in source.epoch(1)]
        return 1 - sum(map(sum, widths)) / sum(max(row) * len(row) for row in widths)

    random = grouped()
    random.data.lengths = None
    assert waste(grouped()) < 0.1 < 0.5 < waste(random)


def test_grouped_by_length_batches_differ_from_epoch_to_epoch_and_come_in_random_order() -> None:
    first, second = (labels(grouped(), epoch) for epoch in (1, 2))
    assert not set(map(frozenset, first)) & set(map(frozenset, second))
    widths = [max(batch.inputs["x"].tolist()) for batch in grouped().epoch(1)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    assert labels(grouped(), 2) == second


def test_grouped_by_length_processes_partition_each_batch_and_the_test_split() -> None:
    shares = [labels(grouped(processes=2, process=p)) for p in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in labels(grouped())]
    data = grouped(23).data
    tested = [
        [
            inputs["x"].tolist()
            for inputs, _ in batches.test_batches(data, collate, batch_size=4, process=p, processes=2)
        ]
        for p in range(2)
    ]
    for share in tested:
        assert flat(share) == sorted(flat(share), reverse=True)
    assert sorted(flat(map(flat, tested))) == sorted(data.inputs)


def test_workers_whose_sockets_would_have_too_long_a_path_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/".ljust(76, "é"))
    with pytest.raises(
        TensLoRAError, match=r"^trainer\.workers=2: the folder for temporary files, /tmp/é+, must have at m"
    ):
        next(train_batches(workers=2).epoch(1))
    next(train_batches(workers=0).epoch(1))


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    next(train_batches(workers=2).epoch(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15))
    with pytest.raises(TensLoRAError, match=r"^trainer\.workers=2: needs \d+ bytes of shared memory for batches of"):
        next(train_batches(workers=2).epoch(1))
    next(train_batches(workers=0).epoch(1))


def test_workers_in_a_daemonic_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(TensLoRAError, match=r"^trainer\.workers=2: must be 0 in a daemonic process, such as one of m"):
        next(train_batches(workers=2).epoch(1))
    next(train_batches(workers=0).epoch(1))
