"""What the layers of one leaf receive from the layers at an offset in depth.

It is an array of that leaf's own shape: pieces of the group's leaves, placed by
`lax.pad`. So one rule serves a stacked leaf (a shifted copy of itself, which fuses),
one leaf per layer (the next leaf as it is, never stacked) and any mixture. At offset
-1, with 0 for a dot:

    leaf holds   piece    receives
    0 1 2        0 1 2    . 0 1        padded by (1, -1)
    3            2        2            cut out of the first leaf
    4            3        3            the leaf before it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import like, whole_along, widened
from gradsmooth_optax._depth.groups import Group, Member

Index: TypeAlias = tuple[int, ...]


class Piece(NamedTuple):
    """A box of one member's slots, and where it lands among the receiver's slots."""

    member: int
    start: Index
    stop: Index
    at: Index


def neighbor_pieces(group: Group, m: int, offset: int) -> list[Piece]:
    """Where the layers at `offset` of member m's slots are."""
    axes, ranks = group.members[m].axes, group.ranks[m]
    # Slots that take from one member, all at the same distance, move as one box.
    boxes: dict[tuple[int, Hashable], list[tuple[Index, Index]]] = defaultdict(list)
    for slot in map(tuple, np.argwhere(group.has_neighbor(m, offset)).tolist()):
        source, source_slot = group.slots[ranks[slot] + offset]
        moved: Hashable = (slot, source_slot)
        if len(group.members[source].axes) == len(axes):
            moved = tuple(i - j for i, j in zip(slot, source_slot, strict=True))
        boxes[source, moved].append((slot, source_slot))
    return [
        piece for (source, _), slots in boxes.items() for piece in _boxed(source, slots)
    ]


def _boxed(source: int, slots: list[tuple[Index, Index]]) -> list[Piece]:
    """One piece for slots that fill a box, else one for each."""
    to, of = (np.array(column, int) for column in zip(*slots, strict=True))
    start, stop = of.min(axis=0), of.max(axis=0) + 1
    if np.prod(stop - start) == len(slots):
        box = (start, stop, to.min(axis=0))
        return [Piece(source, *(tuple(corner.tolist()) for corner in box))]
    return [Piece(source, j, tuple(k + 1 for k in j), i) for i, j in slots]


def scaled(
    xs: Sequence[jax.Array], scales: Sequence[jax.Array] | None, m: int
) -> jax.Array:
    """scale · u of member m, in the dtype of the arithmetic."""
    u = widened(xs[m])
    return u if scales is None else scales[m].astype(u.dtype) * u


def neighbor(
    group: Group,
    m: int,
    offset: int,
    xs: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None,
) -> jax.Array | None:
    """(scale · u)_{l+offset} for every slot l of member m, None where there is none."""
    pieces = neighbor_pieces(group, m, offset)
    if not pieces:
        return None
    # Put together in the leaf's own dtype: under sharding that crosses devices.
    other = widened(assemble(group, m, pieces, xs))
    if scales is not None:
        factors = [scale.astype(other.dtype) for scale in scales]
        other *= assemble(group, m, pieces, factors)
    return other


def at_offset(
    group: Group, m: int, offset: int, arrays: Sequence[jax.Array]
) -> jax.Array:
    """For every slot of member m what the layer at `offset` holds, else 0."""
    pieces = neighbor_pieces(group, m, offset)
    return assemble(group, m, pieces, arrays) if pieces else jnp.zeros_like(arrays[m])


def assemble(
    group: Group, m: int, pieces: Sequence[Piece], arrays: Sequence[jax.Array]
) -> jax.Array:
    """An array laid out as member m with the pieces in their places, else 0.

    Args:
      arrays: per member, of the leaf's rank, with all slots along its depth axes.
    """
    placed = [_place(arrays[piece.member], group, m, piece) for piece in pieces]
    placed = [like(part, arrays[m]) for part in placed]
    return sum(placed[1:], placed[0])  # they do not overlap


def _place(x: jax.Array, group: Group, m: int, piece: Piece) -> jax.Array:
    source, receiver = group.members[piece.member], group.members[m]
    start = piece.start
    if not _shifts_as_a_whole(source, receiver, piece):
        x, start = _cut_out(x, source, receiver, piece), (0,) * len(piece.at)
    padding = [(0, 0, 0)] * x.ndim
    for axis, size, a, at in zip(
        receiver.axes, receiver.layers.shape, start, piece.at, strict=True
    ):
        low = at - a
        padding[axis] = (low, size - low - x.shape[axis], 0)
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        x, padding = _without_negative(x, padding)
    if any(low or high for low, high, _ in padding):
        x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    return x


def _without_negative(
    x: jax.Array, padding: list[tuple[int, int, int]]
) -> tuple[jax.Array, list[tuple[int, int, int]]]:
    """Crops by slices what negative padding would crop.

    XLA computes wrong numbers for negative padding of a replicated array whose result
    is sharded. The barrier in `layers.layers_of` keeps Shardy from asking for that;
    with GSPMD, jax's default before 0.7, it is not relied on. Elsewhere padding is
    better: it keeps a sharded axis even.
    """
    for axis, (low, high, _) in enumerate(padding):
        stop = x.shape[axis] + min(high, 0)
        x = lax.slice_in_dim(x, max(-low, 0), stop, axis=axis)
    return x, [(max(low, 0), max(high, 0), 0) for low, high, _ in padding]


def _shifts_as_a_whole(source: Member, receiver: Member, piece: Piece) -> bool:
    """Whether shifting all of the source brings in the box and nothing else of it."""
    if source.axes != receiver.axes:
        return False
    return all(
        max(0, start - at) == start and min(size, start - at + room) == stop
        for size, room, start, stop, at in zip(
            source.layers.shape,
            receiver.layers.shape,
            piece.start,
            piece.stop,
            piece.at,
            strict=True,
        )
    )


def _cut_out(x: jax.Array, source: Member, receiver: Member, piece: Piece) -> jax.Array:
    """The box alone, with its slots along the receiver's axes."""
    x = whole_along(x, source.axes)
    for axis, start, stop in zip(source.axes, piece.start, piece.stop, strict=True):
        x = lax.slice_in_dim(x, start, stop, axis=axis)
    if len(source.axes) == len(receiver.axes):
        return jnp.moveaxis(x, source.axes, receiver.axes)
    return lax.expand_dims(lax.squeeze(x, source.axes), receiver.axes)
