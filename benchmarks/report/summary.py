"""All settings at a glance: counts in a few sentences, and tables of window(0.2)."""

from collections.abc import Iterator, Sequence

from benchmarks.comparison import PairedDifference, format_table
from benchmarks.report.comparisons import (
    CONTROLS,
    base_of,
    best_against_best,
    control_of,
    is_better,
    is_worse,
)
from benchmarks.report.tables import difference_text
from benchmarks.report.verdicts import Outcome, Verdict

_TASKS = {
    "lm": "language model",
    "vit": "images",
    "diffusion": "diffusion",
    "rl": "reinforcement learning",
    "reverse": "reversing",
}


def contrasts(outcome: Outcome) -> list[PairedDifference | None]:
    """Returns window(0.2) minus the base, norm-matched and shuffled."""
    setting, window = outcome.setting, outcome.window.kind
    others = [base_of(setting)]
    others += [control_of(setting, window, of) for of in CONTROLS]
    return [best_against_best(setting, window, other) for other in others]


def by_task(of_all: Sequence[Outcome]) -> str:
    """Returns a sentence per task: in how many settings window(0.2) is better."""
    sentences = []
    for task in dict.fromkeys(outcome.setting.task for outcome in of_all):
        found = [contrasts(of) for of in of_all if of.setting.task == task]
        to_base, to_matched, to_shuffled = zip(*found, strict=True)
        worse = sum(map(is_worse, to_base))
        sentences.append(
            f"- **{_TASKS[task]}** (`{task}`): better than the base in "
            f"{sum(map(is_better, to_base))} of {_settings(len(found))}"
            + (f", worse in {worse}" if worse else "")
            + f"; better than norm-matched in {sum(map(is_better, to_matched))}, than "
            f"shuffled in {sum(map(is_better, to_shuffled))}."
        )
    return "\n".join(sentences)


def window_table(of_all: Sequence[Outcome]) -> str:
    """Returns the table of the picture, with the verdicts."""
    rows = []
    for outcome in of_all:
        setting, window, best = outcome.setting, outcome.window, outcome.best
        texts = [difference_text(setting.metric, of) for of in contrasts(outcome)]
        texts[0] += "†" if window.kind in outcome.survivors else ""
        also = "" if best == window else f"{best.kind.name}: {best.text}"
        rows.append([setting.name, *texts, window.text, also or window.kind.name])
    header = ["setting", "minus base", "minus norm-matched", "minus shuffled"]
    header += ["verdict on window(0.2)", "best screened arm"]
    return format_table(header, rows)


def in_short(of_all: Sequence[Outcome]) -> str:
    """Returns the verdict over all settings, and what it rests on."""
    return " ".join([_sentence(of_all), _smaller(of_all), *_chance(of_all)])


def _sentence(of_all: Sequence[Outcome]) -> str:
    window = [is_better(of.differences[of.window.kind]) for of in of_all]
    best = sum(is_better(of.differences[of.best.kind]) for of in of_all)
    neighbors = sum(
        Verdict.NEIGHBORS in (of.window.verdict, of.best.verdict) for of in of_all
    )
    return (
        "At tuned learning rates window(0.2) beats the base optimizer in "
        f"{_counts(of_all, window)}, and the arm that did best in the screen in {best}."
        " **That it is the coupling of neighbors which helps is shown "
        f"{f'in {neighbors}' if neighbors else 'nowhere'}**."
    )


def _smaller(of_all: Sequence[Outcome]) -> str:
    """Where updates as small as the window's, without its coupling, help as well."""
    wins = []
    for of in of_all:
        control = control_of(of.setting, of.window.kind, "norm_matched")
        to_base = best_against_best(of.setting, control, base_of(of.setting))
        wins.append(is_better(to_base))
    return (
        "**Updates of the blocks as small as window(0.2) makes them, without any "
        f"coupling**, beat the base in {_counts(of_all, wins)}."
    )


def _chance(of_all: Sequence[Outcome]) -> Iterator[str]:
    """How many intervals exclude 0 and would by chance, and what is provisional."""
    found = [of for outcome in of_all for of in outcome.differences.values() if of]
    better, worse = sum(map(is_better, found)), sum(map(is_worse, found))
    survivors = sum(len(outcome.survivors) for outcome in of_all)
    yield (
        f"Of the {len(found)} comparisons of main arms with the base, the 95 % "
        f"interval excludes 0 in {better + worse} ({better} better, {worse} worse), "
        f"after Holm's correction in {survivors}; by chance it would in one of twenty, "
        f"{len(found) / 20:.1f} of them."
    )
    ends = []
    for of in of_all:
        if untuned := dict.fromkeys((*of.window.untuned, *of.best.untuned)):
            ends.append(f"{of.setting.name} ({', '.join(untuned)})")
    if ends:
        yield (
            "Provisional, since the best rate of an arm under the verdict is at an end "
            f"of those tried: {'; '.join(ends)}."
        )


def _counts(of_all: Sequence[Outcome], wins: Sequence[bool]) -> str:
    """Such as `7 of 12 settings (lm 6 of 9, vit 1 of 3)`."""
    of_tasks: dict[str, list[bool]] = {}
    for outcome, win in zip(of_all, wins, strict=True):
        of_tasks.setdefault(outcome.setting.task, []).append(win)
    each = (f"{task} {sum(of)} of {len(of)}" for task, of in of_tasks.items())
    return f"{sum(wins)} of {_settings(len(wins))} ({', '.join(each)})"


def _settings(count: int) -> str:
    return f"{count} setting" if count == 1 else f"{count} settings"
