"""A state that was made by other settings is an error that says how to go on."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

DEPTH = gs.scanned("blocks/")
PARAMS = {"blocks": {"w": jnp.arange(6.0).reshape(3, 2)}, "head": jnp.ones(2)}
RAMP = optax.linear_schedule(0.0, 0.2, 10)


def adam():
    return optax.scale_by_adam()


def masked(inner):
    """With the mask as a tree, so that no other tree will do."""
    return optax.masked(inner, {"blocks": {"w": True}, "head": False})


CONSTANT = gs.smooth_over_depth(DEPTH, 0.2)
SCHEDULED = gs.smooth_over_depth(DEPTH, RAMP)

# What follows a preconditioner, or is put around it: each with a state of its own.
AFTER = {
    "constant": CONSTANT,
    "scheduled": SCHEDULED,
    "scheduled operator": gs.smooth_over_depth(DEPTH, gs.window(RAMP, 2)),
    "monitored": gs.diagnostics.monitor_depth(CONSTANT, DEPTH),
    "scheduled, monitored": gs.diagnostics.monitor_depth(SCHEDULED, DEPTH),
}
AROUND = {
    "plain": gs.with_depth_smoothing(adam(), optax.identity()),
    "constant": gs.with_depth_smoothing(adam(), CONSTANT),
    "scheduled": gs.with_depth_smoothing(adam(), SCHEDULED),
    "chained": optax.chain(adam(), CONSTANT),
    "chained, scheduled": optax.chain(adam(), SCHEDULED),
    "monitored": gs.diagnostics.monitor_depth(adam(), DEPTH),
    "monitored, scheduled": gs.diagnostics.monitor_depth(
        gs.with_depth_smoothing(adam(), SCHEDULED), DEPTH
    ),
    "learn_alpha": gs.contrib.learn_alpha(adam(), DEPTH),
    "learn_operator": gs.contrib.learn_operator(adam(), DEPTH),
    "learned, monitored": gs.diagnostics.monitor_depth(
        gs.contrib.learn_alpha(adam(), DEPTH), DEPTH
    ),
    "of a masked one": gs.with_depth_smoothing(masked(adam()), CONSTANT),
    "of a masked one, scheduled": gs.with_depth_smoothing(masked(adam()), SCHEDULED),
    "of a masked one, learned": gs.contrib.learn_alpha(masked(adam()), DEPTH),
}
INSIDE = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(-0.1)),
    "masked": lambda tx: optax.masked(
        tx, lambda tree: {"blocks": {"w": True}, "head": False}
    ),
    "partition": lambda tx: optax.partition(
        {"blocks": optax.chain(tx, optax.scale(-1.0)), "head": optax.sgd(0.1)},
        lambda tree: {"blocks": {"w": "blocks"}, "head": "head"},
    ),
    "inject": lambda tx: optax.chain(optax.inject_hyperparams(optax.scale)(2.0), tx),
}
CHAINED = ("chained", "chained, scheduled")


def kind(state):
    """What a user sees of a state: its classes, and how they nest."""
    if not jax.tree.leaves(state):
        return "nothing"
    if isinstance(state, dict):
        return {key: kind(part) for key, part in state.items()}
    if not isinstance(state, tuple) or isinstance(state, optax.MaskedNode):
        return None
    return (type(state).__name__, *map(kind, state))


def attempt(tx, state):
    """An error of ours, or None."""
    try:
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    except TypeError as error:
        if "was made by other settings" not in str(error):
            raise
        return " ".join(str(error).split())
    return None


def assert_told(new, optimizers, inside):
    """That of every other one is an error, and its own is none."""
    tx = INSIDE[inside](optimizers[new])
    own = kind(tx.init(PARAMS))
    for old in optimizers:
        state = INSIDE[inside](optimizers[old]).init(PARAMS)
        if old == new or kind(state) != own:
            error = attempt(tx, state)
            assert (error is None) == (old == new), (old, error)


@pytest.mark.parametrize("new", AFTER)
def test_the_state_of_another_smoothing_is_told(new):
    assert_told(new, AFTER, "alone")


@pytest.mark.parametrize("new", [name for name in AROUND if name not in CHAINED])
def test_the_state_of_other_wrappers_is_told(new):
    assert_told(new, AROUND, "alone")


@pytest.mark.parametrize("inside", INSIDE)
def test_it_is_told_inside_of_other_transformations(inside):
    assert_told("constant", AFTER, inside)
    assert_told("scheduled", AFTER, inside)
    some = ("constant", "scheduled", "learn_alpha", "of a masked one, scheduled")
    assert_told("constant", {name: AROUND[name] for name in some}, inside)


# What the code in a message may name, besides `state`, `init` and `smoothing`.
NAMES = {
    "jnp": jnp,
    "optax": optax,
    "params": PARAMS,
    "number_of_updates_so_far": 7,
    "DepthSmoothingState": gs.DepthSmoothingState,
    "WithDepthSmoothingState": gs.WithDepthSmoothingState,
}


@pytest.mark.parametrize(
    "new", [name for name in AROUND if name not in CHAINED and "masked" not in name]
)
def test_the_conversion_that_it_names_keeps_the_moments(new):
    for old in AROUND:
        if "masked" in old:
            continue  # Adam's moments are those of other leaves
        state = AROUND[old].init(PARAMS)
        _, state = AROUND[old].update(PARAMS, state, PARAMS)
        moments = optax.tree_utils.tree_get(state, "nu")
        error = attempt(AROUND[new], state)
        while error:
            at = re.search(r"settings: `(state[^`]*)`", error)[1]
            expression = re.search(r"place pass `([^`]*)`", error)[1]
            names = {"state": state, "init": AROUND[new].init, "smoothing": SCHEDULED}
            converted = eval(expression, {**NAMES, **names})
            if at != "state":  # a part of it
                assert at == "state.inner_state", error
                converted = state._replace(inner_state=converted)
            assert kind(converted) != kind(state), error
            state, error = converted, attempt(AROUND[new], converted)
        AROUND[new].update(PARAMS, state, PARAMS)
        chex.assert_trees_all_equal(optax.tree_utils.tree_get(state, "nu"), moments)


RECIPES = {
    "adamw": gs.adamw(0.1, CONSTANT),
    "adamw, scheduled": gs.adamw(0.1, SCHEDULED),
    "muon": gs.muon(0.1, DEPTH, CONSTANT),
    "muon, scheduled": gs.muon(0.1, DEPTH, SCHEDULED),
    "muon, other rate": gs.muon(0.1, DEPTH, CONSTANT, adam_learning_rate=0.2),
    "optax's muon": optax.contrib.muon(0.1),
    "optax's sgd": optax.sgd(0.1, momentum=0.9),
    "scheduled rate": gs.adamw(optax.constant_schedule(0.1), CONSTANT),
    "adamw, masked decay": gs.adamw(
        0.1, SCHEDULED, mask={"blocks": {"w": True}, "head": False}
    ),
    "monitored": gs.diagnostics.monitor_depth(gs.adamw(0.1, CONSTANT), DEPTH),
}


@pytest.mark.parametrize("new", [name for name in RECIPES if "optax" not in name])
def test_recipes_refuse_the_state_of_another_optimizer(new):
    assert_told(new, RECIPES, "alone")


def test_the_error_names_both_settings():
    for tx, state, words in (
        (CONSTANT, SCHEDULED.init(PARAMS), ("is a schedule", "no schedule")),
        (SCHEDULED, CONSTANT.init(PARAMS), ("is a schedule", "no schedule")),
        (
            AROUND["learn_alpha"],
            AROUND["monitored"].init(PARAMS),
            ("`learn_alpha`", "`monitor_depth`", "LearnAlphaState"),
        ),
        (
            AROUND["constant"],
            AROUND["chained"].init(PARAMS),
            ("`with_depth_smoothing`", "(ScaleByAdamState, EmptyState)", "`state[0]`"),
        ),
        (
            AROUND["constant"],
            gs.per_layer(adam(), DEPTH).init(PARAMS),
            ("`state.count` is dict", "an array", "`init(params).count`"),
        ),
        (
            RECIPES["adamw, scheduled"],
            RECIPES["adamw"].init(PARAMS),
            ("`adamw`", "WithDepthSmoothingState(state[0], smoothing.init(params))"),
        ),
    ):
        error = attempt(tx, state)
        assert all(word in error for word in words), error


def test_a_state_is_what_it_is_whatever_has_carried_it():
    """Stacked, mapped, restored into lists, made by a class that was loaded anew."""
    tx = AROUND["scheduled"]
    state = tx.init(PARAMS)
    assert attempt(tx, jax.tree.map(lambda x: x + 0, state)) is None
    stacked = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    jax.eval_shape(jax.vmap(tx.update), twice, stacked, twice)
    chained = gs.adamw(0.1, CONSTANT)
    assert attempt(chained, list(chained.init(PARAMS))) is None
    for nothing in (None, (), {}, optax.EmptyState()):
        assert attempt(CONSTANT, nothing) is None


def test_an_init_that_looks_at_the_parameters_is_asked_with_them():
    """Of an empty tree it makes another state, which is no error."""

    def init(params):
        return adam().init(params) if jax.tree.leaves(params) else optax.EmptyState()

    inner = optax.GradientTransformation(init, adam().update)
    for tx in (
        gs.with_depth_smoothing(inner, CONSTANT),
        gs.diagnostics.monitor_depth(inner, DEPTH),
        gs.contrib.learn_alpha(inner, DEPTH),
    ):
        assert attempt(tx, tx.init(PARAMS)) is None
        assert attempt(tx, AROUND["scheduled"].init(PARAMS)) is not None
