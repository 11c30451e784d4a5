"""From updates that are there to factorised tensors near to them, and how far each axis can be compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenslora.adapter import Adapter
from tenslora.constructions import DEPTH, HEAD, PROJECTION, SITE, Geometry, modes, stacked_axes, tensor_grid
from tenslora.errors import TensLoRAError
from tenslora.factorizations import factorization_of
from tenslora.factorizations.factorization import leading_vectors

Updates = Sequence[Sequence[Tensor]]
"""dW of each layer, and in it of each of the geometry's matrices, shape (d_in, width), alpha included."""


@dataclass(frozen=True)
class Approximation:
    """How near a decomposition came.

    error: || X - Y || / || X || over all tensors. energy: for each mode that has a rank of its own (Tucker's), the
    share of || X ||^2 that is left when that mode alone is cut to it.
    """

    error: float
    energy: Mapping[str, float]


def stack(updates: Updates, construction: str, geometry: Geometry, head_layout: str = "aligned") -> list[Tensor]:
    """The updates as the tensors of a construction, in its grid's order, modes in that of `constructions.modes`."""
    stacked = stacked_axes(construction)
    over_matrices, over_layers = tensor_grid(construction, geometry)
    tensors = []
    for row in range(over_matrices):
        if over_matrices == 1 and stacked & {PROJECTION, SITE}:
            slices = [_slices(layer, geometry) for layer in updates]
        else:
            slices = [layer[row].unsqueeze(0) for layer in updates]
        x = torch.stack(slices).permute(2, 3, 1, 0)  # (d_in, d_out, P or 1, L)
        if HEAD in stacked:
            heads = x.shape[1] // geometry.d_head
            if head_layout == "aligned":
                x = torch.unflatten(x, 1, (heads, geometry.d_head)).transpose(1, 2)
            else:
                x = torch.unflatten(x, 1, (geometry.d_head, heads))
        if SITE in stacked:
            tensors.append(x.flatten(-2))
            continue
        x = x if PROJECTION in stacked else x.squeeze(-2)
        tensors += [x] if DEPTH in stacked else list(x.unbind(-1))
    assert len(tensors) == over_matrices * over_layers
    return tensors


def _slices(layer: Sequence[Tensor], geometry: Geometry) -> Tensor:
    # (P, d_in, d_out): wide matrices cut into several slices, narrow ones filled up with zeros.
    parts: list[Tensor] = []
    for update, blocks in zip(layer, geometry.slices_per_matrix, strict=True):
        filled = torch.nn.functional.pad(update, (0, blocks * geometry.d_out - update.shape[1]))
        parts += torch.split(filled, geometry.d_out, dim=1)
    return torch.stack(parts)


def _energy(updates: Updates) -> float:
    total = sum(update.double().square().sum().item() for layer in updates for update in layer)
    if total == 0:
        raise TensLoRAError("the updates are all zero, as before any training; there is nothing to come near to")
    return total


@torch.no_grad()
def approximate(adapter: Adapter, updates: Updates) -> Approximation:
    """Give `adapter` the tensors nearest to `updates` that its factorization finds at its ranks.

    In float64, whatever the updates come in, and on their device. Raises TensLoRAError if the factorization cannot
    (CP), if alpha is zero, or if all updates are.
    """
    config, geometry = adapter.config, adapter.geometry
    if config.alpha == 0:
        raise TensLoRAError("alpha=0: must be another number, because an update times 0 is near to nothing")
    total = _energy(updates)
    ways = factorization_of(config.tensor_mode, config.factorization)
    wanted = stack([[u.double() for u in layer] for layer in updates], config.tensor_mode, geometry, config.head_layout)
    over_layers = adapter.grid[1]
    kept: dict[str, float] = {}
    for index, (tensor, module) in enumerate(zip(wanted, adapter.tensors, strict=True)):
        sizes = modes(config.tensor_mode, geometry, index // over_layers)
        for name, value in ways.decompose(tensor / config.alpha, sizes, adapter.ranks).items():
            parameter = module.get_parameter(name)
            parameter.copy_(value.to(parameter))
            if name in ways.rank_limits(sizes):
                axis = list(sizes).index(name)
                vectors = leading_vectors(tensor.movedim(axis, 0).flatten(1), min(value.shape[-1], sizes[name]))
                cut = vectors.T @ tensor.movedim(axis, 0).flatten(1)
                kept[name] = kept.get(name, 0.0) + cut.square().sum().item()
    missed = 0.0
    for layer, each in enumerate(updates):
        for update, ours in zip(each, adapter.dense(layer), strict=True):
            missed += (update.double() - config.alpha * ours.to(update.device).double()).square().sum().item()
    return Approximation((missed / total) ** 0.5, {name: value / total for name, value in kept.items()})


@torch.no_grad()
def spectra(updates: Updates, geometry: Geometry, head_layout: str = "aligned") -> dict[str, Tensor]:
    """How the updates' energy is spread along every axis: d_in, d_out, d_head, head, projection and depth.

    For each, the squared singular values of the unfolding of all updates along it, largest first, as shares of their
    sum: what of || X ||^2 is left at rank r on that axis alone is the sum of the first r. Raises TensLoRAError if all
    updates are zero.
    """
    _energy(updates)
    plain = [[u.double() for u in layer] for layer in updates]
    found: dict[str, Tensor] = {}
    for construction in ("qkv_depth", "att_qkv_depth"):
        (tensor,) = stack(plain, construction, geometry, head_layout)
        for axis, name in enumerate(modes(construction, geometry)):
            if name not in found:
                unfolding = tensor.movedim(axis, 0).flatten(1)
                values = torch.linalg.eigvalsh(unfolding @ unfolding.T).flip(0).clamp(min=0)
                found[name] = values / values.sum()
    return found
