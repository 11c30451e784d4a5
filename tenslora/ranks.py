"""Rank strategies and exact parameter counts. Nothing here needs torch.

Counts are those of the adapter alone, summed over its tensors. LoRA at rank r has r (d_in + d_out) parameters
per projection and layer; a factorization counts its own (`Factorization.shapes`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tenslora.constructions import Geometry, modes, tensor_grid
from tenslora.errors import TensLoRAError, require_one_of
from tenslora.factorizations import factorization_of
from tenslora.factorizations.tucker import RULES

STRATEGIES = ("isorank", "isoparameters", "explicit")


def rank_limits(construction: str, geometry: Geometry, factorization: str = "tucker") -> dict[str, int]:
    """Name of each rank of a construction's tensors, in order, and the largest that is of any use."""
    each = [factorization_of(construction, factorization).rank_limits(sizes) for sizes in _rows(construction, geometry)]
    return {name: max(limits[name] for limits in each) for name in each[0]}


def _rows(construction: str, geometry: Geometry) -> list[dict[str, int]]:
    # The modes of the tensors of one column of the grid, which differ where the matrices' widths do.
    return [modes(construction, geometry, matrix) for matrix in range(tensor_grid(construction, geometry)[0])]


def parameter_count(construction: str, geometry: Geometry, ranks: Sequence[int], factorization: str = "tucker") -> int:
    """Exact number of adapter parameters over all tensors.

    >>> vit_base = Geometry(d_in=768, heads=12, d_head=64, layers=12)
    >>> parameter_count("lora", vit_base, [4]), parameter_count("qkv_depth", vit_base, [4, 4, 3, 4])
    (221184, 6460)
    """
    ways = factorization_of(construction, factorization)
    per_layer = sum(ways.count(sizes, ranks) for sizes in _rows(construction, geometry))
    return int(per_layer) * tensor_grid(construction, geometry)[1]


def isorank(
    construction: str, geometry: Geometry, rank: int = 4, cap: bool = False, factorization: str = "tucker"
) -> tuple[int, ...]:
    """The same number for every rank.

    The paper's counts take rank 4 on the projection mode too, whose size is 3: that is `cap=False`. With
    `cap=True` a rank stops at its limit, which spans the same updates with fewer parameters.

    Raises TensLoRAError for a rank below 1 or above min(d_in, d_out).
    """
    limit = min(geometry.d_in, geometry.d_out)
    if not 1 <= rank <= limit:
        raise TensLoRAError(f"rank={rank}: must be from 1 to {limit}, the width of a projection")
    return tuple(min(rank, n) if cap else rank for n in rank_limits(construction, geometry, factorization).values())


def explicit(
    construction: str, geometry: Geometry, ranks: Sequence[int] | None, factorization: str = "tucker"
) -> tuple[int, ...]:
    """The ranks as given, checked: one for each name in `rank_limits`, from 1 to its limit.

    lora takes a single rank. Raises TensLoRAError that names the one at fault.
    """
    limits = rank_limits(construction, geometry, factorization)
    wanted = ", ".join(f"{name} 1..{limit}" for name, limit in limits.items())
    given = None if ranks is None else list(ranks)
    if given is None or len(given) != len(limits):
        raise TensLoRAError(f"ranks={given}: tensor_mode {construction} needs {len(limits)} integers ({wanted})")
    for (name, limit), rank in zip(limits.items(), given, strict=True):
        if not 1 <= rank <= limit:
            raise TensLoRAError(f"ranks={given}: the rank {rank} of {name} must be from 1 to {limit} ({wanted})")
    return tuple(given)


def isoparameters(
    construction: str,
    geometry: Geometry,
    rank: int = 4,
    rule: str = "saturate",
    tolerance: float = 0.01,
    factorization: str = "tucker",
    scale: float = 1.0,
) -> tuple[int, ...]:
    """Ranks that give `scale` times as many parameters as LoRA at `rank`, as near as sensible integers allow.

    The factorization draws a one-parameter family of real-valued ranks r(t), and t is chosen so that the count equals
    the budget exactly. CP's only rank is t; a tensor train's are all t, as far as their limits let them. Tucker follows
    the rule:

    - saturate: head, projection, depth and site modes keep full rank, d_in and d_out (or d_head) share the rank t.
      For qkv_depth on ViT-B/16 that is [60, 60, 3, 12].
    - uniform: every mode has rank t, capped at its size (isorank, with the rank that meets the budget).
    - proportional: every mode is compressed alike, r_i = t n_i / max n.

    Of the integer ranks whose count is within `tolerance` (relative) of the budget, the one nearest to r(t) is
    taken: least sum of squared log ratios. If there is none, the count nearest to the budget decides. Ranks that r(t)
    has at their limits stay there, the others move by at most a third (a tensor train's by at most two), and no rank
    exceeds what the others can use (Tucker: their product, the tensor's multilinear rank).

    Raises TensLoRAError for a rank below 1 or above min(d_in, d_out).
    """
    lora_ranks = isorank("lora", geometry, rank)
    if construction == "lora":
        return lora_ranks
    budget = scale * parameter_count("lora", geometry, lora_ranks)
    search = _Search(construction, geometry, factorization, budget)
    ideal = search.ideal(rule)

    def distance(ranks: Sequence[int]) -> float:
        return sum(math.log(r / s) ** 2 for r, s in zip(ranks, ideal, strict=True))

    best: tuple[tuple[float, float], tuple[int, ...]] | None = None
    for ranks in search.candidates(ideal, tolerance):
        excess = abs(search.count(ranks) / search.budget - 1)
        key = (max(round(excess - tolerance, 9), 0.0), distance(ranks))  # rounded: equal misses are to tie
        if best is None or key < best[0]:
            best = key, ranks
    assert best is not None  # the ideal's own neighbourhood always yields candidates
    return best[1]


class _Search:
    """The ranks of a construction's tensors; counts are those of one column of its grid, all matrices of a layer."""

    def __init__(self, construction: str, geometry: Geometry, factorization: str, budget: float) -> None:
        self.factorization = factorization_of(construction, factorization)
        self.rows = _rows(construction, geometry)
        self.widest = max(self.rows, key=lambda sizes: math.prod(sizes.values()))
        self.limits = list(rank_limits(construction, geometry, factorization).values())
        self.budget = budget / tensor_grid(construction, geometry)[1]

    def count(self, ranks: Sequence[float]) -> float:
        return sum(self.factorization.count(sizes, ranks) for sizes in self.rows)

    def ideal(self, rule: str) -> list[float]:
        low, high = 1.0, float(max(self.limits))
        for _ in range(60):  # bisection to the last bit of a double
            middle = (low + high) / 2
            few = self.count(self.factorization.ideal(self.widest, rule, middle)) < self.budget
            low, high = (middle, high) if few else (low, middle)
        return self.factorization.ideal(self.widest, rule, low)

    def candidates(self, ideal: Sequence[float], tolerance: float) -> Iterator[tuple[int, ...]]:
        # The first rank is never listed: given the others the count is affine in it, a + b r, so the two bounds of the
        # tolerated interval give all its candidates at once.
        first, *others = (
            range(limit, limit + 1) if rank == limit else self.factorization.nearby(rank, limit)
            for rank, limit in zip(ideal, self.limits, strict=True)
        )
        for rest in itertools.product(*others):
            fixed = self.count((0, *rest))
            slope = self.count((1, *rest)) - fixed
            low = math.ceil((self.budget * (1 - tolerance) - fixed) / slope)
            high = math.floor((self.budget * (1 + tolerance) - fixed) / slope)
            nearest = round((self.budget - fixed) / slope)
            inside = min(max(round(ideal[0]), low), high) if low <= high else nearest
            ranks = (min(max(inside, first[0]), first[-1]), *rest)
            if self.factorization.admits(self.widest, ranks):
                yield ranks
        # Where every candidate breaks the bound (a backbone of a few units), round the ideal point.
        yield tuple(min(n, max(1, round(r))) for n, r in zip(self.limits, ideal, strict=True))


@dataclass(frozen=True)
class RankStrategy:
    """How the ranks of a tensor are chosen; `resolve` turns the strategy into integers.

    Args:
        name: "isorank", "isoparameters" or "explicit".
        rank: the rank of isorank; for isoparameters, the LoRA rank whose parameter count is matched.
        ranks: the ranks of explicit.
        cap: for isorank, see `isorank`.
        rule: for isoparameters, see `isoparameters`.
        tolerance: for isoparameters, relative to the budget.
        scale: for isoparameters, multiplies the budget.

    Raises:
        TensLoRAError: for a value that is out of range; the message names the field, its value and what is valid.
    """

    name: str = "isorank"
    rank: int = 4
    ranks: tuple[int, ...] | None = None
    cap: bool = False
    rule: str = "saturate"
    tolerance: float = 0.01
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_one_of("name", self.name, STRATEGIES)
        require_one_of("rule", self.rule, RULES)
        if self.rank < 1:
            raise TensLoRAError(f"rank={self.rank}: must be at least 1")
        if not 0 <= self.tolerance < 1:
            raise TensLoRAError(f"tolerance={self.tolerance}: must be at least 0 and below 1")
        if not 0 < self.scale < math.inf:
            raise TensLoRAError(f"scale={self.scale}: must be above 0")

    def resolve(self, construction: str, geometry: Geometry, factorization: str = "tucker") -> tuple[int, ...]:
        """The ranks of the construction's tensors.

        Args:
            construction: its name.
            geometry: of the backbone.
            factorization: of the tensors.

        Returns:
            One integer for each name in `rank_limits`.

        Raises:
            TensLoRAError: for ranks that do not fit the construction or the geometry.
        """
        if self.name == "isorank":
            return isorank(construction, geometry, self.rank, self.cap, factorization)
        if self.name == "explicit":
            return explicit(construction, geometry, self.ranks, factorization)
        return isoparameters(construction, geometry, self.rank, self.rule, self.tolerance, factorization, self.scale)
