"""Factorised tensors that never build themselves.

A tensor holds the updates of one or all projections in one or all layers. Each module gives, for one layer, the
thin matrices of which the updates are products, ``dW[p] = left @ right[p]``, and nothing larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tenslora.constructions import DEPTH, HEAD, HEAD_LAYOUTS, INITS, PROJECTION
from tenslora.errors import TensLoRAError


class Matrix(nn.Module):
    """LoRA's own factorisation of one update: dW = A B (Hu et al., 2021, section 4.1).

    a: (d_in, rank), Kaiming-uniform with a = sqrt 5 over d_in, as PEFT starts ``lora_A`` (its transpose).
    b: (rank, d_out), zero.
    """

    def __init__(self, modes: Mapping[str, int], ranks: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        (rank,) = ranks
        self.a = nn.Parameter(torch.empty(modes["d_in"], rank))
        self.b = nn.Parameter(torch.zeros(rank, modes["d_out"]))
        _kaiming_uniform(self.a, generator)

    def layer(self, _: int) -> tuple[Tensor, Tensor]:
        """(left, right) of shapes (d_in, rank) and (1, rank, d_out), for the one layer that there is."""
        return self.a, self.b.unsqueeze(0)


class Tucker(nn.Module):
    """X = G x_1 U_1 x_2 U_2 ... x_N U_N (arXiv 2509.19391, section 2).

    core: G, shape (r_1, ..., r_N), zero at the start, so that dW = 0. factors: one U_i of shape (n_i, r_i) per
    mode, under the mode's name.

    Args:
        modes: name and size of each mode, as `constructions.modes` gives them.
        ranks: r_i, one per mode.
        generator: the random stream that the factors are drawn from, in the order of the modes.
        init: of the factors. orthogonal (orthonormal columns; rows where r_i > n_i), normal (standard deviation
            1 / sqrt n_i, so that columns have unit length on average), or kaiming_uniform (bound 1 / sqrt n_i,
            LoRA's own).
        head_layout: how d_head and head make up d_out. aligned: index = head * d_head + offset, the model's
            heads. interleaved: index = offset * heads + head, as the paper's released code unfolds.
    """

    def __init__(
        self,
        modes: Mapping[str, int],
        ranks: Sequence[int],
        generator: torch.Generator,
        init: str = "orthogonal",
        head_layout: str = "aligned",
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise TensLoRAError(f"adapter.init={init}: must be one of {', '.join(INITS)}")
        if head_layout not in HEAD_LAYOUTS:
            raise TensLoRAError(f"adapter.head_layout={head_layout}: must be one of {', '.join(HEAD_LAYOUTS)}")
        self.head_layout = head_layout
        self.core = nn.Parameter(torch.zeros(*ranks))
        self.factors = nn.ParameterDict()
        for (name, n), r in zip(modes.items(), ranks, strict=True):
            self.factors[name] = nn.Parameter(torch.empty(n, r))  # one by one: a whole dict would be sorted
        for factor in self.factors.values():
            if init == "orthogonal":
                nn.init.orthogonal_(factor, generator=generator)
            elif init == "normal":
                nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[0]), generator=generator)
            else:
                _kaiming_uniform(factor, generator)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The updates of one layer as thin products.

        Args:
            layer: the row of the depth factor; ignored where depth is not stacked.

        Returns:
            left: U_in, shape (d_in, r_in).
            right: R, shape (P, r_in, d_out), or (1, r_in, d_out) where projection is not stacked. R[p] is G
            contracted with row p of the projection factor, row `layer` of the depth factor, and U_out or the
            pair U_d_head, U_head.
        """
        core: Tensor = self.core
        if DEPTH in self.factors:
            core = core @ self.factors[DEPTH][layer]
        if PROJECTION in self.factors:
            core = torch.movedim(core @ self.factors[PROJECTION].T, -1, 0)
        else:
            core = core.unsqueeze(0)
        if HEAD in self.factors:  # core is (P, r_in, r_d_head, r_head)
            slow, fast = self.factors[HEAD], self.factors["d_head"]
            if self.head_layout == "interleaved":
                core, slow, fast = core.mT, fast, slow
            right = ((core @ slow.T).mT @ fast.T).flatten(-2)
        else:  # core is (P, r_in, r_out)
            right = core @ self.factors["d_out"].T
        return self.factors["d_in"], right


def _kaiming_uniform(factor: Tensor, generator: torch.Generator) -> None:
    # nn.init.kaiming_uniform_ with a = sqrt 5, whose fan-in is the mode size: factors are stored (n, r), the
    # transpose of a Linear's weight.
    bound = 1 / math.sqrt(factor.shape[0])
    nn.init.uniform_(factor, -bound, bound, generator=generator)
