"""Groupings that are allowed, but that the reading of the tree doubts."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Group, Grouping, Member, group_places
from gradsmooth_optax._depth.paths import MASKED, Path, Place, show_path, some
from gradsmooth_optax._depth.reading import read
from gradsmooth_optax._depth.specs import DepthSpec
from gradsmooth_optax._depth.stack import Reading, Stack
from gradsmooth_optax._depth.words import VECTORS, meaning, split_number

# Kinds of layers that alternate. Others, such as img and txt, are parts of one layer.
_KINDS = {"local", "global", "sliding", "full"}


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
        yield from map(Doubt, _other_numbers(grouping))


def _doubts(grouping: Grouping, reading: Reading) -> Iterator[Doubt]:
    if not grouping.groups:
        return
    if not grouping.coupled:
        yield from map(Doubt, _nothing_coupled(grouping, reading))
        return
    # What a restriction leaves out is left out on purpose.
    held = _held(_unrestricted(grouping))
    takes_unnamed = any(
        path in held and not stack.is_named
        for stack in reading.stacks
        if stack.function == "scanned"
        for path in stack.depths
    )
    several = [stack for stack in reading.stacks if not stack.is_one_layer]
    is_rival_there = any(s.rivals and held.keys() & s.depths.keys() for s in several)
    for stack in several:
        found = _contradictions((stack,), held, takes_unnamed)
        if found and stack.rivals and held.keys() & stack.depths.keys():
            # One of two readings is enough, but all of it.
            others = _contradictions(stack.rivals, held, takes_unnamed)
            found = others and min(found, others, key=len)
        elif stack.rivals and not is_rival_there:
            continue  # it may be no stack
        yield from map(Doubt, found[:1])
    yield from _not_taken_for_layers(held, grouping, reading)
    yield from map(Doubt, _part_of_a_stack(held, reading))
    yield from map(Doubt, _kinds_of_modules(grouping))
    yield from map(Doubt, _not_stacked(grouping))
    yield from map(Doubt, _wrong_axes(grouping))
    yield from map(Doubt, _too_wide(grouping, reading))


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


def _unrestricted(grouping: Grouping) -> Grouping:
    spec = grouping.spec.unrestricted()
    if spec == grouping.spec:
        return grouping
    try:
        return group_places(spec, grouping.places, grouping.treedef)
    except ValueError:  # a leaf without the axis: that is why it is left out
        return grouping


def _held(grouping: Grouping) -> dict[Path, tuple[Group, Member]]:
    return {
        member.path: (group, member)
        for group in grouping.groups
        for member in group.members
    }


def _contradictions(
    stacks: Sequence[Stack],
    held: Mapping[Path, tuple[Group, Member]],
    takes_unnamed: bool,
) -> list[str]:
    found = (_contradiction(stack, held, takes_unnamed) for stack in stacks)
    return list(filter(None, found))


def _contradiction(
    stack: Stack, held: Mapping[Path, tuple[Group, Member]], takes_unnamed: bool
) -> str:
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
    if missing := _missing(stack, held) or _read_as_stacked(stack, there):
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


def _not_taken_for_layers(
    held: Mapping[Path, tuple[Group, Member]], grouping: Grouping, reading: Reading
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
                yield Doubt(f"couples {_shown(group)}: {reason}")
            continue
        if _place_of(stack) in beside:
            parts[_place_of(stack)].append(stack)
        if there:
            # Such as Haiku's, whose first one has no number.
            first = min(depth.layer for depth in stack.depths.values())
            is_without_first = all(stack.depths[path].layer > first for path in there)
            found = is_without_first and _missing(stack, held)
            if found := found or _read_as_stacked(stack, there):
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


def _missing(stack: Stack, held: Mapping[Path, tuple[Group, Member]]) -> str:
    """Layers of which nothing is taken, though of others something is."""
    there = {depth.layer for path, depth in stack.depths.items() if path in held}
    missing = sorted({depth.layer for depth in stack.depths.values()} - there)
    if not missing:
        return ""
    number = f"layer{'s' * (len(missing) > 1)} {some(missing)}"
    return f"leaves out {number} of {stack.reason}"


def _read_as_stacked(stack: Stack, there: Mapping[Path, tuple[Group, Member]]) -> str:
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


def _one_kind(stack: Stack, there: Mapping[Path, tuple[Group, Member]]) -> str:
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


def _counterparts(stack: Stack, there: Mapping[Path, tuple[Group, Member]]) -> str:
    """Layers of one stack that are coupled with others instead of with each other."""
    roles: dict[tuple, list[tuple[int, Path]]] = defaultdict(list)
    for path, (group, _) in there.items():
        depth = stack.depths[path]
        roles[depth.role, group.shape, group.dtype].append((depth.layer, path))
    is_list = stack.function == "unrolled" and stack.is_named
    for layers in roles.values():
        own, uncoupled = {path for _, path in layers}, True
        if stack.function == "unrolled" and (order := _another_order(layers, there)):
            return order if order != "mirrored" else ""
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
                f"these are neighbors of {stack.reason}; it couples {_shown(group)}"
            )
        if is_list and uncoupled and len(layers) > 1:
            return (
                f"couples no two of {some(sorted(map(show_path, own)), 3)}, though "
                f"these are in layers of {stack.reason}"
            )
    return _parts_of_one_layer(stack, there) if is_list else ""


def _another_order(
    layers: list[tuple[int, Path]], there: Mapping[Path, tuple[Group, Member]]
) -> str:
    """Layers of one group that do not follow each other by their numbers."""
    paths = [path for _, path in sorted(layers)]
    found = [_first(there[path][1]) for path in paths]
    if len({id(there[path][0]) for path in paths}) > 1 or found == sorted(found):
        return ""
    if found == sorted(found, reverse=True):
        return "mirrored"
    i = next(i for i, (a, b) in enumerate(itertools.pairwise(found)) if b < a)
    return (
        f"puts layers in another order than their numbers: {show_path(paths[i])} is "
        f"its layer {found[i]}, and {show_path(paths[i + 1])} its layer {found[i + 1]}"
    )


def _parts_of_one_layer(
    stack: Stack, there: Mapping[Path, tuple[Group, Member]]
) -> str:
    """A group that couples what the tree shows in one layer."""
    layers: dict[int, dict[int, Path]] = defaultdict(dict)
    for path, (group, member) in there.items():
        if group.run_lengths.max(initial=0) > 1:
            one = layers[id(group)].setdefault(stack.depths[path].layer, path)
            # Parts that are told apart by words may be positions, as local and global.
            is_part = not member.axes or _without_numbers(one) == _without_numbers(path)
            if one != path and is_part:
                return (
                    f"couples {show_path(one)} with {show_path(path)}, which are in "
                    f"one layer of {stack.reason}"
                )
    return ""


def _first(member: Member) -> int:
    return int(member.layers.flat[0]) if member.layers.size else 0


def _shown(group: Group) -> str:
    paths = [show_path(member.path) for member in group.members]
    return some(paths, 3) if len(paths) > 1 else f"the slices of {paths[0]}"


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


def _part_of_a_stack(
    held: Mapping[Path, tuple[Group, Member]], reading: Reading
) -> Iterator[str]:
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


def _kinds_of_modules(grouping: Grouping) -> Iterator[str]:
    """Neighbors that only happen to be called alike, as the biases of all modules."""
    modules: dict[Path, dict[str, int]] = defaultdict(dict)
    for path, leaf in zip(grouping.paths, grouping.leaves, strict=True):
        modules[path[:-1]][str(path[-1:])] = np.ndim(leaf)
    for group in grouping.coupled:
        paths = [member.path for member in group.members]
        for (m, index), (n, _) in group.neighbors if len(paths) > 1 else ():
            one, other = paths[m], paths[n]
            is_one_name = not index and one[-1:] == other[-1:]
            if is_one_name and _are_other_kinds(modules[one[:-1]], modules[other[:-1]]):
                yield (
                    f"couples {show_path(one)} with {show_path(other)}, which is in "
                    f"another kind of module"
                )
                return


def _not_stacked(grouping: Grouping) -> Iterator[str]:
    """A matrix with its vector, each of one layer, of which `scanned` takes an axis."""
    shapes = {
        path: np.shape(leaf)
        for path, leaf in zip(grouping.paths, grouping.leaves, strict=True)
    }
    for group in grouping.coupled:
        for member in group.members:
            path = member.path
            is_vector = path[-1:] and path[-1] in VECTORS and len(shapes[path]) == 1
            for name in ("kernel", "weight", "w") if member.axes and is_vector else ():
                if len(shapes.get((*path[:-1], name), ())) == 2:
                    yield (
                        f"takes axis 0 of leaf {show_path(path)} {shapes[path]} for "
                        f"depth, beside {name} {shapes[*path[:-1], name]}: probably "
                        f"these are of one layer and not stacked"
                    )
                    return


def _other_numbers(grouping: Grouping) -> Iterator[str]:
    """Leaves that are left out, though their paths only have another layer number."""
    held = _held(_unrestricted(grouping))
    alike: dict[str, dict[tuple[str, ...], Path]] = defaultdict(dict)
    for path in grouping.paths:
        numbers = re.findall(r"\d+", show_path(path))
        alike[_without_numbers(path)][tuple(numbers)] = path
    for text, paths in alike.items():
        taken = [n for n, path in paths.items() if _is_leaf_of_one(path, held)]
        for i in range(len(taken[0])) if len(taken) > 1 else ():
            others = {(*n[:i], *n[i + 1 :]) for n in taken}
            if len({n[i] for n in taken}) < 2 or len(others) == len(taken):
                continue  # these are no layers
            found = {
                (*n[:i], *n[i + 1 :]): p for n, p in paths.items() if p not in held
            }
            start, end = [m.span() for m in re.finditer("#", text)][i]
            for without in (text[:start], text[:start].rstrip("_")):
                found |= alike.get(without + text[end:], {})  # the first one
            for numbers, path in found.items():
                if numbers in others and path not in held:
                    yield (
                        f"leaves out {show_path(path)}, whose path has another number "
                        f"or none, but takes {show_path(paths[taken[0]])}"
                    )
                    return


def _without_numbers(path: Path) -> str:
    return re.sub(r"\d+", "#", show_path(path))


def _is_leaf_of_one(path: Path, held: Mapping[Path, tuple[Group, Member]]) -> bool:
    """Whether it is taken as one layer that has neighbors."""
    if path not in held:
        return False
    group, member = held[path]
    return not member.axes and group.run_lengths.max(initial=0) > 1


def _are_other_kinds(ranks: Mapping[str, int], others: Mapping[str, int]) -> bool:
    shared = ranks.keys() & others.keys()
    is_part = len(shared) == min(len(ranks), len(others))
    has_matrix = any(ranks[name] > 1 for name in shared)
    differ = any(ranks[name] != others[name] for name in shared)
    return differ or not (is_part or has_matrix)


def _wrong_axes(grouping: Grouping) -> Iterator[str]:
    """A scan axis that fits what a restriction keeps, but not the rest of the stack."""
    spec = grouping.spec.unrestricted()
    if spec == grouping.spec:
        return
    scans: dict[tuple, list[tuple[int, ...]]] = defaultdict(list)
    found = spec.assign(grouping.places)
    for place, assignment in zip(grouping.places, found, strict=True):
        if assignment and assignment.scan and place.leaf is not MASKED:
            depth = assignment.depth
            scans[depth.stack, as_tuple(depth.axis)].append(np.shape(place.leaf))
    for (stack, axes), shapes in scans.items():
        sizes = {shape[axes[0]] for shape in shapes if len(shape) > axes[0]}
        others = [
            axis
            for axis in range(min(map(len, shapes)))
            if len({shape[axis] for shape in shapes}) == 1
        ]
        if len(axes) == 1 < len(sizes) and others:
            yield (
                f"takes axis {axes[0]} of stack {stack!r} for depth, whose size "
                f"differs in the leaves that are left out; axis {others[0]} has size "
                f"{shapes[0][others[0]]} in all of them"
            )


def _too_wide(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """Leaves beside a stack that the same `scanned` takes."""
    stacks = [stack for stack in reading.stacks if not stack.is_one_layer]
    inside = {path for stack in stacks for path in stack.depths}
    scans: dict[DepthSpec, list[Member]] = defaultdict(list)
    for group in grouping.coupled:
        for member in group.members:
            if member.scan is not None:
                scans[member.scan].append(member)
    for scan, members in scans.items():
        taken = [m for m in members if m.path in inside]
        sizes = {m.layers.shape for m in taken}
        for member in members:
            in_layers = {"layers", "layers of parts"} & set(map(meaning, member.path))
            if not taken or member.path in inside or in_layers:
                continue
            is_named = _is_named_by(getattr(scan, "pattern", ""), member.path, taken)
            if member.layers.shape not in sizes or not is_named:
                yield (
                    f"takes axis {some(member.axes)} of leaf {show_path(member.path)} "
                    f"for {member.layers.size} layers, though it is in none of the "
                    f"stacks that the tree shows: the pattern of {scan!r} is probably "
                    f"too wide"
                )
                break


def _is_named_by(pattern: str, path: Path, taken: Sequence[Member]) -> bool:
    """Whether a pattern names a leaf, and does not just take it with its neighbors.

    The segment with which the path leaves those of the others is a word in it.
    """
    pairs = (zip(path, member.path, strict=False) for member in taken)
    shared = max(sum(1 for _ in _equal(pair)) for pair in pairs)
    name = str(path[min(shared, len(path) - 1)])
    stem, _ = split_number(name) or (name, 0)
    return not {name, stem, stem.rstrip("_")}.isdisjoint(re.findall(r"\w+", pattern))


def _equal(pairs: Iterable[tuple]) -> Iterator[tuple]:
    """The pairs up to the first that differs."""
    return itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)


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
