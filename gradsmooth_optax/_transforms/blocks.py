"""A tree as the blocks of its layers: every layer's own subtree, in place."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Grouping, Member, member_of, missing_between
from gradsmooth_optax._depth.paths import MASKED, Path, Place, show_path, some
from gradsmooth_optax._depth.specs import DepthSpec


class Part(NamedTuple):
    """What a block takes of one leaf.

    Attributes:
      role: path inside the layer.
      member: the leaf, and where in it the layers are.
    """

    role: Path
    member: Member

    @property
    def axes(self) -> tuple[int, ...]:
        """The leaf's axes over the layers of the block, ascending."""
        return self.member.axes


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Layers of one stack that are alike: the subtree of each, along axes of its parts.

    Attributes:
      stack: the stack's name.
      layers: their numbers, an int array of the sizes of the axes; () of one layer.
      parts: what it takes of each leaf, in the order of `treedef`.
    """

    stack: Hashable
    layers: np.ndarray
    parts: tuple[Part, ...]

    @property
    def num_axes(self) -> int:
        """Over how many axes the layers are."""
        return self.layers.ndim

    @property
    def first(self) -> int:
        """The number of the first layer."""
        return int(self.layers.min())

    @functools.cached_property
    def treedef(self) -> Any:
        """The structure of a layer's subtree, with one leaf for each part."""
        return jax.tree.structure(self.nested(range(len(self.parts))))

    def nested(self, values: Sequence[Any]) -> Any:
        """One value for each part, nested as the roles are: a layer of the model."""
        roles = [part.role for part in self.parts]
        if roles == [()]:
            return values[0]
        tree: dict[Any, Any] = {}
        if _are_nodes(roles):
            return dict(zip(map(show_path, roles), values, strict=True))
        for role, value in zip(roles, values, strict=True):
            node = tree
            for segment in role[:-1]:
                node = node.setdefault(segment, {})
            node[role[-1]] = value
        return tree


def _are_nodes(roles: Sequence[Path]) -> bool:
    """Whether one of the roles is a node above another one, so that they don't nest."""
    nodes = {role[:n] for role in roles for n in range(len(role))}
    return not nodes.isdisjoint(roles)


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A tree as blocks, and the rest of it.

    Attributes:
      grouping: the tree, and what the spec says of it.
      blocks: of all stacks.
      rest: positions of the leaves that are in no layer.
      masked: stacks and layers of what is masked, with a leaf for each layer.
    """

    grouping: Grouping
    blocks: tuple[Block, ...]
    rest: frozenset[int]
    masked: tuple[tuple[Hashable, int], ...]

    @property
    def treedef(self) -> Any:
        """The structure of the whole tree."""
        return self.grouping.treedef

    def of_rest(self, values: Sequence[Any]) -> Any:
        """The whole tree with `MaskedNode`s in place of what is in layers."""
        kept = [
            value if i in self.rest else optax.MaskedNode()
            for i, value in enumerate(values)
        ]
        return jax.tree.unflatten(self.treedef, kept)


def blocks_of(
    spec: DepthSpec, tree: Any, strict: bool, said: set[Hashable] | None
) -> Blocks:
    """The blocks of a tree.

    Args:
      spec: where depth is.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      strict: whether it is an error if nothing matches, or a layer is missing.
      said: as in `coupled_groups`.

    Raises:
      ValueError: for a grouping that does not fit the tree, a layer that two leaves
        hold for one role, and roles that disagree about which layers there are.
    """
    grouping = coupled_groups(spec, tree, strict, said, wholes=())
    stacks: dict[Hashable, list[Part]] = defaultdict(list)
    ranked: set[Hashable] = set()
    found = zip(grouping.places, grouping.assignments, strict=True)
    there = [(place, a) for place, a in found if place.leaf is not MASKED]
    for i, ((path, leaf, _), assignment) in enumerate(there):
        if assignment is not None:
            member = member_of(i, path, assignment, np.shape(leaf))
            part = Part(_segments(assignment.depth.role), member)
            if member.layers.size:
                stacks[assignment.depth.stack].append(part)
                ranked |= {assignment.depth.stack} if assignment.ranked else set()
    blocks, masked = [], _masked(grouping)
    for stack, parts in stacks.items():
        blocks += _blocks_of_stack(stack, parts)
        if strict and stack not in ranked:
            hidden = {layer for name, layer in masked if name == stack}
            _check_no_gap(stack, parts, hidden, grouping)
    taken = {part.member.leaf for block in blocks for part in block.parts}
    rest = frozenset(range(len(there))) - taken
    return Blocks(grouping, tuple(blocks), rest, masked)


def _masked(grouping: Grouping) -> tuple[tuple[Hashable, int], ...]:
    """Stacks and layers of what is masked: a part of a tree has those of the whole."""
    places = [
        Place((*place.path, "masked"), MASKED)  # of a whole layer, something in it
        if place.leaf is MASKED and a is None
        else place
        for place, a in zip(grouping.places, grouping.assignments, strict=True)
    ]
    if all(place.leaf is not MASKED for place in places):
        return ()
    return tuple(
        (a.depth.stack, a.depth.layer)
        for place, a in zip(places, grouping.spec.assign(places), strict=True)
        if place.leaf is MASKED and a is not None and a.depth.axis is None
    )


def _segments(role: Hashable) -> Path:
    if isinstance(role, str):
        return tuple(filter(None, role.split("/")))
    return tuple(role) if isinstance(role, tuple) else (str(role),)


def _blocks_of_stack(stack: Hashable, parts: list[Part]) -> list[Block]:
    """Layers that are in the same leaves, together."""
    holders: dict[int, dict[Path, Part]] = defaultdict(dict)
    for part in parts:
        for layer in part.member.layers.ravel().tolist():
            other = holders[layer].setdefault(part.role, part)
            if other is not part:
                raise ValueError(
                    f"`depth` gives layer {layer} of stack {stack!r} for role "
                    f"{show_path(part.role)!r} to {show_path(other.member.path)} and "
                    f"to {show_path(part.member.path)}. The pattern probably drops the "
                    f"part of the path that tells them apart. Capture it, as in "
                    f"`(?P<stack>...)` or `(?P<role>...)`."
                )
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer in sorted(holders):
        leaves = sorted(part.member.leaf for part in holders[layer].values())
        alike[tuple(leaves)].append(layer)
    return [
        _block(stack, layers, tuple(holders[layers[0]].values()))
        for layers in alike.values()
    ]


def _block(stack: Hashable, layers: list[int], parts: tuple[Part, ...]) -> Block:
    numbers = parts[0].member.layers
    for part in parts:
        own = part.member.layers
        if own.size != len(layers) or not np.array_equal(own, numbers):
            one = next((p for p in parts if p.member.layers.size != own.size), parts[0])
            raise ValueError(
                f"`depth` finds roles of stack {stack!r} that disagree about its "
                f"layers: {_shown(part)}, but {_shown(one)}. A layer needs all of "
                f"its parts as slices of stacked leaves, or each as a leaf of its own. "
                f"Probably the axis or the pattern of one of them is of something "
                f"else: check `print(describe(depth, params))`, or name another "
                f"`stack=` for one of them."
            )
    block = Block(stack, numbers, parts)
    order = jax.tree.leaves(block.nested(range(len(parts))))
    return dataclasses.replace(block, parts=tuple(parts[i] for i in order))


def _shown(part: Part) -> str:
    numbers = some(part.member.layers.ravel().tolist())
    over = f" along axis {some(part.axes)}" if part.axes else ""
    return f"{show_path(part.member.path)} holds layers {numbers}{over}"


def _check_no_gap(
    stack: Hashable, parts: list[Part], masked: set[int], grouping: Grouping
) -> None:
    """Raises where a layer is missing in all roles, masked ones too."""
    there = {n for part in parts for n in part.member.layers.ravel().tolist()}
    layers = sorted(there | masked)
    if missing := missing_between(layers):
        first = missing[0][0]
        raise ValueError(
            f"`depth` {grouping.spec!r} finds layers {some(layers)} of stack "
            f"{stack!r}, but nothing of layer {first}. Probably the layers are "
            f"numbered in steps, or it is not matched. To fix: pass `strict=False` if "
            f"there is no such layer, or let `depth` match it."
        )
