"""Rank strategies and exact parameter counts. Nothing here needs torch.

A count is the number of the adapter's parameters in all its tensors; the classification head is left out. LoRA at rank
r has r (d_in + d_out) parameters per projection and layer. The counts of the other constructions follow from
`Factorization.shapes`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

from tenslora.constructions import Geometry, modes, tensor_grid, weight_modes
from tenslora.errors import TensLoRAError, require_numbers, require_one_of
from tenslora.factorizations import FACTORIZATIONS, factorization_of
from tenslora.factorizations.tucker import RULES

LARGEST_SCALE = 1000
"""The most times as many parameters as LoRA's that isoparameters can ask for."""

STRATEGIES = ("isorank", "isoparameters", "explicit")


def rank_limits(construction: str, geometry: Geometry, factorization: str = "tucker") -> dict[str, int]:
    """The names of the ranks of a construction's tensors, and how large each rank can usefully be.

    >>> rank_limits("att_qkv", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    {'d_in': 768, 'd_head': 64, 'head': 12, 'projection': 3}

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Returns:
        The name of each rank, in order, and the largest value that is of any use.
    """
    chosen = factorization_of(construction, factorization)
    limits = [chosen.rank_limits(sizes) for sizes in _modes_over_matrices(construction, geometry)]
    return {name: max(each[name] for each in limits) for name in limits[0]}


def _modes_over_matrices(construction: str, geometry: Geometry) -> list[dict[str, int]]:
    # The modes of every tensor of one layer, or of all layers if layers are stacked. A wider matrix has wider modes.
    return [modes(construction, geometry, matrix) for matrix in range(tensor_grid(construction, geometry)[0])]


def parameter_count(construction: str, geometry: Geometry, ranks: Sequence[int], factorization: str = "tucker") -> int:
    """The exact number of adapter parameters over all tensors.

    >>> vit_base = Geometry(d_in=768, heads=12, d_head=64, layers=12)
    >>> parameter_count("lora", vit_base, [4]), parameter_count("qkv_depth", vit_base, [4, 4, 4, 4])
    (221184, 6460)

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        ranks: the ranks, in the order of `rank_limits`.
        factorization: one of `factorizations.FACTORIZATIONS`.
    """
    chosen = factorization_of(construction, factorization)
    over_matrices = sum(chosen.count(sizes, ranks) for sizes in _modes_over_matrices(construction, geometry))
    return int(over_matrices) * tensor_grid(construction, geometry)[1]


def isorank(
    construction: str, geometry: Geometry, rank: int = 4, cap: bool = False, factorization: str = "tucker"
) -> tuple[int, ...]:
    """The same number for every rank.

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        rank: the number.
        cap: whether a rank stops at its limit, which allows the same updates with fewer parameters. The paper counts
            without a cap: the projection mode has rank 4 although its size is 3.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Returns:
        The ranks, in the order of `rank_limits`.

    Raises:
        TensLoRAError: for a rank below 1 or above min(d_in, d_out).
    """
    limit = min(geometry.d_in, geometry.d_out)
    if not 1 <= rank <= limit:
        raise TensLoRAError(f"rank={rank}: must be from 1 to {limit}, the width of a projection")
    return tuple(min(rank, n) if cap else rank for n in rank_limits(construction, geometry, factorization).values())


def explicit(
    construction: str, geometry: Geometry, ranks: Sequence[int] | None, factorization: str = "tucker"
) -> tuple[int, ...]:
    """The ranks as given, after checking that there is one for each name in `rank_limits`, from 1 to its limit.

    Args:
        construction: the construction's name. lora takes a single rank.
        geometry: the backbone's dimensions.
        ranks: the ranks, in the order of `rank_limits`.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Returns:
        The ranks.

    Raises:
        TensLoRAError: for ranks that do not fit; the message names the first one at fault.
    """
    return _within(rank_limits(construction, geometry, factorization), ranks, f"tensor_mode {construction}")


def weight_ranks(shape: Sequence[int], ranks: int | Sequence[int], factorization: str = "tucker") -> tuple[int, ...]:
    """The ranks of an update of any weight tensor.

    >>> weight_ranks((64, 32, 3, 3), 8), weight_ranks((64, 32, 3, 3), [16, 8, 2, 2])
    ((8, 8, 3, 3), (16, 8, 2, 2))

    Args:
        shape: the weight's shape.
        ranks: the ranks, in the order of `Factorization.rank_limits`; or one number for all of them, which stops at a
            rank's limit.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Returns:
        The ranks.

    Raises:
        TensLoRAError: for ranks that do not fit the shape.
    """
    require_one_of("factorization", factorization, FACTORIZATIONS)
    limits = FACTORIZATIONS[factorization].rank_limits(weight_modes(shape))
    if isinstance(ranks, Integral) and not isinstance(ranks, bool):
        ranks = [min(int(ranks), limit) for limit in limits.values()]
    return _within(limits, ranks, f"factorization {factorization}")


def weight_parameter_count(shape: Sequence[int], ranks: int | Sequence[int], factorization: str = "tucker") -> int:
    """The exact number of parameters of an update of any weight tensor.

    >>> weight_parameter_count((64, 32, 3, 3), 8)  # 64 * 8 + 32 * 8 + 3 * 3 + 3 * 3 + 8 * 8 * 3 * 3
    1362

    Args:
        shape: the weight's shape.
        ranks: as in `weight_ranks`.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Raises:
        TensLoRAError: for ranks that do not fit the shape.
    """
    resolved = weight_ranks(shape, ranks, factorization)
    return int(FACTORIZATIONS[factorization].count(weight_modes(shape), resolved))


def _within(limits: Mapping[str, int], ranks: int | Sequence[int] | None, owner: str) -> tuple[int, ...]:
    wanted = ", ".join(f"{name} 1..{limit}" for name, limit in limits.items())
    given = list(ranks) if isinstance(ranks, Sequence) else ranks
    if not isinstance(given, list | None):
        raise TensLoRAError(f"ranks={given!r}: must be a list of whole numbers ({wanted})")
    if given is None or len(given) != len(limits):
        integers = "1 integer" if len(limits) == 1 else f"{len(limits)} integers"
        raise TensLoRAError(f"ranks={given}: {owner} needs {integers} ({wanted})")
    for (name, limit), rank in zip(limits.items(), given, strict=True):
        if isinstance(rank, bool) or not isinstance(rank, Integral):
            raise TensLoRAError(f"ranks={given}: the rank {rank!r} of {name} must be a whole number ({wanted})")
        if not 1 <= rank <= limit:
            raise TensLoRAError(f"ranks={given}: the rank {rank} of {name} must be from 1 to {limit} ({wanted})")
    return tuple(map(int, given))


def isoparameters(
    construction: str,
    geometry: Geometry,
    rank: int = 4,
    rule: str = "saturate",
    tolerance: float = 0.01,
    factorization: str = "tucker",
    scale: float = 1.0,
) -> tuple[int, ...]:
    """Ranks whose parameter count is as near to LoRA's as the rules below allow.

    >>> isoparameters("qkv_depth", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    (60, 60, 3, 12)

    The factorization provides real-valued ranks r(t), which grow with a single number t; t is chosen so that their
    count equals the budget exactly. CP's only rank is t, and a tensor train's ranks are all t, up to their limits.
    Tucker follows `rule`:

    - saturate: head, projection, depth and site have full rank; d_in and d_out (or d_head) share the rank t.
    - uniform: every mode has rank t, up to its size.
    - proportional: every mode is compressed alike, r_i = t n_i / max n.

    Then the ranks become integers. Ranks that are at their limits in r(t) stay there; the others may differ from r(t)
    by about a third (a tensor train's by at most two). No rank exceeds what the other ranks can use. (For Tucker that
    is the product of the other ranks, as the tensor's multilinear rank cannot be higher.) Of the integer ranks whose
    count is within `tolerance` of the budget, the function takes those nearest to r(t), by the sum of squared log
    ratios. If no count is within the tolerance, it takes the ranks whose count is nearest to the budget.

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        rank: the LoRA rank whose parameter count is matched.
        rule: for Tucker, see above.
        tolerance: how far the count may be from the budget, as a share of the budget.
        factorization: one of `factorizations.FACTORIZATIONS`.
        scale: multiplies the budget.

    Returns:
        The ranks, in the order of `rank_limits`.

    Raises:
        TensLoRAError: for a rank below 1 or above min(d_in, d_out).
    """
    lora_ranks = isorank("lora", geometry, rank)
    if construction == "lora":
        return lora_ranks
    budget = scale * parameter_count("lora", geometry, lora_ranks)
    search = _Search(construction, geometry, factorization, budget)
    ideal = search.ideal(rule)

    def distances(ranks: tuple[int, ...]) -> tuple[float, float]:
        # Two distances: of the count from the tolerated interval (rounded, so that equal distances tie), and of the
        # ranks from the ideal ones.
        excess = abs(search.count(ranks) / search.budget - 1) - tolerance
        return max(round(excess, 9), 0.0), sum(math.log(r / s) ** 2 for r, s in zip(ranks, ideal, strict=True))

    return min(search.candidates(ideal, tolerance), key=distances)


_isoparameters = lru_cache(maxsize=4096)(isoparameters)  # the jobs of a sweep ask for the same ranks again and again


class _Search:
    """The search of `isoparameters`. Counts and the budget are of one layer, or of all layers if depth is stacked."""

    def __init__(self, construction: str, geometry: Geometry, factorization: str, budget: float) -> None:
        self.factorization = factorization_of(construction, factorization)
        self.all_modes = _modes_over_matrices(construction, geometry)
        self.widest = max(self.all_modes, key=lambda sizes: math.prod(sizes.values()))
        self.limits = list(rank_limits(construction, geometry, factorization).values())
        self.budget = budget / tensor_grid(construction, geometry)[1]

    def count(self, ranks: Sequence[float]) -> float:
        return sum(self.factorization.count(sizes, ranks) for sizes in self.all_modes)

    def ideal(self, rule: str) -> list[float]:
        # Bisection; 60 halvings reach the last bit of a double.
        low, high = 1.0, float(max(self.limits))
        for _ in range(60):
            middle = (low + high) / 2
            few = self.count(self.factorization.ideal(self.widest, rule, middle)) < self.budget
            low, high = (middle, high) if few else (low, middle)
        return self.factorization.ideal(self.widest, rule, low)

    def candidates(self, ideal: Sequence[float], tolerance: float) -> Iterator[tuple[int, ...]]:
        # Tries all combinations of all ranks but the first. Given the other ranks, the count is affine in the first
        # rank, so the best first rank follows from the bounds of the tolerated interval.
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
        # The rounded ideal ranks are always a candidate, because on a very narrow backbone no other may be admissible.
        yield tuple(min(n, max(1, round(r))) for n, r in zip(self.limits, ideal, strict=True))


@dataclass(frozen=True)
class RankStrategy:
    """How the ranks of a tensor are chosen; `resolve` turns the strategy into integers.

    Args:
        name: "isorank", "isoparameters" or "explicit", after the functions of this module.
        rank: for isorank, the rank; for isoparameters, the LoRA rank whose parameter count is matched.
        ranks: for explicit, the ranks in the order of `rank_limits`.
        cap: for isorank, whether a rank stops at its mode's size.
        rule: for isoparameters with Tucker, "saturate", "uniform" or "proportional".
        tolerance: for isoparameters, how far the count may be from the budget, as a share of the budget.
        scale: for isoparameters, multiplies the budget.

    Raises:
        TensLoRAError: for a value that is out of range; the message names the field, its value and what is valid.
    """

    name: str = "isoparameters"
    rank: int = 4
    ranks: tuple[int, ...] | None = None
    cap: bool = False
    rule: str = "saturate"
    tolerance: float = 0.01
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_one_of("name", self.name, STRATEGIES)
        require_one_of("rule", self.rule, RULES)
        for name in ("name", "rule"):  # an enumeration's or numpy's text becomes Python's, as numbers do
            object.__setattr__(self, name, str.__str__(getattr(self, name)))
        require_numbers(self, "rank", whole=True)
        require_numbers(self, "tolerance", "scale")
        if to_list := getattr(self.ranks, "tolist", None):  # of an array or a tensor
            object.__setattr__(self, "ranks", to_list())
        if self.ranks is not None and (isinstance(self.ranks, str) or not isinstance(self.ranks, Sequence)):
            raise TensLoRAError(f"ranks={self.ranks!r}: must be one rank for each mode, as in (4, 4, 3), or None")
        if self.ranks is not None:  # numpy's numbers become Python's, because JSON cannot hold them
            own = (
                int(rank) if isinstance(rank, Integral) and not isinstance(rank, bool) else rank for rank in self.ranks
            )
            object.__setattr__(self, "ranks", tuple(own))
        if not isinstance(self.cap, bool):
            raise TensLoRAError(f"cap={self.cap!r}: must be True or False")
        if self.rank < 1:
            raise TensLoRAError(f"rank={self.rank}: must be at least 1")
        if not 0 <= self.tolerance < 1:
            raise TensLoRAError(f"tolerance={self.tolerance}: must be at least 0 and below 1")
        if not 0 < self.scale <= LARGEST_SCALE:
            raise TensLoRAError(f"scale={self.scale}: must be above 0 and at most {LARGEST_SCALE}")

    def resolve(self, construction: str, geometry: Geometry, factorization: str = "tucker") -> tuple[int, ...]:
        """The ranks of the construction's tensors.

        Args:
            construction: the construction's name.
            geometry: the backbone's dimensions.
            factorization: one of `factorizations.FACTORIZATIONS`.

        Returns:
            One integer for each name in `rank_limits`.

        Raises:
            TensLoRAError: for ranks that do not fit the construction or the geometry.
        """
        if self.name == "isorank":
            return isorank(construction, geometry, self.rank, self.cap, factorization)
        if self.name == "explicit":
            return explicit(construction, geometry, self.ranks, factorization)
        return _isoparameters(construction, geometry, self.rank, self.rule, self.tolerance, factorization, self.scale)
