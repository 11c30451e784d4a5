"""The settings of a run as types. The values are in conf/, whose files say what each setting means.

A field's annotation is its range. A condition on several settings is checked by the class that holds all of them.
The settings of the adapter, of its rank strategy and of the backbone's geometry are the library's own types, with the
library's own checks. Nothing here needs torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.errors import TensLoRAError, require_path
from tenslora.harness.config import identity
from tenslora.harness.config.checks import (
    BelowOne,
    Count,
    CountOrNull,
    FolderName,
    NonNegative,
    NonNegativeInt,
    all_different,
    at_least_one,
    matching,
    one_of,
    shown,
    within,
)
from tenslora.harness.config.tuning import TuneConfig
from tenslora.harness.training.metrics import METRICS
from tenslora.hub import is_repository
from tenslora.ranks import RankStrategy, rank_limits

REFERENCES = ("head_only", "full")
"""Values of tensor_mode without an adapter: only the head is trained, or every weight."""

FACTORS = ("core", "d_in", "d_out", "d_head", "head", "projection", "depth", "site")
"""The names that the parameters of a tensor can have: the core, and the modes."""

IMAGE_SETTINGS = ("image_size", "channels", "mean", "std")
"""The settings of a model that only an image model has."""

TENSOR_MODES = (*CONSTRUCTIONS, *REFERENCES)

QUANTIZATIONS = ("nf4", "int8")
"""How a backbone's weights can be quantised."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's red, green and blue."""

LARGEST_SEED = 2**53
"""Larger numbers are not exact in every reader of JSON."""

OPTIONS_ELSEWHERE = {
    **dict.fromkeys(("num_classes", "num_labels", "id2label", "label2id", "problem_type"), "dataset"),
    **dict.fromkeys(("dtype", "torch_dtype", "use_bfloat16"), "trainer.precision"),
    **dict.fromkeys(("device", "device_map"), "trainer.device"),
    "quantization_config": "model.quantization",
    "pretrained": "model.pretrained",
    **dict.fromkeys(("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"), "model.checkpoint"),
}
"""The options of a model that other settings decide, and these settings."""

_OF_CREATE_MODEL = ("features_only", "feature_cfg", "out_indices", "scriptable", "exportable", "no_jit")
"""Arguments of timm.create_model that say how a model is wrapped or run. timm loads no exported model with them."""

ProjectName = Annotated[
    str, matching(r"[^/\\#?%:]{1,128}", "must be a name of at most 128 characters, without / \\ # ? % and :")
]
"""The name of a project of Weights & Biases, or of its owner."""

GroupName = Annotated[str, matching(r".{1,128}", "must be at most 128 characters")]
"""The name of a group of runs in Weights & Biases."""

SOURCES = ("image_folder", "vtab", "text_files")
"""What a dataset's `source` may be."""


def _of_each_stage(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]


@dataclass(frozen=True)
class ModelConfig:
    """A backbone: where its weights come from, and for an image model what its images look like.

    A named model of conf/model declares all of it. A generic one (timm, hf_image, hf_text) leaves open (None) what its
    own files say: its architecture, the size and the normalization of its images, its dimensions.

    `geometry` has the dimensions of each stage. A file writes those of a single stage without a list around them.

    `quantization` is how the Linear weights of the Transformer are stored; None is float32.
    """

    name: FolderName
    modality: Annotated[str, one_of(("image", "text"))]
    library: Annotated[str, one_of(("transformers", "timm"))]
    architecture: str | None
    options: dict[str, Any]
    checkpoint: str | None
    pretrained: bool
    geometry: Annotated[tuple[Geometry, ...] | None, BeforeValidator(_of_each_stage)]
    image_size: Annotated[int | None, within(0, 4096, or_null=True)] = 0
    channels: Annotated[int | None, within(0, or_null=True)] = 0
    mean: tuple[Annotated[float, within(-1e3, 1e3)], ...] | None = ()
    std: tuple[Annotated[float, within(1e-3, 1e3)], ...] | None = ()
    quantization: Annotated[str | None, one_of(QUANTIZATIONS)] = None

    def __post_init__(self) -> None:
        if self.geometry == ():
            raise TensLoRAError("geometry=[]: must have the dimensions of a stage, or of several, or be null")
        if self.quantization == "nf4" and self.library == "timm":
            raise TensLoRAError("quantization=nf4: must be int8 or null, because the model is one of timm")
        if self.architecture is None and self.library == "timm":
            raise TensLoRAError(f"architecture={self.architecture}: must be the name of a model of timm")
        if self.architecture is None and self.checkpoint is None:
            raise TensLoRAError(f"checkpoint={self.checkpoint}: must be a folder, or a repository of the hub")
        of_files = {"model_type": "model.checkpoint"} if self.architecture is None else {}
        for name, decides in {**OPTIONS_ELSEWHERE, **of_files}.items():
            if name in self.options:
                raise TensLoRAError(
                    f"options.{name}={shown(self.options[name])}: must be left out; {decides} decides it"
                )
        for name in _OF_CREATE_MODEL:
            if self.library == "timm" and name in self.options:
                raise TensLoRAError(
                    f"options.{name}={shown(self.options[name])}: must be left out; it is an argument of "
                    f"timm.create_model, and not one of the model"
                )
        if self.channels not in ((None, 1, 3) if self.modality == "image" else (0, None, 1, 3)):
            raise TensLoRAError(f"channels={self.channels}: must be 1 (grey) or 3 (red, green and blue)")
        if self.modality == "text":
            return
        if self.image_size is not None:
            if self.image_size < 1:
                raise TensLoRAError(f"image_size={self.image_size}: must be at least 1")
            patch = self._patch_size
            if patch is not None and self.image_size % patch:
                raise TensLoRAError(f"image_size={self.image_size}: must be a multiple of {patch}, the patches' size")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and self.channels is not None and len(values) != self.channels:
                raise TensLoRAError(
                    f"{name}={list(values)}: must have one number for each channel, and channels={self.channels}"
                )

    @property
    def _patch_size(self) -> int | None:
        """The height and the width of a patch, if the options or the architecture's name say it."""
        named = re.search(r"patch(\d{1,4})(?!\d)", self.architecture or "", re.ASCII)
        size = self.options.get("patch_size", int(named[1]) if named else None)
        return size if isinstance(size, int) and size > 0 else None

    @property
    def declares_images(self) -> bool:
        """Whether the settings say all about an image model's input, so that the model's own files are not asked."""
        return all(getattr(self, name) is not None for name in IMAGE_SETTINGS)


@dataclass(frozen=True)
class TransformConfig:
    """How an image is turned into the backbone's input; None is the model's own."""

    crop_ratio: Annotated[float | None, within(0.01, 1, or_null=True)]
    squash: bool | None
    interpolation: Annotated[str | None, one_of(("bilinear", "bicubic"))]
    color_jitter: Annotated[float, within(0, 10)]
    flip: bool
    normalize: Annotated[bool | str, one_of((True, False, "imagenet"))]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The settings that image and text datasets share.

    `source` is the kind of files that the dataset is read from; None if the dataset's name says it. `metrics` are the
    task's own (`tasks.Task.metrics`) if they are None.
    """

    name: FolderName
    root: str | None
    metrics: Annotated[tuple[str, ...] | None, at_least_one(METRICS), one_of(METRICS), all_different()]
    train_splits: Annotated[tuple[str, ...] | None, all_different()]
    test_split: str | None
    train_size: CountOrNull
    source: Annotated[str | None, one_of(SOURCES)] = None
    validation: Annotated[float | None, within(0, 1, above=True, below=True, or_null=True)] = None

    @property
    def scored_on(self) -> str:
        """The split that a run is scored on after every epoch: "test", or "validation" if one is held out."""
        return "test" if self.validation is None else "validation"

    def _check_train_splits(self) -> None:
        if self.train_splits == ():
            raise TensLoRAError("train_splits=[]: must be null for the usual one, or name at least one")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetConfig(DatasetConfig):
    """A dataset of images."""

    modality: Literal["image"]
    train_fraction: Annotated[float | None, within(0.001, 0.999, or_null=True)]
    transform: TransformConfig
    train_list: str | None = None
    test_list: str | None = None

    @property
    def scored_on(self) -> str:
        """As for any dataset; VTAB-1k's val200 is a validation split too."""
        return "validation" if self.source == "vtab" and self.test_split == "val200" else super().scored_on

    def __post_init__(self) -> None:
        if self.source == "image_folder":
            self._check_image_folder()
            return
        for setting in ("train_list", "test_list"):
            if value := getattr(self, setting):
                raise TensLoRAError(f"{setting}={value}: must be null, because only dataset=image_folder reads lists")

    def _check_image_folder(self) -> None:
        if self.root is None:
            raise TensLoRAError("root=null: must be the folder of the images")
        self._check_train_splits()
        lists = {"train_list": self.train_list, "test_list": self.test_list}
        for (setting, file), (other, other_file) in permutations(lists.items()):
            if file is None and other_file is not None:
                raise TensLoRAError(f"{setting}=null: must be a file, because {other} is {other_file}")
        if self.test_split is not None and self.test_split in (self.train_splits or ()):
            raise TensLoRAError(f"test_split={self.test_split}: must not be one of train_splits")
        chosen = [
            (setting, value)
            for setting, value in (
                ("train_list", self.train_list),
                ("train_fraction", self.train_fraction),
                ("train_splits", list(self.train_splits) if self.train_splits else None),
                ("test_split", self.test_split),
            )
            if value is not None
        ]
        # Only the last two go together.
        if len(chosen) > 1 and chosen[0][0] in ("train_list", "train_fraction"):
            (first, given), (second, value) = chosen[:2]
            raise TensLoRAError(f"{second}={value}: must be null, because {first} is {given}")


@dataclass(frozen=True, kw_only=True)
class TextDatasetConfig(DatasetConfig):
    """A dataset of sentences or pairs of sentences."""

    modality: Literal["text"]
    max_length: Annotated[int, within(4, 1_000_000)]
    padding: Annotated[str, one_of(("longest", "max_length"))]
    group_by_length: bool
    hub: str | None = None
    hub_config: str | None = None
    text_columns: Annotated[tuple[str, ...] | None, all_different()] = None
    label_column: str | None = None
    task: Annotated[str | None, one_of(("classification", "regression"))] = None
    train_fraction: Annotated[float | None, within(0.001, 0.999, or_null=True)] = None

    def __post_init__(self) -> None:
        if self.source == "text_files":
            self._check_text_files()
            return
        for setting in identity.TEXT_FILES_SETTINGS:
            if (value := getattr(self, setting)) is not None:
                raise TensLoRAError(f"{setting}={value}: must be null, because only dataset=text has this setting")

    def _check_text_files(self) -> None:
        self._check_train_splits()
        if self.root is None and self.hub is None:
            raise TensLoRAError("root=null: must be a file or folder of texts, or set dataset.hub")
        if self.root is not None and self.hub is not None:
            raise TensLoRAError(f"hub={self.hub}: must be null, because root is {self.root}")
        if self.hub is not None and not is_repository(self.hub):
            raise TensLoRAError(f"hub={self.hub}: must be the name of a dataset on the hub, such as user/name")
        if self.hub is None and self.hub_config is not None:
            raise TensLoRAError(f"hub_config={self.hub_config}: must be null, because hub is null")
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise TensLoRAError(f"text_columns={list(self.text_columns)}: must be one or two columns")
        if self.label_column is not None and self.label_column in (self.text_columns or ()):
            raise TensLoRAError(f"label_column={self.label_column}: must not be one of text_columns")
        if self.test_split is not None and self.test_split in (self.train_splits or ()):
            raise TensLoRAError(f"test_split={self.test_split}: must not be one of train_splits")
        if self.test_split is not None and self.train_fraction is not None:
            raise TensLoRAError(
                f"train_fraction={self.train_fraction}: must be null, because test_split is {self.test_split}"
            )


@dataclass(frozen=True)
class RankScheduleConfig:
    """Whether the ranks stay as they are chosen, or start higher and are cut while the run trains."""

    name: Annotated[str, one_of(("fixed", "prune"))] = "fixed"
    start: Annotated[float, within(1, 100)] = 1.0
    epochs: Annotated[tuple[Count, ...], all_different()] = ()

    def __post_init__(self) -> None:
        if self.name == "fixed":
            for setting, value in (("start", self.start != 1), ("epochs", self.epochs)):
                if value:
                    raise TensLoRAError(f"{setting}={getattr(self, setting)}: must be left out with name=fixed")
        elif not self.epochs or list(self.epochs) != sorted(self.epochs):
            raise TensLoRAError(f"epochs={list(self.epochs)}: must be at least one epoch, in rising order")

    def budget(self, epoch: int, start: int, end: int) -> int | None:
        """The number of parameters that the ranks are cut to after an epoch; from cut to cut it falls by one ratio.

        Args:
            epoch: the epoch's number, from 1.
            start: the number of parameters that the run starts with.
            end: the number of parameters after the last cut.

        Returns:
            The number; None after an epoch without a cut.
        """
        if epoch not in self.epochs:
            return None
        share = (self.epochs.index(epoch) + 1) / len(self.epochs)
        return end if share == 1 else round(start ** (1 - share) * end**share)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    name: Annotated[str, one_of(("adamw",))]
    lr: NonNegative
    min_lr: NonNegative
    warmup_steps: NonNegativeInt
    weight_decay: NonNegative
    core_lr_ratio: NonNegative
    factor_weight_decay: dict[str, Annotated[float | None, within(0, or_null=True)]]
    betas: tuple[BelowOne, ...]
    eps: Annotated[float, within(1e-30, 1)]

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise TensLoRAError(f"min_lr={self.min_lr}: must be at most lr, which is {self.lr:g}")
        if len(self.betas) != 2:
            raise TensLoRAError(f"betas={list(self.betas)}: must be two numbers")
        for factor in self.factor_weight_decay:
            if factor not in FACTORS:
                raise TensLoRAError(f"factor_weight_decay.{factor}: must be one of {', '.join(FACTORS)}")


def _evaluations(value: Any) -> str | int:
    if value in ("every_epoch", "last"):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return "every_epoch" if value == 1 else value
    raise ValueError("must be every_epoch, last, or a number of epochs, at least 1")


@dataclass(frozen=True)
class TrainerConfig:
    """How long a run trains, in which batches and precision, and on which device."""

    epochs: Count
    batch_size: Count
    accumulation: Count
    eval_batch_size: CountOrNull
    clip_norm: Annotated[float | None, within(0, above=True, or_null=True)]
    max_steps: CountOrNull
    precision: Annotated[str, one_of(("fp32", "bf16"))]
    compile: bool
    device: Annotated[str, matching(r"auto|cpu|cuda(:\d{1,3})?", "must be auto, cpu, cuda or cuda:<index>")]
    threads: Annotated[int | None, within(1, 4096, or_null=True)]
    workers: Annotated[int, within(0, 1024)]
    evaluate: Annotated[Any, AfterValidator(_evaluations)] = "every_epoch"

    @property
    def evaluate_every(self) -> int | None:
        """How many epochs lie between two evaluations; None if there is one alone, after the last epoch."""
        return {"every_epoch": 1, "last": None}.get(self.evaluate, self.evaluate)


@dataclass(frozen=True)
class LoggerConfig:
    """The loggers of a run, of which there may be none or several, and the settings of Weights & Biases."""

    csv: bool = False
    tensorboard: bool = False
    wandb: bool = False
    profile: bool = False
    mode: Annotated[str, one_of(("auto", "online", "offline", "disabled"))] = "disabled"
    project: ProjectName = "tenslora"
    entity: ProjectName | None = None
    group: GroupName | None = None
    tags: tuple[Annotated[str, matching(r".{1,64}", "must be at most 64 characters each")], ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """The checked settings of one run, which the harness uses instead of Hydra's config.

    Args:
        seed: the seed of all random numbers in the run.
        resume: whether to go on from the run's checkpoint, if there is one.
        warm_start: the folder of a LoRA that PEFT saved, from which the adapter starts; None for no warm start.
        model: the backbone.
        dataset: the dataset for training and testing.
        tensor_mode: a construction, or one of `REFERENCES`.
        rank_strategy: how the adapter's ranks are chosen. A run without an adapter has a rank strategy too, because its
            record holds the number of parameters of LoRA at this strategy's rank.
        adapter: the library's settings of the adapter; None for a run without an adapter.
        optimizer: AdamW and its schedule.
        trainer: how long the run trains, in which batches and precision, and on which device.
        logger: the loggers of the run.
        preset: the name of the published method that the settings follow, or "none".
        overwrite: whether to train a run anew that is finished.
        tuned: how one of the settings was chosen, by other runs; None if no sweep has chosen it.
        rank_schedule: whether the ranks are cut while the run trains. A run without an adapter ignores it.

    Raises:
        TensLoRAError: for settings that are each valid but do not fit each other.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    seed: Annotated[int, within(0, LARGEST_SEED)]
    resume: bool
    warm_start: str | None
    model: ModelConfig
    dataset: Annotated[ImageDatasetConfig | TextDatasetConfig, Field(discriminator="modality")]
    tensor_mode: Annotated[str, one_of(TENSOR_MODES)]
    rank_strategy: RankStrategy
    adapter: AdapterConfig | None
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig = LoggerConfig()
    preset: FolderName = "none"
    overwrite: bool = False
    tuned: TuneConfig | None = None
    rank_schedule: RankScheduleConfig = RankScheduleConfig()

    def __post_init__(self) -> None:
        self._check_rank_schedule()
        if self.warm_start is not None:
            require_path("warm_start", self.warm_start)
        model, dataset = self.model, self.dataset
        if model.modality != dataset.modality:
            raise TensLoRAError(
                f"model={model.name}: takes {model.modality}s, and dataset={dataset.name} holds {dataset.modality}s"
            )
        transform = getattr(dataset, "transform", None)  # in a program it may be no group of settings
        if getattr(transform, "normalize", None) == "imagenet" and model.channels not in (None, 3):
            raise TensLoRAError(
                f"dataset.transform.normalize=imagenet: must be true or false, because model={model.name} takes images "
                f"of another number of channels than 3"
            )
        if model.quantization is not None and self.tensor_mode == "full":
            raise TensLoRAError(
                f"model.quantization={model.quantization}: must be null with tensor_mode=full, because quantised "
                f"weights cannot be trained"
            )
        if self.adapter is None and self.tensor_mode not in REFERENCES:
            raise TensLoRAError(f"adapter=null: tensor_mode={self.tensor_mode} needs the settings of an adapter")

    def _check_rank_schedule(self) -> None:
        schedule, trainer = self.rank_schedule, self.trainer
        if schedule.name == "fixed" or self.adapter is None or self.tensor_mode in REFERENCES:
            return
        if self.tensor_mode != "lora" and self.adapter.factorization not in ("tucker", "tensor_train"):
            raise TensLoRAError(
                f"factorization={self.adapter.factorization}: must be tucker or tensor_train with rank_schedule=prune"
            )
        if schedule.epochs[-1] >= trainer.epochs:
            raise TensLoRAError(
                f"rank_schedule.epochs={list(schedule.epochs)}: must be below {trainer.epochs}, the last epoch"
            )
        if trainer.compile:
            raise TensLoRAError("trainer.compile=true: must be false with rank_schedule=prune")

    def start_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        """The ranks that the adapter starts with: those of its rank strategy, or higher ones that will be cut.

        isoparameters gets `rank_schedule.start` times the budget; the ranks of other strategies, and LoRA's, are
        multiplied, up to their limits.

        Args:
            geometry: the dimensions of a stage of the backbone.

        Raises:
            TensLoRAError: for ranks that do not fit the geometry.
        """
        assert self.adapter is not None
        strategy, schedule = self.rank_strategy, self.rank_schedule
        chosen = self.tensor_mode, geometry, self.adapter.factorization
        if schedule.name == "fixed":
            return strategy.resolve(*chosen)
        if strategy.name == "isoparameters" and self.tensor_mode != "lora":
            return replace(strategy, scale=strategy.scale * schedule.start).resolve(*chosen)
        limits = rank_limits(*chosen).values()
        ranks = strategy.resolve(*chosen)
        return tuple(min(n, max(1, round(schedule.start * r))) for r, n in zip(ranks, limits, strict=True))

    def with_seed(self, seed: int) -> RunConfig:
        """The same run with another seed, also for its adapter.

        Args:
            seed: a whole number, from 0 to `LARGEST_SEED`.

        Returns:
            The settings with that seed.

        Raises:
            TensLoRAError: for a seed that is not such a number.
        """
        if not isinstance(seed, int) or seed < 0:
            raise TensLoRAError(f"seed={seed}: must be a whole number, at least 0")
        if seed > LARGEST_SEED:
            raise TensLoRAError(f"seed={seed}: must be at most {LARGEST_SEED}")
        return replace(self, seed=seed, adapter=self.adapter and replace(self.adapter, seed=seed))

    @cached_property
    def geometries(self) -> tuple[Geometry, ...] | None:
        """The dimensions of each of the backbone's stages, as conf/model declares them; None where they are open."""
        declared = self.model.geometry
        adapt = self.adapter.adapt if self.adapter else "qkv"
        if declared is None or (any(stage.d_ff is None for stage in declared) and adapt in ("mlp", "all")):
            return None
        return tuple(replace(stage, adapt=adapt) for stage in declared)

    @property
    def row_strategy(self) -> str:
        """The rank strategy where it tells runs of one tensor_mode apart, otherwise "".

        LoRA of one rank is the same run under isorank and isoparameters, and a run without an adapter has no ranks.
        """
        if self.adapter is None or (self.tensor_mode == "lora" and self.rank_strategy.name != "explicit"):
            return ""
        return self.rank_strategy.name

    @property
    def row_factorization(self) -> str:
        """The factorization where it tells runs apart; "" for Tucker, LoRA and runs without an adapter."""
        if self.adapter is None or self.tensor_mode == "lora" or self.adapter.factorization == "tucker":
            return ""
        return self.adapter.factorization

    def settings(self) -> dict[str, Any]:
        """All settings, nested as in conf/, for the record and the logger."""
        return identity.settings(self)

    def identity(self) -> dict[str, Any]:
        """The settings that can change the run's result."""
        return identity.identity(self)

    def digest(self) -> str:
        """Twelve hexadecimal digits that are equal for equal identities."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return identity.digest(self)

    def folder(self) -> str:
        """The run's folder below outputs/, such as digits/vit_digits/qkv-isorank-seed0-0123456789ab."""
        return identity.folder(self)
