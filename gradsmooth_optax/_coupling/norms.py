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

# Of layers from this size on XLA:CPU sums this many neighbors at a time, in one loop
# for the three sums. It is as fast as one plain sum, but takes longer to compile.
_LARGE, _CHAIN = 2**14, 16

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


def sums(x: jax.Array, y: jax.Array, axes: Sequence[int], keepdims: bool) -> Sums:
    """Re⟨x, y⟩ over these axes at three scales; those that are too large are cut.

    Args:
      x: of which layers are along the other axes.
      y: of the shape of x.
      axes: that are summed over.
      keepdims: whether they stay, with size 1.
    """
    return _sums(tuple(axes), keepdims, x, None if y is x else y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(axes: tuple[int, ...], keepdims: bool, x: Any, y: Any) -> Sums:
    y = x if y is None else y
    shape = x.shape
    size = math.prod(shape[axis] for axis in axes)
    if size <= 1:  # XLA would square factors of single numbers, to 0 or infinity
        return Sums(*_summed(axes, keepdims, _products(_cut, x, y)))
    products = _products(_scaled, x, y)
    chunked = [a for a in axes if shape[a] % _CHAIN == 0 and not is_split(x, a)]
    if size >= _LARGE and chunked:
        totals = lax.platform_dependent(
            *products,
            cpu=lambda *of: _summed(axes, keepdims, _in_chains(chunked[-1], of)),
            default=lambda *of: _summed(axes, keepdims, of),
        )
    else:
        totals = _summed(axes, keepdims, products)
    limit = _power(120, x)
    totals = [jnp.clip(total, -limit, limit) for total in totals]
    if y is not x:  # infinities of both signs make a NaN, which is not chosen
        totals = [jnp.where(jnp.isnan(total), 0.0, total) for total in totals]
    return Sums(*totals)


@_sums.defjvp
def _(axes: tuple[int, ...], keepdims: bool, primals: Any, tangents: Any) -> Any:
    def cut_sums(*xs: Any) -> Sums:
        products = _products(_cut, xs[0], xs[-1])
        return Sums(*_summed(axes, keepdims, products))

    xs, dxs = ([x for x in of if x is not None] for of in (primals, tangents))
    _, tangent = jax.jvp(cut_sums, xs, dxs)
    return _sums(axes, keepdims, *primals), tangent


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


def _products(at_scales: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    if jnp.iscomplexobj(x):
        of_parts = (
            _products(at_scales, *xy) for xy in ((x.real, y.real), (x.imag, y.imag))
        )
        return tuple(map(operator.add, *of_parts))
    return tuple(map(operator.mul, at_scales(x), at_scales(y)))


def _summed(axes: tuple[int, ...], keepdims: bool, xs: Sequence[jax.Array]) -> list:
    return [jnp.sum(x, axis=axes, keepdims=keepdims) for x in xs]


def _in_chains(axis: int, xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums of a few neighbors along one axis. More would lose digits."""
    before, after = xs[0].shape[:axis], xs[0].shape[axis + 1 :]
    shape = (*before, xs[0].shape[axis] // _CHAIN, _CHAIN, *after)
    zeros = (jnp.zeros((), xs[0].dtype),) * len(xs)
    chains = tuple(x.reshape(shape) for x in xs)
    return lax.reduce(
        chains, zeros, lambda a, b: tuple(map(operator.add, a, b)), (axis + 1,)
    )


# -- What follows from them ------------------------------------------------------------


def squares(norm: jax.Array) -> Sums:
    """‖u‖² at three scales, to be summed over the parts of a vector."""
    return Sums(*_products(_cut, norm, norm))


@jax.jit
def root(small: jax.Array, medium: jax.Array, large: jax.Array) -> jax.Array:
    """‖u‖, from the sums of squares."""
    # `~ >=` and not `<`, so that a NaN stays visible.
    is_small = ~(small >= _power(80, small))
    chosen, scale = _chosen(
        Sums(small, medium, large), is_small, ~(medium >= _power(96, medium))
    )
    zero = chosen == 0
    # Replaced before the root, whose derivative at 0 would make gradients NaN.
    norm = jnp.sqrt(jnp.where(zero, 1.0, chosen)) * (1 / scale)
    return jnp.where(zero, 0.0, norm)


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
    dot, scale = _chosen(Sums(*dots), *are_below)
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
    sums: Sums, is_small: jax.Array, is_medium: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The right sum, and the scale of the numbers in it."""

    def choose(small: Any, medium: Any, large: Any) -> jax.Array:
        return jnp.where(is_small, small, jnp.where(is_medium, medium, large))

    one = jnp.ones_like(sums.medium)
    up, down = (one * _power(exponent, one) for exponent in (80, -80))
    return choose(*sums), choose(up, one, down)


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
    zero = ((norm == 0) | (other <= noise)) & ~jnp.isinf(norm)
    first = jnp.where(zero, where_zero, norm)
    return divided(first, jnp.where(zero, 1.0, other))


@jax.custom_jvp
def divided(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, whose derivative needs no 1 / y², which is infinite for a small y."""
    # A compiler may divide by a product with an inverse.
    return jnp.where((x == y) & jnp.isfinite(y), 1.0, x / y)


@divided.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (_, y), (dx, dy) = primals, tangents
    quotient = divided(*primals)
    return quotient, (dx - quotient * dy) / y
