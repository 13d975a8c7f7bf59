"""What the diagnostics of updates say is what plain loops say, whatever holds the tree.

`depth_statistics`, `cosine_matrix` and `gradient_noise` see the same blocks: of every
layer what has a neighbor along depth.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import (
    DepthStatistics,
    GradientNoise,
    RoleStatistics,
    cosine_matrix,
    depth_statistics,
    gradient_noise,
)

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(r"layers_(\d+)/", stack="blocks")


# The plain loops, in float64. A role whose shape changes along depth is coupled by
# shape, so blocks are {(role, shape): array} here.


def by_shape(blocks):
    return [
        {(role, np.shape(x)): oracle._double(x) for role, x in block.items()}
        for block in blocks
    ]


def in_runs(blocks, ranked):
    """{(role, shape): runs of neighboring layers}, without those that are alone."""
    keys = dict.fromkeys(key for block in blocks for key in block)
    runs = {key: oracle.runs_of(blocks, key, ranked) for key in keys}
    return {key: of_key for key, of_key in runs.items() if of_key}


def cosine_of(block, other, keys):
    if not keys:
        return 0.0
    x, y = (np.concatenate([b[key].ravel() for key in keys]) for b in (block, other))
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return np.vdot(x, y).real / size if size > 0 else 0.0


def plain_statistics(blocks, runs):
    """The four statistics of the block of these runs, from the definition."""
    norms, cosines, roughness = [], [], 0.0
    for layer, block in enumerate(blocks):
        held = [key for key, of in runs.items() if any(layer in run for run in of)]
        if held:
            norms.append(np.sqrt(sum(np.sum(np.abs(block[k]) ** 2) for k in held)))
    for a, b in itertools.combinations(range(len(blocks)), 2):
        shared = [
            key
            for key, of in runs.items()
            if any((a, b) in itertools.pairwise(run) for run in of)
        ]
        if shared:
            cosines.append(cosine_of(blocks[a], blocks[b], shared))
            steps = [blocks[b][key] - blocks[a][key] for key in shared]
            roughness += sum(np.sum(np.abs(step) ** 2) for step in steps)
    total = np.sum(np.square(norms))
    return norms, cosines, roughness, roughness / total if total > 0 else 0.0


def plain_cosine_matrix(blocks, runs):
    """Over what two layers share, for the layers that have a neighbor."""
    held = [
        {key for key, of in runs.items() if any(layer in run for run in of)}
        for layer in range(len(blocks))
    ]
    layers = [layer for layer, keys in enumerate(held) if keys]
    return [
        [cosine_of(blocks[a], blocks[b], sorted(held[a] & held[b])) for b in layers]
        for a in layers
    ]


def plain_noise(batches, runs):
    """The variance and ‖mean‖² of every layer, from the blocks of every batch."""
    variances, squared_norms = [], []
    for layer in range(len(batches[0])):
        held = [key for key, of in runs.items() if any(layer in run for run in of)]
        variance = squared_norm = 0.0
        for key in held:
            values = np.stack([blocks[layer][key] for blocks in batches])
            mean = sum(values) / len(values)
            variance += np.sum(np.abs(values - mean) ** 2) / (len(values) - 1)
            squared_norm += np.sum(np.abs(mean) ** 2)
        if held:
            variances.append(variance)
            squared_norms.append(squared_norm)
    return variances, squared_norms


# Trees that hold the same layers.


def stacked(blocks, axis=0):
    return {"blocks": oracle.stacked_tree(blocks, axis)}


def unrolled(blocks):
    """Without what has no layer, but with what is none of any."""
    layers = {
        key: block for key, block in oracle.unrolled_tree(blocks).items() if block
    }
    return {**layers, "head": np.ones((2,)), "steps": {"0": np.arange(3)}, "none": None}


def mixed(blocks):
    """The first two as leaves of their own, the others stacked on their last axis."""
    return {
        **oracle.unrolled_tree(blocks[:2]),
        "tail": oracle.stacked_tree(blocks[2:], 1),
    }


def tail(path, leaf):
    if path[0] == "tail":
        return gs.Depth("blocks", path[-1], 2, axis=min(1, leaf.ndim - 1))
    return None


def cycle(blocks):
    return {f"layers_{i}": oracle.stacked_tree(blocks[i::2]) for i in range(2)}


def grid(blocks):
    """As 2 × 3 layers, with the 3 on the last axis."""
    return {
        role: np.moveaxis(x.reshape(2, 3, *x.shape[1:]), 1, -1)
        for role, x in oracle.stacked_tree(blocks).items()
    }


def of_grid(path, leaf):
    return gs.Depth("blocks", path[-1], axis=(0, leaf.ndim - 1))


def wider_from_2(blocks):
    for block in blocks[2:]:
        block["kernel"] = np.tile(block["kernel"], 2)


def roles_missing_at_the_ends(blocks):
    del blocks[0]["bias"], blocks[1]["bias"], blocks[4]["kernel"]


def bias_missing_between(blocks):
    del blocks[2]["bias"]


def layers_and_a_role_missing(blocks):
    blocks[2], blocks[5] = {}, {}
    del blocks[3]["bias"]


def zero_and_empty(blocks):
    for block in blocks:
        block["bias"] = np.zeros((3,), np.float32)
        block["kernel"] = np.zeros((0, 4), np.float32)


class Row(NamedTuple):
    tree_of: Callable
    depth: Any = UNROLLED
    layers: int = 5
    damage: Callable | None = None
    strict: bool = True
    ranked: bool = False

    def blocks(self, seed, dtype="float32"):
        if dtype == "complex64":
            blocks = oracle.complex_blocks(self.layers, seed=seed)
        else:
            blocks = oracle.random_blocks(self.layers, jnp.dtype(dtype), seed=seed)
        if self.damage is not None:
            self.damage(blocks)
        return blocks


LAYOUTS = {
    "stacked": Row(stacked, SCANNED),
    "stacked on the last axis": Row(
        functools.partial(stacked, axis=1), gs.scanned("blocks/", axis=1)
    ),
    "a leaf for each layer": Row(unrolled),
    "leaves beside a stack": Row(mixed, gs.first_match(tail, UNROLLED)),
    "a cycle": Row(cycle, gs.scanned(r"layers_(\d+)/", stride=2, stack="blocks"), 4),
    "two nested axes": Row(grid, gs.depth_fn(of_grid), 6),
    "a role of two shapes": Row(unrolled, damage=wider_from_2),
    "a role not in every layer": Row(unrolled, damage=roles_missing_at_the_ends),
    "gaps, and a layer alone": Row(
        unrolled, UNROLLED, 7, layers_and_a_role_missing, strict=False
    ),
    "a gap that is closed": Row(
        unrolled, gs.ranked(UNROLLED), damage=bias_missing_between, ranked=True
    ),
    "zeros and no elements": Row(stacked, SCANNED, damage=zero_and_empty),
}
# The noise takes the blocks of layers as smoothing does, which has tables of its own.
NO_NOISE = ("a cycle", "a role of two shapes", "a gap that is closed")


@functools.cache
def program(name):
    """All diagnostics of the first of some trees, in one compilation."""
    row = LAYOUTS[name]

    def compute(batches):
        first = jax.tree.map(lambda x: x[0], batches)
        found = [
            depth_statistics(first, row.depth, strict=row.strict),
            cosine_matrix(first, row.depth, strict=row.strict),
        ]
        if name not in NO_NOISE:
            found.append(gradient_noise(batches, row.depth, strict=row.strict))
        return found

    return jax.jit(compute)


def together(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def assert_close(found, wanted, tolerance, dtype):
    assert found.shape == np.shape(wanted)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, tolerance, tolerance)


def assert_all(name, dtype="float32", tolerance=2e-6, of_dtype=np.float32):
    row = LAYOUTS[name]
    batches = [row.blocks(seed, dtype) for seed in range(3)]
    found = program(name)(together([row.tree_of(blocks) for blocks in batches]))
    assert all(list(part) == ["blocks"] for part in found)
    statistics, matrix, *noise = (part["blocks"] for part in found)
    blocks = [by_shape(batch) for batch in batches]
    runs = in_runs(blocks[0], row.ranked)

    assert isinstance(statistics, DepthStatistics)
    roles = sorted({role for role, _ in runs})
    assert sorted(statistics.roles) == roles
    for role in (None, *roles):
        of_role = {key: of for key, of in runs.items() if role in (None, key[0])}
        part = statistics if role is None else statistics.roles[role]
        wanted = plain_statistics(blocks[0], of_role)
        for field, value in zip(RoleStatistics._fields, wanted, strict=True):
            assert_close(getattr(part, field), value, tolerance, of_dtype)
    assert_close(matrix, plain_cosine_matrix(blocks[0], runs), tolerance, of_dtype)
    for of_noise in noise:
        assert isinstance(of_noise, GradientNoise)
        for value, wanted in zip(of_noise, plain_noise(blocks, runs), strict=True):
            assert_close(value, wanted, tolerance, of_dtype)


@pytest.mark.parametrize("name", LAYOUTS)
def test_diagnostics_are_the_plain_loops_in_every_layout(name):
    assert_all(name)


def test_zeros_give_no_nan_on_the_way():
    with jax.debug_nans(True):
        assert_all("zeros and no elements")


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_half_precision_is_summed_in_float32_and_complex_products_are_real(dtype):
    assert_all("leaves beside a stack", dtype)


def test_float64_is_summed_in_float64(enable_x64):
    with enable_x64():
        assert_all("leaves beside a stack", "float64", 1e-12, np.float64)


def test_a_block_is_as_wide_as_the_widest_of_its_roles(enable_x64):
    with enable_x64():
        w = np.ones((2, 3, 2))
        tree = {"blocks": {"a": np.float32(w), "b": w, "c": np.float16(w)}}
        found = jax.eval_shape(program("stacked"), tree)
    statistics, matrix, noise = (part["blocks"] for part in found)
    assert {name: x.cosines.dtype for name, x in statistics.roles.items()} == {
        "a": np.float32,
        "b": np.float64,
        "c": np.float32,
    }
    for of_block in (statistics.norms, statistics.relative_roughness, matrix, *noise):
        assert of_block.dtype == np.float64


def test_a_nan_shows_where_it_is_and_nowhere_else():
    row = LAYOUTS["a leaf for each layer"]
    batches = [row.blocks(seed) for seed in range(3)]
    batches[0][3]["bias"][0] = np.nan
    tree = together([row.tree_of(blocks) for blocks in batches])
    found = program("a leaf for each layer")(tree)
    statistics, matrix, noise = (part["blocks"] for part in found)
    at_3 = np.arange(5) == 3
    np.testing.assert_array_equal(np.isnan(statistics.norms), at_3)
    assert np.isnan(statistics.cosines).tolist() == [False, False, True, True]
    assert np.isnan(statistics.relative_roughness)
    assert np.isfinite(statistics.roles["kernel"].roughness)
    np.testing.assert_array_equal(np.isnan(matrix), at_3[:, None] | at_3)
    for numbers in noise:
        np.testing.assert_array_equal(np.isnan(numbers), at_3)


# By hand.


def test_norms_cosines_and_roughness_of_a_stack_by_hand():
    w = np.array([[3.0, 4.0], [6.0, 8.0], [-8.0, 6.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0], [0.0], [0.0], [2.0]], np.float32)
    tree = {"blocks": {"w": w, "b": b}}
    stack = jax.jit(lambda t: depth_statistics(t, SCANNED))(tree)["blocks"]
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


def test_sums_neither_cancel_nor_stop_nor_leave_their_range():
    direction = np.random.default_rng(0).normal(size=(1, 7))
    leaves = {
        # Squares of 1e8: norms minus dots would leave nothing of a difference of 1e-2.
        "close": np.array([[1e4], [1e4 + 2.0**-7]], np.float32),
        # A sum of 4096 ones stops at 256 in bfloat16, and overflows in float16.
        "bfloat16": np.full((2, 4096), 16, jnp.bfloat16),
        "float16": np.full((2, 4096), 16, np.float16),
        "collinear": np.float32(direction * np.arange(1, 50)[:, None]),
    }
    tree = {name: {"blocks": {"w": x}} for name, x in leaves.items()}
    found = jax.jit(lambda t: depth_statistics(t, SCANNED))(tree)
    assert float(found["close/blocks"].roughness) == 2.0**-14
    for name in ("bfloat16/blocks", "float16/blocks"):
        assert found[name].norms.tolist() == [1024.0, 1024.0]
    cosines = found["collinear/blocks"].cosines
    assert np.max(cosines) <= 1.0
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-6)


def test_a_cosine_with_an_update_of_norm_zero_is_zero():
    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]])
    with jax.debug_nans(True):
        found = jax.jit(lambda t: cosine_matrix(t, SCANNED))({"blocks": {"w": w}})
    assert found["blocks"].tolist() == [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]


def test_noise_by_hand_does_not_cancel():
    w = np.array([[[1.0, 0.0], [1e4, 2.0]], [[3.0, 4.0], [1e4, 2.0]]], np.float32)
    w[1, 1, 0] += np.float32(1 / 64)
    found = jax.jit(lambda t: gradient_noise(t, SCANNED))({"blocks": {"w": w}})[
        "blocks"
    ]
    # Layer 0: deviations of 1 and 2 from (2, 2), twice, over 2 - 1.
    assert found.variance.tolist() == [10.0, 2.0**-13]
    assert found.squared_norm_of_mean[0] == 8.0


# Which stacks there are.


def test_stacks_are_apart_and_those_without_neighbors_are_left_out():
    rows = {"a": [[3.0, 4.0], [0.0, 5.0]], "b": [[1.0], [0.0], [2.0]], "c": [[1.0]]}
    tree = {name: np.float32(x) for name, x in rows.items()}
    depth = gs.scanned("[abc]")

    @jax.jit
    def compute(tree):
        batches = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), tree)
        noise = gradient_noise(batches, depth)
        return depth_statistics(tree, depth), cosine_matrix(tree, depth), noise

    found = compute(tree)
    assert all(sorted(part) == ["a", "b"] for part in found)
    statistics, matrices, noise = found
    assert statistics["a"].norms.tolist() == [5.0, 5.0]
    assert statistics["b"].roughness == 5.0
    assert matrices["a"].tolist() == [[1.0, np.float32(0.8)], [np.float32(0.8), 1.0]]
    assert matrices["b"].tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert noise["a"].variance.tolist() == [50.0, 50.0]
    assert noise["b"].squared_norm_of_mean.tolist() == [4.0, 0.0, 16.0]


def test_names_that_are_no_strings_become_keys_that_jax_can_sort():
    names = {"a": (1, "x"), "b": 2, "c": "three"}

    def depth(path, leaf):
        return gs.Depth(names[path[0]], names[path[0]], axis=0)

    tree = {name: np.ones((2, 3)) for name in names}
    found = jax.eval_shape(lambda t: depth_statistics(t, depth), tree)
    assert {name: [*of.roles] for name, of in found.items()} == {
        name: [name] for name in ("(1, 'x')", "2", "three")
    }


def test_depth_sees_the_tree_of_one_microbatch():
    seen = {}

    def depth(path, leaf):
        seen[path] = leaf.shape, leaf.dtype
        return None

    tree = {"w": np.ones((3, 2, 4), np.float16), "n": np.arange(3, dtype=np.int32)}
    assert gradient_noise(tree, depth, strict=False) == {}
    assert seen == {("w",): ((2, 4), np.float16), ("n",): ((), np.int32)}


# Under jax's transformations.


def test_under_vmap_scan_and_eval_shape_it_is_the_same():
    row = LAYOUTS["stacked"]
    seeds = [row.tree_of(row.blocks(seed)) for seed in range(4)]
    trees = together([together(seeds[:2]), together(seeds[2:])])

    def of(tree):
        return [depth_statistics(tree, SCANNED), cosine_matrix(tree, SCANNED)]

    @jax.jit
    def compute(trees):
        return jax.lax.scan(lambda carry, t: (carry, jax.vmap(of)(t)), 0, trees)[1]

    found = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), compute(trees))
    for seed, tree in enumerate(seeds):
        wanted = program("stacked")(together([tree] * 3))[:2]
        of_seed = jax.tree.map(lambda x, seed=seed: x[seed], found)
        chex.assert_trees_all_close(of_seed, wanted, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(of, seeds[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, wanted)


def test_gradients_through_the_roughness_and_cosines_are_finite():
    def loss(w):
        stack = depth_statistics({"blocks": {"w": w}}, SCANNED)["blocks"]
        return stack.relative_roughness + jnp.sum(stack.cosines)

    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss))
        chex.assert_tree_all_finite((gradient(w), gradient(jnp.zeros_like(w))))


# Errors.

HEAD = {"head": np.ones((2, 3))}


def alike(field):
    """Two names that read the same as text."""

    def depth(path, leaf):
        names = {"stack": "s", "role": "r"} | {field: {"a": 1, "b": "1"}[path[0]]}
        return gs.Depth(**names, axis=0)

    return {"a": np.ones((2, 2, 3)), "b": np.ones((2, 2, 4))}, depth


def told(call, *fragments):
    with pytest.raises((TypeError, ValueError)) as info:
        jax.eval_shape(call)
    for fragment in fragments:
        assert fragment in str(info.value)


@pytest.mark.parametrize("function", [depth_statistics, cosine_matrix, gradient_noise])
def test_what_cannot_be_grouped_is_told_and_nothing_to_couple_is_permitted(function):
    told(lambda: function({"blocks": {}}, "blocks/"), "scanned('blocks/', axis=0)")
    told(lambda: function({}, SCANNED, strict=1), "`strict` must be True or False")
    told(lambda: function(HEAD, SCANNED), "matched none of the 1 leaves")
    gap = {f"layers_{i}": {"w": np.ones((2, 3))} for i in (0, 2, 3)}
    told(lambda: function(gap, UNROLLED), "layer 1 is missing")
    twice = gs.unrolled(r"layers_\d(\d)?", stack="blocks")
    told(lambda: function(gap, twice, strict=False), "gives layer 0")
    told(lambda: function(*alike("stack")), "`depth` has two", "read '1': ")
    assert function({}, SCANNED) == {}
    assert function(HEAD, SCANNED, strict=False) == {}


def test_roles_that_read_alike_are_told():
    both = "two roles of stack 's'", "read '1': 1 and '1'"
    told(lambda: depth_statistics(*alike("role")), *both)


def test_noise_needs_two_microbatches_and_as_many_in_all_leaves():
    for shape in ((1, 4), (0, 4), ()):
        tree = {"blocks": {"w": np.ones(shape)}}
        told(
            lambda tree=tree: gradient_noise(tree, SCANNED),
            "needs at least 2",
            f"leaf 'blocks/w' of `per_microbatch_updates` has shape {shape}",
            "already summed or averaged",
            "jax.vmap(jax.grad(loss), (None, 0))(params, microbatches)",
        )
    told(
        lambda: gradient_noise({"b": np.ones((3, 4)), "w": np.ones((2, 4))}, SCANNED),
        "leaf 'w' of",
        "shape (2, 4)",
        "leaf 'b' has 3",
        "a list of one tree for each",
        "jax.tree.map(lambda *x: jnp.stack(x), *list_of_updates)",
    )
    # Of two batches, with one layer.
    assert gradient_noise({"blocks": {"w": np.ones((2, 1, 3))}}, SCANNED) == {}
