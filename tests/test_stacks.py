"""Every stack of `stacks.py`: the right neighbors, by hand-written spec and preset."""

import functools

import chex
import jax
import oracle
import pytest
import stacks

import gradsmooth_optax as gs

ALPHA = 0.3


def params(table, preset=False):
    return [
        pytest.param(stack, spec, id=f"{stack.name}{'-preset' if is_preset else ''}")
        for stack in table
        for is_preset, spec in enumerate((stack.spec, stack.preset))
        if spec is not None
    ]


EACH_SPEC = params(stacks.STACKS)
SOME = (
    "maxtext-deepseek-scanned",
    "hf-t5-block-and-layer",
    "uvit-joined",
)


@functools.cache
def case(name):
    """(blocks, tree at init, tree at update): built once for all tests of a stack."""
    stack = stacks.BY_NAME[name]
    if stack.real is not None:
        pytest.importorskip(stacks.MODULES[stack.source])
    chains = stacks.random_blocks(stack)
    tree = stacks.build(stack, chains)
    return chains, tree, stacks.at_update(tree)


def check(stack, depth, **kwargs):
    """The oracle's numbers, and the same objects outside of depth."""
    chains, at_init, updates = case(stack.name)
    tx = gs.smooth_over_depth(depth, ALPHA, **kwargs)
    out, _ = tx.update(updates, tx.init(at_init))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    got = stacks.read(stack, out)
    for chain in {leaf.chain for leaf in stack.leaves if stack.covers(leaf)}:
        expected = oracle.window(chains[chain], ALPHA, ranked=stack.ranked, **kwargs)
        oracle.assert_blocks_close(got[chain], expected)
    before, after = stacks.by_path(updates), stacks.by_path(out)
    for leaf in stack.leaves:
        if not stack.covers(leaf):
            path = stacks.unboxed_path(leaf.path)
            assert after[path] is before[path]
    return updates, out


@pytest.mark.parametrize(("stack", "spec"), EACH_SPEC)
def test_each_layer_is_coupled_with_its_true_neighbors_as_the_oracle_does(stack, spec):
    updates, out = check(stack, spec)
    found, wrong = stacks.coupled_pairs(stack, updates, out, ALPHA)
    covered = {leaf.chain for leaf in stack.leaves if stack.covers(leaf)}
    assert found == {pair for pair in stacks.true_pairs(stack) if pair[0][0] in covered}
    assert not wrong


@pytest.mark.parametrize(
    ("stack", "spec"), params([stacks.BY_NAME[name] for name in SOME])
)
def test_directions_of_whole_blocks_are_smoothed_as_the_oracle_does(stack, spec):
    check(stack, spec, variant="directional", norm_scope="block")


@pytest.mark.parametrize(("stack", "spec"), EACH_SPEC)
def test_the_spec_means_the_same_for_the_trees_of_init_and_update(stack, spec):
    _, at_init, updates = case(stack.name)
    shown = str(gs.describe(spec, at_init))
    assert str(gs.describe(spec, updates)) == shown
    assert str(gs.describe(spec, jax.eval_shape(lambda: at_init))) == shown


# Restrictions.

QUERY = "self_attention/query/kernel"
QUERY_BIAS = "self_attention/query/bias"

# The matrices, and what else their modules hold.
PROJECTIONS = {
    # A stacked norm has rank 2, and a bias of attention rank 2 per layer.
    "maxtext-scanned-axis-1": ({QUERY, "mlp/wo/kernel"}, {QUERY_BIAS}),
    "maxtext-pipeline-repeats-stages-and-layers": ({QUERY}, {QUERY_BIAS}),
    # Experts have no "kernel" in their path.
    "maxtext-mixtral-experts-on-axis-0": (
        {QUERY, "MoeBlock_0/wi_0", "MoeBlock_0/gate/kernel"},
        {QUERY_BIAS},
    ),
    "maxtext-gpt-oss-cycle-of-2": (
        {"GptOssAttention/query/kernel", "GptOssMlp/wi_0", "GptOssMlp/gate/kernel"},
        {"GptOssAttention/query/bias", "GptOssMlp/wi_0_bias"},
    ),
    "maxtext-qwen3-next-cycle-of-4": (
        {
            "attention/attention/query/kernel",
            "attention/in_proj_qkvz/kernel",
            "mlp/routed_experts/wi_0",
            "mlp/routed_experts/gate/kernel",
        },
        set(),
    ),
    # The MLP's weights are called gating_einsum and linear.
    "gemma3": (
        {
            "attn/q_einsum/w",
            "attn/kv_einsum/w",
            "mlp/gating_einsum",
            "mlp/linear",
        },
        set(),
    ),
    "big-vision-paligemma-scan": (
        {
            "attn/q_einsum/w",
            "attn/kv_einsum/w",
            "mlp/gating_einsum",
            "mlp/linear",
            *(role for role in stacks.VIT_BLOCK if role.endswith("kernel")),
        },
        {
            role
            for role in stacks.VIT_BLOCK
            if role.endswith("bias") and "Norm" not in role
        },
    ),
    # Scales of norms are called kernel or weight.
    "easylm-llama": (
        {
            "attention/wq/kernel",
            "feed_forward/w1/kernel",
            "feed_forward/w2/kernel",
        },
        set(),
    ),
    "hf-llama": ({"self_attn/q_proj/kernel", "mlp/down_proj/kernel"}, set()),
    "levanter-stacked": ({"self_attn/q_proj/weight", "mlp/up_proj/weight"}, set()),
    # An embedding table is inside of the stack.
    "t5x-scanned": (
        {role for role in stacks.T5X_DECODER if role.endswith("kernel")},
        set(),
    ),
    "haiku-made-in-call": ({"linear/w", "linear_1/w"}, set()),
    "equinox-filter-vmap": ({"linear/weight"}, {"linear/bias"}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("stack", "matrices", "others"),
    [(stacks.BY_NAME[name], *roles) for name, roles in PROJECTIONS.items()],
    ids=PROJECTIONS,
)
def test_only_projections_takes_linear_weights_and_their_biases(
    stack, matrices, others, bias
):
    spec = stack.spec.only_projections(bias=bias)
    groups = gs.describe(spec, case(stack.name)[1]).groups
    assert {group.role for group in groups} == (matrices | others if bias else matrices)


@pytest.mark.parametrize(
    ("stack", "matrices", "others"),
    [
        (stacks.BY_NAME[name], *PROJECTIONS[name])
        for name in ("maxtext-scanned-axis-1", "maxtext-gpt-oss-cycle-of-2")
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_projections_get_what_they_get_in_the_full_scope(stack, matrices, others):
    _, at_init, updates = case(stack.name)

    def smoothed(depth):
        tx = gs.smooth_over_depth(depth, ALPHA)
        return stacks.by_path(tx.update(updates, tx.init(at_init))[0])

    full, out = smoothed(stack.spec), smoothed(stack.spec.only_projections())
    before = stacks.by_path(updates)
    for leaf in stack.leaves:
        if leaf.role in matrices | others:
            assert (out[leaf.path] == full[leaf.path]).all()
        else:
            assert out[leaf.path] is before[leaf.path]


@pytest.mark.parametrize(
    "name", ["maxtext-gemma3-cycles-and-remainder", "maxtext-unrolled", "t5x-scanned"]
)
def test_only_restricts_by_path_and_shape_in_any_layout(name):
    stack = stacks.BY_NAME[name]
    spec = stack.spec.only(lambda path, leaf: "mlp" in path and leaf.ndim >= 2)
    summary = gs.describe(spec, case(name)[1])
    assert summary.groups
    assert all(group.role.startswith("mlp/") for group in summary.groups)
    paths = {path for path, _, _ in summary.untouched}
    kept = {leaf.path for leaf in stack.leaves} - paths
    assert kept == {
        leaf.path
        for leaf in stack.leaves
        if stack.covers(leaf) and leaf.role.startswith("mlp/")
    }


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_low_rank_pairs_are_projections_wherever_they_are_stacked(axis):
    roles = {
        "query/kernel": (3, 4),
        "query/kernel_lora_a": (3, 2),
        "query/kernel_lora_b": (2, 4),
        "query/bias": (4,),
        "value/lora_a": (3, 2),
        "value/lora_b": (2, 4),
        "pos_embedding/kernel": (3, 4),
        "table/embedding": (3, 4),
        "norm/scale": (3,),
    }
    if axis is None:
        leaves = stacks.each("layers_{}/*", roles, range(3))
    else:
        leaves = stacks.scan("layers/*", roles, range(3), axis)
    spec = gs.unrolled() if axis is None else gs.scanned("layers/", axis=axis)
    stack = stacks.Stack("lora", "", leaves, spec)
    tree = stacks.build(stack, stacks.random_blocks(stack))
    matrices = {role for role in roles if role.startswith(("query/k", "value/"))}
    for bias, expected in ((True, matrices | {"query/bias"}), (False, matrices)):
        groups = gs.describe(spec.only_projections(bias), tree).groups
        assert {group.role for group in groups} == expected


# A preset for the other layout of a stack.


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("maxtext-scanned-axis-1", gs.layouts.maxtext(scan_axis=0)),
        ("maxtext-scanned-axis-1", gs.layouts.maxtext(scan_axis=None)),
        ("maxtext-scanned-axis-0", gs.layouts.maxtext()),
        ("maxtext-unrolled", gs.layouts.maxtext()),
        ("maxtext-llama4-alternating-experts", gs.layouts.maxtext(cycle=4)),
        ("maxtext-llama4-alternating-experts", gs.layouts.maxtext(cycle=2)),
        ("maxtext-gemma4-nested-scans-axis-1", gs.layouts.maxtext()),
        ("maxtext-deepseek-scanned", gs.layouts.maxtext_deepseek(1)),
        ("maxtext-deepseek-scanned", gs.layouts.maxtext_deepseek(3)),
        ("maxtext-deepseek-unrolled", gs.layouts.maxtext_deepseek(2)),
        ("maxtext-gemma2-unrolled-pairs", gs.layouts.maxtext_gemma2()),
        ("maxtext-pipeline-stages-and-layers", gs.layouts.maxtext_pipeline()),
        ("gemma4-alternating-heads", gs.layouts.gemma()),
        ("t5x-scanned", gs.layouts.t5x(scan_axis=0)),
        ("uvit-joined", gs.layouts.uvit(join_at=2)),
        ("uvit-joined", gs.layouts.uvit(join_at=4)),
        ("hf-gpt2", gs.layouts.flax_nnx()),
        ("linen-loop", gs.layouts.flax_linen(scan_axis=0)),
        ("linen-scan-axis-1", gs.layouts.flax_linen(scan_axis=0)),
    ],
)
def test_a_preset_for_another_layout_is_an_error(name, depth):
    _, at_init, _ = case(name)
    with pytest.raises(ValueError, match="depth"):
        gs.smooth_over_depth(depth).init(at_init)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        # Nothing: ScanBlock_0 and block are each one layer, layer 0.
        ("linen-scan-axis-0", gs.layouts.flax_linen()),
        ("haiku-two-layer-stacks", gs.layouts.haiku()),
        # Layer l of each stage with layer l of the next stage.
        ("maxtext-pipeline-unrolled-layers-per-stage", gs.layouts.maxtext_pipeline()),
        # Local layers with local ones.
        ("maxtext-gemma2-scanned-pairs", gs.layouts.maxtext()),
    ],
)
def test_a_preset_for_another_layout_is_not_silent(name, depth):
    _, at_init, _ = case(name)
    with pytest.raises((ValueError, UserWarning)):
        gs.smooth_over_depth(depth).init(at_init)
