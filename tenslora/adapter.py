"""All tensors of one model: its updates, its dense form, its state on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from tenslora.constructions import PROJECTION, SITE, TENSOR_SEEDS, Geometry, modes, stacked_axes, tensor_grid
from tenslora.errors import TensLoRAError
from tenslora.factorizations import factorization_of
from tenslora.files import read_safetensors, write_safetensors
from tenslora.ranks import RankStrategy
from tenslora.streams import stream_seed
from tenslora.tensor import FactorizedTensor, layer_slices

FORMAT = "tenslora-1"

_Products = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class TensLoraConfig:
    """What makes an adapter, apart from the backbone's geometry.

    adapt: which matrices of a layer, see `constructions.adapted_matrices`. tensor_mode: one of
    `constructions.CONSTRUCTIONS`. factorization: one of `factorizations.FACTORIZATIONS`; lora's
    tensors are matrices, A B whatever it says. rank_strategy: how the ranks are chosen.
    alpha: multiplies the update directly (no division by the rank). dropout: probability, on the adapter's
    input; query, key and value of a layer share one mask, as they share the input. rank_dropout: probability, for
    each component of the thin products of a layer, to be left out of a step for all its tokens.
    init, head_layout: see `tensor.FactorizedTensor`; lora starts as PEFT's does whatever `init` says.
    tensor_seeds: distinct gives every tensor its own random stream; equal starts all tensors of a shape alike,
    as the paper's released code does. seed: of those streams, which nothing else draws from.
    """

    tensor_mode: str = "qkv_depth"
    rank_strategy: RankStrategy = field(default_factory=RankStrategy)
    alpha: float = 4.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    init: str = "orthogonal"
    head_layout: str = "aligned"
    tensor_seeds: str = "distinct"
    seed: int = 0
    factorization: str = "tucker"
    adapt: str = "qkv"

    def __post_init__(self) -> None:
        if not isinstance(self.rank_strategy, RankStrategy):
            raise TensLoRAError(
                f"rank_strategy={self.rank_strategy!r}: must be a RankStrategy, as RankStrategy('isorank')"
            )
        for name in ("dropout", "rank_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TensLoRAError(f"adapter.{name}={getattr(self, name)}: must be from 0 to below 1")
        if not math.isfinite(self.alpha):
            raise TensLoRAError(f"adapter.alpha={self.alpha}: must be a finite number")
        if self.tensor_seeds not in TENSOR_SEEDS:
            raise TensLoRAError(f"adapter.tensor_seeds={self.tensor_seeds}: must be one of {', '.join(TENSOR_SEEDS)}")


class Adapter(nn.Module):
    """The trainable updates of all P projections in all L layers of one backbone.

    >>> adapter = Adapter(TensLoraConfig("qkv_depth"), Geometry(d_in=768, heads=12, d_head=64, layers=12))
    >>> adapter.ranks, sum(p.numel() for p in adapter.parameters())
    ((4, 4, 4, 4), 6460)

    `ranks` stands in for the strategy's where they are known already, as in a saved adapter. Raises
    TensLoRAError for settings that do not fit the geometry.
    """

    def __init__(self, config: TensLoraConfig, geometry: Geometry, ranks: Sequence[int] | None = None) -> None:
        super().__init__()
        if config.adapt != geometry.adapt:
            raise TensLoRAError(f"adapter.adapt={config.adapt}: the geometry given is for {geometry.adapt}")
        self.config = config
        self.geometry = geometry
        self.ranks = tuple(ranks or config.rank_strategy.resolve(config.tensor_mode, geometry, config.factorization))
        self.grid = tensor_grid(config.tensor_mode, geometry)
        # Once, and not in every pass: torch.compile does not trace the look-up.
        self._over_projections = bool(stacked_axes(config.tensor_mode) & {PROJECTION, SITE})
        self.tensors = nn.ModuleList()
        for index in range(math.prod(self.grid)):
            stream = index if config.tensor_seeds == "distinct" else 0
            tensor = FactorizedTensor(
                factorization_of(config.tensor_mode, config.factorization),
                modes(config.tensor_mode, geometry, index // self.grid[1]),
                self.ranks,
                geometry.layers,
                torch.Generator().manual_seed(stream_seed("adapter", config.seed, stream)),
                # PEFT's start of lora_A: kaiming_uniform_ with a = sqrt 5, whose bound is 1 / sqrt d_in.
                "kaiming_uniform" if config.tensor_mode == "lora" else config.init,
                config.head_layout,
            )
            self.tensors.append(tensor)
        self.dropout = nn.Dropout(config.dropout)
        self.rank_dropout = nn.Dropout(config.rank_dropout)

    @property
    def zero(self) -> str:
        """The name, in each tensor, of the parameter that started at zero."""
        return cast(FactorizedTensor, self.tensors[0]).zero

    def layer(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """The thin products of one layer's matrices: see `products`, here without the dimension of layers."""
        lefts, rights = self.products(range(layer, layer + 1))
        return [left[0] for left in lefts], [right[0] for right in rights]

    def products(
        self, layers: range, matrices: range | None = None, scale: float = 1.0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The thin products of some matrices in some layers, scale dW[m] = left[m] @ right[m].

        layers, matrices: side by side; matrices are indices into `geometry.matrices`, None: all. Returns the matrices'
        lefts (layers, d_in, r), or only one where they share it, and their rights (layers, r, width).
        """
        wanted = range(len(self.geometry.matrices)) if matrices is None else matrices
        if self._over_projections:
            blocks = self.geometry.blocks
            start = sum(blocks[: wanted.start])
            places = None if matrices is None else range(start, start + sum(blocks[wanted.start : wanted.stop]))
            assembled = partial(self._assembled, matrices=wanted)
            return cast(_Products, layer_slices(self._tensors(0, layers), layers, places, scale, assembled))
        own = [layer_slices(self._tensors(m, layers), layers, scale=scale) for m in wanted]
        return [left[:, 0] for left, _ in own], [right[:, 0] for _, right in own]

    def _tensors(self, row: int, layers: range) -> list[FactorizedTensor]:
        # Of one row of the grid: the only one, or the layers' own.
        _, over_layers = self.grid
        columns = layers if over_layers > 1 else range(1)
        return [cast(FactorizedTensor, self.tensors[row * over_layers + column]) for column in columns]

    def _assembled(self, left: Tensor, right: Tensor, matrices: range) -> tuple[list[Tensor], list[Tensor]]:
        # From slices (1 or P, d_in, r) and (P, r, d_out) to matrices: a wide one is several slices side by side, and of
        # the last it may take only a part.
        blocks, widths = self.geometry.blocks, self.geometry.widths
        lefts, rights, start = [left[0]] if len(left) == 1 else [], [], 0
        for m in matrices:
            stop = start + blocks[m]
            if blocks[m] == 1:
                whole = right[start]
            elif len(left) == 1:
                whole = right[start:stop].transpose(0, 1).flatten(1)
            else:
                whole = torch.block_diag(*right[start:stop])  # type: ignore[no-untyped-call]
            if len(left) > 1:
                lefts.append(torch.cat(left[start:stop].unbind(), dim=1))
            rights.append(whole[:, : widths[m]])
            start = stop
        return lefts, rights

    def dense(self, layer: int) -> list[Tensor]:
        """dW of each of a layer's matrices, shape (d_in, width), without alpha: for looking at, not for training."""
        lefts, rights = self.layer(layer)
        return [lefts[m % len(lefts)] @ right for m, right in enumerate(rights)]

    def save(self, path: Path | str) -> Path:
        """Write the factors and, in the header, the config, geometry and ranks, as one safetensors file, atomically.

        Returns the path. Raises TensLoRAError if the file cannot be written.
        """
        header = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "geometry": dataclasses.asdict(self.geometry),
            "ranks": list(self.ranks),
        }
        return write_safetensors(Path(path), dict(self.state_dict()), header)


def load_adapter(path: Path) -> Adapter:
    """Read an adapter that `Adapter.save` wrote.

    Raises TensLoRAError if the file is missing, damaged, or not an adapter.
    """
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise TensLoRAError(f"{path}: not a TensLoRA adapter (the format in its header is {header.get('format')})")
    try:
        settings = dict(header["config"])
        strategy = settings.pop("rank_strategy")
        strategy["ranks"] = strategy["ranks"] and tuple(strategy["ranks"])
        config = TensLoraConfig(rank_strategy=RankStrategy(**strategy), **settings)
        adapter = Adapter(config, Geometry(**header["geometry"]), header["ranks"])
        adapter.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise TensLoRAError(f"{path}: its header does not fit the factors in it ({error})") from error
    return adapter
