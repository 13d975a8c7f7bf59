"""Numbered siblings in a tree: layers_0, layers_1, … and what they hold in common."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.paths import MASKED, Path, Place, present, show_path
from gradsmooth_optax._depth.words import (
    VECTORS,
    Meaning,
    is_layer,
    is_part,
    meaning,
    split_number,
)


@dataclass(frozen=True, eq=False)
class Siblings:
    """Numbered children of one node: layers_0, layers_1, … or 0, 1, … of a list.

    Attributes:
      parent: path of the node.
      stem: the children's name without the number.
      children: the places of each, by number.
      first_is_bare: whether number 0 is written without it, as Haiku does.
    """

    parent: Path
    stem: str
    children: dict[int, list[Place]]
    first_is_bare: bool

    @property
    def places(self) -> list[Place]:
        """The places of all."""
        return list(itertools.chain.from_iterable(self.children.values()))

    def path(self, number: int) -> Path:
        """The path of one of them."""
        return self.children[number][0].path[: len(self.parent) + 1]

    def inside(self, place: Place) -> Path:
        """The path of a place inside its sibling."""
        return place.path[len(self.parent) + 1 :]

    @functools.cached_property
    def numbers_of(self) -> dict[Path, list[int]]:
        """The numbers of the siblings that hold each path; wholly masked ones none."""
        numbers: dict[Path, list[int]] = defaultdict(list)
        there = {self.inside(p) for p in present(self.places)}
        for number, places in self.children.items():
            inside = {self.inside(place) for place in places}
            if not present(places) and inside.isdisjoint(there) and there:
                continue  # not a layer that is masked, but what has no parameters
            for place in places:
                if self.inside(place) or place.leaf is not MASKED:
                    numbers[self.inside(place)].append(number)
        return dict(numbers)

    @functools.cached_property
    def numbers_of_roles(self) -> dict[tuple, list[int]]:
        """The numbers of the siblings that hold each (path, shape, dtype)."""
        numbers: dict[tuple, list[int]] = defaultdict(list)
        for number, places in self.children.items():
            for place in places:
                if place.leaf is not MASKED:
                    numbers[(self.inside(place), *_kind(place.leaf))].append(number)
        return dict(numbers)

    @property
    def shares(self) -> bool:
        """Whether two of them hold a parameter of one shape, or may, where masked."""
        has_masked = any(place.leaf is MASKED for place in self.places)
        counts = map(len, self.numbers_of_roles.values())
        return has_masked or max(counts, default=0) > 1

    @property
    def shares_most(self) -> bool:
        """Whether most of their parameters have one shape in two of them, or may."""
        roles = self.numbers_of_roles.items()
        shared = {path for (path, *_), numbers in roles if len(numbers) > 1}
        shared |= {self.inside(p) for p in self.places if p.leaf is MASKED}
        return 2 * len(shared) >= len(self.numbers_of)

    @property
    def are_equal(self) -> bool:
        """Whether all of them have at least half of their parameters in common.

        And not vectors alone: a norm and a linear layer both have a bias.
        """
        known = {n for numbers in self.numbers_of.values() for n in numbers}
        ranks: dict[Path, set[int]] = defaultdict(set)
        for path, shape, _ in self.numbers_of_roles:
            ranks[path].add(len(shape))
        common = [
            path
            for path, numbers in self.numbers_of.items()
            if len(numbers) == len(known) and len(ranks[path]) < 2
        ]
        most = max(map(len, self.children.values()))
        vectors_alone = all(path and str(path[-1]) in VECTORS for path in common)
        return not known or (
            2 * len(common) >= most and not (vectors_alone and len(common) < most)
        )

    @property
    def share_matrices(self) -> bool:
        """Whether all of them hold a matrix of one shape, whatever else some hold."""
        return any(
            len(numbers) == len(self.children) and len(shape) > 1
            for (_, shape, _), numbers in self.numbers_of_roles.items()
        )

    @property
    def num_modules(self) -> int:
        """How many modules the largest of them has."""
        modules = defaultdict(set)
        for path, numbers in self.numbers_of.items():
            for number in numbers:
                modules[number].add(path[:-1])
        return max(map(len, modules.values()), default=0)

    @property
    def word(self) -> str | int:
        """Their name, or that of the list."""
        if self.stem or not self.parent:
            return self.stem
        name = self.parent[-1]
        stem, _ = split_number(name) or (name, 0)
        # A list in `layers_0` is one of parts; one in `layer_norm1` is of what it says.
        return stem if stem == name or meaning(stem) == "parts" else ""

    @property
    def meaning(self) -> Meaning:
        """What their name says, with what they hold and what they are in."""
        if "layer_stack" in self.stem:
            return "beside"  # Haiku's: each is a whole stack
        found = meaning(self.word, is_list=not self.stem)
        if found == "layers of parts":
            return "layers" if self.num_modules > 2 else "parts"
        return found

    @property
    def are_units(self) -> bool:
        """Whether each may be a layer, though none is called so."""
        is_list_of_modules = not self.stem and () not in self.numbers_of
        return self.num_modules > 1 or is_list_of_modules

    @property
    def is_in_one_layer(self) -> bool:
        """Whether a node above is called a layer, and is the only one."""
        holders = self.parent if self.stem else self.parent[:-1]
        return any(is_layer(name) and not split_number(name) for name in holders)

    @property
    def is_minor(self) -> bool:
        """Whether they are single modules that may be of a part of a layer."""
        holders = self.parent if self.stem else self.parent[:-1]
        is_unnamed = self.meaning != "layers" or any(map(is_part, holders))
        return is_unnamed and self.num_modules < 2

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns for them, from the shortest end of the path to the whole path."""
        number, stem = r"(\d+)", re.escape(self.stem)
        if min(self.children) < 0:
            number = r"(-?\d+)"
        segment = stem + number
        if self.first_is_bare:
            bare = stem.removesuffix("_")
            segment = f"{bare}(?:_{number})?" if bare != stem else f"{stem}{number}?"
        are_leaves = any(not self.inside(place) for place in self.places)
        ending = "(?:/|$)" if are_leaves else "/"
        patterns = patterns_of(self.parent, segment + ending)
        return patterns if self.stem else patterns[1:]  # a bare number says too little

    def __str__(self) -> str:
        first, last = min(self.children), max(self.children)
        return f"{show_path(self.path(first))} … {show_path(self.path(last))}"


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return np.shape(leaf), inexact_dtype(leaf)


def places_by_child(
    node: Path, places: Iterable[Place]
) -> dict[str | int, list[Place]]:
    children = defaultdict(list)
    for place in places:
        if len(place.path) > len(node):
            children[place.path[len(node)]].append(place)
    return dict(children)


def children_of(
    node: Path, places: Iterable[Place]
) -> tuple[list[Siblings], dict[str | int, list[Place]]]:
    """The children of `node` with their places: numbered siblings, and the others."""
    children = places_by_child(node, places)
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
        first, count = min(numbered), len(numbered)
        is_counted = sorted(numbered) == list(range(first, first + count))
        # From 2 on there may be a gap, or the count is from 1: to be decided.
        is_next = first == 1 or (first == 2 and count > 1)
        first_is_bare = bool(bare) and bare in children and is_counted and is_next
        if first_is_bare:
            numbered[0] = bare
        elif bare and first == 1 and f"first_{bare}" in children:
            numbered[0] = f"first_{bare}"
        if len(numbered) > 1:
            found = {n: children.pop(numbered[n]) for n in sorted(numbered)}
            families.append(Siblings(node, stem, found, first_is_bare))
    return families, children


def patterns_of(parent: Path, segment: str) -> tuple[str, ...]:
    """`segment` after more and more of the path, at last after all of it."""
    parts = [re.escape(str(part)) for part in parent]
    ends = ["/".join([*parts[i:], segment]) for i in range(len(parts), -1, -1)]
    return (*ends, f"^{ends[-1]}")


def are_consecutive(numbers: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in itertools.pairwise(sorted(numbers)))
