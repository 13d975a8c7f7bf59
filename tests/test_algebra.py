"""What a user may rely on algebraically, and the operators as values."""

import contextlib
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

VARIANTS = ("standard", "norm_preserving", "directional")
NORM_SCOPES = ("param", "block")
DTYPES = (jnp.float16, jnp.bfloat16, np.float32, np.float64)
SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled()


def step(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def smoother(alpha=0.3, radius=1, **kwargs):
    tx = gs.smooth_over_depth(SCANNED, gs.window(alpha, radius), **kwargs)
    return lambda stack: step(tx, {"blocks": {"w": stack}})["blocks"]["w"]


def stack(seed=0, shape=(6, 2, 3)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ulps_apart(a, b):
    """Of two arrays of equal dtype and signs."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    view = np.dtype(f"i{a.dtype.itemsize}")
    distance = np.abs(a.view(view).astype(np.int64) - b.view(view).astype(np.int64))
    return int(np.max(distance))


# Constants.


def constant_trees(dtype, num_layers=5):
    layer = oracle.random_blocks(1, dtype)[0]
    blocks = [layer] * num_layers
    yield SCANNED, {"blocks": oracle.stacked_tree(blocks)}
    yield UNROLLED, oracle.unrolled_tree(blocks)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("variant", "norm_scope"),
    [("standard", "param"), ("norm_preserving", "param"), ("norm_preserving", "block")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_that_is_constant_over_depth_comes_back_bit_exact(
    dtype, variant, norm_scope, jit, enable_x64
):
    with enable_x64():
        for depth, tree in constant_trees(dtype):
            tree = jax.tree.map(jnp.asarray, tree)
            tx = gs.smooth_over_depth(
                depth, 0.3, variant=variant, norm_scope=norm_scope
            )
            update = jax.jit(tx.update) if jit else tx.update
            out, _ = update(tree, tx.init(tree))
            chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
            chex.assert_trees_all_equal(out, tree)


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_bit_exact_at_any_strength_and_radius(
    dtype, radius, alpha, enable_x64
):
    with enable_x64():
        for depth, tree in constant_trees(dtype):
            operator = gs.window(alpha, radius=radius)
            out = step(gs.smooth_over_depth(depth, operator), tree)
            chex.assert_trees_all_equal(out, tree)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_other_way_keeps_constants_within_two_ulp(dtype, norm_scope, enable_x64):
    matrix = oracle.window_matrix(5, 0.3, 2, 0.4)
    with enable_x64():
        for depth, tree in constant_trees(dtype):
            transformations = [
                gs.smooth_over_depth(
                    depth, 0.3, variant="directional", norm_scope=norm_scope
                ),
                gs.smooth_over_depth(depth, gs.dense(matrix), norm_scope=norm_scope),
                gs.smooth_over_depth(depth, gs.window(0.3, radius=8, decay=0.3)),
            ]
            for tx in transformations:
                out = step(tx, tree)
                for got, want in zip(
                    jax.tree.leaves(out), jax.tree.leaves(tree), strict=True
                ):
                    assert ulps_apart(got, want) <= 2


# Linear algebra.


@pytest.mark.parametrize("radius", [1, 2, 8])
def test_the_sum_over_depth_is_conserved(radius):
    u = stack()
    out = smoother(radius=radius)(u)
    np.testing.assert_allclose(out.sum(0), u.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("radius", [1, 3])
def test_standard_smoothing_is_linear(radius):
    smooth, u, v = smoother(radius=radius), stack(1), stack(2)
    got = smooth(2.0 * u - 3.0 * v)
    np.testing.assert_allclose(got, 2.0 * smooth(u) - 3.0 * smooth(v), atol=3e-6)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("radius", [1, 3])
def test_smoothing_commutes_with_reversing_the_layers(radius, variant, norm_scope):
    smooth, u = smoother(radius=radius, variant=variant, norm_scope=norm_scope), stack()
    np.testing.assert_allclose(smooth(u[::-1]), smooth(u)[::-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scaling_the_update_scales_the_result(variant, norm_scope):
    smooth, u = smoother(variant=variant, norm_scope=norm_scope), stack()
    np.testing.assert_allclose(smooth(4.0 * u), 4.0 * smooth(u), rtol=1e-5)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_the_norm_of_every_layers_parameter_is_preserved(variant):
    u = stack()
    out = smoother(0.8, variant=variant)(u)
    assert oracle.relative_error(out, u) > 0.1
    before = np.linalg.norm(u.reshape(6, -1), axis=1)
    after = np.linalg.norm(out.reshape(6, -1), axis=1)
    np.testing.assert_allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_the_norm_of_every_block_is_preserved_but_not_that_of_its_parameters(variant):
    blocks = oracle.random_blocks(4)
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
    out = step(
        gs.smooth_over_depth(UNROLLED, 0.8, variant=variant, norm_scope="block"), tree
    )
    for layer, block in enumerate(blocks):
        new = out[f"layers_{layer}"]
        before = {r: np.linalg.norm(np.ravel(x)) for r, x in block.items()}
        after = {r: np.linalg.norm(np.ravel(x)) for r, x in new.items()}
        np.testing.assert_allclose(
            math.hypot(*after.values()), math.hypot(*before.values()), rtol=1e-6
        )
        assert abs(after["kernel"] - before["kernel"]) > 1e-3


def test_smoothing_shrinks_the_variation_over_depth():
    def variation(x):
        return float(jnp.sum(jnp.diff(x, axis=0) ** 2))

    u = stack()
    assert variation(smoother(0.2)(u)) < variation(u)


def test_the_gradient_through_smoothing_is_the_transposed_matrix():
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    tx = gs.smooth_over_depth(SCANNED, gs.dense(matrix))
    weights, u = stack(1, (3, 4)), stack(2, (3, 4))

    def loss(u):
        return jnp.sum(weights * step(tx, {"blocks": {"w": u}})["blocks"]["w"])

    np.testing.assert_allclose(
        jax.grad(loss)(u), matrix.T @ np.asarray(weights), rtol=1e-5
    )


# Nothing to do.


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)])
def test_alpha_zero_returns_the_same_objects(zero, variant, norm_scope):
    for depth, tree in constant_trees(np.float32):
        tree = jax.tree.map(jnp.asarray, tree)
        kwargs = {"variant": variant, "norm_scope": norm_scope}
        out = step(gs.smooth_over_depth(depth, zero, **kwargs), tree)
        leaves = zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in leaves)
        out = step(gs.smooth_over_depth(depth, gs.window(zero, 2), **kwargs), tree)
        leaves = zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in leaves)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_layer_and_unmatched_leaves_come_back_as_the_same_objects(
    variant, norm_scope
):
    tree = {
        "embed": {"embedding": stack(0, (5, 2))},
        "layers_0": {"w": stack(1, (2, 2)), "only_here": stack(3, (2,))},
        "layers_1": {"w": stack(2, (2, 2))},
        "alone": {"layers_0": {"w": stack(4, (2, 2))}},
        "blocks": {"w": stack(5, (1, 2, 2))},
    }
    depth = gs.first_match(gs.scanned("^blocks/"), gs.unrolled(r"layers_(\d+)/"))
    out = step(
        gs.smooth_over_depth(depth, 0.3, variant=variant, norm_scope=norm_scope), tree
    )
    assert out["embed"]["embedding"] is tree["embed"]["embedding"]
    assert out["layers_0"]["only_here"] is tree["layers_0"]["only_here"]
    assert out["alone"]["layers_0"]["w"] is tree["alone"]["layers_0"]["w"]
    assert out["blocks"]["w"] is tree["blocks"]["w"]
    assert out["layers_0"]["w"] is not tree["layers_0"]["w"]


def test_the_input_tree_is_not_modified():
    tree = oracle.unrolled_tree(oracle.random_blocks(3))
    copy = jax.tree.map(np.copy, tree)
    step(gs.smooth_over_depth(UNROLLED, 0.3, variant="directional"), tree)
    chex.assert_trees_all_equal(tree, copy)


# Operators as values.


@pytest.mark.parametrize("decay", [None, 0.0, 0.6])
@pytest.mark.parametrize("radius", [1, 2, 3, 8])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 12])
def test_the_windows_matrix_is_symmetric_and_doubly_stochastic(
    num_layers, radius, decay
):
    matrix = gs.window(0.4, radius=radius, decay=decay).matrix(num_layers)
    assert isinstance(matrix, np.ndarray)
    assert matrix.dtype == np.float64
    assert matrix.shape == (num_layers, num_layers)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    np.testing.assert_allclose(matrix.sum(0), 1.0, rtol=1e-14)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-14)
    expected = oracle.window_matrix(num_layers, 0.4, radius, decay)
    np.testing.assert_allclose(matrix, expected, atol=1e-15)


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(0.4),
        gs.window(1.0, radius=5, decay=0.1),
        gs.operator_fn(lambda n: 0.5 * np.eye(n)),
    ],
    ids=["window", "wide window", "operator_fn"],
)
def test_a_single_layer_has_the_matrix_one(operator):
    np.testing.assert_array_equal(operator.matrix(1), [[1.0]])


def test_a_dense_operators_matrix_is_the_given_one():
    given = np.arange(9.0).reshape(3, 3)
    operator = gs.dense(given)
    np.testing.assert_array_equal(operator.matrix(3), given)
    given[:] = 0.0  # A copy is held ...
    with contextlib.suppress(ValueError):
        operator.matrix(3)[:] = 0.0  # ... and cannot be written to.
    np.testing.assert_array_equal(operator.matrix(3), np.arange(9.0).reshape(3, 3))
    nested = gs.dense([[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(nested.matrix(2), np.full((2, 2), 0.5))


def average(num_layers):
    return np.full((num_layers, num_layers), 1 / num_layers)


def jax_average(num_layers):
    return jnp.full((num_layers, num_layers), 1 / num_layers)


@pytest.mark.parametrize("function", [average, jax_average])
def test_a_users_function_of_the_number_of_layers_is_an_operator(function):
    blocks = oracle.random_blocks(4)
    expected = oracle.smooth(blocks, average, "norm_preserving", "block")
    tree = jax.tree.map(jnp.asarray, {"blocks": oracle.stacked_tree(blocks)})
    operator = gs.operator_fn(function)
    out = step(
        gs.smooth_over_depth(
            SCANNED, operator, variant="norm_preserving", norm_scope="block"
        ),
        tree,
    )
    oracle.assert_blocks_close(oracle.unstacked(out["blocks"]), expected)
    np.testing.assert_allclose(operator.matrix(3), average(3), rtol=1e-7)


def test_a_users_function_gets_the_length_of_every_run():
    lengths = []

    def reverse(num_layers):
        lengths.append(num_layers)
        return np.eye(num_layers)[::-1]

    tree = {
        "a": {f"layers_{i}": {"w": stack(i, (2,))} for i in range(3)},
        "b": {f"layers_{i}": {"w": stack(i, (2,))} for i in (0, 1, 4)},
    }
    operator = gs.operator_fn(reverse)
    out = step(gs.smooth_over_depth(gs.unrolled(), operator, strict=False), tree)
    assert set(lengths) - {1} == {2, 3}
    np.testing.assert_allclose(out["a"]["layers_0"]["w"], tree["a"]["layers_2"]["w"])
    np.testing.assert_allclose(out["b"]["layers_0"]["w"], tree["b"]["layers_1"]["w"])
    assert out["b"]["layers_4"]["w"] is tree["b"]["layers_4"]["w"]


def operators():
    return [
        gs.window(0.1),
        gs.window(0.2),
        gs.window(0.1, radius=2),
        gs.window(0.1, radius=2, decay=0.5),
        gs.dense(np.eye(3)),
        gs.dense(np.eye(4)),
        gs.dense(np.full((3, 3), 1 / 3)),
        gs.operator_fn(average),
        gs.operator_fn(jax_average),
    ]


def test_operators_are_equal_by_value_and_hashable():
    for i, a in enumerate(operators()):
        for j, b in enumerate(operators()):
            assert (a == b) == (i == j)
            if i == j:
                assert hash(a) == hash(b)
    assert gs.window(0.1) == gs.window(0.1, radius=1, decay=None)
    assert gs.dense(np.eye(2)) == gs.dense([[1.0, 0.0], [0.0, 1.0]])
    assert gs.window(0.1) != "window"
    assert len(set(operators() + operators())) == len(operators())


@pytest.mark.parametrize("operator", operators(), ids=lambda op: type(op).__name__)
def test_operators_survive_pickling_and_are_not_callable(operator):
    assert not callable(operator)
    again = pickle.loads(pickle.dumps(operator))
    assert again == operator
    assert hash(again) == hash(operator)
    size = 4 if operator == gs.dense(np.eye(4)) else 3
    np.testing.assert_array_equal(again.matrix(size), operator.matrix(size))


@pytest.mark.parametrize("operator", operators(), ids=lambda op: type(op).__name__)
def test_operators_are_frozen(operator):
    for name in ("alpha", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(operator, name, 0.5)


def test_a_schedule_in_an_operator_is_resolved_at_a_count():
    operator = gs.window(lambda count: 0.1 * (count + 1), radius=2)
    for count in (0, 3):
        np.testing.assert_allclose(
            operator.at(count).matrix(4),
            oracle.window_matrix(4, 0.1 * (count + 1), 2),
            rtol=1e-6,
        )
    constant = gs.window(0.3)
    np.testing.assert_array_equal(constant.at(7).matrix(4), constant.matrix(4))
    np.testing.assert_array_equal(gs.dense(np.eye(2)).at(1).matrix(2), np.eye(2))


def test_a_traced_strength_gives_a_traced_matrix():
    matrix = jax.jit(lambda alpha: gs.window(alpha, radius=2).matrix(5))(0.3)
    np.testing.assert_allclose(matrix, oracle.window_matrix(5, 0.3, 2), atol=1e-7)


def test_a_number_an_array_and_a_schedule_are_strengths_of_the_window():
    u = {"blocks": {"w": stack()}}
    windowed = step(gs.smooth_over_depth(SCANNED, gs.window(0.2)), u)
    for strength in (0.2, np.float64(0.2), jnp.float32(0.2), lambda count: 0.2):
        out = step(gs.smooth_over_depth(SCANNED, operator=strength), u)
        chex.assert_trees_all_equal(out, windowed)


@gs.operator_fn
def decorated(num_layers):
    return np.full((num_layers, num_layers), 1 / num_layers)


def test_a_decorated_operator_can_be_pickled():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


def test_a_dense_operator_stays_read_only_when_pickled():
    operator = pickle.loads(pickle.dumps(gs.dense(np.eye(2))))
    with pytest.raises(ValueError, match="read-only"):
        operator.matrix(2)[0, 0] = 2.0


def test_a_window_does_not_follow_an_array_that_is_written_to():
    alpha = np.array(0.1)
    operator = gs.window(alpha)
    alpha[...] = 0.9
    assert operator == gs.window(0.1)
    assert hash(operator) == hash(gs.window(0.1))
