"""Trees moved between a scanned model and an unrolled one, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
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
from gradsmooth_optax._depth.paths import (
    Path,
    compile_pattern,
    layer_group,
    places_of,
    show_path,
    some,
)
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
    spec = as_spec(depth)
    _check_name(name)
    slices = _slices(tree, spec, name, shapes_of(like))
    _check_unique(slices)
    if like is not None:
        values = {show_path(s.target): s.value() for s in slices}
        return filled(like, values, _scans(slices), "unstack")
    if all(s.index is None for s in slices):
        raise ValueError(
            f"`depth` {spec!r} of `unstack` finds no stacked leaf in the tree: "
            f"{some([show_path(s.source) for s in slices], 12)}. Pass where depth is "
            f"in the scanned model, as in `scanned('blocks/', axis=0)`."
        )
    by_leaf: dict[int, list[_Slice]] = {}
    for one in slices:
        by_leaf.setdefault(one.number, []).append(one)
    return _rebuilt(tree, list(map(by_leaf.get, sorted(by_leaf))), 0)


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
    spec = as_spec(depth)
    _check_name(name)
    slices = _slices(like, spec, name, shapes_of(tree))
    _check_unique(slices)
    found = {show_path(path): leaf for path, leaf in leaves_of(tree)}
    parts: dict[Path, dict[Any, Any]] = {}
    for s in slices:
        target = show_path(s.target)
        if target in found:
            parts.setdefault(s.source, {})[s.index] = found[target]
        elif s.index is not None and is_there(s.leaf):
            raise ValueError(
                f"`tree` of `stack` has no leaf {target}, which is layer {s.layer} of "
                f"{show_path(s.source)} in `like`. Its leaves are "
                f"{some(list(found), 12)}. Pass the `name` by which the layers are "
                f"called, now {name!r}."
            )
    if all(s.index is None for s in slices) and any(is_there(s.leaf) for s in slices):
        raise ValueError(
            f"`depth` {spec!r} of `stack` finds no stacked leaf in `like`: "
            f"{some([show_path(s.source) for s in slices], 12)}. Pass where depth is "
            f"in the scanned model, and a tree of it for `like`."
        )
    moved = {show_path(s.target) for s in slices}
    stacked = {
        show_path(s.source): _stacked(s, parts[s.source])
        for s in slices
        if s.source in parts
    }
    rest = {text: leaf for text, leaf in found.items() if text not in moved}
    return filled(like, rest | stacked, _scans(slices), "stack")


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
      number: of the leaf in the tree.
    """

    source: Path
    leaf: Any
    target: Path
    axes: tuple[int, ...] = ()
    index: tuple[int, ...] | None = None
    layer: int = 0
    stack: Hashable = None
    number: int = 0

    def value(self) -> Any:
        """The slice."""
        if not self.index or not is_there(self.leaf):
            return self.leaf
        if isinstance(self.leaf, jax.ShapeDtypeStruct):
            shape = [n for i, n in enumerate(self.leaf.shape) if i not in self.axes]
            return jax.ShapeDtypeStruct(tuple(shape), self.leaf.dtype)
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
    kinds = {(np.shape(v), jnp.result_type(v)) for v in values if is_there(v)}
    if len(kinds) > 1 or not all(map(is_there, values)):
        raise ValueError(
            f"`tree` of `stack` has layers of {show_path(one.source)} that differ or "
            f"are masked: {some(list(map(str, kinds)))}. One array holds layers of one "
            f"shape and dtype."
        )
    if isinstance(one.leaf, jax.ShapeDtypeStruct) and isinstance(
        values[0], jax.ShapeDtypeStruct
    ):
        return one.leaf
    xp: Any = np if all(isinstance(v, np.ndarray) for v in values) else jnp
    sizes = [last + 1 for last in indices[-1]]
    joined = xp.stack(values).reshape(*sizes, *np.shape(values[0]))
    return xp.moveaxis(joined, range(len(sizes)), one.axes)


def _slices(
    tree: Any, spec: DepthSpec, name: str, shapes: Shapes | None
) -> list[_Slice]:
    """What becomes of every leaf of the scanned tree.

    Args:
      tree: the scanned one.
      spec: where depth is in each part of it that is like the parameters.
      name: of a layer.
      shapes: of the leaves of the unrolled tree, None where they are not known.
    """
    found: list[tuple[Path, Path, Any, Any]] = []
    for prefix, region in _regions(tree):
        leaves = leaves_of(region)
        assigned: Sequence[Any] = [None] * len(leaves)
        if not prefix or [path for path, _ in leaves] != [()]:  # else a count
            assigned = spec.assign(places_of(region))
            grouping = group_by_depth(spec, region) if shapes is None else None
            if grouping and grouping.groups:
                check_structure(grouping, True, wholes=())
        for (path, leaf), a in zip(leaves, assigned, strict=True):
            found.append((prefix, path, leaf, a))
    slices = []
    known: dict[Hashable, tuple[tuple[int, ...], np.ndarray]] = {}
    numbered = sorted(enumerate(found), key=lambda pair: not is_there(pair[1][2]))
    for number, (prefix, path, leaf, a) in numbered:
        source = (*prefix, *path)
        depth: Any = a.depth if a else None
        if a and is_there(leaf):
            first = _target(prefix, path, a, depth.layer, name)
            of_layer = (shapes or {}).get(show_path(first))
            axes, layers = _layers_of(path, np.shape(leaf), a, of_layer)
            if axes:
                known[depth.stack] = axes, layers - depth.layer
        elif a and depth.axis is not None and depth.stack in known:
            axes, layers = known[depth.stack]  # masked: as what is there
            layers = layers + depth.layer
        else:
            slices.append(_Slice(source, leaf, source, number=number))
            continue
        slices += [
            _Slice(
                source,
                leaf,
                _target(prefix, path, a, int(n), name),
                axes,
                index,
                int(n),
                depth.stack,
                number,
            )
            for index, n in np.ndenumerate(layers)
        ]
    return slices


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


def _target(prefix: Path, path: Path, assignment: Any, layer: int, name: str) -> Path:
    """The path of a layer's leaf in the unrolled model."""
    depth, text = assignment.depth, show_path(path)
    role = show_path(depth.role if isinstance(depth.role, tuple) else (depth.role,))
    node = None
    if text == role or text.endswith(f"/{role}") or not role:
        node = text[: len(text) - len(role)].rstrip("/")
        if _is_numbered(assignment, text):
            node = node.rstrip("0123456789").rstrip("/_.")
    if node is None and "{path}" in name:
        raise ValueError(
            f"leaf {text} has role {role!r}, which is not the end of its path, so that "
            f"`name={name!r}` has no `{{path}}`. Write the name by the stack, as in "
            f"`name='{{stack}}_{{layer}}'`."
        )
    layer_path = name.format(path=node, layer=layer, stack=depth.stack)
    return (*prefix, *filter(None, f"{layer_path}/{role}".split("/")))


def _is_numbered(assignment: Any, text: str) -> bool:
    """Whether the path ends in a number of the layer, or of a position in a cycle."""
    pattern = getattr(assignment.scan, "pattern", None)
    if assignment.depth.axis is None or pattern is None:
        return assignment.depth.axis is None or assignment.depth.stride is not None
    expression = compile_pattern(pattern)
    group, match = layer_group(expression), expression.search(text)
    return bool(group and match and match[group] is not None)


def _check_name(name: Any) -> None:
    try:
        fits = bool(name.format(path="", layer=0, stack=""))
    except (AttributeError, IndexError, KeyError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"`name` must be a format of `{{path}}`, `{{stack}}` and `{{layer}}`, but "
            f"is {name!r}. Write `name='{{path}}_{{layer}}'`."
        )


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
    targets = Counter(s.target for s in slices)
    nodes = {path[:n] for path in targets for n in range(len(path))}
    twice = [path for path, n in targets.items() if n > 1 or path in nodes]
    if twice:
        raise ValueError(
            f"`name` gives one path to several leaves, or to a leaf and a node: "
            f"{some(list(map(show_path, twice)), 3)}. Let it hold what tells them "
            f"apart, `{{path}}` or `{{stack}}`."
        )


# -- Trees -----------------------------------------------------------------------------


def _is_named_tuple(node: Any) -> bool:
    return hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode)


def _holds_state(node: Any) -> bool:
    """Whether a node is a named tuple, as states are, or holds one."""
    if not isinstance(node, tuple | list | dict) or not is_there(node):
        return False
    return _is_named_tuple(node) or any(_holds_state(c) for _, c in _children(node))


def _regions(tree: Any, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The parts of a tree that are like the parameters, or leaves, with their paths."""
    if not _holds_state(tree):
        yield prefix, tree
        return
    for key, child in _children(tree):
        yield from _regions(child, (*prefix, key))


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return [(key, node[key]) for key in sorted(node)]
    if _is_named_tuple(node):
        return [(field, getattr(node, field)) for field in node._fields]
    return list(enumerate(node))


def _rebuilt(tree: Any, by_leaf: Sequence[Any], depth: int) -> Any:
    """The tree with dicts of layers in place of stacked nodes.

    Args:
      tree: the scanned one, or a node of it.
      by_leaf: what becomes of each of its leaves.
      depth: of the node.
    """
    if all(one.target == one.source and not one.index for (one, *_) in by_leaf):
        return tree
    if not isinstance(tree, tuple | list | Mapping):
        raise ValueError(
            f"layers such as {show_path(by_leaf[0][0].target)} are in a "
            f"{type(tree).__name__}, which is no mapping. Pass a tree of the unrolled "
            f"model, whose containers are taken: `unstack(tree, depth, like=...)`."
        )
    new: dict[Any, Any] = {}
    start, is_kept = 0, not isinstance(tree, Mapping)
    for key, child in _children(tree):
        end = start + (len(leaves_of(child)) if is_there(child) else 1)
        own, start = by_leaf[start:end], end
        at = {held.target[depth] for of_leaf in own for held in of_leaf}
        if is_kept or (len(at) < 2 and str(key) in map(str, at)) or not own:
            new[key] = _rebuilt(child, own, depth + 1)
            continue
        for one in itertools.chain.from_iterable(own):
            *nodes, last = one.target[depth:]
            node = new
            for name in nodes:
                node = node.setdefault(name, {})
            node[last] = one.value()
    container: Any = type(tree)
    if isinstance(tree, Mapping):
        return new if isinstance(tree, dict) else container(new)
    values = new.values()
    return container(*values) if _is_named_tuple(tree) else container(values)
