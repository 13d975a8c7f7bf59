"""What the comparisons of a setting say about depth smoothing."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.comparison import PairedDifference
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    best_screened_of,
    control_of,
    has_diverged,
    is_better,
    is_worse,
    p_value,
    preserving_of,
    survive_holm,
    tuned_rate,
    window_of,
)
from benchmarks.report.records import Kind, Setting


class Verdict(enum.Enum):
    """What the window(0.2) does at tuned rates; the value is how a table says it."""

    NEIGHBORS = "coupling neighbors helps"
    ANY_COUPLING = "helps; not told apart from coupling layers at random"
    SMALLER_STEP = "helps; not told apart from a smaller step"
    NOTHING = "no difference shown"
    HURTS = "hurts"
    DIVERGED = "diverged"
    UNFINISHED = "unfinished"


class Outcome(NamedTuple):
    """A setting with what its comparisons say.

    Attributes:
        setting: the setting.
        verdict: on the window(0.2).
        roles: window(0.1), window(0.2), the norm-preserving arm and the best screened
            arm, in this order; None where there is none.
        differences: to the base, each at its own tuned rate, of the kinds in `roles`;
            None where a run is missing.
        survivors: the kinds whose difference survives Holm's correction over all
            differences of all settings.
        untuned: names of the arms under the verdict whose best rate is at an end of
            the rates screened.
    """

    setting: Setting
    verdict: Verdict
    roles: tuple[Kind | None, Kind | None, Kind | None, Kind | None]
    differences: dict[Kind, PairedDifference | None]
    survivors: frozenset[Kind]
    untuned: tuple[str, ...]


def verdict_of(setting: Setting) -> Verdict:
    """Returns the verdict on the window(0.2), each arm at its own tuned rate.

    It helps where it is better than the base. Then coupling neighbors helps if it is
    also better than the same step without coupling, and than the same coupling of
    layers in random order; better means that a 95 % interval excludes 0.
    """
    window = window_of(setting, 0.2)
    to_base = best_against_best(setting, window, base_of(setting))
    to_norm_matched, to_shuffled = (
        best_against_best(setting, window, control_of(setting, control))
        for control in ("norm_matched", "shuffled_depth")
    )
    every = (to_base, to_norm_matched, to_shuffled)
    if any(found is None for found in every):
        return Verdict.UNFINISHED
    if any(map(has_diverged, every)):
        return Verdict.DIVERGED
    if is_worse(to_base):
        return Verdict.HURTS
    if not is_better(to_base):
        return Verdict.NOTHING
    if not is_better(to_norm_matched):
        return Verdict.SMALLER_STEP
    if not is_better(to_shuffled):
        return Verdict.ANY_COUPLING
    return Verdict.NEIGHBORS


def outcomes(settings: Sequence[Setting]) -> list[Outcome]:
    """Returns what all settings say, with Holm's correction over all of them."""
    of_all = [_outcome(setting) for setting in settings]
    tests = [
        (index, kind, p_value(found))
        for index, outcome in enumerate(of_all)
        for kind, found in outcome.differences.items()
        if found is not None
    ]
    survive = survive_holm([p for _, _, p in tests])
    survivors = [
        (index, kind)
        for (index, kind, _), survives in zip(tests, survive, strict=True)
        if survives
    ]
    return [
        outcome._replace(
            survivors=frozenset(kind for place, kind in survivors if place == index)
        )
        for index, outcome in enumerate(of_all)
    ]


def _outcome(setting: Setting) -> Outcome:
    roles, base = roles_of(setting), base_of(setting)
    return Outcome(
        setting=setting,
        verdict=verdict_of(setting),
        roles=roles,
        differences={
            kind: best_against_best(setting, kind, base)
            for kind in roles
            if kind is not None
        },
        survivors=frozenset(),
        untuned=untuned(setting),
    )


def roles_of(
    setting: Setting,
) -> tuple[Kind | None, Kind | None, Kind | None, Kind | None]:
    """Returns the kinds that the summary has a column for."""
    return (
        window_of(setting, 0.1),
        window_of(setting, 0.2),
        preserving_of(setting),
        best_screened_of(setting),
    )


def untuned(setting: Setting) -> tuple[str, ...]:
    """Returns which arms under the verdict have their best rate at an end."""
    under = (
        base_of(setting),
        window_of(setting, 0.2),
        control_of(setting, "norm_matched"),
        control_of(setting, "shuffled_depth"),
    )
    rates = [(kind, tuned_rate(setting, kind)) for kind in under if kind is not None]
    return tuple(kind.name for kind, tuned in rates if tuned and tuned.at_an_end)
