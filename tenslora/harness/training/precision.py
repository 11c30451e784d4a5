"""What bf16 is here: autocast, over frozen weights that are kept as it reads them."""

from __future__ import annotations

import torch
from torch import nn


def round_frozen_weights(model: nn.Module) -> None:
    """Keep the frozen float32 parameters of Linear layers in bf16, in place.

    Autocast rounds them in every forward pass, and what it made is kept for the backward pass; of what does not change,
    every copy is the same. So the results under autocast are the same to the last bit, and a step is spared the
    roundings and the memory of the copies, and the weights take half of theirs. Outside of autocast such a layer wants
    inputs in bf16. Parameters that another kind of module shares, an embedding, which reads them in full, stay as they
    are.
    """
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    shared = {id(p) for module in set(modules).difference(linears) for p in module.parameters(recurse=False)}
    for linear in linears:
        for parameter in linear.parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in shared:
                parameter.data = parameter.data.bfloat16()
