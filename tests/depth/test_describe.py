"""`describe` says everything about what a spec finds in a tree.

That it says what `init` says is asked of every tree in `test_readings.py`.
"""

import html
import re

import jax
import jax.numpy as jnp
import pytest

import gradsmooth_optax as gs


def x(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer(*lead, width=3):
    attn = {"kernel": x(*lead, width, width), "bias": x(*lead, width)}
    return {"attn": attn, "norm": {"scale": x(*lead, width)}}


def model():
    return {
        "embed": {"table": x(7, 3)},
        "encoder": {f"layers_{i}": layer() for i in range(4)},
        "decoder": {"blocks": layer(5)},
        "head": {"kernel": x(3, 7)},
    }


SPEC = gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"layers_(\d+)/"))


def listed(*numbers):
    return {f"layers_{i}": {"w": x(2)} for i in numbers}


def rows(depth, params):
    """The cells of the table that `describe` shows, below its header."""
    _, table, *_ = str(gs.describe(depth, params)).split("\n\n")
    return [re.split(r"  +", line) for line in table.splitlines()[1:]]


def untouched(depth, params):
    """The lines below "untouched"."""
    lines = str(gs.describe(depth, params)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("untouched"))
    return [line.strip() for line in lines[start + 1 :] if line.startswith("  ")]


# -- The table -------------------------------------------------------------------------


def test_it_shows_stacks_roles_layers_and_where_they_are():
    shown = str(gs.describe(SPEC, model()))
    assert shown.startswith(
        f"{SPEC!r}: 2 stacks, 6 groups; smoothed: 135 of 177 parameters (76.3%)\n"
    )
    found = {
        (stack, role): (layers, shape, where)
        for stack, role, layers, shape, _, where in rows(SPEC, model())
    }
    assert found == {
        ("decoder/blocks", "attn/bias"): ("0-4 (5)", "(3,)", "1 over axis 0"),
        ("decoder/blocks", "attn/kernel"): ("0-4 (5)", "(3, 3)", "1 over axis 0"),
        ("decoder/blocks", "norm/scale"): ("0-4 (5)", "(3,)", "1 over axis 0"),
        ("encoder/layers", "attn/bias"): ("0-3 (4)", "(3,)", "4 one per layer"),
        ("encoder/layers", "attn/kernel"): ("0-3 (4)", "(3, 3)", "4 one per layer"),
        ("encoder/layers", "norm/scale"): ("0-3 (4)", "(3,)", "4 one per layer"),
    }
    assert untouched(SPEC, model()) == [
        "embed/table (7, 3): 21 float32",
        "head/kernel (3, 7): 21 float32",
    ]


NOT_IN = "not in layers 1, 3, 6-7 of the stack"
CYCLE = {
    "layers": {f"layers_{i}": {"w": x(2, 3)} for i in range(2)},
    "layers_remainder": {"layers_0": {"w": x(2)}},
}
# depth, tree: stack, role, layers, where they are, and the note, of each row.
ROWS = {
    "a role of one layer, and a gap": (
        gs.unrolled(),
        listed(0, 1, 3, 6, 7) | {"layers_0": {"w": x(2), "only": x(3)}},
        [
            f"layers|only|0 (1)|1 one per layer|single, unchanged, {NOT_IN}",
            "layers|w|0-1, 3, 6-7 (5)|5 one per layer|gap at layers 2, 4-5",
        ],
    ),
    "a gap of one": (
        gs.unrolled(),
        listed(0, 2),
        ["layers|w|0, 2 (2)|2 one per layer|gap at layer 1"],
    ),
    "ranked": (
        gs.ranked(gs.unrolled()),
        listed(0, 2),
        ["layers|w|0, 2 (2)|2 one per layer|ranked"],
    ),
    "many ranges": (
        gs.unrolled(),
        listed(*range(0, 20, 2)),
        [
            "layers|w|0, 2, 4, 6, 8, 10, … and 4 more (10)|10 one per layer|"
            "gap at layers 1, 3, 5, 7, 9, 11, … and 3 more"
        ],
    ),
    "a layer twice": (
        lambda path, leaf: gs.Depth("my stack", "w", 0),
        {"a": x(2), "b": x(2)},
        ["my stack|w|0 (2)|2 one per layer|twice: 0"],
    ),
    "arrays at the root": (
        gs.unrolled(r"^(\d)$"),
        {"0": x(2), "1": x(2)},
        ["(root)|(leaf)|0-1 (2)|2 one per layer"],
    ),
    "several axes": (
        gs.scanned("layers/", axis=(0, 2)),
        {"layers": {"w": x(2, 3, 4)}},
        ["layers|w|0-7 (8)|1 over axes (0, 2)"],
    ),
    "a cycle and one more": (
        "maxtext(cycle=2, num_cycles=3)",
        {"decoder": CYCLE},
        ["decoder|w|0-6 (7)|1 one per layer and 2 over axis 1"],
    ),
    # Two roles are not as deep as others: a scan axis was forgotten.
    "a wrong axis": (
        gs.scanned("layers/"),
        {"layers": {"wi": x(4, 12, 8), "wo": x(8, 12, 4)}},
        [
            "layers|wi|0-3 (4)|1 over axis 0|not in layers 4-7 of the stack",
            "layers|wo|0-7 (8)|1 over axis 0",
        ],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_which_layers_are_where(name):
    depth, tree, expected = ROWS[name]
    found = [[*cells[:3], *cells[5:]] for cells in rows(depth, tree)]
    assert found == [line.split("|") for line in expected]


def test_a_preset_is_shown_with_what_it_stands_for():
    shown = str(gs.describe("maxtext(scan_axis=0)", model()))
    name, _, meaning = shown.partition(": ")[0].partition(" = ")
    assert name == "gs.layouts.maxtext(scan_axis=0)"
    assert meaning == repr(gs.scanned("decoder/layers/"))


def test_leaves_of_different_shapes_are_told_apart():
    tree = {f"layers_{i}": {"w": x(3 if i < 2 else 5)} for i in range(4)}
    assert [cells[2:4] for cells in rows(gs.unrolled(), tree)] == [
        ["0-1 (2)", "(3,)"],
        ["2-3 (2)", "(5,)"],
    ]


def test_shapes_and_arrays_say_the_same():
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model())
    assert str(gs.describe(SPEC, arrays)) == str(gs.describe(SPEC, model()))


# -- What is left alone ----------------------------------------------------------------


def test_untouched_leaves_come_with_their_sizes_the_largest_first():
    tree = model() | {
        "scalar": x(),
        "vocabulary": x(1000, 3),
        "step": x(4, dtype=jnp.int32),
    }
    shown = str(gs.describe(SPEC, tree))
    assert "untouched (5 leaves, 3,047 parameters):" in shown
    assert "135 of 3,178 parameters" in shown  # without the integers
    assert untouched(SPEC, tree) == [
        "vocabulary (1000, 3): 3,000 float32",
        "embed/table (7, 3): 21 float32",
        "head/kernel (3, 7): 21 float32",
        "step (4,): 4 int32",
        "scalar (): 1 float32",
    ]
    found = gs.describe(SPEC, tree)
    assert (found.smoothed, found.total) == (135, 3178)
    assert "untouched (1 leaf, 2 parameters):" in str(
        gs.describe(gs.unrolled(), listed(0, 1) | {"head": x(2)})
    )


def test_what_a_restriction_leaves_out_is_untouched():
    found = untouched(SPEC.only_projections(), model())
    assert "encoder/layers_2/norm/scale (3,): 3 float32" in found
    assert "decoder/blocks/norm/scale (5, 3): 15 float32" in found


def test_a_tree_that_is_one_array_is_named():
    assert untouched(gs.unrolled(), x(2))[0] == "(the tree itself) (2,): 2 float32"


def test_long_lists_are_cut_and_say_how_much_is_left():
    tree = {f"layers_{i}": {f"w{k:02d}": x(2) for k in range(53)} for i in (0, 1)}
    tree |= {f"extra_{k:02d}": x(k + 1) for k in range(54)}
    spec = gs.unrolled(r"layers_(\d+)/")
    assert [cells[-1] for cells in rows(spec, tree)[-2:]] == [
        "2 one per layer",
        "… and 3 more groups",
    ]
    assert len(rows(spec, tree)) == 51
    lines = untouched(spec, tree)
    assert lines[0] == "extra_53 (54,): 54 float32"
    assert lines[-1] == "… and 4 more"
    assert len(lines) == 51


# -- What is not right -----------------------------------------------------------------


def test_parts_of_a_spec_that_match_nothing_are_listed_at_any_depth():
    lost, tree = gs.scanned("nothing/"), listed(0, 1)
    both = gs.first_match(gs.unrolled(), lost)
    specs = (both, gs.ranked(both), both.only(lambda *_: True), gs.first_match(both))
    for spec in specs:
        summary = gs.describe(spec, tree)
        assert summary.unmatched == (lost,)
        title = "parts of the spec that matched nothing:\n  gs.scanned('nothing/')"
        assert title in str(summary)
    assert "matched nothing" not in str(gs.describe(gs.unrolled(), tree))
    assert "detect(params)" in str(gs.describe(lost, tree))
    assert "detect(" not in str(gs.describe(gs.unrolled(), tree))


def test_what_init_raises_is_said_here_already():
    unequal = {"blocks": {"w": x(3, 5), "v": x(4, 3)}}
    for depth, params in (
        (gs.unrolled(), listed(0, 1, 3)),
        (gs.scanned("blocks/"), unequal),
        (gs.scanned("nothing/"), listed(0, 1)),
    ):
        with pytest.raises(ValueError, match="To fix") as raised:
            gs.smooth_over_depth(depth).init(params)
        summary = gs.describe(depth, params)
        assert summary.problem == str(raised.value)
        assert f"an error where `strict`:\n  {summary.problem}" in str(summary)
        assert summary.doubts == ()
    assert gs.describe(gs.ranked(gs.unrolled()), listed(0, 1, 3)).problem == ""


# depth, tree: a part of what is doubted, and a depth that is not.
LISTED = {"blocks": {str(i): {"kernel": x(4, 2)} for i in range(3)}}
SCANNED = {"decoder": {f"layers_{p}": {"w": x(4, 3, 2)} for p in range(2)}}
DOUBTED = {
    "layers that are leaves of their own": (
        gs.scanned("blocks/"),
        LISTED,
        "leaves of their own",
        gs.unrolled(),
    ),
    "a cycle that is taken for one layer": (
        gs.scanned("decoder/", axis=1),
        SCANNED,
        "were they positions of a cycle, they would need a `stride`",
        gs.scanned(r"decoder/layers_(\d+)/", axis=1, stride=2),
    ),
}


@pytest.mark.parametrize("name", DOUBTED)
def test_what_is_probably_not_meant_is_shown_as_a_warning(name):
    wrong, tree, part, right = DOUBTED[name]
    summary = gs.describe(wrong, tree)
    (doubt,) = summary.doubts
    assert part in doubt
    assert f"a warning where `strict`:\n  {doubt}" in str(summary)
    assert gs.describe(right, tree).doubts == ()


@pytest.mark.parametrize(
    ("depth", "error"), [("layers_", ValueError), (None, TypeError)]
)
def test_something_that_is_no_depth_spec_is_refused(depth, error):
    with pytest.raises(error, match=r"\bdepth\b"):
        gs.describe(depth, model())


# -- Notebooks -------------------------------------------------------------------------


def test_notebooks_get_what_the_text_says_with_names_escaped():
    tree = model() | {f"extra_{k}": x(k + 1) for k in range(60)}
    tree |= {f"a<b>/layers_{i}": {"<script>": x(2, 2)} for i in (0, 2)}
    summary = gs.describe(gs.first_match(SPEC, gs.scanned("no_such_blocks/")), tree)
    page = summary._repr_html_()
    assert "<script>" not in page
    assert "a<b>" not in page
    assert page.count("<tr>") == page.count("</tr>") == 8
    assert page.count("<th ") == 7
    texts = re.sub(r"<[^>]*>", "\n", page)
    words = [word.strip(":") for word in html.unescape(texts).split()]
    assert sorted(words) == sorted(word.strip(":") for word in str(summary).split())
