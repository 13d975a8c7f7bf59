"""`per_layer` on a scanned model is `inner` on each layer of the unrolled one.

Updates and state alike, for whatever optax has, wherever the layers are.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layer_by_layer import assert_close, check_law
from layer_layouts import LAYOUTS, REST, drawn
from optax import contrib

import gradsmooth_optax as gs

# `.ci/core` leaves out what is slow.
pytestmark = pytest.mark.core

LAYERS = gs.scanned("layers/")


def ones(*shape):
    return np.ones(shape, np.float32)


ONES = {"w": ones(3, 4)}
ONLY = {"layers": ONES}


def check(inner, layout):
    num_layers, made, depth = LAYOUTS[layout]
    check_law(gs.per_layer(inner, depth), inner, num_layers, made)


@functools.cache
def of_every_kind():
    """Norms of the tree and of leaves, factored moments, momentum, and a count."""
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.trace(0.9),
        optax.scale_by_trust_ratio(),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_law_holds_wherever_the_layers_are(layout):
    check(of_every_kind(), layout)


# All of optax's transformations that take updates and nothing more.

SGD = optax.sgd(0.1, momentum=0.9)
# What optax has no default for, and what has one that changes nothing here.
ARGUMENTS = {
    "adaptive_grad_clip": (0.1,),
    "add_decayed_weights": (0.01,),
    "apply_if_finite": (SGD, 3),
    "apply_every": (2,),
    "chain": (optax.trace(0.9), optax.scale(-1.0)),
    "clip": (0.05,),
    "clip_by_block_rms": (0.05,),
    "clip_by_global_norm": (0.05,),
    "ema": (0.9,),
    "flatten": (SGD,),
    "masked": (SGD, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "named_chain": (("a", optax.trace(0.9)), ("b", optax.scale(0.1))),
    "partition": (
        {True: SGD, False: optax.scale(0.1)},
        lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ),
    "scale": (2.0,),
    "scale_by_learning_rate": (0.1,),
    "scale_by_schedule": (lambda count: 1 / (count + 1),),
    "trace": (0.9,),
}
# Of the whole model by their nature, or in need of more than updates.
EXCLUDED = {
    *("add_noise", "noisy_sgd"),  # equal noise in every layer, warned of
    *("hutchinson_estimator_diag_hessian", "sophia"),  # need the loss
    *("lbfgs", "scale_by_lbfgs"),  # need the whole model: an error
    *("momo", "momo_adam", "polyak_sgd", "scale_by_polyak"),  # need the loss's value
    "reduce_on_plateau",  # the same
    "scale_by_muon",  # needs the dimension numbers of one tree; `muon` is here
}


def made_by_optax(name, function):
    """The transformation that this function of optax makes, if it makes one."""
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
    ]
    args = ARGUMENTS.get(name, (0.1,) if needed == ["learning_rate"] else ())
    if name in EXCLUDED or (needed and not args):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        try:
            made = function(*args)
        except TypeError:
            return None
    return made if isinstance(made, optax.GradientTransformation) else None


# Those whose numbers are compared, too: of every kind of state.
COMPARED = ("adafactor", "apply_if_finite", "flatten", "lamb", "muon", "partition")


@pytest.mark.slow
def test_on_a_scanned_model_it_is_any_of_optaxs_on_each_layer():
    num_layers, layout, depth = LAYOUTS["axis 1"]
    shapes = {"mlp": {"kernel": (4, 6), "bias": (6,)}}
    layer, params = drawn(0, shapes), layout([drawn(0, shapes)] * num_layers)
    found = {
        name: inner
        for module in (optax, contrib)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if (inner := made_by_optax(name, function)) is not None
    }
    assert len(found) >= 60
    for name, inner in found.items():
        tx = gs.per_layer(inner, depth)
        of_layer = jax.eval_shape(inner.init, layer)
        state = jax.eval_shape(tx.init, params)
        out, new_state = jax.eval_shape(tx.update, params, state, params)
        assert shapes_of(out) == shapes_of(params), name
        # What is of one layer is there for all of them, with their axis where it is.
        sizes = [x.size for x in jax.tree.leaves(of_layer)]
        assert sorted(x.size for x in jax.tree.leaves(state)) == sorted(
            num_layers * size for size in sizes
        ), name
        assert shapes_of(new_state) == shapes_of(state), name


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_on_a_scanned_model_the_numbers_are_those_of_each_layer(name):
    function = getattr(optax, name, None) or getattr(contrib, name)
    check(made_by_optax(name, function), "axis 1")


# How it runs.


def test_a_scanned_stack_is_traced_once_whatever_its_depth():
    tx = gs.per_layer(optax.lamb(0.1), LAYERS)

    def num_equations(num_layers):
        params = {"layers": {"w": jnp.ones((num_layers, 4))}}
        update = jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p)[0])
        return len(update(params).jaxpr.eqns)

    assert num_equations(2) == num_equations(50)


def test_inner_gets_extra_arguments_whole():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx, updates = gs.per_layer(inner, LAYERS), {"layers": ONES, "embed": np.ones(2)}
    found, _ = tx.update(updates, tx.init(updates), value=np.float32(2.0))
    assert_close(found, jax.tree.map(lambda u: 2 * u, updates))


def test_every_dtype_of_a_layer_stays_what_it_is():
    shapes = {"a": (3, 4), "b": (3, 4, 2), "c": (3,)}
    dtypes = {"a": "bfloat16", "b": "float32", "c": "float16"}
    updates = {"layers": {k: jnp.ones(shapes[k], dtypes[k]) for k in shapes}}
    tx = gs.per_layer(optax.clip_by_global_norm(1.0), LAYERS)
    clipped, _ = tx.update(updates, tx.init(updates))
    assert {k: x.dtype.name for k, x in clipped["layers"].items()} == dtypes
    np.testing.assert_allclose(clipped["layers"]["b"], 1 / np.sqrt(13), rtol=1e-6)


def test_parameters_are_those_of_the_same_place_whatever_the_names():
    params = {"layers": ONES, "x.y": np.ones(1), "x": {"y": 2 * np.ones(1)}}
    zeros = jax.tree.map(np.zeros_like, params)
    found, _ = run(optax.add_decayed_weights(1.0), zeros, params=params)
    assert float(found["x"]["y"][0]) == 2
    # By their paths, if they have more leaves than the updates.
    zeros = jax.tree.map(np.zeros_like, ONLY)
    params = ONLY | {"frozen": np.ones(5)}
    found, _ = run(optax.add_decayed_weights(3.0), zeros, params=params)
    assert np.all(found["layers"]["w"] == 3)


def test_flax_nnx_trains_a_stacked_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, layers):
            self.layers = layers

    @nnx.vmap
    def layers(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    model = Model(layers(jax.random.split(jax.random.key(0), 3)))
    kernels = np.asarray(model.layers.kernel[...])
    tx = gs.per_layer(optax.clip_by_global_norm(1.0), LAYERS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # The parameters are gradients as good as any.
    optimizer.update(model, nnx.state(model, nnx.Param))
    norms = np.linalg.norm(kernels, axis=(1, 2), keepdims=True)
    expected = kernels + kernels / np.maximum(norms, 1)
    np.testing.assert_allclose(model.layers.kernel[...], expected, rtol=1e-5)


# Where the state is.


def params_of(layout):
    num_layers, made, depth = LAYOUTS[layout]
    shapes = {"mlp": {"kernel": (4, 6), "bias": (6,)}}
    trees = [drawn(i, shapes) for i in range(num_layers)]
    return made(trees) | drawn(99, REST), depth


def shapes_of(tree):
    return jax.tree.map(jnp.shape, tree)


def test_a_state_has_the_layers_on_the_axis_of_the_parameter_or_in_front():
    params, depth = params_of("axis 1")
    state = gs.per_layer(optax.scale_by_adam(), depth).init(params)
    assert shapes_of(state.mu) == shapes_of(params)
    assert shapes_of(state.count) == {"layers": (3,), "(rest)": ()}
    # What has another shape than the parameter has them in front.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    state = gs.per_layer(factored, depth).init(params)
    assert state.v_row["layers"]["mlp"]["kernel"].shape == (3, 4)
    assert state.v_col["layers"]["mlp"]["kernel"].shape == (3, 6)
    # Unrolled layers have one entry each.
    params, depth = params_of("unrolled")
    state = gs.per_layer(optax.scale_by_adam(), depth).init(params)
    assert state.mu.keys() == params.keys()
    assert shapes_of(state.count) == {"layers": {0: (), 1: (), 2: ()}, "(rest)": ()}
    one, depth = {"layers_0": ONES}, gs.unrolled(r"layers_(\d+)/")
    state = gs.per_layer(optax.scale_by_adam(), depth).init(one)
    assert shapes_of(state.count) == {"layers": {0: ()}}


def test_numbers_of_layers_may_be_strings_as_some_checkpoints_give_them_back():
    params, depth = params_of("unrolled")
    tx = gs.per_layer(optax.scale_by_adam(), depth)
    state = tx.init(params)
    layers = {str(i): count for i, count in state.count["layers"].items()}
    restored = state._replace(count=state.count | {"layers": layers})
    shapes = jax.eval_shape(tx.update, params, restored)
    assert shapes == jax.eval_shape(tx.update, params, state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tree_map_params_maps_the_state(layout):
    params, depth = params_of(layout)
    tx = gs.per_layer(optax.adamw(0.1), depth)
    state = tx.init(params)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: str(path), params)
    mapped = optax.tree_map_params(
        tx, lambda _, path: path, state, paths, transform_non_params=lambda _: "other"
    )
    assert mapped[0].mu == paths
    assert mapped[0].count == "other"


def test_without_a_tree_like_the_parameters_it_is_a_state_for_each_stack():
    def init(params):
        if not jax.tree.leaves(params):
            raise ValueError("no parameters")  # so that a placeholder tells nothing
        return {"norm": sum(jnp.sum(x) for x in jax.tree.leaves(params))}

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * state["norm"], updates), state

    inner = optax.GradientTransformation(init, update)
    params, depth = params_of("axis 1")
    state = gs.per_layer(inner, depth).init(params)
    assert isinstance(state, gs.StatesByStack)
    assert state.states["layers"]["norm"].shape == (3,)
    check(inner, "axis 1")


def test_nothing_is_left_of_the_state_of_a_stateless_inner():
    tx = gs.per_layer(optax.clip_by_block_rms(1.0), LAYERS)
    assert tx.init(ONLY) == optax.EmptyState()


def test_trees_without_leaves_have_the_state_of_inner():
    tx = gs.per_layer(optax.adam(0.1), LAYERS)
    masked = {"layers": {"w": optax.MaskedNode()}}
    state = tx.init(masked)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adam(0.1).init(masked))
    updates, _ = tx.update(masked, state)
    assert updates == masked


# The rest of the tree.


def test_the_rest_may_have_a_transformation_of_its_own():
    params = {"layers": ONES, "embed": np.float32([1.0, -2.0])}
    tx = gs.per_layer(optax.sgd(0.5), LAYERS, rest=optax.sgd(2.0, momentum=0.5))
    state = tx.init(params)
    for factor in (2, 3):
        updates, state = tx.update(params, state, params)
        assert isinstance(state, gs.PerLayerState)
        np.testing.assert_allclose(updates["embed"], -factor * params["embed"])
        np.testing.assert_allclose(updates["layers"]["w"], -0.5 * ONES["w"])


def test_identity_passes_the_rest_on_as_the_same_object():
    params = {"layers": ONES, "embed": jnp.ones(2)}
    tx = gs.per_layer(optax.sgd(0.1), LAYERS, rest=optax.identity())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["embed"] is params["embed"]


def test_masks_and_none_pass_through():
    params = {"layers": ONES | {"frozen": optax.MaskedNode()}}
    params |= {"none": None, "head": np.ones(2)}
    tx = gs.per_layer(optax.adam(0.1), LAYERS)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_layer_that_some_roles_lack_is_no_gap():
    updates = {f"layers_{i}": {"w": ones(2)} for i in range(3)}
    updates["layers_1"]["extra"] = ones(3)
    found, _ = run(optax.clip_by_global_norm(1.0), updates, gs.unrolled())
    np.testing.assert_allclose(found["layers_0"]["w"], 1 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(found["layers_1"]["extra"], 1 / np.sqrt(5), rtol=1e-6)


def test_without_strict_a_gap_is_none_and_ranked_closes_it():
    updates = {f"layers_{i}": {"w": ones(4)} for i in (0, 1, 3)}
    clip = optax.clip_by_global_norm(1.0)
    for depth, strict in ((gs.unrolled(), False), (gs.ranked(gs.unrolled()), True)):
        found, _ = run(clip, updates, depth, strict=strict)
        np.testing.assert_allclose(found["layers_3"]["w"], 1 / 2, rtol=1e-6)


@pytest.mark.parametrize("roles", [("z", "y", "x"), ("w", "w/b", "w/a/c")])
def test_roles_may_have_another_order_than_leaves_and_be_above_one_another(roles):
    updates = {"a": 1 * ones(2, 1), "b": 2 * ones(2, 2), "c": 3 * ones(2, 1)}
    names = dict(zip("abc", roles, strict=True))

    def depth(path, leaf):
        return gs.Depth("net", names[path[0]], axis=0)

    found, state = run(optax.trace(0.5), updates, depth)
    assert_close(found, updates)
    assert_close(state.trace, updates)


# Bad input.


def run(inner, updates, depth=LAYERS, params=None, strict=True):
    tx = gs.per_layer(inner, depth, strict=strict)
    params = updates if params is None else params
    return tx.update(updates, tx.init(updates), params)


def run_with(state, updates=None, **kwargs):
    """An update of a state of something else."""
    tx, updates = gs.per_layer(optax.adam(0.1), LAYERS, **kwargs), updates or ONLY
    return tx.update(updates, state, updates)


def state_of(tree, depth=LAYERS, inner=None, **kwargs):
    return gs.per_layer(inner or optax.adam(0.1), depth, **kwargs).init(tree)


def rebuilds(function):
    return optax.stateless(lambda updates, params: function(updates))


FIVE = {"layers": {"w": np.ones((5, 4), np.float32)}}
BOTH = {"layers": ONES, "embed": np.ones(2, np.float32)}

# Name -> the call, and what its error says.
ERRORS = {
    "no transformation": (
        lambda: gs.per_layer(optax.adam, LAYERS),
        r"`inner` must be an optax.GradientTransformation.*Write `per_layer",
    ),
    "no transformation for the rest": (
        lambda: gs.per_layer(optax.adam(0.1), LAYERS, rest="outer"),
        r"`rest` must be an optax.GradientTransformation",
    ),
    "a line search": (
        lambda: state_of(ONLY, inner=optax.lbfgs()),
        "L-BFGS.*needs the whole model.*outside",
    ),
    "another shape": (
        lambda: run(
            rebuilds(lambda u: jax.tree.map(lambda x: jnp.stack([x, x]), u)),
            ONLY,
        ),
        r"must keep the shapes.*\(2, 4\) of \(4,\).*layers/w.*chain\(per_layer",
    ),
    "another structure": (
        lambda: run(rebuilds(lambda u: {"new": u}), ONLY),
        "must keep the structure.*'layers'.*chain\\(per_layer",
    ),
    "another shape of the rest": (
        lambda: run_with(
            state_of(BOTH, rest=optax.identity()),
            BOTH,
            rest=rebuilds(lambda u: u | {"embed": np.ones(3)}),
        ),
        r"the rest of the tree must keep its shapes.*\(3,\) of \(2,\), of embed",
    ),
    "another structure of the rest": (
        lambda: run_with(
            state_of(BOTH, rest=optax.identity()), BOTH, rest=rebuilds(lambda u: {})
        ),
        "the rest of the tree must keep its structure",
    ),
    "another structure of the state": (
        lambda: run(
            optax.GradientTransformation(lambda p: 1.0, lambda u, s, p=None: (u, (s,))),
            ONLY,
        ),
        "`inner` of `per_layer` changes the structure of its state",
    ),
    "roles that disagree": (
        lambda: run(
            optax.adam(0.1),
            {"layers": {"a": np.ones((3, 4)), "b": np.ones((2, 4))}},
            strict=False,
        ),
        "'layers' that disagree about its layers.*layers/b holds layers 0, 1 along",
    ),
    "a layer twice": (
        lambda: run(
            optax.adam(0.1),
            {"a_0": {"w": np.ones(2)}, "b_0": {"w": np.ones(3)}},
            gs.unrolled(r"_(\d+)/", stack="s"),
        ),
        "gives layer 0 of stack 's' for role 'w' to a_0/w and to b_0/w",
    ),
    "a missing layer": (
        lambda: run(
            optax.adam(0.1), {f"layers_{i}": ONES for i in (0, 1, 3)}, gs.unrolled()
        ),
        "finds layers 0, 1, 3 of stack 'layers', but nothing of layer 2.*strict=False",
    ),
    "a state of the plain transformation": (
        lambda: run_with(optax.adam(0.1).init(ONLY)),
        "`state` of `per_layer` was made for another grouping",
    ),
    "a state of another depth": (
        lambda: run_with(state_of({"layers_0": ONES, "layers_1": ONES}, gs.unrolled())),
        "`state` of `per_layer` was made for another grouping",
    ),
    "a state of another inner": (
        lambda: run_with(state_of(ONLY, inner=optax.sgd(0.1, 0.9))),
        "`state` of `per_layer` was made for another grouping",
    ),
    "a state of another number of layers": (
        lambda: run_with(state_of(FIVE)),
        r"has an array of shape \(5,.*for stack 'layers' of 3 layers",
    ),
    "a state without one of the rest": (
        lambda: run_with(state_of(ONLY), rest=optax.identity()),
        "must be a PerLayerState.*Start anew.*PerLayerState\\(state, rest.init",
    ),
    "a rate that is set for all layers": (
        lambda: gs.per_layer(optax.inject_hyperparams(optax.sgd)(0.1), LAYERS).update(
            ONLY,
            optax.inject_hyperparams(optax.sgd)(0.1).init(ONLY),
        ),
        "one value for all layers. To set a rate, inject it outside",
    ),
    "parameters of another depth": (
        lambda: run(optax.lamb(0.1), ONLY, params=FIVE),
        r"`params` of `per_layer` has shape \(5, 4\) at layers/w.*have \(3, 4\)",
    ),
    "parameters of another tree": (
        lambda: run(optax.lamb(0.1), ONLY, params={"layers": {}}),
        "`params` of `per_layer` has no leaf layers/w",
    ),
    "parameters that are there twice": (
        lambda: run(
            optax.lamb(0.1),
            ONLY,
            params={"layers": ONES, "x": {"y": np.ones(1)}, "x/y": np.ones(1)},
        ),
        "`params` of `per_layer` has two leaves x/y",
    ),
    "stacks of one name": (
        lambda: run(
            optax.adam(0.1),
            {"a": np.ones((2, 3)), "b": np.ones((2, 3))},
            lambda path, leaf: gs.Depth({"a": 1, "b": "1"}[path[0]], "w", axis=0),
        ),
        "need names that differ as text",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_what_to_do(name):
    call, words = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_equal_noise_in_all_layers_is_warned_of():
    tx = gs.per_layer(optax.add_noise(0.1, 0.5, 0), LAYERS)
    with pytest.warns(gs.DepthWarning, match="same in every layer"):
        tx.init(ONLY)
