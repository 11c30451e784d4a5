"""Backbones whose frozen weights take four or eight bits each: by bitsandbytes in transformers, by torchao in timm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones.head import Backbone
from tenslora.harness.config import ModelConfig
from tenslora.harness.console import at_least

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_PACKAGES = {"transformers": "bitsandbytes", "timm": "torchao"}


def silent_torchao() -> AbstractContextManager[None]:
    """A context in which torch does not warn of its own next release when torchao is imported."""
    return at_least(logging.ERROR, "torch.utils._pytree")


def require_package(config: ModelConfig) -> None:
    """Check that the package that quantises a model is installed.

    Args:
        config: the model's settings.

    Raises:
        TensLoRAError: if it is not.
    """
    package = _PACKAGES[config.library]
    if config.quantization is not None and find_spec(package) is None:
        raise TensLoRAError(
            f"model.quantization={config.quantization}: needs {package} for a model of {config.library} "
            f"(pip install {package})"
        )


def bitsandbytes_arguments(config: ModelConfig, skipped: Sequence[str]) -> dict[str, Any]:
    """The arguments of transformers' BitsAndBytesConfig, as plain values.

    Args:
        config: the model's settings.
        skipped: paths of modules that stay in float32.
    """
    arguments: dict[str, Any] = {"llm_int8_skip_modules": list(skipped)}
    if config.quantization == "int8":
        return {"load_in_8bit": True, **arguments}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
        **arguments,
    }


def bitsandbytes_config(config: ModelConfig, skipped: Sequence[str]) -> BitsAndBytesConfig:
    """The setting quantization_config of transformers' from_pretrained.

    Args:
        config: the model's settings.
        skipped: paths of modules that stay in float32.
    """
    from transformers import BitsAndBytesConfig

    # bitsandbytes warns that it has no kernels of its own for this processor. It computes with torch's instead.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**bitsandbytes_arguments(config, skipped))


def quantise_timm(backbone: Backbone) -> None:
    """Store the weights of all Linear layers but the head's in int8, with one scale for each output.

    Args:
        backbone: a model of timm, changed in place.
    """
    with silent_torchao():
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = {id(module) for own in backbone.head for module in own.modules()}
    quantize_(
        backbone.model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and id(module) not in head,
    )
