"""The tables of one setting, and those of the paper's and other choices."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.comparison import PairedDifference, format_difference, format_table
from benchmarks.report.comparisons import (
    CONTROLS,
    arm_at,
    at_base_rate,
    at_screened_rates,
    base_of,
    best_against_best,
    best_pair,
    best_rate,
    confirmed,
    control_of,
    difference,
    is_base,
    is_better,
    is_smoothed,
    is_worse,
    kinds,
    tuned_rate,
    window_of,
)
from benchmarks.report.records import Arm, Kind, Metric, Setting

NOT_RUN = "not run"
# The order in which quantities of the mechanism are shown.
QUANTITIES = (
    *("roughness, before", "roughness, after"),
    *("adjacent_cosine, before", "adjacent_cosine, after"),
    *("line_shape_score", "residual_alignment", "gradient_noise"),
)


def difference_text(metric: Metric, found: PairedDifference | None) -> str:
    """Returns a difference in the metric's own sign, with the seeds won."""
    if found is None:
        return NOT_RUN
    text = format_difference(found._replace(mean=metric.sign * found.mean))
    wins = f"({found.wins}/{found.num_seeds})"
    excludes = is_better(found) or is_worse(found)
    return f"**{text}** {wins}" if excludes else f"{text} {wins}"


def _level(metric: Metric, arm: Arm | None) -> str:
    """The mean of the metric over an arm's seeds."""
    return NOT_RUN if arm is None else f"{metric.sign * arm.level:.4f}"


def confirm_table(setting: Setting, survivors: frozenset[Kind]) -> str:
    """Returns the table of the confirmed arms.

    Args:
      setting: all arms of it.
      survivors: of Holm's correction.
    """
    header = ["arm", "best rate", "metric there", "minus base at base's best rate"]
    header += ["at the screen's rates", "best against best"]
    header += ["against norm-matched", "against shuffled"]
    metric, rows = setting.metric, []
    for kind in _confirmed_kinds(setting):
        rate, at_an_end = best_rate(setting, kind)
        row = [kind.name, f"{rate:g}, at an end" if at_an_end else f"{rate:g}"]
        row += [_level(metric, confirmed(setting, kind))]
        if not is_base(kind):
            found = [at_base_rate(setting, kind), at_screened_rates(setting, kind)]
            found += [best_against_best(setting, kind, base_of(setting))]
            row += [difference_text(metric, of) for of in found]
            row[-1] += "†" if kind in survivors else ""
            row += [_control_text(setting, kind, control) for control in CONTROLS]
        rows.append(row + [""] * (len(header) - len(row)))
    return format_table(header, rows)


def _confirmed_kinds(setting: Setting) -> list[Kind]:
    there = {arm.kind for arm in setting.confirm}
    return [kind for kind in kinds(setting) if kind in there]


def _control_text(setting: Setting, kind: Kind, control: str) -> str:
    """A kind against its own control, or shuffled against norm-matched, else empty."""
    other = control_of(setting, kind, control)
    found = best_against_best(setting, kind, other)
    return "" if found is None else difference_text(setting.metric, found)


def other_table(setting: Setting) -> str:
    """Returns the same arms by the metrics that they were not tuned by, or ""."""
    if not setting.others:
        return ""
    header, base, rows = ["arm"], base_of(setting), []
    for metric in setting.others:
        header += [metric.text, "at rate (and the base's)", "minus base"]
    for kind in _confirmed_kinds(setting):
        row = [kind.name]
        for metric in setting.others:
            pair = best_pair(setting, kind, base, metric)
            assert pair is not None
            rates = dict.fromkeys(f"{of.learning_rate:g}" for of in pair)
            row += [_level(metric, pair[0]), " and ".join(rates)]
            minus = difference_text(metric, difference(*pair))
            row.append("" if is_base(kind) else minus)
        rows.append(row)
    return format_table(header, rows)


def screen_table(setting: Setting) -> str:
    """Returns the mean of every screened arm at every rate, the best in bold."""
    rates = sorted({arm.learning_rate for arm in setting.screen})
    rows = []
    for kind in dict.fromkeys(kinds(setting)):
        if not any(arm.kind == kind for arm in setting.screen):
            continue
        tuned, cells = tuned_rate(setting, kind), []
        for rate in rates:
            arm = arm_at(setting.screen, kind, rate)
            text = "" if arm is None else _level(setting.metric, arm)
            cells.append(f"**{text}**" if tuned.rate == rate else text)
        rows.append([kind.name, *cells, "yes" if tuned.at_an_end else ""])
    header = ["arm", *(f"{rate:g}" for rate in rates), "best at an end of its rates"]
    return format_table(header, rows)


def mechanism_arms(setting: Setting) -> list[Arm]:
    """Returns the confirmed arms at the base's best rate."""
    rate = best_rate(setting, base_of(setting)).rate
    arms = (arm_at(setting.confirm, kind, rate) for kind in kinds(setting))
    return [arm for arm in arms if arm is not None]


def mechanism_table(setting: Setting) -> str:
    """Returns what was last recorded of every arm at the base's best rate."""
    rows = [
        [arm.kind.name, *(_last(arm.mechanism.get(name)) for name in QUANTITIES)]
        for arm in mechanism_arms(setting)
    ]
    header = ["arm", *(name.replace("_", " ") for name in QUANTITIES)]
    return format_table(header, rows)


def _last(values: np.ndarray | None) -> str:
    if values is None or not math.isfinite(values[-1]):
        return ""
    return f"{values[-1]:.3g}"


# ── of several settings ──────────────────────────────────────────────────────


def grouping_table(settings: Sequence[Setting]) -> str:
    """Returns one stack against two, of the settings that have both."""
    rows = []
    for setting in settings:
        for kind in kinds(setting):
            if is_smoothed(kind) and kind.scope.startswith("joined"):
                others = base_of(setting), window_of(setting, 0.2)
                found = [best_against_best(setting, kind, of) for of in others]
                cells = [difference_text(setting.metric, of) for of in found]
                rows.append([setting.name, kind.scope, *cells])
    header = ["setting", "grouping", "minus base", "minus two stacks"]
    return format_table(header, rows)


# What the paper reports, arXiv 2606.30813: {task: (the metric here that is most like
# its own, what was trained, base, with smoothing)}.
_PAPER: dict[str, tuple[str, ...]] = {
    "lm": (
        "validation loss",
        "GPT, 1.38 and 2.40 billion parameters, 24 and 30 layers, Adam and NorMuon; "
        "loss, bits per byte",
        "no number at hand",
        "lower, more so with 30 layers",
    ),
    "vit": (
        "test accuracy",
        "ViT-B, CIFAR-100; test accuracy",
        "74.56 %",
        "75.44 % (α = 0.1), 75.62 % (α = 0.2)",
    ),
    "diffusion": (
        "Fréchet distance",
        "U-ViT, CIFAR-10; FID of 10,000 / 50,000 samples",
        "6.58 / 4.01",
        "5.82 / 3.74",
    ),
    "rl": (
        "pass@1",
        "GRPO of a model of 1.5 billion parameters; mean pass@1",
        "55.45 %",
        "57.60 %",
    ),
}


def paper_table(settings: Sequence[Setting]) -> str:
    """Returns what the paper reports, and the same from these results."""
    rows: list[list[str]] = []
    for setting in settings:
        if setting.task not in _PAPER:
            continue
        name, *of_paper = _PAPER[setting.task]
        metrics = (setting.metric, *setting.others)
        metric = next(metric for metric in metrics if metric.name == name)
        kind = window_of(setting, 0.2)
        assert kind is not None
        pair = best_pair(setting, kind, base_of(setting), metric)
        assert pair is not None
        is_first = not any(row[0] == setting.task for row in rows)
        rows.append(
            [
                *([setting.task, *of_paper] if is_first else [""] * 4),
                f"{setting.optimizer}, {setting.layers} layers",
                metric.text,
                _level(metric, pair[1]),
                difference_text(metric, difference(*pair)),
            ]
        )
    header = ["task", "the paper trained", "its base", "with smoothing", "here"]
    header += ["metric", "base", "window(0.2) minus base"]
    return format_table(header, rows)


# What an independent replication of the paper published of the task "reverse":
# 24-layer encoder, AdamW at this rate, window(0.2) on the projections, 5 seeds.
REPLICATION_RATE = 2e-3
_PUBLISHED = ("published", "5", "3.1121", "3.0911", "-0.0209 [-0.0264, -0.0154]", "")


def replication_table(setting: Setting) -> str:
    """Returns the published replication, and the same from these results."""
    kinds_there: tuple[Any, ...] = base_of(setting), window_of(setting, 0.2, "proj")
    base, window = (arm_at(setting.confirm, k, REPLICATION_RATE) for k in kinds_there)
    found = difference(window, base)
    assert base is not None
    assert window is not None
    assert found is not None
    low, high = found.mean - found.half_width, found.mean + found.half_width
    here = [
        *(f"the same here ({setting.name})", str(found.num_seeds)),
        *(_level(setting.metric, base), _level(setting.metric, window)),
        f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{found.wins}/{found.num_seeds}",
    ]
    header = ["", "seeds", "base", "window(0.2), proj", "difference [95 %]", "wins"]
    return format_table(header, [_PUBLISHED, here])
