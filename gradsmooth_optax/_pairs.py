"""Coupling by one weight for each pair of layers: symmetric, rows that sum to 1."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from gradsmooth_optax._groups import Group
from gradsmooth_optax._neighbors import at_offset, has_neighbor
from gradsmooth_optax._norms import Arrays
from gradsmooth_optax._stages import with_halos


def at_distance(groups: Sequence[Group], arrays: Arrays, offset: int) -> Arrays:
    """For every slot the array of the layer at `offset`, and 0 where there is none."""
    found = []
    for group, of_group in zip(groups, arrays, strict=True):
        beside, (held,) = with_halos(group, abs(offset), of_group)
        found.append([at_offset(beside, m, offset, held) for m in range(len(of_group))])
    return found


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
            beside, (held, pairs) = with_halos(group, distance, of_group, of_pairs)
            for m, u in enumerate(of_group):
                for offset in (distance, -distance):
                    has = has_neighbor(group, m, offset)
                    if not has.any():
                        continue
                    weight = pairs[m]  # held by the first of the two
                    if offset < 0:
                        weight = at_offset(beside, m, offset, pairs)
                    mask = group.along(m, has, u.ndim)
                    weight = jnp.where(mask, weight, jnp.zeros_like(weight))
                    difference = at_offset(beside, m, offset, held) - u
                    coupled[g][m] += weight.astype(u.dtype) * difference
    return coupled
