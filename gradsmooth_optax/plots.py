"""Pictures of what smoothing does. Needs matplotlib: the extra "plots".

Every function draws into one `matplotlib.axes.Axes`, a new figure's or `ax`, and
returns it, so that anything can be added or changed; none shows or saves a figure.
Colors are told apart by color-blind readers, and lines, markers and hatches by readers
of a black-and-white print.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gradsmooth_optax import diagnostics
from gradsmooth_optax._composed import with_matrix
from gradsmooth_optax._depth_statistics import DepthStatistics, RoleStatistics
from gradsmooth_optax._groups import text_of
from gradsmooth_optax._monitor_depth import DepthRecord
from gradsmooth_optax._operators import Operator, check_flag, positive_int
from gradsmooth_optax._specs import DepthFunction, DepthSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Two of Okabe and Ito's colors, a dark and a lighter one in gray as well.
_BLACK, _BLUE = "#000000", "#0072B2"
_BEFORE: dict[str, Any] = {
    **{"color": _BLACK, "linestyle": "--"},
    **{"marker": "o", "markerfacecolor": "none"},
}
_AFTER: dict[str, Any] = {"color": _BLUE, "linestyle": "-", "marker": "s"}
_SEED: dict[str, Any] = {
    **{"linestyle": "", "marker": "o", "markersize": 4},
    **{"markerfacecolor": "none", "markeredgecolor": "0.4"},
}

_DIVERGING = "RdBu"  # red below 0, white, blue above
_MAX_NUMBERED = 12  # layers of a heat map with room for a number in each cell


# -- Layers against layers -------------------------------------------------------------


def operator_matrix(operator: Any, num_layers: int, *, ax: Axes | None = None) -> Axes:
    """Heat map of an operator's matrix S: row l holds what layer l receives.

    Up to 12 layers have a number in each cell that is not 0, where there is room. In
    larger ones cells that are clearly negative are hatched.

    Args:
      operator: an operator with a matrix and without schedules (see `Operator.at`),
        or a function num_layers -> (L, L).
      num_layers: L, an int ≥ 1.
      ax: where to draw, with a color bar beside it; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError: for an operator without a matrix or with a schedule, and for another
        argument of the wrong kind.
      ValueError: for `num_layers` below 1, or that the operator does not fit.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import matplotlib.pyplot as plt
      >>> ax = gs.plots.operator_matrix(gs.window(0.2), 12)
      >>> ax.get_title()
      'Window(alpha=0.2), L = 12'
      >>> plt.close(ax.figure)
    """
    operator = with_matrix(operator, "plots.operator_matrix")
    num_layers = positive_int("num_layers", num_layers)
    if operator.scheduled:
        raise TypeError(
            f"`operator` of `plots.operator_matrix` is {_short(operator)}, whose "
            f"strength is a schedule: its matrix depends on the step. Write "
            f"`plots.operator_matrix(operator.at(step), {num_layers})`."
        )
    s = np.asarray(operator.matrix(num_layers), np.float64)
    ax = _axes("operator_matrix", ax, (6.0, 4.6))
    limit = float(np.abs(s).max()) or 1.0
    bar = _heat_map(ax, s, limit, lambda x: _compact(x, 3) if x else "")
    # The half of the scale that no weight is in would only take room.
    bar.set_ylim(min(s.min(), 0.0), max(s.max(), 0.0) or limit)
    bar.set_ylabel("weight")
    ax.set_ylabel("layer that receives")
    ax.set_xlabel("from layer")
    name = textwrap.fill(_short(operator), 48, max_lines=2, placeholder=" …")
    ax.set_title(f"{name}, L = {num_layers}", size="medium")
    return ax


def cosine_matrix(
    updates: Any,
    depth: DepthSpec | DepthFunction,
    *,
    stack: Any = None,
    strict: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of the cosines between the updates of every two layers of a stack.

    Of `diagnostics.cosine_matrix`, on a scale from -1 to 1, layers in depth order. Up
    to 12 layers have a number in each cell, where there is room; in larger ones cells
    that are clearly negative are hatched.

    Args:
      updates: tree of updates, gradients or parameters.
      depth: where depth is, as in `smooth_over_depth`.
      stack: name of the stack; None is the only one.
      strict: as in `smooth_over_depth`.
      ax: where to draw, with a color bar beside it; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError, ValueError: as `diagnostics.cosine_matrix`; and ValueError for a stack
        that is not there, or without `stack` where there are several.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> updates = {"blocks": {"w": jnp.array([[1.0, 0.0], [3.0, 4.0], [0.0, -1.0]])}}
      >>> figure, (left, right) = plt.subplots(1, 2, layout="constrained")
      >>> ax = gs.plots.cosine_matrix(updates, gs.scanned("blocks/"), ax=left)
      >>> [text.get_text() for text in ax.texts[:3]]  # of layer 0 with each
      ['1', '.6', '0']
      >>> plt.close(figure)
    """
    of_stacks = diagnostics.cosine_matrix(updates, depth, strict=strict)
    call = "plots.cosine_matrix(updates, depth"
    if not of_stacks:
        raise ValueError(
            "`depth` matches no layers of `updates` that have a neighbor, so there is "
            "nothing to draw. See what it matches by `print(describe(depth, updates))`."
        )
    name, found = _of_stack(of_stacks, stack, call)
    cosines = np.asarray(found, np.float64)
    ax = _axes("cosine_matrix", ax, (6.0, 4.6))
    bar = _heat_map(ax, cosines, 1.0, lambda x: _compact(x, 2))
    bar.set_ylabel("cosine")
    ax.set_ylabel("layer, in depth order")
    ax.set_xlabel("layer, in depth order")
    ax.set_title(_title("cosines of updates", name), size="medium")
    return ax


# -- Before and after ------------------------------------------------------------------


def roughness_over_training(
    records: DepthRecord | Sequence[DepthRecord],
    *,
    stack: Any = None,
    role: Any = None,
    relative: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Roughness of the updates along depth, before and after smoothing, by step.

    Args:
      records: a sequence of `diagnostics.DepthRecord`, or one whose arrays have a
        leading axis over time, as `jax.lax.scan` stacks them, or a sequence of those.
        Where a step repeats, as with `every=100` and a record read at each step, the
        last is drawn. What has step -1 is left out.
      stack: name of the stack; None is the only one.
      role: name of a parameter inside the block; None is the whole block.
      relative: whether to draw the roughness over Σ_l ‖u_l‖², or the roughness.
      ax: where to draw; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError: for something that is not a record, such as an optimizer's state.
      ValueError: where nothing was recorded yet; for a stack or role that is not there,
        or without `stack` where there are several.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> depth = gs.scanned("blocks/")
      >>> smooth = gs.smooth_over_depth(depth, alpha=0.5)
      >>> tx = gs.diagnostics.monitor_depth(smooth, depth)
      >>> updates = {"blocks": {"w": jnp.array([[4.0], [0.0], [0.0]])}}
      >>> def step(state, _):
      ...     _, state = tx.update(updates, state)
      ...     return state, gs.diagnostics.monitored(state)
      >>> _, records = jax.lax.scan(step, tx.init(updates), length=3)
      >>> ax = gs.plots.roughness_over_training(records, relative=False)
      >>> for line in ax.lines:
      ...     print(line.get_label(), line.get_ydata())
      before smoothing [16. 16. 16.]
      after smoothing [5. 5. 5.]
      >>> plt.close(ax.figure)
    """
    check_flag("relative", relative)
    field = "relative_roughness" if relative else "roughness"
    history = _history(
        "roughness_over_training", records, stack, role, lambda of: getattr(of, field)
    )
    ax = _axes("roughness_over_training", ax, (6.4, 3.8))
    lines = _draw_lines(ax, history.steps, history.before, history.after)
    _step_axis(ax)
    ax.set_ylim(bottom=0)
    sum_of_squares = r"$\sum_l \|u_{l+1} - u_l\|^2$"
    ax.set_ylabel(
        sum_of_squares + (r" / $\sum_l \|u_l\|^2$" if relative else ""), size="medium"
    )
    what = field.replace("_", " ") + " of updates"
    _title_and_legend(ax, _title(what, history.stack, history.role), lines)
    return ax


def cosines_over_training(
    records: DepthRecord | Sequence[DepthRecord],
    *,
    stack: Any = None,
    role: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Cosines of neighboring layers' updates, before and after smoothing, by step.

    The lines are means over the pairs of neighbors, the bands reach from the least to
    the greatest cosine of a pair.

    Args:
      records: as in `roughness_over_training`.
      stack: name of the stack; None is the only one.
      role: name of a parameter inside the block; None is the whole block.
      ax: where to draw; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError, ValueError, ImportError: as `roughness_over_training`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.diagnostics.monitor_depth(gs.smooth_over_depth(depth, 1.0), depth)
      >>> updates = {"blocks": {"w": jnp.array([[3.0, 4.0], [3.0, 4.0], [-4.0, 3.0]])}}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> ax = gs.plots.cosines_over_training([gs.diagnostics.monitored(state)])
      >>> ax.lines[0].get_ydata()  # the mean of 1 and 0
      array([0.5])
      >>> plt.close(ax.figure)
    """
    history = _history(
        "cosines_over_training", records, stack, role, _mean_and_range_of_cosines
    )
    ax = _axes("cosines_over_training", ax, (6.4, 3.8))
    means = [numbers[:, 0] for numbers in (history.before, history.after)]
    lines = _draw_lines(ax, history.steps, *means)
    bands = [
        ax.fill_between(
            history.steps,
            *(numbers[:, 1], numbers[:, 2]),
            facecolor=(style["color"], opacity),
            edgecolor=style["color"],
            linestyle=style["linestyle"],
            linewidth=0.6,
        )
        for numbers, style, opacity in (
            (history.before, _BEFORE, 0.1),
            (history.after, _AFTER, 0.25),
        )
    ]
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0.9, label="_zero")
    _step_axis(ax)
    ax.set_ylabel("cosine: mean and range over pairs")
    _title_and_legend(
        ax,
        _title("cosines of neighbors' updates", history.stack, history.role),
        [*zip(bands, lines, strict=True)],
    )
    return ax


def layer_norms(
    record: DepthRecord,
    *,
    stack: Any = None,
    role: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Norm of each layer's update, before and after smoothing, along depth.

    Args:
      record: one `diagnostics.DepthRecord`, without an axis over time.
      stack: name of the stack; None is the only one.
      role: name of a parameter inside the block; None is the whole block.
      ax: where to draw; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError: for something that is not a record, such as an optimizer's state.
      ValueError: for several records, or one that recorded nothing yet; for a stack or
        role that is not there, or without `stack` where there are several.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.diagnostics.monitor_depth(gs.smooth_over_depth(depth, 0.5), depth)
      >>> updates = {"blocks": {"w": jnp.array([[4.0], [0.0], [0.0]])}}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> ax = gs.plots.layer_norms(gs.diagnostics.monitored(state))
      >>> for line in ax.lines:
      ...     print(line.get_label(), line.get_ydata())
      before smoothing [4. 0. 0.]
      after smoothing [3. 1. 0.]
      >>> plt.close(ax.figure)
    """
    call = "plots.layer_norms"
    if isinstance(record, Sequence) and record and all(map(_is_record, record)):
        raise ValueError(
            f"`record` must be one record, but is a sequence of {len(record)}. Write "
            f"`{call}(records[-1])` for the last."
        )
    _check_record("record", record, call, "one `diagnostics.DepthRecord`")
    if np.ndim(record.step):
        raise ValueError(
            f"`record` must be of one step, but its arrays have a leading axis: `step` "
            f"has shape {np.shape(record.step)}. Probably `jax.lax.scan` stacked the "
            f"records. Write `{call}(jax.tree.map(lambda x: x[-1], record))` for the "
            f"last."
        )
    if record.step < 0:
        raise _nothing_recorded("record")
    before, after, name, role = _before_and_after(record, stack, role, f"{call}(record")
    ax = _axes("layer_norms", ax, (6.4, 3.8))
    layers = np.arange(len(before.norms))
    lines = _draw_lines(ax, layers, before.norms, after.norms)
    _layer_ticks(ax.xaxis)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("layer, in depth order")
    ax.set_ylabel(r"$\|u_l\|$")
    what = f"norms of updates at step {int(record.step)}"
    _title_and_legend(ax, _title(what, name, role), lines)
    return ax


# -- Does it help? ---------------------------------------------------------------------


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
    ax = _axes("paired_differences", ax, (7.6, 1.3 + 0.5 * len(arms)))
    ax.axvline(0, color=_BLACK, linewidth=1, label="_zero")
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
    _plain(ax, grid_of="x")
    ax.set_xlabel("difference to the base")
    means = f"mean, {100 * level:g} % interval (filled: excludes 0)"
    keys = [ax.plot([], [], **_SEED)[0], ax.plot([], [], "s-", color=_BLUE)[0]]
    _title_and_legend(ax, "paired differences", keys, ["one seed", means])
    return ax


def _draw_interval(ax: Axes, row: float, mean: float, half_width: float) -> None:
    excludes = abs(mean) > half_width
    ax.errorbar(
        mean,
        row,
        xerr=None if math.isnan(half_width) else half_width,
        marker="s",
        markersize=5.5,
        markerfacecolor=_BLUE if excludes else "white",
        color=_BLUE,
        linewidth=1.6,
        capsize=4,
    )


def _mean_and_half_width(values: np.ndarray, level: float) -> tuple[float, float]:
    """The mean and how far Student's t interval reaches from it; NaN for unknown."""
    from scipy import stats  # slow to import

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


# -- What was recorded -----------------------------------------------------------------


class _History(NamedTuple):
    """Numbers over training.

    Attributes:
      steps: (T,), ascending.
      before: (T, ...), of what went into the smoothing.
      after: the same of what came out.
      stack: its name.
      role: its name, None for the block.
    """

    steps: np.ndarray
    before: np.ndarray
    after: np.ndarray
    stack: str
    role: str | None


def _history(
    function: str,
    records: Any,
    stack: Any,
    role: Any,
    numbers_of: Callable[[DepthStatistics | RoleStatistics], Any],
) -> _History:
    """Some numbers of all that was recorded, each step once."""
    call = f"plots.{function}"
    allowed = (
        "a sequence of `diagnostics.DepthRecord`, or one with a leading axis over time"
    )
    if _is_record(records) or not isinstance(records, Sequence):
        records = [records]
    elif not records:
        raise _nothing_recorded("records")
    steps, before, after = [], [], []
    name, of_role = "", None
    for record in records:
        _check_record("records", record, call, allowed)
        if np.ndim(record.step) > 1:
            raise ValueError(
                f"`records` must have one axis over time, but `step` has shape "
                f"{np.shape(record.step)}. Probably `jax.vmap` added one over seeds. "
                f"Write `{call}(jax.tree.map(lambda x: x[0], records))` for the first."
            )
        *pair, name, of_role = _before_and_after(record, stack, role, f"{call}(records")
        steps.append(np.atleast_1d(record.step))
        for numbers, statistics in zip((before, after), pair, strict=True):
            found = np.asarray(numbers_of(statistics), np.float64)
            # One step is a time axis of length 1.
            numbers.append(found if np.ndim(record.step) else found[None])
    at = _last_of_each_step(np.concatenate(steps))
    if not at.size:
        raise _nothing_recorded("records")
    joined = (np.concatenate(x)[at] for x in (steps, before, after))
    return _History(*joined, stack=name, role=of_role)


def _last_of_each_step(steps: np.ndarray) -> np.ndarray:
    """Where each step stands last, by step; -1 is none."""
    found, from_the_end = np.unique(steps[::-1], return_index=True)
    return (len(steps) - 1 - from_the_end)[found >= 0]


def _mean_and_range_of_cosines(of: DepthStatistics | RoleStatistics) -> np.ndarray:
    cosines = np.asarray(of.cosines, np.float64)
    return np.stack([cosines.mean(-1), cosines.min(-1), cosines.max(-1)], axis=-1)


def _is_record(value: Any) -> bool:
    return all(hasattr(value, field) for field in ("step", "before", "after"))


def _check_record(argument: str, value: Any, call: str, allowed: str) -> None:
    if _is_record(value) and isinstance(value.before, Mapping):
        return
    raise TypeError(
        f"`{argument}` must be {allowed}, but there is a {type(value).__name__}. If it "
        f"is a state of an optimizer that has a `monitor_depth`, take the record out "
        f"of it: `{call}(gs.diagnostics.monitored(opt_state))`."
    )


def _nothing_recorded(argument: str) -> ValueError:
    return ValueError(
        f"nothing is recorded in `{argument}`: it is empty, or `step` is -1. Probably "
        f"the state is the one of `init`. Read it after an update: "
        f"`updates, opt_state = tx.update(gradients, opt_state, params)`, then "
        f"`gs.diagnostics.monitored(opt_state)`."
    )


def _before_and_after(
    record: Any, stack: Any, role: Any, call: str
) -> tuple[Any, Any, str, str | None]:
    """Statistics before and after, of a role or a block, and the names of what."""
    name, before = _of_stack(record.before, stack, call)
    after = record.after[name]
    if role is None:
        return before, after, name, None
    if text_of(role) not in before.roles:
        roles = ", ".join(map(repr, before.roles))
        stack_too = "" if stack is None else f", stack={name!r}"
        raise ValueError(
            f"`role` is {role!r}, but stack {name!r} has the roles {roles}. Write "
            f"`{call}{stack_too}, role={next(iter(before.roles))!r})`, or leave it out "
            f"for the whole block."
        )
    role = text_of(role)
    return before.roles[role], after.roles[role], name, role


def _of_stack(of_stacks: Mapping[str, Any], stack: Any, call: str) -> tuple[str, Any]:
    """The name of the stack and what is there of it."""
    if stack is None and len(of_stacks) == 1:
        (item,) = of_stacks.items()
        return item
    if stack is not None and text_of(stack) in of_stacks:
        return text_of(stack), of_stacks[text_of(stack)]
    if not of_stacks:
        raise ValueError(
            "there are no stacks in this record: `depth` matched no layers when it was "
            "made. See what it matches by `print(describe(depth, params))`."
        )
    names = ", ".join(map(repr, of_stacks))
    found = "there are several stacks" if stack is None else f"`stack` is {stack!r}"
    raise ValueError(
        f"{found}, but one of these is needed: {names}. Write "
        f"`{call}, stack={next(iter(of_stacks))!r})`."
    )


# -- Drawing ---------------------------------------------------------------------------


def _axes(function: str, ax: Any, size: tuple[float, float]) -> Axes:
    """`ax`, or that of a new figure of this size in inches."""
    try:
        import matplotlib.axes
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise  # there, but broken
        raise ImportError(
            f"`plots.{function}` draws with matplotlib, which is not installed. Write "
            f'`python -m pip install "gradsmooth_optax[plots]"`.'
        ) from error
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, matplotlib.axes.Axes):
        raise TypeError(
            f"`ax` must be a matplotlib Axes, but is of type {type(ax).__name__}. "
            f"Write `figure, ax = plt.subplots()` and then "
            f"`plots.{function}(..., ax=ax)`; of several take one: `ax=axes[0]`."
        )
    return ax


def _heat_map(
    ax: Axes, values: np.ndarray, limit: float, text_of_value: Callable[[float], str]
) -> Axes:
    """Draws a matrix from -limit to limit, and returns the Axes of its color bar."""
    image = ax.imshow(
        values, cmap=_DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    bar = ax.figure.colorbar(image, ax=ax).ax
    for axis in (ax.xaxis, ax.yaxis):
        _layer_ticks(axis)
    size = min(_font_size_in_cells(ax, len(values)), 9)
    if len(values) <= _MAX_NUMBERED and size >= 5:
        for (row, column), value in np.ndenumerate(values):
            ax.text(
                column,
                row,
                text_of_value(value),
                ha="center",
                va="center",
                size=size,
                color="white" if abs(value) > 0.65 * limit else "black",
            )
    else:
        _hatch_negative(ax, bar, values, limit)
    return bar


def _font_size_in_cells(ax: Axes, num_layers: int) -> float:
    """In points, for numbers of five characters."""
    box = ax.get_window_extent()
    return 0.33 * 72 / ax.figure.dpi * min(box.width, box.height) / num_layers


def _hatch_negative(ax: Axes, bar: Axes, values: np.ndarray, limit: float) -> None:
    """Marks what has another color than its opposite, but in a print not its gray."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    threshold = -0.1 * limit  # what is nearer to 0 looks white
    rows, columns = np.nonzero(values < threshold)
    if not rows.size:
        return
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) - 0.5
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY]
    cells = np.stack([columns, rows], axis=-1)[:, None] + corners
    style: dict[str, Any] = {"facecolor": "none", "linewidth": 0, "hatch": "////"}
    path = Path(cells.reshape(-1, 2), np.tile(codes, len(cells)))
    # Where it reaches is known, and matplotlib slow to find out.
    patch = PathPatch(path, edgecolor="0.15", **style)
    patch.set_in_layout(False)
    ax.add_artist(patch)
    bar.axhspan(-limit, threshold, edgecolor="0.15", **style)


def _draw_lines(ax: Axes, x: Any, before: Any, after: Any) -> list[Any]:
    lines = []
    for y, style, label in (
        (before, _BEFORE, "before smoothing"),
        (after, _AFTER, "after smoothing"),
    ):
        every = -(-len(x) // 24)
        lines += ax.plot(
            np.asarray(x),
            np.asarray(y),
            label=label,
            markevery=every,
            markersize=4.5,
            linewidth=1.5,
            **style,
        )
    _plain(ax)
    return lines


def _plain(ax: Axes, grid_of: Any = "both") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis=grid_of, alpha=0.25)
    ax.set_axisbelow(True)


def _layer_ticks(axis: Any) -> None:
    """Whole numbers, all of few layers and few of many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(13, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )


def _step_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    ax.set_xlabel("step")


def _title_and_legend(
    ax: Axes,
    title: str,
    handles: Sequence[Any],
    labels: Sequence[str] = ("before smoothing", "after smoothing"),
) -> None:
    """A title, and under it, above all data, the legend in one row."""
    ax.set_title(title, size="medium", pad=24)
    ax.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        borderaxespad=0.2,
        ncols=2,
        frameon=False,
        fontsize="small",
        handlelength=3,
    )


# -- Texts -----------------------------------------------------------------------------


def _title(what: str, stack: str, role: str | None = None) -> str:
    where = stack if role is None else f"{stack}, {role}"
    between = ": " if len(what) + len(where) < 44 else "\n"
    return f"{what}{between}{_one_line(where)}"


def _one_line(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:30]} … {text[-15:]}"


def _compact(value: float, decimals: int) -> str:
    """.25 for 0.250: a cell has room for few characters."""
    text = f"{value:.{decimals}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    if text in ("-0", "0"):
        return "0"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _short(value: Any) -> str:
    """An operator with what is not its default, without the entries of arrays."""
    if isinstance(value, Operator):
        if not dataclasses.is_dataclass(value):
            return type(value).__name__
        found = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        fields = [
            _short(x) if isinstance(x, Operator | tuple) else f"{f.name}={_short(x)}"
            for f, x in found
            if f.default is dataclasses.MISSING or x is not f.default
        ]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, np.ndarray | jax.Array):
        return f"{float(value):g}" if value.ndim == 0 else f"array of {value.shape}"
    return getattr(value, "__name__", None) or repr(value)
