"""S applied to groups of layers: shift-and-add, matmul, norms. No trees, no optax.

A group's layers lie in leaves of any layout. What the layers of one leaf receive from
those at offset d is an array of that leaf's own shape: slices of the group's leaves,
placed by `lax.pad`. So one rule serves a stacked leaf (a shifted copy of itself, which
fuses), one leaf per layer (the next leaf as it is, never stacked) and any mixture.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._groups import Group, Member, name_of
from gradsmooth_optax._operators import Matrix, Operator

Variant: TypeAlias = Literal["standard", "norm_preserving", "directional"]
NormScope: TypeAlias = Literal["param", "block"]
Arrays: TypeAlias = list[list[jax.Array]]  # one per member, per group

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
    xs = [[jnp.asarray(leaves[m.leaf]) for m in group.members] for group in groups]
    matrix_of = functools.cache(operator.matrix)

    def couple(scales: Arrays | None = None) -> Arrays:
        return [
            _couple(group, x, operator, matrix_of, scales[g] if scales else None)
            for g, (group, x) in enumerate(zip(groups, xs, strict=True))
        ]

    if variant == "standard":
        ys = couple()
    else:
        before = _squared_norms(groups, xs, norm_scope)
        ys = couple(_map(_inverse_root, before) if variant == "directional" else None)
        after = _squared_norms(groups, ys, norm_scope)
        keep = _unchanged if variant == "directional" else _unscaled
        ys = _map(functools.partial(_rescale, keep), xs, ys, before, after)
    return {
        member.leaf: _finish(x, y, group, m)
        for group, x_group, y_group in zip(groups, xs, ys, strict=True)
        for m, (member, x, y) in enumerate(
            zip(group.members, x_group, y_group, strict=True)
        )
        if _in_run(group, m).any()
    }


def _finish(x: jax.Array, y: jax.Array, group: Group, m: int) -> jax.Array:
    """Rounds once; slots that are a run of their own keep what they had."""
    in_run = _in_run(group, m)
    y = y.astype(x.dtype)
    if in_run.all():
        return y
    return jnp.where(_along(in_run, group.members[m], x.ndim), y, x)


# -- S u -------------------------------------------------------------------------------


def _couple(
    group: Group,
    xs: list[jax.Array],
    operator: Operator,
    matrix_of: Callable[[int], Matrix],
    scales: list[jax.Array] | None,
) -> list[jax.Array]:
    """S u of one group, or S (scale · u), one array per member, not yet rounded."""
    lengths = [n for n in sorted(set(group.run_lengths.tolist())) if n > 1]
    weights = operator.side_weights()
    if weights is not None:
        weights = weights[: lengths[-1] - 1]
        if len(weights) <= _WIDEST_SHIFTED_BAND or not _is_one_stacked_leaf(group):
            return [
                _shift_and_add(group, m, xs, weights, scales) for m in range(len(xs))
            ]
    matrices = {n: _matrix(group, n, matrix_of) for n in lengths}
    if _is_one_stacked_leaf(group):
        (matrix,) = matrices.values()
        if _bandwidth(matrix) > _WIDEST_SHIFTED_BAND:
            return [_matmul(matrix, group.members[0], _scaled(xs, scales, 0))]
    return [_weighted_sum(group, m, xs, matrices, scales) for m in range(len(xs))]


def _shift_and_add(
    group: Group,
    m: int,
    xs: list[jax.Array],
    weights: Sequence[Any],
    scales: list[jax.Array] | None,
) -> jax.Array:
    """u + Σ_j w_j (has (u_{l-j} - u_l) + has (u_{l+j} - u_l)).

    The difference form keeps a depth-constant u bit-exact.
    """
    u = _scaled(xs, scales, m)
    out = u
    for distance, weight in enumerate(weights, start=1):
        differences = []
        for offset in (-distance, distance):
            neighbor, has = _neighbor(group, m, offset, xs, scales)
            if neighbor is None:
                continue
            difference = neighbor - u
            if not has.all():
                mask = _along(has, group.members[m], u.ndim).astype(u.dtype)
                difference = mask * difference
            differences.append(difference)
        if differences:
            out = out + _weak_or_cast(weight, u.dtype) * sum(
                differences[1:], differences[0]
            )
    return out


def _weighted_sum(
    group: Group,
    m: int,
    xs: list[jax.Array],
    matrices: dict[int, Matrix],
    scales: list[jax.Array] | None,
) -> jax.Array:
    """Σ_d S[l, l+d] u_{l+d} over the offsets d at which S is not known to be 0."""
    u = _scaled(xs, scales, m)
    longest = max(matrices)
    out = None
    for offset in range(1 - longest, longest):
        weights = _weights_at(group, m, offset, matrices)
        if isinstance(weights, np.ndarray) and not weights.any():
            continue
        neighbor = u if offset == 0 else _neighbor(group, m, offset, xs, scales)[0]
        if neighbor is None:
            continue
        term = _along(weights, group.members[m], u.ndim).astype(u.dtype) * neighbor
        out = term if out is None else out + term
    return jnp.zeros_like(u) if out is None else out


def _weights_at(
    group: Group, m: int, offset: int, matrices: dict[int, Matrix]
) -> Matrix:
    """S[l, l+offset] for every slot of member m, 0 where there is no such layer."""
    position, length = _positions(group, m)
    target = position + offset
    weights: Any = np.zeros(position.shape)
    for n, matrix in matrices.items():
        valid = (length == n) & (target >= 0) & (target < n)
        if valid.any():
            found = matrix[np.minimum(position, n - 1), np.clip(target, 0, n - 1)]
            xp = np if isinstance(found, np.ndarray | np.generic) else jnp
            weights = xp.where(valid, found, weights)
    return np.asarray(weights) if isinstance(weights, np.generic) else weights


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


# -- Neighbors -------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A box of one member's slots and where it lands among the receiver's slots."""

    member: int
    start: tuple[int, ...]
    stop: tuple[int, ...]
    at: tuple[int, ...]


def _neighbor(
    group: Group,
    m: int,
    offset: int,
    xs: list[jax.Array],
    scales: list[jax.Array] | None,
) -> tuple[jax.Array | None, np.ndarray]:
    """For every slot of member m, the layer at `offset` in its run.

    Returns:
      An array shaped as member m's leaf, 0 in slots without such a layer, or None if
      no slot has one; and which slots have one.
    """
    pieces, has = _pieces(group, m, offset)
    if not pieces:
        return None, has

    def assemble(arrays: list[jax.Array]) -> jax.Array:
        # The pieces do not overlap, so the sum only puts them together.
        placed = [_place(arrays[p.member], group, p, m) for p in pieces]
        return sum(placed[1:], placed[0])

    # Padded in the leaf's own dtype: under sharding that is what crosses devices.
    neighbor = _widened(assemble(xs))
    if scales is not None:
        neighbor = neighbor * assemble(scales).astype(neighbor.dtype)
    return neighbor, has


def _pieces(group: Group, m: int, offset: int) -> tuple[list[_Piece], np.ndarray]:
    position, length = _positions(group, m)
    has = (position + offset >= 0) & (position + offset < length)
    ranks, axes = group.ranks[m], group.members[m].axes
    # Slots that take from one member at one distance move together, as a box.
    together: dict[Hashable, list[tuple[tuple[int, ...], tuple[int, ...]]]]
    together = defaultdict(list)
    for index in map(tuple, np.argwhere(has).tolist()):
        source, source_index = group.slots[ranks[index] + offset]
        moved: Hashable = (index, source_index)
        if len(group.members[source].axes) == len(axes):
            moved = tuple(i - j for i, j in zip(index, source_index, strict=True))
        together[source, moved].append((index, source_index))
    pieces = []
    for (source, _), pairs in together.items():  # pyright: ignore[reportGeneralTypeIssues] # the key is (member, how it moved)
        pieces += [_Piece(source, *box) for box in _boxes(pairs)]
    return pieces, has


def _boxes(pairs):
    """(start, stop, at) of one box that holds just these slots, or of each alone."""
    index, source = (np.array(column, int) for column in zip(*pairs, strict=True))
    start, stop = source.min(0), source.max(0) + 1
    if np.prod(stop - start) == len(pairs):
        return [tuple(tuple(map(int, v)) for v in (start, stop, index.min(0)))]
    return [(s, tuple(i + 1 for i in s), at) for at, s in pairs]


def _place(x: jax.Array, group: Group, piece: _Piece, m: int) -> jax.Array:
    """The piece's box of `x`, at its place in an array laid out as member m, else 0."""
    source, receiver = group.members[piece.member], group.members[m]
    box = [b - a for a, b in zip(piece.start, piece.stop, strict=True)]
    low = [t - a for t, a in zip(piece.at, piece.start, strict=False)]
    high = [
        n - b - k
        for n, b, k in zip(
            receiver.layers.shape, source.layers.shape, low, strict=False
        )
    ]
    if source.axes != receiver.axes or _shows_more(piece, source, receiver, low):
        x = _slice_box(x, source.axes, piece)
        if len(source.axes) == len(receiver.axes):
            x = jnp.moveaxis(x, source.axes, receiver.axes)
        else:
            x = lax.expand_dims(lax.squeeze(x, source.axes), receiver.axes)
            box = [1] * len(receiver.axes)
        low = piece.at
        high = [
            n - a - b
            for n, a, b in zip(receiver.layers.shape, piece.at, box, strict=True)
        ]
    padding = [(0, 0, 0)] * x.ndim
    for axis, before, after in zip(receiver.axes, low, high, strict=True):
        padding[axis] = (before, after, 0)
    if any(before or after for before, after, _ in padding):
        x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    return x


def _shows_more(
    piece: _Piece, source: Member, receiver: Member, low: Sequence[int]
) -> bool:
    """Whether shifting the whole leaf by `low` would bring in slots off the box."""
    return any(
        max(0, -k) < a or min(size, n - k) > b
        for k, a, b, size, n in zip(
            low,
            piece.start,
            piece.stop,
            source.layers.shape,
            receiver.layers.shape,
            strict=True,
        )
    )


def _slice_box(x: jax.Array, axes: tuple[int, ...], piece: _Piece) -> jax.Array:
    for axis, start, stop in zip(axes, piece.start, piece.stop, strict=True):
        x = lax.slice_in_dim(x, start, stop, axis=axis)
    return x


# -- Norms -----------------------------------------------------------------------------


def _squared_norms(
    groups: Sequence[Group], arrays: Arrays, norm_scope: NormScope
) -> Arrays:
    """‖u‖² of every slot, with size 1 on all axes but those over depth."""
    norms = [
        [_sum_of_squares(x, m.axes) for m, x in zip(group.members, xs, strict=True)]
        for group, xs in zip(groups, arrays, strict=True)
    ]
    return norms if norm_scope == "param" else _summed_over_blocks(groups, norms)


def _sum_of_squares(x: jax.Array, depth_axes: tuple[int, ...]) -> jax.Array:
    x = _widened(x)
    squares = x * x if not jnp.iscomplexobj(x) else x.real * x.real + x.imag * x.imag
    other = tuple(axis for axis in range(x.ndim) if axis not in depth_axes)
    return jnp.sum(squares, axis=other, keepdims=True)


def _summed_over_blocks(groups: Sequence[Group], norms: Arrays) -> Arrays:
    """Sums over all roles of a layer that are in a run of at least two layers."""
    # Leaves that hold the same layers are added as vectors, one vector per set.
    totals: dict[tuple[Hashable, tuple[int, ...]], jax.Array] = {}
    keys: list[list[tuple[Hashable, tuple[int, ...]]]] = []
    widest = max((n.dtype for of_group in norms for n in of_group), key=_bits)
    for group, of_group in zip(groups, norms, strict=True):
        keys.append([])
        for m, norm in enumerate(of_group):
            key = (group.stack, tuple(group.members[m].layers.ravel().tolist()))
            vector = norm.astype(widest).reshape(len(key[1]))
            in_run = _in_run(group, m).ravel()
            if not in_run.all():
                vector = jnp.where(in_run, vector, jnp.zeros_like(vector))
            totals[key] = totals[key] + vector if key in totals else vector
            keys[-1].append(key)
    totals = _joined(totals)
    return [
        [
            totals[k].astype(n.dtype).reshape(n.shape)
            for k, n in zip(ks, ns, strict=True)
        ]
        for ks, ns in zip(keys, norms, strict=True)
    ]


def _joined(totals: dict[tuple[Hashable, tuple[int, ...]], jax.Array]) -> dict:
    """Adds to every vector what other sets of layers hold of the same blocks."""
    holders = defaultdict(list)
    for stack, layers in totals:
        for i, layer in enumerate(layers):
            holders[stack, layer].append(((stack, layers), i))
    joined = {}
    for key, total in totals.items():
        stack, layers = key
        shared = defaultdict(list)
        for i, layer in enumerate(layers):
            for other, j in holders[stack, layer]:
                if other != key:
                    shared[other].append((i, j))
        for other, pairs in shared.items():
            here, there = np.array(pairs).T
            total = total.at[here].add(totals[other][there])
        joined[key] = total
    return joined


def _inverse_root(squared: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    zero = squared == 0
    return jnp.where(zero, 0.0, 1 / jnp.sqrt(jnp.where(zero, 1.0, squared)))


def _rescale(
    keep: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    before: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """y at the norm that x had; `keep(x, y)` where one of the norms is 0.

    Compared with == and not with >, so that a NaN stays visible.
    """
    zero = (before == 0) | (after == 0)
    # The root of the ratio is exactly 1 for equal norms; a ratio of roots is not
    # where the compiler turns it into a product with a reciprocal root.
    ratio = jnp.sqrt(before / jnp.where(after == 0, 1.0, after)).astype(y.dtype)
    return jnp.where(zero, keep(_widened(x), y), ratio * y)


def _unchanged(x: jax.Array, y: jax.Array) -> jax.Array:
    return x


def _unscaled(x: jax.Array, y: jax.Array) -> jax.Array:
    return y


# -- Small helpers ---------------------------------------------------------------------


def _map(function: Callable[..., jax.Array], *arrays: Arrays) -> Arrays:
    return [
        [function(*of_member) for of_member in zip(*of_group, strict=True)]
        for of_group in zip(*arrays, strict=True)
    ]


def _widened(x: jax.Array) -> jax.Array:
    """In the dtype of the arithmetic: at least float32."""
    return x if _bits(x.dtype) >= 32 else x.astype(jnp.float32)


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def _scaled(xs: list[jax.Array], scales: list[jax.Array] | None, m: int) -> jax.Array:
    u = _widened(xs[m])
    return u if scales is None else u * scales[m].astype(u.dtype)


def _weak_or_cast(weight: Any, dtype: Any) -> Any:
    return weight.astype(dtype) if isinstance(weight, jax.Array) else weight


def _positions(group: Group, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Position in its run, and length of that run, of every slot of member m."""
    ranks = group.ranks[m]
    return ranks - group.run_starts[ranks], group.run_lengths[ranks]


def _in_run(group: Group, m: int) -> np.ndarray:
    """Which slots of member m have at least one neighbor."""
    return group.run_lengths[group.ranks[m]] > 1


def _is_one_stacked_leaf(group: Group) -> bool:
    """Whether one leaf holds the whole group, in order, as a single run."""
    if len(group.members) > 1 or len(group.runs) > 1:
        return False
    return bool((group.ranks[0].ravel() == np.arange(group.num_layers)).all())


def _along(values: Any, member: Member, ndim: int) -> Any:
    """Values per slot, shaped to broadcast over a leaf of `ndim` axes."""
    shape = [1] * ndim
    for axis, size in zip(member.axes, member.layers.shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)
