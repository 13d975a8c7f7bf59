"""`diagnostics.cosine_matrix` against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import cosine_matrix, depth_statistics

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(r"layers_(\d+)/", stack="blocks")


def expected(blocks):
    """Over the roles that two layers share, for layers that have a neighbor."""
    roles = sorted({role for block in blocks for role in block})
    runs = {role: oracle.runs_of(blocks, role) for role in roles}
    held = [
        {r for r in roles if any(k in run for run in runs[r])}
        for k in range(len(blocks))
    ]
    layers = [layer for layer, of_layer in enumerate(held) if of_layer]
    cosines = np.zeros((len(layers), len(layers)))
    for i, layer in enumerate(layers):
        for j, other in enumerate(layers):
            shared = [
                role
                for role in sorted(held[layer] & held[other])
                if np.shape(blocks[layer][role]) == np.shape(blocks[other][role])
            ]
            x, y = (
                np.concatenate(
                    [np.ravel(blocks[k][r]).astype(complex) for r in shared] or [[0]]
                )
                for k in (layer, other)
            )
            size = np.linalg.norm(x) * np.linalg.norm(y)
            cosines[i, j] = np.vdot(x, y).real / size if size > 0 else 0.0
    return cosines


def unrolled(blocks):
    return {k: b for k, b in oracle.unrolled_tree(blocks).items() if b}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stacked_leaf_is_the_plain_loop_whatever_its_layer_axis(axis):
    blocks = oracle.random_blocks(5, shapes={"kernel": (2, 3), "bias": (4,)})
    tree = {"blocks": oracle.stacked_tree(blocks, axis)}
    found = cosine_matrix(tree, gs.scanned("blocks/", axis=axis))
    assert list(found) == ["blocks"]
    np.testing.assert_allclose(found["blocks"], expected(blocks), atol=1e-6)


def test_cycles_nested_axes_and_one_leaf_per_layer_are_the_same():
    blocks = oracle.random_blocks(6)
    cycle = {f"layers_{i}": oracle.stacked_tree(blocks[i::3]) for i in range(3)}
    grid = {
        role: np.moveaxis(x.reshape(2, 3, *x.shape[1:]), 1, -1)
        for role, x in oracle.stacked_tree(blocks).items()
    }

    def nested(path, leaf):
        return gs.Depth("blocks", path[-1], axis=(0, leaf.ndim - 1))

    for tree, depth in (
        (unrolled(blocks), UNROLLED),
        (cycle, gs.scanned(r"layers_(\d+)/", stride=3, stack="blocks")),
        (grid, gs.depth_fn(nested)),
    ):
        found = cosine_matrix(tree, depth)["blocks"]
        np.testing.assert_allclose(found, expected(blocks), atol=1e-6)


def test_the_diagonal_is_one_and_beside_it_are_the_cosines_of_depth_statistics():
    tree = {"blocks": oracle.stacked_tree(oracle.random_blocks(6))}
    found = cosine_matrix(tree, SCANNED)["blocks"]
    np.testing.assert_allclose(np.diagonal(found), np.ones(6), rtol=1e-6)
    np.testing.assert_allclose(found, found.T)
    beside = depth_statistics(tree, SCANNED)["blocks"].cosines
    np.testing.assert_allclose(np.diagonal(found, 1), beside, atol=1e-6)


def test_two_layers_are_compared_in_what_both_have():
    blocks = oracle.random_blocks(6)
    del blocks[0]["bias"], blocks[1]["bias"], blocks[5]["kernel"]
    blocks[4]["kernel"] = np.tile(blocks[4]["kernel"], 2)
    found = cosine_matrix(unrolled(blocks), UNROLLED, strict=False)["blocks"]
    del blocks[4]["kernel"]  # of a shape of its own: without a neighbor
    np.testing.assert_allclose(found, expected(blocks), atol=1e-6)


def test_layers_across_a_gap_are_compared_and_a_layer_alone_is_left_out():
    blocks = oracle.random_blocks(6)
    blocks[2] = {}
    blocks[4] = {}
    found = cosine_matrix(unrolled(blocks), UNROLLED, strict=False)["blocks"]
    assert found.shape == (2, 2)  # 3 and 5 stand alone
    np.testing.assert_allclose(found, expected(blocks), atol=1e-6)


def test_an_update_of_norm_zero_has_cosine_zero_without_a_nan():
    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]])
    with jax.debug_nans(True):
        found = cosine_matrix({"blocks": {"w": w}}, SCANNED)["blocks"]
    assert found.tolist() == [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]


def test_complex_updates_have_the_real_part_of_the_hermitian_product():
    blocks = oracle.complex_blocks(4)
    found = cosine_matrix({"blocks": oracle.stacked_tree(blocks)}, SCANNED)["blocks"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(blocks), atol=1e-6)


def test_half_precision_is_multiplied_in_float32_and_float64_in_float64(enable_x64):
    blocks = oracle.random_blocks(4, dtype="float64")
    with enable_x64():
        found = cosine_matrix({"blocks": oracle.stacked_tree(blocks)}, SCANNED)
        np.testing.assert_allclose(found["blocks"], expected(blocks), atol=1e-14)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), blocks)
    found = cosine_matrix({"blocks": oracle.stacked_tree(half)}, SCANNED)["blocks"]
    assert found.dtype == jnp.float32
    want = expected([{k: np.asarray(x, float) for k, x in b.items()} for b in half])
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_roles_of_different_dtypes_are_added_up_in_the_widest(enable_x64):
    blocks = oracle.random_blocks(4, dtype="float64")
    blocks = [
        {k: x.astype("f4" if k == "bias" else "f8") for k, x in b.items()}
        for b in blocks
    ]
    with enable_x64():
        found = cosine_matrix({"blocks": oracle.stacked_tree(blocks)}, SCANNED)
        assert found["blocks"].dtype == jnp.float64
        np.testing.assert_allclose(found["blocks"], expected(blocks), atol=1e-7)


def test_under_jit_and_vmap():
    trees = [
        {"blocks": oracle.stacked_tree(oracle.random_blocks(3, seed=s))} for s in (0, 1)
    ]
    both = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    found = jax.jit(jax.vmap(lambda tree: cosine_matrix(tree, SCANNED)))(both)["blocks"]
    for of_tree, tree in zip(found, trees, strict=True):
        want = cosine_matrix(tree, SCANNED)["blocks"]
        np.testing.assert_allclose(of_tree, want, atol=1e-6)


def test_nothing_to_compare_is_an_error_only_if_strict():
    with pytest.raises(ValueError, match="matched none"):
        cosine_matrix({"embed": jnp.ones(3)}, SCANNED)
    assert cosine_matrix({"embed": jnp.ones(3)}, SCANNED, strict=False) == {}
    with pytest.raises(ValueError, match="`depth`"):
        cosine_matrix({}, "blocks/")
