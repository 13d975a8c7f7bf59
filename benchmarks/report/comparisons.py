"""Comparisons of tuned arms: rates by the screen, differences by the confirmation.

The screen says at which rates the arms are confirmed, each arm at the best rates of
all. Two arms are compared over the rates that both were confirmed at, each at the one
where its mean over these seeds is better: the few seeds of a screen take neighboring
rates for one another, and the difference of two rates would pass for one of arms. The
mean over depth needs far higher rates than others, so it and what it is compared with
have each the rates that they were confirmed at.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from benchmarks.comparison import PairedDifference, paired_difference
from benchmarks.report.records import Arm, Kind, Metric, Setting

CONTROLS = ("norm_matched", "shuffled_depth")


# ── which arm is which ───────────────────────────────────────────────────────


def kinds(setting: Setting) -> list[Kind]:
    """Returns every kind that has run: the base, smoothed arms, controls."""
    found = dict.fromkeys(arm.kind for arm in (*setting.screen, *setting.confirm))
    return sorted(found, key=lambda kind: (kind.control is not None, not is_base(kind)))


def is_base(kind: Kind) -> bool:
    """Returns whether this is the optimizer without smoothing."""
    return kind.operator == "none" and kind.control is None


def is_smoothed(kind: Kind) -> bool:
    """Returns whether this couples neighbors, rather than being a base or control."""
    return kind.operator != "none" and kind.control is None


def base_of(setting: Setting) -> Kind:
    """Returns the base arm's kind."""
    return next(filter(is_base, kinds(setting)))


def window_of(setting: Setting, alpha: float, scope: str = "full") -> Kind | None:
    """Returns the kind of the plain window of strength `alpha`, None if none ran."""
    wanted = ("window", alpha, "standard", scope, None)
    return next((kind for kind in kinds(setting) if kind[1:] == wanted), None)


def preserving_of(setting: Setting) -> Kind:
    """Returns the norm-preserving arm, the one of full scope if it ran."""
    found = [k for k in kinds(setting) if k.variant == "norm_preserving"]
    return min(found, key=lambda kind: kind.scope != "full")


def mean_of(setting: Setting) -> Kind | None:
    """Returns what gives all layers of a stack one update, their mean; None if none."""
    return next((k for k in kinds(setting) if k.control == "full_average"), None)


def best_screened_of(setting: Setting) -> Kind:
    """Returns the smoothed arm with the best mean over the screen, each at its best."""
    smoothed = (arm for arm in setting.screen if is_smoothed(arm.kind))
    return min(smoothed, key=lambda arm: arm.level).kind


def control_of(setting: Setting, kind: Kind, control: str) -> Kind | None:
    """Returns a kind's own control, or None if it has none.

    The plain windows have both, others couple by the updates themselves or keep the
    norms anyway. What couples in random order is itself controlled by norm-matched.
    """
    if kind.control in (control, "norm_matched"):
        return None
    return _twin(setting, kind, control)


def _twin(setting: Setting, kind: Kind, control: str | None) -> Kind | None:
    """The kind with the same coupling, but as this control."""
    same = (k for k in kinds(setting) if k[1:-1] == kind[1:-1])  # but name and control
    return next((k for k in same if k.control == control), None)


# ── rates ────────────────────────────────────────────────────────────────────


class TunedRate(NamedTuple):
    """A best rate, and whether it is the lowest or highest of those tried."""

    rate: float
    at_an_end: bool


def _best(arms: Iterable[Arm]) -> Arm:
    return min(arms, key=lambda arm: (arm.level, arm.learning_rate))


def tuned_rate(setting: Setting, kind: Kind) -> TunedRate:
    """Returns the rate with the best mean over the screening seeds.

    Of a control that has no screen, that of the arm it controls.
    """
    arms = [arm for arm in setting.screen if arm.kind == kind]
    if not arms:
        kind = _twin(setting, kind, None) or kind
        arms = [arm for arm in setting.screen if arm.kind == kind]
    return _with_ends(_best(arms), arms)


def best_rate(setting: Setting, kind: Kind) -> TunedRate:
    """Returns a kind's best rate of the confirmation, without one that of the screen.

    It is at an end where neither stage tried one beyond it.
    """
    best = confirmed(setting, kind)
    if best is None:
        return tuned_rate(setting, kind)
    tried = [a for a in (*setting.screen, *setting.confirm) if a.kind == kind]
    return _with_ends(best, tried)


def _with_ends(best: Arm, tried: Sequence[Arm]) -> TunedRate:
    rates = [arm.learning_rate for arm in tried]
    return TunedRate(best.learning_rate, best.learning_rate in (min(rates), max(rates)))


def confirmed(setting: Setting, kind: Kind) -> Arm | None:
    """Returns the confirmation of a kind at its best rate there.

    None for what was confirmed at other rates than the best of its screen.
    """
    if arm_at(setting.confirm, kind, tuned_rate(setting, kind).rate) is None:
        return None
    return _best(arm for arm in setting.confirm if arm.kind == kind)


def arm_at(arms: Sequence[Arm], kind: Kind, rate: float) -> Arm | None:
    """Returns the arm of one kind and learning rate, or None if it has not run."""
    for arm in arms:
        if arm.kind == kind and math.isclose(arm.learning_rate, rate, rel_tol=1e-6):
            return arm
    return None


# ── differences ──────────────────────────────────────────────────────────────


def difference(arm: Arm | None, other: Arm | None) -> PairedDifference | None:
    """Returns `arm` minus `other` over the same seeds; None if one has not run."""
    if arm is None or other is None:
        return None
    assert arm.seeds == other.seeds
    return paired_difference(arm.losses, other.losses)


def best_pair(
    setting: Setting, kind: Kind, other: Kind, metric: Metric | None = None
) -> tuple[Arm, Arm] | None:
    """Returns two kinds at the best rates of those of both, None without such rates.

    By another metric than the one of the setting, both are at the rate where that
    metric is better: two rates that are as good by one need not be by the other.
    """
    if not confirmed(setting, kind) or not confirmed(setting, other):
        return None
    ours, theirs = (
        [arm for arm in setting.confirm if arm.kind == of] for of in (kind, other)
    )
    if "mean" not in (kind.operator, other.operator):
        rates = [{arm.learning_rate for arm in of} for of in (ours, theirs)]
        ours, theirs = (
            [arm for arm in of if arm.learning_rate in set.intersection(*rates)]
            for of in (ours, theirs)
        )
    if not ours or not theirs:
        return None
    if metric is not None and metric != setting.metric:
        ours, theirs = (
            [arm._replace(losses=arm.others[metric.name]) for arm in of]
            for of in (ours, theirs)
        )
    return _best(ours), _best(theirs)


def best_against_best(
    setting: Setting, kind: Kind | None, other: Kind | None
) -> PairedDifference | None:
    """Returns the difference of two kinds, each at the best rate of those of both."""
    if kind is None or other is None:
        return None
    pair = best_pair(setting, kind, other)
    return None if pair is None else difference(*pair)


def at_base_rate(setting: Setting, kind: Kind) -> PairedDifference | None:
    """Returns the difference to the base, both at the base's best rate."""
    rate = best_rate(setting, base_of(setting)).rate
    return difference(
        *(arm_at(setting.confirm, of, rate) for of in (kind, base_of(setting)))
    )


def at_screened_rates(setting: Setting, kind: Kind) -> PairedDifference | None:
    """Returns the difference to the base, each at the best rate of its own screen."""
    if not any(arm.kind == kind for arm in setting.screen):
        return None
    return difference(
        *(
            arm_at(setting.confirm, of, tuned_rate(setting, of).rate)
            for of in (kind, base_of(setting))
        )
    )


def is_better(found: PairedDifference | None) -> bool:
    """Returns whether the whole interval is on the better side."""
    return found is not None and found.mean + found.half_width < 0


def is_worse(found: PairedDifference | None) -> bool:
    """Returns whether the whole interval is on the worse side."""
    return found is not None and found.mean - found.half_width > 0


def p_value(found: PairedDifference) -> float:
    """Returns the two-sided p-value of the t-test that the interval belongs to."""
    freedom = found.num_seeds - 1
    error = found.half_width / scipy.stats.t.ppf(0.975, freedom)
    return float(2 * scipy.stats.t.sf(abs(found.mean) / error, freedom))


def survive_holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Returns which hypotheses Holm's step-down procedure rejects at `level`."""
    order = np.argsort(p_values, kind="stable")
    bounds = level / (len(p_values) - np.arange(len(p_values)))
    kept = np.asarray(p_values)[order] > bounds
    rejected = np.empty(len(p_values), bool)
    rejected[order] = ~np.logical_or.accumulate(kept)
    return rejected.tolist()
