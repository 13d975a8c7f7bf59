"""S applied to groups of layers, as shift-and-add or as a matmul. No optax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import anchored, in_dtype, like, whole_along, widened
from gradsmooth_optax._coupling.neighbors import (
    has_neighbor,
    neighbor,
    scaled,
    scaled_arrays,
)
from gradsmooth_optax._coupling.norms import (
    Arrays,
    NormScope,
    inverse_norm,
    map_arrays,
    marked_norm_ratio,
    marked_ratio_to_directions,
    norm_ratio,
    rescaled,
    squared_norms,
)
from gradsmooth_optax._coupling.pairs import Scales
from gradsmooth_optax._coupling.stages import with_halos
from gradsmooth_optax._depth.groups import Group, Member, name_of
from gradsmooth_optax._operators.operator import Matrix, Operator
from gradsmooth_optax._operators.similarity import (
    SimilarityWindow,
    couple_by_similarity,
)
from gradsmooth_optax.controls import NormMatched

Variant: TypeAlias = Literal["standard", "norm_preserving", "directional"]

# A band of up to this many neighbors on each side is cheaper as shifts, a wider one as
# a matmul: where one leaf holds the whole stack, and where several do.
_WIDEST_SHIFTED_BAND = 3
_WIDEST_SHIFTED_BAND_OF_SEVERAL_LEAVES = 6


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
    groups = with_neighbors(groups)
    if not groups:
        return {}
    xs = arrays_of(groups, leaves)
    unscaled = [None] * len(groups)
    if variant == "standard":
        ys = coupled(operator, groups, xs, unscaled, norm_scope)
    else:
        before = squared_norms(groups, xs, norm_scope)
        us, scales = xs, unscaled
        if variant == "directional":
            us, scales = _scaled_once(groups, xs, map_arrays(inverse_norm, before))
        ys = coupled(operator, groups, us, scales, norm_scope)
        after = squared_norms(groups, ys, norm_scope)
        if variant == "directional":
            ratios = map_arrays(marked_ratio_to_directions, before, after)
            ys = map_arrays(rescaled, ys, ratios, map_arrays(widened, xs))
        else:
            # A zero layer may receive its neighbors' update.
            ratios = map_arrays(norm_ratio, before, after)
            ys = map_arrays(lambda y, r: r.astype(y.dtype) * y, ys, ratios)
    return rounded(groups, xs, ys)


def _scaled_once(
    groups: Sequence[Group], xs: Arrays, scales: Scales
) -> tuple[Arrays, Scales]:
    """u and its scales, or scale · u where every layer has a leaf of its own."""
    us, left = list(xs), list(scales)
    for g, group in enumerate(groups):
        if group.stages is None and not group.is_stacked:
            us[g] = [scaled(xs[g], scales[g], m) for m in range(len(group.members))]
            left[g] = None
    return us, left


def with_neighbors(groups: Sequence[Group]) -> list[Group]:
    """The groups in which some layer has a neighbor."""
    return [g for g in groups if g.whole.run_lengths.max(initial=0) > 1]


def arrays_of(
    groups: Sequence[Group], leaves: Sequence[Any] | Mapping[int, Any]
) -> Arrays:
    """The leaves of every group's members, those that are stacked behind a barrier.

    Behind it an update is computed once and not again for each shifted copy. And the
    partitioner is free to split it as the result is: it computes wrong numbers for the
    negative padding of an array that has to be replicated where the result is split.
    """
    return [
        [
            lax.optimization_barrier(x) if member.axes else x
            for member in group.members
            for x in [jnp.asarray(leaves[member.leaf])]
        ]
        for group in groups
    ]


def rounded(groups: Sequence[Group], xs: Arrays, ys: Arrays) -> dict[int, jax.Array]:
    """{position of leaf: y in the dtype of x}, for leaves with a layer in a run."""
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
    return jnp.where(group.along(m, in_run, x.ndim), y, x)


def coupled(
    operator: Operator,
    groups: Sequence[Group],
    xs: Arrays,
    scales: Scales,
    norm_scope: NormScope,
) -> Arrays:
    """S u of all groups, or S (scale · u): one array per member, not yet rounded.

    Args:
      groups: with neighbors.
      xs: u, in its own dtype.
      scales: per group None, or an array per member that broadcasts to u.
    """
    if isinstance(operator, SimilarityWindow):
        return couple_by_similarity(operator, groups, xs, scales)
    if isinstance(operator, NormMatched):
        us = scaled_arrays(xs, scales)
        ys = coupled(operator.operator, groups, xs, scales, norm_scope)
        wanted, own = (squared_norms(groups, arrays, norm_scope) for arrays in (ys, us))
        ratios = map_arrays(marked_norm_ratio, wanted, own)
        return map_arrays(rescaled, us, ratios, map_arrays(jnp.zeros_like, us))
    matrix_of = functools.cache(operator.matrix)
    return [
        _couple(operator, matrix_of, *of_group)
        for of_group in zip(groups, xs, scales, strict=True)
    ]


def _couple(
    operator: Operator,
    matrix_of: Callable[[int], Matrix],
    group: Group,
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
) -> list[jax.Array]:
    """S u of one group, or S (scale · u)."""
    lengths = [n for n in sorted(set(group.whole.run_lengths.tolist())) if n > 1]
    weights = operator.side_weights()
    if weights is not None:
        weights = weights[: lengths[-1] - 1]
        if len(weights) <= _widest_shifted_band(group):
            around = _Surroundings.of(group, len(weights), xs, scales)
            return [_shift_and_add(around, m, weights) for m in range(len(xs))]
    matrices = {n: _matrix(group.whole, n, matrix_of) for n in lengths}
    offsets = _offsets(operator, matrices)
    radius = max(map(abs, offsets), default=0)
    if radius > _widest_shifted_band(group):
        return _matmul(group, matrices, xs, scales)
    around = _Surroundings.of(group, radius, xs, scales)
    return [_weighted_sum(around, m, matrices, offsets) for m in range(len(xs))]


class _Surroundings(NamedTuple):
    """A group, and what its layers receive from: itself, or also the stages beside.

    Attributes:
      group: tells which neighbors exist.
      sources: the same layers first, and then those of the stages beside.
      xs, scales: one array per member of `sources`.
    """

    group: Group
    sources: Group
    xs: list[jax.Array]
    scales: list[jax.Array] | None

    @classmethod
    def of(
        cls,
        group: Group,
        radius: int,
        xs: list[jax.Array],
        scales: list[jax.Array] | None,
    ) -> _Surroundings:
        sources, (xs, scales) = with_halos(group, radius, xs, scales)
        return cls(group, sources, xs, scales)

    def own(self, m: int) -> jax.Array:
        """scale · u of member m."""
        return scaled(self.xs, self.scales, m)

    def neighbor(self, m: int, offset: int) -> jax.Array | None:
        """(scale · u)_{l+offset} for every slot l of member m, None where none is."""
        return neighbor(self.sources, m, offset, self.xs, self.scales)


def _shift_and_add(around: _Surroundings, m: int, weights: Sequence[Any]) -> jax.Array:
    """u + Σ_j w_j (u_{l-j} - u_l + u_{l+j} - u_l), without neighbors that do not exist.

    The difference form keeps a depth-constant u bit-exact.
    """
    group, u = around.group, around.own(m)
    out = u
    for distance, weight in enumerate(weights, start=1):
        differences = []
        for offset in (-distance, distance):
            other = around.neighbor(m, offset)
            if other is None:
                continue
            difference = other - u
            has = has_neighbor(group, m, offset)
            if not has.all():
                mask = group.along(m, has, u.ndim)
                difference = mask.astype(u.dtype) * difference
            differences.append(difference)
        if differences:
            total = sum(differences[1:], differences[0])
            out = out + in_dtype(weight, u.dtype) * total
    return out


def _weighted_sum(
    around: _Surroundings,
    m: int,
    matrices: dict[int, Matrix],
    offsets: Sequence[int],
) -> jax.Array:
    """Σ_d S[l, l+d] u_{l+d} over the offsets d at which S is not known to be 0."""
    group, u = around.group, around.own(m)
    out = jnp.zeros_like(u)
    for offset in offsets:
        weights = _weights_at(group, m, offset, matrices)
        other = u if offset == 0 else around.neighbor(m, offset)
        if other is not None:
            along = group.along(m, weights, u.ndim)
            out = out + along.astype(u.dtype) * other
    return out


def _weights_at(
    group: Group, m: int, offset: int, matrices: dict[int, Matrix]
) -> Matrix:
    """S[l, l+offset] for every slot of member m, 0 where there is no such layer.

    Of a group that is split, for every stage, along a first axis.
    """
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


def _matmul(
    group: Group,
    matrices: dict[int, Matrix],
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
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
    stacked = jnp.concatenate([like(of_leaf, layers[0]) for of_leaf in layers])
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


def _matrix(group: Group, n: int, matrix_of: Callable[[int], Matrix]) -> Matrix:
    try:
        matrix = matrix_of(n)
        if matrix.shape != (n, n):
            raise ValueError(
                f"The operator's `matrix({n})` has shape {matrix.shape}, where "
                f"({n}, {n}) is needed."
            )
        return matrix
    except ValueError as error:
        run = next(run for run in group.runs if len(run) == n)
        raise ValueError(
            f"{error} This was for {name_of(group.stack, group.role)}, layers "
            f"{run[0]} to {run[-1]}."
        ) from error


def _offsets(operator: Operator, matrices: dict[int, Matrix]) -> list[int]:
    """The offsets at which some matrix has, or may have, a weight."""
    return [
        offset
        for offset in operator.offsets(max(matrices))
        if any(
            not isinstance(matrix, np.ndarray) or np.diagonal(matrix, offset).any()
            for n, matrix in matrices.items()
            if abs(offset) < n
        )
    ]


def _widest_shifted_band(group: Group) -> int:
    if group.stages is not None:
        return group.whole.num_layers  # a matmul would need the layers of all stages
    if _is_one_stacked_leaf(group):
        return _WIDEST_SHIFTED_BAND
    return _WIDEST_SHIFTED_BAND_OF_SEVERAL_LEAVES


def _is_one_stacked_leaf(group: Group) -> bool:
    """Whether one leaf holds the whole group, in order, as a single run."""
    if len(group.members) > 1 or len(group.runs) > 1:
        return False
    return bool((group.ranks[0].ravel() == np.arange(group.num_layers)).all())
