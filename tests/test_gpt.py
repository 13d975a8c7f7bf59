import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradsmooth_optax as gs
from benchmarks.models.gpt import GPT, mean_loss, rotate

LAYERS, WIDTH, CONTEXT = 3, 8, 6
TOKENS = np.random.default_rng(0).integers(0, 256, (2, CONTEXT))
VARIANTS = [{}, {"dtype": jnp.bfloat16}]


def build(**options):
    return GPT(256, LAYERS, WIDTH, heads=2, context=CONTEXT, **options)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]


@functools.cache
def initialized(model):
    return jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


@pytest.mark.parametrize("options", VARIANTS, ids=["float32", "bfloat16"])
def test_a_later_byte_does_not_change_earlier_predictions(options):
    model = build(**options)
    predict = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    params = initialized(model)
    changed = TOKENS.copy()
    changed[:, 4] += 1
    before, after = predict(TOKENS), predict(changed % 256)
    assert before.shape == (2, CONTEXT, 256)
    assert before.dtype == jnp.float32
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.array_equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("options", [*VARIANTS, {"remat": True}], ids=str)
def test_axis_0_of_every_leaf_of_the_blocks_is_depth(options):
    blocks = shapes(build(**options))["blocks"]
    for leaf in jax.tree.leaves(blocks):
        assert leaf.shape[0] == LAYERS
        assert leaf.dtype == jnp.float32
    kernels = [*blocks["attention"].values(), blocks["mlp_in"], blocks["mlp_out"]]
    assert all(role["kernel"].ndim == 3 for role in kernels)


def test_layers_are_initialized_apart():
    first, second, third = initialized(build())["blocks"]["mlp_in"]["kernel"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_all_layers_of_all_roles_are_coupled_and_nothing_else():
    params = shapes(build())
    updates = jax.tree.map(
        lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), params
    )
    smooth = gs.smooth_over_depth(gs.scanned("blocks/"), 0.5)
    smoothed, _ = jax.jit(smooth.update)(updates, smooth.init(params))
    changed = {
        path[0].key
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(updates),
            jax.tree.leaves(smoothed),
            strict=True,
        )
        if not np.array_equal(old, new)
    }
    assert changed == {"blocks"}
    kept = jax.tree.map(np.array_equal, updates["blocks"], smoothed["blocks"])
    assert not any(jax.tree.leaves(kept))


def test_rematerialization_changes_no_gradient():
    params = initialized(build())

    def gradient(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, TOKENS) ** 2)

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        gradient(build(remat=True)),
        gradient(build()),
    )


def test_rotary_positions_make_scores_depend_on_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    repeated = [jnp.broadcast_to(x, (1, 10, 1, 8)) for x in (query, key)]
    turned_query, turned_key = (rotate(x)[0, :, 0] for x in repeated)
    scores = turned_query @ turned_key.T
    for distance in range(-9, 10):
        diagonal = jnp.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores[0, 0], jnp.vdot(query, key), rtol=1e-5)
    assert np.ptp(scores) > 0.1


def test_the_state_after_every_layer_can_be_asked_for():
    model = build()
    variables = {"params": shapes(model)}
    _, kept = jax.eval_shape(
        lambda: model.apply(
            jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables),
            TOKENS,
            mutable=["intermediates"],
        )
    )
    (states,) = kept["intermediates"]["blocks"]["states"]
    assert states.shape == (LAYERS, 2, CONTEXT, WIDTH)


def test_the_evaluation_is_the_mean_cross_entropy_over_all_windows():
    model = build()
    params = initialized(model)
    windows = np.random.default_rng(1).integers(0, 256, (7, CONTEXT))
    # Seven windows, three at once: the rest counts too.
    found = jax.jit(lambda p: mean_loss(model, p, jnp.asarray(windows), 3))(params)
    logits = jax.jit(model.apply)({"params": params}, windows[:, :-1])
    logits = np.asarray(logits, np.float64)
    picked = np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    expected = (np.log(np.exp(logits).sum(-1)) - picked).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
