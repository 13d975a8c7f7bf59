"""The one reading of a tree: which layers it shows by its names, shapes and boxes.

`unrolled()` without a pattern, `detect`, `describe` and the errors and warnings of
`init` all say what is found here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.paths import MASKED, Path, Place, show_path, some
from gradsmooth_optax._depth.siblings import (
    Siblings,
    are_consecutive,
    children_of,
    patterns_of,
    places_by_child,
)
from gradsmooth_optax._depth.words import (
    VECTORS,
    is_layer,
    is_stage,
    meaning,
    split_number,
)

# What nn.PARTITION_NAME is set to: "layers", "dense_layers", "layers_per_stage", …
_DEPTH_AXIS = re.compile(r"(?:.*_)?layers(?:_.*)?|scanned_blocks|circular_repeats")
# Such as what a block-diagonal matrix has, too.
_MAYBE_DEPTH_AXIS = re.compile(rf"{_DEPTH_AXIS.pattern}|blocks")


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that a tree shows, and the call that finds them.

    Attributes:
      function: the spec's.
      patterns: for it, from the shortest end of the path to the whole path.
      options: its other arguments.
      depths: the `Depth` of each of its leaves, by path.
      reason: what the reading rests on.
      is_named: whether they, or their axis, are called layers.
      doubts: what a person has to decide.
      ranked: whether the call is `ranked(...)` of that.
      rivals: other readings of the same leaves.
      kinds: such as "local" and "global", if each holds all its parts in each kind.
      num_axes: how many axes its vectors have beside their own, where that is known.
      is_equal: whether its layers are of equal structure, and not partly alike.
      is_minor: whether they are single modules that are no layers beside others.
      is_one_layer: whether there is nothing to couple in it.
      is_on_axis: whether there is no doubt of its axis.
    """

    function: Literal["unrolled", "scanned"]
    patterns: tuple[str, ...]
    options: dict[str, Any]
    depths: dict[Path, Depth]
    reason: str
    is_named: bool
    doubts: tuple[str, ...] = ()
    ranked: bool = False
    rivals: tuple[Stack, ...] = ()
    kinds: tuple[str, ...] = ()
    num_axes: int = 0
    is_equal: bool = True
    is_minor: bool = False
    is_one_layer: bool = False
    is_on_axis: bool = True

    @property
    def is_cycle(self) -> bool:
        """Whether its leaves are positions in a cycle of layers."""
        return "stride" in self.options

    @property
    def is_certain(self) -> bool:
        """Whether there is nothing to decide."""
        return not self.doubts and not self.rivals


class LeftOut(NamedTuple):
    """What looks like layers and is none.

    Attributes:
      reason: why.
      stack: what they would be as layers.
      is_apart: whether they should not be coupled, whoever says so; parts of a layer
        may be the layers of a small model.
    """

    reason: str
    stack: Stack
    is_apart: bool


class Reading(NamedTuple):
    """What a tree shows; no leaf is in two of the stacks."""

    stacks: tuple[Stack, ...]
    left_out: tuple[LeftOut, ...]


def read(places: Sequence[Place]) -> Reading:
    """The layers that a tree shows.

    Args:
      places: of the tree, masked ones too: what is masked counts as being there, so
        that a part of a tree is read as the whole.
    """
    left_out: list[LeftOut] = []
    tree = [p for p in places if p.leaf is MASKED or inexact_dtype(p.leaf) is not None]
    stacks = list(_stacks((), tree, tree, left_out))
    # Whole layers come before single modules, and names of layers before others.
    ranks = [(s.is_named and not s.is_minor, s.is_named) for s in stacks]
    best = max(ranks, default=(False, False))
    minor = [s for s, r in zip(stacks, ranks, strict=True) if s.is_minor and r < best]
    left_out += [LeftOut(stack.reason, stack, False) for stack in minor]
    kept = [stack for stack in stacks if stack not in minor]
    sizes = {p.path: np.shape(p.leaf) for p in _present(tree)}
    return Reading(tuple(_with_remainders(kept, sizes)), tuple(left_out))


def _with_remainders(
    stacks: list[Stack], shapes: dict[Path, tuple[int, ...]]
) -> list[Stack]:
    """Cycles and the layers that remain after them as one chain."""
    for c, cycle in enumerate(stacks):
        for r, rest in enumerate(stacks):
            ends = {d.stack for s in (cycle, rest) for d in s.depths.values()}
            is_rest = "_remainder/" in "".join(map(str, ends)) and cycle.is_cycle
            if c != r and is_rest and rest.function == "unrolled":
                names = {str(name).replace("_remainder/", "/") for name in ends}
                if len(names) == 1:
                    path = next(iter(cycle.depths))
                    length = cycle.options["stride"]
                    start = length * shapes[path][cycle.options["axis"]]
                    (stack,) = names
                    stacks[c] = _moved(cycle, stack, 0)
                    stacks[r] = _moved(rest, stack, start)
    return stacks


def _moved(stack: Stack, name: str, start: int) -> Stack:
    options = stack.options | {"stack": name} | ({"start": start} if start else {})
    depths = {
        path: replace(depth, stack=name, layer=depth.layer + start)
        for path, depth in stack.depths.items()
    }
    return replace(stack, options=options, depths=depths)


def _stacks(
    node: Path, places: list[Place], tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The stacks under a node: the highest nodes and siblings that are layers."""
    if node and _present(places):
        if stack := _stacked(node, places, tree):
            yield stack
            return
        is_first = _is_apart(node) and not _is_apart(node[:-1])
        if is_first and (axes := stacked_axes(places)):
            reason = (
                f"{show_path(node)}: all leaves have one size on axis {some(axes)}, "
                f"which is probably of an ensemble, of experts or of heads and not of "
                f"layers"
            )
            stack = _scanned(node, places, (axes[0],), reason, False)
            left_out.append(LeftOut(reason, stack, True))
    families, others = children_of(node, places)
    for siblings in families:
        yield from _numbered(siblings, tree, left_out)
    for child, inside in others.items():
        found = list(_stacks((*node, child), inside, tree, left_out))
        has_layers = any(stack.is_equal and not stack.is_minor for stack in found)
        if not has_layers and (lone := _lone_layer(node, child, inside)):
            found = [replace(stack, rivals=(lone,)) for stack in found] or [lone]
        yield from found


def _lone_layer(node: Path, child: str | int, inside: list[Place]) -> Stack | None:
    """The child as the only layer: it has no neighbor, but a place."""
    number = split_number(child)
    is_list = any(f.stem == "" for f in children_of((*node, child), inside)[0])
    is_bare = is_layer(child) and str(child)[-1] != "s" and not is_list
    stem, n = number or (str(child), 0)
    siblings = Siblings(node, stem, {n: inside}, is_bare)
    is_one = (number or is_bare) and siblings.meaning == "layers"
    return _layers(siblings) if is_one else None


# -- One leaf per layer ----------------------------------------------------------------


def _numbered(
    siblings: Siblings, tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The siblings as layers, or the stacks in each of them; or both as rivals."""
    found, equal = siblings.meaning, siblings.are_equal
    is_named = found == "layers" and (equal or siblings.num_modules > 1)
    left_out_inside: list[LeftOut] = []
    inner = [
        stack
        for number, places in siblings.children.items()
        for stack in _stacks(siblings.path(number), places, tree, left_out_inside)
    ]
    is_stack = siblings.shares and (is_named or (found == "other" and equal))
    if siblings.is_in_one_layer and not equal:
        is_stack = False  # the parts of that one
    layers_inside = [s for s in inner if s.is_named and not s.is_one_layer]
    num_inside = sum(len(stack.depths) for stack in layers_inside)
    are_stages = is_stage(siblings.word) and 2 * num_inside > len(siblings.places)
    if layers_inside and (are_stages or not siblings.shares_most):
        is_stack = False  # of layers of their own, or of their own widths
    if not is_stack:
        left_out += left_out_inside
        inner = inner or list(_stacked_between(siblings))
        if reason := _reason_to_leave_out(siblings, not inner, are_stages):
            is_apart = found in ("beside", "layers")
            left_out.append(LeftOut(reason, _layers(siblings), is_apart))
        yield from inner
        return
    whole = _layers_or_cycle(siblings)
    if whole.is_cycle:
        yield whole
        return
    inside = [s for s in inner if s.is_equal and not s.is_one_layer]
    inside += [stack for _, stack, _ in left_out_inside]
    if not is_named and any(s.is_named and not s.is_minor for s in inside):
        left_out += left_out_inside
        yield from inner
        return
    yield replace(whole, rivals=tuple(_rivals(siblings, inner, is_named)))


def _rivals(siblings: Siblings, inner: list[Stack], is_named: bool) -> list[Stack]:
    """What is read inside of siblings, and may be the layers as well as they are."""
    found = [stack for stack in inner if not stack.is_one_layer]
    if not is_layer(siblings.word):
        found += _stages_of_one(siblings, inner)
    if is_named:
        found = [s for s in found if not s.is_minor]
        found = [s for s in found if s.is_named or s.function == "unrolled"]
        if siblings.are_equal:
            found = [s for s in found if s.is_equal]
    chains = _chains(siblings)
    if not found and (not is_named or any(c.are_units for c in chains)):
        found = list(map(_layers, chains))
    return found


def _stages_of_one(siblings: Siblings, inner: list[Stack]) -> list[Stack]:
    """The one layer of each, if there is little beside it: they may be stages."""
    read_inside = [s for stack in inner for s in (stack, *stack.rivals)]
    lone = [s for s in read_inside if s.is_one_layer and not s.is_minor]
    number = len(_present(siblings.places))
    return lone if number / 2 < sum(len(s.depths) for s in lone) < number else []


def _reason_to_leave_out(siblings: Siblings, is_alone: bool, are_stages: bool) -> str:
    found, alike = siblings.meaning, siblings.shares and siblings.are_equal
    if (found == "beside" or are_stages) and alike:
        why = "alike, named as things that stand side by side"
    elif found == "layers" and is_alone:
        why = "called layers, but not alike in what they hold"
    elif alike and is_alone:
        why = "alike, named or built as parts of a layer"
    else:
        return ""
    return f"{siblings}: {len(siblings.children)} siblings {why}"


def _layers_or_cycle(siblings: Siblings) -> Stack:
    axes = stacked_axes(siblings.places) or _axes_of_matrices(siblings.places)
    if axes is None or _is_apart(siblings.parent):
        return _layers(siblings)
    doubt = (
        f"{siblings}: all their leaves have one size on axis {some(axes)}: they are a "
        f"cycle of stacked layers, or the layers of an ensemble"
    )
    return _cycle(siblings, axes[0], "", (doubt,))


def _layers(siblings: Siblings) -> Stack:
    is_named, numbers = siblings.meaning == "layers", list(siblings.children)
    scattered = {
        show_path(path)
        for (path, *_), holders in siblings.numbers_of_roles.items()
        if not are_consecutive(holders)
    }
    kinds = layer_kinds(siblings.path(numbers[0]), siblings.children[numbers[0]])
    doubts = []
    if not are_consecutive(numbers):
        doubts.append(
            f"{siblings}: the numbers {some(numbers)} have gaps, which `ranked` "
            f"closes. Is each one the next one's neighbor?"
        )
    elif scattered:
        doubts.append(
            f"{siblings}: {some(sorted(scattered))} are of one shape in some of the "
            f"layers only, which `ranked` couples over the others: layers of several "
            f"kinds that alternate, such as those with experts"
        )
    if is_named and siblings.is_minor:
        doubts.append(f"{siblings}: they are single modules in a part of the model")
    if kinds:
        doubts.append(
            f"{siblings}: all parts of each are there as {some(kinds)}. Are they "
            f"{len(kinds)} layers? Then write a function that numbers them"
        )
    stack = (show_path((*siblings.parent, "")) + siblings.stem).rstrip("/_.")
    structure = "of equal structure" if siblings.are_equal else "partly alike"
    found = f"{siblings}: {len(numbers)} siblings {structure}"
    if len(numbers) < 2:
        found = f"{show_path(siblings.path(numbers[0]))}: one by itself"
    return Stack(
        "unrolled",
        siblings.patterns,
        {},
        {
            place.path: Depth(stack, show_path(siblings.inside(place)), number)
            for number, places in siblings.children.items()
            for place in _present(places)
        },
        found + ", named as layers" * is_named,
        is_named,
        tuple(doubts),
        ranked=bool(scattered),
        kinds=kinds,
        is_equal=siblings.are_equal,
        is_minor=siblings.is_minor,
        is_one_layer=len(numbers) < 2,
    )


def _chains(siblings: Siblings) -> list[Siblings]:
    """Where each sibling is nothing but a chain, as an MLP is: those chains."""
    chains = []
    for number, places in siblings.children.items():
        node, (families, others) = siblings.path(number), ([], {"": places})
        while not families and len(others) == 1:
            families, others = children_of(node, places)
            node = (*node, *others)
        alike = [f for f in families if f.are_equal and f.shares]
        if others or len(families) != 1 or not alike:
            return []
        chains += families
    return chains


def _stacked_between(siblings: Siblings) -> Iterator[Stack]:
    """The hidden layers in (first, stacked hidden, last): of one more rank."""
    ranks = {
        number: {siblings.inside(p): np.ndim(p.leaf) for p in _present(places)}
        for number, places in siblings.children.items()
    }
    for number, own in list(ranks.items())[1:-1]:
        others = [r for n, r in ranks.items() if n != number and r.keys() == own.keys()]
        if own and others and all(own[p] == r[p] + 1 for r in others for p in own):
            node = siblings.path(number)
            reason = f"{show_path(node)}: of one more rank than its siblings"
            doubt = f"{reason}, as layers between a first and a last one are"
            yield _scanned(
                node, siblings.children[number], (0,), reason, False, (doubt,)
            )


def layer_kinds(
    node: Path, places: Sequence[Place], num_axes: int = 0
) -> tuple[str, ...]:
    """The kinds of layers that a node holds: "local" and "global" of Gemma 2.

    Its modules are `<part>_<kind>`, and every part with matrices is there in each kind,
    built alike.
    """
    kinds: dict[str, dict[str, list]] = defaultdict(dict)
    for child, inside in places_by_child(node, places).items():
        roles = [(p.path[len(node) + 1 :], np.shape(p.leaf)) for p in _present(inside)]
        if any(len(shape) - num_axes >= 2 for _, shape in roles):
            part, _, kind = str(child).rpartition("_")
            kinds[part][kind] = sorted(roles, key=repr)
    found = {frozenset(of_part) for of_part in kinds.values()}
    alike = all(
        roles == next(iter(of_part.values()))
        for of_part in kinds.values()
        for roles in of_part.values()
    )
    if len(kinds) < 2 or len(found) > 1 or not alike:
        return ()
    (common,) = found
    return tuple(sorted(common)) if len(common) > 1 else ()


# -- Layers along axes -----------------------------------------------------------------


def stacked_axes(places: Sequence[Place]) -> list[int] | None:
    """Axes that layers may be stacked on, or None: on which all leaves have one size.

    An unrolled layer nearly always has vectors, and a stacked one has matrices that
    are called as vectors.
    """
    shapes = [np.shape(place.leaf) for place in _present(places)]
    has_vectors = any(p.path and str(p.path[-1]) in VECTORS for p in _present(places))
    return (_common_axes(shapes) or None) if has_vectors else None


def _axes_of_matrices(places: Sequence[Place]) -> list[int] | None:
    """The same of layers that have matrices and no other arrays."""
    shapes = {np.shape(place.leaf) for place in _present(places)}
    is_of_matrices = len(shapes) > 1 and set(map(len, shapes)) == {3}
    axes = _common_axes(list(shapes)) if is_of_matrices else []
    return axes if len(axes) == 1 else None


def _common_axes(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    ranks = list(map(len, shapes))
    if min(ranks, default=0) < 2 or max(ranks) < 3:
        return []
    return [
        axis
        for axis in range(min(ranks))
        if len({shape[axis] for shape in shapes}) == 1 and shapes[0][axis] > 1
    ]


def _stacked(node: Path, places: list[Place], tree: list[Place]) -> Stack | None:
    """The node as a stack over axes, by the names of the axes or by the shapes."""
    if axes := next((a for p in places if (a := _depth_axes(p))), ()):
        return _stacked_by_names(node, places, axes)
    stack = _stacked_by_shapes(node, places, tree)
    if stack and any(map(_depth_axes, tree)):
        # Such a tree mostly says where its layers are.
        doubt = f"{show_path(node)}: its axes have no names, though others have"
        return replace(stack, doubts=(doubt,)) if stack.is_named else None
    return stack


def _depth_axes(place: Place) -> tuple[int, ...]:
    names = enumerate(map(str, place.axis_names))
    return tuple(i for i, name in names if _MAYBE_DEPTH_AXIS.fullmatch(name))


def _stacked_by_names(
    node: Path, places: list[Place], axes: tuple[int, ...]
) -> Stack | None:
    leaves = _present(places)
    # A leaf without axis names belongs to the stack if its shape fits.
    fits = all(
        _depth_axes(p) == axes if p.axis_names else np.ndim(p.leaf) > max(axes)
        for p in leaves
    )
    sizes = {tuple(np.shape(p.leaf)[a] for a in axes) for p in leaves if fits}
    if len(sizes) != 1 or _layers_are_below(node, places):
        return None
    named = [p for p in leaves if p.axis_names]
    called = [str(named[0].axis_names[a]) for a in axes]
    known = {p.path[:-1] for p in named}
    strangers = [
        show_path(p.path)
        for p in leaves
        if p.path[:-1] not in known
        and not (str(p.path[-1]) in VECTORS and np.ndim(p.leaf) == 2)
    ]
    doubts = []
    if not all(map(_DEPTH_AXIS.fullmatch, called)):
        doubts.append(
            f"{show_path(node)}: an axis named {some(called)} may be of layers or of "
            f"a block-diagonal matrix"
        )
    if strangers:
        doubts.append(
            f"{some(strangers)}: no leaf of the module has axis names; its size on "
            f"axis {some(axes)} may be that of the layers by chance"
        )
    if len(axes) > 1:
        doubts.append(
            f"{show_path(node)}: several axes are named after layers "
            f"({some(called)}). Does depth run over them in this order?"
        )
    reason = (
        f"{show_path(node)}: axis {some(axes)} named {some(called)} in {len(named)} of "
        f"its {len(leaves)} leaves"
    )
    return _scanned(node, places, axes, reason, True, tuple(doubts))


def _stacked_by_shapes(
    node: Path, places: list[Place], tree: list[Place]
) -> Stack | None:
    leaves, shapes = _present(places), [np.shape(p.leaf) for p in _present(places)]
    axes, has_vectors = _common_axes(shapes), stacked_axes(places) is not None
    if any(set(sizes) == {1} for sizes in zip(*shapes, strict=False)):
        return None  # one layer, or none
    num_modules = len({p.path[:-1] for p in leaves})
    word = meaning(str(node[-1]).rstrip("0123456789"))
    is_named = word == "layers" or (word == "layers of parts" and num_modules > 1)
    if not axes or not (is_named or (has_vectors and num_modules > 1)):
        return None
    families = [f for f in children_of(node, places)[0] if f.meaning != "parts"]
    number, least = split_number(node[-1]), min(map(len, shapes))
    is_layer = number and (least > 2 or _is_one_of_several(node, number[0], tree))
    if not has_vectors and (is_layer or families or len(leaves) < 2):
        return None
    inside = [node] if is_named else [p.path[:-1] for p in leaves]
    if all(map(_is_apart, inside)) or _layers_are_below(node, places):
        return None
    others = [p for p in _present(tree) if p.path[: len(node)] != node]
    elsewhere = {n for p in others for n in np.shape(p.leaf)}
    # The model's width is the size of other leaves too, and comes after the layers.
    own = [axis for axis in axes if shapes[0][axis] not in elsewhere] or axes
    is_told = len(own) == 1 and own[0] == axes[0] and bool(others)
    axis = own[0]
    if any(p.axis_names and p.axis_names[axis] is not None for p in leaves):
        return None  # it has another name
    found = f"{show_path(node)}: all {len(leaves)} leaves have size {shapes[0][axis]}"
    doubts = []
    if not has_vectors and not is_told:
        doubts.append(f"{found} on axis {axis}, but none is a vector by its name")
    if not is_named:
        doubts.append(
            f"{found} on axis {axis}. Layers stacked by a scan look like that, and so "
            f"do an ensemble, experts and heads, whose axis this may be"
        )
    if least > 2 or (len(axes) > 1 and not is_told):
        doubts.append(
            f"{show_path(node)}: all leaves have {least} axes or more, and one size "
            f"each on axis {some(axes)}. Which are of the layers?"
        )
    is_last_alike = len({sizes[-1] for sizes in shapes}) == 1
    may_be_last = is_last_alike and bool(others) and shapes[0][-1] not in elsewhere
    if may_be_last:
        doubts.append(
            f"{show_path(node)}: all leaves have one size on their last axis too, "
            f"which no other leaf has. Is it `axis=-1`?"
        )
    own_size = (shapes[0][axis],)
    if others and all(np.shape(p.leaf)[axis : axis + 1] == own_size for p in others):
        doubts.append(
            f"all leaves of the tree have size {shapes[0][axis]} on axis {axis}: this "
            f"may be an ensemble of models"
        )
    reason = (
        f"{found} on axis {axis}"
        + ", vectors too" * has_vectors
        + ", named as layers" * is_named
    )
    stack = _scanned(node, places, (axis,), reason, is_named, tuple(doubts))
    is_one = least == 2 and (len(axes) == 1 or is_told)
    is_on_axis = is_one and (has_vectors or is_told) and not may_be_last
    # The other axes have sizes that are seen elsewhere, as the model's width is.
    is_on_axis |= least == 2 and has_vectors and len(own) == 1 < len(axes)
    num_axes = least - 1 if has_vectors else 1
    return replace(stack, num_axes=num_axes, is_on_axis=is_on_axis)


def _is_one_of_several(node: Path, stem: str, tree: Sequence[Place]) -> bool:
    """Whether a node with a number has a sibling with another one."""
    parent = node[:-1]
    beside = {p.path[len(parent)] for p in tree if p.path[: len(parent)] == parent}
    return sum((split_number(child) or (None,))[0] == stem for child in beside) > 1


def _is_apart(node: Path) -> bool:
    return any(meaning(segment, True) == "beside" for segment in node)


def _layers_are_below(node: Path, places: Sequence[Place]) -> bool:
    """Whether most leaves rather belong to nodes below that are called layers."""
    below = [
        any(meaning(s) == "layers" for s in p.path[len(node) : -1]) for p in places
    ]
    return meaning(node[-1]) != "layers" and 2 * sum(below) >= len(below)


def _scanned(
    node: Path,
    places: list[Place],
    axes: tuple[int, ...],
    reason: str,
    is_named: bool,
    doubts: tuple[str, ...] = (),
) -> Stack:
    axis = axes[0] if len(axes) == 1 else axes
    families, others = children_of(node, places)
    cycle = next((f for f in families if f.meaning == "layers"), None)
    if cycle and not others and len(families) == len(axes) == 1:
        if not cycle.stem:
            doubts += (f"{cycle}: a cycle of layers, or the layers of an ensemble",)
        return _cycle(cycle, axes[0], f"{reason}; {cycle}: a cycle", doubts)
    kinds = layer_kinds(node, places, len(axes))
    below = {s for p in places for s in p.path[len(node) : -1]}
    called = {s for s in below if meaning(s) == "layers" and not split_number(s)}
    layers = called - {"stacked"}  # as haliax calls all of them
    if cycle or layers:
        doubts += (
            f"{show_path(node)}: it holds {cycle or some(sorted(map(str, layers)))}. "
            f"Are these a cycle, or stacked once more?",
        )
    elif kinds:
        doubts += (
            f"{show_path(node)}: all parts are there as {some(kinds)}. Are they layers "
            f"of a cycle? Then write one `scanned(pattern, axis={axis}, start=..., "
            f"stride={len(kinds)})` for each",
        )
    is_leaf = any(place.path == node for place in places)
    segment = re.escape(str(node[-1])) + ("(?:/|$)" if is_leaf else "/")
    patterns, stack = patterns_of(node[:-1], segment), show_path(node).rstrip("/_.")
    return Stack(
        "scanned",
        patterns[str(node[-1]).isdecimal() :],
        {"axis": axis},
        {
            p.path: Depth(stack, show_path(p.path[len(node) :]), axis=axis)
            for p in _present(places)
        },
        reason,
        is_named,
        doubts,
        kinds=kinds,
    )


def _cycle(
    siblings: Siblings, axis: int, reason: str, doubts: tuple[str, ...]
) -> Stack:
    layers, length = _layers(siblings), len(siblings.children)
    doubts += tuple(d for d in layers.doubts if "`ranked` closes" in d)
    ranked = any(len(held) < length for held in siblings.numbers_of_roles.values())
    if ranked:
        doubts += (
            f"{siblings}: not all of them have the same parameters, and `ranked` "
            f"couples those of the same shape over the others",
        )
    return replace(
        layers,
        function="scanned",
        options={"axis": axis, "stride": length},
        depths={
            path: replace(depth, axis=axis, stride=length)
            for path, depth in layers.depths.items()
        },
        reason=reason or layers.reason,
        doubts=doubts,
        ranked=ranked,
    )


def _present(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place.leaf is not MASKED]
