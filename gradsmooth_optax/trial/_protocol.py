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
from gradsmooth_optax.trial._search import Choice, Ladder, Point, choice, points_of_all
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

    The screen of all arms comes before any confirmation.
    """
    points = _missing(settings, arms, screened(settings, arms, outcomes))
    screen = [
        run
        for name, of_arm in points.items()
        for point in of_arm
        for run in _runs_at(settings, arms[name], point)
        if run not in outcomes
    ]
    if screen:
        return screen
    found = chosen(settings, arms, outcomes)
    return [
        run
        for name in arms
        for rate in dict.fromkeys((found[name].rate, found[name].second_rate))
        if rate is not None
        for run in _confirmation(settings, name, found[name], rate)
        if run not in outcomes
    ]


def _missing(
    settings: Settings,
    arms: Mapping[str, Arm],
    costs: Mapping[str, Mapping[Point, float]],
) -> dict[str, list[Point]]:
    blocks = {name: settings.ladders(arm)[1] for name, arm in arms.items()}
    return points_of_all(costs, Ladder(settings.rates), blocks)


def _runs_at(settings: Settings, arm: Arm, point: Point) -> list[Run]:
    """The runs of the screen of an arm at one point."""
    rates, blocks = settings.ladders(arm)
    block_rate = 1.0 if blocks is None else blocks.at(point[1])
    return [
        Run(SCREEN, arm.name, rates.at(point[0]), block_rate, seed)
        for seed in settings.seeds_of(SCREEN)
    ]


def _confirmation(
    settings: Settings, name: str, found: Choice, rate: float
) -> list[Run]:
    return [
        Run(CONFIRM, name, rate, found.block_rate, seed)
        for seed in settings.seeds_of(CONFIRM)
    ]


def screened(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Outcomes
) -> dict[str, dict[Point, float]]:
    """{arm: {point: mean cost}} of the points of which all seeds are there."""
    values: dict[tuple[str, float, float], list[float]] = {}
    for run, outcome in outcomes.items():
        if run.stage == SCREEN:
            about = run.arm, run.rate, run.block_rate
            values.setdefault(about, []).append(value_of(outcome, settings.tuned_by))
    costs: dict[str, dict[Point, float]] = {}
    for name, arm in arms.items():
        rates, blocks = settings.ladders(arm)
        costs[name] = {}
        columns = [0] if blocks is None else blocks.places
        for point in itertools.product(rates.places, columns):
            block_rate = 1.0 if blocks is None else blocks.at(point[1])
            found = values.get((name, rates.at(point[0]), block_rate), [])
            if len(found) == settings.screen_seeds:
                costs[name][point] = float(np.mean(as_costs(found, settings.better)))
    return costs


def chosen(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Outcomes
) -> dict[str, Choice]:
    """{arm: its rates}, once the screen is over; else empty."""
    costs = screened(settings, arms, outcomes)
    if any(_missing(settings, arms, costs).values()):
        return {}
    return {
        name: choice(costs[name], *settings.ladders(arm)) for name, arm in arms.items()
    }


def confirmed(
    settings: Settings,
    arms: Mapping[str, Arm],
    outcomes: Outcomes,
    second: bool = False,
) -> dict[str, np.ndarray]:
    """{arm: (S,) costs} at the best or second best rate, of arms that are complete."""
    costs = {}
    for name, found in chosen(settings, arms, outcomes).items():
        rate = found.second_rate if second else found.rate
        if rate is None:
            continue
        runs = _confirmation(settings, name, found, rate)
        if all(run in outcomes for run in runs):
            values = [value_of(outcomes[run], settings.metric) for run in runs]
            costs[name] = as_costs(values, settings.better)
    return costs


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
    costs = confirmed(settings, arms, outcomes, second)
    return {
        name: {
            kind: contrast(name, other, costs[name], costs[other])
            for kind, other in references(arms, name).items()
            if other in costs
        }
        for name, arm in arms.items()
        if arm.operator is not None
        and arm.control is None
        and {name, BASE} <= costs.keys()
    }


def base_to_plain(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Outcomes
) -> Contrast | None:
    """What a rate of their own for the blocks brings."""
    costs = confirmed(settings, arms, outcomes)
    if not {BASE, PLAIN} <= costs.keys():
        return None
    return contrast(BASE, PLAIN, costs[BASE], costs[PLAIN])


def usual_runs(settings: Settings, arms: Mapping[str, Arm]) -> tuple[int, int]:
    """Runs of the screen, about, and the most of the confirmation.

    A search that has to leave the rates that it was given takes more.
    """
    screen = 0
    for arm in arms.values():
        rates, blocks = settings.ladders(arm)
        count = len(rates.given) + 1
        if blocks is not None:
            # The row of block rates, and what is around two best points, about.
            count += len(blocks.given) - 1 + 7
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
        math.inf if 4 * (k + 1) < n else float(best[max((k + 1) // 2 - 1, 0)])
        for k in range(n)
    )
