"""Updates whose leaves are split over eight devices, each held against plain loops.

The number of devices is fixed when jax starts, so `python sharded_cases.py GROUP` runs
a group of cases in a process of its own. It prints, as the last line, JSON: for every
case what went wrong, "" if nothing did.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import test_operators
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from own_operators import AlikeWindow

import gradsmooth_optax as gs


def run(group, timeout=600):
    """What went wrong in the cases of a group: {name: error}; and how many they are."""
    here = os.path.dirname(os.path.abspath(__file__))
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, os.path.join(here, "sharded_cases.py"), group],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # What is slow here is compiling, not the programs.
            "XLA_FLAGS": flags + " --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join([os.path.dirname(here), here]),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    return {name: error for name, error in outcome.items() if error}, len(outcome)


# Operators of a narrow band.


def skewed(num_layers):
    """A band of two below and one above, different in every row."""
    values = np.random.default_rng(7).normal(size=(num_layers, num_layers))
    rows, columns = np.indices(values.shape)
    return np.where((columns - rows <= 1) & (rows - columns <= 2), values, 0.0)


def linear(matrix):
    def coupling(blocks, alpha, ranked):
        return oracle.smooth(blocks, lambda n: matrix(n, alpha), ranked=ranked)

    return coupling


def similarity(norm_scope, sharpness):
    def coupling(blocks, alpha, ranked):
        return oracle.similarity_window(blocks, alpha, norm_scope, sharpness, ranked)

    return coupling


def at_the_norm_of(make, coupling):
    """`norm_matched`, which takes the norms of the scope of the transformation."""

    def matched(blocks, alpha, ranked, norm_scope):
        return oracle.norm_matched(
            blocks, lambda b: coupling(b, alpha, ranked), norm_scope, ranked
        )

    return (lambda a: gs.controls.norm_matched(make(a))), matched


@functools.cache
def banded():
    """{name: (alpha -> operator, (blocks, alpha, ranked) -> coupled blocks)}."""
    window = linear(oracle.window_matrix)
    return {
        "window": (gs.window, window),
        "window of radius 2": (
            lambda a: gs.window(a, 2),
            linear(lambda n, a: oracle.window_matrix(n, a, 2)),
        ),
        "window of radius 3": (
            lambda a: gs.window(a, 3),
            linear(lambda n, a: oracle.window_matrix(n, a, 3)),
        ),
        "decaying window": (
            lambda a: gs.window(a, 3, decay=0.5),
            linear(lambda n, a: oracle.window_matrix(n, a, 3, 0.5)),
        ),
        "gaussian": (
            lambda s: gs.gaussian(s, radius=2),
            linear(lambda n, s: oracle.gaussian_matrix(n, s, 2)),
        ),
        "laplacian": (gs.laplacian, linear(oracle.laplacian_matrix)),
        "repeat": (
            lambda a: gs.repeat(gs.window(a), 3),
            linear(lambda n, a: np.linalg.matrix_power(oracle.window_matrix(n, a), 3)),
        ),
        "compose": (
            lambda a: gs.compose(gs.window(a, 2), gs.laplacian(0.3)),
            linear(
                lambda n, a: (
                    oracle.laplacian_matrix(n, 0.3) @ oracle.window_matrix(n, a, 2)
                )
            ),
        ),
        "dense": (
            lambda a: gs.operator_fn(lambda n: gs.dense(skewed(n)).matrix(n)),
            linear(lambda n, a: skewed(n)),
        ),
        "function": (
            lambda a: gs.operator_fn(test_operators.two_steps_back),
            linear(lambda n, a: test_operators.two_steps_back(n)),
        ),
        "similarity per param": (
            lambda a: gs.similarity_window(a, "param", sharpness=0.5),
            similarity("param", 0.5),
        ),
        "similarity per block": (gs.similarity_window, similarity("block", 1.0)),
        "norm_matched": at_the_norm_of(gs.window, window),
        "a user's own that looks at norms": (
            lambda a: AlikeWindow(a, 1.25),
            lambda blocks, alpha, ranked: oracle.alike_window(
                blocks, alpha, 1.25, ranked
            ),
        ),
    }


def expected(name, blocks, variant, norm_scope, alpha, ranked=False):
    """The plain loops."""
    coupling = banded()[name][1]
    if name == "norm_matched":
        coupling = functools.partial(coupling, norm_scope=norm_scope)
    return oracle.couple(
        blocks, lambda b: coupling(b, alpha, ranked), variant, norm_scope, ranked
    )


# What a case is.

ALPHA = 0.375


class Case(NamedTuple):
    mesh: str
    tx: Any  # (alpha, an array) -> transformation
    tree: Any  # of whole arrays
    specs: Any  # a tree of PartitionSpecs
    check: Any  # the smoothed tree -> None, or raises
    check_vma: bool = True


def meshes():
    devices = np.array(jax.devices())
    return {
        "line": Mesh(devices, ("stage",)),
        "grid": Mesh(devices.reshape(4, 2), ("stage", "model")),
        "one": Mesh(devices.reshape(1, 8), ("stage", "model")),
    }


def make_blocks(num_layers, dtype="float32", shapes=None, seed=0):
    """Random, but some layers agree and one that begins a stage of three is zero."""
    blocks = oracle.random_blocks(num_layers, "float32", shapes, seed)
    for block, previous in zip(blocks[1::4], blocks[::4], strict=False):
        for role in block:
            block[role] = 0.5 * previous[role]
    if num_layers > 3:
        blocks[3] = {role: 0 * x for role, x in blocks[3].items()}
    return [{role: x.astype(dtype) for role, x in b.items()} for b in blocks]


def against(blocks_of, want):
    """A check that the smoothed tree holds the blocks `want`."""

    def check(tree):
        oracle.assert_blocks_close(blocks_of(tree), want)

    return check


def message(error):
    """The error and the line of the library that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames]
    at = [f for f in ours if f.startswith("_")]
    return f"{type(error).__name__}: {str(error)[:600]} ({', '.join(at)})"


def smoothed(cases, mesh):
    """All cases of one mesh as one program, and what could not be traced."""
    errors = {}
    trees = {name: jax.tree.map(jnp.asarray, c.tree) for name, c in cases.items()}

    @jax.jit
    def apply(trees, alpha):
        results = {}
        for name, case in cases.items():

            def update(tree, alpha, case=case):
                tx = case.tx(alpha)
                return tx.update(tree, tx.init(tree))[0]

            try:
                results[name] = jax.shard_map(
                    update,
                    mesh=mesh,
                    in_specs=(case.specs, P()),
                    out_specs=case.specs,
                    check_vma=case.check_vma,
                )(trees[name], alpha)
            except Exception as error:  # One case must not hide the others.
                errors[name] = message(error)
        return results

    return apply(trees, jnp.float32(ALPHA)), errors


def outcomes(cases):
    results, errors = {}, {}
    for title, mesh in meshes().items():
        some = {name: case for name, case in cases.items() if case.mesh == title}
        done, failed = smoothed(some, mesh) if some else ({}, {})
        results, errors = {**results, **done}, {**errors, **failed}
    for name, result in results.items():
        try:
            like = cases[name].tree
            for got, given in zip(*map(jax.tree.leaves, (result, like)), strict=True):
                assert (got.shape, got.dtype) == (given.shape, given.dtype)
            cases[name].check(jax.tree.map(np.asarray, result))
        except Exception as error:
            errors[name] = message(error)
    return {name: errors.get(name, "") for name in cases}


# Every operator, scanned.


def on_axis(axis):
    def depth(path, leaf):
        return gs.Depth("blocks", path[-1], axis=min(axis, leaf.ndim - 1))

    return depth


def spec_of(rank, axis, split=None):
    names = [None] * rank
    names[min(axis, rank - 1)] = "stage"
    if split is not None:  # The last axis that is not over depth.
        names[max(i for i in range(rank) if names[i] is None)] = split
    return P(*names)


BLOCKWISE = ("similarity per block", "a user's own that looks at norms")


def operators(mesh):
    """Every banded operator in every variant, on one of the meshes."""
    num_layers = {"line": 24, "grid": 12}[mesh]  # Three per stage.
    rest = [*itertools.product((0, 1, 2), ("float32", "bfloat16"), (1, 0), (1, 0))]
    every = itertools.product(banded(), test_operators.VARIANTS)
    for k, (name, (variant, norm_scope)) in enumerate(every):
        if k % 2 == (mesh == "line"):
            continue
        axis, dtype, check_vma, traced = rest[(7 * k + k // 24) % len(rest)]
        blocks, specs = make_blocks(num_layers, dtype, {"kernel": (2, 4)}), {}
        specs["kernel"] = spec_of(3, axis, "model" if mesh == "grid" else None)
        if norm_scope == "block" or name in BLOCKWISE:
            # With check_vma=False it cannot be told that a leaf is not split.
            whole = mesh == "line" or check_vma
            more = make_blocks(num_layers, dtype, {"bias": (4,)}, seed=1)
            blocks = [{**a, **b} for a, b in zip(blocks, more, strict=True)]
            specs["bias"] = spec_of(2, axis, None if whole else "model")

        def tx(alpha, name=name, axis=axis, traced=traced, how=(variant, norm_scope)):
            return gs.smooth_over_depth(
                on_axis(axis),
                banded()[name][0](alpha if traced else ALPHA),
                variant=how[0],
                norm_scope=how[1],
                axis_name="stage",
                norm_axis_names=("model",) if mesh == "grid" else (),
            )

        yield (
            f"{name}, {variant} per {norm_scope}, axis {axis}, {dtype}"
            f"{', traced' * traced}{', check_vma' * check_vma}",
            Case(
                mesh,
                tx,
                oracle.stacked_tree(blocks, axis),
                specs,
                against(
                    functools.partial(oracle.unstacked, axis=axis),
                    expected(name, blocks, variant, norm_scope, ALPHA),
                ),
                bool(check_vma),
            ),
        )


# How layers lie in leaves, and other cases one by one.

WINDOWS = {
    "": {},
    ", of radius 2, norm-preserving": {
        "radius": 2,
        "variant": "norm_preserving",
        "norm_scope": "block",
    },
    ", directional": {"variant": "directional", "norm_scope": "block"},
}
TWO = list(WINDOWS)[1:]


def windows(title, depth, tree, specs, blocks, blocks_of, kinds=TWO, **kwargs):
    """Cases of one layout; keywords that plain loops know go to them as well."""
    ranked = kwargs.pop("ranked", False)
    mesh = kwargs.pop("mesh", "line")
    for kind in kinds:
        how = dict(WINDOWS[kind])
        want = oracle.window(blocks, ALPHA, ranked=ranked, **how)
        radius = how.pop("radius", 1)

        def tx(alpha, how=how, radius=radius):
            operator = gs.window(alpha, radius)
            return gs.smooth_over_depth(
                depth, operator, axis_name="stage", **how, **kwargs
            )

        yield title + kind, Case(mesh, tx, tree, specs, against(blocks_of, want))


def per_layer(blocks, per_stage):
    """Leaf i holds layer i of every stage along a leading axis."""
    return {
        f"l{i}": oracle.stacked_tree(blocks[i::per_stage]) for i in range(per_stage)
    }


def from_per_layer(tree, num_layers):
    parts = [oracle.unstacked(part) if part else [] for part in tree.values()]
    return [parts[i % len(parts)][i // len(parts)] for i in range(num_layers)]


def layouts():
    # One leaf per layer of a stage, of local size 1.
    blocks = make_blocks(24)
    numbered = gs.scanned(r"l(\d+)/", stride=3, stack="blocks")
    unstack = functools.partial(from_per_layer, num_layers=24)
    tree = per_layer(blocks, 3)
    yield from windows("a leaf per layer", numbered, tree, P("stage"), blocks, unstack)

    # The first two layers of every stage in one leaf, the third in another.
    def mixed(path, leaf):
        if path[0] == "pair":
            return gs.Depth("b", path[-1], axis=(0, 1), stride=(3, 1))
        return gs.Depth("b", path[-1], 2, axis=0, stride=3)

    def unmix(tree):
        parts = {"l0": {}, "l1": {}, "l2": tree["third"]}
        for i in range(2):
            parts[f"l{i}"] = {role: x[:, i] for role, x in tree["pair"].items()}
        return unstack(parts)

    parts = per_layer(blocks, 3)
    pair = {r: np.stack([x, parts["l1"][r]], 1) for r, x in parts["l0"].items()}
    tree = {"third": parts["l2"], "pair": pair}
    yield from windows("mixed leaves", mixed, tree, P("stage"), blocks, unmix)

    # A role that every second of three layers lacks, so that all its pairs are
    # across stages; closed gaps.
    some = [
        {role: x for role, x in block.items() if role == "kernel" or layer % 3 != 1}
        for layer, block in enumerate(blocks)
    ]
    tree = per_layer(some, 3)
    for ranked in (False, True):
        yield from windows(
            "a role of some layers" + ", ranked" * ranked,
            gs.ranked(numbered) if ranked else numbered,
            tree,
            P("stage"),
            some,
            unstack,
            strict=False,
            ranked=ranked,
        )
        # Two layers are compared in the roles in which they are neighbors.
        for scope in ("param", "block"):

            def similar(alpha, scope=scope, ranked=ranked):
                return gs.smooth_over_depth(
                    gs.ranked(numbered) if ranked else numbered,
                    gs.similarity_window(alpha, scope),
                    strict=False,
                    axis_name="stage",
                )

            want = oracle.similarity_window(some, ALPHA, scope, ranked=ranked)
            title = (
                f"similarity per {scope}, a role of some layers{', ranked' * ranked}"
            )
            check = against(unstack, want)
            yield title, Case("line", similar, tree, P("stage"), check)
    # The first of three only: no neighbors, unless ranked.
    lone = [
        {role: x for role, x in block.items() if role == "kernel" or layer % 3 == 0}
        for layer, block in enumerate(blocks)
    ]
    for ranked in (False, True):
        yield from windows(
            "a role of one layer per stage" + ", ranked" * ranked,
            gs.ranked(numbered) if ranked else numbered,
            per_layer(lone, 3),
            P("stage"),
            lone,
            unstack,
            kinds=[""],
            strict=False,
            ranked=ranked,
        )

    # One layer per stage.
    blocks = make_blocks(8)
    yield from windows(
        "one layer per stage",
        gs.scanned("^"),
        oracle.stacked_tree(blocks),
        P("stage"),
        blocks,
        oracle.unstacked,
        kinds=["", ", directional"],
    )

    # One stage; the mesh axis has size 1.
    yield from windows(
        "one stage",
        gs.scanned("^"),
        oracle.stacked_tree(blocks),
        P("stage"),
        blocks,
        oracle.unstacked,
        mesh="one",
    )

    # Two stacks of different depth, and a leaf that is in none.
    long, short = make_blocks(24, seed=1), make_blocks(8, seed=2)

    def two(path, leaf):
        return None if path[0] == "head" else gs.Depth(path[0], path[1], axis=0)

    head = np.arange(3.0, dtype="float32")
    tree = {
        "long": oracle.stacked_tree(long),
        "short": oracle.stacked_tree(short),
        "head": head,
    }

    def check(tree):
        np.testing.assert_array_equal(tree["head"], head)
        for name, blocks in {"long": long, "short": short}.items():
            want = oracle.window(blocks, ALPHA, variant="norm_preserving")
            oracle.assert_blocks_close(oracle.unstacked(tree[name]), want)

    def tx(alpha):
        return gs.smooth_over_depth(
            two, alpha, variant="norm_preserving", axis_name="stage"
        )

    specs = {"long": P("stage"), "short": P("stage"), "head": P()}
    yield "two stacks of different depth", Case("line", tx, tree, specs, check)


def circular(repeats, stages, per_stage, order):
    """Layers as (repeats, stages, per stage), the axes in some order."""
    num_layers = repeats * stages * per_stage
    strides = {"r": stages * per_stage, "s": per_stage, "l": 1}
    blocks = make_blocks(num_layers)
    axes = ["rsl".index(letter) for letter in order]

    def arrange(x):
        x = x.reshape(repeats, stages, per_stage, *x.shape[1:])
        return np.transpose(x, (*axes, *range(3, x.ndim)))

    def unstack(tree):
        back = {}
        for role, x in tree.items():
            x = np.transpose(x, (*np.argsort(axes), *range(3, x.ndim)))
            back[role] = x.reshape(num_layers, *x.shape[3:])
        return oracle.unstacked(back)

    def depth(path, leaf):
        stride = tuple(strides[letter] for letter in order)
        return gs.Depth("blocks", path[-1], axis=(0, 1, 2), stride=stride)

    tree = {role: arrange(x) for role, x in oracle.stacked_tree(blocks).items()}
    specs = P(*("stage" if letter == "s" else None for letter in order))
    return depth, tree, specs, blocks, unstack


def circulars():
    for repeats, per_stage, order, mesh in (
        (2, 2, "rsl", "line"),
        (3, 2, "srl", "grid"),
        (2, 3, "lrs", "grid"),
        (3, 1, "rsl", "line"),
        (1, 2, "rsl", "line"),
        (2, 4, "rsl", "one"),
    ):
        stages = {"line": 8, "grid": 4, "one": 1}[mesh]
        layout = circular(repeats, stages, per_stage, order)
        kinds = ["", ", directional"] if per_stage == 1 else TWO
        title = f"circular: {repeats} rounds of {stages} stages of {per_stage}, {order}"
        yield from windows(title, *layout, kinds=kinds, mesh=mesh)


def alone(blocks, per_stage, smooth):
    """Each stage smoothed on its own."""
    cuts = range(0, len(blocks), per_stage)
    return [block for i in cuts for block in smooth(blocks[i : i + per_stage])]


def others():
    blocks = make_blocks(24)
    scanned = gs.scanned("^")

    # Stages that are not coupled.
    def stage_alone(title, name, per_stage, layout, variant="standard"):
        depth, tree, specs, blocks, unstack = layout

        def tx(alpha):
            return gs.smooth_over_depth(
                depth,
                banded()[name][0](alpha),
                variant=variant,
                norm_scope="block",
                axis_name="stage",
                axis_boundary="stage",
            )

        want = alone(
            blocks,
            per_stage,
            lambda part: expected(name, part, variant, "block", ALPHA),
        )
        return title, Case("line", tx, tree, specs, against(unstack, want))

    layout = (
        scanned,
        oracle.stacked_tree(blocks),
        P("stage"),
        blocks,
        oracle.unstacked,
    )
    for name, variant in (
        ("window", "standard"),
        ("window of radius 3", "norm_preserving"),
        ("similarity per block", "standard"),
        ("laplacian", "directional"),
        ("norm_matched", "standard"),
    ):
        title = f"stages not coupled: {name}, {variant}"
        yield stage_alone(title, name, 3, layout, variant)
    layout = circular(2, 8, 2, "rsl")
    yield stage_alone("stages not coupled, circular", "window", 2, layout)

    # What is not banded, where all that it couples is on one device.
    for title, mesh, boundary, size in (
        ("ema inside of stages", "line", "stage", 3),
        ("ema on one stage", "one", "couple", 24),
    ):

        def ema(alpha, boundary=boundary):
            return gs.smooth_over_depth(
                scanned, gs.ema(alpha), axis_name="stage", axis_boundary=boundary
            )

        def plain(part):
            return oracle.smooth(part, lambda n: oracle.ema_matrix(n, ALPHA, False))

        check = against(oracle.unstacked, alone(blocks, size, plain))
        yield title, Case(mesh, ema, oracle.stacked_tree(blocks), P("stage"), check)

    # A schedule.
    def schedule(alpha):
        return gs.smooth_over_depth(
            scanned, optax.linear_schedule(ALPHA, 0.0, 4), axis_name="stage"
        )

    tree, unstacked = oracle.stacked_tree(blocks), oracle.unstacked
    want = oracle.window(blocks, ALPHA)
    yield "schedule", Case("line", schedule, tree, P("stage"), against(unstacked, want))

    # Without `norm_axis_names`, norms are of each device's part alone. Where some are 0
    # these are summed again: no device may wait for others that do not.
    shapes = {"kernel": (2, 4), "bias": (4,)}
    blocks = make_blocks(12, shapes=shapes)
    blocks[4] = {r: x * np.float32([0, 0, 1, 1]) for r, x in blocks[4].items()}
    halves = [
        oracle.window(
            [{r: x[..., half] for r, x in b.items()} for b in blocks],
            ALPHA,
            variant="norm_preserving",
            norm_scope="block",
        )
        for half in (slice(0, 2), slice(2, 4))
    ]
    want = [
        {r: np.concatenate([a[r], b[r]], -1) for r in a}
        for a, b in zip(*halves, strict=True)
    ]

    def parts(alpha):
        return gs.smooth_over_depth(
            scanned,
            alpha,
            variant="norm_preserving",
            norm_scope="block",
            axis_name="stage",
        )

    specs = {"kernel": P("stage", None, "model"), "bias": P("stage", "model")}
    tree = oracle.stacked_tree(blocks)
    for check_vma in (True, False):
        title = f"norms of a part alone, check_vma={check_vma}"
        check = against(unstacked, want)
        yield title, Case("grid", parts, tree, specs, check, check_vma)

    # Only the norms need a mesh axis: depth is whole on every device.
    def only_norms(alpha):
        return gs.smooth_over_depth(
            scanned,
            alpha,
            variant="directional",
            norm_scope="block",
            norm_axis_names=("model",),
        )

    want = oracle.window(blocks, ALPHA, variant="directional", norm_scope="block")
    specs = {"kernel": P(None, None, "model"), "bias": P(None, "model")}
    check = against(unstacked, want)
    yield "norm_axis_names alone", Case("grid", only_norms, tree, specs, check)


def not_a_number():
    """A NaN reaches the neighbors, across stages, and does not wrap around."""
    line = circular(1, 8, 3, "rsl")
    rounds = circular(2, 8, 2, "srl")
    for title, layout, layer, radius in (
        ("the end of a stage", line, 5, 1),
        ("the last layer", line, 23, 2),
        ("the first layer", line, 0, 1),
        ("the end of a round", rounds, 15, 1),
        ("the last layer of all rounds", rounds, 31, 2),
        ("the second layer of all rounds", rounds, 1, 2),
    ):
        depth, tree, specs, blocks, unstack = layout
        number = np.arange(len(blocks))
        near = np.abs(number - layer) <= radius
        tree = {"kernel": tree["kernel"].copy()}
        blocks = [{"kernel": block["kernel"]} for block in blocks]
        spoiled = np.all(
            tree["kernel"] == blocks[layer]["kernel"], axis=(-2, -1), keepdims=True
        )
        tree["kernel"] = np.where(spoiled, np.float32(np.nan), tree["kernel"])

        def check(tree, near=near, blocks=blocks, unstack=unstack, radius=radius):
            got, want = unstack(tree), oracle.window(blocks, ALPHA, radius)
            is_nan = [np.isnan(block["kernel"]).all() for block in got]
            np.testing.assert_array_equal(is_nan, near)
            clean = [i for i, spoiled in enumerate(near) if not spoiled]
            oracle.assert_blocks_close(
                [got[i] for i in clean], [want[i] for i in clean]
            )

        def tx(alpha, depth=depth, radius=radius):
            operator = gs.window(alpha, radius)
            return gs.smooth_over_depth(depth, operator, axis_name="stage")

        yield f"NaN in {title}", Case("line", tx, tree, specs, check)


# Whole optimizers.

STEPS = 3


def make_optimizers(axis_name):
    depth = gs.first_match(
        gs.scanned("blocks/"), gs.scanned(r"l(\d+)/", stride=2, stack="pairs")
    )
    schedule = optax.linear_schedule(0.375, 0.0, STEPS)

    def smooth(operator=0.3, **kwargs):
        return gs.smooth_over_depth(depth, operator, axis_name=axis_name, **kwargs)

    def followed(inner, smoothing, learning_rate=0.1):
        return optax.chain(
            gs.with_depth_smoothing(inner, smoothing),
            optax.scale_by_learning_rate(learning_rate),
        )

    def of_alpha(learning_rate, alpha):
        return followed(optax.identity(), smooth(alpha), learning_rate)

    in_blocks = {"norm_scope": "block"}
    return {
        "adamw": gs.adamw(
            0.1, smooth(variant="norm_preserving", **in_blocks), weight_decay=0.1
        ),
        "adamw, schedule": gs.adamw(0.1, smooth(gs.window(schedule, 2))),
        "momentum": followed(
            optax.trace(0.9), smooth(variant="directional", **in_blocks)
        ),
        "muon": gs.muon(0.1, depth, smooth(schedule), ns_steps=1, weight_decay=0.1),
        "with_depth_smoothing": followed(optax.scale_by_rms(), smooth()),
        "injected": optax.inject_hyperparams(of_alpha)(0.1, 0.3),
    }


def trained(tx, params, state):
    def step(carry, step):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p * (3 + step)), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.arange(STEPS))[0]


def optimizers():
    """Whole optimizers inside of `shard_map` train as they do on whole arrays."""
    blocks = make_blocks(16, shapes={"kernel": (4, 3), "bias": (3,)}, seed=5)
    tree = {
        "blocks": oracle.stacked_tree(blocks),
        **per_layer(make_blocks(16, shapes={"kernel": (4, 3)}, seed=6), 2),
        "head": np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3),
    }
    params = jax.tree.map(jnp.asarray, tree)
    mesh, errors = meshes()["line"], {}
    sharded, whole = make_optimizers("stage"), make_optimizers(None)

    def specs_of(tree):
        return jax.tree.map(
            lambda x: P("stage") if x.ndim and x.shape[0] in (8, 16) else P(), tree
        )

    @jax.jit
    def apart(params):
        results = {}
        for name, tx in sharded.items():
            try:
                state = tx.init(params)  # Of whole arrays.
                specs = specs_of(params), specs_of(state)
                # Of those of a stage.
                inside = jax.shard_map(
                    tx.init, mesh=mesh, in_specs=specs[:1], out_specs=specs[1]
                )(params)
                results[name] = jax.shard_map(
                    functools.partial(trained, tx),
                    mesh=mesh,
                    in_specs=specs,
                    out_specs=specs,
                )(params, state)
                results[f"{name}, init"] = (params, inside)
            except Exception as error:
                errors[name] = message(error)
        return results

    @jax.jit
    def together(params):
        results = {}
        for name, tx in whole.items():
            state = tx.init(params)
            results[name] = trained(tx, params, state)
            results[f"{name}, init"] = (params, state)
        return results

    got, want = apart(params), together(params)
    for name, result in got.items():
        try:
            assert jax.tree.structure(result) == jax.tree.structure(want[name])
            for a, b in zip(*map(jax.tree.leaves, (result, want[name])), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        except Exception as error:
            errors[name] = message(error)
    return {name: errors.get(name, "") for name in {**got, **errors}}


def pmapped():
    """`jax.pmap`, each stage's layers along the mapped axis."""
    blocks = make_blocks(16)
    tree = {
        r: x.reshape(8, 2, *x.shape[1:]) for r, x in oracle.stacked_tree(blocks).items()
    }

    def step(tree):
        tx = gs.smooth_over_depth(
            gs.scanned("^"),
            gs.window(ALPHA, radius=2),
            variant="norm_preserving",
            axis_name="stage",
        )
        return tx.update(tree, tx.init(tree))[0]

    try:
        got = jax.pmap(step, axis_name="stage")(tree)
        got = {r: np.asarray(x).reshape(16, *x.shape[2:]) for r, x in got.items()}
        want = oracle.window(blocks, ALPHA, 2, variant="norm_preserving")
        oracle.assert_blocks_close(oracle.unstacked(got), want)
    except Exception as error:
        return {"pmap": message(error)}
    return {"pmap": ""}


# Under jit, with an Auto or an Explicit mesh.

KEEP = [
    "window",
    "wide window",
    "laplacian",
    "gaussian",
    "similarity per param",
    "similarity per block",
]
SPECS = {
    "grid": {
        "depth": P("stage"),
        "inner": P(None, None, "model"),
        "both": P("stage", None, "model"),
    },
    "line": {"depth": P("stage"), "inner": P(None, None, "stage")},
}


def mesh_of(shape, kind):
    devices = np.array(jax.devices())
    names = {"grid": ("stage", "model"), "line": ("stage",)}[shape]
    sizes = {"grid": (4, 2), "line": (8,)}[shape]
    return Mesh(devices.reshape(sizes), names, axis_types=(kind,) * len(names))


def jitted(shape, kind):
    """Every operator under `jit`: traced in every variant, its values in some."""
    mesh, specs = mesh_of(shape, kind), SPECS[shape]
    explicit = kind == AxisType.Explicit
    blocks = make_blocks(8, shapes=dict.fromkeys(specs, (1, 8)))
    tree = {
        role: jax.device_put(x, NamedSharding(mesh, specs[role]))
        for role, x in oracle.stacked_tree(blocks).items()
    }
    alpha, errors = test_operators.STRENGTH, {}

    def depth(path, leaf):
        # A role that is whole along depth shares no block with one that is split: the
        # compiler of an Auto mesh may then split its result as well.
        stack = "blocks" if explicit else path[-1] == "inner"
        return gs.Depth(stack, path[-1], axis=0)

    def apply(cases, tree, strength):
        results = {}
        for title, (name, variant, norm_scope, traced) in cases.items():
            given = strength if traced else alpha
            tx = gs.smooth_over_depth(
                depth,
                test_operators.make(name, given),
                variant=variant,
                norm_scope=norm_scope,
            )
            errors[title] = ""
            try:
                out = tx.update(tree, tx.init(tree))[0]
                for role, x in out.items() if explicit else ():
                    given = jax.typeof(tree[role]).sharding
                    assert jax.typeof(x).sharding == given, (role, jax.typeof(x))
                results[title] = out
            except Exception as error:
                errors[title] = message(error)
        return results

    every, some = {}, {}
    for i, name in enumerate(test_operators.EVERY):
        for j, (variant, norm_scope) in enumerate(test_operators.VARIANTS):
            traced = (i + j) % 2
            title = f"{name}, {variant} per {norm_scope}{', traced' * traced}, {shape}"
            every[title] = (name, variant, norm_scope, traced)
            if (j - 2 * i) % 5 in ((0, 2) if shape == "grid" else (1,)):
                some[title] = every[title]
    if explicit:  # What can go wrong there does when it is traced.
        jax.jit(functools.partial(apply, every)).trace(tree, jnp.float32(alpha))
    results = jax.jit(functools.partial(apply, some))(tree, jnp.float32(alpha))
    for title in results:
        name, variant, norm_scope, _ = some[title]
        try:
            parts = [list(specs)] if explicit else [["inner"], [*{*specs} - {"inner"}]]
            for roles in parts:
                want = test_operators.expected_of(
                    name,
                    [{r: b[r] for r in roles} for b in blocks],
                    variant,
                    norm_scope,
                )
                got = {role: np.asarray(results[title][role]) for role in roles}
                oracle.assert_blocks_close(oracle.unstacked(got), want)
            for role, x in results[title].items():
                if explicit or name in KEEP:
                    given = tree[role].sharding
                    assert x.sharding.is_equivalent_to(given, 3), (role, x.sharding)
        except Exception as error:
            errors[title] = message(error)
    return errors


def diagnosed(shape, kind):
    """Diagnostics under `jit`, of leaves that are split in several ways."""
    mesh, specs = mesh_of(shape, kind), SPECS[shape]
    blocks = make_blocks(8, shapes=dict.fromkeys(specs, (1, 8)))
    whole = {"blocks": oracle.stacked_tree(blocks)}
    split = {
        role: jax.device_put(x, NamedSharding(mesh, specs[role]))
        for role, x in whole["blocks"].items()
    }
    scanned, unrolled = gs.scanned("blocks/"), gs.unrolled()
    one_by_one = {f"layers_{i}": block for i, block in enumerate(blocks)}
    on_inner = NamedSharding(mesh, P(None, "stage"))
    split_too = jax.tree.map(lambda x: jax.device_put(x, on_inner), one_by_one)

    def monitor(tree, depth):
        smooth = gs.smooth_over_depth(depth, ALPHA)
        tx = gs.diagnostics.monitor_depth(smooth, depth, every=2)
        state = tx.init(tree)
        for _ in range(2):
            _, state = tx.update(tree, state)
        return gs.diagnostics.monitored(state)

    functions = {
        "depth_statistics": gs.diagnostics.depth_statistics,
        "cosine_matrix": gs.diagnostics.cosine_matrix,
        "monitor_depth": monitor,
    }
    errors = {}
    for name, function in functions.items():
        for depth, given, plain in (
            (scanned, {"blocks": split}, whole),
            (unrolled, split_too, one_by_one),
        ):
            title = f"{name}, {depth}, {shape}"
            errors[title] = ""
            try:
                compute = jax.jit(functools.partial(function, depth=depth))
                got, want = compute(given), compute(plain)
                assert jax.tree.structure(got) == jax.tree.structure(want)
                for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
            except Exception as error:
                errors[title] = message(error)
    return errors


# What moves between devices, in the compiled text.

MOVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)


def moves(compiled):
    """How often which collective is in the text; a start and a done are one."""
    text = compiled.as_text()
    counts = {m: len(re.findall(rf" {m}(?:-start)?\(", text)) for m in MOVES}
    return {name: count for name, count in counts.items() if count}


def moves_many(line, many=24):
    """Whether a line of the text moves more numbers than `many`, but for halos."""
    kinds = "|".join(kind for kind in MOVES if kind != "collective-permute")
    found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
    shapes = re.findall(r"\w+\[([\d,]+)\]", found[1]) if found else []
    return any(np.prod([int(n) for n in shape.split(",")]) > many for shape in shapes)


def compiled():
    wrong = {}
    mesh = meshes()["grid"]
    whole = {r: jnp.ones((12, 2, 4)) for r in ("a", "b")}
    specs = P("stage", None, "model")
    sharding = NamedSharding(mesh, specs)
    scanned = gs.scanned("^")

    def count(title, allowed, tx, tree, by_hand=False):
        def update(tree):
            return tx.update(tree, tx.init(tree))[0]

        if by_hand:
            update = jax.shard_map(
                update, mesh=mesh, in_specs=(specs,), out_specs=specs
            )
        tree = {r: jax.device_put(x, sharding) for r, x in tree.items()}
        try:
            found = moves(jax.jit(update).lower(tree).compile())
            wrong[title] = "" if found == allowed else f"{found}, not {allowed}"
        except Exception as error:
            wrong[title] = message(error)

    one = {"a": whole["a"]}
    for radius in (1, 2, 3):
        operator = gs.window(0.3, radius)
        tx = gs.smooth_over_depth(scanned, operator, axis_name="stage")
        two = {"collective-permute": 2}
        count(f"shard_map, radius {radius}", two, tx, one, by_hand=True)
        tx = gs.smooth_over_depth(scanned, operator)
        # GSPMD's halos are one exchange per shifted copy.
        halos = {"collective-permute": 2 * radius}
        count(f"jit, radius {radius}", halos, tx, one)
    tx = gs.smooth_over_depth(scanned, 0.3, axis_name="stage")
    count("two leaves", {"collective-permute": 4}, tx, whole, by_hand=True)
    tx = gs.smooth_over_depth(
        scanned, 0.3, axis_name="stage", axis_boundary="stage", variant="directional"
    )
    count("stages not coupled", {}, tx, one, by_hand=True)
    tx = gs.smooth_over_depth(
        scanned, 0.3, axis_name="stage", variant="norm_preserving"
    )
    # And whether all sum again, with the halos of that.
    norms = {"all-reduce": 1, "collective-permute": 4}
    count("local norms", norms, tx, one, by_hand=True)
    return wrong


def auto_moves():
    """Banded operators under jit move halos along depth and nothing else."""
    wrong = {}
    mesh = mesh_of("line", AxisType.Auto)
    sharding = NamedSharding(mesh, P("stage"))
    tree = {"w": jax.device_put(jnp.ones((24, 2, 3)), sharding)}
    for variant in ("standard", "norm_preserving", "directional"):

        def update(tree, variant=variant):
            results = {}
            for name in KEEP:
                operator = test_operators.make(name)
                tx = gs.smooth_over_depth(gs.scanned("^"), operator, variant=variant)
                results[name] = tx.update(tree, tx.init(tree))[0]
            return results

        program = jax.jit(update).lower(tree).compile()
        # Of other kinds at most the norms, a number per layer.
        large = [line for line in program.as_text().splitlines() if moves_many(line)]
        halos = moves(program)["collective-permute"]
        wrong[variant] = "" if halos and not large else f"{halos} halos, {large}"
    return wrong


def explicit_by_hand():
    """`shard_map` over an Explicit mesh, and single calls outside of jit."""
    wrong = {}
    mesh = mesh_of("grid", AxisType.Explicit)
    blocks = make_blocks(12, shapes={"kernel": (2, 4)})
    spec = P("stage", None, "model")
    tree = {
        role: jax.device_put(x, NamedSharding(mesh, spec))
        for role, x in oracle.stacked_tree(blocks).items()
    }
    operator, variant = gs.window(ALPHA, radius=2), "norm_preserving"
    want = oracle.window(blocks, ALPHA, radius=2, variant=variant)

    def update(tree, **kwargs):
        tx = gs.smooth_over_depth(gs.scanned("^"), operator, variant=variant, **kwargs)
        return tx.update(tree, tx.init(tree))[0]

    by_hand = jax.shard_map(
        functools.partial(update, axis_name="stage", norm_axis_names=("model",)),
        mesh=mesh,
        in_specs=(spec,),
        out_specs=spec,
    )
    manual_depth = jax.shard_map(
        functools.partial(update, axis_name="stage"),
        mesh=mesh_of("grid", AxisType.Auto),
        in_specs=(P("stage"),),
        out_specs=P("stage"),
        axis_names={"stage"},
    )
    bare = {
        role: jax.device_put(x, NamedSharding(mesh_of("grid", AxisType.Auto), spec))
        for role, x in tree.items()
    }
    for title, function, given in (
        ("shard_map over an Explicit mesh", jax.jit(by_hand), tree),
        ("shard_map over depth only, the rest Auto", jax.jit(manual_depth), bare),
        ("outside of jit", update, tree),
    ):
        try:
            out = function(given)
            assert out["kernel"].sharding.is_equivalent_to(given["kernel"].sharding, 3)
            got = {role: np.asarray(x) for role, x in out.items()}
            oracle.assert_blocks_close(oracle.unstacked(got), want)
            wrong[title] = ""
        except Exception as error:
            wrong[title] = message(error)
    return wrong


def each_layer():
    """`per_layer` and `scale_over_depth` on meshes of both kinds, and by stages."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": ((8, 4, 6), P("stage", "model")), "bias": ((8, 6), P("stage"))}
    shapes["scale"] = ((8, 4), P("stage", "model"))
    tree = {
        "layers": {
            n: rng.normal(size=s).astype("float32") for n, (s, _) in shapes.items()
        },
        "head": rng.normal(size=(4, 3)).astype("float32"),
    }
    specs_of_all = {
        "layers": {n: spec for n, (_, spec) in shapes.items()},
        "head": P(),
    }
    depth = gs.scanned("layers/")
    transformations = {
        "adam": gs.per_layer(optax.adam(0.1), depth),
        "lamb": gs.per_layer(optax.lamb(0.1), depth),
        "adafactor": gs.per_layer(
            optax.adafactor(0.1, min_dim_size_to_factor=2), depth
        ),
        "clip": gs.per_layer(optax.clip_by_global_norm(0.5), depth),
        "decay": gs.scale_over_depth(depth, gs.layer_wise_decay(0.5), rest="first"),
    }

    def check(got, want):
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)

    def on_mesh(tx, kind, want):
        mesh, specs = mesh_of("grid", kind), {**specs_of_all}
        if kind == AxisType.Explicit:  # of one role the layers are not split
            specs["layers"] = specs["layers"] | {"scale": P(None, "model")}
        with jax.set_mesh(mesh):
            params = jax.tree.map(
                lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
                tree,
                specs,
            )
            state = tx.init(params)
            for moments in optax.tree_utils.tree_get_all_with_path(state, "mu"):
                for a, b in zip(
                    *map(jax.tree.leaves, (moments[1], params)), strict=True
                ):
                    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            updates, state = jax.jit(tx.update)(params, state, params)
            updates, _ = jax.jit(tx.update)(params, state, params)
        for a, b in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        check(updates, want)

    def by_stages(tx, want):
        def update(params):
            _, state = tx.update(params, tx.init(params), params)
            return tx.update(params, state, params)[0]

        split = {"layers": dict.fromkeys(shapes, P("stage")), "head": P()}
        mapped = jax.jit(
            jax.shard_map(
                update, mesh=meshes()["line"], in_specs=(split,), out_specs=split
            )
        )
        text = mapped.lower(tree).compile().as_text()
        assert not re.search(r"all-(?:reduce|gather)|collective|all-to-all", text)
        check(mapped(tree), want)

    results = {}
    for name, tx in transformations.items():
        state = tx.update(tree, tx.init(tree), tree)[1]
        want = tx.update(tree, state, tree)[0]
        kinds = {
            "Auto": functools.partial(on_mesh, tx, AxisType.Auto, want),
            "Explicit": functools.partial(on_mesh, tx, AxisType.Explicit, want),
        }
        if name != "decay":  # its L is that of the whole stack
            kinds["stages"] = functools.partial(by_stages, tx, want)
        for kind, case in kinds.items():
            try:
                case()
                results[f"{name}: {kind}"] = ""
            except Exception as error:
                results[f"{name}: {kind}"] = message(error)
    return results


def one_by_one():
    cases = [*layouts(), *circulars(), *others(), *not_a_number()]
    named = dict(cases)
    assert len(named) == len(cases)
    return outcomes(named)


GROUPS = {
    "operators on a line": lambda: outcomes(dict(operators("line"))),
    "operators on a grid": lambda: outcomes(dict(operators("grid"))),
    "layouts": one_by_one,
    "each layer": each_layer,
    "optimizers": lambda: {**optimizers(), **pmapped()},
    "compiled": lambda: {**compiled(), **auto_moves(), **explicit_by_hand()},
    "auto": lambda: {
        **jitted("grid", AxisType.Auto),
        **jitted("line", AxisType.Auto),
    },
    "diagnostics": lambda: {
        **{f"Auto: {k}": v for k, v in diagnosed("grid", AxisType.Auto).items()},
        **{
            f"Explicit: {k}": v for k, v in diagnosed("grid", AxisType.Explicit).items()
        },
    },
    "explicit": lambda: {
        **jitted("grid", AxisType.Explicit),
        **jitted("line", AxisType.Explicit),
    },
}

if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(GROUPS[sys.argv[1]]()))
