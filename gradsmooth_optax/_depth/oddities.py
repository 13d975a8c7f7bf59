"""What is odd about a grouping, whatever the tree shows: widths, kinds, numbers."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from gradsmooth_optax._depth.depth import as_tuple
from gradsmooth_optax._depth.groups import Grouping, Held, Member, unrestricted
from gradsmooth_optax._depth.paths import (
    MASKED,
    Path,
    show_path,
    some,
    without_numbers,
)
from gradsmooth_optax._depth.specs import DepthSpec
from gradsmooth_optax._depth.stack import Reading
from gradsmooth_optax._depth.words import VECTORS, meaning, split_number


def oddities(grouping: Grouping, reading: Reading) -> Iterator[str]:
    """What is probably not meant."""
    yield from _kinds_of_modules(grouping)
    yield from _not_stacked(grouping)
    yield from _wrong_axes(grouping)
    yield from _too_wide(grouping, reading)


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


def _are_other_kinds(ranks: Mapping[str, int], others: Mapping[str, int]) -> bool:
    shared = ranks.keys() & others.keys()
    is_part = len(shared) == min(len(ranks), len(others))
    has_matrix = any(ranks[name] > 1 for name in shared)
    differ = any(ranks[name] != others[name] for name in shared)
    return differ or not (is_part or has_matrix)


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


def other_numbers(grouping: Grouping) -> Iterator[str]:
    """Leaves that are left out, though their paths only have another layer number."""
    held = unrestricted(grouping).held
    alike: dict[str, dict[tuple[str, ...], Path]] = defaultdict(dict)
    for path in grouping.paths:
        numbers = re.findall(r"\d+", show_path(path))
        alike[without_numbers(path)][tuple(numbers)] = path
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


def _is_leaf_of_one(path: Path, held: Held) -> bool:
    """Whether it is taken as one layer that has neighbors."""
    if path not in held:
        return False
    group, member = held[path]
    return not member.axes and group.run_lengths.max(initial=0) > 1


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
