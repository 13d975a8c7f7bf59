"""Depth that is split over devices: `shard_map`, `pmap`, Auto and Explicit meshes.

What needs devices runs in processes of its own, see `sharded_cases`. Messages, and what
is asked to move between devices, are already known where a program is traced.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_cases
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import gradsmooth_optax as gs

SCANNED = gs.scanned("^")

# Values.


@pytest.mark.parametrize(
    "group",
    [
        # What versions of jax break first.
        pytest.param(group, marks=[pytest.mark.core] * (group in ("auto", "explicit")))
        for group in sharded_cases.GROUPS
    ],
)
def test_on_eight_devices_it_is_what_it_is_on_one(group):
    wrong, number = sharded_cases.run(group)
    assert number >= 10
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


# What is traced.


def mesh_of(**sizes):
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


LINE, GRID = mesh_of(stage=8), mesh_of(stage=4, model=2)


def leaf(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


SPLIT = P("stage")


def traced(tx, tree, specs=SPLIT, mesh=LINE, out_specs=None, check_vma=True):
    """The equations of an update inside of `shard_map`."""
    update = jax.shard_map(
        lambda updates: tx.update(updates, tx.init(updates))[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs if out_specs is None else out_specs,
        check_vma=check_vma,
    )
    return list(equations(jax.make_jaxpr(update)(tree).jaxpr))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


COLLECTIVES = ("ppermute", "psum", "pmax", "pmin", "all_", "reduce_", "pgather", "pbro")
LOCAL = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"),
    "reduce_precision",
)


def is_agreement(one):
    """Whether some layer, on any device, is so large or small that all sum again."""
    kind, _, dtype, shape = one
    return (kind, dtype, shape) == ("psum", "int32", ())


def moved(equations):
    """(primitive, mesh axes, dtype, shape) of all that moves between devices."""
    result = []
    for equation in equations:
        name = equation.primitive.name
        if name.startswith(COLLECTIVES) and name not in LOCAL:
            axes = equation.params.get("axes", equation.params.get("axis_name"))
            axes = axes if isinstance(axes, tuple) else (axes,)
            kind = "psum" if name.startswith("psum") else name
            for x in equation.invars:
                result.append((kind, axes, str(x.aval.dtype), x.aval.shape))
    return result


def over_stages(operator=None, **kwargs):
    operator = gs.window(0.3) if operator is None else operator
    return gs.smooth_over_depth(SCANNED, operator, **{"axis_name": "stage", **kwargs})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_a_window_sends_its_radius_of_layers_in_each_direction(radius, dtype):
    tree = {"w": leaf(24, 2, 5, dtype=dtype), "b": leaf(24, 7, dtype=dtype)}
    found = moved(traced(over_stages(gs.window(0.3, radius)), tree))
    halos = [(radius, 2, 5), (radius, 7)]
    one = [("ppermute", ("stage",), dtype, halo) for halo in halos]
    assert collections.Counter(found) == collections.Counter(2 * one)


def test_the_two_directions_do_not_wait_for_one_another():
    eqns = traced(over_stages(gs.window(0.3, 2)), {"w": leaf(24, 3)})
    halos = [e for e in eqns if e.primitive.name == "ppermute"]
    forward = tuple((i, i + 1) for i in range(7))
    backward = tuple((i + 1, i) for i in range(7))
    permutations = {tuple(map(tuple, e.params["perm"])) for e in halos}
    assert permutations == {forward, backward}
    # What is sent is cut from the input.
    makers = {v: e for e in eqns for v in e.outvars}

    def sources(variable):
        maker = makers.get(variable)
        if maker is None:
            return set()
        inputs = [v for v in maker.invars if not hasattr(v, "val")]
        return {maker.primitive.name}.union(*map(sources, inputs))

    for halo in halos:
        assert "ppermute" not in sources(halo.invars[0])


def test_a_halo_is_sent_on_whichever_axis_depth_is():
    def depth(path, leaf):
        return gs.Depth("blocks", "w", axis=2)

    tx = gs.smooth_over_depth(depth, gs.window(0.3, radius=2), axis_name="stage")
    found = moved(traced(tx, {"w": leaf(3, 4, 24)}, P(None, None, "stage")))
    assert found == [("ppermute", ("stage",), "float32", (3, 4, 2))] * 2


@pytest.mark.parametrize("norm_scope", ["param", "block"])
@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_norms_need_no_sum_over_depth_and_one_over_other_axes_if_asked(
    variant, norm_scope, check_vma
):
    tree = {"w": leaf(8, 2, 6), "b": leaf(8, 4)}
    specs = {"w": P("stage", None, "model"), "b": P("stage", "model")}
    kwargs = {"variant": variant, "norm_scope": norm_scope}

    def kinds(**more):
        tx = over_stages(**kwargs, **more)
        eqns = traced(tx, tree, specs, GRID, check_vma=check_vma)
        return {one[:2] for one in moved(eqns) if not is_agreement(one)}

    halo, norms = ("ppermute", ("stage",)), ("psum", ("model",))
    assert kinds() == {halo}
    assert kinds(norm_axis_names=("model",)) == {halo, norms}


def test_a_leaf_that_is_not_split_is_not_summed_over():
    tx = over_stages(variant="norm_preserving", norm_axis_names=("model",))
    found = moved(traced(tx, {"w": leaf(8, 6)}, P("stage"), GRID))
    assert {one[0] for one in found if not is_agreement(one)} == {"ppermute"}


@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
def test_stages_that_are_not_coupled_send_nothing(variant):
    tx = over_stages(gs.window(0.3, 2), axis_boundary="stage", variant=variant)
    assert moved(traced(tx, {"w": leaf(24, 3)})) == []


@pytest.mark.parametrize("norm_scope", ["param", "block"])
def test_similarity_needs_no_sum_over_depth(norm_scope):
    tx = over_stages(gs.similarity_window(0.3, norm_scope))
    found = moved(traced(tx, {"w": leaf(24, 3), "b": leaf(24, 2)}))
    kinds = {one[:2] for one in found if not is_agreement(one)}
    assert kinds == {("ppermute", ("stage",))}


# Structure.

INIT = {
    "adamw": lambda: gs.adamw(0.1, over_stages()),
    "momentum": lambda: gs.with_depth_smoothing(optax.trace(0.9), over_stages()),
    "muon": lambda: gs.muon(0.1, SCANNED, over_stages()),
    "schedule": lambda: gs.smooth_over_depth(
        SCANNED, lambda count: 0.1, axis_name="stage"
    ),
    "similarity": lambda: over_stages(gs.similarity_window(0.3)),
}


@pytest.mark.parametrize("name", INIT)
def test_init_takes_whole_arrays_and_those_of_a_stage_and_needs_no_axis(name):
    tx = INIT[name]()
    for num_layers in (24, 3):
        params = {"w": jnp.ones((num_layers, 4, 2))}
        state = tx.init(params)
        shapes = {x.shape for x in jax.tree.leaves(state) if x.ndim == 3}
        assert shapes <= {(num_layers, 4, 2)}
    inside = jax.shard_map(
        tx.init,
        mesh=LINE,
        in_specs=P("stage"),
        out_specs=jax.tree.map(lambda x: P("stage") if x.ndim == 3 else P(), state),
    )
    jaxpr = jax.make_jaxpr(inside)({"w": leaf(24, 4, 2)})
    assert moved(equations(jaxpr.jaxpr)) == []
    names = {e.primitive.name for e in equations(jaxpr.jaxpr)}
    assert "axis_index" not in names


def test_whole_arrays_of_a_leaf_per_layer_of_a_stage_are_no_gap_in_init():
    depth = gs.scanned(r"l(\d+)/", stride=3, stack="blocks")
    tx = gs.smooth_over_depth(depth, axis_name="stage")
    for stages in (8, 1):
        tx.init({f"l{i}": {"w": jnp.ones((stages, 2))} for i in range(3)})


# Errors.


def fails(error, words, build):
    with pytest.raises(error) as info:
        build()
    for word in words:
        assert word in str(info.value), str(info.value)


def test_an_axis_that_is_not_bound_is_told():
    tree = {"w": jnp.ones((8, 2))}
    for axis, mesh in (("stage", None), ("pipe", LINE)):
        tx = over_stages(axis_name=axis)
        words = [f"'{axis}'", "not bound", "shard_map", "jit"]
        if mesh is None:
            fails(
                ValueError, words, lambda tx=tx: jax.jit(tx.update)(tree, tx.init(tree))
            )
            fails(ValueError, words, lambda tx=tx: tx.update(tree, tx.init(tree)))
        else:
            fails(ValueError, words, lambda tx=tx: traced(tx, tree))


def test_a_norm_axis_that_is_not_bound_is_told():
    tx = over_stages(variant="norm_preserving", norm_axis_names=("model",))
    words = ["`norm_axis_names`", "'model'", "not bound"]
    fails(ValueError, words, lambda: traced(tx, {"w": leaf(8, 2)}))


@pytest.mark.parametrize(("radius", "layers"), [(4, 24), (2, 8), (3, 16)])
def test_a_radius_wider_than_a_stage_is_told(radius, layers):
    tx = gs.smooth_over_depth(
        gs.scanned("blocks/"), gs.window(0.3, radius=radius), axis_name="stage"
    )
    words = [
        f"reaches {radius} layers",
        "axis_name='stage'",
        f"{layers // 8} layer",
        "stack 'blocks'",
        "role 'w'",
        f"radius={layers // 8}",
    ]
    fails(ValueError, words, lambda: traced(tx, {"blocks": {"w": leaf(layers, 2)}}))


WIDE = {
    "ema": gs.ema(0.5),
    "tikhonov": gs.tikhonov(0.5),
    "mean_over_depth": gs.mean_over_depth(),
    "shuffled": gs.controls.shuffled(gs.window(0.2), 0),
    "dense": gs.dense(np.full((16, 16), 1 / 16)),
    "composed": gs.compose(gs.window(0.2), gs.window(0.3, 2)),
    "repeated": gs.repeat(gs.window(0.2), 3),
    "norm_matched": gs.controls.norm_matched(gs.ema(0.5)),
    "function": gs.operator_fn(lambda n: np.full((n, n), 1 / n)),
}


@pytest.mark.parametrize("name", WIDE)
def test_an_operator_that_reaches_beyond_the_stages_beside_is_told(name):
    tx = over_stages(WIDE[name])
    words = ["axis_name='stage'", "2 layers", "role 'w'", "window(alpha, radius=2)"]
    fails(ValueError, words, lambda: traced(tx, {"w": leaf(16, 2)}))


def test_the_radius_counts_within_a_block_of_a_circular_pipeline():
    depth = gs.depth_fn(
        lambda path, leaf: gs.Depth("b", "w", axis=(0, 1, 2), stride=(16, 2, 1))
    )
    tx = gs.smooth_over_depth(depth, gs.window(0.3, radius=3), axis_name="stage")
    tree = {"w": leaf(2, 8, 2, 3)}
    words = ["reaches 3 layers", "2 layers", "'stage'"]
    fails(ValueError, words, lambda: traced(tx, tree, P(None, "stage")))

    ranked = gs.smooth_over_depth(gs.ranked(depth), 0.3, axis_name="stage")
    words = ["'stage'", "circular", "ranked", "0, 1, 16, 17"]
    fails(ValueError, words, lambda: traced(ranked, tree, P(None, "stage")))


@pytest.mark.parametrize("out_specs", [P(), P("stage")])
def test_a_leaf_that_every_stage_holds_whole_is_told(out_specs):
    # With check_vma=False it cannot be known.
    tree = {"blocks": {"w": leaf(24, 2), "b": leaf(3, 2)}}
    specs = {"blocks": {"w": P("stage"), "b": P()}}
    out_specs = {"blocks": {"w": P("stage"), "b": out_specs}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.3, axis_name="stage")
    words = ["'stage'", "blocks/b"]
    fails(ValueError, words, lambda: traced(tx, tree, specs, out_specs=out_specs))


def test_a_replicated_leaf_that_is_not_matched_passes_through():
    tree = {"blocks": {"w": leaf(24, 2)}, "head": leaf(3, 2)}
    specs = {"blocks": {"w": P("stage")}, "head": P()}
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.3, axis_name="stage")
    assert len(moved(traced(tx, tree, specs))) == 2


def test_several_depth_axes_need_their_strides():
    def depth(path, leaf):
        return gs.Depth("b", path[-1], axis=(0, 1))

    tx = gs.smooth_over_depth(depth, 0.3, axis_name="stage")
    words = ["axis=(0, 1)", "leaf w", "'stage'", "stride="]
    tree = {"w": leaf(2, 8, 3)}
    fails(ValueError, words, lambda: traced(tx, tree, P(None, "stage")))
    # Where the first is split and the rest is a stage's, it can be told.
    assert len(moved(traced(tx, {"w": leaf(8, 2, 3)}))) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_a_gap_in_all_roles_of_a_stage_is_told(strict):
    depth = gs.scanned(r"l(\d+)/", stride=3, stack="blocks")
    tx = gs.smooth_over_depth(depth, 0.3, axis_name="stage", strict=strict)
    tree = {f"l{i}": {"w": leaf(8, 2)} for i in (0, 2)}
    words = ["axis_name='stage'", "layers 0, 2", "'blocks'"]
    fails(ValueError, words, lambda: traced(tx, tree))


PAIR = mesh_of(stage=2)
UNEVEN = {
    # Layers 0, 2, 4 of each half: every second position of a cycle.
    "one position of a cycle": (
        gs.scanned(r"layers_(\d+)/", stride=2),
        {"layers_0": {"w": leaf(6, 3)}},
        P("stage"),
    ),
    # Layer 0 of each half, of which layer 1 is not matched.
    "one position of one cycle": (
        gs.scanned(r"layers_(\d+)/", stride=2),
        {"layers_0": {"w": leaf(2, 3)}},
        P("stage"),
    ),
    # Layer 1 of each stage is frozen.
    "a frozen layer": (
        gs.unrolled(r"layers_(\d+)/"),
        {"layers_0": {"w": leaf(2, 3)}, "layers_2": {"w": leaf(2, 3)}},
        P("stage"),
    ),
    # The stack goes on outside of the pipeline, on all devices.
    "a remainder": (
        gs.first_match(
            gs.scanned("pipe/", stack="all"),
            gs.unrolled(r"rest_(\d+)/", start=2, stack="all"),
        ),
        {"pipe": {"w": leaf(2, 3)}, "rest_0": {"w": leaf(3)}},
        {"pipe": {"w": P("stage")}, "rest_0": {"w": P()}},
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_gaps_that_look_like_the_rounds_of_a_circular_pipeline_are_told(name):
    depth, tree, specs = UNEVEN[name]
    tx = gs.smooth_over_depth(depth, 0.3, axis_name="stage")
    words = ["axis_name='stage'", "cannot be told", "stride"]
    fails(
        ValueError, words, lambda: traced(tx, tree, specs, mesh=PAIR, check_vma=False)
    )


def test_a_gap_is_no_matter_of_other_stages_where_they_are_not_coupled():
    depth = gs.scanned(r"l(\d+)/", stride=4, stack="blocks")
    tx = gs.smooth_over_depth(
        depth, 0.3, axis_name="stage", axis_boundary="stage", strict=False
    )
    tree = {f"l{i}": {"w": leaf(8, 2)} for i in (0, 1, 3)}
    assert not moved(traced(tx, tree))


def test_a_stack_without_layers_passes_through():
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.3, axis_name="stage")
    assert not moved(traced(tx, {"blocks": {"w": leaf(0, 3)}}))


def test_a_gap_in_one_role_is_an_error_if_strict():
    depth = gs.scanned(r"l(\d+)/", stride=3, stack="blocks")
    tx = gs.smooth_over_depth(depth, 0.3, axis_name="stage")
    tree = {f"l{i}": {"w": leaf(8, 2)} for i in range(3)}
    tree["l0"]["b"] = tree["l2"]["b"] = leaf(8, 3)
    fails(ValueError, ["role 'b'", "missing", "strict=False"], lambda: traced(tx, tree))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"axis_boundary": "wrap"}, ValueError, ["axis_boundary", "couple", "'wrap'"]),
        (
            {"axis_boundary": "stage", "axis_name": None},
            ValueError,
            ["axis_boundary='stage'", "axis_name="],
        ),
        (
            {"norm_axis_names": "model"},
            TypeError,
            ["norm_axis_names", "'model'", "norm_axis_names=('model',)"],
        ),
        (
            {"norm_axis_names": ("model", "stage")},
            ValueError,
            ["norm_axis_names", "'stage'", "axis_name"],
        ),
        ({"norm_axis_names": ("a", "a")}, ValueError, ["norm_axis_names", "twice"]),
        ({"axis_name": ("stage",)}, TypeError, ["axis_name", "('stage',)"]),
    ],
    ids=[
        "boundary",
        "boundary alone",
        "norms str",
        "norms over depth",
        "norms twice",
        "axis tuple",
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(kwargs, error, words):
    kwargs = {"axis_name": "stage", **kwargs}
    for build in (
        lambda: gs.smooth_over_depth(SCANNED, 0.3, **kwargs),
        lambda: gs.smooth_over_depth(SCANNED, gs.laplacian(0.3), **kwargs),
    ):
        fails(error, words, build)
