"""Keeps an adapter and the weights that were trained beside it in one folder, on disk or on the Hugging Face hub.

| file | what it holds |
|---|---|
| adapter.safetensors | the adapter, as `Adapter.save` writes it |
| head.safetensors | whatever else the training has changed, by its name in the model; absent if there is nothing |

That is every other weight that was trained, the buffers of trained modules, and the running statistics of the model's
batch norms: in training mode these move in a frozen backbone too. Names are those of the model before any part of it
was compiled.

A finished run of the harness that froze its backbone leaves the same two files, so `load` takes its folder too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.adapted_linear import AdaptedLinear
from tenslora.adapter import Adapter, StagedAdapter, load_adapter
from tenslora.attachment import (
    SUBMODULE,
    adapter_of,
    attach,
    is_trainable,
    not_compiled,
    require_changeable,
    require_own_layers,
    require_same_sizes,
    stages_to_adapt,
    uncompiled,
    undone_on_error,
)
from tenslora.errors import TensLoRAError, require_path, require_type
from tenslora.files import (
    ADAPTER_FILE,
    HEAD_FILE,
    elsewhere,
    read_hashed_safetensors,
    read_safetensors,
    require_file,
    require_finite,
    sha256_of,
    temporary_path,
    write_safetensors,
)
from tenslora.forward_pass import listed
from tenslora.hub import download, is_repository, upload
from tenslora.projections import require_sizes

_OF_PEFT = "adapter_config.json"

_COUNT = "num_batches_tracked"


def save_pretrained(model: nn.Module, folder: Path | str) -> Path:
    """Write the adapter of a model, all other weights that require gradients, and its running statistics to one folder.

    A warning tells of weights that were trained beside the adapter and that the model does not have any more.

    Args:
        model: with an adapter. A weight whose gradients are switched off is saved only if `attach` was to train it, or
            if `load` gave it to the model. The statistics of its batch norms are saved (`running_statistics`).
        folder: the folder, which is created if it is missing. An adapter that it holds already is replaced.

    Returns:
        The folder.

    Raises:
        TensLoRAError: if there is no adapter, if a file cannot be written, if the adapter or a weight holds a NaN or an
            infinity, or if a weight that is trained beside the adapter has the adapter's update in it, which `load`
            would then add again. Likewise if an adapted layer is a copy of another one, with an adapter of its own, or
            was replaced by a layer without an update, or if the model has other layers than the adapter is for, or has
            them in another order.
    """
    folder, adapter, model = require_path("folder", folder), adapter_of(model), not_compiled(model)
    head = _trained_weights(model)
    if taken_off := _taken_off(model, adapter.trained_beside, head.keys()):
        warnings.warn(
            f"{listed(taken_off)}: trained beside the adapter, and not saved, because the model does not have them any "
            f"more; save before a trained module is taken off",
            stacklevel=2,
        )
    require_own_layers(model)
    require_same_sizes(model)
    for path, module in model.named_modules():
        state = type(module).get_extra_state is not nn.Module.get_extra_state
        if state and any(name.startswith(f"{uncompiled(path)}.") for name in head):
            warnings.warn(
                f"{path}: what its get_extra_state returns is not saved, because safetensors holds tensors alone",
                stacklevel=2,
            )
        if isinstance(module, AdaptedLinear) and module.layer_update.merged and uncompiled(f"{path}.weight") in head:
            raise TensLoRAError(f"{path}: its weight is trained and has the adapter's update in it; unmerge first")
    with _head_stays_with_its_adapter(folder):
        digest = None
        if head:
            parameters = [
                name for name, weight in head.items() if isinstance(weight, nn.Parameter) and is_trainable(weight)
            ]
            tied = _other_names(model, head)
            header = {"tied": tied} if tied else {}
            digest = sha256_of(write_safetensors(folder / HEAD_FILE, head, header, finite=parameters))
        elif os.path.lexists(folder / HEAD_FILE):  # of an earlier adapter, which the new one must not be loaded with
            try:
                (folder / HEAD_FILE).unlink()
            except OSError as error:
                raise TensLoRAError(f"{folder / HEAD_FILE}: cannot be removed ({error.strerror})") from error
        adapter.save(folder / ADAPTER_FILE, beside=sorted(head), beside_sha256=digest)
    return folder


@contextlib.contextmanager
def _head_stays_with_its_adapter(folder: Path) -> Iterator[None]:
    # If the new adapter cannot be written, the older one gets its head back.
    head = folder / HEAD_FILE
    kept = temporary_path(head)
    existed, copied = os.path.isfile(head), False
    try:
        if existed:
            try:
                shutil.copyfile(head, kept)
            except OSError as error:
                raise TensLoRAError(f"{head}: cannot be kept until the new one is there ({error.strerror})") from error
            copied = True
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if copied:
                os.replace(kept, head)
            elif not existed and os.path.isfile(head):
                head.unlink()
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):  # a ValueError for a character that no path can have
            kept.unlink(missing_ok=True)


def load(model: nn.Module, source: Path | str, revision: str | None = None) -> Adapter | StagedAdapter:
    """Attach a saved adapter, and give the model the weights and the running statistics that were saved beside it.

    These weights are trainable, as they were when they were saved; all others are frozen.

    Args:
        model: as for `attach`. Its head must have the size of the saved one.
        source: a folder that `save_pretrained` wrote; the folder of a run; the name of a repository on the hub
            (user/name), where there is no such folder; or a single file of `Adapter.save`.
        revision: a branch, a tag or a commit of the repository on the hub; None for the newest commit.
            With a folder or a file it must be None.

    Returns:
        The adapter.

    Raises:
        TensLoRAError: if there is no adapter under that name, if a revision is given for something on disk, if the
            saved weights do not fit the model, or for the same reasons as in `attach`. The model is then as it was.
    """
    require_type("model", model, nn.Module)
    require_type("revision", revision, str, type(None))
    if isinstance(source, str) and "://" in source:
        raise TensLoRAError(f"source={source}: must be a path on disk, or user/name of a repository on the hub")
    path = require_path("source", source)
    # Unlike Path.exists, os.path also answers where a name is too long for a file.
    if revision is not None and os.path.exists(path):
        raise TensLoRAError(f"revision={revision}: {path} is on disk, where there is only one; leave it out")
    if os.path.isfile(path):
        adapter = load_adapter(path)
        adapter.trained_beside = frozenset()  # which is left out on purpose
        return attach(model, adapter)
    if os.path.islink(path) and not os.path.isdir(path):
        require_file(path)
    folder = path if os.path.isdir(path) else _download(str(source), revision)
    if os.path.islink(folder / ADAPTER_FILE):
        require_file(folder / ADAPTER_FILE)
    if not (folder / ADAPTER_FILE).is_file():
        if (folder / _OF_PEFT).is_file():
            raise TensLoRAError(f"{source}: holds an adapter that PEFT has saved; PeftModel.from_pretrained loads it")
        raise TensLoRAError(
            f"{source}: must hold {ADAPTER_FILE}, which save_pretrained writes{elsewhere(folder / ADAPTER_FILE)}"
        )
    adapter = load_adapter(folder / ADAPTER_FILE)
    stages_to_adapt(model, adapter)  # the head's weights would not say so plainly that they are of another model
    if adapter.trained_beside and not os.path.lexists(folder / HEAD_FILE):
        raise TensLoRAError(
            f"{folder / HEAD_FILE}: is missing; it was saved beside the adapter with "
            f"{listed(sorted(adapter.trained_beside))}; "
            f"load(model, {str(folder / ADAPTER_FILE)!r}) loads the adapter alone and freezes all else"
        )
    has_head = os.path.lexists(folder / HEAD_FILE)
    head = read_weights(folder / HEAD_FILE, model, adapter.beside_sha256) if has_head else {}
    places = _places(model)
    before = {name: places[name].detach().clone() for name in head}
    try:
        with undone_on_error(model):
            adapter.trained_beside = frozenset()  # these weights are trained below
            attach(model, adapter)
            with torch.no_grad():
                for name, saved in head.items():
                    places[name].copy_(saved)
                    if isinstance(places[name], nn.Parameter) and is_trainable(places[name]):
                        places[name].requires_grad_(True)
    except BaseException:
        with torch.no_grad():
            for name, weight in before.items():
                places[name].copy_(weight)
        raise
    adapter.trained_beside = frozenset(name for name in head if isinstance(places[name], nn.Parameter))
    return adapter


def read_weights(path: Path, model: nn.Module, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the weights and the running statistics that were saved beside an adapter.

    Args:
        path: the file, such as the head.safetensors of `save_pretrained`.
        model: the model that they are for. It is not changed.
        sha256: the one that the adapter beside the file has for it; None if the file is not checked.

    Returns:
        The weights by their names in the model.

    Raises:
        TensLoRAError: if the file is missing or damaged, if a weight is not in the model or has another shape or type
            there, if one holds a NaN or an infinity, if two differ that are one in the model, if a running variance
            or a count of batches is negative, or if it is the file of another adapter.
    """
    header, saved_weights, digest = read_hashed_safetensors(path) if sha256 else (*read_safetensors(path), None)
    weights = {uncompiled(name): weight for name, weight in saved_weights.items()}
    require_sizes(model)
    places = _places(model)
    for name, other in _tied_in(header, path).items():
        if other in weights and name in places and places[name] is not places.get(other):
            weights[name] = weights[other]  # the model that was saved had one weight in both places
    names: dict[int, str] = {}
    for name, saved in weights.items():
        if name not in places:
            hint = f"; load(model, {str(path.parent / ADAPTER_FILE)!r}) loads the adapter alone"
            if ".parametrizations." in f".{name}":
                hint = "; put the parametrization on first, as load_tensors does with the updates of adapt_tensor"
            raise TensLoRAError(f"{path}: {type(model).__name__} has no weight {name}{hint}")
        place = places[name]
        if place.is_meta:
            raise TensLoRAError(f"{path}: {name} is on the device meta in the model, where its numbers would be lost")
        # A quantised weight is of no subclass of torch's Parameter (torchao), or holds no floats (bitsandbytes).
        is_own_class = issubclass(type(place), nn.Parameter) and place.is_floating_point()
        if isinstance(place, nn.Parameter) and type(place) is not nn.Parameter and not is_own_class:
            raise TensLoRAError(
                f"{path}: {name} is quantised in the model, and a trained weight cannot be copied there"
            )
        require_changeable(name, place)
        is_trained = isinstance(place, nn.Parameter)  # and no buffer
        if place.shape != saved.shape:
            hint = "; build the model with as many classes, or tokens, as the saved one has" if is_trained else ""
            raise TensLoRAError(
                f"{path}: {name} has the shape {tuple(saved.shape)}, and in {type(model).__name__} "
                f"{tuple(place.shape)}{hint}"
            )
        other = names.setdefault(id(place), name)
        if other != name and not torch.equal(saved.to(place.dtype), weights[other].to(place.dtype)):
            raise TensLoRAError(
                f"{path}: {other} and {name} have different values, and are one weight in {type(model).__name__}"
            )
        if place.is_floating_point():
            # A buffer may hold infinities, as a mask does; the model has them too.
            is_mask = not isinstance(place, nn.Parameter) and saved.is_floating_point() and saved.isinf().any()
            if is_mask and torch.equal(saved, place.to(saved)):
                continue
            require_finite(f"{path}: {name}", saved)
            if not saved.to(place.dtype).float().isfinite().all():
                raise TensLoRAError(
                    f"{path}: {name} has numbers that are too large for {place.dtype}, its type in the model"
                )
        elif place.dtype != saved.dtype:
            raise TensLoRAError(f"{path}: {name} has the type {saved.dtype}, and in the model {place.dtype}")
    try:
        statistics = map(uncompiled, running_statistics(model))
        require_statistics({name: weights[name] for name in statistics if name in weights})
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: {error}") from error
    if digest != sha256:
        raise TensLoRAError(
            f"{path}: is not the one that was saved with {ADAPTER_FILE}. If the folder is being written "
            f"to, try again; if you have changed it, load(model, {str(path.parent / ADAPTER_FILE)!r}), give the model "
            f"these weights with load_state_dict(..., strict=False), and let them require gradients, or they will not "
            f"be saved with the adapter"
        )
    return weights


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a model: what its norms keep of the batches that they see in training mode.

    Args:
        model: any model.

    Returns:
        running_mean, running_var and num_batches_tracked of every module that counts its batches, as each of torch's
        batch norms does, frozen or not; by their names in the model's state dict.
    """
    kept = {uncompiled(name): name for name in model.state_dict()}
    buffers = {uncompiled(name): each for name, each in model.named_buffers()}
    norms = [_owner(name) for name in buffers if name.rpartition(".")[2] == _COUNT]
    names = [f"{path}.{part}" if path else part for path in norms for part in ("running_mean", "running_var", _COUNT)]
    return {kept[name]: buffers[name] for name in names if name in kept and name in buffers}


def require_statistics(statistics: Mapping[str, Tensor]) -> None:
    """Check that running statistics can be those of numbers.

    Args:
        statistics: finite tensors, by the names that `running_statistics` gives them.

    Raises:
        TensLoRAError: if a variance or a count of batches is negative.
    """
    for name, statistic in statistics.items():
        if not name.endswith("running_mean") and (statistic < 0).any():
            raise TensLoRAError(f"{name} holds a negative number")


def push_to_hub(model: nn.Module, repo_id: str, private: bool = False) -> str:
    """Upload what `save_pretrained` writes to the Hugging Face hub, with the account that is logged in there.

    A repository without a README.md gets a model card.

    Args:
        model: as for `save_pretrained`.
        repo_id: the repository, user/name; it is created if it is missing.
        private: whether a repository that is created can be seen by its owner alone.

    Returns:
        The address of the commit.

    Raises:
        TensLoRAError: if there is no adapter, if huggingface_hub is not installed, or if the hub refuses.
    """
    require_type("repo_id", repo_id, str)
    require_type("private", private, bool)
    if not is_repository(repo_id, with_owner=True):
        raise TensLoRAError(f"repo_id={repo_id}: must be the name of a repository, user/name")
    card = _model_card(model, repo_id)
    with tempfile.TemporaryDirectory() as folder:
        # A head that an earlier adapter had must not stay beside this one.
        return upload(
            save_pretrained(model, folder),
            repo_id,
            card=card,
            message="Upload a TensLoRA adapter",
            replaced=HEAD_FILE,
            private=private,
        )


def _download(name: str, revision: str | None) -> Path:
    if not is_repository(name, with_owner=True) or name.endswith(".safetensors"):
        raise TensLoRAError(f"{name}: no such file or folder, and not the name of a repository on the hub (user/name)")
    return download(name, [ADAPTER_FILE, HEAD_FILE, _OF_PEFT], revision)


def _model_card(model: nn.Module, repo_id: str) -> str:
    """A README.md with the metadata that the hub reads, and the code that loads the adapter."""
    adapter, base = adapter_of(model), _base_model(model)
    metadata = ["library_name: tenslora", "tags: [tenslora]", *([f"base_model: {base}"] if base else [])]
    of_base = f"[{base}](https://huggingface.co/{base})" if base else type(model).__name__
    head = sum(weight.numel() for weight in _trained_weights(model).values() if isinstance(weight, nn.Parameter))
    count = sum(parameter.numel() for parameter in adapter.parameters())
    ranks = "; ".join(", ".join(map(str, stage.ranks)) for stage in adapter.stages)
    return "\n".join(
        [
            "---", *metadata, "---", "",
            f"# {repo_id.partition('/')[2]}", "",
            f"A TensLoRA adapter ([arXiv 2509.19391](https://arxiv.org/abs/2509.19391)) of {of_base}.", "",
            "| | |", "|---|---|",
            f"| construction | {adapter.config.tensor_mode} |",
            f"| ranks | {ranks} ({adapter.config.rank_strategy.name}) |",
            f"| parameters | {count:,} in the adapter, {head:,} trained beside it |", "",
            "```python",
            "from tenslora import load", "",
            f"load(model, {json.dumps(repo_id)})  # on {type(model).__name__}, as before the training",
            "```", "",
        ]
    )  # fmt: skip


def _base_model(model: nn.Module) -> str | None:
    """The repository of the hub that a model of transformers or timm came from; None if it is not known."""
    of_timm = getattr(model, "pretrained_cfg", None)
    name = of_timm.get("hf_hub_id") if isinstance(of_timm, dict) else getattr(model, "name_or_path", None)
    is_known = isinstance(name, str) and is_repository(name, with_owner=True) and not Path(name).exists()
    return name if is_known else None


def _trained_weights(model: nn.Module) -> dict[str, Tensor]:
    # What attach or load let train stays so, also if gradients are switched off for evaluation or in a moving average.
    # A module's buffers belong to its trained parameters, and so do those of the modules in it if all its parameters
    # are trained, such as a parametrization's. Running statistics move without any.
    of_adapter = f"{SUBMODULE}."
    # First of all, because fully_shard gives a module its own parameters back when it is asked for its state dict.
    # Its names may lack the wrappers that those of the parameters have.
    kept = [uncompiled(name) for name in model.state_dict() if not name.startswith(of_adapter)]
    adapter = adapter_of(model)
    own = {id(factor) for factor in adapter.parameters()}  # in a list of adapters they have another name
    others = {
        uncompiled(name): each
        for name, each in model.named_parameters()
        if not name.startswith(of_adapter) and id(each) not in own
    }
    beside = {uncompiled(name) for name in adapter.trained_beside}
    trained: dict[str, Tensor] = {name: each for name, each in others.items() if each.requires_grad or name in beside}
    with_frozen = {path for name in others.keys() - trained.keys() for path in _holders(name)}
    owners = {_owner(name) for name in trained}
    whole = {path for name in trained for path in _holders(name)} - with_frozen
    buffers = {uncompiled(name): each for name, each in model.named_buffers()}
    of_trained = {
        name: buffers[name]
        for name in kept
        if name in buffers and (_owner(name) in owners or not whole.isdisjoint(_holders(name)))
    }
    statistics = {uncompiled(name): each for name, each in running_statistics(model).items()}
    return trained | of_trained | statistics


def _taken_off(model: nn.Module, trained_beside: Set[str], saved: Set[str]) -> list[str]:
    """The trained weights that the model has no longer, if nothing new is saved in their place.

    Raises:
        TensLoRAError: if weights that have taken the place, such as those of a new head, would be left out.
    """
    modules = {uncompiled(path): module for path, module in model.named_modules()}
    weights = {uncompiled(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    beside, taken_off = {uncompiled(name) for name in trained_beside}, []
    for gone in sorted(beside - weights):
        path = next(path for path in _holders(gone) if path in modules)
        place, prefix = modules[path], f"{path}." if path else ""
        new = [f"{prefix}{uncompiled(name)}" for name, _ in place.named_parameters()]
        if saved.isdisjoint(set(new) - beside):
            taken_off.append(gone)
        if any(isinstance(module, AdaptedLinear) for module in place.modules()):
            continue  # the frozen backbone is in the same module, and has taken no place
        if left_out := [name for name in new if name not in saved]:
            raise TensLoRAError(
                f"{gone}: was trained beside the adapter, and {listed(left_out)} in its place would not be saved; let "
                f"what is to be saved require gradients"
            )
        # torch.ao's quantised layers have no parameters; their weights are in their state dict alone.
        kept = [] if new else [f"{prefix}{uncompiled(name)}" for name in place.state_dict()]
        if left_out := [name for name in kept if name not in saved]:
            raise TensLoRAError(
                f"{gone}: was trained beside the adapter, and {listed(left_out)} in its place would not be saved; save "
                f"before {path} becomes a {place._get_name()}, which has no parameters"
            )
    return taken_off


def _other_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    # The further names that the model has for these weights, each with the name under which the weight is saved.
    names = {id(weight): name for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
    places = _places(model)
    return {name: names[id(own)] for name, own in places.items() if id(own) in names and name not in weights}


def _tied_in(header: Mapping[str, Any], path: Path) -> dict[str, str]:
    tied = header.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise TensLoRAError(f"{path}: not a readable safetensors file (tied must be an object of names)")
    return tied


def _places(model: nn.Module) -> dict[str, Tensor]:
    # Tied parameters have several names, and a file may use any of them.
    places = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    return {uncompiled(name): place for name, place in places.items()}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _holders(name: str) -> Iterator[str]:
    # The paths of all modules that a weight is in, from its own to the model's.
    while name:
        name = _owner(name)
        yield name
