"""The canonical polyadic decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tenslora.constructions import HEAD
from tenslora.factorizations.factorization import STRUCTURE, Factorization, Modes

if TYPE_CHECKING:
    from torch import Tensor


class CP(Factorization):
    """X = sum_r u_1r o u_2r o ... o u_Nr, a sum of R outer products (LoRTA, arXiv 2410.04060, uses it over all axes).

    There is a single rank R. Each mode has a factor U_i of shape (n_i, R) under its name: R sum n_i numbers in all. The
    factor of d_out, or of d_head, starts at zero, as LoRA's B does.
    """

    def rank_limits(self, modes: Modes) -> dict[str, int]:
        return {"rank": math.prod(modes.values()) // max(modes.values())}

    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {name: (n, ranks[0]) for name, n in modes.items()}

    def zero_parameter(self, modes: Modes) -> str:
        return "d_head" if HEAD in modes else "d_out"

    def squared_first_step(self, modes: Modes, ranks: Sequence[int]) -> float:
        # A column of U_i has the squared length min(1, n_i / R) on average.
        (rank,) = ranks
        zero = self.zero_parameter(modes)
        return modes[zero] * rank * math.prod(min(1.0, n / rank) for name, n in modes.items() if name != zero)

    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        # dW[p] = U_in diag(w_p) U_out^T, where w_p is the product of the structure axes' rows.
        if HEAD in parameters:
            slow, fast = parameters[HEAD], parameters["d_head"]
            if head_layout == "interleaved":
                slow, fast = fast, slow
            u_out = (slow.unsqueeze(1) * fast).flatten(0, 1)  # the Khatri-Rao product
        else:
            u_out = parameters["d_out"]
        right = u_out.T.unsqueeze(0)
        for axis in STRUCTURE:
            if axis in parameters:
                right = right * parameters[axis].unsqueeze(-1)
        return parameters["d_in"].unsqueeze(0), right

    def full(self, parameters: Mapping[str, Tensor], modes: Modes) -> Tensor:
        first, *middle, last = (parameters[name] for name in modes)
        for factor in middle:
            first = first.unsqueeze(-2) * factor
        return first @ last.T

    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        return [t]
