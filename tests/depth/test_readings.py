"""Real trees under every reader: right or loud, never silently wrong.

The trees are in `trees/`, as text; `notation.py` says how to read them.
"""

import functools
import warnings

import built_models
import jax
import judge
import notation
import numpy as np
import pytest

import gradsmooth_optax as gs

FILES = sorted(file.stem for file in notation.FILES.glob("*.txt"))
LONG = {"hugging_face", "maxtext"}


@functools.cache
def params_of(name):
    return notation.built(notation.all_trees()[name])


@functools.cache
def described(spec, name):
    """`describe` for a tree, once for all readers that mean the same."""
    return gs.describe(spec, params_of(name))


def misread(tree, params, shown):
    """What readers make of a tree, where it is not what the text says."""
    for reader, expected in tree.words.items():
        word, why = judge.judged(tree, reader, params, shown)
        if word != expected:
            yield f"{tree.name}, {reader}: {word} instead of {expected}. {why}"


# -- Every tree, every reader ----------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[pytest.mark.slow] if f in LONG else []) for f in FILES],
)
def test_every_reader_is_right_or_loud_as_the_tree_says(file):
    found = [
        line
        for name, tree in notation.trees_of(file).items()
        for line in misread(tree, params_of(name), lambda s, _, n=name: described(s, n))
    ]
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_init_says_what_describe_says(file):
    for name in notation.trees_of(file):
        summary = described(gs.unrolled(), name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                gs.smooth_over_depth(gs.unrolled(), 0.2).init(params_of(name))
                said = [str(warning.message) for warning in caught]
            except ValueError as error:
                said = [str(error)]
        expected = [summary.problem] * bool(summary.problem) + list(summary.doubts)
        assert said == expected, name


def test_names_are_unique_and_every_reader_is_asked():
    in_files = [name for file in FILES for name in notation.trees_of(file)]
    assert len(set(in_files)) == len(in_files)
    for tree in notation.all_trees().values():
        assert {"detect", "unrolled"} <= tree.words.keys(), tree.name


@pytest.mark.slow
def test_init_and_update_may_differ_in_their_boxes():
    compared = 0
    for name, tree in notation.all_trees().items():
        leaves = [x._replace(path=notation.unboxed(x.path)) for x in tree.leaves]
        if leaves == tree.leaves:
            continue
        bare = notation.built(tree._replace(leaves=leaves))
        for reader, word in tree.words.items():
            if word == "right":
                spec = judge.spec_of(reader, params_of(name))
                shown = str(gs.describe(spec, params_of(name)))
                assert str(gs.describe(spec, bare)) == shown, (name, reader)
                compared += 1
    assert compared > 40


# -- The judge -------------------------------------------------------------------------


def test_pairs_are_right_partly_or_wrong_as_the_truths_of_a_tree_say():
    tree = notation.all_trees()["hf-wav2vec2"]
    chains = notation.neighbors(tree, tree.truths[0])
    truth, convolutions = chains["encoder"], chains["convolutions"]
    some = set(list(truth)[1:])
    false = {frozenset({("lm_head/bias", ()), ("lm_head/kernel", ())})}

    def word(pairs):
        return judge.verdict(tree, pairs).word

    assert word(truth) == word(truth | convolutions) == "right"
    assert word(some) == word(set()) == word(convolutions) == "partly"
    assert word(truth | false) == word(some | false) == word(false) == "wrong"
    half = set(list(convolutions)[1:])
    assert word(truth | half) == "partly"


def test_without_layers_only_nothing_is_right():
    tree = notation.all_trees()["flax-ppo"]
    assert judge.verdict(tree, set()).word == "right"
    assert judge.verdict(tree, {frozenset({("a", ()), ("b", ())})}).word == "wrong"


def test_the_notation_says_which_leaves_and_neighbors_there_are():
    text = r"""== small
right: detect; gs.scanned("blocks/", axis=1)
layers stack axis=1 : blocks/(?=[kq])
layers list start=4 step=2 ranked : blocks/(\d)

blocks
  {k,q}/w 2x3 @embed,layers
  {0-1}/.value 4 @embed
  2/.value None
"""
    (tree,) = notation.read(text)
    assert [leaf[:3] for leaf in tree.leaves] == [
        ("blocks/k/w", (2, 3), ("embed", "layers")),
        ("blocks/q/w", (2, 3), ("embed", "layers")),
        ("blocks/0/.value", (4,), ("embed",)),
        ("blocks/1/.value", (4,), ("embed",)),
        ("blocks/2/.value", None, ()),
    ]
    assert tree.words == {"detect": "right", 'gs.scanned("blocks/", axis=1)': "right"}
    slices = [("blocks/k/w", frozenset({(1, i)})) for i in range(3)]
    pairs = notation.neighbors(tree, tree.truths[0])
    # `k` and `q` are two roles: the rest of the path after the match tells them apart.
    assert frozenset(slices[:2]) in pairs["stack"]
    assert frozenset({slices[0], slices[2]}) not in pairs["stack"]
    lists = [("blocks/0", frozenset()), ("blocks/1", frozenset())]
    assert pairs["list"] == {frozenset(lists)}


# -- What is described is what is done -------------------------------------------------


class Next(gs.Operator):
    """Every layer gets the update of the next one, and the last of a run zeros."""

    def couple(self, layers):
        return layers.shifted(1, missing="zero")


# One of each way to lay out layers.
APPLIED = {
    "maxtext-scanned-axis-1-boxed": "maxtext()",
    "maxtext-gemma3-cycles-and-remainder": "maxtext(cycle=6, num_cycles=4)",
    "maxtext-gemma4-nested-scans-axis-1": "maxtext_gemma4(scan_axis=1)",
    "maxtext-gemma2-unrolled-pairs": "maxtext_gemma2(scan_axis=None)",
    "maxtext-qwen3-next-cycle-of-4": "ranked(maxtext(cycle=4))",
    "maxtext-deepseek-scanned": "maxtext_deepseek(2)",
    "maxtext-pipeline-repeats-stages-and-layers": "maxtext_pipeline((0, 1, 3))",
    "maxtext-pipeline-unrolled-layers-per-stage": (
        "maxtext_pipeline((0, 1), layers_per_stage=2, num_stages=3)"
    ),
    "nnx-list": "flax_nnx()",
    "levanter-stacked": "levanter()",
    "big-vision-cappa-scan-axes-0-and-1": "big_vision()",
    "hf-t5-block-and-layer": "hf_flax()",
    "haiku-made-in-call": "haiku()",
    "uvit-joined": "uvit(join_at=3)",
    "flatten-dict-tuples": "detect",
}


@pytest.mark.parametrize("name", APPLIED)
def test_layers_get_what_their_true_neighbors_had_and_nothing_else_is_touched(name):
    tree = notation.all_trees()[name]
    numbers, first = {}, 1
    for leaf in tree.leaves:
        last = first + int(np.prod(leaf.shape))
        numbers[leaf.path] = np.arange(first, last, dtype="f4").reshape(leaf.shape)
        first = last
    updates = notation.built(tree, numbers)
    smooth = gs.smooth_over_depth(judge.spec_of(APPLIED[name], updates), Next())
    found = jax.jit(lambda x: smooth.update(x, smooth.init(x))[0])(updates)
    numbers = {notation.unboxed(path): x for path, x in numbers.items()}
    pairs = set().union(*notation.neighbors(tree, tree.truths[0]).values())
    coupled, untouched = set(), set()
    for path, update in jax.tree_util.tree_leaves_with_path(found):
        path = notation.unboxed(notation.written(path))
        own, got = numbers[path].ravel().tolist(), np.ravel(update).tolist()
        untouched |= {path} if own == got else set()
        there = zip(own, got, strict=True)
        coupled |= {frozenset(pair) for pair in there if len({*pair, 0}) == 3}
    assert coupled == {
        frozenset(elements)
        for pair in pairs
        for elements in zip(*(elements_of(numbers, *one) for one in pair), strict=True)
    }
    assert untouched == numbers.keys() - {path for pair in pairs for path, _ in pair}


def elements_of(numbers, path, place):
    found = dict(place)
    index = [found.get(axis, slice(None)) for axis in range(numbers[path].ndim)]
    return numbers[path][tuple(index)].ravel().tolist()


# -- Trees in the classes of their packages --------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of packages that build the models
@pytest.mark.parametrize("name", built_models.MODELS)
def test_what_a_package_builds_is_what_the_text_says_and_is_read_alike(name):
    package, build, *arguments = built_models.MODELS[name]
    pytest.importorskip(package)
    tree, params = notation.trees_of("built_here")[name], build(*arguments)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    assert {notation.unboxed(notation.written(path)): x.shape for path, x in flat} == {
        notation.unboxed(leaf.path): leaf.shape for leaf in tree.leaves
    }
    found = [*misread(tree, params, gs.describe)]
    assert not found, "\n\n".join(found)


def test_every_tree_that_is_built_here_is_built():
    assert built_models.MODELS.keys() == notation.trees_of("built_here").keys()
