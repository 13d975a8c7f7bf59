"""Which rates are tried next, and which are chosen: pure functions of the costs so far.

A point is a pair of places `(i, j)`: on the ladder of rates and on that of block rates.
Its cost is the mean of the metric over the seeds of the screen, lower is better, and
infinite where a run diverged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
      rate: where the parabola through the best point and its neighbors is lowest, in
        logarithms.
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
    i, j = best_point(costs)
    beside = [
        (costs[point], point)
        for point in ((i - 1, j), (i + 1, j))
        if math.isfinite(costs.get(point, math.inf))
    ]
    rate, block_rate = _lowest(costs, rates, blocks)
    return Choice(
        rate=rate,
        second_rate=rates.at(min(beside)[1][0]) if beside else None,
        block_rate=block_rate,
        inside=is_inside(costs, rates, blocks),
    )


def _lowest(
    costs: Mapping[Point, float], rates: Ladder, blocks: Ladder | None
) -> tuple[float, float]:
    """Where the parabola through the best point and those around it is lowest.

    In the logarithms of both rates: it has as many coefficients as a line of three
    points, or a hexagon of seven less one, determine. The best point itself where one
    of them diverged, or where the parabola has no minimum beside it.
    """
    best = best_point(costs)
    points = [best, *_around(best, blocks)]
    values = np.array([costs.get(point, math.inf) for point in points])
    at_best = rates.at(best[0]), 1.0 if blocks is None else blocks.at(best[1])
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return at_best

    def logarithms(point: Point) -> tuple[float, ...]:
        own = math.log(rates.at(point[0]) / at_best[0])
        if blocks is None:
            return (own,)
        return own, math.log(blocks.at(point[1]) / at_best[1])

    x = np.array([logarithms(point) for point in points])
    n = x.shape[1]
    rows, columns = np.triu_indices(n)
    terms = np.column_stack([np.ones(len(x)), x, x[:, rows] * x[:, columns]])
    _, *coefficients = np.linalg.lstsq(terms, values, rcond=None)[0]
    slope, of_squares = coefficients[:n], coefficients[n:]
    curvature = np.zeros((n, n))
    curvature[rows, columns] = of_squares
    curvature = curvature + curvature.T
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return at_best
    lowest = -np.linalg.solve(curvature, slope)
    if np.any(np.abs(lowest) > np.abs(x).max(0)):
        return at_best
    rate, *block = (float(f"{r:.4g}") for r in at_best[:n] * np.exp(lowest))
    return rate, block[0] if block else 1.0


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
