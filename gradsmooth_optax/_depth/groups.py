"""A tree and a depth spec → groups of layers in depth order, and back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.paths import (
    MASKED,
    Path,
    Place,
    places_of,
    show_path,
    some,
)
from gradsmooth_optax._depth.reading import read
from gradsmooth_optax._depth.specs import Assignment, DepthSpec
from gradsmooth_optax._depth.stack import Reading

# Given a group and the number of a member, an array over the slots of that.
SlotValues: TypeAlias = "Callable[[Group, int], Any]"


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One leaf's share of a group.

    Attributes:
      leaf: the leaf's position among the leaves of the tree.
      path: its plain path.
      axes: its array axes over depth, ascending; () for a leaf that is one layer.
      layers: the layer number of every slot, an int array of the sizes of `axes`.
      scan: the `scanned` that placed it, if one did.
    """

    leaf: int
    path: Path
    axes: tuple[int, ...]
    layers: np.ndarray
    scan: DepthSpec | None = None

    def along(self, values: Any, ndim: int) -> Any:
        """Values per slot, shaped to broadcast over an array of `ndim` axes."""
        shape = [1] * ndim
        for axis, size in zip(self.axes, self.layers.shape, strict=True):
            shape[axis] = size
        return values.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One role of one stack: the layers that are coupled with each other.

    Attributes:
      stack, role: names, as in `Depth`.
      shape: shape of one layer.
      dtype: dtype of its leaves.
      members: the leaves that hold its layers.
      ranked: whether neighbors are by order instead of by number.
    """

    stack: Hashable
    role: Hashable
    shape: tuple[int, ...]
    dtype: Any
    members: tuple[Member, ...]
    ranked: bool = False

    @functools.cached_property
    def slots(self) -> list[tuple[int, tuple[int, ...]]]:
        """(member, index along its axes) of every layer, in depth order."""
        unordered = [
            (int(layer), m, index)
            for m, member in enumerate(self.members)
            for index, layer in np.ndenumerate(member.layers)
        ]
        return [(m, index) for _, m, index in sorted(unordered)]

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """The layer numbers, in depth order."""
        return tuple(int(self.members[m].layers[index]) for m, index in self.slots)

    @property
    def is_stacked(self) -> bool:
        """Whether some leaf holds layers along an axis."""
        return any(member.axes for member in self.members)

    @property
    def num_layers(self) -> int:
        """How many layers the group has, over all its leaves."""
        return len(self.slots)

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The layers cut where neighbors are missing: what an operator is applied to.

        Consecutive numbers, or all layers of a ranked group.
        """
        runs: list[list[int]] = []
        for layer in self.layers:
            if runs and (self.ranked or layer == runs[-1][-1] + 1):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return tuple(map(tuple, runs))

    @functools.cached_property
    def run_lengths(self) -> np.ndarray:
        """For every rank in `slots`, the number of layers of its run."""
        return np.array([len(run) for run in self.runs for _ in run], int)

    @functools.cached_property
    def run_starts(self) -> np.ndarray:
        """For every rank in `slots`, the rank at which its run starts."""
        positions = [position for run in self.runs for position, _ in enumerate(run)]
        return np.arange(self.num_layers) - np.array(positions, int)

    @property
    def neighbors(self) -> list[tuple[Any, Any]]:
        """The slots of each two layers that are neighbors, in depth order."""
        pairs = itertools.pairwise(self.slots)
        starts = itertools.pairwise(self.run_starts)
        return [pair for pair, (a, b) in zip(pairs, starts, strict=True) if a == b]

    @functools.cached_property
    def ranks(self) -> tuple[np.ndarray, ...]:
        """For every member, the rank in `slots` of each of its slots."""
        ranks = tuple(np.zeros(m.layers.shape, int) for m in self.members)
        for rank, (m, index) in enumerate(self.slots):
            ranks[m][index] = rank
        return ranks

    @property
    def whole(self) -> Group:
        """The group itself: what a `Stage` has a part of."""
        return self

    def positions(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Position in its run, and length of that run, of every slot of member m."""
        ranks = self.ranks[m]
        return ranks - self.run_starts[ranks], self.run_lengths[ranks]

    def has_neighbor(self, m: int, offset: int) -> np.ndarray:
        """For every slot of member m, whether its run has a layer at `offset`."""
        position, length = self.positions(m)
        return (position + offset >= 0) & (position + offset < length)

    def per_slot(self, m: int, values: SlotValues) -> Any:
        """`values(group, m)`, an array over the slots of member m.

        What a `Stage` answers by the stage that the program runs on.
        """
        return values(self, m)

    @property
    def missing(self) -> tuple[range, ...]:
        """Layer numbers that are missing between the first and the last, by gap."""
        return () if self.ranked else missing_between(self.layers)

    @property
    def gaps(self) -> tuple[int, ...]:
        """Layer numbers that are missing between the first and the last."""
        return tuple(itertools.chain.from_iterable(self.missing))

    @property
    def duplicates(self) -> tuple[int, ...]:
        """Layer numbers that occur more than once."""
        return tuple(layer for layer, n in Counter(self.layers).items() if n > 1)

    def paths_of(self, layer: int) -> list[str]:
        """The paths of the leaves that hold `layer`."""
        return [show_path(m.path) for m in self.members if (m.layers == layer).any()]


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """What a depth spec says of a whole tree.

    Attributes:
      groups: in order of first appearance in the tree.
      paths: plain path of every leaf of the tree.
      leaves: every leaf of the tree.
      treedef: the tree's structure.
      spec: the spec.
      places: of the leaves, and of those that are masked.
      assignments: what the spec says of each place.
    """

    groups: tuple[Group, ...]
    paths: tuple[Path, ...]
    leaves: tuple[Any, ...]
    treedef: Any
    spec: DepthSpec
    places: tuple[Place, ...]
    assignments: tuple[Assignment | None, ...]

    @functools.cached_property
    def coupled(self) -> tuple[Group, ...]:
        """The groups in which some layer has a neighbor."""
        return tuple(g for g in self.groups if g.run_lengths.max(initial=0) > 1)

    @functools.cached_property
    def held(self) -> Held:
        """The leaves that are in groups, by their paths."""
        return {
            member.path: (group, member)
            for group in self.groups
            for member in group.members
        }

    @functools.cached_property
    def reading(self) -> Reading:
        """What the tree shows by itself."""
        return read(self.places)

    @functools.cached_property
    def untouched(self) -> tuple[int, ...]:
        """Positions of the leaves that are in no group."""
        grouped = {member.leaf for group in self.groups for member in group.members}
        return tuple(i for i in range(len(self.leaves)) if i not in grouped)

    def replaced(self, new: dict[int, Any]) -> Any:
        """The tree with new leaves at these positions, and its own at the others."""
        leaves = [new.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return jax.tree.unflatten(self.treedef, leaves)


def missing_between(layers: Sequence[int]) -> tuple[range, ...]:
    """The numbers that are missing in an ascending sequence, by gap."""
    pairs = itertools.pairwise(layers)
    return tuple(range(a + 1, b) for a, b in pairs if b > a + 1)


# What a grouping holds, by path.
Held: TypeAlias = "Mapping[Path, tuple[Group, Member]]"


def unrestricted(grouping: Grouping) -> Grouping:
    """The grouping with what a restriction leaves out."""
    spec = grouping.spec.unrestricted()
    if spec == grouping.spec:
        return grouping
    try:
        return group_places(spec, grouping.places, grouping.treedef)
    except ValueError:  # a leaf without the axis: that is why it is left out
        return grouping


def group_by_depth(spec: DepthSpec, tree: Any) -> Grouping:
    """Groups the leaves of `tree`; reports a leaf that lacks its depth axes.

    Args:
      spec: where depth is.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s. Leaves that are
        not of floating or complex dtype are in no group.

    Raises:
      ValueError: for a depth axis out of range, or a group that is ranked in part.
    """
    return group_places(spec, places_of(tree), jax.tree.structure(tree))


def group_places(spec: DepthSpec, places: Sequence[Place], treedef: Any) -> Grouping:
    """The same, of a tree's places."""
    members: dict[tuple, list[Member]] = {}
    ranked: dict[tuple, set[bool]] = {}
    assignments = spec.assign(places)
    found = zip(places, assignments, strict=True)
    there = [(place, a) for place, a in found if place.leaf is not MASKED]
    for i, ((path, leaf, _), assignment) in enumerate(there):
        dtype = inexact_dtype(leaf)
        if assignment is None or dtype is None:
            continue
        depth, shape = assignment.depth, np.shape(leaf)
        member = member_of(i, path, assignment, shape)
        layer_shape = tuple(n for k, n in enumerate(shape) if k not in member.axes)
        key = (depth.stack, depth.role, layer_shape, dtype)
        members.setdefault(key, []).append(member)
        ranked.setdefault(key, set()).add(assignment.ranked)
    groups = []
    for key, holders in members.items():
        if len(ranked[key]) > 1:
            raise ValueError(
                f"`depth` ranks only a part of {name_of(key[0], key[1])}: "
                f"{some([show_path(m.path) for m in holders])} come both from `ranked` "
                f"and from another member. Put all of them inside one `ranked(...)`."
            )
        groups.append(Group(*key, members=tuple(holders), ranked=True in ranked[key]))
    paths = tuple(place.path for place, _ in there)
    leaves = tuple(place.leaf for place, _ in there)
    return Grouping(
        tuple(groups), paths, leaves, treedef, spec, tuple(places), tuple(assignments)
    )


def member_of(
    leaf: int, path: Path, assignment: Assignment, shape: tuple[int, ...]
) -> Member:
    """What an assignment says of a leaf of this shape; an error if it lacks an axis."""
    depth = assignment.depth
    named = as_tuple(depth.axis)
    for axis in named:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"`depth` says axis={depth.axis} for leaf {show_path(path)}, which has "
                f"shape {shape} and so no axis {axis}. The leaf is probably not "
                f"stacked over layers, or on another axis. Write `scanned(pattern, "
                f"axis=0)` for the axis that has one entry per layer, or exclude the "
                f"leaf with `.only(lambda path, leaf: ...)`."
            )
    axes = [axis % len(shape) for axis in named]
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"`depth` says axis={depth.axis} for leaf {show_path(path)}, which names "
            f"one axis of its shape {shape} twice. Write each depth axis once."
        )
    ascending = sorted(range(len(axes)), key=axes.__getitem__)
    layers = np.transpose(depth.layers(shape), ascending)
    return Member(leaf, path, tuple(sorted(axes)), layers, assignment.scan)


def name_of(stack: Hashable, role: Hashable) -> str:
    return f"stack {stack!r} for role {role!r}"


def text_of(name: Hashable) -> str:
    """The name of a stack or a role as a key that jax can sort beside others."""
    return name if isinstance(name, str) else repr(name)
