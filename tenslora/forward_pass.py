"""What the forward pass of an adapted model has computed so far, and whether it calls the layers that are adapted."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, FrameType, FunctionType, GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tenslora.adapter import Adapter, StagedAdapter
from tenslora.errors import TensLoRAError

_NOT_COMPUTED_YET = (GeneratorType, CoroutineType, AsyncGeneratorType, FunctionType)
"""What a forward pass may return before it has called any layer."""


class ForwardPass:
    """The forward pass of an adapted model that is running, if any; each thread has its own.

    Hooks on the model notice when a pass begins and when it ends, even by an exception. torch calls no hook after
    Ctrl-C; that such a pass is over is seen from Python's stack, which no longer holds its call. What a pass has
    computed lasts until its end: outside a pass, nothing would tell us when a result has gone stale.

    The first pass is also checked. A model may read a Linear's weight without calling the Linear, and an adapter there
    would have no effect. If no layer with the matrices of some name is called, the pass raises a `TensLoRAError`; if
    only some of its layers are called, it warns.

    Args:
        model: the adapted model. A forward pass is a call of this module.

    Attributes:
        watched: the adapter that the layers use, and its name in the model; None in PEFT.
        in_ddp: whether the latest pass was inside DistributedDataParallel, in any thread.
    """

    watched: tuple[str, nn.Module] | None = None
    in_ddp = False

    def __init__(self, model: nn.Module) -> None:
        self.here = _InThisThread()
        self._model = type(model).__name__
        self._calls: dict[str, list[LayerCall]] = {}  # by the name of a matrix
        self._checked = False
        self._hooks: tuple[RemovableHandle, ...] = ()

    def put_hooks(self, model: nn.Module) -> None:
        """Put the hooks on the model, once its layers are adapted: another thread may be in a forward pass of it.

        Args:
            model: the adapted model.
        """
        self._hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        )

    def layer(self, path: str, matrices: Sequence[str]) -> LayerCall:
        """Check that the first pass calls a layer.

        Args:
            path: the layer's path.
            matrices: the names of the matrices that the layer holds.

        Returns:
            The layer's note, in which the layer is to set `called`.
        """
        call = LayerCall(path)
        for name in matrices:
            self._calls.setdefault(name, []).append(call)
        return call

    def require_own_adapter(self, model: nn.Module) -> None:
        """Check that nobody has put another adapter in the place of the one that the layers use.

        Args:
            model: the adapted model.

        Raises:
            TensLoRAError: if the model holds another one.
        """
        name, used = self.watched or ("", None)
        held = model._modules.get(name)
        if held is used or used is None:
            return
        adapters = (Adapter, StagedAdapter)
        if held is None or not any(isinstance(part, adapters) for part in held.modules()):  # as of an edited Sequential
            there = f"is a {type(held).__name__}" if held is not None else "is not there"
            raise TensLoRAError(
                f"{self._model}: {name} {there}, and must be the adapter that its layers use, which attach has put "
                f"there as the model's last child; change the model before attach, or after detach"
            )
        if not isinstance(held, adapters):  # in a wrapper
            return
        # accelerate's compile_regions puts a copy there that has the same tensors.
        if next(held.parameters()) is not next(used.parameters()):
            raise TensLoRAError(
                f"{self._model}: {name} is another adapter than the one that its layers use; attach(model, "
                f"detach(model)) puts it on them"
            )

    @property
    def products(self) -> dict[Hashable, Any] | None:
        """The thin products that the pass of this thread has computed, to which it adds; None outside a pass."""
        here = self.here
        if here.frame is not None and not torch.compiler.is_compiling() and not _is_running(here.frame):
            here.leave()
        return here.products

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        # torch cannot copy the handles of a model that no longer exists, where a part of it has outlived it.
        return vars(self) | {"_hooks": tuple(hook for hook in self._hooks if hook.hooks_dict_ref() is not None)}

    def _begin(self, model: nn.Module, *_: Any) -> None:
        self.here.leave()
        if not torch.compiler.is_compiling():
            self.require_own_adapter(model)
            ddp = nn.parallel.DistributedDataParallel._active_ddp_module
            self.in_ddp = ddp is not None and not ddp.static_graph
            self.here.frame = sys._getframe(1)  # that of torch's Module.__call__
        self.here.products = {}

    def _end(self, _model: nn.Module, _inputs: Any, output: Any) -> None:
        # A pass that was running when the adapter was put on has not begun here, and a generator computes later.
        is_whole = self.here.products is not None and not isinstance(output, _NOT_COMPUTED_YET)
        self.here.leave()
        if torch.compiler.is_compiling():  # which warns if a hook looks at the output
            self._require_every_kind()
        elif is_whole and output is not None and not self._checked:  # None after an exception
            self._require_every_kind()
            self._checked = True
            self._warn_of_uncalled_layers()

    def _require_every_kind(self) -> None:
        # torch.compile traces this, and then looks at one note of each list before it runs what it has compiled.
        for name, calls in self._calls.items():
            for call in calls:
                if call.called:
                    break
            else:
                paths = [call.path for call in calls]
                others, anew = "adapt", "attach(model, detach(model))"
                if self.watched is None:
                    others, anew = "adapt or target_modules", "unload() and get_peft_model"
                raise TensLoRAError(
                    f"{self._model}: its forward pass calls none of the layers that hold the {name} matrices "
                    f"({listed(paths)}), so an adapter there has no effect; choose other matrices with {others}, or "
                    f"{anew} if layers were replaced since"
                )

    def _warn_of_uncalled_layers(self) -> None:
        layers = {call.path: call for calls in self._calls.values() for call in calls}
        uncalled = [path for path, call in layers.items() if not call.called]
        if uncalled:
            warnings.warn(
                f"{self._model}: its first forward pass calls {len(layers) - len(uncalled)} of the {len(layers)} "
                f"adapted layers, and not {listed(uncalled)}; an update has no effect, and is not trained, where its "
                f"layer is not called",
                stacklevel=2,
            )


@dataclass
class LayerCall:
    """Whether the forward pass calls one layer.

    The layer sets `called` in every pass and never reads it. That costs less than to ask whether the first pass is
    over, and it leaves torch.compile nothing that could change between two passes.

    Args:
        path: the layer's path in the model.
        called: whether the layer has been called, in the first pass or by itself before it.
    """

    path: str
    called: bool = False


class _InThisThread(threading.local):
    """The pass that runs in one thread.

    Args (all of them attributes):
        products: the thin products of all layers by group, see `thin_products.MatrixGroup`; None outside a pass.
        pending: of one layer's group, the latest input, the conditions under which it was multiplied, and the products
            of the matrices that have not asked for them yet, see `adapted_linear.SharedInput`.
        frame: the call of the model that is the pass; None outside a pass, and in one that torch.compile has traced.
    """

    def __init__(self) -> None:  # torch.compile finds only attributes that every thread's object has from the start
        self.products: dict[Hashable, Any] | None = None
        self.pending: dict[Hashable, tuple[Tensor, tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]]] = {}
        self.frame: FrameType | None = None

    def leave(self) -> None:
        """Forget the pass."""
        self.products, self.pending, self.frame = None, {}, None

    def __reduce__(self) -> tuple[type[_InThisThread], tuple[()]]:
        # A copy is of a model, and begins outside a pass. Products may belong to an autograd graph, which cannot be
        # copied.
        return type(self), ()


def _is_running(frame: FrameType) -> bool:
    # Whether a call has begun in this thread and not ended.
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def listed(paths: Sequence[str]) -> str:
    """The first three of some names, and how many more there are.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d"])
    ('a, b', 'a, b, c and 1 more')

    Args:
        paths: the names.
    """
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
