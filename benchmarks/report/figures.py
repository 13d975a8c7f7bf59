"""The figures of the report, as SVG that is the same every time.

Seven inches wide, on white, so that they can be read on a page of 700 pixels in light
and dark. What matters has a color (Okabe and Ito's, told apart by color-blind readers)
and a marker, all else is gray.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import PairedDifference
from benchmarks.report.comparisons import (
    base_of,
    best_pair,
    is_base,
    is_better,
    is_smoothed,
    is_worse,
    kinds,
    mean_of,
    tuned_rate,
)
from benchmarks.report.records import Arm, Kind, Metric, Setting, Source
from benchmarks.report.summary import contrasts
from benchmarks.report.tables import QUANTITIES, mechanism_arms
from benchmarks.report.verdicts import Outcome, outcomes
from gradsmooth_optax import plots

_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"),
)
_GRAY = "0.6"
# The arms that have a color, by name: those of the verdict, and of parts.
_STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": _BLACK, "linewidth": 2.2},
    "window(0.2)": {"color": _BLUE, "marker": "o"},
    "norm-matched window(0.2)": {"color": _ORANGE, "marker": "v"},
    "shuffled window(0.2)": {"color": _GREEN, "marker": "s"},
    "mean over depth": {"color": _PINK, "marker": "D"},
    "window(0.5), full": {"color": _BLUE, "marker": "o"},
    "window(0.5), attention": {"color": _ORANGE, "marker": "v"},
    "window(0.5), mlp": {"color": _GREEN, "marker": "s"},
    "window(0.5), norms": {"color": _PINK, "marker": "D"},
    "window(0.5), biases": {"color": "#E69F00", "marker": "^"},
}
_OTHERS = {"color": "0.8", "linewidth": 0.8, "zorder": 1}

_RC = {
    "svg.fonttype": "path",
    "svg.hashsalt": "gradsmooth_optax",
    "savefig.facecolor": "white",
    **{"font.size": 9, "axes.titlesize": 9, "lines.linewidth": 1.3},
    **{"lines.markersize": 4, "axes.grid": True, "grid.alpha": 0.25},
    **{"axes.spines.top": False, "axes.spines.right": False},
    **{"legend.frameon": False, "legend.fontsize": 8.5, "figure.dpi": 100},
}
_WIDE = 7.0


def drawings(sources: Sequence[Source]) -> dict[str, Callable[[], str]]:
    """Returns what draws each figure as SVG, by their file names."""
    settings = [setting for source in sources for setting in source.settings]
    of_parts = [setting for setting in settings if setting.is_of_parts]
    found: dict[str, Callable[[], Figure]] = {
        "differences.svg": lambda: differences(outcomes(settings)),
        "parts.svg": lambda: parts(of_parts),
    }
    for source in sources:
        found[f"{source.stem}-rates.svg"] = partial(rates, source.settings)
        found[f"{source.stem}-mechanism.svg"] = partial(mechanism, source.settings[-1])
    return {name: partial(_svg, draw) for name, draw in found.items()}


def _svg(draw: Callable[[], Figure]) -> str:
    """A figure as SVG that says nothing of when it was drawn."""
    text = io.StringIO()
    # What users set for their own figures has no say in these.
    with matplotlib.style.context(["default", _RC]):
        draw().savefig(text, format="svg", metadata={"Date": None})
    # Editors and git strip what matplotlib leaves at the ends of lines.
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def made_by_this_version(text: str) -> bool:
    """Returns whether an SVG was drawn by the matplotlib that is installed."""
    return f"Matplotlib v{matplotlib.__version__}," in text


# ── what window(0.2) changes ─────────────────────────────────────────────────


def differences(of_all: Sequence[Outcome]) -> Figure:
    """Draws window(0.2) minus base and controls, a row of panels per task."""
    tasks: dict[str, list[Outcome]] = {}
    for outcome in of_all:
        tasks.setdefault(outcome.setting.task, []).append(outcome)
    heights = [len(of) + 1.6 for of in tasks.values()]
    figure = Figure(figsize=(_WIDE, 0.23 * sum(heights) + 0.3), layout="constrained")
    grid: Any = figure.subplots(
        *(len(tasks), 3), sharex="row", sharey="row", height_ratios=heights
    )
    for of_task, axes in zip(tasks.values(), grid, strict=True):
        _draw_task(axes, of_task)
    for ax, title in zip(grid[0], ("base", "norm-matched", "shuffled"), strict=True):
        ax.set_title(f"minus {title}", weight="bold")
    figure.suptitle("What window(0.2) changes", fontsize=10)
    return figure


def _draw_task(axes: Sequence[Axes], of_task: Sequence[Outcome]) -> None:
    metric = of_task[0].setting.metric
    found = [contrasts(outcome) for outcome in of_task]
    for ax, column in zip(axes, zip(*found, strict=True), strict=True):
        ax.axvline(0, color=_BLACK, linewidth=0.8)
        for row, difference in enumerate(column):
            assert difference is not None
            _draw_interval(ax, row, difference, metric)
        ax.locator_params(axis="x", nbins=4)
        ax.tick_params(axis="both", length=0, labelsize=8)
        ax.grid(axis="y", visible=False)
    names = [f"{of.setting.optimizer}, {of.setting.layers} layers" for of in of_task]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_ylabel(of_task[0].setting.task, weight="bold")
    axes[1].set_xlabel(metric.text, fontsize=8)


def _draw_interval(
    ax: Axes, row: float, found: PairedDifference, metric: Metric
) -> None:
    color, marker = _GRAY, "o"
    if is_better(found) or is_worse(found):
        color, marker = (_BLUE, "s") if is_better(found) else (_ORANGE, "D")
    x = metric.sign * found.mean
    ax.errorbar(x, row, xerr=found.half_width, color=color, marker=marker, lw=1.6)


def parts(settings: Sequence[Setting]) -> Figure:
    """Draws what coupling one kind of parameters does, a panel per setting."""
    figure = Figure(figsize=(_WIDE, 3.2 * len(settings)), layout="constrained")
    for setting, ax in zip(settings, figure.subplots(len(settings)), strict=True):
        found = {}
        for kind in filter(is_smoothed, kinds(setting)):
            if pair := best_pair(setting, kind, base_of(setting)):
                arm, base = pair
                found[kind.name] = setting.metric.sign * (arm.losses - base.losses)
        plots.paired_differences(found, ax=ax)
        ax.set_title(f"{setting.task}, {setting.layers} layers", pad=24)
        ax.set_xlabel(f"{setting.metric.label} minus that of the base")
    return figure


# ── the screen ───────────────────────────────────────────────────────────────


def rates(settings: Sequence[Setting]) -> Figure:
    """Draws the metric at every screened rate, and below it the difference to base."""
    metric, columns = settings[0].metric, max(2, len(settings))
    rows = 1 if len(settings) == 1 else 2
    figure = Figure(figsize=(_WIDE, 0.9 + 2.1 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, sharex="col", squeeze=False)
    pairs = grid if rows == 1 else grid.T
    for setting, (levels, minus_base) in zip(settings, pairs, strict=True):
        _draw_levels(levels, setting)
        _draw_differences(minus_base, setting)
        levels.set_title(f"{setting.layers} layers")
        for ax in (levels, minus_base):
            _rate_axis(ax, setting)
    for ax in grid[-1]:
        ax.set_xlabel("learning rate")
    pairs[0][0].set_ylabel(f"{metric.label}\n({metric.better})")
    pairs[0][1].set_ylabel("minus base\nat the same rate")
    figure.suptitle(f"{settings[0].run}: the screen", fontsize=10)
    _legend(figure, grid[0, 0], "other arms")
    return figure


def _draw_levels(ax: Axes, setting: Setting) -> None:
    sign = setting.metric.sign
    for kind in _screened(setting):
        x, y = _by_rate(setting, kind)
        ax.plot(x, sign * y, **_STYLES.get(kind.name, _OTHERS), label=kind.name)
    # All that is better than the worst of the base: how bad others get at far rates
    # would flatten the rest.
    worst = max(arm.level for arm in setting.screen if is_base(arm.kind))
    levels = [arm.level for arm in setting.screen if arm.level <= worst]
    _limit(ax, sign * np.array(levels), 0.08)


def _rate_axis(ax: Axes, setting: Setting) -> None:
    found = sorted({arm.learning_rate for arm in setting.screen})
    ax.set_xscale("log", base=2)
    ax.set_xticks(found, [f"{r:.3g}" for r in found], rotation=60, fontsize=7)
    ax.minorticks_off()


def _draw_differences(ax: Axes, setting: Setting) -> None:
    base = base_of(setting)
    tuned, near = tuned_rate(setting, base).rate, [0.0]
    of_base = dict(zip(*_by_rate(setting, base), strict=True))
    for kind in _screened(setting):
        x, y = _by_rate(setting, kind)
        y = setting.metric.sign * (y - [of_base.get(rate, math.nan) for rate in x])
        ax.plot(x, y, **_STYLES.get(kind.name, _OTHERS))
        # The mean over depth, and rates far from the best, would flatten the rest.
        if kind != mean_of(setting):
            near.extend(y[np.abs(np.log2(x / tuned)) < 1.5])
    _limit(ax, np.array(near), 0.2)


def _screened(setting: Setting) -> list[Kind]:
    there = {arm.kind for arm in setting.screen}
    return [kind for kind in kinds(setting) if kind in there]


def _by_rate(setting: Setting, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    arms = sorted(
        (arm for arm in setting.screen if arm.kind == kind),
        key=lambda arm: arm.learning_rate,
    )
    return (
        np.array([arm.learning_rate for arm in arms]),
        np.array([arm.level for arm in arms]),
    )


def _limit(ax: Axes, values: np.ndarray, margin: float) -> None:
    """Shows the range of `values`; what is beyond it leaves the panel."""
    values = values[np.isfinite(values)]
    pad = margin * np.ptp(values)
    ax.set_ylim(values.min() - pad, values.max() + pad)


# ── the mechanism ────────────────────────────────────────────────────────────


def mechanism(setting: Setting) -> Figure:
    """Draws what was recorded over training, of the arms that have a color."""
    arms: list[Arm] = [of for of in mechanism_arms(setting) if of.kind.name in _STYLES]
    figure = Figure(figsize=(_WIDE, 6.4), layout="constrained")
    grid: Any = figure.subplots(3, 3, sharex=True)
    for ax, name in zip(grid.flat, QUANTITIES, strict=False):
        for arm in arms:
            style = _STYLES[arm.kind.name]
            steps, values = arm.mechanism["steps"], arm.mechanism[name]
            ax.plot(steps, values, **style, label=arm.kind.name)
        ax.set_title(name.replace("_", " "))
        ax.set_xlabel("step")
        ax.xaxis.set_tick_params(labelbottom=True)
    for ax in grid.flat[len(QUANTITIES) :]:
        ax.set_axis_off()
    figure.suptitle(
        f"{setting.name}: all at the base's best rate, {arms[0].learning_rate:g}",
        fontsize=10,
    )
    _legend(figure, grid[0, 0])
    return figure


def _legend(figure: Figure, ax: Axes, others: str | None = None) -> None:
    """What has a color, each once, and one entry for all that is gray."""
    handles, labels = ax.get_legend_handles_labels()
    known = {
        label: handle
        for handle, label in zip(handles, labels, strict=True)
        if label in _STYLES
    }
    if others and len(known) < len(labels):
        known[others] = ax.plot([], [], **_OTHERS)[0]
    where = "outside lower center"
    figure.legend(known.values(), known.keys(), loc=where, ncols=3)
