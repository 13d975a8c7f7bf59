"""Depth split over a mesh axis, inside `shard_map`: its stages and their halos.

All stages run one program on leaves of their own. What a layer receives across the
boundary is put beside the stage's own layers, as more members of the group: a halo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._depth import as_tuple
from gradsmooth_optax._groups import Group, Grouping, Member, Stages, name_of
from gradsmooth_optax._mesh import axis_size, may_vary
from gradsmooth_optax._neighbors import at_offset
from gradsmooth_optax._paths import show_path, some

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
    extents = _extents(grouping, axis_name, count)
    if count == 1:
        return grouping
    groups = []
    for group in grouping.groups:
        width, starts = extents[group.stack]
        for member in group.members:
            _check_split(grouping.leaves[member.leaf], member, axis_name)
        _check_rounds(group, starts, axis_name)
        members = tuple(
            dataclasses.replace(member, layers=member.layers + stage * width)
            for stage in range(count)
            for member in group.members
        )
        whole = dataclasses.replace(group, members=members)
        stages = Stages(axis_name, whole, width, starts)
        groups.append(dataclasses.replace(group, stages=stages))
    return dataclasses.replace(grouping, groups=tuple(groups))


def _extents(
    grouping: Grouping, axis_name: Hashable, count: int
) -> dict[Hashable, tuple[int, tuple[int, ...]]]:
    """Of every stack, how many consecutive layers a stage holds, and their starts."""
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    held: dict[Hashable, set[int]] = {}
    for (path, leaf), assignment in zip(
        leaves, grouping.spec.locate(leaves), strict=True
    ):
        shape = np.shape(leaf)
        if assignment is None or not all(
            -len(shape) <= axis < len(shape) for axis in as_tuple(assignment.depth.axis)
        ):
            continue
        depth = assignment.depth
        axes = as_tuple(depth.axis)
        if len(axes) > 1 and depth.stride is None and shape[axes[0]] > 1:
            raise ValueError(
                f"`depth` says axis={depth.axis} for leaf {show_path(path)} without a "
                f"stride, and which of these axes `axis_name={axis_name!r}` splits "
                f"cannot be told from its shape {shape} inside `shard_map`. Write the "
                f"step in depth along each axis of the whole array, as in "
                f"`Depth(..., axis=(0, 1), stride=({count}, 1))` for {count} stages "
                f"of one layer on axis 1."
            )
        held.setdefault(depth.stack, set()).update(depth.layers(shape).ravel().tolist())
    return {
        stack: _rounds(stack, sorted(layers), axis_name, count)
        for stack, layers in held.items()
        if layers
    }


def _rounds(
    stack: Hashable, layers: list[int], axis_name: Hashable, count: int
) -> tuple[int, tuple[int, ...]]:
    starts = [n for n in layers if n - 1 not in set(layers)]
    width = len(layers) // len(starts)
    regular = [r * count * width + i for r in range(len(starts)) for i in range(width)]
    if [n - layers[0] for n in layers] != regular:
        raise ValueError(
            f"a stage of `axis_name={axis_name!r}` holds layers {some(layers)} of "
            f"stack {stack!r}, from which those of the other {count - 1} stages cannot "
            f"be told: they must be consecutive, or blocks of n of them at a distance "
            f"of {count} n (a circular pipeline). Number the layers inside a stage "
            f"0, 1, 2, …, and give the `stride` of the whole array along an axis that "
            f"is split. A stage in which some layers are masked is not supported."
        )
    return width, tuple(starts)


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
            f"is not supported: leave `ranked` out, take the same layers of each "
            f"round, or smooth under `jit` without `shard_map`."
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
    count = len(stages.whole.members) // len(group.members)
    if radius > width:
        raise ValueError(
            f"the operator reaches {radius} layers to each side, but over "
            f"`axis_name={stages.axis_name!r}` a layer can receive only from its own "
            f"stage and the ones beside it, with {width} layer{'s' * (width > 1)} each "
            f"of {name_of(group.stack, group.role)}. Use one of a narrower band, such "
            f"as `window(alpha, radius={width})`; `axis_boundary='stage'`, which "
            f"couples inside of stages; or `jit` without `shard_map`."
        )
    rounds, places = zip(
        *(_places(group, m) for m in range(len(group.members))), strict=True
    )
    room = width + 2 * radius + 1  # between rounds
    members = [
        dataclasses.replace(member, layers=r * room + i)
        for member, r, i in zip(group.members, rounds, places, strict=True)
    ]
    held = [None if a is None else list(a) for a in arrays]
    for side in (-1, 1):
        # Of the stage on the left its last layers, of that on the right its first.
        edges = [i >= width - radius if side < 0 else i < radius for i in places]
        cuts = [(m, box) for m, edge in enumerate(edges) for box in _boxes(edge)]
        halo = [
            dataclasses.replace(
                members[m], layers=members[m].layers[box] + side * width
            )
            for m, box in cuts
        ]
        by_round = [
            dataclasses.replace(
                members[m], layers=places[m][box] * (len(stages.starts) + 1) + r
            )
            for m, box in cuts
            for r in [rounds[m][box]]
        ]
        for of_group, given in zip(held, arrays, strict=True):
            if of_group is None or given is None:
                continue
            sent = [_cut(given[m], group.members[m], box) for m, box in cuts]
            of_group += _received(group, by_round, sent, side, count)
        members += halo
    beside = dataclasses.replace(
        group, members=tuple(members), ranked=False, stages=None
    )
    return beside, held


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


def _cut(x: jax.Array, member: Member, box: Box) -> jax.Array:
    for axis, part in zip(member.axes, box, strict=True):
        x = lax.slice_in_dim(x, part.start, part.stop, axis=axis)
    return x


def _received(
    group: Group, members: list[Member], sent: list[jax.Array], side: int, count: int
) -> list[jax.Array]:
    """What the stage on one side has sent; 0 beyond the ends."""
    stages = group.stages
    assert stages is not None
    is_circular = len(stages.starts) > 1
    moves = [(stage, stage - side) for stage in range(count)]
    ends = [(source, to % count) for source, to in moves if not 0 <= to < count]
    moves = [(source, to) for source, to in moves if 0 <= to < count]
    if is_circular:
        moves += ends
    received = [lax.ppermute(x, stages.axis_name, moves) for x in sent]
    if not is_circular:
        return received
    # The first stage goes on where the last one ended in the round before.
    beside = dataclasses.replace(
        group, members=tuple(members), ranked=False, stages=None
    )
    ((_, end),) = ends
    at_end = lax.axis_index(stages.axis_name) == end
    return [
        jnp.where(at_end, at_offset(beside, m, side, received), x)
        for m, x in enumerate(received)
    ]
