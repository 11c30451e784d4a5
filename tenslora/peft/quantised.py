"""Merging into quantised weights, which PEFT knows how to dequantise and to quantise again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from tenslora.errors import TensLoRAError, first_line

_UNMERGED = "an update cannot be added to a weight of this kind; leave the adapter unmerged"
_REPLACES_THE_LAYER = "hqq"


def warn_of_rounding(model: nn.Module, changes: Iterable[tuple[float, float]]) -> None:
    """Warn by how much rounding has changed the weights of a model to which updates were added.

    Args:
        model: the model.
        changes: what `QuantisedWeights.add` returned for each Linear. Without any there is no warning.
    """
    rounding, size = (math.fsum(parts) for parts in zip((0.0, 0.0), *changes, strict=True))
    if size:
        warnings.warn(
            f"{type(model).__name__}: its weights are quantised and were rounded again, which changes them by "
            f"{math.sqrt(rounding / size):.1%} of the update's size",
            stacklevel=4,
        )


class QuantisedWeights:
    """How the weight of a quantised Linear is changed.

    Args:
        linear: the Linear.
        model: the model that it belongs to, which knows how it was quantised where transformers has done it.

    Raises:
        TensLoRAError: if this kind of weight cannot be quantised again.
    """

    def __init__(self, linear: nn.Module, model: nn.Module) -> None:
        weight = getattr(linear, "weight", None)
        own = getattr(linear, "plain_class", type(linear))
        has_own_type = isinstance(weight, Tensor) and type(weight) not in (nn.Parameter, Tensor)
        kind = type(weight).__name__ if has_own_type else own.__name__
        try:
            self._backend = resolve_quantization_backend(linear, **get_quantization_kwargs(model))
        except ValueError as error:
            raise TensLoRAError(f"{kind}: {_UNMERGED} ({first_line(error)})") from error
        backend = self._backend
        if backend is None or not backend.supports_merge or backend.backend_name == _REPLACES_THE_LAYER:
            raise TensLoRAError(f"{kind}: {_UNMERGED}")
        try:
            backend.get_base_weight(linear)
        except NotImplementedError as error:
            raise TensLoRAError(f"{kind}: {_UNMERGED} ({first_line(error)})") from error

    @torch.no_grad()
    def require_finite_sum(self, path: str, linear: nn.Module, update: Tensor) -> None:
        """Check that the weight can hold an update, see `attachment.require_finite_sum`.

        Args:
            path: what a message calls the weight.
            linear: the Linear.
            update: what is to be added, (outputs, inputs).

        Raises:
            TensLoRAError: if the sum holds a NaN or an infinity in the type that the weight is dequantised to.
        """
        weight = self._backend.get_base_weight(linear)
        if not torch.isfinite(weight + update.to(weight)).all():
            raise TensLoRAError(f"{path}: its weight would hold a NaN or an infinity with its update")

    @torch.no_grad()
    def add(self, linear: nn.Module, update: Tensor) -> tuple[float, float]:
        """Dequantise the weight, add an update, and quantise the sum.

        Args:
            linear: the Linear.
            update: what to add, (outputs, inputs).

        Returns:
            The squared Frobenius norms of the rounding error and of the update.
        """
        before = self._backend.get_base_weight(linear)
        wanted = before + update.to(before)
        self._backend.set_base_weight(SimpleNamespace(get_base_layer=lambda: linear), wanted)
        rounding = self._backend.get_base_weight(linear) - wanted
        return rounding.square().sum().item(), update.square().sum().item()
