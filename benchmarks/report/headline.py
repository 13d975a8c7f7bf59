"""The verdict over all settings: one sentence, and what helps where."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from benchmarks.comparison import PairedDifference, format_difference
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    control_of,
    is_better,
    is_worse,
)
from benchmarks.report.names import run_name, setting_name
from benchmarks.report.records import Kind, Setting
from benchmarks.report.verdicts import Judgment, Outcome, Verdict

_OPEN = (Verdict.UNFINISHED, Verdict.DIVERGED)

# What a verdict means: in a few words, and by the comparisons.
_MEANINGS = {
    Verdict.NEIGHBORS: (
        "Coupling neighbors helps",
        "better than the base, than updates as small without coupling (norm-matched) "
        "and than coupling in random order (shuffled)",
    ),
    Verdict.COUPLING: (
        "Coupling helps, but not shown to be that of neighbors",
        "better than the base and than norm-matched, not told apart from shuffled",
    ),
    Verdict.SMALLER: (
        "It helps, and smaller updates of the blocks help too",
        "better than the base, as norm-matched is, and not told apart from it",
    ),
    Verdict.UNCLEAR: (
        "It helps, and why is not told apart",
        "better than the base; norm-matched is told apart from neither",
    ),
    Verdict.NO_CONTROLS: ("It helps", "an arm that has no controls"),
    Verdict.NOTHING: ("No difference shown", "the interval includes 0"),
    Verdict.HURTS: ("It hurts", "worse than the base"),
}


def headline(of_all: Sequence[Outcome]) -> str:
    """Returns the verdict, with the numbers that it rests on."""
    done = _done(of_all)
    parts = [" ".join([*_chance(of_all), *_unsettled(of_all)])]
    if done:
        lines = (*_verdicts(done), *_smaller(done), *_by_depth(done))
        parts = [_sentence(done), "\n".join(f"- {line}" for line in lines), *parts]
    return "\n\n".join(parts)


def in_short(of_all: Sequence[Outcome]) -> str:
    """Returns the verdict without saying where."""
    done = _done(of_all)
    sentences = [_sentence(done), *_smaller(done)] if done else []
    return " ".join([*sentences, *_chance(of_all), *_unsettled(of_all)])


def _done(of_all: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in of_all if outcome.window.verdict not in _OPEN]


def _counted(done: Sequence[Outcome]) -> list[Outcome]:
    """The full runs, where there are any: others are chosen after these are seen."""
    full = [outcome for outcome in done if outcome.setting.preset == "full"]
    return full or list(done)


def _sentence(done: Sequence[Outcome]) -> str:
    done = _counted(done)
    better = [is_better(_to_base(outcome, outcome.window.kind)) for outcome in done]
    best = sum(is_better(_to_base(outcome, outcome.best.kind)) for outcome in done)
    neighbors = sum(
        Verdict.NEIGHBORS in {judgment.verdict for judgment in _judged(outcome)}
        for outcome in done
    )
    counts = (
        "at tuned learning rates window(0.2) beats the base optimizer in "
        f"{sum(better)} of {_settings(len(done))} ({_by_task(done, better)}), and the "
        f"arm that did best in the screen in {best}"
    )
    if not any(map(is_better, _differences(done))):
        return f"**No setting shows a gain at tuned rates**: {counts}."
    shown = f"in {neighbors}" if neighbors else "nowhere"
    return (
        f"{counts[0].upper()}{counts[1:]}. **That it is the coupling of neighbors "
        f"which helps is shown {shown}**."
    )


def _settings(count: int) -> str:
    return f"{count} setting" if count == 1 else f"{count} settings"


def _by_task(done: Sequence[Outcome], wins: Sequence[bool]) -> str:
    """Such as `lm 6 of 9, vit 0 of 3`: settings of one task are alike."""
    of_tasks: dict[str, list[bool]] = {}
    for outcome, win in zip(done, wins, strict=True):
        of_tasks.setdefault(outcome.setting.task, []).append(win)
    return ", ".join(f"{task} {sum(of)} of {len(of)}" for task, of in of_tasks.items())


def _smaller(done: Sequence[Outcome]) -> Iterator[str]:
    """Where updates as small as the window's, without its coupling, help as well."""
    done, wins = _counted(done), []
    for outcome in done:
        setting = outcome.setting
        control = control_of(setting, outcome.window.kind, "norm_matched")
        wins.append(is_better(best_against_best(setting, control, base_of(setting))))
    yield (
        "**Updates of the blocks as small as window(0.2) makes them, without any "
        f"coupling**, beat the base in {sum(wins)} of {_settings(len(done))} "
        f"({_by_task(done, wins)})."
    )


def _verdicts(done: Sequence[Outcome]) -> Iterator[str]:
    """What window(0.2) and the best screened arm do, by verdict."""
    for verdict, (meaning, comparisons) in _MEANINGS.items():
        found = [
            f"{setting_name(outcome.setting)}, {judgment.kind.name} "
            f"({_shown(outcome, judgment.kind)})"
            for outcome in done
            for judgment in _judged(outcome)
            if judgment.verdict is verdict and judgment.kind is not None
        ]
        if found or verdict is Verdict.NEIGHBORS:
            yield f"**{meaning}** ({comparisons}): {'; '.join(found) or 'nowhere'}."


def _by_depth(done: Sequence[Outcome]) -> Iterator[str]:
    """Window(0.2) minus the base from shallow to deep, where there are several."""
    for name, of_run in groupby(done, lambda outcome: run_name(outcome.setting)):
        by_depth = sorted(of_run, key=lambda outcome: outcome.setting.layers)
        if len(by_depth) > 1:
            values = ", ".join(
                f"{_shown(outcome, outcome.window.kind)} at {outcome.setting.layers}"
                for outcome in by_depth
            )
            yield f"**By depth**, window(0.2) in {name}: {values} layers."


def _chance(of_all: Sequence[Outcome]) -> Iterator[str]:
    """How many intervals exclude 0, and how many would without any effect."""
    found = _differences(of_all)
    better, worse = sum(map(is_better, found)), sum(map(is_worse, found))
    survivors = sum(len(outcome.survivors) for outcome in of_all)
    yield (
        f"Of the {len(found)} comparisons of main arms with the base, the 95 % "
        f"interval excludes 0 in {better + worse} ({better} better, {worse} worse), "
        f"after Holm's correction in {survivors}; by chance it would in one of twenty, "
        f"{len(found) / 20:.1f} of them."
    )


def _unsettled(of_all: Sequence[Outcome]) -> Iterator[str]:
    """What is not counted, and what counts with a reservation."""
    for verdict, says in (
        (Verdict.UNFINISHED, "Not finished, and not counted"),
        (Verdict.DIVERGED, "Not counted, since runs that they rest on diverged"),
    ):
        found = [
            setting_name(outcome.setting)
            + (f", {judged.kind.name}" if judged.kind is not None else "")
            for outcome in of_all
            for judged in _judged(outcome)
            if judged.verdict is verdict
        ]
        if found:
            yield f"{says}: {'; '.join(found)}."
    ends = [
        f"{setting_name(outcome.setting)} ({', '.join(names)})"
        for outcome in of_all
        for names in [_untuned(outcome)]
        if names
    ]
    if ends:
        yield (
            "Provisional, since the best rate of an arm under the verdict is at an end "
            f"of those tried: {'; '.join(ends)}."
        )


def _untuned(outcome: Outcome) -> list[str]:
    """The arms under a settled verdict whose best rate is at an end."""
    settled = [judged for judged in _judged(outcome) if judged.verdict not in _OPEN]
    return list(dict.fromkeys(name for judged in settled for name in judged.untuned))


def _judged(outcome: Outcome) -> list[Judgment]:
    """The judgments on window(0.2) and on the best screened arm, if it is another."""
    return list(dict.fromkeys((outcome.window, outcome.best)))


def _differences(of_all: Sequence[Outcome]) -> list[PairedDifference]:
    return [
        found
        for outcome in of_all
        for found in outcome.differences.values()
        if found is not None
    ]


def _to_base(outcome: Outcome, kind: Kind | None) -> PairedDifference | None:
    return None if kind is None else outcome.differences[kind]


def _shown(outcome: Outcome, kind: Kind | None) -> str:
    return _text(outcome.setting, _to_base(outcome, kind))


def _text(setting: Setting, found: PairedDifference | None) -> str:
    if found is None:
        return "not run"
    return format_difference(found._replace(mean=setting.metric.sign * found.mean))
