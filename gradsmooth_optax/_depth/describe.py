"""`describe`: what a depth spec does to a tree, for a person to check at a glance."""

from __future__ import annotations

import dataclasses
import html
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.groups import Group, group_by_depth
from gradsmooth_optax._depth.paths import Place, show_path
from gradsmooth_optax._depth.preset_registry import expanded
from gradsmooth_optax._depth.proposals import errors, warnings_of
from gradsmooth_optax._depth.specs import DepthLike, DepthSpec, as_spec

_LONGEST_LIST = 50


@dataclasses.dataclass(frozen=True, eq=False)
class DepthSummary:
    """What a depth spec does to a tree; `str()` is a table.

    Attributes:
      spec: the spec.
      groups: one per stack, role, per-layer shape and dtype, with `stack`, `role`,
        `shape`, `dtype`, `layers`, `num_layers`, `runs`, `gaps`, `duplicates`.
      untouched: (path, shape, dtype) of every leaf that passes through.
      unmatched: the parts of a composed spec (members of a `first_match`, entries of
        a `from_tree`) that matched nothing.
      smoothed: number of parameters that are coupled with another layer.
      total: number of parameters of floating or complex dtype.
      problem: the error that a transformation with `strict=True` raises, or "".
      doubts: the warnings that it gives.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)}
      >>> summary = gs.describe(gs.scanned("blocks/"), params)
      >>> summary.groups[0].layers, summary.smoothed, summary.total
      ((0, 1, 2), 6, 8)
      >>> [path for path, shape, dtype in summary.untouched]
      ['head']
    """

    spec: DepthSpec
    groups: tuple[Group, ...]
    untouched: tuple[tuple[str, tuple[int, ...], Any], ...]
    unmatched: tuple[DepthSpec, ...]
    smoothed: int
    total: int
    problem: str
    doubts: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self._headline()]
        rows = self._rows()
        if rows:
            lines += ["", *_aligned([_HEADER, *rows])]
        for title, items in self._lists():
            lines += ["", f"{title}:", *(f"  {item}" for item in _shortened(items))]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            style = "text-align: left"
            inner = "".join(
                f'<{tag} style="{style}">{html.escape(c)}</{tag}>' for c in cells
            )
            return f"<tr>{inner}</tr>"

        parts = [f"<p>{html.escape(self._headline())}</p>"]
        if rows := self._rows():
            body = "".join(row(cells, "td") for cells in rows)
            parts.append(f"<table>{row(_HEADER, 'th')}{body}</table>")
        for title, items in self._lists():
            shown = "<br>".join(map(html.escape, _shortened(items)))
            parts.append(f"<p><b>{html.escape(title)}</b><br>{shown}</p>")
        return "".join(parts)

    def _headline(self) -> str:
        share = self.smoothed / self.total if self.total else 0.0
        stacks = len({group.stack for group in self.groups})
        named, meant = repr(self.spec), repr(expanded(self.spec))
        stands_for = f" = {meant}" * (meant != named)
        return (
            f"{named}{stands_for}: {_count(stacks, 'stack')}, "
            f"{_count(len(self.groups), 'group')}; smoothed: "
            f"{self.smoothed:,} of {self.total:,} parameters ({share:.1%})"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        layers = defaultdict(set)
        for group in self.groups:
            layers[group.stack].update(group.layers)
        rows = [_row(group, layers[group.stack]) for group in self.groups]
        hidden = len(rows) - _LONGEST_LIST
        if hidden > 0:
            rows = [*rows[:_LONGEST_LIST], (f"… and {hidden} more groups",)]
        return rows

    def _lists(self) -> list[tuple[str, list[str]]]:
        largest_first = sorted(self.untouched, key=lambda leaf: -math.prod(leaf[1]))
        size = sum(math.prod(shape) for _, shape, _ in self.untouched)
        leaves = _count(len(self.untouched), "leaf", "leaves")
        lists = [
            (
                f"untouched ({leaves}, {size:,} parameters)",
                [
                    f"{path or '(the tree itself)'} {shape}: {math.prod(shape):,} "
                    f"{dtype}"
                    for path, shape, dtype in largest_first
                ],
            ),
            ("parts of the spec that matched nothing", list(map(repr, self.unmatched))),
        ]
        lists.append(("an error where `strict`", [self.problem] * bool(self.problem)))
        lists.append(("a warning where `strict`", list(self.doubts)))
        return [(title, items) for title, items in lists if items]


_HEADER = ("stack", "role", "layers", "per layer", "dtype", "leaves", "note")


def describe(depth: DepthLike, params: Any) -> DepthSummary:
    """Shows which layers are coupled with which, and every leaf left untouched.

    It reports gaps and duplicates, where the transformations raise, and with what they
    say; look at it before a run.

    Args:
      depth: where depth is, as in `smooth_over_depth`.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`s, such as
        `jax.eval_shape(model.init, ...)`.

    Returns:
      A summary with a table as its `str()`, and HTML in notebooks.

    Raises:
      TypeError: for a `depth` of the wrong kind.
      ValueError: for a depth axis that a leaf does not have.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((8, 2)), "blocks": {"w": jnp.ones((12, 2, 2))}}
      >>> gs.describe(gs.scanned("blocks/"), params)
      gs.scanned('blocks/'): 1 stack, 1 group; smoothed: 48 of 64 parameters (75.0%)
      <BLANKLINE>
      stack   role  layers     per layer  dtype    leaves         note
      blocks  w     0-11 (12)  (2, 2)     float32  1 over axis 0
      <BLANKLINE>
      untouched (1 leaf, 16 parameters):
        embed (8, 2): 16 float32
    """
    if isinstance(params, DepthSpec):
        raise TypeError(
            f"`params` of `describe` is the spec {params!r}: the arguments are "
            f"swapped. Write `describe(depth, params)`."
        )
    spec = as_spec(depth)
    grouping = group_by_depth(spec, params)
    sizes = [
        math.prod(np.shape(leaf)) if inexact_dtype(leaf) is not None else 0
        for leaf in grouping.leaves
    ]
    coupled = sum(
        int((group.run_lengths > 1).sum()) * math.prod(group.shape)
        for group in grouping.groups
    )
    problem = next(errors(grouping, strict=True), "")
    return DepthSummary(
        spec,
        grouping.groups,
        tuple(
            (show_path(grouping.paths[i]), np.shape(leaf), _dtype(leaf))
            for i in grouping.untouched
            for leaf in [grouping.leaves[i]]
        ),
        tuple(_unmatched(spec, grouping.places)),
        coupled,
        sum(sizes),
        problem,
        () if problem else tuple(warnings_of(grouping)),
    )


def _unmatched(spec: DepthSpec, places: Sequence[Place]) -> list[DepthSpec]:
    """The parts of a composed spec that match nothing."""
    if not any(spec.assign(places)):
        return [spec]
    return [lost for part in spec.parts for lost in _unmatched(part, places)]


def _row(group: Group, stack_layers: set[int]) -> tuple[str, ...]:
    # The layers of a duplicated number are counted, not shown twice.
    layers = f"{_ranges(group.layers)} ({group.num_layers})"
    axes = sorted({member.axes for member in group.members})
    where = " and ".join(
        f"{sum(m.axes == a for m in group.members)} {_over(a)}" for a in axes
    )
    notes = []
    if group.num_layers == 1:
        notes.append("single, unchanged")
    if group.ranked:
        notes.append("ranked")
    first, last = min(group.layers, default=0), max(group.layers, default=0)
    beyond = [n for n in stack_layers if not first <= n <= last]
    if beyond:
        # Right for a role that only some layers have; a wrong axis looks like this too.
        notes.append(f"not in {_layers(beyond)} of the stack")
    if group.missing:
        gaps = [f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in group.missing]
        one = len(gaps) == 1 and len(group.missing[0]) == 1
        shown = ", ".join(_shortened(gaps, 6))
        notes.append(f"gap at {'layer' if one else 'layers'} {shown}")
    if group.duplicates:
        notes.append(f"twice: {_ranges(group.duplicates)}")
    return (
        str(group.stack) or "(root)",
        str(group.role) or "(leaf)",
        layers,
        str(group.shape),
        str(group.dtype),
        where,
        ", ".join(notes),
    )


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", type(leaf).__name__)


def _over(axes: tuple[int, ...]) -> str:
    if not axes:
        return "one per layer"
    named = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
    return f"over {named}"


def _layers(numbers: Sequence[int]) -> str:
    return f"{'layer' if len(numbers) == 1 else 'layers'} {_ranges(numbers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7, 9-10 for ascending numbers."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    shown = ["-".join(map(str, r)) for r in ranges]
    return ", ".join(_shortened(shown, 6))


def _shortened(items: list[str], limit: int = _LONGEST_LIST) -> list[str]:
    hidden = len(items) - limit
    return [*items[:limit], f"… and {hidden} more"] if hidden > 0 else items


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    table = [row for row in rows if len(row) == len(_HEADER)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=False)
        ).rstrip()
        for row in rows
    ]
