"""Ratios of norms and cosines, from squared norms.

A division or a root comes last: XLA:CPU computes an expensive operation once, but
copies a cheap one, with all that it needs, into every kernel that reads it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def inverse_norm(squared: jax.Array) -> jax.Array:
    """1/‖u‖, and 0 where ‖u‖ is 0."""
    zero = squared == 0
    norm = jnp.sqrt(jnp.where(zero, 1.0, squared))
    return 1 / jnp.where(zero, jnp.inf, norm)


def cosine(dot: jax.Array, squared: jax.Array, other: jax.Array) -> jax.Array:
    """⟨u, v⟩ / ‖u‖‖v‖ from the squared norms, and 0 where one of them is 0."""
    zero, squared, other = _without_zeros(squared, other)
    norms = jnp.sqrt(squared) * jnp.sqrt(other)
    return jnp.clip(dot / jnp.where(zero, jnp.inf, norms), -1.0, 1.0)


def norm_ratio(before: jax.Array, after: jax.Array) -> jax.Array:
    """The ratio of the norms, given their squares; 1 where one of them is 0."""
    _, before, after = _without_zeros(before, after)
    # The root of the ratio is exactly 1 for equal norms. The ratio of roots is not,
    # where the compiler makes it a product with a reciprocal root.
    return jnp.sqrt(before / after)


def marked_norm_ratio(before: jax.Array, after: jax.Array) -> jax.Array:
    """The ratio of the norms, given their squares; -1 where one of them is 0."""
    zero, before, after = _without_zeros(before, after)
    return 1 / jnp.where(zero, -1.0, jnp.sqrt(after / before))


def marked_ratio_to_directions(before: jax.Array, after: jax.Array) -> jax.Array:
    """‖u‖ / ‖S û‖ with û = u/‖u‖, given their squares; -1 where one of them is 0.

    But NaN where ‖u‖ is infinite, which makes û 0 and maybe ‖S û‖. And a ratio of
    roots: that of squares is no normal number where ‖u‖² is nearly infinite.
    """
    lost = (after == 0) & jnp.isinf(before)
    zero, before, after = _without_zeros(before, after)
    inverse = jnp.where(zero, -1.0, jnp.sqrt(after) / jnp.sqrt(before))
    return 1 / jnp.where(lost, jnp.nan, inverse)


def _without_zeros(
    before: jax.Array, after: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where one of them is 0, and both with a 1 there.

    Zero is told by == and not by >, so that a NaN stays visible. Replaced before the
    root, whose derivative at 0 would make gradients NaN.
    """
    zero = (before == 0) | (after == 0)
    return zero, jnp.where(zero, 1.0, before), jnp.where(zero, 1.0, after)
