"""Every error says what was wrong, what was found, and what to write instead."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

X = jnp.ones((2, 3))


def assert_says(info, *patterns):
    """All of the patterns, in any order and any case, with line breaks as spaces."""
    message = " ".join(str(info.value).split())
    for pattern in patterns:
        assert re.search(pattern, message, re.IGNORECASE), (
            f"{pattern!r} is not in: {message}"
        )


def shown(pattern):
    """`pattern` as it is or as its repr."""
    return f"{re.escape(pattern)}|{re.escape(repr(pattern))}"


def layers(numbers, prefix="decoder", **special):
    """decoder/layers_<i>/mlp/kernel for the numbers; `special` replaces leaves."""
    return {
        prefix: {
            f"layers_{i}": {"mlp": {"kernel": special.get(f"layer_{i}", X)}}
            for i in numbers
        },
        "embed": {"embedding": jnp.ones((4, 3))},
    }


def check_init_and_update(error, depth, tree, *patterns, **kwargs):
    """The structure is checked in `init` and again in `update`, jitted or not."""
    tx = gs.smooth_over_depth(depth, 0.3, **kwargs)
    with pytest.raises(error) as info:
        tx.init(tree)
    assert_says(info, *patterns)
    with pytest.raises(error) as info:
        tx.update(tree, optax.EmptyState())
    assert_says(info, *patterns)
    with pytest.raises(error) as info:
        jax.jit(tx.update)(tree, optax.EmptyState())
    assert_says(info, *patterns)
    with pytest.raises(error) as info:
        tx.init(jax.eval_shape(lambda: tree))
    assert_says(info, *patterns)


# Structure: ValueError.


@pytest.mark.parametrize(
    "depth",
    [
        gs.scanned("blocks/"),
        gs.unrolled(r"block(\d+)/"),
        gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"h_(\d+)/")),
        gs.unrolled().only(lambda path, leaf: False),
        lambda path, leaf: None,
    ],
    ids=["scanned", "unrolled", "first_match", "only", "function"],
)
def test_nothing_matched_shows_the_paths_that_exist(depth):
    check_init_and_update(
        ValueError,
        depth,
        layers(range(3)),
        r"\bdepth\b",
        r"decoder/layers_0/mlp/kernel",
        r"embed/embedding",
        r"strict=False|gs\.|unrolled\(|scanned\(|describe\(",
    )


def test_nothing_matched_shows_the_pattern_that_was_tried():
    with pytest.raises(ValueError, match="blocks/") as info:
        gs.smooth_over_depth(gs.scanned("blocks/")).init(layers(range(2)))
    assert_says(info, "scanned")


def test_nothing_matched_is_no_error_when_not_strict():
    tree = layers(range(3))
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.3, strict=False)
    out, _ = tx.update(tree, tx.init(tree))
    leaves = zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True)
    assert all(a is b for a, b in leaves)


def test_a_hole_names_the_missing_layer_and_both_ways_out():
    check_init_and_update(
        ValueError,
        gs.unrolled(),
        layers([0, 1, 3]),
        r"\bdepth\b",
        r"decoder/layers",
        r"mlp/kernel",
        r"layers? 2\b",
        r"missing",
        r"strict=False",
        r"ranked\(",
        r"mask|frozen",
    )


def test_a_hole_left_by_a_mask_is_an_error_that_speaks_of_masks():
    tree = layers(range(4))
    tree["decoder"]["layers_2"]["mlp"]["kernel"] = optax.MaskedNode()
    check_init_and_update(
        ValueError, gs.unrolled(), tree, r"layers? 2\b", r"mask", r"strict=False"
    )


def test_a_layer_of_another_shape_is_named_with_its_shape():
    check_init_and_update(
        ValueError,
        gs.unrolled(),
        layers(range(4), layer_2=jnp.ones((2, 7))),
        r"layers? 2\b",
        r"decoder/layers_2/mlp/kernel",
        r"\(?2, ?7\)?",
        r"shape",
        r"strict=False",
    )


def test_a_layer_of_another_dtype_is_named_with_its_dtype():
    check_init_and_update(
        ValueError,
        gs.unrolled(),
        layers(range(4), layer_1=X.astype(jnp.bfloat16)),
        r"layers? 1\b",
        r"decoder/layers_1/mlp/kernel",
        r"bfloat16|bf16",
        r"dtype",
        r"strict=False",
    )


def test_a_gap_in_one_role_alone_is_an_error():
    tree = layers(range(3))
    for layer in (0, 2):
        tree["decoder"][f"layers_{layer}"]["mlp"]["bias"] = jnp.ones((3,))
    check_init_and_update(
        ValueError, gs.unrolled(), tree, r"mlp/bias", r"layers? 1\b", r"ranked\("
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrap", [lambda spec: spec, gs.ranked], ids=["", "ranked"])
def test_a_duplicate_names_both_leaves_and_stays_an_error_when_not_strict(strict, wrap):
    tree = {
        "first": {f"layers_{i}": {"w": X} for i in range(3)},
        "second": {f"layers_{i}": {"w": X} for i in range(2, 4)},
    }
    check_init_and_update(
        ValueError,
        wrap(gs.unrolled(stack="all")),
        tree,
        r"\bdepth\b",
        r"layers? 2\b",
        r"first/layers_2/w",
        r"second/layers_2/w",
        r"stack|start",
        strict=strict,
    )


@pytest.mark.parametrize("strict", [True, False])
def test_a_leaf_that_holds_one_layer_twice_is_a_duplicate(strict):
    def depth(path, leaf):
        return gs.Depth("s", "w", axis=(0, 1), stride=(1, 1))

    tree = {"blocks": {"w": jnp.ones((2, 3, 4))}}
    check_init_and_update(
        ValueError, depth, tree, r"blocks/w", r"layers? 1\b", r"stride", strict=strict
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("axis", [2, 5, -3, (0, 2)])
def test_an_axis_out_of_range_names_the_leaf_and_its_shape(axis, strict):
    check_init_and_update(
        ValueError,
        gs.scanned("blocks/", axis=axis),
        {"blocks": {"mlp": {"kernel": jnp.ones((4, 3))}}},
        r"\baxis\b",
        r"blocks/mlp/kernel",
        r"\(?4, ?3\)?",
        rf"{re.escape(str(axis))}|{2 if isinstance(axis, tuple) else axis}",
        strict=strict,
    )


@pytest.mark.parametrize(
    "depth", [gs.unrolled(), gs.scanned("blocks/")], ids=["unrolled", "scanned"]
)
def test_a_tree_hidden_by_flatten_is_an_error(depth):
    tx = optax.flatten(gs.smooth_over_depth(depth, 0.3))
    with pytest.raises(ValueError, match=r"flatten") as info:
        tx.init(layers(range(3)))
    assert_says(info, r"\bdepth\b", r"array")
    tx = gs.smooth_over_depth(depth, 0.3)
    with pytest.raises(ValueError, match=r"flatten"):
        tx.update(jnp.ones((18,)), optax.EmptyState())


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (gs.unrolled(r"(layers)_(\d+)/"), "decoder/layers_0/mlp/kernel"),
        (gs.unrolled(r"layers_(?P<layer>\w+)/"), "decoder/layers_x/mlp/kernel"),
        (gs.scanned(r"(layers)_\d+/"), "decoder/layers_0/mlp/kernel"),
    ],
    ids=["first group", "named group", "scanned"],
)
def test_a_layer_group_that_is_no_number_suggests_a_group_without_capture(spec, path):
    tree = layers(["x"] if "_x" in path else range(2))
    check_init_and_update(
        ValueError,
        spec,
        tree,
        re.escape(path),
        r"'(layers|x)'|\"(layers|x)\"|`(layers|x)`",
        r"\(\?:",
        r"number",
    )


# The kinds of things: TypeError.


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("layers", "str|'layers'"),
        (3, "int|3"),
        (("layers", "w", 3), "tuple|layers"),
        (True, "bool|True"),
    ],
)
def test_a_function_that_returns_no_depth_names_the_leaf_and_what_it_returned(
    found, shown
):
    check_init_and_update(
        TypeError,
        lambda path, leaf: found,
        layers(range(2)),
        r"Depth\(|gs\.Depth",
        r"None",
        r"decoder/layers_0/mlp/kernel",
        shown,
    )


@pytest.mark.parametrize(
    ("depth", "error", "found"),
    [
        ("layers_", ValueError, "'layers_'"),
        (r"layers_(\d+)", ValueError, r"layers_\(\\d\+\)"),
        (None, TypeError, "NoneType"),
        (3, TypeError, "int"),
        ({"a": 1}, TypeError, "dict"),
        (optax.identity(), TypeError, "GradientTransformation"),
    ],
    ids=["name", "pattern", "None", "int", "dict", "transformation"],
)
def test_something_that_is_no_depth_spec_is_refused_at_construction(
    depth, error, found
):
    smoothing = gs.smooth_over_depth(gs.unrolled())
    for make in (
        lambda: gs.smooth_over_depth(depth),
        lambda: gs.smooth_over_depth(depth, gs.window(0.1)),
        lambda: gs.muon(1e-3, depth, smoothing),
        lambda: gs.first_match(depth),
        lambda: gs.ranked(depth),
    ):
        with pytest.raises(error) as info:
            make()
        assert_says(info, r"unrolled\(|scanned\(", found)


@pytest.mark.parametrize("smoothing", [gs.unrolled(), gs.window(0.1), 0.1, None])
def test_something_that_is_no_smoothing_is_refused_at_construction(smoothing):
    for make in (
        lambda: gs.with_depth_smoothing(optax.scale_by_adam(), smoothing),
        lambda: gs.adamw(1e-3, smoothing),
        lambda: gs.muon(1e-3, gs.unrolled(), smoothing),
    ):
        with pytest.raises(TypeError) as info:
            make()
        found = re.escape(type(smoothing).__name__)
        assert_says(info, r"`smoothing`", r"smooth_over_depth\(depth", found)


def test_forgetting_to_wrap_a_depth_is_told_apart():
    with pytest.raises(TypeError) as info:
        gs.smooth_over_depth(gs.Depth("s", "w"))
    assert_says(info, "depth", "Depth", "function|unrolled|depth_fn")


@pytest.mark.parametrize(
    "operator",
    ["window", "0.1", None, [0.1], np.eye(3), True, gs.unrolled(), optax.identity()],
    ids=lambda operator: type(operator).__name__,
)
def test_something_that_is_no_operator_is_refused_at_construction(operator):
    with pytest.raises(TypeError) as info:
        gs.smooth_over_depth(gs.unrolled(), operator)
    assert_says(info, r"\boperator\b", r"window\(|dense\(", type(operator).__name__)


@pytest.mark.parametrize("alpha", ["0.1", None, [0.1]])
def test_an_alpha_of_the_wrong_kind_is_refused_at_construction(alpha):
    with pytest.raises(TypeError) as info:
        gs.window(alpha)
    assert_says(info, r"\balpha\b", type(alpha).__name__)


# Values: ValueError at construction.

MAKERS = {
    "smooth_over_depth": lambda alpha: gs.smooth_over_depth(gs.unrolled(), alpha),
    "window": gs.window,
}


@pytest.mark.parametrize(
    "alpha",
    [-0.1, 1.1, 2, -1, math.inf, -math.inf, math.nan, np.float32(1.5), np.array(-0.5)],
    ids=str,
)
@pytest.mark.parametrize("make", MAKERS)
def test_an_alpha_outside_its_range_is_refused(make, alpha):
    with pytest.raises(ValueError, match=r"\balpha\b") as info:
        MAKERS[make](alpha)
    assert_says(info, re.escape(f"{float(alpha):g}"), r"0.*1")


def test_a_traced_alpha_is_never_checked():
    tx = jax.jit(
        lambda alpha, u: gs.smooth_over_depth(gs.scanned("b/"), alpha).update(
            u, optax.EmptyState()
        )[0]
    )
    out = tx(jnp.nan, {"b": {"w": X}})
    assert np.isnan(out["b"]["w"]).all()
    # Nor is an array of jax, which `optax.inject_hyperparams` makes of a number.
    gs.smooth_over_depth(gs.scanned("b/"), jnp.asarray(1.5))
    gs.window(jnp.asarray(-0.5))


@pytest.mark.parametrize("operator", [0.1, gs.window(0.1)], ids=["alpha", "operator"])
def test_an_unknown_variant_or_norm_scope_lists_the_allowed_ones(operator):
    def make(**kwargs):
        gs.smooth_over_depth(gs.unrolled(), operator, **kwargs)

    for wrong in ("norm-preserving", "Standard", "", None):
        with pytest.raises((ValueError, TypeError), match=r"\bvariant\b") as info:
            make(variant=wrong)
        assert_says(
            info, "standard", "norm_preserving", "directional", re.escape(repr(wrong))
        )
    with pytest.raises(ValueError, match=r"\bnorm_scope\b") as info:
        make(norm_scope="layer")
    assert_says(info, "'param'", "'block'", "'layer'")


@pytest.mark.parametrize("radius", [0, -1])
def test_a_radius_below_one_is_refused(radius):
    with pytest.raises(ValueError, match=r"\bradius\b") as info:
        gs.window(0.1, radius=radius)
    assert_says(info, str(radius), r"1")


@pytest.mark.parametrize("radius", [jnp.asarray(2), np.array(2), 1.5, "2"])
def test_a_radius_that_is_no_int_is_refused(radius):
    with pytest.raises(TypeError) as info:
        gs.window(0.1, radius=radius)
    assert_says(info, r"\bradius\b", r"\bint")


def test_an_array_as_radius_says_what_to_tell_inject_hyperparams():
    def factory(alpha, radius):
        return gs.smooth_over_depth(gs.unrolled(), gs.window(alpha, radius))

    tree = layers(range(3))
    with pytest.raises(TypeError) as info:
        optax.inject_hyperparams(factory)(0.1, radius=2).init(tree)
    assert_says(
        info, r"\bradius\b", r"inject_hyperparams", r'static_args=\("radius",\)'
    )
    optax.inject_hyperparams(factory, static_args=("radius",))(0.1, radius=2).init(tree)


@pytest.mark.parametrize("make", [gs.unrolled, gs.scanned])
@pytest.mark.parametrize("pattern", [r"layers_(\d+", r"*", r"(?P<layer>\d+"])
def test_an_invalid_regular_expression_is_refused_at_construction(make, pattern):
    with pytest.raises(ValueError, match=r"\bpattern\b") as info:
        make(pattern)
    assert_says(info, shown(pattern), r"regular expression|regex")


@pytest.mark.parametrize("pattern", ["layers_", r"layers_\d+/", r"(?P<stack>layers)_"])
def test_an_unrolled_pattern_without_a_layer_group_is_refused_at_construction(pattern):
    with pytest.raises(ValueError, match=r"\bpattern\b") as info:
        gs.unrolled(pattern)
    assert_says(info, shown(pattern), r"group", r"\(\\d\+\)|\(\?P<layer>")


@pytest.mark.parametrize("make", [gs.unrolled, gs.scanned])
@pytest.mark.parametrize("pattern", [3, re.compile(r"layers_(\d+)"), ["blocks"]])
def test_a_pattern_that_is_no_string_is_refused_at_construction(make, pattern):
    with pytest.raises(TypeError) as info:
        make(pattern)
    assert_says(info, r"\bpattern\b", type(pattern).__name__)


# Operators.


def run(operator):
    tree = layers(range(3))
    tx = gs.smooth_over_depth(gs.unrolled(), operator)
    return tx.update(tree, tx.init(tree))


@pytest.mark.parametrize(
    "operator",
    [
        gs.dense(np.eye(4)),
        gs.operator_fn(lambda n: np.eye(4)),
        gs.operator_fn(lambda n: np.ones((n,))),
    ],
    ids=["dense", "operator_fn", "vector"],
)
def test_a_matrix_of_the_wrong_size_names_the_group_and_its_run(operator):
    with pytest.raises(ValueError, match=r"decoder/layers") as info:
        run(operator)
    assert_says(
        info,
        r"mlp/kernel",
        r"\b3\b.*layers|layers.*\b3\b|3, ?3|3 ?x ?3|3 ?× ?3",
        r"4|\(3,\)",
    )


@pytest.mark.parametrize(
    "matrix", [np.ones(3), np.ones((2, 3)), np.ones((1, 2, 2)), 1.0]
)
def test_a_dense_operator_must_be_square(matrix):
    with pytest.raises(ValueError, match=r"\bmatrix\b") as info:
        gs.dense(matrix)
    assert_says(info, re.escape(str(np.shape(matrix))))


@pytest.mark.parametrize("function", [3, "average", None, np.eye(2)])
def test_operator_fn_takes_a_function(function):
    with pytest.raises(TypeError) as info:
        gs.operator_fn(function)
    found = re.escape(" ".join(repr(function).split()))
    assert_says(info, r"function|callable", f"{type(function).__name__}|{found}")


def test_errors_in_init_come_from_a_recipe_as_well():
    depth = gs.scanned("blocks/")
    smoothing = gs.smooth_over_depth(depth)
    for tx in (gs.adamw(1e-3, smoothing), gs.muon(1e-3, depth, smoothing)):
        with pytest.raises(ValueError, match="decoder/layers_0/mlp/kernel"):
            tx.init(layers(range(2)))


# What a schedule returns, and other values that come late.


def test_a_schedule_is_held_to_the_same_shape_and_range_as_a_constant():
    updates = {"blocks": {"w": jnp.ones((3, 3))}}
    for schedule, words in (
        (lambda count: jnp.zeros(3), "scalar"),
        (lambda count: 7.0, "between 0 and 1"),
    ):
        tx = gs.smooth_over_depth(gs.scanned("blocks/"), schedule)
        with pytest.raises(ValueError, match="alpha") as info:
            tx.update(updates, tx.init(updates))
        assert_says(info, words)


def test_the_matrix_of_an_unresolved_schedule_says_how_to_resolve_it():
    operator = gs.window(optax.linear_schedule(0.0, 0.2, 10))
    with pytest.raises(TypeError) as info:
        operator.matrix(3)
    assert_says(info, "schedule", re.escape("at(count)"))


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray])
def test_a_complex_matrix_is_refused(wrap):
    with pytest.raises(TypeError, match="complex"):
        gs.dense(wrap(np.eye(2) * 1j))


def test_a_scope_that_leaves_out_everything_is_not_blamed_on_the_pattern():
    tree = {f"layers_{i}": {"mlp": {"gate": jnp.ones((2, 2))}} for i in range(3)}
    spec = gs.unrolled().only_projections()
    with pytest.raises(ValueError, match="matches 3 of the 3") as info:
        gs.smooth_over_depth(spec).init(tree)
    assert_says(info, "layers_0/mlp/gate", re.escape(".only("))


def test_a_function_that_fails_on_a_flattened_tree_is_told_of_the_flattening():
    tx = optax.flatten(
        gs.smooth_over_depth(lambda path, leaf: gs.Depth(path[0], path[1]))
    )
    with pytest.raises(IndexError) as info:
        tx.init({"blocks": {"w": jnp.ones((3, 2))}})
    assert "optax.flatten" in "".join(info.value.__notes__)


def test_a_gap_beside_a_leaf_without_layers_is_still_our_error():
    tree = {"blocks": {"w": jnp.ones((0, 2))}, "1": {"w": jnp.ones(2)}}
    tree["3"] = {"w": jnp.ones(2)}
    spec = gs.first_match(
        gs.scanned("blocks/", stack="s"), gs.unrolled(r"^(\d)/", stack="s")
    )
    with pytest.raises(ValueError, match="layer 2 is missing"):
        gs.smooth_over_depth(spec).init(tree)


def test_children_without_keys_are_told_apart_by_their_numbers():
    class Keyless:
        def __init__(self, *children):
            self.children = children

    jax.tree_util.register_pytree_node(
        Keyless,
        lambda node: (node.children, None),
        lambda _, children: Keyless(*children),
    )
    tree = {f"layers_{i}": Keyless(jnp.ones(2), jnp.ones(2)) for i in range(3)}
    groups = gs.describe(gs.unrolled(), tree).groups
    assert [(group.role, group.layers) for group in groups] == [
        ("0", (0, 1, 2)),
        ("1", (0, 1, 2)),
    ]


# What new users ran into.


def test_a_strength_given_in_percent_is_told_to_be_a_fraction():
    with pytest.raises(ValueError, match=re.escape("write 0.2 for 20 %")):
        gs.smooth_over_depth(gs.unrolled(), 20)


def test_positions_of_a_cycle_without_a_stride_are_told_of_it():
    cycle = {f"layers_{i}": {"w": jnp.ones((4, 2))} for i in range(3)}
    with pytest.raises(ValueError, match="stride=") as info:
        gs.smooth_over_depth(gs.scanned(r"layers_(\d+)/")).init(cycle)
    assert_says(info, "layers_0/w", "cycle")
    tx = gs.smooth_over_depth(gs.scanned(r"layers_(\d+)/", stride=3))
    tx.init(cycle)


def test_a_spec_that_matches_only_integers_is_not_told_to_match_them():
    tree = {"blocks": {"counts": jnp.ones((3,), jnp.int32)}, "w": jnp.ones(2)}
    with pytest.raises(ValueError, match="none of floating") as info:
        gs.smooth_over_depth(gs.scanned("blocks/")).init(tree)
    assert_says(info, "blocks/counts")


def test_a_state_without_a_count_is_told_to_be_converted_for_a_schedule():
    params = {"blocks": {"w": jnp.ones((3, 2))}}
    depth = gs.scanned("blocks/")
    state = optax.scale_by_adam().init(params)
    schedule = optax.linear_schedule(0.0, 0.1, 10)
    smoothing = gs.smooth_over_depth(depth, schedule)
    tx = gs.with_depth_smoothing(optax.scale_by_adam(), smoothing)
    with pytest.raises(TypeError, match="ScaleByAdamState") as info:
        tx.update(params, state, params)
    conversion = "WithDepthSmoothingState(state, smoothing.init(params))"
    assert_says(info, re.escape(conversion))
    converted = gs.WithDepthSmoothingState(state, smoothing.init(params))
    tx.update(params, converted, params)


def test_a_state_with_a_count_is_told_to_be_converted_for_a_constant():
    params = {"blocks": {"w": jnp.ones((3, 2))}}
    depth = gs.scanned("blocks/")
    scheduled = gs.smooth_over_depth(depth, optax.linear_schedule(0.0, 0.1, 10))
    state = gs.with_depth_smoothing(optax.scale_by_adam(), scheduled).init(params)
    constant = gs.smooth_over_depth(depth, 0.1)
    tx = gs.with_depth_smoothing(optax.scale_by_adam(), constant)
    with pytest.raises(TypeError, match="WithDepthSmoothingState") as info:
        tx.update(params, state, params)
    assert_says(info, re.escape("state.inner_state"))
    tx.update(params, state.inner_state, params)


def test_a_smoothing_that_keeps_a_state_like_the_parameters_is_refused_in_init():
    params = {"blocks": {"w": jnp.ones((3, 2))}}
    smoothing = optax.chain(
        gs.smooth_over_depth("scanned('blocks/')"), optax.trace(0.9)
    )
    tx = gs.with_depth_smoothing(optax.scale_by_adam(), smoothing)
    with pytest.raises(ValueError, match="state like the parameters") as info:
        tx.init(params)
    assert_says(info, "`smoothing`", re.escape("`optax.chain(inner, smoothing)`"))
    optax.chain(optax.scale_by_adam(), smoothing).init(params)


# Leaves of one scan that hold different numbers of layers.


def maxtext(num_layers=4):
    """Layers on axis 1."""
    shapes = {
        "wi": (3, num_layers, 5),
        "wo": (5, num_layers, 3),
        "norm": (3, num_layers),
    }
    layers = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    return {"decoder": {"layers": layers}, "embed": jnp.ones((7, 3))}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda spec: spec,
        gs.ranked,
        gs.first_match,
        lambda spec: spec.only(lambda path, leaf: True),
    ],
    ids=["", "ranked", "first_match", "only"],
)
def test_a_wrong_scan_axis_is_an_error_that_suggests_the_right_one(wrap):
    check_init_and_update(
        ValueError,
        wrap(gs.scanned("decoder/layers/")),
        maxtext(),
        r"\bdepth\b",
        r"different numbers of layers",
        r"decoder/layers",
        r"\b3 in decoder/layers/wi/kernel \(3, 4, 5\)|3 in decoder/layers/norm/kernel",
        r"\b5 in decoder/layers/wo/kernel \(5, 4, 3\)",
        r"to fix: write `gs\.\w+\(.*'layers/', axis=1\)",
    )
    gs.smooth_over_depth(gs.scanned("decoder/layers/", axis=1)).init(maxtext())


def test_where_no_axis_fits_the_other_ways_out_are_said():
    tree = {"layers": {"w": jnp.ones((4, 3))}, "layers_norm": {"w": jnp.ones((2, 5))}}
    check_init_and_update(
        ValueError,
        gs.scanned("layers", stack="layers"),
        tree,
        r"4 in layers/w \(4, 3\)",
        r"2 in layers_norm/w \(2, 5\)",
        r"`axis=`",
        r"\.only\(",
        r"strict=False",
    )


def test_where_several_axes_fit_none_is_suggested():
    tree = {"layers": {"a": jnp.ones((2, 3, 3)), "b": jnp.ones((4, 3, 3))}}
    with pytest.raises(ValueError, match="different numbers of layers") as info:
        gs.smooth_over_depth(gs.scanned("layers/")).init(tree)
    assert_says(info, r"`axis=`", r"strict=False")
    assert "it is probably the one" not in str(info.value)


def test_unequal_scans_are_taken_as_they_are_when_not_strict():
    tx = gs.smooth_over_depth(gs.scanned("layers/"), 0.3, strict=False)
    tree = {"layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}}
    out, _ = tx.update(tree, tx.init(tree))
    assert out["layers"]["a"].shape == (2, 3)


def test_scans_of_two_stacks_may_have_different_lengths():
    tree = {name: {"w": jnp.ones((n, 3))} for name, n in (("enc", 2), ("dec", 4))}
    for spec in (
        gs.scanned(r"(?:enc|dec)/"),
        gs.first_match(
            gs.scanned("enc/", stack="joined"),
            gs.scanned("dec/", start=2, stack="joined"),
        ),
    ):
        gs.smooth_over_depth(spec).init(tree)


def test_the_rows_of_one_scan_may_differ_in_which_positions_hold_a_role():
    cycle = {f"layers_{p}": {"norm": jnp.ones((4, 3))} for p in range(2)}
    cycle["layers_1"]["moe"] = jnp.ones((4, 2, 3))
    spec = gs.ranked(gs.scanned(r"layers_(\d+)/", stride=2))
    gs.smooth_over_depth(spec).init(cycle)


# A warning where nothing is coupled, though there are layers.


def vit(num_layers=3):
    blocks = {
        f"EncoderBlock_{i}": {"Dense_0": {"kernel": X}} for i in range(num_layers)
    }
    return {"Transformer_0": blocks, "head": {"kernel": X}}


def test_taking_the_wrong_number_for_the_layer_is_a_warning_with_the_right_pattern():
    tx = gs.smooth_over_depth(gs.unrolled(r"Transformer_(\d+)/"))
    with pytest.warns(UserWarning, match="couples nothing") as record:
        tx.init(vit())
    (warning,) = record
    message = str(warning.message)
    assert warning.filename == __file__
    for part in (
        r"`depth` gs.unrolled(r'Transformer_(\d+)/')",
        "3 groups",
        "Transformer_0/EncoderBlock_0/Dense_0/kernel",
        r"`gs.unrolled(r'EncoderBlock_(\d+)/')`",
        "`strict=False`",
    ):
        assert part in message
    suggested = eval(
        re.search(r"write `(gs\.unrolled\(r'.*?'\))`", message)[1], {"gs": gs}
    )
    groups = gs.describe(suggested, vit()).groups
    assert [group.layers for group in groups] == [(0, 1, 2)]


@pytest.mark.parametrize(
    "make",
    [
        lambda smoothing: smoothing,
        lambda smoothing: gs.with_depth_smoothing(optax.scale_by_adam(), smoothing),
        lambda smoothing: gs.adamw(1e-3, smoothing),
    ],
    ids=["smooth_over_depth", "with_depth_smoothing", "adamw"],
)
def test_every_transformation_warns_of_layers_that_nothing_couples(make):
    depth = gs.unrolled(r"Transformer_(\d+)/")
    tx = make(gs.smooth_over_depth(depth, gs.window(0.1)))
    with pytest.warns(UserWarning, match=r"EncoderBlock_\(\\d\+\)"):
        tx.init(vit())


@pytest.mark.parametrize(
    ("depth", "tree", "strict"),
    [
        (gs.unrolled(r"Transformer_(\d+)/"), vit(), False),
        (gs.unrolled(r"EncoderBlock_(\d+)/"), vit(), True),
        (gs.unrolled(r"EncoderBlock_(\d+)/"), vit(1), True),
        (gs.unrolled(), vit(1), True),
    ],
    ids=["not strict", "right", "one layer", "one layer in a role"],
)
def test_there_is_no_such_warning_where_it_is_meant(depth, tree, strict):
    tx = gs.smooth_over_depth(depth, strict=strict)
    tx.update(tree, tx.init(tree))


def test_update_does_not_repeat_the_warning():
    tx = gs.smooth_over_depth(gs.unrolled(r"Transformer_(\d+)/"))
    with pytest.warns(gs.DepthWarning):
        tx.init(vit())
    out, _ = tx.update(vit(), optax.EmptyState())
    assert out["head"]["kernel"] is X


def test_a_cycle_may_stop_before_its_end():
    tree = {"blocks_0": {"w": jnp.ones((5, 2))}, "blocks_1": {"w": jnp.ones((4, 2))}}
    spec = gs.scanned(r"blocks_(\d+)/", stride=2, stack="d")
    gs.smooth_over_depth(spec).init(tree)
    (group,) = gs.describe(spec, tree).groups
    assert group.runs == (tuple(range(9)),)


def test_several_axes_are_no_single_axis():
    tree = {"blocks": {"w": jnp.ones((2, 3, 8)), "b": jnp.ones((2, 8, 8))}}
    with pytest.raises(ValueError, match="different numbers") as info:
        gs.smooth_over_depth(gs.scanned("blocks/", axis=(0, 1))).init(tree)
    assert "`axis=0`" not in str(info.value)


def dense(*shape):
    return {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1])}


@pytest.mark.parametrize(
    "tree",
    [
        {"Conv_0": {"kernel": jnp.ones((4, 4, 3, 8))}}
        | {f"Block_{i}": dense(8, 8) for i in range(3)},
        {"Block_0": {name: {"kernel": jnp.ones((8, 2, 4))} for name in "qkv"}},
        {
            f"Block_{i}": {
                f"{part}_{stream}": dense(8, 8)
                for part in ("attn", "mlp")
                for stream in ("img", "txt")
            }
            for i in range(3)
        },
    ],
    ids=["a patch kernel", "one layer", "two streams"],
)
def test_ordinary_models_are_not_warned_of(tree):
    gs.smooth_over_depth(gs.unrolled()).init(tree)


def test_warnings_have_a_category_to_filter_them_by():
    tree = {f"Net_0/Block_{i}": {"w": jnp.ones(2)} for i in range(3)}
    with pytest.warns(gs.DepthWarning, match="couples nothing"):
        gs.smooth_over_depth(gs.unrolled(r"Net_(\d+)/")).init(tree)


def test_a_lone_array_may_be_one_layer():
    depth = gs.depth_fn(lambda path, leaf: gs.Depth("s", "w"))
    u = jnp.ones(3)
    tx = gs.smooth_over_depth(depth)
    assert tx.update(u, tx.init(u))[0] is u


def test_a_wrong_structure_is_told_before_the_state_is_looked_at():
    tree = {
        name: {"layers_0": {"bias": jnp.ones(3)}, "layers_1": {"bias": jnp.ones(3)}}
        for name in ("decoder", "mtp")
    }
    depth = gs.unrolled(stack="one")
    tx = gs.smooth_over_depth(depth, lambda count: 0.1, strict=False)
    with pytest.raises(ValueError, match="gives layer 0"):
        tx.update(tree, None)


# Arguments of the wrong kind, of every kind: a sentence that names the argument.


class Odd:
    """Neither hashable nor to be shown."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no text")


UNHASHABLE = {
    "dict": {},
    "list": [["a"]],
    "array": np.ones(3),
    "empty array": np.ones(0),
    "array of jax": jnp.ones(3),
    "object array": np.array([None, {}], dtype=object),
    "object": Odd(),
}
NO_NUMBERS = {
    **UNHASHABLE,
    "text": "x",
    "text array": np.array("x"),
    "flag": True,
    "flag of jax": jnp.array(True),
    "complex": 1j,
    "key": jax.random.key(0),
    "long int": 10**400,
    "endless int": 10**5000,
    "operator": gs.window(0.1),
    "masked": optax.MaskedNode(),
}
NO_ROWS = {k: v for k, v in NO_NUMBERS.items() if "array" not in k}
NO_STARTS = {k: v for k, v in NO_NUMBERS.items() if "int" not in k}
ADAM, PLACE = optax.scale_by_adam(), gs.scanned("blocks/")
SMOOTH = gs.smooth_over_depth(PLACE)


def smooth_with(**kwargs):
    return gs.smooth_over_depth(PLACE, 0.1, **kwargs)


def adamw_with(**kwargs):
    return gs.adamw(**{"learning_rate": 0.1, "smoothing": SMOOTH, **kwargs})


def muon_with(**kwargs):
    given = {"learning_rate": 0.1, "depth": PLACE, "smoothing": SMOOTH}
    return gs.muon(**{**given, **kwargs})


def alpha_with(**kwargs):
    return gs.contrib.learn_alpha(ADAM, PLACE, **kwargs)


def operator_with(**kwargs):
    return gs.contrib.learn_operator(ADAM, PLACE, **kwargs)


# What takes the argument, its name, and what it does not take.
WRONG_KINDS = [
    *((smooth_with, name, NO_NUMBERS) for name in ("variant", "norm_scope")),
    (smooth_with, "axis_boundary", NO_NUMBERS),
    (smooth_with, "strict", {**NO_NUMBERS, "flag": 1, "numpy": np.bool_(True)}),
    (smooth_with, "axis_name", {**UNHASHABLE, "flag": True, "int": 3, "set": {"a"}}),
    (smooth_with, "norm_axis_names", {**UNHASHABLE, "ints": (0,), "names": "data"}),
    (smooth_with, "norm_axis_names", {"list": (["a"],), "none": (None,), "2": "aa"}),
    *((adamw_with, name, NO_NUMBERS) for name in ("learning_rate", "weight_decay")),
    *((adamw_with, name, NO_NUMBERS) for name in ("b1", "b2", "eps", "eps_root")),
    *((adamw_with, name, {"function": abs}) for name in ("b1", "eps")),
    *((tx, "mu_dtype", {**NO_NUMBERS, "int": int}) for tx in (adamw_with, muon_with)),
    *((tx, "nesterov", {**NO_NUMBERS, "flag": 1}) for tx in (adamw_with, muon_with)),
    *((muon_with, name, NO_NUMBERS) for name in ("beta", "eps", "consistent_rms")),
    *((muon_with, name, NO_NUMBERS) for name in ("adam_b1", "adam_b2")),
    (muon_with, "adam_eps_root", NO_NUMBERS),
    (muon_with, "ns_steps", NO_STARTS),
    *((muon_with, name, NO_NUMBERS) for name in ("learning_rate", "weight_decay")),
    *((muon_with, f"adam_{x}", NO_NUMBERS) for x in ("learning_rate", "weight_decay")),
    (muon_with, "ns_coeffs", {**NO_ROWS, "two": (1.0, 2.0), "array": jnp.ones(4)}),
    (muon_with, "ns_coeffs", {"rows": jnp.ones((6, 3)), "none": jnp.ones((0, 3))}),
    (muon_with, "ns_steps", {"zero": 0, "half": 1.5, "array": jnp.ones(2, int)}),
    (muon_with, "adaptive", {**NO_NUMBERS, "flag": 1}),
    (muon_with, "preconditioning", NO_NUMBERS),
    (muon_with, "muon_weight_dimension_numbers", {"int": 3, "pair": (0, 1), "x": "x"}),
    (alpha_with, "dtype", {**NO_NUMBERS, "int": int}),
    *((alpha_with, name, NO_NUMBERS) for name in ("per", "decay", "alpha")),
    *((operator_with, name, NO_NUMBERS) for name in ("signal", "direction", "radius")),
    *((operator_with, name, NO_NUMBERS) for name in ("alpha_max", "learning_rate")),
    (gs.window, "alpha", NO_NUMBERS),
    (gs.ema, "rho", NO_NUMBERS),
    (gs.tikhonov, "strength", NO_NUMBERS),
    (gs.layer_scale, "factors", {"text": "x", "key": jax.random.key(0), "flag": True}),
    (gs.layer_scale, "factors", {"long": 10**400, "flags": jnp.array([True])}),
    (gs.diagnostics.line_shape_score, "states", {"none": None, "text": "x", "d": {}}),
    (gs.diagnostics.residual_alignment, "states", {"long": 10**400, "of": [None]}),
    (gs.unrolled, "start", NO_STARTS),
]


@pytest.mark.parametrize(
    ("make", "argument", "kinds"),
    [pytest.param(*row, id=f"{row[0].__name__}, {row[1]}") for row in WRONG_KINDS],
)
def test_an_argument_of_the_wrong_kind_is_named_whatever_it_is(make, argument, kinds):
    for kind, value in kinds.items():
        with pytest.raises((TypeError, ValueError)) as info:
            make(**{argument: value})
        assert f"`{argument}`" in str(info.value), (kind, info.value)
        assert len(str(info.value)) < 700, kind
        # Said by this library, and not by what it calls.
        raised_in = info.traceback[-1].path
        assert "gradsmooth_optax" in str(raised_in), (kind, raised_in)
