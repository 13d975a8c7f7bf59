"""S applied to the layers of one group, as shifted copies or as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import anchored, like, whole_along
from gradsmooth_optax._checks import Matrix
from gradsmooth_optax._coupling.halos import with_halos
from gradsmooth_optax._coupling.neighbors import neighbor, scaled
from gradsmooth_optax._depth.groups import Group, Member, name_of
from gradsmooth_optax._depth.stages import DepthGroup, Stage

MatrixOf: TypeAlias = Callable[[int], Matrix]  # num_layers -> (L, L)
OffsetsOf: TypeAlias = Callable[[int], Sequence[int]]  # num_layers -> d of S[l, l+d]

# A band of up to this many neighbors on each side is cheaper as shifts, a wider one as
# a matmul: where one leaf holds the whole stack, and where several do.
WIDEST_SHIFTED_BAND = 3
WIDEST_SHIFTED_BAND_OF_SEVERAL_LEAVES = 6


def widest_shifted_band(group: DepthGroup) -> int:
    """Up to how many neighbors on each side shifted copies are cheaper."""
    if isinstance(group, Stage):
        return group.whole.num_layers  # a matmul would need the layers of all stages
    if _is_one_stacked_leaf(group):
        return WIDEST_SHIFTED_BAND
    return WIDEST_SHIFTED_BAND_OF_SEVERAL_LEAVES


def coupled_by_matrix(
    group: DepthGroup,
    xs: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None,
    matrix_of: MatrixOf,
    offsets_of: OffsetsOf,
    fewest: int,
) -> list[jax.Array]:
    """S u of one group, or S (scale · u): one array per member, not yet rounded.

    Args:
      group: with neighbors.
      xs: u, in its own dtype.
      scales: None, or an array per member that broadcasts to u.
      matrix_of: num_layers -> S.
      offsets_of: num_layers -> the offsets d at which S[l, l+d] may be other than 0.
      fewest: layers of a run that S is applied to; where a run has fewer the result is
        not used.
    """
    lengths = sorted(set(group.whole.run_lengths.tolist()))
    matrices = {
        n: _checked_matrix(group.whole, n, matrix_of) for n in lengths if n >= fewest
    }
    offsets = _offsets(matrices, offsets_of)
    radius = max(map(abs, offsets), default=0)
    if isinstance(group, Group) and radius > widest_shifted_band(group):
        return _matmul(group, matrices, xs, scales)
    source, (around, scales) = with_halos(group, radius, xs, scales)
    outs = []
    for m in range(len(xs)):
        u = scaled(around, scales, m)
        out = jnp.zeros_like(u)
        for offset in offsets:
            weights = _weights_at(group, m, offset, matrices)
            other = u
            if offset:
                other = neighbor(source, m, offset, around, scales)
            if other is not None:
                along = group.members[m].along(weights, u.ndim)
                out = out + along.astype(u.dtype) * other
        outs.append(out)
    return outs


def weights_per_layer(
    group: DepthGroup, m: int, weights_of: Callable[[int], Matrix]
) -> Matrix:
    """For every slot of member m the weight of its layer.

    Args:
      group: that it is of.
      m: which member.
      weights_of: num_layers of a run -> (L,).
    """
    lengths = set(group.whole.run_lengths.tolist())
    rows = {n: _checked_weights(group.whole, n, weights_of) for n in lengths}
    # Numbers that are known stay constants of NumPy.
    known = all(isinstance(row, np.ndarray) for row in rows.values())
    where = np.where if known else jnp.where
    if not known:
        rows = {n: jnp.asarray(row) for n, row in rows.items()}

    def weights(whole: Group, i: int) -> Matrix:
        position, length = whole.positions(i)
        found = []
        for n, row in rows.items():
            has_length = length == n
            taken = row[np.where(has_length, position, 0)]
            found.append(where(has_length, taken, 0))
        return sum(found[1:], found[0])  # each slot is in one run

    return group.per_slot(m, weights)


def _weights_at(
    group: DepthGroup, m: int, offset: int, matrices: dict[int, Matrix]
) -> Matrix:
    """S[l, l+offset] for every slot of member m, 0 where there is no such layer."""

    def weights(whole: Group, i: int) -> Matrix:
        position, length = whole.positions(i)
        has = whole.has_neighbor(i, offset)
        found = []
        for n, matrix in matrices.items():
            has_length = has & (length == n)
            if has_length.any():
                row = np.where(has_length, position, 0)
                at = matrix[row, np.where(has_length, position + offset, 0)]
                found.append(has_length.astype(at.dtype) * at)
        # Each slot is in one run, so the others add 0.
        return sum(found[1:], found[0]) if found else np.zeros(position.shape)

    return group.per_slot(m, weights)


def _matmul(
    group: Group,
    matrices: dict[int, Matrix],
    xs: Sequence[jax.Array],
    scales: Sequence[jax.Array] | None,
) -> list[jax.Array]:
    """S over all layers at once: a wide band reads every layer for every other."""
    us = [scaled(xs, scales, m) for m in range(len(xs))]
    if _is_one_stacked_leaf(group):
        (matrix,), (member,) = matrices.values(), group.members
        sizes, k = member.layers.shape, len(member.axes)
        s = jnp.asarray(matrix).astype(us[0].dtype).reshape(sizes + sizes)
        contracted = (tuple(range(k, 2 * k)), member.axes)
        out = jnp.tensordot(s, us[0], contracted, precision=lax.Precision.HIGHEST)
        return [anchored(jnp.moveaxis(out, tuple(range(k)), member.axes), us[0])]
    layers = [_layers_first(u, m) for u, m in zip(us, group.members, strict=True)]
    stacked = jnp.concatenate([like(leaf_layers, layers[0]) for leaf_layers in layers])
    # The barriers keep the compiler from making a product of its own for each leaf,
    # which reads all of them again.
    stacked = lax.optimization_barrier(stacked)
    s = _over_all_slots(group, matrices).astype(stacked.dtype)
    product = jnp.tensordot(s, stacked, axes=1, precision=lax.Precision.HIGHEST)
    product = lax.optimization_barrier(product)
    outs, start = [], 0
    for u, member in zip(us, group.members, strict=True):
        stop = start + member.layers.size
        depth_axes = tuple(range(len(member.axes)))
        out = product[start:stop].reshape(member.layers.shape + group.shape)
        out = jnp.moveaxis(out, depth_axes, member.axes).reshape(u.shape)
        outs.append(anchored(out, u) if member.axes else like(out, u))
        start = stop
    return outs


def _layers_first(u: jax.Array, member: Member) -> jax.Array:
    u = whole_along(u, member.axes)
    u = jnp.moveaxis(u, member.axes, tuple(range(len(member.axes))))
    return u.reshape(member.layers.size, *u.shape[len(member.axes) :])


def _over_all_slots(group: Group, matrices: dict[int, Matrix]) -> jax.Array:
    """The matrices of all runs as blocks of one, in the order of the members' slots."""
    dtype = next((s.dtype for s in matrices.values() if isinstance(s, jax.Array)), None)
    blocks = [matrices.get(len(run), np.ones((1, 1))) for run in group.runs]
    blocks = [jnp.asarray(block, dtype) for block in blocks]
    ranks = np.concatenate([rank.ravel() for rank in group.ranks])
    return jax.scipy.linalg.block_diag(*blocks)[np.ix_(ranks, ranks)]


def _is_one_stacked_leaf(group: Group) -> bool:
    """Whether one leaf holds the whole group, in order, as a single run."""
    if len(group.members) > 1 or len(group.runs) > 1:
        return False
    return bool((group.ranks[0].ravel() == np.arange(group.num_layers)).all())


def _offsets(matrices: dict[int, Matrix], offsets_of: OffsetsOf) -> list[int]:
    """The offsets at which some matrix has, or may have, a weight."""
    return [
        offset
        for offset in offsets_of(max(matrices))
        if any(
            not isinstance(matrix, np.ndarray) or np.diagonal(matrix, offset).any()
            for n, matrix in matrices.items()
            if abs(offset) < n
        )
    ]


def _checked_matrix(group: Group, n: int, matrix_of: MatrixOf) -> Matrix:
    try:
        matrix = matrix_of(n)
        if matrix.shape != (n, n):
            raise ValueError(
                f"The operator's `matrix({n})` has shape {matrix.shape}, where "
                f"({n}, {n}) is needed."
            )
        return matrix
    except ValueError as error:
        raise ValueError(f"{error} {_for_run(group, n)}") from error


def _checked_weights(
    group: Group, n: int, weights_of: Callable[[int], Matrix]
) -> Matrix:
    try:
        weights = weights_of(n)
        if np.shape(weights) != (n,):
            raise ValueError(
                f"The weights of a run of {n} layers have shape {np.shape(weights)}, "
                f"where ({n},) is needed: one number per layer."
            )
        return weights
    except ValueError as error:
        raise ValueError(f"{error} {_for_run(group, n)}") from error


def _for_run(group: Group, n: int) -> str:
    run = next(run for run in group.runs if len(run) == n)
    layers = f"layer {run[0]}" if n == 1 else f"layers {run[0]} to {run[-1]}"
    return f"This was for {name_of(group.stack, group.role)}, {layers}."
