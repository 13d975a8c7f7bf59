"""`similarity_window`: layers are coupled as far as their updates agree."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(r"layers_(\d+)/")
SCOPES = ("param", "block")


def step(operator, updates, depth=SCANNED, **kwargs):
    tx = gs.smooth_over_depth(depth, operator, **kwargs)
    return jax.jit(lambda u: tx.update(u, tx.init(u))[0])(updates)


def smooth(stack, operator):
    """Of one stacked leaf."""
    return step(operator, {"blocks": {"w": jnp.asarray(stack)}})["blocks"]["w"]


def unrolled(blocks):
    tree = {k: b for k, b in oracle.unrolled_tree(blocks).items() if b}
    return jax.tree.map(jnp.asarray, tree)


def related_blocks(num_layers=5):
    """Random blocks, some of which agree and some of which are opposed."""
    blocks = oracle.random_blocks(num_layers)
    shared = oracle.random_blocks(1, seed=1)[0]
    for layer, sign in enumerate([1, 1, -1, -1, 2][:num_layers]):
        blocks[layer] = {r: x + sign * shared[r] for r, x in blocks[layer].items()}
    return blocks


@pytest.mark.parametrize("norm_scope", SCOPES)
def test_it_is_the_plain_loops_at_any_strength_and_sharpness(norm_scope):
    blocks = related_blocks()

    @jax.jit
    def apply(scanned, unrolled, alpha, sharpness):
        operator = gs.similarity_window(alpha, norm_scope, sharpness)
        return step(operator, scanned), step(operator, unrolled, UNROLLED)

    every = [(0.4, 1.0, 1.0), (1.0, 0.0, 1.0), (0.7, 0.5, 1.0), (0.4, 3.0, 1.0)]
    # With a layer of norm 0, or too small for its squares, all sums are made again.
    for alpha, sharpness, size in (*every, (0.4, 1.0, 1e-25), (0.4, 1.0, 0.0)):
        first = {role: np.float32(size) * x for role, x in blocks[0].items()}
        blocks = [first, *blocks[1:]]
        stacked = {"blocks": oracle.stacked_tree(blocks)}
        expected = oracle.similarity_window(blocks, alpha, norm_scope, sharpness)
        outs = apply(stacked, unrolled(blocks), alpha, sharpness)
        oracle.assert_blocks_close(oracle.unstacked(outs[0]["blocks"]), expected)
        oracle.assert_blocks_close([outs[1][f"layers_{i}"] for i in range(5)], expected)


def test_weights_are_half_of_alpha_times_a_power_of_the_cosine():
    a, b = np.array([1.0, 0.0]), np.array([3.0, 4.0])  # cos = 0.6
    for sharpness in (1.0, 2.0):
        out = smooth([a, b], gs.similarity_window(0.5, sharpness=sharpness))
        weight = 0.25 * 0.6**sharpness
        np.testing.assert_allclose(out[0], a + weight * (b - a), rtol=1e-6)
        np.testing.assert_allclose(out[1], b + weight * (a - b), rtol=1e-6)


def test_the_defaults_are_the_cosine_of_the_block():
    default = gs.similarity_window(0.1)
    assert default == gs.similarity_window(0.1, norm_scope="block", sharpness=1.0)


@pytest.mark.parametrize("norm_scope", SCOPES)
def test_equal_updates_up_to_scale_are_coupled_as_by_the_window(norm_scope):
    scales = np.array([1.0, 2.0, 5.0, 0.5], np.float32)[:, None, None]
    stack = scales * np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    out = smooth(stack, gs.similarity_window(0.4, norm_scope, 2.0))
    np.testing.assert_allclose(out, smooth(stack, gs.window(0.4)), rtol=2e-6)


def test_constants_come_back_bit_exact():
    stack = np.repeat(np.random.default_rng(0).normal(size=(1, 7)), 5, axis=0)
    stack = jnp.asarray(stack, jnp.bfloat16)
    np.testing.assert_array_equal(smooth(stack, gs.similarity_window(0.3)), stack)


def test_updates_that_are_opposed_or_orthogonal_are_not_coupled():
    stack = np.array([[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0]], np.float32)
    for sharpness in (0.0, 1.0):
        out = smooth(stack, gs.similarity_window(1.0, sharpness=sharpness))
        np.testing.assert_array_equal(out, stack)


@pytest.mark.parametrize("norm_scope", SCOPES)
def test_a_zero_update_is_coupled_to_nothing_and_never_becomes_nan(norm_scope):
    stack = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    stack[1], stack[3:] = 0.0, 0.0
    with jax.debug_nans(True):
        out = smooth(stack, gs.similarity_window(1.0, norm_scope, 0.0))
    np.testing.assert_array_equal(out, stack)


def test_the_sum_over_depth_is_conserved():
    blocks = related_blocks()
    out = step(gs.similarity_window(1.0, "param"), unrolled(blocks), UNROLLED)
    for role in blocks[0]:
        after = sum(np.asarray(block[role]) for block in out.values())
        np.testing.assert_allclose(after, sum(b[role] for b in blocks), atol=2e-6)


# Which parameters a block's cosine is of.


def assert_unrolled(blocks, depth, ranked=False, **kwargs):
    out = step(gs.similarity_window(0.8), unrolled(blocks), depth, **kwargs)
    out = [out.get(f"layers_{layer}", {}) for layer in range(len(blocks))]
    expected = oracle.similarity_window(blocks, 0.8, ranked=ranked)
    oracle.assert_blocks_close(out, expected)


def test_a_blocks_cosine_is_of_the_roles_that_both_layers_hold():
    blocks = related_blocks(4)
    del blocks[0]["bias"], blocks[3]["kernel"]
    assert_unrolled(blocks, UNROLLED, strict=False)


def test_a_role_that_skips_a_layer_takes_no_part_in_the_cosines_across_its_gap():
    blocks = related_blocks()
    del blocks[2]["bias"]
    assert_unrolled(blocks, UNROLLED, strict=False)
    # Ranked, its layers 1 and 3 are neighbors: a pair that no other role has.
    assert_unrolled(blocks, gs.ranked(UNROLLED), ranked=True)


def test_stacks_do_not_share_cosines():
    blocks = related_blocks(3)
    kernels = {"a": {f"layers_{i}": {"w": b["kernel"]} for i, b in enumerate(blocks)}}
    biases = {"b": {f"layers_{i}": {"w": b["bias"]} for i, b in enumerate(blocks)}}
    operator = gs.similarity_window(0.8)
    both = step(operator, {**kernels, **biases}, UNROLLED)
    alone = {**step(operator, kernels, UNROLLED), **step(operator, biases, UNROLLED)}
    chex.assert_trees_all_close(both, alone, rtol=1e-6)


# Numerics.


def test_cosines_of_half_precision_neither_overflow_nor_underflow():
    for scale in (3e4, 1e-4):
        stack = (scale * np.array([[1.0, 1.0], [1.0, 0.5]])).astype(np.float16)
        expected = oracle.similarity_window([{"w": x} for x in stack], 0.5)
        out = smooth(stack, gs.similarity_window(0.5))
        assert out.dtype == np.float16
        for got, want in zip(out, expected, strict=True):
            assert oracle.relative_error(got, want["w"]) < 1e-3


def test_cosines_are_summed_in_float32():
    # In bfloat16 a sum of 4096 ones stops at 256.
    stack = np.ones((2, 4096), jnp.bfloat16)
    stack[1, :2048] = -1
    stack[1, 2048:] = 2
    expected = oracle.similarity_window([{"w": x} for x in stack], 0.5)
    out = smooth(stack, gs.similarity_window(0.5))
    oracle.assert_blocks_close([{"w": x} for x in out], expected)


def test_a_complex_cosine_is_real():
    u = np.array([1.0 + 1.0j, 2.0], np.complex64)
    # A quarter turn is orthogonal, an eighth is not.
    out = smooth(np.stack([u, 1j * u]), gs.similarity_window(1.0))
    np.testing.assert_allclose(out, np.stack([u, 1j * u]), atol=1e-6)
    stack = np.stack([u, np.exp(0.25j * np.pi) * u])
    expected = oracle.similarity_window([{"w": x} for x in stack], 1.0)
    out = smooth(stack, gs.similarity_window(1.0))
    oracle.assert_blocks_close([{"w": x} for x in out], expected)


@pytest.mark.parametrize("norm_scope", SCOPES)
def test_a_nan_reaches_the_neighbors_and_no_other_layer(norm_scope):
    stack = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    stack[2, 1] = np.nan
    out = smooth(stack, gs.similarity_window(0.4, norm_scope))
    finite = np.isfinite(out).all(axis=1)
    np.testing.assert_array_equal(finite, [True, False, False, False, True, True])


def test_gradients_through_it_are_finite_where_nothing_is_coupled():
    stack = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])

    def loss(stack, sharpness):
        return jnp.sum(
            smooth(stack, gs.similarity_window(0.5, "param", sharpness)) ** 2
        )

    with jax.debug_nans(True):
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss, (0, 1)))(stack, 0.5))


# What it is not.


@pytest.mark.parametrize(
    "use",
    [
        lambda op: op.matrix(3),
        lambda op: gs.compose(gs.window(0.1), op).matrix(3),
        lambda op: gs.repeat(op, 2).matrix(3),
        lambda op: gs.controls.shuffled(op, 0),
        lambda op: gs.diagnostics.contraction_factor(op, 3),
        lambda op: gs.diagnostics.contraction_factor(op, 1),
    ],
)
@pytest.mark.parametrize(
    "operator",
    [gs.similarity_window(0.1), gs.controls.norm_matched(gs.window(0.1))],
    ids=["similarity_window", "norm_matched"],
)
def test_an_operator_that_depends_on_the_updates_has_no_matrix(operator, use):
    with pytest.raises(TypeError, match=re.escape("depend")) as info:
        use(operator)
    assert "matrix" in str(info.value)
