"""Adapted models, against the backbone with each update built and added by hand, and against PEFT."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from abc import ABC
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tenslora import Adapter, AdapterConfig, RankStrategy, TensLoRAError, attach, detach, disabled, merge
from tenslora.adapted_linear import AdaptedLinear, SharedInput
from tenslora.attachment import adapter_of
from tenslora.constructions import CONSTRUCTIONS
from tenslora.projections import find_projections
from tests.models import BUILDERS, DECODERS, FURTHER, attached, build, inputs, linear_at, logits, tensor_of
from tests.operations import RecordedOperations
from tests.plain_transformer import PlainTransformer


def dense_logits(name: str, adapter: Adapter) -> Tensor:
    """Logits of a fresh backbone whose weights had alpha dW^T added, as a function of the adapter's parameters."""
    model = build(name)
    [(_, targets)] = find_projections(model, adapter.config.adapt)
    weights = {}
    for target in targets:
        weight = target.linear.get_parameter("weight").detach().clone()
        if not isinstance(target.linear, nn.Linear):
            weight = weight.T  # transformers' Conv1D stores the transpose
        update = torch.zeros_like(weight)
        for columns in target.columns:
            matrix = adapter.dense(target.layer)[target.group[columns.matrix]]
            matrix = matrix if target.writes_to_stream else matrix.T
            rows = columns.of(torch.arange(len(weight))).flatten()
            update = update.index_add(0, rows, matrix)
        updated = weight + adapter.config.alpha * update
        weights[f"{target.path}.weight"] = updated if isinstance(target.linear, nn.Linear) else updated.T
    output = torch.func.functional_call(model, weights, kwargs=inputs(name), args=())
    result: Tensor = getattr(output, "logits", output)
    return result


def check_against_dense_updates(name: str, mode: str, **settings: Any) -> Adapter:
    """Compare logits and gradients of a model with an adapter to those with dense updates."""
    model = build(name)
    adapter = attached(model, mode, **settings)
    actual, expected = logits(model, inputs(name)), dense_logits(name, adapter)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    probe = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * probe).sum(), list(adapter.parameters()))
    expected_gradients = torch.autograd.grad((expected * probe).sum(), list(adapter.parameters()))
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient - other).norm() <= 1e-10 * other.norm()
    return adapter


# Where projections are stacked, the matrices of a layer share left; otherwise each has its own.
@pytest.mark.parametrize("mode", ["lora", "qkv_depth"])
@pytest.mark.parametrize("name", [*BUILDERS, *DECODERS, *FURTHER])
def test_on_every_backbone_logits_and_gradients_are_those_of_dense_updates(name: str, mode: str) -> None:
    check_against_dense_updates(name, mode)


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "llama"])
def test_in_every_construction_logits_and_gradients_are_those_of_dense_updates(name: str, mode: str) -> None:
    check_against_dense_updates(name, mode)


@pytest.mark.parametrize(
    ("mode", "ranks"), [("depth", (9, 2, 2)), ("qkv_depth", (20, 3, 3, 2)), ("att_qkv_depth", (20, 2, 2, 3, 2))]
)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_the_core_may_join_the_input_factor_where_the_output_rank_is_lower(
    name: str, mode: str, ranks: tuple[int, ...]
) -> None:
    check_against_dense_updates(name, mode, rank_strategy=RankStrategy("explicit", ranks=ranks))


@pytest.mark.parametrize(("mode", "ranks"), [("qkv", (20, 2, 2)), ("site", (20, 2, 3)), ("qkv_depth", (20, 2, 2, 2))])
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "llama"])
def test_the_core_may_join_the_input_factor_for_matrices_of_several_slices(
    name: str, mode: str, ranks: tuple[int, ...]
) -> None:
    strategy = RankStrategy("explicit", ranks=ranks)
    adapter = check_against_dense_updates(name, mode, adapt="all", rank_strategy=strategy)
    assert len(adapter.layer_products(0)[0]) > 1  # each matrix has a left of its own


@pytest.mark.parametrize(
    ("name", "factorization", "mode"),
    [
        ("hf_bert", "cp", "att_qkv_depth"),
        ("timm_vit", "cp", "depth"),
        ("timm_vit", "tensor_train", "att_qkv_depth"),
        ("hf_bert", "tensor_train", "att_site"),
    ],
)
def test_other_factorizations_add_their_dense_updates(name: str, factorization: str, mode: str) -> None:
    check_against_dense_updates(name, mode, factorization=factorization)


MATRICES = ["q", "v", "qv", "kv", "o", "qkvo", "mlp", "all"]
# Every backbone with every choice of matrices; the five kinds of tensor take turns.
BACKBONES_AND_MATRICES = [
    (name, adapt, *tensor)
    for (name, adapt), tensor in zip(
        itertools.product(["hf_vit", "hf_bert", "hf_distilbert", "timm_vit", "llama", "gemma", "gpt2"], MATRICES),
        itertools.cycle(
            [
                ("lora", "tucker"),
                ("att", "tucker"),
                ("qkv", "cp"),
                ("att_qkv_depth", "tucker"),
                ("site", "tensor_train"),
            ]
        ),
        strict=False,
    )
]


@pytest.mark.parametrize(("name", "adapt", "mode", "factorization"), BACKBONES_AND_MATRICES)
def test_any_choice_of_matrices_may_be_adapted(name: str, adapt: str, mode: str, factorization: str) -> None:
    check_against_dense_updates(name, mode, adapt=adapt, factorization=factorization)


@pytest.mark.parametrize(
    ("name", "adapt", "mode"),
    [
        # One Linear for each head in turn, of which some matrices are adapted, together and apart
        ("gpt_neox", "qv", "qkv_depth"),
        ("gpt_neox", "q", "depth"),
        ("falcon_40b", "kv", "lora"),
        # and names of the other matrices.
        ("falcon_rw", "all", "att_qkv_depth"),
        ("deberta_v2", "all", "qkv_depth"),
        ("mpnet", "all", "lora"),
        ("modernbert", "o", "depth"),
        ("t5", "qkvo", "qkv_depth"),
    ],
)
def test_other_layouts_and_names_take_any_matrices_too(name: str, adapt: str, mode: str) -> None:
    check_against_dense_updates(name, mode, adapt=adapt)


@pytest.mark.parametrize("name", ["hf_bert", "hf_roberta", "hf_distilbert"])
def test_lora_is_pefts_lora(name: str) -> None:
    names = {"hf_distilbert": ["q_lin", "k_lin", "v_lin"]}.get(name, ["query", "key", "value"])
    model, config = build(name), LoraConfig(r=4, lora_alpha=16, target_modules=names)
    peft_model: Any = get_peft_model(copy.deepcopy(model), config).double().eval()
    adapter = attached(model, "lora")
    layers: list[Any] = [module for module in peft_model.modules() if hasattr(module, "lora_A")]
    order = [(projection, layer) for layer in range(2) for projection in range(3)]
    pairs = [
        (tensor_of(adapter, projection * 2 + layer).get_parameter(mode), getattr(module, side)["default"].weight)
        for (projection, layer), module in zip(order, layers, strict=True)
        for mode, side in (("d_in", "lora_A"), ("d_out", "lora_B"))
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours.T)
    actual, expected = logits(model, inputs(name)), logits(peft_model, inputs(name))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    probe = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * probe).sum(), [ours for ours, _ in pairs])
    expected_gradients = torch.autograd.grad((expected * probe).sum(), [theirs for _, theirs in pairs])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert other.norm() > 0
        assert (gradient - other.T).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
def test_training_makes_no_matrix_as_large_as_a_weight(mode: str) -> None:
    # Of two tokens, with ranks of 2, a new tensor as large as a weight of 24 x 24 could only be an update.
    model = PlainTransformer()
    (adapter,) = attach(model, AdapterConfig(mode, RankStrategy("isorank", rank=2))).stages
    with RecordedOperations(known=model.parameters()) as operations:
        torch.autograd.backward(model(torch.randn(1, 2, 24)).sum())
    assert 0 < operations.largest < 24 * 24
    with RecordedOperations() as operations:
        adapter.dense(0)
    assert operations.largest >= 24 * 24  # the recording notices an update that is built


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_query_key_and_value_share_one_product_with_the_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []
    all_products = SharedInput.all_products

    def recorded(shared: SharedInput, tokens: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        layers.append(shared.layer)
        return all_products(shared, tokens, dtype)

    monkeypatch.setattr(SharedInput, "all_products", recorded)
    model = build(name)
    attached(model, "qkv_depth")
    logits(model, inputs(name))
    assert layers == [0, 1]


def test_projections_with_different_inputs_are_not_mixed_up() -> None:
    # In cross-attention, key and value read another tensor than query does.
    model = build("separate")
    adapter = attached(model, "qkv_depth")
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 4, 24, dtype=torch.float64, generator=generator)
    for tensor, index, name in ((x, 0, "query"), (z, 1, "key"), (z, 2, "value"), (x, 1, "key")):
        linear = linear_at(model, f"blocks.1.attention.{name}")
        expected = nn.functional.linear(tensor, linear.weight, linear.bias) + 4.0 * tensor @ adapter.dense(1)[index]
        torch.testing.assert_close(linear(tensor), expected, rtol=0, atol=1e-12)


def test_forward_passes_at_the_same_time_do_not_mix_their_inputs() -> None:
    model = build("separate")
    attached(model, "qkv")
    query, key = (linear_at(model, f"blocks.0.attention.{name}") for name in ("query", "key"))
    x, z, abandoned = torch.randn(3, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = key(z)
    abandoned = abandoned.clone()
    with torch.no_grad():
        query(abandoned)
        # Another thread may take over whenever memory is given back, such as that of an input that is not needed any
        # more.
        weakref.finalize(abandoned, query, z)
        del abandoned
        query(x)
        assert torch.equal(key(z), expected)


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
@pytest.mark.parametrize("mode", ["qkv_depth", "depth"])
def test_rank_dropout_leaves_out_components_in_training_only(name: str, mode: str) -> None:
    model = build(name)
    attached(model, mode, rank_dropout=0.5)
    linear = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    tokens = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lefts, rights = map(torch.stack, linear.layer_update.shared.group.adapter.layer_products(0))
    hs, rights = tokens @ lefts, rights[[columns.matrix for columns in linear.layer_update.columns]] * 4.0
    # A component's part of the output, over all tokens, is one column. Least squares then finds each one's factor.
    components = torch.stack(
        [
            torch.cat(
                [hs[p % len(hs)][:, [r]] * rights[p, r] * (p % len(hs) == q) for p in range(len(rights))], dim=1
            ).flatten()
            for q in range(len(lefts) if len(rights) > 1 else 1)
            for r in range(rights.shape[1])
        ],
        dim=1,
    )
    torch.manual_seed(0)
    model.train()
    factors = []
    for _ in range(20):
        update = (linear(tokens) - linear.plain_class.forward(linear, tokens)).flatten()
        factors.append(torch.linalg.lstsq(components, update).solution)
        torch.testing.assert_close(components @ factors[-1], update, rtol=0, atol=1e-10)
    assert set(torch.stack(factors).detach().round(decimals=8).flatten().tolist()) == {0.0, 2.0}
    model.eval()
    update = (linear(tokens) - linear.plain_class.forward(linear, tokens)).flatten()
    torch.testing.assert_close(components.sum(1), update, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    model, batch = build("separate"), inputs("separate")
    adapter = attached(model, "qkv", **{kind: 0.5})
    assert torch.equal(logits(model, batch), logits(model, batch))
    adapter.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))
    adapter.eval()
    for each in model.modules():  # as for samples of a prediction in evaluation mode
        each.train(isinstance(each, nn.Dropout))
    assert not torch.equal(logits(model, batch), logits(model, batch))


def test_a_float32_adapter_serves_bf16_weights() -> None:
    model = build("hf_vit").bfloat16()
    adapter = attached(model, "qkv_depth").float()
    output = logits(model, {"pixel_values": inputs("hf_vit")["pixel_values"].bfloat16()})
    torch.autograd.backward(output.float().sum())
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_a_linears_own_forward_is_called() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build("fused")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Doubling
    before = logits(model, inputs("fused"))
    attach(model, AdapterConfig("qkv")).double()
    assert torch.equal(logits(model, inputs("fused")), before)


def test_an_encoder_decoder_can_be_copied_after_a_step() -> None:
    # In its cross-attention, products that query's input has for key and value are never taken.
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "max_position_embeddings": 20}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = transformers.BartModel(transformers.BartConfig(**sizes, **heads)).double()
    adapter = attached(model, "qkv_depth")
    tokens = torch.arange(5, 12).unsqueeze(0)
    torch.autograd.backward(model(input_ids=tokens).last_hidden_state.square().sum())
    twin = copy.deepcopy(model)
    assert adapter_of(twin) is not adapter
    assert torch.equal(twin.eval()(tokens).last_hidden_state, model.eval()(tokens).last_hidden_state)


def test_data_parallel_is_refused() -> None:
    model = build("separate")
    attached(model, "qkv")
    with pytest.raises(TensLoRAError, match="DataParallel: cannot copy an adapter; start one process per device"):
        linear_at(model, "blocks.0.attention.query")._replicate_for_data_parallel()


@pytest.mark.parametrize("mode", ["qkv", "lora"])  # where query, key and value share h, and where they do not
@pytest.mark.parametrize("adapt", ["qkv", "qv"])
def test_second_derivatives_are_those_of_dense_updates(mode: str, adapt: str) -> None:
    model = build("timm_vit")  # one Linear holds query, key and value
    adapter = attached(model, mode, adapt=adapt)
    parameters = list(adapter.parameters())
    second = []
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for output in (logits(model, inputs("timm_vit")), dense_logits("timm_vit", adapter)):
            gradients = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
            total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
            second.append(torch.autograd.grad(total, parameters))
    for actual, expected in zip(*second, strict=True):
        assert (actual - expected).norm() <= 1e-8 * expected.norm()


def replaced(model: nn.Module, kind: type[nn.Linear]) -> nn.Module:
    """A model whose Linear layers have another class, and whatever that class adds in `added`."""
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = kind
            getattr(module, "added", lambda: None)()
    return model.double()


class Normed(nn.Linear):
    """A Linear with a child module and with dropout, as a package may have it."""

    def added(self) -> None:
        self.norm = nn.LayerNorm(self.out_features)
        nn.init.normal_(self.norm.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        plain: Tensor = nn.functional.dropout(self.norm(super().forward(x)), training=self.training)
        return plain


class Rectified(nn.Linear):
    """A Linear whose output autograd needs again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Paired(nn.Linear):
    """A Linear that returns its bias apart, as Megatron's do."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T, self.bias  # type: ignore[return-value]


class Summed(nn.Linear):
    """A layer with the sizes of a Linear and other outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1)


def test_a_layer_keeps_its_child_modules_and_its_mode() -> None:
    model = replaced(PlainTransformer(), Normed)
    names, count = set(model.state_dict()), len(list(model.parameters()))
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model.eval()(x)
    adapter = attached(model, "qkv_depth")
    assert {name for name in model.state_dict() if "tenslora" not in name} == names
    assert len(list(model.parameters())) == count + len(list(adapter.parameters()))
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    for parameter in adapter.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model.eval()(x), before)
    assert not model.get_submodule("blocks.0.attention.query").training


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_right_where_a_layer_needs_its_output_again(fused: bool) -> None:
    model = replaced(PlainTransformer(fused), Rectified)
    [(_, targets)] = find_projections(model)
    adapter = attached(model, "qkv_depth")
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for target in targets:
            linear = linear_at(model, target.path)
            expected = linear.plain_class.forward(linear, x) + x @ linear.layer_update.dense().T
            torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-12)
    parameter = next(adapter.parameters())

    def with_entry(value: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, {"tenslora.tensors.0.core": value}, (x,))
        return output

    assert parameter is model.get_parameter("tenslora.tensors.0.core")
    assert torch.autograd.gradcheck(with_entry, [parameter.detach().clone().requires_grad_()], fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Paired, "a Paired returns a tuple"), (Summed, r"a Summed returns \(2, 24\) for \(2, 5, 24\)")],
)
def test_a_layer_with_another_kind_of_output_is_refused_in_the_forward_pass(kind: Any, message: str) -> None:
    model = replaced(PlainTransformer(), kind)
    attached(model, "qkv_depth")
    with pytest.raises(TensLoRAError, match=rf"^blocks\.0\.attention\.query: {message}"):
        model(torch.randn(2, 5, 24, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("fused", [False, True])
def test_hooks_on_a_layer_see_and_change_the_adapted_output(fused: bool) -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, shapes, backwards = PlainTransformer(fused).double(), set(), []
    name = "blocks.0.attention.qkv" if fused else "blocks.0.attention.query"
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    linear.register_forward_hook(lambda _, __, output: shapes.add(output.shape) or 3 * output)  # type: ignore[func-returns-value]
    linear.register_full_backward_hook(lambda *_: backwards.append(1))
    everywhere = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        adapter = attached(model, "qkv_depth")
        adapted = model(x)
        torch.autograd.backward(adapted.sum())
    finally:
        everywhere.remove()
    assert (shapes, backwards) == ({(2, 5, 72 if fused else 24)}, [1])
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-11)


def test_a_forward_that_was_put_on_the_layer_itself_is_called_with_the_update() -> None:
    # accelerate puts one on every module that it hooks.
    model = PlainTransformer().double()
    linear, calls = model.get_submodule("blocks.0.attention.query"), []
    own = linear.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        plain: Tensor = own(x)
        return plain

    linear.forward = counted
    attached(model, "qkv_depth")
    adapted = linear_at(model, "blocks.0.attention.query")
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x, adapted.weight, adapted.bias) + x @ adapted.layer_update.dense().T
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-12)
    detach(model)
    assert linear.forward is counted
    assert calls == [(2, 5, 24)]


class Closed(nn.Linear):
    """A Linear that knows what attributes it has."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias", "in_features", "out_features", "training") and not name.startswith("_"):
            raise AttributeError(name)
        super().__setattr__(name, value)


class Copied(nn.Linear):
    """A Linear that makes its own deep copies."""

    def __deepcopy__(self, memo: Any) -> Copied:
        twin = type(self)(self.in_features, self.out_features).to(self.weight)
        twin.load_state_dict(self.state_dict())
        return twin


class Stated(nn.Linear):
    """A Linear that knows what is to be kept of it."""

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)


def test_a_layer_that_refuses_unknown_attributes_can_be_adapted_and_copied() -> None:
    model = replaced(PlainTransformer(), Closed)
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    attached(model, "qkv_depth")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        detach(twin)
        assert torch.equal(twin(x), before)


class Alike(nn.Linear):
    """A Linear that equals any other of its sizes."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and self.weight.shape == other.weight.shape

    def __hash__(self) -> int:
        return hash(self.weight.shape)


@pytest.mark.parametrize(("kind", "name"), [(Copied, "__deepcopy__"), (Stated, "__setstate__"), (Alike, "__eq__")])
def test_a_layer_that_copies_or_compares_itself_in_a_way_of_its_own_is_refused(
    kind: type[nn.Linear], name: str
) -> None:
    model = replaced(PlainTransformer(), kind)
    message = rf"^blocks\.0\.attention\.query: {kind.__name__} has a {name} of its own, (which would|by which)"
    with pytest.raises(TensLoRAError, match=message):
        attach(model, AdapterConfig("qkv"))
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_further_layer_of_an_adapted_layers_class_is_a_plain_one() -> None:
    model = build("separate")
    attached(model, "qkv_depth")
    query = model.get_submodule("blocks.0.attention.query")
    further = type(query)(24, 12, bias=False)
    assert type(further) is nn.Linear
    assert further.weight.shape == (12, 24) and further.bias is None


def test_an_input_may_have_a_name() -> None:
    model = build("separate")
    attached(model, "qkv_depth")
    query = linear_at(model, "blocks.0.attention.query")
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(query(input=x), query(x), rtol=0, atol=1e-12)
    with disabled(model):
        assert torch.equal(query(input=x), nn.functional.linear(x, query.weight, query.bias))
    with pytest.raises(TypeError, match="'input'"):
        query()


def test_a_layer_from_whose_class_none_can_derive_is_refused_and_the_model_stays() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("is final")

    model = build("separate")
    model.get_submodule("blocks.1.attention.key").__class__ = Final
    with pytest.raises(TensLoRAError, match=r"^blocks\.1\.attention\.key: no class can derive from Final \(is final\)"):
        attach(model, AdapterConfig("qkv"))
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_accelerates_hooks_come_and_go_around_the_adapted_layer() -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = build("separate")
    before = plain(x)
    attached(plain, "qkv_depth")
    adapted = plain(x)
    model = build("separate")
    add_hooks(model)
    attached(model, "qkv_depth")
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-12)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-12)
    add_hooks(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-12)
    detach(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def add_hooks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def test_a_function_put_around_an_adapted_layer_outlives_it() -> None:
    model = build("separate")
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query = model.get_submodule("blocks.0.attention.query")
    plain = query(x)
    attached(model, "qkv_depth")
    inner, adapted = query.forward, query(x)
    query.forward = lambda x: 2 * inner(x)
    torch.testing.assert_close(query(x), 2 * adapted, rtol=0, atol=1e-12)
    detach(model)
    torch.testing.assert_close(query(x), 2 * plain, rtol=0, atol=1e-12)


def per_layer(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))


def keeping_products(model: nn.Module) -> None:
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.mm.default])
    wrapper = partial(checkpoint_wrapper, context_fn=kept)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: hasattr(module, "attention")
    )


@pytest.mark.parametrize("checkpointed", [per_layer, keeping_products])
@pytest.mark.parametrize(
    ("fused", "mode"), [(False, "qkv_depth"), (False, "depth"), (True, "qkv_depth"), (True, "depth")]
)
def test_checkpointing_of_parts_changes_no_gradient(
    fused: bool, mode: str, checkpointed: Callable[[nn.Module], None]
) -> None:
    model = PlainTransformer(fused).double()
    parameters = list(attached(model, mode).parameters())
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    checkpointed(model)
    for actual, other in zip(torch.autograd.grad(model(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_own_forward_derivative_is_that_of_the_merged_model(fused: bool) -> None:
    model = PlainTransformer(fused).double()
    attached(model, "qkv_depth")
    x, direction = torch.randn(2, 2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    derivatives = []
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for change in (lambda _: None, merge):
            change(model)
            dual = forward_ad.make_dual(x, direction)  # type: ignore[no-untyped-call]
            derivatives.append(forward_ad.unpack_dual(model(dual)).tangent)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(*derivatives, rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_what_cannot_be_traced_or_computed_with_is_refused_in_one_line(fused: bool) -> None:
    model = PlainTransformer(fused)
    attach(model, AdapterConfig("qkv_depth"))
    linear = model.get_submodule(f"blocks.0.attention.{'qkv' if fused else 'query'}")
    x = torch.randn(2, 5, 24)
    with pytest.raises(TensLoRAError, match=r"torch\.fx and torch\.jit\.trace cannot follow an adapter"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TensLoRAError, match=r"torch\.fx and torch\.jit\.trace cannot follow an adapter"):
        torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    with pytest.raises(TensLoRAError, match=r"torch\.jit\.script cannot compile an adapter; merge and detach it first"):
        torch.jit.script(model)
    with pytest.raises(TensLoRAError, match=r"^blocks\.0\.attention\.(qkv|query): its input is a nested tensor"):
        linear(torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged))
    with pytest.raises(TensLoRAError, match=r"its input is sparse \(torch\.sparse_coo\), and must be dense"):
        linear(x[0].to_sparse())
    merge(model)
    if not fused:  # torch.fx cannot follow chunk(3)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_pickled_model_computes_the_same() -> None:
    model = PlainTransformer(fused=True).double()
    attached(model, "qkv_depth")
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    assert detach(twin) is not detach(model)
    assert torch.equal(twin(x), model(x))


def under_no_grad(query: nn.Module, _: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        query(x)


def before_a_step(query: nn.Module, model: nn.Module, x: Tensor) -> None:
    query(x)
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.mul_(0.5)


def before_the_input_changes(query: nn.Module, _: nn.Module, x: Tensor) -> None:
    query(x)
    x.mul_(2)


def under_autocast(query: nn.Module, _: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query(x)


@pytest.mark.parametrize("call", [under_no_grad, before_a_step, before_the_input_changes, under_autocast])
def test_a_product_is_shared_only_under_the_same_conditions(call: Callable[..., None]) -> None:
    model = build("separate").float()
    attached(model, "qkv_depth").float()
    query, key = (linear_at(model, f"blocks.0.attention.{name}") for name in ("query", "key"))
    x = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    call(query, model, x)
    actual = key(x)
    expected = nn.functional.linear(x, key.weight, key.bias) + x @ key.layer_update.dense().T
    torch.testing.assert_close(actual, expected)
    parameters = list(adapter_of(model).parameters())
    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * probe).sum(), parameters)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * probe).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("mode", ["qkv_depth", "lora"])
@pytest.mark.parametrize("fused", [False, True])
def test_torch_func_differentiates_an_adapted_model(fused: bool, mode: str) -> None:
    model = PlainTransformer(fused).double()
    adapter = attached(model, mode)
    parameters = {f"tenslora.{name}": parameter.detach() for name, parameter in adapter.named_parameters()}
    x = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        return output.square().sum()

    one_by_one = [torch.autograd.grad(loss(dict(model.named_parameters()), s), list(adapter.parameters())) for s in x]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        at_once = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for index, name in enumerate(parameters):
            expected = torch.stack([gradients[index] for gradients in one_by_one])
            torch.testing.assert_close(at_once[name], expected, rtol=0, atol=1e-10)
        tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
        _, derivative = torch.func.jvp(lambda values: loss(values, x[0]), (parameters,), (tangents,))
    expected = torch.stack([gradient.sum() for gradient in one_by_one[0]]).sum()
    torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-10)
    # Several adapters on one backbone, whose own weights have no such dimension
    several = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
    losses = torch.func.vmap(loss, in_dims=(0, None))(several, x[0])
    expected = torch.stack([loss({name: value[i] for name, value in several.items()}, x[0]) for i in (0, 1)])
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-10)
    outputs = model(x).flatten()
    batched = torch.autograd.grad(outputs, list(adapter.parameters()), torch.eye(6).double(), is_grads_batched=True)
    for number in range(6):
        single = torch.autograd.grad(model(x).flatten()[number], list(adapter.parameters()))
        for several_, one in zip(batched, single, strict=True):
            torch.testing.assert_close(several_[number], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_batch_gives_zero_gradients(fused: bool) -> None:
    model = PlainTransformer(fused).double()
    adapter = attached(model, "qkv_depth")
    model(torch.zeros(0, 5, 24, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


class _Mixin(ABC):  # noqa: B024
    """A mixin of a user's own, as optimum-quanto's layers have one."""


class _Mixed(_Mixin, nn.Linear):
    pass


class _OfKind(Generic[TypeVar("Kind")], nn.Linear):  # type: ignore[misc]
    pass


class _Derived(_Mixed):
    pass


@pytest.mark.parametrize("kind", [_Mixed, _OfKind, _Derived])
def test_a_layer_with_a_mixin_of_an_abstract_class_is_adapted(kind: Any) -> None:
    model, before = PlainTransformer().double(), PlainTransformer().double()
    before.load_state_dict(model.state_dict())
    blocks: Any = model.blocks
    for block in blocks:
        for name in ("query", "key", "value"):
            plain: Any = block.attention.get_submodule(name)
            mixed = kind(plain.in_features, plain.out_features, dtype=torch.float64)
            mixed.load_state_dict(plain.state_dict())
            block.attention.set_submodule(name, mixed)
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twins = [attached(each, "qkv_depth") for each in (model, before)]
    twins[1].load_state_dict(twins[0].state_dict())
    assert torch.equal(model(x), before(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    detach(model)
    assert type(blocks[0].attention.query) is kind
