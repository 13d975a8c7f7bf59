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
from gradsmooth_optax._depth.depth import Depth, as_tuple
from gradsmooth_optax._depth.paths import MASKED, Path, Place, show_path, some
from gradsmooth_optax._depth.siblings import (
    Siblings,
    are_consecutive,
    children_of,
    patterns_of,
    places_by_child,
)
from gradsmooth_optax._depth.words import VECTORS, meaning, split_number

# What nn.PARTITION_NAME is set to: "layers", "dense_layers", "layers_per_stage", …
_DEPTH_AXIS = re.compile(r"(?:.*_)?layers(?:_.*)?|scanned_blocks|circular_repeats")



@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that a tree shows, and the call that finds them.

    Attributes:
      function: the spec's.
      patterns: for it, from the shortest end of the path to the whole path.
      options: its other arguments.
      ranked: whether the call is `ranked(...)` of that.
      depths: the `Depth` of each of its leaves, by path.
      reason: what the reading rests on.
      doubts: what a person has to decide.
      rivals: other readings of the same leaves.
      is_named: whether they are called layers.
      kinds: such as "local" and "global", if each holds all its parts in each kind.
      num_axes: how many axes its vectors have beside their own.
    """

    function: Literal["unrolled", "scanned"]
    patterns: tuple[str, ...]
    options: dict[str, Any]
    ranked: bool
    depths: dict[Path, Depth]
    reason: str
    doubts: tuple[str, ...] = ()
    rivals: tuple[Stack, ...] = ()
    is_named: bool = False
    kinds: tuple[str, ...] = ()
    num_axes: int = 0

    @property
    def is_one_layer(self) -> bool:
        """Whether there is nothing to couple in it."""
        layers = {depth.layer for depth in self.depths.values()}
        return self.function == "unrolled" and len(layers) < 2

    @property
    def is_certain(self) -> bool:
        """Whether there is nothing to decide."""
        return not self.doubts and not self.rivals


class Reading(NamedTuple):
    """What a tree shows.

    Attributes:
      stacks: no leaf is in two of them.
      left_out: what looks like layers and is none.
    """

    stacks: tuple[Stack, ...]
    left_out: tuple[LeftOut, ...]


class LeftOut(NamedTuple):
    """What looks like layers and is none.

    Attributes:
      reason: why.
      node: its parent.
      stem: how its numbered siblings are called; None if it is stacked.
      is_beside: whether it is said to be several things side by side.
    """

    reason: str
    node: Path
    stem: str | None
    is_beside: bool


def read(places: Sequence[Place]) -> Reading:
    """The layers that a tree shows.

    Args:
      places: of the tree, masked ones too: what is masked counts as being there, so
        that a part of a tree is read as the whole.
    """
    left_out: list[LeftOut] = []
    tree = [p for p in places if p.leaf is MASKED or inexact_dtype(p.leaf) is not None]
    stacks = tuple(_stacks((), tree, tree, left_out))
    return Reading(stacks, tuple(left_out))


def _stacks(
    node: Path, places: list[Place], tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The stacks under a node: the highest nodes and siblings that are layers."""
    if stack := _stacked(node, places, tree):
        yield stack
        return
    if looks := _stacked_beside(node, places):
        left_out.append(looks)
        return
    families, others = children_of(node, places)
    for siblings in families:
        yield from _numbered(siblings, tree, left_out)
    for child, inside in others.items():
        found = list(_stacks((*node, child), inside, tree, left_out))
        if not found and (alone := split_number(child)):
            # The only layer: it has no neighbor, but a place.
            siblings = Siblings(node, alone[0], {alone[1]: inside}, False)
            found = [_layers(siblings)] * (siblings.meaning == "layers")
        yield from found


# -- One leaf per layer ----------------------------------------------------------------


def _numbered(
    siblings: Siblings, tree: list[Place], left_out: list[LeftOut]
) -> Iterator[Stack]:
    """The siblings as layers, or the stacks in each of them; or both as rivals."""
    found, is_named = siblings.meaning, siblings.meaning == "layers"
    is_stack = siblings.shares and (
        (is_named and (siblings.are_equal or siblings.num_modules > 1))
        or (found == "other" and siblings.are_equal)
    )
    left_out_inside: list[LeftOut] = []
    inner = [
        stack
        for number, places in siblings.children.items()
        for stack in _stacks(siblings.path(number), places, tree, left_out_inside)
    ]
    if not is_stack:
        inner = inner or list(_stacked_between(siblings))
        left_out += left_out_inside
        if siblings.shares and siblings.are_equal and (found == "beside" or not inner):
            what = (
                "things that stand side by side"
                if found == "beside"
                else "parts of a layer"
            )
            reason = (
                f"{siblings}: {len(siblings.children)} siblings alike, named or built "
                f"as {what}"
            )
            left_out.append(
                LeftOut(reason, siblings.parent, siblings.stem, found == "beside")
            )
        elif is_named and not inner:
            what = "have a parameter of one shape"
            if siblings.shares:
                what = "are built alike, though they are called layers"
            reason = f"{siblings}: no two of them {what}"
            left_out.append(LeftOut(reason, siblings.parent, siblings.stem, True))
        yield from inner
        return
    whole = _cycle_or_layers(siblings)
    inner = [stack for stack in inner if not stack.is_one_layer]
    named_inside = any(stack.is_named for stack in inner)
    if inner and named_inside and not is_named:
        yield from inner
    elif inner and (named_inside or not is_named):
        equal_inside = [s for s in inner if "partly alike" not in s.reason]
        rivals = tuple(equal_inside if siblings.are_equal else inner)
        yield replace(whole, rivals=rivals)
    elif not is_named and (parts := _chain_of_parts(siblings)):
        yield replace(whole, rivals=tuple(parts))
    elif is_named and (units := _chain_of_units(siblings)):
        yield replace(whole, rivals=tuple(units))
    else:
        yield whole


def _cycle_or_layers(siblings: Siblings) -> Stack:
    axes = stacked_axes(siblings.places)
    if axes is None:
        return _layers(siblings)
    doubt = (
        f"{siblings}: all their leaves have one size on axis {some(axes)}: they are "
        f"probably a cycle of stacked layers"
    )
    return _cycle(siblings, axes[0], "", (doubt,))


def _layers(siblings: Siblings) -> Stack:
    named = ", named as layers" * (siblings.meaning == "layers")
    structure = "of equal structure" if siblings.are_equal else "partly alike"
    scattered = [
        role
        for role, numbers in siblings.numbers_of_roles.items()
        if not are_consecutive(numbers) and len(numbers) > 1
    ]
    first = next(iter(siblings.children))
    kinds = layer_kinds(siblings.path(first), siblings.children[first])
    parent, start = show_path((*siblings.parent, "")), len(siblings.parent) + 1
    stack = (parent + siblings.stem).rstrip("/_.")
    return Stack(
        "unrolled",
        siblings.patterns,
        {},
        bool(scattered),
        {
            place.path: Depth(stack, show_path(place.path[start:]), number)
            for number, places in siblings.children.items()
            for place in places
            if place.leaf is not MASKED
        },
        f"{siblings}: {len(siblings.children)} siblings {structure}{named}",
        tuple(_doubts(siblings, scattered, kinds)),
        is_named=bool(named),
        kinds=kinds,
    )


def _doubts(
    siblings: Siblings, scattered: Sequence[tuple], kinds: tuple[str, ...]
) -> Iterator[str]:
    numbers = list(siblings.children)
    if not are_consecutive(numbers):
        yield (
            f"{siblings}: the numbers {some(numbers)} have gaps, which `ranked` "
            f"closes. Is each one the next one's neighbor?"
        )
    elif scattered:
        yield (
            f"{siblings}: {some(sorted({show_path(path) for path, *_ in scattered}))} "
            f"are of one shape in some of the layers only, which `ranked` couples over "
            f"the others: layers of several kinds that alternate, such as those with "
            f"experts"
        )
    if kinds:
        yield (
            f"{siblings}: all parts of each are there as {some(kinds)}. Are they "
            f"{len(kinds)} layers? Then write a function that numbers them"
        )


def _chain_of_parts(siblings: Siblings) -> list[Stack]:
    """Where each sibling is nothing but a chain of parts, as an MLP is: those."""
    chains = []
    for number, places in siblings.children.items():
        node = siblings.path(number)
        while True:
            families, others = children_of(node, places)
            if families or len(others) != 1:
                break
            node = (*node, next(iter(others)))
        if others or len(families) != 1 or not families[0].are_equal:
            return []
        chains.append(_layers(families[0]))
    return chains


def _chain_of_units(siblings: Siblings) -> list[Stack]:
    """The same, of units that are no parts: block1/unit1, block1/unit2, …."""
    chains = _chain_of_parts(siblings)
    if any("parts" in meaning(s.patterns[-1].rpartition("/")[0]) for s in chains):
        return []
    return chains


def _stacked_between(siblings: Siblings) -> Iterator[Stack]:
    """The hidden layers in (first, stacked hidden, last): of one more rank."""
    ranks = {
        number: {siblings.inside(p): np.ndim(p.leaf) for p in places}
        for number, places in siblings.children.items()
        if all(p.leaf is not MASKED for p in places)
    }
    for number, own in ranks.items():
        others = [r for n, r in ranks.items() if n != number and r.keys() == own.keys()]
        if others and all(own[path] == r[path] + 1 for r in others for path in own):
            node = siblings.path(number)
            stack = _scanned(node, siblings.children[number], (0,), "")
            if len({p.leaf.shape[0] for p in siblings.children[number]}) == 1:
                reason = f"{show_path(node)}: of one more rank than its siblings"
                doubt = f"{reason}, as layers between a first and a last one are"
                yield replace(stack, reason=reason, doubts=(doubt,))


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
    found = {frozenset(part_kinds) for part_kinds in kinds.values()}
    alike = all(
        all(roles == first for roles in part_kinds.values())
        for part_kinds in kinds.values()
        for first in [next(iter(part_kinds.values()))]
    )
    if len(kinds) < 2 or len(found) > 1 or not alike:
        return ()
    (common_kinds,) = found
    return tuple(sorted(common_kinds)) if len(common_kinds) > 1 else ()


# -- Layers along axes -----------------------------------------------------------------


def stacked_axes(places: Sequence[Place]) -> list[int] | None:
    """Axes that layers may be stacked on, or None: on which all leaves have one size.

    An unrolled layer nearly always has vectors, and a stacked one has matrices that
    are called as vectors.
    """
    leaves = _present(places)
    shapes = [np.shape(place.leaf) for place in leaves]
    ranks = list(map(len, shapes))
    vectors = [p for p in leaves if p.path and str(p.path[-1]) in VECTORS]
    if not vectors or min(ranks) < 2 or max(ranks) < 3:
        return None
    return _common_axes(shapes) or None


def _common_axes(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return [
        axis
        for axis in range(min(map(len, shapes), default=0))
        if len({shape[axis] for shape in shapes}) == 1 and shapes[0][axis] > 1
    ]


def _stacked(node: Path, places: list[Place], tree: list[Place]) -> Stack | None:
    """The node as a stack over axes, by the names of the axes or by the shapes."""
    if not node or not _present(places):
        return None
    if axes := next((a for p in places if (a := _depth_axes(p))), ()):
        return _stacked_by_names(node, places, axes)
    if any(_is_depth_name(name) for p in tree for name in p.axis_names):
        return None  # such a tree says where its layers are
    return _stacked_by_shapes(node, places, tree)


def _depth_axes(place: Place) -> tuple[int, ...]:
    return tuple(i for i, n in enumerate(place.axis_names) if _is_depth_name(n))


def _is_depth_name(name: Any) -> bool:
    return _names_depth(name) or name == "blocks"


def _names_depth(name: Any) -> bool:
    """Whether it surely does: "blocks" is also what a block-diagonal matrix has."""
    return isinstance(name, str) and _DEPTH_AXIS.fullmatch(name) is not None


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
    called = [named[0].axis_names[a] for a in axes]
    doubts = []
    if not all(map(_names_depth, called)):
        doubts.append(
            f"{show_path(node)}: an axis named {some(called)} may be of layers or of "
            f"a block-diagonal matrix"
        )
    if strangers := _strangers(leaves):
        doubts.append(
            f"{some(strangers)}: no leaf of the module has axis names; its size on "
            f"{_on(axes)} may be that of the layers by chance"
        )
    if len(axes) > 1:
        doubts.append(
            f"{show_path(node)}: several axes are named after layers "
            f"({some(called)}). Does depth run over them in this order?"
        )
    reason = (
        f"{show_path(node)}: {_on(axes)} named {some(called)} in {len(named)} of its "
        f"{len(leaves)} leaves"
    )
    return _scanned(node, places, axes, reason, tuple(doubts))


def _stacked_by_shapes(
    node: Path, places: list[Place], tree: list[Place]
) -> Stack | None:
    leaves, name = _present(places), str(node[-1]).rstrip("0123456789")
    num_modules = len({p.path[:-1] for p in leaves})
    is_named = meaning(name) == "layers" or (
        meaning(name) == "layers of parts" and num_modules > 1
    )
    has_vectors = stacked_axes(places) is not None
    shapes = [np.shape(p.leaf) for p in leaves]
    axes = _common_axes(shapes) if min(map(len, shapes)) > 1 else []
    if not axes or max(map(len, shapes)) < 3:
        return None
    if not (is_named or has_vectors and num_modules > 1):
        return None
    if _layers_are_below(node, places) or _is_beside(node) or _are_beside(node, leaves):
        return None
    if not has_vectors and (children_of(node, places)[0] or len(leaves) < 2):
        return None
    others = [p for p in _present(tree) if p.path[: len(node)] != node]
    elsewhere = {n for p in others for n in np.shape(p.leaf)}
    sizes = shapes[0]
    # The model's width is the size of other leaves too, and comes after the layers.
    own = [axis for axis in axes if sizes[axis] not in elsewhere]
    is_told = own[:1] == axes[:1] and len(own) == 1 and bool(others)
    axis = (own or axes)[0]
    doubts = []
    if not has_vectors and not is_told:
        doubts.append(
            f"{show_path(node)}: all {len(leaves)} leaves have size {sizes[axis]} on "
            f"axis {axis}, but none is a vector by its name"
        )
    if not is_named:
        doubts.append(
            f"{show_path(node)}: all {len(leaves)} leaves have size {sizes[axis]} on "
            f"axis {axis}. Layers stacked by a scan look like that, and so do an "
            f"ensemble, experts and heads, whose axis this may be"
        )
    if min(map(len, shapes)) > 2:
        doubts.append(
            f"{show_path(node)}: no leaf has less than {min(map(len, shapes))} axes. "
            f"Does depth run over more than one?"
        )
    if len(axes) > 1 and not is_told:
        doubts.append(
            f"{show_path(node)}: all leaves have one size each on axes {some(axes)}. "
            f"Which one is of the layers?"
        )
    if others and axis in _common_axes([np.shape(p.leaf) for p in others]):
        if np.shape(others[0].leaf)[axis] == sizes[axis]:
            doubts.append(
                f"all leaves of the tree have size {sizes[axis]} on axis {axis}: this "
                f"may be an ensemble of models"
            )
    reason = (
        f"{show_path(node)}: all {len(leaves)} leaves have size {sizes[axis]} on axis "
        f"{axis}" + ", vectors too" * has_vectors + ", named as layers" * is_named
    )
    stack = _scanned(node, places, (axis,), reason, tuple(doubts))
    num_axes = min(map(len, shapes)) - 1 if has_vectors else 1
    return replace(stack, num_axes=num_axes)


def _is_beside(node: Path) -> bool:
    return any(meaning(segment, True) == "beside" for segment in node)


def _are_beside(node: Path, leaves: Sequence[Place]) -> bool:
    return all(_is_beside(p.path[len(node) : -1]) for p in leaves)


def _stacked_beside(node: Path, places: list[Place]) -> LeftOut | None:
    """Heads, experts and ensembles that `vmap` stacked."""
    if not node or not _is_beside(node) or not (axes := stacked_axes(places)):
        return None
    reason = (
        f"{show_path(node)}: all leaves have one size on axis {some(axes)}, which is "
        f"probably of an ensemble, of experts or of heads and not of layers"
    )
    return LeftOut(reason, node, None, True)


def _layers_are_below(node: Path, places: Sequence[Place]) -> bool:
    """Whether the leaves rather belong to nodes below that are called layers."""
    return meaning(node[-1]) != "layers" and all(
        any(meaning(s) == "layers" for s in p.path[len(node) : -1]) for p in places
    )


def _scanned(
    node: Path,
    places: list[Place],
    axes: tuple[int, ...],
    reason: str,
    doubts: tuple[str, ...] = (),
) -> Stack:
    axis = axes[0] if len(axes) == 1 else axes
    families, others = children_of(node, places)
    cycle = next((f for f in families if f.meaning == "layers"), None)
    if cycle and not others and len(families) == len(axes) == 1:
        return _cycle(cycle, axes[0], f"{reason}; {cycle}: a cycle", doubts)
    kinds = layer_kinds(node, places, len(axes))
    below = {s for p in places for s in p.path[len(node) : -1]}
    layers = {s for s in below if meaning(s) == "layers" and not split_number(s)}
    if inner := sorted(map(str, layers)):
        doubts += (
            f"{show_path(node)}: it holds {some(inner)}. Are these a cycle, or stacked "
            f"once more?",
        )
    elif kinds:
        doubts += (
            f"{show_path(node)}: all parts are there as {some(kinds)}. Are they layers "
            f"of a cycle? Then write one `scanned(pattern, axis={axis}, start=..., "
            f"stride={len(kinds)})` for each",
        )
    is_leaf = any(place.path == node for place in places)
    segment = re.escape(str(node[-1])) + ("(?:/|$)" if is_leaf else "/")
    stack = show_path(node).rstrip("/_.")
    patterns = patterns_of(node[:-1], segment)
    return Stack(
        "scanned",
        patterns[1:] if str(node[-1]).isdecimal() else patterns,
        {"axis": axis},
        False,
        {
            p.path: Depth(stack, show_path(p.path[len(node) :]), axis=axis)
            for p in _present(places)
        },
        reason,
        doubts,
        is_named="named" in reason,
        kinds=kinds,
    )


def _cycle(
    siblings: Siblings, axis: int, reason: str, doubts: tuple[str, ...]
) -> Stack:
    layers, length = _layers(siblings), len(siblings.children)
    numbers = list(siblings.children)
    doubts += tuple(d for d in layers.doubts if "`ranked` closes" in d)
    if layers.ranked or any(
        len(numbers) < length for numbers in siblings.numbers_of_roles.values()
    ):
        doubts += (
            f"{siblings}: not all of them have the same parameters, and `ranked` "
            f"couples those of the same shape over the others",
        )
    return replace(
        layers,
        function="scanned",
        options={"axis": axis, "stride": length},
        ranked=any(len(ns) < len(numbers) for ns in siblings.numbers_of_roles.values()),
        depths={
            path: replace(depth, axis=axis, stride=length)
            for path, depth in layers.depths.items()
        },
        reason=reason or layers.reason,
        doubts=doubts,
    )


def _strangers(leaves: Sequence[Place]) -> list[str]:
    """Leaves in modules without axis names, except vectors that a scan stacked."""
    known = {place.path[:-1] for place in leaves if place.axis_names}
    return [
        show_path(place.path)
        for place in leaves
        if place.path[:-1] not in known
        and not (str(place.path[-1]) in VECTORS and np.ndim(place.leaf) == 2)
    ]


def _on(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {as_tuple(axes)}"


def _present(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place.leaf is not MASKED]
