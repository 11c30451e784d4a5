"""What every factorization provides: its ranks, the shapes of its parameters, and the slices of its tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tenslora.constructions import DEPTH, PROJECTION, SITE
from tenslora.errors import TensLoRAError

if TYPE_CHECKING:  # counting parameters must not import torch; the arithmetic uses methods of the tensors alone
    from torch import Tensor

Modes = Mapping[str, int]
"""The name and the size of each mode of a tensor, in the order of `constructions.modes`."""

STRUCTURE = (PROJECTION, DEPTH, SITE)
"""The axes that tell matrices and layers apart."""


class Basis(NamedTuple):
    """The singular vectors of a tensor at one rank r, where the tensor is a product P Q over r terms.

    P = P' S, where P' has orthonormal columns, and w are the left singular vectors of S Q, so that P' w are those of
    P Q. In the new basis P becomes P before, and Q becomes after^T Q; to cut the rank, only the first columns are used.

    Args:
        energies: the squared singular values, largest first, (k,); k is r, or less if P has fewer rows.
        before: pinv(S) w, (r, k).
        after: S^T w, (r, k).
    """

    energies: Tensor
    before: Tensor
    after: Tensor


def basis(root: Tensor, gram: Tensor) -> Basis:
    """The basis at one rank.

    Args:
        root: S, (k, r).
        gram: S Q Q^T S^T, (k, k).

    Returns:
        The basis.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)
    return Basis(values.flip(0).clamp(min=0), torch.linalg.pinv(root) @ vectors, root.T @ vectors)


class Factorization(ABC):
    """The formulas by which a tensor with modes n_1, ..., n_N is written in few numbers.

    A factorization holds no numbers itself. In every method, `modes` is as `constructions.modes` gives it, and ranks
    are in the order of `rank_limits`.
    """

    structure_dim: ClassVar[int] = 0
    """The dimension of a structure axis's parameter that runs over the axis's positions."""

    @property
    def name(self) -> str:
        """The name in `FACTORIZATIONS`, which is that of the class's file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def rank_limits(self, modes: Modes) -> dict[str, int]:
        """The names of a tensor's ranks, and how large each rank can usefully be.

        Args:
            modes: the tensor's modes.

        Returns:
            The name of each rank, in order, and the largest value that is of any use whatever the other ranks are.
        """

    @abstractmethod
    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The names and the shapes of a tensor's parameters.

        The count of parameters is computed from the shapes, also for ranks that are real numbers or 0. The count must
        be affine in the first rank, and it must not fall when any rank grows.

        Args:
            modes: the tensor's modes.
            ranks: the tensor's ranks.

        Returns:
            The name and the shape of each parameter, in the order in which they are drawn. A parameter that belongs to
            a mode has the mode's name. The columns that an orthogonal start makes orthonormal run over the last
            dimension.
        """

    def noise(self, modes: Modes) -> dict[str, tuple[int, ...]]:
        """The names and the shapes of fixed random numbers, which `slices` finds among the parameters.

        They are drawn from the standard normal distribution, saved with the adapter, and neither trained nor counted.

        Args:
            modes: the tensor's modes.

        Returns:
            The name and the shape of each; nothing is the default.
        """
        return {}

    @abstractmethod
    def zero_parameter(self, modes: Modes) -> str:
        """The name of the parameter that starts at zero, so that dW = 0. Every update must be linear in that parameter.

        Args:
            modes: the tensor's modes.
        """

    @abstractmethod
    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        """The updates of one layer as thin products, dW[p] = left[p] @ right[p].

        The method is called once for all layers, through torch.vmap.

        Args:
            parameters: the parameters and the noise, with the names and shapes that `shapes` and `noise` give, with two
                exceptions. The
                parameter of projection or site holds only the P positions that are wanted. The parameter of depth holds
                only this layer's position, without that dimension.
            head_layout: how a head and an offset within d_head give an index of d_out. "aligned" is
                head * d_head + offset, which are the model's heads; "interleaved" is offset * heads + head, as in the
                paper's released code.

        Returns:
            left, (P, d_in, r), or (1, d_in, r) if all slices share it; and right, (P, r, d_out). P is 1 where neither
            projection nor site is stacked. r is the inner size of the product and need not be one of the ranks.
        """

    def squared_first_step(self, modes: Modes, ranks: Sequence[int]) -> float | None:
        """The squared norm of the whole tensor after AdamW's first step with learning rate 1, from an orthogonal start.

        Every entry of the parameter that starts at zero has moved by 1, up or down at random. All other parameters are
        as `tensor.FactorizedTensor` draws them with init="orthogonal". The result is the expectation.

        Args:
            modes: the tensor's modes.
            ranks: the tensor's ranks.

        Returns:
            The squared norm; None if there is no formula, which is the default.
        """
        return None

    @abstractmethod
    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        """Real-valued ranks that `isoparameters` raises together, by raising t, until they meet its budget.

        Args:
            modes: the tensor's modes.
            rule: how the ranks grow with t, one of `tucker.RULES`. Only Tucker reads it.
            t: a number from 1 to the largest limit. No rank may fall when t grows.

        Returns:
            The ranks, as real numbers.
        """

    def nearby(self, rank: float, limit: int) -> range:
        """The integers that `isoparameters` tries for one rank.

        `isoparameters` tries all combinations of all ranks but the first, so there should be few integers.

        Args:
            rank: the ideal value, a real number.
            limit: the rank's limit.
        """
        return range(max(1, math.floor(rank) - 1), min(limit, math.ceil(rank) + 1) + 1)

    def admits(self, modes: Modes, ranks: Sequence[int]) -> bool:
        """Whether every rank is of use, given the other ranks: a lower rank would exclude some tensors.

        Args:
            modes: the tensor's modes.
            ranks: the tensor's ranks.
        """
        return True

    def decompose(self, tensor: Tensor, modes: Modes, ranks: Sequence[int]) -> dict[str, Tensor]:
        """Parameters whose tensor approximates a given one.

        Args:
            tensor: the given tensor, whose dimensions are the modes.
            modes: the tensor's modes.
            ranks: the ranks of the result.

        Returns:
            The parameters, with the names and shapes that `shapes` gives.

        Raises:
            TensLoRAError: if the factorization has no direct method, which is the default.
        """
        raise TensLoRAError(f"factorization={self.name}: must be tucker or tensor_train to be computed from updates")

    def bases(self, parameters: Mapping[str, Tensor], modes: Modes) -> dict[str, Basis]:
        """For each rank, the basis in which the tensor is cut to a lower rank with the least loss.

        Args:
            parameters: the parameters, with the names and shapes that `shapes` gives, in float64.
            modes: the tensor's modes.

        Returns:
            The basis of each rank, by the rank's name.

        Raises:
            TensLoRAError: if the factorization has no such bases, which is the default.
        """
        raise TensLoRAError(f"factorization={self.name}: must be tucker or tensor_train to be pruned")

    def rank_dims(self, modes: Modes) -> dict[str, list[tuple[int, str, bool]]]:
        """The dimensions of each parameter that are ranks; for a factorization that has `bases`.

        Args:
            modes: the tensor's modes.

        Returns:
            For each parameter, the dimension, the name of its rank, and whether the parameter stands before the bond
            that the rank makes: a factor of Tucker, or the core before the bond in a train.
        """
        return {}

    def full(self, parameters: Mapping[str, Tensor], modes: Modes) -> Tensor:
        """The complete tensor. An attention's updates are never built this way; those of any other weight may be.

        Args:
            parameters: the parameters, with the names and shapes that `shapes` gives.
            modes: the tensor's modes, either a construction's or those of `constructions.weight_modes`.

        Returns:
            The tensor, whose dimensions are the modes.

        Raises:
            TensLoRAError: if the factorization is for the matrices of a Transformer alone, which is the default.
        """
        raise TensLoRAError(f"factorization={self.name}: must be tucker, cp or tensor_train on any weight")

    def count(self, modes: Modes, ranks: Sequence[float]) -> float:
        """The number of a tensor's parameters.

        Args:
            modes: the tensor's modes.
            ranks: the tensor's ranks, which may be real numbers here.

        Returns:
            The number, an integer if the ranks are integers.
        """
        shapes = self.shapes(modes, ranks)  # type: ignore[arg-type]
        return sum(math.prod(shape) for shape in shapes.values())


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """The left singular vectors of a matrix that belong to its largest singular values.

    They are computed as the eigenvectors of matrix @ matrix.T, in the matrix's own precision.

    Args:
        matrix: (m, n).
        count: the number of vectors.

    Returns:
        (m, count), largest singular value first. Columns beyond the m-th are zero.
    """
    import torch

    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    vectors = vectors.flip(1)[:, :count]
    return torch.nn.functional.pad(vectors, (0, count - vectors.shape[1]))
