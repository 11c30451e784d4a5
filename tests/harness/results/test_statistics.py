"""Paired differences against SciPy's paired t-test."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from tenslora.harness.results.statistics import paired_difference

SCORES = {0: 0.713, 1: 0.702, 2: 0.741, 3: 0.698, 4: 0.722}
REFERENCE = {0: 0.701, 1: 0.699, 2: 0.712, 3: 0.705, 4: 0.7}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_mean_interval_and_p_are_scipys(seeds: int) -> None:
    scores, reference = ({seed: of[seed] for seed in range(seeds)} for of in (SCORES, REFERENCE))
    difference = paired_difference(scores, reference)
    oracle = stats.ttest_rel(list(scores.values()), list(reference.values()))
    interval = oracle.confidence_interval(0.95)
    assert difference is not None
    assert difference.low is not None and difference.high is not None and difference.p is not None
    assert math.isclose(difference.low, interval.low, rel_tol=1e-9)
    assert math.isclose(difference.high, interval.high, rel_tol=1e-9)
    assert math.isclose(difference.p, oracle.pvalue, rel_tol=1e-9)
    assert math.isclose(difference.mean, (interval.low + interval.high) / 2, rel_tol=1e-9)
    assert difference.seeds == seeds


def test_only_seeds_that_both_have_count_and_they_are_paired_by_seed() -> None:
    expected = paired_difference(SCORES, REFERENCE)
    reordered = dict(reversed(SCORES.items()))
    assert paired_difference({**reordered, 7: 0.0}, {**REFERENCE, 8: 1.0}) == expected
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("scores", "reference"),
    [({0: 0.8}, {0: 0.7}), ({0: 0.8, 1: 0.7}, {0: 0.7, 1: 0.6}), ({0: 0.3, 1: 0.3}, {0: 0.3, 1: 0.3})],
    ids=["one seed", "equal differences", "no difference"],
)
def test_without_spread_there_is_no_interval(scores: dict[int, float], reference: dict[int, float]) -> None:
    difference = paired_difference(scores, reference)
    assert difference is not None
    assert math.isclose(difference.mean, scores[0] - reference[0], abs_tol=1e-12)
    assert (difference.low, difference.high, difference.p, difference.above) == (None, None, None, None)


def test_above_asks_for_the_whole_interval() -> None:
    # The differences as they are have an interval around 0.
    for shift, above in ((-0.1, False), (0.0, None), (0.1, True)):
        difference = paired_difference({seed: score + shift for seed, score in SCORES.items()}, REFERENCE)
        assert difference is not None and difference.above is above
