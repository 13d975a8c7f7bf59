"""Rates along depth, against plain loops over the unrolled model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

LAYERS = gs.scanned("layers/")


def model(num_layers=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "embed": draw(5, 3),
        "layers": {"w": draw(num_layers, 3, 2), "norm": {"scale": draw(num_layers, 3)}},
        "head": draw(3),
    }


def scaled(tx, updates, state=None):
    state = tx.init(updates) if state is None else state
    return jax.jit(tx.update)(updates, state)


def check(found, updates, factors, rest=1.0):
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates["layers"]):
        new = found["layers"]
        for key in path:
            new = new[key.key]
        wanted = [f * np.asarray(u) for f, u in zip(factors, leaf, strict=True)]
        np.testing.assert_allclose(new, wanted, rtol=1e-6)
    for name in ("embed", "head"):
        np.testing.assert_allclose(
            found[name], rest * np.asarray(updates[name]), rtol=1e-6
        )


FACTORS = {
    "one number": (0.3, [0.3] * 4),
    "an array": (np.array([1.0, 2.0, 3.0, 4.0]), [1, 2, 3, 4]),
    "a decay": (gs.layer_wise_decay(0.5), [0.125, 0.25, 0.5, 1]),
    "a function of the depth": (
        gs.factors_fn(lambda n: 1 / np.arange(1, n + 1)),
        [1, 1 / 2, 1 / 3, 1 / 4],
    ),
    "a schedule": (lambda count: 0.5 ** (count + 1), [0.5] * 4),
    "a schedule of arrays": (
        lambda count: jnp.arange(1.0, 5.0) * (count + 1),
        [1, 2, 3, 4],
    ),
}


@pytest.mark.parametrize("name", FACTORS)
def test_every_layer_is_multiplied_by_its_own_factor(name):
    factors, wanted = FACTORS[name]
    found, _ = scaled(gs.scale_over_depth(LAYERS, factors), model())
    check(found, model(), wanted)


RESTS = {
    "left as it is": (None, 1.0),
    "a number": (0.2, 0.2),
    "one layer below the first": ("first", 0.5**4),
    "a function": (lambda path, leaf: 0.1 if "embed" in path or leaf.ndim else 9, 0.1),
}


@pytest.mark.parametrize("name", RESTS)
def test_the_rest_of_the_tree_is(name):
    rest, wanted = RESTS[name]
    tx = gs.scale_over_depth(LAYERS, gs.layer_wise_decay(0.5), rest=rest)
    check(scaled(tx, model())[0], model(), [0.125, 0.25, 0.5, 1], wanted)


def test_a_schedule_counts_its_steps_from_0():
    tx = gs.scale_over_depth(LAYERS, lambda count: count + 1.0)
    updates, state = model(), None
    for step in range(3):
        found, state = scaled(tx, updates, state)
        assert isinstance(state, gs.DepthSmoothingState)
        check(found, updates, [step + 1] * 4)


def test_it_is_layer_wise_decay_of_the_unrolled_model_under_partition():
    params = {f"layers_{i}": {"w": jnp.ones((3, 2)) * (i + 1)} for i in range(4)}
    params["embed"] = jnp.ones(3)
    scanned = {
        "layers": {"w": jnp.stack([params[f"layers_{i}"]["w"] for i in range(4)])},
        "embed": params["embed"],
    }
    tx = optax.chain(
        optax.adamw(1e-2),
        gs.scale_over_depth(LAYERS, gs.layer_wise_decay(0.5), rest="first"),
    )
    by_layer = {f"layers_{i}": optax.adamw(1e-2 * 0.5 ** (3 - i)) for i in range(4)}
    by_layer["embed"] = optax.adamw(1e-2 * 0.5**4)
    wanted_tx = optax.partition(by_layer, {name: name for name in params})
    found, _ = tx.update(scanned, tx.init(scanned), scanned)
    wanted, _ = wanted_tx.update(params, wanted_tx.init(params), params)
    for i in range(4):
        np.testing.assert_allclose(
            found["layers"]["w"][i], wanted[f"layers_{i}"]["w"], rtol=1e-5
        )
    np.testing.assert_allclose(found["embed"], wanted["embed"], rtol=1e-5)


def test_layers_count_from_the_first_of_the_stack_over_all_roles():
    updates = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3, 6)}
    updates["layers_5"]["extra"] = jnp.ones(3)
    tx = gs.scale_over_depth(gs.unrolled(r"layers_(\d+)/"), [1.0, 2.0, 3.0])
    found, _ = scaled(tx, updates)
    assert [float(found[f"layers_{i}"]["w"][0]) for i in range(3, 6)] == [1, 2, 3]
    assert float(found["layers_5"]["extra"][0]) == 3


def test_cycles_and_nested_scans_have_their_layers_in_depth_order():
    updates = {"layers": {f"layers_{p}": {"w": jnp.ones((2, 3))} for p in (0, 1)}}
    cycle = gs.scanned(r"layers_(\d+)/", stride=2)
    found, _ = scaled(gs.scale_over_depth(cycle, [1.0, 2.0, 3.0, 4.0]), updates)
    assert found["layers"]["layers_0"]["w"][:, 0].tolist() == [1, 3]
    assert found["layers"]["layers_1"]["w"][:, 0].tolist() == [2, 4]
    updates = {"layers": {"w": jnp.ones((2, 3, 2))}}
    nested = gs.scanned("layers/", axis=(0, 2))
    found, _ = scaled(gs.scale_over_depth(nested, [1.0, 2.0, 3.0, 4.0]), updates)
    assert found["layers"]["w"][:, 0].tolist() == [[1, 2], [3, 4]]


def test_two_stacks_of_one_chain_are_one_stack():
    depth = gs.first_match(
        gs.scanned("dense/", stack="decoder"),
        gs.scanned("moe/", start=2, stack="decoder"),
    )
    updates = {"dense": {"w": jnp.ones((2, 3))}, "moe": {"w": jnp.ones((2, 3))}}
    tx = gs.scale_over_depth(depth, gs.layer_wise_decay(0.5))
    found, _ = scaled(tx, updates)
    assert found["dense"]["w"][:, 0].tolist() == [0.125, 0.25]
    assert found["moe"]["w"][:, 0].tolist() == [0.5, 1]


def test_a_masked_part_of_the_model_has_the_rates_of_the_whole():
    params = {f"layers_{i}": {"w": jnp.ones(1)} for i in range(4)}
    params["embed"] = jnp.ones(1)
    depth = gs.unrolled(r"layers_(\d+)/")
    tx = gs.scale_over_depth(depth, gs.layer_wise_decay(0.5), rest="first")
    whole, _ = scaled(tx, params)
    for frozen in ((0, 1), (1,), (2, 3)):
        names = [f"layers_{i}" for i in frozen]
        mask = {name: name not in names for name in params}
        found, _ = scaled(optax.masked(tx, mask), params)
        for name in set(params) - set(names):
            assert jax.tree.leaves(found[name]) == jax.tree.leaves(whole[name])


def test_python_floats_are_updates_too():
    tx = gs.scale_over_depth(LAYERS, 0.5, rest=0.5)
    found, _ = scaled(tx, {"layers": {"w": jnp.ones((2, 3))}, "x": 1.0})
    assert float(found["x"]) == 0.5


def test_a_factor_of_1_returns_the_same_object():
    updates = model()
    tx = gs.scale_over_depth(LAYERS, 1.0)
    found, _ = tx.update(updates, tx.init(updates))
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (found, updates))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_the_product_is_rounded_once_to_the_dtype_of_the_leaf(dtype):
    updates = model(dtype=dtype)
    found, _ = scaled(gs.scale_over_depth(LAYERS, 0.3), updates)
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    wanted = (np.float32(0.3) * updates["layers"]["w"].astype(wide)).astype(dtype)
    assert found["layers"]["w"].dtype == dtype
    assert (found["layers"]["w"] == wanted).all()


def test_factors_may_be_injected_and_traced():
    tx = optax.inject_hyperparams(lambda scale: gs.scale_over_depth(LAYERS, scale))(0.3)
    found, _ = scaled(tx, model())
    check(found, model(), [0.3] * 4)

    @jax.jit
    def update(rate):
        tx = gs.scale_over_depth(LAYERS, gs.layer_wise_decay(rate))
        return tx.update(model(), tx.init(model()))[0]

    check(update(0.5), model(), [0.125, 0.25, 0.5, 1])


ERRORS = {
    "another depth": (
        lambda: scaled(gs.scale_over_depth(LAYERS, [1.0, 2.0]), model()),
        "has 2 numbers, but stack 'layers' has 4 layers.*layer_wise_decay",
    ),
    "first without a decay": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, rest="first"),
        "`rest='first'` needs factors that go on below",
    ),
    "first of a function": (
        lambda: gs.scale_over_depth(LAYERS, gs.factors_fn(np.ones), rest="first").init(
            model()
        ),
        "`rest='first'` of `scale_over_depth` needs factors that go on",
    ),
    "first of two depths": (
        lambda: gs.scale_over_depth(
            gs.scanned(r"(?:enc|dec)/"), gs.layer_wise_decay(0.5), rest="first"
        ).init(
            {"enc": {"w": jnp.ones((2, 9))}, "dec": {"w": jnp.ones((3, 9))}, "e": 1.0}
        ),
        r"stacks of \[2, 3\] layers",
    ),
    "a function of another shape": (
        lambda: gs.scale_over_depth(LAYERS, gs.factors_fn(lambda n: np.ones(3))).init(
            model()
        ),
        "must return one factor for each layer",
    ),
    "a decay of 0": (lambda: gs.layer_wise_decay(0.0), "one number > 0"),
    "a decay of a schedule": (
        lambda: gs.layer_wise_decay(lambda c: c),
        "must be a number",
    ),
    "no function": (lambda: gs.factors_fn(0.5), "wraps a function of the number"),
    "words": (
        lambda: gs.scale_over_depth(LAYERS, "half"),
        "`factors` must be a number",
    ),
    "a vector for the rest": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, rest=np.array([0.5, 0.5])),
        "`rest` must be one scalar",
    ),
    "a vector for a leaf of the rest": (
        lambda: gs.scale_over_depth(
            LAYERS, 0.5, rest=lambda path, leaf: np.ones(2)
        ).init(model()),
        r"`rest\('(?:embed|head)', leaf\)` must be one scalar",
    ),
    "no finite number for the rest": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, rest=float("nan")),
        "`rest` must be finite",
    ),
    "words for the rest": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, rest="last"),
        "`rest` must be a number, a scalar array, 'first' or a function",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_what_to_do(name):
    call, words = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_factors_show_the_call_that_makes_them():
    assert eval(repr(gs.layer_wise_decay(0.5))) == gs.layer_wise_decay(0.5)
    assert "factors_fn" in repr(gs.factors_fn(np.ones))
