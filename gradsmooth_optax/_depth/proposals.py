"""Calls that find the layers which a tree shows, tried on it before they are said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.groups import Grouping, group_places
from gradsmooth_optax._depth.paths import MASKED, Path, Place
from gradsmooth_optax._depth.reading import Stack
from gradsmooth_optax._depth.specs import (
    PRESET_TRIES,
    DepthSpec,
    first_match,
    ranked,
    scanned,
    unrolled,
)
from gradsmooth_optax._depth.structure import faults


def proposed(stacks: Sequence[Stack], places: Sequence[Place]) -> DepthSpec | None:
    """The fewest specs, with short patterns, that find these stacks and nothing else."""
    members, left = [], list(stacks)
    while left:
        whole = _spec(left[0], left[0].patterns[-1])
        found = ((s, _covered(s, left, places)) for s in _specs(left[0]))
        spec, covered = next((pair for pair in found if pair[1]), (whole, left[:1]))
        members.append(spec)
        left = [stack for stack in left if stack not in covered]
    return first_match(*members) if len(members) > 1 else next(iter(members), None)


def _specs(stack: Stack) -> Iterator[DepthSpec]:
    return (_spec(stack, pattern) for pattern in stack.patterns)


def _spec(stack: Stack, pattern: str) -> DepthSpec:
    make = unrolled if stack.function == "unrolled" else scanned
    spec = make(pattern, **stack.options)
    return ranked(spec) if stack.ranked else spec


def _covered(
    spec: DepthSpec, stacks: list[Stack], places: Sequence[Place]
) -> list[Stack]:
    """The stacks that the spec finds, the first among them; [] if it finds others."""
    found = depths_of(spec, places)
    covered = [
        stack
        for stack in stacks
        if stack.ranked == stacks[0].ranked and stack.depths.items() <= found.items()
    ]
    finds_others = sum(len(stack.depths) for stack in covered) < len(found)
    return [] if finds_others or stacks[0] not in covered else covered


def depths_of(spec: DepthSpec, places: Sequence[Place]) -> dict[Path, Depth]:
    """The `Depth` that a spec gives each leaf."""
    return {
        place.path: assignment.depth
        for place, assignment in zip(places, spec.assign(places), strict=True)
        if assignment is not None and place.leaf is not MASKED
    }


def tried(spec: DepthSpec, places: Sequence[Place], treedef: Any) -> Grouping | None:
    """How the spec groups the tree, None where that is an error or couples nothing."""
    try:
        grouping = group_places(spec, places, treedef)
    except (TypeError, ValueError):
        return None
    fine = grouping.coupled and next(faults(grouping, strict=True), None) is None
    return grouping if fine else None


def fitting_preset(
    places: Sequence[Place], treedef: Any, at_least: Grouping | None
) -> DepthSpec | None:
    """A preset that couples all that is coupled here, and more; else None."""
    best = at_least
    for make, options in PRESET_TRIES:
        found = tried(make(**options), places, treedef)
        if found and (best is None or pairs_of(best) < pairs_of(found)):
            best = found
    return None if best is None or best is at_least else best.spec


def pairs_of(grouping: Grouping) -> set[tuple]:
    """The pairs of slices that are neighbors."""
    pairs = set()
    for group in grouping.coupled:
        where = [(member.leaf, member.axes) for member in group.members]
        slots = [(where[m], index) for m, index in group.slots]
        run = group.run_starts
        pairs |= {
            (slots[i], slots[i + 1])
            for i in range(len(slots) - 1)
            if run[i] == run[i + 1]
        }
    return pairs
