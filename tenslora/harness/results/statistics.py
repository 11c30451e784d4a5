"""The paired difference of two rows' scores over their common seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

TEST = "two-sided paired t-test"


@dataclass(frozen=True)
class Difference:
    """The paired difference of two rows' scores over their common seeds.

    Interval and p-value are None if there is one seed, or if all differences are equal, because there is no spread.

    Args:
        mean: the mean of the differences.
        low: the lower end of the mean's 95 % confidence interval, by Student's t with seeds - 1 degrees of freedom.
        high: the upper end of that interval.
        p: the p-value of the two-sided paired t-test of a mean of zero, not corrected for the number of comparisons.
        seeds: the number of common seeds.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int

    @property
    def above(self) -> bool | None:
        """Whether the first row scores higher: True if all of the interval is above 0, False if none is, else None."""
        if self.low is None or self.high is None:
            return None
        return True if self.low > 0 else False if self.high <= 0 else None

    def times(self, factor: float) -> Difference:
        """This difference in a unit that is smaller by a factor.

        Args:
            factor: a positive number, such as 100 to turn fractions into points.
        """
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return replace(self, mean=factor * self.mean, low=low, high=high)


def paired_difference(scores: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """How much higher the scores of one row are than those of another.

    Args:
        scores: the scores of the one row, by seed.
        reference: the scores of the other row, by seed.

    Returns:
        `scores` minus `reference`; None if the two rows have no common seed.
    """
    seeds = sorted(scores.keys() & reference.keys())
    if not seeds:
        return None
    differences = [scores[seed] - reference[seed] for seed in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) == 1:
        return Difference(mean, None, None, None, 1)
    from scipy import stats  # imported here, because scipy takes a second and every command imports this module

    standard_error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1) / len(seeds))
    if standard_error <= 1e-12 * max(map(abs, differences)):  # all differences are equal but for rounding
        return Difference(mean, None, None, None, len(seeds))
    half_width = float(stats.t.ppf(0.975, len(seeds) - 1)) * standard_error
    p = float(stats.ttest_rel([scores[s] for s in seeds], [reference[s] for s in seeds]).pvalue)
    return Difference(mean, mean - half_width, mean + half_width, p, len(seeds))
