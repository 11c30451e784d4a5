"""Puts an adapter on a model and takes it off again.

The model's own Linear layers are replaced by `AdaptedLinear`, which share their weights, so that the names in the
model's state dict stay as they were; the adapter becomes the submodule `tenslora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tenslora.adapter import Adapter, TensLoraConfig, load_adapter
from tenslora.errors import TensLoRAError
from tenslora.projections import features, find_projections

NAME = "tenslora"


class LayerUpdate:
    """The updates of the matrices of one layer that read the same input, computed once for all of them.

    The update of a matrix is ``x @ first @ second``, alpha included: first (its inputs, r), second (r, its outputs).

    Args:
        adapter: that has the updates.
        layer: 0-based.
        matrices: which of the geometry's, side by side.
        writes: whether they write to the residual stream instead of reading it: then it is their transposes that the
            adapter holds.
    """

    def __init__(self, adapter: Adapter, layer: int, matrices: range, writes: bool) -> None:
        self.adapter = adapter
        self.layer = layer
        self.matrices = None if len(matrices) == len(adapter.geometry.matrices) else matrices
        self.writes = writes
        # An input, and the (h, second) of the matrices that have not asked for theirs yet. One attribute, so that
        # forward passes in several threads at once cannot mix one's input with another's terms.
        self._waiting: tuple[Tensor, dict[int, tuple[Tensor, Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without what waits: it is of a forward pass, and may hang on a graph that cannot be copied.
        return {**vars(self), "_waiting": None}

    def products(self) -> tuple[list[Tensor], list[Tensor]]:
        """(firsts, seconds) of all the matrices; one first only, where they share it."""
        lefts, rights = self.adapter.layer(self.layer, self.matrices)
        lefts = [left * self.adapter.config.alpha for left in lefts]
        if self.writes:
            return [right.T for right in rights], [left.T for left in lefts]
        return lefts, rights

    def add(self, y: Tensor, x: Tensor, tokens: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
        """y (tokens, outputs), in place, plus updates; x as (tokens, inputs).

        places: (which of `matrices`, its first column in y) of those that the Linear holds.
        """
        if len(places) == 1 and places[0][1] == 0:
            h, second = self._one(x, tokens, places[0][0])
            if second.shape[1] == y.shape[1]:
                return y.addmm_(h.to(y.dtype), second.to(y.dtype))
            hs, seconds = [h], [second]
        else:
            hs, seconds = self._terms(tokens)
            if len(hs) == 1 and sum(second.shape[1] for second in seconds) == y.shape[1]:
                return y.addmm_(hs[0].to(y.dtype), torch.cat(seconds, dim=1).to(y.dtype))
            seconds = [seconds[index] for index, _ in places]
            hs = hs if len(hs) == 1 else [hs[index] for index, _ in places]
        starts = [start for _, start in places]
        added: Tensor = _AddBlocks.apply(y, starts, *[t.to(y.dtype) for t in (*seconds, *hs)])
        return added

    def _one(self, x: Tensor, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        # Query, key and value are called one after the other with the very same tensor. The first of them
        # computes all three; identity, not equality, says that the others may take what is waiting.
        waiting = self._waiting
        if waiting is None or waiting[0] is not x or index not in waiting[1]:
            hs, seconds = self._terms(tokens)
            waiting = x, {i: (hs[i % len(hs)], second) for i, second in enumerate(seconds)}
        term = waiting[1].pop(index)
        self._waiting = waiting if waiting[1] else None
        return term

    def _terms(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        # h = x @ first (tokens, r), for each matrix or one for all, and the seconds.
        firsts, seconds = self.products()
        first = firsts[0] if len(firsts) == 1 else torch.cat(firsts, dim=1)
        # As a Linear: the gradient of its weight takes half the time that first's takes in a plain product.
        h = F.linear(self.adapter.dropout(tokens), first.T.to(tokens.dtype))
        if self.adapter.training and self.adapter.config.rank_dropout > 0:
            h = h * self.adapter.rank_dropout(h.new_ones(h.shape[1]))
        return [h] if len(firsts) == 1 else list(torch.split(h, [f.shape[1] for f in firsts], dim=1)), seconds


class _AddBlocks(torch.autograd.Function):
    """y[:, start : start + width] += h @ second for some blocks of columns, in place.

    y: (tokens, columns), second: (r, width) for each block, h: (tokens, r) for each or one for all. What autograd would
    make of it costs a copy of y for each block, and one product with a block-diagonal matrix mostly multiplies zeros.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, starts: list[int], *tensors: Tensor) -> Tensor:
        seconds, hs = tensors[: len(starts)], tensors[len(starts) :]
        for number, (start, second) in enumerate(zip(starts, seconds, strict=True)):
            y.narrow(1, start, second.shape[1]).addmm_(hs[number % len(hs)], second)
        ctx.starts = starts
        ctx.mark_dirty(y)
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        seconds, hs = tensors[: len(ctx.starts)], tensors[len(ctx.starts) :]
        blocks = [grad.narrow(1, start, second.shape[1]) for start, second in zip(ctx.starts, seconds, strict=True)]
        grad_seconds = [hs[number % len(hs)].T @ block for number, block in enumerate(blocks)]
        grad_hs = [block @ second.T for block, second in zip(blocks, seconds, strict=True)]
        if len(hs) == 1:
            grad_hs = [torch.stack(grad_hs).sum(0)] if len(grad_hs) > 1 else grad_hs
        return grad, None, *grad_seconds, *grad_hs


class AdaptedLinear(nn.Linear):
    """y = x W^T + b + alpha x dW for the matrices that one Linear holds.

    x: (..., inputs); y: (..., outputs). Shares its parameters with the module that it stands for and calls, a Linear or
    transformers' Conv1D; once merged, it computes that module alone. places: see `LayerUpdate.add`.
    """

    def __init__(self, linear: nn.Module, update: LayerUpdate, places: tuple[tuple[int, int], ...]) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and draw a weight to throw away
        self.in_features, self.out_features = features(linear)
        self.base = (linear,)  # in a tuple, and so not a submodule: its parameters are registered here
        self._parameters = linear._parameters  # the table itself: what replaces a weight here replaces it there
        self.update = update
        self.places = places
        self.merged = False
        self.enabled = True
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            plain: Tensor = self.base[0](x)
            return plain
        # Of a matrix, Linear makes a tensor of its own that can take the update in place; of more dimensions it makes
        # a view, and autograd would copy that first.
        tokens = x.reshape(-1, self.in_features)
        y = self.update.add(self.base[0](tokens), x, tokens, self.places)
        return y.view(*x.shape[:-1], self.out_features)

    def _replicate_for_data_parallel(self) -> NoReturn:
        # What a layer's matrices share would be shared by all devices.
        raise TensLoRAError("DataParallel: cannot copy an adapter; start one process per device instead (torchrun)")

    def lora(self) -> tuple[Tensor, Tensor]:
        """(first, second), (inputs, r) and (r, outputs), of all that is added: alpha dW = first @ second."""
        firsts, seconds = self.update.products()
        held = [firsts[index % len(firsts)] for index, _ in self.places]
        shared = len(firsts) == 1
        ranks = [0 if shared else second.shape[0] for second in seconds]
        second = seconds[0].new_zeros(
            firsts[0].shape[1] if shared else sum(f.shape[1] for f in held), self.out_features
        )
        row = 0
        for index, start in self.places:
            part = seconds[index]
            second[row : row + part.shape[0], start : start + part.shape[1]] = part
            row += ranks[index]
        return (firsts[0] if shared else torch.cat(held, dim=1)), second


def attach(model: nn.Module, adapter: TensLoraConfig | Adapter) -> Adapter:
    """Freeze `model` and put an adapter on its attention projections.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> adapter = attach(model, TensLoraConfig("qkv_depth"))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    788

    Args:
        model: any Transformer that `find_projections` understands; changed in place. All its parameters are
            frozen: thaw a classification head afterwards.
        adapter: the settings of a new adapter, or one that exists, as from `load_adapter`.

    Returns the adapter, now also ``model.tenslora`` and on the model's device. At its start the model's outputs
    are unchanged. Raises TensLoRAError if the model has an adapter already, has no such projections, or if the
    adapter was made for other dimensions: the message says which one differs.
    """
    if hasattr(model, NAME):
        raise TensLoRAError(f"{type(model).__name__}: has an adapter already; detach it first")
    geometry, sites = find_projections(
        model, adapter.adapt if isinstance(adapter, TensLoraConfig) else adapter.config.adapt
    )
    if isinstance(adapter, TensLoraConfig):
        adapter = Adapter(adapter, geometry)
    differing = [
        f"{name} is {value} in the adapter and {getattr(geometry, name)} in the backbone"
        for name, value in vars(adapter.geometry).items()
        if value != getattr(geometry, name)
    ]
    if differing:
        raise TensLoRAError(f"the adapter does not fit {type(model).__name__}: {'; '.join(differing)}")
    model.requires_grad_(False)
    adapter.to(next(sites[0].linear.parameters()).device).train(model.training)
    updates: dict[tuple[int, range], LayerUpdate] = {}
    for site in sites:
        key = (site.layer, site.group)
        update = updates.setdefault(key, LayerUpdate(adapter, site.layer, site.group, site.writes))
        _replace(model, site.path, AdaptedLinear(site.linear, update, site.places))
    model.add_module(NAME, adapter)
    return adapter


def load(model: nn.Module, path: Path | str) -> Adapter:
    """Attach the adapter in the safetensors file at `path`. Raises TensLoRAError as `load_adapter` and `attach` do."""
    return attach(model, load_adapter(Path(path)))


def detach(model: nn.Module) -> Adapter:
    """Take the adapter off and return it; the model is the plain backbone, with its own modules.

    What was merged stays in the weights. All parameters stay frozen or not as they were. Raises TensLoRAError if
    there is no adapter.
    """
    adapter = adapter_of(model)
    for path, linear in _adapted(model).items():
        linear.base[0].train(linear.training)
        _replace(model, path, linear.base[0])
    delattr(model, NAME)
    return adapter


def merge(model: nn.Module) -> None:
    """Add alpha dW to the weights: W <- W + alpha dW^T, after which the forward pass costs what the backbone's does.

    Twice does what once does. Raises TensLoRAError if there is no adapter, or if a weight is not a plain matrix of
    floats (quantised, packed).
    """
    _fold(model, into_weights=True)


def unmerge(model: nn.Module) -> None:
    """Take alpha dW out of the weights again, up to rounding. Raises TensLoRAError if there is no adapter."""
    _fold(model, into_weights=False)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """In this context `model` computes what the backbone alone does, as in PEFT's `disable_adapter`.

    Raises TensLoRAError if there is no adapter, or if it is merged: what is in the weights cannot be left out.
    """
    linears = list(adapted_linears(model).values())
    before = [linear.enabled for linear in linears]
    try:
        for linear in linears:
            linear.enabled = False
        yield
    finally:
        for linear, enabled in zip(linears, before, strict=True):
            linear.enabled = enabled


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that `attach` put on `model`. Raises TensLoRAError if there is none."""
    adapter = getattr(model, NAME, None)
    if not isinstance(adapter, Adapter):
        raise TensLoRAError(f"{type(model).__name__}: has no adapter")
    return adapter


def adapted_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted Linear layers by their paths. Raises TensLoRAError if there is no adapter, or if it is merged."""
    adapter_of(model)
    linears = _adapted(model)
    if any(linear.merged for linear in linears.values()):
        raise TensLoRAError(f"{type(model).__name__}: its adapter is merged; unmerge it first")
    return linears


@torch.no_grad()
def _fold(model: nn.Module, into_weights: bool) -> None:
    adapter_of(model)
    for path, linear in _adapted(model).items():
        if not linear.weight.is_floating_point() or {*linear.weight.shape} != {linear.in_features, linear.out_features}:
            kind = type(linear.base[0]).__name__
            raise TensLoRAError(f"{path}: the weight of a {kind} cannot take up an update; leave the adapter unmerged")
    for linear in _adapted(model).values():
        if linear.merged != into_weights:
            first, second = linear.lora()
            update = first @ second  # (inputs, outputs), as Conv1D stores its weight and Linear does not
            update = update.T if isinstance(linear.base[0], nn.Linear) else update
            linear.weight.add_(update.to(linear.weight), alpha=1 if into_weights else -1)
            linear.merged = into_weights


def _adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
