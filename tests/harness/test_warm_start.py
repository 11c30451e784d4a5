"""Runs that start from the updates of a LoRA that PEFT saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenslora.errors import TensLoRAError
from tenslora.harness.adapted_model import adapted_model
from tenslora.harness.backbones import load_backbone
from tenslora.harness.export import main as export
from tests.running import SHORT, configured, run


def test_a_run_may_start_from_a_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "lora", *SHORT, "tensor_mode=lora", "optimizer.lr=0.05", "trainer.epochs=2")
    export([str(tmp_path / "lora"), "--format", "peft"])
    with pytest.raises(TensLoRAError, match=r"^warm_start=\S+/lora: must be the folder of a LoRA .* --format peft "):
        run(tmp_path / "a", *SHORT, f"warm_start={tmp_path / 'lora'}")
    start = [f"warm_start={tmp_path / 'lora' / 'peft'}", "optimizer.lr=0", "optimizer.min_lr=0", "trainer.max_steps=1"]
    exact = run(tmp_path / "a", *SHORT, "tensor_mode=lora", *start)
    approximate = run(tmp_path / "b", *SHORT, "tensor_mode=qkv_depth", *start)
    cold = run(tmp_path / "c", *SHORT, "tensor_mode=qkv_depth", *start[1:])
    assert exact["warm_start"]["error"] < 1e-5
    assert 0 < approximate["warm_start"]["error"] < 1
    assert set(approximate["warm_start"]["energy"]) == {"d_in", "d_out", "projection", "depth"}
    assert cold["warm_start"] is None
    assert len({exact["digest"], approximate["digest"], cold["digest"]}) == 3
    left_out = "peft: base_model.model.head.bias, base_model.model.head.weight was trained beside it and is not taken"
    assert sum(left_out in message for message in caplog.messages) == 2


def test_without_an_adapter_it_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    settings = configured("tensor_mode=head_only", "warm_start=lora")
    adapted_model(settings, load_backbone(settings.model, 10, 0), torch.device("cpu"))
    assert caplog.messages == ["warm_start=lora: has no effect, because tensor_mode=head_only has no adapter"]
