"""Trees moved between a scanned model and an unrolled one, bit for bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._depth.checked_groups import check_structure
from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import group_by_depth, member_of
from gradsmooth_optax._depth.paths import Path, places_of, show_path, some
from gradsmooth_optax._depth.refill import (
    Scans,
    Shapes,
    filled,
    is_there,
    leaves_of,
    shapes_of,
)
from gradsmooth_optax._depth.specs import DepthLike, DepthSpec, as_spec


def unstack(
    tree: Any, depth: DepthLike, *, name: str = "{path}_{layer}", like: Any = None
) -> Any:
    """Moves a tree of a scanned model to the unrolled one: a leaf for each layer.

    Parameters, updates and states of optimizers alike, so that a checkpoint of one
    model starts the other. Nothing is computed: layers are slices. In a state, what is
    like the parameters is found by the same `depth`.

    Args:
      tree: of the scanned model.
      depth: where depth is in the scanned model.
      name: path of a layer: `{path}` is the path of the stacked node (of a position in
        a cycle without its number), `{stack}` the stack's name, `{layer}` the layer's
        number. "{path}_{layer}" is Linen's and MaxText's way, "{path}/{layer}" that of
        a list of layers.
      like: a tree of the unrolled model, of arrays or `jax.ShapeDtypeStruct`s, whose
        containers and keys are taken. None makes dicts with string keys, where the tree
        has mappings. The state of `per_layer` needs it.

    Returns:
      The tree of the unrolled model.

    Raises:
      ValueError: if nothing is stacked, for a grouping that does not fit, two leaves of
        one path, a leaf of `like` that is nowhere, or layers in a node that is no
        mapping where `like` is None.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"blocks": {"w": jnp.arange(4.0).reshape(2, 2)}, "head": jnp.ones(1)}
      >>> gs.unstack(params, gs.scanned("blocks/"))["blocks_1"]
      {'w': Array([2., 3.], dtype=float32)}
    """
    spec, shapes = as_spec(depth), shapes_of(like)
    slices = [s for r in _regions(tree) for s in _slices(r, spec, name, shapes)]
    if all(s.index is None for s in slices):
        raise ValueError(
            f"`depth` {spec!r} of `unstack` finds no stacked leaf in the tree: "
            f"{some([show_path(s.source) for s in slices], 12)}. Pass where depth is "
            f"in the scanned model, as in `scanned('blocks/', axis=0)`."
        )
    _check_unique(slices)
    if like is not None:
        values = {show_path(s.target): s.value() for s in slices}
        return filled(like, values, _scans(slices), is_unstacked=True)
    return _rebuilt(tree, spec, name, ())


def stack(
    tree: Any, depth: DepthLike, *, name: str = "{path}_{layer}", like: Any
) -> Any:
    """Moves a tree of an unrolled model to the scanned one: the inverse of `unstack`.

    Args:
      tree: of the unrolled model.
      depth: where depth is in the *scanned* model.
      name: as in `unstack`.
      like: a tree of the scanned model, of arrays or `jax.ShapeDtypeStruct`s, such as
        `jax.eval_shape(model.init, ...)` or `jax.eval_shape(optimizer.init, params)`.

    Returns:
      The tree of the scanned model.

    Raises:
      ValueError: if nothing of `like` is stacked, for a grouping that does not fit, or
        for a layer that the tree has not.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"blocks": {"w": jnp.arange(4.0).reshape(2, 2)}, "head": jnp.ones(1)}
      >>> depth = gs.scanned("blocks/")
      >>> back = gs.stack(gs.unstack(params, depth), depth, like=params)
      >>> bool((back["blocks"]["w"] == params["blocks"]["w"]).all())
      True
    """
    spec, shapes = as_spec(depth), shapes_of(tree)
    slices = [s for r in _regions(like) for s in _slices(r, spec, name, shapes)]
    if all(s.index is None for s in slices):
        raise ValueError(
            f"`depth` {spec!r} of `stack` finds no stacked leaf in `like`: "
            f"{some([show_path(s.source) for s in slices], 12)}. Pass where depth is "
            f"in the scanned model, and a tree of it for `like`."
        )
    _check_unique(slices)
    found = {show_path(path): leaf for path, leaf, _ in leaves_of(tree)}
    parts: dict[Path, dict[Any, Any]] = {}
    for s in slices:
        if show_path(s.target) in found:
            parts.setdefault(s.source, {})[s.index] = found[show_path(s.target)]
        elif s.index is not None and is_there(s.leaf):
            raise ValueError(
                f"`tree` of `stack` has no leaf {show_path(s.target)}, which is layer "
                f"{s.layer} of {show_path(s.source)} in `like`. Its leaves are "
                f"{some(list(found), 12)}. Pass the `name` by which the layers are "
                f"called, now {name!r}."
            )
    stacked = {
        show_path(s.source): _stacked(s, parts[s.source])
        for s in slices
        if s.source in parts
    }
    return filled(like, found | stacked, _scans(slices), is_unstacked=False)


# -- What becomes of a leaf ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One layer of a stacked leaf; or a leaf as it is.

    Attributes:
      source: path in the scanned model.
      leaf: what is there.
      target: path in the unrolled model.
      axes: over which the leaf holds layers.
      index: of this layer along them; None for a leaf as it is.
      layer: the layer's number.
      stack: the stack's name.
    """

    source: Path
    leaf: Any
    target: Path
    axes: tuple[int, ...] = ()
    index: tuple[int, ...] | None = None
    layer: int = 0
    stack: Hashable = None

    def value(self) -> Any:
        """The slice."""
        if not self.index or not is_there(self.leaf):
            return self.leaf
        where: list[Any] = [slice(None)] * np.ndim(self.leaf)
        for axis, i in zip(self.axes, self.index, strict=True):
            where[axis] = i
        return self.leaf[tuple(where)]


def _stacked(one: _Slice, parts: dict[Any, Any]) -> Any:
    """The leaf of the scanned model that holds these layers."""
    if not one.axes:
        return parts[one.index]
    if not is_there(one.leaf):
        return one.leaf
    indices = sorted(parts)
    values = [parts[index] for index in indices]
    xp: Any = np if all(isinstance(v, np.ndarray) for v in values) else jnp
    sizes = [last + 1 for last in indices[-1]]
    joined = xp.stack(values).reshape(*sizes, *np.shape(values[0]))
    return xp.moveaxis(joined, range(len(sizes)), one.axes)


def _slices(
    region: tuple[Path, Any], spec: DepthSpec, name: str, shapes: Shapes | None
) -> Iterator[_Slice]:
    """What becomes of every leaf of a region of the scanned tree.

    Args:
      region: its path, and the tree there.
      spec: where depth is in it.
      name: of a layer.
      shapes: of the leaves of the unrolled tree, None where they are not known.
    """
    prefix, tree = region
    if shapes is None:
        grouping = group_by_depth(spec, tree)
        if grouping.groups:
            check_structure(grouping, True, wholes=())
    found = list(zip(leaves_of(tree), spec.assign(places_of(tree)), strict=True))
    holders = Counter((a.depth.stack, a.depth.role) for _, a in found if a)
    known: dict[Hashable, tuple[tuple[int, ...], np.ndarray]] = {}
    for (path, leaf, _), a in sorted(found, key=lambda pair: not is_there(pair[0][1])):
        source = (*prefix, *path)
        if a is None:
            yield _Slice(source, leaf, source)
            continue
        depth, several = a.depth, holders[a.depth.stack, a.depth.role] > 1

        def target(layer: int, path=path, depth=depth, several=several) -> Path:
            is_numbered = several or depth.axis is None
            return (*prefix, *_renamed(path, depth, layer, name, is_numbered))

        if is_there(leaf):
            of_layer = (shapes or {}).get(show_path(target(depth.layer)))
            axes, layers = _layers_of(path, np.shape(leaf), a, of_layer)
            if axes:
                known[depth.stack] = axes, layers - depth.layer
        elif depth.axis is not None and depth.stack in known:
            axes, layers = known[depth.stack]  # masked: as what is there
            layers = layers + depth.layer
        else:
            yield _Slice(source, leaf, source)
            continue
        for index, n in np.ndenumerate(layers):
            layer, stack = int(n), depth.stack
            yield _Slice(source, leaf, target(layer), axes, index, layer, stack)


def _layers_of(
    path: Path, shape: tuple[int, ...], assignment: Any, of_layer: Any
) -> tuple[tuple[int, ...], np.ndarray]:
    """The axes of a leaf over its layers, and the layers' numbers along them.

    Those of depth; or the first ones, where only that leaves the shape of a layer's, as
    in what `per_layer` keeps in another shape than the parameter's.
    """
    depth = assignment.depth
    in_front = tuple(range(len(as_tuple(depth.axis))))
    if in_front and of_layer == shape[len(in_front) :]:
        named = [axis % max(len(shape), 1) for axis in as_tuple(depth.axis)]
        rest = [n for axis, n in enumerate(shape) if axis not in named]
        if tuple(rest) != of_layer or max(as_tuple(depth.axis)) >= len(shape):
            depth = dataclasses.replace(depth, axis=in_front)
    member = member_of(0, path, assignment._replace(depth=depth), shape)
    return member.axes, member.layers


def _renamed(path: Path, depth: Any, layer: int, name: str, strip: bool) -> Path:
    """The path of a layer's leaf in the unrolled model."""
    role = (
        str(depth.role) if not isinstance(depth.role, tuple) else show_path(depth.role)
    )
    text = show_path(path)
    node = None
    if text == role or text.endswith(f"/{role}") or not role:
        node = text[: len(text) - len(role)].rstrip("/")
        if strip:
            node = node.rstrip("0123456789").rstrip("/_.")
    if node is None and "{path}" in name:
        raise ValueError(
            f"leaf {text} has role {role!r}, which is not the end of its path, so that "
            f"`name={name!r}` has no `{{path}}`. Write the name by the stack, as in "
            f"`name='{{stack}}_{{layer}}'`."
        )
    layer_path = name.format(path=node, layer=layer, stack=depth.stack)
    return tuple(part for part in f"{layer_path}/{role}".split("/") if part)


def _scans(slices: Sequence[_Slice]) -> Scans:
    by_source: dict[Path, list[_Slice]] = {}
    for one in slices:
        if one.index is not None:
            by_source.setdefault(one.source, []).append(one)
    scans: Scans = {}
    for held in by_source.values():
        layers = [one.layer for one in held]
        scans.setdefault(str(held[0].stack), {})[min(layers)] = layers
    return scans


def _check_unique(slices: list[_Slice]) -> None:
    twice = [p for p, n in Counter(s.target for s in slices).items() if n > 1]
    if twice:
        raise ValueError(
            f"`name` gives one path to several leaves: "
            f"{some(list(map(show_path, twice)), 3)}. Let it hold what tells them "
            f"apart, `{{path}}` or `{{stack}}`."
        )


# -- Trees -----------------------------------------------------------------------------


def _is_mapping(tree: Any) -> bool:
    """Whether a tree is of mappings down to its leaves."""
    if isinstance(tree, dict):
        return all(map(_is_mapping, tree.values()))
    return not is_there(tree) or jax.tree.structure(tree).num_nodes == 1


def _is_plain(node: Any) -> bool:
    """A tuple, a list, a named tuple, or a dict of those: what states are made of."""
    return isinstance(node, tuple | list | dict) and not isinstance(
        node, optax.MaskedNode
    )


def _regions(tree: Any, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The parts of a tree that are like the parameters, or leaves, with their paths."""
    if not _is_plain(tree) or _is_mapping(tree) or (not prefix and not _is_state(tree)):
        yield prefix, tree
        return
    for key, child in _children(tree):
        yield from _regions(child, (*prefix, key))


def _is_state(tree: Any) -> bool:
    """Whether a tree that is no mapping is made of tuples first, as states are."""
    return isinstance(tree, tuple) or (
        isinstance(tree, dict) and any(_is_state(child) for child in tree.values())
    )


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return [(key, node[key]) for key in sorted(node)]
    if hasattr(node, "_fields"):
        return [(field, getattr(node, field)) for field in node._fields]
    return list(enumerate(node))


def _rebuilt(tree: Any, spec: DepthSpec, name: str, prefix: Path) -> Any:
    """The tree with dicts of layers in place of its mappings."""
    regions = list(_regions(tree, prefix))
    if len(regions) == 1 and regions[0][1] is tree:
        slices = list(_slices((prefix, tree), spec, name, None))
        if all(s.index is None for s in slices):
            return tree
        if not _is_mapping(tree):
            raise ValueError(
                f"the layers of {some([show_path(s.target) for s in slices], 3)} are "
                f"in a {type(tree).__name__}, which is no mapping. Pass a tree of the "
                f"unrolled model, whose containers are taken: `unstack(tree, depth, "
                f"like=...)`."
            )
        new: dict[Any, Any] = {}
        for s in slices:
            *nodes, last = s.target[len(prefix) :]
            node = new
            for key in nodes:
                node = node.setdefault(key, {})
            node[last] = s.value()
        return new
    made = [
        _rebuilt(child, spec, name, (*prefix, key)) for key, child in _children(tree)
    ]
    if isinstance(tree, dict):
        return dict(zip((key for key, _ in _children(tree)), made, strict=True))
    return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
