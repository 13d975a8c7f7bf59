"""What is run, in which order: a pure function of what has been run.

So a comparison that was killed goes on where it stopped, and one that is complete runs
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gradsmooth_optax.trial._arms import (
    BASE,
    MATCHED,
    PLAIN,
    SHUFFLED,
    Arm,
    control_name,
)
from gradsmooth_optax.trial._search import Choice, Ladder, Point, choice, next_points
from gradsmooth_optax.trial._statistics import Contrast, as_costs, contrast

SCREEN, CONFIRM = "screen", "confirm"


class Run(NamedTuple):
    """One training: `seed` of `arm` at its rates, to screen or to confirm."""

    stage: str
    arm: str
    rate: float
    block_rate: float
    seed: int


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      metrics: {name: value} of its end; empty if it raised or was stopped.
      curve: what it yielded of the metric that rates are chosen by.
      stopped: whether it was ended as hopeless, in the screen.
      error: what it raised, in one line, or None.
      seconds: that it took.
    """

    metrics: Mapping[str, float]
    curve: tuple[float, ...] = ()
    stopped: bool = False
    error: str | None = None
    seconds: float = math.nan


class Settings(NamedTuple):
    """What fixes a comparison; two of different settings share no file.

    Attributes:
      rates: to begin the search with, ascending.
      block_rates: likewise.
      seeds: S, of the confirmation.
      screen_seeds: s, of the screen; seeds 0 to s-1, the confirmation's follow.
      arms: {name: operator}, as text.
      metric: name of the metric of the verdict; None for the only one.
      tune_metric: name of the one that rates are chosen by; None for `metric`.
      better: "lower" or "higher".
      margin: what counts as the same, or None.
      depth: where depth is, as text.
    """

    rates: tuple[float, ...]
    block_rates: tuple[float, ...]
    seeds: int
    screen_seeds: int
    arms: Mapping[str, str]
    metric: str | None
    tune_metric: str | None
    better: str
    margin: float | None
    depth: str

    @property
    def tuned_by(self) -> str | None:
        return self.tune_metric or self.metric

    def ladders(self, arm: Arm) -> tuple[Ladder, Ladder | None]:
        blocks = Ladder(self.block_rates) if arm.tunes_block_rate else None
        return Ladder(self.rates), blocks

    def seeds_of(self, stage: str) -> range:
        first = self.screen_seeds
        return range(first) if stage == SCREEN else range(first, first + self.seeds)


Outcomes = Mapping[Run, Outcome]


def value_of(outcome: Outcome, metric: str | None) -> float:
    """A metric of a run, NaN where it has none; of None, the only one."""
    if metric is None:
        return next(iter(outcome.metrics.values()), math.nan)
    return outcome.metrics.get(metric, math.nan)


def next_runs(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Outcomes
) -> list[Run]:
    """All runs that can be begun now; none when the comparison is complete.

    The screen of every arm comes before any confirmation.
    """
    screen = [
        run
        for arm in arms.values()
        for point in points_missing(settings, arm, outcomes)
        for run in runs_at(settings, arm, point)
        if run not in outcomes
    ]
    if screen:
        return screen
    return [
        run
        for arm in arms.values()
        for run in confirmation(settings, arm, outcomes)
        if run not in outcomes
    ]


def runs_at(settings: Settings, arm: Arm, point: Point) -> list[Run]:
    """The runs of the screen of an arm at one point."""
    rates, blocks = settings.ladders(arm)
    block_rate = 1.0 if blocks is None else blocks.at(point[1])
    return [
        Run(SCREEN, arm.name, rates.at(point[0]), block_rate, seed)
        for seed in settings.seeds_of(SCREEN)
    ]


def points_missing(settings: Settings, arm: Arm, outcomes: Outcomes) -> list[Point]:
    return next_points(screened(settings, arm, outcomes), *settings.ladders(arm))


def screened(settings: Settings, arm: Arm, outcomes: Outcomes) -> dict[Point, float]:
    """{point: mean cost} of the points of which all seeds are there."""
    rates, blocks = settings.ladders(arm)
    seeds = settings.seeds_of(SCREEN)
    of_pairs: dict[tuple[float, float], list[Outcome]] = {}
    for run, outcome in outcomes.items():
        if run.stage == SCREEN and run.arm == arm.name:
            of_pairs.setdefault((run.rate, run.block_rate), []).append(outcome)
    costs = {}
    columns = [0] if blocks is None else blocks.places
    for point in itertools.product(rates.places, columns):
        pair = rates.at(point[0]), 1.0 if blocks is None else blocks.at(point[1])
        found = of_pairs.get(pair, [])
        if len(found) == len(seeds):
            values = [value_of(outcome, settings.tuned_by) for outcome in found]
            costs[point] = float(np.mean(as_costs(values, settings.better)))
    return costs


def chosen(settings: Settings, arm: Arm, outcomes: Outcomes) -> Choice | None:
    """The rates of an arm, once its screen is over."""
    costs = screened(settings, arm, outcomes)
    if next_points(costs, *settings.ladders(arm)):
        return None
    return choice(costs, *settings.ladders(arm))


def confirmation(settings: Settings, arm: Arm, outcomes: Outcomes) -> list[Run]:
    """The runs that confirm an arm: all seeds at its two best rates."""
    found = chosen(settings, arm, outcomes)
    if found is None:
        return []
    rates = [rate for rate in (found.rate, found.second_rate) if rate is not None]
    return [
        Run(CONFIRM, arm.name, rate, found.block_rate, seed)
        for rate in dict.fromkeys(rates)
        for seed in settings.seeds_of(CONFIRM)
    ]


def confirmed(
    settings: Settings, arm: Arm, outcomes: Outcomes, second: bool = False
) -> np.ndarray | None:
    """(S,) costs of an arm at its best or second best rate, if all are there."""
    found = chosen(settings, arm, outcomes)
    rate = None if found is None else found.second_rate if second else found.rate
    if found is None or rate is None:
        return None
    runs = [
        Run(CONFIRM, arm.name, rate, found.block_rate, seed)
        for seed in settings.seeds_of(CONFIRM)
    ]
    if not all(run in outcomes for run in runs):
        return None
    values = [value_of(outcomes[run], settings.metric) for run in runs]
    return as_costs(values, settings.better)


def references(arms: Mapping[str, Arm], name: str) -> dict[str, str]:
    """{kind: name} of what an operator is compared with."""
    kinds = {kind: control_name(kind, name) for kind in (MATCHED, SHUFFLED)}
    return {"base": BASE} | {k: other for k, other in kinds.items() if other in arms}


def contrasts_of(
    settings: Settings,
    arms: Mapping[str, Arm],
    outcomes: Outcomes,
    second: bool = False,
) -> dict[str, dict[str, Contrast]]:
    """{operator: {kind of reference: contrast}} of the pairs that are complete."""
    costs = {
        name: confirmed(settings, arm, outcomes, second) for name, arm in arms.items()
    }
    found: dict[str, dict[str, Contrast]] = {}
    for name, arm in arms.items():
        if arm.operator is None or arm.control is not None:
            continue
        here = costs[name]
        if here is None or costs[BASE] is None:
            continue
        found[name] = {
            kind: contrast(name, other, here, of_other)
            for kind, other in references(arms, name).items()
            if (of_other := costs[other]) is not None
        }
    return found


def base_to_plain(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Outcomes
) -> Contrast | None:
    """What a rate of their own for the blocks brings."""
    base, plain = (confirmed(settings, arms[name], outcomes) for name in (BASE, PLAIN))
    if base is None or plain is None:
        return None
    return contrast(BASE, PLAIN, base, plain)


def least_runs(settings: Settings, arms: Mapping[str, Arm]) -> tuple[int, int]:
    """Runs of the screen and of the confirmation, if no search has to be extended.

    That is when the best rate and block rate are inside those given, else the screen
    takes more.
    """
    screen = 0
    for arm in arms.values():
        rates, blocks = settings.ladders(arm)
        count = len(rates.given)
        if blocks is not None:
            # The row of block rates, and what is around its best point.
            count += len(blocks.given) - 1 + 4
        screen += count * settings.screen_seeds
    return screen, 2 * settings.seeds * len(arms)


def thresholds(
    settings: Settings, outcomes: Outcomes, run: Run
) -> tuple[float, ...] | None:
    """The cost at each yield from which on a run of the screen is hopeless.

    That is what the best finished run of the same arm and seed had reached at half the
    progress; no run is stopped in its first quarter, and none before one is finished.
    """
    if run.stage != SCREEN:
        return None
    curves = [
        as_costs(outcome.curve, settings.better)
        for other, outcome in outcomes.items()
        if (other.stage, other.arm, other.seed) == (SCREEN, run.arm, run.seed)
        and outcome.metrics
        and len(outcome.curve) > 1
    ]
    if not curves:
        return None
    best = min(curves, key=lambda curve: curve[-1])
    n = len(best)
    return tuple(
        math.inf if 4 * (k + 1) < n else float(best[(k + 1) // 2]) for k in range(n)
    )
