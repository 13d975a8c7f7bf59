"""Any tree with any depth: the result is the plain loops', or the error is ours.

The suite draws the same few dozen examples every time. For more of them, other ones in
every run, with the shares of results and refusals:

    GRADSMOOTH_FUZZ_EXAMPLES=2000 python -m pytest tests/depth/test_any_tree.py \
        --hypothesis-show-statistics
"""

import contextlib
import dataclasses
import itertools
import math
import os
import tracemalloc
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import reading
from contract import Applied, check, window
from reading import At, FirstMatch, Function, Pattern, Ranked, Wrong

import gradsmooth_optax as gs

MORE = os.environ.get("GRADSMOOTH_FUZZ_EXAMPLES")
# Rightly: many of these trees hold single layers only, or layers under odd names. When
# it is said is asked in `test_mistakes.py`.
pytestmark = pytest.mark.filterwarnings("ignore::gradsmooth_optax.DepthWarning")


def examples(number):
    """Settings for so many examples, unless the environment asks for more."""
    return hypothesis.settings(
        max_examples=int(MORE or number),
        derandomize=not MORE,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def one_in(number):
    return st.integers(1, number).map(lambda drawn: drawn == number)


# Leaves and trees.


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf to be made, and what a depth says of it."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    at: At | Wrong | None = None
    numpy: bool = False

    def make(self, rng):
        """Entries of size 2 to 3, or 0, so that neighbors never nearly cancel them."""
        sign = rng.choice([0, 1, -1], self.shape, p=[0.2, 0.4, 0.4])
        values = sign * rng.uniform(2, 3, self.shape)
        if self.dtype.startswith("complex"):
            values = values * np.exp(1j * rng.uniform(0, 1, self.shape))
        values = np.asarray(values).astype(jnp.dtype(self.dtype))
        if not self.numpy:
            return jnp.asarray(values)
        is_python = self.shape == () and self.dtype in ("float64", "complex128")
        return values.item() if is_python else values


@dataclasses.dataclass(frozen=True)
class Other:
    """A leaf that passes through, whatever a depth says of it."""

    kind: str = "integers"
    at: At | Wrong | None = None

    def make(self, rng):
        del rng
        return OTHERS[self.kind]()


OTHERS = {
    "integers": lambda: jnp.arange(6).reshape(2, 3),
    "integer": lambda: 3,
    "truths": lambda: np.array([True, False]),
    "float0": lambda: np.zeros((2, 3), jax.dtypes.float0),
    "key": lambda: jax.random.key(0),
}


def made(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf.make(rng), tree)


class Pair(NamedTuple):
    """Its keys are attributes; `value` is no box's here, and stays."""

    kernel: Any
    value: Any


@jax.tree_util.register_pytree_node_class
class Keyless(list):
    """Its keys are mere numbers, which are dropped at the end of a path."""

    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


TEXTS = ["a", "layers_0", "layers_1", "h", "3", "kernel", "value", "a/b", "1/w", "b//"]


@st.composite
def trees(draw, leaves, level=0):
    """Nested containers with these leaves, and with holes."""
    if len(leaves) == 1 and (level > 2 or draw(st.booleans())):
        return leaves[0]
    cuts = set(range(len(leaves)))
    if level < 3:
        cuts = draw(st.sets(st.sampled_from(sorted(cuts)), max_size=3))
    cuts = sorted(cuts | {0, len(leaves)})
    children = [
        draw(trees(leaves[a:b], level + 1)) for a, b in itertools.pairwise(cuts)
    ]
    if draw(one_in(4)):
        hole = draw(st.sampled_from([None, optax.MaskedNode(), {}, ()]))
        children.insert(draw(st.integers(0, len(children))), hole)
    kind = draw(st.sampled_from(["texts", "texts", "numbers", "list", "tuple", "own"]))
    if kind in ("texts", "numbers"):
        keys = TEXTS if kind == "texts" else range(-1, 9)
        if len(children) <= len(keys):
            keys = draw(st.permutations(keys))[: len(children)]
            return dict(zip(keys, children, strict=True))
    if kind == "own":
        return Pair(*children) if len(children) == 2 else Keyless(children)
    return tuple(children) if kind == "tuple" else children


# Depths that name the layers of each leaf.

LAYER_SHAPES = [(), (2, 3), (2, 3), (0, 2)]
DTYPES = ["float32"] * 3 + ["bfloat16", "float16", "float64", "complex64", "complex128"]
WRONG = [
    Wrong("not a Depth", lambda: "layers"),
    Wrong("`layer`", lambda: gs.Depth("s", "w", 1.5)),
    Wrong("`axis`", lambda: gs.Depth("s", "w", axis=(0, 0))),
    Wrong("`stride`", lambda: gs.Depth("s", "w", axis=0, stride=(1, 2))),
]
STACKS = ["s", ("t", 1)]
ROLES = ["a", 0, None]


@st.composite
def any_at(draw):
    """Well-formed arguments of a `Depth`, which need not fit a leaf."""
    axis = draw(st.sampled_from([None, 0, 1, -1, 2, (0,), (0, 1), (1, 0), (0, -2)]))
    stride = None
    if axis is not None and draw(st.booleans()):
        strides = st.sampled_from([0, 1, 2, -1])
        each = st.tuples(*(strides for _ in reading.as_tuple(axis)))
        stride = draw(each if isinstance(axis, tuple) else strides)
    stack, role = draw(st.sampled_from(STACKS)), draw(st.sampled_from(ROLES))
    return At(stack, role, draw(st.integers(-2, 4)), axis, stride)


@st.composite
def leaves_of_group(draw, stack, role):
    """Layers, maybe with holes, cut into leaves that hold one or many."""
    shape, dtype = draw(st.sampled_from(LAYER_SHAPES)), draw(st.sampled_from(DTYPES))
    first = draw(st.sampled_from([0, 0, 0, 2, -3]))
    layers = set(range(first, first + draw(st.sampled_from([1, 2, 3, 4, 5, 7]))))
    steps = [1, 1, 2, 3, -1, -2]
    if draw(one_in(2)):  # Holes, and leaves of which a part has neighbors.
        layers -= draw(st.sets(st.sampled_from(sorted(layers)), min_size=1, max_size=3))
        steps = [2, 3, -2]
    leaves = []
    while layers:
        stride = draw(st.sampled_from(steps))
        start = min(layers) if stride > 0 else max(layers)
        length = 1
        while start + length * stride in layers and not draw(one_in(5)):
            length += 1
        layers -= {start + i * stride for i in range(length)}
        at = At(stack, role, start)
        sizes, strides = (length,), (stride,)
        if length == 1 and draw(st.booleans()):
            sizes, strides = (), ()
        elif length in (4, 6) and draw(st.booleans()):
            rows = draw(st.sampled_from([2, length // 2]))
            columns = length // rows
            sizes, strides = (rows, columns), (columns * stride, stride)
        leaves.append(draw(leaf_along(at, shape, dtype, sizes, strides)))
    return leaves


@st.composite
def leaf_along(draw, at, shape, dtype, sizes, strides):
    """A leaf with depth axes of these sizes and strides, in any place and order."""
    rank = len(shape) + len(sizes)
    if draw(st.booleans()):
        sizes, strides = sizes[::-1], strides[::-1]
    axes = draw(st.permutations(range(rank)))[: len(sizes)]
    whole = list(shape)
    for axis, size in sorted(zip(axes, sizes, strict=True)):
        whole.insert(axis, size)
    axis = tuple(draw(st.sampled_from([axis, axis - rank])) for axis in axes)
    default = tuple(math.prod(sizes[k + 1 :]) for k in range(len(sizes)))
    stride = None if strides == default and draw(st.booleans()) else strides
    if len(axes) < 2:
        axis, stride = (axis or (None,))[0], (stride or (None,))[0]
    at = at._replace(axis=axis, stride=stride)
    return Leaf(tuple(whole), dtype, at, draw(st.booleans()))


@st.composite
def trees_with_depths(draw):
    """A tree, and a function that says which layers each leaf holds."""
    names = st.sampled_from([("s", "a"), ("s", 0), ("s", None), (("t", 1), "a")])
    leaves = []
    for stack, role in draw(st.lists(names, max_size=4, unique=True)):
        leaves += draw(leaves_of_group(stack, role))
    others = st.builds(Other, st.sampled_from(sorted(OTHERS)), st.none() | any_at())
    leaves += draw(st.lists(others, max_size=2))
    if not leaves or draw(one_in(3)):
        at = draw(st.none() | any_at())
        leaves.append(Leaf(draw(st.sampled_from(LAYER_SHAPES)), at=at))
    if draw(one_in(3)):  # Spoil one.
        i = draw(st.integers(0, len(leaves) - 1))
        at = draw(st.none() | any_at() | st.sampled_from(WRONG))
        leaves[i] = dataclasses.replace(leaves[i], at=at)
    tree = draw(trees(draw(st.permutations(leaves))))
    return tree, draw(depths_of(tree))


@st.composite
def depths_of(draw, tree):
    table = {}
    # Keyless containers: paths are not unique.
    for path, leaf in reading.paths_of(tree):
        table.setdefault(path, leaf.at)
    role = draw(st.sampled_from(ROLES))
    of_role = {
        path: at if isinstance(at, At) and at.role == role else None
        for path, at in table.items()
    }
    return draw(
        st.sampled_from(
            [
                *[Function(table)] * 3,
                Ranked(Function(table)),
                FirstMatch([Ranked(Function(of_role)), Function(table)]),
            ]
        )
    )


# Patterns, which find the layers of a model.

BLOCK = {"mlp/kernel": (2, 3), "mlp/bias": (3,), "scale": ()}
PATTERNS = [
    Pattern(gs.unrolled, None, {}),
    Pattern(gs.unrolled, r"layers_(\d+)/", {}),
    Pattern(gs.unrolled, r"(\d+)/", {"start": -2}),
    Pattern(gs.unrolled, r"h(?:_(\d+))?/", {"stack": "s"}),
    Pattern(gs.unrolled, r"(?P<stack>[a-z]+)/layers_(?P<layer>\d+)/", {}),
    Pattern(gs.unrolled, r"(?P<layer>\d+)/(?P<role>mlp|scale)", {}),
    Pattern(gs.unrolled, r"(layers)_\d+/", {}),
    Pattern(gs.unrolled, r"^(.*)/", {}),
    Pattern(gs.scanned, "blocks/", {}),
    Pattern(gs.scanned, "mlp", {"axis": -1}),
    Pattern(gs.scanned, "coder/", {"axis": 3}),
    Pattern(gs.scanned, "^", {"axis": (0, 1)}),
    Pattern(gs.scanned, "kernel", {"axis": (1, 0), "stride": (1, 2)}),
    Pattern(gs.scanned, r"blocks/|layers_(\d+)/", {"stack": "s", "stride": 2}),
    Pattern(gs.scanned, "blocks", {"axis": (0, 1), "stride": (1, 1)}),
]


@st.composite
def parts_of_models(draw):
    """A part of a model, and patterns that find its layers."""
    roles = draw(st.sets(st.sampled_from(sorted(BLOCK)), min_size=1))
    axis = 0 if "scale" in roles else draw(st.sampled_from([0, 1]))

    def block(*sizes):
        shapes = {role: BLOCK[role] for role in sorted(roles)}
        return {r: Leaf(s[:axis] + sizes + s[axis:]) for r, s in shapes.items()}

    numbers = list(range(draw(st.sampled_from([1, 2, 3, 3, 4]))))
    if draw(one_in(4)):
        numbers.remove(draw(st.sampled_from(numbers)))
    stack = draw(st.sampled_from([{}, {"stack": "s"}, {"stack": ("t", 1), "start": 2}]))
    by_number = [Pattern(gs.unrolled, None, stack)]
    stacked = [Pattern(gs.scanned, "blocks/", {"axis": axis, **stack})]
    layouts = [
        ({f"layers_{i}": block() for i in numbers}, by_number),
        ({str(i): block() for i in numbers}, by_number),
        ({i: block() for i in numbers}, by_number),
        ([block() if i in numbers else None for i in range(4)], by_number),
        (
            {f"h_{i}/linear" if i else "h/linear": block() for i in numbers},
            [Pattern(gs.unrolled, r"/h(?:_(\d+))?/", stack)],
        ),
        ({"blocks": block(3)}, stacked),
        (
            {"blocks": block(2, 2)},
            [Pattern(gs.scanned, "blocks/", {"axis": (axis, axis + 1), **stack})],
        ),
        (
            {f"layers_{i}": block(2) for i in numbers},
            [
                Pattern(
                    gs.scanned, r"layers_(\d+)/", {"axis": axis, "stride": len(numbers)}
                )
            ],
        ),
        (
            {"blocks": block(2), "layers_2": block(), "layers_3": block()},
            [
                Pattern(gs.scanned, "blocks/", {"axis": axis, "stack": "s"}),
                Pattern(gs.unrolled, None, {"stack": "s"}),
            ],
        ),
    ]
    return draw(st.sampled_from(layouts))


def is_no_scale(path, leaf):
    return "scale" not in path


@st.composite
def models_with_patterns(draw):
    """A model, maybe with a leaf spoiled, and a spec that may fit it."""
    tree, members = {"embed": Leaf((2, 3))}, []
    for name in draw(
        st.sampled_from([["encoder"], ["decoder", "mtp"], ["encoder", "h_1"]])
    ):
        tree[name], patterns = draw(parts_of_models())
        members += patterns
    if draw(one_in(4)):
        flat, treedef = jax.tree.flatten(tree)
        others = [None, optax.MaskedNode(), Other(), Leaf((2, 3), "bfloat16")]
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from(others))
        tree = treedef.unflatten(flat)
    if draw(one_in(2)):
        members.insert(0, draw(st.sampled_from(PATTERNS)))
    spec = FirstMatch(members) if len(members) > 1 else members[0]
    wrappers = [
        Ranked,
        lambda spec: reading.Only(spec, is_no_scale),
        lambda spec: reading.OnlyProjections(spec, bias=True),
        lambda spec: reading.OnlyProjections(spec, bias=False),
    ]
    for wrap in draw(st.lists(st.sampled_from(wrappers), max_size=2)):
        spec = wrap(spec)
    return tree, spec


# What is applied.


def falling(count):
    """A schedule in the widest dtype that there is: optax's are in float32."""
    return 0.3 - 0.01 * jnp.asarray(count, float)


def skewed(num_layers):
    """Not symmetric, and mostly diagonal: layers never nearly cancel each other."""
    weights = np.arange(num_layers**2).reshape(num_layers, num_layers) % 3 - 1
    return np.eye(num_layers) + 0.3 / num_layers * weights


def muted(num_layers):
    """The first layer receives nothing, so that norms after smoothing can be 0."""
    matrix = skewed(num_layers)
    matrix[0] = 0
    return matrix


@st.composite
def operators(draw):
    if draw(one_in(6)):
        num_layers = draw(st.integers(2, 4))
        return Applied(gs.dense(skewed(num_layers)), skewed, num_layers)
    if draw(one_in(3)):
        function = draw(st.sampled_from([skewed, muted]))
        return Applied(gs.operator_fn(function), function)
    radius, decay = (
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sampled_from([None, 0.7])),
    )
    applied = window(draw(st.sampled_from([0.3, 0.3, 0])), radius, decay)
    if draw(one_in(4)):
        scheduled = gs.window(falling, radius, decay)
        applied = window(0.3, radius, decay)._replace(operator=scheduled)
    return applied


OPTIONS = st.fixed_dictionaries(
    {
        "variant": st.sampled_from(["standard", "norm_preserving", "directional"]),
        "norm_scope": st.sampled_from(["param", "block", "block"]),
        "strict": one_in(3),
    }
)
SEEDS = st.integers(0, 99)


# What holds.


@examples(20)
@hypothesis.given(trees_with_depths(), operators(), OPTIONS, SEEDS, one_in(6))
def test_any_depths_of_any_tree_smooth_as_the_plain_loops_do_or_are_refused_by_us(
    enable_x64, case, applied, options, seed, x64
):
    tree, description = case
    with enable_x64() if x64 else contextlib.nullcontext():
        for outcome in check(made(tree, seed), description, applied, options):
            hypothesis.event(outcome)


@pytest.mark.slow
@examples(40)
@hypothesis.given(models_with_patterns(), operators(), OPTIONS, SEEDS)
def test_any_specs_of_any_model_smooth_as_the_plain_loops_do_or_are_refused_by_us(
    case, applied, options, seed
):
    tree, description = case
    for outcome in check(made(tree, seed), description, applied, options):
        hypothesis.event(outcome)


@pytest.mark.parametrize("variant", ["standard", "directional"])
def test_ranked_neighbors_may_be_in_another_leaf_for_some_layers_of_a_leaf(variant):
    # Rare among what is drawn: 0 and 20 have neighbors in the second leaf, 10 has not.
    tree = {
        "first": Leaf((3, 2), at=At("s", "w", 0, axis=0, stride=10)),
        "second": Leaf((3, 2), at=At("s", "w", 2, axis=0, stride=10)),
        "between": Leaf((2,), at=At("s", "w", 11)),
    }
    table = {(name,): leaf.at for name, leaf in tree.items()}
    options = {"variant": variant, "norm_scope": "block", "strict": True}
    done = check(made(tree, 0), Ranked(Function(table)), window(0.3), options)
    assert done == ["smoothed"]


@hypothesis.given(
    st.sets(st.integers(0, 10**6), min_size=2, max_size=6),
    st.sampled_from(["layers_", "h", "block-", ""]),
)
def test_unrolled_finds_any_layer_numbers_and_ranked_closes_any_gaps(numbers, prefix):
    tree = {f"{prefix}{i}": {"w": np.ones(2)} for i in numbers}
    layers = tuple(sorted(numbers))
    for spec in (gs.unrolled(), gs.ranked(gs.unrolled())):
        (group,) = gs.describe(spec, tree).groups
        assert group.layers == layers
    assert group.runs == (layers,)


# What it found.


def test_a_gap_costs_the_same_memory_however_wide_it_is():
    def peak(missing):
        tree = {"block_0": np.ones(2), f"block_{missing + 1}": np.ones(2)}
        tracemalloc.start()
        with pytest.raises(ValueError, match="missing"):
            gs.smooth_over_depth(gs.unrolled()).init(tree)
        assert "gap" in str(gs.describe(gs.unrolled(), tree))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(10)  # Fill the caches.
    assert peak(20_000) < 2 * peak(10)


@pytest.mark.parametrize(("radius", "decay"), [(3, None), (2, 0.7)])
def test_a_float32_alpha_costs_float64_leaves_no_precision(radius, decay, enable_x64):
    # As an array or as what optax's schedules return. A quarter is exact in float32.
    blocks = oracle.random_blocks(6, "float64", {"w": (2,)})
    expected = oracle.window(blocks, 0.25, radius, decay)
    with enable_x64():
        tree = jax.tree.map(jnp.asarray, oracle.unrolled_tree(blocks))
        operator = gs.window(jnp.float32(0.25), radius, decay)
        tx = gs.smooth_over_depth(gs.unrolled(), operator)
        out, _ = tx.update(tree, tx.init(tree))
    oracle.assert_blocks_close([out[f"layers_{i}"] for i in range(6)], expected)
