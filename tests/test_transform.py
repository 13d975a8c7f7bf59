"""The optax face: states, schedules, wrapping, shardings.

Life inside the transformations of jax and optax is in test_wrappers.py.
"""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

VARIANTS = ("standard", "norm_preserving", "directional")
NORM_SCOPES = ("param", "block")
UNROLLED = gs.unrolled()
SHAPES = {"kernel": (2, 3), "bias": (3,)}


def blocks_of(seed=0, num_layers=3, dtype="float32"):
    return oracle.random_blocks(num_layers, dtype, SHAPES, seed)


def tree_of(blocks):
    """An unrolled tree with an embedding that is no layer."""
    tree = {"embed": np.full((4, 2), 2.0, "float32"), **oracle.unrolled_tree(blocks)}
    return jax.tree.map(jnp.asarray, tree)


def layers_of(tree):
    names = sorted(k for k in tree if k.startswith("layers_"))
    return [tree[name] for name in names]


def assert_smoothed(out, blocks, alpha, scale=1.0, **kwargs):
    expected = oracle.window(blocks, alpha, **kwargs)
    expected = [{r: scale * x for r, x in b.items()} for b in expected]
    oracle.assert_blocks_close(layers_of(out), expected)


def by_count(count):
    """alpha at steps 0, 1, 2."""
    return jnp.asarray([0.1, 0.5, 0.9])[count]


# States.


@pytest.mark.parametrize(
    "alpha", [0.1, np.float32(0.1), jnp.asarray(0.1)], ids=["python", "numpy", "jax"]
)
def test_a_constant_or_array_alpha_needs_no_state(alpha):
    params = tree_of(blocks_of())
    for tx in (
        gs.smooth_over_depth(UNROLLED, alpha),
        gs.smooth_over_depth(UNROLLED, gs.window(alpha)),
        gs.smooth_over_depth(UNROLLED, gs.dense(np.eye(3))),
    ):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        state = tx.init(params)
        assert state == optax.EmptyState()
        assert isinstance(state, optax.EmptyState)
        assert isinstance(tx.update(params, state)[1], optax.EmptyState)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_schedule_is_read_before_its_count_is_incremented(jit):
    blocks = blocks_of()
    updates = tree_of(blocks)
    for tx in (
        gs.smooth_over_depth(UNROLLED, by_count),
        gs.smooth_over_depth(UNROLLED, gs.window(by_count)),
    ):
        update = jax.jit(tx.update) if jit else tx.update
        state = tx.init(updates)
        assert isinstance(state, gs.DepthSmoothingState)
        assert state._fields == ("count",)
        for count, alpha in enumerate((0.1, 0.5, 0.9)):
            assert state.count == count
            assert state.count.dtype == jnp.int32
            assert state.count.shape == ()
            out, state = update(updates, state)
            assert isinstance(state, gs.DepthSmoothingState)
            assert_smoothed(out, blocks, alpha)


def test_the_count_saturates_instead_of_wrapping_around():
    updates = tree_of(blocks_of())
    largest = jnp.asarray(np.iinfo(np.int32).max, jnp.int32)
    tx = gs.smooth_over_depth(UNROLLED, optax.constant_schedule(0.1))
    _, state = tx.update(updates, gs.DepthSmoothingState(largest))
    assert state.count == largest
    tx = gs.with_depth_smoothing(optax.identity(), tx)
    state = gs.WithDepthSmoothingState(
        optax.EmptyState(), gs.DepthSmoothingState(largest)
    )
    _, state = tx.update(updates, state)
    assert state.smoothing_state.count == largest


def test_optax_schedules_work_and_keep_the_leaves_dtypes():
    schedule = optax.linear_schedule(0.0, 0.4, 2)
    for dtype in (jnp.bfloat16, np.float32):
        blocks = blocks_of(dtype=dtype)
        updates = tree_of(blocks)
        tx = gs.smooth_over_depth(UNROLLED, schedule)
        state = tx.init(updates)
        for alpha in (0.0, 0.2, 0.4, 0.4):
            out, state = tx.update(updates, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
            assert_smoothed(out, blocks, alpha)


def test_wrapping_keeps_the_inner_state():
    params = tree_of(blocks_of())
    for inner in (
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.identity(),
        optax.chain(optax.clip(1.0), optax.scale_by_rms()),
    ):
        tx = gs.with_depth_smoothing(inner, gs.smooth_over_depth(UNROLLED, 0.3))
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        state = tx.init(params)
        chex.assert_trees_all_equal(state, inner.init(params))
        assert jax.tree.structure(state) == jax.tree.structure(inner.init(params))
        _, state = tx.update(params, state, params)
        _, inner_state = inner.update(params, inner.init(params), params)
        assert jax.tree.structure(state) == jax.tree.structure(inner_state)
        chex.assert_trees_all_equal(state, inner_state)


def test_wrapping_with_a_schedule_adds_one_count():
    blocks = blocks_of()
    params = tree_of(blocks)
    inner = optax.trace(0.9)
    tx = gs.with_depth_smoothing(inner, gs.smooth_over_depth(UNROLLED, by_count))
    state = tx.init(params)
    assert isinstance(state, gs.WithDepthSmoothingState)
    assert state._fields == ("inner_state", "smoothing_state")
    assert isinstance(state.smoothing_state, gs.DepthSmoothingState)
    chex.assert_trees_all_equal(state.inner_state, inner.init(params))
    scale = 0.0
    for count, alpha in enumerate((0.1, 0.5, 0.9)):
        assert state.smoothing_state.count == count
        out, state = tx.update(params, state)
        scale = 1.0 + 0.9 * scale
        assert_smoothed(out, blocks, alpha, scale)


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_wrapping_smooths_what_the_inner_transformation_produces(variant, norm_scope):
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    smoothing = gs.smooth_over_depth(UNROLLED, gs.window(0.3, radius=2), **kwargs)
    inner = optax.scale_by_adam()
    wrapped = gs.with_depth_smoothing(inner, smoothing)
    chained = optax.chain(inner, smoothing)
    params = tree_of(blocks_of())
    a, b = wrapped.init(params), chained.init(params)
    for seed in range(2):
        grads = tree_of(blocks_of(seed))
        first, a = wrapped.update(grads, a, params)
        second, b = chained.update(grads, b, params)
        chex.assert_trees_all_equal(first, second)


def test_wrapping_a_whole_optimizer_smooths_its_decay_and_learning_rate_too():
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    tx = gs.with_depth_smoothing(optimizer, gs.smooth_over_depth(UNROLLED, 0.3))
    params, grads = tree_of(blocks_of(1)), tree_of(blocks_of(2))
    out, _ = tx.update(grads, tx.init(params), params)
    plain, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_smoothed(out, layers_of(plain), 0.3)


def test_wrapping_passes_extra_arguments_and_parameters_to_both():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append({**extra_args, "params": params})
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = tree_of(blocks_of())
    for alpha in (0.3, by_count):
        smoothing = gs.smooth_over_depth(UNROLLED, alpha)
        for inner, after in (
            (spy, smoothing),
            (optax.trace(0.9), optax.chain(smoothing, spy)),
        ):
            seen.clear()
            tx = gs.with_depth_smoothing(inner, after)
            tx.update(params, tx.init(params), params, value=1.0, loss=2.0)
            assert seen == [{"params": params, "value": 1.0, "loss": 2.0}]
            assert seen[0]["params"] is params


def test_wrapping_takes_the_identity_for_a_smoothing():
    inner, params = optax.scale_by_adam(), tree_of(blocks_of())
    tx = gs.with_depth_smoothing(inner, optax.identity())
    state = tx.init(params)
    chex.assert_trees_all_equal(state, inner.init(params))
    chex.assert_trees_all_equal(
        tx.update(params, state, params), inner.update(params, state, params)
    )


@pytest.mark.parametrize("alpha", [0.5, by_count], ids=["constant", "schedule"])
def test_wrapping_takes_a_chain_of_smoothings(alpha):
    # Two scopes, each with a strength of its own.
    kernels = UNROLLED.only(lambda path, leaf: path[-1] == "kernel")
    biases = UNROLLED.only(lambda path, leaf: path[-1] == "bias")
    smoothing = optax.chain(
        gs.smooth_over_depth(kernels, 0.3), gs.smooth_over_depth(biases, alpha)
    )
    blocks = blocks_of()
    params = tree_of(blocks)
    inner = optax.trace(0.9)
    tx = gs.with_depth_smoothing(inner, smoothing)
    state = tx.init(params)
    assert isinstance(state, gs.WithDepthSmoothingState) == callable(alpha)
    inner_state = state.inner_state if callable(alpha) else state
    chex.assert_trees_all_equal(inner_state, inner.init(params))
    out, _ = tx.update(params, state)
    first = by_count(0) if callable(alpha) else alpha
    expected = [
        {"kernel": k["kernel"], "bias": b["bias"]}
        for k, b in zip(
            oracle.window(blocks, 0.3), oracle.window(blocks, first), strict=True
        )
    ]
    oracle.assert_blocks_close(layers_of(out), expected)


# Under jax's transformations.


def test_specs_operators_and_transformations_can_be_static_arguments():
    blocks = blocks_of()

    @chex.assert_max_traces(n=1)
    def smooth(updates, depth, operator):
        tx = gs.smooth_over_depth(depth, operator)
        return tx.update(updates, tx.init(updates))[0]

    chex.clear_trace_counter()
    smooth = jax.jit(smooth, static_argnums=(1, 2))
    for _ in range(2):
        # Equal by value: the second call compiles nothing.
        out = smooth(tree_of(blocks), gs.unrolled(), gs.window(0.3, radius=2))
        assert_smoothed(out, blocks, 0.3, radius=2)


def test_vmap_over_alpha_runs_a_sweep():
    blocks = blocks_of()
    updates = tree_of(blocks)

    def smooth(alpha):
        tx = gs.smooth_over_depth(UNROLLED, alpha, variant="norm_preserving")
        return tx.update(updates, tx.init(updates))[0]

    alphas = [0.0, 0.25, 1.0]
    out = jax.vmap(smooth)(jnp.asarray(alphas))
    for i, alpha in enumerate(alphas):
        one = jax.tree.map(lambda x, i=i: x[i], out)
        assert_smoothed(one, blocks, alpha, variant="norm_preserving")


# Leaves that are not updates.


@pytest.mark.parametrize("norm_scope", NORM_SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_that_cannot_be_smoothed_pass_through(variant, norm_scope):
    blocks = blocks_of()
    tree = tree_of(blocks)
    for layer in range(3):
        tree[f"layers_{layer}"] |= {
            "none": None,
            "masked": optax.MaskedNode(),
            "float0": np.zeros((2,), jax.dtypes.float0),
            "steps": jnp.arange(layer, layer + 2),
            "mask": jnp.array([True, False]),
        }
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    tx = gs.smooth_over_depth(UNROLLED, 0.3, **kwargs)
    out, _ = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    for layer in range(3):
        before, after = tree[f"layers_{layer}"], out[f"layers_{layer}"]
        for name in ("none", "float0", "steps", "mask"):
            assert after.pop(name) is before.pop(name)
        assert isinstance(after.pop("masked"), optax.MaskedNode)
    assert_smoothed(out, blocks, 0.3, **kwargs)


def test_gradients_of_integer_parameters_pass_through_jit():
    blocks = blocks_of()
    params = tree_of(blocks)
    for layer in range(3):
        params[f"layers_{layer}"]["index"] = jnp.arange(2)

    def loss(params):
        leaves = jax.tree.leaves(params)
        floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x**2) / 2 for x in floating)

    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["layers_0"]["index"].dtype == jax.dtypes.float0
    tx = gs.smooth_over_depth(UNROLLED, 0.3)
    out, _ = tx.update(grads, tx.init(params))
    for layer in layers_of(out):
        assert layer.pop("index").dtype == jax.dtypes.float0
    assert_smoothed(out, blocks, 0.3)


@pytest.mark.parametrize("alpha", [0.3, by_count], ids=["constant", "schedule"])
def test_trees_without_leaves_are_never_an_error(alpha):
    for tx in (
        gs.smooth_over_depth(UNROLLED, alpha),
        gs.with_depth_smoothing(
            optax.identity(), gs.smooth_over_depth(UNROLLED, alpha)
        ),
    ):
        for tree in ({}, None, (), {"a": None}, {"a": optax.MaskedNode()}):
            out, _ = tx.update(tree, tx.init(tree))
            assert jax.tree.structure(out) == jax.tree.structure(tree)


# Sharding.

SHARDED = """
    import json, os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import gradsmooth_optax as gs
    import oracle

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    if sys.argv[1] == "explicit":
        mesh = jax.make_mesh((2, 2), ("a", "b"), (jax.sharding.AxisType.Explicit,) * 2)
    specs = {"depth": ("a",), "inner": (None, "b"), "both": ("a", "b"), "no": ()}
    blocks = oracle.random_blocks(4, shapes=dict.fromkeys(specs, (4, 2)))
    tree = {
        name: jax.device_put(leaf, NamedSharding(mesh, P(*specs[name])))
        for name, leaf in oracle.stacked_tree(blocks).items()
    }
    wrong = {"numbers": [], "shardings": []}
    cases = ("standard", 1), ("standard", 2), ("norm_preserving", 1), ("directional", 1)
    for variant, radius in cases:
        expected = oracle.window(blocks, 0.3, radius, variant=variant)
        expected = oracle.stacked_tree(expected)
        depth = gs.scanned("blocks/")
        operator = gs.window(0.3, radius=radius)
        tx = gs.smooth_over_depth(depth, operator, variant=variant)
        # Op by op, every kernel is compiled for every sharding: the longest two only.
        is_long = (variant, radius) in (("standard", 2), ("directional", 1))
        for jit in (False, True) if is_long else (True,):
            update = jax.jit(tx.update) if jit else tx.update
            out, _ = update({"blocks": tree}, tx.init({"blocks": tree}))
            for name, leaf in out["blocks"].items():
                case = [name, variant, radius, "jit" if jit else "eager"]
                if oracle.relative_error(leaf, expected[name]) > 1e-6:
                    wrong["numbers"].append(case)
                if not leaf.sharding.is_equivalent_to(tree[name].sharding, 3):
                    wrong["shardings"].append(case)
    wrong["shardy"] = bool(jax.config.jax_use_shardy_partitioner)
    print(json.dumps(wrong))
"""


@pytest.fixture(scope="module", params=["auto", "explicit", "gspmd"])
def sharded(request):
    """What went wrong on four devices, which must be asked for before jax starts."""
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), request.param],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
            # The partitioner before Shardy: wrong for pads with a negative edge.
            "JAX_USE_SHARDY_PARTITIONER": str(request.param != "gspmd"),
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sharded_leaves_get_the_same_numbers(sharded):
    assert sharded["numbers"] == []


def test_every_leaf_keeps_its_sharding(sharded):
    wrong = sharded["shardings"]
    if not sharded["shardy"]:
        # The old partitioner chooses the shardings of a compiled program's results.
        wrong = [case for case in wrong if case[-1] == "eager"]
    assert wrong == []


# Gradients through an update.


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
@pytest.mark.parametrize("norm_scope", ["param", "block"])
def test_gradients_through_an_update_are_finite_where_a_norm_is_zero(
    variant, norm_scope
):
    tx = gs.smooth_over_depth(
        gs.scanned("blocks/"), 0.3, variant=variant, norm_scope=norm_scope
    )

    def loss(w):
        updates, _ = tx.update({"blocks": {"w": w}}, optax.EmptyState())
        return (updates["blocks"]["w"] ** 2).sum()

    gradient = jax.grad(loss)(jnp.ones((3, 4)).at[1].set(0.0))
    assert np.isfinite(gradient).all()
    assert np.any(gradient)


def test_numpy_and_jax_leaves_are_neighbors_as_jax_sees_them():
    # A NumPy float64 leaf is float32 to jax unless x64 is enabled.
    layers = [np.zeros(2), jnp.ones(2), np.zeros(2)]
    assert layers[0].dtype == np.float64
    tx = gs.smooth_over_depth(gs.unrolled(), 0.5)
    smoothed, _ = tx.update(layers, tx.init(layers))
    np.testing.assert_allclose(np.stack(smoothed)[:, 0], [0.25, 0.5, 0.25])


def test_a_smoothing_around_a_smoothing_with_a_state_takes_its_own_state():
    depth = gs.scanned("blocks/")
    params = {"blocks": {"w": jnp.arange(6.0).reshape(3, 2)}}
    scheduled = gs.smooth_over_depth(depth, lambda count: 0.1 + 0.1 * count)
    inner = gs.with_depth_smoothing(optax.scale_by_adam(), scheduled)
    tx = gs.with_depth_smoothing(inner, gs.smooth_over_depth(depth, 0.2))
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(inner.init(params))
    chained = optax.chain(inner, gs.smooth_over_depth(depth, 0.2))
    found, _ = tx.update(params, state, params)
    want, _ = chained.update(params, chained.init(params), params)
    np.testing.assert_array_equal(found["blocks"]["w"], want["blocks"]["w"])
