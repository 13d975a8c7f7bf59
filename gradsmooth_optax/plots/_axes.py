"""What the plots share: axes, their looks, and the stack that is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsmooth_optax._depth.groups import text_of
from gradsmooth_optax._extras import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Two of Okabe and Ito's colors, a dark and a lighter one in gray as well.
BLACK, BLUE = "#000000", "#0072B2"


def axes_of(function: str, ax: Any, size: tuple[float, float]) -> Axes:
    """`ax`, or that of a new figure of this size in inches."""
    pyplot = needs("matplotlib.pyplot", "plots", f"plots.{function}")
    if ax is None:
        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, pyplot.Axes):
        raise TypeError(
            f"`ax` must be a matplotlib Axes, but is of type {type(ax).__name__}. "
            f"Write `figure, ax = plt.subplots()` and then "
            f"`plots.{function}(..., ax=ax)`; of several take one: `ax=axes[0]`."
        )
    return ax


def one_stack(stacks: Mapping[str, Any], stack: Any, call: str) -> tuple[str, Any]:
    """The name of the stack and what is there of it."""
    if stack is None and len(stacks) == 1:
        (item,) = stacks.items()
        return item
    if stack is not None and text_of(stack) in stacks:
        return text_of(stack), stacks[text_of(stack)]
    if not stacks:
        raise ValueError(
            "there are no stacks in this record: when it was made, `depth` matched no "
            "layers that have a neighbor, as in a stack of one layer. See what it "
            "matches by `print(describe(depth, params))`."
        )
    names = ", ".join(map(repr, stacks))
    found = "there are several stacks" if stack is None else f"`stack` is {stack!r}"
    raise ValueError(
        f"{found}, but one of these is needed: {names}. Write "
        f"`{call}, stack={next(iter(stacks))!r})`."
    )


def plain(ax: Axes, grid_of: Any = "both") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis=grid_of, alpha=0.25)
    ax.set_axisbelow(True)


def layer_ticks(axis: Any) -> None:
    """Whole numbers, all of few layers and few of many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(13, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )


def title_and_legend(
    ax: Axes,
    title: str,
    handles: Sequence[Any],
    labels: Sequence[str] = ("before smoothing", "after smoothing"),
    columns: int = 2,
) -> None:
    """A title, and under it, above all data, the legend in one row."""
    ax.set_title(title, size="medium", pad=24)
    ax.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        borderaxespad=0.2,
        ncols=columns,
        frameon=False,
        fontsize="small",
        handlelength=3,
    )


def title_of(what: str, stack: str, role: str | None = None) -> str:
    where = stack if role is None else f"{stack}, {role}"
    between = ": " if len(what) + len(where) < 44 else "\n"
    return f"{what}{between}{_one_line(where)}"


def _one_line(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:30]} … {text[-15:]}"
