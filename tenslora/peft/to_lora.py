"""Turns an adapter into a PEFT LoRA.

Nothing is lost: every update is a product of two thin matrices, and so is a LoRA's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.attachment import (
    adapter_of,
    handed_over,
    not_compiled_anywhere,
    require_no_copies,
    require_savable,
    updates_of,
)
from tenslora.errors import TensLoRAError
from tenslora.peft.patterns import of_paths
from tenslora.projections import is_conv1d


@torch.no_grad()
def lora_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The update of each adapted Linear as a LoRA of scaling 1, ``W <- W + B A``. alpha is part of B A.

    Args:
        model: with an adapter.

    Returns:
        By the Linear's path in `model`, PEFT's lora_A and lora_B weights: A (r, inputs) and B (outputs, r). r is the
        inner size of the thin products, see `Factorization.slices`. Where one Linear holds several matrices that do not
        share left, r is the sum over these matrices and B is block diagonal.

    Raises:
        TensLoRAError: if there is no adapter, or if the adapter is merged.
    """
    products = {path: update.as_lora() for path, update in updates_of(model).items()}
    return {path: (left.T.contiguous(), right.T.contiguous()) for path, (left, right) in products.items()}


def to_peft(model: nn.Module, modules_to_save: Sequence[str] = ()) -> Any:
    """Turn an adapted model into a PEFT model with an equal LoRA on the same Linear layers.

    The adapter's dropout becomes that of the LoRA, which draws a mask for each Linear, also where several have the same
    input. A LoRA has no rank_dropout; a warning tells of one that is not taken along. The LoRA is in the mode of the
    adapter, training or evaluation.

    Args:
        model: with an adapter. It is changed in place: the adapter and torch.compile's wrappers are taken off, and PEFT
            puts its own layers on.
        modules_to_save: paths of modules that were trained without an adapter, such as a classification head. PEFT
            saves them together with the LoRA.

    Returns:
        The `peft.PeftModel`.

    Raises:
        TensLoRAError: if there is no adapter, if it is merged or holds a NaN or an infinity, if a layer is a copy of an
            adapted one, if a module to save is not found, holds adapted layers or is never called, or if PEFT is not
            installed. The model is then as it was.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TensLoRAError("peft: the package is not installed (pip install peft)") from error
    with not_compiled_anywhere(model) as own:
        weights = lora_weights(own)
        require_no_copies(own)
        require_savable(own, modules_to_save)
        if rate := adapter_of(own).config.rank_dropout:
            warnings.warn(
                f"rank_dropout={rate:g}: is not taken along, because PEFT's LoRA has none",
                stacklevel=2,
            )
        with handed_over(own) as adapter:
            ranks = {path: len(a) for path, (a, _) in weights.items()}
            rank = max(ranks.values())
            # A pattern matches every path that ends with it. One that is the end of another is tied to the beginning.
            paths, ending_alike = set(ranks), tuple(f".{path}" for path in ranks)
            ends = {path for path in paths if any(other.endswith(f".{path}") for other in paths)}
            lower_ranks = {f"^{path}" if path in ends else path: r for path, r in ranks.items() if r != rank}
            others = any(path.endswith(ending_alike) for path, _ in own.named_modules() if path not in paths)
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,  # PEFT multiplies the update by lora_alpha / r, which is 1 here
                lora_dropout=adapter.config.dropout,
                rank_pattern=lower_ranks,
                alpha_pattern=lower_ranks,
                target_modules=of_paths(weights) if others else list(weights),
                modules_to_save=list(modules_to_save) or None,
                fan_in_fan_out=any(is_conv1d(own.get_submodule(path)) for path in weights),
            )
            peft_model = get_peft_model(own, config)
            peft_model.training = peft_model.base_model.training = own.training
            with torch.no_grad():
                for path, (a, b) in weights.items():
                    layer = peft_model.base_model.model.get_submodule(path)
                    layer.training = adapter.training
                    layer.lora_dropout.train(adapter.training)
                    layer.lora_A["default"].weight.copy_(a)
                    layer.lora_B["default"].weight.copy_(b)
    return peft_model
