"""One factorised tensor as a trainable module, and the slices of many layers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.constructions import DEPTH, HEAD_LAYOUTS, INITS, PROJECTION, SITE
from tenslora.errors import TensLoRAError
from tenslora.factorizations.factorization import Factorization


class FactorizedTensor(nn.Module):
    """The parameters of a factorization, and the slices that they make.

    Args:
        factorization: of the tensor. Its parameters become this module's, under their own names; the one that it names
            as `zero` starts there, the others are drawn in order.
        modes: name and size of each mode, as `constructions.modes` gives them.
        ranks: as the factorization's `rank_limits` names them.
        layers: of the backbone.
        generator: the random stream to draw from.
        init: orthogonal (orthonormal columns; rows where there are more columns than rows), normal (standard deviation
            1 / sqrt n, so that columns have unit length on average) or kaiming_uniform (bound 1 / sqrt n, LoRA's own).
            The columns run over a parameter's last dimension, and n counts all its others.
        head_layout: see `Factorization.slices`.
    """

    def __init__(
        self,
        factorization: Factorization,
        modes: Mapping[str, int],
        ranks: Sequence[int],
        layers: int,
        generator: torch.Generator,
        init: str = "orthogonal",
        head_layout: str = "aligned",
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise TensLoRAError(f"adapter.init={init}: must be one of {', '.join(INITS)}")
        if head_layout not in HEAD_LAYOUTS:
            raise TensLoRAError(f"adapter.head_layout={head_layout}: must be one of {', '.join(HEAD_LAYOUTS)}")
        self.factorization, self.layers, self.head_layout = factorization, layers, head_layout
        self.zero = factorization.zero(modes)
        for name, shape in factorization.shapes(modes, ranks).items():
            parameter = nn.Parameter(torch.zeros(shape))
            self.register_parameter(name, parameter)
            if name != self.zero:
                _draw(parameter, init, generator)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(left, right) of all slices of one layer: see `Factorization.slices`."""
        left, right = layer_slices([self], range(layer, layer + 1))
        return left[0], right[0]


def layer_slices(
    tensors: Sequence[FactorizedTensor],
    layers: range,
    places: range | None = None,
    scale: float = 1.0,
    form: Callable[[Tensor, Tensor], Any] = lambda left, right: (left, right),
) -> Any:
    """The slices of some layers, computed together: what `form` makes of each (left, right), with the layers in front.

    Args:
        tensors: one in which the layers are stacked, or one for each of the layers, of the same shapes.
        layers: side by side.
        places: which of the projection axis, or of site's for each layer; None: all.
        scale: multiplies the updates.
        form: from (left, right), as `Factorization.slices` gives them, to tensors.
    """
    dim = tensors[0].factorization.structure_dim
    own: list[dict[str, Tensor]] = [dict(tensor.named_parameters()) for tensor in tensors]
    for parameters in own:
        if SITE in parameters:  # (P * layers) to (P, layers)
            parameters[SITE] = torch.unflatten(parameters[SITE], dim, (-1, tensors[0].layers))
        if places is not None:
            axis = SITE if SITE in parameters else PROJECTION
            parameters[axis] = parameters[axis].narrow(dim, places.start, len(places))
    over = next((axis for axis in (DEPTH, SITE) if axis in own[0]), None)
    if over is None:
        stacked = {name: torch.stack([parameters[name] for parameters in own]) for name in own[0]}
        dims: dict[str, int | None] = dict.fromkeys(stacked, 0)
    else:
        along = dim if over == DEPTH else dim + 1
        stacked = {**own[0], over: own[0][over].narrow(along, layers.start, len(layers))}
        dims = {name: along if name == over else None for name in stacked}
    stacked[tensors[0].zero] = stacked[tensors[0].zero] * scale  # which the updates are linear in
    factorization, head_layout = tensors[0].factorization, tensors[0].head_layout

    def of_one_layer(parameters: Mapping[str, Tensor]) -> Any:
        return form(*factorization.slices(parameters, head_layout))

    return torch.vmap(of_one_layer, in_dims=(dims,))(stacked)


@torch.no_grad()
def _draw(parameter: Tensor, init: str, generator: torch.Generator) -> None:
    columns = parameter.flatten(0, -2)
    scale = 1 / math.sqrt(columns.shape[0])
    if init == "orthogonal":
        nn.init.orthogonal_(columns, generator=generator)
    elif init == "normal":
        nn.init.normal_(columns, std=scale, generator=generator)
    else:
        nn.init.uniform_(columns, -scale, scale, generator=generator)
