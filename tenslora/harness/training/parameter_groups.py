"""The learning rate and the weight decay of each trained parameter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from tenslora.adapter import Adapter
from tenslora.attachment import SUBMODULE
from tenslora.harness.config import OptimizerConfig

log = logging.getLogger(__name__)

RATE_RATIO = "rate_ratio"
"""The key under which a group holds the ratio of its learning rate to the schedule's."""


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], adapter: Adapter | None, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """The parameter groups for torch's AdamW.

    `core_lr_ratio` multiplies the learning rate of the parameter that starts at zero in each tensor of the adapter:
    Tucker's core, LoRA's B (as in LoRA+, arXiv 2402.12354), or the factor of d_out or d_head in CP and tensor trains.
    `factor_weight_decay` replaces the weight decay of the adapter's parameters that it names.

    Args:
        parameters: the parameters to train, by their names in the model.
        adapter: the model's adapter; None for a run without an adapter.
        optimizer: the settings.

    Returns:
        One group for each pair of learning rate and weight decay, with the parameters in their order.
    """
    if adapter is not None:
        own = {name.rpartition(".")[2] for name in parameters if name.startswith(f"{SUBMODULE}.")}
        for factor, own_decay in optimizer.factor_weight_decay.items():
            if own_decay is not None and factor not in own:  # a sweep over tensor_mode may have one for all its runs
                log.warning(
                    "optimizer.factor_weight_decay.%s=%g: has no effect, because the adapter has only %s",
                    factor,
                    own_decay,
                    ", ".join(sorted(own)),
                )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        ratio, decay = 1.0, optimizer.weight_decay
        if adapter is not None and name.startswith(f"{SUBMODULE}."):
            factor = name.rpartition(".")[2]
            ratio = optimizer.core_lr_ratio if factor == adapter.zero_parameter else 1.0
            own_decay = optimizer.factor_weight_decay.get(factor)
            decay = decay if own_decay is None else own_decay
        group = groups.setdefault((ratio, decay), {"params": [], RATE_RATIO: ratio, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
