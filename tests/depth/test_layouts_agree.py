"""The same layers give the same numbers, whatever tree holds them.

A layout is a spec and a function that puts blocks into a tree. What comes out is the
tree of what the plain loops make of the blocks.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs

# Where only the grouping is at stake: neighbors of neighbors, and norms over all roles.
RADIUS, OPTIONS = 2, {"variant": "norm_preserving", "norm_scope": "block"}
SHAPES = {"kernel": (2, 3), "bias": (3,)}
LAYOUTS = {}


class Layout(NamedTuple):
    """A way to hold the layers of a model.

    Attributes:
      spec: where depth is.
      build: what makes the tree of the blocks.
      cuts: layers at which another stack begins.
      num_layers: how many blocks there are.
    """

    spec: Any
    build: Any
    cuts: tuple[int, ...] = ()
    num_layers: int = 6


def layout(spec, **more):
    def named(build):
        LAYOUTS[build.__name__] = Layout(spec, build, **more)
        return build

    return named


def stacked(blocks, axis=0):
    return oracle.stacked_tree(blocks, axis)


def over_axes(blocks, *sizes, moved=None):
    """Stacked over axes of these sizes, the first of which come first."""
    tree = {r: x.reshape(*sizes, *x.shape[1:]) for r, x in stacked(blocks).items()}
    return (
        tree if moved is None else {r: np.moveaxis(x, *moved) for r, x in tree.items()}
    )


# -- A leaf for each layer -------------------------------------------------------------


@layout(gs.unrolled(), num_layers=12)
def names_with_numbers(blocks):
    return oracle.unrolled_tree(blocks)


@layout(gs.unrolled())
def numbers_as_names(blocks):
    return {"layers": {str(i): b for i, b in enumerate(blocks)}}


@layout(gs.unrolled())
def numbers_as_keys(blocks):
    return {"layers": dict(enumerate(blocks))}


@layout(gs.unrolled())
def a_list(blocks):
    return {"layers": list(blocks)}


@layout(gs.unrolled())
def a_tuple_at_the_root(blocks):
    return tuple(blocks)


@layout(gs.unrolled(r"(?P<role>\w+)/(\d+)", stack="s"))
def lists_of_arrays(blocks):
    return {r: [b[r] for b in blocks] for r in SHAPES}


@layout(gs.unrolled(r"block(?:_(\d+))?/"))
def haikus_names(blocks):
    return {
        f"transformer/block{f'_{i}' if i else ''}/linear": b
        for i, b in enumerate(blocks)
    }


@layout(gs.unrolled(r"layers/(\d+)/"))
def dotted_names(blocks):
    return {f"h.layers.{i}.fc.{r}": b[r] for i, b in enumerate(blocks) for r in SHAPES}


@layout(
    gs.first_match(gs.unrolled("a/(.)", stack="s"), gs.unrolled("b/(.)", stack="s"))
)
def two_halves_that_are_named_one_stack(blocks):
    return {half: {str(i): blocks[i] for i in range(n, n + 3)} for half, n in HALVES}


HALVES = [("a", 0), ("b", 3)]


@layout(gs.unrolled(), cuts=(3,))
def two_models(blocks):
    return {"enc": {"layers": blocks[:3]}, "dec": {"layers": blocks[3:]}}


# -- Layers stacked along axes ---------------------------------------------------------


@layout(gs.scanned("blocks/"))
def an_axis(blocks):
    return {"blocks": stacked(blocks), "embed": np.ones((2, 3), np.float32)}


@layout(gs.scanned("blocks/", axis=1))
def the_second_axis(blocks):
    return {"blocks": stacked(blocks, 1)}


@layout(gs.scanned("blocks/", axis=-1))
def the_last_axis(blocks):
    return {"blocks": stacked(blocks, 2)}


@layout(gs.scanned("blocks/", axis=(0, 1)))
def nested_scans(blocks):
    return {"blocks": over_axes(blocks, 2, 3)}


@layout(gs.scanned("blocks/", axis=(1, 0)))
def nested_scans_with_the_outer_axis_last(blocks):
    return {"blocks": over_axes(blocks, 2, 3, moved=(0, 1))}


@layout(gs.scanned("blocks/", axis=(0, 1), stride=(1, 2)))
def nested_scans_whose_strides_say_which_runs_fastest(blocks):
    return {"blocks": over_axes(blocks, 3, 2, moved=(0, 1))}


@layout(gs.scanned("layers/", axis=(0, 1, 3)), num_layers=8)
def a_pipeline_of_repeats_stages_and_layers_per_stage(blocks):
    return {"layers": over_axes(blocks, 2, 2, 2, moved=(2, 3))}


@layout(
    gs.first_match(
        gs.scanned(r"layers/layers_(\d+)/", axis=1, stride=2, stack="decoder"),
        gs.unrolled(r"layers_remainder/layers_(\d+)/", start=4, stack="decoder"),
    )
)
def scanned_cycles_and_an_unrolled_remainder(blocks):  # MaxText's Gemma 3
    cycle = {f"layers_{p}": stacked(blocks[p:4:2], 1) for p in range(2)}
    rest = oracle.unrolled_tree(blocks[4:])
    return {"decoder": {"layers": cycle, "layers_remainder": rest}}


@layout(
    gs.first_match(
        gs.scanned("layers/mlp_local/", axis=1, stride=2, stack="decoder"),
        gs.scanned("layers/mlp_global/", axis=1, start=1, stride=2, stack="decoder"),
    )
)
def two_named_parts_of_a_cycle(blocks):  # MaxText's Gemma 2
    parts = {
        "mlp_local": stacked(blocks[::2], 1),
        "mlp_global": stacked(blocks[1::2], 1),
    }
    return {"layers": parts}


@layout(
    gs.first_match(
        gs.scanned("dense_layers/", axis=1, stack="decoder"),
        gs.scanned("moe_layers/", axis=1, start=3, stack="decoder"),
    )
)
def two_scans_in_a_row(blocks):
    return {
        "dense_layers": stacked(blocks[:3], 1),
        "moe_layers": stacked(blocks[3:], 1),
    }


@layout(gs.scanned(r"(?:dense|moe)_layers/", axis=1), cuts=(3,))
def two_scans_that_are_two_stacks(blocks):
    return two_scans_in_a_row(blocks)


@layout(
    gs.first_match(gs.scanned("encoder/b/"), gs.scanned("decoder/b/", axis=1)),
    cuts=(3,),
)
def two_stacks_on_different_axes(blocks):  # big_vision's CapPa
    encoder, decoder = stacked(blocks[:3]), stacked(blocks[3:], 1)
    return {"encoder": {"b": encoder}, "decoder": {"b": decoder}}


def by_path(path, leaf):
    if path[0] == "kernels":
        return gs.Depth("s", "kernel", axis=1)
    return gs.Depth("s", "bias", layer=path[1])


@layout(by_path)
def roles_that_are_laid_out_differently(blocks):
    kernels = stacked(blocks, 1)["kernel"]
    return {"kernels": kernels, "biases": [b["bias"] for b in blocks]}


# -- Boxes and classes of other libraries ----------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Variable:
    """Like Flax's."""

    value: Any

    def get_metadata(self):
        return {}


@layout(gs.unrolled(r"layers_(\d+)/(kernel|bias)$"))
def boxes(blocks):
    return jax.tree.map(Variable, oracle.unrolled_tree(blocks))


@layout(gs.unrolled())
def flax_nnx(blocks):
    nnx = pytest.importorskip("flax.nnx")
    linear = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    layers = [jax.tree.map(lambda x: x, linear) for _ in blocks]
    for layer, block in zip(layers, blocks, strict=True):
        for role, x in block.items():
            layer[role] = nnx.Param(x)
    return nnx.State({"layers": dict(enumerate(layers))})


@layout(gs.unrolled())
def equinox(blocks):
    eqx = pytest.importorskip("equinox")

    linear = eqx.filter_eval_shape(eqx.nn.Linear, 3, 2, key=jax.random.key(0))
    return [
        eqx.tree_at(lambda x: (x.weight, x.bias), linear, (b["kernel"], b["bias"]))
        for b in blocks
    ]


# -- What holds ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_layers_give_the_same_numbers(name):
    spec, build, cuts, num_layers = LAYOUTS[name]
    blocks = oracle.random_blocks(num_layers, shapes=SHAPES)
    tree = jax.tree.map(jnp.asarray, build(blocks))
    tx = gs.smooth_over_depth(spec, gs.window(0.3, radius=RADIUS), **OPTIONS)

    def step(tree):
        return tx.update(tree, tx.init(tree))[0]

    # Operations on single layers are compiled once for all layouts.
    is_unrolled = all(x.shape in SHAPES.values() for x in jax.tree.leaves(tree))
    out = step(tree) if is_unrolled else jax.jit(step)(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    expected = [
        block
        for start, stop in itertools.pairwise((0, *cuts, num_layers))
        for block in oracle.window(blocks[start:stop], 0.3, RADIUS, **OPTIONS)
    ]
    jax.tree.map(assert_close, out, build(expected))


def assert_close(actual, expected):
    assert actual.dtype == jnp.float32
    assert oracle.relative_error(actual, expected) < 2e-6


def test_a_strided_leaf_alone_has_gaps_that_are_boundaries_when_not_strict():
    tree, spec = {"blocks": {"w": jnp.ones((3, 2))}}, gs.scanned("blocks/", stride=2)
    tx = gs.smooth_over_depth(spec, strict=False)
    assert tx.update(tree, tx.init(tree))[0]["blocks"]["w"] is tree["blocks"]["w"]
    with pytest.raises(ValueError, match=r"layers 1, 3 are missing"):
        gs.smooth_over_depth(spec).init(tree)
