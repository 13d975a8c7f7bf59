"""The transformations that couple updates along depth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._arrays import axis_size
from gradsmooth_optax._checks import (
    Matrix,
    NormScope,
    axis_names,
    check_axis_name,
    check_choice,
    check_flag,
    transformation,
)
from gradsmooth_optax._coupling import norms
from gradsmooth_optax._coupling.layer_values import LayerValues
from gradsmooth_optax._coupling.layers import Layers, layers_of, leaves_of
from gradsmooth_optax._depth.checked_groups import check_structure, coupled_groups
from gradsmooth_optax._depth.groups import Grouping, group_by_depth
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._depth.stages import DepthGroup, split_over
from gradsmooth_optax._operators.operator import Operator
from gradsmooth_optax._operators.smoothers import as_operator
from gradsmooth_optax._transforms.states import with_checked_state

Variant: TypeAlias = Literal["standard", "norm_preserving", "directional"]
Boundary: TypeAlias = Literal["couple", "stage"]


class DepthSmoothingState(NamedTuple):
    """State of a transformation whose strength is a schedule.

    Attributes:
      count: scalar int32, the number of updates so far.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> warmup = optax.linear_schedule(0.0, 0.2, transition_steps=100)
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> gs.smooth_over_depth(gs.scanned("blocks/"), warmup).init(params)
      DepthSmoothingState(count=Array(0, dtype=int32))
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride] # optax's name for it


class WithDepthSmoothingState(NamedTuple):
    """State of `with_depth_smoothing` where the smoothing has a state of its own.

    Attributes:
      inner_state: state of the wrapped transformation.
      smoothing_state: state of the smoothing.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> warmup = optax.linear_schedule(0.0, 0.2, transition_steps=100)
      >>> smoothing = gs.smooth_over_depth(gs.scanned("blocks/"), warmup)
      >>> tx = gs.with_depth_smoothing(optax.scale_by_adam(), smoothing)
      >>> state = tx.init({"blocks": {"w": jnp.ones((3, 2))}})
      >>> type(state.inner_state).__name__, state.smoothing_state
      ('ScaleByAdamState', DepthSmoothingState(count=Array(0, dtype=int32)))
    """

    inner_state: optax.OptState
    smoothing_state: optax.OptState


def smooth_over_depth(
    depth: DepthLike,
    operator: optax.ScalarOrSchedule | Operator = 0.1,
    *,
    variant: Variant = "standard",
    norm_scope: NormScope = "param",
    strict: bool = True,
    axis_name: Hashable | None = None,
    axis_boundary: Boundary = "couple",
    norm_axis_names: tuple[Hashable, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Couples the updates of neighboring layers.

    The updates U = (u_1 .. u_L) of every role become (S ⊗ I) U, with S the operator's
    matrix for the number of layers. A number is the strength α of the paper's window:

        interior   u'_l = (1-α) u_l + α/2 (u_{l-1} + u_{l+1})
        ends       u'_1 = (1-α/2) u_1 + α/2 u_2       (and the mirror image at L)

    Only leaves that `depth` gives to the same stack and role are coupled. All others,
    and a stack of one layer, come back as the same objects.

    Place it after the preconditioner, before weight decay and learning rate:
    `chain(scale_by_adam(), smooth_over_depth(...), add_decayed_weights(wd),
    scale_by_learning_rate(lr))`. With frozen parameters, put it inside the trainable
    mask. Keeps each leaf's dtype and sharding (but where layers of an unrolled stack
    are laid out differently over Auto mesh axes, which only `out_shardings` of `jit`
    keeps); arithmetic is in float32 (float64 for float64 leaves).

    A band of up to three neighbors on each side, of six where several leaves hold a
    stack, is applied as shifted copies, with memory for one more copy of the role that
    is being smoothed; a wider one as one matmul over all layers, which gathers a leaf
    whose layer axis is sharded. A non-finite update of one layer spreads to its
    neighbors, by a matmul to the whole stack: see `optax.apply_if_finite` and
    `optax.zero_nans`.

    Norms are right wherever float32 can hold them: where some layer's is 0, below 5e-10
    or above 2e9, sums of squares are made once more, which reads all updates again.
    Where layers cancel, what rounding alone may leave counts as 0; a layer that is
    1e-38 of what it receives becomes 0 where norms are kept. Derivatives by updates
    hold there too, but of "directional" for those of about 1e-16 to 1e18.

    Args:
      depth: where depth is: a spec such as `unrolled()` or `scanned("blocks/")`, the
        name of a layout such as `"maxtext"`, or a function `(path, leaf) -> Depth |
        None`. Under `optax.inject_hyperparams`, which calls functions as schedules,
        wrap the function in `depth_fn`.
      operator: the strength of the window, scalar in [0, 1] or a schedule of the step
        count (first step 0); or an operator such as `window(0.1, radius=2)`. A
        function is always a schedule: wrap one of the number of layers in
        `operator_fn`. A concrete strength of 0 returns every update as the same
        object.
      variant: "standard", "norm_preserving" (each layer's update keeps the norm it had;
        a layer whose norm is 0 before or after smoothing is not rescaled), or
        "directional" (directions u/‖u‖ are smoothed, then scaled to the norm of u; a
        layer of norm 0 comes back unchanged).
      norm_scope: whether these norms are of one "param" of a layer, or of the whole
        "block" of it: all parameters that `depth` matches in that layer of the stack.
      strict: whether it is an error if nothing matches, if layer numbers have a gap,
        or if leaves of one `scanned` hold different numbers of layers, and (without
        `axis_name`) a warning if layers are probably not coupled, or not with their
        neighbors. False makes a gap a boundary that is not coupled across.
      axis_name: inside `jax.shard_map` or `jax.pmap`, the mesh axis that the layers of
        all matched stacks are split over, numbered as in stage 0. Under plain `jit`
        leave it out, however the updates are sharded. The guide to pipelines says more.
      axis_boundary: whether layers "couple" across stages, which needs an operator of
        a radius of at most the layers of one stage, or only inside a "stage".
      norm_axis_names: inside `jax.shard_map`, the mesh axes over which other axes of
        the matched leaves are split by hand, for norms and cosines of whole layers.

    Returns:
      A transformation with `optax.EmptyState()`, or `DepthSmoothingState` where a
      strength is a schedule.

    Raises:
      TypeError: at construction, for an argument of the wrong kind; at trace of
        `update`, for a state that other settings have made.
      ValueError: at construction, for an argument out of range; in `init` and at trace
        of `update`, for a grouping that does not fit the tree (nothing matched, a gap,
        a layer twice, an axis that does not exist) and for an operator that does not
        fit the number of layers.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[0.0], [3.0], [0.0]])}}
      >>> tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.5)
      >>> smoothed, _ = tx.update(updates, tx.init(updates))
      >>> print(smoothed["blocks"]["w"].ravel())
      [0.75 1.5  0.75]

    Differs from the authors' code:
      A single layer passes through unchanged; there it is shrunk by 1 - α/2.

    References:
      Meng, Sugolov, Papyan, "Gradient Smoothing: Coupling Layer-wise Updates for
      Improved Optimization", arXiv 2606.30813, section 3 and appendix A.1.
    """
    spec = as_spec(depth)
    operator = as_operator(operator)
    check_choice("variant", variant, get_args(Variant))
    check_choice("norm_scope", norm_scope, get_args(NormScope))
    check_flag("strict", strict)
    _check_mesh_axes(axis_name, axis_boundary, norm_axis_names)
    said: set[Hashable] = set()

    def init_fn(params):
        # Leafless trees come from optax: placeholders and trees of `MaskedNode`s.
        if axis_name is None:
            coupled_groups(spec, params, strict, said)
        else:  # maybe those of one stage, maybe of all: gaps cannot be told
            check_structure(group_by_depth(spec, params), strict, wholes=())
        if operator.scheduled:
            return DepthSmoothingState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        # Grouped anew: paths and masks may differ from those of the parameters.
        for name in norm_axis_names:
            axis_size(name, "norm_axis_names")
        if axis_name is None:
            grouping = coupled_groups(spec, updates, strict, said)
            groups: Sequence[DepthGroup] = grouping.groups
        else:
            grouping = group_by_depth(spec, updates)
            groups = _stages(grouping, strict, axis_name, axis_boundary)
        resolved = operator
        if operator.scheduled:
            resolved = operator.at(state.count)
            state = DepthSmoothingState(optax.safe_increment(state.count))
        fewest = 1 if resolved.scales_single_layers else 2
        groups = [g for g in groups if g.whole.run_lengths.max(initial=0) >= fewest]
        if resolved.is_identity or not groups:
            return updates, state
        layers = layers_of(groups, grouping.leaves, norm_scope, norm_axis_names, fewest)
        new = leaves_of(_coupled(resolved, layers, variant), layers)
        return grouping.replaced(new), state

    return with_checked_state("smooth_over_depth", init_fn, update_fn)


def _coupled(operator: Operator, layers: Layers, variant: Variant) -> Layers:
    """S u, S u at the norm of u, or S of u/‖u‖ at the norm of u."""
    if variant == "standard":
        return _couple(operator, layers)
    if variant == "norm_preserving":
        return _norm_preserving(operator, layers)
    return _directional(operator, layers)


def _norm_preserving(operator: Operator, layers: Layers) -> Layers:
    couple = functools.partial(_couple, operator)
    # A large neighbor's rounding is no reason to give up the norm of a small layer.
    # What is no product with S may be u and differences, where all of u is rounded.
    by_matrix = type(operator).couple is Operator.couple
    share = _shares(
        operator,
        layers,
        lambda matrix: matrix.diagonal() if by_matrix else matrix.sum(axis=1),
    )

    def ratios_of(squares: Sequence[LayerValues], factors: Any) -> LayerValues:
        before, after = squares
        ratios = before.map(norms.ratio, after, *factors)
        # A zero layer may receive its neighbors' update.
        return ratios.map(lambda r, s: jnp.where(norms.is_noise(r, s), 1.0, r), share)

    smooth = couple(layers)
    every, functions = [layers, smooth], [lambda u: u, couple]
    return smooth.scaled(layers.from_squares(ratios_of, every, None, *functions))


def _directional(operator: Operator, layers: Layers) -> Layers:
    couple = functools.partial(_couple, operator)
    share = _shares(operator, layers, lambda matrix: matrix.sum(axis=1))

    norm = layers.norms()
    directions = layers.scaled(norm.map(norms.inverse))

    def ratios_of(squares: Sequence[LayerValues], factors: Any) -> LayerValues:
        (after,) = squares
        ones = after.map(jnp.ones_like)
        return ones.map(norms.ratio, after, *(factors and (ones, *factors)))

    smooth = couple(directions)
    ratios = directions.from_squares(ratios_of, [smooth], None, couple)
    ratios = norm.map(_or_none, ratios, share)
    return layers.where(ratios < 0, smooth.scaled(ratios))


def _or_none(norm: jax.Array, ratio: jax.Array, share: jax.Array) -> jax.Array:
    is_none = (norm == 0) | norms.is_noise(ratio, share)
    return jnp.where(is_none, -1.0, norm * ratio)


def _shares(
    operator: Operator, layers: Layers, share_of: Callable[[Matrix], Matrix]
) -> LayerValues:
    """What rounding in S u is relative to: `share_of` |S|; 0 where there is no S."""
    if not operator.has_matrix:
        return layers.values_of_runs(np.zeros)
    return layers.values_of_runs(lambda n: share_of(abs(operator.matrix(n))))


def _couple(operator: Operator, layers: Layers) -> Layers:
    found = operator.couple(layers.reaching(operator.radius))
    if not isinstance(found, Layers):
        raise TypeError(
            f"`couple` of {operator!r} must return the Layers that it makes of those "
            f"that it gets, but returned {type(found).__name__}. Write "
            f"`return layers.scaled(0.5)` or the like."
        )
    return found


def _stages(
    grouping: Grouping, strict: bool, axis_name: Hashable, axis_boundary: Boundary
) -> Sequence[DepthGroup]:
    """What a stage couples of the groups; structure errors."""
    axis_size(axis_name, "axis_name")
    groups: Sequence[DepthGroup] = grouping.groups
    # Without a coupling of stages their gaps matter only where they are errors.
    if grouping.groups and (strict or axis_boundary == "couple"):
        groups = split_over(grouping, axis_name)
    check_structure(grouping, strict, wholes=[group.whole for group in groups])
    return groups if axis_boundary == "couple" else grouping.groups


def _check_mesh_axes(axis_name: Any, axis_boundary: Any, norm_axis_names: Any) -> None:
    check_choice("axis_boundary", axis_boundary, get_args(Boundary))
    if isinstance(axis_name, list | tuple | set):
        raise TypeError(
            f"`axis_name` must be the name of one mesh axis, but is {axis_name!r}. "
            f"Write `axis_name='stage'`."
        )
    if axis_name is not None:
        check_axis_name("axis_name", axis_name)
    elif axis_boundary != "couple":
        raise ValueError(
            f"`axis_boundary={axis_boundary!r}` needs the mesh axis over which depth "
            f"is split: write `axis_name='stage'` as well."
        )
    norm_axis_names = axis_names("norm_axis_names", norm_axis_names)
    if axis_name is not None and axis_name in norm_axis_names:
        raise ValueError(
            f"`norm_axis_names` holds {axis_name!r}, which is the `axis_name` that "
            f"depth is split over. A layer is on one of its devices: leave it out."
        )


def with_depth_smoothing(
    inner: optax.GradientTransformation, smoothing: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Smooths what `inner` produces and keeps its state as it is.

    The same updates as `chain(inner, smoothing)`, with the state of `inner` alone where
    the smoothing has none, so that a checkpoint of `inner` resumes with smoothing on,
    and back.

    Wrap the *preconditioner*. A whole optimizer such as `optax.adamw` is allowed, but
    its weight decay and learning rate are then smoothed too.

    Args:
      inner: the transformation whose updates are smoothed.
      smoothing: what `smooth_over_depth` returned, a chain of it, or
        `optax.identity()`. Whether it has a state is asked once, of `smoothing.init` of
        an empty tree.

    Returns:
      A transformation with the state of `inner`, or `WithDepthSmoothingState` where
      `smoothing` has a state, such as the step count of a schedule.

    Raises:
      TypeError: at construction, for an argument that is no gradient transformation;
        at trace of `update`, for a state that other settings have made.
      ValueError: in `init`, for a smoothing that keeps a state like the parameters.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> smoothing = gs.smooth_over_depth(gs.scanned("blocks/"), 0.2)
      >>> tx = optax.chain(
      ...     gs.with_depth_smoothing(optax.scale_by_adam(), smoothing),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> type(tx.init(params)[0]).__name__
      'ScaleByAdamState'
    """
    call = "with_depth_smoothing(optax.scale_by_adam(), smooth_over_depth(depth, 0.1))"
    inner = transformation("inner", inner, call)
    smoothing = transformation("smoothing", smoothing, call)
    try:
        without_leaves = smoothing.init(())
    except Exception as error:
        error.add_note(
            "Raised by `smoothing.init(())`, which `with_depth_smoothing` asks whether "
            "the smoothing has a state. If it holds a mask as a tree, pass the mask as "
            "a function of the tree; or write `optax.chain(inner, smoothing)`."
        )
        raise
    has_state = bool(jax.tree.leaves(without_leaves))

    def init_fn(params):
        smoothing_state = smoothing.init(params)
        inner_state = inner.init(params)
        if has_state:
            return WithDepthSmoothingState(inner_state, smoothing_state)
        if kept := jax.tree.leaves(smoothing_state):
            raise ValueError(
                f"`smoothing` of `with_depth_smoothing` keeps a state like the "
                f"parameters ({len(kept)} arrays), which has no place in the state of "
                f"`inner`. It is probably more than a smoothing. Write "
                f"`optax.chain(inner, smoothing)`."
            )
        return inner_state

    def update_fn(updates, state, params=None, **extra_args):
        inner_state = state.inner_state if has_state else state
        smoothing_state = state.smoothing_state if has_state else without_leaves
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        updates, smoothing_state = smoothing.update(
            updates, smoothing_state, params, **extra_args
        )
        if has_state:
            return updates, WithDepthSmoothingState(inner_state, smoothing_state)
        return updates, inner_state

    return with_checked_state("with_depth_smoothing", init_fn, update_fn)
