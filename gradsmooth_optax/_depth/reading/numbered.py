"""Layers of one leaf each, detected by numbered siblings of equal structure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from gradsmooth_optax._depth.paths import Path, show_path, some
from gradsmooth_optax._depth.reading.found_stack import (
    DetectedStack,
    common_axes,
    layer_kinds,
)
from gradsmooth_optax._depth.reading.siblings import (
    Role,
    Siblings,
    are_equal,
    children_of,
    holders_of,
    numbered_patterns,
)
from gradsmooth_optax._depth.reading.words import names_layers, names_parts
from gradsmooth_optax._depth.specs import Leaves, ranked, unrolled


def numbered_stacks(
    node: Path, leaves: Leaves, left_out: list[str]
) -> Iterator[DetectedStack]:
    """The stacks of numbered siblings under `node`, the outermost that are layers.

    Siblings that are alike but not called layers go to `left_out`.
    """
    families, others = children_of(node, leaves)
    for siblings in families:
        holders = holders_of(siblings)
        alike = any(len(numbers) > 1 for numbers in holders.values())
        if alike and names_layers(siblings.word) and are_equal(siblings):
            yield _unrolled_stack(siblings, holders)
            continue
        left_out_inside: list[str] = []
        inside = [
            stack
            for number, child_leaves in siblings.children.items()
            for stack in numbered_stacks(
                siblings.path(number), child_leaves, left_out_inside
            )
        ]
        yield from inside
        if inside or not alike:
            left_out += left_out_inside
        elif names_layers(siblings.word) or _may_be_layers(siblings, holders):
            yield _unrolled_stack(siblings, holders)
        else:
            left_out.append(
                f"left out: {siblings}, which are {len(siblings.children)} siblings "
                f"alike, but named or built as parts of a layer"
            )
    for child, child_leaves in others.items():
        yield from numbered_stacks((*node, child), child_leaves, left_out)


def _may_be_layers(siblings: Siblings, holders: dict[Role, list[int]]) -> bool:
    num_modules = len({role.path[:-1] for role in holders})
    return num_modules > 1 and not names_parts(siblings.word)


def _unrolled_stack(
    siblings: Siblings, holders: dict[Role, list[int]]
) -> DetectedStack:
    scattered = not all(map(_is_consecutive, holders.values()))
    named = ", named as layers" if names_layers(siblings.word) else ""
    structure = "of equal structure" if are_equal(siblings) else "partly alike"
    return DetectedStack(
        (lambda pattern: ranked(unrolled(pattern))) if scattered else unrolled,
        numbered_patterns(siblings),
        siblings.leaves,
        f"{siblings}: {len(siblings.children)} siblings {structure}{named}",
        tuple(_doubts(siblings, holders)),
    )


def _doubts(siblings: Siblings, holders: dict[Role, list[int]]) -> Iterator[str]:
    if not names_layers(siblings.word):
        name = repr(siblings.word) if siblings.word else "a bare number"
        yield f"{siblings}: {name} is not a name that only layers have"
    if holders_of_list := [p for p in siblings.parent[-2:] if names_parts(p)]:
        yield f"{siblings}: they are inside of {some(holders_of_list)}"
    if not _is_consecutive(numbers := list(siblings.children)):
        yield (
            f"{siblings}: the numbers {some(numbers)} have gaps, which `ranked` "
            f"closes. Is each one the next one's neighbor?"
        )
    kinds = defaultdict(set)
    for role in holders:
        kinds[role.path].add(role)
    if varying := [show_path(path) for path, roles in kinds.items() if len(roles) > 1]:
        yield (
            f"{siblings}: {some(varying)} differ in shape or dtype between the "
            f"layers, and only equal ones are coupled, with `ranked` also over others"
        )
    elif _is_consecutive(numbers):
        scattered = [
            r for r, holding in holders.items() if not _is_consecutive(holding)
        ]
        if scattered:
            yield (
                f"{siblings}: {some([show_path(role.path) for role in scattered])} "
                f"are in some of the layers only, and `ranked` couples them over others"
            )
        elif not are_equal(siblings):
            yield f"{siblings}: less than half of their parameters are common to all"
    if axes := common_axes(siblings.leaves):
        yield (
            f"{siblings}: all their leaves have one size on axis {some(axes)}. Are "
            f"they a cycle of stacked layers? Then write `scanned(pattern, "
            f"axis={axes[0]}, stride={len(numbers)})`"
        )
    inside, _ = children_of(siblings.path(numbers[0]), siblings.children[numbers[0]])
    for inner in inside:
        modules = {path[:-1] for path, _ in inner.leaves}
        is_layers = names_layers(inner.word) or (
            not names_parts(inner.word) and len(modules) > len(inner.children)
        )
        if is_layers and are_equal(inner):
            yield (
                f"{siblings}: each holds layers again ({inner}), and only the outer "
                f"number is taken for depth"
            )
    one = siblings.path(numbers[0])
    if kinds := layer_kinds(one, siblings.children[numbers[0]], 0):
        yield (
            f"{siblings}: all parts of each are there as {some(kinds)}. Are they "
            f"{len(kinds)} layers? Then write a function that numbers them"
        )


def _is_consecutive(numbers: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in itertools.pairwise(sorted(numbers)))
