"""A stack of layers that was found in a tree, and patterns that find it again."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.paths import Path
from gradsmooth_optax._depth.specs import DepthSpec, Leaves

# What a scan makes a matrix of.
VECTOR_NAMES = ("b", "beta", "bias", "gain", "gamma", "g", "offset", "scale")


@dataclasses.dataclass(frozen=True, eq=False)
class DetectedStack:
    """Layers that were found.

    Attributes:
      spec: makes the spec from a pattern.
      patterns: patterns for it, from the shortest end of the path to the whole path.
      leaves: its leaves.
      reason, doubts: for the person who checks.
    """

    spec: Callable[[str], DepthSpec]
    patterns: tuple[str, ...]
    leaves: Leaves
    reason: str
    doubts: tuple[str, ...]

    @functools.cached_property
    def whole(self) -> DepthSpec:
        """The spec with the whole path as its pattern."""
        return self.spec(self.patterns[-1])

    @functools.cached_property
    def depths(self) -> dict[Path, Depth]:
        """The `Depth` of each of its leaves."""
        return depths_of(self.whole, self.leaves)


def depths_of(spec: DepthSpec, leaves: Leaves) -> dict[Path, Depth]:
    assignments = spec.assign(leaves)
    return {
        path: assignment.depth
        for (path, _), assignment in zip(leaves, assignments, strict=True)
        if assignment is not None
    }


def leaves_by_child(node: Path, leaves: Leaves) -> dict[str | int, Leaves]:
    children = defaultdict(list)
    for path, leaf in leaves:
        if len(path) > len(node):
            children[path[len(node)]].append((path, leaf))
    return dict(children)


def patterns_of(parent: Path, segment: str) -> tuple[str, ...]:
    """`segment` after more and more of the path, at last after all of it."""
    parts = [re.escape(str(part)) for part in parent]
    ends = ["/".join([*parts[i:], segment]) for i in range(len(parts), -1, -1)]
    return (*ends, f"^{ends[-1]}")


def common_axes(leaves: Leaves) -> list[int]:
    """Axes on which all leaves have one size, if each has more than its own axis.

    An unrolled layer nearly always has vectors, and a stacked one some leaf of rank 3.
    """
    shapes = [np.shape(leaf) for _, leaf in leaves]
    ranks = list(map(len, shapes))
    if min(ranks, default=0) < 2 or max(ranks) < 3:
        return []
    return [
        axis
        for axis in range(min(ranks))
        if len({shape[axis] for shape in shapes}) == 1 and shapes[0][axis] > 1
    ]


def layer_kinds(node: Path, leaves: Leaves, num_axes: int) -> list[str]:
    """The kinds of layers that a node holds: "local" and "global" of Gemma 2.

    Its modules are `<part>_<kind>`, and every part with matrices is there in each kind,
    built alike.
    """
    kinds: dict[str, dict[str, list]] = defaultdict(dict)
    for child, child_leaves in leaves_by_child(node, leaves).items():
        roles = [(path[len(node) + 1 :], np.shape(leaf)) for path, leaf in child_leaves]
        if any(len(shape) - num_axes >= 2 for _, shape in roles):
            part, _, kind = str(child).rpartition("_")
            kinds[part][kind] = sorted(roles, key=repr)
    found = {frozenset(part_kinds) for part_kinds in kinds.values()}
    alike = all(
        all(roles == first for roles in part_kinds.values())
        for part_kinds in kinds.values()
        for first in [next(iter(part_kinds.values()))]
    )
    if len(kinds) < 2 or len(found) > 1 or not alike:
        return []
    (common_kinds,) = found
    return sorted(common_kinds) if len(common_kinds) > 1 else []
