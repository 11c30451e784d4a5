from __future__ import annotations

import copy
import re
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from tenslora.constructions import CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.harness.config import (
    ImageDatasetConfig,
    RunConfig,
    TextDatasetConfig,
    digest,
    identity,
    register_resolvers,
    run_folder,
    validate,
)

CONF = Path(__file__).parents[3] / "conf"


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


@cache
def chosen(*groups: str) -> DictConfig:
    return composed(*groups)


def edited(*overrides: str) -> DictConfig:
    """As `composed`, but what needs no other files is set as Hydra sets it, which is much quicker."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if (CONF / override.key_or_group).is_dir()]
    config = copy.deepcopy(chosen(*(override.input_line or "" for override in groups)))
    for override in parsed:
        if override not in groups:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


def run(*overrides: str) -> RunConfig:
    return validate(chosen(*overrides))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("dataset", options("dataset"))
def test_a_dataset_picks_its_model_and_kind(dataset: str) -> None:
    expected = {
        "digits": "vit_digits",
        **dict.fromkeys(("cola", "mrpc", "sst2", "qnli", "rte"), "roberta_base"),
    }.get(dataset, "vit_base")
    settings = run(f"dataset={dataset}")
    assert (settings.dataset.name, settings.model.name) == (dataset, expected)
    assert isinstance(settings.dataset, TextDatasetConfig if expected == "roberta_base" else ImageDatasetConfig)


@pytest.mark.parametrize(
    ("dataset", "model"), [("dtd", "vit_small_timm"), ("cola", "minilm"), ("digits", "deit_tiny_timm")]
)
def test_a_model_on_the_command_line_wins_in_either_order(dataset: str, model: str) -> None:
    for order in permutations([f"dataset={dataset}", f"model={model}"]):
        settings = run(*order)
        assert (settings.dataset.name, settings.model.name) == (dataset, model)


@pytest.mark.parametrize("model", options("model"))
def test_every_model_validates(model: str) -> None:
    text = model in ("roberta_base", "bert_base", "minilm")
    settings = run(f"model={model}", f"dataset={'cola' if text else 'dtd'}")
    assert settings.model.name == model
    assert settings.geometry is not None
    assert settings.geometry.d_in == settings.geometry.d_out  # all ours are square


def test_every_construction_and_reference_has_its_option() -> None:
    assert set(options("tensor_mode")) == {*CONSTRUCTIONS, "head_only", "full"}
    for mode in options("tensor_mode"):
        settings = validate(edited(f"tensor_mode={mode}"))
        assert settings.mode == mode
        assert settings.has_adapter == (mode in CONSTRUCTIONS)


def test_the_papers_protocol_is_the_default() -> None:
    settings = run("dataset=dtd")
    assert (settings.optimizer.lr, settings.optimizer.min_lr, settings.adapter.alpha) == (1e-3, 1e-6, 4.0)
    assert (settings.dataset.train_size, settings.trainer.epochs, settings.trainer.batch_size) == (1000, 10, 64)
    eurosat = run("dataset=eurosat")
    assert eurosat.dataset.train_fraction == 0.8
    assert round(eurosat.model.image_size / eurosat.dataset.transform.crop_ratio) == 300


def test_a_dataset_sets_the_batch_size_unless_the_command_line_does() -> None:
    assert run("dataset=digits").trainer.batch_size == 32
    assert run("dataset=dtd").trainer.batch_size == 64
    assert run("trainer.batch_size=8", "dataset=digits").trainer.batch_size == 8


def test_full_fine_tuning_brings_its_own_rate_unless_the_command_line_does() -> None:
    assert run("tensor_mode=full").optimizer.lr == 5e-5
    assert run("tensor_mode=full", "optimizer.lr=1e-4").optimizer.lr == 1e-4
    assert run("tensor_mode=head_only").optimizer.lr == 1e-3


def test_the_image_size_reaches_the_architecture() -> None:
    assert run("dataset=dtd", "model=vit_small_timm", "model.image_size=112").model.options == {"img_size": 112}


@pytest.mark.parametrize(
    "same",
    [
        "logger=wandb",
        "resume=true",
        "trainer.device=cpu",
        "trainer.workers=3",
        "trainer.compile=true",
        "trainer.eval_batch_size=7",
        "seed=0",
        "adapter.alpha=4",
        "optimizer.weight_decay=1e-2",
        "model.std=[0.50]",
    ],
)
def test_digest_keeps_to_what_identifies_a_run(same: str) -> None:
    assert digest(edited(same)) == digest(edited())
    assert run_folder(edited(same)) == run_folder(edited())


@pytest.mark.parametrize(
    "different",
    [
        "seed=1",
        "tensor_mode=att",
        "rank_strategy=isorank",
        "rank_strategy.rank=8",
        "rank_strategy.rule=uniform",
        "optimizer.lr=2e-3",
        "optimizer.warmup_steps=5",
        "adapter.alpha=2",
        "adapter.rank_dropout=0.1",
        "factorization=cp",
        "optimizer.core_lr_ratio=8",
        "optimizer.factor_weight_decay.core=0",
        "adapter.head_layout=interleaved",
        "trainer.epochs=13",
        "trainer.batch_size=16",
        "trainer.accumulation=2",
        "trainer.precision=bf16",
        "trainer.max_steps=9",
        "dataset.train_size=100",
        "dataset.transform.normalize=false",
        "dataset.train_splits=[train,test]",
        "model.pretrained=false",
        "model.checkpoint=elsewhere.safetensors",
    ],
)
def test_digest_changes_with_what_can_change_a_result(different: str) -> None:
    assert digest(edited(different)) != digest(edited())


@pytest.mark.parametrize("mode", ["head_only", "full"])
@pytest.mark.parametrize("ignored", ["rank_strategy=isorank", "rank_strategy=explicit", "adapter.alpha=2"])
def test_reference_rows_ignore_ranks_and_adapter(mode: str, ignored: str) -> None:
    plain, other = edited(f"tensor_mode={mode}"), edited(f"tensor_mode={mode}", ignored)
    assert validate(other).mode == mode
    assert run_folder(plain) == run_folder(other)
    assert digest(plain) != digest(edited(f"tensor_mode={mode}", ignored, "seed=1"))
    assert not {"rank_strategy", "adapter"} & identity(other).keys()


def test_lora_at_a_rank_is_one_run_under_both_strategies_of_the_paper() -> None:
    one, other = edited("tensor_mode=lora"), edited("tensor_mode=lora", "rank_strategy=isorank")
    assert run_folder(one) == run_folder(other)
    assert digest(one) != digest(edited("tensor_mode=lora", "rank_strategy.rank=8"))
    given = edited("tensor_mode=lora", "rank_strategy=explicit", "rank_strategy.ranks=[8]")
    assert digest(given) not in (digest(one), digest(edited("tensor_mode=lora", "rank_strategy.rank=8")))


def test_digest_is_twelve_hexadecimal_digits_and_ignores_the_order_on_the_command_line() -> None:
    one = digest(composed("seed=3", "optimizer.lr=1e-4", "tensor_mode=depth"))
    assert re.fullmatch("[0-9a-f]{12}", one)
    assert one == digest(composed("tensor_mode=depth", "optimizer.lr=0.0001", "seed=3"))


def test_run_folder_names_what_was_run_and_is_hydras() -> None:
    settings = composed("dataset=dtd", "tensor_mode=att", "rank_strategy=isorank", "seed=2")
    assert re.fullmatch(r"dtd/vit_base/att-isorank-seed2-[0-9a-f]{12}", run_folder(settings))
    reference = composed("tensor_mode=head_only")
    assert re.fullmatch(r"digits/vit_digits/head_only-seed0-[0-9a-f]{12}", run_folder(reference))
    own = composed("dataset=dtd", "tensor_mode=att", "rank_strategy=isorank", "seed=2", hydra=True)
    assert own.hydra.run.dir == f"outputs/{run_folder(settings)}"
    assert own.hydra.sweep.subdir == run_folder(settings)


def test_strategy_carries_every_setting() -> None:
    settings = edited("rank_strategy.rank=6", "rank_strategy.rule=uniform", "rank_strategy.tolerance=0.02")
    strategy = validate(settings).strategy
    assert (strategy.name, strategy.rank, strategy.rule, strategy.tolerance) == ("isoparameters", 6, "uniform", 0.02)
    explicit = validate(edited("rank_strategy=explicit", "rank_strategy.ranks=[8,8,3,4]")).strategy
    assert (explicit.name, explicit.ranks) == ("explicit", (8, 8, 3, 4))
    assert validate(edited("rank_strategy=isorank", "rank_strategy.cap=true")).strategy.cap


def test_a_model_may_leave_its_geometry_open() -> None:
    assert validate(edited("model.geometry=null")).geometry is None


BAD: list[tuple[str, str]] = [
    # override(s), what the message must hold: the setting, the value, what is valid
    ("tensor_mode.name=tucker", r"tensor_mode=tucker: .*lora, att, qkv, .*qkv_depth, .*head_only, full"),
    ("rank_strategy.name=best", r"rank_strategy=best: .*isorank, isoparameters, explicit"),
    ("rank_strategy.rule=odd", r"rank_strategy\.rule=odd: .*saturate, uniform, proportional"),
    ("rank_strategy.rank=0", r"rank_strategy\.rank=0: .*from 1 to 64"),
    ("rank_strategy.rank=65", r"rank_strategy\.rank=65: .*from 1 to 64"),
    ("rank_strategy.tolerance=1.5", r"rank_strategy\.tolerance=1\.5: .*from 0 to below 1"),
    ("rank_strategy=explicit", r"rank_strategy\.ranks=None: .*4 integers \(d_in 1\.\.64, .*projection 1\.\.3"),
    ("rank_strategy=explicit rank_strategy.ranks=[4,4,9,4]", r"rank_strategy\.ranks=\[4, 4, 9, 4\]: .*projection .* 3"),
    ("model.library=keras", r"model\.library=keras: .*transformers, timm"),
    ("adapter.init=zeros", r"adapter\.init=zeros: .*orthogonal, normal, kaiming_uniform"),
    ("adapter.head_layout=mixed", r"adapter\.head_layout=mixed: .*aligned, interleaved"),
    ("adapter.tensor_seeds=same", r"adapter\.tensor_seeds=same: .*distinct, equal"),
    ("adapter.dropout=1", r"adapter\.dropout=1(\.0)?: .*at least 0 and below 1"),
    ("adapter.dropout=-0.1", r"adapter\.dropout=-0\.1: .*at least 0 and below 1"),
    ("adapter.alpha=inf", r"adapter\.alpha=inf: .*finite"),
    ("adapter.alpha=nan", r"adapter\.alpha=nan: .*finite"),
    ("optimizer.name=sgd", r"optimizer=sgd: .*adamw"),
    ("optimizer.lr=-1e-3", r"optimizer\.lr=-0\.001: .*at least 0"),
    ("optimizer.lr=nan", r"optimizer\.lr=nan: .*at least 0"),
    ("optimizer.lr=inf", r"optimizer\.lr=inf: .*finite"),
    ("optimizer.min_lr=0.1", r"optimizer\.min_lr=0\.1: .*at least 0 and at most 0\.001"),
    ("optimizer.weight_decay=-1", r"optimizer\.weight_decay=-1(\.0)?: .*at least 0"),
    ("optimizer.core_lr_ratio=-1", r"optimizer\.core_lr_ratio=-1(\.0)?: .*at least 0"),
    ("optimizer.factor_weight_decay.core=-1", r"optimizer\.factor_weight_decay\.core=-1(\.0)?: .*at least 0"),
    ("+optimizer.factor_weight_decay.row=1", r"optimizer\.factor_weight_decay=row: must be one of core, d_in"),
    ("adapter.rank_dropout=1", r"adapter\.rank_dropout=1(\.0)?: .*below 1"),
    ("factorization.name=hosvd", r"factorization=hosvd: must be one of tucker, cp"),
    ("optimizer.eps=-1", r"optimizer\.eps=-1(\.0)?: .*at least 0"),
    ("optimizer.warmup_steps=-1", r"optimizer\.warmup_steps=-1: .*at least 0"),
    ("optimizer.betas=0.9", r"optimizer\.betas=0\.9: must be a list"),
    ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\]: .*two numbers"),
    ("optimizer.betas=[0.9,1.0]", r"optimizer\.betas=1\.0: .*below 1"),
    ("trainer.epochs=0", r"trainer\.epochs=0: .*at least 1"),
    ("trainer.batch_size=0", r"trainer\.batch_size=0: .*at least 1"),
    ("trainer.accumulation=0", r"trainer\.accumulation=0: .*at least 1"),
    ("trainer.eval_batch_size=0", r"trainer\.eval_batch_size=0: .*at least 1"),
    ("trainer.max_steps=0", r"trainer\.max_steps=0: .*at least 1"),
    ("trainer.workers=-1", r"trainer\.workers=-1: .*at least 0"),
    ("trainer.clip_norm=0", r"trainer\.clip_norm=0(\.0)?: .*above 0.*null"),
    ("trainer.precision=fp16", r"trainer\.precision=fp16: .*fp32, bf16"),
    ("logger.name=tensorboard", r"logger=tensorboard: .*none, wandb"),
    ("logger=wandb logger.mode=maybe", r"logger\.mode=maybe: .*auto, online, offline, disabled"),
    ("dataset.metrics=[]", r"dataset\.metrics=\[\]: .*accuracy, matthews, f1"),
    ("dataset.metrics=[auc]", r"dataset\.metrics=auc: .*accuracy, matthews, f1"),
    ("dataset.train_size=0", r"dataset\.train_size=0: .*at least 1"),
    ("dataset=eurosat dataset.train_fraction=1", r"dataset\.train_fraction=1(\.0)?: .*at most 0\.999"),
    ("dataset.transform.interpolation=cubic", r"dataset\.transform\.interpolation=cubic: .*bilinear, bicubic"),
    ("dataset.transform.crop_ratio=0", r"dataset\.transform\.crop_ratio=0(\.0)?: .*at least 0\.01 and at most 1"),
    ("dataset.transform.crop_ratio=1.2", r"dataset\.transform\.crop_ratio=1\.2: .*at most 1"),
    ("dataset.transform.color_jitter=-1", r"dataset\.transform\.color_jitter=-1(\.0)?: .*at least 0"),
    ("dataset=cola dataset.padding=left", r"dataset\.padding=left: .*longest, max_length"),
    ("dataset=cola dataset.max_length=2", r"dataset\.max_length=2: .*at least 4"),
    ("model.image_size=0", r"model\.image_size=0: .*at least 1"),
    ("model.mean=[0.5,0.5]", r"model\.mean=\[0\.5, 0\.5\]: .*1 channel"),
    ("model.std=[]", r"mean and std need one number"),
    ("model.geometry.heads=0", r"geometry\.heads=0: .*at least 1"),
    ("seed=-1", r"seed=-1: .*at least 0"),
    # a model and a dataset that do not go together
    ("dataset=cola model=vit_base", r"model=vit_base: takes images, .*dataset=cola holds texts"),
    ("dataset=dtd model=roberta_base", r"model=roberta_base: takes texts, .*dataset=dtd holds images"),
    # wrong types and unknown or missing settings
    ("trainer.epochs=many", r"trainer\.epochs: .*'many'.*Integer"),
    ("trainer.epochs=1.5", r"trainer\.epochs: .*'?1\.5'?.*Integer"),
    ("trainer.epochs=null", r"trainer\.epochs: .*'None'.*int"),
    ("dataset.transform.flip=sometimes", r"dataset\.transform\.flip: .*'sometimes'.*bool"),
    ("optimizer.lr=fast", r"optimizer\.lr: .*'fast'.*Float"),
    ("+trainer.epoch=3", r"trainer\.epoch: .*'epoch'.*TrainerConfig"),
    ("+dataset.max_length=64", r"dataset\.max_length: .*'max_length'.*ImageDatasetConfig"),
    ("+extra=1", r"extra: .*'extra'"),
    ("seed=???", r"seed: Missing"),
    ("dataset.root=${nowhere}", r"dataset\.root: .*'nowhere'"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[overrides for overrides, _ in BAD])
def test_a_bad_setting_is_named_with_its_value_and_what_is_valid(overrides: str, message: str) -> None:
    with pytest.raises(TensLoRAError, match=message) as caught:
        validate(edited(*overrides.split()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.max_steps=null trainer.clip_norm=null",
        "trainer.clip_norm=1",
        "adapter.dropout=0.5",
        "adapter.alpha=-1",
        "optimizer.min_lr=1e-3",
        "dataset.train_size=1",
        "dataset=cola dataset.max_length=4 dataset.padding=max_length",
        "model.checkpoint=weights.safetensors",
        "logger=wandb logger.tags=[a,b]",
    ],
)
def test_what_is_valid_is_taken(overrides: str) -> None:
    validate(edited(*overrides.split()))
