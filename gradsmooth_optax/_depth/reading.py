"""The one reading of a tree: which layers it shows by its names, shapes and boxes.

`unrolled()` without a pattern, `detect`, `describe` and the errors and warnings of
`init` all say what is found here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.lists import (
    chains_of,
    layers_of,
    layers_or_cycle,
    stacked_axes,
)
from gradsmooth_optax._depth.paths import MASKED, Path, Place, present, show_path, some
from gradsmooth_optax._depth.scans import scanned_stack, stacked, stacked_between
from gradsmooth_optax._depth.siblings import Siblings, children_of
from gradsmooth_optax._depth.stack import LeftOut, Reading, Stack
from gradsmooth_optax._depth.words import (
    is_layer,
    is_stage,
    may_be_apart,
    meaning,
    split_number,
)


def read(places: Sequence[Place]) -> Reading:
    """The layers that a tree shows.

    Args:
      places: of the tree, masked ones too: what is masked counts as being there, so
        that a part of a tree is read as the whole.
    """
    return _read(signature(places))


def signature(places: Sequence[Place]) -> tuple[Place, ...]:
    """What a reading depends on: names, shapes, dtypes, the names of axes."""
    return tuple(
        Place(path, shaped, tuple(None if n is None else str(n) for n in axis_names))
        for path, leaf, axis_names in places
        if (shaped := leaf if leaf is MASKED else _shaped(leaf)) is not None
    )


def _shaped(leaf: Any) -> jax.ShapeDtypeStruct | None:
    dtype = inexact_dtype(leaf)
    return None if dtype is None else jax.ShapeDtypeStruct(np.shape(leaf), dtype)


@functools.lru_cache(maxsize=32)  # an optimizer reads the same tree again and again
def _read(tree: tuple[Place, ...]) -> Reading:
    left_out: list[LeftOut] = []
    stacks = list(_stacks((), list(tree), list(tree), left_out))
    # Whole layers come before single modules, and names of layers before others.
    ranks = [(s.is_named and not s.is_minor, s.is_named) for s in stacks]
    best = max(ranks, default=(False, False))
    minor = [s for s, r in zip(stacks, ranks, strict=True) if s.is_minor and r < best]
    left_out += [LeftOut(stack.reason, stack, False) for stack in minor]
    kept = [
        replace(stack, doubts=(*stack.doubts, _other_word(stack)))
        if not stack.is_named and best[0] and stack.function == "unrolled"
        else stack
        for stack in stacks
        if stack not in minor
    ]
    sizes = {p.path: np.shape(p.leaf) for p in present(tree)}
    return Reading(tuple(_with_remainders(kept, sizes)), tuple(left_out))


def _other_word(stack: Stack) -> str:
    return f"{stack.reason}, but not called layers, as others are. Are they?"


def _with_remainders(
    stacks: list[Stack], shapes: dict[Path, tuple[int, ...]]
) -> list[Stack]:
    """Cycles and the layers that remain after them as one chain."""
    for c, cycle in enumerate(stacks):
        for r, rest in enumerate(stacks):
            ends = {d.stack for s in (cycle, rest) for d in s.depths.values()}
            is_rest = "_remainder/" in "".join(map(str, ends)) and cycle.is_cycle
            if c != r and is_rest and rest.function == "unrolled":
                names = {str(name).replace("_remainder/", "/") for name in ends}
                if len(names) == 1:
                    path = next(iter(cycle.depths))
                    length = cycle.options["stride"]
                    start = length * shapes[path][cycle.options["axis"]]
                    (stack,) = names
                    stacks[c] = _moved(cycle, stack, 0)
                    stacks[r] = _moved(rest, stack, start)
    return stacks


def _moved(stack: Stack, name: str, start: int) -> Stack:
    options = stack.options | {"stack": name} | ({"start": start} if start else {})
    depths = {
        path: replace(depth, stack=name, layer=depth.layer + start)
        for path, depth in stack.depths.items()
    }
    return replace(stack, options=options, depths=depths)


def _stacks(
    node: Path, places: list[Place], tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The stacks under a node: the highest nodes and siblings that are layers."""
    if node and present(places):
        if stack := stacked(node, places, tree):
            yield stack
            return
        is_first = may_be_apart(node) and not may_be_apart(node[:-1])
        has_layers = any(
            meaning(s) == "layers" for p in places for s in p.path[len(node) :]
        )
        if is_first and not has_layers and (axes := stacked_axes(places)):
            reason = (
                f"{show_path(node)}: all leaves have one size on axis {some(axes)}, "
                f"which is probably of an ensemble, of experts or of heads and not of "
                f"layers"
            )
            stack = scanned_stack(node, places, (axes[0],), reason, False)
            left_out.append(LeftOut(reason, stack, True))
    families, others = children_of(node, places)
    for siblings in families:
        yield from _numbered(siblings, tree, left_out)
    for child, inside in others.items():
        found = list(_stacks((*node, child), inside, tree, left_out))
        has_layers = any(stack.is_equal and not stack.is_minor for stack in found)
        if not has_layers and (lone := _lone_layer(node, child, inside)):
            found = [replace(stack, rivals=(lone,)) for stack in found] or [lone]
        yield from found


def _lone_layer(node: Path, child: str | int, inside: list[Place]) -> Stack | None:
    """The child as the only layer: it has no neighbor, but a place."""
    number = split_number(child)
    is_list = any(f.stem == "" for f in children_of((*node, child), inside)[0])
    is_leaf = any(place.path == (*node, child) for place in inside)
    is_bare = is_layer(child) and str(child)[-1] != "s" and not is_list and not is_leaf
    stem, n = number or (str(child), 0)
    siblings = Siblings(node, stem, {n: inside}, is_bare)
    is_one = (number or is_bare) and siblings.meaning == "layers"
    return layers_of(siblings) if is_one else None


def _numbered(
    siblings: Siblings, tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The siblings as layers, or the stacks in each of them; or both as rivals."""
    found, equal = siblings.meaning, siblings.are_equal
    is_named = found == "layers" and (equal or siblings.num_modules > 1)
    is_named |= found == "layers" and siblings.share_matrices
    left_out_inside: list[LeftOut] = []
    inner = [
        stack
        for number, places in siblings.children.items()
        for stack in _stacks(siblings.path(number), places, tree, left_out_inside)
    ]
    is_stack = siblings.shares and (is_named or (found == "other" and equal))
    if siblings.is_in_one_layer and not equal:
        is_stack = False  # the parts of that one
    layers_inside = [s for s in inner if s.is_named and not s.is_one_layer]
    num_inside = sum(len(stack.depths) for stack in layers_inside)
    are_stages = is_stage(siblings.word) and 2 * num_inside > len(siblings.places)
    if layers_inside and (are_stages or not siblings.shares_most):
        is_stack = False  # of layers of their own, or of their own widths
    if not is_stack:
        left_out += left_out_inside
        inner = inner or list(stacked_between(siblings))
        if reason := _reason_to_leave_out(siblings, not inner, are_stages):
            is_apart = found in ("beside", "layers")
            left_out.append(LeftOut(reason, layers_of(siblings), is_apart))
        yield from inner
        return
    whole = layers_or_cycle(siblings, tree)
    if whole.is_cycle:
        yield whole
        return
    inside = [s for s in inner if s.is_equal and not s.is_one_layer]
    inside += [stack for _, stack, _ in left_out_inside]
    named = [s for s in inside if s.is_named and not s.is_minor]
    if not is_named and named:
        left_out += left_out_inside
        if found == "other" and max(map(_num_layers, named)) == 2:
            yield replace(whole, rivals=tuple(named))  # or parts, as block1 and block2
            return
        if max(map(_num_layers, named)) < 2:  # of which a mask leaves one
            reason = f"{siblings}: {len(siblings.children)} siblings with layers inside"
            left_out.append(LeftOut(reason, layers_of(siblings), True))
        yield from inner
        return
    yield replace(whole, rivals=tuple(_rivals(siblings, inner, is_named)))


def _num_layers(stack: Stack) -> int:
    return len({depth.layer for depth in stack.depths.values()})


def _rivals(siblings: Siblings, inner: list[Stack], is_named: bool) -> list[Stack]:
    """What is read inside of siblings, and may be the layers as well as they are."""
    found = [stack for stack in inner if not stack.is_one_layer]
    if not is_layer(siblings.word):
        found += _stages_of_one(siblings, inner)
    if is_named:
        found = [s for s in found if not s.is_minor]
        found = [s for s in found if s.is_named or s.function == "unrolled"]
        if siblings.are_equal:
            found = [s for s in found if s.is_equal]
    chains = chains_of(siblings)
    if not found and (not is_named or any(c.are_units for c in chains)):
        found = list(map(layers_of, chains))
    return found


def _stages_of_one(siblings: Siblings, inner: list[Stack]) -> list[Stack]:
    """The one layer of each, if there is little beside it: they may be stages."""
    read_inside = [s for stack in inner for s in (stack, *stack.rivals)]
    lone = [s for s in read_inside if s.is_one_layer and not s.is_minor]
    number = len(present(siblings.places))
    return lone if number / 2 < sum(len(s.depths) for s in lone) < number else []


def _reason_to_leave_out(siblings: Siblings, is_alone: bool, are_stages: bool) -> str:
    found, alike = siblings.meaning, siblings.shares and siblings.are_equal
    if (found == "beside" or are_stages) and alike:
        why = "alike, named as things that stand side by side"
    elif found == "layers" and is_alone:
        why = "called layers, but not alike in what they hold"
    elif alike and is_alone:
        why = "alike, named or built as parts of a layer"
    else:
        return ""
    return f"{siblings}: {len(siblings.children)} siblings {why}"
