"""Which rates are tried next, and which are chosen: pure functions of the costs so far.

A point is a pair of places `(i, j)`: on the ladder of rates and on that of block rates.
Its cost is the mean of the metric over the seeds of the screen, lower is better, and
infinite where a run diverged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Point = tuple[int, int]

# Steps by which a search may leave the rates that it was given.
_FARTHEST = 8


class Ladder(NamedTuple):
    """Rates in ascending order, and beyond them those that go on by the same factor."""

    given: tuple[float, ...]

    def at(self, place: int) -> float:
        last = len(self.given) - 1
        if 0 <= place <= last:
            return self.given[place]
        # By factors of 2 where there is only one.
        pair = self.given[:2] if place < 0 else self.given[-2:]
        factor = pair[1] / pair[0] if last else 2.0
        end, steps = (0, place) if place < 0 else (last, place - last)
        return float(f"{self.given[end] * factor**steps:.6g}")

    @property
    def places(self) -> range:
        """All that a search may reach."""
        return range(-_FARTHEST, len(self.given) + _FARTHEST)


def next_points(
    costs: Mapping[Point, float], rates: Ladder, blocks: Ladder | None
) -> list[Point]:
    """The points to try now; none when the best has worse ones on all sides.

    First all rates at the block rate nearest 1, then all block rates at the best of
    these, then what surrounds the best point of all. Three things are moved: the rate
    of everything, the rate of the blocks alone, and that of the rest alone (the rate
    one step up and the block rate one step down), because the blocks' own rate, the
    product, is what a loss is sensitive to.

    Args:
      costs: of the points that were tried.
      rates: of the whole optimizer.
      blocks: factors of the blocks' updates; None where they have none.
    """
    start = 0 if blocks is None else _nearest_to_one(blocks)
    along_rates = [(i, start) for i in range(len(rates.given))]
    if missing := [point for point in along_rates if point not in costs]:
        return missing
    if blocks is not None:
        i, _ = best_point({point: costs[point] for point in along_rates})
        along_blocks = [(i, j) for j in range(len(blocks.given))]
        if missing := [point for point in along_blocks if point not in costs]:
            return missing
    return [
        point
        for point in _around(best_point(costs), blocks)
        if point not in costs and _in_reach(point, rates, blocks)
    ]


def best_point(costs: Mapping[Point, float]) -> Point:
    """The point of the lowest cost; of equal ones that of the lowest rate."""
    return min(sorted(costs), key=costs.__getitem__)


def is_inside(
    costs: Mapping[Point, float], rates: Ladder, blocks: Ladder | None
) -> bool:
    """Whether the best point has finite cost and was tried on all sides."""
    best = best_point(costs)
    return math.isfinite(costs[best]) and all(
        point in costs for point in _around(best, blocks)
    )


class Choice(NamedTuple):
    """What the screen chose for an arm.

    Attributes:
      rate: minimum of the parabola through the logarithms of the best rate and its two
        neighbors.
      second_rate: the second best of the rates tried beside the best; None where both
        neighbors diverged.
      block_rate: as `rate`; 1 for the arm that has none of its own.
      inside: whether worse ones lie on all sides; else the best may lie beyond.
    """

    rate: float
    second_rate: float | None
    block_rate: float
    inside: bool


def choice(
    costs: Mapping[Point, float], rates: Ladder, blocks: Ladder | None
) -> Choice:
    """Chooses the rates of an arm whose search is over."""
    best = i, j = best_point(costs)
    beside = [
        (costs[point], point)
        for point in ((i - 1, j), (i + 1, j))
        if math.isfinite(costs.get(point, math.inf))
    ]
    return Choice(
        rate=_vertex(costs, rates, best, (1, 0)),
        second_rate=rates.at(min(beside)[1][0]) if beside else None,
        block_rate=1.0 if blocks is None else _vertex(costs, blocks, best, (0, 1)),
        inside=is_inside(costs, rates, blocks),
    )


def _vertex(
    costs: Mapping[Point, float], ladder: Ladder, best: Point, way: tuple[int, int]
) -> float:
    """Where the parabola through a point and its two neighbors is lowest."""
    along = best[0] * way[0] + best[1] * way[1]
    near = [
        costs.get((best[0] + step * way[0], best[1] + step * way[1]), math.inf)
        for step in (-1, 0, 1)
    ]
    value = ladder.at(along)
    if not all(map(math.isfinite, near)):
        return value
    low, here, high = (math.log(ladder.at(along + step)) for step in (-1, 0, 1))
    # Newton's form; both slopes point up from the lowest of three.
    down = (near[1] - near[0]) / (here - low)
    up = (near[2] - near[1]) / (high - here)
    if up <= down:  # all equal
        return value
    middle = (low + here) / 2 - down * (high - low) / 2 / (up - down)
    return float(f"{math.exp(middle):.4g}")


def _around(point: Point, blocks: Ladder | None) -> Sequence[Point]:
    i, j = point
    if blocks is None:
        return (i - 1, j), (i + 1, j)
    return (
        *((i - 1, j), (i + 1, j)),
        *((i, j - 1), (i, j + 1)),
        *((i + 1, j - 1), (i - 1, j + 1)),
    )


def _in_reach(point: Point, rates: Ladder, blocks: Ladder | None) -> bool:
    i, j = point
    return i in rates.places and (blocks is None or j in blocks.places)


def _nearest_to_one(blocks: Ladder) -> int:
    return min(range(len(blocks.given)), key=lambda j: abs(math.log(blocks.given[j])))
