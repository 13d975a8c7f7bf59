"""What the wrappers that learn an operator have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._arrays import in_dtype, inexact_dtype
from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._coupling.norms import Arrays
from gradsmooth_optax._depth.groups import Group, Grouping

Direction: TypeAlias = Literal["ascent", "descent"]
Signal: TypeAlias = Literal["coupling", "full"]


class Cosine(NamedTuple):
    """Cosines, and where there is one: elsewhere nothing can be learned."""

    value: jax.Array
    known: jax.Array


def followed(
    value: jax.Array,
    mean: jax.Array,
    cosine: Cosine,
    sign: float,
    decay: Any,
    learning_rate: Any,
    highest: Any,
) -> tuple[jax.Array, jax.Array]:
    """The value after a step along the running mean of ± the cosine, and that mean.

    Both stay as they are where there is no cosine.
    """
    # In the dtype of the state, whatever that of the settings and of the updates is.
    signal = sign * cosine.value.astype(mean.dtype)
    decay = in_dtype(decay, mean.dtype)
    learning_rate, highest = (
        in_dtype(x, value.dtype) for x in (learning_rate, highest)
    )
    new_mean = decay * mean + (1 - decay) * signal
    new = jnp.clip(value + learning_rate * new_mean, 0.0, highest)
    return jnp.where(cosine.known, new, value), jnp.where(cosine.known, new_mean, mean)


def cosine_of(product: jax.Array, of_x: jax.Array, of_y: jax.Array) -> Cosine:
    """⟨x, y⟩ / ‖x‖‖y‖ from the squared norms, known if both are finite and not 0."""
    known = (of_x > 0) & (of_y > 0) & jnp.isfinite(of_x) & jnp.isfinite(of_y)
    # A division comes last, here and below: see `_norms.inverse_norm`. Not by NaN where
    # nothing is known, which would stop `jax.debug_nans`.
    norms = jnp.sqrt(of_x) * jnp.sqrt(of_y)
    cosine = product / jnp.where(known, norms, jnp.inf)
    return Cosine(cosine, known & jnp.isfinite(cosine))


def without_rounding(square: jax.Array, whole: jax.Array) -> jax.Array:
    """The squared norm of a component of v, and 0 where rounding made it.

    Where v lies along y, what is left of it after a projection is no direction.
    """
    return jnp.where(square <= 1e-6 * whole, jnp.zeros_like(square), square)


def share_of(product: jax.Array, square: jax.Array) -> jax.Array:
    """⟨v, y⟩ / ⟨y, y⟩, and 0 where y is 0."""
    zero = square == 0
    return product / jnp.where(zero, jnp.inf, square)


def filled(shapes: dict[str, tuple[int, ...]], value: Any, grouping: Grouping) -> Any:
    """A float32 array for every unit; a scalar in their place for a leafless tree.

    `optax.tree_map_params` compares the state with that of a leafless placeholder, in
    which one leaf may stand for all units.
    """
    if not grouping.paths:
        return jnp.full((), value, jnp.float32)
    return {unit: jnp.full(shape, value, jnp.float32) for unit, shape in shapes.items()}


def zeros_of(groups: Sequence[Group], leaves: Sequence[Any], dtype: Any) -> Arrays:
    """Zeros for the leaves of every group, in `dtype` if that can hold them."""

    def zeros(leaf: Any) -> jax.Array:
        own = inexact_dtype(leaf)
        loses = jnp.issubdtype(own, jnp.complexfloating) and not jnp.issubdtype(
            dtype or own, jnp.complexfloating
        )
        return jnp.zeros_like(leaf, own if loses else dtype)

    return [[zeros(leaves[m.leaf]) for m in group.members] for group in groups]


def tree_of(grouping: Grouping, groups: Sequence[Group], arrays: Arrays) -> Any:
    """The arrays in the places of their leaves, and `MaskedNode` in the others."""
    leaves: list[Any] = [optax.MaskedNode()] * len(grouping.leaves)
    for group, of_group in zip(groups, arrays, strict=True):
        for member, array in zip(group.members, of_group, strict=True):
            leaves[member.leaf] = array
    return jax.tree.unflatten(grouping.treedef, leaves)


def arrays_in(tree: Any, groups: Sequence[Group]) -> Arrays:
    """What `tree_of` put into a tree."""
    leaves = jax.tree.leaves(tree)
    places = sorted(member.leaf for group in groups for member in group.members)
    if len(leaves) != len(places):
        raise ValueError(
            f"the state holds {len(leaves)} leaves of the last update, "
            f"but {len(places)} leaves are coupled now. It was probably made for other "
            f"parameters or another `depth`: make it anew by `init(params)`."
        )
    at = dict(zip(places, leaves, strict=True))
    return [[at[member.leaf] for member in group.members] for group in groups]


def check_settings(strict: Any, dtype: Any) -> None:
    """Raises for a `strict` that is no bool and a `dtype` that is no inexact one."""
    check_flag("strict", strict)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`dtype` must be a floating dtype or None, but is {dtype!r}.")


def check_units(shapes: dict[str, tuple[int, ...]], learned: Any) -> None:
    """Raises if a state holds other units than the updates have."""
    found = {unit: np.shape(value) for unit, value in learned.items()}
    if found != shapes:
        raise ValueError(
            f"the state was learned for {found}, but the updates have {shapes}: it was "
            f"probably made with other settings (`per`, `radius`) or another `depth`. "
            f"Make it anew by `init(params)`."
        )
