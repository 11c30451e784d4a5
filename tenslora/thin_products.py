"""The thin matrices of every layer's updates, computed once per forward pass.

Every update is a product dW = left @ right. Neither side depends on the input, so the first layer that needs its pair
in a forward pass computes the pairs of all layers in a few operations, and the other layers find theirs in a cache.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tenslora.adapter import Adapter


class ForwardPassCache:
    """A cache of the products that the current forward pass has computed for all layers.

    Hooks on the model create the cache when a forward pass begins and drop it when the pass ends, even by an exception.
    Outside a forward pass the cache is empty: nothing would tell us when a cached product has gone stale.

    Args:
        model: the adapted model. A forward pass is a call of this module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.products: dict[Hashable, list[LayerProducts]] | None = None
        self.hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "products": None}  # they may belong to an autograd graph, which cannot be copied

    def _begin(self, *_: Any) -> None:
        self.products = {}

    def _end(self, *_: Any) -> None:
        self.products = None

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()


class LayerProducts(NamedTuple):
    """The thin matrices of one layer's group, with alpha in them: a matrix adds ``x @ left @ right`` to its output.

    Args:
        left_t: the transposed left, (r, inputs), if the matrices share it; otherwise the transposed left of each
            matrix, one below the other.
        rights: the right (r, outputs) of each matrix. If one Linear holds all the matrices and they share left, there
            is a single right, (r, all outputs).
        ranks: the r of each left in left_t.
    """

    left_t: Tensor
    rights: tuple[Tensor, ...]
    ranks: list[int]


class MatrixGroup:
    """The matrices that read the same input, such as query, key and value, in all layers.

    Args:
        adapter: the adapter that holds the matrices' updates.
        matrices: the matrices, as a range of indices in `Geometry.matrices`.
        writes_to_stream: whether the matrices write to the residual stream instead of reading from it. The adapter then
            holds the transposes of their updates.
        fused: whether one Linear per layer holds all the matrices, side by side, and nothing else.
        cache: the cache of the model's forward pass.
    """

    def __init__(
        self, adapter: Adapter, matrices: range, writes_to_stream: bool, fused: bool, cache: ForwardPassCache
    ) -> None:
        self.adapter = adapter
        self.matrices = None if len(matrices) == len(adapter.geometry.matrices) else matrices
        self.first_matrix = matrices.start  # identifies the group in the cache
        self.writes_to_stream = writes_to_stream
        self.fused = fused
        self.cache = cache

    def products(self, layers: range) -> tuple[list[Tensor], list[Tensor]]:
        """The thin matrices of some layers as they are applied, alpha dW = left @ right.

        Args:
            layers: which layers.

        Returns:
            The left (layers, inputs, r) and the right (layers, r, outputs) of each matrix. There is a single left if
            the matrices share it.
        """
        lefts, rights = self.adapter.products(layers, self.matrices, scale=self.adapter.scale)
        if self.writes_to_stream:  # the transpose is applied: (left right)^T = right^T left^T
            return [right.mT for right in rights], [left.mT for left in lefts]
        return lefts, rights

    def of_layer(self, layer: int, dtype: torch.dtype) -> LayerProducts:
        """The thin matrices of one layer, ready to multiply tokens. During a forward pass they come from the cache.

        Args:
            layer: 0-based.
            dtype: the tokens' dtype.

        Returns:
            The layer's products, in this dtype.
        """
        cached = self.cache.products
        if cached is None or _saved_tensors_have_hooks():
            return self._compute(range(layer, layer + 1), dtype)[0]
        key = self.first_matrix, dtype, torch.is_grad_enabled()
        if key not in cached:
            cached[key] = self._compute(range(self.adapter.geometry.layers), dtype)
        return cached[key][layer]

    def _compute(self, layers: range, dtype: torch.dtype) -> list[LayerProducts]:
        with _without_autocast(next(self.adapter.parameters()).device):
            lefts, rights = self.products(layers)
            ranks = [left.shape[2] for left in lefts]
            left_t = torch.cat([left.mT for left in lefts], dim=1)
            if len(lefts) == 1 and self.fused:
                rights = [torch.cat(rights, dim=2)]
            # left_t is contiguous, as the weight of a Linear is: autograd then computes its gradient as grad.T @ x
            # instead of x.T @ grad, which takes up to 3.7 times as long on a CPU.
            sides = [side.contiguous().to(dtype).unbind() for side in (left_t, *rights)]
            return [LayerProducts(first, tuple(others), ranks) for first, *others in zip(*sides, strict=True)]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # The products are computed in full precision and rounded once at the end. The meta device has no autocast, and is
    # named here because torch.compile of torch 2.6 cannot trace the question whether a device has autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _saved_tensors_have_hooks() -> bool:
    # Activation checkpointing sets such hooks. It runs a block a second time during the backward pass, when the forward
    # pass is over and its cache is gone, and expects the same operations. So a checkpointed block never uses the cache.
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("probing for hooks"):
            return False
    except RuntimeError:
        return True
