"""The settings of one run: typed, checked, and what of them identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tenslora.constructions import CONSTRUCTIONS, HEAD_LAYOUTS, INITS, TENSOR_SEEDS, Geometry, adapted_matrices
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.factorizations.tucker import RULES
from tenslora.ranks import STRATEGIES, RankStrategy

REFERENCES = ("head_only", "full")
"""Values of tensor_mode that have no adapter: only the head is trained, or every weight."""

SWEEP_KEYS = ("table", "dry_run", "collect_only")
"""What a job of a sweep has in its config beside the settings of the run."""

FACTORS = ("core", "d_in", "d_out", "d_head", "head", "projection", "depth", "site")
"""What the parameters of a tensor can be called: the core, and the modes."""

METRICS = ("accuracy", "matthews", "f1")

# OmegaConf reads these annotations at run time and knows Optional[...] in every version that we support.
# Values live in conf/; nothing here has a default but what a file may leave out.


@dataclass
class GeometryConfig:
    d_in: int = MISSING
    heads: int = MISSING
    d_head: int = MISSING
    layers: int = MISSING
    kv_heads: Optional[int] = None  # noqa: UP045
    d_ff: Optional[int] = None  # noqa: UP045
    gated: bool = False


@dataclass
class ModelConfig:
    name: str = MISSING
    modality: str = MISSING
    library: str = MISSING
    architecture: str = MISSING
    options: dict[str, Any] = MISSING
    checkpoint: Optional[str] = MISSING  # noqa: UP045
    pretrained: bool = MISSING
    geometry: Optional[GeometryConfig] = MISSING  # noqa: UP045
    image_size: int = 0
    channels: int = 0
    mean: list[float] = dataclasses.field(default_factory=list)
    std: list[float] = dataclasses.field(default_factory=list)


@dataclass
class TransformConfig:
    crop_ratio: float = MISSING
    squash: bool = MISSING
    interpolation: str = MISSING
    color_jitter: float = MISSING
    flip: bool = MISSING
    normalize: bool = MISSING


@dataclass
class DatasetConfig:
    name: str = MISSING
    modality: str = MISSING
    root: Optional[str] = MISSING  # noqa: UP045
    metrics: list[str] = MISSING
    train_splits: Optional[list[str]] = MISSING  # noqa: UP045
    test_split: Optional[str] = MISSING  # noqa: UP045
    train_size: Optional[int] = MISSING  # noqa: UP045


@dataclass
class ImageDatasetConfig(DatasetConfig):
    train_fraction: Optional[float] = MISSING  # noqa: UP045
    transform: TransformConfig = dataclasses.field(default_factory=TransformConfig)


@dataclass
class TextDatasetConfig(DatasetConfig):
    max_length: int = MISSING
    padding: str = MISSING
    group_by_length: bool = MISSING


@dataclass
class NameConfig:
    name: str = MISSING


@dataclass
class RankStrategyConfig:
    name: str = MISSING
    rank: int = 4
    ranks: Optional[list[int]] = None  # noqa: UP045
    cap: bool = False
    rule: str = "saturate"
    tolerance: float = 0.01
    scale: float = 1.0


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = MISSING
    min_lr: float = MISSING
    warmup_steps: int = MISSING
    weight_decay: float = MISSING
    core_lr_ratio: float = MISSING
    factor_weight_decay: dict[str, Optional[float]] = MISSING  # noqa: UP045
    betas: list[float] = MISSING
    eps: float = MISSING


@dataclass
class AdapterSettings:
    adapt: str = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    rank_dropout: float = MISSING
    init: str = MISSING
    head_layout: str = MISSING
    tensor_seeds: str = MISSING


@dataclass
class TrainerConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    accumulation: int = MISSING
    eval_batch_size: Optional[int] = MISSING  # noqa: UP045
    clip_norm: Optional[float] = MISSING  # noqa: UP045
    max_steps: Optional[int] = MISSING  # noqa: UP045
    precision: str = MISSING
    compile: bool = MISSING
    device: str = MISSING
    threads: Optional[int] = MISSING  # noqa: UP045
    workers: int = MISSING


@dataclass
class LoggerConfig:
    name: str = MISSING
    mode: str = "disabled"
    project: str = "tenslora"
    entity: Optional[str] = None  # noqa: UP045
    group: Optional[str] = None  # noqa: UP045
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclass
class RunConfig:
    """The settings of one run; conf/config.yaml and the group files say what each means."""

    seed: int = MISSING
    resume: bool = MISSING
    warm_start: Optional[str] = MISSING  # noqa: UP045
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    dataset: Any = MISSING
    preset: NameConfig = dataclasses.field(default_factory=NameConfig)
    tensor_mode: NameConfig = dataclasses.field(default_factory=NameConfig)
    factorization: NameConfig = dataclasses.field(default_factory=NameConfig)
    rank_strategy: RankStrategyConfig = dataclasses.field(default_factory=RankStrategyConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    adapter: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    logger: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)

    @property
    def mode(self) -> str:
        return self.tensor_mode.name

    @property
    def has_adapter(self) -> bool:
        return self.mode not in REFERENCES

    @property
    def strategy(self) -> RankStrategy:
        given = self.rank_strategy
        ranks = None if given.ranks is None else tuple(given.ranks)
        return RankStrategy(given.name, given.rank, ranks, given.cap, given.rule, given.tolerance, given.scale)

    @property
    def geometry(self) -> Geometry | None:
        """The backbone's dimensions as declared, before anything is loaded; None where they are left open."""
        declared = self.model.geometry
        adapt = self.adapter.adapt if self.has_adapter else "qkv"
        if declared is None or (declared.d_ff is None and adapt in ("mlp", "all")):
            return None
        return Geometry(**vars(declared), adapt=adapt)


def validate(composed: DictConfig) -> RunConfig:
    """Turn Hydra's composed config into typed, checked settings.

    Raises TensLoRAError that names the setting, its value and what would be valid, for the first one at fault;
    that includes a model and a dataset that do not go together, and ranks that do not fit the declared geometry.
    """
    text = OmegaConf.select(composed, "dataset.modality") == "text"
    schema = OmegaConf.structured(RunConfig)
    schema.dataset = OmegaConf.structured(TextDatasetConfig if text else ImageDatasetConfig)
    try:
        plain = OmegaConf.create(_own(composed, throw_on_missing=True))
        run = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except OmegaConfBaseException as error:
        key, reason = error.full_key, str(error).splitlines()[0]
        if key and "not a ListConfig" in reason:
            key, reason = f"{key}={OmegaConf.select(composed, key)}", "must be a list, as [4,4]"
        raise TensLoRAError(f"{key}: {reason}" if key else reason) from error
    assert isinstance(run, RunConfig)
    check(run)
    return run


def settings(composed: DictConfig) -> dict[str, Any]:
    """The settings of a run as plain, resolved values, without Hydra's own and the sweep's."""
    return _own(composed, throw_on_missing=False)


def _own(composed: DictConfig, throw_on_missing: bool) -> dict[str, Any]:
    # Key by key: OmegaConf's masked copy takes thirty times as long, and a sweep asks for many.
    return {
        str(key): OmegaConf.to_container(node, resolve=True, throw_on_missing=throw_on_missing)
        if OmegaConf.is_config(node := composed[key])
        else node
        for key in composed
        if key not in ("hydra", *SWEEP_KEYS)
    }


def identity(composed: DictConfig) -> dict[str, Any]:
    """The settings that can change a run's result: all but the device it runs on, how fast, and what watches it."""
    result = {key: value for key, value in settings(composed).items() if key not in ("logger", "resume", "preset")}
    for key in ("compile", "device", "threads", "workers", "eval_batch_size"):
        del result["trainer"][key]
    if result["tensor_mode"]["name"] in REFERENCES:
        del result["factorization"], result["rank_strategy"], result["adapter"]
        del result["warm_start"], result["optimizer"]["core_lr_ratio"], result["optimizer"]["factor_weight_decay"]
    elif result["tensor_mode"]["name"] == "lora":
        del result["factorization"]
        if strategy_of(composed) == "":
            result["rank_strategy"] = {"rank": result["rank_strategy"]["rank"]}
    plain = _canonical(result)
    assert isinstance(plain, dict)
    return plain


def _canonical(value: Any) -> Any:
    # 4 and 4.0 are one setting, however it was written.
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(composed: DictConfig) -> str:
    """Twelve hexadecimal digits of `identity`: equal for equal runs, whatever their number."""
    return hashlib.sha256(json.dumps(identity(composed), sort_keys=True).encode()).hexdigest()[:12]


def run_folder(composed: DictConfig) -> str:
    """The folder of a run, named after what was run: dataset/model/construction-strategy-seed-digest."""
    row = "-".join(filter(None, (composed.tensor_mode.name, factorization_of(composed), strategy_of(composed))))
    return f"{composed.dataset.name}/{composed.model.name}/{row}-seed{composed.seed}-{digest(composed)}"


def strategy_of(composed: DictConfig) -> str:
    """The rank strategy that sets a run apart from others of its tensor_mode; empty where none does.

    LoRA at a rank is one run under isorank and isoparameters; a run without an adapter has no ranks.
    """
    mode, strategy = composed.tensor_mode.name, composed.rank_strategy.name
    return "" if mode in REFERENCES or (mode == "lora" and strategy != "explicit") else str(strategy)


def factorization_of(composed: DictConfig) -> str:
    """The factorization that sets a run apart; empty for the paper's Tucker, and where there are no tensors."""
    mode, name = composed.tensor_mode.name, composed.factorization.name
    return "" if mode in (*REFERENCES, "lora") or name == "tucker" else str(name)


def register_resolvers() -> None:
    """Make ${run_folder:} known to the config files."""
    OmegaConf.register_new_resolver("run_folder", lambda *, _root_: run_folder(_root_), replace=True)


def check(run: RunConfig) -> None:
    """The part of `validate` that looks at values: ranges, names, and what does not go together."""
    model, dataset, optimizer, trainer = run.model, run.dataset, run.optimizer, run.trainer
    if model.modality != dataset.modality:
        raise TensLoRAError(
            f"model={model.name}: takes {model.modality}s, and dataset={dataset.name} holds {dataset.modality}s"
        )
    _one_of("tensor_mode", run.mode, (*CONSTRUCTIONS, *REFERENCES))
    _one_of("factorization", run.factorization.name, tuple(FACTORIZATIONS))
    _one_of("rank_strategy", run.rank_strategy.name, STRATEGIES)
    _one_of("rank_strategy.rule", run.rank_strategy.rule, tuple(RULES))
    _one_of("model.library", model.library, ("transformers", "timm"))
    adapted_matrices(run.adapter.adapt)
    _one_of("adapter.init", run.adapter.init, INITS)
    _one_of("adapter.head_layout", run.adapter.head_layout, HEAD_LAYOUTS)
    _one_of("adapter.tensor_seeds", run.adapter.tensor_seeds, TENSOR_SEEDS)
    _one_of("optimizer", optimizer.name, ("adamw",))
    _one_of("trainer.precision", trainer.precision, ("fp32", "bf16"))
    _one_of("logger", run.logger.name, ("none", "wandb"))
    _one_of("logger.mode", run.logger.mode, ("auto", "online", "offline", "disabled"))
    if not dataset.metrics:
        raise TensLoRAError(f"dataset.metrics=[]: needs at least one of {', '.join(METRICS)}")
    for metric in dataset.metrics:
        _one_of("dataset.metrics", metric, METRICS)
    _within("seed", run.seed, 0)
    _within("adapter.dropout", run.adapter.dropout, 0, 1, open_end=True)
    _within("adapter.rank_dropout", run.adapter.rank_dropout, 0, 1, open_end=True)
    _within("adapter.alpha", run.adapter.alpha)
    _within("optimizer.lr", optimizer.lr, 0)
    _within("optimizer.min_lr", optimizer.min_lr, 0, optimizer.lr)
    _within("optimizer.weight_decay", optimizer.weight_decay, 0)
    _within("optimizer.core_lr_ratio", optimizer.core_lr_ratio, 0)
    for factor, decay in optimizer.factor_weight_decay.items():
        _one_of("optimizer.factor_weight_decay", factor, FACTORS)
        _within(f"optimizer.factor_weight_decay.{factor}", decay, 0)
    _within("optimizer.eps", optimizer.eps, 0)
    _within("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if len(optimizer.betas) != 2:
        raise TensLoRAError(f"optimizer.betas={optimizer.betas}: must be two numbers")
    for beta in optimizer.betas:
        _within("optimizer.betas", beta, 0, 1, open_end=True)
    _within("trainer.workers", trainer.workers, 0)
    for name in ("epochs", "batch_size", "accumulation", "eval_batch_size", "max_steps", "threads"):
        _within(f"trainer.{name}", getattr(trainer, name), 1)
    _within("dataset.train_size", dataset.train_size, 1)
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise TensLoRAError(f"trainer.clip_norm={trainer.clip_norm}: must be above 0, or null for no clipping")
    if isinstance(dataset, TextDatasetConfig):
        _one_of("dataset.padding", dataset.padding, ("longest", "max_length"))
        _within("dataset.max_length", dataset.max_length, 4)
    else:
        _one_of("dataset.transform.interpolation", dataset.transform.interpolation, ("bilinear", "bicubic"))
        _within("dataset.transform.crop_ratio", dataset.transform.crop_ratio, 0.01, 1)
        _within("dataset.transform.color_jitter", dataset.transform.color_jitter, 0)
        _within("dataset.train_fraction", dataset.train_fraction, 0.001, 0.999)
        _within("model.image_size", model.image_size, 1)
        if not len(model.mean) == len(model.std) == model.channels:
            raise TensLoRAError(
                f"model.mean={model.mean}: mean and std need one number for each of {model.channels} channels"
            )
    if run.has_adapter and run.geometry:
        run.strategy.resolve(run.mode, run.geometry, run.factorization.name)


def _one_of(setting: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise TensLoRAError(f"{setting}={value}: must be one of {', '.join(valid)}")


def _within(
    setting: str, value: float | None, low: float = -math.inf, high: float = math.inf, open_end: bool = False
) -> None:
    if value is None:
        return
    if not (low <= value < high if open_end else low <= value <= high) or not math.isfinite(value):
        end = "below" if open_end else "at most"
        bounds = [f"at least {low:g}"] if math.isfinite(low) else []
        bounds += [f"{end} {high:g}"] if math.isfinite(high) else ["finite"]
        raise TensLoRAError(f"{setting}={value}: must be {' and '.join(bounds)}")
