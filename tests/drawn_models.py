"""Random models whose layers are known, for what reads layers out of a tree.

A model is a pytree of `Param`s, each of which says which layers of which chain it
holds: it is made with that knowledge, and names are chosen afterwards and never read.
They are fair: what is called a layer is one, holds some, or is a part that real models
call so, such as `layer/1/DenseReluDense` in each block of T5.
"""

import dataclasses
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from stacks import Attributes, Box

# -- Parameters, and who is whose neighbor ---------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """A parameter, and which layers it holds.

    Attributes:
      shape: of the whole leaf.
      chain: the sequence of layers that it is a part of; None outside of depth.
      role: which parameter of a layer it is.
      layers: its layer, or its layers along `axes`.
      axes: the array axes over depth.
      optional: whether its chain may also be left alone.
      boxed: whether it is in a box.
      names: of its axes, in the box.
    """

    shape: tuple[int, ...]
    chain: Any = None
    role: Any = None
    layers: Any = 0
    axes: tuple[int, ...] = ()
    optional: bool = False
    boxed: bool = False
    names: tuple[str, ...] = ()

    @property
    def of_layer(self):
        return tuple(n for k, n in enumerate(self.shape) if k not in self.axes)

    def make(self):
        array = np.zeros(self.shape, np.float32)
        return Box(array, self.names) if self.boxed else array


class Truth(NamedTuple):
    """Pairs of slots that are neighbors; a slot is (leaf, axes, index)."""

    required: frozenset
    optional: frozenset

    def holds(self, pairs):
        return self.required <= pairs <= self.required | self.optional


def truth_of(params, joined=(), kept=lambda param: True):
    """Who is whose neighbor among those of the parameters that are kept.

    Args:
      params: the leaves of a tree.
      joined: pairs of chains of which the second may go on where the first ends.
      kept: whether a parameter is kept.
    """
    slots, required, optional = defaultdict(dict), set(), set()
    untold_chains = untold(params)
    excused = {p.chain for p in params if p.optional} | untold_chains
    for i, param in enumerate(params):
        if param.chain is not None and kept(param):
            key = (param.chain, param.role, param.of_layer)
            for index, layer in np.ndenumerate(param.layers):
                slots[key][int(layer)] = (i, param.axes, index)
    # Arrays that do not look stacked may be taken for layers, position by position.
    wholes = defaultdict(dict)
    for i, param in enumerate(params):
        if param.chain in untold_chains and kept(param):
            first = int(np.min(param.layers))
            wholes[param.chain, param.role, param.shape][first] = (i, (), ())
    for found in wholes.values():
        pairs = [{s, found[n + 1]} for n, s in found.items() if n + 1 in found]
        optional.update(map(frozenset, pairs))
    for (chain, *role), found in slots.items():
        pairs = [{s, found[n + 1]} for n, s in found.items() if n + 1 in found]
        (optional if chain in excused else required).update(map(frozenset, pairs))
        for other in (second for first, second in joined if first == chain):
            following = slots.get((other, *role))
            if following:
                ends = {found[max(found)], following[min(following)]}
                optional.add(frozenset(ends))
    return Truth(frozenset(required), frozenset(optional))


def untold(params):
    """The stacked chains that neither names of axes nor enough vectors tell."""
    stacked, named, vectors, matrices = set(), set(), Counter(), set()
    for p in params:
        if p.axes:
            stacked.add(p.chain)
            named |= {p.chain} if p.names else set()
            vectors[p.chain] += len(p.of_layer) == 1
            matrices |= {p.chain} if len(p.of_layer) > 1 else set()
    told = {chain for chain, number in vectors.items() if number > 1} & matrices
    return stacked - named - told


def arrays(tree):
    return jax.tree.map(Param.make, tree)


def written(tree):
    """A tree as text, one leaf a line."""
    places = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hole)
    return "\n".join(
        f"  {jax.tree_util.keystr(path)}: {_shown(leaf)}" for path, leaf in places
    )


def _shown(leaf):
    if not isinstance(leaf, Param):
        return "masked"
    return f"{leaf.shape}{f' in a box {leaf.names}' if leaf.boxed else ''}"


# -- One layer, as a tree of shapes ----------------------------------------------------


class Shape(NamedTuple):
    sizes: tuple[int, ...]


def weight(*sizes):
    return Shape(sizes)


def dense(*sizes):
    return {"kernel": weight(*sizes), "bias": weight(sizes[-1])}


def scale(size):
    return {"scale": weight(size)}


D = 4


def attentions():
    return [
        {"attn": {"qkv": dense(D, 3 * D), "out": dense(D, D)}},
        {"attn": {name: {"kernel": weight(D, D)} for name in "qkvo"}},
        {"MultiHeadDotProductAttention_0": {"query": dense(D, 2, D // 2)}},
        {"attention": {"self": {"query": dense(D, D)}, "output": dense(D, D)}},
        {"attn": {"w": [weight(D, D)] * 3}},
        {"attn_img": dense(D, D), "attn_txt": dense(D, D)},
    ]


def feed_forwards(f):
    return [
        {"mlp": {"up": dense(D, f), "down": dense(f, D)}},
        {"MlpBlock_0": {"Dense_0": dense(D, f), "Dense_1": dense(f, D)}},
        {"mlp": {"Dense_0": dense(D, D), "Dense_1": dense(D, D)}},
        {"Dense_0": dense(D, D), "Dense_1": dense(D, D), "Dense_2": dense(D, f)},
        {"mlp": {"wi_0": weight(D, f), "wi_1": weight(D, f), "wo": weight(f, D)}},
        {"mlp": {"w1": dense(D, f), "w2": dense(f, D), "w3": dense(D, f)}},
        {"fc1": dense(D, D), "fc2": dense(D, D), "out": weight(D, f)},
        {"mlp": {"layers": [dense(D, D), dense(D, D)]}},
        {"mlp": [dense(D, D), dense(D, D)]},
        {"conv1": dense(3, D, D), "conv2": dense(3, D, D)},
        {"moe": {"experts": [dense(D, f)] * 3, "gate": weight(D, 3)}},
        {"moe": {f"experts_{i}": dense(D, f) for i in range(4)}},
        {"block_sparse_moe": {"experts": {str(i): dense(D, f) for i in range(2)}}},
        {"moe": {"experts": {"kernel": weight(5, D, f)}, "gate": weight(D, 5)}},
        {"adapters": {"0": dense(D, D), "1": dense(D, D)}, "mlp": dense(D, f)},
        {"to_out": (dense(D, D), {}), "heads": {0: weight(D, D), 1: weight(D, D)}},
    ]


NORMS = [
    {},
    {"norm": scale(D)},
    {"ln_1": scale(D), "ln_2": scale(D)},
    {"LayerNorm_0": scale(D), "LayerNorm_1": scale(D)},
    {"norm1": weight(D), "norm2": weight(D)},
    {"norms": [weight(D), weight(D)]},
]


def block_of_t5(f):
    return {
        "layer": {
            "0": {"SelfAttention": dense(D, D), "layer_norm": scale(D)},
            "1": {"DenseReluDense": dense(D, f), "layer_norm": scale(D)},
        }
    }


def layer_kind(rng):
    """A function of a width that makes the tree of shapes of a layer."""
    plain = rng.randrange(9)
    if plain == 0:
        return lambda f: dense(D, f)
    if plain == 1:
        return block_of_t5
    attention, norm = rng.choice(attentions()), rng.choice(NORMS)
    which = rng.randrange(len(feed_forwards(D)))
    return lambda f: {**attention, **feed_forwards(f)[which], **norm}


# -- Layers ----------------------------------------------------------------------------


def as_layer(shapes, chain, layer, lead=(), optional=False):
    """The shapes as one layer of a chain."""
    return _instance(
        shapes,
        lambda role, sizes: Param(lead + sizes, chain, role, layer, optional=optional),
    )


def as_stack(shapes, chain, layers, axis, named=lambda sizes: False):
    """The shapes with these layers on an axis, which some have the name of."""

    def param(role, sizes):
        at = min(axis, len(sizes))
        whole = (*sizes[:at], len(layers), *sizes[at:])
        own = tuple("abcd"[: len(sizes)])
        names = (*own[:at], "layers", *own[at:]) if named(sizes) else ()
        return Param(
            whole, chain, role, np.array(layers), (at,), False, bool(names), names
        )

    return _instance(shapes, param)


def outside(shapes):
    return _instance(shapes, lambda role, sizes: Param(sizes))


def _instance(shapes, make):
    return jax.tree_util.tree_map_with_path(
        lambda path, shape: make(jax.tree_util.keystr(path), shape.sizes),
        shapes,
        is_leaf=lambda node: isinstance(node, Shape),
    )


NAMES = [
    *("layers", "layer", "blocks", "block", "h", "Block", "TransformerBlock"),
    *("encoderblock", "encoder_layer", "resblocks", "DecoderLayer", "residual_block"),
]
INSIDE = ["list", "tuple", "digits", "integers"]
BESIDE = ["_", "", "padded", "haiku"]


class Numbers(NamedTuple):
    """How the layers of a stack are called."""

    name: str
    style: str

    def put(self, subtrees):
        """`{number: subtree}` as entries of a dict."""
        name, style = self
        if style in ("list", "tuple"):
            items = [subtrees.get(i) for i in range(max(subtrees) + 1)]
            return {name: items if style == "list" else tuple(items)}
        if style == "digits":
            return {name: {str(i): x for i, x in subtrees.items()}}
        if style == "integers":
            return {name: dict(subtrees)}
        if style == "padded":
            return {f"{name}_{i:02d}": x for i, x in subtrees.items()}
        if style == "haiku":
            return {f"{name}_{i}" if i else name: x for i, x in subtrees.items()}
        return {f"{name}{style}{i}": x for i, x in subtrees.items()}

    def pattern(self, number=r"(\d+)"):
        """A pattern that finds them."""
        if self.style in INSIDE:
            return f"{self.name}/{number}/"
        if self.style == "haiku":
            return f"{self.name}(?:_{number})?/"
        return f"{self.name}{'' if self.style == '' else '_'}{number}/"


class Scan(NamedTuple):
    """Where stacked layers are."""

    name: str
    axis: int


class Cycle(NamedTuple):
    """Stacked layers in a node for every position of a cycle."""

    how: Numbers
    axis: int
    period: int


def numbers(rng, styles=(*INSIDE, *BESIDE)):
    return Numbers(rng.choice(NAMES), rng.choice(styles))


def depth(rng):
    return rng.choice([2, 3, 3, 4, 5, 2, 3, 4, 11, 12])


def widths(rng, count):
    """The width of every layer: mostly the same."""
    f = rng.choice([8, 4, 12])
    how = rng.choice(["same"] * 7 + ["halves", "alternating", "growing"])
    growth = {
        "same": lambda layer: 0,
        "halves": lambda layer: layer >= count // 2,
        "alternating": lambda layer: layer % 2,
        "growing": lambda layer: layer,
    }
    return [f + growth[how](layer) for layer in range(count)]


def unrolled_stack(rng, chain, how=None, lead=()):
    """The entries of a dict, and how they are numbered; now and then with a gap."""
    how, kind, count = how or numbers(rng), layer_kind(rng), depth(rng)
    start = rng.choice([0, 0, 0, 1]) if how.style != "haiku" else 0
    layers = {
        layer: as_layer(kind(f), chain, layer, lead)
        for layer, f in enumerate(widths(rng, count), start)
    }
    if count > 2 and rng.random() < 0.06:
        del layers[start + rng.randrange(1, count - 1)]
    return how.put(layers), how


STACKED = ["layers", "blocks", "h", "encoderblock", "ScanBlock_0", "layers_0"]
WHICH_NAMED = [
    lambda sizes: False,
    lambda sizes: False,
    lambda sizes: True,
    lambda sizes: len(sizes) > 1,
]


def scanned_stack(rng, chain):
    where, kind = Scan(rng.choice(STACKED), rng.choice([0, 0, 1])), layer_kind(rng)
    layers, named = range(depth(rng)), rng.choice(WHICH_NAMED)
    tree = as_stack(kind(rng.choice([8, 12])), chain, layers, where.axis, named)
    return {where.name: tree}, where


# -- What stands beside the layers -----------------------------------------------------


OTHERS = [
    {"head": dense(D, 7)},
    {"pos": weight(9, D), "final_norm": scale(D)},
    {"heads_0": dense(D, 7), "heads_1": dense(D, 7)},
    {"head": [dense(D, 7), dense(D, 7)]},
    {"stem": {"conv1": dense(3, D, D), "conv2": dense(3, D, D)}},
    {"time_mlp": {"Dense_0": dense(D, D), "Dense_1": dense(D, D)}},
    {"Dense_0": dense(D, D), "Dense_1": dense(D, D), "LayerNorm_0": scale(D)},
    {"proj_0": weight(D, D), "proj_1": weight(D, D), "proj_2": weight(D, D)},
    {"embeddings": [weight(9, D), weight(9, D)]},
    {"LayerNorm_0": scale(D), "LayerNorm_1": scale(D)},
    {"linear": {"w": weight(D, D)}, "linear_1": {"w": weight(D, D)}},
]


def surroundings(rng):
    tree = {"embed": weight(9, D)}
    for other in rng.sample(OTHERS, rng.choice([0, 1, 1, 2])):
        tree |= other
    return outside(tree)


OUTER = [
    *((), (), ("params",), ("params", "gpt2"), ("wav2vec2", "encoder")),
    *(("t5v1", "encoder"), ("bert2",), ("net_0",), ("model1", "transformer")),
    *(("params", "resnet50"), ("vit_b16",)),
]


def under(names, tree):
    for name in reversed(names):
        tree = {name: tree}
    return tree


# -- Models ----------------------------------------------------------------------------


class Model(NamedTuple):
    """A tree of `Param`s.

    Attributes:
      kind: which kind of model.
      tree: the tree.
      stacks: `Numbers`, `Scan` or `Cycle` of each stack.
      joined: pairs of chains of which the second may go on where the first ends.
      wrong: patterns of numbers that are not the layers'.
    """

    kind: str
    tree: Any
    stacks: tuple = ()
    joined: tuple = ()
    wrong: tuple = ()


def one_stack(rng):
    entries, how = unrolled_stack(rng, "one")
    return Model("one stack", surroundings(rng) | entries, (how,))


def two_stacks(rng):
    names = [("encoder", "decoder"), ("vision2", "text"), ("trunk", "mtp")]
    how = rng.choice([None, numbers(rng)])
    stacks = {name: unrolled_stack(rng, name, how) for name in rng.choice(names)}
    parts = {name: entries for name, (entries, _) in stacks.items()}
    hows = tuple(how for _, how in stacks.values())
    wrong = tuple(f"{name}/{how.pattern()}" for name, (_, how) in stacks.items())
    return Model("two stacks", surroundings(rng) | parts, hows, wrong=wrong)


def two_models(rng):
    one = one_stack(rng)
    copies = {
        copy: jax.tree.map(
            lambda p, copy=copy: dataclasses.replace(
                p, chain=None if p.chain is None else (copy, p.chain)
            ),
            one.tree,
        )
        for copy in range(rng.choice([2, 2, 3]))
    }
    kind = "two models"
    if rng.random() < 0.2:
        named = dict(zip(["online", "target", "ema"], copies.values(), strict=False))
        return Model(kind, named, one.stacks)
    if rng.random() < 0.2:
        models = rng.choice([list, tuple])(copies.values())
        return Model(kind, models, one.stacks, wrong=(r"^(\d+)/",))
    how = rng.choice(
        [
            Numbers(rng.choice(["net", "model", "gpt", "encoder", "Critic"]), "_"),
            Numbers(rng.choice(["net", "model", "gpt", "encoder"]), ""),
            Numbers(rng.choice(["models", "nets", "members"]), "list"),
            Numbers(rng.choice(["ensemble", "models"]), "digits"),
        ]
    )
    return Model(kind, how.put(copies), one.stacks, wrong=(how.pattern(),))


def stages(rng):
    how, kind, number = numbers(rng), layer_kind(rng), rng.choice([2, 3, 4])
    alike, wider = rng.choice([None, 2, 3]), rng.random() < 0.5
    parts = {}
    for s in range(number):
        shapes = kind(8 + 4 * s * wider)
        count = alike or rng.choice([1, 2, 3, 4])
        layers = {n: as_layer(shapes, ("stage", s), n) for n in range(count)}
        parts[s] = how.put(layers)
        parts[s] |= outside({"downsample": dense(D, D)}) if wider else {}
    names = ["stage", "stages", "down_blocks", "group", "level"]
    outer = Numbers(rng.choice(names), rng.choice(["_", "list", "digits", ""]))
    joined = tuple((("stage", s), ("stage", s + 1)) for s in range(number))
    tree = surroundings(rng) | outer.put(parts)
    return Model("stages", tree, (how,), joined, (outer.pattern(),))


def stages_as_lists(rng):
    shapes, number = layer_kind(rng)(8), rng.choice([2, 3])
    tree = [
        [as_layer(shapes, ("stage", s), n) for n in range(rng.choice([2, 3]))]
        for s in range(number)
    ]
    name = rng.choice(["stages", "down_blocks", "groups", "blocks"])
    joined = tuple((("stage", s), ("stage", s + 1)) for s in range(number))
    return Model("stages as lists", surroundings(rng) | {name: tree}, (), joined)


def layers_as_lists(rng):
    """Layers that are lists of alike parts."""
    shapes = rng.choice([layer_kind(rng)(8), weight(D, D), dense(D, D)])
    layers = [
        as_layer([shapes] * rng.choice([2, 2, 3]), "list", n)
        for n in range(rng.choice([2, 3, 5]))
    ]
    name = rng.choice(["layers", "blocks"])
    return Model("layers as lists", surroundings(rng) | {name: layers})


def mlp(rng, chain):
    """An MLP, whose layers may be coupled or not."""
    name = rng.choice(["Dense", "Linear", "fc"])
    return {
        f"{name}_{n}": as_layer(dense(D, D), chain, n, optional=True)
        for n in range(rng.choice([2, 3, 4]))
    }


def critics(rng):
    """Twin critics, alone or beside layers."""
    inside, seed = rng.choice([(), ("MLP_0",), ("mlp",)]), rng.random()
    parts = {c: under(inside, mlp(type(rng)(seed), ("critic", c))) for c in range(2)}
    names = [("Critic", "_"), ("q", ""), ("VectorCritic", "_"), ("critics", "list")]
    how = Numbers(*rng.choice(names))
    if rng.random() < 0.5:
        return Model("critics", how.put(parts))
    one = one_stack(rng)
    tree = {"actor": one.tree, **how.put(parts)}
    return Model("critics beside layers", tree, one.stacks, wrong=(how.pattern(),))


def scanned(rng):
    entries, where = scanned_stack(rng, "scan")
    tree = surroundings(rng) | under(rng.choice([(), ("decoder",)]), entries)
    return Model("scanned", tree, (where,))


def scanned_beside_unrolled(rng):
    entries, where = scanned_stack(rng, "scan")
    beside, how = unrolled_stack(rng, "one")
    tree = surroundings(rng) | {"encoder": beside, "decoder": entries}
    return Model("scanned beside unrolled", tree, (how, where))


def two_scans(rng):
    entries, where = scanned_stack(rng, "first")
    beside, other = scanned_stack(rng, "second")
    tree = surroundings(rng) | {"encoder": beside, "decoder": entries}
    return Model("two scans", tree, (where, other))


def cycle(rng):
    period, repeats = rng.choice([2, 3, 6]), rng.choice([2, 3, 5])
    shapes, how = layer_kind(rng)(8), numbers(rng, ["_", "list", "digits"])
    axis, named = rng.choice([0, 1]), rng.choice(WHICH_NAMED)
    last = period * repeats
    entries = how.put(
        {
            p: as_stack(shapes, "cycle", range(p, last, period), axis, named)
            for p in range(period)
        }
    )
    kind = "cycle"
    if rng.random() < 0.3:
        rest = how.put({n: as_layer(shapes, "rest", n) for n in range(2)})
        entries, kind = {"layers": entries, "layers_remainder": rest}, "cycle and rest"
    tree = surroundings(rng) | {"decoder": entries}
    return Model(kind, tree, (Cycle(how, axis, period),), (("cycle", "rest"),))


def no_layers(rng):
    return Model("no layers", surroundings(rng) | mlp(rng, "mlp"))


def ensemble(rng):
    """A model that `vmap` made several of."""
    entries, how = unrolled_stack(rng, "one", lead=(rng.choice([2, 5]),))
    name = rng.choice(["VmapNet_0", "ensemble", "critics"])
    return Model("ensemble", {name: entries}, (how,))


def arrays_in_a_row(rng):
    """Layers that are one array each."""
    how = numbers(rng)
    layers = {n: Param((D, D), "one", "", n) for n in range(depth(rng))}
    return Model("arrays in a row", surroundings(rng) | how.put(layers), (how,))


def prefixed(rng):
    """`h0_attn`, `h0_mlp`, …: as in Haiku's example of a transformer."""
    name, tree = rng.choice(["h", "layer_", "block"]), {}
    shapes = {"attn": {"query": dense(D, D), "key": dense(D, D)}, "mlp": dense(D, 8)}
    shapes |= {"ln_1": scale(D), "ln_2": scale(D)}
    for n in range(depth(rng)):
        parts = as_layer(shapes, "one", n)
        tree |= {f"{name}{n}_{part}": x for part, x in parts.items()}
    return Model("prefixed", surroundings(rng) | {"transformer": tree})


def two_kinds(rng):
    """Layers of two kinds in turn, or those of one before those of the other."""
    how, first = numbers(rng), rng.choice([None, 1, 2])
    shared = {"attn": dense(D, D), "norm": scale(D)}
    other = rng.choice([{"moe": {"experts": [dense(D, 8)] * 2}}, {"moe": dense(D, D)}])
    layers = {}
    for n in range(rng.choice([4, 5, 6])):
        is_dense = n % 2 == 0 if first is None else n < first
        shapes = shared | ({"mlp": dense(D, 8)} if is_dense else other)
        layers[n] = as_layer(shapes, "one", n)
    return Model("two kinds", surroundings(rng) | how.put(layers), (how,))


# -- What is done to whole trees -------------------------------------------------------


def in_boxes(tree):
    return jax.tree.map(lambda p: dataclasses.replace(p, boxed=True), tree)


def in_boxes_with_names(tree):
    """Not of those that are stacked, which have the names that they were given."""

    def box(param):
        if param.axes:
            return param
        names = tuple("uvwxyz"[: len(param.shape)])
        return dataclasses.replace(param, boxed=True, names=names)

    return jax.tree.map(box, tree)


def with_attributes(node):
    """Dicts of names as nodes with attributes."""
    if isinstance(node, dict):
        children = {key: with_attributes(child) for key, child in node.items()}
        fit = all(isinstance(key, str) and key.isidentifier() for key in children)
        return Attributes(children) if fit and children else children
    if isinstance(node, list | tuple):
        return type(node)(map(with_attributes, node))
    return node


def _is_hole(node):
    return node is None or isinstance(node, optax.MaskedNode)


def _flat(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hole):
        yield (
            [str(getattr(key, "key", getattr(key, "idx", None))) for key in path],
            leaf,
        )


def dotted(tree):
    return {".".join(["model", *path]): leaf for path, leaf in _flat(tree)}


def with_slashes(tree):
    return {"/".join(path): leaf for path, leaf in _flat(tree)}


def with_tuples(tree):
    return {tuple(path): leaf for path, leaf in _flat(tree)}


def of_modules(tree):
    """Haiku's: `{"net/block/linear": {"w": …}}`."""
    modules = defaultdict(dict)
    for (*module, name), leaf in _flat(tree):
        modules["/".join(["net", *module])][name] = leaf
    return dict(modules)


FORMS = [
    *(lambda tree: tree,) * 4,
    *(with_attributes, in_boxes, in_boxes_with_names),
    *(dotted, with_slashes, with_tuples, of_modules),
]


def masked(rng, tree):
    """A role, a layer, a chain, all but these, what is outside, or one leaf masked."""
    params = jax.tree.leaves(tree)
    layers = [p for p in params if p.chain is not None]
    if not layers:
        return tree
    chosen, hole = rng.choice(layers), rng.choice([None, optax.MaskedNode()])
    is_masked = rng.choice(
        [
            lambda p: p.chain is None,
            lambda p: p is chosen,
            lambda p: p.chain == chosen.chain,
            lambda p: p.chain is not None and p.chain != chosen.chain,
            lambda p: p.role == chosen.role,
            lambda p: p.chain is not None and p.role != chosen.role,
            lambda p: (
                p.chain == chosen.chain and np.array_equal(p.layers, chosen.layers)
            ),
        ]
    )
    return jax.tree.map(lambda p: hole if is_masked(p) else p, tree)


KINDS = [
    *(one_stack, one_stack, two_stacks, two_models, stages, stages_as_lists),
    *(layers_as_lists, critics, scanned, scanned_beside_unrolled, two_scans, cycle),
    *(no_layers, ensemble, arrays_in_a_row, prefixed, two_kinds),
]


def model(rng, kind=None):
    """A model of any kind, in any form, with parts masked now and then."""
    found = (kind or rng.choice(KINDS))(rng)
    tree = found.tree
    if isinstance(tree, dict):
        tree = under(rng.choice(OUTER), tree)
    tree = rng.choice(FORMS)(tree)
    is_masked = rng.random() < 0.2
    if is_masked:
        tree = masked(rng, tree)
    return found._replace(tree=tree)
