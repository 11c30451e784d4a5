"""Turns an adapter of the library, or a LoRA that PEFT saved, into a TensLoRA adapter in PEFT."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from tenslora.adapter import Adapter, StagedAdapter
from tenslora.attachment import (
    adapter_of,
    handed_over,
    modules_named,
    not_compiled_anywhere,
    peft_undone_on_error,
    require_own_layers,
    require_savable,
    updates_of,
)
from tenslora.decomposition import Approximation, approximate
from tenslora.errors import TensLoRAError, require_path, require_type
from tenslora.forward_pass import listed
from tenslora.peft.patterns import of_paths
from tenslora.peft.saved_lora import PREFIX, WEIGHTS, read_others, read_updates
from tenslora.peft.tuner import TensLoraConfig, choice, chosen_stages
from tenslora.projections import find_projections
from tenslora.ranks import RankStrategy


def peft_config(adapter: Adapter | StagedAdapter, modules_to_save: Sequence[str] = ()) -> TensLoraConfig:
    """The settings of an adapter as PEFT knows them.

    Args:
        adapter: the adapter in the library.
        modules_to_save: modules that were trained beside the adapter.
    """
    config, strategy = adapter.config, adapter.config.rank_strategy
    ranks: list[Any] = [list(stage.ranks) for stage in adapter.stages]
    steps = [stage.unscaled_first_step for stage in adapter.stages]
    # The ranks may have been cut since they were chosen, and the first step stays that of the ranks before.
    as_chosen = strategy.name == "isorank" and ranks == [
        list(strategy.resolve(config.tensor_mode, stage.geometry, config.factorization)) for stage in adapter.stages
    ]
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del settings["rank_strategy"]
    options = {
        field.name: getattr(strategy, field.name)
        for field in dataclasses.fields(RankStrategy)
        if field.name not in ("name", "rank", "ranks") and getattr(strategy, field.name) != field.default
    }
    return TensLoraConfig(
        **settings,
        rank_strategy="isorank" if strategy.name == "isorank" else "isoparameters",
        r=strategy.rank,
        ranks=None if as_chosen else ranks[0] if len(ranks) == 1 else ranks,
        first_step=steps[0] if len(steps) == 1 else steps,
        rank_options=options or None,
        modules_to_save=list(modules_to_save) or None,
    )


def to_tenslora(model: nn.Module, modules_to_save: Sequence[str] = ()) -> PeftModel:
    """Turn an adapted model into a PEFT model with the same adapter.

    PEFT saves the adapter's own tensors, which are smaller than the LoRA that `to_lora.to_peft` makes of them. The
    adapter stays in its mode, training or evaluation.

    Args:
        model: with an adapter. It is changed in place: the adapter and torch.compile's wrappers are taken off, and PEFT
            puts its own layers on.
        modules_to_save: paths of modules that were trained without an adapter, such as a classification head. PEFT
            saves them together with the adapter.

    Returns:
        The PEFT model.

    Raises:
        TensLoRAError: if there is no adapter, if it is merged or holds a NaN or an infinity, if its scale, config or
            ranks were changed by hand, if its layers are in another order now, or if a module to save is not found,
            holds adapted layers or is never called. The model is then as it was.
    """
    with not_compiled_anywhere(model) as own:
        adapted = updates_of(own)  # raises if the adapter is merged
        require_own_layers(own)
        require_savable(own, modules_to_save)
        adapter_of(own).require_as_declared()
        chosen = _chosen_paths(own, adapted)
        with handed_over(own) as adapter:
            config = peft_config(adapter, modules_to_save)
            config.target_modules = chosen
            peft_model = get_peft_model(own, config)
            new = _in_modes(peft_model, own.training, adapter.training)
            new.to(next(adapter.parameters()).dtype).load_state_dict(adapter.state_dict())
    return peft_model


def _chosen_paths(model: nn.Module, adapted: Mapping[str, object]) -> str | None:
    # None if the adapter is on all that PEFT would choose; the model may have got further layers since attach.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's choice will tell of layers without attention
        stages = find_projections(model, adapter_of(model).config.adapt)
    found = {target.path for stage in stages for target in stage.targets}
    return None if found == adapted.keys() else of_paths(adapted)


def from_lora(model: nn.Module, folder: Path | str, config: TensLoraConfig) -> tuple[PeftModel, Approximation]:
    """Put a new TensLoRA adapter on a model and start it from a LoRA, by `decomposition.approximate`.

    The adapter is in the mode of the model, training or evaluation.

    Args:
        model: the model that the LoRA is for, without the LoRA. It is changed in place, and torch.compile's wrappers
            are taken off.
        folder: a folder that PEFT's `save_pretrained` wrote. The modules that were saved with the LoRA, such as a head,
            are loaded too if modules_to_save names them; a warning tells of others. A module that was not saved starts
            as the model has it.
        config: the settings of the new adapter.

    Returns:
        The PEFT model, and how close the new adapter is to the LoRA.

    Raises:
        TensLoRAError: if the LoRA adapts other matrices than the new adapter, if a module that was saved with it has
            another size, or if the factorization is CP, for which there is no such method. The model is then as it was.
    """
    require_type("config", config, TensLoraConfig)
    with not_compiled_anywhere(model) as own:
        return _from_lora(own, require_path("folder", folder), config)


def _from_lora(model: nn.Module, folder: Path, config: TensLoraConfig) -> tuple[PeftModel, Approximation]:
    # All that can fail comes before the model is changed.
    to_save = config.modules_to_save or ()
    modules_named(model, to_save, "modules_to_save")
    stages = chosen_stages(model, config)
    adapter = config.make_adapter([stage.geometry for stage in stages])
    approximation = approximate(adapter, read_updates(folder, stages, choice(config), model))
    own = model.state_dict()
    others = read_others(folder, stages, own.keys())
    for name, weight in others.items():
        place = own.get(name.removeprefix(PREFIX))
        if place is not None and place.shape != weight.shape:
            raise TensLoRAError(
                f"{folder / WEIGHTS}: {name} has the shape {tuple(weight.shape)}, and in {type(model).__name__} "
                f"{tuple(place.shape)}"
            )
    with peft_undone_on_error(model):
        peft_model = get_peft_model(model, config)
        _in_modes(peft_model, model.training, model.training).load_state_dict(adapter.state_dict())
        saved = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        wanted = {name: others.get(name, weight) for name, weight in saved.items()}  # PEFT wants all of them
        left_out = [name for name in own if PREFIX + name in others.keys() - wanted.keys()]
        nowhere = sorted(name for name in others.keys() - wanted.keys() if name.removeprefix(PREFIX) not in own)
        for names, why in (
            (left_out, "because they would not be saved again; name their modules in modules_to_save"),
            (nowhere, f"because {type(model).__name__} has no weights of these names"),
        ):
            if names:
                warnings.warn(
                    f"{folder}: {listed(names)} are saved beside the LoRA, and are not loaded, {why}", stacklevel=3
                )
        with torch.no_grad():
            set_peft_model_state_dict(peft_model, {name: weight.clone() for name, weight in wanted.items()})
    return peft_model, approximation


def _in_modes(peft_model: PeftModel, training: bool, adapter_training: bool) -> Adapter | StagedAdapter:
    # PEFT leaves what it puts on a model in training mode, whatever mode the model is in.
    peft_model.training = peft_model.base_model.training = training
    adapter = peft_model.base_model.tenslora_adapters["default"]
    assert isinstance(adapter, (Adapter, StagedAdapter))
    return adapter.train(adapter_training)
