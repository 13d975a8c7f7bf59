"""Where depth is: what the specs read from paths, and the specs as values."""

import dataclasses
import inspect
import pickle
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs


def step(depth, updates, operator=0.4, **kwargs):
    tx = gs.smooth_over_depth(depth, operator, **kwargs)
    return tx.update(updates, tx.init(updates))[0]


def leaf(seed, shape=(2, 3)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def nested(path, value):
    for segment in reversed(path):
        value = {segment: value}
    return value


def get(tree, path):
    for segment in path:
        tree = tree[segment]
    return tree


def assert_reads(depth, path, expected, num_layers=3):
    """Asserts that `depth` sees the leaf at `path` as the Depth `expected`.

    The layers around those of the leaf are added as leaves that are declared by hand
    with `expected`'s stack and role: the result is the plain loops' only if the leaf
    has exactly the expected layers of the expected group.
    """
    path = tuple(path.split("/")) if isinstance(path, str) else path
    if expected.axis is None:
        mine = [expected.layer]
    else:
        stride = 1 if expected.stride is None else expected.stride
        mine = [expected.layer + i * stride for i in range(num_layers)]
    first, last = max(min(mine) - 1, 0), max(mine) + 2
    values = {layer: leaf(layer) for layer in range(first, last + 1)}

    def by_hand(path, leaf):
        if path[0] != "by hand":
            return None
        return gs.Depth(expected.stack, expected.role, int(path[1]))

    if expected.axis is None:
        stacked = values[expected.layer]
    else:
        stacked = jnp.stack([values[layer] for layer in mine], axis=expected.axis)
    tree = nested(path, stacked)
    tree["by hand"] = {str(k): v for k, v in values.items() if k not in mine}
    out = step(gs.first_match(by_hand, depth), tree)

    blocks = [{"w": np.asarray(values[k])} for k in sorted(values)]
    result = dict(out["by hand"])
    for i, layer in enumerate(mine):
        mine_out = get(out, path)
        result[str(layer)] = (
            mine_out if expected.axis is None else jnp.take(mine_out, i, expected.axis)
        )
    result = [{"w": result[str(k)]} for k in sorted(values)]
    oracle.assert_blocks_close(result, oracle.window(blocks, 0.4))


def assert_reads_by_itself(depth, path, expected):
    """The same, of the number that `unrolled()` takes, among siblings of the leaf."""
    template, tree = "/".join(path) if isinstance(path, tuple) else path, {}
    number = re.search(r"(?<![0-9])[0-9]+(?![0-9])", template)
    for n in range(int(number[0]) + 1):
        text = template[: number.start()] + str(n) + template[number.end() :]
        node = tree
        *parents, last = text.split("/")
        for segment in parents:
            node = node.setdefault(segment, {})
        node[last] = leaf(n)
    (group,) = gs.describe(depth, tree).groups
    assert (group.stack, group.role) == (expected.stack, expected.role)
    assert group.layers[-1] == expected.layer
    assert group.num_layers == int(number[0]) + 1


CONTRACT = [
    (
        gs.unrolled(r"layers_(\d+)/"),
        "decoder/layers_3/mlp/kernel",
        gs.Depth("decoder/layers", "mlp/kernel", 3),
    ),
    (
        gs.unrolled(r"block(?:_(\d+))?/"),
        "transformer/block/linear/w",
        gs.Depth("transformer/block", "linear/w", 0),
    ),
    (
        gs.scanned("blocks/"),
        "params/blocks/mlp/kernel",
        gs.Depth("params/blocks", "mlp/kernel", axis=0),
    ),
    (
        gs.scanned(r"decoder/layers/layers_(\d+)/", axis=1, stride=6, stack="decoder"),
        "decoder/layers/layers_3/mlp/kernel",
        gs.Depth("decoder", "mlp/kernel", 3, axis=1, stride=6),
    ),
    (
        gs.unrolled(r"layers_remainder/layers_(\d+)/", start=60, stack="decoder"),
        "decoder/layers_remainder/layers_1/mlp/kernel",
        gs.Depth("decoder", "mlp/kernel", 61),
    ),
]


@pytest.mark.parametrize(
    ("depth", "path", "expected"), CONTRACT, ids=[row[1] for row in CONTRACT]
)
def test_every_row_of_the_contracts_table_of_paths(depth, path, expected):
    assert_reads(depth, path, expected)


MORE = {
    "haiku's key with slashes, first layer": (
        gs.unrolled(r"block(?:_(\d+))?/"),
        ("transformer/block/linear", "w"),
        gs.Depth("transformer/block", "linear/w", 0),
    ),
    "haiku's key with slashes, a later layer": (
        gs.unrolled(r"block(?:_(\d+))?/"),
        ("transformer/block_2/linear", "w"),
        gs.Depth("transformer/block", "linear/w", 2),
    ),
    "dots are edges": (
        gs.unrolled(r"(\d+)"),
        ("model.h.3.weight",),
        gs.Depth("model/h", "weight", 3),
    ),
    "the pattern is searched, not matched from the start": (
        gs.unrolled(r"_(\d+)"),
        "a/b/layers_4/w",
        gs.Depth("a/b/layers", "w", 4),
    ),
    "a group named layer wins over the first unnamed one": (
        gs.unrolled(r"(enc|dec)/layers_(?P<layer>\d+)/"),
        "enc/layers_2/w",
        gs.Depth("enc/layers", "w", 2),
    ),
    "the first unnamed group, though a named one comes before": (
        gs.unrolled(r"(?P<stack>enc|dec)oder/layers_(\d+)/"),
        "encoder/layers_2/w",
        gs.Depth("enc", "w", 2),
    ),
    "a group named role is put before what follows the match": (
        gs.unrolled(r"layers_(\d+)/(?P<role>\w+)_local/"),
        "layers_1/mlp_local/wo/kernel",
        gs.Depth("layers", "mlp/wo/kernel", 1),
    ),
    "scanned: the match without its slash": (
        gs.scanned("blocks"),
        "params/blocks/mlp/kernel",
        gs.Depth("params/blocks", "mlp/kernel", axis=0),
    ),
    "scanned: start is the first layer": (
        gs.scanned("blocks/", start=4, axis=1),
        "blocks/w",
        gs.Depth("blocks", "w", 4, axis=1),
    ),
    "scanned: the position is added to start": (
        gs.scanned(r"cycle/layers_(\d+)/", start=4, stride=2, axis=2),
        "cycle/layers_1/w",
        gs.Depth("cycle/layers", "w", 5, axis=2, stride=2),
    ),
    "scanned: cycles of two named parts": (
        gs.scanned("layers/mlp_global/", axis=1, start=1, stride=2, stack="decoder"),
        "decoder/layers/mlp_global/wo/kernel",
        gs.Depth("decoder", "wo/kernel", 1, axis=1, stride=2),
    ),
    "scanned: the number is in the stack's name no more": (
        gs.scanned(r"stage_(\d+)/"),
        "stage_2/w",
        gs.Depth("stage", "w", 2, axis=0),
    ),
    "from the end: a negative axis": (
        gs.scanned("blocks/", axis=-1),
        "blocks/w",
        gs.Depth("blocks", "w", axis=-1),
    ),
}


@pytest.mark.parametrize("row", MORE)
def test_reads(row):
    assert_reads(*MORE[row])


# Without a pattern.

BY_ITSELF = {
    "the contract's table, a name with a number": (
        gs.unrolled(),
        "decoder/layers_3/mlp/kernel",
        gs.Depth("decoder/layers", "mlp/kernel", 3),
    ),
    "the contract's table, a list": (
        gs.unrolled(),
        "transformer/h/3/ln_1/scale",
        gs.Depth("transformer/h", "ln_1/scale", 3),
    ),
    "stack names end where the number begins": (
        gs.unrolled(),
        "encoderblock_3/MlpBlock_0/Dense_1/kernel",
        gs.Depth("encoderblock", "MlpBlock_0/Dense_1/kernel", 3),
    ),
    "the root may hold the layers": (
        gs.unrolled(),
        "layer_3/attn/q_einsum/w",
        gs.Depth("layer", "attn/q_einsum/w", 3),
    ),
    "a list at the root has the empty stack name": (
        gs.unrolled(),
        ("3", "w"),
        gs.Depth("", "w", 3),
    ),
    "numbers of several digits": (
        gs.unrolled(),
        "layers_12/w",
        gs.Depth("layers", "w", 12),
    ),
    "the first numbered segment is the layer": (
        gs.unrolled(),
        "h/3/experts/1/w",
        gs.Depth("h", "experts/1/w", 3),
    ),
    "stack= replaces the stack": (
        gs.unrolled(stack="all"),
        "decoder/layers_2/w",
        gs.Depth("all", "w", 2),
    ),
    "a stack name may be any hashable": (
        gs.unrolled(stack=("decoder", 1)),
        "decoder/layers_2/w",
        gs.Depth(("decoder", 1), "w", 2),
    ),
    "start shifts the numbers": (
        gs.unrolled(start=10),
        "layers_2/w",
        gs.Depth("layers", "w", 12),
    ),
}


@pytest.mark.parametrize("row", BY_ITSELF)
def test_without_a_pattern_it_takes_the_number_of_the_layers(row):
    assert_reads_by_itself(*BY_ITSELF[row])


def test_integer_segments_count_as_numbers():
    values = [leaf(i) for i in range(4)]
    blocks = [{"w": np.asarray(x)} for x in values]
    expected = oracle.window(blocks, 0.4)
    out = step(gs.unrolled(), {"layers": [{"w": x} for x in values]})
    oracle.assert_blocks_close(out["layers"], expected)
    out = step(gs.unrolled(), {"layers": {i: {"w": x} for i, x in enumerate(values)}})
    oracle.assert_blocks_close([out["layers"][i] for i in range(4)], expected)
    out = step(gs.unrolled(), [{"w": x} for x in values])
    oracle.assert_blocks_close(out, expected)
    out = step(gs.unrolled(r"layers/(\d+)"), {"layers": tuple(values)})
    oracle.assert_blocks_close([{"w": x} for x in out["layers"]], expected)


def test_layers_are_ordered_by_number_and_not_by_text():
    blocks = oracle.random_blocks(12, shapes={"w": (2,)})
    out = step(gs.unrolled(), oracle.unrolled_tree(blocks))
    out = [out[f"layers_{i}"] for i in range(12)]
    oracle.assert_blocks_close(out, oracle.window(blocks, 0.4))


# Paths.


class Pair(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Variable:
    """Like Flax's."""

    value: object

    def get_metadata(self):
        return {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class HalfBoxed:
    """Like penzai's named arrays."""

    data_array: object

    @property
    def named_axes(self):
        return {}


class Opaque:
    def __init__(self, array):
        self.array = array


jax.tree_util.register_pytree_node(
    Opaque, lambda box: ((box.array,), None), lambda _, children: Opaque(*children)
)


def record_paths(tree):
    """The paths that a function given as `depth` sees, in `init` and in `update`."""
    seen = []

    def depth(path, leaf):
        seen.append((path, leaf.shape))
        return None

    tx = gs.smooth_over_depth(depth, strict=False)
    state = tx.init(tree)
    in_init, seen[:] = list(seen), []
    tx.update(tree, state)
    assert seen == in_init
    assert all(isinstance(path, tuple) for path, _ in seen)
    assert all(type(s) in (str, int) for path, _ in seen for s in path)
    return [path for path, _ in seen]


def test_a_function_gets_plain_segments_and_the_leaf():
    x = jnp.ones((2,))
    cases = [
        ({"a": {"b": x}}, ("a", "b")),
        ({"a": [x]}, ("a", 0)),
        ({"a": (x,)}, ("a", 0)),
        ({"a": {3: x}}, ("a", 3)),
        ({"a": Pair(x, None)}, ("a", "x")),
        ({"block/linear": {"w": x}}, ("block", "linear", "w")),
        ({"a": Variable({"w": x})}, ("a", "w")),
    ]
    for tree, path in cases:
        assert record_paths(tree) == [path]


def test_the_wrappers_of_leaves_leave_no_trace_in_the_path():
    x = jnp.ones((2,))
    assert record_paths({"kernel": Variable(x)}) == [("kernel",)]
    assert record_paths({"kernel": HalfBoxed(x)}) == [("kernel",)]
    assert record_paths({"weight": Opaque(x)}) == [("weight",)]


def test_a_dict_key_named_value_stays_in_the_path():
    x = jnp.ones((2,))
    assert record_paths({"a": {"value": x}}) == [("a", "value")]
    assert record_paths({"a": {"data_array": x}}) == [("a", "data_array")]
    assert record_paths({"a": {0: x}}) == [("a", 0)]
    assert record_paths({"a": [x]}) == [("a", 0)]


def test_boxed_and_plain_leaves_are_the_same_to_a_spec():
    blocks = oracle.random_blocks(3, shapes={"w": (2,)})
    expected = oracle.window(blocks, 0.4)
    for box, unbox in (
        (Variable, lambda b: b.value),
        (Opaque, lambda b: b.array),
        (HalfBoxed, lambda b: b.data_array),
    ):
        tree = {f"layers_{i}": {"w": box(b["w"])} for i, b in enumerate(blocks)}
        out = step(gs.unrolled(r"layers_(\d+)/w$"), tree)
        out = [{"w": unbox(out[f"layers_{i}"]["w"])} for i in range(3)]
        oracle.assert_blocks_close(out, expected)


def test_a_function_is_called_once_per_leaf_and_only_while_tracing():
    calls = []

    def depth(path, leaf):
        calls.append(path)
        return gs.Depth("layers", path[1], int(path[0][-1]))

    tree = oracle.unrolled_tree(oracle.random_blocks(3))
    tx = gs.smooth_over_depth(depth, 0.3)
    state = tx.init(tree)
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == len(jax.tree.leaves(tree))
    calls.clear()
    update = jax.jit(tx.update)
    update(tree, state)
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == len(jax.tree.leaves(tree))
    update(tree, state)
    assert len(calls) == len(jax.tree.leaves(tree))


# Specs as values.


def by_hand(path, leaf):
    return gs.Depth("layers", path[-1], int(path[0][-1]))


def is_kernel(path, leaf):
    return path[-1] == "kernel"


def specs():
    return [
        gs.unrolled(),
        gs.unrolled(r"layers_(\d+)/"),
        gs.unrolled(r"layers_(\d+)/", start=1),
        gs.unrolled(r"layers_(\d+)/", stack="a"),
        gs.scanned("blocks/"),
        gs.scanned("blocks/", axis=1),
        gs.scanned("blocks/", axis=(0, 1)),
        gs.scanned("blocks/", start=1),
        gs.scanned("blocks/", stride=2),
        gs.first_match(gs.unrolled(), gs.scanned("blocks/")),
        gs.first_match(gs.scanned("blocks/"), gs.unrolled()),
        gs.first_match(by_hand, gs.unrolled()),
        gs.ranked(gs.unrolled()),
        gs.depth_fn(by_hand),
        gs.unrolled().only(is_kernel),
        gs.unrolled().only_projections(),
        gs.unrolled().only_projections(bias=False),
        gs.ranked(gs.unrolled()).only(is_kernel),
    ]


def test_specs_are_equal_by_value_and_hashable():
    for i, a in enumerate(specs()):
        for j, b in enumerate(specs()):
            assert (a == b) == (i == j), (a, b)
            if i == j:
                assert hash(a) == hash(b)
    assert len(set(specs() + specs())) == len(specs())
    assert gs.unrolled() != "unrolled"
    assert gs.unrolled().only_projections() == gs.unrolled().only_projections(bias=True)


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: type(spec).__name__)
def test_specs_survive_pickling_and_are_frozen_and_not_callable(spec):
    assert not callable(spec)
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    for name in ("pattern", "axis", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(spec, name, 1)


def test_depth_is_a_frozen_value():
    depth = gs.Depth("decoder", "mlp/kernel")
    assert (depth.stack, depth.role) == ("decoder", "mlp/kernel")
    assert (depth.layer, depth.axis, depth.stride) == (0, None, None)
    full = gs.Depth("decoder", "mlp/kernel", 3, 1, 6)
    same = gs.Depth(stack="decoder", role="mlp/kernel", layer=3, axis=1, stride=6)
    assert full == same != depth
    assert hash(full) == hash(same)
    assert pickle.loads(pickle.dumps(full)) == full
    assert not callable(full)
    assert "mlp/kernel" in repr(full)
    with pytest.raises((AttributeError, TypeError)):
        full.layer = 4
    nested_scan = gs.Depth("decoder", ("mlp", 1), axis=(0, 1), stride=(4, 1))
    assert hash(nested_scan) == hash(pickle.loads(pickle.dumps(nested_scan)))


# What they show: the call that makes them.

# Of those that cannot be called without arguments, the arguments.
NEEDED = {"maxtext_deepseek": (3,)}
PRESETS = {
    name: function
    for name, function in inspect.getmembers(gs.layouts, inspect.isfunction)
    if function.__module__ == gs.layouts.__name__ and not name.startswith("_")
}
SHOWN = [
    "gs.unrolled()",
    r"gs.unrolled(r'layers_(\d+)/', start=2, stack=('a', ('b', 1)))",
    r"""gs.unrolled('it\'s "so"_(\\d)')""",
    "gs.scanned('blocks/')",
    "gs.scanned('blocks/', axis=(0, 1), start=1, stride=(4, 1))",
    "gs.scanned('blocks/', axis=(0,))",
    "gs.first_match(gs.scanned('b/'), gs.ranked(gs.unrolled()))",
    "gs.unrolled().only_projections()",
    "gs.ranked(gs.layouts.flax_nnx()).only_projections(bias=False)",
    r"gs.layouts.flax_linen(r'Block_\w', scan_axis=(0, 1))",
    "gs.layouts.maxtext(cycle=6, num_cycles=10)",
    *(
        f"gs.layouts.{name}({', '.join(map(str, NEEDED.get(name, ())))})"
        for name in PRESETS
    ),
    "gs.window(0.2)",
    "gs.window(0.1, radius=3, decay=0.5)",
    "gs.laplacian(0.1)",
    "gs.ema(0.1)",
    "gs.ema(0.1, reverse=True)",
    "gs.gaussian(1.0, radius=2)",
    "gs.tikhonov(2.0)",
    "gs.mean_over_depth()",
    "gs.dense([[0.5, 0.5], [0.25, 0.75]])",
    "gs.compose(gs.ema(0.5), gs.window(0.1))",
    "gs.repeat(gs.compose(gs.window(0.1)), times=3)",
    "gs.similarity_window(0.1, norm_scope='param', sharpness=2.0)",
    "gs.controls.norm_matched(gs.window(0.1))",
    "gs.controls.shuffled(gs.window(0.1), seed=3)",
]


@pytest.mark.parametrize("source", SHOWN)
def test_a_spec_or_operator_shows_the_call_that_makes_it(source):
    value = eval(source, {"gs": gs})
    assert repr(value) == source
    assert eval(repr(value), {"gs": gs}) == value


@pytest.mark.parametrize(
    "value",
    [
        gs.scanned("blocks/", axis=np.int64(1), start=np.int32(2)),
        gs.window(np.float32(0.1), decay=np.array(0.3)),
        gs.window(jnp.bfloat16(0.1)),
        gs.gaussian(jnp.float32(0.3), radius=2),
        gs.gaussian(0.3),
        gs.dense(np.random.default_rng(0).normal(size=(9, 9))),
        gs.dense(jnp.eye(2)),
        gs.repeat(gs.ema(jnp.float32(0.1)), 2),
        gs.similarity_window(jnp.float32(0.1), sharpness=np.float64(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_concrete_arrays_are_shown_as_numbers_that_make_an_equal_value(value):
    again = eval(repr(value), {"gs": gs})
    assert again == value
    assert hash(again) == hash(value)


def test_functions_are_shown_by_their_names():
    assert repr(gs.depth_fn(by_hand)) == f"gs.depth_fn(<{__name__}.by_hand>)"
    assert repr(gs.first_match(by_hand)) == f"gs.first_match({gs.depth_fn(by_hand)!r})"
    only = f"gs.unrolled().only(<{__name__}.is_kernel>)"
    assert repr(gs.unrolled().only(is_kernel)) == only
    assert repr(gs.operator_fn(np.eye)) == "gs.operator_fn(<numpy.eye>)"


# Their names, as in a configuration file.


@pytest.mark.parametrize("name", PRESETS)
def test_every_layout_has_its_name(name):
    args = NEEDED.get(name, ())
    text = name + (repr(args) if args else "")
    assert gs.ranked(text.replace(",)", ")")) == gs.ranked(PRESETS[name](*args))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("maxtext()", gs.layouts.maxtext()),
        ("maxtext(cycle=6)", gs.layouts.maxtext(cycle=6)),
        ("maxtext.only_projections()", gs.layouts.maxtext().only_projections()),
        (
            "maxtext(cycle=6).only_projections(bias=False)",
            gs.layouts.maxtext(cycle=6).only_projections(bias=False),
        ),
        ("gs.layouts.maxtext(cycle=-1)", gs.layouts.maxtext(cycle=-1)),
        ("flax_linen(scan_axis=(0, 1))", gs.layouts.flax_linen(scan_axis=(0, 1))),
        ("unrolled", gs.unrolled()),
        ("scanned('blocks/', axis=1, stack=None)", gs.scanned("blocks/", axis=1)),
        ("ranked(flax_nnx())", gs.ranked(gs.layouts.flax_nnx())),
        (
            "first_match('flax_nnx', scanned('b/'))",
            gs.first_match(gs.layouts.flax_nnx(), gs.scanned("b/")),
        ),
    ],
)
def test_a_name_stands_for_its_call_with_options_and_restriction(text, spec):
    assert gs.ranked(text) == gs.ranked(spec)
    assert gs.first_match(text, gs.unrolled()) == gs.first_match(spec, gs.unrolled())


def test_a_name_is_taken_wherever_a_depth_is():
    blocks = oracle.random_blocks(3)
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
    out = step("unrolled", tree)
    oracle.assert_blocks_close(in_order(out, blocks), oracle.window(blocks, 0.4))
    kernels = step("unrolled().only_projections(bias=False)", tree)
    assert kernels["layers_0"]["bias"] is tree["layers_0"]["bias"]
    assert kernels["layers_0"]["kernel"] is not tree["layers_0"]["kernel"]
    assert str(gs.describe("unrolled", tree)) == str(gs.describe(gs.unrolled(), tree))
    assert set(gs.diagnostics.depth_statistics(tree, "unrolled")) == {"layers"}
    assert set(gs.diagnostics.cosine_matrix(tree, "unrolled")) == {"layers"}
    smooth = gs.smooth_over_depth("unrolled")
    for tx in (
        gs.diagnostics.monitor_depth(smooth, "unrolled"),
        gs.muon(0.1, "unrolled", smooth),
        gs.contrib.learn_alpha(optax.identity(), "unrolled"),
    ):
        tx.init(tree)


def test_a_name_is_no_schedule_to_inject_hyperparams():
    blocks = oracle.random_blocks(3)
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
    tx = optax.inject_hyperparams(gs.smooth_over_depth)("unrolled", 0.4)
    state = tx.init(tree)
    assert set(state.hyperparams) == {"operator"}
    out, _ = tx.update(tree, state)
    oracle.assert_blocks_close(in_order(out, blocks), oracle.window(blocks, 0.4))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("maxtex", "maxtext"),
        ("MaxText(cycle=6)", "maxtext"),
        ("big-vision", "big_vision"),
        ("flax_linnen(scan_axis=0)", "flax_linen"),
        ("rank(unrolled())", "ranked"),
    ],
)
def test_an_unknown_name_is_told_the_nearest_and_all_that_there_are(text, meant):
    for make in (gs.smooth_over_depth, gs.ranked, gs.first_match):
        with pytest.raises(ValueError, match=f"Did you mean .*'{meant}'") as info:
            make(text)
        assert repr(text) in str(info.value)
        for name in PRESETS:
            assert name in str(info.value)


@pytest.mark.parametrize(
    "argument",
    [
        "touch()",
        "__import__('pathlib').Path('evaluated').touch()",
        "(lambda: __import__('pathlib').Path('evaluated').touch())()",
        "[__import__('pathlib').Path('evaluated').touch() for _ in 'a']",
        'f\'{__import__("pathlib").Path("evaluated").touch()}\'',
        "cycles",
        "1 + 1",
    ],
)
def test_an_argument_that_is_no_literal_is_refused_and_never_evaluated(
    argument, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for text in (f"maxtext(cycle={argument})", f"maxtext({argument})"):
        with pytest.raises(ValueError, match="`depth`="):
            gs.smooth_over_depth(text)
    assert not list(tmp_path.iterdir())


def test_an_expression_for_an_argument_is_told_to_be_written_as_a_literal():
    with pytest.raises(ValueError, match=r"'2 \* 3', which is no literal") as info:
        gs.smooth_over_depth("maxtext(cycle=2 * 3)")
    assert "never evaluated" in str(info.value)


@pytest.mark.parametrize("pattern", [r"layers_(\d+)/", r"h/(\d+)/", r"(\d+)$"])
def test_a_pattern_in_place_of_a_name_is_told_the_calls_that_take_it(pattern):
    with pytest.raises(ValueError, match="not the name of a layout") as info:
        gs.smooth_over_depth(pattern)
    calls = re.findall(r"`((?:unrolled|scanned)\(.*?\))`", str(info.value))
    names = {"unrolled": gs.unrolled, "scanned": gs.scanned}
    advised = [eval(call, names) for call in calls]
    assert advised == [gs.unrolled(pattern), gs.scanned(pattern)]


def test_a_path_in_place_of_a_name_is_told_the_call_that_takes_it():
    with pytest.raises(ValueError, match="not the name") as info:
        gs.smooth_over_depth("decoder/layers/")
    assert "`scanned('decoder/layers/', axis=0)`" in str(info.value)
    assert "`unrolled(" not in str(info.value)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("maxtext(cycles=6)", TypeError, "'cycles'"),
        ("maxtext(6)", TypeError, "positional"),
        ("unrolled('layers_')", ValueError, "has no group"),
        ("scanned('blocks/', axis='0')", TypeError, "`axis`"),
    ],
)
def test_what_the_call_refuses_is_its_error_with_the_text_it_came_from(
    text, error, words
):
    with pytest.raises(error, match=words) as info:
        gs.smooth_over_depth(text)
    assert any(repr(text) in note for note in info.value.__notes__)


# How specs combine.


def test_the_first_member_that_matches_wins():
    blocks = oracle.random_blocks(4, shapes={"w": (2, 3)})
    tree = oracle.unrolled_tree(blocks)

    def halves(path, leaf):
        # Layers 0 and 1 only, as a stack of their own.
        layer = int(path[0][-1])
        return gs.Depth("first half", path[-1], layer) if layer < 2 else None

    apart = oracle.window(blocks[:2], 0.4) + oracle.window(blocks[2:], 0.4)
    together = oracle.window(blocks, 0.4)
    for members, expected in (
        ((halves, gs.unrolled()), apart),
        ((gs.depth_fn(halves), gs.unrolled()), apart),
        ((gs.unrolled(), halves), together),
        ((gs.first_match(halves), gs.first_match(gs.unrolled())), apart),
        ((gs.scanned("blocks/"), halves, gs.unrolled()), apart),
    ):
        out = step(gs.first_match(*members), tree)
        out = [out[f"layers_{i}"] for i in range(4)]
        oracle.assert_blocks_close(out, expected)


def test_depth_fn_decorates_a_function():
    @gs.depth_fn
    def depth(path, leaf):
        return gs.Depth("layers", path[-1], int(path[0][-1]))

    assert not callable(depth)
    blocks = oracle.random_blocks(3)
    for form in (depth, depth.only(is_kernel), by_hand, gs.depth_fn(by_hand)):
        out = step(form, oracle.unrolled_tree(blocks))
        got = [{"kernel": out[f"layers_{i}"]["kernel"]} for i in range(3)]
        expected = [{"kernel": b["kernel"]} for b in oracle.window(blocks, 0.4)]
        oracle.assert_blocks_close(got, expected)


def test_a_function_may_look_the_depths_up_by_their_paths():
    blocks = oracle.random_blocks(3, shapes={"w": (2, 3)})
    tree = {
        "embed": leaf(9),
        "first": jnp.asarray(blocks[0]["w"]),
        "rest": [jnp.stack([b["w"] for b in blocks[1:]], axis=1), None],
    }
    depths = {
        ("first",): gs.Depth("s", "w", 0),
        ("rest", 0): gs.Depth("s", "w", 1, axis=1),
    }
    out = step(lambda path, leaf: depths.get(path), tree)
    assert out["embed"] is tree["embed"]
    got = [out["first"], out["rest"][0][:, 0], out["rest"][0][:, 1]]
    oracle.assert_blocks_close([{"w": x} for x in got], oracle.window(blocks, 0.4))


def test_only_keeps_the_leaves_that_the_predicate_accepts():
    blocks = oracle.random_blocks(3, shapes=oracle.EVERY_RANK)
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
    expected = oracle.window(blocks, 0.4)
    by_rank = gs.unrolled().only(lambda path, leaf: leaf.ndim >= 2)
    for spec, roles in (
        (gs.unrolled().only(is_kernel), {"kernel"}),
        (by_rank, {"kernel", "heads"}),
        (by_rank.only(is_kernel), {"kernel"}),
        (gs.first_match(gs.unrolled().only(is_kernel)), {"kernel"}),
        (gs.ranked(gs.unrolled()).only(is_kernel), {"kernel"}),
    ):
        out = step(spec, tree)
        for layer in range(3):
            before, after = tree[f"layers_{layer}"], out[f"layers_{layer}"]
            untouched = {r for r in before if before[r] is after[r]}
            assert untouched == set(before) - roles
            for role in roles:
                error = oracle.relative_error(after[role], expected[layer][role])
                assert error < 1e-5


def projections(spec, block, stacked=False):
    """The paths within a block that `spec` smooths."""
    if stacked:
        tree = {"blocks": jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), block)}
    else:
        tree = {f"blocks_{i}": jax.tree.map(jnp.array, block) for i in range(3)}
    out = step(spec, tree)
    top = next(iter(tree))
    flat_in = jax.tree_util.tree_leaves_with_path(tree[top])
    flat_out = jax.tree.leaves(out[top])
    return {
        "/".join(key.key for key in path)
        for (path, before), after in zip(flat_in, flat_out, strict=True)
        if before is not after
    }


BLOCK = {
    "attention": {
        "query": {"kernel": leaf(0, (3, 2, 2)), "bias": leaf(1, (2, 2))},
        "pos_embedding": leaf(2, (4, 3)),
    },
    "norm": {"scale": leaf(3, (3,)), "bias": leaf(4, (3,))},
    "torch_norm": {"weight": leaf(5, (3,)), "bias": leaf(6, (3,))},
    "linear": {"weight": leaf(7, (3, 3)), "bias": leaf(8, (3,))},
    "no_bias": {"kernel": leaf(9, (3, 5))},
    "table": {"embedding": leaf(10, (6, 3))},
    "layer_scale": leaf(11, (3,)),
}
MATRICES = {"attention/query/kernel", "linear/weight", "no_bias/kernel"}
BIASES = {"attention/query/bias", "linear/bias"}


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_only_projections_keeps_linear_weights_and_their_biases(stacked):
    base = gs.scanned("blocks/") if stacked else gs.unrolled()
    for spec in (base.only_projections(), base.only_projections(bias=True)):
        assert projections(spec, BLOCK, stacked) == MATRICES | BIASES
    spec = base.only_projections(bias=False)
    assert projections(spec, BLOCK, stacked) == MATRICES


def test_only_projections_knows_haikus_weights():
    block = {"linear": {"w": leaf(0, (3, 3)), "b": leaf(1, (3,))}}
    block["layer_norm"] = {"scale": leaf(2, (3,)), "offset": leaf(3, (3,))}
    spec = gs.unrolled().only_projections()
    assert projections(spec, block) == {"linear/w", "linear/b"}


# Runs and gaps.


def with_gaps(layers, shapes=None):
    """Blocks of which only `layers` exist, and their unrolled tree."""
    blocks = oracle.random_blocks(max(layers) + 1, shapes=shapes)
    blocks = [b if i in layers else {} for i, b in enumerate(blocks)]
    tree = {f"layers_{i}": b for i, b in enumerate(blocks) if b}
    return blocks, jax.tree.map(jnp.asarray, tree)


def in_order(out, blocks):
    return [out.get(f"layers_{i}", {}) for i in range(len(blocks))]


@pytest.mark.parametrize("norm_scope", ["param", "block"])
@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
def test_a_gap_is_a_boundary_when_not_strict(variant, norm_scope):
    blocks, tree = with_gaps([0, 1, 2, 4, 5, 8])
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    out = step(gs.unrolled(), tree, strict=False, **kwargs)
    expected = oracle.window(blocks, 0.4, **kwargs)
    oracle.assert_blocks_close(in_order(out, blocks), expected)
    assert out["layers_8"]["kernel"] is tree["layers_8"]["kernel"]


def test_a_gap_is_a_boundary_for_a_wide_window_too():
    blocks, tree = with_gaps([0, 1, 2, 4, 5, 8], {"w": (3,)})
    out = step(gs.unrolled(), tree, gs.window(0.4, radius=3), strict=False)
    expected = oracle.window(blocks, 0.4, 3)
    oracle.assert_blocks_close(in_order(out, blocks), expected)


@pytest.mark.parametrize("norm_scope", ["param", "block"])
@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
def test_ranked_closes_the_gaps(variant, norm_scope):
    blocks, tree = with_gaps([0, 2, 4, 7])
    kwargs = {"variant": variant, "norm_scope": norm_scope}
    out = step(gs.ranked(gs.unrolled()), tree, **kwargs)
    expected = oracle.window(blocks, 0.4, ranked=True, **kwargs)
    oracle.assert_blocks_close(in_order(out, blocks), expected)


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_ranked_keeps_the_true_layers_in_block_norms(variant):
    # Two roles on interleaved layers share a block where their true layers are equal.
    blocks = oracle.random_blocks(6, shapes={"even": (2,), "all": (3,)})
    for layer in (1, 3, 5):
        del blocks[layer]["even"]
    tree = oracle.unrolled_tree(blocks)
    kwargs = {"variant": variant, "norm_scope": "block"}
    out = step(gs.ranked(gs.unrolled()), tree, **kwargs)
    expected = oracle.window(blocks, 0.4, ranked=True, **kwargs)
    oracle.assert_blocks_close(in_order(out, blocks), expected)


def test_ranked_can_wrap_one_member_of_several():
    blocks, tree = with_gaps([1, 3], {"w": (2,)})
    other = oracle.random_blocks(3, shapes={"w": (2,)}, seed=5)
    tree = {"sequential": tree, "blocks": jax.tree.map(jnp.asarray, other)}
    spec = gs.first_match(
        gs.ranked(gs.unrolled("sequential/layers_(.)")), gs.unrolled()
    )
    out = step(spec, tree)
    expected = oracle.window(blocks, 0.4, ranked=True)
    oracle.assert_blocks_close(in_order(out["sequential"], blocks), expected)
    oracle.assert_blocks_close(out["blocks"], oracle.window(other, 0.4))


@pytest.mark.parametrize("variant", ["norm_preserving", "directional"])
def test_the_block_of_a_layer_holds_only_slices_that_have_a_neighbour(variant):
    # "odd" is alone at layer 4: it stays outside that block, and unchanged.
    blocks = oracle.random_blocks(5, shapes={"odd": (2,), "all": (3,)})
    for layer in (0, 3):
        del blocks[layer]["odd"]
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
    kwargs = {"variant": variant, "norm_scope": "block"}
    out = step(gs.unrolled(), tree, strict=False, **kwargs)
    expected = oracle.window(blocks, 0.4, **kwargs)
    oracle.assert_blocks_close(in_order(out, blocks), expected)
    assert out["layers_4"]["odd"] is tree["layers_4"]["odd"]


def test_block_norms_of_two_stacks_are_apart():
    first, second = oracle.random_blocks(3, seed=1), oracle.random_blocks(3, seed=2)
    tree = {"encoder": oracle.unrolled_tree(first)}
    tree["decoder"] = oracle.unrolled_tree(second)
    kwargs = {"variant": "norm_preserving", "norm_scope": "block"}
    out = step(gs.unrolled(), jax.tree.map(jnp.asarray, tree), **kwargs)
    for name, blocks in (("encoder", first), ("decoder", second)):
        expected = oracle.window(blocks, 0.4, **kwargs)
        oracle.assert_blocks_close(in_order(out[name], blocks), expected)


def test_only_equal_shapes_and_dtypes_are_coupled():
    blocks = oracle.random_blocks(6, shapes={"w": (2,)})
    big = oracle.random_blocks(6, shapes={"w": (5,)})
    mixed = blocks[:2] + big[2:4] + blocks[4:]
    mixed[5] = {"w": mixed[5]["w"].astype(jnp.bfloat16)}
    tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(mixed))
    out = in_order(step(gs.unrolled(), tree, strict=False), mixed)
    oracle.assert_blocks_close(out[:2], oracle.window(mixed[:2], 0.4))
    oracle.assert_blocks_close(out[2:4], oracle.window(mixed[2:4], 0.4))
    assert out[4]["w"] is tree["layers_4"]["w"]
    assert out[5]["w"] is tree["layers_5"]["w"]


def test_a_stack_need_not_start_at_layer_zero():
    blocks, tree = with_gaps([5, 6, 7])
    out = step(gs.unrolled(), tree)
    expected = oracle.window(blocks, 0.4)
    oracle.assert_blocks_close(in_order(out, blocks), expected)


def test_a_lone_array_is_smoothed_where_the_spec_matches_it():
    u = leaf(0, (4, 3))
    out = step(lambda path, leaf: gs.Depth("stack", "w", axis=0), u)
    blocks = [{"w": np.asarray(x)} for x in u]
    oracle.assert_blocks_close([{"w": x} for x in out], oracle.window(blocks, 0.4))


# Composition.


def test_first_match_asks_later_members_only_about_the_leaves_that_are_left():
    asked = []

    def rest(path, leaf):
        asked.append(path)
        return None

    spec = gs.first_match(gs.scanned("blocks/"), rest)
    tree = {"blocks": {"w": jnp.ones((2, 3))}, "head": jnp.ones(3)}
    gs.smooth_over_depth(spec).init(tree)
    assert asked == [("head",)]


def test_an_axis_may_be_a_numpy_integer():
    assert gs.Depth("s", "r", axis=np.int64(1)) == gs.Depth("s", "r", axis=1)
    assert gs.scanned("blocks/", axis=np.int64(1)) == gs.scanned("blocks/", axis=1)


@gs.depth_fn
def decorated(path, leaf):
    return gs.Depth("blocks", path[-1], axis=0)


def test_a_decorated_depth_function_can_be_pickled():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


def test_a_decorated_depth_function_that_is_gone_is_an_error_and_not_none(monkeypatch):
    pickled = pickle.dumps(decorated)
    monkeypatch.delitem(globals(), "decorated")
    with pytest.raises(AttributeError):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unrolled().only(1)", r"ends in `.only`"),
        ("maxtext(**{'cycle': 6})", r"holds `\*\*`"),
        ("maxtext(cycle=f())", r"'f\(\)', which is no literal"),
        ("(" * 5000, "not the name of a layout"),
        ("maxtex.only_projections()", "Did you mean 'maxtext'"),
    ],
)
def test_a_string_that_is_no_name_says_what_is_wrong_with_it(name, said):
    with pytest.raises(ValueError, match=said):
        gs.describe(name, {"w": jnp.ones(2)})


def test_a_pattern_in_a_string_needs_no_raw_string():
    params = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)}
    summary = gs.describe(r"unrolled('layers_(\d+)/')", params)
    assert summary.spec == gs.unrolled(r"layers_(\d+)/")


def test_a_preset_made_of_another_is_equal_to_it():
    assert gs.layouts.equinox() == gs.layouts.flax_nnx()
    assert repr(gs.layouts.equinox()) == "gs.layouts.equinox()"
