"""The table of transformations: how to make each, and its twin in plain NumPy.

A twin is the update as a function of all gradients so far. What a wrapper of optax or a
transformation of jax does is then a change of the gradients that the twin is shown.

A model is a list of layers, dicts from role to array, with the embedding at its end.
As a tree all its layers are stacked, or all but the last one, which has its own leaves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle

import gradsmooth_optax as gs

DEPTH = gs.first_match(
    gs.scanned("blocks/", stack="net"), gs.unrolled(r"layer_(\d+)/", stack="net")
)
SHAPES = {"kernel": (4, 3), "bias": (3,)}
ALPHAS = (0.1, 0.5, 0.9, 0.3)

# Compiling is most of what these tests take.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def by_count(count):
    """The strength at steps 0, 1, 2, 3."""
    return jnp.asarray(ALPHAS)[count]


# Models and trees.


def model_of(seed):
    rng = np.random.default_rng(1000 + seed)
    embedding = {"table": rng.normal(size=5).astype("float32")}
    return [*oracle.random_blocks(4, shapes=SHAPES, seed=seed), embedding]


def with_zeros(model):
    """Without an update of one kernel, and of another layer's bias."""
    first, second, third, *others = model
    second = second | {"kernel": 0 * second["kernel"]}
    return [first, second, third | {"bias": 0 * third["bias"]}, *others]


def tree_of(model, dtype=None, last_apart=False):
    *layers, embedding = model
    if last_apart:
        tree = {"blocks": oracle.stacked_tree(layers[:-1]), "layer_3": layers[-1]}
    else:
        tree = {"blocks": oracle.stacked_tree(layers)}
    tree["embed"] = embedding
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, dtype)), tree)


def layers_in(tree):
    """Of a tree as `tree_of` makes it, the embedding at the end."""
    last = [tree["layer_3"]] if "layer_3" in tree else []
    return [*oracle.unstacked(tree["blocks"]), *last, tree["embed"]]


def each(function, *models):
    """`function` of every array, in double precision."""
    return [
        {role: function(*(_double(x[role]) for x in layers)) for role in layers[0]}
        for layers in zip(*models, strict=True)
    ]


def _double(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def only(role, model):
    return [{r: x for r, x in layer.items() if r == role} for layer in model]


def mean(*models):
    return each(lambda *xs: sum(xs) / len(xs), *models)


PARAMS = model_of(100)
GRADIENTS = [model_of(0), model_of(1), with_zeros(model_of(2)), model_of(3)]
ZERO = each(np.zeros_like, PARAMS)


def assert_close(actual, expected, tolerance=1e-5):
    """Lists of layers that agree, relative to the largest entry of each array."""
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert set(got) == set(want)
        for role in want:
            error = oracle.relative_error(got[role], want[role])
            # A NaN must not pass.
            assert error <= tolerance, f"layer {i}, {role}: {error:.1e}"


def assert_steps(outs, expected):
    for out, want in zip(outs, expected, strict=True):
        assert_close(layers_in(out), want)


# The twins, of the last gradient or of all gradients so far.


def smoothed(model, alpha, **kwargs):
    return [*oracle.window(model[:-1], alpha, **kwargs), model[-1]]


def alike(model, alpha):
    """Coupled as far as neighbors agree, at the norm of each."""

    def coupling(blocks):
        return oracle.similarity_window(blocks, alpha)

    blocks = oracle.couple(model[:-1], coupling, variant="norm_preserving")
    return [*blocks, model[-1]]


def scaled(model, factors, rest):
    return [
        *(
            each(lambda x, f=factor: f * x, [layer])[0]
            for factor, layer in zip((*factors, rest), model, strict=True)
        )
    ]


def clipped(model, largest):
    """Every layer, and the embedding, to a norm of at most so much."""
    norms = [np.sqrt(sum(np.sum(x**2) for x in layer.values())) for layer in model]
    factors = [min(1, largest / norm) if norm else 1 for norm in norms]
    return scaled(model, factors[:-1], factors[-1])


def momentum(history, decay=0.5):
    """The sum of all gradients with weight decay ** age."""
    weights = decay ** np.arange(len(history))[::-1]
    return each(lambda *xs: np.tensordot(weights, xs, axes=1), *history)


def average(history, decay):
    """Their mean with these weights: a moving average without its bias."""
    total = sum(decay**age for age in range(len(history)))
    return each(lambda x: x / total, momentum(history, decay))


def adam(history):
    squares = [each(lambda x: np.abs(x) ** 2, gradient) for gradient in history]
    first, second = average(history, 0.5), average(squares, 0.75)
    return each(lambda m, v: m / (np.sqrt(v) + 1e-8), first, second)


def orthogonalized(matrix):
    """One Newton-Schulz step, scaled by shape, as in `optax.contrib.muon`."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5 * x


def muon(history):
    """Muon for matrices, Adam for the rest."""
    return each(
        lambda m, a: orthogonalized(m) if m.ndim == 2 else a,
        average(history, 0.5),
        adam(history),
    )


def now(values, history):
    """Of a schedule's values, the one of this step."""
    return values[len(history) - 1]


# What a user injects numbers of: functions of them that call the library.

ADAM = {"b1": 0.5, "b2": 0.75}


def with_adam(alpha):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    return gs.with_depth_smoothing(optax.scale_by_adam(**ADAM), smoothing)


def smoothed_adamw(learning_rate, alpha, weight_decay):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    return gs.adamw(learning_rate, smoothing, weight_decay=weight_decay, **ADAM)


def smoothed_muon(learning_rate, alpha, ns_steps, beta, adam_b1, adam_b2, nesterov):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    options = {"ns_steps": ns_steps, "beta": beta, "nesterov": nesterov}
    options |= {"adam_b1": adam_b1, "adam_b2": adam_b2}
    return gs.muon(learning_rate, DEPTH, smoothing, **options)


MUON = {"ns_steps": 1, "beta": 0.5, "adam_b1": 0.5, "adam_b2": 0.75, "nesterov": False}


def clipped_by_layer(largest):
    inner = optax.chain(optax.scale_by_adam(**ADAM), optax.clip_by_global_norm(largest))
    return gs.per_layer(inner, DEPTH)


def decayed(rate):
    return gs.scale_over_depth(DEPTH, gs.layer_wise_decay(rate), rest="first")


def learned_alpha(alpha):
    return gs.contrib.learn_alpha(
        optax.identity(), DEPTH, alpha=alpha, per="layer", signal="full"
    )


def learned_operator(learning_rate):
    return gs.contrib.learn_operator(
        optax.identity(), DEPTH, learning_rate=learning_rate, radius=2
    )


# The table.


class Row(NamedTuple):
    """A transformation, made by `factory(**kwargs)`, and its twin."""

    factory: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    # (all gradients so far, the parameters) -> the update. None of what learns: held
    # against a loop of its own steps. Its twins are with the tests of `gs.contrib`.
    twin: Callable[..., list] | None
    # How many leaves of its state are shaped like parameters, and how many are not.
    moments: int = 0
    others: int = 0
    # Whether something of optax's is in it, which has promises of its own.
    ours_alone: bool = True

    def make(self):
        return self.factory(**self.kwargs)


def windowed(alpha, **kwargs):
    return Row(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": alpha, **kwargs},
        lambda history, params: smoothed(history[-1], alpha, **kwargs),
    )


MATRIX = np.array([[5, 2, 2, 1], [0, 10, 5, -5], [1, 1, 7, 1], [0, 0, 4, 6]]) / 10
RATES = np.array([1.0, 0.0, 3.0, -0.5])

ROWS = {
    "constant": windowed(0.3),
    "schedule": Row(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": by_count},
        lambda history, params: smoothed(history[-1], now(ALPHAS, history)),
        others=1,
    ),
    "norm_preserving": Row(
        gs.smooth_over_depth,
        {
            "depth": DEPTH,
            "operator": gs.window(0.3, radius=2),
            "variant": "norm_preserving",
        },
        lambda history, params: smoothed(
            history[-1], 0.3, radius=2, variant="norm_preserving"
        ),
    ),
    "directional, block": windowed(0.3, variant="directional", norm_scope="block"),
    "dense": Row(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": gs.dense(MATRIX)},
        lambda history, params: [
            *oracle.smooth(history[-1][:-1], lambda n: MATRIX),
            history[-1][-1],
        ],
    ),
    "similarity": Row(
        gs.smooth_over_depth,
        {
            "depth": DEPTH,
            "operator": gs.similarity_window(by_count),
            "variant": "norm_preserving",
        },
        lambda history, params: alike(history[-1], now(ALPHAS, history)),
        others=1,
    ),
    "with adam, schedule": Row(
        with_adam,
        {"alpha": by_count},
        lambda history, params: smoothed(adam(history), now(ALPHAS, history)),
        moments=6,
        others=2,
        ours_alone=False,
    ),
    "adamw": Row(
        smoothed_adamw,
        {"learning_rate": 0.1, "alpha": 0.3, "weight_decay": 0.2},
        lambda history, params: each(
            lambda u, p: -0.1 * (u + 0.2 * p), smoothed(adam(history), 0.3), params
        ),
        moments=6,
        others=1,
        ours_alone=False,
    ),
    "muon": Row(
        smoothed_muon,
        {"learning_rate": 0.1, "alpha": 0.3, **MUON},
        lambda history, params: each(lambda u: -0.1 * u, smoothed(muon(history), 0.3)),
        # One momentum of the kernels' leaf, two moments of the other two.
        moments=5,
        others=3,
        ours_alone=False,
    ),
    "per_layer": Row(
        clipped_by_layer,
        {"largest": 2.0},
        lambda history, params: clipped(adam(history), 2.0),
        moments=6,
        others=1,
        ours_alone=False,
    ),
    "layer-wise decay": Row(
        decayed,
        {"rate": 0.5},
        lambda history, params: scaled(history[-1], [1 / 8, 1 / 4, 1 / 2, 1], 1 / 16),
    ),
    "scheduled rates": Row(
        gs.scale_over_depth,
        {
            "depth": DEPTH,
            "factors": lambda count: RATES.astype("float32") * jnp.float32(count + 1),
            "rest": 0.2,
        },
        lambda history, params: scaled(history[-1], RATES * len(history), 0.2),
        others=1,
    ),
    "learned alpha": Row(learned_alpha, {"alpha": 0.3}, None, moments=2, others=2),
    "learned operator": Row(
        learned_operator, {"learning_rate": 0.1}, None, moments=2, others=2
    ),
}
LEARNERS = ("learned alpha", "learned operator")


# How to run a row.


class Compiled(NamedTuple):
    tx: optax.GradientTransformationExtraArgs
    update: Callable[..., Any]
    traces: list


@functools.cache
def compiled(name):
    """The transformation with its update, compiled once for all tests.

    Updates and state are donated.
    """
    tx, traces = ROWS[name].make(), []

    def traced(updates, state, params):
        traces.append(None)
        return tx.update(updates, state, params)

    return Compiled(tx, quick_jit(traced, donate_argnums=(0, 1)), traces)


def run(tx, gradients, params=PARAMS, update=None):
    """The updates at each step, as trees, and the last state."""
    update = update or quick_jit(tx.update)
    params, outs = tree_of(params), []
    state = tx.init(params)
    for gradient in gradients:
        out, state = update(tree_of(gradient), state, params)
        outs.append(out)
    return outs, state


def replay(name, gradients, params=PARAMS):
    """What a row must give at each step, as models: by its twin if it has one."""
    twin = ROWS[name].twin
    if twin is not None:
        return [twin(gradients[:t], params) for t in range(1, len(gradients) + 1)]
    tx, update, _ = compiled(name)
    return [layers_in(out) for out in run(tx, gradients, params, update)[0]]


def stacked(trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)
