"""Norms of layers, per parameter or per block, and scaling to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import num_bits, replicated, summed_over, widened
from gradsmooth_optax._depth.groups import Group

NormScope: TypeAlias = Literal["param", "block"]
Arrays: TypeAlias = list[list[jax.Array]]  # one per member, per group
Names: TypeAlias = tuple[Hashable | None, ...]  # one per slot of a member, in order


def map_arrays(function: Callable[..., jax.Array], *arrays: Arrays) -> Arrays:
    """`function` of the arrays of every member, once where they are the same ones.

    All roles of a block share one norm for each layer.
    """
    found: dict[tuple[int, ...], jax.Array] = {}

    def once(*of_member: jax.Array) -> jax.Array:
        key = tuple(map(id, of_member))
        if key not in found:
            found[key] = function(*of_member)
        return found[key]

    return [
        [once(*of_member) for of_member in zip(*of_group, strict=True)]
        for of_group in zip(*arrays, strict=True)
    ]


def squared_norms(
    groups: Sequence[Group], arrays: Arrays, norm_scope: NormScope
) -> Arrays:
    """‖u‖² of every slot, with size 1 on all axes but those over depth."""
    norms = inner_products(groups, arrays, arrays)
    if norm_scope == "param":
        return norms
    blocks = [
        [tuple(member.layers.ravel().tolist()) for member in group.members]
        for group in groups
    ]
    norms = [
        [_where_in_run(norm, group, m) for m, norm in enumerate(of_group)]
        for group, of_group in zip(groups, norms, strict=True)
    ]
    return summed_by_name(groups, norms, blocks)


def _where_in_run(norm: jax.Array, group: Group, m: int) -> jax.Array:
    """A layer without neighbors is in no block."""
    in_run = group.in_run(m)
    if in_run.all():
        return norm
    return jnp.where(group.along(m, in_run, norm.ndim), norm, jnp.zeros_like(norm))


def inner_products(groups: Sequence[Group], xs: Arrays, ys: Arrays) -> Arrays:
    """Re⟨x, y⟩ of every slot, with size 1 on all axes but those over depth.

    Scalars where every layer of the group has a leaf of its own. Over all of the slot,
    where its other axes are split over mesh axes.
    """
    return [
        [
            summed_over(group.norm_axes, _inner_product(x, y, group, m))
            for m, (x, y) in enumerate(zip(of_x, of_y, strict=True))
        ]
        for group, of_x, of_y in zip(groups, xs, ys, strict=True)
    ]


def _inner_product(x: jax.Array, y: jax.Array, group: Group, m: int) -> jax.Array:
    x, y = widened(x), widened(y)
    product = x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y
    depth_axes = group.members[m].axes
    other = tuple(axis for axis in range(x.ndim) if axis not in depth_axes)
    return jnp.sum(product, axis=other, keepdims=group.is_stacked)


def summed_by_name(
    groups: Sequence[Group], arrays: Arrays, names: Sequence[Sequence[Names]]
) -> Arrays:
    """Sums over the slots of all roles of a stack that have the same name.

    Args:
      arrays: a number for every slot, with size 1 on all axes but those over depth.
      names: for every member, the names of its slots in order, such as the layer; None
        for a slot that is in no sum.
    """
    widest = max((array.dtype for row in arrays for array in row), key=num_bits)
    totals: dict[tuple[Hashable, Names], jax.Array] = {}
    for group, of_group, named in zip(groups, arrays, names, strict=True):
        for array, of_member in zip(of_group, named, strict=True):
            vector = replicated(array).astype(widest)
            if vector.ndim:
                vector = vector.reshape(len(of_member))
            is_in = np.array([name is not None for name in of_member])
            if not is_in.all():
                vector = jnp.where(is_in, vector, jnp.zeros_like(vector))
            key = (group.stack, of_member)
            totals[key] = totals[key] + vector if key in totals else vector
    totals = _with_overlaps(totals)
    placed: dict[tuple, jax.Array] = {}

    def place(key: tuple[Hashable, Names], like: jax.Array) -> jax.Array:
        # Before and after the sum, and for each stacked leaf anew: or all leaves would
        # be split as one of them is.
        of_kind = (*key, like.shape, like.dtype) if like.size == 1 else (id(like),)
        if of_kind not in placed:
            spread = replicated(totals[key].reshape(like.shape))
            placed[of_kind] = spread.astype(like.dtype)
        return placed[of_kind]

    return [
        [
            place((group.stack, of_member), array)
            for array, of_member in zip(of_group, named, strict=True)
        ]
        for group, of_group, named in zip(groups, arrays, names, strict=True)
    ]


def _with_overlaps(
    totals: dict[tuple[Hashable, Names], jax.Array],
) -> dict[tuple[Hashable, Names], jax.Array]:
    """Adds to each vector what others of the stack hold under the same names.

    Nothing to do where all roles are laid out alike, the usual case.
    """
    holders: dict[tuple[Hashable, Hashable], list] = defaultdict(list)
    for stack, names in totals:
        for i, name in enumerate(names):
            if name is not None:
                holders[stack, name].append((names, i))
    joined = {}
    for (stack, names), total in totals.items():
        shared: dict[Names, list[tuple[int, int]]] = defaultdict(list)
        for i, name in enumerate(names):
            for other, j in holders[stack, name]:
                if other != names:
                    shared[other].append((i, j))
        for other, pairs in shared.items():
            here, there = np.array(pairs).T
            added = totals[stack, other].reshape(len(other))[there]
            total = total.reshape(len(names)).at[here].add(added)
        joined[stack, names] = total
    return joined


# In what follows a division or a root comes last: XLA:CPU computes an expensive
# operation once, but copies a cheap one, with all that it needs, into every kernel that
# reads it.


def inverse_norm(squared: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    zero = squared == 0
    norm = jnp.sqrt(jnp.where(zero, 1.0, squared))
    return 1 / jnp.where(zero, jnp.inf, norm)


def cosine(dot: jax.Array, squared: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the squared norms, and 0 where one of them is 0."""
    zero, squared, other = _without_zeros(squared, other)
    norms = jnp.sqrt(squared) * jnp.sqrt(other)
    return jnp.clip(dot / jnp.where(zero, jnp.inf, norms), -1.0, 1.0)


def norm_ratio(before: jax.Array, after: jax.Array) -> jax.Array:
    """The ratio of the norms, given their squares; 1 where one of them is 0."""
    _, before, after = _without_zeros(before, after)
    # The root of the ratio is exactly 1 for equal norms. The ratio of roots is not,
    # where the compiler makes it a product with a reciprocal root.
    return jnp.sqrt(before / after)


def marked_norm_ratio(before: jax.Array, after: jax.Array) -> jax.Array:
    """The ratio of the norms, given their squares; -1 where one of them is 0."""
    zero, before, after = _without_zeros(before, after)
    return 1 / jnp.where(zero, -1.0, jnp.sqrt(after / before))


def marked_ratio_to_directions(before: jax.Array, after: jax.Array) -> jax.Array:
    """‖u‖ / ‖S û‖ with û = u/‖u‖, given their squares; -1 where one of them is 0.

    But NaN where ‖u‖ is infinite, which makes û 0 and maybe ‖S û‖. And a ratio of
    roots: that of squares is no normal number where ‖u‖² is nearly infinite.
    """
    lost = (after == 0) & jnp.isinf(before)
    zero, before, after = _without_zeros(before, after)
    inverse = jnp.where(zero, -1.0, jnp.sqrt(after) / jnp.sqrt(before))
    return 1 / jnp.where(lost, jnp.nan, inverse)


def _without_zeros(
    before: jax.Array, after: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where one of them is 0, and both with a 1 there.

    Zero is told by == and not by >, so that a NaN stays visible. Replaced before the
    root, whose derivative at 0 would make gradients NaN.
    """
    zero = (before == 0) | (after == 0)
    return zero, jnp.where(zero, 1.0, before), jnp.where(zero, 1.0, after)


def rescaled(y: jax.Array, ratio: jax.Array, otherwise: jax.Array) -> jax.Array:
    """`y` times the marked ratio of norms, `otherwise` where one of them is 0."""
    return jnp.where(ratio < 0, otherwise, ratio.astype(y.dtype) * y)
