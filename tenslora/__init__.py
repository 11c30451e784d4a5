"""TensLoRA: tensor-factorised low-rank adapters for Transformers (arXiv 2509.19391)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tenslora.adapter import Adapter
    from tenslora.adapter_config import AdapterConfig
    from tenslora.attachment import attach, detach, disabled, load, merge, unmerge
    from tenslora.constructions import Geometry
    from tenslora.errors import TensLoRAError
    from tenslora.ranks import RankStrategy

_HOME = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter_config",
    "attach": "attachment",
    "detach": "attachment",
    "disabled": "attachment",
    "load": "attachment",
    "merge": "attachment",
    "unmerge": "attachment",
    "Geometry": "constructions",
    "TensLoRAError": "errors",
    "RankStrategy": "ranks",
}
__all__ = [
    "Adapter",
    "AdapterConfig",
    "Geometry",
    "RankStrategy",
    "TensLoRAError",
    "attach",
    "detach",
    "disabled",
    "load",
    "merge",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use: counting parameters or printing --help must not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
