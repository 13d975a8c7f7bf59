"""Real trees under every reader of the library: right or loud, never silently wrong."""

import jax
import jax.numpy as jnp
import pytest

import gradsmooth_optax as gs

from . import judge, notation, real, table

TREES = {tree.name: tree for tree in notation.read_all()}


@pytest.fixture(scope="module")
def judged():
    return table.rows()


def silently_wrong(judged, kinds):
    return [
        f"{case.name}, {name}: {verdict.word}, {verdict.why}"
        for case, verdicts in judged
        for name, verdict in verdicts.items()
        if verdict.word in ("partly", "wrong") and table.kind(case, name) in kinds
    ]


@pytest.mark.slow
def test_no_reader_couples_the_wrong_layers_or_only_some_of_them_silently(judged):
    found = silently_wrong(judged, ("detect", "unrolled", "preset"))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_preset_or_pattern_of_another_tree_is_loud(judged):
    found = silently_wrong(judged, ("misuse",))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_presets_on_their_own_family_and_trees_with_one_reading_are_read(judged):
    missed = [
        f"{case.name}, {name}: {verdicts[name].word}, {verdicts[name].why}"
        for case, verdicts in judged
        for name in (*case.must, *case.presets)
        if verdicts[name].word != "right"
    ]
    assert not missed, "\n".join(missed)


@pytest.mark.slow
def test_the_table_of_families_is_what_is_committed(judged):
    """`python -m tests.families --write` writes it anew."""
    assert table.written(judged) == table.RESULTS.read_text()


def test_pairs_are_right_partly_or_wrong_as_the_truths_of_a_tree_say():
    case = judge.case(TREES["hf-wav2vec2"])
    (truth,), ((convolutions,),) = case.truths, case.optional
    some, false = frozenset(list(truth)[1:]), frozenset({(1, 2)})

    def word(pairs):
        return judge.verdict(case, pairs).word

    assert word(truth) == word(truth | convolutions) == "right"
    assert word(some) == word(frozenset()) == word(convolutions) == "partly"
    assert word(truth | false) == word(some | false) == word(false) == "wrong"


def test_without_layers_only_nothing_is_right():
    case = judge.case(TREES["flax-ppo"])
    assert judge.verdict(case, frozenset()).word == "right"
    assert judge.verdict(case, frozenset({(1, 2)})).word == "wrong"


def test_what_a_transformation_couples_is_seen_element_by_element():
    params = {
        "layers_0": jnp.array([1.0, 2.0]),
        "layers_1": jnp.array([3.0, 4.0]),
        "layers_2": jnp.array([5.0, 6.0]),
        "stacked": jnp.array([[7.0, 8.0, 9.0]]),
        "head": jnp.array([10.0, 11.0]),
    }
    depth = gs.first_match(
        gs.unrolled(r"layers_(\d)"), gs.scanned("stacked", axis=1, stack="other")
    )
    expected = {(1, 3), (3, 5), (2, 4), (4, 6), (7, 8), (8, 9)}
    assert judge.coupled(depth, params) == expected


def test_the_notation_says_which_leaves_there_are():
    text = """== small
source: this test
layers stack axis=1 : blocks/

blocks
  {k,q}/w 2x3 @embed,layers
  {0-1}/.value 4 @embed
"""
    (tree,) = notation.read_file(text)
    assert [(leaf.path, leaf.shape, leaf.names) for leaf in tree.leaves] == [
        ("blocks/k/w", (2, 3), ("embed", "layers")),
        ("blocks/q/w", (2, 3), ("embed", "layers")),
        ("blocks/0/.value", (4,), ("embed",)),
        ("blocks/1/.value", (4,), ("embed",)),
    ]


def leaves_of(tree):
    """{written path: shape} of a tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {notation.text(path): leaf.shape for path, leaf in flat}


PACKAGES = pytest.mark.filterwarnings("ignore")  # of those that build the models


@pytest.mark.slow
@pytest.mark.parametrize("name", real.BUILDERS)
@PACKAGES
def test_the_packages_build_the_trees_that_the_files_say(name):
    package, build = real.BUILDERS[name]
    pytest.importorskip(package)
    expected = {leaf.path: leaf.shape for leaf in TREES[name].leaves}
    assert leaves_of(build()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in real.BUILDERS if not n.startswith("hf-")])
@PACKAGES
def test_trees_in_the_classes_of_their_packages_are_read_as_the_written_ones(name):
    package, build = real.BUILDERS[name]
    pytest.importorskip(package)
    case = judge.case(TREES[name])
    real_case = case._replace(params=judge.in_place_of(case.params, build()))
    words = {n: v.word for n, v in judge.verdicts(case).items()}
    assert {n: v.word for n, v in judge.verdicts(real_case).items()} == words
