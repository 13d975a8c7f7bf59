"""`learn_alpha`: the strength of the window, learned while training."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import jax
import optax

from gradsmooth_optax._checks import check_choice, number_in, transformation
from gradsmooth_optax._coupling.layers import Layers
from gradsmooth_optax._coupling.totals import Per, Units
from gradsmooth_optax._depth.specs import DepthLike
from gradsmooth_optax._operators.smoothers import window
from gradsmooth_optax.contrib._learning import (
    Direction,
    Family,
    Products,
    Signal,
    Values,
    learning,
)


class LearnAlphaState(NamedTuple):
    """State of `learn_alpha`.

    Attributes:
      alpha: {unit: α}, float32 scalars, or one value per layer in ascending order.
      signal: {unit: running mean of the cosine that α follows}, shaped as `alpha`.
      update: a tree as the parameters, with the last update of `inner`, and
        `optax.MaskedNode()` where nothing is coupled.
      inner_state: state of the wrapped transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.contrib.learn_alpha(optax.scale_by_adam(), depth, per="layer")
      >>> tx.init({"blocks": {"w": jnp.ones((3, 2))}}).alpha["blocks"].shape
      (3,)
    """

    alpha: dict[str, jax.Array]
    signal: dict[str, jax.Array]
    update: Any
    inner_state: optax.OptState


def learn_alpha(
    inner: optax.GradientTransformation,
    depth: DepthLike,
    alpha: Any = 0.1,
    *,
    direction: Direction = "ascent",
    signal: Signal = "coupling",
    learning_rate: Any = 0.05,
    alpha_max: float = 0.5,
    per: Per = "stack",
    decay: float = 0.9,
    dtype: Any = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Smooths what `inner` produces, with an α that the gradients themselves teach.

    With u the update of `inner`, S(α) u = u + α v the window's coupling of it, v =
    (dS/dα) u, and θ ← θ + c S(α) u, the loss of the next batch has dL/dα = c ⟨g, v⟩, g
    its gradient. So each step looks back: α follows ± cos(g, v), with the gradient of
    this step and the v of the last,

        signal ← decay · signal + (1 - decay) · (± cos(g, v))
        α      ← clip(α + learning_rate · signal, 0, alpha_max)

    and rises where coupling more would have descended on a fresh batch. Smoothing also
    shrinks the update, which helps wherever the learning rate is too large. So the
    signal "coupling" takes only the part of v that is orthogonal to S(α) u.

    An update that is 0 or not finite leaves α as it is. It needs memory for one more
    copy of the coupled updates, and on trees with one leaf per layer several times the
    compile time of `smooth_over_depth`. Place it as `with_depth_smoothing`: around the
    preconditioner.

    Args:
      inner: the transformation whose updates are smoothed.
      depth: where depth is, as in `smooth_over_depth`.
      alpha: coupling strength of the first step, a scalar in [0, alpha_max].
      direction: "ascent" if the updates of `inner` point up the gradient, as after a
        preconditioner and before the learning rate; "descent" for a whole optimizer.
      signal: "coupling", or "full" for the raw v.
      learning_rate: change of α per step at a cosine of 1, scalar ≥ 0.
      alpha_max: upper bound of α, in [0, 1].
      per: whether α is one number per "stack", per "role" of a stack, or per "layer" of
        it, over all its roles. Norms and cosines are taken over the same parameters.
      decay: of the running mean, in [0, 1).
      dtype: of the kept copy, None for that of the parameters.
      strict: as in `smooth_over_depth`.

    Returns:
      A transformation with a `LearnAlphaState`. For logging,
      `optax.tree_utils.tree_get(state, "alpha")` finds α in the state of a chain.

    Raises:
      TypeError, ValueError: as `with_depth_smoothing`; at construction for an argument
        out of range; at trace of `update` for a state of other settings.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> depth = gs.scanned("blocks/")
      >>> tx = optax.chain(
      ...     gs.contrib.learn_alpha(optax.scale_by_adam(), depth, alpha=0.2),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> print(optax.tree_utils.tree_get(tx.init(params), "alpha"))
      {'blocks': Array(0.2, dtype=float32)}

    References:
      arXiv 2606.30813 leaves the adaptation of α open. Hypergradients: Baydin et al.,
      "Online Learning Rate Adaptation with Hypergradient Descent", arXiv 1703.04782.
    """
    inner = transformation("inner", inner, "learn_alpha(optax.scale_by_adam(), depth)")
    check_choice("per", per, get_args(Per))
    alpha_max = number_in("alpha_max", alpha_max, high=1.0)
    return learning(
        inner,
        depth,
        Family(per, lambda units: units.shapes, _coupled, _products),
        LearnAlphaState,
        "learn_alpha",
        start=number_in("alpha", alpha, high=alpha_max),
        highest=alpha_max,
        learning_rate=number_in("learning_rate", learning_rate),
        direction=direction,
        signal=signal,
        decay=decay,
        dtype=dtype,
        strict=strict,
    )


def _coupled(units: Units, alphas: Values, u: Layers) -> Layers:
    return u + _change(u).scaled(units.spread(alphas))


def _change(u: Layers) -> Layers:
    """v = (dS/dα) u."""
    return window(1.0).couple(u) - u


def _products(
    units: Units, alphas: Values, g: Layers, u: Layers
) -> dict[str, Products]:
    v = _change(u)
    y = u + v.scaled(units.spread(alphas))
    pairs = ((g, v), (v, v), (v, y), (g, g), (y, y), (g, y))
    found = [units.inner_products(*pair) for pair in pairs]
    return {unit: Products(*(of[unit] for of in found)) for unit in alphas}
