"""The first step: the formula and the measurement against real first steps of AdamW on random gradients."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenslora.adapter import Adapter, load_adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.attachment import adapter_of, merge
from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.factorizations.factorization import Factorization
from tenslora.first_step import first_step, lora_first_step, relative_first_step
from tenslora.ranks import RankStrategy
from tests.models import attached, build, inputs, logits

GEOMETRY = Geometry(d_in=96, heads=6, d_head=16, layers=5)
GROUPED = replace(GEOMETRY, layers=4, kv_heads=2, d_ff=192, adapt="all")
VIT_BASE = Geometry(d_in=768, heads=12, d_head=64, layers=12)
WITHIN_MODES = RankStrategy("isorank", rank=3)
ABOVE_ONE_MODE = RankStrategy("isorank", rank=4)  # there are three projections


def real_first_step(adapter: Adapter, lr: float = 1e-3) -> float:
    """The matrices' movement in one step of torch's AdamW, on a loss that gives each update a random gradient."""
    generator = torch.Generator().manual_seed(0)
    layers = range(adapter.geometry.layers)
    updates = [adapter.scale * update for layer in layers for update in adapter.dense(layer)]
    loss = torch.stack([(u * torch.randn(u.shape, generator=generator)).sum() for u in updates]).sum()
    torch.autograd.backward(loss)
    torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0, eps=1e-12).step()
    squares = [(adapter.scale * u).square().sum().item() for layer in layers for u in adapter.dense(layer)]
    return math.sqrt(sum(squares) / len(squares)) / lr


@pytest.mark.parametrize("geometry", [GEOMETRY, GROUPED], ids=["qkv", "grouped-all"])
@pytest.mark.parametrize("strategy", [WITHIN_MODES, ABOVE_ONE_MODE], ids=["within", "above"])
@pytest.mark.parametrize("factorization", [name for name in FACTORIZATIONS if name != "tensor_guide"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_the_formula_gives_the_first_step_of_adamw(
    construction: str, factorization: str, strategy: RankStrategy, geometry: Geometry
) -> None:
    steps = []
    # Matrices narrower than their slices leave out a part of them, whose share depends on the factors as drawn.
    for seed in range(4 if geometry is GROUPED and strategy is WITHIN_MODES else 1):
        config = AdapterConfig(
            construction, strategy, alpha=3.0, factorization=factorization, adapt=geometry.adapt, seed=seed
        )
        adapter = Adapter(config, geometry)
        assert adapter.first_step == 3.0 * (first_step(construction, geometry, adapter.ranks, factorization) or 0)
        steps.append(real_first_step(adapter))
    # The signs of a core's gradient correlate with a factor that has more columns than rows.
    tolerance = 0.05 if strategy is WITHIN_MODES else 0.15
    assert statistics.fmean(steps) == pytest.approx(adapter.first_step, rel=tolerance)


@pytest.mark.parametrize("init", ["normal", "kaiming_uniform"])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("construction", ["att", "depth", "att_qkv_depth", "site"])
def test_the_first_step_of_other_starts_is_measured(construction: str, factorization: str, init: str) -> None:
    adapter = Adapter(AdapterConfig(construction, WITHIN_MODES, factorization=factorization, init=init), GEOMETRY)
    assert all(update.abs().max() == 0 for layer in range(5) for update in adapter.dense(layer))
    assert adapter.first_step == pytest.approx(real_first_step(adapter), rel=0.15)


def test_the_numbers_of_the_design_for_vit_base() -> None:
    def of(construction: str, strategy: str) -> float | None:
        ranks = RankStrategy(strategy).resolve(construction, VIT_BASE)
        step = first_step(construction, VIT_BASE, ranks)
        return step and round(step, 1)

    paper = ("lora", "att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
    assert [of(name, "isorank") for name in paper] == [32.0, 8.0, 4.0, 2.3, 8.0, 4.6, 2.3, 4.6]
    assert [of(name, "isoparameters") for name in paper] == pytest.approx([32, 20, 11, 37, 47, 69, 60, 75], abs=0.75)


def test_a_factorization_without_a_formula_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig("qkv_depth", WITHIN_MODES)
    by_formula = Adapter(config, GEOMETRY)
    monkeypatch.setattr("tenslora.factorizations.tucker.Tucker.squared_first_step", Factorization.squared_first_step)
    assert first_step("qkv_depth", GEOMETRY, by_formula.ranks) is None
    measured = Adapter(config, GEOMETRY)
    assert measured.first_step == pytest.approx(by_formula.first_step, rel=0.01)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_scaling_gives_every_construction_loras_first_step(construction: str, factorization: str) -> None:
    config = AdapterConfig(construction, WITHIN_MODES, alpha=2.0, factorization=factorization, scaling="first_step")
    adapter = Adapter(config, GEOMETRY)
    assert adapter.first_step == pytest.approx(2.0 * lora_first_step(GEOMETRY, 3), rel=1e-12)
    tolerance = 0.15 if factorization == "tensor_guide" else 0.05  # is measured, as left and right share cores
    assert real_first_step(adapter) == pytest.approx(2.0 * lora_first_step(GEOMETRY, 3), rel=tolerance)


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_a_saved_adapter_keeps_its_scale(tmp_path: Path, init: str) -> None:
    adapter = Adapter(AdapterConfig("att_qkv", scaling="first_step", init=init), GEOMETRY)
    real_first_step(adapter)  # trains the tensors: a measurement would give another number from here on
    loaded = load_adapter(adapter.save(tmp_path / "adapter.safetensors"))
    assert (loaded.scale, loaded.first_step) == (adapter.scale, adapter.first_step)
    assert loaded.scale != loaded.config.alpha


def test_a_merged_model_has_the_scaled_update() -> None:
    model, batch = build("separate"), inputs("separate")
    adapter = attached(model, "qkv_depth", scaling="first_step")
    assert adapter.scale != pytest.approx(adapter.config.alpha, rel=0.1)
    before = logits(model, batch)
    other = copy.deepcopy(model)
    merge(model)
    torch.testing.assert_close(logits(model, batch), before)
    torch.testing.assert_close(logits(other, batch), before)
    adapter_of(other).scale = adapter.config.alpha  # the scale matters: without it, the outputs differ
    assert not torch.allclose(logits(other, batch), before, atol=1e-4)


def test_scaling_is_one_of_two_words() -> None:
    with pytest.raises(TensLoRAError, match=r"^scaling=equal: must be one of direct, first_step$"):
        AdapterConfig(scaling="equal")


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("mode", ["lora", "att", "depth", "qkv_depth"])
@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_the_relative_first_step_is_the_ratio_of_the_adapters_own(mode: str, init: str, factorization: str) -> None:
    strategy, geometry = RankStrategy("isorank", rank=2), GEOMETRY
    lora = Adapter(AdapterConfig("lora", strategy), geometry).first_step
    config = AdapterConfig(mode, strategy, init=init, factorization=factorization)
    ratio = relative_first_step(config, geometry)
    known = mode == "lora" or (init == "orthogonal" and factorization in ("tucker", "tensor_train"))
    if not known:  # it can only be measured
        assert ratio is None or factorization not in ("tucker", "tensor_train")
        assert relative_first_step(replace(config, scaling="first_step"), geometry) == 1
        return
    adapter = Adapter(config, geometry)
    assert ratio == pytest.approx(adapter.first_step / lora, rel=1e-6)
    assert relative_first_step(replace(config, scaling="first_step"), geometry) == 1
    higher = tuple(rank + 1 for rank in adapter.ranks)
    expected = Adapter(config, geometry, ranks=higher).first_step / lora
    assert relative_first_step(config, geometry, higher) == pytest.approx(expected, rel=1e-6)
