from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tenslora.adapter import Adapter
from tenslora.harness.training.parameter_groups import RATE_RATIO, parameter_groups
from tests.running import SHORT, configured, run


def groups(*overrides: str) -> list[tuple[float, float, set[str]]]:
    """(rate ratio, weight decay, names) of each group, for a small adapter and a head."""
    settings = configured(*overrides)
    assert settings.adapter is not None and settings.geometries is not None
    adapter = Adapter(settings.adapter, settings.geometries[0])
    parameters = {f"tenslora.{name}": p for name, p in adapter.named_parameters()}
    parameters["head.weight"] = torch.nn.Parameter(torch.zeros(2))
    names = {id(p): name for name, p in parameters.items()}
    return [
        (group[RATE_RATIO], group["weight_decay"], {names[id(p)] for p in group["params"]})
        for group in parameter_groups(parameters, adapter, settings.optimizer)
    ]


def test_by_default_all_parameters_are_one_group() -> None:
    [(ratio, decay, names)] = groups("tensor_mode=qkv_depth")
    assert (ratio, decay, len(names)) == (1.0, 0.01, 6)


@pytest.mark.parametrize(
    ("overrides", "starts_at_zero"),
    [
        (["tensor_mode=qkv_depth"], "core"),
        (["tensor_mode=lora"], "d_out"),
        (["tensor_mode=att_qkv_depth", "factorization=cp"], "d_head"),
        (["tensor_mode=qkv_depth", "factorization=tensor_train"], "d_out"),
    ],
)
def test_core_lr_ratio_is_for_the_parameter_that_starts_at_zero(overrides: list[str], starts_at_zero: str) -> None:
    by_ratio = {ratio: names for ratio, _, names in groups(*overrides, "optimizer.core_lr_ratio=16")}
    assert set(by_ratio) == {1.0, 16.0}
    assert all(name.endswith(f".{starts_at_zero}") for name in by_ratio[16.0])
    assert not any(name.endswith(f".{starts_at_zero}") for name in by_ratio[1.0])
    assert "head.weight" in by_ratio[1.0]


def test_each_factor_may_have_its_own_weight_decay() -> None:
    words = ["optimizer.factor_weight_decay.core=0", "optimizer.factor_weight_decay.head=0.5"]
    decays = {name: decay for _, decay, names in groups("tensor_mode=att_qkv", *words) for name in names}
    # The mode `head` has its own weight decay, and the classification head has not.
    assert decays["head.weight"] == 0.01
    assert {decay for name, decay in decays.items() if name.endswith(".head")} == {0.5}
    assert {decay for name, decay in decays.items() if name.endswith(".core")} == {0.0}
    assert {decay for name, decay in decays.items() if name.endswith(".d_in")} == {0.01}


def test_a_weight_decay_without_its_factor_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    words = [f"optimizer.factor_weight_decay.{factor}=0.5" for factor in ("site", "core")]
    groups("tensor_mode=qkv_depth", *words)
    effect = "has no effect, because the adapter has only core, d_in, d_out, depth, projection"
    assert caplog.messages == [f"optimizer.factor_weight_decay.site=0.5: {effect}"]


def test_with_a_ratio_of_zero_the_core_stays_at_zero(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "trainer.epochs=1", "tensor_mode=qkv_depth", "optimizer.core_lr_ratio=0")
    weights = load_file(tmp_path / "adapter.safetensors")
    assert weights["tensors.0.core"].abs().max() == 0
