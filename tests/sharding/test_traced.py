"""Depth that is split over devices: what is known already where a program is traced.

Which layers are sent where, how results are split, and what cannot be and is refused.
Numbers are held against plain loops in `devices.py`.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operator_table import VARIANTS
from split import ALPHA, OPERATORS

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

SCANNED, BLOCKS = gs.scanned("^"), gs.scanned("blocks/")
NUMBERED = gs.scanned(r"l(\d+)/", stride=3, stack="blocks")
SPLIT = P("stage")


def mesh_of(kind=AxisType.Auto, **sizes):
    types = (kind,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


LINE, GRID = mesh_of(stage=8), mesh_of(stage=4, model=2)


def leaf(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def traced(tx, tree, specs=SPLIT, mesh=LINE, out_specs=None, check_vma=True):
    """The equations of an update inside of `shard_map`."""
    update = jax.shard_map(
        functools.partial(step, tx),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs if out_specs is None else out_specs,
        check_vma=check_vma,
    )
    return list(equations(jax.make_jaxpr(update)(tree).jaxpr))


COLLECTIVES = ("ppermute", "psum", "pmax", "pmin", "all_", "reduce_", "pgather", "pbro")
LOCAL = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"),
    "reduce_precision",
)
AGREEMENT = ("psum", "int32", ())


def moved(equations):
    """How often which (primitive, mesh axes, dtype, shape) moves between devices.

    Without the agreement of all devices on whether some layer, on any of them, is so
    large or small that all sum again.
    """
    result = collections.Counter()
    for equation in equations:
        name = equation.primitive.name
        if name.startswith(COLLECTIVES) and name not in LOCAL:
            axes = equation.params.get("axes", equation.params.get("axis_name"))
            axes = axes if isinstance(axes, tuple) else (axes,)
            kind = "psum" if name.startswith("psum") else name
            for x in equation.invars:
                if (kind, str(x.aval.dtype), x.aval.shape) != AGREEMENT:
                    result[kind, axes, str(x.aval.dtype), x.aval.shape] += 1
    return result


def step(tx, updates):
    return tx.update(updates, tx.init(updates), updates)[0]


def smooth(operator=0.3, depth=SCANNED, **options):
    options = {"axis_name": "stage", **options}
    return gs.smooth_over_depth(depth, operator, **options)


# -- What moves ------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "dtype"), [(1, "bfloat16"), (3, "float32")])
def test_a_window_sends_its_radius_of_layers_in_each_direction(radius, dtype):
    tree = {"w": leaf(24, 2, 5, dtype=dtype), "b": leaf(24, 7, dtype=dtype)}
    found = moved(traced(smooth(gs.window(0.3, radius)), tree))
    halos = [(radius, 2, 5), (radius, 7)]
    assert found == {("ppermute", ("stage",), dtype, halo): 2 for halo in halos}
    # And on whichever axis depth is.
    tx = smooth(gs.window(0.3, radius), gs.scanned("^", axis=2))
    found = moved(traced(tx, {"w": leaf(3, 4, 24)}, P(None, None, "stage")))
    assert found == {("ppermute", ("stage",), "float32", (3, 4, radius)): 2}


def test_the_two_directions_do_not_wait_for_one_another():
    eqns = traced(smooth(gs.window(0.3, 2)), {"w": leaf(24, 3)})
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


HALO, NORMS = ("ppermute", ("stage",)), ("psum", ("model",))
TWO = {"w": leaf(8, 2, 6), "b": leaf(8, 4)}
BY_MODEL = {"w": P("stage", None, "model"), "b": P("stage", "model")}
SUMMED = {"norm_axis_names": ("model",)}


@pytest.mark.parametrize("check_vma", [True, False])
def test_norms_need_no_sum_over_depth_and_one_over_other_axes_if_asked(check_vma):
    def kinds(specs=BY_MODEL, **options):
        eqns = traced(smooth(**options), TWO, specs, GRID, check_vma=check_vma)
        return {one[:2] for one in moved(eqns)}

    for variant, norm_scope in VARIANTS[1:]:
        options = {"variant": variant, "norm_scope": norm_scope}
        assert kinds(**options) == {HALO}
        assert kinds(**options, **SUMMED) == {HALO, NORMS}
    # A leaf that is not split is not summed over, where that is known.
    found = kinds(SPLIT, **options, **SUMMED)
    assert found == ({HALO} if check_vma else {HALO, NORMS})
    for scope in ("param", "block"):
        assert kinds(operator=gs.similarity_window(0.3, scope)) == {HALO}


# What sends nothing: the transformation, and a tree.
QUIET = {
    **{
        f"stages that are not coupled, {variant}": (
            smooth(gs.window(0.3, 2), axis_boundary="stage", variant=variant),
            {"w": leaf(24, 3)},
        )
        for variant, _ in VARIANTS[::2]
    },
    "a gap, where stages are not coupled": (
        smooth(depth=NUMBERED, axis_boundary="stage", strict=False),
        {f"l{i}": {"w": leaf(8, 2)} for i in (0, 2)},
    ),
    "a stack without layers": (smooth(depth=BLOCKS), {"blocks": {"w": leaf(0, 3)}}),
    "lamb per layer": (gs.per_layer(optax.lamb(0.1), SCANNED), {"w": leaf(8, 3)}),
    "adafactor per layer": (
        gs.per_layer(optax.adafactor(0.1, min_dim_size_to_factor=2), SCANNED),
        {"w": leaf(8, 3, 4)},
    ),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_needs_no_other_stage_sends_nothing(name):
    assert not moved(traced(*QUIET[name]))


def test_a_replicated_leaf_that_is_not_matched_passes_through():
    tree = {"blocks": {"w": leaf(24, 2)}, "head": leaf(3, 2)}
    specs = {"blocks": {"w": P("stage")}, "head": P()}
    assert moved(traced(smooth(depth=BLOCKS), tree, specs)).total() == 2


# -- Structure -------------------------------------------------------------------------

INIT = {
    "adamw": gs.adamw(0.1, smooth(gs.similarity_window(0.3))),
    "muon": gs.muon(0.1, SCANNED, smooth()),
    "schedule": smooth(lambda count: 0.1),
}


@pytest.mark.parametrize("name", INIT)
def test_init_takes_whole_arrays_and_those_of_a_stage_and_needs_no_axis(name):
    tx = INIT[name]
    for num_layers in (24, 3):
        state = jax.eval_shape(tx.init, {"w": leaf(num_layers, 4, 2)})
        shapes = {x.shape for x in jax.tree.leaves(state) if x.ndim == 3}
        assert shapes <= {(num_layers, 4, 2)}
    inside = jax.shard_map(
        tx.init,
        mesh=LINE,
        in_specs=P("stage"),
        out_specs=jax.tree.map(lambda x: P("stage") if x.ndim == 3 else P(), state),
    )
    eqns = list(equations(jax.make_jaxpr(inside)({"w": leaf(24, 4, 2)}).jaxpr))
    assert not moved(eqns)
    assert "axis_index" not in {e.primitive.name for e in eqns}


def test_whole_arrays_of_a_leaf_per_layer_of_a_stage_are_no_gap_in_init():
    for stages in (8, 1):
        tree = {f"l{i}": {"w": leaf(stages, 2)} for i in range(3)}
        jax.eval_shape(smooth(depth=NUMBERED).init, tree)


# -- Errors ----------------------------------------------------------------------------


def at_axes(*axes, stride=None):
    return gs.depth_fn(lambda path, x: gs.Depth("b", "w", axis=axes, stride=stride))


def of_one_round(path, leaf):
    """Two rounds of one layer, and a role of the first only."""
    both = {"axis": (0, 1), "stride": (8, 1)}
    return gs.Depth("b", path[-1], **both if path[-1] == "w" else {"axis": 0})


CIRCULAR = at_axes(0, 1, 2, stride=(16, 2, 1))
ROUNDS = ({"w": leaf(2, 8, 2, 3)}, P(None, "stage"))
WIDE = ["axis_name='stage'", "2 layers", "role 'w'", "window(alpha, radius=2)"]
HALVES = gs.scanned(r"layers_(\d+)/", stride=2)
PAIR = {"mesh": mesh_of(stage=2), "check_vma": False}
UNTOLD = ["axis_name='stage'", "cannot be told", "stride"]


BOTH = {"w": leaf(8, 2), "b": leaf(8, 3)}


def numbered(*layers, **more):
    return {f"l{i}": {"w": leaf(8, 2)} for i in layers} | more


# What is split in a way that is not supported: the transformation, the tree and how it
# is split, and what the error says.
REFUSED = {
    "an axis that is not bound": (
        smooth(axis_name="pipe"),
        ({"w": leaf(8, 2)},),
        ["'pipe'", "not bound", "shard_map", "jit"],
    ),
    "a norm axis that is not bound": (
        smooth(variant="norm_preserving", **SUMMED),
        ({"w": leaf(8, 2)},),
        ["`norm_axis_names`", "'model'", "not bound"],
    ),
    **{
        f"a radius of {radius} and {layers} layers": (
            smooth(gs.window(0.3, radius), BLOCKS),
            ({"blocks": {"w": leaf(layers, 2)}},),
            [
                f"reaches {radius} layers",
                "axis_name='stage'",
                f"with {layers // 8} layer{'s' * (layers > 8)} each",
                "stack 'blocks'",
                "role 'w'",
                f"radius={layers // 8}",
            ],
        )
        for radius, layers in ((4, 24), (2, 8), (3, 16))
    },
    **{
        f"an operator that reaches further: {name}": (
            smooth(operator),
            ({"w": leaf(16, 2)},),
            WIDE,
        )
        for name, operator in {
            "ema": gs.ema(0.5),
            "tikhonov": gs.tikhonov(0.5),
            "mean": gs.mean_over_depth(),
            "shuffled": gs.controls.shuffled(gs.window(0.2), 0),
            "composed": gs.compose(gs.window(0.2), gs.window(0.3, 2)),
            "repeated": gs.repeat(gs.window(0.2), 3),
            "norm_matched": gs.controls.norm_matched(gs.ema(0.5)),
            "function": gs.operator_fn(lambda n: np.full((n, n), 1 / n)),
        }.items()
    },
    "a radius beyond a block of a circular pipeline": (
        smooth(gs.window(0.3, 3), CIRCULAR),
        ROUNDS,
        ["reaches 3 layers", "2 layers", "'stage'"],
    ),
    "a circular pipeline that is ranked": (
        smooth(depth=gs.ranked(CIRCULAR)),
        ROUNDS,
        ["'stage'", "circular", "ranked", "0, 1, 16, 17"],
    ),
    "a role that is not in every round": (
        smooth(depth=of_one_round, strict=False),
        ({"w": leaf(2, 8, 3), "b": leaf(8, 3)}, {"w": P(None, "stage"), "b": SPLIT}),
        ["'stage'", "differ from round to round", "only"],
    ),
    "a leaf that every stage holds whole": (
        smooth(depth=BLOCKS),
        (
            {"blocks": {"w": leaf(24, 2), "b": leaf(3, 2)}},
            {"blocks": {"w": SPLIT, "b": P()}},
        ),
        ["'stage'", "blocks/b", "only"],
    ),
    "several depth axes without strides": (
        smooth(depth=at_axes(0, 1)),
        ({"w": leaf(2, 8, 3)}, P(None, "stage")),
        ["axis=(0, 1)", "leaf w", "'stage'", "stride="],
    ),
    **{
        f"a gap in all roles of a stage, strict={strict}": (
            smooth(depth=NUMBERED, strict=strict),
            (numbered(0, 2),),
            ["axis_name='stage'", "layers 0, 2", "'blocks'"],
        )
        for strict in (True, False)
    },
    "a gap in one role if strict": (
        smooth(depth=NUMBERED),
        (numbered(1, l0=BOTH, l2=BOTH),),
        ["role 'b'", "missing", "strict=False"],
    ),
    # Gaps that look like the rounds of a circular pipeline.
    "one position of a cycle": (
        smooth(depth=HALVES),
        ({"layers_0": {"w": leaf(6, 3)}}, SPLIT),
        UNTOLD,
    ),
    "one position of one cycle": (
        smooth(depth=HALVES),
        ({"layers_0": {"w": leaf(2, 3)}}, SPLIT),
        UNTOLD,
    ),
    "a frozen layer": (
        smooth(depth=gs.unrolled(r"layers_(\d+)/")),
        ({f"layers_{i}": {"w": leaf(2, 3)} for i in (0, 2)}, SPLIT),
        UNTOLD,
    ),
    "a stack that goes on outside of the pipeline": (
        smooth(
            depth=gs.first_match(
                gs.scanned("pipe/", stack="all"),
                gs.unrolled(r"rest_(\d+)/", start=2, stack="all"),
            )
        ),
        (
            {"pipe": {"w": leaf(2, 3)}, "rest_0": {"w": leaf(3)}},
            {"pipe": {"w": SPLIT}, "rest_0": {"w": P()}},
        ),
        UNTOLD,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stages_cannot_do_is_told(name):
    tx, (tree, *specs), words = REFUSED[name]
    options = PAIR if words is UNTOLD else {}
    with pytest.raises(ValueError, match=r"'stage'|not bound|strict") as info:
        traced(tx, tree, *specs, **options)
    for word in words:
        assert word in str(info.value), str(info.value)


def test_an_axis_without_a_mesh_is_told_with_and_without_jit():
    tx, tree = smooth(), {"w": np.ones((8, 2), "float32")}
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"'stage'.*not bound.*shard_map"):
            update(tree, tx.init(tree))


def test_several_depth_axes_need_no_strides_where_the_first_is_split():
    eqns = traced(smooth(depth=at_axes(0, 1)), {"w": leaf(8, 2, 3)})
    assert moved(eqns).total() == 2


ARGUMENTS = {
    "boundary": (
        {"axis_boundary": "wrap"},
        ValueError,
        ["axis_boundary", "couple", "'wrap'"],
    ),
    "boundary alone": (
        {"axis_boundary": "stage", "axis_name": None},
        ValueError,
        ["axis_boundary='stage'", "axis_name="],
    ),
    "norms str": (
        {"norm_axis_names": "model"},
        TypeError,
        ["norm_axis_names", "'model'", "norm_axis_names=('model',)"],
    ),
    "norms over depth": (
        {"norm_axis_names": ("model", "stage")},
        ValueError,
        ["norm_axis_names", "'stage'", "axis_name"],
    ),
    "norms twice": (
        {"norm_axis_names": ("a", "a")},
        ValueError,
        ["norm_axis_names", "twice"],
    ),
    "axis tuple": ({"axis_name": ("stage",)}, TypeError, ["axis_name", "('stage',)"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_cannot_be_meant_are_refused(name):
    options, error, words = ARGUMENTS[name]
    with pytest.raises(error) as info:
        smooth(**options)
    for word in words:
        assert word in str(info.value), str(info.value)


# -- Explicit mesh axes: how a result is split is in its type --------------------------

SPECS = {
    "grid": {
        "depth": P("stage"),
        "inner": P(None, None, "model"),
        "both": P("stage", None, "model"),
    },
    # The same mesh axis splits depth in one role and another axis in the other.
    "line": {"depth": P("stage"), "inner": P(None, None, "stage")},
}


def explicit(specs, num_layers=9, shape=(1, 6)):
    """Arrays without values, split as their types say."""
    mesh = mesh_of(AxisType.Explicit, stage=3, model=2)
    return {
        role: jax.ShapeDtypeStruct(
            (num_layers, *shape), "float32", sharding=NamedSharding(mesh, spec)
        )
        for role, spec in specs.items()
    }


def assert_as_given(function, tree):
    """What a function makes of a tree is split as the tree is."""
    for new, given in zip(*map(jax.tree.leaves, (function(tree), tree)), strict=True):
        assert jax.typeof(new).sharding == jax.typeof(given).sharding


@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_split_as_the_updates_on_explicit_mesh_axes(name):
    def update(trees):
        rows = itertools.product(trees, VARIANTS[len(name) % 2 :: 2])
        for i, (tree, (variant, norm_scope)) in enumerate(rows):
            operator = OPERATORS[name].make(jnp.float32(ALPHA) if i % 2 else ALPHA)
            options = {"variant": variant, "norm_scope": norm_scope}
            tx = gs.smooth_over_depth(SCANNED, operator, **options)
            assert_as_given(functools.partial(step, tx), tree)

    jax.jit(update).trace([explicit(specs) for specs in SPECS.values()])


CYCLE, LISTED = gs.scanned(r"(\d)/", stride=2, stack="all"), gs.unrolled(r"(\d)/")
OTHERS = {
    "tikhonov on a cycle": (CYCLE, gs.smooth_over_depth(CYCLE, gs.tikhonov(0.5))),
    "similarity of listed leaves": (
        LISTED,
        gs.smooth_over_depth(
            LISTED, gs.similarity_window(0.3), variant="norm_preserving"
        ),
    ),
    **{
        f"{name} per layer": (SCANNED, gs.per_layer(inner, SCANNED))
        for name, inner in {
            "lamb": optax.lamb(0.1),
            "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
        }.items()
    },
    "scaled": (SCANNED, gs.scale_over_depth(SCANNED, gs.layer_wise_decay(0.5))),
}


def explicit_tree(depth, specs):
    tree = explicit(specs)
    return tree if depth is SCANNED else {"0": tree, "1": tree}


# Layers whose roles are split over one mesh axis along different axes.
DUPLICATE = "per_layer splits along both, which jax refuses: DuplicateSpecError"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name,
            shape,
            marks=[pytest.mark.xfail(strict=True, reason=DUPLICATE)]
            * (shape == "line" and "per layer" in name),
        )
        for shape in SPECS
        for name in OTHERS
    ],
)
def test_other_transformations_keep_explicit_mesh_axes_as_well(name, shape):
    depth, tx = OTHERS[name]

    def update(tree):
        _, state = tx.update(tree, tx.init(tree), tree)
        assert_as_given(lambda tree: tx.update(tree, state, tree)[0], tree)

    jax.jit(update).trace(explicit_tree(depth, SPECS[shape]))


def test_diagnostics_take_explicit_mesh_axes():
    def look(depth, tree):
        gs.diagnostics.depth_statistics(tree, depth)
        gs.diagnostics.cosine_matrix(tree, depth)
        smoothing = gs.smooth_over_depth(depth, ALPHA)
        step(gs.diagnostics.monitor_depth(smoothing, depth), tree)

    for depth, specs in itertools.product((SCANNED, LISTED), SPECS.values()):
        jax.jit(functools.partial(look, depth)).trace(explicit_tree(depth, specs))
