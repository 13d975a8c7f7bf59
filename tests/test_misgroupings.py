"""A wrong grouping is loud: an error or a `DepthWarning`, with a call that helps."""

import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import gradsmooth_optax as gs

# -- Trees -----------------------------------------------------------------------------


def dense(*shape):
    return {"kernel": jnp.ones(shape or (4, 4)), "bias": jnp.ones(shape[-1:] or 4)}


def block(width=8):
    """A layer of two modules and a norm."""
    return {"attn": dense(4, 4), "fc": dense(4, width), "norm": {"scale": jnp.ones(4)}}


def stacked(tree, count, axis=0):
    return jax.tree.map(lambda x: jnp.stack([x] * count, min(axis, x.ndim)), tree)


def many(template, count=3, make=block):
    return {template.format(i): make() for i in range(count)}


def entries(count=3, make=block):
    return [make() for _ in range(count)]


def digits(count=3, make=block):
    return {str(i): make() for i in range(count)}


def mlp(count=3):
    return {"MLP_0": many("Dense_{}", count, dense)}


def wide(*names):
    """Stacked layers in a node that holds other parameters too."""
    layers = {"attn": (6, 16, 16), "mlp": (6, 16, 64), "ln": (6, 16)}
    others = {"pos": (128, 16), "tok": (256, 16), "out": (16, 16)}
    tree = {"layers": layers, **{name: others[name] for name in names}}
    ones = jax.tree.map(jnp.ones, tree, is_leaf=lambda x: isinstance(x, tuple))
    return {"decoder": ones}


def maxtext(*lead, axis=0):
    def leaf(*shape):
        return jnp.ones((*shape[:axis], *lead, *shape[axis:]))

    return {
        "mlp": {"wo": {"kernel": leaf(16, 8)}},
        "self_attention": {"out": {"kernel": leaf(2, 4, 8)}},
        "norm": {"scale": leaf(8)},
    }


LAYERS = maxtext(3, axis=1)
GEMMA2 = {
    f"{part}_{kind}": module
    for part, module in LAYERS.items()
    for kind in ("local", "global")
}


def haiku(*modules):
    names = ["block", "block_1", "block_2", "block_3"]
    return {f"net/{n}/{m}": {"w": jnp.ones((4, 4))} for n in names for m in modules}


def conv(width):
    return {"kernel": jnp.ones((3, 3, width, width)), "bias": jnp.ones(width)}


# -- What init says --------------------------------------------------------------------


def said(depth, tree):
    """The error, or the warnings, that `init` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gs.smooth_over_depth(depth, 0.2).init(tree)
        except ValueError as error:
            return [str(error)]
    assert all(issubclass(w.category, gs.DepthWarning) for w in caught)
    return [str(warning.message) for warning in caught]


class Case(NamedTuple):
    """A depth that is wrong for a tree.

    Attributes:
      words: patterns of what has to be said.
      call: what has to be proposed; None where nothing can be.
    """

    depth: object
    tree: object
    words: tuple[str, ...]
    call: str | None = None


UNROLLED = gs.unrolled()
CASES = {
    # Nothing is coupled, though the tree has layers.
    "the number of a model": Case(
        gs.unrolled(r"([0-9]+)/"),
        {"net_0": {"layers": digits()}},
        ("couples nothing", "net_0/layers/0"),
        r"gs.unrolled(r'layers/(\d+)/')",
    ),
    "one layer by a wrong pattern": Case(
        gs.unrolled(r"Block_(1)/"),
        many("Block_{}", 12),
        ("couples nothing",),
        r"gs.unrolled(r'Block_(\d+)/')",
    ),
    "layers of different widths": Case(
        gs.unrolled(r"Conv_(\d+)/"),
        {f"Conv_{i}": conv(i + 1) for i in range(3)},
        ("couples nothing", "No call was found"),
    ),
    "blocks of different widths by themselves": Case(
        UNROLLED,
        {f"Block_{i}": dense(4, i + 1) for i in range(3)},
        ("matched none", "called layers, but not alike in what they hold"),
    ),
    "a first, stacked hidden and a last layer": Case(
        UNROLLED,
        {"layers": (dense(3, 16), stacked(dense(16, 16), 5), dense(16, 2))},
        ("matched none", "of one more rank than its siblings"),
        "gs.scanned('layers/1/')",
    ),
    "the same by a preset": Case(
        gs.layouts.equinox(),
        {"layers": (dense(3, 16), stacked(dense(16, 16), 5), dense(16, 2))},
        ("couples nothing",),
        "gs.scanned('layers/1/')",
    ),
    "a prefix that the tree has not": Case(
        gs.scanned("params/blocks/"),
        {"blocks": stacked(block(), 3), "head": dense(4, 9)},
        ("matched none",),
        "gs.scanned('blocks/')",
    ),
    "dotted names by a pattern for others": Case(
        gs.unrolled(r"layers_(\d+)/"),
        {f"model.layers.{i}.mlp.weight": jnp.ones((4, 4)) for i in range(3)},
        ("matched none",),
        r"gs.unrolled(r'layers/(\d+)/')",
    ),
    # A part of the layers is left out.
    "numbers of one digit": Case(
        gs.unrolled(r"Block_(\d)/"),
        many("Block_{}", 12),
        ("leaves out layers 10, 11",),
        r"gs.unrolled(r'Block_(\d+)/')",
    ),
    "a first layer without a number": Case(
        gs.unrolled(r"block_(\d+)/"),
        haiku("linear", "linear_1"),
        ("leaves out layer 0", "net/block"),
        r"gs.unrolled(r'block(?:_(\d+))?/')",
    ),
    "one stack of two": Case(
        gs.unrolled(r"encoder/layers_(\d+)/"),
        {"encoder": many("layers_{}"), "decoder": many("layers_{}", 4)},
        ("leaves out all of decoder/layers_0",),
        r"gs.unrolled(r'layers_(\d+)/')",
    ),
    "a scanned stack beside an unrolled one": Case(
        gs.scanned("decoder/blocks/"),
        {
            "encoder": {"layers": entries()},
            "decoder": {"blocks": stacked(block(), 5)},
            "embed": jnp.ones((9, 4)),
        },
        ("leaves out all of encoder/layers/0",),
        r"gs.first_match(gs.scanned('blocks/'), gs.unrolled(r'layers/(\d+)/'))",
    ),
    "an unrolled stack beside a scanned one, by itself": Case(
        UNROLLED,
        {
            "encoder": {"layers": entries()},
            "decoder": {"blocks": stacked(block(), 5)},
            "embed": jnp.ones((9, 4)),
        },
        ("leaves out all of decoder/blocks",),
        r"gs.first_match(gs.scanned('blocks/'), gs.unrolled(r'layers/(\d+)/'))",
    ),
    "a preset that takes the layers in each block": Case(
        gs.layouts.equinox(),
        {
            "blocks": [
                {**block(), "mlp": {"layers": [dense(), dense()]}} for _ in range(3)
            ]
        },
        ("does not couple blocks/0/mlp/layers/0/bias with blocks/1/mlp",),
        r"gs.unrolled(r'blocks/(\d+)/')",
    ),
    "DeepSeek's tree by the plain preset": Case(
        gs.layouts.maxtext(),
        {"decoder": {"dense_layers": LAYERS, "moe_layers": maxtext(5, axis=1)}},
        ("matched none",),
        "gs.layouts.maxtext_deepseek(num_dense=3)",
    ),
    # Other things than layers are coupled.
    "counterparts of stages": Case(
        gs.unrolled(r"stage_(\d+)/"),
        {f"stage_{s}": many("block_{}") for s in range(2)},
        ("does not couple stage_0/block_0/attn/bias with stage_0/block_1/attn/bias",),
        r"gs.unrolled(r'block_(\d+)/')",
    ),
    "counterparts of two models": Case(
        gs.unrolled(r"^(\d+)/"),
        ({"layers": entries()}, {"layers": entries()}),
        ("does not couple 0/layers/0/attn/bias",),
        r"gs.unrolled(r'layers/(\d+)/')",
    ),
    "twin critics": Case(
        gs.unrolled(r"Critic_(\d+)/"),
        {f"Critic_{c}": mlp() for c in range(2)},
        ("couples Critic_0", "side by side", "No call was found"),
    ),
    "experts": Case(
        gs.unrolled(r"experts/(\d+)/"),
        {"moe": {"experts": entries()}},
        ("couples moe/experts/0", "side by side"),
    ),
    "an ensemble that vmap stacked": Case(
        gs.scanned("VmapQ_0/"),
        {"VmapQ_0": stacked(mlp(), 2)},
        ("ensemble",),
    ),
    "a norm and a linear layer of a list": Case(
        gs.layouts.flax_nnx(),
        {
            "stem": {
                "layers": [dense(4, 4), {"scale": jnp.ones(4), "bias": jnp.ones(4)}]
            },
            "body": {"layers": entries()},
        },
        ("couples stem/layers/0/bias, stem/layers/1/bias",),
    ),
    # Layers of their own, axes over layers: the other way round.
    "a list by scanned": Case(
        gs.scanned("layers/"),
        {"layers": entries()},
        ("4 in layers/0/attn/bias", "8 in layers/0/fc/bias"),
        r"gs.unrolled(r'layers/(\d+)/')",
    ),
    "a list of matrices by scanned": Case(
        gs.scanned("blocks/"),
        {"blocks": digits(make=lambda: {"kernel": jnp.ones((4, 2))})},
        ("takes axis 0 of leaf blocks/0/kernel",),
        r"gs.unrolled(r'blocks/(\d+)/')",
    ),
    "stacked layers by themselves": Case(
        UNROLLED,
        {"blocks": stacked(block(), 5), "embed": jnp.ones((9, 4))},
        ("matched none",),
        "gs.scanned('blocks/')",
    ),
    "a stacked cycle by itself": Case(
        UNROLLED,
        {"decoder": {"layers": many("layers_{}", 6, lambda: LAYERS)}},
        ("matched none",),
        r"gs.scanned(r'layers_(\d+)/', axis=1, stride=6)",
    ),
    "a stacked cycle by unrolled": Case(
        gs.unrolled(r"layers_(\d+)/"),
        {"decoder": {"layers": many("layers_{}", 6, lambda: LAYERS)}},
        ("takes no axis", "layers are on axis 1"),
        r"gs.scanned(r'layers_(\d+)/', axis=1, stride=6)",
    ),
    "each position of a cycle by itself": Case(
        gs.scanned("decoder/layers/", axis=1),
        {"decoder": {"layers": many("layers_{}", 6, lambda: LAYERS)}},
        ("does not couple decoder/layers/layers_0",),
        r"gs.scanned(r'layers_(\d+)/', axis=1, stride=6)",
    ),
    "the layers of one kind": Case(
        gs.layouts.maxtext(),
        {"decoder": {"layers": GEMMA2}},
        ("layers of one kind", "global, local"),
        "gs.layouts.maxtext_gemma2()",
    ),
    # Wrong axes.
    "the model's width": Case(
        gs.scanned("layers/", axis=1),
        wide("pos", "tok", "out"),
        ("takes axis 1 of leaf decoder/layers/attn", "on axis 0"),
        "gs.scanned('layers/')",
    ),
    "the model's width, of all of the decoder": Case(
        gs.scanned("decoder/", axis=1),
        wide("pos", "tok", "out"),
        ("takes axis 1 of leaf decoder/layers/attn", "on axis 0"),
        "gs.scanned('layers/')",
    ),
    "a pattern that is a bit too wide": Case(
        gs.scanned("decoder/"),
        wide("pos", "tok", "out"),
        ("6 in decoder/layers/attn", "128 in decoder/pos"),
        "gs.scanned('layers/')",
    ),
    "another axis under only": Case(
        gs.scanned("layers/", axis=1).only(lambda path, leaf: "attn" in path),
        wide("pos", "tok", "out"),
        ("takes axis 1 of leaf decoder/layers/attn", "on axis 0"),
    ),
    "one axis of two": Case(
        gs.scanned("pipeline_module/layers/"),
        {"decoder": {"pipeline_module": {"layers": maxtext(2, 4)}}},
        ("vectors have 2 axes beside their own",),
    ),
    # The depth that a spec asserts.
    "another depth": Case(
        gs.unrolled(r"layers_(\d+)/", num_layers=5),
        many("layers_{}", 4),
        ("num_layers=5", "'layers' has 4", "1 in layers_0/attn/bias"),
    ),
    "another depth of a scan": Case(
        gs.scanned("layers/", axis=1, num_layers=6),
        wide("pos", "tok", "out"),
        ("num_layers=6", "has 16"),
    ),
    "another depth of a preset": Case(
        gs.layouts.hf_flax(num_layers=12),
        {"h": digits(3)},
        ("num_layers=12", "'h' has 3"),
    ),
    "a first module without a number": Case(
        gs.unrolled(r"linear_(\d+)"),
        {f"net/linear{n}": {"w": jnp.ones((4, 4))} for n in ("", "_1", "_2")},
        ("leaves out layer 0",),
        r"gs.unrolled(r'linear(?:_(\d+))?/')",
    ),
    "parts of stacked layers": Case(
        gs.unrolled(r"experts/(\d)/"),
        {"layers": stacked({"attn": dense(), "experts": entries(4, dense)}, 3)},
        ("couples layers/experts/0/bias with layers/experts/1/bias, which are in one",),
    ),
    "neither of two readings": Case(
        gs.unrolled(r"fc(\d)/"),
        {
            f"block{s}": many("unit{}", 3, lambda: {"fc1": dense(), "fc2": dense()})
            for s in (1, 2, 3)
        },
        ("does not couple block1",),
    ),
    "a first layer without a number or a separator": Case(
        gs.unrolled(r"layer(\d+)/"),
        {f"layer{n}": block() for n in ("", 1, 2, 3)},
        ("leaves out layer 0",),
        r"gs.unrolled(r'layer(\d+)?/')",
    ),
    "one of two stacks that are not called layers": Case(
        gs.scanned("a/"),
        {"a": stacked(block(), 3), "b": stacked(block(), 5), "embed": jnp.ones((9, 4))},
        ("leaves out all of b",),
    ),
    "a pattern of everything": Case(
        gs.scanned(".*"),
        {"blocks": stacked(block(), 3), "embed": jnp.ones((9, 4))},
        ("takes axis 0 of leaf embed", "too wide"),
        "gs.scanned('blocks/')",
    ),
    "one layer that a mask leaves": Case(
        UNROLLED,
        {"layers": [optax.MaskedNode(), block(), optax.MaskedNode()]},
        ("couples nothing", "layers/0 … layers/2: 3 siblings"),
    ),
    # Two numbers that may be the layer's.
    "layers of layers": Case(
        UNROLLED,
        {f"layers_{i}": many("layers_{}") for i in range(2)},
        ("two numbers", r"r'layers_\(\\d\+\)/layers_|r'layers_0/layers_\(\\d\+\)/'"),
    ),
    "units of blocks": Case(
        UNROLLED,
        {f"block{s}": many("unit{}") for s in (1, 2, 3)},
        ("two numbers", r"block\(\\d\+\)/", r"unit\(\\d\+\)/"),
    ),
    "two readings, of which a call takes a part": Case(
        gs.unrolled(r"layers_0/blocks_(\d)/"),
        {f"layers_{i}": many("blocks_{}", 2, dense) for i in range(3)},
        ("leaves out layers 1, 2",),
    ),
    "one of several stages of two readings": Case(
        gs.unrolled(r"layer1/(\d+)/"),
        {
            f"layer{s}": digits(3, lambda s=s: {"conv1": conv(s), "conv2": conv(s)})
            for s in (1, 2, 3)
        },
        ("leaves out all of layer2", "leaves out all of layer3"),
    ),
    # Parts of the same layers in lists of their own.
    "lists of parts": Case(
        UNROLLED,
        {
            "attn_layers": entries(4, lambda: {q: dense() for q in "qkv"}),
            "ff_layers": entries(4, lambda: {"up": dense(4, 8), "down": dense(8, 4)}),
            "norm_layers": entries(4, lambda: {"scale": jnp.ones(4)}),
        },
        ("leaves out ff_layers, norm_layers",),
        r"gs.first_match(gs.unrolled(r'attn_layers/(\d+)/'), "
        r"gs.unrolled(r'ff_layers/(\d+)/'), gs.unrolled(r'norm_layers/(\d+)/'))",
    ),
    "a list of biases beside one of weights": Case(
        gs.unrolled(r"weights/(\d+)"),
        {"weights": [jnp.ones((4, 4))] * 3, "biases": [jnp.ones(4)] * 3},
        ("leaves out biases",),
        r"gs.first_match(gs.unrolled(r'biases/(\d+)(?:/|$)'), "
        r"gs.unrolled(r'weights/(\d+)(?:/|$)'))",
    ),
    "a list of weights by scanned": Case(
        gs.scanned("weights/"),
        {"weights": [jnp.ones((4, 4))] * 3},
        ("takes axis 0 of leaf weights/0",),
        r"gs.unrolled(r'weights/(\d+)(?:/|$)')",
    ),
    "a list of an unknown name beside layers": Case(
        UNROLLED,
        {"idioms": entries(4, lambda: {"d": dense(), "n": conv(4)})}
        | {"layers": entries(3)},
        ("leaves out all of idioms", "but not called layers"),
    ),
    "the layers in a part of the model": Case(
        UNROLLED,
        {"encoder": {"layers": entries(3)}, "mlp": {"layers": entries(3, dense)}},
        ("leaves out all of mlp/layers",),
    ),
    # Where no vector tells the axis.
    "an axis of square matrices": Case(
        gs.scanned("blocks/attn/", axis=1),
        {
            "blocks": stacked({"attn": {q: jnp.ones((8, 8)) for q in "qkvo"}}, 4),
            "embed": jnp.ones((9, 8)),
        },
        ("takes axis 1 of leaf blocks/attn/k", "on axis 0"),
    ),
    "an axis where the vectors are masked": Case(
        gs.scanned("layers/", axis=2),
        {
            "layers": {"q": {"kernel": jnp.ones((4, 8, 8)), "bias": optax.MaskedNode()}}
            | {"k": {"kernel": jnp.ones((4, 8, 8)), "bias": optax.MaskedNode()}},
            "embed": jnp.ones((9, 8)),
        },
        ("takes axis 2 of leaf layers/", "on axis 0"),
    ),
    "the rank of an adapter": Case(
        gs.scanned("lora_a", axis=1),
        {
            "layers": {
                "q": {"lora_a": jnp.ones((6, 8, 2)), "lora_b": jnp.ones((6, 2, 8))}
            }
        },
        ("takes axis 1 of leaf layers/q/lora_a", "on axis 0"),
    ),
    # What stands beside a stack and happens to be as long.
    "positions beside the layers": Case(
        gs.scanned("encoder/"),
        {"encoder": {"layers": stacked(block(), 3), "pos": jnp.ones((3, 9))}},
        ("takes axis 0 of leaf encoder/pos", "too wide"),
        "gs.scanned('layers/')",
    ),
    "the end of another name": Case(
        gs.scanned("h/"),
        {"h": stacked(block(), 3), "patch": {"kernel": jnp.ones((3, 9))}}
        | {"embed": jnp.ones((9, 4))},
        ("takes axis 0 of leaf patch/kernel", "too wide"),
        "gs.scanned('^h/')",
    ),
    "critics that vmap stacked": Case(
        gs.scanned("critic/"),
        {
            "actor": many("Dense_{}", 3, dense),
            "critic": stacked(many("Dense_{}", 3, dense), 2),
        },
        ("probably of an ensemble",),
    ),
    "kinds of layers whose axis square matrices do not tell": Case(
        "maxtext",
        {
            "decoder": {
                "layers": {
                    f"{part}_{kind}": {"kernel": jnp.ones((8, 3, 8))}
                    for part in ("attn", "mlp")
                    for kind in ("local", "global")
                }
            },
            "embed": jnp.ones((9, 8)),
        },
        ("layers of one kind",),
        "gs.layouts.maxtext_gemma2()",
    ),
    "layers of two kinds of modules": Case(
        gs.ranked(gs.unrolled(r"net/(\d+)/")),
        {
            "net": {
                n: {"weight": jnp.ones((8, 8, 3, 3)[: 4 - 3 * (n in "14")])}
                | {"bias": jnp.ones(8)}
                for n in "0134"
            }
        },
        ("couples net/0/bias with net/1/bias", "another kind of module"),
    ),
    "a function that sorts names by their letters": Case(
        lambda path, leaf: gs.Depth(
            "m", path[1:], sorted(many("layers_{}", 12)).index(path[0])
        ),
        many("layers_{}", 12),
        ("another order than their numbers: layers_9",),
        r"gs.unrolled(r'layers_(\d+)/')",
    ),
    "the width of what is not stacked": Case(
        gs.scanned("layers/"),
        {"layers": {"attn": dense(8, 8), "norm": {"scale": jnp.ones(8)}}},
        (r"takes axis 0 of leaf layers/attn/bias \(8,\).*not stacked",),
    ),
    "the width of a list that is not stacked": Case(
        gs.scanned("experts/"),
        {"trunk": dense(), "experts": entries(4, lambda: dense(8, 8))},
        ("takes axis 0 of leaf experts/0/bias",),
    ),
    "numbers inside of names": Case(
        gs.unrolled(r"h(\d)_"),
        {f"net/h{i}_{m}": dense() for i in range(12) for m in ("attn", "mlp", "ln_1")},
        ("leaves out net/h1[01]_attn/bias",),
    ),
    "a first name without the number inside": Case(
        gs.unrolled(r"h(\d+)_"),
        {f"net/h{i}_{m}": dense() for i in ("", 1, 2) for m in ("attn", "mlp")},
        ("leaves out net/h_attn/bias",),
    ),
    "a first layer that is called so": Case(
        gs.unrolled(r"^block_(\d+)/"),
        {f"{name}": block() for name in ("first_block", "block_1", "block_2")},
        ("leaves out layer 0",),
    ),
    "blocks of a U-Net": Case(
        UNROLLED,
        {
            f"down_{i}": many(
                "res_{}", 2, lambda: {f"block{j}": block() for j in (1, 2)}
            )
            for i in range(2)
        },
        ("two numbers",),
    ),
    "norms of one stacked layer": Case(
        gs.scanned(r"ln_(\d)/", stride=2),
        {
            "layers": {f"ln_{i}": {"scale": jnp.ones((6, 8))} for i in (1, 2)}
            | {"w": {"kernel": jnp.ones((6, 8, 8))}},
            "embed": jnp.ones((9, 8)),
        },
        ("couples layers/ln_1/scale with layers/ln_2/scale, which are in one layer",),
        "gs.scanned('layers/')",
    ),
    "a first layer without a number, and a second one": Case(
        gs.unrolled(r"layer_(\d+)/"),
        {f"layer{n}": block() for n in ("", "_2", "_3")},
        ("leaves out layer 0",),
    ),
    "the last norm, which is as wide as the model is deep": Case(
        gs.scanned("layers"),
        {
            "layers": {"w": jnp.ones((12, 16, 12)), "b": jnp.ones((12, 12))},
            "layers_norm": {"scale": jnp.ones(12)},
            "embed": jnp.ones((9, 16)),
        },
        ("takes axis 0 of leaf layers_norm/scale", "too wide"),
    ),
    "counterparts of which a mask leaves one": Case(
        gs.unrolled(r"^(\d+)/"),
        [
            {"layers": [dense(), *[dict.fromkeys(dense(), optax.MaskedNode())] * 3]}
            for _ in range(3)
        ],
        ("3 siblings with layers inside",),
    ),
    "the networks of twins": Case(
        UNROLLED,
        {name: many("Dense_{}", 4, dense) for name in ("q1", "q2")},
        (r"if those are the layers, write `gs.unrolled\(r'Dense_",),
    ),
    # Not the parameters.
    "a module": Case(UNROLLED, object(), ("one leaf of type object", "parameters")),
    # Layers that alternate.
    "a mixture of experts in every second layer": Case(
        UNROLLED,
        {
            f"layers_{i}": {"attn": dense(), ("moe" if i % 2 else "mlp"): dense()}
            for i in range(4)
        },
        ("several kinds alternate", "layer 1 holds layers_1/moe/bias", "ranked"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_probably_wrong_is_said_with_a_call_that_helps(name):
    depth, tree, words, call = CASES[name]
    found = said(depth, tree)
    assert found, "silent"
    for word in words:
        assert any(re.search(word, text) for text in found), found
    if call is not None:
        assert f"`{call}`" in found[0]
        assert said(eval(call, {"gs": gs}), tree) == []
        assert gs.describe(eval(call, {"gs": gs}), tree).smoothed > 0


@pytest.mark.parametrize("name", CASES)
def test_describe_says_what_init_says(name):
    depth, tree, _, _ = CASES[name]
    summary, found = gs.describe(depth, tree), said(depth, tree)
    assert [summary.problem] * bool(summary.problem) + list(summary.doubts) == found
    for text in found:
        assert text in str(summary)


SILENT = {
    "one layer": (UNROLLED, {"layers_0": block(), "head": dense()}),
    "a restriction to one stack": (
        gs.unrolled(r"layers_(\d+)/").only(lambda path, leaf: "encoder" in path),
        {"encoder": many("layers_{}"), "decoder": many("layers_{}", 4)},
    ),
    "a boundary that was set on purpose": (
        lambda path, leaf: gs.Depth(path[0] > "layers_1", path[1:], int(path[0][-1])),
        many("layers_{}", 4),
    ),
    "the layers of an MLP by their names": (
        gs.unrolled(r"Dense_(\d+)/"),
        {"MLP_0": many("Dense_{}", 3, dense)},
    ),
    "a function that joins two stacks": (
        lambda path, leaf: gs.Depth(
            "all", path[2:], int(path[1][-1]) + 3 * (path[0] == "out")
        ),
        {"in": many("blocks_{}"), "out": many("blocks_{}")},
    ),
    "streams of one layer": (
        UNROLLED,
        {
            f"Block_{i}": {
                f"{part}_{stream}": dense()
                for part in ("attn", "mlp")
                for stream in ("img", "txt")
            }
            for i in range(3)
        },
    ),
    "single modules of one layer each": (
        UNROLLED,
        {"params": {f"Block_{i}": {"Dense_0": dense()} for i in range(3)}},
    ),
    "the layers of an MLP that is all there is": (
        UNROLLED,
        {"mlp": {"layers": entries(3, dense)}},
    ),
    "layers beside tables": (
        UNROLLED,
        {
            "tables": [jnp.ones((9, 4))] * 3,
            "wide": {"stem_0": dense(), "stem_1": dense()},
            "blocks": entries(3),
        },
    ),
    "layers beside lists of others": (
        gs.unrolled(r"layers/(\d+)/"),
        {"languages": entries(4, dense), "layers": entries(3)},
    ),
    "layers on the last axis": (
        gs.scanned("layers/", axis=-1),
        {
            "layers": {
                "w": {"kernel": jnp.ones((8, 16, 5))},
                "n": {"scale": jnp.ones((8, 5))},
            },
            "embed": jnp.ones((9, 8)),
        },
    ),
    "two of Haiku's layer stacks": (
        gs.layouts.haiku(layer_stack=True),
        {
            f"__layer_stack_no_per_layer{i}/block/{name}": {"w": jnp.ones((3, 4, 4))}
            for i in ("", "_1")
            for name in ("linear", "linear_1")
        },
    ),
    "a leaf beside the layers that the pattern names": (
        gs.scanned("layers/|lambdas"),
        {"layers": stacked(block(), 3), "lambdas": jnp.ones(3), "out": jnp.ones(9)},
    ),
    "the layers of models that vmap stacked": (
        UNROLLED,
        {"ensemble": stacked({"layers": digits(4)}, 3)},
    ),
    "adapters in some of the layers": (
        gs.ranked(gs.unrolled()),
        {
            "layers": [
                {"q": {"kernel": jnp.ones((4, 4))}}
                | ({"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))} if i % 2 else {})
                for i in range(4)
            ]
        },
    ),
    "stacked adapters alone, of which `b` is no bias": (
        gs.scanned("blocks/"),
        {"blocks": {"q": {"a": jnp.ones((7, 16, 4)), "b": jnp.ones((7, 4, 16))}}},
    ),
    "a function that counts from the last layer": (
        lambda path, leaf: gs.Depth("m", path[1:], 3 - int(path[0][-1])),
        many("layers_{}", 4),
    ),
    "convolutions without a bias": (
        gs.unrolled(r"conv_layers/(\d+)/"),
        {"conv_layers": entries(6, lambda: {"kernel": jnp.ones((3, 3, 8, 8))})},
    ),
    "Haiku's norms of images": (
        gs.unrolled(r"res_block(?:_(\d+))?/"),
        {
            f"res_block{i}": {
                "conv2_d": {"w": jnp.ones((3, 3, 8, 8))},
                "batch_norm": {"scale": jnp.ones((1, 1, 1, 8))},
            }
            for i in ("", "_1", "_2")
        },
    ),
    "a frozen tower": (
        UNROLLED,
        {
            "text": {"layers": entries(4)},
            "vision": {
                "layers": jax.tree.map(lambda _: optax.MaskedNode(), entries(4))
            },
        },
    ),
    "functions between layers": (
        gs.ranked(UNROLLED),
        {"layers": [dense(), {"fn": None}, dense(), {"fn": None}, dense()]},
    ),
    "one stacked layer": (gs.scanned("layers/"), {"layers": stacked(block(), 1)}),
    "a cycle and what remains after it": (
        gs.layouts.maxtext(cycle=2, num_cycles=3),
        {
            "decoder": {
                "layers": many("layers_{}", 2, lambda: LAYERS),
                "layers_remainder": many("layers_{}", 1, maxtext),
            }
        },
    ),
    "the number of layers that there are": (
        gs.layouts.hf_flax(num_layers=3),
        {"h": digits(3)},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_right_or_meant_is_not_doubted(name):
    assert said(*SILENT[name]) == []


def test_detect_joins_a_cycle_and_what_remains_after_it():
    _, tree = SILENT["a cycle and what remains after it"]
    rest = many("layers_{}", 2, maxtext)
    tree = {"decoder": tree["decoder"] | {"layers_remainder": rest}}
    spec = gs.detect(tree).spec
    for group in gs.describe(spec, tree).groups:
        assert group.layers == tuple(range(8))


@pytest.mark.parametrize(
    "options", ["cycle=3", "cycle=2, num_cycles=2", "cycle=2, num_cycles=4"]
)
def test_a_wrong_length_or_number_of_cycles_is_an_error_with_the_right_call(options):
    decoder = {"layers": many("layers_{}", 2, lambda: LAYERS)}
    decoder["layers_remainder"] = many("layers_{}", 2, maxtext)
    tree = {"decoder": decoder}
    with pytest.raises(ValueError, match="To fix: write `") as error:
        gs.smooth_over_depth(f"maxtext({options})").init(tree)
    call = str(error.value).split("To fix: write `")[1].split("`; or")[0]
    spec = eval(call, {"gs": gs})
    for group in gs.describe(spec, tree).groups:
        assert group.layers == tuple(range(8))


def test_a_masked_part_of_a_tree_is_grouped_as_the_whole_tree_or_not_at_all():
    tree = {"net2": many("layers_{}", 4), "wi_0": dense(), "wi_1": dense()}
    whole = gs.describe(UNROLLED, tree)
    layers = {group.stack: group.layers for group in whole.groups}
    for mask in (
        {"net2": {f"layers_{i}": i != 1 for i in range(4)}, "wi_0": True, "wi_1": True},
        {"net2": dict.fromkeys(tree["net2"], False), "wi_0": True, "wi_1": True},
        {"net2": {f"layers_{i}": i > 1 for i in range(4)}, "wi_0": False, "wi_1": True},
    ):
        tx = optax.masked(gs.smooth_over_depth(UNROLLED, 0.2), mask)
        kept = jax.tree.map(
            lambda m, x: x if m else optax.MaskedNode(),
            mask,
            tree,
            is_leaf=lambda m: isinstance(m, bool),
        )
        part = gs.describe(UNROLLED, kept)
        for group in part.groups:
            assert set(group.layers) <= set(layers[group.stack])
        if part.problem:
            with pytest.raises(ValueError, match=r"masked or frozen|matched none"):
                tx.init(tree)
        else:
            tx.init(tree)


def test_the_same_warning_is_given_once_for_each_transformation():
    tree = many("Block_{}", 12)

    def count(tx, function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(tx)
        return len(caught)

    def updated(tx):
        tx.update(tree, optax.EmptyState())

    tx = gs.smooth_over_depth(gs.unrolled(r"Block_(\d)/"), 0.2)
    assert [count(tx, lambda tx: tx.init(tree)), count(tx, updated)] == [1, 0]
    tx = gs.smooth_over_depth(gs.unrolled(r"Block_(\d)/"), 0.2)
    assert [count(tx, updated), count(tx, updated)] == [1, 0]


# -- Names survive ---------------------------------------------------------------------


def test_integer_and_string_keys_mean_the_same_layers():
    numbers = {"layers": {i: block() for i in range(11)}}
    strings = {"layers": {str(i): block() for i in range(11)}}
    for spec in (UNROLLED, gs.layouts.flax_nnx(), gs.ranked(UNROLLED)):
        one, other = (gs.describe(spec, tree).groups for tree in (numbers, strings))
        assert {(g.stack, g.role, g.layers) for g in one} == {
            (g.stack, g.role, g.layers) for g in other
        }


def test_keys_that_are_paths_are_read_as_paths():
    trees = {
        "dotted": {f"model.layers.{i}.mlp.weight": jnp.ones((2, 2)) for i in range(3)},
        "slashes": {
            f"model/layers/{i}/mlp": {"weight": jnp.ones((2, 2))} for i in range(3)
        },
        "tuples": {
            ("model", "layers", str(i), "mlp", "weight"): jnp.ones((2, 2))
            for i in range(3)
        },
        "tuples of numbers": {
            ("model", "layers", i, "mlp", "weight"): jnp.ones((2, 2)) for i in range(3)
        },
    }
    for tree in trees.values():
        (group,) = gs.describe(UNROLLED.only_projections(), tree).groups
        assert (group.stack, group.role) == ("model/layers", "mlp/weight")
        assert group.layers == (0, 1, 2)


def test_negative_numbers_are_numbers():
    updates = {i: {"w": jnp.array([float(i)])} for i in range(-2, 3)}
    tx = gs.smooth_over_depth(UNROLLED, 0.5)
    new, _ = tx.update(updates, tx.init(updates))
    found = [float(new[i]["w"][0]) for i in range(-2, 3)]
    assert found == [-1.75, -1.0, 0.0, 1.0, 1.75]


@pytest.mark.parametrize(
    "tree",
    [
        {f"m\u00b2{i}": {"w": jnp.ones(2)} for i in range(3)},
        {"1" * 5000: jnp.ones(2), "l0": {"w": jnp.ones(2)}, "l1": {"w": jnp.ones(2)}},
        {
            "1" * 8000 + "x": jnp.ones(2),
            "l0": {"w": jnp.ones(2)},
            "l1": {"w": jnp.ones(2)},
        },
    ],
    ids=["a superscript", "thousands of digits", "thousands of digits and a letter"],
)
def test_names_of_all_kinds_are_names(tree):
    (group,) = gs.describe(UNROLLED, tree).groups
    assert said(UNROLLED, tree) == []
    assert group.num_layers > 1


def test_a_number_of_thousands_of_digits_is_no_layer_number():
    with pytest.raises(ValueError, match="too large"):
        gs.describe(
            gs.unrolled(r"layer_(\d+)/"), {f"layer_{'1' * 5000}/w": jnp.ones(2)}
        )


def test_a_stride_fits_into_32_bits():
    with pytest.raises(ValueError, match="`stride`"):
        gs.scanned("b", stride=2**63)


def test_a_lone_array_is_passed_on_where_nothing_has_to_match():
    lone = jnp.ones(3)
    for depth in (UNROLLED, gs.scanned("blocks/"), lambda path, leaf: None):
        tx = gs.smooth_over_depth(depth, 0.2, strict=False)
        assert tx.update(lone, tx.init(lone))[0] is lone
