"""`monitor_depth` records what `depth_statistics` says, and changes nothing else."""

import functools
import pickle
import re
from typing import NamedTuple

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

# One quick compilation each, where op by op there are dozens.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def params_of(layers=4, seed=0):
    blocks = oracle.random_blocks(layers, seed=seed)
    return {"blocks": oracle.stacked_tree(blocks), "embed": np.ones((2, 3), "float32")}


def updates_at(step):
    return params_of(seed=100 + step)


def assert_same(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected
    )


def steps(tx, number, layers=4):
    """The updates and the states of this many steps."""
    state = tx.init(params_of(layers))
    update = jit(tx.update)
    for step in range(number):
        updates, state = update(updates_at(step), state)
        yield updates, state


# What is recorded.


def test_the_record_is_the_statistics_of_what_goes_in_and_of_what_comes_out():
    tx = monitor_depth(SMOOTH, SCANNED)
    ((updates, state),) = steps(tx, 1)
    record = monitored(state)
    assert isinstance(record, DepthRecord)
    assert int(record.step) == 0
    assert_same(record.before, depth_statistics(updates_at(0), SCANNED))
    assert_same(record.after, depth_statistics(updates, SCANNED))
    before, after = record.before["blocks"], record.after["blocks"]
    assert float(after.roughness) < float(before.roughness)


def test_statistics_by_hand():
    smooth = gs.smooth_over_depth(SCANNED, 0.5)
    updates = {"blocks": {"w": jnp.array([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}}
    tx = monitor_depth(smooth, SCANNED)
    record = monitored(tx.update(updates, tx.init(updates))[1])
    before, after = record.before["blocks"], record.after["blocks"]
    assert before.norms.tolist() == [4.0, 0.0, 0.0]
    assert after.norms.tolist() == [3.0, 1.0, 0.0]
    assert before.cosines.tolist() == [0.0, 0.0]
    assert after.cosines.tolist() == [1.0, 0.0]
    assert (float(before.roughness), float(after.roughness)) == (16.0, 5.0)
    assert float(after.roles["w"].relative_roughness) == 0.5


def test_nothing_is_recorded_at_init():
    record = monitored(monitor_depth(SMOOTH, SCANNED).init(params_of()))
    assert int(record.step) == -1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(record[1:]))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_update_is_recorded_and_the_others_keep_the_record(every):
    tx = monitor_depth(SMOOTH, SCANNED, every=every)
    for step, (_, state) in enumerate(steps(tx, 5)):
        recorded = step - step % every
        record = monitored(state)
        assert int(record.step) == recorded
        assert int(state.count) == step + 1
        assert_same(record.before, depth_statistics(updates_at(recorded), SCANNED))
        after, _ = SMOOTH.update(updates_at(recorded), optax.EmptyState())
        assert_same(record.after, depth_statistics(after, SCANNED))


@pytest.mark.parametrize("every", [1, 2])
def test_updates_and_inner_state_are_those_of_the_inner_transformation(every):
    inner = optax.chain(optax.scale_by_adam(), SMOOTH, optax.scale(-0.1))
    watched = steps(monitor_depth(inner, SCANNED, every=every), 4)
    for (updates, state), (expected, inner_state) in zip(
        watched, steps(inner, 4), strict=True
    ):
        assert_same(updates, expected)
        assert_same(state.inner_state, inner_state)


def test_untouched_leaves_come_back_as_the_same_objects():
    updates = jax.tree.map(jnp.asarray, params_of())
    tx = monitor_depth(SMOOTH, SCANNED)
    new, _ = tx.update(updates, tx.init(updates))
    assert new["embed"] is updates["embed"]


def test_the_inner_schedule_is_read_once_a_step_also_where_a_step_is_recorded():
    smooth = gs.smooth_over_depth(SCANNED, lambda count: 0.1 * count)
    tx = monitor_depth(smooth, SCANNED, every=2)
    for step, (updates, state) in enumerate(steps(tx, 4)):
        expected, _ = gs.smooth_over_depth(SCANNED, 0.1 * step).update(
            updates_at(step), optax.EmptyState()
        )
        assert_same(updates, expected)
        assert int(state.inner_state.count) == step + 1


def test_one_leaf_per_layer_is_recorded_as_a_stack():
    blocks = oracle.random_blocks(4)
    tree, depth = oracle.unrolled_tree(blocks), gs.unrolled(stack="blocks")
    tx = monitor_depth(gs.smooth_over_depth(depth, 0.4), depth, every=2)
    record = monitored(jit(tx.update)(tree, tx.init(tree))[1])
    stacked = {"blocks": oracle.stacked_tree(blocks)}
    assert_same(record.before, depth_statistics(stacked, SCANNED))
    smoothed, _ = SMOOTH.update(stacked, optax.EmptyState())
    assert_same(record.after, depth_statistics(smoothed, SCANNED))


def test_half_precision_updates_of_float32_parameters_are_recorded_in_float32():
    params = params_of()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    tx = monitor_depth(SMOOTH, SCANNED, every=2)
    _, state = jit(tx.update)(half, tx.init(params))
    record = monitored(state)
    assert_same(record.before, depth_statistics(half, SCANNED))
    assert {leaf.dtype for leaf in jax.tree.leaves(record[1:])} == {
        jnp.dtype("float32")
    }


# Where it works.


@pytest.mark.parametrize("every", [1, 3])
def test_a_scan_over_steps_stacks_the_records_into_a_history(every):
    tx = optax.chain(optax.scale_by_adam(), monitor_depth(SMOOTH, SCANNED, every=every))

    def step(state, seed):
        updates = jax.tree.map(lambda x: x * jnp.cos(seed), params_of())
        updates, state = tx.update(updates, state)
        return state, (monitored(state), updates)

    _, (history, updates) = jit(lambda s: jax.lax.scan(step, s, jnp.arange(5.0)))(
        tx.init(params_of())
    )
    recorded = [step - step % every for step in range(5)]
    assert history.step.tolist() == recorded
    assert history.after["blocks"].cosines.shape == (5, 3)
    of_all = [jax.tree.map(lambda x, i=i: x[i], updates) for i in recorded]
    norms = [depth_statistics(u, SCANNED)["blocks"].norms for u in of_all]
    np.testing.assert_allclose(history.after["blocks"].norms, norms, rtol=1e-5)


def test_under_vmap_every_model_has_its_own_record():
    tx = monitor_depth(SMOOTH, SCANNED, every=2)
    updates = jax.tree.map(lambda *x: jnp.stack(x), updates_at(0), updates_at(1))
    params = jax.tree.map(lambda x: jnp.stack([x, x]), params_of())
    _, states = jit(jax.vmap(tx.update))(updates, jax.vmap(tx.init)(params))
    record = monitored(states)
    assert record.step.tolist() == [0, 0]
    for i in range(2):
        expected = depth_statistics(updates_at(i), SCANNED)
        assert_same(jax.tree.map(lambda x, i=i: x[i], record.before), expected)


def test_the_state_keeps_its_structure_and_dtypes_and_nothing_is_traced_again():
    tx = optax.chain(optax.scale_by_adam(), monitor_depth(SMOOTH, SCANNED, every=2))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params_of())
    chex.clear_trace_counter()
    for step in range(3):
        before = jax.tree.map(jnp.asarray, state)
        _, state = update(updates_at(step), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, state)


def test_the_step_has_no_callback_and_no_transfer_to_the_host():
    tx = monitor_depth(SMOOTH, SCANNED, every=2)
    updates = jax.tree.map(jnp.asarray, params_of())
    text = jax.jit(tx.update).lower(updates, tx.init(updates)).as_text()
    assert "callback" not in text
    assert "custom_call" not in text.replace("@Sharding", "")
    update = jit(tx.update)
    state = jax.device_put(tx.init(updates))
    with jax.transfer_guard("disallow"):
        update(updates, state)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older compilers copy the updates more often"
)
@pytest.mark.parametrize("every", [1, 100])
def test_it_needs_memory_for_at_most_three_more_copies_of_the_updates(every):
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

    watched = monitor_depth(SMOOTH, SCANNED, every=every)
    # Were `inner` not run again for a record, it would be four with `every`.
    assert temporaries(watched) <= temporaries(SMOOTH) + 2.9


def test_abstract_parameters_are_enough_for_the_state():
    tx = monitor_depth(SMOOTH, SCANNED)
    params = params_of()
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, tx.init(params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert int(monitored(tx.init(shapes)).step) == -1


def watched(learning_rate=0.1):
    watch = monitor_depth(SMOOTH, SCANNED, every=2)
    return optax.chain(watch, optax.scale_by_learning_rate(learning_rate))


LABELS = {"blocks": "train", "embed": "frozen"}
WRAPPED = {
    "masked": optax.masked(watched(), {"blocks": True, "embed": False}),
    "partition": optax.partition(
        {"train": watched(), "frozen": optax.set_to_zero()}, LABELS
    ),
    "MultiSteps": optax.MultiSteps(watched(), 1).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(watched)(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(watched(), 3),
    "a partition with nothing in it": optax.partition(
        {"train": watched(), "frozen": optax.identity(), "none": watched()}, LABELS
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_of_the_wrappers_of_optax(name):
    tx, params = WRAPPED[name], params_of()
    _, state = jit(tx.update)(updates_at(0), tx.init(params), params)
    if name == "a partition with nothing in it":
        state = state.inner_states["train"]
    expected = depth_statistics(updates_at(0), SCANNED)
    assert_same(monitored(state).before, expected)


def test_a_step_that_is_skipped_is_not_recorded():
    tx = optax.apply_if_finite(monitor_depth(SMOOTH, SCANNED), 3)
    params = params_of()
    update = jit(tx.update)
    _, state = update(updates_at(0), tx.init(params))
    bad = jax.tree.map(lambda x: x * np.nan, updates_at(1))
    _, skipped = update(bad, state)
    assert_same(monitored(skipped), monitored(state))


def test_tree_map_params_tells_the_records_from_the_moments():
    inner = optax.chain(optax.scale_by_adam(), SMOOTH)
    tx = monitor_depth(inner, SCANNED)
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


def test_zero_updates_make_no_nan():
    with jax.debug_nans(True):
        tx = monitor_depth(SMOOTH, SCANNED, every=2)
        zeros = jax.tree.map(jnp.zeros_like, params_of())
        _, state = jit(tx.update)(zeros, tx.init(zeros))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_parameters_and_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda x, p: factor * x + 0 * p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = monitor_depth(inner, SCANNED, every=2)
    new, state = tx.update(updates_at(0), tx.init(params_of()), params_of(), factor=2.0)
    assert_same(new, jax.tree.map(lambda x: 2 * x, updates_at(0)))
    record = monitored(state)
    before, after = record.before["blocks"].norms, record.after["blocks"].norms
    np.testing.assert_allclose(after, 2 * before, rtol=1e-6)


def test_the_count_stays_at_the_largest_int32():
    tx = monitor_depth(SMOOTH, SCANNED, every=2)
    state = tx.init(params_of())._replace(count=jnp.int32(2**31 - 1))
    _, state = jit(tx.update)(updates_at(0), state)
    assert int(state.count) == 2**31 - 1
    assert int(monitored(state).step) == -1  # odd


def test_a_record_keeps_the_dtype_that_the_parameters_gave_it(enable_x64):
    with enable_x64():
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params_of())
        tx = monitor_depth(SMOOTH, SCANNED, every=2)
        single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), updates_at(0))
        _, state = tx.update(single, tx.init(params))
        assert monitored(state).after["blocks"].norms.dtype == jnp.float64


def test_leaves_that_are_no_arrays_pass_as_they_do_without_it():
    tree = {**params_of(), "name": "a", "function": len, "nothing": None}
    tx = monitor_depth(SMOOTH, SCANNED)
    new, state = tx.update(tree, tx.init(tree))
    assert (new["name"], new["function"]) == ("a", len)
    assert int(monitored(state).step) == 0


@pytest.mark.parametrize("every", [1, 10])
def test_a_state_that_init_made_may_be_donated(every):
    tx = monitor_depth(SMOOTH, SCANNED, every=every)
    state = tx.init(params_of())
    _, state = jax.jit(tx.update, donate_argnums=1)(updates_at(0), state)
    assert int(monitored(state).step) == 0


# `monitored`.


def test_the_record_is_found_in_any_tree():
    class TrainState(NamedTuple):
        params: dict
        opt_state: tuple

    tx = optax.chain(optax.scale_by_adam(), monitor_depth(SMOOTH, SCANNED))
    state = TrainState(params_of(), tx.init(params_of()))
    assert int(monitored({"state": [state]}).step) == -1


def test_records_of_an_optimizer_of_flax_nnx_are_arrays_of_their_own_step():
    nnx = pytest.importorskip("flax.nnx")
    layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in range(3)]
    model, depth = nnx.Sequential(*layers), gs.unrolled()
    tx = monitor_depth(gs.smooth_over_depth(depth, 0.2), depth)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    records = []
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
        records.append(monitored(optimizer.opt_state))
    assert [int(record.step) for record in records] == [0, 1, 2]
    assert isinstance(records[0].after["layers"].norms, jax.Array)


def test_a_state_pickles_with_its_record():
    ((_, state),) = steps(monitor_depth(SMOOTH, SCANNED), 1)
    again = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert isinstance(again, MonitorDepthState)
    assert_same(monitored(again), monitored(state))


def test_no_monitor_is_an_error_that_says_where_to_put_one():
    with pytest.raises(
        ValueError, match=re.escape("`monitor_depth(smooth_over_depth(")
    ):
        monitored(optax.adam(1e-3).init(params_of()))


def test_of_several_monitors_the_error_says_how_to_name_each():
    watch = monitor_depth(optax.identity(), SCANNED)
    nested = monitor_depth(watch, SCANNED)
    state = optax.chain(watch, nested).init(params_of())
    expected = (
        "3 monitors. Pass the part with the one that you mean: `monitored(state[0])`, "
        "`monitored(state[1])`, `monitored(state[1].inner_state)`."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        monitored(state)
    assert int(monitored(state[1].inner_state).step) == -1


# Errors.


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="`inner` must be an optax"):
        monitor_depth(SCANNED, SCANNED)
    with pytest.raises(ValueError, match="`depth`"):
        monitor_depth(SMOOTH, "blocks/")
    with pytest.raises(ValueError, match="`every` must be at most 2147483647"):
        monitor_depth(SMOOTH, SCANNED, every=2**31)
    with pytest.raises(ValueError, match="`every` must be an int >= 1, but is 0"):
        monitor_depth(SMOOTH, SCANNED, every=0)
    with pytest.raises(TypeError, match=r"`every` must be an int >= 1, but is 1\.5"):
        monitor_depth(SMOOTH, SCANNED, every=1.5)
    with pytest.raises(TypeError, match=re.escape('static_args=("every",)')):
        monitor_depth(SMOOTH, SCANNED, every=jnp.array(2))
    with pytest.raises(TypeError, match="`strict`"):
        monitor_depth(SMOOTH, SCANNED, strict="yes")


def test_a_grouping_that_matches_nothing_is_an_error_at_init():
    with pytest.raises(ValueError, match="matched none"):
        monitor_depth(optax.identity(), gs.scanned("layers/")).init(params_of())


def test_a_state_of_other_layers_is_an_error_that_says_so():
    tx = monitor_depth(optax.identity(), SCANNED)
    state = tx.init(params_of(layers=4))
    expected = (
        r"records 'blocks' \(4 layers, 3 pairs.*have 'blocks' \(3 layers, 2 pairs"
    )
    with pytest.raises(ValueError, match=expected):
        tx.update(params_of(layers=3), state)


def test_an_inner_that_drops_a_stack_or_a_role_is_an_error_that_names_it():
    def without(role):
        def update(updates, params):
            del params
            return {**updates, "blocks": {**updates["blocks"], role: None}}

        return optax.stateless(update)

    for every in (1, 2):
        tx = monitor_depth(without("bias"), SCANNED, every=every)
        with pytest.raises(ValueError, match="`inner` of `monitor_depth` was given"):
            tx.update(params_of(), tx.init(params_of()))


def test_inside_shard_map_it_is_refused():
    tx = monitor_depth(gs.smooth_over_depth(SCANNED, 0.2, axis_name="stage"), SCANNED)
    state = tx.init(params_of(4))
    mesh = jax.make_mesh((1,), ("stage",))
    half = jax.tree.map(lambda x: x[:2] if x.shape[0] == 4 else x, params_of(4))

    def update(updates):
        return tx.update(updates, state)[0]

    spec = jax.sharding.PartitionSpec()
    run = jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=re.escape("inside `jax.shard_map`")):
        jax.eval_shape(run, half)
