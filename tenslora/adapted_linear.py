"""Adds the update to the output of a Linear layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import MethodType, new_class
from typing import Any, ClassVar, Generic, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tenslora.adapter import Adapter
from tenslora.errors import TensLoRAError, first_line
from tenslora.forward_pass import LayerCall
from tenslora.projections import Columns, features, is_conv1d
from tenslora.thin_products import MatrixGroup, saved_tensors_hooks, without_autocast


class LayerUpdate:
    """The update of one Linear layer, ``alpha x dW`` for each matrix that the layer holds.

    Args:
        linear: the layer, a Linear or transformers' Conv1D.
        shared: this layer's matrices of the group that reads the same input.
        columns: the output columns of each matrix that the layer holds.
        call: the note that the layer is called, from `ForwardPass.layer`.

    Attributes:
        added: a copy of the adapter as it was when the update was added to the weight; empty while it is not merged.
        loaded: whether load_state_dict has given a merged layer its weight, and the model has yet to see to `added`.
        disabled: how many contexts of `attachment.disabled` hold, in which the layer leaves the update out.
        own_forward: the layer's own `forward` where it is an attribute of the layer instead of its class, as after
            accelerate has hooked it.
    """

    def __init__(self, linear: nn.Module, shared: SharedInput, columns: tuple[Columns, ...], call: LayerCall) -> None:
        self.outputs, self.is_transposed = features(linear)[1], is_conv1d(linear)
        self.shared = shared
        self.columns = columns
        self.call = call
        self.added: tuple[Adapter, ...] = ()
        self.loaded = False
        self.disabled = 0
        self.own_forward: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in none of the contexts of `disabled`, none of which would end for it.
        if self.disabled:
            warnings.warn(
                "a copy or pickle that is made inside `disabled` has its adapter enabled: a process that gets it "
                "computes with the adapter, and a cache by its content (joblib, datasets) returns adapted results",
                stacklevel=2,
            )
        return {**vars(self), "disabled": 0}

    @property
    def merged(self) -> bool:
        """Whether the layer's weight holds the update."""
        return bool(self.added)

    def add_to(self, y: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        """Add the update's output to the Linear's, y += h @ right; the products contain alpha.

        Args:
            y: the output so far, (tokens, outputs). It is changed in place where nothing else needs it.
            x: the input as the module received it, (..., inputs).
            tokens: the same numbers as (tokens, inputs).

        Returns:
            The sum, (tokens, outputs).
        """
        in_place = not _needs_output_again()
        if len(self.columns) == 1 and self.columns[0].start == 0:
            # A Linear of a single matrix, such as BERT's query.
            h, right = self.shared.product_of(x, tokens, self.columns[0].matrix, y.dtype)
            if right.shape[1] == y.shape[1]:
                return y.addmm_(h, right) if in_place else y.addmm(h, right)
            hs, rights = [h], [right]
        else:
            # A Linear of several matrices, such as timm's qkv.
            hs, rights = self.shared.all_products(tokens, y.dtype)
            if len(hs) == 1 and self.shared.group.fused_parts:
                return y.addmm_(hs[0], rights[0]) if in_place else y.addmm(hs[0], rights[0])
            rights = [rights[columns.matrix] for columns in self.columns]
            hs = hs if len(hs) == 1 else [hs[columns.matrix] for columns in self.columns]
        # Without gradients torch.compile traces no Function that changes its input, and it fuses the additions itself.
        if in_place and not torch.compiler.is_compiling():
            updated: Tensor = _AddToColumns.apply(y, self.columns, *rights, *hs)
            return updated
        for number, (columns, right) in enumerate(zip(self.columns, rights, strict=True)):
            y = y + columns.spread(hs[number % len(hs)] @ right, y.shape[1])
        return y

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """The update of the whole layer as one product, alpha dW = left @ right.

        Of a merged layer it is the update that was added, whatever has become of the adapter since.

        Returns:
            left (inputs, r) and right (r, outputs). If the matrices that the layer holds do not share left, r is the
            sum of their ranks and right is block diagonal.
        """
        layers, group = range(self.shared.layer, self.shared.layer + 1), self.shared.group
        with without_autocast(next(group.adapter.parameters()).device):
            lefts, rights = ([t[0] for t in side] for side in group.products(layers, *self.added))
        held = lefts if len(lefts) == 1 else [lefts[columns.matrix] for columns in self.columns]
        right = held[0].new_zeros(sum(left.shape[1] for left in held), self.outputs)
        row = 0
        for columns in self.columns:
            own = rights[columns.matrix]
            columns.of(right.narrow(0, row, len(own))).copy_(torch.unflatten(own, 1, (columns.parts, -1)))
            row += len(own) if len(lefts) > 1 else 0
        return torch.cat(held, dim=1), right

    def dense(self) -> Tensor:
        """What the adapter adds to the layer's weight, alpha dW, laid out as the weight is.

        Returns:
            (outputs, inputs), or (inputs, outputs) for a Conv1D.
        """
        left, right = self.as_lora()
        with without_autocast(left.device):
            update = left @ right
        return update if self.is_transposed else update.T


class AdaptedLinear(nn.Module):
    """A Linear layer that adds an update to its output: ``y = x W^T + b + alpha x dW``.

    W has shape (outputs, inputs), and dW, a product of two thin matrices, has shape (inputs, outputs).

    `put_on` makes a layer one: the layer stays the same object, with its parameters, hooks and child modules, and gets
    a class that derives from this one and from the layer's own.

    Attributes:
        layer_update: the update. Once it is merged, or while it is disabled, the layer computes what it does without.
        plain_class: the layer's own class.
    """

    weight: Tensor
    bias: Tensor | None
    layer_update: LayerUpdate
    plain_class: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Whoever makes a further layer of this one's class gets a plain layer, which has no update.
        self.__class__ = self.plain_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted output.

        Args:
            *args: the input x, (..., inputs), and whatever else the layer's own class takes.
            **kwargs: likewise; without any args, the first tensor is x.

        Returns:
            (..., outputs).

        Raises:
            TensLoRAError: if the layer's own class returns something else, or for an input that cannot be computed
                with.
        """
        update = getattr(self, "layer_update", None)
        if update is None:  # detached, and called by a function that was put around this one before
            return type(self).forward(self, *args, **kwargs)
        update.call.called = True
        plain = update.own_forward or super().forward
        x = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
        if x is None or update.added or update.disabled:
            return plain(*args, **kwargs)
        if len(args) + len(kwargs) > 1 or update.own_forward or not computes_as_linear(self.plain_class):
            return _added_to_copy(plain(*args, **kwargs), [update], x, self.plain_class)
        return _added_in_place(plain, [update], x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # what torch hands over when the state dict is loaded
            destination._metadata.setdefault(prefix[:-1], {})["merged"] = self.layer_update.merged

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        update = self.layer_update
        if f"{prefix}weight" in state and metadata.get("merged", update.merged) is not update.merged:
            this, other = ("merged", "not merged") if update.merged else ("not merged", "merged")
            raise TensLoRAError(
                f"{prefix[:-1]}: is {this}, and the state dict is that of a model that is {other}, whose weights are "
                f"others; call {'unmerge' if update.merged else 'merge'} before load_state_dict"
            )
        if update.added and f"{prefix}weight" in state:
            # A merged model's weight holds the update of the adapter that comes with it, which may be loaded later.
            update.added, update.loaded = (copy.deepcopy(update.shared.group.adapter),), True
        super()._load_from_state_dict(state, prefix, metadata, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TensLoRAError(
            "torch.jit.script cannot compile an adapter; merge and detach it first, or use torch.export"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds a class by its name, and this one was made here.
        parts: Any = super().__reduce_ex__(protocol)
        return (_new, (self.plain_class,), *parts[2:]) if has_our_class(self) else parts

    def _replicate_for_data_parallel(self) -> NoReturn:
        # The matrices of a layer share tensors, which DataParallel's copies would share across devices.
        raise TensLoRAError("DataParallel: cannot copy an adapter; start one process per device instead (torchrun)")


def put_on(linear: nn.Module, update: LayerUpdate) -> None:
    """Let a layer add an update to its output.

    Args:
        linear: the layer, a Linear or transformers' Conv1D. It becomes an `AdaptedLinear`.
        update: its update.
    """
    adapted = adapted_class(type(linear))
    attributes = vars(linear)  # a class may refuse attributes that it does not know
    wrapped = [name for name, value in attributes.items() if _is_forward_of(value, linear)]
    if "forward" in attributes and wrapped:
        # accelerate keeps the layer's forward under another name, from which its own calls it and gives it back.
        for name in wrapped:
            attributes[name] = MethodType(adapted.forward, linear)
    else:
        update.own_forward = attributes.pop("forward", None)
    attributes["layer_update"] = update
    linear.__class__ = adapted


def _is_forward_of(value: object, linear: nn.Module) -> bool:
    return isinstance(value, MethodType) and value.__self__ is linear and value.__func__ is type(linear).forward


def has_our_class(linear: AdaptedLinear) -> bool:
    """Whether a layer still has the class that `put_on` gave it, and not a further one, as after fully_shard."""
    return "plain_class" in vars(type(linear))


def take_off(linear: AdaptedLinear) -> None:
    """Let a layer compute what its own class does.

    Args:
        linear: the layer; `has_our_class` says whether this is possible.
    """
    update, attributes = linear.layer_update, vars(linear)
    for name, value in attributes.items():
        if _is_forward_of(value, linear):
            attributes[name] = MethodType(linear.plain_class.forward, linear)
    linear.__class__ = linear.plain_class  # type: ignore[assignment]
    del attributes["layer_update"]
    if update.own_forward is not None:
        attributes["forward"] = update.own_forward


_T = TypeVar("_T")
NO_NUMBERS = (
    "the adapter is on the device meta and has no numbers; give it those of a state dict, or where accelerate offloads "
    "weights, a device in device_map, as {..., 'base_model.tenslora_adapters': 'cpu'} in PEFT"
)
"""What is said where an adapter on the device meta was to compute, or to be merged."""
_CLASSES: dict[type[nn.Module], type[AdaptedLinear]] = {}  # those made so far, by the layers' own


def adapted_class(plain: type[nn.Module]) -> type[AdaptedLinear]:
    """The class of an adapted layer.

    Args:
        plain: the layer's own class.

    Raises:
        TensLoRAError: if no class can derive from it, or if it copies, pickles or compares its layers in a way of its
            own.
    """
    if plain not in _CLASSES:
        for name, effect in _REFUSED.items():
            if getattr(plain, name, None) is not getattr(nn.Linear, name, None):
                raise TensLoRAError(f"{plain.__name__} has a {name} of its own, {effect}")
        try:
            made = _derived(plain, (AdaptedLinear, plain))
            if not _can_become(plain, made):
                # Python compares the first classes of both, and a mixin that derives from ABC is none of torch's.
                base, generic = cast(Any, plain.__base__), cast(Any, Generic)
                base = generic[_T] if base is generic else base
                made = _derived(plain, (new_class("_First", (base,)), AdaptedLinear, plain))
                object.__new__(plain).__class__ = made
        except Exception as error:
            raise TensLoRAError(f"no class can derive from {plain.__name__} ({first_line(error)})") from error
        _CLASSES.setdefault(plain, made)
    return _CLASSES[plain]


def _derived(plain: type[nn.Module], bases: tuple[type[Any], ...]) -> type[AdaptedLinear]:
    return type(f"Adapted{plain.__name__}", bases, {"plain_class": plain})


def _can_become(plain: type[nn.Module], made: type[nn.Module]) -> bool:
    try:
        object.__new__(plain).__class__ = made
    except TypeError:
        return False
    return True


_COPYING = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__")
_REFUSED = {
    **dict.fromkeys(_COPYING, "which would lose the layer's update"),
    "__eq__": "by which torch takes layers that are equal for one, and leaves out the others",
}


def _new(plain: type[nn.Module]) -> AdaptedLinear:
    cls = adapted_class(plain)
    return cls.__new__(cls)


def add_updates(linear: nn.Module, updates: Sequence[LayerUpdate], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of a Linear with any number of updates, ``x W^T + b + sum of alpha x dW``.

    Args:
        linear: the Linear itself, which is called with its hooks.
        updates: the updates to add, in this order; each is that of an adapter of its own.
        x: (..., inputs).
        *args: passed on to the Linear.
        **kwargs: likewise.

    Returns:
        (..., outputs).

    Raises:
        TensLoRAError: if the Linear returns something else.
    """
    if args or kwargs or not computes_as_linear(type(linear)) or _is_hooked(linear):
        return _added_to_copy(linear(x, *args, **kwargs), updates, x, type(linear))
    return _added_in_place(linear, updates, x)


def computes_as_linear(kind: type[nn.Module]) -> bool:
    """Whether the layers of a class compute what a Linear or a Conv1D does, and return a new tensor.

    A subclass may return a tensor that autograd still needs, as after a relu, or compute with a rounded weight.

    Args:
        kind: the class of a layer that is not adapted.
    """
    return kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D"


def _is_hooked(linear: nn.Module) -> bool:
    # A hook may keep the output, or is to see it in the shape of the input.
    return bool(
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _added_in_place(plain: Callable[[Tensor], Tensor], updates: Sequence[LayerUpdate], x: Tensor) -> Tensor:
    # Given a matrix, Linear returns a new tensor, to which an update can be added in place. Given more dimensions, it
    # returns a view, which autograd would copy first.
    _refuse_tracing(x)
    call, outputs = updates[0].call, updates[0].outputs
    tokens = _tokens(x, call.path)
    y = plain(tokens)
    if y.shape[1] != outputs:
        raise TensLoRAError(
            f"{call.path}: has {y.shape[1]} outputs now, and had {outputs} when the adapter was put on it; change "
            f"the size of a layer before you attach"
        )
    for update in updates:
        y = update.add_to(y, x, tokens)
    return y.view(*x.shape[:-1], y.shape[-1])


def _tokens(x: Tensor, path: str) -> Tensor:
    if x.is_nested:
        raise TensLoRAError(f"{path}: its input is a nested tensor, to whose output no update can be added; pad it")
    if x.layout is not torch.strided:
        raise TensLoRAError(f"{path}: its input is sparse ({x.layout}), and must be dense; call to_dense()")
    return x.reshape(-1, x.shape[-1])


def _refuse_tracing(x: object) -> None:
    if not torch.compiler.is_compiling() and (isinstance(x, torch.fx.Proxy) or torch._C._is_tracing()):
        raise TensLoRAError(
            "torch.fx and torch.jit.trace cannot follow an adapter; merge and detach it first, or use torch.export"
        )


def _added_to_copy(plain: object, updates: Sequence[LayerUpdate], x: Tensor, kind: type[nn.Module]) -> Tensor:
    call, outputs = updates[0].call, updates[0].outputs
    _refuse_tracing(x)
    if not isinstance(plain, Tensor):
        raise TensLoRAError(
            f"{call.path}: a {kind.__name__} returns a {type(plain).__name__}, and an update can be added to a tensor "
            f"only"
        )
    if plain.shape != (*x.shape[:-1], outputs):
        raise TensLoRAError(
            f"{call.path}: a {kind.__name__} returns {tuple(plain.shape)} for {tuple(x.shape)}, and an update of "
            f"{outputs} outputs cannot be added to it"
        )
    tokens, y = _tokens(x, call.path), plain.reshape(-1, outputs).clone()
    for update in updates:
        y = update.add_to(y, x, tokens)
    return y.view(plain.shape)


def _needs_output_again() -> bool:
    # Under torch.func a tensor may stand for many, to which an update of one of them cannot be added in place.
    # Forward-mode derivatives are those of torch's own operations. Selective checkpointing keeps outputs.
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(mode).__name__ in _KEEPING for mode in _get_current_dispatch_mode_stack())
    )


_KEEPING = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")  # while a block runs, and while it runs again


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
        h for all three; the other two recognise the tensor by its identity and take their own h. They compute it anew
        if the tensor or, outside a forward pass, the adapter has changed in between, if their own products would have
        another type or other gradients, or if one of them is checkpointed without the other.

        Args:
            x: the input as the Linear received it, (..., inputs).
            tokens: the same numbers as (tokens, inputs).
            matrix: the matrix's index in the group.
            dtype: the output's dtype.

        Returns:
            h (tokens, r) and right (r, outputs).
        """
        outside = self.group.forward_pass.products is None
        pending = self.group.forward_pass.here.pending
        conditions = (dtype, torch.is_grad_enabled(), saved_tensors_hooks(), *self._versions(x, outside))
        key = *self.group.key, self.layer
        latest, earlier, products = pending.get(key, (None, (), {}))
        if latest is not x or earlier != conditions or matrix not in products:
            hs, rights = self.all_products(tokens, dtype)
            products = {index: (hs[index % len(hs)], right) for index, right in enumerate(rights)}
            pending[key] = x, conditions, products
            if outside and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
                for each in (*hs, *rights):  # a backward pass between two calls frees what they would share
                    if each.requires_grad:
                        each.register_hook(lambda _: pending.pop(key, None) and None)  # type: ignore[no-untyped-call]
        product = products.pop(matrix)
        if not products:
            pending.pop(key, None)
        return product

    def _versions(self, x: Tensor, outside: bool) -> Iterator[object]:
        # torch counts the changes of a tensor, except in inference mode, where an x may have changed at any time. What
        # torch.compile traces changes none.
        if torch.compiler.is_compiling():
            return
        yield object() if x.is_inference() else x._version
        for parameter in self.group.adapter.parameters() if outside else ():
            yield 0 if parameter.is_inference() else parameter._version

    def all_products(self, tokens: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The thin products of all matrices.

        Args:
            tokens: the input as (tokens, inputs).
            dtype: the output's dtype.

        Returns:
            hs: the h (tokens, r) of each matrix, or a single h if the matrices share left.
            rights: the right of each matrix, or a single right, as in `LayerProducts`.

        Raises:
            TensLoRAError: if the adapter is on the device meta, and the tokens are not, or if the tokens are divided
                among processes, and the adapter is not.
        """
        adapter = self.group.adapter
        left_t, rights, ranks = self.group.of_layer(self.layer, dtype)
        if left_t.device.type == "meta" and tokens.device.type != "meta":  # h would be whatever the memory holds
            raise TensLoRAError(NO_NUMBERS)
        if is_dtensor(tokens) != is_dtensor(left_t):
            raise TensLoRAError(
                "the input of an adapted layer is divided among processes (DTensor), as for tensor parallelism, under "
                "which an adapter is not supported; merge and detach it first"
            )
        if left_t.device != tokens.device:  # of a model whose layers lie on several devices
            left_t, rights = left_t.to(tokens.device), tuple(right.to(tokens.device) for right in rights)
        # A quantised Linear may return float32 under autocast, which would make h another dtype.
        h = F.linear(adapter.dropout(tokens.to(dtype)), left_t).to(dtype)
        if adapter.rank_dropout.training and adapter.config.rank_dropout > 0:  # one mask for all tokens
            h = h * adapter.rank_dropout(h.new_ones(h.shape[1]))
        return [h] if len(ranks) == 1 else list(torch.split(h, ranks, dim=1)), list(rights)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is divided among processes.

    Args:
        tensor: any tensor.
    """
    return not torch.compiler.is_compiling() and type(tensor).__name__ == "DTensor"  # whose import takes a second


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
        blocks = [columns.of(grad).reshape(len(grad), columns.parts * columns.width) for columns in ctx.places]
        grad_rights = [hs[number % len(hs)].T @ block for number, block in enumerate(blocks)]
        grad_hs = [block @ right.T for block, right in zip(blocks, rights, strict=True)]
        if len(hs) == 1:
            grad_hs = [torch.stack(grad_hs).sum(0)] if len(grad_hs) > 1 else grad_hs
        return grad, None, *grad_rights, *grad_hs
