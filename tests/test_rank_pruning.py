"""Pruned ranks, against NumPy's SVD, autograd and a search over all ranks."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.optim.subclass_8bit import OptimState8bit

from tenslora import rank_pruning
from tenslora.adapter import Adapter, StagedAdapter, load_adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.attachment import merge, unmerge
from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.rank_pruning import best_ranks, prune
from tenslora.ranks import RankStrategy, parameter_count, rank_limits
from tenslora.tensor import FactorizedTensor
from tests.models import attached
from tests.plain_transformer import PlainTransformer

GEOMETRY = Geometry(d_in=10, heads=3, d_head=4, layers=5)
CASES = [
    (construction, factorization)
    for construction in ("lora", "att", "qkv", "depth", "qkv_depth", "att_qkv_depth", "site")
    for factorization in (("tucker", "tensor_train") if construction != "lora" else ("tucker",))
]


def build(construction: str, factorization: str, rank: int = 3) -> Adapter:
    """An adapter in float64, all of whose numbers are random; no rank is above its mode's size."""
    strategy = RankStrategy("isorank", rank=rank, cap=True)
    adapter = Adapter(AdapterConfig(construction, strategy, factorization=factorization), GEOMETRY).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter


def backpropagate(adapter: Adapter) -> None:
    parameters = list(adapter.parameters())
    torch.autograd.backward([parameter.square().sum() for parameter in parameters])


def updates(adapter: Adapter) -> Tensor:
    return torch.stack([torch.cat([d.flatten() for d in adapter.dense(layer)]) for layer in range(5)])


def unfolding_projector(x: np.ndarray[Any, Any], rows: int, rank: int) -> np.ndarray[Any, Any]:
    """The projector on the leading left singular vectors of x as a matrix of so many rows."""
    u = np.linalg.svd(x.reshape(rows, -1), full_matrices=False)[0][:, :rank]
    return u @ u.T


def cut_by_numpy(x: np.ndarray[Any, Any], factorization: str, ranks: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Truncated HOSVD of a tensor; or, of a train, its projection at each bond, the last bond first."""
    y = x
    if factorization == "tucker":
        for axis, rank in enumerate(ranks):
            moved = np.moveaxis(x, axis, 0)
            projector = unfolding_projector(moved, x.shape[axis], rank)
            y = np.moveaxis(np.tensordot(projector, np.moveaxis(y, axis, 0), 1), 0, axis)
        return y
    for bond in reversed(range(len(ranks))):
        rows = int(np.prod(x.shape[: bond + 1]))
        y = (unfolding_projector(x, rows, ranks[bond]) @ y.reshape(rows, -1)).reshape(x.shape)
    return y


@pytest.mark.parametrize(("construction", "factorization"), CASES)
def test_tensors_are_cut_to_their_leading_singular_vectors(construction: str, factorization: str) -> None:
    adapter = build(construction, factorization)
    train = factorization == "tensor_train" or construction == "lora"

    def tensors() -> list[np.ndarray[Any, Any]]:
        # In the order of the train, whose bonds are between neighbours.
        found = []
        for module in adapter.tensors:
            tensor = cast(FactorizedTensor, module)
            names = list(tensor.modes)
            order = list(dict(tensor.named_parameters())) if train else names
            found.append(tensor.full().detach().permute([names.index(name) for name in order]).numpy())
        return found

    before, full = tensors(), parameter_count(construction, GEOMETRY, adapter.ranks, factorization)
    ranks = prune(adapter, int(0.6 * full))
    assert adapter.ranks == ranks and any(rank < 3 for rank in ranks)
    assert sum(p.numel() for p in adapter.parameters()) == parameter_count(construction, GEOMETRY, ranks, factorization)
    for old, new in zip(before, tensors(), strict=True):
        expected = cut_by_numpy(old, "tensor_train" if train else "tucker", ranks)
        np.testing.assert_allclose(new, expected, atol=1e-9 * np.abs(old).max())


@pytest.mark.parametrize(("construction", "factorization"), CASES)
def test_without_a_cut_the_updates_stay_and_first_moments_are_the_gradients_in_the_new_basis(
    construction: str, factorization: str
) -> None:
    adapter = build(construction, factorization, rank=2)
    limits = rank_limits(construction, GEOMETRY, factorization).values()
    assert all(rank <= limit for rank, limit in zip(adapter.ranks, limits, strict=True))
    direction = torch.randn(updates(adapter).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.0, weight_decay=0.0)
    torch.autograd.backward((updates(adapter) * direction).sum())
    optimizer.step()  # the first moments are (1 - beta1) times the gradients
    optimizer.zero_grad()
    before, objects = updates(adapter).detach(), list(map(id, adapter.parameters()))
    means = [optimizer.state[p]["exp_avg_sq"].mean().item() for p in adapter.parameters()]
    ranks = adapter.ranks
    assert prune(adapter, sum(p.numel() for p in adapter.parameters()), optimizer) == ranks
    torch.testing.assert_close(updates(adapter), before, rtol=1e-9, atol=1e-9)
    assert list(map(id, adapter.parameters())) == objects
    gradients = torch.autograd.grad((updates(adapter) * direction).sum(), list(adapter.parameters()))
    for parameter, gradient, mean in zip(adapter.parameters(), gradients, means, strict=True):
        state = optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-7, atol=1e-9)
        assert state["exp_avg_sq"].unique().item() == pytest.approx(mean)
        assert state["step"] == 1


@pytest.mark.parametrize(("construction", "factorization"), CASES)
def test_gradients_that_await_their_step_follow_the_change_of_basis(construction: str, factorization: str) -> None:
    adapter = build(construction, factorization, rank=2)
    direction = torch.randn(updates(adapter).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.autograd.backward((updates(adapter) * direction).sum())
    prune(adapter, sum(p.numel() for p in adapter.parameters()))
    wanted = torch.autograd.grad((updates(adapter) * direction).sum(), list(adapter.parameters()))
    for parameter, gradient in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9)
    prune(adapter, int(0.7 * sum(p.numel() for p in adapter.parameters())))
    torch.optim.AdamW(adapter.parameters()).step()
    torch.autograd.backward(updates(adapter).sum())
    adapter.resize([1] * len(adapter.ranks))
    assert all(parameter.grad is None for parameter in adapter.parameters())


@pytest.mark.parametrize(("construction", "factorization"), [("qkv", "tucker"), ("qkv_depth", "tensor_train")])
def test_the_ranks_are_the_best_of_all(construction: str, factorization: str) -> None:
    adapter = build(construction, factorization)
    energies = [
        [
            torch.linalg.svdvals(torch.randn(rank, 9, generator=torch.Generator().manual_seed(7 * i + j))).square()
            for j, rank in enumerate(adapter.ranks)
        ]
        for i in range(len(adapter.tensors))
    ]
    budget = int(0.7 * parameter_count(construction, GEOMETRY, adapter.ranks, factorization))
    losses = {
        ranks: sum(float(e[rank:].sum()) for each in energies for e, rank in zip(each, ranks, strict=True))
        for ranks in itertools.product(*[range(1, rank + 1) for rank in adapter.ranks])
        if parameter_count(construction, GEOMETRY, ranks, factorization) <= budget
    }
    assert losses[best_ranks(adapter, energies, budget)] == pytest.approx(min(losses.values()))


def test_all_tensors_get_the_ranks_that_suit_them_together() -> None:
    adapter = build("depth", "tucker")
    prune(adapter, int(0.5 * sum(p.numel() for p in adapter.parameters())))
    shapes = {tuple(tuple(p.shape) for p in tensor.parameters()) for tensor in adapter.tensors}
    assert len(shapes) == 1


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"^factorization=cp: must be tucker or tensor_train to be pruned$"):
        prune(build("depth", "cp"), 100)
    with pytest.raises(TensLoRAError, match=r"^budget=3: must be at least \d+, the parameters at rank 1$"):
        prune(build("depth", "tucker"), 3)


def test_an_adapter_that_holds_a_nan_is_not_pruned() -> None:
    adapter = Adapter(AdapterConfig("qkv_depth"), GEOMETRY)
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("nan"))
    before = adapter.ranks
    with pytest.raises(TensLoRAError, match=r"^tensors\.0\.core holds a NaN or an infinity$"):
        prune(adapter, 100)
    assert adapter.ranks == before


def test_a_pruned_adapter_keeps_its_scale_when_it_is_saved(tmp_path: Path) -> None:
    adapter = Adapter(AdapterConfig("qkv", RankStrategy("isorank"), scaling="first_step"), GEOMETRY)
    scale = adapter.scale
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    prune(adapter, 300)
    (loaded,) = load_adapter(adapter.save(tmp_path / "adapter.safetensors")).stages
    assert (loaded.scale, loaded.ranks) == (scale, adapter.ranks)
    assert all(map(torch.equal, loaded.dense(1), adapter.dense(1)))


def test_an_adapter_that_is_cut_while_it_is_merged_leaves_nothing_in_the_weights() -> None:
    model = PlainTransformer().double()
    adapter = attached(model, "qkv_depth")
    path = "blocks.1.attention.value.weight"
    before = model.get_parameter(path).clone()
    merge(model)
    assert not torch.allclose(model.get_parameter(path), before, atol=1e-3)
    prune(adapter, 500)
    unmerge(model)
    torch.testing.assert_close(model.get_parameter(path), before, rtol=0, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model.get_parameter(path), before + adapter.scale * adapter.dense(1)[2].T)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, momentum=0.9),
        partial(torch.optim.AdamW, amsgrad=True),
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        lambda parameters, lr: timm.optim.Lookahead(torch.optim.AdamW(parameters, lr=lr)),
    ],
)
def test_moments_that_cannot_be_taken_along_are_refused(optimizer: Any) -> None:
    adapter = build("qkv_depth", "tucker")
    training = optimizer(adapter.parameters(), lr=0.01)
    backpropagate(adapter)
    training.step()
    ranks, before = adapter.ranks, [p.detach().clone() for p in adapter.parameters()]
    with pytest.raises(
        TensLoRAError, match=r"^optimizer=\w+: .*(must keep exp_avg and exp_avg_sq alone|steps another)"
    ):
        prune(adapter, 60, training)
    assert adapter.ranks == ranks
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_kept_does_not_stop_the_training(dtype: torch.dtype) -> None:
    trained, kept = [], []
    for is_kept in (False, True):
        torch.manual_seed(0)
        model = PlainTransformer().to(dtype)
        adapter, x = attached(model, "qkv_depth").to(dtype), torch.ones(2, 5, 24, dtype=dtype)
        hooked: list[Tensor] = []
        next(adapter.parameters()).register_hook(hooked.append)  # type: ignore[no-untyped-call]
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for step in range(3):
            loss = model(x).square().mean()
            loss.backward()
            if is_kept:
                kept.append(loss)
            del loss
            optimizer.step()
            optimizer.zero_grad()
            if step < 2:
                prune(adapter, (900, 600)[step], optimizer)
        assert len(hooked) == 3
        trained.append(torch.cat([parameter.detach().flatten() for parameter in adapter.parameters()]))
    assert torch.equal(*trained)


@pytest.mark.usefixtures("one_process")
def test_the_ranks_do_not_change_while_several_processes_average_gradients() -> None:
    model = PlainTransformer()
    adapter = attached(model, "qkv_depth")
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = adapter.ranks
    with pytest.raises(TensLoRAError, match=r"^the adapter's ranks cannot change while it is in Distributed"):
        prune(adapter, 600)
    assert adapter.ranks == before
    del wrapped
    assert prune(adapter, 600) != before
    ranks = adapter.ranks
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TensLoRAError, match=r"^tensors\.0\.core: is divided among processes.*; prune before"):
        prune(adapter, 300)
    assert adapter.ranks == ranks


def test_moments_of_8_bits_are_refused() -> None:
    adapter = build("qkv_depth", "tucker")
    training, ranks = torch.optim.AdamW(adapter.parameters()), adapter.ranks
    for parameter in adapter.parameters():  # as torchao's AdamW8bit keeps those of large parameters
        zeros = OptimState8bit.zeros(parameter.shape, block_size=parameter.numel())
        training.state[parameter] = {"exp_avg": zeros, "exp_avg_sq": torch.zeros_like(parameter)}
    with pytest.raises(TensLoRAError, match=r"exp_avg_sq as OptimState8bit; must keep .* in plain tensors"):
        prune(adapter, 60, training)
    assert adapter.ranks == ranks


def test_an_optimizer_that_keeps_all_parameters_together_is_refused() -> None:
    adapter, head = build("qkv_depth", "tucker"), torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TensLoRAError, match=r"^optimizer=LBFGS: keeps what it knows of all parameters together"):
        prune(adapter, 60, torch.optim.LBFGS([head, *adapter.parameters()]))


@pytest.mark.parametrize(
    ("kept", "line"),
    [
        ({"exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2)}, "keeps moments of other shapes than"),
        ({"projector": object()}, "keeps exp_avg, exp_avg_sq, projector as "),
        ({"Q": [torch.eye(2)]}, "keeps Q, exp_avg, exp_avg_sq as "),
    ],
)
def test_moments_in_a_space_of_their_own_are_refused(kept: dict[str, Any], line: str) -> None:
    adapter = build("qkv_depth", "tucker")  # as GaLore, Conda and SOAP keep them
    training, ranks = torch.optim.AdamW(adapter.parameters()), adapter.ranks
    for parameter in adapter.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        training.state[parameter] = moments | kept
    with pytest.raises(TensLoRAError, match=rf"^optimizer=AdamW: {line}"):
        prune(adapter, 60, training)
    assert adapter.ranks == ranks


def test_an_optimizer_without_moments_has_none_to_take_along() -> None:
    adapter = build("qkv_depth", "tucker")
    training = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(2):
        backpropagate(adapter)
        training.step()
        training.zero_grad()
        prune(adapter, 60, training)


def test_only_the_adapter_of_one_stage_is_pruned() -> None:
    with pytest.raises(TensLoRAError, match=r"^adapter: must be of type Adapter, and is of type StagedAdapter$"):
        prune(cast(Adapter, StagedAdapter([build("qkv", "tucker")])), 60)
    with pytest.raises(TensLoRAError, match=r"^budget: must be of type int, and is of type str$"):
        prune(build("qkv", "tucker"), cast(int, "60"))


def test_ctrl_c_leaves_the_ranks_and_the_moments_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = build("qkv_depth", "tucker")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    backpropagate(adapter)
    optimizer.step()

    def state() -> list[Tensor]:
        of_each = [(p, p.grad, *optimizer.state[p].values()) for p in adapter.parameters()]
        return [cast(Tensor, value).detach().clone() for values in of_each for value in values]

    ranks, before = adapter.ranks, state()
    in_basis = rank_pruning._in_basis
    for last in range(1, 12):  # a parameter, its gradient or a first moment
        left = last

        def interrupted(*arguments: Any, **options: Any) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return in_basis(*arguments, **options)

        monkeypatch.setattr(rank_pruning, "_in_basis", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(adapter, 60, optimizer)
        assert adapter.ranks == ranks
        assert all(map(torch.equal, state(), before))
    monkeypatch.setattr(rank_pruning, "_in_basis", in_basis)
    assert prune(adapter, 60, optimizer) != ranks


def test_ranks_that_no_training_has_told_apart_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"updates are all zero, .* smallest are kept: \[\d+, 1, 1, 1\]; prune after"):
        prune(Adapter(AdapterConfig("qkv_depth"), GEOMETRY), 200)
