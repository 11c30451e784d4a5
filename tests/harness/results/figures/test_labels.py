"""Placing labels: by least squares on a line, and clear of everything in the plane."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize

from tenslora.harness.results.figures.labels import leader_of, overlap, place_labels, spread


@pytest.mark.parametrize("random_seed", range(5))
def test_spread_is_the_least_squares_solution(random_seed: int) -> None:
    draw = np.random.default_rng(random_seed)
    wanted = draw.uniform(0, 10, 6)
    positions = np.array(spread(wanted.tolist(), 1.5, (-100.0, 100.0)))
    order = np.argsort(wanted)
    oracle = minimize(
        lambda x: float(((x - wanted[order]) ** 2).sum()),
        np.arange(6) * 2.0,
        constraints=[{"type": "ineq", "fun": lambda x: np.diff(x) - 1.5}],
        tol=1e-12,
    )
    assert positions[order] == pytest.approx(oracle.x, abs=1e-4)


def test_spread_keeps_to_its_bounds_and_shares_too_little_room() -> None:
    assert spread([9.5, 9.6, 1.0], 1.0, (0.0, 10.0)) == pytest.approx([9.0, 10.0, 1.0])
    assert spread([5.0, 5.0, 5.0, 5.0], 10.0, (0.0, 6.0)) == pytest.approx([0.0, 2.0, 4.0, 6.0])


@pytest.mark.parametrize("random_seed", range(5))
def test_labels_lie_in_the_room_and_over_nothing(random_seed: int) -> None:
    draw = np.random.default_rng(random_seed)
    middles = draw.uniform((20, 20), (280, 180), (7, 2))
    bars = [(x - 1.5, y - 10, x + 1.5, y + 10) for x, y in middles.tolist()]
    boxes = place_labels(bars, [(50.0, 9.0)] * 7, (300.0, 200.0), bars, [])
    for left, bottom, right, top in boxes:
        assert (right - left, top - bottom) == pytest.approx((50, 9))
        assert min(left, bottom) >= 0
        assert right <= 300
        assert top <= 200
    assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
    assert not any(overlap(box, bar) for box in boxes for bar in bars)


def test_a_label_alone_is_next_to_its_bar_and_needs_no_leader() -> None:
    bar = (98.5, 90.0, 101.5, 110.0)
    (box,) = place_labels([bar], [(50.0, 9.0)], (300.0, 200.0), [bar], [])
    assert leader_of((100.0, 100.0), bar, box) is None


def test_a_leader_goes_from_the_mark_to_the_nearest_point_of_a_label_far_off() -> None:
    bar, label = (98.5, 90.0, 101.5, 110.0), (150.0, 120.0, 200.0, 129.0)
    assert leader_of((100.0, 100.0), bar, label) == ((100.0, 100.0), (150.0, 120.0))
