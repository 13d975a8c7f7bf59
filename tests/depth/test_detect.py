"""`detect` shows its proposal as a call, and says what it rests on and doubts.

Whether the proposals are right is asked of every tree in `test_readings.py`.
"""

import contextlib

import jax
import jax.numpy as jnp
import notation
import pytest
from nodes import Attributes

import gradsmooth_optax as gs

X = jnp.ones((4, 4))
SMALL = ["built_here", "look_alikes", "maxtext_parts", "once_misread", "others"]


def block(width=4):
    mlp = {"kernel": jnp.ones((4, width)), "bias": jnp.ones(width)}
    return {"attn": {"kernel": X, "bias": X[0]}, "mlp": mlp, "norm": {"scale": X[0]}}


def detected(name):
    params = notation.built(notation.all_trees()[name])
    return gs.detect(params, accept_uncertain=True)


# -- The proposal ----------------------------------------------------------------------


@pytest.mark.parametrize("file", SMALL)
def test_the_code_makes_the_spec_and_the_text_says_all_of_it(file):
    for name in notation.trees_of(file):
        detection = detected(name)
        if detection.code:
            assert eval(detection.code, {"gs": gs}) == detection.spec, name
        else:
            with pytest.raises(ValueError, match="found no layers"):
                _ = detection.spec
        for item in (detection.code, *detection.reasons, *detection.uncertain):
            assert item in str(detection), name


@pytest.mark.parametrize("name", ["hf-t5-block-and-layer", "maxtext-deepseek-scanned"])
def test_shapes_are_enough(name):
    tree = notation.all_trees()[name]
    arrays = {path: jnp.ones(x.shape) for path, x in notation.shapes_of(tree).items()}
    filled = notation.built(tree, arrays)
    assert str(gs.detect(filled, accept_uncertain=True)) == str(detected(name))


def doubtful():
    """Layers 0, 2 and 4."""
    return {"layers": {i: {"kernel": X, "bias": X[0]} for i in (0, 2, 4)}}


@pytest.mark.core
def test_with_doubts_the_spec_raises_and_says_them_and_both_ways_out():
    detection = gs.detect(doubtful())
    assert detection.uncertain
    with pytest.raises(ValueError, match="not sure") as info:
        _ = detection.spec
    for part in (detection.code, "describe(", "accept_uncertain=True"):
        assert part in str(info.value)
    for doubt in detection.uncertain:
        assert doubt in str(info.value)


@pytest.mark.core
def test_a_doubtful_spec_can_be_accepted():
    detection = gs.detect(doubtful(), accept_uncertain=True)
    assert detection.spec == gs.ranked(gs.unrolled(r"layers/(\d+)/"))
    assert detection.uncertain
    assert "not sure" in str(detection)


@pytest.mark.parametrize("accept_uncertain", [False, True])
def test_where_nothing_is_found_the_spec_raises(accept_uncertain):
    no_layers = {"embed": X, "head": {"kernel": X}}
    for tree in ({}, None, X, no_layers, {"layers": jnp.arange(3)}):
        detection = gs.detect(tree, accept_uncertain=accept_uncertain)
        assert detection.code == ""
        assert str(detection).startswith("no layers found")
        with pytest.raises(ValueError, match=r"found no layers[\s\S]*unrolled\("):
            _ = detection.spec


# What a person would correct, if it is doubted.
PROPOSALS = {
    "maxtext-scanned-axis-1": "gs.scanned('layers/', axis=1)",
    "maxtext-qwen3-next-cycle-of-4": (
        r"gs.ranked(gs.scanned(r'layers/layer_(\d+)/', axis=1, stride=4))"
    ),
    "maxtext-pipeline-repeats-stages-and-layers-boxed": (
        "gs.scanned('layers/', axis=(0, 1, 3))"
    ),
    "big-vision-cappa-scan-axes-0-and-1": (
        "gs.first_match(gs.scanned('EncDecBlock/', axis=1), "
        "gs.scanned('encoderblock/'))"
    ),
    "t5x-scanned": (
        "gs.first_match(gs.scanned('decoder/decoder/'), "
        "gs.scanned('encoder/encoder/', axis=1))"
    ),
    "linen-remat-scan": "gs.scanned('block/', axis=1)",
    "a stack with names alone in a decoder": "gs.scanned('layers/')",
    "nnx-vmap-and-scan": "gs.scanned('layers/')",
    "nnx-sequential-with-gaps": r"gs.ranked(gs.unrolled(r'layers/(\d+)/'))",
    "haiku-two-layer-stacks": (
        "gs.first_match(gs.scanned('__layer_stack_no_per_layer/'), "
        "gs.scanned('__layer_stack_no_per_layer_1/'))"
    ),
    "hf-t5-block-and-layer": r"gs.unrolled(r'block/(\d+)/')",
    "hidden-stack-in-a-tuple": "gs.scanned('^1/')",
    "stages of one layer each": r"gs.unrolled(r'layer/(\d+)/')",
    "a cycle of modules on axis 1": r"gs.scanned(r'blocks/(\d+)/', axis=1, stride=3)",
    "a cycle of two matrices": r"gs.scanned(r'layers/(\d+)/', stride=3)",
    "a first layer without a number before a gap": (
        r"gs.ranked(gs.unrolled(r'block(?:_(\d+))?/'))"
    ),
    "a width that no other leaf has, and a depth that some have": (
        "gs.scanned('layers/')"
    ),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_the_proposal_is_the_headline_doubted_or_not(name):
    detection = detected(name)
    assert detection.code == PROPOSALS[name]
    assert str(detection).startswith(f"{detection.code}\n\nbecause:\n  - ")
    is_doubted = notation.all_trees()[name].words["detect"] == "loud"
    assert bool(detection.uncertain) == is_doubted == ("not sure:" in str(detection))


def test_layers_of_two_kinds_are_a_doubt_and_say_which_parameters():
    tree = {f"layers_{i}": block(4 if i % 2 else 5) for i in range(4)}
    (doubt,) = gs.detect(tree).uncertain
    assert "mlp/kernel" in doubt
    assert "norm" not in doubt
    assert "alternate" in doubt


def test_two_stacks_of_one_name_are_no_certain_proposal():
    stack = jax.tree.map(lambda x: jnp.stack([x] * 5), block())
    tree = {"layers": stack, **{f"layers_{i}": block() for i in range(3)}}
    with pytest.raises(ValueError, match=r"tried on this tree.*`stack=`"):
        _ = gs.detect(tree).spec


@pytest.mark.parametrize("count", [2, 11])
def test_it_knows_the_usual_names(count):
    names = ["layers_{}", "layers{}", "layers.{}", "layer_{}", "h_{}"]
    for template in [*names, "Block_{}", "DiTBlock_{}"]:
        tree = {"model": {template.format(i): block() for i in range(count)}}
        for group in gs.describe(gs.detect(tree).spec, tree).groups:
            assert group.runs == (tuple(range(count)),), template


def test_a_parameter_that_is_called_value_is_no_box():
    rows = [Attributes({"value": X}) for _ in range(4)]
    groups = gs.describe(gs.detect(rows).spec, rows).groups
    assert [(g.role, g.layers) for g in groups] == [("value", (0, 1, 2, 3))]


# -- Names of axes in metadata ---------------------------------------------------------


@contextlib.contextmanager
def mesh_of(*names):
    """Newer versions of NNX annotate only within a mesh."""
    types = {"axis_types": (jax.sharding.AxisType.Auto,) * len(names)}
    mesh = jax.make_mesh((1,) * len(names), names, **types)
    with getattr(jax, "set_mesh", contextlib.nullcontext)(mesh):
        yield


@pytest.mark.parametrize("axis", [0, 1])
def test_nnx_metadata_names_the_axis_and_unannotated_leaves_follow(axis):
    nnx = pytest.importorskip("flax.nnx")
    names = {"transform_metadata": {nnx.PARTITION_NAME: "layers"}}

    class Block(nnx.Module):
        def __init__(self, rngs):
            annotate = nnx.with_partitioning(nnx.initializers.ones, ("embed", "mlp"))
            self.fc = nnx.Linear(3, 5, kernel_init=annotate, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, out_axes=axis, **names)
            self.layers = nnx.split_rngs(splits=4)(make)(rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    with mesh_of("layers", "embed", "mlp"):
        state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    spec = gs.detect(state).spec
    assert spec == gs.scanned("layers/", axis=axis)
    unboxed = jax.tree.map(
        lambda box: box[...], state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    for tree in (state, unboxed):
        groups = gs.describe(spec, tree).groups
        assert {g.role: g.num_layers for g in groups} == {"fc/kernel": 4, "fc/bias": 4}


# -- Wrong arguments -------------------------------------------------------------------


def test_an_option_that_cannot_be_one_is_named():
    params = {"layers": [X, X]}
    for value in (jnp.array([1, 2]), [1], {}, jax.random.key(0)):
        with pytest.raises(TypeError, match="`accept_uncertain` must be True or False"):
            gs.detect(params, accept_uncertain=value)
        with pytest.raises(TypeError, match="`interleaved` must be True or False"):
            gs.layouts.gemma(interleaved=value)
        with pytest.raises(TypeError, match="`num_layers` must be"):
            gs.layouts.equinox(num_layers=value)


def test_swapped_arguments_are_told_to_be_swapped():
    for call in (
        lambda: gs.describe({"layers": [X, X]}, gs.unrolled()),
        lambda: gs.detect(gs.unrolled()),
    ):
        with pytest.raises(TypeError, match=r"`params`.*`describe\(\w+, params\)`"):
            call()
