"""Figures of paired arms, drawn from the JSON of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import paired_difference
from benchmarks.pretrain_report import BITS_PER_NAT

# Okabe and Ito's colors, told apart by color-blind readers; line styles and markers do
# the same for readers of a black-and-white print.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"


def learning_curves(
    arms: Sequence[Mapping[str, Any]], title: str, unigram_entropy: float
) -> Figure:
    """Draws validation curves, and beside them the paired differences to the base.

    Args:
      arms: from `pretrain_report.arm_results`, also as read back from JSON; the
        first is the base.
      title: of the figure.
      unigram_entropy: what a model without context cannot beat, in bits per byte.
    """
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    columns = 2 if len(arms) > 1 else 1
    axes = figure.subplots(1, columns, squeeze=False)[0]

    _draw_levels(axes[0], arms, unigram_entropy)
    if columns == 2:
        _draw_differences(axes[1], arms)
    for ax in axes:
        ax.set_xlabel("step")
        ax.set_xlim(left=0, right=1.02 * arms[0]["curves"]["validation_steps"][-1])
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_levels(
    ax: Axes, arms: Sequence[Mapping[str, Any]], unigram_entropy: float
) -> None:
    for index, arm in enumerate(arms):
        steps, losses = _validation(arm)
        bits = losses * BITS_PER_NAT
        ax.plot(steps, bits.mean(axis=1), label=_label(arm), **_style(index))
        ax.fill_between(
            steps,
            bits.min(axis=1),
            bits.max(axis=1),
            color=_style(index)["color"],
            alpha=0.12,
            linewidth=0,
        )
    ax.axhline(unigram_entropy, color="0.5", linewidth=1, label="unigram entropy")
    ax.set_ylabel("validation bits per byte")
    ax.set_title("mean and range over seeds", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def _draw_differences(ax: Axes, arms: Sequence[Mapping[str, Any]]) -> None:
    _, base = _validation(arms[0])
    ax.axhline(0, color=_COLORS[0], linewidth=1)
    for index, arm in enumerate(arms[1:], start=1):
        steps, losses = _validation(arm)
        differences = [
            paired_difference(one, other)
            for one, other in zip(losses, base, strict=True)
        ]
        mean = np.array([difference.mean for difference in differences])
        half_width = np.array([difference.half_width for difference in differences])
        ax.plot(steps, mean, label=_label(arm), **_style(index))
        low, high = mean - half_width, mean + half_width
        ax.fill_between(
            steps, low, high, color=_style(index)["color"], alpha=0.12, linewidth=0
        )
        # Overlapping bands are told apart by their edges.
        edge = _style(index) | {"marker": "", "linewidth": 0.8}
        ax.plot(steps, np.stack([low, high], axis=1), **edge)
    ax.set_ylabel(f"validation loss − {arms[0]['name']} (nats/byte)")
    ax.set_title("paired difference, 95 % interval; below 0 is better", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def _validation(arm: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    curves = arm["curves"]
    # null, what JSON has for a diverged loss, becomes NaN and so a gap in the curve.
    losses = np.array(curves["validation_loss"], float)
    losses[~np.isfinite(losses)] = np.nan
    return np.array(curves["validation_steps"]), losses


def _label(arm: Mapping[str, Any]) -> str:
    return f"{arm['name']} (diverged)" if any(arm["diverged"]) else arm["name"]


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }
