"""The law of `per_layer` and of `muon`: the whole model as a loop over its layers."""

import functools

import jax
import numpy as np
from layer_layouts import REST, drawn, stacked
from transformations import quick_jit

NUM_STEPS = 2

# Parameters of a layer, by what they are for.
TREES = {
    "plain": {"mlp": {"kernel": (4, 6), "bias": (6,)}},
    "square": {"kernel": (4, 3), "square": (3, 3), "bias": (3,)},
    "heads": {"heads": (4, 2, 3), "bias": (3,)},
}


def history(seed, shapes):
    """Parameters and the updates of all steps."""
    updates = [drawn(10 * seed + step, shapes) for step in range(NUM_STEPS)]
    return drawn(10 * seed + 9, shapes), stacked(updates)


def trained(tx, history):
    """The updates that come out at each step."""
    params, updates = history

    def step(state, update):
        update, state = tx.update(update, state, params)
        return state, update

    return jax.lax.scan(step, tx.init(params), updates)[1]


@functools.cache
def in_a_loop(inner, which):
    """The updates of five layers, one after another without `vmap`, and of the rest."""
    layers = stacked([history(i, TREES[which]) for i in range(5)])
    rest = history(99, REST) if which == "plain" else None

    @quick_jit
    def loop(layers, rest):
        of_layers = jax.lax.map(functools.partial(trained, inner), layers)
        return of_layers, {} if rest is None else trained(inner, rest)

    return jax.tree.map(np.asarray, loop(layers, rest))


def check_law(tx, inner, num_layers, layout, which="plain", tol=2e-5):
    """At each step `tx` gives what `inner` gives of every layer alone, and of the rest.

    Args:
      tx: a transformation of the whole model.
      inner: the transformation of a layer.
      num_layers: of the model.
      layout: a list of layers -> a tree of the model.
      which: the parameters of a layer.
      tol: of the comparison, relative.
    """
    layers = [history(i, TREES[which]) for i in range(num_layers)]
    rest = history(99, REST if which == "plain" else {})

    def at(tree, *where):
        return jax.tree.map(lambda x: x[where], tree)

    def model(step):
        return layout([at(updates, step) for _, updates in layers]) | at(rest[1], step)

    params = layout([params for params, _ in layers]) | rest[0]
    updates = stacked([model(step) for step in range(NUM_STEPS)])
    run = quick_jit(functools.partial(trained, tx))
    found = jax.tree.map(np.asarray, run((params, updates)))
    of_layers, of_rest = in_a_loop(inner, which)
    for step in range(NUM_STEPS):
        expected = layout([at(of_layers, i, step) for i in range(num_layers)])
        assert_close(at(found, step), expected | at(of_rest, step), tol)


def assert_close(found, expected, tol=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol / 10)
