"""Coupling by one weight for each pair of layers: symmetric, rows that sum to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from gradsmooth_optax._arrays import widened
from gradsmooth_optax._coupling.neighbors import (
    at_offset,
    has_neighbor,
    neighbor,
    scaled_arrays,
)
from gradsmooth_optax._coupling.norms import Arrays
from gradsmooth_optax._coupling.stages import with_halos
from gradsmooth_optax._depth.groups import Group

Scales: TypeAlias = Sequence[list[jax.Array] | None]


def at_distance(groups: Sequence[Group], arrays: Arrays, offset: int) -> Arrays:
    """For every slot the array of the layer at `offset`, and 0 where there is none."""
    found = []
    for group, of_group in zip(groups, arrays, strict=True):
        beside, (held,) = with_halos(group, abs(offset), of_group)
        found.append([at_offset(beside, m, offset, held) for m in range(len(of_group))])
    return found


def next_layers(groups: Sequence[Group], xs: Arrays, scales: Scales) -> Arrays:
    """scale · u of the next layer for every slot, and 0 where there is none."""
    found = []
    for group, of_group, of_scales in zip(groups, xs, scales, strict=True):
        beside, held = with_halos(group, 1, of_group, of_scales)
        others = [neighbor(beside, m, 1, *held) for m in range(len(of_group))]
        found.append(
            [
                jnp.zeros_like(widened(x)) if other is None else other
                for x, other in zip(of_group, others, strict=True)
            ]
        )
    return found


def coupled_by_pairs(
    groups: Sequence[Group], xs: Arrays, scales: Scales, weights: Sequence[Arrays]
) -> Arrays:
    """u_l + Σ_d w_d,l (u_{l+d} - u_l) + w_d,l-d (u_{l-d} - u_l), or that of scale · u.

    Args:
      xs: u, in its own dtype.
      scales: as in `_apply.coupled`.
      weights: for d = 1, 2, …, the weight between each slot and the layer d after it,
        with size 1 on all axes but those over depth; not used where there is none.
    """
    us = scaled_arrays(xs, scales)
    coupled = [list(of_group) for of_group in us]
    for distance, of_distance in enumerate(weights, start=1):
        for g, (group, of_group, of_pairs) in enumerate(
            zip(groups, us, of_distance, strict=True)
        ):
            beside, (*held, pairs) = with_halos(
                group, distance, xs[g], scales[g], of_pairs
            )
            for m, u in enumerate(of_group):
                for offset in (distance, -distance):
                    other = neighbor(beside, m, offset, *held)
                    if other is None:
                        continue
                    weight = pairs[m]  # held by the first of the two
                    if offset < 0:
                        weight = at_offset(beside, m, offset, pairs)
                    mask = group.along(m, has_neighbor(group, m, offset), u.ndim)
                    weight = jnp.where(mask, weight, jnp.zeros_like(weight))
                    coupled[g][m] += weight.astype(u.dtype) * (other - u)
    return coupled
