"""`line_shape_score` and `residual_alignment` are the plain loops over the states."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gradsmooth_optax import diagnostics

NAMES = ("line_shape_score", "residual_alignment")


@jax.jit
def scores(states):
    """Both, in one compilation."""
    return tuple(getattr(diagnostics, name)(states) for name in NAMES)


def plain_scores(states):
    """In float64, position by position; what never moves has no line shape."""
    states = oracle._double(states)
    states = states.reshape(len(states), -1, states.shape[-1])
    shapes, cosines = [], []
    for position in range(states.shape[1]):
        steps = np.diff(states[:, position], axis=0)
        moving = [x for x in steps if np.linalg.norm(x) > 0]
        if moving:
            total = sum(x / np.linalg.norm(x) for x in moving)
            shapes.append(len(moving) / np.linalg.norm(total))
        for x, y in itertools.pairwise(steps):
            size = np.linalg.norm(x) * np.linalg.norm(y)
            cosines.append(np.vdot(x, y).real / size if size > 0 else 0.0)
    return np.mean(shapes), np.mean(cosines)


def random_states(dtype="float32", seed=0):
    """One position never changes, and one stands still once."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(5, 2, 3, 4)).astype(jnp.dtype(dtype))
    if dtype == "complex64":
        states = states + np.complex64(1j) * rng.normal(size=states.shape)
        states = states.astype(np.complex64)
    states[2, 0, 0] = states[1, 0, 0]
    states[:, 1, 2] = states[0, 1, 2]
    return states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_scores_are_the_plain_loops(dtype):
    states = random_states(dtype)
    for given in (states, list(states)):
        found = scores(given)
        assert [x.dtype for x in found] == [np.float32] * 2
        np.testing.assert_allclose(found, plain_scores(states), 2e-6, 2e-6)


def test_scores_of_float64_states_are_in_float64(enable_x64):
    with enable_x64():
        found = scores(random_states("float64"))
        assert [x.dtype for x in found] == [np.float64] * 2
    np.testing.assert_allclose(found, plain_scores(random_states("float64")), 1e-13)


def test_scores_under_vmap():
    states = np.stack([random_states(seed=seed) for seed in range(2)])
    mapped = np.transpose(jax.vmap(scores)(states))
    np.testing.assert_allclose(mapped, [scores(of_one) for of_one in states], rtol=1e-6)


LINE = np.array([0, 1, 3, 3.5, 10])[:, None, None] * [[3, 4], [0, -2]]
SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])  # three sides of it, of integers
EVEN_LINE = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
PAUSE = np.array([[0.0], [1.0], [1.0], [2.0]])
ONE_MOVE = np.array([[0, 0], [0, 0], [1, 0], [1, 0]])
BY_HAND = {
    "a straight line at any speed": (LINE, 1.0, 1.0),
    "three sides of a square": (SQUARE, 3.0, 0.0),
    "positions are averaged": (np.stack([SQUARE, EVEN_LINE], 1), 2.0, 0.5),
    "one position that moves once": (np.stack([SQUARE, ONE_MOVE], 1), 2.0, 0.0),
    "there and back": (np.array([[0.0, 1.0], [3.0, 5.0], [0.0, 1.0]]), np.inf, -1.0),
    "a pause": (PAUSE, 1.0, 0.0),
    "never a move": (np.ones((4, 2, 3)), np.nan, 0.0),
    "one position that never moves": (np.stack([PAUSE, 1 + 0 * PAUSE], 1), 1.0, 0.0),
}


def test_scores_by_hand():
    given = {
        name: np.float32(x) if x.dtype == np.float64 else x
        for name, (x, *_) in BY_HAND.items()
    }
    # One compilation for all of them.
    found = jax.jit(lambda given: {name: scores(x) for name, x in given.items()})(given)
    for name, (_, *wanted) in BY_HAND.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, err_msg=name)


def test_two_states_have_a_line_and_no_alignment():
    two = np.zeros((2, 3), np.float32)
    assert jax.eval_shape(diagnostics.line_shape_score, two).shape == ()
    with pytest.raises(ValueError, match=r"at least 3 states.*shape \(2, 3\)"):
        diagnostics.residual_alignment(two)


def test_a_state_that_is_not_finite_shows():
    states = random_states()
    states[3, 0, 1, 0] = np.nan
    assert np.isnan(scores(states)).all()


def test_gradients_are_finite_where_states_stand_still():
    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(lambda states: sum(scores(states))))
        chex.assert_tree_all_finite(gradient(jnp.asarray(random_states())))


WRONG = {
    "one number for each state": (
        np.ones(5),
        ("one number for each state", "an array of shape (5,)", "(jnp.stack([x_0"),
    ),
    "a list of numbers": ([1.0, 2.0, 3.0], ("one number for each state",)),
    "states of different shapes": (
        [np.ones((2, 3)), np.ones((2, 4))],
        ("states[0] has shape (2, 3)", "states[1] has (2, 4)"),
    ),
    "one state alone": (
        [np.ones((2, 3))],
        (
            "a sequence of 1 of shape",
            "state before the first block is missing",
            "(jnp.moveaxis(states, layer_axis, 0))",
        ),
    ),
    "no states": ([], ("none of them empty",)),
    "no positions": (np.ones((4, 0, 3)), ("none of them empty",)),
    "no features": (np.ones((4, 3, 0)), ("none of them empty",)),
    "no array": ("states", ("`states` must be an array", "([x_0, ..., x_L])")),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", NAMES)
def test_states_of_wrong_shapes_are_refused_with_what_to_write(function, name):
    states, fragments = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as info:
        getattr(diagnostics, function)(states)
    for fragment in fragments:
        fragment = f"`{function}{fragment}" if fragment[0] == "(" else fragment
        assert fragment in str(info.value)
