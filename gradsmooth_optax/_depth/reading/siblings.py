"""Numbered siblings in a tree: layers_0, layers_1, … and what they hold in common."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.paths import Path, show_path
from gradsmooth_optax._depth.reading.found_stack import leaves_by_child, patterns_of
from gradsmooth_optax._depth.reading.words import split_number
from gradsmooth_optax._depth.specs import Leaves


class Siblings(NamedTuple):
    """Numbered children of one node: layers_0, layers_1, … or 0, 1, … of a list.

    Attributes:
      parent: path of the node.
      stem: the children's name without the number.
      children: the leaves of each, by number.
      first_is_bare: whether number 0 is written without it, as Haiku does.
    """

    parent: Path
    stem: str
    children: dict[int, Leaves]
    first_is_bare: bool

    @property
    def word(self) -> str | int:
        """What they are called, by their own name or that of the list."""
        return self.stem or (self.parent[-1] if self.parent else "")

    @property
    def leaves(self) -> Leaves:
        """The leaves of all."""
        return [
            leaf for child_leaves in self.children.values() for leaf in child_leaves
        ]

    def path(self, number: int) -> Path:
        """The path of one of them."""
        return self.children[number][0][0][: len(self.parent) + 1]

    def __str__(self) -> str:
        first, last = min(self.children), max(self.children)
        return f"{show_path(self.path(first))} … {show_path(self.path(last))}"


class Role(NamedTuple):
    """A parameter of a layer, by its path inside the layer."""

    path: Path
    shape: tuple[int, ...]
    dtype: Any


def children_of(
    node: Path, leaves: Leaves
) -> tuple[list[Siblings], dict[str | int, Leaves]]:
    """The children of `node` with their leaves: numbered siblings, and the others."""
    children = leaves_by_child(node, leaves)
    by_stem: dict[str, dict[int, str | int]] = defaultdict(dict)
    ambiguous = set()
    for child in children:
        if (split := split_number(child)) is not None:
            if split[1] in by_stem[split[0]]:
                ambiguous.add(split[0])  # layer_1 and layer_01
            by_stem[split[0]][split[1]] = child
    families = []
    for stem, numbered in by_stem.items():
        if stem in ambiguous:
            continue
        bare = stem.removesuffix("_")
        first_is_bare = bare != stem and bare in children and 0 not in numbered
        if first_is_bare:
            numbered[0] = bare
        if len(numbered) > 1:
            numbered_leaves = {n: children.pop(numbered[n]) for n in sorted(numbered)}
            families.append(Siblings(node, stem, numbered_leaves, first_is_bare))
    return families, children


def holders_of(siblings: Siblings) -> dict[Role, list[int]]:
    """The numbers of the layers that hold each role."""
    holders: dict[Role, list[int]] = defaultdict(list)
    start = len(siblings.parent) + 1
    for number, leaves in siblings.children.items():
        for path, leaf in leaves:
            role = Role(path[start:], np.shape(leaf), inexact_dtype(leaf))
            holders[role].append(number)
    return holders


def are_equal(siblings: Siblings) -> bool:
    """Whether all siblings have at least half of their parameters in common."""
    everywhere = sum(
        len(numbers) == len(siblings.children)
        for numbers in holders_of(siblings).values()
    )
    return 2 * everywhere >= max(map(len, siblings.children.values()))


def numbered_patterns(siblings: Siblings) -> tuple[str, ...]:
    number, stem = r"(\d+)", re.escape(siblings.stem)
    segment = stem + number
    if siblings.first_is_bare:
        segment = rf"{stem.removesuffix('_')}(?:_{number})?"
    is_leaf = any(len(path) == len(siblings.parent) + 1 for path, _ in siblings.leaves)
    patterns = patterns_of(siblings.parent, segment + ("(?:/|$)" if is_leaf else "/"))
    return patterns if siblings.stem else patterns[1:]  # a bare number says too little
