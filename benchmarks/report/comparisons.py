"""Comparisons of tuned arms: rates by the screen, differences by the confirmation.

The screen says at which rates the arms are confirmed, each arm at the best rates of
all. Two arms are compared over the rates that both were confirmed at, each at the one
where its mean over these seeds is better: the few seeds of a screen take neighboring
rates for one another, and the difference of two rates would pass for one of arms.

Two kinds of arms are different. The mean over depth needs far higher rates than others,
so it and what it is compared with have each the rates that they were confirmed at. And
controls of the best screened arm have no screen: they run at the rates of that arm.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from benchmarks.comparison import PairedDifference, paired_difference
from benchmarks.report.records import Arm, Kind, Metric, Setting


class TunedRate(NamedTuple):
    """A best rate, and whether it is the lowest or highest of those tried."""

    rate: float
    at_an_end: bool


# ── which arm is which, by what it does ──────────────────────────────────────


def is_base(kind: Kind) -> bool:
    """Returns whether this is the optimizer without smoothing."""
    return kind.operator == "none" and kind.control is None


def is_smoothed(kind: Kind) -> bool:
    """Returns whether this couples neighbors, rather than being a base or control."""
    return kind.operator != "none" and kind.control is None


def is_window(kind: Kind, alpha: float) -> bool:
    """Returns whether this is the plain window of strength `alpha` on all layers."""
    return (
        is_smoothed(kind)
        and kind.operator == "window"
        and math.isclose(kind.alpha, alpha)
        and (kind.variant, kind.scope) == ("standard", "full")
    )


def base_of(setting: Setting) -> Kind | None:
    """Returns the base arm's kind, or None if it has not run."""
    return next(filter(is_base, kinds(setting)), None)


def window_of(setting: Setting, alpha: float) -> Kind | None:
    """Returns the kind of the plain window of strength `alpha`, or None."""
    return next((k for k in kinds(setting) if is_window(k, alpha)), None)


def is_mean(kind: Kind) -> bool:
    """Returns whether this gives all layers of a stack one update, their mean."""
    return kind.control == "full_average"


def mean_of(setting: Setting) -> Kind | None:
    """Returns the kind of the mean over depth, or None if it has not run."""
    return next(filter(is_mean, kinds(setting)), None)


def has_controls(kind: Kind) -> bool:
    """Returns whether both controls are made for this arm: the plain windows have them.

    Others couple by the updates themselves, or keep the norms anyway.
    """
    return is_smoothed(kind) and (kind.operator, kind.variant) == ("window", "standard")


def control_of(setting: Setting, kind: Kind | None, control: str) -> Kind | None:
    """Returns a kind's own control, or None if it has none or this has not run.

    Coupling in random order is a control, and is itself controlled by norm-matched.
    """
    if kind is None or kind.control in (control, "norm_matched"):
        return None
    is_controlled = has_controls(kind) or kind.control is not None
    return _twin(setting, kind, control) if is_controlled else None


def _twin(setting: Setting, kind: Kind, control: str | None) -> Kind | None:
    """Returns the kind with the same coupling as another, but as this control."""
    same = [k for k in kinds(setting) if k[1:-1] == kind[1:-1]]  # but name and control
    return next((k for k in same if k.control == control), None)


def preserving_of(setting: Setting) -> Kind | None:
    """Returns the norm-preserving arm, the one of full scope if it ran."""
    found = [
        k for k in kinds(setting) if is_smoothed(k) and k.variant == "norm_preserving"
    ]
    return min(found, key=lambda kind: kind.scope != "full", default=None)


def best_screened_of(setting: Setting) -> Kind | None:
    """Returns the smoothed arm with the best mean over the screen, each at its best."""

    def level(kind: Kind) -> float:
        return min(_level(arm) for arm in setting.screen if arm.kind == kind)

    smoothed = filter(is_smoothed, kinds(setting))
    tuned = [kind for kind in smoothed if tuned_rate(setting, kind) is not None]
    return min(tuned, key=level, default=None)


def kinds(setting: Setting) -> list[Kind]:
    """Returns every kind that has run: the base, smoothed arms, controls."""
    found = list(dict.fromkeys(a.kind for a in (*setting.screen, *setting.confirm)))

    def place(kind: Kind) -> tuple[bool, bool]:
        return kind.control is not None, not is_base(kind)

    return sorted(found, key=place)


# ── rates and arms ───────────────────────────────────────────────────────────


def tuned_rate(setting: Setting, kind: Kind) -> TunedRate | None:
    """Returns the rate with the best mean over the screening seeds.

    Of several the lowest. A rate at which a seed diverged is a rate that was tried, and
    never the best.
    """
    levels = {
        arm.learning_rate: _level(arm) for arm in setting.screen if arm.kind == kind
    }
    rate = min(sorted(levels), key=lambda rate: levels[rate], default=math.nan)
    if not math.isfinite(levels.get(rate, math.inf)):
        return None
    return TunedRate(rate, rate in (min(levels), max(levels)))


def arm_at(arms: Sequence[Arm], kind: Kind | None, rate: float) -> Arm | None:
    """Returns the arm of one kind and learning rate, or None if it has not run."""
    for arm in arms:
        if arm.kind == kind and math.isclose(arm.learning_rate, rate, rel_tol=1e-6):
            return arm
    return None


def confirmed(setting: Setting, kind: Kind | None) -> Arm | None:
    """Returns the confirmation of a kind at its best rate there, or None.

    None as well as long as the best rate of its screen is not confirmed; of a control
    that has no screen, that of the arm it controls.
    """
    return _best(setting, kind, [arm for arm in setting.confirm if arm.kind == kind])


def best_rate(setting: Setting, kind: Kind) -> TunedRate | None:
    """Returns a kind's best rate: of the confirmation, before there is one the screen.

    It is at an end where neither stage tried one beyond it.
    """
    best = confirmed(setting, kind)
    if best is None:
        return tuned_rate(setting, kind)
    tried = [
        arm.learning_rate
        for arm in (*setting.screen, *setting.confirm)
        if arm.kind == kind
    ]
    return TunedRate(best.learning_rate, best.learning_rate in (min(tried), max(tried)))


def _best(setting: Setting, kind: Kind | None, arms: Sequence[Arm]) -> Arm | None:
    if kind is None:
        return None
    is_screened = any(arm.kind == kind for arm in setting.screen)
    screened = kind if is_screened else _twin(setting, kind, None)
    tuned = None if screened is None else tuned_rate(setting, screened)
    if tuned is None or arm_at(setting.confirm, kind, tuned.rate) is None:
        return None
    return min(arms, key=lambda arm: (_level(arm), arm.learning_rate), default=None)


# ── differences ──────────────────────────────────────────────────────────────


def difference(arm: Arm | None, other: Arm | None) -> PairedDifference | None:
    """Returns `arm` minus `other` over the seeds of both; None if one has not run."""
    if arm is None or other is None:
        return None
    shared = sorted(set(arm.seeds) & set(other.seeds))
    if not shared:
        return None

    def losses(of: Arm) -> np.ndarray:
        return np.array([of.losses[of.seeds.index(seed)] for seed in shared])

    return paired_difference(losses(arm), losses(other))


def best_against_best(
    setting: Setting, kind: Kind | None, other: Kind | None
) -> PairedDifference | None:
    """Returns the difference of two kinds, each at the best rate of those of both."""
    return difference(*best_pair(setting, kind, other))


def best_pair(
    setting: Setting, kind: Kind | None, other: Kind | None
) -> tuple[Arm | None, Arm | None]:
    """Returns two kinds at the best rates of those of both, None for what has not run.

    The mean over depth, and its control, are compared with each at its best rate of all
    it has.
    """
    if kind is None or other is None:
        return None, None
    ours, theirs = _comparable(setting, kind, other)
    return _best(setting, kind, ours), _best(setting, other, theirs)


def best_pair_by(
    setting: Setting, kind: Kind | None, other: Kind | None, metric: Metric
) -> tuple[Arm | None, Arm | None]:
    """Returns the same by a metric that the arms were not tuned by.

    Over the same rates, but each at the one where this metric is better: two rates that
    are as good by the first metric need not be by this one.
    """
    pair = best_pair(setting, kind, other)
    if kind is None or other is None or metric == setting.metric or None in pair:
        return pair
    ours, theirs = (
        min(
            (arm._replace(losses=arm.others[metric.name]) for arm in arms),
            key=lambda arm: (_level(arm), arm.learning_rate),
        )
        for arms in _comparable(setting, kind, other)
    )
    return ours, theirs


def _comparable(
    setting: Setting, kind: Kind, other: Kind
) -> tuple[list[Arm], list[Arm]]:
    """Returns the confirmed arms of two kinds at the rates of both."""
    ours, theirs = (
        [arm for arm in setting.confirm if arm.kind == of] for of in (kind, other)
    )
    if "mean" in (kind.operator, other.operator):
        return ours, theirs
    return _shared(ours, theirs), _shared(theirs, ours)


def _shared(arms: Sequence[Arm], others: Sequence[Arm]) -> list[Arm]:
    """Returns the arms at whose rate there is one of the others, all of one kind."""
    return [
        arm
        for arm in arms
        if any(arm_at(others, other.kind, arm.learning_rate) for other in others[:1])
    ]


def at_base_rate(setting: Setting, kind: Kind) -> PairedDifference | None:
    """Returns the difference to the base, both at the base's best rate."""
    base = confirmed(setting, base_of(setting))
    if base is None:
        return None
    return difference(arm_at(setting.confirm, kind, base.learning_rate), base)


def at_screened_rates(setting: Setting, kind: Kind) -> PairedDifference | None:
    """Returns the difference to the base, each at the best rate of its own screen."""
    arms = [
        arm_at(setting.confirm, of, tuned.rate)
        for of in (kind, base_of(setting))
        for tuned in [None if of is None else tuned_rate(setting, of)]
        if tuned is not None
    ]
    return difference(*arms) if len(arms) == 2 else None


def is_better(found: PairedDifference | None) -> bool:
    """Returns whether the whole interval is on the better side."""
    return found is not None and found.mean + found.half_width < 0


def is_worse(found: PairedDifference | None) -> bool:
    """Returns whether the whole interval is on the worse side."""
    return found is not None and found.mean - found.half_width > 0


def has_diverged(found: PairedDifference | None) -> bool:
    """Returns whether a run of either arm diverged."""
    return found is not None and math.isnan(found.mean)


def p_value(found: PairedDifference) -> float:
    """Returns the two-sided p-value of the t-test that the interval belongs to.

    It is 1 for differences that have no interval.
    """
    freedom = found.num_seeds - 1
    if math.isnan(found.half_width) or found.mean == 0:
        return 1.0
    if found.half_width == 0:
        return 0.0
    error = found.half_width / scipy.stats.t.ppf(0.975, freedom)
    return float(2 * scipy.stats.t.sf(abs(found.mean) / error, freedom))


def survive_holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Returns which hypotheses Holm's step-down procedure rejects at `level`."""
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def _level(arm: Arm) -> float:
    mean = float(np.mean(arm.losses))
    return math.inf if math.isnan(mean) else mean
