"""Operators and layouts that are split over devices, and their plain loops."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle
from jax.sharding import PartitionSpec as P
from own_operators import AlikeWindow

import gradsmooth_optax as gs

ALPHA = 0.375
STAGES, MODEL = 3, 2  # devices along the two axes of a mesh

# -- Operators -------------------------------------------------------------------------


def skewed(num_layers):
    """A band of two below and one above, different in every row."""
    values = np.random.default_rng(7).normal(size=(num_layers, num_layers))
    rows, columns = np.indices(values.shape)
    return np.where((columns - rows <= 1) & (rows - columns <= 2), values, 0.0)


def linear(matrix):
    def coupling(blocks, alpha, ranked):
        return oracle.smooth(blocks, lambda n: matrix(n, alpha), ranked=ranked)

    return coupling


def similarity(norm_scope, sharpness):
    def coupling(blocks, alpha, ranked):
        return oracle.similarity_window(blocks, alpha, norm_scope, sharpness, ranked)

    return coupling


class Split(NamedTuple):
    make: Callable  # alpha -> operator
    coupling: Callable  # (blocks, alpha, ranked) -> coupled blocks


BANDED = {
    "window": Split(gs.window, linear(oracle.window_matrix)),
    "window of radius 2": Split(
        lambda a: gs.window(a, 2), linear(lambda n, a: oracle.window_matrix(n, a, 2))
    ),
    "decaying window": Split(
        lambda a: gs.window(a, 3, decay=0.5),
        linear(lambda n, a: oracle.window_matrix(n, a, 3, 0.5)),
    ),
    "gaussian": Split(
        lambda s: gs.gaussian(s, radius=2),
        linear(lambda n, s: oracle.gaussian_matrix(n, s, 2)),
    ),
    "laplacian": Split(gs.laplacian, linear(oracle.laplacian_matrix)),
    "compose": Split(
        lambda a: gs.compose(gs.window(a, 2), gs.laplacian(0.3)),
        linear(
            lambda n, a: oracle.laplacian_matrix(n, 0.3) @ oracle.window_matrix(n, a, 2)
        ),
    ),
    "skewed": Split(
        lambda a: gs.operator_fn(lambda n: gs.dense(skewed(n)).matrix(n)),
        linear(lambda n, a: skewed(n)),
    ),
    "similarity per param": Split(
        lambda a: gs.similarity_window(a, "param", sharpness=0.5),
        similarity("param", 0.5),
    ),
    "similarity per block": Split(gs.similarity_window, similarity("block", 1.0)),
    "norm_matched": Split(lambda a: gs.controls.norm_matched(gs.window(a)), None),
    "a user's own that looks at norms": Split(
        lambda a: AlikeWindow(a, 1.25),
        lambda blocks, alpha, ranked: oracle.alike_window(blocks, alpha, 1.25, ranked),
    ),
}
WIDE = {
    "ema": Split(gs.ema, linear(lambda n, a: oracle.ema_matrix(n, a, False))),
    "tikhonov": Split(gs.tikhonov, linear(oracle.tikhonov_matrix)),
    "mean": Split(
        lambda a: gs.compose(gs.window(a), gs.mean_over_depth()),
        linear(lambda n, a: np.full((n, n), 1 / n)),
    ),
}
OPERATORS = BANDED | WIDE


def expected(name, blocks, variant="standard", norm_scope="param", ranked=False):
    """The plain loops."""

    def coupling(some):
        if name != "norm_matched":  # at the norms of the scope of the transformation
            return OPERATORS[name].coupling(some, ALPHA, ranked)
        window = OPERATORS["window"].coupling
        return oracle.norm_matched(
            some, lambda b: window(b, ALPHA, ranked), norm_scope, ranked
        )

    return oracle.couple(blocks, coupling, variant, norm_scope, ranked)


# -- Layouts ---------------------------------------------------------------------------


class Layout(NamedTuple):
    depth: Any
    tree: Any  # of whole arrays
    specs: Any  # how they are split
    blocks: list  # the same layers, one by one
    blocks_of: Callable  # tree -> blocks
    per_stage: int = 3


def make_blocks(num_layers, shapes=None, dtype="float32", seed=0, zero=True):
    """Random, but some layers agree and one that begins a stage of three is zero."""
    blocks = oracle.random_blocks(num_layers, "float32", shapes, seed)
    for block, previous in zip(blocks[1::4], blocks[::4], strict=False):
        for role in block:
            block[role] = 0.5 * previous[role]
    if zero and num_layers > 3:
        blocks[3] = {role: 0 * x for role, x in blocks[3].items()}
    return [{role: x.astype(dtype) for role, x in b.items()} for b in blocks]


SPLIT = P("stage")


def scanned(blocks, axis=0, specs=SPLIT, per_stage=3):
    """Every role stacked along an axis, the last one for roles of fewer axes."""

    def depth(path, leaf):
        return gs.Depth("blocks", path[-1], axis=min(axis, leaf.ndim - 1))

    tree = oracle.stacked_tree(blocks, axis)
    back = functools.partial(oracle.unstacked, axis=axis)
    return Layout(depth, tree, specs, blocks, back, per_stage)


NUMBERED = gs.scanned(r"l(\d+)/", stride=3, stack="layers")


def leaf_per_layer(blocks, depth=NUMBERED):
    """Leaf i holds layer i of every stage along a leading axis."""
    tree = {f"l{i}": oracle.stacked_tree(blocks[i::3]) for i in range(3)}
    return Layout(depth, tree, SPLIT, blocks, from_leaves)


def from_leaves(tree):
    parts = [oracle.unstacked(part) for part in tree.values()]
    return [parts[i % 3][i // 3] for i in range(3 * len(parts[0]))]


def mixed(blocks):
    """The first two layers of every stage in one leaf, the third in another."""

    def depth(path, leaf):
        if path[0] == "pair":
            return gs.Depth("b", path[-1], axis=(0, 1), stride=(3, 1))
        return gs.Depth("b", path[-1], 2, axis=0, stride=3)

    parts = leaf_per_layer(blocks).tree
    pair = {r: np.stack([x, parts["l1"][r]], 1) for r, x in parts["l0"].items()}

    def back(tree):
        first, second = ({r: x[:, i] for r, x in tree["pair"].items()} for i in (0, 1))
        return from_leaves({"l0": first, "l1": second, "l2": tree["third"]})

    tree = {"third": parts["l2"], "pair": pair}
    return Layout(depth, tree, SPLIT, blocks, back)


def circular(repeats, per_stage, order, stages=STAGES, shapes=None, name="stage"):
    """Layers as (repeats, stages, per stage), the axes in some order."""
    num_layers = repeats * stages * per_stage
    strides = {"r": stages * per_stage, "s": per_stage, "l": 1}
    blocks = make_blocks(num_layers, shapes)
    axes = ["rsl".index(letter) for letter in order]

    def depth(path, leaf):
        stride = tuple(strides[letter] for letter in order)
        return gs.Depth("blocks", path[-1], axis=(0, 1, 2), stride=stride)

    def arranged(x):
        x = x.reshape(repeats, stages, per_stage, *x.shape[1:])
        return np.transpose(x, (*axes, *range(3, x.ndim)))

    def back(tree):
        layers = {}
        for role, x in tree.items():
            x = np.transpose(x, (*np.argsort(axes), *range(3, x.ndim)))
            layers[role] = x.reshape(num_layers, *x.shape[3:])
        return oracle.unstacked(layers)

    tree = {role: arranged(x) for role, x in oracle.stacked_tree(blocks).items()}
    specs = P(*(name if letter == "s" else None for letter in order))
    return Layout(depth, tree, specs, blocks, back, per_stage)
