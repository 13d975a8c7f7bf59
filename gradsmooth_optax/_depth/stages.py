"""Depth split over a mesh axis, inside `shard_map`: what one of its stages sees.

All stages run one program on leaves of their own. With two stages of three layers each,
the tree of either holds layers numbered 0, 1, 2:

    stage 0     0 1 2           of the whole   0 1 2
    stage 1     0 1 2           of the whole         3 4 5

A circular pipeline goes around several times. With two stages of one layer and three
rounds, stage 0 holds layers 0, 2, 4 of the whole, and stage 1 holds 1, 3, 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import axis_size, may_vary
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Group, Grouping, Member, SlotValues, name_of
from gradsmooth_optax._depth.paths import MASKED, show_path, some


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A group as one stage of a mesh axis sees it.

    Attributes:
      own: the layers that every stage holds, under the numbers of stage 0.
      whole: the group over all stages; its members are those of stage 0, of stage 1, …
      axis_name: of the mesh axis.
      count: of stages.
      width: consecutive layers that one stage holds at a time.
      starts: the first of them, once for each round of a circular pipeline.
    """

    own: Group
    whole: Group
    axis_name: Hashable
    count: int
    width: int
    starts: tuple[int, ...]

    @property
    def stack(self) -> Hashable:
        """Name of the stack."""
        return self.own.stack

    @property
    def role(self) -> Hashable:
        """Name of the role."""
        return self.own.role

    @property
    def members(self) -> tuple[Member, ...]:
        """The leaves that hold the layers of the stage."""
        return self.own.members

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer."""
        return self.own.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the leaves."""
        return self.own.dtype

    @property
    def is_stacked(self) -> bool:
        """Whether some leaf holds layers along an axis."""
        return self.own.is_stacked

    def members_of_whole(self, m: int) -> range:
        """Which members of the whole are what member m is in stage 0, in stage 1, …"""
        return range(m, len(self.whole.members), len(self.members))

    def positions(self, m: int) -> tuple[Any, Any]:
        """As `Group.positions`, in the whole, of the stage that the program runs on."""
        return (
            self.per_slot(m, lambda whole, i: whole.positions(i)[0]),
            self.per_slot(m, lambda whole, i: whole.positions(i)[1]),
        )

    def has_neighbor(self, m: int, offset: int) -> Any:
        """As `Group.has_neighbor`, in the whole, of the stage that is run on."""
        return self.per_slot(m, lambda whole, i: whole.has_neighbor(i, offset))

    def per_slot(self, m: int, values: SlotValues) -> Any:
        """`values(whole, m)` for member m of the stage that the program runs on.

        A NumPy array where it is the same in all stages, else an array of jax.
        """
        stage_values = [values(self.whole, i) for i in self.members_of_whole(m)]
        if not any(isinstance(one, jax.Array) for one in stage_values):
            first = stage_values[0]
            if all((one == first).all() for one in stage_values[1:]):
                return first
        return jnp.stack(stage_values)[lax.axis_index(self.axis_name)]


# What the arrays along depth are of: a group, or the part of one that a stage has.
DepthGroup: TypeAlias = Group | Stage


def split_over(grouping: Grouping, axis_name: Hashable) -> tuple[DepthGroup, ...]:
    """Every group as one stage of a group over all stages sees it.

    Stage s of a stack holds its layers shifted by s times the number of consecutive
    layers in it, so in a circular pipeline too neighbors are by true depth.

    Raises:
      ValueError: for an axis that is not there, leaves that are not split over it, or
        layers of which the other stages' cannot be told.
    """
    count = axis_size(axis_name, "axis_name")
    if count == 1:
        return grouping.groups
    extents = _extents(grouping, axis_name, count)
    stages = tuple(
        _stage_of(group, axis_name, count, *extents[group.stack])
        if group.num_layers
        else group
        for group in grouping.groups
    )
    for group in stages:
        for member in group.members:
            _check_split(grouping.leaves[member.leaf], member, axis_name)
    return stages


def _stage_of(
    group: Group, axis_name: Hashable, count: int, width: int, starts: tuple[int, ...]
) -> Stage:
    _check_rounds(group, starts, axis_name)
    members = tuple(
        dataclasses.replace(member, layers=member.layers + stage * width)
        for stage in range(count)
        for member in group.members
    )
    whole = dataclasses.replace(group, members=members)
    return Stage(group, whole, axis_name, count, width, starts)


def _extents(
    grouping: Grouping, axis_name: Hashable, count: int
) -> dict[Hashable, tuple[int, tuple[int, ...]]]:
    """Of every stack, how many consecutive layers a stage holds, and their starts."""
    layers: dict[Hashable, set[int]] = {}
    steps: dict[Hashable, list[list[int]]] = {}
    # Also of leaves that are left out: they say how deep a stage is.
    places = grouping.places
    for (path, leaf, _), assignment in zip(
        places, grouping.spec.locate(places), strict=True
    ):
        if assignment is None or leaf is MASKED:
            continue
        depth, shape = assignment.depth, np.shape(leaf)
        axes = as_tuple(depth.axis)
        if not all(-len(shape) <= axis < len(shape) for axis in axes):
            continue  # an error only where it is not left out
        if len(axes) > 1 and depth.stride is None and shape[axes[0]] > 1:
            raise ValueError(
                f"`depth` says axis={depth.axis} for leaf {show_path(path)} without a "
                f"stride, and which of these axes `axis_name={axis_name!r}` splits "
                f"cannot be told from its shape {shape} inside `shard_map`. Write the "
                f"step in depth along each axis of the whole array, as in "
                f"`Depth(..., axis=(0, 1), stride=({count}, 1))` for {count} stages "
                f"of one layer on axis 1."
            )
        numbers = depth.layers(shape)
        layers.setdefault(depth.stack, set()).update(numbers.ravel().tolist())
        strides = as_tuple(depth.stride) or (1,) * len(axes)
        along = [shape[axis] * step for axis, step in zip(axes, strides, strict=True)]
        steps.setdefault(depth.stack, []).append(along)
    return {
        stack: _rounds(stack, sorted(held), steps[stack], axis_name, count)
        for stack, held in layers.items()
        if held
    }


def _rounds(
    stack: Hashable,
    layers: list[int],
    steps: list[list[int]],
    axis_name: Hashable,
    count: int,
) -> tuple[int, tuple[int, ...]]:
    """Consecutive layers of a stage, and the first of them in each round.

    With three stages, layers 0 1 2 3 of the stage are four in one round: (4, (0,)).
    Layers 0 1, 6 7, 12 13 are two in each of three rounds: (2, (0, 6, 12)). Layers
    0 1, 5 6 are an error: a round of three stages of two layers starts at 6.

    Args:
      layers: that the stage holds, ascending.
      steps: for every leaf and depth axis, to how much deeper a layer its end leads.
    """
    starts = [
        n for n, before in zip(layers, [None, *layers], strict=False) if before != n - 1
    ]
    width = len(layers) // len(starts)
    regular = [r * count * width + i for r in range(len(starts)) for i in range(width)]
    # The axis that is split leads on to the next stage's layers. Where a stride leads
    # further, or what looks like the rounds of a circular pipeline has no such axis,
    # there are gaps.
    fits = all(
        width in along or (len(starts) == 1 and max(along, default=0) <= width)
        for along in steps
    )
    if fits and [n - layers[0] for n in layers] == regular:
        return width, tuple(starts)
    raise ValueError(
        f"a stage of `axis_name={axis_name!r}` holds layers {some(layers)} of stack "
        f"{stack!r}, from which those of the other {count - 1} stages cannot be told. "
        f"They must be consecutive; or, in a circular pipeline, blocks of n layers at "
        f"a distance of {count} n, with the axis that is split among the depth axes "
        f"of every leaf, at a stride of n, as in `Depth(..., axis=(0, 1), "
        f"stride=({count} * n, n))`. Number the layers inside a stage 0, 1, 2, …, and "
        f"let `depth` match all of them. A stage in which some layers are masked, or "
        f"whose stack goes on outside of the pipeline, is not supported."
    )


def _check_rounds(group: Group, starts: tuple[int, ...], axis_name: Hashable) -> None:
    """Raises where the rounds of a circular pipeline are not alike."""
    ends = (*starts[1:], group.layers[-1] + 1)
    rounds = [
        [layer - start for layer in group.layers if start <= layer < end]
        for start, end in zip(starts, ends, strict=True)
    ]
    if len(rounds) > 1 and (group.ranked or rounds != rounds[:1] * len(rounds)):
        raise ValueError(
            f"over `axis_name={axis_name!r}`, a stage of a circular pipeline holds "
            f"layers {some(group.layers)} of {name_of(group.stack, group.role)}, which "
            f"{'are ranked' if group.ranked else 'differ from round to round'}. That "
            f"is not supported with `axis_name`: smooth under `jit` without "
            f"`shard_map`, or leave the role out with `.only(...)`."
        )


def _check_split(leaf: Any, member: Member, axis_name: Hashable) -> None:
    """Raises for a leaf that is known to be the same on all devices of the axis."""
    if not may_vary(leaf, axis_name):
        raise ValueError(
            f"leaf {show_path(member.path)} is the same on all devices of "
            f"`axis_name={axis_name!r}`, so its layers are not split over it. Smooth "
            f"stacks that are not split by a transformation of their own without "
            f"`axis_name`, with `depth.only(lambda path, leaf: ...)`."
        )
