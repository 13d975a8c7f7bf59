"""Coupling by one weight for each pair of layers: symmetric, rows that sum to 1."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gradsmooth_optax._groups import Group
from gradsmooth_optax._neighbors import assemble, has_neighbor, neighbor_pieces
from gradsmooth_optax._norms import Arrays


def at_distance(groups: Sequence[Group], arrays: Arrays, offset: int) -> Arrays:
    """For every slot the array of the layer at `offset`, and 0 where there is none."""
    return [
        [_at_offset(group, m, offset, of_group) for m in range(len(of_group))]
        for group, of_group in zip(groups, arrays, strict=True)
    ]


def coupled_by_pairs(
    groups: Sequence[Group], us: Arrays, weights: Sequence[Arrays]
) -> Arrays:
    """u_l + Σ_d w_d,l (u_{l+d} - u_l) + w_d,l-d (u_{l-d} - u_l).

    Args:
      us: in the dtype of the arithmetic.
      weights: for d = 1, 2, …, the weight between each slot and the layer d after it,
        with size 1 on all axes but those over depth; not used where there is none.
    """
    coupled = [list(of_group) for of_group in us]
    for distance, of_distance in enumerate(weights, start=1):
        for g, (group, of_group, of_pairs) in enumerate(
            zip(groups, us, of_distance, strict=True)
        ):
            for m, u in enumerate(of_group):
                for offset in (distance, -distance):
                    if not neighbor_pieces(group, m, offset):
                        continue
                    held = of_pairs[m]  # by the first of the two
                    if offset < 0:
                        held = _at_offset(group, m, offset, of_pairs)
                    has = group.members[m].along(has_neighbor(group, m, offset), u.ndim)
                    weight = jnp.where(has, held, jnp.zeros_like(held)).astype(u.dtype)
                    difference = _at_offset(group, m, offset, of_group) - u
                    coupled[g][m] = coupled[g][m] + weight * difference
    return coupled


def _at_offset(
    group: Group, m: int, offset: int, arrays: Sequence[jax.Array]
) -> jax.Array:
    pieces = neighbor_pieces(group, m, offset)
    return assemble(group, m, pieces, arrays) if pieces else jnp.zeros_like(arrays[m])
