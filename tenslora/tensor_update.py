"""Updates of any weight tensor: the kernels of a convolution, the coefficients of a KAN, a matrix, an embedding.

The update of a weight is one factorised tensor of the weight's own shape. It is a parametrization in torch's sense
(`torch.nn.utils.parametrize`): whenever the module reads its weight, the update is built and added. Attention
projections are better served by `attachment.attach`, which never builds an update.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tenslora.adapted_linear import AdaptedLinear, is_dtensor
from tenslora.adapter_config import LARGEST_SCALE
from tenslora.attachment import (
    is_finite,
    not_compiled,
    require_changeable,
    require_finite_sum,
    require_own_weights,
    uncompiled,
)
from tenslora.constructions import SCALINGS, weight_modes
from tenslora.errors import TensLoRAError, first_line, require_numbers, require_one_of, require_path, require_type
from tenslora.factorizations import FACTORIZATIONS
from tenslora.files import read_safetensors, require_tensors, write_safetensors
from tenslora.forms import from_json
from tenslora.projections import FLOATS, attribute_of
from tenslora.random_streams import stream_seed
from tenslora.ranks import weight_ranks
from tenslora.tensor import FactorizedTensor, ScaledModule
from tenslora.thin_products import without_autocast

FORMAT = "tenslora-tensors-1"

LORA_RANK = 4
"""The rank of the LoRA whose first step scaling="first_step" gives to an update."""


@dataclasses.dataclass(frozen=True)
class TensorUpdateConfig:
    """The settings of the update of one weight.

    Args:
        ranks: the ranks, in the order of `Factorization.rank_limits`.
        factorization: one of `factorizations.FACTORIZATIONS`.
        alpha: multiplies the update.
        scaling: "direct" multiplies the update by alpha; "first_step" multiplies it by alpha and by the one number that
            gives it the first step of a LoRA of rank 4.
        seed: the seed of the update's random stream.

    Raises:
        TensLoRAError: for a value that is out of range; the message names the field, its value and what is valid.
    """

    ranks: tuple[int, ...]
    factorization: str = "tucker"
    alpha: float = 1.0
    scaling: str = "direct"
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, "alpha")
        require_numbers(self, "seed", whole=True)
        if not abs(self.alpha) <= LARGEST_SCALE:
            raise TensLoRAError(f"alpha={self.alpha}: must be a finite number, from -1,000,000 to 1,000,000")
        require_one_of("scaling", self.scaling, SCALINGS)
        require_one_of("factorization", self.factorization, FACTORIZATIONS)


class TensorUpdate(ScaledModule):
    """The trainable update of one weight, W + scale * X, where X is a factorised tensor of the weight's shape.

    The dimensions of the weight are called d_out and d_in, as in a Linear or a Conv2d, and mode_3, mode_4, ... The
    tensor's parameters start as an adapter's do with init="orthogonal": one is zero, the others are orthogonal.

    Args:
        config: the settings.
        shape: the weight's shape.

    Attributes:
        tensor: the factorised tensor, with its parameters under the names of the modes, and Tucker's core.
        scale: multiplies the tensor; a number, or a tensor of one.
        first_step: the Frobenius norm by which AdamW's first step with learning rate 1 moves the weight.
        added: a copy of the update as it was when it was added to the weight; empty while it is not merged.

    Raises:
        TensLoRAError: for settings that do not fit the shape.
    """

    def __init__(self, config: TensorUpdateConfig, shape: Sequence[int]) -> None:
        super().__init__()
        modes, factorization = weight_modes(shape), FACTORIZATIONS[config.factorization]
        self.config = dataclasses.replace(config, ranks=weight_ranks(shape, config.ranks, config.factorization))
        self.tensor = FactorizedTensor(factorization, modes, self.config.ranks, 1, stream_seed("tensor", config.seed))
        squared = factorization.squared_first_step(modes, self.config.ranks)
        scale, unscaled_first_step = config.alpha, math.sqrt(squared or 0.0)
        if config.scaling == "first_step":
            if not unscaled_first_step:
                raise TensLoRAError(
                    f"scaling=first_step: has no formula for factorization={config.factorization}; must be direct"
                )
            # Of a LoRA on the weight as a matrix of d_out rows, as PEFT adapts a convolution: sqrt(r d_out / 3).
            scale *= math.sqrt(LORA_RANK * modes["d_out"] / 3) / unscaled_first_step
        self.scale = scale
        self.first_step = abs(scale) * unscaled_first_step
        self.added: tuple[TensorUpdate, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update."""
        return bool(self.added)

    def forward(self, weight: Tensor) -> Tensor:
        """Add the update to a weight.

        Args:
            weight: the frozen weight.

        Returns:
            The weight that the module uses, in the frozen weight's dtype.
        """
        if self.added:
            return weight
        if next(self.parameters()).is_meta and not weight.is_meta:
            raise TensLoRAError("the update of a weight is on the device meta and has no numbers; give it some first")
        return weight + self.update().to(weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # where `_hold_what_is_loaded` finds it, before any weight is copied
            destination._metadata.setdefault(prefix.rpartition(".")[0].rpartition(".")[0], {})["merged"] = self.merged

    def update(self) -> Tensor:
        """The update, scale * X, in the weight's shape."""
        with without_autocast(next(self.parameters()).device):
            return self.scale * self.tensor.full()

    def extra_repr(self) -> str:
        config, names = self.config, self.tensor.factorization.rank_limits(self.tensor.modes)
        named = ", ".join(f"{name}={rank}" for name, rank in zip(names, config.ranks, strict=True))
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{config.factorization}, ranks {named}; {count:,} parameters"


def adapt_tensor(
    module: nn.Module,
    name: str,
    ranks: int | Sequence[int],
    factorization: str = "tucker",
    alpha: float = 1.0,
    scaling: str = "direct",
    seed: int = 0,
) -> TensorUpdate:
    """Freeze one weight of a module, and put a trainable update of the weight's own shape on it.

    The module's outputs do not change until the update is trained. The module's other parameters stay as they are. If
    another module has the same weight, as an embedding and a head may, the update is this module's alone. Until
    `detach_tensors`, transformers can neither tie such weights nor resize the embedding.

    The update is built each time that the module reads the weight, at the cost of about as many multiplications as the
    weight has entries, times a rank; `torch.nn.utils.parametrize.cached` builds it once for several reads,
    the first of which must not be under `torch.no_grad` if the update is to be trained.

    PEFT's own methods, such as LoRA, can lie on the same layer, but what they merge into its weight is lost. The rows
    of an embedding share the update's factors, so that of its padding_idx changes with the others.

    >>> from torch import nn
    >>> from tenslora import adapt_tensor
    >>> conv = nn.Conv2d(32, 64, kernel_size=3)
    >>> adapt_tensor(conv, "weight", ranks=8).config.ranks
    (8, 8, 3, 3)

    Args:
        module: the module that holds the weight. It is changed in place.
        name: the name of the weight in the module, such as "weight": a parameter of two dimensions or more.
        ranks: the ranks, in the order of `Factorization.rank_limits`: for Tucker one for each dimension. Or one number
            for all of them, which stops at a rank's limit.
        factorization: "tucker", "cp" or "tensor_train". The train runs from the second dimension over the further ones
            to the first.
        alpha: multiplies the update.
        scaling: "direct" or "first_step", see `TensorUpdateConfig`.
        seed: the seed of the update's random stream. Give each weight a seed of its own.

    Returns:
        The update, on the weight's device.

    Raises:
        TensLoRAError: if the module has no such weight, if the weight is quantised or has a parametrization already, if
            the module has an adapter of `attach` or of PEFT's TensLoRA, or for settings that do not fit the weight.
    """
    require_type("module", module, nn.Module)
    require_type("name", name, str)
    weight = _weight(module, name)
    resolved = weight_ranks(weight.shape, ranks, factorization)
    update = TensorUpdate(TensorUpdateConfig(resolved, factorization, alpha, scaling, seed), weight.shape)
    return _register(module, name, update)


def merge_tensors(model: nn.Module) -> None:
    """Add the updates to the weights of a model, W <- W + scale * X.

    Merging a second time changes nothing, even if an update has changed in between: `unmerge_tensors` first, which
    takes out what was added. If load_state_dict is to give a merged model weights, they must be those of a merged model
    too, and the other way round. A state dict of torch knows which ones it holds, and is refused otherwise.

    Args:
        model: with updates on its weights; the weights are changed in place. A single module will do.

    Raises:
        TensLoRAError: if there is no update, if one holds a NaN or an infinity, if a weight would hold one with its
            update, if it is divided among processes, or if another module uses the same weight. No weight is changed
            then.
    """
    _move(model, into_weights=True)


def unmerge_tensors(model: nn.Module) -> None:
    """Subtract from the weights what `merge_tensors` added. They are then as before the merge, up to rounding.

    An update that was changed while it was merged keeps its new numbers.

    Args:
        model: with updates on its weights; the weights are changed in place.

    Raises:
        TensLoRAError: if there is no update, or if a weight is divided among processes.
    """
    _move(model, into_weights=False)


def detach_tensors(model: nn.Module) -> dict[str, TensorUpdate]:
    """Take the updates off, so that the model's weights are plain parameters again.

    A merged update stays in the weight, and any other is dropped. The weights stay frozen.

    Args:
        model: with updates on its weights; it is changed in place.

    Returns:
        The updates by the paths of their weights.

    Raises:
        TensLoRAError: if there is no update, if a weight is divided among processes, if it has a second
            parametrization, which must be removed first, or if its module has been given a further class since.
    """
    adapted = _adapted(model)
    _require_whole(adapted)
    for path, (module, name, _) in adapted.items():
        if len(_parametrizations(module, name)) > 1:
            raise TensLoRAError(f"{path}: has another parametrization beside the update; remove it first")
        if name not in vars(type(module)):
            raise TensLoRAError(f"{path}: its module has become a {type(module).__name__} since; undo that first")
    for module, name, _ in adapted.values():
        _take_off(module, name)
    return {path: update for path, (_, _, update) in adapted.items()}


def save_tensors(model: nn.Module, path: Path | str) -> Path:
    """Write the updates of a model's weights to one safetensors file, atomically. The weights are not in it.

    Nor is anything else that training has changed, such as a head or the running statistics of batch norms, which move
    in training mode also where all parameters are frozen: keep the norms in evaluation mode, or save them yourself.

    Args:
        model: with updates on its weights. Of a model that is compiled or wrapped in DistributedDataParallel, the
            weights' names are those without the wrapper.
        path: the file's path.

    Returns:
        The path.

    Raises:
        TensLoRAError: if there is no update, or if the file cannot be written.
    """
    path, adapted = require_path("path", path), _adapted(model)
    tensors = {
        f"{place}.{name}": parameter
        for place, (_, _, update) in adapted.items()
        for name, parameter in update.tensor.named_parameters()
    }
    configs = {place: dataclasses.asdict(update.config) for place, (_, _, update) in adapted.items()}
    return write_safetensors(path, tensors, {"format": FORMAT, "updates": configs}, finite=tensors)


def load_tensors(model: nn.Module, path: Path | str) -> dict[str, TensorUpdate]:
    """Put the updates that `save_tensors` wrote on a model whose weights have none yet.

    Args:
        model: any model that has the same weights; it is changed in place, and only if all updates fit.
        path: the file's path.

    Returns:
        The updates by the paths of their weights.

    Raises:
        TensLoRAError: if the file is missing, damaged or of another kind, if an update does not fit the model, or if
            the weight is on the device meta.
    """
    require_type("model", model, nn.Module)
    path = require_path("path", path)
    data, tensors = read_safetensors(path)
    if data.get("format") != FORMAT:
        raise TensLoRAError(f"{path}: holds no updates (it lacks the header with format={FORMAT} of save_tensors)")
    try:
        updates: dict[str, TensorUpdate] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[tuple[nn.Module, str], str] = {}
        for place, config in from_json(_Header, data).updates.items():
            holder = _holder(model, place)
            weight = _weight(*holder)
            if weight.is_meta:
                raise TensLoRAError(f"{place}: is on the device meta, where the update's numbers would be lost")
            if (other := places.setdefault(holder, place)) != place:  # a module may have two names in the model
                raise TensLoRAError(f"{place}: is the weight of {other} too, and can have only one update")
            updates[place] = TensorUpdate(config, weight.shape)
            for name, parameter in updates[place].tensor.named_parameters():
                shapes[f"{place}.{name}"] = tuple(parameter.shape)
        if not updates:
            raise TensLoRAError("it holds no update")
        require_tensors(tensors, shapes)
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: does not fit {type(model).__name__}: {error}") from error
    for place, update in updates.items():
        update.tensor.load_state_dict(
            {name: tensors[f"{place}.{name}"] for name, _ in update.tensor.named_parameters()}
        )
    required = {holder: _weight(*holder).requires_grad for holder in places}
    try:
        for (module, name), place in places.items():
            _register(module, name, updates[place])
    except BaseException:  # Ctrl-C, too
        for (module, name), requires_grad in required.items():
            if parametrize.is_parametrized(module, name):
                _take_off(module, name)
                module.get_parameter(name).requires_grad_(requires_grad)
        raise
    return updates


@dataclasses.dataclass(frozen=True)
class _Header:
    # The form of the header of a file that `save_tensors` writes.
    format: str
    updates: dict[str, TensorUpdateConfig]


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _without_wrapper(model: nn.Module) -> nn.Module:
    while True:
        inner = not_compiled(model.module if isinstance(model, _WRAPPERS) else model)
        checkpointed = inner._modules.get("_checkpoint_wrapped_module")  # by torch's activation checkpointing
        inner = inner if checkpointed is None else checkpointed
        if inner is model:
            return model
        model = inner


def _holder(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    path, _, name = uncompiled(place).rpartition(".")
    try:
        return _without_wrapper(_without_wrapper(model).get_submodule(path)), name
    except AttributeError as error:
        raise TensLoRAError(f"{place}: there is no such weight") from error


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    kind = type(module).__name__
    if isinstance(module, AdaptedLinear) or attribute_of(module, "has_tenslora_adapter"):  # the latter in PEFT
        raise TensLoRAError(
            f"{name}: belongs to a layer that has an adapter ({kind}); take it off first, with detach or PEFT's unload"
        )
    if parametrize.is_parametrized(module, name):
        raise TensLoRAError(f"{name}: has a parametrization in {kind} already; detach_tensors takes an update off")
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is None or weight.ndim < 2:
        valid = [other for other, parameter in module.named_parameters(recurse=False) if parameter.ndim >= 2]
        path, dot, last = name.rpartition(".")
        if dot and name in dict(module.named_parameters()):
            raise TensLoRAError(
                f"name={name}: must be a parameter of the module itself; give adapt_tensor "
                f"model.get_submodule({path!r}) and {last!r}"
            )
        raise TensLoRAError(
            f"name={name}: must be a parameter of {kind} with two dimensions or more"
            + (f", such as {', '.join(valid)}" if valid else ", which has none")
        )
    if is_dtensor(weight):
        raise TensLoRAError(f"{name}: is divided among processes (DTensor), as by fully_shard; adapt it before that")
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        form = f"is a {type(weight).__name__}" if weight.dtype in FLOATS else "is quantised"
        if type(weight) is nn.Parameter and not weight.is_floating_point():
            form = f"has the type {str(weight.dtype).removeprefix('torch.')}"
        raise TensLoRAError(f"{name}: {form} in {kind}, and an update cannot be added to it")
    if isinstance(module, torch.jit.ScriptModule):
        raise TensLoRAError(f"{name}: is compiled by torch.jit in {kind}; put the update on the module before that")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        raise TensLoRAError(f"{name}: has sparse gradients in {kind} (sparse=True), by which no update can be trained")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise TensLoRAError(
            f"{name}: is rescaled in place whenever {kind} reads it (max_norm), so that no unmerge could take an "
            f"update out again"
        )
    require_changeable(name, weight)
    return weight


def _register(module: nn.Module, name: str, update: TensorUpdate) -> TensorUpdate:
    weight = _weight(module, name)
    kind, parameters, parts = type(module), dict(module._parameters), dict(module._modules)
    _leave_class_of_copies(module)
    try:
        parametrize.register_parametrization(module, name, update.to(weight.device))
        parametrizations = _parametrizations(module, name)
        parametrizations.register_load_state_dict_pre_hook(_hold_what_is_loaded)  # type: ignore[no-untyped-call]
        parametrizations.register_load_state_dict_post_hook(_hold_what_was_loaded)  # type: ignore[no-untyped-call]
    except BaseException as error:  # of a class that refuses attributes or cannot be derived from; Ctrl-C, too
        module.__class__ = kind
        for own, before in ((module._parameters, parameters), (module._modules, parts)):
            own.clear()
            own.update(before)  # type: ignore[arg-type]
        if (others := parts.get("parametrizations")) is not None:  # those of other weights
            others._modules.pop(name, None)
        if not isinstance(error, Exception):
            raise
        raise TensLoRAError(f"{name}: {kind.__name__} takes no parametrization ({first_line(error)})") from error
    weight.requires_grad_(False)
    weight.grad = None  # an optimizer of all parameters would move it by an old gradient
    return update


def _take_off(module: nn.Module, name: str) -> None:
    _leave_class_of_copies(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _leave_class_of_copies(module: nn.Module) -> None:
    # torch keeps the properties of computed weights in the module's class, which copies of the module share.
    kind = type(module)
    if parametrize.is_parametrized(module):
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))


def _hold_what_is_loaded(
    parametrizations: nn.ModuleList, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    for update in parametrizations:
        if not isinstance(update, TensorUpdate) or f"{prefix}original" not in state:
            continue
        if metadata.get("merged", update.merged) is not update.merged:
            this, other = ("merged", "not merged") if update.merged else ("not merged", "merged")
            raise TensLoRAError(
                f"{prefix.replace('parametrizations.', '')[:-1]}: is {this}, and the state dict is that of a model "
                f"that is {other}, whose weights are others; call {'un' if update.merged else ''}merge_tensors before "
                f"load_state_dict"
            )
        if update.merged:  # the weight of a merged model holds the update that comes with it
            update.added = (update,)


def _hold_what_was_loaded(parametrizations: nn.Module, _: object) -> None:
    # From here on the update may change, and the weight does not.
    for update in parametrizations.children():
        if isinstance(update, TensorUpdate) and update in update.added:
            update.added = ()
            update.added = (copy.deepcopy(update),)


def _parametrizations(module: nn.Module, name: str) -> nn.ModuleList:
    return cast(nn.ModuleList, cast(nn.ModuleDict, module.parametrizations)[name])


def _adapted(model: nn.Module) -> dict[str, tuple[nn.Module, str, TensorUpdate]]:
    def found() -> Iterator[tuple[str, tuple[nn.Module, str, TensorUpdate]]]:
        for path, module in model.named_modules():
            # A wrapper of torch.compile passes on the parametrizations of the module in it, which comes by itself.
            for name in cast(nn.ModuleDict, module._modules.get("parametrizations", ())):
                for update in _parametrizations(module, name):
                    if isinstance(update, TensorUpdate):
                        yield uncompiled(f"{path}.{name}").removeprefix("."), (module, name, update)

    require_type("model", model, nn.Module)
    model = _without_wrapper(model)
    adapted = dict(found())
    if not adapted:
        raise TensLoRAError(f"{type(model).__name__}: no weight has an update")
    return adapted


def _original(module: nn.Module, name: str) -> Tensor:
    return cast(Tensor, cast(nn.Module, _parametrizations(module, name)).original)


def _require_whole(adapted: dict[str, tuple[nn.Module, str, TensorUpdate]]) -> None:
    for path, (module, name, _) in adapted.items():
        if is_dtensor(_original(module, name)):
            raise TensLoRAError(
                f"{path}: is divided among processes (DTensor), as by fully_shard; do this before, or save_tensors and "
                f"load_tensors on a model that is not divided"
            )


@torch.no_grad()
def _move(model: nn.Module, into_weights: bool) -> None:
    adapted = _adapted(model)
    _require_whole(adapted)
    for path, (_, _, update) in adapted.items():
        if into_weights and not all(map(is_finite, update.parameters())):
            raise TensLoRAError(f"{path}: its update holds a NaN or an infinity, which no unmerge could take out again")
    weights = {path: _original(module, name) for path, (module, name, _) in adapted.items()}
    if into_weights:
        require_own_weights(model, weights)
        for path, (_, _, update) in adapted.items():
            if not update.merged:
                require_finite_sum(path, weights[path], update.update())
    to_move = {path: update for path, (_, _, update) in adapted.items() if update.merged != into_weights}
    before = {path: (weights[path].clone(), update.added) for path, update in to_move.items()}
    try:
        for path, update in to_move.items():
            (added,) = (copy.deepcopy(update),) if into_weights else update.added
            weights[path].add_(added.update().to(weights[path]), alpha=1 if into_weights else -1)
            update.added = (added,) if into_weights else ()
    except BaseException:  # Ctrl-C, too
        for path, (weight, added_before) in before.items():
            weights[path].copy_(weight)
            to_move[path].added = added_before
        raise
