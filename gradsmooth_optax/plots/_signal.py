"""Is there anything along depth to couple? What filters leave of the error."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from gradsmooth_optax.plots._axes import (
    BLACK,
    BLUE,
    axes_of,
    one_stack,
    plain,
    title_and_legend,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradsmooth_optax.diagnostics import DepthSignal

_LOOKS: dict[str, dict[str, Any]] = {
    "best filter": {"marker": "s", "color": BLUE},
    "factor per layer": {"marker": "x", "color": "0.45"},
    "window(0.5)": {"marker": "o", "color": BLACK, "markerfacecolor": "none"},
}


def depth_signal(
    signal: DepthSignal, stack: Any = None, *, ax: Axes | None = None
) -> Axes:
    """What filters along depth leave of the error, a row for the block and each role.

    1, the line, is what the best single factor leaves. Where the best filter is no
    further to the left than one factor per layer, nothing is there to couple.

    Args:
      signal: from `diagnostics.depth_signal`.
      stack: name of the stack; None if there is one.
      ax: where to draw; None makes a new figure.

    Returns:
      The Axes.

    Raises:
      TypeError: for an `ax` that is no Axes.
      ValueError: for a stack that there is not.
      ImportError: without matplotlib.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import matplotlib.pyplot as plt
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> batches = [{"h": 1 + rng.normal(size=(4, 500))} for _ in range(16)]
      >>> signal = gs.diagnostics.depth_signal(batches, gs.scanned("h"))
      >>> ax = gs.plots.depth_signal(signal)
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['whole block', 'h']
      >>> plt.close(ax.figure)
    """
    name, block = one_stack(signal.blocks, stack, "plots.depth_signal(signal")
    rows = {"whole block": block} | {
        role or name: of for role, of in signal.roles[name].items()
    }
    ax = axes_of("depth_signal", ax, (7.6, 1.4 + 0.42 * len(rows)))
    ax.axvline(1, color=BLACK, linewidth=1)
    keys = {}
    for index, of in enumerate(rows.values()):
        for shift, (key, look) in zip((-0.2, 0.2, 0.0), _LOOKS.items(), strict=True):
            share = of.left[key]
            reach = [[share.value - share.low], [share.high - share.value]]
            keys[key] = ax.errorbar(
                share.value, index + shift, xerr=reach, linestyle="", capsize=3, **look
            )
    ax.set_yticks(range(len(rows)), [textwrap.fill(row, 34) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    plain(ax, grid_of="x")
    ax.set_xlabel("error left, relative to one factor for all layers")
    title = title_of("What is there to couple?", name)
    title_and_legend(ax, title, list(keys.values()), list(keys), columns=3)
    return ax
