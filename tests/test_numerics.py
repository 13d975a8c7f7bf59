"""The numbers: every result equals the plain-loop oracle's."""

import contextlib
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs

VARIANTS = ("standard", "norm_preserving", "directional")
NORM_SCOPES = ("param", "block")
UNROLLED = gs.unrolled()
SCANNED = gs.scanned("blocks/")


def step(tx, updates):
    """One update from a fresh state, without jit: kernels are compiled once for all."""
    return tx.update(updates, tx.init(updates))[0]


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def run_unrolled(blocks, alpha=0.1, **kwargs):
    tree = as_jax(oracle.unrolled_tree(blocks))
    out = step(gs.smooth_over_depth(UNROLLED, alpha, **kwargs), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    return [out[f"layers_{layer}"] for layer in range(len(blocks))]


def along(axis):
    def depth(path, leaf):
        return gs.Depth("blocks", path[-1], axis=min(axis, leaf.ndim - 1))

    return depth


def run_scanned(blocks, axis=0, alpha=0.1, **kwargs):
    tree = as_jax({"blocks": oracle.stacked_tree(blocks, axis)})
    out = step(gs.smooth_over_depth(along(axis), alpha, **kwargs), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    return oracle.unstacked(out["blocks"], axis)


def run_both(blocks, alpha=0.1, **kwargs):
    """Of both layouts."""
    return (
        run_unrolled(blocks, alpha=alpha, **kwargs),
        run_scanned(blocks, alpha=alpha, **kwargs),
    )


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("num_layers", "dtype"),
    [
        *((3, dtype) for dtype in (jnp.float16, jnp.bfloat16, np.float32, np.float64)),
        *((num_layers, np.float32) for num_layers in (1, 2, 12)),
    ],
)
def test_every_variant_and_norm_scope_equals_the_plain_loops(
    num_layers, dtype, variant, norm_scope, enable_x64
):
    blocks = oracle.random_blocks(num_layers, dtype, seed=num_layers)
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    expected = oracle.window(blocks, 0.3, **kwargs)
    with enable_x64() if dtype is np.float64 else contextlib.nullcontext():
        for out in run_both(blocks, alpha=0.3, **kwargs):
            oracle.assert_blocks_close(out, expected)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 1])
def test_alpha_spans_its_whole_range(alpha):
    blocks = oracle.random_blocks(4)
    out = run_unrolled(blocks, alpha=alpha)
    oracle.assert_blocks_close(out, oracle.window(blocks, alpha))


def test_the_interior_and_the_ends_are_the_papers_equations():
    u = np.array([1.0, 10.0, 100.0, 1000.0], np.float32)
    out = step(gs.smooth_over_depth(SCANNED, 0.2), {"blocks": {"w": jnp.asarray(u)}})
    by_hand = [
        0.9 * 1 + 0.1 * 10,
        0.8 * 10 + 0.1 * (1 + 100),
        0.8 * 100 + 0.1 * (10 + 1000),
        0.9 * 1000 + 0.1 * 100,
    ]
    np.testing.assert_allclose(out["blocks"]["w"], by_hand, rtol=1e-6)


def test_the_default_strength_is_a_tenth_with_radius_one_standard_and_per_parameter():
    blocks = oracle.random_blocks(5)
    tree = as_jax(oracle.unrolled_tree(blocks))
    out = step(gs.smooth_over_depth(UNROLLED), tree)
    out = [out[f"layers_{layer}"] for layer in range(5)]
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.1))


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize(
    ("radius", "variant"),
    [(2, "standard"), (3, "norm_preserving"), (8, "standard"), (8, "norm_preserving")],
)
def test_a_wider_window_gives_the_weight_of_missing_neighbours_to_the_layer_itself(
    radius, decay, variant
):
    operator = gs.window(0.4, radius=radius, decay=decay)
    for num_layers in (3, 12):
        blocks = oracle.random_blocks(num_layers, shapes={"kernel": (2, 3)})
        expected = oracle.window(blocks, 0.4, radius, decay, variant=variant)
        for out in run_both(blocks, operator, variant=variant):
            oracle.assert_blocks_close(out, expected)


@pytest.mark.parametrize(
    ("axis", "variant", "norm_scope"),
    [  # All pairs.
        (axis, variant, NORM_SCOPES[(axis + i) % 2])
        for axis in (0, 1, 2)
        for i, variant in enumerate(VARIANTS)
    ],
)
def test_any_rank_and_layer_axis_equals_the_plain_loops(axis, variant, norm_scope):
    blocks = oracle.random_blocks(3, shapes=oracle.EVERY_RANK)
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    out = run_scanned(blocks, axis, alpha=0.3, **kwargs)
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.3, **kwargs))


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dense_operator_equals_the_plain_loops(variant, norm_scope):
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    blocks = oracle.random_blocks(3)
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    expected = oracle.smooth(blocks, lambda n: matrix, **kwargs)
    for out in run_both(blocks, gs.dense(matrix), **kwargs):
        oracle.assert_blocks_close(out, expected)


# Data types.


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_of_different_dtypes_share_a_block_and_keep_their_dtypes(
    variant, norm_scope, enable_x64
):
    dtypes = {
        "a": jnp.bfloat16,
        "b": np.float32,
        "c": jnp.float16,
        "d": np.float64,
    }
    blocks = [
        {role: x.astype(dtypes[role]) for role, x in block.items()}
        for block in oracle.random_blocks(3, shapes=dict.fromkeys(dtypes, (3,)))
    ]
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    expected = oracle.window(blocks, 0.25, **kwargs)
    if norm_scope == "block":
        # The float64 role's factor comes from float32 norms of the others.
        loose = [{role: x for role, x in b.items() if role != "d"} for b in expected]
    with enable_x64():
        for out in run_both(blocks, alpha=0.25, **kwargs):
            assert {role: out[0][role].dtype for role in out[0]} == dtypes
            if norm_scope == "block":
                for got, want in zip(out, expected, strict=True):
                    assert oracle.relative_error(got["d"], want["d"]) < 1e-6
                out = [{role: b[role] for role in loose[0]} for b in out]
            oracle.assert_blocks_close(
                out, loose if norm_scope == "block" else expected
            )


ALPHAS = {
    "python": lambda: 0.3,
    "numpy float16": lambda: np.float16(0.3),
    "numpy float32": lambda: np.float32(0.3),
    "numpy float64": lambda: np.float64(0.3),
    "strong bfloat16": lambda: jnp.asarray(0.3, jnp.bfloat16),
    "strong float16": lambda: jnp.asarray(0.3, jnp.float16),
    "strong float32": lambda: jnp.asarray(0.3, jnp.float32),
    "strong float64": lambda: jnp.asarray(0.3, jnp.float64),
}


@pytest.mark.parametrize(
    ("alpha", "variant"),
    [
        *((alpha, "standard") for alpha in ALPHAS),
        *(("strong float64", variant) for variant in VARIANTS[1:]),
        *(("strong bfloat16", variant) for variant in VARIANTS[1:]),
    ],
)
def test_each_leaf_keeps_its_dtype_and_precision_whatever_the_dtype_of_alpha(
    alpha, variant, enable_x64
):
    dtypes = (jnp.bfloat16, jnp.float16, np.float32)
    with enable_x64():
        alpha = ALPHAS[alpha]()
        for dtype in dtypes:
            blocks = oracle.random_blocks(3, dtype, {"kernel": (2, 3)})
            expected = oracle.window(blocks, float(alpha), variant=variant)
            for out in run_both(blocks, alpha, variant=variant):
                oracle.assert_blocks_close(out, expected)


def test_half_precision_arithmetic_runs_in_float32_and_rounds_once():
    # In float16, 1 - 0.1 and 0.1 / 2 alone would already err by 1e-4.
    blocks = oracle.random_blocks(12, jnp.float16, {"kernel": (64,)}, seed=1)
    expected = oracle.window(blocks, 0.1)
    for out in (run_scanned(blocks, alpha=0.1), run_unrolled(blocks, alpha=0.1)):
        for got, want in zip(out, expected, strict=True):
            rounded = want["kernel"].astype(np.float16)
            same = np.asarray(got["kernel"]) == rounded
            assert np.mean(same) > 0.98  # The rest are ties of the float32 rounding.


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_norms_of_half_precision_leaves_neither_overflow_nor_underflow(
    variant, norm_scope
):
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    for scale in (2e3, 1e-3):
        blocks = [
            {role: (scale * x).astype(np.float16) for role, x in block.items()}
            for block in oracle.random_blocks(3)
        ]
        expected = oracle.window(blocks, 0.3, **kwargs)
        for out in run_both(blocks, alpha=0.3, **kwargs):
            for got, want in zip(out, expected, strict=True):
                assert oracle.relative_error(got["kernel"], want["kernel"]) < 1e-3


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_leaves_use_the_hermitian_norm(dtype, variant, norm_scope, enable_x64):
    real = oracle.random_blocks(3, np.float64, {"kernel": (2, 3)}, seed=1)
    imaginary = oracle.random_blocks(3, np.float64, {"kernel": (2, 3)}, seed=2)
    blocks = [
        {role: (a[role] + 1j * b[role]).astype(dtype) for role in a}
        for a, b in zip(real, imaginary, strict=True)
    ]
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    expected = oracle.window(blocks, 0.3, **kwargs)
    with enable_x64():
        for out in run_both(blocks, alpha=0.3, **kwargs):
            oracle.assert_blocks_close(out, expected)


# Norms of zero.


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_updates_never_become_nan(variant, norm_scope, jit):
    blocks = oracle.random_blocks(5)
    for layer, role in ((0, "kernel"), (2, "kernel"), (2, "bias"), (4, "bias")):
        blocks[layer][role] = np.zeros_like(blocks[layer][role])
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    expected = oracle.window(blocks, 0.5, **kwargs)
    zeros = [{role: 0 * x for role, x in block.items()} for block in blocks]
    tx = gs.smooth_over_depth(UNROLLED, 0.5, **kwargs)
    update = jax.jit(tx.update) if jit else tx.update
    with jax.debug_nans(True):
        tree = as_jax(oracle.unrolled_tree(blocks))
        out, _ = update(tree, tx.init(tree))
        nothing, _ = update(as_jax(oracle.unrolled_tree(zeros)), tx.init(tree))
    out = [out[f"layers_{layer}"] for layer in range(5)]
    oracle.assert_blocks_close(out, expected)
    chex.assert_trees_all_equal(nothing, oracle.unrolled_tree(zeros))


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_scanned_zero_updates_never_become_nan(variant, norm_scope):
    blocks = oracle.random_blocks(3)
    blocks[1] = {role: 0 * x for role, x in blocks[1].items()}
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    with jax.debug_nans(True):
        out = run_scanned(blocks, alpha=0.5, **kwargs)
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.5, **kwargs))


def test_norm_preserving_lets_a_zero_layer_receive_its_neighbours_update():
    u = jnp.array([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    tx = gs.smooth_over_depth(SCANNED, 0.5, variant="norm_preserving")
    out = step(tx, {"blocks": {"w": u}})["blocks"]["w"]
    np.testing.assert_allclose(out[1], [1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(out[0], [3.0, 4.0], rtol=1e-6)


def test_norm_preserving_keeps_a_result_that_cancels_to_zero():
    u = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
    tx = gs.smooth_over_depth(SCANNED, 1.0, variant="norm_preserving")
    out = step(tx, {"blocks": {"w": u}})["blocks"]["w"]
    np.testing.assert_array_equal(out, jnp.zeros_like(u))


def test_directional_returns_a_zero_layer_unchanged_but_counts_it_as_a_neighbour():
    u = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    tx = gs.smooth_over_depth(SCANNED, 0.5, variant="directional")
    out = step(tx, {"blocks": {"w": u}})["blocks"]["w"]
    # The zero neighbour shrinks S u, the rescaling undoes it: the direction is kept.
    np.testing.assert_allclose(out, u, rtol=1e-6)
    # Between two layers a zero one keeps them from seeing each other.
    u = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    out = step(tx, {"blocks": {"w": u}})["blocks"]["w"]
    blocks = [{"w": np.asarray(x)} for x in u]
    expected = oracle.window(blocks, 0.5, variant="directional")
    oracle.assert_blocks_close([{"w": x} for x in out], expected)
    np.testing.assert_array_equal(out[1], [0.0, 0.0])


def test_directional_returns_a_layer_unchanged_where_the_directions_cancel():
    u = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
    tx = gs.smooth_over_depth(SCANNED, 1.0, variant="directional")
    out = step(tx, {"blocks": {"w": u}})["blocks"]["w"]
    np.testing.assert_array_equal(out, u)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_whose_squares_underflow_stay_finite(variant, norm_scope):
    blocks = oracle.random_blocks(3, shapes={"kernel": (2, 3)})
    blocks = [{"kernel": np.float32(1e-30) * b["kernel"]} for b in blocks]
    out = run_scanned(blocks, alpha=0.3, variant=variant, norm_scope=norm_scope)
    chex.assert_tree_all_finite(out)


def test_a_nan_reaches_the_neighbours_and_no_other_layer():
    blocks = oracle.random_blocks(6, shapes={"kernel": (2, 3)})
    for bad, spoiled in ((2, {1, 2, 3}), (0, {0, 1}), (5, {4, 5})):
        for value in (np.nan, np.inf):
            broken = [{"kernel": b["kernel"].copy()} for b in blocks]
            broken[bad]["kernel"][:] = value
            for out in run_both(broken, alpha=0.3):
                layers = {
                    i for i, b in enumerate(out) if not np.isfinite(b["kernel"]).all()
                }
                assert layers == spoiled


# Compilation changes nothing.


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_traced_alpha_equals_a_concrete_one(variant, norm_scope):
    blocks = oracle.random_blocks(3)
    kwargs = {"variant": variant, "norm_scope": norm_scope}

    @jax.jit
    def smooth(alpha, scanned, unrolled):
        return (
            step(gs.smooth_over_depth(SCANNED, alpha, **kwargs), scanned),
            step(gs.smooth_over_depth(UNROLLED, alpha, **kwargs), unrolled),
        )

    scanned = as_jax({"blocks": oracle.stacked_tree(blocks)})
    unrolled = as_jax(oracle.unrolled_tree(blocks))
    for alpha in (0.0, 0.3, 0.9):
        expected = oracle.window(blocks, alpha, **kwargs)
        first, second = smooth(alpha, scanned, unrolled)
        oracle.assert_blocks_close(oracle.unstacked(first["blocks"]), expected)
        second = [second[f"layers_{layer}"] for layer in range(3)]
        oracle.assert_blocks_close(second, expected)


def test_a_traced_alpha_works_in_a_wide_and_a_decaying_window():
    blocks = oracle.random_blocks(5, shapes={"kernel": (2, 3)})
    tree = as_jax({"blocks": oracle.stacked_tree(blocks)})

    @jax.jit
    def smooth(alpha):
        operator = gs.window(alpha, radius=2, decay=0.5)
        return step(gs.smooth_over_depth(SCANNED, operator), tree)

    out = oracle.unstacked(smooth(0.3)["blocks"])
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.3, 2, 0.5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_strict_promotion_and_rank_rules_are_respected(variant):
    blocks = oracle.random_blocks(3, jnp.bfloat16)
    for block in blocks:
        block["bias"] = block["bias"].astype(np.float32)
    expected = oracle.window(blocks, 0.3, variant=variant, norm_scope="block")
    kwargs = {"variant": variant, "norm_scope": "block"}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for alpha in (0.3, jnp.float32(0.3)):
            for out in run_both(blocks, alpha=alpha, **kwargs):
                oracle.assert_blocks_close(out, expected)
        wide = gs.smooth_over_depth(SCANNED, gs.window(0.3, radius=2), variant=variant)
        tree = as_jax({"blocks": oracle.stacked_tree(blocks)})
        out = step(wide, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)


def test_float64_leaves_are_smoothed_in_float64(enable_x64):
    blocks = oracle.random_blocks(3, np.float64)
    for variant in VARIANTS:
        expected = oracle.window(blocks, 0.1, variant=variant)
        with enable_x64():
            out = run_scanned(blocks, alpha=0.1, variant=variant)
        for role in oracle.ROLES:
            got = np.stack([b[role] for b in out])
            want = np.stack([b[role] for b in expected])
            assert oracle.relative_error(got, want) < 1e-15 * 4


def test_numpy_leaves_are_accepted_and_keep_their_dtype():
    blocks = oracle.random_blocks(3, jnp.bfloat16)
    tree = oracle.unrolled_tree(blocks)
    out = step(gs.smooth_over_depth(UNROLLED, 0.3), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    out = [out[f"layers_{layer}"] for layer in range(3)]
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.3))


# The whole range of the dtype, what cancels, and gradients.


LAYOUTS = {
    "unrolled": (UNROLLED, lambda u: {f"layers_{i}": x for i, x in enumerate(u)}),
    "stacked": (gs.scanned("blocks"), lambda u: {"blocks": jnp.stack(u)}),
    "stacked last": (
        gs.scanned("blocks", axis=-1),
        lambda u: {"blocks": jnp.stack(u, axis=-1)},
    ),
    "first apart": (
        gs.first_match(
            gs.unrolled(r"first_(\d+)", stack="s"),
            gs.scanned("rest", start=1, stack="s"),
        ),
        lambda u: {"first_0": u[0], "rest": jnp.stack(u[1:])},
    ),
}


@functools.cache
def made(layout, operator, **kwargs):
    tx = gs.smooth_over_depth(LAYOUTS[layout][0], operator, **kwargs)
    return tx, jax.jit(tx.update)


def of_layers(layout, layers, operator, jit=True, **kwargs):
    """The layers after one update, in the dtype that they have."""
    tree = LAYOUTS[layout][1]([jnp.asarray(x) for x in layers])
    tx, update = made(layout, operator, **kwargs)
    out = (update if jit else tx.update)(tree, tx.init(tree))[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    if layout == "unrolled":
        return [np.asarray(out[f"layers_{i}"]) for i in range(len(layers))]
    if layout == "first apart":
        return [np.asarray(out["first_0"]), *np.asarray(out["rest"])]
    return list(
        np.moveaxis(np.asarray(out["blocks"]), -1 if "last" in layout else 0, 0)
    )


NORMS = {
    np.float32: (1e-35, 1e-30, 1e-16, 1.0, 1e15, 1e25, 8e37),
    jnp.bfloat16: (1e-30, 1e18, 1e34),
}


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_right_over_the_whole_range_of_float32(layout, variant):
    for dtype, norms in NORMS.items():
        rng, eps = np.random.default_rng(0), float(jnp.finfo(dtype).eps)
        for shape in ((1, 1), (7, 50)):
            directions = rng.normal(size=(4, *shape))
            directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
            for norm in norms:
                layers = list((norm * directions).astype(dtype))
                # At norm 1, for the oracle.
                unit = [{"w": np.float64(np.longdouble(x) / norm)} for x in layers]
                out = of_layers(layout, layers, 0.5, variant=variant)
                for got, want in zip(
                    out, oracle.window(unit, 0.5, variant=variant), strict=True
                ):
                    # Below 1.2e-38 numbers are flushed to 0, shares of them too.
                    np.testing.assert_allclose(
                        np.float64(np.longdouble(got) / norm),
                        want["w"],
                        atol=12 * eps + 1.2e-37 / norm,
                    )


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_norms_of_a_million_numbers_of_very_different_layers_are_right(layout):
    u = np.random.default_rng(0).normal(size=(4, 1024, 1024))
    u *= np.reshape([1e-16, 1e-32, 1.0, 1e34], (4, 1, 1)) / 1024
    u[1:] = u[1:, ::-1]
    layers = list(u.astype(np.float32))
    for variant in ("norm_preserving", "directional"):
        out = of_layers(layout, layers, 0.5, variant=variant)
        for got, layer in zip(out, layers, strict=True):
            found, want = (np.linalg.norm(x.astype(np.float64)) for x in (got, layer))
            np.testing.assert_allclose(found, want, rtol=2e-6)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_a_block_of_roles_of_very_different_sizes_has_the_right_norm(variant):
    for scales in ((1e-30, 1e-28), (1e-25, 1.0), (1e30, 1e28), (1e10, 1e-20)):
        blocks = oracle.random_blocks(3, np.float64, {"a": (5,), "b": (2, 3)})
        scale_of = dict(zip("ab", scales, strict=True))
        cast = [
            {r: (scale_of[r] * x).astype(np.float32) for r, x in block.items()}
            for block in blocks
        ]
        exact = [{r: np.float64(x) for r, x in block.items()} for block in cast]
        kwargs = {"variant": variant, "norm_scope": "block"}
        expected = oracle.window(exact, 0.3, **kwargs)
        for got, want in zip(
            run_scanned(cast, alpha=0.3, **kwargs), expected, strict=True
        ):
            for role, scale in scale_of.items():
                found = np.asarray(got[role], np.float64) / scale
                np.testing.assert_allclose(found, want[role] / scale, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
def test_a_directional_layer_whose_directions_cancel_comes_back_unchanged(
    norm_scope, layout
):
    kwargs = {"variant": "directional", "norm_scope": norm_scope}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        shape = rng.normal(size=[(1,), (7, 11)][seed % 2])
        for alpha, signs in ((0.5, (1, -1, 1)), (1.0, (1, 1, -1))):
            sizes = np.abs(rng.normal(size=3)) * signs
            layers = [(size * shape).astype(np.float32) for size in sizes]
            out = of_layers(layout, layers, alpha, jit=seed < 7, **kwargs)
            np.testing.assert_array_equal(out[1], layers[1])


def test_what_rounding_leaves_of_a_layer_is_not_scaled_up_to_its_norm():
    u = np.float32(np.random.default_rng(0).normal(size=5))
    layers = [u, np.float32(-0.3 / 0.7) * u, u]  # 0.7 of it, 0.15 of each neighbor
    for layout in LAYOUTS:
        out = of_layers(layout, layers, 0.3, variant="norm_preserving")
        assert np.abs(out[1]).max() <= 1e-6 * np.abs(u).max()


def test_a_large_layer_that_gives_all_to_small_neighbors_is_not_noise_of_its_norm():
    u = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    layers = list(u * np.float32([[1e-9], [1.0], [1e-9]]))
    for layout in LAYOUTS:
        out = of_layers(layout, layers, 1.0, variant="norm_preserving")
        assert np.abs(out[1]).max() <= 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Shrinks(gs.Operator):
    """A user's own, without a matrix."""

    def couple(self, layers):
        return layers.scaled(1e-9)


def test_what_an_operator_without_a_matrix_makes_small_gets_its_norm_back():
    layers = list(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32))
    for layout in ("stacked", "unrolled"):
        out = of_layers(layout, layers, Shrinks(), variant="norm_preserving")
        np.testing.assert_allclose(out, layers, rtol=1e-5)


def test_small_weights_and_small_neighbors_are_not_taken_for_what_rounding_leaves():
    layers = [np.float32([3.0, 4.0]), np.float32([0.0, 2e-9])]
    tiny = gs.dense(1e-12 * np.array([[0.0, 1.0], [1.0, 0.0]]))
    swapped = [np.float32([0.0, 5.0]), np.float32([1.2e-9, 1.6e-9])]
    for variant in ("norm_preserving", "directional"):
        for layout in ("stacked", "unrolled"):
            out = of_layers(layout, layers, tiny, variant=variant)
            np.testing.assert_allclose(out, swapped, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradients_through_the_strength_and_the_updates_are_finite(scale, variant):
    u = scale * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    u[2] = 0  # a layer of norm 0

    def loss(alpha, u):
        tx = gs.smooth_over_depth(gs.scanned("blocks"), alpha, variant=variant)
        return jnp.mean(tx.update({"blocks": u}, tx.init({}))[0]["blocks"])

    for alpha in (0.0, 0.3):
        by_alpha, by_updates = jax.grad(loss, (0, 1))(alpha, u)
        assert jnp.isfinite(by_alpha)
        if variant == "directional" and scale != 1:  # ‖u‖² is out of range
            continue
        # They are those of updates of another size.
        want = jax.grad(loss, 1)(alpha, u / np.float32(scale))
        np.testing.assert_allclose(by_updates, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "operator",
    [
        gs.window(0.2),
        gs.gaussian(1.0),
        gs.similarity_window(0.2),
        gs.controls.norm_matched(gs.window(0.2)),
    ],
    ids=["window", "gaussian", "similarity_window", "norm_matched"],
)
def test_no_infinity_is_made_on_the_way(operator, variant):
    for scale in (1e-30, 1.0, 1e30):
        u = [
            np.float32(scale) * np.float32(x) for x in ([1.0, 2.0], [0, 0], [3.0, 4.0])
        ]
        for layout in ("stacked", "unrolled"):
            with jax.debug_infs(True), jax.debug_nans(True):
                of_layers(layout, u, operator, jit=False, variant=variant)
