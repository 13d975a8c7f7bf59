"""Real trees under every reader of the library: right or loud, never silently wrong."""

import jax
import pytest

from . import judge, notation, real, table

TREES = {tree.name: tree for tree in notation.read_all()}


@pytest.fixture(scope="module")
def judged():
    return table.rows()


@pytest.mark.slow
def test_no_reader_couples_the_wrong_layers_or_only_some_of_them_silently(judged):
    silent = [
        f"{case.name}, {name}: {verdict.word}, {verdict.why}"
        for case, verdicts in judged
        for name, verdict in verdicts.items()
        if verdict.word in ("partly", "wrong")
    ]
    assert not silent, "\n".join(silent)


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


def test_a_spec_that_couples_something_else_is_called_wrong_or_partly():
    case = judge.case(TREES["hf-bert-mlm"])

    def word(call):
        return judge.judge(case, judge.called(call)).word

    assert word('gs.unrolled(r"encoder/layer/(\\d+)/")') == "right"
    assert word('gs.unrolled(r"layer/(\\d+)/attention/")') in ("partly", "loud")
    assert word('gs.scanned("encoder/layer/1/", axis=0)') in ("wrong", "loud")
    assert word('gs.scanned("word_embeddings/")') in ("wrong", "loud")
    assert word('gs.unrolled(r"nothing_(\\d+)/")') == "loud"


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


@pytest.mark.slow
@pytest.mark.parametrize("name", real.BUILDERS)
@pytest.mark.filterwarnings("ignore")  # those of the packages that build the models
def test_the_packages_build_the_trees_that_the_files_say(name):
    package, build = real.BUILDERS[name]
    pytest.importorskip(package)
    expected = {leaf.path: leaf.shape for leaf in TREES[name].leaves}
    assert leaves_of(build()) == expected
