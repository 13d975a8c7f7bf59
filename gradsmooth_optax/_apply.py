"""S applied to groups of layers, as shift-and-add or as a matmul. No optax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._groups import Group, Member, name_of
from gradsmooth_optax._neighbors import assemble, has_neighbor, neighbor_pieces
from gradsmooth_optax._norms import (
    Arrays,
    NormScope,
    inverse_norm,
    rescaled,
    squared_norms,
)
from gradsmooth_optax._operators import Matrix, Operator
from gradsmooth_optax._precision import widened

Variant: TypeAlias = Literal["standard", "norm_preserving", "directional"]

# On a stacked leaf a band of up to this many neighbors on each side is cheaper as
# shifts, a wider one as a matmul.
_WIDEST_SHIFTED_BAND = 3


def apply_operator(
    groups: Sequence[Group],
    leaves: Sequence[Any],
    operator: Operator,
    variant: Variant = "standard",
    norm_scope: NormScope = "param",
) -> dict[int, jax.Array]:
    """Applies S to every run of every group.

    Args:
      groups: as grouped from the tree that `leaves` are the leaves of.
      leaves: all leaves of the tree.
      operator: with its schedules resolved.
      variant: "standard" (S u), "norm_preserving" (S u at the norm of u) or
        "directional" (S of u/‖u‖, at the norm of u).
      norm_scope: whether norms are of one parameter of a layer or of the whole block.

    Returns:
      {position of leaf: new leaf}, without the leaves that nothing is coupled to.
      Arithmetic is in float32 (float64 for float64 leaves), rounded once at the end.
    """
    groups = [group for group in groups if group.run_lengths.max(initial=0) > 1]
    if not groups:
        return {}
    xs = [[jnp.asarray(leaves[m.leaf]) for m in group.members] for group in groups]
    couple = functools.partial(
        _couple, operator=operator, matrix_of=functools.cache(operator.matrix)
    )
    if variant == "standard":
        ys = [couple(group, x) for group, x in zip(groups, xs, strict=True)]
    else:
        before = squared_norms(groups, xs, norm_scope)
        scales: Sequence[Any] = [None] * len(groups)
        if variant == "directional":
            scales = [[inverse_norm(norm) for norm in of_group] for of_group in before]
        ys = [couple(*of_group) for of_group in zip(groups, xs, scales, strict=True)]
        after = squared_norms(groups, ys, norm_scope)
        # A zero layer may receive its neighbors' update, but has no direction to keep.
        ys = _map(
            lambda x, y, *norms: rescaled(
                y, *norms, otherwise=widened(x) if variant == "directional" else y
            ),
            *(xs, ys, before, after),
        )
    return {
        member.leaf: _rounded(x[m], y[m], group, m)
        for group, x, y in zip(groups, xs, ys, strict=True)
        for m, member in enumerate(group.members)
        if group.in_run(m).any()
    }


def _rounded(x: jax.Array, y: jax.Array, group: Group, m: int) -> jax.Array:
    """y in the dtype of x; slots that nothing is coupled to keep what they had."""
    in_run = group.in_run(m)
    y = y.astype(x.dtype)
    if in_run.all():
        return y
    return jnp.where(group.members[m].along(in_run, x.ndim), y, x)


def _couple(
    group: Group,
    xs: list[jax.Array],
    scales: list[jax.Array] | None = None,
    *,
    operator: Operator,
    matrix_of: Callable[[int], Matrix],
) -> list[jax.Array]:
    """S u of one group, or S (scale · u): one array per member, not yet rounded."""
    lengths = [n for n in sorted(set(group.run_lengths.tolist())) if n > 1]
    weights = operator.side_weights()
    if weights is not None:
        weights = weights[: lengths[-1] - 1]
        if len(weights) <= _WIDEST_SHIFTED_BAND or not _is_one_stacked_leaf(group):
            return [
                _shift_and_add(group, m, weights, xs, scales) for m in range(len(xs))
            ]
    matrices = {n: _matrix(group, n, matrix_of) for n in lengths}
    if _is_one_stacked_leaf(group):
        (matrix,) = matrices.values()
        if _bandwidth(matrix) > _WIDEST_SHIFTED_BAND:
            return [_matmul(matrix, group.members[0], _scaled(xs, scales, 0))]
    return [_weighted_sum(group, m, matrices, xs, scales) for m in range(len(xs))]


def _shift_and_add(
    group: Group,
    m: int,
    weights: Sequence[Any],
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
) -> jax.Array:
    """u + Σ_j w_j (u_{l-j} - u_l + u_{l+j} - u_l), without neighbors that do not exist.

    The difference form keeps a depth-constant u bit-exact.
    """
    u = _scaled(xs, scales, m)
    out = u
    for distance, weight in enumerate(weights, start=1):
        differences = []
        for offset in (-distance, distance):
            neighbor = _neighbor(group, m, offset, xs, scales)
            if neighbor is None:
                continue
            difference = neighbor - u
            has = has_neighbor(group, m, offset)
            if not has.all():
                mask = group.members[m].along(has, u.ndim)
                difference = mask.astype(u.dtype) * difference
            differences.append(difference)
        if differences:
            total = sum(differences[1:], differences[0])
            out = out + _in_dtype(weight, u.dtype) * total
    return out


def _weighted_sum(
    group: Group,
    m: int,
    matrices: dict[int, Matrix],
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
) -> jax.Array:
    """Σ_d S[l, l+d] u_{l+d} over the offsets d at which S is not known to be 0."""
    u = _scaled(xs, scales, m)
    longest = max(matrices)
    out = jnp.zeros_like(u)
    for offset in range(1 - longest, longest):
        weights = _weights_at(group, m, offset, matrices)
        if isinstance(weights, np.ndarray) and not weights.any():
            continue
        neighbor = u if offset == 0 else _neighbor(group, m, offset, xs, scales)
        if neighbor is not None:
            along = group.members[m].along(weights, u.ndim)
            out = out + along.astype(u.dtype) * neighbor
    return out


def _neighbor(
    group: Group,
    m: int,
    offset: int,
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
) -> jax.Array | None:
    """(scale · u)_{l+offset} for every slot l of member m, None where there is none."""
    pieces = neighbor_pieces(group, m, offset)
    if not pieces:
        return None
    # Put together in the leaf's own dtype: under sharding that crosses devices.
    neighbor = widened(assemble(group, m, pieces, xs))
    if scales is not None:
        neighbor *= assemble(group, m, pieces, scales).astype(neighbor.dtype)
    return neighbor


def _weights_at(
    group: Group, m: int, offset: int, matrices: dict[int, Matrix]
) -> Matrix:
    """S[l, l+offset] for every slot of member m, 0 where there is no such layer."""
    position, length = group.positions(m)
    has = has_neighbor(group, m, offset)
    weights = []
    for n, matrix in matrices.items():
        of_this = has & (length == n)
        if of_this.any():
            row = np.where(of_this, position, 0)
            found = matrix[row, np.where(of_this, position + offset, 0)]
            weights.append(of_this.astype(found.dtype) * found)
    # Each slot is in one run, so the others add 0.
    return sum(weights[1:], weights[0]) if weights else np.zeros(position.shape)


def _matmul(matrix: Matrix, member: Member, u: jax.Array) -> jax.Array:
    """S over all depth axes of one stacked leaf at once."""
    sizes, k = member.layers.shape, len(member.axes)
    s = jnp.asarray(matrix).astype(u.dtype).reshape(sizes + sizes)
    contracted = (tuple(range(k, 2 * k)), member.axes)
    out = jnp.tensordot(s, u, axes=contracted, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(out, tuple(range(k)), member.axes)


def _matrix(group: Group, n: int, matrix_of: Callable[[int], Matrix]) -> Matrix:
    try:
        return matrix_of(n)
    except ValueError as error:
        run = next(run for run in group.runs if len(run) == n)
        raise ValueError(
            f"{error} This was for {name_of(group.stack, group.role)}, layers "
            f"{run[0]} to {run[-1]}."
        ) from error


def _bandwidth(matrix: Matrix) -> int:
    """Largest |i - j| with a weight; all of it where the weights are traced."""
    if not isinstance(matrix, np.ndarray):
        return matrix.shape[0] - 1
    rows, columns = np.nonzero(matrix)
    return int(np.abs(rows - columns).max(initial=0))


def _is_one_stacked_leaf(group: Group) -> bool:
    """Whether one leaf holds the whole group, in order, as a single run."""
    if len(group.members) > 1 or len(group.runs) > 1:
        return False
    return bool((group.ranks[0].ravel() == np.arange(group.num_layers)).all())


def _scaled(xs: list[jax.Array], scales: list[jax.Array] | None, m: int) -> jax.Array:
    u = widened(xs[m])
    return u if scales is None else scales[m].astype(u.dtype) * u


def _in_dtype(weight: Any, dtype: Any) -> Any:
    """An array in this dtype; a Python number stays weakly typed."""
    return weight.astype(dtype) if isinstance(weight, jax.Array) else weight


def _map(function: Callable[..., jax.Array], *arrays: Arrays) -> Arrays:
    return [
        [function(*of_member) for of_member in zip(*of_group, strict=True)]
        for of_group in zip(*arrays, strict=True)
    ]
