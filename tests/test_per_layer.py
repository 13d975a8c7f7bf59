"""`per_layer` on a scanned model is `inner` on each layer of the unrolled one."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gradsmooth_optax as gs

SHAPES = {
    "attn": {"kernel": (4, 4)},
    "mlp": {"kernel": (4, 6), "bias": (6,)},
    "norm": {"scale": (4,)},
}
REST = {"embed": (5, 4), "head": {"bias": (3,)}}
NUM_STEPS = 2


def drawn(seed, shapes):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def layers(num_layers, seed):
    return [drawn(seed + i, SHAPES) for i in range(num_layers)]


def stacked(trees, axis=0):
    return jax.tree.map(lambda *xs: np.stack(xs, min(axis, xs[0].ndim)), *trees)


# -- Layouts: where the layers of a list are in a tree ---------------------------------


def on_axis(axis):
    return lambda trees: {"layers": stacked(trees, axis)}


def unrolled(trees):
    return {f"layers_{i}": tree for i, tree in enumerate(trees)}


def cycle(trees):
    return {"layers": {f"layers_{p}": stacked(trees[p::2]) for p in (0, 1)}}


def with_remainder(trees):
    return cycle(trees[:4]) | {"layers_remainder": {"layers_0": trees[4]}}


def nested(trees):
    return {"layers": stacked([stacked(trees[:2]), stacked(trees[2:])])}


def two_stacks(trees):
    return {
        "encoder": {"layers": stacked(trees[:2], 1)},
        "decoder": unrolled(trees[2:]),
    }


LAYOUTS = {
    "axis 0": (3, on_axis(0), gs.scanned("layers/")),
    "axis 1": (3, on_axis(1), gs.scanned("layers/", axis=1)),
    "last axis": (3, on_axis(9), gs.scanned("layers/", axis=-1)),
    "unrolled": (3, unrolled, gs.unrolled()),
    "cycle": (4, cycle, gs.scanned(r"layers_(\d+)/", stride=2)),
    "cycle with remainder": (
        5,
        with_remainder,
        gs.first_match(
            gs.scanned(r"^layers/layers_(\d+)/", stride=2, stack="decoder"),
            gs.unrolled(r"remainder/layers_(\d+)/", start=4, stack="decoder"),
        ),
    ),
    "nested scans": (4, nested, gs.scanned("layers/", axis=(0, 1))),
    "two stacks": (
        5,
        two_stacks,
        gs.first_match(gs.scanned("encoder/layers/", axis=1), gs.unrolled()),
    ),
}

# -- Transformations: all of optax's that take updates and nothing more ----------------

# What optax has no default for, and what has one that changes nothing here.
ARGUMENTS = {
    "adaptive_grad_clip": (0.1,),
    "add_decayed_weights": (0.01,),
    "apply_if_finite": (optax.adam(0.1), 3),
    "apply_every": (2,),
    "chain": (optax.scale_by_adam(), optax.scale(-1.0)),
    "clip": (0.05,),
    "clip_by_block_rms": (0.05,),
    "clip_by_global_norm": (0.05,),
    "ema": (0.9,),
    "flatten": (optax.adam(0.1),),
    "masked": (optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "named_chain": (("a", optax.scale_by_adam()), ("b", optax.scale(0.1))),
    "partition": (
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p),
    ),
    "scale": (2.0,),
    "scale_by_learning_rate": (0.1,),
    "scale_by_schedule": (lambda count: 1 / (count + 1),),
    "trace": (0.9,),
}
# Of the whole model by their nature, or in need of more than updates.
EXCLUDED = {
    "add_noise": "equal noise in every layer, warned of",
    "noisy_sgd": "the same",
    "hutchinson_estimator_diag_hessian": "needs the loss",
    "sophia": "needs the loss",
    "lbfgs": "needs the whole model: an error",
    "scale_by_lbfgs": "the same",
    "momo": "needs the loss's value",
    "momo_adam": "the same",
    "polyak_sgd": "the same",
    "scale_by_polyak": "the same",
    "reduce_on_plateau": "the same",
    "scale_by_muon": "needs the dimension numbers of one tree; `muon` is here",
}


def transformations():
    """Name → transformation, of optax's namespace."""
    found = {}
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name in EXCLUDED or name.startswith("_"):
                continue
            needed = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind is not parameter.VAR_KEYWORD
            ]
            args = ARGUMENTS.get(name, (0.1,) if needed == ["learning_rate"] else ())
            if needed and not args:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecated names
                try:
                    made = function(*args)
                except TypeError:
                    continue
            if isinstance(made, optax.GradientTransformation):
                found[name] = made
    return found


TRANSFORMATIONS = transformations()


def looped(inner, num_layers, rest=REST):
    """Updates of every layer and of the rest, by a loop over the unrolled model."""
    init, update = jax.jit(inner.init), jax.jit(inner.update)
    params, of_rest = layers(num_layers, 0), drawn(99, rest)
    states, rest_state = [init(p) for p in params], rest and init(of_rest)
    out = []
    for step in range(1, NUM_STEPS + 1):
        new = []
        for i, layer in enumerate(layers(num_layers, 100 * step)):
            found, states[i] = update(layer, states[i], params[i])
            new.append(found)
        found = drawn(100 * step + 99, rest)
        if rest:
            found, rest_state = update(found, rest_state, of_rest)
        out.append((new, found))
    return out


def mapped(tx, num_layers, layout, rest=REST):
    """Updates of the whole model by a transformation of it."""
    update = jax.jit(tx.update)
    params = layout(layers(num_layers, 0)) | drawn(99, rest)
    state, out = jax.jit(tx.init)(params), []
    for step in range(1, NUM_STEPS + 1):
        updates = layout(layers(num_layers, 100 * step)) | drawn(100 * step + 99, rest)
        found, state = update(updates, state, params)
        out.append(found)
    return out


def check_law(inner, name_of_layout, wrapped=lambda tx: tx, rest=REST):
    num_layers, layout, depth = LAYOUTS[name_of_layout]
    tx = wrapped(gs.per_layer(inner, depth))
    found = mapped(tx, num_layers, layout, rest)
    wanted = looped(wrapped(inner), num_layers, rest)
    for new, (new_layers, of_rest) in zip(found, wanted, strict=True):
        close(new, layout(new_layers) | of_rest)


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-5, atol=1e-6
        )


def test_the_law_is_asked_of_sixty_transformations_or_more():
    assert len(TRANSFORMATIONS) >= 60


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_on_a_scanned_model_it_is_inner_on_each_layer_of_the_unrolled_one(name):
    number = sorted(TRANSFORMATIONS).index(name)
    check_law(TRANSFORMATIONS[name], ("axis 0", "axis 1")[number % 2], rest={})


# Of every kind: elementwise, norms of leaves and of the tree, factored, orthogonal.
KINDS = {
    "adam": optax.adam(0.1),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "clip_by_global_norm": optax.clip_by_global_norm(0.5),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "muon": contrib.muon(0.1),
}


# Every second pair: each kind is on half of the layouts.
PAIRS = [
    (layout, kind)
    for i, layout in enumerate(LAYOUTS)
    for j, kind in enumerate(KINDS)
    if (i + j) % 2
]


@pytest.mark.core
@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_the_law_holds_wherever_the_layers_are(layout, kind):
    check_law(KINDS[kind], layout)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.scale(0.5), tx, optax.scale(2.0)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "partition": lambda tx: optax.partition({"all": tx}, lambda p: "all"),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_may_be_wrapped_as_inner_may_be(wrapper):
    check_law(optax.lamb(0.1), "axis 1", WRAPPERS[wrapper])


def test_a_rate_may_be_injected_around_it():
    _, layout, depth = LAYOUTS["axis 0"]

    def make(learning_rate):
        return gs.per_layer(optax.lamb(learning_rate), depth)

    injected = optax.inject_hyperparams(make)(learning_rate=0.1)
    found, wanted = (mapped(tx, 3, layout) for tx in (injected, make(0.1)))
    close(found, wanted)


def test_a_scanned_stack_is_traced_once_whatever_its_depth():
    tx = gs.per_layer(optax.lamb(0.1), LAYOUTS["axis 0"][2])

    def num_equations(num_layers):
        params = on_axis(0)(layers(num_layers, 0))
        update = jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p)[0])
        return len(update(params).jaxpr.eqns)

    assert num_equations(2) == num_equations(50)


def test_inner_gets_extra_arguments_whole():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx, updates = gs.per_layer(inner, LAYOUTS["axis 0"][2]), on_axis(0)(layers(3, 0))
    found, _ = tx.update(updates, tx.init(updates), value=jnp.float32(2.0))
    close(found, jax.tree.map(lambda u: 2 * u, updates))


def test_every_dtype_of_a_layer_stays_what_it_is():
    updates = {
        "layers": {
            "a": jnp.ones((3, 4), jnp.bfloat16),
            "b": jnp.ones((3, 4, 2), jnp.float32),
            "c": jnp.ones((3,), jnp.float16),
        }
    }
    tx = gs.per_layer(optax.clip_by_global_norm(1.0), gs.scanned("layers/"))
    clipped, _ = tx.update(updates, tx.init(updates))
    dtypes = jax.tree.map(lambda x: x.dtype, updates)
    assert jax.tree.map(lambda x: x.dtype, clipped) == dtypes
    np.testing.assert_allclose(clipped["layers"]["b"], 1 / np.sqrt(13), rtol=1e-6)


# -- Where the state is ----------------------------------------------------------------


def test_moments_are_trees_like_the_parameters_with_layers_on_their_axis():
    _, layout, depth = LAYOUTS["axis 1"]
    params = layout(layers(3, 0)) | drawn(99, REST)
    state = gs.per_layer(optax.scale_by_adam(), depth).init(params)
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, params)
    assert state.count.keys() == {"layers", "(rest)"}
    assert state.count["layers"].shape == (3,)
    assert state.count["(rest)"].shape == ()


def test_what_has_another_shape_than_the_parameter_has_layers_in_front():
    _, layout, depth = LAYOUTS["axis 1"]
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    params = layout(layers(3, 0)) | drawn(99, REST)
    state = gs.per_layer(inner, depth).init(params)
    of_layer = inner.init(layers(1, 0)[0])
    assert of_layer.v_row["mlp"]["kernel"].shape == (4,)
    assert state.v_row["layers"]["mlp"]["kernel"].shape == (3, 4)
    assert state.v_col["layers"]["mlp"]["kernel"].shape == (3, 6)


def test_unrolled_layers_have_one_entry_each():
    params = unrolled(layers(3, 0))
    state = gs.per_layer(optax.scale_by_adam(), gs.unrolled()).init(params)
    assert state.mu.keys() == params.keys()
    assert state.count["layers"].keys() == {0, 1, 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tree_map_params_maps_the_state(layout):
    num_layers, made, depth = LAYOUTS[layout]
    params = made(layers(num_layers, 0)) | drawn(99, REST)
    tx = gs.per_layer(optax.adamw(0.1), depth)
    state = tx.init(params)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: str(path), params)
    mapped_state = optax.tree_map_params(
        tx, lambda _, path: path, state, paths, transform_non_params=lambda _: "other"
    )
    assert mapped_state[0].mu == paths
    assert mapped_state[0].count == "other"


def test_a_state_is_saved_and_restored_by_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, depth = unrolled(layers(3, 0)) | drawn(99, REST), gs.unrolled()
    tx = gs.per_layer(optax.lamb(0.1), depth)
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", like)
    close(tx.update(params, restored, params)[0], tx.update(params, state, params)[0])


def test_flax_nnx_trains_a_stacked_model_as_a_list_of_layers():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, layers):
            self.layers = layers

    def layer(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 3)
    stacked_model = Model(nnx.vmap(layer)(keys))
    listed = Model(nnx.List([layer(key) for key in keys]))
    tx = gs.per_layer(optax.lamb(0.1), gs.scanned("layers/"))
    for model, optimizer in ((stacked_model, tx), (listed, optax.lamb(0.1))):
        optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        for _ in range(2):  # the parameters are gradients as good as any
            optimizer.update(model, nnx.state(model, nnx.Param))
    for i, one in enumerate(listed.layers):
        np.testing.assert_allclose(
            stacked_model.layers.kernel[i], one.kernel[...], rtol=2e-5, atol=1e-6
        )


def test_without_a_tree_like_the_parameters_it_is_a_state_for_each_stack():
    def init(params):
        if not jax.tree.leaves(params):
            raise ValueError("no parameters")  # so that a placeholder tells nothing
        return {"norm": sum(jnp.sum(x) for x in jax.tree.leaves(params))}

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * state["norm"], updates), state

    inner = optax.GradientTransformation(init, update)
    _, layout, depth = LAYOUTS["axis 1"]
    params = layout(layers(3, 0)) | drawn(99, REST)
    state = gs.per_layer(inner, depth).init(params)
    assert isinstance(state, gs.StatesByStack)
    assert state.states["layers"]["norm"].shape == (3,)
    check_law(inner, "axis 1")


def test_nothing_is_left_of_the_state_of_a_stateless_inner():
    tx = gs.per_layer(optax.clip_by_block_rms(1.0), gs.scanned("layers/"))
    assert tx.init(on_axis(0)(layers(3, 0))) == optax.EmptyState()


def test_trees_without_leaves_have_the_state_of_inner():
    tx = gs.per_layer(optax.adam(0.1), gs.scanned("layers/"))
    masked = jax.tree.map(lambda _: optax.MaskedNode(), on_axis(0)(layers(3, 0)))
    state = tx.init(masked)
    updates, _ = tx.update(masked, state)
    assert updates == masked


# -- The rest of the tree --------------------------------------------------------------


def test_the_rest_may_have_a_transformation_of_its_own():
    _, layout, depth = LAYOUTS["axis 0"]
    params = layout(layers(3, 0)) | drawn(99, REST)
    tx = gs.per_layer(optax.lamb(0.1), depth, rest=optax.sgd(2.0, momentum=0.9))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert isinstance(state, gs.PerLayerState)
    close(updates["embed"], -2 * params["embed"])
    alone = gs.per_layer(optax.lamb(0.1), depth)
    expected, _ = alone.update(params, alone.init(params), params)
    close(updates["layers"], expected["layers"])


def test_identity_passes_the_rest_on_as_the_same_object():
    _, layout, depth = LAYOUTS["axis 0"]
    params = layout(layers(3, 0)) | drawn(99, REST)
    tx = gs.per_layer(optax.sgd(0.1), depth, rest=optax.identity())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["embed"] is params["embed"]


def test_masks_and_none_pass_through():
    params = {"layers": {"w": jnp.ones((3, 4)), "frozen": optax.MaskedNode()}}
    params |= {"none": None, "head": jnp.ones(2)}
    tx = gs.per_layer(optax.adam(0.1), gs.scanned("layers/"))
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# -- Bad input -------------------------------------------------------------------------

ONES = {"w": jnp.ones((3, 4))}


def grows():
    return optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.stack([x, x]), u))


def renames():
    return optax.stateless(lambda u, p: {"new": u})


ERRORS = {
    "no transformation": (
        lambda: gs.per_layer(optax.adam, gs.scanned("layers/")),
        r"`inner` must be an optax.GradientTransformation.*Write `per_layer",
    ),
    "no transformation for the rest": (
        lambda: gs.per_layer(optax.adam(0.1), gs.scanned("layers/"), rest="outer"),
        r"`rest` must be an optax.GradientTransformation",
    ),
    "a line search": (
        lambda: gs.per_layer(optax.lbfgs(), gs.scanned("layers/")).init(
            {"layers": ONES}
        ),
        "L-BFGS.*needs the whole model.*outside",
    ),
    "another shape": (
        lambda: run(grows(), {"layers": ONES}),
        r"must keep the shapes.*\(2, 4\) of \(4,\).*layers/w",
    ),
    "another structure": (
        lambda: run(renames(), {"layers": ONES}),
        "must keep the structure",
    ),
    "roles that disagree": (
        lambda: run(
            optax.adam(0.1),
            {"layers": {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}},
            strict=False,
        ),
        "disagree about its layers.*layers/b holds layers 0, 1",
    ),
    "a layer twice": (
        lambda: run(
            optax.adam(0.1),
            {"a_0": {"w": jnp.ones(2)}, "b_0": {"w": jnp.ones(3)}},
            gs.unrolled(r"_(\d+)/", stack="s"),
        ),
        "gives layer 0 of stack 's' for role 'w' to a_0/w and to b_0/w",
    ),
    "a missing layer": (
        lambda: run(
            optax.adam(0.1),
            {"layers_0": ONES, "layers_1": ONES, "layers_3": ONES},
            gs.unrolled(r"layers_(\d+)/"),
        ),
        "finds layers 0, 1, 3 of stack 'layers', but nothing of layer 2",
    ),
    "a state of the plain transformation": (
        lambda: gs.per_layer(optax.adam(0.1), gs.scanned("layers/")).update(
            {"layers": ONES}, optax.adam(0.1).init({"layers": ONES})
        ),
        "`state` of `per_layer` was made for another grouping",
    ),
    "a state of another depth": (
        lambda: gs.per_layer(optax.adam(0.1), gs.scanned("layers/")).update(
            {"layers": ONES},
            gs.per_layer(optax.adam(0.1), gs.unrolled(r"layers_(\d+)/")).init(
                {"layers_0": ONES, "layers_1": ONES}
            ),
        ),
        "`state` of `per_layer` was made for another grouping",
    ),
    "parameters of another depth": (
        lambda: run(
            optax.lamb(0.1),
            {"layers": ONES},
            params={"layers": {"w": jnp.ones((4, 4))}},
        ),
        r"`params` of `per_layer` has shape \(4, 4\) at layers/w",
    ),
    "a state of another number of layers": (
        lambda: gs.per_layer(optax.adam(0.1), LAYERS).update(
            {"layers": ONES},
            gs.per_layer(optax.adam(0.1), LAYERS).init(
                {"layers": {"w": jnp.ones((5, 4))}}
            ),
        ),
        "has an array of shape .* for stack 'layers' of 3 layers",
    ),
    "a rate that is set for all layers": (
        lambda: gs.per_layer(optax.inject_hyperparams(optax.sgd)(0.1), LAYERS).update(
            {"layers": ONES},
            optax.inject_hyperparams(optax.sgd)(0.1).init({"layers": ONES}),
        ),
        "one value for all layers. To set a rate, inject it outside",
    ),
    "stacks of one name": (
        lambda: run(
            optax.adam(0.1),
            {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))},
            lambda path, leaf: gs.Depth({"a": 1, "b": "1"}[path[0]], "w", axis=0),
        ),
        "need names that differ as text",
    ),
    "parameters of another tree": (
        lambda: run(optax.lamb(0.1), {"layers": ONES}, params={"layers": {}}),
        "`params` of `per_layer` has no leaf layers/w",
    ),
}


LAYERS = gs.scanned("layers/")


def run(inner, updates, depth=LAYERS, params=None, strict=True):
    tx = gs.per_layer(inner, depth, strict=strict)
    params = updates if params is None else params
    return tx.update(updates, tx.init(updates), params)


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_what_to_do(name):
    call, words = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_parameters_are_those_of_the_same_place_whatever_the_names():
    params = {"layers": ONES, "x.y": jnp.ones(1), "x": {"y": 2 * jnp.ones(1)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    found, _ = run(optax.add_decayed_weights(1.0), zeros, params=params)
    assert float(found["x"]["y"][0]) == 2


def test_a_layer_that_some_roles_lack_is_no_gap():
    updates = {f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)}
    updates["layers_1"]["extra"] = jnp.ones(3)
    run(optax.adam(0.1), updates, gs.unrolled(r"layers_(\d+)/"))


def test_equal_noise_in_all_layers_is_warned_of():
    tx = gs.per_layer(optax.add_noise(0.1, 0.5, 0), gs.scanned("layers/"))
    with pytest.warns(gs.DepthWarning, match="same in every layer"):
        tx.init({"layers": ONES})
