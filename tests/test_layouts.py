"""The same layers give the same numbers, whatever tree holds them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from reading import looked_up

import gradsmooth_optax as gs

ALPHA = 0.3
VARIANTS = ("standard", "norm_preserving", "directional")
NORM_SCOPES = ("param", "block")
CONFIGURATIONS = [
    {"variant": variant, "norm_scope": norm_scope}
    for variant in VARIANTS
    for norm_scope in NORM_SCOPES
]
# Every variant and every scope, where only the grouping is at stake.
SOME = [
    {"variant": "standard", "norm_scope": "param"},
    {"variant": "norm_preserving", "norm_scope": "block"},
    {"variant": "directional", "norm_scope": "param"},
]


def config_id(kwargs):
    return "-".join(kwargs.values())


def step(depth, updates, operator=ALPHA, **kwargs):
    tx = gs.smooth_over_depth(depth, operator, **kwargs)
    out, _ = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    return out


def stack(blocks, role, axis=0):
    return jnp.stack([b[role] for b in blocks], axis=axis)


# One stack of twelve linear layers in every layout.

SHAPES = {"kernel": (2, 3), "bias": (3,)}
NUM_LAYERS = 12


def twelve_layers():
    return oracle.random_blocks(NUM_LAYERS, shapes=SHAPES)


@pytest.mark.parametrize("kwargs", SOME, ids=config_id)
def test_dict_list_and_stacked_trees_give_the_same_numbers(kwargs):
    blocks = jax.tree.map(jnp.asarray, twelve_layers())
    expected = oracle.window(blocks, ALPHA, **kwargs)

    def check(depth, tree, read):
        oracle.assert_blocks_close(read(step(depth, tree, **kwargs)), expected)

    layers = range(NUM_LAYERS)
    check(
        gs.unrolled(),
        {f"layers_{i}": b for i, b in enumerate(blocks)},
        lambda out: [out[f"layers_{i}"] for i in layers],
    )
    check(
        gs.unrolled(),
        {"layers": {str(i): b for i, b in enumerate(blocks)}},
        lambda out: [out["layers"][str(i)] for i in layers],
    )
    check(gs.unrolled(), {"layers": list(blocks)}, lambda out: out["layers"])
    check(gs.unrolled(), tuple(blocks), list)
    check(
        gs.unrolled(r"block(?:_(\d+))?/"),
        {
            f"transformer/block{f'_{i}' if i else ''}/linear": b
            for i, b in enumerate(blocks)
        },
        lambda out: [
            out[f"transformer/block{f'_{i}' if i else ''}/linear"] for i in layers
        ],
    )
    for axis in (0, 1, 2):
        spec = gs.first_match(
            gs.scanned("blocks/", axis=axis).only(lambda path, _: path[-1] == "kernel"),
            gs.scanned("blocks/", axis=min(axis, 1)),
        )
        tree = {"blocks": oracle.stacked_tree(blocks, axis)}
        check(
            spec,
            jax.tree.map(jnp.asarray, tree),
            lambda out, axis=axis: oracle.unstacked(out["blocks"], axis),
        )


@pytest.mark.parametrize("kwargs", SOME, ids=config_id)
def test_flax_nnx_lists_give_the_same_numbers(kwargs):
    nnx = pytest.importorskip("flax.nnx")
    blocks = twelve_layers()

    class Net(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(2, 3, rngs=rngs) for _ in range(NUM_LAYERS)]
            self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers
            self.head = nnx.Linear(3, 1, rngs=rngs)

    updates = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    for i, block in enumerate(blocks):
        for role, x in block.items():
            updates["layers"][i][role] = nnx.Param(jnp.asarray(x))
    out = step(gs.unrolled(), updates, **kwargs)
    out = nnx.to_pure_dict(out)
    out = [out["layers"][i] for i in range(NUM_LAYERS)]
    oracle.assert_blocks_close(out, oracle.window(blocks, ALPHA, **kwargs))


@pytest.mark.parametrize("kwargs", SOME, ids=config_id)
def test_equinox_lists_give_the_same_numbers(kwargs):
    eqx = pytest.importorskip("equinox")
    blocks = twelve_layers()
    keys = iter(jax.random.split(jax.random.key(0), NUM_LAYERS + 1))

    class Net(eqx.Module):
        layers: list
        head: eqx.nn.Linear

    net = Net(
        [eqx.nn.Linear(3, 2, key=next(keys)) for _ in blocks],
        eqx.nn.Linear(2, 1, key=next(keys)),
    )
    net = eqx.tree_at(
        lambda n: [x for layer in n.layers for x in (layer.weight, layer.bias)],
        net,
        [x for b in blocks for x in (jnp.asarray(b["kernel"]), jnp.asarray(b["bias"]))],
    )
    updates = eqx.filter(net, eqx.is_inexact_array)
    out = step(gs.unrolled(), updates, **kwargs)
    assert out.head.weight is updates.head.weight
    out = [{"kernel": layer.weight, "bias": layer.bias} for layer in out.layers]
    oracle.assert_blocks_close(out, oracle.window(blocks, ALPHA, **kwargs))


# Real stacks' less usual trees.


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=config_id)
def test_scanned_cycles_and_an_unrolled_remainder_are_one_chain(kwargs):
    # MaxText's Gemma3: two cycles of three layers on axis 1, then two layers.
    blocks = oracle.random_blocks(8, shapes={"mlp/kernel": (2, 3), "norm/scale": (3,)})
    roles = list(blocks[0])
    tree = {"embed": jnp.ones((4, 2)), "layers": {}, "layers_remainder": {}}
    for position in range(3):
        cycle = [blocks[position], blocks[position + 3]]
        tree["layers"][f"layers_{position}"] = {r: stack(cycle, r, 1) for r in roles}
    for i in range(2):
        tree["layers_remainder"][f"layers_{i}"] = blocks[6 + i]
    spec = gs.first_match(
        gs.scanned(r"decoder/layers/layers_(\d+)/", axis=1, stride=3, stack="decoder"),
        gs.unrolled(r"layers_remainder/layers_(\d+)/", start=6, stack="decoder"),
    )
    tree = jax.tree.map(jnp.asarray, {"decoder": tree})
    out = step(spec, tree, **kwargs)["decoder"]
    assert out["embed"] is tree["decoder"]["embed"]
    got = []
    for layer in range(6):
        leaf = out["layers"][f"layers_{layer % 3}"]
        got.append({r: jnp.take(leaf[r], layer // 3, axis=1) for r in roles})
    got += [out["layers_remainder"][f"layers_{i}"] for i in range(2)]
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA, **kwargs))


def test_a_wide_window_reaches_across_cycles_and_remainder():
    blocks = oracle.random_blocks(7, shapes={"w": (2,)})
    tree = {
        "cycles": {f"layers_{p}": {"w": stack(blocks[p:4:2], "w", 1)} for p in (0, 1)},
        "rest": {f"layers_{i}": blocks[i] for i in range(4, 7)},
    }
    spec = gs.first_match(
        gs.scanned(r"cycles/layers_(\d+)/", axis=1, stride=2, stack="s"),
        gs.unrolled(stack="s"),
    )
    out = step(spec, tree, gs.window(ALPHA, radius=3))
    got = [
        {"w": out["cycles"][f"layers_{layer % 2}"]["w"][:, layer // 2]}
        for layer in range(4)
    ] + [out["rest"][f"layers_{i}"] for i in range(4, 7)]
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA, 3))


@pytest.mark.parametrize("kwargs", SOME, ids=config_id)
def test_two_named_parts_of_a_cycle_are_interleaved(kwargs):
    # MaxText's Gemma2: local, global, local, global ...
    blocks = oracle.random_blocks(6, shapes=SHAPES)
    tree = {
        "mlp_local": {r: stack(blocks[0::2], r, 1) for r in SHAPES},
        "mlp_global": {r: stack(blocks[1::2], r, 1) for r in SHAPES},
    }
    spec = gs.first_match(
        *(
            gs.scanned(f"layers/{part}/", axis=1, start=i, stride=2, stack="decoder")
            for i, part in enumerate(tree)
        )
    )
    out = step(spec, {"layers": tree}, **kwargs)["layers"]
    got = [
        {r: jnp.take(out[name][r], i, axis=1) for r in SHAPES}
        for i in range(3)
        for name in ("mlp_local", "mlp_global")
    ]
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA, **kwargs))


@pytest.mark.parametrize("kwargs", SOME, ids=config_id)
def test_nested_scans_over_two_axes_run_in_row_major_order(kwargs):
    blocks = oracle.random_blocks(6, shapes=SHAPES)
    tree = {r: stack(blocks, r).reshape((2, 3, *s)) for r, s in SHAPES.items()}
    out = step(gs.scanned("blocks/", axis=(0, 1)), {"blocks": tree}, **kwargs)
    got = {r: x.reshape((6, *SHAPES[r])) for r, x in out["blocks"].items()}
    oracle.assert_blocks_close(
        oracle.unstacked(got), oracle.window(blocks, ALPHA, **kwargs)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_nested_scans_over_three_separate_axes(variant):
    # MaxText's pipeline: repeats x stages x d x layers per stage x d.
    blocks = oracle.random_blocks(8, shapes={"w": (2, 3)})
    w = stack(blocks, "w").reshape((2, 2, 2, 2, 3)).transpose((0, 1, 3, 2, 4))
    out = step(
        gs.scanned("layers/", axis=(0, 1, 3)), {"layers": {"w": w}}, variant=variant
    )
    got = out["layers"]["w"].transpose((0, 1, 3, 2, 4)).reshape((8, 2, 3))
    expected = oracle.window(blocks, ALPHA, variant=variant)
    oracle.assert_blocks_close([{"w": x} for x in got], expected)


def test_the_order_of_the_axes_and_explicit_strides_say_which_runs_fastest():
    blocks = oracle.random_blocks(6, shapes={"w": (2,)})
    expected = oracle.window(blocks, ALPHA)
    columns = stack(blocks, "w").reshape((3, 2, 2)).transpose((1, 0, 2))
    for spec in (
        gs.scanned("blocks/", axis=(1, 0)),
        gs.scanned("blocks/", axis=(0, 1), stride=(1, 2)),
        gs.scanned("blocks/", axis=(1, 0), stride=(2, 1)),
    ):
        out = step(spec, {"blocks": {"w": columns}})["blocks"]["w"]
        got = out.transpose((1, 0, 2)).reshape((6, 2))
        oracle.assert_blocks_close([{"w": x} for x in got], expected)


def test_a_strided_leaf_alone_has_gaps_that_are_boundaries_when_not_strict():
    u = jnp.arange(6.0).reshape(3, 2)
    tree = {"blocks": {"w": u}}
    out = step(gs.scanned("blocks/", stride=2), tree, strict=False)
    assert out["blocks"]["w"] is u
    with pytest.raises(ValueError, match=r"stride|gap|missing"):
        step(gs.scanned("blocks/", stride=2), tree)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_roles_that_are_laid_out_differently_share_their_layers_blocks(variant):
    # One role scanned over all layers, one over the last three, one unrolled.
    blocks = oracle.random_blocks(5, shapes={"a": (2, 3), "b": (2, 3), "c": (2, 3)})
    for layer in (0, 1):
        del blocks[layer]["b"]
    tree = {
        "scanned": stack(blocks, "a", 1),
        "late": stack(blocks[2:], "b"),
        "unrolled": [jnp.asarray(b["c"]) for b in blocks],
    }
    depths = {
        "scanned": gs.Depth("s", "a", axis=1),
        "late": gs.Depth("s", "b", 2, axis=0),
        "unrolled": [gs.Depth("s", "c", i) for i in range(5)],
    }
    kwargs = {"variant": variant, "norm_scope": "block"}
    out = step(looked_up(depths), tree, **kwargs)
    got = [
        {"a": out["scanned"][:, i], "c": out["unrolled"][i]} for i in range(len(blocks))
    ]
    for i in range(2, 5):
        got[i]["b"] = out["late"][i - 2]
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA, **kwargs))


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=config_id)
def test_a_slice_without_neighbours_is_unchanged_though_its_leaf_is_not(kwargs):
    # The strided leaf holds layers 0 and 3; layer 2 is missing.
    blocks = oracle.random_blocks(4, shapes={"a": (2, 3), "b": (2, 3)})
    del blocks[2]["a"]
    tree = {
        "strided": stack([blocks[0], blocks[3]], "a"),
        "single": jnp.asarray(blocks[1]["a"]),
        "scanned": stack(blocks, "b"),
    }
    depths = {
        "strided": gs.Depth("s", "a", 0, axis=0, stride=3),
        "single": gs.Depth("s", "a", 1),
        "scanned": gs.Depth("s", "b", axis=0),
    }
    out = step(looked_up(depths), tree, strict=False, **kwargs)
    got = [{"b": x} for x in out["scanned"]]
    got[0]["a"], got[3]["a"] = out["strided"]
    got[1]["a"] = out["single"]
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA, **kwargs))
    np.testing.assert_array_equal(got[3]["a"], blocks[3]["a"])


def test_two_stacks_of_equal_shapes_are_not_coupled():
    dense = oracle.random_blocks(3, shapes=SHAPES, seed=1)
    moe = oracle.random_blocks(4, shapes=SHAPES, seed=2)
    tree = {
        "dense_layers": oracle.stacked_tree(dense, 1),
        "moe_layers": oracle.stacked_tree(moe, 1),
    }
    tree = jax.tree.map(jnp.asarray, {"decoder": tree})
    out = step(gs.scanned(r"(?:dense|moe)_layers/", axis=1), tree)["decoder"]
    for name, blocks in (("dense_layers", dense), ("moe_layers", moe)):
        got = oracle.unstacked(out[name], 1)
        oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA))


def test_two_scanned_leaves_in_a_row_can_be_one_stack():
    blocks = oracle.random_blocks(7, shapes=SHAPES)
    tree = {
        "dense_layers": oracle.stacked_tree(blocks[:3], 1),
        "moe_layers": oracle.stacked_tree(blocks[3:], 1),
    }
    spec = gs.first_match(
        gs.scanned("dense_layers/", axis=1, stack="decoder"),
        gs.scanned("moe_layers/", axis=1, start=3, stack="decoder"),
    )
    out = step(spec, jax.tree.map(jnp.asarray, tree))
    got = oracle.unstacked(out["dense_layers"], 1) + oracle.unstacked(
        out["moe_layers"], 1
    )
    oracle.assert_blocks_close(got, oracle.window(blocks, ALPHA))


def test_stacks_on_different_axes_of_one_model():
    # big_vision's CapPa: encoder on axis 0, decoder on axis 1.
    encoder = oracle.random_blocks(3, shapes=SHAPES, seed=1)
    decoder = oracle.random_blocks(3, shapes=SHAPES, seed=2)
    tree = {
        "encoder": {"block": oracle.stacked_tree(encoder, 0)},
        "decoder": {"block": oracle.stacked_tree(decoder, 1)},
    }
    spec = gs.first_match(
        gs.scanned("encoder/block/"), gs.scanned("decoder/block/", axis=1)
    )
    out = step(spec, jax.tree.map(jnp.asarray, tree))
    got = oracle.unstacked(out["encoder"]["block"], 0)
    oracle.assert_blocks_close(got, oracle.window(encoder, ALPHA))
    got = oracle.unstacked(out["decoder"]["block"], 1)
    oracle.assert_blocks_close(got, oracle.window(decoder, ALPHA))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flax_nnx(axis=0)", "Did you mean `scan_axis`?"),
        ("maxtext(cycle=6, num_cycle=4)", "Did you mean `num_cycles`?"),
        ("maxtext(1, 2, 3, 4, 5)", "Its options are scan_axis, cycle, num_cycles"),
    ],
)
def test_an_option_that_a_layout_has_not_is_told_with_those_that_it_has(text, words):
    with pytest.raises(TypeError) as error:
        gs.smooth_over_depth(text)
    assert words in str(error.value)
