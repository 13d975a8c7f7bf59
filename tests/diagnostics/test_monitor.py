"""`monitor_depth` records what `depth_statistics` says, and changes nothing else."""

import functools
import pickle
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import (
    DepthRecord,
    MonitorDepthState,
    depth_statistics,
    monitor_depth,
    monitored,
)

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(stack="blocks")
SMOOTH = gs.smooth_over_depth(SCANNED, 0.4)


def params_of(layers=4, seed=0):
    blocks = oracle.random_blocks(layers, seed=seed)
    return {"blocks": oracle.stacked_tree(blocks), "embed": np.ones((2, 3), "float32")}


def updates_at(step):
    return params_of(seed=100 + step)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected
    )


@functools.cache
def statistics(depth=SCANNED):
    return jax.jit(lambda updates: depth_statistics(updates, depth))


@functools.cache
def update_of_smooth(every):
    """What several tests run, compiled once."""
    return jax.jit(monitor_depth(SMOOTH, SCANNED, every=every).update)


# What is recorded.


class Row(NamedTuple):
    inner: Any
    every: int = 1
    depth: Any = SCANNED


ROWS = {
    "smoothing between others, at every step": Row(
        optax.chain(optax.scale_by_adam(), SMOOTH, optax.scale(-0.1))
    ),
    "a schedule, at every second": Row(
        gs.smooth_over_depth(SCANNED, lambda count: 0.1 * count), 2
    ),
    "a leaf for each layer, at every third": Row(
        gs.smooth_over_depth(UNROLLED, 0.4), 3, UNROLLED
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_it_records_every_kth_step_before_and_after_and_changes_nothing_else(name):
    inner, every, depth = ROWS[name]
    tx = monitor_depth(inner, depth, every=every)

    def tree_of(tree):
        if depth is SCANNED:
            return tree
        return oracle.unrolled_tree(oracle.unstacked(tree["blocks"]))

    params = tree_of(params_of())
    state, inner_state = tx.init(params), inner.init(params)
    # Each is traced once; a state that `init` made may be donated.
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=1)
    update_of_inner = jax.jit(inner.update)
    recorded = []
    for step in range(5):
        updates = tree_of(updates_at(step))
        after, state = update(updates, state)
        wanted, inner_state = update_of_inner(updates, inner_state)
        assert_same(after, wanted)
        assert_same(state.inner_state, inner_state)
        recorded.append((updates, wanted))
        record = monitored(state)
        assert isinstance(record, DepthRecord)
        assert int(state.count) == step + 1
        assert int(record.step) == step - step % every
        before, after = recorded[step - step % every]
        assert_same(record.before, statistics(depth)(before))
        assert_same(record.after, statistics(depth)(after))


def test_statistics_by_hand():
    smooth = gs.smooth_over_depth(SCANNED, 0.5)
    updates = {"blocks": {"w": jnp.array([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}}
    tx = monitor_depth(smooth, SCANNED)
    record = monitored(jax.jit(tx.update)(updates, tx.init(updates))[1])
    before, after = record.before["blocks"], record.after["blocks"]
    assert before.norms.tolist() == [4.0, 0.0, 0.0]
    assert after.norms.tolist() == [3.0, 1.0, 0.0]
    assert before.cosines.tolist() == [0.0, 0.0]
    assert after.cosines.tolist() == [1.0, 0.0]
    assert (float(before.roughness), float(after.roughness)) == (16.0, 5.0)
    assert float(after.roles["w"].relative_roughness) == 0.5


def test_nothing_is_recorded_at_init_also_of_abstract_parameters():
    tx, params = monitor_depth(SMOOTH, SCANNED), params_of()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for given in (params, shapes):
        record = monitored(tx.init(given))
        assert int(record.step) == -1
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(record[1:]))
        chex.assert_trees_all_equal_shapes_and_dtypes(
            record.before, statistics()(params)
        )


def test_what_passes_are_the_same_objects_and_what_is_no_array():
    tree = jax.tree.map(jnp.asarray, params_of())
    tx = monitor_depth(SMOOTH, SCANNED)

    def update(tree):
        tree = {**tree, "name": "a", "function": len, "nothing": None}
        new, state = tx.update(tree, tx.init(tree))
        assert new["embed"] is tree["embed"]
        assert (new["name"], new["function"]) == ("a", len)
        return monitored(state)

    jax.eval_shape(update, tree)


def test_a_scan_over_steps_stacks_the_records_of_every_model_into_a_history():
    tx = optax.chain(optax.scale_by_adam(), monitor_depth(SMOOTH, SCANNED, every=3))
    models = jax.tree.map(lambda *x: jnp.stack(x), updates_at(0), updates_at(1))

    @jax.jit
    def trained(models):
        def step(state, seed):
            updates = jax.tree.map(lambda x: x * jnp.cos(seed), models)
            updates, state = jax.vmap(tx.update)(updates, state)
            return state, (monitored(state), updates)

        return jax.lax.scan(step, jax.vmap(tx.init)(models), jnp.arange(5.0))[1]

    history, updates = trained(models)
    recorded = np.array([0, 0, 0, 3, 3])
    assert history.step.tolist() == [[step, step] for step in recorded]
    assert history.after["blocks"].cosines.shape == (5, 2, 3)
    of_layers = [np.reshape(x, (5, 2, 4, -1)) for x in updates["blocks"].values()]
    norms = np.linalg.norm(np.concatenate(of_layers, axis=-1), axis=-1)
    np.testing.assert_allclose(history.after["blocks"].norms, norms[recorded], 1e-5)


def test_half_precision_updates_of_float32_parameters_are_recorded_in_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of())
    state = monitor_depth(SMOOTH, SCANNED).init(params_of())
    record = monitored(jax.eval_shape(update_of_smooth(2), half, state)[1])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(record[1:])}
    assert dtypes == {np.dtype("float32")}


def test_a_record_keeps_the_dtype_that_the_parameters_gave_it(enable_x64):
    with enable_x64():
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "f8"), params_of())
        tx = monitor_depth(SMOOTH, SCANNED, every=2)
        state = jax.eval_shape(tx.init, wide)
        _, state = jax.eval_shape(tx.update, params_of(), state)
    assert monitored(state).after["blocks"].norms.dtype == np.float64


def test_zero_updates_make_no_nan():
    zeros = jax.tree.map(np.zeros_like, params_of())
    state = monitor_depth(SMOOTH, SCANNED).init(zeros)
    with jax.debug_nans(True):
        _, state = update_of_smooth(2)(zeros, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_count_stays_at_the_largest_int32():
    state = monitor_depth(SMOOTH, SCANNED).init(params_of())
    state = state._replace(count=jnp.int32(2**31 - 1))
    _, state = update_of_smooth(2)(updates_at(0), state)
    assert int(state.count) == 2**31 - 1
    assert int(monitored(state).step) == -1  # odd


# What it costs.


def test_the_step_has_no_callback_and_no_transfer_to_the_host():
    updates = jax.tree.map(jnp.asarray, params_of())
    state = jax.device_put(monitor_depth(SMOOTH, SCANNED).init(updates))
    text = update_of_smooth(2).lower(updates, state).as_text()
    assert "callback" not in text
    assert "custom_call" not in text.replace("@Sharding", "")
    with jax.transfer_guard("disallow"):
        update_of_smooth(2)(updates, state)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older compilers copy the updates more often"
)
def test_it_needs_memory_for_at_most_three_more_copies_of_the_updates():
    params = {"blocks": {"v": jnp.ones((16, 64, 64)), "w": jnp.ones((16, 64, 128))}}

    def temporaries(middle):
        rate = optax.scale_by_learning_rate(0.1)
        tx = optax.chain(optax.scale_by_adam(), middle, rate)

        def step(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        donated = jax.jit(step, donate_argnums=(0, 1))
        compiled = donated.lower(params, tx.init(params), params).compile()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return compiled.memory_analysis().temp_size_in_bytes / size

    alone = temporaries(SMOOTH)
    for every in (1, 100):
        # Were `inner` not run again for a record, it would be four with `every`.
        watched = temporaries(monitor_depth(SMOOTH, SCANNED, every=every))
        assert watched <= alone + 2.9


# Inside of other transformations, and around them.


def watched(learning_rate=0.1):
    watch = monitor_depth(SMOOTH, SCANNED, every=2)
    return optax.chain(watch, optax.scale_by_learning_rate(learning_rate))


def wrapped():
    labels = {"blocks": "train", "embed": "frozen"}
    kinds = {"train": watched(), "frozen": optax.set_to_zero()}
    # An optimizer of nothing has no record.
    empty = {"train": watched(), "frozen": optax.identity(), "none": watched()}
    return {
        "masked": optax.masked(watched(), {"blocks": True, "embed": False}),
        "partition": optax.partition(kinds, labels),
        "MultiSteps": optax.MultiSteps(watched(), 1).gradient_transformation(),
        "inject_hyperparams": optax.inject_hyperparams(watched)(learning_rate=0.1),
        "apply_if_finite": optax.apply_if_finite(watched(), 3),
        "a partition with nothing in it": optax.partition(empty, labels),
    }


@pytest.mark.slow
def test_inside_of_the_wrappers_of_optax_and_where_a_step_is_skipped():
    @jax.jit
    def step(updates, states):
        return {
            name: tx.update(updates, states[name], params_of())[1]
            for name, tx in wrapped().items()
        }

    states = {name: tx.init(params_of()) for name, tx in wrapped().items()}
    states = step(updates_at(0), states)
    found = dict(states)
    empty = "a partition with nothing in it"
    found[empty] = found[empty].inner_states["train"]
    for state in found.values():
        assert_same(monitored(state).before, statistics()(updates_at(0)))

    bad = jax.tree.map(lambda x: x * np.nan, updates_at(1))
    for _ in range(2):  # of the count, the first is no step of a record
        states = step(bad, states)
    skipped = states["apply_if_finite"]
    assert_same(monitored(skipped), monitored(found["apply_if_finite"]))
    assert np.isnan(monitored(states["masked"]).before["blocks"].roughness)


def test_tree_map_params_tells_the_records_from_the_moments():
    tx = monitor_depth(optax.chain(optax.scale_by_adam(), SMOOTH), SCANNED)
    state = tx.init(params_of())
    marked = optax.tree_map_params(tx, lambda x: "moment", state)
    assert set(jax.tree.leaves(marked.inner_state[0].mu)) == {"moment"}
    assert_same(marked.record, state.record)


def test_a_tree_without_leaves_and_one_that_nothing_matches_pass():
    tx = monitor_depth(optax.identity(), SCANNED, strict=False)
    for tree in ({}, {"a": None}, {"embed": jnp.ones(2)}):
        updates, state = tx.update(tree, tx.init(tree))
        assert updates == tree
        assert int(state.count) == 1


def test_parameters_and_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda x, p: factor * x + 0 * p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = monitor_depth(inner, SCANNED, every=2)
    new, state = jax.jit(tx.update)(
        updates_at(0), tx.init(params_of()), params_of(), factor=2.0
    )
    assert_same(new, jax.tree.map(lambda x: 2 * x, updates_at(0)))
    record = monitored(state)
    before, after = record.before["blocks"].norms, record.after["blocks"].norms
    np.testing.assert_allclose(after, 2 * before, rtol=1e-6)


# `monitored`.


def test_the_record_is_found_in_any_tree_and_survives_pickling():
    class TrainState(NamedTuple):
        params: dict
        opt_state: tuple

    tx = optax.chain(optax.scale_by_adam(), monitor_depth(SMOOTH, SCANNED))
    state = tx.init(params_of())
    assert int(monitored({"state": [TrainState(params_of(), state)]}).step) == -1
    again = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert isinstance(again[1], MonitorDepthState)
    assert_same(monitored(again), monitored(state))


def test_records_of_an_optimizer_of_flax_nnx_are_arrays_of_their_own_step():
    nnx = pytest.importorskip("flax.nnx")
    layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in range(3)]
    model, depth = nnx.Sequential(*layers), gs.unrolled()
    tx = monitor_depth(gs.smooth_over_depth(depth, 0.2), depth)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
        optimizer.update(model, gradients)

    records = []
    for _ in range(2):
        step(model, optimizer)
        records.append(monitored(optimizer.opt_state))
    assert [int(record.step) for record in records] == [0, 1]
    assert isinstance(records[0].after["layers"].norms, jax.Array)


# Errors.


def updated(inner, layers=4, every=1):
    """Of a state for 4 layers and updates of this many."""
    tx = monitor_depth(inner, SCANNED, every=every)
    return jax.eval_shape(tx.update, params_of(layers), tx.init(params_of()))


def without_bias():
    def update(updates, params):
        return {**updates, "blocks": {**updates["blocks"], "bias": None}}

    return optax.stateless(update)


def inside_shard_map():
    tx = monitor_depth(gs.smooth_over_depth(SCANNED, 0.2, axis_name="stage"), SCANNED)
    state = tx.init(params_of())
    half = jax.tree.map(lambda x: x[:2] if x.shape[0] == 4 else x, params_of())
    run = jax.shard_map(
        lambda updates: tx.update(updates, state)[0],
        mesh=jax.make_mesh((1,), ("stage",)),
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
    )
    return jax.eval_shape(run, half)


def told(call, *fragments):
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    for fragment in fragments:
        assert fragment in str(info.value)


def test_wrong_arguments_are_told():
    told(lambda: monitor_depth(SCANNED, SCANNED), "`inner` must be an optax")
    told(lambda: monitor_depth(SMOOTH, "blocks/"), "`depth`")
    told(lambda: monitor_depth(SMOOTH, SCANNED, strict="yes"), "`strict`")
    tx = monitor_depth(SMOOTH, gs.scanned("layers/"))
    told(lambda: tx.init(params_of()), "matched none")
    for every, said in (
        (2**31, "`every` must be at most 2147483647"),
        (0, "`every` must be an int >= 1, but is 0"),
        (1.5, "`every` must be an int >= 1, but is 1.5"),
        (jnp.array(2), 'static_args=("every",)'),
    ):
        told(lambda every=every: monitor_depth(SMOOTH, SCANNED, every=every), said)


def test_updates_of_other_layers_than_those_of_the_state_are_told():
    found = "records 'blocks' (4 layers, 3 pairs", "have 'blocks' (3 layers, 2 pairs"
    told(lambda: updated(optax.identity(), layers=3), *found)
    told(inside_shard_map, "inside `jax.shard_map`")
    dropped = "`inner` of `monitor_depth` was given", "bias, 4 layers", "around the smo"
    for every in (1, 2):
        told(lambda every=every: updated(without_bias(), every=every), *dropped)


def test_a_state_of_no_or_of_several_monitors_is_told_with_where_they_are():
    state = optax.adam(1e-3).init(params_of())
    where = "`monitor_depth(smooth_over_depth(", "`optimizer.opt_state`"
    told(lambda: monitored(state), *where)
    watch = monitor_depth(optax.identity(), SCANNED)
    state = optax.chain(watch, monitor_depth(watch, SCANNED)).init(params_of())
    places = ("state[0]", "state[1]", "state[1].inner_state")
    each = ", ".join(f"`monitored({place})`" for place in places)
    told(lambda: monitored(state), "3 monitors", each)
    assert int(monitored(state[1].inner_state).step) == -1
