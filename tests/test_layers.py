"""What a user's own operator may rely on, when it is written against `Layers` alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from own_operators import AlikeWindow

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

SHAPES = {"kernel": (2, 3), "bias": (3,)}


def blocks_of(num_layers, seed=0):
    """One dict of arrays per layer, with norms that differ by up to 16."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-2, 3, num_layers)
    return [
        {name: size * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for size in sizes
    ]


def stacked(blocks, axis=0):
    def leaf(name):
        return jnp.asarray(np.stack([b[name] for b in blocks], axis), "float32")

    return {"blocks": {name: leaf(name) for name in SHAPES}}


def unrolled(blocks):
    return {
        f"layers_{i}": {n: jnp.asarray(x, "float32") for n, x in block.items()}
        for i, block in enumerate(blocks)
    }


def mixed(blocks):
    """The first three layers are stacked, the others have a leaf each."""
    return stacked(blocks[:3]) | {
        f"layers_{i}": {n: jnp.asarray(x, "float32") for n, x in block.items()}
        for i, block in enumerate(blocks)
        if i >= 3
    }


LAYOUTS = {
    "stacked": (gs.scanned("blocks/"), stacked),
    "stacked on axis 1": (
        gs.scanned("blocks/", axis=1).only(lambda path, leaf: "kernel" in path),
        lambda blocks: stacked(blocks, 1),
    ),
    "unrolled": (gs.unrolled(r"layers_(\d+)/"), unrolled),
    "mixed": (
        gs.first_match(
            gs.scanned("blocks/", stack="s"), gs.unrolled(r"layers_(\d+)/", stack="s")
        ),
        mixed,
    ),
}


def layer(tree, layout, index, name):
    """One parameter of one layer of a tree of this layout."""
    if layout == "stacked on axis 1":
        return np.take(np.asarray(tree["blocks"][name]), index, 1)
    if layout == "stacked" or (layout == "mixed" and index < 3):
        return tree["blocks"][name][index]
    return tree[f"layers_{index}"][name]


def names_of(layout):
    return ("kernel",) if layout == "stacked on axis 1" else tuple(SHAPES)


def times(factors, blocks):
    pairs = zip(factors, blocks, strict=True)
    return [{name: f * x for name, x in block.items()} for f, block in pairs]


def updated(tx, tree, state=None):
    return jax.jit(tx.update)(tree, tx.init(tree) if state is None else state)[0]


def check(tree, layout, blocks, rtol=2e-5):
    for i, name in itertools.product(range(len(blocks)), names_of(layout)):
        found, want = layer(tree, layout, i, name), blocks[i][name]
        np.testing.assert_allclose(found, want, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("variant", "norm_scope"),
    [
        ("standard", "param"),
        ("norm_preserving", "param"),
        ("norm_preserving", "block"),
        ("directional", "param"),
        ("directional", "block"),
    ],
)
def test_an_operator_that_looks_at_the_updates_works_in_every_layout_and_variant(
    layout, variant, norm_scope
):
    depth, tree_of = LAYOUTS[layout]
    blocks = blocks_of(7)
    tx = gs.smooth_over_depth(
        depth, AlikeWindow(0.4), variant=variant, norm_scope=norm_scope, strict=False
    )
    found = updated(tx, tree_of(blocks))
    blocks = [{name: block[name] for name in names_of(layout)} for block in blocks]
    want = oracle.couple(
        blocks, lambda b: oracle.alike_window(b, 0.4, 2.0), variant, norm_scope
    )
    check(found, layout, want)


def test_its_strength_may_be_a_schedule_and_may_be_injected():
    depth, tree_of = LAYOUTS["stacked"]
    blocks = blocks_of(5)
    want = oracle.alike_window(blocks, 0.4, 2.0)
    tx = gs.smooth_over_depth(depth, AlikeWindow(lambda count: 0.1 * count))
    check(
        updated(tx, tree_of(blocks), gs.DepthSmoothingState(jnp.int32(4))),
        "stacked",
        want,
    )
    injected = optax.inject_hyperparams(
        lambda alpha: gs.smooth_over_depth(depth, AlikeWindow(alpha))
    )(alpha=0.4)
    check(updated(injected, tree_of(blocks)), "stacked", want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_without_a_matrix_are_composed_and_repeated_in_turn(layout):
    depth, tree_of = LAYOUTS[layout]
    blocks = blocks_of(6, seed=1)
    names = names_of(layout)
    want = [{n: b[n] for n in names} for b in blocks]
    want = oracle.alike_window(want, 0.4, 2.0)
    want = oracle.alike_window(want, 0.4, 2.0)
    want = oracle.smooth(want, lambda n: oracle.window_matrix(n, 0.2))
    operator = gs.compose(gs.repeat(AlikeWindow(0.4), 2), gs.window(0.2))
    assert not operator.has_matrix
    check(updated(gs.smooth_over_depth(depth, operator), tree_of(blocks)), layout, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shifted_gives_the_layer_there_and_where_none_is_the_layer_itself_or_zero(
    layout,
):
    depth, tree_of = LAYOUTS[layout]
    blocks = blocks_of(5)

    @dataclasses.dataclass(frozen=True, eq=False)
    class Shift(gs.Operator):
        offset: int
        missing: str

        def couple(self, layers):
            return layers.shifted(self.offset, self.missing)

    for offset, missing in itertools.product((-4, -1, 0, 2), ("self", "zero")):
        tx = gs.smooth_over_depth(depth, Shift(offset, missing))
        none = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        want = [
            blocks[i + offset]
            if 0 <= i + offset < 5
            else (block if missing == "self" else none)
            for i, block in enumerate(blocks)
        ]
        check(updated(tx, tree_of(blocks)), layout, want, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_difference_is_that_to_the_layer_there_and_zero_where_none_is(layout):
    depth, tree_of = LAYOUTS[layout]
    blocks = blocks_of(5)

    @dataclasses.dataclass(frozen=True, eq=False)
    class Difference(gs.Operator):
        offset: int

        def couple(self, layers):
            return layers.difference(self.offset)

    for offset in (-4, -1, 2):
        want = [
            {
                name: blocks[i + offset][name] - x if 0 <= i + offset < 5 else 0 * x
                for name, x in block.items()
            }
            for i, block in enumerate(blocks)
        ]
        tx = gs.smooth_over_depth(depth, Difference(offset))
        check(updated(tx, tree_of(blocks)), layout, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_per_layer_are_those_of_a_plain_loop(layout):
    """Norms, inner products, cosines, positions and what exists."""
    depth, tree_of = LAYOUTS[layout]
    blocks, names = blocks_of(5), names_of(layout)

    def vector(block, name, scope):
        chosen = names if scope == "block" else (name,)
        return np.concatenate([block[n].ravel() for n in chosen])

    def after(i):
        return blocks[min(i + 1, 4)], i < 4

    def inner(i, name, scope):
        other, is_there = after(i)
        return is_there * vector(blocks[i], name, scope) @ vector(other, name, scope)

    def cosine(i, name, scope):
        other, _ = after(i)
        norms = [np.linalg.norm(vector(b, name, scope)) for b in (blocks[i], other)]
        return inner(i, name, scope) / (norms[0] * norms[1])

    numbers = {
        "norms": (
            lambda u, s: u.norms(s),
            lambda i, n, s: np.linalg.norm(vector(blocks[i], n, s)),
        ),
        "inner": (lambda u, s: u.inner(u.shifted(1), s), inner),
        "cosine": (lambda u, s: u.cosine(u.shifted(1), s), cosine),
        "exists": (lambda u, s: u.exists(-2), lambda i, n, s: float(i >= 2)),
        "position": (lambda u, s: u.positions()[0], lambda i, n, s: i),
        "length": (lambda u, s: u.positions()[1], lambda i, n, s: 5),
        "arithmetic": (
            lambda u, s: 1 - (2 * u.positions()[0] - 1) / 4 + (u.exists(1) > 0.5) ** 2,
            lambda i, n, s: 1 - (2 * i - 1) / 4 + (i < 4),
        ),
    }
    ones = [{n: np.ones(shape) for n, shape in SHAPES.items()} for _ in blocks]
    for (of_layers, want), scope in itertools.product(
        numbers.values(), ("param", "block")
    ):

        @dataclasses.dataclass(frozen=True, eq=False)
        class Shown(gs.Operator):
            def couple(self, layers, of_layers=of_layers, scope=scope):
                one = layers.map(jnp.ones_like)
                return one.scaled(of_layers(layers, scope))

        found = updated(gs.smooth_over_depth(depth, Shown()), tree_of(blocks))
        expected = [
            {n: want(i, n, scope) * ones[i][n] for n in SHAPES} for i in range(5)
        ]
        check(found, layout, expected)


def test_where_chooses_by_layer_and_with_norms_of_gives_the_norms_of_others():
    depth, tree_of = LAYOUTS["stacked"]
    blocks = blocks_of(4)
    blocks[2] = {name: 0 * x for name, x in blocks[2].items()}

    @dataclasses.dataclass(frozen=True, eq=False)
    class AtTheNextNorm(gs.Operator):
        def couple(self, layers):
            after = layers.shifted(1)
            return layers.with_norms_of(after, "block").where(after.norms() > 0, after)

    found = updated(gs.smooth_over_depth(depth, AtTheNextNorm()), tree_of(blocks))
    norm = [np.sqrt(sum((x**2).sum() for x in b.values())) for b in blocks]
    ratios = [norm[1] / norm[0], 0.0, 0.0, 1.0]
    check(found, "stacked", times(ratios, blocks))


def test_layers_and_their_numbers_pass_through_cond_and_scan():
    depth, tree_of = LAYOUTS["stacked"]
    blocks = blocks_of(4)

    @dataclasses.dataclass(frozen=True, eq=False)
    class OftenSmoothed(gs.Operator):
        def couple(self, layers):
            def once(u, _):
                return u + (u.shifted(1) - u).scaled(0.25) + (u.shifted(-1) - u).scaled(
                    0.25
                ), None

            wide = layers.map(jnp.asarray)
            smooth, _ = jax.lax.scan(once, wide, None, length=3)
            return jax.lax.cond(
                jnp.array(True), lambda: smooth, lambda: wide.scaled(0.0)
            )

    found = updated(gs.smooth_over_depth(depth, OftenSmoothed()), tree_of(blocks))
    matrix = np.linalg.matrix_power(oracle.window_matrix(4, 0.5), 3)
    check(found, "stacked", oracle.smooth(blocks, lambda n: matrix))


# -- `layer_scale` ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_scale_multiplies_every_layer_by_its_factor(layout):
    depth, tree_of = LAYOUTS[layout]
    blocks = blocks_of(5)
    factors = np.array([0.0, 0.5, 1.0, 2.0, -1.0])
    for given, each in (
        (factors, factors),
        (jnp.asarray(factors), factors),
        (0.25, np.full(5, 0.25)),
        (lambda count: 0.5 * jnp.asarray(factors), 0.5 * factors),
    ):
        tx = gs.smooth_over_depth(depth, gs.layer_scale(given))
        want = [
            {n: f * x for n, x in b.items()} for f, b in zip(each, blocks, strict=True)
        ]
        check(updated(tx, tree_of(blocks)), layout, want)


def test_layer_scale_also_scales_a_layer_that_is_alone():
    updates = {"layers_0": {"w": jnp.ones(2)}, "layers_2": {"w": jnp.ones(2)}}
    depth = gs.unrolled()
    for operator in (
        gs.layer_scale(0.5),
        gs.compose(gs.window(0.3), gs.layer_scale(0.5)),
        gs.repeat(gs.layer_scale(0.5), 1),
    ):
        tx = gs.smooth_over_depth(depth, operator, strict=False)
        found = updated(tx, updates)
        assert jax.tree.leaves(jax.tree.map(float, jax.tree.map(jnp.mean, found))) == [
            0.5,
            0.5,
        ]
        np.testing.assert_array_equal(operator.matrix(1), [[0.5]])


def test_layer_scale_composes_by_its_matrix():
    operator = gs.compose(gs.window(0.5), gs.layer_scale([1.0, 2.0]))
    want = np.diag([1.0, 2.0]) @ oracle.window_matrix(2, 0.5)
    np.testing.assert_allclose(operator.matrix(2), want)


def test_layer_scale_of_another_length_names_the_group_and_the_run():
    updates = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)}
    tx = gs.smooth_over_depth(gs.unrolled(), gs.layer_scale([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"2 layers.*run of 3.*'w', layers 0 to 2"):
        tx.update(updates, tx.init(updates))


@pytest.mark.parametrize("factors", [True, "0.5", [[1.0]], [float("nan")], None])
def test_layer_scale_refuses_what_is_no_factor(factors):
    with pytest.raises((TypeError, ValueError), match="`factors`"):
        gs.layer_scale(factors)


# -- Errors ----------------------------------------------------------------------------


def test_an_operator_with_neither_matrix_nor_couple_says_what_it_needs():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Nothing(gs.Operator):
        pass

    updates = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)}
    tx = gs.smooth_over_depth(gs.unrolled(), Nothing())
    with pytest.raises(TypeError, match=r"Nothing.*has no matrix"):
        tx.update(updates, tx.init(updates))


def test_a_couple_that_returns_no_layers_is_an_error_that_names_the_operator():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Arrays(gs.Operator):
        def couple(self, layers):
            return layers.norms()

    updates = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)}
    tx = gs.smooth_over_depth(gs.unrolled(), Arrays())
    with pytest.raises(TypeError, match=r"`couple` of .*Arrays.*LayerValues"):
        tx.update(updates, tx.init(updates))


@pytest.mark.parametrize(
    "couple",
    [
        lambda layers: layers.scaled(np.ones(3)),
        lambda layers: layers.scaled("0.5"),
        lambda layers: layers.scaled(layers.norms() * jnp.ones(3)),
        lambda layers: layers.shifted(1, missing="wrap"),
        lambda layers: layers.scaled(lambda num_layers: np.ones(2)),
        lambda layers: layers.norms("layer"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(couple):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Wrong(gs.Operator):
        def couple(self, layers):
            return couple(layers)

    updates = {f"layers_{i}": {"w": jnp.ones(3)} for i in range(3)}
    tx = gs.smooth_over_depth(gs.unrolled(), Wrong())
    with pytest.raises((TypeError, ValueError), match=r"must be|one number per layer"):
        tx.update(updates, tx.init(updates))
