"""The cache itself, and that the runs of one process do not disturb each other through it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenslora.harness.backbones import load_backbone, timm_models
from tenslora.harness.cache import cache_latest, reading_anew
from tenslora.harness.data import digits
from tests.running import SHORT, configured, run


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_result_that_was_asked_for_longest_ago_makes_room(size: int) -> None:
    loads = []

    @cache_latest(size)
    def load(name: int) -> list[int]:
        loads.append(name)
        return [name]

    results = [load(name) for name in range(size)]
    for name in range(size):
        assert load(name) is results[name]
    assert loads == list(range(size))
    load(0)  # now 1 was asked for longest ago, or 0 if it is the only one
    load(size)
    oldest = min(1, size - 1)
    for name in set(range(size)) - {oldest}:
        assert load(name) is results[name]
    assert load(oldest) is not results[oldest]
    assert loads == [*range(size + 1), oldest]


def test_a_result_is_dropped_before_the_next_one_is_loaded() -> None:
    class Heavy:
        pass

    alive: weakref.WeakSet[Heavy] = weakref.WeakSet()

    @cache_latest(2)
    def load(_: int) -> Heavy:
        assert len(alive) < 2
        heavy = Heavy()
        alive.add(heavy)
        return heavy

    for name in range(5):
        load(name)
    assert len(alive) == 2


def test_arguments_are_compared_as_values_and_need_no_hash() -> None:
    @dataclass
    class Config:
        names: list[str]

    @cache_latest(2)
    def load(config: Config, seed: int, extra: Any = None) -> list[Any]:
        return [config, seed, extra]

    result = load(Config(["a"]), 0)
    assert load(Config(["a"]), 0) is result
    assert load(Config(["a"]), 1) is not result
    assert load(Config(["b"]), 0) is not result
    result = load(Config(["a"]), 0, extra={"x": [1]})
    assert load(Config(["a"]), 0, extra={"x": [1]}) is result
    assert load(Config(["a"]), 0, extra={"x": [2]}) is not result


def test_a_failed_load_is_tried_again() -> None:
    tries = []

    @cache_latest(1)
    def load(name: str) -> str:
        tries.append(name)
        if len(tries) == 1:
            raise OSError("not there yet")
        return name

    with pytest.raises(OSError, match="not there yet"):
        load("a")
    assert load("a") == load("a") == "a"
    assert tries == ["a", "a"]


def test_what_is_read_anew_neither_comes_from_a_cache_nor_stays_in_it() -> None:
    loads = []

    @cache_latest(1)
    def load(name: str) -> list[str]:
        loads.append(name)
        return [name]

    kept = load("a")

    @reading_anew()
    def read(name: str) -> list[str]:
        return load(name)

    assert read("a") is not read("a")
    with pytest.raises(OSError, match="b"), reading_anew():
        read("b")
        raise OSError("b")
    assert load("a") is kept
    assert loads == ["a", "a", "a", "b"]


def test_runs_of_one_process_do_not_disturb_each_other_and_read_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other loads take the place of what earlier tests left in the caches.
    digits.load_digits(range(2))
    load_backbone(configured("model.pretrained=false").model, 2, 0)
    reads = []

    def count_reads(module: Any, function: str) -> None:
        read = getattr(module, function)

        def counted(*args: Any) -> Any:
            reads.append(function)
            return read(*args)

        monkeypatch.setattr(module, function, counted)

    count_reads(timm_models, "_read_weights")
    count_reads(digits, "read_uci_digits")

    job = [*SHORT, "tensor_mode=qkv_depth", "adapter.dropout=0.2"]
    first = run(tmp_path / "first", *job)
    run(tmp_path / "full", *SHORT, "tensor_mode=full", "optimizer.lr=0.01")  # changes all weights of its model
    run(tmp_path / "flipped", *SHORT, "tensor_mode=lora", "dataset.transform.flip=true")
    seeds = {seed: run(tmp_path / f"seed{seed}", *job, f"seed={seed}") for seed in (1, 0)}
    assert sorted(reads) == ["_read_weights", "read_uci_digits"]

    assert seeds[0]["metrics"] == first["metrics"]
    assert seeds[1]["metrics"]["history"] != first["metrics"]["history"]
    for file in ("adapter.safetensors", "head.safetensors"):
        weights = (tmp_path / "first" / file).read_bytes()
        assert (tmp_path / "seed0" / file).read_bytes() == weights
        assert (tmp_path / "seed1" / file).read_bytes() != weights
