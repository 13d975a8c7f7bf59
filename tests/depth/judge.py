"""Who judges a reading of a tree: right, loud, or silently something else.

Right is who is coupled with whom, slice by slice, beside a truth that was written by
hand. Loud is an error, or what `init` warns of.
"""

import itertools
from typing import NamedTuple

import jax
import notation
import numpy as np

import gradsmooth_optax as gs


class Verdict(NamedTuple):
    """Right, loud; or silently "partly", where true pairs are missing, or "wrong"."""

    word: str
    why: str = ""


def judged(tree, reader, params, shown):
    """The verdict on a reader, which may be a call that makes a spec.

    Args:
      tree: as the notation has it, with its truths.
      reader: a key of `tree.words`.
      params: the tree as a pytree.
      shown: `describe`, or what remembers its answers for this tree.
    """
    try:
        summary = shown(spec_of(reader, params), params)
    except ValueError as error:
        return Verdict("loud", str(error))
    if summary.problem or summary.doubts:
        return Verdict("loud", summary.problem or summary.doubts[0])
    return verdict(tree, pairs(summary, params))


def spec_of(reader, params):
    if reader == "detect":
        return gs.detect(params).spec
    if reader == "unrolled":
        return gs.unrolled()
    presets = {name: getattr(gs.layouts, name) for name in dir(gs.layouts)}
    return eval(reader, presets | {"gs": gs, "ranked": gs.ranked})


def pairs(summary, params):
    """The pairs of slices that are coupled, by the groups of a summary."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [notation.unboxed(notation.written(path)) for path, _ in flat]
    return {
        frozenset((paths[leaf], place) for leaf, place in pair)
        for pair in neighbors(summary)
    }


def neighbors(summary):
    """The same, with numbers of leaves."""
    for group in summary.groups:
        slices = sorted(
            (int(layer), member.leaf, tuple(zip(member.axes, index, strict=True)))
            for member in group.members
            for index, layer in np.ndenumerate(member.layers)
        )
        for (a, *one), (b, *other) in itertools.pairwise(slices):
            if group.ranked or b == a + 1:
                yield tuple((leaf, frozenset(place)) for leaf, place in (one, other))


def verdict(tree, found):
    """How pairs of slices agree with one of the truths of a tree."""
    truths, partly = [], False
    for rules in tree.truths:
        by_chain = notation.neighbors(tree, rules)
        extra = [by_chain.pop(rule.chain, set()) for rule in rules if rule.optional]
        truth = set().union(*by_chain.values())
        truths.append(truth)
        # What is optional is there as a whole, or not at all.
        left = found - truth
        for chain in extra:
            left = left - chain if chain <= left else left
        if not left and truth <= found:
            return Verdict("right")
        partly = partly or found <= truth.union(*extra)
    if partly:
        most = max(truths, key=len)
        return Verdict("partly", f"{len(found & most)} of {len(most)} pairs of slices")
    false = found - set().union(*truths)
    some = sorted(sorted(path for path, _ in pair) for pair in false)[:2]
    return Verdict("wrong", f"{len(false)} of {len(found)} pairs are false, as {some}")
