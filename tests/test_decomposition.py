"""Decompositions, against SVDs of unfoldings and against TensorLy's tensor train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import tensor_train
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

from tenslora.adapter import Adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import CONSTRUCTIONS, Geometry, modes
from tenslora.decomposition import approximate, spectra, stack
from tenslora.errors import TensLoRAError
from tenslora.ranks import RankStrategy, rank_limits

# All matrices, the feed-forward ones in two and a half slices, keys and values with fewer heads.
GEOMETRY = Geometry(d_in=10, heads=4, d_head=3, layers=3, adapt="all", kv_heads=2, d_ff=30)
TENSORS = [name for name in CONSTRUCTIONS if name != "lora"]


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    tl.set_backend("pytorch")


def updates(geometry: Geometry = GEOMETRY, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(geometry.d_in, width, generator=generator, dtype=torch.float64)

    return [[draw(width) for width in geometry.widths] for _ in range(geometry.layers)]


def build(mode: str, ranks: list[int], factorization: str, geometry: Geometry = GEOMETRY, **settings: Any) -> Adapter:
    strategy = RankStrategy("explicit", ranks=tuple(ranks))
    config = AdapterConfig(mode, strategy, factorization=factorization, adapt=geometry.adapt, **settings)
    return Adapter(config, geometry).double()


@pytest.mark.parametrize("head_layout", ["aligned", "interleaved"])
@pytest.mark.parametrize("factorization", ["tucker", "tensor_train"])
@pytest.mark.parametrize("mode", CONSTRUCTIONS)
def test_at_full_rank_nothing_is_lost(mode: str, factorization: str, head_layout: str) -> None:
    adapter = build(
        mode, list(rank_limits(mode, GEOMETRY, factorization).values()), factorization, head_layout=head_layout
    )
    given = updates()
    approximation = approximate(adapter, [given])
    assert approximation.error < 1e-7
    for layer, each in enumerate(given):
        for update, dense in zip(each, adapter.dense(layer), strict=True):
            torch.testing.assert_close(4.0 * dense, update, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", TENSORS)
def test_tucker_is_the_truncated_hosvd(mode: str) -> None:
    geometry = Geometry(d_in=10, heads=3, d_head=4, layers=5)
    ranks = [max(1, n - 1) for n in modes(mode, geometry).values()]
    adapter, given = build(mode, ranks, "tucker", geometry), updates(geometry)
    approximation = approximate(adapter, [given])
    squared_error = total = 0.0
    energy = dict.fromkeys(modes(mode, geometry), 0.0)
    for tensor in stack(given, mode, geometry):
        factors = []
        for axis, (name, rank) in enumerate(zip(energy, ranks, strict=True)):
            u, s, _ = torch.linalg.svd(tl.unfold(tensor, axis), full_matrices=False)
            factors.append(u[:, :rank] @ u[:, :rank].T)
            energy[name] += s[:rank].square().sum().item()
        squared_error += (tensor - multi_mode_dot(tensor, factors)).square().sum().item()
        total += tensor.square().sum().item()
    assert approximation.error == pytest.approx(math.sqrt(squared_error / total), rel=1e-9)
    assert approximation.energy == pytest.approx({name: value / total for name, value in energy.items()}, rel=1e-9)


@pytest.mark.parametrize("mode", ["depth", "qkv_depth", "att_qkv_depth", "site"])
def test_the_tensor_train_has_the_error_of_tensorlys(mode: str) -> None:
    geometry = Geometry(d_in=10, heads=3, d_head=4, layers=5)
    limits = rank_limits(mode, geometry, "tensor_train").values()
    ranks = [max(1, limit // 2) for limit in limits]
    adapter, given = build(mode, ranks, "tensor_train", geometry), updates(geometry)
    approximation = approximate(adapter, [given])
    names = list(modes(mode, geometry))
    order = [n for n in ("d_in", "projection", "depth", "site", "head", "d_head", "d_out") if n in names]
    squared_error = total = 0.0
    for tensor in stack(given, mode, geometry):
        chain = tensor.permute([names.index(name) for name in order])
        squared_error += (chain - tl.tt_to_tensor(tensor_train(chain, [1, *ranks, 1]))).square().sum().item()
        total += chain.square().sum().item()
    assert approximation.error == pytest.approx(math.sqrt(squared_error / total), rel=1e-6)


def test_a_lora_is_the_nearest_of_its_rank() -> None:
    geometry = Geometry(d_in=10, heads=3, d_head=4, layers=2)
    adapter, given = build("lora", [3], "tucker", geometry), updates(geometry)
    approximation = approximate(adapter, [given])
    squares = [torch.linalg.svdvals(update).square() for layer in given for update in layer]
    remainder = sum(s[3:].sum().item() for s in squares) / sum(s.sum().item() for s in squares)
    assert approximation.error == pytest.approx(math.sqrt(remainder), rel=1e-9)


def test_ranks_above_a_modes_size_give_finite_factors() -> None:
    geometry = Geometry(d_in=10, heads=3, d_head=4, layers=2)
    config = AdapterConfig("qkv_depth", RankStrategy("isorank", rank=10))  # of a projection mode of 3
    adapter = Adapter(config, geometry).double()
    approximate(adapter, [updates(geometry)])
    assert all(parameter.isfinite().all() for parameter in adapter.parameters())


def test_updates_that_are_zero_and_an_alpha_of_zero_are_refused() -> None:
    nothing = [[torch.zeros_like(update) for update in layer] for layer in updates()]
    with pytest.raises(TensLoRAError, match="the updates are all zero"):
        approximate(Adapter(AdapterConfig("qkv_depth", adapt="all"), GEOMETRY), [nothing])
    with pytest.raises(TensLoRAError, match="the updates are all zero"):
        spectra(nothing, GEOMETRY)
    with pytest.raises(TensLoRAError, match=r"^alpha=0"):
        approximate(Adapter(AdapterConfig("qkv_depth", adapt="all", alpha=0.0), GEOMETRY), [updates()])


def test_cp_has_no_direct_method() -> None:
    with pytest.raises(TensLoRAError, match=r"^factorization=cp: must be tucker or tensor_train"):
        approximate(build("depth", [4], "cp"), [updates()])


@pytest.mark.parametrize("mode", TENSORS)
def test_an_adapters_own_updates_are_stacked_into_its_own_tensors(mode: str) -> None:
    # The inverse of taking slices: what TensorLy makes of the factors is what stacking the updates gives.
    geometry = Geometry(d_in=10, heads=3, d_head=4, layers=5)
    adapter = build(mode, [max(1, n - 1) for n in modes(mode, geometry).values()], "tucker", geometry)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    stacked = stack([adapter.dense(layer) for layer in range(5)], mode, geometry)
    for tensor, module in zip(stacked, adapter.tensors, strict=True):
        parameters = dict(module.named_parameters())
        core = parameters.pop("core")
        torch.testing.assert_close(tensor, tl.tucker_to_tensor((core, list(parameters.values()))), rtol=0, atol=1e-10)


def test_spectra_are_the_singular_values_of_the_unfoldings() -> None:
    given = updates()
    shares = spectra(given, GEOMETRY)
    assert list(shares) == ["d_in", "d_out", "projection", "depth", "d_head", "head"]
    everything = torch.cat([update for layer in given for update in layer], dim=1)
    squares = torch.linalg.svdvals(everything).square()
    torch.testing.assert_close(shares["d_in"], squares / squares.sum(), rtol=0, atol=1e-10)
    by_layer = torch.stack([torch.cat(layer, dim=1).flatten() for layer in given])
    squares = torch.linalg.svdvals(by_layer).square()
    torch.testing.assert_close(shares["depth"], squares / squares.sum(), rtol=0, atol=1e-10)
    for share in shares.values():
        assert share.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_refused(entry: float) -> None:
    damaged = updates()
    damaged[0][0][0, 0] = entry
    adapter = Adapter(AdapterConfig("qkv_depth", RankStrategy("isorank", 2), adapt="all"), GEOMETRY)
    for call in (lambda: approximate(adapter, [damaged]), lambda: spectra(damaged, GEOMETRY)):
        with pytest.raises(TensLoRAError, match="the updates hold a NaN or an infinity"):
            call()


def test_updates_that_the_adapters_type_cannot_hold_leave_it_as_it_was() -> None:
    adapter = build("lora", [2], "tucker").half()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    line = r"^the updates, divided by the adapter's scale of 4, are too large for the adapter's type float16$"
    with pytest.raises(TensLoRAError, match=line):
        approximate(adapter, [[[1e6 * update for update in layer] for layer in updates()]])
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda updates: updates, r"^updates: are of 2 stages; must be of 1, each a list$"),
        (lambda updates: [updates[:1]], r"^updates\[0\]: has 1 layers; must have 2$"),
        (lambda updates: [[layer[:2] for layer in updates]], r"^updates\[0\]\[0\]: is .*; must be tensors of shapes"),
        (lambda updates: [[[u[1:] for u in layer] for layer in updates]], r"^updates\[0\]\[0\]: is \[\(23, 24\), "),
        (lambda updates: [[[u.numpy() for u in layer] for layer in updates]], r"^updates\[0\]\[0\]: is \['ndarray', "),
        (lambda _: None, r"^updates: must be of type Sequence, and is None$"),
    ],
)
def test_updates_of_other_shapes_are_refused(changed: Any, message: str) -> None:
    adapter = Adapter(AdapterConfig("qkv_depth"), Geometry(d_in=24, heads=3, d_head=8, layers=2))
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    with pytest.raises(TensLoRAError, match=message):
        approximate(adapter, changed([[torch.ones(24, 24) for _ in range(3)] for _ in range(2)]))
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))
