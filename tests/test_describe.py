"""`describe` says everything about what a spec finds in a tree."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradsmooth_optax as gs


def layer(width=3):
    return {
        "attn": {"kernel": jnp.ones((width, width)), "bias": jnp.ones((width,))},
        "norm": {"scale": jnp.ones((width,))},
    }


def model():
    return {
        "embed": {"table": jnp.ones((7, 3))},
        "encoder": {f"layers_{i}": layer() for i in range(4)},
        "decoder": {"blocks": jax.tree.map(lambda x: jnp.stack([x] * 5), layer())},
        "head": {"kernel": jnp.ones((3, 7))},
    }


SPEC = gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"layers_(\d+)/"))


def text(depth, params):
    return str(gs.describe(depth, params))


def test_it_shows_the_stacks_their_roles_and_how_many_layers_each_has():
    shown = text(SPEC, model())
    assert "encoder/layers" in shown
    assert "decoder/blocks" in shown
    for role in ("attn/kernel", "attn/bias", "norm/scale"):
        assert len(re.findall(re.escape(role), shown)) >= 2
    assert re.search(r"\b4\b|0\D{1,3}3", shown)
    assert re.search(r"\b5\b|0\D{1,3}4", shown)


def test_it_shows_every_leaf_left_untouched():
    tree = model()
    tree["extra"] = {f"thing_{name}": jnp.ones((2,)) for name in "abcdefghijklmnopqrst"}
    shown = text(SPEC, tree)
    for path in ("embed/table", "head/kernel"):
        assert path in shown
    for name in tree["extra"]:
        assert f"extra/{name}" in shown
    shown = text(SPEC.only_projections(), tree)
    assert "encoder/layers_2/norm/scale" in shown
    assert "decoder/blocks/norm/scale" in shown


def test_it_shows_a_single_layer_as_untouched():
    tree = {"layers_0": {"w": jnp.ones(2), "only_first": jnp.ones(3)}}
    tree["layers_1"] = {"w": jnp.ones(2)}
    shown = text(gs.unrolled(), tree)
    assert "layers_0/only_first" in shown or "only_first" in shown
    assert re.search(r"\b1 layer\b|single|alone|untouched", shown)


def test_it_shows_the_gaps_without_raising():
    tree = {f"layers_{i}": layer() for i in (0, 1, 4, 5)}
    shown = text(gs.unrolled(), tree)
    assert re.search(r"gap|missing", shown, re.IGNORECASE)
    assert re.search(r"2\D{1,5}3", shown)


def test_it_shows_members_that_matched_nothing():
    spec = gs.first_match(gs.scanned("no_such_blocks/"), gs.unrolled())
    shown = text(spec, {f"layers_{i}": layer() for i in range(2)})
    assert "no_such_blocks/" in shown
    assert "no_such_blocks/" not in text(
        gs.unrolled(), {f"layers_{i}": layer() for i in range(2)}
    )


def test_it_shows_a_spec_that_matches_nothing_at_all_without_raising():
    shown = text(gs.scanned("no_such_blocks/"), model())
    assert "no_such_blocks/" in shown
    assert "embed/table" in shown
    assert "encoder/layers_3/attn/kernel" in shown


def test_shapes_alone_are_enough_and_say_the_same():
    shapes = jax.eval_shape(model)
    assert text(SPEC, shapes) == text(SPEC, model())


def test_a_function_can_be_described():
    def depth(path, leaf):
        if path[0] != "encoder":
            return None
        return gs.Depth("my stack", "/".join(path[2:]), int(path[1][-1]))

    shown = text(depth, model())
    assert "my stack" in shown
    assert "attn/kernel" in shown
    assert "decoder/blocks/attn/kernel" in shown


def test_leaves_of_different_shapes_are_told_apart():
    tree = {f"layers_{i}": layer(3 if i < 2 else 5) for i in range(4)}
    shown = text(gs.unrolled(), tree)
    assert re.search(r"3(, ?|×|x)3", shown)
    assert re.search(r"5(, ?|×|x)5", shown)


def test_notebooks_get_html():
    summary = gs.describe(SPEC, model())
    page = summary._repr_html_()
    assert isinstance(page, str)
    assert "<" in page
    for part in ("encoder/layers", "decoder/blocks", "attn/kernel", "embed/table"):
        assert part in page


def test_notebooks_get_escaped_names():
    tree = {f"layers_{i}": {"<script>": jnp.ones(2)} for i in range(2)}
    tree["<b>head"] = jnp.ones(3)
    page = gs.describe(gs.unrolled(), tree)._repr_html_()
    assert "<script>" not in page
    assert "<b>head" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("depth", "error"), [("layers_", ValueError), (None, TypeError)]
)
def test_something_that_is_no_depth_spec_is_refused(depth, error):
    with pytest.raises(error, match=r"\bdepth\b"):
        gs.describe(depth, model())


def test_it_shows_parts_that_match_nothing_at_any_depth_of_a_composed_spec():
    lost = gs.scanned("nothing/")
    tree = {"layers_0": {"w": jnp.ones(2)}, "layers_1": {"w": jnp.ones(2)}}
    both = gs.first_match(gs.unrolled(), lost)
    specs = (both, gs.ranked(both), both.only(lambda *_: True), gs.first_match(both))
    for spec in specs:
        assert gs.describe(spec, tree).unmatched == (lost,)
        assert "nothing/" in str(gs.describe(spec, tree))


def test_it_points_at_a_forgotten_scan_axis_by_the_layers_that_roles_lack():
    layers = {"wi": jnp.ones((4, 12, 8)), "wo": jnp.ones((8, 12, 4))}
    wrong = gs.describe(gs.scanned("layers/"), {"layers": layers})
    assert "not in layers 4-7" in str(wrong)
    right = gs.describe(gs.scanned("layers/", axis=1), {"layers": layers})
    assert "not in" not in str(right)


def test_it_points_at_layers_that_are_taken_for_stacked_leaves():
    unrolled = {"blocks": {str(i): {"kernel": jnp.ones((4, 2))} for i in range(3)}}
    (doubt,) = gs.describe(gs.scanned("blocks/"), unrolled).doubts
    assert "leaves of their own" in doubt
    assert gs.describe(gs.unrolled(), unrolled).doubts == ()


# Sizes, and how much is shown.


def untouched_lines(shown):
    """The lines below "untouched"."""
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("untouched"))
    return [line.strip() for line in lines[start + 1 :] if line.startswith("  ")]


def test_untouched_leaves_come_with_their_sizes_the_largest_first():
    tree = model()
    tree["scalar"] = jnp.ones(())
    tree["vocabulary"] = jnp.ones((1000, 3))
    tree["step"] = jnp.arange(4)
    shown = text(SPEC, tree)
    assert "untouched (5 leaves, 3,047 parameters):" in shown
    assert untouched_lines(shown) == [
        "vocabulary (1000, 3): 3,000 float32",
        "embed/table (7, 3): 21 float32",
        "head/kernel (3, 7): 21 float32",
        "step (4,): 4 int32",
        "scalar (): 1 float32",
    ]


def test_the_share_that_is_smoothed_adds_up_with_the_sizes():
    tree = {"embed": jnp.ones((1000, 3)), **{f"h_{i}": jnp.ones(250) for i in range(4)}}
    summary = gs.describe(gs.unrolled(), tree)
    assert (summary.smoothed, summary.total) == (1000, 4000)
    assert "smoothed: 1,000 of 4,000 parameters (25.0%)" in str(summary)
    assert "untouched (1 leaf, 3,000 parameters)" in str(summary)


def test_long_lists_are_cut_and_say_how_much_is_left():
    tree = {
        f"layers_{i}": {f"w{k:02d}": jnp.ones(2) for k in range(53)} for i in (0, 1)
    }
    tree |= {f"extra_{k:02d}": np.ones(k + 1, "f4") for k in range(54)}
    shown = text(gs.unrolled(r"layers_(\d+)/"), tree)
    assert "… and 3 more groups" in shown
    assert "w49" in shown
    assert "w50" not in shown
    lines = untouched_lines(shown)
    assert lines[0] == "extra_53 (54,): 54 float32"
    assert len(lines) == 51
    assert lines[-1] == "… and 4 more"


def test_ranges_of_layers_are_cut_too():
    tree = {f"layers_{i}": jnp.ones(2) for i in range(0, 20, 2)}
    assert "0, 2, 4, 6, 8, 10, … and 4 more (10)" in text(gs.unrolled(), tree)


def test_it_points_at_a_cycle_that_is_taken_for_one_layer():
    cycle = {f"layers_{p}": {"w": jnp.ones((4, 3, 2))} for p in range(2)}
    (doubt,) = gs.describe(gs.scanned("decoder/", axis=1), {"decoder": cycle}).doubts
    assert "were they positions of a cycle, they would need a `stride`" in doubt
    right = gs.scanned(r"decoder/layers_(\d+)/", axis=1, stride=2)
    assert gs.describe(right, {"decoder": cycle}).doubts == ()


def test_where_nothing_is_found_it_names_detect():
    assert "detect(params)" in text(gs.scanned("no_such_blocks/"), model())
    assert "detect(" not in text(SPEC, model())


def test_notebooks_get_what_the_text_says():
    tree = model() | {f"extra_{k}": np.ones(k + 1, "f4") for k in range(60)}
    tree |= {f"a<b>/layers_{i}": {"w": jnp.ones((2, 2))} for i in (0, 2)}
    spec = gs.first_match(SPEC, gs.scanned("no_such_blocks/"))
    summary = gs.describe(spec, tree)
    page = re.sub(r"<[^>]*>", "\n", summary._repr_html_())
    words = [word.strip(":") for word in html.unescape(page).split()]
    assert sorted(words) == sorted(word.strip(":") for word in str(summary).split())


def test_swapped_arguments_are_told_to_be_swapped():
    for function in (gs.describe, gs.detect):
        arguments = [model(), SPEC] if function is gs.describe else [SPEC]
        with pytest.raises(TypeError, match=r"`params`.*`describe\(\w+, params\)`"):
            function(*arguments)


def test_what_init_raises_is_said_here_already():
    gap = {f"layers_{i}": {"w": jnp.ones(2)} for i in (0, 1, 3)}
    unequal = {"blocks": {"w": jnp.ones((3, 5)), "v": jnp.ones((4, 3))}}
    for depth, params in (
        (gs.unrolled(), gap),
        (gs.scanned("blocks/"), unequal),
        (gs.scanned("nothing/"), gap),
    ):
        with pytest.raises(ValueError, match="To fix") as raised:
            gs.smooth_over_depth(depth).init(params)
        summary = gs.describe(depth, params)
        assert summary.problem == str(raised.value)
        assert summary.problem in str(summary) or not summary.groups
    assert gs.describe(gs.ranked(gs.unrolled()), gap).problem == ""
