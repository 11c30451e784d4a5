"""Every factorization, against the full tensor that TensorLy builds, and autograd through it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tensorly as tl
import torch
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tt_tensor import tt_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from tenslora.constructions import CONSTRUCTIONS, HEAD, HEAD_LAYOUTS, Geometry, modes
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS, factorization_of
from tenslora.tensor import FactorizedTensor

GEOMETRY = Geometry(d_in=10, heads=3, d_head=4, layers=5)
TENSORS = [name for name in CONSTRUCTIONS if name != "lora"]
RANKS: dict[str, Callable[[int, int], int]] = {
    "wide_output": lambda i, n: min(n, 2 + i),  # all are different, so that a swapped mode cannot hide
    "narrow_output": lambda i, n: 9 if i == 0 else min(n, 1 + i % 2),
}
CASES = [
    (factorization, name, ranks, head_layout)
    for factorization in FACTORIZATIONS
    for name in TENSORS
    for ranks in (RANKS if factorization == "tucker" else ["wide_output"])
    for head_layout in (HEAD_LAYOUTS if HEAD in CONSTRUCTIONS[name] else ["aligned"])
]


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    tl.set_backend("pytorch")


def build(factorization: str, name: str, ranks: str = "wide_output", head_layout: str = "aligned") -> FactorizedTensor:
    """A tensor of float64 numbers, all of them random."""
    sizes, formulas = modes(name, GEOMETRY), factorization_of(name, factorization)
    chosen = [RANKS[ranks](i, n) for i, n in enumerate(formulas.rank_limits(sizes).values())]
    tensor = FactorizedTensor(formulas, sizes, chosen, GEOMETRY.layers, seed=1, head_layout=head_layout).double()
    with torch.no_grad():
        tensor.get_parameter(tensor.zero_parameter).normal_(generator=torch.Generator().manual_seed(2))
    return tensor


def fresh(factorization: str, name: str, rank: int) -> FactorizedTensor:
    """A tensor as it starts, with the same number for all ranks."""
    sizes, formulas = modes(name, GEOMETRY), factorization_of(name, factorization)
    ranks = [rank] * len(formulas.rank_limits(sizes))
    return FactorizedTensor(formulas, sizes, ranks, GEOMETRY.layers, seed=0)


def guided_updates(tensor: FactorizedTensor, layer: int) -> Tensor:
    """TensorGuide's updates of one layer, from the train that TensorLy builds, contracted with the noise."""
    parameters = {**dict(tensor.named_parameters()), **dict(tensor.named_buffers())}
    noise, offset, rank = (parameters.pop(name) for name in ("noise", "offset", "rank"))
    sides = [parameters.pop(name) for name in ("left", "right")]
    axes = list(parameters)

    def rows(blocks: Tensor) -> Tensor:  # (P or 1, rows, R)
        (z, count, train), (_, _, size, _) = blocks.shape, offset.shape
        cores = [blocks.reshape(1, z * count, train), offset.reshape(train, z * size, train)]
        x = tt_to_tensor([*cores, *(parameters[axis] for axis in axes), rank[..., None]])
        x = x.reshape(z, count, z, size, *x.shape[2:])
        x = torch.einsum("mn,minj...->ij...", noise, x).flatten(0, 1)
        if axes == ["site"]:
            x = x.reshape(len(x), 3, tensor.layers, -1)[:, :, layer]
        elif "depth" in axes:
            x = x.select(1 + axes.index("depth"), layer)
        return x.unsqueeze(0) if x.ndim == 2 else x.movedim(1, 0)

    left, right = map(rows, sides)
    return torch.einsum("pir,por->pio", left, right)


def dense_updates(factorization: str, tensor: FactorizedTensor, layer: int, head_layout: str = "aligned") -> Tensor:
    """The updates of one layer, (P or 1, d_in, d_out), cut out of the full tensor that TensorLy builds."""
    if factorization == "tensor_guide":
        return guided_updates(tensor, layer)
    parameters = dict(tensor.named_parameters())
    if factorization == "tucker":
        core = parameters.pop("core")
        x: Tensor = tucker_to_tensor((core, list(parameters.values())))
    elif factorization == "cp":
        x = cp_to_tensor((None, list(parameters.values())))
    else:
        first, *middle, last = parameters.values()
        x = tt_to_tensor([first.unsqueeze(0), *middle, last.unsqueeze(-1)])
    names = list(parameters)
    # To d_in, heads or d_out, then the structure axes.
    order = [n for n in ("d_in", "d_head", "head", "d_out", "projection", "depth", "site") if n in names]
    x = x.permute([names.index(name) for name in order])
    if "site" in order:
        x = x.reshape(*x.shape[:-1], 3, tensor.layers)
        order[-1:] = ["projection", "depth"]
    if "depth" in order:
        x = x.select(order.index("depth"), layer)
    x = torch.movedim(x, order.index("projection"), 0) if "projection" in order else x[None]
    if "head" in order:  # x is (P, d_in, d_head, heads)
        if head_layout == "aligned":
            x = x.transpose(2, 3)
        x = x.reshape(x.shape[0], x.shape[1], -1)
    return x


@pytest.mark.parametrize(("factorization", "name", "ranks", "head_layout"), CASES)
def test_updates_are_those_of_the_full_tensor(factorization: str, name: str, ranks: str, head_layout: str) -> None:
    tensor = build(factorization, name, ranks, head_layout)
    for layer in range(GEOMETRY.layers):
        left, right = tensor.slices(layer)
        expected = dense_updates(factorization, tensor, layer, head_layout)
        assert expected.abs().max() > 0
        torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("factorization", "name", "ranks", "head_layout"), CASES)
def test_gradients_are_those_through_the_full_tensor(
    factorization: str, name: str, ranks: str, head_layout: str
) -> None:
    tensor = build(factorization, name, ranks, head_layout)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, GEOMETRY.d_in, dtype=torch.float64, generator=generator)
    target = torch.randn(3, 6, GEOMETRY.d_out, dtype=torch.float64, generator=generator)

    def gradients(thin: bool) -> list[Tensor]:
        loss = torch.zeros((), dtype=torch.float64)
        for layer in (0, 3):
            left, right = tensor.slices(layer)
            y = (x @ left) @ right if thin else x @ dense_updates(factorization, tensor, layer, head_layout)
            loss = loss + ((y - target[: len(y)]) ** 2).sum()
        return list(torch.autograd.grad(loss, list(tensor.parameters())))

    for actual, expected in zip(gradients(thin=True), gradients(thin=False), strict=True):
        assert (actual - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("factorization", [name for name in FACTORIZATIONS if name != "tensor_guide"])
def test_aligned_heads_are_consecutive_blocks_of_the_output(factorization: str) -> None:
    tensor = build(factorization, "att")
    head = tensor.get_parameter("head")
    axis = list(head.shape).index(GEOMETRY.heads)
    with torch.no_grad():
        head.select(axis, 1).zero_()
    left, right = tensor.slices(0)
    update = (left @ right)[0]
    assert update[:, 4:8].abs().max() == 0
    assert update[:, :4].abs().min() > 0
    assert update[:, 8:].abs().min() > 0


@pytest.mark.parametrize("name", CONSTRUCTIONS)
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_the_update_starts_at_zero_and_can_leave_it(factorization: str, name: str) -> None:
    tensor = fresh(factorization, name, rank=3)
    left, right = tensor.slices(2)
    assert (left @ right).abs().max() == 0
    torch.autograd.backward((left @ right).sum())
    for parameter_name, parameter in tensor.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().max() > 0) == (parameter_name == tensor.zero_parameter)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_the_other_parameters_start_orthonormal(factorization: str, name: str) -> None:
    tensor = fresh(factorization, name, rank=4)
    for parameter_name, parameter in tensor.named_parameters():
        if parameter_name != tensor.zero_parameter:
            columns = parameter.flatten(0, -2)
            n = len(columns)
            product = columns.T @ columns if n >= 4 else columns @ columns.T
            torch.testing.assert_close(product, torch.eye(min(4, n)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_lora_is_a_product_of_two_matrices_whatever_the_factorization(factorization: str) -> None:
    tensor = build(factorization, "lora")
    assert {name: tuple(p.shape) for name, p in tensor.named_parameters()} == {"d_in": (10, 2), "d_out": (2, 12)}
    left, right = tensor.slices(0)
    torch.testing.assert_close((left @ right)[0], tensor.get_parameter("d_in") @ tensor.get_parameter("d_out"))


def test_the_noise_of_tensor_guide_is_drawn_from_the_seed_and_never_trained() -> None:
    tensor, again = (fresh("tensor_guide", "att", rank=3) for _ in range(2))
    (noise,) = tensor.buffers()
    assert torch.equal(noise, again.get_buffer("noise"))
    assert 0.5 < noise.std() < 1.5
    assert not noise.requires_grad
    assert "noise" in tensor.state_dict()


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_guide_builds_nothing_as_large_as_an_update(name: str) -> None:
    geometry = Geometry(d_in=96, heads=4, d_head=32, layers=2)
    formulas = factorization_of(name, "tensor_guide")
    tensor = FactorizedTensor(formulas, modes(name, geometry), [2, 3], geometry.layers, seed=0)
    sizes: list[int] = []

    def kept(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        left, right = tensor.slices(0)
    assert left.shape[-2:] == (96, 2) and right.shape[-2:] == (2, 128)
    assert 0 < max(sizes) <= 3 * 128 * 4 * 3 < 96 * 128


def test_a_factorization_knows_its_name_and_a_refusal_says_it() -> None:
    assert {name: one.name for name, one in FACTORIZATIONS.items()} == {name: name for name in FACTORIZATIONS}
    with pytest.raises(TensLoRAError, match=r"^factorization=tensor_guide: must be tucker or tensor_train to be comp"):
        FACTORIZATIONS["tensor_guide"].decompose(torch.zeros(2, 2), {"d_in": 2, "d_out": 2}, [1, 1])


def test_an_unknown_factorization_is_refused() -> None:
    with pytest.raises(TensLoRAError, match=f"factorization=hosvd: must be one of {', '.join(FACTORIZATIONS)}"):
        factorization_of("depth", "hosvd")
