"""A state that was made by other settings is an error that says how to go on."""

import collections
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

core = pytest.mark.core

DEPTH = gs.scanned("blocks/")
PARAMS = {"blocks": {"w": np.ones((3, 2), np.float32)}, "head": np.ones(2, np.float32)}
MASK = {"blocks": {"w": True}, "head": False}
LABELS = {"blocks": {"w": "blocks"}, "head": "head"}
RAMP = optax.linear_schedule(0.0, 0.2, 10)

adam = optax.scale_by_adam
monitored = gs.diagnostics.monitor_depth


def constant():
    return gs.smooth_over_depth(DEPTH, 0.2)


def scheduled():
    return gs.smooth_over_depth(DEPTH, RAMP)


def around(smoothing, inner=None):
    return gs.with_depth_smoothing(inner or adam(), smoothing)


def masked_adam():
    """With the mask as a tree, so that no other tree will do."""
    return optax.masked(adam(), MASK)


# What follows a preconditioner, is put around it, or is all of an optimizer: each with
# a state of its own.
AFTER = {
    "constant": constant,
    "scheduled": scheduled,
    "scheduled operator": lambda: gs.smooth_over_depth(DEPTH, gs.window(RAMP, 2)),
    "monitored": lambda: monitored(constant(), DEPTH),
    "scheduled, monitored": lambda: monitored(scheduled(), DEPTH),
    "rates": lambda: gs.scale_over_depth(DEPTH, 0.5),
    "scheduled rates": lambda: gs.scale_over_depth(DEPTH, RAMP),
}
AROUND = {
    "plain": lambda: around(optax.identity()),
    "constant": lambda: around(constant()),
    "scheduled": lambda: around(scheduled()),
    "chained": lambda: optax.chain(adam(), constant()),
    "chained, scheduled": lambda: optax.chain(adam(), scheduled()),
    "monitored": lambda: monitored(adam(), DEPTH),
    "monitored, scheduled": lambda: monitored(around(scheduled()), DEPTH),
    "learn_alpha": lambda: gs.contrib.learn_alpha(adam(), DEPTH),
    "learn_operator": lambda: gs.contrib.learn_operator(adam(), DEPTH),
    "learned, monitored": lambda: monitored(
        gs.contrib.learn_alpha(adam(), DEPTH), DEPTH
    ),
    "of a masked one": lambda: around(constant(), masked_adam()),
    "of a masked one, scheduled": lambda: around(scheduled(), masked_adam()),
    "of a masked one, learned": lambda: gs.contrib.learn_alpha(masked_adam(), DEPTH),
}
RECIPES = {
    "adamw": lambda: gs.adamw(0.1, constant()),
    "adamw, scheduled": lambda: gs.adamw(0.1, scheduled()),
    "muon": lambda: gs.muon(0.1, DEPTH, constant()),
    "muon, scheduled": lambda: gs.muon(0.1, DEPTH, scheduled()),
    "muon, other rate": lambda: gs.muon(0.1, DEPTH, constant(), adam_learning_rate=0.2),
    "optax's muon": lambda: optax.contrib.muon(0.1),
    "optax's sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "scheduled rate": lambda: gs.adamw(optax.constant_schedule(0.1), constant()),
    "adamw, masked decay": lambda: gs.adamw(0.1, scheduled(), mask=MASK),
    "monitored": lambda: monitored(gs.adamw(0.1, constant()), DEPTH),
}
TABLES = {"after": AFTER, "around": AROUND, "recipes": RECIPES}


@functools.cache
def made(table, name):
    return TABLES[table][name]()


@functools.cache
def state_of(table, name):
    return made(table, name).init(PARAMS)


# Chains tell nothing of their states, and optax's optimizers neither.
SILENT = ("chained", "chained, scheduled", "optax's muon", "optax's sgd")
INSIDE = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(-0.1)),
    "masked": lambda tx: optax.masked(tx, lambda tree: MASK),
    "partition": lambda tx: optax.partition(
        {"blocks": optax.chain(tx, optax.scale(-1.0)), "head": optax.sgd(0.1)},
        lambda tree: LABELS,
    ),
    "inject": lambda tx: optax.chain(optax.inject_hyperparams(optax.scale)(2.0), tx),
}


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


@pytest.mark.parametrize(
    ("table", "new"),
    [(t, name) for t in TABLES for name in TABLES[t] if name not in SILENT],
)
def test_the_state_of_other_settings_is_told(table, new):
    own = kind(state_of(table, new))
    for old in TABLES[table]:
        state = state_of(table, old)
        if old == new or kind(state) != own:
            error = attempt(made(table, new), state)
            assert (error is None) == (old == new), (old, error)


@pytest.mark.parametrize("inside", INSIDE)
def test_it_is_told_inside_of_other_transformations(inside):
    for table, names in (
        ("after", ("constant", "scheduled", "monitored")),
        ("around", ("constant", "learn_alpha", "of a masked one, scheduled")),
    ):
        every = {name: INSIDE[inside](made(table, name)) for name in names}
        for old, new in itertools.product(names, names[:2]):
            error = attempt(every[new], every[old].init(PARAMS))
            assert (error is None) == (old == new), (old, error)


# What the code in a message may name, besides `state`, `init` and `smoothing`.
NAMES = {
    "jnp": jnp,
    "optax": optax,
    "params": PARAMS,
    "number_of_updates_so_far": 7,
    "DepthSmoothingState": gs.DepthSmoothingState,
    "WithDepthSmoothingState": gs.WithDepthSmoothingState,
}


# But of masked ones: Adam's moments are there those of other leaves.
CONVERTED = [name for name in AROUND if "masked" not in name]


@pytest.mark.parametrize("new", [name for name in CONVERTED if name not in SILENT])
def test_the_conversion_that_it_names_keeps_the_moments(new):
    tx = made("around", new)
    for old in CONVERTED:
        state = state_of("around", old)
        state = jax.tree.map(lambda x: np.full_like(x, 3), state)
        moments = optax.tree_utils.tree_get(state, "nu")
        error = attempt(tx, state)
        while error:
            at = re.search(r"settings: `(state[^`]*)`", error)[1]
            expression = re.search(r"place pass `([^`]*)`", error)[1]
            names = {"state": state, "init": tx.init, "smoothing": scheduled()}
            converted = eval(expression, {**NAMES, **names})
            if at != "state":  # a part of it
                assert at == "state.inner_state", error
                converted = state._replace(inner_state=converted)
            assert kind(converted) != kind(state), error
            state, error = converted, attempt(tx, converted)
        chex.assert_trees_all_equal(optax.tree_utils.tree_get(state, "nu"), moments)


@core
def test_the_error_names_both_settings_and_the_conversion():
    for tx, other, words in (
        (constant(), scheduled(), ("is a schedule", "no schedule", "EmptyState()")),
        (
            scheduled(),
            constant(),
            ("is a schedule", "no schedule", "jnp.int32(number_of_updates_so_far)"),
        ),
        (
            AROUND["learn_alpha"](),
            AROUND["monitored"](),
            (
                "`learn_alpha`",
                "`monitor_depth`",
                "LearnAlphaState",
                "inner_state=Scale",
            ),
        ),
        (
            AROUND["constant"](),
            AROUND["chained"](),
            ("`with_depth_smoothing`", "(ScaleByAdamState, EmptyState)", "`state[0]`"),
        ),
        (
            AROUND["constant"](),
            gs.per_layer(adam(), DEPTH),
            ("`state.count` is dict", "an array", "`init(params).count`"),
        ),
        (
            RECIPES["adamw, scheduled"](),
            RECIPES["adamw"](),
            ("`adamw`", "WithDepthSmoothingState(state[0], smoothing.init(params))"),
        ),
    ):
        error = attempt(tx, other.init(PARAMS))
        assert all(word in error for word in words), error
        assert "Start anew with `init(params)`" in error


@core
def test_a_state_is_what_it_is_whatever_has_carried_it():
    """Stacked, mapped, restored into lists, made by a class that was loaded anew."""
    tx = AROUND["scheduled"]()
    assert attempt(tx, jax.tree.map(lambda x: x + 0, tx.init(PARAMS))) is None
    twice = jax.tree.map(lambda x: np.stack([x, x]), PARAMS)
    jax.eval_shape(jax.vmap(tx.update), twice, jax.vmap(tx.init)(twice), twice)
    anew = collections.namedtuple("DepthSmoothingState", "count")
    assert attempt(scheduled(), anew(jnp.int32(0))) is None
    chained = RECIPES["adamw"]()
    assert attempt(chained, list(chained.init(PARAMS))) is None
    for nothing in (None, (), {}, optax.EmptyState()):
        assert attempt(constant(), nothing) is None


def test_an_init_that_looks_at_the_parameters_is_asked_with_them():
    """Of an empty tree it makes another state, which is no error."""

    def init(params):
        return adam().init(params) if jax.tree.leaves(params) else optax.EmptyState()

    inner = optax.GradientTransformation(init, adam().update)
    for tx in (
        around(constant(), inner),
        monitored(inner, DEPTH),
        gs.contrib.learn_alpha(inner, DEPTH),
    ):
        assert attempt(tx, tx.init(PARAMS)) is None
        assert attempt(tx, AROUND["scheduled"]().init(PARAMS)) is not None


# What `with_depth_smoothing` asks of a smoothing.


def test_a_smoothing_that_keeps_a_state_like_the_parameters_is_refused():
    tx = gs.with_depth_smoothing(adam(), optax.trace(0.9))
    with pytest.raises(ValueError, match=r"like the parameters \(2 arrays\).*chain"):
        tx.init(PARAMS)


def test_a_smoothing_whose_mask_is_a_tree_is_told_why_it_was_asked_for_its_state():
    smoothing = optax.masked(constant(), MASK)
    with pytest.raises((TypeError, ValueError)) as info:
        gs.with_depth_smoothing(adam(), smoothing)
    assert "mask as a function of the tree" in "".join(info.value.__notes__)
