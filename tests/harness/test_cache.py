"""What is loaded once per process: when it is let go, and that no run notices what another has done to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenslora.harness.backbones import load_backbone, timm_models
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import validate
from tenslora.harness.data import images
from tenslora.harness.data.images import digits
from tests.running import SHORT, composed, run


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_it_keeps_as_many_as_it_says_and_lets_go_of_what_was_not_asked_for_the_longest(size: int) -> None:
    loads = []

    @cache_latest(size)
    def load(name: int) -> list[int]:
        loads.append(name)
        return [name]

    first = [load(name) for name in range(size)]
    for name in range(size):
        assert load(name) is first[name]
    assert loads == list(range(size))
    load(0)  # so that 1 is the one not asked for the longest; 0 where there is no other
    load(size)
    oldest = min(1, size - 1)
    for name in set(range(size)) - {oldest}:
        assert load(name) is first[name]
    assert load(oldest) is not first[oldest]
    assert loads == [*range(size + 1), oldest]


def test_one_is_let_go_before_another_is_made() -> None:
    class Heavy:
        pass

    alive: weakref.WeakSet[Heavy] = weakref.WeakSet()

    @cache_latest(2)
    def load(_: int) -> Heavy:
        assert len(alive) < 2
        made = Heavy()
        alive.add(made)
        return made

    for name in range(5):
        load(name)
    assert len(alive) == 2


def test_arguments_are_compared_as_values_and_need_no_hash() -> None:
    @dataclass
    class Config:
        names: list[str]

    @cache_latest(2)
    def load(config: Config, seed: int, extra: Any = None) -> object:  # noqa: ARG001
        return object()

    first = load(Config(["a"]), 0)
    assert load(Config(["a"]), 0) is first
    assert load(Config(["a"]), 1) is not first
    assert load(Config(["b"]), 0) is not first
    other = load(Config(["a"]), 0, extra={"x": [1]})
    assert load(Config(["a"]), 0, extra={"x": [1]}) is other
    assert load(Config(["a"]), 0, extra={"x": [2]}) is not other


def test_what_could_not_be_loaded_is_tried_again() -> None:
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


def test_runs_that_share_a_process_neither_disturb_each_other_nor_read_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever earlier tests of this process have left there makes room for something else.
    digits(range(2))
    load_backbone(validate(composed("model.pretrained=false")).model, 2, 0)
    reads = []

    def counting(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return read(*args, **kwargs)

        return reading

    monkeypatch.setattr(timm_models, "_read_weights", counting("weights", timm_models._read_weights))
    monkeypatch.setattr(images, "_uci_digits", counting("dataset", images._uci_digits))

    job = [*SHORT, "tensor_mode=qkv_depth", "adapter.dropout=0.2"]
    first = run(tmp_path / "first", *job)
    run(tmp_path / "full", *SHORT, "tensor_mode=full", "optimizer.lr=0.01")  # changes every weight of its model
    run(tmp_path / "flipped", *SHORT, "tensor_mode=lora", "dataset.transform.flip=true")
    seeds = {seed: run(tmp_path / f"seed{seed}", *job, f"seed={seed}") for seed in (1, 0)}
    assert sorted(reads) == ["dataset", "weights"]

    assert seeds[0]["metrics"] == first["metrics"]
    assert seeds[1]["metrics"]["history"] != first["metrics"]["history"]
    for file in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "seed0" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
        assert (tmp_path / "seed1" / file).read_bytes() != (tmp_path / "first" / file).read_bytes()
