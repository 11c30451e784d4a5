"""The paired differences of rows' scores over their common seeds, and the tests that a comparison of rows is judged by.

The tests are SciPy's. Holm's correction, which SciPy does not have, is here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

LEVEL = 0.05
"""The probability of a wrong verdict that the tests accept."""

POWER = 0.8
"""The probability of seeing a difference, for which `Difference.detectable` is the smallest difference."""

_FLIPS = 9999
"""The most sign flips of the permutation test: 13 seeds have 8,192 in all."""

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """The paired difference of two rows' scores over their common seeds.

    All but the mean is None if there is one seed. If all differences are equal, there is no spread, and only the
    permutation test has a p-value.

    Args:
        mean: the mean of the differences.
        low: the lower end of the mean's 95 % confidence interval, by Student's t with seeds - 1 degrees of freedom.
        high: the upper end of that interval.
        p: the p-value of the two-sided paired t-test of a mean of zero, not corrected for the number of comparisons.
        seeds: the number of common seeds.
        holm_p: `p` after Holm's correction for all comparisons with the same row.
        permutation_p: the p-value of the two-sided permutation test: the share of all ways to flip the differences'
            signs that give a mean at least as far from zero. With more than 13 seeds, 9,999 random ways are tried.
        detectable: the smallest true difference that a paired t-test at the level of 5 % finds with a probability of
            80 %, if the differences have the standard deviation that these have. Not corrected for the number of
            comparisons.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    holm_p: float | None = None
    permutation_p: float | None = None
    detectable: float | None = None

    @property
    def above(self) -> bool | None:
        """Whether the first row scores higher: True or False if Holm's p-value is at most 5 %, otherwise None."""
        return self.mean > 0 if self.holm_p is not None and self.holm_p <= LEVEL else None

    @property
    def smallest_permutation_p(self) -> float | None:
        """The smallest p-value that the permutation test can have with so many seeds: 0.0625 with five."""
        return None if self.permutation_p is None else 2 / min(2**self.seeds, _FLIPS + 1)

    def times(self, factor: float) -> Difference:
        """This difference in a unit that is smaller by a factor.

        Args:
            factor: a positive number, such as 100 to turn fractions into points.
        """
        low, high, detectable = (
            None if value is None else factor * value for value in (self.low, self.high, self.detectable)
        )
        return replace(self, mean=factor * self.mean, low=low, high=high, detectable=detectable)


def paired_differences(
    scores: Mapping[_Key, Mapping[int, float]], reference: Mapping[int, float]
) -> dict[_Key, Difference | None]:
    """How much higher the scores of some rows are than those of one other row.

    Args:
        scores: the scores of each row, by seed.
        reference: the scores of the other row, by seed.

    Returns:
        For each row, its scores minus `reference`; None for a row that has no seed in common with it. Holm's correction
        is for all of these rows.
    """
    differences = {key: _paired_difference(of_row, reference) for key, of_row in scores.items()}
    known = {key: one.p for key, one in differences.items() if one is not None and one.p is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    return {key: one if one is None else replace(one, holm_p=corrected.get(key)) for key, one in differences.items()}


def holm(p_values: list[float]) -> list[float]:
    """The p-values of several tests after Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979).

    If each test with a corrected p-value of at most 5 % counts as a discovery, the probability of any false discovery
    is at most 5 %, however the tests depend on each other.

    >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Args:
        p_values: the p-values of all the tests.

    Returns:
        The corrected p-values, in the same order.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = largest
    return corrected


def _paired_difference(scores: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The difference of one row, not yet corrected by Holm."""
    seeds = sorted(scores.keys() & reference.keys())
    if not seeds:
        return None
    differences = [scores[seed] - reference[seed] for seed in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) == 1:
        return Difference(mean, None, None, None, 1)
    import numpy as np  # imported here, because scipy takes a second and every command imports this module
    from scipy import special, stats

    flipped = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=_FLIPS, vectorized=True, rng=0
    )
    permutation_p = float(flipped.pvalue)
    standard_error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(seeds) - 1) / len(seeds))
    if standard_error <= 1e-12 * max(map(abs, differences)):  # all differences are equal but for rounding
        return Difference(mean, None, None, None, len(seeds), permutation_p=permutation_p)
    critical = float(stats.t.ppf(1 - LEVEL / 2, len(seeds) - 1))
    # Of the noncentral t distribution. Its tail on the wrong side is left out: it is less than a millionth.
    noncentrality = float(special.nctdtrinc(len(seeds) - 1, 1 - POWER, critical))
    return Difference(
        mean,
        mean - critical * standard_error,
        mean + critical * standard_error,
        float(stats.ttest_rel([scores[s] for s in seeds], [reference[s] for s in seeds]).pvalue),
        len(seeds),
        permutation_p=permutation_p,
        detectable=noncentrality * standard_error,
    )
