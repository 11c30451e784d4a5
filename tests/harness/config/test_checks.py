"""What a user is told about a setting at fault: the setting, its value, and what would be valid, in one line."""

from __future__ import annotations

import re

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.config import validate
from tests.running import configured

REFUSED = {
    # ranges
    "seed=-1": "seed=-1: must be at least 0",
    "trainer.epochs=0": "trainer.epochs=0: must be at least 1",
    "trainer.max_steps=0": "trainer.max_steps=0: must be at least 1, or null",
    "trainer.clip_norm=0": "trainer.clip_norm=0: must be above 0, or null",
    "trainer.evaluate=0": "trainer.evaluate=0: must be every_epoch, last, or a number of epochs, at least 1",
    "trainer.evaluate=true": "trainer.evaluate=true: must be every_epoch, last, or a number of epochs, at least 1",
    "+trainer.score_every=5": "trainer.score_every: there is no such setting; did you mean trainer.evaluate?",
    "optimizer.lr=-1e-3": "optimizer.lr=-0.001: must be at least 0",
    "optimizer.lr=inf": "optimizer.lr=inf: must be a finite number, at least 0",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number, at least 0",
    "optimizer.min_lr=0.1": "optimizer.min_lr=0.1: must be at most lr, which is 0.001",
    "optimizer.betas=[0.9,1.0]": "optimizer.betas=1.0: must be at least 0 and below 1",
    "optimizer.factor_weight_decay.core=-1": "optimizer.factor_weight_decay.core=-1: must be at least 0, or null",
    "dataset.transform.crop_ratio=1.2": (
        "dataset.transform.crop_ratio=1.2: must be at least 0.01 and at most 1, or null"
    ),
    "dataset=eurosat dataset.train_fraction=1": (
        "dataset.train_fraction=1: must be at least 0.001 and at most 0.999, or null"
    ),
    "dataset=cola dataset.max_length=2": "dataset.max_length=2: must be at least 4 and at most 1000000",
    "model.image_size=0": "model.image_size=0: must be at least 1",
    "model.geometry.heads=0": "model.geometry.heads=0: must be at least 1",
    "adapter.alpha=nan": "adapter.alpha=nan: must be a finite number, from -1,000,000 to 1,000,000",
    "adapter.dropout=1": "adapter.dropout=1.0: must be at least 0 and below 1",
    "rank_strategy.tolerance=1.5": "rank_strategy.tolerance=1.5: must be at least 0 and below 1",
    "rank_strategy.rank=0": "rank_strategy.rank=0: must be at least 1",
    "rank_strategy.rank=65": "rank_strategy.rank=65: must be from 1 to 64, the width of a projection",
    "tensor_mode=lora rank_strategy.rank=65": "rank_strategy.rank=65: must be from 1 to 64, the width of a projection",
    "model.image_size=4098": "model.image_size=4098: must be at least 0 and at most 4096, or null",
    "model.image_size=15": "model.image_size=15: must be a multiple of 2, the patches' size",
    "dataset=dtd model.image_size=200": "model.image_size=200: must be a multiple of 16, the patches' size",
    "model.channels=2": "model.channels=2: must be 1 (grey) or 3 (red, green and blue)",
    "model.channels=4": "model.channels=4: must be 1 (grey) or 3 (red, green and blue)",
    "model.channels=0": "model.channels=0: must be 1 (grey) or 3 (red, green and blue)",
    "model.std=[0]": "model.std=0: must be at least 0.001 and at most 1000.0",
    "model.std=[nan]": "model.std=nan: must be a finite number, at least 0.001 and at most 1000.0",
    "model.mean=[inf]": "model.mean=inf: must be a finite number, at least -1000.0 and at most 1000.0",
    "dataset.transform.color_jitter=1e30": "dataset.transform.color_jitter=1e+30: must be at least 0 and at most 10",
    "rank_strategy.scale=1e30": "rank_strategy.scale=1e+30: must be above 0 and at most 1000",
    "optimizer.eps=0": "optimizer.eps=0: must be at least 1e-30 and at most 1",
    "optimizer.lr=1e10": "optimizer.lr=10000000000.0: must be at most 1000000000.0",
    "trainer.clip_norm=inf": "trainer.clip_norm=inf: must be a finite number, above 0, or null",
    "trainer.threads=100000": "trainer.threads=100000: must be at least 1 and at most 4096, or null",
    "trainer.epochs=99999999999999999999": (
        "trainer.epochs=99999999999999999999: must be a number of at most 18 digits"
    ),
    "trainer.device=cpu:5": "trainer.device=cpu:5: must be auto, cpu, cuda or cuda:<index>",
    # names
    "model.name=a/b": "model.name=a/b: must be a name of at most 100 letters, digits, '.', '_' and '-' that does not "
    "begin with '.', and not tables",
    "dataset.name=..": "dataset.name=..: must be a name of at most 100 letters, digits, '.', '_' and '-' that does not "
    "begin with '.', and not tables",
    **{
        f"dataset=text dataset.hub={hub} model=minilm": (
            f"dataset.hub={hub}: must be the name of a dataset on the hub, such as user/name"
        )
        for hub in ("https://huggingface.co/datasets/a/" + "b" * 90, "./d", "a/b@main")
    },
    "logger=wandb logger.project=a/b": (
        "logger.project=a/b: must be a name of at most 128 characters, without / \\ # ? % and :"
    ),
    "+logger.name=[]": "logger.name=[]: must be text",
    "dataset.root=''": "dataset.root=: must not be an empty text",
    "tensor_mode.name=tucker": (
        "tensor_mode=tucker: must be one of lora, att, qkv, depth, att_qkv, att_depth, qkv_depth, att_qkv_depth, site, "
        "att_site, head_only, full"
    ),
    "rank_strategy.name=best": "rank_strategy=best: must be one of isorank, isoparameters, explicit",
    "rank_strategy.rule=odd": "rank_strategy.rule=odd: must be one of saturate, uniform, proportional",
    "factorization.name=hosvd": "factorization=hosvd: must be one of tucker, cp, tensor_train, tensor_guide",
    "optimizer.name=sgd": "optimizer=sgd: must be one of adamw",
    "logger=wandb logger.mode=later": "logger.mode=later: must be one of auto, online, offline, disabled",
    "trainer.precision=fp16": "trainer.precision=fp16: must be one of fp32, bf16",
    "model.library=keras": "model.library=keras: must be one of transformers, timm",
    "model.modality=sound": "model.modality=sound: must be one of image, text",
    "dataset.modality=sound": "dataset.modality=sound: must be one of image, text",
    "dataset=cola dataset.padding=left": "dataset.padding=left: must be one of longest, max_length",
    "adapter.init=zeros": "adapter.init=zeros: must be one of orthogonal, normal, kaiming_uniform",
    "adapter.adapt=vq": "adapter.adapt=vq: must be letters of qkvo in that order, or mlp, or all",
    "+optimizer.factor_weight_decay.row=1": (
        "optimizer.factor_weight_decay.row: must be one of core, d_in, d_out, d_head, head, projection, depth, site"
    ),
    # lists
    "dataset.metrics=[]": "dataset.metrics=[]: needs at least one of accuracy, matthews, f1, pearson, spearman",
    "dataset.metrics=[accuracy,auc]": (
        "dataset.metrics=[accuracy, auc]: auc must be one of accuracy, matthews, f1, pearson, spearman"
    ),
    "dataset.metrics=[accuracy,accuracy]": ("dataset.metrics=[accuracy, accuracy]: must be a list of different items"),
    "dataset.metrics=accuracy": "dataset.metrics=accuracy: must be a list, written [accuracy]",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: must be two numbers",
    "model.mean=[0.5,0.5]": "model.mean=[0.5, 0.5]: must have one number for each channel, and channels=1",
    "model.std=[]": "model.std=[]: must have one number for each channel, and channels=1",
    "rank_strategy=explicit": (
        "rank_strategy.ranks=null: tensor_mode qkv_depth needs 4 integers "
        "(d_in 1..64, d_out 1..64, projection 1..3, depth 1..4)"
    ),
    "rank_strategy=explicit rank_strategy.ranks=[4,4,9,4]": (
        "rank_strategy.ranks=[4, 4, 9, 4]: the rank 9 of projection must be from 1 to 3 "
        "(d_in 1..64, d_out 1..64, projection 1..3, depth 1..4)"
    ),
    # types
    "trainer.epochs=many": "trainer.epochs=many: must be a whole number",
    "trainer.epochs=1.5": "trainer.epochs=1.5: must be a whole number",
    "trainer.clip_norm=None": "trainer.clip_norm=None: must be a number; the word for no value is null",
    "+trainer={optimizer.lr:1}": "optimizer.lr: must be written as optimizer: and below it lr:",
    "trainer.epochs=true": "trainer.epochs=true: must be a number",
    "optimizer.betas=[false,0.9]": "optimizer.betas=false: must be a number",
    "rank_strategy.rank=true": "rank_strategy.rank=true: must be a number",
    "trainer.epochs=null": "trainer.epochs=null: must be a whole number",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number",
    "optimizer.betas=[a,0.9]": "optimizer.betas=a: must be a number",
    "resume=maybe": "resume=maybe: must be true or false",
    "rank_strategy.name=null": "rank_strategy=null: must be text",
    "+model.options.num_classes=0": "model.options.num_classes=0: must be left out; dataset decides it",
    **{
        f"+model.options.{name}=x": f"model.options.{name}=x: must be left out; {decides} decides it"
        for name, decides in {
            "cache_dir": "model.checkpoint",
            "problem_type": "dataset",
            "torch_dtype": "trainer.precision",
            "dtype": "trainer.precision",
            "device_map": "trainer.device",
            "quantization_config": "model.quantization",
        }.items()
    },
    "dataset=cola model=hf_text model.checkpoint=x +model.options.model_type=bert": (
        "model.options.model_type=bert: must be left out; model.checkpoint decides it"
    ),
    **{
        f"+model.options.{name}=true": f"model.options.{name}=true: must be left out; it is an argument of "
        "timm.create_model, and not one of the model"
        for name in ("features_only", "out_indices", "scriptable")
    },
    "model.options=5": "model.options=5: must be a group of settings",
    "dataset.transform=null": "dataset.transform=null: must be a group of settings: crop_ratio, squash, interpolation, "
    "color_jitter, flip, normalize",
    "adapter=null": "adapter=null: tensor_mode=qkv_depth needs the settings of an adapter",
    # settings that do not exist, or are not there
    "+trainer.epoch=3": "trainer.epoch: there is no such setting; did you mean trainer.epochs?",
    "+trainer.lr=3": "trainer.lr: there is no such setting; did you mean optimizer.lr?",
    "+dataset.transform.crop=0.9": "dataset.transform.crop: there is no such setting; dataset.transform has "
    "crop_ratio, squash, interpolation, color_jitter, flip, normalize",
    "+epochs=3": "epochs: there is no such setting; did you mean trainer.epochs?",
    "+adapter.alfa=1": "adapter.alfa: there is no such setting; did you mean adapter.alpha?",
    "+dataset.max_length=64": "dataset.max_length: there is no such setting for a dataset of images",
    "+elsewhere.x=1": "elsewhere: there is no such setting; --help lists all settings",
    "+experiment.x=1": "experiment: is no setting; a file in experiment/ with groups of settings must begin with the "
    "line # @package _global_",
    **{
        word: f"{begin}; a file in {re.split('[.:]', begin)[0]}/ with groups of settings must begin with the line "
        f"# @package _global_"
        for word, begin in {
            "+debug.x=1": "debug: is no setting",
            "+preset.tensor_mode=att": "preset.tensor_mode: there is no such setting",
            "+tensor_mode.adapter={alpha:1}": "tensor_mode.adapter: there is no such setting",
            "+factorization.adapter={alpha:1}": "factorization.adapter: there is no such setting",
            "+optimizer.trainer={epochs:1}": "optimizer.trainer: there is no such setting",
            "dataset.name=??? +dataset.dataset={name:food}": "dataset.dataset: there is no such setting",
        }.items()
    },
    "~trainer.epochs": "trainer.epochs: is missing; a setting can be changed, but not taken away",
    "~trainer.evaluate": "trainer.evaluate: is missing; a setting can be changed, but not taken away",
    "~adapter": "adapter: is missing; a setting can be changed, but not taken away",
    "~adapter.alpha": "adapter.alpha: is missing; a setting can be changed, but not taken away",
    "~factorization": "factorization: is missing; a setting can be changed, but not taken away",
    "~rank_schedule": "rank_schedule: is missing; a setting can be changed, but not taken away",
    "seed=???": "seed: is missing",
    "dataset.root=${nowhere}": "dataset.root: Interpolation key 'nowhere' not found",
    # settings that do not go together
    "dataset=cola model=vit_base": "model=vit_base: takes images, and dataset=cola holds texts",
    "dataset=dtd model=roberta_base": "model=roberta_base: takes texts, and dataset=dtd holds images",
    # settings that the run does not use
    "tensor_mode=head_only adapter.dropout=1": "adapter.dropout=1.0: must be at least 0 and below 1",
    "tensor_mode=full rank_strategy.rank=0": "rank_strategy.rank=0: must be at least 1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_setting_at_fault_is_one_line(overrides: str) -> None:
    with pytest.raises(TensLoRAError) as caught:
        configured(*overrides.split())
    assert str(caught.value) == REFUSED[overrides]


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.max_steps=null trainer.clip_norm=null",
        "adapter.alpha=-1",
        "optimizer.min_lr=1e-3",
        "dataset=cola dataset.max_length=4",
        "dataset.transform.crop_ratio=1",
        "rank_strategy.rank=64",
        "logger=wandb logger.project=2026 logger.tags=[7,a]",
        "logger=[csv,tensorboard]",
        "logger=[]",
    ],
)
def test_a_setting_at_the_edge_of_its_range_is_taken(overrides: str) -> None:
    configured(*overrides.split())


def test_a_setting_whose_name_is_a_number_is_no_setting() -> None:
    settings = configured().settings()
    with pytest.raises(TensLoRAError, match=r"^0: there is no such setting; --help lists all settings$"):
        validate({**settings, "0": None})
