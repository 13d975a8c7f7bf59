"""Norms over the whole range of the dtype, ratios of them, and cosines.

The square of 1e-30 is 0 in float32, that of 1e30 is infinite. So squares are summed at
three scales, in one pass, and the right sum is chosen afterwards. Sums over roles and
devices are those of each of the three.

A division comes last: XLA:CPU computes an expensive operation once, but copies a cheap
one, with all that it needs, into every kernel that reads it. No infinity is ever made
where `jax.debug_infs` would see it, and none where a derivative would.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradsmooth_optax._arrays import is_split, num_bits

# How many numbers XLA:CPU adds one after the other: where there are many more it is as
# fast as one plain sum, and where there are not it takes one loop or two.
_CHAIN, _LONGEST_CHAIN, _MANY = 16, 256, 2**18

# What rounding may leave where all cancels, in units of eps.
_ULPS = 8


class Sums(NamedTuple):
    """Sums of products of numbers at three scales.

    In float32 they hold for layers of fewer than 2^32 numbers; the exponents are those
    of `_power`.

    Attributes:
      small: of 2^80 x, right where the norm is below 2^-40.
      medium: of x, right where it is below 2^48.
      large: of 2^-80 x.
    """

    small: Any
    medium: Any
    large: Any


def _power(exponent: int, like: jax.Array) -> float:
    """2 to the power of an exponent of float32, or of 8 times as much in float64."""
    return 2.0 ** (exponent * (8 if num_bits(like.dtype) > 32 else 1))


# -- Sums ------------------------------------------------------------------------------


def sums(
    pairs: Sequence[tuple[jax.Array, jax.Array]], axes: Sequence[int], keepdims: bool
) -> list[Sums]:
    """Re⟨x, y⟩ over these axes for every pair, at three scales, in one pass.

    Sums that are too large are cut, so that none is infinite.

    Args:
      pairs: arrays of equal shape, of which layers are along the other axes.
      axes: that are summed over.
      keepdims: whether they stay, with size 1.
    """
    arrays = list({id(x): x for pair in pairs for x in pair}.values())
    place = {id(x): i for i, x in enumerate(arrays)}
    places = tuple((place[id(x)], place[id(y)]) for x, y in pairs)
    totals = _sums(tuple(axes), keepdims, places, *arrays)
    return [Sums(*totals[i : i + 3]) for i in range(0, len(totals), 3)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(axes: Any, keepdims: bool, places: Any, *xs: jax.Array) -> list[jax.Array]:
    if math.prod(xs[0].shape[axis] for axis in axes) <= 1:
        # XLA would square factors of single numbers, to 0 or infinity.
        return _summed(axes, keepdims, _products(_cut, places, xs))
    if any(is_split(xs[0], axis) for axis in axes):
        totals = _summed(axes, keepdims, _products(_scaled, places, xs))
    else:
        totals = lax.platform_dependent(
            *xs,
            cpu=lambda *xs: _summed_in_chains(axes, keepdims, places, xs),
            default=lambda *xs: _summed_together(axes, keepdims, places, xs),
        )
    limit = _power(120, xs[0])
    for pair, (i, j) in enumerate(places):
        for k in range(3 * pair, 3 * pair + 3):
            if i != j:  # infinities of both signs make a NaN, which is not chosen
                totals[k] = jnp.where(jnp.isnan(totals[k]), 0.0, totals[k])
                totals[k] = jnp.maximum(totals[k], -limit)
            totals[k] = jnp.minimum(totals[k], limit)
    return totals


@_sums.defjvp
def _(axes: Any, keepdims: bool, places: Any, primals: Any, tangents: Any) -> Any:
    def cut_sums(*xs: jax.Array) -> list[jax.Array]:
        return _summed(axes, keepdims, _products(_cut, places, xs))

    _, tangent = jax.jvp(cut_sums, primals, tangents)
    return _sums(axes, keepdims, places, *primals), tangent


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x at three scales. Large numbers become infinite: only inside of `jit`."""
    return x * _power(80, x), x, x * _power(-80, x)


def _cut(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x at three scales, cut where it is too large, so that no square is infinite.

    Cut again after the product, where nothing is left to be cut but infinities: XLA
    else squares the factor alone, to 0 or infinity, where x is a scalar.
    """

    def cut(x: jax.Array, exponent: int) -> jax.Array:
        limit = _power(exponent, x)
        return jnp.clip(x, -limit, limit)

    small = cut(cut(x, -40) * _power(80, x), 41)
    return small, cut(x, 48), cut(x * _power(-80, x), 49)


def _products(
    at_scales: Any, places: Sequence[tuple[int, int]], xs: Sequence[jax.Array]
) -> list[jax.Array]:
    """Of every pair at every scale."""
    if jnp.iscomplexobj(xs[0]):
        parts = ([x.real for x in xs], [x.imag for x in xs])
        return list(
            map(operator.add, *(_products(at_scales, places, p) for p in parts))
        )
    scaled = [at_scales(x) for x in xs]
    return [x * y for i, j in places for x, y in zip(scaled[i], scaled[j], strict=True)]


def _summed(axes: tuple[int, ...], keepdims: bool, xs: Sequence[jax.Array]) -> list:
    return [jnp.sum(x, axis=axes, keepdims=keepdims) for x in xs]


def _summed_together(
    axes: tuple[int, ...], keepdims: bool, places: Any, xs: Sequence[jax.Array]
) -> list:
    """All sums in one pass, which XLA:TPU does not make of sums one by one."""
    sums = _variadic(axes[-1], _products(_scaled, places, xs))
    return _summed(axes, keepdims, [jnp.expand_dims(x, axes[-1]) for x in sums])


def _summed_in_chains(
    axes: tuple[int, ...], keepdims: bool, places: Any, xs: Sequence[jax.Array]
) -> list:
    """All sums in one loop, and in further ones over what that leaves.

    XLA:CPU would make a loop for each of the sums, and several times as slow.
    """
    ndim, length = xs[0].ndim, xs[0].shape[-1]
    if len(axes) < ndim:
        sums = _products(_scaled, places, xs)
        n = _divisor(length, _CHAIN)
        if axes[-1] == ndim - 1 and n:  # else XLA:CPU is slow to read shifted copies
            sums = _chained(n, sums)
        return _summed(axes, keepdims, sums)
    sums = _products(_scaled, places, [x.reshape(-1) for x in xs])
    chain = _CHAIN if sums[0].size >= _MANY else sums[0].size / _LONGEST_CHAIN
    while (size := sums[0].size) > _LONGEST_CHAIN and (n := _divisor(size, chain)):
        sums, chain = _chained(n, sums), size / n / _LONGEST_CHAIN
    if size <= 4 * _LONGEST_CHAIN:
        sums = _chained(size, sums)
    shape = (1,) * ndim if keepdims else ()
    return [jnp.sum(part).reshape(shape) for part in sums]


def _divisor(length: int, wanted: float) -> int:
    """A divisor as close to the wanted one as there is; 0 where none is worthwhile."""
    divisors = [n for n in range(4, _LONGEST_CHAIN + 1) if length % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted), default=0)


def _chained(chain: int, xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums of `chain` neighbors along the last axis, of all arrays in one loop."""
    *rest, size = xs[0].shape
    shape = (*rest, size // chain, chain)
    chains = [x.reshape(shape) for x in xs]
    # One loop for each pair is faster, one for all is less to compile.
    step = 3 if xs[0].size >= _MANY else len(chains)
    loops = [chains[i : i + step] for i in range(0, len(chains), step)]
    return [x for loop in loops for x in _variadic(len(rest) + 1, loop)]


def _variadic(axis: int, xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """The sums of all arrays along one axis, in one loop."""
    zeros = (jnp.zeros((), xs[0].dtype),) * len(xs)
    return lax.reduce(
        tuple(xs), zeros, lambda a, b: tuple(map(operator.add, a, b)), (axis,)
    )


# -- What follows from them ------------------------------------------------------------


def squares(norm: jax.Array) -> Sums:
    """‖u‖² at three scales, to be summed over the parts of a vector."""
    return Sums(*_products(_cut, [(0, 0)], [norm]))


@jax.custom_jvp
@jax.jit
def root(small: jax.Array, medium: jax.Array, large: jax.Array) -> jax.Array:
    """‖u‖, from the sums of squares."""
    chosen, unit = _chosen_of_squares(small, medium, large)
    return jnp.sqrt(chosen) * unit


@root.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    def safe_root(*squares: jax.Array) -> jax.Array:
        chosen, unit = _chosen_of_squares(*squares)
        return jnp.sqrt(jnp.where(chosen == 0, 1.0, chosen)) * unit

    _, tangent = jax.jvp(safe_root, primals, tangents)
    return root(*primals), tangent


def _chosen_of_squares(*squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    small, medium, _ = squares
    # `~ >=` and not `<`, so that a NaN stays visible.
    is_small = ~(small >= _power(80, small))
    is_medium = ~(medium >= _power(96, medium))
    return _chosen(squares, (-80, 0, 80), is_small, is_medium)


@jax.jit
def cosine(norm: jax.Array, other: jax.Array, *dots: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the norms and the sums of products.

    0 where one of the norms is 0, or where they are so far apart, in float32 by 2^88,
    that no scale is right for both.
    """
    are_below = [
        (norm < _power(limit, norm)) & (other < _power(limit, norm))
        for limit in (-40, 48)
    ]
    dot, scale = _chosen(dots, (80, 0, -80), *are_below)
    first, second = norm * scale, other * scale
    zero = (first == 0) | (second == 0)
    first, second = (jnp.where(zero, 1.0, x) for x in (first, second))
    # One after the other: the product of the norms may be out of range.
    cosines = divided(divided(jnp.where(zero, 0.0, dot), first), second)
    return jnp.clip(cosines, -1.0, 1.0)


def cosine_of_squares(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖, where squared norms are in range; 0 where one of them is 0."""
    zero = (square == 0) | (other == 0)
    # Replaced before the root, whose derivative at 0 would make gradients NaN.
    first, second = (jnp.sqrt(jnp.where(zero, 1.0, x)) for x in (square, other))
    return jnp.clip(jnp.where(zero, 0.0, dot) / (first * second), -1.0, 1.0)


def _chosen(
    sums: Sequence[jax.Array],
    exponents: Sequence[int],
    is_small: jax.Array,
    is_medium: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The right sum, and 2 to the power of what goes with it."""

    def choose(small: Any, medium: Any, large: Any) -> jax.Array:
        return jnp.where(is_small, small, jnp.where(is_medium, medium, large))

    powers = (_power(exponent, sums[0]) for exponent in exponents)
    return choose(*sums), choose(*powers).astype(sums[0].dtype)


def inverse(norm: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    # Zero is told by == and not by >, so that a NaN stays visible.
    zero = norm == 0
    ones = jnp.ones_like(norm)
    return divided(jnp.where(zero, 0.0, ones), jnp.where(zero, 1.0, norm))


def ratio(norm: jax.Array, other: jax.Array, size: Any) -> jax.Array:
    """‖u‖/‖v‖, exactly 1 where they are equal, and where one of them is 0.

    ‖v‖ counts as 0 where rounding alone may have left so much.

    Args:
      norm: ‖u‖.
      other: ‖v‖.
      size: of what v is a sum of, or 0 where it is not known.
    """
    return _ratio(norm, other, size, 1.0)


def marked_ratio(norm: jax.Array, other: jax.Array, size: Any = 0.0) -> jax.Array:
    """As `ratio`, but -1 where one of the norms is 0."""
    return _ratio(norm, other, size, -1.0)


def _ratio(norm: jax.Array, other: jax.Array, size: Any, where_zero: float) -> Any:
    size = jnp.asarray(size, other.dtype)
    noise = _ULPS * jnp.finfo(other.dtype).eps * size
    # An infinite norm stays visible.
    zero = ((norm == 0) | (other <= noise)) & (norm != jnp.inf)
    first = jnp.where(zero, where_zero, norm)
    return divided(first, jnp.where(zero, 1.0, other))


@jax.custom_jvp
def divided(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, whose derivative needs no 1 / y², which is infinite for a small y."""
    # A compiler may divide by a product with an inverse. An infinite y stays visible.
    equal = (x == y) & (jnp.abs(y) < jnp.inf)
    return jnp.where(equal, 1.0, x) / jnp.where(equal, 1.0, y)


@divided.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (_, y), (dx, dy) = primals, tangents
    quotient = divided(*primals)
    return quotient, (dx - quotient * dy) / y
