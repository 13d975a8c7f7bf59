"""The ready chains: smoothing in the right place of AdamW and Muon.

Life in optax's wrappers, and Muon's numbers with a smoothing, are in test_behaviors.py.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layer_by_layer import check_law
from layer_layouts import LAYOUTS
from optax import contrib
from transformations import (
    GRADIENTS,
    PARAMS,
    ROWS,
    assert_steps,
    each,
    quick_jit,
    run,
    tree_of,
)

import gradsmooth_optax as gs

# `.ci/core` leaves out what is slow.
pytestmark = pytest.mark.core

SCANNED = gs.scanned("blocks/")


def smooth(operator=0.3, depth=SCANNED, **kwargs):
    return gs.smooth_over_depth(depth, operator, **kwargs)


def matrices_only(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def program(tx):
    """What a step computes."""
    params = tree_of(PARAMS)
    return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


# AdamW.

SMOOTHINGS = {
    "standard": lambda: smooth(),
    "block": lambda: smooth(variant="directional", norm_scope="block"),
    "schedule": lambda: smooth(optax.linear_schedule(0.1, 0.5, 2)),
}
ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "eps_root": 1e-8, "nesterov": True}
# Name -> options of `adamw`, those of them that are of `scale_by_adam`, and the others.
ADAMW = {
    "defaults": ({}, {}, (1e-4, None)),
    "every option": (
        {**ADAM, "mu_dtype": jnp.bfloat16, "weight_decay": 0.2, "mask": matrices_only},
        {**ADAM, "mu_dtype": jnp.bfloat16},
        (0.2, matrices_only),
    ),
    "no decay": ({"weight_decay": 0.0}, {}, (0.0, None)),
}


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("options", ADAMW)
def test_adamw_is_adam_then_smoothing_then_decay_then_learning_rate(smoothing, options):
    options, of_adam, of_decay = ADAMW[options]
    smoothing = SMOOTHINGS[smoothing]()
    rate = optax.linear_schedule(0.1, 0.01, 5)
    recipe = gs.adamw(rate, smoothing, **options)
    by_hand = optax.chain(
        optax.scale_by_adam(**of_adam),
        smoothing,
        optax.add_decayed_weights(*of_decay),
        optax.scale_by_learning_rate(rate),
    )
    assert isinstance(recipe, optax.GradientTransformationExtraArgs)
    assert program(recipe) == program(by_hand)


@pytest.mark.parametrize("options", ADAMW)
@pytest.mark.parametrize("rate", [0.1, optax.constant_schedule(0.1)])
def test_adamws_state_is_optaxs_and_so_is_adamw_without_smoothing(options, rate):
    options, *_ = ADAMW[options]
    theirs, params = optax.adamw(rate, **options), tree_of(PARAMS)
    for smoothing in (smooth(), smooth(0.0), optax.identity()):
        ours = gs.adamw(rate, smoothing, **options)
        state = ours.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))
        chex.assert_trees_all_equal(state, theirs.init(params))
    assert program(ours) == program(theirs)
    assert program(gs.adamw(rate, smooth(0.0), **options)) == program(theirs)


def test_adamw_works_under_inject_hyperparams():
    tx = optax.inject_hyperparams(gs.adamw)(0.1, smooth(), weight_decay=0.1)
    params = tree_of(PARAMS)
    state = tx.init(params)
    assert {"learning_rate", "weight_decay", "b1"} <= set(state.hyperparams)
    jax.eval_shape(tx.update, params, state, params)


def test_adamw_trains_complex_parameters():
    gradients = [
        each(lambda x, y: (x + 1j * y).astype(np.complex64), *pair)
        for pair in itertools.pairwise(GRADIENTS)
    ]
    row, params = ROWS["adamw"], gradients[0]
    outs, _ = run(row.make(), gradients[:2], params)
    assert_steps(outs, [row.twin(gradients[:t], params) for t in (1, 2)])


# Muon: with every option each layer is what optax's makes of that layer alone.


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


# Name -> options, several at once where none hides another, and the layout.
MUON_OPTIONS = {
    "coefficients": (
        {
            **{"ns_coeffs": (3.0, -4.0, 2.0), "ns_steps": 2, "beta": 0.8},
            **{"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-4},
            "adam_learning_rate": 0.3,
        },
        "axis 0",
    ),
    "coefficients by step": (
        {
            **{"ns_coeffs": ((4.0, -6.9, 2.9), (3.7, -5.6, 2.3)), "ns_steps": 2},
            **{"mu_dtype": jnp.bfloat16, "eps": 0.1, "adam_weight_decay": 0.2},
        },
        "axis 1",
    ),
    "dimension numbers": (
        {
            "muon_weight_dimension_numbers": some_matrices,
            **{"consistent_rms": 0.2, "nesterov": False},
            "adam_learning_rate": optax.linear_schedule(0.3, 0.1, 2),
        },
        "axis 0",
    ),
    "decays": (
        {
            **{"weight_decay": 0.3, "weight_decay_mask": kernels_decay},
            **{"adam_weight_decay": 0.2, "adam_learning_rate": 0.05},
        },
        "axis 0",
    ),
    "adaptive": ({"adaptive": True}, "axis 1"),
    "adaptive heads in bfloat16": (
        {
            **{"adaptive": True, "mu_dtype": jnp.bfloat16},
            "muon_weight_dimension_numbers": over_heads,
        },
        "axis 0",
    ),
    "adaptive without momentum": (
        {"adaptive": True, "nesterov": False, "beta": 0.0},
        "axis 0",
    ),
    "spectral": (
        {"preconditioning": "spectral", "ns_coeffs": "standard", "ns_steps": 2},
        "axis 0",
    ),
    "aol": (
        {
            **{"preconditioning": "aol", "ns_coeffs": "dion", "ns_steps": 5},
            "muon_weight_dimension_numbers": some_matrices,
        },
        "axis 0",
    ),
    "schatten": ({"preconditioning": "schatten", "adaptive": True}, "axis 0"),
}
OF_ITS_OWN = {"learning_rate", "depth", "smoothing"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUON_OPTIONS)
def test_muon_with_every_option_is_optaxs_on_each_layer(name):
    options, layout = MUON_OPTIONS[name]
    options = {"ns_steps": 1, **options}
    is_new = "preconditioning" in options or isinstance(options.get("ns_coeffs"), str)
    if is_new and "preconditioning" not in inspect.signature(contrib.muon).parameters:
        pytest.skip("optax has it from 0.2.8 on")
    num_layers, made, depth = LAYOUTS[layout]
    ours = gs.muon(0.1, depth, optax.identity(), **options)
    which = "heads" if "heads" in name else "square"
    check_law(ours, contrib.muon(0.1, **options), num_layers, made, which, tol=2e-4)


@pytest.mark.parametrize("layout", ["axis 1", "last axis", "unrolled", "nested scans"])
def test_muon_is_optaxs_on_each_layer_wherever_the_layers_are(layout):
    num_layers, made, depth = LAYOUTS[layout]
    ours = gs.muon(0.1, depth, smooth(0.0, depth), weight_decay=0.2, ns_steps=1)
    check_law(ours, optaxs_muon(), num_layers, made, tol=2e-4)


@functools.cache
def optaxs_muon():
    # Adam's leaves decay as Muon's unless they are told otherwise.
    return contrib.muon(0.1, weight_decay=0.2, adam_weight_decay=0.2, ns_steps=1)


def test_muons_options_are_those_of_optax_and_all_are_tried():
    theirs = set(inspect.signature(contrib.muon).parameters)
    ours = set(inspect.signature(gs.muon).parameters)
    tried = {option for options, _ in MUON_OPTIONS.values() for option in options}
    assert theirs <= ours
    assert tried == ours - OF_ITS_OWN
    defaults = inspect.signature(contrib.muon).parameters
    for name, parameter in inspect.signature(gs.muon).parameters.items():
        if name in theirs - {"learning_rate", "adam_weight_decay"}:
            assert parameter.default == defaults[name].default, name


@pytest.mark.parametrize("smoothing", ["block", "schedule"])
def test_muon_smooths_its_direction_before_decay_and_learning_rate(smoothing):
    smoothing = SMOOTHINGS[smoothing]()
    options = {"ns_steps": 1, "weight_decay": 0.2}
    params = tree_of(PARAMS)
    recipe = gs.muon(0.1, SCANNED, smoothing, **options)
    # At a learning rate of 1 and without decay it is its direction.
    direction = gs.muon(1.0, SCANNED, optax.identity(), ns_steps=1)
    by_hand = optax.chain(
        direction,
        optax.scale(-1.0),
        smoothing,
        optax.add_decayed_weights(0.2),
        optax.scale_by_learning_rate(0.1),
    )

    @quick_jit
    def both(params):
        return [
            tx.update(params, tx.init(params), params)[0] for tx in (recipe, by_hand)
        ]

    found, expected = both(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_muon_takes_matrices_without_entries():
    params = {"blocks": {"w": jnp.zeros((3, 0, 4)), "v": jnp.ones((3, 4, 4))}}
    tx = gs.muon(1e-3, SCANNED, smooth(), ns_steps=1)
    updates, _ = quick_jit(lambda p: tx.update(p, tx.init(p), p))(params)
    assert updates["blocks"]["w"].shape == (3, 0, 4)
    assert np.isfinite(updates["blocks"]["v"]).all()


# Which leaves are matrices.

KERNEL_AND_SCALE = {"kernel": jnp.ones((3, 4, 2)), "scale": jnp.ones((3, 4))}
MUON_PARAMS = {"blocks": KERNEL_AND_SCALE}


def kinds_of(tx, params):
    """Whether Muon keeps a momentum of a leaf."""
    mu = tx.init(params)[0].inner_states["muon"].inner_state[0].mu
    return jax.tree.map(
        lambda x: not isinstance(x, optax.MaskedNode),
        mu,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def test_a_matrix_is_a_leaf_of_two_axes_in_each_layer_or_what_is_said_to_be_one():
    numbers = contrib.MuonDimensionNumbers(1, 2)
    params = MUON_PARAMS | {"embed": jnp.ones((5, 4)), "head": jnp.ones((3, 2, 2))}

    def kinds(kernel, embed):
        blocks = {"kernel": kernel, "scale": False}
        return {"blocks": blocks, "embed": embed, "head": False}

    blocks = {"kernel": numbers, "scale": None}
    no_embed = {"blocks": blocks, "embed": None, "head": None}
    # A prefix of the parameters is enough.
    embed_only = {"blocks": None, "embed": contrib.MuonDimensionNumbers(), "head": None}
    for given, expected in (
        (None, kinds(kernel=True, embed=True)),
        (no_embed, kinds(kernel=True, embed=False)),
        (lambda tree: no_embed, kinds(kernel=True, embed=False)),
        (embed_only, kinds(kernel=False, embed=True)),
    ):
        tx = gs.muon(
            0.1, SCANNED, optax.identity(), muon_weight_dimension_numbers=given
        )
        assert kinds_of(tx, params) == expected


@pytest.mark.parametrize("numbers", [(0, 1), (-3, 2), ((0, 1), 2), (1, (2, 0))])
def test_dimension_numbers_that_name_a_depth_axis_are_refused(numbers):
    params = {"blocks": {"kernel": jnp.ones((3, 4, 2))}}
    numbers = {"blocks": {"kernel": contrib.MuonDimensionNumbers(*numbers)}}
    tx = gs.muon(0.1, SCANNED, optax.identity(), muon_weight_dimension_numbers=numbers)
    state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"muon_weight_dimension_numbers.*axis 0"
    ) as info:
        jax.eval_shape(tx.update, params, state, params)
    assert "blocks/kernel" in str(info.value)


MAXTEXT = {
    "decoder": {
        "layers": {"wo": (4, 3, 2), "scale": (4, 3)},
        "extra_layers": {"wo": (4, 5, 2), "scale": (4, 5)},
    }
}
ENSEMBLE = {
    **{f"layers_{i}": {"w": (4, 4)} for i in range(3)},
    "VmapQ_0": {f"Dense_{i}": {"kernel": (2, 4, 4), "bias": (2, 4)} for i in range(2)},
}


@pytest.mark.parametrize(
    ("depth", "shapes", "unknown"),
    [
        (
            "scanned('blocks/kernel')",
            {"blocks": {"kernel": (3, 4, 2), "scale": (3, 4)}},
            "blocks/scale",
        ),
        ("maxtext", MAXTEXT, "decoder/extra_layers/scale"),
        (r"unrolled(r'layers_(\d+)/')", ENSEMBLE, "VmapQ_0/Dense_0/bias"),
    ],
    ids=["a role", "a stack", "an ensemble"],
)
def test_muon_takes_no_leaf_that_looks_stacked_for_a_matrix(depth, shapes, unknown):
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    tree = jax.tree.map(jnp.ones, shapes, **is_shape)
    with pytest.raises(ValueError, match="look stacked") as info:
        gs.muon(0.1, depth, optax.identity()).init(tree)
    assert unknown in str(info.value)
    numbers = jax.tree.map(lambda _: None, tree)
    tx = gs.muon(
        0.1, depth, optax.identity(), muon_weight_dimension_numbers=lambda p: numbers
    )
    tx.init(tree)


# Errors.


@pytest.mark.parametrize("name", ["dion2", "muon", ""])
def test_the_name_of_no_preset_is_refused_at_construction(name):
    with pytest.raises(ValueError, match=r"ns_coeffs.*0\.2\.8") as info:
        gs.muon(0.1, SCANNED, smooth(), ns_coeffs=name)
    assert repr(name) in str(info.value)


def test_as_many_rows_of_coefficients_as_steps_and_steps_in_an_array_are_taken():
    gs.muon(0.1, SCANNED, smooth(), ns_coeffs=np.ones((5, 3)))
    gs.muon(0.1, SCANNED, smooth(), ns_coeffs=np.ones((1, 3)), ns_steps=jnp.asarray(1))


def test_what_an_older_optax_lacks_is_refused_only_where_it_is_asked_for(monkeypatch):
    def scale_by_muon(ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov, adaptive):
        return optax.identity()

    monkeypatch.setattr(contrib, "scale_by_muon", scale_by_muon)
    with pytest.raises(ValueError, match=r"needs optax 0\.2\.8"):
        gs.muon(0.1, SCANNED, smooth(), preconditioning="aol")
    gs.muon(0.1, SCANNED, smooth())


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        gs.adamw(0.1, smooth(), 0.9)
    with pytest.raises(TypeError, match="positional"):
        gs.muon(0.1, SCANNED, smooth(), 0.9)


def test_a_recipe_is_as_strict_as_its_smoothing():
    params, depth = {f"layers_{i}": {"w": jnp.ones(3)} for i in (0, 2)}, gs.unrolled()
    for recipe in (gs.adamw, lambda rate, s: gs.muon(rate, depth, s)):
        with pytest.raises(ValueError, match=r"layers? 1\b"):
            recipe(0.1, smooth(depth=depth)).init(params)
        tx = recipe(0.1, smooth(depth=depth, strict=False))
        out, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, params)


# Two depths in one optimizer.


@pytest.mark.parametrize("other", [{"start": 1}, {"axis": 1}], ids=str)
def test_muon_refuses_a_smoothing_that_numbers_a_leaf_differently(other):
    smoothed = smooth(0.2, gs.scanned("blocks/", **other), strict=False)
    # As deep inside as smoothings may be.
    smoothing = optax.chain(optax.identity(), optax.masked(smoothed, True))
    optimizer = gs.muon(0.1, SCANNED, smoothing)
    words = r"`smoothing` and `depth` number leaf blocks"
    with pytest.raises(ValueError, match=words):
        optimizer.init(MUON_PARAMS)
    good = gs.muon(0.1, SCANNED, optax.identity())
    state = (good.init(MUON_PARAMS)[0], optimizer.init({})[1], *good.init({})[2:])
    with pytest.raises(ValueError, match=words):
        optimizer.update(MUON_PARAMS, state, MUON_PARAMS)
    # It is held against no other optimizer, also after an error.
    smoothed.init(MUON_PARAMS)


def test_muon_takes_a_smoothing_of_less_and_a_depth_by_name():
    narrower = smooth(depth=SCANNED.only_projections())
    for named in (
        SCANNED,
        "scanned('blocks/')",
        SCANNED.only(lambda path, leaf: False),
    ):
        optimizer = gs.muon(0.1, named, narrower, ns_steps=1)
        state = optimizer.init(MUON_PARAMS)
        updates, _ = jax.eval_shape(optimizer.update, MUON_PARAMS, state, MUON_PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, MUON_PARAMS)
        assert kinds_of(optimizer, MUON_PARAMS)["blocks"] == {
            "kernel": True,
            "scale": False,
        }
