"""What is certainly wrong with a grouping, whatever the tree is of."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gradsmooth_optax._depth.groups import Group, Grouping, Member, name_of
from gradsmooth_optax._depth.paths import MASKED, show_path, some
from gradsmooth_optax._depth.specs import DepthSpec


class Fault(NamedTuple):
    """What is wrong.

    Attributes:
      found: what was found, and the likely cause.
      fix: how to write it, where the tree shows nothing better.
      is_misread: whether the layers may be elsewhere, so that a reading of the tree
        may know a better call.
    """

    found: str
    fix: str
    is_misread: bool = False


def faults(
    grouping: Grouping, strict: bool, wholes: Sequence[Group] | None = None
) -> Iterator[Fault]:
    """What is certainly wrong with a grouping.

    Args:
      grouping: of the tree to be smoothed. A tree without leaves is never wrong.
      strict: whether gaps, a scan of unequal leaves, and a spec that matches nothing
        are wrong too.
      wholes: the groups whose gaps are looked for, None for those of the tree: a stage
        of a circular pipeline has some.
    """
    if grouping.paths and not grouping.groups and strict:
        yield _nothing_matched(grouping)
    if strict:
        yield from _unequal_scans(grouping)
    for group in grouping.groups:
        if group.duplicates:
            yield _duplicate(group)
    yield from _other_numbers_of_layers(grouping)
    for group in grouping.groups if wholes is None else wholes:
        if strict and group.missing:
            yield _gap(group, grouping)


def _nothing_matched(grouping: Grouping) -> Fault:
    if grouping.paths == ((),):
        (leaf,) = grouping.leaves
        if not hasattr(leaf, "shape") and not isinstance(leaf, float | complex):
            return Fault(
                f"`depth` cannot find layers in a tree that is one leaf of type "
                f"{type(leaf).__name__}. This is probably a module in place of its "
                f"parameters.",
                "pass the parameters, such as `model.init(...)['params']`, "
                "`nnx.state(model, nnx.Param)` or `eqx.filter(model, "
                "eqx.is_inexact_array)`",
            )
        return Fault(
            f"`depth` cannot find layers in a tree that is one lone array of shape "
            f"{np.shape(leaf)}. The tree is probably hidden by `optax.flatten`.",
            "smooth outside of it: `chain(flatten(base), smooth_over_depth(depth))`; "
            "or write `scanned('', axis=0)` if the array is a stack of layers",
        )
    paths = [show_path(path) for path in grouping.paths]
    places = grouping.places
    is_there = [place.leaf is not MASKED for place in places]

    def count(spec: DepthSpec) -> int:
        assigned = zip(spec.assign(places), is_there, strict=True)
        return sum(a is not None and there for a, there in assigned)

    if matched := count(grouping.spec):
        return Fault(
            f"`depth` {grouping.spec!r} matches {matched} of the {len(paths)} leaves, "
            f"but none of floating or complex dtype, and others pass through: "
            f"{some(paths, 12)}.",
            "let it match the parameters",
        )
    unrestricted = grouping.spec.unrestricted()
    if unrestricted != grouping.spec and count(unrestricted):
        return Fault(
            f"`depth` {grouping.spec!r} matches {count(unrestricted)} of the "
            f"{len(paths)} leaves, but its restriction leaves out all of them: "
            f"{some(paths, 12)}. Probably no leaf is named as a kernel or weight, or "
            f"the predicate tests other names.",
            "write `.only(lambda path, leaf: ...)` for these paths",
        )
    return Fault(
        f"`depth` {grouping.spec!r} matched none of the {len(paths)} leaves of the "
        f"tree: {some(paths, 12)}. It is probably written for another tree, or the "
        f"layers are masked here.",
        "write `unrolled(pattern)` with the layer's number in parentheses for one leaf "
        "per layer, or `scanned(pattern, axis=0)` for stacked layers, as the paths "
        "here are (`print(detect(params))` shows what the tree looks like); or pass "
        "`strict=False` if this tree may hold no layers",
        is_misread=True,
    )


def _unequal_scans(grouping: Grouping) -> Iterator[Fault]:
    """Leaves stacked by one scan hold equally many layers, or the axis is wrong."""
    scans: dict[tuple, list[Member]] = defaultdict(list)
    for group in grouping.groups:
        for member in group.members:
            if member.scan is not None:
                # Of one position: a cycle may stop before its end.
                first = int(member.layers.flat[0]) if member.layers.size else None
                scans[member.scan, group.stack, first].append(member)
    for (scan, stack, _), members in scans.items():
        sizes = Counter(member.layers.shape for member in members)
        if len(sizes) == 1:
            continue
        usual = sizes.most_common(1)[0][0]
        one = next(m for m in members if m.layers.shape == usual)
        others = [m for m in members if m.layers.shape != usual]

        def saying(member: Member) -> str:
            shape = np.shape(grouping.leaves[member.leaf])
            return f"{member.layers.size} in {show_path(member.path)} {shape}"

        yield Fault(
            f"`depth` {scan!r} finds different numbers of layers in leaves of stack "
            f"{stack!r}: {saying(one)}, but {some([saying(m) for m in others], 3)}. "
            f"Leaves stacked by one scan hold equally many layers. Probably the "
            f"pattern takes leaves that are not stacked, or the axis is another one.",
            "let the pattern end in the name of the stacked node and '/', pass the "
            "right `axis=`, or leave the others out with `.only(lambda path, leaf: "
            "...)`; `strict=False` takes them as they are",
            is_misread=True,
        )


def _other_numbers_of_layers(grouping: Grouping) -> Iterator[Fault]:
    """Stacks that have another `num_layers` than their spec says."""
    said: dict[Hashable, set[int]] = defaultdict(set)
    layers: dict[Hashable, set[int]] = defaultdict(set)
    holders: dict[Hashable, list[str]] = defaultdict(list)
    if all(a is None or a.num_layers is None for a in grouping.assignments):
        return
    places = grouping.places
    for (path, leaf, _), found in zip(
        places, grouping.spec.locate(places), strict=True
    ):
        if found is None or (leaf is MASKED and found.depth.axis is not None):
            continue
        depth, shape = found.depth, np.shape(leaf if leaf is not MASKED else 0)
        if found.num_layers is not None:
            said[depth.stack].add(found.num_layers)
        try:
            numbers = depth.layers(shape)
        except IndexError:  # without the axis, and left out
            continue
        layers[depth.stack] |= set(numbers.ravel().tolist())
        holders[depth.stack].append(f"{numbers.size} in {show_path(path)} {shape}")
    for stack, numbers_said in said.items():
        for number in numbers_said - {len(layers[stack])}:
            yield Fault(
                f"`depth` {grouping.spec!r} says num_layers={number}, but stack "
                f"{stack!r} has {len(layers[stack])}: {some(holders[stack], 3)}. "
                f"Probably the axis or the pattern is of something else, or the model "
                f"has another depth.",
                f"check `print(describe(depth, params))` and write "
                f"`num_layers={len(layers[stack])}` if that is the depth",
            )


def _duplicate(group: Group) -> Fault:
    layer = group.duplicates[0]
    paths = group.paths_of(layer)
    holders = [member for member in group.members if (member.layers == layer).any()]
    given = f"`depth` gives layer {layer} of {name_of(group.stack, group.role)} to"
    if len(paths) == 1:
        return Fault(
            f"{given} several slices of leaf {paths[0]}: its strides overlap.",
            "write the step along each axis, as in `axis=(0, 1), stride=(4, 1)`",
        )
    if all(member.axes for member in holders):
        return Fault(
            f"{given} {len(paths)} stacked leaves: {some(paths)}. They are parts of "
            f"one layer, positions in a cycle of layers, or parts of one chain.",
            f"for parts of a layer let the pattern end before their names; for a cycle "
            f"take the position into it and give the length, "
            f"`stride={len(group.members)}`; shift a part of a chain with `start=`; or "
            f"name another `stack=`",
            is_misread=True,
        )
    return Fault(
        f"{given} {len(paths)} leaves: {some(paths)}. The pattern probably drops the "
        f"part of the path that tells them apart.",
        "capture it, as in `(?P<stack>...)` or `(?P<role>...)`, shift one part with "
        "`start=`, or name another `stack=`",
        is_misread=any(member.axes for member in holders),
    )


def _gap(group: Group, grouping: Grouping) -> Fault:
    # Numbers may be far apart, as hashes are: never all of them.
    num_missing = sum(map(len, group.missing))
    missing = _first_missing(group)
    paths = [path for layer in group.layers for path in group.paths_of(layer)]
    found = f"matched layers {some(group.layers)} of {name_of(group.stack, group.role)}"
    more = f" and {num_missing - len(missing)} more" * (num_missing > len(missing))
    numbers = ", ".join(map(str, missing)) + more
    are_missing = f"layer {numbers} is" if num_missing == 1 else f"layers {numbers} are"
    left_out = _unmatched_leaves(group, grouping)
    reasons = left_out + _of_another_shape(group, grouping) + _masked(group, grouping)
    if reasons:
        reason = f"The reason: {'; '.join(reasons[:3])}."
    elif kinds := _of_another_kind(group, grouping):
        reason = (
            f"Probably layers of several kinds alternate, such as those with experts: "
            f"{kinds}."
        )
    else:
        reason = (
            "Probably masked or frozen, or numbered in steps, or a part of the chain "
            "that `depth` does not match yet."
        )
    return Fault(
        f"`depth` {found} ({some(list(dict.fromkeys(paths)))}): {are_missing} missing. "
        f"{reason}",
        "pass `strict=False` to treat the gap as a boundary, as for layers frozen on "
        "purpose, `ranked(...)` to close it, or let `depth` match the missing ones",
        # The length of a cycle, or the number of cycles, may be another one.
        is_misread=bool(left_out) or any(member.axes for member in group.members),
    )


def _first_missing(group: Group, limit: int = 6) -> list[int]:
    return list(itertools.islice(itertools.chain.from_iterable(group.missing), limit))


def _of_another_shape(group: Group, grouping: Grouping) -> list[str]:
    return [
        f"layer {layer} has shape {other.shape} and dtype {other.dtype} "
        f"({other.paths_of(layer)[0]}) where the others have {group.shape} and "
        f"{group.dtype}"
        for other in grouping.groups
        if other is not group and (other.stack, other.role) == (group.stack, group.role)
        for layer in _first_missing(group)
        if layer in other.layers
    ]


def _of_another_kind(group: Group, grouping: Grouping) -> str:
    """What the missing layers hold instead."""
    for other in grouping.groups:
        layers = set(_first_missing(group)) & set(other.layers)
        instead = layers and not set(other.layers) & set(group.layers)
        if other.stack == group.stack and instead:
            layer = min(layers)
            return f"layer {layer} holds {other.paths_of(layer)[0]} but no {group.role}"
    return ""


def _masked(group: Group, grouping: Grouping) -> list[str]:
    masked = {show_path(p.path) for p in grouping.places if p.leaf is MASKED}
    wanted = dict.fromkeys(path for _, path in _paths_of_missing(group))
    return [f"{path} is masked or frozen" for path in wanted if _is_under(path, masked)]


def _is_under(path: str, nodes: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[: n + 1]) in nodes for n in range(len(parts)))


def _unmatched_leaves(group: Group, grouping: Grouping) -> list[str]:
    """Untouched leaves whose paths read like those of the missing layers."""
    untouched = {show_path(grouping.paths[i]) for i in grouping.untouched}
    wanted = {
        layer: path for layer, path in _paths_of_missing(group) if path in untouched
    }
    return [
        f"{path} is in the tree, but `depth` leaves it out" for path in wanted.values()
    ]


def _paths_of_missing(group: Group) -> Iterator[tuple[int, str]]:
    """The paths that the missing layers have, if they read like those of the others."""
    for layer in _first_missing(group):
        for neighbor in group.members:
            if neighbor.layers.size:
                old, path = int(neighbor.layers.flat[0]), show_path(neighbor.path)
                yield layer, re.sub(rf"(?<!\d){old}(?!\d)", str(layer), path)
