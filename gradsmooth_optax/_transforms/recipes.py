"""Ready optimizers with smoothing in the right place of the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from gradsmooth_optax._checks import transformation
from gradsmooth_optax._depth.checked_groups import numbered_by
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.paths import MASKED, places_of
from gradsmooth_optax._depth.specs import DepthLike, DepthSpec, as_spec
from gradsmooth_optax._transforms.smooth import with_depth_smoothing


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    smoothing: optax.GradientTransformation,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with its preconditioned updates smoothed over depth.

    `chain(with_depth_smoothing(scale_by_adam, smoothing), add_decayed_weights,
    scale_by_learning_rate)`: decay and learning rate are outside the smoothing. Where
    the smoothing has no state, the state has the structure of `optax.adamw`'s, so a
    checkpoint of plain AdamW resumes with smoothing on, and back.

    Args:
      learning_rate: scalar or schedule.
      smoothing: what `smooth_over_depth` returned, or any transformation in its place.
      b1: as in `optax.adamw`, and so are `b2`, `eps`, `eps_root`, `mu_dtype`,
        `weight_decay`, `mask` and `nesterov`.

    Returns:
      The optimizer.

    Raises:
      TypeError: at construction, for a `smoothing` that is no gradient transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"blocks": {"w": jnp.ones((3, 2))}}
      >>> smoothing = gs.smooth_over_depth(gs.scanned("blocks/"), 0.2)
      >>> state = gs.adamw(1e-3, smoothing).init(params)
      >>> plain = optax.adamw(1e-3).init(params)
      >>> jax.tree.structure(state) == jax.tree.structure(plain)
      True

    References:
      arXiv 2606.30813, section 3; Loshchilov and Hutter, arXiv 1711.05101.
    """
    smoothing = transformation(
        "smoothing", smoothing, "adamw(learning_rate, smooth_over_depth(depth, 0.1))"
    )
    preconditioner = optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
    )
    return optax.chain(
        with_depth_smoothing(preconditioner, smoothing),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    depth: DepthLike,
    smoothing: optax.GradientTransformation,
    *,
    ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: jax.typing.ArrayLike = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    nesterov: bool = True,
    adaptive: bool = False,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices and Adam for the rest, smoothed over depth together.

    `chain(partition(scale_by_muon, scale_by_adam), smoothing, add_decayed_weights,
    scale_by_learning_rate)`. Which leaves are matrices is told
    by their rank *per layer*, so a stacked (L, in, out) kernel is L matrices and a
    stacked (L, width) norm scale is none: scanned and unrolled models train alike.
    Like `optax.contrib.muon`, it takes every matrix, also an embedding; pass
    `muon_weight_dimension_numbers` to choose. To smooth only some leaves, restrict the
    depth of the smoothing with `.only(...)`, and leave `depth` as it is: a leaf that
    its pattern does not match counts as not stacked, and a stacked norm scale would
    then pass for a matrix.

    Args:
      learning_rate: scalar or schedule, of both parts.
      depth: where depth is, as in `smooth_over_depth`. A restriction by `.only(...)`
        is not looked at: it says what is coupled, and not what is stacked.
      smoothing: what `smooth_over_depth` returned, or any transformation in its place.
        It may couple less than `depth` says, and must not number a leaf differently.
      ns_coeffs: as in `optax.contrib.muon`, and so are `ns_steps`, `beta`, `eps`,
        `mu_dtype`, `nesterov`, `adaptive`, `adam_b1`, `adam_b2`, `adam_eps_root` and
        `consistent_rms`.
      weight_decay: scalar or schedule, decoupled, of both parts.
      weight_decay_mask: the leaves that decay, as `mask` in `optax.adamw`.
      muon_weight_dimension_numbers: a tree like the parameters of
        `optax.contrib.MuonDimensionNumbers`, None for a leaf that goes to Adam; or a
        function of the parameters that returns it. None derives it from `depth`.

    Returns:
      The optimizer.

    Raises:
      TypeError: at construction, for an argument of the wrong kind.
      ValueError: in `init` and at trace of `update`, for a `smoothing` that numbers
        layers of a leaf otherwise than `depth`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> blocks = {"kernel": jnp.ones((3, 4, 2)), "scale": jnp.ones((3, 4))}
      >>> params = {"blocks": blocks}
      >>> depth = gs.scanned("blocks/")
      >>> optimizer = gs.muon(0.02, depth, gs.smooth_over_depth(depth, 0.2))
      >>> state = optimizer.init(params)
      >>> mu = state[0].inner_states["muon"].inner_state[0].mu["blocks"]
      >>> mu["kernel"].shape, mu["scale"]
      ((3, 4, 2), MaskedNode())

    References:
      Jordan, "Muon", https://github.com/KellerJordan/Muon; arXiv 2606.30813, section 5.
    """
    spec = as_spec(depth)
    smoothing = _agreeing(
        spec,
        transformation(
            "smoothing",
            smoothing,
            "muon(learning_rate, depth, smooth_over_depth(depth, 0.1))",
        ),
    )

    def dimension_numbers(tree):
        if muon_weight_dimension_numbers is None:
            return _matrices_per_layer(spec, tree)
        if callable(muon_weight_dimension_numbers):
            return muon_weight_dimension_numbers(tree)
        return muon_weight_dimension_numbers

    def labels(params):
        # The numbers come first: as in optax, they may be a prefix of the tree.
        return _map_prefix(
            lambda numbers: "adam" if numbers is None else "muon",
            dimension_numbers(params),
            params,
        )

    def numbers_of_matrices(matrices):
        # Inside the partition Adam's leaves are `MaskedNode`s and stay that.
        return _map_prefix(
            lambda numbers: numbers, dimension_numbers(matrices), matrices
        )

    preconditioner = optax.partition(
        {
            "muon": optax.chain(
                contrib.scale_by_muon(
                    ns_coeffs=ns_coeffs,
                    ns_steps=ns_steps,
                    beta=beta,
                    eps=eps,
                    mu_dtype=mu_dtype,
                    nesterov=nesterov,
                    adaptive=adaptive,
                    weight_dimension_numbers=numbers_of_matrices,
                ),
                _scale_by_shape(numbers_of_matrices, consistent_rms),
            ),
            "adam": optax.scale_by_adam(
                b1=adam_b1,
                b2=adam_b2,
                eps=eps,
                eps_root=adam_eps_root,
                mu_dtype=mu_dtype,
                nesterov=nesterov,
            ),
        },
        labels,
    )
    return optax.chain(
        preconditioner,
        # Outside the partition, so that norms over a block see all of the block.
        smoothing,
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _agreeing(
    spec: DepthSpec, smoothing: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The smoothing, with an error where it numbers a leaf otherwise than the spec."""

    def init_fn(params):
        with numbered_by(spec):
            return smoothing.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        with numbered_by(spec):
            return smoothing.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _matrices_per_layer(spec: DepthSpec, tree: Any) -> Any:
    """`MuonDimensionNumbers` for leaves that are matrices per layer, else None."""
    places, numbers = places_of(tree), []
    for (_, leaf, _), assignment in zip(places, spec.locate(places), strict=True):
        if leaf is MASKED:
            continue
        rank = np.ndim(leaf)
        over_depth = as_tuple(assignment.depth.axis) if assignment else ()
        over_depth = {axis % max(rank, 1) for axis in over_depth}
        axes = [axis for axis in range(rank) if axis not in over_depth]
        is_matrix = len(axes) == 2
        numbers.append(contrib.MuonDimensionNumbers(*axes) if is_matrix else None)
    return jax.tree.unflatten(jax.tree.structure(tree), numbers)


def _scale_by_shape(
    dimension_numbers: Callable[[Any], Any], consistent_rms: Any
) -> optax.GradientTransformation:
    """Scales a matrix by √max(1, out/in), or to an RMS that is the same for all."""

    def scale(update, numbers):
        fan_in = _size(update.shape, numbers.reduction_axis)
        fan_out = _size(update.shape, numbers.output_axis)
        if consistent_rms is None:
            return max(1.0, fan_out / max(1, fan_in)) ** 0.5 * update
        factor = max(fan_in, fan_out) ** 0.5 * jnp.asarray(consistent_rms)
        return factor.astype(update.dtype) * update

    def scale_all(updates, params):
        del params
        return jax.tree.map(scale, updates, dimension_numbers(updates))

    return optax.stateless(scale_all)


def _size(shape: Sequence[int], axes: int | Sequence[int]) -> int:
    axes = (axes,) if isinstance(axes, int) else axes
    return int(np.prod([shape[axis] for axis in axes], dtype=int))


def _map_prefix(function: Callable[[Any], Any], prefix: Any, tree: Any) -> Any:
    """`function` of the prefix's leaf, at every leaf of `tree` under it."""
    return jax.tree.map(
        lambda numbers, subtree: jax.tree.map(lambda _: function(numbers), subtree),
        prefix,
        tree,
        is_leaf=_is_numbers_or_none,
    )


def _is_numbers_or_none(node: Any) -> bool:
    kinds = contrib.MuonDimensionNumbers | optax.MaskedNode
    return node is None or isinstance(node, kinds)
