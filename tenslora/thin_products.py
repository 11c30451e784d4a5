"""The thin matrices of every layer's updates, computed once per forward pass.

Every update is a product dW = left @ right. Neither side depends on the input, so the first layer that needs its pair
in a forward pass computes the pairs of all layers in a few operations, and the other layers find theirs in a cache.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tenslora.adapter import Adapter
from tenslora.errors import TensLoRAError
from tenslora.forward_pass import ForwardPass


class LayerProducts(NamedTuple):
    """The thin matrices of one layer's group, with alpha in them: a matrix adds ``x @ left @ right`` to its output.

    Args:
        left_t: the transposed left, (r, inputs), if the matrices share it; otherwise the transposed left of each
            matrix, one below the other.
        rights: the right (r, outputs) of each matrix. If one Linear holds all the matrices and they share left, there
            is a single right, (r, all outputs), whose columns are in the order of the Linear's.
        ranks: the r of each left in left_t.
    """

    left_t: Tensor
    rights: tuple[Tensor, ...]
    ranks: list[int]


class MatrixGroup:
    """The matrices that read the same input, such as query, key and value, in all layers of a stage.

    Args:
        adapter: the adapter of the stage, which holds the matrices' updates.
        matrices: the matrices, as a range of indices in `Geometry.matrices`.
        writes_to_stream: whether the matrices write to the residual stream instead of reading from it. The adapter then
            holds the transposes of their updates.
        fused_parts: if one Linear per layer holds all the matrices and nothing else, the number of equal parts in which
            it does so, see `projections.Columns`; otherwise 0.
        forward_pass: the model's forward pass.
        stage: the index of the adapter among the stages of its model.
    """

    def __init__(
        self,
        adapter: Adapter,
        matrices: range,
        writes_to_stream: bool,
        fused_parts: int,
        forward_pass: ForwardPass,
        stage: int = 0,
    ) -> None:
        self.adapter = adapter
        self.matrices = None if len(matrices) == len(adapter.geometry.matrices) else matrices
        self.key = stage, matrices.start, matrices.stop, fused_parts  # identifies the group in a forward pass
        self.writes_to_stream = writes_to_stream
        self.fused_parts = fused_parts
        self.forward_pass = forward_pass

    def products(self, layers: range, adapter: Adapter | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The thin matrices of some layers as they are applied, alpha dW = left @ right.

        Args:
            layers: which layers.
            adapter: a copy to take them from; None for the adapter itself.

        Returns:
            The left (layers, inputs, r) and the right (layers, r, outputs) of each matrix. There is a single left if
            the matrices share it.
        """
        adapter = self.adapter if adapter is None else adapter
        lefts, rights = adapter.products(layers, self.matrices, scale=adapter.scale)
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
        cached = self.forward_pass.products
        # Activation checkpointing sets hooks. It runs a block a second time during the backward pass, when the forward
        # pass is over and its cache is gone, and expects the same operations. So a checkpointed block never uses the
        # cache.
        hooks = saved_tensors_hooks()
        if cached is None and hooks is None and self.forward_pass.in_ddp and _is_backward():
            raise TensLoRAError(
                "activation checkpointing with use_reentrant=True: must be False in DistributedDataParallel, which "
                "exchanges an adapter's gradients after the first checkpoint unless it has static_graph=True"
            )
        if cached is None or hooks is not None:
            return self._compute(range(layer, layer + 1), dtype)[0]
        key = *self.key, dtype, torch.is_grad_enabled()
        if key not in cached or any(own._version != version for own, version in cached[key][1]):
            cached[key] = self._compute(range(self.adapter.geometry.layers), dtype), self._versions()
        return cast(LayerProducts, cached[key][0][layer])

    def _versions(self) -> list[tuple[Tensor, int]]:
        # A forward of the model's own may change the adapter before it calls the next layer.
        if torch.compiler.is_compiling():
            return []
        return [(own, own._version) for own in self.adapter.parameters() if not own.is_inference()]

    def _compute(self, layers: range, dtype: torch.dtype) -> list[LayerProducts]:
        with without_autocast(next(self.adapter.parameters()).device):
            lefts, rights = self.products(layers)
            ranks = [left.shape[2] for left in lefts]
            left_t = torch.cat([left.mT for left in lefts], dim=1)
            if len(lefts) == 1 and self.fused_parts:
                parts = [torch.unflatten(right, 2, (self.fused_parts, -1)) for right in rights]
                rights = [torch.cat(parts, dim=3).flatten(2)]
            # left_t is contiguous, as the weight of a Linear is: autograd then computes its gradient as grad.T @ x
            # instead of x.T @ grad, which takes up to 3.7 times as long on a CPU.
            sides = [side.contiguous().to(dtype).unbind() for side in (left_t, *rights)]
            return [LayerProducts(first, tuple(others), ranks) for first, *others in zip(*sides, strict=True)]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which updates are computed in full precision, to be rounded once at the end.

    Args:
        device: the updates' device.
    """
    # The meta device has no autocast, and is named here because torch.compile of torch 2.6 cannot trace the question
    # whether a device has autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _is_backward() -> bool:
    # Whether a reentrant checkpoint computes its block again, which is a forward pass inside the backward pass.
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def saved_tensors_hooks() -> object:
    """The innermost hooks on the tensors that autograd saves, such as activation checkpointing sets.

    Returns:
        The hooks, equal as long as they are the same; None if there are none.
    """
    if torch.compiler.is_compiling():
        return None
    innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if innermost is not None:
        return cast(object, innermost(True))
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("probing for hooks"):
            return None
    except RuntimeError:
        return object()  # this version of torch does not tell which ones
