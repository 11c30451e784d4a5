from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import transformers as hf
from omegaconf import OmegaConf
from timm.models.maxxvit import AttentionCl
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tenslora import AdapterConfig, adapt_tensor, attach, detach_tensors
from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.projections import Columns, TargetLinear, features, find_projections
from tests.models import BUILDERS, DECODERS, FURTHER, GEOMETRY, HIERARCHICAL, PLAIN, build, inputs, logits
from tests.plain_transformer import PlainTransformer


@pytest.mark.parametrize("name", BUILDERS)
def test_every_projection_of_every_backbone_is_found(name: str) -> None:
    model = build(name)
    [(geometry, targets)] = find_projections(model)
    assert geometry == GEOMETRY
    held = [(target.layer, target.group[columns.matrix]) for target in targets for columns in target.columns]
    assert sorted(held) == [(layer, projection) for layer in range(2) for projection in range(3)]
    for target in targets:
        assert model.get_submodule(target.path) is target.linear
        assert features(target.linear) == (24, 24 * len(target.columns))


@pytest.mark.parametrize("name", ["hf_vit", "hf_bert", "hf_distilbert"])
def test_separate_projections_are_in_the_order_query_key_value(name: str) -> None:
    [(_, targets)] = find_projections(build(name))
    for target in targets:
        assert target.path.rpartition(".")[2][0] == "qkv"[target.columns[0].matrix]


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_numbered_in_the_order_of_the_forward_pass(name: str) -> None:
    model = build(name)
    [(_, targets)] = find_projections(model)
    called: list[int] = []
    for target in targets:
        target.linear.register_forward_hook(lambda *_, layer=target.layer: called.append(layer))
    model(**inputs(name))
    assert called == sorted(called)
    assert set(called) == {0, 1}


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"Sequential: no attention projections found.*query/key/value.*qkv"):
        find_projections(nn.Sequential(nn.Linear(4, 4)))


class _Fused(nn.Module):
    def __init__(self, d_in: int, d_out: int, heads: int | None, d_head: int | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_in, d_out)
        if heads:
            self.num_heads = heads
        if d_head:
            self.head_dim = d_head


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(8, 24, 3)], r"its 24 outputs do not divide into query, key and value of 3 heads"),
        ([(8, 25, 2)], r"0\.qkv: its 25 outputs do not divide into query, key and value"),
        ([(8, 24, None)], r"the number of heads is not known; expected an attribute num_attention_heads"),
    ],
)
def test_attention_of_odd_sizes_is_refused(blocks: list[tuple[int, int, int | None]], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        find_projections(nn.Sequential(*(_Fused(*block) for block in blocks)))


def test_a_number_of_heads_that_is_no_whole_number_is_not_passed_over() -> None:
    block = _Fused(8, 24, heads=None)
    model = nn.Sequential(block)
    model.config = SimpleNamespace(num_attention_heads=2)  # type: ignore[assignment]
    block.num_heads = 4.0  # type: ignore[assignment]
    with pytest.raises(TensLoRAError, match=r"^0: num_heads=4\.0 must be a whole number, and at least 1$"):
        find_projections(model)
    del block.num_heads
    block.heads = 4  # type: ignore[assignment]  # as in Diffusers
    assert find_projections(model)[0].geometry.heads == 4


class _NotSet:
    @property
    def num_heads(self) -> int:
        raise KeyError("HEADS")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_NotSet(), r"^0: num_heads cannot be read from its config \(KeyError: 'HEADS'\)$"),
        (OmegaConf.create({"num_heads": "???"}), r"^0: num_heads cannot be read from its config \(MissingM[^\n]*\)$"),
        (SimpleNamespace(num_heads=0), r"^0: num_heads=0 must be a whole number, and at least 1$"),
        ({"num_heads": [2, 4]}, r"^0: num_heads=\[2, 4\] must be a whole number, and at least 1$"),
        ({}, r"^0: the number of heads is not known"),
    ],
)
def test_a_number_of_heads_that_cannot_be_taken_from_the_config_is_named(config: object, message: str) -> None:
    block = _Fused(8, 24, heads=None)
    block.config = config  # type: ignore[assignment]
    with pytest.raises(TensLoRAError, match=message):
        find_projections(nn.Sequential(block))
    block.heads = 4  # type: ignore[assignment]
    assert find_projections(nn.Sequential(block))[0].geometry.heads == 4


@pytest.mark.parametrize("name", ["query", "qkv_proj", "num_kv_heads", "head_dim", "q_bias", "multi_query", "config"])
def test_an_attribute_that_a_block_cannot_tell_is_named(name: str) -> None:
    def raising(_: nn.Module) -> None:
        raise RuntimeError("not yet\nknown")

    block = type("Block", (_Fused,), {name: property(raising)})(8, 24, heads=None if name == "config" else 3)
    with pytest.raises(TensLoRAError, match=rf"^0: {name} cannot be read \(RuntimeError: not yet\)$"):
        find_projections(nn.Sequential(block))


def test_a_number_of_heads_may_be_in_a_dictionary_or_beside_a_list_of_those_of_all_stages() -> None:
    block = _Fused(8, 24, heads=None)
    block.config = SimpleNamespace(num_attention_heads=[1, 2])  # type: ignore[assignment]
    model = nn.Sequential(block)
    model.config = {"num_heads": 4}  # type: ignore[assignment]
    assert find_projections(model)[0].geometry.heads == 4


def test_multi_query_attention_in_one_linear_is_refused() -> None:
    block = _Fused(8, 24, heads=2, d_head=6)  # two queries, a key and a value
    with pytest.raises(TensLoRAError, match=r"qkv: its 24 outputs do not divide into query, key and value"):
        find_projections(block)


@pytest.mark.parametrize("name", ["num_key_value_heads", "kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups"])
def test_fewer_key_heads_in_one_linear_are_found_by_their_name(name: str) -> None:
    block = _Fused(32, 48, heads=4)  # four queries, a key and a value of eight columns each
    with pytest.raises(TensLoRAError, match=r"qkv: has 32 inputs and 48 outputs, among which .* num_key_value_heads"):
        find_projections(block)
    block.proj = nn.Linear(16, 32)  # so that a head would be four wide, as in SAM 2 or a Swin of its own head_dim
    assert find_projections(block)[0].geometry.d_head == 4
    block.proj = nn.Linear(32, 32)
    setattr(block, name, 1)
    [(geometry, [target])] = find_projections(block)
    assert (geometry.heads, geometry.kv_heads, geometry.d_head) == (4, 1, 8)
    assert [(columns.start, columns.width) for columns in target.columns] == [(0, 32), (32, 8), (40, 8)]


def test_a_weight_that_two_layers_share_is_refused() -> None:
    one, other = _Fused(8, 24, 2), _Fused(8, 24, 2)
    other.qkv.weight = one.qkv.weight
    with pytest.raises(TensLoRAError, match=r"1\.qkv: would be adapted twice, here and as 0\.qkv, but .* by exclude"):
        find_projections(nn.Sequential(one, other))


class _Computed(nn.Linear):
    """A Linear whose weight is a new tensor at each read, as in a compressed backbone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.codes = nn.Parameter(torch.ones(outputs, inputs))
        del self._parameters["weight"]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.codes * 2


def test_weights_that_are_computed_are_not_taken_for_shared() -> None:
    blocks = [_Fused(8, 24, 2) for _ in range(4)]
    for block in blocks:
        block.qkv = _Computed(8, 24)
    assert find_projections(nn.Sequential(*blocks))[0].geometry.layers == 4


def test_a_feed_forward_block_behind_two_attention_blocks_is_refused() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    model = hf.BertModel(hf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    assert find_projections(model)[0].geometry.layers == 4
    with pytest.raises(
        TensLoRAError, match=r"intermediate\.dense: would be adapted twice, for two attention blocks, but"
    ):
        find_projections(model, "mlp")


def test_sizes_may_be_numpys_integers() -> None:
    model = PlainTransformer(width=cast(int, np.int64(24)), heads=cast(int, np.int64(3)))
    [(geometry, _)] = find_projections(model)
    assert geometry == find_projections(PlainTransformer())[0].geometry
    assert {type(size) for size in (geometry.d_in, geometry.heads, geometry.d_head)} == {int}


class _Separate(nn.Module):
    def __init__(self, query: int, key: int, value: int, reads: int = 8) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, query), nn.Linear(reads, key), nn.Linear(reads, value)


def test_a_weight_that_has_a_parametrization_is_refused() -> None:
    model = build("hf_bert")
    query = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    adapt_tensor(query, "weight", ranks=2)
    with pytest.raises(TensLoRAError, match=r"layer\.1\.attention\.self\.query: its weight has a parametrization"):
        attach(model, AdapterConfig("qkv"))
    detach_tensors(query)
    attach(model, AdapterConfig("qkv"))


def test_key_and_value_may_have_fewer_heads() -> None:
    [(geometry, _)] = find_projections(_Separate(16, 8, 8))
    assert (geometry.heads, geometry.kv_heads, geometry.d_head) == (4, 2, 4)
    assert geometry.widths == (16, 8, 8)


@pytest.mark.parametrize("widths", [(16, 8, 4), (8, 16, 16), (16, 6, 6)])
def test_odd_widths_of_query_key_and_value_are_refused(widths: tuple[int, int, int]) -> None:
    with pytest.raises(TensLoRAError, match=r"query, key and value are .* wide; key and value must be equally wide"):
        find_projections(_Separate(*widths))


def test_projections_of_inputs_of_different_widths_are_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"k_proj: has 6 inputs, but q_proj has 8"):
        find_projections(_Separate(16, 16, 16, reads=6))


def test_finding_changes_nothing() -> None:
    model = build("hf_bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_projections(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_that_never_calls_its_linear_is_refused(name: str) -> None:
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 2}
    with pytest.raises(TensLoRAError, match="does not call its Linear qkv"):
        find_projections(timm.create_model(name, **sizes))


_FOUR = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (
            lambda: hf.GPTBigCodeModel(hf.GPTBigCodeConfig(n_embd=24, n_layer=1, n_head=3, multi_query=False)),
            r"h\.0\.attn: its Linear c_attn holds query, key and value one head after the other",
        ),
        (
            lambda: AttentionCl(32, dim_head=8),
            r"^AttentionCl: its Linear qkv holds query, key and value one head after the other",
        ),
        (
            lambda: timm.create_model("tiny_vit_5m_224"),
            r"stages\.1\.blocks\.0\.attn: its Linear qkv holds query, key and value one head after the other",
        ),
        (
            lambda: timm.create_model("efficientformer_l1"),
            r"token_mixer: its Linear qkv holds query, key and value one head after the other",
        ),
        (
            lambda: timm.create_model("davit_tiny"),
            r"attn: in ChannelAttention query, key and value do not have their usual roles",
        ),
        (lambda: timm.create_model("swinv2_tiny_window8_256"), r"blocks\.0\.attn: does not call its Linear qkv"),
        (
            lambda: hf.CodeGenModel(hf.CodeGenConfig(n_embd=16, n_layer=1, n_head=4, rotary_dim=4)),
            r"attn: the order of the outputs of qkv_proj in CodeGenAttention is not known; it is in Phi3Attention",
        ),
        (
            lambda: hf.GPT2Model(hf.GPT2Config(n_embd=24, n_layer=1, n_head=3, add_cross_attention=True)),
            r"h\.0\.crossattention: is a cross-attention, whose c_attn holds key and value alone",
        ),
        (
            lambda: hf.LongformerModel(hf.LongformerConfig(**_FOUR, attention_window=4)),
            r"self: has a query_global beside query, which an adapter would leave out",
        ),
        (
            lambda: hf.ReformerModel(hf.ReformerConfig(attn_layers=["local"], is_decoder=False)),
            r"self_attention: belongs to reversible layers \(Reformer\), through which an adapter would get no",
        ),
        (
            lambda: hf.Qwen3NextModel(hf.Qwen3NextConfig(**_FOUR, num_key_value_heads=2, head_dim=8, num_experts=2)),
            r"layers\.3\.self_attn\.q_proj: has 64 outputs, which are not 4 heads of 8",
        ),
    ],
    ids=[
        "GPTBigCode",
        "AttentionCl",
        "TinyViT",
        "EfficientFormer",
        "DaViT",
        "SwinV2",
        "CodeGen",
        "GPT2",
        "Longformer",
        "Reformer",
        "Qwen3Next",
    ],
)
def test_attention_on_which_an_adapter_would_be_wrong_is_refused(
    build_model: Callable[[], nn.Module], message: str
) -> None:
    with torch.device("meta"):
        model = build_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three of Qwen3-Next's four layers have no such attention
        with pytest.raises(TensLoRAError, match=message):
            find_projections(model)


def test_attention_that_projects_a_second_time_is_refused() -> None:
    block = _Separate(8, 8, 8)
    block.add_module("attention", nn.MultiheadAttention(8, 4))
    with pytest.raises(TensLoRAError, match=r"_Separate: passes the output of q_proj through a second projection"):
        find_projections(block)


def test_layers_without_attention_are_mentioned() -> None:
    model = build("llama")
    layers = model.get_submodule("model.layers")
    layers.get_submodule("0").self_attn = nn.Identity()
    with pytest.warns(UserWarning, match=r"^LlamaForCausalLM: 1 of the 2 layers of model\.layers have attention proj"):
        [(geometry, _)] = find_projections(model)
    assert geometry.layers == 1


def test_a_layer_that_the_model_finds_under_another_name_first_has_attention_too() -> None:
    model = PlainTransformer()
    several = nn.ModuleDict({"last": model.blocks[1], "model": model})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(geometry, _)] = find_projections(several)
    assert geometry.layers == 2


def test_a_layer_that_stands_in_a_list_several_times_is_one_layer() -> None:
    model = build("llama")
    layers = list(model.get_submodule("model.layers").children())
    model.get_submodule("model").add_module("layers", nn.ModuleList(layers + layers[::-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(geometry, _)] = find_projections(model)
    assert geometry.layers == 2


def test_layers_whose_numbers_fall_are_told_because_a_saved_adapter_counts_them() -> None:
    first, second = PlainTransformer().blocks
    for order in (["1", "0"], ["layer_10", "layer_2"]):
        model = nn.ModuleDict(dict(zip(order, (first, second), strict=True)))
        message = rf"^ModuleDict: has {order[1]}\.attention after {order[0]}\.attention, and an adapter counts layers"
        with pytest.warns(UserWarning, match=message):
            find_projections(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_projections(nn.ModuleDict({"layer_2": first, "layer_10": second}))


def _distributed(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: nn.Module) -> nn.Module:
    sharded: nn.Module = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return sharded


@pytest.mark.parametrize(("wrap", "name"), [(_distributed, "DistributedDataParallel"), (_sharded, "FSDPModule")])
def test_a_model_that_is_wrapped_for_several_processes_is_refused(
    wrap: Callable[[nn.Module], nn.Module], name: str
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, part = wrap(build("separate")), nn.Sequential(wrap(build("separate")), nn.Linear(2, 2))
    finally:
        dist.destroy_process_group()
    for model, place in ((whole, type(whole).__name__), (part, "0")):
        message = rf"^{place}: is wrapped in {name} already, .*; attach the adapter first, then wrap the model$"
        with pytest.raises(TensLoRAError, match=message):
            attach(model, AdapterConfig("qkv"))


@pytest.mark.parametrize("name", [*BUILDERS, *DECODERS])
def test_all_matrices_of_a_layer_are_found(name: str) -> None:
    model = build(name)
    [(geometry, targets)] = find_projections(model, "all")
    held = {(target.layer, target.group[columns.matrix]): target for target in targets for columns in target.columns}
    assert set(held) == {(layer, m) for layer in range(2) for m in range(len(geometry.matrices))}
    for (_, m), target in held.items():
        inputs, outputs = features(target.linear)
        width = geometry.widths[m]
        assert target.writes_to_stream == (geometry.matrices[m] in ("output", "down"))
        assert inputs == (width if target.writes_to_stream else geometry.d_in)
        assert outputs in ((geometry.d_in,) if target.writes_to_stream else (width, 3 * width))


def test_a_matrix_that_is_not_found_is_named() -> None:
    with pytest.raises(
        TensLoRAError, match=r"^adapt=qkvo: .*its output cannot be found; looked for proj, o_proj, out_proj"
    ):
        find_projections(_Separate(16, 16, 16), "qkvo")
    with pytest.raises(TensLoRAError, match=r"its up and down cannot be found; looked for .*mlp\.fc1/mlp\.fc2"):
        find_projections(_Separate(16, 16, 16), "mlp")


def _scaled(target: TargetLinear, outputs: Tensor, factors: Tensor) -> Callable[[], None]:
    """Scale each of some outputs of a Linear, and return a function that takes it back."""
    parameters = list(target.linear.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            of_outputs = parameter if isinstance(target.linear, nn.Linear) else parameter.movedim(-1, 0)
            of_outputs[outputs] *= factors.view(
                -1, *[1] * (of_outputs.dim() - 1)
            )  # a Conv1D holds the transpose of its weight

    def undo() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

    return undo


@pytest.mark.parametrize("name", [*BUILDERS, *DECODERS, *FURTHER, *PLAIN, *HIERARCHICAL])
def test_the_columns_of_a_head_are_the_heads_own(name: str) -> None:
    # Where a head's keys are zero, its attention is the same whatever its queries are; where its values are zero, its
    # output is zero. So its queries must not matter then, and those of all other heads must.
    # (Not all are scaled alike: cosine attention would take no notice of it.)
    model, batch = build(name), inputs(name)

    def heads_that_matter(geometry: Geometry, queries: Columns, target: TargetLinear) -> list[int]:
        expected, found = logits(model, batch), []
        for index in range(geometry.heads):
            undo = _scaled(target, head(geometry, queries, target, index), torch.arange(1.0, geometry.d_head + 1))
            change = (logits(model, batch) - expected).abs().max()
            assert change > 1e-9 or change < 1e-13
            found += [index] * bool(change > 1e-9)
            undo()
        return found

    def head(geometry: Geometry, columns: Columns, target: TargetLinear, index: int) -> Tensor:
        outputs = columns.of(torch.arange(features(target.linear)[1])).flatten()
        return torch.unflatten(outputs, 0, (-1, geometry.d_head))[index]

    with torch.no_grad():
        for geometry, targets in find_projections(model):
            held = {(t.layer, t.group[columns.matrix]): (columns, t) for t in targets for columns in t.columns}
            kv_heads = geometry.kv_heads or geometry.heads
            for layer in range(geometry.layers):
                assert heads_that_matter(geometry, *held[layer, 0]) == list(range(geometry.heads))
                for columns, target in (held[layer, 1], held[layer, 2]):
                    last = head(geometry, columns, target, kv_heads - 1)
                    undo = _scaled(target, last, torch.zeros(geometry.d_head))
                    others = geometry.heads - geometry.heads // kv_heads  # the last heads share the last key and value
                    assert heads_that_matter(geometry, *held[layer, 0]) == list(range(others))
                    undo()
