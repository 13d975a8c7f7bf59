"""What a user may rely on where the input is odd: transformations x bad days.

Updates that are not finite, zero, empty, huge or tiny; odd dtypes, weak types, x64,
complex numbers; schedules that have run out; very deep stacks; jax's debugging modes;
threads, pickles and copies. Numbers are checked against the plain loops of `oracle`.
"""

import copy
import functools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs

VARIANTS = ("standard", "norm_preserving", "directional")
NORM_SCOPES = ("param", "block")
SHAPES = {"kernel": (2, 3), "bias": (3,)}
INT32_MAX = np.iinfo(np.int32).max

# Compiling is most of what these tests take.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


# Layouts: a list of layers as a tree, and the tree as a list of layers.


class Layout(NamedTuple):
    depth: gs.DepthSpec
    tree_of: Callable[[list], Any]
    layers_in: Callable[[Any], list]


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


LAYOUTS = {
    "stacked": Layout(
        gs.scanned("blocks/"),
        lambda blocks: as_jax({"blocks": oracle.stacked_tree(blocks)}),
        lambda tree: oracle.unstacked(tree["blocks"]),
    ),
    "unrolled": Layout(
        gs.unrolled(),
        lambda blocks: as_jax(oracle.unrolled_tree(blocks)),
        lambda tree: [tree[f"layers_{layer}"] for layer in range(len(tree))],
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
STACKED, UNROLLED = LAYOUTS["stacked"], LAYOUTS["unrolled"]


# Operators, and the same in plain loops.


class Twin(NamedTuple):
    make: Callable[[], gs.Operator]
    couple: Callable[[list], list]


def linear(make, matrix_of):
    return Twin(make, lambda blocks: oracle.smooth(blocks, matrix_of))


def windows(n):
    return oracle.window_matrix(n, 0.3)


OPERATORS = {
    "window": linear(lambda: gs.window(0.3), windows),
    "window, radius 2": linear(
        lambda: gs.window(0.3, 2, 0.5), lambda n: oracle.window_matrix(n, 0.3, 2, 0.5)
    ),
    "window, radius 9": linear(
        lambda: gs.window(0.3, 9), lambda n: oracle.window_matrix(n, 0.3, 9)
    ),
    "laplacian": linear(
        lambda: gs.laplacian(0.3), lambda n: oracle.laplacian_matrix(n, 0.3)
    ),
    "gaussian": linear(
        lambda: gs.gaussian(0.6), lambda n: oracle.gaussian_matrix(n, 0.6, 2)
    ),
    "ema": linear(lambda: gs.ema(0.4), lambda n: oracle.ema_matrix(n, 0.4, False)),
    "ema, reverse": linear(
        lambda: gs.ema(0.4, reverse=True), lambda n: oracle.ema_matrix(n, 0.4, True)
    ),
    "tikhonov": linear(
        lambda: gs.tikhonov(2.0), lambda n: oracle.tikhonov_matrix(n, 2.0)
    ),
    "mean": linear(gs.mean_over_depth, lambda n: np.full((n, n), 1 / n)),
    "compose": linear(
        lambda: gs.compose(gs.ema(0.4), gs.window(0.3)),
        lambda n: windows(n) @ oracle.ema_matrix(n, 0.4, False),
    ),
    "repeat": linear(
        lambda: gs.repeat(gs.window(0.3), 8),
        lambda n: np.linalg.matrix_power(windows(n), 8),
    ),
    "operator_fn": linear(lambda: gs.operator_fn(windows), windows),
    "similarity": Twin(
        lambda: gs.similarity_window(0.5),
        lambda blocks: oracle.similarity_window(blocks, 0.5),
    ),
    "similarity, param": Twin(
        lambda: gs.similarity_window(0.5, "param", 2.0),
        lambda blocks: oracle.similarity_window(blocks, 0.5, "param", 2.0),
    ),
    "norm_matched": Twin(
        lambda: gs.controls.norm_matched(gs.window(0.3)),
        lambda blocks: oracle.norm_matched(blocks, OPERATORS["window"].couple),
    ),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


@functools.cache
def compiled(name, layout, **kwargs):
    """An update by this operator, compiled once for all tests."""
    tx = gs.smooth_over_depth(layout.depth, OPERATORS[name].make(), **kwargs)
    return quick_jit(lambda tree: tx.update(tree, tx.init(tree))[0])


def applied(name, layout, blocks, **kwargs):
    """The layers after one update by this operator."""
    tree = layout.tree_of(blocks)
    out = compiled(name, layout, **kwargs)(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    return layout.layers_in(out)


# Transformations, by what is special about each.


def scheduled(count):
    return jnp.where(count < 3, 0.3, 0.5)


TRANSFORMATIONS = {
    **{
        f"{variant}, {norm_scope}": functools.partial(
            gs.smooth_over_depth, operator=0.3, variant=variant, norm_scope=norm_scope
        )
        for variant in VARIANTS
        for norm_scope in NORM_SCOPES[: 1 if variant == "standard" else 2]
    },
    "schedule": lambda depth: gs.smooth_over_depth(depth, scheduled),
    "wide": lambda depth: gs.smooth_over_depth(
        depth, gs.tikhonov(2.0), variant="directional", norm_scope="block"
    ),
    "similarity": lambda depth: gs.smooth_over_depth(
        depth, gs.similarity_window(scheduled), variant="norm_preserving"
    ),
    "norm_matched": lambda depth: gs.smooth_over_depth(
        depth, gs.controls.norm_matched(gs.window(0.3)), norm_scope="block"
    ),
    "with_depth_smoothing": lambda depth: gs.with_depth_smoothing(
        optax.trace(0.5), gs.smooth_over_depth(depth, scheduled)
    ),
    "momentum": lambda depth: gs.with_depth_smoothing(
        optax.trace(0.5), gs.smooth_over_depth(depth, 0.3)
    ),
    "adamw": lambda depth: gs.adamw(0.1, gs.smooth_over_depth(depth, 0.3)),
    "muon": lambda depth: gs.muon(
        0.1, depth, gs.smooth_over_depth(depth, 0.3), ns_steps=1
    ),
    "monitor_depth": lambda depth: gs.diagnostics.monitor_depth(
        gs.smooth_over_depth(depth, 0.3), depth, every=2
    ),
}
LEARNERS = {
    "learn_alpha": lambda depth: gs.contrib.learn_alpha(optax.identity(), depth),
    "learn_alpha, per layer": lambda depth: gs.contrib.learn_alpha(
        optax.identity(), depth, per="layer", signal="full"
    ),
    "learn_operator": lambda depth: gs.contrib.learn_operator(
        optax.identity(), depth, radius=2
    ),
}
EVERYTHING = {**TRANSFORMATIONS, **LEARNERS}
OURS_ALONE = {
    k: v for k, v in EVERYTHING.items() if k not in ("momentum", "adamw", "muon")
}
every_transformation = pytest.mark.parametrize("name", EVERYTHING)


class Steps(NamedTuple):
    """A transformation of three layers, with its update compiled for several tests."""

    tx: optax.GradientTransformationExtraArgs
    update: Callable[..., Any]
    traces: list


@functools.cache
def steps_of(name, layout):
    tx, traces = EVERYTHING[name](layout.depth), []

    def update(updates, state, params):
        traces.append(None)
        return tx.update(updates, state, params)

    return Steps(tx, quick_jit(update), traces)


def tree_with_empty_leaves(layout, seed=0):
    """What `steps_of` is compiled for."""
    shapes = {**SHAPES, "empty": (0,)}
    return layout.tree_of(oracle.random_blocks(3, shapes=shapes, seed=seed))


def updated(tx, tree):
    """The updates of one step, not compiled, and the state."""
    return tx.update(tree, tx.init(tree), tree)


def not_finite(tree):
    return [x for x in jax.tree.leaves(tree) if not np.isfinite(np.asarray(x)).all()]


# Updates that are not finite: what spreads where.


@every_layout
@pytest.mark.parametrize("bad", [0, 5, 11])
@pytest.mark.parametrize(
    ("name", "radius"),
    [
        ("window", 1),
        ("window, radius 2", 2),
        ("laplacian", 1),
        ("gaussian", 2),
        ("similarity", 1),
        ("norm_matched", 1),
    ],
)
def test_a_narrow_band_spreads_a_nan_to_its_neighbors_only(name, radius, bad, layout):
    blocks = oracle.random_blocks(12)
    blocks[bad]["kernel"][0, 1] = np.nan
    out = applied(name, layout, blocks)
    spoiled = [layer for layer, b in enumerate(out) if not_finite(b["kernel"])]
    reached = range(max(bad - radius, 0), min(bad + radius, 11) + 1)
    if name == "norm_matched":  # Rescaled: the others are not added to it.
        assert set(spoiled) <= set(reached)
    else:
        assert spoiled == list(reached)
    assert bad in spoiled
    if name != "similarity":  # Its weights are of whole blocks.
        assert not not_finite([b["bias"] for b in out])


@every_layout
@pytest.mark.parametrize("name", ["ema", "tikhonov", "mean", "repeat"])
def test_a_matmul_spreads_a_nan_along_its_stack_and_role_only(name, layout):
    blocks = oracle.random_blocks(12)
    blocks[5]["kernel"][0, 1] = np.nan
    out = applied(name, layout, blocks)
    matrix = OPERATORS[name].make().matrix(12)
    for layer in np.flatnonzero(matrix[:, 5]):
        assert not_finite(out[layer]["kernel"])
    assert not not_finite([b["bias"] for b in out])


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
@every_layout
def test_norms_of_blocks_spread_a_nan_to_other_roles_of_the_neighbors(layout, variant):
    blocks = oracle.random_blocks(8)
    blocks[4]["kernel"][0, 1] = np.nan
    out = applied("window", layout, blocks, variant=variant, norm_scope="block")
    for role in SHAPES:
        spoiled = [layer for layer, block in enumerate(out) if not_finite(block[role])]
        assert spoiled == [3, 4, 5]


# The two guards that the documentation names.


def spoiled_in(blocks, layer, value=np.nan):
    blocks = copy.deepcopy(blocks)
    blocks[layer]["kernel"][:] = value
    return blocks


def trained(tx, layout, *runs):
    """The parameters and the state after each step, for each list of gradients."""
    params = layout.tree_of(oracle.random_blocks(3, seed=9))

    @quick_jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    histories = [[(params, tx.init(params))] for _ in runs]
    for history, gradients in zip(histories, runs, strict=True):
        for gradient in gradients:
            history.append(step(*history[-1], layout.tree_of(gradient)))
    return histories


GUARDED = ("directional, block", "similarity", "muon", "learn_alpha", "learn_operator")


@pytest.mark.parametrize("name", GUARDED)
def test_apply_if_finite_around_the_chain_skips_a_bad_step_and_goes_on(name):
    good = [oracle.random_blocks(3, seed=seed) for seed in range(3)]
    bad = [spoiled_in(good[1], layer=2), spoiled_in(good[0], 1, np.inf)]
    chain = optax.chain(EVERYTHING[name](STACKED.depth), optax.scale(-0.1))
    guarded = optax.apply_if_finite(chain, max_consecutive_errors=5)
    mixed = [good[0], good[1], bad[0], bad[1], good[2]]
    history, expected = trained(guarded, STACKED, mixed, good)
    # Bad steps leave everything as the last good one did.
    for skipped, at in ((3, 2), (4, 2), (5, 3)):
        (params, state), (before, state_before) = history[skipped], expected[at]
        chex.assert_trees_all_equal(params, before)
        chex.assert_trees_all_equal(state.inner_state, state_before.inner_state)
    assert not not_finite(history)
    assert history[-1][1].total_notfinite == 2


@pytest.mark.parametrize("name", GUARDED)
def test_zero_nans_before_it_is_as_if_the_update_of_that_layer_were_zero(name):
    good = [oracle.random_blocks(3, seed=seed) for seed in range(3)]
    guarded = optax.chain(optax.zero_nans(), EVERYTHING[name](STACKED.depth))
    with_nan, with_zero = (
        [good[0], spoiled_in(good[1], 1, value), good[2]] for value in (np.nan, 0.0)
    )
    history, expected = trained(guarded, STACKED, with_nan, with_zero)
    for (params, state), (zeroed, state_of_zeroed) in zip(
        history, expected, strict=True
    ):
        chex.assert_trees_all_equal(params, zeroed)
        chex.assert_trees_all_equal(state[1:], state_of_zeroed[1:])
    assert not not_finite(history)


@pytest.mark.parametrize("learn", [gs.contrib.learn_alpha, gs.contrib.learn_operator])
def test_what_is_learned_stays_finite_even_if_the_moments_of_the_inner_do_not(learn):
    good = [oracle.random_blocks(3, seed=seed) for seed in range(2)]
    gradients = [good[0], good[1], spoiled_in(good[0], 1), good[0], good[1], good[0]]
    tx = learn(optax.scale_by_adam(), STACKED.depth)
    ((*_, (_, state)),) = trained(tx, STACKED, gradients)
    assert not_finite(state.inner_state)
    learned = state.alpha if hasattr(state, "alpha") else state.weights
    assert not not_finite((learned, state.signal))


# Schedules.

PAST_THEIR_END = {
    "linear": (optax.linear_schedule(0.0, 0.5, 10), 0.5),
    "cosine": (optax.cosine_decay_schedule(0.5, 10, alpha=0.25), 0.125),
    "piecewise": (optax.piecewise_constant_schedule(0.5, {3: 0.5, 6: 0.5}), 0.125),
    "warmup": (optax.warmup_cosine_decay_schedule(0.0, 0.2, 2, 9, 0.1), 0.1),
    "joined": (
        optax.join_schedules([lambda _: 0.1, optax.linear_schedule(0.1, 0.5, 5)], [5]),
        0.5,
    ),
    "Python float": (lambda count: 0.25, 0.25),
    "Python int": (lambda count: 1, 1.0),
    "NumPy float64": (lambda count: np.float64(0.3), 0.3),
    "NumPy array": (lambda count: np.array(0.3), 0.3),
    "float16": (lambda count: jnp.float16(0.25), 0.25),
    "bfloat16": (lambda count: jnp.bfloat16(0.25), 0.25),
    "int32": (lambda count: jnp.ones((), jnp.int32), 1.0),
    "zero": (lambda count: 0.0, 0.0),
}


@pytest.mark.parametrize("name", PAST_THEIR_END)
def test_schedules_of_any_kind_hold_past_their_end_and_the_count_saturates(name):
    schedule, alpha = PAST_THEIR_END[name]
    layout, blocks = STACKED, oracle.random_blocks(3)
    tx = gs.smooth_over_depth(layout.depth, schedule)
    update = quick_jit(tx.update)
    state = gs.DepthSmoothingState(jnp.asarray(INT32_MAX - 1, jnp.int32))
    for _ in range(3):
        out, state = update(layout.tree_of(blocks), state)
        expected = oracle.window(blocks, alpha)
        oracle.assert_blocks_close(layout.layers_in(out), expected)
    assert state.count == INT32_MAX
    assert state.count.dtype == np.int32


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1.5, ValueError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (np.full(1, 0.3), ValueError),
        (jnp.full(1, 0.3), ValueError),
        (None, TypeError),
        (True, TypeError),
        ("0.3", TypeError),
        ([0.3], TypeError),
        (jnp.complex64(0.3), TypeError),
    ],
    ids=repr,
)
def test_a_schedule_that_returns_no_strength_is_an_error_that_names_alpha(value, error):
    layout = STACKED
    tx = gs.smooth_over_depth(layout.depth, lambda count: value)
    tree = layout.tree_of(oracle.random_blocks(3))
    with pytest.raises(error, match="`alpha`"):
        jax.eval_shape(tx.update, tree, tx.init(tree))


# Nothing to smooth: empty leaves, no layers, one layer, zeros.


IN_BOTH_LAYOUTS = [
    *((name, STACKED) for name in EVERYTHING),
    *((name, UNROLLED) for name in ("directional, block", "wide", "norm_matched")),
    *((name, UNROLLED) for name in ("similarity", "muon", "learn_alpha")),
]
in_both_layouts = pytest.mark.parametrize(
    ("name", "layout"),
    IN_BOTH_LAYOUTS,
    ids=[
        f"{name}-{'stacked' if x is STACKED else 'unrolled'}"
        for name, x in IN_BOTH_LAYOUTS
    ],
)


@in_both_layouts
def test_zeros_and_empty_leaves_give_no_nan_even_with_debug_nans(name, layout):
    steps = steps_of(name, layout)
    shapes = {**SHAPES, "empty": (0,)}
    some = oracle.random_blocks(3, shapes=shapes)
    some[1]["kernel"][:] = 0.0
    some[2]["bias"][:] = 0.0
    none = [{role: 0 * x for role, x in block.items()} for block in some]
    for blocks in (some, none):
        tree = layout.tree_of(blocks)
        state = steps.tx.init(tree)
        with jax.debug_nans(True):
            for _ in range(2):
                out, state = steps.update(tree, state, tree)
        assert not not_finite((out, state))
        chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    assert not any(map(np.any, jax.tree.leaves(out)))


@pytest.mark.parametrize("name", ["similarity"])
def test_zeros_give_no_nan_without_jit_under_debug_nans_either(name):
    blocks = oracle.random_blocks(3, shapes={"kernel": (2, 3), "empty": (0,)})
    zeros = [{**block, "kernel": 0 * block["kernel"]} for block in blocks]
    with jax.debug_nans(True):
        out, state = updated(EVERYTHING[name](STACKED.depth), STACKED.tree_of(zeros))
    assert not not_finite((out, state))


def statistics_of(layout):
    return quick_jit(lambda t: gs.diagnostics.depth_statistics(t, layout.depth))


def noise_of(layout):
    return quick_jit(lambda t: gs.diagnostics.gradient_noise(t, layout.depth))


@every_layout
def test_diagnostics_of_zeros_and_empty_leaves_give_no_nan(layout):
    blocks = oracle.random_blocks(3, shapes={"zero": (2, 3), "empty": (0, 4)})
    tree = layout.tree_of([{k: 0 * x for k, x in block.items()} for block in blocks])
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    with jax.debug_nans(True):
        (of_stack,) = statistics_of(layout)(tree).values()
        (noise,) = noise_of(layout)(batches).values()
        aligned = jax.jit(gs.diagnostics.residual_alignment)(np.zeros((4, 2)))
        stands_still = np.eye(4)[[0, 1, 1, 2]]
        score = jax.jit(gs.diagnostics.line_shape_score)(stands_still)
    for numbers in (of_stack, noise, aligned):
        chex.assert_trees_all_equal(numbers, jax.tree.map(jnp.zeros_like, numbers))
    assert np.isfinite(score)
    assert set(of_stack.roles) == {"zero", "empty"}


@every_transformation
@pytest.mark.parametrize("num_layers", [0, 1])
def test_a_scan_of_no_or_one_layer_passes_through_as_the_same_objects(num_layers, name):
    tree = {"blocks": {"w": jnp.ones((num_layers, 4)), "b": jnp.ones(num_layers)}}
    depth = gs.scanned("blocks/")
    out, state = updated(EVERYTHING[name](depth), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    assert not not_finite((out, state))
    if name not in ("momentum", "adamw", "muon", "with_depth_smoothing"):
        assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (out, tree))))
    assert gs.diagnostics.depth_statistics(tree, depth) == {}
    assert str(gs.describe(depth, tree))


@every_operator
def test_a_model_of_stacks_of_one_layer_passes_through_every_operator(name):
    x, y = jnp.ones((2, 3)), jnp.ones(3)
    tree = {"encoder_0": {"w": x}, "decoder_0": {"w": y}, "head": jnp.ones(2)}
    depth = gs.unrolled(r"coder_(\d+)/")
    for variant in VARIANTS:
        tx = gs.smooth_over_depth(
            depth, OPERATORS[name].make(), variant=variant, strict=True
        )
        out, _ = tx.update(tree, tx.init(tree))
        assert out["encoder_0"]["w"] is x
        assert out["decoder_0"]["w"] is y


# Deep models.


@pytest.mark.parametrize(
    "name",
    [
        *("window", "window, radius 9", "ema", "tikhonov", "repeat"),
        *("similarity", "norm_matched"),
    ],
)
def test_two_hundred_stacked_layers_equal_the_plain_loops(name):
    blocks = oracle.random_blocks(200)
    out = applied(name, STACKED, blocks)
    oracle.assert_blocks_close(out, OPERATORS[name].couple(blocks))


@pytest.mark.parametrize("variant", ["standard", "norm_preserving"])
def test_a_hundred_unrolled_layers_equal_the_plain_loops(variant):
    blocks = oracle.random_blocks(100, shapes={"bias": (3,)})
    kwargs = {"variant": variant, "norm_scope": "block"}
    out = applied("window", UNROLLED, blocks, **kwargs)
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.3, **kwargs))


def test_a_matmul_over_a_hundred_unrolled_layers_equals_the_plain_loops():
    blocks = oracle.random_blocks(100, shapes={"bias": (3,)})
    out = applied("tikhonov", UNROLLED, blocks)
    oracle.assert_blocks_close(out, OPERATORS["tikhonov"].couple(blocks))


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
    "name",
    ["standard, param", "directional, block", "wide", "similarity", "learn_operator"],
)
def test_the_compiled_program_of_an_unrolled_model_grows_linearly(name):
    tx, sizes = EVERYTHING[name](gs.unrolled()), []
    for num_layers in (8, 12, 20):  # From 8 on "wide" is a matmul.
        tree = UNROLLED.tree_of(oracle.random_blocks(num_layers))
        state = jax.eval_shape(tx.init, tree)
        sizes.append(num_equations(jax.make_jaxpr(tx.update)(tree, state).jaxpr))
    assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0])


# Huge and tiny updates.


@functools.cache
def window_at_any_scale(variant, layout):
    """A compiled update, for all scales and dtypes."""
    tx = gs.smooth_over_depth(LAYOUTS[layout].depth, 0.3, variant=variant)
    return quick_jit(lambda tree: tx.update(tree, tx.init(tree))[0])


def error_at(scale, dtype, variant, layout):
    """Of the largest entry; `scale` is about that of the largest update."""
    blocks = oracle.random_blocks(4, np.float64, {"kernel": (2, 3)})
    largest = max(np.max(np.abs(block["kernel"])) for block in blocks)
    blocks = [
        {"kernel": (block["kernel"] / largest * scale).astype(dtype)}
        for block in blocks
    ]
    tree = LAYOUTS[layout].tree_of(blocks)
    out = LAYOUTS[layout].layers_in(window_at_any_scale(variant, layout)(tree))
    expected = oracle.window(blocks, 0.3, variant=variant)
    got, want = (np.stack([b["kernel"] for b in x]) for x in (out, expected))
    return oracle.relative_error(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_standard_variant_is_right_over_the_whole_range_of_float32(dtype, layout):
    tolerance = 1e-6 if dtype is np.float32 else 5e-3
    for scale in (1e38, 1e30, 1e18, 1.0, 1e-18, 1e-30):
        assert error_at(scale, dtype, "standard", layout) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_norms_are_right_for_updates_of_1e_minus_16_to_1e18(dtype, variant, layout):
    tolerance = 1e-6 if dtype is np.float32 else 5e-3
    for scale in (1e18, 1e9, 1.0, 1e-9, 1e-16):
        assert error_at(scale, dtype, variant, layout) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float16_is_right_up_to_its_largest_number_and_down_to_its_spacing(
    variant, layout
):
    assert error_at(6.5e4, np.float16, variant, layout) < 1e-3
    for scale in (1e-4, 1e-5, 1e-6):  # Subnormal: evenly spaced.
        error = error_at(scale, np.float16, variant, layout)
        assert error <= 2.0**-24 / scale


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float4_e2m1fn"])
@every_layout
def test_tiny_floats_are_computed_in_float32_and_rounded_once(dtype, layout):
    rng = np.random.default_rng(0)
    values = rng.choice([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0], (4, 5))
    blocks = [{"w": np.asarray(jnp.asarray(v).astype(dtype))} for v in values]
    wide = [{"w": block["w"].astype(np.float64)} for block in blocks]
    for variant in VARIANTS:
        out = applied("window", layout, blocks, variant=variant)
        expected = oracle.window(wide, 0.3, variant=variant)
        for got, want in zip(out, expected, strict=True):
            nearest = np.asarray(jnp.asarray(want["w"], jnp.float32).astype(dtype))
            np.testing.assert_array_equal(np.asarray(got["w"]), nearest)


# float64 and complex numbers.


@every_layout
@pytest.mark.parametrize(
    "name", ["window", "laplacian", "ema", "tikhonov", "similarity", "norm_matched"]
)
def test_float64_updates_are_right_to_the_last_digits(name, layout, enable_x64):
    blocks = oracle.random_blocks(6, np.float64)
    with enable_x64():
        out = applied(name, layout, blocks)
    expected = OPERATORS[name].couple(blocks)
    for role in SHAPES:
        got, want = (np.stack([b[role] for b in x]) for x in (out, expected))
        assert got.dtype == np.float64
        assert oracle.relative_error(got, want) < 4e-15


def test_float32_states_and_updates_stay_float32_under_x64(enable_x64):
    with enable_x64():
        for name, make in OURS_ALONE.items():
            layout = STACKED
            tx = make(layout.depth)
            tree = layout.tree_of(oracle.random_blocks(3))
            state = tx.init(tree)
            out, new_state = jax.eval_shape(tx.update, tree, state, tree)
            chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            floating = [x for x in jax.tree.leaves(state) if x.dtype.kind == "f"]
            assert {x.dtype for x in floating} <= {np.dtype("float32")}, name


@every_layout
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_variants_of_a_matmul_use_hermitian_norms_of_complex_blocks(variant, layout):
    blocks = oracle.complex_blocks(5)
    kwargs = {"variant": variant, "norm_scope": "block"}
    out = applied("tikhonov", layout, blocks, **kwargs)
    matrix_of = functools.partial(oracle.tikhonov_matrix, strength=2.0)
    oracle.assert_blocks_close(out, oracle.smooth(blocks, matrix_of, **kwargs))


@every_layout
def test_diagnostics_of_complex_updates_are_real_and_hermitian(layout):
    blocks = oracle.complex_blocks(4)
    flat = np.stack([np.concatenate([x.ravel() for x in b.values()]) for b in blocks])
    norms, steps = np.linalg.norm(flat, axis=1), np.diff(flat, axis=0)
    dots = np.sum(flat[:-1].conj() * flat[1:], axis=1).real
    tree = layout.tree_of(blocks)
    (found,) = statistics_of(layout)(tree).values()
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(found.cosines, dots / norms[:-1] / norms[1:], rtol=1e-5)
    np.testing.assert_allclose(found.roughness, np.sum(np.abs(steps) ** 2), rtol=1e-6)
    batches = jax.tree.map(lambda x: jnp.stack([x, 1j * x]), tree)
    (noise,) = noise_of(layout)(batches).values()
    # u and iu: their mean is (1 + i)/2 u, each |1 - i|/2 |u| away from it.
    np.testing.assert_allclose(noise.variance, norms**2, rtol=1e-5)
    np.testing.assert_allclose(noise.squared_norm_of_mean, norms**2 / 2, rtol=1e-5)


def test_adamw_trains_complex_parameters_as_plain_loops_do():
    layout, params = STACKED, oracle.complex_blocks(3, seed=7)
    smoothing = gs.smooth_over_depth(layout.depth, 0.3)
    tx = gs.adamw(0.1, smoothing, b1=0.5, b2=0.75, weight_decay=0.2)
    state, update = tx.init(layout.tree_of(params)), quick_jit(tx.update)
    history = [oracle.complex_blocks(3, seed=seed) for seed in range(3)]
    for gradient in history:
        out, state = update(layout.tree_of(gradient), state, layout.tree_of(params))

    def adam(role, layer):
        first, second = 0.0, 0.0
        for gradient in history:
            g = gradient[layer][role].astype(np.complex128)
            first = 0.5 * first + 0.5 * g
            second = 0.75 * second + 0.25 * np.abs(g) ** 2
        return (first / (1 - 0.5**3)) / (np.sqrt(second / (1 - 0.75**3)) + 1e-8)

    direction = [{role: adam(role, layer) for role in SHAPES} for layer in range(3)]
    expected = [
        {role: -0.1 * (u[role] + 0.2 * p[role]) for role in SHAPES}
        for u, p in zip(oracle.window(direction, 0.3), params, strict=True)
    ]
    for got, want in zip(layout.layers_in(out), expected, strict=True):
        for role in SHAPES:
            assert oracle.relative_error(got[role], want[role]) < 1e-5


@pytest.mark.parametrize("learn", [gs.contrib.learn_alpha, gs.contrib.learn_operator])
def test_learners_take_complex_updates_and_learn_real_numbers(learn):
    tx = learn(optax.identity(), STACKED.depth, learning_rate=0.3)
    draws = [oracle.random_blocks(3, seed=seed) for seed in range(3)]
    (*_, (_, expected)), (*_, (_, state)) = (
        trained(tx, Layout(*STACKED[:1], tree_of, None), draws)[0]
        for tree_of in (STACKED.tree_of, turned)
    )
    # Turned by i, all inner products are what they were.
    for field in {"alpha", "weights", "signal"} & set(state._fields):
        got, want = getattr(state, field), getattr(expected, field)
        chex.assert_trees_all_close(got, want, rtol=1e-4)
        assert any(np.any(x != jnp.float32(0.1)) for x in jax.tree.leaves(got))


def turned(blocks):
    return jax.tree.map(
        lambda x: (1j * x).astype(np.complex64), STACKED.tree_of(blocks)
    )


# Weak types: what jax makes of Python numbers.


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("standard, param", 2),
        ("directional, block", 2),
        ("schedule", 2),
        ("learn_alpha", 2),
        ("learn_operator", 2),
        ("adamw", 3),  # As without smoothing: the moments are weak a step longer.
    ],
)
def test_weakly_typed_parameters_are_not_traced_anew_for_ever(name, most):
    traces = []
    tx = EVERYTHING[name](gs.scanned("blocks/"))

    def step(params, state):
        traces.append(None)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step = quick_jit(step)
    params = {"blocks": {"w": jnp.broadcast_to(jnp.asarray(1.0), (3, 2))}}
    assert params["blocks"]["w"].weak_type
    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert len(traces) <= most
    assert params["blocks"]["w"].dtype == np.float32


@pytest.mark.parametrize(
    "alpha",
    [jnp.asarray(0.3), jnp.float32(0.3), np.float64(0.3), jnp.bfloat16(0.3)],
    ids=lambda a: f"{type(a).__name__} {a.dtype}",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_strength_of_any_type_leaves_the_dtype_and_is_traced_once(alpha, dtype):
    layout = UNROLLED
    tree = layout.tree_of(oracle.random_blocks(3, jnp.dtype(dtype), {"bias": (3,)}))
    traces = []

    @quick_jit
    def smooth(alpha, tree):
        traces.append(None)
        tx = gs.smooth_over_depth(layout.depth, alpha, variant="directional")
        return tx.update(tree, tx.init(tree))[0]

    for _ in range(3):
        out = smooth(alpha, tree)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    expected = oracle.window(
        layout.layers_in(tree), float(alpha), variant="directional"
    )
    oracle.assert_blocks_close(layout.layers_in(out), expected)


# Leaves that are no updates, and updates that are no jax arrays.

NO_UPDATES = {
    "typed key": lambda: jax.random.key(0),
    "int8": lambda: jnp.arange(3, dtype=jnp.int8),
    "uint32": lambda: jnp.arange(3, dtype=jnp.uint32),
    "int4": lambda: jnp.arange(3).astype(jnp.int4),
    "bool": lambda: jnp.array([True, False]),
    "Python int": lambda: 10**6,
    "Python bool": lambda: True,
    "text": lambda: "mlp",
    "object": object,
    "NumPy objects": lambda: np.array([object()]),
    "NumPy dates": lambda: np.array(["2026-01-01"], "datetime64[D]"),
    "NumPy records": lambda: np.zeros(2, [("a", "f4")]),
}


def trees_with_leaves_that_are_no_updates():
    return [
        {"w": jnp.ones(2) * i, **{kind: make() for kind, make in NO_UPDATES.items()}}
        for i in range(3)
    ]


@pytest.mark.parametrize("name", OURS_ALONE)
def test_a_leaf_that_is_no_update_comes_back_as_the_same_object(name):
    tree = trees_with_leaves_that_are_no_updates()
    # Momentum is not ours to keep of them.
    tx = EVERYTHING[name](gs.unrolled())
    if name == "with_depth_smoothing":
        smoothing = gs.smooth_over_depth(gs.unrolled(), scheduled)
        tx = gs.with_depth_smoothing(optax.identity(), smoothing)
    out, _ = tx.update(tree, tx.init(tree))
    for before, after in zip(tree, out, strict=True):
        assert [kind for kind in NO_UPDATES if after[kind] is not before[kind]] == []


def test_descriptions_and_diagnostics_leave_out_what_is_no_update():
    tree = trees_with_leaves_that_are_no_updates()
    (found,) = gs.diagnostics.depth_statistics(tree, gs.unrolled()).values()
    assert set(found.roles) == {"w"}
    summary = gs.describe(gs.unrolled(), tree)
    assert [group.role for group in summary.groups] == ["w"]
    assert str(summary)
    assert str(gs.detect(tree))


def layers_as(convert):
    return [{"w": convert(np.arange(3) ** 2 * (i - 1.0))} for i in range(4)]


def read_only(x):
    x = x.astype(np.float32)
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "convert",
    [
        read_only,
        lambda x: x.astype(np.float16),
        lambda x: np.asfortranarray(np.stack([x, x], 1).astype(np.float32)),
        lambda x: np.repeat(x, 2).astype(np.float32)[::2],
        lambda x: np.float32(x[2]),
        lambda x: float(x[2]),
        lambda x: complex(x[2], 1.0),
    ],
    ids=[
        *("read-only", "half", "Fortran", "strided"),
        *("NumPy scalar", "float", "complex"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_arrays_and_python_numbers_are_updates_and_never_written_to(
    convert, variant
):
    tree = layers_as(convert)
    before = copy.deepcopy(tree)
    kwargs = {"variant": variant, "norm_scope": "block"}
    tx = gs.smooth_over_depth(gs.unrolled(), 0.3, **kwargs)
    out, _ = tx.update(tree, tx.init(tree))
    oracle.assert_blocks_close(out, oracle.window(before, 0.3, **kwargs))
    for layer, same in zip(tree, before, strict=True):
        np.testing.assert_array_equal(layer["w"], same["w"])


@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble, ">f4"])
def test_dtypes_that_jax_lacks_are_refused_and_never_rounded_silently(dtype):
    if np.dtype(dtype) in (np.dtype("float64"), np.dtype("complex128")):
        pytest.skip("long double is float64 here")
    tree = layers_as(lambda x: x.astype(dtype))
    tx = gs.smooth_over_depth(gs.unrolled(), 0.3)
    with pytest.raises(TypeError):
        tx.update(tree, tx.init(tree))


@every_transformation
def test_one_array_object_at_several_leaves_is_as_good_as_copies_of_it(name):
    x, y = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    shared = [{"w": x, "b": x}, {"w": y, "b": x}, {"w": x, "b": y}]
    copies = jax.tree.map(jnp.array, shared)
    tx = EVERYTHING[name](gs.unrolled())
    out, expected = (updated(tx, tree)[0] for tree in (shared, copies))
    chex.assert_trees_all_equal(out, expected)


def test_paths_of_thousands_of_characters_are_found_and_shown():
    name = "module_" + "x" * 5000
    tree = {f"layers_{i}": {name: {name: jnp.ones(2) * i}} for i in range(3)}
    nested = jnp.ones(2)
    for _ in range(200):
        nested = {"inner": nested}
    tree = {**tree, "head": nested}
    tx = gs.smooth_over_depth(gs.unrolled(), 0.5)
    out, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_array_equal(out["layers_1"][name][name], [1.0, 1.0])
    assert out["layers_0"][name][name][0] == 0.25
    assert name in str(gs.describe(gs.unrolled(), tree))


@pytest.mark.parametrize("name", ["with_depth_smoothing", "momentum", "learn_alpha"])
def test_parameters_need_not_be_passed(name):
    layout = STACKED
    tree = layout.tree_of(oracle.random_blocks(3))
    tx = EVERYTHING[name](layout.depth)
    without, _ = tx.update(tree, tx.init(tree))
    with_them, _ = tx.update(tree, tx.init(tree), tree)
    chex.assert_trees_all_equal(without, with_them)


@every_transformation
def test_trees_without_arrays_pass_through(name):
    tx = EVERYTHING[name](gs.unrolled())
    for tree in ({}, [None, None], {"layers_0": {"w": None}, "b": ()}):
        out, _ = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(out) == jax.tree.structure(tree)


# jax's debugging modes.

DTYPES = {
    "float32": ["float32"],
    "bfloat16": ["bfloat16"],
    "float16": ["float16"],
    "float64": ["float64"],
    "complex64": ["complex64"],
    "mixed": ["bfloat16", "float32", "float16"],
    "mixed, x64": ["bfloat16", "float32", "float64", "complex64", "complex128"],
}


def tree_of_dtypes(dtypes, layout):
    blocks = [
        {f"of_{dtype}": np.ones((2, 3), jnp.dtype(dtype)) for dtype in dtypes}
        for _ in range(3)
    ]
    return layout.tree_of(blocks)


def assert_traces_strictly(tx, tree):
    """`init` and `update` promote neither dtypes nor ranks, and keep dtypes."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, tree)
        out, new_state = jax.eval_shape(tx.update, tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


# A layout has a code of its own; a dtype alone has none that others do not have.
IN_EVERY_DTYPE = [
    *((name, "stacked") for name in DTYPES),
    *((name, "unrolled") for name in ("mixed", "mixed, x64")),
]
in_every_dtype = pytest.mark.parametrize(
    ("dtypes", "layout"),
    [(DTYPES[name], LAYOUTS[layout]) for name, layout in IN_EVERY_DTYPE],
    ids=map(", ".join, IN_EVERY_DTYPE),
)


@in_every_dtype
def test_nothing_of_ours_promotes_dtypes_or_ranks(dtypes, layout, enable_x64):
    with enable_x64():
        tree = tree_of_dtypes(dtypes, layout)
        for name in set(TRANSFORMATIONS) & set(OURS_ALONE):
            assert_traces_strictly(EVERYTHING[name](layout.depth), tree)
        for twin in OPERATORS.values() if len(dtypes) > 1 else ():
            tx = gs.smooth_over_depth(layout.depth, twin.make())
            assert_traces_strictly(tx, tree)


@pytest.mark.parametrize(
    "alpha",
    [
        np.float16(0.25),
        jnp.asarray(0.25),
        jnp.float32(0.25),
        jnp.bfloat16(0.25),
        lambda count: 0.25,
        lambda count: np.float64(0.25),
        lambda count: jnp.bfloat16(0.25),
        optax.linear_schedule(0.0, 0.5, 10),
    ],
    ids=[
        "NumPy",
        "weak",
        "float32",
        "bfloat16",
        "of float",
        "of NumPy",
        "of bf16",
        "linear",
    ],
)
def test_a_strength_of_any_type_promotes_nothing(alpha, enable_x64):
    operators = [
        gs.window(alpha, 2, decay=alpha),
        gs.laplacian(alpha),
        gs.ema(alpha),
        gs.tikhonov(alpha),
        gs.gaussian(alpha, radius=2),
        gs.similarity_window(alpha, sharpness=alpha),
        gs.repeat(gs.window(alpha), 2),
        gs.compose(gs.window(alpha), gs.ema(0.1)),
        gs.controls.norm_matched(gs.window(alpha)),
        gs.controls.shuffled(gs.window(alpha), 0),
    ]
    with enable_x64():
        tree = tree_of_dtypes(DTYPES["mixed, x64"], STACKED)
        for operator in operators:
            tx = gs.smooth_over_depth(STACKED.depth, operator)
            assert_traces_strictly(tx, tree)


@pytest.mark.parametrize("name", LEARNERS)
@every_layout
def test_learners_promote_nothing_in_updates_of_up_to_float32(name, layout):
    for dtypes in ("float32", "bfloat16", "float16", "mixed"):
        tree = tree_of_dtypes(DTYPES[dtypes], layout)
        assert_traces_strictly(EVERYTHING[name](layout.depth), tree)


@in_every_dtype
def test_depth_statistics_promote_nothing(dtypes, layout, enable_x64):
    with enable_x64():
        tree = tree_of_dtypes(dtypes, layout)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            jax.eval_shape(
                lambda tree: gs.diagnostics.depth_statistics(tree, layout.depth), tree
            )


@pytest.mark.parametrize(
    "name", ["directional, block", "wide", "similarity", "adamw", *LEARNERS]
)
def test_no_tracer_leaks(name):
    for layout in LAYOUTS.values() if "learn" not in name else [STACKED]:
        tree = layout.tree_of(oracle.random_blocks(2))
        tx = EVERYTHING[name](layout.depth)
        with jax.checking_leaks():
            jax.jit(tx.update).trace(tree, tx.init(tree), tree)


@in_both_layouts
def test_a_compiled_step_transfers_nothing_and_is_traced_once(name, layout):
    tx, update, traces = steps_of(name, layout)
    tree = tree_with_empty_leaves(layout)
    _, state = update(tree, tx.init(tree), tree)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            update(jax.tree.map(np.asarray, tree), state, tree)  # The guard is on.
        for _ in range(2):
            _, state = update(tree, state, tree)
    assert len(traces) == 1


def test_without_jit_the_numbers_are_the_same():
    tx, update, _ = steps_of("similarity", STACKED)
    tree = tree_with_empty_leaves(STACKED)
    expected, _ = update(tree, tx.init(tree), tree)
    with jax.disable_jit():
        out, _ = updated(tx, tree)
    chex.assert_trees_all_close(out, expected, rtol=2e-5, atol=1e-6)


# Threads.


def test_threads_that_build_and_trace_at_once_get_the_serial_results():
    blocks = oracle.random_blocks(3)
    names = ("directional, block", "wide", "similarity", "learn_alpha", "adamw")
    jobs = [(name, layout) for name in names for layout in LAYOUTS] * 2

    def run(job, barrier=None):
        name, layout = job[0], LAYOUTS[job[1]]
        if barrier is not None:
            barrier.wait(timeout=60)
        tree = layout.tree_of(blocks)
        tx = EVERYTHING[name](layout.depth)
        program = str(jax.make_jaxpr(tx.update)(tree, tx.init(tree), tree))
        out = updated(tx, tree) if name == "directional, block" else None
        summary = str(gs.describe(layout.depth, tree))
        return jax.tree.map(np.asarray, out), program, summary, repr(layout.depth)

    serial = [run(job) for job in jobs]
    barrier = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        parallel = list(pool.map(functools.partial(run, barrier=barrier), jobs))
    for one, other in zip(serial, parallel, strict=True):
        chex.assert_trees_all_equal(one[0], other[0])
        assert one[1:] == other[1:]


def test_threads_see_equal_specs_and_operators_as_one():
    def build(_):
        return (
            gs.first_match(gs.scanned("blocks/"), gs.layouts.maxtext()),
            gs.compose(gs.window(0.1, 2), gs.dense(np.eye(3))),
            gs.controls.shuffled(gs.tikhonov(1.0), 3).matrix(9).tobytes(),
        )

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(build, range(64)))) == 1


# Pickles and copies. By their source, so that another process can make them anew.

VALUES = [
    "gs.Depth('net', ('mlp', 1), 3, axis=(0, 1), stride=(2, 1))",
    "gs.unrolled()",
    "gs.unrolled(r'layers_(\\d+)/', start=2, stack=('a', 1))",
    "gs.scanned('blocks/', axis=(0, 1), stride=(4, 1))",
    "gs.first_match(gs.scanned('b/'), gs.ranked(gs.unrolled()))",
    "gs.unrolled().only(callable)",
    "gs.unrolled().only_projections(bias=False)",
    "gs.depth_fn(divmod)",
    "gs.layouts.flax_linen(scan_axis=(0, 1))",
    "gs.layouts.flax_nnx()",
    "gs.layouts.equinox()",
    "gs.layouts.haiku()",
    "gs.layouts.hf_flax()",
    "gs.layouts.big_vision()",
    "gs.layouts.gemma(interleaved=True)",
    "gs.layouts.levanter()",
    "gs.layouts.t5x()",
    "gs.layouts.uvit()",
    "gs.layouts.maxtext(cycle=6, num_cycles=10)",
    "gs.layouts.maxtext_gemma2()",
    "gs.layouts.maxtext_gemma4()",
    "gs.layouts.maxtext_deepseek(3)",
    "gs.window(0.1, 3, decay=0.5)",
    "gs.window(jnp.float32(0.1))",
    "gs.window(np.array(0.1))",
    "gs.window(abs)",
    "gs.laplacian(0.1)",
    "gs.ema(0.1, reverse=True)",
    "gs.gaussian(1.0)",
    "gs.tikhonov(2.0)",
    "gs.mean_over_depth()",
    "gs.dense(np.eye(3))",
    "gs.dense(jnp.eye(3))",
    "gs.compose(gs.window(0.1), gs.ema(0.2))",
    "gs.repeat(gs.window(0.1), 3)",
    "gs.operator_fn(np.eye)",
    "gs.similarity_window(0.1, 'param', 2.0)",
    "gs.controls.norm_matched(gs.window(0.1))",
    "gs.controls.shuffled(gs.window(0.1), 3)",
]


def made(source):
    return eval(source, {"gs": gs, "jnp": jnp, "np": np})


@pytest.mark.parametrize("source", VALUES)
def test_pickles_of_every_protocol_and_copies_are_equal_and_hash_alike(source):
    value = made(source)
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    again = [pickle.loads(pickle.dumps(value, protocol)) for protocol in protocols]
    for same in (*again, copy.copy(value), copy.deepcopy(value), made(source)):
        assert type(same) is type(value)
        assert same == value
        assert hash(same) == hash(value)
        assert repr(same) == repr(value)


def test_pickles_are_equal_and_hash_alike_in_another_process(tmp_path):
    saved = tmp_path / "values.pickle"
    saved.write_bytes(pickle.dumps([(source, made(source)) for source in VALUES]))
    script = """
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
    used = tmp_path / "used.pickle"
    used.write_bytes(pickle.dumps((gs.scanned("blocks/"), gs.window(0.5))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(saved), str(used)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            # Another seed of the hashes of strings.
            "PYTHONHASHSEED": "7",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.25, 1.0, 1.75]"


@every_transformation
def test_a_run_goes_on_from_a_pickled_or_copied_state(name):
    tx, update, _ = steps_of(name, STACKED)
    first, second = (tree_with_empty_leaves(STACKED, seed) for seed in (0, 1))
    _, state = update(first, tx.init(first), first)
    expected = update(second, state, first)
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert jax.tree.structure(again) == jax.tree.structure(state)
        chex.assert_trees_all_equal(update(second, again, first), expected)


# Bugs that these tests found.


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_run_without_jit_under_debug_nans(name):
    layout = STACKED
    tree = layout.tree_of(oracle.random_blocks(3))
    with jax.debug_nans(True):
        updated(EVERYTHING[name](layout.depth), tree)


@pytest.mark.parametrize("dtypes", ["float64", "complex64", "mixed, x64"])
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_promote_nothing_in_updates_of_any_dtype(name, dtypes, enable_x64):
    with enable_x64():
        tree = tree_of_dtypes(DTYPES[dtypes], STACKED)
        assert_traces_strictly(EVERYTHING[name](STACKED.depth), tree)


@pytest.mark.parametrize("learn", [gs.contrib.learn_alpha, gs.contrib.learn_operator])
def test_numbers_given_to_learners_promote_nothing(learn):
    tree = tree_of_dtypes(DTYPES["float32"], STACKED)
    half = {n: jnp.bfloat16(0.25) for n in ("alpha", "learning_rate", "decay")}
    tx = learn(optax.identity(), STACKED.depth, **half)
    assert_traces_strictly(tx, tree)


@every_layout
def test_gradient_noise_promotes_no_ranks(layout):
    tree = layout.tree_of(oracle.random_blocks(3))
    batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(
            lambda batches: gs.diagnostics.gradient_noise(batches, layout.depth),
            batches,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("score", ["line_shape_score", "residual_alignment"])
def test_scores_of_residual_streams_promote_nothing(score, dtype):
    states = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(getattr(gs.diagnostics, score), states)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_norms_are_right_up_to_where_their_squares_overflow(variant):
    assert error_at(9e18, np.float32, variant, "stacked") < 1e-6


@every_layout
def test_a_layer_of_zeros_stays_zero_norm_matched_beside_one_that_overflows(layout):
    blocks = [{"w": np.full(3, x, np.float32)} for x in (1.0, 0.0, 1e20)]
    out = applied("norm_matched", layout, blocks)
    np.testing.assert_array_equal(out[1]["w"], np.zeros(3))


@every_layout
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_norms_whose_squares_overflow_are_right(variant, layout):
    blocks = [{"w": np.full(3, 1e20, np.float32) * i} for i in (1, -2, 3)]
    out = applied("window", layout, blocks, variant=variant)
    small = [{"w": 1e-20 * np.float64(block["w"])} for block in blocks]
    want = applied("window", layout, small, variant=variant)
    for block, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(1e-20 * block["w"], expected["w"], rtol=1e-5)


@every_layout
def test_a_norm_that_float32_cannot_hold_makes_no_finite_directions(layout):
    blocks = [{"w": np.full(3, x, np.float32)} for x in (3e38, -1.0, 1.0, 1.0)]
    out = applied("window", layout, blocks, variant="directional")
    assert not any(np.isfinite(block["w"]).any() for block in out[:2])
    assert all(np.isfinite(block["w"]).all() for block in out[2:])


def test_muon_takes_matrices_without_entries():
    params = {"blocks": {"w": jnp.zeros((3, 0, 4)), "v": jnp.ones((3, 4, 4))}}
    depth = gs.scanned("blocks/")
    tx = gs.muon(1e-3, depth, gs.smooth_over_depth(depth), ns_steps=1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["blocks"]["w"].shape == (3, 0, 4)
    assert np.isfinite(updates["blocks"]["v"]).all()
