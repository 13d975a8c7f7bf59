"""Every operator: its matrix, its value, and that one code serves them all."""

import dataclasses
import functools
import math
import os
import pickle
import re
import subprocess
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

SCANNED = gs.scanned("blocks/")


def step(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class TowardsMean(gs.Operator):  # A user's own, in five lines.
    weight: Any
    strengths = ("weight",)

    def matrix(self, num_layers):
        mean = np.full((num_layers, num_layers), 1 / num_layers, np.float32)
        eye = np.eye(num_layers, dtype=np.float32)
        return eye + self.weight * (mean - eye)


def two_steps_back(num_layers):
    """Neither symmetric nor of rows that sum to 1."""
    return 0.5 * np.eye(num_layers) + 0.25 * np.eye(num_layers, k=-2)


def towards_mean(n, weight):
    return (1 - weight) * np.eye(n) + weight * np.full((n, n), 1 / n)


def permuted(n, matrix):
    """In the order that `shuffled(..., seed=3)` draws, read off a diagonal."""
    given = gs.dense(np.diag(np.arange(1.0, n + 1)))
    order = np.diag(gs.controls.shuffled(given, 3).matrix(n)).astype(int) - 1
    return matrix[np.ix_(order, order)] if n > 1 else matrix


class Linear(NamedTuple):
    make: Any  # strength -> operator
    matrix: Any  # (num_layers, strength) -> S, from a plain formula


LINEAR = {
    "window": Linear(gs.window, oracle.window_matrix),
    "wide window": Linear(
        lambda a: gs.window(a, 3, decay=0.5),
        lambda n, a: oracle.window_matrix(n, a, 3, 0.5),
    ),
    "decaying window": Linear(
        lambda d: gs.window(0.4, 8, decay=d),
        lambda n, d: oracle.window_matrix(n, 0.4, 8, d),
    ),
    "laplacian": Linear(gs.laplacian, oracle.laplacian_matrix),
    "ema": Linear(gs.ema, lambda n, rho: oracle.ema_matrix(n, rho, reverse=False)),
    "reverse ema": Linear(
        lambda rho: gs.ema(rho, reverse=True),
        lambda n, rho: oracle.ema_matrix(n, rho, reverse=True),
    ),
    "gaussian": Linear(
        lambda s: gs.gaussian(s, radius=2), lambda n, s: oracle.gaussian_matrix(n, s, 2)
    ),
    "wide gaussian": Linear(
        lambda s: gs.compose(gs.gaussian(s, radius=9), gs.gaussian(2.0)),
        lambda n, s: (
            oracle.gaussian_matrix(n, 2.0, 6) @ oracle.gaussian_matrix(n, s, 9)
        ),
    ),
    "tikhonov": Linear(gs.tikhonov, oracle.tikhonov_matrix),
    "mean": Linear(
        lambda a: gs.compose(gs.window(a), gs.mean_over_depth()),
        lambda n, a: np.full((n, n), 1 / n),
    ),
    "compose": Linear(
        lambda a: gs.compose(
            gs.ema(a), gs.laplacian(0.3), gs.operator_fn(two_steps_back)
        ),
        lambda n, a: (
            (two_steps_back(n) if n > 1 else np.eye(1))
            @ oracle.laplacian_matrix(n, 0.3 if n > 1 else 0.0)
            @ oracle.ema_matrix(n, a, reverse=False)
        ),
    ),
    "repeat": Linear(
        lambda a: gs.repeat(gs.window(a), 5),
        lambda n, a: np.linalg.matrix_power(oracle.window_matrix(n, a), 5),
    ),
    "shuffled": Linear(
        lambda a: gs.controls.shuffled(gs.ema(a), 3),
        lambda n, a: permuted(n, oracle.ema_matrix(n, a, reverse=False)),
    ),
    "subclass": Linear(TowardsMean, towards_mean),
    "function": Linear(
        lambda a: gs.operator_fn(lambda n: TowardsMean(a).matrix(n)), towards_mean
    ),
}
EXACT = [name for name in LINEAR if name not in ("subclass", "function")]
# A function of ours closes over its strength.
SCHEDULED = [name for name in LINEAR if name != "function"]


def plain(name, num_layers, strength):
    if num_layers == 1:
        return np.ones((1, 1))
    return LINEAR[name].matrix(num_layers, strength)


# Matrices.


@pytest.mark.parametrize("name", EXACT)
def test_the_matrix_is_the_plain_formula_in_float64(name):
    for num_layers in (1, 2, 3, 7, 12):
        for strength in (0.0, 0.3, np.float64(0.7), 1):
            matrix = LINEAR[name].make(strength).matrix(num_layers)
            assert isinstance(matrix, np.ndarray)
            assert matrix.dtype == "float64"
            expected = plain(name, num_layers, float(strength))
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize("name", LINEAR)
def test_a_single_layer_has_the_matrix_one(name):
    matrix = LINEAR[name].make(0.3).matrix(1)
    np.testing.assert_allclose(matrix, [[1.0]], rtol=0, atol=1e-15)


def test_a_traced_strength_gives_the_same_matrix_in_at_least_float32(enable_x64):
    @jax.jit
    def matrices(strength):
        return {
            name: linear.make(strength).matrix(5) for name, linear in LINEAR.items()
        }

    def check(strength, dtype, bound):
        for name, matrix in matrices(strength).items():
            if name in EXACT:
                assert matrix.dtype == dtype, name
                error = np.max(np.abs(matrix - plain(name, 5, float(strength))))
                assert error <= bound, name

    for strength in (0.0, 0.3, 1.0):
        check(jnp.float32(strength), np.float32, 4e-7)
    check(jnp.asarray(0.3, jnp.bfloat16), np.float32, 4e-7)
    with enable_x64():
        check(jnp.float64(0.3), np.float64, 2e-15)


@pytest.mark.parametrize("name", LINEAR)
def test_no_weight_is_outside_the_band_that_an_operator_declares(name):
    operator = LINEAR[name].make(0.3)
    for num_layers in (2, 3, 12):
        inside = operator.offsets(num_layers)
        matrix = operator.matrix(num_layers)
        for offset in range(1 - num_layers, num_layers):
            if np.abs(np.diagonal(matrix, offset)).max() > 1e-12:
                assert offset in inside


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(1.0, 4, decay=2.0),
        gs.gaussian(0.4),
        gs.gaussian(30.0),
        gs.tikhonov(0.5),
        gs.tikhonov(1e6),
        gs.mean_over_depth(),
        gs.repeat(gs.gaussian(1.5), 7),
        gs.compose(gs.tikhonov(2.0), gs.window(0.5)),
        gs.controls.shuffled(gs.window(0.9), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_layers", [2, 5, 12])
def test_smoothers_keep_constants_and_the_sum_over_depth(operator, num_layers):
    matrix = operator.matrix(num_layers)
    assert matrix.min() > -1e-15
    np.testing.assert_allclose(matrix.sum(0), 1.0, rtol=1e-13)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-13)
    single = not isinstance(operator, type(gs.compose(gs.window(0.1))))
    if single:
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_ema_over_depth_runs_from_the_first_layer_visited(reverse):
    u = np.random.default_rng(0).normal(size=(6, 3))
    memory, expected = None, np.zeros_like(u)
    for layer in range(6)[::-1] if reverse else range(6):
        memory = u[layer] if memory is None else 0.7 * memory + 0.3 * u[layer]
        expected[layer] = memory
    np.testing.assert_allclose(gs.ema(0.7, reverse).matrix(6) @ u, expected, rtol=1e-14)
    assert gs.ema(0.7, reverse).matrix(6).sum(1) == pytest.approx(1.0, rel=1e-15)
    everywhere = np.repeat(u[-1:] if reverse else u[:1], 6, axis=0)
    np.testing.assert_array_equal(gs.ema(1.0, reverse).matrix(6) @ u, everywhere)


def test_tikhonov_solves_its_ridge_problem():
    u = np.random.default_rng(0).normal(size=8)
    smooth = gs.tikhonov(3.0).matrix(8) @ u
    difference = np.diff(np.eye(8), axis=0)
    gradient = (smooth - u) + 3.0 * difference.T @ (difference @ smooth)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-14)


def test_strong_smoothing_of_every_kind_becomes_the_mean():
    mean = gs.mean_over_depth().matrix(6)
    np.testing.assert_array_equal(mean, np.full((6, 6), 1 / 6))
    for operator in (gs.tikhonov(1e9), gs.repeat(gs.window(0.5), 10**4)):
        np.testing.assert_allclose(operator.matrix(6), mean, atol=1e-8)


def test_a_gaussian_reaches_three_sigma_unless_told_otherwise():
    for sigma, radius in ((0.1, 1), (1.0, 3), (1.2, 4), (np.float32(0.5), 2)):
        matrix = gs.gaussian(sigma).matrix(12)
        expected = oracle.gaussian_matrix(12, float(sigma), radius)
        np.testing.assert_allclose(matrix, expected, atol=1e-15)
        assert np.diagonal(matrix, radius).all()
        assert not np.diagonal(matrix, radius + 1).any()


@pytest.mark.parametrize("times", [1, 2, 3, 6, 7, 64])
def test_repeating_is_the_power_of_the_matrix(times):
    for operator in (gs.ema(0.6), gs.laplacian(0.3), gs.operator_fn(two_steps_back)):
        matrix = gs.repeat(operator, times).matrix(6)
        base = gs.compose(operator).matrix(6)
        expected = functools.reduce(np.matmul, [base] * times)
        np.testing.assert_allclose(matrix, expected, rtol=1e-12, atol=1e-16)


def test_the_first_operator_of_a_composition_is_applied_first():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 4))
    composed = gs.compose(gs.dense(first), gs.dense(second))
    np.testing.assert_allclose(composed.matrix(4), second @ first, rtol=1e-14)
    u = {"blocks": {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))}}
    at_once = step(gs.smooth_over_depth(SCANNED, composed), u)
    in_turn = step(
        optax.chain(
            gs.smooth_over_depth(SCANNED, gs.dense(first)),
            gs.smooth_over_depth(SCANNED, gs.dense(second)),
        ),
        u,
    )
    chex.assert_trees_all_close(at_once, in_turn, rtol=1e-5)


@pytest.mark.parametrize("name", ["repeat", "compose", "wide gaussian"])
def test_powers_and_compositions_are_one_product_with_the_updates(name):
    # As nested shifts they would round, and read all updates, once for each factor.
    tx = gs.smooth_over_depth(SCANNED, LINEAR[name].make(0.3))
    jaxpr = jax.make_jaxpr(lambda u: step(tx, u))({"blocks": {"w": jnp.ones((12, 3))}})
    primitives = [equation.primitive.name for equation in jaxpr.jaxpr.eqns]
    assert primitives.count("dot_general") == 1
    assert "pad" not in primitives


def test_a_traced_matrix_of_any_dtype_is_multiplied_in_float32():
    @jax.jit
    def matrices(values):
        dense = gs.dense(values)
        return gs.compose(dense, gs.window(0.3)).matrix(2), gs.repeat(dense, 3).matrix(
            2
        )

    window = oracle.window_matrix(2, 0.3)
    for dtype in (jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32):
        composed, repeated = matrices(2 * jnp.eye(2, dtype=dtype))
        np.testing.assert_allclose(composed, 2 * window, rtol=3e-7)
        np.testing.assert_array_equal(repeated, 8 * np.eye(2))


def test_the_derivative_of_a_matrix_by_its_strength_is_finite_at_zero():
    @jax.jit
    def derivatives(strength):
        return {
            n: jax.jacfwd(lambda s, n=n: make(n, s).matrix(4))(strength) for n in LINEAR
        }

    chex.assert_tree_all_finite(derivatives(0.0))


def test_a_gaussian_of_hardly_any_width_changes_nothing():
    for sigma in (1e-200, 1e-3, np.float32(1e-30)):
        np.testing.assert_array_equal(gs.gaussian(sigma).matrix(4), np.eye(4))


# Values.


def values():
    return [
        gs.laplacian(0.1),
        gs.laplacian(0.2),
        gs.window(0.1),
        gs.window(0.1, decay=0.1),
        gs.ema(0.1),
        gs.ema(0.1, reverse=True),
        gs.gaussian(0.1),
        gs.gaussian(0.1, radius=2),
        gs.tikhonov(0.1),
        gs.mean_over_depth(),
        gs.compose(gs.ema(0.1)),
        gs.compose(gs.ema(0.1), gs.tikhonov(1)),
        gs.compose(gs.tikhonov(1), gs.ema(0.1)),
        gs.repeat(gs.ema(0.1), 1),
        gs.repeat(gs.ema(0.1), 2),
        gs.repeat(gs.operator_fn(two_steps_back), 2),
        gs.repeat(gs.dense(np.eye(3)), 2),
        gs.similarity_window(0.1),
        gs.similarity_window(0.1, "param"),
        gs.similarity_window(0.1, sharpness=2.0),
        gs.controls.norm_matched(gs.ema(0.1)),
        gs.controls.shuffled(gs.ema(0.1), 0),
        gs.controls.shuffled(gs.ema(0.1), 1),
        TowardsMean(0.1),
        TowardsMean(0.2),
    ]


def test_operators_are_equal_by_value_and_hashable():
    for i, a in enumerate(values()):
        for j, b in enumerate(values()):
            assert (a == b) == (i == j), (a, b)
    assert len({*values(), *values()}) == len(values())
    assert gs.gaussian(1.0) == gs.gaussian(1.0, radius=3)
    assert gs.window(1) == gs.window(1.0)
    # A number is the strength of a window wherever an operator is taken.
    assert gs.compose(gs.ema(0.5), 0.1) == gs.compose(gs.ema(0.5), gs.window(0.1))
    assert gs.repeat(0.5, 2) == gs.repeat(gs.window(0.5), 2)


@pytest.mark.parametrize("operator", values(), ids=lambda op: type(op).__name__)
def test_operators_are_frozen_picklable_and_not_callable(operator):
    assert not callable(operator)
    again = pickle.loads(pickle.dumps(operator))
    assert again == operator
    assert hash(again) == hash(operator)
    for name in (*(f.name for f in dataclasses.fields(operator)), "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(operator, name, 0.5)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_is_resolved_at_a_count(name):
    operator = LINEAR[name].make(lambda count: 0.1 * (count + 1))
    assert operator.scheduled
    for count in (0, 3):
        at = operator.at(count)
        assert not at.scheduled
        expected = plain(name, 4, 0.1 * (count + 1))
        np.testing.assert_allclose(at.matrix(4), expected, atol=2e-7)
    with pytest.raises(TypeError):
        operator.matrix(4)
    constant = LINEAR[name].make(0.3)
    assert not constant.scheduled
    assert constant.at(7) == constant


def test_every_strength_of_an_operator_may_be_a_schedule_of_its_own():
    def rising(count):
        return 0.1 * count

    u = {"blocks": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))}}
    makers = (
        lambda a, b: gs.window(a, 2, decay=b),
        lambda a, b: gs.similarity_window(a, sharpness=b),
        lambda a, b: gs.compose(gs.ema(a), gs.tikhonov(b)),
        lambda a, b: gs.repeat(gs.compose(gs.ema(0.5), gs.tikhonov(b)), 2),
        lambda a, b: gs.controls.norm_matched(gs.compose(gs.ema(a), gs.ema(b))),
    )

    @jax.jit
    def apply(states, constant):
        scheduled = [
            gs.smooth_over_depth(SCANNED, make(0.4, rising)).update(u, state)
            for make, state in zip(makers, states, strict=True)
        ]
        given = [
            step(gs.smooth_over_depth(SCANNED, make(0.4, constant)), u)
            for make in makers
        ]
        return *zip(*scheduled, strict=True), given

    states = [
        gs.smooth_over_depth(SCANNED, make(0.4, rising)).init(u) for make in makers
    ]
    assert all(isinstance(state, gs.DepthSmoothingState) for state in states)
    for count in range(3):
        outs, states, expected = apply(states, jnp.float32(0.1 * count))
        chex.assert_trees_all_close(list(outs), expected, atol=1e-6)
        states = list(states)


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(0.0, 3),
        gs.laplacian(0),
        gs.ema(np.float32(0)),
        gs.gaussian(0.0),
        gs.tikhonov(0.0),
        gs.compose(gs.ema(0.0), gs.window(0)),
        gs.repeat(gs.laplacian(0.0), 3),
        gs.similarity_window(0.0),
        gs.controls.norm_matched(gs.window(0.0)),
        gs.controls.shuffled(gs.ema(0.0), 1),
    ],
    ids=str,
)
def test_a_strength_of_zero_returns_the_same_objects(operator):
    u = {"blocks": {"w": jnp.ones((3, 2))}, "embed": jnp.ones(2)}
    for variant in ("standard", "directional"):
        out = step(gs.smooth_over_depth(SCANNED, operator, variant=variant), u)
        assert out["blocks"]["w"] is u["blocks"]["w"]
        assert out["embed"] is u["embed"]


# What is refused.


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (gs.laplacian, "alpha"),
        (gs.ema, "rho"),
        (gs.gaussian, "sigma"),
        (gs.tikhonov, "strength"),
        (lambda x: gs.window(0.1, decay=x), "decay"),
        (gs.similarity_window, "alpha"),
        (lambda x: gs.similarity_window(0.1, sharpness=x), "sharpness"),
    ],
)
def test_a_strength_out_of_range_or_of_the_wrong_kind_is_refused(make, argument):
    bounded = argument in ("alpha", "rho")
    for wrong in (-0.1, math.nan, math.inf, -1, np.float32(-0.5)) + (1.5,) * bounded:
        with pytest.raises(ValueError, match=rf"`{argument}`") as info:
            make(wrong)
        assert f"{float(wrong):g}" in str(info.value)
        assert ("between 0 and 1" if bounded else ">= 0") in str(info.value)
    for wrong in ("0.1", [0.1], True, 0.1j):
        with pytest.raises(TypeError, match=rf"`{argument}`") as info:
            make(wrong)
        assert type(wrong).__name__ in str(info.value)
    with pytest.raises(ValueError, match="scalar"):
        make(np.array([0.1, 0.2]))


@pytest.mark.parametrize("sigma", [lambda count: 1.0, jnp.float32(1.0)])
def test_a_gaussian_needs_a_radius_where_sigma_is_not_a_number(sigma):
    with pytest.raises(ValueError, match=r"`radius`.*`gaussian`") as info:
        gs.gaussian(sigma)
    assert "radius=3" in str(info.value)
    assert gs.gaussian(sigma, radius=3) is not None


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: gs.gaussian(1.0, radius=0), ValueError, "radius"),
        (lambda: gs.gaussian(1.0, radius=1.5), TypeError, "radius"),
        (
            lambda: gs.gaussian(1.0, jnp.asarray(2)),
            TypeError,
            'static_args=("radius",)',
        ),
        (lambda: gs.ema(0.5, reverse=1), TypeError, "reverse"),
        (lambda: gs.repeat(gs.ema(0.5), 0), ValueError, "times"),
        (lambda: gs.repeat(gs.ema(0.5), 1.0), TypeError, "times"),
        (lambda: gs.repeat(gs.ema(0.5), True), TypeError, "times"),
        (lambda: gs.compose(), TypeError, "at least one operator"),
        (lambda: gs.compose(gs.ema(0.5), "0.1"), TypeError, "window(0.1)"),
        (lambda: gs.compose(np.eye(3)), TypeError, "dense(matrix)"),
        (lambda: gs.controls.norm_matched("window"), TypeError, "operator"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), -1), TypeError, "seed"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), 0.5), TypeError, "seed"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), True), TypeError, "seed"),
        (lambda: gs.similarity_window(0.1, "layer"), ValueError, "'block'"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_a_dense_matrix_that_does_not_fit_names_the_run_wherever_it_is_used():
    u = {"blocks": {"w": jnp.ones((3, 2))}}
    for wrap in (
        lambda op: gs.compose(gs.ema(0.5), op),
        lambda op: gs.repeat(op, 2),
        lambda op: gs.controls.shuffled(op, 0),
        gs.controls.norm_matched,
    ):
        with pytest.raises(ValueError, match="layers 0 to 2") as info:
            step(gs.smooth_over_depth(SCANNED, wrap(gs.dense(np.eye(4)))), u)
        assert "run of 3" in str(info.value)
        assert "operator_fn" in str(info.value)


def test_a_subclass_with_a_matrix_of_the_wrong_shape_is_told_so():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Wrong(gs.Operator):
        def matrix(self, num_layers):
            return np.eye(num_layers + 1)

    with pytest.raises(ValueError, match=r"matrix\(3\).*\(4, 4\).*\(3, 3\)"):
        step(
            gs.smooth_over_depth(SCANNED, Wrong()), {"blocks": {"w": jnp.ones((3, 2))}}
        )


# The same code everywhere: every operator in every layout, variant and dtype.

EVERY = [*LINEAR, "norm_matched", "similarity per param", "similarity per block"]
VARIANTS = [
    ("standard", "param"),
    ("norm_preserving", "param"),
    ("norm_preserving", "block"),
    ("directional", "param"),
    ("directional", "block"),
]
DTYPES = ["float32", "bfloat16", "float64", "complex64"]
STRENGTH = 0.375


def make(name, strength=STRENGTH):
    if name == "norm_matched":
        return gs.controls.norm_matched(gs.ema(strength))
    if name == "similarity per param":
        return gs.similarity_window(strength, "param", sharpness=0.5)
    if name == "similarity per block":
        return gs.similarity_window(strength)
    return LINEAR[name].make(strength)


def expected_of(name, blocks, variant, norm_scope, ranked=False, strength=STRENGTH):
    """The plain loops."""

    def coupling(source):
        if name == "norm_matched":
            return oracle.norm_matched(
                source, lambda b: linear(b, "ema"), norm_scope, ranked
            )
        if name == "similarity per param":
            return oracle.similarity_window(source, strength, "param", 0.5, ranked)
        if name == "similarity per block":
            return oracle.similarity_window(source, strength, "block", 1.0, ranked)
        return linear(source, name)

    def linear(source, name):
        return oracle.smooth(source, lambda n: plain(name, n, strength), ranked=ranked)

    return oracle.couple(blocks, coupling, variant, norm_scope, ranked)


class Layout(NamedTuple):
    tree: Any  # blocks -> tree
    blocks: Any  # tree -> blocks
    depth: Any
    holes: tuple[int, ...] = ()
    strict: bool = True
    ranked: bool = False
    num_layers: int = 5  # More than 4 are a matmul for a wide operator, not shifts.


def on_axis(axis):
    def depth(path, leaf):
        return gs.Depth("blocks", path[-1], axis=min(axis, leaf.ndim - 1))

    return Layout(
        lambda blocks: oracle.stacked_tree(blocks, axis),
        lambda tree: oracle.unstacked(tree, axis),
        depth,
    )


UNROLLED = gs.unrolled()


def unrolled(depth=UNROLLED, **kwargs):
    return Layout(
        lambda blocks: {k: b for k, b in oracle.unrolled_tree(blocks).items() if b},
        lambda tree: [tree.get(f"layers_{layer}", {}) for layer in range(6)],
        depth,
        **kwargs,
    )


def cycles(blocks):
    """Two cycles of two layers, scanned on axis 1, and what remains."""
    tree = {
        f"position_{p}": {r: np.stack([x, blocks[p + 2][r]], 1) for r, x in b.items()}
        for p, b in enumerate(blocks[:2])
    }
    return {**tree, "rest_0": dict(blocks[4])}


def from_cycles(tree):
    blocks = [
        {r: np.asarray(x)[:, cycle] for r, x in tree[f"position_{p}"].items()}
        for cycle in range(2)
        for p in range(2)
    ]
    return [*blocks, tree["rest_0"]]


def nested(blocks):
    stacked = oracle.stacked_tree(blocks)
    return {r: x.reshape(3, 2, *x.shape[1:]) for r, x in stacked.items()}


def from_nested(tree):
    stacked = {r: np.asarray(x) for r, x in tree.items()}
    return oracle.unstacked({r: x.reshape(6, *x.shape[2:]) for r, x in stacked.items()})


ROLES = {"kernel": (2, 3), "bias": (3,)}
LAYOUTS = {
    "stacked on axis 0": on_axis(0),
    "unrolled": unrolled(),
    "stacked on axis 1": on_axis(1),
    "cycles and a remainder": Layout(
        cycles,
        from_cycles,
        gs.first_match(
            gs.scanned(r"position_(\d)/", axis=1, stride=2, stack="layers"),
            gs.unrolled(r"rest_(\d)/", start=4, stack="layers"),
        ),
    ),
    "stacked on axis 2": on_axis(2),
    "two runs with a gap": unrolled(holes=(3,), strict=False, num_layers=6),
    "nested scans": Layout(
        nested,
        from_nested,
        lambda path, leaf: gs.Depth("blocks", path[-1], axis=(0, 1)),
        num_layers=6,
    ),
    "ranked over a gap": unrolled(gs.ranked(gs.unrolled()), holes=(2,), ranked=True),
}


class Combination(NamedTuple):
    dtype: Any
    variant: str
    norm_scope: str
    traced: bool


def combinations():
    """Every operator in four layouts, which differ in variant, scope and dtype."""
    for i, name in enumerate(EVERY):
        for k in range(4):
            layout = list(LAYOUTS)[(i + k) % len(LAYOUTS)]
            dtype, variant = DTYPES[k % 4], VARIANTS[(2 * k + i) % 5]
            yield (
                (layout, name),
                Combination(dtype, *variant, traced=(i + k // 2) % 2 == 0),
            )


COMBINATIONS = dict(combinations())


@functools.cache
def blocks_of(layout, combination):
    _, _, _, holes, _, _, num_layers = LAYOUTS[layout]
    roles = ROLES if combination.norm_scope == "block" else {"kernel": (2, 3)}
    blocks = oracle.random_blocks(num_layers, "float32", roles, seed=1)
    # Some layers agree, some do not, and one is zero.
    for role in roles:
        blocks[1][role] = 0.5 * blocks[0][role]
        blocks[num_layers - 1][role] = 0.0 * blocks[0][role]
        if combination.dtype == "complex64":
            blocks = [{**b, role: b[role] * np.exp(0.3j)} for b in blocks]
    blocks = [{r: x.astype(combination.dtype) for r, x in b.items()} for b in blocks]
    return [{} if i in holes else b for i, b in enumerate(blocks)]


@functools.cache
def results_of(layout):
    """The updates of all operators in one layout: one compilation."""
    tree_of, _, depth, _, strict, _, _ = LAYOUTS[layout]
    chosen = {name: c for (at, name), c in COMBINATIONS.items() if at == layout}
    trees = {
        name: jax.tree.map(jnp.asarray, tree_of(blocks_of(layout, combination)))
        for name, combination in chosen.items()
    }

    @jax.jit
    def apply(trees, strength):
        results = {}
        for name, (dtype, variant, norm_scope, traced) in chosen.items():
            wide = strength.astype(jnp.float64) if dtype == "float64" else strength
            tx = gs.smooth_over_depth(
                depth,
                make(name, wide if traced else STRENGTH),
                variant=variant,
                norm_scope=norm_scope,
                strict=strict,
            )
            results[name] = step(tx, trees[name])
        return results

    results = apply(trees, jnp.float32(STRENGTH))
    chex.assert_trees_all_equal_shapes_and_dtypes(results, trees)
    return results


def test_the_combinations_cover_all_that_they_vary():
    for at in range(2):
        for key in {key[at] for key in COMBINATIONS}:
            met = [c for keys, c in COMBINATIONS.items() if keys[at] == key]
            assert {c.dtype for c in met} == set(DTYPES)
            variants = {(c.variant, c.norm_scope) for c in met}
            assert len(variants) >= (5 if at == 0 else 4)
            assert {c.traced for c in met} == {False, True}


@pytest.mark.parametrize(("layout", "name"), COMBINATIONS)
def test_every_operator_works_in_every_layout_variant_and_dtype(
    layout, name, enable_x64
):
    combination = COMBINATIONS[layout, name]
    dtype, variant, norm_scope, _ = combination
    blocks, ranked = blocks_of(layout, combination), LAYOUTS[layout].ranked
    expected = expected_of(name, blocks, variant, norm_scope, ranked)
    with enable_x64():
        result = LAYOUTS[layout].blocks(results_of(layout)[name])
    result = result[: len(blocks)]
    if name in ("subclass", "function") and dtype == "float64":
        # Ours compute their weights in float32.
        result = [{r: np.asarray(x, np.float32) for r, x in b.items()} for b in result]
    oracle.assert_blocks_close(result, expected)


# Every operator in every wrapper.


@pytest.mark.parametrize("name", EVERY)
def test_every_operator_works_in_every_wrapper(name):
    blocks = oracle.random_blocks(5, np.float32, {"kernel": (2, 3)})
    tree = jax.tree.map(jnp.asarray, {"blocks": oracle.stacked_tree(blocks)})

    def expected(strength):
        return expected_of(name, blocks, "standard", "param", strength=strength)

    def check(out, expected):
        oracle.assert_blocks_close(oracle.unstacked(out["blocks"]), expected)

    def factory(strength):
        return gs.smooth_over_depth(SCANNED, make(name, strength))

    injected = optax.inject_hyperparams(factory)(strength=0.25)

    @jax.jit
    def run(tree, state, strengths):
        def body(state, _):
            out, state = scheduled.update(tree, state)
            return state, out

        results = {"injected": injected.update(tree, state)[0]}
        if name != "function":
            scheduled = factory(lambda count: 0.25 * (count + 1))
            _, results["scan"] = jax.lax.scan(body, scheduled.init(tree), length=2)
        results["vmap"] = jax.vmap(lambda strength: step(factory(strength), tree))(
            strengths
        )
        return results

    state = injected.init(tree)
    strengths = jnp.array([0.125, 0.5])
    results = run(tree, state, strengths)
    check(results["injected"], expected(0.25))
    state.hyperparams["strength"] = jnp.float32(0.75)
    check(run(tree, state, strengths)["injected"], expected(0.75))
    for i, strength in enumerate((0.125, 0.5)):
        check(jax.tree.map(lambda x, i=i: x[i], results["vmap"]), expected(strength))
    for i in range(2) if "scan" in results else ():
        out = jax.tree.map(lambda x, i=i: x[i], results["scan"])
        check(out, expected(0.25 * (i + 1)))


def test_strengths_that_are_constants_of_a_compiled_sweep_are_right():
    @jax.jit
    def sweep():
        strengths = jnp.array([0.125, 0.5])
        return jax.vmap(lambda strength: gs.ema(strength).matrix(5))(strengths)

    for matrix, rho in zip(sweep(), (0.125, 0.5), strict=True):
        expected = oracle.ema_matrix(5, rho, reverse=False)
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


# Rounding and promotion.


def test_half_precision_is_a_round_trip_through_float32():
    blocks = oracle.random_blocks(5, jnp.bfloat16, {"kernel": (2, 3)})
    half = jax.tree.map(jnp.asarray, {"blocks": oracle.stacked_tree(blocks)})
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    @jax.jit
    def apply(updates):
        return {n: step(gs.smooth_over_depth(SCANNED, make(n)), updates) for n in EVERY}

    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), apply(single))
    results = apply(half)
    for name in EVERY:
        got, want = (
            np.asarray(out[name]["blocks"]["kernel"], np.float32)
            for out in (results, rounded)
        )
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_strict_promotion_is_respected_with_traced_strengths():
    blocks = oracle.random_blocks(5, jnp.bfloat16, ROLES)
    for block in blocks:
        block["bias"] = block["bias"].astype(np.float32)
    trees = {
        "stacked": {"blocks": oracle.stacked_tree(blocks)},
        "unrolled": oracle.unrolled_tree(blocks),
    }
    trees = jax.tree.map(jnp.asarray, trees)
    depths = {"stacked": SCANNED, "unrolled": gs.unrolled()}

    @jax.jit
    def apply(trees, strengths):
        return [
            step(
                gs.smooth_over_depth(depth, make(n, s), norm_scope="block"), trees[kind]
            )
            for n in EVERY
            for s in strengths
            if n not in ("subclass", "function") or s.dtype == jnp.float32
            for kind, depth in depths.items()
        ]

    strengths = [jnp.float32(0.3), jnp.asarray(0.3, jnp.bfloat16)]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(apply, trees, strengths)


# Devices.

_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import gradsmooth_optax as gs
import test_operators as t

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("depth", "model"))
sharding = NamedSharding(mesh, P("depth", None, "model"))
x = jax.random.normal(jax.random.key(0), (8, 2, 4))
step = jax.jit(lambda u: {
    name: t.step(gs.smooth_over_depth(t.SCANNED, t.make(name)), u) for name in t.EVERY
})
alone = step({"blocks": {"w": x}})
sharded = step({"blocks": {"w": jax.device_put(x, sharding)}})
for name in t.EVERY:
    out = sharded[name]["blocks"]["w"]
    np.testing.assert_allclose(
        out, alone[name]["blocks"]["w"], rtol=2e-6, atol=1e-6, err_msg=name
    )
    if out.sharding.is_equivalent_to(sharding, 3):
        print("kept by", name)
print("sharded depth is fine")
"""


@pytest.fixture(scope="module")
def sharded():
    # The number of devices is fixed when jax starts, hence a process of its own.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    command = [sys.executable, "-c", _SHARDED]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_operator_works_on_a_sharded_layer_axis(sharded):
    assert "sharded depth is fine" in sharded.stdout, sharded.stderr


def test_operators_of_a_narrow_band_keep_the_sharding(sharded):
    for name in (
        "window",
        "wide window",
        "laplacian",
        "gaussian",
        "similarity per block",
    ):
        assert f"kept by {name}\n" in sharded.stdout
