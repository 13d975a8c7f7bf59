"""Groupings that are allowed, but that the reading of the tree doubts."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradsmooth_optax._depth.contradictions import (
    contradictions,
    missing_layers,
    read_as_stacked,
    shown_group,
)
from gradsmooth_optax._depth.groups import Group, Grouping, Held, unrestricted
from gradsmooth_optax._depth.oddities import oddities, other_numbers
from gradsmooth_optax._depth.paths import Path, Place, show_path, some
from gradsmooth_optax._depth.reading import read
from gradsmooth_optax._depth.specs import DepthSpec
from gradsmooth_optax._depth.stack import Reading, Stack


class DepthWarning(UserWarning):
    """A grouping that is allowed, but probably not what was meant.

    Given by `init` and at the trace of `update` where `strict`, the same one once for
    each transformation. `describe` shows it too.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import warnings
      >>> params = {f"Net_0/Block_{i}": {"w": jnp.ones(2)} for i in range(3)}
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     state = gs.smooth_over_depth(gs.unrolled(r"Net_(\\d+)/")).init(params)
      >>> [warning.category.__name__ for warning in caught]
      ['DepthWarning']
    """


_BETWEEN = {"gradsmooth_optax", "optax", "jax"}


def warn(message: str) -> None:
    """Gives a `DepthWarning` at the line that called this library, optax or jax."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and _package_of(frame.f_globals) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DepthWarning, stacklevel=level)


def _package_of(names: Mapping[str, Any]) -> str:
    return str(names.get("__name__")).partition(".")[0]


class Doubt(NamedTuple):
    """What is probably not meant.

    Attributes:
      found: what the grouping does, to be read after its spec.
      missed: what it leaves out and the reading does not take for layers.
    """

    found: str
    missed: tuple[Stack, ...] = ()


def doubts(grouping: Grouping, reading: Reading) -> Iterator[Doubt]:
    """What is probably not meant."""
    found = _doubts(grouping, reading)
    if (first := next(found, None)) is not None:
        yield from (first, *found)
    elif grouping.coupled:  # what no reading is needed for
        yield from map(Doubt, other_numbers(grouping))


def _doubts(grouping: Grouping, reading: Reading) -> Iterator[Doubt]:
    if not grouping.groups:
        return
    if not grouping.coupled:
        yield from map(Doubt, _nothing_coupled(grouping, reading))
        return
    # What a restriction leaves out is left out on purpose.
    held = unrestricted(grouping).held
    takes_unnamed = any(
        path in held and not stack.is_named
        for stack in reading.stacks
        if stack.function == "scanned"
        for path in stack.depths
    )
    several = [stack for stack in reading.stacks if not stack.is_one_layer]
    is_rival_there = any(s.rivals and held.keys() & s.depths.keys() for s in several)
    for stack in several:
        found = contradictions((stack,), held, takes_unnamed)
        if found and stack.rivals and held.keys() & stack.depths.keys():
            # One of two readings is enough, but all of it.
            others = contradictions(stack.rivals, held, takes_unnamed)
            found = others and min(found, others, key=len)
        elif stack.rivals and not is_rival_there:
            continue  # it may be no stack
        yield from map(Doubt, found[:1])
    yield from _not_taken_for_layers(held, grouping, reading)
    yield from map(Doubt, _part_of_a_stack(held, reading))
    yield from map(Doubt, oddities(grouping, reading))


def _nothing_coupled(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """No two layers are neighbors, though the tree seems to have layers."""
    numbers: dict[Hashable, set[int]] = defaultdict(set)
    for group in grouping.groups:
        numbers[group.stack].update(group.layers)
    shown = [stack.reason for stack in reading.stacks if not stack.is_one_layer]
    shown += [left_out.reason for left_out in reading.left_out if left_out.is_apart]
    if shown or any(len(layers) > 1 for layers in numbers.values()):
        one = grouping.groups[0]
        yield (
            f"couples nothing: each of its {len(grouping.groups)} groups has one layer "
            f"without a neighbor, as stack {one.stack!r} for role {one.role!r} "
            f"({show_path(one.members[0].path)})"
            + "".join(f"; but the tree shows {reason}" for reason in shown[:1])
        )


def _not_taken_for_layers(
    held: Held, grouping: Grouping, reading: Reading
) -> Iterator[Doubt]:
    """What is coupled though it is apart, and what is left out beside its like."""
    beside = {
        _place_of(stack)
        for stack in (*reading.stacks, *(left.stack for left in reading.left_out))
        if stack.function == "unrolled" and held.keys() & stack.depths.keys()
    }
    parts: dict[Hashable, list[Stack]] = defaultdict(list)
    for reason, stack, is_apart in reading.left_out:
        there = {path: held[path] for path in stack.depths if path in held}
        if is_apart:
            if group := _coupled_apart(stack, grouping):
                yield Doubt(f"couples {shown_group(group)}: {reason}")
            continue
        if _place_of(stack) in beside:
            parts[_place_of(stack)].append(stack)
        if there:
            # Such as Haiku's, whose first one has no number.
            first = min(depth.layer for depth in stack.depths.values())
            is_without_first = all(stack.depths[path].layer > first for path in there)
            found = is_without_first and missing_layers(stack, held)
            if found := found or read_as_stacked(stack, there):
                yield Doubt(found, (stack,))
        elif stack.is_named:
            yield Doubt(f"leaves out all of {reason}", (stack,))
    for stacks in parts.values():
        if missing := [s for s in stacks if not held.keys() & s.depths.keys()]:
            names = [str(next(iter(s.depths.values())).stack) for s in missing]
            yield Doubt(
                f"leaves out {some(names)}, which stand beside what it takes and are "
                f"as many: probably parts of the same layers",
                tuple(stacks),
            )


def _place_of(stack: Stack) -> tuple[str, frozenset[int], bool]:
    """Where its siblings are, their numbers, and whether they are lone arrays.

    Equal for lists side by side, of parts of the same layers.
    """
    depths = stack.depths.values()
    name = next((str(depth.stack) for depth in depths), "")
    numbers = frozenset(depth.layer for depth in depths)
    return name.rpartition("/")[0], numbers, any(not depth.role for depth in depths)


def _coupled_apart(stack: Stack, grouping: Grouping) -> Group | None:
    """A group that couples models, experts or heads with each other."""
    for group in grouping.coupled:
        layers: dict[Hashable, set[int]] = defaultdict(set)
        for member in group.members:
            if found := stack.depths.get(member.path):
                if stack.function == "scanned" and member.axes:
                    return group
                if not member.axes:
                    layers[found.role].add(found.layer)
        if any(len(numbers) > 1 for numbers in layers.values()):
            return group
    return None


def _part_of_a_stack(held: Held, reading: Reading) -> Iterator[str]:
    """One stack as a whole, and of another one a node inside that is called alike."""
    stacks = [s for s in reading.stacks if s.function == "scanned" and s.is_named]
    wholes = [s for s in stacks if s.depths.keys() <= held.keys()]
    scans = {held[path][1].scan: s for s in wholes for path in s.depths}
    for stack in stacks:
        there = [path for path in stack.depths if path in held]
        whole = scans.get(held[there[0]][1].scan) if there else None
        if whole and len(there) < len(stack.depths):
            yield (
                f"takes {show_path(there[0])} and {len(there) - 1} more of the "
                f"{len(stack.depths)} leaves of {stack.reason}; but all of "
                f"{whole.reason}"
            )


def unknown_stacks(
    spec: DepthSpec, places: Sequence[Place]
) -> Iterator[tuple[str, list[Path]]]:
    """Why some leaves look stacked, and which of them the spec does not know."""
    located = zip(places, spec.locate(places), strict=True)
    known = {place.path for place, found in located if found is not None}
    reading = read(places)
    stacks = [(s.reason, s) for s in reading.stacks if s.is_certain or s.is_named]
    stacks += [(reason, stack) for reason, stack, _ in reading.left_out]
    for reason, stack in stacks:
        unknown = [path for path in stack.depths if path not in known]
        if stack.function == "scanned" and unknown:
            yield reason, unknown
