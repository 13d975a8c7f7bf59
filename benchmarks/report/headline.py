"""The verdict over all settings, in sentences made of the numbers."""

from collections.abc import Callable, Sequence

from benchmarks.comparison import PairedDifference, format_difference
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    is_better,
    is_smoothed,
    is_worse,
    kinds,
    mean_of,
)
from benchmarks.report.names import run_name, setting_name
from benchmarks.report.records import Kind
from benchmarks.report.verdicts import Judgment, Outcome, Verdict

_OPEN = (Verdict.UNFINISHED, Verdict.DIVERGED)

# Settings that a sentence names with their numbers; of more it only says the names.
_FEW = 3


def headline(of_all: Sequence[Outcome]) -> str:
    """Returns the verdict, with the counts that it rests on."""
    done = [outcome for outcome in of_all if outcome.window.verdict not in _OPEN]
    paragraphs = [
        " ".join([*_gains(done), *_reasons(done)]) if done else "",
        _of_mean(done) if done else "",
        _depths(done),
        " ".join([*_chance(of_all), *_unsettled(of_all)]),
    ]
    return "\n\n".join(filter(None, paragraphs))


def _gains(done: Sequence[Outcome]) -> list[str]:
    """In how many settings the smoothed arms have a gain at tuned rates."""
    window, best = _better(done, _window), _better(done, _best)
    worse = [outcome for outcome in done if is_worse(_to_base(outcome, _window))]
    others = [(o, [k.name for k in _smoothed_gains(o)]) for o in done]
    others = [(o, names) for o, names in others if names and o not in (*window, *best)]
    any_gain = bool(window or best or others or _better(done, _mean))
    sentences = [] if any_gain else ["**No setting shows a gain at tuned rates.**"]
    sentences.append(
        f"With learning rates tuned for both, window(0.2) beats the base optimizer in "
        f"{_number(window)} of {_count(len(done), 'setting')}{_where(window, _window)} "
        f"and is worse in {_number(worse)}{_where(worse, _window)}; the smoothed arm "
        f"that did best in the screen beats it in {_number(best)}"
        f"{_where(best, _best)}. To beat means that the 95 % interval of the paired "
        "difference excludes 0."
    )
    if others:
        where = "; ".join(
            f"{setting_name(o.setting)}: {', '.join(n)}" for o, n in others
        )
        sentences.append(
            f"In {len(others)} only another smoothed arm beats it ({where})."
        )
    if not (window or best or others):
        sentences.append("So there is no evidence here that coupling neighbors helps.")
    return sentences


def _reasons(done: Sequence[Outcome]) -> list[str]:
    """What the gains come from, by the controls."""
    arms = [
        (name, role, [_judgment(outcome, role) for outcome in _better(done, role)])
        for name, role in (("window(0.2)", _window), ("the best screened arm", _best))
        if _better(done, role)
    ]
    if not arms:
        return []
    controls = (
        "norm-matched (the smaller step without coupling) and shuffled (coupling "
        "layers at random)"
    )
    neighbors = [
        f"in {_count(len(found), 'setting')} with {name} ({_names(found)}; "
        f"{_surviving(found, role)} after Holm's correction)"
        for name, role, _ in arms
        for found in [_with_verdict(done, role, Verdict.NEIGHBORS)]
        if found
    ]
    sentences = [
        f"**Coupling neighbors itself helps {' and '.join(neighbors)}**, where it "
        f"beats both controls too, {controls}."
        if neighbors
        else "**No gain is shown to come from coupling neighbors itself**: that would "
        f"beat both controls too, {controls}."
    ]
    return sentences + [
        sentence
        for name, _, gains in arms
        for sentence in [_untold(name, [judgment.verdict for judgment in gains])]
        if sentence
    ]


def _untold(name: str, gains: Sequence[Verdict]) -> str:
    """What else the gains of an arm may be."""
    counts = {verdict: gains.count(verdict) for verdict in _UNTOLD if verdict in gains}
    if not counts:
        return ""
    verdict = next(iter(counts))
    if len(gains) == 1:
        return f"The gain of {name} {_UNTOLD[verdict][0]}."
    if counts[verdict] == len(gains):
        return f"The {len(gains)} gains of {name} {_UNTOLD[verdict][1]}."
    told = [f"{counts[of]} {_UNTOLD[of][counts[of] > 1]}" for of in counts]
    return f"Of the {len(gains)} gains of {name}, {', '.join(told)}."


# Said of one gain, and of several, that are not shown to be of coupling neighbors.
_UNTOLD = {
    Verdict.SMALLER_STEP: (
        "is not told apart from what norm-matched gives",
        "are not told apart from what norm-matched gives",
    ),
    Verdict.ANY_COUPLING: (
        "is not told apart from what shuffled gives",
        "are not told apart from what shuffled gives",
    ),
    Verdict.NO_CONTROLS: (
        "is of an arm without controls",
        "are of arms without controls",
    ),
    Verdict.UNFINISHED: (
        "waits for controls that have not finished",
        "wait for controls that have not finished",
    ),
    Verdict.DIVERGED: (
        "is of an arm with a control that diverged",
        "are of arms with a control that diverged",
    ),
}


def _of_mean(done: Sequence[Outcome]) -> str:
    """How the far end compares, where no layer has an update of its own."""
    ran = [outcome for outcome in done if _to_base(outcome, _mean) is not None]
    if not ran:
        return ""
    better = _better(ran, _mean)
    worse = [outcome for outcome in ran if is_worse(_to_base(outcome, _mean))]
    text = (
        "The mean over depth, which gives all layers one and the same update, beats "
        f"the base in {_number(better)} of {_count(len(ran), 'setting')}"
        f"{_where(better, _mean)}"
    )
    if better:
        over_window, over_best = (
            [o for o in better if is_better(_between(o, _mean, role))]
            for role in (_window, _best)
        )
        text += (
            f", and there also window(0.2) in {_number(over_window)} and the best "
            f"screened arm in {_number(over_best)}"
        )
        text = f"**{text}**"
    return (
        f"{text}; it is worse than the base in {_number(worse)}{_where(worse, _mean)}."
    )


def _depths(done: Sequence[Outcome]) -> str:
    """Window(0.2) minus the base from shallow to deep, where there are several."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in done:
        groups.setdefault(outcome.setting[:3], []).append(outcome)
    clauses = []
    for group in groups.values():
        if len(group) < 2:
            continue
        by_depth = sorted(group, key=lambda outcome: outcome.setting.layers)
        name = run_name(by_depth[0].setting)
        values = ", ".join(
            f"{_shown(o, _window)} at {o.setting.layers}" for o in by_depth
        )
        clauses.append(f"- {name}: {values} layers; {_trend(by_depth)}")
    if not clauses:
        return ""
    return "By depth, window(0.2) minus the base:\n\n" + "\n".join(clauses)


def _trend(by_depth: Sequence[Outcome]) -> str:
    shallow, deep = (_to_base(by_depth[end], _window) for end in (0, -1))
    if shallow is None or deep is None:
        return "unfinished"
    if abs(shallow.mean - deep.mean) <= shallow.half_width + deep.half_width:
        return "the intervals of the shallowest and the deepest overlap"
    return f"{'better' if deep.mean < shallow.mean else 'worse'} where deeper"


def _chance(of_all: Sequence[Outcome]) -> list[str]:
    """How many intervals exclude 0, and how many would without any effect."""
    found = [
        difference
        for outcome in of_all
        for difference in outcome.differences.values()
        if difference is not None
    ]
    if not found:
        return ["No comparison is finished."]
    better, worse = sum(map(is_better, found)), sum(map(is_worse, found))
    survivors = sum(len(outcome.survivors) for outcome in of_all)
    return [
        f"The table below has {_count(len(found), 'comparison')} with the base. The "
        f"95 % interval excludes 0 in {better + worse} ({better} better, {worse} "
        f"worse), after Holm's correction in {survivors}; by chance it would in one of "
        f"twenty ({len(found) / 20:.1f})."
    ]


def _unsettled(of_all: Sequence[Outcome]) -> list[str]:
    """What is not counted, and what counts with a reservation."""
    sentences = []
    for verdict, says in (
        (Verdict.UNFINISHED, "not finished, and not counted above"),
        (Verdict.DIVERGED, "not counted above, since runs that they rest on diverged"),
    ):
        found = [outcome for outcome in of_all if outcome.window.verdict is verdict]
        if found:
            settings = f"{_count(len(found), 'setting')} {_be(found)}"
            sentences.append(f"{settings} {says}: {_names(found)}.")
    ends = [
        (outcome, names)
        for outcome in of_all
        if outcome.window.verdict not in _OPEN
        for names in [provisional(outcome)]
        if names
    ]
    if ends:
        sentences.append(
            f"In {_count(len(ends), 'setting')} the best rate of an arm under a "
            "verdict is at an end of the rates tried, so that the verdict is "
            "provisional: "
            + "; ".join(f"{setting_name(o.setting)} ({', '.join(n)})" for o, n in ends)
            + "."
        )
    return sentences


def provisional(outcome: Outcome) -> list[str]:
    """Returns the arms under a settled verdict whose best rate is at an end."""
    settled = [j for j in (outcome.window, outcome.best) if j.verdict not in _OPEN]
    return list(
        dict.fromkeys(name for judgment in settled for name in judgment.untuned)
    )


# ── which arm of a setting a sentence is about ───────────────────────────────

_Role = Callable[[Outcome], Kind | None]


def _window(outcome: Outcome) -> Kind | None:
    return outcome.window.kind


def _best(outcome: Outcome) -> Kind | None:
    return outcome.best.kind


def _mean(outcome: Outcome) -> Kind | None:
    return mean_of(outcome.setting)


def _judgment(outcome: Outcome, role: _Role) -> Judgment:
    return outcome.window if role is _window else outcome.best


def _to_base(outcome: Outcome, role: _Role) -> PairedDifference | None:
    kind = role(outcome)
    return None if kind is None else outcome.differences[kind]


def _between(outcome: Outcome, role: _Role, other: _Role) -> PairedDifference | None:
    return best_against_best(outcome.setting, role(outcome), other(outcome))


def _better(of: Sequence[Outcome], role: _Role) -> list[Outcome]:
    return [outcome for outcome in of if is_better(_to_base(outcome, role))]


def _with_verdict(
    of: Sequence[Outcome], role: _Role, verdict: Verdict
) -> list[Outcome]:
    return [outcome for outcome in of if _judgment(outcome, role).verdict is verdict]


def _smoothed_gains(outcome: Outcome) -> list[Kind]:
    setting = outcome.setting
    return [
        kind
        for kind in filter(is_smoothed, kinds(setting))
        if is_better(best_against_best(setting, kind, base_of(setting)))
    ]


# ── words ────────────────────────────────────────────────────────────────────


def _where(found: Sequence[Outcome], role: _Role) -> str:
    """Returns in which settings, in parentheses, of a few with the differences."""
    if not found:
        return ""
    if len(found) > _FEW:
        return f" ({_names(found)})"

    def named(outcome: Outcome) -> str:
        kind = role(outcome)
        arm = f", {kind.name}" if role is _best and kind is not None else ""
        return f"{setting_name(outcome.setting)}{arm}: {_shown(outcome, role)}"

    return f" ({'; '.join(map(named, found))})"


def _surviving(found: Sequence[Outcome], role: _Role) -> int:
    return sum(role(outcome) in outcome.survivors for outcome in found)


def _shown(outcome: Outcome, role: _Role) -> str:
    found = _to_base(outcome, role)
    if found is None:
        return "not run"
    sign = outcome.setting.metric.sign
    return format_difference(found._replace(mean=sign * found.mean))


def _names(found: Sequence[Outcome]) -> str:
    """Returns the settings, those of one file together: `lm, sgd, 6 and 12 layers`."""
    depths: dict[str, list[str]] = {}
    for outcome in found:
        layers = str(outcome.setting.layers)
        depths.setdefault(run_name(outcome.setting), []).append(layers)
    listed = {
        name: " and ".join(filter(None, [", ".join(of[:-1]), of[-1]]))
        for name, of in depths.items()
    }
    return "; ".join(f"{name}, {of} layers" for name, of in listed.items())


def _number(found: Sequence[Outcome]) -> str:
    return str(len(found)) if found else "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _be(found: Sequence[Outcome]) -> str:
    return "is" if len(found) == 1 else "are"
