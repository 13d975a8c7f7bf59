"""Norms of layers, per parameter or per block, and scaling to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._groups import Group
from gradsmooth_optax._precision import num_bits, widened

NormScope: TypeAlias = Literal["param", "block"]
Arrays: TypeAlias = list[list[jax.Array]]  # one per member, per group
# Some layers of one stack: those that a leaf holds, in the order of its slots.
LayerSet: TypeAlias = tuple[Hashable, tuple[int, ...]]


def squared_norms(
    groups: Sequence[Group], arrays: Arrays, norm_scope: NormScope
) -> Arrays:
    """‖u‖² of every slot, with size 1 on all axes but those over depth."""
    norms = [
        [_sum_of_squares(x, m.axes) for m, x in zip(group.members, xs, strict=True)]
        for group, xs in zip(groups, arrays, strict=True)
    ]
    return norms if norm_scope == "param" else _summed_over_blocks(groups, norms)


def _sum_of_squares(x: jax.Array, depth_axes: tuple[int, ...]) -> jax.Array:
    x = widened(x)
    squares = x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x
    other = tuple(axis for axis in range(x.ndim) if axis not in depth_axes)
    return jnp.sum(squares, axis=other, keepdims=True)


def _summed_over_blocks(groups: Sequence[Group], norms: Arrays) -> Arrays:
    """Sums over all roles of a layer; a layer without neighbors is in no block."""
    widest = max((norm.dtype for row in norms for norm in row), key=num_bits)
    totals: dict[LayerSet, jax.Array] = {}
    keys: list[list[LayerSet]] = []
    for group, of_group in zip(groups, norms, strict=True):
        keys.append([])
        for m, (member, norm) in enumerate(zip(group.members, of_group, strict=True)):
            key = (group.stack, tuple(member.layers.ravel().tolist()))
            vector = norm.astype(widest).reshape(len(key[1]))
            in_run = group.in_run(m).ravel()
            if not in_run.all():
                vector = jnp.where(in_run, vector, jnp.zeros_like(vector))
            totals[key] = totals[key] + vector if key in totals else vector
            keys[-1].append(key)
    totals = _with_overlaps(totals)
    return [
        [
            totals[k].astype(n.dtype).reshape(n.shape)
            for k, n in zip(ks, ns, strict=True)
        ]
        for ks, ns in zip(keys, norms, strict=True)
    ]


def _with_overlaps(totals: dict[LayerSet, jax.Array]) -> dict[LayerSet, jax.Array]:
    """Adds to each set's vector what other sets hold of the same layers.

    Nothing to do where all roles are laid out alike, the usual case.
    """
    holders: dict[tuple[Hashable, int], list[tuple[LayerSet, int]]] = defaultdict(list)
    for key in totals:
        for i, layer in enumerate(key[1]):
            holders[key[0], layer].append((key, i))
    joined = {}
    for key, total in totals.items():
        shared: dict[LayerSet, list[tuple[int, int]]] = defaultdict(list)
        for i, layer in enumerate(key[1]):
            for other, j in holders[key[0], layer]:
                if other != key:
                    shared[other].append((i, j))
        for other, pairs in shared.items():
            here, there = np.array(pairs).T
            total = total.at[here].add(totals[other][there])
        joined[key] = total
    return joined


def inverse_norm(squared: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    zero = squared == 0
    return jnp.where(zero, 0.0, 1 / jnp.sqrt(jnp.where(zero, 1.0, squared)))


def rescaled(
    y: jax.Array, before: jax.Array, after: jax.Array, otherwise: jax.Array
) -> jax.Array:
    """`y` of squared norm `after` at squared norm `before`; `otherwise` if one is 0.

    Zero is told by == and not by >, so that a NaN stays visible.
    """
    zero = (before == 0) | (after == 0)
    # Replaced before the root, whose derivative at 0 would make gradients NaN.
    before, after = (jnp.where(zero, 1.0, norm) for norm in (before, after))
    # The root of the ratio is exactly 1 for equal norms. The ratio of roots is not,
    # where the compiler makes it a product with a reciprocal root.
    ratio = jnp.sqrt(before / after)
    return jnp.where(zero, otherwise, ratio.astype(y.dtype) * y)
