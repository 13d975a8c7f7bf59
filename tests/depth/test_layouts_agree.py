"""The same layers give the same numbers, whatever tree holds them.

A layout is a spec and a function that puts blocks into a tree. What comes out is the
tree of what the plain loops make of the blocks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from nodes import Variable

import gradsmooth_optax as gs

# Where only the grouping is at stake: neighbors of neighbors, and norms over leaves.
RADIUS, NORMS = 2, {"variant": "norm_preserving", "norm_scope": "block"}
SHAPES = {"kernel": (2, 3), "bias": (3,)}
HALVES = (slice(3), slice(3, None))


class Layout(NamedTuple):
    """A way to hold the layers of a model.

    Attributes:
      spec: where depth is.
      build: what makes the tree of the blocks.
      stacks: the parts of the blocks that are coupled.
      num_layers: how many blocks there are.
    """

    spec: Any
    build: Any
    stacks: tuple[slice, ...] = (slice(None),)
    num_layers: int = 6


def stacked(blocks, axis=0):
    return oracle.stacked_tree(blocks, axis)


def over_axes(blocks, *sizes, moved=(0, 0)):
    """Stacked over axes of these sizes, of which one is moved."""
    return {
        role: np.moveaxis(x.reshape(*sizes, *x.shape[1:]), *moved)
        for role, x in stacked(blocks).items()
    }


def halves(blocks):
    return (blocks[half] for half in HALVES)


def cycles_and_remainder(blocks):
    cycle = {f"layers_{p}": stacked(blocks[p:4:2], 1) for p in range(2)}
    rest = oracle.unrolled_tree(blocks[4:])
    return {"decoder": {"layers": cycle, "layers_remainder": rest}}


def scans_in_a_row(blocks):
    dense, moe = halves(blocks)
    return {"dense_layers": stacked(dense, 1), "moe_layers": stacked(moe, 1)}


def on_different_axes(blocks):
    encoder, decoder = halves(blocks)
    return {"encoder": {"b": stacked(encoder)}, "decoder": {"b": stacked(decoder, 1)}}


def by_path(path, leaf):
    if path[0] == "kernels":
        return gs.Depth("s", "kernel", axis=1)
    return gs.Depth("s", "bias", layer=path[1])


def role_by_role(blocks):
    kernels = stacked(blocks, 1)["kernel"]
    return {"kernels": kernels, "biases": [b["bias"] for b in blocks]}


def boxes(blocks):
    return jax.tree.map(Variable, oracle.unrolled_tree(blocks))


def flax_nnx(blocks):
    nnx = pytest.importorskip("flax.nnx")
    linear = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    layers = [jax.tree.map(lambda x: x, linear) for _ in blocks]
    for layer, block in zip(layers, blocks, strict=True):
        for role, x in block.items():
            layer[role] = nnx.Param(x)
    return nnx.State({"layers": dict(enumerate(layers))})


def equinox(blocks):
    eqx = pytest.importorskip("equinox")
    linear = eqx.filter_eval_shape(eqx.nn.Linear, 3, 2, key=jax.random.key(0))
    return [
        eqx.tree_at(lambda x: (x.weight, x.bias), linear, (b["kernel"], b["bias"]))
        for b in blocks
    ]


LAYOUTS = {
    # A leaf for each layer.
    "names with numbers": Layout(gs.unrolled(), oracle.unrolled_tree, num_layers=12),
    "numbers as names": Layout(
        gs.unrolled(), lambda blocks: {"h": {str(i): b for i, b in enumerate(blocks)}}
    ),
    "numbers as keys": Layout(
        gs.unrolled(), lambda blocks: {"layers": dict(enumerate(blocks))}
    ),
    "a list": Layout(gs.unrolled(), lambda blocks: {"layers": blocks}),
    "a tuple at the root": Layout(gs.unrolled(), tuple),
    "lists of arrays": Layout(
        gs.unrolled(r"(?P<role>\w+)/(\d+)", stack="s"),
        lambda blocks: {r: [b[r] for b in blocks] for r in SHAPES},
    ),
    "Haiku's names": Layout(
        gs.unrolled(r"block(?:_(\d+))?/"),
        lambda blocks: {
            f"net/block{f'_{i}' if i else ''}/linear": b for i, b in enumerate(blocks)
        },
    ),
    "dotted names": Layout(
        gs.unrolled(r"layers/(\d+)/"),
        lambda blocks: {
            f"h.layers.{i}.{r}": b[r] for i, b in enumerate(blocks) for r in SHAPES
        },
    ),
    "two halves of one stack": Layout(
        gs.first_match(
            gs.unrolled("a/(.)", stack="s"), gs.unrolled("b/(.)", stack="s", start=3)
        ),
        lambda blocks: dict(zip("ab", halves(blocks), strict=True)),
    ),
    "two models": Layout(
        gs.unrolled(),
        lambda blocks: [{"layers": half} for half in halves(blocks)],
        HALVES,
    ),
    # Layers stacked along axes.
    "an axis": Layout(gs.scanned("b/"), lambda blocks: {"b": stacked(blocks)}),
    "the second axis": Layout(
        gs.scanned("b/", axis=1), lambda blocks: {"b": stacked(blocks, 1)}
    ),
    "the last axis": Layout(
        gs.scanned("b/", axis=-1), lambda blocks: {"b": stacked(blocks, 2)}
    ),
    "nested scans": Layout(
        gs.scanned("b/", axis=(0, 1)), lambda blocks: {"b": over_axes(blocks, 2, 3)}
    ),
    "nested scans, the outer axis last": Layout(
        gs.scanned("b/", axis=(1, 0)),
        lambda blocks: {"b": over_axes(blocks, 2, 3, moved=(0, 1))},
    ),
    "nested scans, of which strides say which runs fastest": Layout(
        gs.scanned("b/", axis=(0, 1), stride=(1, 2)),
        lambda blocks: {"b": over_axes(blocks, 3, 2, moved=(0, 1))},
    ),
    "a pipeline of repeats, stages and layers per stage": Layout(
        gs.scanned("b/", axis=(0, 1, 3)),
        lambda blocks: {"b": over_axes(blocks, 2, 2, 2, moved=(2, 3))},
        num_layers=8,
    ),
    "cycles and a remainder, as MaxText's Gemma 3": Layout(
        gs.first_match(
            gs.scanned(r"layers/layers_(\d+)/", axis=1, stride=2, stack="s"),
            gs.unrolled(r"layers_remainder/layers_(\d+)/", start=4, stack="s"),
        ),
        cycles_and_remainder,
    ),
    "two named parts of a cycle, as MaxText's Gemma 2": Layout(
        gs.first_match(
            gs.scanned("local/", axis=1, stride=2, stack="s"),
            gs.scanned("global/", axis=1, start=1, stride=2, stack="s"),
        ),
        lambda blocks: {
            "local": stacked(blocks[::2], 1),
            "global": stacked(blocks[1::2], 1),
        },
    ),
    "two scans in a row": Layout(
        gs.first_match(
            gs.scanned("dense_layers/", axis=1, stack="s"),
            gs.scanned("moe_layers/", axis=1, start=3, stack="s"),
        ),
        scans_in_a_row,
    ),
    "two scans that are two stacks": Layout(
        gs.scanned(r"(?:dense|moe)_layers/", axis=1), scans_in_a_row, HALVES
    ),
    "two stacks on different axes, as big_vision's CapPa": Layout(
        gs.first_match(gs.scanned("encoder/b/"), gs.scanned("decoder/b/", axis=1)),
        on_different_axes,
        HALVES,
    ),
    "roles that are laid out differently": Layout(by_path, role_by_role),
    # Boxes and classes of other libraries.
    "boxes": Layout(gs.unrolled(r"layers_(\d+)/(kernel|bias)$"), boxes),
    "Flax NNX": Layout(gs.unrolled(), flax_nnx),
    "Equinox": Layout(gs.unrolled(), equinox),
}


# -- What holds ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_layers_give_the_same_numbers(name):
    spec, build, stacks, num_layers = LAYOUTS[name]
    blocks = oracle.random_blocks(num_layers, shapes=SHAPES)
    tree = jax.tree.map(jnp.asarray, build(blocks))
    options = NORMS if len(jax.tree.leaves(tree)) > len(SHAPES) else {}
    tx = gs.smooth_over_depth(spec, gs.window(0.3, radius=RADIUS), **options)

    def step(tree):
        return tx.update(tree, tx.init(tree))[0]

    # Operations on single layers are compiled once for all layouts.
    is_unrolled = all(x.shape in SHAPES.values() for x in jax.tree.leaves(tree))
    out = step(tree) if is_unrolled else jax.jit(step)(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    expected = [
        block
        for stack in stacks
        for block in oracle.window(blocks[stack], 0.3, RADIUS, **options)
    ]
    jax.tree.map(assert_close, out, build(expected))


def assert_close(actual, expected):
    assert actual.dtype == jnp.float32
    assert oracle.relative_error(actual, expected) < 2e-6
