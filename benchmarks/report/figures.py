"""The figures of the report, as SVG that is the same every time.

All places are set in inches, so that no solver has a say in them.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import PairedDifference, format_difference
from benchmarks.report.choices import part_kinds
from benchmarks.report.comparisons import (
    arm_at,
    base_of,
    best_against_best,
    best_screened_of,
    control_of,
    difference,
    has_diverged,
    is_base,
    is_better,
    is_mean,
    is_worse,
    kinds,
    mean_of,
    preserving_of,
    tuned_rate,
    window_of,
)
from benchmarks.report.mechanism import mechanism_arms, quantities
from benchmarks.report.names import better, metric_name, run_name, setting_name
from benchmarks.report.records import Arm, Kind, Setting, Source
from benchmarks.report.verdicts import CONTROLS

# Okabe and Ito's colors, told apart by color-blind readers; line styles and markers do
# the same for readers of a black-and-white print.
_BLACK, _BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
_COLORS = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY)
_LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = (*"osD^vPX<>*", (4, 1), "d")

_RC = {
    "svg.fonttype": "path",
    "svg.hashsalt": "gradsmooth_optax",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def drawings(sources: Sequence[Source]) -> dict[str, Figure]:
    """Returns all figures by their file names; those without data are left out."""
    with _style():
        settings = [s for source in sources for s in source.settings]
        found = {
            "differences.svg": forest([s for s in settings if not s.is_of_parts]),
            "parts.svg": parts([s for s in settings if s.is_of_parts]),
        }
        for source in sources:
            found[f"{source.stem}-rates.svg"] = rates(source.settings)
            found[f"{source.stem}-mechanism.svg"] = mechanism(source.settings)
    return {name: figure for name, figure in found.items() if figure is not None}


def svg(figure: Figure) -> str:
    """Returns a figure as SVG that says nothing of when it was drawn."""
    text = io.StringIO()
    with _style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    # Editors and git strip what matplotlib leaves at the ends of lines.
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def made_by_this_version(text: str) -> bool:
    """Returns whether an SVG was drawn by the matplotlib that is installed."""
    return f"Matplotlib v{matplotlib.__version__}," in text


# ── best against best ────────────────────────────────────────────────────────


def forest(settings: Sequence[Setting]) -> Figure | None:
    """Draws the differences to the base with intervals, a panel per task."""
    tasks = list(dict.fromkeys(s.task for s in settings if s.confirm))
    if not tasks:
        return None
    panels = [[s for s in settings if s.task == task and s.confirm] for task in tasks]
    row, gap, top, bottom = 0.95, 0.85, 0.95, 0.6
    heights = [row * len(panel) for panel in panels]
    height = top + sum(heights) + gap * (len(panels) - 1) + bottom
    figure = Figure(figsize=(9, height), dpi=100)
    lower = height - top
    for panel, tall in zip(panels, heights, strict=True):
        lower -= tall
        _draw_forest(_axes(figure, (2.2, lower, 6.6, tall)), panel)
        lower -= gap
    figure.legend(
        handles=[_forest_key(figure.axes[0], role) for role in _ROLES],
        loc="upper center",
        ncols=4,
        bbox_to_anchor=(0.5, 1 - 0.3 / height),
        columnspacing=1.2,
    )
    figure.text(
        *(0.5, 1 - 0.2 / height),
        "best against best, minus the base, with 95 % intervals; filled: excludes 0",
        ha="center",
        va="center",
    )
    return figure


_ROLES = {
    "window(0.1)": (_SKY, "o"),
    "window(0.2)": (_BLUE, "s"),
    "norm-preserving": (_GREEN, "D"),
    "best screened, if another": (_ORANGE, "P"),
    "norm-matched window(0.2)": (_RED, "v"),
    "shuffled window(0.2)": (_PINK, "^"),
    "mean over depth": (_BLACK, "X"),
}


def _kinds_of_roles(setting: Setting) -> list[Kind | None]:
    first = [window_of(setting, 0.1), window_of(setting, 0.2), preserving_of(setting)]
    best = best_screened_of(setting)
    controls = [control_of(setting, window_of(setting, 0.2), c) for c in CONTROLS]
    return [*first, None if best in first else best, *controls, mean_of(setting)]


def _draw_forest(ax: Axes, settings: Sequence[Setting]) -> None:
    metric = settings[0].metric
    ax.axvline(0, color=_BLACK, linewidth=1)
    drawn, far = [0.0], []
    for row, setting in enumerate(settings):
        for index, (kind, role) in enumerate(
            zip(_kinds_of_roles(setting), _ROLES, strict=True)
        ):
            found = best_against_best(setting, kind, base_of(setting))
            place = row + (index - 3) * 0.125
            if found is None:
                continue
            if kind is not None and is_mean(kind) and not has_diverged(found):
                far.append((place, found, role))
                continue
            _draw_interval(ax, place, found, metric.sign, role, _ROLES[role])
            drawn += [found.mean - found.half_width, found.mean + found.half_width]
        if row:
            ax.axhline(row - 0.5, color="0.8", linewidth=0.8)
    _limit(ax.set_xlim, metric.sign * np.array(drawn), 0.08)
    for place, found, role in far:
        _draw_or_name(ax, place, found, metric.sign, role)
    ax.set_yticks(range(len(settings)), [setting_name(s) for s in settings])
    ax.set_ylim(len(settings) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"{metric_name(metric)}, difference; {better(metric)}")


def _draw_or_name(
    ax: Axes, place: float, found: PairedDifference, sign: int, role: str
) -> None:
    """Draws an interval that need not fit, or says at the edge where it is."""
    low, high = ax.get_xlim()
    if low < sign * found.mean < high:
        _draw_interval(ax, place, found, sign, role, _ROLES[role])
        ax.set_xlim(low, high)
        return
    is_left = sign * found.mean < low
    value = format_difference(found._replace(mean=sign * found.mean))
    ax.annotate(
        f"← {role}: {value}" if is_left else f"{role}: {value} →",
        (low if is_left else high, place),
        xytext=(4 if is_left else -4, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="center",
        fontsize=6.5,
        color=_ROLES[role][0],
    )


def _draw_interval(
    ax: Axes,
    place: float,
    found: PairedDifference,
    sign: int,
    role: str,
    style: tuple[str, str],
) -> None:
    color, marker = style
    if has_diverged(found):
        ax.annotate(
            f"{role}: diverged",
            (0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            color=color,
        )
        return
    excludes = is_better(found) or is_worse(found)
    ax.errorbar(
        sign * found.mean,
        place,
        xerr=found.half_width if np.isfinite(found.half_width) else 0,
        color=color,
        marker=marker,
        markersize=4.5,
        markerfacecolor=color if excludes else "white",
        linewidth=1.3,
    )


def _forest_key(ax: Axes, role: str) -> Any:
    color, marker = _ROLES[role]
    (key,) = ax.plot([], [], color=color, marker=marker, markersize=4.5, label=role)
    return key


# ── which parameters to couple ───────────────────────────────────────────────


def parts(settings: Sequence[Setting]) -> Figure | None:
    """Draws what coupling one kind of parameters does, a panel per setting."""
    settings = [setting for setting in settings if setting.confirm]
    if not settings:
        return None
    row, left, gap, wide, bottom, top = 0.3, 1.6, 0.4, 3.4, 0.6, 0.75
    names = list(dict.fromkeys(k.name for s in settings for k in part_kinds(s)))
    tall = row * len(names)
    width = left + (wide + gap) * len(settings)
    figure = Figure(figsize=(width, top + tall + bottom), dpi=100)
    for column, setting in enumerate(settings):
        ax = _axes(figure, (left + column * (wide + gap), bottom, wide, tall))
        ax.axvline(0, color=_BLACK, linewidth=1)
        for kind in part_kinds(setting):
            found = best_against_best(setting, kind, base_of(setting))
            if found is not None:
                place, sign = names.index(kind.name), setting.metric.sign
                _draw_interval(ax, place, found, sign, kind.name, (_BLUE, "s"))
        ax.set_yticks(range(len(names)), [""] * len(names) if column else names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.08)
        metric = setting.metric
        ax.set_xlabel(f"{metric_name(metric)}, difference; {better(metric)}")
        ax.set_title(setting_name(setting))
    _title(figure, "best against best, minus the base, 95 %; filled: excludes 0")
    return figure


# ── the screen ───────────────────────────────────────────────────────────────


def rates(settings: Sequence[Setting]) -> Figure | None:
    """Draws the metric at every screened rate, and below it the difference to base."""
    settings = [setting for setting in settings if setting.screen]
    if not settings:
        return None
    styles = _line_styles(
        list(
            dict.fromkeys(
                kind
                for setting in settings
                for kind in kinds(setting)
                if any(arm.kind == kind for arm in setting.screen)
            )
        )
    )
    tall, left, gap = 2.3, 0.95, 0.75
    wide = max(3.3, 8 / len(settings) - gap)
    width = left + (wide + gap) * len(settings)
    below = 0.6 + _legend_height(styles, width)
    figure = Figure(
        figsize=(
            width,
            2 * tall + below + 0.85,
        ),
        dpi=100,
    )
    for column, setting in enumerate(settings):
        x = left + column * (wide + gap)
        upper = _axes(figure, (x, below + tall + 0.25, wide, tall))
        lower = _axes(figure, (x, below, wide, tall))
        _draw_levels(upper, setting, styles)
        _draw_differences(lower, setting, styles)
        upper.set_title(f"{setting.layers} layers")
        if not column:
            upper.set_ylabel(f"{metric_name(setting.metric)}\nmean over seeds")
            lower.set_ylabel("minus base, same rate")
    direction = better(settings[0].metric)
    _title(
        figure,
        f"{run_name(settings[0])}: screen; {direction}; what is far off is cut",
    )
    _legend_below(figure, styles)
    return figure


def _draw_levels(ax: Axes, setting: Setting, styles: Mapping[Kind, Any]) -> None:
    # All that is better than the worst of the base: how bad others get at far rates
    # would flatten the rest.
    levels = [float(np.mean(arm.losses)) for arm in setting.screen]
    of_base = [
        float(np.mean(arm.losses)) for arm in setting.screen if is_base(arm.kind)
    ]
    worst = max(filter(math.isfinite, of_base), default=math.inf)
    sign = setting.metric.sign
    for kind, style in styles.items():
        ax.plot(
            *_by_rate(setting, kind, lambda arm: np.mean(arm.losses), sign), **style
        )
    _limit(
        ax.set_ylim,
        sign * np.array([level for level in levels if level <= worst]),
        0.08,
    )
    _rate_axis(ax, setting)
    ax.tick_params(labelbottom=False)


def _draw_differences(ax: Axes, setting: Setting, styles: Mapping[Kind, Any]) -> None:
    base = base_of(setting)

    def minus_base(arm: Arm) -> float:
        found = difference(arm, arm_at(setting.screen, base, arm.learning_rate))
        return np.nan if found is None else found.mean

    ax.axhline(0, color=_BLACK, linewidth=2)
    tuned = None if base is None else tuned_rate(setting, base)
    drawn = []
    for kind, style in styles.items():
        if not is_base(kind):
            x, y = _by_rate(setting, kind, minus_base, setting.metric.sign)
            ax.plot(x, y, **style)
            # What is far off, the mean over depth or a rate far from the best, would
            # flatten all that matters.
            if not is_mean(kind):
                near = tuned is None or abs(np.log2(x / tuned.rate)) < 1.5
                drawn.extend(y[np.broadcast_to(near, y.shape)])
    _limit(ax.set_ylim, np.array([0.0, *drawn]), 0.4)
    _rate_axis(ax, setting)
    ax.set_xlabel("learning rate")


def _by_rate(
    setting: Setting, kind: Kind | None, value: Any, sign: int
) -> tuple[np.ndarray, np.ndarray]:
    arms = sorted(
        (arm for arm in setting.screen if arm.kind == kind),
        key=lambda arm: arm.learning_rate,
    )
    return (
        np.array([arm.learning_rate for arm in arms]),
        sign * np.array([value(arm) for arm in arms], float),
    )


def _limit(set_limits: Any, values: np.ndarray, margin: float) -> None:
    """Shows the range of `values`; what is beyond it leaves the panel."""
    finite = values[np.isfinite(values)]
    if finite.size and np.ptp(finite) > 0:
        pad = margin * np.ptp(finite)
        set_limits(finite.min() - pad, finite.max() + pad)


def _rate_axis(ax: Axes, setting: Setting) -> None:
    found = sorted({arm.learning_rate for arm in setting.screen})
    ax.set_xscale("log", base=2)
    small = len(found) > 6
    ax.set_xticks(
        found,
        [f"{rate:.3g}" for rate in found],
        rotation=45 if small else 0,
        fontsize=7,
    )
    ax.minorticks_off()
    ax.set_xlim(found[0] / 2**0.25, found[-1] * 2**0.25)


# ── the mechanism ────────────────────────────────────────────────────────────


def mechanism(settings: Sequence[Setting]) -> Figure | None:
    """Draws what was recorded over training, of the deepest setting that has it."""
    with_arms = [(s, mechanism_arms(s)) for s in settings]
    with_arms = [(s, arms) for s, arms in with_arms if arms]
    if not with_arms:
        return None
    setting, recorded = with_arms[-1]
    if setting.is_of_parts:
        return _mechanism(setting, recorded)
    shown = [base_of(setting), *_kinds_of_roles(setting)]
    if best_screened_of(setting) != window_of(setting, 0.1):
        shown.remove(window_of(setting, 0.1))
    return _mechanism(setting, [arm for arm in recorded if arm.kind in shown])


def _mechanism(setting: Setting, arms: Sequence[Arm]) -> Figure:
    names = quantities(arms)
    styles = _line_styles([arm.kind for arm in arms])

    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    wide, tall, left, gap, between = 2.3, 1.75, 0.55, 0.55, 0.75
    width = max(left + columns * (wide + gap), 8.5)
    below = 0.75 + _legend_height(styles, width)
    figure = Figure(
        figsize=(
            width,
            below + rows * tall + (rows - 1) * between + 0.85,
        ),
        dpi=100,
    )
    for index, name in enumerate(names):
        row, column = divmod(index, columns)
        y = below + (rows - 1 - row) * (tall + between)
        ax = _axes(figure, (left + column * (wide + gap), y, wide, tall))
        for arm in arms:
            if name in arm.mechanism:
                ax.plot(arm.mechanism["steps"], arm.mechanism[name], **styles[arm.kind])
        ax.set_title(name.replace("_", " "))
        if index + columns >= len(names):
            ax.set_xlabel("step")
    rate = f"{arms[0].learning_rate:g}" if arms else ""
    _title(figure, f"{setting_name(setting)}, all at the base's best rate, {rate}")
    _legend_below(figure, styles)
    return figure


# ── parts ────────────────────────────────────────────────────────────────────


def _line_styles(of: Sequence[Kind]) -> dict[Kind, dict[str, Any]]:
    """Returns how to draw every kind: the base thick and black, no two others alike."""
    styles: dict[Kind, dict[str, Any]] = {}
    for kind in of:
        style = {"label": kind.name, "markersize": 4, "linewidth": 1.3}
        if is_base(kind):
            styles[kind] = style | {"color": _BLACK, "linewidth": 2.6, "zorder": 3}
            continue
        index = sum(not is_base(other) for other in styles)
        styles[kind] = style | {
            "color": _COLORS[index % len(_COLORS)],
            "linestyle": _LINES[index % len(_LINES)],
            "marker": _MARKERS[index % len(_MARKERS)],
        }
    return styles


def _axes(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    width, height = figure.get_size_inches()
    x, y, wide, tall = inches
    return figure.add_axes((x / width, y / height, wide / width, tall / height))


def _title(figure: Figure, text: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.5, 1 - 0.2 / height, text, ha="center", va="center", fontsize=10)


def _legend_columns(width: float) -> int:
    return int(width / 2.6)  # inches, enough for the longest name


def _legend_height(styles: Mapping[Kind, Any], width: float) -> float:
    return 0.2 * -(-len(styles) // _legend_columns(width))


def _legend_below(figure: Figure, styles: Mapping[Kind, Mapping[str, Any]]) -> None:
    ax = figure.axes[0]
    handles = [ax.plot([], [], **style)[0] for style in styles.values()]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(_legend_columns(figure.get_figwidth()), len(handles)),
        handlelength=3.5,
    )


def _style() -> Any:
    """What users set for their own figures has no say in these."""
    return matplotlib.style.context(["default", _RC])
