"""The optax face: transformations that couple updates along depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from gradsmooth_optax._apply import Variant, apply_operator
from gradsmooth_optax._groups import (
    Group,
    Grouping,
    check_structure,
    group_by_depth,
)
from gradsmooth_optax._mesh import axis_size
from gradsmooth_optax._norms import NormScope
from gradsmooth_optax._operators import Operator, as_operator, check_choice, check_flag
from gradsmooth_optax._smoothers import window
from gradsmooth_optax._specs import DepthFunction, DepthSpec, as_spec
from gradsmooth_optax._stages import split_over
from gradsmooth_optax._suspicions import warn_of_suspicions

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
    """State of `with_depth_smoothing` where `alpha` is a schedule.

    Attributes:
      count: scalar int32, the number of updates so far.
      inner_state: state of the wrapped transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> warmup = optax.linear_schedule(0.0, 0.2, transition_steps=100)
      >>> depth, params = gs.scanned("blocks/"), {"blocks": {"w": jnp.ones((3, 2))}}
      >>> tx = gs.with_depth_smoothing(optax.scale_by_adam(), depth, warmup)
      >>> type(tx.init(params).inner_state).__name__
      'ScaleByAdamState'
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride] # optax's name for it
    inner_state: optax.OptState


def smooth_over_depth(
    depth: DepthSpec | DepthFunction,
    alpha: optax.ScalarOrSchedule = 0.1,
    *,
    radius: int | None = None,
    variant: Variant = "standard",
    norm_scope: NormScope = "param",
    strict: bool = True,
    axis_name: Hashable | None = None,
    axis_boundary: Boundary = "couple",
    norm_axis_names: tuple[Hashable, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Window Smoothing: couples the updates of neighboring layers.

    Each layer's update keeps a part 1 - α and takes α/2 of each neighbor's:

        interior   u'_l = (1-α) u_l + α/2 (u_{l-1} + u_{l+1})
        ends       u'_1 = (1-α/2) u_1 + α/2 u_2       (and the mirror image at L)

    Only leaves that `depth` gives to the same stack and role are coupled. All others,
    and a stack of one layer, come back as the same objects.

    Place it after the preconditioner, before weight decay and learning rate:
    `chain(scale_by_adam(), smooth_over_depth(...), add_decayed_weights(wd),
    scale_by_learning_rate(lr))`. With frozen parameters, put it inside the trainable
    mask. Keeps each leaf's dtype and sharding; arithmetic is in float32 (float64 for
    float64 leaves). A non-finite update of one layer spreads to its neighbors: see
    `optax.apply_if_finite` and `optax.zero_nans`; a `radius` over 3, or 6 where
    several leaves hold a stack, is a matmul, which spreads it to the whole stack.
    Norms are sums of squares in float32 and hold for updates of about 1e-16 to 1e18.
    While a role's update is being smoothed, it needs memory for one more copy of it.

    Args:
      depth: where depth is: a spec such as `unrolled()` or `scanned("blocks/")`, or a
        function `(path, leaf) -> Depth | None`. Under `optax.inject_hyperparams`,
        which calls functions as schedules, wrap the function in `depth_fn`.
      alpha: coupling strength, scalar in [0, 1] or a schedule of the step count
        (first step 0). A concrete 0 returns every update as the same object.
      radius: neighbors on each side; None means 1. See `window`.
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
      axis_name: inside `jax.shard_map` or `jax.pmap`, the mesh axis over which the
        layers of all matched stacks are split: stage s holds the s-th part of each
        stack, under the layer numbers of stage 0. Neighbors are by true depth: a stage
        of a circular pipeline holds several blocks of layers, told by the `stride` of
        the whole array along the axis that is split. The layers that the tree holds are
        taken for all of the stage's: a first or last one that is masked in every role
        cannot be seen. With `check_vma=False`, or in `pmap`, nor can a stack that every
        device holds whole: leave it out with `.only(...)`.
        `radius` layers at each end of a stage are exchanged with the stages beside.
        Under plain `jit` leave it out, however the updates are sharded.
      axis_boundary: whether layers "couple" across stages, or only inside a "stage".
      norm_axis_names: inside `jax.shard_map`, the mesh axes over which other axes of
        the matched leaves are split by hand. Squares are summed over those along which
        a leaf varies, as `shard_map` knows; with `check_vma=False` over all of them,
        which counts a leaf that is not split as often as there are devices. Left out,
        the norms and cosines of such leaves are those of each device's part alone.

    Returns:
      A transformation with `optax.EmptyState()`, or `DepthSmoothingState` where
      `alpha` is a schedule.

    Raises:
      TypeError: at construction, for an argument of the wrong kind.
      ValueError: at construction, for `alpha`, `radius`, `variant` or `norm_scope` out
        of range; in `init` and at trace of `update`, for a grouping that does not fit
        the tree: nothing matched, a gap, a layer twice, an axis that does not exist.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[0.0], [3.0], [0.0]])}}
      >>> tx = gs.smooth_over_depth(gs.scanned("blocks/"), alpha=0.5)
      >>> smoothed, _ = tx.update(updates, tx.init(updates))
      >>> print(smoothed["blocks"]["w"].ravel())
      [0.75 1.5  0.75]

    Differs from the authors' code:
      A single layer passes through unchanged; there it is shrunk by 1 - α/2.

    References:
      Meng, Sugolov, Papyan, "Gradient Smoothing: Coupling Layer-wise Updates for
      Improved Optimization", arXiv 2606.30813, section 3 and appendix A.1.
    """
    operator = window(alpha, 1 if radius is None else radius)
    return apply_over_depth(
        depth,
        operator,
        variant=variant,
        norm_scope=norm_scope,
        strict=strict,
        axis_name=axis_name,
        axis_boundary=axis_boundary,
        norm_axis_names=norm_axis_names,
    )


def apply_over_depth(
    depth: DepthSpec | DepthFunction,
    operator: Operator | Callable[[int], Any],
    *,
    variant: Variant = "standard",
    norm_scope: NormScope = "param",
    strict: bool = True,
    axis_name: Hashable | None = None,
    axis_boundary: Boundary = "couple",
    norm_axis_names: tuple[Hashable, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Depth-wise Gradient Augmentation: applies any operator along depth.

    The updates U = (u_1 .. u_L) of every role become (S ⊗ I) U, with S the operator's
    matrix for the number of layers of the run.

    A band of up to three neighbors on each side, of six where several leaves hold a
    stack, is applied as shifted copies, a wider one as one matmul over all layers. The
    matmul needs a copy of the role's updates, spreads a non-finite update to all
    layers, and gathers a leaf whose layer axis is sharded; the result keeps the
    sharding. Where layers couple across the stages of an `axis_name`, the operator must
    be banded, with a radius of at most the layers of one stage; it is then always
    shifted copies.

    Args:
      depth: where depth is, as in `smooth_over_depth`.
      operator: an operator such as `window(0.1)`, or a function num_layers -> (L, L).
      variant: as in `smooth_over_depth`.
      norm_scope: as in `smooth_over_depth`.
      strict: as in `smooth_over_depth`, and so are `axis_name`, `axis_boundary` and
        `norm_axis_names`.

    Returns:
      A transformation with `optax.EmptyState()`, or `DepthSmoothingState` where a
      strength is a schedule.

    Raises:
      TypeError, ValueError: as `smooth_over_depth`; and at trace of `update` for an
        operator that does not fit the number of layers.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> updates = [jnp.array([0.0]), jnp.array([3.0]), jnp.array([6.0])]
      >>> mean = lambda num_layers: np.full((num_layers, num_layers), 1 / num_layers)
      >>> tx = gs.apply_over_depth(gs.unrolled(), mean)
      >>> smoothed, _ = tx.update(updates, tx.init(updates))
      >>> print([float(u[0]) for u in smoothed])
      [3.0, 3.0, 3.0]

    References:
      arXiv 2606.30813, section 3.
    """
    spec = as_spec(depth)
    operator = as_operator(operator)
    check_choice("variant", variant, get_args(Variant))
    check_choice("norm_scope", norm_scope, get_args(NormScope))
    check_flag("strict", strict)
    _check_mesh_axes(axis_name, axis_boundary, norm_axis_names)

    def init_fn(params):
        # Leafless trees come from optax: placeholders and trees of `MaskedNode`s.
        grouping = group_by_depth(spec, params)
        # With an `axis_name` they may be those of one stage or of all.
        check_structure(grouping, strict, gaps=axis_name is None)
        if strict and axis_name is None:
            warn_of_suspicions(grouping)
        if operator.scheduled:
            return DepthSmoothingState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        # Grouped anew: paths and masks may differ from those of the parameters.
        grouping = group_by_depth(spec, updates)
        groups = _groups_on_mesh(
            grouping, strict, axis_name, axis_boundary, norm_axis_names
        )
        resolved = operator
        if operator.scheduled:
            resolved = operator.at(state.count)
            state = DepthSmoothingState(optax.safe_increment(state.count))
        if resolved.is_identity:
            return updates, state
        new = apply_operator(groups, grouping.leaves, resolved, variant, norm_scope)
        return grouping.replaced(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _groups_on_mesh(
    grouping: Grouping,
    strict: bool,
    axis_name: Hashable | None,
    axis_boundary: Boundary,
    norm_axis_names: tuple[Hashable, ...],
) -> list[Group]:
    """The groups that are coupled, as the mesh axes split them; structure errors."""
    for name in norm_axis_names:
        axis_size(name, "norm_axis_names")
    over_stages = grouping
    if axis_name is not None:
        axis_size(axis_name, "axis_name")
        # Without a coupling of stages their gaps matter only where they are errors.
        if grouping.groups and (strict or axis_boundary == "couple"):
            over_stages = split_over(grouping, axis_name)
    check_structure(over_stages, strict)
    coupled = over_stages if axis_boundary == "couple" else grouping
    return [
        dataclasses.replace(group, norm_axes=tuple(norm_axis_names))
        for group in coupled.groups
    ]


def _check_mesh_axes(axis_name: Any, axis_boundary: Any, norm_axis_names: Any) -> None:
    check_choice("axis_boundary", axis_boundary, get_args(Boundary))
    if isinstance(axis_name, list | tuple | set):
        raise TypeError(
            f"`axis_name` must be the name of one mesh axis, but is {axis_name!r}. "
            f"Write `axis_name='stage'`."
        )
    if axis_name is None and axis_boundary != "couple":
        raise ValueError(
            f"`axis_boundary={axis_boundary!r}` needs the mesh axis over which depth "
            f"is split: write `axis_name='stage'` as well."
        )
    if not isinstance(norm_axis_names, tuple | list):
        raise TypeError(
            f"`norm_axis_names` must be a tuple of names of mesh axes, but is "
            f"{norm_axis_names!r}. Write `norm_axis_names=({norm_axis_names!r},)`."
        )
    if len(set(norm_axis_names)) < len(norm_axis_names):
        raise ValueError(f"`norm_axis_names` names an axis twice: {norm_axis_names!r}.")
    if axis_name is not None and axis_name in norm_axis_names:
        raise ValueError(
            f"`norm_axis_names` holds {axis_name!r}, which is the `axis_name` that "
            f"depth is split over. A layer is on one of its devices: leave it out."
        )


def with_depth_smoothing(
    inner: optax.GradientTransformation,
    depth: DepthSpec | DepthFunction,
    alpha: optax.ScalarOrSchedule = 0.1,
    *,
    radius: int | None = None,
    variant: Variant = "standard",
    norm_scope: NormScope = "param",
    strict: bool = True,
    axis_name: Hashable | None = None,
    axis_boundary: Boundary = "couple",
    norm_axis_names: tuple[Hashable, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Smooths what `inner` produces and keeps its state as it is.

    The same updates as `chain(inner, smooth_over_depth(...))`, with the state of
    `inner` alone, so that a checkpoint of `inner` resumes with smoothing on, and back.

    Wrap the *preconditioner*. A whole optimizer such as `optax.adamw` is allowed, but
    its weight decay and learning rate are then smoothed too.

    Args:
      inner: the transformation whose updates are smoothed.
      depth: where depth is, as in `smooth_over_depth`.
      alpha: as in `smooth_over_depth`.
      radius: as in `smooth_over_depth`.
      variant: as in `smooth_over_depth`.
      norm_scope: as in `smooth_over_depth`.
      strict: as in `smooth_over_depth`, and so are `axis_name`, `axis_boundary` and
        `norm_axis_names`.

    Returns:
      A transformation with the state of `inner`, or `WithDepthSmoothingState` where
      `alpha` is a schedule.

    Raises:
      TypeError, ValueError: as `smooth_over_depth`; and a TypeError at construction
        for an `inner` that is no gradient transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> tx = optax.chain(
      ...     gs.with_depth_smoothing(optax.scale_by_adam(), gs.scanned("blocks/")),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> type(tx.init(params)[0]).__name__
      'ScaleByAdamState'
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`inner` must be an optax.GradientTransformation, but is {inner!r} of "
            f"type {type(inner).__name__}. Write `with_depth_smoothing("
            f"optax.scale_by_adam(), depth, alpha=0.1)`."
        )
    inner = optax.with_extra_args_support(inner)
    smoothing = smooth_over_depth(
        depth,
        alpha,
        radius=radius,
        variant=variant,
        norm_scope=norm_scope,
        strict=strict,
        axis_name=axis_name,
        axis_boundary=axis_boundary,
        norm_axis_names=norm_axis_names,
    )
    scheduled = callable(alpha)

    def init_fn(params):
        counted: Any = smoothing.init(params)
        inner_state = inner.init(params)
        if scheduled:
            return WithDepthSmoothingState(counted.count, inner_state)
        return inner_state

    def update_fn(updates, state, params=None, **extra_args):
        counted: Any = optax.EmptyState()
        inner_state = state
        if scheduled:
            _check_counted(state)
            counted, inner_state = DepthSmoothingState(state.count), state.inner_state
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        updates, counted = smoothing.update(updates, counted)
        if scheduled:
            return updates, WithDepthSmoothingState(counted.count, inner_state)
        return updates, inner_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_counted(state: Any) -> None:
    if not (hasattr(state, "count") and hasattr(state, "inner_state")):
        raise TypeError(
            f"`state` of `with_depth_smoothing` is a {type(state).__name__}, probably "
            f"from a run with a constant `alpha`, but `alpha` is a schedule now and "
            f"needs a step count. Convert it: `WithDepthSmoothingState(count, state)`."
        )
