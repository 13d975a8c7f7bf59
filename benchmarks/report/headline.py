"""The verdict over all settings, in sentences made of the numbers."""

from collections.abc import Sequence

from benchmarks.comparison import PairedDifference, format_difference
from benchmarks.report.comparisons import is_better, is_worse
from benchmarks.report.names import run_name, setting_name
from benchmarks.report.verdicts import Outcome, Verdict

_HELPS = (Verdict.NEIGHBORS, Verdict.ANY_COUPLING, Verdict.SMALLER_STEP)
_OPEN = (Verdict.UNFINISHED, Verdict.DIVERGED)


def headline(of_all: Sequence[Outcome]) -> str:
    """Returns the verdict, with the counts that it rests on."""
    done = [outcome for outcome in of_all if outcome.verdict not in _OPEN]
    paragraphs = [
        " ".join([*_gains(done), *_reasons(done), *_harm(done)]) if done else "",
        _depths(done),
        " ".join([*_chance(of_all), *_unsettled(of_all)]),
    ]
    return "\n\n".join(filter(None, paragraphs))


def _gains(done: Sequence[Outcome]) -> list[str]:
    """How many settings have a gain at tuned rates, and how large it is."""
    counts = [
        sum(
            kind is not None and is_better(outcome.differences[kind])
            for outcome in done
            for kind in [outcome.roles[role]]
        )
        for role in range(4)
    ]
    sentences = [] if any(counts) else ["**No setting shows a gain at tuned rates.**"]
    sentences.append(
        f"With learning rates tuned for both, window(0.2) beats the base optimizer in "
        f"{counts[1]} of {_count(len(done), 'setting')} (the 95 % interval of the "
        f"paired difference excludes 0), window(0.1) in {counts[0]}, the "
        f"norm-preserving arm in {counts[2]}, and the arm that did best in the screen "
        f"in {counts[3]}."
    )
    helped = [outcome for outcome in done if outcome.verdict in _HELPS]
    if helped:
        sizes = "; ".join(f"{setting_name(o.setting)}: {_shown(o)}" for o in helped)
        sentences.append(f"The gains of window(0.2): {sizes}.")
    return sentences


def _reasons(done: Sequence[Outcome]) -> list[str]:
    """What the gains of window(0.2) come from, by the controls."""
    helped = [outcome for outcome in done if outcome.verdict in _HELPS]
    neighbors, any_coupling, smaller_step = (
        [outcome for outcome in done if outcome.verdict is verdict]
        for verdict in _HELPS
    )
    if not helped:
        return ["So there is no evidence here that coupling neighbors helps."]
    sentences = []
    if neighbors:
        sentences.append(
            f"**Coupling neighbors itself helps in {len(neighbors)} of them**, where "
            "it also beats norm-matched (the smaller step without coupling) and "
            f"shuffled (coupling at random): {_names(neighbors)}. Of these gains over "
            f"the base, {_surviving(neighbors)} survive Holm's correction (see below)."
        )
    else:
        sentences.append(
            "**In none of them is there evidence that coupling neighbors itself "
            "helps**, which would beat norm-matched (the smaller step without "
            "coupling) and shuffled (coupling at random) too."
        )
    told = []
    if smaller_step:
        told.append(
            f"in {len(smaller_step)} the gain is not told apart from what a smaller "
            f"step gives ({_names(smaller_step)})"
        )
    if any_coupling:
        told.append(
            f"in {len(any_coupling)} not from what coupling layers at random gives "
            f"({_names(any_coupling)})"
        )
    return sentences + ([_sentence("; ".join(told))] if told else [])


def _harm(done: Sequence[Outcome]) -> list[str]:
    hurt = [outcome for outcome in done if outcome.verdict is Verdict.HURTS]
    same = sum(outcome.verdict is Verdict.NOTHING for outcome in done)
    undecided = f"in {same} its interval includes 0" if same else ""
    if not hurt:
        return [
            _sentence("; ".join(filter(None, ["window(0.2) hurts in none", undecided])))
        ]
    where = "; ".join(f"{setting_name(o.setting)}: {_shown(o)}" for o in hurt)
    harm = f"window(0.2) hurts in {len(hurt)} ({where})"
    return [_sentence(f"{harm}; {undecided}" if same else harm)]


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
        values = ", ".join(f"{_shown(o)} at {o.setting.layers}" for o in by_depth)
        clauses.append(f"- {name}: {values} layers; {_trend(by_depth)}")
    if not clauses:
        return ""
    return "By depth, window(0.2) minus the base:\n\n" + "\n".join(clauses)


def _trend(by_depth: Sequence[Outcome]) -> str:
    shallow, deep = _window(by_depth[0]), _window(by_depth[-1])
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
        f"These are {_count(len(found), 'comparison')} with the base: with 95 % "
        f"intervals one in twenty ({len(found) / 20:.1f}) would exclude 0 by chance; "
        f"{better + worse} do ({better} better, {worse} worse), {survivors} of them "
        "after Holm's correction."
    ]


def _unsettled(of_all: Sequence[Outcome]) -> list[str]:
    """What is not counted, and what counts with a reservation."""
    sentences = []
    for verdict, says in (
        (Verdict.UNFINISHED, "not finished, and not counted above"),
        (Verdict.DIVERGED, "not counted above, since runs that they rest on diverged"),
    ):
        found = [outcome for outcome in of_all if outcome.verdict is verdict]
        if found:
            settings = f"{_count(len(found), 'setting')} {_be(found)}"
            sentences.append(_sentence(f"{settings} {says}: {_names(found)}"))
    ends = [outcome for outcome in of_all if outcome.untuned]
    ends = [outcome for outcome in ends if outcome.verdict not in _OPEN]
    if ends:
        sentences.append(
            f"In {_count(len(ends), 'setting')} the best rate of an arm under the "
            "verdict is at an end of the rates screened, so that the verdict is "
            "provisional: "
            f"{_names(ends)}."
        )
    return sentences


def _window(outcome: Outcome) -> PairedDifference | None:
    kind = outcome.roles[1]
    return None if kind is None else outcome.differences[kind]


def _surviving(found: Sequence[Outcome]) -> int:
    return sum(outcome.roles[1] in outcome.survivors for outcome in found)


def _shown(outcome: Outcome) -> str:
    found = _window(outcome)
    if found is None:
        return "not run"
    sign = outcome.setting.metric.sign
    return format_difference(found._replace(mean=sign * found.mean))


def _names(found: Sequence[Outcome]) -> str:
    return "; ".join(setting_name(outcome.setting) for outcome in found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _be(found: Sequence[Outcome]) -> str:
    return "is" if len(found) == 1 else "are"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
