"""The adapter of one model: its tensors, the updates that they give, and the file that it is saved in.

An `Adapter` is that of layers of equal sizes. A model whose layers come in several sizes has a `StagedAdapter`, which
holds one `Adapter` for each size. Both have `stages`, so that code for any model reads ``for stage in adapter.stages``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tenslora.adapter_config import LARGEST_SCALE, AdapterConfig
from tenslora.constructions import PROJECTION, SITE, Geometry, modes, stacked_axes, tensor_grid
from tenslora.errors import TensLoRAError, require_path, require_type
from tenslora.factorizations import factorization_of
from tenslora.files import read_safetensors, require_tensors, write_safetensors
from tenslora.first_step import first_step, lora_first_step, over_stages
from tenslora.forms import from_json, shown
from tenslora.random_streams import stream_seed
from tenslora.ranks import RankStrategy, rank_limits
from tenslora.tensor import FactorizedTensor, ScaledModule, thin_slices

FORMAT = "tenslora-1"

_Products = tuple[list[Tensor], list[Tensor]]


class _AnyAdapter(nn.Module):
    # What the adapter of one stage and that of several have in common.

    config: AdapterConfig
    trained_beside: frozenset[str] = frozenset()
    """The names of the weights that `attach` or `load` has found to be trained beside the adapter; of one that was only
    read from a file, the names of what was saved beside it."""
    beside_sha256: str | None = None
    """Of an adapter that was read from a file, the SHA-256 of the head.safetensors that was saved beside it."""

    @property
    def stages(self) -> tuple[Adapter, ...]:
        raise NotImplementedError

    def _described(self, ranks: str, parts: str) -> str:
        config, count = self.config, sum(parameter.numel() for parameter in self.parameters())
        kind = config.tensor_mode if config.tensor_mode == "lora" else f"{config.tensor_mode}, {config.factorization}"
        scaling = "" if config.scaling == "direct" else f", scaling={config.scaling}"
        return f"{type(self).__name__}({kind}, {ranks}{scaling}; {count:,} parameters in {parts})"

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """Return the input. In an nn.Sequential or nn.ModuleList, the adapter becomes one of the children it calls.

        Args:
            x: anything. Further arguments, such as a mask, are ignored.
        """
        return x

    def require_as_declared(self) -> None:
        """Check that an adapter made from the config and the ranks, as `load_adapter` makes it, would compute the same.

        Raises:
            TensLoRAError: if the config, the scale or a factor's shape was changed by hand, or if a factor is computed
                from other tensors.
        """
        for stage in self.stages:
            stage._require_as_declared(self.config)

    def tensor_names(self) -> list[str]:
        """The names that the tensors of the adapter have in its file."""
        return [
            f"{place}.{name}"
            for place, tensor in self.named_modules()
            if isinstance(tensor, FactorizedTensor)
            for name in (*tensor.names, *tensor.factorization.noise(tensor.modes))
        ]

    def save(self, path: Path | str, beside: Sequence[str] = (), beside_sha256: str | None = None) -> Path:
        """Write the adapter to one safetensors file, atomically.

        The header holds the config, and the geometry and ranks of the stage or of each of several.

        Args:
            path: the file's path.
            beside: the names of the weights that are saved in a head.safetensors beside it, without which `load` then
                refuses the folder.
            beside_sha256: the SHA-256 of that file, with another of which `load` refuses the folder, too.

        Returns:
            The path.

        Raises:
            TensLoRAError: if the file cannot be written, if the adapter holds a NaN or an infinity, if a factor is
                computed from other tensors, or if the config or the ranks are not those that the adapter computes with,
                because they were changed by hand.
        """
        path = require_path("path", path)
        if path.is_dir():  # as where sentence-transformers saves each part of a model into a folder of its own
            raise TensLoRAError(
                f"{path}: cannot be written, because it is a folder; save_pretrained(model, folder) saves into one"
            )
        self.require_as_declared()
        of_stages = [
            {
                "geometry": dataclasses.asdict(stage.geometry),
                "ranks": list(stage.ranks),
                "first_step": stage.unscaled_first_step,
            }
            for stage in self.stages
        ]
        header: dict[str, Any] = {"format": FORMAT, "config": _as_saved(self.config)}
        header |= of_stages[0] if isinstance(self, Adapter) else {"stages": of_stages}
        header |= {"beside": list(beside)} if beside else {}
        header |= {"beside_sha256": beside_sha256} if beside_sha256 else {}
        own = set(self.tensor_names())  # without the buffers that a profiler adds to every module
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name in own}
        return write_safetensors(path, tensors, header, finite=tensors)


def _as_saved(config: AdapterConfig) -> dict[str, Any]:
    # A class of the user's own may have further fields, which no reader would know.
    saved = {field.name: getattr(config, field.name) for field in dataclasses.fields(AdapterConfig)}
    strategy = config.rank_strategy
    return saved | {
        "rank_strategy": {field.name: getattr(strategy, field.name) for field in dataclasses.fields(RankStrategy)}
    }


class Adapter(_AnyAdapter, ScaledModule):
    """The trainable updates of all adapted matrices of one backbone, or of one stage of it.

    >>> Adapter(AdapterConfig("qkv_depth"), Geometry(d_in=768, heads=12, d_head=64, layers=12))
    Adapter(qkv_depth, tucker, ranks d_in=60, d_out=60, projection=3, depth=12; 221,913 parameters in 1 tensor)

    Args:
        config: the settings.
        geometry: the backbone's dimensions.
        ranks: the ranks, where they are known already, as in a saved adapter; None to let the config's strategy choose
            them.
        first_step: the first step with a scale of 1, where it is known already, as in a saved adapter; None to find it.
        stage: the index of these layers' stage, 0-based. It chooses the random streams that the tensors are drawn from,
            so that stages do not start alike.

    Attributes:
        scale: multiplies the updates; a number, or a tensor of one. It is alpha, and with scaling="first_step" alpha
            times the ratio of LoRA's first step, at config.rank_strategy.rank, to the adapter's own.
        first_step: how far AdamW's first step with learning rate 1 moves the matrices: the root mean square, over all
            adapted matrices, of their updates' Frobenius norms. LoRA's and that of an orthogonal start follow from
            `first_step.first_step`; any other is measured on random gradients when the tensors are drawn.
        unscaled_first_step: the first step with a scale of 1.

    Raises:
        TensLoRAError: for settings that do not fit the geometry.
    """

    def __init__(
        self,
        config: AdapterConfig,
        geometry: Geometry,
        ranks: Sequence[int] | None = None,
        first_step: float | None = None,
        stage: int = 0,
    ) -> None:
        super().__init__()
        require_type("config", config, AdapterConfig)
        if type(config) is not AdapterConfig:  # a program's own class may have skipped the checks
            AdapterConfig.__post_init__(config)
        require_type("geometry", geometry, Geometry)
        require_type("stage", stage, int)
        if config.adapt != geometry.adapt:
            raise TensLoRAError(f"adapt={config.adapt}: must be {geometry.adapt}, as in the geometry")
        self.config = config
        self.geometry = geometry
        self._stage = stage
        if ranks is None:
            self.ranks = config.rank_strategy.resolve(config.tensor_mode, geometry, config.factorization)
        else:
            self.ranks = _require_ranks(ranks, config, geometry)
        self.grid = tensor_grid(config.tensor_mode, geometry)
        # This is looked up here and not in every forward pass, because torch.compile cannot trace the look-up.
        self._stacks_matrices = bool(stacked_axes(config.tensor_mode) & {PROJECTION, SITE})
        self.tensors = nn.ModuleList()
        for index in range(math.prod(self.grid)):
            # The first stage draws what a backbone of a single stage draws.
            stream = (index, stage) if stage else (index,)
            stream = stream if config.tensor_seeds == "distinct" else (0,)
            tensor = FactorizedTensor(
                factorization_of(config.tensor_mode, config.factorization),
                modes(config.tensor_mode, geometry, index // self.grid[1]),
                self.ranks,
                geometry.layers,
                stream_seed("adapter", config.seed, *stream),
                # PEFT draws lora_A by kaiming_uniform_ with a = sqrt(5), whose bound is 1 / sqrt(d_in).
                "kaiming_uniform" if config.tensor_mode == "lora" else config.init,
                config.head_layout,
            )
            self.tensors.append(tensor)
        self.dropout = nn.Dropout(config.dropout)
        self.rank_dropout = nn.Dropout(config.rank_dropout)
        self.unscaled_first_step = self._find_first_step() if first_step is None else _require_step(first_step)
        scale = self._declared_scale()
        if not abs(scale) <= LARGEST_SCALE:
            raise TensLoRAError(
                f"alpha={config.alpha}: gives with scaling=first_step a scale of {scale:g}; must be at most "
                f"{LARGEST_SCALE:,.0f}"
            )
        self.scale = scale
        self.first_step = abs(scale) * self.unscaled_first_step

    def _declared_scale(self) -> float:
        if self.config.scaling == "direct":
            return self.config.alpha
        lora = lora_first_step(self.geometry, self.config.rank_strategy.rank)
        return self.config.alpha * (lora / self.unscaled_first_step)

    def _require_as_declared(self, config: AdapterConfig) -> None:
        if "scale" in self._parameters:
            raise TensLoRAError(
                "scale: was made a parameter, and a file holds the config alone; make it a number again"
            )
        if self.config != config or self.scale != self._declared_scale():
            raise TensLoRAError(
                f"scale={float(self.scale):g}: is not that of the adapter's config, and a file holds the config alone; "
                f"make an adapter with another alpha instead"
            )
        for index, module in enumerate(self.tensors):
            tensor = cast(FactorizedTensor, module)
            for name, shape in tensor.factorization.shapes(tensor.modes, self.ranks).items():
                own = tuple(tensor.parts()[name].shape)
                if own != tuple(shape):
                    raise TensLoRAError(
                        f"tensors.{index}.{name}: has the shape {own}, not {tuple(shape)}, which follows from "
                        f"ranks={list(self.ranks)}; change ranks with rank_pruning.prune"
                    )

    def _find_first_step(self) -> float:
        config = self.config
        if config.init == "orthogonal" or config.tensor_mode == "lora":
            expected = first_step(config.tensor_mode, self.geometry, self.ranks, config.factorization)
            if expected is not None:
                return expected
        if any(parameter.is_meta for parameter in self.parameters()):  # has no numbers that could be measured
            # A new adapter would be on meta too where accelerate's init_empty_weights puts every parameter there.
            measured = copy.deepcopy(self).to_empty(device="cpu")
            for tensor in measured.tensors:
                cast(FactorizedTensor, tensor).reset_parameters()
            with torch.device("cpu"):
                return measured._measure_first_step()
        return self._measure_first_step()

    @torch.enable_grad()
    def _measure_first_step(self, draws: int = 4) -> float:
        # Each update gets a random gradient, and the parameters that start at zero take the signs of theirs. Random
        # signs would not do: where columns are not orthogonal, the signs correlate, and the step is up to 1.7 times as
        # large.
        generator = torch.Generator().manual_seed(stream_seed("first_step", self.config.seed))
        zeros = [cast(FactorizedTensor, tensor).get_parameter(self.zero_parameter) for tensor in self.tensors]
        layers, squares = range(self.geometry.layers), 0.0
        for _ in range(draws):
            updates = [update for layer in layers for update in self.dense(layer)]
            gradients = [torch.randn(update.shape, generator=generator) for update in updates]
            steps = torch.autograd.grad(updates, zeros, gradients)
            with torch.no_grad():
                for zero, step in zip(zeros, steps, strict=True):
                    zero.copy_(step.sign())
                squares += sum(update.square().sum().item() for layer in layers for update in self.dense(layer))
                for zero in zeros:
                    zero.zero_()
        return math.sqrt(squares / (draws * len(self.geometry.matrices) * len(layers)))

    def __repr__(self) -> str:
        # One line, also where the adapter is printed as a part of its model.
        names = rank_limits(self.config.tensor_mode, self.geometry, self.config.factorization)
        named = ", ".join(f"{name}={rank}" for name, rank in zip(names, self.ranks, strict=True))
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {named}"
        tensors = f"{len(self.tensors)} tensor{'s' * (len(self.tensors) > 1)}"
        return self._described(ranks, tensors)

    @property
    def stages(self) -> tuple[Adapter, ...]:
        """The adapters of the backbone's stages: this one alone."""
        return (self,)

    @property
    def zero_parameter(self) -> str:
        """The name of the parameter that starts at zero in every tensor."""
        return cast(FactorizedTensor, self.tensors[0]).zero_parameter

    def products(
        self, layers: range, matrices: range | None = None, scale: float = 1.0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The updates of some matrices in some layers as thin products, scale dW[m] = left[m] @ right[m].

        Args:
            layers: which layers, as a range of neighbours: a step other than 1 is refused.
            matrices: which matrices, likewise, as indices in `Geometry.matrices`; None for all.
            scale: multiplies the updates.

        Returns:
            The left (layers, d_in, r) and the right (layers, r, width) of each matrix. There is a single left if the
            matrices share it.

        Raises:
            TensLoRAError: if there is no such layer or matrix. Likewise in `layer_products` and in `dense`.
        """
        wanted = range(len(self.geometry.matrices)) if matrices is None else matrices
        _require_neighbours("layers", layers, self.geometry.layers)
        _require_neighbours("matrices", wanted, len(self.geometry.matrices))
        if self._stacks_matrices:
            counts = self.geometry.slices_per_matrix
            start = sum(counts[: wanted.start])
            positions = None if matrices is None else range(start, start + sum(counts[wanted.start : wanted.stop]))
            assemble = partial(self._matrices_from_slices, matrices=wanted)
            return cast(_Products, thin_slices(self._tensors_of(0, layers), layers, positions, scale, assemble))
        own = [thin_slices(self._tensors_of(m, layers), layers, scale=scale) for m in wanted]
        return [left[:, 0] for left, _ in own], [right[:, 0] for _, right in own]

    def layer_products(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """The updates of all matrices of one layer as thin products, dW[m] = left[m] @ right[m].

        Args:
            layer: 0-based.

        Returns:
            The left (d_in, r) and the right (r, width) of each matrix. There is a single left if the matrices share it.
        """
        require_type("layer", layer, int)
        lefts, rights = self.products(range(layer, layer + 1))
        return [left[0] for left in lefts], [right[0] for right in rights]

    def dense(self, layer: int) -> list[Tensor]:
        """The updates of all matrices of one layer, without alpha. They are for inspection: training never builds dW.

        Args:
            layer: 0-based.

        Returns:
            dW of each matrix, (d_in, width).
        """
        lefts, rights = self.layer_products(layer)
        return [lefts[m % len(lefts)] @ right for m, right in enumerate(rights)]

    def _tensors_of(self, row: int, layers: range) -> list[FactorizedTensor]:
        # One row of the grid holds a single tensor, or one for each layer.
        _, per_layer = self.grid
        columns = layers if per_layer > 1 else range(1)
        return [cast(FactorizedTensor, self.tensors[row * per_layer + column]) for column in columns]

    def _matrices_from_slices(self, left: Tensor, right: Tensor, matrices: range) -> tuple[list[Tensor], list[Tensor]]:
        # Turns one layer's slices, left (1 or P, d_in, r) and right (P, r, d_out), into the thin products of its
        # matrices. A matrix wider than d_out consists of several slices side by side, of which the last may be cut off.
        counts, widths = self.geometry.slices_per_matrix, self.geometry.widths
        lefts, rights, start = [left[0]] if len(left) == 1 else [], [], 0
        for m in matrices:
            stop = start + counts[m]
            if counts[m] == 1:
                complete = right[start]
            elif len(left) == 1:
                complete = right[start:stop].transpose(0, 1).flatten(1)
            else:
                complete = torch.block_diag(*right[start:stop])  # type: ignore[no-untyped-call]
            if len(left) > 1:
                lefts.append(torch.cat(left[start:stop].unbind(), dim=1))
            rights.append(complete[:, : widths[m]])
            start = stop
        return lefts, rights

    def resize(self, ranks: Sequence[int]) -> None:
        """Give the tensors other ranks. Their parameters stay the same objects, with zeros of the new shapes and
        without gradients.

        The scale and the first step stay those of the ranks that the adapter started with.

        Args:
            ranks: the ranks, in the order of `ranks.rank_limits`.

        Raises:
            TensLoRAError: if they are not as many whole numbers from 1 up, or if the adapter is in
                DistributedDataParallel. Nothing is changed then.
        """
        valid = _require_ranks(ranks, self.config, self.geometry)
        in_graph = {parameter for parameter in self.parameters() if _is_in_graph(parameter)}
        if in_graph and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise TensLoRAError(
                "the adapter's ranks cannot change while it is in DistributedDataParallel, or while its last loss or "
                "output is kept; delete these first, and wrap the model anew"
            )
        self.ranks = valid
        for module in self.tensors:
            tensor = cast(FactorizedTensor, module)
            for name, shape in tensor.factorization.shapes(tensor.modes, self.ranks).items():
                parameter = tensor.get_parameter(name)
                parameter.grad = None
                zeros = parameter.new_zeros(shape)
                if parameter in in_graph:  # torch forgets a graph's node for the old shape only when the type changes
                    parameter.data = zeros.to(torch.float16 if zeros.dtype is torch.float32 else torch.float32)
                parameter.data = zeros


class StagedAdapter(_AnyAdapter):
    """The trainable updates of a backbone whose layers come in stages of different sizes.

    Each stage has its own tensors, ranks and scale. All follow from the same settings.

    >>> stages = [Geometry(d_in=96, heads=3, d_head=32, layers=2), Geometry(d_in=192, heads=6, d_head=32, layers=2)]
    >>> make_adapter(AdapterConfig("qkv_depth"), stages)
    StagedAdapter(qkv_depth, tucker, ranks (16, 16, 3, 2), (19, 18, 3, 2); 13,790 parameters in 2 stages)

    Args:
        stages: the adapters of the stages, in the order of `projections.find_projections`, all with the same settings.

    Attributes:
        config: the settings.
        first_step: the root mean square, over all adapted matrices of all stages, as `Adapter.first_step` is over
            those of one.

    Raises:
        TensLoRAError: if the adapters have different settings, or if there are none.
    """

    def __init__(self, stages: Sequence[Adapter]) -> None:
        super().__init__()
        require_type("stages", stages, list, tuple)
        for stage in stages:
            require_type("an adapter in stages", stage, Adapter)
        if not stages:
            raise TensLoRAError("stages=[]: must hold at least one adapter")
        self.config = stages[0].config
        for index, stage in enumerate(stages):
            for name, value in vars(stage.config).items():
                if value != (first := getattr(self.config, name)):
                    raise TensLoRAError(f"stages: {name}={value} in stage {index}: must be {first}, as in stage 0")
        self.stage = nn.ModuleList(stages)  # so that the parameters are named stage.0.tensors.0.core
        self.first_step = over_stages([stage.first_step for stage in stages], [stage.geometry for stage in stages])

    def __repr__(self) -> str:
        ranks = ", ".join(str(stage.ranks if len(stage.ranks) > 1 else stage.ranks[0]) for stage in self.stages)
        return self._described(f"ranks {ranks}", f"{len(self.stages)} stages")

    def __getattr__(self, name: str) -> Any:
        # A property would not do: of an AttributeError in one, torch keeps only the name that was asked for.
        if name == "scale":
            raise AttributeError("scale: each of the adapter's stages has its own")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            raise TensLoRAError(f"scale={value}: would have no effect here; set that of each of the adapter's stages")
        super().__setattr__(name, value)

    @property
    def stages(self) -> tuple[Adapter, ...]:
        """The adapters of the backbone's stages."""
        return tuple(cast(Adapter, stage) for stage in self.stage)

    @property
    def zero_parameter(self) -> str:
        """The name of the parameter that starts at zero in every tensor."""
        return self.stages[0].zero_parameter


def make_adapter(
    config: AdapterConfig,
    geometries: Sequence[Geometry],
    ranks: Sequence[Sequence[int] | None] | None = None,
    first_steps: Sequence[float | None] | None = None,
) -> Adapter | StagedAdapter:
    """Make the adapter of a backbone of one or several stages.

    Args:
        config: the settings, which all stages share.
        geometries: the dimensions of each stage.
        ranks: the ranks of each stage, where they are known already; None as for `Adapter`.
        first_steps: likewise, the first step of each stage.

    Returns:
        An `Adapter` for a single stage, otherwise a `StagedAdapter`.

    Raises:
        TensLoRAError: for settings that do not fit one of the geometries.
    """
    unknown = [None] * len(geometries)
    each = zip(geometries, ranks or unknown, first_steps or unknown, strict=True)
    stages = [Adapter(config, *of_stage, stage=index) for index, of_stage in enumerate(each)]
    return stages[0] if len(stages) == 1 else StagedAdapter(stages)


def _require_ranks(ranks: Sequence[int], config: AdapterConfig, geometry: Geometry) -> tuple[int, ...]:
    # Isorank may choose a rank above its limit, so only its sign is checked.
    count = len(rank_limits(config.tensor_mode, geometry, config.factorization))
    require_type("ranks", ranks, list, tuple)
    whole = [int(rank) for rank in ranks if isinstance(rank, Integral) and not isinstance(rank, bool) and rank > 0]
    if not len(whole) == len(ranks) == count:
        raise TensLoRAError(f"ranks={shown(ranks)}: must be {count} whole numbers from 1 up")
    return tuple(whole)


def _is_in_graph(parameter: nn.Parameter) -> bool:
    # Whether anything holds the node that gathers the parameter's gradient: a loss, an output, or what averages the
    # gradients of several processes. Otherwise torch makes a new node each time, which knows of no mark.
    if not parameter.requires_grad or parameter.is_inference() or torch.is_inference_mode_enabled():
        return False
    _notes(parameter)[_MARK] = True
    return bool(_notes(parameter).pop(_MARK, False))


def _notes(parameter: nn.Parameter) -> dict[str, Any]:
    # What torch lets a program write beside the node.
    return cast(dict[str, Any], get_gradient_edge(parameter).node.metadata)


_MARK = "tenslora"


def _require_neighbours(name: str, indices: range, size: int) -> None:
    if not isinstance(indices, range) or indices.step != 1 or not 0 <= indices.start < indices.stop <= size:
        raise TensLoRAError(f"{name}={indices!r}: must be a range of neighbours from 0 to {size - 1}")


def _require_step(first_step: float) -> float:
    require_type("first_step", first_step, float)
    if not 0 < first_step < math.inf:
        raise TensLoRAError(f"first_step={first_step}: must be a finite number above 0")
    return float(first_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    # What an adapter file's header says of a stage.
    geometry: Geometry
    ranks: tuple[int, ...]
    first_step: float | None = None

    def check(self, config: AdapterConfig) -> None:
        _require_ranks(self.ranks, config, self.geometry)
        if self.first_step is not None:
            _require_step(self.first_step)

    def rows(self, config: AdapterConfig) -> list[dict[str, tuple[int, ...]]]:
        # For each row of the grid of tensors, the shapes of a tensor's parameters and of its noise, by name.
        mode, chosen = config.tensor_mode, factorization_of(config.tensor_mode, config.factorization)
        sizes = [modes(mode, self.geometry, row) for row in range(tensor_grid(mode, self.geometry)[0])]
        return [{**chosen.shapes(of_row, self.ranks), **chosen.noise(of_row)} for of_row in sizes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header(_Stage):
    # The form of the header if there is a single stage.
    format: str
    config: AdapterConfig
    beside: tuple[str, ...] = ()
    beside_sha256: str | None = None

    @property
    def stages(self) -> tuple[_Stage, ...]:
        return (self,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StagedHeader:
    # The form of the header if there are several stages.
    format: str
    config: AdapterConfig
    stages: tuple[_Stage, ...]
    beside: tuple[str, ...] = ()
    beside_sha256: str | None = None

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise TensLoRAError("stages: must be two or more")


def _shapes(header: _Header | _StagedHeader, tensors: int) -> dict[str, tuple[int, ...]]:
    # The shapes of all tensors by name. Nothing is listed if the file's number of tensors is another: a damaged header
    # may declare a billion layers.
    of_stages = []
    for index, stage in enumerate(header.stages):
        prefix = "" if isinstance(header, _Header) else f"stage.{index}."
        try:
            stage.check(header.config)
            columns = tensor_grid(header.config.tensor_mode, stage.geometry)[1]
            of_stages.append((prefix, columns, stage.rows(header.config)))
        except TensLoRAError as error:
            raise TensLoRAError(f"{prefix}{error}") from error
    if (expected := sum(columns * sum(map(len, rows)) for _, columns, rows in of_stages)) != tensors:
        raise TensLoRAError(f"its header declares {expected} tensors, and it holds {tensors}")
    return {
        f"{prefix}tensors.{row * columns + column}.{name}": shape
        for prefix, columns, rows in of_stages
        for row, shapes in enumerate(rows)
        for column in range(columns)
        for name, shape in shapes.items()
    }


def load_adapter(path: Path | str) -> Adapter | StagedAdapter:
    """Read an adapter that `Adapter.save` or `StagedAdapter.save` wrote.

    Args:
        path: the file's path.

    Returns:
        The adapter, on the CPU.

    Raises:
        TensLoRAError: if the file is missing, damaged, or not an adapter; the message names the file and what is wrong
            with it.
    """
    path = require_path("path", path)
    data, tensors = read_safetensors(path)
    if data.get("format") != FORMAT:
        raise TensLoRAError(
            f"{path}: not a TensLoRA adapter (it lacks the header with format={FORMAT} of Adapter.save)"
        )
    try:
        header = from_json(_StagedHeader, data) if "stages" in data else from_json(_Header, data)
        require_tensors(tensors, _shapes(header, len(tensors)))
        geometries, ranks, steps = zip(*((s.geometry, s.ranks, s.first_step) for s in header.stages), strict=True)
        with torch.device("cpu"):  # whatever the default device is
            adapter = make_adapter(header.config, geometries, ranks, steps)
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: not a readable adapter: {error}") from error
    adapter.load_state_dict(tensors)
    adapter.trained_beside, adapter.beside_sha256 = frozenset(header.beside), header.beside_sha256
    return adapter
