"""Transformations × behaviors: life under jax's transformations and optax's wrappers.

Every row of `transformations.ROWS` keeps every promise of this file.
"""

import copy
import functools
import pickle
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformations as table
from transformations import (
    ALPHAS,
    DEPTH,
    GRADIENTS,
    LEARNERS,
    PARAMS,
    ROWS,
    SHAPES,
    ZERO,
    assert_steps,
    by_count,
    compiled,
    model_of,
    only,
    quick_jit,
    replay,
    run,
    smoothed,
    stacked,
    tree_of,
)

import gradsmooth_optax as gs

core = pytest.mark.core

every_row = pytest.mark.parametrize("name", ROWS)
# Both learners are made of one piece, and slow to compile.
every_row_but_one_learner = pytest.mark.parametrize("name", [*ROWS][:-1])
OURS = [name for name, row in ROWS.items() if row.ours_alone]
# What needs no more than updates, and keeps nothing like the parameters.
WITHOUT_PARAMS = [*OURS, "with adam, schedule", "per_layer"]


# Under jax's transformations.


@core
@every_row
def test_a_compiled_step_is_the_twin_with_donated_buffers_and_without_transfers(name):
    tx, update, traces = compiled(name)
    traces.clear()
    params, *gradients = (tree_of(m, last_apart=True) for m in (PARAMS, *GRADIENTS))
    state, outs = tx.init(params), []
    for step, gradient in enumerate(gradients):
        with jax.transfer_guard("disallow" if step else "allow"):
            donated = gradient, state
            out, state = update(*donated, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
        chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
        outs.append(out)
    assert len(traces) == 1
    # What has no twin is at least no other with layers in one leaf.
    assert_steps(outs, replay(name, GRADIENTS))


@every_row
def test_zeros_give_zeros_and_no_nan(name):
    tx, update, _ = compiled(name)
    params = tree_of(ZERO, last_apart=True)
    state = tx.init(params)
    for _ in range(2):
        out, state = update(tree_of(ZERO, last_apart=True), state, params)
    assert not any(map(np.any, jax.tree.leaves(out)))
    assert not not_finite(state)


def not_finite(tree):
    return [x for x in jax.tree.leaves(tree) if not np.isfinite(np.asarray(x)).all()]


@pytest.mark.parametrize("name", ["constant", *LEARNERS])
def test_without_jit_the_numbers_are_the_same_even_under_debug_nans(name):
    tx, _, _ = compiled(name)
    tree = {"blocks": {"bias": jnp.arange(12.0).reshape(4, 3)}}
    state = tx.init(tree)
    expected, _ = jax.jit(tx.update)(tree, state)
    with jax.debug_nans(True):
        out, _ = tx.update(tree, state)
    chex.assert_trees_all_close(out, expected, rtol=1e-5)


@every_row_but_one_learner
def test_injected_and_under_vmap_over_seeds_of_a_scan_over_steps_it_is_the_twin(name):
    row, params = ROWS[name], tree_of(PARAMS)
    tx = optax.inject_hyperparams(row.factory)(**row.kwargs)

    @quick_jit
    @jax.vmap
    def train(gradients):
        def step(state, gradient):
            out, state = tx.update(gradient, state, params)
            return state, out

        return jax.lax.scan(step, tx.init(params), gradients)

    seeds = [GRADIENTS[:3], [model_of(10 + step) for step in range(3)]]
    gradients = stacked([stacked(map(tree_of, seed)) for seed in seeds])
    state, outs = jax.tree.map(np.asarray, train(gradients))
    for i, seed in enumerate(seeds):
        steps = [jax.tree.map(lambda x, at=(i, t): x[at], outs) for t in range(3)]
        assert_steps(steps, replay(name, seed))
    for key, value in row.kwargs.items():
        if value is by_count:
            value = ALPHAS[2]
        if isinstance(value, float):
            np.testing.assert_allclose(state.hyperparams[key], value, rtol=1e-6)


@core
@every_row
def test_shapes_alone_are_enough_for_init_and_update(name):
    tx, params = ROWS[name].make(), tree_of(PARAMS)
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    out, new_state = jax.eval_shape(tx.update, shapes, state, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@core
@every_row
def test_in_bfloat16_the_branches_of_a_cond_agree(name):
    tx, params = ROWS[name].make(), tree_of(PARAMS, jnp.bfloat16)

    def maybe_update(do, gradient, state):
        return jax.lax.cond(
            do, lambda: tx.update(gradient, state, params), lambda: (gradient, state)
        )

    out, _ = jax.eval_shape(maybe_update, True, params, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)


@pytest.mark.parametrize("name", ["directional, block", "per_layer", *LEARNERS])
def test_no_tracer_leaks(name):
    tx, params = ROWS[name].make(), tree_of(PARAMS)
    with jax.checking_leaks():
        jax.jit(tx.update).trace(params, tx.init(params), params)


# The protocol of optax.


def program(function, *args):
    return str(jax.make_jaxpr(function)(*args))


@core
@every_row
def test_update_takes_keywords_and_more_arguments_and_needs_few(name):
    tx, params = ROWS[name].make(), tree_of(PARAMS)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    ways = [
        lambda u, s, p: tx.update(updates=u, state=s, params=p),
        lambda u, s, p: tx.update(u, s, p, value=1.0, obj_fn=len),
    ]
    if name in WITHOUT_PARAMS:
        ways.append(lambda u, s, p: tx.update(u, s))
    expected = program(tx.update, params, state, params)
    for way in ways:
        assert program(way, params, state, params) == expected


@core
@every_row
def test_tree_map_params_tells_the_moments_from_the_few_other_leaves(name):
    tx, row = ROWS[name].make(), ROWS[name]
    state = tx.init(tree_of(PARAMS))
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _: "moment", state, transform_non_params=lambda _: "other"
    )
    # Where a dict holds a leaf for each stack, it is one other leaf.
    if name not in ("per_layer", *LEARNERS):
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
    found = Counter(jax.tree.leaves(mapped))
    assert found == Counter(moment=row.moments, other=row.others)


@core
@every_row
def test_a_run_goes_on_from_a_flattened_a_pickled_or_a_copied_state(name):
    tx, params = ROWS[name].make(), tree_of(PARAMS)
    state = tx.init(params)
    leaves, treedef = jax.tree.flatten(state)
    for again in (
        jax.tree.unflatten(treedef, leaves),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
    ):
        assert jax.tree.structure(again) == treedef
        chex.assert_trees_all_equal(again, state)
        jax.eval_shape(tx.update, params, again, params)


# Under inject_hyperparams.


def injected(depth=DEPTH):
    return optax.inject_hyperparams(gs.smooth_over_depth)(depth, operator=0.3)


@core
def test_an_injected_alpha_can_be_set_between_steps_without_a_retrace():
    tx, params, traces = injected(), tree_of(PARAMS), []

    @quick_jit
    def update(updates, state):
        traces.append(None)
        return tx.update(updates, state)

    state = tx.init(params)
    assert set(state.hyperparams) == {"operator"}
    for alpha in (0.3, 0.7):
        state.hyperparams["operator"] = jnp.asarray(alpha)
        out, state = update(tree_of(GRADIENTS[0]), state)
        assert_steps([out], [smoothed(GRADIENTS[0], alpha)])
    assert len(traces) == 1


@core
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


KINDS_OF_SPECS = {
    "ranked": lambda: gs.ranked(DEPTH),
    "only": lambda: DEPTH.only(lambda path, leaf: True),
    "depth_fn": lambda: gs.depth_fn(by_hand),
    "name": lambda: (
        "first_match(scanned('blocks/', stack='net'), "
        r"unrolled(r'layer_(\d+)/', stack='net'))"
    ),
}


@core
@pytest.mark.parametrize("kind", KINDS_OF_SPECS)
def test_inject_hyperparams_takes_no_kind_of_spec_for_a_schedule(kind):
    tx, params = injected(KINDS_OF_SPECS[kind]()), tree_of(PARAMS)
    args = params, tx.init(params)
    assert program(tx.update, *args) == program(injected().update, *args)


# Where some leaves are hidden, and some steps.


def of_role(role, tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: role in str(path), tree)


def spoiled(model, value):
    return [*model[:2], model[2] | {"bias": np.full(3, value, np.float32)}, *model[3:]]


@every_row_but_one_learner
def test_wrappers_show_it_the_mean_of_the_finite_micro_batches_of_the_chosen_leaves(
    name,
):
    masked = optax.masked(ROWS[name].make(), functools.partial(of_role, "kernel"))
    tx = optax.MultiSteps(masked, every_k_schedule=2).gradient_transformation()
    tx = optax.apply_if_finite(tx, max_consecutive_errors=3)
    good = [*GRADIENTS[:2], *GRADIENTS[:1], GRADIENTS[3]]
    bad = [spoiled(PARAMS, np.nan), spoiled(PARAMS, np.inf)]
    outs, state = run(tx, [good[0], *bad, *good[1:]])
    assert state.total_notfinite == 2
    assert not not_finite(state)
    batches = [table.mean(*good[:2]), table.mean(*good[2:])]
    # The biases are absent from the norms of a block, too.
    kernels = [only("kernel", batch) for batch in batches]
    updates = replay(name, kernels, only("kernel", PARAMS))
    first, second = (
        [g | u for g, u in zip(batch, update, strict=True)]
        for batch, update in zip(batches, updates, strict=True)
    )
    assert_steps(outs, [ZERO, ZERO, ZERO, first, ZERO, second])


@core
@pytest.mark.parametrize("name", ["schedule", "with adam, schedule"])
def test_conditionally_mask_shows_it_the_chosen_steps(name):
    tx = optax.conditionally_mask(ROWS[name].make(), lambda step: step % 2 == 0)
    outs, _ = run(tx, GRADIENTS)
    first, second = replay(name, GRADIENTS[::2])
    assert_steps(outs, [first, ZERO, second, ZERO])


@pytest.mark.parametrize("name", ["directional, block"])
def test_zero_nans_before_it_is_as_if_the_update_of_that_layer_were_zero(name):
    tx = optax.chain(optax.zero_nans(), ROWS[name].make())
    outs, _ = run(tx, [GRADIENTS[0], spoiled(GRADIENTS[1], np.nan), GRADIENTS[3]])
    zeroed = [GRADIENTS[0], spoiled(GRADIENTS[1], 0.0), GRADIENTS[3]]
    assert_steps(outs, replay(name, zeroed))


# What is learned, of one small leaf.


def taught(learn, inner, gradients):
    """The state after these gradients of one stacked leaf."""
    tx = learn(inner, gs.scanned("blocks/"), learning_rate=0.3)
    state = tx.init({"blocks": {"w": gradients[0]}})

    @quick_jit
    def update(gradient, state):
        return tx.update({"blocks": {"w": gradient}}, state)[1]

    for gradient in gradients:
        state = update(gradient, state)
    return state


def learned(state):
    fields = {"alpha", "weights", "signal"} & set(state._fields)
    return {field: getattr(state, field) for field in fields}


DRAWN = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
both_learners = pytest.mark.parametrize(
    "learn", [gs.contrib.learn_alpha, gs.contrib.learn_operator]
)


@both_learners
def test_what_is_learned_stays_finite_even_if_the_moments_of_the_inner_do_not(learn):
    bad = np.where(np.arange(3)[:, None] == 1, np.float32(np.nan), DRAWN[1])
    state = taught(learn, optax.scale_by_adam(), [DRAWN[0], bad, *DRAWN])
    assert not_finite(state.inner_state)
    assert not not_finite(learned(state))


@both_learners
def test_learners_take_complex_updates_and_learn_real_numbers(learn):
    expected = learned(taught(learn, optax.identity(), DRAWN))
    # Turned by i, all inner products are what they were.
    got = learned(taught(learn, optax.identity(), DRAWN * np.complex64(1j)))
    chex.assert_trees_all_close(got, expected, rtol=1e-4)
    chex.assert_trees_all_equal_dtypes(got, expected)
    start = learned(taught(learn, optax.identity(), DRAWN[:1]))
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (got, start)), strict=True)
    )


# Dtypes: states and updates keep theirs, and nothing is promoted silently.

DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]


def tree_of_dtypes(dtypes):
    layer = {f"of_{dtype}": np.ones((2, 3), dtype) for dtype in dtypes}
    return tree_of([layer] * 4 + [{"table": np.ones(5, np.float32)}])


def assert_traces_strictly(tx, tree):
    """`init` and `update` promote neither dtypes nor ranks, and keep dtypes."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, tree)
        out, new_state = jax.eval_shape(tx.update, tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    return state


@pytest.mark.parametrize("name", OURS)
def test_nothing_of_ours_promotes_dtypes_or_ranks(name, enable_x64):
    # A factor times a complex number is a promotion to jax.
    dtypes = DTYPES[:4] if name in RATES else DTYPES
    with enable_x64():
        assert_traces_strictly(ROWS[name].make(), tree_of_dtypes(dtypes))
        state = assert_traces_strictly(ROWS[name].make(), tree_of_dtypes(["float32"]))
    floating = [x for x in jax.tree.leaves(state) if x.dtype.kind == "f"]
    assert {x.dtype for x in floating} <= {np.dtype("float32")}


RATES = ("layer-wise decay", "scheduled rates")


@pytest.mark.parametrize("name", RATES)
def test_factors_of_complex_updates_promote_nothing(name):
    assert_traces_strictly(ROWS[name].make(), tree_of_dtypes(["complex64"]))


STRENGTHS = {
    "NumPy half": lambda: np.float16(0.25),
    "NumPy double": lambda: np.float64(0.25),
    "weak": lambda: jnp.asarray(0.25),
    "float32": lambda: jnp.float32(0.25),
    "bfloat16": lambda: jnp.bfloat16(0.25),
    "of floats": lambda: lambda count: 0.25,
    "of NumPy doubles": lambda: lambda count: np.float64(0.25),
    "of bfloat16": lambda: lambda count: jnp.bfloat16(0.25),
    "of optax": lambda: optax.constant_schedule(0.25),
}


@core
@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_strength_of_any_type_promotes_nothing(kind, enable_x64):
    with enable_x64():
        alpha = STRENGTHS[kind]()
        tree = tree_of_dtypes(["bfloat16", "float64"])
        for tx in (
            gs.smooth_over_depth(DEPTH, gs.window(alpha, 2, decay=alpha)),
            gs.smooth_over_depth(DEPTH, alpha, variant="directional"),
            gs.smooth_over_depth(DEPTH, gs.compose(gs.tikhonov(alpha), gs.ema(alpha))),
            gs.smooth_over_depth(DEPTH, gs.similarity_window(alpha, sharpness=alpha)),
            gs.scale_over_depth(DEPTH, alpha),
        ):
            assert_traces_strictly(tx, tree)


@core
@both_learners
def test_numbers_given_to_learners_promote_nothing(learn):
    half = {n: jnp.bfloat16(0.25) for n in ("alpha", "learning_rate", "decay")}
    tx = learn(optax.identity(), DEPTH, **half)
    assert_traces_strictly(tx, tree_of_dtypes(["float32"]))


@pytest.mark.parametrize("kind", ["weak", "NumPy double", "bfloat16"])
def test_a_strength_is_an_argument_of_a_compiled_step_whatever_its_type(kind):
    alpha, traces = STRENGTHS[kind](), []

    @quick_jit
    def smooth(alpha, tree):
        traces.append(None)
        tx = gs.smooth_over_depth(DEPTH, alpha, variant="directional")
        return tx.update(tree, tx.init(tree))[0]

    for _ in range(2):
        out = smooth(alpha, tree_of(GRADIENTS[0]))
        expected = smoothed(GRADIENTS[0], float(alpha), variant="directional")
        assert_steps([out], [expected])
    assert len(traces) == 1


@core
@every_row
def test_weakly_typed_parameters_are_not_traced_anew_for_ever(name):
    tx = ROWS[name].make()
    params = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(1.0), x.shape), tree_of(PARAMS)
    )
    assert all(x.weak_type for x in jax.tree.leaves(params))

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    seen = [(params, tx.init(params))]
    # As without smoothing: moments are weak a step longer.
    for _ in range(3):
        seen.append(jax.eval_shape(step, *seen[-1]))
    kinds = [
        [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
        for state in seen
    ]
    assert kinds[-1] == kinds[-2]
    dtypes = {dtype for _, dtype, _ in kinds[-1]}
    assert dtypes <= {np.dtype("float32"), np.dtype("int32"), np.dtype("bool")}


# Odd leaves and odd trees.

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
    "float0": lambda: np.zeros((2,), jax.dtypes.float0),
    "none": lambda: None,
}


# Of every kind of what is ours alone.
some_of_ours = pytest.mark.parametrize(
    "name", ["directional, block", "similarity", "layer-wise decay", "learned alpha"]
)


@core
@some_of_ours
def test_a_leaf_that_is_no_update_comes_back_as_the_same_object(name):
    odd = {kind: make() for kind, make in NO_UPDATES.items()}
    layers = {f"layer_{i}": {"bias": jnp.ones(3) * i, **odd} for i in range(4)}
    tree, tx = layers | {"head": odd}, ROWS[name].make()
    out, _ = tx.update(tree, tx.init(tree))
    for part in tree:
        changed = [kind for kind in odd if out[part][kind] is not tree[part][kind]]
        assert changed == []


@core
@every_row
def test_trees_without_arrays_are_never_an_error(name):
    tx = ROWS[name].make()
    masked = {"blocks": {"w": optax.MaskedNode()}, "layer_3": optax.MaskedNode()}
    trees = {}, (), [None, None], {"layer_0": {"w": None}, "b": ()}, masked
    for tree in trees:
        out, _ = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(out) == jax.tree.structure(tree)


@pytest.mark.parametrize("num_layers", [0, 1])
@pytest.mark.parametrize("name", [name for name in ROWS if name not in RATES])
def test_a_scan_of_no_or_of_one_layer_is_no_error(name, num_layers):
    blocks = {role: jnp.ones((num_layers, *shape)) for role, shape in SHAPES.items()}
    tree, row = {"blocks": blocks}, ROWS[name]
    tx = row.make()
    state = tx.init(tree)
    out, new_state = jax.eval_shape(tx.update, tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    if row.factory is gs.smooth_over_depth:
        out, _ = tx.update(tree, state, tree)
        assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (out, tree))))


@some_of_ours
def test_one_array_object_at_several_leaves_is_as_good_as_copies_of_it(name):
    x, y = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5, 3.0, 1.0])
    pairs = (x, x), (y, x), (x, y), (x, x)
    shared = {f"layer_{i}": {"a": a, "b": b} for i, (a, b) in enumerate(pairs)}
    tx = ROWS[name].make()
    out, expected = (
        tx.update(tree, tx.init(tree), tree)[0]
        for tree in (shared, jax.tree.map(jnp.array, shared))
    )
    chex.assert_trees_all_equal(out, expected)
