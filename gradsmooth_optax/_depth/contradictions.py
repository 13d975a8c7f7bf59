"""What a grouping does to a stack that the tree shows, if that is another thing."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Group, Held, Member
from gradsmooth_optax._depth.paths import Path, show_path, some, without_numbers
from gradsmooth_optax._depth.stack import Stack

# Kinds of layers that alternate. Others, such as img and txt, are parts of one layer.
_KINDS = {"local", "global", "sliding", "full"}


def contradictions(
    stacks: Sequence[Stack], held: Held, takes_unnamed: bool
) -> list[str]:
    """What the grouping does to the stacks of one reading, where it is another thing.

    Args:
      stacks: of the reading.
      held: what the grouping takes.
      takes_unnamed: whether it takes a scan that is not called layers.
    """
    found = (_contradiction(stack, held, takes_unnamed) for stack in stacks)
    return list(filter(None, found))


def _contradiction(stack: Stack, held: Held, takes_unnamed: bool) -> str:
    """What the grouping does to a stack that the tree shows, if that is another thing.

    A leaf that the grouping leaves out is a role that is left out, as long as the
    others of its layer are not. Stacks that are not called layers are missed where
    there are none that are, or another one is taken.
    """
    there = {path: held[path] for path in stack.depths if path in held}
    if not stack.depths:
        return ""  # all of it is masked
    if not there:
        is_unrolled = stack.function == "unrolled" and not stack.is_minor
        is_meant = stack.is_named or is_unrolled or takes_unnamed
        return f"leaves out all of {stack.reason}" if is_meant else ""
    for path, (_, member) in there.items():
        if 0 < len(member.axes) < stack.num_axes:
            return (
                f"takes axis {some(member.axes)} of leaf {show_path(path)} for depth, "
                f"but vectors have {stack.num_axes} axes beside their own: "
                f"{stack.reason}. Probably depth runs over all of them"
            )
    if stack.kinds and set(stack.kinds) <= _KINDS:
        return _one_kind(stack, there)
    may_be_cycle = stack.function != "scanned" or stack.is_cycle or stack.may_be_cycle
    if parts := "" if may_be_cycle else _parts_of_one_layer(stack, there):
        return parts
    is_named_list = stack.function == "unrolled" and stack.is_named
    is_read = not stack.doubts or stack.is_cycle or is_named_list
    if not is_read and not (stack.function == "scanned" and stack.is_named):
        return ""
    if missing := missing_layers(stack, held) or read_as_stacked(stack, there):
        return missing
    for path, (_, member) in there.items():
        axes = set(as_tuple(stack.depths[path].axis))
        is_wrong = not axes <= set(member.axes) and (stack.is_on_axis or is_read)
        if stack.function == "scanned" and (is_wrong or not member.axes):
            taken = f"axis {some(member.axes)}" if member.axes else "no axis"
            return (
                f"takes {taken} of leaf {show_path(path)} for depth, but the layers "
                f"are on axis {some(sorted(axes))}: {stack.reason}"
            )
    return _counterparts(stack, there) if is_read else ""


def missing_layers(stack: Stack, held: Held) -> str:
    """Layers of which nothing is taken, though of others something is."""
    there = {depth.layer for path, depth in stack.depths.items() if path in held}
    missing = sorted({depth.layer for depth in stack.depths.values()} - there)
    if not missing:
        return ""
    number = f"layer{'s' * (len(missing) > 1)} {some(missing)}"
    return f"leaves out {number} of {stack.reason}"


def read_as_stacked(stack: Stack, there: Held) -> str:
    """Layers that are leaves of their own, of which an axis is taken for depth."""
    for path, (group, member) in there.items():
        if stack.function == "unrolled" and member.axes:
            # A cycle has a stride, and couples the siblings with each other.
            is_alone = len(group.members) == 1
            if _is_one_layer(group, member) or (is_alone and not _has_stride(member)):
                return (
                    f"takes axis {some(member.axes)} of leaf {show_path(path)} for "
                    f"depth, but there are {stack.reason}. Probably the layers are "
                    f"leaves of their own; were they positions of a cycle, they would "
                    f"need a `stride`"
                )
    return ""


def _has_stride(member: Member) -> bool:
    return getattr(member.scan, "stride", None) is not None


def _is_one_layer(group: Group, member: Member) -> bool:
    """Whether the leaf holds no more than one layer: a vector, or a matrix of Flax."""
    needed = 3 if member.path and member.path[-1] == "kernel" else 2
    return len(group.shape) + len(member.axes) < needed


def _one_kind(stack: Stack, there: Held) -> str:
    """Layers of one kind that are coupled over those of another kind."""
    groups = [
        {id(group) for p, (group, _) in there.items() if f"_{kind}/" in show_path(p)}
        for kind in stack.kinds
    ]
    if set.intersection(*groups):
        return ""
    return (
        f"couples layers of one kind with each other: in {stack.reason}, all parts are "
        f"there as {some(stack.kinds)}, which are probably layers that follow each "
        f"other"
    )


def _counterparts(stack: Stack, there: Held) -> str:
    """Layers of one stack that are coupled with others instead of with each other."""
    roles: dict[tuple, list[tuple[int, Path]]] = defaultdict(list)
    for path, (group, _) in there.items():
        depth = stack.depths[path]
        roles[depth.role, group.shape, group.dtype].append((depth.layer, path))
    is_list = stack.function == "unrolled" and stack.is_named
    for layers in roles.values():
        own, uncoupled = {path for _, path in layers}, True
        order = _order(layers, there) if stack.function == "unrolled" else []
        if len(order) > 1 and order == sorted(order, reverse=True):
            continue  # counted from the last one
        if order != sorted(order):
            return _another_order([path for _, path in sorted(layers)], order)
        for (a, one), (b, other) in itertools.pairwise(sorted(layers)):
            (group, member), (next_group, next_member) = there[one], there[other]
            if group is next_group and _first(member) < _first(next_member):
                uncoupled = False
                continue
            # A part of the stack by itself is a boundary that was set on purpose, but
            # not one layer alone with a number of another kind.
            all_members = (*group.members, *next_group.members)
            is_own = {m.path for m in all_members} <= own and not stack.is_cycle
            is_alone = is_list and min(group.num_layers, next_group.num_layers) < 2
            if is_own and not (
                is_alone and _first(next_member) - _first(member) < b - a
            ):
                continue
            return (
                f"does not couple {show_path(one)} with {show_path(other)}, though "
                f"these are neighbors of {stack.reason}; it couples "
                f"{shown_group(group)}"
            )
        if is_list and uncoupled and len(layers) > 1:
            return (
                f"couples no two of {some(sorted(map(show_path, own)), 3)}, though "
                f"these are in layers of {stack.reason}"
            )
    return _parts_of_one_layer(stack, there) if is_list else ""


def _order(layers: list[tuple[int, Path]], there: Held) -> list[int]:
    """The numbers that one group gives to the layers; of several groups none."""
    held = [there[path] for _, path in sorted(layers)]
    are_together = len({id(group) for group, _ in held}) == 1
    return [_first(member) for _, member in held] if are_together else []


def _another_order(paths: Sequence[Path], order: Sequence[int]) -> str:
    """Layers that do not follow each other by their numbers."""
    i = next(i for i, (a, b) in enumerate(itertools.pairwise(order)) if b < a)
    return (
        f"puts layers in another order than their numbers: {show_path(paths[i])} is "
        f"its layer {order[i]}, and {show_path(paths[i + 1])} its layer {order[i + 1]}"
    )


def _parts_of_one_layer(stack: Stack, there: Held) -> str:
    """A group that couples what the tree shows in one layer."""
    layers: dict[int, dict[int, Path]] = defaultdict(dict)
    for path, (group, member) in there.items():
        if group.run_lengths.max(initial=0) > 1:
            one = layers[id(group)].setdefault(stack.depths[path].layer, path)
            # Parts that are told apart by words may be positions, as local and global.
            is_part = not member.axes or without_numbers(one) == without_numbers(path)
            if one != path and is_part:
                return (
                    f"couples {show_path(one)} with {show_path(path)}, which are in "
                    f"one layer of {stack.reason}"
                )
    return ""


def _first(member: Member) -> int:
    return int(member.layers.flat[0]) if member.layers.size else 0


def shown_group(group: Group) -> str:
    paths = [show_path(member.path) for member in group.members]
    return some(paths, 3) if len(paths) > 1 else f"the slices of {paths[0]}"
