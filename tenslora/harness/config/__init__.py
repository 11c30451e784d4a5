"""The settings of a run: from Hydra's composed config to a typed `RunConfig`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.harness.config.checks import (
    as_typed,
    in_one_line,
    needs_global,
    require_plain_values,
    settings_with_numbers,
    shown,
)
from tenslora.harness.config.schema import (
    IMAGE_SETTINGS,
    REFERENCES,
    DatasetConfig,
    ImageDatasetConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    RankScheduleConfig,
    RunConfig,
    TextDatasetConfig,
    TrainerConfig,
    TransformConfig,
)
from tenslora.harness.config.tuning import TuneConfig, tune_config

__all__ = [
    "REFERENCES",
    "SWEEP_KEYS",
    "DatasetConfig",
    "ImageDatasetConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RankScheduleConfig",
    "RunConfig",
    "TextDatasetConfig",
    "TrainerConfig",
    "TransformConfig",
    "TuneConfig",
    "check_ranks",
    "register_resolvers",
    "tune_config",
    "validate",
]

SWEEP_KEYS = ("table", "tune", "dry_run", "collect_only")
"""The keys that the config of a sweep's job has in addition to the settings of the run."""


def validate(composed: DictConfig | dict[str, Any]) -> RunConfig:
    """Turn a composed config into typed, checked settings.

    Args:
        composed: Hydra's config, or the plain settings of a record (`RunConfig.settings`).

    Returns:
        The settings of the run.

    Raises:
        TensLoRAError: for an invalid setting, for a model and a dataset that do not fit each other, and for ranks that
            do not fit the declared geometry. The message names the first setting at fault, its value and what would be
            valid.
    """
    try:
        plain = _resolved(composed) if isinstance(composed, DictConfig) else composed
    except OmegaConfBaseException as error:
        reason = "is missing" if isinstance(error, MissingMandatoryValue) else str(error).splitlines()[0]
        reason = reason.removeprefix("TensLoRAError raised while resolving interpolation: ")  # of ${run_folder:}
        if "HydraConfig was not set" in reason:
            reason = "${hydra:...} is not known where a sweep plans its jobs; train.py -m knows it"
        group = str(error.full_key).partition(".")[0]
        if (
            isinstance(composed, DictConfig)
            and isinstance(own := composed._get_node(group), DictConfig)
            and group in own
        ):
            raise TensLoRAError(f"{group}.{group}: there is no such setting; {needs_global(group)}") from error
        named = not error.full_key or reason.startswith(f"{error.full_key}: ")
        raise TensLoRAError(reason if named else f"{error.full_key}: {reason}") from error
    if isinstance(composed, DictConfig):
        _require_all(plain)
    try:
        arranged = _arranged(plain)
        require_plain_values(arranged, _numbers())
        run: RunConfig = _schema().validate_python(arranged)
    except ValidationError as error:
        raise in_one_line(error, RunConfig) from error
    if run.tensor_mode in REFERENCES:
        return replace(run, adapter=None)
    if run.geometries:
        check_ranks(run, run.geometries)
    return run


def check_ranks(run: RunConfig, geometries: Sequence[Geometry]) -> None:
    """Check that the ranks of a run fit its backbone.

    Args:
        run: the settings.
        geometries: the dimensions of each of the backbone's stages, as declared or as found.

    Raises:
        TensLoRAError: if they do not.
    """
    if run.adapter is None:
        return
    for index, geometry in enumerate(geometries):
        try:
            run.rank_strategy.resolve(run.tensor_mode, geometry, run.adapter.factorization)
        except TensLoRAError as error:
            group = "rank_strategy." if str(error).startswith(("rank=", "ranks=")) else ""
            place = f", in stage {index} of the model" if len(geometries) > 1 else ""
            raise TensLoRAError(as_typed(f"{group}{error}{place}")) from error


def register_resolvers() -> None:
    """Define the resolvers of the config files.

    ``${unless_generic:VALUE}`` is VALUE if the model declares its images, and otherwise null, the model's own.

    ``${run_folder:}`` is the folder of the run that the settings describe. ``${run_folder:NAME}`` gives NAME if the
    settings are not valid. Hydra asks for the folders of a multirun before it starts the jobs, and one job's mistake
    must not end the others.
    """

    asked = False

    def run_folder(otherwise: str | None = None, *, _root_: DictConfig) -> str:
        nonlocal asked
        if asked:  # by a setting, which would need itself
            raise TensLoRAError(
                "${run_folder:} must not be in a setting, because the folder is named after the settings"
            )
        asked = True
        try:
            return validate(_root_).folder()
        except TensLoRAError:
            if otherwise is None:
                raise
            return otherwise
        finally:
            asked = False

    def unless_generic(value: Any, *, _root_: DictConfig) -> Any:
        model = _root_.get("model") or {}
        return value if all(model.get(name) is not None for name in IMAGE_SETTINGS) else None

    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("unless_generic", unless_generic, replace=True)


@cache
def _schema() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


@cache
def _numbers() -> frozenset[str]:
    return settings_with_numbers(RunConfig)


def _resolved(config: DictConfig) -> dict[str, Any]:
    # The config is converted key by key, because OmegaConf's own masked copy takes thirty times as long and a sweep
    # validates many configs.
    return {
        str(key): OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        if OmegaConf.is_config(node := config[key])
        else node
        for key in config
        if key not in ("hydra", *SWEEP_KEYS)
    }


def _require_all(plain: dict[str, Any]) -> None:
    """Check that a composed config has the settings that only a record of an earlier version may lack.

    A setting that was taken away (``~adapter``) would otherwise get a default that the user has not seen.
    """
    # These settings of the adapter are groups of their own in conf/. Without the groups logger and preset there is no
    # logger and no preset, as the user has said.
    elsewhere = {"tensor_mode", "factorization", "rank_strategy", "seed"}
    needed = {
        "": {"factorization", *(field.name for field in fields(RunConfig))} - {"logger", "preset", "tuned"},
        "adapter": {field.name for field in fields(AdapterConfig)} - elsewhere,
        "trainer": {field.name for field in fields(TrainerConfig)},
    }
    for group, names in needed.items():
        place = plain.get(group) if group else plain
        if isinstance(place, dict) and (missing := sorted(names - place.keys())):
            name = f"{group}.{missing[0]}" if group else missing[0]
            raise TensLoRAError(f"{name}: is missing; a setting can be changed, but not taken away")


def _arranged(plain: dict[str, Any]) -> dict[str, Any]:
    """Rearrange settings from the layout of conf/ to the layout of `RunConfig`."""

    def name_of(group: str, otherwise: str) -> Any:
        chosen = plain.get(group, {"name": otherwise})
        if isinstance(chosen, dict) and (others := [f"{group}.{key}" for key in chosen if key != "name"]):
            raise TensLoRAError(f"{others[0]}: there is no such setting; {needs_global(group)}")
        return chosen.get("name") if isinstance(chosen, dict) else chosen

    arranged = {key: value for key, value in plain.items() if key not in ("tensor_mode", "factorization", "preset")}
    dataset = plain.get("dataset")
    if isinstance(dataset, dict) and dataset.get("name") is None and dataset.get("source") is not None:
        arranged["dataset"] = {**dataset, "name": _name_of_dataset(dataset)}
    model = plain.get("model")
    # A path may begin with ~, as that of dataset.root.
    if isinstance(model, dict) and isinstance(checkpoint := model.get("checkpoint"), str):
        model = arranged["model"] = {**model, "checkpoint": os.path.expanduser(checkpoint)}
    if isinstance(lora := plain.get("warm_start"), str):
        arranged["warm_start"] = os.path.expanduser(lora)
    if isinstance(model, dict) and "name" in model and model["name"] is None:
        arranged["model"] = {**model, "name": _name_of_model(model.get("checkpoint"), model.get("architecture"))}
    if "tensor_mode" not in plain:
        raise TensLoRAError("tensor_mode: is missing")
    tensor_mode = name_of("tensor_mode", "")
    adapter = plain.get("adapter", {})
    if isinstance(adapter, dict):
        adapter = {
            **adapter,
            # A run without an adapter ignores these settings. They are checked nevertheless, as if the run were LoRA.
            "tensor_mode": "lora" if tensor_mode in REFERENCES else tensor_mode,
            "factorization": name_of("factorization", "tucker"),
            "rank_strategy": plain.get("rank_strategy"),
            "seed": plain.get("seed"),
        }
    trainer = plain.get("trainer")
    if isinstance(trainer, dict) and "evaluate" not in trainer and "score_every" in trainer:  # from an earlier record
        trainer = dict(trainer)
        every = trainer.pop("score_every")
        arranged["trainer"] = {**trainer, "evaluate": "last" if every is None else every}
    logger = plain.get("logger")
    if isinstance(logger, dict) and "name" in logger:  # from a record of a version with one logger at a time
        name = logger["name"]
        if not isinstance(name, str):
            raise TensLoRAError(f"logger.name={shown(name)}: must be text")
        chosen = {} if name == "none" else {name: True}
        arranged["logger"] = {**chosen, **{key: value for key, value in logger.items() if key != "name"}}
    return {**arranged, "tensor_mode": tensor_mode, "preset": name_of("preset", "none"), "adapter": adapter}


def _name_after(path: str, setting: str) -> str:
    """The last part of a path as a name for folders, records and tables: "my/Pet photos" gives "Pet-photos"."""
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(path)), flags=re.ASCII).strip("-.")
    if not name:  # as of "/", which a shell makes of $DATA/ without such a variable
        raise TensLoRAError(
            f"{setting}={path}: its last part has no letter or digit of ASCII to make a name of; correct the path, or "
            f"set {setting.partition('.')[0]}.name"
        )
    return name


def _name_of_model(checkpoint: Any, architecture: Any) -> str:
    """The name of a generic model: "FacebookAI/roberta-base" gives "FacebookAI--roberta-base", a folder its last part.

    Args:
        checkpoint: a local file or folder, or a repository on the hub; None if the architecture says what is loaded.
        architecture: timm's name of the model, or None.
    """
    source = str(checkpoint or architecture or "")
    if checkpoint is None or not os.path.exists(source):
        return _name_of_repository(source) or "model"
    # A file that is named as all files of weights are says less than its folder.
    parent, name = os.path.split(source)
    return _name_after(parent if name in ("model.safetensors", "pytorch_model.bin") else source, "model.checkpoint")


def _name_of_repository(source: str) -> str:
    """A valid name made of any text, so that a complaint about the text names the setting that the user has typed."""
    return re.sub(r"[^\w.-]+", "-", source.strip("./").replace("/", "--"), flags=re.ASCII)[:100]


def _name_of_dataset(dataset: dict[str, Any]) -> str:
    """The name of a user's own data: "reviews.csv" gives "reviews", "user/name" on the hub "user--name"."""
    root, hub = dataset.get("root"), dataset.get("hub")
    if root is None and hub is not None:
        return _name_of_repository(str(hub)) or "hub"
    name = _name_after(str(root or dataset["source"]), "dataset.root")
    return re.sub(r"(?i)\.(csv|tsv|jsonl|json|ndjson|parquet)$", "", name)
