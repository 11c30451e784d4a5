"""Approximates given updates by factorised tensors, and shows how far each axis can be compressed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tenslora.adapter import Adapter, StagedAdapter
from tenslora.constructions import (
    DEPTH,
    HEAD,
    HEAD_LAYOUTS,
    PROJECTION,
    SITE,
    Geometry,
    modes,
    stacked_axes,
    tensor_grid,
)
from tenslora.errors import TensLoRAError, require_one_of, require_type
from tenslora.factorizations import factorization_of
from tenslora.factorizations.factorization import leading_vectors

Updates = Sequence[Sequence[Tensor]]
"""The updates of one stage: ``updates[layer][m]`` is alpha dW of the m-th of `Geometry.matrices` in that layer of the
stage, with shape (d_in, width)."""


@dataclass(frozen=True)
class Approximation:
    """How closely a decomposition Y approximates the updates X.

    Args:
        error: ||X - Y|| / ||X||, over all tensors.
        energy: for each mode that has a rank of its own, as in Tucker, the share of ||X||^2 that is left if only that
            mode is compressed to its rank.
    """

    error: float
    energy: Mapping[str, float]


def stack(updates: Updates, construction: str, geometry: Geometry, head_layout: str = "aligned") -> list[Tensor]:
    """Stack updates into the tensors of a construction.

    Args:
        updates: the updates of all layers of a stage.
        construction: the construction's name.
        geometry: the backbone's dimensions.
        head_layout: how d_out divides into d_head and head, see `Factorization.slices`.

    Returns:
        The tensors in the order of `Adapter.tensors`, with their modes in the order of `constructions.modes`.
    """
    stacked = stacked_axes(construction)
    over_matrices, over_layers = tensor_grid(construction, geometry)
    tensors = []
    for row in range(over_matrices):
        if over_matrices == 1 and stacked & {PROJECTION, SITE}:
            slices = [_slices_of_layer(layer, geometry) for layer in updates]
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


def _slices_of_layer(layer: Sequence[Tensor], geometry: Geometry) -> Tensor:
    # Returns (P, d_in, d_out). A wide matrix is cut into several slices, and a narrow one is padded with zeros.
    parts: list[Tensor] = []
    for update, blocks in zip(layer, geometry.slices_per_matrix, strict=True):
        filled = torch.nn.functional.pad(update, (0, blocks * geometry.d_out - update.shape[1]))
        parts += torch.split(filled, geometry.d_out, dim=1)
    return torch.stack(parts)


def _energy(stages: Sequence[Updates]) -> float:
    total = sum(update.double().square().sum().item() for stage in stages for layer in stage for update in layer)
    if not math.isfinite(total):
        raise TensLoRAError("the updates hold a NaN or an infinity, and cannot be approximated")
    if total == 0:
        raise TensLoRAError("the updates are all zero, as before any training, and cannot be approximated")
    return total


@torch.no_grad()
def approximate(adapter: Adapter | StagedAdapter, updates: Sequence[Updates]) -> Approximation:
    """Set an adapter's parameters so that its updates approximate given ones, with `Factorization.decompose`.

    Args:
        adapter: an adapter with the ranks to compress to; it is changed in place.
        updates: the updates of each stage, in any precision; ``[updates]`` if there is one. The computation takes place
            in float64, on their device.

    Returns:
        How closely the adapter's updates approximate the given ones.

    Raises:
        TensLoRAError: if the factorization has no direct method (CP), if alpha is zero, if all updates are zero, if
            they are not those of the adapter's stages, layers and matrices, or if the adapter's type cannot hold what
            would give them. The adapter is not changed then, nor by Ctrl-C.
    """
    require_type("adapter", adapter, Adapter, StagedAdapter)
    require_type("updates", updates, Sequence)
    if len(updates) != len(adapter.stages):
        raise TensLoRAError(f"updates: are of {len(updates)} stages; must be of {len(adapter.stages)}, each a list")
    for index, (stage, of_stage) in enumerate(zip(adapter.stages, updates, strict=True)):
        _require_updates(f"updates[{index}]", of_stage, stage.geometry)
    if adapter.config.alpha == 0:
        raise TensLoRAError("alpha=0: must not be 0, because an adapter with alpha 0 can only give updates of zero")
    total = _energy(updates)
    squared_error, energy = 0.0, dict[str, float]()
    with _undone_on_error(adapter):
        for stage, of_stage in zip(adapter.stages, updates, strict=True):
            for name, left in _decompose(stage, of_stage).items():
                energy[name] = energy.get(name, 0.0) + left
            for layer, of_matrices in enumerate(of_stage):
                for update, dense in zip(of_matrices, stage.dense(layer), strict=True):
                    difference = update.double() - stage.scale * dense.to(update.device).double()
                    squared_error += difference.square().sum().item()
    return Approximation((squared_error / total) ** 0.5, {name: value / total for name, value in energy.items()})


@contextmanager
def _undone_on_error(adapter: Adapter | StagedAdapter) -> Iterator[None]:
    before = [(parameter, parameter.clone()) for parameter in adapter.parameters()]
    try:
        yield
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise


def _require_updates(name: str, updates: Updates, geometry: Geometry) -> None:
    require_type(name, updates, Sequence)
    if len(updates) != geometry.layers:
        raise TensLoRAError(f"{name}: has {len(updates)} layers; must have {geometry.layers}")
    wanted = [(geometry.d_in, width) for width in geometry.widths]
    for layer, matrices in enumerate(updates):
        require_type(f"{name}[{layer}]", matrices, Sequence)
        shapes = [tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__ for own in matrices]
        if shapes != wanted:
            raise TensLoRAError(f"{name}[{layer}]: is {shapes}; must be tensors of shapes {wanted}")
        if not all(own.is_floating_point() and own.layout is torch.strided and not own.is_meta for own in matrices):
            raise TensLoRAError(f"{name}[{layer}]: must be dense tensors of floating-point numbers")


def _decompose(adapter: Adapter, updates: Updates) -> dict[str, float]:
    # Sets the adapter of one stage. Returns for each mode the part of ||X||^2 that is kept if it alone is compressed.
    config, geometry = adapter.config, adapter.geometry
    if not any(update.any() for layer in updates for update in layer):  # of this stage alone
        for module in adapter.tensors:
            module.get_parameter(adapter.zero_parameter).zero_()
        return {}
    factorization = factorization_of(config.tensor_mode, config.factorization)
    tensors = stack(
        [[update.double() for update in layer] for layer in updates], config.tensor_mode, geometry, config.head_layout
    )
    over_layers = adapter.grid[1]
    energy: dict[str, float] = {}
    for index, (tensor, module) in enumerate(zip(tensors, adapter.tensors, strict=True)):
        sizes = modes(config.tensor_mode, geometry, index // over_layers)
        for name, value in factorization.decompose(tensor / adapter.scale, sizes, adapter.ranks).items():
            parameter = module.get_parameter(name)
            parameter.copy_(value.to(parameter))
            if not parameter.isfinite().all():
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise TensLoRAError(
                    f"the updates, divided by the adapter's scale of {float(adapter.scale):g}, are too large for the "
                    f"adapter's type {dtype}"
                )
            if name in factorization.rank_limits(sizes):
                axis = list(sizes).index(name)
                vectors = leading_vectors(tensor.movedim(axis, 0).flatten(1), min(value.shape[-1], sizes[name]))
                compressed = vectors.T @ tensor.movedim(axis, 0).flatten(1)
                energy[name] = energy.get(name, 0.0) + compressed.square().sum().item()
    return energy


@torch.no_grad()
def spectra(updates: Updates, geometry: Geometry, head_layout: str = "aligned") -> dict[str, Tensor]:
    """How the energy of the updates is distributed along every axis: d_in, d_out, d_head, head, projection and depth.

    Args:
        updates: the updates of all layers of a stage.
        geometry: the stage's dimensions.
        head_layout: how d_out divides into d_head and head, see `Factorization.slices`.

    Returns:
        For each axis, the squared singular values of the unfolding of all updates along it, largest first, divided by
        their sum. The first r add up to the share of ||X||^2 that is left if only that axis is compressed to rank r.

    Raises:
        TensLoRAError: if all updates are zero, or if they are not those of the stage's layers and matrices.
    """
    require_type("geometry", geometry, Geometry)
    _require_updates("updates", updates, geometry)
    require_one_of("head_layout", head_layout, HEAD_LAYOUTS)
    _energy([updates])
    in_double = [[update.double() for update in layer] for layer in updates]
    shares: dict[str, Tensor] = {}
    for construction in ("qkv_depth", "att_qkv_depth"):
        (tensor,) = stack(in_double, construction, geometry, head_layout)
        for axis, name in enumerate(modes(construction, geometry)):
            if name not in shares:
                unfolding = tensor.movedim(axis, 0).flatten(1)
                values = torch.linalg.eigvalsh(unfolding @ unfolding.T).flip(0).clamp(min=0)
                shares[name] = values / values.sum()
    return shares
