"""Transformations x behaviors: life under jax's transformations and optax's wrappers.

Every transformation has a twin: its update as a plain NumPy function of all gradients
so far. What a wrapper does is then a change of the gradients that the twin is shown.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from optax import contrib

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

# One stack of four layers: three in stacked leaves, the last one in leaves of its own.
DEPTH = gs.first_match(
    gs.scanned("blocks/", stack="net"), gs.unrolled(r"layer_(\d+)/", stack="net")
)
UNROLLED = gs.unrolled()
SHAPES = {"kernel": (4, 3), "bias": (3,)}
ALPHAS = (0.1, 0.5, 0.9, 0.3)


def by_count(count):
    """The strength at steps 0, 1, 2, 3."""
    return jnp.asarray(ALPHAS)[count]


# A model is a list of layers, dicts from role to array, and the embedding at its end.


def model_of(seed):
    rng = np.random.default_rng(1000 + seed)
    embedding = {"table": rng.normal(size=5).astype("float32")}
    return [*oracle.random_blocks(4, shapes=SHAPES, seed=seed), embedding]


def tree_of(model, dtype=None):
    *stacked, last, embedding = model
    tree = {
        "blocks": oracle.stacked_tree(stacked),
        "layer_3": last,
        "embed": embedding,
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def layers_in(tree):
    """Of a tree as `tree_of` makes it, the embedding at the end."""
    return [*oracle.unstacked(tree["blocks"]), tree["layer_3"], tree["embed"]]


def each(function, *models):
    """`function` of every array, in float64."""
    return [
        {
            role: function(*(np.asarray(layer[role], np.float64) for layer in layers))
            for role in layers[0]
        }
        for layers in zip(*models, strict=True)
    ]


def assert_close(actual, expected, tolerance=1e-5):
    """Lists of layers that agree, relative to the largest entry of each array."""
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert set(got) == set(want)
        for role in want:
            error = oracle.relative_error(got[role], want[role])
            # A NaN must not pass.
            assert error <= tolerance, f"layer {i}, {role}: {error:.1e}"


PARAMS = model_of(100)
GRADIENTS = [model_of(seed) for seed in range(4)]


# The twins.


def smoothed(model, alpha, **kwargs):
    return [*oracle.window(model[:-1], alpha, **kwargs), model[-1]]


def mixed(model, matrix_of):
    return [*oracle.smooth(model[:-1], matrix_of), model[-1]]


def momentum(history, decay=0.5):
    """The sum of all gradients with weight decay ** age."""
    weights = decay ** np.arange(len(history))[::-1]
    return each(lambda *xs: np.tensordot(weights, xs, axes=1), *history)


def average(history, decay):
    """Their mean with these weights: a moving average without its bias."""
    total = sum(decay**age for age in range(len(history)))
    return each(lambda x: x / total, momentum(history, decay))


def adam(history):
    squares = [each(np.square, gradient) for gradient in history]
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


# The table.

ADAM = {"b1": 0.5, "b2": 0.75}
MATRIX = np.array([[5, 2, 2, 1], [0, 10, 5, -5], [1, 1, 7, 1], [0, 0, 4, 6]]) / 10


def lower_triangle(num_layers):
    return oracle.ema_matrix(num_layers, 0.4, reverse=False)


class Case(NamedTuple):
    """A transformation, made by `factory(**kwargs)`, and its twin."""

    factory: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    # (all gradients so far, the parameters) -> the update
    twin: Callable[..., list]
    # How many leaves of its state are shaped like parameters, and how many are not.
    moments: int = 0
    others: int = 0

    def make(self):
        return self.factory(**self.kwargs)


def windowed(alpha, **kwargs):
    return Case(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": alpha, **kwargs},
        lambda history, params: smoothed(history[-1], alpha, **kwargs),
    )


def applied(operator, matrix_of):
    return Case(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": operator},
        lambda history, params: mixed(history[-1], matrix_of),
    )


def scheduled(history):
    return ALPHAS[len(history) - 1]


# What a user injects the strength of: functions of it that call the library.


def with_adam(alpha):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    return gs.with_depth_smoothing(optax.scale_by_adam(**ADAM), smoothing)


def adamw(learning_rate, alpha, weight_decay):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    return gs.adamw(learning_rate, smoothing, weight_decay=weight_decay, **ADAM)


def with_momentum(learning_rate, alpha):
    smoothing = gs.smooth_over_depth(DEPTH, alpha)
    return optax.chain(
        gs.with_depth_smoothing(optax.trace(0.5), smoothing),
        optax.scale_by_learning_rate(learning_rate),
    )


def smoothed_muon(learning_rate, alpha, ns_steps, beta, adam_b1, adam_b2, nesterov):
    return gs.muon(
        learning_rate,
        DEPTH,
        gs.smooth_over_depth(DEPTH, alpha),
        ns_steps=ns_steps,
        beta=beta,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        nesterov=nesterov,
    )


CASES = {
    "constant": windowed(0.3),
    "schedule": Case(
        gs.smooth_over_depth,
        {"depth": DEPTH, "operator": by_count},
        lambda history, params: smoothed(history[-1], scheduled(history)),
        others=1,
    ),
    "traced": Case(
        # The strength is an array in the state: a tracer wherever the state is one.
        optax.inject_hyperparams(gs.smooth_over_depth),
        {"depth": DEPTH, "operator": 0.3},
        lambda history, params: smoothed(history[-1], 0.3),
        others=2,
    ),
    "norm_preserving": windowed(0.3, variant="norm_preserving"),
    "directional, block": windowed(0.3, variant="directional", norm_scope="block"),
    "window": applied(
        gs.window(0.3, radius=2), lambda n: oracle.window_matrix(n, 0.3, radius=2)
    ),
    "dense": applied(gs.dense(MATRIX), lambda n: MATRIX),
    "operator_fn": applied(gs.operator_fn(lower_triangle), lower_triangle),
    "with adam": Case(
        with_adam,
        {"alpha": 0.3},
        lambda history, params: smoothed(adam(history), 0.3),
        moments=10,
        others=1,
    ),
    "with adam, schedule": Case(
        with_adam,
        {"alpha": by_count},
        lambda history, params: smoothed(adam(history), scheduled(history)),
        moments=10,
        others=2,
    ),
    "adamw": Case(
        adamw,
        {"learning_rate": 0.1, "alpha": 0.3, "weight_decay": 0.2},
        lambda history, params: each(
            lambda u, p: -0.1 * (u + 0.2 * p), smoothed(adam(history), 0.3), params
        ),
        moments=10,
        others=1,
    ),
    "with momentum": Case(
        with_momentum,
        {"learning_rate": 0.1, "alpha": 0.3},
        lambda history, params: each(
            lambda u: -0.1 * u, smoothed(momentum(history), 0.3)
        ),
        moments=5,
    ),
    "muon": Case(
        smoothed_muon,
        {"learning_rate": 0.1, "alpha": 0.3, "ns_steps": 1}
        | {"beta": 0.5, "adam_b1": 0.5, "adam_b2": 0.75, "nesterov": False},
        lambda history, params: each(lambda u: -0.1 * u, smoothed(muon(history), 0.3)),
        # One momentum of the two kernels' leaves, two moments of the other three.
        moments=8,
        others=3,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


# How to run them.

# Compiling is most of what these tests take.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def run(tx, gradients=GRADIENTS, update=None):
    """The updates at each step, as trees, and the last state."""
    params = tree_of(PARAMS)
    update = update or tx.update
    state = tx.init(params)
    outs = []
    for gradient in gradients:
        out, state = update(tree_of(gradient), state, params)
        outs.append(out)
    return outs, state


def replay(twin, gradients=GRADIENTS, params=PARAMS):
    """The updates at each step, as models."""
    return [twin(gradients[:step], params) for step in range(1, len(gradients) + 1)]


def assert_steps(outs, expected):
    for out, want in zip(outs, expected, strict=True):
        assert_close(layers_in(out), want)


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


# Under jax's transformations.


@every_case
def test_updates_are_those_of_plain_loops_with_structure_and_dtypes_kept(name):
    outs, _ = run(CASES[name].make(), GRADIENTS[:3])
    for out in outs:
        chex.assert_trees_all_equal_shapes_and_dtypes(out, tree_of(PARAMS))
    assert_steps(outs, replay(CASES[name].twin, GRADIENTS[:3]))


class Jitted(NamedTuple):
    outs: list
    traces: int
    donated: list


@functools.cache
def jitted(name):
    """A run under jit, whose updates and states are donated, for several tests."""
    tx, traces, donated = CASES[name].make(), [], []

    def traced(updates, state, params):
        traces.append(None)
        return tx.update(updates, state, params)

    compiled = quick_jit(traced, donate_argnums=(0, 1))

    def update(updates, state, params):
        donated.append((updates, state))
        return compiled(updates, state, params)

    outs, _ = run(tx, update=update)
    return Jitted(outs, len(traces), donated)


@every_case
def test_under_jit_the_numbers_are_the_same(name):
    assert_steps(jitted(name).outs, replay(CASES[name].twin))


@every_case
def test_no_update_after_the_first_is_traced_again(name):
    assert jitted(name).traces == 1


@every_case
def test_updates_and_state_can_be_donated(name):
    assert all(x.is_deleted() for x in jax.tree.leaves(jitted(name).donated))


@every_case
def test_vmap_over_seeds_of_a_scan_over_steps_is_a_loop_over_both(name):
    tx, params = CASES[name].make(), tree_of(PARAMS)

    @quick_jit
    @jax.vmap
    def train(gradients):
        def step(state, gradient):
            out, state = tx.update(gradient, state, params)
            return state, out

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    seeds = [GRADIENTS[:3], [model_of(10 + step) for step in range(3)]]
    outs = train(stacked([stacked(map(tree_of, seed)) for seed in seeds]))
    for i, seed in enumerate(seeds):
        steps = [jax.tree.map(lambda x, at=(i, t): x[at], outs) for t in range(3)]
        assert_steps(steps, replay(CASES[name].twin, seed))


@every_case
def test_shapes_alone_are_enough_for_init_and_update(name):
    tx, params = CASES[name].make(), tree_of(PARAMS)
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    out, new_state = jax.eval_shape(tx.update, shapes, state, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", ["constant", "schedule", "dense"])
def test_smoothing_alone_can_be_initialized_from_shapes_without_eval_shape(name):
    tx, params = CASES[name].make(), tree_of(PARAMS)
    shapes = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))


@every_case
def test_in_bfloat16_the_branches_of_a_cond_agree(name):
    tx, params = CASES[name].make(), tree_of(PARAMS, jnp.bfloat16)
    gradient = tree_of(GRADIENTS[0], jnp.bfloat16)

    @quick_jit
    def maybe_update(do, gradient, state):
        return jax.lax.cond(
            do, lambda: tx.update(gradient, state, params), lambda: (gradient, state)
        )

    out, _ = maybe_update(True, gradient, tx.init(params))
    (expected,) = replay(CASES[name].twin, [layers_in(gradient)])
    # Smoothing rounds once; what comes before it computes in bfloat16.
    tolerance = 2**-5 if CASES[name].moments else 2**-8
    assert_close(layers_in(out), expected, tolerance)
    out, _ = maybe_update(False, gradient, tx.init(params))
    chex.assert_trees_all_equal(out, gradient)


# The protocol of optax.


@every_case
def test_update_takes_keywords_and_arguments_that_are_not_for_it(name):
    tx, params = CASES[name].make(), tree_of(PARAMS)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    gradient, state = tree_of(GRADIENTS[0]), tx.init(params)
    for out, _ in (
        tx.update(updates=gradient, state=state, params=params),
        tx.update(gradient, state, params, value=1.0, obj_fn=len),
    ):
        assert_steps([out], replay(CASES[name].twin, GRADIENTS[:1]))


@pytest.mark.parametrize("name", ["constant", "schedule", "dense", "with adam"])
def test_smoothing_needs_no_parameters(name):
    tx = CASES[name].make()
    out, _ = tx.update(tree_of(GRADIENTS[0]), tx.init(tree_of(PARAMS)))
    assert_steps([out], replay(CASES[name].twin, GRADIENTS[:1]))


@every_case
def test_tree_map_params_tells_the_moments_from_the_few_other_leaves(name):
    tx = CASES[name].make()
    state = tx.init(tree_of(PARAMS))
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    counts = Counter(moment=CASES[name].moments, other=CASES[name].others)
    assert Counter(jax.tree.leaves(mapped)) == counts


# In chains.


def test_in_a_chain_it_smooths_what_the_transformations_before_it_made():
    base, smooth = optax.scale_by_adam(**ADAM), CASES["constant"].make()

    def preconditioned_gradients(history, params):
        return smoothed(adam(history), 0.3)

    def raw_gradients(history, params):
        return adam([smoothed(gradient, 0.3) for gradient in history])

    outs, _ = run(optax.chain(base, smooth))
    assert_steps(outs, replay(preconditioned_gradients))
    outs, _ = run(optax.chain(smooth, base))
    assert_steps(outs, replay(raw_gradients))


def test_states_survive_flattening_and_named_chains():
    tx = optax.named_chain(
        ("adam", optax.scale_by_adam()), ("smooth", CASES["schedule"].make())
    )
    leaves, treedef = jax.tree.flatten(tx.init(tree_of(PARAMS)))
    assert jax.tree.unflatten(treedef, leaves)["smooth"].count == 0


# Under inject_hyperparams.


@pytest.mark.parametrize("name", [name for name in CASES if name != "traced"])
def test_inject_hyperparams_changes_no_number_and_shows_them(name):
    case = CASES[name]
    tx = optax.inject_hyperparams(case.factory)(**case.kwargs)
    outs, state = run(tx, GRADIENTS[:2])
    assert_steps(outs, replay(case.twin, GRADIENTS[:2]))
    for key, value in case.kwargs.items():
        if value is by_count:
            value = ALPHAS[1]
        if isinstance(value, float):
            np.testing.assert_allclose(state.hyperparams[key], value, rtol=1e-6)
    # Under jit they are tracers.
    tree = tree_of(PARAMS)
    shapes, _ = jax.eval_shape(tx.update, tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tree)


def test_an_injected_alpha_can_be_set_between_steps_without_a_retrace():
    tx = CASES["traced"].make()
    params = tree_of(PARAMS)
    state = tx.init(params)
    assert set(state.hyperparams) == {"operator"}
    chex.clear_trace_counter()
    update = quick_jit(chex.assert_max_traces(tx.update, n=1))
    for alpha in (0.3, 0.7):
        state.hyperparams["operator"] = jnp.asarray(alpha)
        out, state = update(tree_of(GRADIENTS[0]), state, params)
        assert_steps([out], [smoothed(GRADIENTS[0], alpha)])


def test_an_injected_transformation_takes_its_radius_as_a_static_argument():
    def wide(alpha, radius):
        return gs.smooth_over_depth(DEPTH, gs.window(alpha, radius))

    factory = optax.inject_hyperparams(wide, static_args=("radius",))
    outs, _ = run(factory(alpha=0.3, radius=2), GRADIENTS[:1])
    assert_steps(outs, [smoothed(GRADIENTS[0], 0.3, radius=2)])


def by_hand(path, leaf):
    if path[0] == "blocks":
        return gs.Depth("net", path[1], axis=0)
    return gs.Depth("net", path[1], 3) if path[0] == "layer_3" else None


@pytest.mark.parametrize(
    "depth",
    [
        gs.ranked(DEPTH),
        DEPTH.only(lambda path, leaf: True),
        gs.depth_fn(by_hand),
        "first_match(scanned('blocks/', stack='net'), "
        r"unrolled(r'layer_(\d+)/', stack='net'))",
    ],
    ids=["ranked", "only", "depth_fn", "name"],
)
def test_inject_hyperparams_takes_no_kind_of_spec_for_a_schedule(depth):
    factory = optax.inject_hyperparams(gs.smooth_over_depth)
    outs, _ = run(factory(depth, operator=0.3), GRADIENTS[:1])
    assert_steps(outs, [smoothed(GRADIENTS[0], 0.3)])


# Where some leaves are hidden.


def only(role, model):
    return [{r: x for r, x in layer.items() if r == role} for layer in model]


def of_role(role, tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: role in str(path), tree)


@every_case
def test_masked_shows_it_the_chosen_leaves_and_leaves_the_others_alone(name):
    kernels = functools.partial(only, "kernel")
    tx = optax.masked(CASES[name].make(), functools.partial(of_role, "kernel"))
    gradients = GRADIENTS[:2]
    outs, _ = run(tx, gradients)
    # The biases are absent from the norms of a block, too.
    updates = replay(CASES[name].twin, [*map(kernels, gradients)], kernels(PARAMS))
    for out, update, gradient in zip(outs, updates, gradients, strict=True):
        expected = [g | u for g, u in zip(gradient, update, strict=True)]
        assert_close(layers_in(out), expected)


BY_BLOCK = {"variant": "norm_preserving", "norm_scope": "block"}


def muon_and_adam(then):
    """Muon for kernels and Adam for the rest, each of them followed by `then`."""

    def matrices(tree):
        numbers = contrib.MuonDimensionNumbers
        return jax.tree.map(lambda x: numbers(x.ndim - 2, x.ndim - 1), tree)

    scale_by_muon = contrib.scale_by_muon(
        ns_steps=1, beta=0.5, nesterov=False, weight_dimension_numbers=matrices
    )
    return {
        "muon": optax.chain(scale_by_muon, then),
        "adam": optax.chain(optax.scale_by_adam(**ADAM), then),
    }


def muon_or_adam(tree):
    return jax.tree.map({True: "muon", False: "adam"}.get, of_role("kernel", tree))


def test_inside_a_multi_transform_a_block_is_the_leaves_of_one_label():
    transforms = muon_and_adam(then=gs.smooth_over_depth(DEPTH, 0.3, **BY_BLOCK))
    tx = optax.multi_transform(transforms, muon_or_adam)

    def in_parts(history, params):
        made = muon(history)
        *kernels, _ = smoothed(only("kernel", made), 0.3, **BY_BLOCK)
        *biases, _ = smoothed(only("bias", made), 0.3, **BY_BLOCK)
        return [*map(dict.__or__, kernels, biases), made[-1]]

    outs, _ = run(tx, update=quick_jit(tx.update))
    assert_steps(outs, replay(in_parts))


def test_after_a_partition_a_block_is_the_leaves_of_all_labels():
    base = optax.partition(muon_and_adam(then=optax.identity()), muon_or_adam)
    tx = optax.chain(base, gs.smooth_over_depth(DEPTH, 0.3, **BY_BLOCK))

    def as_one(history, params):
        return smoothed(muon(history), 0.3, **BY_BLOCK)

    outs, _ = run(tx, update=quick_jit(tx.update))
    assert_steps(outs, replay(as_one))


def test_a_label_of_a_partition_may_have_no_parameters():
    smooth = CASES["constant"].make()
    tx = optax.partition({"all": smooth, "none": smooth}, lambda tree: "all")
    outs, _ = run(tx)
    assert_steps(outs, replay(CASES["constant"].twin))


MUON = {"ns_steps": 1, "beta": 0.5, "nesterov": False, "adam_b1": 0.5, "adam_b2": 0.75}


def test_contrib_muon_with_dimension_numbers_takes_stacked_kernels_by_layer():
    numbers = {
        "blocks": {"kernel": contrib.MuonDimensionNumbers(1, 2), "bias": None},
        "layer_3": {"kernel": contrib.MuonDimensionNumbers(0, 1), "bias": None},
        "embed": None,
    }
    base = contrib.muon(0.1, muon_weight_dimension_numbers=numbers, **MUON)
    tx = optax.chain(base, CASES["constant"].make())
    outs, _ = run(tx, update=quick_jit(tx.update))
    # The twin has the learning rate outside, which makes no difference.
    assert_steps(outs, replay(CASES["muon"].twin))


def test_contrib_muon_without_them_takes_stacked_kernels_for_vectors():
    tx = optax.chain(contrib.muon(0.1, **MUON), CASES["constant"].make())

    def by_rank(history, params):
        """By the rank of the leaf instead of its rank per layer."""
        *layers, last, embedding = adam(history)
        means = average(history, 0.5)
        biases = orthogonalized(np.stack([layer["bias"] for layer in means[:3]]))
        layers = [x | {"bias": b} for x, b in zip(layers, biases, strict=True)]
        last = last | {"kernel": orthogonalized(means[3]["kernel"])}
        update = smoothed([*layers, last, embedding], 0.3)
        return each(lambda u: -0.1 * u, update)

    outs, _ = run(tx, update=quick_jit(tx.update))
    assert_steps(outs, replay(by_rank))


# With frozen layers.

LAYERS = GRADIENTS[0][:-1]
NO_UPDATE = each(np.zeros_like, LAYERS)[0]
OPT = optax.scale(-0.1)
SMOOTH = gs.smooth_over_depth(UNROLLED, 0.3)


def descent(layers):
    return each(lambda g: -0.1 * g, layers)


def mask(layers):
    return {f"layers_{i}": i in layers for i in range(len(LAYERS))}


FROZEN, TRAINED = mask([1]), mask([0, 2, 3])


def update_of_layers(tx):
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(LAYERS))
    out, _ = tx.update(tree, tx.init(tree), tree)
    return [out[f"layers_{i}"] for i in range(len(LAYERS))]


def by_partition(smooth, frozen):
    labels = {k: "frozen" if v else "train" for k, v in frozen.items()}
    tx = optax.chain(OPT, smooth)
    return optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels)


def by_selective_transform(smooth, frozen):
    return optax.selective_transform(optax.chain(OPT, smooth), freeze_mask=frozen)


def by_masked_and_freeze(smooth, frozen):
    trained = {k: not v for k, v in frozen.items()}
    inside = optax.masked(optax.chain(OPT, smooth), trained)
    return optax.chain(inside, optax.freeze(frozen))


@pytest.mark.parametrize(
    "freeze", [by_partition, by_selective_transform, by_masked_and_freeze]
)
@pytest.mark.parametrize(
    ("frozen", "strict"), [([0, 1], True), ([1], False)], ids=["first", "amid"]
)
def test_smoothing_inside_the_trained_part_never_sees_frozen_layers(
    freeze, frozen, strict
):
    smooth = gs.smooth_over_depth(UNROLLED, 0.3, strict=strict)
    updates = update_of_layers(freeze(smooth, mask(frozen)))
    seen = [{} if i in frozen else layer for i, layer in enumerate(LAYERS)]
    expected = oracle.window(descent(seen), 0.3)
    assert_close(updates, [update or NO_UPDATE for update in expected])


def test_a_layer_frozen_amid_others_is_a_gap_that_strict_reports():
    with pytest.raises(ValueError, match=r"layers? 1\b"):
        update_of_layers(by_partition(SMOOTH, FROZEN))


def test_smoothing_before_set_to_zero_leaks_a_frozen_gradient_into_its_neighbors():
    updates = update_of_layers(optax.chain(OPT, SMOOTH, optax.freeze(FROZEN)))
    left, _, right, last = oracle.window(descent(LAYERS), 0.3)
    assert_close(updates, [left, NO_UPDATE, right, last])
    own, frozen = LAYERS[0]["bias"], LAYERS[1]["bias"]
    leak = -0.1 * (0.85 * own + 0.15 * frozen)
    np.testing.assert_allclose(updates[0]["bias"], leak, rtol=1e-5)


def test_a_frozen_gradient_that_no_optimizer_has_seen_leaks_raw():
    opt = optax.masked(OPT, TRAINED)
    updates = update_of_layers(optax.chain(opt, SMOOTH, optax.freeze(FROZEN)))
    own, frozen = LAYERS[0]["bias"], LAYERS[1]["bias"]
    # It is not even that of a descent.
    leak = -0.1 * 0.85 * own + 0.15 * frozen
    np.testing.assert_allclose(updates[0]["bias"], leak, rtol=1e-5)


def test_smoothing_after_set_to_zero_moves_the_frozen_layer():
    updates = update_of_layers(optax.chain(OPT, optax.freeze(FROZEN), SMOOTH))
    seen = [LAYERS[0], NO_UPDATE, *LAYERS[2:]]
    assert_close(updates, oracle.window(descent(seen), 0.3))
    left, right = LAYERS[0]["bias"], LAYERS[2]["bias"]
    move = -0.1 * 0.15 * (left + right)
    np.testing.assert_allclose(updates[1]["bias"], move, rtol=1e-5)


# Where some steps are skipped.

ZERO = each(np.zeros_like, PARAMS)


def mean(*models):
    return each(lambda *xs: sum(xs) / len(xs), *models)


@every_case
def test_multi_steps_shows_it_the_mean_of_the_micro_batches(name):
    tx = optax.MultiSteps(CASES[name].make(), every_k_schedule=2)
    outs, _ = run(tx, update=quick_jit(tx.update))
    batches = [mean(*GRADIENTS[:2]), mean(*GRADIENTS[2:])]
    first, second = replay(CASES[name].twin, batches)
    assert_steps(outs, [ZERO, first, ZERO, second])


@every_case
def test_apply_if_finite_keeps_a_nan_from_updates_moments_and_counts(name):
    good = GRADIENTS[:2]
    bad = [*PARAMS[:2], {**PARAMS[2], "bias": np.full(3, np.nan)}, *PARAMS[3:]]
    tx = optax.apply_if_finite(CASES[name].make(), max_consecutive_errors=3)
    outs, state = run(tx, [good[0], bad, good[1]], quick_jit(tx.update))
    first, second = replay(CASES[name].twin, good)
    assert_steps(outs, [first, ZERO, second])
    assert state.total_notfinite == 1


@pytest.mark.parametrize("name", ["schedule", "traced", "with adam, schedule"])
def test_conditionally_mask_shows_it_the_chosen_steps(name):
    tx = optax.conditionally_mask(CASES[name].make(), lambda step: step % 2 == 0)
    outs, _ = run(tx, update=quick_jit(tx.update))
    first, second = replay(CASES[name].twin, GRADIENTS[::2])
    assert_steps(outs, [first, ZERO, second, ZERO])


# In training: the loss is half the squared norm, so the gradient is the parameters.


def quadratic(params):
    return sum(jnp.sum(x**2) / 2 for x in jax.tree.leaves(params))


def descent_by_half(alpha, depth=DEPTH, **kwargs):
    smooth = gs.smooth_over_depth(depth, alpha, **kwargs)
    return optax.chain(smooth, optax.scale_by_learning_rate(0.5))


def descended(model, alpha, gradient=None, **kwargs):
    """`model` after one step of `descent_by_half(alpha)`."""
    update = smoothed(gradient or model, alpha, **kwargs)
    return each(lambda p, u: p - 0.5 * u, model, update)


def test_lookahead_keeps_fast_and_slow_parameters_of_smoothed_steps():
    tx = optax.lookahead(descent_by_half(0.3), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tree_of(PARAMS))
    state = tx.init(params)
    fast = slow = PARAMS
    for step in range(4):
        updates, state = tx.update(params.fast, state, params)
        params = optax.apply_updates(params, updates)
        fast = descended(fast, 0.3)
        if step % 2 == 1:
            fast = slow = mean(slow, fast)
        assert_close(layers_in(params.fast), fast)
        assert_close(layers_in(params.slow), slow)


def test_schedule_free_averages_smoothed_steps():
    tx = contrib.schedule_free(descent_by_half(0.3), learning_rate=0.5, b1=0.5)
    params = tree_of(PARAMS)
    state = tx.init(params)
    update = quick_jit(tx.update)
    x = y = z = PARAMS
    for step in (1, 2, 3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        z = descended(z, 0.3, gradient=y)
        x = each(lambda x, z, t=step: x + (z - x) / t, x, z)
        y = mean(x, z)
        assert_close(layers_in(params), y)
        evaluated = contrib.schedule_free_eval_params(state, params)
        assert_close(layers_in(evaluated), x)


def test_a_flax_train_state_trains():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(
        apply_fn=None, params=tree_of(PARAMS), tx=descent_by_half(by_count)
    )

    @quick_jit
    def train(state):
        return state.apply_gradients(grads=jax.grad(quadratic)(state.params))

    model = PARAMS
    for alpha in ALPHAS[:2]:
        state = train(state)
        model = descended(model, alpha)
        assert_close(layers_in(state.params), model)
    assert state.step == 2


@pytest.mark.parametrize("form", ["spec", "function"])
def test_an_nnx_optimizer_trains_though_its_paths_differ_in_init_and_update(form):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            layers = [nnx.Linear(4, 3, rngs=rngs) for _ in LAYERS]
            self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers
            self.head = nnx.Linear(3, 1, rngs=rngs)

    model = Net(nnx.Rngs(0))
    for layer, arrays in zip(model.layers, LAYERS, strict=True):
        nnx.update(layer, jax.tree.map(jnp.asarray, arrays))

    seen = set()

    def by_path(path, leaf):
        seen.add(path)
        if path[0] != "layers":
            return None
        return gs.Depth("layers", path[2], path[1])

    depth = UNROLLED if form == "spec" else by_path
    optimizer = nnx.Optimizer(model, descent_by_half(0.3, depth), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            return quadratic(nnx.state(model, nnx.Param))

        optimizer.update(model, nnx.grad(loss)(model))

    train(model, optimizer)
    got = [{role: getattr(x, role)[...] for role in SHAPES} for x in model.layers]
    assert_close(got, descended([*LAYERS, {}], 0.3)[:-1])
    if form == "function":
        assert seen == {
            *(("layers", i, role) for i in range(4) for role in SHAPES),
            ("head", "kernel"),
            ("head", "bias"),
        }


def test_an_equinox_model_trains_with_none_for_what_is_not_trained():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)

    class Net(eqx.Module):
        layers: list
        activation: Callable

    net = Net([eqx.nn.Linear(3, 2, key=key) for key in keys], jax.nn.relu)
    is_weight = jax.tree.map(lambda x: eqx.is_array(x) and x.ndim == 2, net)
    params, static = eqx.partition(net, is_weight)
    assert params.activation is None
    assert params.layers[0].bias is None
    kwargs = {"variant": "directional", "norm_scope": "block"}
    tx = descent_by_half(0.3, UNROLLED, **kwargs)

    @eqx.filter_jit
    def train(params, state):
        loss = eqx.filter_grad(lambda p: quadratic(eqx.combine(p, static).layers))
        updates, state = tx.update(loss(params), state, params)
        return eqx.apply_updates(params, updates), state

    trained, _ = train(params, tx.init(params))
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    before, after = (
        [{"weight": np.asarray(layer.weight)} for layer in p.layers]
        for p in (params, trained)
    )
    assert_close(after, descended([*before, {}], 0.3, **kwargs)[:-1])
