r"""Trees as text that a person can check, and the truth about their layers.

A file in `data/` holds several trees. Each begins with its name and a few lines about
it; the tree follows, indented by its paths:

    == hf-bert
    source: transformers FlaxBertForMaskedLM(BertConfig(num_hidden_layers=4))
    preset: hf_flax()
    must: detect unrolled
    layers bert : encoder/layer/(\d+)/

    bert
      embeddings/LayerNorm/{bias,scale} 4
      encoder/layer/{0-3}
        attention/self/{key,query,value}
          bias 4
          kernel 4x4

A line with a shape is a leaf; "{a,b}" and "{0-3}" stand for several. Paths are those of
`stacks.py`: "b" is a dict key, "<3>" an integer key, "[3]" an index, ".b" an attribute,
"|" a slash inside a key, a final ".value" a box, a final "<flat>" a haliax array; and
"(a|b)" is a key that is a tuple. After the shape "@layers,-,mlp" are the axes' names,
"i32" is a dtype other than float32.

The truth is a list of rules, the first that is found in the plain path wins:

    layers NAME [axis=1,2] [stride=6,1] [start=0] [step=1] [ranked] : PATTERN

The first unnamed group, times `step`, plus `start`, is the layer of the leaf's first
slice; without a group it is `start`. The role is `(?P<role>..)` and what follows the
match; `(?P<chain>..)` tells several chains of one rule apart. `ranked`: layers of one
kind are neighbors over those of other kinds. `maybe` in place of `layers` is a chain
that a reader may as well leave alone. "or" begins another truth that is as good. No
rule at all: the tree has no layers.

`preset` is a call that is meant for the tree, `misuse` one that a user might try and
that must not be silently wrong. `must` names the readers that have to be right.
"""

import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import stacks
from jax.tree_util import DictKey, GetAttrKey

DATA = Path(__file__).parent / "data"


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
    shape: tuple[int, ...]
    names: tuple[str | None, ...] = ()
    dtype: str = "float32"


class Tree(NamedTuple):
    """A tree and what is known about it.

    Attributes:
      name: unique.
      source: the call that makes it, or the file it was read from.
      leaves: in the order of the text.
      truths: each a list of rules; any of them is right.
      presets: calls that are meant for it.
      misuses: calls that a user might try, and that must not be silently wrong.
      must: readers that have to be right, and silent.
      note: why a person would hesitate.
    """

    name: str
    source: str
    leaves: list[Leaf]
    truths: list[list[Rule]]
    presets: list[str]
    misuses: list[str]
    must: tuple[str, ...]
    note: str


# -- Reading ---------------------------------------------------------------------------


def read_all():
    files = sorted(DATA.glob("*.txt"))
    return [tree for file in files for tree in read_file(file.read_text())]


def read_file(text):
    return [_tree(part) for part in re.split(r"^== ", text, flags=re.M)[1:]]


def _tree(text):
    head, _, body = text.partition("\n\n")
    name, *lines = head.splitlines()
    about, truths = defaultdict(list), [[]]
    for line in lines:
        if line == "or":
            truths.append([])
        elif line.startswith(("layers ", "maybe ")):
            truths[-1].append(_rule(line))
        else:
            key, value = line.split(": ", 1)
            about[key].append(value)
    unknown = set(about) - {"source", "preset", "misuse", "must", "note"}
    assert not unknown, (name, unknown)
    must = tuple(" ".join(about["must"]).split())
    note = " ".join(about["note"])
    (source,) = about["source"]
    leaves = list(_leaves(body))
    return Tree(
        name, source, leaves, truths, about["preset"], about["misuse"], must, note
    )


def _rule(line):
    head, pattern = line.split(" : ", 1)
    kind, chain, *options = head.split()
    values = dict(option.partition("=")[::2] for option in options)
    axes = _ints(values.pop("axis", ""))
    stride = _ints(values.pop("stride", ""))
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
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        path, *rest = content.split()
        del above[depth:]
        above.append(path)
        if rest:
            yield from _leaf("/".join(above), *rest)


def _leaf(template, shape, *rest):
    names = next((x[1:].split(",") for x in rest if x.startswith("@")), ())
    names = tuple(None if name == "-" else name for name in names)
    dtype = {"i32": "int32"}[rest[-1]] if rest[-1:] == ("i32",) else "float32"
    size = () if shape == "()" else tuple(map(int, shape.split("x")))
    for path in expanded(template):
        yield Leaf(path, size, names, dtype)


def expanded(template):
    """All texts that "{a,b}" and "{0-3}" stand for."""
    parts = re.split(r"\{([^}]*)\}", template)
    for i in range(1, len(parts), 2):
        span = re.fullmatch(r"(\d+)-(\d+)", parts[i])
        numbers = span and range(int(span[1]), int(span[2]) + 1)
        parts[i] = [*map(str, numbers)] if numbers else parts[i].split(",")
    choices = [[part] if isinstance(part, str) else part for part in parts]
    return map("".join, itertools.product(*choices))


# -- Building --------------------------------------------------------------------------


def build(tree, values=None):
    """The tree, filled by the path of each leaf, or with shapes alone."""
    items = []
    for leaf in tree.leaves:
        value = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if values is not None:
            value = jnp.asarray(values[leaf.path])
        path, value = _boxed(leaf, value)
        items.append((keys(path), value))
    return stacks.nested(items)


def _boxed(leaf, value):
    if leaf.path.endswith("/<flat>"):
        axes = tuple(map(stacks.Axis, leaf.names, leaf.shape))
        return leaf.path.removesuffix("/<flat>"), stacks.NamedArray(value, axes)
    if leaf.path.endswith("/.value"):
        return leaf.path.removesuffix("/.value"), stacks.Box(value, leaf.names)
    return leaf.path, value


def keys(path):
    return [key for segment in path.split("/") for key in _keys(segment)]


def _keys(segment):
    if segment.startswith("("):
        parts = segment[1:-1].split("|")
        return [DictKey(tuple(_plain_key(part) for part in parts))]
    return stacks.keys(segment)


def _plain_key(part):
    return int(part[1:-1]) if part.startswith("<") else part


def text(key_path):
    """The written path of jax keys."""
    return "/".join(map(_segment, key_path)).replace("<flat 0>", "<flat>")


def _segment(key):
    if isinstance(key, DictKey) and isinstance(key.key, tuple):
        return f"({'|'.join(key.key)})"
    return stacks.text([key])


def plain(path):
    """The path without the kinds of its segments, as the rules see it."""
    segments = path.split("/")
    if segments[-1] in (".value", "<flat>"):
        segments.pop()
    bare = (re.sub(r"^\.|[<>\[\]()]", "", segment) for segment in segments)
    return "/".join(bare).replace("|", "/")


# -- Truth -----------------------------------------------------------------------------


def neighbors(tree, rules):
    """{chain: pairs of neighboring slices}, a slice being (leaf, index)."""
    layers = defaultdict(dict)
    for leaf in tree.leaves:
        for rule in rules:
            if match := re.search(rule.pattern, plain(leaf.path)):
                _place(layers, leaf, rule, match)
                break
    pairs = defaultdict(list)
    for (name, ranked, *_), slices in layers.items():
        for a, b in itertools.pairwise(sorted(slices)):
            if ranked or b == a + 1:
                pairs[name].append((slices[a], slices[b]))
    return pairs


def _place(layers, leaf, rule, match):
    unnamed = set(range(1, match.re.groups + 1)) - set(match.re.groupindex.values())
    number = match[min(unnamed)] if unnamed else None
    first = rule.start + rule.step * int(number or 0)
    sizes = [leaf.shape[axis] for axis in rule.axes]
    inner = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    stride = rule.stride or inner
    shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in rule.axes)
    named = match.groupdict()
    after = plain(leaf.path)[match.end() :]
    role = (named.get("chain"), named.get("role"), after, shape, leaf.dtype)
    slices = layers[rule.chain, rule.ranked, *role]
    for position in np.ndindex(*sizes):
        index = [slice(None)] * len(leaf.shape)
        for axis, i in zip(rule.axes, position, strict=True):
            index[axis] = i
        layer = first + sum(np.multiply(position, stride).tolist())
        assert layer not in slices, (leaf.path, rule, layer)
        slices[layer] = (leaf.path, tuple(index))


# -- Writing ---------------------------------------------------------------------------


def dump(tree):
    """The text of a tree's leaves."""
    root: dict[str, Any] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = _axis_names(tree)
    for path, leaf in flat:
        *above, last = text(path).split("/")
        node = root
        for segment in above:
            node = node.setdefault(segment, {})
        shape = "x".join(map(str, leaf.shape)) or "()"
        node[last] = " ".join([shape, *names.get(path, [])])
    return "\n".join(_lines(root)) + "\n"


def _axis_names(tree):
    """{path of the array in a box: the names of its axes}."""
    boxes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: bool(_names(node))
    )
    return {
        (*path, GetAttrKey("value")): ["@" + ",".join(name or "-" for name in names)]
        for path, box in boxes
        if (names := _names(box))
    }


def _names(node):
    return getattr(node, "names", None) if hasattr(node, "value") else None


def _lines(node):
    """Lines of the children, those of equal content in one."""
    by_content = defaultdict(list)
    for name, child in node.items():
        content = (child,) if isinstance(child, str) else tuple(_lines(child))
        by_content[isinstance(child, str), content].append(name)
    for (is_leaf, content), names in by_content.items():
        tops = [line for line in content if not line.startswith(" ")]
        if is_leaf:
            yield from (f"{label} {content[0]}" for label in folded(names))
        elif len(tops) == 1:
            for label in folded(names):
                yield f"{label}/{content[0]}"
                yield from content[1:]
        else:
            for label in folded(names):
                yield label
                yield from (f"  {line}" for line in content)


def folded(names):
    """A text for each range of numbers among the names, and one for all others."""
    ranges = defaultdict(list)
    for name in names:
        before, number, after = re.fullmatch(r"(.*?)(\d*)(\D*)", name).groups()
        ranges[(before, after) if number else ("", name)].append(number)
    single = []
    for (before, after), numbers in ranges.items():
        if len(numbers) == 1:
            single.append(f"{before}{numbers[0]}{after}" if numbers[0] else after)
        else:
            yield f"{before}{{{_range(numbers)}}}{after}"
    if single:
        yield single[0] if len(single) == 1 else f"{{{','.join(single)}}}"


def _range(numbers):
    found = sorted(map(int, numbers))
    if found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))
