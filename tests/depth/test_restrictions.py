"""Restrictions take what they name in any layout: projections, or by path and shape."""

import jax
import jax.numpy as jnp
import judge
import notation
import pytest

import gradsmooth_optax as gs


def described(reader, name, restrict):
    params = notation.built(notation.all_trees()[name])
    return gs.describe(restrict(judge.spec_of(reader, params)), params)


def roles(summary):
    return {group.role for group in summary.groups}


VIT = "MultiHeadDotProductAttention_0"
# (tree, reader): the roles that are linear maps, and the biases beside these.
PROJECTIONS = {
    # A stacked norm has rank 2, and a bias of attention rank 2 per layer.
    ("maxtext-scanned-axis-1", "maxtext()"): (
        "self_attention/query/kernel mlp/wo/kernel",
        "self_attention/query/bias",
    ),
    (
        "maxtext-pipeline-repeats-stages-and-layers",
        "gs.scanned('scanned_layers/', axis=(0, 1, 3))",
    ): ("self_attention/query/kernel", "self_attention/query/bias"),
    # Experts have no "kernel" in their path.
    ("maxtext-mixtral-experts-on-axis-0", "maxtext()"): (
        "self_attention/query/kernel MoeBlock_0/wi_0 MoeBlock_0/gate/kernel",
        "self_attention/query/bias",
    ),
    ("maxtext-gpt-oss-cycle-of-2", "maxtext(cycle=2)"): (
        "GptOssAttention/query/kernel GptOssMlp/wi_0 GptOssMlp/gate/kernel",
        "GptOssAttention/query/bias GptOssMlp/wi_0_bias",
    ),
    ("maxtext-qwen3-next-cycle-of-4", "ranked(maxtext(cycle=4))"): (
        "attention/attention/query/kernel attention/in_proj_qkvz/kernel "
        "mlp/routed_experts/wi_0 mlp/routed_experts/gate/kernel",
        "",
    ),
    # The MLP's weights are called gating_einsum and linear.
    ("gemma3", "gemma()"): (
        "attn/q_einsum/w attn/kv_einsum/w mlp/gating_einsum mlp/linear",
        "",
    ),
    ("big-vision-paligemma-scan", "big_vision()"): (
        "attn/q_einsum/w attn/kv_einsum/w mlp/gating_einsum mlp/linear "
        f"{VIT}/query/kernel {VIT}/out/kernel MlpBlock_0/Dense_0/kernel",
        f"{VIT}/query/bias {VIT}/out/bias MlpBlock_0/Dense_0/bias",
    ),
    # Scales of norms are called kernel or weight.
    ("easylm-llama", "hf_flax()"): (
        "attention/wq/kernel feed_forward/w1/kernel feed_forward/w2/kernel",
        "",
    ),
    ("hf-llama", "hf_flax()"): ("self_attn/q_proj/kernel mlp/down_proj/kernel", ""),
    ("levanter-stacked", "levanter()"): (
        "self_attn/q_proj/weight mlp/up_proj/weight",
        "",
    ),
    # An embedding table is inside of the stack.
    ("t5x-scanned", "t5x()"): (
        "attention/query/kernel mlp/wi_0/kernel mlp/wi_1/kernel "
        "encoder_decoder_attention/query/kernel",
        "",
    ),
    ("haiku-made-in-call", "haiku()"): ("linear/w linear_1/w", ""),
    ("equinox-filter-vmap", "equinox(scan_axis=0)"): ("linear/weight", "linear/bias"),
}


@pytest.mark.parametrize("tree", PROJECTIONS, ids=lambda tree: tree[0])
def test_only_projections_takes_linear_weights_and_their_biases(tree):
    name, reader = tree
    matrices, biases = (set(text.split()) for text in PROJECTIONS[tree])
    for bias, expected in ((True, matrices | biases), (False, matrices)):
        found = described(reader, name, lambda s, b=bias: s.only_projections(bias=b))
        assert roles(found) == expected


@pytest.mark.parametrize("reader", ["gs.unrolled()", "scan 0", "scan 1"])
def test_low_rank_pairs_are_projections_wherever_they_are_stacked(reader):
    layer = {
        "query": {"kernel": (3, 4), "kernel_lora_a": (3, 2), "kernel_lora_b": (2, 4)},
        "value": {"lora_a": (3, 2), "lora_b": (2, 4)},
        "pos_embedding": {"kernel": (3, 4)},
        "table": {"embedding": (3, 4)},
        "norm": {"scale": (3,)},
    }
    layer["query"]["bias"] = (4,)
    spec, tree = gs.unrolled(), {f"layers_{i}": layer for i in range(3)}
    if reader != "gs.unrolled()":
        axis = int(reader[-1])
        spec, tree = gs.scanned("layers/", axis=axis), {"layers": layer}

    def leaf(shape):
        at = shape if reader == "gs.unrolled()" else (*shape[:axis], 5, *shape[axis:])
        return jax.ShapeDtypeStruct(at, jnp.float32)

    tree = jax.tree.map(leaf, tree, is_leaf=lambda node: isinstance(node, tuple))
    pairs = {"query/kernel", "query/kernel_lora_a", "query/kernel_lora_b"}
    pairs |= {"value/lora_a", "value/lora_b"}
    for bias, expected in ((True, pairs | {"query/bias"}), (False, pairs)):
        assert roles(gs.describe(spec.only_projections(bias), tree)) == expected


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("maxtext-gemma3-cycles-and-remainder", "maxtext(cycle=6, num_cycles=4)"),
        ("maxtext-unrolled", "maxtext(scan_axis=None)"),
        ("t5x-scanned", "t5x()"),
    ],
)
def test_a_restriction_leaves_the_groups_that_it_keeps_as_they_are(name, reader):
    def in_mlp(path, leaf):
        return "mlp" in path and leaf.ndim >= 2

    def shown(group):
        layers = [(m.path, m.axes, m.layers.tolist()) for m in group.members]
        return group.stack, group.role, group.shape, layers

    found = described(reader, name, lambda spec: spec.only(in_mlp))
    whole = described(reader, name, lambda spec: spec)
    assert list(map(shown, found.groups)) == [
        shown(group) for group in whole.groups if group.role.startswith("mlp/")
    ]
    assert found.groups
    taken = [path for path, _, _ in whole.untouched]
    left = [path for path, _, _ in found.untouched]
    assert set(taken) < set(left)
    assert len(taken) + sum(len(g.members) for g in whole.groups) == len(left) + sum(
        len(g.members) for g in found.groups
    )
