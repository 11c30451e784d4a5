"""Places each label of a figure near its mark and clear of everything else. Lengths are in points (1/72 inch).

adjustText 1.4 and textalloc 1.2 leave labels on error bars and on other text, and measure them in the fonts of the
machine, so that an SVG would differ from machine to machine; matplotlib places no labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Place = tuple[float, float]  # x, y
Box = tuple[float, float, float, float]  # left, bottom, right, top
Line = tuple[Place, Place]  # from, to


def spread(wanted: Sequence[float], distance: float, bounds: tuple[float, float]) -> list[float]:
    """Positions that keep a distance from each other, as near to the wanted ones as possible.

    The sum of the squared differences from the wanted positions is the least possible (isotonic regression).

    >>> spread([1.0, 1.0, 9.0], 2.0, (-10.0, 10.0))
    [0.0, 2.0, 9.0]

    Args:
        wanted: the positions wanted, in any order.
        distance: the least distance between two positions; less if there is no room for all of them.
        bounds: the lowest and the highest position allowed.

    Returns:
        The positions, in the order of `wanted`.
    """
    if len(wanted) > 1:
        distance = min(distance, (bounds[1] - bounds[0]) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Less the sum of the distances below it, each position must be at least the position before it.
    pools: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        pools.append((wanted[i] - place * distance, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (above, n), (below, m) = pools.pop(), pools.pop()
            pools.append(((above * n + below * m) / (n + m), n + m))
    levels = [mean for mean, count in pools for _ in range(count)]
    ceiling = bounds[1] - distance * (len(wanted) - 1)
    positions = [0.0] * len(wanted)
    for place, i in enumerate(order):
        positions[i] = min(max(levels[place], bounds[0]), ceiling) + place * distance
    return positions


def place_labels(
    bars: Sequence[Box],
    sizes: Sequence[tuple[float, float]],
    room: tuple[float, float],
    occupied: Sequence[Box],
    lines: Sequence[Box],
) -> list[Box]:
    """Place a label near each error bar.

    Each label has some candidate boxes around the middle of its bar. In turn, each label takes the cheapest of its
    candidates, given the boxes of the other labels, until no label moves.

    Args:
        bars: the error bars, whose middles are the marks.
        sizes: width and height of each bar's label.
        room: width and height of the axes.
        occupied: boxes that a label must not cover.
        lines: boxes that a label may cover if it has to.

    Returns:
        The labels' boxes.
    """
    directions = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
    marks = [((bar[0] + bar[2]) / 2, (bar[1] + bar[3]) / 2) for bar in bars]

    def candidates(i: int) -> Iterator[tuple[float, Box]]:
        """Boxes for label i, each with its cost before the other labels are looked at."""
        (x, y), (w, h), reach = marks[i], sizes[i], bars[i][3] - marks[i][1]
        middles = [(x, y + side * (max(reach, 4) + 2 + h / 2)) for side in (-1, 1)]
        for step in (6.0, 13.0, 21.0, 30.0, 42.0, 56.0):
            # The box whose point nearest to the mark is `step` away in this direction.
            middles += [
                (x + dx * step + w / 2 * _clip(2.4 * dx), y + dy * step + h / 2 * _clip(2.4 * dy))
                for dx, dy in directions
            ]
        for cx, cy in middles:
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            own_gap, leader = _gap(bars[i], box), leader_of(marks[i], bars[i], box)
            cost = own_gap + 0.3 * math.dist(marks[i], _nearest(marks[i], box))
            cost += 100 * max(0, -box[0], box[2] - room[0], -box[1], box[3] - room[1])
            cost += sum(30 + 20 * area for other in occupied if (area := overlap(box, other)))
            cost += 0.5 * sum(overlap(box, line) for line in lines)
            for j, other in enumerate(bars):
                if j != i:
                    # A label near another bar would be taken for that bar's, and no leader should cross a bar.
                    gap = _gap(other, box)
                    cost += max(0, 12 - gap) + 8 * (gap < own_gap) + 30 * _crosses(leader, other)
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


def leader_of(mark: Place, bar: Box, label: Box) -> Line | None:
    """The line from a mark to its label; None if the label is next to the mark's error bar and needs none."""
    return (mark, _nearest(mark, label)) if _gap(bar, label) > 9 else None


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _crosses(line: Line | None, box: Box) -> bool:
    if line is None:
        return False
    (ax, ay), (bx, by) = line
    if max(ax, bx) < box[0] - 2 or min(ax, bx) > box[2] + 2 or max(ay, by) < box[1] - 2 or min(ay, by) > box[3] + 2:
        return False
    steps = [(ax + (bx - ax) * k / 16, ay + (by - ay) * k / 16) for k in range(17)]
    return any(box[0] - 2 <= x <= box[2] + 2 and box[1] - 2 <= y <= box[3] + 2 for x, y in steps)


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _nearest(mark: Place, box: Box) -> Place:
    return min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3])


def _gap(a: Box, b: Box) -> float:
    return math.hypot(max(a[0] - b[2], b[0] - a[2], 0), max(a[1] - b[3], b[1] - a[3], 0))
