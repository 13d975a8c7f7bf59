"""Calls that find the layers which a tree shows, tried on it before they are said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.doubts import doubts
from gradsmooth_optax._depth.groups import Grouping, group_places
from gradsmooth_optax._depth.paths import MASKED, Place
from gradsmooth_optax._depth.preset_registry import TRIES
from gradsmooth_optax._depth.specs import (
    DepthSpec,
    first_match,
    is_default_unrolled,
    ranked,
    restricted_like,
    scanned,
    unrolled,
)
from gradsmooth_optax._depth.stack import Reading, Stack
from gradsmooth_optax._depth.structure import Fault, faults


def proposed(stacks: Sequence[Stack], places: Sequence[Place]) -> DepthSpec | None:
    """The fewest specs, of short patterns, that find these stacks and nothing else."""
    members, left = [], list(stacks)
    while left:
        found = ((spec, _covered(spec, left, places)) for spec in _specs(left[0]))
        alone = (list(_specs(left[0]))[-1], left[:1])
        spec, covered = next((pair for pair in found if pair[1]), alone)
        members.append(spec)
        left = [stack for stack in left if stack not in covered]
    return first_match(*members) if len(members) > 1 else next(iter(members), None)


def _specs(stack: Stack) -> Iterator[DepthSpec]:
    make = unrolled if stack.function == "unrolled" else scanned
    for pattern in stack.patterns:
        spec = make(pattern, **stack.options)
        yield ranked(spec) if stack.ranked else spec


def _covered(
    spec: DepthSpec, stacks: list[Stack], places: Sequence[Place]
) -> list[Stack]:
    """The stacks that the spec finds, the first among them; [] if it finds others."""
    found = {
        place.path: assignment.depth
        for place, assignment in zip(places, spec.assign(places), strict=True)
        if assignment is not None and place.leaf is not MASKED
    }
    covered = [
        stack
        for stack in stacks
        if stack.ranked == stacks[0].ranked and stack.depths.items() <= found.items()
    ]
    finds_others = sum(len(stack.depths) for stack in covered) < len(found)
    return [] if finds_others or stacks[0] not in covered else covered


def best_spec(
    stacks: Sequence[Stack], reading: Reading, places: Sequence[Place], treedef: Any
) -> DepthSpec | None:
    """What finds the stacks: a preset if one couples all of that and more."""
    spec = proposed(stacks, places)
    if spec is None:
        return None
    found = _tried(spec, reading, places, treedef)
    least, fitting = (_pairs(found), [found]) if found else (set(), [])
    inside = {path for stack in stacks for path in stack.depths}
    for make, options in TRIES:
        other = _tried(make(**options), reading, places, treedef)
        if other and least < _pairs(other) and _is_along(other, stacks):
            taken = (m.path for group in other.coupled for m in group.members)
            fitting += [other] * inside.issuperset(taken)
    # Of those that couple as much the one that is shortest to write.
    fitting.sort(key=lambda g: (-len(_pairs(g)), len(repr(g.spec))))
    return fitting[0].spec if fitting else None


def _tried(
    spec: DepthSpec, reading: Reading, places: Sequence[Place], treedef: Any
) -> Grouping | None:
    """How the spec groups the tree; None if that is wrong, doubted or no coupling."""
    try:
        grouping = group_places(spec, places, treedef)
    except (TypeError, ValueError):
        return None
    return None if _wrong(grouping, reading) else grouping


def _wrong(grouping: Grouping, reading: Reading) -> str:
    """What is said of a grouping, if anything is."""
    for found, fix, _ in faults(grouping, strict=True):
        return f"{found} To fix: {fix}."
    for found, _ in doubts(grouping, reading):
        return f"`depth` {grouping.spec!r} {found}."
    return "" if grouping.coupled else f"`depth` {grouping.spec!r} couples nothing."


def why_not(
    spec: DepthSpec, reading: Reading, places: Sequence[Place], treedef: Any
) -> str:
    """What is said of a call on this tree."""
    try:
        return _wrong(group_places(spec, places, treedef), reading)
    except (TypeError, ValueError) as error:
        return str(error)


def _is_along(grouping: Grouping, stacks: Sequence[Stack]) -> bool:
    """Whether the axes over which the stacks are scanned are those of depth."""
    axes = {m.path: set(m.axes) for group in grouping.groups for m in group.members}
    return all(
        set(as_tuple(depth.axis)) <= axes.get(path, set())
        for stack in stacks
        for path, depth in stack.depths.items()
    )


def _pairs(grouping: Grouping) -> set[tuple]:
    """The pairs of slices that are neighbors."""
    pairs = set()
    for group in grouping.coupled:
        where = [(member.leaf, member.axes) for member in group.members]
        pairs |= {
            tuple((where[m], index) for m, index in pair) for pair in group.neighbors
        }
    return pairs


# -- What is said ----------------------------------------------------------------------


def errors(
    grouping: Grouping, strict: bool, wholes: Sequence[Any] | None = None
) -> Iterator[str]:
    """What is wrong with a grouping, each with a call that was tried on the tree."""
    if strict and is_default_unrolled(grouping.spec):
        yield from _rivals(grouping)
    for fault in faults(grouping, strict, wholes):
        yield _message(fault, grouping)


def _rivals(grouping: Grouping) -> Iterator[str]:
    """Where `unrolled()` would have to choose between two numbers: both calls."""
    assigned = {m.path for group in grouping.groups for m in group.members}
    stacks = [s for s in grouping.reading.stacks if s.rivals or not s.is_one_layer]
    rest = [stack for stack in stacks if not assigned & stack.depths.keys()]
    stack = next((stack for stack in rest if stack.rivals), None)
    if stack:
        outer = proposed(stacks, grouping.places)
        inner = call_of_rivals(stacks, grouping.places)
        yield (
            f"`depth` {grouping.spec!r} finds two numbers that may be the layer's: "
            f"{stack.reason}; and {stack.rivals[0].reason}. To fix: write `{outer!r}` "
            f"or "
            + (f"`{inner!r}`." if inner else "`strict=False`, to couple nothing.")
        )


def call_of_rivals(
    stacks: Sequence[Stack], places: Sequence[Place]
) -> DepthSpec | None:
    """What takes the rivals of stacks; None where each of those is one layer."""
    inner = [rival for stack in stacks for rival in stack.rivals or (stack,)]
    several = [stack for stack in inner if not stack.is_one_layer]
    return proposed(several, places)


def _message(fault: Fault, grouping: Grouping) -> str:
    if not fault.is_misread:
        return f"{fault.found} To fix: {fault.fix}."
    reading, found, missed = grouping.reading, fault.found, ()
    if not reading.stacks and reading.left_out:
        found += f" The tree shows {reading.left_out[0].reason}."
        missed = tuple(left.stack for left in reading.left_out if not left.is_apart)
    cure = _cure(grouping, reading, found, missed)
    if_so = "if those are the layers, " * bool(cure and missed)
    return f"{found} To fix: {if_so}{cure}{'; or ' * bool(cure)}{fault.fix}."


def warnings_of(grouping: Grouping) -> list[str]:
    """What is doubted, each with a call that was tried on the tree."""
    warnings = []
    for found, missed in doubts(grouping, grouping.reading):
        cure = _cure(grouping, grouping.reading, found, missed)
        advice = f"To fix: {cure}" if cure else "No call was found that does better"
        stop = "" if found.endswith("?") else "."
        warnings.append(
            f"`depth` {grouping.spec!r} {found}{stop} {advice}; or pass `strict=False` "
            f"if it is meant."
        )
    return warnings


def _cure(
    grouping: Grouping, reading: Reading, found: str, missed: Sequence[Stack]
) -> str:
    """A call that was tried, as advice; "" where none does better."""
    several = [stack for stack in reading.stacks if not stack.is_one_layer]
    certain = [stack for stack in several if stack.is_certain]
    with_missed = [*several, *missed] if missed else []
    taken = {member.path for group in grouping.groups for member in group.members}
    beside = ((with_missed, True), (missed, True))
    for stacks, is_added in (*beside, (certain, False), (several, False)):
        spec = best_spec(stacks, reading, grouping.places, grouping.treedef)
        call = spec and restricted_like(spec, grouping.spec)
        # What the reading does not take for layers is only added to what is taken.
        inside = {path for stack in stacks for path in stack.depths}
        if call and call != grouping.spec and not (is_added and not taken <= inside):
            unsure = [d for stack in stacks for d in stack.doubts if d not in found]
            restricted = " with the same restriction" * (call != spec)
            doubt = "".join(f" (if it is that: {doubt})" for doubt in unsure[:1])
            return f"write `{spec!r}`{restricted}{doubt}"
    return ""
