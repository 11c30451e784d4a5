"""One factorised tensor as a trainable module, and the thin slices of several layers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tenslora.adapter_config import LARGEST_SCALE
from tenslora.constructions import DEPTH, PROJECTION, SITE
from tenslora.errors import TensLoRAError
from tenslora.factorizations.factorization import Factorization

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has none


class ScaledModule(nn.Module):
    """A module whose updates are multiplied by its attribute scale: a number, or a tensor of one, as to train it.

    Raises:
        TensLoRAError: if scale is set to anything else, to NaN, or beyond `LARGEST_SCALE`.
    """

    scale: float

    def __setattr__(self, name: str, value: Any) -> None:
        # A property would not do: torch registers no parameter under the name of one.
        if name == "scale":
            value = _require_scale(value)
            self._parameters.pop(name, None)  # torch puts no number in the place of a parameter
        super().__setattr__(name, value)


def _require_scale(value: Any) -> float | Tensor:
    is_tensor = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if is_tensor and value.is_meta:
        return cast(Tensor, value)
    number = value.detach().item() if is_tensor else value
    if not isinstance(number, Real) or not abs(cast(float, number)) <= LARGEST_SCALE:
        given = "" if isinstance(value, Integral) else f"={value!r}"  # Python prints no very large one
        raise TensLoRAError(
            f"scale{given}: must be a finite number, from -1,000,000 to 1,000,000, or a tensor of one such number"
        )
    return cast(Tensor, value) if is_tensor else float(number)


class FactorizedTensor(nn.Module):
    """The parameters of one tensor in factorised form.

    The module's parameters have the names and shapes of `Factorization.shapes`. The one that
    `Factorization.zero_parameter` names starts at zero, so every update starts at zero; the others are drawn in order.
    The noise of `Factorization.noise`, if there is any, is drawn after them and kept as buffers.

    Args:
        factorization: the formulas of the factorised form.
        modes: the name and the size of each mode, as `constructions.modes` gives them.
        ranks: the ranks, in the order of `Factorization.rank_limits`.
        layers: the number of layers L of the backbone.
        seed: the seed of the random stream that the parameters are drawn from.
        init: "orthogonal" (orthonormal columns, or orthonormal rows where a factor has more columns than rows),
            "normal" (standard deviation 1 / sqrt(n), so that a column has length 1 on average) or "kaiming_uniform"
            (uniform within 1 / sqrt(n), as LoRA starts). The columns run over a parameter's last dimension; n is the
            product of the other dimensions.
        head_layout: how d_head and head make up d_out; see `Factorization.slices`.
    """

    def __init__(
        self,
        factorization: Factorization,
        modes: Mapping[str, int],
        ranks: Sequence[int],
        layers: int,
        seed: int,
        init: str = "orthogonal",
        head_layout: str = "aligned",
    ) -> None:
        super().__init__()
        self.factorization, self.layers, self.head_layout = factorization, layers, head_layout
        self._seed, self._init = seed, init
        self.names = tuple(factorization.shapes(modes, ranks))
        self.modes = dict(modes)
        self.zero_parameter = factorization.zero_parameter(modes)
        # Where the default is a type of 16 bits, as while a large model is loaded, it would hold the parameters too
        # roughly to train them, and torch could not draw orthogonal ones.
        self._drawn_in = dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name, shape in factorization.shapes(modes, ranks).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        for name, shape in factorization.noise(modes).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorizedTensor:
        # `model.to(memory_format=torch.channels_last)` refuses five dimensions, and a core is no image.
        def own(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten()).view(tensor.shape) if tensor.dim() > 4 else fn(tensor)

        super()._apply(own, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters and the noise as at the start, with the same numbers.

        By this name torch's own layers get numbers after `Module.to_empty`, which takes them off the device meta.
        """
        generator = torch.Generator().manual_seed(self._seed)
        for name, parameter in self.named_parameters():
            if name == self.zero_parameter:
                parameter.zero_()
            elif not parameter.is_meta:
                drawn = _drawn(parameter.shape, self._drawn_in, self._init, generator)
                if hasattr(parameter, "device_mesh"):  # every process holds a part of it
                    from torch.distributed.tensor import distribute_tensor  # which takes a second to import

                    placed: Any = parameter
                    drawn = distribute_tensor(drawn.to(placed.device), placed.device_mesh, placed.placements)
                parameter.copy_(drawn)
        for _, noise in self.named_buffers():
            if not noise.is_meta:
                noise.copy_(torch.randn(noise.shape, generator=generator, dtype=self._drawn_in, device="cpu"))

    def slices(self, layer: int) -> tuple[Tensor, Tensor]:
        """The thin slices of one layer.

        Args:
            layer: 0-based.

        Returns:
            left (1 or P, d_in, r) and right (P, r, d_out), as `Factorization.slices` gives them.
        """
        left, right = thin_slices([self], range(layer, layer + 1))
        return left[0], right[0]

    def full(self) -> Tensor:
        """The complete tensor, whose dimensions are the modes; see `Factorization.full`."""
        return self.factorization.full(self.parts(), self.modes)

    def parts(self) -> dict[str, Tensor]:
        """The parameters and the noise by name.

        Raises:
            TensLoRAError: if one is computed from other tensors.
        """
        parts = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name in self.names:
            if name not in parts:
                raise TensLoRAError(
                    f"{name}: is computed from other tensors in the adapter, as after pruning or a parametrization; "
                    f"make it a parameter again first (prune.remove, remove_parametrizations)"
                )
        return parts


def thin_slices(
    tensors: Sequence[FactorizedTensor],
    layers: range,
    positions: range | None = None,
    scale: float = 1.0,
    assemble: Callable[[Tensor, Tensor], Any] = lambda left, right: (left, right),
) -> Any:
    """The thin slices of neighbouring layers, computed together.

    Args:
        tensors: the one tensor that stacks the layers; or one tensor for each of `layers`, all with equal modes and
            ranks.
        layers: which layers.
        positions: which positions of the projection axis, or of each layer's part of the site axis; None for all.
        scale: multiplies the updates.
        assemble: turns one layer's (left, right) of `Factorization.slices` into the tensors that are wanted.

    Returns:
        What `assemble` returns, with the layers as an additional first dimension.
    """
    factorization, head_layout = tensors[0].factorization, tensors[0].head_layout
    dim = factorization.structure_dim
    each = [tensor.parts() for tensor in tensors]
    for parameters in each:
        if SITE in parameters:  # (P * layers) becomes (P, layers)
            parameters[SITE] = torch.unflatten(parameters[SITE], dim, (-1, tensors[0].layers))
        if positions is not None:
            axis = SITE if SITE in parameters else PROJECTION
            parameters[axis] = parameters[axis].narrow(dim, positions.start, len(positions))

    stacked_axis = DEPTH if DEPTH in each[0] else SITE if SITE in each[0] else None
    if stacked_axis is None:
        batch = {name: torch.stack([parameters[name] for parameters in each]) for name in each[0]}
        batch_dims: dict[str, int | None] = dict.fromkeys(batch, 0)
    else:
        along = dim if stacked_axis == DEPTH else dim + 1
        batch = {**each[0], stacked_axis: each[0][stacked_axis].narrow(along, layers.start, len(layers))}
        batch_dims = {name: along if name == stacked_axis else None for name in batch}
    zero_parameter = tensors[0].zero_parameter
    batch[zero_parameter] = batch[zero_parameter] * scale  # the updates are linear in this parameter

    def one_layer(parameters: Mapping[str, Tensor]) -> Any:
        return assemble(*factorization.slices(parameters, head_layout))

    if _is_exporting():
        # In a graph, nothing uses the step that begins vmap. Passes such as torchao's drop it; then the graph fails.
        each_layer = []
        for number in range(len(layers)):
            dims = batch_dims.items()
            own = {name: batch[name] if at is None else batch[name].select(at, number) for name, at in dims}
            each_layer.append(one_layer(own))
        return tree_map(lambda *same: torch.stack(same), *each_layer)
    return torch.vmap(one_layer, in_dims=(batch_dims,))(batch)


def _drawn(shape: Sequence[int], dtype: torch.dtype, init: str, generator: torch.Generator) -> Tensor:
    drawn = torch.zeros(shape, dtype=dtype, device="cpu")  # where the random stream is
    columns = drawn.flatten(0, -2)
    scale = 1 / math.sqrt(columns.shape[0])
    if init == "orthogonal":
        nn.init.orthogonal_(columns, generator=generator)
    elif init == "normal":
        columns.normal_(std=scale, generator=generator)
    else:
        columns.uniform_(-scale, scale, generator=generator)
    if not drawn.any():
        raise TensLoRAError(
            "torch.nn.init does nothing here, as under no_init_weights of transformers; make the adapter outside of it"
        )
    return drawn
