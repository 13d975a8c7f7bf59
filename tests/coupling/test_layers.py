"""What a user's own operator may rely on, when it is written against `Layers` alone."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from block_layouts import LAYOUTS, blocks_for, smoothed, tree_in

import gradsmooth_optax as gs

by_layout = pytest.mark.parametrize(
    "layout",
    [
        pytest.param("stacked", marks=pytest.mark.core),
        *("unrolled", "stacked on the last axis", "cycles and a remainder"),
    ],
)
FIVE = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Own(gs.Operator):
    """Whatever function of the layers."""

    function: Callable[[Any], Any]

    def couple(self, layers):
        return self.function(layers)


def there(blocks, layer, offset, otherwise):
    return blocks[layer + offset] if 0 <= layer + offset < FIVE else otherwise


def norms_of(blocks, scope="param"):
    return oracle.layer_norms(blocks, scope)


def each(blocks, function):
    """`function(layer, role, x)` in the place of every parameter."""
    return [
        {role: function(layer, role, np.float64(x)) for role, x in block.items()}
        for layer, block in enumerate(blocks)
    ]


@by_layout
def test_shifted_gives_the_layer_there_and_where_none_is_the_layer_itself_or_zero(
    layout,
):
    blocks = blocks_for(layout)
    nothing = {role: np.zeros((2, 3)) for role in blocks[0]}

    def check(offset, missing):
        out = smoothed(layout, blocks, Own(lambda u: u.shifted(offset, missing)))
        want = [
            there(blocks, layer, offset, block if missing == "self" else nothing)
            for layer, block in enumerate(blocks)
        ]
        oracle.assert_blocks_close(out, want)

    for offset, missing in itertools.product((-4, -1, 0, 2), ("self", "zero")):
        check(offset, missing)
    out = smoothed(layout, blocks, Own(lambda u: u.shifted(1).shifted(-1, "zero")))
    want = [nothing, *blocks[1:]]
    oracle.assert_blocks_close(out, want)


@by_layout
def test_difference_is_that_to_the_layer_there_and_zero_where_none_is(layout):
    blocks = blocks_for(layout)
    norms = norms_of(blocks)

    def check(offset, weights, weight_of):
        def want(i, role, x):
            return weight_of(i, role) * (there(blocks, i, offset, {role: x})[role] - x)

        operator = Own(lambda u: u.difference(offset, weights(u)))
        oracle.assert_blocks_close(
            smoothed(layout, blocks, operator), each(blocks, want)
        )

    for offset in (-5, -4, -1, 2):
        check(offset, lambda u: 1.0, lambda i, role: 1.0)
        check(offset, lambda u: jnp.float32(0.25), lambda i, role: 0.25)
        check(offset, lambda u: u.norms(), lambda i, role: norms[i, role])
    # Scaled before it is subtracted: it overflows only where the result does.
    huge = [{"w": np.float32([size])} for size in (3e38, -3e38)]
    out = smoothed("unrolled", huge, gs.window(1.0))
    np.testing.assert_array_equal([block["w"] for block in out], np.zeros((2, 1)))


NUMBERS = {  # (layers, scope) -> values; (of the plain loops, layer, role) -> number
    "norms": (lambda u, s: u.norms(s), lambda n, i, r: n[i, r]),
    "squares": (lambda u, s: u.squared_norms(s), lambda n, i, r: n[i, r] ** 2),
    "norms beside": (
        lambda u, s: u.norms(s).shifted(1),
        lambda n, i, r: n[i + 1, r] if i < 4 else 0,
    ),
    # What is made of shifted layers is of all layers again.
    "norms of a sum": (
        lambda u, s: (u.shifted(1).map(jnp.zeros_like) + u).norms(s),
        lambda n, i, r: n[i, r],
    ),
    "norms there and back": (
        lambda u, s: u.shifted(1).shifted(-1).norms(s),
        lambda n, i, r: n[max(i, 1), r],
    ),
    "exists": (lambda u, s: u.exists(-2), lambda n, i, r: i >= 2),
    "exists after": (lambda u, s: u.exists(3), lambda n, i, r: i < 2),
    "position": (lambda u, s: u.positions()[0], lambda n, i, r: i),
    "length": (lambda u, s: u.positions()[1], lambda n, i, r: FIVE),
    "longest run": (lambda u, s: u.exists(0) * u.longest_run, lambda n, i, r: FIVE),
    "of a run": (lambda u, s: u.values_of_runs(np.arange), lambda n, i, r: i),
    "arithmetic": (
        lambda u, s: 1 - (2 * u.positions()[0] - 1) / 4 + (u.exists(1) > 0.5) ** 2,
        lambda n, i, r: 1 - (2 * i - 1) / 4 + (i < 4),
    ),
    "more arithmetic": (
        lambda u, s: -(3.0 / (1 + u.positions()[0])) + np.float32(2) * u.exists(1),
        lambda n, i, r: -3 / (1 + i) + 2 * (i < 4),
    ),
    "sums of values": (
        lambda u, s: u.norms(s) - u.norms(s) / u.exists(0) + u.positions()[0],
        lambda n, i, r: i,
    ),
    "<": (lambda u, s: u.positions()[0] < 2, lambda n, i, r: i < 2),
    "<=": (lambda u, s: u.positions()[0] <= 2, lambda n, i, r: i <= 2),
    ">": (lambda u, s: u.positions()[0] > 2, lambda n, i, r: i > 2),
    ">=": (lambda u, s: u.positions()[0] >= jnp.int32(2), lambda n, i, r: i >= 2),
    "map": (
        lambda u, s: u.norms(s).map(jnp.maximum, u.positions()[0]),
        lambda n, i, r: max(n[i, r], i),
    ),
}


@by_layout
def test_numbers_per_layer_are_those_of_a_plain_loop(layout):
    blocks = blocks_for(layout)

    def check(name, scope):
        values, want = NUMBERS[name]
        norms = norms_of(blocks, scope)
        operator = Own(lambda u: u.map(jnp.ones_like).scaled(values(u, scope)))
        out = smoothed(layout, blocks, operator)
        expected = each(blocks, lambda i, role, x: want(norms, i, role) + 0 * x)
        try:
            oracle.assert_blocks_close(out, expected)
        except AssertionError as error:
            raise AssertionError(f"{name} per {scope}") from error

    for name, scope in itertools.product(NUMBERS, ("param", "block")):
        check(name, scope)


@by_layout
def test_inner_products_and_cosines_are_over_the_roles_that_both_layers_hold(layout):
    blocks, offset = blocks_for(layout), 1
    if layout == "unrolled":
        del blocks[2]["other"]
    coupled = norms_of(blocks)

    def vectors(i, role, scope):
        """Of both layers, over the roles in question that both have."""
        pair = (blocks[i], there(blocks, i, offset, {}))
        roles = sorted(blocks[i]) if scope == "block" else [role]
        roles = [r for r in roles if all(r in block for block in pair)]
        return [np.concatenate([b[r].ravel() for r in roles] or [[0.0]]) for b in pair]

    def inner(i, role, scope):
        is_there = role in there(blocks, i, offset, {})
        return float(is_there) * np.dot(*vectors(i, role, scope))

    def cosine(i, role, scope):
        norms = np.prod([np.linalg.norm(x) for x in vectors(i, role, scope)])
        return inner(i, role, scope) / norms if norms else 0.0

    def check(values, want, scope):
        operator = Own(lambda u: u.map(jnp.ones_like).scaled(values(u, scope)))
        out = smoothed(layout, blocks, operator, strict=False)
        expected = each(
            blocks,
            lambda i, r, x: want(i, r, scope) + 0 * x if (i, r) in coupled else x,
        )
        oracle.assert_blocks_close(out, expected)

    def trebled(u):
        return u.map(lambda x: 3 * x)

    for scope in ("param", "block"):
        check(lambda u, s: u.inner(u.shifted(offset), s), inner, scope)
        check(lambda u, s: u.cosine(u.shifted(offset), s), cosine, scope)
        check(lambda u, s: trebled(u).cosine(u.shifted(offset), s), cosine, scope)


def test_the_scope_is_that_of_the_transformation_where_none_is_given():
    blocks, operator = blocks_for("stacked"), Own(lambda u: u.scaled(u.norms()))
    for scope in ("param", "block"):
        out = smoothed("stacked", blocks, operator, norm_scope=scope)
        want = [dict(block) for block in blocks]
        for (i, role), norm in norms_of(blocks, scope).items():
            want[i][role] = norm * blocks[i][role]
        oracle.assert_blocks_close(out, want)


@by_layout
def test_where_chooses_by_layer_and_with_norms_of_gives_the_norms_of_others(layout):
    blocks = blocks_for(layout)
    blocks[2] = {role: 0 * x for role, x in blocks[2].items()}

    def at_the_next_norm(layers):
        after = layers.shifted(1)
        return layers.with_norms_of(after, "block").where(after.norms() > 0, after)

    out = smoothed(layout, blocks, Own(at_the_next_norm))
    norm = [norms_of(blocks, "block")[i, "kernel"] for i in range(FIVE)]
    ratios = [norm[1] / norm[0], 0.0, 0.0, norm[4] / norm[3], 1.0]
    oracle.assert_blocks_close(out, each(blocks, lambda i, r, x: ratios[i] * x))


@pytest.mark.parametrize("power", [-25, 15])
def test_norms_of_others_may_be_many_powers_of_ten_from_the_layers_own(power):
    own, wanted = 10.0**power, 10.0 ** (-power / 5)
    blocks = each(blocks_for("stacked"), lambda i, r, x: np.float32(own * x))

    def given(layers):
        return layers.with_norms_of(layers.scaled(wanted / own))

    def made(layers):
        return layers.with_norms_of(lambda u: u.scaled(wanted / own))

    want = each(blocks, lambda i, r, x: wanted / own * x)
    for function in (given, made):
        out = smoothed("stacked", blocks, Own(function))
        oracle.assert_blocks_close(out, want)


@by_layout
def test_layers_are_added_subtracted_negated_and_scaled_by_their_runs(layout):
    blocks, wide = blocks_for(layout), np.arange(25.0).reshape(5, 5)

    def function(layers):
        doubled = layers + layers.map(lambda x, y: x * jnp.abs(y), layers)
        scaled = (-doubled).scaled(lambda num_layers: np.arange(num_layers) - 1.0)
        zero = scaled - scaled
        return (scaled - layers.scaled(jnp.float32(0.5)) + zero) - zero

    out = smoothed(layout, blocks, Own(function))
    want = each(blocks, lambda i, r, x: -(i - 1) * (x + x * np.abs(x)) - 0.5 * x)
    oracle.assert_blocks_close(out, want)
    # Weights wait until they are needed: also where they are not the same ones.
    for function, want in (
        (lambda u: u.scaled(u.positions()[0]) - u, lambda i, r, x: (i - 1) * x),
        (lambda u: u.scaled(np.ones).scaled(u.positions()[0]), lambda i, r, x: i * x),
        (lambda u: u.scaled(u.positions()[0]).scaled(np.ones), lambda i, r, x: i * x),
        (lambda u: (u - u) - u, lambda i, r, x: -x),
        (lambda u: (u - u) + u - u.scaled(0.5), lambda i, r, x: 0.5 * x),
    ):
        out = smoothed(layout, blocks, Own(function))
        oracle.assert_blocks_close(out, each(blocks, want))
    # So they do for shifted copies, and for a product.
    scaled = each(blocks, lambda i, r, x: i * x)
    numbers = functools.partial(jnp.arange, dtype=jnp.float32)
    one_sided = (lambda n: jnp.eye(n, k=-2), lambda n: [-2])
    for matrix, function in (
        (np.eye(5, k=1), lambda u: u.scaled(numbers).shifted(1, missing="zero")),
        (wide, lambda u: u.scaled(numbers).matmul(lambda n: wide)),
        (np.eye(5, k=-2), lambda u: u.scaled(numbers).matmul(*one_sided)),
    ):
        want = oracle.smooth(scaled, dict.fromkeys([5], matrix).get)
        oracle.assert_blocks_close(smoothed(layout, blocks, Own(function)), want)


def test_layers_and_their_numbers_pass_through_cond_and_scan():
    blocks = blocks_for("stacked")

    def often(layers):
        def once(u, _):
            both = (u.shifted(1) - u).scaled(0.25) + (u.shifted(-1) - u).scaled(0.25)
            return u + both, None

        wide = layers.map(jnp.asarray)
        smooth, _ = jax.lax.scan(once, wide, None, length=3)
        norms = jax.lax.cond(jnp.array(True), wide.norms, lambda: wide.exists(0))
        chosen = jax.lax.cond(jnp.array(True), lambda: smooth, lambda: wide.scaled(0.0))
        return chosen.scaled(norms)

    out = smoothed("stacked", blocks, Own(often))
    matrix = np.linalg.matrix_power(oracle.window_matrix(5, 0.5), 3)
    norms = norms_of(blocks)
    want = each(
        oracle.smooth(blocks, lambda n: matrix), lambda i, r, x: norms[i, r] * x
    )
    oracle.assert_blocks_close(out, want)


# `layer_scale`.


@by_layout
def test_layer_scale_multiplies_every_layer_by_its_factor(layout):
    blocks, factors = blocks_for(layout), np.array([0.0, 0.5, 1.0, 2.0, -1.0])
    for given, of in (
        (factors, factors),
        (jnp.asarray(factors), factors),
        (lambda count: 0.5 * jnp.asarray(factors), 0.5 * factors),
        (lambda count: 0.5, np.full(5, 0.5)),
    ):
        out = smoothed(layout, blocks, gs.layer_scale(given))
        pairs = zip(of, blocks, strict=True)
        want = [{role: f * x for role, x in block.items()} for f, block in pairs]
        oracle.assert_blocks_close(out, want)
    both = gs.compose(gs.window(0.5), gs.layer_scale(factors))
    matrix = np.diag(factors) @ oracle.window_matrix(5, 0.5)
    np.testing.assert_allclose(both.matrix(5), matrix, atol=1e-16)
    oracle.assert_blocks_close(
        smoothed(layout, blocks, both), oracle.smooth(blocks, lambda n: matrix)
    )


def test_layer_scale_also_scales_a_layer_that_is_alone():
    tree = {"layers_0": {"w": jnp.ones(2)}, "layers_2": {"w": jnp.ones(2)}}
    tree["blocks"] = {"w": jnp.ones((1, 2)), "none": jnp.ones((0, 2))}
    depth = gs.first_match(gs.scanned("blocks/"), gs.unrolled())
    for operator in (
        gs.layer_scale(0.5),
        gs.layer_scale([0.5]),
        gs.compose(gs.window(0.3), gs.layer_scale(0.5)),
        gs.repeat(gs.layer_scale(0.5), 1),
        gs.controls.norm_matched(gs.layer_scale(0.5)),
    ):
        tx = gs.smooth_over_depth(depth, operator, strict=False)
        out, _ = tx.update(tree, tx.init(tree))
        values = {float(x) for leaf in jax.tree.leaves(out) for x in leaf.ravel()}
        assert values == {0.5}
        assert out["blocks"]["none"] is tree["blocks"]["none"]
        if operator.has_matrix:
            np.testing.assert_array_equal(operator.matrix(1), [[0.5]])


def test_layer_scale_before_an_operator_that_looks_at_the_updates_warns_of_nothing():
    blocks = blocks_for("stacked")
    operator = gs.compose(gs.layer_scale(0.5), gs.similarity_window(0.3))
    want = oracle.similarity_window(each(blocks, lambda i, r, x: 0.5 * x), 0.3)
    oracle.assert_blocks_close(smoothed("stacked", blocks, operator), want)


# Errors.


@pytest.mark.parametrize(
    ("couple", "words"),
    [
        (lambda u: u.norms(), "couple` of .*LayerValues"),
        (lambda u: u.scaled(np.ones(3)), r"one number for all layers.*\(3,\)"),
        (lambda u: u.scaled("0.5"), "must be a number"),
        (lambda u: u.difference(1, np.ones(3)), "one number for all layers"),
        (lambda u: u.scaled(u.norms() * jnp.ones(3)), "one number for all layers"),
        (lambda u: u.shifted(1, missing="wrap"), "`missing` must be one of 'self'"),
        (lambda u: u.scaled(lambda n: np.ones(2)), "one number per layer.*0 to 4"),
        (lambda u: u.norms("layer"), "`scope` must be one of 'param'"),
        (lambda u: u + 1, "unsupported operand"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(couple, words):
    with pytest.raises((TypeError, ValueError), match=words):
        smoothed("unrolled", blocks_for("unrolled"), Own(couple))


def test_an_operator_with_neither_matrix_nor_couple_says_what_it_needs():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Nothing(gs.Operator):
        pass

    tree = tree_in("unrolled", blocks_for("unrolled"))
    tx = gs.smooth_over_depth(LAYOUTS["unrolled"].depth, Nothing())
    with pytest.raises(TypeError, match=r"Nothing.*has no matrix"):
        tx.update(tree, tx.init(tree))
