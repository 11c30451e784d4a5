"""A LoRA that PEFT saved, read back, against what PEFT itself adds to the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tenslora import TensLoRAError
from tenslora.peft.saved_lora import read_updates
from tenslora.projections import find_projections
from tests.models import build
from tests.running import SHORT, run


def saved(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """A LoRA with random numbers on a copy of `model`, saved; returns the copy with the LoRA in its weights."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: nn.Module = peft_model.merge_and_unload()  # type: ignore[operator]
    return merged


@pytest.mark.parametrize(
    ("name", "adapt", "settings"),
    [
        ("hf_bert", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["query", "key", "value"]}),
        ("hf_bert", "qkv", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "value"]}),
        (
            "hf_bert",
            "all",
            {
                "r": 2,
                "lora_alpha": 5,
                "rank_pattern": {"layer.1.attention.self.query": 4},
                "alpha_pattern": {"key": 9},
                "target_modules": ["query", "key", "dense"],
                "exclude_modules": ["bert.pooler.dense"],
            },
        ),
        ("timm_vit", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["qkv"]}),
        ("llama", "qkvo", {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
        ("gpt2", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_the_updates_are_what_peft_merges(name: str, adapt: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = build(name).float()
    merged = saved(model, tmp_path, **settings)
    geometry, targets = find_projections(model, adapt)
    updates = read_updates(tmp_path, geometry, targets)
    changed = 0
    for target in targets:
        before, after = (m.get_submodule(target.path).weight for m in (model, merged))
        difference = (after - before).detach()  # type: ignore[operator]
        difference = difference.T if isinstance(target.linear, nn.Linear) else difference  # (inputs, outputs)
        changed += bool(difference.abs().max() > 1e-3)
        for index, column in target.columns:
            ours = updates[target.layer][target.group[index]]
            theirs = difference.T if target.writes_to_stream else difference[:, column : column + ours.shape[1]]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert changed > 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_modules": ["query"], "lora_bias": True}, "lora_bias=true"),
        ({"target_modules": ["query"], "init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"target_modules": ["query", "word_embeddings"]}, "adapts .*word_embeddings, which adapter.adapt=qkv leaves"),
    ],
)
def test_what_is_more_than_updates_of_the_matrices_is_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = build("hf_bert").float()
    saved(model, tmp_path, r=2, **settings)
    with pytest.raises(TensLoRAError, match=problem):
        read_updates(tmp_path, *find_projections(model))


@pytest.mark.parametrize(("name", "linear"), [("timm_vit", "qkv"), ("gpt2", "c_attn")])
def test_a_part_of_a_fused_linear_that_is_left_out_is_named(name: str, linear: str, tmp_path: Path) -> None:
    model = build(name).float()
    saved(model, tmp_path, r=2, target_modules=[linear])
    with pytest.raises(TensLoRAError, match=rf"adapts .*{linear}, which adapter\.adapt=qv leaves out"):
        read_updates(tmp_path, *find_projections(model, "qv"))


def test_a_lora_for_another_model_is_told_from_one_of_other_matrices(tmp_path: Path) -> None:
    saved(build("hf_bert").float(), tmp_path, r=2, target_modules=["query"])
    with pytest.raises(TensLoRAError, match="none of which this model has"):
        read_updates(tmp_path, *find_projections(build("timm_vit")))


def test_an_untrained_lora_has_nothing_to_start_from(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = build("hf_bert").float()
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query"])).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(TensLoRAError, match="its updates are all zero"):
        read_updates(tmp_path, *find_projections(model))


def test_what_is_adapted_and_not_wanted_is_named(tmp_path: Path) -> None:
    model = build("hf_bert").float()
    saved(model, tmp_path, r=2, target_modules=["query", "output.dense"])
    with pytest.raises(TensLoRAError, match=r"adapts bert\..*output\.dense, which adapter\.adapt=qkv leaves out"):
        read_updates(tmp_path, *find_projections(model))


def test_other_sizes_and_other_kinds_are_refused(tmp_path: Path) -> None:
    saved(build("hf_bert").float(), tmp_path, r=2, target_modules=["query"])
    import transformers

    wide = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**wide, vocab_size=50))
    with pytest.raises(TensLoRAError, match=r"its update of .*query is \(24, 24\), the model's Linear \(36, 36\)"):
        read_updates(tmp_path, *find_projections(other))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(TensLoRAError, match="is a IA3 adapter; only a plain LoRA"):
        read_updates(tmp_path, *find_projections(other))
    with pytest.raises(TensLoRAError, match="not a PEFT adapter's settings"):
        read_updates(tmp_path / "nowhere", *find_projections(other))


def test_a_run_may_start_from_a_lora(tmp_path: Path) -> None:
    # A LoRA at its own rank is taken over whole: the run's first loss is that of the LoRA.
    from tenslora.harness.export import main

    run(tmp_path / "lora", *SHORT, "tensor_mode=lora", "optimizer.lr=0.05", "trainer.epochs=2")
    main([str(tmp_path / "lora"), "--format", "peft"])
    start = [f"warm_start={tmp_path / 'lora' / 'peft'}", "optimizer.lr=0", "optimizer.min_lr=0", "trainer.max_steps=1"]
    whole = run(tmp_path / "a", *SHORT, "tensor_mode=lora", *start)
    near = run(tmp_path / "b", *SHORT, "tensor_mode=qkv_depth", *start)
    cold = run(tmp_path / "c", *SHORT, "tensor_mode=qkv_depth", *start[1:])
    assert whole["warm_start"]["error"] < 1e-5
    assert 0 < near["warm_start"]["error"] < 1
    assert set(near["warm_start"]["energy"]) == {"d_in", "d_out", "projection", "depth"}
    assert cold["warm_start"] is None
    assert len({whole["digest"], near["digest"], cold["digest"]}) == 3
