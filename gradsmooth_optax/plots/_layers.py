"""Layers against layers: an operator's matrix, and the cosines of updates."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsmooth_optax import diagnostics
from gradsmooth_optax._checks import positive_int
from gradsmooth_optax._depth.specs import DepthLike
from gradsmooth_optax._operators.composed import with_matrix
from gradsmooth_optax.plots._axes import axes_of, layer_ticks, one_stack, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

_DIVERGING = "RdBu"  # red below 0, white, blue above
_MAX_NUMBERED = 12  # layers of a heat map with room for a number in each cell


def operator_matrix(operator: Any, num_layers: int, *, ax: Axes | None = None) -> Axes:
    """Heat map of an operator's matrix S: row l holds what layer l receives.

    Colors mean the same in every picture of an operator, so that panels compare: from
    -1 to 1, or as far as a weight reaches beyond, by its square root, which shows small
    weights too.

    Up to 12 layers have a number in each cell that is not 0, where there is room. In
    larger ones cells that are clearly negative are hatched.

    Args:
      operator: an operator with a matrix and without schedules (see `Operator.at`).
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
      'window(0.2), L = 12'
      >>> plt.close(ax.figure)
    """
    operator = with_matrix(operator, "plots.operator_matrix")
    num_layers = positive_int("num_layers", num_layers)
    if operator.scheduled:
        raise TypeError(
            f"`operator` of `plots.operator_matrix` is {operator!r}, whose "
            f"strength is a schedule: its matrix depends on the step. Write "
            f"`plots.operator_matrix(operator.at(step), {num_layers})`."
        )
    s = np.asarray(operator.matrix(num_layers), np.float64)
    ax = axes_of("operator_matrix", ax, (6.0, 4.6))
    from matplotlib.colors import FuncNorm

    limit = max(1.0, float(np.abs(s).max()))
    norm = FuncNorm((_signed_root, _signed_square), vmin=-limit, vmax=limit)
    bar = _heat_map(ax, s, norm, lambda x: _compact(x, 3) if x else "")
    bar.set_yticks([*np.arange(-1, 1.1, 0.5), -0.1, 0.1])
    bar.set_ylabel("weight")
    ax.set_ylabel("layer that receives")
    ax.set_xlabel("from layer")
    name = textwrap.fill(
        repr(operator).replace("gs.", ""), 48, max_lines=2, placeholder=" …"
    )
    ax.set_title(f"{name}, L = {num_layers}", size="medium")
    return ax


def cosine_matrix(
    updates: Any,
    depth: DepthLike,
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
    stacks = diagnostics.cosine_matrix(updates, depth, strict=strict)
    call = "plots.cosine_matrix(updates, depth"
    if not stacks:
        raise ValueError(
            "`depth` matches no layers of `updates` that have a neighbor, so there is "
            "nothing to draw. See what it matches by `print(describe(depth, updates))`."
        )
    name, found = one_stack(stacks, stack, call)
    cosines = np.asarray(found, np.float64)
    ax = axes_of("cosine_matrix", ax, (6.0, 4.6))
    from matplotlib.colors import Normalize

    bar = _heat_map(ax, cosines, Normalize(-1, 1), lambda x: _compact(x, 2))
    bar.set_ylabel("cosine")
    ax.set_ylabel("layer, in depth order")
    ax.set_xlabel("layer, in depth order")
    ax.set_title(title_of("cosines of updates", name), size="medium")
    return ax


def _signed_root(x: Any) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _heat_map(
    ax: Axes, values: np.ndarray, norm: Normalize, text_of_value: Callable[[float], str]
) -> Axes:
    """Draws a matrix on a scale around 0, and returns the Axes of its color bar."""
    image = ax.imshow(values, cmap=_DIVERGING, norm=norm, interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax).ax
    for axis in (ax.xaxis, ax.yaxis):
        layer_ticks(axis)
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
                color="white" if abs(norm(value) - 0.5) > 0.325 else "black",
            )
    else:
        _hatch_negative(ax, bar, values, norm)
    return bar


def _font_size_in_cells(ax: Axes, num_layers: int) -> float:
    """In points, for numbers of five characters."""
    box = ax.get_window_extent()
    return 0.33 * 72 / ax.figure.dpi * min(box.width, box.height) / num_layers


def _hatch_negative(ax: Axes, bar: Axes, values: np.ndarray, norm: Normalize) -> None:
    """Hatches negative cells, because red and blue print as the same gray."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    threshold = float(norm.inverse(0.45))  # what is nearer to 0 looks white
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
    bar.axhspan(bar.get_ylim()[0], threshold, edgecolor="0.15", **style)


def _compact(value: float, decimals: int) -> str:
    """.25 for 0.250: a cell has room for few characters."""
    text = f"{value:.{decimals}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    if text in ("-0", "0"):
        return "0"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
