"""Coupling by similarity: an operator that looks at the updates, and how it acts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, get_args

import jax
import jax.numpy as jnp
import optax

from gradsmooth_optax._arrays import in_dtype
from gradsmooth_optax._checks import NormScope, check_choice, strength_in
from gradsmooth_optax._operators.operator import Operator, resolved

if TYPE_CHECKING:
    from gradsmooth_optax._coupling.layers import Layers


def similarity_window(
    alpha: optax.ScalarOrSchedule,
    norm_scope: NormScope = "block",
    sharpness: optax.ScalarOrSchedule = 1.0,
) -> Operator:
    """A window that couples two neighbors the more, the more their updates agree.

        u'_l = u_l + Σ_k w_lk (u_k - u_l),  w_lk = α/2 · max(0, cos(u_l, u_k))^sharpness

    over the neighbors k = l-1 and l+1. The weights are symmetric and leave 1 - Σ_k w_lk
    to the layer itself, so the rows of S sum to 1; updates that point apart, and those
    of norm 0, are not coupled. For equal updates it is `window(alpha)`. It depends on
    the updates, so it has no matrix.

    Args:
      alpha: scalar in [0, 1] or a schedule of it.
      norm_scope: whether the cosine is of one "param" of two layers, or of their whole
        "block": of all parameters in which they are neighbors.
      sharpness: scalar ≥ 0 or a schedule; larger values couple similar updates only.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for an argument of the wrong kind or out
        of range.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = [jnp.array(u) for u in ([2.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
      >>> tx = gs.smooth_over_depth(gs.unrolled(), gs.similarity_window(0.5))
      >>> smoothed, _ = tx.update(updates, tx.init(updates))
      >>> [u.tolist() for u in smoothed]  # the third is orthogonal to the second
      [[1.75, 0.0], [1.25, 0.0], [0.0, 1.0]]

    References:
      arXiv 2606.30813 names similarity-based coupling as open; this form is ours.
    """
    return SimilarityWindow(alpha, norm_scope, sharpness)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SimilarityWindow(Operator):
    made_by: ClassVar[str] = "similarity_window"
    strengths: ClassVar[tuple[str, ...]] = ("alpha", "sharpness")

    alpha: optax.ScalarOrSchedule
    norm_scope: NormScope = "block"
    sharpness: optax.ScalarOrSchedule = 1.0

    def __post_init__(self):
        object.__setattr__(self, "alpha", strength_in("alpha", self.alpha, high=1.0))
        sharpness = strength_in("sharpness", self.sharpness)
        object.__setattr__(self, "sharpness", sharpness)
        check_choice("norm_scope", self.norm_scope, get_args(NormScope))

    def couple(self, layers: Layers) -> Layers:
        half, sharpness = resolved(self.alpha) / 2, resolved(self.sharpness)

        def weight(cosine: jax.Array) -> jax.Array:
            agrees = cosine > 0
            # Replaced before the power, whose derivative at 0 would make gradients NaN.
            positive = jnp.where(agrees, cosine, 1.0)
            power = positive ** in_dtype(sharpness, cosine.dtype)
            return jnp.where(agrees, in_dtype(half, cosine.dtype) * power, 0.0)

        before, after = layers.shifted(-1), layers.shifted(1)
        weights = layers.cosine(after, self.norm_scope).map(weight)
        # A pair's weight is held by the first of the two.
        out = layers + (after - layers).scaled(weights)
        return out + (before - layers).scaled(weights.shifted(-1))

    def radius(self, num_layers: int) -> int:
        return min(1, num_layers - 1)

    @property
    def is_identity(self) -> bool:
        return not isinstance(self.alpha, jax.Array) and self.alpha == 0
