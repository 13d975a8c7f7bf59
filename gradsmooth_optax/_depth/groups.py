"""A tree and a depth spec → groups of layers in depth order, and structure errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.paths import Path, plain_path, show_path, some
from gradsmooth_optax._depth.specs import Assignment, DepthSpec


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
      stages: of a group that is split over a mesh axis; its members are then those of
        one stage.
      norm_axes: names of mesh axes that its other axes are split over.
    """

    stack: Hashable
    role: Hashable
    shape: tuple[int, ...]
    dtype: Any
    members: tuple[Member, ...]
    ranked: bool = False
    stages: Stages | None = None
    norm_axes: tuple[Hashable, ...] = ()

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

    @functools.cached_property
    def ranks(self) -> tuple[np.ndarray, ...]:
        """For every member, the rank in `slots` of each of its slots."""
        ranks = tuple(np.zeros(m.layers.shape, int) for m in self.members)
        for rank, (m, index) in enumerate(self.slots):
            ranks[m][index] = rank
        return ranks

    @property
    def whole(self) -> Group:
        """The group over all stages, where it is split."""
        return self if self.stages is None else self.stages.whole

    def of_stages(self, m: int) -> range:
        """Which members of the whole are what member m is in stage 0, in stage 1, …"""
        return range(m, len(self.whole.members), len(self.members))

    def positions(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Position in its run, and length of that run, of every slot of member m.

        Of a group that is split, for every stage, along a first axis.
        """
        if self.stages is not None:
            whole = self.stages.whole
            places = [whole.positions(i) for i in self.of_stages(m)]
            positions, lengths = zip(*places, strict=True)
            return np.stack(positions), np.stack(lengths)
        ranks = self.ranks[m]
        return ranks - self.run_starts[ranks], self.run_lengths[ranks]

    def in_run(self, m: int) -> np.ndarray:
        """Which slots of member m have at least one neighbor, as in `positions`."""
        _, length = self.positions(m)
        return length > 1

    def along(self, m: int, values: Any, ndim: int) -> Any:
        """Values as in `positions`, to broadcast over a leaf of member m.

        Of a group that is split, those of the stage that the program runs on.
        """
        if self.stages is not None:
            values = self.stages.here(values)
        return self.members[m].along(values, ndim)

    @property
    def missing(self) -> tuple[range, ...]:
        """Layer numbers that are missing between the first and the last, by gap."""
        if self.ranked:
            return ()
        pairs = itertools.pairwise(self.layers)
        return tuple(range(a + 1, b) for a, b in pairs if b > a + 1)

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
class Stages:
    """How the layers of a group are split over a mesh axis.

    Attributes:
      axis_name: of the mesh axis.
      count: of stages.
      whole: the group over all stages; its members are those of stage 0, of stage 1, …
      width: consecutive layers that one stage holds at a time.
      starts: the first of them, once for each round of a circular pipeline.
    """

    axis_name: Hashable
    count: int
    whole: Group
    width: int
    starts: tuple[int, ...]

    def here(self, values: Any) -> Any:
        """The values of the stage that the program runs on, given those of all."""
        if isinstance(values, np.ndarray) and (values == values[:1]).all():
            return values[0]
        return jnp.asarray(values)[lax.axis_index(self.axis_name)]


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """What a depth spec says of a whole tree.

    Attributes:
      groups: in order of first appearance in the tree.
      paths: plain path of every leaf of the tree.
      leaves: every leaf of the tree.
      treedef: the tree's structure.
      spec: the spec.
    """

    groups: tuple[Group, ...]
    paths: tuple[Path, ...]
    leaves: tuple[Any, ...]
    treedef: Any
    spec: DepthSpec

    @functools.cached_property
    def untouched(self) -> tuple[int, ...]:
        """Positions of the leaves that are in no group."""
        grouped = {member.leaf for group in self.groups for member in group.members}
        return tuple(i for i in range(len(self.leaves)) if i not in grouped)

    def replaced(self, new: dict[int, Any]) -> Any:
        """The tree with new leaves at these positions, and its own at the others."""
        leaves = [new.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return jax.tree.unflatten(self.treedef, leaves)


def group_by_depth(spec: DepthSpec, tree: Any) -> Grouping:
    """Groups the leaves of `tree`; reports a leaf that lacks its depth axes.

    Args:
      spec: where depth is.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s. Leaves that are
        not of floating or complex dtype are in no group.

    Raises:
      ValueError: for a depth axis out of range, or a group that is ranked in part.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [(plain_path(key_path), leaf) for key_path, leaf in flat]
    members: dict[tuple, list[Member]] = {}
    ranked: dict[tuple, set[bool]] = {}
    assignments = spec.assign(leaves)
    for i, ((path, leaf), assignment) in enumerate(
        zip(leaves, assignments, strict=True)
    ):
        dtype = inexact_dtype(leaf)
        if assignment is None or dtype is None:
            continue
        depth, shape = assignment.depth, np.shape(leaf)
        member = _member(i, path, assignment, shape)
        layer_shape = tuple(n for k, n in enumerate(shape) if k not in member.axes)
        key = (depth.stack, depth.role, layer_shape, dtype)
        members.setdefault(key, []).append(member)
        ranked.setdefault(key, set()).add(assignment.ranked)
    groups = []
    for key, of_key in members.items():
        if len(ranked[key]) > 1:
            raise ValueError(
                f"`depth` ranks only a part of {name_of(key[0], key[1])}: "
                f"{some([show_path(m.path) for m in of_key])} come both from `ranked` "
                f"and from another member. Put all of them inside one `ranked(...)`."
            )
        groups.append(Group(*key, members=tuple(of_key), ranked=True in ranked[key]))
    paths, values = zip(*leaves, strict=True) if leaves else ((), ())
    return Grouping(tuple(groups), paths, values, treedef, spec)


def _member(
    leaf: int, path: Path, assignment: Assignment, shape: tuple[int, ...]
) -> Member:
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


# -- Structure errors ------------------------------------------------------------------


def check_structure(grouping: Grouping, strict: bool, gaps: bool = True) -> None:
    """Raises where the grouping is probably not what was meant.

    Args:
      grouping: of the tree to be smoothed. A tree without leaves is never an error.
      strict: whether gaps, a scan of unequal leaves, and a spec that matches nothing
        are errors too.
      gaps: whether gaps can be told: a stage of a circular pipeline has some.

    Raises:
      ValueError: for a duplicated layer, a lone array as the whole tree, and under
        `strict` for gaps, for leaves of one `scanned` that hold different numbers of
        layers, and for nothing matched.
    """
    if grouping.paths and not grouping.groups:
        _check_something_matched(grouping, strict)
    if strict:
        _check_scans(grouping)
    for group in grouping.groups:
        if group.duplicates:
            raise ValueError(_duplicate_message(group))
        if strict and gaps and group.whole.missing:
            raise ValueError(_gap_message(group.whole, grouping))


def _check_something_matched(grouping: Grouping, strict: bool) -> None:
    if grouping.paths == ((),):
        raise ValueError(
            f"`depth` cannot find layers in a tree that is one lone array of shape "
            f"{np.shape(grouping.leaves[0])}. The tree is probably hidden by "
            f"`optax.flatten`. Smooth outside of it: `chain(flatten(base), "
            f"smooth_over_depth(depth))`; or write `scanned('', axis=0)` if the array "
            f"is a stack of layers."
        )
    if not strict:
        return
    paths = [show_path(path) for path in grouping.paths]
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    matched = sum(a is not None for a in grouping.spec.assign(leaves))
    if matched:
        raise ValueError(
            f"`depth` {grouping.spec!r} matches {matched} of the {len(paths)} leaves, "
            f"but none of floating or complex dtype, and others pass through: "
            f"{some(paths, 12)}. To fix: let it match the parameters."
        )
    unrestricted = grouping.spec.unrestricted()
    excluded = sum(assignment is not None for assignment in unrestricted.assign(leaves))
    if excluded and unrestricted != grouping.spec:
        raise ValueError(
            f"`depth` {grouping.spec!r} matches {excluded} of the {len(paths)} leaves, "
            f"but its restriction leaves out all of them: {some(paths, 12)}. Probably "
            f"no leaf is named as a kernel or weight, or the predicate tests other "
            f"names. To fix: write `.only(lambda path, leaf: ...)` for these paths."
        )
    raise ValueError(
        f"`depth` {grouping.spec!r} matched none of the {len(paths)} leaves of the "
        f"tree: {some(paths, 12)}. The pattern is probably written for another tree, "
        f"or the layers are masked here. To fix: {_suggestion(paths)}, or see "
        f"`print(detect(params))`; or pass `strict=False` if this tree may hold no "
        f"layers."
    )


def _suggestion(paths: Sequence[str]) -> str:
    for path in paths:
        for segment in path.split("/")[:-1]:
            name = segment.rstrip("0123456789")
            if name != segment:
                pattern = re.escape(name) + r"(\d+)/"
                return f"write `unrolled(r'{pattern}')` if {segment} is one layer"
    return (
        "write `unrolled(r'layers_(\\d+)/')` for one leaf per layer or "
        "`scanned('blocks/', axis=0)` for stacked layers, with names of this tree"
    )


def _check_scans(grouping: Grouping) -> None:
    """Leaves stacked by one scan hold equally many layers, or the axis is wrong."""
    scans: dict[tuple, list[Member]] = {}
    for group in grouping.groups:
        for member in group.members:
            if member.scan is not None:
                # Of one position: a cycle may stop before its end.
                first = int(member.layers.flat[0]) if member.layers.size else None
                key = (member.scan, group.stack, first)
                scans.setdefault(key, []).append(member)
    for (scan, stack, _), members in scans.items():
        sizes = Counter(member.layers.shape for member in members)
        if len(sizes) > 1:
            raise ValueError(_unequal_message(scan, stack, members, sizes, grouping))


def _unequal_message(
    scan: DepthSpec,
    stack: Hashable,
    members: list[Member],
    sizes: Counter[tuple[int, ...]],
    grouping: Grouping,
) -> str:
    usual = sizes.most_common(1)[0][0]
    one = next(m for m in members if m.layers.shape == usual)
    others = [m for m in members if m.layers.shape != usual]

    def saying(member: Member) -> str:
        shape = np.shape(grouping.leaves[member.leaf])
        return f"{member.layers.size} in {show_path(member.path)} {shape}"

    found = (
        f"`depth` {scan!r} finds different numbers of layers in leaves of stack "
        f"{stack!r}: {saying(one)}, but {some([saying(m) for m in others], 3)}. "
        f"Leaves stacked by one scan hold equally many layers."
    )
    shapes = [np.shape(grouping.leaves[member.leaf]) for member in members]
    right = [
        axis
        for axis in range(min(map(len, shapes)))
        if len({shape[axis] for shape in shapes}) == 1
    ]
    if len(right) == len(one.axes) == 1:
        return (
            f"{found} Axis {right[0]} has size {shapes[0][right[0]]} in all of them: "
            f"it is probably the one. To fix: write `axis={right[0]}`."
        )
    return (
        f"{found} Probably the axis is another one, or the pattern takes leaves that "
        f"are not stacked. To fix: pass the right `axis=`, let the pattern end in '/', "
        f"or leave them out with `.only(lambda path, leaf: ...)`; `strict=False` "
        f"takes them as they are."
    )


def _duplicate_message(group: Group) -> str:
    layer = group.duplicates[0]
    paths = group.paths_of(layer)
    holders = [member for member in group.members if (member.layers == layer).any()]
    given = f"`depth` gives layer {layer} of {name_of(group.stack, group.role)} to"
    if len(paths) == 1:
        return (
            f"{given} several slices of leaf {paths[0]}: its strides overlap. Write "
            f"the step along each axis, as in `axis=(0, 1), stride=(4, 1)`."
        )
    if len(set(paths)) == 1:
        return (
            f"{given} {len(paths)} leaves with the same path {paths[0]!r}: their "
            f"container names its children by number only. Register it by "
            f"`jax.tree_util.register_pytree_with_keys`, or leave them out with "
            f"`.only(lambda path, leaf: ...)`."
        )
    if all(member.axes for member in holders):
        return (
            f"{given} {len(paths)} stacked leaves: {some(paths)}. They are probably "
            f"positions in a cycle of layers, or parts of one chain. To fix: give the "
            f"cycle's length, as in `scanned(r'layers_(\\d+)/', stride=6)`, shift one "
            f"part with `start=`, or name another `stack=`."
        )
    return (
        f"{given} {len(paths)} leaves: {some(paths)}. The pattern probably drops the "
        f"part of the path that tells them apart. To fix: capture it, as in "
        f"`(?P<stack>...)` or `(?P<role>...)`, or shift one part with `start=`."
    )


def _gap_message(group: Group, grouping: Grouping) -> str:
    # Numbers may be far apart, as hashes are: never all of them.
    num_missing = sum(map(len, group.missing))
    missing = _first_missing(group)
    paths = [path for layer in group.layers for path in group.paths_of(layer)]
    found = f"matched layers {some(group.layers)} of {name_of(group.stack, group.role)}"
    more = f" and {num_missing - len(missing)} more" * (num_missing > len(missing))
    numbers = ", ".join(map(str, missing)) + more
    are_missing = f"layer {numbers} is" if num_missing == 1 else f"layers {numbers} are"
    elsewhere = _unmatched_leaves(group, grouping) + [
        f"layer {layer} has shape {other.shape} and dtype {other.dtype} "
        f"({other.paths_of(layer)[0]}) where the others have {group.shape} and "
        f"{group.dtype}"
        for other in grouping.groups
        if other is not group and (other.stack, other.role) == (group.stack, group.role)
        for layer in missing
        if layer in other.layers
    ]
    reason = (
        f"The reason: {'; '.join(elsewhere[:3])}."
        if elsewhere
        else "Probably masked or frozen, or numbered in steps, or a part of the chain "
        "that `depth` does not match yet."
    )
    return (
        f"`depth` {found} ({some(list(dict.fromkeys(paths)))}): "
        f"{are_missing} missing. {reason} To fix: pass "
        f"`strict=False` to treat the gap as a boundary, as for layers frozen on "
        f"purpose, `ranked(...)` to close it, or let `depth` match the missing ones."
    )


def _first_missing(group: Group, limit: int = 6) -> list[int]:
    return list(itertools.islice(itertools.chain.from_iterable(group.missing), limit))


def _unmatched_leaves(group: Group, grouping: Grouping) -> list[str]:
    """Untouched leaves whose paths read like those of the missing layers."""
    untouched = {show_path(grouping.paths[i]) for i in grouping.untouched}
    sayings = []
    for layer in _first_missing(group):
        for neighbor in group.members:
            if not neighbor.layers.size:
                continue
            old, path = int(neighbor.layers.flat[0]), show_path(neighbor.path)
            wanted = re.sub(rf"(?<!\d){old}(?!\d)", str(layer), path)
            if wanted in untouched:
                sayings.append(f"{wanted} is in the tree, but `depth` leaves it out")
                break
    return sayings


def name_of(stack: Hashable, role: Hashable) -> str:
    return f"stack {stack!r} for role {role!r}"


def text_of(name: Hashable) -> str:
    """The name of a stack or a role as a key that jax can sort beside others."""
    return name if isinstance(name, str) else repr(name)
