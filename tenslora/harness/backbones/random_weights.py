"""What random weights must not depend on: torch's global generator, and its default type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def float32_by_default() -> Iterator[None]:
    """A context in which torch's default type is float32. timm makes a model in that type, and rounds weights to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class OwnStream(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which this thread draws on the CPU from a generator of its own.

    The numbers are those of torch's global generator with the same seed, which is neither read nor changed. Another
    thread that draws from it meanwhile changes nothing, as it would after `torch.manual_seed`.

    Args:
        seed: the seed of the stream.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func(*args, **given)
        drawn = args[0] if args and isinstance(args[0], Tensor) else None
        device = given.get("device") if drawn is None else drawn.device
        takes_generator = any(
            argument.name == "generator"
            for overload in func.overloadpacket.overloads()
            for argument in getattr(func.overloadpacket, overload)._schema.arguments
        )
        if takes_generator and (device is None or torch.device(device).type == "cpu"):
            return func.overloadpacket(*args, **{**given, "generator": self._generator})
        return func(*args, **given)
