"""The cells of tables: differences, levels and rates in words."""

import numpy as np

from benchmarks.comparison import PairedDifference, format_difference
from benchmarks.report.comparisons import (
    best_rate,
    has_diverged,
    is_better,
    is_worse,
)
from benchmarks.report.records import Arm, Kind, Metric, Setting

NOT_RUN = "not run"


def difference_text(metric: Metric, found: PairedDifference | None) -> str:
    """Returns a difference in the metric's own sign, with the seeds won."""
    if found is None:
        return NOT_RUN
    wins = f"({found.wins}/{found.num_seeds})"
    if has_diverged(found):
        return f"diverged {wins}"
    text = format_difference(found._replace(mean=metric.sign * found.mean))
    return (
        f"**{text}** {wins}"
        if is_better(found) or is_worse(found)
        else f"{text} {wins}"
    )


def level_text(metric: Metric, arm: Arm | None) -> str:
    """Returns the mean of the metric over an arm's seeds."""
    if arm is None:
        return NOT_RUN
    diverged = int(np.sum(np.isnan(arm.losses)))
    if diverged:
        return f"diverged in {diverged} of {arm.losses.size}"
    return f"{metric.sign * np.mean(arm.losses):.4f}"


def rate_text(setting: Setting, kind: Kind) -> str:
    """Returns a kind's best rate, and whether it is at an end of those tried."""
    best = best_rate(setting, kind)
    if best is None:
        return "not screened"
    return f"{best.rate:g}, at an end" if best.at_an_end else f"{best.rate:g}"
