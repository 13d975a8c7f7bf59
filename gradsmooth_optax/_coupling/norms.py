"""Norms over the whole range of float32, ratios of them, and cosines.

The square of 1e-30 is 0 in float32, that of 1e30 is infinite. So where a sum of squares
may be wrong, all are summed again, each layer times a power of two that brings it into
range. This hardly ever happens, and costs nothing where it does not.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from gradsmooth_optax._arrays import summed_over
from gradsmooth_optax._checks import is_traced
from gradsmooth_optax._coupling.layer_values import IsIn, LayerValues, masked

# Factors of the layers, or none -> sums, of which the first ones are of squares.
SumsOf: TypeAlias = Callable[[Sequence[LayerValues]], Sequence[LayerValues]]

# Between these a sum is right: below, 2^32 squares that are flushed to 0 may be more
# than its rounding; above, it may be infinite.
_LOW, _HIGH = 2.0**-70, 2.0**94

# What brings layers whose sums are below, or above, into that range.
_UP, _DOWN = 2.0**90, 2.0**-80

# What rounding may leave where all cancels, in units of eps.
_ULPS = 8


class Squares(NamedTuple):
    """Squared norms of layers that are multiplied by a power of two: see `in_range`.

    Attributes:
      sums: the squared norms, in range.
      first: those without the factor, by which it was chosen.
    """

    sums: LayerValues
    first: LayerValues

    def factors(self) -> LayerValues:
        """The powers of two."""
        return self.first.map(_factor)

    def norms(self) -> LayerValues:
        """‖u‖."""
        return self.sums.map(lambda x, first: _root(x) * _unit(first), self.first)

    def of_directions(self) -> Squares:
        """Those of u/‖u‖: 1, and 0 where u is 0."""
        sums = self.sums.map(lambda x: jnp.where(x == 0, 0.0, jnp.ones_like(x)))
        return Squares(sums, sums.map(jnp.ones_like))


def in_range(
    sums_of: SumsOf, count: int, is_in: IsIn | None, axis_names: Sequence[Hashable]
) -> tuple[Sequence[LayerValues], Sequence[LayerValues]]:
    """Sums that are right over the whole range, and the first ones of squares.

    Args:
      sums_of: called without factors, and again with them where a sum may be wrong.
      count: how many of the sums are squares, each with factors of its own.
      is_in: which layers are summed; the sums of others are 0.
      axis_names: of mesh axes over which `sums_of` communicates.
    """
    with jax.debug_infs(False), jax.debug_nans(False):  # sums that are not used
        sums = sums_of(())
    first = [masked(square, is_in, 1.0) for square in sums[:count]]
    arrays = [x for square in first for row in square._arrays for x in row]
    wrong = _some_wrong(list({id(x): x for x in arrays}.values()))
    # All devices take the same branch, or those that communicate would wait forever.
    if axis_names:
        wrong = summed_over(axis_names, wrong.astype(jnp.int32)) > 0

    def again() -> Sequence[LayerValues]:
        # Computed here: factors that are handed over are much to compile.
        return sums_of([square.map(_factor) for square in first])

    if is_traced(wrong):
        return lax.cond(wrong, again, lambda: sums), first
    return again() if wrong else sums, first


def _some_wrong(squares: Sequence[jax.Array]) -> jax.Array:
    wrong = (jnp.any((square < _LOW) | (square > _HIGH)) for square in squares)
    return functools.reduce(operator.or_, wrong)


def _chosen(first: jax.Array, up: float, down: float) -> jax.Array:
    found = jnp.where(first < _LOW, up, jnp.where(first > _HIGH, down, 1.0))
    return found.astype(first.dtype)  # 1 for a NaN


def _factor(first: jax.Array) -> jax.Array:
    return _chosen(first, _UP, _DOWN)


def _unit(first: jax.Array) -> jax.Array:
    return _chosen(first, 1 / _UP, 1 / _DOWN)


# -- What follows from squares ---------------------------------------------------------
#
# Roots and no divisions: XLA:CPU makes a kernel of each, and copies all else into what
# reads it. Zero is told by == and not by >, so that a NaN stays visible. It is replaced
# before the root, whose derivative at 0 would make gradients NaN.


def _root(square: jax.Array) -> jax.Array:
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def inverse(square: jax.Array) -> jax.Array:
    """1/‖u‖ from ‖u‖², and 0 where that is 0."""
    zero = square == 0
    return jnp.where(zero, 0.0, lax.rsqrt(jnp.where(zero, 1.0, square)))


def cosine(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the squared norms, and 0 where one of them is 0."""
    return jnp.clip(dot * inverse(square) * inverse(other), -1.0, 1.0)


def ratios(
    squares: Squares, others: Squares, share: LayerValues | None = None
) -> LayerValues:
    """‖u‖/‖v‖ of every layer, exactly 1 where they are equal; -1 where one is 0.

    Args:
      squares: of u.
      others: of v.
      share: ‖v‖ counts as 0 where rounding of this times ‖u‖ may leave as much.
    """

    def ratio(x: Any, first: Any, y: Any, other: Any, share: Any = 0.0) -> jax.Array:
        zero = (x == 0) | (y == 0)
        x, y = (jnp.where(zero, 1.0, square) for square in (x, y))
        found = jnp.sqrt(x) * lax.rsqrt(y)
        # No compiler need find that the two are inverse.
        exact = 1.0 + (found - lax.stop_gradient(found))
        found = jnp.where(x == y, exact, found) * (_unit(first) * _factor(other))
        noise = _ULPS * jnp.finfo(y.dtype).eps * share
        return jnp.where(zero | (found * noise >= 1), -1.0, found)

    shares = () if share is None else (share,)
    return squares.sums.map(ratio, squares.first, *others, *shares)
