"""Adapters turned into PEFT LoRAs, against the adapted model itself."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from tenslora import AdapterConfig, RankStrategy, TensLoRAError, attach, merge
from tenslora.peft.to_lora import lora_weights, to_peft
from tests.models import attached, build, inputs, logits, randomised, two_towers


@pytest.mark.parametrize("mode", ["lora", "depth", "att_qkv_depth", "site"])
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "gpt2"])
def test_the_peft_model_gives_the_same_logits(name: str, mode: str) -> None:
    model = build(name)
    attached(model, mode, adapt="all")
    expected = logits(model, inputs(name))
    peft_model = to_peft(model)
    assert isinstance(peft_model, PeftModel)
    torch.testing.assert_close(logits(peft_model, inputs(name)), expected, rtol=0, atol=1e-11)


def test_matrices_of_different_ranks_in_one_adapter_are_saved_with_their_ranks(tmp_path: Path) -> None:
    name = "timm_vit"
    model, fresh = build(name), build(name)
    attached(model, "depth", adapt="all", rank_strategy=RankStrategy("explicit", ranks=(4, 5, 2)))
    expected = logits(model, inputs(name))
    products = {path: b @ a for path, (a, b) in lora_weights(model).items()}
    # One Linear holds query, key and value, each with a left of its own; the others hold a matrix each.
    assert {len(a) for a, _ in lora_weights(model).values()} == {12, 4}
    to_peft(model).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(logits(loaded, inputs(name)), expected, rtol=0, atol=1e-6)  # saved in float32
    for path, product in products.items():
        update = loaded.base_model.model.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(update.double(), product, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [12, 36])
def test_paths_that_end_alike_keep_their_own_ranks(width: int, tmp_path: Path) -> None:
    model, batch = two_towers(width), inputs("separate")
    randomised(attach(model, AdapterConfig("qkv_depth")))
    expected = model(**batch)
    peft_model = to_peft(model)
    torch.testing.assert_close(peft_model(**batch), expected, rtol=0, atol=1e-11)
    peft_model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(two_towers(width), str(tmp_path))
    torch.testing.assert_close(again(**batch), expected, rtol=0, atol=1e-5)


def test_modules_that_were_trained_without_an_adapter_are_saved_with_the_lora() -> None:
    model = build("hf_bert")
    attached(model, "qkv")
    peft_model = to_peft(model, ["classifier"])
    saved = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert {name.split(".modules_to_save.")[0] for name in saved if "lora_" not in name} == {
        "base_model.model.classifier"
    }


def test_a_rank_dropout_that_a_lora_does_not_have_is_told(tmp_path: Path) -> None:
    model = build("hf_bert")
    adapter = attached(model, "qkv", dropout=0.25, rank_dropout=0.5)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="rank_dropout"):
        warnings.simplefilter("error")
        to_peft(model)
    assert model.tenslora is adapter and not hasattr(model, "peft_config")
    with pytest.warns(UserWarning, match=r"^rank_dropout=0\.5: is not taken along, because PEFT's LoRA has none$"):
        peft_model = to_peft(model)
    peft_model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("name", "mode", "ranks", "rank"),
    [
        ("hf_bert", "qkv_depth", (5, 6, 3, 2), 5),  # query, key and value share a left of the input rank
        ("hf_bert", "depth", (9, 2, 2), 2),  # the output rank is the smaller one
        ("timm_vit", "qkv_depth", (5, 6, 3, 2), 5),
        ("timm_vit", "depth", (4, 5, 2), 12),  # one Linear holds three matrices, each with a left of its own
    ],
)
def test_the_rank_of_the_lora_is_that_of_the_thin_products(
    name: str, mode: str, ranks: tuple[int, ...], rank: int
) -> None:
    model = build(name)
    attached(model, mode, rank_strategy=RankStrategy("explicit", ranks=ranks))
    assert {len(a) for a, _ in lora_weights(model).values()} == {rank}


def test_a_merged_update_is_not_exported_a_second_time() -> None:
    model = build("hf_bert")
    attached(model, "qkv_depth")
    merge(model)
    with pytest.raises(TensLoRAError, match="its adapter is merged; unmerge it first"):
        lora_weights(model)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(TensLoRAError, match="Linear: has no adapter"):
        lora_weights(nn.Linear(2, 2))


def test_a_missing_peft_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("hf_bert")
    attached(model, "qkv")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TensLoRAError, match=r"^peft: the package is not installed"):
        to_peft(model)
