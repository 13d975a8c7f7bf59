"""The layers that a stage receives from the stages beside it: its halo.

They are put beside the stage's own layers, as more members of the group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._coupling.neighbors import at_offset
from gradsmooth_optax._depth.groups import Group, Member, name_of
from gradsmooth_optax._depth.stages import DepthGroup, Stage

Box: TypeAlias = tuple[slice, ...]


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
    group: DepthGroup, radius: int, *arrays: Sequence[jax.Array] | None
) -> tuple[Group, list[Any]]:
    """The group, and arrays of its members, with `radius` layers of the stages beside.

    With radius 1 the middle one of three stages of three layers gets

        stage 0   0 1 2
        stage 1       2 | 3 4 5 | 6
        stage 2                   6 7 8

    A group that is not split comes back as it is.

    Args:
      group: the group, or what a stage sees of it.
      radius: how many layers on each side.
      *arrays: one per member, with all slots along its depth axes; or None.

    Returns:
      A group whose first members are those of `group`, with layers numbered anew, and
      the arrays of its members. Beyond the ends of the whole they are 0.
    """
    if isinstance(group, Group):
        return group, list(arrays)
    stage, own = group, group.own
    width = width_of(stage)
    if radius > width:
        raise ValueError(_too_wide_message(stage, radius, width))
    rounds, places = zip(
        *(_places(stage, m) for m in range(len(own.members))), strict=True
    )
    room = width + 2 * radius + 1  # so that no halo of one round meets the next round
    numbers = [r * room + i for r, i in zip(rounds, places, strict=True)]
    members = [_numbered(m, n) for m, n in zip(own.members, numbers, strict=True)]
    held = [
        None if group_arrays is None else list(group_arrays) for group_arrays in arrays
    ]
    for side in (-1, 1):
        # Of the stage on the left its last layers, of that on the right its first.
        edges = [
            _Edge(
                m,
                box,
                numbers[m][box] + side * width,
                places[m][box] * (len(stage.starts) + 1) + rounds[m][box],
            )
            for m, i in enumerate(places)
            for box in _boxes(i >= width - radius if side < 0 else i < radius)
        ]
        members += [_numbered(own.members[e.member], e.places) for e in edges]
        for received, group_arrays in zip(held, arrays, strict=True):
            if received is not None and group_arrays is not None:
                received += _received(stage, edges, group_arrays, side)
    return _alone(own, members), held


def width_of(stage: Stage) -> int:
    """How many layers of the role a stage has at a time: as far as a halo reaches."""
    return stage.own.num_layers if stage.own.ranked else stage.width


def _too_wide_message(stage: Stage, radius: int, width: int) -> str:
    return (
        f"the operator reaches {radius} layers to each side, but over "
        f"`axis_name={stage.axis_name!r}` a layer can receive only from its own stage "
        f"and the ones beside it, with {width} layer{'s' * (width > 1)} each of "
        f"{name_of(stage.stack, stage.role)}. Use one of a narrower band, such as "
        f"`window(alpha, radius={width})`; `axis_boundary='stage'`, which couples "
        f"inside of stages; or `jit` without `shard_map`."
    )


def _places(stage: Stage, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The round of every slot of member m, and its place among the layers of that."""
    layers = stage.members[m].layers
    if stage.own.ranked:
        return np.zeros_like(layers), stage.own.ranks[m]
    rounds = np.searchsorted(stage.starts, layers, side="right") - 1
    return rounds, layers - np.array(stage.starts)[rounds]


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
    stage: Stage,
    edges: Sequence[_Edge],
    arrays: Sequence[jax.Array],
    side: int,
) -> list[jax.Array]:
    """What the stage on one side has sent; 0 beyond the ends."""
    last = stage.count - 1
    moves = [(s, s - side) for s in range(stage.count)]
    inside = [(source, to) for source, to in moves if 0 <= to <= last]
    is_circular = len(stage.starts) > 1
    around = [(0, last) if side > 0 else (last, 0)] if is_circular else []
    received = [
        lax.ppermute(
            _cut(arrays[edge.member], stage.members[edge.member], edge.box),
            stage.axis_name,
            inside + around,
        )
        for edge in edges
    ]
    if not is_circular:
        return received
    # The first stage goes on where the last one ended in the round before.
    ((_, end),) = around
    at_end = lax.axis_index(stage.axis_name) == end
    by_round = _alone(
        stage.own, [_numbered(stage.members[e.member], e.by_round) for e in edges]
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
    return dataclasses.replace(group, members=tuple(members), ranked=False)
