"""`describe` says everything about what a spec finds in a tree."""

import re

import jax
import jax.numpy as jnp
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
    html = summary._repr_html_()
    assert isinstance(html, str)
    assert "<" in html
    for part in ("encoder/layers", "decoder/blocks", "attn/kernel", "embed/table"):
        assert part in html


def test_notebooks_get_escaped_names():
    tree = {f"layers_{i}": {"<script>": jnp.ones(2)} for i in range(2)}
    tree["<b>head"] = jnp.ones(3)
    html = gs.describe(gs.unrolled(), tree)._repr_html_()
    assert "<script>" not in html
    assert "<b>head" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("depth", ["layers_", None])
def test_something_that_is_no_depth_spec_is_refused(depth):
    with pytest.raises(TypeError, match=r"\bdepth\b"):
        gs.describe(depth, model())


def test_it_shows_parts_that_match_nothing_at_any_depth_of_a_composed_spec():
    lost = gs.scanned("nothing/")
    tree = {"layers_0": {"w": jnp.ones(2)}, "layers_1": {"w": jnp.ones(2)}}
    both = gs.first_match(gs.unrolled(), lost)
    specs = (both, gs.ranked(both), both.only(lambda *_: True), gs.first_match(both))
    for spec in specs:
        assert gs.describe(spec, tree).unmatched == (lost,)
        assert "nothing/" in str(gs.describe(spec, tree))


def test_it_shows_entries_of_a_tree_of_depths_that_the_parameters_lack():
    spec = gs.from_tree({"layer_0": gs.Depth("s", "r"), "layers_1": gs.Depth("s", "r")})
    summary = gs.describe(spec, {"layers_1": jnp.ones(2)})
    assert "layer_0" in str(summary)


def test_it_points_at_a_forgotten_scan_axis_by_the_layers_that_roles_lack():
    layers = {"wi": jnp.ones((4, 12, 8)), "wo": jnp.ones((8, 12, 4))}
    wrong = gs.describe(gs.scanned("layers/"), {"layers": layers})
    assert "not in layers 4-7" in str(wrong)
    right = gs.describe(gs.scanned("layers/", axis=1), {"layers": layers})
    assert "not in" not in str(right)


def test_it_points_at_layers_that_are_taken_for_stacked_leaves():
    unrolled = {"blocks": {str(i): {"kernel": jnp.ones((4, 2))} for i in range(3)}}
    assert "one leaf per layer?" in str(gs.describe(gs.scanned("blocks/"), unrolled))
    assert "?" not in str(gs.describe(gs.unrolled(), unrolled))
