"""Ready optimizers with smoothing in the right place of the chain."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from gradsmooth_optax._checks import (
    check_choice,
    check_flag,
    floating_dtype,
    is_traced,
    positive_int,
    scalar,
    scalar_or_schedule,
    shown,
    transformation,
)
from gradsmooth_optax._depth.checked_groups import numbered_by
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.doubts import unknown_stacks
from gradsmooth_optax._depth.paths import MASKED, Path, places_of, show_path, some
from gradsmooth_optax._depth.specs import DepthLike, DepthSpec, as_spec
from gradsmooth_optax._transforms.smooth import with_depth_smoothing
from gradsmooth_optax._transforms.states import with_checked_state

Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]


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
      TypeError: at construction, for a `smoothing` that is no gradient transformation;
        at trace of `update`, for a state that other settings have made.

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
    _check_schedules(learning_rate=learning_rate, weight_decay=weight_decay)
    _check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    floating_dtype("mu_dtype", mu_dtype)
    check_flag("nesterov", nesterov)
    preconditioner = optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
    )
    chain = optax.chain(
        with_depth_smoothing(preconditioner, smoothing),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_checked_state("adamw", *chain)


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
    preconditioning: Preconditioning = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices and Adam for the rest, smoothed over depth together.

    `chain(partition(scale_by_muon, scale_by_adam), smoothing, add_decayed_weights,
    scale_by_learning_rate)`. Which leaves are matrices is told
    by their rank *per layer*, so a stacked (L, in, out) kernel is L matrices and a
    stacked (L, width) norm scale is none. Every layer is orthogonalized and scaled by
    itself: with every option scanned and unrolled models train alike.
    Like `optax.contrib.muon`, it takes every matrix, also an embedding; pass
    `muon_weight_dimension_numbers` to choose. To smooth only some leaves, restrict the
    depth of the smoothing with `.only(...)`, and leave `depth` as it is: a leaf that
    its pattern does not match counts as not stacked, and a stacked norm scale would
    then pass for a matrix.

    Args:
      learning_rate: scalar or schedule, of both parts; see `adam_learning_rate`.
      depth: where depth is, as in `smooth_over_depth`. A restriction by `.only(...)`
        is not looked at: it says what is coupled, and not what is stacked.
      smoothing: what `smooth_over_depth` returned, or any transformation in its place.
        It may couple less than `depth` says, and must not number a leaf differently.
      ns_coeffs: as in `optax.contrib.muon`, also the name of a preset such as "dion"
        (from optax 0.2.8 on). So are `ns_steps`, `beta`, `eps`, `mu_dtype`, `nesterov`,
        `adaptive`, `adam_b1`, `adam_b2`, `adam_eps_root` and `consistent_rms`.
      weight_decay: scalar or schedule, decoupled, of both parts.
      weight_decay_mask: the leaves that decay, as `mask` in `optax.adamw`.
      preconditioning: as in `optax.contrib.muon`; from optax 0.2.8 on.
      adam_weight_decay: scalar or schedule, of all leaves that go to Adam, as in
        `optax.contrib.muon`: `weight_decay` and its mask are then of the matrices
        alone. None, which there is 0: what is not masked decays as the matrices do.
      adam_learning_rate: scalar or schedule, of the leaves that go to Adam; None is
        `learning_rate`.
      muon_weight_dimension_numbers: a tree like the parameters of
        `optax.contrib.MuonDimensionNumbers`, None for a leaf that goes to Adam; or a
        function of the parameters that returns it. None derives it from `depth`.

    Returns:
      The optimizer.

    Raises:
      TypeError: at construction, for an argument of the wrong kind; at trace of
        `update`, for a state that other settings have made.
      ValueError: at construction, for a word that the installed optax does not know; in
        `init` and at trace of `update`, for a `smoothing` that numbers layers of a leaf
        otherwise than `depth`, and for dimension numbers that name a depth axis.

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
    _check_schedules(learning_rate=learning_rate, weight_decay=weight_decay)
    if adam_learning_rate is not None:
        _check_schedules(adam_learning_rate=adam_learning_rate)
    if adam_weight_decay is not None:
        _check_schedules(adam_weight_decay=adam_weight_decay)
    _check_numbers(beta=beta, eps=eps, adam_b1=adam_b1, adam_b2=adam_b2)
    _check_numbers(adam_eps_root=adam_eps_root)
    if consistent_rms is not None:
        _check_numbers(consistent_rms=consistent_rms)
    floating_dtype("mu_dtype", mu_dtype)
    check_flag("nesterov", nesterov)
    check_flag("adaptive", adaptive)
    if not is_traced(ns_steps):
        ns_steps = positive_int("ns_steps", _as_int(ns_steps))
    if not callable(muon_weight_dimension_numbers):
        _check_dimension_numbers(muon_weight_dimension_numbers)

    def dimension_numbers(tree):
        if muon_weight_dimension_numbers is None:
            return _matrices_per_layer(spec, tree)
        if callable(muon_weight_dimension_numbers):
            return _check_dimension_numbers(muon_weight_dimension_numbers(tree))
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

    of_muon = functools.partial(
        contrib.scale_by_muon,
        ns_coeffs=_coefficients(ns_coeffs, ns_steps),
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        **_preconditioned(preconditioning),
    )
    preconditioner = optax.partition(
        {
            "muon": optax.chain(
                _by_layer(of_muon, spec, numbers_of_matrices),
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
    decays = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    last = (decays, optax.scale_by_learning_rate(learning_rate))
    if adam_weight_decay is not None or adam_learning_rate is not None:
        if adam_weight_decay is not None:
            decays = optax.add_decayed_weights(adam_weight_decay)
        rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        of_adam = optax.chain(decays, optax.scale_by_learning_rate(rate))
        last = (optax.partition({"muon": optax.chain(*last), "adam": of_adam}, labels),)
    # Outside the partition, so that norms over a block see all of the block.
    return with_checked_state("muon", *optax.chain(preconditioner, smoothing, *last))


def _as_int(value: Any) -> Any:
    """An array that holds one int, which optax takes too, as an int."""
    if not isinstance(value, jax.Array) or value.ndim:
        return value
    return int(value) if jnp.issubdtype(value.dtype, jnp.integer) else value


def _check_schedules(**options: Any) -> None:
    for name, value in options.items():
        scalar_or_schedule(name, value)


def _check_numbers(**options: Any) -> None:
    for name, value in options.items():
        scalar(name, value)


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
    leaves, numbers = _located(spec, tree), []
    for reason, unknown in unknown_stacks(spec, places_of(tree)):
        raise ValueError(
            f"`depth` {spec!r} of `muon` does not know leaves that look stacked: "
            f"{some([show_path(path) for path in unknown], 3)}, for {reason}. Each "
            f"would be taken for one matrix. To fix: let `depth` match them (to smooth "
            f"less, restrict that of `smoothing` with `.only(...)`), or say which of "
            f"their axes are a matrix: `muon_weight_dimension_numbers=...`."
        )
    for _, leaf, assignment in leaves:
        over_depth = _depth_axes(assignment, leaf)
        axes = [axis for axis in range(np.ndim(leaf)) if axis not in over_depth]
        is_matrix = len(axes) == 2
        numbers.append(contrib.MuonDimensionNumbers(*axes) if is_matrix else None)
    return jax.tree.unflatten(jax.tree.structure(tree), numbers)


def _by_layer(
    of_muon: Callable[..., Any],
    spec: DepthSpec,
    dimension_numbers: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Muon of every layer by itself, with the state of Muon over whole leaves.

    Some of what it computes is over all of a leaf, such as the dual norm that
    `adaptive` scales by, so a stacked leaf is mapped over its layers.

    Args:
      of_muon: `scale_by_muon`, but for the dimension numbers.
      spec: where depth is.
      dimension_numbers: of the leaves of a tree, over all of their axes.
    """

    def init_fn(params):
        return of_muon(weight_dimension_numbers=dimension_numbers).init(params)

    def update_fn(updates, state, params=None):
        del params
        located, treedef = _located(spec, updates), jax.tree.structure(updates)
        leaves = [(path, leaf) for path, leaf, _ in located]
        numbers = treedef.flatten_up_to(dimension_numbers(updates))
        kept = treedef.flatten_up_to(state.mu)
        axes = [_depth_axes(assignment, leaf) for _, leaf, assignment in located]

        def over_layers(i: int) -> tuple[Any, Any]:
            of_layer = _numbers_of_layer(numbers[i], axes[i], *leaves[i])
            tx = of_muon(weight_dimension_numbers=of_layer)

            def one(update, mu):
                update, new_state = tx.update(update, state._replace(mu=mu))
                return update, new_state.mu

            for axis in axes[i]:  # the highest is outermost, and goes first
                one = jax.vmap(one, in_axes=axis, out_axes=axis)
            return one(leaves[i][1], kept[i])

        lone = [i for i in range(len(leaves)) if not axes[i]]
        tx = of_muon(weight_dimension_numbers=tuple(numbers[i] for i in lone))
        found, new_state = tx.update(
            tuple(leaves[i][1] for i in lone),
            state._replace(mu=tuple(kept[i] for i in lone)),
        )
        new = dict(zip(lone, zip(found, new_state.mu, strict=True), strict=True))
        new.update({i: over_layers(i) for i in range(len(leaves)) if axes[i]})
        updates = treedef.unflatten([new[i][0] for i in range(len(leaves))])
        mu = treedef.unflatten([new[i][1] for i in range(len(leaves))])
        return updates, new_state._replace(mu=mu)

    return optax.GradientTransformation(init_fn, update_fn)


def _located(spec: DepthSpec, tree: Any) -> list[tuple[Path, Any, Any]]:
    """(path, leaf, what the spec says of it) of the leaves in their order."""
    places = places_of(tree)
    found = zip(places, spec.locate(places), strict=True)
    return [(p.path, p.leaf, said) for p, said in found if p.leaf is not MASKED]


def _depth_axes(assignment: Any, leaf: Any) -> list[int]:
    """The axes of a leaf along which its layers are, ascending."""
    axes = as_tuple(assignment.depth.axis) if assignment else ()
    return sorted({axis % max(np.ndim(leaf), 1) for axis in axes})


def _numbers_of_layer(
    numbers: contrib.MuonDimensionNumbers,
    over_depth: Sequence[int],
    path: Any,
    leaf: Any,
) -> contrib.MuonDimensionNumbers:
    """Dimension numbers of a leaf without its depth axes."""

    def of_layer(axes: Any) -> tuple[int, ...]:
        named = [axis % np.ndim(leaf) for axis in _as_axes(axes)]
        if set(named) & set(over_depth):
            raise ValueError(
                f"`muon_weight_dimension_numbers` of leaf {show_path(path)}, of shape "
                f"{np.shape(leaf)}, are {numbers}, but along axis {over_depth[0]} it "
                f"holds the layers of `depth`. A matrix is in one layer: name the "
                f"others of its axes, or leave the argument out."
            )
        return tuple(axis - sum(d < axis for d in over_depth) for axis in named)

    return contrib.MuonDimensionNumbers(*map(of_layer, numbers))


def _coefficients(ns_coeffs: Any, ns_steps: Any) -> Any:
    """The coefficients, those of a preset as `optax.contrib.muon` knows it."""
    if isinstance(ns_coeffs, str):
        ns_coeffs = _preset(ns_coeffs)
    try:
        shape = jnp.shape(jnp.asarray(ns_coeffs, jnp.float32))
    except (TypeError, ValueError, OverflowError):
        shape = None
    if shape is None or len(shape) not in (1, 2) or shape[-1] != 3:
        raise TypeError(
            f"`ns_coeffs` must be three numbers, rows of three, one for each step, or "
            f"the name of a preset, but is {shown(ns_coeffs)}. Write "
            f"`ns_coeffs=(3.4445, -4.775, 2.0315)`."
        )
    if len(shape) == 2 and not 0 < shape[0] <= positive_int("ns_steps", ns_steps):
        raise ValueError(
            f"`ns_coeffs` has {shape[0]} rows, one for each step, but `ns_steps` is "
            f"{ns_steps}. Write `ns_steps={max(shape[0], 1)}`."
        )
    return ns_coeffs


def _preset(ns_coeffs: str) -> np.ndarray:
    """The coefficients of this name."""
    try:
        # More steps than any preset has: of fewer coefficients it takes all.
        with jax.ensure_compile_time_eval():
            tx = contrib.muon(0.0, ns_coeffs=ns_coeffs, ns_steps=10**6)  # pyright: ignore[reportArgumentType] # optax 0.2.7 has no names
            state = tx.init(jnp.zeros((1, 1)))
            found = optax.tree_utils.tree_get(state, "ns_coeffs")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`ns_coeffs` is {ns_coeffs!r}, which is no preset of optax "
            f"{optax.__version__}: 'standard' and 'dion' are from optax 0.2.8 on, "
            f"earlier ones have none. Write the name of one, or the coefficients: "
            f"`ns_coeffs=(3.4445, -4.775, 2.0315)`."
        ) from error
    return np.asarray(found)


def _preconditioned(preconditioning: Any) -> Mapping[str, Any]:
    """The option of `scale_by_muon`, where it is not what every optax does."""
    check_choice("preconditioning", preconditioning, get_args(Preconditioning))
    if preconditioning == "frobenius":
        return {}
    if "preconditioning" not in inspect.signature(contrib.scale_by_muon).parameters:
        raise ValueError(
            f"`preconditioning={preconditioning!r}` needs optax 0.2.8, but here is "
            f"optax {optax.__version__}. Update it, or leave the option out."
        )
    return {"preconditioning": preconditioning}


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
    return int(np.prod([shape[axis] for axis in _as_axes(axes)], dtype=int))


def _as_axes(axes: int | Sequence[int]) -> Sequence[int]:
    return (axes,) if isinstance(axes, int) else axes


def _check_dimension_numbers(numbers: Any) -> Any:
    """The tree, if it holds dimension numbers and nothing else."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        numbers, is_leaf=_is_numbers_or_none
    ):
        if not _is_numbers_or_none(leaf):
            raise TypeError(
                f"`muon_weight_dimension_numbers` must be a tree like the parameters "
                f"of `optax.contrib.MuonDimensionNumbers`, or None for a leaf of "
                f"Adam's, but {jax.tree_util.keystr(path) or 'it'} is {shown(leaf)}. "
                f"Write `lambda params: jax.tree.map(numbers_of, params)`, or leave "
                f"the argument out."
            )
    return numbers


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
