"""How two rows differ, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TEST = "two-sided paired t-test"


@dataclass(frozen=True)
class Difference:
    """The paired difference of two rows' scores over the seeds that both have.

    mean: of the differences. low, high: its 95 % confidence interval by Student's t with seeds - 1 degrees of
    freedom. p: of the two-sided paired t-test that it is zero. With one seed, or where all differences are equal,
    there is no spread to judge by, and these three are None. Not corrected for the number of comparisons.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int

    @property
    def above(self) -> bool | None:
        """Whether the first is better: True if the whole interval is above 0, False if none of it, else None."""
        if self.low is None or self.high is None:
            return None
        return True if self.low > 0 else False if self.high <= 0 else None


def paired_difference(scores: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """`scores` minus `reference`, both by seed; None if they have no seed in common."""
    seeds = sorted(scores.keys() & reference.keys())
    if not seeds:
        return None
    differences = [scores[seed] - reference[seed] for seed in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) == 1:
        return Difference(mean, None, None, None, 1)
    from scipy import stats

    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1) / len(seeds))
    if spread <= 1e-12 * max(map(abs, differences)):  # equal but for rounding
        return Difference(mean, None, None, None, len(seeds))
    reach = float(stats.t.ppf(0.975, len(seeds) - 1)) * spread
    p = float(stats.ttest_rel([scores[s] for s in seeds], [reference[s] for s in seeds]).pvalue)
    return Difference(mean, mean - reach, mean + reach, p, len(seeds))
