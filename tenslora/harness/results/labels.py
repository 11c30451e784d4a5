"""Where the labels of a figure go: near what they name, and clear of everything else. Lengths are in points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
Line = tuple[tuple[float, float], tuple[float, float]]  # from, to


def spread(wanted: Sequence[float], distance: float, bounds: tuple[float, float]) -> list[float]:
    """Positions at least `distance` apart and within `bounds`, in the order of `wanted` and as near to it as can be.

    Nearest in the sense of least squares. If there is no room for all, they overlap evenly.

    >>> spread([1.0, 1.0, 9.0], 2.0, (-10.0, 10.0))
    [0.0, 2.0, 9.0]
    """
    if len(wanted) > 1:
        distance = min(distance, (bounds[1] - bounds[0]) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Less the distances that come before it, each position must not be below the one before: isotonic regression.
    pools: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        pools.append((wanted[i] - place * distance, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (above, n), (below, m) = pools.pop(), pools.pop()
            pools.append(((above * n + below * m) / (n + m), n + m))
    level = [mean for mean, count in pools for _ in range(count)]
    ceiling = bounds[1] - distance * (len(wanted) - 1)
    found = [0.0] * len(wanted)
    for place, i in enumerate(order):
        found[i] = min(max(level[place], bounds[0]), ceiling) + place * distance
    return found


def place_labels(
    bars: Sequence[Box],
    sizes: Sequence[tuple[float, float]],
    room: tuple[float, float],
    hard: Sequence[Box],
    soft: Sequence[Box],
) -> list[Box]:
    """A box for the label of each bar, of the size given, near it and clear of `hard`, `soft` and each other.

    Each label takes the cheapest of some places around its bar's middle, given the others, until none moves.
    """
    directions = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
    marks = [((bar[0] + bar[2]) / 2, (bar[1] + bar[3]) / 2) for bar in bars]

    def candidates(i: int) -> Iterator[tuple[float, Box]]:
        (x, y), (w, h), reach = marks[i], sizes[i], bars[i][3] - marks[i][1]
        middles = [(x, y + side * (max(reach, 4) + 2 + h / 2)) for side in (-1, 1)]
        for step in (6.0, 13.0, 21.0, 30.0, 42.0, 56.0):
            # The box whose nearest point to the mark lies `step` away in this direction.
            middles += [
                (x + dx * step + w / 2 * _clip(2.4 * dx), y + dy * step + h / 2 * _clip(2.4 * dy))
                for dx, dy in directions
            ]
        for cx, cy in middles:
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            own, leader = _gap(bars[i], box), leader_of(marks[i], bars[i], box)
            cost = own + 0.3 * math.dist(marks[i], _nearest(marks[i], box))
            cost += 100 * max(0, -box[0], box[2] - room[0], -box[1], box[3] - room[1])
            cost += sum(30 + 20 * area for other in hard if (area := overlap(box, other)))
            cost += 0.5 * sum(overlap(box, other) for other in soft)
            for j, other in enumerate(bars):
                if j != i:
                    # Near another bar it would be taken for that bar's; and its leader is not to cross one.
                    gap = _gap(other, box)
                    cost += max(0, 12 - gap) + 8 * (gap < own) + 30 * _crosses(leader, other)
            yield cost, box

    choices = [sorted(candidates(i)) for i in range(len(bars))]
    chosen = [choice[0][1] for choice in choices]
    for _ in range(8):
        before = list(chosen)
        for i, choice in enumerate(choices):
            others = [(j, box) for j, box in enumerate(chosen) if j != i]

            def cost(option: tuple[float, Box], i: int = i, others: list[tuple[int, Box]] = others) -> float:
                leader = leader_of(marks[i], bars[i], option[1])
                crossed = sum(_crosses(leader, box) for _, box in others)
                crossed += sum(_crosses(leader_of(marks[j], bars[j], box), option[1]) for j, box in others)
                return option[0] + 20 * sum(overlap(option[1], box) for _, box in others) + 30 * crossed

            chosen[i] = min(choice, key=cost)[1]
        if chosen == before:
            break
    return chosen


def leader_of(mark: tuple[float, float], bar: Box, label: Box) -> Line | None:
    """The line from a mark to its label; none where the label is next to the mark's bar."""
    return (mark, _nearest(mark, label)) if _gap(bar, label) > 9 else None


def _crosses(line: Line | None, box: Box) -> bool:
    if line is None:
        return False
    (ax, ay), (bx, by) = line
    steps = [(ax + (bx - ax) * k / 16, ay + (by - ay) * k / 16) for k in range(17)]
    return any(box[0] - 2 <= x <= box[2] + 2 and box[1] - 2 <= y <= box[3] + 2 for x, y in steps)


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _nearest(mark: tuple[float, float], box: Box) -> tuple[float, float]:
    return min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3])


def _gap(a: Box, b: Box) -> float:
    return math.hypot(max(a[0] - b[2], b[0] - a[2], 0), max(a[1] - b[3], b[1] - a[3], 0))


def overlap(a: Box, b: Box) -> float:
    """The area that both cover."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
