"""The Tucker decomposition, which the paper uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from tenslora.constructions import DEPTH, HEAD, PROJECTION, SITE
from tenslora.factorizations.factorization import STRUCTURE, Basis, Factorization, Modes, basis, leading_vectors

if TYPE_CHECKING:
    from torch import Tensor


class Tucker(Factorization):
    """X = G x_1 U_1 x_2 U_2 ... x_N U_N (arXiv 2509.19391, section 2).

    Each mode has a rank r_i and a factor U_i of shape (n_i, r_i) under its name. The core G has the shape
    (r_1, ..., r_N) and starts at zero. The tensor has sum n_i r_i + prod r_i parameters.
    """

    def rank_limits(self, modes: Modes) -> dict[str, int]:
        return dict(modes)

    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"core": tuple(ranks), **{name: (n, r) for (name, n), r in zip(modes.items(), ranks, strict=True)}}

    def zero_parameter(self, modes: Modes) -> str:
        return "core"

    def squared_first_step(self, modes: Modes, ranks: Sequence[int]) -> float:
        # ||U_i||^2 is min(r_i, n_i), and the norm of the Kronecker product of the U_i is the product of their norms.
        return float(math.prod(min(r, n) for r, n in zip(ranks, modes.values(), strict=True)))

    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        """The thin products, in whichever of two groupings takes fewer multiplications per token.

        G[p] (r_in, r_out) is the core, contracted with the rows of the structure axes' factors. dW[p] is either
        U_in times G[p] U_out^T, where left is (1, d_in, r_in) and right (P, r_in, d_out), or U_in G[p] times U_out^T,
        where left is (P, d_in, r_out) and right (P, r_out, d_out). Where head is stacked, U_out is the Kronecker
        product of the factors of d_head and head, and r_out the product of their ranks.
        """
        core = parameters["core"]
        if DEPTH in parameters:
            core = core @ parameters[DEPTH]
        matrix_axis = PROJECTION if PROJECTION in parameters else SITE if SITE in parameters else None
        core = core.unsqueeze(-1) if matrix_axis is None else core @ parameters[matrix_axis].T
        core = core.movedim(-1, 0)
        u_in = parameters["d_in"].unsqueeze(0)
        projections, r_in, r_out = core.flatten(2).shape
        d_in, d_out = u_in.shape[1], _d_out(parameters)
        if not self.core_joins_input(projections, r_in, r_out, d_in, d_out):
            return u_in, _expand_output(core, parameters, head_layout)
        identity = core.new_ones(r_out).diag().view(1, r_out, *core.shape[2:])
        u_out = _expand_output(identity, parameters, head_layout)
        return u_in @ core.flatten(2), u_out.expand(projections, -1, -1)

    def full(self, parameters: Mapping[str, Tensor], modes: Modes) -> Tensor:
        tensor = parameters["core"]
        for name in modes:  # after N such moves the modes are in their order again
            tensor = tensor.movedim(0, -1) @ parameters[name].T
        return tensor

    def decompose(self, tensor: Tensor, modes: Modes, ranks: Sequence[int]) -> dict[str, Tensor]:
        """The truncated HOSVD (De Lathauwer, De Moor and Vandewalle, 2000).

        U_i holds the leading left singular vectors of the i-th unfolding, and the core the tensor's coordinates in
        these bases. The error is at most sqrt(N) times the smallest possible one.
        """
        factors, core = {}, tensor
        for axis, (name, rank) in enumerate(zip(modes, ranks, strict=True)):
            factors[name] = leading_vectors(tensor.movedim(axis, 0).flatten(1), rank)
            core = core.movedim(0, -1) @ factors[name]  # after N such moves the modes are in their order again
        return {"core": core, **factors}

    def bases(self, parameters: Mapping[str, Tensor], modes: Modes) -> dict[str, Basis]:
        import torch

        roots = {name: torch.linalg.qr(parameters[name])[1] for name in modes}
        core = parameters["core"]
        for name in modes:  # the tensor's coordinates in orthonormal bases of the factors
            core = core.movedim(0, -1) @ roots[name].T
        unfoldings = {name: core.movedim(axis, 0).flatten(1) for axis, name in enumerate(modes)}
        return {name: basis(roots[name], unfolding @ unfolding.T) for name, unfolding in unfoldings.items()}

    def rank_dims(self, modes: Modes) -> dict[str, list[tuple[int, str, bool]]]:
        core = [(axis, name, False) for axis, name in enumerate(modes)]
        return {"core": core, **{name: [(1, name, True)] for name in modes}}

    def core_joins_input(self, projections: int, r_in: int, r_out: int, d_in: int, d_out: int) -> bool:
        """Whether the grouping U_in G[p] times U_out^T takes fewer multiplications than U_in times G[p] U_out^T.

        The first takes P r_out (d_in + d_out) multiplications per token, the second r_in (d_in + P d_out).

        Args:
            projections: P, how many matrices share the input.
            r_in: the rank of d_in.
            r_out: the rank of d_out, or the product of those of d_head and head.
            d_in: the number of inputs.
            d_out: the number of outputs of one matrix.
        """
        return projections * r_out * (d_in + d_out) < r_in * (d_in + projections * d_out)

    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        return RULES[rule](modes, t)

    def nearby(self, rank: float, limit: int) -> range:
        # A third up or down: few ranks are free at the same time, and the core's size changes in large steps.
        return range(max(1, math.ceil(rank * 3 / 4)), min(limit, max(2, math.floor(rank * 4 / 3))) + 1)

    def admits(self, modes: Modes, ranks: Sequence[int]) -> bool:
        # A rank above the product of the others cannot raise the tensor's multilinear rank.
        return all(r * r <= math.prod(ranks) for r in ranks)


def _d_out(parameters: Mapping[str, Tensor]) -> int:
    if HEAD in parameters:
        return parameters[HEAD].shape[0] * parameters["d_head"].shape[0]
    return parameters["d_out"].shape[0]


def _expand_output(rows: Tensor, parameters: Mapping[str, Tensor], head_layout: str) -> Tensor:
    # rows (k, r, r_out), or (k, r, r_d_head, r_head), times U_out^T is (k, r, d_out).
    if HEAD not in parameters:
        return rows @ parameters["d_out"].T
    slow, fast = parameters[HEAD], parameters["d_head"]
    if head_layout == "interleaved":
        rows, slow, fast = rows.mT, fast, slow
    return ((rows @ slow.T).mT @ fast.T).flatten(-2)


# A rule maps a real number t >= 1 to the real-valued rank of each mode. No rank may fall when t grows.
Rule = Callable[[Modes, float], list[float]]


def _saturate(modes: Modes, t: float) -> list[float]:
    # The structure axes are so short that compressing them saves next to nothing, and they are what the construction is
    # about. So they keep full rank, and the two wide modes share the budget evenly.
    return [float(n) if name in (HEAD, *STRUCTURE) else min(t, n) for name, n in modes.items()]


def _uniform(modes: Modes, t: float) -> list[float]:
    return [min(t, n) for n in modes.values()]


def _proportional(modes: Modes, t: float) -> list[float]:
    # In every rule t goes up to the largest size, so t / max(n) is the compression that all modes share.
    return [max(1.0, n * t / max(modes.values())) for n in modes.values()]


RULES: Mapping[str, Rule] = MappingProxyType(
    {"saturate": _saturate, "uniform": _uniform, "proportional": _proportional}
)
"""How `ranks.isoparameters` spends its budget on the ranks of a Tucker tensor."""
