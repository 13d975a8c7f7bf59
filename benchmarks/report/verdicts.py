"""What the comparisons of a setting say about depth smoothing."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.comparison import PairedDifference
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    best_rate,
    best_screened_of,
    control_of,
    has_controls,
    has_diverged,
    is_better,
    is_worse,
    mean_of,
    p_value,
    preserving_of,
    survive_holm,
    window_of,
)
from benchmarks.report.records import Kind, Setting

CONTROLS = ("norm_matched", "shuffled_depth")


class Verdict(enum.Enum):
    """What a smoothed arm does at tuned rates; the value is how a table says it."""

    NEIGHBORS = "coupling neighbors helps"
    COUPLING = "coupling helps; not told apart from shuffled"
    SMALLER = "helps; so do smaller updates"
    UNCLEAR = "helps; why is not told apart"
    NO_CONTROLS = "helps (it has no controls)"
    NOTHING = "no difference shown"
    HURTS = "hurts"
    DIVERGED = "diverged"
    UNFINISHED = "unfinished"


class Judgment(NamedTuple):
    """The verdict on one smoothed arm.

    Attributes:
      kind: the arm, or None if it has not run.
      verdict: on it.
      untuned: names of the arms under the verdict whose best rate is at an end of
        the rates tried.
    """

    kind: Kind | None
    verdict: Verdict
    untuned: tuple[str, ...]


class Outcome(NamedTuple):
    """A setting with what its comparisons say.

    Attributes:
      setting: the setting.
      window: the judgment on the window(0.2).
      best: the judgment on the best screened arm, which can be the same.
      differences: to the base, best against best, of every kind that the summary has
        a column for; None where a run is missing.
      survivors: the kinds whose difference survives Holm's correction over all
        differences of all settings.
    """

    setting: Setting
    window: Judgment
    best: Judgment
    differences: dict[Kind, PairedDifference | None]
    survivors: frozenset[Kind] = frozenset()


def verdict_of(setting: Setting, kind: Kind | None) -> Verdict:
    """Returns the verdict on a smoothed arm, best against best.

    It helps where it is better than the base. Then coupling helps if it is also better
    than updates as small without coupling, and that of neighbors if it is better than
    the same coupling of layers in random order too. Where it is not told apart from
    the smaller updates, these help if they are better than the base themselves. Better
    means that a 95 % interval excludes 0.
    """
    base = base_of(setting)
    to_base = best_against_best(setting, kind, base)
    controls = [
        control_of(setting, kind, control)
        for control in CONTROLS
        if kind is not None and has_controls(kind)
    ]
    to_controls = [best_against_best(setting, kind, control) for control in controls]
    of_controls = [best_against_best(setting, control, base) for control in controls]
    every = (to_base, *to_controls, *of_controls)
    if any(found is None for found in every):
        return Verdict.UNFINISHED
    if any(map(has_diverged, every)):
        return Verdict.DIVERGED
    if is_worse(to_base):
        return Verdict.HURTS
    if not is_better(to_base):
        return Verdict.NOTHING
    if not to_controls:
        return Verdict.NO_CONTROLS
    to_norm_matched, to_shuffled = to_controls
    if is_better(to_norm_matched):
        return Verdict.NEIGHBORS if is_better(to_shuffled) else Verdict.COUPLING
    return Verdict.SMALLER if is_better(of_controls[0]) else Verdict.UNCLEAR


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
    window, best = window_of(setting, 0.2), best_screened_of(setting)
    columns = (
        *(window_of(setting, 0.1), window, preserving_of(setting)),
        *(best, mean_of(setting)),
    )
    return Outcome(
        setting=setting,
        window=_judgment(setting, window),
        best=_judgment(setting, best),
        differences={
            kind: best_against_best(setting, kind, base_of(setting))
            for kind in columns
            if kind is not None
        },
    )


def _judgment(setting: Setting, kind: Kind | None) -> Judgment:
    controls = (control_of(setting, kind, control) for control in CONTROLS)
    under = [k for k in (base_of(setting), kind, *controls) if k is not None]
    rates = [(of, best_rate(setting, of)) for of in under]
    return Judgment(
        kind,
        verdict_of(setting, kind),
        tuple(of.name for of, rate in rates if rate is not None and rate.at_an_end),
    )
