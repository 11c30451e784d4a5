"""What identifies a run: the settings that can change its result, their digest, and the folder named after them.

Settings are compared in the layout of conf/, which the records of all versions of this project share. A setting that is
added later must not change the digests of runs with its default: `identity` has to leave such a default out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.constructions import Geometry
from tenslora.harness.stages import as_in_files

if TYPE_CHECKING:
    from tenslora.harness.config.schema import RunConfig

_STRATEGY_SETTINGS = {
    "isorank": ("name", "rank", "cap"),
    "isoparameters": ("name", "rank", "rule", "tolerance", "scale"),
    "explicit": ("name", "rank", "ranks"),
}
"""The settings that each rank strategy reads, which are those of its file in conf/rank_strategy."""

_WITHOUT_EFFECT = ("logger", "resume", "overwrite", "preset", "tuned")
"""Settings that cannot change a result: the loggers, how the run was started, and where its settings come from."""

TEXT_FILES_SETTINGS = ("hub", "hub_config", "text_columns", "label_column", "task", "train_fraction")
"""The settings that only a user's own texts have."""

_TRAINER_WITHOUT_EFFECT = ("compile", "device", "threads", "workers", "eval_batch_size")
"""Settings of the trainer that only say where and how fast a run goes."""

_LATER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adapter": {"scaling": "direct"},
    "dataset": {"validation": None},
    "model": {"quantization": None},
    "trainer": {"score_every": 1},
}
"""The defaults, by group, of settings that are younger than the oldest records, whose identities lack them."""


def settings(run: RunConfig) -> dict[str, Any]:
    """All settings of a run as plain values, nested as in conf/.

    `config.validate` turns these values into the same `RunConfig` again.

    Args:
        run: the typed settings of the run.
    """
    strategy = run.rank_strategy
    nested: dict[str, Any] = {
        "seed": run.seed,
        "resume": run.resume,
        "overwrite": run.overwrite,
        "warm_start": run.warm_start,
        "preset": {"name": run.preset},
        "tensor_mode": {"name": run.tensor_mode},
        "rank_strategy": {name: _plain(getattr(strategy, name)) for name in _STRATEGY_SETTINGS[strategy.name]},
        "rank_schedule": {"name": "fixed"} if run.rank_schedule.name == "fixed" else _fields(run.rank_schedule),
        "model": _fields(run.model),
        "dataset": _fields(run.dataset),
        "optimizer": _fields(run.optimizer),
        "trainer": _fields(run.trainer),
        "logger": _fields(run.logger),
    }
    if run.tuned is not None:
        nested["tuned"] = _fields(run.tuned)
    if run.adapter is not None:
        adapter = _fields(run.adapter)
        for name in ("tensor_mode", "rank_strategy", "seed"):
            del adapter[name]
        nested["factorization"] = {"name": adapter.pop("factorization")}
        nested["adapter"] = adapter
    if run.model.geometry is not None:
        nested["model"]["geometry"] = as_in_files(map(_dimensions, run.model.geometry))
    # The files in conf/dataset have these settings only where they mean something.
    if run.dataset.source is None:
        del nested["dataset"]["source"]
    if run.dataset.source != "image_folder":
        for name in ("train_list", "test_list"):
            nested["dataset"].pop(name, None)
    if run.dataset.source != "text_files" and run.dataset.modality == "text":
        for name in TEXT_FILES_SETTINGS:
            del nested["dataset"][name]
    if run.model.modality == "text":
        for name in ("image_size", "channels", "mean", "std"):  # schema.IMAGE_SETTINGS, whose module imports this one
            del nested["model"][name]
    return nested


def identity(run: RunConfig) -> dict[str, Any]:
    """The settings that can change the run's result: all except the device, the speed, and the loggers.

    Args:
        run: the typed settings of the run.
    """
    relevant = {key: value for key, value in settings(run).items() if key not in _WITHOUT_EFFECT}
    for name in _TRAINER_WITHOUT_EFFECT:
        del relevant["trainer"][name]
    del relevant["trainer"]["evaluate"]
    relevant["trainer"]["score_every"] = run.trainer.evaluate_every  # the setting's name in earlier versions
    for group, defaults in _LATER_DEFAULTS.items():
        of_group = relevant.get(group, {})  # a run without an adapter has no settings of one
        for name, default in defaults.items():
            if name in of_group and of_group[name] == default:
                del of_group[name]
    if run.rank_schedule.name == "fixed" or run.adapter is None:  # younger than the oldest records, too
        del relevant["rank_schedule"]
    if run.adapter is None:
        del relevant["rank_strategy"], relevant["warm_start"]
        del relevant["optimizer"]["core_lr_ratio"], relevant["optimizer"]["factor_weight_decay"]
    elif run.tensor_mode == "lora":
        del relevant["factorization"]
        if run.row_strategy == "":
            relevant["rank_strategy"] = {"rank": run.rank_strategy.rank}
            if run.rank_schedule.name == "fixed":  # LoRA then has its own first step under either value
                relevant["adapter"].pop("scaling", None)
    normalized: dict[str, Any] = _with_whole_numbers(relevant)
    return normalized


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the defaults that it leaves out, to be compared with another one setting by setting.

    Args:
        identity: the result of `identity`.
    """
    whole = dict(identity)
    for group, defaults in _LATER_DEFAULTS.items():
        # Without a factorization the adapter is LoRA, to which adapter.scaling means nothing.
        if group in identity and (group != "adapter" or "factorization" in identity):
            whole[group] = {**defaults, **identity[group]}
    if "adapter" in identity:
        whole.setdefault("rank_schedule", {"name": "fixed"})
    return whole


def digest(run: RunConfig) -> str:
    """Twelve hexadecimal digits that are equal for equal identities.

    Args:
        run: the typed settings of the run.
    """
    return digest_of(identity(run))


def digest_of(identity: dict[str, Any]) -> str:
    """The digest of an identity, as a run's record holds it too.

    Args:
        identity: the result of `identity`.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def folder(run: RunConfig) -> str:
    """The run's folder below outputs/: dataset/model/construction-factorization-strategy-seedN-digest.

    The factorization and the strategy are left out where they do not tell runs apart.

    Args:
        run: the typed settings of the run.
    """
    row = "-".join(filter(None, (run.tensor_mode, run.row_factorization, run.row_strategy)))
    return f"{run.dataset.name}/{run.model.name}/{row}-seed{run.seed}-{run.digest()}"


def _dimensions(geometry: Geometry) -> dict[str, Any]:
    # The files in conf/model leave out what has its default; `adapt` belongs to the adapter.
    return {
        field.name: value
        for field in fields(geometry)
        if field.name != "adapt" and (value := getattr(geometry, field.name)) != field.default
    }


def _fields(settings: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(settings, field.name)) for field in fields(settings)}


def _plain(value: Any) -> Any:
    # JSON and YAML have only lists, no paths and no dataclasses.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):  # a program may give one
        return str(value)
    return _fields(value) if is_dataclass(value) else value


def _with_whole_numbers(value: Any) -> Any:
    # Turns 4.0 into 4, because both are the same setting.
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
