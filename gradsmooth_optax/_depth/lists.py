"""Layers with a leaf each, or a stacked leaf for each position of a cycle."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.paths import Path, Place, present, show_path, some
from gradsmooth_optax._depth.siblings import (
    Siblings,
    are_consecutive,
    children_of,
    places_by_child,
)
from gradsmooth_optax._depth.stack import Stack
from gradsmooth_optax._depth.words import VECTORS, is_apart


def layers_of(siblings: Siblings) -> Stack:
    """The siblings as layers, with what is to be decided about that."""
    is_named, numbers = siblings.meaning == "layers", list(siblings.children)
    scattered = {
        show_path(path)
        for (path, *_), holders in siblings.numbers_of_roles.items()
        if not are_consecutive(holders)
    }
    kinds = layer_kinds(siblings.path(numbers[0]), siblings.children[numbers[0]])
    doubts = []
    if not are_consecutive(numbers):
        doubts.append(
            f"{siblings}: the numbers {some(numbers)} have gaps, which `ranked` "
            f"closes. Is each one the next one's neighbor?"
        )
    elif scattered:
        doubts.append(
            f"{siblings}: {some(sorted(scattered))} are of one shape in some of the "
            f"layers only, which `ranked` couples over the others: layers of several "
            f"kinds that alternate, such as those with experts"
        )
    if is_named and siblings.is_minor:
        doubts.append(f"{siblings}: they are single modules in a part of the model")
    if kinds:
        doubts.append(
            f"{siblings}: all parts of each are there as {some(kinds)}. Are they "
            f"{len(kinds)} layers? Then write a function that numbers them"
        )
    stack = (show_path((*siblings.parent, "")) + siblings.stem).rstrip("/_.")
    structure = "of equal structure" if siblings.are_equal else "partly alike"
    found = f"{siblings}: {len(numbers)} siblings {structure}"
    if len(numbers) < 2:
        found = f"{show_path(siblings.path(numbers[0]))}: one by itself"
    return Stack(
        "unrolled",
        siblings.patterns,
        {},
        {
            place.path: Depth(stack, show_path(siblings.inside(place)), number)
            for number, places in siblings.children.items()
            for place in present(places)
        },
        found + ", named as layers" * is_named,
        is_named,
        tuple(doubts),
        ranked=bool(scattered),
        kinds=kinds,
        is_equal=siblings.are_equal,
        is_minor=siblings.is_minor,
        is_one_layer=len(numbers) < 2,
    )


def chains_of(siblings: Siblings) -> list[Siblings]:
    """Where each sibling is nothing but a chain, as an MLP is: those chains."""
    chains = []
    for number, places in siblings.children.items():
        node, (families, others) = siblings.path(number), ([], {"": places})
        while not families and len(others) == 1:
            families, others = children_of(node, places)
            node = (*node, *others)
        alike = [f for f in families if f.are_equal and f.shares]
        if others or len(families) != 1 or not alike:
            return []
        chains += families
    return chains


def layer_kinds(
    node: Path, places: Sequence[Place], num_axes: int = 0
) -> tuple[str, ...]:
    """The kinds of layers that a node holds: "local" and "global" of Gemma 2.

    Its modules are `<part>_<kind>`, and every part with matrices is there in each kind,
    built alike.
    """
    kinds: dict[str, dict[str, list]] = defaultdict(dict)
    for child, inside in places_by_child(node, places).items():
        roles = [(p.path[len(node) + 1 :], np.shape(p.leaf)) for p in present(inside)]
        if any(len(shape) - num_axes >= 2 for _, shape in roles):
            part, _, kind = str(child).rpartition("_")
            kinds[part][kind] = sorted(roles, key=repr)
    found = {frozenset(of_part) for of_part in kinds.values()}
    alike = all(
        roles == next(iter(of_part.values()))
        for of_part in kinds.values()
        for roles in of_part.values()
    )
    if len(kinds) < 2 or len(found) > 1 or not alike:
        return ()
    (common,) = found
    return tuple(sorted(common)) if len(common) > 1 else ()


def layers_or_cycle(siblings: Siblings, tree: Sequence[Place]) -> Stack:
    """The siblings as layers, or as the positions of a cycle of stacked layers."""
    axes = stacked_axes(siblings.places) or _axes_of_matrices(siblings.places)
    if axes is None or is_apart(siblings.parent):
        return layers_of(siblings)
    doubt = (
        f"{siblings}: all their leaves have one size on axis {some(axes)}: they are a "
        f"cycle of stacked layers, or the layers of an ensemble"
    )
    axis, *_ = own_axes(axes, siblings.places, tree) or axes
    return cycle_of(siblings, axis, "", (doubt,))


def cycle_of(
    siblings: Siblings, axis: int, reason: str, doubts: tuple[str, ...]
) -> Stack:
    """The siblings as positions of a cycle, stacked over its repeats on `axis`."""
    layers, length = layers_of(siblings), len(siblings.children)
    doubts += tuple(d for d in layers.doubts if "`ranked` closes" in d)
    ranked = any(len(held) < length for held in siblings.numbers_of_roles.values())
    if ranked:
        doubts += (
            f"{siblings}: not all of them have the same parameters, and `ranked` "
            f"couples those of the same shape over the others",
        )
    return replace(
        layers,
        function="scanned",
        options={"axis": axis, "stride": length},
        depths={
            path: replace(depth, axis=axis, stride=length)
            for path, depth in layers.depths.items()
        },
        reason=reason or layers.reason,
        doubts=doubts,
        ranked=ranked,
    )


def stacked_axes(places: Sequence[Place]) -> list[int] | None:
    """Axes that layers may be stacked on, or None: on which all leaves have one size.

    An unrolled layer nearly always has vectors, and a stacked one has matrices that
    are called as vectors.
    """
    shapes = [np.shape(place.leaf) for place in present(places)]
    vectors = [
        np.shape(p.leaf)
        for p in present(places)
        if p.path and str(p.path[-1]) in VECTORS
    ]
    # Haiku's norms over images have vectors of shape (1, 1, 1, channels).
    are_whole = any(len(s) > 2 and sum(n > 1 for n in s) < 2 for s in vectors)
    return (common_axes(shapes) or None) if vectors and not are_whole else None


def _axes_of_matrices(places: Sequence[Place]) -> list[int] | None:
    """The same where no name tells vectors from matrices, but many shapes agree."""
    shapes = {np.shape(place.leaf) for place in present(places)}
    least = 2 if set(map(len, shapes)) == {3} else 3
    axes = common_axes(list(shapes)) if len(shapes) >= least else []
    return axes if len(axes) == 1 else None


def common_axes(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Axes on which all shapes agree, where they may be of vectors and matrices."""
    ranks = list(map(len, shapes))
    if min(ranks, default=0) < 2 or max(ranks) < 3:
        return []
    return [
        axis
        for axis in range(min(ranks))
        if len({shape[axis] for shape in shapes}) == 1 and shapes[0][axis] > 1
    ]


def own_axes(
    axes: list[int], places: Sequence[Place], tree: Sequence[Place]
) -> list[int]:
    """Those of the axes that have a size of their own, as the model's width has not.

    That is on no other axis of these leaves, and in no other leaf.
    """
    leaves = present(places)
    inside = {place.path for place in leaves}
    outside = [np.shape(p.leaf) for p in present(tree) if p.path not in inside]
    elsewhere = set(itertools.chain.from_iterable(outside))
    shapes = [np.shape(place.leaf) for place in leaves]

    def is_own(axis: int) -> bool:
        size = shapes[0][axis]
        again = any(size in (*s[:axis], *s[axis:][1:]) for s in shapes)
        return not again and size not in elsewhere

    return list(filter(is_own, axes))
