"""Depth split over a mesh axis, inside `shard_map`: its stages and their halos.

All stages run one program on leaves of their own. What a layer receives across the
boundary is put beside the stage's own layers, as more members of the group: a halo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import axis_size, may_vary
from gradsmooth_optax._coupling.neighbors import at_offset
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Group, Grouping, Member, Stages, name_of
from gradsmooth_optax._depth.paths import show_path, some

Box = tuple[slice, ...]


def split_over(grouping: Grouping, axis_name: Hashable) -> Grouping:
    """The grouping with every group as one stage of a group over all stages.

    Stage s of a stack holds its layers shifted by s times the number of consecutive
    layers in it, so in a circular pipeline too neighbors are by true depth.

    Raises:
      ValueError: for an axis that is not there, leaves that are not split over it, or
        layers of which the other stages' cannot be told.
    """
    count = axis_size(axis_name, "axis_name")
    if count == 1:
        return grouping
    extents = _extents(grouping, axis_name, count)
    groups = [
        _stage_of(group, axis_name, count, *extents[group.stack])
        if group.num_layers
        else group
        for group in grouping.groups
    ]
    for group in groups:
        for member in group.members:
            _check_split(grouping.leaves[member.leaf], member, axis_name)
    return dataclasses.replace(grouping, groups=tuple(groups))


def _stage_of(
    group: Group, axis_name: Hashable, count: int, width: int, starts: tuple[int, ...]
) -> Group:
    _check_rounds(group, starts, axis_name)
    members = tuple(
        dataclasses.replace(member, layers=member.layers + stage * width)
        for stage in range(count)
        for member in group.members
    )
    whole = dataclasses.replace(group, members=members)
    stages = Stages(axis_name, count, whole, width, starts)
    return dataclasses.replace(group, stages=stages)


def _extents(
    grouping: Grouping, axis_name: Hashable, count: int
) -> dict[Hashable, tuple[int, tuple[int, ...]]]:
    """Of every stack, how many consecutive layers a stage holds, and their starts."""
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    layers: dict[Hashable, set[int]] = {}
    steps: dict[Hashable, list[list[int]]] = {}
    # Also of leaves that are left out: they say how deep a stage is.
    for (path, leaf), assignment in zip(
        leaves, grouping.spec.locate(leaves), strict=True
    ):
        if assignment is None:
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


class _Edge(NamedTuple):
    """Slots at one end of a stage that one member holds, and where they land.

    Attributes:
      member: which member.
      box: its slots.
      places: where the stage beside numbers them.
      by_round: numbers by which the same place of the rounds before and after are
        neighbors.
    """

    member: int
    box: Box
    places: np.ndarray
    by_round: np.ndarray


def with_halos(
    group: Group, radius: int, *arrays: Sequence[jax.Array] | None
) -> tuple[Group, list[Any]]:
    """The group, and arrays of its members, with `radius` layers of the stages beside.

    A group that is not split comes back as it is.

    Args:
      radius: how many layers on each side.
      *arrays: one per member, with all slots along its depth axes; or None.

    Returns:
      A group whose first members are those of `group`, with layers numbered anew, and
      the arrays of its members. Beyond the ends of the whole they are 0.
    """
    stages = group.stages
    if stages is None:
        return group, list(arrays)
    width = group.num_layers if group.ranked else stages.width
    if radius > width:
        raise ValueError(_too_wide_message(group, stages, radius, width))
    rounds, places = zip(
        *(_places(group, m) for m in range(len(group.members))), strict=True
    )
    room = width + 2 * radius + 1  # so that no halo of one round meets the next round
    own = [r * room + i for r, i in zip(rounds, places, strict=True)]
    members = [_numbered(m, n) for m, n in zip(group.members, own, strict=True)]
    held = [None if of_group is None else list(of_group) for of_group in arrays]
    for side in (-1, 1):
        # Of the stage on the left its last layers, of that on the right its first.
        edges = [
            _Edge(
                m,
                box,
                own[m][box] + side * width,
                places[m][box] * (len(stages.starts) + 1) + rounds[m][box],
            )
            for m, i in enumerate(places)
            for box in _boxes(i >= width - radius if side < 0 else i < radius)
        ]
        members += [_numbered(group.members[e.member], e.places) for e in edges]
        for received, of_group in zip(held, arrays, strict=True):
            if received is not None and of_group is not None:
                received += _received(group, stages, edges, of_group, side)
    return _alone(group, members), held


def _too_wide_message(group: Group, stages: Stages, radius: int, width: int) -> str:
    return (
        f"the operator reaches {radius} layers to each side, but over "
        f"`axis_name={stages.axis_name!r}` a layer can receive only from its own stage "
        f"and the ones beside it, with {width} layer{'s' * (width > 1)} each of "
        f"{name_of(group.stack, group.role)}. Use one of a narrower band, such as "
        f"`window(alpha, radius={width})`; `axis_boundary='stage'`, which couples "
        f"inside of stages; or `jit` without `shard_map`."
    )


def _places(group: Group, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The round of every slot of member m, and its place among the layers of that."""
    layers, stages = group.members[m].layers, group.stages
    assert stages is not None
    if group.ranked:
        return np.zeros_like(layers), group.ranks[m]
    rounds = np.searchsorted(stages.starts, layers, side="right") - 1
    return rounds, layers - np.array(stages.starts)[rounds]


def _boxes(chosen: np.ndarray) -> list[Box]:
    """The chosen slots as one box, if they fill it, else one by one."""
    slots = np.argwhere(chosen)
    if not len(slots):
        return []
    box = tuple(
        slice(low, high + 1)
        for low, high in zip(slots.min(0).tolist(), slots.max(0).tolist(), strict=True)
    )
    if chosen[box].all():
        return [box]
    return [tuple(slice(i, i + 1) for i in slot) for slot in slots.tolist()]


def _received(
    group: Group,
    stages: Stages,
    edges: Sequence[_Edge],
    arrays: Sequence[jax.Array],
    side: int,
) -> list[jax.Array]:
    """What the stage on one side has sent; 0 beyond the ends."""
    last = stages.count - 1
    moves = [(stage, stage - side) for stage in range(stages.count)]
    inside = [(source, to) for source, to in moves if 0 <= to <= last]
    is_circular = len(stages.starts) > 1
    around = [(0, last) if side > 0 else (last, 0)] if is_circular else []
    received = [
        lax.ppermute(
            _cut(arrays[edge.member], group.members[edge.member], edge.box),
            stages.axis_name,
            inside + around,
        )
        for edge in edges
    ]
    if not is_circular:
        return received
    # The first stage goes on where the last one ended in the round before.
    ((_, end),) = around
    at_end = lax.axis_index(stages.axis_name) == end
    by_round = _alone(
        group, [_numbered(group.members[e.member], e.by_round) for e in edges]
    )
    return [
        jnp.where(at_end, at_offset(by_round, m, side, received), x)
        for m, x in enumerate(received)
    ]


def _cut(x: jax.Array, member: Member, box: Box) -> jax.Array:
    for axis, part in zip(member.axes, box, strict=True):
        x = lax.slice_in_dim(x, part.start, part.stop, axis=axis)
    return x


def _numbered(member: Member, layers: np.ndarray) -> Member:
    return dataclasses.replace(member, layers=layers)


def _alone(group: Group, members: Sequence[Member]) -> Group:
    """A group of these members whose neighbors are by number, and that is not split."""
    return dataclasses.replace(group, members=tuple(members), ranked=False, stages=None)
