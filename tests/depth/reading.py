"""Which layers a tree holds and what is to be refused: the contract, read twice.

A depth is described by a value with two methods: `build` makes it with the library, and
`assign` says what it means for each leaf. `Reading` says what follows for a tree.
Nothing here is shared with the library.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax as gs

# Depths, described.


class At(NamedTuple):
    """The arguments of a `Depth`, whether it is ranked, and the scan it came from."""

    stack: Any
    role: Any
    layer: int = 0
    axis: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None
    ranked: bool = False
    scan: str | None = None

    def build(self):
        return gs.Depth(*self[:5])


class Wrong(NamedTuple):
    """What is refused in place of a `Depth`, with a pattern of the message."""

    message: str
    build: Callable[[], Any] = object


class Function(NamedTuple):
    """A function of the path: a table of `At`, `Wrong` and None."""

    table: dict

    def build(self):
        def depth(path, leaf):
            at = self.table[path]
            return at and at.build()

        return depth

    def assign(self, leaves):
        return [self.table[path] for path, _ in leaves]


FIRST_NUMBER = "([0-9]+)(?![^/])"  # that ends a segment


class Pattern(NamedTuple):
    """`unrolled` or `scanned`."""

    make: Callable
    pattern: str | None
    options: dict

    def build(self):
        # What `unrolled` takes without a pattern is another table's.
        return self.make(self.pattern or FIRST_NUMBER, **self.options)

    def assign(self, leaves):
        return [self._find("/".join(map(str, path))) for path, _ in leaves]

    def _find(self, text):
        match = re.search(self.pattern or FIRST_NUMBER, text)
        if match is None:
            return None
        names = match.re.groupindex
        unnamed = set(range(1, match.re.groups + 1)) - set(names.values())
        group = names.get("layer", min(unnamed, default=None))
        number, before = "0", text[: match.end()]
        if group is not None and match[group] is not None:
            start, end = match.span(group)
            number, before = match[group], text[:start]
            if not re.fullmatch("[+-]?[0-9]+", number):
                return Wrong("not a number")
            if before[-1:].isdigit() or text[end : end + 1].isdigit():
                return Wrong("cuts a number")
        named, rest = match.groupdict(), text[match.end() :].lstrip("/_.")
        stack = self.options.get("stack") or named.get("stack")
        if stack is None:
            stack = before.rstrip("/_.")
        role = "/".join(part for part in (named.get("role"), rest) if part)
        layer = self.options.get("start", 0) + int(number)
        if self.make is gs.unrolled:
            return At(stack, role, layer)
        axis, stride = self.options.get("axis", 0), self.options.get("stride")
        return At(stack, role, layer, axis, stride, scan=repr(self.build()))


class FirstMatch(NamedTuple):
    members: list

    def build(self):
        return gs.first_match(*(member.build() for member in self.members))

    def assign(self, leaves):
        found = [None] * len(leaves)
        for member in self.members:
            left = [i for i, at in enumerate(found) if at is None]
            new = member.assign([leaves[i] for i in left])
            for i, at in zip(left, new, strict=True):
                found[i] = at
        return found


class Ranked(NamedTuple):
    member: Any

    def build(self):
        return gs.ranked(self.member.build())

    def assign(self, leaves):
        found = self.member.assign(leaves)
        return [at._replace(ranked=True) if type(at) is At else at for at in found]


class Only(NamedTuple):
    member: Any
    predicate: Callable[[Any, Any], bool]

    def build(self):
        return self.member.build().only(self.predicate)

    def assign(self, leaves):
        found = zip(self.member.assign(leaves), leaves, strict=True)
        return [
            at if type(at) is Wrong or self.predicate(*leaf) else None
            for at, leaf in found
        ]


class OnlyProjections(NamedTuple):
    """For trees whose linear weights are the matrices called kernel."""

    member: Any
    bias: bool

    def build(self):
        return self.member.build().only_projections(self.bias)

    def assign(self, leaves):
        found = list(zip(self.member.assign(leaves), leaves, strict=True))
        kernels = {
            path
            for at, (path, leaf) in found
            if type(at) is At
            and path[-1:] == ("kernel",)
            and np.ndim(leaf) - len(as_tuple(at.axis)) >= 2
        }
        modules = {path[:-1] for path in kernels}

        def in_scope(path):
            return path[:-1] in modules if self.bias else path in kernels

        return [
            at if type(at) is Wrong or in_scope(path) else None
            for at, (path, _) in found
        ]


def as_tuple(value):
    return () if value is None else value if isinstance(value, tuple) else (value,)


def paths_of(tree):
    """(plain path, leaf) of every leaf: an only child without a name has none."""
    everything = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode)
    )
    siblings = Counter(key_path[:-1] for key_path, _ in everything)
    return [
        (path_of(key_path, siblings[key_path[:-1]] == 1), leaf)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def path_of(key_path, is_only_child=True):
    """The plain segments of one of jax's key paths."""
    keys = list(key_path)
    last = keys[-1] if keys else None
    if is_only_child and isinstance(last, jax.tree_util.FlattenedIndexKey):
        keys.pop()
    path = []
    for key in keys:
        segment = getattr(key, "name", getattr(key, "idx", getattr(key, "key", None)))
        if isinstance(segment, str) and "/" in segment:
            path += [part for part in segment.split("/") if part]
        else:
            path.append(segment)
    return tuple(path)


# Trees.

SINGLE = {
    np.dtype("float64"): np.dtype("float32"),
    np.dtype("complex128"): np.dtype("complex64"),
}


class Slice(NamedTuple):
    """A layer of a leaf: its number, the leaf's position, and where it is in there."""

    layer: int
    leaf: int
    where: tuple


class Reading:
    """What a described depth means for a tree with these (path, leaf) pairs.

    Attributes:
      groups: slices in depth order, by (stack, role, shape of a layer, dtype).
      ranked: the groups whose gaps are closed.
      malformed: patterns of the messages for what is no grouping at all.
      refused: and of those for a grouping that does not fit the tree.
    """

    def __init__(self, description, leaves, strict):
        found = description.assign(leaves)
        self.malformed = {at.message for at in found if type(at) is Wrong}
        groups, ranked, scans = defaultdict(list), defaultdict(set), defaultdict(set)
        for i, (at, (_, leaf)) in enumerate(zip(found, leaves, strict=True)):
            dtype, shape = inexact_dtype(leaf), np.shape(leaf)
            if type(at) is not At or dtype is None:
                continue
            axes = depth_axes(at, len(shape))
            if axes is None:
                self.malformed.add("`depth` says axis=")
                continue
            of_layer = tuple(n for k, n in enumerate(shape) if k not in axes)
            key = (at.stack, at.role, of_layer, dtype)
            groups[key] += slices(at, axes, i, shape)
            ranked[key].add(at.ranked)
            scans[at.scan, at.stack].add(tuple(shape[k] for k in sorted(axes)))
        if any(len(kinds) > 1 for kinds in ranked.values()):
            self.malformed.add("ranks only a part")
        self.ranked = {key for key, kinds in ranked.items() if True in kinds}
        self.groups = {key: sorted(some) for key, some in groups.items()}
        self.refused = set(self._refusals(leaves, strict, scans))

    def _refusals(self, leaves, strict, scans):
        if not self.groups and [path for path, _ in leaves] == [()]:
            yield "lone array"
        elif not self.groups and leaves and strict:
            yield "matched none|but none of floating|leaves out all"
        if strict and any(
            scan and len(sizes) > 1 for (scan, _), sizes in scans.items()
        ):
            yield "different numbers of layers"
        for key, some in self.groups.items():
            if len({layer for layer, _, _ in some}) < len(some):
                yield "gives layer"
            elif strict and len(self.runs(key)) > 1:
                yield "missing"

    def runs(self, key):
        """The slices of a group, cut where a number is missing."""
        runs = []
        for some in self.groups[key]:
            if runs and (key in self.ranked or some.layer == runs[-1][-1].layer + 1):
                runs[-1].append(some)
            else:
                runs.append([some])
        return runs

    def slices(self, coupled):
        """(group, slice) of every slice that has a neighbor, or that has none."""
        return [
            (key, some)
            for key in self.groups
            for run in self.runs(key)
            for some in run
            if (len(run) > 1) == coupled
        ]

    def blocks(self, stack, values):
        """What the leaves' `values` hold of a stack, as the oracle takes it."""
        held = [
            (some, key)
            for key, of_group in self.groups.items()
            for some in of_group
            if key[0] == stack
        ]
        layers = [some.layer for some, _ in held]
        blocks = [{} for _ in range(min(layers), max(layers) + 1)]
        for (layer, leaf, where), key in held:
            blocks[layer - min(layers)][repr(key)] = np.asarray(values[leaf])[where]
        return blocks


def inexact_dtype(leaf):
    """The dtype in which jax computes a leaf, None for one that passes through."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    dtype = np.dtype(dtype)
    return dtype if jax.config.jax_enable_x64 else SINGLE.get(dtype, dtype)


def depth_axes(at, rank):
    """The axes that `at` names, counted from the front, None where that fails."""
    named = as_tuple(at.axis)
    if not all(-rank <= axis < rank for axis in named):
        return None
    axes = [axis % rank for axis in named]
    return axes if len(set(axes)) == len(axes) else None


def slices(at, axes, leaf, shape):
    """The layers that a leaf of this shape holds."""
    sizes = [shape[axis] for axis in axes]
    strides = as_tuple(at.stride)
    if at.stride is None:  # Contiguous, the last axis fastest.
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    for index in np.ndindex(*sizes):
        where = [slice(None)] * len(shape)
        for axis, i in zip(axes, index, strict=True):
            where[axis] = i
        layer = at.layer + sum(i * n for i, n in zip(index, strides, strict=True))
        yield Slice(layer, leaf, tuple(where))
