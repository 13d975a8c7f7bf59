"""The operators as values: their matrices, and what two of them have in common."""

import copy
import dataclasses
import functools
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from operator_table import (
    EVERY,
    OPERATORS,
    SCHEDULED,
    WITH_MATRIX,
    make,
    plain,
    two_steps_back,
)
from own_operators import TowardsMean

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

SCANNED = gs.scanned("blocks/")


def step(operator, updates, **kwargs):
    tx = gs.smooth_over_depth(SCANNED, operator, **kwargs)
    return tx.update(updates, tx.init(updates))[0]


# Matrices.


def test_the_matrix_is_the_plain_formula_in_float64():
    for name in WITH_MATRIX:
        for num_layers in (1, 2, 3, 7, 12):
            for strength in (0.0, 0.3, np.float64(0.7), np.array(0.5), 1):
                matrix = make(name, strength).matrix(num_layers)
                assert isinstance(matrix, np.ndarray)
                assert matrix.dtype == "float64"
                expected = plain(name, num_layers, float(strength))
                np.testing.assert_allclose(
                    matrix, expected, rtol=0, atol=2e-15, err_msg=name
                )


def test_a_traced_strength_gives_the_same_matrix_in_at_least_float32(enable_x64):
    @jax.jit
    def matrices(strength):
        return {name: make(name, strength).matrix(5) for name in WITH_MATRIX}

    def check(strength, dtype, bound):
        for name, matrix in matrices(strength).items():
            assert matrix.dtype == dtype, name
            error = np.max(np.abs(matrix - plain(name, 5, float(strength))))
            assert error <= bound, name

    for strength in (0.0, 0.3, 1.0):
        check(jnp.float32(strength), np.float32, 4e-7)
    half = jax.eval_shape(matrices, jnp.bfloat16(0.3))
    is_ours = ("subclass", "function")  # computes as it likes
    assert {half[name].dtype for name in half if name not in is_ours} == {
        jnp.dtype("float32")
    }
    with enable_x64():
        check(jnp.float64(0.3), np.float64, 2e-15)


def test_strengths_that_are_constants_of_a_compiled_sweep_are_right():
    @jax.jit
    def sweep():
        strengths = jnp.array([0.125, 0.5])
        return jax.vmap(lambda strength: gs.ema(strength).matrix(5))(strengths)

    for matrix, rho in zip(sweep(), (0.125, 0.5), strict=True):
        expected = oracle.ema_matrix(5, rho, reverse=False)
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_the_derivative_of_a_matrix_by_its_strength_is_right_and_finite_at_zero():
    @jax.jit
    def derivatives(strength):
        return {
            name: jax.jacfwd(lambda s, name=name: make(name, s).matrix(4))(strength)
            for name in WITH_MATRIX
        }

    chex.assert_tree_all_finite(derivatives(0.0))
    for name, derivative in derivatives(0.3).items():
        upper, lower = (plain(name, 4, 0.3 + sign * 1e-5) for sign in (1, -1))
        by_hand = (upper - lower) / 2e-5
        np.testing.assert_allclose(derivative, by_hand, atol=1e-4, err_msg=name)


# What it may look at is all that it looks at: stages exchange no more than this.
KNOWN_BANDS = set(WITH_MATRIX) - {"shuffled", "subclass", "function", "compose"}


def test_an_operator_declares_the_band_of_its_matrix():
    for name in WITH_MATRIX:
        operator = make(name, 0.7)
        for num_layers in (1, 2, 3, 12):
            matrix = plain(name, num_layers, 0.7)
            band = [
                offset
                for offset in range(1 - num_layers, num_layers)
                if np.diagonal(matrix, offset).any()
            ]
            declared = operator.offsets(num_layers)
            assert set(band) <= set(declared), name
            assert operator.radius(num_layers) == max(map(abs, declared)), name
            if name in KNOWN_BANDS:
                assert [band[0], band[-1]] == [declared[0], declared[-1]], name
    # Those that look at the updates do so up to a radius.
    for operator, radius in (
        (gs.similarity_window(0.1), 1),
        (gs.controls.norm_matched(gs.window(0.1, 2)), 2),
        (gs.compose(gs.similarity_window(0.1), gs.window(0.1, 2)), 3),
        (gs.repeat(gs.similarity_window(0.1), 3), 3),
    ):
        assert [operator.radius(n) for n in (1, 2, 12)] == [0, 1, radius]
        assert operator.offsets(12) == range(-radius, radius + 1)
    assert make("alike window").offsets(1) == range(1)  # its radius is one in any run


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(1.0, 4, decay=2.0),
        gs.gaussian(0.4),
        gs.gaussian(30.0),
        gs.tikhonov(1e6),
        gs.repeat(gs.gaussian(1.5), 7),
        gs.compose(gs.tikhonov(2.0), gs.window(0.5)),
        gs.controls.shuffled(gs.window(0.9), 1),
    ],
    ids=str,
)
def test_smoothers_keep_constants_and_the_sum_over_depth(operator):
    for num_layers in (2, 5, 12):
        matrix = operator.matrix(num_layers)
        assert matrix.min() > -1e-15
        np.testing.assert_allclose(matrix.sum(0), 1.0, rtol=1e-13)
        np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-13)
        if "compose" not in str(operator):
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)


def test_strong_smoothing_of_every_kind_becomes_the_mean():
    mean = gs.mean_over_depth().matrix(6)
    np.testing.assert_array_equal(mean, np.full((6, 6), 1 / 6))
    for operator in (gs.tikhonov(1e9), gs.repeat(gs.window(0.5), 10**4)):
        np.testing.assert_allclose(operator.matrix(6), mean, atol=1e-8)
    for reverse, first in ((False, 0), (True, 5)):
        everywhere = np.zeros((6, 6))
        everywhere[:, first] = 1
        np.testing.assert_array_equal(gs.ema(1.0, reverse).matrix(6), everywhere)


def test_a_gaussian_reaches_three_sigma_unless_told_otherwise():
    for sigma, radius in ((0.1, 1), (1.0, 3), (1.2, 4), (np.float32(0.5), 2)):
        matrix = gs.gaussian(sigma).matrix(12)
        expected = oracle.gaussian_matrix(12, float(sigma), radius)
        np.testing.assert_allclose(matrix, expected, atol=1e-15)
        assert np.diagonal(matrix, radius).all()
        assert not np.diagonal(matrix, radius + 1).any()
    # Of hardly any width it changes nothing.
    for sigma in (1e-200, 1e-3, np.float32(1e-30), jnp.float32(1e-3)):
        np.testing.assert_array_equal(gs.gaussian(sigma, 2).matrix(4), np.eye(4))


def test_windows_and_gaussians_of_any_width_weigh_as_the_plain_sums():
    alphas = 0.2 * np.exp(-0.5 * np.arange(3))
    for radius, decay, total in (
        (10**9, 0.5, 1 / (1 - math.exp(-0.5))),
        (10**6, 0.0, 10**6),
        (5, 1e300, None),
        (5, jnp.float32(np.inf), None),
    ):
        weights = np.diag(gs.window(0.4, radius, decay).matrix(4)[1:, :-1])
        first = 0.2 if total is None else 0.2 / total
        np.testing.assert_allclose(weights, first, rtol=1e-12 if total else 2e-8)
    found = gs.window(0.4, 10**9, 0.5).matrix(4)[0, 1:]
    np.testing.assert_allclose(found, alphas * (1 - math.exp(-0.5)), rtol=1e-12)
    for sigma, radius in ((800.0, 5000), (2000.0, 10**6), (2e3, 4097), (1e3, 4096)):
        distances = np.arange(1, min(radius, 10**5) + 1)
        total = 1 + 2 * np.sum(np.exp(-0.5 * (distances / sigma) ** 2))
        for given, bound in ((sigma, 1e-12), (jnp.float32(sigma), 1e-5)):
            weights = gs.gaussian(given, radius).matrix(3)[0, 1:]
            wanted = np.exp(-0.5 * (np.array([1, 2]) / sigma) ** 2) / total
            np.testing.assert_allclose(weights, wanted, rtol=bound)
    assert gs.gaussian(1e300).matrix(3)[0, 0] == pytest.approx(1.0)


def test_a_gaussian_as_wide_as_the_largest_float_hardly_couples():
    assert gs.gaussian(1.7e308).matrix(3)[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("times", [1, 2, 3, 7, 64])
def test_repeating_is_the_power_of_the_matrix(times):
    for operator in (gs.ema(0.6), gs.operator_fn(two_steps_back)):
        base = operator.matrix(6)
        expected = functools.reduce(np.matmul, [base] * times)
        found = gs.repeat(operator, times).matrix(6)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-16)


def test_the_first_operator_of_a_composition_is_applied_first():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 4))
    composed = gs.compose(gs.dense(first), gs.dense(second))
    np.testing.assert_allclose(composed.matrix(4), second @ first, rtol=1e-14)


@pytest.mark.parametrize("name", ["repeat", "compose", "wide gaussian"])
def test_powers_and_compositions_are_one_product_with_the_updates(name):
    # As nested shifts they would round, and read all updates, once for each factor.
    u = {"blocks": {"w": jax.ShapeDtypeStruct((12, 3), jnp.float32)}}
    jaxpr = jax.make_jaxpr(lambda u: step(make(name), u))(u)
    primitives = [equation.primitive.name for equation in jaxpr.jaxpr.eqns]
    assert primitives.count("dot_general") == 1
    assert "pad" not in primitives


def test_a_traced_matrix_of_any_dtype_is_multiplied_in_float32(enable_x64):
    @jax.jit
    def matrices(values):
        dense = gs.dense(values)
        composed = gs.compose(dense, gs.window(0.3))
        return composed.matrix(2), gs.repeat(dense, 3).matrix(2)

    window = oracle.window_matrix(2, 0.3)
    for dtype in (jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32):
        composed, repeated = matrices(2 * jnp.eye(2, dtype=dtype))
        np.testing.assert_allclose(composed, 2 * window, rtol=3e-7)
        np.testing.assert_array_equal(repeated, 8 * np.eye(2))
    with enable_x64():
        composed, _ = matrices(2 * jnp.eye(2, dtype=jnp.float64))
        np.testing.assert_allclose(composed, 2 * window, rtol=1e-15)


def test_a_dense_operator_holds_a_read_only_copy_of_what_it_was_given():
    given = np.arange(9.0).reshape(3, 3)
    operator = gs.dense(given)
    given[:] = 0.0
    for held in (operator, pickle.loads(pickle.dumps(operator))):
        with pytest.raises(ValueError, match="read-only"):
            held.matrix(3)[:] = 0.0
        np.testing.assert_array_equal(held.matrix(3), np.arange(9.0).reshape(3, 3))
    alpha = np.array(0.1)
    window = gs.window(alpha)
    alpha[...] = 0.9
    assert window == gs.window(0.1)


def test_a_users_function_gets_the_length_of_every_run():
    lengths = []

    def reverse(num_layers):
        lengths.append(num_layers)
        return jnp.eye(num_layers)[::-1] if num_layers > 2 else np.eye(2)[::-1]

    def layers(numbers):
        return {f"layers_{i}": {"w": jnp.full(2, i + 1.0)} for i in numbers}

    tree = {"a": layers(range(3)), "b": layers((0, 1, 4))}
    operator = gs.operator_fn(reverse)
    tx = gs.smooth_over_depth(gs.unrolled(), operator, strict=False)
    out, _ = tx.update(tree, tx.init(tree))
    assert set(lengths) == {2, 3}
    assert [float(out["a"][f"layers_{i}"]["w"][0]) for i in range(3)] == [3, 2, 1]
    assert [float(out["b"][f"layers_{i}"]["w"][0]) for i in (0, 1)] == [2, 1]
    assert out["b"]["layers_4"]["w"] is tree["b"]["layers_4"]["w"]
    np.testing.assert_array_equal(operator.matrix(1), [[1.0]])


# Values.


@gs.operator_fn
def decorated(num_layers):
    return np.full((num_layers, num_layers), 1 / num_layers)


# By their source, so that another process can make them anew. All are different.
VALUES = [
    "gs.window(0.1)",
    "gs.window(0.2)",
    "gs.window(0.1, 2)",
    "gs.window(0.1, 3, decay=0.5)",
    "gs.window(0.1, decay=0.1)",
    "gs.window(abs)",
    "gs.laplacian(0.1)",
    "gs.ema(0.1)",
    "gs.ema(0.1, reverse=True)",
    "gs.gaussian(0.1)",
    "gs.gaussian(0.1, radius=2)",
    "gs.tikhonov(0.1)",
    "gs.tikhonov(jnp.float32(2.0))",
    "gs.mean_over_depth()",
    "gs.layer_scale(0.1)",
    "gs.layer_scale([0.1, 0.2])",
    "gs.dense(np.eye(3))",
    "gs.dense(np.eye(4))",
    "gs.dense(jnp.full((3, 3), 1 / 3))",
    "gs.compose(gs.ema(0.1))",
    "gs.compose(gs.ema(0.1), gs.tikhonov(1))",
    "gs.compose(gs.tikhonov(1), gs.ema(0.1))",
    "gs.repeat(gs.ema(0.1), 1)",
    "gs.repeat(gs.dense(np.eye(3)), 2)",
    "gs.operator_fn(np.eye)",
    "gs.operator_fn(np.ones)",
    "gs.similarity_window(0.1)",
    "gs.similarity_window(0.1, 'param')",
    "gs.similarity_window(0.1, sharpness=2.0)",
    "gs.controls.norm_matched(gs.ema(0.1))",
    "gs.controls.shuffled(gs.ema(0.1), 0)",
    "gs.controls.shuffled(gs.ema(0.1), 1)",
]


def made(source):
    return eval(source, {"gs": gs, "jnp": jnp, "np": np})


def test_operators_are_equal_by_value_hashable_and_shown_as_they_are_written():
    values, again = ([made(source) for source in VALUES] for _ in range(2))
    for i, a in enumerate(values):
        for j, b in enumerate(again):
            assert (a == b) == (i == j), (a, b)
    assert len({*values, *again}) == len(values)
    assert made(str(gs.repeat(gs.window(0.1, 2), 3))) == gs.repeat(gs.window(0.1, 2), 3)
    for one, other in (
        (gs.window(0.1), gs.window(np.array(0.1), radius=1, decay=None)),
        (gs.window(1), gs.window(1.0)),
        (gs.gaussian(1.0), gs.gaussian(1.0, radius=3)),
        (gs.dense(np.eye(2)), gs.dense([[1.0, 0.0], [0.0, 1.0]])),
        (gs.similarity_window(0.1), gs.similarity_window(0.1, "block", 1.0)),
        # A number is the strength of a window wherever an operator is taken.
        (gs.compose(gs.ema(0.5), 0.1), gs.compose(gs.ema(0.5), gs.window(0.1))),
        (gs.repeat(0.5, 2), gs.repeat(gs.window(0.5), 2)),
        (TowardsMean(0.1), TowardsMean(0.1)),
    ):
        assert one == other
        assert hash(one) == hash(other)
    assert TowardsMean(0.1) != TowardsMean(0.2)
    assert gs.window(0.1) != "window"


@pytest.mark.parametrize("source", VALUES)
def test_operators_are_frozen_not_callable_and_survive_pickles_and_copies(source):
    operator = made(source)
    assert not callable(operator)
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    pickled = [pickle.loads(pickle.dumps(operator, p)) for p in protocols]
    for same in (*pickled, copy.copy(operator), copy.deepcopy(operator)):
        assert type(same) is type(operator)
        assert same == operator
        assert hash(same) == hash(operator)
        assert repr(same) == repr(operator)
    for name in (*(f.name for f in dataclasses.fields(operator)), "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(operator, name, 0.5)


def test_a_decorated_function_can_be_pickled():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


_UNPICKLED = """
import pathlib, pickle, sys
import jax.numpy as jnp, numpy as np
import gradsmooth_optax as gs
for source, value in pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()):
    same = eval(source)
    assert value == same and hash(value) == hash(same), source
w = jnp.arange(3.0)[:, None]
spec, operator = pickle.loads(pathlib.Path(sys.argv[2]).read_bytes())
tx = gs.smooth_over_depth(spec, operator)
out, _ = tx.update({"blocks": {"w": w}}, tx.init({"blocks": {"w": w}}))
print(out["blocks"]["w"].ravel().tolist())
"""

SPECS = [
    "gs.unrolled(r'layers_(\\d+)/', start=2, stack=('a', 1))",
    "gs.scanned('blocks/', axis=(0, 1), stride=(4, 1))",
    "gs.first_match(gs.scanned('b/'), gs.ranked(gs.unrolled()))",
    "gs.unrolled().only_projections(bias=False)",
    "gs.layouts.maxtext(cycle=6, num_cycles=10)",
]


def test_pickles_are_equal_and_hash_alike_in_another_process(tmp_path):
    values, used = tmp_path / "values.pickle", tmp_path / "used.pickle"
    everything = [(source, made(source)) for source in VALUES + SPECS]
    values.write_bytes(pickle.dumps(everything))
    used.write_bytes(pickle.dumps((SCANNED, gs.window(0.5))))
    done = subprocess.run(
        [sys.executable, "-c", _UNPICKLED, str(values), str(used)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            # Another seed of the hashes of strings.
            "PYTHONHASHSEED": "7",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.25, 1.0, 1.75]"


# Strengths: numbers, arrays and schedules.


def test_a_schedule_is_resolved_at_a_count():
    for name in SCHEDULED:
        operator = make(name, lambda count: 0.1 * (count + 1))
        assert operator.scheduled, name
        for count in (0, 3):
            at = operator.at(count)
            assert not at.scheduled
            assert at == make(name, 0.1 * (count + 1)), name
        if name in WITH_MATRIX and name != "subclass":
            with pytest.raises(TypeError, match="schedule"):
                operator.matrix(4)
        constant = make(name, 0.3)
        assert not constant.scheduled
        assert constant.at(7) is constant


def test_every_strength_of_an_operator_may_be_a_schedule_of_its_own():
    def rising(count):
        return 0.1 * count

    for maker in (
        lambda a, b: gs.window(a, 2, decay=b),
        lambda a, b: gs.similarity_window(a, sharpness=b),
        lambda a, b: gs.compose(gs.ema(a), gs.tikhonov(b)),
        lambda a, b: gs.repeat(gs.compose(gs.ema(a), gs.tikhonov(b)), 2),
        lambda a, b: gs.controls.norm_matched(gs.compose(gs.ema(a), gs.ema(b))),
        lambda a, b: gs.compose(gs.controls.shuffled(gs.ema(a), 1), gs.layer_scale(b)),
    ):
        both = maker(rising, lambda count: 0.2 * count)
        assert both.at(2) == maker(0.2, 0.4)
        assert maker(0.4, rising).at(3) == maker(0.4, 0.1 * 3)


def test_a_number_an_array_and_a_schedule_are_strengths_of_the_window():
    u = {"blocks": {"w": jnp.arange(12.0).reshape(4, 3) ** 2}}
    windowed = step(gs.window(0.2), u)
    for strength in (0.2, np.float64(0.2), jnp.float32(0.2), lambda count: 0.2):
        chex.assert_trees_all_equal(step(strength, u), windowed)


@pytest.mark.parametrize("name", EVERY)
def test_every_operator_takes_injected_scheduled_and_mapped_strengths(name):
    """Compiled once, as a sweep over what `inject_hyperparams` holds."""
    if name == "function":  # without a schedule of its own
        return
    u = {"blocks": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))}}

    def factory(strength):
        return gs.smooth_over_depth(SCANNED, make(name, strength))

    injected = optax.inject_hyperparams(factory)(strength=0.25)
    scheduled = factory(lambda count: 0.125 * (count + 1))

    @jax.jit
    def sweep(strengths, counts):
        def with_strength(strength, count):
            state = injected.init(u)
            state.hyperparams["strength"] = strength
            out = injected.update(u, state)[0]
            return out, scheduled.update(u, gs.DepthSmoothingState(count))

        return jax.vmap(with_strength)(strengths, counts)

    outs, (others, states) = sweep(jnp.array([0.125, 0.5]), jnp.array([0, 3]))
    chex.assert_trees_all_close(others, outs, rtol=1e-5)
    np.testing.assert_array_equal(states.count, [1, 4])
    expected = [step(make(name, strength), u) for strength in (0.125, 0.5)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *expected)
    chex.assert_trees_all_close(outs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "operator",
    [
        gs.window(0.0, 3),
        gs.window(np.float32(0)),
        gs.laplacian(0),
        gs.ema(np.float32(0)),
        gs.gaussian(0.0),
        gs.tikhonov(0.0),
        gs.layer_scale(1),
        gs.compose(gs.ema(0.0), gs.window(0)),
        gs.repeat(gs.laplacian(0.0), 3),
        gs.similarity_window(0.0),
        gs.controls.norm_matched(gs.window(0.0)),
        gs.controls.shuffled(gs.ema(0.0), 1),
    ],
    ids=str,
)
def test_an_operator_that_changes_nothing_returns_the_same_objects(operator):
    u = {"blocks": {"w": jnp.ones((3, 2))}, "embed": jnp.ones(2)}
    for variant, norm_scope in (("standard", "param"), ("directional", "block")):
        out = step(operator, u, variant=variant, norm_scope=norm_scope)
        assert out["blocks"]["w"] is u["blocks"]["w"]
        assert out["embed"] is u["embed"]
    assert operator.is_identity
    for name in EVERY:
        assert not make(name).is_identity, name
    assert not gs.compose(gs.ema(0.0), gs.window(0.1)).is_identity


# What is refused.


@pytest.mark.parametrize(
    ("maker", "argument"),
    [
        (gs.window, "alpha"),
        (gs.laplacian, "alpha"),
        (gs.ema, "rho"),
        (gs.gaussian, "sigma"),
        (gs.tikhonov, "strength"),
        (lambda x: gs.window(0.1, decay=x), "decay"),
        (gs.similarity_window, "alpha"),
        (lambda x: gs.similarity_window(0.1, sharpness=x), "sharpness"),
    ],
)
def test_a_strength_out_of_range_or_of_the_wrong_kind_is_refused(maker, argument):
    bounded = argument in ("alpha", "rho")
    for wrong in (-0.1, math.nan, math.inf, -1, np.float32(-0.5)) + (1.5,) * bounded:
        with pytest.raises(ValueError, match=rf"`{argument}`") as info:
            maker(wrong)
        assert f"{float(wrong):g}" in str(info.value)
        assert ("between 0 and 1" if bounded else ">= 0") in str(info.value)
    for wrong in ("0.1", [0.1], True, 0.1j):
        with pytest.raises(TypeError, match=rf"`{argument}`") as info:
            maker(wrong)
        assert type(wrong).__name__ in str(info.value)
    with pytest.raises(ValueError, match="scalar"):
        maker(np.array([0.1, 0.2]))


@pytest.mark.parametrize(
    ("maker", "error", "words"),
    [
        (lambda: gs.gaussian(1.0, radius=0), ValueError, "`radius`"),
        (lambda: gs.gaussian(1.0, radius=1.5), TypeError, "`radius`"),
        (lambda: gs.gaussian(1.0, jnp.asarray(2)), TypeError, '("radius",)'),
        (lambda: gs.gaussian(lambda count: 1.0), ValueError, "radius=3"),
        (lambda: gs.gaussian(jnp.float32(1.0)), ValueError, "radius=3"),
        (lambda: gs.window(0.1, radius=0), ValueError, "`alpha=0.0`"),
        (lambda: gs.ema(0.5, reverse=1), TypeError, "`reverse`"),
        (lambda: gs.repeat(gs.ema(0.5), 0), ValueError, "`times`"),
        (lambda: gs.repeat(gs.ema(0.5), 1.0), TypeError, "`times`"),
        (lambda: gs.repeat(gs.ema(0.5), True), TypeError, "`times`"),
        (lambda: gs.compose(), TypeError, "at least one operator"),
        (lambda: gs.compose(gs.ema(0.5), "0.1"), TypeError, "window(0.1)"),
        (lambda: gs.compose(gs.ema(0.5), True), TypeError, "True of type bool"),
        (lambda: gs.compose(np.eye(3)), TypeError, "dense(matrix)"),
        (lambda: gs.compose(optax.identity()), TypeError, "chain transformations"),
        (lambda: gs.dense(np.ones((2, 3))), ValueError, "square"),
        (lambda: gs.dense(np.ones(4)), ValueError, "square"),
        (lambda: gs.dense([[np.nan]]), ValueError, "NaN"),
        (lambda: gs.operator_fn(gs.window(0.1)), TypeError, "operator_fn"),
        (lambda: gs.operator_fn(np.eye(3)), TypeError, "dense(matrix)"),
        (lambda: gs.controls.norm_matched("window"), TypeError, "operator"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), -1), TypeError, "`seed`"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), 0.5), TypeError, "`seed`"),
        (lambda: gs.controls.shuffled(gs.ema(0.5), True), TypeError, "`seed`"),
        (lambda: gs.similarity_window(0.1, "layer"), ValueError, "'block'"),
        *((lambda x=x: gs.layer_scale(x), TypeError, "`factors`") for x in (True, "1")),
        (lambda: gs.layer_scale(None), ValueError, "`factors`"),
        (lambda: gs.layer_scale([[1.0]]), ValueError, "`factors`"),
        (lambda: gs.layer_scale(math.nan), ValueError, "`factors`"),
        # A schedule that returns something else than a strength.
        (lambda: gs.ema(lambda n: np.eye(n)).at(2), TypeError, "operator_fn(function)"),
        (lambda: gs.ema(lambda n: gs.ema(0.1)).at(2), TypeError, "a number is needed"),
        (lambda: gs.ema(lambda n: abs).at(2), TypeError, "a number is needed"),
        (lambda: gs.ema(lambda n: 1.5).at(2), ValueError, "`rho`"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(maker, error, words):
    with pytest.raises(error, match=re.escape(words)):
        maker()


@dataclasses.dataclass(frozen=True, eq=False)
class WrongShape(gs.Operator):
    def matrix(self, num_layers):
        return np.eye(num_layers + 1)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (gs.dense(np.eye(4)), "4 layers"),
        (gs.compose(gs.ema(0.5), gs.dense(np.eye(4))), "operator_fn"),
        (gs.repeat(gs.dense(np.eye(4)), 2), "run of 3"),
        (gs.controls.shuffled(gs.dense(np.eye(4)), 0), "run of 3"),
        (gs.controls.norm_matched(gs.dense(np.eye(4))), "run of 3"),
        (gs.layer_scale([1.0, 2.0]), "run of 3"),
        (gs.operator_fn(lambda n: np.eye(n + 1)), "(4, 4)"),
        (WrongShape(), "matrix(3)"),
    ],
    ids=str,
)
def test_an_operator_that_does_not_fit_a_run_names_the_run(operator, words):
    with pytest.raises(ValueError, match="layers 0 to 2") as info:
        step(operator, {"blocks": {"w": jnp.ones((3, 2))}})
    assert words in str(info.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda op: op.matrix(3),
        lambda op: gs.compose(gs.window(0.1), op).matrix(3),
        lambda op: gs.repeat(op, 2).matrix(3),
        lambda op: gs.controls.shuffled(op, 0),
        lambda op: gs.diagnostics.contraction_factor(op, 1),
    ],
)
def test_an_operator_that_depends_on_the_updates_has_no_matrix(use):
    for name in sorted(set(EVERY) - set(WITH_MATRIX)):
        assert not make(name).has_matrix
        with pytest.raises(TypeError, match="depend") as info:
            use(make(name))
        assert "matrix" in str(info.value)
    assert all(make(name).has_matrix for name in WITH_MATRIX)


def test_an_operator_says_whether_it_changes_a_layer_that_is_alone():
    for name, row in OPERATORS.items():
        assert make(name).scales_single_layers == row.scales_one
    scale = gs.layer_scale(0.5)
    for operator in (
        gs.compose(gs.window(0.3), scale),
        gs.repeat(scale, 1),
        gs.controls.norm_matched(scale),
    ):
        assert operator.scales_single_layers
