"""Pretrained Transformers with a fresh classification head: from a hub, a local folder, or the package."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import TYPE_CHECKING

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones.answer import recorded_answer
from tenslora.harness.backbones.head import Backbone, draw_head
from tenslora.harness.backbones.hub import source_setting
from tenslora.harness.backbones.quantisation import quantise_timm, require_package
from tenslora.harness.backbones.random_weights import OwnStream, float32_by_default
from tenslora.harness.backbones.timm_models import EMBEDDED, load_timm
from tenslora.harness.backbones.tokenizer import load_tokenizer
from tenslora.harness.backbones.transformers_models import load_transformers
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import ModelConfig
from tenslora.random_streams import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "Backbone", "load_backbone", "load_tokenizer", "recorded_answer"]

_ONE_AT_A_TIME = threading.RLock()  # a signal's handler may load a run while its thread does
"""transformers replaces functions of torch.nn.init while it reads weights, in all threads."""


def load_backbone(
    config: ModelConfig, classes: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Backbone:
    """Load a model in float32, or quantised, and give it a new head.

    The weights come from `config.checkpoint`, which is a local file or folder or "embedded", or else from the hub,
    where their name is `config.architecture`. If `config.pretrained` is false, the weights are random and nothing is
    downloaded. A process reads the weights of one model once; each caller gets a copy.

    Args:
        config: the model's settings.
        classes: the number of classes, which is the width of the logits.
        seed: the seed of the head, and of random weights.
        tokenizer: the tokenizer of a text model, by which the model knows padding. It gives attention masks from then
            on if the model takes them. Other models need none.

    Returns:
        The backbone, on the CPU.

    Raises:
        TensLoRAError: if the weights are missing, damaged or those of another model, if the hub cannot be reached, or
            if the package that quantises the model is not installed.
    """
    require_package(config)
    # The weights of a pretrained model do not depend on the seed, so that runs with different seeds can share them.
    backbone = copy.deepcopy(_load(config, classes, 0 if config.pretrained else seed, tokenizer))
    draw_head(backbone.head, seed)
    takes_mask = "attention_mask" in inspect.signature(backbone.model.forward).parameters
    if tokenizer is not None and takes_mask and "attention_mask" not in tokenizer.model_input_names:
        # As some tokenizer_config.json say. Without a mask, the outputs of a text would depend on its padding.
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    return backbone


@cache_latest(1)
def _load(config: ModelConfig, classes: int, seed: int, tokenizer: PreTrainedTokenizerBase | None) -> Backbone:
    with _ONE_AT_A_TIME, float32_by_default(), OwnStream(stream_seed("backbone", seed)):
        if config.library == "timm":
            backbone = load_timm(config, classes)
        else:
            backbone = load_transformers(config, classes, tokenizer)
    if config.quantization is None or config.library == "timm":
        backbone.model.float()
    if any(parameter.is_meta for parameter in backbone.model.parameters()):
        raise TensLoRAError("a backbone has no numbers on the device meta, as in init_empty_weights; load it outside")
    if config.pretrained:
        _require_finite_weights(config, backbone)
    if config.quantization is not None and config.library == "timm":
        quantise_timm(backbone)
    return backbone


def _require_finite_weights(config: ModelConfig, backbone: Backbone) -> None:
    # The training would only say that its loss is NaN. The head is drawn anew, whatever the file has for it.
    of_head = backbone.head_parameters().keys()
    for name, weight in backbone.model.state_dict().items():
        if name not in of_head and weight.is_floating_point() and not weight.isfinite().all():
            raise TensLoRAError(f"{source_setting(config)}: its weight {name} holds a NaN or an infinity")
