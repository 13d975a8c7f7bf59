r"""Parameter trees of real JAX training stacks, and where depth is in them.

One `Stack` per row of a table: every leaf with its path and shape, and which true
layers it holds of which chain of layers. From that any tree is filled from blocks
(`blocks[l][role]`) and read back, without the library's help. Where the package that
makes the tree is a dependency of the tests, `real` builds it with that package, and it
has to have the leaves that the table says; elsewhere the paths are transcribed from the
source that is named.

A path is written as "a/b": "b" is a dict key, "<3>" a dict's integer key, "[3]" an
index of a sequence, ".b" an attribute, "<flat 0>" the index of a node without keys, and
"|" is a slash inside a dict key. A final ".value" is a box, which `update` may not see.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    SequenceKey,
    register_pytree_node_class,
    register_pytree_with_keys_class,
)

import gradsmooth_optax as gs


class Leaf(NamedTuple):
    """One leaf of a tree.

    Attributes:
      path: as written above.
      shape: of the whole leaf.
      chain: the sequence of layers that it is a part of, None outside of depth.
      role: which parameter of a layer it is.
      layers: the true layers that it holds, by their index along `axes`.
      axes: the array axes over depth.
      names: the names of all its axes, where a box or a named array carries them.
    """

    path: str
    shape: tuple[int, ...]
    chain: str | None = None
    role: str = ""
    layers: np.ndarray = np.zeros((), int)
    axes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


class Stack(NamedTuple):
    """A row of the table.

    Attributes:
      name: for the test's id.
      source: where the paths are from.
      leaves: the tree.
      spec: where depth is, written by hand.
      preset: the same from `gs.layouts`, if that has it.
      real: the tree as its package builds it, if that is installed.
      ranked: whether layers of a kind are neighbors over those of another kind.
      chains: the chains that `spec` is meant for; None for all of them.
    """

    name: str
    source: str
    leaves: list[Leaf]
    spec: Any
    preset: Any = None
    real: Callable[[], Any] | None = None
    ranked: bool = False
    chains: tuple[str, ...] | None = None

    def covers(self, leaf: Leaf) -> bool:
        """Whether `spec` is meant to find this leaf."""
        chains = self.chains
        return leaf.chain is not None and (chains is None or leaf.chain in chains)


# -- Blocks and trees ------------------------------------------------------------------


def role_of(leaf):
    """Layers are alike in a role of one shape."""
    return f"{leaf.role} {layer_shape(leaf)}"


def layer_shape(leaf):
    return tuple(n for axis, n in enumerate(leaf.shape) if axis not in leaf.axes)


def slots(leaf):
    """(layer, the index of its slice) for each layer that the leaf holds."""
    for position, layer in np.ndenumerate(leaf.layers):
        index = [slice(None)] * len(leaf.shape)
        for axis, i in zip(leaf.axes, position, strict=True):
            index[axis] = i
        yield int(layer), tuple(index)


def random_blocks(stack, seed=0):
    """`{chain: blocks}`, of random numbers."""
    rng = np.random.default_rng(seed)
    chains = defaultdict(lambda: defaultdict(dict))
    for leaf in stack.leaves:
        if leaf.chain is not None:
            for layer, _ in slots(leaf):
                x = rng.normal(size=layer_shape(leaf)).astype(np.float32)
                chains[leaf.chain][layer][role_of(leaf)] = x
    return {
        chain: [dict(blocks[layer]) for layer in range(max(blocks) + 1)]
        for chain, blocks in chains.items()
    }


def build(stack, chains, skeleton=None):
    """The tree that holds the blocks of the chains, and ones outside of depth."""
    values = {}
    for leaf in stack.leaves:
        value = np.ones(leaf.shape, np.float32)
        if leaf.chain is not None:
            for layer, index in slots(leaf):
                value[index] = chains[leaf.chain][layer][role_of(leaf)]
        values[leaf.path] = value
    return fill(stack, values, skeleton)


def fill(stack, values, skeleton=None):
    """The tree with these values by path."""
    values = {path: jnp.asarray(x) for path, x in values.items()}
    if skeleton is None and stack.real is not None:
        skeleton = stack.real()
    if skeleton is None:
        boxed = (_boxed(leaf, values[leaf.path]) for leaf in stack.leaves)
        return nested([(keys(path), x) for path, x in boxed])
    flat, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    shapes = {unboxed_path(text(path)): np.shape(x) for path, x in flat}
    assert shapes == {unboxed_path(leaf.path): leaf.shape for leaf in stack.leaves}
    values = {unboxed_path(path): x for path, x in values.items()}
    return treedef.unflatten([values[unboxed_path(text(path))] for path, _ in flat])


def by_path(tree):
    """The leaves of a tree by their path, without boxes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {unboxed_path(text(path)): x for path, x in flat}


def read(stack, tree):
    """The blocks that `build` put into a tree."""
    found = by_path(tree)
    chains = defaultdict(lambda: defaultdict(dict))
    for leaf in stack.leaves:
        if leaf.chain is not None:
            value = np.asarray(found[unboxed_path(leaf.path)])
            for layer, index in slots(leaf):
                chains[leaf.chain][layer][role_of(leaf)] = value[index]
    return {
        chain: [dict(blocks[layer]) for layer in range(max(blocks) + 1)]
        for chain, blocks in chains.items()
    }


def at_update(tree):
    """The tree as `update` sees it: `nnx.Optimizer` and `nn.unbox` open the boxes."""
    return jax.tree.map(_unboxed, tree, is_leaf=_is_box)


def _unboxed(node):
    if not _is_box(node):
        return node
    return node[...] if hasattr(node, "get_metadata") else node.value


def _is_box(node):
    return hasattr(node, "get_metadata") or hasattr(node, "names")


# -- Who is whose neighbor -------------------------------------------------------------


def true_pairs(stack):
    """{((chain, role), layer, next layer)} of all neighbors."""
    layers = defaultdict(set)
    for leaf in stack.leaves:
        if leaf.chain is not None:
            layers[leaf.chain, role_of(leaf)] |= {layer for layer, _ in slots(leaf)}
    return {
        (name, a, b)
        for name, of_name in layers.items()
        for a, b in itertools.pairwise(sorted(of_name))
        if stack.ranked or b == a + 1
    }


def coupled_pairs(stack, updates, out, alpha):
    """The pairs that a window couples, and the paths where it does something else.

    The window with few true neighbors gives one of four results. Random numbers tell
    them apart.
    """
    chains, changed = read(stack, updates), read(stack, out)
    before, after = by_path(updates), by_path(out)
    sides = defaultdict(lambda: [None, None])
    for name, a, b in true_pairs(stack):
        sides[name, a][1] = b
        sides[name, b][0] = a
    found, wrong = set(), set()
    for leaf in stack.leaves:
        path = unboxed_path(leaf.path)
        if leaf.chain is None and after[path] is not before[path]:
            wrong.add(path)
        for layer, _ in slots(leaf) if leaf.chain is not None else ():
            name, role = (leaf.chain, role_of(leaf)), role_of(leaf)
            own = chains[leaf.chain][layer][role]
            others = [n for n in sides[name, layer] if n is not None]
            for chosen in subsets(others):
                differences = [chains[leaf.chain][n][role] - own for n in chosen]
                expected = own + alpha / 2 * sum(differences, start=0 * own)
                if np.allclose(changed[leaf.chain][layer][role], expected, 0, 1e-5):
                    found |= {(name, *sorted((layer, n))) for n in chosen}
                    break
            else:
                wrong.add(path)
    return found, wrong


def subsets(items):
    counts = range(len(items) + 1)
    return itertools.chain.from_iterable(
        itertools.combinations(items, n) for n in counts
    )


# -- Paths -----------------------------------------------------------------------------


def keys(path):
    """The jax keys that a written path stands for."""
    return [_key(segment) for segment in path.split("/")]


def _key(segment):
    if segment.startswith("."):
        return GetAttrKey(segment[1:])
    if match := re.fullmatch(r"\[(\d+)\]", segment):
        return SequenceKey(int(match[1]))
    if match := re.fullmatch(r"<(\d+)>", segment):
        return DictKey(int(match[1]))
    return DictKey(segment.replace("|", "/"))


def text(key_path):
    """The written path of jax keys."""
    return "/".join(map(_segment, key_path))


def _segment(key):
    if isinstance(key, GetAttrKey):
        return f".{key.name}"
    if isinstance(key, SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, FlattenedIndexKey):
        return f"<flat {key.key}>"
    return f"<{key.key}>" if isinstance(key.key, int) else key.key.replace("/", "|")


def unboxed_path(path):
    return path.removesuffix("/.value")


# -- Containers ------------------------------------------------------------------------


@register_pytree_with_keys_class
class Attributes:
    """A node whose children are attributes, such as an Equinox module."""

    def __init__(self, children):
        vars(self).update(children)

    def tree_flatten_with_keys(self):
        return [(GetAttrKey(k), x) for k, x in vars(self).items()], tuple(vars(self))

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(dict(zip(names, children, strict=True)))


@register_pytree_with_keys_class
class Box:
    """Like `nn.LogicallyPartitioned` and NNX's variables: an array with axis names."""

    def __init__(self, value, names):
        self.value = value
        self.names = names

    def tree_flatten_with_keys(self):
        return [(GetAttrKey("value"), self.value)], self.names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(children[0], names)


class Axis(NamedTuple):
    name: str
    size: int


@register_pytree_node_class
class NamedArray:
    """Like haliax's: its array has no key, and its axes have names."""

    def __init__(self, array, axes):
        self.array = array
        self.axes = axes

    def tree_flatten(self):
        return [self.array], self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


def _boxed(leaf, array):
    """The path and the leaf, with a box for what `nested` cannot make of the path."""
    if leaf.path.endswith("/<flat 0>"):
        axes = tuple(map(Axis, leaf.names or "abcd", leaf.shape))
        return leaf.path.removesuffix("/<flat 0>"), NamedArray(array, axes)
    if leaf.path.endswith("/.value"):
        return unboxed_path(leaf.path), Box(array, leaf.names)
    return leaf.path, array


def nested(items):
    """The tree of `(keys, leaf)`s."""
    if not items[0][0]:
        ((_, leaf),) = items
        return leaf
    children = defaultdict(list)
    for (first, *rest), leaf in items:
        children[first].append((rest, leaf))
    first = next(iter(children))
    subtrees = {key: nested(of_key) for key, of_key in children.items()}
    if isinstance(first, GetAttrKey):
        return Attributes({key.name: x for key, x in subtrees.items()})
    if isinstance(first, SequenceKey):
        length = 1 + max(key.idx for key in subtrees)
        return [subtrees.get(SequenceKey(i)) for i in range(length)]
    return {key.key: x for key, x in subtrees.items()}


# -- How layers are laid out -----------------------------------------------------------


def each(template, roles, layers, chain="layers", numbers=None):
    """One leaf per layer and role: "{}" is the number, "*" the role's path."""
    numbers = layers if numbers is None else numbers
    return [
        Leaf(
            template.format(number).replace("*", role),
            shape,
            chain,
            role,
            np.array(layer),
        )
        for layer, number in zip(layers, numbers, strict=True)
        for role, shape in roles.items()
    ]


def scan(template, roles, layers, axes=0, chain="layers"):
    """One leaf per role, with `layers` along `axes` of it."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    layers = np.asarray(layers)
    leaves = []
    for role, shape in roles.items():
        whole = list(shape)
        for axis, size in zip(axes, layers.shape, strict=True):
            whole.insert(axis, size)
        path = template.replace("*", role)
        leaves.append(Leaf(path, tuple(whole), chain, role, layers, axes))
    return leaves


def outside(shapes):
    """Leaves outside of depth."""
    return [Leaf(path, shape) for path, shape in shapes.items()]


def named(leaves, **depth_names):
    """The leaves in boxes with axis names: those over depth, by a part of the path."""
    by_size = {2: "heads", 3: "embed", 5: "mlp", 7: "vocab"}
    boxed = []
    for leaf in leaves:
        if leaf.role == "attention/A_log":  # MaxText annotates no bare arrays
            boxed.append(leaf)
            continue
        names = [by_size.get(n) for n in leaf.shape]
        found = next((v for k, v in depth_names.items() if k in leaf.path), ())
        for axis, name in zip(leaf.axes, found, strict=False):
            names[axis] = name
        path = leaf.path if leaf.path.endswith("<flat 0>") else f"{leaf.path}/.value"
        boxed.append(leaf._replace(path=path, names=tuple(names)))
    return boxed


def under(prefix, shapes):
    return {f"{prefix}/{path}": shape for path, shape in shapes.items()}


# -- MaxText ---------------------------------------------------------------------------
# AI-Hypercomputer/maxtext e591f30cb: layers/decoders.py, nnx_decoders.py, pipeline.py,
# models/*.py, and the golden tests/utils/sharding_info/*/logical_shardings.json.

MAXTEXT = "AI-Hypercomputer/maxtext e591f30cb"
NORM = {"pre_self_attention_layer_norm/scale": (3,)}
ATTENTION = {
    "self_attention/query/kernel": (3, 2, 2),
    "self_attention/query/bias": (2, 2),
}
MLP = {"mlp/wo/kernel": (5, 3)}
LLAMA = {**NORM, **ATTENTION, **MLP}
MAXTEXT_OUTSIDE = outside(
    {
        "params/token_embedder/embedding": (7, 3),
        "params/decoder/decoder_norm/scale": (3,),
        "params/decoder/logits_dense/kernel": (3, 7),
        "params/mtp_block/mtp_layer_1/mtp_1_transformer_layer/mlp/wo/kernel": (5, 3),
    }
)
DECODER = "params/decoder/"


def gemma2_unscanned(path, leaf):
    """Pairs of a local and a global layer, layers_{pair}/mlp_local."""
    match = re.search(r"decoder/layers_(\d+)/(\w+)_(local|global)/", path_text(path))
    if match is None:
        return None
    layer = 2 * int(match[1]) + (match[3] == "global")
    role = match[2] + path_text(path)[match.end() :]
    return gs.Depth("decoder", role, layer)


def path_text(path):
    return "/".join(map(str, path))


def gemma2(template, make):
    """The leaves that `make(template, roles, kind)` lays out for both kinds."""
    leaves = []
    for kind in ("local", "global"):
        roles = {
            f"self_attention_{kind}/query/kernel": (3, 2, 2),
            f"self_attention_{kind}/out/kernel": (2, 2, 3),
            f"mlp_{kind}/wi_0/kernel": (3, 5),
            f"mlp_{kind}/wo/kernel": (5, 3),
            f"pre_ffw_norm_{kind}/scale": (3,),
        }
        leaves += [
            leaf._replace(role=leaf.role.replace(f"_{kind}", ""))
            for leaf in make(template, roles, kind == "global")
        ]
    return leaves


def gemma4(axis):
    """Scanned blocks of scanned local layers and a global one, whose heads differ."""
    local_attention = {"self_attention/query/kernel": (3, 2, 2)}
    global_attention = {"self_attention/query/kernel": (3, 2, 4)}
    common = {"pre_ffw_norm/scale": (3,)}
    blocks = 6 * np.arange(4)
    top = DECODER + "scanned_blocks/"
    return [
        *scan(
            top + "local_layers/*",
            {**local_attention, **common},
            blocks[:, None] + np.arange(5),
            (axis, axis + 1),
        ),
        *scan(top + "global_layer/*", {**global_attention, **common}, blocks + 5, axis),
    ]


def qwen3_next():
    """Cycles of four: three linear attentions and a full one."""
    common = {
        "input_layernorm/scale": (3,),
        "mlp/routed_experts/wi_0": (2, 3, 5),
        "mlp/routed_experts/gate/kernel": (3, 2),
    }
    linear = {"attention/in_proj_qkvz/kernel": (3, 5), "attention/A_log": (2,)}
    full = {"attention/attention/query/kernel": (3, 2, 2)}
    return [
        leaf
        for p in range(4)
        for leaf in scan(
            f"{DECODER}layers/layer_{p}/*",
            {**common, **(full if p == 3 else linear)},
            p + 4 * np.arange(4),
            1,
        )
    ]


def llama4():
    """Cycles of four; every second layer has experts."""
    experts = {
        "Llama4MoEBlock_0/MoeBlock_0/wi_0": (2, 3, 5),
        "Llama4MoEBlock_0/MoeBlock_0/gate/kernel": (3, 2),
        "Llama4MoEBlock_0/shared_experts/wi_0/kernel": (3, 5),
    }
    return [
        leaf
        for p in range(4)
        for leaf in scan(
            f"{DECODER}layers/layers_{p}/*",
            {**NORM, **ATTENTION, **(experts if p % 2 else MLP)},
            p + 4 * np.arange(4),
            1,
        )
    ]


DEEPSEEK_EXPERTS = {
    "DeepSeekMoeBlock_0/MoeBlock_0/wi_0": (2, 3, 5),
    "DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": (3, 2),
    "DeepSeekMoeBlock_0/shared_experts/wi_0/kernel": (3, 5),
}
GPT_OSS = {
    "GptOssAttention/query/kernel": (3, 2, 2),
    "GptOssAttention/query/bias": (2, 2),
    "GptOssAttention/sinks": (2,),
    "GptOssMlp/wi_0": (2, 3, 5),
    "GptOssMlp/wi_0_bias": (2, 5),
    "GptOssMlp/gate/kernel": (3, 2),
}
MIXTRAL = {
    **NORM,
    **ATTENTION,
    "MoeBlock_0/wi_0": (2, 3, 5),
    "MoeBlock_0/gate/kernel": (3, 2),
}
CYCLE_OF_4 = gs.ranked(
    gs.scanned(r"decoder/layers/layers?_(\d)/", axis=1, stride=4, stack="decoder")
)
PIPELINE = DECODER + "pipeline_module/layers/"

MAXTEXT_STACKS = [
    Stack(
        "maxtext-scanned-axis-1",
        MAXTEXT,
        scan(DECODER + "layers/*", LLAMA, range(4), 1) + MAXTEXT_OUTSIDE,
        gs.scanned("decoder/layers/", axis=1),
        gs.layouts.maxtext(),
    ),
    Stack(
        "maxtext-scanned-axis-0",
        MAXTEXT,
        scan(DECODER + "layers/*", LLAMA, range(4), 0) + MAXTEXT_OUTSIDE,
        gs.scanned("decoder/layers/"),
        gs.layouts.maxtext(scan_axis=0),
    ),
    Stack(
        "maxtext-unrolled",
        MAXTEXT,
        [
            *each(DECODER + "layers_{}/*", LLAMA, range(11)),
            *each(
                "params/vision_encoder/Llama4VisionModel_0/Llama4VisionEncoder_0/"
                "layers_{}/*",
                {"self_attention_vision/query/kernel": (3, 2, 2), **NORM},
                range(3),
                "vision",
            ),
            *MAXTEXT_OUTSIDE,
        ],
        gs.unrolled(r"(?:^|/)layers_(\d+)/"),
        gs.layouts.maxtext(scan_axis=None),
    ),
    Stack(
        "maxtext-gemma2-scanned-pairs",
        MAXTEXT,
        gemma2(
            DECODER + "layers/*",
            lambda t, roles, last: scan(t, roles, last + 2 * np.arange(4), 1),
        )
        + MAXTEXT_OUTSIDE,
        gs.first_match(
            gs.scanned(
                r"layers/(?P<role>\w+)_local/", axis=1, stride=2, stack="decoder"
            ),
            gs.scanned(
                r"layers/(?P<role>\w+)_global/",
                axis=1,
                start=1,
                stride=2,
                stack="decoder",
            ),
        ),
        gs.layouts.maxtext_gemma2(),
    ),
    Stack(
        "maxtext-gemma2-unrolled-pairs",
        MAXTEXT,
        gemma2(
            DECODER + "layers_{}/*",
            lambda t, roles, last: each(t, roles, range(last, 6, 2), numbers=range(3)),
        )
        + MAXTEXT_OUTSIDE,
        gs.depth_fn(gemma2_unscanned),
        gs.layouts.maxtext_gemma2(scan_axis=None),
    ),
    Stack(
        "maxtext-gemma3-cycles-and-remainder",
        MAXTEXT,
        [
            *(
                leaf
                for p in range(6)
                for leaf in scan(
                    f"{DECODER}layers/layers_{p}/*", LLAMA, p + 6 * np.arange(4), 1
                )
            ),
            *each(
                DECODER + "layers_remainder/layers_{}/*",
                LLAMA,
                [24, 25],
                numbers=[0, 1],
            ),
            *MAXTEXT_OUTSIDE,
        ],
        gs.first_match(
            gs.scanned(r"layers/layers_(\d+)/", axis=1, stride=6, stack="decoder"),
            gs.unrolled(r"layers_remainder/layers_(\d+)/", start=24, stack="decoder"),
        ),
        gs.layouts.maxtext(cycle=6, num_cycles=4),
    ),
    *(
        Stack(
            f"maxtext-gemma4-nested-scans-axis-{axis}",
            MAXTEXT,
            gemma4(axis) + MAXTEXT_OUTSIDE,
            gs.ranked(
                gs.first_match(
                    gs.scanned(
                        "local_layers/",
                        axis=(axis, axis + 1),
                        stride=(6, 1),
                        stack="decoder",
                    ),
                    gs.scanned(
                        "global_layer/", axis=axis, start=5, stride=6, stack="decoder"
                    ),
                )
            ),
            gs.layouts.maxtext_gemma4(scan_axis=axis),
            ranked=True,
        )
        for axis in (1, 0)
    ),
    Stack(
        "maxtext-qwen3-next-cycle-of-4",
        MAXTEXT,
        qwen3_next() + MAXTEXT_OUTSIDE,
        CYCLE_OF_4,
        gs.ranked(gs.layouts.maxtext(cycle=4)),
        ranked=True,
    ),
    Stack(
        "maxtext-llama4-alternating-experts",
        MAXTEXT,
        llama4() + MAXTEXT_OUTSIDE,
        CYCLE_OF_4,
        gs.ranked(gs.layouts.maxtext(cycle=4)),
        ranked=True,
    ),
    Stack(
        "maxtext-gpt-oss-cycle-of-2",
        MAXTEXT,
        [
            *scan(DECODER + "layers/layers_0/*", GPT_OSS, [0, 2, 4, 6], 1),
            *scan(DECODER + "layers/layers_1/*", GPT_OSS, [1, 3, 5, 7], 1),
            *MAXTEXT_OUTSIDE,
        ],
        gs.scanned(r"layers/layers_(\d+)/", axis=1, stride=2),
        gs.layouts.maxtext(cycle=2),
    ),
    Stack(
        "maxtext-deepseek-scanned",
        MAXTEXT,
        [
            *scan(DECODER + "dense_layers/*", LLAMA, range(2), 1),
            *scan(
                DECODER + "moe_layers/*",
                {**NORM, **ATTENTION, **DEEPSEEK_EXPERTS},
                range(2, 6),
                1,
            ),
            *MAXTEXT_OUTSIDE,
        ],
        gs.first_match(
            gs.scanned("dense_layers/", axis=1, stack="decoder"),
            gs.scanned("moe_layers/", axis=1, start=2, stack="decoder"),
        ),
        gs.layouts.maxtext_deepseek(2),
    ),
    Stack(
        "maxtext-deepseek-unrolled",
        MAXTEXT,
        [
            *each(DECODER + "dense_layers_{}/*", LLAMA, range(2)),
            *each(
                DECODER + "moe_layers_{}/*",
                {**NORM, **ATTENTION, **DEEPSEEK_EXPERTS},
                range(2, 6),
                numbers=range(4),
            ),
            *MAXTEXT_OUTSIDE,
        ],
        gs.first_match(
            gs.unrolled(r"dense_layers_(\d+)/", stack="decoder"),
            gs.unrolled(r"moe_layers_(\d+)/", start=2, stack="decoder"),
        ),
        gs.layouts.maxtext_deepseek(2, scan_axis=None),
    ),
    Stack(
        "maxtext-mixtral-experts-on-axis-0",
        MAXTEXT,
        scan(DECODER + "layers/*", MIXTRAL, range(4), 1) + MAXTEXT_OUTSIDE,
        gs.scanned("decoder/layers/", axis=1),
        gs.layouts.maxtext(),
    ),
    Stack(
        "maxtext-pipeline-repeats-and-stages",
        MAXTEXT,
        scan(PIPELINE + "*", {**NORM, **ATTENTION}, np.arange(6).reshape(2, 3), (0, 1))
        + MAXTEXT_OUTSIDE,
        gs.scanned("pipeline_module/layers/", axis=(0, 1)),
        gs.layouts.maxtext_pipeline(),
    ),
    Stack(
        "maxtext-pipeline-repeats-stages-and-layers",
        MAXTEXT,
        scan(
            PIPELINE + "scanned_layers/*",
            {**NORM, **ATTENTION},
            np.arange(12).reshape(2, 3, 2),
            (0, 1, 3),
        )
        + MAXTEXT_OUTSIDE,
        gs.scanned("scanned_layers/", axis=(0, 1, 3)),
        gs.layouts.maxtext_pipeline((0, 1, 3)),
    ),
    Stack(
        "maxtext-pipeline-stages-and-layers",
        MAXTEXT,
        scan(
            PIPELINE + "scanned_layers/*",
            {**NORM, **ATTENTION},
            np.arange(6).reshape(3, 2),
            (0, 2),
        )
        + MAXTEXT_OUTSIDE,
        gs.scanned("scanned_layers/", axis=(0, 2)),
        gs.layouts.maxtext_pipeline((0, 2)),
    ),
    Stack(
        # The default of scan_layers_per_stage: the layers of a stage are unrolled.
        "maxtext-pipeline-unrolled-layers-per-stage",
        MAXTEXT,
        [
            leaf
            for p in range(2)
            for leaf in scan(
                f"{PIPELINE}layers_{p}/*",
                {**NORM, **ATTENTION},
                p + 2 * np.arange(6).reshape(2, 3),
                (0, 1),
            )
        ]
        + MAXTEXT_OUTSIDE,
        gs.scanned(r"pipeline_module/layers/layers_(\d+)/", axis=(0, 1), stride=(6, 2)),
        gs.layouts.maxtext_pipeline((0, 1), layers_per_stage=2, num_stages=3),
    ),
]

# What `init` sees of Linen's MaxText, and of `nnx.state(model)`.
_BY_NAME = {stack.name: stack for stack in MAXTEXT_STACKS}
MAXTEXT_STACKS += [
    _BY_NAME[name]._replace(
        name=f"{name}-boxed", leaves=named(_BY_NAME[name].leaves, **names)
    )
    for name, names in {
        "maxtext-scanned-axis-1": {"layers/": ("layers",)},
        "maxtext-scanned-axis-0": {"layers/": ("layers",)},
        "maxtext-unrolled": {},
        "maxtext-gemma2-scanned-pairs": {"layers/": ("layers",)},
        "maxtext-gemma3-cycles-and-remainder": {"layers/layers": ("layers",)},
        "maxtext-gemma4-nested-scans-axis-1": {
            "scanned_blocks/": ("layers", "local_layers")
        },
        "maxtext-qwen3-next-cycle-of-4": {"layers/": ("layers",)},
        "maxtext-llama4-alternating-experts": {"layers/": ("layers",)},
        "maxtext-gpt-oss-cycle-of-2": {"layers/": ("layers",)},
        "maxtext-deepseek-scanned": {
            "dense_layers/": ("dense_layers",),
            "moe_layers/": ("moe_layers",),
        },
        "maxtext-mixtral-experts-on-axis-0": {"layers/": ("layers",)},
        "maxtext-pipeline-repeats-and-stages": {
            "layers/": ("circular_repeats", "layers")
        },
        "maxtext-pipeline-repeats-stages-and-layers": {
            "layers/": ("circular_repeats", "layers", "layers_per_stage")
        },
        "maxtext-pipeline-unrolled-layers-per-stage": {
            "layers/": ("circular_repeats", "layers")
        },
    }.items()
]


# -- Flax Linen ------------------------------------------------------------------------
# Built with flax; the names of blocks are those of google/flax 18f8f311 examples/wmt.

FLAX = "flax"
LINEN_BLOCK = {
    "LayerNorm_0/scale": (3,),
    "MlpBlock_0/Dense_0/kernel": (3, 5),
    "MlpBlock_0/Dense_0/bias": (5,),
    "MlpBlock_0/Dense_1/kernel": (5, 3),
}
LINEN_OUTSIDE = outside(
    {"params/Embed_0/embedding": (7, 3), "params/head/kernel": (3, 7)}
)


def linen_modules(annotate=lambda initializer, *names: initializer):
    """(Block, Loop): a block, and a model of the layers that a function makes."""
    import flax.linen as nn

    class MlpBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            normal = nn.initializers.lecun_normal()
            x = nn.Dense(5, kernel_init=annotate(normal, "embed", "mlp"))(x)
            normal = annotate(normal, "mlp", "embed")
            return nn.Dense(3, use_bias=False, kernel_init=normal)(x)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + MlpBlock()(nn.LayerNorm(use_bias=False)(x)), None

    class Model(nn.Module):
        layers: Callable

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 3)(tokens)
            x = self.layers(Block, x)
            return nn.Dense(7, use_bias=False, name="head")(x)

    return Model


def linen(layers, **kwargs):
    """A function that builds the parameters of a model with these layers."""

    def real():
        import flax.linen as nn

        annotate = getattr(nn, kwargs["annotate"]) if kwargs else None
        model = linen_modules(
            *([lambda init, *names: annotate(init, names)] if annotate else [])
        )(layers)
        tokens = jnp.zeros((1, 2), int)
        return jax.eval_shape(model.init, jax.random.key(0), tokens)

    return real


def loop(name=None, num_layers=3, wrap=lambda module: module):
    def layers(block, x):
        block = wrap(block)
        for i in range(num_layers):
            x, _ = block(name=name and name.format(i))(x)
        return x

    return layers


def encoder_and_decoder(block, x):
    import flax.linen as nn

    class Coder(nn.Module):
        block: str
        num_layers: int

        @nn.compact
        def __call__(self, x):
            x = loop(self.block, self.num_layers)(block, x)
            return nn.LayerNorm(use_bias=False)(x)

    x = Coder("encoderblock_{}", 3, name="encoder")(x)
    return Coder("encoderdecoderblock_{}", 4, name="decoder")(x)


def nn_scan(axis, **kwargs):
    def layers(block, x):
        import flax.linen as nn

        stacked = nn.scan(
            block,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            length=4,
            **kwargs,
        )
        return stacked()(x, None)[0]

    return layers


def nn_remat_scan(block, x):
    import flax.linen as nn

    class Unary(nn.Module):
        @nn.compact
        def __call__(self, x):
            return block(name="block")(x)[0]

    return nn.remat_scan(Unary, lengths=(3, 2))(name="rs")(x)


def loop_and_nn_vmap(block, x):
    import flax.linen as nn

    stacked = nn.vmap(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
    )
    x, _ = stacked()(jnp.broadcast_to(x, (3, *x.shape)))
    return loop()(block, x.mean(0))


def boxes(leaves):
    """The kernels inside of blocks are boxed."""
    return [
        leaf._replace(path=f"{leaf.path}/.value")
        if leaf.chain and leaf.path.endswith("kernel")
        else leaf
        for leaf in leaves
    ]


def remat(module):
    import flax.linen as nn

    return nn.remat(module)


LAYER_NAMES = {"metadata_params": {"partition_name": "layers"}}
LINEN_STACKS = [
    Stack(
        "linen-wmt-encoder-and-decoder",
        FLAX,
        [
            *each("params/encoder/encoderblock_{}/*", LINEN_BLOCK, range(3), "encoder"),
            *each(
                "params/decoder/encoderdecoderblock_{}/*",
                LINEN_BLOCK,
                range(4),
                "decoder",
            ),
            *outside(
                {
                    f"params/{coder}/LayerNorm_0/scale": (3,)
                    for coder in ("encoder", "decoder")
                }
            ),
            *LINEN_OUTSIDE,
        ],
        gs.unrolled(r"encoder(?:decoder)?block_(\d+)/"),
        gs.layouts.flax_linen(),
        linen(encoder_and_decoder),
    ),
    Stack(
        "linen-loop",
        FLAX,
        each("params/Block_{}/*", LINEN_BLOCK, range(3)) + LINEN_OUTSIDE,
        gs.unrolled(r"Block_(\d+)/"),
        gs.layouts.flax_linen(),
        linen(loop()),
    ),
    Stack(
        "linen-remat-loop",
        FLAX,
        each("params/CheckpointBlock_{}/*", LINEN_BLOCK, range(3)) + LINEN_OUTSIDE,
        gs.unrolled(r"Block_(\d+)/"),
        gs.layouts.flax_linen(),
        linen(loop(wrap=remat)),
    ),
    *(
        Stack(
            f"linen-scan-axis-{axis}",
            FLAX,
            scan("params/ScanBlock_0/*", LINEN_BLOCK, range(4), axis) + LINEN_OUTSIDE,
            gs.scanned("ScanBlock_0/", axis=axis),
            gs.layouts.flax_linen(scan_axis=axis),
            linen(nn_scan(axis)),
        )
        for axis in (0, 1)
    ),
    *(
        Stack(
            f"linen-boxed-scan-{annotate}-axis-{axis}",
            FLAX,
            boxes(scan("params/ScanBlock_0/*", LINEN_BLOCK, range(4), axis))
            + LINEN_OUTSIDE,
            gs.scanned("ScanBlock_0/", axis=axis),
            gs.layouts.flax_linen(scan_axis=axis),
            linen(nn_scan(axis, **LAYER_NAMES), annotate=annotate),
        )
        for annotate, axis in (
            ("with_partitioning", 0),
            ("with_partitioning", 1),
            ("with_logical_partitioning", 1),
        )
    ),
    Stack(
        "linen-boxed-loop",
        FLAX,
        boxes(each("params/Block_{}/*", LINEN_BLOCK, range(3))) + LINEN_OUTSIDE,
        gs.unrolled(r"Block_(\d+)/"),
        gs.layouts.flax_linen(),
        linen(loop(), annotate="with_partitioning"),
    ),
    Stack(
        "linen-remat-scan",
        FLAX,
        scan("params/rs/block/*", LINEN_BLOCK, np.arange(6).reshape(3, 2), (0, 1))
        + LINEN_OUTSIDE,
        gs.scanned("rs/", axis=(0, 1)),
        None,
        linen(nn_remat_scan),
    ),
    Stack(
        "linen-loop-beside-a-vmap",
        FLAX,
        [
            *each("params/Block_{}/*", LINEN_BLOCK, range(3)),
            *scan("params/VmapBlock_0/*", LINEN_BLOCK, range(3), chain=None),
            *LINEN_OUTSIDE,
        ],
        gs.unrolled(r"/Block_(\d+)/"),
        None,
        linen(loop_and_nn_vmap),
    ),
]


# -- Flax NNX --------------------------------------------------------------------------

NNX_BLOCK = {"lin/kernel": (3, 3), "lin/bias": (3,), "norm/scale": (3,)}
NNX_OUTSIDE = outside({"head/kernel/.value": (3, 2)})


def nnx_model(make_layers):
    """A function that builds the state of a model with these layers, as `init` sees."""

    def real():
        from flax import nnx

        class Block(nnx.Module):
            def __init__(self, rngs):
                self.lin = nnx.Linear(3, 3, rngs=rngs)
                self.norm = nnx.LayerNorm(3, use_bias=False, rngs=rngs)

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.layers = make_layers(nnx, Block, rngs)
                self.head = nnx.Linear(3, 2, use_bias=False, rngs=rngs)

        return nnx.state(Model(nnx.Rngs(0)), nnx.Param)

    return real


def nnx_list(nnx, block, rngs):
    layers = [block(rngs) for _ in range(11)]
    return nnx.List(layers) if hasattr(nnx, "List") else layers


def nnx_sequential(nnx, block, rngs):
    parts = [x for _ in range(3) for x in (nnx.Linear(3, 3, rngs=rngs), jax.nn.relu)]
    return nnx.Sequential(*parts)


def nnx_vmap(nnx, block, rngs):
    return nnx.split_rngs(splits=4)(nnx.vmap(block))(rngs)


def valued(roles):
    return {f"{role}/.value": shape for role, shape in roles.items()}


TUNIX_GEMMA3 = {
    "attn/q_einsum/w": (2, 3, 2),
    "attn/_query_norm/scale": (2,),
    "mlp/gate_proj/kernel": (3, 5),
    "pre_attention_norm/scale": (3,),
}
LLAMA_HF = {
    "self_attn/q_proj/kernel": (3, 5),
    "mlp/down_proj/kernel": (5, 3),
    "input_layernorm/kernel": (3,),
}
NNX_STACKS = [
    Stack(
        "nnx-list",
        FLAX,
        each("layers/<{}>/*", valued(NNX_BLOCK), range(11)) + NNX_OUTSIDE,
        gs.unrolled(),
        gs.layouts.flax_nnx(),
        nnx_model(nnx_list),
    ),
    Stack(
        "nnx-sequential-with-gaps",
        FLAX,
        each(
            "layers/layers/<{}>/*",
            valued({"kernel": (3, 3), "bias": (3,)}),
            [0, 2, 4],
        )
        + NNX_OUTSIDE,
        gs.ranked(gs.unrolled()),
        gs.ranked(gs.layouts.flax_nnx()),
        nnx_model(nnx_sequential),
        ranked=True,
    ),
    Stack(
        "nnx-vmap-and-scan",
        FLAX,
        scan("layers/*", valued(NNX_BLOCK), range(4)) + NNX_OUTSIDE,
        gs.scanned("layers/"),
        gs.layouts.flax_nnx(scan_axis=0),
        nnx_model(nnx_vmap),
    ),
    Stack(
        "tunix-gemma3",
        "google/tunix c7d8950f: tunix/models/gemma3/model.py:980",
        each("layers/<{}>/*", valued(TUNIX_GEMMA3), range(4))
        + outside(
            {"embedder/input_embedding/.value": (7, 3), "final_norm/scale/.value": (3,)}
        ),
        gs.unrolled(r"layers/(\d+)/"),
        gs.layouts.flax_nnx(),
    ),
    Stack(
        "easydel-llama",
        "erfanzar/EasyDeL 090a03b2: modules/llama",
        each("model/layers/<{}>/*", valued(LLAMA_HF), range(4))
        + outside(
            {
                "model/embed_tokens/embedding/.value": (7, 3),
                "model/norm/kernel/.value": (3,),
                "lm_head/kernel/.value": (3, 7),
            }
        ),
        gs.unrolled(),
        gs.layouts.flax_nnx(),
    ),
]


# -- Equinox, levanter -----------------------------------------------------------------

EQUINOX_BLOCK = {
    ".linear/.weight": (3, 3),
    ".linear/.bias": (3,),
    ".norm/.weight": (3,),
}
EQUINOX_OUTSIDE = outside({".head/.weight": (2, 3)})


def equinox_model(make_layers):
    """The arrays of a model: without biases and functions, which are None."""

    def real():
        import equinox as eqx

        class Block(eqx.Module):
            linear: eqx.nn.Linear
            norm: eqx.nn.LayerNorm
            act: Callable = jax.nn.gelu

        class Model(eqx.Module):
            layers: Any
            head: eqx.nn.Linear

        def make(key):
            norm = eqx.nn.LayerNorm(3, use_bias=False)
            return Block(eqx.nn.Linear(3, 3, key=key), norm)

        keys = jax.random.split(jax.random.key(0), 4)
        head = eqx.nn.Linear(3, 2, use_bias=False, key=keys[0])
        model = Model(make_layers(eqx, make, keys), head)
        return eqx.filter(model, eqx.is_inexact_array)

    return real


LEVANTER_BLOCK = {
    ".self_attn/.q_proj/.weight/<flat 0>": (2, 2, 3),
    ".mlp/.up_proj/.weight/<flat 0>": (5, 3),
    ".input_layernorm/.weight/<flat 0>": (3,),
}
LEVANTER = "stanford-crfm/levanter 9263f81e models/llama.py, haliax f41e7d4 nn/scan.py"
LEVANTER_OUTSIDE = outside(
    {
        ".embeddings/.token_embeddings/.weight/<flat 0>": (7, 3),
        ".transformer/.norm/.weight/<flat 0>": (3,),
        ".lm_head/.weight/<flat 0>": (7, 3),
    }
)
EQUINOX_STACKS = [
    Stack(
        "equinox-list",
        "equinox",
        each(".layers/[{}]/*", EQUINOX_BLOCK, range(4)) + EQUINOX_OUTSIDE,
        gs.unrolled(),
        gs.layouts.equinox(),
        equinox_model(lambda eqx, make, keys: [make(key) for key in keys]),
    ),
    Stack(
        "equinox-filter-vmap",
        "equinox",
        scan(".layers/*", EQUINOX_BLOCK, range(4)) + EQUINOX_OUTSIDE,
        gs.scanned("layers/"),
        gs.layouts.equinox(scan_axis=0),
        equinox_model(lambda eqx, make, keys: eqx.filter_vmap(make)(keys)),
    ),
    Stack(
        "levanter-stacked",
        LEVANTER,
        named(
            scan(".transformer/.layers/.stacked/*", LEVANTER_BLOCK, range(4)),
            stacked=("layers",),
        )
        + LEVANTER_OUTSIDE,
        gs.scanned("stacked/"),
        gs.layouts.levanter(),
    ),
    Stack(
        "levanter-block-seq",
        LEVANTER,
        each(".transformer/.layers/.blocks/[{}]/*", LEVANTER_BLOCK, range(4))
        + LEVANTER_OUTSIDE,
        gs.unrolled(r"blocks/(\d+)/"),
        gs.layouts.levanter(),
    ),
]


# -- google-deepmind/gemma, big_vision -------------------------------------------------

GEMMA = "google-deepmind/gemma 7691fd4"
GEMMA_BLOCK = {
    "attn/q_einsum/w": (2, 3, 2),
    "attn/kv_einsum/w": (2, 1, 3, 2),
    "attn/_query_norm/scale": (2,),
    "mlp/gating_einsum": (2, 5, 3),
    "mlp/linear": (5, 3),
    "pre_attention_norm/scale": (3,),
}
# Global layers have another head size, and keys without values.
GEMMA4_LOCAL = {**GEMMA_BLOCK, "skip_scale": (1,)}
GEMMA4_GLOBAL = {
    **{role: GEMMA4_LOCAL[role] for role in list(GEMMA4_LOCAL)[3:]},
    "attn/q_einsum/w": (2, 3, 4),
    "attn/k_einsum/w": (1, 3, 4),
    "attn/_query_norm/scale": (4,),
}
GEMMA_OUTSIDE = {"embedder/input_embedding": (7, 3), "final_norm/scale": (3,)}

VIT_ATTENTION = {
    f"MultiHeadDotProductAttention_0/{name}": shape
    for name, shape in {
        "query/kernel": (3, 2, 2),
        "query/bias": (2, 2),
        "out/kernel": (2, 2, 3),
        "out/bias": (3,),
    }.items()
}
VIT_MLP = {
    "LayerNorm_0/scale": (3,),
    "MlpBlock_0/Dense_0/kernel": (3, 5),
    "MlpBlock_0/Dense_0/bias": (5,),
}
VIT_BLOCK = {**VIT_ATTENTION, **VIT_MLP}
VIT_OUTSIDE = {
    **under("MAPHead_0", VIT_BLOCK),
    "MAPHead_0/probe": (1, 1, 3),
    "Transformer/encoder_norm/scale": (3,),
    "embedding/kernel": (2, 2, 3, 3),
    "pos_embedding": (1, 4, 3),
    "head/kernel": (3, 7),
}
TEXT_OUTSIDE = {
    "Embed_0/embedding": (7, 3),
    "Encoder_0/encoder_norm/scale": (3,),
    "pos_embedding": (1, 8, 3),
    "head/kernel": (3, 7),
}
CAPPA_BLOCK = {
    "LayerNorm1/scale": (3,),
    "LayerNorm2/scale": (3,),
    "SelfAttn/query/kernel": (3, 2, 2),
    "CrossAttn/query/kernel": (3, 2, 2),
    "MLP/Dense_0/kernel": (3, 5),
    "MLP/Dense_0/bias": (5,),
}
CAPPA_OUTSIDE = {
    "decoder/EmbedTargets/embedding": (7, 3),
    "decoder/LayerNorm/scale": (3,),
    "decoder/LogitsDense/kernel": (3, 7),
    "encoder/embedding/kernel": (2, 2, 3, 3),
}
PALIGEMMA_BLOCK = {
    "attn/q_einsum/w": (2, 3, 2),
    "attn/kv_einsum/w": (2, 1, 3, 2),
    "mlp/gating_einsum": (2, 3, 5),
    "mlp/linear": (5, 3),
    "pre_ffw_norm/scale": (3,),
}
BIG_VISION = "google-research/big_vision 0127fb6"
BIG_VISION_STACKS = [
    Stack(
        "gemma3",
        f"{GEMMA} gm/nn/_transformer.py:125",
        each("layer_{}/*", GEMMA_BLOCK, range(4)) + outside(GEMMA_OUTSIDE),
        gs.unrolled(),
        gs.layouts.gemma(),
    ),
    Stack(
        "gemma4-alternating-heads",
        f"{GEMMA} gm/nn/gemma4/_modules.py:503",
        each("layer_{}/*", GEMMA4_LOCAL, [0, 1, 3, 4])
        + each("layer_{}/*", GEMMA4_GLOBAL, [2, 5])
        + outside({**GEMMA_OUTSIDE, "embedder/per_layer_input_embedding": (7, 6, 2)}),
        gs.ranked(gs.unrolled(r"layer_(\d+)/")),
        gs.layouts.gemma(interleaved=True),
        ranked=True,
    ),
    Stack(
        "big-vision-vit-unrolled",
        f"{BIG_VISION} models/vit.py:153",
        each("Transformer/encoderblock_{}/*", VIT_BLOCK, range(12))
        + outside(VIT_OUTSIDE),
        gs.unrolled(r"encoderblock_(\d+)/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-vit-scan",
        f"{BIG_VISION} models/vit.py:136",
        scan("Transformer/encoderblock/*", VIT_BLOCK, range(4)) + outside(VIT_OUTSIDE),
        gs.scanned("encoderblock/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-siglip-unrolled",
        f"{BIG_VISION} models/proj/image_text/two_towers.py:53",
        [
            *each("img/Transformer/encoderblock_{}/*", VIT_BLOCK, range(3), "image"),
            *each("txt/Encoder_0/encoderblock_{}/*", VIT_BLOCK, range(4), "text"),
            *outside(under("img", VIT_OUTSIDE)),
            *outside({**under("txt", TEXT_OUTSIDE), "t": (1,), "b": (1,)}),
        ],
        gs.unrolled(r"encoderblock_(\d+)/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-siglip-scan",
        f"{BIG_VISION} models/proj/image_text/two_towers.py:53",
        [
            *scan("img/Transformer/encoderblock/*", VIT_BLOCK, range(4), 0, "image"),
            *scan("txt/Encoder_0/encoderblock/*", VIT_BLOCK, range(4), 0, "text"),
            *outside(under("img", VIT_OUTSIDE)),
            *outside({**under("txt", TEXT_OUTSIDE), "t": (1,), "b": (1,)}),
        ],
        gs.scanned("encoderblock/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-cappa-unrolled",
        f"{BIG_VISION} models/proj/cappa/cappa.py:249",
        [
            *each("decoder/EncDecBlock{}/*", CAPPA_BLOCK, range(4), "decoder"),
            *each(
                "encoder/Transformer/encoderblock_{}/*", VIT_BLOCK, range(3), "encoder"
            ),
            *outside(CAPPA_OUTSIDE),
        ],
        gs.unrolled(r"(?:EncDecBlock|encoderblock_)(\d+)/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-cappa-scan-axes-0-and-1",
        f"{BIG_VISION} models/proj/cappa/cappa.py:158",
        [
            *scan("decoder/EncDecBlock/*", CAPPA_BLOCK, range(4), 1, "decoder"),
            *scan(
                "encoder/Transformer/encoderblock/*", VIT_BLOCK, range(4), 0, "encoder"
            ),
            *outside(CAPPA_OUTSIDE),
        ],
        gs.first_match(gs.scanned("EncDecBlock/", axis=1), gs.scanned("encoderblock/")),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-givt-scan-axes-0-and-1",
        f"{BIG_VISION} models/proj/givt/givt.py:216,353",
        [
            *scan("decoder/EncDecBlock/*", CAPPA_BLOCK, range(4), 1, "decoder"),
            *scan("encoder/encoderblock/*", VIT_BLOCK, range(4), 0, "encoder"),
            *outside(CAPPA_OUTSIDE),
        ],
        gs.first_match(gs.scanned("EncDecBlock/", axis=1), gs.scanned("encoderblock/")),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-paligemma-scan",
        f"{BIG_VISION} models/ppp/gemma.py:541, models/proj/paligemma/paligemma.py:64",
        [
            *scan("llm/layers/*", PALIGEMMA_BLOCK, range(4), 0, "llm"),
            *scan("img/Transformer/encoderblock/*", VIT_BLOCK, range(4), 0, "image"),
            *outside(under("llm", GEMMA_OUTSIDE)),
        ],
        gs.scanned(r"llm/layers/|encoderblock/"),
        gs.layouts.big_vision(),
    ),
    Stack(
        "big-vision-paligemma-unrolled",
        f"{BIG_VISION} models/ppp/gemma.py:541",
        [
            *each("llm/layers/{}/*", PALIGEMMA_BLOCK, range(4), "llm"),
            *each("img/Transformer/encoderblock_{}/*", VIT_BLOCK, range(3), "image"),
            *outside(under("llm", GEMMA_OUTSIDE)),
        ],
        gs.unrolled(r"(?:llm/layers/|encoderblock_)(\d+)/"),
        gs.layouts.big_vision(),
    ),
]


# -- Hugging Face, EasyLM, T5X ---------------------------------------------------------

HF = "huggingface/transformers 4.57.6"
GPT2_BLOCK = {
    "ln_1/scale": (3,),
    "attn/c_attn/kernel": (5, 3),
    "attn/c_attn/bias": (5,),
    "ln_2/scale": (3,),
}
BERT_BLOCK = {
    "attention/self/query/kernel": (3, 3),
    "attention/self/query/bias": (3,),
    "attention/output/LayerNorm/scale": (3,),
    "intermediate/dense/kernel": (3, 5),
    "output/dense/kernel": (5, 3),
}
T5_ENCODER_BLOCK = {
    "layer/0/SelfAttention/q/kernel": (3, 5),
    "layer/0/layer_norm/weight": (3,),
    "layer/1/DenseReluDense/wi_0/kernel": (3, 5),
    "layer/1/layer_norm/weight": (3,),
}
T5_DECODER_BLOCK = {
    "layer/0/SelfAttention/q/kernel": (3, 5),
    "layer/1/EncDecAttention/q/kernel": (3, 5),
    "layer/2/DenseReluDense/wi_0/kernel": (3, 5),
    "layer/2/layer_norm/weight": (3,),
}
EASYLM_BLOCK = {
    "attention/wq/kernel": (3, 5),
    "feed_forward/w1/kernel": (3, 5),
    "feed_forward/w2/kernel": (5, 3),
    "attention_norm/kernel": (3,),
    "ffn_norm/kernel": (3,),
}
T5X = "google-research/t5x cc342d4 examples"
T5X_ENCODER = {
    "attention/query/kernel": (3, 5),
    "mlp/wi_0/kernel": (3, 5),
    "mlp/wi_1/kernel": (3, 5),
    "pre_mlp_layer_norm/scale": (3,),
}
T5X_DECODER = {**T5X_ENCODER, "encoder_decoder_attention/query/kernel": (3, 5)}
T5X_OUTSIDE = {
    "token_embedder/embedding": (7, 3),
    "encoder/encoder_norm/scale": (3,),
    "decoder/decoder_norm/scale": (3,),
    "decoder/logits_dense/kernel": (3, 7),
}
HF_STACKS = [
    Stack(
        "hf-gpt2",
        f"{HF} modeling_flax_gpt2.py:541",
        each("transformer/h/{}/*", GPT2_BLOCK, range(11))
        + outside(
            {
                "transformer/wte/embedding": (7, 3),
                "transformer/wpe/embedding": (8, 3),
                "transformer/ln_f/scale": (3,),
            }
        ),
        gs.unrolled(),
        gs.layouts.hf_flax(),
    ),
    Stack(
        "hf-bert",
        f"{HF} modeling_flax_bert.py:558",
        each("bert/encoder/layer/{}/*", BERT_BLOCK, range(4))
        + outside(
            {
                "bert/embeddings/word_embeddings/embedding": (7, 3),
                "bert/embeddings/LayerNorm/scale": (3,),
                "cls/predictions/transform/dense/kernel": (3, 3),
            }
        ),
        gs.unrolled(r"encoder/layer/(\d+)/"),
        gs.layouts.hf_flax(),
    ),
    Stack(
        "hf-llama",
        f"{HF} modeling_flax_llama.py:541",
        each(
            "model/layers/{}/*",
            {**LLAMA_HF, "input_layernorm/weight": (3,)},
            range(4),
        )
        + outside({"model/embed_tokens/embedding": (7, 3), "lm_head/kernel": (3, 7)}),
        gs.unrolled(),
        gs.layouts.hf_flax(),
    ),
    Stack(
        "hf-t5-block-and-layer",
        f"{HF} modeling_flax_t5.py:656",
        [
            *each("encoder/block/{}/*", T5_ENCODER_BLOCK, range(4), "encoder"),
            *each("decoder/block/{}/*", T5_DECODER_BLOCK, range(3), "decoder"),
            *(
                Leaf(
                    f"{coder}/block/0/layer/0/SelfAttention/relative_attention_bias/"
                    "embedding",
                    (8, 2),
                    coder,
                    "relative_attention_bias",
                )
                for coder in ("encoder", "decoder")
            ),
            *outside(
                {"shared/embedding": (7, 3), "encoder/final_layer_norm/weight": (3,)}
            ),
        ],
        gs.unrolled(r"block/(\d+)/"),
        gs.layouts.hf_flax(),
    ),
    Stack(
        "easylm-llama",
        "young-geng/EasyLM fe5b2c3 models/llama/llama_model.py:785",
        each("transformer/h/{}/*", EASYLM_BLOCK, range(4))
        + outside(
            {
                "transformer/wte/embedding": (7, 3),
                "transformer/ln_f/kernel": (3,),
                "lm_head/kernel": (3, 7),
            }
        ),
        gs.unrolled(),
        gs.layouts.hf_flax(),
    ),
    Stack(
        "t5x-unrolled",
        f"{T5X}/t5/network.py:215",
        [
            *each("encoder/layers_{}/*", T5X_ENCODER, range(4), "encoder"),
            *each("decoder/layers_{}/*", T5X_DECODER, range(3), "decoder"),
            *outside({**T5X_OUTSIDE, "encoder/relpos_bias/rel_embedding": (2, 8)}),
        ],
        gs.unrolled(),
        gs.layouts.t5x(),
    ),
    Stack(
        "t5x-scanned",
        f"{T5X}/scalable_t5/network.py:258",
        [
            *scan(
                "encoder/encoder/*",
                {**T5X_ENCODER, "relpos_bias/rel_embedding": (2, 8)},
                range(4),
                1,
                "encoder",
            ),
            *scan("decoder/decoder/*", T5X_DECODER, range(3), 1, "decoder"),
            *outside(T5X_OUTSIDE),
        ],
        gs.scanned(r"encoder/encoder/|decoder/decoder/", axis=1),
        gs.layouts.t5x(),
    ),
]


# -- Haiku -----------------------------------------------------------------------------

HAIKU = "dm-haiku"
HAIKU_BLOCK = {
    "|layer_norm/scale": (3,),
    "|layer_norm/offset": (3,),
    "|linear/w": (3, 3),
    "|linear_1/w": (3, 3),
}


def haiku_model(net):
    """The parameters of `net(hk, Block, x)`."""

    def real():
        import haiku as hk

        class Block(hk.Module):
            def __call__(self, x):
                x = hk.LayerNorm(-1, True, True)(x)
                x = hk.Linear(3, with_bias=False)(x)
                return hk.Linear(3, with_bias=False)(x)

        def head(x):
            return hk.Linear(2, with_bias=False, name="head")(x)

        class Called(hk.Module):
            def __call__(self, x):
                for _ in range(4):
                    x = Block()(x)
                return head(x)

        class Made(hk.Module):
            def __init__(self):
                super().__init__()
                self.blocks = [Block() for _ in range(4)]

            def __call__(self, x):
                for block in self.blocks:
                    x = block(x)
                return head(x)

        def layer_stacks(x):
            for length in (4, 3):
                x = hk.layer_stack(length)(lambda x: Block()(x))(x)
            return head(x)

        nets = {"called": lambda x: Called(name="net")(x), "made": lambda x: Made()(x)}
        forward = {**nets, "layer_stacks": layer_stacks}[net]
        init = hk.transform(forward).init
        return jax.eval_shape(init, jax.random.PRNGKey(0), jnp.ones((1, 3)))

    return real


def first_bare(leaves):
    """Haiku writes the first of several without its number."""
    return [leaf._replace(path=leaf.path.replace("_0|", "|")) for leaf in leaves]


def haiku_transformer(path, leaf):
    """Haiku's example counts two linear modules and norms per layer, and no block."""
    match = re.search(r"transformer/(linear|layer_norm)(?:_(\d+))?/", path_text(path))
    number = int(match[2] or 0) if match else 0
    if match is None or number == 6:  # the final norm
        return None
    return gs.Depth("transformer", (match[1], number % 2, path[-1]), number // 2)


HAIKU_STACKS = [
    Stack(
        "haiku-made-in-call",
        HAIKU,
        first_bare(each("net|block_{}*", HAIKU_BLOCK, range(4)))
        + outside({"net|head/w": (3, 2)}),
        gs.unrolled(r"block(?:_(\d+))?/"),
        gs.layouts.haiku(),
        haiku_model("called"),
    ),
    Stack(
        "haiku-made-in-init",
        HAIKU,
        first_bare(each("made|~|block_{}*", HAIKU_BLOCK, range(4)))
        + outside({"made|head/w": (3, 2)}),
        gs.unrolled(r"block(?:_(\d+))?/"),
        gs.layouts.haiku(),
        haiku_model("made"),
    ),
    Stack(
        "haiku-two-layer-stacks",
        HAIKU,
        [
            *scan("__layer_stack_no_per_layer|block*", HAIKU_BLOCK, range(4), 0, "a"),
            *scan("__layer_stack_no_per_layer_1|block*", HAIKU_BLOCK, range(3), 0, "b"),
            *outside({"head/w": (3, 2)}),
        ],
        gs.first_match(
            gs.scanned("__layer_stack_no_per_layer/"),
            gs.scanned("__layer_stack_no_per_layer_1/"),
        ),
        gs.layouts.haiku(layer_stack=True),
        haiku_model("layer_stacks"),
    ),
    Stack(
        "haiku-transformer-without-blocks",
        "google-deepmind/dm-haiku f4d858a examples/transformer/model.py",
        [
            *(
                Leaf(
                    f"transformer|{name}{f'_{number}' if number else ''}/{leaf}",
                    shape,
                    "layers",
                    f"{name} {number % 2}",
                    np.array(number // 2),
                )
                for number in range(6)
                for name, leaf, shape in (
                    ("linear", "w", (3, 3)),
                    ("layer_norm", "scale", (3,)),
                )
            ),
            *outside(
                {"transformer|layer_norm_6/scale": (3,), "embed/embeddings": (7, 3)}
            ),
        ],
        gs.depth_fn(haiku_transformer),
    ),
]


# -- Diffusion -------------------------------------------------------------------------

UVIT_BLOCK = {
    "norm1/scale": (3,),
    "attn/qkv/kernel": (3, 5),
    "mlp/fc1/kernel": (3, 5),
    "mlp/fc1/bias": (5,),
}
UVIT_OUTSIDE = {
    **under("mid_block", UVIT_BLOCK),
    "patch_embed/proj/kernel": (2, 2, 3, 3),
    "pos_embed": (1, 4, 3),
    "norm/scale": (3,),
    "decoder_pred/kernel": (3, 7),
}
UVIT = "baofff/U-ViT ce55170 libs/uvit.py:164, as Linen's setup lists name it"


def uvit(chains, first_out):
    skip = {"skip_linear/kernel": (6, 3)}
    return [
        *each("in_blocks_{}/*", UVIT_BLOCK, range(3), chains[0]),
        *each(
            "out_blocks_{}/*",
            {**UVIT_BLOCK, **skip},
            range(first_out, first_out + 3),
            chains[1],
            range(3),
        ),
        *outside(UVIT_OUTSIDE),
    ]


DIFFUSION_STACKS = [
    Stack(
        "uvit-separate",
        UVIT,
        uvit(("in", "out"), 0),
        gs.unrolled(r"(?:in|out)_blocks_(\d+)/"),
        gs.layouts.uvit(),
    ),
    Stack(
        "uvit-joined",
        UVIT,
        uvit(("blocks", "blocks"), 3),
        gs.first_match(
            gs.unrolled(r"in_blocks_(\d+)/", stack="b"),
            gs.unrolled(r"out_blocks_(\d+)/", start=3, stack="b"),
        ),
        gs.layouts.uvit(join_at=3),
    ),
    Stack(
        "dit",
        "kvfrans/jax-diffusion-transformer 94ea607 diffusion_transformer.py",
        each(
            "DiTBlock_{}/*",
            {"Dense_0/kernel": (3, 5), "Dense_0/bias": (5,), **VIT_ATTENTION},
            range(4),
        )
        + outside(
            {
                "FinalLayer_0/Dense_0/kernel": (3, 5),
                "FinalLayer_0/Dense_1/kernel": (3, 5),
                "LabelEmbedder_0/Embed_0/embedding": (7, 3),
                "PatchEmbed_0/Conv_0/kernel": (2, 2, 3, 3),
                "TimestepEmbedder_0/Dense_0/kernel": (5, 3),
                "TimestepEmbedder_0/Dense_1/kernel": (3, 3),
                "pos_embed": (1, 4, 3),
            }
        ),
        gs.unrolled(r"DiTBlock_(\d+)/"),
        gs.layouts.flax_linen(),
    ),
    Stack(
        "scenic-dotted-keys",
        "google-research/scenic 4a38d47 projects/baselines/segment_anything",
        each("image_encoder/blocks.{}/*", VIT_BLOCK, range(3))
        + outside({"image_encoder/pos_embed": (1, 4, 3)}),
        gs.unrolled(r"blocks/(\d+)/"),
        gs.layouts.flax_linen(),
    ),
]

STACKS = [
    *MAXTEXT_STACKS,
    *LINEN_STACKS,
    *NNX_STACKS,
    *EQUINOX_STACKS,
    *BIG_VISION_STACKS,
    *HF_STACKS,
    *HAIKU_STACKS,
    *DIFFUSION_STACKS,
]
BY_NAME = {stack.name: stack for stack in STACKS}

# What to import for a tree that is built with its package.
MODULES = {"flax": "flax", "equinox": "equinox", "dm-haiku": "haiku"}
