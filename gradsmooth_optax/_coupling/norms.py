"""Norms over the whole range of float32, ratios of them, and cosines.

The square of 1e-30 is 0 in float32, that of 1e30 is infinite. So where a sum of squares
may be wrong, all are summed again, each layer times a power of two that brings it into
range. This hardly ever happens, and costs nothing where it does not.

Numbers are cut before they are squared: no infinity is made, which `jax.debug_infs`
would see and which would make derivatives NaN.
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

# Where numbers are cut: the squares of 2^32 of them are less than the largest number.
_CUT = 2.0**47

# Between these a sum of so many squares is right: below, squares that are flushed to 0
# may be more than its rounding; above, numbers may have been cut.
_LOW, _HIGH = 2.0**-70, 2.0**94

# What brings layers whose sums are below or above into that range.
_UP, _DOWN = 2.0**90, 2.0**-80

# What rounding may leave where all cancels, in units of eps.
_ULPS = 8


class Squares(NamedTuple):
    """Squared norms ‖factor · u‖², in range, and the factors, powers of two."""

    sums: LayerValues
    factors: LayerValues


@functools.partial(jax.jit, static_argnums=(2, 3))
def inner_product(
    x: jax.Array, y: jax.Array, axes: tuple[int, ...], keepdims: bool
) -> jax.Array:
    """Re⟨x, y⟩ over these axes; the largest number where that is too large."""
    product = x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y
    total = jnp.sum(product, axis=axes, keepdims=keepdims)
    largest = jnp.finfo(total.dtype).max
    return jnp.clip(total, -largest, largest)


def in_range(
    sums_of: SumsOf, count: int, is_in: IsIn | None, axis_names: Sequence[Hashable]
) -> tuple[Sequence[LayerValues], Sequence[LayerValues]]:
    """Sums that are right over the whole range, and the factors that they are with.

    Args:
      sums_of: called without factors, and again with them where a sum may be wrong.
      count: how many of the sums are squares, each with factors of its own.
      is_in: which layers are summed; the sums of others are 0.
      axis_names: of mesh axes over which `sums_of` communicates.
    """
    sums = sums_of(())
    squares = [masked(square, is_in, 1.0) for square in sums[:count]]
    factors = [square.map(_factor) for square in squares]
    arrays = [x for square in squares for row in square._arrays for x in row]
    wrong = _some_wrong({id(x): x for x in arrays}.values())
    # All devices take the same branch, or those that communicate would wait forever.
    wrong = summed_over(axis_names, wrong.astype(jnp.int32)) > 0
    if is_traced(wrong):
        return lax.cond(wrong, lambda: sums_of(factors), lambda: sums), factors
    return sums_of(factors) if wrong else sums, factors


def _factor(square: jax.Array) -> jax.Array:
    factor = jnp.where(square < _LOW, _UP, jnp.where(square > _HIGH, _DOWN, 1.0))
    return factor.astype(square.dtype)


def _some_wrong(squares: Sequence[jax.Array]) -> jax.Array:
    wrong = (jnp.any((square < _LOW) | (square > _HIGH)) for square in squares)
    return functools.reduce(operator.or_, wrong)


def root(square: jax.Array, factor: jax.Array) -> jax.Array:
    """‖u‖ from ‖factor · u‖²."""
    zero, square = _without_zero(square)
    return jnp.where(zero, 0.0, jnp.sqrt(square)) / factor


def inverse(square: jax.Array) -> jax.Array:
    """1/‖u‖ from ‖u‖², and 0 where that is 0."""
    zero, square = _without_zero(square)
    return jnp.where(zero, 0.0, 1.0) / jnp.sqrt(square)


def cosine(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the squared norms, and 0 where one of them is 0."""
    zero, square = _without_zero(square)
    other_zero, other = _without_zero(other)
    dot = jnp.where(zero | other_zero, 0.0, dot)
    return jnp.clip(dot / (jnp.sqrt(square) * jnp.sqrt(other)), -1.0, 1.0)


def ratios(
    norms: Squares,
    others: Squares,
    rounding: LayerValues | None = None,
    where_zero: float = 1.0,
) -> LayerValues:
    """‖u‖/‖v‖ of every layer, exactly 1 where they are equal.

    Args:
      norms: of u.
      others: of v.
      rounding: what ‖v‖ may be by rounding alone, in eps: no more than 0 then.
      where_zero: the ratio where one of them is 0.
    """

    def ratio(x: Any, factor: Any, y: Any, other_factor: Any, size: Any = 0.0) -> Any:
        noise = _ULPS * jnp.finfo(y.dtype).eps * jnp.asarray(size, y.dtype)
        is_zero = (x == 0) | (y == 0) | (root(y, other_factor) <= noise)
        x, y = (jnp.where(is_zero, 1.0, square) for square in (x, y))
        found = jnp.sqrt(x) / jnp.sqrt(y)
        # A compiler may divide by a product with an inverse, which is not exact.
        exact = 1.0 + (found - lax.stop_gradient(found))
        found = jnp.where(x == y, exact, found) * (other_factor / factor)
        return jnp.where(is_zero, where_zero, found)

    sizes = () if rounding is None else (rounding,)
    return norms.sums.map(ratio, norms.factors, *others, *sizes)


def _without_zero(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where it is 0, and with a 1 there.

    Zero is told by == and not by >, so that a NaN stays visible. Replaced before the
    root, whose derivative at 0 would make gradients NaN.
    """
    zero = square == 0
    return zero, jnp.where(zero, 1.0, square)
