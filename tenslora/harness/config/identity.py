"""What identifies a run: the settings that can change its result, their digest, and the folder named after them.

Settings are compared in the form that the files in conf/ have, which records of all versions of this project share. A
setting that is added later must leave the digest of runs with its default as it was: leave it out here where it has
its default.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenslora.harness.config.schema import RunConfig

_STRATEGY_SETTINGS = {
    "isorank": ("name", "rank", "cap"),
    "isoparameters": ("name", "rank", "rule", "tolerance", "scale"),
    "explicit": ("name", "rank", "ranks"),
}
"""The settings that each rank strategy reads, which are those of its file in conf/rank_strategy."""

_WITHOUT_EFFECT = ("logger", "resume", "preset")
"""Groups that cannot change a result: who watches the run, and what the settings were picked after."""

_TRAINER_WITHOUT_EFFECT = ("compile", "device", "threads", "workers", "eval_batch_size")
"""Settings of the trainer that only say where and how fast a run goes."""


def settings(run: RunConfig) -> dict[str, Any]:
    """All settings of a run as plain values, nested as in conf/.

    `checks.validate` turns them into the same run again.
    """
    strategy = run.rank_strategy
    nested: dict[str, Any] = {
        "seed": run.seed,
        "resume": run.resume,
        "warm_start": run.warm_start,
        "preset": {"name": run.preset},
        "tensor_mode": {"name": run.tensor_mode},
        "rank_strategy": {name: getattr(strategy, name) for name in _STRATEGY_SETTINGS[strategy.name]},
        "model": asdict(run.model),
        "dataset": asdict(run.dataset),
        "optimizer": asdict(run.optimizer),
        "trainer": asdict(run.trainer),
        "logger": asdict(run.logger),
    }
    if run.adapter is not None:
        adapter = asdict(run.adapter)
        for name in ("tensor_mode", "rank_strategy", "seed"):
            del adapter[name]
        nested["factorization"] = {"name": adapter.pop("factorization")}
        nested["adapter"] = adapter
    if run.model.geometry is not None:  # a file declares no more of it than its backbone needs
        declared = run.model.geometry
        nested["model"]["geometry"] = {
            field.name: value
            for field in fields(declared)
            if field.name != "adapt" and (value := getattr(declared, field.name)) != field.default
        }
    if run.model.modality == "text":
        for name in ("image_size", "channels", "mean", "std"):
            del nested["model"][name]
    plain = _plain(nested)
    assert isinstance(plain, dict)
    return plain


def identity(run: RunConfig) -> dict[str, Any]:
    """The settings that can change the run's result: all but the device it runs on, its speed, and who watches it."""
    relevant = {key: value for key, value in settings(run).items() if key not in _WITHOUT_EFFECT}
    for name in _TRAINER_WITHOUT_EFFECT:
        del relevant["trainer"][name]
    if run.adapter is None:
        del relevant["rank_strategy"], relevant["warm_start"]
        del relevant["optimizer"]["core_lr_ratio"], relevant["optimizer"]["factor_weight_decay"]
    elif run.tensor_mode == "lora":
        del relevant["factorization"]
        if run.row_strategy == "":
            relevant["rank_strategy"] = {"rank": run.rank_strategy.rank}
    whole = _with_whole_numbers(relevant)
    assert isinstance(whole, dict)
    return whole


def digest(run: RunConfig) -> str:
    """Twelve hexadecimal digits of the run's identity."""
    return hashlib.sha256(json.dumps(identity(run), sort_keys=True).encode()).hexdigest()[:12]


def folder(run: RunConfig) -> str:
    """The run's folder below outputs/, named after what was run."""
    row = "-".join(filter(None, (run.tensor_mode, run.row_factorization, run.row_strategy)))
    return f"{run.dataset.name}/{run.model.name}/{row}-seed{run.seed}-{digest(run)}"


def _plain(value: Any) -> Any:
    # Lists for tuples, as JSON and YAML have them.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _with_whole_numbers(value: Any) -> Any:
    # 4 and 4.0 are one setting, however it was written.
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
