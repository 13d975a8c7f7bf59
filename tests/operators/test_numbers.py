"""The numbers: every operator in every layout, variant and dtype is the plain loops."""

import contextlib
import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from block_layouts import LAYOUTS, blocks_for, smoothed, tree_in
from operator_table import EVERY, STRENGTH, VARIANTS, expected_of, make

import gradsmooth_optax as gs

# Each kind of operator has a code of its own: differences, a band, a product, ...
KINDS = [
    *("window", "wide window", "gaussian", "ema", "layer scale"),
    *("norm_matched", "similarity per param", "similarity per block"),
    *("alike window", "composed without a matrix"),
]
BOTH = ("stacked", "unrolled")
MIXED = ("bfloat16", "float32", "float64", "complex64", "complex128")
SHAPES_OF_FOUR = {"a": (2, 3), "b": (2, 3), "c": (2, 3), "d": (3, 2)}
by_layout = pytest.mark.parametrize("layout", BOTH)
core, slow = pytest.mark.core, pytest.mark.slow


class Failures(list):
    """Tells every case that fails, and not the first one alone."""

    def check(self, title, blocks, expected):
        try:
            oracle.assert_blocks_close(blocks, expected)
        except AssertionError as error:
            self.append(f"{title}: {error}")


def of_layers(layout, layers, operator, **kwargs):
    """The layers of a single role after one update, in the dtype that they have."""
    out = smoothed(layout, [{"w": x} for x in layers], operator, **kwargs)
    return [block["w"] for block in out]


def random_layers(num_layers=3, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.normal(size=(num_layers, 2, 3)).astype(np.float32))


# Every layout, variant, dtype and number of layers.


MARKS = {"stacked": core, "nested scans": slow, "stacked on the last axis": slow}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=MARKS.get(name, ())) for name in LAYOUTS],
)
def test_every_operator_in_every_layout_and_variant_is_the_plain_loops(layout):
    failures = Failures()
    for i, name in enumerate(EVERY):
        # Other matrices are in `test_matrices`.
        num_variants = (5 if name in KINDS else 2) if layout in BOTH else 3
        if name not in KINDS and layout not in BOTH:
            continue
        for k, (variant, norm_scope) in enumerate(VARIANTS):
            if (i + k) % 5 >= num_variants:
                continue
            kwargs = {"variant": variant, "norm_scope": norm_scope}
            blocks = blocks_for(layout, zero_layer=(i + k) % 2 == 0)
            # Of a number the matrix is NumPy's, of an array it is jax's.
            strength = STRENGTH if (i + k) % 3 else jnp.float32(STRENGTH)
            got = smoothed(layout, blocks, make(name, strength), **kwargs)
            want = expected_of(name, blocks, **kwargs, ranked=LAYOUTS[layout].ranked)
            failures.check(f"{name}, {variant} per {norm_scope}", got, want)
    assert not failures


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "complex64", "float64", "complex128"]
)
@by_layout
def test_every_kind_of_operator_keeps_a_dtype_and_computes_in_float32_at_least(
    dtype, layout, enable_x64
):
    failures = Failures()
    is_rare = dtype in ("float16", "complex128")
    is_wide = dtype in ("float64", "complex128")
    for i, name in enumerate(KINDS[::3] if is_rare else KINDS):
        variant, norm_scope = VARIANTS[i % 5]
        kwargs = {"variant": variant, "norm_scope": norm_scope}
        blocks = blocks_for(layout, dtype)
        with enable_x64() if is_wide else contextlib.nullcontext():
            got = smoothed(layout, blocks, make(name), **kwargs)
        want = expected_of(name, blocks, **kwargs)
        failures.check(f"{name}, {variant} per {norm_scope}", got, want)
    assert not failures


def test_runs_of_any_length_are_the_plain_loops():
    failures = Failures()
    for layout, num_layers in (
        *((x, 2) for x in BOTH),
        *(("unrolled", n) for n in (3, 12)),
    ):
        blocks = oracle.random_blocks(num_layers, shapes={"kernel": (2, 3)})
        for name in ("window", "wide window", "decaying window", "tikhonov"):
            got = smoothed(layout, blocks, make(name))
            failures.check(f"{name}, {layout}", got, expected_of(name, blocks))
    assert not failures


def test_one_leaf_may_hold_several_runs():
    blocks = oracle.random_blocks(11, shapes={"w": (2, 3)})
    blocks[5] = {}
    stack = np.stack([block["w"] for block in blocks if block])
    tree = {"w": jnp.asarray(stack.reshape(2, 5, 2, 3))}

    def depth(path, leaf):
        return gs.Depth("s", "w", axis=(0, 1), stride=(6, 1))

    for name in ("window", "gaussian", "tikhonov"):
        tx = gs.smooth_over_depth(depth, make(name), strict=False)
        out = tx.update(tree, tx.init(tree))[0]["w"].reshape(10, 2, 3)
        want = [block for block in expected_of(name, blocks) if block]
        oracle.assert_blocks_close([{"w": x} for x in out], want)


def test_parameters_of_every_rank_share_a_block_each_on_an_axis_of_its_own():
    axes = {"kernel": 1, "bias": -1, "heads": 2, "gain": 0}
    blocks = oracle.random_blocks(4, shapes=oracle.EVERY_RANK)
    tree = {
        role: jnp.stack([b[role] for b in blocks], axis) for role, axis in axes.items()
    }

    def depth(path, leaf):
        return gs.Depth("blocks", path[-1], axis=axes[path[-1]])

    kwargs = {"variant": "norm_preserving", "norm_scope": "block"}
    tx = gs.smooth_over_depth(depth, 0.3, **kwargs)
    out, _ = tx.update(tree, tx.init(tree))
    out = {role: np.moveaxis(x, axes[role], 0) for role, x in out.items()}
    expected = oracle.window(blocks, 0.3, **kwargs)
    oracle.assert_blocks_close(oracle.unstacked(out), expected)


@core
def test_the_interior_and_the_ends_are_the_papers_equations():
    out = of_layers("stacked", np.float32([1.0, 10.0, 100.0, 1000.0]), 0.2)
    by_hand = [
        0.9 * 1 + 0.1 * 10,
        0.8 * 10 + 0.1 * (1 + 100),
        0.8 * 100 + 0.1 * (10 + 1000),
        0.9 * 1000 + 0.1 * 100,
    ]
    np.testing.assert_allclose(out, by_hand, rtol=1e-6)


def test_the_default_is_a_tenth_with_radius_one_standard_and_per_parameter():
    blocks = blocks_for("unrolled")
    tree = tree_in("unrolled", blocks)
    tx = gs.smooth_over_depth(gs.unrolled())
    out = LAYOUTS["unrolled"].blocks_in(tx.update(tree, tx.init(tree))[0])
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.1))


@by_layout
def test_compiled_with_a_traced_strength_it_is_the_same_at_any_strength_and_size(
    layout,
):
    cases = [
        ("window", *how) for how in (VARIANTS if layout == "stacked" else VARIANTS[::2])
    ]
    cases += [("similarity per block", *VARIANTS[0]), ("norm_matched", *VARIANTS[0])]

    @jax.jit
    def apply(tree, strength):
        results = []
        for name, variant, norm_scope in cases:
            tx = gs.smooth_over_depth(
                LAYOUTS[layout].depth,
                make(name, strength),
                variant=variant,
                norm_scope=norm_scope,
            )
            results.append(tx.update(tree, tx.init(tree))[0])
        return results

    # Where squares are 0, too small or too large, all are summed again.
    failures = Failures()
    for strength, first, others in (
        (0.0, 1.0, 1.0),
        (0.9, 1.0, 1.0),
        (0.3, 0.0, 1.0),
        (0.3, 1e-30, 1e-30),
        (1.0, 1e30, 1e30),
    ):
        blocks = blocks_for(layout, "float64")
        sizes = [first] + [others] * 4
        blocks = [
            {role: np.float32(size * x) for role, x in block.items()}
            for size, block in zip(sizes, blocks, strict=True)
        ]
        outs = apply(tree_in(layout, blocks), strength)
        for (name, variant, norm_scope), out in zip(cases, outs, strict=True):
            want = expected_of(name, blocks, variant, norm_scope, strength=strength)
            got = LAYOUTS[layout].blocks_in(jax.tree.map(np.asarray, out))
            failures.check(f"{name}, {variant} {norm_scope} at {others}", got, want)
    assert not failures


# Deep models.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name", "how"),
    [
        ("stacked", "decaying window", VARIANTS[0]),
        ("stacked", "similarity per block", VARIANTS[0]),
        ("unrolled", "window", VARIANTS[2]),
        ("unrolled", "tikhonov", VARIANTS[0]),
    ],
)
def test_a_hundred_layers_are_the_plain_loops(layout, name, how):
    blocks = oracle.random_blocks(100, shapes={"bias": (3,)})
    got = smoothed(layout, blocks, make(name), variant=how[0], norm_scope=how[1])
    oracle.assert_blocks_close(got, expected_of(name, blocks, *how))


def num_equations(jaxpr):
    inner = [
        jaxpr
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for jaxpr in (value if isinstance(value, tuple | list) else [value])
    ]
    jaxprs = [getattr(value, "jaxpr", value) for value in inner]
    return len(jaxpr.eqns) + sum(num_equations(j) for j in jaxprs if hasattr(j, "eqns"))


@pytest.mark.parametrize(
    "make_tx",
    [
        lambda depth: gs.smooth_over_depth(depth, 0.3),
        lambda depth: gs.smooth_over_depth(
            depth, 0.3, variant="directional", norm_scope="block"
        ),
        lambda depth: gs.smooth_over_depth(depth, gs.tikhonov(2.0)),
        lambda depth: gs.smooth_over_depth(depth, gs.similarity_window(0.3)),
    ],
    ids=["window", "directional", "tikhonov", "similarity"],
)
def test_the_program_of_an_unrolled_model_grows_linearly(make_tx):
    tx, sizes = make_tx(gs.unrolled()), []
    for num_layers in (8, 12, 20):  # from 8 on a wide operator is a matmul
        blocks = oracle.random_blocks(num_layers, shapes={"bias": (3,)})
        tree = oracle.unrolled_tree(blocks)
        state = jax.eval_shape(tx.init, tree)
        sizes.append(num_equations(jax.make_jaxpr(tx.update)(tree, state).jaxpr))
    assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0])


# Rounding and promotion.


def test_half_precision_is_computed_in_float32_and_rounded_once():
    shapes = {"kernel": (2, 3)}
    for dtype, names in ((jnp.bfloat16, KINDS), (jnp.float16, ("window", "ema"))):
        blocks = blocks_for("stacked", dtype, shapes)
        single = [{r: x.astype(np.float32) for r, x in b.items()} for b in blocks]
        for name in names:
            half, wide = (smoothed("stacked", x, make(name)) for x in (blocks, single))
            for got, want in zip(half, wide, strict=True):
                rounded = want["kernel"].astype(dtype)
                np.testing.assert_array_equal(got["kernel"], rounded, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float8_e4m3fn", x) for x in BOTH] + [("float4_e2m1fn", "stacked")],
)
def test_tiny_floats_are_computed_in_float32_and_rounded_once(dtype, layout):
    rng = np.random.default_rng(0)
    values = rng.choice([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0], (4, 5))
    layers = [np.asarray(jnp.asarray(v).astype(dtype)) for v in values]
    wide = [{"w": x.astype(np.float64)} for x in layers]
    for variant in ("standard", "norm_preserving", "directional"):
        out = of_layers(layout, layers, 0.3, variant=variant)
        expected = oracle.window(wide, 0.3, variant=variant)
        for got, want in zip(out, expected, strict=True):
            nearest = np.asarray(jnp.asarray(want["w"], jnp.float32).astype(dtype))
            np.testing.assert_array_equal(got, nearest)


@by_layout
def test_leaves_of_different_dtypes_share_a_block_and_keep_their_dtypes(
    layout, enable_x64
):
    dtypes = {
        "a": jnp.dtype("bfloat16"),
        "b": np.dtype("float32"),
        "c": np.dtype("float16"),
        "d": np.dtype("float64"),
    }
    blocks = [
        {role: x.astype(dtypes[role]) for role, x in block.items()}
        for block in oracle.random_blocks(5, shapes=SHAPES_OF_FOUR)
    ]
    for variant, norm_scope in VARIANTS:
        kwargs = {"variant": variant, "norm_scope": norm_scope}
        want = oracle.window(blocks, 0.25, **kwargs)
        with enable_x64():
            got = smoothed(layout, blocks, 0.25, **kwargs)
        assert {role: x.dtype for role, x in got[0].items()} == dtypes
        if norm_scope == "block":  # of float64 the norms of the others are of float32
            for one, other in zip(got, want, strict=True):
                assert oracle.relative_error(one.pop("d"), other.pop("d")) < 1e-6
        oracle.assert_blocks_close(got, want)


ALPHAS = {
    "NumPy float16": lambda: np.float16(0.3),
    "NumPy float64": lambda: np.float64(0.3),
    "bfloat16": lambda: jnp.asarray(0.3, jnp.bfloat16),
    "float16": lambda: jnp.asarray(0.3, jnp.float16),
    "float64": lambda: jnp.asarray(0.3, jnp.float64),
}


@pytest.mark.parametrize("kind", ALPHAS)
def test_each_leaf_keeps_its_dtype_and_precision_whatever_that_of_alpha(
    kind, enable_x64
):
    dtypes = {"a": "bfloat16", "b": "float16", "c": "float32", "d": "float64"}
    blocks = [
        {role: x.astype(jnp.dtype(dtypes[role])) for role, x in block.items()}
        for block in oracle.random_blocks(5, shapes=SHAPES_OF_FOUR)
    ]
    for layout in BOTH:
        for variant in ("standard", "norm_preserving", "directional"):
            with enable_x64():
                alpha = ALPHAS[kind]()
                got = smoothed(layout, blocks, alpha, variant=variant)
            want = oracle.window(blocks, float(alpha), variant=variant)
            oracle.assert_blocks_close(got, want)


def assert_traces_strictly(operator, dtypes, layout, **kwargs):
    """`init` and `update` promote neither dtypes nor ranks, and keep dtypes."""
    tree = {dtype: np.ones((2, 3), jnp.dtype(dtype)) for dtype in dtypes}
    tree = LAYOUTS[layout].tree_of([tree] * 5)
    tx = gs.smooth_over_depth(LAYOUTS[layout].depth, operator, **kwargs)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, tree)
        out, _ = jax.eval_shape(tx.update, tree, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)


@pytest.mark.slow
def test_no_operator_and_no_variant_promotes_dtypes_or_ranks(enable_x64):
    strengths = [STRENGTH, np.float16(STRENGTH), jnp.bfloat16(STRENGTH)]
    strengths += [lambda count: np.float64(STRENGTH), lambda count: jnp.float16(0.3)]
    with enable_x64():
        for i, name in enumerate(EVERY):
            given = strengths[i % 5]
            if name in ("subclass", "function") or "alike" in name:
                given = STRENGTH  # arithmetic of ours
            assert_traces_strictly(make(name, given), MIXED, BOTH[i % 2])
        both = gs.similarity_window(strengths[2], "param", sharpness=strengths[3])
        assert_traces_strictly(both, MIXED, "stacked")
        both = gs.window(strengths[3], 2, decay=strengths[2])
        assert_traces_strictly(both, MIXED, "stacked")
        for variant, norm_scope in VARIANTS[1:]:
            how = {"variant": variant, "norm_scope": norm_scope}
            for layout, dtypes in (("stacked", MIXED), ("unrolled", MIXED[:2])):
                assert_traces_strictly(jnp.float32(0.3), dtypes, layout, **how)


@by_layout
def test_diagnostics_promote_nothing(layout, enable_x64):
    depth = LAYOUTS[layout].depth
    tree = {dtype: np.ones((2, 3), jnp.dtype(dtype)) for dtype in MIXED}
    functions = (
        lambda tree: gs.diagnostics.depth_statistics(tree, depth),
        lambda tree: gs.diagnostics.gradient_noise(
            jax.tree.map(lambda x: jnp.stack([x, x]), tree), depth
        ),
    )
    scores = (gs.diagnostics.line_shape_score, gs.diagnostics.residual_alignment)
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with enable_x64(), strict[0], strict[1]:
        for function in functions:
            jax.eval_shape(function, LAYOUTS[layout].tree_of([tree] * 5))
        for score, dtype in itertools.product(scores, MIXED):
            jax.eval_shape(score, jnp.ones((4, 2, 3), dtype))


@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble, ">f4"])
def test_dtypes_that_jax_lacks_are_refused_and_never_rounded_silently(dtype):
    if np.dtype(dtype) in (np.dtype("float64"), np.dtype("complex128")):
        pytest.skip("long double is float64 here")
    tree = [{"w": np.ones(3, dtype)}] * 3
    tx = gs.smooth_over_depth(gs.unrolled(), 0.3)
    with pytest.raises(TypeError):
        tx.update(tree, tx.init(tree))


def test_cosines_are_real_and_summed_in_float32():
    # In bfloat16 a sum of 4096 ones stops at 256.
    many = np.ones((2, 4096), jnp.bfloat16)
    many[1, :2048], many[1, 2048:] = -1, 2
    u = np.array([1.0 + 1.0j, 2.0], np.complex64)
    # A quarter turn is orthogonal, an eighth is not.
    for given in (list(many), [u, 1j * u], [u, np.exp(0.25j * np.pi) * u]):
        layers = [x.astype(given[0].dtype) for x in given]
        out = of_layers("stacked", layers, gs.similarity_window(1.0))
        want = oracle.similarity_window([{"w": x} for x in layers], 1.0)
        oracle.assert_blocks_close([{"w": x} for x in out], want)


# Huge and tiny updates.


@pytest.mark.parametrize("layout", ["stacked", "unrolled", "cycles and a remainder"])
def test_norms_are_right_over_the_whole_range_of_float32(layout):
    sizes = {
        np.float32: (1e-35, 1e-30, 1e-16, 1.0, 1e15, 9e18, 1e25, 8e37),
        jnp.bfloat16: (1e-30, 1e18, 1e34),
    }
    directions = np.random.default_rng(0).normal(size=(5, 2, 3))
    directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
    for dtype, norms in sizes.items():
        eps = float(jnp.finfo(dtype).eps)
        for norm in norms:
            layers = list((norm * directions).astype(dtype))
            # At norm 1, for the oracle.
            unit = [{"w": np.float64(np.longdouble(x) / norm)} for x in layers]
            for name, *how in (
                ("window", "standard"),
                ("window", "norm_preserving"),
                ("window", "directional"),
                ("norm_matched", "standard"),
                ("similarity per param", "standard"),
            ):
                out = of_layers(layout, layers, make(name), variant=how[0])
                want = expected_of(name, unit, *how)
                for got, expected in zip(out, want, strict=True):
                    # Below 1.2e-38 numbers are flushed to 0, shares of them too.
                    np.testing.assert_allclose(
                        np.float64(np.longdouble(got) / norm),
                        expected["w"],
                        atol=12 * eps + 1.2e-37 / norm,
                        err_msg=f"{name} {how[0]}, {dtype.__name__} at {norm}",
                    )


@slow
@by_layout
def test_norms_of_a_million_numbers_of_very_different_layers_are_right(layout):
    u = np.random.default_rng(0).normal(size=(4, 1024, 256))
    u *= np.reshape([1e-16, 1e-32, 1.0, 1e34], (4, 1, 1)) / 512
    u[1:] = u[1:, ::-1]
    layers = list(u.astype(np.float32))
    for variant in ("norm_preserving", "directional"):
        out = of_layers(layout, layers, 0.5, variant=variant)
        for got, layer in zip(out, layers, strict=True):
            found, want = (np.linalg.norm(x.astype(np.float64)) for x in (got, layer))
            np.testing.assert_allclose(found, want, rtol=2e-6)


@pytest.mark.parametrize(
    "scales", [(1e-30, 1e-28), (1e-25, 1), (1e30, 1e28), (1e10, 0)]
)
def test_a_block_of_roles_of_very_different_sizes_has_the_right_norm(scales):
    scale_of = dict(zip(("kernel", "other"), scales, strict=True))
    blocks = [
        {r: (scale_of[r] * x).astype(np.float32) for r, x in block.items()}
        for block in blocks_for("stacked", "float64")
    ]
    for variant in ("norm_preserving", "directional"):
        kwargs = {"variant": variant, "norm_scope": "block"}
        out, expected = (
            smoothed("stacked", blocks, 0.3, **kwargs),
            oracle.window(blocks, 0.3, **kwargs),
        )
        for got, want in zip(out, expected, strict=True):
            for role, scale in scale_of.items():
                found, right = (np.float64(x[role]) / (scale or 1) for x in (got, want))
                np.testing.assert_allclose(found, right, atol=1e-5)


@by_layout
def test_float16_is_right_up_to_its_largest_number_and_down_to_its_spacing(layout):
    directions = np.stack(random_layers(4))
    directions /= np.abs(directions).max()
    cases = [("window", how) for how in VARIANTS]
    for name, how in (*cases, ("similarity per block", VARIANTS[0])):
        for scale in (6.5e4, 2e3, 1e-3, 1e-5, 1e-6):  # the last are evenly spaced
            layers = list((scale * directions).astype(np.float16))
            kwargs = {"variant": how[0], "norm_scope": how[1]}
            out = of_layers(layout, layers, make(name), **kwargs)
            want = expected_of(name, [{"w": x} for x in layers], *how)
            want = np.stack([block["w"] for block in want])
            error = oracle.relative_error(out, want)
            assert error <= max(1e-3, 2.0**-24 / np.max(np.abs(want))), name


@by_layout
def test_a_norm_that_float32_cannot_hold_makes_no_finite_directions(layout):
    layers = [np.full(3, x, np.float32) for x in (3e38, -1.0, 1.0, 1.0)]
    out = of_layers(layout, layers, 0.3, variant="directional")
    assert not any(np.isfinite(x).any() for x in out[:2])
    assert all(np.isfinite(x).all() for x in out[2:])


@by_layout
def test_no_infinity_or_nan_is_made_on_the_way_of_zeros_and_of_any_size(layout):
    some = blocks_for(layout, "float64")
    for layer, role in ((0, "kernel"), (2, "kernel"), (2, "other"), (4, "other")):
        some[layer][role] = 0 * some[layer][role]
    names = ("window", "gaussian", "similarity per block", "norm_matched")
    cases = [(name, *VARIANTS[0]) for name in names]
    cases += [("window", *how) for how in VARIANTS[1:]]
    for name, variant, norm_scope in cases:
        kwargs = {"variant": variant, "norm_scope": norm_scope}
        for scale in (0.0, 1e-30, 1.0, 1e30):
            blocks = [{r: np.float32(scale * x) for r, x in b.items()} for b in some]
            with jax.debug_infs(True), jax.debug_nans(True):
                out = smoothed(layout, blocks, make(name), **kwargs)
            oracle.assert_blocks_close(out, expected_of(name, blocks, **kwargs))
            assert scale or not any(x.any() for b in out for x in b.values())


# Zeros, and what cancels.


@core
@pytest.mark.parametrize(
    ("variant", "alpha", "layers", "expected"),
    [
        # A zero layer receives what its neighbors give, whatever its norm was ...
        (
            "norm_preserving",
            0.5,
            [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]],
            [[3.0, 4.0], [1.5, 2.0], [3.0, 4.0]],
        ),
        # ... and where all cancels the result stays zero.
        ("norm_preserving", 1.0, [[3.0, 4.0], [-3.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]]),
        # Without a direction a layer comes back unchanged, but counts as a neighbor.
        (
            "directional",
            0.5,
            [[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]],
            [[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]],
        ),
        ("directional", 1.0, [[3.0, 4.0], [-3.0, -4.0]], [[3.0, 4.0], [-3.0, -4.0]]),
    ],
)
def test_layers_of_norm_zero_are_as_the_contract_says(variant, alpha, layers, expected):
    out = of_layers("stacked", np.float32(layers), alpha, variant=variant)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["stacked", "unrolled", "cycles and a remainder"])
def test_a_directional_layer_whose_directions_cancel_comes_back_unchanged(layout):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        direction, size = rng.normal(size=(2, 3)), np.abs(rng.normal(size=5))
        for alpha, signs in ((0.5, (1, -1, 1, 0, 0)), (1.0, (1, 1, -1, 0, 0))):
            factors = np.where(np.arange(5) < 3, signs, size) * size
            layers = [(factor * direction).astype(np.float32) for factor in factors]
            for norm_scope in ("param", "block"):
                how = {"variant": "directional", "norm_scope": norm_scope}
                out = of_layers(layout, layers, alpha, **how)
                np.testing.assert_array_equal(out[1], layers[1])


@by_layout
def test_what_rounding_leaves_of_a_layer_is_not_scaled_up_to_its_norm(layout):
    u = random_layers()
    layers = [u[0], np.float32(-0.3 / 0.7) * u[0], u[0]]  # 0.7 of it, 0.15 of each
    out = of_layers(layout, layers, 0.3, variant="norm_preserving")
    assert np.abs(out[1]).max() <= 1e-6 * np.abs(u[0]).max()
    # Nor is a layer that gives all of it to small neighbors.
    layers = [np.float32(size) * x for size, x in zip((1e-9, 1, 1e-9), u, strict=True)]
    out = of_layers(layout, layers, 1.0, variant="norm_preserving")
    assert np.abs(out[1]).max() <= 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Shrinks(gs.Operator):
    """A user's own, without a matrix."""

    def couple(self, layers):
        return layers.scaled(1e-9)


@by_layout
def test_small_weights_and_neighbors_are_not_taken_for_what_rounding_leaves(layout):
    u = random_layers()
    out = of_layers(layout, u, Shrinks(), variant="norm_preserving")
    np.testing.assert_allclose(out, u, rtol=1e-5)
    layers = [np.float32([3.0, 4.0]), np.float32([0.0, 2e-9])]
    tiny = gs.dense(1e-12 * np.array([[0.0, 1.0], [1.0, 0.0]]))
    swapped = [np.float32([0.0, 5.0]), np.float32([1.2e-9, 1.6e-9])]
    for variant in ("norm_preserving", "directional"):
        out = of_layers(layout, layers, tiny, variant=variant)
        np.testing.assert_allclose(out, swapped, rtol=1e-6)


# Updates that are not finite: what spreads where.


@by_layout
def test_what_is_not_finite_spreads_to_the_layers_that_receive_it_and_no_other(layout):
    reach = {
        "window": 1,
        "gaussian": 2,
        "laplacian": 1,
        "similarity per param": 1,
        "alike window": 2,  # by the norms of its neighbors
        "tikhonov": 4,
    }
    for name, radius in reach.items():
        for bad, value in ((0, np.nan), (2, np.inf), (4, np.nan)):
            blocks = blocks_for(layout)
            blocks[bad]["kernel"][0, 1] = value
            out = smoothed(layout, blocks, make(name))
            spoiled = [i for i, b in enumerate(out) if not is_finite(b["kernel"])]
            near = [i for i in range(5) if abs(i - bad) <= radius]
            assert bad in spoiled
            if name == "alike window":
                assert set(spoiled) <= set(near), name
            else:
                assert spoiled == near, name
                assert all(is_finite(b["other"]) for b in out), name


@by_layout
def test_norms_of_blocks_spread_a_nan_to_other_roles_of_the_neighbors(layout):
    blocks = blocks_for(layout)
    blocks[3]["kernel"][0, 1] = np.nan
    for operator, how in (
        (gs.window(0.3), VARIANTS[2]),
        (gs.window(0.3), VARIANTS[4]),
    ):
        kwargs = {"variant": how[0], "norm_scope": how[1]}
        out = smoothed(layout, blocks, operator, **kwargs)
        for role in blocks[0]:
            spoiled = [i for i, block in enumerate(out) if not is_finite(block[role])]
            assert spoiled == [2, 3, 4]


def is_finite(x):
    return np.isfinite(x).all()


# Nothing to smooth.


@pytest.mark.parametrize("num_layers", [0, 1])
def test_a_scan_of_no_or_one_layer_passes_through_as_the_same_objects(num_layers):
    tree = {"blocks": {"w": jnp.ones((num_layers, 4)), "b": jnp.ones(num_layers)}}
    for name in EVERY:
        if name == "layer scale" and num_layers:
            continue  # it scales a single layer, too
        for variant in ("standard", "directional"):
            tx = gs.smooth_over_depth(
                gs.scanned("blocks/"), make(name), variant=variant
            )
            out, _ = tx.update(tree, tx.init(tree))
            assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (out, tree))))


def test_models_of_stacks_of_one_layer_and_leaves_without_numbers_pass_through():
    one, none = jnp.ones((2, 3)), jnp.ones((0,))
    tree = {"encoder_0": {"w": one}, "decoder_0": {"w": one}, "head": jnp.ones(2)}
    empty = {f"layers_{i}": {"w": one, "empty": none} for i in range(3)}
    for name in EVERY:
        for variant in ("standard", "norm_preserving", "directional"):
            kwargs = {"variant": variant, "norm_scope": "block"}
            tx = gs.smooth_over_depth(
                gs.unrolled(r"coder_(\d+)/"), make(name), **kwargs
            )
            out, _ = tx.update(tree, tx.init(tree))
            assert name == "layer scale" or out["encoder_0"]["w"] is one
            assert out["head"] is tree["head"]
    for name in KINDS:
        tx = gs.smooth_over_depth(gs.unrolled(), make(name), norm_scope="block")
        with jax.debug_nans(True):
            out, _ = tx.update(empty, tx.init(empty))
        assert out["layers_1"]["empty"].shape == (0,)


# Gradients.


@core
@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
def test_gradients_by_the_strength_and_the_updates_are_finite_and_right(variant):
    def loss(alpha, u):
        tx = gs.smooth_over_depth(gs.scanned("blocks"), alpha, variant=variant)
        return jnp.mean(tx.update({"blocks": u}, tx.init({}))[0]["blocks"])

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    u = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    u[2] = 0  # a layer of norm 0
    for alpha in (0.0, 0.3):
        _, want = gradients(alpha, u)
        for scale in (1e-30, 1.0, 1e30):
            by_alpha, by_updates = gradients(alpha, np.float32(scale) * u)
            assert jnp.isfinite(by_alpha)
            if variant != "directional" or scale == 1:  # else ‖u‖² is out of range
                # They are those of updates of another size.
                np.testing.assert_allclose(by_updates, want, rtol=1e-4, atol=1e-6)
        step = 1e-3
        wide = np.float32(1.0) * u
        by_hand = (loss(alpha + 2 * step, wide) - loss(alpha, wide)) / (2 * step)
        found = gradients(alpha + step, wide)[0]
        np.testing.assert_allclose(found, by_hand, rtol=2e-2, atol=2e-4)


def test_gradients_through_similarity_are_finite_where_nothing_is_coupled():
    stack = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])

    def loss(stack, sharpness):
        operator = gs.similarity_window(0.5, "param", sharpness)
        tx = gs.smooth_over_depth(gs.scanned("blocks"), operator)
        return jnp.sum(tx.update({"blocks": stack}, tx.init({}))[0]["blocks"] ** 2)

    with jax.debug_nans(True):
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss, (0, 1)))(stack, 0.5))


def test_the_gradient_through_smoothing_is_the_transposed_matrix():
    matrix = np.random.default_rng(0).normal(size=(5, 5))
    tx = gs.smooth_over_depth(gs.scanned("blocks"), gs.dense(matrix))
    weights, u = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)

    def loss(u):
        return jnp.sum(weights * tx.update({"blocks": u}, tx.init({}))[0]["blocks"])

    found = jax.jit(jax.grad(loss))(u)
    np.testing.assert_allclose(found, matrix.T @ weights, rtol=1e-5, atol=1e-6)
