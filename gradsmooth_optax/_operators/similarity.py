"""Coupling by similarity: an operator that looks at the updates, and how it acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, get_args

import jax
import jax.numpy as jnp
import optax

from gradsmooth_optax._arrays import in_dtype
from gradsmooth_optax._checks import check_choice, strength_in
from gradsmooth_optax._coupling.neighbors import has_neighbor, scaled_arrays
from gradsmooth_optax._coupling.norms import (
    Arrays,
    Names,
    NormScope,
    inner_products,
    inverse_norm,
    summed_by_name,
)
from gradsmooth_optax._coupling.pairs import (
    Scales,
    at_distance,
    coupled_by_pairs,
    next_layers,
)
from gradsmooth_optax._depth.groups import Group
from gradsmooth_optax._operators.operator import Matrix, Operator, resolved


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
    the updates, so it has no matrix, and cannot be composed.

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

    @property
    def is_linear(self) -> bool:
        return False

    def matrix(self, num_layers: int) -> Matrix:
        raise TypeError(
            "`similarity_window` has no matrix: its weights depend on the updates. "
            "`window(alpha)` is what it does to equal updates."
        )

    @property
    def is_identity(self) -> bool:
        return not isinstance(self.alpha, jax.Array) and self.alpha == 0


def couple_by_similarity(
    operator: SimilarityWindow,
    groups: Sequence[Group],
    xs: Arrays,
    scales: Scales,
) -> Arrays:
    """u + Σ_k w_lk (u_k - u_l) of all groups, or that of scale · u."""
    weights = _weights_to_next(operator, groups, xs, scales)
    return coupled_by_pairs(groups, xs, scales, [weights])


def _weights_to_next(
    operator: SimilarityWindow, groups: Sequence[Group], xs: Arrays, scales: Scales
) -> Arrays:
    """The weight between each slot and the next layer, 0 where there is none."""
    us, others = scaled_arrays(xs, scales), next_layers(groups, xs, scales)
    dots = inner_products(groups, us, others)
    squares = inner_products(groups, us, us)
    of_next = at_distance(groups, squares, 1)
    if operator.norm_scope == "block":
        pairs = [
            [_pairs(group, m) for m in range(len(group.members))] for group in groups
        ]
        squares, dots, of_next = (
            summed_by_name(groups, arrays, pairs) for arrays in (squares, dots, of_next)
        )
    half, sharpness = resolved(operator.alpha) / 2, resolved(operator.sharpness)

    def weight(dot: jax.Array, square: jax.Array, square_of_next: jax.Array):
        cosine = dot * inverse_norm(square) * inverse_norm(square_of_next)
        agrees = cosine > 0
        # Replaced before the power, whose derivative at 0 would make gradients NaN.
        cosine = jnp.where(agrees, jnp.minimum(cosine, 1.0), 1.0)
        power = cosine ** in_dtype(sharpness, cosine.dtype)
        return jnp.where(agrees, in_dtype(half, cosine.dtype) * power, 0.0)

    return [
        [weight(*of_member) for of_member in zip(*of_group, strict=True)]
        for of_group in zip(dots, squares, of_next, strict=True)
    ]


def _pairs(group: Group, m: int) -> Names:
    """(layer, next layer) of every slot of member m, None where there is no next."""
    whole, size = group.whole, group.members[m].layers.size
    names: list[tuple[int, int] | None] = [None] * size
    width = 0 if group.stages is None else group.stages.width
    for stage, i in enumerate(group.of_stages(m)):
        has_next = has_neighbor(whole, i, 1).ravel()
        for slot, rank in enumerate(whole.ranks[i].ravel()):
            if has_next[slot] and names[slot] is None:
                here, following = whole.layers[rank], whole.layers[rank + 1]
                # The same in every stage in which there is a next.
                names[slot] = here - stage * width, following - stage * width
    return tuple(names)
