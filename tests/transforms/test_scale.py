"""Rates along depth: what only `scale_over_depth` promises.

That it multiplies layer by layer wherever the layers are, in every wrapper of optax, is
in test_behaviors.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

LAYERS = gs.scanned("layers/")
UNROLLED = gs.unrolled(r"layers_(\d+)/")
DECAY = gs.layer_wise_decay(0.5)
BY_DECAY = [1 / 8, 1 / 4, 1 / 2, 1]


def model(num_layers=4, dtype="float32"):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "embed": draw(5, 3),
        "layers": {"w": draw(num_layers, 3, 2), "norm": {"scale": draw(num_layers, 3)}},
        "head": draw(3),
    }


def scaled(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def check(found, updates, factors, rest=1.0):
    factors = np.reshape(np.broadcast_to(factors, 4), (4, 1))
    layers = updates["layers"]
    for got, old, factor in (
        (found["layers"]["w"], layers["w"], factors[..., None]),
        (found["layers"]["norm"]["scale"], layers["norm"]["scale"], factors),
        *((found[name], updates[name], rest) for name in ("embed", "head")),
    ):
        np.testing.assert_allclose(got, factor * old, rtol=1e-6)


# What is multiplied by what.

# Name -> the factors, and those of the four layers at the first step.
FACTORS = {
    "one number": (0.3, 0.3),
    "an array": (np.array([1.0, 2.0, 3.0, 4.0]), [1, 2, 3, 4]),
    "an array of jax": (jnp.asarray([1.0, 2.0, 3.0, 4.0]), [1, 2, 3, 4]),
    "a list": ([1, 0, -3, 4], [1, 0, -3, 4]),
    "a decay": (DECAY, BY_DECAY),
    "a function of the depth": (
        gs.factors_fn(lambda n: 1 / np.arange(1, n + 1)),
        [1, 1 / 2, 1 / 3, 1 / 4],
    ),
    "a schedule": (lambda count: 0.5 ** (count + 1), 0.5),
    "a schedule of arrays": (
        lambda count: jnp.arange(1.0, 5.0) * (count + 1),
        [1, 2, 3, 4],
    ),
}
# Name -> `rest`, and what the rest is multiplied by.
RESTS = {
    "left as it is": (None, 1.0),
    "a number": (0.2, 0.2),
    "an array of jax": (jnp.asarray(0.2), 0.2),
    "one layer below the first": ("first", 0.5**4),
    "a function": (lambda path, leaf: 0.1 if "embed" in path or leaf.ndim else 9, 0.1),
}


def test_every_layer_and_the_rest_are_multiplied_by_factors_of_their_own():
    every = {
        ("factors", name): gs.scale_over_depth(LAYERS, factors)
        for name, (factors, _) in FACTORS.items()
    }
    every |= {
        ("rest", name): gs.scale_over_depth(LAYERS, DECAY, rest=rest)
        for name, (rest, _) in RESTS.items()
    }
    found = jax.jit(lambda u: [scaled(tx, u) for tx in every.values()])(model())
    found = dict(zip(every, found, strict=True))
    for name, (_, wanted) in FACTORS.items():
        check(found["factors", name], model(), wanted)
    for name, (_, wanted) in RESTS.items():
        check(found["rest", name], model(), BY_DECAY, wanted)


def test_a_schedule_counts_its_steps_from_0():
    tx, updates = gs.scale_over_depth(LAYERS, lambda count: count + 1.0), model()
    state, update = tx.init(updates), jax.jit(tx.update)
    for step in range(3):
        assert isinstance(state, gs.DepthSmoothingState)
        assert state.count == step
        found, state = update(updates, state)
        check(found, updates, step + 1)


def test_constant_factors_need_no_state():
    assert gs.scale_over_depth(LAYERS, DECAY).init(model()) == optax.EmptyState()


def test_factors_may_be_traced():
    @jax.jit
    def update(rate, updates):
        tx = gs.scale_over_depth(LAYERS, gs.layer_wise_decay(rate), rest="first")
        return scaled(tx, updates)

    check(update(0.5, model()), model(), BY_DECAY, 1 / 16)


def test_it_is_layer_wise_decay_of_the_unrolled_model_under_partition():
    params = {f"layers_{i}": np.float32([i + 1, -2]) for i in range(4)}
    params["embed"] = np.ones(3, np.float32)
    of_layers = np.stack([params[f"layers_{i}"] for i in range(4)])
    scanned = {"layers": of_layers, "embed": params["embed"]}
    tx = optax.chain(
        optax.adamw(1e-2), gs.scale_over_depth("scanned('layers')", DECAY, rest="first")
    )
    by_layer = {f"layers_{i}": optax.adamw(1e-2 * 0.5 ** (3 - i)) for i in range(4)}
    by_layer["embed"] = optax.adamw(1e-2 * 0.5**4)
    wanted_tx = optax.partition(by_layer, {name: name for name in params})

    @jax.jit
    def both(scanned, params):
        found, _ = tx.update(scanned, tx.init(scanned), scanned)
        wanted, _ = wanted_tx.update(params, wanted_tx.init(params), params)
        return found, wanted

    found, wanted = both(scanned, params)
    for i in range(4):
        np.testing.assert_allclose(found["layers"][i], wanted[f"layers_{i}"], rtol=1e-5)
    np.testing.assert_allclose(found["embed"], wanted["embed"], rtol=1e-5)


# Which layer of its stack a layer is.


def ones(*shape):
    return np.ones(shape, np.float32)


# Name -> the depth, the factors, a tree of ones, and the factors in it.
PLACES = {
    "from the first layer that the stack has, in all roles": (
        UNROLLED,
        [1.0, 2.0, 3.0],
        {
            **{f"layers_{i}": {"w": ones()} for i in (3, 4)},
            "layers_5": {"w": ones(), "x": ones(2)},
        },
        {
            **{"layers_3": {"w": 1}, "layers_4": {"w": 2}},
            "layers_5": {"w": 3, "x": [3, 3]},
        },
    ),
    "in cycles": (
        gs.scanned(r"layers_(\d+)/", stride=2),
        [1.0, 2.0, 3.0, 4.0],
        {"layers": {f"layers_{p}": {"w": ones(2, 1)} for p in (0, 1)}},
        {"layers": {"layers_0": {"w": [[1], [3]]}, "layers_1": {"w": [[2], [4]]}}},
    ),
    "in nested scans": (
        gs.scanned("layers/", axis=(0, 2)),
        [1.0, 2.0, 3.0, 4.0],
        {"layers": {"w": ones(2, 1, 2)}},
        {"layers": {"w": [[[1, 2]], [[3, 4]]]}},
    ),
    "on a last axis": (
        gs.scanned("layers/", axis=-1),
        [1.0, 2.0],
        {"layers": {"w": ones(1, 2)}},
        {"layers": {"w": [[1, 2]]}},
    ),
    "in two parts of one chain": (
        gs.first_match(
            gs.scanned("dense/", stack="net"), gs.scanned("moe/", start=2, stack="net")
        ),
        DECAY,
        {"dense": {"w": ones(2)}, "moe": {"w": ones(2)}},
        {"dense": {"w": [1 / 8, 1 / 4]}, "moe": {"w": [1 / 2, 1]}},
    ),
    "in each of two stacks": (
        gs.scanned("(?:enc|dec)/"),
        DECAY,
        {"enc": {"w": ones(2)}, "dec": {"w": ones(3)}},
        {"enc": {"w": [1 / 2, 1]}, "dec": {"w": [1 / 4, 1 / 2, 1]}},
    ),
    "for Python floats": (
        LAYERS,
        0.25,
        {"layers": {"w": ones(2)}, "x": 1.0},
        {"layers": {"w": [0.25, 0.25]}, "x": 0.5},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_layers_are_counted(name):
    depth, factors, updates, expected = PLACES[name]
    found = scaled(gs.scale_over_depth(depth, factors, rest=0.5), updates)
    assert jax.tree.map(lambda x: np.asarray(x).tolist(), found) == expected


@pytest.mark.parametrize("frozen", [(0, 1), (1,), (2, 3)])
def test_a_masked_part_of_the_model_has_the_rates_of_the_whole(frozen):
    params = {f"layers_{i}": {"w": ones(1)} for i in range(4)} | {"embed": ones(1)}
    tx = gs.scale_over_depth(UNROLLED, DECAY, rest="first")
    whole = scaled(tx, params)
    frozen = [f"layers_{i}" for i in frozen]
    found = scaled(
        optax.masked(tx, {name: name not in frozen for name in params}), params
    )
    expected = whole | {name: params[name] for name in frozen}
    assert jax.tree.map(float_of, found) == jax.tree.map(float_of, expected)


def float_of(x):
    return float(x[0])


# Numbers.


def test_a_factor_of_1_returns_the_same_object():
    updates, factors = model(), (1.0, np.ones(4), jnp.ones(4))
    for factor in factors:
        found = scaled(gs.scale_over_depth(LAYERS, factor, rest=1.0), updates)
        same = [
            a is b for a, b in zip(*map(jax.tree.leaves, (found, updates)), strict=True)
        ]
        assert all(same) == (factor is not factors[-1])
        check(found, updates, 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "float64"])
def test_the_product_is_rounded_once_to_the_dtype_of_the_leaf(dtype, enable_x64):
    with enable_x64():
        updates = {"layers": (np.arange(12).reshape(4, 3) / 7).astype(jnp.dtype(dtype))}
        found = scaled(gs.scale_over_depth("scanned('layers')", 0.3), updates)["layers"]
    wide = dtype if dtype in ("complex64", "float64") else "float32"
    factor = np.float64(0.3) if dtype == "float64" else np.float32(0.3)
    wanted = (factor * updates["layers"].astype(wide)).astype(found.dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


# Factors as values, and bad input.


def test_factors_are_those_of_any_depth_and_show_the_call_that_makes_them():
    assert DECAY.of(3).tolist() == [0.25, 0.5, 1]
    assert DECAY.below_first(3) == 0.125
    assert (
        eval(repr(DECAY), {"layer_wise_decay": gs.layer_wise_decay, "gs": gs}) == DECAY
    )
    by_number = gs.factors_fn(np.ones)
    assert by_number.of(2).tolist() == [1, 1]
    assert "factors_fn" in repr(by_number)
    assert hash(by_number) == hash(gs.factors_fn(np.ones))


def init(tree, *args, depth=LAYERS, **kwargs):
    return gs.scale_over_depth(depth, *args, **kwargs).init(tree)


ENC_DEC = {"enc": {"w": ones(2)}, "dec": {"w": ones(3)}, "e": 1.0}
ALL_MASKED = {"layers": optax.MaskedNode(), "embed": ones(2)}

# Name -> the call, and what its error says.
ERRORS = {
    "another depth": (
        lambda: init(model(), [1.0, 2.0]),
        "has 2 numbers, but stack 'layers' has 4 layers.*layer_wise_decay",
    ),
    "another depth, later": (
        lambda: scaled(gs.scale_over_depth(LAYERS, lambda count: [1.0, 2.0]), model()),
        "has 2 numbers, but stack 'layers' has 4 layers",
    ),
    "a matrix": (
        lambda: gs.scale_over_depth(LAYERS, np.eye(4)),
        r"`factors` must be one number or an array \(L,\)",
    ),
    "first without a decay": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, rest="first"),
        r"`rest='first'` needs factors that go on below.*`rest=0.1`",
    ),
    "first of a function": (
        lambda: init(model(), gs.factors_fn(np.ones), rest="first"),
        "`rest='first'` of `scale_over_depth` needs factors that go on.*factors_fn",
    ),
    "first of two depths": (
        lambda: init(ENC_DEC, DECAY, depth=gs.scanned("(?:enc|dec)/"), rest="first"),
        r"not clear.*stacks of \[2, 3\] layers.*rest=lambda path, leaf",
    ),
    "first of no depth": (
        lambda: init(ALL_MASKED, DECAY, rest="first", strict=False),
        "not clear: all layers are masked.*outside of the mask",
    ),
    "a function of another shape": (
        lambda: init(model(), gs.factors_fn(lambda n: np.ones(3))),
        r"must return one factor for each layer, of shape \(4,\).*\(3,\)",
    ),
    "a decay of 0": (lambda: gs.layer_wise_decay(0.0), "one number > 0, but is 0"),
    "a decay below 0": (lambda: gs.layer_wise_decay(-0.5), "one number > 0"),
    "a decay for each layer": (
        lambda: gs.layer_wise_decay(np.ones(2)),
        r"one number > 0.*`layer_wise_decay\(0.75\)`",
    ),
    "a decay of a schedule": (
        lambda: gs.layer_wise_decay(lambda c: c),
        "must be a number.*scale_over_depth\\(depth, lambda count",
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
        lambda: init(model(), 0.5, rest=lambda path, leaf: np.ones(2)),
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
    "a number for strict": (
        lambda: gs.scale_over_depth(LAYERS, 0.5, strict=1),
        "`strict` must be True or False",
    ),
    "nothing to scale": (
        lambda: init({"x": ones(2)}, 0.5),
        "matched none of the 1 leaves.*: x",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_what_to_do(name):
    call, words = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()
