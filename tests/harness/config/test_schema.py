"""What the types work out from the settings that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.ranks import RankStrategy
from tests.running import configured


def test_the_strategy_is_the_adapters_and_has_every_setting() -> None:
    run = configured("rank_strategy.rank=6", "rank_strategy.rule=uniform", "rank_strategy.tolerance=0.02")
    assert run.rank_strategy == RankStrategy("isoparameters", rank=6, rule="uniform", tolerance=0.02)
    assert run.adapter is not None
    assert run.adapter.rank_strategy == run.rank_strategy
    explicit = configured("rank_strategy=explicit", "rank_strategy.ranks=[8,8,3,4]").rank_strategy
    assert explicit == RankStrategy("explicit", ranks=(8, 8, 3, 4))
    assert configured("rank_strategy=isorank", "rank_strategy.cap=true").rank_strategy.cap


def test_a_run_without_an_adapter_keeps_the_rank_that_its_record_compares_with() -> None:
    run = configured("tensor_mode=head_only", "rank_strategy.rank=6")
    assert run.adapter is None
    assert run.rank_strategy.rank == 6


@pytest.mark.parametrize(
    ("words", "geometry"),
    [
        ("", Geometry(64, 4, 16, 4, d_ff=256)),
        ("adapter.adapt=mlp", Geometry(64, 4, 16, 4, adapt="mlp", d_ff=256)),
        ("adapter.adapt=mlp tensor_mode=full", Geometry(64, 4, 16, 4, d_ff=256)),  # an adapter's setting, without one
        ("~model.geometry.d_ff", Geometry(64, 4, 16, 4)),
        ("~model.geometry.d_ff adapter.adapt=mlp", None),
        ("model.geometry=null", None),
    ],
)
def test_the_geometry_is_the_declared_one_with_the_matrices_that_are_adapted(
    words: str, geometry: Geometry | None
) -> None:
    assert configured(*words.split()).geometries == (geometry and (geometry,))


@pytest.mark.parametrize(
    ("words", "strategy", "factorization"),
    [
        ("tensor_mode=qkv rank_strategy=isorank", "isorank", ""),
        ("tensor_mode=qkv rank_strategy=isorank factorization=cp", "isorank", "cp"),
        ("tensor_mode=lora rank_strategy=isorank factorization=cp", "", ""),
        ("tensor_mode=lora rank_strategy=explicit rank_strategy.ranks=[4]", "explicit", ""),
        ("tensor_mode=head_only factorization=cp", "", ""),
    ],
)
def test_a_row_is_named_after_what_tells_runs_apart(words: str, strategy: str, factorization: str) -> None:
    run = configured(*words.split())
    assert (run.row_strategy, run.row_factorization) == (strategy, factorization)


@pytest.mark.parametrize("mode", ["qkv", "full"])
def test_another_seed_is_what_the_command_line_would_have_made(mode: str) -> None:
    assert configured(f"tensor_mode={mode}").with_seed(7) == configured(f"tensor_mode={mode}", "seed=7")


@pytest.mark.parametrize("seed", [-1, 1.5, "2"])
def test_another_seed_is_checked(seed: Any) -> None:
    with pytest.raises(TensLoRAError, match=rf"^seed={seed}: must be a whole number, at least 0$"):
        configured().with_seed(seed)


def test_a_checkpoint_and_a_lora_may_lie_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my-bert").mkdir()
    model = configured("dataset=text", "dataset.root=a.csv", "model=hf_text", 'model.checkpoint="~/my-bert"').model
    assert (model.checkpoint, model.name) == (str(tmp_path / "my-bert"), "my-bert")
    assert configured('warm_start="~/lora"').warm_start == str(tmp_path / "lora")
