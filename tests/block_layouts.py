"""Layers as a list of blocks, and the trees that may hold them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle

import gradsmooth_optax as gs


class Layout(NamedTuple):
    """A way to hold blocks.

    Attributes:
      tree_of: blocks -> tree.
      blocks_in: tree -> blocks.
      depth: the spec of the tree.
      num_layers: how many blocks it takes; those in `holes` are empty.
      strict, ranked: as for the spec.
    """

    tree_of: Callable[[list], Any]
    blocks_in: Callable[[Any], list]
    depth: Any
    num_layers: int = 5  # more than 4 are a matmul for a wide operator, not shifts
    holes: tuple[int, ...] = ()
    strict: bool = True
    ranked: bool = False


def unrolled(depth=None, **kwargs):
    return Layout(
        lambda blocks: {k: b for k, b in oracle.unrolled_tree(blocks).items() if b},
        lambda tree: [
            tree.get(f"layers_{layer}", {})
            for layer in range(1 + max(int(key.split("_")[1]) for key in tree))
        ],
        depth or gs.unrolled(r"layers_(\d+)/"),
        **kwargs,
    )


def last_axis(blocks):
    return {"blocks": {r: np.moveaxis(x, 0, -1) for r, x in _stack(blocks).items()}}


def from_last_axis(tree):
    return oracle.unstacked(
        {r: np.moveaxis(x, -1, 0) for r, x in tree["blocks"].items()}
    )


def cycles(blocks):
    """Two cycles of two layers, scanned on axis 1, and what remains."""
    tree = {
        f"position_{p}": {r: np.stack([x, blocks[p + 2][r]], 1) for r, x in b.items()}
        for p, b in enumerate(blocks[:2])
    }
    return {**tree, "rest_0": dict(blocks[4])}


def from_cycles(tree):
    blocks = [
        {r: np.asarray(x)[:, cycle] for r, x in tree[f"position_{p}"].items()}
        for cycle in range(2)
        for p in range(2)
    ]
    return [*blocks, tree["rest_0"]]


def nested(blocks):
    stack = _stack(blocks)
    return {"blocks": {r: x.reshape(3, 2, *x.shape[1:]) for r, x in stack.items()}}


def from_nested(tree):
    stack = {r: np.asarray(x) for r, x in tree["blocks"].items()}
    return oracle.unstacked({r: x.reshape(6, *x.shape[2:]) for r, x in stack.items()})


def _stack(blocks):
    return oracle.stacked_tree(blocks)


# Roles of one shape, and few layers: a test's time is the compilation of one kernel for
# each shape and dtype.
SHAPES = {"kernel": (2, 3), "other": (2, 3)}

LAYOUTS = {
    "stacked": Layout(
        lambda blocks: {"blocks": _stack(blocks)},
        lambda tree: oracle.unstacked(tree["blocks"]),
        gs.scanned("blocks/"),
    ),
    "unrolled": unrolled(),
    "stacked on the last axis": Layout(
        last_axis, from_last_axis, gs.scanned("blocks/", axis=-1)
    ),
    "cycles and a remainder": Layout(
        cycles,
        from_cycles,
        gs.first_match(
            gs.scanned(r"position_(\d)/", axis=1, stride=2, stack="layers"),
            gs.unrolled(r"rest_(\d)/", start=4, stack="layers"),
        ),
    ),
    "nested scans": Layout(
        nested,
        from_nested,
        gs.scanned("blocks/", axis=(0, 1), stride=(2, 1)),
        num_layers=6,
    ),
    "two runs with a gap": unrolled(holes=(3,), strict=False, num_layers=6),
    "ranked over a gap": unrolled(
        gs.ranked(gs.unrolled(r"layers_(\d+)/")), holes=(2,), ranked=True
    ),
}


def blocks_for(layout, dtype="float32", shapes=SHAPES, zero_layer=False, seed=1):
    """Blocks that a layout takes: some layers agree, some do not."""
    num_layers, holes = LAYOUTS[layout].num_layers, LAYOUTS[layout].holes
    blocks = oracle.random_blocks(num_layers, "float64", shapes, seed)
    for role in blocks[0]:
        blocks[1][role] = 0.5 * blocks[0][role] + 0.1 * blocks[1][role]
        if zero_layer:
            blocks[num_layers - 1][role] = 0.0 * blocks[0][role]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        turns = np.exp(1j * np.arange(num_layers) / 2)
        blocks = [
            {r: t * x for r, x in b.items()} for t, b in zip(turns, blocks, strict=True)
        ]
    blocks = [{r: x.astype(dtype) for r, x in b.items()} for b in blocks]
    return [{} if i in holes else b for i, b in enumerate(blocks)]


def tree_in(layout, blocks):
    return jax.tree.map(jnp.asarray, LAYOUTS[layout].tree_of(blocks))


def smoothed(layout, blocks, operator, **kwargs):
    """The blocks after one update. Not compiled: each kernel is, once for all tests."""
    tree = tree_in(layout, blocks)
    strict = kwargs.pop("strict", LAYOUTS[layout].strict)
    tx = gs.smooth_over_depth(LAYOUTS[layout].depth, operator, strict=strict, **kwargs)
    out, _ = tx.update(tree, tx.init(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    return LAYOUTS[layout].blocks_in(jax.tree.map(np.asarray, out))
