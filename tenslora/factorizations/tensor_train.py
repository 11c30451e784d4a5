"""The tensor train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tenslora.constructions import DEPTH, HEAD
from tenslora.factorizations.factorization import STRUCTURE, Basis, Factorization, Modes, basis, leading_vectors

if TYPE_CHECKING:
    from torch import Tensor


class TensorTrain(Factorization):
    """X[i_1, ..., i_N] = G_1[i_1] G_2[:, i_2] ... G_N[:, i_N], a product of matrices (Oseledets, 2011).

    The train runs from d_in over the stacked axes (projection, depth, site, head) to d_head or d_out. The two wide
    modes are at the ends, so their cores are matrices. A train over site alone is LoTR (arXiv 2402.01376), and a train
    of two modes is LoRA's A B. Any other weight's further modes stand between d_in and d_out.

    N modes have N - 1 ranks, each named after the two modes that it joins. The cores are G_1 (d_in, r_1),
    G_k (r_{k-1}, n_k, r_k) and G_N (r_{N-1}, n_N), under their modes' names. The last core starts at zero.
    """

    structure_dim = 1

    def rank_limits(self, modes: Modes) -> dict[str, int]:
        order = _order(modes)
        if len(order) == 2:
            return {"rank": min(modes.values())}
        sizes = [modes[name] for name in order]
        return {
            f"{before}-{after}": min(math.prod(sizes[:k]), math.prod(sizes[k:]))
            for k, (before, after) in enumerate(pairwise(order), start=1)
        }

    def shapes(self, modes: Modes, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        first, *middle, last = _order(modes)
        between = zip(middle, pairwise(ranks), strict=True)
        return {
            first: (modes[first], ranks[0]),
            **{name: (before, modes[name], after) for name, (before, after) in between},
            last: (ranks[-1], modes[last]),
        }

    def zero_parameter(self, modes: Modes) -> str:
        return _order(modes)[-1]

    def squared_first_step(self, modes: Modes, ranks: Sequence[int]) -> float:
        # The columns of the product of all cores but the last are orthonormal, if none of these cores has more columns
        # than rows; otherwise its squared norm shrinks by rows / columns on average.
        *names, last = _order(modes)
        norm = float(modes[last] * ranks[-1])
        for name, before, after in zip(names, (1, *ranks), ranks, strict=False):
            norm *= min(1.0, before * modes[name] / after)
        return norm

    def slices(self, parameters: Mapping[str, Tensor], head_layout: str) -> tuple[Tensor, Tensor]:
        if HEAD in parameters:
            right = parameters[HEAD] @ parameters["d_head"]  # (r, heads, d_head)
            right = (right if head_layout == "aligned" else right.mT).flatten(1)
        else:
            right = parameters["d_out"]
        right = right.unsqueeze(0)
        for axis in reversed(STRUCTURE):
            if axis in parameters:
                core = parameters[axis]
                right = (core if axis == DEPTH else core.movedim(1, 0)) @ right
        return parameters["d_in"].unsqueeze(0), right

    def full(self, parameters: Mapping[str, Tensor], modes: Modes) -> Tensor:
        first, *others = order = _order(modes)
        tensor = parameters[first]
        for name in others:
            core = parameters[name]
            tensor = (tensor @ core.flatten(1)).reshape(*tensor.shape[:-1], *core.shape[1:])
        return tensor.permute([order.index(name) for name in modes])

    def decompose(self, tensor: Tensor, modes: Modes, ranks: Sequence[int]) -> dict[str, Tensor]:
        """TT-SVD (Oseledets, 2011): a core holds the leading singular vectors of what the cores before it have left."""
        *names, last = _order(modes)
        rest = tensor.permute([list(modes).index(name) for name in (*names, last)])
        cores: dict[str, Tensor] = {}
        before = 1
        for name, rank in zip(names, ranks, strict=True):
            rest = rest.reshape(before * modes[name], -1)
            vectors = leading_vectors(rest, rank)
            cores[name] = vectors.reshape(before, modes[name], rank) if cores else vectors
            rest, before = vectors.T @ rest, rank
        return {**cores, last: rest}

    def bases(self, parameters: Mapping[str, Tensor], modes: Modes) -> dict[str, Basis]:
        import torch

        names, order = self.rank_limits(modes), _order(modes)
        cores = [parameters[name] for name in order]
        roots: list[Tensor] = []
        grams: list[Tensor] = []
        root, gram = cores[0].new_ones(1, 1), cores[-1].new_ones(1, 1)
        for core in cores[:-1]:  # P' S up to each bond, from the left
            _, root = torch.linalg.qr((root @ core.reshape(root.shape[1], -1)).reshape(-1, core.shape[-1]))
            roots.append(root)
        for core in reversed(cores[1:]):  # Q Q^T behind each bond, from the right
            matrices = core.reshape(core.shape[0], -1, gram.shape[0])
            gram = torch.einsum("anb,bc,dnc->ad", matrices, gram, matrices)
            grams.insert(0, gram)
        return {name: basis(s, s @ g @ s.T) for name, s, g in zip(names, roots, grams, strict=True)}

    def rank_dims(self, modes: Modes) -> dict[str, list[tuple[int, str, bool]]]:
        names, (first, *middle, last) = list(self.rank_limits(modes)), _order(modes)
        between = zip(middle, pairwise(names), strict=True)
        return {
            first: [(1, names[0], True)],
            **{name: [(0, before, False), (2, after, True)] for name, (before, after) in between},
            last: [(0, names[-1], False)],
        }

    def ideal(self, modes: Modes, rule: str, t: float) -> list[float]:
        return [min(t, limit) for limit in self.rank_limits(modes).values()]

    def admits(self, modes: Modes, ranks: Sequence[int]) -> bool:
        sizes = [modes[name] for name in _order(modes)]
        padded = [1, *ranks, 1]
        return all(rank <= min(padded[k] * sizes[k], padded[k + 2] * sizes[k + 1]) for k, rank in enumerate(ranks))


def _order(modes: Modes) -> list[str]:
    first, last = "d_in", "d_head" if HEAD in modes else "d_out"
    axes = [axis for axis in (*STRUCTURE, HEAD) if axis in modes]
    others = [name for name in modes if name not in (first, last, *axes)]  # of a weight that is no Transformer's
    return [first, *axes, *others, last]
