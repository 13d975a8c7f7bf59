"""Layers with parameters of several shapes, as trees: scanned, unrolled, or both."""

import jax
import numpy as np

import gradsmooth_optax as gs

# Parameters outside of all layers.
REST = {"embed": (5, 4), "head": {"bias": (3,)}}


def drawn(seed, shapes):
    """Arrays of these shapes, in the structure of the dict."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def stacked(trees, axis=0):
    """One tree, with the layers along the axis, or along the last one there is."""
    return jax.tree.map(lambda *xs: np.stack(xs, min(axis, xs[0].ndim)), *trees)


def on_axis(axis):
    return lambda trees: {"layers": stacked(trees, axis)}


def unrolled(trees):
    return {f"layers_{i}": tree for i, tree in enumerate(trees)}


def cycle(trees):
    return {"layers": {f"layers_{p}": stacked(trees[p::2]) for p in (0, 1)}}


def with_remainder(trees):
    return cycle(trees[:4]) | {"layers_remainder": {"layers_0": trees[4]}}


def nested(trees):
    return {"layers": stacked([stacked(trees[:2]), stacked(trees[2:])])}


def two_stacks(trees):
    return {
        "encoder": {"layers": stacked(trees[:2], 1)},
        "decoder": unrolled(trees[2:]),
    }


# Name -> the number of layers, the tree of these, and where depth is in it.
LAYOUTS = {
    "axis 0": (3, on_axis(0), gs.scanned("layers/")),
    "axis 1": (3, on_axis(1), gs.scanned("layers/", axis=1)),
    "last axis": (3, on_axis(9), gs.scanned("layers/", axis=-1)),
    "unrolled": (3, unrolled, gs.unrolled()),
    "cycle": (4, cycle, gs.scanned(r"layers_(\d+)/", stride=2)),
    "cycle with remainder": (
        5,
        with_remainder,
        gs.first_match(
            gs.scanned(r"^layers/layers_(\d+)/", stride=2, stack="decoder"),
            gs.unrolled(r"remainder/layers_(\d+)/", start=4, stack="decoder"),
        ),
    ),
    "nested scans": (4, nested, gs.scanned("layers/", axis=(0, 1))),
    "two stacks": (
        5,
        two_stacks,
        gs.first_match(gs.scanned("encoder/layers/", axis=1), gs.unrolled()),
    ),
}
