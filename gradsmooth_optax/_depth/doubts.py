"""Groupings that are allowed, but that the reading of the tree doubts: warnings."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Group, Grouping, Member, group_places
from gradsmooth_optax._depth.paths import MASKED, Path, show_path, some
from gradsmooth_optax._depth.proposals import fitting_preset, proposed, tried
from gradsmooth_optax._depth.reading import Reading, Stack, read
from gradsmooth_optax._depth.specs import (
    DepthSpec,
    is_default_unrolled,
    restricted_like,
)
from gradsmooth_optax._depth.structure import Fault
from gradsmooth_optax._depth.words import split_number


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


def message_of(fault: Fault, grouping: Grouping) -> str:
    """The error, with a call that was tried where the tree shows one."""
    if not fault.is_misread:
        return f"{fault.found} To fix: {fault.fix}."
    reading = read(grouping.places)
    found = fault.found
    if not reading.stacks and reading.left_out:
        found += f" The tree shows {reading.left_out[0].reason}."
    cure = _cure(grouping, reading)
    return f"{found} To fix: {cure}{'; or ' * bool(cure)}{fault.fix}."


def rivals_of(grouping: Grouping) -> Iterator[str]:
    """Where `unrolled()` would have to choose between two numbers: both calls."""
    if not is_default_unrolled(grouping.spec):
        return
    assigned = {grouping.paths[m.leaf] for g in grouping.groups for m in g.members}
    for stack in read(grouping.places).stacks:
        if stack.rivals and not assigned & stack.depths.keys():
            calls = [proposed([stack], grouping.places)]
            calls += [proposed(stack.rivals, grouping.places)]
            yield (
                f"`depth` {grouping.spec!r} finds two numbers that may be the layer's: "
                f"{stack.reason}; and {stack.rivals[0].reason}. To fix: write "
                f"`{calls[0]!r}` or `{calls[1]!r}`."
            )


def doubts(grouping: Grouping) -> list[str]:
    """What is probably not meant, each with a call that was tried on the tree."""
    if not grouping.groups:
        return []
    reading = read(grouping.places)
    found = [
        *_nothing_coupled(grouping, reading),
        *_left_out(grouping, reading),
        *_side_by_side(grouping, reading),
        *_wrong_axes(grouping),
    ]
    if not found:
        return []
    cure = _cure(grouping, reading)
    advice = f"To fix: {cure}" if cure else "No call was found that does better"
    return [
        f"`depth` {grouping.spec!r} {doubt}. {advice}; or pass `strict=False` if it is "
        f"meant."
        for doubt in found
    ]


def _cure(grouping: Grouping, reading: Reading) -> str:
    """A call that was tried, as advice; "" where none does."""
    places, treedef = grouping.places, grouping.treedef
    several = [stack for stack in reading.stacks if not stack.is_one_layer]
    certain = [stack for stack in several if stack.is_certain]
    for stacks in (certain, several):
        call = proposed(stacks, places)
        if call is None or call == grouping.spec:
            continue
        at_least = tried(call, places, treedef)
        call = fitting_preset(places, treedef, at_least) or call
        restricted = restricted_like(call, grouping.spec)
        if at_least and (good := tried(restricted, places, treedef)):
            if good.spec != grouping.spec and not _contradictions(good, reading):
                unsure = [d for s in stacks for d in s.doubts]
                return f"write `{restricted!r}`" + "".join(f", if it is so: {doubt}" for doubt in unsure[:1])
    return ""


def _nothing_coupled(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """No two layers are neighbors, though the tree seems to have layers."""
    if grouping.coupled:
        return
    numbers: dict[Hashable, set[int]] = defaultdict(set)
    for group in grouping.groups:
        numbers[group.stack].update(group.layers)
    has_layers = any(len(layers) > 1 for layers in numbers.values())
    has_layers |= any(left_out.is_beside for left_out in reading.left_out)
    shown = [stack for stack in reading.stacks if not stack.is_one_layer]
    if has_layers or shown:
        one = grouping.groups[0]
        yield (
            f"couples nothing: each of its {len(grouping.groups)} groups has one layer "
            f"without a neighbor, as stack {one.stack!r} for role {one.role!r} "
            f"({show_path(one.members[0].path)})"
            + "".join(f"; but the tree shows {s.reason}" for s in shown[:1])
        )


def _left_out(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """Stacks of the tree that are coupled in part, in another way or not at all."""
    if not grouping.coupled:
        return
    whole = _unrestricted(grouping)
    yield from _contradictions(whole, reading)


def _unrestricted(grouping: Grouping) -> Grouping:
    """Without restrictions: what they leave out is left out on purpose."""
    spec = grouping.spec.unrestricted()
    if spec == grouping.spec:
        return grouping
    try:
        return group_places(spec, grouping.places, grouping.treedef)
    except ValueError:  # a leaf without the axis: that is why it is left out
        return grouping


def _contradictions(grouping: Grouping, reading: Reading) -> list[str]:
    held = {
        grouping.paths[member.leaf]: (group, member)
        for group in grouping.groups
        for member in group.members
    }
    found = (
        _contradiction(stack, held) for stack in reading.stacks if not stack.rivals
    )
    return [text for text in found if text]


def _contradiction(stack: Stack, held: dict[Path, tuple[Group, Member]]) -> str:
    """What the grouping does to a stack that the tree shows, if that is another thing.

    A leaf that the grouping leaves out is a role that is left out, as long as the
    others of its layer are not.
    """
    there = {path: held[path] for path in stack.depths if path in held}
    if stack.is_one_layer:
        return ""
    if not there:
        if stack.is_certain or stack.is_named:
            return f"leaves out all of {stack.reason}"
        return ""
    for path, (_, member) in there.items():
        if 0 < len(member.axes) < stack.num_axes:
            return (
                f"takes axis {some(member.axes)} of leaf {show_path(path)} for depth, "
                f"but vectors have {stack.num_axes} axes beside their own: "
                f"{stack.reason}. Probably depth runs over all of them"
            )
    if stack.kinds and set(stack.kinds) <= _KINDS:
        return _one_kind(stack, there)
    if not stack.is_certain and not _is_cycle(stack):
        return ""
    if stack.function == "unrolled" or _is_cycle(stack):
        seen = {stack.depths[path].layer for path in there}
        if missing := sorted({d.layer for d in stack.depths.values()} - seen):
            number = f"layer{'s' * (len(missing) > 1)} {some(missing)}"
            return f"leaves out {number} of {stack.reason}"
    for path, (_, member) in there.items():
        axes = tuple(sorted(as_tuple(stack.depths[path].axis)))
        if stack.function == "unrolled" and _holds_one_layer(path, held):
            return (
                f"takes axis {some(member.axes)} of leaf {show_path(path)} for depth, "
                f"but the layers are leaves of their own: {stack.reason}"
            )
        if stack.function == "scanned" and not set(axes) <= set(member.axes):
            taken = f"axis {some(member.axes)}" if member.axes else "no axis"
            return (
                f"takes {taken} of leaf {show_path(path)} for depth, but the layers "
                f"are on axis {some(axes)}: {stack.reason}"
            )
    return _counterparts(stack, there)


# Kinds of layers that alternate. Others, such as img and txt, are parts of one layer.
_KINDS = {"local", "global", "sliding", "full"}


def _one_kind(stack: Stack, there: dict[Path, tuple[Group, Member]]) -> str:
    """Layers of one kind that are coupled over those of another kind."""
    groups = {
        kind: {id(g) for p, (g, _) in there.items() if f"_{kind}/" in show_path(p)}
        for kind in stack.kinds
    }
    if set.intersection(*groups.values()):
        return ""
    return (
        f"couples layers of one kind with each other: in {stack.reason}, all parts are "
        f"there as {some(stack.kinds)}, which are probably layers that follow each "
        f"other"
    )


def _is_cycle(stack: Stack) -> bool:
    return "stride" in stack.options


def _side_by_side(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """Models, experts, heads that are coupled with each other."""
    for left_out in reading.left_out:
        if not left_out.is_beside:
            continue
        start = len(left_out.node)
        for group in grouping.coupled:
            inside = [
                m.path
                for m in group.members
                if m.path[:start] == left_out.node
                and _is_one_of(m.path[start:], left_out.stem, m)
            ]
            one_inside = {show_path(path[start + 1 :]) for path in inside}
            if left_out.stem is None and inside or len(inside) > len(one_inside):
                yield f"couples {some(_paths(group), 3)}: {left_out.reason}"
                break


def _is_one_of(inside: Path, stem: str | None, member: Member) -> bool:
    """Whether a path in a node is in one of the siblings, or in what is stacked."""
    if stem is None:
        return bool(member.axes)
    split = split_number(inside[0]) if inside else None
    return split is not None and split[0] == stem


def _holds_one_layer(path: Path, held: dict[Path, tuple[Group, Member]]) -> bool:
    """Whether a leaf that is taken for stacked is a vector or a matrix by its name."""
    group, member = held[path]
    rank = len(group.shape) + len(member.axes)
    is_cycle = len(group.members) > 1
    needed = 1 + (not is_cycle and str(path[-1]) in ("kernel", "weight", "w"))
    return bool(member.axes) and rank <= needed


def _counterparts(stack: Stack, there: dict[Path, tuple[Group, Member]]) -> str:
    """Layers of one stack that are coupled with others instead of with each other."""
    roles: dict[tuple, list[tuple[int, Path]]] = defaultdict(list)
    for path, (group, _) in there.items():
        depth = stack.depths[path]
        roles[depth.role, group.shape, group.dtype].append((depth.layer, path))
    for layers in roles.values():
        own = {path for _, path in layers}
        for (_, one), (_, other) in itertools.pairwise(sorted(layers)):
            (group, member), (next_group, next_member) = there[one], there[other]
            if group is next_group and _first(member) < _first(next_member):
                continue
            # A part of the stack by itself is a boundary that was set on purpose.
            if not _is_cycle(stack) and {m.path for m in (*group.members, *next_group.members)} <= own:
                continue
            return (
                f"does not couple {show_path(one)} with {show_path(other)}, though "
                f"these are neighbors of {stack.reason}; it couples "
                f"{some(_paths(group), 3)}"
            )
    return ""


def _first(member: Member) -> int:
    return int(member.layers.flat[0]) if member.layers.size else 0


def _paths(group: Group) -> list[str]:
    if len(group.members) == 1:
        return [f"the slices of {show_path(group.members[0].path)}"]
    return [show_path(member.path) for member in group.members]


def _wrong_axes(grouping: Grouping) -> Iterator[str]:
    """A scan axis that fits what a restriction keeps, but not the rest of the stack."""
    spec = grouping.spec.unrestricted()
    if spec == grouping.spec:
        return
    scans: dict[tuple, list[tuple[Path, Any]]] = defaultdict(list)
    for (path, leaf, _), found in zip(
        grouping.places, spec.assign(grouping.places), strict=True
    ):
        if found and leaf is not MASKED and found.scan and np.ndim(leaf):
            key = (found.scan, found.depth.stack, found.depth.axis)
            scans[key].append((path, np.shape(leaf)))
    for (_, stack, axis), leaves in scans.items():
        (chosen,) = as_tuple(axis) if len(as_tuple(axis)) == 1 else (None,)
        if chosen is None:
            continue
        sizes = {shape[chosen] for _, shape in leaves if len(shape) > chosen}
        rank = min(len(shape) for _, shape in leaves)
        others = [
            a for a in range(rank) if len({shape[a] for _, shape in leaves}) == 1
        ]
        if len(sizes) > 1 and others and chosen not in others:
            yield (
                f"takes axis {chosen} of stack {stack!r} for depth, whose size differs "
                f"in the leaves that are left out; axis {others[0]} has size "
                f"{leaves[0][1][others[0]]} in all of them"
            )


def unknown_stacks(spec: DepthSpec, places: Sequence[Any]) -> list[Stack]:
    """Stacked layers of the tree that the spec does not know."""
    located = zip(places, spec.locate(places), strict=True)
    known = {place.path for place, found in located if found is not None}
    return [
        stack
        for stack in read(places).stacks
        if stack.function == "scanned" and stack.depths.keys() - known
    ]
