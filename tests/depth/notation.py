r"""Trees as text that a person can check, and the truth about their layers.

A file in `trees/` holds several trees. Each begins with its name and a few lines about
it; the tree follows, indented by its paths:

    == hf-bert-mlm
    source: transformers 4.57.6 FlaxBertForMaskedLM
    right: detect; unrolled; hf_flax()
    layers bert : encoder/layer/(\d+)/

    bert
      embeddings/LayerNorm/{bias,scale} 4
      encoder/layer/{0-3}
        attention/self/{key,query,value}
          bias 4
          kernel 4x4

A line with a shape is a leaf; "{a,b}" and "{0-3}" stand for several. In a path "b" is a
dict key, "<3>" an integer key, "[3]" an index, ".b" an attribute, "|" a slash inside a
key, a final ".value" a box, a final "<flat>" the array of a node without keys; and
"(a|b)" is a key that is a tuple. After the shape "@layers,-,mlp" are the axes' names;
"None" in its place is a leaf that is masked.

The truth is a list of rules, the first that is found in the plain path wins:

    layers NAME [axis=1,2] [stride=6,1] [start=0] [step=1] [ranked] : PATTERN

The first unnamed group, times `step`, plus `start`, is the layer of the leaf's first
slice; without a group it is `start`. The role is `(?P<role>..)` and what follows the
match; `(?P<chain>..)` tells several chains of one rule apart. `ranked`: layers of one
kind are neighbors over those of other kinds. `maybe` in place of `layers` is a chain
that a reader may as well leave alone. "or" begins another truth that is as good. No
rule at all: the tree has no layers.

`right` names the readers that couple true neighbors, all of them, and say nothing;
`loud` those that say that they do not know or do not fit: an error, or a warning. A
reader is `detect`, `unrolled` without a pattern, or a call, of a preset or of `gs`.
"""

import functools
import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from nodes import Attributes, Box, NamedArray

FILES = Path(__file__).parent / "trees"


class Rule(NamedTuple):
    chain: str
    pattern: str
    axes: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    start: int = 0
    step: int = 1
    ranked: bool = False
    optional: bool = False


class Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...] | None
    names: tuple[str | None, ...] = ()


class Tree(NamedTuple):
    """A tree and what is known about it.

    Attributes:
      name: unique.
      source: the call that makes it, or the file it was read from.
      leaves: in the order of the text.
      truths: each a list of rules; any of them is right.
      words: {reader: "right" or "loud"}.
      note: why a person would hesitate.
    """

    name: str
    source: str
    leaves: list[Leaf]
    truths: list[list[Rule]]
    words: dict[str, str]
    note: str


# -- Reading ---------------------------------------------------------------------------


@functools.cache
def trees_of(file):
    """{name: tree} of a file in `trees/`."""
    return {tree.name: tree for tree in read((FILES / f"{file}.txt").read_text())}


@functools.cache
def all_trees():
    files = sorted(file.stem for file in FILES.glob("*.txt"))
    return {name: tree for file in files for name, tree in trees_of(file).items()}


def read(text):
    return [_tree(part) for part in re.split(r"^== ", text, flags=re.M)[1:]]


def _tree(text):
    head, _, body = text.partition("\n\n")
    name, *lines = head.splitlines()
    about, words, truths = defaultdict(str), {}, [[]]
    for line in lines:
        if line == "or":
            truths.append([])
        elif line.startswith(("layers ", "maybe ")):
            truths[-1].append(_rule(line))
        else:
            key, value = line.split(": ", 1)
            assert key in ("source", "note", "right", "loud"), (name, line)
            if key in ("right", "loud"):
                words |= dict.fromkeys(value.split("; "), key)
            else:
                about[key] = value
    leaves = list(_leaves(body))
    return Tree(name, about["source"], leaves, truths, words, about["note"])


def _rule(line):
    head, pattern = line.split(" : ", 1)
    kind, chain, *options = head.split()
    values = dict(option.partition("=")[::2] for option in options)
    axes, stride = (_ints(values.pop(key, "")) for key in ("axis", "stride"))
    ranked = values.pop("ranked", None) is not None
    numbers = {key: int(value) for key, value in values.items()}
    return Rule(
        chain, pattern, axes, stride, **numbers, ranked=ranked, optional=kind == "maybe"
    )


def _ints(text):
    return tuple(map(int, filter(None, text.split(","))))


def _leaves(body):
    above = []
    for line in body.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        path, *rest = line.split()
        above[depth:] = [path]
        if rest:
            shape, *names = rest
            names = names[0][1:].split(",") if names else ()
            names = tuple(None if name == "-" else name for name in names)
            for path in _expanded("/".join(above)):
                yield Leaf(path, _shape(shape), names)


def _shape(text):
    if text in ("()", "None"):
        return () if text == "()" else None
    return tuple(map(int, text.split("x")))


def _expanded(template):
    """All texts that "{a,b}" and "{0-3}" stand for."""
    parts = re.split(r"\{([^}]*)\}", template)
    for i in range(1, len(parts), 2):
        span = re.fullmatch(r"(\d+)-(\d+)", parts[i])
        numbers = span and range(int(span[1]), int(span[2]) + 1)
        parts[i] = [*map(str, numbers)] if numbers else parts[i].split(",")
    choices = [[part] if isinstance(part, str) else part for part in parts]
    return map("".join, itertools.product(*choices))


# -- Building --------------------------------------------------------------------------


def built(tree, values=None):
    """The tree, filled by the path of each leaf, or with shapes alone."""
    items, values = [], values or shapes_of(tree)
    for leaf in tree.leaves:
        value = values.get(leaf.path)
        path, _, last = leaf.path.rpartition("/")
        if last == "<flat>":
            value = NamedArray(value, leaf.names)
        elif last == ".value":
            value = Box(value, leaf.names)
        else:
            path = leaf.path
        items.append(([_key(segment) for segment in path.split("/")], value))
    return _nested(items)


def shapes_of(tree):
    leaves = [leaf for leaf in tree.leaves if leaf.shape is not None]
    return {x.path: jax.ShapeDtypeStruct(x.shape, np.float32) for x in leaves}


def _key(segment):
    if segment.startswith("."):
        return GetAttrKey(segment[1:])
    if match := re.fullmatch(r"\[(\d+)\]", segment):
        return SequenceKey(int(match[1]))
    if match := re.fullmatch(r"<(\d+)>", segment):
        return DictKey(int(match[1]))
    if segment.startswith("("):
        return DictKey(tuple(segment[1:-1].split("|")))
    return DictKey(segment.replace("|", "/"))


def _nested(items):
    """The tree of `(keys, leaf)`s."""
    if not items[0][0]:
        ((_, leaf),) = items
        return leaf
    children = defaultdict(list)
    for (first, *rest), leaf in items:
        children[first].append((rest, leaf))
    first = next(iter(children))
    subtrees = {key: _nested(of_key) for key, of_key in children.items()}
    if isinstance(first, GetAttrKey):
        return Attributes({key.name: x for key, x in subtrees.items()})
    if isinstance(first, SequenceKey):
        length = 1 + max(key.idx for key in subtrees)
        return [subtrees.get(SequenceKey(i)) for i in range(length)]
    return {key.key: x for key, x in subtrees.items()}


def written(key_path):
    """The path of jax keys as it is written here."""
    return "/".join(map(_written, key_path))


def _written(key):
    if isinstance(key, GetAttrKey):
        return f".{key.name}"
    if isinstance(key, SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, FlattenedIndexKey):
        return "<flat>"
    if isinstance(key.key, tuple):
        return f"({'|'.join(key.key)})"
    return f"<{key.key}>" if isinstance(key.key, int) else key.key.replace("/", "|")


# -- Truth -----------------------------------------------------------------------------


def unboxed(path):
    return path.removesuffix("/.value")


def plain(path):
    """The path without the kinds of its segments, as the rules see it."""
    segments = path.removesuffix("/<flat>").removesuffix("/.value").split("/")
    bare = (re.sub(r"^\.|[<>\[\]()]", "", segment) for segment in segments)
    return "/".join(bare).replace("|", "/")


def neighbors(tree, rules):
    """{chain: the pairs of slices that are neighbors}.

    A slice is the path of a leaf, without its box, and {(depth axis, index)}.
    """
    layers = defaultdict(dict)
    for leaf in tree.leaves:
        for rule in rules if leaf.shape is not None else ():
            if match := re.search(rule.pattern, plain(leaf.path)):
                _place(layers, leaf, rule, match)
                break
    pairs = {rule.chain: set() for rule in rules}
    for (rule, *_), slices in layers.items():
        for a, b in itertools.pairwise(sorted(slices)):
            if rule.ranked or b == a + 1:
                pairs[rule.chain].add(frozenset({slices[a], slices[b]}))
    assert all(pairs.values()), f"{tree.name}: a rule without layers"
    return pairs


def _place(layers, leaf, rule, match):
    named = match.re.groupindex.values()
    unnamed = [i for i in range(1, match.re.groups + 1) if i not in named]
    number = match[unnamed[0]] if unnamed else None
    first = rule.start + rule.step * int(number or 0)
    sizes = [leaf.shape[axis] for axis in rule.axes]
    inner = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    stride = rule.stride or inner
    shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in rule.axes)
    groups, after = match.groupdict(), plain(leaf.path)[match.end() :]
    role = (groups.get("chain"), groups.get("role"), after, shape)
    # Rules of one chain say together which layers it has.
    slices = layers[Rule(rule.chain, "", ranked=rule.ranked), *role]
    for index in np.ndindex(*sizes):
        layer = first + sum(np.multiply(index, stride).tolist())
        assert layer not in slices, (leaf.path, rule, layer)
        place = frozenset(zip(rule.axes, index, strict=True))
        slices[layer] = (unboxed(leaf.path), place)
