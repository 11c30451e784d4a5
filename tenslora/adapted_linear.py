"""The layer that adds the update to a Linear's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenslora.adapter import Adapter
from tenslora.errors import TensLoRAError
from tenslora.forward_pass import LayerCall
from tenslora.projections import Columns, features, is_conv1d
from tenslora.thin_products import MatrixGroup


class AdaptedLinear(nn.Linear):
    """A Linear layer with the updates of the matrices that it holds: ``y = x W^T + b + alpha x dW``.

    W has shape (outputs, inputs), and dW, a product of two thin matrices, has shape (inputs, outputs).

    The layer calls the original module for the first two terms and shares the module's parameters. Once merged, or
    while disabled, it only calls the original module.

    Args:
        linear: the original module, a Linear or transformers' Conv1D.
        shared: this layer's matrices of the group that reads the same input.
        columns: the output columns of each matrix that the module holds.
        call: the note that the module is called, from `ForwardPass.layer`.
    """

    def __init__(self, linear: nn.Module, shared: SharedInput, columns: tuple[Columns, ...], call: LayerCall) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate and draw a weight that is not needed
        self.in_features, self.out_features = features(linear)
        self.base = (linear,)  # in a tuple, so that it is no submodule and the parameters keep their names
        # The same dicts, so that a weight replaced here is replaced there, and a buffer, such as the mask of a pruned
        # weight, moves to another device too.
        self._parameters, self._buffers = linear._parameters, linear._buffers
        self.shared = shared
        self.columns = columns
        self.call = call
        self.added: tuple[Adapter, ...] = ()  # a copy of the adapter as it was when its update was added to the weight
        self.enabled = True
        self.training = linear.training

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update."""
        return bool(self.added)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output.

        Args:
            x: (..., inputs).

        Returns:
            (..., outputs).
        """
        self.call.called = True
        if self.added or not self.enabled:
            plain: Tensor = self.base[0](x)
            return plain
        return forward_with_updates(self.base[0], [self], x)

    def add_update(self, y: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        """Add the update's output to the Linear's, y += h @ right, in place; the products contain alpha.

        Args:
            y: the output so far, (tokens, outputs).
            x: the input as the module received it, (..., inputs).
            tokens: the same numbers as (tokens, inputs).

        Returns:
            y.
        """
        if len(self.columns) == 1 and self.columns[0].start == 0:
            # A Linear of a single matrix, such as BERT's query.
            h, right = self.shared.product_of(x, tokens, self.columns[0].matrix, y.dtype)
            if right.shape[1] == y.shape[1]:
                return y.addmm_(h, right)
            hs, rights = [h], [right]
        else:
            # A Linear of several matrices, such as timm's qkv.
            hs, rights = self.shared.all_products(tokens, y.dtype)
            if len(hs) == 1 and self.shared.group.fused_parts:
                return y.addmm_(hs[0], rights[0])
            rights = [rights[columns.matrix] for columns in self.columns]
            hs = hs if len(hs) == 1 else [hs[columns.matrix] for columns in self.columns]
        updated: Tensor = _AddToColumns.apply(y, self.columns, *rights, *hs)
        return updated

    # The state dict is the original module's, which may keep more beside its parameters, as a quantised one does.

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base[0]._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state, prefix = args[:2]
        if self.added and f"{prefix}weight" in state:
            # A merged model's weight holds the update of the adapter that comes with it.
            self.added = (self.shared.group.adapter,)
        self.base[0]._load_from_state_dict(*args, **kwargs)

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """The update of the whole module as one product, alpha dW = left @ right.

        Of a merged layer it is the update that was added, whatever has become of the adapter since.

        Returns:
            left (inputs, r) and right (r, outputs). If the matrices that the module holds do not share left, r is the
            sum of their ranks and right is block diagonal.
        """
        layers = range(self.shared.layer, self.shared.layer + 1)
        lefts, rights = ([t[0] for t in side] for side in self.shared.group.products(layers, *self.added))
        held = lefts if len(lefts) == 1 else [lefts[columns.matrix] for columns in self.columns]
        right = held[0].new_zeros(sum(left.shape[1] for left in held), self.out_features)
        row = 0
        for columns in self.columns:
            own = rights[columns.matrix]
            columns.of(right.narrow(0, row, len(own))).copy_(torch.unflatten(own, 1, (columns.parts, -1)))
            row += len(own) if len(lefts) > 1 else 0
        return torch.cat(held, dim=1), right

    def update(self) -> Tensor:
        """What the adapter adds to the module's weight, alpha dW, laid out as the weight is.

        Returns:
            (outputs, inputs), or (inputs, outputs) for a Conv1D.
        """
        left, right = self.as_lora()
        update = left @ right
        return update if is_conv1d(self.base[0]) else update.T

    def _replicate_for_data_parallel(self) -> NoReturn:
        # The matrices of a layer share tensors, which DataParallel's copies would share across devices.
        raise TensLoRAError("DataParallel: cannot copy an adapter; start one process per device instead (torchrun)")


def forward_with_updates(linear: nn.Module, updates: Sequence[AdaptedLinear], x: Tensor) -> Tensor:
    """The output of a Linear with any number of updates, ``x W^T + b + sum of alpha x dW``.

    Args:
        linear: the Linear itself.
        updates: the updates to add, in this order; each is that of an adapter of its own.
        x: (..., inputs).

    Returns:
        (..., outputs).
    """
    # Given a matrix, Linear returns a new tensor, to which an update can be added in place. Given more dimensions, it
    # returns a view, which autograd would copy first.
    tokens = x.reshape(-1, x.shape[-1])
    y: Tensor = linear(tokens)
    for update in updates:
        y = update.add_update(y, x, tokens)
    return y.view(*x.shape[:-1], y.shape[-1])


class SharedInput:
    """One layer's matrices of a group: ``h = x @ left`` is computed once for all matrices that read the same x.

    Args:
        group: the matrices, in all layers of the stage.
        layer: the index of this layer in its stage, 0-based.
    """

    def __init__(self, group: MatrixGroup, layer: int) -> None:
        self.group = group
        self.layer = layer

    def product_of(self, x: Tensor, tokens: Tensor, matrix: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The thin product of one matrix, which adds ``h @ right`` to its output.

        A Transformer calls query, key and value one after the other with the very same tensor. The first call computes
        h for all three; the other two recognise the tensor by its identity and take their own h.

        Args:
            x: the input as the Linear received it, (..., inputs).
            tokens: the same numbers as (tokens, inputs).
            matrix: the matrix's index in the group.
            dtype: the output's dtype.

        Returns:
            h (tokens, r) and right (r, outputs).
        """
        pending = self.group.forward_pass.here.pending
        key = *self.group.key, self.layer
        latest, products = pending.get(key, (None, {}))
        if latest is not x or matrix not in products:
            hs, rights = self.all_products(tokens, dtype)
            products = {index: (hs[index % len(hs)], right) for index, right in enumerate(rights)}
            pending[key] = x, products
        product = products.pop(matrix)
        if not products:
            pending.pop(key, None)
        return product

    def all_products(self, tokens: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The thin products of all matrices.

        Args:
            tokens: the input as (tokens, inputs).
            dtype: the output's dtype.

        Returns:
            hs: the h (tokens, r) of each matrix, or a single h if the matrices share left.
            rights: the right of each matrix, or a single right, as in `LayerProducts`.
        """
        adapter = self.group.adapter
        left_t, rights, ranks = self.group.of_layer(self.layer, dtype)
        # A quantised Linear may return float32 under autocast, which would make h another dtype.
        h = F.linear(adapter.dropout(tokens.to(dtype)), left_t).to(dtype)
        if adapter.training and adapter.config.rank_dropout > 0:  # one mask for all tokens
            h = h * adapter.rank_dropout(h.new_ones(h.shape[1]))
        return [h] if len(ranks) == 1 else list(torch.split(h, ranks, dim=1)), list(rights)


class _AddToColumns(torch.autograd.Function):
    """``y[:, columns] += h @ right`` for the columns of several matrices, in place.

    y is (tokens, outputs). Each matrix has a right (r, columns), and an h (tokens, r) unless all matrices share one.
    Autograd's own in-place addition would copy y for each matrix, and a product with one block-diagonal matrix would
    mostly multiply zeros.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: tuple[Columns, ...], *tensors: Tensor) -> Tensor:
        rights, hs = tensors[: len(places)], tensors[len(places) :]
        for number, (columns, right) in enumerate(zip(places, rights, strict=True)):
            h, own = hs[number % len(hs)], columns.of(y)
            if columns.parts == 1:
                own.squeeze(1).addmm_(h, right)
            else:
                own.add_((h @ right).view_as(own))
        ctx.places = places
        ctx.mark_dirty(y)
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        rights, hs = tensors[: len(ctx.places)], tensors[len(ctx.places) :]
        blocks = [columns.of(grad).flatten(1) for columns in ctx.places]
        grad_rights = [hs[number % len(hs)].T @ block for number, block in enumerate(blocks)]
        grad_hs = [block @ right.T for block, right in zip(blocks, rights, strict=True)]
        if len(hs) == 1:
            grad_hs = [torch.stack(grad_hs).sum(0)] if len(grad_hs) > 1 else grad_hs
        return grad, None, *grad_rights, *grad_hs
