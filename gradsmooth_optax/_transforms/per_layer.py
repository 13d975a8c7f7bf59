"""Any transformation on every layer by itself, scanned exactly as unrolled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._arrays import is_split, laid_out_like, like, split_like
from gradsmooth_optax._checks import check_flag, transformation
from gradsmooth_optax._depth.doubts import warn
from gradsmooth_optax._depth.paths import MASKED, places_of, show_path
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._transforms.blocks import Block, Blocks, blocks_of
from gradsmooth_optax._transforms.layer_states import (
    NO_STRUCTURE,
    PerLayerState,
    StatesByStack,
    Unit,
    halves,
    is_unit,
    joined,
    of_another_grouping,
    split,
    units_of,
)

# What sees the whole model, or every example of a batch, and no layer.
_NOT_PER_LAYER = {
    "ScaleByLBFGSState": "L-BFGS",
    "ScaleByBacktrackingLinesearchState": "a line search",
    "ScaleByZoomLinesearchState": "a line search",
    "DifferentiallyPrivateAggregateState": "clipping of every example's gradient",
}


def per_layer(
    inner: optax.GradientTransformation,
    depth: DepthLike,
    *,
    rest: Literal["inner"] | optax.GradientTransformation = "inner",
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation on every layer as if that layer were the whole tree.

    Norms, trust ratios, clipping, factored moments and orthogonalization then see one
    layer and no other. On a scanned model this equals, to rounding, `inner` run on each
    layer's subtree of the unrolled model, updates and state alike:

        U_l, S_l  =  inner.update(U_l, S_l, P_l)          for every layer l

    with U_l, S_l, P_l the updates, state and parameters of layer l, nested by the names
    inside the layer (`mlp/kernel`). Layers that are stacked along an axis are mapped by
    `jax.vmap` in place, on whatever axis they are; a leaf for each layer is taken as it
    is. So `inner` is compiled once for a scanned stack, and once for each layer of an
    unrolled one.

    The state is that of `inner`, with trees like all of the parameters where `inner`
    keeps trees like its own: what has the shape of a layer's parameter carries the
    layers on the parameter's axis, anything else in front. What is not like the
    parameters, such as a step count, is a dict by stack, with layers in front or one
    entry for each layer. `optax.tree_map_params` maps it.

    Not for what needs the whole model: line searches and L-BFGS (an error), methods
    that call a loss or a Hessian, gradients of single examples. `optax.add_noise` would
    give equal noise to every layer (a warning).

    Args:
      inner: the transformation, such as `optax.lamb(1e-3)` or
        `optax.adaptive_grad_clip(0.1)`. It sees one layer: masks and labels in it must
        be functions of the tree. Inject rates outside,
        `inject_hyperparams(lambda rate: per_layer(optax.lamb(rate), depth))(1e-3)`.
      depth: where depth is, as in `smooth_over_depth`. A layer is all that it gives to
        one number of a stack, also of a stack of one layer.
      rest: what the leaves outside of `depth` get: "inner", as one more tree; or a
        transformation of their own. `optax.identity()` passes them on, which is
        gradient *ascent* on them where `inner` has a learning rate.
      strict: whether it is an error if nothing matches, or if a layer is missing in all
        roles, and a warning if layers are probably not what was meant.

    Returns:
      A transformation whose state has the structure of that of `inner`; `PerLayerState`
      where `rest` is a transformation, `StatesByStack` where the trees like the
      parameters cannot be found in the state of `inner`.

    Raises:
      TypeError: at construction, for an argument of the wrong kind; in `init`, for an
        `inner` that needs the whole model; at trace of `update`, for a state that was
        made for another grouping, or an `inner` that changes shapes or structure.
      ValueError: in `init` and at trace of `update`, for a grouping that does not fit
        the tree: nothing matched, a layer missing or twice, roles that disagree about
        the layers of their stack.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> updates = {"blocks": {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}}
      >>> tx = gs.per_layer(optax.clip_by_global_norm(1.0), gs.scanned("blocks/"))
      >>> clipped, _ = tx.update(updates, tx.init(updates))
      >>> print(clipped["blocks"]["w"])  # every layer to norm 1
      [[0.6 0.8]
       [0.  1. ]]
    """
    inner = transformation(
        "inner", inner, "per_layer(optax.scale_by_trust_ratio(), depth)"
    )
    spec = as_spec(depth)
    of_rest = None
    if not isinstance(rest, str) or rest != "inner":
        of_rest = transformation("rest", rest, "rest=optax.sgd(1e-3)")
    check_flag("strict", strict)
    said: set[Hashable] = set()

    def init_fn(params):
        blocks = blocks_of(spec, params, strict, said)
        leaves = blocks.grouping.leaves
        if not leaves:  # optax's placeholders, and trees of `MaskedNode`s
            rest_state = of_rest and of_rest.init(params)
            return _with_rest(of_rest, inner.init(params), rest_state)
        states = [_init(inner, block, leaves) for block in blocks.blocks]
        _check_kind(states)
        if of_rest is None and blocks.rest:
            states.append(inner.init(blocks.of_rest(leaves)))
        state = joined(inner, blocks, states)
        rest_state = of_rest and of_rest.init(blocks.of_rest(leaves))
        return _with_rest(of_rest, state, rest_state)

    def update_fn(updates, state, params=None, **extra_args):
        blocks = blocks_of(spec, updates, strict, said)
        leaves = blocks.grouping.leaves
        state, rest_state = (state, None) if of_rest is None else halves(state)
        if not leaves:
            updates, state = inner.update(updates, state, params, **extra_args)
            return updates, _with_rest(of_rest, state, rest_state)
        values = None if params is None else _leaves_like(params, blocks)
        states = split(inner, blocks, state, of_rest is None)
        new: dict[int, Any] = {}
        for i, block in enumerate(blocks.blocks):
            found, states[i] = _update(
                inner, block, leaves, states[i], values, extra_args
            )
            parts = (part.member.leaf for part in block.parts)
            new.update(zip(parts, found, strict=True))
        if blocks.rest:
            tree = blocks.of_rest(leaves)
            of_params = None if values is None else blocks.of_rest(values)
            if of_rest is None:
                tree, states[-1] = inner.update(
                    tree, states[-1], of_params, **extra_args
                )
            else:
                tree, rest_state = of_rest.update(
                    tree, cast(Any, rest_state), of_params, **extra_args
                )
            new.update(_of_rest(blocks, tree))
        state = joined(inner, blocks, states, isinstance(state, StatesByStack))
        return blocks.grouping.replaced(new), _with_rest(of_rest, state, rest_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _of_rest(blocks: Blocks, tree: Any) -> dict[int, Any]:
    """The new updates of the rest, which must be like the old ones."""
    try:
        found = blocks.treedef.flatten_up_to(tree)
    except ValueError as error:
        raise TypeError(
            f"what `per_layer` runs on the rest of the tree must keep its structure, "
            f"but changed it: {error}."
        ) from error
    for i in blocks.rest:
        if np.shape(found[i]) != np.shape(blocks.grouping.leaves[i]):
            raise TypeError(
                f"what `per_layer` runs on the rest of the tree must keep its shapes, "
                f"but made {np.shape(found[i])} of "
                f"{np.shape(blocks.grouping.leaves[i])}, of "
                f"{show_path(blocks.grouping.paths[i])}."
            )
    return {i: found[i] for i in blocks.rest}


def _with_rest(of_rest: Any, state: Any, rest_state: Any) -> Any:
    return state if of_rest is None else PerLayerState(state, rest_state)


def _init(inner: Any, block: Block, leaves: Sequence[Any]) -> Any:
    """The state of the layers of a block."""
    own = [leaves[part.member.leaf] for part in block.parts]
    if not block.num_axes:
        return inner.init(block.nested(own))
    treedef, slots = _slots(inner, block, own)

    def init(values):
        return jax.tree.leaves(inner.init(block.nested(values)))

    axes = [part.axes for part in block.parts]
    aligned = [_aligned(x, a, block, own) for x, a in zip(own, axes, strict=True)]
    found = _mapped(init, axes, [s.axes for s in slots], block.num_axes)(aligned)
    laid_out = [
        _aligned(x, slot.axes, block, own)
        if slot.part is None
        else laid_out_like(x, own[slot.part])
        for x, slot in zip(found, slots, strict=True)
    ]
    return jax.tree.unflatten(treedef, laid_out)


def _update(
    inner: Any,
    block: Block,
    leaves: Sequence[Any],
    state: Any,
    params: Sequence[Any] | None,
    extra_args: dict[str, Any],
) -> tuple[list[Any], Any]:
    """The updates of the parts of a block, and its new state."""
    own = [leaves[part.member.leaf] for part in block.parts]
    of_params = [] if params is None else [params[p.member.leaf] for p in block.parts]
    treedef = jax.tree.structure(state)

    def update(values):
        updates, kept, of_layer = values
        new, new_state = inner.update(
            block.nested(updates),
            jax.tree.unflatten(treedef, kept),
            None if params is None else block.nested(of_layer),
            **extra_args,
        )
        _check_alike(block, updates, new)
        if jax.tree.structure(new_state) != treedef:
            raise TypeError(
                f"`inner` of `per_layer` changes the structure of its state in "
                f"`update`, from {treedef} to {jax.tree.structure(new_state)}."
            )
        return jax.tree.leaves(new), jax.tree.leaves(new_state)

    values = (own, jax.tree.leaves(state), of_params)
    if not block.num_axes:
        found, new_state = update(values)
        return found, jax.tree.unflatten(treedef, new_state)
    expected, slots = _slots(inner, block, own)
    if treedef != expected:
        raise TypeError(of_another_grouping(f"has {treedef} for {block.stack!r}"))
    axes, state_axes = [part.axes for part in block.parts], [s.axes for s in slots]
    for x, of_x in zip(values[1], state_axes, strict=True):
        sizes = tuple(np.shape(x)[axis] for axis in of_x if axis < np.ndim(x))
        if sizes != block.layers.shape:
            raise TypeError(
                of_another_grouping(
                    f"has an array of shape {np.shape(x)} for stack {block.stack!r} of "
                    f"{block.layers.size} layers"
                )
            )
    in_axes = (axes, state_axes, axes[: len(of_params)])
    aligned = [
        [_aligned(x, a, block, own) for x, a in zip(xs, of_xs, strict=True)]
        for xs, of_xs in zip(values, in_axes, strict=True)
    ]
    mapped = _mapped(update, in_axes, (axes, state_axes), block.num_axes)
    found, new_state = mapped(tuple(aligned))
    found = [like(x, old) for x, old in zip(found, own, strict=True)]
    return found, jax.tree.unflatten(treedef, new_state)


def _aligned(x: Any, axes: Sequence[int], block: Block, own: Sequence[Any]) -> Any:
    """`x` split over the layers as the block is: all that `vmap` maps must be."""
    for leaf, part in zip(own, block.parts, strict=True):
        if is_split(leaf, part.axes):
            return split_like(x, axes, leaf, part.axes)
    return x


def _mapped(function: Callable, in_axes: Any, out_axes: Any, num_axes: int) -> Callable:
    """`function` over the layers, along ascending axes of every array."""

    def at(axes: Any, k: int) -> Any:
        # Outside of it k axes are gone already.
        return jax.tree.map(lambda a: a[k] - k, axes, is_leaf=_is_axes)

    for k in reversed(range(num_axes)):
        function = jax.vmap(function, (at(in_axes, k),), at(out_axes, k))
    return function


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(axis, int) for axis in node)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where an array of a state holds the layers.

    Attributes:
      axes: along which they are.
      part: the part of the block whose shape it has; None of another shape.
    """

    axes: tuple[int, ...]
    part: int | None = None


def _slots(inner: Any, block: Block, own: Sequence[Any]) -> tuple[Any, list[_Slot]]:
    """The structure of the state of one layer, and where its arrays hold the layers."""
    parts = list(zip(own, block.parts, strict=True))
    shapes = [_without(np.shape(x), part.axes) for x, part in parts]
    dtypes = [jnp.result_type(x) for x in own]
    layer = block.nested(list(map(jax.ShapeDtypeStruct, shapes, dtypes)))
    state = jax.eval_shape(inner.init, layer)
    in_front = _Slot(tuple(range(block.num_axes)))

    def of_part(i: int, subtree: Any) -> Any:
        own_slot = _Slot(block.parts[i].axes, i)
        return jax.tree.map(
            lambda x: own_slot if x.shape == shapes[i] else in_front, subtree
        )

    def of_unit(unit: Unit) -> Any:
        if not unit.is_like_params:
            return jax.tree.map(lambda _: in_front, unit.value)
        subtrees = block.treedef.flatten_up_to(unit.value)
        return block.nested([of_part(i, tree) for i, tree in enumerate(subtrees)])

    try:
        slots = jax.tree.map(of_unit, units_of(inner, state), is_leaf=is_unit)
    except NO_STRUCTURE:
        slots = jax.tree.map(lambda _: in_front, state)
    return jax.tree.structure(state), jax.tree.leaves(slots)


def _without(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shape) if axis not in axes)


def _check_alike(block: Block, updates: Sequence[Any], new: Any) -> None:
    """Raises where the transformation made something else of a layer."""
    if jax.tree.structure(new) != block.treedef:
        raise TypeError(
            f"`inner` of `per_layer` must keep the structure of the updates, but made "
            f"{jax.tree.structure(new)} of {block.treedef}, a layer of stack "
            f"{block.stack!r}. Put what changes it outside: `chain(per_layer(...), "
            f"it)`."
        )
    for part, old, found in zip(
        block.parts, updates, jax.tree.leaves(new), strict=True
    ):
        if np.shape(old) != np.shape(found):
            raise TypeError(
                f"`inner` of `per_layer` must keep the shapes of the updates, but made "
                f"{np.shape(found)} of {np.shape(old)}, a layer of "
                f"{show_path(part.member.path)}. Put what changes it outside: "
                f"`chain(per_layer(...), it)`."
            )


def _leaves_like(params: Any, blocks: Blocks) -> list[Any]:
    """The parameters of the leaves of the updates."""
    if jax.tree.structure(params) == blocks.treedef:
        found = jax.tree.leaves(params)
    else:  # by their paths: boxes may be gone, and what has no gradient
        by_path: dict[Any, Any] = {}
        for path, leaf, _ in places_of(params):
            if leaf is not MASKED and by_path.setdefault(path, leaf) is not leaf:
                raise ValueError(
                    f"`params` of `per_layer` has two leaves {show_path(path)}, and "
                    f"another structure than the updates: it is not clear which is "
                    f"whose. Pass the parameters in the structure of the updates."
                )
        for path in blocks.grouping.paths:
            if path not in by_path:
                raise ValueError(
                    f"`params` of `per_layer` has no leaf {show_path(path)}, of which "
                    f"there is an update. Pass the parameters that the updates are for."
                )
        found = [by_path[path] for path in blocks.grouping.paths]
    for path, leaf, own in zip(
        blocks.grouping.paths, found, blocks.grouping.leaves, strict=True
    ):
        if np.shape(leaf) != np.shape(own):
            raise ValueError(
                f"`params` of `per_layer` has shape {np.shape(leaf)} at "
                f"{show_path(path)}, where the updates have {np.shape(own)}. Pass the "
                f"parameters that the updates are for."
            )
    return found


def _check_kind(states: Sequence[Any]) -> None:
    """Raises for what cannot run on one layer, and warns of equal noise."""
    names = {*_NOT_PER_LAYER, "AddNoiseState"}
    nodes = jax.tree.leaves(states, is_leaf=lambda x: type(x).__name__ in names)
    kinds = {type(node).__name__ for node in nodes}
    for kind in sorted(kinds & _NOT_PER_LAYER.keys()):
        raise TypeError(
            f"`inner` of `per_layer` is {_NOT_PER_LAYER[kind]} ({kind}), which needs "
            f"the whole model and not one layer of it. Chain it outside: "
            f"`optax.chain(per_layer(...), it)`."
        )
    if "AddNoiseState" in kinds:
        warn(
            "`inner` of `per_layer` adds noise, which is the same in every layer: each "
            "starts from the same key. Chain `optax.add_noise` outside."
        )
