"""`detect` finds the layers of real stacks, or says what it is not sure of."""

import contextlib
import functools
import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import stacks

import gradsmooth_optax as gs

ALPHA = 0.3
X = jnp.ones((4, 4))


def installed(stack):
    return stack.real is None or importlib.util.find_spec(stacks.MODULES[stack.source])


STACKS = [stack for stack in stacks.STACKS if installed(stack)]
NAMES = [stack.name for stack in STACKS]
SOURCES = {stack.source if stack.real else "transcribed" for stack in STACKS}
LEAST_RIGHT = {"transcribed": 23, "flax": 8, "equinox": 1, "dm-haiku": 2}


@functools.cache
def tree_of(name):
    stack = stacks.BY_NAME[name]
    return stacks.build(stack, stacks.random_blocks(stack))


@functools.cache
def detected(name):
    return gs.detect(tree_of(name), accept_uncertain=True)


@functools.cache
def outcome(name):
    """Whether the certain proposal couples the neighbors: all, some, others, none."""
    stack, tree, detection = stacks.BY_NAME[name], tree_of(name), detected(name)
    if not detection.code or detection.uncertain:
        return "unsure" if detection.uncertain else "nothing"
    tx = gs.smooth_over_depth(detection.spec, ALPHA)
    updates = stacks.at_update(tree)
    out, _ = tx.update(updates, tx.init(tree))
    found, wrong = stacks.coupled_pairs(stack, updates, out, ALPHA)
    if wrong:
        return "wrong"
    return "right" if found == stacks.true_pairs(stack) else "right in part"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_is_certain_of_couples_true_neighbors_only(name):
    assert outcome(name) != "wrong"


def test_it_is_right_for_most_stacks_with_a_leaf_per_layer_or_with_axis_names():
    outcomes = {name: outcome(name) for name in NAMES}
    counts = Counter(outcomes.values())
    table = "\n".join(f"{name:55}{is_what}" for name, is_what in outcomes.items())
    shown = f"{dict(counts)}\n{table}"
    assert counts["right"] >= sum(map(LEAST_RIGHT.get, SOURCES)), shown
    assert counts["right in part"] <= 3, shown
    assert counts["nothing"] <= 1, shown
    assert counts["wrong"] == 0, shown


# The proposal.


@pytest.mark.parametrize("name", NAMES)
def test_the_code_is_the_call_that_makes_the_spec(name):
    detection = detected(name)
    if detection.code:
        assert eval(detection.code, {"gs": gs}) == detection.spec
    else:
        with pytest.raises(ValueError, match="found no layers"):
            _ = detection.spec


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_is_all_in_its_text(name):
    detection = detected(name)
    for item in (detection.code, *detection.reasons, *detection.uncertain):
        assert item in str(detection)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_enough(name):
    tree = tree_of(name)
    assert str(gs.detect(jax.eval_shape(lambda: tree))) == str(detected(name))


def doubtful():
    """Layers 0, 2 and 4."""
    return {"layers": {i: {"kernel": X, "bias": X[0]} for i in (0, 2, 4)}}


def test_with_doubts_the_spec_raises_and_says_them_and_both_ways_out():
    detection = gs.detect(doubtful())
    assert detection.uncertain
    with pytest.raises(ValueError, match="not sure") as info:
        _ = detection.spec
    for part in (detection.code, "describe(", "accept_uncertain=True"):
        assert part in str(info.value)
    for doubt in detection.uncertain:
        assert doubt in str(info.value)


def test_a_doubtful_spec_can_be_accepted():
    detection = gs.detect(doubtful(), accept_uncertain=True)
    assert detection.spec == gs.ranked(gs.unrolled(r"layers/(\d+)/"))
    assert detection.uncertain
    assert "not sure" in str(detection)


@pytest.mark.parametrize("accept_uncertain", [False, True])
@pytest.mark.parametrize(
    "tree",
    [{}, None, X, {"embed": X, "head": {"kernel": X}}, {"layers": jnp.arange(3)}],
    ids=["empty", "none", "array", "no layers", "integers"],
)
def test_where_nothing_is_found_the_spec_raises(tree, accept_uncertain):
    detection = gs.detect(tree, accept_uncertain=accept_uncertain)
    assert detection.code == ""
    assert str(detection).startswith("no layers found")
    with pytest.raises(ValueError, match=r"found no layers[\s\S]*unrolled\("):
        _ = detection.spec


# What looks like layers.


def dense(width=4):
    return {"kernel": jnp.ones((4, width)), "bias": jnp.ones(width)}


def block(width=4):
    norm = {"scale": jnp.ones(4)}
    return {"attn": dense(), "mlp": dense(width), "norm": norm}


def many(template, make=block, count=3):
    return {template.format(i): make() for i in range(count)}


def box(shape, *names):
    return stacks.Box(jnp.ones(shape), names)


def confidently_found(tree):
    detection = gs.detect(tree)
    return detection.code if not detection.uncertain else ""


NO_LAYERS = {
    "Linen's parts": {
        **many("Dense_{}", dense),
        **many("LayerNorm_{}", lambda: {"scale": X[0], "bias": X[0]}),
        **many("MultiHeadDotProductAttention_{}"),
    },
    "Linen's modules of a kind": {"MAPHead_0": block(), "Encoder_0": block()},
    "parts of an MLP": many("mlp/wi_{}", dense) | many("mlp/w{}", dense),
    "norms": many("ln_{}", lambda: {"scale": X[0]}) | many("norm{}", lambda: X[0]),
    "experts": {"moe": many("experts_{}")},
    "a list of experts": {"moe": {"experts": [block(), block()]}},
    "heads": many("heads_{}") | many("RegressionHead_{}"),
    "towers": many("tower_{}"),
    "vmapped blocks": {
        "VmapBlock_0": jax.tree.map(lambda x: jnp.stack([x] * 3), block())
    },
    "views": many("encoderblock_0_view{}"),
    "stages": many("stage_{}"),
    "a plain list of chains": [{"mlp": many("Dense_{}", dense)} for _ in range(2)],
    "convolutions": {
        "conv_layers": [{"conv": dense(), "norm": X[0]} for _ in range(3)]
    },
    "Haiku's layer stacks": {
        f"__layer_stack_no_per_layer{i}/block/{name}": {"w": jnp.ones((4, 4, 4))}
        for i in ("", "_1", "_2")
        for name in ("linear", "linear_1")
    },
    "layers that hold layers": {f"layers_{i}": many("layers_{}") for i in range(3)},
    "positions of a scanned cycle": {
        "layers": many(
            "layers_{}",
            lambda: {"kernel": jnp.ones((4, 3, 4)), "bias": jnp.ones((4, 3))},
        )
    },
}


@pytest.mark.parametrize("tree", NO_LAYERS.values(), ids=NO_LAYERS)
def test_it_is_not_certain_of_what_only_looks_like_layers(tree):
    assert not confidently_found(tree)


MISTAKEN = {
    "experts called blocks": {"moe": many("ExpertBlock_{}")},
    "experts called layers": {"moe": many("expert_layers_{}")},
    "heads called blocks": many("HeadBlock_{}"),
    "parts called blocks": many(
        "MlpBlock_{}", lambda: {"Dense_0": dense(), "Dense_1": dense()}
    ),
    "parts called layers": many("output_layer_{}", dense),
    "layers of a head": {"head": {"layers": [dense(), dense()]}},
    "layers of an embedding": {"time_mlp": {"layers": [dense(), dense()]}},
    "recurrent gates": {"gru": many("w_h_{}", lambda: X)},
    "blocks of units": {f"block{s}": many("unit{}") for s in (1, 2, 3)},
    "a local and a global layer in each": {
        f"layers_{i}": {
            f"{part}_{kind}": dense()
            for part in ("self_attention", "mlp")
            for kind in ("local", "global")
        }
        for i in range(3)
    },
    "axis of a norm": {"norm": {"scale": box((8,), "layer_norm")}},
    "axis of a convolution": {
        "conv": {
            "kernel": box((3, 3, 3, 2, 4), "depth", "height", "width", "in", "out")
        }
    },
    "axis of a block size": {"attn": {"bias": box((4, 8), "block_size", "embed")}},
    "axis of diagonal blocks": {
        "gate": {
            "w": box((3, 4, 4), "blocks", "in", "out"),
            "b": box((3, 4), "blocks", "out"),
        }
    },
    "axis of inputs per layer": {
        "gate": {"w": box((3, 4), "per_layer_input", "embed")}
    },
}


@pytest.mark.parametrize("tree", MISTAKEN.values(), ids=MISTAKEN)
def test_it_is_not_certain_of_what_is_called_a_layer_and_is_none(tree):
    assert not confidently_found(tree)


STACKED = [
    "maxtext-scanned-axis-1",
    "maxtext-mixtral-experts-on-axis-0",
    "big-vision-vit-scan",
    "big-vision-cappa-scan-axes-0-and-1",
    "t5x-scanned",
    "linen-scan-axis-0",
    "linen-scan-axis-1",
    "linen-remat-scan",
    "nnx-vmap-and-scan",
    "equinox-filter-vmap",
    "haiku-two-layer-stacks",
]


@pytest.mark.parametrize("name", [name for name in STACKED if name in NAMES])
def test_a_stack_that_shapes_show_is_in_its_headline(name):
    detection = detected(name)
    assert "scanned(" in str(detection).splitlines()[0]
    assert "on axis" in str(detection)


ALIKE = {
    "a plain list": [block(), block()],
    "pairs of a plain list": [(X, X[0]), (X, X[0])],
    "parameters in a row": [stacks.Attributes({"value": X}) for _ in range(4)],
    "whole blocks called attention": {"attention_blocks": [block(), block()]},
    "whole blocks called so": many("MlpBlock_{}"),
}


@pytest.mark.parametrize("tree", ALIKE.values(), ids=ALIKE)
def test_what_has_one_reading_it_is_certain_of(tree):
    assert confidently_found(tree)


# Names and numbers.


@pytest.mark.parametrize(
    "template",
    [
        "layers_{}",
        "layers{}",
        "layers.{}",
        "layer_{}",
        "Block_{}",
        "DiTBlock_{}",
        "h_{}",
    ],
)
@pytest.mark.parametrize("count", [2, 11])
def test_it_knows_the_usual_names(template, count):
    spec = gs.detect({"model": many(template, count=count)}).spec
    for group in gs.describe(spec, {"model": many(template, count=count)}).groups:
        assert group.runs == (tuple(range(count)),)


def test_it_leaves_other_leaves_alone_though_they_are_numbered():
    tree = {"decoder": many("layers_{}"), "vision": many("stem_{}", dense), "head": X}
    summary = gs.describe(gs.detect(tree).spec, tree)
    assert {group.stack for group in summary.groups} == {"decoder/layers"}


def test_numbers_need_not_start_at_zero():
    spec = gs.detect({f"block{i}": block() for i in (1, 2, 3)}).spec
    assert spec == gs.unrolled(r"block(\d+)/")


def test_layers_of_two_kinds_are_a_doubt_and_say_which_parameters():
    tree = {f"layers_{i}": block(4 if i % 2 else 5) for i in range(4)}
    (doubt,) = gs.detect(tree).uncertain
    assert "mlp/kernel" in doubt
    assert "norm" not in doubt
    assert "alternate" in doubt


# Names of axes in metadata.


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
    detection = gs.detect(state)
    assert detection.spec == gs.scanned("layers/", axis=axis)
    groups = gs.describe(detection.spec, stacks.at_update(state)).groups
    assert {group.role: group.num_layers for group in groups} == {
        "fc/kernel": 4,
        "fc/bias": 4,
    }


def test_names_of_other_axes_are_no_depth():
    tree = {
        "moe": {
            "wi": box((3, 4, 5), "exp", "embed", "mlp"),
            "b": box((3, 4), "exp", "kv"),
        }
    }
    assert not gs.detect(tree).code


def test_two_stacks_on_different_axes_are_two_scans():
    tree = {
        "encoder": {"w": box((3, 4, 5), "layers", "embed", "mlp")},
        "decoder": {"w": box((4, 3, 5), "embed", "layers", "mlp")},
    }
    found = gs.describe(gs.detect(tree).spec, tree).groups
    assert {(g.stack, g.shape, g.num_layers) for g in found} == {
        ("encoder", (4, 5), 3),
        ("decoder", (4, 5), 3),
    }


def test_the_boxes_may_be_gone_at_update():
    name = "maxtext-scanned-axis-1-boxed"
    spec = detected(name).spec
    shown = str(gs.describe(spec, tree_of(name)))
    assert str(gs.describe(spec, stacks.at_update(tree_of(name)))) == shown


def test_a_width_that_no_other_leaf_has_is_not_taken_for_the_depth():
    layers = {"attn": {"kernel": (4, 8, 8), "bias": (4, 8)}, "ln": {"scale": (4, 8)}}
    other = {"kernel": (4, 4), "bias": (4,)}  # the size of the depth, too
    tree = jax.tree.map(
        jnp.ones,
        {"layers": layers, "Dense_0": other},
        is_leaf=lambda x: type(x) is tuple,
    )
    assert gs.detect(tree).code == "gs.scanned('layers/')"


def test_two_stacks_of_one_name_are_no_certain_proposal():
    layer = {"attn": {"kernel": (8, 8), "bias": (8,)}, "ln": {"scale": (8,)}}
    stack = {"attn": {"kernel": (4, 8, 8), "bias": (4, 8)}, "ln": {"scale": (4, 8)}}
    tree = {"layers": stack, **{f"layers_{i}": layer for i in range(3)}}
    tree = jax.tree.map(jnp.ones, tree, is_leaf=lambda x: type(x) is tuple)
    with pytest.raises(ValueError, match=r"tried on this tree.*`stack=`"):
        _ = gs.detect(tree).spec


@pytest.mark.parametrize(
    "value", [jnp.array([1, 2]), [1], {}, jax.random.key(0)], ids=str
)
def test_an_option_that_cannot_be_one_is_named(value):
    params = {"layers": [jnp.ones(2), jnp.ones(2)]}
    with pytest.raises(TypeError, match="`accept_uncertain` must be True or False"):
        gs.detect(params, accept_uncertain=value)
    with pytest.raises(TypeError, match="`interleaved` must be True or False"):
        gs.layouts.gemma(interleaved=value)
    with pytest.raises(TypeError, match="`num_layers` must be"):
        gs.layouts.equinox(num_layers=value)
