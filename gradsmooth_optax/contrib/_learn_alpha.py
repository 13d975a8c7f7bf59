"""`learn_alpha`: the strength of the window, learned while training."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gradsmooth_optax._arrays import widened
from gradsmooth_optax._checks import (
    check_choice,
    number_below_one,
    number_in,
    transformation,
)
from gradsmooth_optax._coupling.apply import arrays_of, coupled, rounded, with_neighbors
from gradsmooth_optax._coupling.norms import Arrays, map_arrays
from gradsmooth_optax._coupling.units import Per, Units
from gradsmooth_optax._depth.groups import check_structure, group_by_depth
from gradsmooth_optax._depth.reading.doubts import warn_of_suspicions
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._operators.smoothers import window
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


class LearnAlphaState(NamedTuple):
    """State of `learn_alpha`.

    Attributes:
      alpha: {unit: α}, float32 scalars, or one value per layer in ascending order.
      signal: {unit: running mean of the cosine that α follows}, shaped as `alpha`.
      change: a tree as the parameters, with v of the last update (its part orthogonal
        to that update for the signal "coupling"), and `optax.MaskedNode()` where
        nothing is coupled.
      inner_state: state of the wrapped transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> tx = gs.contrib.learn_alpha(optax.scale_by_adam(), gs.scanned("blocks/"), per="layer")
      >>> tx.init({"blocks": {"w": jnp.ones((3, 2))}}).alpha["blocks"].shape
      (3,)
    """

    alpha: dict[str, jax.Array]
    signal: dict[str, jax.Array]
    change: Any
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
      >>> tx = optax.chain(
      ...     gs.contrib.learn_alpha(optax.scale_by_adam(), gs.scanned("blocks/"), alpha=0.2),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> print(optax.tree_utils.tree_get(tx.init(params), "alpha"))
      {'blocks': Array(0.2, dtype=float32)}

    References:
      arXiv 2606.30813 leaves the adaptation of α open. Hypergradients: Baydin et al.,
      "Online Learning Rate Adaptation with Hypergradient Descent", arXiv 1703.04782.
    """
    inner = transformation("inner", inner, "learn_alpha(optax.scale_by_adam(), depth)")
    spec = as_spec(depth)
    check_choice("direction", direction, get_args(Direction))
    check_choice("signal", signal, get_args(Signal))
    check_choice("per", per, get_args(Per))
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
        units = Units.of(groups, per)
        zeros = zeros_of(groups, grouping.leaves, dtype)
        return LearnAlphaState(
            filled(units.shapes, alpha, grouping),
            filled(units.shapes, 0.0, grouping),
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
        units = Units.of(groups, per)
        check_units(units.shapes, state.alpha)
        gradients = arrays_of(groups, grouping.leaves)
        changes = arrays_in(state.change, groups)
        alphas, means = {}, {}
        for unit, cosine in _cosines(units, gradients, changes).items():
            alphas[unit], means[unit] = followed(
                state.alpha[unit],
                state.signal[unit],
                cosine,
                sign,
                decay,
                learning_rate,
                alpha_max,
            )

        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        grouping = group_by_depth(spec, updates)
        groups = with_neighbors(grouping.groups)
        units = Units.of(groups, per)
        xs = arrays_of(groups, grouping.leaves)
        us = [[widened(x) for x in of_group] for of_group in xs]
        ends = coupled(window(1.0), groups, xs, [None] * len(groups), "param")
        vs = map_arrays(lambda u, end: end - u, us, ends)
        ys = map_arrays(
            lambda u, v, a: u + a.astype(u.dtype) * v, us, vs, units.spread(alphas, us)
        )
        if signal == "coupling":
            vs = _orthogonal(units, vs, ys)
        change = tree_of(
            grouping, groups, map_arrays(lambda v, c: v.astype(c.dtype), vs, changes)
        )
        updates = grouping.replaced(rounded(groups, xs, ys))
        return updates, LearnAlphaState(alphas, means, change, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cosines(units: Units, xs: Arrays, ys: Arrays) -> dict[str, Cosine]:
    """cos(x, y) of every unit."""
    products = units.inner_products(xs, ys)
    of_x, of_y = (units.inner_products(arrays, arrays) for arrays in (xs, ys))
    return {name: cosine_of(products[name], of_x[name], of_y[name]) for name in of_x}


def _orthogonal(units: Units, vs: Arrays, ys: Arrays) -> Arrays:
    """v without its component along y, in every unit."""
    products, squares = units.inner_products(vs, ys), units.inner_products(ys, ys)
    whole = units.inner_products(vs, vs)
    share = {name: share_of(products[name], squares[name]) for name in squares}
    keeps = {}
    for name, part in share.items():
        left = without_rounding(whole[name] - part * products[name], whole[name])
        # 1 or 0, by a division: see `_norms.inverse_norm`.
        keeps[name] = (1 / jnp.where(left > 0, 1.0, jnp.inf)).astype(part.dtype)
    return map_arrays(
        lambda v, y, b, keep: keep.astype(v.dtype) * (v - b.astype(y.dtype) * y),
        *(vs, ys, units.spread(share, vs), units.spread(keeps, vs)),
    )
