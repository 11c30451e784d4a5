"""Adapters on quantised backbones, against the backbone itself and against PEFT's LoRA."""

from __future__ import annotations

import copy
import importlib
import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from tenslora import AdapterConfig, TensLoRAError, attach, detach, merge, save_pretrained, unmerge
from tenslora.peft import TensLoraConfig
from tests.models import build, inputs, logits

bnb: Any = importlib.import_module("bitsandbytes.nn")  # its types are not declared


def nf4(model: nn.Module) -> nn.Module:
    """The model with its Linear layers in bitsandbytes' nf4, but for the head."""
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "head" not in path:
            quantised = bnb.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
            )
            quantised.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            quantised.bias = linear.bias
            quantised.support_avx512bf16_for_cpu = False  # these layers are too small for it
            model.set_submodule(path, quantised)
    return model.to("cpu")


def int8(model: nn.Module) -> nn.Module:
    """The model with its Linear layers in bitsandbytes' int8, but for the head."""
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "head" not in path:
            quantised = bnb.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            quantised.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            quantised.bias = linear.bias
            model.set_submodule(path, quantised)
    return model.to("cpu")


def torchao_int8(model: nn.Module) -> nn.Module:
    """The model with its Linear layers in torchao's int8."""
    quantize_(model, Int8WeightOnlyConfig())
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {"nf4": nf4, "int8": int8, "torchao": torchao_int8}


def quantised(kind: str, name: str = "llama") -> nn.Module:
    return KINDS[kind](build(name).float()).eval()


def test_a_head_that_was_quantised_after_its_training_is_not_saved(tmp_path: Path) -> None:
    model = build("separate").float()
    attach(model, AdapterConfig(), train=["head"])
    save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torchao_int8(model.get_submodule("head"))
    with pytest.raises(TensLoRAError, match=r"cannot be written \(head\.weight is a Int8Tensor, as after quantisation"):
        save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_head_whose_weights_are_no_parameters_any_more_is_not_left_out(tmp_path: Path) -> None:
    model = build("separate").float()
    attach(model, AdapterConfig(), train=["head"])
    quantised_head = nn.Sequential(model.get_submodule("head"))
    torch.ao.quantization.quantize_dynamic(quantised_head, inplace=True)
    model.head = quantised_head[0]
    problem = r"^head\.bias: was trained beside the adapter, and head\.scale, .* in its place would not be saved; save "
    with pytest.raises(
        TensLoRAError, match=problem + r"before head becomes a DynamicQuantizedLinear, which has no parameters$"
    ):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def attached(model: nn.Module) -> nn.Module:
    return attach(model, AdapterConfig())


def in_peft(model: nn.Module) -> nn.Module:
    adapter: nn.Module = get_peft_model(model, TensLoraConfig()).base_model.tenslora_adapters["default"]
    return adapter


def set_entries(adapter: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 50) -> float:
    batch, optimizer = inputs("llama"), torch.optim.AdamW(parameters, lr=1e-2)
    loss = torch.zeros(())
    for _ in range(steps):
        predicted = logits(model, batch)[:, :-1].float()
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_unchanged_to_the_bit_and_the_state_dict_is_the_backbones(kind: str) -> None:
    model = quantised(kind)
    expected, state = (
        logits(model, inputs("llama")),
        {name: copy.copy(value) for name, value in model.state_dict().items()},
    )
    attach(model, AdapterConfig())
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert set(state) == {name for name in model.state_dict() if not name.startswith("tenslora.")}
    detach(model)
    assert set(model.state_dict()) == set(state)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_backbone_with_the_rounded_weights(kind: str) -> None:
    # A plain backbone whose weights are the dequantised ones, with the same adapter.
    model, plain = quantised(kind), build("llama").float()
    for path, linear in model.named_modules():
        if hasattr(linear, "in_features") and "head" not in path:
            rounded = linear(torch.eye(linear.in_features)).T - (0 if linear.bias is None else linear.bias[:, None])
            plain.get_submodule(path).weight.data.copy_(rounded)  # type: ignore[operator]
    gradients = []
    for each in (model, plain):
        adapter = attach(each, AdapterConfig("att_qkv_depth", adapt="all"))
        set_entries(adapter)
        loss = logits(each, inputs("llama")).float().square().mean()
        gradients.append(torch.autograd.grad(loss, list(adapter.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_gradients_pass_through_a_model_that_was_evaluated_before() -> None:
    # bitsandbytes rearranges weights in evaluation mode where the CPU has the instructions AVX512-BF16.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    gradients = []
    for adapt in (attached, in_peft):
        for is_evaluated in (False, True):
            torch.manual_seed(0)
            model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, num_key_value_heads=1, head_dim=32, **sizes))
            for module in nf4(model).modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = bnb.modules.has_avx512bf16()
            if is_evaluated:
                with torch.no_grad():
                    logits(model.eval(), inputs("llama"))
            adapter = adapt(model.train())
            set_entries(adapter)
            loss = logits(model, inputs("llama")).square().mean()
            gradients.append(torch.autograd.grad(loss, list(adapter.parameters())))
    for before, after in itertools.product(gradients[::2], gradients[1::2]):
        for expected, ours in zip(before, after, strict=True):
            assert expected.any()
            # The arrangement rounds the scales of the weights to bfloat16.
            torch.testing.assert_close(ours, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_training_loses_no_more_to_nf4_than_lora_does() -> None:
    def gap(adapt: Callable[[nn.Module], list[nn.Parameter]]) -> float:
        rounded, exact = (train(model, adapt(model)) for model in (quantised("nf4"), build("llama").float()))
        return rounded - exact

    def ours(model: nn.Module) -> list[nn.Parameter]:
        return list(attach(model, AdapterConfig()).parameters())

    def lora(model: nn.Module) -> list[nn.Parameter]:
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"]))
        return [p for p in adapted.parameters() if p.requires_grad]

    assert gap(ours) <= max(gap(lora), 0) + 0.02


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.3), ("int8", 0.05)])
def test_merging_rounds_the_weights_again_and_says_by_how_much(kind: str, share: float) -> None:
    model = quantised(kind)
    set_entries(attach(model, AdapterConfig()))
    adapted = logits(model, inputs("llama"))
    with pytest.warns(UserWarning, match=r"rounded again, which changes them by [\d.]+% of the update's size"):
        merge(model)
    merged = logits(model, inputs("llama"))
    assert 0 < (merged - adapted).abs().max() < share * adapted.abs().max()
    with pytest.warns(UserWarning, match="rounded again"):
        unmerge(model)
    assert (logits(model, inputs("llama")) - adapted).abs().max() < share * adapted.abs().max()


def test_a_weight_that_cannot_be_quantised_again_is_left_alone() -> None:
    model = quantised("torchao")  # without transformers, nothing says how its weights were quantised
    set_entries(attach(model, AdapterConfig()))
    adapted = logits(model, inputs("llama"))
    with pytest.raises(TensLoRAError, match=r"q_proj: Int8Tensor: .* leave the adapter unmerged") as caught:
        merge(model)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model, inputs("llama")), adapted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_layer_that_was_quantised_under_an_adapter_is_named_as_it_is_not_merged_into() -> None:
    model: Any = get_peft_model(build("llama").float(), TensLoraConfig())
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(TensLoRAError, match=r"^model\.layers\.0\.self_attn\.q_proj: Linear: an update cannot be added"):
        model.merge_and_unload()


def test_what_transformers_quantised_with_torchao_is_merged(tmp_path: Path) -> None:
    backbone: Any = build("llama").float()
    backbone.save_pretrained(tmp_path)
    quantisation = hf.TorchAoConfig(Int8WeightOnlyConfig())
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cpu")
    set_entries(attach(model, AdapterConfig()))
    adapted = logits(model, inputs("llama"))
    with pytest.warns(UserWarning, match="rounded again"):
        merge(model)
    assert (logits(model, inputs("llama")) - adapted).abs().max() < 0.05 * adapted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_trains_saves_and_loads_on_it_too(kind: str, tmp_path: Path) -> None:
    backbone = prepare_model_for_kbit_training(quantised(kind), use_gradient_checkpointing=False)
    expected = logits(backbone, inputs("llama"))
    model = get_peft_model(backbone, TensLoraConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, inputs("llama")), expected)
    first = train(model, [p for p in model.parameters() if p.requires_grad], steps=1)
    assert train(model, [p for p in model.parameters() if p.requires_grad], steps=5) < first
    adapted = logits(model.eval(), inputs("llama"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(kind), str(tmp_path))
    torch.testing.assert_close(logits(again, inputs("llama")), adapted, rtol=0, atol=1e-4)
    if kind != "torchao":
        with pytest.warns(UserWarning, match="rounded again"):
            merged = model.merge_and_unload()
        assert (logits(merged, inputs("llama")) - adapted).abs().max() < 0.3 * adapted.abs().max()


def test_saved_adapters_do_not_depend_on_the_backbones_weights(tmp_path: Path) -> None:
    model = quantised("nf4")
    set_entries(attach(model, AdapterConfig()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_an_update_that_a_quantised_weight_cannot_hold_is_not_merged() -> None:
    model = quantised("nf4")
    adapter = attached(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(1e15)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TensLoRAError, match="its weight would hold a NaN or an infinity with its update"):
        merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("put_on", [attached, in_peft])
def test_weights_that_pass_no_gradient_on_are_told(put_on: Callable[[nn.Module], nn.Module]) -> None:
    def told(config: Any) -> list[str]:
        model = build("hf_bert").float()
        quantize_(model, config)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter = put_on(model)
        trained = logits(model, inputs("hf_bert")).requires_grad
        assert all(parameter.requires_grad for parameter in adapter.parameters())
        ours = [str(each.message) for each in caught if "passes no gradient on" in str(each.message)]
        assert bool(ours) is not trained
        return ours

    assert not told(Int8WeightOnlyConfig())
    [warning] = told(Int8DynamicActivationInt8WeightConfig())
    assert "\n" not in warning
    assert re.match(r"bert\.encoder\.layer\.0\.attention\.self\.query: its weight \(Int8Tensor", warning)
