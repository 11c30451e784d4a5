"""Precisions: fp32 computes in float32; bf16 is autocast over frozen weights that are stored in bf16."""

from __future__ import annotations

import torch
from torch import nn

from tenslora.projections import is_conv1d, is_plain


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a model computes in a precision.

    Args:
        precision: "fp32" or "bf16".
        device: the device that the model is on.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def round_frozen_weights(model: nn.Module, *, of_quantised: bool = False) -> None:
    """Round the frozen float32 parameters of Linear layers, and of transformers' Conv1D, to bf16, in place.

    Autocast would round the parameters anew in every forward pass and keep the rounded copies for the backward pass.
    Parameters that are rounded once give the same results under autocast to the last bit. They save the time of the
    rounding, the memory of the copies, and half the memory of the weights. Outside of autocast such a layer takes only
    bf16 inputs.

    Quantised layers compute without autocast, so that only this function rounds their scales and biases. They take
    inputs of any precision before and after.

    A parameter that is shared with a module other than a Linear, such as an embedding, stays in float32, because that
    module reads it unrounded.

    Args:
        model: the model, changed in place.
        of_quantised: whether to round the parameters of quantised layers only, which makes a loaded model compute what
            it computed in training.
    """
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, nn.Linear) or is_conv1d(module)]
    shared = {id(p) for module in set(modules).difference(linears) for p in module.parameters(recurse=False)}
    for linear in linears:
        if of_quantised and is_plain(linear):
            continue
        for parameter in linear.parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in shared:
                parameter.data = parameter.data.bfloat16()
