"""TensLoRA: tensor-factorised low-rank adapters for Transformers (arXiv 2509.19391).

attach                  put a new adapter on a model
save_pretrained, load   keep it in a folder with the head that was trained, and put both on a model again
push_to_hub             the same on the Hugging Face hub
merge, unmerge          add the updates to the weights, and subtract them again
disabled, detach        leave the adapter out for a while, and take it off
adapt_tensor            put an update of its own shape on any other weight; merge_tensors, unmerge_tensors,
                        detach_tensors, save_tensors and load_tensors go with it
AdapterConfig           the settings of an adapter; RankStrategy says how its ranks are chosen
Adapter, StagedAdapter  the trained updates, with `save`, of a model of one stage or of several
Geometry                the dimensions of a backbone; `attach` finds them by itself
TensLoRAError           the error raised for a mistake that the user can put right
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tenslora.adapter import Adapter, StagedAdapter
    from tenslora.adapter_config import AdapterConfig
    from tenslora.attachment import attach, detach, disabled, merge, unmerge
    from tenslora.constructions import Geometry
    from tenslora.errors import TensLoRAError
    from tenslora.pretrained import load, push_to_hub, save_pretrained
    from tenslora.ranks import RankStrategy
    from tenslora.tensor_update import (
        adapt_tensor,
        detach_tensors,
        load_tensors,
        merge_tensors,
        save_tensors,
        unmerge_tensors,
    )

_MODULES = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter_config",
    "attach": "attachment",
    "detach": "attachment",
    "disabled": "attachment",
    "merge": "attachment",
    "unmerge": "attachment",
    "Geometry": "constructions",
    "TensLoRAError": "errors",
    "load": "pretrained",
    "push_to_hub": "pretrained",
    "save_pretrained": "pretrained",
    "RankStrategy": "ranks",
    "StagedAdapter": "adapter",
    "adapt_tensor": "tensor_update",
    "detach_tensors": "tensor_update",
    "load_tensors": "tensor_update",
    "merge_tensors": "tensor_update",
    "save_tensors": "tensor_update",
    "unmerge_tensors": "tensor_update",
}
__all__ = [
    "Adapter",
    "AdapterConfig",
    "Geometry",
    "RankStrategy",
    "StagedAdapter",
    "TensLoRAError",
    "adapt_tensor",
    "attach",
    "detach",
    "detach_tensors",
    "disabled",
    "load",
    "load_tensors",
    "merge",
    "merge_tensors",
    "push_to_hub",
    "save_pretrained",
    "save_tensors",
    "unmerge",
    "unmerge_tensors",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for completion and help before the first use


if not TYPE_CHECKING:  # a type checker would take it for every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        # Names are imported on first use: checking settings and counting parameters then costs 0.05 s of imports, where
        # torch costs 2.1 s.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
