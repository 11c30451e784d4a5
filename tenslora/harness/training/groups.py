"""Which rate and which weight decay each trained parameter has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tenslora.adapter import Adapter
from tenslora.attachment import SUBMODULE
from tenslora.harness.config import OptimizerConfig

RATIO = "rate_ratio"
"""What a group's rate is to the schedule's, under this key of the group."""


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], adapter: Adapter | None, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """The parameter groups for torch's AdamW, as few as the settings allow, parameters in their order.

    `core_lr_ratio` is for what starts at zero in each of the adapter's tensors: Tucker's core, LoRA's B (LoRA+,
    arXiv 2402.12354), the last factor of the others. `factor_weight_decay` is for the factors that it names.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        ratio, decay = 1.0, optimizer.weight_decay
        if adapter is not None and name.startswith(f"{SUBMODULE}."):
            factor = name.rpartition(".")[2]
            ratio = optimizer.core_lr_ratio if factor == adapter.zero_parameter else 1.0
            own = optimizer.factor_weight_decay.get(factor)
            decay = decay if own is None else own
        group = groups.setdefault((ratio, decay), {"params": [], RATIO: ratio, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
