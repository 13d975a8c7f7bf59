"""Groupings that are allowed, but probably not what was meant: warnings."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import jax

from gradsmooth_optax._calls import raw
from gradsmooth_optax._depth.groups import Group, Grouping, name_of
from gradsmooth_optax._depth.paths import show_path, some
from gradsmooth_optax._depth.reading.found_stack import (
    VECTOR_NAMES,
    common_axes,
    layer_kinds,
)
from gradsmooth_optax._depth.reading.words import names_layers, split_number

# Kinds of layers that alternate. Others, such as img and txt, are parts of one layer.
_LAYER_KINDS = {"local", "global", "sliding", "full"}


class DepthWarning(UserWarning):
    """A grouping that is allowed, but probably not what was meant.

    Raised by `init` where `strict`, which is once for each transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import warnings
      >>> params = {f"Net_0/Block_{i}": {"w": jnp.ones(2)} for i in range(3)}
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     state = gs.smooth_over_depth(gs.unrolled()).init(params)
      >>> [warning.category.__name__ for warning in caught]
      ['DepthWarning']
    """


def warn_of_suspicions(grouping: Grouping) -> None:
    """Warns of layers that are probably not coupled, or not with their neighbors."""
    stacks: dict[Hashable, list[Group]] = defaultdict(list)
    for group in grouping.groups:
        stacks[group.stack].append(group)
    for groups in stacks.values():
        for suspicion in (
            *_uncoupled(groups, grouping),
            *_cycles(groups),
            *_kinds(groups),
        ):
            warnings.warn(
                f"`depth` {grouping.spec!r} {suspicion}; or pass `strict=False` if it "
                f"is meant.",
                DepthWarning,
                stacklevel=3,
            )


def _uncoupled(groups: Sequence[Group], grouping: Grouping) -> Iterator[str]:
    """A stack in which no run has two layers, though it seems to have several."""
    if any(len(run) > 1 for group in groups for run in group.runs):
        return
    one = groups[0]
    found = (
        f"couples nothing in stack {one.stack!r}: each of its {len(groups)} groups has "
        f"one layer, as {name_of(one.stack, one.role)} "
        f"({show_path(one.members[0].path)})"
    )
    numbered = list(
        dict.fromkeys(
            segment
            for group in groups
            for segment in str(group.role).split("/")
            if split_number(segment) and names_layers(segment)
        )
    )
    if len(numbered) > 1:
        pattern = re.escape(numbered[0].rstrip("0123456789")) + r"(\d+)/"
        yield (
            f"{found}. Probably {numbered[0]} is the layer, and `depth` takes another "
            f"number. To fix: write `unrolled({raw(pattern)})`"
        )
        return
    leaves = [
        (member.path, grouping.leaves[member.leaf])
        for group in groups
        for member in group.members
        if not member.axes
    ]
    vectors = [path for path, _ in leaves if path and str(path[-1]) in VECTOR_NAMES]
    modules = {path[:-1] for path, _ in leaves}
    if vectors and len(modules) > 1 and (axes := common_axes(leaves)):
        start = show_path(one.members[0].path).removesuffix(str(one.role))
        yield (
            f"{found}. But all its leaves have one size on axis {axes[0]}: they are "
            f"probably stacked layers. To fix: write `scanned({start!r}, "
            f"axis={axes[0]})`"
        )


def _cycles(groups: Sequence[Group]) -> Iterator[str]:
    """Stacked leaves whose roles are alike but for the number of a layer."""
    positions: dict[str, dict[int, set]] = defaultdict(lambda: defaultdict(set))
    for group in groups:
        first, _, rest = str(group.role).partition("/")
        split = split_number(first)
        if split and names_layers(first) and any(m.axes for m in group.members):
            positions[split[0]][split[1]].add((rest, group.shape))
    for stem, roles in positions.items():
        alike = [n for n in roles if any(roles[n] & roles[k] for k in roles if k != n)]
        if not alike:
            continue
        one = next(g for g in groups if str(g.role).startswith(stem)).members[0]
        axes = one.axes
        before = show_path(one.path).partition(stem)[0]
        pattern = re.escape(before + stem) + r"(\d+)/"
        yield (
            f"couples each of {stem}{min(alike)} … {stem}{max(alike)} of stack "
            f"{groups[0].stack!r} with itself in the next step of the scan, "
            f"{len(roles)} layers on. They are probably the layers of a cycle. To fix: "
            f"write "
            f"`scanned({raw(pattern)}, axis={axes[0] if len(axes) == 1 else axes}, "
            f"stride={len(roles)})`"
        )


def _kinds(groups: Sequence[Group]) -> Iterator[str]:
    """Roles that all are there for each of several kinds of layers."""
    if all(group.num_layers == 1 for group in groups):
        return
    roles = [
        (tuple(str(g.role).split("/")), jax.ShapeDtypeStruct(g.shape, g.dtype))
        for g in groups
    ]
    kinds = layer_kinds((), roles, 0)
    if not kinds or not set(kinds) <= _LAYER_KINDS:
        return
    axes = groups[0].members[0].axes
    cure = "a function that gives each its number"
    if axes:
        axis = axes[0] if len(axes) == 1 else axes
        cure = (
            f"`first_match` of `scanned(r'(?P<role>\\w+)_{kinds[0]}/', axis={axis}, "
            f"start=0, stride={len(kinds)}, stack='decoder')` and the like"
        )
    yield (
        f"couples layers of one kind of stack {groups[0].stack!r} with each other: all "
        f"its parts are there as {some(kinds)}, which are probably layers that follow "
        f"each other. To fix: write {cure}"
    )
