"""What a backbone answers to an input that is always the same, by which a run knows its backbone again.

The weights of a folder or of a repository on the hub may be replaced, and so may its config.json and its tokenizer. An
adapter that was trained on others would still fit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.backbones.head import Backbone
from tenslora.harness.backbones.random_weights import float32_by_default
from tenslora.harness.config import ModelConfig
from tenslora.harness.training.tasks import evaluation_mode, outputs_of

_SENTENCE = "The Quick brown fox was late, and 12 cafés were good."

_TOLERANCE = 1e-3  # other processors and versions of torch change the sixth digit


def recorded_answer(config: ModelConfig, backbone: Backbone, tokenizer: Any) -> list[float] | None:
    """The answer for the record of a run; None for a quantised backbone, which other processors may round otherwise.

    That a quantised backbone can answer is checked all the same, on a copy: an evaluation may pack its weights anew.

    Args:
        config: the model's settings.
        backbone: the backbone, without an adapter.
        tokenizer: the tokenizer of a text model; None for an image model.

    Raises:
        TensLoRAError: if the backbone cannot answer.
    """
    if config.quantization is None:
        return answer_of(backbone, tokenizer)
    answer_of(replace(backbone, model=copy.deepcopy(backbone.model)), tokenizer)
    return None


@torch.no_grad()
def answer_of(backbone: Backbone, tokenizer: Any) -> list[float] | None:
    """The outputs of a backbone on the CPU with its fresh head, in evaluation mode; its modes stay as they were.

    Args:
        backbone: the backbone, without an adapter.
        tokenizer: the tokenizer of a text model; None for an image model.

    Returns:
        The outputs; None where they are not finite.

    Raises:
        TensLoRAError: if the backbone cannot compute them, as with options that contradict each other.
    """
    model, images = backbone.model, backbone.image_input
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            evaluation_mode(model),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
            float32_by_default(),
        ):
            if images is None:
                own = copy.deepcopy(tokenizer)  # which keeps the last length that it was asked for
                most = min(16, backbone.max_tokens or 16)
                inputs = dict(own(_SENTENCE, truncation=True, max_length=most, return_tensors="pt"))
            else:
                shape = 1, images.channels, images.size, images.size
                inputs = {backbone.input_name: torch.arange(math.prod(shape)).mul(0.7).sin().reshape(shape)}
            answer = outputs_of(model, inputs)[0].float().tolist()
    except Exception as error:  # whatever a model raises
        what, settings = "a sentence", ""
        if images is not None:
            what, settings = f"an image of {images.size} x {images.size}", "model.image_size, "
        raise TensLoRAError(
            f"{type(model).__name__}: cannot compute its outputs for {what} ({first_line(error)}); "
            f"check {settings}model.checkpoint and model.options"
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)
    return answer if all(map(math.isfinite, answer)) else None


def is_same(answer: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two answers, or other lists of numbers, are equal up to rounding.

    Args:
        answer: an answer.
        other: another.
    """
    largest = max(map(abs, (*answer, *other)))
    return len(answer) == len(other) and all(
        abs(one - two) <= _TOLERANCE * largest for one, two in zip(answer, other, strict=True)
    )
