"""Norms over the whole range of float32, ratios of them, and cosines.

The square of 1e-30 is 0 in float32, that of 1e30 is infinite. So where a sum of squares
may be wrong, all are summed again, each layer times a power of two that brings it into
range. This hardly ever happens, and costs nothing where it does not.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from gradsmooth_optax._arrays import in_dtype, manual_axes, summed_over
from gradsmooth_optax._checks import is_traced
from gradsmooth_optax._coupling.layer_values import IsIn, LayerValues, masked

# Factors of the layers, or none -> sums, of which the first ones are of squares.
SumsOf: TypeAlias = Callable[[Sequence[LayerValues]], Sequence[LayerValues]]

# These sums, and the factors that they are with or none -> what follows from them.
Finish: TypeAlias = Callable[[Sequence[LayerValues], Sequence[LayerValues]], Any]

# Between these the plain sums are right, and so are their ratios: squares of 2^32 tiny
# numbers that are flushed to 0 are less than the rounding of the lower one.
_LOW, _HIGH = 2.0**-62, 2.0**62

# What brings layers whose sums are below, or above, to sums from 2^-70 to 2^122.
_UP, _DOWN = 2.0**90, 2.0**-66

# What rounding may leave where all cancels, in units of eps.
_ULPS = 8


def in_range(
    sums_of: SumsOf,
    finish: Finish,
    num_squares: int,
    is_in: IsIn | None,
    axis_names: Iterable[Hashable],
) -> Any:
    """What follows from sums over layers of any size.

    Args:
      sums_of: called without factors, and again with them where a sum may be wrong.
      finish: what follows from the sums. Computed where they are: numbers of many
        leaves that are handed over are much to compile.
      num_squares: how many of the sums are of squares, each with factors of its own.
      is_in: which layers are summed; the sums of others are 0.
      axis_names: of mesh axes over which `sums_of` communicates.
    """
    with jax.debug_infs(False), jax.debug_nans(False):  # of sums that are not used
        sums = sums_of(())
        squares = [masked(square, is_in, 1.0) for square in sums[:num_squares]]
        arrays = [x for square in squares for row in square._arrays for x in row]
        wrong = _is_some_wrong({id(x): x for x in arrays}.values())
    # All devices take the same branch, or those that communicate would wait forever,
    # also for devices that they have nothing to do with.
    if axis_names:
        every = {*axis_names, *manual_axes()}
        wrong = summed_over(sorted(every, key=repr), wrong.astype(jnp.int32)) > 0

    def again() -> Any:
        with jax.debug_infs(False):
            # Layers that are not summed must not leave the range either.
            every = [masked(square, is_in, 2 * _HIGH) for square in squares]
            factors = [square.map(_factor) for square in every]
        return finish(sums_of(factors), factors)

    if is_traced(wrong):
        return lax.cond(wrong, again, lambda: finish(sums, ()))
    return again() if wrong else finish(sums, ())


def _is_some_wrong(squares: Iterable[jax.Array]) -> jax.Array:
    by_dtype = defaultdict(list)
    for square in map(lax.stop_gradient, squares):
        by_dtype[square.dtype].append(square)
    wrong = []
    for alike in by_dtype.values():
        smallest = functools.reduce(jnp.minimum, map(jnp.min, alike))
        largest = functools.reduce(jnp.maximum, map(jnp.max, alike))
        # Also where one is a NaN.
        wrong.append(~((smallest >= _LOW) & (largest <= _HIGH)))
    return functools.reduce(jnp.logical_or, wrong)


def _factor(square: jax.Array) -> jax.Array:
    square = lax.stop_gradient(square)
    down = jnp.where(square > _HIGH, _DOWN, jnp.ones_like(square))
    return jnp.where(square < _LOW, _UP, down)  # 1 for a NaN


# -- What follows from squared norms ---------------------------------------------------
#
# Roots and divisions come last: XLA:CPU makes a kernel of each, and copies all else,
# with all that it needs, into every kernel that reads it. Zero is told by == and not by
# >, so that a NaN stays visible. It is replaced before the root, whose derivative at 0
# would make gradients NaN.


def root(square: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """‖u‖ from ‖factor · u‖²."""
    zero = square == 0
    norm = jnp.sqrt(jnp.where(zero, 1.0, square))
    return jnp.where(zero, 0.0, norm if factor is None else norm / factor)


def inverse(norm: jax.Array) -> jax.Array:
    """1/‖u‖, 0 where ‖u‖ is 0, and NaN where it is more than the dtype can hold."""
    zero = norm == 0
    inverses = jnp.where(zero, 0.0, 1.0) / jnp.where(zero, 1.0, norm)
    return jnp.where(norm == jnp.inf, jnp.nan, inverses)


def cosine(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the squared norms, and 0 where one of them is 0."""
    zero = (square == 0) | (other == 0)
    square, other = (jnp.where(zero, 1.0, x) for x in (square, other))
    dot = jnp.where(zero, 0.0, dot)
    return jnp.clip(dot / (jnp.sqrt(square) * jnp.sqrt(other)), -1.0, 1.0)


def ratio(square: jax.Array, other: jax.Array, *factors: jax.Array) -> jax.Array:
    """‖u‖/‖v‖ from the squared norms, exactly 1 where equal, and -1 where one is 0.

    Args:
      square: ‖u‖², or ‖factor · u‖².
      other: ‖v‖², or ‖other_factor · v‖².
      *factors: none, or the two.
    """
    zero = (square == 0) | (other == 0)
    x, y = (jnp.where(zero, 1.0, x) for x in (square, other))
    if not factors:
        # Exact, which a ratio of roots is not where the compiler makes it a product
        # with a reciprocal root.
        return jnp.where(zero, -1.0, jnp.sqrt(x / y))
    factor, other_factor = (jnp.where(zero, 1.0, x) for x in factors)
    found = jnp.sqrt(x) / jnp.sqrt(y)
    exact = 1.0 + (found - lax.stop_gradient(found))
    # In two steps, of which none leaves the range, nor its derivative.
    step = jnp.sqrt(other_factor) / jnp.sqrt(factor)
    return jnp.where(zero, -1.0, jnp.where(x == y, exact, found) * step * step)


def is_noise(ratio: jax.Array, share: Any) -> jax.Array:
    """Whether there is no ‖u‖/‖v‖, or ‖v‖ is what rounding of share · ‖u‖ may leave."""
    share = in_dtype(share, ratio.dtype)
    noise = _ULPS * float(jnp.finfo(ratio.dtype).eps) * share
    return (ratio < 0) | (ratio * noise >= 1)
