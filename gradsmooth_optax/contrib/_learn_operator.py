"""`learn_operator`: a whole banded operator, learned while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._arrays import widened
from gradsmooth_optax._checks import (
    check_choice,
    number_below_one,
    number_in,
    positive_int,
    transformation,
)
from gradsmooth_optax._coupling.apply import arrays_of, rounded, with_neighbors
from gradsmooth_optax._coupling.norms import Arrays, inner_products, map_arrays
from gradsmooth_optax._coupling.pairs import at_distance, coupled_by_pairs
from gradsmooth_optax._coupling.units import Units
from gradsmooth_optax._depth.groups import Group, check_structure, group_by_depth
from gradsmooth_optax._depth.reading.doubts import warn_of_suspicions
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax.contrib._learning import (
    Cosine,
    Direction,
    Signal,
    arrays_in,
    check_settings,
    check_units,
    cosine_of,
    filled,
    followed,
    share_of,
    tree_of,
    without_rounding,
    zeros_of,
)


class LearnOperatorState(NamedTuple):
    """State of `learn_operator`.

    Attributes:
      weights: {stack: (radius, L) float32}: at [d-1, l] the weight between the l-th
        layer of the stack and the layer d after it; not used where there is none.
      signal: {stack: running means of the cosines that the weights follow}.
      update: a tree as the parameters, with the last update of `inner`, and
        `optax.MaskedNode()` where nothing is coupled.
      inner_state: state of the wrapped transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.contrib.learn_operator(optax.scale_by_adam(), depth, alpha=0.2)
      >>> state = tx.init({"blocks": {"w": jnp.ones((3, 2))}})
      >>> state.matrix("blocks").round(3)
      array([[0.9, 0.1, 0. ],
             [0.1, 0.8, 0.1],
             [0. , 0.1, 0.9]])
    """

    weights: dict[str, jax.Array]
    signal: dict[str, jax.Array]
    update: Any
    inner_state: optax.OptState

    def matrix(self, stack: str) -> np.ndarray:
        """S of shape (L, L) of a stack whose layers are without gaps and not ranked."""
        if stack not in self.weights:
            raise KeyError(f"{stack!r} is none of the stacks {list(self.weights)}")
        weights = np.asarray(self.weights[stack], np.float64)
        num_layers = weights.shape[1]
        matrix = np.eye(num_layers)
        for distance, row in enumerate(weights, start=1):
            for layer in range(num_layers - distance):
                pair = [layer, layer + distance]
                matrix[np.ix_(pair, pair)] += row[layer] * np.array([[-1, 1], [1, -1]])
        return matrix


def learn_operator(
    inner: optax.GradientTransformation,
    depth: DepthLike,
    alpha: Any = 0.1,
    *,
    radius: int | None = None,
    direction: Direction = "ascent",
    signal: Signal = "coupling",
    learning_rate: Any = 0.05,
    alpha_max: float = 0.5,
    decay: float = 0.9,
    dtype: Any = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Smooths what `inner` produces, by an operator that the gradients teach.

    S is symmetric and banded, with one weight w for each pair of layers up to `radius`
    apart in each stack,

        (S u)_l = u_l + Σ_k w_lk (u_k - u_l),   0 ≤ w_lk ≤ alpha_max / (2 radius)

    so its rows sum to 1 and its weights are ≥ 0, whatever is learned. It starts as
    `window(alpha, radius)`. Each weight follows the gradient of the next batch as α
    does in `learn_alpha`, with v = (dS/dw_lk) u, over the two layers l and k.

    It needs memory for one more copy of the coupled updates, and on trees with one leaf
    per layer many times the compile time of `smooth_over_depth`. Where roles differ in
    their neighbors (`ranked`), a pair is a layer and its next one in the role. Place it
    as `with_depth_smoothing`: around the preconditioner.

    Args:
      inner: the transformation whose updates are smoothed.
      depth: where depth is, as in `smooth_over_depth`.
      alpha: strength of the window to start from, a scalar in [0, alpha_max].
      radius: neighbors on each side, an int ≥ 1; None means 1.
      direction: as in `learn_alpha`, and so are `signal`, `learning_rate` (that of α =
        2 · radius · w), `alpha_max`, `decay` and `dtype`.
      strict: as in `smooth_over_depth`.

    Returns:
      A transformation with a `LearnOperatorState`.

    Raises:
      TypeError, ValueError: as `learn_alpha`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.contrib.learn_operator(optax.scale_by_adam(), depth, alpha=0.2)
      >>> print(tx.init(params).matrix("blocks").round(3))
      [[0.9 0.1 0. ]
       [0.1 0.8 0.1]
       [0.  0.1 0.9]]

    References:
      arXiv 2606.30813 leaves learned operators open.
    """
    inner = transformation(
        "inner", inner, "learn_operator(optax.scale_by_adam(), depth)"
    )
    spec = as_spec(depth)
    width = 1 if radius is None else positive_int("radius", radius)
    check_choice("direction", direction, get_args(Direction))
    check_choice("signal", signal, get_args(Signal))
    alpha_max = number_in("alpha_max", alpha_max, high=1.0)
    alpha = number_in("alpha", alpha, high=alpha_max)
    learning_rate = number_in("learning_rate", learning_rate)
    decay = number_below_one("decay", decay)
    check_settings(strict, dtype)
    sign = 1.0 if direction == "ascent" else -1.0

    def init_fn(params):
        grouping = group_by_depth(spec, params)
        check_structure(grouping, strict)
        if strict:
            warn_of_suspicions(grouping)
        groups = with_neighbors(grouping.groups)
        shapes = {
            stack: (width, *shape)
            for stack, shape in Units.of(groups, "layer").shapes.items()
        }
        zeros = zeros_of(groups, grouping.leaves, dtype)
        return LearnOperatorState(
            filled(shapes, alpha / (2 * width), grouping),
            filled(shapes, 0.0, grouping),
            tree_of(grouping, groups, zeros),
            inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        grouping = group_by_depth(spec, updates)
        check_structure(grouping, strict)
        groups = with_neighbors(grouping.groups)
        if not groups:
            new, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
            return new, state._replace(inner_state=inner_state)
        units = Units.of(groups, "layer")
        check_units({k: (width, *n) for k, n in units.shapes.items()}, state.weights)
        gradients = [
            [widened(x) for x in of_group]
            for of_group in arrays_of(groups, grouping.leaves)
        ]
        kept = arrays_in(state.update, groups)
        last = map_arrays(widened, kept)
        cosines = _cosines(units, gradients, last, state.weights, width, signal)
        weights, means = {}, {}
        for stack, cosine in cosines.items():
            weights[stack], means[stack] = followed(
                state.weights[stack],
                state.signal[stack],
                cosine,
                sign,
                decay,
                learning_rate / (2 * width),
                alpha_max / (2 * width),
            )

        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        grouping = group_by_depth(spec, updates)
        groups = with_neighbors(grouping.groups)
        units = Units.of(groups, "layer")
        xs = arrays_of(groups, grouping.leaves)
        us = map_arrays(widened, xs)
        ys = coupled_by_pairs(
            groups, us, [None] * len(us), _spread(units, weights, us, width)
        )
        # Copies: donated twice, a buffer shared with `inner` would be an error.
        kept = map_arrays(lambda x, old: jnp.array(x, old.dtype, copy=True), xs, kept)
        updates = grouping.replaced(rounded(groups, xs, ys))
        update = tree_of(grouping, groups, kept)
        return updates, LearnOperatorState(weights, means, update, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _spread(
    units: Units, weights: dict[str, jax.Array], like: Arrays, radius: int
) -> list[Arrays]:
    """The weights of every distance, for every slot."""
    return [
        units.spread({stack: w[d] for stack, w in weights.items()}, like)
        for d in range(radius)
    ]


def _cosines(
    units: Units,
    gradients: Arrays,
    us: Arrays,
    weights: dict[str, jax.Array],
    radius: int,
    signal: Signal,
) -> dict[str, Cosine]:
    """cos(g, (dS/dw) u) of every pair of layers, over these two; unknown without one.

    With D the difference of the second layer and the first, (dS/dw) u is Du in the
    first and -Du in the second.
    """
    groups = units.groups
    ys = coupled_by_pairs(
        groups, us, [None] * len(us), _spread(units, weights, us, radius)
    )
    rows: dict[str, list[Cosine]] = {stack: [] for stack in weights}
    for distance in range(1, radius + 1):
        of_u, of_g, of_y = (
            _difference(groups, arrays, distance) for arrays in (us, gradients, ys)
        )
        products, squares, along_y = (
            units.pair_totals(inner_products(groups, of_u, other), distance)
            for other in (of_g, of_u, of_y)
        )
        gg, yy, gy = (
            _over_both(units, inner_products(groups, *two), distance)
            for two in ((gradients, gradients), (ys, ys), (gradients, ys))
        )
        for stack, row in rows.items():
            dot, square = -products[stack], 2 * squares[stack]
            if signal == "coupling":
                share = share_of(-along_y[stack], yy[stack])
                dot = dot - share * gy[stack]
                left = square + share * along_y[stack]
                square = without_rounding(left, square)
            row.append(cosine_of(dot, square, gg[stack]))
    return {
        stack: Cosine(*(jnp.stack(part) for part in zip(*row, strict=True)))
        for stack, row in rows.items()
    }


def _difference(groups: Sequence[Group], arrays: Arrays, distance: int) -> Arrays:
    """The layer at a distance minus this one; not used where there is none."""
    there = at_distance(groups, arrays, distance)
    return map_arrays(jnp.subtract, there, arrays)


def _over_both(units: Units, numbers: Arrays, distance: int) -> dict[str, jax.Array]:
    """Totals over the two layers of each pair."""
    there = at_distance(units.groups, numbers, distance)
    return units.pair_totals(map_arrays(jnp.add, numbers, there), distance)
