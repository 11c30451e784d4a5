"""Updates of any weight, against the complete tensor that TensorLy builds, and autograd through it."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tt_tensor import tt_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models.resnet import BasicBlock

from tenslora import (
    AdapterConfig,
    TensLoRAError,
    adapt_tensor,
    attach,
    detach,
    detach_tensors,
    load_tensors,
    merge_tensors,
    save_tensors,
    tensor_update,
    unmerge_tensors,
)
from tenslora.constructions import SCALINGS
from tenslora.files import read_safetensors, write_safetensors
from tenslora.ranks import weight_parameter_count, weight_ranks
from tenslora.tensor_update import FORMAT, TensorUpdate
from tests.plain_transformer import PlainTransformer

FACTORIZATIONS = ("tucker", "cp", "tensor_train")
SHAPES = {"linear": (6, 5), "kan": (5, 4, 7), "kernels": (6, 4, 3, 2)}
RANKS = {
    ("tucker", "linear"): (3, 2),
    ("tucker", "kan"): (3, 2, 4),
    ("tucker", "kernels"): (5, 3, 2, 1),
    ("cp", "linear"): (3,),
    ("cp", "kan"): (4,),
    ("cp", "kernels"): (3,),
    ("tensor_train", "linear"): (3,),
    ("tensor_train", "kan"): (3, 4),
    ("tensor_train", "kernels"): (3, 4, 5),
}


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    tl.set_backend("pytorch")


class Holder(nn.Module):
    """A weight of any shape, and nothing else."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


class Block(nn.Module):
    """A block of a ResNet, with a Linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(4, 4).eval()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.block(x).mean((2, 3))))


def randomised(update: TensorUpdate) -> TensorUpdate:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return update


def adapted_block(**settings: Any) -> tuple[Block, dict[str, TensorUpdate]]:
    """All weights of a block, adapted by random updates."""
    torch.manual_seed(0)
    model = Block()
    updates = {
        "block.conv1.weight": adapt_tensor(model.block.conv1, "weight", 3, **settings),
        "block.conv2.weight": adapt_tensor(model.block.conv2, "weight", 2, **settings),
        "head.weight": adapt_tensor(model.head, "weight", 2, **settings),
    }
    return model, {name: randomised(update) for name, update in updates.items()}


def full(update: TensorUpdate) -> Tensor:
    """The complete tensor, built by TensorLy."""
    parameters = dict(update.tensor.named_parameters())
    factorization, modes = update.config.factorization, list(update.tensor.modes)
    if factorization == "tucker":
        return cast(Tensor, tucker_to_tensor((parameters["core"], [parameters[name] for name in modes])))
    if factorization == "cp":
        return cast(Tensor, cp_to_tensor((None, [parameters[name] for name in modes])))
    order = [*modes[1:], modes[0]]  # the train ends at the outputs
    first, *middle, last = (parameters[name] for name in order)
    return cast(Tensor, tt_to_tensor([first[None], *middle, last[..., None]])).movedim(-1, 0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("factorization", "kind"), RANKS)
def test_the_weight_and_its_gradients_are_those_of_the_full_tensor(factorization: str, kind: str, scaling: str) -> None:
    holder = Holder(*SHAPES[kind])
    ranks = RANKS[factorization, kind]
    update = adapt_tensor(holder, "weight", ranks, factorization, alpha=1.5, scaling=scaling)
    holder.double()
    randomised(update)
    original = cast(Tensor, holder.get_parameter("parametrizations.weight.original"))
    expected = original + update.scale * full(update)
    torch.testing.assert_close(holder.weight, expected, rtol=0, atol=1e-12)
    direction = torch.randn(SHAPES[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(update.parameters())
    actual = torch.autograd.grad((holder.weight * direction).sum(), parameters)
    wanted = torch.autograd.grad((expected * direction).sum(), parameters)
    for one, other in zip(actual, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_resnet_block_and_a_linear_compute_with_the_updated_weights(factorization: str) -> None:
    model, updates = adapted_block(factorization=factorization, alpha=0.5)
    model.double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain = Block().double()
    torch.manual_seed(0)
    plain.load_state_dict(Block().state_dict())
    with torch.no_grad():
        for path, update in updates.items():
            plain.get_parameter(path).add_(0.5 * full(update))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-10)
    # The same by functions alone, with running statistics that a new block has: mean 0 and variance 1.
    w1, w2 = plain.block.conv1.weight, plain.block.conv2.weight
    shrink = 1 / math.sqrt(1 + 1e-5)
    y = F.conv2d(x, w1, padding=1).mul(shrink).relu()
    y = (F.conv2d(y, w2, padding=1).mul(shrink) + x).relu().mean((2, 3))
    torch.testing.assert_close(model(x), y @ plain.head.weight.T + plain.head.bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("factorization", "shape", "ranks", "count"),
    [
        ("tucker", (6, 4, 3, 2), (5, 3, 2, 1), 6 * 5 + 4 * 3 + 3 * 2 + 2 * 1 + 5 * 3 * 2 * 1),
        ("cp", (6, 4, 3, 2), (3,), 3 * (6 + 4 + 3 + 2)),
        ("tensor_train", (6, 4, 3, 2), (3, 4, 5), 4 * 3 + 3 * 3 * 4 + 4 * 2 * 5 + 5 * 6),
        ("tensor_train", (6, 5), (3,), 3 * (6 + 5)),
    ],
)
def test_the_count_is_exact_before_and_after_building(
    factorization: str, shape: tuple[int, ...], ranks: tuple[int, ...], count: int
) -> None:
    assert weight_parameter_count(shape, ranks, factorization) == count
    holder = Holder(*shape)
    update = adapt_tensor(holder, "weight", ranks, factorization)
    assert sum(p.numel() for p in holder.parameters() if p.requires_grad) == count
    assert f"{count:,} parameters" in repr(update)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_first_step_is_that_of_adamw(factorization: str, scaling: str) -> None:
    squares, wanted = [], 0.0
    for seed in range(20):
        holder = Holder(24, 20, 3, 3)
        update = adapt_tensor(holder, "weight", 3, factorization, alpha=2.0, scaling=scaling, seed=seed)
        before = holder.weight.detach().clone()
        gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.AdamW(update.parameters(), lr=1e-3, weight_decay=0)
        torch.autograd.backward((holder.weight * gradient).sum())
        optimizer.step()
        squares.append((holder.weight - before).square().sum().item())
        wanted = update.first_step * 1e-3
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(wanted, rel=0.1)
    if scaling == "first_step":  # alpha times that of a LoRA of rank 4
        assert wanted == pytest.approx(2e-3 * math.sqrt(4 * 24 / 3))


def test_the_module_starts_as_it_was_and_only_the_update_is_trained() -> None:
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    before = conv(x)
    adapt_tensor(conv, "weight", 2)
    assert torch.equal(conv(x), before)
    assert [name for name, p in conv.named_parameters() if not p.requires_grad] == ["parametrizations.weight.original"]
    first, again, other = (adapt_tensor(nn.Conv2d(4, 6, 3), "weight", 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tensor.get_parameter("d_in"), again.tensor.get_parameter("d_in"))
    assert not torch.equal(first.tensor.get_parameter("d_in"), other.tensor.get_parameter("d_in"))


def test_merging_unmerging_and_detaching_keep_what_they_promise() -> None:
    model, updates = adapted_block()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        adapted = model(x)
        merge_tensors(model)
        merge_tensors(model)
        torch.testing.assert_close(model(x), adapted)
        unmerge_tensors(model)
        torch.testing.assert_close(model(x), adapted)
        merge_tensors(model)
        assert detach_tensors(model) == updates
        torch.testing.assert_close(model(x), adapted)
    assert type(model.head) is nn.Linear
    assert model.state_dict().keys() == Block().state_dict().keys()
    assert not model.block.conv1.weight.requires_grad


@pytest.mark.parametrize(
    "moved",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["itself", "deep copy", "pickled"],
)
def test_what_was_merged_is_taken_out_whatever_has_become_of_the_update(
    moved: Callable[[nn.Module], nn.Module],
) -> None:
    holder = Holder(5, 4, 7)
    update = randomised(adapt_tensor(holder, "weight", 2))
    before = copy.deepcopy(holder.state_dict())["parametrizations.weight.original"]
    merge_tensors(holder)
    held = holder.weight.clone()
    # The update alone: torch makes a class for each module with a parametrization, which pickle cannot find.
    update = cast(TensorUpdate, moved(update))
    cast(Any, holder).parametrizations.weight[0] = update
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.fill_(0.5)
    update.scale = 7.0
    merge_tensors(holder)  # has no effect: the weight holds an update
    assert torch.equal(holder.weight, held)
    unmerge_tensors(holder)
    torch.testing.assert_close(holder.state_dict()["parametrizations.weight.original"], before)
    torch.testing.assert_close(holder.weight, before + update.update())
    assert update.scale == 7.0


def test_the_weights_of_a_merged_model_are_loaded_with_the_updates_that_they_hold() -> None:
    model, updates = adapted_block()
    before = copy.deepcopy(model.state_dict())
    merge_tensors(model)
    best = copy.deepcopy(model.state_dict())
    unmerge_tensors(model)
    with torch.no_grad():
        for update in updates.values():
            for parameter in update.parameters():
                parameter.mul_(2)
    merge_tensors(model)
    model.load_state_dict(best)
    with torch.no_grad():
        for update in updates.values():  # whatever becomes of the updates afterwards
            for parameter in update.parameters():
                parameter.zero_()
    unmerge_tensors(model)
    for path, weight in model.state_dict().items():
        torch.testing.assert_close(weight, torch.zeros_like(weight) if ".tensor." in path else before[path])


def test_an_update_that_is_not_finite_is_not_merged() -> None:
    model, updates = adapted_block()
    before = copy.deepcopy(model.state_dict())
    path, update = list(updates.items())[-1]
    with torch.no_grad():
        next(update.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(TensLoRAError, match=rf"^{path}: its update holds a NaN or an infinity"):
        merge_tensors(model)
    kept = [torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if "original" in name]
    assert kept
    assert all(kept)


def test_an_update_that_a_weight_cannot_hold_is_not_merged() -> None:
    linear = nn.Linear(5, 6).half()
    update = adapt_tensor(linear, "weight", 2)
    before = copy.deepcopy(linear.state_dict())
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.fill_(100)
    with pytest.raises(TensLoRAError, match=r"^weight: its weight would hold a NaN or an infinity in float16"):
        merge_tensors(linear)
    assert torch.equal(
        linear.state_dict()["parametrizations.weight.original"], before["parametrizations.weight.original"]
    )


def test_a_weight_that_another_module_uses_is_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6, bias=False))
    model[1].weight = model[0].weight
    randomised(adapt_tensor(model[0], "weight", 2))
    before = model(torch.arange(6))
    with pytest.raises(TensLoRAError, match=r"^0\.weight: its weight is shared by .* and 1, and a merge would change"):
        merge_tensors(model)
    assert torch.equal(model(torch.arange(6)), before)


def test_a_layer_that_has_an_adapter_takes_no_update_until_it_is_detached(tmp_path: Path) -> None:
    model, path = PlainTransformer(), "blocks.0.attention.query"
    randomised(adapt_tensor(model.get_submodule(path), "weight", 2))
    file = save_tensors(model, tmp_path / "updates.safetensors")
    detach_tensors(model)
    x = torch.randn(2, 3, 24)
    attach(model, AdapterConfig("qkv"))
    before, names = model(x), list(model.state_dict())
    for module in (model.get_submodule(path), copy.deepcopy(model).get_submodule(path)):
        with pytest.raises(TensLoRAError, match=r"^weight: belongs to a layer that has an adapter .*with detach"):
            adapt_tensor(module, "weight", 2)
    with pytest.raises(TensLoRAError, match=r"weight: belongs to a layer that has an adapter \(AdaptedLinear\)"):
        load_tensors(model, file)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    detach(model)
    load_tensors(model, file)


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.embedding(tokens)))


def test_two_modules_that_share_a_weight_have_an_update_each(tmp_path: Path) -> None:
    model, tokens = Tied(), torch.arange(10)
    weight = model.embedding.weight.clone()
    first = randomised(adapt_tensor(model.embedding, "weight", 2))
    second = randomised(adapt_tensor(model.head, "weight", 2, alpha=0.5, seed=1))
    expected = (weight + first.update()) @ (weight + second.update()).T
    torch.testing.assert_close(model(tokens), expected)
    path = save_tensors(model, tmp_path / "tied.safetensors")
    loaded = Tied()
    loaded.head.weight.data = weight.detach()
    assert set(load_tensors(loaded, path)) == {"embedding.weight", "head.weight"}
    torch.testing.assert_close(loaded(tokens), expected)
    for merged in (model, loaded):
        with pytest.raises(TensLoRAError, match=r"its weight is shared by embedding\S* and head\S*, and a merge"):
            merge_tensors(merged)
    torch.testing.assert_close(model(tokens), expected)


def test_a_file_without_an_update_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "none.safetensors", {}, {"format": FORMAT, "updates": {}})
    with pytest.raises(TensLoRAError, match=r"none\.safetensors: does not fit Linear: it holds no update$"):
        load_tensors(nn.Linear(5, 6), tmp_path / "none.safetensors")


def test_detaching_without_merging_gives_the_old_weight_back() -> None:
    holder = Holder(5, 4, 7)
    before = holder.weight.detach().clone()
    randomised(adapt_tensor(holder, "weight", 2))
    assert not torch.equal(holder.weight, before)
    detach_tensors(holder)
    assert torch.equal(holder.weight, before)


def test_a_copy_of_a_model_has_updates_of_its_own() -> None:
    model, _ = adapted_block()
    other = copy.deepcopy(model)
    merge_tensors(other)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(other(x), model(x))
    detach_tensors(other)
    assert any("parametrizations" in name for name in model.state_dict())


@pytest.mark.usefixtures("one_process")
def test_weights_that_are_divided_among_processes_are_neither_adapted_nor_merged_nor_detached(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    randomised(adapt_tensor(model[1], "weight", 2))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    fully_shard(model, mesh=mesh)
    for act in (merge_tensors, unmerge_tensors, detach_tensors):
        with pytest.raises(TensLoRAError, match=r"^1\.weight: is divided among processes \(DTensor\), as by"):
            act(model)
    with pytest.raises(TensLoRAError, match=r"^weight: is divided among processes \(DTensor\).*; adapt it before"):
        adapt_tensor(model[0], "weight", 2)
    torch.testing.assert_close(model(x), expected)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    load_tensors(plain, save_tensors(model, tmp_path / "updates.safetensors"))  # which the message says
    parts = nn.Sequential(plain[1])
    fully_shard(parts[0], mesh=mesh).unshard()
    with pytest.raises(TensLoRAError, match=r"^0\.weight: its module has become a FSDPParametrizedLinear since; undo"):
        detach_tensors(parts)


@pytest.mark.parametrize("of_copy", [True, False])
def test_a_copy_keeps_its_updates_when_the_others_come_and_go(of_copy: bool) -> None:
    original = nn.GRUCell(3, 4)
    randomised(adapt_tensor(original, "weight_ih", 2))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = original(x)
    copied = copy.deepcopy(original)
    changed, kept = (copied, original) if of_copy else (original, copied)
    adapt_tensor(changed, "weight_hh", 2)
    assert isinstance(kept.weight_hh, nn.Parameter) and torch.equal(kept(x), expected)
    twin = copy.deepcopy(changed)
    merge_tensors(changed)
    detach_tensors(changed)
    assert type(changed) is nn.GRUCell
    torch.testing.assert_close(changed(x), expected)
    assert torch.equal(kept(x), expected) and torch.equal(twin(x), expected)
    assert list(detach_tensors(kept)) == ["weight_ih"]


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_saved_updates_are_loaded_as_they_were(factorization: str, tmp_path: Path) -> None:
    model, updates = adapted_block(factorization=factorization, scaling="first_step", alpha=0.3)
    path = save_tensors(model, tmp_path / "updates.safetensors")
    torch.manual_seed(0)
    other = Block()
    loaded = load_tensors(other, path)
    assert {name: update.config for name, update in loaded.items()} == {n: u.config for n, u in updates.items()}
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(other(x), model(x))
    assert save_tensors(other, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_updates_on_half_precision_weights_are_computed_in_full_precision() -> None:
    linear = nn.Linear(5, 6, dtype=torch.bfloat16)
    update = randomised(adapt_tensor(linear, "weight", 2))
    assert next(update.parameters()).dtype == torch.float32
    with torch.no_grad():
        original = cast(Tensor, linear.get_parameter("parametrizations.weight.original"))
        expected = original + full(update).to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear.weight, expected)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, _ = adapted_block()
    path = save_tensors(model, tmp_path / "updates.safetensors")
    with pytest.raises(TensLoRAError, match=r"block.conv1.weight: there is no such weight"):
        load_tensors(nn.Sequential(nn.Linear(3, 3)), path)
    wider = Block()
    wider.head = nn.Linear(5, 3)
    with pytest.raises(TensLoRAError, match=r"head.weight.d_in has the shape \(4, 2\), not \(5, 2\)"):
        load_tensors(wider, path)
    assert all(type(module) is not TensorUpdate for module in wider.modules())
    header, tensors = read_safetensors(path)
    header["updates"]["head.weight"]["ranks"] = [2, 2, 2]
    with pytest.raises(TensLoRAError, match=r"needs 2 integers \(d_out 1..3, d_in 1..4\)"):
        load_tensors(Block(), write_safetensors(tmp_path / "ranks.safetensors", tensors, header))
    with pytest.raises(TensLoRAError, match="holds no updates"):
        load_tensors(Block(), write_safetensors(tmp_path / "other.safetensors", tensors, {"format": "tenslora-1"}))
    with pytest.raises(TensLoRAError, match="weight: has a parametrization in ParametrizedConv2d already"):
        load_tensors(model, path)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "bias",
            {"ranks": 1},
            r"^name=bias: must be a parameter of Linear with two dimensions or more, such as weight$",
        ),
        (
            "weight",
            {"ranks": 0},
            r"^ranks=\[0, 0\]: the rank 0 of d_out must be from 1 to 6 \(d_out 1..6, d_in 1..5\)$",
        ),
        ("weight", {"ranks": [1]}, r"^ranks=\[1\]: factorization tucker needs 2 integers \(d_out 1..6, d_in 1..5\)$"),
        ("weight", {"ranks": 2, "factorization": "tt"}, r"^factorization=tt: must be one of "),
        ("weight", {"ranks": 2, "scaling": "none"}, r"^scaling=none: must be one of "),
        ("weight", {"ranks": 2, "alpha": "2"}, r"^alpha='?2'?: must be a"),
        ("weight", {"ranks": 2, "alpha": math.nan}, r"^alpha=nan: must be a finite number"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, settings: dict[str, Any], message: str) -> None:
    linear = nn.Linear(5, 6)
    with pytest.raises(TensLoRAError, match=message):
        adapt_tensor(linear, name, **settings)
    assert linear.weight.requires_grad
    assert type(linear) is nn.Linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(5, 6).to(torch.float8_e5m2), r"^weight: is quantised in Linear"),
        (lambda: nn.Linear(5, 6, dtype=torch.complex64), r"^weight: has the type complex64 in Linear, and an update"),
        (lambda: nn.Embedding(5, 6, sparse=True), r"^weight: has sparse gradients in Embedding \(sparse=True\)"),
        (lambda: nn.EmbeddingBag(5, 6, sparse=True), r"^weight: has sparse gradients in EmbeddingBag"),
        (lambda: nn.Embedding(5, 6, max_norm=1.0), r"^weight: is rescaled in place whenever Embedding reads it"),
        (torch.inference_mode()(lambda: nn.Linear(5, 6)), r"^weight: its weight was made in torch\.inference_mode"),
        (lambda: torch.jit.trace(nn.Linear(5, 6), torch.zeros(1, 5)), r"^weight: is compiled by torch\.jit in "),  # type: ignore[no-untyped-call]
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_weight_that_cannot_take_an_update_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    module = make()
    with pytest.raises(TensLoRAError, match=message):
        adapt_tensor(module, "weight", 2)
    assert cast(Tensor, module.weight).requires_grad


def test_a_weight_of_a_part_of_the_module_is_told_with_the_call_that_takes_it() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(
        TensLoRAError, match=r"^name=0\.weight: .* give adapt_tensor model\.get_submodule\('0'\) and 'w"
    ):
        adapt_tensor(model, "0.weight", 2)


def test_updates_on_the_device_meta_are_merged() -> None:
    linear = nn.Linear(5, 6, device="meta")
    adapt_tensor(linear, "weight", 2)
    merge_tensors(linear)
    assert linear.weight.is_meta


def test_models_without_updates_and_weights_with_two_are_refused() -> None:
    linear = nn.Linear(5, 6)
    for verb in (merge_tensors, unmerge_tensors, detach_tensors):
        with pytest.raises(TensLoRAError, match=r"^Linear: no weight has an update$"):
            verb(linear)
    adapt_tensor(linear, "weight", 2)
    with pytest.raises(TensLoRAError, match=r"weight: has a parametrization in ParametrizedLinear already"):
        adapt_tensor(linear, "weight", 2)
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(TensLoRAError, match="has another parametrization beside the update"):
        detach_tensors(linear)


def test_one_number_stops_at_each_ranks_limit() -> None:
    assert weight_ranks((6, 4, 3, 2), 5) == (5, 4, 3, 2)
    assert weight_ranks((6, 4, 3, 2), 99, "tensor_train") == (4, 12, 6)  # d_in; d_in, mode_3; d_out
    assert weight_ranks((6, 4, 3, 2), 99, "cp") == (24,)
    with pytest.raises(TensLoRAError, match="must have at least two dimensions"):
        weight_ranks((6,), 1)


def test_the_settings_are_plain_data() -> None:
    update = adapt_tensor(nn.Linear(5, 6), "weight", [2, 3], alpha=2.0)
    assert dataclasses.asdict(update.config) == {
        "ranks": (2, 3),
        "factorization": "tucker",
        "alpha": 2.0,
        "scaling": "direct",
        "seed": 0,
    }


def test_a_depthwise_convolution_whose_second_dimension_is_one_takes_an_update() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4)
    before = layer.weight.detach().clone()
    update = randomised(adapt_tensor(layer, "weight", 2))
    assert layer.weight.shape == (4, 1, 3, 3)
    torch.testing.assert_close(layer.weight, before + update.update())


def test_a_weight_with_two_names_in_the_model_takes_no_two_updates(tmp_path: Path) -> None:
    def pair(tied: bool) -> nn.Module:
        one = nn.Linear(4, 4)
        return nn.ModuleDict({"a": one, "b": one if tied else nn.Linear(4, 4)})

    model = pair(tied=False)
    for part in model.children():
        adapt_tensor(part, "weight", 2)
    save_tensors(model, tmp_path / "updates.safetensors")
    other = pair(tied=True)
    with pytest.raises(TensLoRAError, match=r"b\.weight: is the weight of a\.weight too"):
        load_tensors(other, tmp_path / "updates.safetensors")
    assert not parametrize.is_parametrized(other["a"])  # type: ignore[index]


def test_settings_in_numpys_numbers_are_saved(tmp_path: Path) -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    adapt_tensor(one, "weight", np.int64(2), alpha=np.float32(2), seed=np.int64(1))  # type: ignore[arg-type]
    save_tensors(one, tmp_path / "update.safetensors")
    (update,) = load_tensors(other, tmp_path / "update.safetensors").values()
    assert (update.config.ranks, update.config.alpha, update.config.seed) == ((2, 2), 2.0, 1)


def test_a_first_step_without_a_formula_is_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"scaling=first_step: has no formula for factorization=tensor_guide"):
        adapt_tensor(nn.Linear(4, 4), "weight", 2, factorization="tensor_guide", scaling="first_step")


def test_an_expanded_weight_takes_no_update() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    with pytest.raises(TensLoRAError, match=r"weight: some of its weight's entries share memory"):
        adapt_tensor(linear, "weight", 2)


def _two_updates(seed: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    generator = torch.Generator().manual_seed(seed)
    for layer in (model[0], model[2]):
        with torch.no_grad():
            for parameter in adapt_tensor(layer, "weight", 2).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_state_dict_of_merged_weights_is_not_taken_for_another(is_merged: bool) -> None:
    model, other, x = _two_updates(1), _two_updates(2), torch.randn(3, 5)
    merge_tensors(model if is_merged else other)
    before, state = copy.deepcopy(other.state_dict()), model.state_dict()
    this, undo = ("merged", "unmerge_tensors") if not is_merged else ("not merged", "merge_tensors")
    with pytest.raises(TensLoRAError, match=rf"^0\.weight: is {this}, and the state dict .* call {undo} before"):
        other.load_state_dict(state)
    weight = "0.parametrizations.weight.original"
    assert torch.equal(other.state_dict()[weight], before[weight])
    (merge_tensors if is_merged else unmerge_tensors)(other)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-6)
    unmerge_tensors(other)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)


def test_updates_are_not_loaded_where_their_numbers_would_be_lost(tmp_path: Path) -> None:
    path = save_tensors(_two_updates(1), tmp_path / "tensors.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(
        TensLoRAError, match=r"0\.weight: is on the device meta, where the update's numbers would be lost"
    ):
        load_tensors(model, path)
    adapt_tensor(model[0], "weight", 2)
    layer: Any = model[0]
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(6, 5))
    with pytest.raises(TensLoRAError, match="update of a weight is on the device meta and has no numbers"):
        layer.weight  # noqa: B018


@pytest.mark.parametrize("wrapped", ["model", "part", "checkpointed", "parallel"])
def test_the_names_of_saved_updates_are_those_without_a_wrapper(wrapped: str, tmp_path: Path) -> None:
    model, x = _two_updates(1), torch.randn(3, 5)
    expected, whole = model(x), model
    if wrapped == "part":
        model[2] = torch.compile(model[2], backend="eager")
    elif wrapped == "checkpointed":
        model[2] = checkpoint_wrapper(model[2])
    else:
        whole = nn.DataParallel(model) if wrapped == "parallel" else torch.compile(model)
    path = save_tensors(whole, tmp_path / "tensors.safetensors")
    assert set(read_safetensors(path)[0]["updates"]) == {"0.weight", "2.weight"}
    detach_tensors(whole)
    load_tensors(whole, path)
    plain: Any = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    load_tensors(plain, path)
    for layer, own in ((0, model[0]), (2, getattr(model[2], "_orig_mod", model[2]))):
        plain[layer].parametrizations.weight.original.data.copy_(own.parametrizations.weight.original)
        plain[layer].bias.data.copy_(own.bias)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [merge_tensors, unmerge_tensors])
def test_ctrl_c_leaves_every_weight_as_it_was(
    function: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    for part in model:
        adapt_tensor(part, "weight", ranks=2).tensor.get_parameter("core").data.normal_()
    if function is unmerge_tensors:
        merge_tensors(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    computed = TensorUpdate.update
    left = 4 if function is merge_tensors else 2  # merge computes each update twice

    def interrupted(update: TensorUpdate) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return computed(update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TensorUpdate, "update", interrupted)
        function(model)
    assert left == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    function(model)
    assert all(part.parametrizations.weight[0].merged is (function is merge_tensors) for part in model)


def test_ctrl_c_while_updates_are_put_on_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))

    saved, model = made(), made()
    for part in saved:
        adapt_tensor(part, "weight", ranks=2)
    file = save_tensors(saved, tmp_path / "updates.safetensors")
    model[0].weight.requires_grad_(False)
    register = tensor_update._register

    def interrupted(module: nn.Module, name: str, update: TensorUpdate) -> TensorUpdate:
        if module is model[1]:
            raise KeyboardInterrupt
        return register(module, name, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_update, "_register", interrupted)
        load_tensors(model, file)
    assert [type(part) for part in model] == [nn.Conv2d] * 2
    assert [part.weight.requires_grad for part in model] == [False, True]
    assert set(load_tensors(model, file)) == {"0.weight", "1.weight"}


class _Manifold(nn.Parameter):
    """A parameter of another library's class."""


def test_a_weight_of_another_class_is_called_by_its_name() -> None:
    conv = nn.Conv2d(3, 8, 3)
    conv.weight = _Manifold(conv.weight.detach())
    with pytest.raises(TensLoRAError, match=r"^weight: is a _Manifold in Conv2d, and an update cannot be added to it$"):
        adapt_tensor(conv, "weight", ranks=2)


class _Closed(nn.Linear):
    """A layer that takes no further parts."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            raise TypeError("a leaf has no children")
        super().__setattr__(name, value)


class _Last(nn.Linear):
    """A class of which no other derives."""

    def __init_subclass__(cls) -> None:
        raise TypeError("no class derives from this one")


@pytest.mark.parametrize("kind", [_Closed, _Last])
def test_a_layer_that_takes_no_parametrization_is_as_it_was(kind: type[nn.Linear]) -> None:
    layer = kind(4, 3)
    weight = layer.weight
    with pytest.raises(TensLoRAError, match=rf"^weight: {kind.__name__} takes no parametrization \(.+\)$"):
        adapt_tensor(layer, "weight", ranks=2)
    assert type(layer) is kind
    assert layer.weight is weight
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not layer._modules
    assert layer(torch.ones(1, 4)).shape == (1, 3)


def test_a_second_update_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = nn.LSTMCell(4, 4)
    adapt_tensor(cell, "weight_ih", ranks=2)
    before, weight = dict(cell.named_parameters()), cell.weight_hh
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parametrize.ParametrizationList, "__init__", _interrupted)
        adapt_tensor(cell, "weight_hh", ranks=2)
    assert dict(cell.named_parameters()) == before
    assert cell.weight_hh is weight
    assert cell(torch.ones(1, 4))[0].shape == (1, 4)
    adapt_tensor(cell, "weight_hh", ranks=2)


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_old_gradient_does_not_move_a_weight_that_has_an_update() -> None:
    layer = nn.Linear(4, 3)
    layer(torch.ones(1, 4)).sum().backward()
    adapt_tensor(layer, "weight", ranks=2)
    assert cast(Any, layer).parametrizations["weight"].original.grad is None
