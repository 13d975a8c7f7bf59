"""Layers stacked along an axis, by the names of axes or by shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.lists import (
    common_axes,
    cycle_of,
    layer_kinds,
    own_axes,
    stacked_axes,
)
from gradsmooth_optax._depth.paths import Path, Place, present, show_path, some
from gradsmooth_optax._depth.siblings import Siblings, children_of, patterns_of
from gradsmooth_optax._depth.stack import Stack
from gradsmooth_optax._depth.words import (
    VECTORS,
    is_apart,
    is_layer,
    may_be_apart,
    meaning,
    split_number,
)

# What nn.PARTITION_NAME is set to: "layers", "dense_layers", "layers_per_stage", …
_DEPTH_AXIS = re.compile(r"(?:.*_)?layers(?:_.*)?|scanned_blocks|circular_repeats")
# Such as what a block-diagonal matrix has, too.
_MAYBE_DEPTH_AXIS = re.compile(rf"{_DEPTH_AXIS.pattern}|blocks")


def stacked(node: Path, places: list[Place], tree: list[Place]) -> Stack | None:
    """The node as a stack over axes, by the names of the axes or by the shapes."""
    if axes := next((a for p in places if (a := _depth_axes(p))), ()):
        return _stacked_by_names(node, places, axes)
    stack = _stacked_by_shapes(node, places, tree)
    if stack and any(map(_depth_axes, tree)):
        # Such a tree mostly says where its layers are.
        doubt = f"{show_path(node)}: its axes have no names, though others have"
        return replace(stack, doubts=(doubt,)) if stack.is_named else None
    return stack


def _depth_axes(place: Place) -> tuple[int, ...]:
    names = enumerate(map(str, place.axis_names))
    return tuple(i for i, name in names if _MAYBE_DEPTH_AXIS.fullmatch(name))


def _stacked_by_names(
    node: Path, places: list[Place], axes: tuple[int, ...]
) -> Stack | None:
    leaves = present(places)
    # A leaf without axis names belongs to the stack if its shape fits.
    fits = all(
        _depth_axes(p) == axes if p.axis_names else np.ndim(p.leaf) > max(axes)
        for p in leaves
    )
    sizes = {tuple(np.shape(p.leaf)[a] for a in axes) for p in leaves if fits}
    if len(sizes) != 1 or _layers_are_below(node, places):
        return None
    named = [p for p in leaves if p.axis_names]
    called = [str(named[0].axis_names[a]) for a in axes]
    known = {p.path[:-1] for p in named}
    strangers = [
        show_path(p.path)
        for p in leaves
        if p.path[:-1] not in known
        and not (str(p.path[-1]) in VECTORS and np.ndim(p.leaf) == 2)
    ]
    doubts = []
    if not all(map(_DEPTH_AXIS.fullmatch, called)):
        doubts.append(
            f"{show_path(node)}: an axis named {some(called)} may be of layers or of "
            f"a block-diagonal matrix"
        )
    if strangers:
        doubts.append(
            f"{some(strangers)}: no leaf of the module has axis names; its size on "
            f"axis {some(axes)} may be that of the layers by chance"
        )
    if len(axes) > 1:
        doubts.append(
            f"{show_path(node)}: several axes are named after layers "
            f"({some(called)}). Does depth run over them in this order?"
        )
    reason = (
        f"{show_path(node)}: axis {some(axes)} named {some(called)} in {len(named)} of "
        f"its {len(leaves)} leaves"
    )
    return scanned_stack(node, places, axes, reason, True, tuple(doubts))


def _stacked_by_shapes(
    node: Path, places: list[Place], tree: list[Place]
) -> Stack | None:
    leaves, shapes = present(places), [np.shape(p.leaf) for p in present(places)]
    axes, has_vectors = common_axes(shapes), stacked_axes(places) is not None
    if any(set(sizes) == {1} for sizes in zip(*shapes, strict=False)):
        return None  # one layer, or none
    num_modules = len({p.path[:-1] for p in leaves})
    word = meaning(str(node[-1]).rstrip("0123456789"))
    is_named = word == "layers" or (word == "layers of parts" and num_modules > 1)
    if not axes or not (is_named or (has_vectors and num_modules > 1)):
        return None
    all_families = children_of(node, places)[0]
    families = [f for f in all_families if f.meaning != "parts" or not f.stem]
    number, least = split_number(node[-1]), min(map(len, shapes))
    is_numbered = number and (least > 2 or _is_one_of_several(node, number[0], tree))
    if not has_vectors and (is_numbered or families or len(leaves) < 2):
        return None
    is_inside_apart = all(is_apart(p.path[:-1]) for p in leaves)
    are_lists = any(f.meaning == "layers" and not f.stem for f in families)
    if is_inside_apart and (are_lists or not is_layer(node[-1])):
        return None
    if may_be_apart(node) and not is_named:
        return None
    if _layers_are_below(node, places):
        return None
    others = [p for p in present(tree) if p.path[: len(node)] != node]
    # The model's width comes after the layers.
    own = own_axes(axes, leaves, tree) or axes
    is_told = len(own) == 1 and own[0] == axes[0] and bool(others)
    axis = own[0]
    if any(p.axis_names and p.axis_names[axis] is not None for p in leaves):
        return None  # it has another name
    found = f"{show_path(node)}: all {len(leaves)} leaves have size {shapes[0][axis]}"
    doubts = []
    if not has_vectors and not is_told:
        doubts.append(f"{found} on axis {axis}, but none is a vector by its name")
    if is_inside_apart:
        doubts.append(
            f"{show_path(node)}: it is in a tower, a head, an expert or one of several "
            f"models, whose axis this may be"
        )
    if not is_named:
        doubts.append(
            f"{found} on axis {axis}. Layers stacked by a scan look like that, and so "
            f"do an ensemble, experts and heads, whose axis this may be"
        )
    if least > 2 or (len(axes) > 1 and not is_told):
        doubts.append(
            f"{show_path(node)}: all leaves have {least} axes or more, and one size "
            f"each on axis {some(axes)}. Which are of the layers?"
        )
    is_last_alike = len({sizes[-1] for sizes in shapes}) == 1
    may_be_last = is_last_alike and others and own_axes([-1], leaves, tree)
    if may_be_last:
        doubts.append(
            f"{show_path(node)}: all leaves have one size on their last axis too, "
            f"which no other leaf has. Is it `axis=-1`?"
        )
    own_size = (shapes[0][axis],)
    if others and all(np.shape(p.leaf)[axis : axis + 1] == own_size for p in others):
        doubts.append(
            f"all leaves of the tree have size {shapes[0][axis]} on axis {axis}: this "
            f"may be an ensemble of models"
        )
    reason = (
        f"{found} on axis {axis}"
        + ", vectors too" * has_vectors
        + ", named as layers" * is_named
    )
    stack = scanned_stack(node, places, (axis,), reason, is_named, tuple(doubts))
    is_one = least == 2 and (len(axes) == 1 or is_told)
    is_on_axis = is_one and (has_vectors or is_told) and not may_be_last
    # The other axes have sizes that are seen elsewhere, as the model's width is.
    is_on_axis |= (least == 2 or is_named) and len(own_axes(axes, leaves, tree)) == 1
    # Where all have as many axes, those called `b` are no vectors: LoRA's `a` and `b`.
    are_vectors = has_vectors and max(map(len, shapes)) > least
    num_axes = least - 1 if are_vectors else 1
    return replace(stack, num_axes=num_axes, is_on_axis=is_on_axis)


def _is_one_of_several(node: Path, stem: str, tree: Sequence[Place]) -> bool:
    """Whether a node with a number has a sibling with another one."""
    parent = node[:-1]
    beside = {p.path[len(parent)] for p in tree if p.path[: len(parent)] == parent}
    return sum((split_number(child) or (None,))[0] == stem for child in beside) > 1


def _layers_are_below(node: Path, places: Sequence[Place]) -> bool:
    """Whether most leaves rather belong to nodes below that are called layers."""
    below = [
        any(meaning(s) == "layers" for s in p.path[len(node) : -1]) for p in places
    ]
    return meaning(node[-1]) != "layers" and 2 * sum(below) >= len(below)


def stacked_between(siblings: Siblings) -> Iterator[Stack]:
    """The hidden layers in (first, stacked hidden, last): of one more rank."""
    ranks = {
        number: {siblings.inside(p): np.ndim(p.leaf) for p in present(places)}
        for number, places in siblings.children.items()
    }
    for number, own in list(ranks.items())[1:-1]:
        others = [r for n, r in ranks.items() if n != number and r.keys() == own.keys()]
        if own and others and all(own[p] == r[p] + 1 for r in others for p in own):
            node = siblings.path(number)
            reason = f"{show_path(node)}: of one more rank than its siblings"
            doubt = f"{reason}, as layers between a first and a last one are"
            yield scanned_stack(
                node, siblings.children[number], (0,), reason, False, (doubt,)
            )


def scanned_stack(
    node: Path,
    places: list[Place],
    axes: tuple[int, ...],
    reason: str,
    is_named: bool,
    doubts: tuple[str, ...] = (),
) -> Stack:
    """The node as layers along these axes, or as a cycle with its positions."""
    axis = axes[0] if len(axes) == 1 else axes
    families, others = children_of(node, places)
    cycle = next((f for f in families if f.meaning == "layers"), None)
    if cycle and not others and len(families) == len(axes) == 1:
        if not cycle.stem:
            doubts += (f"{cycle}: a cycle of layers, or the layers of an ensemble",)
        return cycle_of(cycle, axes[0], f"{reason}; {cycle}: a cycle", doubts)
    kinds = layer_kinds(node, places, len(axes))
    below = {s for p in places for s in p.path[len(node) : -1]}
    called = {s for s in below if meaning(s) == "layers" and not split_number(s)}
    layers = called - {"stacked"}  # as haliax calls all of them
    if cycle or layers:
        doubts += (
            f"{show_path(node)}: it holds {cycle or some(sorted(map(str, layers)))}. "
            f"Are these a cycle, or stacked once more?",
        )
    elif kinds:
        doubts += (
            f"{show_path(node)}: all parts are there as {some(kinds)}. Are they layers "
            f"of a cycle? Then write one `scanned(pattern, axis={axis}, start=..., "
            f"stride={len(kinds)})` for each",
        )
    is_leaf = any(place.path == node for place in places)
    segment = re.escape(str(node[-1])) + ("(?:/|$)" if is_leaf else "/")
    patterns, stack = patterns_of(node[:-1], segment), show_path(node).rstrip("/_.")
    return Stack(
        "scanned",
        patterns[str(node[-1]).isdecimal() :],
        {"axis": axis},
        {
            p.path: Depth(stack, show_path(p.path[len(node) :]), axis=axis)
            for p in present(places)
        },
        reason,
        is_named,
        doubts,
        kinds=kinds,
        may_be_cycle=bool(cycle or layers or kinds),
    )
