"""Two specs in one optimizer must not number a leaf differently.

A recipe reads its own `depth`, and the smoothing that it was given another one, maybe
deep inside a chain. The recipe says around the smoothing's calls which spec is its own,
and whatever groups a tree inside is held against it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import numpy as np

from gradsmooth_optax._depth.groups import Grouping, Member, member_of
from gradsmooth_optax._depth.paths import show_path
from gradsmooth_optax._depth.specs import DepthSpec

_outer: contextvars.ContextVar[DepthSpec | None] = contextvars.ContextVar(
    "outer", default=None
)


@contextlib.contextmanager
def numbered_by(spec: DepthSpec) -> Iterator[None]:
    """Inside, every tree must be grouped as `spec` says, or less of it."""
    token = _outer.set(spec)
    try:
        yield
    finally:
        _outer.reset(token)


def check_agreement(grouping: Grouping) -> None:
    """Raises where a recipe around numbers the layers of a leaf differently.

    Raises:
      ValueError: with the leaf and both numberings.
    """
    outer = _outer.get()
    if outer is None or outer == grouping.spec:
        return
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    assignments = outer.locate(leaves)
    for group in grouping.groups:
        for member in group.members:
            path, leaf = leaves[member.leaf]
            assignment = assignments[member.leaf]
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
