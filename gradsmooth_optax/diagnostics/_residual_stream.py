"""How straight the states of a residual stream run through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import widened
from gradsmooth_optax._checks import shown
from gradsmooth_optax._coupling.norms import cosine, inverse, root


def line_shape_score(
    states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
) -> jax.Array:
    """How far the path of the states through the layers is from a straight line.

        L / ‖Σ_l (x_{l+1} - x_l) / ‖x_{l+1} - x_l‖‖

    with x_0 .. x_L the states before, between and after L blocks: 1 for a straight
    line, larger the more the path bends, about √L for increments in random directions,
    and inf where their directions cancel up to rounding. Computed for each position and
    averaged.

    An increment of norm 0 has no direction: it is left out of the sum and of L. A
    position whose state never changes is left out of the average; where none ever
    changes, as at an initialization that makes all blocks the identity, the score is
    NaN. Arithmetic is in float32 (float64 for float64 states).

    Args:
      states: array (L+1, ..., d), or a sequence of L+1 arrays (..., d), with L ≥ 1.
        Norms are over the last axis; the axes between are positions.

    Returns:
      A scalar.

    Raises:
      TypeError: for what are no arrays.
      ValueError: for states of other shapes.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> straight = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
      >>> float(gs.diagnostics.line_shape_score(straight))
      1.0
      >>> corner = [jnp.array(x) for x in ([0.0, 0.0], [5.0, 0.0], [5.0, 1.0])]
      >>> round(float(gs.diagnostics.line_shape_score(corner)), 4)  # 2 / √2
      1.4142

    References:
      arXiv 2606.30813, for the alignment of residual increments.
    """
    increments = _increments("line_shape_score", states, at_least=2)
    squares = _inner_product(increments, increments)
    inverses = inverse(root(squares))[..., None].astype(increments.dtype)
    directions = increments * inverses
    total = jnp.sum(directions, axis=0)
    square = _inner_product(total, total)
    num_moves = jnp.sum(squares != 0, axis=0).astype(square.dtype)
    # What rounding leaves of directions that cancel depends on the compiler.
    cancel = square <= (num_moves * jnp.finfo(square.dtype).eps) ** 2
    # Replaced before the root, whose derivative at 0 would make gradients NaN.
    length = jnp.sqrt(jnp.where(cancel, 1.0, square))
    score = jnp.where(cancel, jnp.inf, num_moves / length)
    moves = num_moves > 0
    num_moving = jnp.sum(moves).astype(score.dtype)
    return jnp.sum(jnp.where(moves, score, 0.0)) / num_moving


def residual_alignment(
    states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
) -> jax.Array:
    """Mean cosine of what neighboring blocks add to the residual stream.

        mean over l and positions of  cos(x_{l+1} - x_l, x_{l+2} - x_{l+1})

    with x_0 .. x_L the states before, between and after L blocks: 1 where all blocks
    add in one direction, 0 where neighbors add in orthogonal ones. An increment of
    norm 0 has the cosine 0 with its neighbors. Arithmetic is in float32 (float64 for
    float64 states).

    Args:
      states: array (L+1, ..., d), or a sequence of L+1 arrays (..., d), with L ≥ 2.
        Norms are over the last axis; the axes between are positions.

    Returns:
      A scalar in [-1, 1].

    Raises:
      TypeError: for what are no arrays.
      ValueError: for states of other shapes.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> states = jnp.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
      >>> float(gs.diagnostics.residual_alignment(states))  # of 1 and 0
      0.5

    References:
      arXiv 2606.30813, section 4.
    """
    increments = _increments("residual_alignment", states, at_least=3)
    squares = _inner_product(increments, increments)
    dots = _inner_product(increments[:-1], increments[1:])
    return jnp.mean(cosine(dots, squares[:-1], squares[1:]))


def _inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Re⟨x, y⟩ over the last axis."""
    product = x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y
    return jnp.sum(product, axis=-1)


def _array(function: str, states: Any) -> jax.Array:
    try:
        return jnp.asarray(states)
    except (OverflowError, TypeError, ValueError):
        raise TypeError(
            f"`states` must be an array or a sequence of arrays, but there is "
            f"{shown(states)}. Write `{function}([x_0, ..., x_L])` with the residual "
            f"stream before each block and after the last."
        ) from None


def _increments(
    function: str,
    states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike],
    at_least: int,
) -> jax.Array:
    """x_{l+1} - x_l, (L, ..., d), in the dtype of the arithmetic."""
    if isinstance(states, list | tuple):
        arrays = [_array(function, x) for x in states]
        shapes = [x.shape for x in arrays]
        if len(set(shapes)) > 1:
            odd = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
            raise ValueError(
                f"`states` must be of one shape, but states[0] has shape {shapes[0]} "
                f"and states[{odd}] has {shapes[odd]}. Probably it is what comes after "
                f"the head, or before the embedding. Write `{function}([x_0, ..., "
                f"x_L])` with the residual stream before each block and after the last."
            )
        found = f"a sequence of {len(arrays)} of shape {shapes[0] if shapes else ()}"
        x = jnp.stack(arrays) if arrays else jnp.zeros((0, 0))
    else:
        x = _array(function, states)
        found = f"an array of shape {x.shape}"
    if x.ndim < 2:
        raise ValueError(
            f"`states` must have the axes (L+1, ..., d), but is {found}: one number "
            f"for each state. Probably the axis of the features was summed or indexed "
            f"away, or it is one state alone. Write `{function}(jnp.stack([x_0, ..., "
            f"x_L]))` with x_l of shape (..., d)."
        )
    if x.shape[0] < at_least or 0 in x.shape:
        raise ValueError(
            f"`states` must hold at least {at_least} states, none of them empty, but "
            f"is {found}. The first axis is over layers; probably it is on another "
            f"axis, or the state before the first block is missing. Write "
            f"`{function}(jnp.moveaxis(states, layer_axis, 0))`, or "
            f"`{function}([x_0, ..., x_L])` with all of them."
        )
    if not jnp.issubdtype(x.dtype, np.inexact):
        x = x.astype(jnp.float32)
    x = widened(x)  # before the difference
    return x[1:] - x[:-1]
