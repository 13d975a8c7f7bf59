"""Which trial comes next: the learning rates of the screen, and what is confirmed.

All of it follows from the trials that are finished, so a run that was killed goes on
where it stopped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.evidence.arms import (
    BASE,
    FULL,
    MEAN,
    NORM_MATCHED_MEAN,
    WINDOW,
    Arm,
    Plan,
    controls_of,
)

Stage = Literal["screen", "confirm"]

# Factors of two by which a search may leave the rate it starts at.
_FARTHEST = 8


class Trial(NamedTuple):
    """One arm at one learning rate and depth, over the seeds of a stage."""

    layers: int
    stage: Stage
    arm: Arm
    learning_rate: float


class NoOptimum(ValueError):
    """No learning rate in reach is better than those on both sides of it."""


def next_trial(
    finished: Sequence[Mapping[str, Any]],
    depths: Sequence[int],
    start: float,
    lower_is_better: bool,
    also: Sequence[tuple[Arm, float]] = (),
    plan: Plan = FULL,
) -> Trial | None:
    """Returns the trial that comes next, or None where all are finished.

    Args:
      finished: the arms of a result file.
      depths: the numbers of layers, in order.
      start: the learning rate at which the search of the first base begins.
      lower_is_better: of the metric.
      also: arms and rates to confirm in any case.
      plan: which arms there are.

    Raises:
      NoOptimum: if an arm is best at an end of all rates in reach.
    """
    for layers in depths:
        here = [arm for arm in finished if arm["layers"] == layers]
        try:
            trial = _next_at_depth(here, start, lower_is_better, also, plan)
        except NoOptimum as error:
            raise NoOptimum(f"at {layers} layers, {error}") from None
        if trial is not None:
            return Trial(layers, *trial)
        start = best_rate(screened(here, BASE, lower_is_better))
    return None


def _next_at_depth(
    finished: Sequence[Mapping[str, Any]],
    start: float,
    lower_is_better: bool,
    also: Sequence[tuple[Arm, float]],
    plan: Plan,
) -> tuple[Stage, Arm, float] | None:
    found: dict[Arm, dict[float, float]] = {}
    to_screen = [BASE, *plan.screened]
    if plan.controlled:
        to_screen += [*controls_of(WINDOW), MEAN, NORM_MATCHED_MEAN]
    for arm in to_screen:
        found[arm] = screened(finished, arm, lower_is_better)
        try:
            rate = next_rate(found[arm], start)
        except NoOptimum as error:
            raise NoOptimum(f"the screen of {arm.name}: {error}") from None
        if rate is not None:
            return "screen", arm, rate
        if arm is BASE:
            start = best_rate(found[arm])
        if arm is NORM_MATCHED_MEAN:
            controls = controls_of(best_screened(found, plan))
            to_screen.extend(arm for arm in controls if arm not in found)
    done = {
        (arm["name"], arm["learning_rate"])
        for arm in finished
        if arm["stage"] == "confirm"
    }
    for arm, rate in _to_confirm(found, also, plan):
        if (arm.name, rate) not in done:
            return "confirm", arm, rate
    return None


def _to_confirm(
    found: Mapping[Arm, Mapping[float, float]],
    also: Sequence[tuple[Arm, float]],
    plan: Plan,
) -> Iterator[tuple[Arm, float]]:
    """All chosen arms at every rate that is the best of one of them in the screen.

    So two arms are compared over the same rates, and none has more luck with them. The
    controls of the best arm, and the mean over depth and its own, may need far other
    rates: at these only what they are compared with is run too.
    """
    best = best_screened(found, plan)
    controls = controls_of(best) if plan.controlled else ()
    main = (BASE, *plan.confirmed, best)
    if plan.controlled:
        main += controls_of(WINDOW)
    chosen = dict.fromkeys((*main, *controls))
    for rate in dict.fromkeys(best_rate(found[arm]) for arm in main):
        yield from ((arm, rate) for arm in chosen)
    for control in controls:
        yield from ((arm, best_rate(found[control])) for arm in (best, control))
    if plan.controlled:
        yield MEAN, best_rate(found[BASE])
        for rate in (best_rate(found[arm]) for arm in (MEAN, NORM_MATCHED_MEAN)):
            yield from ((MEAN, rate), (NORM_MATCHED_MEAN, rate))
    yield from also


def best_screened(found: Mapping[Arm, Mapping[float, float]], plan: Plan) -> Arm:
    """Returns the smoothed arm of the lowest cost in the screen."""
    return min(plan.screened, key=lambda arm: min(found[arm].values()))


def screened(
    finished: Sequence[Mapping[str, Any]], arm: Arm, lower_is_better: bool
) -> dict[float, float]:
    """Returns {learning rate: mean metric over seeds} of an arm's screen.

    As a cost: lower is better, and infinite where a seed diverged.
    """
    costs = {}
    for result in finished:
        if result["stage"] == "screen" and result["name"] == arm.name:
            values = np.array(result["metric_per_seed"], float)  # null is NaN
            mean = float(np.mean(values)) * (1 if lower_is_better else -1)
            costs[result["learning_rate"]] = mean if math.isfinite(mean) else math.inf
    return costs


def next_rate(costs: Mapping[float, float], start: float) -> float | None:
    """Returns the learning rate to try next, or None where the optimum is inside.

    The rates are `start` times powers of two.

    Args:
      costs: {rate: cost} of those that were tried.
      start: the rate to begin at.

    Raises:
      NoOptimum: if the best rate is at an end, 2⁸ from `start`.
    """
    for rate in (start, start / 2, start * 2):
        if rate not in costs:
            return rate
    best = best_rate(costs)
    if best not in (min(costs), max(costs)):
        return None
    rate = best / 2 if best == min(costs) else best * 2
    if abs(math.log2(rate / start)) > _FARTHEST:
        raise NoOptimum(
            f"the best of the learning rates {sorted(costs)} is the one at the end, "
            f"{best:g}, and farther ones are not tried. Begin the search elsewhere: "
            "--option learning_rate=VALUE --out FILE"
        )
    return rate


def best_rate(costs: Mapping[float, float]) -> float:
    """Returns the learning rate of the lowest cost, of several the lowest rate."""
    return min(sorted(costs), key=costs.__getitem__)
