"""`gradsmooth_optax.diagnostics` against plain loops, by hand, and its errors."""

import functools
import itertools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax import diagnostics
from gradsmooth_optax.diagnostics import (
    DepthStatistics,
    GradientNoise,
    RoleStatistics,
)

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(r"layers_(\d+)/", stack="blocks")
FIELDS = RoleStatistics._fields

# One quick compilation each, where op by op there are dozens.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
line_shape_score = jit(diagnostics.line_shape_score)
residual_alignment = jit(diagnostics.residual_alignment)


def depth_statistics(updates, depth, **kwargs):
    return jit(lambda u: diagnostics.depth_statistics(u, depth, **kwargs))(updates)


def gradient_noise(updates, depth, **kwargs):
    return jit(lambda u: diagnostics.gradient_noise(u, depth, **kwargs))(updates)


# The plain loops, in float64.


def expected_fields(blocks, roles, ranked=False):
    """The four statistics of the block of these roles, from the definition."""
    blocks = [{role: oracle._double(x) for role, x in b.items()} for b in blocks]
    runs = {role: oracle.runs_of(blocks, role, ranked) for role in roles}

    def vector(layer, of_roles):
        parts = [blocks[layer][role].ravel() for role in of_roles]
        return np.concatenate(parts)

    norms, cosines, roughness = [], [], 0.0
    for layer in range(len(blocks)):
        held = [r for r in roles if any(layer in run for run in runs[r])]
        if held:
            norms.append(np.linalg.norm(vector(layer, held)))
    for pair in itertools.combinations(range(len(blocks)), 2):
        shared = [
            r for r in roles if any(pair in itertools.pairwise(run) for run in runs[r])
        ]
        if shared:
            x, y = (vector(layer, shared) for layer in pair)
            size = np.linalg.norm(x) * np.linalg.norm(y)
            cosines.append(np.vdot(x, y).real / size if size > 0 else 0.0)
            roughness += np.sum(np.abs(y - x) ** 2)
    total = np.sum(np.square(norms))
    return norms, cosines, roughness, roughness / total if total > 0 else 0.0


def assert_statistics(actual, blocks, ranked=False, rtol=2e-6, dtype=np.float32):
    """Of one stack, and of each of its roles."""
    assert isinstance(actual, DepthStatistics)
    roles = sorted({role for b in blocks for role in b})
    coupled = [role for role in roles if oracle.runs_of(blocks, role, ranked)]
    assert sorted(actual.roles) == coupled
    parts = [(actual, roles), *((actual.roles[role], [role]) for role in coupled)]
    for part, of_roles in parts:
        fields = expected_fields(blocks, of_roles, ranked)
        for name, want in zip(FIELDS, fields, strict=True):
            got = getattr(part, name)
            assert got.shape == np.shape(want), name
            np.testing.assert_allclose(got, want, rtol, rtol, err_msg=name)
            assert got.dtype == dtype


def stacked(blocks, axis=0):
    return {"blocks": oracle.stacked_tree(blocks, axis)}


def unrolled(blocks):
    return {k: b for k, b in oracle.unrolled_tree(blocks).items() if b}


def of_unrolled(blocks, depth=UNROLLED, **kwargs):
    return depth_statistics(unrolled(blocks), depth, **kwargs)["blocks"]


# `depth_statistics`.


def test_norms_cosines_and_roughness_of_a_stack_by_hand():
    w = np.array([[3.0, 4.0], [6.0, 8.0], [-8.0, 6.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0], [0.0], [0.0], [2.0]], np.float32)
    stack = depth_statistics({"blocks": {"w": w, "b": b}}, SCANNED)["blocks"]
    assert stack.norms.tolist() == [5.0, 10.0, 10.0, 2.0]
    assert stack.cosines.tolist() == [1.0, 0.0, 0.0]
    assert float(stack.roughness) == 25 + 200 + 104
    assert float(stack.relative_roughness) == np.float32(329 / 229)
    kernel, bias = stack.roles["w"], stack.roles["b"]
    assert kernel.norms.tolist() == [5.0, 10.0, 10.0, 0.0]
    assert kernel.cosines.tolist() == [1.0, 0.0, 0.0]  # with a norm of 0 it is 0
    assert float(kernel.roughness) == 25 + 200 + 100
    assert bias.cosines.tolist() == [0.0, 0.0, 0.0]
    assert [float(bias.roughness), float(bias.relative_roughness)] == [4.0, 1.0]


def test_where_all_is_zero_cosines_and_relative_roughness_are_zero():
    with jax.debug_nans(True):
        stack = depth_statistics({"blocks": {"w": np.zeros((3, 2))}}, SCANNED)["blocks"]
    for part in (stack, stack.roles["w"]):
        assert not any(np.any(getattr(part, name)) for name in FIELDS)


def test_stacked_unrolled_and_mixed_leaves_are_the_plain_loops():
    blocks = oracle.random_blocks(6, shapes={"kernel": (2, 3), "gain": ()})
    first, last = blocks[:2], blocks[2:]
    mixed = {**unrolled(first), "tail": oracle.stacked_tree(last, 1)}
    cycle = {f"layers_{i}": oracle.stacked_tree(blocks[i::3]) for i in range(3)}

    def nested(path, leaf):
        return gs.Depth("blocks", path[-1], axis=(0, leaf.ndim - 1))

    grid = {  # the 6 layers as 2 × 3, with the 3 last
        role: np.moveaxis(x.reshape(2, 3, *x.shape[1:]), 1, -1)
        for role, x in oracle.stacked_tree(blocks).items()
    }

    def tail(path, leaf):
        if path[0] == "tail":
            axis = min(1, leaf.ndim - 1)
            return gs.Depth("blocks", path[-1], 2, axis=axis)
        return None

    cases = [
        (unrolled(blocks), UNROLLED),
        (stacked(blocks), SCANNED),
        (mixed, gs.first_match(tail, UNROLLED)),
        (cycle, gs.scanned(r"layers_(\d+)/", stride=3, stack="blocks")),
        (grid, gs.depth_fn(nested)),
    ]
    trees, depths = zip(*cases, strict=True)

    @jit
    def compute(trees):
        pairs = zip(trees, depths, strict=True)
        return [diagnostics.depth_statistics(tree, depth) for tree, depth in pairs]

    for found in compute(trees):
        assert_statistics(found["blocks"], blocks)


def test_a_block_is_all_roles_of_a_layer_and_each_role_stands_alone_too():
    blocks = oracle.random_blocks(4)
    found = of_unrolled(blocks)
    squares = sum(np.square(of_role.norms) for of_role in found.roles.values())
    np.testing.assert_allclose(np.square(found.norms), squares, rtol=1e-6)
    total = sum(float(of_role.roughness) for of_role in found.roles.values())
    np.testing.assert_allclose(found.roughness, total, rtol=1e-6)


def test_one_role_may_have_layers_of_different_shapes():
    blocks = oracle.random_blocks(5)
    for block in blocks[3:]:
        block["kernel"] = np.tile(block["kernel"], 2)
    found = of_unrolled(blocks)
    # Layers 2 and 3 are neighbors in the bias alone.
    biases = [{"bias": block["bias"]} for block in blocks]
    expected = expected_fields(biases, ["bias"])[1][2]
    np.testing.assert_allclose(found.cosines[2], expected, rtol=1e-6)
    kernel = found.roles["kernel"]
    assert kernel.norms.shape == (5,)
    assert kernel.cosines.shape == (3,)  # of 0-1, 1-2 and 3-4


def test_roles_that_some_layers_lack_count_where_they_have_neighbors():
    blocks = oracle.random_blocks(6)
    del blocks[0]["bias"], blocks[1]["bias"], blocks[5]["kernel"]
    assert_statistics(of_unrolled(blocks), blocks)


def test_a_gap_is_no_pair_and_a_layer_without_neighbors_has_no_entry():
    blocks = oracle.random_blocks(6)
    del blocks[2]["bias"]
    found = of_unrolled(blocks, strict=False)
    assert_statistics(found, blocks)
    assert found.roles["bias"].cosines.shape == (3,)  # 0-1, 3-4, 4-5
    blocks[4] = {}  # and 5 is alone now
    found = of_unrolled(blocks, strict=False)
    assert_statistics(found, blocks)
    assert found.norms.shape == (4,)
    assert found.cosines.shape == (3,)


def test_ranked_layers_are_neighbors_in_their_order():
    blocks = oracle.random_blocks(5)
    del blocks[2]["bias"]
    found = of_unrolled(blocks, gs.ranked(UNROLLED))
    # The bias has the pair 1-3, which the kernel has not: five pairs in all.
    assert found.cosines.shape == (5,)
    assert_statistics(found, blocks, ranked=True)


def test_stacks_are_apart_and_those_of_one_layer_are_left_out():
    blocks = oracle.random_blocks(5)
    a, b = blocks[:3], blocks[3:]
    tree = {"a": unrolled(a), "b": unrolled(b), "c": unrolled(blocks[:1])}
    found = depth_statistics({**tree, "head": np.ones(3)}, gs.unrolled())
    assert set(found) == {"a/layers", "b/layers"}
    assert_statistics(found["a/layers"], a)
    assert_statistics(found["b/layers"], b)


def test_what_is_in_no_group_is_left_alone():
    blocks = oracle.random_blocks(3)
    tree = {**unrolled(blocks), "steps": {"0": np.arange(3)}, "none": None}
    assert_statistics(depth_statistics(tree, UNROLLED)["blocks"], blocks)


def test_nothing_to_couple_is_an_error_only_if_strict():
    assert depth_statistics({}, SCANNED) == {}
    head = {"head": np.ones(3)}
    assert depth_statistics(head, SCANNED, strict=False) == {}
    with pytest.raises(ValueError, match="matched none of the 1 leaves"):
        depth_statistics(head, SCANNED)
    blocks = oracle.random_blocks(4)
    blocks[1] = {}
    with pytest.raises(ValueError, match="layer 1 is missing"):
        of_unrolled(blocks)
    twice = gs.unrolled(r"layers_\d(\d)?", stack="blocks")
    with pytest.raises(ValueError, match="gives layer 0"):
        depth_statistics(unrolled(blocks), twice, strict=False)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=re.escape("scanned('blocks/', axis=0)")):
        depth_statistics(stacked(oracle.random_blocks(2)), "blocks/")
    with pytest.raises(TypeError, match="`strict` must be True or False"):
        depth_statistics({}, SCANNED, strict=1)


# Names of any kind.


def test_names_that_are_no_strings_become_keys_that_jax_can_sort():
    names = {"a": (1, "x"), "b": 2, "c": "three"}

    def depth(path, leaf):
        return gs.Depth(names[path[0]], names[path[0]], axis=0)

    tree = {name: np.ones((2, 3)) for name in names}
    found = depth_statistics(tree, depth)
    assert set(found) == {"(1, 'x')", "2", "three"}
    assert all([*stack.roles] == [name] for name, stack in found.items())


@pytest.mark.parametrize("field", ["stack", "role"])
def test_names_that_read_alike_are_refused(field):
    def depth(path, leaf):
        names = {"stack": "s", "role": "r"} | {field: {"a": 1, "b": "1"}[path[0]]}
        return gs.Depth(**names, axis=0)

    tree = {"a": np.ones((2, 3)), "b": np.ones((2, 4))}
    with pytest.raises(ValueError, match=f"two {field}.* read '1': 1 and '1'"):
        depth_statistics(tree, depth)


# Numerics.


def test_near_agreement_does_not_cancel():
    # Squares of 1e8: norms minus dots would leave nothing of a difference of 1e-2.
    w = np.full((2, 1), 1e4, np.float32)
    w[1] += np.float32(1 / 128)
    found = depth_statistics({"blocks": {"w": w}}, SCANNED)["blocks"]
    assert float(found.roughness) == 2.0**-14


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_summed_in_float32(dtype):
    blocks = oracle.random_blocks(3, dtype)
    assert_statistics(of_unrolled(blocks), blocks)
    assert_statistics(depth_statistics(stacked(blocks), SCANNED)["blocks"], blocks)
    # A sum of 4096 ones stops at 256 in bfloat16, and overflows in float16.
    tree = {"blocks": {"w": np.full((2, 4096), 16, dtype)}}
    norms = depth_statistics(tree, SCANNED)["blocks"].norms
    assert norms.tolist() == [1024.0, 1024.0]


def test_complex_norms_are_hermitian_and_products_real():
    w = np.array([[3 + 4j, 0], [-4 + 3j, 0], [3 + 4j, 0]], np.complex64)
    w[2] = w[1] * np.exp(0.25j * np.pi)
    found = depth_statistics({"blocks": {"w": w}}, SCANNED)["blocks"]
    assert_statistics(found, [{"w": x} for x in w])
    np.testing.assert_allclose(found.cosines, [0, np.sqrt(0.5)], atol=1e-6)


def test_float64_leaves_are_summed_in_float64(enable_x64):
    blocks = oracle.random_blocks(3, "float64")
    with enable_x64():
        kwargs = {"rtol": 1e-13, "dtype": np.float64}
        assert_statistics(of_unrolled(blocks), blocks, **kwargs)
        found = depth_statistics(stacked(blocks), SCANNED)["blocks"]
        assert_statistics(found, blocks, **kwargs)
        # A role of each dtype: the block is as wide as its widest.
        mixed = [{**b, "bias": b["bias"].astype(np.float32)} for b in blocks]
        found = of_unrolled(mixed)
        assert found.norms.dtype == found.roles["kernel"].roughness.dtype == np.float64
        assert found.roles["bias"].cosines.dtype == np.float32


def test_a_nan_shows_where_it_is():
    blocks = oracle.random_blocks(4)
    blocks[3]["bias"][0] = np.nan
    found = of_unrolled(blocks)
    assert np.isnan(found.norms).tolist() == [False, False, False, True]
    assert np.isnan(found.cosines).tolist() == [False, False, True]
    assert np.isnan(found.relative_roughness)
    assert np.isfinite(found.roles["kernel"].roughness)


def test_cosines_stay_in_their_range():
    w = np.random.default_rng(0).normal(size=(1, 7)).astype(np.float32)
    w = w * np.arange(1, 50, dtype=np.float32)[:, None]
    cosines = depth_statistics({"blocks": {"w": w}}, SCANNED)["blocks"].cosines
    assert np.max(cosines) <= 1.0
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-6)


# Under jax's transformations.


def test_under_vmap_scan_and_eval_shape():
    several = [oracle.random_blocks(3, seed=seed) for seed in range(2)]
    trees = jax.tree.map(lambda *x: np.stack(x), *map(unrolled, several))

    def of(tree):
        return diagnostics.depth_statistics(tree, UNROLLED)["blocks"]

    mapped = jit(jax.vmap(of))(trees)
    _, scanned = jit(
        lambda trees: jax.lax.scan(lambda carry, tree: (carry, of(tree)), 0, trees)
    )(trees)
    for i, blocks in enumerate(several):
        for found in (mapped, scanned):
            assert_statistics(jax.tree.map(lambda x, i=i: x[i], found), blocks)
    shapes = jax.eval_shape(of, unrolled(several[0]))
    first = jax.tree.map(lambda x: x[0], mapped)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, first)


def test_gradients_through_the_roughness_and_cosines_are_finite():
    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])

    def loss(w):
        stack = diagnostics.depth_statistics({"blocks": {"w": w}}, SCANNED)["blocks"]
        return stack.relative_roughness + jnp.sum(stack.cosines)

    with jax.debug_nans(True):
        gradient = jit(jax.grad(loss))
        chex.assert_tree_all_finite((gradient(w), gradient(jnp.zeros_like(w))))


def test_results_are_named_tuples_that_pickle():
    found = of_unrolled(oracle.random_blocks(2))
    again = pickle.loads(pickle.dumps(found))
    chex.assert_trees_all_equal(again, found)
    assert DepthStatistics._fields == (*FIELDS, "roles")


def test_smoothing_lowers_the_roughness():
    updates = unrolled(oracle.random_blocks(6))

    @jit
    def compute(updates, alpha):
        tx = gs.smooth_over_depth(UNROLLED, alpha)
        smoothed, _ = tx.update(updates, tx.init(updates))
        both = updates, smoothed
        return [diagnostics.depth_statistics(u, UNROLLED)["blocks"] for u in both]

    for alpha in (0.1, 0.5, 1.0):
        before, after = compute(updates, alpha)
        bound = diagnostics.contraction_factor(gs.window(alpha), 6) ** 2
        assert float(after.roughness) <= bound * float(before.roughness) * (1 + 1e-6)
        if alpha <= 0.5:
            assert after.relative_roughness < before.relative_roughness


# `line_shape_score` and `residual_alignment`.


def expected_line_shape_score(states):
    states = oracle._double(states)
    states = states.reshape(len(states), -1, states.shape[-1])
    scores = []
    for position in range(states.shape[1]):
        total, count = 0.0, 0
        for x, y in itertools.pairwise(states[:, position]):
            if np.linalg.norm(y - x) > 0:
                total, count = total + (y - x) / np.linalg.norm(y - x), count + 1
        if count:
            scores.append(count / np.linalg.norm(total))
    return np.mean(scores)


def expected_alignment(states):
    states = oracle._double(states)
    states = states.reshape(len(states), -1, states.shape[-1])
    cosines = []
    for position in range(states.shape[1]):
        steps = np.diff(states[:, position], axis=0)
        for x, y in itertools.pairwise(steps):
            size = np.linalg.norm(x) * np.linalg.norm(y)
            cosines.append(np.vdot(x, y).real / size if size > 0 else 0.0)
    return np.mean(cosines)


def random_states(dtype="float32", positions=(2, 3), seed=0):
    """Some positions never change, and one stands still once."""
    states = np.random.default_rng(seed).normal(size=(5, *positions, 4)).astype(dtype)
    if positions:
        states[2, 0, 0] = states[1, 0, 0]
        states[:, 1, 2] = states[0, 1, 2]
    return states


@pytest.mark.parametrize(
    ("dtype", "positions"),
    [
        ("float32", ()),
        ("float32", (2, 3)),
        ("bfloat16", (2, 3)),
        ("float16", (2, 3)),
        ("complex64", (2, 3)),
    ],
)
def test_scores_of_states_are_the_plain_loops(dtype, positions):
    states = random_states(jnp.dtype(dtype), positions)
    for given in (states, list(states)):
        score, alignment = line_shape_score(given), residual_alignment(given)
        assert score.dtype == alignment.dtype == np.float32
        np.testing.assert_allclose(score, expected_line_shape_score(states), rtol=2e-6)
        np.testing.assert_allclose(alignment, expected_alignment(states), atol=2e-6)


def test_scores_of_float64_states_are_in_float64(enable_x64):
    states = random_states("float64")
    with enable_x64():
        score, alignment = line_shape_score(states), residual_alignment(states)
        assert score.dtype == alignment.dtype == np.float64
    np.testing.assert_allclose(score, expected_line_shape_score(states), rtol=1e-13)
    np.testing.assert_allclose(alignment, expected_alignment(states), atol=1e-13)


def test_scores_under_jit_and_vmap():
    states = np.stack([random_states(seed=seed) for seed in range(2)])
    for name in ("line_shape_score", "residual_alignment"):
        function = getattr(diagnostics, name)
        mapped = jit(jax.vmap(function))(states)
        one_by_one = [jit(function)(of_one) for of_one in states]
        np.testing.assert_allclose(mapped, one_by_one, rtol=1e-6)


def test_a_straight_line_at_any_speed_scores_one():
    times = np.array([0, 1, 3, 3.5, 10], np.float32)[:, None, None]
    directions = np.array([[3, 4], [0, -2]], np.float32)
    np.testing.assert_allclose(line_shape_score(times * directions), 1.0, rtol=1e-6)
    np.testing.assert_allclose(residual_alignment(times * directions), 1.0, rtol=1e-6)


def test_scores_by_hand():
    square = [[0, 0], [1, 0], [1, 1], [0, 1]]  # three sides of it, of integers
    assert float(line_shape_score(np.array(square))) == 3.0
    assert float(residual_alignment(np.array(square))) == 0.0
    # Positions are averaged: 1 on a line, 3 around the square; cosines 1 and 0.
    line = [[0, 0], [1, 0], [2, 0], [3, 0]]
    states = np.stack([square, line], axis=1).astype(np.float32)
    assert float(line_shape_score(states)) == 2.0
    assert float(residual_alignment(states)) == 0.5


def test_increments_that_cancel_score_infinity_and_point_apart():
    there_and_back = np.array([[0.0, 1.0], [3.0, 5.0], [0.0, 1.0]], np.float32)
    assert float(line_shape_score(there_and_back)) == np.inf
    assert float(residual_alignment(there_and_back)) == -1.0


def test_states_that_stand_still():
    pause = np.array([[0.0], [1.0], [1.0], [2.0]], np.float32)
    assert float(line_shape_score(pause)) == 1.0
    assert float(residual_alignment(pause)) == 0.0
    never = np.ones((4, 2, 3), np.float32)
    assert np.isnan(line_shape_score(never))
    assert float(residual_alignment(never)) == 0.0
    some = np.stack([pause, np.ones_like(pause)], axis=1)
    assert float(line_shape_score(some)) == 1.0


def test_a_state_that_is_not_finite_shows():
    states = random_states()
    states[3, 0, 1, 0] = np.nan
    assert np.isnan(line_shape_score(states))
    assert np.isnan(residual_alignment(states))


def test_gradients_of_scores_are_finite_where_states_stand_still():
    states = jnp.asarray(random_states())
    with jax.debug_nans(True):
        for name in ("line_shape_score", "residual_alignment"):
            function = getattr(diagnostics, name)
            chex.assert_tree_all_finite(jit(jax.grad(function))(states))


def test_states_of_wrong_shapes_are_refused_with_what_to_write():
    for function in (line_shape_score, residual_alignment):
        name = function.__name__
        with pytest.raises(ValueError, match="one number for each state") as info:
            function(np.ones(5))
        assert f"`{name}(jnp.stack([x_0, ..., x_L]))`" in str(info.value)
        assert "an array of shape (5,)" in str(info.value)
        with pytest.raises(ValueError, match="one number for each state"):
            function([1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match=r"states\[1\] has \(2, 4\)") as info:
            function([np.ones((2, 3)), np.ones((2, 4))])
        assert "states[0] has shape (2, 3)" in str(info.value)
        with pytest.raises(ValueError, match="a sequence of 1 of shape") as info:
            function([np.ones((2, 3))])
        assert "state before the first block is missing" in str(info.value)
        assert f"`{name}(jnp.moveaxis(states, layer_axis, 0))`" in str(info.value)
        for empty in ([], np.ones((4, 0, 3)), np.ones((4, 3, 0))):
            with pytest.raises(ValueError, match="none of them empty"):
                function(empty)
    two = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(line_shape_score(two), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"at least 3 states.*shape \(2, 3\)"):
        residual_alignment(two)


# `gradient_noise`.


def expected_noise(batches):
    """(variance, ‖mean‖²) per layer, from the blocks of every micro-batch."""
    variances, signals = [], []
    for layer in range(len(batches[0])):
        variance = signal = 0.0
        for role in batches[0][layer]:
            if not any(layer in run for run in oracle.runs_of(batches[0], role)):
                continue
            values = np.stack([oracle._double(b[layer][role]) for b in batches])
            mean = sum(values) / len(values)
            deviations = sum(np.abs(value - mean) ** 2 for value in values)
            variance += np.sum(deviations) / (len(values) - 1)
            signal += np.sum(np.abs(mean) ** 2)
        variances.append(variance)
        signals.append(signal)
    return variances, signals


def microbatches(dtype="float32", count=3, num_layers=4):
    return [oracle.random_blocks(num_layers, dtype, seed=seed) for seed in range(count)]


def together(batches, tree_of):
    return jax.tree.map(lambda *x: np.stack(x), *map(tree_of, batches))


def assert_noise(found, batches, rtol=2e-6, dtype=np.float32):
    assert isinstance(found, GradientNoise)
    for got, want in zip(found, expected_noise(batches), strict=True):
        assert got.dtype == dtype
        assert got.shape == (len(want),)
        np.testing.assert_allclose(got, want, rtol=rtol)


def test_noise_by_hand():
    w = np.array([[[1.0, 0.0], [2.0, 2.0]], [[3.0, 4.0], [2.0, 2.0]]], np.float32)
    found = gradient_noise({"blocks": {"w": w}}, SCANNED)
    assert set(found) == {"blocks"}
    # Layer 0: deviations of 1 and 2 from (2, 2), twice, over 2 - 1.
    assert found["blocks"].variance.tolist() == [10.0, 0.0]
    assert found["blocks"].squared_norm_of_mean.tolist() == [8.0, 8.0]
    assert found["blocks"]._fields == ("variance", "squared_norm_of_mean")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_noise_of_stacked_and_unrolled_leaves_is_the_plain_loops(dtype):
    batches = microbatches()
    if dtype == "complex64":
        turned = microbatches(count=6)[3:]
        batches = [
            [
                {role: (b[role] + 1j * c[role]).astype(dtype) for role in b}
                for b, c in zip(*pair, strict=True)
            ]
            for pair in zip(batches, turned, strict=True)
        ]
    else:
        batches = microbatches(jnp.dtype(dtype))

    @jit
    def compute(a, b, c):
        of_kernels = gs.scanned("blocks/kernel", axis=1, stack="blocks")
        return (
            diagnostics.gradient_noise(a, UNROLLED)["blocks"],
            diagnostics.gradient_noise(b, SCANNED)["blocks"],
            diagnostics.gradient_noise(c, of_kernels)["blocks"],
        )

    kernels = [[{"kernel": x["kernel"]} for x in b] for b in batches]
    found = compute(
        together(batches, unrolled),
        together(batches, stacked),
        together(kernels, lambda b: stacked(b, axis=1)),
    )
    assert_noise(found[0], batches)
    assert_noise(found[1], batches)
    assert_noise(found[2], kernels)


def test_noise_of_float64_updates_is_in_float64(enable_x64):
    batches = microbatches("float64")
    with enable_x64():
        found = gradient_noise(together(batches, unrolled), UNROLLED)["blocks"]
        assert_noise(found, batches, rtol=1e-12, dtype=np.float64)


def test_noise_that_is_small_beside_its_mean_does_not_cancel():
    w = np.full((2, 2, 1), 1e4, np.float32)
    w[1] += np.float32(1 / 64)
    found = gradient_noise({"blocks": {"w": w}}, SCANNED)["blocks"]
    assert found.variance.tolist() == [2.0**-13, 2.0**-13]


def test_noise_and_statistics_are_of_the_same_blocks():
    batches = microbatches(num_layers=5)
    for batch in batches:
        del batch[1]["bias"]  # the bias of layer 0 is alone
    tree = together(batches, unrolled)
    tree = {**tree, "head": np.ones((3, 2)), "step": np.int32(0), "none": None}
    found = gradient_noise(tree, UNROLLED, strict=False)["blocks"]
    assert_noise(found, batches)
    means = jax.tree.map(lambda x: np.mean(x, axis=0), together(batches, unrolled))
    norms = depth_statistics(means, UNROLLED, strict=False)["blocks"].norms
    np.testing.assert_allclose(found.squared_norm_of_mean, norms**2, rtol=1e-6)


def test_the_noise_of_vmapped_gradients():
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])

    def loss(params, x):
        return jnp.sum(params["blocks"]["w"] @ x)

    gradients = jax.vmap(jax.grad(loss), (None, 0))({"blocks": {"w": w}}, batch)
    found = gradient_noise(gradients, SCANNED)["blocks"]
    variance = np.var(batch, axis=0, ddof=1).sum()
    np.testing.assert_allclose(found.variance, [variance] * 2, rtol=1e-6)
    np.testing.assert_allclose(found.squared_norm_of_mean, [2.0, 2.0], rtol=1e-6)


def test_depth_sees_the_tree_of_one_microbatch():
    seen = {}

    def depth(path, leaf):
        seen[path] = leaf.shape, leaf.dtype
        return None

    tree = {"w": np.ones((3, 2, 4), np.float16), "n": np.arange(3, dtype=np.int32)}
    assert gradient_noise(tree, depth, strict=False) == {}
    assert seen == {("w",): ((2, 4), np.float16), ("n",): ((), np.int32)}


def test_noise_of_nothing():
    assert gradient_noise({}, SCANNED) == {}
    assert gradient_noise({"head": np.ones((2, 3))}, SCANNED, strict=False) == {}
    with pytest.raises(ValueError, match="matched none of the 1 leaves"):
        gradient_noise({"head": np.ones((2, 3))}, SCANNED)
    alone = {"blocks": {"w": np.ones((2, 1, 3))}}
    assert gradient_noise(alone, SCANNED) == {}
    with pytest.raises(TypeError, match="`strict` must be True or False"):
        gradient_noise({}, SCANNED, strict=None)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), ()])
def test_noise_needs_two_microbatches(shape):
    with pytest.raises(ValueError, match="needs at least 2") as info:
        gradient_noise({"blocks": {"w": np.ones(shape)}}, SCANNED)
    message = str(info.value)
    assert f"leaf 'blocks/w' of `per_microbatch_updates` has shape {shape}" in message
    assert "already summed or averaged" in message
    assert "jax.vmap(jax.grad(loss), (None, 0))(params, microbatches)" in message


def test_leaves_of_different_numbers_of_microbatches_are_refused():
    tree = {"blocks": {"b": np.ones((3, 4)), "w": np.ones((2, 4))}}
    with pytest.raises(ValueError, match=r"'blocks/w'.*shape \(2, 4\)") as info:
        gradient_noise(tree, SCANNED)
    assert "leaf 'blocks/b' has 3" in str(info.value)
    assert "a list of one tree for each" in str(info.value)
    assert "jax.tree.map(lambda *x: jnp.stack(x), *list_of_updates)" in str(info.value)
