"""What every factorization gives: its ranks, the shapes of its parameters, and the slices of its tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from tenslora.constructions import DEPTH, PROJECTION, SITE
from tenslora.errors import TensLoRAError

if TYPE_CHECKING:  # counting parameters must not wait for torch; the arithmetic needs no more than tensors' own methods
    from torch import Tensor

Modes = Mapping[str, int]
"""Name and size of each mode of a tensor, in the order of `constructions.modes`."""


class Factorization(ABC):
    """A way to write a tensor with modes n_1, ..., n_N in few numbers. Holds none itself.

    structure_dim: which dimension of a structure axis's parameter counts the axis's places.
    """

    structure_dim: ClassVar[int] = 0

    @abstractmethod
    def rank_limits(self, modes: Modes) -> dict[str, int]:
        """Name of each rank, and the largest that is of any use whatever the others are.

        `ranks`, here and everywhere, are in this order.
        """

    @abstractmethod
    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter, in the order in which they are drawn; a mode's is named after it.

        The orthogonal start makes the last dimension's slices orthonormal, over all the others. Counting multiplies the
        shapes out for ranks that are no integers too, or 0. The count must be affine in the first rank, and fall with
        none.
        """

    @abstractmethod
    def zero_parameter(self, modes: Modes) -> str:
        """Which parameter starts at zero, so that dW = 0: one that every update is linear in."""

    @abstractmethod
    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        """Updates of one layer as thin products, dW[p] = left[p] @ right[p].

        Called once for all layers, through torch.vmap.

        Args:
            parameters: what the layer needs of them, with the names and shapes that `shapes` gives; but projection's
                or site's has the P places wanted, and depth's the layer's alone, without that dimension.
            head_layout: how d_head and head make up d_out. aligned: index = head * d_head + offset, the model's heads.
                interleaved: index = offset * heads + head, as the paper's released code unfolds.

        Returns left, (P, d_in, r), or (1, d_in, r) where all slices share it, and right, (P, r, d_out); P is 1 where
        neither projection nor site is stacked. r is whatever the product needs, one of the ranks or not.
        """

    @abstractmethod
    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        """Real-valued ranks for t from 1 to the largest limit, which isoparameters follows until they meet its budget.

        They must not fall with t. rule: rank_strategy.rule, which is Tucker's (`tucker.RULES`); others need none.
        """

    def nearby(self, rank: float, limit: int) -> range:
        """The integers that isoparameters tries for a rank whose ideal value is `rank`, below its limit.

        All combinations of all ranks but the first are tried: a few integers each.
        """
        return range(max(1, math.floor(rank) - 1), min(limit, math.ceil(rank) + 1) + 1)

    def admits(self, modes: Modes, ranks: Sequence[int]) -> bool:
        """Whether no rank is so large beside the others that a smaller one could hold the same tensors."""
        return True

    def decompose(self, tensor: Tensor, modes: Modes, ranks: Sequence[int]) -> dict[str, Tensor]:
        """Parameters whose tensor is near to a given one, of the modes' sizes in their order.

        Raises TensLoRAError if there is no direct way to them, as here.
        """
        raise TensLoRAError(
            f"{type(self).__name__}: cannot be computed from a given update; take factorization=tucker or tensor_train"
        )

    def count(self, modes: Modes, ranks: Sequence[float]) -> float:
        """How many numbers: an integer for integer ranks."""
        shapes = self.shapes(modes, ranks)  # type: ignore[arg-type]
        return sum(math.prod(shape) for shape in shapes.values())


STRUCTURE = (PROJECTION, DEPTH, SITE)


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """The left singular vectors of `matrix` with its `count` largest singular values, as columns, largest first.

    Zero columns stand in for more than there are. By the eigenvectors of its Gram matrix, in the precision given.
    """
    import torch

    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    vectors = vectors.flip(1)[:, :count]
    return torch.nn.functional.pad(vectors, (0, count - vectors.shape[1]))
