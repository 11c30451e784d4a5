"""TensorGuide: one tensor train, fed with fixed noise, puts out both thin matrices of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tenslora.constructions import DEPTH, HEAD
from tenslora.factorizations.factorization import STRUCTURE, Factorization, Modes

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 4
"""The size Z of both dimensions of the noise."""


class TensorGuide(Factorization):
    """dW = left right, where left and right^T are rows of what one tensor train makes of noise (arXiv 2506.16456).

    The d_in rows of left and the d_out rows of right^T are cut into blocks of b rows, where b is the largest common
    divisor of d_in and d_out up to the root of the larger one. Row (i, j), the j-th of block i, is

        w[i, j] = sum_mn z[m, n] G_block[m, i] G_offset[:, n, j] G_rank,

    with the noise z (Z, Z), which is drawn from the standard normal distribution and never trained. The ranks are R,
    LoRA's rank, and S, that of the train. The cores are G_block, whose blocks are "left" (Z, d_in / b, S) and "right"
    (Z, d_out / b, S), "offset" (S, Z, b, S) and "rank" (S, R). Each of projection, depth and site that is stacked has a
    core (S, n, S) between the latter two. Heads are not told apart: d_out is d_head times their number.

    "right" starts at zero. The paper's public text leaves open the shapes of the cores, the noise's size and scale, and
    how the update starts at zero; these are choices of this project.
    """

    structure_dim = 1

    def rank_limits(self, modes: Modes) -> dict[str, int]:
        d_in, d_out, block = _rows(modes)
        return {"rank": min(d_in, d_out), "train": NOISE * (d_in + d_out) // block}

    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        (rank, train), (d_in, d_out, block) = ranks, _rows(modes)
        return {
            "left": (NOISE, d_in // block, train),
            "right": (NOISE, d_out // block, train),
            "offset": (train, NOISE, block, train),
            **{axis: (train, modes[axis], train) for axis in STRUCTURE if axis in modes},
            "rank": (train, rank),
        }

    def noise(self, modes: Modes) -> dict[str, tuple[int, ...]]:
        return {"noise": (NOISE, NOISE)}

    def zero_parameter(self, modes: Modes) -> str:
        return "right"

    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        offset = parameters["offset"]
        train, noise, block, _ = offset.shape
        fed = parameters["noise"] @ offset.movedim(1, 0).flatten(1)  # (Z, S b S)
        fed = fed.reshape(noise * train, block * train)
        components = parameters["rank"].unsqueeze(0)
        for axis in reversed(STRUCTURE):
            if axis in parameters:
                core = parameters[axis]
                components = (core if axis == DEPTH else core.movedim(1, 0)) @ components  # (1 or P, S, R)

        def rows(blocks: Tensor) -> Tensor:
            return (blocks.movedim(1, 0).flatten(1) @ fed).reshape(-1, train) @ components

        return rows(parameters["left"]), rows(parameters["right"]).mT

    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        return [min(t, limit) for limit in self.rank_limits(modes).values()]

    def nearby(self, rank: float, limit: int) -> range:
        # One step of the train's rank changes the count by far more than one of LoRA's, which makes up for it.
        return range(1, limit + 1)


def _rows(modes: Modes) -> tuple[int, int, int]:
    # d_in, d_out, and the number of rows in a block.
    d_in = modes["d_in"]
    d_out = modes["d_head"] * modes[HEAD] if HEAD in modes else modes["d_out"]
    common = math.gcd(d_in, d_out)
    largest = math.isqrt(max(d_in, d_out))
    return d_in, d_out, max(n for n in range(1, largest + 1) if common % n == 0)
