"""Published numbers beside those of the results, with what differs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison import format_table
from benchmarks.report.cells import difference_text, level_text, rate_text
from benchmarks.report.comparisons import (
    arm_at,
    base_of,
    best_pair_by,
    difference,
    has_diverged,
    is_smoothed,
    kinds,
    tuned_rate,
    window_of,
)
from benchmarks.report.names import metric_text, setting_name
from benchmarks.report.records import Setting, Source

# What the paper reports, arXiv 2606.30813: {task: (the metric here that is most like
# its own, what was trained, base, with smoothing)}.
_PAPER = {
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

# What an independent replication of the paper published of the task "reverse":
# 24-layer encoder, AdamW at 2e-3, window(0.2) on the projections, 5 seeds.
REPLICATION_RATE = 2e-3
_PUBLISHED = ("published", "5", "3.1121", "3.0911", "-0.0209 [-0.0264, -0.0154]", "")


def paper(sources: Sequence[Source]) -> str:
    """Returns what the paper reports, the same from these results, or ""."""
    there = [
        (source, setting)
        for source in sources
        for setting in source.settings
        if setting.task in _PAPER and setting.preset == "full"
    ]
    if not there:
        return ""
    header = ["task", "the paper trained", "its base", "with smoothing", "here"]
    header += ["metric", "base", "window(0.2) minus base"]
    rows, before = [], None
    for _, setting in there:
        first = setting.task != before
        rows.append(_paper_row(setting, first))
        before = setting.task
    sizes = {
        f"{source.settings[0].task}, {_size(source.config)}": None
        for source, setting in there
    }
    return (
        "## Beside the paper's own numbers\n\n"
        f"{format_table(header, rows)}\n\n"
        "What differs. *Size*: the paper trains models of up to billions of "
        f"parameters to the end; here {'; '.join(sizes)}. *Data*: the metrics are "
        "alike and not the same (a Fréchet distance here is in the features of a "
        "small classifier of digits, no FID). *Seeds*: the paper's main results are "
        f"single seeds; here are {_seeds(there)} paired ones, with a 95 % interval. "
        "*Tuning*: the "
        "paper adds smoothing at the settings of the base optimizer; here every arm "
        "is at its own best learning rate, on the held-out data that is shown: levels "
        "are optimistic, and the intervals do not count this choice."
    )


def _paper_row(setting: Setting, is_first: bool) -> list[str]:
    name, *of_paper = _PAPER[setting.task]
    alike = (metric for metric in setting.others if metric.name == name)
    metric = next(alike, setting.metric)
    pair = window_of(setting, 0.2), base_of(setting)
    window, base = best_pair_by(setting, *pair, metric)
    return [
        *((setting.task, *of_paper) if is_first else [""] * 4),
        f"{setting.optimizer}, {setting.layers} layers",
        metric_text(metric),
        level_text(metric, base),
        difference_text(metric, difference(window, base)),
    ]


def _seeds(there: Sequence[tuple[Source, Setting]]) -> str:
    counts = {len(arm.seeds) for _, setting in there for arm in setting.confirm}
    return " or ".join(map(str, sorted(counts))) or "to be"


def _size(config: Mapping[str, Any]) -> str:
    layers = ", ".join(map(str, config["depths"]))
    return (
        f"{layers} layers of width {config['width']}, {config['steps']} steps of "
        f"{config['batch']} examples"
    )


def replication(settings: Sequence[Setting]) -> str:
    """Returns the published replication and the same from these results, or ""."""
    here = [
        setting
        for setting in settings
        if (setting.task, setting.optimizer) == ("reverse", "adamw")
    ]
    if not here:
        return ""
    header = ["", "seeds", "base", "window(0.2), proj", "difference [95 %]", "wins"]
    rows = [list(_PUBLISHED), *(_replication_row(setting) for setting in here)]
    return (
        "## The published replication\n\n"
        "An independent replication of the paper trained a 24-layer encoder to reverse "
        f"a sequence, with AdamW at {REPLICATION_RATE:g} and the window(0.2) on the "
        "projections. Evaluation loss, lower is better, at that rate:\n\n"
        f"{format_table(header, rows)}\n\n{' '.join(map(_best_here, here))}"
    )


def _best_here(setting: Setting) -> str:
    base = base_of(setting)
    if base is None or tuned_rate(setting, base) is None:
        return "What the base's best rate is here has not been screened yet."
    best = rate_text(setting, base)
    return f"The base's best rate here ({setting_name(setting)}): {best}."


def _replication_row(setting: Setting) -> list[str]:
    name = f"the same here ({setting_name(setting)})"
    window = next(
        (
            kind
            for kind in kinds(setting)
            if is_smoothed(kind)
            and (kind.operator, kind.variant, kind.scope)
            == ("window", "standard", "proj")
            and math.isclose(kind.alpha, 0.2)
        ),
        None,
    )
    arms = [
        arm_at(setting.confirm, kind, REPLICATION_RATE)
        for kind in (base_of(setting), window)
    ]
    found = difference(arms[1], arms[0])
    if found is None:
        return [name, "", *(level_text(setting.metric, arm) for arm in arms), "", ""]
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return [
        name,
        str(found.num_seeds),
        *(level_text(setting.metric, arm) for arm in arms),
        "diverged"
        if has_diverged(found)
        else f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{found.wins}/{found.num_seeds}",
    ]
