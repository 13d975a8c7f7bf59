"""Updates split over six devices, each held against plain loops.

The number of devices is fixed when jax starts, so `python devices.py GROUP` runs a
group of cases in a process of its own. It prints, as the last line, JSON: for every
case what went wrong, "" if nothing did. Most of the time is compiling: all cases of a
group that share a mesh are one program.
"""

import functools
import itertools
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from operator_table import VARIANTS
from split import (
    ALPHA,
    BANDED,
    MODEL,
    NUMBERED,
    OPERATORS,
    STAGES,
    WIDE,
    circular,
    expected,
    leaf_per_layer,
    make_blocks,
    mixed,
    scanned,
)

import gradsmooth_optax as gs


def mesh_of(kind=AxisType.Auto):
    devices = np.array(jax.devices()).reshape(STAGES, MODEL, 1)
    return Mesh(devices, ("stage", "model", "single"), axis_types=(kind,) * 3)


def set_mesh(mesh):
    """By the name that this version of jax has for it."""
    enter = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    return enter(mesh)


def message(error):
    """The error and the line of the library that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames]
    at = [f for f in ours if f.startswith("_")]
    return f"{type(error).__name__}: {str(error)[:600]} ({', '.join(at)})"


def went_wrong(check, *args):
    try:
        check(*args)
        return ""
    except Exception as error:  # One case must not hide the others.
        return message(error)


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def step(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


# -- By hand: inside of `shard_map` ----------------------------------------------------


class Case(NamedTuple):
    tx: Callable  # alpha -> transformation
    tree: Any  # of whole arrays
    specs: Any  # how they are split
    check: Callable  # the new tree -> None, or raises
    check_vma: bool = True


def case(layout, name="window", variant="standard", norm_scope="param", **options):
    """An operator on a layout, with keywords of the transformation and of this."""
    ranked, traced = options.pop("ranked", False), options.pop("traced", True)
    check_vma = options.pop("check_vma", True)
    options.setdefault("axis_name", "stage")

    def tx(alpha):
        operator = OPERATORS[name].make(alpha if traced else ALPHA)
        depth = gs.ranked(layout.depth) if ranked else layout.depth
        options["variant"], options["norm_scope"] = variant, norm_scope
        return gs.smooth_over_depth(depth, operator, **options)

    def check(tree):
        parts = [layout.blocks]
        if options.get("axis_boundary") == "stage":  # each stage on its own
            n = layout.per_stage
            cuts = range(0, len(layout.blocks), n)
            parts = [layout.blocks[i : i + n] for i in cuts]
        loops = functools.partial(
            expected, name, variant=variant, norm_scope=norm_scope, ranked=ranked
        )
        want = [block for part in parts for block in loops(part)]
        oracle.assert_blocks_close(layout.blocks_of(tree), want)

    return Case(tx, layout.tree, layout.specs, check, check_vma)


BLOCKWISE = ("similarity per block", "a user's own that looks at norms")


def operators():
    """Every banded operator in a variant, and all variants of some."""
    every = ("window", "similarity per block")
    rows = [
        (name, how)
        for i, name in enumerate(BANDED)
        for j, how in enumerate(VARIANTS)
        if (j - 2 * i) % 5 == 0 or name in every
    ]
    for k, (name, (variant, norm_scope)) in enumerate(rows):
        axis, is_split, check_vma = k % 3, k % 4 < 2, k % 5 != 1
        dtype = "bfloat16" if k % 7 == 1 else "float32"
        zero = k % 3 != 1  # Without a layer of zeros norms are summed once.
        # A role of several axes, also split over another mesh axis; and one that is
        # not. Without `check_vma` it cannot be told that it is not.
        blockwise = norm_scope == "block" or name in BLOCKWISE
        shapes = {"kernel": (1, 4)} | ({"bias": (4,)} if blockwise else {})
        blocks, specs = make_blocks(9, shapes, dtype, zero=zero), {}
        for role, rank in ((role, len(shape) + 1) for role, shape in shapes.items()):
            names = [None] * rank
            names[min(axis, rank - 1)] = "stage"
            if is_split and (role == "kernel" or not check_vma):
                names[max(i for i in range(rank) if names[i] is None)] = "model"
            specs[role] = P(*names)
        options = {"norm_axis_names": ("model",)} if is_split else {}
        title = f"{name}, {variant} per {norm_scope}, axis {axis}, {dtype}"
        layout = scanned(blocks, axis, specs)
        options |= {"traced": k % 2 == 0, "check_vma": check_vma}
        yield title, case(layout, name, variant, norm_scope, **options)


def layouts():
    """How layers lie in leaves."""
    blocks = make_blocks(9, {"kernel": (4,)})
    wide = ("window of radius 2", "norm_preserving", "block")
    directional = ("window", "directional", "block")
    yield "a leaf per layer", case(leaf_per_layer(blocks), *directional)
    yield "mixed leaves", case(mixed(blocks), *wide)
    one = scanned(make_blocks(3, {"kernel": (4,)}), per_stage=1)
    yield "one layer per stage", case(one, *directional)
    single = scanned(blocks, specs=P("single"))
    yield "one stage", case(single, *wide, axis_name="single")
    yield "one stage, ema", case(single, "ema", axis_name="single")

    # A role that every second of three layers lacks, so that all its pairs are across
    # stages; one that only the first has, which has no neighbors unless ranked.
    blocks = make_blocks(9)
    some, lone = (
        leaf_per_layer(
            [
                {r: x for r, x in block.items() if r == "kernel" or has(i % 3)}
                for i, block in enumerate(blocks)
            ]
        )
        for has in (lambda i: i != 1, lambda i: i == 0)
    )
    rows = [(some, wide), (some, directional), (lone, ("window",))]
    rows += [(some, (f"similarity per {scope}",)) for scope in ("param", "block")]
    for ranked in (False, True):
        for i, (layout, how) in enumerate(rows):
            title = f"roles of some layers {i}{', ranked' * ranked}, {how[0]}"
            yield title, case(layout, *how, strict=False, ranked=ranked)

    for i, (repeats, per_stage, order) in enumerate(
        [(2, 2, "rsl"), (3, 2, "srl"), (2, 3, "lrs"), (3, 1, "rsl"), (1, 2, "rsl")]
    ):
        how = wide if per_stage > 1 and i % 2 == 0 else directional
        layout = circular(repeats, per_stage, order, shapes={"kernel": (4,)})
        yield f"{repeats} rounds of {per_stage} layers, {order}", case(layout, *how)
    layout = circular(2, 4, "rsl", 1, {"kernel": (4,)}, "single")
    yield "rounds of one stage", case(layout, *wide, axis_name="single")

    # Stages that are not coupled: also what is not banded.
    blocks = make_blocks(9, {"kernel": (4,)})
    for name, variant in (
        ("decaying window", "norm_preserving"),
        ("similarity per block", "standard"),
        ("laplacian", "directional"),
        ("ema", "standard"),
    ):
        alone = case(scanned(blocks), name, variant, "block", axis_boundary="stage")
        yield f"stages not coupled, {name}", alone
    layout = circular(2, 2, "rsl", shapes={"kernel": (4,)})
    yield "stages not coupled, circular", case(layout, axis_boundary="stage")


def others():
    # Two stacks of different depth, and a leaf that is in none.
    long, short = make_blocks(9, seed=1), make_blocks(3, seed=2)

    def two(path, leaf):
        return None if path[0] == "head" else gs.Depth(path[0], path[1], axis=0)

    head = np.arange(3.0, dtype="float32")
    tree = {"long": oracle.stacked_tree(long), "short": oracle.stacked_tree(short)}

    def tx(alpha):
        return gs.smooth_over_depth(two, alpha, axis_name="stage")

    def check(tree):
        np.testing.assert_array_equal(tree["head"], head)
        for name, blocks in {"long": long, "short": short}.items():
            got = oracle.unstacked(tree[name])
            oracle.assert_blocks_close(got, expected("window", blocks))

    specs = {"long": P("stage"), "short": P("stage"), "head": P()}
    yield "two stacks", Case(tx, {**tree, "head": head}, specs, check)

    # Without `norm_axis_names` norms are of each device's part alone. Where some are 0
    # these are summed again: no device may wait for others that do not.
    blocks = make_blocks(9, {"kernel": (2, 4), "bias": (4,)}, zero=False)
    blocks[4] = {r: x * np.float32([0, 0, 1, 1]) for r, x in blocks[4].items()}
    halves = [
        [{r: x[..., h] for r, x in b.items()} for b in blocks]
        for h in np.r_[:4].reshape(2, 2)
    ]
    specs = {"kernel": P("stage", None, "model"), "bias": P("stage", "model")}
    layout = scanned(blocks, specs=specs)
    for check_vma in (True, False):
        how = ("window", "norm_preserving", "block")
        one = case(layout, *how, check_vma=check_vma)

        def check_halves(tree, how=how):
            want = [expected(how[0], half, *how[1:]) for half in halves]
            joined = [
                {r: np.concatenate([a[r], b[r]], -1) for r in a}
                for a, b in zip(*want, strict=True)
            ]
            oracle.assert_blocks_close(oracle.unstacked(tree), joined)

        yield f"norms of a part, {check_vma}", one._replace(check=check_halves)

    # Only the norms need a mesh axis: depth is whole on every device.
    specs = {"kernel": P(None, None, "model"), "bias": P(None, "model")}
    options = {"axis_name": None, "norm_axis_names": ("model",)}
    whole = scanned(blocks, specs=specs)
    yield (
        "norm_axis_names alone",
        case(whole, "window", "directional", "block", **options),
    )

    # A NaN reaches the neighbors, across stages, and does not wrap around.
    line = scanned(make_blocks(9, dict.fromkeys("abc", (2,))))
    rounds = circular(2, 2, "srl", shapes=dict.fromkeys("abc", (2,)))
    for layout, places, name in (
        (line, (5, 8, 0), "window of radius 2"),
        (rounds, (5, 11, 1), "gaussian"),
    ):
        spoiled = [dict(block) for block in layout.blocks]
        for role, layer in zip("abc", places, strict=True):
            spoiled[layer][role] = np.full(2, np.nan, "float32")
        whole = oracle.stacked_tree(spoiled)
        tree = {
            role: np.where(
                np.isin(x, layout.blocks[layer][role]), np.float32(np.nan), x
            )
            for (role, x), layer in zip(layout.tree.items(), places, strict=True)
        }

        def check_nan(tree, layout=layout, places=places, name=name):
            got = layout.blocks_of(tree)
            want = expected(name, layout.blocks)
            for role, layer in zip("abc", places, strict=True):
                for i, block in enumerate(want):
                    near = abs(i - layer) <= 2
                    np.testing.assert_allclose(
                        got[i][role], np.nan if near else block[role], 1e-5, 1e-6
                    )

        one = case(layout, name)
        yield f"NaN, {places}", one._replace(tree=tree, check=check_nan)

    # Transformations of other kinds see their own layers alone.
    tree = {"layers": oracle.stacked_tree(make_blocks(9)), "head": head}
    specs = {"layers": P("stage"), "head": P()}
    tx = gs.per_layer(optax.lamb(0.1), gs.scanned("layers/"))

    def check_lamb(got):
        params = jax.tree.map(jnp.asarray, tree)
        assert_close(got, jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params))

    def with_params(alpha):
        return optax.GradientTransformation(
            tx.init, lambda updates, state, _=None: tx.update(updates, state, updates)
        )

    yield "per_layer", Case(with_params, tree, specs, check_lamb)


def smoothed_by_hand(cases):
    """All cases as one program."""
    mesh, errors = mesh_of(), {}

    @jax.jit
    def apply(trees, alpha):
        results = {}
        for name, one in cases.items():

            def update(tree, alpha, one=one):
                return step(one.tx(alpha), tree)

            split = jax.shard_map(
                update,
                mesh=mesh,
                in_specs=(one.specs, P()),
                out_specs=one.specs,
                check_vma=one.check_vma,
            )
            try:
                results[name] = split(trees[name], alpha)
            except Exception as error:
                errors[name] = message(error)
        return results

    trees = {name: one.tree for name, one in cases.items()}
    results = jax.device_get(apply(trees, jnp.float32(ALPHA)))

    def check(name):
        for got, given in zip(
            *map(jax.tree.leaves, (results[name], trees[name])), strict=True
        ):
            assert (got.shape, got.dtype) == (given.shape, given.dtype)
        cases[name].check(results[name])

    return {name: errors.get(name) or went_wrong(check, name) for name in cases}


# Whole optimizers.

STEPS = 3


def make_optimizers(axis_name):
    depth = gs.first_match(gs.scanned("blocks/"), NUMBERED)
    schedule = optax.linear_schedule(0.375, 0.0, STEPS)

    def smooth(operator=0.3, **kwargs):
        return gs.smooth_over_depth(depth, operator, axis_name=axis_name, **kwargs)

    def of_alpha(learning_rate, alpha):
        tx = gs.with_depth_smoothing(optax.trace(0.9), smooth(alpha))
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    in_blocks = {"variant": "norm_preserving", "norm_scope": "block"}
    return {
        "adamw": gs.adamw(
            0.1, smooth(gs.window(schedule, 2), **in_blocks), weight_decay=0.1
        ),
        "muon": gs.muon(0.1, depth, smooth(schedule), ns_steps=1, weight_decay=0.1),
        "injected": optax.inject_hyperparams(of_alpha)(0.1, 0.3),
    }


def trained(tx, params, state):
    def one_step(carry, number):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p * (3 + number)), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(one_step, (params, state), jnp.arange(STEPS))[0]


def optimizers():
    """Whole optimizers inside of `shard_map` train as they do on whole arrays."""
    params = {
        "blocks": oracle.stacked_tree(make_blocks(9, {"kernel": (4, 3), "bias": (3,)})),
        **leaf_per_layer(make_blocks(9, {"kernel": (4, 3)}, seed=6)).tree,
        "head": np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3),
    }

    def specs_of(tree):
        return jax.tree.map(
            lambda x: P("stage") if x.ndim > 1 and x.shape[0] in (3, 9) else P(), tree
        )

    @jax.jit
    def apart(params):
        results = {}
        for name, tx in make_optimizers("stage").items():
            state = tx.init(params)  # Of whole arrays.
            specs = specs_of(params), specs_of(state)
            split = functools.partial(jax.shard_map, mesh=mesh_of(), out_specs=specs)
            # And of those of a stage.
            inside = split(lambda p, tx=tx: (p, tx.init(p)), in_specs=specs[:1])
            train = split(functools.partial(trained, tx), in_specs=specs)
            results[name] = inside(params), train(params, state)
        return results

    @jax.jit
    def together(params):
        results = {}
        for name, tx in make_optimizers(None).items():
            state = tx.init(params)
            results[name] = (params, state), trained(tx, params, state)
        return results

    got, want = jax.device_get((apart(params), together(params)))
    return {name: went_wrong(assert_close, got[name], want[name]) for name in want}


def pmapped():
    """`jax.pmap`, each stage's layers along the mapped axis."""
    blocks = make_blocks(6)
    options = {"variant": "norm_preserving", "axis_name": "stage"}
    tx = gs.smooth_over_depth(gs.scanned("^"), gs.window(ALPHA, 2), **options)

    def check():
        stacked = oracle.stacked_tree(blocks)
        tree = {r: x.reshape(3, 2, *x.shape[1:]) for r, x in stacked.items()}
        pmap = jax.pmap(functools.partial(step, tx), "stage", devices=jax.devices()[:3])
        got = {r: np.reshape(x, stacked[r].shape) for r, x in pmap(tree).items()}
        want = expected("window of radius 2", blocks, "norm_preserving")
        oracle.assert_blocks_close(oracle.unstacked(got), want)

    return {"pmap": went_wrong(check)}


def by_hand():
    rows = [*operators(), *layouts(), *others()]
    assert len(dict(rows)) == len(rows)
    return {**smoothed_by_hand(dict(rows)), **optimizers(), **pmapped()}


# -- By the compiler: under `jit`, with an Auto or an Explicit mesh --------------------

LAYERS = 12
WAYS = {
    "depth": P("stage"),
    "inner": P(None, None, "model"),
    "both": P("stage", None, "model"),
    "double": P(("stage", "model")),
    "across": P(None, None, "stage"),
    "none": P(),
}


class Whole(NamedTuple):
    """A function of a tree of whole arrays, which the compiler splits."""

    function: Callable
    tree: Any
    specs: Any  # one for each leaf
    check: Callable | None = None  # the result -> None; else as on one device
    keeps: bool = True  # whether results are split as the tree is


def whole(roles, name="window", variant="standard", norm_scope="param", **options):
    """An operator on roles that are split each in its own way."""
    traced, keeps = options.pop("traced", True), options.pop("keeps", True)
    blocks = make_blocks(LAYERS, dict.fromkeys(roles, (2, 6)))
    layout = scanned(blocks, specs={role: WAYS[role] for role in roles})

    def function(tree, alpha):
        operator = OPERATORS[name].make(alpha if traced else ALPHA)
        options = {"variant": variant, "norm_scope": norm_scope}
        return step(gs.smooth_over_depth(gs.scanned("^"), operator, **options), tree)

    def check(tree):
        want = expected(name, blocks, variant, norm_scope)
        oracle.assert_blocks_close(oracle.unstacked(tree), want)

    return Whole(function, layout.tree, layout.specs, check, keeps)


def banded():
    for i, name in enumerate(("window", "skewed", "similarity per block")):
        for j, how in enumerate(VARIANTS):
            if j % 3 == i or name == "window":
                one = whole(["depth", "both"], name, *how, traced=i % 2)
                yield f"{name}, {how}", one
    yield "depth on one device", whole(["inner"], "window", *VARIANTS[2])


def others_by_the_compiler():
    for i, name in enumerate(WIDE):
        yield name, whole(["depth", "both"], name, *VARIANTS[i], traced=i % 2)
        yield f"{name}, inner", whole(["inner", "across"], name, *VARIANTS[-i])
    # Roles of a block that are split each in its own way.
    some = ["depth", "double", "inner", "none"]
    for name in ("window", "similarity per block", "tikhonov"):
        one = whole(some, name, keeps=name != "tikhonov")
        yield f"each in its own way, {name}", one
    for pair in itertools.combinations(some, 2):
        yield f"{pair}", whole(pair, "window", "norm_preserving", "block")
    yield "across", whole(["depth", "across"], *("window", "directional", "block"))

    # Several stacked leaves in one matmul.
    parts = oracle.stacked_tree(make_blocks(LAYERS, dict.fromkeys("01", (2, 6))))
    cycle = gs.scanned(r"(\d)/", stride=2, stack="all")
    for way in ("depth", "both"):
        tree = {i: {"w": x} for i, x in parts.items()}
        tx = gs.smooth_over_depth(cycle, gs.tikhonov(1.0))
        specs = jax.tree.map(lambda x, way=way: WAYS[way], tree)
        yield f"cycle, {way}", Whole(lambda u, _, tx=tx: step(tx, u), tree, specs)

    # One leaf per layer; diagnostics; and what is done layer by layer.
    blocks = make_blocks(LAYERS, dict.fromkeys(("depth", "both"), (2, 6)))
    stacked = {"blocks": oracle.stacked_tree(blocks)}
    listed = {str(i): block for i, block in enumerate(blocks)}
    split = {"blocks": {role: WAYS[role] for role in stacked["blocks"]}}
    inside = jax.tree.map(lambda x: P(None, "model"), listed)
    for depth, tree, specs in (
        (gs.scanned("blocks/"), stacked, split),
        (gs.unrolled(r"(\d+)/"), listed, inside),
    ):
        smoothing = gs.smooth_over_depth(depth, ALPHA)
        monitor = gs.diagnostics.monitor_depth(smoothing, depth)

        def look(tree, _, depth=depth, monitor=monitor):
            statistics = gs.diagnostics.depth_statistics(tree, depth)
            matrix = gs.diagnostics.cosine_matrix(tree, depth)
            _, state = monitor.update(tree, monitor.init(tree))
            return statistics, matrix, gs.diagnostics.monitored(state)

        yield f"diagnostics, {depth}", Whole(look, tree, specs, keeps=False)
    scanned_depth = gs.scanned("blocks/")
    for name, tx in {
        "lamb": gs.per_layer(optax.lamb(0.1), scanned_depth),
        "adafactor": gs.per_layer(
            optax.adafactor(0.1, min_dim_size_to_factor=2), scanned_depth
        ),
        "scale": gs.scale_over_depth(scanned_depth, gs.layer_wise_decay(0.5)),
    }.items():

        def twice(params, _, tx=tx):
            _, state = tx.update(params, tx.init(params), params)
            return tx.update(params, state, params)[0]

        yield f"{name} per layer", Whole(twice, stacked, split)


def explicit():
    for name, how in (
        ("window of radius 2", VARIANTS[2]),
        ("similarity per block", VARIANTS[3]),
        ("tikhonov", VARIANTS[4]),
    ):
        yield name, whole(["depth", "inner", "both"], name, *how)


def by_compiler(cases, kind=AxisType.Auto, at_most=None):
    """All cases as one program, and on one device as another one.

    Between devices no array of more than `at_most` numbers may move, but for halos.
    """
    mesh = mesh_of(kind)
    trees = {name: one.tree for name, one in cases.items()}
    shardings = {
        name: jax.tree.map(lambda x: NamedSharding(mesh, x), one.specs)
        for name, one in cases.items()
    }
    split, alpha = jax.device_put(trees, shardings), jnp.float32(ALPHA)
    errors = {}

    def apply(trees, alpha):
        results = {}
        for name, tree in trees.items():
            try:
                results[name] = cases[name].function(tree, alpha)
            except Exception as error:
                errors[name] = message(error)
        return results

    program = jax.jit(apply).lower(split, alpha).compile()
    results = program(split, alpha)
    untold = {n: trees[n] for n, one in cases.items() if one.check is None}
    want = jax.jit(apply)(untold, alpha) if untold else {}

    def check(name):
        result, one = results[name], cases[name]
        if one.keeps:
            for x, given in zip(
                *map(jax.tree.leaves, (result, split[name])), strict=True
            ):
                assert x.sharding.is_equivalent_to(given.sharding, x.ndim), x.sharding
        got = jax.device_get(result)
        if one.check is None:
            assert_close(got, jax.device_get(want[name]))
        else:
            one.check(got)

    if at_most is not None:
        text = program.as_text().splitlines()
        large = [line for line in text if moves_many(line, at_most)]
        errors["what moves"] = "\n".join(large[:9])
    done = {name: errors.get(name) or went_wrong(check, name) for name in cases}
    return {**errors, **done}


MOVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)


def moves_many(line, many):
    """Whether a line of the text moves more numbers than `many`, but for halos."""
    kinds = "|".join(kind for kind in MOVES if kind != "collective-permute")
    found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
    shapes = re.findall(r"\w+\[([\d,]+)\]", found[1]) if found else []
    return any(np.prod([int(n) for n in shape.split(",")]) > many for shape in shapes)


def counted():
    """How often which collective is in a compiled program."""
    spec = P("stage", None, "model")
    sharding = NamedSharding(mesh_of(), spec)
    leaf = jax.ShapeDtypeStruct((9, 2, 4), "float32", sharding=sharding)
    by_hand = functools.partial(
        jax.shard_map, mesh=mesh_of(), in_specs=(spec,), out_specs=spec
    )
    results = {}
    for title, wrap, operator, roles, halos in (
        # The compiler's halos are one exchange per shifted copy.
        ("jit", lambda f: f, gs.window(0.3), "a", 2),
        ("jit, radius 3", lambda f: f, gs.window(0.3, 3), "a", 6),
        ("shard_map, radius 3", by_hand, gs.window(0.3, 3), "ab", 4),
    ):
        axis_name = None if wrap is not by_hand else "stage"
        tx = gs.smooth_over_depth(gs.scanned("^"), operator, axis_name=axis_name)
        update = jax.jit(wrap(functools.partial(step, tx)))
        text = update.lower(dict.fromkeys(roles, leaf)).compile().as_text()
        found = {
            kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in MOVES
        }
        found = {kind: count for kind, count in found.items() if count}
        results[title] = "" if found == {"collective-permute": halos} else f"{found}"
    return results


def other_programs():
    """`shard_map` where other axes are left to the compiler, and single calls."""
    blocks = make_blocks(9, {"kernel": (2, 4)})
    spec = P("stage", None, "model")
    explicit_mesh, auto_mesh = mesh_of(AxisType.Explicit), mesh_of()

    def update(tree, **kwargs):
        operator, variant = gs.window(ALPHA, radius=2), "norm_preserving"
        tx = gs.smooth_over_depth(gs.scanned("^"), operator, variant=variant, **kwargs)
        return step(tx, tree)

    summed = functools.partial(update, axis_name="stage", norm_axis_names=("model",))
    by_hand = jax.shard_map(summed, mesh=explicit_mesh, in_specs=spec, out_specs=spec)
    depth_only = jax.shard_map(
        functools.partial(update, axis_name="stage"),
        mesh=auto_mesh,
        in_specs=P("stage"),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def check(function, mesh):
        sharding = NamedSharding(mesh, spec)
        out = function(jax.device_put(oracle.stacked_tree(blocks), sharding))
        assert out["kernel"].sharding.is_equivalent_to(sharding, 3)
        want = expected("window of radius 2", blocks, "norm_preserving")
        oracle.assert_blocks_close(oracle.unstacked(jax.device_get(out)), want)

    def states():
        """Moments of each layer are split as its parameters are."""
        params = jax.device_put(
            oracle.stacked_tree(blocks), NamedSharding(explicit_mesh, spec)
        )
        with set_mesh(explicit_mesh):
            state = gs.per_layer(optax.adam(0.1), gs.scanned("^")).init(params)
        ((_, moments),) = optax.tree_utils.tree_get_all_with_path(state, "mu")
        kernel = params["kernel"]
        for x in jax.tree.leaves(moments):
            assert x.sharding.is_equivalent_to(kernel.sharding, x.ndim), x.sharding

    return {
        "shard_map over an Explicit mesh": went_wrong(
            check, jax.jit(by_hand), explicit_mesh
        ),
        "shard_map over depth only, the rest Auto": went_wrong(
            check, jax.jit(depth_only), auto_mesh
        ),
        "outside of jit": went_wrong(check, update, explicit_mesh),
        "states": went_wrong(states),
    }


def by_the_compiler():
    return {
        **by_compiler(dict(banded()), at_most=LAYERS),
        **by_compiler(dict(others_by_the_compiler())),
        **by_compiler(dict(explicit()), AxisType.Explicit),
        **counted(),
        **other_programs(),
    }


GROUPS = {"by hand": by_hand, "by the compiler": by_the_compiler}

if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(GROUPS[sys.argv[1]]()))
