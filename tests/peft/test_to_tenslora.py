"""Adapters that move between the library, PEFT's LoRA and the TensLoRA tuner in PEFT."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as prune_weight

from tenslora import AdapterConfig, RankStrategy, TensLoRAError, attach, merge
from tenslora.peft import TensLoraConfig
from tenslora.peft.to_lora import to_peft
from tenslora.peft.to_tenslora import from_lora, to_tenslora
from tenslora.rank_pruning import prune
from tests.models import attached, build, compiled, inputs, logits, randomised, two_towers


@pytest.mark.parametrize(
    "strategy", [RankStrategy("isorank"), RankStrategy(), RankStrategy("explicit", 4, (3, 4, 2, 2))]
)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "gpt2"])
def test_an_adapter_of_the_library_is_saved_by_peft(name: str, strategy: RankStrategy, tmp_path: Path) -> None:
    model = build(name)
    adapter = attached(model, "qkv_depth", rank_strategy=strategy, alpha=2.5, scaling="first_step")
    expected, count = logits(model, inputs(name)), sum(p.numel() for p in adapter.parameters())
    peft_model = to_tenslora(model)
    assert torch.equal(logits(peft_model, inputs(name)), expected)
    peft_model.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(build(name), str(tmp_path))
    torch.testing.assert_close(logits(again, inputs(name)), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in again.base_model.tenslora_adapters.parameters()) == count


@pytest.mark.parametrize("strategy", [RankStrategy("isorank"), RankStrategy()])
def test_an_adapter_of_several_stages_is_saved_by_peft(strategy: RankStrategy, tmp_path: Path) -> None:
    model, batch = build("hf_swin"), inputs("hf_swin")
    adapter = randomised(attach(model, AdapterConfig("qkv_depth", strategy, alpha=2.5, scaling="first_step")))
    expected, ranks = logits(model, batch), [stage.ranks for stage in adapter.stages]
    peft_model = to_tenslora(model)
    assert torch.equal(logits(peft_model, batch), expected)
    peft_model.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(build("hf_swin"), str(tmp_path))
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-12)
    assert [stage.ranks for stage in again.base_model.tenslora_adapters["default"].stages] == ranks


@pytest.mark.parametrize("strategy", [RankStrategy("isorank"), RankStrategy()])
@pytest.mark.parametrize("name", ["hf_bert", "hf_swin"])
def test_an_adapter_whose_ranks_were_cut_keeps_its_scale_in_peft(
    name: str, strategy: RankStrategy, tmp_path: Path
) -> None:
    model, batch = build(name), inputs(name)
    adapter = randomised(attach(model, AdapterConfig("qkv_depth", strategy, scaling="first_step")))
    for stage in adapter.stages:
        prune(stage, sum(parameter.numel() for parameter in stage.parameters()) // 2)
    expected = logits(model, batch)
    peft_model = to_tenslora(model)
    assert torch.equal(logits(peft_model, batch), expected)
    peft_model.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(build(name), str(tmp_path))
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-12)


def test_a_lora_on_several_stages_becomes_a_tenslora_adapter(tmp_path: Path) -> None:
    batch, targets = inputs("hf_swin"), ["query", "value", "q_proj", "v_proj"]  # as transformers' versions name them
    of_peft = get_peft_model(build("hf_swin"), LoraConfig(r=1, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in of_peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    of_peft.save_pretrained(str(tmp_path))
    expected = logits(of_peft.eval(), batch)
    # Four matrices of rank 1 in the first stage and two in the second.
    config = TensLoraConfig(ranks=[[4, 4, 2, 2], [2, 2, 2, 1]], adapt="qv")
    model, approximation = from_lora(build("hf_swin"), tmp_path, config)
    assert approximation.error < 1e-6
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)
    _, rough = from_lora(build("hf_swin"), tmp_path, TensLoraConfig(ranks=[1, 1, 1, 1], adapt="qv"))
    assert 0.1 < rough.error < 1


def test_a_merged_adapter_is_not_exported_a_second_time() -> None:
    model = build("hf_bert")
    attached(model, "qkv_depth")
    merge(model)
    with pytest.raises(TensLoRAError, match="its adapter is merged; unmerge it first"):
        to_tenslora(model)


@pytest.mark.parametrize("width", [24, 36])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("towers", [r".*(query|key|value)", r".*visual.*(query|key|value)", r"(?!.*visual).*query"])
def test_paths_that_end_alike_are_told_apart(towers: str, prefix: str, width: int, tmp_path: Path) -> None:
    class WithPrefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = two_towers(width)

        def forward(self, x: torch.Tensor) -> Any:
            return self.model(x)

    model: Any = get_peft_model(WithPrefix() if prefix else two_towers(width), LoraConfig(r=2, target_modules=towers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(str(tmp_path))
    for fresh in (two_towers(width), WithPrefix()):
        again, approximation = from_lora(fresh, tmp_path, TensLoraConfig(tensor_mode="lora", r=2))
        assert approximation.error < 1e-6
        torch.testing.assert_close(again(**inputs("separate")), model(**inputs("separate")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
@pytest.mark.parametrize("beside", ["after attach", "without attention"])
def test_layers_whose_paths_end_like_those_of_adapted_ones_are_not_adapted(
    turn: Any, beside: str, tmp_path: Path
) -> None:
    model, other, batch = build("hf_bert"), build("hf_bert"), inputs("hf_bert")
    if beside == "without attention":
        for path in ("0", "1"):
            del other.get_submodule(f"bert.encoder.layer.{path}.attention.self").key
        model.add_module("other", other)
    attached(model, "qkv_depth", adapt="qv")
    expected, names = logits(model, batch), [name for name, _ in other.named_parameters()]
    model.add_module("other", other.requires_grad_(False))
    turned = turn(model)
    assert [name for name, _ in other.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in other.parameters())
    torch.testing.assert_close(logits(turned, batch), expected, rtol=0, atol=1e-11)
    turned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path))
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
def test_a_copy_of_adapted_layers_leaves_the_adapter_on_the_model(turn: Any) -> None:
    model = build("hf_bert")
    adapter = attached(model, "qkv")
    model.later = copy.deepcopy(model.bert)
    with pytest.raises(TensLoRAError, match=r"^later\..*query: is a copy of an adapted layer"):
        turn(model)
    assert model.get_submodule("tenslora") is adapter


def lora(folder: Path) -> Any:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "key", "value"], modules_to_save=["classifier"])
    model = get_peft_model(build("hf_bert"), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model.eval()


def test_a_lora_becomes_a_tenslora_adapter_and_a_lora_again(tmp_path: Path) -> None:
    expected = logits(lora(tmp_path), inputs("hf_bert"))
    # Six matrices of rank 2 need no more than rank 12 over d_in and d_out, and all of the other two modes.
    config = TensLoraConfig(ranks=[12, 12, 3, 2], modules_to_save=["classifier"], alpha=2.0)
    model, approximation = from_lora(build("hf_bert"), tmp_path, config)
    assert approximation.error < 1e-6
    torch.testing.assert_close(logits(model, inputs("hf_bert")), expected, rtol=0, atol=1e-5)
    lora_config, state = convert_to_lora(model, rank=2)
    again = get_peft_model(model.unload(), lora_config)
    set_peft_model_state_dict(again, state)
    torch.testing.assert_close(logits(again, inputs("hf_bert")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("of_wrapper", [True, False])
def test_a_head_is_loaded_from_a_lora_whose_paths_have_another_prefix(of_wrapper: bool, tmp_path: Path) -> None:
    trained = lora(tmp_path).classifier.modules_to_save.default.weight
    model = build("hf_bert") if of_wrapper else nn.ModuleDict({"model": build("hf_bert")})
    path = tmp_path / "adapter_model.safetensors"
    old, new = "base_model.model.", "base_model.model.model." if of_wrapper else "base_model.model."
    weights = {name.replace(old, new, 1): weight for name, weight in load_file(path).items()}
    save_file({**weights, "base_model.model.other.weight": torch.zeros(1)}, path)
    config = TensLoraConfig(ranks=[12, 12, 3, 2], modules_to_save=["classifier"])
    with pytest.warns(UserWarning, match=r"model\.other\.weight are saved beside .* has no weights of these names$"):
        turned, _ = from_lora(model, tmp_path, config)
    [head] = [module for name, module in turned.named_modules() if name.endswith("classifier.modules_to_save.default")]
    torch.testing.assert_close(head.weight, trained, rtol=0, atol=1e-7)


def test_ranks_that_are_too_low_lose_something_and_say_how_much(tmp_path: Path) -> None:
    lora(tmp_path)
    _, approximation = from_lora(build("hf_bert"), tmp_path, TensLoraConfig(ranks=[4, 4, 3, 2]))
    assert 0.1 < approximation.error < 1


def test_settings_that_differ_from_the_defaults_survive() -> None:
    strategy = RankStrategy("isoparameters", 3, rule="uniform", scale=2.0)
    config = AdapterConfig("att_depth", strategy, init="normal", dropout=0.1, seed=4, adapt="qv")
    model = build("hf_bert")
    (adapter,) = attach(model, config).stages
    settings = to_tenslora(model).peft_config["default"]
    assert isinstance(settings, TensLoraConfig)
    again = settings.adapter_config("qv")
    assert (again.init, again.dropout, again.seed, again.adapt) == ("normal", 0.1, 4, "qv")
    assert settings.ranks == list(adapter.ranks) and settings.rank_options == {"rule": "uniform", "scale": 2.0}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (TensLoraConfig(factorization="cp", rank_strategy="isorank", r=2), "factorization=cp: must be tucker"),
        (TensLoraConfig(adapt="qk"), "which the choice of adapt=qk leaves out"),
    ],
)
def test_a_lora_that_cannot_be_taken_over_leaves_the_model_as_it_was(
    config: TensLoraConfig, problem: str, tmp_path: Path
) -> None:
    lora(tmp_path)
    model = build("hf_bert")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(TensLoRAError, match=problem):
        from_lora(model, tmp_path, config)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "left_out", "choice"),
    [
        ({"layers_to_transform": [0]}, "layer.1.attention.self.key", "adapt=qkv, layers_to_transform=[0]"),
        ({"exclude_modules": "bert.encoder.layer.0.*"}, "layer.0.attention.self.key", "adapt=qkv, exclude_modules="),
        ({"exclude_modules": ["key"]}, "layer.0.attention.self.key", "adapt=qkv, exclude_modules=['key'] leaves"),
        ({"target_modules": ["query"]}, "layer.0.attention.self.key", "target_modules=['query'] leaves"),
    ],
)
def test_the_settings_that_leave_out_what_the_lora_adapts_are_named(
    settings: dict[str, Any], left_out: str, choice: str, tmp_path: Path
) -> None:
    lora(tmp_path)
    message = f"adapts bert.encoder.{left_out}, which the choice of {choice}"
    with pytest.raises(TensLoRAError, match=re.escape(message)):
        from_lora(build("hf_bert"), tmp_path, TensLoraConfig(**settings))


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_both_ends_of_a_trained_weight_are_saved_or_none(turn: Any, named: str) -> None:
    def model(train: Sequence[str]) -> Any:
        tied = build("llama")
        tied.get_submodule("lm_head").weight = tied.get_submodule("model.embed_tokens").weight
        attach(tied, AdapterConfig("qkv"), train=train)
        return tied

    ends = "lm_head and model.embed_tokens" if named == "lm_head" else "model.embed_tokens and lm_head"
    refused = model([named])
    with pytest.raises(TensLoRAError, match=rf"^modules_to_save: {ends} share a weight that is trained, .* name both$"):
        turn(refused, [named])
    assert hasattr(refused, "tenslora")
    turn(refused, ["embed_tokens", "lm_head"])
    turn(model([]), [named])  # which PEFT trains from here on


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_an_adapter_on_weights_that_are_computed_is_saved_by_peft(tmp_path: Path) -> None:
    def backbone() -> Any:
        model = build("hf_bert")
        query, key = (model.get_submodule(f"bert.encoder.layer.0.attention.self.{name}") for name in ("query", "key"))
        prune_weight.l1_unstructured(query, "weight", 0.5)  # type: ignore[no-untyped-call]
        nn.utils.weight_norm(key)
        return model

    model = backbone()
    attached(model, "qkv")
    expected = logits(model, inputs("hf_bert"))
    turned = to_tenslora(model)
    torch.testing.assert_close(logits(turned, inputs("hf_bert")), expected)
    turned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(backbone(), str(tmp_path))
    torch.testing.assert_close(logits(again, inputs("hf_bert")), expected)


def test_a_head_of_another_size_that_was_saved_with_the_lora_is_refused(tmp_path: Path) -> None:
    lora(tmp_path)
    model = build("hf_bert")
    model.classifier = nn.Linear(24, 7)
    with pytest.raises(TensLoRAError, match=r"classifier\.\w+ has the shape \(2.*, and in .* \(7"):
        from_lora(model, tmp_path, TensLoraConfig(modules_to_save=["classifier"]))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
@pytest.mark.parametrize("names", ["classifier", ["classifer"]])
def test_a_module_to_save_that_is_not_there_leaves_the_adapter_on_the_model(turn: Any, names: Any) -> None:
    model = build("hf_bert")
    adapter = attached(model, "qkv")
    with pytest.raises(TensLoRAError, match=r"^modules_to_save=classif"):
        turn(model, names)
    assert model.get_submodule("tenslora") is adapter


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
def test_a_module_to_save_that_holds_adapted_layers_leaves_the_adapter_on_the_model(turn: Any) -> None:
    model = build("timm_vit")
    adapter = attached(model, "qkv")
    with pytest.raises(TensLoRAError, match=r"^modules_to_save=blocks: holds blocks\.0\.attn\.qkv, .* other modules$"):
        turn(model, ["head", "blocks"])
    assert model.get_submodule("tenslora") is adapter


@pytest.mark.parametrize("turn", [to_peft, to_tenslora, get_peft_model])
def test_heads_in_a_container_are_saved_one_by_one(turn: Any) -> None:
    heads = nn.ModuleDict({"a": nn.Linear(24, 2), "b": nn.ModuleList([nn.Linear(24, 3)]), "c": nn.Identity()})
    model: Any = build("hf_bert")
    model.heads = heads.double()
    adapter = None if turn is get_peft_model else attach(model, AdapterConfig("qkv"), train=["heads"])
    before = [(name, type(part)) for name, part in model.named_modules()]
    for name, kind in (("heads", r"ModuleDict, .*; name .* instead: heads\.a, heads\.b"), ("b", "ModuleList")):
        with pytest.raises(TensLoRAError, match=rf"^modules_to_save=(heads\.)?{name}: is a {kind}"):
            turn(model, [name] if adapter else TensLoraConfig(modules_to_save=[name]))
        assert [(name, type(part)) for name, part in model.named_modules()] == before
    if adapter:
        saved = turn(model, ["heads.a", "heads.b.0"]).state_dict()
        assert {name.split(".heads.")[1] for name in saved if "heads" in name and ".default.bias" in name} == {
            "a.modules_to_save.default.bias",
            "b.0.modules_to_save.default.bias",
        }


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
def test_a_head_that_cannot_be_copied_leaves_the_adapter_on_the_model(turn: Any) -> None:
    class Head(nn.Linear):
        def __deepcopy__(self, _: Any) -> None:
            raise RuntimeError("not today")

    model: Any = build("hf_bert")
    model.classifier = Head(24, 2).double()
    adapter = attach(model, AdapterConfig("qkv"), train=["pooler", "classifier"])
    randomised(adapter)
    model.later = build("hf_bert").requires_grad_(False)  # attach would find its layers too
    expected, names = logits(model, inputs("hf_bert")), [name for name, _ in model.named_parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            turn(model, ["pooler", "classifier"])
        assert model.tenslora is adapter and torch.equal(logits(model, inputs("hf_bert")), expected)
        assert [name for name, _ in model.named_parameters()] == names and not hasattr(model, "peft_config")


def test_where_warnings_are_errors_a_lora_that_starts_an_adapter_and_warns_changes_nothing(tmp_path: Path) -> None:
    expected = logits(lora(tmp_path), inputs("hf_bert"))
    model = build("hf_bert")
    names = [name for name, _ in model.named_modules()]
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="are saved beside the LoRA, and are not loaded"):
        warnings.filterwarnings("error", message=".*beside the LoRA")
        from_lora(model, tmp_path, TensLoraConfig())
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    again, _ = from_lora(model, tmp_path, TensLoraConfig(ranks=[12, 12, 3, 2], modules_to_save=["classifier"]))
    torch.testing.assert_close(logits(again, inputs("hf_bert")), expected)
    with pytest.raises(TensLoRAError, match=r"^config: must be of type TensLoraConfig, and is of type LoraConfig"):
        from_lora(build("hf_bert"), tmp_path, LoraConfig())


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
@pytest.mark.parametrize("part", ["", "regions", "bert.encoder", "bert.encoder.layer.1", "classifier"])
def test_what_is_compiled_is_saved_under_the_models_own_names(turn: Any, part: str, tmp_path: Path) -> None:
    model, batch = build("hf_bert"), inputs("hf_bert")
    attach(model, AdapterConfig("qkv"), train=["classifier"])
    randomised(model.get_submodule("tenslora"))  # type: ignore[type-var]
    nn.init.ones_(model.get_submodule("classifier").weight)  # type: ignore[arg-type]
    expected, wrapper = logits(model, batch), compiled(model, part)
    before = [name for name, _ in wrapper.named_modules()]
    with pytest.raises(TensLoRAError, match=r"^modules_to_save=nope"):
        turn(wrapper, ["nope"])
    assert [name for name, _ in wrapper.named_modules()] == before
    with pytest.warns(UserWarning, match=r"^BertForSequenceClassification: is compiled, as a whole or in parts"):
        turned = turn(wrapper, ["classifier"])
    torch.testing.assert_close(logits(turned, batch), expected, rtol=0, atol=1e-11)
    turned.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as PEFT's of weights that it does not find
        again = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path))
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["", "bert.encoder", "bert.encoder.layer.1", "classifier"])
def test_a_lora_starts_an_adapter_on_a_compiled_model(part: str, tmp_path: Path) -> None:
    expected = logits(lora(tmp_path), inputs("hf_bert"))
    config = TensLoraConfig(ranks=[12, 12, 3, 2], modules_to_save=["classifier"])
    with pytest.warns(UserWarning, match=r"^BertForSequenceClassification: is compiled, as a whole or in parts"):
        model, _ = from_lora(compiled(build("hf_bert"), part), tmp_path, config)
    torch.testing.assert_close(logits(model, inputs("hf_bert")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
def test_dropout_and_the_mode_are_taken_along(turn: Any, training: bool) -> None:
    model, batch = build("hf_bert").train(training), inputs("hf_bert")
    attached(model, "depth", adapt="q", dropout=0.5)  # one matrix in each layer, so that LoRA draws no further masks
    model.get_submodule("bert.pooler").train(not training)  # a mode of the user's own
    modes = {name: part.training for name, part in model.named_modules()}
    torch.manual_seed(3)
    expected = logits(model, batch)
    turned = turn(model)
    torch.manual_seed(3)
    torch.testing.assert_close(logits(turned, batch), expected, rtol=0, atol=1e-11)
    assert (turned.training, turned.base_model.training) == (training, training)
    now = {name: part.training for name, part in model.named_modules()}
    assert {name: now[name] for name in modes if name in now} == {name: modes[name] for name in modes if name in now}


def test_an_adapter_that_starts_from_a_lora_is_in_the_mode_of_the_model(tmp_path: Path) -> None:
    lora(tmp_path)
    for training in (True, False):
        model, _ = from_lora(build("hf_bert").train(training), tmp_path, TensLoraConfig(dropout=0.5))
        adapter = model.base_model.tenslora_adapters["default"]
        assert {model.training, model.base_model.training, *(part.training for part in adapter.modules())} == {training}


TOLD = "are trained beside the adapter, and PEFT will freeze and not save them; name their modules in modules_to_save"


@pytest.mark.parametrize("turn", [to_peft, to_tenslora])
def test_a_trained_head_that_peft_would_not_save_is_told(turn: Any) -> None:
    for names in ([], ["head"]):
        model = build("timm_vit")
        attach(model, AdapterConfig("qkv"), train=["head"])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            turn(model, names)
        ours = [str(each.message) for each in told if "trained beside the adapter" in str(each.message)]
        assert ours == ([] if names else [f"{type(model).__name__}: head.weight, head.bias {TOLD}"])


def _with_another_scale(adapter: Any) -> None:
    adapter.scale = 2.0


def _with_other_settings(adapter: Any) -> None:
    adapter.config = dataclasses.replace(adapter.config, alpha=2.0)


def _with_a_shorter_core(adapter: Any) -> None:
    adapter.tensors[0].core = nn.Parameter(adapter.tensors[0].core[:5].detach())


@pytest.mark.parametrize("change", [_with_another_scale, _with_other_settings, _with_a_shorter_core])
def test_an_adapter_that_was_changed_by_hand_stays_on_the_model(change: Any) -> None:
    model = build("hf_bert")
    adapter = attached(model, "qkv_depth")
    change(adapter)
    with pytest.raises(TensLoRAError, match=r"is not that of the adapter's config|has the shape"):
        to_tenslora(model)
    assert model.get_submodule("tenslora") is adapter


def test_a_module_to_save_that_the_lora_did_not_save_starts_as_the_model_has_it(tmp_path: Path) -> None:
    expected = logits(lora(tmp_path), inputs("hf_bert"))
    config = TensLoraConfig(ranks=[12, 12, 3, 2], modules_to_save=["classifier", "pooler"])
    model, _ = from_lora(build("hf_bert"), tmp_path, config)
    torch.testing.assert_close(logits(model, inputs("hf_bert")), expected, rtol=0, atol=1e-5)
    assert any("pooler" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    backbone = build("hf_bert")
    with pytest.raises(TensLoRAError, match=r"^modules_to_save=classifer: must be the name of a module"):
        from_lora(backbone, tmp_path, TensLoraConfig(modules_to_save=["classifer"]))
    assert not hasattr(backbone, "peft_config")


def test_a_head_that_is_not_to_be_saved_is_not_loaded_from_the_lora(tmp_path: Path) -> None:
    trained = lora(tmp_path / "lora").classifier.modules_to_save.default.weight
    for settings in ({"task_type": "SEQ_CLS"}, {}):
        model, config = build("hf_bert"), TensLoraConfig(ranks=[12, 12, 3, 2], **settings)  # type: ignore[arg-type]
        own = model.get_parameter("classifier.weight").clone()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            turned, _ = from_lora(model, tmp_path / "lora", config)
        ours = [str(each.message) for each in told if "saved beside the LoRA" in str(each.message)]
        head = turned.base_model.model.classifier
        if settings:  # for which PEFT names the head
            torch.testing.assert_close(head.modules_to_save.default.weight, trained, rtol=0, atol=1e-7)
            assert not ours
        else:
            assert torch.equal(head.weight, own) and "classifier.weight, classifier.bias are saved" in ours[0]
        turned.save_pretrained(str(tmp_path / "again"))
        again = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path / "again"))
        batch = inputs("hf_bert")
        torch.testing.assert_close(logits(again.eval(), batch), logits(turned.eval(), batch), rtol=0, atol=1e-6)


def test_a_head_beside_a_lora_that_holds_a_nan_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    get_peft_model(build("hf_bert"), config).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.classifier.bias"][0] = torch.nan
    save_file(weights, path)
    with pytest.raises(
        TensLoRAError, match=r"adapter_model\.safetensors: base_model\.model\.classifier\.bias holds a N"
    ):
        from_lora(build("hf_bert"), tmp_path, TensLoraConfig(adapt="q", modules_to_save=["classifier"]))
