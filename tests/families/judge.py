"""What the readers of the library make of a tree, beside the truth.

The updates are numbered element by element, and an operator gives every layer the
update of the next one: the result tells, for every element, who its neighbor is.
Nothing of the library's own description is believed.
"""

import dataclasses
import itertools
import re
import warnings
from typing import NamedTuple

import jax
import numpy as np
import stacks

import gradsmooth_optax as gs

from . import notation


@dataclasses.dataclass(frozen=True, eq=False)
class Next(gs.Operator):
    """Every layer gets the update of the next one, and the last of a run zeros."""

    def couple(self, layers):
        return layers.shifted(1, missing="zero")


class Case(NamedTuple):
    """A tree to judge.

    Attributes:
      name: unique.
      params: the tree, its elements numbered from 1.
      truths: sets of pairs of elements, any of which is right.
      optional: for each truth further sets, each of which may be there as a whole.
      presets: calls that are meant for the tree.
      misuses: calls that a user might try, and that must not be silently wrong.
      must: readers that have to be right, and silent.
    """

    name: str
    params: object
    truths: list
    optional: list
    presets: list
    misuses: list
    must: tuple


class Verdict(NamedTuple):
    word: str
    why: str


def cases():
    """Of the trees of `data/`, and of those of `stacks.py`."""
    trees = [case(tree) for tree in notation.read_all()]
    return trees + [stack_case(stack) for stack in stacks.STACKS]


def case(tree):
    numbers = _numbered(tree.leaves)
    values = {leaf.path: numbers[leaf.path].astype(leaf.dtype) for leaf in tree.leaves}
    truths, optional = [], []
    for rules in tree.truths:
        by_chain = {
            chain: _elements(numbers, pairs)
            for chain, pairs in notation.neighbors(tree, rules).items()
        }
        for rule in rules:
            assert by_chain.get(rule.chain), f"{tree.name}: {rule} holds no layers"
        extra = {rule.chain for rule in rules if rule.optional}
        required = [pairs for chain, pairs in by_chain.items() if chain not in extra]
        truths.append(frozenset().union(*required))
        optional.append([by_chain[chain] for chain in extra])
    params = notation.build(tree, values)
    return Case(
        tree.name, params, truths, optional, tree.presets, tree.misuses, tree.must
    )


def _numbered(leaves):
    """{path: the numbers of the elements, from 1}."""
    numbers, first = {}, 1
    for leaf in leaves:
        size = int(np.prod(leaf.shape))
        numbers[leaf.path] = first + np.arange(size).reshape(leaf.shape)
        first += size
    assert first < 2**24, "float32 counts no further"
    return numbers


def _elements(numbers, pairs):
    found = set()
    for (path, index), (other, other_index) in pairs:
        a, b = numbers[path][index].ravel(), numbers[other][other_index].ravel()
        found |= set(zip(a.tolist(), b.tolist(), strict=True))
    return frozenset(map(_ordered, found))


def _ordered(pair):
    return min(pair), max(pair)


# In `stacks.py` as one chain: as right are chains that differ in the pattern's text.
SPLITS = {
    "maxtext-deepseek": "(dense|moe)_layers",
    "maxtext-gemma3": "layers(_remainder)?/layers_",
    "uvit-joined": "(in|out)_blocks",
}


def stack_case(stack):
    """A row of `stacks.py`, whose truth stands at its leaves."""
    numbers = _numbered(stack.leaves)
    slices = {
        ((leaf.chain, stacks.role_of(leaf)), layer): (leaf.path, index)
        for leaf in stack.leaves
        if leaf.chain is not None
        for layer, index in stacks.slots(leaf)
    }

    def truth(stack):
        return [
            (slices[name, a], slices[name, b])
            for name, a, b in stacks.true_pairs(stack)
        ]

    truths = [truth(stack)]
    if stack.ranked:
        truths.append(truth(stack._replace(ranked=False)))
    if stack.chains:
        truths.append([pair for pair in truths[0] if _chain(stack, pair)])
    for name, pattern in SPLITS.items():
        if stack.name.startswith(name):
            truths.append([pair for pair in truths[0] if _alike(pattern, pair)])
    values = {path: number.astype(np.float32) for path, number in numbers.items()}
    return Case(
        stack.name,
        stacks.fill(stack._replace(real=None), values),
        [_elements(numbers, pairs) for pairs in truths],
        [[]] * len(truths),
        [stack.preset] if stack.preset is not None else [],
        [],
        (),
    )


def _chain(stack, pair):
    path = pair[0][0]
    return any(leaf.path == path and stack.covers(leaf) for leaf in stack.leaves)


def _alike(pattern, pair):
    a, b = (re.search(pattern, path)[0] for path, _ in pair)
    return a == b


def judge(case, spec_of):
    """The verdict on the spec that `spec_of(params)` returns."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pairs = coupled(spec_of(case.params), case.params)
    except (ValueError, TypeError, KeyError) as error:
        return Verdict("loud", f"{type(error).__name__}: {error}")
    if caught:
        return Verdict("loud", f"{caught[0].category.__name__}: {caught[0].message}")
    return verdict(case, pairs)


def verdict(case, pairs):
    """How pairs of elements agree with the truths of a case."""
    partly = False
    for truth, optional in zip(case.truths, case.optional, strict=True):
        left = pairs - truth
        for chain in optional:
            left = left - chain if chain <= left else left
        if not left and truth <= pairs:
            return Verdict("right", "")
        partly = partly or pairs <= truth.union(*optional)
    if partly:
        most = max(case.truths, key=len)
        return Verdict("partly", f"{len(pairs)} of {len(most)} pairs of elements")
    optional = itertools.chain.from_iterable(case.optional)
    false = len(pairs - frozenset().union(*case.truths, *optional))
    return Verdict("wrong", f"{false} of {len(pairs)} pairs of elements are false")


def coupled(depth, params):
    """The pairs of numbered elements that a transformation couples."""
    smooth = gs.smooth_over_depth(depth, Next())
    updates, _ = smooth.update(params, smooth.init(params))
    pairs = set()
    before, after = jax.tree.leaves(params), jax.tree.leaves(updates)
    for own, got in zip(before, after, strict=True):
        if own is got:
            continue
        own, got = np.asarray(own).ravel(), np.asarray(got).ravel()
        moved = (got != own) & (got != 0)
        here, there = (x[moved].astype(int).tolist() for x in (own, got))
        pairs |= set(zip(here, there, strict=True))
    return frozenset(map(_ordered, pairs))


def in_place_of(params, other):
    """The tree `other`, with the numbers of `params`, which has the same paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    numbers = {notation.text(path): x for path, x in flat}
    flat, treedef = jax.tree_util.tree_flatten_with_path(other)
    return treedef.unflatten([numbers[notation.text(path)] for path, _ in flat])


# -- Readers ---------------------------------------------------------------------------


def detected(params):
    return gs.detect(params).spec


def unrolled(params):
    return gs.unrolled()


def called(call):
    """A reader by the text of its call: a preset, or a spec of `gs`."""
    names = {name: getattr(gs.layouts, name) for name in dir(gs.layouts)}
    names |= {"ranked": gs.ranked, "gs": gs}
    return lambda params: eval(call, names) if isinstance(call, str) else call


def verdicts(case):
    """{reader: verdict}; calls are their own names."""
    readers = {"detect": detected, "unrolled": unrolled}
    readers |= {call: called(call) for call in (*case.presets, *case.misuses)}
    return {name: judge(case, reader) for name, reader in readers.items()}
