"""Held against the contract: refused by us where it says so, else smoothed as it says.

What a depth means for a tree is read by `reading.py`, and the numbers are those of the
plain loops in `oracle.py`.
"""

import math
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import oracle
import pytest
import reading

import gradsmooth_optax as gs


class Applied(NamedTuple):
    """An operator, its matrices, and the only size that it fits, if there is one."""

    operator: Any
    matrix_of: Callable[[int], Any]
    size: int | None = None


def window(alpha, radius=1, decay=None):
    return Applied(
        gs.window(alpha, radius, decay),
        lambda n: oracle.window_matrix(n, alpha, radius, decay),
    )


def check(tree, description, applied, options):
    """Checks all that is promised, and returns in words what it came to."""
    leaves = reading.paths_of(tree)
    read = reading.Reading(description, leaves, options.get("strict", True))
    refused = read.malformed | read.refused
    unfit = set()
    if applied.size:
        lengths = {len(run) for key in read.groups for run in read.runs(key)}
        unfit = {"`dense` holds a matrix"} if lengths - {1, applied.size} else set()

    def transformation():
        return gs.smooth_over_depth(description.build(), applied.operator, **options)

    summary = unless(read.malformed, lambda: gs.describe(description.build(), tree))
    if summary is not None:
        check_summary(summary, leaves, read)
        assert str(gs.describe(description.build(), shapes_of(tree))) == str(summary)
    state = unless(refused, lambda: transformation().init(tree))
    out = unless(refused | unfit, lambda: updated(transformation(), tree, state))
    if out is None:
        return [f"refused: {message}" for message in sorted(refused | unfit)]
    check_result(out, [leaf for _, leaf in leaves], read, applied, options)
    return ["smoothed" if read.slices(coupled=True) else "nothing coupled"]


def unless(refused, call):
    """What `call` returns, None where it is to be refused; then it must be, by us."""
    if not refused:
        return call()
    with pytest.raises((TypeError, ValueError), match="|".join(refused)) as info:
        call()
    *_, last = traceback.extract_tb(info.value.__traceback__)
    assert Path(gs.__file__).parent in Path(last.filename).parents
    assert re.search(r"`\w+`", str(info.value))
    return None


def shapes_of(tree):
    return jax.tree.map(
        lambda leaf: (
            jax.eval_shape(lambda: leaf) if isinstance(leaf, jax.Array) else leaf
        ),
        tree,
    )


def updated(tx, tree, state):
    """The leaves of the update, the same objects where nothing is computed.

    In one program, whose arguments are the arrays of jax: the other leaves are seen as
    they are. It is much faster to compile than every operation by itself.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    out = []

    @jax.jit
    def new(arrays):
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        result, _ = tx.update(treedef.unflatten(given), state)
        assert jax.tree.structure(result) == treedef
        for before, after, leaf in zip(
            given, jax.tree.leaves(result), leaves, strict=True
        ):
            out.append(leaf if after is before else after)
        return {i: x for i, x in enumerate(out) if x is not leaves[i]}

    computed = new(arrays)
    return [computed.get(i, leaf) for i, leaf in enumerate(leaves)]


def check_summary(summary, leaves, read):
    """The groups are those that were read, and no leaf is left out."""
    assert {(g.stack, g.role, g.shape, g.dtype): g.layers for g in summary.groups} == {
        key: tuple(some.layer for some in of_group)
        for key, of_group in read.groups.items()
    }
    shown = [("/".join(map(str, path)), np.shape(leaf)) for path, leaf in leaves]
    members = [member.leaf for group in summary.groups for member in group.members]
    untouched = [entry[:2] for entry in summary.untouched]
    assert Counter([shown[i] for i in members] + untouched) == Counter(shown)
    if not read.refused:
        coupled = read.slices(coupled=True)
        assert summary.smoothed == sum(math.prod(key[2]) for key, _ in coupled)
    assert summary._repr_html_()


def check_result(out, leaves, read, applied, options):
    """The plain loops' numbers; what nothing is coupled to is the same object."""
    changed = {some.leaf for _, some in read.slices(coupled=True)}
    if applied.operator.is_identity:
        changed = set()
    for i, (after, before) in enumerate(zip(out, leaves, strict=True)):
        assert i in changed or after is before
        if i in changed:
            assert isinstance(after, jax.Array)
            assert after.shape == np.shape(before)
            assert after.dtype == reading.inexact_dtype(before)
    for (*_, dtype), (_, leaf, where) in read.slices(coupled=False):
        after, before = (np.asarray(x[leaf], dtype)[where] for x in (out, leaves))
        np.testing.assert_array_equal(after, before)
    norm_scope = options.get("norm_scope", "param")
    for stack in {key[0] for key, some in read.groups.items() if some}:
        expected = oracle.smooth(
            read.blocks(stack, leaves),
            applied.matrix_of,
            options.get("variant", "standard"),
            norm_scope,
            ranked={repr(key) for key in read.ranked},
        )
        check_blocks(read.blocks(stack, out), expected, norm_scope)


def check_blocks(got, expected, norm_scope):
    """Close, without the empty layers, which have no largest entry to compare with."""
    dtypes = {x.dtype for block in got for x in block.values()}
    # A norm over leaves of several dtypes need not be better than float32.
    single = reading.SINGLE if norm_scope == "block" and len(dtypes) > 1 else {}
    got = [
        {role: x.astype(single.get(x.dtype, x.dtype)) for role, x in block.items()}
        for block in got
    ]
    oracle.assert_blocks_close(*map(without_empty, (got, expected)))


def without_empty(blocks):
    return [{role: x for role, x in block.items() if x.size} for block in blocks]
