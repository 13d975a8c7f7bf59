"""Before and after smoothing: what `monitor_depth` recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._depth.groups import text_of
from gradsmooth_optax.diagnostics._monitor import DepthRecord
from gradsmooth_optax.diagnostics._statistics import DepthStatistics, RoleStatistics
from gradsmooth_optax.plots._axes import (
    BLACK,
    BLUE,
    axes_of,
    layer_ticks,
    one_stack,
    plain,
    title_and_legend,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE: dict[str, Any] = {
    **{"color": BLACK, "linestyle": "--"},
    **{"marker": "o", "markerfacecolor": "none"},
}
_AFTER: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "s"}


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
      >>> smooth = gs.smooth_over_depth(depth, 0.5)
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
    ax = axes_of("roughness_over_training", ax, (6.4, 3.8))
    lines = _draw_lines(ax, history.steps, history.before, history.after)
    _step_axis(ax)
    ax.set_ylim(bottom=0)
    sum_of_squares = r"$\sum_l \|u_{l+1} - u_l\|^2$"
    ax.set_ylabel(
        sum_of_squares + (r" / $\sum_l \|u_l\|^2$" if relative else ""), size="medium"
    )
    what = field.replace("_", " ") + " of updates"
    title_and_legend(ax, title_of(what, history.stack, history.role), lines)
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
    ax = axes_of("cosines_over_training", ax, (6.4, 3.8))
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
    title_and_legend(
        ax,
        title_of("cosines of neighbors' updates", history.stack, history.role),
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
    if np.asarray(record.step) < 0:
        raise _nothing_recorded("record")
    before, after, name, role = _before_and_after(record, stack, role, f"{call}(record")
    ax = axes_of("layer_norms", ax, (6.4, 3.8))
    layers = np.arange(len(before.norms))
    lines = _draw_lines(ax, layers, before.norms, after.norms)
    layer_ticks(ax.xaxis)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("layer, in depth order")
    ax.set_ylabel(r"$\|u_l\|$")
    what = f"norms of updates at step {int(record.step)}"
    title_and_legend(ax, title_of(what, name, role), lines)
    return ax


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
    name, role_name = "", None
    for record in records:
        _check_record("records", record, call, allowed)
        if np.ndim(record.step) > 1:
            raise ValueError(
                f"`records` must have one axis over time, but `step` has shape "
                f"{np.shape(record.step)}. Probably `jax.vmap` added one over seeds. "
                f"Write `{call}(jax.tree.map(lambda x: x[0], records))` for the first."
            )
        *pair, name, role_name = _before_and_after(
            record, stack, role, f"{call}(records"
        )
        steps.append(np.atleast_1d(record.step))
        for numbers, statistics in zip((before, after), pair, strict=True):
            found = np.asarray(numbers_of(statistics), np.float64)
            # One step is a time axis of length 1.
            numbers.append(found if np.ndim(record.step) else found[None])
    at = _last_of_each_step(np.concatenate(steps))
    if not at.size:
        raise _nothing_recorded("records")
    joined = (np.concatenate(x)[at] for x in (steps, before, after))
    return _History(*joined, stack=name, role=role_name)


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
    name, before = one_stack(record.before, stack, call)
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
    plain(ax)
    return lines


def _step_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    ax.set_xlabel("step")
