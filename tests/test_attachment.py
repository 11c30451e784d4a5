"""Adapters on whole models, against the backbone with each update built and added by hand, and against PEFT."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tenslora import AdapterConfig, TensLoRAError, attach, detach, disabled, load, merge, unmerge
from tenslora.adapted_linear import AdaptedLinear, SharedInput
from tenslora.adapter import Adapter
from tenslora.attachment import adapter_of
from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.factorizations import FACTORIZATIONS
from tenslora.projections import find_projections
from tenslora.ranks import RankStrategy
from tests.models import BUILDERS, DECODERS, attached, build, inputs, logits

OTHERS = [name for name in FACTORIZATIONS if name != "tucker"]


def by_hand(name: str, adapter: Adapter) -> Tensor:
    """Logits of a fresh backbone whose weights had alpha dW^T added as functions of the adapter's parameters."""
    model = build(name)
    _, targets = find_projections(model, adapter.config.adapt)
    weights = {}
    for target in targets:
        weight = next(iter(target.linear.parameters())).detach().clone()
        if not isinstance(target.linear, nn.Linear):
            weight = weight.T  # Conv1D's
        update = torch.zeros_like(weight)
        for index, column in target.columns:
            matrix = adapter.dense(target.layer)[target.group[index]]
            matrix = matrix if target.writes_to_stream else matrix.T
            update = update + nn.functional.pad(matrix, (0, 0, column, len(weight) - column - len(matrix)))
        updated = weight + adapter.config.alpha * update
        weights[f"{target.path}.weight"] = updated if isinstance(target.linear, nn.Linear) else updated.T
    output = torch.func.functional_call(model, weights, kwargs=inputs(name), args=())
    result: Tensor = getattr(output, "logits", output)
    return result


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_logits_and_gradients_are_those_of_the_dense_update(name: str, mode: str) -> None:
    model = build(name)
    check_against_dense_updates(name, model, attached(model, mode))


@pytest.mark.parametrize(
    ("mode", "ranks"), [("depth", (9, 2, 2)), ("qkv_depth", (20, 3, 3, 2)), ("att_qkv_depth", (20, 2, 2, 3, 2))]
)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_the_same_with_an_output_rank_below_the_input_rank(name: str, mode: str, ranks: tuple[int, ...]) -> None:
    model = build(name)
    check_against_dense_updates(name, model, attached(model, mode, rank_strategy=RankStrategy("explicit", ranks=ranks)))


@pytest.mark.parametrize(("mode", "ranks"), [("qkv", (20, 2, 2)), ("site", (20, 2, 3)), ("qkv_depth", (20, 2, 2, 2))])
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit", "llama"])
def test_the_same_with_it_and_matrices_of_several_slices(name: str, mode: str, ranks: tuple[int, ...]) -> None:
    model = build(name)
    adapter = attached(model, mode, adapt="all", rank_strategy=RankStrategy("explicit", ranks=ranks))
    assert len(adapter.layer_products(0)[0]) > 1  # a left of their own
    check_against_dense_updates(name, model, adapter)


def check_against_dense_updates(name: str, model: nn.Module, adapter: Adapter) -> None:
    y, oracle = logits(model, inputs(name)), by_hand(name, adapter)
    torch.testing.assert_close(y, oracle, rtol=0, atol=1e-11)
    probe = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((y * probe).sum(), list(adapter.parameters()))
    theirs = torch.autograd.grad((oracle * probe).sum(), list(adapter.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("mode", [mode for mode in CONSTRUCTIONS if mode != "lora"])
@pytest.mark.parametrize("factorization", OTHERS)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_the_same_with_other_factorizations(name: str, factorization: str, mode: str) -> None:
    model = build(name)
    check_against_dense_updates(name, model, attached(model, mode, factorization=factorization))


@pytest.mark.parametrize(
    ("mode", "factorization"),
    [("lora", "tucker"), ("att", "tucker"), ("qkv", "cp"), ("att_qkv_depth", "tucker"), ("site", "tensor_train")],
)
@pytest.mark.parametrize("adapt", ["q", "v", "qv", "kv", "o", "qkvo", "mlp", "all"])
@pytest.mark.parametrize("name", ["hf_vit", "hf_bert", "hf_distilbert", "timm_vit", "llama", "gemma", "gpt2"])
def test_the_same_with_other_matrices(name: str, adapt: str, mode: str, factorization: str) -> None:
    model = build(name)
    check_against_dense_updates(name, model, attached(model, mode, adapt=adapt, factorization=factorization))


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_the_same_in_decoders(name: str, mode: str) -> None:
    model = build(name)
    check_against_dense_updates(name, model, attached(model, mode))


@pytest.mark.parametrize("adapt", ["qv", "all"])
@pytest.mark.parametrize("name", ["timm_vit", *DECODERS])
def test_merged_with_other_matrices_the_logits_are_the_adapted_ones(name: str, adapt: str) -> None:
    model = build(name)
    attached(model, "qkv_depth", adapt=adapt)
    adapted = logits(model, inputs(name))
    merge(model)
    torch.testing.assert_close(logits(model, inputs(name)), adapted, rtol=0, atol=1e-10)
    unmerge(model)
    torch.testing.assert_close(logits(model, inputs(name)), adapted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("adapt", ["all", "qv"])
@pytest.mark.parametrize("name", ["hf_roberta", "timm_vit"])
def test_with_other_matrices_a_compiled_graph_stays_whole(name: str, adapt: str) -> None:
    model = build(name)
    attached(model, "qkv_depth", adapt=adapt)
    expected = logits(model, inputs(name))
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(**inputs(name))
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BUILDERS)
def test_at_the_start_the_model_is_unchanged(name: str) -> None:
    model = build(name)
    before = logits(model, inputs(name))
    attach(model, AdapterConfig("att_qkv_depth")).double()
    assert torch.equal(logits(model, inputs(name)), before)


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_merged_and_detached_is_a_plain_backbone_with_the_adapted_logits(name: str, mode: str) -> None:
    plain = build(name).float()
    names, modules = set(plain.state_dict()), [type(m) for m in plain.modules()]
    batch = {key: value.float() if value.is_floating_point() else value for key, value in inputs(name).items()}
    attached(plain, mode).float()
    adapted = logits(plain, batch)
    merge(plain)
    merge(plain)  # twice does what once does
    torch.testing.assert_close(logits(plain, batch), adapted, rtol=0, atol=1e-5)
    detach(plain)
    torch.testing.assert_close(logits(plain, batch), adapted, rtol=0, atol=1e-5)
    assert set(plain.state_dict()) == names
    assert [type(m) for m in plain.modules()] == modules
    assert not hasattr(plain, "tenslora")


@pytest.mark.parametrize("name", BUILDERS)
def test_merged_inference_is_the_plain_backbones_operation_by_operation(name: str) -> None:
    class Named(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def operations(model: nn.Module) -> list[str]:
        with torch.no_grad(), Named() as seen:  # type: ignore[no-untyped-call]
            logits(model, inputs(name))
        return seen.names

    model = build(name)
    plain = operations(model)
    attached(model, "qkv_depth")
    assert operations(model) != plain
    merge(model)
    assert operations(model) == plain


def test_merging_changes_the_weights_and_unmerging_gives_them_back() -> None:
    model = build("hf_vit")
    attached(model, "qkv_depth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == 6
    unmerge(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BUILDERS)
def test_detached_without_merging_is_the_backbone_as_it_was(name: str) -> None:
    model = build(name)
    before, linears = logits(model, inputs(name)), [m for m in model.modules() if isinstance(m, nn.Linear)]
    attached(model, "depth")
    assert not torch.equal(logits(model, inputs(name)), before)
    detach(model)
    assert torch.equal(logits(model, inputs(name)), before)
    assert all(a is b for a, b in zip(linears, [m for m in model.modules() if isinstance(m, nn.Linear)], strict=True))


def test_the_names_of_the_backbones_own_weights_do_not_change() -> None:
    model = build("hf_roberta")
    before = set(model.state_dict())
    attach(model, AdapterConfig("qkv"))
    after = set(model.state_dict())
    assert before <= after
    assert {name.split(".")[0] for name in after - before} == {"tenslora"}


def test_only_the_adapter_is_left_trainable() -> None:
    model = build("hf_distilbert")
    adapter = attach(model, AdapterConfig("att_depth"))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_query_key_and_value_share_one_product_with_the_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    of_all = SharedInput.of_all

    def counted(shared: SharedInput, tokens: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        calls.append(shared.layer)
        return of_all(shared, tokens, dtype)

    monkeypatch.setattr(SharedInput, "of_all", counted)
    model = build(name)
    attached(model, "qkv_depth")
    logits(model, inputs(name))
    assert calls == [0, 1]


def test_projections_called_with_inputs_of_their_own_are_not_mixed_up() -> None:
    # As in cross-attention: key and value see another tensor than query does.
    model = build("hf_bert")
    adapter = attached(model, "qkv_depth")
    attention = model.bert.encoder.layer[1].attention.self  # type: ignore[union-attr,index]
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 4, 24, dtype=torch.float64, generator=generator)
    for tensor, index, linear in (
        (x, 0, attention.query),
        (z, 1, attention.key),
        (z, 2, attention.value),
        (x, 1, attention.key),
    ):  # type: ignore[union-attr]
        expected = nn.functional.linear(tensor, linear.weight, linear.bias) + 4.0 * tensor @ adapter.dense(1)[index]  # type: ignore[union-attr,arg-type]
        torch.testing.assert_close(linear(tensor), expected, rtol=0, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("library", ["hf_bert", "hf_roberta", "hf_distilbert"])
def test_lora_is_pefts_lora(library: str) -> None:
    from peft import LoraConfig, get_peft_model

    names = {"hf_distilbert": ["q_lin", "k_lin", "v_lin"]}.get(library, ["query", "key", "value"])
    model = build(library)
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=16, target_modules=names)).double().eval()
    adapter = attached(model, "lora")
    theirs = [module for module in peft.modules() if hasattr(module, "lora_A")]
    assert len(theirs) == 6
    order = [(projection, layer) for layer in range(2) for projection in range(3)]
    pairs = [(adapter.tensors[p * 2 + layer], module) for (p, layer), module in zip(order, theirs, strict=True)]
    with torch.no_grad():
        for ours, module in pairs:
            module.lora_A["default"].weight.copy_(ours.d_in.T)  # type: ignore[union-attr,index,operator]
            module.lora_B["default"].weight.copy_(ours.d_out.T)  # type: ignore[union-attr,index,operator]
    batch = inputs(library)
    y, oracle = logits(model, batch), logits(peft, batch)
    torch.testing.assert_close(y, oracle, rtol=0, atol=1e-12)
    probe = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * probe).sum().backward()  # type: ignore[no-untyped-call]
    (oracle * probe).sum().backward()  # type: ignore[no-untyped-call]
    for ours, module in pairs:
        for mine, other in ((ours.d_in, module.lora_A), (ours.d_out, module.lora_B)):  # type: ignore[union-attr]
            gradient = other["default"].weight.grad.T  # type: ignore[union-attr,index]
            assert gradient.norm() > 0
            assert (mine.grad - gradient).norm() <= 1e-10 * gradient.norm()  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
def test_no_matrix_as_large_as_a_weight_is_made_in_training(mode: str) -> None:
    # d = 24 against 2 tokens and ranks of 2: a new tensor of 24 x 24 could only be an update.
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=4, max_position_embeddings=4), add_pooling_layer=False)
    attach(model, AdapterConfig(mode, RankStrategy("isorank", rank=2)))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    self.size = max(self.size, tensor.numel())
            return result

    with Largest() as largest:  # type: ignore[no-untyped-call]
        model(input_ids=torch.tensor([[1, 2]])).last_hidden_state.sum().backward()
    assert 0 < largest.size < 24 * 24
    # And the probe does see an update where one is built.
    with Largest() as largest:  # type: ignore[no-untyped-call]
        adapter_of(model).dense(0)
    assert largest.size >= 24 * 24


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("mode", ["att_depth", "qkv_depth"])
@pytest.mark.parametrize(("name", "reentrant"), [("hf_vit", True), ("hf_vit", False), ("timm_vit", True)])
def test_activations_may_be_recomputed_in_the_backward(name: str, reentrant: bool, mode: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = build(name).train()
        adapter = attached(model, mode)
        if recomputed and name == "timm_vit":
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        elif recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            # What is recomputed from inputs without a gradient has none, reentrantly.
            model.vit.embeddings.cls_token.requires_grad_(True)  # type: ignore[union-attr]
        for _ in range(2):  # as with accumulation
            logits(model, inputs(name)).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["lora", "depth", "qkv_depth"])
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_activations_may_be_recomputed_in_part(name: str, mode: str) -> None:
    def policy(_: object, operation: object, *_args: object, **_rest: object) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    gradients = []
    for recomputed in (False, True):
        model = build(name)
        adapter = attached(model, mode)
        # The first layer stays as it is: what is made there for all must not reach the second.
        block = model.bert.encoder.layer[1] if name == "hf_bert" else model.blocks[1]  # type: ignore[union-attr,index]
        if recomputed:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[union-attr]
            block.forward = again  # type: ignore[union-attr,assignment,method-assign]
        logits(model, inputs(name)).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gradients(model: nn.Module, whole: bool) -> list[Tensor]:
    """Of a loss over two calls; not whole: past the model's hooks, so that every layer makes what it needs."""
    call = model if whole else model.forward
    one, other = (call(**inputs("hf_bert")).logits.square().sum() for _ in range(2))  # type: ignore[operator]
    parameters = list(adapter_of(model).parameters())
    return list(torch.autograd.grad(one + 2 * other, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(
    ("mode", "adapt", "groups"), [("qkv_depth", "qkv", 1), ("lora", "qkv", 1), ("depth", "all", 4)]
)
@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_a_forward_pass_makes_the_products_of_all_layers_once(
    name: str, mode: str, adapt: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = build(name), []
    attached(model, mode, adapt=adapt)
    products = Adapter.products

    def counted(adapter: Adapter, layers: range, *rest: Any) -> tuple[list[Tensor], list[Tensor]]:
        made.append(layers)
        return products(adapter, layers, *rest)

    monkeypatch.setattr(Adapter, "products", counted)
    logits(model, inputs(name))
    assert made == [range(2)] * groups
    merge(model)
    made.clear()
    logits(model, inputs(name))
    assert not made


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", CONSTRUCTIONS)
def test_passes_may_share_a_backward_and_have_layers_without_one(mode: str, frozen: bool) -> None:
    model = build("hf_bert")
    attached(model, mode)
    if frozen:
        first = model.bert.encoder.layer[0]  # type: ignore[union-attr,index]
        first.forward = torch.no_grad()(first.forward)  # type: ignore[union-attr,assignment,method-assign,arg-type]
    together, apart = gradients(model, whole=True), gradients(model, whole=False)
    assert any(gradient.abs().max() > 0 for gradient in together)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("failing", [False, True])
def test_what_a_pass_has_made_ends_with_it(failing: bool) -> None:
    model = build("hf_bert")
    adapter = attached(model, "qkv_depth")
    first, second = model.bert.encoder.layer  # type: ignore[union-attr,misc]
    if failing:
        hook = second.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, inputs("hf_bert"))
        hook.remove()
    else:
        logits(model, inputs("hf_bert"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    # A block by itself goes by the parameters as they are now, and twice over.
    x = torch.randn(1, 4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query = first.attention.self.query
    expected = nn.functional.linear(x, query.weight, query.bias) + 4.0 * x @ adapter.dense(0)[0]
    torch.testing.assert_close(query(x), expected, rtol=0, atol=1e-12)
    for _ in range(2):
        first(x)[0].sum().backward()
    assert adapter.tensors[0].core.grad.abs().max() > 0  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("mode", ["lora", "depth", "att_qkv_depth"])
def test_under_autocast_the_products_are_rounded_once(mode: str) -> None:
    model = build("hf_bert").float()
    adapter = attached(model, mode).float()
    group = model.bert.encoder.layer[1].attention.self.query.shared.group  # type: ignore[union-attr,index]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = group.of_layer(1, torch.bfloat16)  # type: ignore[union-attr,operator]
    lefts, rights = adapter.layer_products(1)
    assert torch.equal(products.left, torch.cat(lefts, dim=1).T.bfloat16())
    for second, right in zip(products.rights, rights, strict=True):
        # Alpha is in it from the start, and so its last bit may differ.
        torch.testing.assert_close(second, (4.0 * right).bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("mode", ["depth", "att_qkv", "qkv_depth"])
def test_what_multiplies_tokens_is_stored_row_by_row(mode: str, factorization: str) -> None:
    # In the other order everything is as right, and its gradients take up to 3.7 times as long.
    model = build("hf_bert")
    attached(model, mode, factorization=factorization, adapt="all")
    for linear in model.modules():
        if isinstance(linear, AdaptedLinear):
            left, rights, _ = linear.shared.group.of_layer(1, torch.float64)
            assert all(tensor.is_contiguous() for tensor in (left, *rights))


def test_shapes_can_be_had_without_numbers() -> None:
    model = build("hf_bert").to("meta")
    attached(model, "qkv_depth")
    y = logits(model, {key: value.to("meta") for key, value in inputs("hf_bert").items()})
    assert y.is_meta
    assert y.shape == logits(build("hf_bert"), inputs("hf_bert")).shape


def test_a_copy_passes_by_itself_and_a_detached_model_has_no_hooks_left() -> None:
    model = build("timm_vit")
    attached(model, "qkv_depth")
    logits(model, inputs("timm_vit")).sum().backward()  # type: ignore[no-untyped-call]
    twin = copy.deepcopy(model)
    detach(twin)
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


@pytest.mark.parametrize(
    ("mode", "factorization"),
    [*[(mode, "tucker") for mode in CONSTRUCTIONS], *[("att_qkv_depth", other) for other in OTHERS]],
)
@pytest.mark.parametrize("name", ["hf_roberta", "timm_vit"])
def test_nothing_of_the_adapter_breaks_a_compiled_graph(name: str, mode: str, factorization: str) -> None:
    model = build(name)
    attached(model, mode, factorization=factorization)
    given = inputs(name)
    expected = logits(model, given)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    output = torch.compile(model, backend=traced, fullgraph=True, dynamic=True)(**given)
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=0, atol=1e-12)
    others = {key: torch.cat([value, value])[:3] for key, value in given.items()}
    others = {key: value[:, :5].contiguous() if key == "input_ids" else value for key, value in others.items()}
    torch.compile(model, backend=traced, fullgraph=True, dynamic=True)(**others)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
@pytest.mark.parametrize("mode", ["qkv_depth", "depth"])
def test_rank_dropout_leaves_out_whole_components_in_training_only(name: str, mode: str) -> None:
    model = build(name)
    attached(model, mode, rank_dropout=0.5)
    module = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    tokens = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lefts, rights = module.shared.group.adapter.layer_products(0)
    left, right = torch.stack(lefts), torch.stack(rights)
    h, held = tokens @ left, right[[index for index, _ in module.columns]] * 4.0
    # One column per component: its part of the output, over all tokens. Solved for what it was multiplied with.
    terms = torch.stack(
        [
            torch.cat([h[p % len(h)][:, [r]] * held[p, r] * (p % len(h) == q) for p in range(len(held))], 1).flatten()
            for q in range(len(left) if len(held) > 1 else 1)
            for r in range(right.shape[1])
        ],
        dim=1,
    )
    torch.manual_seed(0)
    kept = []
    for _ in range(20):
        y = (model.train() and module(tokens)) - module.base[0](tokens)
        kept.append(torch.linalg.lstsq(terms, y.flatten()).solution)
        torch.testing.assert_close(terms @ kept[-1], y.flatten(), rtol=0, atol=1e-10)
    values = torch.stack(kept).detach().round(decimals=8)
    assert set(values.flatten().tolist()) == {0.0, 2.0}
    model.eval()
    whole = terms @ torch.ones(terms.shape[1], dtype=torch.float64)
    torch.testing.assert_close((module(tokens) - module.base[0](tokens)).flatten(), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["hf_bert", "timm_vit"])
def test_disabled_the_model_is_the_backbone_for_a_while(name: str) -> None:
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


def test_dropout_acts_in_training_only() -> None:
    model = build("hf_bert")
    attached(model, "qkv", dropout=0.5)
    batch = inputs("hf_bert")
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.tenslora.train()  # type: ignore[union-attr,operator]
    assert not torch.equal(logits(model, batch), logits(model, batch))


def test_an_adapter_travels_between_models_of_a_kind(tmp_path: Path) -> None:
    source, target = build("hf_vit"), build("hf_vit")
    adapter = attached(source, "att_qkv")
    adapter.save(tmp_path / "adapter.safetensors")
    load(target, tmp_path / "adapter.safetensors").double()
    torch.testing.assert_close(logits(target, inputs("hf_vit")), logits(source, inputs("hf_vit")))


def test_loading_onto_the_wrong_backbone_says_which_dimension_differs(tmp_path: Path) -> None:
    Adapter(AdapterConfig("depth"), Geometry(d_in=24, heads=3, d_head=8, layers=6)).save(tmp_path / "a.safetensors")
    with pytest.raises(TensLoRAError, match=r"layers is 6 in the adapter and 2 in the backbone"):
        load(build("hf_bert"), tmp_path / "a.safetensors")


def test_a_refused_adapter_leaves_the_model_alone() -> None:
    model = build("hf_bert")
    with pytest.raises(TensLoRAError):
        attach(model, AdapterConfig("nope"))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "tenslora")


def test_two_adapters_at_once_are_refused_and_none_is_reported() -> None:
    model = build("hf_bert")
    with pytest.raises(TensLoRAError, match="has no adapter"):
        detach(model)
    attach(model, AdapterConfig("qkv"))
    with pytest.raises(TensLoRAError, match="has an adapter already"):
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


def test_an_encoder_decoder_is_copied_after_a_step() -> None:
    # Its cross-attention's key and value read another tensor than the query: what was computed for them waits in vain.
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "max_position_embeddings": 20}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = hf.BartModel(hf.BartConfig(**sizes, **heads)).double()
    adapter = attached(model, "qkv_depth")
    tokens = torch.arange(5, 12).unsqueeze(0)
    model(input_ids=tokens).last_hidden_state.square().sum().backward()
    twin = copy.deepcopy(model)
    assert adapter_of(twin) is not adapter
    assert torch.equal(twin.eval()(tokens).last_hidden_state, model.eval()(tokens).last_hidden_state)


def test_passes_at_the_same_time_do_not_mix_their_inputs() -> None:
    projections = nn.Module()
    projections.num_heads = 2  # type: ignore[assignment]
    q, k, v = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
    projections.q_proj, projections.k_proj, projections.v_proj = q, k, v
    attached(projections, "qkv")
    one, other = torch.randn(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = projections.k_proj(other)
    given_up = torch.zeros(1, 4, dtype=torch.float64)
    with torch.no_grad():
        projections.q_proj(given_up)
        # Another thread may come in whenever memory is given back, as of the input that is not waited for any more.
        weakref.finalize(given_up, projections.q_proj, other)
        del given_up
        projections.q_proj(one)
        assert torch.equal(projections.k_proj(other), expected)


def test_data_parallel_replicas_are_refused() -> None:
    model = build("hf_bert")
    attached(model, "qkv")
    linear = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    with pytest.raises(TensLoRAError, match="DataParallel: cannot copy an adapter; start one process per device"):
        linear._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


def test_bf16_weights_are_served_by_a_float32_adapter() -> None:
    model = build("hf_vit").bfloat16()
    adapter = attached(model, "qkv_depth").float()
    y = logits(model, {"pixel_values": inputs("hf_vit")["pixel_values"].bfloat16()})
    y.float().sum().backward()  # type: ignore[no-untyped-call]
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_the_linears_own_forward_and_hooks_are_kept() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build("timm_vit")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Doubling
    before = logits(model, inputs("timm_vit"))
    attach(model, AdapterConfig("qkv")).double()
    assert torch.equal(logits(model, inputs("timm_vit")), before)


def test_weights_that_are_replaced_while_attached_are_still_there_when_detached() -> None:
    model, other = build("hf_vit"), build("hf_vit")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    attach(model, AdapterConfig("qkv")).double()
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    detach(model)
    assert torch.equal(logits(model, inputs("hf_vit")), logits(other, inputs("hf_vit")))


def test_packed_weights_are_not_merged_into() -> None:
    model = build("timm_vit")
    attached(model, "qkv")
    packed = nn.Parameter(torch.zeros(72 * 12, 1, dtype=torch.uint8), requires_grad=False)
    model.blocks[1].attn.qkv.weight = packed  # type: ignore[union-attr,index]
    with pytest.raises(TensLoRAError, match=r"blocks\.1\.attn\.qkv: an update cannot be added to the weight of this Linear"):
        merge(model)
