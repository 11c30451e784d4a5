"""Cuts the ranks of an adapter while it trains, and takes AdamW's moments along."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenslora.adapted_linear import is_dtensor
from tenslora.adapter import Adapter
from tenslora.errors import TensLoRAError, require_type
from tenslora.factorizations.factorization import Basis
from tenslora.files import require_finite
from tenslora.tensor import FactorizedTensor

LARGEST_GRID = 20_000_000
"""The largest number of combinations of ranks that are compared, the first rank left out."""


_MOMENTS = {"exp_avg", "exp_avg_sq"}


@torch.no_grad()
def prune(adapter: Adapter, budget: int, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, ...]:
    """Cut all tensors of an adapter to the ranks that keep the most energy within a number of parameters.

    Every tensor is brought into the bases of its unfoldings' singular vectors, and each rank keeps the first of them:
    this is the truncated HOSVD for Tucker, and the SVD of the train at each of its bonds for tensor trains. All tensors
    get the same ranks. These are the ranks, none above today's, that lose the least energy: the sum over all ranks and
    tensors of the squared singular values that are left out, which bounds the squared error.

    A gradient follows the change of basis, also one that awaits its step. So do AdamW's first moments, which are means
    of gradients. Squares of gradients do not, so the second moments start anew: each parameter's from one number, the
    mean of its old ones. Zeros would not do: AdamW counts its steps for both moments at once, would take the second
    moments for means over many steps, and its next step would be about thirty times too long.

    Args:
        adapter: the adapter; its parameters are changed in place and stay the same objects.
        budget: the largest number of the adapter's parameters.
        optimizer: the AdamW that trains them; its moments are changed in place. None if there is none.

    Returns:
        The new ranks.

    Raises:
        TensLoRAError: if the factorization has no such bases (CP), if even rank 1 exceeds the budget, if the optimizer
            keeps anything else of the parameters' shapes than AdamW's two moments, as plain tensors, if the adapter
            holds a NaN or an infinity, or if it is in DistributedDataParallel or fully_shard. Nothing is changed then,
            nor by Ctrl-C.
    """
    require_type("adapter", adapter, Adapter)
    require_type("budget", budget, int)
    for inner in vars(optimizer).values() if optimizer is not None else ():
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not getattr(optimizer, "state", None):
            raise TensLoRAError(
                f"optimizer={type(optimizer).__name__}: steps another one inside it, {type(inner).__name__}, which "
                f"keeps the moments; must be the AdamW that keeps them"
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TensLoRAError("optimizer=LBFGS: keeps what it knows of all parameters together; must be an AdamW")
    for parameter in adapter.parameters():
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        kept = {
            name: type(value)
            for name, value in state.items()
            if (value.ndim if isinstance(value, Tensor) else value is not None and not isinstance(value, Real))
        }
        packed = {kind for kind in kept.values() if kind is not Tensor}
        if not packed and set(kept) == _MOMENTS and any(state[name].shape != parameter.shape for name in kept):
            raise TensLoRAError(
                f"optimizer={type(optimizer).__name__}: keeps moments of other shapes than the parameters have; must "
                f"keep those of AdamW to be taken along"
            )
        if packed or (kept and set(kept) != _MOMENTS):
            form = f" as {' and '.join(sorted(kind.__name__ for kind in packed))}" if packed else ""
            raise TensLoRAError(
                f"optimizer={type(optimizer).__name__}: keeps {', '.join(sorted(kept))}{form}; must keep "
                f"{' and '.join(sorted(_MOMENTS))} alone, in plain tensors, as AdamW does, to be taken along"
            )
    for name, parameter in adapter.named_parameters():
        if is_dtensor(parameter):
            raise TensLoRAError(f"{name}: is divided among processes (DTensor), as by fully_shard; prune before that")
        require_finite(name, parameter)
    tensors = [cast(FactorizedTensor, tensor) for tensor in adapter.tensors]
    bases = [t.factorization.bases({n: p.double() for n, p in t.named_parameters()}, t.modes) for t in tensors]
    energies = [[basis.energies for basis in each.values()] for each in bases]
    ranks = best_ranks(adapter, energies, budget)
    if not any(values.any() for of_tensor in energies for values in of_tensor):
        warnings.warn(
            f"the adapter's updates are all zero, as before any training, so that no rank is known to matter, and the "
            f"smallest are kept: {list(ranks)}; prune after some steps",
            stacklevel=3,
        )
    with _undone_on_error(adapter, optimizer):
        old = [{name: parameter.data for name, parameter in tensor.named_parameters()} for tensor in tensors]
        gradients = {parameter: parameter.grad for parameter in adapter.parameters()}
        adapter.resize(ranks)
        for tensor, own_bases, values in zip(tensors, bases, old, strict=True):
            cut = {
                name: Basis(basis.energies, basis.before[:, :rank], basis.after[:, :rank])
                for (name, basis), rank in zip(own_bases.items(), ranks, strict=True)
            }
            dims = tensor.factorization.rank_dims(tensor.modes)
            for name, parameter in tensor.named_parameters():
                parameter.copy_(_in_basis(values[name], dims[name], cut, of_gradient=False))
                if (gradient := gradients[parameter]) is not None:  # between a backward pass and its step
                    parameter.grad = _in_basis(gradient, dims[name], cut, of_gradient=True)
                state = optimizer.state.get(parameter) if optimizer is not None else None
                if state and "exp_avg" in state:
                    state["exp_avg"] = _in_basis(state["exp_avg"], dims[name], cut, of_gradient=True)
                    state["exp_avg_sq"] = torch.full_like(parameter, state["exp_avg_sq"].mean().item())
    return ranks


@contextmanager
def _undone_on_error(adapter: Adapter, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    # After an error or Ctrl-C the adapter and the moments are as they were. None of their tensors is changed in place.
    ranks = adapter.ranks
    before = [(parameter, parameter.data, parameter.grad) for parameter in adapter.parameters()]
    states = {own: dict(optimizer.state[own]) for own, *_ in before if optimizer is not None and own in optimizer.state}
    try:
        yield
    except BaseException:
        adapter.ranks = ranks
        for parameter, data, gradient in before:
            parameter.grad, parameter.data = None, data
            parameter.grad = gradient
            if parameter in states:
                cast(torch.optim.Optimizer, optimizer).state[parameter].update(states[parameter])
        raise


def best_ranks(adapter: Adapter, energies: Sequence[Sequence[Tensor]], budget: int) -> tuple[int, ...]:
    """The ranks that lose the least energy within a number of parameters.

    All combinations of all ranks but the first are compared. A higher rank never loses more, and the count is affine in
    the first rank, so that this rank follows from the others. Of equal combinations the first is taken, in the order of
    `ranks.rank_limits`, smallest first.

    Args:
        adapter: the adapter.
        energies: for each tensor and each of its ranks, the squared singular values, largest first.
        budget: the largest number of the adapter's parameters.

    Returns:
        The ranks.

    Raises:
        TensLoRAError: if even rank 1 exceeds the budget, or if there are too many combinations to compare.
    """
    highest, *others = adapter.ranks
    if math.prod(others) > LARGEST_GRID:
        raise TensLoRAError(
            f"ranks={list(adapter.ranks)}: have {math.prod(others):,} combinations; must be at most {LARGEST_GRID:,} "
            f"to be pruned"
        )
    tensors = [cast(FactorizedTensor, tensor) for tensor in adapter.tensors]
    grids = np.meshgrid(*[np.arange(1.0, rank + 1) for rank in others], indexing="ij", sparse=True)
    fixed, with_one = (
        sum((np.asarray(t.factorization.count(t.modes, (first, *grids))) for t in tensors), np.zeros(others))
        for first in (0, 1)
    )
    first = np.minimum(np.floor((budget - fixed) / (with_one - fixed)), highest).astype(int)
    if first.max() < 1:
        raise TensLoRAError(f"budget={budget}: must be at least {int(with_one.min())}, the parameters at rank 1")
    loss = _lost(energies, 0, highest)[np.maximum(first, 1) - 1]
    for position, rank in enumerate(others, start=1):
        lost = _lost(energies, position, rank)
        loss = loss + lost.reshape([-1 if axis == position - 1 else 1 for axis in range(len(others))])
    best = np.unravel_index(np.argmin(np.where(first >= 1, loss, np.inf)), loss.shape)
    return int(first[best]), *(int(index) + 1 for index in best)


def _lost(energies: Sequence[Sequence[Tensor]], position: int, rank: int) -> NDArray[Any]:
    # What the ranks 1, 2, ... leave out at one position of the list of ranks, over all tensors.
    lost = np.zeros(rank)
    for of_tensor in energies:
        values = of_tensor[position].cpu().numpy()
        lost[: len(values)] += np.append(np.cumsum(values[::-1])[::-1][1:], 0.0)
    return lost


def _in_basis(
    value: Tensor, dims: Sequence[tuple[int, str, bool]], bases: Mapping[str, Basis], of_gradient: bool
) -> Tensor:
    # A gradient changes the other way: what is multiplied by `before` in a parameter is so by `after` in its gradient.
    changed = value.double()
    for dim, rank, is_before in dims:
        basis = bases[rank]
        matrix = basis.before if is_before != of_gradient else basis.after
        changed = (changed.movedim(dim, -1) @ matrix).movedim(-1, dim)
    return changed.to(value).contiguous()
