import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from benchmarks import training
from benchmarks.data.corpus import sample_windows, spread_windows
from benchmarks.models.gpt import GPT, init_gpt, mean_loss, next_token_loss
from benchmarks.optimizers import (
    hidden_matrices,
    matrices,
    muon_numbers,
    smoothed_optimizer,
    warmup_cosine,
)

MODEL = GPT(256, layers=2, width=8, heads=2, context=8)
TEXT = np.frombuffer(b"All work and no play makes Jack a dull boy.\n" * 20, np.uint8)
INIT = init_gpt(MODEL)
SEEDS = jnp.arange(2)


@functools.cache
def trainer(seeds: int):
    """A compiled trainer of as many seeds, with its optimizer."""
    optimizer = smoothed_optimizer("adamw", 1e-2, 0.2, weight_decay=0.1, clip=1.0)
    loss = functools.partial(next_token_loss, MODEL)
    draw = functools.partial(sample_windows, batch=2, context=8)
    return optimizer, training.train_steps(loss, optimizer, draw, 10)


@functools.cache
def initial_params(num_seeds: int):
    return training.init_params(INIT, SEEDS[:num_seeds])


def trained(num_seeds: int, calls: list[int]):
    optimizer, run = trainer(num_seeds)
    seeds = SEEDS[:num_seeds]
    state = training.init_state(optimizer, initial_params(num_seeds))
    text, start, losses = jnp.asarray(TEXT), 0, []
    for count in calls:
        state, some = run(state, seeds, text, np.int32(start), np.int32(count))
        losses.append(some[:count])
        start += count
    return state, np.concatenate(losses)


def test_vmapped_seeds_train_like_a_seed_alone():
    together, losses = trained(2, [6])
    alone, loss = trained(1, [6])
    np.testing.assert_allclose(losses[:, :1], loss, rtol=1e-4)
    jax.tree.map(
        # Adam turns a rounding difference in a gradient near 0 into part of a step.
        lambda many, one: np.testing.assert_allclose(many[0], one[0], atol=2e-3),
        together.params,
        alone.params,
    )
    # Seeds differ in initialization and data.
    assert not np.isclose(*losses[0])


def test_how_a_run_is_cut_into_calls_changes_no_bit():
    at_once, losses = trained(2, [9])
    in_parts, losses_of_parts = trained(2, [1, 5, 3])
    np.testing.assert_array_equal(losses, losses_of_parts)
    jax.tree.map(np.testing.assert_array_equal, at_once, in_parts)


def test_training_learns_the_text():
    _, losses = trained(2, [10] * 12)
    assert losses[0] == pytest.approx(np.log(256), rel=0.05)
    assert np.all(losses[-1] < 3.0)


def test_arms_share_their_initial_parameters_but_not_their_memory():
    params = initial_params(2)
    first = training.init_state(optax.sgd(0.1), params)
    second = training.init_state(optax.adam(0.1), params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    jax.tree.map(lambda leaf: leaf.delete(), first.params)
    assert np.isfinite(jax.tree.leaves(second.params)[0]).all()


def test_the_evaluation_is_the_mean_over_all_windows():
    params = initial_params(2)
    windows = spread_windows(TEXT, num_windows=7, context=8)
    # Seven windows, three at once: the rest counts too.
    evaluate = functools.partial(
        mean_loss, MODEL, windows=jnp.asarray(windows), at_once=3
    )
    losses = jax.jit(jax.vmap(evaluate))(params)
    predict = jax.jit(jax.vmap(lambda p: MODEL.apply({"params": p}, windows[:, :-1])))
    logits = np.asarray(predict(params), np.float64)  # (S, windows, context, 256)
    normalizer = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, windows[None, :, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, (normalizer - picked).mean((1, 2)), rtol=1e-5)


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


def random_tree(seed):
    """Random values for all parameters of a model with every kind of them."""
    model = GPT(256, 3, 8, heads=2, context=8, rotary=False, tied=False)
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


PLAIN = {
    "adamw": optax.adamw(0.1, b2=0.95, weight_decay=0.1, mask=matrices),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "muon": contrib.muon(
        0.1,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=functools.partial(muon_numbers, hidden_matrices),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_alpha_0_is_the_plain_base_optimizer_and_another_alpha_is_not(name):
    decay = 0.1 if name == "adamw" else 0.0
    plain, base, smoothed = updates_of(
        PLAIN[name],
        smoothed_optimizer(name, 0.1, 0.0, weight_decay=decay),
        smoothed_optimizer(name, 0.1, 0.2, weight_decay=decay),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, base, plain)
    close(smoothed["embed"]["embedding"], plain["embed"]["embedding"])
    kernels = (tree["blocks"]["mlp_in"]["kernel"] for tree in (plain, smoothed))
    assert not np.allclose(*kernels)


def test_projection_scope_leaves_norm_scales_alone():
    full, projections, base = (
        tree["blocks"]
        for tree in updates_of(
            smoothed_optimizer("sgd", 0.1, 0.2, scope="full"),
            smoothed_optimizer("sgd", 0.1, 0.2, scope="proj"),
            smoothed_optimizer("sgd", 0.1, 0.0),
        )
    )
    scales = [tree["mlp_norm"]["scale"] for tree in (full, projections, base)]
    np.testing.assert_array_equal(scales[1], scales[2])
    assert not np.allclose(scales[0], scales[2])
    kernels = [tree["mlp_in"]["kernel"] for tree in (full, projections)]
    np.testing.assert_allclose(*kernels, rtol=1e-6)


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
    tables = {"embed/embedding", "positions/embedding", "head/kernel"}
    assert chosen(matrices(params)) == hidden | tables
    assert chosen(hidden_matrices(params)) == hidden


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no optimizer 'adam'.*adamw"):
        smoothed_optimizer("adam", 0.1, 0.1)


def test_the_schedule_rises_linearly_and_falls_to_a_tenth():
    schedule = warmup_cosine(2.0, warmup=4, steps=20)
    values = [float(schedule(step)) for step in range(21)]
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(values[12], 1.1, rtol=1e-6)  # Half of the way down.
    np.testing.assert_allclose(values[20], 0.2, rtol=1e-6)
    assert np.all(np.diff(values[4:]) < 0)
    assert warmup_cosine(2.0, warmup=0, steps=20)(0) == 2.0
