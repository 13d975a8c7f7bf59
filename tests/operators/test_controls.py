"""The controls of an experiment, and what the theory says of the operators."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import contraction_factor


def smooth(stack, operator, **kwargs):
    updates = {"blocks": {"w": jnp.asarray(stack, jnp.float32)}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), operator, **kwargs)
    return np.asarray(tx.update(updates, tx.init(updates))[0]["blocks"]["w"])


def random_stack(num_layers=6, seed=0):
    return np.random.default_rng(seed).normal(size=(num_layers, 4))


# Norm-matched.


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(0.5),
        gs.laplacian(0.5),
        gs.similarity_window(0.5),
        gs.mean_over_depth(),
    ],
    ids=str,
)
def test_norm_matched_gives_each_update_the_norm_and_no_direction_of_the_other(
    operator,
):
    u = random_stack()
    matched = smooth(u, gs.controls.norm_matched(operator))
    wanted = np.linalg.norm(smooth(u, operator), axis=1)
    direction = u / np.linalg.norm(u, axis=1, keepdims=True)
    np.testing.assert_allclose(matched, wanted[:, None] * direction, rtol=1e-4)
    # Where the norms are kept anyway it changes nothing.
    for variant in ("norm_preserving", "directional"):
        out = smooth(u, gs.controls.norm_matched(operator), variant=variant)
        np.testing.assert_allclose(out, u, rtol=1e-5)


def test_norm_matched_per_block_scales_all_parameters_of_a_layer_alike():
    blocks = oracle.random_blocks(4)
    tree = jax.tree.map(jnp.asarray, {"blocks": oracle.stacked_tree(blocks)})
    operator = gs.controls.norm_matched(gs.window(0.6))
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), operator, norm_scope="block")
    out = oracle.unstacked(tx.update(tree, tx.init(tree))[0]["blocks"])
    want = oracle.norm_matched(blocks, lambda b: oracle.window(b, 0.6), "block")
    oracle.assert_blocks_close(out, want)
    for got, block in zip(out, blocks, strict=True):
        factors = [np.ravel(x / block[role]) for role, x in got.items()]
        assert np.ptp(np.concatenate(factors)) < 1e-5


def test_norm_matched_leaves_a_zero_update_at_zero_and_follows_one_that_cancels():
    u = np.array([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]])
    with jax.debug_nans(True):
        matched = smooth(u, gs.controls.norm_matched(gs.window(1.0)))
        cancels = smooth(u[2:], gs.controls.norm_matched(gs.window(1.0)))
    np.testing.assert_array_equal(matched[1], [0.0, 0.0])
    np.testing.assert_array_equal(cancels, np.zeros((2, 2)))
    # Also beside one whose squares overflow.
    huge = smooth([[1.0], [0.0], [1e20]], gs.controls.norm_matched(gs.window(0.3)))
    np.testing.assert_array_equal(huge[1], [0.0])


# Shuffled.


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5, 6, 12, 24])
def test_shuffled_couples_no_neighbors_where_there_is_such_an_order(num_layers):
    kept = {2: 1, 3: 1}.get(num_layers, 0)
    for seed in range(20):
        marks = gs.dense(np.diag(np.arange(num_layers, dtype=float)))
        order = np.diag(gs.controls.shuffled(marks, seed).matrix(num_layers)).astype(
            int
        )
        assert sorted(order) == list(range(num_layers))
        for operator in (gs.window(0.5), gs.ema(0.3)):
            matrix = operator.matrix(num_layers)
            shuffled = gs.controls.shuffled(operator, seed).matrix(num_layers)
            np.testing.assert_array_equal(shuffled, matrix[np.ix_(order, order)])
        window = gs.controls.shuffled(gs.window(0.5), seed).matrix(num_layers)
        assert np.count_nonzero(np.diag(window, 1)) == kept


def test_a_shuffle_is_the_same_at_every_step_and_another_for_another_seed():
    first, again, other = (
        gs.controls.shuffled(gs.window(0.5), seed).matrix(12) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    u = random_stack(12)
    out = smooth(u, gs.controls.shuffled(gs.window(0.5), 0))
    np.testing.assert_allclose(out, first @ u, atol=1e-6)


def test_the_mean_over_depth_gives_every_layer_the_mean_of_its_run():
    updates = {f"layers_{i}": {"w": jnp.full((2,), float(i))} for i in (0, 1, 2, 6, 7)}
    tx = gs.smooth_over_depth(gs.unrolled(), gs.mean_over_depth(), strict=False)
    out = tx.update(updates, tx.init(updates))[0]
    means = {i: float(out[f"layers_{i}"]["w"][0]) for i in (0, 1, 2, 6, 7)}
    assert means == pytest.approx({0: 1, 1: 1, 2: 1, 6: 6.5, 7: 6.5})


# Contraction of the differences between layers.


def differences(num_layers):
    return np.diff(np.eye(num_layers), axis=0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("num_layers", [2, 3, 5, 12])
def test_the_windows_contraction_factor_is_its_closed_form_and_that_of_an_svd(
    num_layers, alpha
):
    factor = contraction_factor(gs.window(alpha), num_layers)
    assert isinstance(factor, float)
    matrix = oracle.window_matrix(num_layers, alpha)
    # D S D⁺ in the coordinates of the differences: S on the steps of a staircase.
    stairs = np.tril(np.ones((num_layers, num_layers)), -1)[:, : num_layers - 1]
    steps = differences(num_layers) @ matrix @ stairs
    svd = np.linalg.svd(steps, compute_uv=False)[0]
    assert factor == pytest.approx(svd, rel=1e-12, abs=1e-12)
    closed_form = 1 - alpha * (1 - math.cos(math.pi / num_layers))
    assert factor == pytest.approx(closed_form, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "operator",
    [gs.ema(0.6), gs.gaussian(1.5), gs.tikhonov(2.0), gs.repeat(gs.window(0.4), 3)],
    ids=str,
)
def test_no_update_is_contracted_less_than_the_factor_says_and_one_is_as_much(operator):
    matrix, d = operator.matrix(6), differences(6)
    factor = contraction_factor(operator, 6)

    def ratio(u):
        return np.linalg.norm(d @ matrix @ u) / np.linalg.norm(d @ u)

    ratios = [ratio(u) for u in np.random.default_rng(0).normal(size=(200, 6))]
    assert max(ratios) <= factor * (1 + 1e-12)
    worst = np.linalg.svd(d @ matrix @ np.linalg.pinv(d))[2][0]
    assert ratio(np.linalg.pinv(d) @ worst) == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize(
    ("operator", "num_layers", "factor"),
    [
        # Of one layer and of the mean there are no differences.
        *((operator(0.3), 1, 0.0) for operator in (gs.window, gs.laplacian, gs.ema)),
        (gs.mean_over_depth(), 5, 0.0),
        # What changes nothing contracts nothing.
        (gs.window(0.0), 5, 1.0),
        (gs.dense(np.eye(5)), 5, 1.0),
        (gs.operator_fn(np.eye), 5, 1.0),
        (gs.operator_fn(lambda n: 2 * np.eye(n)), 4, 2.0),
        # Where constants are not kept nothing is divided by nothing.
        (gs.laplacian(0.2), 4, math.inf),
        (gs.compose(gs.ema(0.5), gs.laplacian(0.2)), 4, math.inf),
        (gs.operator_fn(lambda n: np.diag(np.arange(1.0, n + 1))), 4, math.inf),
        # Another constant is a constant.
        (gs.laplacian(0.2), 2, 1.0),
    ],
)
def test_the_contraction_factor_at_its_ends(operator, num_layers, factor):
    found = contraction_factor(operator, num_layers)
    assert found == pytest.approx(factor, rel=1e-12, abs=1e-12)


def test_the_contraction_factor_takes_strengths_and_functions_in_float32():
    expected = contraction_factor(gs.window(0.1), 5)
    for operator in (
        gs.window(jnp.float32(0.1)),
        gs.operator_fn(gs.window(jnp.float32(0.1)).matrix),
        gs.window(lambda count: 0.1).at(0),
    ):
        assert contraction_factor(operator, 5) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TypeError, match="schedule"):
        contraction_factor(gs.window(lambda count: 0.1), 5)


# The theory.

ALPHAS = st.floats(0.01, 1.0)


def smoothers():
    """Those of which it is promised that they never add roughness."""
    return st.one_of(
        st.builds(
            gs.window,
            ALPHAS,
            st.integers(1, 9),
            st.none() | st.floats(0.0, 5.0),
        ),
        st.builds(gs.gaussian, st.floats(0.1, 5.0), st.none() | st.integers(1, 9)),
        st.builds(gs.tikhonov, st.floats(0.01, 100.0)),
    )


def roughness(u):
    return np.sum(np.diff(u, axis=0) ** 2)


def relative_roughness(u):
    return roughness(u) / np.sum(u**2)


@hypothesis.given(smoothers(), st.integers(2, 12), st.integers(0, 99))
def test_smoothing_never_adds_roughness(operator, num_layers, seed):
    u = np.random.default_rng(seed).normal(size=(num_layers, 2))
    matrix = operator.matrix(num_layers)
    assert roughness(matrix @ u) <= roughness(u) * (1 + 1e-12)
    assert contraction_factor(operator, num_layers) <= 1 + 1e-12


@hypothesis.given(st.floats(0.01, 0.5), st.integers(2, 12), st.integers(0, 99))
def test_a_window_up_to_a_half_never_adds_roughness_relative_to_the_update(
    alpha, num_layers, seed
):
    u = np.random.default_rng(seed).normal(size=(num_layers, 2))
    after = gs.window(alpha).matrix(num_layers) @ u
    assert relative_roughness(after) <= relative_roughness(u) * (1 + 1e-12)


@hypothesis.given(ALPHAS, st.integers(2, 12))
def test_the_windows_eigenvalues_are_above_one_minus_twice_alpha(alpha, num_layers):
    eigenvalues = np.linalg.eigvalsh(gs.window(alpha).matrix(num_layers))
    assert eigenvalues[0] > 1 - 2 * alpha
    assert eigenvalues[-1] == pytest.approx(1.0, rel=1e-12)
    assert eigenvalues[-2] < 1.0


def test_relative_roughness_may_grow_in_wider_or_stronger_windows():
    waves = np.linalg.eigh(differences(8).T @ differences(8))[1].T
    pairs = itertools.combinations(waves, 2)
    candidates = [a + t * b for a, b in pairs for t in (0.3, 1.0, 3.0)]
    for operator, may_grow in (
        (gs.window(1.0), True),
        (gs.window(0.8), True),
        (gs.window(0.5, 3), True),
        (gs.gaussian(1.5, radius=1), True),
        (gs.window(0.5), False),
    ):
        matrix = operator.matrix(8)
        grows = [
            relative_roughness(matrix @ u) > relative_roughness(u) * (1 + 1e-6)
            for u in candidates
        ]
        assert any(grows) == may_grow


def test_other_operators_and_variants_may_add_roughness():
    # What couples other layers than neighbors,
    factors = [
        contraction_factor(gs.controls.shuffled(gs.window(0.5), seed), 8)
        for seed in range(5)
    ]
    assert max(factors) > 1.0
    # what sharpens,
    constant = np.ones((4, 1))
    assert roughness(smooth(constant, gs.laplacian(0.5))) > roughness(constant)
    # what rescales,
    for variant, u in (
        ("norm_preserving", [[0.0, -1.0], [-1.0, 7.0], [0.0, 0.0]]),
        ("directional", [[-2.0, 1.0], [2.0, 0.0], [5.0, -3.0]]),
    ):
        rescaled = smooth(u, gs.window(1.0), variant=variant)
        assert roughness(rescaled) > 1.5 * roughness(np.array(u))
    # and where a layer follows the one that it resembles, away from the other.
    u = np.array([[1.0, -1.0], [1.0, 0.0], [0.0, 10.0]])
    assert roughness(smooth(u, gs.similarity_window(1.0))) > 1.05 * roughness(u)
