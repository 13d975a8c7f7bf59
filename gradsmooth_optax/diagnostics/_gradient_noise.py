"""How much the updates of micro-batches differ, layer by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import inexact_dtype, widened
from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._coupling.layers import layers_of
from gradsmooth_optax._coupling.totals import Units
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.paths import MASKED, places_of, show_path
from gradsmooth_optax._depth.specs import DepthLike, as_spec


class GradientNoise(NamedTuple):
    """Noise and signal of the updates of one stack: see `gradient_noise`.

    Attributes:
      variance: (L,), over micro-batches, summed over the coordinates of each layer.
      squared_norm_of_mean: (L,), ‖mean over micro-batches‖² of each layer.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[[1.0], [2.0]], [[3.0], [2.0]]])}}
      >>> depth = gs.scanned("blocks/")
      >>> noise = gs.diagnostics.gradient_noise(updates, depth)["blocks"]
      >>> (noise.variance / noise.squared_norm_of_mean).tolist()  # of 2 layers
      [0.5, 0.0]
    """

    variance: jax.Array
    squared_norm_of_mean: jax.Array


def gradient_noise(
    per_microbatch_updates: Any,
    depth: DepthLike,
    *,
    strict: bool = True,
) -> dict[str, GradientNoise]:
    """The variance over micro-batches of the updates of every layer.

    With g_m the update of the block of a layer (all its parameters that `depth`
    matches, as one vector) by micro-batch m of M, and ḡ their mean:

        variance              Σ_m ‖g_m - ḡ‖² / (M-1)     (L,)
        squared_norm_of_mean  ‖ḡ‖²                       (L,)

    The variance is unbiased for that of one micro-batch. The squared norm is not for
    that of the expected update: it is larger by variance / M on average, so that
    `squared_norm_of_mean - variance / M` is unbiased, and can be negative. Their ratio
    is the noise-to-signal of the layer.

    Blocks are as in `depth_statistics`: what has no neighbor along depth is in none.
    Arithmetic is in float32 (float64 for float64 leaves); under `jax.jit` nothing of
    the size of all micro-batches is kept.

    Args:
      per_microbatch_updates: tree of updates with a first axis over M ≥ 2
        micro-batches in every leaf of floating or complex dtype, as
        `jax.vmap(jax.grad(loss), (None, 0))` gives.
      depth: where depth is in the updates of one micro-batch: paths, shapes and axes
        are those without the first axis.
      strict: as in `smooth_over_depth`. False also permits that nothing matches.

    Returns:
      {stack: GradientNoise}, all of arrays, layers in depth order. A stack whose name
      is not a string is under its `repr`.

    Raises:
      TypeError: for an argument of the wrong kind.
      ValueError: for leaves without an axis over two micro-batches or more, or with
        different numbers of them; for a grouping that does not fit the tree of one
        micro-batch, as `smooth_over_depth`; and for two stacks whose names read alike.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = [jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [2.0]])]  # 2 layers
      >>> noise = gs.diagnostics.gradient_noise(updates, gs.unrolled())[""]
      >>> noise.variance.tolist(), noise.squared_norm_of_mean.tolist()
      ([2.0, 0.0], [4.0, 4.0])

    References:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
      for the ratio as a noise scale.
    """
    spec = as_spec(depth)
    check_flag("strict", strict)
    num_microbatches = _num_microbatches(per_microbatch_updates)
    one = jax.tree.map(_of_one_microbatch, per_microbatch_updates)
    groups = coupled_groups(spec, one, strict).coupled
    if not groups:
        return {}
    units = Units.of(groups, "layer")

    def squared_norms(leaves: dict[int, jax.Array]) -> dict[str, jax.Array]:
        layers = layers_of(groups, leaves)
        return units.inner_products(layers, layers)

    leaves = jax.tree.leaves(per_microbatch_updates)
    positions = [m.leaf for group in groups for m in group.members]
    updates = {i: widened(jnp.asarray(leaves[i])) for i in positions}
    means = {i: jnp.mean(x, axis=0) for i, x in updates.items()}
    # From deviations, not from mean squares: those cancel where the noise is small.
    deviations = {i: x - means[i][None] for i, x in updates.items()}
    deviation_squares = jax.vmap(squared_norms)(deviations)
    mean_squares = squared_norms(means)
    return {
        stack: GradientNoise(
            variance=jnp.sum(deviation_squares[stack], axis=0) / (num_microbatches - 1),
            squared_norm_of_mean=mean_squares[stack],
        )
        for stack in units.shapes
    }


def _of_one_microbatch(leaf: Any) -> Any:
    """What a leaf is without its first axis; a leaf without axes as it is."""
    shape = np.shape(leaf)
    if not shape or not hasattr(leaf, "dtype"):
        return leaf
    return jax.ShapeDtypeStruct(shape[1:], leaf.dtype)


def _num_microbatches(tree: Any) -> int:
    """M, the size of the first axis of all leaves that can be updates; 0 of none."""
    first: tuple[str, int] | None = None
    for place in places_of(tree):
        if place.leaf is MASKED or inexact_dtype(place.leaf) is None:
            continue
        path, shape = show_path(place.path), np.shape(place.leaf)
        found = f"leaf {path!r} of `per_microbatch_updates` has shape {shape}"
        if not shape or shape[0] < 2:
            size = f"size {shape[0]}" if shape else "no size"
            raise ValueError(
                f"{found}: its first axis, over micro-batches, has {size}, and a "
                f"variance needs at least 2. Probably the updates are already summed "
                f"or averaged over micro-batches. {_HOW_TO_STACK}"
            )
        if first is None:
            first = path, shape[0]
        elif shape[0] != first[1]:
            raise ValueError(
                f"{found}: {shape[0]} micro-batches along its first axis, but leaf "
                f"{first[0]!r} has {first[1]}. Probably the first axis is over layers, "
                f"or the tree is a list of one tree for each. {_HOW_TO_STACK}"
            )
    return 0 if first is None else first[1]


_HOW_TO_STACK = (
    "Write `jax.vmap(jax.grad(loss), (None, 0))(params, microbatches)`, or "
    "`jax.tree.map(lambda *x: jnp.stack(x), *list_of_updates)`."
)
