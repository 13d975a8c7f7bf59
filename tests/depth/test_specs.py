"""Where depth is: what the specs read from paths, and the specs as values."""

import dataclasses
import functools
import inspect
import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from contract import check, window
from nodes import Variable
from reading import At, FirstMatch, Function, Only, OnlyProjections, Pattern, Ranked

import gradsmooth_optax as gs

pytestmark = pytest.mark.core


def nested(path, value):
    for segment in reversed(path):
        value = {segment: value}
    return value


# -- What they read from a path --------------------------------------------------------

# A promise, a spec with the path that it reads, and what the leaf there is.
READ = r"""
# a name and a number
gs.unrolled(r'layers_(\d+)/')  decoder/layers_3/mlp/kernel
gs.Depth('decoder/layers', 'mlp/kernel', 3)
# a group that took no part is layer 0
gs.unrolled(r'block(?:_(\d+))?/')  transformer/block/linear/w
gs.Depth('transformer/block', 'linear/w', 0)
# start shifts the numbers
gs.unrolled(r'rest/layers_(\d+)/', start=60, stack='decoder')  rest/layers_1/mlp/w
gs.Depth('decoder', 'mlp/w', 61)
# dots are edges, and the pattern is searched, not matched from the start
gs.unrolled(r'(\d+)')  model.h.3.weight
gs.Depth('model/h', 'weight', 3)
# a group named layer wins over the first unnamed one
gs.unrolled(r'(enc|dec)/layers_(?P<layer>\d+)/')  enc/layers_2/w
gs.Depth('enc/layers', 'w', 2)
# the first unnamed group, though a named one comes before
gs.unrolled(r'(?P<stack>enc|dec)oder/layers_(\d+)/(\d)')  encoder/layers_2/3/w
gs.Depth('enc', 'w', 2)
# stack= wins over a group named stack
gs.unrolled(r'(?P<stack>e|d)/layers_(\d+)/', stack=('all', 1))  e/layers_2/w
gs.Depth(('all', 1), 'w', 2)
# a group named role is put before what follows the match
gs.unrolled(r'layers_(\d+)/(?P<role>\w+)_local/')  layers_1/mlp_local/wo/kernel
gs.Depth('layers', 'mlp/wo/kernel', 1)
# a number with a sign
gs.unrolled(r'layers/(-?\d+)')  layers/-2/w
gs.Depth('layers', 'w', -2)
# the largest number
gs.unrolled(r'_(\d+)')  layers_2147483647/w
gs.Depth('layers', 'w', 2147483647)
# scanned: the path up to the match
gs.scanned('blocks')  params/blocks/mlp/kernel
gs.Depth('params/blocks', 'mlp/kernel', axis=0)
# scanned: start is the first layer
gs.scanned('blocks/', start=4, axis=1)  blocks/w
gs.Depth('blocks', 'w', 4, axis=1)
# scanned: the position in a cycle is added to start
gs.scanned(r'layers_(\d+)/', start=4, axis=2, stride=6, stack='s')  d/layers_3/mlp/w
gs.Depth('s', 'mlp/w', 7, axis=2, stride=6)
# scanned: the number is in the stack's name no more
gs.scanned(r'stage_(\d+)/')  stage_2/w
gs.Depth('stage', 'w', 2, axis=0)
# scanned: an axis counted from the end
gs.scanned('blocks/', axis=-1, stride=-1, start=2)  blocks/w
gs.Depth('blocks', 'w', 2, axis=2, stride=-1)
# scanned: two axes, the last one fastest
gs.scanned('blocks/', axis=(2, 0))  blocks/w
gs.Depth('blocks', 'w', axis=(2, 0))
"""


@pytest.mark.parametrize("row", READ.split("\n# ")[1:])
def test_a_pattern_reads(row):
    _, reading, depth = row.strip().splitlines()
    spec, path = reading.split("  ")
    expected, shape = eval(depth), (3, 4, 2)
    tree = nested(path.split("/"), np.ones(shape, np.float32))
    (group,) = gs.describe(eval(spec), tree).groups
    assert (group.stack, group.role) == (expected.stack, expected.role)
    axes = [] if expected.axis is None else np.atleast_1d(expected.axis).tolist()
    (member,) = group.members
    assert member.axes == tuple(sorted(axes))
    layers = expected.layers(shape)
    assert group.layers == tuple(np.sort(layers, None))
    if axes != sorted(axes):
        layers = layers.T
    np.testing.assert_array_equal(member.layers, layers)
    assert group.shape == tuple(n for k, n in enumerate(shape) if k not in axes)


# The same, of the number that tells siblings apart.
READ_BY_ITSELF = {
    "decoder/layers_3/mlp/kernel": ("decoder/layers", "mlp/kernel"),
    "transformer/h/3/ln_1/scale": ("transformer/h", "ln_1/scale"),
    "encoderblock_3/Mlp_0/Dense_1/kernel": ("encoderblock", "Mlp_0/Dense_1/kernel"),
    "layer_3/attn/q_einsum/w": ("layer", "attn/q_einsum/w"),
    "3/w": ("", "w"),
    "layers_12/w": ("layers", "w"),
    "h/3/experts/1/w": ("h", "experts/1/w"),
}


@pytest.mark.parametrize("path", READ_BY_ITSELF)
def test_without_a_pattern_the_number_is_the_layers(path):
    before, number, after = re.fullmatch(r"(.*?)(\d+)(.*)", path).groups()
    stack, role = READ_BY_ITSELF[path]
    tree = {}
    for n in range(int(number) + 1):
        node = tree
        *parents, last = f"{before}{n}{after}".split("/")
        for segment in parents:
            node = node.setdefault(segment, {})
        node[last] = np.ones((2, 3), np.float32)
    for spec, names in (
        (gs.unrolled(), (stack, role, 0)),
        (gs.unrolled(start=10), (stack, role, 10)),
        (gs.unrolled(stack=("all", 1)), (("all", 1), role, 0)),
    ):
        (group,) = gs.describe(spec, tree).groups
        assert (group.stack, group.role, group.layers[0]) == names
        assert group.num_layers == int(number) + 1


class Pair(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class HalfBoxed:
    """Like penzai's named arrays."""

    data_array: Any

    @property
    def named_axes(self):
        return {}


@jax.tree_util.register_pytree_node_class
class Keyless(tuple):
    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


def paths():
    x = np.ones(2, np.float32)
    return [
        ({"a": {"b": x}}, [("a", "b")]),
        ({"a": [x]}, [("a", 0)]),
        ({"a": (None, x)}, [("a", 1)]),
        ({"a": {3: x}}, [("a", 3)]),
        ({"a": {True: x}}, [("a", "True")]),
        ({"a": {np.int64(3): x}}, [("a", 3)]),
        ({"a": Pair(x, None)}, [("a", "x")]),
        ({("a", ("b", 1)): x}, [("a", "b", 1)]),
        # Keys that are paths.
        ({"block//linear/": {"w": x}}, [("block", "linear", "w")]),
        ({"h.3.w": x, "3.w": x}, [("3.w",), ("h", "3", "w")]),
        ({"a.b/c.": x}, [("a", "b", "c.")]),
        ({"": x}, [("",)]),
        # What holds one array and has no name for it is no part of the path.
        ({"a": Variable({"w": x})}, [("a", "w")]),
        ({"kernel": Variable(x)}, [("kernel",)]),
        ({"kernel": HalfBoxed(x)}, [("kernel",)]),
        ({"kernel": Keyless([x])}, [("kernel",)]),
        ({"kernel": Keyless([x, x])}, [("kernel", 0), ("kernel", 1)]),
        ({"a": {"value": x}}, [("a", "value")]),
        ({"a": {"data_array": x}}, [("a", "data_array")]),
    ]


def test_a_function_gets_plain_segments_and_the_leaf_once_in_init_and_in_update():
    for tree, expected in paths():
        seen = []

        def depth(path, leaf, seen=seen):
            assert type(path) is tuple
            assert leaf.shape == (2,)
            seen.append(path)

        tx = gs.smooth_over_depth(depth, strict=False)
        tx.update(tree, tx.init(tree))
        assert seen == expected * 2
        assert [list(map(type, p)) for p in seen] == [
            list(map(type, p)) for p in expected * 2
        ]


def test_a_function_is_called_once_per_leaf_and_only_while_tracing():
    calls = []

    def depth(path, leaf):
        calls.append(path)
        return gs.Depth("layers", path[1], int(path[0][-1]))

    tree = oracle.unrolled_tree(oracle.random_blocks(3))
    tx = gs.smooth_over_depth(depth, 0.3)
    update, state = jax.jit(tx.update), tx.init(tree)
    once = list(calls)
    assert sorted(set(once)) == sorted(once)
    assert len(once) == 6
    for _ in range(2):
        update(tree, state)
        assert calls == once * 2


# -- How they combine ------------------------------------------------------------------


def is_kernel(path, leaf):
    return path[-1] == "kernel"


def is_matrix(path, leaf):
    return np.ndim(leaf) >= 2


NUMBERED = Pattern(gs.unrolled, None, {})
BLOCKS = Pattern(gs.scanned, "blocks/", {})


def layers(numbers, roles=None, seed=0):
    """Layers of these numbers; `roles` says of some roles in which layers they are."""
    blocks = oracle.random_blocks(max(numbers) + 1, seed=seed)
    for role, holders in (roles or {}).items():
        for n in numbers:
            if n not in holders:
                del blocks[n][role]
    return {f"layers_{n}": blocks[n] for n in numbers}


def halves(tree):
    """Layers 0 and 1 only, as a stack of their own."""
    return Function(
        {
            (name, role): At("first half", role, int(name[-1]))
            if name < "layers_2"
            else None
            for name, block in tree.items()
            for role in block
        }
    )


FOUR = layers(range(4))
HALVES = halves(FOUR)
GAPS = layers([0, 1, 2, 4, 5, 8])
COMBINED = {
    "the first member that matches wins": (FirstMatch([HALVES, NUMBERED]), FOUR),
    "and not a later one": (FirstMatch([NUMBERED, HALVES]), FOUR),
    "members that match nothing are passed by": (
        FirstMatch([BLOCKS, FirstMatch([HALVES]), FirstMatch([NUMBERED])]),
        FOUR,
    ),
    "only keeps what the predicate takes": (Only(NUMBERED, is_kernel), FOUR),
    "only, of what only keeps": (Only(Only(NUMBERED, is_matrix), is_kernel), FOUR),
    "only, of one member": (FirstMatch([Only(NUMBERED, is_matrix), HALVES]), FOUR),
    "projections": (OnlyProjections(NUMBERED, bias=True), FOUR),
    "projections without their biases": (OnlyProjections(NUMBERED, bias=False), FOUR),
    "projections that are ranked": (Ranked(OnlyProjections(NUMBERED, bias=True)), GAPS),
    "ranked closes gaps": (Ranked(NUMBERED), GAPS),
    # Roles share a block where their true layers are equal.
    "ranked roles of interleaved layers": (
        Ranked(NUMBERED),
        layers(range(6), {"bias": [0, 2, 4]}),
    ),
    "ranked, of one member of several": (
        FirstMatch(
            [Ranked(Pattern(gs.unrolled, r"a/layers_(.)", {})), NUMBERED],
        ),
        {"a": layers([1, 3]), "b": layers(range(3), seed=5)},
    ),
    "block norms of two stacks are apart": (
        NUMBERED,
        {"a": layers(range(3)), "b": layers(range(3), seed=5)},
    ),
    "a stack that does not start at 0": (NUMBERED, layers([5, 6, 7])),
    "a lone array": (
        Function({(): At("s", "w", axis=0)}),
        np.stack([b["kernel"] for b in FOUR.values()]),
    ),
    # Boundaries, and slices that have no neighbor and are in no block.
    "gaps": (NUMBERED, GAPS),
    "a role that is alone in its layer": (
        NUMBERED,
        layers(range(5), {"bias": [1, 2, 4]}),
    ),
    "layers of other shapes and dtypes": (
        NUMBERED,
        {
            f"layers_{i}": {"kernel": np.full((2, 3 + (i in (2, 3))), i + 1.0, dtype)}
            for i, dtype in enumerate(["float32"] * 5 + ["float16"])
        },
    ),
    "a slice without neighbors in a leaf with others": (
        Function(
            {
                ("strided",): At("s", "a", 0, axis=0, stride=3),
                ("single",): At("s", "a", 1),
                ("scanned",): At("s", "b", axis=0),
            }
        ),
        {
            "strided": np.stack(
                [FOUR["layers_0"]["kernel"], FOUR["layers_3"]["kernel"]]
            ),
            "single": FOUR["layers_1"]["kernel"],
            "scanned": np.stack([b["kernel"] for b in FOUR.values()]),
        },
    ),
}
# Those that are wrong where `strict`, and those about the norms of blocks.
LOOSE = list(COMBINED)[-4:]
NORMS = [name for name in COMBINED if "block" in name or "role" in name]


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.filterwarnings("ignore::gradsmooth_optax.DepthWarning")
def test_what_specs_combined_take_is_smoothed_as_the_plain_loops_do(name):
    description, tree = COMBINED[name]
    tree = jax.tree.map(jnp.asarray, tree)
    options = {"variant": "norm_preserving", "norm_scope": "block"}
    options = options if name in NORMS + LOOSE else {}
    strict = {"strict": name not in LOOSE}
    assert check(tree, description, window(0.4, 2), options | strict) == ["smoothed"]
    if name in LOOSE:
        assert "refused" in check(tree, description, window(0.4), options)[0]


def test_later_members_are_asked_only_about_the_leaves_that_are_left():
    asked = []
    spec = gs.first_match(gs.scanned("blocks/"), lambda path, leaf: asked.append(path))
    gs.smooth_over_depth(spec).init({"blocks": {"w": jnp.ones((2, 3))}, "head": X})
    assert asked == [("head",)]


def test_a_predicate_is_asked_only_about_leaves_of_its_spec_that_are_there():
    asked = []
    spec = gs.unrolled(r"layers_(.)").only(
        lambda path, leaf: asked.append(path) or True
    )
    tree = {"layers_0": X, "layers_1": X, "layers_2": optax.MaskedNode(), "head": X}
    gs.describe(spec, tree)
    assert set(asked) == {("layers_0",), ("layers_1",)}


X = np.ones(3, np.float32)
BLOCK = {
    "attention": {
        "query": {"kernel": np.ones((3, 2, 2)), "bias": np.ones((2, 2))},
        "pos_embedding": np.ones((4, 3)),
    },
    "norm": {"scale": X, "bias": X},
    "torch_norm": {"weight": X, "bias": X},
    "linear": {"weight": np.ones((3, 3)), "bias": X},
    "no_bias": {"kernel": np.ones((3, 5))},
    "haiku": {"w": np.ones((3, 3)), "b": X},
    "table": {"embedding": np.ones((6, 3))},
    "layer_scale": X,
}
MATRICES = {"attention/query/kernel", "linear/weight", "no_bias/kernel", "haiku/w"}
BIASES = {"attention/query/bias", "linear/bias", "haiku/b"}


@pytest.mark.parametrize(
    ("spec", "tree"),
    [
        (gs.unrolled(), {f"blocks_{i}": BLOCK for i in range(3)}),
        (gs.scanned("s/"), {"s": jax.tree.map(lambda x: np.stack([x, x]), BLOCK)}),
        (
            gs.scanned(r"s(\d)/", axis=(0, -1), stride=(4, 2)),
            {
                f"s{i}": jax.tree.map(lambda x: np.ones((2, *x.shape, 2)), BLOCK)
                for i in (0, 1)
            },
        ),
    ],
    ids=["unrolled", "scanned", "two axes"],
)
def test_only_projections_takes_linear_weights_and_their_biases(spec, tree):
    for scope, expected in (
        (spec.only_projections(), MATRICES | BIASES),
        (spec.only_projections(bias=True), MATRICES | BIASES),
        (spec.only_projections(bias=False), MATRICES),
    ):
        assert {group.role for group in gs.describe(scope, tree).groups} == expected


# -- As values -------------------------------------------------------------------------


def by_hand(path, leaf):
    return gs.Depth("layers", path[-1], int(path[0][-1]))


PRESETS = {
    name: function
    for name, function in inspect.getmembers(gs.layouts, inspect.isfunction)
    if function.__module__ == gs.layouts.__name__ and not name.startswith("_")
}
PRESET_CALLS = [
    "maxtext_deepseek(3)" if name == "maxtext_deepseek" else f"{name}()"
    for name in PRESETS
]
SPECS = [
    "gs.unrolled()",
    r"gs.unrolled(r'layers_(\d+)/')",
    r"gs.unrolled(r'layers_(\d+)/', start=1)",
    r"gs.unrolled(r'layers_(\d+)/', start=2, stack=('a', ('b', 1)))",
    r"gs.unrolled(r'layers_(\d+)/', stack='a', num_layers=3)",
    r"""gs.unrolled('it\'s "so"_(\\d)')""",
    "gs.scanned('blocks/')",
    r"gs.scanned('blocks/', stack='a\\')",
    "gs.scanned('blocks/', axis=1)",
    "gs.scanned('blocks/', axis=(0,))",
    "gs.scanned('blocks/', axis=(0, 1))",
    "gs.scanned('blocks/', axis=(0, 1), start=1, stride=(4, 1))",
    "gs.scanned('blocks/', stride=2, stack='a', num_layers=3)",
    "gs.first_match(gs.scanned('b/'), gs.unrolled())",
    "gs.first_match(gs.unrolled(), gs.scanned('b/'))",
    "gs.first_match(gs.scanned('b/'), gs.ranked(gs.unrolled()))",
    "gs.unrolled().only_projections()",
    "gs.unrolled().only_projections(bias=False)",
    "gs.ranked(gs.layouts.flax_nnx()).only_projections(bias=False)",
    r"gs.layouts.flax_linen(r'Block_\w', scan_axis=(0, 1))",
    "gs.layouts.maxtext(cycle=6, num_cycles=10)",
]
OPERATORS = [
    "gs.window(0.2)",
    "gs.window(0.1, radius=3, decay=0.5)",
    "gs.laplacian(0.1)",
    "gs.ema(0.1)",
    "gs.ema(0.1, reverse=True)",
    "gs.gaussian(1.0, radius=2)",
    "gs.tikhonov(2.0)",
    "gs.mean_over_depth()",
    "gs.layer_scale([0.5, 1.0])",
    "gs.dense([[0.5, 0.5], [0.25, 0.75]])",
    "gs.compose(gs.ema(0.5), gs.window(0.1))",
    "gs.repeat(gs.compose(gs.window(0.1)), times=3)",
    "gs.similarity_window(0.1, norm_scope='param', sharpness=2.0)",
    "gs.controls.norm_matched(gs.window(0.1))",
    "gs.controls.shuffled(gs.window(0.1), seed=3)",
]
# Of functions, which no text can make again.
WITH_FUNCTIONS = {
    "gs.depth_fn(<{here}.by_hand>)": lambda: gs.depth_fn(by_hand),
    "gs.first_match(gs.depth_fn(<{here}.by_hand>))": lambda: gs.first_match(by_hand),
    "gs.unrolled().only(<{here}.is_kernel>)": lambda: gs.unrolled().only(is_kernel),
    "gs.ranked(gs.unrolled()).only(<{here}.is_kernel>)": (
        lambda: gs.ranked(gs.unrolled()).only(is_kernel)
    ),
    "gs.operator_fn(<numpy.eye>)": lambda: gs.operator_fn(np.eye),
    "gs.depth_fn(<functools.partial>)": (
        lambda: gs.depth_fn(functools.partial(by_hand))
    ),
}


def test_specs_and_operators_show_the_call_that_makes_an_equal_value():
    presets = [f"gs.layouts.{call}" for call in PRESET_CALLS]
    for source in (*SPECS, *presets, *OPERATORS):
        value, again = (eval(text, {"gs": gs}) for text in [source] * 2)
        assert repr(value) == source
        assert (value, hash(value)) == (again, hash(again))
    for shown, make in WITH_FUNCTIONS.items():
        assert repr(make()) == shown.format(here=__name__)


def test_a_name_may_hold_a_restriction_of_what_it_ranks():
    source = "gs.ranked(gs.unrolled().only_projections())"
    tree = {f"layer_{i}": {"kernel": np.ones((2, 3))} for i in (0, 2)}
    assert gs.describe(source, tree).spec == eval(source, {"gs": gs})


def test_specs_are_different_frozen_hashable_picklable_and_not_callable():
    values = [eval(source, {"gs": gs}) for source in SPECS]
    values += [make() for make in list(WITH_FUNCTIONS.values())[:-2]]
    values += [
        gs.Depth("s", "r"),
        gs.Depth("s", ("r", 1), 3, (0, 1), (4, 1)),
        "unrolled",
    ]
    for i, value in enumerate(values):
        assert [value == other for other in values] == [
            i == j for j in range(len(values))
        ]
        again = pickle.loads(pickle.dumps(value))
        assert (again, hash(again)) == (value, hash(value))
        assert not callable(value)
        for name in ("pattern", "axis", "layer", "anything"):
            with pytest.raises((AttributeError, TypeError)):
                setattr(value, name, 1)
    assert gs.layouts.equinox() == gs.layouts.flax_nnx()
    partial = gs.depth_fn(functools.partial(by_hand))
    assert repr(pickle.loads(pickle.dumps(partial))) == repr(partial)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gs.scanned("blocks/", axis=np.int64(1), start=np.int32(2)),
        lambda: gs.scanned("blocks/", axis=[0, np.int64(1)], stride=range(1, 3)),
        lambda: gs.window(np.float32(0.1), decay=np.array(0.3)),
        lambda: gs.window(jnp.bfloat16(0.1)),
        lambda: gs.gaussian(jnp.float32(0.3), radius=2),
        lambda: gs.gaussian(0.3),
        lambda: gs.dense(np.random.default_rng(0).normal(size=(9, 9))),
        lambda: gs.dense(jnp.eye(2)),
        lambda: gs.repeat(gs.ema(jnp.float32(0.1)), np.int64(2)),
        lambda: gs.similarity_window(jnp.float32(0.1), sharpness=np.float64(2)),
    ],
)
def test_concrete_arrays_are_shown_as_numbers_that_make_an_equal_value(make):
    value = make()
    again = eval(repr(value), {"gs": gs})
    assert (again, hash(again)) == (value, hash(value))


def test_depth_has_few_defaults_and_takes_integers_of_numpy():
    depth = gs.Depth("decoder", "mlp/kernel")
    assert (depth.layer, depth.axis, depth.stride) == (0, None, None)
    depth = gs.Depth("s", "r", np.int64(3), axis=np.int64(1), stride=np.int64(-2))
    assert [type(n) for n in (depth.layer, depth.axis, depth.stride)] == [int] * 3
    assert depth.layers((9, 3)).tolist() == [3, 1, -1]
    largest = 2**31 - 1
    assert gs.Depth("s", "r", -largest, axis=0, stride=largest).layer == -largest


@gs.depth_fn
def decorated(path, leaf):
    return gs.Depth("blocks", path[-1], axis=0)


def test_a_decorated_depth_function_is_pickled_by_its_name(monkeypatch):
    pickled = pickle.dumps(decorated)
    assert pickle.loads(pickled) is decorated
    (group,) = gs.describe(decorated.only(is_kernel), {"kernel": X, "bias": X}).groups
    assert group.layers == (0, 1, 2)
    monkeypatch.delitem(globals(), "decorated")
    with pytest.raises(AttributeError):
        pickle.loads(pickled)


# -- By their names, as in a configuration file ----------------------------------------

NAMES = {
    **{call: f"gs.layouts.{call}" for call in PRESET_CALLS},
    **dict(zip(SPECS, SPECS, strict=True)),
    "maxtext": "gs.layouts.maxtext()",
    " maxtext(cycle=6) ": "gs.layouts.maxtext(cycle=6)",
    "layouts.maxtext(cycle=-1)": "gs.layouts.maxtext(cycle=-1)",
    "maxtext.only_projections()": "gs.layouts.maxtext().only_projections()",
    "flax_linen(scan_axis=(0, 1))": "gs.layouts.flax_linen(scan_axis=(0, 1))",
    "unrolled": "gs.unrolled()",
    "unrolled('layers_(\\d+)/')": r"gs.unrolled(r'layers_(\d+)/')",
    "scanned('b/', axis=1, stack=None)": "gs.scanned('b/', axis=1)",
    "ranked(flax_nnx())": "gs.ranked(gs.layouts.flax_nnx())",
    "first_match('flax_nnx', scanned('b/'))": (
        "gs.first_match(gs.layouts.flax_nnx(), gs.scanned('b/'))"
    ),
}


def test_a_name_stands_for_its_call_with_options_and_restriction():
    for text, source in NAMES.items():
        assert gs.ranked(text) == gs.ranked(eval(source, {"gs": gs})), text


def test_a_name_is_taken_wherever_a_depth_is():
    tree = jax.tree.map(jnp.asarray, FOUR)
    assert str(gs.describe("unrolled", tree)) == str(gs.describe(gs.unrolled(), tree))
    assert set(gs.diagnostics.depth_statistics(tree, "unrolled")) == {"layers"}
    assert set(gs.diagnostics.cosine_matrix(tree, "unrolled")) == {"layers"}
    smooth = gs.smooth_over_depth("unrolled")
    for tx in (
        smooth,
        gs.diagnostics.monitor_depth(smooth, "unrolled"),
        gs.muon(0.1, "unrolled", smooth),
        gs.contrib.learn_alpha(optax.identity(), "unrolled"),
    ):
        tx.init(tree)
    injected = optax.inject_hyperparams(gs.smooth_over_depth)("unrolled", 0.4)
    assert set(injected.init(tree).hyperparams) == {"operator"}


def test_a_string_is_never_evaluated_as_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch = "__import__('pathlib').Path('evaluated').touch()"
    for argument in (
        "touch()",
        touch,
        f"(lambda: {touch})()",
        f"[{touch} for _ in 'a']",
        'f\'{__import__("pathlib").Path("evaluated").touch()}\'',
        "cycles",
        "1 + 1",
    ):
        for text in (f"maxtext(cycle={argument})", f"maxtext({argument})"):
            with pytest.raises(ValueError, match="never evaluated as code"):
                gs.smooth_over_depth(text)
    assert not list(tmp_path.iterdir())
