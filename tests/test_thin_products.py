"""The cache of a forward pass: what it holds, when it ends, and when it must not be used."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tenslora import Adapter, RankStrategy, detach, merge
from tenslora.adapted_linear import AdaptedLinear
from tenslora.attachment import adapter_of
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tests.models import attached, build, inputs, linear_at, logits, tensor_of


@pytest.mark.parametrize(
    ("mode", "adapt", "groups"), [("qkv_depth", "qkv", 1), ("lora", "qkv", 1), ("depth", "all", 4)]
)
@pytest.mark.parametrize("name", ["separate", "fused"])
def test_a_forward_pass_computes_the_products_of_all_layers_once(
    name: str, mode: str, adapt: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    attached(model, mode, adapt=adapt)
    computed: list[range] = []
    products = Adapter.products

    def recorded(adapter: Adapter, layers: range, *rest: Any, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
        computed.append(layers)
        return products(adapter, layers, *rest, **settings)

    monkeypatch.setattr(Adapter, "products", recorded)
    logits(model, inputs(name))
    assert computed == [range(2)] * groups
    merge(model)
    computed.clear()
    logits(model, inputs(name))
    assert not computed


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "by an exception"])
def test_the_cache_ends_with_the_forward_pass(fails: bool) -> None:
    model = build("separate")
    adapter = attached(model, "qkv_depth")
    if fails:
        hook = model.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, inputs("separate"))
        hook.remove()
    else:
        logits(model, inputs("separate"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    # A block that is called by itself uses the parameters as they are now, and may be called again.
    block, query = model.get_submodule("blocks.0"), linear_at(model, "blocks.0.attention.query")
    x = torch.randn(1, 4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x, query.weight, query.bias) + 4.0 * x @ adapter.dense(0)[0]
    torch.testing.assert_close(query(x), expected, rtol=0, atol=1e-12)
    for _ in range(2):
        torch.autograd.backward(block(x).sum())
    gradient = tensor_of(adapter, 0).get_parameter("core").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def gradients_of_two_passes(model: nn.Module, cached: bool) -> list[Tensor]:
    """Gradients of a loss over two passes. Past the model's hooks there is no cache: every layer computes its own."""
    call = model if cached else model.forward
    first, second = (call(**inputs("separate")).square().sum() for _ in range(2))
    parameters = list(adapter_of(model).parameters())
    return list(torch.autograd.grad(first + 2 * second, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("without_gradients", [False, True])
@pytest.mark.parametrize("mode", ["lora", "depth", "qkv_depth", "att_site"])
def test_two_forward_passes_may_share_a_backward_pass(
    mode: str, without_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("separate")
    attached(model, mode)
    if without_gradients:  # in the first layer
        block = model.get_submodule("blocks.0")
        monkeypatch.setattr(block, "forward", torch.no_grad()(block.forward))
    with_cache, without_cache = (gradients_of_two_passes(model, cached) for cached in (True, False))
    assert any(gradient.abs().max() > 0 for gradient in with_cache)
    for one, other in zip(with_cache, without_cache, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("mode", ["att_depth", "qkv_depth"])
@pytest.mark.parametrize(("name", "reentrant"), [("hf_vit", True), ("hf_vit", False), ("timm_vit", True)])
def test_activations_may_be_recomputed_in_the_backward_pass(name: str, reentrant: bool, mode: str) -> None:
    gradients = []
    for recomputes in (False, True):
        model: Any = build(name).train()
        adapter = attached(model, mode)
        if recomputes and name == "timm_vit":
            model.set_grad_checkpointing(True)
        elif recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.vit.embeddings.cls_token.requires_grad_(True)  # reentrant checkpoints need an input with a gradient
        for _ in range(2):  # the second one adds to the gradients
            torch.autograd.backward(logits(model, inputs(name)).square().sum())
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("static_graph", [False, True])
def test_gradients_that_ddp_would_exchange_too_early_are_refused(static_graph: bool) -> None:
    model: Any = build("hf_vit").train()
    adapter = attached(model, "qkv_depth")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.vit.embeddings.cls_token.requires_grad_(True)
    ddp = nn.parallel.DistributedDataParallel(model, static_graph=static_graph)
    loss = logits(ddp, inputs("hf_vit")).square().sum()
    if static_graph:  # in which torch waits for all of them
        torch.autograd.backward(loss)
        assert all(parameter.grad is not None for parameter in adapter.parameters())
        return
    with pytest.raises(TensLoRAError, match=r"^activation checkpointing with use_reentrant=True: must be False in Di"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("mode", ["lora", "depth", "qkv_depth"])
@pytest.mark.parametrize("name", ["separate", "fused"])
def test_some_activations_may_be_recomputed_and_others_saved(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policy(_: object, operation: object, *_args: object, **_rest: object) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    gradients = []
    for recomputes in (False, True):
        model = build(name)
        adapter = attached(model, mode)
        if recomputes:
            # Only the second layer is checkpointed. What the first one puts into the cache must not reach it.
            block = model.get_submodule("blocks.1")
            contexts = partial(create_selective_checkpoint_contexts, policy)
            checkpointed = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
            monkeypatch.setattr(block, "forward", checkpointed)
        torch.autograd.backward(logits(model, inputs(name)).square().sum())
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["separate", "fused"])
def test_two_threads_may_train_one_model(name: str) -> None:
    model = build(name)
    adapter = attached(model, "qkv_depth")
    batches = [inputs(name, seed) for seed in (0, 1)]

    def gradients(batch: dict[str, Tensor]) -> list[Tensor]:
        loss = logits(model, batch).square().sum()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    expected = list(map(gradients, batches))
    # Both passes are between their two layers at the same time, and neither goes back before the other does.
    barrier = threading.Barrier(2, timeout=20)

    def meet(*_: object) -> None:
        barrier.wait()

    for place in ("blocks.1", "head"):
        model.get_submodule(place).register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        for one, other in zip(pool.map(gradients, batches), expected, strict=True):
            assert all(torch.equal(gradient, alone) for gradient, alone in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", ["lora", "depth", "att_qkv_depth"])
def test_under_autocast_the_products_are_rounded_once(mode: str) -> None:
    model = build("separate").float()
    # With other ranks the sums over a rank are rounded differently for one layer and for all layers at once.
    adapter = attached(model, mode, rank_strategy=RankStrategy("isorank")).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = linear_at(model, "blocks.1.attention.query").layer_update.shared.group.of_layer(1, torch.bfloat16)
    lefts, rights = adapter.layer_products(1)
    assert torch.equal(products.left_t, torch.cat(lefts, dim=1).T.bfloat16())
    for actual, right in zip(products.rights, rights, strict=True):
        # Alpha is multiplied at another point, so the last bit may differ.
        torch.testing.assert_close(actual, (4.0 * right).bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("mode", ["depth", "att_qkv", "qkv_depth"])
def test_matrices_that_multiply_tokens_are_stored_row_by_row(mode: str, factorization: str) -> None:
    # Stored column by column they give the same results, but their gradients take up to 3.7 times as long.
    model = build("separate")
    attached(model, mode, factorization=factorization, adapt="all")
    for linear in model.modules():
        if isinstance(linear, AdaptedLinear):
            left_t, rights, _ = linear.layer_update.shared.group.of_layer(1, torch.float64)
            assert all(tensor.is_contiguous() for tensor in (left_t, *rights))


def test_a_model_on_the_meta_device_gives_shapes() -> None:
    model = build("separate").to("meta")
    attached(model, "qkv_depth")
    output = logits(model, {key: value.to("meta") for key, value in inputs("separate").items()})
    assert output.is_meta
    assert output.shape == logits(build("separate"), inputs("separate")).shape


def test_a_copy_of_the_model_has_a_cache_of_its_own() -> None:
    model = build("fused")
    attached(model, "qkv_depth")
    torch.autograd.backward(logits(model, inputs("fused")).sum())
    twin = copy.deepcopy(model)
    detach(twin)
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


def _scale(adapter: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.5)


def _write_past_autograd(adapter: nn.Module) -> None:
    for parameter in adapter.parameters():
        parameter.data.mul_(0.5)


def _assign(adapter: nn.Module) -> None:
    adapter.load_state_dict({name: 0.5 * tensor for name, tensor in adapter.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_scale, _write_past_autograd, _assign])
@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit])
def test_a_pass_that_was_broken_off_leaves_nothing_for_a_changed_adapter(change: Any, reason: Any) -> None:
    # As after Ctrl-C in a notebook: torch calls no hook at the end of such a pass.
    model = build("separate")
    attached(model, "qkv_depth")
    other = copy.deepcopy(model)
    x = inputs("separate")["x"]

    def interrupt(*_: Any) -> None:
        raise reason

    with model.get_submodule("blocks.1").register_forward_pre_hook(interrupt), pytest.raises(reason):
        model(x)
    for each in (model, other):
        change(adapter_of(each))
    for _ in range(2):  # the graph of the pass that was broken off is not shared by two backward passes
        first, expected = (each.get_submodule("blocks.0")(x) for each in (model, other))
        assert torch.equal(first, expected)
        torch.autograd.backward(first.sum())


def test_an_input_that_changes_between_two_layers_in_inference_mode_is_multiplied_anew() -> None:
    # A tensor of inference mode does not count its changes.
    model = build("separate")
    attached(model, "qkv_depth")
    merged = copy.deepcopy(model)
    merge(merged)
    query, value = (f"blocks.0.attention.{name}" for name in ("query", "value"))
    with torch.inference_mode():
        outputs = []
        for each in (model, merged):
            x = inputs("separate")["x"].clone()
            first = linear_at(each, value)(x)
            x += 1
            outputs.append((first, linear_at(each, query)(x)))
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_layers_that_are_called_by_themselves_have_backward_passes_of_their_own() -> None:
    model = build("separate")
    adapter = attached(model, "qkv_depth")
    x = inputs("separate")["x"]
    layers = [linear_at(model, f"blocks.0.attention.{name}") for name in ("query", "value")]
    for layer in layers:
        torch.autograd.backward(layer(x).sum())
    gradients = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    torch.autograd.backward((layers[0](x) + layers[1](x)).sum())
    for gradient, parameter in zip(gradients, adapter.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
