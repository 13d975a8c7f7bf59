"""What the comparisons of a setting say about depth smoothing."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.comparison import PairedDifference
from benchmarks.report.comparisons import (
    CONTROLS,
    base_of,
    best_against_best,
    best_rate,
    best_screened_of,
    control_of,
    is_better,
    is_worse,
    mean_of,
    p_value,
    preserving_of,
    survive_holm,
    window_of,
)
from benchmarks.report.records import Kind, Setting


class Verdict(enum.Enum):
    """What a smoothed arm does at tuned rates; the value is how a table says it."""

    NEIGHBORS = "coupling neighbors helps"
    COUPLING = "coupling helps; not told apart from shuffled"
    SMALLER = "helps; so do smaller updates"
    UNCLEAR = "helps; why is not told apart"
    NO_CONTROLS = "helps (it has no controls)"
    NOTHING = "no difference shown"
    HURTS = "hurts"


class Judgment(NamedTuple):
    """The verdict on one smoothed arm.

    Attributes:
      kind: the arm.
      verdict: on it.
      untuned: names of the arms under the verdict whose best rate is at an end of
        the rates tried.
    """

    kind: Kind
    verdict: Verdict
    untuned: tuple[str, ...]

    @property
    def text(self) -> str:
        """The verdict, with a ‡ where a rate under it is at an end."""
        return self.verdict.value + ("‡" if self.untuned else "")


class Outcome(NamedTuple):
    """A setting with what its comparisons say.

    Attributes:
      setting: the setting.
      window: the judgment on the window(0.2).
      best: the judgment on the best screened arm, which can be the same.
      differences: to the base, best against best, of the main arms: windows of 0.1 and
        0.2, norm-preserving, the best screened one, the mean over depth.
      survivors: the kinds whose difference survives Holm's correction over all
        differences of all settings.
    """

    setting: Setting
    window: Judgment
    best: Judgment
    differences: dict[Kind, PairedDifference | None]
    survivors: frozenset[Kind] = frozenset()


def verdict_of(setting: Setting, kind: Kind) -> Verdict:
    """Returns the verdict on a smoothed arm, best against best.

    It helps where it is better than the base. Then coupling helps if it is also better
    than updates as small without coupling, and that of neighbors if it is better than
    the same coupling of layers in random order too. Where it is not told apart from
    the smaller updates, these help if they are better than the base themselves. Better
    means that a 95 % interval excludes 0.
    """
    base = base_of(setting)
    to_base = best_against_best(setting, kind, base)
    matched, shuffled = (control_of(setting, kind, control) for control in CONTROLS)
    if is_worse(to_base):
        return Verdict.HURTS
    if not is_better(to_base):
        return Verdict.NOTHING
    if matched is None:
        return Verdict.NO_CONTROLS
    if is_better(best_against_best(setting, kind, matched)):
        beats_shuffled = is_better(best_against_best(setting, kind, shuffled))
        return Verdict.NEIGHBORS if beats_shuffled else Verdict.COUPLING
    smaller_helps = is_better(best_against_best(setting, matched, base))
    return Verdict.SMALLER if smaller_helps else Verdict.UNCLEAR


def outcomes(settings: Sequence[Setting]) -> list[Outcome]:
    """Returns what all settings say, with Holm's correction over all of them.

    Settings of parts, which have no controls, are left out.
    """
    found = [_outcome(setting) for setting in settings if not setting.is_of_parts]
    tests = [
        (index, kind, p_value(difference))
        for index, outcome in enumerate(found)
        for kind, difference in outcome.differences.items()
        if difference is not None
    ]
    survive = survive_holm([p for _, _, p in tests])
    survivors: list[set[Kind]] = [set() for _ in found]
    for (index, kind, _), survives in zip(tests, survive, strict=True):
        if survives:
            survivors[index].add(kind)
    return [
        outcome._replace(survivors=frozenset(of))
        for outcome, of in zip(found, survivors, strict=True)
    ]


def _outcome(setting: Setting) -> Outcome:
    window, best = window_of(setting, 0.2), best_screened_of(setting)
    assert window is not None
    main = (window_of(setting, 0.1), window, preserving_of(setting), best)
    return Outcome(
        setting,
        _judgment(setting, window),
        _judgment(setting, best),
        {
            kind: best_against_best(setting, kind, base_of(setting))
            for kind in (*main, mean_of(setting))
            if kind is not None
        },
    )


def _judgment(setting: Setting, kind: Kind) -> Judgment:
    controls = (control_of(setting, kind, control) for control in CONTROLS)
    under = (of for of in (base_of(setting), kind, *controls) if of is not None)
    untuned = tuple(of.name for of in under if best_rate(setting, of).at_an_end)
    return Judgment(kind, verdict_of(setting, kind), untuned)
