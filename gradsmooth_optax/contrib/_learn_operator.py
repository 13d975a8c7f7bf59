"""`learn_operator`: a whole banded operator, learned while training."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._checks import (
    LARGEST_LAYER,
    number_in,
    positive_int,
    shown,
    transformation,
)
from gradsmooth_optax._coupling.layers import Layers
from gradsmooth_optax._coupling.totals import Units
from gradsmooth_optax._depth.specs import DepthLike
from gradsmooth_optax.contrib._learning import (
    Direction,
    Family,
    Products,
    Shapes,
    Signal,
    Values,
    learning,
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
    width = 1 if radius is None else positive_int("radius", radius)
    if width > LARGEST_LAYER:
        raise ValueError(
            f"`radius` must be at most {LARGEST_LAYER}, but is {shown(radius)}."
        )
    alpha_max = number_in("alpha_max", alpha_max, high=1.0)
    # Of α = 2 · radius · w, which the settings are of.
    return learning(
        inner,
        depth,
        Family("layer", functools.partial(_shapes, width), _coupled, _products),
        LearnOperatorState,
        "learn_operator",
        start=number_in("alpha", alpha, high=alpha_max) / (2 * width),
        highest=alpha_max / (2 * width),
        learning_rate=number_in("learning_rate", learning_rate) / (2 * width),
        direction=direction,
        signal=signal,
        decay=decay,
        dtype=dtype,
        strict=strict,
    )


def _shapes(width: int, units: Units) -> Shapes:
    return {stack: (width, *shape) for stack, shape in units.shapes.items()}


def _coupled(units: Units, weights: Values, u: Layers) -> Layers:
    """u_l + Σ_d w_d,l (u_{l+d} - u_l) + w_d,l-d (u_{l-d} - u_l)."""
    out = u
    for distance in range(1, _width(weights) + 1):
        # Held by the first layer of each pair.
        pair = units.spread({stack: w[distance - 1] for stack, w in weights.items()})
        out = out + u.difference(distance).scaled(pair)
        out = out + u.difference(-distance).scaled(pair.shifted(-distance))
    return out


def _products(
    units: Units, weights: Values, g: Layers, u: Layers
) -> dict[str, Products]:
    """Of every pair of layers, over these two.

    With D the difference of the second layer and the first, (dS/dw) u is Du in the
    first and -Du in the second.
    """
    y = _coupled(units, weights, u)
    rows = []
    for distance in range(1, _width(weights) + 1):
        d_g, d_u, d_y = (x.difference(distance) for x in (g, u, y))

        def differences(x: Layers, distance: int = distance, d_u: Layers = d_u):
            return units.pair_totals(d_u.inner(x, "param"), distance)

        def over_both(x: Layers, y: Layers, distance: int = distance):
            one = x.inner(y, "param")
            return units.pair_totals(one + one.shifted(distance), distance)

        gu, uu, yu = map(differences, (d_g, d_u, d_y))
        gg, yy, gy = over_both(g, g), over_both(y, y), over_both(g, y)
        rows.append(
            {
                stack: Products(
                    -gu[stack],
                    2 * uu[stack],
                    -yu[stack],
                    gg[stack],
                    yy[stack],
                    gy[stack],
                )
                for stack in weights
            }
        )
    return {
        stack: Products(
            *map(jnp.stack, zip(*(row[stack] for row in rows), strict=True))
        )
        for stack in weights
    }


def _width(weights: Values) -> int:
    return next(iter(weights.values())).shape[0]
