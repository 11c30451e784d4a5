"""Rank strategies and exact parameter counts. Nothing here needs torch.

Counts are those of the adapter alone, summed over its tensors. LoRA at rank r has r (d_in + d_out) parameters
per projection and layer; a Tucker tensor with modes n_i and ranks r_i has sum n_i r_i + prod r_i.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tenslora.constructions import DEPTH, HEAD, PROJECTION, Geometry, modes, tensor_grid
from tenslora.errors import TensLoRAError

STRATEGIES = ("isorank", "isoparameters", "explicit")


def rank_names(construction: str, geometry: Geometry) -> tuple[str, ...]:
    """What each rank of a construction belongs to: one shared rank for lora, else one per mode."""
    return ("rank",) if construction == "lora" else tuple(modes(construction, geometry))


def parameter_count(construction: str, geometry: Geometry, ranks: Sequence[int]) -> int:
    """Exact number of adapter parameters over all tensors.

    >>> vit_base = Geometry(d_in=768, heads=12, d_head=64, layers=12)
    >>> parameter_count("lora", vit_base, [4]), parameter_count("qkv_depth", vit_base, [4, 4, 3, 4])
    (221184, 6460)
    """
    return math.prod(tensor_grid(construction, geometry)) * _per_tensor(construction, geometry, ranks)


def _per_tensor(construction: str, geometry: Geometry, ranks: Sequence[float]) -> int:
    sizes = modes(construction, geometry).values()
    if construction == "lora":
        return ranks[0] * sum(sizes)  # type: ignore[return-value]  # a float only inside the search below
    return sum(n * r for n, r in zip(sizes, ranks, strict=True)) + math.prod(ranks)  # type: ignore[return-value]


def isorank(construction: str, geometry: Geometry, rank: int = 4, cap: bool = False) -> tuple[int, ...]:
    """The same rank for every mode.

    The paper's counts take rank 4 on the projection mode too, whose size is 3: that is `cap=False`. With
    `cap=True` a rank stops at its mode's size, which spans the same updates with fewer parameters.

    Raises TensLoRAError for a rank below 1 or above min(d_in, d_out).
    """
    limit = min(geometry.d_in, geometry.d_out)
    if not 1 <= rank <= limit:
        raise TensLoRAError(f"rank_strategy.rank={rank}: must be from 1 to {limit}, the width of a projection")
    if construction == "lora":
        return (rank,)
    return tuple(min(rank, n) if cap else rank for n in modes(construction, geometry).values())


def explicit(construction: str, geometry: Geometry, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """The ranks as given, checked: one per mode in the order of `modes`, each from 1 to the mode's size.

    lora takes a single rank. Raises TensLoRAError that names the mode at fault.
    """
    names = rank_names(construction, geometry)
    if construction == "lora":
        limits = [min(geometry.d_in, geometry.d_out)]
    else:
        limits = list(modes(construction, geometry).values())
    wanted = ", ".join(f"{name} 1..{limit}" for name, limit in zip(names, limits, strict=True))
    given = None if ranks is None else list(ranks)
    if given is None or len(given) != len(names):
        raise TensLoRAError(
            f"rank_strategy.ranks={given}: tensor_mode {construction} needs {len(names)} integers ({wanted})"
        )
    for name, rank, limit in zip(names, given, limits, strict=True):
        if not 1 <= rank <= limit:
            raise TensLoRAError(
                f"rank_strategy.ranks={given}: the rank {rank} of {name} must be from 1 to {limit} ({wanted})"
            )
    return tuple(given)


# A rule turns one real number t >= 1 into the ideal, real-valued rank of each mode; it must not fall with t.
Rule = Callable[[Mapping[str, int], float], list[float]]


def _saturate(sizes: Mapping[str, int], t: float) -> list[float]:
    # The structure axes have so few slices that compressing them saves next to nothing, and they are what the
    # construction is about: keep them whole and spend the budget evenly on the two wide modes.
    return [float(n) if name in (HEAD, PROJECTION, DEPTH) else min(t, n) for name, n in sizes.items()]


def _uniform(sizes: Mapping[str, int], t: float) -> list[float]:
    return [min(t, n) for n in sizes.values()]


def _proportional(sizes: Mapping[str, int], t: float) -> list[float]:
    # t runs up to the largest mode in every rule, so that t / max(n) is the common compression.
    return [max(1.0, n * t / max(sizes.values())) for n in sizes.values()]


RULES: Mapping[str, Rule] = MappingProxyType(
    {"saturate": _saturate, "uniform": _uniform, "proportional": _proportional}
)
"""How isoparameters shares its budget: see `isoparameters`."""


def isoparameters(
    construction: str,
    geometry: Geometry,
    rank: int = 4,
    rule: str = "saturate",
    tolerance: float = 0.01,
) -> tuple[int, ...]:
    """Ranks that give as many parameters as LoRA at `rank`, as near as sensible integers allow.

    The rule draws a one-parameter family of real-valued ranks r(t), and t is chosen so that the count equals
    the budget exactly:

    - saturate: head, projection and depth modes keep full rank, d_in and d_out (or d_head) share the rank t.
      For qkv_depth on ViT-B/16 that is [60, 60, 3, 12].
    - uniform: every mode has rank t, capped at its size (isorank, with the rank that meets the budget).
    - proportional: every mode is compressed alike, r_i = t n_i / max n.

    Of the integer ranks whose count is within `tolerance` (relative) of the budget, the one nearest to r(t) is
    taken: least sum of squared log ratios. If there is none, the count nearest to the budget decides. Modes
    that the rule keeps at full rank stay there, the others move by at most a third, and no rank exceeds the
    product of the others (more could not raise the tensor's multilinear rank).

    Raises TensLoRAError for an unknown rule, or a rank or tolerance out of range.
    """
    if rule not in RULES:
        raise TensLoRAError(f"rank_strategy.rule={rule}: must be one of {', '.join(RULES)}")
    if not 0 <= tolerance < 1:
        raise TensLoRAError(f"rank_strategy.tolerance={tolerance}: must be from 0 to below 1")
    lora_ranks = isorank("lora", geometry, rank)
    if construction == "lora":
        return lora_ranks
    budget = parameter_count("lora", geometry, lora_ranks) / math.prod(tensor_grid(construction, geometry))
    sizes = modes(construction, geometry)
    ideal = _ideal(lambda t: RULES[rule](sizes, t), lambda r: _per_tensor(construction, geometry, r), sizes, budget)

    def distance(ranks: Sequence[int]) -> float:
        return sum(math.log(r / s) ** 2 for r, s in zip(ranks, ideal, strict=True))

    best: tuple[tuple[float, float], tuple[int, ...]] | None = None
    for ranks in _integer_ranks(list(sizes.values()), ideal, budget, tolerance):
        excess = abs(_per_tensor(construction, geometry, ranks) / budget - 1)
        key = (max(round(excess - tolerance, 9), 0.0), distance(ranks))  # rounded: equal misses are to tie
        if best is None or key < best[0]:
            best = key, ranks
    assert best is not None  # the ideal's own neighbourhood always yields candidates
    return best[1]


def _ideal(
    rule: Callable[[float], list[float]],
    count: Callable[[Sequence[float]], float],
    sizes: Mapping[str, int],
    budget: float,
) -> list[float]:
    low, high = 1.0, float(max(sizes.values()))
    for _ in range(60):  # bisection to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if count(rule(middle)) < budget else (low, middle)
    return rule(low)


def _integer_ranks(
    sizes: Sequence[int], ideal: Sequence[float], budget: float, tolerance: float
) -> Iterator[tuple[int, ...]]:
    # d_in is never listed: given the other ranks the count is affine in it, a + b r, so the two bounds of the
    # tolerated interval give all its candidates at once.
    def window(size: int, r: float) -> range:
        if r == size:
            return range(size, size + 1)
        return range(max(1, math.ceil(r * 3 / 4)), min(size, max(2, math.floor(r * 4 / 3))) + 1)

    first = window(sizes[0], ideal[0])
    for rest in itertools.product(*map(window, sizes[1:], ideal[1:])):
        fixed = sum(n * r for n, r in zip(sizes[1:], rest, strict=True))
        slope = sizes[0] + math.prod(rest)
        low = math.ceil((budget * (1 - tolerance) - fixed) / slope)
        high = math.floor((budget * (1 + tolerance) - fixed) / slope)
        nearest = round((budget - fixed) / slope)
        inside = min(max(round(ideal[0]), low), high) if low <= high else nearest
        ranks = (min(max(inside, first[0]), first[-1]), *rest)
        if all(r * r <= math.prod(ranks) for r in ranks):
            yield ranks
    # Where every candidate breaks the multilinear bound (a backbone of a few units), round the ideal point.
    yield tuple(min(n, max(1, round(r))) for n, r in zip(sizes, ideal, strict=True))


@dataclass(frozen=True)
class RankStrategy:
    """How the ranks of a tensor are chosen; `resolve` makes them integers.

    name: isorank, isoparameters or explicit. rank: the rank of isorank, and the LoRA rank whose count
    isoparameters matches. ranks: explicit's ranks. cap: see `isorank`. rule, tolerance: see `isoparameters`.
    """

    name: str = "isorank"
    rank: int = 4
    ranks: tuple[int, ...] | None = None
    cap: bool = False
    rule: str = "saturate"
    tolerance: float = 0.01

    def resolve(self, construction: str, geometry: Geometry) -> tuple[int, ...]:
        """Integer ranks, one per name in `rank_names`. Raises TensLoRAError for anything out of range."""
        if self.name == "isorank":
            return isorank(construction, geometry, self.rank, self.cap)
        if self.name == "isoparameters":
            return isoparameters(construction, geometry, self.rank, self.rule, self.tolerance)
        if self.name == "explicit":
            return explicit(construction, geometry, self.ranks)
        raise TensLoRAError(f"rank_strategy={self.name}: must be one of {', '.join(STRATEGIES)}")
