"""Norms, their ratios and cosines, over the whole range of the dtype.

The square of 1e-30 is 0 in float32, that of 1e30 is infinite. So three sums are made in
one pass, of the numbers at three scales, and the right one is chosen afterwards. Sums
over roles or devices are those of each of the three.

A division comes last: XLA:CPU computes an expensive operation once, but copies a cheap
one, with all that it needs, into every kernel that reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradsmooth_optax._arrays import is_split

# The scales, and the limit of each number at any of them: of float32, whose largest
# number is 2^128, and with which leaves of float64 share a block. No sum of fewer than
# 2^32 squares overflows.
_UP, _DOWN, _LIMIT = 2.0**80, 2.0**-80, 2.0**48

# How many numbers XLA:CPU may add one after the other, and how many must lie along an
# axis for its sums not to take the place of a part of the array.
_LONGEST_CHAIN = 64
_FEWEST = 32

# What of Σ_k |S_lk| ‖u_k‖ rounding may leave where S u cancels, in units of eps.
_ULPS = 8


class Sums(NamedTuple):
    """Sums of products of numbers at three scales: see `scaled_sums`.

    Attributes:
      small: of 2^80 x, right where all numbers are below 2^-32.
      medium: of x, right where all are below 2^48.
      large: of 2^-80 x.
    """

    small: Any
    medium: Any
    large: Any


# -- Sums ------------------------------------------------------------------------------


def scaled_sums(
    pairs: Sequence[tuple[jax.Array, jax.Array]], axes: Sequence[int], keepdims: bool
) -> list[Sums]:
    """Re⟨x, y⟩ over these axes of every pair, at three scales, in one pass.

    Where a number exceeds a limit it is cut to that: so no sum overflows, and one that
    reaches the square of the limit is not the right one.

    Args:
      pairs: arrays of equal shape.
      axes: that are summed over.
      keepdims: whether they stay, with size 1.
    """
    products = [part for x, y in pairs for part in _products(x, y)]
    totals = _totals(tuple(axes), keepdims, tuple(products))
    return [Sums(*totals[i : i + 3]) for i in range(0, len(totals), 3)]


def _products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    if jnp.iscomplexobj(x):
        of_parts = _products(x.real, y.real), _products(x.imag, y.imag)
        return tuple(map(operator.add, *of_parts))
    xs = _at_scales(x)
    ys = xs if y is x else _at_scales(y)
    return tuple(a * b for a, b in zip(xs, ys, strict=True))


def _at_scales(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Cut again after the product, where nothing is left to be cut but infinities, which
    # stay too large: XLA squares the factor alone, to 0 or infinity, if it can.
    small = _cut(_cut(x, _LIMIT * _DOWN) * _UP, 2 * _LIMIT)
    return small, _cut(x, _LIMIT), _cut(x * _DOWN, 2 * _LIMIT)


def _cut(x: jax.Array, limit: float) -> jax.Array:
    return jnp.clip(x, -limit, limit)


def _totals(
    axes: tuple[int, ...], keepdims: bool, xs: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The sums of arrays of equal shape, which are read once."""
    shape = xs[0].shape
    if not axes or 0 in shape:
        return _apart(axes, keepdims, xs)
    long = [axis for axis in axes if shape[axis] >= _FEWEST]
    axis = max(long) if long else max(axes, key=lambda axis: shape[axis])
    return lax.platform_dependent(
        *xs,
        cpu=lambda *xs: _apart(axes, keepdims, _in_chains(axis, xs)),
        default=lambda *xs: _apart(axes, keepdims, _together(axis, xs)),
    )


_totals = jax.custom_jvp(
    jax.jit(_totals, static_argnums=(0, 1), inline=True), nondiff_argnums=(0, 1)
)


@_totals.defjvp
def _(axes, keepdims, primals, tangents):
    return _totals(axes, keepdims, *primals), _apart(axes, keepdims, *tangents)


def _apart(
    axes: tuple[int, ...], keepdims: bool, xs: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    return tuple(jnp.sum(x, axis=axes, keepdims=keepdims) for x in xs)


def _together(axis: int, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sums along one axis, which stays with size 1."""
    zeros = (jnp.zeros((), xs[0].dtype),) * len(xs)
    sums = lax.reduce(xs, zeros, lambda a, b: tuple(map(operator.add, a, b)), (axis,))
    return tuple(jnp.expand_dims(x, axis) for x in sums)


def _in_chains(axis: int, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums of a few neighbors along one axis.

    XLA:CPU adds one number after the other, which loses digits where they are many.
    """
    *before, size = xs[0].shape[: axis + 1]
    after = xs[0].shape[axis + 1 :]
    if is_split(xs[0], axis):
        return _together(axis, xs)
    chain = max(n for n in range(1, _LONGEST_CHAIN + 1) if size % n == 0)
    shape = (*before, size // chain, chain, *after)
    sums = _together(axis + 1, tuple(x.reshape(shape) for x in xs))
    return tuple(x.reshape((*before, size // chain, *after)) for x in sums)


# -- What follows from them ------------------------------------------------------------


def norm(sums: Sums) -> jax.Array:
    """‖u‖, from the sums of squares."""
    chosen, unit = _chosen(sums)
    zero = chosen == 0
    # Replaced before the root, whose derivative at 0 would make gradients NaN.
    return jnp.where(zero, 0.0, unit * jnp.sqrt(jnp.where(zero, 1.0, chosen)))


def square(sums: Sums) -> jax.Array:
    """‖u‖², as far as the dtype can hold it."""
    chosen, unit = _chosen(sums)
    return unit * (unit * chosen)


def _chosen(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The right sum, and what the numbers in it are in units of."""
    is_small, is_medium = map(_is_whole, sums[:2])
    chosen = jnp.where(is_medium, sums.medium, sums.large)
    unit = jnp.where(is_medium, jnp.ones_like(chosen), _UP)
    return jnp.where(is_small, sums.small, chosen), jnp.where(is_small, _DOWN, unit)


def _is_whole(squares: jax.Array) -> jax.Array:
    """Whether no number of a sum was cut."""
    return ~(squares >= _LIMIT**2)  # and not <, so that a NaN stays visible


def square_ratio(squares: Sums, others: Sums) -> jax.Array:
    """‖u‖² / ‖v‖², and 0 where ‖v‖ is 0."""
    first, second, _ = _at_one_scale(squares, others, squares)
    zero = second == 0
    return _divided(jnp.where(zero, 0.0, first), jnp.where(zero, 1.0, second))


def cosine(dots: Sums, squares: Sums, others: Sums) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖, and 0 where one of the norms is 0."""
    first, second, dot = _at_one_scale(squares, others, dots)
    zero = (first == 0) | (second == 0)
    first, second = (jnp.sqrt(jnp.where(zero, 1.0, x)) for x in (first, second))
    # One after the other: the product of the norms may be out of range.
    cosines = _divided(_divided(jnp.where(zero, 0.0, dot), first), second)
    return jnp.clip(cosines, -1.0, 1.0)


def _at_one_scale(
    squares: Sums, others: Sums, dots: Sums
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """‖u‖², ‖v‖² and ⟨u, v⟩ of which none is too large."""

    is_small = _is_whole(squares.small) & _is_whole(others.small)
    is_medium = _is_whole(squares.medium) & _is_whole(others.medium)

    def chosen(sums: Sums) -> jax.Array:
        rest = jnp.where(is_medium, sums.medium, sums.large)
        return jnp.where(is_small, sums.small, rest)

    return chosen(squares), chosen(others), chosen(dots)


def inverse(norm: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    # Zero is told by == and not by >, so that a NaN stays visible. Nowhere is an
    # infinity made on the way, which would stop `jax.debug_infs`.
    zero = norm == 0
    ones = jnp.ones_like(norm)
    return _divided(jnp.where(zero, 0.0, ones), jnp.where(zero, 1.0, norm))


def ratio(norm: jax.Array, other: jax.Array, where_zero: float) -> jax.Array:
    """‖u‖/‖v‖, exactly 1 where they are equal, `where_zero` where one of them is 0."""
    zero = (norm == 0) | (other == 0)
    equal = norm == other  # a compiler may divide by a product with an inverse
    first = jnp.where(zero, where_zero, jnp.where(equal, 1.0, norm))
    return _divided(first, jnp.where(zero | equal, 1.0, other))


@jax.custom_jvp
def _divided(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, whose derivative needs no 1 / y², which is infinite for a small y."""
    return x / y


@_divided.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (_, y), (dx, dy) = primals, tangents
    quotient = _divided(*primals)
    return quotient, (dx - quotient * dy) / y


def without_noise(norm: jax.Array, size: jax.Array) -> jax.Array:
    """‖S u‖, but 0 where rounding alone can have left so much.

    Args:
      norm: ‖S u‖.
      size: Σ_k |S_lk| ‖u_k‖, or 0 where it is not known.
    """
    noise = _ULPS * jnp.finfo(norm.dtype).eps * size
    # An infinite size says nothing; and a NaN stays visible.
    return jnp.where((norm <= noise) & (noise < jnp.inf), jnp.zeros_like(norm), norm)
