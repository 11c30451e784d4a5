"""Attaching, detaching, merging, unmerging, disabling and loading, on whole models."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tenslora import (
    Adapter,
    AdapterConfig,
    Geometry,
    RankStrategy,
    TensLoRAError,
    adapt_tensor,
    attach,
    detach,
    disabled,
    load,
    merge,
    merge_tensors,
    save_pretrained,
    unmerge,
)
from tenslora.adapted_linear import put_on
from tenslora.attachment import adapter_of, handed_over, modules_named
from tenslora.constructions import CONSTRUCTIONS
from tenslora.files import HEAD_FILE
from tenslora.peft.to_lora import lora_weights, to_peft
from tenslora.peft.to_tenslora import from_lora, to_tenslora
from tenslora.peft.tuner import TensLoraConfig
from tests.models import BUILDERS, DECODERS, FURTHER, attached, build, inputs, linear_at, logits, randomised
from tests.operations import RecordedOperations
from tests.plain_transformer import PlainTransformer


@pytest.mark.parametrize("name", BUILDERS)
def test_attaching_does_not_change_the_outputs(name: str) -> None:
    model = build(name)
    before = logits(model, inputs(name))
    attach(model, AdapterConfig("att_qkv_depth")).double()
    assert torch.equal(logits(model, inputs(name)), before)


def test_an_adapter_on_the_device_meta_is_refused_before_anything_has_changed() -> None:
    model, given = PlainTransformer(), Geometry(d_in=24, heads=3, d_head=8, layers=2)
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig("qkv"), given)
    with pytest.raises(TensLoRAError, match=r"^the adapter is on the device meta and has no numbers; "):
        attach(model, adapter)
    assert not hasattr(model, "tenslora") and all(parameter.requires_grad for parameter in model.parameters())
    attach(model, AdapterConfig("qkv"))
    taken_off = detach(model).to("meta")
    with pytest.raises(TensLoRAError, match=r"^the adapter is on the device meta and has no numbers; "):
        attach(model, taken_off)


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_that_stayed_on_the_device_meta_does_not_compute(fused: bool) -> None:
    x, source = torch.randn(2, 5, 24), PlainTransformer(fused)
    with torch.device("meta"):
        model = PlainTransformer(fused)
    attach(model, AdapterConfig("qkv"))
    assert model(x.to("meta")).is_meta
    model.load_state_dict(source.state_dict(), strict=False, assign=True)
    with pytest.raises(TensLoRAError, match=r"^the adapter is on the device meta and has no numbers; "):
        model(x)
    attach(source, AdapterConfig("qkv"))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(x), source(x))


class PassesOn(nn.Module):
    """A wrapper that has all attributes of its model, as a PeftModel has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_a_wrapper_around_an_adapted_model_is_refused(tmp_path: Path) -> None:
    model = PlainTransformer()
    adapter = attach(model, AdapterConfig("qkv"), train=["head"])
    with_lora = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["fc1"]))
    for wrapper in (PassesOn(model), with_lora):
        before = [type(module) for module in wrapper.modules()]
        for call in (detach, merge, adapter_of, lambda wrapper: save_pretrained(wrapper, tmp_path / "new")):
            with pytest.raises(TensLoRAError, match=r": passes on the attributes of .* call this on that model$"):
                call(wrapper)
        assert [type(module) for module in wrapper.modules()] == before
    assert not (tmp_path / "new").exists()
    assert adapter_of(torch.compile(model, backend="eager")) is adapter  # type: ignore[arg-type]
    assert detach(torch.compile(model, backend="eager")) is adapter  # type: ignore[arg-type]
    assert not hasattr(model, "tenslora")


def test_a_compiled_model_that_calls_itself_empty_is_a_model() -> None:
    class Memory(PlainTransformer):
        def __len__(self) -> int:
            return 0

    model = Memory()
    adapter = attach(model, AdapterConfig("qkv"))
    assert adapter_of(torch.compile(model, backend="eager")) is adapter  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is (deprecated|not supported)")
def test_a_part_that_is_scripted_and_not_adapted_may_stand_beside() -> None:
    model = PlainTransformer()
    model.add_module("other", torch.jit.script(nn.LayerNorm(4)))
    attach(model, AdapterConfig("qkv"))
    merge(model)


def test_a_module_is_trained_by_each_of_its_names() -> None:
    model = PlainTransformer()
    model.add_module("second", model.head)
    attach(model, AdapterConfig("qkv"), train=["second"])
    assert model.head.weight.requires_grad
    assert len(modules_named(model, ["head", "second"])) == 1


def test_the_backbones_weights_keep_their_names() -> None:
    model = build("hf_roberta")
    before = set(model.state_dict())
    attach(model, AdapterConfig("qkv"))
    after = set(model.state_dict())
    assert before <= after
    assert {name.split(".")[0] for name in after - before} == {"tenslora"}


def test_only_the_adapter_is_trainable() -> None:
    model = build("hf_distilbert")
    adapter = attach(model, AdapterConfig("att_depth"))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_detached_model_is_the_backbone_as_it_was(name: str) -> None:
    model = build(name)
    before, modules = logits(model, inputs(name)), list(model.modules())
    attached(model, "depth")
    assert not torch.equal(logits(model, inputs(name)), before)
    detach(model)
    assert torch.equal(logits(model, inputs(name)), before)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_a_merged_and_detached_model_is_a_plain_backbone_with_the_adapted_logits(name: str, mode: str) -> None:
    model = build(name).float()
    names, types = set(model.state_dict()), [type(module) for module in model.modules()]
    batch = {key: value.float() if value.is_floating_point() else value for key, value in inputs(name).items()}
    attached(model, mode).float()
    adapted = logits(model, batch)
    merge(model)
    merge(model)  # the second time has no effect
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-5)
    detach(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-5)
    assert set(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == types
    assert not hasattr(model, "tenslora")


def test_autocast_rounds_neither_a_merge_nor_its_undoing_nor_a_lora() -> None:
    model = build("hf_bert").float()
    attached(model, "qkv_depth").float()
    weights, expected = copy.deepcopy(model.state_dict()), logits(model, inputs("hf_bert"))
    plain = lora_weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = lora_weights(model)
        merge(model)
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, inputs("hf_bert")), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerge(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapt", ["qv", "all"])
@pytest.mark.parametrize(
    ("name", "mode"), [("timm_vit", "att"), *((name, "qkv_depth") for name in ["timm_vit", *DECODERS])]
)
def test_a_merged_model_has_the_adapted_logits_whichever_matrices_are_adapted(name: str, mode: str, adapt: str) -> None:
    model = build(name)
    attached(model, mode, adapt=adapt)
    adapted = logits(model, inputs(name))
    merge(model)
    torch.testing.assert_close(logits(model, inputs(name)), adapted, rtol=0, atol=1e-10)
    unmerge(model)
    torch.testing.assert_close(logits(model, inputs(name)), adapted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["qkv_depth", "lora"])
@pytest.mark.parametrize("name", FURTHER)
def test_other_layouts_are_saved_merged_and_turned_into_loras(name: str, mode: str, tmp_path: Path) -> None:
    model, batch = build(name), inputs(name)
    adapter = attached(model, mode)
    adapted = logits(model, batch)
    loaded = build(name)
    load(loaded, adapter.save(tmp_path / "adapter.safetensors")).double()
    torch.testing.assert_close(logits(loaded, batch), adapted, rtol=0, atol=1e-5)  # a file holds float32
    merge(loaded)
    torch.testing.assert_close(logits(loaded, batch), adapted, rtol=0, atol=1e-5)
    peft_model = to_peft(model).double()
    torch.testing.assert_close(logits(peft_model, batch), adapted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_merged_model_carries_out_the_backbones_operations_and_no_others(name: str) -> None:
    def operations(model: nn.Module) -> list[str]:
        with torch.no_grad(), RecordedOperations() as recorded:
            logits(model, inputs(name))
        return recorded.names

    model = build(name)
    plain = operations(model)
    attached(model, "qkv_depth")
    assert operations(model) != plain
    merge(model)
    assert operations(model) == plain


def test_merging_changes_the_weights_and_unmerging_restores_them() -> None:
    model = build("hf_vit")
    attached(model, "qkv_depth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == 6
    unmerge(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-12)


def changed(model: nn.Module) -> None:
    """Change all that an update depends on: ranks, parameters and the scale."""
    for stage in adapter_of(model).stages:
        stage.resize([max(1, rank - 1) for rank in stage.ranks])
        stage.scale *= 3
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.fill_(0.3)


@pytest.mark.parametrize("name", ["hf_vit", "timm_vit", "hf_swin"])
@pytest.mark.parametrize(
    "moved",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["itself", "deep copy", "pickled"],
)
def test_what_was_merged_is_taken_out_whatever_has_become_of_the_adapter(
    name: str, moved: Callable[[nn.Module], nn.Module]
) -> None:
    model = build(name)
    randomised(attach(model, AdapterConfig("qkv_depth")))
    before = {path: weight.clone() for path, weight in model.state_dict().items() if "tenslora" not in path}
    merge(model)
    held = logits(model, inputs(name))
    model = moved(model)
    changed(model)
    merge(model)  # has no effect: the weights hold an update
    assert torch.equal(logits(model, inputs(name)), held)
    unmerge(model)
    for path, weight in before.items():
        torch.testing.assert_close(model.state_dict()[path], weight, rtol=0, atol=1e-12)
    after = logits(model, inputs(name))
    assert not torch.allclose(after, held)
    merge(model)
    torch.testing.assert_close(logits(model, inputs(name)), after, rtol=0, atol=1e-10)


def test_a_merged_model_is_unmerged_in_another_type() -> None:
    model = PlainTransformer()
    before = model.get_parameter("blocks.0.attention.query.weight").clone()
    attached(model, "qkv_depth")
    merge(model)
    assert not torch.allclose(model.get_parameter("blocks.0.attention.query.weight"), before, atol=0.01)
    model.bfloat16()
    unmerge(model)
    after = model.get_parameter("blocks.0.attention.query.weight")
    torch.testing.assert_close(after, before.bfloat16(), rtol=0, atol=0.002)


@pytest.mark.parametrize("assign", [False, True])
def test_the_weights_of_a_merged_model_are_loaded_with_the_adapter_that_they_hold(assign: bool) -> None:
    model = build("hf_vit")
    attached(model, "qkv_depth")
    before = copy.deepcopy(model.state_dict())
    merge(model)
    best = copy.deepcopy(model.state_dict())
    unmerge(model)
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.mul_(2)
    merge(model)
    model.load_state_dict(best, assign=assign)
    changed(model)  # whatever becomes of the adapter afterwards
    unmerge(model)
    for path, weight in model.state_dict().items():
        if "tenslora" not in path:
            torch.testing.assert_close(weight, before[path], rtol=0, atol=1e-12)
    detach(model)
    assert not model._load_state_dict_post_hooks


def test_the_state_dict_of_a_merged_model_is_not_taken_for_that_of_another(tmp_path: Path) -> None:
    model, batch = build("separate"), inputs("separate")
    attached(model, "qkv_depth")
    adapted = logits(model, batch)
    apart = copy.deepcopy(model.state_dict())
    merge(model)
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    together = torch.load(tmp_path / "merged.pt", weights_only=True)
    with pytest.raises(TensLoRAError, match=r"query: is merged, .* that is not merged, .*; call unmerge before"):
        model.load_state_dict(apart)
    unmerge(model)
    with pytest.raises(TensLoRAError, match=r"query: is not merged, .* that is merged, .*; call merge before"):
        model.load_state_dict(together)
    model.load_state_dict(apart)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-12)
    merge(model)
    model.load_state_dict(together)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-12)
    plain = build("separate")
    plain.load_state_dict(apart, strict=False)
    weights = {name: tensor for name, tensor in together.items() if not name.startswith("tenslora.")}
    model.load_state_dict(weights, strict=False)  # a plain dict, which does not say what it holds


def test_a_merged_adapter_takes_other_numbers_without_a_change_to_the_weights() -> None:
    model = build("hf_vit")
    attached(model, "qkv_depth")
    before = copy.deepcopy(model.state_dict())
    merge(model)
    twice = {path: 2 * tensor for path, tensor in adapter_of(model).state_dict(prefix="tenslora.").items()}
    assert not model.load_state_dict(twice, strict=False).unexpected_keys
    unmerge(model)
    for path, weight in model.state_dict().items():
        torch.testing.assert_close(weight, (before | twice)[path], rtol=0, atol=1e-12)


class Unchanged(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, bias: Tensor) -> Tensor:
        return bias


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_submodule("blocks.1.attention.key"), "bias", Unchanged())


def lazy(model: nn.Module) -> None:
    model.head = nn.LazyLinear(2)


def with_another_child(model: nn.Module) -> None:
    model.tenslora = nn.Linear(2, 2)


class KnowsNoOtherName(PlainTransformer):
    def __getattr__(self, name: str) -> Any:
        return {**self._modules, **self._parameters}[name]


def with_an_error_of_its_own(model: nn.Module) -> None:
    model.__class__ = KnowsNoOtherName


def with_a_lora(model: nn.Module) -> None:
    get_peft_model(model, LoraConfig(target_modules=["query"]))
    model.requires_grad_(True)


def with_what_transformers_leaves_of_a_lora(model: nn.Module) -> None:
    lora = get_peft_model(model, LoraConfig(target_modules=["query"]))
    lora.delete_adapter("default")  # as its own delete_adapter does
    model.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parametrized, r"^blocks\.1\.attention\.key: its bias has a parametrization"),
        (lazy, r"^head\.weight: has no size before the model's first forward pass"),
        (with_an_error_of_its_own, r"^KnowsNoOtherName: tenslora cannot be read \(KeyError: 'tenslora'\)$"),
        (with_another_child, "^PlainTransformer: has something else under the name tenslora"),
        (with_what_transformers_leaves_of_a_lora, r"query: is a layer of another adapter .* or make the model anew \("),
        (with_a_lora, r"^blocks\.0\.attention\.query: is a layer of another adapter \(Linear of PEFT\)"),
    ],
)
def test_a_model_that_cannot_take_an_adapter_stays_as_it_was(change: Callable[[nn.Module], None], message: str) -> None:
    model = PlainTransformer()
    change(model)
    with pytest.raises(TensLoRAError, match=message):
        attach(model, AdapterConfig("qkv"), train=["head"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks


def test_a_model_with_a_layer_that_has_no_size_yet_stays_as_it_was_in_peft() -> None:
    model = PlainTransformer()
    lazy(model)
    with pytest.raises(TensLoRAError, match=r"^head\.weight: has no size before the model's first forward pass"):
        get_peft_model(model, TensLoraConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


def pruned(tensor: nn.Module) -> None:
    prune.l1_unstructured(tensor, "core", 0.5)  # type: ignore[no-untyped-call]


def orthogonal(tensor: nn.Module) -> None:
    parametrizations.orthogonal(tensor, "core")


@pytest.mark.parametrize("change", [pruned, orthogonal])
def test_a_factor_that_is_computed_from_other_tensors_is_refused_by_name(
    change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = build("separate")
    adapter = attached(model, "qkv_depth")
    change(adapter.tensors[0])
    for use in (
        lambda: model(**inputs("separate")),
        lambda: merge(model),
        lambda: save_pretrained(model, tmp_path),
    ):
        with pytest.raises(
            TensLoRAError, match=r"^core: is computed from other tensors in the adapter, as after pruning"
        ):
            use()
    assert not list(tmp_path.iterdir())


def test_an_adapter_may_become_a_child_that_its_model_calls() -> None:
    model = nn.Sequential(build("separate"), nn.Linear(2, 2)).double()
    x = inputs("separate")["x"]
    before = model(x)
    randomised(attach(model, AdapterConfig("qkv")))
    adapted = model(x)
    assert not torch.equal(adapted, before)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-11)
    detach(model)
    assert len(model) == 2


def test_a_packed_weight_is_not_merged_into() -> None:
    model = build("fused")
    attached(model, "qkv")
    packed = nn.Parameter(torch.zeros(72 * 12, 1, dtype=torch.uint8), requires_grad=False)
    linear_at(model, "blocks.1.attention.qkv").weight = packed
    message = r"^blocks\.1\.attention\.qkv: Linear: an update cannot be added to a weight of this kind"
    with pytest.raises(TensLoRAError, match=message):
        merge(model)


def test_a_weight_of_8_bits_is_not_merged_into() -> None:
    model = build("separate")
    model.get_submodule("blocks").to(torch.float8_e4m3fn)
    attached(model, "qkv")
    with pytest.raises(TensLoRAError, match=r"query: Linear: an update cannot be added to a weight of this kind"):
        merge(model)


def test_weights_made_in_inference_mode_are_not_merged_into() -> None:
    with torch.inference_mode():
        model = build("separate")
    attached(model, "qkv")
    with pytest.raises(TensLoRAError, match=r"query: its weight was made in torch\.inference_mode"):
        merge(model)


@pytest.mark.parametrize("computed", ["pruned", "normed", "parametrized"])
def test_a_weight_that_is_computed_in_each_pass_is_not_merged_into(computed: str) -> None:
    model = build("separate")
    attached(model, "qkv")
    path = "blocks.1.attention.key"
    if computed == "pruned":
        prune.l1_unstructured(linear_at(model, path), "weight", 0.3)  # type: ignore[no-untyped-call]
    elif computed == "normed":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(linear_at(model, path))
    else:
        nn.utils.parametrizations.weight_norm(linear_at(model, path))
    before = logits(model, inputs("separate"))
    with pytest.raises(TensLoRAError, match=rf"^{path}: its weight is computed from other tensors, as after pruning"):
        merge(model)
    assert torch.equal(logits(model, inputs("separate")), before)


def test_a_layer_that_got_a_further_class_is_not_detached() -> None:
    model = build("separate")
    attached(model, "qkv")
    linear = linear_at(model, "blocks.1.attention.key")
    nn.utils.parametrizations.weight_norm(linear)
    before = logits(model, inputs("separate"))
    with pytest.raises(
        TensLoRAError, match=r"^blocks\.1\.attention\.key: has become a ParametrizedAdaptedLinear under"
    ):
        detach(model)
    torch.testing.assert_close(logits(copy.deepcopy(model), inputs("separate")), before)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(logits(model, inputs("separate")), before)
    detach(model)
    assert type(model.get_submodule("blocks.1.attention.key")) is nn.Linear


class Packed(nn.Module):
    """A quantised layer as some packages have it: the sizes of a Linear, and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 24
        self.register_buffer("qweight", torch.zeros(2))


class Scripted(nn.Module):
    """An attention block that torch.jit can compile."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.query(x) * self.key(x) * self.value(x)
        return y


@pytest.mark.parametrize("weight", ["packed", "a function"])
def test_a_layer_without_a_weight_is_refused_and_the_model_stays(weight: str) -> None:
    model = build("separate")
    path = "blocks.1.attention.value"
    if weight == "packed":
        model.get_submodule("blocks.1.attention").value = Packed()
    else:
        linear = model.get_submodule(path)
        del linear.weight
        linear.weight = lambda: None  # type: ignore[assignment]
    with pytest.raises(TensLoRAError, match=rf"^{path}: (Packed|Linear) holds its weight in another form than Linear"):
        attach(model, AdapterConfig("qkv"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_compiled_module_is_refused_and_the_model_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(Scripted())
    with pytest.raises(TensLoRAError, match=r"^RecursiveScriptModule: is compiled by torch\.jit"):
        attach(model, AdapterConfig("qkv"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_layer_holds_beside_its_parameters_stays_in_the_model() -> None:
    model = build("separate")
    for block in ("blocks.0", "blocks.1"):
        query = model.get_submodule(f"{block}.attention.query")
        prune.l1_unstructured(query, "weight", 0.3)  # type: ignore[no-untyped-call]
    before = {name for name, _ in model.named_buffers()}
    attached(model, "qkv")
    assert before
    assert {name for name, _ in model.named_buffers()} == before
    model.to("meta")
    assert all(buffer.is_meta for buffer in model.buffers())


def test_weights_that_are_replaced_under_an_adapter_stay_when_it_is_detached() -> None:
    model, other = build("hf_vit"), build("hf_vit")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    attach(model, AdapterConfig("qkv")).double()
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    detach(model)
    assert torch.equal(logits(model, inputs("hf_vit")), logits(other, inputs("hf_vit")))


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_a_disabled_adapter_leaves_the_backbone_alone_for_a_while(name: str) -> None:
    model = build(name)
    before = logits(model, inputs(name))
    attached(model, "qkv_depth")
    adapted = logits(model, inputs(name))
    with pytest.raises(ZeroDivisionError), disabled(model):
        assert torch.equal(logits(model, inputs(name)), before)
        raise ZeroDivisionError
    assert torch.equal(logits(model, inputs(name)), adapted)
    with disabled(model):
        with disabled(model):
            pass
        assert torch.equal(logits(model, inputs(name)), before)
    merge(model)
    with pytest.raises(TensLoRAError, match="its adapter is merged; unmerge it first"), disabled(model):
        pass


def test_a_saved_adapter_can_be_loaded_on_another_model(tmp_path: Path) -> None:
    source, target = build("hf_vit"), build("hf_vit")
    adapter = attached(source, "att_qkv")
    load(target, adapter.save(tmp_path / "adapter.safetensors")).double()
    torch.testing.assert_close(logits(target, inputs("hf_vit")), logits(source, inputs("hf_vit")))


def test_loading_on_the_wrong_backbone_names_the_dimension_that_differs(tmp_path: Path) -> None:
    adapter = Adapter(AdapterConfig("depth"), Geometry(d_in=24, heads=3, d_head=8, layers=6))
    path = adapter.save(tmp_path / "adapter.safetensors")
    with pytest.raises(TensLoRAError, match="layers is 6 in the adapter and 2 in the backbone"):
        load(build("hf_bert"), path)


def test_a_refused_adapter_leaves_the_model_alone() -> None:
    model = build("hf_bert")
    adapter = Adapter(AdapterConfig("depth"), Geometry(d_in=24, heads=3, d_head=8, layers=6))
    with pytest.raises(TensLoRAError):
        attach(model, adapter)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "tenslora")


def test_a_second_adapter_and_a_missing_one_are_refused() -> None:
    model = build("hf_bert")
    with pytest.raises(TensLoRAError, match="has no adapter"):
        detach(model)
    attach(model, AdapterConfig("qkv"))
    with pytest.raises(TensLoRAError, match="has an adapter already"):
        attach(model, AdapterConfig("qkv"))


def test_a_model_whose_adapter_is_in_peft_is_told_from_one_without_any(tmp_path: Path) -> None:
    config = TensLoraConfig(layers_to_transform=[0])
    model: Any = get_peft_model(build("hf_bert"), config)
    before = {name: id(module) for name, module in model.named_modules()}
    path = r"(base_model\.model\.)?bert\.encoder\.layer\.0\.attention\.self\.query"
    of_library: list[Callable[[nn.Module], Any]] = [detach, merge, to_peft, to_tenslora]
    of_library.append(lambda model: save_pretrained(model, tmp_path / "new"))
    for call in of_library:
        for each in (model, model.get_base_model()):
            with pytest.raises(TensLoRAError, match=rf": has its adapter in PEFT \({path}\), where the methods of"):
                call(each)
    lora = get_peft_model(build("hf_bert"), LoraConfig(target_modules=["query"]))
    lora.save_pretrained(str(tmp_path))
    for put in (lambda model: attach(model, AdapterConfig()), lambda model: from_lora(model, tmp_path, config)):
        for each in (model, model.get_base_model()):
            message = rf"^{path}: has a TensLoRA adapter in PEFT already; .*, or make the model anew$"
            with pytest.raises(TensLoRAError, match=message):
                put(each)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("on_disk", [["blocks.0", "blocks.1"], ["blocks.1"]])
def test_an_adapter_lies_where_layers_compute_whose_weights_accelerate_keeps_on_disk(
    on_disk: list[str], tmp_path: Path
) -> None:
    x, source = torch.randn(2, 5, 24), PlainTransformer()

    def offloaded(folder: str) -> nn.Module:
        places = {name: "disk" if name in on_disk else "cpu" for name in ("blocks.0", "blocks.1", "head")}
        return dispatch_model(copy.deepcopy(source), places, "cpu", offload_dir=tmp_path / folder, force_hooks=True)

    model = offloaded("first")
    randomised(attach(model, AdapterConfig("qkv_depth")))
    in_memory = copy.deepcopy(source)
    attach(in_memory, copy.deepcopy(adapter_of(model)))
    assert torch.equal(model(x), in_memory(x))
    torch.autograd.backward(model(x).sum())
    assert all(parameter.grad is not None for parameter in adapter_of(model).parameters())
    with pytest.raises(TensLoRAError, match=r"^blocks\.\d\.\S+: accelerate keeps its weight elsewhere between two"):
        merge(model)
    assert torch.equal(model(x), in_memory(x))
    save_pretrained(model, tmp_path / "adapter")
    again = offloaded("second")
    load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(x), in_memory(x))
    in_peft = to_tenslora(again)
    torch.testing.assert_close(in_peft(x), in_memory(x))
    in_peft.merge_adapter()
    torch.testing.assert_close(in_peft(x), in_memory(x))


def test_a_misspelt_module_to_train_gets_the_nearest_names_wherever_they_are() -> None:
    with pytest.raises(TensLoRAError, match=r"^train=poler: must be the name of a module .*, such as pooler, "):
        attach(build("hf_bert"), AdapterConfig("qkv"), train=["poler"])


def test_a_part_of_an_adapted_model_and_what_holds_one_are_refused() -> None:
    # A second adapter on the same layers would hide the first, and a merge of one would merge the other.
    model = build("hf_bert")
    attach(model, AdapterConfig("qkv"))
    for other in (model.get_submodule("bert"), nn.Sequential(model), nn.ModuleList([model.get_submodule("bert")])):
        with pytest.raises(TensLoRAError, match=r"query: has an adapter already; detach it first from the model"):
            attach(other, AdapterConfig("qkv"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_neither_merged_nor_given_to_peft(value: float) -> None:
    model = build("hf_bert")
    adapter = attach(model, AdapterConfig("qkv"))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[3] = value
    for refuse in (merge, to_peft, to_tenslora):
        with pytest.raises(TensLoRAError, match=r"^tenslora\.tensors\.0\.\w+: holds a NaN or an infinity"):
            refuse(model)
    assert all(
        torch.equal(before[name], weight)
        for name, weight in model.state_dict().items()
        if name in before and "tenslora" not in name
    )


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 100.0), (torch.float32, 1e20)])
def test_an_update_that_a_weight_cannot_hold_is_not_merged(dtype: torch.dtype, value: float) -> None:
    model = build("hf_bert").to(dtype)
    adapter = attach(model, AdapterConfig("qkv"))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(value)
    with pytest.raises(TensLoRAError, match=r"query: its weight would hold a NaN or an infinity in float"):
        merge(model)
    assert all(
        torch.equal(before[name], weight) for name, weight in model.state_dict().items() if "tenslora" not in name
    )


def test_a_weight_that_another_layer_uses_is_not_merged() -> None:
    model = build("separate")
    first, second = "blocks.0.attention.query", "blocks.1.attention.proj"
    model.get_submodule(second).weight = model.get_submodule(first).weight
    attached(model, "qkv")
    before = logits(model, inputs("separate"))
    with pytest.raises(TensLoRAError, match=rf"its weight is shared by {first} and {second}, and a merge"):
        merge(model)
    assert torch.equal(logits(model, inputs("separate")), before)


class Scaled(nn.Linear):
    """As in a network with an equalised learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Ternary(nn.Linear):
    """As in a model of 1-bit weights, which keeps exact ones for training."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class AfterDropout(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("kind", [Scaled, Ternary, Rectified, AfterDropout])
def test_a_layer_that_computes_with_something_else_than_its_weight_is_not_merged(kind: type[nn.Linear]) -> None:
    model = PlainTransformer().bfloat16()
    for block in model.blocks:
        block.get_submodule("attention.value").__class__ = kind
    attached(model, "qkv")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if kind is AfterDropout:
        value = linear_at(model, "blocks.0.attention.value")
        frozen = value.weight.detach()
        del value.weight
        value.register_buffer("weight", frozen)
        merge(model.train())
        return
    with pytest.raises(TensLoRAError, match=rf"value: a {kind.__name__} does not multiply its input by its weight"):
        merge(model)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    peft_model = get_peft_model(detached(model), TensLoraConfig())
    with pytest.raises(TensLoRAError, match=rf"value: a {kind.__name__} does not multiply its input by its weight"):
        peft_model.merge_adapter()


def detached(model: nn.Module) -> nn.Module:
    detach(model)
    return model


def test_gradients_from_before_do_not_move_what_is_frozen() -> None:
    model = PlainTransformer()
    model(torch.randn(2, 5, 24)).sum().backward()
    attach(model, AdapterConfig("qkv"), train=["head"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_a_head_that_is_frozen_when_its_adapter_comes_back_is_told(tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv"), train=["head"])
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match=r"^head\.bias, head\.weight: trained beside this adapter before, and frozen"):
        attach(model, detach(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, detach(model), train=["head"])
        load(PlainTransformer(), tmp_path)
        load(PlainTransformer(), tmp_path / "adapter.safetensors")


def test_an_adapter_that_peft_did_not_take_is_given_back_without_a_word_on_its_head() -> None:
    model = PlainTransformer()
    adapter = attach(model, AdapterConfig("qkv"), train=["head"])
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        warnings.simplefilter("error")
        with handed_over(model):
            raise ZeroDivisionError
    assert adapter_of(model) is adapter and adapter.trained_beside == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in model.get_submodule("head").parameters())


def test_a_layer_of_another_size_than_its_update_is_refused() -> None:
    model = PlainTransformer()
    attached(model, "qkv")
    for linear in linear_at(model, "blocks.0.attention.query"), linear_at(model, "blocks.1.attention.value"):
        linear.weight.data, linear.bias = linear.weight.data[:16], None
        vars(linear)["out_features"] = 16
    with pytest.raises(TensLoRAError, match=r"query: has 16 outputs now, and had 24 when the adapter was put on it"):
        model(torch.randn(2, 5, 24))
    with pytest.raises(TensLoRAError, match=r"query: its weight has the shape \(16, 24\), and its update \(24, 24\)"):
        merge(model)


def test_of_a_model_whose_parts_have_adapters_the_message_names_them() -> None:
    model = nn.ModuleDict({"question": PlainTransformer(), "passage": PlainTransformer()})
    attach(model["passage"], AdapterConfig("qkv"))
    with pytest.raises(TensLoRAError, match=r"^ModuleDict: has no adapter; call this on a part that has one: passage$"):
        merge(model)
    with pytest.raises(TensLoRAError, match=r"detach it first from the model that holds it \(passage\)$"):
        attach(model, AdapterConfig("qkv"))


def test_a_deep_copy_has_an_adapter_of_its_own() -> None:
    model = build("timm_vit")
    attached(model, "qkv_depth")
    twin = copy.deepcopy(model)
    before = logits(twin, inputs("timm_vit"))
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, inputs("timm_vit")), before)
    assert not torch.equal(logits(model, inputs("timm_vit")), before)


def test_a_model_that_is_compiled_or_copied_is_not_adapted_in_its_wrapper() -> None:
    model = PlainTransformer()
    for wrapper, problem in (
        (torch.compile(model, backend="eager"), "is compiled already; attach the adapter first"),
        (compile_regions(model, backend="eager"), "is compiled already; attach the adapter first"),
        (nn.DataParallel(model), "DataParallel: cannot copy an adapter"),
    ):
        with pytest.raises(TensLoRAError, match=problem):
            attach(wrapper, AdapterConfig("qkv"))  # type: ignore[arg-type]
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_merged_where_a_weights_entries_share_memory() -> None:
    model = PlainTransformer()
    linear = model.get_submodule("blocks.1.attention.value")
    linear.weight = nn.Parameter(torch.ones(1, 24).expand(24, 24), requires_grad=False)
    attached(model, "qkv_depth")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TensLoRAError, match=r"blocks\.1\.attention\.value: some of its weight's entries share memory"):
        merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_lie_between_each_others_entries_are_merged_into() -> None:
    model = build("separate")
    both = torch.randn(24, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, weight in (("query", both[:, :24]), ("key", both[:, 24:])):
        model.get_submodule(f"blocks.0.attention.{name}").weight = nn.Parameter(weight)
    attached(model, "qkv_depth")
    adapted = logits(model, inputs("separate"))
    merge(model)
    torch.testing.assert_close(logits(model, inputs("separate")), adapted, rtol=0, atol=1e-10)
    linear_at(model, "blocks.0.attention.value").weight = nn.Parameter(both[:, 12:36])
    unmerge(model)
    with pytest.raises(TensLoRAError, match=r"query: its weight is shared by .*query and blocks\.0\.attention\.value"):
        merge(model)


def _state(model: nn.Module) -> list[Any]:
    """What an adapter changes of a model besides its outputs."""
    return [
        [(path, type(module)) for path, module in model.named_modules()],
        {name: (parameter.requires_grad, parameter.sum().item()) for name, parameter in model.named_parameters()},
        [list(hooks) for hooks in (model._forward_hooks, model._forward_pre_hooks, model._load_state_dict_post_hooks)],
    ]


@pytest.mark.parametrize("use", ["attach", "load"])
def test_ctrl_c_while_an_adapter_is_put_on_leaves_the_model_as_it_was(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build("hf_bert")
    attach(trained, AdapterConfig("qkv_depth"), train=["classifier"])
    trained.get_parameter("classifier.weight").data.fill_(0.5)
    save_pretrained(trained, tmp_path)
    uses: dict[str, Callable[[], Any]] = {
        "attach": lambda: attach(model, AdapterConfig("qkv_depth"), train=["classifier"]),
        "load": lambda: load(model, tmp_path),
    }
    model = build("hf_bert")
    model.get_submodule("bert.embeddings").requires_grad_(False)
    before, calls = _state(model), 0

    def interrupted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return put_on(*given, **named)

    monkeypatch.setattr("tenslora.attachment.put_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uses[use]()
    assert _state(model) == before
    uses[use]()
    assert model.get_parameter("classifier.weight").requires_grad


@pytest.mark.parametrize("convert", [to_peft, to_tenslora])
def test_an_error_of_peft_leaves_the_adapter_on_the_model(
    convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    model, batch = build("hf_bert"), inputs("hf_bert")
    adapter = attach(model, AdapterConfig("qkv_depth"), train=["classifier"])
    expected, before = logits(model, batch), _state(model)[:2]
    for place in ("peft.get_peft_model", "tenslora.peft.to_tenslora.get_peft_model"):
        monkeypatch.setattr(place, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        convert(model, ["classifier"])
    assert torch.equal(logits(model, batch), expected)
    assert _state(model)[:2] == before
    assert model.tenslora is adapter
    assert adapter.trained_beside == {"classifier.weight", "classifier.bias"}


def test_a_copy_of_an_adapted_block_is_not_left_out_in_silence(tmp_path: Path) -> None:
    model = build("separate")
    attached(model, "qkv_depth")
    cast(nn.ModuleList, model.blocks).append(copy.deepcopy(model.get_submodule("blocks.1")))
    for use in (lambda: save_pretrained(model, tmp_path), lambda: to_tenslora(model)):
        with pytest.raises(TensLoRAError, match=r"^blocks\.2\.attention\.query: is a copy of an adapted layer"):
            use()
    assert not list(tmp_path.iterdir())
    adapted = logits(model, inputs("separate"))
    merge(model)
    detach(model)
    torch.testing.assert_close(logits(model, inputs("separate")), adapted, rtol=0, atol=1e-10)


def test_an_adapter_whose_layers_are_in_another_order_is_not_saved(tmp_path: Path) -> None:
    model = build("separate")
    attached(model, "qkv_depth")
    model.blocks = nn.ModuleList([model.get_submodule("blocks.1"), model.get_submodule("blocks.0")])
    for use in (lambda: save_pretrained(model, tmp_path), lambda: to_tenslora(model)):
        with pytest.raises(TensLoRAError, match=r"^blocks\.1\.attention\.query: was blocks\.0\.attention\.query when"):
            use()
    assert not list(tmp_path.iterdir())


def test_replaced_layers_are_not_left_out_in_silence(tmp_path: Path) -> None:
    model, batch, fresh = build("separate"), inputs("separate"), build("separate")
    attached(model, "qkv_depth")
    cast(nn.ModuleList, model.blocks)[1] = fresh.get_submodule("blocks.1")
    uses: list[Callable[[], Any]] = [
        lambda: save_pretrained(model, tmp_path),
        lambda: to_tenslora(model),
        lambda: merge(model),
        lambda: disabled(model).__enter__(),
    ]
    for use in uses:
        with pytest.raises(TensLoRAError, match=r"^PlainTransformer: 3 of the adapted matrices are no longer in"):
            use()
    attach(model, detach(model))
    save_pretrained(model, tmp_path)
    model.blocks = fresh.blocks
    detach(model)  # which takes the adapter's hooks along, though no layer is left
    assert torch.equal(logits(model, batch), logits(fresh, batch))


def test_nothing_is_merged_into_memory_that_another_weight_uses() -> None:
    model = PlainTransformer()
    model.add_module("other", nn.Linear(24, 24))
    query = model.get_submodule("blocks.0.attention.query")
    query.get_parameter("weight").data = model.get_parameter("other.weight").data
    attached(model, "qkv")
    with pytest.raises(TensLoRAError, match=r"query: its weight is shared by .*query and other, and a merge"):
        merge(model)
    # Parts of one tensor that do not overlap are weights of their own.
    parts = torch.randn(3, 24, 24).unbind()
    apart = PlainTransformer()
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        apart.get_parameter(f"blocks.0.attention.{name}.weight").data = part
    attached(apart, "qkv")
    merge(apart)


def test_contexts_of_disabled_may_overlap() -> None:
    # As in two threads of a server: the first is left before the second.
    model, batch = build("separate"), inputs("separate")
    backbone = logits(model, batch)
    attached(model, "qkv_depth")
    adapted = logits(model, batch)
    first, second = disabled(model), disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, batch), backbone)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model, batch), adapted)


def test_a_copy_of_a_model_with_a_disabled_adapter_has_an_enabled_one() -> None:
    # No context would ever end for the copy.
    model, batch = build("separate"), inputs("separate")
    attached(model, "qkv_depth")
    adapted = logits(model, batch)
    with disabled(model), pytest.warns(UserWarning, match="^a copy or pickle that is made inside `disabled` has its"):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert not torch.equal(logits(model, batch), adapted)
    for each in copies:
        assert torch.equal(logits(each, batch), adapted)
        merge(each)


def test_adapters_that_are_kept_in_the_model_are_trained_and_saved_as_adapters(tmp_path: Path) -> None:
    model = build("separate")
    bank = nn.ModuleDict()
    model.add_module("bank", bank)
    for name in ("first", "second"):
        attached(model, "qkv_depth")
        bank[name] = detach(model)
    first = attach(model, bank["first"])  # type: ignore[arg-type]
    assert all(factor.requires_grad for factor in first.parameters())
    assert not any(factor.requires_grad for factor in bank["second"].parameters())
    save_pretrained(model, tmp_path)
    assert not (tmp_path / HEAD_FILE).exists()


def test_an_adapter_in_the_place_of_its_model_is_told() -> None:
    adapter = attached(build("separate"), "qkv_depth")
    with pytest.raises(
        TensLoRAError, match=r"^Adapter: has no adapter, because it is one; call this on the model that"
    ):
        merge(adapter)


def test_a_disabled_adapter_is_not_merged() -> None:
    model, batch = build("separate"), inputs("separate")
    backbone = logits(model, batch)
    attached(model, "qkv_depth")
    with disabled(model):
        with pytest.raises(TensLoRAError, match=r"^PlainTransformer: its adapter is disabled; leave the context"):
            merge(model)
        assert torch.equal(logits(model, batch), backbone)


def test_the_adapter_in_a_list_of_layers_ignores_their_arguments() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PlainTransformer(layers=1).blocks[0]

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.block(x if mask is None else x * mask)
            return y

    layers = nn.ModuleList([Layer(), Layer()])
    x = torch.randn(2, 5, 24)
    expected = layers[1](layers[0](x))
    attach(layers, AdapterConfig("qkv_depth"))
    y = x
    for layer in layers:  # the adapter among them
        y = layer(y, mask=None)
    torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("one_process")
def test_tensor_parallelism_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    plan = {
        f"blocks.{layer}.attention.{name}": ColwiseParallel() for layer in (0, 1) for name in ("query", "key", "value")
    }
    model = PlainTransformer()
    parallelize_module(model, mesh, plan)
    with pytest.raises(TensLoRAError, match=r"^blocks\.0\.attention\.query: its weight is divided among processes"):
        attach(model, AdapterConfig("qkv_depth"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = PlainTransformer()
    attach(other, AdapterConfig("qkv_depth"))
    parallelize_module(other, mesh, plan)
    with pytest.raises(TensLoRAError, match=r"^the input of an adapted layer is divided among processes"):
        other(torch.randn(2, 5, 24))


@pytest.mark.usefixtures("one_process")
def test_an_adapter_that_is_wrapped_itself_is_not_merged() -> None:
    model, x = PlainTransformer(), torch.randn(2, 5, 24)
    randomised(attach(model, AdapterConfig("qkv_depth")))
    expected = model(x)
    policy = partial(size_based_auto_wrap_policy, min_num_params=200)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(TensLoRAError, match=r"^the adapter cannot be copied \(.*; merge before you wrap"):
        merge(model)
    torch.testing.assert_close(wrapped(x), expected)


def test_an_adapter_that_is_divided_among_processes_is_told(tmp_path: Path) -> None:
    model = PlainTransformer()
    for parameter in attach(model, AdapterConfig("qkv")).parameters():
        parameter._fsdp_flattened = True  # type: ignore[attr-defined]  # as FullyShardedDataParallel leaves it
        parameter.data = parameter.data.flatten()[:3]
    for act in (merge, to_peft, partial(save_pretrained, folder=tmp_path)):
        with pytest.raises(TensLoRAError, match=r"^PlainTransformer: its adapter is divided among processes; do this"):
            act(model)


def test_an_adapter_that_is_put_in_the_place_of_another_is_no_adapter_of_the_layers() -> None:
    model, other = PlainTransformer(), PlainTransformer()
    other.load_state_dict(model.state_dict())
    randomised(attach(model, AdapterConfig()))
    new = randomised(attach(other, AdapterConfig("att_qkv")))
    detach(other)
    x = torch.randn(2, 5, 24)
    model.float()(x)
    model.tenslora = new.float()
    for act in (lambda: model(x), lambda: merge(model)):
        with pytest.raises(TensLoRAError, match="tenslora is another adapter than the one that its layers use"):
            act()
    for use in (partial(save_pretrained, folder="never"), lambda model: disabled(model).__enter__()):
        with pytest.raises(TensLoRAError, match="tenslora is another adapter than the one that its layers use"):
            use(model)
    attach(other, new)
    expected = other.float()(x)
    detach(other)
    attach(model, detach(model))
    torch.testing.assert_close(model(x), expected)


def test_an_adapter_is_on_one_model_at_a_time() -> None:
    model, other = PlainTransformer(), PlainTransformer()
    adapter = attach(model, AdapterConfig("qkv"), train=["head"])
    with pytest.raises(TensLoRAError, match=r"^the adapter is on another model \(PlainTransformer\); detach it there"):
        attach(other, adapter)
    assert not hasattr(other, "tenslora") and adapter.trained_beside == {"head.weight", "head.bias"}
    attach(other, copy.deepcopy(adapter), train=["head"])
    detach(model)
    del model
    attach(PlainTransformer(), adapter, train=["head"])


def test_an_adapter_without_numbers_is_not_merged_into_weights_that_have_some() -> None:
    with torch.device("meta"):
        model = PlainTransformer()
        attach(model, AdapterConfig("qkv")).to("meta")
        kernel = nn.Conv1d(3, 4, 2)
        adapt_tensor(kernel, "weight", 2).to("meta")
    state = PlainTransformer().state_dict()
    model.load_state_dict(state, strict=False, assign=True)
    kernel.get_submodule("parametrizations.weight").original = nn.Parameter(torch.zeros(4, 3, 2))
    for merge_into, adapted in ((merge, model), (merge_tensors, kernel)):
        with pytest.raises(TensLoRAError, match=r": its update is on the device meta and has no numbers"):
            merge_into(adapted)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in state.items())


def test_an_unmerge_of_nothing_is_told() -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv"))
    with pytest.warns(UserWarning, match=r"^PlainTransformer: no update of its adapter is merged; unmerge does"):
        unmerge(model)


def test_an_adapter_that_was_taken_away_by_hand_is_told() -> None:
    model = PlainTransformer()
    adapter = attach(model, AdapterConfig("qkv"))
    for gone in (False, True):
        model.tenslora = None  # type: ignore[assignment]
        if gone:
            del model.tenslora
        with pytest.raises(TensLoRAError, match=r"^PlainTransformer: has no adapter, but its layers have; call"):
            merge(model)
    model.tenslora = nn.Linear(2, 2)
    with pytest.raises(TensLoRAError, match=r"what it holds under the name tenslora is no adapter of this import"):
        detach(model)
    model.tenslora = adapter
    detach(model)


def test_words_of_other_types_become_text() -> None:
    class Mode(str, Enum):  # noqa: UP042  whose text is Mode.QKV
        QKV = "qkv"

    config = AdapterConfig(Mode.QKV, factorization=np.str_("cp"), rank_strategy=RankStrategy(np.str_("isorank")))
    words = (config.tensor_mode, config.factorization, config.rank_strategy.name)
    assert [(type(word), word) for word in words] == [(str, "qkv"), (str, "cp"), (str, "isorank")]


def test_layers_that_were_added_or_taken_away_are_told(tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv"))
    model.blocks.append(copy.deepcopy(PlainTransformer().blocks[0]))
    problem = r"^PlainTransformer: its layers have changed after attach, .*: layers is 2 in the adapter and {} in"
    with pytest.raises(TensLoRAError, match=problem.format(3)):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    del model.blocks[1:]
    for act in (merge, lambda model: save_pretrained(model, tmp_path)):
        with pytest.raises(TensLoRAError, match=problem.format(1)):
            act(model)


def test_integers_among_a_trained_modules_parameters_are_left_alone(tmp_path: Path) -> None:
    model, other = PlainTransformer(), PlainTransformer()
    for each, start in ((model, 3), (other, 0)):
        each.head.table = nn.Parameter(torch.arange(start, start + 4), requires_grad=False)
    attach(model, AdapterConfig("qkv"), train=["head"])
    assert model.head.weight.requires_grad and not model.head.get_parameter("table").requires_grad
    load(other, save_pretrained(model, tmp_path))
    assert torch.equal(other.head.get_parameter("table"), model.head.get_parameter("table"))


def test_where_warnings_are_errors_an_attach_that_warns_changes_nothing() -> None:
    adapter = attach(model := PlainTransformer(), AdapterConfig("qkv"), train=["head"])
    detach(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"^head.bias, head.weight: trained beside"):
        warnings.simplefilter("error")
        attach(model, adapter)
    assert not hasattr(model, "tenslora") and model.head.weight.requires_grad
    attach(model, adapter, train=["head"])


@pytest.mark.parametrize("mode", ["qkv_depth", "att_qkv_depth"])
def test_a_model_takes_a_memory_format_of_images(mode: str) -> None:
    model = build("timm_vit")
    attached(model, mode)
    expected = logits(model, inputs("timm_vit"))
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(model, inputs("timm_vit")), expected)


def test_what_only_stands_for_a_model_is_refused() -> None:
    model = PlainTransformer()
    with pytest.raises(TensLoRAError, match=r"^model: is a \w+, which stands for a model; give the model itself$"):
        attach(cast(nn.Module, weakref.proxy(model)), AdapterConfig())
    assert not hasattr(model, "tenslora")
