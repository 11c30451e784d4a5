"""Paired differences and their tests against SciPy, statsmodels, and counting all possibilities."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Mapping

import pytest
from scipy import stats

from tenslora.harness.results.statistics import Difference, holm, paired_differences

SCORES = {0: 0.713, 1: 0.702, 2: 0.741, 3: 0.698, 4: 0.722}
REFERENCE = {0: 0.701, 1: 0.699, 2: 0.712, 3: 0.705, 4: 0.7}


def difference_of(scores: Mapping[int, float], reference: Mapping[int, float] = REFERENCE) -> Difference | None:
    """The difference of one row alone."""
    return paired_differences({"row": scores}, reference)["row"]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_mean_interval_and_p_are_scipys(seeds: int) -> None:
    scores, reference = ({seed: of[seed] for seed in range(seeds)} for of in (SCORES, REFERENCE))
    difference = difference_of(scores, reference)
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
    expected = difference_of(SCORES)
    reordered = dict(reversed(SCORES.items()))
    assert difference_of({**reordered, 7: 0.0}, {**REFERENCE, 8: 1.0}) == expected
    assert difference_of({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("scores", "reference", "permutation_p"),
    [
        ({0: 0.8}, {0: 0.7}, None),
        ({0: 0.8, 1: 0.7}, {0: 0.7, 1: 0.6}, 0.5),
        ({0: 0.3, 1: 0.3}, {0: 0.3, 1: 0.3}, 1.0),
    ],
    ids=["one seed", "equal differences", "no difference"],
)
def test_without_spread_there_is_no_interval(
    scores: dict[int, float], reference: dict[int, float], permutation_p: float | None
) -> None:
    difference = difference_of(scores, reference)
    assert difference is not None
    assert math.isclose(difference.mean, scores[0] - reference[0], abs_tol=1e-12)
    assert (difference.low, difference.high, difference.p, difference.holm_p) == (None, None, None, None)
    assert (difference.above, difference.detectable) == (None, None)
    assert difference.permutation_p == permutation_p


def test_a_single_row_is_above_where_the_whole_interval_is() -> None:
    # The differences as they are have an interval around 0.
    for shift, above in ((-0.1, False), (0.0, None), (0.1, True)):
        difference = difference_of({seed: score + shift for seed, score in SCORES.items()})
        assert difference is not None and difference.above is above


def test_rows_are_corrected_together() -> None:
    # Alone, a row with this shift has p = 0.0296: above the reference. One of three rows like it is not: 3 p > 0.05.
    scores = {seed: score + 0.01 for seed, score in SCORES.items()}
    alone = difference_of(scores)
    assert alone is not None and alone.p is not None
    assert 0.025 < alone.p < 0.05 and alone.holm_p == alone.p and alone.above
    one_seed = {0: 0.9}
    several = paired_differences({"a": scores, "b": scores, "c": scores, "one seed": one_seed, "none": {}}, REFERENCE)
    for name in "abc":
        difference = several[name]
        assert difference is not None and difference.p == alone.p
        assert difference.holm_p == pytest.approx(3 * alone.p)
        assert difference.above is None
    assert several["none"] is None
    single = several["one seed"]
    assert single is not None and (single.seeds, single.p, single.above) == (1, None, None)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # by hand, as R's p.adjust(..., "holm") does
        ([0.05, 0.6, 0.001, 0.6, 0.04], [0.16, 1.0, 0.005, 1.0, 0.16]),  # likewise
    ],
)
def test_holm_corrects_step_by_step(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected)


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    # A hypothesis is rejected if every intersection with it is, by Bonferroni (Marcus, Peritz and Gabriel, 1976).
    draw = random.Random(0)
    for _ in range(5):
        p_values = [draw.random() ** 3 for _ in range(6)]
        subsets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size)]
        local = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
        assert holm(p_values) == pytest.approx([max(p for s, p in local.items() if i in s) for i in range(6)])


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_permutation_test_counts_all_flips_of_signs(seeds: int) -> None:
    draw = random.Random(seeds)
    points = [draw.randint(-2, 9) for _ in range(seeds)]
    difference = difference_of(dict(enumerate(map(float, points))), dict.fromkeys(range(seeds), 0.0))
    flipped = [abs(sum(s * d for s, d in zip(signs, points, strict=True))) for signs in
               itertools.product((1, -1), repeat=seeds)]  # fmt: skip
    assert difference is not None
    assert difference.permutation_p == sum(total >= abs(sum(points)) for total in flipped) / 2**seeds
    assert difference.smallest_permutation_p == 2 / 2**seeds


def test_five_seeds_allow_a_permutation_p_of_one_sixteenth_at_least() -> None:
    difference = difference_of({seed: score + 0.1 for seed, score in SCORES.items()})
    assert difference is not None
    assert (difference.permutation_p, difference.smallest_permutation_p) == (0.0625, 0.0625)


def test_with_many_seeds_random_flips_stand_for_all_and_are_always_the_same() -> None:
    scores = {seed: 0.5 + 0.01 * math.sin(seed) for seed in range(20)}
    differences = [difference_of(scores, dict.fromkeys(range(20), 0.497)) for _ in range(2)]
    assert differences[0] == differences[1]
    assert differences[0] is not None and differences[0].permutation_p is not None and differences[0].p is not None
    assert differences[0].permutation_p == pytest.approx(differences[0].p, rel=0.1)
    assert differences[0].smallest_permutation_p == 2e-4


# statsmodels 0.15: TTestPower().solve_power(nobs=seeds, alpha=0.05, power=0.8), in standard deviations.
@pytest.mark.parametrize(("seeds", "effect"), [(2, 11.5498897), (3, 3.2640436), (4, 2.1279493), (5, 1.6819971)])
def test_the_detectable_difference_is_statsmodels(seeds: int, effect: float) -> None:
    scores = {seed: SCORES[seed] for seed in range(seeds)}
    difference = difference_of(scores)
    deviation = statistics.stdev(SCORES[seed] - REFERENCE[seed] for seed in range(seeds))
    assert difference is not None
    assert difference.detectable == pytest.approx(effect * deviation, rel=1e-5)


def test_points_are_a_hundred_times_fractions_and_p_values_stay() -> None:
    fraction = difference_of(SCORES)
    assert fraction is not None and fraction.detectable is not None
    points = fraction.times(100)
    assert points.mean == pytest.approx(1.18)
    assert points.detectable == pytest.approx(100 * fraction.detectable)
    assert (points.p, points.holm_p, points.permutation_p) == (fraction.p, fraction.holm_p, fraction.permutation_p)
