"""Which arm is better: paired contrasts, and what may be said of them.

The rules are those that simulations, with the selection of rates inside, showed to
keep their level: `python -m benchmarks.trial_rules`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradsmooth_optax._extras import needs

LEVEL = 0.05
# Fewer pairs give no verdict: the sign-flip p of 7 seeds that agree is 0.016, but an
# interval from so few hangs on their normality.
FEWEST_SEEDS = 8

HELP, NO_HELP, SAME, UNKNOWN, DEPENDS, DIVERGED, EXPLORATORY = (
    "neighbors help",
    "worse than the base",
    "the same as the base",
    "not told apart",
    "depends on the rate",
    "diverged",
    "exploratory",
)


class Contrast(NamedTuple):
    """Cost of one arm minus that of another with the same seeds: below 0 is better.

    Attributes:
      arm: the name of the first.
      reference: of the second.
      differences: (n,), in units of the metric, of the sign that makes lower better;
        infinite where one of the two diverged, 0 where both did.
      mean: of the differences; NaN where a run diverged, and so the four that follow.
      low: end of the 95 % interval of Student's t for the mean.
      high: the other end.
      inner: half the width of the 90 % interval, for equivalence.
      p: of the paired t-test, two-sided.
      p_flip: two-sided, of flipping signs; of signed ranks where one diverged.
      p_flip_floor: what `p_flip` cannot be below with so few seeds.
      wins: seeds in which the first arm is better.
      diverged: number of runs that diverged, of the first arm and of the second.
    """

    arm: str
    reference: str
    differences: np.ndarray
    mean: float
    low: float
    high: float
    inner: float
    p: float
    p_flip: float
    p_flip_floor: float
    wins: int
    diverged: tuple[int, int]

    @property
    def seeds(self) -> int:
        return len(self.differences)

    @property
    def is_better(self) -> bool:
        return self.p < LEVEL and self.mean < 0

    @property
    def is_worse(self) -> bool:
        return self.p < LEVEL and self.mean > 0

    def is_the_same(self, margin: float | None) -> bool:
        """Whether the 90 % interval lies within ± the margin: two tests at 5 % each."""
        return margin is not None and abs(self.mean) + self.inner < margin


def contrast(
    arm: str, reference: str, costs: np.ndarray, of_reference: np.ndarray
) -> Contrast:
    """Compares two arms seed by seed; what is not finite is worse than all others.

    Args:
      arm: name of the first.
      reference: name of the second.
      costs: (n,), lower is better.
      of_reference: (n,), with the same seeds.
    """
    costs, of_reference = (
        np.where(np.isfinite(x), x, np.inf)
        for x in (np.asarray(costs, float), np.asarray(of_reference, float))
    )
    diverged = int(np.isinf(costs).sum()), int(np.isinf(of_reference).sum())
    with np.errstate(invalid="ignore"):
        differences = np.where(costs == of_reference, 0.0, costs - of_reference)
    n = len(differences)
    floor = min(1.0, 2.0 ** (1 - n))
    wins = int((differences < 0).sum())
    if any(diverged):
        of_student = (math.nan,) * 5
        p_flip = _p_of_flips(_signed_ranks(differences))
    else:
        of_student = _of_student(differences)
        p_flip = _p_of_flips(differences)
    mean, low, high, inner, p = of_student
    return Contrast(
        arm=arm,
        reference=reference,
        differences=differences,
        mean=mean,
        low=low,
        high=high,
        inner=inner,
        p=p,
        p_flip=p_flip,
        p_flip_floor=floor,
        wins=wins,
        diverged=diverged,
    )


def _of_student(differences: np.ndarray) -> tuple[float, ...]:
    """Mean, ends of its 95 % interval, half the 90 % one, and two-sided p."""
    t = needs("scipy.special", "trial", "trial")
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return mean, math.nan, math.nan, math.nan, math.nan
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean) or error == 0:  # equal but for rounding
        return mean, mean, mean, 0.0, 1.0 if mean == 0 else 0.0
    outer, inner = (float(t.stdtrit(n - 1, 1 - x)) * error for x in (0.025, 0.05))
    p = float(2 * t.stdtr(n - 1, -abs(mean) / error))
    return mean, mean - outer, mean + outer, inner, p


def _p_of_flips(values: np.ndarray) -> float:
    """How often random signs put the sum as far from 0; exact up to 14 values."""
    sums = np.abs(_signs(len(values)) @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-9)))


@functools.cache
def _signs(n: int) -> np.ndarray:
    """All signs of n values in rows, those that are there first; of many, some."""
    if n <= 14:
        return 1 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (20_000, n))
    signs[0] = 1
    return signs


def _signed_ranks(differences: np.ndarray) -> np.ndarray:
    ranks = needs("scipy.stats", "trial", "trial").rankdata(np.abs(differences))
    return np.sign(differences) * ranks


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down; NaN counts as 1."""
    p = np.nan_to_num(np.asarray(p_values, float), nan=1.0)
    order = np.argsort(p, kind="stable")
    steps = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


class Finding(NamedTuple):
    """What is found of one operator.

    Attributes:
      operator: its name among the arms.
      word: one of the seven outcomes.
      p: of *neighbors help*: the largest of its three contrasts' p-values, adjusted
        for the number of operators by Holm's method.
      contrasts: {kind of reference: contrast}, at the screen's best rates.
      at_second: the same at the second best rates.
    """

    operator: str
    word: str
    p: float
    contrasts: Mapping[str, Contrast]
    at_second: Mapping[str, Contrast]


def findings(
    contrasts: Mapping[str, Mapping[str, Contrast]],
    at_second: Mapping[str, Mapping[str, Contrast]],
    margin: float | None,
) -> list[Finding]:
    """Applies the rules of the verdict to every operator.

    *Neighbors help* needs it better than the base, than its norm-matched and than its
    shuffled control. Each contrast is at the level, without a correction among the
    three: all of them must hold, so the largest p is that of the whole (an
    intersection-union test). Holm's method corrects for the operators.

    Args:
      contrasts: {operator: {"base", "norm-matched", "shuffled": contrast}}.
      at_second: the same, of both arms at their second best rate.
      margin: half the width of what counts as the same, or None.
    """
    names = list(contrasts)
    p_values = holm([_p_of_help(contrasts[name]) for name in names])
    return [
        Finding(
            name,
            _word(contrasts[name], at_second.get(name, {}), p, margin),
            p,
            contrasts[name],
            at_second.get(name, {}),
        )
        for name, p in zip(names, p_values, strict=True)
    ]


def _p_of_help(of_operator: Mapping[str, Contrast]) -> float:
    """The largest p of the three, 1 where one points the other way or is missing."""
    if len(of_operator) < 3 or not all(c.mean < 0 for c in of_operator.values()):
        return 1.0
    return max(c.p for c in of_operator.values())


def _word(
    at_best: Mapping[str, Contrast],
    at_second: Mapping[str, Contrast],
    p: float,
    margin: float | None,
) -> str:
    to_base = at_best["base"]
    if to_base.seeds < FEWEST_SEEDS:
        return EXPLORATORY
    if any(sum(c.diverged) for c in at_best.values()):
        return DIVERGED
    if p < LEVEL:
        turned = any(not c.mean < 0 for c in at_second.values())
        return DEPENDS if turned else HELP
    if to_base.is_the_same(margin):
        return SAME
    if to_base.is_worse:
        second = at_second.get("base")
        turned = second is not None and not second.mean > 0
        return DEPENDS if turned else NO_HELP
    return UNKNOWN


def as_costs(values: Sequence[Any], better: str) -> np.ndarray:
    """Metrics as costs: lower is better, infinite where there is none."""
    numbers = np.array([math.nan if v is None else v for v in values], float)
    return np.where(
        np.isfinite(numbers), numbers if better == "lower" else -numbers, np.inf
    )
