"""S(θ), whose parameters θ follow the gradients: what the two learners share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._arrays import in_dtype, inexact_dtype
from gradsmooth_optax._checks import (
    check_choice,
    check_flag,
    floating_dtype,
    number_below_one,
)
from gradsmooth_optax._coupling.layers import Layers, layers_of, leaves_of
from gradsmooth_optax._coupling.totals import Per, Units
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Group, Grouping
from gradsmooth_optax._depth.paths import places_of, present, show_path, some
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._transforms.states import with_checked_state

Direction: TypeAlias = Literal["ascent", "descent"]
Signal: TypeAlias = Literal["coupling", "full"]
Shapes: TypeAlias = dict[str, tuple[int, ...]]
Values: TypeAlias = Mapping[str, jax.Array]


_PROBABLY = (
    "The state was probably made with other settings (`per`, `radius`), for other "
    "parameters or another `depth`: make it anew by `init(params)`. Or `inner` changes "
    "dtypes, and only layers of one dtype are coupled: cast the parameters before."
)


class Products(NamedTuple):
    """Inner products over the layers that a parameter reaches, one for each parameter.

    With g the gradient, u the last update of the inner transformation, y = S(θ) u and
    v = (dS/dθ) u: how y moves with the parameter.
    """

    gv: jax.Array
    vv: jax.Array
    vy: jax.Array
    gg: jax.Array
    yy: jax.Array
    gy: jax.Array


class Family(NamedTuple):
    """A family of operators S(θ), linear in θ.

    Attributes:
      per: what has parameters of its own: a stack, a role or a layer.
      shapes: of the parameters of every unit.
      coupled: S(θ) u.
      products: those of every parameter, given g, u and θ.
    """

    per: Per
    shapes: Callable[[Units], Shapes]
    coupled: Callable[[Units, Values, Layers], Layers]
    products: Callable[[Units, Values, Layers, Layers], dict[str, Products]]


def learning(
    inner: optax.GradientTransformation,
    depth: DepthLike,
    family: Family,
    state_of: type,
    name: str,
    *,
    start: Any,
    highest: Any,
    learning_rate: Any,
    direction: Direction,
    signal: Signal,
    decay: Any,
    dtype: Any,
    strict: bool,
) -> optax.GradientTransformationExtraArgs:
    """Couples what `inner` produces by S(θ), and lets θ follow the gradients.

    Args:
      inner: whose updates are coupled.
      depth: where depth is.
      family: of operators.
      state_of: the named tuple of θ, running means, last update and inner state.
      name: of the transformation.
      start: θ of the first step.
      highest: the largest θ, the smallest is 0.
      learning_rate: change of θ per step at a cosine of 1.
      direction, signal, decay, dtype, strict: as in `learn_alpha`.
    """
    spec = as_spec(depth)
    check_choice("direction", direction, get_args(Direction))
    check_choice("signal", signal, get_args(Signal))
    decay = number_below_one("decay", decay)
    check_flag("strict", strict)
    dtype = floating_dtype("dtype", dtype)
    sign = 1.0 if direction == "ascent" else -1.0
    said: set[Hashable] = set()

    def init_fn(params):
        grouping = coupled_groups(spec, params, strict, said)
        groups = grouping.coupled
        shapes = family.shapes(Units.of(groups, family.per))
        kept = {
            m.leaf: _zeros(grouping.leaves[m.leaf], dtype)
            for group in groups
            for m in group.members
        }
        return state_of(
            _filled(shapes, start, grouping),
            _filled(shapes, 0.0, grouping),
            _only(grouping, kept),
            inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        theta, means, kept, inner_state = state
        gradients = updates
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        grouping = coupled_groups(spec, updates, strict, said)
        groups = grouping.coupled
        units = Units.of(groups, family.per)
        if grouping.paths:
            _check_shapes(family.shapes(units), theta)
        if not groups:
            return updates, state._replace(inner_state=inner_state)
        last = _arrays_in(kept, groups)
        found = family.products(
            units,
            theta,
            layers_of(groups, _as_grouped(gradients, grouping)),
            layers_of(groups, _in_one_dtype(last, groups)),
        )
        theta, means = dict(theta), dict(means)
        for unit, products in found.items():
            theta[unit], means[unit] = _followed(
                theta[unit],
                means[unit],
                _cosine(products, signal),
                sign,
                decay,
                learning_rate,
                highest,
            )

        layers = layers_of(groups, grouping.leaves)
        coupled = family.coupled(units, theta, layers)
        # Copies: donated twice, a buffer shared with `inner` would be an error.
        kept = {
            i: jnp.array(grouping.leaves[i], old.dtype, copy=True)
            for i, old in last.items()
        }
        new = grouping.replaced(leaves_of(coupled, layers))
        return new, state_of(theta, means, _only(grouping, kept), inner_state)

    return with_checked_state(name, init_fn, update_fn)


# -- One step of θ ---------------------------------------------------------------------


class _Cosine(NamedTuple):
    """Cosines, and where there is one: elsewhere nothing can be learned."""

    value: jax.Array
    known: jax.Array


def _cosine(products: Products, signal: Signal) -> _Cosine:
    """cos(g, v), for the signal "coupling" of the part of v orthogonal to y."""
    gv, vv, vy, gg, yy, gy = products
    if signal == "coupling":
        zero = yy == 0
        share = jnp.where(zero, 0.0, vy) / jnp.where(zero, 1.0, yy)
        left = vv - share * vy
        # Where v lies along y, what rounding leaves of it is no direction.
        vv = jnp.where(left <= 1e-6 * vv, jnp.zeros_like(left), left)
        gv = gv - share * gy
    known = (gg > 0) & (vv > 0) & jnp.isfinite(gg) & jnp.isfinite(vv)
    # A division comes last: see `_coupling.norms`. Nothing is divided where nothing is
    # known, which would stop `jax.debug_nans`.
    norms = jnp.where(known, jnp.sqrt(gg) * jnp.sqrt(vv), 1.0)
    cosine = jnp.where(known, gv, 0.0) / norms
    return _Cosine(cosine, known & jnp.isfinite(cosine))


def _followed(
    value: jax.Array,
    mean: jax.Array,
    cosine: _Cosine,
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


# -- The state -------------------------------------------------------------------------


def _filled(shapes: Shapes, value: Any, grouping: Grouping) -> Any:
    """A float32 array for every unit; a scalar in their place for a leafless tree.

    `optax.tree_map_params` compares the state with that of a leafless placeholder, in
    which one leaf may stand for all units.
    """
    if not grouping.paths:
        return jnp.full((), value, jnp.float32)
    return {unit: jnp.full(shape, value, jnp.float32) for unit, shape in shapes.items()}


def _zeros(leaf: Any, dtype: Any) -> jax.Array:
    """Zeros like a leaf, in `dtype` if that can hold it."""
    own = inexact_dtype(leaf)
    loses = jnp.issubdtype(own, jnp.complexfloating) and not jnp.issubdtype(
        dtype or own, jnp.complexfloating
    )
    return jnp.zeros_like(leaf, own if loses else dtype)


def _only(grouping: Grouping, arrays: Mapping[int, Any]) -> Any:
    """The arrays in the places of their leaves, and `MaskedNode` in the others."""
    leaves = [arrays.get(i, optax.MaskedNode()) for i in range(len(grouping.leaves))]
    return jax.tree.unflatten(grouping.treedef, leaves)


def _arrays_in(tree: Any, groups: Sequence[Group]) -> dict[int, Any]:
    """What `_only` put into a tree."""
    leaves = jax.tree.leaves(tree)
    places = sorted(member.leaf for group in groups for member in group.members)
    if len(leaves) != len(places):
        raise ValueError(
            f"the state holds {len(leaves)} leaves of the last update, "
            f"but {len(places)} leaves are coupled now. {_PROBABLY}"
        )
    return dict(zip(places, leaves, strict=True))


def _as_grouped(gradients: Any, grouping: Grouping) -> dict[int, Any]:
    """The gradients of the leaves that are coupled, if they are those of the updates.

    Groups are those of what `inner` returned: it may change dtypes, and couple so what
    in the gradients is of different ones.
    """
    there = present(places_of(gradients))
    given = [(place.path, np.shape(place.leaf)) for place in there]
    returned = list(zip(grouping.paths, map(np.shape, grouping.leaves), strict=True))
    if given != returned:
        other = [
            show_path(path) for path, shape in set(given).symmetric_difference(returned)
        ]
        raise ValueError(
            f"`inner` was given other leaves than it returned: {some(sorted(other))} "
            f"are only in one of both, or have another shape there. α follows products "
            f"of gradients and updates, leaf by leaf: leave out of `inner` what adds "
            f"or drops leaves, and chain it before."
        )
    arrays = {
        m.leaf: there[m.leaf].leaf for group in grouping.coupled for m in group.members
    }
    return _in_one_dtype(arrays, grouping.coupled)


def _in_one_dtype(
    arrays: Mapping[int, Any], groups: Sequence[Group]
) -> dict[int, jax.Array]:
    """The arrays of every group in the widest of their dtypes."""
    found = {}
    for group in groups:
        own = {m.leaf: jnp.asarray(arrays[m.leaf]) for m in group.members}
        dtypes = {x.dtype for x in own.values()}
        dtype = functools.reduce(jnp.promote_types, dtypes)
        found.update({leaf: x.astype(dtype) for leaf, x in own.items()})
    return found


def _check_shapes(shapes: Shapes, learned: Any) -> None:
    """Raises if a state holds other units than the updates have."""
    found = {unit: np.shape(value) for unit, value in learned.items()}
    if found != shapes:
        raise ValueError(
            f"the state was learned for {found or 'no layers'}, but what `inner` "
            f"returned has {shapes or 'no layers that are coupled'}. {_PROBABLY}"
        )
