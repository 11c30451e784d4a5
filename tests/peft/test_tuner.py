"""TensLoRA inside PEFT, against `attach`, against PEFT's own LoRA, and through PEFT's own verbs."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import pickle
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.big_modeling import attach_layerwise_casting_hooks
from accelerate.utils import compile_regions
from omegaconf import OmegaConf
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
    PromptEncoderConfig,
    PromptTuningConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft import LoraConfig as PeftLora
from peft.tuners.tuners_utils import BaseTunerLayer, inspect_matched_modules
from peft.utils.hotswap import hotswap_adapter
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as prune_weight

from tenslora import AdapterConfig, TensLoRAError, adapt_tensor, attach
from tenslora.adapter import Adapter, StagedAdapter
from tenslora.constructions import CONSTRUCTIONS
from tenslora.factorizations import FACTORIZATIONS
from tenslora.peft import TensLoraConfig, TensLoraLinear
from tenslora.peft.patterns import first_matches
from tenslora.rank_pruning import prune
from tests.commands import Command, Commands, started_by_torchrun
from tests.conftest import ROOT
from tests.hub_server import repository
from tests.models import build, inputs, logits
from tests.operations import RecordedOperations
from tests.peft.train_in_trainer import main as train_in_trainer
from tests.plain_transformer import PlainTransformer

NAMES = ["hf_bert", "hf_roberta", "hf_vit", "llama", "qwen2", "gemma", "gpt2", "hf_swin"]
CASES = [
    (NAMES[index % len(NAMES)], mode, factorization)
    for index, (mode, factorization) in enumerate(itertools.product(CONSTRUCTIONS, FACTORIZATIONS))
    if mode != "lora" or factorization == "tucker"
] + [(name, "qkv_depth", "tucker") for name in NAMES]


def adapter_of(model: Any, name: str = "default") -> Adapter | StagedAdapter:
    adapter = model.base_model.tenslora_adapters[name]
    assert isinstance(adapter, (Adapter, StagedAdapter))
    return adapter


def trained(model: Any, seed: int = 7, name: str = "default") -> Any:
    """Random entries in all parameters of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_of(model, name).parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def train(model: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor], steps: int = 20) -> list[Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    seen = []
    for _ in range(steps):
        loss = logits(model, batch).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        seen += [loss.detach(), *gradients]
        optimizer.step()
    return seen


@pytest.mark.parametrize(("name", "mode", "factorization"), CASES)
def test_training_equals_attach_to_the_bit(name: str, mode: str, factorization: str) -> None:
    settings: dict[str, Any] = {"tensor_mode": mode, "factorization": factorization}
    plain = build(name)
    adapter = attach(plain, AdapterConfig(**settings)).double()
    model = get_peft_model(build(name), TensLoraConfig(**settings, r=4))
    own, others = list(adapter.parameters()), [p for p in model.parameters() if p.requires_grad]
    assert [p.shape for p in own] == [p.shape for p in others]
    batch, steps = inputs(name), 20 if (mode, factorization) == ("qkv_depth", "tucker") else 3
    for ours, theirs in zip(train(plain, own, batch, steps), train(model, others, batch, steps), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(own, others, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(logits(plain, batch), logits(model, batch))


@pytest.mark.parametrize("name", [*NAMES, "timm_vit"])
def test_merged_equals_adapted_and_unload_gives_the_backbone_back(name: str) -> None:
    backbone, batch = build(name), inputs(name)
    expected = logits(backbone, batch)
    model = trained(get_peft_model(build(name), TensLoraConfig()))
    adapted = logits(model, batch)
    assert (adapted - expected).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-10)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("tenslora" in type(module).__name__.lower() for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), adapted, rtol=0, atol=1e-10)
    unloaded = model.unload()
    torch.testing.assert_close(logits(unloaded, batch), expected, rtol=0, atol=1e-10)
    assert unloaded.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_is_loaded_again(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    config = TensLoraConfig(task_type="SEQ_CLS", scaling="first_step", alpha=2.0, rank_options={"rule": "uniform"})
    model = trained(get_peft_model(build("hf_bert"), config))
    batch = inputs("hf_bert")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    in_tensors = {name: w for name, w in weights.items() if "tenslora" in name}
    assert sum(w.numel() for w in in_tensors.values()) == sum(p.numel() for p in adapter_of(model).parameters())
    assert {name for name in weights if name not in in_tensors} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["ranks"]) == ("TENSLORA", list(adapter_of(model).stages[0].ranks))
    again = PeftModel.from_pretrained(
        build("hf_bert"), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    ).eval()
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-12)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    frozen = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), TensLoraConfig)


@pytest.mark.parametrize(("strategy", "scaling"), [("isoparameters", "direct"), ("isorank", "first_step")])
def test_an_adapter_of_several_stages_is_loaded_with_the_ranks_of_each(
    strategy: str, scaling: str, tmp_path: Path
) -> None:
    model = trained(get_peft_model(build("hf_swin"), TensLoraConfig(rank_strategy=strategy, scaling=scaling)))
    expected = logits(model, inputs("hf_swin"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = [list(stage.ranks) for stage in adapter_of(model).stages]
    assert saved["ranks"] == (ranks if strategy == "isoparameters" else None)
    assert saved["first_step"] == [stage.unscaled_first_step for stage in adapter_of(model).stages]
    again = PeftModel.from_pretrained(build("hf_swin"), str(tmp_path)).eval()
    assert [list(stage.ranks) for stage in adapter_of(again).stages] == ranks
    torch.testing.assert_close(logits(again, inputs("hf_swin")), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "hf_bert",
            {"ranks": [[2, 2, 3, 2], [2, 2, 3, 2]]},
            r"ranks=.*: has 2 entries; must have 1, one for each stage",
        ),
        ("hf_bert", {"first_step": [1.0, 2.0]}, r"first_step=.*: has 2 entries; must have 1, one for each stage"),
        ("hf_swin", {"ranks": [[2, 2, 3, 2]]}, r"ranks=.*: has 1 entries; must have 2, one for each stage"),
        ("hf_swin", {"ranks": [[2, 2, 3, 2], [2, 2, 3, 2]]}, r"the rank 2 of depth must be from 1 to 1"),
        ("hf_swin", {"ranks": [2, [2, 2, 3, 2]]}, r"ranks=.*: must be one rank for each mode, or a list of them for"),
    ],
)
def test_ranks_of_other_stages_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        get_peft_model(build(name), TensLoraConfig(**settings))


def test_the_state_dict_goes_from_one_model_to_another() -> None:
    batch = inputs("hf_bert")
    model = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    other = get_peft_model(build("hf_bert"), TensLoraConfig(seed=1))
    state = get_peft_model_state_dict(model)
    assert set(state) == {f"base_model.tenslora_adapters.{name}" for name, _ in adapter_of(model).named_parameters()}
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=0, atol=1e-12)


def test_an_auto_class_builds_the_backbone_too(tmp_path: Path) -> None:
    backbone: Any = build("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    model = trained(get_peft_model(backbone, TensLoraConfig(task_type="CAUSAL_LM")))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "backbone")
    expected = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again, inputs("llama")), expected, rtol=0, atol=1e-10)
    generated = again.generate(**inputs("llama"), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 10)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_that_peft_names_after_the_adapter_is_made_is_trained(task_type: str) -> None:
    config = TensLoraConfig(task_type=task_type)
    model: Any = get_peft_model(build("hf_bert"), config)
    trained_beside = {name for name, each in model.named_parameters() if each.requires_grad and "tenslora" not in name}
    head = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"
    assert head in model.peft_config["default"].modules_to_save
    assert len(trained_beside) == (0 if task_type == "QUESTION_ANS" else 2)  # this model's head is called classifier
    again: Any = get_peft_model(build("hf_bert"), config)
    assert {name for name, each in again.named_parameters() if each.requires_grad and "tenslora" not in name} == (
        trained_beside
    )


@pytest.mark.parametrize(
    ("name", "value", "saved"),
    [
        ("target_modules", ("query", "value"), ["query", "value"]),
        ("layers_to_transform", range(1), [0]),
        ("ranks", np.array([3, 3, 2, 2]), [3, 3, 2, 2]),
        ("alpha", np.float32(2), 2.0),
        ("seed", np.int64(1), 1),
    ],
)
def test_a_setting_that_is_set_after_the_constructor_has_its_form(
    name: str, value: Any, saved: Any, tmp_path: Path
) -> None:
    config = TensLoraConfig()
    setattr(config, name, value)
    get_peft_model(build("hf_bert"), config).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())[name]
    assert (sorted(written) if name == "target_modules" else written) == saved  # PEFT saves a set in any order


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("exclude_modules", True, "exclude_modules"),
        ("layers_to_transform", "1", "layers_to_transform"),
        ("rank_options", np.array([1, 2]), "rank_options"),
        ("first_step", 10**400, "first_step"),
    ],
)
def test_a_wrong_setting_after_the_constructor_is_one_line(name: str, value: Any, line: str) -> None:
    config = TensLoraConfig()
    setattr(config, name, value)
    with pytest.raises(TensLoRAError, match=f"^{line}"):
        get_peft_model(build("hf_bert"), config)


def test_an_adapter_of_attach_that_peft_freezes_is_told_of() -> None:
    model = nn.ModuleList([build("hf_bert"), build("hf_bert")])
    attach(model[0], AdapterConfig())
    with pytest.warns(UserWarning, match="ModuleList: has an adapter of attach, which PEFT freezes and does not save"):
        get_peft_model(model, TensLoraConfig(target_modules=r"1\..*\.(query|key|value)"))


def test_another_r_or_strategy_beside_ranks_that_were_chosen_already_is_refused(tmp_path: Path) -> None:
    get_peft_model(build("hf_bert"), TensLoraConfig(r=2)).save_pretrained(str(tmp_path))
    config: Any = PeftConfig.from_pretrained(str(tmp_path))
    before = {"r": 2, "rank_strategy": "isoparameters", "rank_options": None}
    for name, value in (("r", 5), ("rank_strategy", "isorank"), ("rank_options", {"rule": "uniform"})):
        line = rf"^{name}=.*: would have no effect beside ranks=\[.*\], which were chosen for {name}={before[name]}"
        with pytest.raises(TensLoRAError, match=line):
            setattr(config, name, value)
    config.ranks = config.first_step = None
    config.r = 5
    model, expected = (get_peft_model(build("hf_bert"), each) for each in (config, TensLoraConfig(r=5)))
    assert adapter_of(model).stages[0].ranks == adapter_of(expected).stages[0].ranks


def test_what_was_chosen_for_a_model_of_other_dimensions_is_told(tmp_path: Path) -> None:
    config = get_peft_model(build("hf_bert"), TensLoraConfig()).peft_config["default"]
    config.save_pretrained(str(tmp_path))
    assert "made_for" not in (tmp_path / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(build("hf_bert"), config)
    with pytest.warns(UserWarning, match=r"^ranks=\[.*\], first_step=.*: taken over from an adapter of a model of"):
        get_peft_model(PlainTransformer(layers=3), config)
    config.ranks = config.first_step = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(PlainTransformer(layers=3), config)
    expected = get_peft_model(PlainTransformer(layers=3), TensLoraConfig())
    assert adapter_of(model).stages[0].ranks == adapter_of(expected).stages[0].ranks


def test_updates_of_adapt_tensor_that_peft_freezes_are_told() -> None:
    model = build("hf_bert")
    adapt_tensor(model.get_submodule("bert.pooler.dense"), "weight", 2)
    with pytest.warns(UserWarning, match="has updates of adapt_tensor, which PEFT freezes and does not save"):
        get_peft_model(model, TensLoraConfig())


def test_layers_that_have_another_adapter_are_refused() -> None:
    attached = build("hf_bert")
    attach(attached, AdapterConfig())
    with pytest.raises(TensLoRAError, match=r"query: has an adapter already; detach it first"):
        get_peft_model(attached, TensLoraConfig())
    with_lora: Any = get_peft_model(build("hf_bert"), PeftLora(target_modules=["query"]))
    refused = pytest.raises(TensLoRAError, match=r"query: is a layer of another adapter \(Linear of PEFT\)")
    with warnings.catch_warnings(), refused:
        warnings.simplefilter("ignore", UserWarning)  # PEFT's own, of a second adapter
        get_peft_model(with_lora.get_base_model(), TensLoraConfig(), adapter_name="other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_neither_saved_nor_merged(value: float, tmp_path: Path) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.add_adapter("other", TensLoraConfig())
    with torch.no_grad():
        depth = [own for name, own in adapter_of(model).named_parameters() if name.endswith("depth")]
        depth[0][-1] = value  # that of the last layer
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TensLoRAError, match=r"^cannot be saved: .*tensors\.0\.depth holds a NaN or an infinity"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == saved
    for merge in (model.merge_adapter, model.merge_and_unload, partial(model.merge_adapter, ["other", "default"])):
        with pytest.raises(
            TensLoRAError, match=r"layer\.1\.attention\.self\.query: its weight would hold a NaN or an inf"
        ):
            merge()
        assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items() if "adapters" not in name)
    model.merge_adapter(["other"])


def test_a_merge_looks_at_the_sum() -> None:
    backbone: Any = build("hf_bert").half()
    query = backbone.bert.encoder.layer[1].attention.self.query
    query.weight.data.fill_(6e4)
    model: Any = trained(get_peft_model(backbone, TensLoraConfig(tensor_mode="lora", alpha=1e5)))
    update = query.weight + model.base_model.model.get_submodule(
        "bert.encoder.layer.1.attention.self.query"
    ).get_delta_weight("default").to(query.weight)
    assert torch.isinf(update).any()
    with pytest.raises(TensLoRAError, match="its weight would hold a NaN or an infinity in float16"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.base_model.model.get_submodule("bert.encoder.layer.1.attention.self.query").merge(safe_merge=True)
    assert torch.equal(query.weight, torch.full_like(query.weight, 6e4))


def test_a_merge_that_a_layer_cannot_take_changes_none() -> None:
    backbone: Any = build("hf_bert")
    path = "bert.encoder.layer.1.attention.self.query"
    prune_weight.l1_unstructured(backbone.get_submodule(path), "weight", 0.5)  # type: ignore[no-untyped-call]
    model: Any = trained(get_peft_model(backbone, TensLoraConfig()))
    before = logits(model, inputs("hf_bert"))
    pruned = model.base_model.model.get_submodule(path)
    message = rf"^{path}: its weight is computed from other tensors, as after pruning"
    for call in (model.merge_adapter, model.merge_and_unload, pruned.merge):
        with pytest.raises(TensLoRAError, match=message):
            call()
        assert model.get_model_status().merged_adapters == []
        assert torch.equal(logits(model, inputs("hf_bert")), before)
    prune_weight.remove(pruned.base_layer, "weight")  # type: ignore[no-untyped-call]
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs("hf_bert")), before)


def test_layers_whose_adapter_was_deleted_are_merged_as_with_lora() -> None:
    batch = inputs("gpt2")
    model: Any = get_peft_model(build("gpt2"), TensLoraConfig(layers_to_transform=[0]))
    model.add_adapter("other", TensLoraConfig(layers_to_transform=[1]))
    model.set_adapter("other")
    trained(model, name="other")
    expected = logits(model, batch)
    model.delete_adapter("default")
    lora_config, state = convert_to_lora(model, rank=24, adapter_name="other")
    again = get_peft_model(build("gpt2"), lora_config)
    set_peft_model_state_dict(again, state)
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-4)
    with pytest.raises(TensLoRAError, match=r"^adapter_name=default: is no adapter of this model, which has other$"):
        convert_to_lora(model, rank=1)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload(), batch), expected)
    model.delete_adapter("other")
    model.merge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), logits(build("gpt2"), batch))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
@pytest.mark.parametrize(
    "around",
    [
        PeftLora(target_modules=["query", "key"], init_lora_weights=False),
        IA3Config(target_modules=["query", "key"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["added", "multiplied"],
)
def test_layers_of_another_method_around_it_are_merged_with_it(around: PeftConfig) -> None:
    batch = inputs("hf_bert")
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    get_peft_model(model.get_base_model(), around, adapter_name="around")
    expected = logits(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's, of a layer that is merged twice
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected)


@pytest.mark.parametrize(
    ("task_type", "kind"),
    [
        ("SEQ_CLS", PeftModelForSequenceClassification),
        ("CAUSAL_LM", PeftModelForCausalLM),
        ("FEATURE_EXTRACTION", PeftModelForFeatureExtraction),
        ("TOKEN_CLS", PeftModelForTokenClassification),
        (None, PeftModel),
    ],
)
def test_each_task_has_pefts_own_class_and_is_loaded_again(
    task_type: str | None, kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "llama" if task_type == "CAUSAL_LM" else "hf_bert"

    def backbone() -> Any:
        model: Any = build(name)
        return model.bert if task_type == "FEATURE_EXTRACTION" else model

    def outputs(model: Any) -> Tensor:
        made = model(**inputs(name))
        return made.logits if "logits" in made else made.last_hidden_state

    model: Any = trained(get_peft_model(backbone(), TensLoraConfig(task_type=task_type)))
    assert type(model).__name__ == kind.__name__
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(backbone(), str(tmp_path)).eval()
    assert type(again).__name__ == kind.__name__
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-10)
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf_bert", "hf_roberta"])  # whose heads are a Linear, and a module of several
def test_a_trained_head_stays_when_the_adapter_is_merged(name: str, tmp_path: Path) -> None:
    batch = inputs(name)
    get_peft_model(build(name), TensLoraConfig(task_type="SEQ_CLS")).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: weight + 0.1 for key, weight in load_file(path).items()}, path)
    model: Any = PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    expected = logits(model, batch)
    assert (expected - logits(build(name), batch)).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-10)
    assert merged.state_dict().keys() == build(name).state_dict().keys()


def test_an_adapter_is_loaded_from_the_hub_by_its_name(commands: Commands, tmp_path: Path) -> None:
    model = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    model.save_pretrained(str(repository(commands.hub.folder, "models", "user/adapter")))
    save_file({"logits": logits(model, inputs("hf_bert")).detach()}, tmp_path / "expected.safetensors")
    program = f"""
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
import tenslora.peft
from tests.models import build, inputs, logits

model = PeftModel.from_pretrained(build("hf_bert"), "user/adapter").eval()
expected = load_file({str(tmp_path / "expected.safetensors")!r})["logits"]
torch.testing.assert_close(logits(model, inputs("hf_bert")), expected, rtol=0, atol=1e-10)
"""
    (tmp_path / "loads.py").write_text(program)
    ended = commands.run(Command(str(tmp_path / "loads.py"), [], ROOT))
    assert ended.status == 0, ended.err
    assert any(
        request.endswith("user/adapter/resolve/main/adapter_model.safetensors") for request in commands.hub.requests
    )


def test_an_adapter_that_is_not_active_is_not_trained_and_the_other_trains_as_if_alone() -> None:
    batch = inputs("hf_bert")

    def alone(seed: int) -> list[Tensor]:
        model = get_peft_model(build("hf_bert"), TensLoraConfig(seed=seed))
        train(model, [p for p in model.parameters() if p.requires_grad], batch)
        return list(adapter_of(model).parameters())

    model = get_peft_model(build("hf_bert"), TensLoraConfig(seed=0))
    model.add_adapter("other", TensLoraConfig(seed=1))
    for name in ("other", "default"):
        model.set_adapter(name)
        active = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in active} == {id(p) for p in adapter_of(model, name).parameters()}
        train(model, active, batch)
    for seed, name in enumerate(("default", "other")):
        for ours, expected in zip(adapter_of(model, name).parameters(), alone(seed), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["hf_bert", "llama", "timm_vit"])
def test_a_step_takes_the_operations_that_it_takes_with_attach(name: str) -> None:
    def operations(model: nn.Module) -> list[str]:
        loss = logits(model, inputs(name)).square().mean()
        with RecordedOperations() as recorded:
            torch.autograd.backward(loss)
        with RecordedOperations() as forward:
            logits(model, inputs(name))
        return [*forward.names, *recorded.names]

    plain = build(name)
    attach(plain, AdapterConfig()).double()
    assert operations(get_peft_model(build(name), TensLoraConfig())) == operations(plain)


def test_several_adapters_are_switched_added_up_and_deleted() -> None:
    batch = inputs("hf_bert")
    model = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    alone = logits(model, batch)
    hidden = model.base_model.model.bert.encoder.layer[1].attention.self.key
    delta = hidden.get_delta_weight("default")
    model.add_adapter("other", TensLoraConfig(tensor_mode="att_depth", adapt="qkvo"))
    assert torch.equal(logits(model, batch), alone)  # an added adapter is not active
    assert all(p.requires_grad for p in adapter_of(model).parameters())
    trained(model, seed=8, name="other")
    model.set_adapter("other")
    other = logits(model, batch)
    assert (other - alone).abs().max() > 1e-4
    assert not any(p.requires_grad for p in adapter_of(model).parameters())
    assert all(p.requires_grad for p in adapter_of(model, "other").parameters())
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, batch)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(logits(merged, batch), both, rtol=0, atol=1e-10)
    model.set_adapter("default")
    assert torch.equal(hidden.get_delta_weight("default"), delta)
    assert torch.equal(logits(model, batch), alone)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
        model.delete_adapter("other")
    assert list(model.base_model.tenslora_adapters) == ["default"]
    assert torch.equal(logits(model, batch), alone)


@pytest.mark.parametrize(
    ("name", "settings", "adapted"),
    [
        ("hf_bert", {"target_modules": ["query", "value"]}, ("qv", 2)),
        ("hf_bert", {"target_modules": r".*layer\.1\..*(query|key|value)"}, ("qkv", 1)),
        ("hf_bert", {"target_modules": "(?i).*(QUERY|KEY)"}, ("qk", 2)),
        ("hf_bert", {"exclude_modules": "(?ix) .* KEY  # with a comment"}, ("qv", 2)),
        ("hf_bert", {"layers_to_transform": [0]}, ("qkv", 1)),
        ("hf_bert", {"exclude_modules": ["key"]}, ("qv", 2)),
        ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, ("qkvo", 2)),
        ("llama", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, ("mlp", 2)),
        ("timm_vit", {"adapt": "qv"}, ("qv", 2)),
        ("timm_vit", {"adapt": "qv", "target_modules": ["blocks.1.attn.qkv"]}, ("qv", 1)),
        ("gpt2", {"target_modules": ["c_attn"]}, ("qkv", 2)),
        ("hf_swin", {"target_modules": ["query", "value", "q_proj", "v_proj"]}, ("qv", 2, 1)),  # of several versions
        ("hf_swin", {"target_modules": r".*layers\.1\..*(query|key|value|[qkv]_proj)"}, ("qkv", 1)),
        ("hf_swin", {"layers_to_transform": [1]}, ("qkv", 1)),  # the first number in a path is the stage's
        ("hf_swin", {"layers_to_transform": [0], "layers_pattern": "blocks"}, ("qkv", 1, 1)),
        ("timm_swin", {"layers_to_transform": [0]}, ("qkv", 1, 1)),  # the first with two names before it is the layer's
        ("timm_swin", {"layers_to_transform": [1], "layers_pattern": "layers"}, ("qkv", 1)),
    ],
)
def test_names_choose_matrices_and_layers(name: str, settings: dict[str, Any], adapted: tuple[Any, ...]) -> None:
    model = get_peft_model(build(name), TensLoraConfig(**settings))
    geometries = [stage.geometry for stage in adapter_of(model).stages]
    assert (geometries[0].adapt, *(geometry.layers for geometry in geometries)) == adapted
    held = [module for module in model.modules() if isinstance(module, TensLoraLinear)]
    assert len(held) == len(model.base_model.targeted_module_names)
    assert all(module.updates for module in held)


def test_a_tower_that_is_left_out_may_be_of_any_kind() -> None:
    model = nn.ModuleDict({"text": PlainTransformer(), "odd": PlainTransformer()})
    model.get_submodule("odd.blocks.0.attention").key = nn.Linear(20, 24)
    way_out = r"^odd\.blocks\.0\.attention\.key: has 20 inputs, .*; exclude_modules can leave it out$"
    with pytest.raises(TensLoRAError, match=way_out):
        get_peft_model(model, TensLoraConfig())
    names = get_peft_model(model, TensLoraConfig(exclude_modules=r"odd\..*")).base_model.targeted_module_names
    assert names and all(name.startswith("text.") for name in names)


def test_a_gate_that_is_left_out_is_not_adapted() -> None:
    for settings in ({"target_modules": ["up_proj", "down_proj"]}, {"adapt": "all", "exclude_modules": ["gate_proj"]}):
        with pytest.raises(TensLoRAError, match="must match some of query, key, value and output, or the whole feed-f"):
            get_peft_model(build("llama"), TensLoraConfig(**settings))


def test_modules_that_match_and_get_no_adapter_are_named() -> None:
    with pytest.warns(UserWarning, match="^target_modules also match classifier, which can have no adapter here: "):
        get_peft_model(build("hf_bert"), TensLoraConfig(target_modules=["query", "value", "classifier"]))


@pytest.mark.parametrize(("name", "adapt"), [("hf_bert", "o"), ("hf_bert", "mlp"), ("timm_vit", "all"), ("gpt2", "o")])
def test_a_lora_is_made_of_no_layers_but_the_adapted_ones(
    name: str, adapt: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model: Any = get_peft_model(build(name).float(), TensLoraConfig(adapt=adapt))
    lora_config, state = convert_to_lora(model, rank=1)
    again = get_peft_model(build(name).float(), lora_config)
    adapted = {path for path, layer in again.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == {path for path, layer in model.named_modules() if isinstance(layer, TensLoraLinear)}
    assert len(state) == 2 * len(adapted)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build(name).float(), str(tmp_path))
    assert not [each for each in recwarn if "target_modules also match" in str(each.message)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"exclude_modules": r".*crossattention.*"}, None),
        ({"target_modules": r".*\.attn\.c_attn"}, None),
        ({}, r"is a cross-attention, .*, which is not supported; exclude_modules can leave it out$"),
        (
            {"exclude_modules": ["q_attn"]},
            r"is a cross-attention, .*, which is not supported; exclude_modules can leave it out$",
        ),
        (
            {"target_modules": ["c_attn"]},
            r"is a cross-attention, .*, which is not supported; exclude_modules can leave it out$",
        ),
        (
            {"exclude_modules": ["attn", "crossattention", "c_attn", "q_attn", "c_proj"]},
            "must leave some of the model's attention",
        ),
    ],
)
def test_attention_of_a_kind_that_cannot_be_adapted_may_be_left_out(
    settings: dict[str, Any], problem: str | None
) -> None:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 50, "n_positions": 16}
    backbone: Any = transformers.GPT2Model(transformers.GPT2Config(**sizes, add_cross_attention=True))
    if problem is None:
        model = get_peft_model(backbone, TensLoraConfig(**settings))
        adapted = [path for path, module in model.named_modules() if isinstance(module, TensLoraLinear)]
        assert adapted == [f"base_model.model.h.{layer}.attn.c_attn" for layer in range(2)]
    else:
        with pytest.raises(TensLoRAError, match=problem):
            get_peft_model(backbone, TensLoraConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": r"blocks\.0.*"},
        {"target_modules": r"blocks\.1.*(query|key|value)"},
    ],
)
def test_a_layer_that_shares_its_weights_is_adapted_alone(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tied, x = PlainTransformer(), torch.randn(2, 5, 24)
    for name in ("query", "key", "value"):
        tied.get_submodule(f"blocks.1.attention.{name}").weight = tied.get_parameter(
            f"blocks.0.attention.{name}.weight"
        )
    untied = PlainTransformer()
    untied.load_state_dict(tied.state_dict())
    with pytest.raises(
        TensLoRAError, match=r"1\.attention\.query: would be adapted twice, here and as blocks\.0\.attent"
    ):
        get_peft_model(copy.deepcopy(tied), TensLoraConfig(adapt="q"))
    dense = trained(get_peft_model(untied, TensLoraConfig(**settings))).merge_and_unload()
    model = trained(get_peft_model(tied, TensLoraConfig(**settings)))
    torch.testing.assert_close(model(x), dense(x))
    with pytest.raises(TensLoRAError, match=r"^blocks\.1\.attention\.query: its weight is shared by blocks\.0\.att"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_mode": "nope"}, "nope"),
        ({"dropout": 2.0}, "dropout=2.0: must be"),
        ({"alpha": "4"}, 'alpha="4": must be a finite number'),
        ({"r": 2.5}, r"r=2\.5: must be a whole number"),
        ({"ranks": [4, None]}, r"ranks\[1\]=null: must be a whole number"),
        ({"target_modules": 5}, "target_modules=5: must be a list or text or null"),
        ({"target_modules": "("}, r'target_modules=\["\("\]: not a regular expression'),
        ({"rank_options": [1]}, r"rank_options=\[1\]: must be one of cap"),
        ({"rank_options": {"cap": 1}}, "cap=1: must be true or false"),
        ({"rank_options": {"nope": 1}}, "rank_options=nope: must be one of cap, rule, scale, tolerance"),
        ({"first_step": 0.0, "scaling": "first_step"}, r"^first_step=0\.0: must be above 0$"),
        ({"first_step": [1.0, -1.0]}, r"^first_step=-1\.0: must be above 0$"),
        ({"layers_pattern": "layer"}, "layers_pattern=layer: needs layers_to_transform"),
        ({"target_modules": ["classifier"]}, r"^target_modules=\['classifier'\]: must leave some of the model's"),
        ({"target_modules": ()}, r"^target_modules=\[\]: must leave some of the model's"),
        ({"target_modules": "all-linear"}, "^target_modules=all-linear: must be names .* adapt=all adapts all"),
        ({"target_modules": ""}, r"^target_modules=: must leave some of the model's"),
        ({"adapt": ""}, "^adapt=: must be"),
        ({"layers_to_transform": [7]}, r"^layers_to_transform=\[7\]: must leave some of the model's attention"),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers"},
            r"^layers_to_transform=\[0\], layers_pattern=layers: must leave some of the model's attention",
        ),
        ({"target_modules": ["layer.0.attention.self.query", "layer.1.attention.self.key"]}, "the same matrices"),
        ({"target_modules": ["intermediate.dense"]}, "or the whole feed-forward block"),
        (
            {"modules_to_save": ["classifier", "attention"]},
            r"^modules_to_save=attention: holds bert\.encoder",
        ),
        ({"modules_to_save": ["query"]}, r"^modules_to_save=query: holds bert\.encoder\.layer\.0"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = build("hf_bert")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(TensLoRAError, match=message) as caught:
        get_peft_model(model, TensLoraConfig(**settings))
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == modules
    assert not model._forward_hooks


def test_a_pattern_that_would_take_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenslora.peft.tuner.first_matches", partial(first_matches, seconds=0.3))
    with pytest.raises(TensLoRAError, match=r"target_modules=.*takes more than 0\.3 seconds"):
        get_peft_model(build("hf_bert"), TensLoraConfig(target_modules=r"((\w*)*\.*)*x!"))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (None, "lacks tensors.0.core"),
        (torch.full((1,), float("nan")), r"tensors.0.core has the shape \(1,\), not"),
        (float("nan"), "tensors.0.core holds a NaN or an infinity"),
    ],
)
def test_a_damaged_adapter_is_refused_when_it_is_loaded(
    tensor: Tensor | float | None, problem: str, tmp_path: Path
) -> None:
    get_peft_model(build("hf_bert"), TensLoraConfig()).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith("core")]
    core = weights.pop(name)
    if tensor is not None:
        weights[name] = torch.full_like(core, tensor) if isinstance(tensor, float) else tensor
    save_file(weights, path)
    with pytest.raises(TensLoRAError, match=f"the saved adapter does not fit: {problem}") as caught:
        PeftModel.from_pretrained(build("hf_bert"), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_second_adapter_that_does_not_fit_leaves_the_first_as_it_was() -> None:
    model = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    expected = logits(model, inputs("hf_bert"))
    with pytest.raises(TensLoRAError):
        model.add_adapter("other", TensLoraConfig(rank_strategy="explicit", ranks=[1, 2]))
    assert list(model.peft_config) == list(model.base_model.tenslora_adapters) == ["default"]
    assert torch.equal(logits(model, inputs("hf_bert")), expected)


def test_what_shared_tensors_cannot_do_is_said(tmp_path: Path) -> None:
    model = get_peft_model(build("hf_bert"), TensLoraConfig())
    with pytest.raises(ValueError, match="TensLoRA does not support adapter_names"):
        model(**inputs("hf_bert"), adapter_names=["default", "default"])
    with pytest.raises(NotImplementedError, match="does not support add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises((ValueError, NotImplementedError), match="shared"):
        inject_adapter_in_model(TensLoraConfig(), build("hf_bert"))


def test_a_half_precision_backbone_gets_an_adapter_in_float32_unless_told_otherwise() -> None:
    model = get_peft_model(build("hf_bert").to(torch.bfloat16), TensLoraConfig())
    assert {p.dtype for p in adapter_of(model).parameters()} == {torch.float32}
    assert logits(model, inputs("hf_bert")).dtype == torch.bfloat16
    model = get_peft_model(build("hf_bert").to(torch.bfloat16), TensLoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_of(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        backbone: Any = build("llama")
        if checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = trained(get_peft_model(backbone, TensLoraConfig(task_type="CAUSAL_LM"))).train()
        batch = inputs("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad for p in adapter_of(model).parameters() if p.grad is not None]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-12)


def test_a_compiled_model_computes_the_same() -> None:
    model = trained(get_peft_model(build("separate"), TensLoraConfig()))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    batch = inputs("separate")
    torch.testing.assert_close(logits(compiled, batch), logits(model, batch), rtol=0, atol=1e-12)


def test_a_copy_trains_apart_from_its_original() -> None:
    model = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    batch = inputs("hf_bert")
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    trained(twin, seed=9)
    assert not torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


def test_a_new_head_is_trained_beside_it_as_beside_lora() -> None:
    def others(config: PeftConfig) -> set[str]:
        model = get_peft_model(build("hf_bert"), config)
        return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}

    ours = {n for n in others(TensLoraConfig(task_type="SEQ_CLS")) if "tenslora" not in n}
    assert ours == others(PeftLora(task_type="SEQ_CLS")) != set()


def test_the_method_is_registered_once() -> None:
    import tenslora.peft.tuner

    tenslora.peft.tuner.register()
    assert [str(member.value) for member in PeftType].count("TENSLORA") == 1
    assert PeftType("TENSLORA") is PeftType.TENSLORA is copy.deepcopy(PeftType["TENSLORA"])


def test_an_older_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tenslora.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("peft.utils.get_quantization_kwargs")
    with pytest.raises(ImportError, match="get_quantization_kwargs"):
        importlib.import_module("tenslora.peft")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.18.0")
    with pytest.raises(
        TensLoRAError, match=r"^peft 0\.18\.0: must be 0\.21 or later for tenslora\.peft \(cannot import"
    ):
        importlib.import_module("tenslora.peft")


def test_a_model_that_answers_none_for_names_that_it_does_not_know_is_named() -> None:
    class Anything(PlainTransformer):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    with pytest.raises(
        TensLoRAError, match=r"^Anything: its attribute peft_config is of type NoneType; must be PEFT's"
    ):
        get_peft_model(Anything(), TensLoraConfig())


def test_a_prepared_model_starts_unchanged() -> None:
    backbone = build("llama")
    expected = logits(backbone, inputs("llama"))
    model = get_peft_model(prepare_model_for_kbit_training(backbone), TensLoraConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(model, inputs("llama")).double(), expected, rtol=0, atol=1e-4)


def test_two_processes_under_the_trainer_train_what_one_does(commands: Commands, tmp_path: Path) -> None:
    command = Command("tests.peft.train_in_trainer", [str(tmp_path / "two"), "8"], ROOT)
    ends = commands.run_together(started_by_torchrun(command, 2))
    assert [ended.status for ended in ends] == [0, 0], ends
    train_in_trainer(tmp_path / "one", 16)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(weight.abs().max() > 1e-3 for name, weight in one.items() if name.endswith(".core"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)


def test_an_adapter_whose_name_is_refused_leaves_the_others_at_work() -> None:
    model = get_peft_model(build("hf_bert"), TensLoraConfig())
    for name in ("a.b", "update"):  # torch allows neither in a ModuleDict
        with pytest.raises(KeyError):
            model.add_adapter(name, TensLoraConfig())
    model.add_adapter("other", TensLoraConfig(tensor_mode="depth"))
    model.set_adapter("other")
    logits(model, inputs("hf_bert"))


@pytest.mark.filterwarnings("ignore:For backward hooks to be called", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_on_a_linear_see_its_own_output_as_with_lora(everywhere: bool) -> None:
    model, seen = build("hf_bert"), list[Any]()
    linear = model.get_submodule("bert.encoder.layer.1.attention.self.query")

    def look(module: nn.Module, _: Any, output: Tensor) -> None:
        if module is linear:
            seen.append(tuple(output.shape))

    def look_back(module: nn.Module, *_: Any) -> None:
        if module is linear:
            seen.append("backward")

    hooks = [
        nn.modules.module.register_module_forward_hook(look) if everywhere else linear.register_forward_hook(look),
        nn.modules.module.register_module_full_backward_hook(look_back)
        if everywhere
        else linear.register_full_backward_hook(look_back),
    ]
    try:
        peft_model: Any = get_peft_model(model, TensLoraConfig())
        outputs = logits(peft_model, inputs("hf_bert"))
        torch.autograd.backward(outputs.sum())
    finally:
        for hook in hooks:
            hook.remove()
    batch, tokens = inputs("hf_bert")["input_ids"].shape
    assert seen == [(batch, tokens, 24), "backward"]
    assert all(parameter.grad is not None for parameter in adapter_of(peft_model).parameters())


@pytest.mark.parametrize("again", ["backbone", "PeftModel"])
def test_a_second_call_on_one_model_is_refused_and_leaves_the_first_as_it_was(again: str) -> None:
    base = build("hf_bert")
    model = trained(get_peft_model(base, TensLoraConfig()))
    before = logits(model, inputs("hf_bert"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in ("default", "other"):
        with (
            pytest.warns(UserWarning, match="for a second time"),
            pytest.raises(TensLoRAError, match=r"has a TensLoRA adapter in PEFT already; .*, or make the model anew$"),
        ):
            get_peft_model(
                base if again == "backbone" else model,
                TensLoraConfig(seed=1),
                adapter_name=name,
            )
    assert torch.equal(logits(model, inputs("hf_bert")), before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert {name: config.seed for name, config in model.peft_config.items()} == {"default": 0}
    model.add_adapter("other", TensLoraConfig(seed=1))
    next_model = get_peft_model(model.unload(), TensLoraConfig(seed=1))
    assert torch.equal(logits(next_model, inputs("hf_bert")), logits(build("hf_bert"), inputs("hf_bert")))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("beside", ["", "model", "PeftModel"])
def test_ctrl_c_while_it_is_put_on_leaves_the_model_as_it_was(beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model: Any = build("hf_bert")
    if beside:
        peft_model = get_peft_model(model, PeftLora(target_modules=["dense"]), adapter_name="one")
        model = peft_model if beside == "PeftModel" else model
    before = [(name, type(part)) for name, part in model.named_modules()]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("peft.tuners.tuners_utils.set_additional_trainable_modules", interrupted)
        get_peft_model(model, TensLoraConfig())
    assert [(name, type(part)) for name, part in model.named_modules()] == before
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert list(getattr(model, "peft_config", {})) == (["one"] if beside else [])
    turned = trained(get_peft_model(model, TensLoraConfig()))
    logits(turned, inputs("hf_bert"))  # whose hooks find the adapted layers


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("order", [1, -1])
def test_an_adapter_of_another_method_keeps_its_settings(order: int, tmp_path: Path) -> None:
    # PEFT lets both methods write into one dict.
    first, second = (TensLoraConfig(), PeftLora(target_modules=["intermediate.dense"]))[::order]
    model: Any = get_peft_model(build("hf_bert"), first)
    names = [name for name, _ in model.named_parameters()]
    kind = model.peft_config["default"].peft_type
    with pytest.raises(
        TensLoRAError, match=f"^adapter_name=default: is already the name of an adapter on .* {kind.value}"
    ):
        get_peft_model(model, second)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.peft_config["default"].peft_type is kind
    both: Any = get_peft_model(model, second, adapter_name="two")
    copy.deepcopy(both).save_pretrained(tmp_path)
    for folder, config in ((tmp_path / "default", first), (tmp_path / "two", second)):
        folder = folder if folder.exists() else tmp_path
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == config.peft_type


@pytest.mark.parametrize("around", [PromptTuningConfig, PromptEncoderConfig])
def test_a_method_that_trains_a_prompt_goes_around_it_as_around_lora(around: Any, tmp_path: Path) -> None:
    x = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    trained_of, shapes = [], []
    for inner in (TensLoraConfig(), PeftLora(target_modules=["query", "key", "value"])):
        config = around(num_virtual_tokens=3, task_type="SEQ_CLS")
        model: Any = get_peft_model(get_peft_model(build("hf_bert"), inner, adapter_name="one"), config, "two")
        model(**x).logits.sum().backward()
        trained_of.append({name for name, each in model.named_parameters() if each.grad is not None})
        model.save_pretrained(tmp_path / inner.peft_type)
        model.load_adapter(str(tmp_path / inner.peft_type / "two"), adapter_name="three")
        shapes.append(model.eval()(**x).logits.shape)
    assert trained_of[0] == trained_of[1] and any("prompt_encoder" in name for name in trained_of[0])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "fused"), [("gpt2", ["c_attn"]), ("llama", ["q_proj", "k_proj", "v_proj"])])
def test_a_layer_tells_what_a_lora_layer_tells_of_its_linear(name: str, fused: list[str]) -> None:
    def told(config: PeftConfig) -> list[tuple[Any, ...]]:
        model: Any = get_peft_model(build(name), config)
        layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer) and hasattr(each, "base_layer")]
        return [(each.in_features, each.out_features, each.weight.shape, each.bias is None) for each in layers]

    assert told(TensLoraConfig()) == told(PeftLora(target_modules=fused, fan_in_fan_out=name == "gpt2"))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adaption_prompt_goes_around_it() -> None:
    inner = trained(get_peft_model(build("llama"), TensLoraConfig(), adapter_name="one"), name="one")
    expected = logits(inner, inputs("llama"))
    config = AdaptionPromptConfig(adapter_layers=2, adapter_len=3, task_type="CAUSAL_LM", target_modules="self_attn")
    torch.testing.assert_close(logits(get_peft_model(inner, config, "two"), inputs("llama")), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapter_is_neither_saved_nor_loaded_without_its_tensors(tmp_path: Path) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    around: Any = get_peft_model(model.get_base_model(), PeftLora(target_modules=["dense"]), adapter_name="style")
    with pytest.raises(TensLoRAError, match=r"^PeftModel: has 0 of the 5 tensors of the adapter default, and PEFT"):
        around.save_pretrained(tmp_path)
    around.save_pretrained(tmp_path, selected_adapters=["style"])
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 5
    saved = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(TensLoRAError, match=r"^PeftModel: has no tensors of the adapter default; load it into the"):
        set_peft_model_state_dict(around, saved)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TensLoRAError, match=r"has none of its tensors, such as base_model\.\S+, but nothing$"):
        PeftModel.from_pretrained(build("hf_bert"), str(tmp_path))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.", "module.base_model."),
        ("base_model.", "_orig_mod.base_model."),
        ("base_model.", ""),
        ("adapters.", "adapters.default."),
        ("base_model.tenslora_adapters", "foo"),
    ],
)
def test_keys_that_are_none_of_the_adapters_are_refused(before: str, after: str) -> None:
    model: Any = get_peft_model(build("hf_bert"), TensLoraConfig(), adapter_name="other")
    right = get_peft_model_state_dict(model, adapter_name="other")
    state = {key.replace(before, after): tensor for key, tensor in right.items()}
    with pytest.raises(
        TensLoRAError,
        match="^tenslora_adapters.other: the saved adapter does not fit: has none of its tensors, such as "
        f"{next(iter(right))}, but {next(iter(state))}$",
    ):
        set_peft_model_state_dict(model, state, adapter_name="other")
    set_peft_model_state_dict(model, model.state_dict(), adapter_name="other")


@pytest.mark.usefixtures("one_process")
def test_the_first_of_several_processes_loads_no_adapter_without_tensors() -> None:
    with pytest.raises(TensLoRAError, match="the saved adapter does not fit: has none of its tensors"):
        set_peft_model_state_dict(get_peft_model(build("hf_bert"), TensLoraConfig()), {})


def test_a_buffer_that_a_profiler_has_put_there_is_not_saved(tmp_path: Path) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path)).eval()
    batch = inputs("hf_bert")
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


def test_nothing_is_saved_beside_an_adapter_whose_settings_were_deleted(tmp_path: Path) -> None:
    model: Any = get_peft_model(build("hf_bert"), TensLoraConfig())
    model.add_adapter("other", TensLoraConfig(seed=1))
    settings = model.peft_config.pop("other")
    with pytest.raises(TensLoRAError, match=r"^peft_config: has no settings of the adapter other, which is on the"):
        model.save_pretrained(tmp_path)
    model.peft_config["other"] = settings
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"r": -1}, "r=-1: must be at least 1"),
        ({"r": 33, "rank_strategy": "isorank"}, "r=33: must be from 1 to 24, the width of a projection"),
        ({"rank_strategy": "nope"}, "rank_strategy=nope: must be one of isorank, isoparameters, explicit"),
    ],
)
def test_an_error_of_the_rank_strategy_names_the_setting_as_it_is_called_here(
    settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(TensLoRAError) as raised:
        get_peft_model(build("hf_bert"), TensLoraConfig(**settings))
    assert str(raised.value) == line


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_names_that_would_keep_tensors_from_being_saved_are_refused(tmp_path: Path) -> None:
    for mode, names, shared in (
        ("depth", ("0", "1"), "1"),
        ("qkv_depth", ("query", "core"), "core"),
        ("depth", ("d_in", "second"), "d_in"),
    ):
        model: Any = get_peft_model(build("hf_bert"), TensLoraConfig(tensor_mode=mode), adapter_name=names[0])
        with pytest.raises(TensLoRAError, match=rf"^adapter_name={shared}: is a part of tenslora_adapters\.") as caught:
            model.add_adapter(names[1], TensLoraConfig(seed=1))
        assert "\n" not in str(caught.value)
        kind = "a part of" if shared == names[1] else "already the name of"
        with pytest.raises(TensLoRAError, match=rf"^adapter_name={shared}: is {kind}"):
            get_peft_model(model, PeftLora(target_modules=["dense"]), adapter_name=shared)
        assert list(model.peft_config) == list(model.base_model.tenslora_adapters) == [names[0]]
    trained(model, name="d_in").save_pretrained(tmp_path)  # alone it has no other's name
    again = PeftModel.from_pretrained(build("hf_bert"), str(tmp_path / "d_in"))
    torch.testing.assert_close(logits(again, inputs("hf_bert")), logits(model, inputs("hf_bert")))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_module_to_save_that_the_model_does_not_have_is_told(task_type: str | None) -> None:
    config = TensLoraConfig(task_type=task_type, modules_to_save=["clasifier", "pooler"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        get_peft_model(build("hf_bert"), config)
    lines = [str(each.message) for each in told if "modules_to_save" in str(each.message)]
    (line,) = lines  # PEFT's own score is none of the user's
    assert line.startswith("modules_to_save=clasifier: is the end of no module's path in BertForSequence")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("my_classifier", {"modules_to_save": ["classifier"]}),
        ("my_classifier", {"task_type": "SEQ_CLS"}),
        ("my_classifier", {"task_type": "TOKEN_CLS"}),
        ("qa_outputs", {"task_type": "QUESTION_ANS"}),
    ],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapter_that_peft_would_take_for_a_head_is_refused(name: str, settings: dict[str, Any]) -> None:
    line = rf"^adapter_name={name}: tenslora_adapters\.{name} ends in \w+, and PEFT would take it for the module"
    model: Any = build("hf_bert")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(TensLoRAError, match=line):
        get_peft_model(model, TensLoraConfig(**settings), adapter_name=name)
    assert [type(module) for module in model.modules()] == modules
    model = get_peft_model(model, TensLoraConfig(), adapter_name=name)
    with pytest.raises(TensLoRAError, match=line):
        model.add_adapter("other", TensLoraConfig(modules_to_save=[name]))
    with pytest.raises(TensLoRAError, match=line):
        get_peft_model(model, PeftLora(target_modules=["dense"], **settings), adapter_name="other")
    assert list(model.peft_config) == list(model.base_model.tenslora_adapters) == [name]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_that_is_added_or_loaded_freezes_no_other(is_trainable: bool, tmp_path: Path) -> None:
    model: Any = get_peft_model(build("hf_bert"), TensLoraConfig())
    model.save_pretrained(tmp_path)

    def trainable() -> dict[str, set[bool]]:
        adapters = model.base_model.tenslora_adapters
        return {name: {each.requires_grad for each in adapter_of(model, name).parameters()} for name in adapters}

    model.load_adapter(str(tmp_path), "reference", is_trainable=is_trainable)
    assert trainable() == {"default": {True}, "reference": {is_trainable}}
    model.add_adapter("third", TensLoraConfig(inference_mode=True))
    assert trainable() == {"default": {True}, "reference": {is_trainable}, "third": {False}}
    model.set_requires_grad("default", False)
    model.load_adapter(str(tmp_path), "fourth")
    assert trainable()["default"] == {False}


def test_a_copy_for_another_device_is_refused() -> None:
    # As torch.nn.DataParallel does it in a forward pass on several devices, such as the Trainer's.
    model = get_peft_model(build("hf_bert"), TensLoraConfig())
    layers = [module for module in model.modules() if isinstance(module, TensLoraLinear)]
    assert layers
    for layer in layers:
        with pytest.raises(TensLoRAError, match="DataParallel: cannot copy an adapter; start one process per device"):
            layer._replicate_for_data_parallel()


@pytest.mark.parametrize("taken_off", ["unload", "merge_and_unload"])
def test_the_weight_below_an_adapter_takes_no_update_of_its_own_until_it_is_unloaded(taken_off: str) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    path = "bert.encoder.layer.0.attention.self.query"
    before = logits(model, inputs("hf_bert"))
    layer = model.base_model.model.get_submodule(path)
    for module in (layer, layer.base_layer, copy.deepcopy(model).base_model.model.get_submodule(path).base_layer):
        with pytest.raises(TensLoRAError, match=r"^weight: belongs to a layer that has an adapter"):
            adapt_tensor(module, "weight", ranks=2)
    assert torch.equal(logits(model, inputs("hf_bert")), before)
    backbone = getattr(model, taken_off)()
    adapt_tensor(backbone.get_submodule(path), "weight", ranks=2)
    if taken_off == "merge_and_unload":
        torch.testing.assert_close(logits(backbone, inputs("hf_bert")), before)


@pytest.mark.parametrize("given", [["query", "value"], ("query", "value"), {"query", "value"}, ".*query|.*value"])
def test_pydantic_reads_and_writes_settings(given: Any) -> None:
    schema = TypeAdapter(TensLoraConfig)
    config = schema.validate_python({"target_modules": given, "ranks": [[2, 2], [3, 2]], "first_step": [1.0, 2.0]})
    assert config == TensLoraConfig(target_modules=given, ranks=[[2, 2], [3, 2]], first_step=[1.0, 2.0])
    assert schema.validate_json(schema.dump_json(config)) == config


def test_settings_may_be_those_of_hydra_and_numpy(tmp_path: Path) -> None:
    lists: Any = OmegaConf.create(
        {"ranks": [4, 4, 2, 2], "target_modules": ["query", "value"], "modules_to_save": ["head"]}
    )
    others: Any = {"r": np.int64(3), "alpha": np.float32(2), "layers_to_transform": range(2)}
    config = TensLoraConfig(**lists, **others)
    config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: kept[name] for name in ("ranks", "r", "alpha", "layers_to_transform")} == {
        "ranks": [4, 4, 2, 2],
        "r": 3,
        "alpha": 2.0,
        "layers_to_transform": [0, 1],
    }
    assert sorted(kept["target_modules"]) == ["query", "value"]
    array: Any = np.array([4, 4, 3, 2])
    assert TensLoraConfig(ranks=array).ranks == [4, 4, 3, 2]


@pytest.mark.parametrize("settings", [{}, {"rank_strategy": "isorank"}, {"ranks": [6, 6, 3, 2]}])
@pytest.mark.parametrize("name", ["hf_bert", "hf_swin"])
def test_an_adapter_that_was_pruned_in_peft_is_loaded_again(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if name == "hf_swin" and "ranks" in settings:
        settings = {"ranks": [[4, 4, 2, 2], [4, 4, 2, 1]]}
    model = trained(get_peft_model(build(name), TensLoraConfig(**settings)))
    for stage in adapter_of(model).stages:
        prune(stage, sum(parameter.numel() for parameter in stage.parameters()) // 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path)
    torch.testing.assert_close(logits(again, inputs(name)), logits(model, inputs(name)), rtol=0, atol=1e-6)


def test_what_peft_would_save_wrongly_is_refused(tmp_path: Path) -> None:
    model: Any = trained(get_peft_model(build("timm_vit"), TensLoraConfig()))
    scale, adapter_of(model).scale = adapter_of(model).scale, 1.0
    with pytest.raises(TensLoRAError, match=r"^scale=1: is not that of the adapter's config"):
        model.save_pretrained(tmp_path)
    adapter_of(model).scale = scale
    blocks = model.base_model.model.blocks
    blocks.append(copy.deepcopy(blocks[1]))
    with pytest.raises(TensLoRAError, match=r"blocks\.2\.attn\.qkv: is a copy of an adapted layer"):
        model.save_pretrained(tmp_path)
    del blocks[2]
    model.base_model.model.blocks = nn.ModuleList([blocks[1], blocks[0]])
    with pytest.raises(TensLoRAError, match=r"blocks\.1\.attn\.qkv: was blocks\.0\.attn\.qkv when the adapter was put"):
        model.save_pretrained(tmp_path)
    model.base_model.model.blocks = blocks[:1]
    with pytest.raises(
        TensLoRAError, match=r"^VisionTransformer: 3 of the matrices of the adapter default are no longer"
    ):
        model.save_pretrained(tmp_path)
    model.base_model.model.blocks = blocks
    with pytest.raises(TensLoRAError, match=r"^VisionTransformer: is compiled in regions"):
        compile_regions(model, backend="eager").save_pretrained(tmp_path)
    copy.deepcopy(model).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", 16.0),
        ("dropout", 0.5),
        ("tensor_mode", "att"),
        ("target_modules", {"query"}),
        ("layers_to_transform", [0]),
    ],
)
def test_settings_that_were_changed_after_the_adapter_was_made_are_not_saved(
    setting: str, value: Any, tmp_path: Path
) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig(scaling="first_step")))
    model.add_adapter("other", TensLoraConfig())
    config = model.peft_config["default"]
    before = copy.copy(getattr(config, setting))
    setattr(config, setting, value)
    with pytest.raises(TensLoRAError, match=rf"^{setting}=.*: was set after the adapter had been made with {setting}="):
        model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".md"]  # the card is PEFT's first step
    if isinstance(before, set):
        before = sorted(before)
    setattr(config, setting, before)
    copy.deepcopy(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("hf_bert"), tmp_path)
    torch.testing.assert_close(logits(again, inputs("hf_bert")), logits(model, inputs("hf_bert")), rtol=0, atol=1e-6)
    model.delete_adapter("other")


def test_an_adapter_on_weights_stored_in_8_bits_is_trained_in_32() -> None:
    model = build("hf_bert").float()
    hooks: Any = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    attach_layerwise_casting_hooks(model, **hooks, skip_modules_pattern=["LayerNorm"])
    adapted = trained(get_peft_model(model, TensLoraConfig()))
    assert {parameter.dtype for parameter in adapter_of(adapted).parameters()} == {torch.float32}
    with adapted.disable_adapter():
        plain = logits(adapted, inputs("hf_bert"))
    assert not torch.allclose(logits(adapted, inputs("hf_bert")), plain)
    logits(adapted, inputs("hf_bert")).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in adapter_of(adapted).parameters())


@pytest.mark.parametrize("mode", ["lora", "qkv"])
def test_the_adapter_of_a_deeper_model_is_refused(mode: str, tmp_path: Path) -> None:
    get_peft_model(_bert(layers=4), TensLoraConfig(tensor_mode=mode)).save_pretrained(str(tmp_path))
    with pytest.raises(TensLoRAError, match=r"does not fit: has tensors\.\d+\.\w+, which does not belong there"):
        PeftModel.from_pretrained(_bert(layers=2), str(tmp_path))
    model = get_peft_model(_bert(layers=2), TensLoraConfig(tensor_mode=mode))
    with pytest.raises(TensLoRAError, match="which does not belong there"):
        model.load_adapter(str(tmp_path), "other")


def test_a_notebook_may_import_the_package_anew(commands: Commands, tmp_path: Path) -> None:
    program = f"""
import importlib
from peft import PeftModel, get_peft_model
import tenslora.peft
import tenslora.peft.tuner as tuner
from tests.models import build

before = get_peft_model(build("hf_bert"), tuner.TensLoraConfig())
importlib.reload(tuner)
importlib.reload(tenslora.peft)
for model in (before, get_peft_model(build("hf_bert"), tuner.TensLoraConfig())):
    model.save_pretrained({str(tmp_path)!r})
    assert type(PeftModel.from_pretrained(build("hf_bert"), {str(tmp_path)!r}).base_model) is tuner.TensLoraModel
"""
    (tmp_path / "again.py").write_text(program)
    ended = commands.run(Command(str(tmp_path / "again.py"), [], ROOT))
    assert ended.status == 0, ended.err


def test_settings_of_a_config_file_are_taken_as_dicts() -> None:
    config = TensLoraConfig(rank_options=OmegaConf.create({"rule": "uniform"}))  # type: ignore[arg-type]
    assert type(config.rank_options) is dict and config.rank_options == {"rule": "uniform"}


def test_pefts_list_of_the_modules_that_an_adapter_matches_is_right() -> None:
    model = get_peft_model(_bert(layers=2), TensLoraConfig())
    model.add_adapter("other", TensLoraConfig(adapt="qv"))
    for name, count in (("default", 6), ("other", 4)):
        matched = inspect_matched_modules(model.base_model, name)["matched"]
        assert len(matched) == count and all(path.endswith(("query", "key", "value")) for path in matched)


def _bert(layers: int) -> Any:
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "vocab_size": 50}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=layers))


def test_an_adapter_that_was_changed_while_it_was_merged_leaves_nothing_behind() -> None:
    batch = inputs("hf_bert")
    model, other = (trained(get_peft_model(build("hf_bert"), TensLoraConfig()), seed) for seed in (1, 2))
    with model.disable_adapter():
        backbone = logits(model, batch)
    model.merge_adapter()
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.unmerge_adapter()
        torch.testing.assert_close(logits(each, batch), logits(other, batch))
        with each.disable_adapter():
            torch.testing.assert_close(logits(each, batch), backbone)
    # Whatever is merged, a state dict of a merged model brings weights with its own adapter in them.
    model.merge_adapter()
    trained(other, 3).merge_adapter()
    model.load_state_dict(other.state_dict())
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, batch), backbone)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_of_an_adapter_that_the_model_does_not_have_is_refused(method: str) -> None:
    model: Any = trained(get_peft_model(build("hf_bert"), TensLoraConfig()))
    modules = [type(module) for module in model.modules()]
    for names, line in ((["default", "typo"], "typo: is no adapter of"), ([], r"\[\]: must name an adapter of")):
        with pytest.raises(TensLoRAError, match=f"^adapter_names={line} this model, which has default"):
            getattr(model, method)(adapter_names=names)
    assert [type(module) for module in model.modules()] == modules
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_without_numbers_is_not_merged(method: str) -> None:
    model = get_peft_model(_bert(layers=2), TensLoraConfig(), low_cpu_mem_usage=True)
    with pytest.raises(TensLoRAError, match=r"^the adapter is on the device meta and has no numbers; .* device_map"):
        getattr(model, method)()


def test_a_saved_adapter_that_does_not_fit_changes_nothing() -> None:
    config = TensLoraConfig(ranks=[4, 4, 2, 2], modules_to_save=["classifier"])
    model: Any = trained(get_peft_model(build("hf_bert"), config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    core = next(name for name in saved if name.endswith("core"))
    whole = saved[core]
    others: list[tuple[Any, str]] = [
        (whole[:3], r"has the shape \(3,"),
        (whole.to_sparse(), "is a sparse tensor; must be a dense torch.Tensor with numbers"),
        (whole.to("meta"), "is a tensor on the device meta; must"),
        (whole.tolist(), "is a list; must"),
        (None, "is a NoneType; must"),
    ]
    for saved[core], problem in others:
        with pytest.raises(TensLoRAError, match=f"the saved adapter does not fit: .*core {problem}"):
            set_peft_model_state_dict(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
