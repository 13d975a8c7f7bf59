"""What a user may rely on algebraically."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from block_layouts import LAYOUTS, blocks_for, smoothed, tree_in
from operator_table import VARIANTS, make

import gradsmooth_optax as gs

BOTH = ("stacked", "unrolled")
KEEP_NORMS = VARIANTS[1:]


def how(variant, norm_scope):
    return {"variant": variant, "norm_scope": norm_scope}


def flat(blocks):
    """(L, number of all parameters of a block)."""
    return np.stack([np.concatenate([x.ravel() for x in b.values()]) for b in blocks])


def times(factor, blocks):
    return [{r: np.float32(factor) * x for r, x in b.items()} for b in blocks]


def ulps_apart(a, b):
    """Of two arrays of equal dtype and signs."""
    view = np.dtype(f"i{a.dtype.itemsize}")
    distance = np.abs(a.view(view).astype(np.int64) - b.view(view).astype(np.int64))
    return int(np.max(distance))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_an_update_that_is_constant_over_depth_comes_back_bit_exact(dtype, enable_x64):
    blocks = oracle.random_blocks(1, jnp.dtype(dtype), {"kernel": (2, 3), "b": (2, 3)})
    exact = [(gs.window(alpha, r), 0) for alpha in (0.1, 1 / 3, 1.0) for r in (1, 2, 3)]
    cases = [(0, *case) for case in (*exact, (gs.window(0.3), 1), (gs.window(0.3), 2))]
    if dtype == "float32":
        wide = gs.dense(oracle.window_matrix(5, 0.3, 2, 0.4))
        cases += [(0, gs.similarity_window(0.3), 0)]
        # Within two units in the last place where they are not computed as differences.
        cases += [(2, wide, 0), (2, gs.window(0.3, 8, decay=0.3), 0)]
        cases += [(2, gs.window(0.3), 3), (2, gs.window(0.3), 4)]
    for layout in BOTH:
        for ulps, operator, variant in cases:
            with enable_x64():
                kwargs = how(*VARIANTS[variant])
                out = smoothed(layout, blocks * 5, operator, **kwargs)
            for got in out:
                for role, want in blocks[0].items():
                    assert ulps_apart(got[role], want) <= ulps, (layout, operator)


@pytest.mark.parametrize("layout", BOTH)
def test_a_compiled_step_keeps_constants_bit_exact_too(layout):
    tree = tree_in(layout, oracle.random_blocks(1, shapes={"a": (2, 3)}) * 5)

    @jax.jit
    def update(tree):
        out = {}
        for variant, norm_scope in VARIANTS[:3]:
            kwargs = how(variant, norm_scope)
            tx = gs.smooth_over_depth(LAYOUTS[layout].depth, 0.3, **kwargs)
            out[variant, norm_scope] = tx.update(tree, tx.init(tree))[0]
        return out

    for out in update(tree).values():
        chex.assert_trees_all_equal(out, tree)


def test_standard_smoothing_is_linear_and_keeps_the_sum_over_depth():
    u, v = (blocks_for("stacked", seed=seed) for seed in (1, 2))
    both = [
        {r: 2 * x - 3 * y for r, x, y in zip(a, a.values(), b.values(), strict=True)}
        for a, b in zip(u, v, strict=True)
    ]
    for name in ("window", "wide window", "ema"):
        got, of_u, of_v = (
            flat(smoothed("stacked", x, make(name))) for x in (both, u, v)
        )
        np.testing.assert_allclose(got, 2 * of_u - 3 * of_v, atol=5e-6)
    for operator in (gs.window(0.8), gs.tikhonov(2.0), gs.similarity_window(1.0)):
        out = flat(smoothed("unrolled", u, operator))
        np.testing.assert_allclose(out.sum(0), flat(u).sum(0), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("variant", "norm_scope"), VARIANTS)
def test_smoothing_commutes_with_scaling_and_with_reversing_the_layers(
    variant, norm_scope
):
    u, kwargs = blocks_for("stacked"), how(variant, norm_scope)
    for operator in (gs.window(0.3), gs.window(0.3, 3), gs.similarity_window(0.5)):
        out = flat(smoothed("stacked", u, operator, **kwargs))
        reverse = flat(smoothed("stacked", u[::-1], operator, **kwargs))
        np.testing.assert_allclose(reverse, out[::-1], rtol=1e-5, atol=1e-6)
        scaled = flat(smoothed("stacked", times(4.0, u), operator, **kwargs))
        np.testing.assert_allclose(scaled, 4.0 * out, rtol=1e-5)


@pytest.mark.parametrize(("variant", "norm_scope"), KEEP_NORMS)
def test_the_norms_of_parameters_or_of_blocks_are_kept(variant, norm_scope):
    blocks = blocks_for("unrolled")
    for operator in (gs.window(0.8), gs.ema(0.5)):
        out = smoothed("unrolled", blocks, operator, **how(variant, norm_scope))
        before, after = (oracle.layer_norms(x, norm_scope) for x in (blocks, out))
        assert after == pytest.approx(before, rel=2e-6)
        assert oracle.relative_error(flat(out), flat(blocks)) > 0.1
        if norm_scope == "block":  # those of its parameters are not
            before, after = (oracle.layer_norms(x, "param") for x in (blocks, out))
            assert max(abs(after[key] - before[key]) for key in before) > 1e-2


def test_a_layer_that_is_alone_in_its_role_is_in_no_block():
    blocks = blocks_for("unrolled")
    del blocks[1]["other"]  # so that the first layer's has no neighbor
    for variant in ("norm_preserving", "directional"):
        kwargs = how(variant, "block")
        out = smoothed("unrolled", blocks, gs.window(0.8), strict=False, **kwargs)
        oracle.assert_blocks_close(out, oracle.window(blocks, 0.8, **kwargs))


def test_smoothing_shrinks_the_variation_over_depth():
    u = blocks_for("stacked")
    out = smoothed("stacked", u, gs.window(0.2))
    before, after = (np.sum(np.diff(flat(x), axis=0) ** 2) for x in (u, out))
    assert after < before


# Nothing to do.


@pytest.mark.parametrize(("variant", "norm_scope"), VARIANTS)
def test_what_is_not_coupled_comes_back_as_the_same_object(variant, norm_scope):
    rng = np.random.default_rng(0)
    one, two, alone = (jnp.asarray(x) for x in rng.normal(size=(3, 2, 2)))
    tree = {
        "embed": {"embedding": jnp.ones((5, 2))},
        "layers_0": {"w": one, "only_here": jnp.ones(2)},
        "layers_1": {"w": two},
        "alone": {"layers_0": {"w": alone}},
        "blocks": {"w": jnp.ones((1, 2, 2))},
    }
    depth = gs.first_match(gs.scanned("^blocks/"), gs.unrolled(r"layers_(\d+)/"))
    kwargs = how(variant, norm_scope)
    tx = gs.smooth_over_depth(depth, 0.3, **kwargs)
    out, _ = tx.update(tree, tx.init(tree))
    coupled = out["layers_0"].pop("w"), out["layers_1"].pop("w")
    del tree["layers_0"]["w"], tree["layers_1"]["w"]
    for got, want in zip(*map(jax.tree.leaves, (out, tree)), strict=True):
        assert got is want
    expected = oracle.window([{"w": one}, {"w": two}], 0.3, **kwargs)
    oracle.assert_blocks_close([{"w": x} for x in coupled], expected)
    for zero in (0, 0.0, np.float32(0), gs.window(0.0, 2)):
        tree = tree_in("unrolled", blocks_for("unrolled"))
        tx = gs.smooth_over_depth(gs.unrolled(), zero, **kwargs)
        out, _ = tx.update(tree, tx.init(tree))
        for got, want in zip(*map(jax.tree.leaves, (out, tree)), strict=True):
            assert got is want


def test_the_input_is_not_written_to():
    tree = oracle.unrolled_tree(oracle.random_blocks(3))
    copy = jax.tree.map(np.copy, tree)
    tx = gs.smooth_over_depth(gs.unrolled(), 0.3, variant="directional")
    tx.update(tree, tx.init(tree))
    chex.assert_trees_all_equal(tree, copy)


# `similarity_window` and what it is of.


def test_similarity_weighs_by_half_of_alpha_times_a_power_of_the_cosine():
    a, b = np.float32([1.0, 0.0]), np.float32([3.0, 4.0])  # cos = 0.6
    blocks = [{"w": a}, {"w": b}]
    for sharpness in (1.0, 2.0):
        out = smoothed("stacked", blocks, gs.similarity_window(0.5, "block", sharpness))
        weight = 0.25 * 0.6**sharpness
        np.testing.assert_allclose(out[0]["w"], a + weight * (b - a), rtol=1e-6)
        np.testing.assert_allclose(out[1]["w"], b + weight * (a - b), rtol=1e-6)


@pytest.mark.parametrize("norm_scope", ["param", "block"])
def test_similarity_is_the_plain_loops_at_any_strength_and_sharpness(norm_scope):
    blocks = blocks_for("stacked")
    for alpha, sharpness in ((1.0, 0.0), (0.7, 0.5), (0.4, jnp.float32(3.0))):
        operator = gs.similarity_window(alpha, norm_scope, sharpness)
        want = oracle.similarity_window(blocks, alpha, norm_scope, float(sharpness))
        for layout in BOTH:
            oracle.assert_blocks_close(smoothed(layout, blocks, operator), want)
    # Of equal updates it is the window, of any scale and whatever its sharpness is.
    layers = [{"w": np.float32(s) * blocks[0]["kernel"]} for s in (1, 2, 5, 0.5)]
    out = smoothed("stacked", layers, gs.similarity_window(0.4, norm_scope, 2.0))
    oracle.assert_blocks_close(out, oracle.window(layers, 0.4))


def test_updates_that_are_opposed_orthogonal_or_zero_are_not_coupled():
    stack = np.float32([[1, 2], [-1, -2], [2, -1], [0, 0], [1, 1], [0, 0], [0, 0]])
    blocks = [{"w": x} for x in stack]
    for sharpness in (0.0, 1.0):
        for scope in ("param", "block"):
            operator = gs.similarity_window(1.0, scope, sharpness)
            out = smoothed("stacked", blocks, operator)
            np.testing.assert_array_equal([b["w"] for b in out], stack)


def test_a_blocks_cosine_is_of_the_roles_in_which_two_layers_are_neighbors():
    blocks, operator = blocks_for("unrolled"), gs.similarity_window(0.8)
    del blocks[0]["other"], blocks[2]["other"], blocks[4]["kernel"]
    want = oracle.similarity_window(blocks, 0.8)
    out = smoothed("unrolled", blocks, operator, strict=False)
    oracle.assert_blocks_close(out, want)
    # Ranked, the other's layers 1 and 3 are neighbors: a pair that no other role has.
    blocks = blocks_for("unrolled")
    del blocks[2]["other"]
    want = oracle.similarity_window(blocks, 0.8, ranked=True)
    oracle.assert_blocks_close(smoothed("ranked over a gap", blocks, operator), want)
    # Stacks do not share cosines.
    trees = {
        stack: {
            f"layers_{i}": {"w": b[role]} for i, b in enumerate(blocks) if role in b
        }
        for stack, role in (("a", "kernel"), ("b", "other"))
    }
    tx = gs.smooth_over_depth(gs.unrolled(), operator, strict=False)
    both = tx.update(trees, tx.init(trees))[0]
    for name, tree in trees.items():
        alone = tx.update({name: tree}, tx.init({name: tree}))[0]
        chex.assert_trees_all_close(both[name], alone[name], rtol=1e-6)
