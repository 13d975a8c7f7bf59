"""Does it help? Differences to a base over paired seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsmooth_optax._extras import needs
from gradsmooth_optax.plots._axes import BLACK, BLUE, axes_of, plain, title_and_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SEED: dict[str, Any] = {
    **{"linestyle": "", "marker": "o", "markersize": 4},
    **{"markerfacecolor": "none", "markeredgecolor": "0.4"},
}


def paired_differences(
    differences: Mapping[str, Any], *, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Differences of runs to a base over paired seeds, with intervals, a row per arm.

    Circles are the single seeds, squares their means, with the interval of Student's t
    for the mean; a filled square's interval excludes 0. One seed has no interval, and
    neither has an arm of which a seed diverged (its difference is not finite): there
    only the seeds that did not are drawn.

    Args:
      differences: {name of the arm: (number of seeds,), its metric minus that of the
        base with the same seed}. Drawn from the top.
      level: of the intervals, a number between 0 and 1.
      ax: where to draw; None makes a new figure. The numbers stand on its right.

    Returns:
      The Axes.

    Raises:
      TypeError: for an argument of the wrong kind.
      ValueError: without arms, for an arm without seeds or with more than one number
        per seed, and for a level out of range.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import matplotlib.pyplot as plt
      >>> window, mean = [-0.03, -0.01, -0.02], [0.1, 0.2, float("nan")]
      >>> arms = {"window(0.2)": window, "mean over depth": mean}
      >>> ax = gs.plots.paired_differences(arms)
      >>> for text in ax.texts:
      ...     print(text.get_text())
      -0.020 ± 0.025 (3/3 below 0)
      1 of 3 diverged
      >>> plt.close(ax.figure)
    """
    arms = _arms(differences)
    _check_level(level)
    ax = axes_of("paired_differences", ax, (7.6, 1.3 + 0.5 * len(arms)))
    from matplotlib.ticker import MaxNLocator

    ax.axvline(0, color=BLACK, linewidth=1, label="_zero")
    intervals = [_mean_and_half_width(values, level) for values in arms.values()]
    decimals = _decimals(intervals)
    for row, (values, interval) in enumerate(
        zip(arms.values(), intervals, strict=True)
    ):
        finite = values[np.isfinite(values)]
        ax.plot(finite, np.full(finite.size, row + 0.18), **_SEED)
        if finite.size < values.size:
            text = f"{values.size - finite.size} of {values.size} diverged"
        else:
            _draw_interval(ax, row - 0.12, *interval)
            below = f"{np.sum(values < 0)}/{values.size} below 0"
            text = f"{_interval_text(*interval, decimals)} ({below})"
        ax.annotate(
            text,
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size="small",
            annotation_clip=False,
        )
    ax.set_yticks(range(len(arms)), [textwrap.fill(name, 30) for name in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    plain(ax, grid_of="x")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_xlabel("difference to the base")
    means = f"mean, {100 * level:g} % interval (filled: excludes 0)"
    keys = [ax.plot([], [], **_SEED)[0], ax.plot([], [], "s-", color=BLUE)[0]]
    title_and_legend(ax, "paired differences", keys, ["one seed", means])
    return ax


def _draw_interval(ax: Axes, row: float, mean: float, half_width: float) -> None:
    excludes = abs(mean) > half_width
    ax.errorbar(
        mean,
        row,
        xerr=None if math.isnan(half_width) else half_width,
        marker="s",
        markersize=5.5,
        markerfacecolor=BLUE if excludes else "white",
        color=BLUE,
        linewidth=1.6,
        capsize=4,
    )


def _mean_and_half_width(values: np.ndarray, level: float) -> tuple[float, float]:
    """The mean and how far Student's t interval reaches from it; NaN for unknown."""
    stats = needs("scipy.stats", "plots", "plots.paired_differences")
    if not np.isfinite(values).all():
        return math.nan, math.nan
    if values.size == 1:
        return float(values[0]), math.nan
    error = values.std(ddof=1) / math.sqrt(values.size)
    quantile = stats.t.ppf((1 + level) / 2, values.size - 1)
    return float(values.mean()), float(quantile * error)


def _decimals(intervals: Sequence[tuple[float, float]]) -> int:
    """Two digits of the least half width, else three of the least mean."""
    for column, digits in ((1, 2), (0, 3)):
        sizes = [abs(interval[column]) for interval in intervals]
        # Rounding leaves something of the half width of equal numbers.
        sizes = [
            x
            for x, (mean, _) in zip(sizes, intervals, strict=True)
            if x > 1e-9 * abs(mean)
        ]
        if sizes:
            return max(digits - 1 - math.floor(math.log10(min(sizes))), 0)
    return 1


def _interval_text(mean: float, half_width: float, decimals: int) -> str:
    """Such as -0.0132 ± 0.0099, and of one seed the difference alone."""
    signed, width = f"+.{decimals}f", f".{decimals}f"
    if decimals > 6:
        signed, width = "+.2e", ".1e"
    if math.isnan(half_width):
        return format(mean, signed)
    return f"{mean:{signed}} ± {half_width:{width}}"


def _arms(differences: Any) -> dict[str, np.ndarray]:
    """The differences as arrays, if they are one for each seed."""
    if not isinstance(differences, Mapping):
        raise TypeError(
            f"`differences` must be {{name of the arm: differences to the base}}, but "
            f"is of type {type(differences).__name__}. Write "
            f"`plots.paired_differences({{'window(0.2)': losses - losses_of_base}})`."
        )
    if not differences:
        raise ValueError(
            "`differences` has no arms, so there is nothing to draw. Write "
            "`plots.paired_differences({'window(0.2)': losses - losses_of_base})`."
        )
    return {str(name): _seeds(name, values) for name, values in differences.items()}


def _seeds(name: Any, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`differences[{name!r}]` must be an array of numbers: {error}."
        ) from None
    if array.ndim != 1 or not array.size:
        found = "is empty" if not array.size else f"has shape {array.shape}"
        raise ValueError(
            f"`differences[{name!r}]` must hold one number for each seed, of shape "
            f"(number of seeds,), but {found}. For the metric at one step of every "
            f"seed write `metrics[:, -1] - metrics_of_base[:, -1]`."
        )
    return array


def _check_level(level: Any) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float | np.floating):
        raise TypeError(
            f"`level` must be a number between 0 and 1, but is {level!r} of type "
            f"{type(level).__name__}."
        )
    if not 0 < level < 1:
        hint = f" Write {level / 100:g} for {level:g} %." if 1 < level < 100 else ""
        raise ValueError(f"`level` must be between 0 and 1, but is {level}.{hint}")
