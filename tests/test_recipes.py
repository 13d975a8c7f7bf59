"""The ready chains: smoothing in the right place of AdamW and Muon."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from optax import contrib

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

UNROLLED = gs.unrolled()
SHAPES = {"kernel": (4, 3), "bias": (3,)}
NUM_LAYERS = 3


def tree_of(seed, shapes=SHAPES, num_layers=NUM_LAYERS):
    blocks = oracle.random_blocks(num_layers, shapes=shapes, seed=seed)
    tree = {"embed": {"table": np.full((5,), 0.5, "float32")}}
    return jax.tree.map(jnp.asarray, {**tree, **oracle.unrolled_tree(blocks)})


def matrices(seed):
    """Nothing but matrices, in layers and outside."""
    tree = tree_of(seed, {"kernel": (4, 3)})
    tree["embed"] = {"table": jnp.cos(jnp.arange(15.0 + seed)[-15:]).reshape(3, 5)}
    return tree


def train(tx, state=None, trees=tree_of, steps=3, params=None):
    """The parameters after a few steps on fixed gradients, and the state."""
    params = trees(100) if params is None else params
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(steps):
        params, state = step(trees(seed), state, params)
    return params, state


def assert_same_training(a, b, trees=tree_of, rtol=1e-5):
    chex.assert_trees_all_close(
        train(a, trees=trees)[0], train(b, trees=trees)[0], rtol=rtol, atol=1e-7
    )


def smooth(operator=0.3, depth=UNROLLED, **kwargs):
    return gs.smooth_over_depth(depth, operator, **kwargs)


SMOOTHING = {
    "standard": smooth(),
    "radius": smooth(gs.window(0.3, radius=2)),
    "norm_preserving": smooth(variant="norm_preserving"),
    "directional": smooth(variant="directional", norm_scope="block"),
    "schedule": smooth(optax.linear_schedule(0.1, 0.5, 2)),
}
RECIPES = {
    "adamw": gs.adamw,
    "muon": lambda rate, smoothing: gs.muon(rate, UNROLLED, smoothing),
}


# AdamW.


@pytest.mark.parametrize("name", ["standard", "radius", "schedule"])
def test_adamw_is_adam_then_smoothing_then_decay_then_learning_rate(name):
    adam = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "eps_root": 1e-8, "nesterov": True}

    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    schedule = optax.linear_schedule(0.1, 0.01, 5)
    smoothing = SMOOTHING[name]
    recipe = gs.adamw(schedule, smoothing, **adam, weight_decay=0.2, mask=mask)
    by_hand = optax.chain(
        optax.scale_by_adam(**adam),
        smoothing,
        optax.add_decayed_weights(0.2, mask),
        optax.scale_by_learning_rate(schedule),
    )
    assert_same_training(recipe, by_hand)


def test_adamw_defaults_are_optaxs_and_a_tenth():
    by_hand = optax.chain(
        optax.scale_by_adam(),
        gs.smooth_over_depth(UNROLLED, 0.1),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(0.1),
    )
    recipe = gs.adamw(0.1, gs.smooth_over_depth(UNROLLED))
    assert_same_training(recipe, by_hand)
    assert isinstance(recipe, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mu_dtype": jnp.bfloat16}, {"weight_decay": 0.0}, {"mask": lambda p: p}],
    ids=["default", "mu_dtype", "no decay", "mask"],
)
def test_adamws_state_has_the_structure_of_optaxs(kwargs):
    learning_rate = optax.constant_schedule(0.1) if kwargs else 0.1
    if "mask" in kwargs:
        kwargs = {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)}
    params = tree_of(0)
    ours = gs.adamw(learning_rate, smooth(0.2), **kwargs)
    theirs = optax.adamw(learning_rate, **kwargs)
    state = ours.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))
    chex.assert_trees_all_equal(state, theirs.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, theirs.init(params))
    paths = [
        [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(s)
        ]
        for s in (train(ours)[1], train(theirs)[1])
    ]
    assert paths[0] == paths[1]


def test_a_plain_adamw_checkpoint_resumes_with_smoothing_on():
    params, state = train(optax.adamw(0.1, weight_decay=0.2))
    resumed = gs.adamw(0.1, smooth(0.3), weight_decay=0.2)
    grads = tree_of(7)
    out, new_state = resumed.update(grads, state, params)
    # By hand: Adam's update, smoothed, then decay and learning rate.
    direction, _ = optax.scale_by_adam().update(grads, state[0], params)
    smoothed = oracle.window([direction[f"layers_{i}"] for i in range(NUM_LAYERS)], 0.3)
    for i in range(NUM_LAYERS):
        for role, x in smoothed[i].items():
            expected = -0.1 * (x + 0.2 * np.asarray(params[f"layers_{i}"][role]))
            error = oracle.relative_error(out[f"layers_{i}"][role], expected)
            assert error < 1e-5
    # And back again.
    optax.adamw(0.1, weight_decay=0.2).update(grads, new_state, params)


def test_adamw_without_smoothing_is_optaxs():
    theirs = train(optax.adamw(0.1, weight_decay=0.1))
    for smoothing in (smooth(0.0), optax.identity()):
        ours = train(gs.adamw(0.1, smoothing, weight_decay=0.1))
        chex.assert_trees_all_equal(ours, theirs)


def test_adamw_works_under_inject_hyperparams():
    expected = gs.adamw(0.1, smooth(0.3), weight_decay=0.1)

    def of_alpha(learning_rate, alpha):
        return gs.adamw(learning_rate, smooth(alpha), weight_decay=0.1)

    tx = optax.inject_hyperparams(of_alpha)(learning_rate=0.1, alpha=0.3)
    assert set(tx.init(tree_of(0)).hyperparams) == {"learning_rate", "alpha"}
    assert_same_training(tx, expected, rtol=1e-3)
    tx = optax.inject_hyperparams(gs.adamw)(0.1, smooth(0.3), weight_decay=0.1)
    assert {"learning_rate", "weight_decay", "b1"} <= set(
        tx.init(tree_of(0)).hyperparams
    )
    assert_same_training(tx, expected, rtol=1e-3)


# SGD: a chain.


def test_smoothed_sgd_without_smoothing_is_optaxs():
    ours = optax.chain(
        gs.with_depth_smoothing(optax.trace(0.9), smooth(0)),
        optax.scale_by_learning_rate(0.1),
    )
    chex.assert_trees_all_equal(train(ours), train(optax.sgd(0.1, momentum=0.9)))


def test_smoothed_sgd_at_one_step_is_the_papers_equation():
    smoothing = smooth(0.2, gs.scanned("blocks/"))
    tx = optax.chain(smoothing, optax.scale_by_learning_rate(1.0))
    params = {"blocks": {"w": jnp.array([1.0, 10.0, 100.0])}}
    out, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(
        out["blocks"]["w"], [-1.9, -(8.0 + 10.1), -91.0], rtol=1e-6
    )


# Muon.


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"weight_decay": 0.2, "beta": 0.9, "ns_steps": 1, "nesterov": False},
        {"consistent_rms": 0.2, "adaptive": True, "eps": 1e-7, "ns_steps": 2},
        {"ns_coeffs": (3.0, -4.0, 2.0), "ns_steps": 2},
    ],
    ids=str,
)
def test_muon_without_smoothing_is_optaxs_on_unrolled_matrices(kwargs):
    ours = gs.muon(0.1, UNROLLED, smooth(0.0), **kwargs)
    assert_same_training(ours, optax.contrib.muon(0.1, **kwargs), matrices)


def test_muon_without_smoothing_is_optaxs_where_vectors_go_to_adam():
    kwargs = {"adam_b1": 0.8, "adam_b2": 0.95, "adam_eps_root": 1e-8, "ns_steps": 1}
    ours = gs.muon(0.1, UNROLLED, optax.identity(), **kwargs)
    assert_same_training(ours, optax.contrib.muon(0.1, **kwargs))


@pytest.mark.parametrize("name", ["norm_preserving", "directional", "schedule"])
def test_muon_smooths_the_orthogonalised_update_before_decay_and_learning_rate(name):
    smoothing = SMOOTHING[name]
    recipe = gs.muon(0.1, UNROLLED, smoothing, weight_decay=0.2, ns_steps=1)
    # optax's own muon at learning rate 1 without decay gives the direction.
    by_hand = optax.chain(
        optax.contrib.muon(1.0, ns_steps=1),
        optax.scale(-1.0),
        smoothing,
        optax.add_decayed_weights(0.2),
        optax.scale_by_learning_rate(0.1),
    )
    assert_same_training(recipe, by_hand, matrices)


def scanned(tree, axis):
    """The layers of an unrolled tree along `axis` (at most a role's rank)."""
    blocks = [tree[f"layers_{i}"] for i in range(NUM_LAYERS)]
    stacked = oracle.stacked_tree(blocks, axis)
    return {"embed": tree["embed"], "blocks": jax.tree.map(jnp.asarray, stacked)}


@pytest.mark.parametrize(("alpha", "axis"), [(0.3, 0), (0.3, 1), (0.0, 2)])
def test_muon_on_scanned_layers_is_muon_on_unrolled_ones(alpha, axis):
    shapes = {"kernel": (4, 3), "wide": (2, 5), "bias": (3,)}

    def unrolled_trees(seed):
        return tree_of(seed, shapes)

    def scanned_trees(seed):
        return scanned(tree_of(seed, shapes), axis)

    depth = gs.first_match(
        gs.scanned("blocks/", axis=axis).only(lambda path, leaf: leaf.ndim == 3),
        gs.scanned("blocks/", axis=min(axis, 1)),
    )
    unrolled = gs.muon(0.1, UNROLLED, smooth(alpha), ns_steps=2)
    expected, _ = train(unrolled, trees=unrolled_trees)
    stacked = gs.muon(0.1, depth, smooth(alpha, depth), ns_steps=2)
    got, _ = train(stacked, trees=scanned_trees)
    chex.assert_trees_all_close(got, scanned(expected, axis), rtol=2e-4, atol=1e-5)


def test_muon_on_nested_scans_is_muon_on_unrolled_layers():
    def nested_trees(seed):
        tree = scanned(tree_of(seed, num_layers=4, shapes={"kernel": (4, 3)}), 0)
        blocks = tree_of(seed, num_layers=4, shapes={"kernel": (4, 3)})
        kernels = jnp.stack([blocks[f"layers_{i}"]["kernel"] for i in range(4)])
        tree["blocks"] = {"kernel": kernels.reshape(2, 2, 4, 3)}
        return tree

    def unrolled_trees(seed):
        return tree_of(seed, num_layers=4, shapes={"kernel": (4, 3)})

    depth = gs.scanned("blocks/", axis=(0, 1))
    unrolled = gs.muon(0.1, UNROLLED, smooth(0.3), ns_steps=2)
    expected, _ = train(unrolled, trees=unrolled_trees)
    nested = gs.muon(0.1, depth, smooth(0.3, depth), ns_steps=2)
    got, _ = train(nested, trees=nested_trees)
    got = got["blocks"]["kernel"].reshape(4, 4, 3)
    for i in range(4):
        want = expected[f"layers_{i}"]["kernel"]
        np.testing.assert_allclose(got[i], want, rtol=2e-4, atol=1e-5)


def test_muon_gives_stacked_norm_scales_to_adam():
    # Read as one matrix, (layers, features) would be orthogonalised.
    depth = gs.scanned("blocks/")
    grads = {"blocks": {"scale": jnp.array([[1.0, -2.0], [3.0, -4.0], [0.5, 0.1]])}}
    params = jax.tree.map(jnp.zeros_like, grads)
    tx = gs.muon(0.1, depth, smooth(0.0, depth), nesterov=False)
    out, _ = tx.update(grads, tx.init(params), params)
    # Adam's first step is the sign.
    np.testing.assert_allclose(
        out["blocks"]["scale"], -0.1 * jnp.sign(grads["blocks"]["scale"]), rtol=1e-4
    )


def test_muon_smooths_what_adam_produces_as_well():
    grads = {"blocks": {"scale": jnp.array([[1.0], [3.0], [-2.0]])}}
    depth = gs.scanned("blocks/")
    tx = gs.muon(1.0, depth, smooth(0.5, depth), nesterov=False)
    out, _ = tx.update(grads, tx.init(grads), grads)
    # Signs 1, 1, -1, smoothed: 1, 0.5 + 0.25 (1 - 1) and -0.75 + 0.25.
    np.testing.assert_allclose(
        out["blocks"]["scale"][:, 0], [-1.0, -0.5, 0.5], rtol=1e-4
    )


# Every option of Muon, against optax's own on every layer of the unrolled model.


def some_matrices(tree):
    """Numbers as a user gives them: of scanned and of unrolled kernels alike."""

    def numbers(path, leaf):
        if path[-1].key != "kernel":
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2)

    return jax.tree_util.tree_map_with_path(numbers, tree)


def over_heads(tree):
    """(d, heads, k) kernels: a matrix for each head."""

    def numbers(path, leaf):
        if path[-1].key != "heads":
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 3, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, tree)


def kernels_decay(tree):
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key != "square", tree)


NEW_IN_0_2_8 = "preconditioning" in inspect.signature(contrib.muon).parameters
NEW = pytest.mark.skipif(not NEW_IN_0_2_8, reason="optax has it from 0.2.8 on")

# Several at once where none hides another.
MUON_OPTIONS = {
    "ns_coeffs, adam": {
        **{"ns_coeffs": (3.0, -4.0, 2.0), "ns_steps": 2},
        **{"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-4},
    },
    "ns_coeffs by step, mu_dtype": {
        **{"ns_coeffs": ((4.0, -6.9, 2.9), (3.7, -5.6, 2.3)), "ns_steps": 2},
        "mu_dtype": jnp.bfloat16,
    },
    "beta, adam_learning_rate": {
        **{"beta": 0.8, "ns_steps": 3, "adam_learning_rate": 0.3},
    },
    "eps, adam_weight_decay": {"eps": 0.1, "adam_weight_decay": 0.2},
    "nesterov, adam_learning_rate of a schedule": {
        "nesterov": False,
        "adam_learning_rate": optax.linear_schedule(0.3, 0.1, 2),
    },
    "adaptive": {"adaptive": True},
    "adaptive, in bfloat16": {"adaptive": True, "mu_dtype": jnp.bfloat16},
    "adaptive without momentum": {"adaptive": True, "nesterov": False, "beta": 0.0},
    "adaptive, numbers": {
        "adaptive": True,
        "muon_weight_dimension_numbers": some_matrices,
    },
    "adaptive, heads": {
        "adaptive": True,
        "muon_weight_dimension_numbers": over_heads,
    },
    "both decays": {
        **{"weight_decay": 0.3, "adam_weight_decay": 0.2},
        "adam_learning_rate": 0.05,
    },
    "both decays, masked": {
        **{"weight_decay": 0.3, "weight_decay_mask": kernels_decay},
        "adam_weight_decay": 0.2,
    },
    "numbers, consistent_rms": {
        "muon_weight_dimension_numbers": some_matrices,
        "consistent_rms": 0.2,
    },
    "spectral, ns_coeffs='standard'": {
        **{"preconditioning": "spectral", "ns_coeffs": "standard", "ns_steps": 2},
    },
    "aol, ns_coeffs='dion'": {
        **{"preconditioning": "aol", "ns_coeffs": "dion", "ns_steps": 5},
    },
    "aol, transposed numbers": {
        "preconditioning": "aol",
        "ns_steps": 2,
        "muon_weight_dimension_numbers": some_matrices,
    },
    "schatten": {"preconditioning": "schatten", "ns_steps": 2, "adaptive": True},
}


def options_of(name, axis=0):
    """A test parameter, skipped where the installed optax lacks an option."""
    options = MUON_OPTIONS[name]
    is_new = "preconditioning" in options or isinstance(options.get("ns_coeffs"), str)
    case = (options, axis)
    return pytest.param(*case, id=f"{name}, {axis}", marks=NEW if is_new else ())


@pytest.mark.parametrize(
    ("options", "axis"),
    [
        options_of(name, 1 if name in ("adaptive", "eps, adam_weight_decay") else 0)
        for name in MUON_OPTIONS
    ],
)
def test_muon_on_scanned_layers_is_optaxs_on_unrolled_ones(options, axis):
    """With every option: no layer sees another one."""
    shapes = {"kernel": (4, 3), "square": (3, 3), "bias": (3,)}
    if options.get("muon_weight_dimension_numbers") is over_heads:
        shapes = {"heads": (4, 2, 3), "bias": (3,)}
    options = {"ns_steps": 1, **options}

    def unrolled_trees(seed):
        return tree_of(seed, shapes)

    def scanned_trees(seed):
        return scanned(tree_of(seed, shapes), axis)

    depth = gs.scanned("blocks/", axis=axis)
    theirs = contrib.muon(0.1, **options)
    expected, _ = train(theirs, trees=unrolled_trees, steps=2)
    ours = gs.muon(0.1, depth, optax.identity(), **options)
    got, _ = train(ours, trees=scanned_trees, steps=2)
    chex.assert_trees_all_close(got, scanned(expected, axis), rtol=2e-4, atol=2e-5)


def test_muon_takes_every_option_of_the_installed_optax():
    theirs = inspect.signature(contrib.muon).parameters
    assert set(theirs) <= set(inspect.signature(gs.muon).parameters)


def test_muons_options_are_all_tried():
    tried = {option for options in MUON_OPTIONS.values() for option in options}
    options = set(inspect.signature(gs.muon).parameters)
    assert tried == options - {"learning_rate", "depth", "smoothing"}


@pytest.mark.parametrize("numbers", [(0, 1), (-3, 2), ((0, 1), 2), (1, (2, 0))])
def test_dimension_numbers_that_name_a_depth_axis_are_refused(numbers):
    params = {"blocks": {"kernel": jnp.ones((3, 4, 2))}}
    depth = gs.scanned("blocks/")
    numbers = {"blocks": {"kernel": contrib.MuonDimensionNumbers(*numbers)}}
    tx = gs.muon(0.1, depth, optax.identity(), muon_weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match="muon_weight_dimension_numbers") as info:
        tx.update(params, tx.init(params), params)
    assert "blocks/kernel" in str(info.value)
    assert "axis 0" in str(info.value)


@pytest.mark.parametrize("name", ["dion2", "muon", ""])
def test_the_name_of_no_preset_is_refused_at_construction(name):
    with pytest.raises(ValueError, match="ns_coeffs") as info:
        gs.muon(0.1, UNROLLED, smooth(), ns_coeffs=name)
    assert repr(name) in str(info.value)
    assert "0.2.8" in str(info.value)


def test_what_an_older_optax_lacks_is_refused_only_where_it_is_asked_for(monkeypatch):
    def scale_by_muon(ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov, adaptive):
        return optax.identity()

    monkeypatch.setattr(contrib, "scale_by_muon", scale_by_muon)
    with pytest.raises(ValueError, match=r"needs optax 0\.2\.8"):
        gs.muon(0.1, UNROLLED, smooth(), preconditioning="aol")
    gs.muon(0.1, UNROLLED, smooth())


def test_adams_leaves_decay_as_muons_unless_they_are_told_otherwise():
    kwargs = {"weight_decay": 0.2, "ns_steps": 1}
    depth = UNROLLED
    assert_same_training(
        gs.muon(0.1, depth, smooth(0.0), **kwargs),
        contrib.muon(0.1, adam_weight_decay=0.2, **kwargs),
    )
    assert_same_training(
        gs.muon(0.1, depth, smooth(0.0), adam_weight_decay=0.0, **kwargs),
        contrib.muon(0.1, **kwargs),
    )


# All of them.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_extra_arguments_and_compile_once(name):
    tx = RECIPES[name](0.1, smooth())
    params = tree_of(0)
    state = tx.init(params)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(grads, state, params):
        return tx.update(grads, state, params, value=0.0)

    for seed in range(2):
        out, state = update(tree_of(seed), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, params)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_as_strict_as_its_smoothing(name):
    params = tree_of(0)
    del params["layers_1"]
    with pytest.raises(ValueError, match=r"layers? 1\b"):
        RECIPES[name](0.1, smooth()).init(params)
    tx = RECIPES[name](0.1, smooth(strict=False))
    out, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)


def test_recipes_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        gs.adamw(0.1, smooth(), 0.9)
    with pytest.raises(TypeError, match="positional"):
        gs.muon(0.1, UNROLLED, smooth(), 0.9)


# -- Leaves that `depth` does not know -------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "tree", "unknown"),
    [
        (
            gs.scanned("blocks/kernel"),
            {"blocks": {"kernel": jnp.ones((3, 4, 2)), "scale": jnp.ones((3, 4))}},
            "blocks/scale",
        ),
        (
            gs.layouts.maxtext(),
            {
                "decoder": {
                    "layers": {"wo": jnp.ones((4, 3, 2)), "scale": jnp.ones((4, 3))},
                    "extra_layers": {
                        "wo": jnp.ones((4, 5, 2)),
                        "scale": jnp.ones((4, 5)),
                    },
                }
            },
            "decoder/extra_layers/scale",
        ),
        (
            gs.unrolled(r"layers_(\d+)/"),
            {
                **{f"layers_{i}": {"w": jnp.ones((4, 4))} for i in range(3)},
                "VmapQ_0": {
                    f"Dense_{i}": {
                        "kernel": jnp.ones((2, 4, 4)),
                        "bias": jnp.ones((2, 4)),
                    }
                    for i in range(2)
                },
            },
            "VmapQ_0/Dense_0/bias",
        ),
    ],
    ids=["a role", "a stack", "an ensemble"],
)
def test_muon_takes_no_leaf_that_looks_stacked_for_a_matrix(depth, tree, unknown):
    with pytest.raises(ValueError, match=r"look stacked") as info:
        gs.muon(0.1, depth, optax.identity()).init(tree)
    assert unknown in str(info.value)
    numbers = jax.tree.map(lambda _: None, tree)
    gs.muon(
        0.1,
        depth,
        optax.identity(),
        muon_weight_dimension_numbers=lambda params: numbers,
    ).init(tree)


# -- Two depths in one optimizer -------------------------------------------------------

MUON_PARAMS = {"blocks": {"kernel": jnp.ones((3, 4, 2)), "scale": jnp.ones((3, 4))}}


@pytest.mark.parametrize(
    ("depth", "smoothed"),
    [
        (gs.scanned("blocks/"), gs.scanned("blocks/", start=1)),
        (gs.scanned("blocks/"), gs.scanned("blocks/", axis=1)),
    ],
    ids=["another start", "another axis"],
)
def test_muon_refuses_a_smoothing_that_numbers_a_leaf_differently(depth, smoothed):
    # As deep inside as smoothings may be.
    smoothing = optax.chain(
        optax.identity(),
        optax.masked(gs.smooth_over_depth(smoothed, 0.2, strict=False), True),
    )
    optimizer = gs.muon(0.1, depth, smoothing)
    with pytest.raises(ValueError, match=r"`smoothing` and `depth` number leaf blocks"):
        optimizer.init(MUON_PARAMS)
    good = gs.muon(0.1, depth, optax.identity())
    state = (good.init(MUON_PARAMS)[0], optimizer.init({})[1], *good.init({})[2:])
    with pytest.raises(ValueError, match=r"`smoothing` and `depth` number leaf blocks"):
        optimizer.update(MUON_PARAMS, state, MUON_PARAMS)


def test_muon_takes_a_smoothing_of_less_and_a_depth_by_name():
    depth = gs.scanned("blocks/")
    narrower = gs.smooth_over_depth(depth.only_projections(), 0.3)
    for named in (depth, "scanned('blocks/')", depth.only(lambda path, leaf: False)):
        optimizer = gs.muon(0.1, named, narrower, ns_steps=1)
        state = optimizer.init(MUON_PARAMS)
        updates, _ = optimizer.update(MUON_PARAMS, state, MUON_PARAMS)
        assert jax.tree.structure(updates) == jax.tree.structure(MUON_PARAMS)


def test_a_numbering_is_held_against_no_other_optimizer():
    """What muon asks of its own smoothing ends with its call, also after an error."""
    with pytest.raises(ValueError, match="number leaf"):
        gs.muon(
            0.1,
            gs.scanned("blocks/"),
            gs.smooth_over_depth(gs.scanned("blocks/", start=1), 0.2),
        ).init(MUON_PARAMS)
    gs.smooth_over_depth(gs.scanned("blocks/", start=1), 0.2).init(MUON_PARAMS)
