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
from nodes import Attributes, Box

# -- Parameters, and who is whose neighbor ---------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """A parameter, and which layers it holds.

    Attributes:
      shape: of the whole leaf.
      chain: the sequence of layers that it is a part of; None outside of depth.
      role: which parameter of a layer it is.
      layers: its layer, or its layers along `axis`.
      axis: the array axis over depth, if it has one.
      optional: whether its chain may also be left alone.
      names: of its axes, if it is in a box; () for a box without names.
    """

    shape: tuple[int, ...]
    chain: Any = None
    role: Any = None
    layers: Any = 0
    axis: int | None = None
    optional: bool = False
    names: tuple[str, ...] | None = None

    @property
    def of_layer(self):
        return tuple(n for k, n in enumerate(self.shape) if k != self.axis)

    @property
    def slices(self):
        """{layer: the place of its slice}."""
        if self.axis is None:
            return {self.layers: frozenset()}
        return {n: frozenset({(self.axis, i)}) for i, n in enumerate(self.layers)}

    def make(self):
        array = jax.ShapeDtypeStruct(self.shape, np.float32)
        return array if self.names is None else Box(array, self.names)


def truth_of(params, joined, kept):
    """(required, optional): the pairs of neighbors among the parameters that are kept.

    Args:
      params: the leaves of a tree.
      joined: pairs of chains of which the second may go on where the first ends.
      kept: whether a parameter is kept.
    """
    required, optional, untold = set(), set(), untold_chains(params)
    excused = {p.chain for p in params if p.optional} | untold
    slices, wholes = defaultdict(dict), defaultdict(dict)
    for i, param in enumerate(params):
        if param.chain is not None and kept(param):
            for layer, place in param.slices.items():
                slices[param.chain, param.role, param.of_layer][layer] = (i, place)
            if param.chain in untold:
                # They may be taken for layers, position by position.
                whole = wholes[param.chain, param.role, param.shape]
                whole[min(param.slices)] = (i, frozenset())
    for found in wholes.values():
        optional |= pairs_in(found)
    for (chain, *role), found in slices.items():
        (optional if chain in excused else required).update(pairs_in(found))
        for first, second in joined:
            if first == chain and (following := slices.get((second, *role))):
                ends = {found[max(found)], following[min(following)]}
                optional.add(frozenset(ends))
    return required, optional


def pairs_in(slices):
    return {frozenset({x, slices[n + 1]}) for n, x in slices.items() if n + 1 in slices}


def untold_chains(params):
    """The stacked chains that neither names of axes nor enough vectors tell."""
    stacked = [p for p in params if p.axis is not None]
    named = {p.chain for p in stacked if p.names}
    vectors = Counter(p.chain for p in stacked if len(p.of_layer) == 1)
    matrices = {p.chain for p in stacked if len(p.of_layer) > 1}
    return {
        p.chain
        for p in stacked
        if p.chain not in named and not (vectors[p.chain] > 1 and p.chain in matrices)
    }


# -- One layer, as a tree of shapes ----------------------------------------------------

D = 4
MATRIX, VECTOR = (D, D), (D,)


def dense(*sizes):
    return {"kernel": sizes or MATRIX, "bias": (sizes or VECTOR)[-1:]}


SCALE = {"scale": VECTOR}
ATTENTIONS = [
    {"attn": {"qkv": dense(D, 3 * D), "out": dense()}},
    {"attn": {name: {"kernel": MATRIX} for name in "qkvo"}},
    {"MultiHeadDotProductAttention_0": {"query": dense(D, 2, D // 2)}},
    {"attention": {"self": {"query": dense()}, "output": dense()}},
    {"attn": {"w": [MATRIX] * 3}},
    {"attn_img": dense(), "attn_txt": dense()},
]
NORMS = [
    {},
    {"norm": SCALE},
    {"ln_1": SCALE, "ln_2": SCALE},
    {"LayerNorm_0": SCALE, "LayerNorm_1": SCALE},
    {"norm1": VECTOR, "norm2": VECTOR},
    {"norms": [VECTOR, VECTOR]},
]
FEED_FORWARDS = [
    lambda f: {"mlp": {"up": dense(D, f), "down": dense(f, D)}},
    lambda f: {"MlpBlock_0": {"Dense_0": dense(D, f), "Dense_1": dense(f, D)}},
    lambda f: {"mlp": {"Dense_0": dense(), "Dense_1": dense()}},
    lambda f: {"Dense_0": dense(), "Dense_1": dense(), "Dense_2": dense(D, f)},
    lambda f: {"mlp": {"wi_0": (D, f), "wi_1": (D, f), "wo": (f, D)}},
    lambda f: {"mlp": {"w1": dense(D, f), "w2": dense(f, D), "w3": dense(D, f)}},
    lambda f: {"fc1": dense(), "fc2": dense(), "out": (D, f)},
    lambda f: {"mlp": {"layers": [dense(), dense()]}},
    lambda f: {"mlp": [dense(), dense()]},
    lambda f: {"conv1": dense(3, D, D), "conv2": dense(3, D, D)},
    lambda f: {"moe": {"experts": [dense(D, f)] * 3, "gate": (D, 3)}},
    lambda f: {"moe": {f"experts_{i}": dense(D, f) for i in range(4)}},
    lambda f: {"moe": {"experts": {"kernel": (5, D, f)}, "gate": (D, 5)}},
    lambda f: {"adapters": {"0": dense(), "1": dense()}, "mlp": dense(D, f)},
    lambda f: {"to_out": (dense(), {}), "heads": {0: MATRIX, 1: MATRIX}},
]


def block_of_t5(f):
    attention = {"SelfAttention": dense(), "layer_norm": SCALE}
    feed_forward = {"DenseReluDense": dense(D, f), "layer_norm": SCALE}
    return {"layer": {"0": attention, "1": feed_forward}}


def layer_kind(rng):
    """A function of a width that makes the shapes of a layer."""
    which = rng.randrange(9)
    if which < 2:
        return block_of_t5 if which else lambda f: dense(D, f)
    attention, norm = rng.choice(ATTENTIONS), rng.choice(NORMS)
    feed_forward = rng.choice(FEED_FORWARDS)
    return lambda f: {**attention, **feed_forward(f), **norm}


# -- Layers ----------------------------------------------------------------------------


def params(shapes, make=lambda role, sizes: Param(sizes)):
    return jax.tree_util.tree_map_with_path(
        lambda path, sizes: make(jax.tree_util.keystr(path), sizes),
        shapes,
        is_leaf=lambda node: (
            isinstance(node, tuple) and all(isinstance(n, int) for n in node)
        ),
    )


def layer(shapes, chain, n, lead=(), optional=False):
    """The shapes as one layer of a chain."""
    return params(
        shapes,
        lambda role, sizes: Param(lead + sizes, chain, role, n, optional=optional),
    )


def stack(rng, chain, layers, axis):
    """Layers of some kind on an axis, which all, some or none have the name of."""
    named = rng.choice([9, 9, 0, 1])  # from which number of axes on

    def make(role, sizes):
        at = min(axis, len(sizes))
        own = "abcd"[: len(sizes)]
        return Param(
            (*sizes[:at], len(layers), *sizes[at:]),
            chain,
            role,
            layers,
            at,
            names=(*own[:at], "layers", *own[at:]) if len(sizes) > named else None,
        )

    return lambda shapes: params(shapes, make)


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
        if style in ("digits", "integers"):
            key = str if style == "digits" else int
            return {name: {key(i): x for i, x in subtrees.items()}}
        if style == "padded":
            return {f"{name}_{i:02d}": x for i, x in subtrees.items()}
        if style == "haiku":
            return {f"{name}_{i}" if i else name: x for i, x in subtrees.items()}
        return {f"{name}{style}{i}": x for i, x in subtrees.items()}

    def pattern(self, number=r"(\d+)"):
        """A pattern that finds them."""
        between = {"haiku": f"(?:_{number})?", "": number, "_": f"_{number}"}
        between["padded"] = between["_"]
        return f"{self.name}{between.get(self.style, f'/{number}')}/"


class Scan(NamedTuple):
    """Where stacked layers are; with a period, in a node for each of its positions."""

    where: Any
    axis: int
    period: int = 1


NAMES = [
    *("layers", "layer", "blocks", "block", "h", "Block", "TransformerBlock"),
    *("encoderblock", "encoder_layer", "resblocks", "DecoderLayer", "residual_block"),
]
STYLES = ["list", "tuple", "digits", "integers", "_", "", "padded", "haiku"]


def unrolled_stack(rng, chain, how=None, lead=()):
    """The entries of a dict, and how they are numbered; now and then with a gap."""
    how = how or Numbers(rng.choice(NAMES), rng.choice(STYLES))
    kind, count = layer_kind(rng), rng.choice([2, 3, 3, 4, 5, 11])
    start = rng.choice([0, 0, 0, 1]) if how.style != "haiku" else 0
    wider = rng.choice(
        [*[lambda n: 0] * 7, lambda n: n >= count // 2, lambda n: n % 2, lambda n: n]
    )
    width = rng.choice([4, 8, 12])
    layers = {
        n: layer(kind(width + wider(n - start)), chain, n, lead)
        for n in range(start, start + count)
    }
    if count > (3 if how.style == "haiku" else 2) and rng.random() < 0.06:
        del layers[start + rng.randrange(1, count - 1)]
    return how.put(layers), how


def scanned_stack(rng, chain):
    where = rng.choice(["layers", "blocks", "h", "encoderblock", "ScanBlock_0"])
    axis, shapes = rng.choice([0, 0, 1]), layer_kind(rng)(rng.choice([8, 12]))
    tree = stack(rng, chain, range(rng.choice([2, 3, 5, 11])), axis)(shapes)
    return {where: tree}, Scan(where, axis)


# -- Models ----------------------------------------------------------------------------

OTHERS = [
    {"head": dense(D, 7)},
    {"pos": (9, D), "final_norm": SCALE},
    {"heads_0": dense(D, 7), "heads_1": dense(D, 7)},
    {"stem": {"conv1": dense(3, D, D), "conv2": dense(3, D, D)}},
    {"Dense_0": dense(), "Dense_1": dense(), "LayerNorm_0": SCALE},
    {"proj_0": MATRIX, "proj_1": MATRIX, "proj_2": MATRIX},
    {"embeddings": [(9, D), (9, D)]},
    {"linear": {"w": MATRIX}, "linear_1": {"w": MATRIX}},
]


def surroundings(rng):
    tree = {"embed": (9, D)}
    for other in rng.sample(OTHERS, rng.choice([0, 1, 1, 2])):
        tree |= other
    return params(tree)


class Model(NamedTuple):
    """A tree of `Param`s.

    Attributes:
      kind: the function that made it.
      tree: the tree.
      stacks: `Numbers` or `Scan` of each stack.
      joined: pairs of chains of which the second may go on where the first ends.
      wrong: patterns of numbers that are not the layers'.
    """

    kind: Any
    tree: Any
    stacks: tuple = ()
    joined: tuple = ()
    wrong: tuple = ()


def one_stack(rng):
    entries, how = unrolled_stack(rng, "one")
    return Model(one_stack, surroundings(rng) | entries, (how,))


def two_stacks(rng):
    names = [("encoder", "decoder"), ("vision2", "text"), ("trunk", "mtp")]
    found = {name: unrolled_stack(rng, name) for name in rng.choice(names)}
    tree = surroundings(rng) | {name: x for name, (x, _) in found.items()}
    hows = tuple(how for _, how in found.values())
    wrong = tuple(f"{name}/{how.pattern()}" for name, (_, how) in found.items())
    return Model(two_stacks, tree, hows, wrong=wrong)


def two_models(rng):
    one = one_stack(rng)

    def copy(number):
        def of_copy(p):
            chain = None if p.chain is None else (number, p.chain)
            return dataclasses.replace(p, chain=chain)

        return jax.tree.map(of_copy, one.tree)

    copies = {number: copy(number) for number in range(rng.choice([2, 2, 3]))}
    if rng.random() < 0.2:
        tree = dict(zip(["online", "target", "ema"], copies.values(), strict=False))
        return Model(two_models, tree, one.stacks)
    # A list that is called as one thing, such as `encoder/0`, may be one of its layers.
    names = [(name, style) for name in ("net", "gpt", "encoder") for style in ("_", "")]
    names += [("Critic", "_"), ("members", "list"), ("models", "digits")]
    how = Numbers(*rng.choice(names))
    return Model(two_models, how.put(copies), one.stacks, wrong=(how.pattern(),))


def stages(rng):
    how, kind = Numbers(rng.choice(NAMES), rng.choice(STYLES)), layer_kind(rng)
    number, wider = rng.choice([2, 3, 4]), rng.random() < 0.5
    alike, parts = rng.choice([None, 2, 3]), {}
    for s in range(number):
        shapes, count = kind(8 + 4 * s * wider), alike or rng.choice([1, 2, 3, 4])
        parts[s] = how.put({n: layer(shapes, s, n) for n in range(count)})
        parts[s] |= params({"downsample": dense()}) if wider else {}
    name = rng.choice(["stage", "stages", "down_blocks", "group", "level"])
    outer = Numbers(name, rng.choice(["_", "list", "digits", ""]))
    joined = tuple((s, s + 1) for s in range(number))
    tree = surroundings(rng) | outer.put(parts)
    return Model(stages, tree, (how,), joined, (outer.pattern(),))


def critics(rng):
    """Twin MLPs, whose layers may be coupled or not, beside layers."""
    count = rng.choice([2, 3, 4])
    parts = {
        c: {f"Dense_{n}": layer(dense(), c, n, optional=True) for n in range(count)}
        for c in range(2)
    }
    how = Numbers(*rng.choice([("Critic", "_"), ("q", ""), ("critics", "list")]))
    one = one_stack(rng)
    tree = {"actor": one.tree, **how.put(parts)}
    return Model(critics, tree, one.stacks, wrong=(how.pattern(),))


def scanned(rng):
    """One scan, or two, or one beside unrolled layers."""
    entries, where = scanned_stack(rng, "scan")
    beside, other = rng.choice([unrolled_stack, scanned_stack])(rng, "other")
    if rng.random() < 0.4:
        return Model(scanned, surroundings(rng) | {"decoder": entries}, (where,))
    tree = surroundings(rng) | {"encoder": beside, "decoder": entries}
    return Model(scanned, tree, (where, other))


def cycle(rng):
    period, repeats = rng.choice([2, 3, 6]), rng.choice([2, 3, 5])
    how = Numbers(rng.choice(NAMES), rng.choice(["_", "list", "digits"]))
    shapes, axis, last = layer_kind(rng)(8), rng.choice([0, 1]), period * repeats
    seed = rng.random()  # all positions have names, or none
    entries = how.put(
        {
            p: stack(type(rng)(seed), "cycle", range(p, last, period), axis)(shapes)
            for p in range(period)
        }
    )
    if rng.random() < 0.3:
        rest = how.put({n: layer(shapes, "rest", n) for n in range(2)})
        entries = {"layers": entries, "layers_remainder": rest}
    tree = surroundings(rng) | {"decoder": entries}
    return Model(cycle, tree, (Scan(how, axis, period),), (("cycle", "rest"),))


def ensemble(rng):
    """A model that `vmap` made several of."""
    entries, how = unrolled_stack(rng, "one", lead=(rng.choice([2, 5]),))
    name = rng.choice(["VmapNet_0", "ensemble", "critics"])
    return Model(ensemble, {name: entries}, (how,))


def arrays_in_a_row(rng):
    """Layers that are one array each."""
    how = Numbers(rng.choice(NAMES), rng.choice(STYLES))
    layers = {n: Param(MATRIX, "one", "", n) for n in range(rng.choice([2, 3, 11]))}
    return Model(arrays_in_a_row, surroundings(rng) | how.put(layers), (how,))


def two_kinds(rng):
    """Layers of two kinds in turn, or those of one before those of the other."""
    how = Numbers(rng.choice(NAMES), rng.choice(STYLES))
    first, shared = rng.choice([None, 1, 2]), {"attn": dense(), "norm": SCALE}
    other = rng.choice([{"moe": {"experts": [dense(D, 8)] * 2}}, {"moe": dense()}])
    layers = {}
    for n in range(rng.choice([4, 5, 6])):
        is_dense = n % 2 == 0 if first is None else n < first
        layers[n] = layer(shared | ({"mlp": dense(D, 8)} if is_dense else other), 1, n)
    return Model(two_kinds, surroundings(rng) | how.put(layers), (how,))


def no_layers(rng):
    return Model(no_layers, surroundings(rng))


# -- What is done to whole trees -------------------------------------------------------


def in_boxes(tree):
    """Of those that are stacked, the names are what they were given."""

    def box(p):
        names = () if p.axis is not None else tuple("uvwxyz"[: len(p.shape)])
        return p if p.names else dataclasses.replace(p, names=names)

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


def flat(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield [str(getattr(k, "key", getattr(k, "idx", None))) for k in path], leaf


def of_modules(tree):
    """Haiku's: `{"net/block/linear": {"w": …}}`."""
    modules = defaultdict(dict)
    for (*module, name), leaf in flat(tree):
        modules["/".join(["net", *module])][name] = leaf
    return dict(modules)


FORMS = [
    *[lambda tree: tree] * 4,
    with_attributes,
    in_boxes,
    of_modules,
    lambda tree: {".".join(["model", *path]): leaf for path, leaf in flat(tree)},
    lambda tree: {"/".join(path): leaf for path, leaf in flat(tree)},
    lambda tree: {tuple(path): leaf for path, leaf in flat(tree)},
]


def masked(rng, tree):
    """A role, a layer, a chain, all but these, what is outside, or one leaf masked."""
    layers = [p for p in jax.tree.leaves(tree) if p.chain is not None]
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
            lambda p: p.chain == chosen.chain and p.layers == chosen.layers,
        ]
    )
    return jax.tree.map(lambda p: hole if is_masked(p) else p, tree)


KINDS = [
    *(one_stack, one_stack, two_stacks, two_models, stages, critics, scanned, scanned),
    *(cycle, ensemble, arrays_in_a_row, two_kinds, no_layers),
]
OUTER = [(), (), ("params",), ("params", "gpt2"), ("wav2vec2", "encoder"), ("net_0",)]


def model(rng):
    """A model of any kind, in any form, with parts masked now and then."""
    found = rng.choice(KINDS)(rng)
    tree = found.tree
    for name in rng.choice(OUTER):
        tree = {name: tree}
    tree = rng.choice(FORMS)(tree)
    return found._replace(tree=masked(rng, tree) if rng.random() < 0.2 else tree)
