"""Architectures small enough to build in milliseconds, one for each way in which a backbone is loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone, load_backbone, load_tokenizer
from tenslora.harness.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCES = [
    ("The cat sat on the mat.", "A cat sat."),
    ("It rained all day.", "The streets were wet."),
    ("Yes.", "No."),
]

VIT_DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT = {"model_type": "vit", **_SMALL, "image_size": 8, "patch_size": 4, "num_channels": 3}
TEXT = {
    "bert": {"model_type": "bert", **_SMALL},
    "roberta": {"model_type": "roberta", **_SMALL, "max_position_embeddings": 514, "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}


def model_config(library: str, modality: str, **changes: Any) -> ModelConfig:
    channels = changes.get("channels", 1)
    settings: dict[str, Any] = {
        "name": "tiny",
        "architecture": "none",
        "checkpoint": None,
        "pretrained": False,
        "geometry": None,
        "image_size": 8,
        "channels": channels,
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        **changes,
    }
    return ModelConfig(library=library, modality=modality, **settings)


def timm_vit(**changes: Any) -> ModelConfig:
    return model_config("timm", "image", **{"architecture": "vit_tiny_patch16_224", "options": VIT_DIGITS, **changes})


def vit_digits(**changes: Any) -> ModelConfig:
    """The model whose weights are in the package."""
    return timm_vit(**{"name": "vit_digits", "pretrained": True, "checkpoint": "embedded", **changes})


def transformers_vit(**changes: Any) -> ModelConfig:
    return model_config("transformers", "image", **{"options": VIT, "channels": 3, **changes})


def transformers_text(kind: str = "bert", **changes: Any) -> ModelConfig:
    return model_config("transformers", "text", **{"options": TEXT[kind], **changes})


RANDOM = {
    "timm vit": timm_vit(),
    "vit": transformers_vit(),
    **{kind: transformers_text(kind) for kind in TEXT},
}
"""A model with random weights of each kind."""

HEADS = {
    "timm vit": {"head.weight", "head.bias"},
    "vit": {"classifier.weight", "classifier.bias"},
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "distilbert": {f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")},
}
"""The names of the parameters of each one's head."""


@functools.cache
def trained_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of a text model with random weights."""
    return load_tokenizer(transformers_text(), SENTENCES)


def load_random(kind: str, classes: int = 3, seed: int = 0) -> Backbone:
    return load_backbone(RANDOM[kind], classes, seed, trained_tokenizer() if kind in TEXT else None)


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    return dict(backbone.model.state_dict())


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def save_random(folder: Path, kind: str = "vit", classes: int = 7) -> dict[str, Tensor]:
    """Leave a checkpoint as transformers writes it, with a head full of nines, and return its weights."""
    backbone = load_random(kind, classes)
    for parameter in backbone.head_parameters().values():
        nn.init.constant_(parameter, 9.0)
    cast(Any, backbone.model).save_pretrained(folder)
    return weights_of(backbone)


def assert_refused(config: ModelConfig, message: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Loading the model fails with one line that matches `message`."""
    with pytest.raises(TensLoRAError, match=message) as caught:
        load_backbone(config, 5, 0, tokenizer)
    assert "\n" not in str(caught.value)
