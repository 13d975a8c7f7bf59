"""The groups of a tree that are coupled, or an error that says what is wrong."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from gradsmooth_optax._depth.doubts import warn
from gradsmooth_optax._depth.groups import (
    Group,
    Grouping,
    Member,
    group_by_depth,
    member_of,
)
from gradsmooth_optax._depth.paths import MASKED, show_path
from gradsmooth_optax._depth.proposals import errors, warnings_of
from gradsmooth_optax._depth.reading import signature
from gradsmooth_optax._depth.specs import DepthSpec


def coupled_groups(
    spec: DepthSpec,
    tree: Any,
    strict: bool,
    said: set[Hashable] | None = None,
    wholes: Sequence[Group] | None = None,
) -> Grouping:
    """Groups a tree by depth and checks that this is what was meant.

    The one entry of all that works along depth; `coupled` of the result are the groups
    in which some layer has a neighbor.

    Args:
      spec: where depth is.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      strict: as in `check_structure`.
      said: the warnings that were given before, and the trees that were asked about;
        neither happens again. None for no warnings.
      wholes: as in `check_structure`.

    Raises:
      ValueError: as `group_by_depth` and `check_structure`.
    """
    grouping = group_by_depth(spec, tree)
    check_structure(grouping, strict, wholes)
    if said is not None and strict:
        _warn(grouping, said)
    return grouping


def _warn(grouping: Grouping, said: set[Hashable]) -> None:
    tree = signature(grouping.places)
    if tree in said:
        return
    new = [warning for warning in warnings_of(grouping) if warning not in said]
    said.update((tree, *new))
    for warning in new:
        warn(warning)


def check_structure(
    grouping: Grouping, strict: bool, wholes: Sequence[Group] | None = None
) -> None:
    """Raises where the grouping is certainly wrong: the arguments are of `faults`."""
    if (outer := _outer.get()) not in (None, grouping.spec):
        _check_agreement(grouping, outer)
    for error in errors(grouping, strict, wholes):
        raise ValueError(error)


# -- Two specs in one optimizer --------------------------------------------------------

_outer: contextvars.ContextVar[DepthSpec | None] = contextvars.ContextVar(
    "outer", default=None
)


@contextlib.contextmanager
def numbered_by(spec: DepthSpec) -> Iterator[None]:
    """Inside, every tree must be grouped as `spec` says, or less of it.

    A recipe reads its own `depth`, and the smoothing that it was given another one,
    maybe deep inside a chain. So the recipe says around the smoothing's calls which
    spec is its own, and whatever groups a tree inside is held against it.
    """
    token = _outer.set(spec)
    try:
        yield
    finally:
        _outer.reset(token)


def _check_agreement(grouping: Grouping, outer: DepthSpec) -> None:
    """Raises where a recipe around numbers the layers of a leaf differently."""
    located = zip(grouping.places, outer.locate(grouping.places), strict=True)
    leaves = [(p.path, p.leaf, a) for p, a in located if p.leaf is not MASKED]
    for group in grouping.groups:
        for member in group.members:
            path, leaf, assignment = leaves[member.leaf]
            known = assignment and member_of(
                member.leaf, path, assignment, np.shape(leaf)
            )
            if (
                known
                and known.axes == member.axes
                and np.array_equal(known.layers, member.layers)
            ):
                continue
            raise ValueError(
                f"`smoothing` and `depth` number leaf {show_path(path)} differently: "
                f"the smoothing by {grouping.spec!r} as {_shown(member)}, `depth` by "
                f"{outer!r} as {_shown(known) if known else 'no layer'}. Give both the "
                f"same depth; to smooth less, restrict that of the smoothing: "
                f"`smooth_over_depth(depth.only(...), 0.1)`."
            )


def _shown(member: Member) -> str:
    numbers = member.layers.ravel().tolist()
    shown = f"layer {numbers[0]}" if len(numbers) == 1 else "layers "
    if len(numbers) > 1:
        shown += ", ".join(map(str, numbers[:4])) + ", …" * (len(numbers) > 4)
    axes = member.axes[0] if len(member.axes) == 1 else member.axes
    return shown + (f" along axis {axes}" if member.axes else "")
