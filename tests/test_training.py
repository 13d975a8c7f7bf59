"""The trainer of many seeds at once, and the base optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gradsmooth_optax as gs
from benchmarks import training
from benchmarks.models.gpt import GPT
from benchmarks.optimizers import (
    hidden_matrices,
    matrices,
    smoothed_optimizer,
    warmup_cosine,
)

SEEDS = jnp.arange(2)
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
ADAM = optax.adam(0.1)


def init(key):
    return {"w": jax.random.normal(key, (3,))}


def draw(data, key, step):
    rows = jax.random.randint(jax.random.fold_in(key, step), (4,), 0, len(data))
    return data[rows]


def loss(params, rows):
    return jnp.mean((rows @ params["w"] - rows[:, 0]) ** 2)


@functools.cache
def trainer():
    return training.train_steps(loss, ADAM, draw, 10)


def trained(calls):
    state = training.init_state(ADAM, training.init_params(init, SEEDS))
    start, losses = 0, []
    for count in calls:
        counts = np.int32(start), np.int32(count)
        state, some = trainer()(state, SEEDS, DATA, *counts)
        losses.append(some[:count])
        start += count
    return state, np.concatenate(losses)


def test_seeds_at_once_train_as_a_loop_over_seeds_and_steps():
    state, losses = trained([3])
    params = training.init_params(init, SEEDS)
    for lane, seed in enumerate(SEEDS):
        one = jax.tree.map(lambda leaf, k=lane: leaf[k], params)
        adam = ADAM.init(one)
        for step in range(3):
            batch = draw(DATA, training.data_key(seed), step)
            value, gradient = jax.value_and_grad(loss)(one, batch)
            np.testing.assert_allclose(losses[step, lane], value, rtol=1e-4)
            updates, adam = ADAM.update(gradient, adam)
            one = optax.apply_updates(one, updates)
        np.testing.assert_allclose(state.params["w"][lane], one["w"], rtol=1e-4)
    # Seeds differ in initialization and data.
    assert not np.isclose(*losses[0])


def test_how_a_run_is_cut_into_calls_changes_no_bit():
    at_once, losses = trained([9])
    in_parts, losses_of_parts = trained([1, 5, 3])
    np.testing.assert_array_equal(losses, losses_of_parts)
    jax.tree.map(np.testing.assert_array_equal, at_once, in_parts)


def test_arms_share_their_initial_parameters_but_not_their_memory():
    params = training.init_params(init, SEEDS)
    first = training.init_state(optax.sgd(0.1), params)
    second = training.init_state(ADAM, params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    jax.tree.map(lambda leaf: leaf.delete(), first.params)
    assert np.isfinite(second.params["w"]).all()


# Steps of several updates, on parameters of one vector and a parabola.

TARGETS = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)  # of every step
STARTS = np.array([[3, -2], [0.5, 4]], np.float32)  # of every seed
RATE, MOMENTUM = 0.1, 0.5


def parabola(params, target):
    return jnp.sum(jnp.square(params - target)) / 2


def three_targets(params, drawn):
    """Between the parameters and what was drawn, and on either side of them."""
    return jnp.stack([drawn, 2 * params - drawn, (params + drawn) / 2])


@functools.cache
def with_rollout(rollout, momentum=MOMENTUM):
    """The last parameters and the losses of every step, and of every seed."""
    optimizer = optax.sgd(RATE, momentum)
    run = training.train_steps(
        *(parabola, optimizer, lambda data, key, step: data[step], 5), rollout
    )
    state = training.init_state(optimizer, jnp.asarray(STARTS))
    state, losses = run(state, SEEDS, jnp.asarray(TARGETS), np.int32(0), np.int32(4))
    return np.asarray(state.params), np.asarray(losses)


def by_loops(start):
    """The same of one seed in plain Python, with every update's loss."""
    params, trace, losses = np.array(start, float), np.zeros(2), []
    for drawn in TARGETS:
        before, of_step = params.copy(), []
        for target in (drawn, 2 * before - drawn, (before + drawn) / 2):
            of_step.append(np.sum((params - target) ** 2) / 2)
            trace = MOMENTUM * trace + params - target
            params = params - RATE * trace
        losses.append(of_step)
    return params, np.array(losses)


def test_a_step_with_a_rollout_updates_on_each_of_its_batches_in_turn():
    params, _ = with_rollout(three_targets)
    for found, start in zip(params, STARTS, strict=True):
        np.testing.assert_allclose(found, by_loops(start)[0], rtol=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_updates():
    _, losses = with_rollout(three_targets)
    assert losses.shape == (5, 2)
    for found, start in zip(losses[:4].T, STARTS, strict=True):
        np.testing.assert_allclose(found, by_loops(start)[1].mean(1), rtol=1e-5)
    assert np.isnan(losses[4]).all()  # a step that was not asked for


def ahead(params, drawn):
    return jnp.stack([params + 1] * 3)


def test_all_batches_of_a_step_are_made_of_the_parameters_before_it():
    params, losses = with_rollout(ahead, momentum=0.0)
    # Towards one place that stays; if it moved along, each would go a tenth of 1.
    left = 0.9 ** np.arange(3)
    np.testing.assert_allclose(params - STARTS, 4 * (1 - 0.9**3), rtol=1e-5)
    np.testing.assert_allclose(losses[:4], np.mean(left**2), rtol=1e-4)


def only_what_was_drawn(params, drawn):
    return drawn[None]


def test_a_rollout_of_what_was_drawn_alone_is_none():
    for found, expected in zip(
        with_rollout(only_what_was_drawn), with_rollout(None), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# The base optimizers, on random values for all parameters of a GPT.


def random_tree(seed):
    model = GPT(256, 3, 8, heads=2, context=8)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def updates_of(*optimizers):
    """The updates of every optimizer after two steps on the same random gradients."""
    params = random_tree(0)

    @jax.jit
    def steps(first, second):
        updates = []
        for optimizer in optimizers:
            state = optimizer.init(params)
            _, state = optimizer.update(first, state, params)
            updates.append(optimizer.update(second, state, params)[0])
        return updates

    return steps(random_tree(1), random_tree(2))


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
    plain, base, smoothed = updates_of(
        PLAIN[name],
        smoothed_optimizer(name, 0.1, weight_decay=decay),
        smoothed_optimizer(name, 0.1, smoothing, weight_decay=decay),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, base, plain)
    close(smoothed["embed"]["embedding"], plain["embed"]["embedding"])
    kernels = (tree["blocks"]["mlp_in"]["kernel"] for tree in (plain, smoothed))
    assert not np.allclose(*kernels)


def test_weight_decay_and_muon_take_matrices_by_their_rank_per_layer():
    params = random_tree(0)

    def chosen(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, is_chosen in jax.tree_util.tree_leaves_with_path(tree)
            if is_chosen
        }

    hidden = {
        f"blocks/{role}/kernel"
        for role in (
            "attention/query",
            "attention/key",
            "attention/value",
            "attention/out",
            "mlp_in",
            "mlp_out",
        )
    }
    tables = {"embed/embedding"}
    assert chosen(matrices(params)) == hidden | tables
    assert chosen(hidden_matrices(params)) == hidden


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no optimizer 'adam'.*adamw"):
        smoothed_optimizer("adam", 0.1)


def test_the_schedule_rises_linearly_and_falls_to_a_tenth():
    schedule = warmup_cosine(2.0, warmup=4, steps=20)
    values = [float(schedule(step)) for step in range(21)]
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(values[12], 1.1, rtol=1e-6)  # Half of the way down.
    np.testing.assert_allclose(values[20], 0.2, rtol=1e-6)
    assert np.all(np.diff(values[4:]) < 0)
    assert warmup_cosine(2.0, warmup=0, steps=20)(0) == 2.0
