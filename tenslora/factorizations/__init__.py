"""The factorizations of a tensor, in one file each.

A tensor holds the updates of one or all projections in one or all layers. A factorization gives the thin matrices whose
products are the updates of one layer, and never builds anything larger. Nothing here imports torch, except to decompose
a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tenslora.errors import require_one_of
from tenslora.factorizations.cp import CP
from tenslora.factorizations.factorization import Factorization
from tenslora.factorizations.tensor_guide import TensorGuide
from tenslora.factorizations.tensor_train import TensorTrain
from tenslora.factorizations.tucker import Tucker

FACTORIZATIONS: Mapping[str, Factorization] = MappingProxyType(
    {"tucker": Tucker(), "cp": CP(), "tensor_train": TensorTrain(), "tensor_guide": TensorGuide()}
)


def factorization_of(construction: str, name: str) -> Factorization:
    """The factorization of a construction's tensors.

    Args:
        construction: the construction's name.
        name: one of `FACTORIZATIONS`. It has no effect on lora, whose tensors are matrices and always have the tensor
            train of two modes, which is LoRA's A B.

    Returns:
        The formulas of the factorization.

    Raises:
        TensLoRAError: for an unknown name.
    """
    require_one_of("factorization", name, FACTORIZATIONS)
    return FACTORIZATIONS["tensor_train" if construction == "lora" else name]
