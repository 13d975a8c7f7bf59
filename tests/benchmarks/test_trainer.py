"""The trainer of many seeds at once, the base optimizers, and paired differences."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from small_tasks import by_path, random_like

import gradsmooth_optax as gs
from benchmarks import comparison, training
from benchmarks.optimizers import (
    hidden_matrices,
    matrices,
    smoothed_optimizer,
    warmup_cosine,
)

SEEDS = jnp.arange(2)
TARGETS = np.random.default_rng(0).normal(size=(9, 2)).astype("f4")  # of every step
RATE, MOMENTUM = 0.1, 0.5


def init(key):
    return jax.random.normal(key, (2,))


def draw(data, key, step):
    return data[step] + jax.random.normal(jax.random.fold_in(key, step), (2,))


def loss(params, target):
    return jnp.sum(jnp.square(params - target)) / 2


def three_targets(params, drawn):
    """Between the parameters and what was drawn, and on either side of them."""
    return jnp.stack([drawn, 2 * params - drawn, (params + drawn) / 2])


@functools.cache
def trained(rollout, calls):
    optimizer = optax.sgd(RATE, MOMENTUM)
    run = training.train_steps(loss, optimizer, draw, 10, rollout)
    state = training.init_state(optimizer, training.init_params(init, SEEDS))
    start, losses = 0, []
    for count in calls:
        counts = np.int32(start), np.int32(count)
        state, some = run(state, SEEDS, jnp.asarray(TARGETS), *counts)
        assert np.isnan(some[count:]).all()  # steps that were not asked for
        losses.append(some[:count])
        start += count
    return np.asarray(state.params), np.concatenate(losses)


@pytest.mark.parametrize("rollout", [None, three_targets])
def test_seeds_at_once_train_as_plain_loops_over_seeds_steps_and_updates(rollout):
    found, losses = trained(rollout, (3,))
    for lane, seed in enumerate(SEEDS):
        params = np.asarray(training.init_params(init, SEEDS)[lane], np.float64)
        trace = np.zeros(2)
        for step in range(3):
            drawn = np.asarray(draw(TARGETS, training.data_key(seed), step))
            # All batches of a step are made of the parameters before it.
            targets = [drawn] if rollout is None else rollout(params, drawn)
            of_step = []
            for target in np.asarray(targets):
                of_step.append(np.sum((params - target) ** 2) / 2)
                trace = MOMENTUM * trace + params - target
                params = params - RATE * trace
            np.testing.assert_allclose(losses[step, lane], np.mean(of_step), rtol=1e-4)
        np.testing.assert_allclose(found[lane], params, rtol=1e-4)
    # Seeds differ in initialization and data.
    assert not np.isclose(*losses[0])


def test_how_a_run_is_cut_into_calls_changes_no_bit():
    for whole, parts in zip(trained(None, (9,)), trained(None, (1, 5, 3)), strict=True):
        np.testing.assert_array_equal(whole, parts)


def test_arms_share_their_initial_parameters_but_not_their_memory():
    params = training.init_params(init, SEEDS)
    first, second = (training.init_state(optax.sgd(0.1), params) for _ in range(2))
    np.testing.assert_array_equal(first.params, second.params)
    first.params.delete()
    assert np.isfinite(second.params).all()


# The base optimizers, on a tree as those of scanned models are.

SHAPES = {
    "blocks": {
        "mlp": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), "f4")},
        "norm": {"scale": jax.ShapeDtypeStruct((3, 4), "f4")},
    },
    "embed": jax.ShapeDtypeStruct((7, 4), "f4"),
    "final_norm": jax.ShapeDtypeStruct((4,), "f4"),
}
NUMBERS = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
PLAIN = {
    "adamw": optax.adamw(0.1, b2=0.95, weight_decay=0.1, mask=matrices),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "muon": contrib.muon(
        0.1,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda is_hidden: NUMBERS if is_hidden else None, hidden_matrices(params)
        ),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_smoothing_it_is_the_plain_base_optimizer_and_with_it_is_not(name):
    decay = 0.1 if name == "adamw" else 0.0
    smoothing = gs.smooth_over_depth(gs.scanned("blocks/"), 0.2)
    arms = [PLAIN[name], smoothed_optimizer(name, 0.1, weight_decay=decay)]
    arms.append(smoothed_optimizer(name, 0.1, smoothing, weight_decay=decay))
    params, first, second = (random_like(SHAPES, seed, 1.0) for seed in range(3))

    def updated(optimizer):
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(second, state, params)[0]

    plain, base, smoothed = jax.jit(lambda: [updated(arm) for arm in arms])()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, base, plain)
    close(smoothed["embed"], plain["embed"])
    kernels = (tree["blocks"]["mlp"]["kernel"] for tree in (plain, smoothed))
    assert not np.allclose(*kernels)


def test_matrices_are_told_by_their_rank_per_layer():
    for choose, pattern in ((matrices, "kernel|embed"), (hidden_matrices, "kernel")):
        for path, is_chosen in by_path(choose(SHAPES)).items():
            assert is_chosen == bool(re.search(pattern, path)), path


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no optimizer 'adam'.*adamw"):
        smoothed_optimizer("adam", 0.1)


def test_the_schedule_rises_linearly_and_falls_to_a_tenth():
    values = np.asarray(jax.vmap(warmup_cosine(2.0, 4, steps=20))(jnp.arange(21)))
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(values[[12, 20]], [1.1, 0.2], rtol=1e-6)
    assert np.all(np.diff(values[4:]) < 0)
    assert warmup_cosine(2.0, warmup=0, steps=20)(0) == 2.0


# Paired differences.


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_seed_is_not_dropped_and_loses_to_a_finite_one(bad):
    diverged, finite = np.array([1.0, bad, 1.0]), np.array([2.0, 2.0, 2.0])
    found = comparison.paired_difference(diverged, finite)
    assert math.isnan(found.mean)
    assert math.isnan(found.half_width)
    assert found.wins == 2
    assert comparison.format_difference(found) == "nan"
    assert comparison.paired_difference(finite, diverged).wins == 1
