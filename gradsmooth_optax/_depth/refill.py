"""A tree filled with what was found at its paths, and what `per_layer` keeps by stack.

Its counts are a dict by stack: with layers in front of a whole scan, else one entry for
each block of layers, by the first of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._depth.paths import MASKED, Path, places_of, show_path, some

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
# Stack -> first layer of a block -> layers, in the order of its axes.
Scans: TypeAlias = dict[str, dict[int, list[int]]]


def is_there(leaf: Any) -> bool:
    return leaf is not None and not isinstance(leaf, optax.MaskedNode)


def leaves_of(tree: Any) -> list[tuple[Path, Any]]:
    """(path, leaf or what stands in its place), in order."""
    values = jax.tree.leaves(tree, is_leaf=lambda node: not is_there(node))
    places = places_of(tree)
    if len(values) != len(places):  # a box holds several, or none
        values = [None if p.leaf is MASKED else p.leaf for p in places]
    return [(place.path, v) for place, v in zip(places, values, strict=True)]


def shapes_of(tree: Any) -> Shapes | None:
    """The shapes of the leaves by path."""
    if tree is None:
        return None
    return {show_path(p): np.shape(x) for p, x in leaves_of(tree) if is_there(x)}


def filled(like: Any, found: Mapping[str, Any], scans: Scans, function: str) -> Any:
    """The tree `like` with what is at its paths, all of it.

    Args:
      like: the tree.
      found: leaves by path.
      scans: the stacks of the scanned model.
      function: "unstack" where `like` is of the unrolled model, else "stack".
    """
    wanted = [(show_path(path), leaf) for path, leaf in leaves_of(like)]
    paths, values, used = [text for text, _ in wanted], [], set()
    for text, leaf in wanted:
        used.add(text)
        if not is_there(leaf):
            continue
        value = found.get(text)
        if value is None or np.shape(value) != np.shape(leaf):
            if function == "unstack":
                count, taken = _count_of_layer(text, leaf, paths, found, scans)
            else:
                count, taken = _counts_of_layers(text, leaf, found, scans)
            value = value if count is None else count
            used |= taken
        if value is None:
            raise ValueError(
                f"`like` of `{function}` has a leaf {text}, which is nowhere in the "
                f"tree: {some(list(found), 12)}. Pass a tree of the same model, or the "
                f"`name` by which its layers are called."
            )
        values.append(_of_shape(value, leaf, text))
    left = [text for text, leaf in found.items() if is_there(leaf) and text not in used]
    if left:
        raise ValueError(
            f"`like` of `{function}` has no place for {some(left)}, which would be "
            f"lost. Pass a `like` of the whole model, of as many layers."
        )
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _of_shape(value: Any, leaf: Any, text: str) -> Any:
    if np.shape(value) != np.shape(leaf):
        raise ValueError(
            f"{text} has shape {np.shape(value)} where `like` has {np.shape(leaf)}. "
            f"Probably the axis of `depth` is another one, or this is the state of an "
            f"optimizer that saw all layers as one array, which no layer's can be made "
            f"of: start that optimizer anew, or use `per_layer`."
        )
    return value


def _places_by_stack(node: str, scans: Scans) -> dict[str, list[int]]:
    """The paths at which `per_layer` keeps what is of a stack, and their layers."""
    for stack in sorted(scans, key=len, reverse=True):  # the longest name that fits
        blocks = scans[stack]
        if node == stack or node.endswith(f"/{stack}"):
            is_whole = len(blocks) == 1
            return {
                node if is_whole else f"{node}/{first}": layers
                for first, layers in blocks.items()
            }
    return {}


def _count_of_layer(
    text: str, leaf: Any, wanted: list[str], found: Mapping[str, Any], scans: Scans
) -> tuple[Any, set[str]]:
    """What the scanned state has for one layer of the unrolled one."""
    node, _, last = text.rpartition("/")
    places = _places_by_stack(node, scans) if last.isdecimal() else {}
    if not places or not places.keys() <= found.keys():
        return None, set()
    by_layer: dict[int, Any] = {}
    for place, layers in places.items():
        counts = jnp.reshape(found[place], (len(layers), *np.shape(leaf)))
        by_layer |= dict(zip(layers, counts, strict=True))
    rank = _numbers_below(node, wanted).index(int(last))
    return by_layer[sorted(by_layer)[rank]], set(places)


def _counts_of_layers(
    text: str, leaf: Any, found: Mapping[str, Any], scans: Scans
) -> tuple[Any, set[str]]:
    """What the unrolled state has for the layers of a place in the scanned one."""
    for node in (text, text.rpartition("/")[0]):
        places = _places_by_stack(node, scans)
        numbers = _numbers_below(node, list(found))
        all_layers = sorted(itertools.chain.from_iterable(places.values()))
        if text in places and len(numbers) == len(all_layers):
            number_of = dict(zip(all_layers, numbers, strict=True))
            counts = [found[f"{node}/{number_of[layer]}"] for layer in places[text]]
            taken = {f"{node}/{number_of[layer]}" for layer in places[text]}
            return jnp.stack(counts).reshape(np.shape(leaf)), taken
    return None, set()


def _numbers_below(node: str, paths: list[str]) -> list[int]:
    """The numbers of the leaves right below a path, ascending."""
    below = [p.removeprefix(f"{node}/") for p in paths if p.startswith(f"{node}/")]
    return sorted(int(p) for p in below if p.isdecimal())
