"""Controls: was it the coupling of neighbors, or only a smaller step?

Use them in the place of an operator, in a run with everything else equal:

>>> import gradsmooth_optax as gs
>>> op = gs.window(0.2)
>>> arms = {
...     "base": None,
...     "smoothed": op,
...     "norm matched": gs.controls.norm_matched(op),
...     "shuffled": gs.controls.shuffled(op, seed=0),
... }

If "norm matched" does as well as "smoothed", a smaller step did it; if "shuffled" does,
coupling did it, but hardly that of neighbors.

- `norm_matched`: each layer's own update at the norm that an operator would give it
- `shuffled`: an operator over the layers in a random order
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gradsmooth_optax._checks import Matrix
from gradsmooth_optax._operators.composed import with_matrix
from gradsmooth_optax._operators.operator import Operator
from gradsmooth_optax._operators.smoothers import as_operator

if TYPE_CHECKING:
    from gradsmooth_optax._coupling.layers import Layers


def norm_matched(operator: Any) -> Operator:
    """Each layer's own update at the norm that `operator` would give it.

        u'_l = u_l ‖(S u)_l‖ / ‖u_l‖

    without any coupling. Norms are of one parameter of a layer or of its block, as the
    `norm_scope` of the transformation says. An update of norm 0 stays 0. Use it with
    the variant "standard": the others keep the norms anyway.

    Args:
      operator: an operator.

    Returns:
      An operator for `smooth_over_depth`, without a matrix.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = [jnp.array([4.0, 0.0]), jnp.array([0.0, 4.0])]
      >>> op = gs.controls.norm_matched(gs.mean_over_depth())
      >>> tx = gs.smooth_over_depth(gs.unrolled(), op)
      >>> matched, _ = tx.update(updates, tx.init(updates))
      >>> [u.round(3).tolist() for u in matched]  # of norm √8, as the mean (2, 2)
      [[2.828000068664551, 0.0], [0.0, 2.828000068664551]]
    """
    return NormMatched(as_operator(operator))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NormMatched(Operator):
    made_by: ClassVar[str] = "controls.norm_matched"
    strengths: ClassVar[tuple[str, ...]] = ("operator",)

    operator: Operator

    def couple(self, layers: Layers) -> Layers:
        return layers.with_norms_of(self.operator.couple(layers))

    def radius(self, num_layers: int) -> int:
        return self.operator.radius(num_layers)

    @property
    def scales_single_layers(self) -> bool:
        return self.operator.scales_single_layers

    @property
    def is_identity(self) -> bool:
        return self.operator.is_identity


def shuffled(operator: Any, seed: int) -> Operator:
    """`operator` over the layers in a random order, the same at every step.

    S' = Pᵀ S P with P a permutation of the run's layers that is drawn once from `seed`
    and the number of layers: as much coupling, but between layers at random. Drawn from
    the permutations after which no neighbors are neighbors still; three layers have
    none, and keep one of their two pairs, and two layers are not shuffled at all.

    Args:
      operator: an operator with a matrix.
      seed: an int ≥ 0.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError: at construction, for an operator without a matrix or a seed of the
        wrong kind.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.controls.shuffled(gs.window(0.2), seed=0).matrix(3)
      array([[0.8, 0.1, 0.1],
             [0.1, 0.9, 0. ],
             [0.1, 0. , 0.9]])
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise TypeError(f"`seed` of `shuffled` must be an int >= 0, but is {seed!r}.")
    return Shuffled(with_matrix(operator, "shuffled"), int(seed))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Shuffled(Operator):
    made_by: ClassVar[str] = "controls.shuffled"
    strengths: ClassVar[tuple[str, ...]] = ("operator",)

    operator: Operator
    seed: int

    def matrix(self, num_layers: int) -> Matrix:
        rng = np.random.default_rng([self.seed, num_layers])
        order = rng.permutation(num_layers)
        # Where no order parts all neighbors, one that parts the most.
        most_kept = 1 if num_layers in (2, 3) else 0
        while np.sum(np.abs(np.diff(order)) == 1) > most_kept:
            order = rng.permutation(num_layers)
        return self.operator.matrix(num_layers)[np.ix_(order, order)]

    @property
    def is_identity(self) -> bool:
        return self.operator.is_identity
