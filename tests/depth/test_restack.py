"""Trees moved between a scanned model and an unrolled one come back bit for bit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import judge
import notation
import numpy as np
import optax
import pytest
from layer_layouts import LAYOUTS, REST, drawn, unrolled

import gradsmooth_optax as gs

SHAPES = {
    "attn": {"kernel": (4, 4)},
    "mlp": {"kernel": (4, 6), "bias": (6,)},
    "norm": {"scale": (4,)},
}
# That of one leaf for each layer is what the others become.
SCANNED = {name: row for name, row in LAYOUTS.items() if name != "unrolled"}


def layers(num_layers, seed):
    return [drawn(seed + i, SHAPES) for i in range(num_layers)]


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def model(layout, seed=0):
    num_layers, made, depth = LAYOUTS[layout]
    return made(layers(num_layers, seed)) | drawn(99, REST), depth


@pytest.mark.parametrize("layout", ["axis 0", "axis 1", "last axis"])
def test_a_scanned_model_becomes_numbered_siblings(layout):
    params, depth = model(layout)
    same(gs.unstack(params, depth), unrolled(layers(3, 0)) | drawn(99, REST))


def test_a_layer_may_be_a_child_of_a_list():
    params, depth = model("axis 1")
    found = gs.unstack(params, depth, name="{path}/{layer}")
    assert found["layers"].keys() == {"0", "1", "2"}
    like = {"layers": layers(3, 5)} | drawn(5, REST)
    found = gs.unstack(params, depth, name="{path}/{layer}", like=like)
    same(found, {"layers": layers(3, 0)} | drawn(99, REST))


def test_positions_of_a_cycle_are_layers_in_depth_order():
    params, depth = model("cycle")
    found = gs.unstack(params, depth)["layers"]
    same(found, unrolled(layers(4, 0)))


def test_a_cycle_and_its_remainder_are_one_stack_by_name():
    params, depth = model("cycle with remainder")
    found = gs.unstack(params, depth, name="{stack}_{layer}")
    wanted = {f"decoder_{i}": layer for i, layer in enumerate(layers(5, 0))}
    same(found, wanted | drawn(99, REST))


NAMED = {
    "maxtext": ("decoder", "layers", 1),
    "flax_linen(scan_axis=0)": ("encoder", "encoderblock", 0),
}


@pytest.mark.parametrize("depth", NAMED)
def test_a_layout_is_found_by_its_name(depth):
    node, stack, axis = NAMED[depth]
    trees = layers(3, 0)
    scanned = {"params": {node: {stack: LAYOUTS[f"axis {axis}"][1](trees)["layers"]}}}
    found = gs.unstack(scanned, depth)
    listed = {f"{stack}_{i}": tree for i, tree in enumerate(trees)}
    same(found, {"params": {node: listed}})
    same(gs.stack(found, depth, like=scanned), scanned)


STATES = {
    "parameters": optax.identity(),
    "adam": optax.adam(0.1),
    "adamw, masked": optax.adamw(
        0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "partition": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda x: "a" if x.ndim > 2 else "b", p),
    ),
}


def numbered(shapes):
    """A tree of these shapes, all of its elements different."""
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(
        (100 * i + np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        for i, x in enumerate(leaves)
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("layout", SCANNED)
def test_there_and_back_is_the_same(layout, state):
    params, depth = model(layout)
    name = "{stack}_{layer}" if layout == "cycle with remainder" else "{path}_{layer}"
    tree = params, numbered(jax.eval_shape(STATES[state].init, params))
    there = gs.unstack(tree, depth, name=name)
    same(gs.stack(there, depth, name=name, like=tree), tree)


@pytest.mark.parametrize("file", ["maxtext_parts", "built_here", "big_vision"])
def test_real_trees_come_back_from_a_leaf_for_each_layer(file):
    trees = notation.trees_of(file)
    # Stacked layers in nodes that are no mappings need `like`, see below.
    for name in trees.keys() - {"equinox-filter-vmap", "equinox-list"}:
        tree = trees[name]
        params = notation.built(tree, numbered(notation.shapes_of(tree)))
        calls = [r for r, w in tree.words.items() if w == "right" and "(" in r]
        spec = judge.spec_of(calls[0], params) if calls else gs.unrolled()
        groups = gs.describe(spec, params).groups
        if not any(group.is_stacked for group in groups):
            continue
        form = "{stack}_{layer}" if "gemma2" in name else "{path}_{layer}"
        flat = gs.unstack(params, spec, name=form)
        num_layers = sum(group.num_layers - len(group.members) for group in groups)
        assert len(jax.tree.leaves(flat)) == num_layers + len(jax.tree.leaves(params))
        same(gs.stack(flat, spec, name=form, like=params), params)
        shapes = notation.built(tree)
        moved = gs.unstack(shapes, spec, name=form)
        assert list(map(np.shape, jax.tree.leaves(moved))) == [
            x.shape for x in jax.tree.leaves(flat)
        ]
        back = gs.stack(moved, spec, name=form, like=shapes)
        assert jax.tree.leaves(back) == jax.tree.leaves(shapes)


def test_a_state_of_adam_is_that_of_the_unrolled_model():
    params, depth = model("axis 1")
    updates, _ = model("axis 1", seed=7)
    flat, flat_updates = gs.unstack(params, depth), gs.unstack(updates, depth)
    tx = optax.adamw(0.1)
    step = jax.jit(lambda u, p: tx.update(u, tx.init(p), p))
    same(gs.unstack(step(updates, params), depth), step(flat_updates, flat))


class Seen(NamedTuple):
    """A state that tells of which layer it is: of its shapes, factored, and a count."""

    count: jax.Array
    like: Any
    rows: Any


def seen(params):
    rows = jax.tree.map(lambda x: x.sum(-1), params)
    return Seen(jnp.zeros([], jnp.int32), params, rows)


@pytest.mark.parametrize("layout", sorted(SCANNED.keys() - {"two stacks"}))
def test_a_state_of_per_layer_goes_on_in_the_unrolled_model(layout):
    params, depth = model(layout)
    inner = optax.chain(
        optax.GradientTransformation(seen, optax.identity().update),
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.lamb(0.1),
    )
    is_joined = layout == "cycle with remainder"
    name = "block_{layer}" if is_joined else "{path}_{layer}"
    flat = gs.unstack(params, depth, name=name)
    stack = "decoder" if is_joined else None
    flat_depth = gs.unrolled(r"(?:layers|block)_(\d+)/", stack=stack)
    state = jax.jit(gs.per_layer(inner, depth).init)(params)
    wanted = jax.jit(gs.per_layer(inner, flat_depth).init)(flat)
    moved = gs.unstack(state, depth, name=name, like=wanted)
    same(moved, wanted)
    same(gs.stack(moved, depth, name=name, like=state), state)


def test_other_containers_beside_the_layers_stay_what_they_are():
    params = {
        "enc": {"layers": {"w": jnp.ones((3, 4))}},
        "dec": {"layers": {"w": jnp.ones((3, 4))}, "extra": [jnp.ones(2), jnp.ones(2)]},
        "heads": (jnp.ones(2), jnp.zeros(2)),
    }
    depth = gs.scanned("layers/")
    for tree in (params, optax.adam(0.1).init(params)):
        found = gs.unstack(tree, depth)
        same(gs.stack(found, depth, like=tree), tree)
    found = gs.unstack(params, depth)
    assert found["dec"].keys() == {"layers_0", "layers_1", "layers_2", "extra"}
    assert isinstance(found["heads"], tuple)


def test_a_masked_group_is_spread_as_the_group_that_holds_the_layers():
    params = {"blocks": {"w": jnp.ones((3, 4))}, "o": jnp.ones(2)}
    tx = optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        lambda tree: (
            {
                "blocks": jax.tree.map(lambda _: "a", tree["blocks"]),
                "o": "b",
            }
            if "blocks" in tree
            else jax.tree.map(lambda _: "a", tree)
        ),
    )
    depth = gs.scanned("blocks/")
    flat = gs.unstack(params, depth)
    found = gs.unstack(tx.init(params), depth)
    updates, _ = tx.update(flat, tx.init(flat), flat)
    again, _ = tx.update(flat, jax.tree.map(jnp.asarray, tx.init(flat)), flat)
    same(updates, again)
    assert found.inner_states["a"].inner_state[0].mu.keys() == flat.keys()
    masked = found.inner_states["b"].inner_state[0].trace
    assert masked.keys() == flat.keys()
    assert masked["blocks_2"]["w"] == optax.MaskedNode()


def test_a_number_that_is_the_nodes_name_stays():
    params = {"blk1": {"a": jnp.ones((2, 4))}, "blk2": {"a": jnp.ones((2, 4))}}
    depth = gs.first_match(
        gs.scanned("blk1/", stack="d"), gs.scanned("blk2/", stack="d", start=2)
    )
    assert gs.unstack(params, depth).keys() == {"blk1_0", "blk1_1", "blk2_2", "blk2_3"}


def test_a_function_is_not_asked_about_counts():
    params = {"blocks": {"w": jnp.ones((2, 3))}}
    depth = gs.depth_fn(lambda path, leaf: gs.Depth("b", path[-1], axis=0))
    found = gs.unstack(optax.adam(0.1).init(params), depth)
    assert found[0].mu.keys() == {"blocks_0", "blocks_1"}


def test_masks_and_none_stay_where_they_are():
    params = {
        "layers": {"w": jnp.ones((2, 3)), "m": optax.MaskedNode(), "n": None},
        "head": optax.MaskedNode(),
    }
    depth = gs.scanned("layers/")
    found = gs.unstack(params, depth)
    assert found["layers_1"]["m"] == optax.MaskedNode()
    assert found["layers_1"]["n"] is None
    assert found["head"] == optax.MaskedNode()
    same(gs.stack(found, depth, like=params), params)


def test_the_modules_of_equinox_are_filled_by_like():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    def layer(key):
        return eqx.nn.Linear(4, 4, key=key)

    shapes = eqx.filter_eval_shape(eqx.filter_vmap(layer), keys)
    one = eqx.filter_eval_shape(layer, keys[0])
    stacked, listed = {"layers": numbered(shapes)}, {"layers": [numbered(one)] * 3}
    depth, name = gs.scanned("layers/"), "{path}/{layer}"
    found = gs.unstack(stacked, depth, name=name, like=listed)
    assert isinstance(found["layers"][1], eqx.nn.Linear)
    np.testing.assert_array_equal(
        found["layers"][1].weight, stacked["layers"].weight[1]
    )
    same(gs.stack(found, depth, name=name, like=stacked), stacked)
    with pytest.raises(ValueError, match=r"in a Linear, which is no mapping.*like="):
        gs.unstack(stacked["layers"], gs.scanned(""), name=name)


def test_bits_are_kept_also_of_nan_and_integers():
    bits = np.arange(6, dtype=np.uint32).reshape(2, 3) + 0x7FC00001
    params = {"layers": {"w": bits.view(np.float32), "step": np.arange(2)}}
    depth = gs.scanned("layers/")
    back = gs.stack(gs.unstack(params, depth), depth, like=params)
    np.testing.assert_array_equal(back["layers"]["w"].view(np.uint32), bits)
    np.testing.assert_array_equal(back["layers"]["step"], np.arange(2))


def plain_adafactor():
    params, depth = model("axis 1")
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    flat = gs.unstack(params, depth)
    gs.unstack(tx.init(params), depth, like=tx.init(flat))


PARAMS = {"layers": {"w": jnp.ones((2, 3))}, "head": jnp.ones(2)}
ERRORS = {
    "nothing stacked": (
        lambda: gs.unstack(PARAMS, gs.scanned("blocks/")),
        "finds no stacked leaf",
    ),
    "nothing stacked in like": (
        lambda: gs.stack(PARAMS, gs.scanned("blocks/"), like=PARAMS),
        "finds no stacked leaf in `like`",
    ),
    "one path for all": (
        lambda: gs.unstack(PARAMS, gs.scanned("layers/"), name="layer"),
        "`name` gives one path to several leaves, .*: layer/w",
    ),
    "a layer that is not there": (
        lambda: gs.stack(
            {"layers_0": {"w": jnp.ones(3)}, "head": 1},
            gs.scanned("layers/"),
            like=PARAMS,
        ),
        "has no leaf layers_1/w, which is layer 1 of layers/w",
    ),
    "a leaf that is nowhere": (
        lambda: gs.unstack(PARAMS, gs.scanned("layers/"), like={"bias": jnp.ones(2)}),
        "`like` of `unstack` has a leaf bias, which is nowhere",
    ),
    "a leaf where a layer goes": (
        lambda: gs.unstack(
            {"blocks": {"w": jnp.ones((2, 3))}, "blocks_0": jnp.ones(3)},
            gs.scanned("^blocks/"),
        ),
        "to a leaf and a node: blocks_0",
    ),
    "a layer too many": (
        lambda: gs.stack(
            {f"layers_{i}": {"w": jnp.ones(3)} for i in range(3)}
            | {"head": PARAMS["head"]},
            gs.scanned("layers/"),
            like=PARAMS,
        ),
        "no place for layers_2/w, which would be lost",
    ),
    "layers of several shapes": (
        lambda: gs.stack(
            {f"layers_{i}": {"w": jnp.ones(3 + i)} for i in range(2)}
            | {"head": PARAMS["head"]},
            gs.scanned("layers/"),
            like=PARAMS,
        ),
        "layers of layers/w that differ",
    ),
    "a name of other words": (
        lambda: gs.unstack(PARAMS, gs.scanned("layers/"), name="{foo}_{layer}"),
        "`name` must be a format of",
    ),
    "a state that saw all layers as one array": (
        plain_adafactor,
        "nowhere in the tree|saw all layers as one array|so no axis",
    ),
    "a role that is not in the path": (
        lambda: gs.unstack(
            {"layers": {"mlp_local": {"w": jnp.ones((2, 3))}}},
            gs.scanned(r"layers/(?P<role>\w+)_local/"),
        ),
        "which is not the end of its path",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_what_to_do(name):
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()
