"""Puts an adapter on a model and takes it off again.

The model's own Linear layers are replaced by `AdaptedLinear`, which share their weights, so that the names in the
model's state dict stay as they were; the adapter becomes the submodule `tenslora`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tenslora.adapter import Adapter, TensLoraConfig, load_adapter
from tenslora.errors import TensLoRAError
from tenslora.projections import features, find_projections

NAME = "tenslora"


class ForwardPass:
    """What has been made for all layers of a model in the forward pass that is under way.

    `made` is None outside of one, as where a block is called by itself: there every layer makes its own, as nothing
    says until when what is made for all would hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self.made: dict[Hashable, Any] | None = None
        self.hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": None}  # it may hang on a graph, which cannot be copied

    def _begin(self, *_: Any) -> None:
        self.made = {}

    def _end(self, *_: Any) -> None:
        self.made = None

    def leave(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()


class Terms(NamedTuple):
    """Of one layer: first (r, inputs), or one upon the other where every matrix has its own, and second (r, width).

    The update of a matrix is ``x @ first.T @ second``. seconds: side by side as one, where one Linear holds all the
    matrices and they share the first. ranks: the r of the firsts one upon the other; of one for all, one.
    """

    first: Tensor
    seconds: tuple[Tensor, ...]
    ranks: list[int]


class MatrixGroup:
    """The matrices of every layer that read the same input, and their updates as thin products.

    Args:
        adapter: that has the updates.
        matrices: which of the geometry's, side by side.
        writes: whether they write to the residual stream instead of reading it: then it is their transposes that the
            adapter holds.
        whole: whether one Linear holds them all, side by side, and nothing else.
        forward_pass: of the model.
    """

    def __init__(self, adapter: Adapter, matrices: range, writes: bool, whole: bool, forward_pass: ForwardPass) -> None:
        self.adapter = adapter
        self.matrices = None if len(matrices) == len(adapter.geometry.matrices) else matrices
        self.writes = writes
        self.whole = whole
        self.forward_pass = forward_pass

    def products(self, layers: range) -> tuple[list[Tensor], list[Tensor]]:
        """(firsts, seconds) of all the matrices, (layers, inputs, r) and (layers, r, width), with alpha.

        There is one first only, where they share it.
        """
        lefts, rights = self.adapter.products(layers, self.matrices, self.adapter.config.alpha)
        return ([right.mT for right in rights], [left.mT for left in lefts]) if self.writes else (lefts, rights)

    def terms(self, layer: int, dtype: torch.dtype) -> Terms:
        """Of one layer, in `dtype`; made for all layers at once where a forward pass of the model asks."""
        made = self.forward_pass.made
        if made is None or _saving_is_watched():
            return self._terms(range(layer, layer + 1), dtype)[0]
        key = self, dtype, torch.is_grad_enabled()
        if key not in made:
            made[key] = self._terms(range(self.adapter.geometry.layers), dtype)
        terms: Terms = made[key][layer]
        return terms

    def _terms(self, layers: range, dtype: torch.dtype) -> list[Terms]:
        with _without_autocast(next(self.adapter.parameters()).device):
            firsts, seconds = self.products(layers)
            ranks = [first.shape[2] for first in firsts]
            first = torch.cat([first.mT for first in firsts], dim=1)
            if len(firsts) == 1 and self.whole:
                seconds = [torch.cat(seconds, dim=2)]
            # Row by row in memory, as a Linear has its weight: autograd then makes first's gradient as grad.T @ x, not
            # as x.T @ grad, which takes up to 3.7 times as long on a CPU.
            sides = [side.contiguous().to(dtype).unbind() for side in (first, *seconds)]
            return [Terms(own, tuple(others), ranks) for own, *others in zip(*sides, strict=True)]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # The products stay in full precision until they are done: what would be rounded on the way saves nothing.
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _saving_is_watched() -> bool:
    # By activation checkpointing above all, which has a block called again in the backward pass to do the very same
    # operations: by then the forward pass is over, and so the block must not take part in what is made for all.
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("refused where there are hooks"):
            return False
    except RuntimeError:
        return True


class LayerUpdate:
    """The updates of one layer's matrices of a group: ``h = x @ first.T`` computed once for all of them."""

    def __init__(self, group: MatrixGroup, layer: int) -> None:
        self.group = group
        self.layer = layer
        # An input, and the (h, second) of the matrices that have not asked for theirs yet. One attribute, so that
        # forward passes in several threads at once cannot mix one's input with another's terms.
        self._waiting: tuple[Tensor, dict[int, tuple[Tensor, Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without what waits: it is of a forward pass, and may hang on a graph that cannot be copied.
        return {**vars(self), "_waiting": None}

    def add(self, y: Tensor, x: Tensor, tokens: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
        """y (tokens, outputs), in place, plus updates; x as (tokens, inputs).

        places: (which of the group's matrices, its first column in y) of those that the Linear holds.
        """
        if len(places) == 1 and places[0][1] == 0:
            h, second = self._one(x, tokens, places[0][0], y.dtype)
            if second.shape[1] == y.shape[1]:
                return y.addmm_(h, second)
            hs, seconds = [h], [second]
        else:
            hs, seconds = self._all(tokens, y.dtype)
            if len(hs) == 1 and self.group.whole:
                return y.addmm_(hs[0], seconds[0])
            seconds = [seconds[index] for index, _ in places]
            hs = hs if len(hs) == 1 else [hs[index] for index, _ in places]
        added: Tensor = _AddBlocks.apply(y, [start for _, start in places], *seconds, *hs)
        return added

    def _one(self, x: Tensor, tokens: Tensor, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Query, key and value are called one after the other with the very same tensor. The first of them
        # computes all three; identity, not equality, says that the others may take what is waiting.
        waiting = self._waiting
        term = None if waiting is None or waiting[0] is not x else waiting[1].pop(index, None)
        if waiting is None or term is None:
            hs, seconds = self._all(tokens, dtype)
            waiting = x, {i: (hs[i % len(hs)], second) for i, second in enumerate(seconds)}
            term = waiting[1].pop(index)
        self._waiting = waiting if waiting[1] else None
        return term

    def _all(self, tokens: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        # h = x @ first.T (tokens, r), for each matrix or one for all, and the seconds.
        adapter = self.group.adapter
        first, seconds, ranks = self.group.terms(self.layer, dtype)
        h = F.linear(adapter.dropout(tokens.to(dtype)), first)
        if adapter.training and adapter.config.rank_dropout > 0:
            h = h * adapter.rank_dropout(h.new_ones(h.shape[1]))
        return [h] if len(ranks) == 1 else list(torch.split(h, ranks, dim=1)), list(seconds)


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
        layer = self.update.layer
        firsts, seconds = ([t[0] for t in side] for side in self.update.group.products(range(layer, layer + 1)))
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
    forward_pass = ForwardPass(model)
    groups: dict[range, MatrixGroup] = {}
    updates: dict[tuple[int, range], LayerUpdate] = {}
    for site in sites:
        if site.group not in groups:
            widths = geometry.widths[site.group.start : site.group.stop]
            side_by_side = tuple(enumerate(accumulate(widths[:-1], initial=0)))
            whole = site.places == side_by_side and features(site.linear)[1] == sum(widths)
            groups[site.group] = MatrixGroup(adapter, site.group, site.writes, whole, forward_pass)
        update = updates.setdefault((site.layer, site.group), LayerUpdate(groups[site.group], site.layer))
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
        linear.update.group.forward_pass.leave()
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
