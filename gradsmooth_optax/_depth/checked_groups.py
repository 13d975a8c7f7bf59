"""The groups of a tree that are coupled, or an error that says what is wrong."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from gradsmooth_optax._depth.groups import (
    Group,
    Grouping,
    Member,
    group_by_depth,
    member_of,
    name_of,
)
from gradsmooth_optax._depth.paths import show_path, some
from gradsmooth_optax._depth.reading.doubts import warn_of_suspicions
from gradsmooth_optax._depth.specs import DepthSpec


def coupled_groups(
    spec: DepthSpec, tree: Any, strict: bool, *, warn: bool = False
) -> Grouping:
    """Groups a tree by depth and checks that this is what was meant.

    The one entry of all that works along depth; `coupled` of the result are the groups
    in which some layer has a neighbor.

    Args:
      spec: where depth is.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      strict: as in `check_structure`.
      warn: whether to say, where `strict`, what is allowed but probably not meant.

    Raises:
      ValueError: as `group_by_depth` and `check_structure`.
    """
    grouping = group_by_depth(spec, tree)
    check_structure(grouping, strict)
    if warn and strict:
        warn_of_suspicions(grouping)
    return grouping


def check_structure(
    grouping: Grouping, strict: bool, wholes: Sequence[Group] | None = None
) -> None:
    """Raises where the grouping is probably not what was meant.

    Args:
      grouping: of the tree to be smoothed. A tree without leaves is never an error.
      strict: whether gaps, a scan of unequal leaves, and a spec that matches nothing
        are errors too.
      wholes: the groups whose gaps are looked for, None for those of the tree: a stage
        of a circular pipeline has some.

    Raises:
      ValueError: for a duplicated layer, a lone array as the whole tree, and under
        `strict` for gaps, for leaves of one `scanned` that hold different numbers of
        layers, and for nothing matched.
    """
    if (outer := _outer.get()) not in (None, grouping.spec):
        _check_agreement(grouping, outer)
    if grouping.paths and not grouping.groups:
        _check_something_matched(grouping, strict)
    if strict:
        _check_scans(grouping)
    for group in grouping.groups:
        if group.duplicates:
            raise ValueError(_duplicate_message(group))
    for group in grouping.groups if wholes is None else wholes:
        if strict and group.missing:
            raise ValueError(_gap_message(group, grouping))


def _check_something_matched(grouping: Grouping, strict: bool) -> None:
    if grouping.paths == ((),):
        raise ValueError(
            f"`depth` cannot find layers in a tree that is one lone array of shape "
            f"{np.shape(grouping.leaves[0])}. The tree is probably hidden by "
            f"`optax.flatten`. Smooth outside of it: `chain(flatten(base), "
            f"smooth_over_depth(depth))`; or write `scanned('', axis=0)` if the array "
            f"is a stack of layers."
        )
    if not strict:
        return
    paths = [show_path(path) for path in grouping.paths]
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    matched = sum(a is not None for a in grouping.spec.assign(leaves))
    if matched:
        raise ValueError(
            f"`depth` {grouping.spec!r} matches {matched} of the {len(paths)} leaves, "
            f"but none of floating or complex dtype, and others pass through: "
            f"{some(paths, 12)}. To fix: let it match the parameters."
        )
    unrestricted = grouping.spec.unrestricted()
    excluded = sum(assignment is not None for assignment in unrestricted.assign(leaves))
    if excluded and unrestricted != grouping.spec:
        raise ValueError(
            f"`depth` {grouping.spec!r} matches {excluded} of the {len(paths)} leaves, "
            f"but its restriction leaves out all of them: {some(paths, 12)}. Probably "
            f"no leaf is named as a kernel or weight, or the predicate tests other "
            f"names. To fix: write `.only(lambda path, leaf: ...)` for these paths."
        )
    raise ValueError(
        f"`depth` {grouping.spec!r} matched none of the {len(paths)} leaves of the "
        f"tree: {some(paths, 12)}. The pattern is probably written for another tree, "
        f"or the layers are masked here. To fix: {_suggestion(paths)}, or see "
        f"`print(detect(params))`; or pass `strict=False` if this tree may hold no "
        f"layers."
    )


def _suggestion(paths: Sequence[str]) -> str:
    for path in paths:
        for segment in path.split("/")[:-1]:
            name = segment.rstrip("0123456789")
            if name != segment:
                pattern = re.escape(name) + r"(\d+)/"
                return f"write `unrolled(r'{pattern}')` if {segment} is one layer"
    return (
        "write `unrolled(r'layers_(\\d+)/')` for one leaf per layer or "
        "`scanned('blocks/', axis=0)` for stacked layers, with names of this tree"
    )


def _check_scans(grouping: Grouping) -> None:
    """Leaves stacked by one scan hold equally many layers, or the axis is wrong."""
    scans: dict[tuple, list[Member]] = {}
    for group in grouping.groups:
        for member in group.members:
            if member.scan is not None:
                # Of one position: a cycle may stop before its end.
                first = int(member.layers.flat[0]) if member.layers.size else None
                key = (member.scan, group.stack, first)
                scans.setdefault(key, []).append(member)
    for (scan, stack, _), members in scans.items():
        sizes = Counter(member.layers.shape for member in members)
        if len(sizes) > 1:
            raise ValueError(_unequal_message(scan, stack, members, sizes, grouping))


def _unequal_message(
    scan: DepthSpec,
    stack: Hashable,
    members: list[Member],
    sizes: Counter[tuple[int, ...]],
    grouping: Grouping,
) -> str:
    usual = sizes.most_common(1)[0][0]
    one = next(m for m in members if m.layers.shape == usual)
    others = [m for m in members if m.layers.shape != usual]

    def saying(member: Member) -> str:
        shape = np.shape(grouping.leaves[member.leaf])
        return f"{member.layers.size} in {show_path(member.path)} {shape}"

    found = (
        f"`depth` {scan!r} finds different numbers of layers in leaves of stack "
        f"{stack!r}: {saying(one)}, but {some([saying(m) for m in others], 3)}. "
        f"Leaves stacked by one scan hold equally many layers."
    )
    shapes = [np.shape(grouping.leaves[member.leaf]) for member in members]
    right = [
        axis
        for axis in range(min(map(len, shapes)))
        if len({shape[axis] for shape in shapes}) == 1
    ]
    if len(right) == len(one.axes) == 1:
        return (
            f"{found} Axis {right[0]} has size {shapes[0][right[0]]} in all of them: "
            f"it is probably the one. To fix: write `axis={right[0]}`."
        )
    return (
        f"{found} Probably the axis is another one, or the pattern takes leaves that "
        f"are not stacked. To fix: pass the right `axis=`, let the pattern end in '/', "
        f"or leave them out with `.only(lambda path, leaf: ...)`; `strict=False` "
        f"takes them as they are."
    )


def _duplicate_message(group: Group) -> str:
    layer = group.duplicates[0]
    paths = group.paths_of(layer)
    holders = [member for member in group.members if (member.layers == layer).any()]
    given = f"`depth` gives layer {layer} of {name_of(group.stack, group.role)} to"
    if len(paths) == 1:
        return (
            f"{given} several slices of leaf {paths[0]}: its strides overlap. Write "
            f"the step along each axis, as in `axis=(0, 1), stride=(4, 1)`."
        )
    if len(set(paths)) == 1:
        return (
            f"{given} {len(paths)} leaves with the same path {paths[0]!r}: their "
            f"container names its children by number only. Register it by "
            f"`jax.tree_util.register_pytree_with_keys`, or leave them out with "
            f"`.only(lambda path, leaf: ...)`."
        )
    if all(member.axes for member in holders):
        return (
            f"{given} {len(paths)} stacked leaves: {some(paths)}. They are probably "
            f"positions in a cycle of layers, or parts of one chain. To fix: give the "
            f"cycle's length, as in `scanned(r'layers_(\\d+)/', stride=6)`, shift one "
            f"part with `start=`, or name another `stack=`."
        )
    return (
        f"{given} {len(paths)} leaves: {some(paths)}. The pattern probably drops the "
        f"part of the path that tells them apart. To fix: capture it, as in "
        f"`(?P<stack>...)` or `(?P<role>...)`, or shift one part with `start=`."
    )


def _gap_message(group: Group, grouping: Grouping) -> str:
    # Numbers may be far apart, as hashes are: never all of them.
    num_missing = sum(map(len, group.missing))
    missing = _first_missing(group)
    paths = [path for layer in group.layers for path in group.paths_of(layer)]
    found = f"matched layers {some(group.layers)} of {name_of(group.stack, group.role)}"
    more = f" and {num_missing - len(missing)} more" * (num_missing > len(missing))
    numbers = ", ".join(map(str, missing)) + more
    are_missing = f"layer {numbers} is" if num_missing == 1 else f"layers {numbers} are"
    elsewhere = _unmatched_leaves(group, grouping) + [
        f"layer {layer} has shape {other.shape} and dtype {other.dtype} "
        f"({other.paths_of(layer)[0]}) where the others have {group.shape} and "
        f"{group.dtype}"
        for other in grouping.groups
        if other is not group and (other.stack, other.role) == (group.stack, group.role)
        for layer in missing
        if layer in other.layers
    ]
    reason = (
        f"The reason: {'; '.join(elsewhere[:3])}."
        if elsewhere
        else "Probably masked or frozen, or numbered in steps, or a part of the chain "
        "that `depth` does not match yet."
    )
    return (
        f"`depth` {found} ({some(list(dict.fromkeys(paths)))}): "
        f"{are_missing} missing. {reason} To fix: pass "
        f"`strict=False` to treat the gap as a boundary, as for layers frozen on "
        f"purpose, `ranked(...)` to close it, or let `depth` match the missing ones."
    )


def _first_missing(group: Group, limit: int = 6) -> list[int]:
    return list(itertools.islice(itertools.chain.from_iterable(group.missing), limit))


def _unmatched_leaves(group: Group, grouping: Grouping) -> list[str]:
    """Untouched leaves whose paths read like those of the missing layers."""
    untouched = {show_path(grouping.paths[i]) for i in grouping.untouched}
    sayings = []
    for layer in _first_missing(group):
        for neighbor in group.members:
            if not neighbor.layers.size:
                continue
            old, path = int(neighbor.layers.flat[0]), show_path(neighbor.path)
            wanted = re.sub(rf"(?<!\d){old}(?!\d)", str(layer), path)
            if wanted in untouched:
                sayings.append(f"{wanted} is in the tree, but `depth` leaves it out")
                break
    return sayings


# -- Two specs in one optimizer --------------------------------------------------------

_outer: contextvars.ContextVar[DepthSpec | None] = contextvars.ContextVar(
    "outer", default=None
)


@contextlib.contextmanager
def numbered_by(spec: DepthSpec) -> Iterator[None]:
    """Inside, every tree must be grouped as `spec` says, or less of it.

    A recipe reads its own `depth`, and the smoothing that it was given another one,
    maybe deep inside a chain. So the recipe says around the smoothing's calls which
    spec is its own, and whatever groups a tree inside is held against it.
    """
    token = _outer.set(spec)
    try:
        yield
    finally:
        _outer.reset(token)


def _check_agreement(grouping: Grouping, outer: DepthSpec) -> None:
    """Raises where a recipe around numbers the layers of a leaf differently."""
    leaves = list(zip(grouping.paths, grouping.leaves, strict=True))
    assignments = outer.locate(leaves)
    for group in grouping.groups:
        for member in group.members:
            path, leaf = leaves[member.leaf]
            assignment = assignments[member.leaf]
            known = assignment and member_of(
                member.leaf, path, assignment, np.shape(leaf)
            )
            if (
                known
                and known.axes == member.axes
                and np.array_equal(known.layers, member.layers)
            ):
                continue
            raise ValueError(
                f"`smoothing` and `depth` number leaf {show_path(path)} differently: "
                f"the smoothing by {grouping.spec!r} as {_shown(member)}, `depth` by "
                f"{outer!r} as {_shown(known) if known else 'no layer'}. Give both the "
                f"same depth; to smooth less, restrict that of the smoothing: "
                f"`smooth_over_depth(depth.only(...), 0.1)`."
            )


def _shown(member: Member) -> str:
    numbers = member.layers.ravel().tolist()
    shown = f"layer {numbers[0]}" if len(numbers) == 1 else "layers "
    if len(numbers) > 1:
        shown += ", ".join(map(str, numbers[:4])) + ", …" * (len(numbers) > 4)
    axes = member.axes[0] if len(member.axes) == 1 else member.axes
    return shown + (f" along axis {axes}" if member.axes else "")
