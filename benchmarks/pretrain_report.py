"""The results of paired arms as one JSON value, and the table made of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison import (
    PairedDifference,
    format_difference,
    format_table,
    paired_difference,
    relative_time,
)
from benchmarks.interleaving import Curves, Plan

BITS_PER_NAT = 1 / math.log(2)


def arm_results(
    names: Sequence[str], curves: Curves, plan: Plan, points: int = 200
) -> list[dict[str, Any]]:
    """Returns what was measured of every arm; the first one is the base.

    Args:
      names: of the arms, in the order of `curves`.
      curves: of a finished run.
      plan: of the run.
      points: how many points of the training loss to keep.
    """
    return [
        _arm_result(index, name, curves, plan, points)
        for index, name in enumerate(names)
    ]


def _arm_result(
    index: int, name: str, curves: Curves, plan: Plan, points: int
) -> dict[str, Any]:
    final, base = curves.validation_loss[index, -1], curves.validation_loss[0, -1]
    difference = paired_difference(final, base)
    lengths = np.diff(plan.rounds, prepend=0)
    # The first round warms caches and clocks up; it counts only where it is alone.
    timed = slice(min(1, len(lengths) - 1), None)
    seconds, base_seconds = curves.seconds[index, timed], curves.seconds[0, timed]
    steps, train_loss = thinned(curves.train_loss[index], points)
    return {
        "name": name,
        "validation_loss": final.tolist(),
        "bits_per_byte": (final * BITS_PER_NAT).tolist(),
        "diverged": (~np.isfinite(final)).tolist(),
        "minus_base": difference._asdict() if index else None,
        "seconds_per_step": float(np.median(seconds / lengths[timed])),
        "relative_time": relative_time(seconds, base_seconds),
        "curves": {
            "train_steps": steps.tolist(),
            "train_loss": train_loss.tolist(),
            "validation_steps": plan.evaluations,
            "validation_loss": curves.validation_loss[index].tolist(),
        },
    }


def thinned(curve: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a curve with at most `points` points, each the mean of what it replaces.

    Args:
      curve: one value per step, shape `(steps, S)`.
      points: the most points to keep.

    Returns:
      The last step of each point, shape `(points,)`, and means, `(points, S)`.
    """
    parts = np.array_split(np.asarray(curve, np.float64), min(points, len(curve)))
    ends = np.cumsum([len(part) for part in parts])
    return ends, np.stack([np.mean(part, axis=0) for part in parts])


def results_table(arms: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of `arm_results`, also as read back from JSON."""
    return format_table(
        [
            "arm",
            "loss (nats/byte)",
            "bits/byte",
            "difference ± 95 %",
            "wins",
            "time per step",
        ],
        [_row(arm) for arm in arms],
    )


def _row(arm: Mapping[str, Any]) -> list[str]:
    loss = np.array(arm["validation_loss"], float)
    diverged = int(np.sum(arm["diverged"]))
    loss_cell = f"{np.mean(loss):.4f}"
    if diverged:
        loss_cell = f"diverged in {diverged} of {loss.size}"
    difference, wins = "base", ""
    if arm["minus_base"] is not None:
        paired = _difference(arm["minus_base"])
        difference = format_difference(paired)
        wins = f"{paired.wins}/{paired.num_seeds}"
    milliseconds = 1e3 * arm["seconds_per_step"]
    return [
        arm["name"],
        loss_cell,
        f"{np.mean(loss) * BITS_PER_NAT:.4f}",
        difference,
        wins,
        f"{arm['relative_time']:.3f}× ({milliseconds:.1f} ms)",
    ]


def _difference(values: Mapping[str, Any]) -> PairedDifference:
    mean, half_width = (
        math.nan if values[name] is None else values[name]
        for name in ("mean", "half_width")
    )
    return PairedDifference(mean, half_width, values["wins"], values["num_seeds"])
