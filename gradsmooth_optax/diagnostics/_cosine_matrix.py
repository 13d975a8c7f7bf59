"""The cosines between the updates of all layers of a stack."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradsmooth_optax._arrays import num_bits, whole_along, widened
from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._coupling.norms import cosine
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Group
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax.diagnostics._statistics import texts_of


def cosine_matrix(
    updates: Any, depth: DepthLike, *, strict: bool = True
) -> dict[str, jax.Array]:
    """Cosines between the updates of every two layers of a stack.

    With u_l the update of the block of layer l, as in `depth_statistics`:

        C[l, k] = Re⟨u_l, u_k⟩ / ‖u_l‖ ‖u_k‖

    over the parameters that both layers have; 0 where one of the norms is 0, so that
    the diagonal is 1 wherever an update is not 0. What is beside it are the `cosines`
    of `depth_statistics`, if all layers have the same parameters and no gap. Works
    under `jax.jit` and `jax.vmap`; needs memory for about one copy of the updates of a
    role in the dtype of the arithmetic (on every device, where mesh axes are Explicit),
    and L² products of layers.

    Args:
      updates: tree of updates.
      depth: where depth is, as in `smooth_over_depth`.
      strict: as in `smooth_over_depth`. False also permits that nothing matches.

    Returns:
      {stack: (L, L)}, layers in depth order, without those that have no neighbor. A
      stack whose name is not a string is under its `repr`.

    Raises:
      TypeError, ValueError: as `depth_statistics`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])}}
      >>> cosines = gs.diagnostics.cosine_matrix(updates, gs.scanned("blocks/"))
      >>> cosines["blocks"].tolist()
      [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    spec = as_spec(depth)
    check_flag("strict", strict)
    grouping = coupled_groups(spec, updates, strict)
    stacks: dict[Hashable, list[Group]] = {}
    for group in grouping.coupled:
        stacks.setdefault(group.stack, []).append(group)
    texts = texts_of("stacks", stacks)
    return {
        texts[stack]: _cosines(groups, grouping.leaves)
        for stack, groups in stacks.items()
    }


def _cosines(groups: Sequence[Group], leaves: Sequence[Any]) -> jax.Array:
    """The (L, L) cosines of one stack."""
    layers_of = [coupled_layers(group) for group in groups]
    layers = sorted(set().union(*layers_of))
    dtype = max(
        (widened(jnp.empty(0, g.dtype)).real.dtype for g in groups), key=num_bits
    )
    shape = (len(layers), len(layers))
    products = jnp.zeros(shape, dtype)
    squares = jnp.zeros(shape, dtype)  # of l, over what k has as well
    for group, group_layers in zip(groups, layers_of, strict=True):
        # Gathered and not scattered: jax 0.7 has no rule for that on Explicit axes.
        place = {layer: i for i, layer in enumerate(group_layers)}
        index = np.array([place.get(layer, 0) for layer in layers])
        has = np.isin(layers, group_layers)
        both = np.outer(has, has)
        rows = rows_of(group, leaves)
        gram = layer_products(rows, rows).astype(dtype)[np.ix_(index, index)]
        products += jnp.where(both, gram, jnp.zeros_like(gram))
        layer_squares = jnp.broadcast_to(jnp.diagonal(gram)[:, None], shape)
        squares += jnp.where(both, layer_squares, jnp.zeros_like(gram))
    return cosine(products, squares, squares.T)


def coupled_layers(group: Group) -> list[int]:
    """The numbers of the layers that have a neighbor, in depth order."""
    return np.array(group.layers)[group.run_lengths > 1].tolist()


def rows_of(group: Group, leaves: Any) -> jax.Array:
    """All layers of a group with a neighbor, in depth order: (L, ...), widened."""
    slots = []
    for member in group.members:
        x = widened(jnp.asarray(leaves[member.leaf]))
        x = jnp.moveaxis(
            whole_along(x, tuple(range(x.ndim))), member.axes, range(member.layers.ndim)
        )
        slots.append(x.reshape(member.layers.size, *group.shape))
    u = jnp.concatenate(slots)
    ranks = np.concatenate([ranks.ravel() for ranks in group.ranks])
    order = np.argsort(ranks)[group.run_lengths > 1]
    if np.array_equal(order, np.arange(len(u))):
        return u
    return u[order]


def layer_products(u: jax.Array, other: jax.Array) -> jax.Array:
    """Re⟨u_l, v_k⟩ of the layers of two arrays (L, ...)."""
    axes = tuple(range(1, u.ndim))
    return jnp.tensordot(
        u.conj(), other, (axes, axes), precision=lax.Precision.HIGHEST
    ).real
